-- Everything that could go on goes on now: parked retries are woken, what is ready is sent again.
-- ARGV: run. Returns {'ok', 0, sends} or {'no', status ('missing')}.
local status = redis.call('HGET', run_key, 'status')
if not status then return { 'no', 'missing' } end
if not LIVE[status] then return { 'no', status } end
local steps = redis.call('SMEMBERS', open_key)
plan_key = plan_key or base .. ':plan:' .. redis.call('HGET', run_key, 'plan')
for _, step in ipairs(redis.call('HKEYS', plan_key)) do
  if not string.find(step, '[ .]') then steps[#steps + 1] = step end
end
for _, step in ipairs(steps) do
  local state, here = load(step), node(step)
  if state.s == 'pending' and redis.call('ZSCORE', ready_key(here.q, step), member(step)) then
    if state.nb then
      state.nb = nil
      redis.call('ZREM', timers_key, member(step))
      redis.call('ZADD', ready_key(here.q, step), number(now), member(step))
    end
    detach(step, state, here)
    save(step, state)
    send(step, '')
  end
end
-- After the others: what is woken is ready, too, but goes on with its canvas.
local WOKEN = { retry = true, limit = true, cache = true }
for _, step in ipairs(redis.call('HKEYS', parked_key)) do
  local state = load(step)
  if state.s == 'waiting' and WOKEN[state.p] then send(step, wake(step, state, 'asked to')) end
end
tell_counts()
return { 'ok', 0, sends }

-- Everything that could go on goes on now: parked retries are woken, what is ready is sent again.
-- ARGV: run. Returns {'ok', (step, signature)…} or {'no', status ('missing')}.
local status = redis.call('HGET', run_key, 'status')
if not status then return { 'no', 'missing' } end
if not LIVE[status] then return { 'no', status } end
plan_key = base .. ':plan:' .. redis.call('HGET', run_key, 'plan')
local reply = { 'ok' }
for _, step in ipairs(redis.call('HKEYS', plan_key)) do
  if string.sub(step, 1, 1) ~= ' ' then
    local state = load(step)
    local here = node(step)
    if state.s == 'waiting' and not ASKS[state.p] then
      reply[#reply + 1] = step
      reply[#reply + 1] = wake(step, state, 'asked to')
    elseif state.s == 'pending' and redis.call('ZSCORE', ready_key(here.q), member(step)) then
      detach(step, state, here.g)
      save(step, state)
      reply[#reply + 1] = step
      reply[#reply + 1] = ''
    end
  end
end
return reply

-- A run whose results were taken over begins. ARGV: run, a step whose result was taken over, how many steps are ready,
-- then (step, queue, deadline ms)…, then (step, how many of its needs have ended)…
-- Returns {'ok', 0, sends} or {'stale'}.
if redis.call('HGET', run_key, 'status') ~= 'queued' or redis.call('ZREM', timers_key, member('!begin')) == 0 then
  return { 'stale' }
end
local at = 4
for _ = 1, tonumber(ARGV[3]) do
  local step = ARGV[at]
  make_ready(step, ARGV[at + 1], tonumber(ARGV[at + 2]))
  -- What stands before it on its canvas is not run.
  local state = load(step)
  detach(step, state, node(step))
  save(step, state)
  send(step, '')
  at = at + 3
end
for i = at, #ARGV, 2 do redis.call('HSET', steps_key, 'n:' .. ARGV[i], ARGV[i + 1]) end
if redis.call('HGET', run_key, 'left') == '0' then
  -- Nothing is left to do but to close it.
  send(ARGV[2], '')
  redis.call('ZADD', leases_key, number(now + 5000), member(ARGV[2]) .. ' !')
end
tell_counts()
return { 'ok', 0, sends }

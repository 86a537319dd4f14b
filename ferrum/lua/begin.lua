-- A run whose results were taken over begins. ARGV: run, how many steps are ready, then (step, queue, deadline ms)…, then
-- (step, how many of its needs have ended)…
-- Returns {'ok'} or {'stale'}.
if redis.call('HGET', run_key, 'status') ~= 'queued' or redis.call('ZREM', timers_key, member('!begin')) == 0 then
  return { 'stale' }
end
local at = 3
for _ = 1, tonumber(ARGV[2]) do
  make_ready(ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2]))
  at = at + 3
end
for i = at, #ARGV, 2 do redis.call('HSET', steps_key, 'n:' .. ARGV[i], ARGV[i + 1]) end
tell_counts()
return { 'ok' }

-- ARGV: '' (no run), lease ms, then (run, step, token)… Returns the numbers (from 0) of those that are no longer held.
local lost = {}
for i = 3, #ARGV, 3 do
  open(ARGV[i])
  local name = member(ARGV[i + 1]) .. ' ' .. ARGV[i + 2]
  local status = redis.call('HGET', run_key, 'status')
  if status and (LIVE[status] or live(node(ARGV[i + 1]))) and redis.call('ZSCORE', leases_key, name) then
    redis.call('ZADD', leases_key, number(now + ARGV[2]), name)
  else
    lost[#lost + 1] = (i - 3) / 3
  end
end
return lost

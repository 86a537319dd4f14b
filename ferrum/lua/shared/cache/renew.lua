-- ARGV: time, '', '', hold ms, then (digest, who)….
-- Returns the numbers (from 0) of those whose turn it is no more.
local lost = {}
for i = 5, #ARGV, 2 do
  local key = base .. ':turn:' .. ARGV[i]
  if redis.call('GET', key) == ARGV[i + 1] then
    redis.call('PEXPIRE', key, ARGV[4])
  else
    lost[#lost + 1] = (i - 5) / 2
  end
end
return lost

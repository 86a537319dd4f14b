-- ARGV: time, hold us, then (key, who)… Returns the numbers (from 0) of those that have no slot any more.
local lost, renewed = {}, {}
for i = 3, #ARGV, 2 do
  open(ARGV[i])
  if redis.call('ZSCORE', slots, ARGV[i + 1]) then
    redis.call('ZADD', slots, number(now + ARGV[2]), ARGV[i + 1])
    renewed[key] = true
  else
    lost[#lost + 1] = (i - 3) / 2
  end
end
for name in pairs(renewed) do
  open(name)
  settle()
end
return lost

-- ARGV: time, hold ms, then (digest, who)…. Returns the numbers (from 0) of those whose turn it is no more.
local lost = {}
for i = 3, #ARGV, 2 do
  open(ARGV[i])
  if holder() == ARGV[i + 1] then
    hold(ARGV[i + 1], ARGV[2])
  else
    lost[#lost + 1] = (i - 3) / 2
  end
end
return lost

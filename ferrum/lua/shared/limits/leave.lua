-- ARGV: time, who, key ('': the one at which it waits). Returns who was granted what is free now.
local who, name = ARGV[2], ARGV[3]
if name == '' then name = redis.call('GET', base .. ':waits:' .. who) end
if not name then return {} end
open(name)
local left = base .. ':left:' .. key .. ' ' .. who
local was = drop(who)
purge()
local names = grant()
if #names > 0 then
  redis.call('SET', left, cjson.encode(names), 'PX', ms(60 * SECOND))
elseif not was then
  -- Perhaps it is asked again because the answer was lost.
  for _, one in ipairs(cjson.decode(redis.call('GET', left) or '[]')) do
    if redis.call('ZSCORE', granted, one) then names[#names + 1] = one end
  end
end
settle()
return names

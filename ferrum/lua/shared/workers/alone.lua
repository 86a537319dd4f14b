-- ARGV: time, holder, us that it is held for. Returns 1 where this holder has the lock now, else 0.
local till, holder = string.match(redis.call('GET', base) or '', '^(%d+) (.*)$')
if till and tonumber(till) > now and holder ~= ARGV[2] then return 0 end
-- Its end is compared; that the key goes away only cleans up.
redis.call('SET', base, number(now + ARGV[3]) .. ' ' .. ARGV[2], 'PX', ms(ARGV[3] + 60000000))
return 1

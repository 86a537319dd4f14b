-- Returns 1 where a beat runs, else 0.
local till = string.match(redis.call('GET', KEYS[1] .. ':beat') or '', '^(%d+) ')
return till and tonumber(till) > tonumber(redis.call('TIME')[1]) and 1 or 0

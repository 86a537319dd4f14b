-- ARGV: id, why ('' where a person says so). Returns {'ok'}, or {'gone'}.
-- What was decided and perhaps not started is given up: resuming begins with the next time from then.
local base, id = KEYS[1], ARGV[1]
local key = base .. ':schedule:' .. id
if redis.call('EXISTS', key) == 0 then return { 'gone' } end
redis.call('ZREM', base .. ':due', id)
redis.call('HDEL', key, 'next', 'firing')
redis.call('HSET', key, 'paused', '1')
if ARGV[2] ~= '' then redis.call('HSET', key, 'error', ARGV[2]) end
return { 'ok' }

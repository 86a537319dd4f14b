-- ARGV: id, name, next time, then (field, value)…
-- Returns {'ok'}, also when the same is asked again, or {'taken'} when another schedule has the name.
local base, id, name = KEYS[1], ARGV[1], ARGV[2]
local first = redis.call('HGET', base .. ':names', name)
if first then return { first == id and 'ok' or 'taken' } end
redis.call('HSET', base .. ':names', name, id)
redis.call('HSET', base .. ':schedule:' .. id, 'id', id, 'name', name, 'next', ARGV[3], unpack(ARGV, 4))
redis.call('ZADD', base .. ':due', ARGV[3], id)
return { 'ok' }

-- ARGV: id, name. Returns {'ok'}, also when it is gone already.
local base, id, name = KEYS[1], ARGV[1], ARGV[2]
redis.call('DEL', base .. ':schedule:' .. id)
redis.call('ZREM', base .. ':due', id)
if redis.call('HGET', base .. ':names', name) == id then redis.call('HDEL', base .. ':names', name) end
return { 'ok' }

-- ARGV: id, next time. Returns {'ok'}, or {'gone'}. One that is not paused keeps its time: it may be a missed one.
local base, id = KEYS[1], ARGV[1]
local key = base .. ':schedule:' .. id
if redis.call('EXISTS', key) == 0 then return { 'gone' } end
if redis.call('HGET', key, 'paused') == '1' then
  redis.call('HSET', key, 'paused', '0', 'next', ARGV[2])
  redis.call('HDEL', key, 'error')
  redis.call('ZADD', base .. ':due', ARGV[2], id)
end
return { 'ok' }

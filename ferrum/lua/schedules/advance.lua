-- What was decided for a due time has been started. ARGV: id, the due time, the next one, the newest time that was
-- fired ('' for none), its run ('' for none), what went wrong ('' for nothing).
-- Returns {'ok'}, or {'no'} when another beat was first, or the schedule was paused or deleted meanwhile.
local base, id = KEYS[1], ARGV[1]
local key = base .. ':schedule:' .. id
if redis.call('EXISTS', key) == 0 then return { 'no' } end
local fired = redis.call('HGET', key, 'fired')
if ARGV[4] ~= '' and (not fired or tonumber(fired) < tonumber(ARGV[4])) then
  redis.call('HSET', key, 'fired', ARGV[4], 'run', ARGV[5], 'error', ARGV[6])
end
if redis.call('HGET', key, 'next') ~= ARGV[2] then return { 'no' } end
redis.call('HDEL', key, 'firing')
redis.call('HSET', key, 'next', ARGV[3])
redis.call('ZADD', base .. ':due', ARGV[3], id)
return { 'ok' }

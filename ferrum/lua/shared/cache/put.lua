-- ARGV: time, digest, who, envelope, life ms. Returns everyone who waits for it.
redis.call('SET', value, ARGV[4], 'PX', ARGV[5])
if redis.call('GET', turn) == who then redis.call('DEL', turn) end
redis.call('ZREM', waiters, who)
-- They leave when they come for it; until then they are named again when this is asked again.
return redis.call('ZRANGE', waiters, 0, -1)

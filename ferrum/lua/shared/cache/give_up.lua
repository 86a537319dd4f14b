-- ARGV: time, digest, who. Returns the first of those who wait, if nobody computes it now.
if redis.call('GET', turn) == who then redis.call('DEL', turn) end
redis.call('ZREM', waiters, who)
if redis.call('EXISTS', turn, value) > 0 then return {} end
return redis.call('ZRANGE', waiters, 0, 0)

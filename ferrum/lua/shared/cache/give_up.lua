-- ARGV: time, digest, who. Returns the first of those who wait, if nobody computes it now.
open(ARGV[2])
local who = ARGV[3]
if holder() == who then redis.call('DEL', turn) end
redis.call('ZREM', waiters, who)
settle()
if holder() or envelope() then return {} end
return redis.call('ZRANGE', waiters, 0, 0)

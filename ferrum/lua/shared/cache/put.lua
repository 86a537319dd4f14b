-- ARGV: time, digest, who, envelope, life ms. Returns everyone who waits for it.
open(ARGV[2])
local who = ARGV[3]
keep(value, ARGV[5], ARGV[4])
if holder() == who then redis.call('DEL', turn) end
redis.call('ZREM', waiters, who)
redis.call('DEL', named)
settle()
-- They leave when they come for it; until then they are named again when this is asked again.
return redis.call('ZRANGE', waiters, 0, -1)

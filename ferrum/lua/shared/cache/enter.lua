-- ARGV: time, digest, who, hold ms. Returns {'hit', envelope}, {'compute'} or {'wait'}.
open(ARGV[2])
local who = ARGV[3]
local kept = envelope()
if kept then
  redis.call('ZREM', waiters, who)
  count('hits')
  return { 'hit', kept }
end
local other = holder()
if not other or other == who then
  hold(who, ARGV[4])
  redis.call('ZREM', waiters, who)
  redis.call('DEL', named)
  if not other then count('misses') end
  settle()
  return { 'compute' }
end
if redis.call('ZADD', waiters, 'NX', number(now), who) == 1 then count('waits') end
redis.call('PEXPIRE', waiters, ms(DAY))
settle()
return { 'wait' }

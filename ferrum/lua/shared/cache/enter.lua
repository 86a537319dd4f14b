-- ARGV: time, digest, who, hold ms. Returns {'hit', envelope}, {'compute'} or {'wait', ms}.
local hold = tonumber(ARGV[4])
local kept = redis.call('GET', value)
if kept then
  redis.call('ZREM', waiters, who)
  count('hits')
  return { 'hit', kept }
end
local holder = redis.call('GET', turn)
if not holder or holder == who then
  redis.call('SET', turn, who, 'PX', hold)
  redis.call('ZREM', waiters, who)
  if not holder then count('misses') end
  return { 'compute' }
end
-- Who was cancelled as it waited never comes.
redis.call('ZREMRANGEBYSCORE', waiters, '-inf', number(now - DAY * 1000))
if redis.call('ZADD', waiters, 'NX', number(now), who) == 1 then count('waits') end
redis.call('PEXPIRE', waiters, DAY)
-- The first who waits looks when the one that computes may have died, the next one hold later, and so on: there is
-- always one who looks in time, and never all of them.
return { 'wait', redis.call('PTTL', turn) + redis.call('ZRANK', waiters, who) * hold }

-- ARGV: time. Returns the workers that are alive.
return redis.call('ZRANGEBYSCORE', base, number(now), '+inf')

-- Messages were revoked. ARGV: time, us that this is remembered, how many at most, ids.
for i = 4, #ARGV do redis.call('ZADD', base, number(now), ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', base, '-inf', number(now - ARGV[2]))
redis.call('ZREMRANGEBYRANK', base, 0, -(ARGV[3] + 1))
-- Times are compared; that the key goes away only cleans up.
redis.call('PEXPIRE', base, ms(ARGV[2] + 60000000))

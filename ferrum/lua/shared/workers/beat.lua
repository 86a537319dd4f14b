-- A worker is alive. ARGV: time, worker, us that this is good for.
redis.call('ZADD', base, number(now + ARGV[3]), ARGV[2])
redis.call('ZREMRANGEBYSCORE', base, '-inf', number(now - 60000000))

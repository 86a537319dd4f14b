-- Returns a flat list of (what and scope, how often).
return redis.call('HGETALL', base .. ':stats')

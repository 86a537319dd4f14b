-- ARGV: time, us that a revoke is remembered, id. Returns 1 where this message was revoked, else 0.
local since = redis.call('ZSCORE', base, ARGV[3])
return since and tonumber(since) > now - ARGV[2] and 1 or 0

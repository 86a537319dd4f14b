-- ARGV: time, target, who, ok ('1' or '0'), latency us, token, failures that open it, us of the window, us that it stays
-- open, weight of the newest latency, ms that all this is kept.
open(ARGV[2])
local who, ok, latency, window = ARGV[3], ARGV[4] == '1', tonumber(ARGV[5]), tonumber(ARGV[8])
local state, kept = look()

local function trip()
  redis.call('HSET', target, 'until', number(now + ARGV[9]))
  redis.call('HDEL', target, 'probe', 'probing')
end

if ok then
  local mean = tonumber(kept.latency or latency)
  redis.call('HSET', target, 'latency', number(mean + (latency - mean) * ARGV[10]))
else
  redis.call('ZADD', failures, number(now), ARGV[6])
  redis.call('ZREMRANGEBYSCORE', failures, '-inf', number(now - window))
end
-- Once it has opened, only the one that was let through to try has a say; others report on calls from before.
if state == 'half_open' and kept.probe == who then
  if ok then
    redis.call('HDEL', target, 'until', 'probe', 'probing')
    redis.call('DEL', failures)
  else
    trip()
  end
elseif state == 'closed' and not ok and redis.call('ZCARD', failures) >= tonumber(ARGV[7]) then
  trip()
end
redis.call('PEXPIRE', target, ARGV[11])
redis.call('PEXPIRE', failures, ARGV[11])

-- ARGV: time, target, who, us that a probe may take. Returns {'yes'} or {'no', us to wait}.
open(ARGV[2])
local who, lease = ARGV[3], tonumber(ARGV[4])
local state, kept = look()
if state == 'closed' then return { 'yes' } end
if state == 'open' then return { 'no', number(kept['until'] - now) } end
local left = (kept.probing or now) - now
if left > 0 and kept.probe ~= who then
  -- As long as such a call takes, or until the one that tries may have died.
  return { 'no', number(math.min(left, math.max(SECOND, 2 * (kept.latency or 0)))) }
end
redis.call('HSET', target, 'probe', who, 'probing', number(now + lease))
return { 'yes' }

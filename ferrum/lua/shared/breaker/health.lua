-- ARGV: time, us of the window, then targets. Returns a flat list of (state, failures, latency us or '').
local reply = {}
for i = 3, #ARGV do
  open(ARGV[i])
  local state, kept = look()
  reply[#reply + 1] = state
  reply[#reply + 1] = redis.call('ZCOUNT', failures, number(now - ARGV[2] + 1), '+inf')
  reply[#reply + 1] = kept.latency or ''
end
return reply

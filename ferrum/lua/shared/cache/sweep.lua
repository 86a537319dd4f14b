-- ARGV: time, how many digests at most, how often the same are named. Returns (digest, who)…: who waits for what is
-- there, and the first who waits for each that nobody computes.
local names = {}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', due_key, '-inf', number(now), 'LIMIT', 0, ARGV[2])) do
  open(name)
  local there = envelope()
  if there or not holder() then
    local last = there and -1 or 0
    for _, who in ipairs(redis.call('ZRANGE', waiters, 0, last)) do
      names[#names + 1] = name
      names[#names + 1] = who
    end
    if redis.call('INCR', named) >= tonumber(ARGV[3]) then
      -- They are gone for good, or come by themselves.
      redis.call('ZREMRANGEBYRANK', waiters, 0, last)
      redis.call('DEL', named)
    end
    redis.call('PEXPIRE', named, ms(DAY))
  end
  settle()
end
return names

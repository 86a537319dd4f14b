-- ARGV: time, how many limits at most. Returns everyone who was granted a slot and did not come for it.
local names = {}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', due_key, '-inf', number(now), 'LIMIT', 0, ARGV[2])) do
  redis.call('ZREM', due_key, name)
  open(name)
  purge()
  grant()
  for _, who in ipairs(redis.call('ZRANGE', granted, 0, -1)) do names[#names + 1] = who end
  for _, who in ipairs(redis.call('ZRANGEBYSCORE', late, missed, '+inf')) do names[#names + 1] = who end
  settle()
end
return names

-- ARGV: the ids of letters. Returns how many of them were there.
local base = KEYS[1]
local list, texts, bytes = base .. ':list', base .. ':texts', base .. ':bytes'
local gone = 0
for _, id in ipairs(ARGV) do
  if redis.call('XDEL', list, id) == 1 then
    gone = gone + 1
    redis.call('DECRBY', bytes, redis.call('HSTRLEN', texts, id))
    redis.call('HDEL', texts, id)
  end
end
return gone

-- What steps that wait for their parts hold of all that runs share. ARGV: '' (no run).
-- Returns (run, step, kind, key, '1' while the step has not ended, else '0')…; what has ended is forgotten.
local reply = {}
for _, entry in ipairs(redis.call('SMEMBERS', holding_key)) do
  local held = cjson.decode(entry)
  open(held[1])
  local going = live(node(held[2])) and not ENDED[load(held[2]).s]
  if not going then redis.call('SREM', holding_key, entry) end
  for i = 1, 4 do reply[#reply + 1] = held[i] end
  reply[#reply + 1] = going and '1' or '0'
end
return reply

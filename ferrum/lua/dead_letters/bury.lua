-- A message is dropped: kept here, answered, and no longer held by whoever took it, all at once.
-- ARGV: the list it stood in, why, its task, its id, its size, its text, '1' where that is whole, the most letters, their
-- most bytes, the key of its answer ('' for none), the answer, its seconds, the hash and the sorted set of messages that
-- are held, its tag there ('' where it has none).
-- Returns the letter's id. The oldest letters make room; the newest always stays.
local base = KEYS[1]
local list, texts, bytes = base .. ':list', base .. ':texts', base .. ':bytes'
local id = redis.call('XADD', list, '*', 'list', ARGV[1], 'reason', ARGV[2], 'task', ARGV[3], 'id', ARGV[4],
  'size', ARGV[5], 'whole', ARGV[7])
redis.call('HSET', texts, id, ARGV[6])
local held = redis.call('INCRBY', bytes, #ARGV[6])
local count = redis.call('XLEN', list)
while count > 1 and (count > tonumber(ARGV[8]) or held > tonumber(ARGV[9])) do
  local oldest = redis.call('XRANGE', list, '-', '+', 'COUNT', 1)[1][1]
  held = redis.call('DECRBY', bytes, redis.call('HSTRLEN', texts, oldest))
  redis.call('HDEL', texts, oldest)
  redis.call('XDEL', list, oldest)
  count = count - 1
end
-- An answer that is there stays: the message was done before, or is not from whom it says.
if ARGV[10] ~= '' and redis.call('SET', ARGV[10], ARGV[11], 'EX', ARGV[12], 'NX') then
  redis.call('PUBLISH', ARGV[10], ARGV[11])
end
if ARGV[15] ~= '' then
  redis.call('HDEL', ARGV[13], ARGV[15])
  redis.call('ZREM', ARGV[14], ARGV[15])
end
return id

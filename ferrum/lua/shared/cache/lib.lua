-- What is kept of one digest:
--   value:<digest>    envelope, for as long as it is good
--   turn:<digest>     who computes it, until its hold runs out
--   waiters:<digest>  sorted set of who waits for it, by when it began to
-- and stats: hash of `hits <scope>`, `misses <scope>`, `waits <scope>`.
local digest, who = ARGV[2], ARGV[3]
local value, turn, waiters = base .. ':value:' .. digest, base .. ':turn:' .. digest, base .. ':waiters:' .. digest
local DAY = 86400 * 1000

local function count(what)
  redis.call('HINCRBY', base .. ':stats', what .. ' ' .. string.match(digest, '^(.*):.*$'), 1)
  redis.call('PEXPIRE', base .. ':stats', 7 * DAY)
end

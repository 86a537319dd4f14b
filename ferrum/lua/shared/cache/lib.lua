-- What is kept of one digest:
--   value:<digest>    until when it is good, a space, and the envelope
--   turn:<digest>     until when, a space, and who computes it
--   waiters:<digest>  sorted set of who waits for it, by when it began to
--   named:<digest>    how often the sweep has named the same who wait
-- Besides, due: sorted set of the digests that somebody waits for, by when the sweep must look; and stats: hash of
-- `hits <scope>`, `misses <scope>`, `waits <scope>`.
local digest
local value, turn, waiters, named
local due_key = base .. ':due'
local SECOND = 1000000
local DAY = 86400 * SECOND

local function open(name)
  digest = name
  value, turn = base .. ':value:' .. digest, base .. ':turn:' .. digest
  waiters, named = base .. ':waiters:' .. digest, base .. ':named:' .. digest
end

-- Who computes it now, and until when.
local function holder()
  local till, who = string.match(redis.call('GET', turn) or '', '^(%d+) (.*)$')
  if till and tonumber(till) > now then return who, tonumber(till) end
end
-- Ends are compared; that a key goes away, a while later, only cleans up.
local function keep(name, ms_kept, what)
  redis.call('SET', name, number(now + ms_kept * 1000) .. ' ' .. what, 'PX', ms_kept + 60000)
end
local function hold(who, ms_held) keep(turn, ms_held, who) end

-- The envelope, while it is good.
local function envelope()
  local kept = redis.call('GET', value) or ''
  local space = string.find(kept, ' ', 1, true)
  if space and tonumber(string.sub(kept, 1, space - 1)) > now then return string.sub(kept, space + 1) end
end

local function count(what)
  redis.call('HINCRBY', base .. ':stats', what .. ' ' .. string.match(digest, '^(.*):'), 1)
  redis.call('PEXPIRE', base .. ':stats', ms(7 * DAY))
end

-- The last thing of each change that somebody may wait for: the sweep looks when the turn may be over or, where it is,
-- a second from now, because a wake-up may be lost or come before its step was parked.
local function settle()
  if redis.call('EXISTS', waiters) == 0 then return redis.call('ZREM', due_key, digest) end
  local _, till = holder()
  redis.call('ZADD', due_key, number(till or now + SECOND), digest)
  redis.call('PEXPIRE', due_key, ms(DAY))
end

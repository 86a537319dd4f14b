-- What is kept of one limit; members are `run step`:
--   slots:<key>    sorted set of who has a slot, by when that runs out
--   granted:<key>  sorted set of those who were handed theirs as they waited and have not come for it, by number
--   waiters:<key>  sorted set of who waits, by number
--   late:<key>     sorted set of who did not come for its slot in time, by the number it has when it comes after all
--   limit:<key>    hash: limit, and hold in us, as they were last said
--   left:<key> <who>             JSON list of who was granted what this one left
--   rate:<key>                   hash: tat, every
--   place:<key> <who> <attempt>  when it may start
--   waits:<who>    the key at which it waits for a slot
-- and due: sorted set of the limits where somebody waits, by when the sweep must look.
-- A number is the time at which its owner began to wait.
local SECOND = 1000000
local HOUR, DAY = 3600 * SECOND, 86400 * SECOND
-- Who was granted a slot and has not come is named again after this time.
local REMIND = SECOND
-- Who did not come in time is named for this much longer: nobody may have been there to wake it.
local MISSED = 5 * SECOND
-- Far more than any wait: taken off the number of who is late, so that it goes before all who wait.
local EARLIER = 1000000 * 1000 * SECOND

local due_key = base .. ':due'
local key, slots, granted, waiters, late, limit_key
local function open(name)
  key = name
  slots, granted, waiters = base .. ':slots:' .. key, base .. ':granted:' .. key, base .. ':waiters:' .. key
  late, limit_key = base .. ':late:' .. key, base .. ':limit:' .. key
end

-- Who is late by a number above this is still named.
local missed = number(now - MISSED - EARLIER)

-- Slots that ran out are free.
local function purge()
  for _, who in ipairs(redis.call('ZRANGEBYSCORE', slots, '-inf', number(now))) do
    redis.call('ZREM', slots, who)
    if redis.call('ZREM', granted, who) == 1 then redis.call('ZADD', late, number(now - EARLIER), who) end
  end
  redis.call('ZREMRANGEBYSCORE', late, '-inf', number(now - HOUR - EARLIER))
end

-- Free slots go to the first of those who wait; returns them.
local function grant()
  local limit, hold = unpack(redis.call('HMGET', limit_key, 'limit', 'hold'))
  local free, names = (limit or 0) - redis.call('ZCARD', slots), {}
  if free <= 0 then return names end
  local first = redis.call('ZPOPMIN', waiters, free)
  for i = 1, #first, 2 do
    redis.call('ZADD', slots, number(now + hold), first[i])
    redis.call('ZADD', granted, first[i + 1], first[i])
    names[#names + 1] = first[i]
  end
  return names
end

-- Whether it was anything here at all.
local function drop(who)
  local was = 0
  for _, set in ipairs({ slots, granted, waiters, late }) do was = was + redis.call('ZREM', set, who) end
  redis.call('DEL', base .. ':waits:' .. who)
  return was > 0
end

-- The last thing of each change: when the sweep must look at this limit (at `soon`, if given), and how long its keys live.
local function settle(soon)
  local last = redis.call('ZREVRANGE', slots, 0, 0, 'WITHSCORES')
  local life = (last[2] or now) - now
  local calls = redis.call('EXISTS', granted) == 1 or redis.call('ZCOUNT', late, missed, '+inf') > 0
  if calls or redis.call('EXISTS', waiters) == 1 then
    local first = redis.call('ZRANGE', slots, 0, 0, 'WITHSCORES')
    local look = tonumber(soon or first[2] or now + 10 * SECOND)
    if calls then look = math.min(look, now + REMIND) end
    redis.call('ZADD', due_key, 'LT', number(look), key)
    redis.call('PEXPIRE', due_key, ms(DAY))
    life = math.max(life, DAY)
  else
    redis.call('ZREM', due_key, key)
  end
  for _, name in ipairs({ slots, granted, waiters, limit_key }) do redis.call('PEXPIRE', name, ms(life)) end
  redis.call('PEXPIRE', late, ms(HOUR))
end

-- ARGV: time, who, attempt, hold us, key of the concurrency ('' for none), its limit, key of the rate ('' for none),
-- us from one start to the next, us that a burst may be ahead of that.
-- Returns {'in'}, {'rate', us to wait} or {'slot'}.
local who, attempt, hold = ARGV[2], ARGV[3], tonumber(ARGV[4])

-- GCRA (ITU-T I.371, annex A) as virtual scheduling, except that who comes too early is not turned away but given
-- the first time that conforms. `tat` is the theoretical arrival time of the next one.
local function reserve(place, rate, every, burst)
  local tat, was = unpack(redis.call('HMGET', rate, 'tat', 'every'))
  local ahead = math.max(0, (tat or now) - now)
  -- The rate was edited: as many as had a place before us are still before us, but in the new rhythm.
  if was and was ~= every then ahead = ahead / was * every end
  local at = now + math.max(0, ahead - burst)
  redis.call('HSET', rate, 'tat', number(now + ahead + every), 'every', every)
  redis.call('PEXPIRE', rate, ms(ahead + every))
  redis.call('SET', place, number(at), 'PX', ms(at - now + DAY))
  return at
end

local place
if ARGV[7] ~= '' then
  place = base .. ':place:' .. ARGV[7] .. ' ' .. who .. ' ' .. attempt
  local at = tonumber(redis.call('GET', place) or reserve(place, base .. ':rate:' .. ARGV[7], ARGV[8], tonumber(ARGV[9])))
  if at > now then
    if ARGV[5] ~= '' then
      open(ARGV[5])
      drop(who)
      purge()
      settle(#grant() > 0 and now)
    end
    return { 'rate', number(at - now) }
  end
end
-- A place that was reached is remembered for as long as it may be asked for again.
local function remember(us) if place then redis.call('PEXPIRE', place, ms(us)) end end

local function enter()
  drop(who)
  redis.call('ZADD', slots, number(now + hold), who)
end
local function queue()
  local mine = redis.call('ZSCORE', waiters, who) or redis.call('ZSCORE', late, who) or number(now)
  -- Of those who were called and have not come, the one that is behind us yields; or a slot would stand empty although
  -- someone is here, and with messages that take longer than a slot is held nobody would ever come in time.
  local absent = redis.call('ZREVRANGE', granted, 0, 0, 'WITHSCORES')
  if absent[1] and tonumber(absent[2]) > tonumber(mine) then
    redis.call('ZREM', slots, absent[1])
    redis.call('ZREM', granted, absent[1])
    redis.call('ZADD', waiters, absent[2], absent[1])
    enter()
    return true
  end
  redis.call('ZREM', late, who)
  redis.call('ZADD', waiters, mine, who)
  redis.call('SET', base .. ':waits:' .. who, key, 'PX', ms(DAY))
  return false
end

local has = true
if ARGV[5] ~= '' then
  open(ARGV[5])
  redis.call('HSET', limit_key, 'limit', ARGV[6], 'hold', number(hold))
  local others = false
  if redis.call('ZSCORE', slots, who) then
    enter()
  else
    purge()
    others = #grant() > 0
    if redis.call('ZSCORE', slots, who) or redis.call('ZCARD', slots) < tonumber(ARGV[6]) then
      enter()
    else
      has = queue()
    end
  end
  settle(others and now)
end
remember(has and hold + 60 * SECOND or DAY)
return { has and 'in' or 'slot' }

-- The repair of one partition. ARGV: '' (no run), reap ('1': give up leases that ran out), ready for how many ms
-- before it is looked at, how often a step may lose its worker, most per kind, then (queue, lane, empty '1' or '0')…
-- Returns sends, and last in how many ms the next timer is due ('' for none).
local function split(name) return string.match(name, '^(%S+) (%S+) ?(%S*)$') end
local function due(key, score)
  return redis.call('ZRANGEBYSCORE', key, '-inf', score, 'LIMIT', 0, ARGV[5])
end

local RUNS_END = {
  ['!wall'] = function() kill('wall_time') end,
  ['!deadline'] = function() end_run('failed', '{"status":"failed","reason":"its deadline has passed"}') end,
  ['!begin'] = function() end_run('failed', '{"status":"failed","reason":"whoever began it died before it was begun"}') end,
}

local function too_late(step)
  local state, here = load(step), node(step)
  if ENDED[state.s] or not live(here) then return end
  local after = fail(step, here, state, 'was not over by its deadline of ' .. here.d / 1000 .. ' s')
  if after[2] == 1 then
    send(step, '')
    redis.call('ZADD', leases_key, number(now + 5000), member(step) .. ' !')
  end
end

for _, name in ipairs(due(timers_key, number(now))) do
  local id, step = split(name)
  redis.call('ZREM', timers_key, name)
  open(id)
  local late = string.match(step, '^(.*)!d$')
  if RUNS_END[step] then
    if live() then RUNS_END[step]() end
  elseif late then
    too_late(late)
  elseif live(node(step)) then
    local state = load(step)
    if state.s == 'waiting' then
      if ASKS[state.p] then
        state.v = '{"approved":false,"expired":true,"by":"","note":""}'
        emit('approval.decided', step, state.v)
      end
      send(step, wake(step, state, 'its time came'))
    end
  end
  tell_counts()
end

local function send_what_follows(step, here, state)
  detach(step, state, here)
  save(step, state)
  local after = conclude(step, here, state, true, '')
  if after[2] == 1 then
    send(step, '')
    -- Nothing else knows that the run is still to be closed: it is looked at again until it is.
    redis.call('ZADD', leases_key, number(now + 5000), member(step) .. ' ' .. (state.k or '!'))
  end
end

local function lose(step, here, state)
  local reserved = state.r or {}
  settle(state, reserved)
  state.l = (state.l or 0) + 1
  emit('step.lost', step, cjson.encode({ attempt = state.a, worker = state.w, reason = 'its worker died', usage = reserved }))
  if state.l > tonumber(ARGV[4]) then
    local error = 'its worker died ' .. state.l .. ' times while it ran; it is not tried again'
    if fail(step, here, state, error)[2] == 1 then
      send(step, '')
      redis.call('ZADD', leases_key, number(now + 5000), member(step) .. ' !')
    end
    return
  end
  state.s, state.k = 'pending', nil
  detach(step, state, here)
  save(step, state)
  redis.call('ZADD', ready_key(here.q, step), number(now), member(step))
  send(step, '')
end

if ARGV[2] == '1' then
  for _, name in ipairs(due(leases_key, number(now))) do
    local id, step, token = split(name)
    redis.call('ZREM', leases_key, name)
    open(id)
    local here = node(step)
    if here and live(here) then
      local state = load(step)
      if state.k == token or (token == '!' and ENDED[state.s]) then
        if state.s == 'running' then
          lose(step, here, state)
        elseif ENDED[state.s] then
          send_what_follows(step, here, state)
        end
      end
    end
    tell_counts()
  end
end

-- Queues are first in, first out: a step whose younger neighbours were claimed, or whose queue is empty, and that is
-- still unclaimed, has no message on its way. A worker may hold the message and not have come to the claim, so that
-- has to be so for a while: `c` is up to when steps had become ready whose messages were gone at the time `t`, and
-- what it was one such while ago is believed (`h`).
local function gone(lane_of, empty)
  local while_ms = ARGV[3] / 2
  local mark, c, t, h = unpack(redis.call('HMGET', marks_key, lane_of, lane_of .. ' c', lane_of .. ' t', lane_of .. ' h'))
  local seen = (mark or 0) - 1000
  if empty then seen = math.max(seen, now - while_ms) end
  if not t or now - t >= while_ms then
    h, c = while_ms == 0 and seen or c or 0, seen
    redis.call('HSET', marks_key, lane_of .. ' c', number(c), lane_of .. ' t', number(now), lane_of .. ' h', number(h))
  end
  return math.min(now - ARGV[3], h)
end
for i = 6, #ARGV, 3 do
  local lane_of = ARGV[i] .. ':' .. ARGV[i + 1]
  local key = base .. ':ready:' .. lane_of
  local waited = redis.call('ZCOUNT', key, '-inf', number(now - ARGV[3] / 2)) > 0
  local names = waited and due(key, number(gone(lane_of, ARGV[i + 2] == '1'))) or {}
  for _, name in ipairs(names) do
    local id, step = split(name)
    open(id)
    local here = node(step)
    local state = here and live(here) and load(step)
    if state and state.s == 'pending' then
      detach(step, state, here)
      save(step, state)
      redis.call('ZADD', key, number(now), name)
      send(step, '')
    else
      redis.call('ZREM', key, name)
    end
  end
end
local first = redis.call('ZRANGE', timers_key, 0, 0, 'WITHSCORES')
sends[#sends + 1] = first[2] and number(math.max(0, first[2] - now)) or ''
return sends

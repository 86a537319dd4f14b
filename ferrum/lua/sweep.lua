-- The repair of one partition. ARGV: '' (no run), reap ('1': give up leases that ran out), ready for how many ms
-- before it is looked at, the rule of when a step is given up (JSON, see `Record.sweep`), most per kind, the lanes
-- (JSON: ["queue:lane", empty 1 or 0]…).
-- Returns {sends, in how many ms the next timer is due ('' for none), the workers that died}.
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
    local state, here = load(step), node(step)
    if state.s == 'pending' and state.nb then
      state.nb = nil
      save(step, state)
      redis.call('ZADD', ready_key(here.q, step), 'XX', number(now), member(step))
      send(step, '')
    elseif state.s == 'waiting' then
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

local rule = cjson.decode(ARGV[4])
local died = {}

-- Why a step that lost its worker so often is not tried again; nothing where it is. A step that ends its workers is told
-- from a night in which they end anyway: those that end are those that run it, and hardly any other.
local function poison(losses)
  local mine, distinct, others = {}, 0, 0
  for _, loss in ipairs(losses) do
    if not mine[loss[1]] then distinct = distinct + 1 end
    mine[loss[1]] = true
  end
  for _, death in ipairs(rule.deaths) do
    if death[2] > losses[1][2] - 10000 and not mine[death[1]] then others = others + 1 end
  end
  if distinct >= rule.few and others * 2 <= distinct then
    return distinct .. ' workers died while they ran it and ' .. others .. ' others did; it is not tried again'
  end
  if #losses >= rule.many then
    return 'its worker died ' .. #losses .. ' times while it ran, within an hour; it is not tried again'
  end
  return nil, distinct
end

-- The first time at once, then later and later: a step that ends its workers is to be alone when it does, and others are
-- to end without it where it does not. Not at the same moment as what was lost together with it.
local function pause(step, workers)
  if workers < 2 then return 0 end
  local odd = now
  for i = 1, #step do odd = odd + i * string.byte(step, i) * 131 end
  return math.min(120000, 1000 * 2 ^ (workers - 2)) * (0.5 + odd % 1000 / 1000)
end

local function lose(step, here, state)
  local reserved = state.r or {}
  settle(state, reserved)
  local losses = {}
  for _, loss in ipairs(type(state.l) == 'table' and state.l or {}) do
    if loss[2] > now - rule.within then losses[#losses + 1] = loss end
  end
  losses[#losses + 1] = { state.w, now }
  state.l = losses
  died[#died + 1] = state.w
  emit('step.lost', step, cjson.encode({ attempt = state.a, worker = state.w, reason = 'its worker died', usage = reserved }))
  local error, workers = poison(losses)
  if error then
    if fail(step, here, state, error)[2] == 1 then
      send(step, '')
      redis.call('ZADD', leases_key, number(now + 5000), member(step) .. ' !')
    end
    return
  end
  state.s, state.k = 'pending', nil
  detach(step, state, here)
  local later = pause(step, workers)
  if later > 0 then
    state.nb = math.floor(now + later)
    redis.call('ZADD', timers_key, number(state.nb), member(step))
  else
    send(step, '')
  end
  save(step, state)
  redis.call('ZADD', ready_key(here.q, step), number(now + later), member(step))
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
local lanes, ready = cjson.decode(ARGV[6]), {}
for i, lane in ipairs(lanes) do ready[i] = base .. ':ready:' .. lane[1] end
-- Of most partitions nothing is ready, and there are many lanes.
if #ready == 0 or redis.call('EXISTS', unpack(ready)) == 0 then lanes = {} end
for i, lane in ipairs(lanes) do
  local key = ready[i]
  local waited = redis.call('ZCOUNT', key, '-inf', number(now - ARGV[3] / 2)) > 0
  local names = waited and due(key, number(gone(lane[1], lane[2] == 1))) or {}
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
return { sends, first[2] and number(math.max(0, first[2] - now)) or '', died }

-- The repair of one partition. ARGV: '' (no run), reap ('1': give up leases that ran out), ready for how many ms
-- before it is looked at, how often a step may lose its worker, most per kind, then (queue, empty '1' or '0')…
-- Returns a flat list of (run, step, signature): what the caller must send now; signature '' means alone, 'head' the
-- segment that the step begins.
local reply = {}
local function send(step, how)
  reply[#reply + 1] = run_id
  reply[#reply + 1] = step
  reply[#reply + 1] = how
end
local function split(name) return string.match(name, '^(%S+) (%S+) ?(%S*)$') end
local function due(key, score)
  return redis.call('ZRANGEBYSCORE', key, '-inf', score, 'LIMIT', 0, ARGV[5])
end
local function use(id)
  open(id)
  plan_key = nil
  return live()
end

for _, name in ipairs(due(timers_key, number(now))) do
  local id, step = split(name)
  redis.call('ZREM', timers_key, name)
  if use(id) and (step == '!wall' or node(step)) then
    local state = step ~= '!wall' and load(step)
    if not state then
      kill('wall_time')
    elseif state.s == 'waiting' then
      if ASKS[state.p] then
        state.v = '{"approved":false,"expired":true,"by":"","note":""}'
        emit('approval.decided', step, state.v)
      end
      send(step, wake(step, state, 'its time came'))
    end
  end
end

local function send_what_follows(step, here, state)
  detach(step, state, here.g)
  save(step, state)
  local after = conclude(here, state, true, '')
  for _, head in ipairs(after[3]) do send(head, 'head') end
  for _, one in ipairs(after[4]) do send(one, '') end
  if after[2] == 1 then
    send(step, '')
    -- Nothing else knows that the run is still to be closed: it is looked at again until it is.
    redis.call('ZADD', leases_key, number(now + 5000), member(step) .. ' ' .. state.k)
  end
end

local function lose(step, here, state)
  local reserved = state.r or {}
  settle(state, reserved)
  state.l = (state.l or 0) + 1
  emit('step.lost', step, cjson.encode({ attempt = state.a, worker = state.w, reason = 'its worker died', usage = reserved }))
  if state.l > tonumber(ARGV[4]) then
    state.s = 'failed'
    local error = 'its worker died ' .. state.l .. ' times while it ran; it is not tried again'
    state.e = emit('step.failed', step, cjson.encode({ attempt = state.a, error = error }))
    redis.call('HSETNX', run_key, 'failed', "'" .. step .. "' failed")
    detach(step, state, here.g)
    save(step, state)
    local after = conclude(here, state, false, '')
    for _, head in ipairs(after[3]) do send(head, 'head') end
    for _, one in ipairs(after[4]) do send(one, '') end
    return
  end
  state.s, state.k = 'pending', nil
  detach(step, state, here.g)
  save(step, state)
  make_ready(step, here.q)
  send(step, '')
end

if ARGV[2] == '1' then
  for _, name in ipairs(due(leases_key, number(now))) do
    local id, step, token = split(name)
    redis.call('ZREM', leases_key, name)
    if use(id) then
      local state, here = load(step), node(step)
      if here and state.k == token then
        if state.s == 'running' then
          lose(step, here, state)
        elseif ENDED[state.s] then
          send_what_follows(step, here, state)
        end
      end
    end
  end
end

-- Queues are first in, first out: a step whose younger neighbours were claimed, or whose queue is empty, and that is
-- still unclaimed, has no message on its way.
for i = 6, #ARGV, 2 do
  local key, limit = ready_key(ARGV[i]), now - ARGV[3]
  if ARGV[i + 1] == '0' then
    limit = math.min(limit, tonumber(redis.call('HGET', marks_key, ARGV[i]) or 0) - 1000)
  end
  for _, name in ipairs(due(key, number(limit))) do
    local id, step = split(name)
    local state = use(id) and node(step) and load(step)
    if state and state.s == 'pending' then
      detach(step, state, node(step).g)
      save(step, state)
      redis.call('ZADD', key, number(now), name)
      send(step, '')
    else
      redis.call('ZREM', key, name)
    end
  end
end
return reply

-- What every script of the run record shares. Prepended to each; KEYS[1] is the partition's base, which
-- carries the hash tag, so that all keys named here are on one node of a cluster.
--
-- One step's state is a JSON object in the hash `steps:<run>`; a step without one is pending and untouched:
--   s status          a attempt         k token of the claim      w worker
--   e id of the event it ended with (that event holds its output)  t when it was claimed, ms
--   f tries that failed                 l workers that died with it, and when: JSON list of [worker, ms]
--   nb after several of those: not before that time, ms            d 1 when it was sent alone, off its canvas
--   c the failed step that made it be skipped                      r what it has reserved of the budget
--   p kind of what it waits for         v what was decided, JSON   b digest of the act that a person is asked about
--   g digests of the acts a person approved
--   q acts decided in this claim        j pieces that it said in this claim
--   o the limit that one of its acts would have passed
--   y 1 when it failed and may          m what it asked to be told again, JSON
--   ak id of the event with what a person was asked last           an how often one was asked
--   rv why it was revoked, before it could run
--   z the frames that it waits for      u the run that it waits for  h the signal that came for it, an envelope
--   same 1 when the next claim goes on with the same attempt
-- `n:<step>` counts its needs that ended; `x:<segment>` says that a step of that canvas was sent alone; `i:<frame>` is
-- the item of a frame; `L:<frame>` its steps that have not ended, `F:<frame>` its step that failed; `s:<name>` the
-- signals that nobody waited for yet, `w:<name>` the steps that wait for one.
--
-- A frame is the steps that run together inside another step, its parent: an item of a fan-out, a round, a branch.
-- `each.3` is the frame of item 3 of `each` and `each.3.sum` a step in it. The plan keeps one node for all of them,
-- under the id with each number written as `*`.
local base, run_id = KEYS[1], ARGV[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local leases_key, timers_key = base .. ':leases', base .. ':timers'
local tenants_key, holding_key = base .. ':tenants', base .. ':holding'
local marks_key, asks_key, runs_key = base .. ':marks', base .. ':asks', base .. ':runs'
local run_key, steps_key, events_key, parked_key, open_key, undo_key, inner_key, late_key
local plan_key, lane, active, asking

local function open(id)
  run_id = id
  run_key, steps_key = base .. ':run:' .. id, base .. ':steps:' .. id
  events_key, parked_key = base .. ':events:' .. id, base .. ':parked:' .. id
  open_key, undo_key, inner_key = base .. ':open:' .. id, base .. ':undo:' .. id, base .. ':inner:' .. id
  late_key = base .. ':late:' .. id
  plan_key, lane, active, asking = nil, nil, 0, 0
end
open(run_id)

local LIVE = { queued = true, running = true, waiting_approval = true }
local ENDED = { completed = true, failed = true, skipped = true, cancelled = true }
-- What depends on a cancelled step goes on as behind a failed one.
local UNDONE = { failed = true, cancelled = true }
local ASKS = { approval = true, ask = true }
-- Who waits for these is not counted: what it waits for is.
local INSIDE = { children = true }
local ROWS = {
  { 'input_tokens', 'input_tokens' }, { 'output_tokens', 'output_tokens' }, { 'total_tokens', 'total_tokens' },
  { 'unpriced', 'cost_micro_usd' }, { 'cost_usd', 'cost_micro_usd' }, { 'tool_calls', 'tool_calls' },
}

local function number(value) return string.format('%d', value) end
local function member(step) return run_id .. ' ' .. step end

-- Of a wide fan-out only the first items are served as its run is, so that a run of ten steps beside it is not last.
-- The lane follows from the step's id: whoever asks gets the same answer.
local FIRST, BEHIND, LAST = 100, 5, 9
local function behind(of) return math.min(LAST, of + BEHIND) end
local function lane_of(step)
  lane = lane or tonumber(redis.call('HGET', run_key, 'lane'))
  for part in string.gmatch(step, '%.(%d+)') do
    if tonumber(part) >= FIRST then return behind(lane) end
  end
  return lane
end
local function in_lane(queue, step) return queue .. ':' .. number(lane_of(step)) end
local function ready_key(queue, step) return base .. ':ready:' .. in_lane(queue, step) end

-- Whether this step may still do something: its run goes on, or it undoes something of one that ends.
local function live(here)
  local status = redis.call('HGET', run_key, 'status')
  return status and (LIVE[status] or (status == 'compensating' and here and here.k)) and status
end

local function parse(raw)
  if raw then return cjson.decode(raw) end
  return { s = 'pending', a = 0 }
end
local function load(step) return parse(redis.call('HGET', steps_key, step)) end
local function save(step, state) redis.call('HSET', steps_key, step, cjson.encode(state)) end

local function planned(field)
  local plan = not plan_key and redis.call('HGET', run_key, 'plan')
  -- Of a run that Redis has let go of nothing is known.
  if not plan_key and not plan then return end
  plan_key = plan_key or base .. ':plan:' .. plan
  local raw = redis.call('HGET', plan_key, field)
  return raw and cjson.decode(raw)
end
local function template(id) return (string.gsub(id, '%.%d+', '.*')) end
local function node(step) return planned(template(step)) end

-- The first `count` parts of a step's id.
local function first_parts(step, count)
  local at = 0
  for _ = 1, count do at = string.find(step, '.', at + 1, true) or #step + 1 end
  return string.sub(step, 1, at - 1)
end
local function parent_of(frame) return string.match(frame, '^(.*)%.[^.]*$') end
-- The frame that a step is in, and what its siblings' ids begin with.
local function frame_of(step, here)
  if here.u == 0 then return step, '' end
  local frame = here.u and parent_of(step)
  return frame, frame and frame .. '.' or ''
end
-- The step that a frame belongs to: a frame without a name of its own is called as its parent is.
local function holder_of(frame, here)
  if here.own then return frame end
  return parent_of(frame)
end

local function emit(kind, step, data, output)
  if output and output ~= '' then
    return redis.call('XADD', events_key, '*', 't', kind, 's', step, 'd', data, 'o', output)
  end
  return redis.call('XADD', events_key, '*', 't', kind, 's', step, 'd', data)
end

-- The output (or a run's input) that the event with this id carries.
local function carried(event_id)
  local entry = redis.call('XRANGE', events_key, event_id, event_id)[1]
  if entry then
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 'o' then return entry[2][i + 1] end
    end
  end
  return ''
end

-- What the caller must send: run, step, how (the signature it was parked with; '' alone; 'head' the segment that the
-- step begins), and in which lane.
local sends = {}
local function send(step, how)
  sends[#sends + 1] = run_id
  sends[#sends + 1] = step
  sends[#sends + 1] = how
  sends[#sends + 1] = lane_of(step)
end

-- The clock of `wall_time` runs while anything may go on, and stops while only people are waited for.
local function start_clock()
  local wall, spent = unpack(redis.call('HMGET', run_key, 'wall', 'spent'))
  if wall then
    redis.call('HSET', run_key, 'since', number(now))
    redis.call('ZADD', timers_key, number(now + wall - (spent or 0)), member('!wall'))
  end
end
local function stop_clock()
  local wall, since = unpack(redis.call('HMGET', run_key, 'wall', 'since'))
  if wall and since then
    redis.call('HINCRBY', run_key, 'spent', number(now - since))
    redis.call('ZREM', timers_key, member('!wall'))
  end
end

-- `active` steps are ready, running, or waiting for anything but a person; `asking` ones wait for a person. What was
-- counted in this script is told to the run at its end, so that a run does not seem to wait between two of its steps.
local in_run
local function tell_counts()
  if active == 0 and asking == 0 then return end
  local still = redis.call('HINCRBY', run_key, 'active', active)
  local asks = redis.call('HINCRBY', run_key, 'asking', asking)
  active, asking = 0, 0
  local status, up = unpack(redis.call('HMGET', run_key, 'status', 'up'))
  local now_waits = still == 0 and asks > 0 and status == 'running'
  local goes_on = still > 0 and status == 'waiting_approval'
  if now_waits then
    redis.call('HSET', run_key, 'status', 'waiting_approval')
    emit('run.waiting', '', '{}')
    stop_clock()
  elseif goes_on then
    redis.call('HSET', run_key, 'status', 'running')
    emit('run.resumed', '', '{}')
    start_clock()
  end
  if up and (now_waits or goes_on) then
    local parent, step = string.match(up, '^(%S+) (%S+)$')
    in_run(parent, function()
      local state = load(step)
      if live() and state.s == 'waiting' and state.u and (state.ua ~= nil) ~= now_waits then
        local change = now_waits and 1 or -1
        active, asking = active - change, asking + change
        state.ua = now_waits and 1 or nil
        save(step, state)
      end
    end)
  end
end
-- Do something in another run of this partition.
in_run = function(id, what)
  local back, back_plan, back_lane, back_active, back_asking = run_id, plan_key, lane, active, asking
  open(id)
  what()
  tell_counts()
  open(back)
  plan_key, lane, active, asking = back_plan, back_lane, back_active, back_asking
end

local wake, end_run, undo_next

local function really_end(status, data, output)
  redis.call('HSET', run_key, 'status', status, 'ended', number(now))
  tell_counts()
  emit('run.ended', '', data, output)
  redis.call('SREM', base .. ':live', run_id)
  local keep, up, tenant = unpack(redis.call('HMGET', run_key, 'keep', 'up', 'tenant'))
  if not up and redis.call('HINCRBY', tenants_key, tenant, -1) <= 0 then redis.call('HDEL', tenants_key, tenant) end
  for _, key in ipairs({ run_key, steps_key, events_key, parked_key, open_key, undo_key, inner_key }) do
    redis.call('PEXPIRE', key, keep)
  end
  plan_key = plan_key or base .. ':plan:' .. redis.call('HGET', run_key, 'plan')
  if redis.call('HINCRBY', plan_key, ' refs', -1) <= 0 then redis.call('PEXPIRE', plan_key, keep) end
  if up then
    local parent, step = string.match(up, '^(%S+) (%S+)$')
    local ended = run_id
    in_run(parent, function()
      if redis.call('SREM', inner_key, step .. ' ' .. ended) == 1 then
        local state = load(step)
        if state.s == 'waiting' and state.u == ended and live(node(step)) then
          send(step, wake(step, state, 'its run ended'))
        end
      elseif redis.call('SREM', inner_key, '! ' .. ended) == 1 then
        local status, undoing = unpack(redis.call('HMGET', run_key, 'status', 'undoing'))
        if status == 'compensating' and (not undoing or ENDED[load(undoing).s]) then undo_next() end
      end
    end)
  end
end

local function make_ready(step, queue, deadline)
  redis.call('ZADD', ready_key(queue, step), number(now), member(step))
  active = active + 1
  if deadline and deadline > 0 then
    redis.call('ZADD', timers_key, number(now + deadline), member(step .. '!d'))
    redis.call('SADD', late_key, step)
  end
end

local function in_time(step)
  redis.call('ZREM', timers_key, member(step .. '!d'))
  redis.call('SREM', late_key, step)
end

-- Undo the last thing that is not undone yet; where there is none the run is at its end. What was done inside of it
-- came last, so that is waited for.
undo_next = function()
  if redis.call('EXISTS', inner_key) == 1 then return end
  local step = redis.call('RPOP', undo_key)
  if step then
    local undo = step .. '.compensate'
    local here = node(undo)
    redis.call('HSET', run_key, 'undoing', undo)
    make_ready(undo, here.q, here.d)
    send(undo, '')
    return
  end
  local ending = cjson.decode(redis.call('HGET', run_key, 'ending'))
  local undone = redis.call('HGET', run_key, 'not_undone')
  if undone then ending.reason = (ending.reason or ending.status) .. '; not undone: ' .. undone end
  really_end(ending.status, cjson.encode(ending))
end

-- The runs inside of a step, or of anything inside of it, end; without a step those of the whole run. Nobody is woken
-- by their end (`!`), but until then they have something to undo.
local function end_inner(step)
  for _, name in ipairs(redis.call('SMEMBERS', inner_key)) do
    local of, id = string.match(name, '^(%S+) (%S+)$')
    if of ~= '!' and (not step or of == step or string.sub(of, 1, #step + 1) == step .. '.') then
      redis.call('SREM', inner_key, name)
      redis.call('SADD', inner_key, '! ' .. id)
      in_run(id, function()
        if live() then end_run('cancelled', '{"status":"cancelled","reason":"what it is part of has ended"}') end
      end)
    end
  end
end

-- The run ends. What completed and can be undone is undone first, unless all went well.
end_run = function(status, data, output)
  for _, name in ipairs({ '!wall', '!deadline', '!begin' }) do redis.call('ZREM', timers_key, member(name)) end
  for _, step in ipairs(redis.call('HKEYS', parked_key)) do
    redis.call('ZREM', asks_key, member(step))
    redis.call('ZREM', timers_key, member(step))
  end
  for _, step in ipairs(redis.call('SMEMBERS', late_key)) do in_time(step) end
  end_inner()
  if status == 'completed' or redis.call('EXISTS', undo_key, inner_key) == 0 then
    return really_end(status, data, output)
  end
  redis.call('HSET', run_key, 'status', 'compensating', 'ending', data)
  tell_counts()
  redis.call('DEL', parked_key)
  emit('run.compensating', '', data)
  undo_next()
end

-- Budgets. The table of rules is in ferrum/governance/budget.py. What a run inside another uses counts in both.
local function each_run_up(what)
  local up = redis.call('HGET', run_key, 'up')
  while up do
    local key = base .. ':run:' .. string.match(up, '^%S+')
    what(key)
    up = redis.call('HGET', key, 'up')
  end
end
local function add_to(key, prefix, usage, sign)
  for name, amount in pairs(usage) do
    if amount ~= 0 then redis.call('HINCRBY', key, prefix .. name, number(sign * amount)) end
  end
end
local function add(prefix, usage, sign)
  if next(usage) == nil then return end
  add_to(run_key, prefix, usage, sign)
  each_run_up(function(key)
    if redis.call('EXISTS', key) == 1 then add_to(key, prefix, usage, sign) end
  end)
end
local function settle(state, usage)
  if state.r then
    add('r:', state.r, -1)
    state.r = nil
  end
  add('u:', usage, 1)
end
local function passes_in(key, wanted)
  local raw = redis.call('HGET', key, 'limits')
  if not raw then return end
  local limits = cjson.decode(raw)
  for _, row in ipairs(ROWS) do
    local counter, limit = row[2], limits[row[2]]
    if row[1] == 'unpriced' then
      if limit and (wanted.unpriced_calls or 0) > 0 then return row[1] end
    elseif limit then
      local spent, reserved = unpack(redis.call('HMGET', key, 'u:' .. counter, 'r:' .. counter))
      if (spent or 0) + (reserved or 0) + (wanted[counter] or 0) > limit then return row[1] end
    end
  end
end
-- The limit that would be passed, and the run whose limit it is. What undoes is not kept from it by a budget.
local function passes(wanted)
  if redis.call('HGET', run_key, 'status') == 'compensating' then return end
  local passed, whose = passes_in(run_key, wanted), run_id
  if passed then return passed, whose end
  each_run_up(function(key)
    if not passed and LIVE[redis.call('HGET', key, 'status')] then
      passed = passes_in(key, wanted)
      whose = passed and string.match(key, '[^:]+$')
    end
  end)
  return passed, whose
end
local REASONS = { unpriced = 'budget.cost_usd is set, but a model has no price: add it to the price file (FERRUM_PRICES)' }
local function kill(limit, whose)
  local reason = REASONS[limit] or ('budget.' .. limit .. ' is used up')
  local data = cjson.encode({ status = 'budget_killed', reason = reason })
  if whose and whose ~= run_id then
    in_run(whose, function() end_run('budget_killed', data) end)
  else
    end_run('budget_killed', data)
  end
end

-- Off its canvas: sent alone from here on, and its canvas can no longer be counted on to reach a join.
local function detach(step, state, here)
  if not state.d then
    state.d = 1
    local _, prefix = frame_of(step, here)
    redis.call('HSET', steps_key, 'x:' .. prefix .. here.g, '1')
  end
end

-- A step ended: count it at the steps behind it, and send those that no canvas will reach.
local function advance(step, here, state, again)
  local begun = {}
  local _, prefix = frame_of(step, here)
  for _, edge in ipairs(here.x) do
    local name, needs, canvas, queue, segment = prefix .. edge[1], edge[2], edge[3], edge[4], edge[5]
    local is_ready
    if again then
      is_ready = redis.call('ZSCORE', ready_key(queue, name), member(name))
    else
      is_ready = needs == 1 or redis.call('HINCRBY', steps_key, 'n:' .. name, 1) == needs
      if is_ready then
        make_ready(name, queue, edge[6])
        if prefix ~= '' then redis.call('SADD', open_key, name) end
      end
    end
    if is_ready then
      if canvas == 0 then
        if not begun[segment] then send(name, 'head') end
        begun[segment] = true
      elseif state.d or (needs > 1 and redis.call('HEXISTS', steps_key, 'x:' .. prefix .. segment) == 1) then
        local after = load(name)
        detach(name, after, { u = here.u, g = segment })
        save(name, after)
        send(name, '')
      end
    end
  end
end

-- The steps of a frame that wait for nothing in it become ready.
local function begin_frame(frame)
  local inside = planned(' f:' .. template(frame))
  if inside.s > 1 then redis.call('HSET', steps_key, 'L:' .. frame, inside.s) end
  local begun = {}
  for _, root in ipairs(inside.r) do
    local step = root[1] == '' and frame or frame .. '.' .. root[1]
    make_ready(step, root[2], root[4])
    redis.call('SADD', open_key, step)
    if not begun[root[3]] then send(step, 'head') end
    begun[root[3]] = true
  end
end
local function label_of(parent, frames, number_of)
  if frames.label then return frames.label == '' and parent or parent .. '.' .. frames.label end
  return parent .. '.' .. number(number_of)
end

-- A step that waited does so no longer.
local function uncount(step, state)
  if ASKS[state.p] then
    redis.call('ZREM', asks_key, member(step))
    asking = asking - 1
  elseif state.ua then
    state.ua = nil
    asking = asking - 1
  elseif not INSIDE[state.p] then
    active = active - 1
  end
end

-- What a step that waits is given back with; `how` the message that brings it is to be sent.
wake = function(step, state, why)
  local signature = redis.call('HGET', parked_key, step)
  uncount(step, state)
  state.s, state.p, state.u = 'pending', nil, nil
  save(step, state)
  make_ready(step, node(step).q)
  redis.call('HDEL', parked_key, step)
  redis.call('ZREM', timers_key, member(step))
  emit('step.resumed', step, cjson.encode({ why = why }))
  return signature or ''
end

local function frame_ended(frame, here)
  local parent = holder_of(frame, here)
  local state = load(parent)
  local frames = state.z
  if state.s ~= 'waiting' or not frames then return end
  local failed = redis.call('HGET', steps_key, 'F:' .. frame)
  frames.left = frames.left - 1
  if failed and not frames.failed then frames.failed = frame end
  local stop = failed and frames.ff == 1
  -- Many at once, so that their messages go in one round trip, but where there may be only few at a time.
  local going = frames.next - frames.total + frames.left
  if not stop and frames.window - going >= frames.chunk then
    local last = math.min(frames.total, frames.next + frames.chunk)
    for i = frames.next, last - 1 do begin_frame(label_of(parent, frames, i)) end
    frames.next = last
  end
  if stop or frames.left == 0 then
    send(parent, wake(parent, state, stop and 'a part of it failed' or 'all of it ended'))
  else
    save(parent, state)
  end
end

-- Take a step that has not ended out of whatever it is in. Returns what it had reserved: nobody knows what it used.
local function withdraw(step, state, here)
  if state.s == 'running' then
    if state.k then redis.call('ZREM', leases_key, member(step) .. ' ' .. state.k) end
    active = active - 1
  elseif state.s == 'waiting' then
    redis.call('HDEL', parked_key, step)
    redis.call('ZREM', timers_key, member(step))
    uncount(step, state)
  elseif redis.call('ZREM', ready_key(here.q, step), member(step)) == 1 then
    if state.nb then redis.call('ZREM', timers_key, member(step)) end
    active = active - 1
  end
  if here.d then in_time(step) end
  local reserved = state.r
  settle(state, reserved or {})
  state.k, state.p, state.u = nil, nil, nil
  return reserved
end

-- What goes on inside a step goes on no longer.
local function cancel_inside(step)
  end_inner(step)
  local start = step .. '.'
  for _, name in ipairs(redis.call('SMEMBERS', open_key)) do
    if string.sub(name, 1, #start) == start then
      local state = load(name)
      if not ENDED[state.s] then
        local reserved = withdraw(name, state, node(name))
        state.s = 'cancelled'
        state.e = emit('step.cancelled', name, cjson.encode({ attempt = state.a, usage = reserved }))
        save(name, state)
      end
      redis.call('SREM', open_key, name)
    end
  end
end

-- The run's last step ended: 1 asks the caller to evaluate the run's outputs and close it.
local function last_ended()
  local failed, denied, outputs = unpack(redis.call('HMGET', run_key, 'failed', 'denied', 'outputs'))
  if denied then
    end_run('policy_blocked', cjson.encode({ status = 'policy_blocked', reason = denied }))
  elseif failed then
    end_run('failed', cjson.encode({ status = 'failed', reason = failed }))
  elseif outputs == '1' then
    return 1
  else
    end_run('completed', '{"status":"completed"}')
  end
  return 0
end

local HOW = { failed = 'failed', cancelled = 'was cancelled' }
-- The last thing of a step that ended (`state` is saved): what follows it, and whether its run ended with it.
local function conclude(step, here, state, again, code)
  local close = 0
  if not again then
    active = active - 1
    if here.d then in_time(step) end
    if here.b then cancel_inside(step) end
    if state.s == 'completed' and here.c then redis.call('RPUSH', undo_key, step) end
  end
  if here.kr then
    if not again then
      if UNDONE[state.s] then
        local before = redis.call('HGET', run_key, 'not_undone')
        local name = "'" .. parent_of(step) .. "'"
        redis.call('HSET', run_key, 'not_undone', before and before .. ', ' .. name or name)
      end
      undo_next()
    end
  else
    local frame = frame_of(step, here)
    local failed = UNDONE[state.s] and not state.y
    advance(step, here, state, again)
    if frame then
      if not again then
        redis.call('SREM', open_key, step)
        if failed then redis.call('HSETNX', steps_key, 'F:' .. frame, step) end
        local left = here.s > 1 and redis.call('HINCRBY', steps_key, 'L:' .. frame, -1) or 0
        if left == 0 then
          frame_ended(frame, here)
        elseif failed then
          local parent = holder_of(frame, here)
          local above = load(parent)
          if above.s == 'waiting' and above.z and above.z.ff == 1 then
            above.z.failed = above.z.failed or frame
            send(parent, wake(parent, above, 'a part of it failed'))
          end
        end
      end
    else
      local left
      if again then
        left = tonumber(redis.call('HGET', run_key, 'left'))
      else
        if failed then redis.call('HSETNX', run_key, 'failed', "'" .. step .. "' " .. HOW[state.s]) end
        left = redis.call('HINCRBY', run_key, 'left', -1)
      end
      if left == 0 then close = last_ended() end
    end
  end
  tell_counts()
  return { code, close, sends }
end

-- A step that was revoked before it could run, now that it could.
local function revoked(step, here, state, token)
  state.s, state.k, state.y = 'cancelled', token, here.y
  local data = { attempt = state.a, error = state.rv, tolerated = here.y and true or nil }
  state.e = emit('step.cancelled', step, cjson.encode(data))
  save(step, state)
  return conclude(step, here, state, false, 'skipped')
end

local function skip(step, here, state, token, reason)
  state.s, state.k = 'skipped', token
  state.e = emit('step.skipped', step, cjson.encode({ reason = reason, cause = state.c }))
  save(step, state)
  return conclude(step, here, state, false, 'skipped')
end

-- A step ends though no worker says so: it failed, or was cancelled.
local function end_step(step, here, state, status, error)
  local reserved = withdraw(step, state, here)
  active = active + 1 -- conclude counts it once more
  state.s = status
  state.y = here.y
  local data = { attempt = state.a, error = error, tolerated = here.y and true or nil, usage = reserved }
  state.e = emit('step.' .. status, step, cjson.encode(data))
  detach(step, state, here)
  save(step, state)
  return conclude(step, here, state, false, '')
end
local function fail(step, here, state, error) return end_step(step, here, state, 'failed', error) end

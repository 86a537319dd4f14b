-- What every script of the run record shares. Prepended to each; KEYS[1] is the partition's base, which
-- carries the hash tag, so that all keys named here are on one node of a cluster.
--
-- One step's state is a JSON object in the hash `steps:<run>`; a step without one is pending and untouched:
--   s status          a attempt         k token of the claim      w worker
--   e id of the event it ended with (that event holds its output)  t when it was claimed, ms
--   f tries that failed                 l tries whose worker died  d 1 when it was sent alone, off its canvas
--   c the failed step that made it be skipped                      r what it has reserved of the budget
--   p kind of what it waits for         v what was decided, JSON   b digest of the act that a person is asked about
--   g digests of the acts a person approved
--   q acts decided in this claim        o the limit that one of them would have passed
--   same 1 when the next claim goes on with the same attempt
-- `n:<step>` counts its needs that ended; `x:<segment>` says that a step of that canvas was sent alone.
local base, run_id = KEYS[1], ARGV[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local leases_key, timers_key = base .. ':leases', base .. ':timers'
local marks_key, asks_key, runs_key = base .. ':marks', base .. ':asks', base .. ':runs'
local run_key, steps_key, events_key, parked_key

local function open(id)
  run_id = id
  run_key, steps_key = base .. ':run:' .. id, base .. ':steps:' .. id
  events_key, parked_key = base .. ':events:' .. id, base .. ':parked:' .. id
end
open(run_id)

local LIVE = { queued = true, running = true, waiting_approval = true }
local ENDED = { completed = true, failed = true, skipped = true }
local ASKS = { approval = true, ask = true }
local ROWS = {
  { 'input_tokens', 'input_tokens' }, { 'output_tokens', 'output_tokens' }, { 'total_tokens', 'total_tokens' },
  { 'unpriced', 'cost_micro_usd' }, { 'cost_usd', 'cost_micro_usd' }, { 'tool_calls', 'tool_calls' },
}

local function number(value) return string.format('%d', value) end
local function member(step) return run_id .. ' ' .. step end
local function ready_key(queue) return base .. ':ready:' .. queue end

local function live()
  local status = redis.call('HGET', run_key, 'status')
  return status and LIVE[status] and status
end

local function parse(raw)
  if raw then return cjson.decode(raw) end
  return { s = 'pending', a = 0 }
end
local function load(step) return parse(redis.call('HGET', steps_key, step)) end
local function save(step, state) redis.call('HSET', steps_key, step, cjson.encode(state)) end

local plan_key
local function node(step)
  plan_key = plan_key or base .. ':plan:' .. redis.call('HGET', run_key, 'plan')
  local raw = redis.call('HGET', plan_key, step)
  return raw and cjson.decode(raw)
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

-- `active` steps are ready, running, or waiting for anything but a person; `asking` ones wait for a person.
local function count(active, asking)
  if active == 0 and asking == 0 then return end
  local still = redis.call('HINCRBY', run_key, 'active', active)
  local asks = redis.call('HINCRBY', run_key, 'asking', asking)
  local status = redis.call('HGET', run_key, 'status')
  if still == 0 and asks > 0 and status == 'running' then
    redis.call('HSET', run_key, 'status', 'waiting_approval')
    emit('run.waiting', '', '{}')
    stop_clock()
  elseif still > 0 and status == 'waiting_approval' then
    redis.call('HSET', run_key, 'status', 'running')
    emit('run.resumed', '', '{}')
    start_clock()
  end
end

local function end_run(status, data, output)
  redis.call('HSET', run_key, 'status', status, 'ended', number(now))
  emit('run.ended', '', data, output)
  redis.call('ZREM', timers_key, member('!wall'))
  redis.call('SREM', base .. ':live', run_id)
  for _, step in ipairs(redis.call('HKEYS', parked_key)) do
    redis.call('ZREM', asks_key, member(step))
    redis.call('ZREM', timers_key, member(step))
  end
  local keep = redis.call('HGET', run_key, 'keep')
  for _, key in ipairs({ run_key, steps_key, events_key, parked_key }) do
    redis.call('PEXPIRE', key, keep)
  end
  plan_key = plan_key or base .. ':plan:' .. redis.call('HGET', run_key, 'plan')
  if redis.call('HINCRBY', plan_key, ' refs', -1) <= 0 then redis.call('PEXPIRE', plan_key, keep) end
end

-- Budgets. The table of rules is in ferrum/governance/budget.py.
local function add(prefix, usage, sign)
  for name, amount in pairs(usage) do
    if amount ~= 0 then redis.call('HINCRBY', run_key, prefix .. name, number(sign * amount)) end
  end
end
local function settle(state, usage)
  if state.r then
    add('r:', state.r, -1)
    state.r = nil
  end
  add('u:', usage, 1)
end
local function passes(limits, wanted)
  for _, row in ipairs(ROWS) do
    local counter, limit = row[2], limits[row[2]]
    if row[1] == 'unpriced' then
      if limit and (wanted.unpriced_calls or 0) > 0 then return row[1] end
    elseif limit then
      local spent, reserved = unpack(redis.call('HMGET', run_key, 'u:' .. counter, 'r:' .. counter))
      if (spent or 0) + (reserved or 0) + (wanted[counter] or 0) > limit then return row[1] end
    end
  end
end
local function limits()
  local raw = redis.call('HGET', run_key, 'limits')
  return raw and cjson.decode(raw)
end
local REASONS = { unpriced = 'budget.cost_usd is set, but a model has no price: add it to the price file (FERRUM_PRICES)' }
local function kill(limit)
  local reason = REASONS[limit] or ('budget.' .. limit .. ' is used up')
  end_run('budget_killed', cjson.encode({ status = 'budget_killed', reason = reason }))
end

local function make_ready(step, queue)
  redis.call('ZADD', ready_key(queue), number(now), member(step))
end

-- Off its canvas: sent alone from here on, and its canvas can no longer be counted on to reach a join.
local function detach(step, state, segment)
  if not state.d then
    state.d = 1
    redis.call('HSET', steps_key, 'x:' .. segment, '1')
  end
end

-- A step ended: count it at the steps behind it. Returns a head of each segment that is ready now, the steps
-- that are ready but that no canvas will reach, and how many became ready.
local function advance(here, state, again)
  local heads, alone, became, begun = {}, {}, 0, {}
  for _, edge in ipairs(here.x) do
    local step, needs, canvas, queue, segment = edge[1], edge[2], edge[3], edge[4], edge[5]
    local is_ready
    if again then
      is_ready = redis.call('ZSCORE', ready_key(queue), member(step))
    else
      is_ready = needs == 1 or redis.call('HINCRBY', steps_key, 'n:' .. step, 1) == needs
      if is_ready then
        make_ready(step, queue)
        became = became + 1
      end
    end
    if is_ready then
      if canvas == 0 then
        if not begun[segment] then heads[#heads + 1] = step end
        begun[segment] = true
      elseif state.d or (needs > 1 and redis.call('HEXISTS', steps_key, 'x:' .. segment) == 1) then
        local behind = load(step)
        detach(step, behind, segment)
        save(step, behind)
        alone[#alone + 1] = step
      end
    end
  end
  return heads, alone, became
end

-- The last thing of a step that ended: what follows it, and whether the run ended with it.
-- 'close' asks the caller to evaluate the run's outputs and close it.
local function conclude(here, state, again, code)
  local heads, alone, became = advance(here, state, again)
  local left
  if again then
    left = tonumber(redis.call('HGET', run_key, 'left'))
  else
    left = redis.call('HINCRBY', run_key, 'left', -1)
    count(became - 1, 0)
  end
  local close = 0
  if left == 0 then
    local failed, denied, outputs = unpack(redis.call('HMGET', run_key, 'failed', 'denied', 'outputs'))
    if denied then
      end_run('policy_blocked', cjson.encode({ status = 'policy_blocked', reason = denied }))
    elseif failed then
      end_run('failed', cjson.encode({ status = 'failed', reason = failed }))
    elseif outputs == '1' then
      close = 1
    else
      end_run('completed', '{"status":"completed"}')
    end
  end
  return { code, close, heads, alone }
end

local function skip(step, here, state, token, reason)
  state.s, state.k = 'skipped', token
  state.e = emit('step.skipped', step, cjson.encode({ reason = reason, cause = state.c }))
  save(step, state)
  return conclude(here, state, false, 'skipped')
end

-- A step is given back to be claimed anew; returns the signature it was parked with.
local function wake(step, state, why)
  local asking = ASKS[state.p] and 1 or 0
  local signature = redis.call('HGET', parked_key, step)
  state.s = 'pending'
  state.p = nil
  save(step, state)
  make_ready(step, node(step).q)
  redis.call('HDEL', parked_key, step)
  redis.call('ZREM', timers_key, member(step))
  if asking == 1 then redis.call('ZREM', asks_key, member(step)) end
  emit('step.resumed', step, cjson.encode({ why = why }))
  count(asking, -asking)
  return signature or ''
end

-- ARGV: run, step, token, worker, lease ms.
-- Returns {'run', plan, attempt, failed tries, verdict, bound, grants JSON, input, memory, signal envelope, tenant,
-- time in ms, marks, then (name, status, output)… of its needs and of what else it reads, items of frames among them},
-- {'skipped', close, sends} (or cancelled), {'pass'} (ended before; its canvas may go on), {'close', 1, {}} (ended, but
-- the run is not closed) or {'drop', why}.
local step, token = ARGV[2], ARGV[3]
local here = node(step)
local status, state = live(here), load(step)
if (state.s == 'skipped' or state.s == 'cancelled') and state.k == token then
  return status and conclude(step, here, state, true, 'skipped') or { 'skipped', 0, {} }
end
if not status then return { 'drop', 'its run has ended' } end
if not here then return { 'drop', 'its run has no such step' } end

local frame, prefix = frame_of(step, here)
if ENDED[state.s] then
  if redis.call('HGET', run_key, 'left') == '0' and not here.k then return { 'close', 1, {} } end
  for _, edge in ipairs(here.x) do
    if edge[3] == 1 and load(prefix .. edge[1]).s == 'pending' then return { 'pass' } end
  end
  return { 'drop', 'it ended before' }
end
local again = state.s == 'running' and state.k == token
if state.s == 'waiting' then return { 'drop', 'it is waiting' } end
if state.nb and now < state.nb then return { 'drop', 'its workers died, it is tried again later' } end
if state.s == 'running' and not again and redis.call('ZSCORE', leases_key, member(step) .. ' ' .. state.k) then
  return { 'drop', 'it is running' }
end
if (frame and redis.call('SISMEMBER', open_key, step) == 0)
  or (here.kr and redis.call('HGET', run_key, 'undoing') ~= step) then
  return { 'drop', 'it was not begun' }
end

local needs, skipped = {}, 0
if #here.n > 0 then
  local names = {}
  for i = 1, #here.n do names[i] = prefix .. here.n[i] end
  -- Not all at once: a script can hand on some thousand values.
  for from = 1, #names, 1000 do
    local some = redis.call('HMGET', steps_key, unpack(names, from, math.min(from + 999, #names)))
    for i = 1, #some do needs[from + i - 1] = some[i] end
  end
end
for i = 1, #here.n do
  local need = parse(needs[i])
  if not ENDED[need.s] then return { 'drop', 'what it needs has not ended' } end
  needs[i] = need
  if (UNDONE[need.s] and not need.y) or need.c then state.c = state.c or need.c or prefix .. here.n[i] end
  if need.s == 'skipped' then skipped = skipped + 1 end
end

local ready = ready_key(here.q, step)
local waited = redis.call('ZSCORE', ready, member(step))
if waited then
  redis.call('ZREM', ready, member(step))
  local mark = redis.call('HGET', marks_key, in_lane(here.q, step))
  if not mark or tonumber(waited) > tonumber(mark) then redis.call('HSET', marks_key, in_lane(here.q, step), waited) end
end
if status == 'queued' then
  redis.call('HSET', run_key, 'status', 'running', 'started', number(now))
  emit('run.started', '', '{}')
  start_clock()
end
if state.rv then return revoked(step, here, state, token) end
if state.c then return skip(step, here, state, token, "'" .. state.c .. "' " .. HOW[load(state.c).s]) end
if skipped > 0 and skipped == #here.n then
  return skip(step, here, state, token, 'all that it needs was skipped')
end

if not again then
  if state.same then state.same = nil else state.a = state.a + 1 end
  state.s, state.k, state.w, state.t, state.q, state.j = 'running', token, ARGV[4], now, nil, nil
  state.nb = nil
  save(step, state)
  emit('step.started', step, '{"attempt":' .. state.a .. ',"worker":' .. cjson.encode(ARGV[4]) .. '}')
end
redis.call('ZADD', leases_key, number(now + ARGV[5]), member(step) .. ' ' .. token)

local of_run = redis.call('HMGET', run_key, 'plan', 'tenant', 'marks')
local reply = { 'run', of_run[1], state.a, state.f or 0, state.v or '', state.b or '',
  state.g and cjson.encode(state.g) or '[]', '', state.m or '', state.h or '', of_run[2], number(now), of_run[3] or '[""]' }
if here.i == 1 then reply[8] = carried(redis.call('HGET', run_key, 'input')) end
local function add(name, how, output)
  reply[#reply + 1] = name
  reply[#reply + 1] = how
  reply[#reply + 1] = output
end
for i = 1, #here.n do
  add(here.n[i], needs[i].s, needs[i].s == 'completed' and carried(needs[i].e) or '')
end
for _, read in ipairs(here.o or {}) do
  local name, count, inside = read[1], read[2], read[3]
  local other = load(count == 0 and inside or first_parts(step, count) .. (inside ~= '' and '.' .. inside or ''))
  add(name, other.s, other.s == 'completed' and carried(other.e) or '')
end
for _, var in ipairs(here.v or {}) do
  add(var[1], 'completed', redis.call('HGET', steps_key, 'i:' .. first_parts(step, var[2])) or '')
end
return reply

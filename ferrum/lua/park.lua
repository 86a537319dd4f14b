-- The step leaves its worker to wait.
-- ARGV: run, step, token, kind, in how many ms to wake it ('' for never), signature, data JSON, usage JSON,
-- digest of the act a person is asked about (''), memory JSON ('' for none), the signal or run that it waits for (''),
-- frames JSON ('' for none; {label or total, next, left, ff, window}), item of the only frame (an envelope, '' for none),
-- then (kind, key)… of what it holds meanwhile of all that runs share.
-- Returns {'ok', 0, sends} or {'stale'}.
local step, token, kind = ARGV[2], ARGV[3], ARGV[4]
local state = load(step)
if state.k ~= token then return { 'stale' } end
if state.s == 'waiting' then return { 'ok', 0, {} } end
local here = node(step)
if not live(here) or state.s ~= 'running' then return { 'stale' } end
settle(state, cjson.decode(ARGV[8]))
state.s, state.p, state.v = 'waiting', kind, nil
state.b = ARGV[9] ~= '' and ARGV[9] or nil
state.m = ARGV[10] ~= '' and ARGV[10] or state.m
if kind == 'retry' then state.f, state.m = (state.f or 0) + 1, nil else state.same = 1 end
if kind == 'run' then state.u = ARGV[11] end
redis.call('HSETNX', parked_key, step, ARGV[6])
redis.call('ZREM', leases_key, member(step) .. ' ' .. token)
if ARGV[5] ~= '' then redis.call('ZADD', timers_key, number(now + ARGV[5]), member(step)) end
local said = emit('step.waiting', step, ARGV[7])
if ASKS[kind] then state.ak, state.an = said, (state.an or 0) + 1 end
for i = 14, #ARGV, 2 do redis.call('SADD', holding_key, cjson.encode({ run_id, step, ARGV[i], ARGV[i + 1] })) end
if here.b and kind ~= 'run' then cancel_inside(step) end
if kind == 'children' then
  state.z = cjson.decode(ARGV[12])
  active = active - 1
end
save(step, state)
local passed, whose = passes({})
if passed then
  kill(passed, whose)
elseif ASKS[kind] then
  redis.call('ZADD', asks_key, number(now), member(step))
  active, asking = active - 1, asking + 1
elseif kind == 'children' then
  local frames = state.z
  if ARGV[13] ~= '' then redis.call('HSET', steps_key, 'i:' .. label_of(step, frames), ARGV[13]) end
  local last = math.min(frames.total, frames.next + frames.window)
  for i = frames.next, last - 1 do begin_frame(label_of(step, frames, i)) end
  frames.next = last
  save(step, state)
elseif kind == 'run' then
  local inside = base .. ':run:' .. ARGV[11]
  local status = redis.call('HGET', inside, 'status')
  if not LIVE[status] and status ~= 'compensating' then
    send(step, wake(step, state, 'its run ended'))
  elseif status == 'queued' then
    -- Its first steps were not sent before there was somebody to come back to.
    in_run(ARGV[11], function()
      for _, root in ipairs(planned(' f:').r) do send(root[1], 'head') end
    end)
  end
elseif kind == 'signal' then
  local came = redis.call('HGET', steps_key, 's:' .. ARGV[11])
  local kept = came and cjson.decode(came) or {}
  if #kept > 0 then
    state.h = table.remove(kept, 1)
    if #kept > 0 then
      redis.call('HSET', steps_key, 's:' .. ARGV[11], cjson.encode(kept))
    else
      redis.call('HDEL', steps_key, 's:' .. ARGV[11])
    end
    send(step, wake(step, state, 'its signal had come'))
  else
    local waiting = redis.call('HGET', steps_key, 'w:' .. ARGV[11])
    waiting = waiting and cjson.decode(waiting) or {}
    waiting[#waiting + 1] = step
    redis.call('HSET', steps_key, 'w:' .. ARGV[11], cjson.encode(waiting))
  end
end
tell_counts()
return { 'ok', 0, sends }

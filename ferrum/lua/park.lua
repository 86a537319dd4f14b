-- The step leaves its worker to wait.
-- ARGV: run, step, token, kind, in how many ms to wake it ('' for never), signature, data JSON, usage JSON,
-- digest of the act a person is asked about ('').
local step, token, kind = ARGV[2], ARGV[3], ARGV[4]
local state = load(step)
if state.k ~= token then return { 'stale' } end
if state.s == 'waiting' then return { 'ok' } end
if not live() or state.s ~= 'running' then return { 'stale' } end
settle(state, cjson.decode(ARGV[8]))
state.s, state.p, state.v = 'waiting', kind, nil
state.b = ARGV[9] ~= '' and ARGV[9] or nil
if kind == 'retry' then state.f = (state.f or 0) + 1 else state.same = 1 end
save(step, state)
redis.call('HSETNX', parked_key, step, ARGV[6])
redis.call('ZREM', leases_key, member(step) .. ' ' .. token)
if ARGV[5] ~= '' then redis.call('ZADD', timers_key, number(now + ARGV[5]), member(step)) end
emit('step.waiting', step, ARGV[7])
local bounds = limits()
local passed = bounds and passes(bounds, {})
if passed then
  kill(passed)
elseif ASKS[kind] then
  redis.call('ZADD', asks_key, number(now), member(step))
  count(-1, 1)
end
return { 'ok' }

-- A worker that stops gives a running step back. ARGV: run, step, token, usage JSON, data JSON.
local step, token = ARGV[2], ARGV[3]
local here = node(step)
if not live(here) then return { 'stale' } end
local state = load(step)
if state.k ~= token then return { 'stale' } end
if state.s == 'pending' then return { 'ok' } end
if state.s ~= 'running' then return { 'stale' } end
settle(state, cjson.decode(ARGV[4]))
state.s = 'pending'
save(step, state)
redis.call('ZREM', leases_key, member(step) .. ' ' .. token)
-- Active it was and is.
redis.call('ZADD', ready_key(here.q, step), number(now), member(step))
emit('step.lost', step, ARGV[5])
return { 'ok' }

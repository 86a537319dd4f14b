-- The task of a step was revoked: the step is cancelled, whatever it does. ARGV: run, step, why.
-- Returns {'ok', 0, sends}, or {'no', what it is instead}.
local step, why = ARGV[2], ARGV[3]
local status = redis.call('HGET', run_key, 'status')
if not status then return { 'no', 'missing' } end
local here = node(step)
if not here then return { 'no', 'no step' } end
if not live(here) then return { 'no', 'run ' .. status } end
local state = load(step)
if ENDED[state.s] then return { 'no', state.s } end
-- Whoever was first stays in the record.
if state.rv then return { 'no', 'revoked already' } end
if frame_of(step, here) and redis.call('SISMEMBER', open_key, step) == 0 then return { 'no', 'not begun' } end
if state.s == 'pending' and not redis.call('ZSCORE', ready_key(here.q, step), member(step)) then
  -- What it needs has not ended; when it could run, it is cancelled instead.
  state.rv = why
  save(step, state)
  return { 'ok', 0, {} }
end
if end_step(step, here, state, 'cancelled', why)[2] == 1 then
  -- The run is still to be closed, by whoever gets this.
  send(step, '')
  redis.call('ZADD', leases_key, number(now + 5000), member(step) .. ' !')
end
return { 'ok', 0, sends }

-- A person decided. ARGV: run, step, verdict JSON, data JSON, approved ('1' or '0').
-- Returns {'ok', signature}, or {'no', what it is instead, the verdict that was first ('')}.
local step = ARGV[2]
local status = redis.call('HGET', run_key, 'status')
if not status then return { 'no', 'missing', '' } end
if not LIVE[status] then return { 'no', 'run ' .. status, load(step).v or '' } end
if not node(step) then return { 'no', 'no step', '' } end
local state = load(step)
if state.s == 'pending' and state.v == ARGV[3] then
  detach(step, state, node(step).g)
  save(step, state)
  return { 'ok', '' }
end
if state.s ~= 'waiting' or not ASKS[state.p] then return { 'no', state.s, state.v or '' } end
state.v = ARGV[3]
if ARGV[5] == '1' and state.b then
  state.g = state.g or {}
  state.g[#state.g + 1] = state.b
end
emit('approval.decided', step, ARGV[4])
return { 'ok', wake(step, state, 'decided') }

-- A person decided. ARGV: run, step, verdict JSON, data JSON, approved ('1' or '0'), id of the event with what
-- they saw ('' for whichever it is).
-- Returns {'ok', 0, sends}, or {'no', what it is instead, the verdict that was first ('')}.
local step = ARGV[2]
local status = redis.call('HGET', run_key, 'status')
if not status then return { 'no', 'missing', '' } end
local here = node(step)
if not here then return { 'no', 'no step', '' } end
if not live(here) then return { 'no', 'run ' .. status, load(step).v or '' } end
local state = load(step)
if state.s == 'pending' and state.v == ARGV[3] then
  detach(step, state, here)
  save(step, state)
  send(step, '')
  return { 'ok', 0, sends }
end
if state.s ~= 'waiting' or not ASKS[state.p] then return { 'no', state.s, state.v or '' } end
if ARGV[6] ~= '' and state.ak ~= ARGV[6] then return { 'no', 'another', '' } end
state.v = ARGV[3]
if ARGV[5] == '1' and state.b then
  state.g = state.g or {}
  state.g[#state.g + 1] = state.b
end
emit('approval.decided', step, ARGV[4])
send(step, wake(step, state, 'decided'))
tell_counts()
return { 'ok', 0, sends }

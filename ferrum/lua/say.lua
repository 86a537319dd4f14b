-- A running step says something. ARGV: run, step, token, number of the piece in this claim, data JSON.
local step, token, piece = ARGV[2], ARGV[3], tonumber(ARGV[4])
local state = load(step)
if state.k ~= token or state.s ~= 'running' or not live(node(step)) then return { 'stale' } end
if (state.j or 0) >= piece then return { 'ok' } end
state.j = piece
save(step, state)
emit('step.output', step, ARGV[5])
return { 'ok' }

-- An act was decided; keep the decision, and reserve what the act may use, before it happens.
-- ARGV: run, step, token, number of the act in this claim, allowed ('1' or '0'), wanted usage JSON, spent usage JSON
-- (by the acts before it in this claim), data JSON.
-- Returns {'ok'}, {'over', limit, sends} when the run ended on it, or {'stale'}.
local step, token, act = ARGV[2], ARGV[3], tonumber(ARGV[4])
local state = load(step)
if state.k ~= token or state.s ~= 'running' then return { 'stale' } end
if state.o then return { 'over', state.o, {} } end
if not live(node(step)) then return { 'stale' } end
if (state.q or 0) >= act then return { 'ok' } end
local wanted = cjson.decode(ARGV[6])
settle(state, cjson.decode(ARGV[7]))
emit('act.decided', step, ARGV[8])
state.q = act
if ARGV[5] == '1' then
  local passed, whose = passes(wanted)
  if passed then
    state.o = passed
    save(step, state)
    kill(passed, whose)
    return { 'over', passed, sends }
  end
  add('r:', wanted, 1)
  state.r = wanted
end
save(step, state)
return { 'ok' }

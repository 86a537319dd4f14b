-- ARGV: run, step, token, status, data JSON, output envelope ('' for none), usage JSON, denied ('' or the reason).
-- Returns {'ok', close, sends} or {'stale'}. Asked again with the same token it answers the same.
local step, token, status = ARGV[2], ARGV[3], ARGV[4]
local state = load(step)
if state.k ~= token then return { 'stale' } end
local again = ENDED[state.s] or false
local here = node(step)
if not live(here) then return again and { 'ok', 0, {} } or { 'stale' } end
if not again then
  if state.s ~= 'running' then return { 'stale' } end
  settle(state, cjson.decode(ARGV[7]))
  state.s, state.h, state.z = status, nil, nil
  state.e = emit('step.' .. status, step, ARGV[5], ARGV[6])
  if status == 'failed' then
    state.y = here.y
    if ARGV[8] ~= '' then
      state.x = ARGV[8]
      if not here.u and not here.k and not here.y then redis.call('HSETNX', run_key, 'denied', ARGV[8]) end
    end
  end
  save(step, state)
  local passed, whose = passes({})
  if passed then
    kill(passed, whose)
    return { 'ok', 0, sends }
  end
end
return conclude(step, here, state, again, 'ok')

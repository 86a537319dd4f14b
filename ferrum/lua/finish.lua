-- ARGV: run, step, token, status, data JSON, output envelope ('' for none), usage JSON, denied ('' or the reason).
-- Returns {'ok', close, heads, alone} or {'stale'}. Asked again with the same token it answers the same.
local step, token, status = ARGV[2], ARGV[3], ARGV[4]
local state = load(step)
if state.k ~= token then return { 'stale' } end
local again = ENDED[state.s] or false
if not live() then return again and { 'ok', 0, {}, {} } or { 'stale' } end
local here = node(step)
if not again then
  if state.s ~= 'running' then return { 'stale' } end
  settle(state, cjson.decode(ARGV[7]))
  state.s = status
  state.e = emit('step.' .. status, step, ARGV[5], ARGV[6])
  if status == 'failed' then
    redis.call('HSETNX', run_key, 'failed', "'" .. step .. "' failed")
    if ARGV[8] ~= '' then redis.call('HSETNX', run_key, 'denied', ARGV[8]) end
  end
  save(step, state)
  local bounds = limits()
  local passed = bounds and passes(bounds, {})
  if passed then
    kill(passed)
    return { 'ok', 0, {}, {} }
  end
end
return conclude(here, state, again, 'ok')

-- The items of frames that are to begin. ARGV: run, step, token, then (frame, envelope)… Returns {'ok'} or {'stale'}.
local state = load(ARGV[2])
if state.k ~= ARGV[3] or state.s ~= 'running' or not live(node(ARGV[2])) then return { 'stale' } end
for i = 4, #ARGV, 2 do redis.call('HSET', steps_key, 'i:' .. ARGV[i], ARGV[i + 1]) end
return { 'ok' }

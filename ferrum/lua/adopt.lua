-- Results that a run takes over before it begins. They are another run's to undo. ARGV: run, then (step, data JSON, output envelope)… Returns {'ok'} or {'stale'}.
if redis.call('HGET', run_key, 'status') ~= 'queued' then return { 'stale' } end
for i = 2, #ARGV, 3 do
  local step = ARGV[i]
  if not ENDED[load(step).s] then
    local kept = cjson.decode(ARGV[i + 1])
    local state = { s = kept.status, a = 0, y = kept.tolerated and 1 or nil, c = kept.cause }
    state.e = emit('step.kept', step, ARGV[i + 1], ARGV[i + 2])
    save(step, state)
    redis.call('HINCRBY', run_key, 'left', -1)
  end
end
return { 'ok' }

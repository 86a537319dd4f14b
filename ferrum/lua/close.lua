-- Every step ended: the run ends. ARGV: run, status, data JSON, outputs envelope (''). Returns {'ok', 0, sends} or {'stale'}.
if not live() or redis.call('HGET', run_key, 'left') ~= '0' then return { 'stale' } end
end_run(ARGV[2], ARGV[3], ARGV[4])
tell_counts()
return { 'ok', 0, sends }

-- Every step ended: the run ends. ARGV: run, status, data JSON, outputs envelope ('').
if not live() or redis.call('HGET', run_key, 'left') ~= '0' then return { 'stale' } end
end_run(ARGV[2], ARGV[3], ARGV[4])
return { 'ok' }

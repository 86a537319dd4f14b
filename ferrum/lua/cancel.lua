-- ARGV: run, data JSON, a name for this request. Returns {'ok', 0, sends} or {'no', status ('missing')}.
-- Nothing else is touched: a claim, a finish and the heartbeat see that the run has ended.
local status = redis.call('HGET', run_key, 'status')
if not status then return { 'no', 'missing' } end
if redis.call('HGET', run_key, 'cancel') == ARGV[3] then return { 'ok', 0, {} } end
if not LIVE[status] then return { 'no', status } end
redis.call('HSET', run_key, 'cancel', ARGV[3])
end_run('cancelled', ARGV[2])
tell_counts()
return { 'ok', 0, sends }

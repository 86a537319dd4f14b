-- ARGV: run, key ('' for none), key's life in ms, plan digest, keep ms, limits JSON ('' for none), wall ms ('' for
-- none), outputs ('1' or '0'), steps, input envelope, created data JSON, then (root, queue)…
-- Returns {'new'}, {'old', run} for a key that was used, or {'plan'} when the plan must be stored first.
local key = ARGV[2]
plan_key = base .. ':plan:' .. ARGV[4]
if redis.call('EXISTS', run_key) == 1 then return { 'old', run_id } end
if key ~= '' then
  local first = redis.call('GET', base .. ':key:' .. key)
  if first then return { 'old', first } end
end
if redis.call('HEXISTS', plan_key, ' doc') == 0 then return { 'plan' } end
if key ~= '' then redis.call('SET', base .. ':key:' .. key, run_id, 'PX', ARGV[3]) end
redis.call('HINCRBY', plan_key, ' refs', 1)
redis.call('PERSIST', plan_key)
redis.call('HSET', run_key, 'status', 'queued', 'plan', ARGV[4], 'keep', ARGV[5], 'outputs', ARGV[8], 'left', ARGV[9],
  'created', number(now))
if ARGV[6] ~= '' then redis.call('HSET', run_key, 'limits', ARGV[6]) end
if ARGV[7] ~= '' then redis.call('HSET', run_key, 'wall', ARGV[7]) end
redis.call('HSET', run_key, 'input', emit('run.created', '', ARGV[11], ARGV[10]))
redis.call('ZADD', runs_key, number(now), run_id)
redis.call('SADD', base .. ':live', run_id)
local roots = 0
for i = 12, #ARGV, 2 do
  make_ready(ARGV[i], ARGV[i + 1])
  roots = roots + 1
end
count(roots, 0)
return { 'new' }

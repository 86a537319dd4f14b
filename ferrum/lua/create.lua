-- ARGV: run, key ('' for none), key's life in ms, plan digest, keep ms, limits JSON ('' for none), wall ms ('' for
-- none), outputs ('1' or '0'), steps, input envelope, created data JSON, lane (its parent's, if any), deadline ms ('' for none), parent
-- ('run step', '' for none), most runs inside each other, begin ('1', or '0': another script begins it), tenant, marks, then (root, queue, deadline ms)…
-- Returns {'new', lane of its messages}, {'old', run} for a key that was used, {'deep'}, {'gone'} when the parent or its step has ended, or {'plan'} when
-- the plan must be stored first.
local MANY = 8
local key = ARGV[2]
plan_key = base .. ':plan:' .. ARGV[4]
-- Asked again: the first answer was lost, and whoever asks is still to send its first messages.
if redis.call('EXISTS', run_key) == 1 then return { 'new', lane_of('') } end
if key ~= '' then
  local till, first = string.match(redis.call('GET', base .. ':key:' .. key) or '', '^(%d+) (.*)$')
  if till and tonumber(till) > now then return { 'old', first } end
end
if redis.call('HEXISTS', plan_key, ' doc') == 0 then return { 'plan' } end
local depth, of_run = 1, tonumber(ARGV[12])
if ARGV[14] ~= '' then
  local parent, step = string.match(ARGV[14], '^(%S+) (%S+)$')
  local deep = redis.call('HGET', base .. ':run:' .. parent, 'depth')
  open(parent)
  -- Cancelled or too late, while its worker got here: nobody would end what begins now.
  local gone = not live(node(step)) or ENDED[load(step).s]
  -- As its step is served: behind, where that is of a wide fan-out and not of its first items.
  if not gone then of_run = lane_of(step) end
  open(ARGV[1])
  if gone then return { 'gone' } end
  plan_key = base .. ':plan:' .. ARGV[4]
  depth = (deep or 1) + 1
  if depth > tonumber(ARGV[15]) then return { 'deep' } end
end
-- Who has many runs here waits behind those who have few.
if ARGV[14] == '' and redis.call('HINCRBY', tenants_key, ARGV[17], 1) > MANY then of_run = behind(of_run) end
if key ~= '' then
  -- Its end is compared; that the key goes away only cleans up.
  redis.call('SET', base .. ':key:' .. key, number(now + ARGV[3]) .. ' ' .. run_id, 'PX', ARGV[3] + 60000)
end
redis.call('HINCRBY', plan_key, ' refs', 1)
redis.call('PERSIST', plan_key)
redis.call('HSET', run_key, 'status', 'queued', 'plan', ARGV[4], 'keep', ARGV[5], 'outputs', ARGV[8], 'left', ARGV[9],
  'created', number(now), 'lane', of_run)
if ARGV[6] ~= '' then redis.call('HSET', run_key, 'limits', ARGV[6]) end
if ARGV[7] ~= '' then redis.call('HSET', run_key, 'wall', ARGV[7]) end
if ARGV[13] ~= '' then redis.call('ZADD', timers_key, number(now + ARGV[13]), member('!deadline')) end
if ARGV[14] ~= '' then
  redis.call('HSET', run_key, 'up', ARGV[14], 'depth', depth)
  local parent, step = string.match(ARGV[14], '^(%S+) (%S+)$')
  redis.call('SADD', base .. ':inner:' .. parent, step .. ' ' .. run_id)
end
redis.call('HSET', run_key, 'tenant', ARGV[17], 'marks', ARGV[18])
redis.call('HSET', run_key, 'input', emit('run.created', '', ARGV[11], ARGV[10]))
redis.call('ZADD', runs_key, number(now), run_id)
redis.call('SADD', base .. ':live', run_id)
if ARGV[16] == '1' then
  for i = 19, #ARGV, 3 do make_ready(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])) end
  tell_counts()
else
  -- Should whoever began it die before the rest is there.
  redis.call('ZADD', timers_key, number(now + 60000), member('!begin'))
end
return { 'new', tonumber(of_run) }

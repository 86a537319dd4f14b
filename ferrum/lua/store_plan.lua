-- ARGV: run, plan digest, then (field, value)… A plan that is there is left as it is, and so is how long it lives.
plan_key = base .. ':plan:' .. ARGV[2]
if redis.call('HEXISTS', plan_key, ' doc') == 0 then
  for i = 3, #ARGV, 2 do redis.call('HSET', plan_key, ARGV[i], ARGV[i + 1]) end
  -- Until a run counts on it: a submitter that dies here leaves nothing behind for ever.
  redis.call('EXPIRE', plan_key, 3600)
end
return { 'ok' }

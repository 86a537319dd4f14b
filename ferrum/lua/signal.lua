-- A signal came. ARGV: run, name, envelope, data JSON, most signals that are kept, a name for this request.
-- Returns {'ok', 0, sends}, {'no', status ('missing')} or {'full'}.
local status = redis.call('HGET', run_key, 'status')
if not status then return { 'no', 'missing' } end
-- Others may have come since it was asked first.
local newest = redis.call('HGET', steps_key, 'last:' .. ARGV[2]) or ''
if string.find(newest, ARGV[6], 1, true) then return { 'ok', 0, {} } end
-- What undoes may wait for one, too.
if not LIVE[status] and status ~= 'compensating' then return { 'no', status } end
local waiting_key, kept_key = 'w:' .. ARGV[2], 's:' .. ARGV[2]
local waiting = redis.call('HGET', steps_key, waiting_key)
local steps, taker, state = waiting and cjson.decode(waiting) or {}, nil, nil
while not taker and #steps > 0 do
  taker = table.remove(steps, 1)
  state = load(taker)
  if state.s ~= 'waiting' or state.p ~= 'signal' or not live(node(taker)) then taker = nil end
end
if #steps > 0 then
  redis.call('HSET', steps_key, waiting_key, cjson.encode(steps))
elseif waiting then
  redis.call('HDEL', steps_key, waiting_key)
end
if not taker then
  local kept = redis.call('HGET', steps_key, kept_key)
  kept = kept and cjson.decode(kept) or {}
  if #kept >= tonumber(ARGV[5]) then return { 'full' } end
  kept[#kept + 1] = ARGV[3]
  redis.call('HSET', steps_key, kept_key, cjson.encode(kept))
end
redis.call('HSET', steps_key, 'last:' .. ARGV[2], string.sub(newest .. ' ' .. ARGV[6], -2700))
emit('signal.received', '', ARGV[4], ARGV[3])
if taker then
  state.h = ARGV[3]
  send(taker, wake(taker, state, 'its signal came'))
end
tell_counts()
return { 'ok', 0, sends }

-- What is to be started for a due time is decided once. ARGV: id, the due time, what this beat would do (JSON).
-- Returns {'ok', what is decided}: ours, or what another beat (perhaps one that died) decided first; or {'no'} when
-- that time has been fired, and when the schedule is paused or gone.
local key = KEYS[1] .. ':schedule:' .. ARGV[1]
if redis.call('HGET', key, 'next') ~= ARGV[2] then return { 'no' } end
redis.call('HSETNX', key, 'firing', ARGV[3])
return { 'ok', redis.call('HGET', key, 'firing') }

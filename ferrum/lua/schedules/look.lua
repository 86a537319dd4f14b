-- A beat runs. ARGV: its name, s that this is good for. Returns {s, us, when the next schedule is due ('' for none)}.
local clock = redis.call('TIME')
redis.call('SET', KEYS[1] .. ':beat', clock[1] + ARGV[2] .. ' ' .. ARGV[1], 'EX', ARGV[2] * 60)
local soonest = redis.call('ZRANGE', KEYS[1] .. ':due', 0, 0, 'WITHSCORES')
return { clock[1], clock[2], soonest[2] or '' }

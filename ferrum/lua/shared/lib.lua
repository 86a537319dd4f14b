-- What every script shares that is asked for something that all runs share. Prepended to each.
-- KEYS[1] is the base, which carries the hash tag, so that all keys named here are on one node of a cluster.
-- ARGV[1] is the time in microseconds, or '' to go by the clock of Redis.
local base = KEYS[1]
local clock = redis.call('TIME')
local now = tonumber(ARGV[1]) or clock[1] * 1000000 + clock[2]

local function number(value) return string.format('%d', value) end
-- Microseconds as the milliseconds that a key may live.
local function ms(value) return number(math.max(1, math.ceil(value / 1000))) end

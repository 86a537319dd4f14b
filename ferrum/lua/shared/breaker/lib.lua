-- What is kept of one target:
--   target:<target>    hash: until (when an open circuit half-opens; absent where it is closed), probe and probing
--                      (who tries whether it is well, and until when), latency (us, EWMA of what went well)
--   failures:<target>  sorted set of what failed, by when; its members are the tokens of the reports
local SECOND = 1000000

local target, failures
local function open(name)
  target, failures = base .. ':target:' .. name, base .. ':failures:' .. name
end

-- Whether it is closed, open or half_open, and the hash as a table.
local function look()
  local kept = {}
  local flat = redis.call('HGETALL', target)
  for i = 1, #flat, 2 do kept[flat[i]] = flat[i + 1] end
  if not kept['until'] then return 'closed', kept end
  return now < tonumber(kept['until']) and 'open' or 'half_open', kept
end

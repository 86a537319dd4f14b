-- What a step waited for outside of its run is there. ARGV: run, step, kind it waits for, why.
-- Returns {'ok', 0, sends}, nothing to send where it does not wait for that any more, or {'gone'} when it has ended.
local step = ARGV[2]
local state = load(step)
if not live(node(step)) or ENDED[state.s] then return { 'gone' } end
if state.s == 'waiting' and state.p == ARGV[3] then
  send(step, wake(step, state, ARGV[4]))
  tell_counts()
end
return { 'ok', 0, sends }

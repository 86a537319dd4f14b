"""One of several processes that call the same target at once; it does what it is told, line by line."""

from __future__ import annotations

import sys

import redis

from ferrum.breaker import Allowed, Breaker, Breaking, State
from ferrum.scripts import Scripts, Who

#: Nothing that is open half-opens, and no probe is given up, while a test runs.
BREAKING = Breaking(failures=20, window_s=300, open_s=300, probe_s=300)


def fail(breaker: Breaker, who: Who) -> int:
    """Call and fail until it is refused; returns how often it called."""
    calls = 0
    while breaker.allow("fails", who) == Allowed():
        calls += 1
        breaker.report("fails", who, ok=False, latency_ms=1)
    return calls


def probe(breaker: Breaker, who: Who) -> int:
    """Once it is half open, ask as many; returns how many of them are let through."""
    while breaker.state("recovers") is State.OPEN:
        pass
    many = [Who(who.run_id, f"s{number}") for number in range(50)]
    return sum(breaker.allow("recovers", one) == Allowed() for one in many)


def say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    url, name = sys.argv[1:]
    with redis.Redis.from_url(url, decode_responses=True) as client:
        breaker = Breaker(Scripts(client), BREAKING)
        breaker.state("fails")
        say("ready")
        for line in sys.stdin:
            say({"fail": fail, "probe": probe}[line.strip()](breaker, Who(name, "s")))

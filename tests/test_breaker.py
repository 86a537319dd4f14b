"""The circuit breaker: opens for all, is tried by one, and says how a target is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import breaking
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharing import Clock, connect, lose_an_answer, step

from ferrum.breaker import Allowed, Breaker, Breaking, Health, Refused, State
from ferrum.scripts import Scripts, Who

A, B, C = (step(number) for number in range(3))
RULE = Breaking(failures=3, window_s=60, open_s=30, probe_s=20)
TARGET = "openai/gpt-5"


@pytest.fixture
def client(clean_redis: str) -> Iterator[redis.Redis]:
    with connect(clean_redis) as client:
        yield client


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(client: redis.Redis, clock: Clock) -> Breaker:
    return Breaker(Scripts(client), RULE, clock)


def fail(breaker: Breaker, times: int = 1, who: Who = A) -> None:
    for _ in range(times):
        breaker.report(TARGET, who, ok=False, latency_ms=10)


def succeed(breaker: Breaker, who: Who = A, latency_ms: float = 10) -> None:
    breaker.report(TARGET, who, ok=True, latency_ms=latency_ms)


def test_a_target_that_nobody_knows_is_well(breaker: Breaker) -> None:
    assert breaker.state(TARGET) is State.CLOSED
    assert breaker.allow(TARGET, A) == Allowed()
    assert breaker.health([TARGET, "other"]) == {TARGET: Health(), "other": Health()}
    assert breaker.health([]) == {}


def test_it_opens_after_so_many_failures_and_for_so_long(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 2)
    assert breaker.allow(TARGET, A) == Allowed()
    fail(breaker)
    assert breaker.state(TARGET) is State.OPEN
    assert breaker.allow(TARGET, A) == Refused(30)
    clock.move(10)
    assert breaker.allow(TARGET, B) == Refused(20)
    assert breaker.allow("other", B) == Allowed()


def test_failures_that_are_too_old_do_not_open_it(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 2)
    clock.move(60)
    fail(breaker)
    assert breaker.health([TARGET])[TARGET] == Health(State.CLOSED, failures=1)
    fail(breaker, 2)
    assert breaker.state(TARGET) is State.OPEN


def test_when_its_time_is_over_one_probe_is_let_through(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.move(30)
    assert breaker.state(TARGET) is State.HALF_OPEN
    assert breaker.allow(TARGET, A) == breaker.allow(TARGET, A) == Allowed()
    assert breaker.allow(TARGET, B) == Refused(1)


def test_a_probe_that_goes_well_closes_it_and_old_failures_are_forgotten(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.move(30)
    breaker.allow(TARGET, A)
    succeed(breaker)
    assert breaker.health([TARGET])[TARGET] == Health(State.CLOSED, 0, 10)
    fail(breaker, 2)
    assert breaker.allow(TARGET, B) == Allowed()


def test_a_probe_that_fails_opens_it_again(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.move(30)
    breaker.allow(TARGET, A)
    fail(breaker)
    assert breaker.allow(TARGET, A) == Refused(30)
    clock.move(30)
    assert breaker.allow(TARGET, B) == Allowed()


def test_a_probe_that_died_is_replaced(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.move(30)
    breaker.allow(TARGET, A)
    clock.move(19.5)
    assert breaker.allow(TARGET, B) == Refused(0.5)
    clock.move(0.5)
    assert breaker.allow(TARGET, B) == Allowed()
    # It was slow, not dead; but it is the other one's turn now.
    succeed(breaker, A)
    assert breaker.allow(TARGET, C) == Refused(1)
    succeed(breaker, B)
    assert breaker.allow(TARGET, C) == Allowed()


def test_what_is_said_of_calls_from_before_it_opened_changes_nothing(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    succeed(breaker, B)
    fail(breaker, who=B)
    assert breaker.allow(TARGET, A) == Refused(30)
    clock.move(30)
    breaker.allow(TARGET, A)
    succeed(breaker, B)
    fail(breaker, who=B)
    assert breaker.state(TARGET) is State.HALF_OPEN
    succeed(breaker, A)
    assert breaker.state(TARGET) is State.CLOSED


def test_who_is_refused_during_a_probe_comes_back_after_about_what_such_a_call_takes(
    breaker: Breaker, clock: Clock
) -> None:
    succeed(breaker, latency_ms=4000)
    fail(breaker, 3)
    clock.move(30)
    breaker.allow(TARGET, A)
    assert breaker.allow(TARGET, B) == Refused(8)


def test_latency_is_a_mean_of_what_went_well_and_follows_it(breaker: Breaker) -> None:
    for latency_ms in (100, 200, 100.5):
        succeed(breaker, latency_ms=latency_ms)
    fail(breaker)
    mean = 100 + 0.2 * 100
    assert breaker.health([TARGET])[TARGET].latency_ms == pytest.approx(mean + 0.2 * (100.5 - mean))


def test_health_says_it_of_many_at_once(breaker: Breaker, client: redis.Redis) -> None:
    breaker.report("a", A, ok=True, latency_ms=7)
    for _ in range(4):
        breaker.report("b", A, ok=False, latency_ms=1)
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert breaker.health(["b", "new", "a"]) == {
        "b": Health(State.OPEN, failures=4),
        "new": Health(),
        "a": Health(latency_ms=7),
    }
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] <= before + 1


def test_a_failure_that_is_reported_again_since_its_answer_was_lost_counts_once(
    breaker: Breaker, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_an_answer(monkeypatch, client)
    fail(breaker)
    assert breaker.health([TARGET])[TARGET].failures == 1


def test_everything_has_its_time(client: redis.Redis) -> None:
    breaker = Breaker(Scripts(client))
    fail(breaker, 5)
    assert isinstance(breaker.allow(TARGET, A), Refused)
    assert all(0 < client.pttl(key) <= 3_600_000 for key in client.scan_iter())


# Against a model, and at once.


class Model:
    """A breaker for one process, as books print it."""

    def __init__(self) -> None:
        self.failures: list[float] = []
        self.until: float | None = None
        self.probe: Who | None = None
        self.probing = 0.0

    def state(self, now: float) -> str:
        if self.until is None:
            return "closed"
        return "open" if now < self.until else "half_open"

    def allow(self, now: float, who: Who) -> bool:
        state = self.state(now)
        if state == "half_open" and (now >= self.probing or self.probe == who):
            self.probe, self.probing = who, now + RULE.probe_s
            return True
        return state == "closed"

    def report(self, now: float, who: Who, ok: bool) -> None:
        state = self.state(now)
        if not ok:
            self.failures = [one for one in [*self.failures, now] if one > now - RULE.window_s]
        probed = state == "half_open" and self.probe == who
        if probed and ok:
            self.until = self.probe = None
            self.probing, self.failures = 0, []
        elif (probed or (state == "closed" and len(self.failures) >= RULE.failures)) and not ok:
            self.until, self.probe, self.probing = now + RULE.open_s, None, 0


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from([0, 1, 10, 20, 35]), st.sampled_from(["allow", "ok", "bad", "bad"]),
                  st.sampled_from([A, B])),
        max_size=40,
    )
)  # fmt: skip
def test_whatever_happens_it_is_what_books_print(client: redis.Redis, moves: list[tuple[int, str, Who]]) -> None:
    client.flushall()
    clock, model = Clock(), Model()
    breaker = Breaker(Scripts(client), RULE, clock)
    for seconds, move, who in moves:
        clock.move(seconds)
        if move == "allow":
            assert (breaker.allow(TARGET, who) == Allowed()) == model.allow(clock.now, who)
        else:
            breaker.report(TARGET, who, ok=move == "ok", latency_ms=1)
            model.report(clock.now, who, move == "ok")
        said = breaker.health([TARGET])[TARGET]
        alive = [one for one in model.failures if one > clock.now - RULE.window_s]
        assert (said.state, said.failures) == (model.state(clock.now), len(alive))


def test_several_processes_open_it_together_and_one_of_them_probes(clean_redis: str, client: redis.Redis) -> None:
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(Path(breaking.__file__)), clean_redis, str(number)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for number in range(3)
        ]
        stack.callback(lambda: [process.kill() for process in processes])

        def heard() -> list[str]:
            return [process.stdout.readline().strip() for process in processes if process.stdout]

        def tell(what: str) -> list[int]:
            for process in processes:
                assert process.stdin
                process.stdin.write(f"{what}\n")
                process.stdin.flush()
            return [int(line) for line in heard()]

        assert heard() == ["ready"] * 3
        failures = sum(tell("fail"))
        # What the others had been allowed just before it opened.
        assert 0 <= failures - breaking.BREAKING.failures <= len(processes) - 1
        brief = Breaker(Scripts(client), replace(breaking.BREAKING, failures=1, open_s=0.2))
        brief.report("recovers", A, ok=False, latency_ms=1)
        assert sum(tell("probe")) == 1

"""Limits: so many at once, so many in a time, everyone in turn, and no slot lost for good."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import Queue

import pytest
import redis
from fleet import PATIENCE_S, eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharing import Clock, connect, lose_an_answer, step

from ferrum.limits import SAFETY_S, Concurrency, Entered, Limits, Rate, Wait
from ferrum.scripts import Scripts, Who

ONE = Concurrency("gpu", 1)
TWO = Concurrency("gpu", 2)
A, B, C, D, E, F = (step(number) for number in range(6))
HOLD_S = 10.0
QUEUED = Wait(SAFETY_S, "'gpu' lets in 1 at once")


@pytest.fixture
def client(clean_redis: str) -> Iterator[redis.Redis]:
    with connect(clean_redis) as client:
        yield client


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(client: redis.Redis, clock: Clock) -> Limits:
    return Limits(Scripts(client), clock)


@pytest.fixture
def enter(limits: Limits) -> Callable[..., Entered | Wait]:
    def ask(who: Who, concurrency: Concurrency | None = ONE, rate: Rate | None = None, **more: int) -> Entered | Wait:
        return limits.enter(who, concurrency, rate, hold_s=HOLD_S, **more)

    return ask


Enter = Callable[..., Entered | Wait]


# So many at once.


def test_what_has_no_limit_enters(enter: Enter) -> None:
    assert enter(A, None, None) == Entered()


def test_no_more_enter_than_the_limit_and_the_rest_wait_in_turn(enter: Enter, limits: Limits) -> None:
    assert [enter(who, TWO) for who in (A, B)] == [Entered(), Entered()]
    assert enter(C, TWO) == enter(D, TWO) == Wait(SAFETY_S, "'gpu' lets in 2 at once")
    assert limits.leave(B, "gpu") == [C]
    assert limits.leave(A, "gpu") == [D]
    assert enter(D, TWO) == enter(C, TWO) == Entered()
    assert enter(A, TWO) == Wait(SAFETY_S, "'gpu' lets in 2 at once")


def test_limits_of_other_keys_do_not_count(enter: Enter) -> None:
    assert enter(A) == enter(B, Concurrency("cpu", 1)) == Entered()


def test_who_is_in_enters_again(enter: Enter, limits: Limits) -> None:
    assert enter(A) == enter(A) == Entered()
    assert limits.leave(A, "gpu") == []
    assert enter(B) == Entered()


def test_who_asks_again_keeps_its_place_in_the_queue(enter: Enter, limits: Limits, clock: Clock) -> None:
    enter(A)
    for who in (B, C, B):
        clock.move(0.1)
        assert enter(who) == QUEUED
    assert limits.leave(A, "gpu") == [B]


def test_a_granted_slot_is_taken_from_nobody_by_who_comes_later(enter: Enter, limits: Limits, clock: Clock) -> None:
    enter(A)
    clock.move(0.1)
    enter(B)
    clock.move(0.1)
    limits.leave(A, "gpu")
    assert enter(C) == QUEUED
    assert enter(B) == Entered()


def test_the_slot_of_one_that_is_not_renewed_goes_to_the_next(enter: Enter, limits: Limits, clock: Clock) -> None:
    enter(A)
    enter(B)
    assert limits.sweep() == []
    clock.move(HOLD_S)
    assert limits.sweep() == [B]
    assert enter(B) == Entered()
    assert limits.renew([("gpu", A), ("gpu", B)], HOLD_S) == [("gpu", A)]


def test_a_slot_that_ran_out_is_free_for_who_comes_before_any_sweep(enter: Enter, clock: Clock) -> None:
    enter(A)
    clock.move(HOLD_S)
    assert enter(B) == Entered()
    assert enter(A) == QUEUED


def test_a_slot_is_held_while_it_is_renewed(enter: Enter, limits: Limits, clock: Clock) -> None:
    enter(A)
    enter(B)
    for _ in range(5):
        clock.move(HOLD_S / 2)
        assert limits.renew([("gpu", A)], HOLD_S) == []
        assert limits.sweep() == []
    assert enter(B) == QUEUED


def test_nothing_to_renew_is_nothing_to_ask(limits: Limits) -> None:
    assert limits.renew([], HOLD_S) == []


def test_who_does_not_come_is_named_by_the_sweep_until_it_comes(enter: Enter, limits: Limits, clock: Clock) -> None:
    enter(A)
    enter(B)
    assert limits.leave(A, "gpu") == [B]
    assert limits.sweep() == []
    for _ in range(2):
        clock.move(1)
        assert limits.sweep() == [B]
        assert limits.sweep() == []
    enter(B)
    clock.move(1)
    assert limits.sweep() == []


def test_who_comes_too_late_for_its_slot_goes_before_all_who_wait(enter: Enter, limits: Limits, clock: Clock) -> None:
    for who in (A, B, C, D):
        enter(who)
        clock.move(0.1)
    assert limits.leave(A, "gpu") == [B]
    clock.move(HOLD_S)
    assert limits.sweep() == [C, B]
    assert enter(C) == Entered()
    assert enter(B) == QUEUED
    assert limits.leave(C, "gpu") == [B]
    assert enter(B) == Entered()
    assert limits.leave(B, "gpu") == [D]


def test_who_is_late_takes_the_slot_of_one_behind_it_that_has_not_come(
    enter: Enter, limits: Limits, clock: Clock
) -> None:
    for who in (A, B, C, D):
        enter(who)
        clock.move(0.1)
    limits.leave(A, "gpu")
    clock.move(HOLD_S)
    assert limits.sweep() == [C, B]
    assert enter(B) == Entered()
    assert enter(C) == QUEUED
    assert limits.leave(B, "gpu") == [C]
    assert enter(C) == Entered()


def test_who_never_comes_is_not_named_for_ever(enter: Enter, limits: Limits, clock: Clock) -> None:
    for who in (A, B):
        enter(who)
    limits.leave(A, "gpu")
    named = 0
    for _ in range(30):
        clock.move(1)
        named += len(limits.sweep())
    # Each second that it has its slot, and five more.
    assert named == 15


def test_everyone_gets_in_although_every_wake_up_takes_longer_than_a_slot_is_held(
    enter: Enter, limits: Limits, clock: Clock
) -> None:
    todo = deque([A, B, C, D, E, F])
    done: list[Who] = []
    while todo:
        who = todo.popleft()
        clock.move(HOLD_S * 1.5)
        limits.sweep()
        if enter(who) == Entered():
            done.append(who)
            limits.leave(who, "gpu")
        else:
            todo.append(who)
        assert len(done) + len(todo) == 6
    assert sorted(done) == [A, B, C, D, E, F]


def test_who_forgets_leaves_the_queue(enter: Enter, limits: Limits) -> None:
    for who in (A, B, C):
        enter(who)
    assert limits.forget(B) == []
    assert limits.leave(A, "gpu") == [C]


def test_who_forgets_what_it_was_granted_leaves_it_to_the_next(enter: Enter, limits: Limits) -> None:
    for who in (A, B, C):
        enter(who)
    limits.leave(A, "gpu")
    assert limits.forget(B) == [C]
    assert limits.forget(B) == []


def test_who_is_in_has_nothing_to_forget(enter: Enter, limits: Limits) -> None:
    enter(A)
    assert limits.forget(A) == []
    assert enter(B) == QUEUED


def test_a_limit_that_was_raised_lets_in_who_waits_first(enter: Enter, limits: Limits, clock: Clock) -> None:
    for who in (A, B, C, D):
        enter(who)
        clock.move(0.01)
    three = Concurrency("gpu", 3)
    assert enter(E, three) == Wait(SAFETY_S, "'gpu' lets in 3 at once")
    assert sorted(limits.sweep()) == [B, C]
    assert enter(D, three) == Wait(SAFETY_S, "'gpu' lets in 3 at once")
    assert enter(C, three) == enter(B, three) == Entered()


def test_a_limit_that_was_lowered_lets_nobody_in_until_enough_have_left(enter: Enter, limits: Limits) -> None:
    for who in (A, B):
        assert enter(who, TWO) == Entered()
    assert enter(C) == QUEUED
    assert limits.leave(A, "gpu") == []
    assert limits.leave(B, "gpu") == [C]


def test_a_limit_of_nobody_keeps_all_waiting_until_it_is_raised(enter: Enter, limits: Limits, clock: Clock) -> None:
    enter(A, Concurrency("gpu", 0))
    clock.move(60)
    assert limits.sweep() == []
    assert enter(A) == Entered()


def test_an_answer_that_was_lost_is_given_again(
    enter: Enter, limits: Limits, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    for who in (A, B, C):
        enter(who)
    lose_an_answer(monkeypatch, client)
    assert limits.leave(A, "gpu") == [B]
    assert enter(B) == Entered()
    assert limits.leave(A, "gpu") == []


def test_of_what_nobody_uses_nothing_is_kept(client: redis.Redis) -> None:
    limits = Limits(Scripts(client))
    rate = Rate("calls", 1, 0.001)
    for who in (A, B):
        # Long enough that the second finds the first one there, however busy the machine is.
        limits.enter(who, ONE, None, hold_s=1)
        limits.enter(who, None, rate, hold_s=1)
    assert_nothing_is_kept_for_ever(client)
    eventually(lambda: limits.sweep() == [B], every_s=0.01)
    eventually(lambda: limits.sweep() or kept(client) <= {"place", "late", "waits"}, every_s=0.01)
    assert_nothing_is_kept_for_ever(client)


def assert_nothing_is_kept_for_ever(client: redis.Redis) -> None:
    lives = {key: client.pttl(key) for key in client.scan_iter()}
    # One may be gone (-2) since it was listed; -1 is for ever.
    assert all(life == -2 or 0 <= life <= 86_400_100 for life in lives.values()), lives


def kept(client: redis.Redis) -> set[str]:
    return {key.split(":")[2] for key in client.scan_iter()}


# So many in a time.


CALLS = Rate("calls", 2, 1.0)


def called(wake_in_s: float) -> Wait:
    return Wait(wake_in_s, "'calls' lets in 2 each 1 s")


def test_a_burst_is_let_in_and_the_rest_get_a_time_each(enter: Enter) -> None:
    said = [enter(who, None, CALLS) for who in (A, B, C, D)]
    assert said == [Entered(), Entered(), called(0.5), called(1.0)]


def test_who_comes_back_at_its_time_is_let_in_and_not_charged_again(enter: Enter, clock: Clock) -> None:
    for who in (A, B, C, D):
        enter(who, None, CALLS)
    assert enter(C, None, CALLS) == called(0.5)
    clock.move(0.5)
    assert enter(C, None, CALLS) == enter(C, None, CALLS) == Entered()
    assert enter(D, None, CALLS) == called(0.5)
    assert enter(E, None, CALLS) == called(1.0)


def test_another_attempt_is_charged_again(enter: Enter) -> None:
    enter(A, None, CALLS, attempt=1)
    enter(A, None, CALLS, attempt=2)
    assert enter(A, None, CALLS, attempt=3) == called(0.5)


def test_a_rate_that_was_edited_holds_for_who_comes_from_then_on(enter: Enter) -> None:
    for who in (A, B, C):
        enter(who, None, CALLS)
    # Three are before it, of which a burst of two is free.
    assert enter(D, None, Rate("calls", 2, 20.0)) == Wait(20.0, "'calls' lets in 2 each 20 s")
    assert enter(E, None, Rate("calls", 4, 4.0)) == Wait(1.0, "'calls' lets in 4 each 4 s")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    limit=st.integers(1, 4),
    every_s=st.integers(60, 30_000),
    gaps_s=st.lists(st.integers(0, 42_000), min_size=1, max_size=25),
)
def test_starts_conform_to_the_rate_and_none_waits_longer_than_it_must(
    client: redis.Redis, limit: int, every_s: int, gaps_s: list[int]
) -> None:
    # Time is moved by hand here, but Redis forgets by its own clock: nothing is so short that it could.
    client.flushall()
    clock = Clock()
    limits = Limits(Scripts(client), clock)
    rate = Rate("calls", limit, limit * every_s)
    now_s = full_s = 0
    for number, gap_s in enumerate(gaps_s):
        clock.move(gap_s)
        now_s += gap_s
        # The model: a bucket that is full at `full_s`.
        full_s = max(full_s, now_s)
        wait_s = max(0, full_s - (limit - 1) * every_s - now_s)
        full_s += every_s
        said = limits.enter(step(number), None, rate, hold_s=HOLD_S)
        assert (said.wake_in_s if isinstance(said, Wait) else 0) == pytest.approx(wait_s, abs=0.00001)


# Both.


def test_nobody_holds_a_slot_while_it_waits_for_its_time(enter: Enter) -> None:
    slow = Rate("calls", 1, 60.0)
    enter(A, None, slow)
    assert enter(B, ONE, slow) == Wait(60.0, "'calls' lets in 1 each 60 s")
    assert enter(C, ONE, None) == Entered()


def test_a_later_attempt_that_must_wait_for_its_time_gives_back_its_slot(enter: Enter, limits: Limits) -> None:
    slow = Rate("calls", 1, 60.0)
    assert enter(A, ONE, slow) == Entered()
    assert enter(B, ONE) == QUEUED
    assert isinstance(enter(A, ONE, slow, attempt=2), Wait)
    assert limits.sweep() == [B]


def test_a_time_that_was_reached_is_not_lost_while_a_slot_is_waited_for(
    enter: Enter, limits: Limits, clock: Clock
) -> None:
    slow = Rate("calls", 1, 60.0)
    enter(A, ONE)
    assert enter(B, ONE, slow) == QUEUED
    clock.move(1)
    limits.renew([("gpu", A)], 10 * HOLD_S)
    assert enter(B, ONE, slow) == QUEUED
    assert limits.leave(A, "gpu") == [B]
    assert enter(B, ONE, slow) == Entered()
    assert enter(C, None, slow) == Wait(59.0, "'calls' lets in 1 each 60 s")


# Against a model, and at once.


class Model:
    """Slots and a queue, as anybody would write them who has no process to lose."""

    def __init__(self) -> None:
        self.limit = 0
        self.slots: list[Who] = []
        self.queue: list[Who] = []

    def grant(self) -> list[Who]:
        free = max(0, self.limit - len(self.slots))
        granted, self.queue = self.queue[:free], self.queue[free:]
        self.slots += granted
        return granted

    def enter(self, who: Who, limit: int) -> bool:
        self.limit = limit
        if who not in self.slots:
            self.queue += [who] if who not in self.queue else []
            self.grant()
        return who in self.slots

    def leave(self, who: Who) -> list[Who]:
        self.slots = [one for one in self.slots if one != who]
        self.queue = [one for one in self.queue if one != who]
        return self.grant()


MOVES = st.lists(st.tuples(st.booleans(), st.sampled_from([A, B, C, D, E, F]), st.integers(1, 3)), max_size=40)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(moves=MOVES)
def test_whatever_happens_as_long_as_nobody_dies_it_is_slots_and_a_queue(
    client: redis.Redis, moves: list[tuple[bool, Who, int]]
) -> None:
    client.flushall()
    clock = Clock()
    limits, model = Limits(Scripts(client), clock), Model()
    for is_enter, who, limit in moves:
        clock.move(0.001)
        if is_enter:
            concurrency = Concurrency("gpu", limit)
            said = limits.enter(who, concurrency, None, hold_s=HOLD_S)
            assert (said == Entered()) == model.enter(who, limit)
        else:
            had = who in model.slots or who in model.queue
            woken = limits.leave(who, "gpu")
            expected = model.leave(who)
            # Who left before is answered what it was answered then.
            assert woken == expected or not had


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["enter", "leave", "die"]), st.sampled_from([A, B, C, D, E, F])), max_size=30
    )
)
def test_with_the_dead_among_them_no_more_than_the_limit_are_in_and_the_living_all_get_in(
    client: redis.Redis, moves: list[tuple[str, Who]]
) -> None:
    client.flushall()
    clock = Clock()
    limits = Limits(Scripts(client), clock)
    inside: set[Who] = set()
    waiting: set[Who] = set()

    def come(who: Who) -> None:
        waiting.add(who)
        if limits.enter(who, TWO, None, hold_s=HOLD_S) == Entered():
            waiting.discard(who)
            inside.add(who)
        assert len(inside) <= 2

    def pass_time() -> None:
        clock.move(HOLD_S / 3)
        assert limits.renew([("gpu", one) for one in sorted(inside)], HOLD_S) == []
        for who in set(limits.sweep()) & waiting:
            come(who)

    for move, who in moves:
        pass_time()
        if move == "enter":
            come(who)
        elif move == "leave" and who in inside:
            inside.discard(who)
            limits.leave(who, "gpu")
        else:
            inside.discard(who)
            waiting.discard(who)
    for _ in range(15):
        for who in sorted(inside):
            inside.discard(who)
            limits.leave(who, "gpu")
        pass_time()
    assert waiting == set()


def test_many_threads_are_never_more_than_the_limit_and_all_get_in(clean_redis: str) -> None:
    limit, each = 3, 5
    people = [step(number) for number in range(12)]
    woken: dict[Who, Queue[None]] = {who: Queue() for who in people}
    client = connect(clean_redis)
    limits = Limits(Scripts(client))
    inside, most, lock = 0, 0, threading.Lock()

    def live(who: Who) -> None:
        nonlocal inside, most
        for _ in range(each):
            while limits.enter(who, Concurrency("gpu", limit), None, hold_s=60) != Entered():
                woken[who].get(timeout=PATIENCE_S)
            with lock:
                inside += 1
                most = max(most, inside)
            with lock:
                inside -= 1
            for one in limits.leave(who, "gpu"):
                woken[one].put(None)

    threads = [threading.Thread(target=live, args=(who,), daemon=True) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert 1 <= most <= limit
    client.close()

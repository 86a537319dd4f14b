"""The cache: what several ask for is computed by one, and found by all."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from queue import Queue

import pytest
import redis
from fleet import PATIENCE_S
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharing import Clock, connect, lose_an_answer, step

from ferrum.cache import SAFETY_S, Cache, Compute, Hit, Stats, Wait, digest_of
from ferrum.scripts import Scripts, Who

A, B, C = (step(number) for number in range(3))
#: Longer than any test.
HOLD_S = 300.0
ASKED = digest_of("llm", {"prompt": "hello"})


@pytest.fixture
def client(clean_redis: str) -> Iterator[redis.Redis]:
    with connect(clean_redis) as client:
        yield client


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(client: redis.Redis, clock: Clock) -> Cache:
    return Cache(Scripts(client), clock)


def named(cache: Cache) -> list[Who]:
    return [who for _, who in cache.sweep()]


def test_what_is_not_there_is_computed_by_who_asks_first_and_found_by_all(cache: Cache) -> None:
    assert cache.enter(ASKED, A, HOLD_S) == Compute()
    assert isinstance(cache.enter(ASKED, B, HOLD_S), Wait)
    assert isinstance(cache.enter(ASKED, C, HOLD_S), Wait)
    assert cache.put(ASKED, A, '{"v":1}', 60) == [B, C]
    assert cache.enter(ASKED, B, HOLD_S) == cache.enter(ASKED, C, HOLD_S) == Hit('{"v":1}')
    assert cache.enter(ASKED, A, HOLD_S) == Hit('{"v":1}')


@pytest.mark.parametrize("envelope", ["", "null", '{"v":null}', '{"v":"…"}'])
def test_whatever_was_put_is_found_as_it_was(cache: Cache, envelope: str) -> None:
    cache.enter(ASKED, A, HOLD_S)
    cache.put(ASKED, A, envelope, 60)
    assert cache.enter(ASKED, B, HOLD_S) == Hit(envelope)


def test_who_computes_it_and_asks_again_goes_on(cache: Cache) -> None:
    assert cache.enter(ASKED, A, HOLD_S) == cache.enter(ASKED, A, HOLD_S) == Compute()
    assert cache.stats().misses == 1


def test_what_was_not_asked_is_computed_beside_it(cache: Cache) -> None:
    assert cache.enter(ASKED, A, HOLD_S) == cache.enter(digest_of("llm", {}), B, HOLD_S) == Compute()


def test_what_is_too_old_is_computed_anew(cache: Cache, clock: Clock) -> None:
    cache.enter(ASKED, A, HOLD_S)
    cache.put(ASKED, A, "old", 0.02)
    assert cache.enter(ASKED, B, HOLD_S) == Hit("old")
    clock.move(0.021)
    assert cache.enter(ASKED, B, HOLD_S) == Compute()


def test_who_gives_up_leaves_it_to_the_first_who_waits(cache: Cache, clock: Clock) -> None:
    for who in (A, B, C):
        cache.enter(ASKED, who, HOLD_S)
        clock.move(0.001)
    assert cache.give_up(ASKED, A) == [B]
    assert cache.enter(ASKED, B, HOLD_S) == Compute()
    assert isinstance(cache.enter(ASKED, A, HOLD_S), Wait)
    assert cache.put(ASKED, B, "v", 60) == [C, A]


def test_who_waits_no_more_is_not_woken(cache: Cache) -> None:
    for who in (A, B, C):
        cache.enter(ASKED, who, HOLD_S)
    assert cache.give_up(ASKED, B) == []
    assert cache.put(ASKED, A, "v", 60) == [C]


def test_what_one_that_died_was_to_compute_is_computed_by_the_next_who_comes(cache: Cache, clock: Clock) -> None:
    cache.enter(ASKED, A, 10)
    clock.move(10)
    assert cache.renew([(ASKED, A)], HOLD_S) == [(ASKED, A)]
    assert cache.enter(ASKED, B, HOLD_S) == Compute()
    assert cache.renew([(ASKED, A)], HOLD_S) == [(ASKED, A)]
    assert cache.renew([(ASKED, B)], HOLD_S) == []


def test_what_comes_late_from_one_that_was_given_up_is_kept_all_the_same(cache: Cache, clock: Clock) -> None:
    cache.enter(ASKED, A, 10)
    clock.move(10)
    assert cache.enter(ASKED, B, HOLD_S) == Compute()
    cache.enter(ASKED, C, HOLD_S)
    assert cache.put(ASKED, A, "late", 60) == [C]
    assert cache.enter(ASKED, C, HOLD_S) == Hit("late")
    assert cache.renew([(ASKED, B)], HOLD_S) == []


def test_a_turn_lasts_while_it_is_renewed(cache: Cache, clock: Clock) -> None:
    digests = [digest_of("llm", number) for number in range(40)]
    for digest in digests:
        cache.enter(digest, A, 10)
    for _ in range(5):
        clock.move(9)
        assert cache.renew([(digest, A) for digest in digests], 10) == []
    assert {cache.enter(digest, B, 10) for digest in digests} == {Wait(SAFETY_S)}
    assert cache.renew([], 10) == []


# The sweep.


def test_who_waits_for_one_that_died_is_woken_one_after_the_other(cache: Cache, clock: Clock) -> None:
    cache.enter(ASKED, A, 10)
    for who in (B, C):
        clock.move(0.001)
        assert cache.enter(ASKED, who, HOLD_S) == Wait(SAFETY_S)
    assert named(cache) == []
    clock.move(10)
    assert named(cache) == [B]
    assert named(cache) == []
    for _ in range(4):
        clock.move(1)
        assert named(cache) == [B]
    clock.move(1)
    assert named(cache) == [C]
    assert cache.enter(ASKED, C, HOLD_S) == Compute()
    clock.move(1)
    assert named(cache) == []


def test_while_it_is_computed_nobody_is_woken(cache: Cache, clock: Clock) -> None:
    cache.enter(ASKED, A, 60)
    cache.enter(ASKED, B, 60)
    for _ in range(3):
        clock.move(59)
        assert cache.renew([(ASKED, A)], 60) == []
        assert named(cache) == []


def test_who_was_woken_and_does_not_come_is_named_again_for_a_while(cache: Cache, clock: Clock) -> None:
    for who in (A, B, C):
        cache.enter(ASKED, who, HOLD_S)
        clock.move(0.001)
    assert cache.put(ASKED, A, "v", 60) == [B, C]
    assert named(cache) == []
    clock.move(1)
    assert named(cache) == [B, C]
    assert cache.enter(ASKED, B, HOLD_S) == Hit("v")
    for _ in range(4):
        clock.move(1)
        assert named(cache) == [C]
    clock.move(1)
    assert named(cache) == []


def test_when_the_first_who_waits_was_woken_in_vain_it_is_named_again(cache: Cache, clock: Clock) -> None:
    for who in (A, B):
        cache.enter(ASKED, who, HOLD_S)
    assert cache.give_up(ASKED, A) == [B]
    clock.move(1)
    assert named(cache) == [B]


# What is seen of it.


def test_it_is_known_how_often_it_helped(cache: Cache) -> None:
    assert cache.stats() == Stats()
    assert cache.stats().hit_rate == 0
    other = digest_of("my tool", None)
    for digest in (ASKED, other):
        cache.enter(digest, A, HOLD_S)
    for who in (B, B, C):
        cache.enter(ASKED, who, HOLD_S)
    cache.put(ASKED, A, "v", 60)
    for who in (A, B, C):
        cache.enter(ASKED, who, HOLD_S)
    assert cache.stats() == Stats(hits=3, misses=2, waits=2)
    assert cache.stats("my tool") == Stats(misses=1)
    assert cache.stats("llm").hit_rate == 0.75


def test_an_answer_that_was_lost_is_given_again(
    cache: Cache, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    for who in (A, B):
        cache.enter(ASKED, who, HOLD_S)
    with monkeypatch.context() as patch:
        lose_an_answer(patch, client)
        assert cache.give_up(ASKED, A) == [B]
    cache.enter(ASKED, A, HOLD_S)
    with monkeypatch.context() as patch:
        lose_an_answer(patch, client)
        assert cache.put(ASKED, A, "v", 60) == [B]
    assert cache.enter(ASKED, B, HOLD_S) == Hit("v")
    assert cache.put(ASKED, A, "v", 60) == []


def test_everything_has_its_time(cache: Cache, client: redis.Redis) -> None:
    for number in range(30):
        for who in (A, B):
            cache.enter(digest_of("llm", number), who, HOLD_S)
        cache.put(digest_of("llm", number), A, "v", 60)
    kept = list(client.scan_iter())
    assert {key.split(":")[2] for key in kept} == {"value", "waiters", "due", "stats"}
    assert len({key.split(":")[1] for key in kept}) > 8
    assert all(0 < client.pttl(key) <= 7 * 86_400_000 for key in kept)


# Digests.


def test_a_digest_is_of_what_was_asked_and_not_of_how_it_was_written() -> None:
    assert digest_of("s", {"a": 1, "b": [None]}) == digest_of("s", {"b": [None], "a": 1})
    assert digest_of("s", 1) != digest_of("t", 1)
    assert digest_of("s", [1, "x"]) != digest_of("s", ["1", "x"])
    assert digest_of("s", None) != digest_of("s", "null")


# Against a model, and at once.


class Model:
    def __init__(self) -> None:
        self.value: str | None = None
        self.turn: Who | None = None
        self.queue: list[Who] = []

    def enter(self, who: Who) -> str:
        if self.value is not None:
            self._gone(who)
            return "hit"
        if self.turn in (None, who):
            self.turn = who
            self._gone(who)
            return "compute"
        self.queue += [who] if who not in self.queue else []
        return "wait"

    def put(self, who: Who, value: str) -> list[Who]:
        self.value = value
        self.turn = None if self.turn == who else self.turn
        self._gone(who)
        return self.queue

    def give_up(self, who: Who) -> list[Who]:
        self.turn = None if self.turn == who else self.turn
        self._gone(who)
        return [] if self.turn or self.value is not None else self.queue[:1]

    def _gone(self, who: Who) -> None:
        self.queue = [one for one in self.queue if one != who]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["enter", "enter", "put", "give up"]), st.sampled_from([A, B, C, step(3)])),
        max_size=25,
    )
)
def test_whatever_happens_it_is_a_value_a_turn_and_a_queue(client: redis.Redis, moves: list[tuple[str, Who]]) -> None:
    client.flushall()
    clock, model = Clock(), Model()
    cache = Cache(Scripts(client), clock)
    words: dict[type, str] = {Hit: "hit", Compute: "compute", Wait: "wait"}
    for move, who in moves:
        clock.move(0.001)
        match move:
            case "enter":
                assert words[type(cache.enter(ASKED, who, HOLD_S))] == model.enter(who)
            case "put":
                assert cache.put(ASKED, who, "v", HOLD_S) == model.put(who, "v")
            case _:
                assert cache.give_up(ASKED, who) == model.give_up(who)


def test_many_threads_compute_each_thing_once(clean_redis: str) -> None:
    people = [step(number) for number in range(12)]
    woken: dict[Who, Queue[None]] = {who: Queue() for who in people}
    digests = [digest_of("llm", number) for number in range(6)]
    computed: Counter[str] = Counter()
    found: list[str] = []
    client = connect(clean_redis)
    cache = Cache(Scripts(client))

    def ask(who: Who, digest: str) -> None:
        while isinstance(said := cache.enter(digest, who, HOLD_S), Wait):
            woken[who].get(timeout=PATIENCE_S)
        if isinstance(said, Hit):
            found.append(said.envelope)
        else:
            computed[digest] += 1
            for one in cache.put(digest, who, digest, 60):
                woken[one].put(None)

    def live(who: Who) -> None:
        for digest in digests:
            ask(who, digest)

    threads = [threading.Thread(target=live, args=(who,), daemon=True) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert computed == dict.fromkeys(digests, 1)
    assert Counter(found) == dict.fromkeys(digests, len(people) - 1)
    client.close()

"""Workers whose clocks differ: everything goes by the clock of Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, ended, eventually, happened

import ferrum
from ferrum.cache import Cache, Compute, Hit, digest_of
from ferrum.record import new_run_id
from ferrum.results import RunStatus
from ferrum.runs import record
from ferrum.scripts import Scripts, Who

SKEW_S = 300


@pytest.fixture(scope="module")
def fleet(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One worker that is five minutes ahead and one that is as much behind."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    fleet = Fleet(redis_url, tmp_path_factory.mktemp("clocks"))
    try:
        for skew in (SKEW_S, -SKEW_S):
            fleet.start("-c", "1", command=("skewed",), SKEW=str(skew))
        yield fleet
    finally:
        fleet.stop()


def begun_by(run_id: str) -> set[str]:
    return {event.worker.split(":")[1] for event in happened(run_id, "step.started")}


def test_every_worker_is_seen(fleet: Fleet) -> None:
    assert {name.split(":")[1] for name in record().workers()} == {str(worker.pid) for worker in fleet.workers}


def test_a_wait_ends_when_redis_says_so_whoever_parked_and_woke_it(fleet: Fleet) -> None:
    steps: dict[str, Any] = {f"w{number}": {"type": "wait", "for": "1s"} for number in range(8)}
    run_id = ferrum.submit({"name": "x", "steps": steps})
    # By one that is ahead and one that is behind it took minutes, or no time at all.
    assert ended(run_id, SKEW_S / 2).status is RunStatus.COMPLETED
    assert len(begun_by(run_id)) == 2
    for name in steps:
        parked, [woken] = happened(run_id, "step.waiting", name), happened(run_id, "step.resumed", name)
        assert len(parked) == 1
        assert woken.at - parked[0].at >= 0.9


def test_until_is_a_time_of_redis(fleet: Fleet) -> None:
    now = record().now()
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + 2))
    steps: dict[str, Any] = {f"w{number}": {"type": "wait", "until": until} for number in range(4)}
    run_id = ferrum.submit({"name": "x", "steps": steps})
    assert ended(run_id, SKEW_S / 2).status is RunStatus.COMPLETED
    assert all(event.at >= int(now + 2) for event in happened(run_id, "step.completed"))


def test_a_router_tells_how_long_its_target_took_though_others_saw_it_begin(fleet: Fleet, redis_url: str) -> None:
    one = {"type": "task", "task": "user.sleep", "input": {"seconds": 0.01}, "target": "shop"}
    step = {"type": "router", "by": "health", "among": {"one": one}}
    runs = [ferrum.submit({"name": "x", "steps": {"r": step}}) for _ in range(6)]
    assert [ended(run_id).status for run_id in runs] == [RunStatus.COMPLETED] * 6
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        latency_us = client.hget("ferrum:{health}:target:shop", "latency")
    assert latency_us is not None
    assert 0 < int(float(latency_us)) < SKEW_S / 2 * 1e6


def test_messages_of_living_workers_are_not_given_to_others(fleet: Fleet) -> None:
    steps = {f"s{n}": {"type": "task", "task": "user.sleep", "input": {"seconds": 0.2}} for n in range(10)}
    run_id = ferrum.submit({"name": "x", "steps": steps})
    assert ended(run_id, PATIENCE_S).status is RunStatus.COMPLETED
    assert not happened(run_id, "step.lost")
    assert {event.attempt for event in happened(run_id, "step.completed")} == {1}


# What is over is over, whether or not Redis has dropped its key.


def keep_for_ever(redis_url: str, pattern: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for key in eventually(lambda: list(client.scan_iter(pattern))):
            client.persist(key)


def test_a_lock_that_ran_out_is_free_though_its_key_is_there(redis_url: str) -> None:
    assert record().alone("clocks", "one", 0.05)
    keep_for_ever(redis_url, "ferrum:lock:clocks")
    assert eventually(lambda: record().alone("clocks", "two", 60))
    assert not record().alone("clocks", "one", 60)


def test_a_cached_output_is_good_for_its_time_and_no_longer(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        cache, who, digest = Cache(Scripts(client)), Who(new_run_id(), "a"), digest_of("clocks", 1)
        assert cache.enter(digest, who, 60) == Compute()
        cache.put(digest, who, '{"v": 1}', 60)
        assert cache.enter(digest, who, 60) == Hit('{"v": 1}')
        cache.put(digest, who, '{"v": 2}', 0.05)
        keep_for_ever(redis_url, f"*value:{digest}")
        assert eventually(lambda: cache.enter(digest, who, 60) == Compute())


def test_a_key_starts_one_run_within_its_time_and_another_after_it(redis_url: str) -> None:
    workflow = {"name": "x", "steps": {"w": {"type": "wait", "for": "1h"}}}
    first = ferrum.submit(workflow, key="clocks")
    assert ferrum.submit(workflow, key="clocks") == first
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        [key] = client.scan_iter("ferrum:*:key:clocks")
        client.set(key, f"{round((record().now() - 1) * 1000)} {first}")
    second = ferrum.submit(workflow, key="clocks")
    assert second != first
    for run_id in (first, second):
        ferrum.cancel(run_id)


def test_a_beat_that_is_silent_runs_no_longer_though_its_key_is_there(redis_url: str) -> None:
    from ferrum.schedules import Schedules

    store = Schedules(redis_url)
    try:
        store.look()
        assert store.beat_runs()
        with redis.Redis.from_url(redis_url) as client:
            client.set("ferrum:{schedules}:beat", f"{round(record().now()) - 1} somebody")
        assert not store.beat_runs()
    finally:
        store.close_connections()

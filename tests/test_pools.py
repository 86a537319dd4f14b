"""How a worker runs steps, and what it does when it is told something from far: pools, names, remote control."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, assert_events_agree, ended, eventually, happened

import ferrum
from ferrum.errors import SettingsError
from ferrum.local.redis import PrivateRedis, celery_url
from ferrum.results import RunStatus


@pytest.fixture
def fleet(clean_redis: str, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(clean_redis, tmp_path)
    try:
        yield fleet
    finally:
        fleet.stop()


def sleep(log: Path, seconds: float, **more: Any) -> dict[str, Any]:
    return {"type": "task", "task": "user.sleep", "input": {"seconds": seconds, "log": str(log)}, **more}


def pids(log: Path) -> list[int]:
    """The processes that began a step, in order."""
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_prefork_means_processes_as_many_as_there_are_processors(fleet: Fleet, tmp_path: Path) -> None:
    worker = fleet.start("-P", "prefork")
    log = tmp_path / "began"
    run_id = ferrum.submit({"name": "x", "steps": {"a": sleep(log, 0), "b": sleep(log, 0, needs=["a"])}})
    assert ended(run_id).status is RunStatus.COMPLETED
    assert len(pids(log)) == 2
    assert worker.pid not in pids(log)
    assert re.search(rf"concurrency: {os.cpu_count()} \(prefork\)", fleet.log(0).read_text())


def test_a_worker_whose_threads_become_more_and_fewer_runs_steps(fleet: Fleet, redis_url: str, tmp_path: Path) -> None:
    from ferrum.celery import app

    worker = fleet.start("--autoscale=6,2")
    log = tmp_path / "began"
    run_id = ferrum.submit({"name": "x", "steps": {f"s{n}": sleep(log, 1) for n in range(6)}})
    # All at once: it began with two threads.
    eventually(lambda: len(pids(log)) == 6)
    assert not happened(run_id, "step.completed")
    assert ended(run_id).status is RunStatus.COMPLETED
    assert worker.poll() is None
    # Told from far: the private Redis has a password, so all of Celery's remote control is there.
    [replies] = app.control.broadcast("autoscale", {"max": 9, "min": 1}, reply=True, timeout=5, limit=1)
    assert "ok" in next(iter(replies.values()))
    assert "Unrecoverable" not in fleet.log(0).read_text()
    assert_events_agree(redis_url, run_id)


def test_threads_can_be_added_and_taken_away_but_for_the_last() -> None:
    from ferrum.pool import Threads

    pool = Threads(2)
    pool.grow(3)
    assert (pool.num_processes, pool.executor._max_workers) == (5, 5)
    pool.shrink(9)
    assert (pool.num_processes, pool.executor._max_workers) == (1, 1)
    pool.on_stop()


def test_workers_of_one_name_that_take_one_step_at_a_time_share_the_work(
    fleet: Fleet, redis_url: str, tmp_path: Path
) -> None:
    solo = fleet.start("-P", "solo", "-n", "one@name")
    single = fleet.start("-P", "threads", "-c", "1", "-n", "one@name")
    log = tmp_path / "began"
    steps: dict[str, Any] = {
        "a": {"type": "task", "task": "user.echo", "input": {"value": [1, 2, 3, 4]}},
        "b": {"for_each": "{{ a }}", "max_parallel": 2, **sleep(log, 0.2)},
        "c": sleep(log, 0, needs=["b"]),
    }
    run_id = ferrum.submit({"name": "x", "steps": steps})
    assert ended(run_id).status is RunStatus.COMPLETED
    assert set(pids(log)) == {solo.pid, single.pid}
    assert len(pids(log)) == 5
    assert_events_agree(redis_url, run_id)


def test_a_stopping_worker_hands_back_what_its_processes_do_after_its_grace(
    fleet: Fleet, redis_url: str, tmp_path: Path
) -> None:
    began = tmp_path / "began"
    worker = fleet.start("-P", "processes", "-c", "2", FERRUM_GRACE="0.2")
    run_id = ferrum.submit(
        {"name": "x", "steps": {"a": {"type": "task", "task": "user.sleep_once", "input": {"path": str(began)}}}}
    )
    eventually(began.exists)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 0
    assert [lost.reason for lost in happened(run_id, "step.lost")] == ["its worker is stopping"]
    fleet.start()
    assert ended(run_id).status is RunStatus.COMPLETED
    assert_events_agree(redis_url, run_id)


def test_scaling_what_is_one_is_refused_in_a_sentence(fleet: Fleet) -> None:
    worker = fleet.launch("-P", "solo", "--autoscale=4,1")
    assert worker.wait(PATIENCE_S) == 1
    assert fleet.log(0).read_text().splitlines()[-1] == (
        "Error: --autoscale has nothing to scale with -P solo: say -P threads or -P processes"
    )


def test_green_threads_are_refused_in_a_sentence() -> None:
    from ferrum import pool

    green = type("TaskPool", (), {"__module__": "celery.concurrency.gevent"})
    with pytest.raises(SettingsError, match="ferrum does not run in gevent: say -P threads, -P processes or -P solo"):
        pool.check(SimpleNamespace(pool_cls=green, options={}))


def test_a_worker_that_is_shut_down_from_far_hands_its_steps_back_after_its_grace(fleet: Fleet, tmp_path: Path) -> None:
    from ferrum.celery import app

    worker = fleet.start("-n", "far@name", FERRUM_GRACE="0.2")
    log = tmp_path / "began"
    run_id = ferrum.submit({"name": "x", "steps": {"a": sleep(log, 600)}})
    eventually(lambda: pids(log))
    app.control.shutdown(destination=["far@name"])
    worker.wait(PATIENCE_S)
    assert [lost.reason for lost in happened(run_id, "step.lost")] == ["its worker is stopping"]
    ferrum.cancel(run_id)


#: What nobody may tell a worker from far where a Redis has no password.
SHUT: dict[str, dict[str, object]] = {
    "shutdown": {}, "pool_grow": {"n": 1}, "pool_shrink": {"n": 1}, "pool_restart": {}, "autoscale": {"max": 1},
    "add_consumer": {"queue": "x"}, "cancel_consumer": {"queue": "ferrum"}, "disable_events": {}, "election": {},
    "rate_limit": {"task_name": "ferrum.tool", "rate_limit": "1/h"}, "time_limit": {"task_name": "ferrum.tool"},
    "terminate": {"signal": "KILL", "task_id": "x"}, "objgraph": {}, "memdump": {},
}  # fmt: skip


def test_where_anybody_may_write_to_redis_a_worker_is_asked_from_far_and_not_told(fleet: Fleet, tmp_path: Path) -> None:
    from ferrum.broker import Broker
    from ferrum.celery import App

    with PrivateRedis(tmp_path / "open") as server:
        url = re.sub(r"//:.*@", "//", server.url)
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", "")
        worker = fleet.launch("-n", "open@name", FERRUM_REDIS_URL=url)
        eventually(lambda: b" ready." in fleet.log(0).read_bytes())
        app = App("asking", set_as_current=False, amqp=Broker, broker=celery_url(url), backend="cache+memory://")

        def told(command: str, arguments: dict[str, object]) -> str:
            replies = app.control.broadcast(command, arguments, reply=True, timeout=PATIENCE_S, limit=1)
            return str(replies[-1]["open@name"])

        asked: dict[str, dict[str, object]] = {"ping": {}, "stats": {}, "active": {}, "dump_active": {}}
        for command, arguments in {**asked, "revoke": {"task_id": "x"}, "enable_events": {}}.items():
            assert "refused" not in told(command, arguments)
        for command, arguments in SHUT.items():
            assert f"{command!r} is refused, as anybody may write to this Redis" in told(command, arguments)
        assert worker.poll() is None
        worker.terminate()
        assert worker.wait(PATIENCE_S) == 0
        app.close()


def test_a_broker_is_locked_where_its_url_names_a_user_or_a_password() -> None:
    from ferrum.remote import locked

    for url in ("redis://:pw@h/0", "rediss://ann:pw@h/0", "redis+socket://:pw@/run/r.sock?virtual_host=0"):
        assert locked(url)
    for url in ("redis://h:6379/0", "redis+socket:///run/r.sock?virtual_host=0", "redis://h/0?health_check_interval=3"):
        assert not locked(url)
    assert locked("redis://h/0?username=ann&password=pw")

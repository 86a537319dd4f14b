"""A worker that lives keeps its steps, whatever holds its interpreter."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, assert_events_agree, effects, ended, eventually, happened
from processes import descendants, is_running

import ferrum
from bench import chaos
from ferrum.record import base_of
from ferrum.results import RunStatus
from ferrum.testing.environment import environment
from ferrum.testing.proxy import Proxy

QUICK = {"FERRUM_LEASE": "2", "FERRUM_HEARTBEAT": "0.3", "FERRUM_SWEEP": "0.2", "FERRUM_GRACE": "1"}


@pytest.fixture
def fleet(clean_redis: str, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(clean_redis, tmp_path, {"FERRUM_MCP_SERVERS": effects(tmp_path / "effects.log"), **QUICK})
    try:
        yield fleet
    finally:
        fleet.stop()


def task(name: str, **given: Any) -> dict[str, Any]:
    return {"type": "task", "task": f"user.{name}", "input": given}


def began(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def keepers(pid: int) -> list[int]:
    return [one for one in descendants(pid) if b"keeper.py" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.parametrize("pool", [(), ("-P", "processes", "-c", "2")], ids=["threads", "processes"])
def test_a_step_that_holds_the_interpreter_runs_once_and_takes_nobody_along(
    fleet: Fleet, redis_url: str, tmp_path: Path, pool: tuple[str, ...]
) -> None:
    short = {"FERRUM_LEASE": "1.5"}
    fleet.start(*pool, **short)
    # Whoever would take what is taken for lost.
    fleet.start(**short)
    log = tmp_path / "held"
    steps = {
        "beside": task("sleep", seconds=0.5, log=str(tmp_path / "beside")),
        "a": task("hold", log=str(log), seconds=2.5),
        "b": task("hold", log=str(log), seconds=2.5),
        "slot": {**task("hold", log=str(log), seconds=2), "concurrency": {"key": "k", "limit": 1}},
        "same": {**task("hold", log=str(log), seconds=2), "cache": {"key": "k", "ttl": "1h"}},
    }
    run_id = ferrum.submit({"name": "x", "steps": steps})
    assert ended(run_id).status is RunStatus.COMPLETED
    assert sorted(began(log)) == [f"{run_id}.{name}" for name in ("a", "b", "same", "slot")]
    assert len((tmp_path / "beside").read_text().splitlines()) == 1
    assert not happened(run_id, "step.lost")
    assert_events_agree(redis_url, run_id)


def test_a_keeper_goes_on_with_the_new_master_where_a_failover_left_its_connection_open(
    redis_url: str, tmp_path: Path
) -> None:
    stage = chaos.Stage(tmp_path, random.Random(0), fault_s=0)
    with ExitStack() as stack:
        stage.server = stage.add_server()
        stack.callback(lambda: [server.kill() for server in stage.servers])
        stage.theirs = stack.enter_context(Proxy(stage.server.url))
        stage.ours = stack.enter_context(Proxy(stage.server.url))
        stack.enter_context(environment({"FERRUM_REDIS_URL": stage.ours.url}))
        fleet = Fleet(stage.theirs.url, tmp_path, QUICK)
        stack.callback(fleet.stop)
        fleet.start()
        stack.enter_context(client := stage.client())
        run_id = ferrum.submit({"name": "x", "steps": {"a": task("hold", log=str(tmp_path / "held"), seconds=7)}})

        def leased_until() -> float:
            leases: Any = client.zrange(f"{base_of(run_id)}:leases", 0, -1, withscores=True)
            return max([until for name, until in leases if name.startswith(run_id)], default=0.0)

        # While its interpreter is held nobody but the keeper renews it.
        eventually(lambda: began(tmp_path / "held"))
        # Whoever would take what is taken for lost.
        fleet.launch(FERRUM_REDIS_URL=stage.ours.url)
        first = eventually(leased_until)
        eventually(lambda: leased_until() > first + 500)
        chaos.failover(stage)
        assert ended(run_id).status is RunStatus.COMPLETED
        assert not happened(run_id, "step.lost")


def test_a_stopped_worker_loses_its_steps_and_hears_of_it(fleet: Fleet, redis_url: str, tmp_path: Path) -> None:
    first = fleet.start()
    log = tmp_path / "held"
    run_id = ferrum.submit({"name": "x", "steps": {"a": task("effects", log=str(log), every_s=0.1, count=40)}})
    eventually(lambda: began(log) and keepers(first.pid))
    first.send_signal(signal.SIGSTOP)
    second = fleet.start()
    eventually(lambda: any(f" {second.pid} " in line for line in log.read_text().splitlines()))
    first.send_signal(signal.SIGCONT)
    assert ended(run_id).status is RunStatus.COMPLETED
    assert first.poll() is None
    assert [event.attempt for event in happened(run_id, "step.completed")] == [2]
    assert len(happened(run_id, "step.lost")) == 1
    assert_events_agree(redis_url, run_id)


def test_what_holds_the_interpreter_far_beyond_its_time_ends_with_its_process(
    fleet: Fleet, redis_url: str, tmp_path: Path
) -> None:
    first = fleet.start()
    log = tmp_path / "held"
    step = {**task("hold", log=str(log), seconds=60), "timeout": "500ms"}
    run_id = ferrum.submit({"name": "x", "steps": {"a": step, "b": task("sleep", seconds=0.1)}})
    assert first.wait(60) == -signal.SIGKILL
    assert f"{run_id}.a is over its time" in fleet.log(0).read_text()
    assert "something in it holds the interpreter" in fleet.log(0).read_text()
    ferrum.cancel(run_id)


def test_a_keeper_ends_with_its_process_and_is_started_again_if_it_dies(
    fleet: Fleet, redis_url: str, tmp_path: Path
) -> None:
    worker = fleet.start()
    log = tmp_path / "effects"
    run_id = ferrum.submit({"name": "x", "steps": {"a": task("effects", log=str(log), every_s=0.1, count=200)}})
    [first] = eventually(lambda: keepers(worker.pid))
    os.kill(first, signal.SIGKILL)
    [second] = eventually(lambda: [one for one in keepers(worker.pid) if one != first])
    # It holds no secret where others of this machine see it.
    assert Path(f"/proc/{second}/environ").read_bytes().count(b"FERRUM") == 0
    assert Path(f"/proc/{second}/cmdline").read_bytes().count(b"redis") == 0
    worker.kill()
    worker.wait()
    eventually(lambda: not is_running(second))
    ferrum.cancel(run_id)

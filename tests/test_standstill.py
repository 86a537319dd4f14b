"""A Redis that answers with errors, or not for a while, takes nothing from a worker that lives."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from by_hand import ByHand
from fleet import eventually

from ferrum.artifacts import Artifacts
from ferrum.executor import Executor, Holds, Shared
from ferrum.governance.policy import Policy
from ferrum.local.redis import PrivateRedis
from ferrum.loop import LoopThread
from ferrum.record import Record, base_of
from ferrum.settings import settings
from ferrum.testing.actors import ScriptedActors


@pytest.fixture
def record(redis_server: PrivateRedis) -> Iterator[Record]:
    record = Record(redis_server.url, patience_s=5)
    yield record
    record.close_connections()


def test_no_answer_of_redis_ends_the_pulse(record: Record, redis_url: str) -> None:
    from ferrum.pulse import Pulse

    run = ByHand(record, {"a": []})
    run.begin("a")
    holds = Holds()
    holds.add(run.held["a"]).claimed = True
    pulse = Pulse(record, holds, Shared.of(record), every_s=60, lease_s=60)
    leases = f"{base_of(run.run_id)}:leases"
    with redis.Redis.from_url(redis_url) as client:
        client.rename(leases, f"{leases}:aside")
        client.set(leases, "what no script can work with")
        pulse.beat()
        client.rename(f"{leases}:aside", leases)
    pulse.beat()
    assert holds.current() == [run.held["a"]]


def test_a_redis_that_stood_still_takes_no_step_from_a_living_worker(
    record: Record, redis_server: PrivateRedis, tmp_path: Path
) -> None:
    from ferrum.celery import app
    from ferrum.worker import Sweeper

    run = ByHand(record, {"a": []})
    run.begin("a", lease_s=0.1)
    executor = Executor(
        record, Artifacts(f"file://{tmp_path}"), Policy(), ScriptedActors(), LoopThread(), "sweeping", lease_s=1
    )
    sweeper = Sweeper(app, executor, settings().model_copy(update={"lease": 1.0}))
    assert redis_server.pid is not None
    os.kill(redis_server.pid, signal.SIGSTOP)
    again = threading.Timer(1.4, os.kill, (redis_server.pid, signal.SIGCONT))
    again.start()
    sweeper.once()
    again.join()
    assert "step.lost a" not in run.happened()
    # Of a worker that did not come back either, the step is taken one lease later.
    eventually(lambda: sweeper.once() or "step.lost a" in run.happened())

"""A worker that does not know a name: the record hears of it, and no run stands still."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from fleet import Fleet, ended, eventually, happened, lane, status_of

import ferrum
from ferrum.record import base_of
from ferrum.results import RunStatus, StepStatus

WAITS = {"type": "wait", "for": "0.01s"}


@pytest.fixture
def client(clean_redis: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(clean_redis, decode_responses=True) as client:
        yield client


@pytest.fixture
def fleet(client: redis.Redis, redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(redis_url, tmp_path, {"FERRUM_RESEND_AFTER": "1"})
    try:
        yield fleet
    finally:
        fleet.stop()


def test_a_message_of_a_step_under_an_unknown_name_is_dropped_and_the_step_is_sent_again(
    fleet: Fleet, client: redis.Redis
) -> None:
    run_id = ferrum.submit({"name": "one", "steps": {"a": WAITS}})
    queue = lane("ferrum.wait")
    text: Any = client.rpop(queue)
    message = json.loads(text)
    message["headers"]["task"] = "ferrum.weight"
    client.lpush(queue, json.dumps(message))
    fleet.start()
    assert ended(run_id).status is RunStatus.COMPLETED
    [letter] = ferrum.runs.dead_letters()
    assert "there is no task 'ferrum.weight' for ferrum's queues" in letter.reason
    assert len(happened(run_id, "step.started", "a")) >= 1


def test_a_task_that_this_worker_has_not_imported_fails_its_step_with_where_to_name_it(fleet: Fleet) -> None:
    fleet.start(FERRUM_IMPORTS="")
    run_id = ferrum.submit({"name": "one", "steps": {"a": {"type": "task", "task": "user.echo"}, "b": WAITS}})
    view = ended(run_id)
    assert view.status is RunStatus.FAILED
    step = next(step for step in view.steps if step.step_id == "a")
    assert step.status is StepStatus.FAILED
    assert "no task 'user.echo' is registered in this worker" in str(step.error)
    assert "name its module in FERRUM_IMPORTS" in str(step.error)


def test_a_run_with_a_step_type_that_no_worker_has_ends_and_holds_up_no_other(
    fleet: Fleet, client: redis.Redis
) -> None:
    first, second = (ferrum.submit({"name": name, "steps": {"a": WAITS}}, key=name) for name in ("lost", "found"))
    lost, found = (ferrum.submit({"name": name, "steps": {"a": WAITS}}) for name in ("unsent", "sent"))
    for run_id in (first, lost):
        # As a ferrum that has more step types would have written it.
        digest = ferrum.runs.record().plan_digest(run_id)
        key = f"{base_of(run_id)}:plan:{digest}"
        client.hset(key, " doc", str(client.hget(key, " doc")).replace('"wait"', '"weight"'))
    # The messages of two runs never come.
    texts: list[Any] = client.lrange(lane("ferrum.wait"), 0, -1)
    for text in texts:
        if any(run_id in text for run_id in (lost, found)):
            client.lrem(lane("ferrum.wait"), 1, text)
    fleet.start()
    assert [ended(run_id).status for run_id in (second, found)] == [RunStatus.COMPLETED] * 2
    eventually(lambda: status_of(first) is RunStatus.CANCELLED)
    [end] = happened(first, "run.ended")
    assert "cannot read the plan of the run" in str(end.reason)
    assert "there is no step type 'weight'" in str(end.reason)
    assert "a sweep failed" not in fleet.log(0).read_text()

"""A revoke of a step's Celery task is a decision that its run's record hears."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit

import pytest
from fleet import Fleet, assert_events_agree, ended, eventually
from preloading import into

import ferrum
from ferrum import runs
from ferrum.errors import Conflict, NotFound
from ferrum.plan import task_id
from ferrum.record import Record
from ferrum.remote import RECORD
from ferrum.results import RunStatus
from ferrum.runs import RunView

NAP = {"type": "task", "task": "user.sleep", "input": {"seconds": 60}}
ECHO = {"type": "task", "task": "user.echo", "input": {"value": 1}}
ASK = {"type": "approval", "message": "Go on?"}
BOOM = {
    "type": "task", "task": "user.boom", "retry": {"max_attempts": 3, "backoff": "1h", "max_delay": "1h"},
}  # fmt: skip


def revoke(run_id: str, step: str, **more: Any) -> list[dict[str, Any]]:
    from ferrum.celery import app

    answers: Any = app.control.broadcast(
        "revoke", arguments={"task_id": task_id(run_id, step), **more}, reply=True, timeout=20, limit=1
    )
    return [dict(next(iter(one.values()))) for one in answers if RECORD not in one]


def doing(run_id: str, step: str, status: str) -> None:
    eventually(lambda: runs.show(run_id).steps and runs.record().state(run_id).step(step).status == status)


def left(view: RunView) -> dict[str, tuple[str, str | None]]:
    return {step.step_id: (step.status.value, step.error) for step in view.steps}


REVOKED = ("cancelled", "revoked by remote control")


@pytest.mark.parametrize(
    ("step", "status"),
    [
        (NAP, "running"),
        ({"type": "task", "task": "user.asleep", "input": {"seconds": 60}}, "running"),
        (ASK, "waiting"),
        ({"type": "wait", "for": "1h"}, "waiting"),
        ({"type": "wait", "signal": "go"}, "waiting"),
        (BOOM, "waiting"),
        ({**NAP, "for_each": [1, 2]}, "waiting"),
        ({"type": "workflow", "workflow": {"name": "in", "steps": {"x": NAP}}}, "waiting"),
    ],
    ids=["running", "awaiting", "asking", "its time", "a signal", "backing off", "its items", "its run"],
)  # fmt: skip
@pytest.mark.parametrize("terminate", [False, True])
def test_a_step_whose_task_is_revoked_is_cancelled_and_so_is_what_it_does(
    redis_url: str, worker: Fleet, step: dict[str, Any], status: str, terminate: bool
) -> None:
    steps = {"a": step, "b": {**ECHO, "needs": ["a"]}, "c": ECHO}
    run_id = ferrum.submit({"name": "revoked", "steps": steps})
    doing(run_id, "a", status)
    [answer] = revoke(run_id, "a", terminate=terminate)
    assert "ok" in answer
    view = ended(run_id)
    assert (view.status, view.reason) == (RunStatus.FAILED, "'a' was cancelled")
    found = left(view)
    assert (found["a"], found["b"], found["c"]) == (REVOKED, ("skipped", "'a' was cancelled"), ("completed", None))
    assert {status for name, (status, _) in found.items() if name.startswith("a.")} <= {"cancelled"}
    assert_events_agree(redis_url, run_id)
    assert not [one for one in runs.record().asked() if one.run_id == run_id]
    eventually(lambda: not any(run.status in ("running", "queued") for run in runs.record().runs()))


def test_what_follows_decides_as_behind_a_failed_step(redis_url: str, worker: Fleet) -> None:
    steps = {
        "first": ASK, "a": {**ECHO, "needs": ["first"]}, "b": {**NAP, "needs": ["first"], "on_error": "continue"},
        "join": {"type": "task", "task": "user.echo", "input": {"value": "{{ [a, b] }}"}, "needs": ["a", "b"]},
        "each": {**NAP, "for_each": [1, 2], "on_error": "continue"},
        "collected": {**NAP, "for_each": [1, 2]},
    }  # fmt: skip
    run_id = ferrum.submit({"name": "revoked", "steps": steps})
    doing(run_id, "first", "waiting")
    # Before it could run.
    revoke(run_id, "b", by="ann")
    revoke(run_id, "b")
    for step in ("each.0", "each.1", "collected.1"):
        doing(run_id, step, "running")
    revoke(run_id, "each.0")
    revoke(run_id, "collected.1")
    runs.decide(run_id, "first", approved=True, by="ann")
    view = ended(run_id)
    found = left(view)
    assert found["b"][0] == "cancelled"
    assert found["b"][1] in ("revoked by ann", "revoked by remote control")
    assert found["join"] == ("completed", None)
    assert [step.output for step in view.steps if step.step_id == "join"] == [[1, None]]
    assert found["each"][0] == "failed"
    assert "revoked by remote control" in (found["each"][1] or "")
    assert "revoked by remote control" in (found["collected"][1] or "")
    assert (view.status, view.reason) == (RunStatus.FAILED, "'collected' failed")
    assert_events_agree(redis_url, run_id)


def test_the_last_step_of_a_run_with_outputs_closes_it(redis_url: str, worker: Fleet) -> None:
    flow = {"name": "revoked", "steps": {"a": {**ASK, "on_error": "continue"}}, "outputs": {"a": "{{ a }}"}}
    run_id = ferrum.submit(flow)
    doing(run_id, "a", "waiting")
    revoke(run_id, "a")
    view = ended(run_id)
    assert (view.status, view.outputs) == (RunStatus.COMPLETED, {"a": None})


def test_what_is_undone_and_revoked_is_said_to_be_not_undone(redis_url: str, worker: Fleet) -> None:
    steps = {"a": {**ECHO, "compensate": NAP}, "b": {"type": "task", "task": "user.boom", "needs": ["a"]}}
    run_id = ferrum.submit({"name": "revoked", "steps": steps})
    doing(run_id, "a.compensate", "running")
    revoke(run_id, "a.compensate")
    view = ended(run_id)
    assert view.reason == "'b' failed; not undone: 'a'"
    assert_events_agree(redis_url, run_id)


def test_the_command_line_of_celery_revokes_as_flower_does(worker: Fleet) -> None:
    run_id = ferrum.submit({"name": "revoked", "steps": {"a": NAP}})
    doing(run_id, "a", "running")
    command = [sys.executable, "-m", "celery", "-A", "ferrum", "control", "revoke", task_id(run_id, "a")]
    said = subprocess.run(
        command, env=into(worker.environ), cwd=worker.home, capture_output=True, text=True, check=True
    )
    assert f"asked the record to cancel {task_id(run_id, 'a')}" in said.stdout
    assert left(ended(run_id)) == {"a": REVOKED}


def test_what_is_not_there_or_has_ended_is_not_revoked(worker: Fleet) -> None:
    run_id = ferrum.submit({"name": "revoked", "steps": {"a": ECHO, "e": {**NAP, "for_each": [1]}}})
    doing(run_id, "a", "completed")
    record: Record = runs.record()
    for step, said in (("a", "it is completed"), ("e.7", "it is not begun")):
        with pytest.raises(Conflict, match=f"{step}.* cannot be revoked: {said}"):
            record.revoke(run_id, step, "no")
    with pytest.raises(NotFound, match="has no step 'z'"):
        record.revoke(run_id, "z", "no")
    with pytest.raises(NotFound, match="there is no run"):
        record.revoke(run_id[:-2] + "00", "a", "no")
    runs.cancel(run_id)
    with pytest.raises(Conflict, match=r"'e' .* cannot be revoked: the run is cancelled"):
        record.revoke(run_id, "e", "no")


def test_other_tasks_are_revoked_as_celery_does_it_and_both_at_once(worker: Fleet) -> None:
    from ferrum.celery import app

    run_id = ferrum.submit({"name": "revoked", "steps": {"a": NAP}})
    doing(run_id, "a", "running")
    ids = ["a-task-of-mine", task_id(run_id, "a")]
    [_, answer] = app.control.broadcast("revoke", arguments={"task_id": ids}, reply=True, timeout=20, limit=1)
    assert all(one in str(answer) for one in ids)
    assert "a-task-of-mine" in str(app.control.inspect(timeout=20, limit=1).revoked())
    assert left(ended(run_id)) == {"a": REVOKED}


# What Celery would drop by itself.


def test_a_step_whose_message_has_expired_runs_none_the_less(worker: Fleet) -> None:
    from ferrum.celery import app

    run_id = ferrum.submit({"name": "expired", "steps": {"first": ASK, "a": {**ECHO, "needs": ["first"]}}})
    doing(run_id, "first", "waiting")
    # A message of whoever pushes to Redis, which says so.
    signature = json.loads(json.dumps(runs.plan_of(run_id).signature(run_id, "first")))
    del signature["options"]["priority"]
    app.signature(signature).apply_async(expires=-1)
    runs.decide(run_id, "first", approved=True, by="ann")
    assert ended(run_id).status is RunStatus.COMPLETED


def test_a_rate_limit_for_steps_is_refused_with_what_to_use(worker: Fleet) -> None:
    from ferrum.celery import app

    [answer] = app.control.rate_limit("ferrum.task", "1/m", reply=True, timeout=20, limit=1)
    assert "takes no rate limit" in str(answer)
    assert "'concurrency'" in str(answer)
    [answer] = app.control.rate_limit("user.echo", "1/m", reply=True, timeout=20, limit=1)
    assert "ok" in str(answer)
    run_ids = [ferrum.submit({"name": "quick", "steps": {"a": ECHO}}) for _ in range(3)]
    assert {ended(run_id).status for run_id in run_ids} == {RunStatus.COMPLETED}


def test_no_inspect_command_tells_the_password_of_the_broker(worker: Fleet, redis_url: str) -> None:
    from ferrum.celery import app

    password = str(urlsplit(redis_url).password)
    look = app.control.inspect(timeout=20, limit=1)
    for answer in (look.stats(), look.conf(with_defaults=True), look.report()):
        assert answer
        assert password not in str(answer)

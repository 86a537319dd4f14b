"""A revoke is heard by the record though no worker is there; one that comes later finds what was decided."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, assert_events_agree, ended, eventually, happened
from preloading import into

import ferrum
from ferrum import runs
from ferrum.errors import NotFound
from ferrum.messages import MAX_ID
from ferrum.plan import task_id
from ferrum.remote import RECORD
from ferrum.results import RunStatus

ECHO = {"type": "task", "task": "user.echo", "input": {"value": 1}}
ASK = {"type": "approval", "message": "Go on?"}

#: One that is ready, two beside each other, and the part that joins them.
STEPS = {
    "a": ECHO, "b": {**ECHO, "needs": ["a"]}, "c": {**ECHO, "needs": ["a"], "on_error": "continue"},
    "join": {**ECHO, "needs": ["b", "c"]},
}  # fmt: skip


@pytest.fixture
def nobody(clean_redis: str) -> str:
    """The URL of a Redis at which there is no worker."""
    return clean_redis


@pytest.fixture
def late(nobody: str, tmp_path: Path) -> Iterator[Fleet]:
    """Workers that are still to come."""
    fleet = Fleet(nobody, tmp_path)
    try:
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def app(nobody: str) -> Any:
    from ferrum.celery import app

    return app


def submitted(steps: dict[str, Any] | None = None) -> str:
    return ferrum.submit({"name": "unheard", "steps": steps or STEPS})


def said(answers: Any) -> str:
    """The one answer, which is the record's."""
    [answer] = answers
    return str(answer[RECORD])


def test_a_revoke_of_what_is_ready_is_heard_at_once(app: Any, nobody: str) -> None:
    run_id = submitted()
    assert app.control.revoke(task_id(run_id, "a")) is None
    assert [event.error for event in happened(run_id, "step.cancelled", "a")] == ["revoked by remote control"]
    assert_events_agree(nobody, run_id)


def test_what_was_revoked_unheard_is_done_by_no_worker_that_comes_later(app: Any, nobody: str, late: Fleet) -> None:
    first, second = submitted(), submitted({"gate": ASK, "last": {**ECHO, "needs": ["gate"]}})
    ids = [task_id(first, "b"), task_id(first, "join"), task_id(second, "gate")]
    answer = said(app.control.revoke(ids, by="ann", reply=True, terminate=True, signal="SIGKILL"))
    assert all(f"{one} is cancelled" in answer for one in ids)
    # Decided already, and by whom: the second time changes nothing.
    assert "b' of run" in said(app.control.revoke(ids[:1], by="bob", reply=True))
    late.start()
    views = ended(first), ended(second)
    assert {view.status for view in views} == {RunStatus.FAILED}
    left = [(step.step_id, step.status.value, step.error) for view in views for step in view.steps]
    assert left == [
        ("a", "completed", None), ("b", "cancelled", "revoked by ann"), ("c", "completed", None),
        ("join", "cancelled", "revoked by ann"), ("gate", "cancelled", "revoked by ann"),
        ("last", "skipped", "'gate' was cancelled"),
    ]  # fmt: skip
    for run_id in (first, second):
        assert_events_agree(nobody, run_id)
        assert {len(happened(run_id, "step.cancelled", step)) for step in ("b", "join", "gate")} <= {0, 1}


def test_both_ways_of_a_revoke_are_one(app: Any, nobody: str, late: Fleet) -> None:
    late.start()
    nap = {"type": "task", "task": "user.sleep", "input": {"seconds": 60}}
    run_id = submitted({"a": nap, "b": {**ECHO, "needs": ["a"]}})
    eventually(lambda: happened(run_id, "step.started", "a"))
    answers = app.control.revoke(task_id(run_id, "a"), reply=True, timeout=20, limit=1)
    assert next(iter(answers[0])) == RECORD
    assert len(answers) == 2
    assert ended(run_id).status is RunStatus.FAILED
    assert len(happened(run_id, "step.cancelled", "a")) == 1
    assert_events_agree(nobody, run_id)


def test_the_command_line_revokes_without_a_worker_and_says_what_came_of_each(nobody: str, tmp_path: Path) -> None:
    run_id, message = submitted(), "a-message-of-mine"
    ids = [task_id(run_id, "a"), task_id(run_id, "z"), task_id(run_id[:-3] + "000", "a"), run_id, message]
    command = [sys.executable, "-m", "celery", "-A", "ferrum", "control", "-t", "0.1", "revoke", *ids]
    done = subprocess.run(command, env=into(os.environ), cwd=tmp_path, capture_output=True, text=True, check=True)
    for sentence in (
        f"{ids[0]} is cancelled", f"run {run_id!r} has no step 'z'", "there is no run",
        f"{run_id} is a run: end it with 'ferrum runs cancel {run_id}'",
        f"{message} is dropped if no worker has taken it yet",
    ):  # fmt: skip
        assert sentence in done.stdout
    assert happened(run_id, "step.cancelled", "a")


def test_a_terminate_by_its_own_name_is_heard_too(app: Any, nobody: str) -> None:
    run_id = submitted()
    arguments = {"signal": "KILL", "task_id": [task_id(run_id, "a")]}
    assert "is cancelled" in said(app.control.broadcast("terminate", arguments, reply=True, timeout=0.1))
    assert happened(run_id, "step.cancelled", "a")


def test_a_message_that_is_revoked_before_a_worker_took_it_starts_no_run(app: Any, nobody: str, late: Fleet) -> None:
    flow = {"name": "sent", "steps": {"a": ECHO}}
    revoked, kept = (app.send_task("ferrum.run", [flow], queue="ferrum") for _ in range(2))
    heard: list[str] = []
    app.control.broadcast(
        "revoke", {"task_id": (revoked.id, "x" * (MAX_ID + 1))}, reply=True, timeout=0.1,
        callback=lambda answer: heard.append(str(answer)),
    )  # fmt: skip
    assert f"{revoked.id} is dropped if no worker has taken it yet" in heard[0]
    assert "is no id of a task" in heard[0]
    worker = late.start()
    assert ended(kept.get(timeout=60)["run_id"]).status is RunStatus.COMPLETED
    eventually(lambda: revoked.state == "REVOKED")
    # As if each worker had heard of it: also one that started afterwards.
    worker.kill()
    worker.wait()
    late.start()
    app.send_task("ferrum.run", [flow], queue="ferrum", task_id=revoked.id)
    assert ended(app.send_task("ferrum.run", [flow], queue="ferrum").get(timeout=60)["run_id"])
    assert len(runs.record().runs()) == 2


def test_what_is_told_and_not_asked_is_told_as_it_was(app: Any, nobody: str) -> None:
    run_id = submitted()
    assert app.control.ping(timeout=0.1) == []
    assert app.control.broadcast("revoke", {"task_id": []}, reply=True, timeout=0.1) == []
    assert app.control.broadcast("revoke", {"task_id": None}, reply=True, timeout=0.1) == []
    assert not happened(run_id, "step.cancelled")


def test_stamps_are_refused_as_no_message_has_any(app: Any, nobody: str) -> None:
    with pytest.raises(NotFound, match="no message of ferrum's keeps stamps: revoke by id"):
        app.control.revoke_by_stamped_headers({"team": "x"})
    answer = app.control.broadcast("revoke_by_stamped_headers", {"headers": {"team": "x"}}, reply=True, timeout=0.1)
    assert "keeps stamps" in said(answer)

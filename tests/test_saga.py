"""What a run that cannot complete undoes: the last first, each once, whatever dies meanwhile."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, assert_events_agree, ended, eventually, happened

import ferrum
from ferrum.results import RunStatus

#: A worker that died is noticed soon.
QUICK = {"FERRUM_LEASE": "1.5", "FERRUM_HEARTBEAT": "0.2", "FERRUM_SWEEP": "0.1", "FERRUM_RESEND_AFTER": "1"}


@pytest.fixture
def fleet(clean_redis: str, tmp_path: Path) -> Iterator[Fleet]:
    """A fleet with nobody in it yet."""
    fleet = Fleet(clean_redis, tmp_path, QUICK)
    try:
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "effects.log"


def effect(log: Path, text: str, **how: Any) -> dict[str, Any]:
    return {"type": "task", "task": "user.effect", "input": {"log": str(log), "text": text, **how}}


def texts(log: Path) -> list[str]:
    """What was done, in order."""
    return [line.partition("\t")[2] for line in log.read_text().splitlines()] if log.exists() else []


def three_steps(log: Path, **third: Any) -> dict[str, Any]:
    """One after the other, each with what undoes it; the second cannot be undone. `third` is how that is undone."""

    def undo(**how: Any) -> dict[str, Any]:
        return {"compensate": effect(log, "undo {{ params.input.text }} of {{ output }}", **how)}

    return {
        "first": effect(log, "1") | undo(),
        "second": effect(log, "2") | undo(fail=True) | {"needs": ["first"]},
        "third": effect(log, "3") | undo(**third) | {"needs": ["second"]},
    }


def undone(run_id: str) -> list[tuple[str, str]]:
    """The steps that undid something, in the order in which they ended, and how they did."""
    return [
        (event.step, event.type)
        for event in ferrum.runs.record().events(run_id)
        if event.type in ("step.completed", "step.failed") and event.step.endswith(".compensate")
    ]


EACH_ONCE = [
    ("third.compensate", "step.completed"),
    ("second.compensate", "step.failed"),
    ("first.compensate", "step.completed"),
]


def kill_when(fleet: Fleet, number: int, stuck: Path) -> None:
    """Kill this worker, for good, once something in it is stuck."""
    eventually(stuck.exists)
    fleet.workers[number].send_signal(signal.SIGKILL)
    fleet.workers[number].wait()


@pytest.mark.parametrize("late", [False, True], ids=["before its effect", "after its effect"])
def test_a_rollback_goes_on_where_it_was_when_its_worker_was_killed(
    fleet: Fleet, redis_url: str, log: Path, tmp_path: Path, late: bool
) -> None:
    stuck = tmp_path / "stuck"
    steps = three_steps(log, stuck=str(stuck), late=late) | {
        "fourth": effect(log, "4", fail=True) | {"needs": ["third"]}
    }
    fleet.start()
    run_id = ferrum.submit({"name": "saga", "steps": steps})
    eventually(stuck.exists)
    assert ferrum.runs.record().status(run_id) is RunStatus.COMPENSATING
    kill_when(fleet, 0, stuck)
    fleet.start()
    run = ended(run_id)
    assert (run.status, run.reason) == (RunStatus.FAILED, "'fourth' failed; not undone: 'second'")
    assert texts(log) == ["1", "2", "3", "undo 3 of 3", "undo 1 of 1"]
    assert undone(run_id) == EACH_ONCE
    assert [event.step for event in happened(run_id, "step.lost")] == ["third.compensate"]
    assert_events_agree(redis_url, run_id)


def test_a_run_that_is_cancelled_undoes_what_it_did_though_its_worker_is_killed_meanwhile(
    fleet: Fleet, redis_url: str, log: Path, tmp_path: Path
) -> None:
    stuck = tmp_path / "stuck"
    steps = three_steps(log, stuck=str(stuck)) | {
        "fourth": {"type": "wait", "signal": "never", "needs": ["third"]},
        "fifth": effect(log, "5") | {"needs": ["fourth"]},
    }
    fleet.start()
    run_id = ferrum.submit({"name": "saga", "steps": steps})
    eventually(lambda: happened(run_id, "step.waiting", "fourth"))
    ferrum.cancel(run_id, by="ada")
    kill_when(fleet, 0, stuck)
    fleet.start()
    run = ended(run_id)
    assert (run.status, run.reason) == (RunStatus.CANCELLED, "cancelled; not undone: 'second'")
    assert texts(log) == ["1", "2", "3", "undo 3 of 3", "undo 1 of 1"]
    assert undone(run_id) == EACH_ONCE
    assert {step.step_id: step.status.value for step in run.steps if "." not in step.step_id} == {
        "first": "completed", "second": "completed", "third": "completed", "fourth": "cancelled", "fifth": "cancelled",
    }  # fmt: skip
    assert_events_agree(redis_url, run_id)

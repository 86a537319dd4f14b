"""A worker from its start to its end: what it refuses to start with, which queues it takes, how it stops."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, assert_events_agree, effects, ended, eventually, happened, lines
from preloading import into
from test_message_fuzz import a_run

import ferrum
from ferrum import runs
from ferrum.broker import UNACKED, UNACKED_INDEX
from ferrum.messages import MAX_DELIVERIES
from ferrum.results import RunStatus

#: As people start them; what ferrum starts itself loads less, and so do workers of other tests.
BY_CELERY = ("celery", "-A", "ferrum", "worker")


@pytest.fixture
def fleet(clean_redis: str, tmp_path: Path) -> Iterator[Fleet]:
    policy = tmp_path / "tools.policy.yaml"
    policy.write_text('allow: ["tool:*", "task:user.*"]\n')
    environ = {"FERRUM_POLICY": str(policy), "FERRUM_MCP_SERVERS": effects(tmp_path / "effects.log")}
    fleet = Fleet(clean_redis, tmp_path, environ)
    try:
        yield fleet
    finally:
        fleet.stop()


def test_a_stopping_worker_hands_its_steps_to_another_after_its_grace(
    fleet: Fleet, redis_url: str, tmp_path: Path
) -> None:
    steps: dict[str, Any] = {
        "a": {"type": "task", "task": "user.sleep_once", "input": {"path": str(tmp_path / "began")}},
        "b": {"type": "tool", "tool": "effects.append", "input": {"text": "b", "delay_s": 2}},
    }
    first = fleet.start(FERRUM_GRACE="0.2")
    run_id = ferrum.submit({"name": "x", "steps": steps, "outputs": {"processes": "{{ a }}"}})
    eventually(lambda: (tmp_path / "began").exists() and happened(run_id, "act.decided", "b"))
    first.send_signal(signal.SIGTERM)
    assert first.wait(PATIENCE_S) == 0
    assert [lost.reason for lost in happened(run_id, "step.lost")] == ["its worker is stopping"] * 2
    second = fleet.start()
    assert ferrum.wait(run_id, timeout_s=PATIENCE_S) == {"processes": 2}
    for step in steps:
        assert [_pid(event) for event in happened(run_id, "step.started", step)] == [first.pid, second.pid]
    # The call that was handed back was cancelled before it acted.
    assert lines(tmp_path / "effects.log") == [f"{run_id}.b"]
    assert_events_agree(redis_url, run_id)


def _pid(event: Any) -> int:
    return int(event.worker.split(":")[1])


def test_a_stopping_worker_lets_a_short_step_finish(fleet: Fleet, redis_url: str, tmp_path: Path) -> None:
    log = tmp_path / "began"
    steps = {"a": {"type": "task", "task": "user.sleep", "input": {"seconds": 0.5, "log": str(log)}}}
    worker = fleet.start(command=BY_CELERY)
    run_id = ferrum.submit({"name": "x", "steps": steps})
    eventually(log.exists)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 0
    assert ended(run_id).status is RunStatus.COMPLETED
    assert not happened(run_id, "step.lost")
    assert_events_agree(redis_url, run_id)


def test_queues_shape_a_fleet_and_a_prefork_pool_runs_steps_too(fleet: Fleet, redis_url: str, tmp_path: Path) -> None:
    prefork = fleet.start("--pool", "processes", "-c", "2", "-Q", "ferrum.task", command=BY_CELERY)
    threads = fleet.start("-Q", "ferrum.tool", command=BY_CELERY)
    steps: dict[str, Any] = {
        "a": {"type": "task", "task": "user.echo", "input": {"value": 1}},
        "b": {"type": "tool", "tool": "effects.append", "input": {"text": "b{{ a }}"}},
        "c": {"type": "task", "task": "user.echo", "input": {"value": 2}},
        "d": {"type": "task", "task": "user.echo", "input": {"value": "{{ [b.written, c] }}"}},
    }
    run_id = ferrum.submit({"name": "x", "steps": steps, "outputs": {"r": "{{ d }}"}})
    assert ferrum.wait(run_id, timeout_s=PATIENCE_S) == {"r": ["b1", 2]}
    assert lines(tmp_path / "effects.log") == [f"{run_id}.b"]
    by = {event.step: _pid(event) for event in happened(run_id, "step.started")}
    assert by["b"] == threads.pid
    assert not {by["a"], by["c"], by["d"]} & {threads.pid, prefork.pid}
    assert_events_agree(redis_url, run_id)


def test_a_worker_gets_ready_at_its_start_for_what_its_policy_allows_unless_it_need_not(
    fleet: Fleet, tmp_path: Path
) -> None:
    (tmp_path / "code.policy.yaml").write_text('allow: ["sandbox:*"]\n')
    environ = {"FERRUM_POLICY": str(tmp_path / "code.policy.yaml")}
    fleet.start(FERRUM_WARM="true", **environ)
    # What there is to isolate code here, or why there is nothing.
    eventually(lambda: "bubblewrap" in fleet.log(0).read_text())
    fleet.start(FERRUM_WARM="false", **environ)
    fleet.stop()
    assert "bubblewrap" not in fleet.log(1).read_text()


def _refused(fleet: Fleet, **environ: str) -> str:
    """What a worker says that does not start."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *BY_CELERY],
        env=into({**fleet.environ, **environ}), cwd=fleet.home, capture_output=True, text=True, timeout=PATIENCE_S,
        check=False,
    )  # fmt: skip
    assert done.returncode not in (0, None), done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_worker_refuses_a_celeryconfig_with_which_it_would_lose_steps(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "celeryconfig.py").write_text("task_default_queue = 'ferrum'\ntask_acks_late = False\n")
    said = _refused(fleet, PYTHONPATH=f"{tmp_path}:{fleet.environ['PYTHONPATH']}")
    assert "the celeryconfig that was found sets task_acks_late = False; ferrum needs True" in said


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"FERRUM_LEESE": "1", "FERRUM_STRICT": "1"},
            "FERRUM_LEESE is not a setting of ferrum (did you mean 'FERRUM_LEASE'?)",
        ),
        ({"FERRUM_POLICY": "nowhere.yaml"}, "nowhere.yaml: the policy cannot be read"),
    ],
)
def test_a_worker_refuses_settings_that_it_does_not_understand(
    fleet: Fleet, environ: dict[str, str], message: str
) -> None:
    said = _refused(fleet, **environ)
    # Celery shows where it happened; what is wrong stands last.
    assert message in said.strip().splitlines()[-1]


#: Ends each worker that is about to start a run.
POISON = """
import os
from celery import signals

@signals.task_prerun.connect(weak=False)
def end(task=None, **_):
    if task.name == "ferrum.run":
        os._exit(9)
"""


def test_a_message_that_ends_every_worker_that_takes_it_becomes_a_dead_letter(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    message = a_run()
    task_id = message["headers"]["id"]
    # So many workers have had it, the next one included; the one after that does not try.
    message["properties"]["delivery_info"]["deliveries"] = MAX_DELIVERIES
    environ = {"FERRUM_IMPORTS": "poison", "PYTHONPATH": f"{tmp_path}:{fleet.environ['PYTHONPATH']}"}
    with redis.Redis.from_url(fleet.environ["FERRUM_REDIS_URL"], decode_responses=True) as client:
        client.lpush("ferrum", json.dumps(message))
        for _ in range(2):
            fleet.launch(**environ)
            eventually(lambda: fleet.workers[-1].poll() is not None or runs.dead_letters())
            # As if nobody had renewed it for as long as it takes.
            for tag in client.hkeys(UNACKED):
                client.zadd(UNACKED_INDEX, {str(tag): 1})
        (letter,) = runs.dead_letters()
        kept: Any = client.get(f"celery-task-meta-{task_id}")
    assert [worker.poll() for worker in fleet.workers] == [9, None]
    assert letter.task_id == task_id
    assert json.loads(kept)["result"] == {"error": letter.reason}
    assert letter.reason.startswith("it was delivered 9 times and never answered")

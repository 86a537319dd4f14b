"""Real workers for tests, each a process, on the test's own Redis."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import redis
from preloading import Forked, forked

import ferrum.runs
from ferrum.governance.budget import counters
from ferrum.record import base_of
from ferrum.results import RunStatus

T = TypeVar("T")

#: Those of this test process that have workers.
_fleets: set[Fleet] = set()

#: How long a test waits for what has to come. Nothing is proved by it: it only ends a test that would wait for ever,
#: and a machine that has much else to do may need a good part of it.
PATIENCE_S = 120.0

#: Tasks that `type: task` steps of tests run; see `user_tasks.py`.
TASKS = "user_tasks"


class Fleet:
    """Workers that share a home, a policy that allows everything, and whatever else `environ` says.

    They get ready for nothing before it is asked for: for models that is seconds of computing at each start.
    """

    def __init__(self, redis_url: str, home: Path, environ: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.workers: list[Forked] = []
        policy = home / "allow-all.policy.yaml"
        policy.write_text(
            json.dumps({"allow": [f"{kind}:*" for kind in ("tool", "model", "sandbox", "retrieval", "ingest", "task")]})
        )
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FERRUM_")},
            "FERRUM_REDIS_URL": redis_url,
            "FERRUM_HOME": str(home),
            "FERRUM_ARTIFACTS": os.environ["FERRUM_ARTIFACTS"],
            "FERRUM_POLICY": str(policy),
            "FERRUM_WARM": "false",
            "FERRUM_IMPORTS": TASKS,
            "PYTHONPATH": str(Path(__file__).parent),
            **(environ or {}),
        }

    def start(self, *options: str, command: tuple[str, ...] = ("ferrum.start_worker",), **environ: str) -> Forked:
        """Start a worker and wait until it is ready; its log is in `<home>/worker-N.log`."""
        before = set(ferrum.runs.record().workers())
        log = self.log(len(self.workers))
        worker = self.launch(*options, command=command, **environ)

        def ready() -> bool:
            assert worker.poll() is None, log.read_text()[-4000:]
            return b" ready." in log.read_bytes() and bool(set(ferrum.runs.record().workers()) - before)

        eventually(ready, timeout_s=PATIENCE_S)
        return worker

    def start_alone(self, *options: str, **environ: str) -> Forked:
        """Start a worker that does all there is to do, as none of another fleet takes a part of it."""
        url = self.environ["FERRUM_REDIS_URL"]
        beside = [one for one in _fleets - {self} if one.environ["FERRUM_REDIS_URL"] == url and one.lives()]
        assert not beside, f"another worker is at it, and what it does proves nothing here: {beside[0].home}"
        return self.start(*options, **environ)

    def lives(self) -> bool:
        return any(worker.poll() is None for worker in self.workers)

    def launch(self, *options: str, command: tuple[str, ...] = ("ferrum.start_worker",), **environ: str) -> Forked:
        """Start a worker and wait for nothing."""
        with self.log(len(self.workers)).open("wb") as out:
            worker = Forked(
                ["-W", "ignore", "-m", *command, "-l", "info", *options],
                env={**self.environ, **environ},
                cwd=self.home,
                stdout=out,
            )
        self.workers.append(worker)
        _fleets.add(self)
        return worker

    def log(self, number: int) -> Path:
        return self.home / f"worker-{number}.log"

    def stop(self) -> None:
        _fleets.discard(self)
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            try:
                worker.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        for name in ferrum.runs.record().workers():
            ferrum.runs.record().gone(name)


def lane(queue: str, number: int = 4) -> str:
    """The list that a lane of a queue is, as kombu names it; the one where a workflow says nothing of its priority."""
    return f"{queue}\x06\x16{number}" if number else queue


def eventually(check: Callable[[], T], timeout_s: float = PATIENCE_S, every_s: float = 0.05) -> T:
    """What `check` returns once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := check()):
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(every_s)
    return value


def ended(run_id: str, timeout_s: float = PATIENCE_S) -> ferrum.runs.RunView:
    """The run, once it has ended, whatever came of it."""
    eventually(lambda: ferrum.runs.record().status(run_id).ended, timeout_s)
    return ferrum.runs.show(run_id)


def status_of(run_id: str) -> RunStatus:
    return ferrum.runs.record().status(run_id)


def effects(log: Path) -> str:
    """`FERRUM_MCP_SERVERS` with one server, `effects`, whose tools leave their traces in `log`."""
    server = {"module": "ferrum.testing.effects_server", "args": ["--log", str(log)], "env": forked()}
    return json.dumps({"mcpServers": {"effects": server}})


def lines(log: Path) -> list[str]:
    """The idempotency key of each effect so far, in order."""
    return [line.partition("\t")[0] for line in log.read_text().splitlines()] if log.exists() else []


def happened(run_id: str, kind: str, step: str | None = None) -> list[Any]:
    """The events of this type, of one step or of all."""
    events: list[Any] = list(ferrum.runs.record().events(run_id))
    return [event for event in events if event.type == kind and step in (None, getattr(event, "step", None))]


def assert_events_agree(redis_url: str, run_id: str) -> None:
    """What the events add up to is what the record says."""
    base = base_of(run_id)
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        run: Any = client.hgetall(f"{base}:run:{run_id}")
        kept: Any = client.hgetall(f"{base}:steps:{run_id}")
    state = ferrum.runs.record().state(run_id)
    record = {step: json.loads(raw) for step, raw in kept.items() if ":" not in step}
    assert state.status == run["status"]
    if state.status.ended:
        # A run that ends leaves what had not ended as it was; the events call it cancelled.
        for step in record.values():
            step["s"] = step["s"] if step["s"] in ("completed", "failed", "skipped") else "cancelled"
    said = {name: (step.status.value, step.attempt) for name, step in state.steps.items()}
    touched = {name: (step["s"], step["a"]) for name, step in record.items() if name in said or step["a"]}
    assert said == touched
    used = {name.partition(":")[2]: int(amount) for name, amount in run.items() if name.startswith("u:")}
    assert {name: amount for name, amount in counters(state.usage).items() if amount} == used

"""The Celery app: `celery -A ferrum worker`. Every step type is a task of it; each does one attempt and returns.

A task never raises into its canvas: whatever happened is in the record, and the steps behind read it there.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from celery import Celery, Task
from celery.exceptions import Ignore, InvalidTaskError, Reject
from celery.worker.request import Request
from kombu import Queue

from ferrum.actors import LiveActors
from ferrum.artifacts import Artifacts
from ferrum.breaker import Breaking
from ferrum.broker import BACKENDS, RENEW, UNACKED_INDEX, Broker
from ferrum.errors import AuthorError, Misplaced, NotFound, SettingsError, Unavailable, did_you_mean
from ferrum.executor import Executor, Outcome, Then
from ferrum.governance.policy import load_policy
from ferrum.local.redis import celery_url, running
from ferrum.loop import LoopThread
from ferrum.messages import RUN, arguments
from ferrum.plan import Plan
from ferrum.pulse import Pulse, Watch
from ferrum.record import Record, base_of
from ferrum.scripts import timeout_of
from ferrum.sending import hand_over, send, start
from ferrum.settings import Settings, settings
from ferrum.steps import step_types
from ferrum.worker import install, shown_by_celery

log = logging.getLogger(__name__)

#: How long a worker's calls outlast a Redis that is away: a step that has acted must get its result recorded.
_PATIENCE_S = 600
#: The same for somebody who waits for the answer.
_ASKING_PATIENCE_S = 3.0


def redis_url() -> str:
    """Where Redis is: `FERRUM_REDIS_URL` or `REDIS_URL`, else the private one that runs here.

    Raises `Unavailable` with what to do when there is none.
    """
    given = settings().redis_url
    if given is not None:
        return given.get_secret_value()
    url = running(settings().home)
    if url is None:
        raise Unavailable(
            "there is no Redis: set FERRUM_REDIS_URL, or start the one that ferrum brings with 'ferrum redis', "
            "or let 'ferrum run' start it"
        )
    return url


def _defaults() -> dict[str, Any]:
    try:
        url = celery_url(redis_url())
    except (SettingsError, Unavailable) as error:
        raise shown_by_celery(error) from None
    return {"broker_url": url, "result_backend": url, "broker_read_url": url, "broker_write_url": url}


def _celeryconfig() -> ModuleType:
    """The `celeryconfig` that Python finds first where it is one for ferrum, else the one that ferrum brings.

    In a process that has another Celery app, a module of this name is likely that app's: neither gets the other's.
    """
    ours = Path(__file__).parent.parent / "celeryconfig.py"
    spec = find_spec("celeryconfig")
    if spec is not None and spec.origin != str(ours):
        found = import_module("celeryconfig")
        if getattr(found, "task_default_queue", None) == "ferrum":
            return found
        log.warning("%s is not for ferrum: its task_default_queue is not 'ferrum', so it is not read", spec.origin)
    spec = spec_from_file_location("ferrum_celeryconfig", ours)
    # A .py file always has a loader.
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class App(Celery):  # type: ignore[misc] # Celery is untyped
    """Celery's app, with a worker and a remote control of ours."""

    control_cls = "ferrum.remote:Control"

    @cached_property
    def Worker(self) -> Any:
        return self.subclass_with_self("ferrum.pool:Worker")

    def revoke(self, task_ids: Sequence[str], by: str) -> dict[str, str]:
        """Tell the record that these tasks are revoked, whether or not a worker hears of it. Raises `Unavailable`."""
        from ferrum import remote

        record = Record(redis_url(), patience_s=_ASKING_PATIENCE_S)

        def plan_of(run_id: str) -> Plan:
            return Plan.loads(record.plan_document(run_id, record.plan_digest(run_id)))

        try:
            return remote.revoke(record, partial(hand_over, self, plan_of), task_ids, by)
        finally:
            record.close_connections()


# By `app.conf.update` nothing would be known before it is needed; like this, `ferrum plan` needs no Redis.
# Not the current app: in a process that has an app of its own, `shared_task`s and results are that one's. Celery makes
# the app of a worker the current one by itself.
app = App("ferrum", set_as_current=False, amqp=Broker)
app.loader.override_backends = BACKENDS
app.add_defaults(_defaults)
# The module and not its name: that Celery would look for in the working directory first.
app.config_from_object(_celeryconfig())


class _Process:
    """What one process needs to run steps; made by the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: Executor | None = None
        self._pulse: Pulse | None = None
        self._actors: LiveActors | None = None
        self._loop = LoopThread()
        os.register_at_fork(after_in_child=self._forget)

    def executor(self) -> Executor:
        if self._executor is not None:
            return self._executor
        with self._lock:
            if self._executor is None:
                self._executor = self._make()
            return self._executor

    def _make(self) -> Executor:
        config = settings()
        url, timeout_s = redis_url(), timeout_of(config.lease)
        record = Record(url, patience_s=_PATIENCE_S, timeout_s=timeout_s)
        self._actors = LiveActors(config)
        executor = Executor(
            record=record,
            artifacts=Artifacts.of(config),
            policy=load_policy(config),
            actors=self._actors,
            loop=self._loop,
            worker=worker_name(),
            lease_s=config.lease,
            breaking=Breaking(config.breaker_failures, config.breaker_window, config.breaker_open),
            finishing=_finishing(config),
        )
        watch = Watch(
            url, lease_s=config.lease, grace_s=config.grace, heartbeat_s=config.heartbeat, timeout_s=timeout_s,
            custody=(UNACKED_INDEX, RENEW),
        )  # fmt: skip
        self._pulse = Pulse(
            record, executor.holds, executor.shared, every_s=config.heartbeat, lease_s=config.lease, watch=watch
        )
        self._pulse.start()
        return executor

    def stop(self) -> None:
        """End what this process holds: sessions, connections, leases that need no repair."""
        with self._lock:
            executor, self._executor = self._executor, None
            pulse, actors = self._pulse, self._actors
        if executor is not None and pulse is not None and actors is not None:
            self._loop.stop(actors.aclose())
            pulse.stop()
            executor.record.close_connections()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        if self._pulse is not None:
            self._pulse.forget()
        self._executor = self._pulse = self._actors = None


def _finishing(config: Settings) -> frozenset[str]:
    """Raises `SettingsError`."""
    names = frozenset(name for part in config.finish_unleased.split(",") if (name := part.strip()))
    for name in names - {"*"} - step_types().keys():
        hint = did_you_mean(name, step_types())
        raise SettingsError(f"FERRUM_FINISH_UNLEASED: there is no step type {name!r}{hint}")
    return names


def worker_name() -> str:
    """This process, among all that ever run steps."""
    return f"{socket.gethostname().replace(' ', '_')}:{os.getpid()}:{uuid.uuid4().hex[:6]}"


process = _Process()


class Received(Request):  # type: ignore[misc] # Celery is untyped
    """A message as a worker received it. What `ferrum.messages` did not check is refused; it would end the worker."""

    def __init__(self, message: Any, **kwargs: Any) -> None:
        try:
            super().__init__(message, **kwargs)
            readable = [type(part) for part in message.payload] == [list, dict, dict]
        except (AttributeError, KeyError, TypeError, ValueError):
            readable = False
        if not readable:
            raise InvalidTaskError("no message as docs/enqueue.md has it: with headers.id and a body [[…], {…}, {…}]")

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Facts that `celery inspect` and Flower show: never the arguments, which hold the input of a run."""
        return dict(super().info(safe=True))


class ReceivedStep(Received):
    """The record of its run decides if a step runs: nothing that Celery drops by itself comes back."""

    def revoked(self) -> bool:
        return False


def _later(error: Unavailable) -> Reject:
    """The message goes back to its queue, and not at once: it would only ask faster for what is away."""
    time.sleep(1)
    return Reject(str(error), requeue=True)


class StepTask(Task):  # type: ignore[misc] # Celery is untyped
    """One attempt at one step."""

    abstract = True
    Request = ReceivedStep
    typing = False
    trail = False
    ignore_result = True
    # Told to a worker's event dispatcher, which passes nothing on until Flower (or -E) asks it to.
    send_events = True

    def run(self, run_id: str, step_id: str) -> None:
        try:
            base_of(run_id)
        except NotFound as error:
            raise Ignore(str(error)) from None
        try:
            outcome = process.executor().attempt(run_id, step_id, self._signature, self._tag())
        except Unavailable as error:
            raise _later(error) from error
        self._follow(outcome)

    def _follow(self, outcome: Outcome) -> None:
        # Before anything is sent: what cannot be sent must be let go of, too.
        self.request.ferrum_held = outcome.held
        self._send(outcome)
        if outcome.then is Then.WAIT:
            self.send_event("task-waiting")
        if outcome.then in (Then.WAIT, Then.DROP):
            raise Ignore
        if outcome.then is Then.RETURN:
            raise Reject("its step is handed back", requeue=True)

    def _send(self, outcome: Outcome) -> None:
        def plan_of(run_id: str) -> Plan:
            if outcome.plan is not None and run_id == outcome.run_id:
                return outcome.plan
            return process.executor().plan_of(run_id)

        send(app, plan_of, outcome.sends)

    def after_return(self, status: str, *_: object) -> None:
        held = getattr(self.request, "ferrum_held", None)
        if held is None:
            return
        holds = process.executor().holds
        if status == "SUCCESS":
            # Celery has sent what follows on the canvas: until now a crash was to be repaired, from here on none is.
            holds.release(held)
        else:
            # It could not be sent. The lease runs out, and the sweeper sends it.
            holds.drop(held)

    def _tag(self) -> str:
        """The broker's name for this delivery of the message."""
        return str((self.request.properties or {}).get("delivery_tag") or "")

    def _signature(self) -> str:
        """This message, to be published again under the same task id when the step has waited."""
        signature = self.signature_from_request(self.request)
        signature.options.pop("expires", None)
        return json.dumps(signature)


for _type in step_types().values():
    app.register_task(type(f"{_type.name.title().replace('_', '')}Step", (StepTask,), {"name": _type.task})())


@app.task(  # type: ignore[untyped-decorator]
    name=RUN, bind=True, ignore_result=False, typing=False, send_events=True, Request=Received
)
def run(self: Any, *given: object, **named: object) -> Any:
    """Start a run; the result is `{"run_id": …}`, or `{"error": …}` for what cannot be started.

    Without a `key` the message's task id is the key, so that a message that is delivered twice starts one run.
    """
    wanted = arguments(given, named)
    if isinstance(wanted, str):
        return {"error": wanted}
    executor = process.executor()
    try:
        if executor.record.is_revoked(self.request.id):
            # By Celery, a worker knows what was revoked while it was up.
            self.send_event("task-revoked", terminated=False, signum=None, expired=False)
            self.backend.mark_as_revoked(self.request.id, reason="revoked", request=self.request)
            raise Ignore
        plan = Plan.of(wanted["workflow"])
        run_id = start(
            app, executor.record, executor.artifacts, plan, wanted.get("input") or {},
            key=wanted.get("key") or self.request.id, priority=wanted.get("priority"), tenant=wanted.get("tenant"),
        )  # fmt: skip
    except AuthorError as error:
        return {"error": str(error)}
    except Misplaced as error:
        raise _later(error) from error
    return {"run_id": run_id}


_queues = ["ferrum", *sorted({kind.queue for kind in step_types().values()})]
app.conf.task_queues = [Queue(name, routing_key=name) for name in _queues]
install(app, process)

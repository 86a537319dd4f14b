"""The parts of a worker that run beside the steps: the sweeper that repairs, custody of messages, the stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import click
import redis
from celery import Celery, bootsteps, signals
from celery.exceptions import WorkerShutdown
from celery.worker.consumer import Tasks
from celery.worker.consumer.control import Control
from celery.worker.state import maybe_shutdown

from ferrum.broker import renew, warn_of_others
from ferrum.errors import FerrumError, Misplaced, NotFound, OperatorError, SettingsError, Unavailable, WorkflowError
from ferrum.executor import Executor, Holds
from ferrum.pulse import AWAY, Every
from ferrum.record import Resend
from ferrum.refusals import passes
from ferrum.scripts import Outage, unavailable
from ferrum.sending import send
from ferrum.settings import Settings, redact, settings
from ferrum.steps import step_types

log = logging.getLogger(__name__)

#: How often is looked for keys in whose place something else stands.
_LOOK_EVERY_S = 10.0

#: What a `celeryconfig` must not take away: without these, a killed worker loses steps.
_NEEDED = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
    "worker_deduplicate_successful_tasks": False,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
}


#: By which the processes of a pool are told to hand their steps back.
_HAND_BACK = signal.SIGUSR2


class Process(Protocol):
    def executor(self) -> Executor: ...
    def stop(self) -> None: ...


class Sweeper:
    """The repair: due timers, steps of dead workers, lost messages. One at a time in the fleet, by lock."""

    def __init__(self, app: Celery, executor: Executor, config: Settings) -> None:
        self._app = app
        self._executor = executor
        self._config = config
        self._queues = sorted({kind.queue for kind in step_types().values()})
        #: Leases are not reaped before this: when Redis was away, those of living workers ran out too.
        self._reap_from = 0.0
        self._forget_from = 0.0
        self._shared_from = 0.0
        self._answered_at = time.monotonic()
        self._idle_since = time.monotonic()
        self._look_from = 0.0
        self._away = Outage(log, "this worker")
        self._every = Every("ferrum-sweeper", config.sweep, self.once)

    @property
    def holds(self) -> Holds:
        return self._executor.holds

    def start(self) -> None:
        """Begin once Redis takes what this worker writes, however long that takes."""
        while True:
            try:
                self._beat()
                break
            except (Unavailable, redis.exceptions.RedisError) as said:
                error = said.__cause__ or said
                if not passes(error):
                    log.critical("this worker cannot start: %s", unavailable(error))
                    raise WorkerShutdown(1) from error
                self._away.began(error)
                self._reap_from = time.monotonic() + self._config.lease
            # A stop that was asked for meanwhile.
            maybe_shutdown()
            time.sleep(0.2)
        self._away.over()
        self._look_at_redis()
        self._share_the_store()
        self._every.start()

    def _look_at_redis(self) -> None:
        try:
            is_old = self._executor.record.is_old()
        except (Unavailable, redis.exceptions.RedisError) as error:
            log.warning("whether this Redis is new enough is not known: %s", error)
            return
        if is_old:
            self._executor.record.gone(self._executor.worker)
            log.critical("this worker cannot start: its Redis has no LMPOP; ferrum needs Redis 7 or later, or Valkey")
            raise WorkerShutdown(1)

    def _share_the_store(self) -> None:
        """Else what one worker keeps is not found by another, and each large value fails a step later."""
        executor = self._executor
        mine = executor.artifacts
        try:
            other = executor.record.other_store(mine.identity, mine.url, executor.worker)
        except Unavailable as error:
            log.warning("whether all workers have the same artifact store is not known: %s", error)
            return
        if other is not None:
            executor.record.gone(executor.worker)
            log.critical(
                "this worker cannot start: its artifact store is %s, and that of the other workers on this Redis is "
                "%s. Set FERRUM_ARTIFACTS to one store that all of them reach, or stop the others first",
                mine.url, other,
            )  # fmt: skip
            raise WorkerShutdown(1)

    def stop(self) -> None:
        self._every.stop()
        try:
            self._executor.record.gone(self._executor.worker)
        except AWAY:
            log.debug("Redis does not answer: this worker's name stays until its time is over")

    def once(self) -> None:
        try:
            self._beat()
            self._say_misplaced()
            self._notice_a_standstill()
            if self._executor.record.alone("sweeper", self._executor.worker, max(2.0, 4 * self._config.sweep)):
                self._sweep()
            self._stop_when_idle()
            self._away.over()
        except AWAY as error:
            self._reap_from = time.monotonic() + self._config.lease
            self._away.began(error)
        except Exception:
            # A sweeper that died would take the whole fleet's repair with it; the next turn may well succeed.
            self._reap_from = time.monotonic() + self._config.lease
            log.exception("a sweep failed")

    def _notice_a_standstill(self) -> None:
        """Redis may stand still for longer than a lease without an error; living workers could not renew theirs."""
        now = time.monotonic()
        if now - self._answered_at > self._config.sweep + self._config.lease / 2:
            self._reap_from = now + self._config.lease
        self._answered_at = now

    def _beat(self) -> None:
        # Who is alive is not known then; runs go on.
        with suppress(Misplaced):
            self._executor.record.beat(self._executor.worker, for_s=max(5.0, 4 * self._config.sweep))

    def _say_misplaced(self) -> None:
        """Now and then: what stands there is passed over, and only a person can tell whose it is."""
        if (now := time.monotonic()) >= self._look_from:
            self._look_from = now + min(_LOOK_EVERY_S, self._config.lease / 3)
            for wrong in self._executor.record.misplaced():
                log.error("%s", wrong)

    def _sweep(self) -> None:
        record, now = self._executor.record, time.monotonic()
        queues = record.empty_queues(self._queues)
        found = record.sweep(queues, resend_after_s=self._config.resend_after, reap=now >= self._reap_from)
        for what in found.sends + self._executor.share() + self._keep_shared(now):
            try:
                send(self._app, self._executor.plan_of, [what])
            except NotFound:
                log.info("%s is gone, nothing to send", what.run_id)
            except WorkflowError as error:
                # A worker of another version may well do so; this one ends the run when it is given one of its steps.
                log.error("%s.%s cannot be sent by this worker: %s", what.run_id, what.step_id, error)
        # A timer that is due soon is not kept waiting for the whole of a turn.
        self._every.soon(found.next_in_s)
        if now >= self._forget_from:
            record.forget_ended()
            self._forget_from = now + 60

    def _keep_shared(self, now: float) -> tuple[Resend, ...]:
        """Now and then: what is kept so is held for longer than that."""
        if now < self._shared_from:
            return ()
        self._shared_from = now + self._config.lease / 2
        return self._executor.keep_shared()

    def _stop_when_idle(self) -> None:
        limit = self._config.exit_when_idle
        if limit is None:
            return
        now = time.monotonic()
        if self._executor.holds.current() or self._executor.record.any_live():
            self._idle_since = now
        elif now - self._idle_since >= limit:
            log.info("no run for %g s: stopping", limit)
            os.kill(os.getpid(), signal.SIGTERM)


def install(app: Celery, process: Process) -> None:
    """Make `celery -A ferrum worker` a worker of this app: checked settings, no idle second, pulse, sweeper, stop."""

    class Lean(bootsteps.StartStopStep):  # type: ignore[misc]
        """Leaves out what costs start-up and traffic and earns nothing: the record knows what is cancelled."""

        requires = ()

        def __init__(self, parent: Any, **options: Any) -> None:
            parent.options["without_mingle"] = True
            parent.options["without_gossip"] = True
            _check(app, parent)
            # Here and not where the app is made: a worker of another app may run in a process that imported ferrum.
            _listen(process)

    class Repair(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.components:Pool",)
        sweeper: Sweeper | None = None

        def start(self, parent: Any) -> None:
            try:
                executor = process.executor()
            except OperatorError as error:
                log.critical("this worker cannot start: %s", redact(str(error)))
                raise WorkerShutdown(1) from error
            self.sweeper = Sweeper(app, executor, settings())
            self.sweeper.start()

        def close(self, parent: Any) -> None:
            # Here and not at a signal: a worker that is told to stop by remote control gets none.
            if self.sweeper is not None:
                _hand_back_after_grace(self.sweeper.holds, parent.pool)

        def stop(self, parent: Any) -> None:
            if self.sweeper is not None:
                self.sweeper.stop()

    class Remote(bootsteps.StartStopStep):  # type: ignore[misc]
        """Leaves of remote control what anybody may use, where anybody may write to Redis."""

        requires = (Control,)

        def start(self, parent: Any) -> None:
            from ferrum import remote

            revoke = partial(_in_background, partial(_revoke, app, process))
            is_locked = remote.locked(parent.conninfo.as_uri(include_password=True))
            for step in parent.steps:
                if isinstance(step, Control):
                    step.box.node.handlers = remote.handlers(locked=is_locked, revoke=revoke)

    class Custody(bootsteps.StartStopStep):  # type: ignore[misc]
        """Keeps the messages that this worker holds from being redelivered while it lives.

        Redis as a broker gives a message to another worker when its visibility timeout is over, whether or not the
        first is still at it; so the time is renewed, and may be short.
        """

        requires = (Tasks,)

        def start(self, parent: Any) -> None:
            every_s = app.conf.broker_transport_options["visibility_timeout"] / 3
            self.timer = parent.timer.call_repeatedly(every_s, _renew_custody, (parent,))

        def stop(self, parent: Any) -> None:
            timer = getattr(self, "timer", None)
            if timer is not None:
                timer.cancel()

    app.steps["worker"].add(Lean)
    app.steps["worker"].add(Repair)

    class Neighbours(bootsteps.StartStopStep):  # type: ignore[misc]
        """Tells once of another Celery app whose workers use the same database."""

        requires = (Tasks,)
        told = False

        def start(self, parent: Any) -> None:
            if not Neighbours.told:
                Neighbours.told = True
                warn_of_others(parent.task_consumer.channel)

    app.steps["consumer"].add(Custody)
    app.steps["consumer"].add(Neighbours)
    app.steps["consumer"].add(Remote)
    _import_users_tasks(app)
    if app.conf.worker_pool == "threads":
        app.conf.worker_pool = "ferrum.pool:Threads"


def _in_background(call: Callable[..., None], *arguments: object) -> None:
    """Start what asks Redis patiently on a thread: a worker's consumer does not wait for it."""
    threading.Thread(target=call, args=arguments, name="ferrum-revoke", daemon=True).start()


def _revoke(app: Celery, process: Process, task_ids: Sequence[str], by: str) -> None:
    from ferrum import remote

    executor = process.executor()
    try:
        remote.revoke(executor.record, partial(send, app, executor.plan_of), task_ids, by)
    except Unavailable as error:
        log.error("%s: not revoked: %s", ", ".join(task_ids), error)


def _listen(process: Process) -> None:
    on = {
        signals.worker_shutdown: lambda **_: process.stop(),
        signals.worker_process_shutdown: lambda **_: process.stop(),
        signals.worker_process_init: lambda **_: _hear_of_a_stop(process),
    }
    if settings().warm:
        on[signals.worker_ready] = lambda **_: _warm(process)
    for heard, receiver in on.items():
        heard.connect(receiver, weak=False, dispatch_uid="ferrum")


def _check(app: Celery, worker: Any) -> None:
    from ferrum import pool

    try:
        _check_settings(app)
        pool.check(worker)
    except SettingsError as error:
        raise shown_by_celery(error) from None


def shown_by_celery(error: FerrumError) -> BaseException:
    """The end of the command `celery` with the error as its one sentence; elsewhere the error itself."""
    context = click.get_current_context(silent=True)
    if context is None or "celery" not in (context.find_root().info_name or ""):
        return error
    # Of any other exception Celery prints a traceback while it looks for the app.
    return SystemExit(f"Error: {redact(str(error))}")


def _check_settings(app: Celery) -> None:
    for name, value in _NEEDED.items():
        if app.conf[name] != value:
            raise SettingsError(
                f"the celeryconfig that was found sets {name} = {app.conf[name]!r}; ferrum needs {value!r}, or a "
                "killed worker loses steps. Remove it there, or start the worker from another directory"
            )
    limited = [name for name, task in app.tasks.items() if name.startswith("ferrum.") and task.rate_limit]
    if limited:
        raise SettingsError(
            f"the celeryconfig that was found gives {limited[0]} a rate limit, for which a worker would keep messages "
            "that it took. Remove it there; steps have 'rate' and 'concurrency', which all workers keep"
        )


def _import_users_tasks(app: Celery) -> None:
    modules = [name for part in settings().imports.split(",") if (name := part.strip())]
    app.conf.imports = (*app.conf.imports, *modules) if modules else app.conf.imports


def _renew_custody(consumer: Any) -> None:
    channel = consumer.task_consumer.channel
    try:
        with channel.conn_or_acquire() as client:
            renew(client, list(channel.qos._delivered))
    except AWAY:
        log.debug("custody of messages was not renewed: Redis does not answer")


def _hand_back_after_grace(holds: Holds, pool: Any) -> None:
    def hand_back() -> None:
        # Of this worker: when the grace is over, its process may have another one.
        holds.stop_all()
        # Processes of a pool have steps of their own, and hear nothing of a stop.
        for child in getattr(getattr(pool, "_pool", None), "_pool", ()):
            with suppress(ProcessLookupError):
                os.kill(child.pid, _HAND_BACK)

    timer = threading.Timer(settings().grace, hand_back)
    timer.daemon = True
    timer.start()


def _hear_of_a_stop(process: Process) -> None:
    """In a process of a pool: hand its step back when the worker says so."""

    def hand_back() -> None:
        process.executor().holds.stop_all()

    # On a thread: what the signal interrupts may have the lock that this needs.
    signal.signal(_HAND_BACK, lambda *_: threading.Thread(target=hand_back, daemon=True).start())


def _warm(process: Process) -> None:
    """Make ready what acts need, now that the worker is, where the policy lets any happen."""
    executor = process.executor()
    if kinds := executor.policy.kinds:
        executor.loop.submit(executor.actors.warm(kinds))

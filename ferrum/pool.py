"""The pool that runs steps in a worker: threads that can become more or fewer while it runs, or Celery's processes."""

from __future__ import annotations

import logging
import os
from typing import Any

import click
from celery.apps.worker import Worker as CelerysWorker
from celery.concurrency import get_implementation
from celery.concurrency.prefork import TaskPool as Processes
from celery.concurrency.solo import TaskPool as Solo
from celery.concurrency.thread import TaskPool as CelerysThreads
from click.core import ParameterSource

from ferrum.errors import SettingsError


class Threads(CelerysThreads):  # type: ignore[misc] # Celery is untyped
    """Celery's threads, which `--autoscale` and `celery control pool_grow` can make more and fewer."""

    def grow(self, n: int = 1) -> None:
        self._resize(self.limit + n)

    def shrink(self, n: int = 1) -> None:
        # Threads that have nothing to do cost nothing; they only get nothing more to do.
        self._resize(max(1, self.limit - n))

    def _resize(self, limit: int) -> None:
        self.limit = self.executor._max_workers = limit


class Worker(CelerysWorker):  # type: ignore[misc]
    """Celery's worker, with the pool that was asked for."""

    def on_after_init(self, **options: Any) -> None:
        choose(self)
        # At `debug` a pool writes down all that a message holds, the input of a run among it.
        logging.getLogger("celery.pool").setLevel(logging.INFO)
        super().on_after_init(**options)


def choose(worker: Any) -> None:
    """Give this worker the pool that was asked for, and as many processes as there are processors if it is those.

    Celery takes `-P prefork`, its own default, for nothing said, and makes as many processes as we have threads.
    """
    asked = get_implementation(worker.pool_cls)
    if asked is CelerysThreads:
        asked = Threads
    elif asked is Threads and _said("pool"):
        asked = Processes
    worker.pool_cls = asked
    nothing_said = not _said("concurrency") and worker.concurrency == worker.app.conf.worker_concurrency
    if nothing_said and _is(asked, Processes):
        worker.concurrency = os.cpu_count() or 1


def _said(option: str) -> bool:
    """Tell whether `celery worker` was given this option."""
    context = click.get_current_context(silent=True)
    if context is None or context.command.name != "worker":
        return False
    return context.get_parameter_source(option) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def check(worker: Any) -> None:
    """Raises `SettingsError` for a pool that ferrum cannot run steps in."""
    module = getattr(worker.pool_cls, "__module__", "")
    if module.endswith(("eventlet", "gevent")):
        raise SettingsError(
            f"ferrum does not run in {module.rpartition('.')[2]}: say -P threads, -P processes or -P solo, or leave it"
        )
    if worker.options.get("autoscale") and _is(worker.pool_cls, Solo):
        raise SettingsError("--autoscale has nothing to scale with -P solo: say -P threads or -P processes")


def _is(pool: Any, kind: type) -> bool:
    return isinstance(pool, type) and issubclass(pool, kind)

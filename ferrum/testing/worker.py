"""A worker on a thread of this process: it starts in a fraction of a second, and a debugger reaches its steps."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from celery import _state, signals
from celery.contrib.testing.worker import start_worker
from celery.worker import state
from kombu.exceptions import OperationalError

from ferrum.celery import app, process
from ferrum.testing.environment import environment

#: Steps that run at the same time.
_CONCURRENCY = 16

#: How long what a stopping worker still runs may take to end.
_PATIENCE_S = 30.0


@contextmanager
def worker(imports: Iterable[str] = ()) -> Iterator[Any]:
    """A worker for all of ferrum's queues, for the length of a `with`; gives Celery's `WorkController`.

    `imports` are modules with tasks of one's own. When it ends, steps that still run are stopped and handed back, as
    by a worker that is asked to stop; their run is left as it is.
    """
    for module in imports:
        importlib.import_module(module)
    with _logs_left_alone(), _current_app_left_alone():
        try:
            with start_worker(
                app, pool="threads", concurrency=_CONCURRENCY, perform_ping_check=False, shutdown_timeout=_PATIENCE_S
            ) as started:
                # Warnings are pytest's to catch.
                logging.captureWarnings(False)
                try:
                    yield started
                finally:
                    _stop(started)
        finally:
            state.should_stop = None
            process.stop()


def _stop(started: Any) -> None:
    """Stop it warmly: `start_worker` would end it cold, and leave its sweeper and its threads running."""
    process.executor().holds.stop_all()
    state.should_stop = os.EX_OK
    # It looks once a second, and whenever a message comes; one that has expired asks for nothing.
    with suppress(OperationalError):
        app.send_task("ferrum.run", queue="ferrum", expires=0, ignore_result=True, retry=False)
    started.blueprint.join(_PATIENCE_S)


@contextmanager
def _logs_left_alone() -> Iterator[None]:
    """Keep Celery from taking over the root logger, which is pytest's here, and from leaving its level behind."""

    def nothing(**_: object) -> None:
        """That somebody listens is all that Celery looks at."""

    signals.setup_logging.connect(nothing, weak=False)
    try:
        with environment({"CELERY_LOG_LEVEL": None, "CELERY_LOG_FILE": None}):
            yield
    finally:
        signals.setup_logging.disconnect(nothing)


@contextmanager
def _current_app_left_alone() -> Iterator[None]:
    """Celery makes the app of a worker the current one; when it is over, the test's own is that again."""
    current, default = _state._tls.current_app, _state.default_app
    try:
        yield
    finally:
        _state._set_current_app(current)
        _state.set_default_app(default)

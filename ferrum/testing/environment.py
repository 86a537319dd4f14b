"""The environment that a test runs ferrum in: its own settings, a Redis of its own, and nothing of the machine's."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import redis

from ferrum.local.redis import celery_url

#: What remembers the environment once it was read, by module.
_CACHES = {
    "ferrum.settings": ("settings", "_secrets"),
    "ferrum.artifacts": ("process_artifacts",),
    "ferrum.runs": ("record",),
}

#: Connections of a Celery app that was sent to another Redis.
_LEFT: list[object] = []


@contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """This process's environment with these changes, for the length of a `with`; `None` takes a variable away.

    ferrum reads its settings anew when it begins and when it ends. A Celery app that was made for another Redis is
    sent to the one that `FERRUM_REDIS_URL` names.
    """
    before = {name: os.environ.get(name) for name in changes}
    _write(changes)
    try:
        yield
    finally:
        _write(before)


def nothing_of_the_machine() -> dict[str, str | None]:
    """The changes that take every setting of ferrum away."""
    return {name: None for name in os.environ if name.startswith("FERRUM_")}


def flush(url: str) -> None:
    """Leave nothing in a Redis."""
    with redis.Redis.from_url(url) as client:
        client.flushall()


def _write(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _forget()
    if url := changes.get("FERRUM_REDIS_URL"):
        _send_celery_to(celery_url(url))


def _forget() -> None:
    # Only what was imported can have read anything, and importing it for this would cost every test.
    for module, names in _CACHES.items():
        if loaded := sys.modules.get(module):
            for name in names:
                cached = getattr(loaded, name)
                if name == "record" and cached.cache_info().currsize:
                    cached().close_connections()
                cached.cache_clear()


def _send_celery_to(url: str) -> None:
    app = getattr(sys.modules.get("ferrum.celery"), "app", None)
    if app is None or app.conf.broker_read_url == url:
        return
    app.conf.update(broker_url=url, broker_read_url=url, broker_write_url=url, result_backend=url)
    # As after a fork: connections that others may be using are left to them, and new ones are made. The garbage
    # collector would close them, and warn of it in whatever test runs then.
    _LEFT.append((app._pool, app.amqp._producer_pool, app._backend_cache, app._local))
    app._after_fork()
    app._backend_cache = None
    app._local = threading.local()

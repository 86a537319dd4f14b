"""What every test may ask for: a Redis of its own test process, and workers on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from ferrum.local.redis import PrivateRedis

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    """A private Redis that all tests of one process share, one after the other; the front door is on it."""
    home = tmp_path_factory.mktemp("ferrum")
    with PrivateRedis(home) as server, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FERRUM_")]:
            patch.delenv(name)
        patch.setenv("FERRUM_REDIS_URL", server.url)
        patch.setenv("FERRUM_HOME", str(home))
        patch.setenv("FERRUM_ARTIFACTS", f"file://{home / 'artifacts'}")
        _forget_settings()
        yield server
        from ferrum.runs import record

        record().close_connections()
    _forget_settings()


def _forget_settings() -> None:
    from ferrum import runs, settings

    for cached in (settings.settings, settings._secrets, runs.record, runs.artifacts):
        cached.cache_clear()


@pytest.fixture(scope="session")
def redis_url(redis_server: PrivateRedis) -> str:
    return redis_server.url


@pytest.fixture
def clean_redis(redis_url: str) -> str:
    """The same URL, with nothing in it when the test begins."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


@pytest.fixture(scope="module")
def worker(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """One worker for the tests of a module; returns its `Fleet`."""
    from fleet import Fleet

    fleet = Fleet(redis_url, tmp_path_factory.mktemp("worker"))
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()

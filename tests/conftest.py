"""What every test may ask for: a Redis of its own test process, and workers on it."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from ferrum.local.redis import PrivateRedis
from ferrum.testing.environment import environment, flush, nothing_of_the_machine

sys.path.insert(0, str(Path(__file__).parent))

# Some machines have Python keep nothing of what it compiles: hundreds of processes would compile all that they import.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False

# The same examples each time: a run that fails is a change that broke something. `HYPOTHESIS_PROFILE=default` hunts.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


_PRELOADED = pytest.StashKey[object]()


def pytest_configure(config: pytest.Config) -> None:
    """In the one process of a run that the others come from."""
    if not hasattr(config, "workerinput"):
        from preloading import Server

        config.stash[_PRELOADED] = Server(Path(tempfile.mkdtemp(prefix="ferrum-tests-")))


def pytest_unconfigure(config: pytest.Config) -> None:
    if (server := config.stash.get(_PRELOADED, None)) is not None:
        server.stop()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """More than there are processors: tests wait for others most of their time."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    processors = len(os.sched_getaffinity(0))
    return processors + min(processors, 4)


class _Scheduling(LoadFileScheduling):
    """`--dist loadfile`: the tests of a file share a worker. Those of some files share none, and may run anywhere."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith(_APART) else str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    return _Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def redis_server(ferrum_redis_server: PrivateRedis) -> Iterator[PrivateRedis]:
    """The plugin's private Redis, with the front door on it for all tests of one process."""
    home = ferrum_redis_server.directory
    changes = {
        **nothing_of_the_machine(),
        "FERRUM_REDIS_URL": ferrum_redis_server.url,
        "FERRUM_HOME": str(home),
        "FERRUM_ARTIFACTS": f"file://{home / 'artifacts'}",
    }
    with environment(changes):
        yield ferrum_redis_server


@pytest.fixture(scope="session")
def redis_url(redis_server: PrivateRedis) -> str:
    return redis_server.url


@pytest.fixture
def clean_redis(redis_url: str) -> str:
    """The same URL, with nothing in it when the test begins."""
    flush(redis_url)
    return redis_url


@pytest.fixture(scope="session")
def postgres() -> Iterator[object]:
    """A PostgreSQL with pgvector for the tests of one process: a `Postgres`."""
    from postgres import CannotStart, Postgres

    try:
        server = Postgres().start()
    except CannotStart as reason:
        # In the summary of warnings, where nobody overlooks it; an error only there where PostgreSQL has to be.
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn(f"nothing was tested on PostgreSQL: {reason}", stacklevel=1)
        pytest.skip(f"no PostgreSQL: {reason}")
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def worker(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """One worker for the tests of a module, on a Redis with nothing in it; returns its `Fleet`."""
    from fleet import Fleet

    # Messages that killed workers of another file held would come back here, a lease later.
    flush(redis_url)
    fleet = Fleet(redis_url, tmp_path_factory.mktemp("worker"))
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture(scope="session")
def runtimes() -> Path:
    """Where the runtime `python-data` is: made of what `make setup` installed, once for all test processes and runs.

    Give it to what runs code as `FERRUM_RUNTIMES`.
    """
    # Here and not above: who runs no code needs none of this.
    from ferrum.sandbox import prepared
    from ferrum.sandbox.here import trial
    from ferrum.settings import Settings

    settings = Settings(runtimes=Path(__file__).parent.parent / ".state" / "runtimes")
    prepared.build("python-data", settings, trial=trial(settings))
    assert settings.runtimes is not None
    return settings.runtimes


#: Files whose tests take long begin first, so that none is still at it when all others are done.
_LONG = (
    "durability", "docs", "sandbox_attacks", "demo", "plugin", "docs_language", "sentinel_and_tls", "approvals",
    "broker", "cli", "failure", "example_data_analysis", "schedules", "language", "chaos", "partitions", "keeper",
    "worker", "sandbox_runtimes", "sandbox", "load", "models", "inside", "mcp_router", "examples_rag", "sandbox_killed",
    "local",
)  # fmt: skip


#: Long tests that share no worker with others of their file.
_APART = (
    "tests/test_docs.py::test_what_a_page_shows", "tests/test_demo.py", "tests/test_durability.py",
    "tests/test_plugin.py", "tests/test_sandbox_attacks.py::test_all_of_it_holds", "tests/test_sentinel_and_tls.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order of their length, by file; xdist gives them out in this order."""
    order = {f"test_{name}.py": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))

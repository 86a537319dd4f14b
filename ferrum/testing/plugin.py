"""The pytest plugin: workflows are tested whole, on a real Redis and real workers, with a scripted model.

pytest imports this wherever ferrum is installed, so nothing is imported here that a fixture can import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ferrum.local.redis import PrivateRedis
    from ferrum.testing.cluster import Cluster
    from ferrum.testing.model_server import ModelServer
    from ferrum.testing.script import Script

#: What a test may do where it says nothing else. A scripted server speaks for `openai/…` only, so that no test reaches,
#: and pays, another provider by accident.
_TESTS_ALLOW = {"allow": ["tool:*", "model:openai/*", "task:*"]}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "ferrum_script(script): what `model_server` answers: a file, seen from the test's own directory, or a mapping",
    )
    # Nothing that a test could change: Celery's Redis backend calls what redis-py has deprecated.
    config.addinivalue_line(
        "filterwarnings", "ignore:Call to deprecated setex:DeprecationWarning:celery.backends.redis"
    )


@pytest.fixture(scope="session")
def ferrum_redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    """The private Redis of this test session, which a test may `kill()` and `start()`; what it held is kept.

    With pytest-xdist, each of its processes has one.
    """
    from ferrum.local.redis import PrivateRedis

    with PrivateRedis(tmp_path_factory.mktemp("ferrum")) as server:
        yield server


@pytest.fixture
def ferrum_environ() -> Mapping[str, str]:
    """To override: settings (`FERRUM_…`) and other variables for the test and all of its workers."""
    return {}


@pytest.fixture(scope="session")
def ferrum_imports() -> Sequence[str]:
    """To override: modules with Celery tasks of your own, for the workers. Default: `FERRUM_IMPORTS`."""
    return [name for part in os.environ.get("FERRUM_IMPORTS", "").split(",") if (name := part.strip())]


@pytest.fixture
def ferrum_policy() -> Path | Mapping[str, Sequence[str]]:
    """To override: the policy, as a file or as its lists. Default: every tool, and every `openai/…` model."""
    return _TESTS_ALLOW


@pytest.fixture
def _ferrum_settings(
    ferrum_environ: Mapping[str, str],
    ferrum_imports: Sequence[str],
    ferrum_policy: Path | Mapping[str, Sequence[str]],
    tmp_path: Path,
) -> Iterator[None]:
    """The settings of a test: what its fixtures say, and nothing of the machine's."""
    from ferrum.local.trust import SERVERS
    from ferrum.testing.environment import environment, nothing_of_the_machine

    policy = ferrum_policy
    if not isinstance(policy, Path):
        policy = tmp_path / "test.policy.yaml"
        policy.write_text(json.dumps(ferrum_policy), encoding="utf-8")
    given: dict[str, str | None] = {
        "FERRUM_HOME": str(tmp_path / "ferrum"),
        "FERRUM_POLICY": str(policy),
        "FERRUM_IMPORTS": ",".join(ferrum_imports),
        # A test that calls no model does not pay for one, and one that does pays no more.
        "FERRUM_WARM": "false",
    }
    if SERVERS.exists():
        # Named, so that no one has to trust it: who runs the tests of a directory runs what is in it anyway.
        given["FERRUM_SERVERS"] = str(SERVERS.absolute())
    with environment({**nothing_of_the_machine(), **given, **ferrum_environ}):
        yield


@pytest.fixture
def ferrum_redis(_ferrum_settings: None, ferrum_redis_server: PrivateRedis) -> Iterator[str]:
    """The URL of a Redis that is empty when the test begins, and that `ferrum.submit` and all workers use."""
    from ferrum.testing.environment import environment, flush

    flush(ferrum_redis_server.url)
    with environment({"FERRUM_REDIS_URL": ferrum_redis_server.url}):
        yield ferrum_redis_server.url


@pytest.fixture
def model_script(request: pytest.FixtureRequest) -> Script | Path | str | Mapping[str, Any]:
    """To override: what `model_server` answers. Default: the mark `ferrum_script`, else what it was asked."""
    mark = request.node.get_closest_marker("ferrum_script")
    if mark is None:
        return {"default": {"reply": "You said: $last_message"}}
    script: Script | Path | str | Mapping[str, Any] = mark.args[0]
    return request.path.parent / script if isinstance(script, str | Path) else script


@pytest.fixture
def model_server(
    _ferrum_settings: None, ferrum_environ: Mapping[str, str], model_script: Script | Path | str | Mapping[str, Any]
) -> Iterator[ModelServer]:
    """The scripted model that this test's `openai/…` models are, and every `llm` step's that names none."""
    from ferrum.testing.environment import environment
    from ferrum.testing.model_server import ModelServer

    with ModelServer(model_script) as server:
        changes = {"FERRUM_MODEL": "openai/scripted", **server.environ, **ferrum_environ}
        with environment(changes):
            yield server


@pytest.fixture
def ferrum_worker(ferrum_redis: str, model_server: ModelServer, ferrum_imports: Sequence[str]) -> Iterator[Any]:
    """A worker on threads of this process, for all of ferrum's queues; Celery's `WorkController`.

    It comes with an empty Redis and a scripted model.
    """
    from ferrum.testing.worker import worker

    with worker(ferrum_imports) as started:
        yield started


@pytest.fixture
def ferrum_cluster(ferrum_redis: str, model_server: ModelServer, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Starts workers that are processes of their own, and may be killed: `ferrum_cluster(workers=2)`.

    Needs pytest-celery: `pip install 'ferrum[testing]'`. It comes with an empty Redis and a scripted model.
    """
    try:
        from ferrum.testing.cluster import Cluster
    except ModuleNotFoundError as error:
        pytest.fail(f"ferrum_cluster needs pytest-celery ({error}): pip install 'ferrum[testing]'", pytrace=False)

    with ExitStack() as stack:

        def start(workers: int = 1, *options: str) -> Cluster:
            cluster = Cluster(ferrum_redis, tmp_path / "workers")
            stack.callback(cluster.stop)
            cluster.start(workers, *options)
            return cluster

        yield start

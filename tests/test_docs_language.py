"""What the pages of the workflow language show is run, in a copy of `examples/`, all of it on one worker."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from fleet import Fleet
from test_docs import ALL, ROOT, Story

from ferrum.local.redis import PrivateRedis

PAGES = [
    "branches.md",
    "fan-out.md",
    "loops.md",
    "sub-workflows.md",
    "recovery.md",
    "waiting.md",
    "limits.md",
    "again.md",
]


@pytest.fixture(scope="module")
def checkout(redis_server: PrivateRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A directory that holds the examples, with a worker in it that has their tasks."""
    home = tmp_path_factory.mktemp("language")
    shutil.copytree(ROOT / "examples", home / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    environ = {
        "FERRUM_POLICY": "examples/ferrum.policy.yaml",
        "FERRUM_IMPORTS": "example_tasks",
        "PYTHONPATH": str(home / "examples"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NO_COLOR": "1",
        "LOGNAME": "ada",
    }
    fleet = Fleet(redis_server.url, home, environ)
    try:
        fleet.start()
        yield Story(home, fleet.environ)
    finally:
        fleet.stop()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_of_the_language_shows_works_and_prints_what_it_says(page: str, checkout: Story) -> None:
    checkout.tell([block for block in ALL if block.page == page])


def test_every_example_is_on_a_page() -> None:
    shown = {block.mark.removeprefix("example: ") for block in ALL if block.mark.startswith("example: ")}
    steps = {
        path.name for path in (ROOT / "examples").glob("*.yaml") if "\nsteps:\n" in path.read_text(encoding="utf-8")
    }
    assert steps - shown == {"repo_summary.yaml"}

"""All workers on one Redis keep what is large in one artifact store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fleet import PATIENCE_S, Fleet

from ferrum.artifacts import Artifacts
from ferrum.errors import Unavailable
from ferrum.record import Record


def test_one_store_is_the_same_wherever_it_is_mounted(clean_redis: str, tmp_path: Path) -> None:
    first, second = (Artifacts((tmp_path / name).as_uri()) for name in ("a", "b"))
    (tmp_path / "mounted").symlink_to(tmp_path / "a")
    again = Artifacts((tmp_path / "mounted").as_uri())
    assert first.identity == Artifacts(first.url).identity == again.identity != second.identity
    assert Artifacts("memory://").identity != Artifacts("s3://bucket/x").identity == "s3://bucket/x"
    record = Record(clean_redis)
    for name in ("one", "two"):
        record.beat(name, 60)
    assert record.other_store(first.identity, first.url, "one") is None
    assert record.other_store(again.identity, again.url, "two") is None
    assert record.other_store(second.identity, second.url, "two") == first.url
    record.gone("one")
    # Nobody else is there: the store was changed on purpose.
    assert record.other_store(second.identity, second.url, "two") is None
    record.beat("one", 60)
    assert record.other_store(first.identity, first.url, "one") == second.url
    # The worker of the next test is to find nobody.
    for name in ("one", "two"):
        record.gone(name)
    record.close_connections()


def test_a_store_that_cannot_be_marked_is_said_to_be_that(tmp_path: Path) -> None:
    store = Artifacts((tmp_path / "a").as_uri())
    (tmp_path / "a").rmdir()
    with pytest.raises(Unavailable, match=r"cannot use the artifact store file:///.*: No such file or directory"):
        _ = store.identity


def test_a_worker_with_another_store_does_not_start_beside_those_that_run(
    clean_redis: str, worker: Fleet, tmp_path: Path
) -> None:
    # The worker noted its store, and the test's clean Redis forgot it.
    record = Record(clean_redis)
    record.beat("theirs", 60)
    record.other_store("theirs", "file:///theirs", "theirs")
    other = (tmp_path / "other").as_uri()
    command = [sys.executable, "-W", "ignore", "-m", "ferrum.start_worker", "-l", "info"]
    said = subprocess.run(
        command, env={**worker.environ, "FERRUM_ARTIFACTS": other}, cwd=worker.home, capture_output=True, text=True,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert said.returncode == 1
    assert (
        f"this worker cannot start: its artifact store is {other}, and that of the other workers on this Redis is "
        "file:///theirs. Set FERRUM_ARTIFACTS to one store that all of them reach"
    ) in said.stderr + said.stdout
    record.gone("theirs")
    record.close_connections()

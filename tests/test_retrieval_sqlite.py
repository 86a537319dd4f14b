"""What only the embedded store has to care for: its files, and the vectors that it keeps in memory."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest

from ferrum.errors import NotFound, Unavailable
from ferrum.retrieval import Indexes, Original, sqlite
from ferrum.retrieval.sqlite import SqliteStore
from ferrum.retrieval.store import Chunk, Index, Source, Update, Vector, clauses


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path)


def created(store: SqliteStore, name: str = "docs") -> Index:
    made = f"idx_{time.monotonic_ns()}"
    one = Index(id=made, tenant="default", name=name, embedding="test", dimension=2, created_at=1.0)
    store.create(one)
    return one


X, Y = numpy.array([1, 0], numpy.float32), numpy.array([0, 1], numpy.float32)


def update(name: str, *pieces: tuple[str, Vector]) -> Update:
    chunks = [Chunk(text, text, f"digest of {text}", {"line": 1}, vector) for text, vector in pieces]
    return Update(Source(name, "1", "here", {}), chunks)


def near(store: SqliteStore, one: Index) -> set[str]:
    hits = store.by_vector(one, X, 1000)
    return {found.text for found in store.fetch(one, [hit.id for hit in hits])}


@pytest.mark.parametrize("remembered", [1000, 3])
def test_the_vectors_in_memory_keep_up_with_many_changes_also_of_another_process(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered: int
) -> None:
    monkeypatch.setattr(sqlite, "_REMEMBERED", remembered)
    one = created(store)
    # As another process has it: nothing is shared but the files.
    other = SqliteStore(tmp_path)
    expected: dict[str, str] = {}
    for round in range(80):
        writer = (store, other)[round % 2]
        name, text = f"s{round % 7}", f"t{round}"
        expected[name] = text
        writer.put(one, [update(name, (text, X), (f"{text} too", Y))])
        if round % 5 == 4:
            writer.remove(one, [f"s{round % 3}"])
            expected.pop(f"s{round % 3}", None)
        if round % 11 < 8:
            assert near(store, one) == {*expected.values(), *(f"{text} too" for text in expected.values())}
    other.close()


def test_a_search_that_began_before_a_change_is_not_disturbed_by_it(store: SqliteStore) -> None:
    one = created(store)
    store.put(one, [update(f"s{number}", (f"t{number}", X)) for number in range(50)])
    failed: list[BaseException] = []

    def search() -> None:
        try:
            for _ in range(100):
                hits = store.by_vector(one, X, 1000, clauses({"source": ["s0", "s1", "s2"]}))
                assert len(hits) == 3
                assert all(hit.score == pytest.approx(1) for hit in hits)
        except BaseException as error:  # noqa: BLE001 - it is told below
            failed.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for round in range(30):
        store.put(one, [update(f"s{number}", (f"t{number} of {round}", X)) for number in range(round % 9)])
    for thread in threads:
        thread.join()
    assert failed == []


def test_only_the_vectors_of_the_last_used_indexes_stay_in_memory(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_IN_MEMORY", 2)
    made = [created(store, f"i{number}") for number in range(4)]
    for one in made:
        store.put(one, [update("a", (one.name, X))])
    for one in [*made, *made]:
        assert near(store, one) == {one.name}
    assert len(store._matrices) == 2


def test_an_index_that_another_process_dropped_is_gone_here_too(store: SqliteStore, tmp_path: Path) -> None:
    one = created(store)
    store.put(one, [update("a", ("x", X))])
    other = SqliteStore(tmp_path)
    other.drop(other.describe("default", "docs"))
    new = created(other)
    with pytest.raises(NotFound, match="index 'docs' was dropped"):
        near(store, one)
    assert near(store, new) == set()
    assert len(list(tmp_path.glob("*/*.db"))) == 1
    other.close()


def test_who_waits_too_long_for_other_writers_is_told(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_PATIENCE_S", 0.05)
    one = created(store)
    (path,) = tmp_path.glob("*/*.db")
    with sqlite3.connect(path, isolation_level=None) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match=r"was in use by other writers for 0\.05 s: try again"):
            store.put(one, [update("a", ("x", X))])
        # Readers wait for nobody.
        assert near(store, one) == set()
    writer.close()


def test_a_full_disk_is_said_to_be_one_and_nothing_is_changed(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = created(store)
    store.put(one, [update("a", ("first", X))])
    store.close()
    connect = sqlite._connect

    def small(path: Path, *, immutable: bool) -> sqlite3.Connection:
        db = connect(path, immutable=immutable)
        # SQLite says of this what it says of a disk that is full.
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + 5}")
        return db

    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "_connect", small)
        with pytest.raises(Unavailable, match=r"index 'docs' .* has no room left: what was put into it before stays"):
            store.put(one, [update("a", *((f"word{number} " * 50, Y) for number in range(500)))])
        assert near(store, one) == {"first"}
        assert store.by_text(one, "word1", 5) == []
    store.close()
    store.put(one, [update("a", ("second", X))])
    assert near(store, one) == {"second"}


def test_a_damaged_file_is_said_to_be_one(store: SqliteStore, tmp_path: Path) -> None:
    one = created(store)
    store.put(one, [update("a", ("x", X))])
    store.close()
    (path,) = tmp_path.glob("*/*.db")
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(Unavailable, match=r"index 'docs' .* is damaged .*: restore the file, or drop"):
        store.counts(one)
    store.drop(one)
    assert list(tmp_path.glob("*/*.db*")) == []


_READ_ONLY = """
set -e
mount --bind "$1" "$1"
mount -o remount,ro,bind "$1"
shift
for asked in "$@"
do
    "$PYTHON" -m ferrum index $asked 2>&1 || echo "exit $?"
done
"""


def on_a_read_only_mount(folder: Path, *asked: str) -> str:
    """What `ferrum index` says to each of these; skips the test where nobody may mount."""
    mine = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*mine, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user may mount here")
    command = [*mine, _READ_ONLY, "sh", str(folder), *asked]
    environ = {"PYTHON": sys.executable, "FERRUM_INDEXES": f"file://{folder}", "FERRUM_TENANT": "default"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environ}).stdout


@pytest.mark.parametrize("writing", [False, True], ids=["alone", "beside a writer"])
def test_a_read_only_store_can_be_searched_and_says_what_it_is_when_it_is_to_change(
    tmp_path: Path, writing: bool
) -> None:
    folder = tmp_path / "indexes"
    indexes = Indexes(SqliteStore(folder))
    indexes.create("default", "docs", "lexical")
    asyncio.run(indexes.add("default", "docs", [Original("cats.md", "the cat purrs")]))
    if not writing:
        indexes.close()
    assert bool(list(folder.glob("*/*-wal"))) is writing
    searches = [f"search docs purrs --mode {mode}" for mode in ("vector", "text")]
    said = on_a_read_only_mount(folder, "list", *searches, "add docs .", "drop docs", "create new")
    listed, rest = said.split("\n", 1)
    assert listed.split()[:5] == ["docs", "1", "documents", "1", "chunks"]
    assert rest.count("cats.md:1\n       the cat purrs") == 2
    assert "cannot be changed, for its store is read-only" in rest
    assert rest.count("Read-only file system") == 2
    assert rest.count("exit ") == 3
    indexes.close()


def test_a_read_only_copy_of_what_a_writer_had_open_has_to_be_closed_where_it_can_be_written(
    store: SqliteStore, tmp_path: Path
) -> None:
    store.put(created(store), [update("a", ("x", X))])
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path, copy, symlinks=True, ignore=shutil.ignore_patterns("*-shm"))
    said = on_a_read_only_mount(copy, "list")
    assert said.startswith("index 'docs' (file")
    assert "read-only, and was not closed by who wrote it last: use it once where it can be written" in said
    copied = SqliteStore(copy)
    assert near(copied, copied.describe("default", "docs")) == {"x"}
    copied.close()


def test_a_file_that_changed_while_it_could_not_be_locked_is_not_trusted(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = created(store)
    store.close()
    (path,) = tmp_path.glob("*/*.db")

    def changed(db: sqlite3.Connection) -> Index:
        os.utime(path, ns=(1, 1))
        return one

    with in_which_nothing_can_be_written(monkeypatch):
        assert near(store, one) == set()
        with monkeypatch.context() as patch:
            patch.setattr(sqlite, "_pinned", changed)
            with pytest.raises(Unavailable, match="index 'docs' was changed while it was read: try again"):
                store.describe("default", "docs")
        assert store.describe("default", "docs") == one


@contextmanager
def in_which_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As root, permissions would not do."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        yield


def test_what_a_killed_creator_left_is_cleared_away_by_the_next(store: SqliteStore, tmp_path: Path) -> None:
    created(store, "one")
    (folder,) = tmp_path.iterdir()
    sqlite3.connect(folder / "idx_dead.db").close()
    (folder / "idx_dead.db").write_bytes(b"half")
    created(store, "two")
    assert not (folder / "idx_dead.db").exists()
    assert [one.name for one in store.indexes("default")] == ["one", "two"]

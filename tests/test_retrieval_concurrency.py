"""Many processes on one index, some of them killed: nothing is lost and nothing is torn."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from at_once import DIMENSION, PARTS, Crew, Work, direction, open_store, whole

from ferrum.retrieval.store import Index, Store, clauses

#: So many writers are killed, one after the other.
LIVES = 5


@pytest.fixture(params=["sqlite", "pgvector"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A kind of store, and where it is."""
    if request.param == "pgvector":
        return "pgvector", request.getfixturevalue("postgres").url
    return "sqlite", str(tmp_path / "indexes")


@pytest.fixture
def store(place: tuple[str, str]) -> Iterator[Store]:
    store = open_store(*place)
    yield store
    store.close()


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.end()


def new_index(store: Store) -> Index:
    index = Index(
        id=uuid.uuid4().hex, tenant="acme", name=uuid.uuid4().hex, embedding="e", dimension=None, created_at=1
    )
    store.create(index)
    return store.pin(index, DIMENSION)


def version_of(store: Store, index: Index, name: str) -> int:
    """The version of a document that is there, all of it."""
    hits = store.by_vector(index, direction(name), 100, clauses({"source": name}))
    texts = sorted(found.text for found in store.fetch(index, [hit.id for hit in hits]))
    version = int(texts[0].split()[2])
    assert texts == whole(name, version)
    return version


def test_what_killed_writers_had_put_is_there_and_whole_for_everybody_at_any_time(
    place: tuple[str, str], store: Store, crew: Crew, tmp_path: Path
) -> None:
    index = new_index(store)
    names = [f"doc{number}" for number in range(6)]
    killed, steady = names[:3], names[3:]
    end = tmp_path / "end"
    readers = [crew.start(Work("read", *place, index, names, until=str(end))) for _ in range(2)]
    other = crew.start(Work("write", *place, index, steady))

    version = 0
    for life in range(LIVES):
        writer = crew.start(Work("write", *place, index, killed, first=version + 1))
        # Killed at another place in its work each time: after some puts, and while the next one is under way.
        for _ in range(1 + life % 3):
            version = crew.hear(writer)
        version = [version, *crew.kill(writer)][-1]
        kept = {version_of(store, index, name) for name in killed}
        # All of a put or nothing of it: what it had said, or the next one, which it had not come to say.
        assert len(kept) == 1
        assert version <= min(kept) <= version + 1
        version = min(kept)
    crew.hear(other)
    crew.kill(other)
    end.touch()

    for reader in readers:
        seen, torn = crew.hear(reader)
        assert torn == []
        assert seen > 0
    assert len({version_of(store, index, name) for name in steady}) == 1
    counts = store.counts(index)
    assert (counts.sources, counts.chunks) == (6, 6 * PARTS)
    assert len(store.by_text(index, "version", 1000)) == 6 * PARTS


def test_writers_of_the_same_documents_leave_the_last_of_one_of_them(
    place: tuple[str, str], store: Store, crew: Crew
) -> None:
    index = new_index(store)
    names = ["doc0", "doc1"]
    writers = [crew.start(Work("write", *place, index, names, first=first)) for first in (1, 1000)]
    for writer in writers:
        for _ in range(5):
            crew.hear(writer)
    for writer in writers:
        crew.kill(writer)
    assert len({version_of(store, index, name) for name in names}) == 1
    assert store.counts(index).chunks == 2 * PARTS

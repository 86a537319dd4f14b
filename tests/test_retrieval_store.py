"""What every store promises, on real files; another store is one more line in `STORES`."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy
import pytest
from pydantic import JsonValue

from ferrum.errors import Conflict, NotFound, Unavailable
from ferrum.retrieval.sqlite import SqliteStore
from ferrum.retrieval.store import Chunk, Counts, Index, Source, Store, Update, Vector, clauses

STORES = ["sqlite"]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    match request.param:
        case "sqlite":
            opened: Store = SqliteStore(tmp_path / "indexes")
    yield opened
    opened.close()


def index(name: str = "docs", tenant: str = "default", embedding: str = "test", dimension: int | None = 3) -> Index:
    made = f"idx_{time.monotonic_ns()}"
    return Index(id=made, tenant=tenant, name=name, embedding=embedding, dimension=dimension, created_at=1.0)


def created(store: Store, **more: str) -> Index:
    one = index(**more)  # type: ignore[arg-type]
    store.create(one)
    return one


def unit(*numbers: float) -> Vector:
    vector = numpy.array(numbers, numpy.float32)
    return vector / numpy.linalg.norm(vector)


def chunk(text: str, vector: Vector | None = None) -> Chunk:
    return Chunk(text, text, f"digest of {text}", {"line": 1, "end_line": 1}, vector)


def update(
    name: str, *chunks: Chunk, metadata: Mapping[str, JsonValue] | None = None, origin: str = "here", digest: str = "1"
) -> Update:
    return Update(Source(name, digest, origin, metadata or {}), chunks)


def texts(store: Store, one: Index, hits: Sequence[object]) -> list[str]:
    return [found.text for found in store.fetch(one, [hit.id for hit in hits])]  # type: ignore[attr-defined]


def by_text(store: Store, one: Index, query: str, filter: Mapping[str, JsonValue] | None = None) -> list[str]:
    return texts(store, one, store.by_text(one, query, 10, clauses(filter or {})))


def near(store: Store, one: Index, vector: Vector, filter: Mapping[str, JsonValue] | None = None) -> list[str]:
    return texts(store, one, store.by_vector(one, vector, 10, clauses(filter or {})))


X, Y, Z = unit(1, 0, 0), unit(0, 1, 0), unit(0, 0, 1)


def test_an_index_is_what_it_was_created_as_until_it_is_dropped(store: Store) -> None:
    one = created(store, name="docs")
    created(store, name="code")
    assert store.describe("default", "docs") == one
    assert [found.name for found in store.indexes("default")] == ["code", "docs"]
    with pytest.raises(Conflict, match="'docs' is there already"):
        store.create(index("docs"))
    store.drop(one)
    assert [found.name for found in store.indexes("default")] == ["code"]
    with pytest.raises(NotFound, match="no index 'dogs'"):
        store.describe("default", "dogs")


def test_who_holds_a_dropped_index_neither_reads_nor_writes_the_one_that_came_after_it(store: Store) -> None:
    old = created(store)
    store.put(old, [update("a", chunk("old", X))])
    store.drop(old)
    new = created(store)
    for stale in (
        lambda: store.put(old, [update("b", chunk("late", X))]),
        lambda: store.by_text(old, "old", 5),
        lambda: store.by_vector(old, X, 5),
        lambda: store.sources(old),
        lambda: store.pin(old, 3),
        lambda: store.drop(old),
    ):
        with pytest.raises(NotFound):
            stale()
    assert store.counts(new) == Counts(0, 0)
    assert near(store, new, X) == []


def test_tenants_do_not_see_each_other_whatever_they_are_called(store: Store) -> None:
    names = ["default", "Default", "a/b", "../default", "..", ".", "a" * 100, "ünï", "%2e", "a b", "\n", "' OR"]
    for name in names:
        one = created(store, tenant=name)
        store.put(one, [update("a", chunk(f"of {names.index(name)}", X))])
    for name in names:
        (one,) = store.indexes(name)
        assert near(store, one, X) == [f"of {names.index(name)}"]
    store.drop(store.describe("..", "docs"))
    assert len(store.indexes("default")) == 1


def test_the_first_who_pins_a_dimension_decides_it(store: Store) -> None:
    one = index(dimension=None)
    store.create(one)
    assert store.pin(one, 3).dimension == 3
    assert store.pin(one, 4).dimension == 3
    assert store.describe("default", "docs").dimension == 3


def test_the_nearest_by_meaning_come_first(store: Store) -> None:
    one = created(store)
    store.put(one, [update("a", chunk("x", X), chunk("xy", unit(1, 1, 0))), update("b", chunk("-x", unit(-1, 0, 0)))])
    assert near(store, one, X) == ["x", "xy", "-x"]
    scores = [hit.score for hit in store.by_vector(one, X, 10)]
    assert scores == pytest.approx([1, 0.5**0.5, -1], abs=1e-6)
    assert len(store.by_vector(one, X, 2)) == 2


def test_words_are_found_in_any_form_and_nothing_in_a_query_is_syntax(store: Store) -> None:
    one = created(store)
    store.put(
        one,
        [
            update("a", chunk("Cats were running in the garden", X)),
            update("b", chunk("def parseHttpRequest(raw_body): ...", Y)),
            update("c", chunk("全文検索は便利です", Z)),
            update("d", chunk("Die Straße nach Köln", Z)),
        ],
    )
    assert by_text(store, one, "cat runs") == ["Cats were running in the garden"]
    assert by_text(store, one, "http") == by_text(store, one, "body") == ["def parseHttpRequest(raw_body): ..."]
    assert by_text(store, one, "検索") == ["全文検索は便利です"]
    assert by_text(store, one, "koln") == ["Die Straße nach Köln"]
    for odd in ['"', "AND", "NEAR(", "a* OR -b", "words:cat", "'; DROP TABLE chunk; --", "\0", "(", "^", "€", ""]:
        by_text(store, one, odd)
    assert by_text(store, one, 'the "cats" AND (NOT') == ["Cats were running in the garden"]


def test_the_rarer_word_counts_for_more(store: Store) -> None:
    one = created(store)
    common = [update(f"c{number}", chunk(f"a report about weather {number}", X)) for number in range(20)]
    store.put(one, [*common, update("rare", chunk("a report about volcanoes", Y))])
    hits = store.by_text(one, "report volcanoes", 5)
    assert texts(store, one, hits)[0] == "a report about volcanoes"
    assert hits == sorted(hits, key=lambda hit: -hit.score)
    assert all(hit.score >= 0 for hit in hits)


def test_a_source_that_is_put_again_consists_of_what_was_put_last(store: Store) -> None:
    one = created(store)
    store.put(one, [update("a", chunk("first", X), chunk("second", Y)), update("b", chunk("other", Z))])
    assert near(store, one, X)[0] == "first"
    store.put(one, [update("a", chunk("third", X), digest="2")])
    assert near(store, one, X) == ["third", "other"]
    assert by_text(store, one, "first second") == []
    assert store.counts(one) == Counts(2, 2)
    assert {name: source.digest for name, source in store.sources(one).items()} == {"a": "2", "b": "1"}
    store.remove(one, ["a", "never there"])
    assert near(store, one, X) == ["other"]
    store.put(one, [update("empty")])
    assert store.counts(one) == Counts(2, 1)


def test_the_ids_of_what_is_gone_find_nothing_and_are_not_given_again(store: Store) -> None:
    one = created(store)
    store.put(one, [update("a", chunk("first", X))])
    (old,) = store.by_vector(one, X, 1)
    store.put(one, [update("a", chunk("second", X))])
    (new,) = store.by_vector(one, X, 1)
    assert [found.text for found in store.fetch(one, [old.id, new.id])] == ["second"]


def test_a_put_that_fails_changes_nothing(store: Store) -> None:
    one = created(store)
    store.put(one, [update("a", chunk("first", X))])
    broken = update("b", chunk("fine", Y), Chunk("bad", "bad", "bad", {"line": object()}, Z))  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        store.put(one, [update("a", chunk("second", X)), broken])
    assert near(store, one, X) == ["first"]
    assert by_text(store, one, "second fine") == []


def test_filters_ask_for_metadata(store: Store) -> None:
    one = created(store)
    store.put(
        one,
        [
            update("a.md", chunk("word a", X), metadata={"team": "core", "year": 2024, "tags": ["x", "y"]}),
            update("b.md", chunk("word b", X), metadata={"team": "web", "year": 2025.0, "draft": True}),
            update("c.md", chunk("word c", X), metadata={"team": "core", "year": "2025", "none": None}),
        ],
    )
    for filter, expected in [
        ({"team": "core"}, ["word a", "word c"]),
        ({"team": ["core", "web"]}, ["word a", "word b", "word c"]),
        ({"team": "core", "year": 2024}, ["word a"]),
        ({"year": 2025}, ["word b"]),
        ({"year": "2025"}, ["word c"]),
        ({"tags": "y"}, ["word a"]),
        ({"draft": True}, ["word b"]),
        ({"draft": 1}, []),
        ({"none": None}, ["word c"]),
        ({"source": "b.md"}, ["word b"]),
        ({"team": []}, []),
        ({"colour": "red"}, []),
        ({"team' OR 1": "core"}, []),
    ]:
        assert sorted(near(store, one, X, filter)) == expected, filter  # type: ignore[arg-type]
        assert sorted(by_text(store, one, "word", filter)) == expected, filter  # type: ignore[arg-type]


def test_what_is_found_says_where_it_is_from(store: Store) -> None:
    one = created(store)
    piece = Chunk("text", "Title\ntext", "d", {"line": 3, "end_line": 4, "heading": ["Title"]}, X)
    store.put(one, [update("a.md", piece, metadata={"k": [1, "ü"]})])
    (hit,) = store.by_text(one, "title", 5)
    (found,) = store.fetch(one, [hit.id])
    assert (found.source, found.text, found.digest) == ("a.md", "text", "d")
    assert (found.position, found.metadata) == ({"line": 3, "end_line": 4, "heading": ["Title"]}, {"k": [1, "ü"]})
    assert found.vector is None
    (found,) = store.fetch(one, [hit.id], vectors=True)
    assert found.vector is not None
    assert found.vector.tolist() == X.tolist()


def test_vectors_that_are_there_are_given_back_by_digest(store: Store) -> None:
    one = created(store)
    store.put(one, [update("a", chunk("x", X), chunk("y", Y))])
    known = store.vectors(one, ["digest of x", "digest of z"])
    assert {digest: vector.tolist() for digest, vector in known.items()} == {"digest of x": X.tolist()}


def test_an_index_without_vectors_is_searched_by_words(store: Store) -> None:
    one = created(store, embedding="none")
    store.put(one, [update("a", chunk("only words"))])
    assert by_text(store, one, "word") == ["only words"]
    assert store.by_vector(one, X, 5) == []


def test_a_search_sees_what_was_committed_before_it_through_many_changes(store: Store) -> None:
    one = created(store)
    expected: dict[str, str] = {}
    for round in range(60):
        name, text = f"s{round % 7}", f"t{round}"
        expected[name] = text
        store.put(one, [update(name, chunk(text, X), chunk(f"{text} too", Y))])
        if round % 5 == 4:
            store.remove(one, [f"s{round % 3}"])
            expected.pop(f"s{round % 3}", None)
        found = {found.text for found in store.fetch(one, [hit.id for hit in store.by_vector(one, X, 100)])}
        assert found == {*expected.values(), *(f"{text} too" for text in expected.values())}


# The embedded store alone.


def test_a_damaged_file_is_said_to_be_one(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    one = created(store)
    store.put(one, [update("a", chunk("x", X))])
    store.close()
    (path,) = tmp_path.glob("*/*.db")
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(Unavailable, match=r"is damaged .*restore it, or drop the index"):
        store.counts(one)
    store.drop(one)
    assert list(tmp_path.glob("*/*.db*")) == []


def test_what_a_killed_creator_left_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    created(store, name="one")
    (folder,) = tmp_path.iterdir()
    sqlite3.connect(folder / "idx_dead.db").close()
    (folder / "idx_dead.db").write_bytes(b"half")
    created(store, name="two")
    assert not (folder / "idx_dead.db").exists()
    assert [one.name for one in store.indexes("default")] == ["one", "two"]

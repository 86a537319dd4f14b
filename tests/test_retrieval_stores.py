"""What every store promises, on each of them: a directory, a PostgreSQL with pgvector, and Qdrant.

The PostgreSQL is a real one. There is no Qdrant server in the package registries, so Qdrant's is the one that its own
client runs in this process for tests: the same requests, answered by Python.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from ferrum.errors import Conflict, NotFound, SettingsError
from ferrum.governance.acts import Search
from ferrum.retrieval.indexes import open_store as open_named
from ferrum.retrieval.search import find
from ferrum.retrieval.store import (
    TEXT_ONLY,
    Chunk,
    Index,
    Source,
    Store,
    Update,
    Vector,
    clauses,
)
from ferrum.settings import read, redact
from ferrum.settings import settings as ferrum_settings
from ferrum.testing.environment import environment

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")

KINDS = ["sqlite", "pgvector", "qdrant"]


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = open_store(request.param, request, tmp_path_factory)
    yield store
    store.close()


def open_store(kind: str, request: pytest.FixtureRequest, folders: pytest.TempPathFactory) -> Store:
    match kind:
        case "sqlite":
            from ferrum.retrieval.sqlite import SqliteStore

            return SqliteStore(folders.mktemp("indexes"))
        case "pgvector":
            from ferrum.retrieval.pgvector import PgvectorStore

            return PgvectorStore(request.getfixturevalue("postgres").url)
        case _:
            from ferrum.retrieval.qdrant import QdrantStore

            store = QdrantStore(":memory:")
            store._opened = OneAtATime(store._open())  # type: ignore[assignment]
            return store


class OneAtATime:
    """Qdrant's client in this process, which two threads break that use it at once: as a server it takes turns."""

    def __init__(self, client: object) -> None:
        self._client = client
        self._turn = threading.Lock()

    def __getattr__(self, name: str) -> object:
        def call(*args: object, **options: object) -> object:
            with self._turn:
                return getattr(self._client, name)(*args, **options)

        return call


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "opened" in metafunc.fixturenames:
        metafunc.parametrize("opened", KINDS, indirect=True)


@pytest.fixture
def store(opened: Store) -> Store:
    return opened


def new_index(store: Store, *, tenant: str = "acme", dimension: int | None = 4, embedding: str = "some") -> Index:
    name = f"index-{uuid.uuid4().hex[:8]}"
    index = Index(
        id=uuid.uuid4().hex, tenant=tenant, name=name, embedding=embedding, dimension=None, created_at=1700000000.5
    )
    store.create(index)
    return store.pin(index, dimension) if dimension else index


def unit(*numbers: float) -> Vector:
    vector = np.array(numbers, dtype=np.float32)
    length = np.linalg.norm(vector)
    return vector / length if length else vector


def piece(text: str, vector: Vector | None = None, **position: JsonValue) -> Chunk:
    return Chunk(text, text, hashlib.sha256(text.encode()).hexdigest(), {"line": 1, **position}, vector)


def update(name: str, *chunks: Chunk, metadata: Mapping[str, JsonValue] | None = None, origin: str = "docs") -> Update:
    digest = hashlib.sha256("".join(chunk.digest for chunk in chunks).encode()).hexdigest()
    return Update(Source(name, digest, origin, metadata or {}), chunks)


def words(store: Store, index: Index, query: str, limit: int = 10, **filter: JsonValue) -> list[str]:
    hits = store.by_text(index, query, limit, clauses(filter))
    return [found.text for found in store.fetch(index, [hit.id for hit in hits])]


def near(store: Store, index: Index, vector: Vector, limit: int = 10, **filter: JsonValue) -> list[str]:
    hits = store.by_vector(index, vector, limit, clauses(filter))
    return [found.text for found in store.fetch(index, [hit.id for hit in hits])]


EAST, NORTH, UP = unit(1, 0, 0, 0), unit(0, 1, 0, 0), unit(0, 0, 1, 0)


# Indexes.


def test_an_index_is_described_as_it_was_made_and_listed_by_name(store: Store) -> None:
    indexes = [new_index(store, tenant="lister") for _ in range(3)]
    assert [store.describe("lister", index.name) for index in indexes] == indexes
    assert store.indexes("lister") == sorted(indexes, key=lambda index: index.name)


def test_a_second_index_of_the_same_name_is_a_conflict(store: Store) -> None:
    index = new_index(store)
    with pytest.raises(Conflict, match=index.name):
        store.create(index.model_copy(update={"id": uuid.uuid4().hex}))
    assert store.describe("acme", index.name) == index


def test_of_those_that_create_one_at_once_one_wins(store: Store) -> None:
    made = []

    def create(number: int) -> None:
        index = Index(id=uuid.uuid4().hex, tenant="race", name="same", embedding="e", dimension=None, created_at=number)
        try:
            store.create(index)
        except Conflict:
            return
        made.append(index)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(create, range(4)))
    assert store.indexes("race") == made
    assert len(made) == 1


def test_an_unknown_index_is_not_found_and_the_nearest_name_is_said(store: Store) -> None:
    index = new_index(store, tenant="mistyper")
    with pytest.raises(NotFound, match=f"did you mean '{index.name}'"):
        store.describe("mistyper", index.name + "x")


def test_the_first_dimension_that_is_pinned_stays(store: Store) -> None:
    index = new_index(store, dimension=None)
    assert store.pin(index, 4).dimension == 4
    assert store.pin(index, 8).dimension == 4
    assert store.describe("acme", index.name).dimension == 4


def test_tenants_have_indexes_of_the_same_name_and_never_see_each_others(store: Store) -> None:
    mine = new_index(store, tenant="ada")
    theirs = mine.model_copy(update={"id": uuid.uuid4().hex, "tenant": "eve", "dimension": None})
    store.create(theirs)
    theirs = store.pin(theirs, 4)
    store.put(mine, [update("a.md", piece("the secret of ada", EAST))])
    store.put(theirs, [update("a.md", piece("what eve wrote", EAST))])
    assert near(store, mine, EAST) == ["the secret of ada"]
    assert near(store, theirs, EAST) == ["what eve wrote"]
    assert words(store, theirs, "secret") == []
    [hit] = store.by_vector(mine, EAST, 1)
    assert all(found.text != "the secret of ada" for found in store.fetch(theirs, [hit.id]))
    assert store.vectors(theirs, [piece("the secret of ada").digest]) == {}
    store.drop(theirs)
    assert near(store, mine, EAST) == ["the secret of ada"]
    assert [index.tenant for index in store.indexes("eve")] == []


def test_tenants_may_be_called_anything(store: Store) -> None:
    tenants = ["default", "Default", "a/b", "../default", "..", ".", "a" * 100, "ünï", "%2e", "a b", "' OR"]
    for tenant in tenants:
        index = Index(id=uuid.uuid4().hex, tenant=tenant, name="docs", embedding="e", dimension=4, created_at=1)
        store.create(index)
        store.put(index, [update("a.md", piece(f"of {tenant}", EAST))])
    for tenant in tenants:
        [index] = store.indexes(tenant)
        assert near(store, index, EAST) == [f"of {tenant}"]
        store.drop(index)


def test_who_knows_another_tenants_index_by_its_id_gets_nothing(store: Store) -> None:
    mine = new_index(store, tenant="ada")
    store.put(mine, [update("a.md", piece("the secret of ada", EAST))])
    forged = mine.model_copy(update={"tenant": "eve"})
    for ask in asks(store, forged):
        with pytest.raises(NotFound):
            ask()
    assert near(store, mine, EAST) == ["the secret of ada"]


def test_a_dropped_index_is_not_found_by_any_call(store: Store) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("one", EAST))])
    store.drop(index)
    for ask in asks(store, index):
        with pytest.raises(NotFound):
            ask()


def test_an_index_that_took_a_dropped_ones_name_is_another_one(store: Store) -> None:
    old = new_index(store)
    store.put(old, [update("a.md", piece("old", EAST))])
    store.drop(old)
    new = old.model_copy(update={"id": uuid.uuid4().hex, "dimension": None})
    store.create(new)
    new = store.pin(new, 4)
    with pytest.raises(NotFound):
        store.put(old, [update("a.md", piece("late", EAST))])
    with pytest.raises(NotFound):
        store.by_vector(old, EAST, 5)
    with pytest.raises(NotFound):
        store.drop(old)
    assert store.counts(new).chunks == 0


def asks(store: Store, index: Index) -> list[Callable[[], object]]:
    """Every call that takes an index."""
    return [
        lambda: store.pin(index, 4),
        lambda: store.put(index, [update("b.md", piece("two", EAST))]),
        lambda: store.put(index, []),
        lambda: store.remove(index, ["a.md"]),
        lambda: store.sources(index),
        lambda: store.vectors(index, ["0"]),
        lambda: store.by_vector(index, EAST, 5),
        lambda: store.by_text(index, "one", 5),
        lambda: store.fetch(index, []),
        lambda: store.counts(index),
        lambda: store.drop(index),
    ]


# What is in them.


def test_a_chunk_comes_back_with_all_that_is_known_of_it(store: Store) -> None:
    index = new_index(store)
    metadata: dict[str, JsonValue] = {"lang": "en", "year": 1787, "tags": ["a", "b"], "draft": False, "owner": None}
    chunk = Chunk("text", "Heading\ntext", "d1", {"line": 3, "end_line": 9, "heading": ["A", "B"]}, unit(1, 1, 0, 0))
    store.put(index, [update("a.md", chunk, metadata=metadata)])
    [hit] = store.by_vector(index, EAST, 5)
    assert hit.score == pytest.approx(2**-0.5, abs=1e-5)
    [found] = store.fetch(index, [hit.id], vectors=True)
    assert (found.id, found.source, found.text, found.digest) == (hit.id, "a.md", "text", "d1")
    assert (found.position, found.metadata) == (chunk.position, metadata)
    assert found.vector is not None
    np.testing.assert_allclose(found.vector, unit(1, 1, 0, 0), atol=1e-6)
    assert found.vector.dtype == np.float32
    [bare] = store.fetch(index, [hit.id])
    assert bare.vector is None


def test_a_source_consists_of_what_was_put_last(store: Store) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("one", EAST), piece("two", NORTH)), update("b.md", piece("three", UP))])
    [hit, *_] = store.by_vector(index, NORTH, 1)
    store.put(index, [update("a.md", piece("two again", NORTH), metadata={"v": 2}, origin="elsewhere")])
    assert sorted(near(store, index, EAST)) == ["three", "two again"]
    assert words(store, index, "one two three") in (["three", "two again"], ["two again", "three"])
    assert store.fetch(index, [hit.id]) == []
    assert store.counts(index).chunks == 2
    source = store.sources(index)["a.md"]
    assert (source.metadata, source.origin) == ({"v": 2}, "elsewhere")


def test_a_put_that_fails_changes_nothing(store: Store) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("first", EAST))])
    broken = Chunk("bad", "bad", "bad", {"line": object()}, EAST)  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        store.put(index, [update("a.md", piece("second", EAST)), update("b.md", piece("fine", EAST), broken)])
    assert near(store, index, EAST) == ["first"]
    assert words(store, index, "second fine") == []


def test_a_filter_sees_the_metadata_of_the_last_put(store: Store) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("one", EAST), metadata={"v": 1})])
    store.put(index, [update("a.md", piece("one", EAST), metadata={"v": 2})])
    assert near(store, index, EAST, v=1) == []
    assert near(store, index, EAST, v=2) == ["one"]


def test_an_empty_document_is_kept_as_a_source(store: Store) -> None:
    index = new_index(store)
    store.put(index, [update("empty.md")])
    assert list(store.sources(index)) == ["empty.md"]
    assert (store.counts(index).sources, store.counts(index).chunks) == (1, 0)


def test_an_empty_document_can_be_there_before_any_vector_is(store: Store) -> None:
    index = new_index(store, dimension=None)
    store.put(index, [update("empty.md")])
    assert list(store.sources(index)) == ["empty.md"]
    assert store.by_vector(index, EAST, 5) == []
    assert store.by_text(index, "word", 5) == []
    assert store.vectors(index, ["0"]) == {}
    assert store.fetch(index, []) == []
    store.remove(index, ["empty.md"])
    assert store.counts(index).sources == 0


def test_removed_sources_are_gone_and_unknown_names_do_no_harm(store: Store) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("one", EAST)), update("b.md", piece("two", NORTH))])
    store.remove(index, ["a.md", "never.md"])
    store.remove(index, [])
    assert list(store.sources(index)) == ["b.md"]
    assert near(store, index, EAST) == ["two"]
    assert words(store, index, "one") == []
    assert (store.counts(index).sources, store.counts(index).chunks) == (1, 1)


def test_vectors_are_given_back_by_what_they_were_made_from(store: Store) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("same", EAST)), update("b.md", piece("same", EAST), piece("x", UP))])
    same, x, none = (piece(text).digest for text in ("same", "x", "unknown"))
    found = store.vectors(index, [same, x, none])
    assert set(found) == {same, x}
    np.testing.assert_allclose(found[same], EAST)
    assert store.vectors(index, []) == {}


def test_chunks_are_fetched_in_the_order_asked_for(store: Store) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", *(piece(f"piece {number}", EAST) for number in range(5)))])
    ids = [hit.id for hit in store.by_text(index, "piece", 5)]
    assert len(set(ids)) == 5
    assert [found.id for found in store.fetch(index, ids)] == ids
    assert [found.id for found in store.fetch(index, ids[::-1])] == ids[::-1]
    assert store.fetch(index, []) == []


def test_an_index_without_vectors_is_searched_by_words(store: Store) -> None:
    index = new_index(store, dimension=None, embedding=TEXT_ONLY)
    store.put(index, [update("a.md", piece("words alone"))])
    assert words(store, index, "alone") == ["words alone"]
    assert store.by_vector(index, EAST, 5) == []
    [hit] = store.by_text(index, "alone", 5)
    assert [found.vector for found in store.fetch(index, [hit.id], vectors=True)] == [None]


@pytest.mark.parametrize(
    "text", ["nul \0 in it", "substitute \x1a \x1a0 in it", "'; DROP TABLE x; --", "%s {} {{a}} :x"]
)
def test_any_text_and_any_name_comes_back_as_it_was(store: Store, text: str) -> None:
    index = new_index(store)
    name = f"{text} {'long' * 1000}.md"
    chunk = Chunk(text, text, "d", {"heading": text}, EAST)
    store.put(index, [update(name, chunk, metadata={text: text, "long": "x" * 5000}, origin=text)])
    [found] = store.fetch(index, [hit.id for hit in store.by_vector(index, EAST, 5)])
    assert (found.source, found.text, found.position["heading"]) == (name, text, text)
    assert found.metadata[text] == text
    assert store.sources(index)[name].origin == text
    assert near(store, index, EAST, long="x" * 5000, **{text: text}) == [text]
    assert near(store, index, EAST, source=name) == [text]
    store.remove(index, [name])
    assert store.counts(index).sources == 0


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
def test_a_search_finds_as_many_texts_as_it_asks_for_however_many_sources_have_the_first(
    store: Store, mode: Literal["hybrid", "vector", "text"]
) -> None:
    index = new_index(store)
    copies = [update(f"{number}.md", piece("word word", EAST)) for number in range(250)]
    others = [update(f"other{number}.md", piece(f"word {number}", unit(1, 1, 0, number))) for number in range(4)]
    store.put(index, [*copies, *others])
    asked = Search(index=index.name, query="word", mode=mode, top_k=4)
    found = find(store, index, asked, EAST if mode != "text" else None).documents
    assert [one.text for one in found][:1] == ["word word"]
    assert len({one.text for one in found}) == len(found) == 4


# Searching by meaning.


def test_the_nearest_come_first(store: Store) -> None:
    index = new_index(store)
    chunks = [piece("east", EAST), piece("northeast", unit(1, 1, 0, 0)), piece("west", unit(-1, 0, 0, 0))]
    store.put(index, [update("a.md", *chunks)])
    hits = store.by_vector(index, EAST, 3)
    assert [round(hit.score, 3) for hit in hits] == [1.0, 0.707, -1.0]
    assert near(store, index, EAST, 2) == ["east", "northeast"]


def test_a_text_of_which_nothing_can_be_said_is_near_to_nothing(store: Store) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("blank", unit(0, 0, 0, 0)), piece("east", EAST))])
    assert near(store, index, EAST)[0] == "east"
    assert all(hit.score == 0 for hit in store.by_vector(index, unit(0, 0, 0, 0), 5))


@pytest.mark.parametrize("clustered", [False, True], ids=["anywhere", "in clusters"])
def test_what_is_found_is_what_comparing_with_all_finds(store: Store, clustered: bool) -> None:
    random = np.random.default_rng(7)
    index = new_index(store, dimension=48)
    vectors = random.standard_normal((600, 48))
    if clustered:
        vectors = random.standard_normal((30, 48))[random.integers(30, size=600)] + 0.3 * vectors
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    chunks = [piece(str(number), vector) for number, vector in enumerate(vectors)]
    store.put(index, [update(f"{start}.md", *chunks[start : start + 100]) for start in range(0, 600, 100)])
    found = 0
    for query in vectors[:20] + 0.1 * random.standard_normal((20, 48)).astype(np.float32):
        exact = {str(number) for number in np.argsort(-(vectors @ query))[:10]}
        found += len(exact & set(near(store, index, query, 10)))
    assert found == 200


# Searching for words.


def test_words_are_found_whatever_their_case_their_accents_and_what_is_around_them(store: Store) -> None:
    index = new_index(store, dimension=None, embedding=TEXT_ONLY)
    store.put(
        index, [update("a.md", piece("Der Übermut (os.path.join) tut_selten gut.")), update("b.md", piece("other"))]
    )
    for query in ["ubermut", "ÜBERMUT!", "what is os.path.join?", "selten", '"gut"']:
        assert words(store, index, query) == ["Der Übermut (os.path.join) tut_selten gut."]


def test_other_endings_make_no_other_word(store: Store) -> None:
    index = new_index(store, dimension=None, embedding=TEXT_ONLY)
    store.put(index, [update("a.md", piece("two parsers")), update("b.md", piece("lexing a text"))])
    assert words(store, index, "parser") == ["two parsers"]
    assert words(store, index, "lexes") == ["lexing a text"]


def test_the_parts_of_a_name_and_of_a_text_without_spaces_are_words(store: Store) -> None:
    index = new_index(store, dimension=None, embedding=TEXT_ONLY)
    store.put(
        index, [update("a.md", piece("def parseHttpRequest(raw_body)")), update("b.md", piece("全文検索は便利です"))]
    )
    assert words(store, index, "http") == words(store, index, "bodies") == ["def parseHttpRequest(raw_body)"]
    assert words(store, index, "検索") == ["全文検索は便利です"]


def test_a_rare_word_weighs_more_than_a_common_one(store: Store) -> None:
    index = new_index(store, dimension=None, embedding=TEXT_ONLY)
    common = [update(f"{number}.md", piece(f"the usual thing {number}")) for number in range(20)]
    store.put(index, [*common, update("rare.md", piece("an axolotl"))])
    assert words(store, index, "the usual axolotl", 1) == ["an axolotl"]


def test_more_of_a_word_and_less_around_it_weighs_more(store: Store) -> None:
    index = new_index(store, dimension=None, embedding=TEXT_ONLY)
    store.put(index, [
        update("often.md", piece("fox and fox and fox")),
        update("once.md", piece("a fox is here")),
        update("lost.md", piece("a fox is here" + " somewhere among a hundred words" * 20)),
        update("none.md", piece("a wolf")),
    ])  # fmt: skip
    assert [text[:9] for text in words(store, index, "fox")] == ["fox and f", "a fox is ", "a fox is "]
    assert len(words(store, index, "fox", 2)[1]) < 20


@pytest.mark.parametrize(
    "query", ["", "   ", "?!", "\0", "AND OR NOT", "a:* & (b | !c) <-> 'd", '"unclosed', "NEAR(x, 3)"]
)
def test_nothing_in_a_query_is_syntax(store: Store, query: str) -> None:
    index = new_index(store, dimension=None, embedding=TEXT_ONLY)
    store.put(index, [update("a.md", piece("nothing of that"))])
    assert words(store, index, query) == []


# Filters.


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({"lang": "en"}, ["one", "two"]),
        ({"lang": ["en", "de"]}, ["one", "three", "two"]),
        ({"lang": "en", "year": 2024}, ["two"]),
        ({"year": 2024.0}, ["three", "two"]),
        ({"year": "2024"}, []),
        ({"draft": True}, ["one"]),
        ({"draft": 1}, []),
        ({"owner": None}, ["three"]),
        ({"tags": "b"}, ["one", "two"]),
        ({"source": "c.md"}, ["three"]),
        ({"unknown": "x"}, []),
        ({"lang": []}, []),
    ],
)
def test_a_filter_lets_through_what_has_all_that_it_names(
    store: Store, filter: dict[str, JsonValue], expected: Sequence[str]
) -> None:
    index = new_index(store)
    store.put(index, [
        update("a.md", piece("one", EAST), metadata={"lang": "en", "year": 2023, "draft": True, "tags": ["a", "b"]}),
        update("b.md", piece("two", EAST), metadata={"lang": "en", "year": 2024, "draft": False, "tags": ["b"]}),
        update("c.md", piece("three", EAST), metadata={"lang": "de", "year": 2024, "owner": None}),
    ])  # fmt: skip
    assert sorted(near(store, index, EAST, **filter)) == list(expected)
    assert sorted(words(store, index, "one two three", **filter)) == list(expected)


def test_a_filter_that_few_pass_still_finds_all_of_them(store: Store) -> None:
    random = np.random.default_rng(3)
    index = new_index(store, dimension=16)
    rows = random.standard_normal((600, 16)).astype(np.float32)
    store.put(index, [
        update(f"{number}.md", piece(f"piece {number}", unit(*row)), metadata={"rare": number % 100 == 0})
        for number, row in enumerate(rows)
    ])  # fmt: skip
    assert len(near(store, index, unit(*rows[0]), 10, rare=True)) == 6
    assert near(store, index, unit(*rows[0]), 1, rare=True) == ["piece 0"]


# Many at once.


def test_writers_of_the_same_sources_leave_one_of_their_states_whole(store: Store) -> None:
    index = new_index(store)
    names = [f"{number}.md" for number in range(4)]
    barrier = threading.Barrier(3)

    def write(writer: int) -> None:
        for turn in range(4):
            barrier.wait(30)
            order = names if writer % 2 else names[::-1]
            pieces = [piece(f"{writer} {turn} {part}", EAST) for part in range(1 + writer)]
            store.put(index, [update(name, *pieces) for name in order])

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(write, range(3)))
    hits = store.by_vector(index, EAST, 100)
    by_source: dict[str, list[str]] = {}
    for found in store.fetch(index, [hit.id for hit in hits]):
        by_source.setdefault(found.source, []).append(found.text)
    assert sorted(by_source) == names
    for texts in by_source.values():
        writers = {text[0] for text in texts}
        assert len(writers) == 1
        assert len(texts) == 1 + int(writers.pop())
    assert store.counts(index).chunks == len(hits)


unhurried = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
changes = st.lists(
    st.tuples(st.sampled_from("abc"), st.none() | st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=8
)


@unhurried
@given(changes=changes)
def test_after_any_changes_the_index_holds_what_a_dict_would(
    store: Store, changes: list[tuple[str, list[int] | None]]
) -> None:
    index = new_index(store)
    kept: dict[str, list[int]] = {}
    for name, numbers in changes:
        if numbers is None:
            store.remove(index, [name])
            kept.pop(name, None)
        else:
            store.put(index, [update(name, *(piece(f"word{number}", EAST) for number in numbers))])
            kept[name] = numbers
    expected = sorted(f"word{number}" for numbers in kept.values() for number in numbers)
    assert sorted(near(store, index, EAST, 100)) == expected
    assert sorted(words(store, index, "word0 word1 word2 word3 word4 word5", 100)) == expected
    assert set(store.sources(index)) == set(kept)
    counts = store.counts(index)
    assert (counts.sources, counts.chunks) == (len(kept), len(expected))
    store.drop(index)


# Which one it is.


@pytest.mark.parametrize(
    ("url", "kind", "address"),
    [
        ("postgresql://ada:pw@db/ferrum", "PgvectorStore", "postgresql://ada:pw@db/ferrum"),
        ("qdrant+https://:a%2Fb@qdrant.example:6333", "QdrantStore", "https://qdrant.example:6333"),
        ("qdrant+http://localhost:6333/prefix", "QdrantStore", "http://localhost:6333/prefix"),
    ],
)
def test_the_settings_name_the_store(url: str, kind: str, address: str) -> None:
    store = open_named(read({"FERRUM_INDEXES": url}))
    assert (type(store).__name__, store._url) == (kind, address)  # type: ignore[attr-defined]
    assert getattr(store, "_api_key", None) == ("a/b" if "a%2Fb" in url else None)


def test_a_url_of_no_store_is_refused_without_its_password() -> None:
    for url in ("mysql://ada:pw12345@db/x", "qdrant+http://", "file://host/x"):
        with pytest.raises(SettingsError, match="is not the URL of a store") as caught:
            open_named(read({"FERRUM_INDEXES": url}))
        assert "pw12345" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "extra"), [("postgresql://ada@db/x", "pgvector"), ("qdrant+http://localhost", "qdrant")]
)
def test_a_store_that_is_not_installed_says_how_to(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=rf"pip install 'ferrum\[{extra}\]'"):
        open_named(read({"FERRUM_INDEXES": url}))


def test_the_password_of_the_indexes_is_a_secret() -> None:
    with environment({"FERRUM_INDEXES": "postgresql://ada:pw12345@db/x"}):
        assert redact("it says pw12345") == "it says ***"
        assert "pw12345" not in repr(ferrum_settings())

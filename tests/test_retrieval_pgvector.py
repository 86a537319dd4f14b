"""What only the PostgreSQL store can get wrong: connections, passwords, rights, versions."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psycopg
import pytest
from postgres import PASSWORD, Postgres
from test_retrieval_stores import EAST, near, new_index, piece, update, words

from ferrum.errors import NotFound, SettingsError, Unavailable
from ferrum.retrieval import pgvector
from ferrum.retrieval.pgvector import PgvectorStore
from ferrum.retrieval.store import Index


@pytest.fixture
def database(postgres: Postgres) -> Iterator[str]:
    """The URL of a new database, with nothing in it."""
    name = f"db_{uuid.uuid4().hex}"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield postgres.url.replace("/ferrum?", f"/{name}?")
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def store(database: str) -> Iterator[PgvectorStore]:
    store = PgvectorStore(database)
    yield store
    store.close()


def run(database: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(database, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


# Connections.


def test_a_server_that_is_not_there_is_named_and_the_password_is_not(tmp_path: Path) -> None:
    store = PgvectorStore(f"postgresql://ada:{PASSWORD}@/ferrum?host={tmp_path}")
    with pytest.raises(Unavailable, match=f"PostgreSQL 'ferrum' at {tmp_path}:5432") as caught:
        store.indexes("acme")
    assert PASSWORD not in str(caught.value)


def test_a_wrong_password_is_refused_and_not_shown(postgres: Postgres) -> None:
    store = PgvectorStore(postgres.url.replace(PASSWORD, "wrong-one"))
    with pytest.raises(Unavailable, match="password authentication failed") as caught:
        store.indexes("acme")
    assert "wrong-one" not in str(caught.value)


def test_what_is_no_address_of_a_server_is_said_without_quoting_it() -> None:
    with pytest.raises(SettingsError, match="postgresql://user:password@host/database") as caught:
        PgvectorStore(f"ada {PASSWORD}")
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_password_in_what_the_server_says_is_hidden(postgres: Postgres) -> None:
    store = PgvectorStore(postgres.url.replace("/ferrum?", f"/{PASSWORD}-there-is-none?"))
    with pytest.raises(Unavailable, match=r"\*\*\*-there-is-none") as caught:
        store.indexes("acme")
    assert PASSWORD not in str(caught.value)


def test_many_threads_share_few_connections(database: str) -> None:
    store = PgvectorStore(database, connections=2)
    index = new_index(store)
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda n: store.put(index, [update(f"{n}.md", piece(f"piece {n}", EAST))]), range(24)))
    [(connections,)] = run(
        database,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'ferrum'",
    )
    assert connections == 2
    assert len(near(store, index, EAST, 50)) == 24
    store.close()


@pytest.mark.usefixtures("postgres")
def test_it_goes_on_after_the_server_was_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Postgres().start()
    try:
        store = PgvectorStore(server.url)
        index = new_index(store)
        store.put(index, [update("a.md", piece("kept", EAST))])
        server.restart()
        assert near(store, index, EAST) == ["kept"]
        server.kill()
        monkeypatch.setattr(pgvector, "_TIMEOUT_S", 0.5)
        with pytest.raises(Unavailable, match=r"no connection within 0\.5 s"):
            store.counts(index)
    finally:
        store.close()
        server.stop()


def test_a_closed_store_opens_again(store: PgvectorStore) -> None:
    index = new_index(store)
    store.close()
    store.close()
    assert store.counts(index).chunks == 0


def test_a_child_process_has_connections_of_its_own(store: PgvectorStore) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("one", EAST))])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.put(index, [update("b.md", piece("two", EAST))])
            store.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(near(store, index, EAST)) == ["one", "two"]


# The schema.


def test_those_that_come_first_at_once_make_one_schema(database: str) -> None:
    stores = [PgvectorStore(database) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda store: store.indexes("acme"), stores)) == [[]] * 3
    assert run(database, "SELECT version FROM ferrum_retrieval.version") == [(1,)]
    for store in stores:
        store.close()


def test_a_schema_of_another_version_is_left_alone(store: PgvectorStore, database: str) -> None:
    store.indexes("acme")
    store.close()
    run(database, "UPDATE ferrum_retrieval.version SET version = 2")
    with pytest.raises(Unavailable, match="has version 2; this ferrum reads 1"):
        store.indexes("acme")


def test_a_user_who_may_not_install_pgvector_is_told_who_may(database: str) -> None:
    run(database, "DO $$ BEGIN CREATE ROLE bob LOGIN PASSWORD 'bobs'; EXCEPTION WHEN duplicate_object THEN END $$")
    [(name,)] = run(database, "SELECT current_database()")
    run(database, f"GRANT CREATE ON DATABASE {name} TO bob")
    store = PgvectorStore(database.replace(f"ada:{PASSWORD}", "bob:bobs"))
    with pytest.raises(Unavailable, match="have its superuser say CREATE EXTENSION vector"):
        store.indexes("acme")
    run(database, "CREATE EXTENSION vector")
    assert store.indexes("acme") == []
    store.close()


def test_an_old_pgvector_is_refused(database: str) -> None:
    run(database, "CREATE EXTENSION vector")
    run(database, "UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'")
    with pytest.raises(Unavailable, match=r"pgvector 0\.7\.4 is too old, 0\.8 is needed"):
        PgvectorStore(database).indexes("acme")


def test_each_index_has_a_table_of_its_own_that_goes_with_it(store: PgvectorStore, database: str) -> None:
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'ferrum_retrieval' AND tablename LIKE 'chunks%'"
    index = new_index(store)
    assert run(database, tables) == [(1,)]
    store.put(index, [update("a.md", piece("one", EAST))])
    store.drop(index)
    assert run(database, tables) == [(0,)]
    assert run(database, "SELECT count(*) FROM ferrum_retrieval.sources") == [(0,)]


def test_a_table_that_somebody_dropped_under_a_reader_is_a_dropped_index(store: PgvectorStore, database: str) -> None:
    index = new_index(store)
    run(database, "DROP TABLE ferrum_retrieval.chunks_1")
    with pytest.raises(NotFound, match="dropped"):
        store.by_vector(index, EAST, 3)


# Searches.


def test_a_big_index_finds_by_hnsw_also_what_few_pass_a_filter(
    store: PgvectorStore, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgvector, "_EXACT", 400)
    random = np.random.default_rng(5)
    index = new_index(store, dimension=16)
    vectors = random.standard_normal((1000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for start in range(0, 1000, 250):
        store.put(index, [
            update(f"{number}.md", piece(str(number), vectors[number]), metadata={"rare": number % 200 == 0})
            for number in range(start, start + 250)
        ])  # fmt: skip
    [(indexes,)] = run(database, "SELECT count(*) FROM pg_indexes WHERE indexdef LIKE '%USING hnsw%'")
    assert indexes == 1
    # What the planner would do by itself with many more.
    run(database, "ALTER ROLE ada SET enable_seqscan = off")
    store.close()
    try:
        found = sum(
            len(
                {str(at) for at in np.argsort(-(vectors @ vectors[query]))[:10]}
                & set(near(store, index, vectors[query]))
            )
            for query in range(20)
        )
        assert found >= 190
        assert sorted(near(store, index, vectors[3], rare=True), key=int) == ["0", "200", "400", "600", "800"]
    finally:
        run(database, "ALTER ROLE ada RESET enable_seqscan")


def test_of_those_that_make_a_big_index_at_once_one_makes_its_hnsw_index(
    store: PgvectorStore, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgvector, "_EXACT", 1)
    index = new_index(store)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: store.put(index, [update(f"{n}.md", piece(f"piece {n}", EAST))]), range(12)))
    [(indexes,)] = run(database, "SELECT count(*) FROM pg_indexes WHERE indexdef LIKE '%USING hnsw%'")
    assert indexes == 1
    assert store.counts(index).chunks == 12
    assert len(near(store, index, EAST, 20)) == 12


def test_a_put_that_fails_changes_nothing(store: PgvectorStore) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("before", EAST))])
    too_long = piece("after", EAST.repeat(2))
    with pytest.raises(Unavailable, match="expected 4 dimensions"):
        store.put(index, [update("a.md", piece("after", EAST)), update("b.md", too_long)])
    assert near(store, index, EAST) == ["before"]
    assert words(store, index, "before after") == ["before"]
    assert (store.counts(index).sources, store.counts(index).chunks) == (1, 1)


def test_vectors_that_are_too_long_for_an_hnsw_index_are_compared_one_by_one(store: PgvectorStore) -> None:
    index = new_index(store, dimension=3072)
    vectors = np.eye(3, 3072, dtype=np.float32)
    store.put(index, [update("a.md", *(piece(str(number), vector) for number, vector in enumerate(vectors)))])
    assert near(store, index, vectors[2], 1) == ["2"]


def test_a_word_that_a_quarter_of_a_big_index_holds_is_not_looked_for_beside_a_rarer_one(store: PgvectorStore) -> None:
    index = new_index(store, dimension=None, embedding="none")
    texts = [f"common {'half' if number % 2 else 'other'} n{number}" for number in range(1000)]
    store.put(index, [update("a.md", *(piece(text) for text in texts))])
    assert words(store, index, "common n7", 10) == ["common half n7"]
    assert len(words(store, index, "common half", 10)) == 10


def test_an_index_may_be_used_by_its_pinned_name_only(store: PgvectorStore) -> None:
    index = new_index(store)
    forged = Index(**{**index.model_dump(), "id": "1 OR 1=1"})
    with pytest.raises(NotFound):
        store.by_text(forged, "x", 1)

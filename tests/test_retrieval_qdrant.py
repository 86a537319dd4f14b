"""What only the Qdrant store can get wrong: writers that die half way, and what a server refuses."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from test_retrieval_stores import EAST, near, new_index, piece, update, words

from ferrum.errors import NotFound, Unavailable
from ferrum.retrieval import qdrant
from ferrum.retrieval.qdrant import QdrantStore

pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant"),
    pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection"),
]

KEY = "k3y-of-ada"


class Killed(BaseException):
    """The writer is gone."""


@pytest.fixture
def store() -> Iterator[QdrantStore]:
    store = QdrantStore(":memory:")
    yield store
    store.close()


def killed_after(store: QdrantStore, requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many writing requests through, and kill the writer then."""
    client = store._open()
    left = iter(range(requests))

    def counted(call: Any) -> Any:
        def ask(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return call(*args, **options)

        return ask

    for name in ("upsert", "delete"):
        monkeypatch.setattr(client, name, counted(getattr(client, name)))


@pytest.mark.parametrize("requests", [0, 1])
def test_what_a_killed_writer_had_not_finished_is_not_there(
    store: QdrantStore, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("before", EAST))])
    with monkeypatch.context() as patch:
        killed_after(store, requests, patch)
        with pytest.raises(Killed):
            store.put(index, [update("a.md", piece("after", EAST)), update("b.md", piece("new", EAST))])
    assert near(store, index, EAST) == ["before"]
    assert words(store, index, "before after new") == ["before"]
    assert list(store.sources(index)) == ["a.md"]
    assert store.counts(index).chunks == 1


def test_what_a_killed_writer_had_finished_is_there_and_what_it_replaced_is_not(
    store: QdrantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("before", EAST))])
    [old] = store.by_vector(index, EAST, 1)
    with monkeypatch.context() as patch:
        killed_after(store, 2, patch)
        with pytest.raises(Killed):
            store.put(index, [update("a.md", piece("after", EAST))])
    assert near(store, index, EAST, 1) == ["after"]
    assert words(store, index, "before after") == ["after"]
    assert store.fetch(index, [old.id]) == []


def test_what_killed_writers_left_is_deleted_by_the_next_who_comes_long_after(
    store: QdrantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = new_index(store)
    store.put(index, [update("a.md", piece("first", EAST))])
    for number in range(3):
        with monkeypatch.context() as patch:
            killed_after(store, 1, patch)
            with pytest.raises(Killed):
                store.put(index, [update("a.md", piece(f"lost {number}", EAST))])
    chunks = store._open().count(f"ferrum_{index.id}").count
    assert chunks == 4
    assert near(store, index, EAST, 1) == ["first"]
    monkeypatch.setattr(qdrant, "_STALE_S", -1.0)
    store.put(index, [update("a.md", piece("second", EAST))])
    assert near(store, index, EAST) == ["second"]
    assert store._open().count(f"ferrum_{index.id}").count == 1


def test_every_search_and_every_deletion_names_the_tenant(store: QdrantStore, monkeypatch: pytest.MonkeyPatch) -> None:
    index = new_index(store, tenant="ada")
    client = store._open()
    asked: list[Any] = []

    def recorded(call: Any, position: int, name: str) -> Any:
        def ask(*args: Any, **options: Any) -> Any:
            where = options.get(name) or args[position]
            asked.append(getattr(where, "filter", where))
            return call(*args, **options)

        return ask

    for call, position, name in [("scroll", 1, "scroll_filter"), ("query_points", 1, "query_filter")]:
        monkeypatch.setattr(client, call, recorded(getattr(client, call), position, name))
    monkeypatch.setattr(client, "delete", recorded(client.delete, 1, "points_selector"))
    store.put(index, [update("a.md", piece("one", EAST))])
    store.put(index, [update("a.md", piece("two", EAST), metadata={"k": 1})])
    assert near(store, index, EAST, k=1) == words(store, index, "two", k=1) == ["two"]
    store.vectors(index, ["0"])
    store.sources(index)
    store.counts(index)
    store.indexes("ada")
    store.drop(index)
    filters = [where.must for where in asked if hasattr(where, "must")]
    assert len(filters) >= 8
    for must in filters:
        assert (must[0].key, must[0].match.any) == ("tenant", ["ada"])


def test_an_index_that_is_dropped_while_it_is_written_is_not_found(
    store: QdrantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = new_index(store)
    client = store._open()
    upsert = client.upsert

    def dropped_first(collection: str, *args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        done = upsert(collection, *args, **options)
        store.drop(index)
        return done

    monkeypatch.setattr(client, "upsert", dropped_first)
    with pytest.raises(NotFound, match="is gone"):
        store.put(index, [update("a.md", piece("one", EAST))])


# A server that refuses.


class Refusing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.server.answers  # type: ignore[attr-defined]
        self.server.keys.append(self.headers.get("api-key"))  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def server(status: int, body: object) -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.answers = (status, body if isinstance(body, bytes) else json.dumps(body).encode())  # type: ignore[attr-defined]
        server.keys = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server: Any) -> str:
    """What somebody is told who asks this server."""
    store = QdrantStore(f"http://127.0.0.1:{server.server_port}", api_key=KEY)
    with pytest.raises(Unavailable) as caught:
        store.indexes("acme")
    store.close()
    assert KEY not in str(caught.value)
    assert f"127.0.0.1:{server.server_port}" in str(caught.value)
    return str(caught.value)


def test_a_refused_key_is_sent_and_not_shown() -> None:
    with server(403, {"status": {"error": "forbidden"}}) as refusing:
        assert "does not accept the API key" in asked(refusing)
        assert refusing.keys == [KEY]


def test_what_the_server_says_is_said() -> None:
    with server(500, {"status": {"error": "disk is full"}}) as refusing:
        assert "disk is full" in asked(refusing)


def test_what_is_no_qdrant_is_told_apart() -> None:
    with server(502, b"<h1>Bad Gateway</h1>") as refusing:
        assert "502 Bad Gateway" in asked(refusing)


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        store = QdrantStore(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(Unavailable, match="does not answer"):
            store.indexes("acme")
        store.close()
        store.close()

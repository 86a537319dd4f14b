"""Indexes in a Qdrant server, for many machines: `ferrum[qdrant]`.

One collection, the catalog, knows which indexes there are and what sources they have; each index has a collection of
its own for its chunks. The tenant is a payload field of all of it, and in the filter of every request.

Qdrant has no transactions, so a source's record in the catalog says which of its chunks count: those of one revision.
They are written first, then the record, which is one point, and then what it replaced is deleted. Chunks of any other
revision are left out of what is found, whether their writer is not done yet or was killed.

Words are found through sparse vectors, weighed as BM25 does: what depends on the chunk is in its vector, and how rare
a word is comes from the server.
"""

from __future__ import annotations

import json
import os
import threading
import time
import unicodedata
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b, sha256
from typing import TYPE_CHECKING, Any, Final

from ferrum.errors import Conflict, NotFound, Unavailable, did_you_mean
from ferrum.retrieval.store import (
    Chunk,
    ChunkId,
    Clauses,
    Counts,
    Found,
    Hit,
    Index,
    Source,
    Store,
    Update,
    Vector,
    facts,
)
from ferrum.retrieval.words import asked, words

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

#: The collection that knows what there is. Its name holds the version of what stands in it.
_CATALOG: Final = "ferrum_catalog_1"
_MEANING: Final = "meaning"
_WORDS: Final = "words"
_TIMEOUT_S: Final = 30
#: Points in one request.
_BATCH: Final = 256
#: After this time nobody works on a revision any more; what is left of it is deleted by whoever comes by.
_STALE_S: Final = 3600.0
#: BM25's own two, and how many words a chunk has more or less: a vector must not change when others are added.
_K1: Final = 1.2
_B: Final = 0.75
_USUAL_LENGTH: Final = 150
_NAMESPACE: Final = uuid.UUID("6fdc5a3e-0c0c-4c53-9d1b-5d0f3d0f7a11")


class QdrantStore(Store):
    """Indexes on the server at `url`; for tests `:memory:` keeps them in this process."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self._url = url
        self._api_key = api_key
        self._opened: QdrantClient | None = None
        self._pid = 0
        self._opening = threading.Lock()

    def create(self, index: Index) -> None:
        from qdrant_client import models

        taken = f"there is an index {index.name!r} already; drop it first, or take another name"
        record = _index_point(index.tenant, index.name)
        with self._client() as client:
            if client.retrieve(_CATALOG, [record]):
                raise Conflict(taken)
            if _has_chunks(index):
                _make_chunks(client, index, index.dimension)
            payload = {
                "kind": "index",
                "tenant": index.tenant,
                "index": index.id,
                **index.model_dump(exclude={"tenant"}),
            }
            client.upsert(
                _CATALOG,
                [models.PointStruct(id=record, vector={}, payload=payload)],
                update_mode=models.UpdateMode.INSERT_ONLY,
            )
            # Of two that create at once, the first's record stays.
            if _payload(client.retrieve(_CATALOG, [record])).get("index") != index.id:
                client.delete_collection(_chunks(index))
                raise Conflict(taken)

    def describe(self, tenant: str, name: str) -> Index:
        with self._client() as client:
            found = client.retrieve(_CATALOG, [_index_point(tenant, name)])
        if not found:
            raise NotFound(f"no index {name!r}{did_you_mean(name, [index.name for index in self.indexes(tenant)])}")
        return _index(_payload(found))

    def indexes(self, tenant: str) -> list[Index]:
        with self._client() as client:
            found = _all(client, _CATALOG, _where(tenant, kind=["index"]))
        return sorted((_index(_payload([point])) for point in found), key=lambda index: index.name)

    def pin(self, index: Index, dimension: int) -> Index:
        with self._client() as client:
            known = self._known(client, index)
            if known.dimension is not None:
                return known
            _make_chunks(client, index, dimension)
            # What was made first has it, whoever made it.
            vectors = client.get_collection(_chunks(index)).config.params.vectors
            assert isinstance(vectors, dict)
            pinned = vectors[_MEANING].size
            client.set_payload(_CATALOG, {"dimension": pinned}, points=[_index_point(index.tenant, index.name)])
            return known.model_copy(update={"dimension": pinned})

    def drop(self, index: Index) -> None:
        from qdrant_client import models

        with self._client() as client:
            self._known(client, index)
            # From here on it is gone for everyone; what follows is for the disk.
            client.delete(_CATALOG, models.PointIdsList(points=[_index_point(index.tenant, index.name)]))
            client.delete(_CATALOG, models.FilterSelector(filter=_where(index.tenant, index=[index.id])))
            client.delete_collection(_chunks(index))

    def put(self, index: Index, updates: Sequence[Update]) -> None:
        from qdrant_client import models

        revision, now = uuid.uuid4().hex, time.time()
        with self._client() as client:
            self._known(client, index)
            before = self._records(client, index, [update.source.name for update in updates])
            points = [
                _chunk_point(index, update.source, chunk, number=number, revision=revision, now=now)
                for update in updates
                for number, chunk in enumerate(update.chunks)
            ]
            for start in range(0, len(points), _BATCH):
                client.upsert(_chunks(index), points[start : start + _BATCH])
            records = [
                models.PointStruct(
                    id=_source_point(index, update.source.name),
                    vector={},
                    payload={
                        "kind": "source", "tenant": index.tenant, "index": index.id, "name": update.source.name,
                        "digest": update.source.digest, "origin": update.source.origin,
                        "metadata": json.dumps(dict(update.source.metadata)),
                        "revision": revision, "chunks": len(update.chunks),
                    },
                )
                for update in updates
            ]  # fmt: skip
            if records:
                # One request, and so one entry of the server's log: all of them or none.
                client.upsert(_CATALOG, records)
            self._forget_chunks(client, index, before, keep=revision)
            # Dropped meanwhile: then nothing of this is in any index.
            self._known(client, index)

    def remove(self, index: Index, sources: Collection[str]) -> None:
        from qdrant_client import models

        with self._client() as client:
            self._known(client, index)
            before = self._records(client, index, sources)
            if before:
                client.delete(_CATALOG, models.PointIdsList(points=list(before)))
                self._forget_chunks(client, index, before)

    def sources(self, index: Index) -> dict[str, Source]:
        with self._client() as client:
            self._known(client, index)
            found = _all(client, _CATALOG, _where(index.tenant, kind=["source"], index=[index.id]))
        sources = [
            Source(payload["name"], payload["digest"], payload["origin"], json.loads(payload["metadata"]))
            for payload in map(_payload, ([point] for point in found))
        ]
        return {source.name: source for source in sources}

    def vectors(self, index: Index, digests: Collection[str]) -> dict[str, Vector]:
        with self._client() as client:
            if self._known(client, index).dimension is None or not digests:
                return {}
            where = _where(index.tenant, digest=list(digests))
            found = _all(client, _chunks(index), where, fields=["digest"], vectors=[_MEANING])
        return {_payload([point])["digest"]: _vector(point) for point in found}

    def by_vector(self, index: Index, vector: Vector, limit: int, clauses: Clauses = ()) -> list[Hit]:
        with self._client() as client:
            if self._known(client, index).dimension is None:
                return []
            return self._nearest(client, index, vector.tolist(), using=_MEANING, limit=limit, clauses=clauses)

    def by_text(self, index: Index, query: str, limit: int, clauses: Clauses = ()) -> list[Hit]:
        from qdrant_client import models

        with self._client() as client:
            numbers = sorted(set(_numbers(asked(query))))
            if not _has_chunks(self._known(client, index)) or not numbers:
                return []
            sparse = models.SparseVector(indices=numbers, values=[1.0] * len(numbers))
            return self._nearest(client, index, sparse, using=_WORDS, limit=limit, clauses=clauses)

    def fetch(self, index: Index, ids: Sequence[ChunkId], *, vectors: bool = False) -> list[Found]:
        with self._client() as client:
            if not _has_chunks(self._known(client, index)) or not ids:
                return []
            points = client.retrieve(
                _chunks(index),
                [str(id) for id in ids],
                with_vectors=[_MEANING] if vectors and index.has_vectors else False,
            )
            records = self._records_of(client, index, points)
        found = {}
        for point in points:
            payload = _payload([point])
            record = records.get(payload["source"], {})
            if payload["revision"] == record.get("revision"):
                found[str(point.id)] = Found(
                    id=str(point.id),
                    source=record["name"],
                    text=payload["text"],
                    digest=payload["digest"],
                    position=json.loads(payload["position"]),
                    metadata=json.loads(record["metadata"]),
                    vector=_vector(point) if vectors and index.has_vectors else None,
                )
        return [found[str(id)] for id in ids if str(id) in found]

    def counts(self, index: Index) -> Counts:
        with self._client() as client:
            self._known(client, index)
            where = _where(index.tenant, kind=["source"], index=[index.id])
            chunks = [_payload([point])["chunks"] for point in _all(client, _CATALOG, where, fields=["chunks"])]
        return Counts(len(chunks), sum(chunks))

    def close(self) -> None:
        with self._opening:
            client, self._opened = self._opened, None
        if client is not None and self._pid == os.getpid():
            client.close()

    def _known(self, client: QdrantClient, index: Index) -> Index:
        """The index as it is now."""
        found = client.retrieve(_CATALOG, [_index_point(index.tenant, index.name)])
        if not found or _payload(found)["index"] != index.id:
            raise NotFound(f"the index {index.name!r} is gone")
        return _index(_payload(found))

    def _nearest(
        self, client: QdrantClient, index: Index, query: Any, *, using: str, limit: int, clauses: Clauses
    ) -> list[Hit]:
        where = _where(index.tenant, clauses)
        wanted = limit
        while True:
            points = client.query_points(
                _chunks(index), query=query, using=using, query_filter=where, limit=wanted,
                with_payload=["source", "revision", "digest"],
            ).points  # fmt: skip
            records = self._records_of(client, index, points)
            hits = [
                Hit(str(point.id), point.score, _payload([point])["digest"])
                for point in points
                if records.get(_payload([point])["source"], {}).get("revision") == _payload([point])["revision"]
            ]
            # More, where there was no room for all that count beside those that do not.
            if len(hits) >= limit or len(points) < wanted:
                return hits[:limit]
            wanted *= 2

    def _records(self, client: QdrantClient, index: Index, names: Collection[str]) -> dict[str, dict[str, Any]]:
        """What the catalog says of these sources of the index, by its own ids; of those that are there."""
        found = client.retrieve(_CATALOG, [_source_point(index, name) for name in names]) if names else []
        return {str(point.id): _payload([point]) for point in found}

    def _records_of(self, client: QdrantClient, index: Index, points: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """What the catalog says of the sources of these chunks."""
        ids = sorted({_payload([point])["source"] for point in points})
        found = client.retrieve(_CATALOG, ids) if ids else []
        return {str(point.id): _payload([point]) for point in found}

    def _forget_chunks(
        self, client: QdrantClient, index: Index, before: dict[str, dict[str, Any]], keep: str = ""
    ) -> None:
        """Delete what these sources had before, and what is left of those that never came to their end."""
        from qdrant_client import models

        if not before or not client.collection_exists(_chunks(index)):
            return
        where = _where(index.tenant, source=list(before))
        where.should = [
            _any("revision", sorted({record["revision"] for record in before.values()})),
            models.FieldCondition(key="at", range=models.Range(lt=time.time() - _STALE_S)),
        ]
        where.must_not = [_any("revision", [keep])]
        client.delete(_chunks(index), models.FilterSelector(filter=where))

    @contextmanager
    def _client(self) -> Iterator[QdrantClient]:
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            yield self._open()
        except UnexpectedResponse as error:
            if error.status_code == 404:
                raise NotFound("the index was dropped just now") from error
            if error.status_code in {401, 403}:
                raise Unavailable(f"Qdrant at {self._url} does not accept the API key") from error
            raise Unavailable(f"Qdrant at {self._url}: {_said(error)}") from error
        except ResponseHandlingException as error:
            raise Unavailable(f"Qdrant at {self._url} does not answer: {error}") from error

    def _open(self) -> QdrantClient:
        from qdrant_client import QdrantClient

        with self._opening:
            # Connections are not shared with a parent: after a fork both would write into the same one.
            if self._opened is None or self._pid != os.getpid():
                client = QdrantClient(
                    location=self._url, api_key=self._api_key, timeout=_TIMEOUT_S, check_compatibility=False
                )
                _make_catalog(client)
                self._opened, self._pid = client, os.getpid()
            return self._opened


def _make_catalog(client: QdrantClient) -> None:
    _make(client, _CATALOG, {}, {}, ["kind", "index"])


def _make_chunks(client: QdrantClient, index: Index, dimension: int | None) -> None:
    from qdrant_client import models

    sparse = {_WORDS: models.SparseVectorParams(modifier=models.Modifier.IDF)}
    # By dot product, which for vectors of length 1 is the cosine and for those of length 0 is something, too.
    meaning = {_MEANING: models.VectorParams(size=dimension, distance=models.Distance.DOT)} if dimension else {}
    _make(client, _chunks(index), meaning, sparse, ["facts", "source", "digest", "revision"])


def _make(client: QdrantClient, name: str, vectors: Any, sparse: Any, fields: Sequence[str]) -> None:
    """Make a collection, unless it is there."""
    from qdrant_client import models
    from qdrant_client.http.exceptions import UnexpectedResponse

    if client.collection_exists(name):
        return
    try:
        client.create_collection(name, vectors_config=vectors, sparse_vectors_config=sparse)
    except UnexpectedResponse:
        # Somebody else has made it meanwhile, and goes on to index its fields.
        if client.collection_exists(name):
            return
        raise
    keyword = models.KeywordIndexType.KEYWORD
    client.create_payload_index(name, "tenant", models.KeywordIndexParams(type=keyword, is_tenant=True))
    for field in fields:
        client.create_payload_index(name, field, models.KeywordIndexParams(type=keyword))


def _has_chunks(index: Index) -> bool:
    """Whether there is a collection of its chunks: it is made once it is known how long the vectors are."""
    return index.dimension is not None or not index.has_vectors


def _chunks(index: Index) -> str:
    return f"ferrum_{index.id}"


def _index_point(tenant: str, name: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, json.dumps([tenant, name])))


def _source_point(index: Index, name: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, json.dumps([index.tenant, index.id, name])))


def _chunk_point(
    index: Index, source: Source, chunk: Chunk, *, number: int, revision: str, now: float
) -> models.PointStruct:
    from qdrant_client import models

    weights = _weights(chunk.subject)
    vector: dict[str, Any] = {_WORDS: models.SparseVector(indices=list(weights), values=list(weights.values()))}
    if chunk.vector is not None:
        vector[_MEANING] = chunk.vector.tolist()
    payload = {
        "tenant": index.tenant,
        "source": _source_point(index, source.name),
        "revision": revision,
        "at": now,
        "text": chunk.text,
        "digest": chunk.digest,
        "position": json.dumps(dict(chunk.position)),
        "facts": [_sha256(fact) for fact in facts(source)],
    }
    id = str(uuid.uuid5(_NAMESPACE, json.dumps([revision, source.name, number])))
    return models.PointStruct(id=id, vector=vector, payload=payload)


def _where(tenant: str, clauses: Clauses = (), **fields: list[str]) -> models.Filter:
    from qdrant_client import models

    filters = [("facts", [_sha256(fact) for fact in clause]) for clause in clauses]
    return models.Filter(must=[_any(key, values) for key, values in [("tenant", [tenant]), *filters, *fields.items()]])


def _any(key: str, values: list[str]) -> models.FieldCondition:
    from qdrant_client import models

    return models.FieldCondition(key=key, match=models.MatchAny(any=values))


def _all(
    client: QdrantClient, collection: str, where: models.Filter, *, fields: Any = True, vectors: Any = False
) -> list[models.Record]:
    found: list[models.Record] = []
    offset: Any = None
    while True:
        page, offset = client.scroll(
            collection, where, limit=1000, offset=offset, with_payload=fields, with_vectors=vectors
        )
        found += page
        if offset is None:
            return found


def _payload(points: Sequence[Any]) -> dict[str, Any]:
    """Of the only one of these points, where there is one."""
    return (points[0].payload or {}) if points else {}


def _index(payload: dict[str, Any]) -> Index:
    return Index(**{field: payload[field] for field in Index.model_fields})


def _vector(point: Any) -> Vector:
    import numpy

    return numpy.array(point.vector[_MEANING], dtype=numpy.float32)


def _numbers(words: Iterable[str]) -> list[int]:
    """What stands for each word in a sparse vector: its stem, in lower case and without accents, as 32 bits."""
    plain = unicodedata.normalize("NFKD", " ".join(words).casefold())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    import snowballstemmer

    # Made anew each time: a stemmer has a state, and threads share it.
    stems = snowballstemmer.stemmer("english").stemWords(plain.split())
    return [int.from_bytes(blake2b(stem.encode(), digest_size=4).digest()) for stem in stems]


def _weights(text: str) -> dict[int, float]:
    """How much each word says of this text, which is BM25 without how rare the word is elsewhere."""
    found = Counter(_numbers(words(text)))
    length = _K1 * (1 - _B + _B * found.total() / _USUAL_LENGTH)
    return {number: count * (_K1 + 1) / (count + length) for number, count in found.items()}


def _sha256(text: str) -> str:
    # A value of metadata may be long, and stands with each chunk.
    return sha256(text.encode()).hexdigest()


def _said(error: Any) -> str:
    """The server's own sentence, where it is one."""
    try:
        return str(error.structured()["status"]["error"])
    except (ValueError, KeyError, TypeError):
        return f"{error.status_code} {error.reason_phrase}"

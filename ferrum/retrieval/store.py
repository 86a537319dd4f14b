"""What an index is kept in: one interface, with a directory, a PostgreSQL or a Qdrant behind it.

A store keeps and finds. What is embedded, when, and how results of words and of meaning are put together is decided
above it. Its calls block, so they belong in threads and not on the event loop; any thread may make them, and any number
of processes at once.

A document is visible as it was or as it is, never in between. What a killed writer had not yet done is not there, and
what it had done is.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, JsonValue

if TYPE_CHECKING:
    import numpy

#: float32, of length 1, so that a dot product is a cosine; all zeros for a text that nothing can be said of.
Vector: TypeAlias = "numpy.typing.NDArray[numpy.float32]"

#: What a store calls a chunk; never given to another one in the same index, also when the first is gone.
ChunkId: TypeAlias = int | str

#: The `embedding` of an index that is searched by words only.
TEXT_ONLY: Final = "none"

#: In a filter, stands for the source's name; no metadata may be called so.
SOURCE: Final = "source"


class Index(BaseModel):
    """One index of one tenant, as it is pinned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Another one each time that an index of this name is created: who holds an old one finds nothing, and never
    #: writes into the new one.
    id: str
    tenant: str
    name: str
    #: The embedder that made every vector in it, `none` where there are none.
    embedding: str
    #: `None` until the first vector is there: only then it is known what a provider's model returns.
    dimension: int | None
    #: In seconds since the epoch.
    created_at: float

    @property
    def has_vectors(self) -> bool:
        return self.embedding != TEXT_ONLY


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a source, as it is put into a store."""

    text: str
    #: What is embedded and searched for words: the text, and above it the headings that it stands under.
    subject: str
    #: sha256 of `subject`, in hexadecimal: pieces that say the same have the same.
    digest: str
    #: What there is of `line` and `end_line` (from 1), `page`, `heading`, `name`.
    position: Mapping[str, JsonValue]
    #: `None` in an index without vectors.
    vector: Vector | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """One document as a whole: a file, a page, whatever has a name."""

    #: Unique in its index.
    name: str
    #: sha256 of all that its chunks are made from: where it is the same, nothing has to be done.
    digest: str
    #: What was asked for when it was read (a folder, a pattern), so that what vanished from there can be found.
    origin: str
    #: Values are texts, numbers, true, false, null, or lists of these.
    metadata: Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Update:
    """A source and all that it consists of now, in order."""

    source: Source
    chunks: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that was found."""

    id: ChunkId
    #: More is better: the cosine (-1 to 1), or BM25 (0 or more, in the store's own scale).
    score: float
    #: Of the chunk, so that what many sources have is known to be one without its text being read.
    digest: str


@dataclass(frozen=True, slots=True)
class Found:
    """A chunk with all that is known of it."""

    id: ChunkId
    source: str
    text: str
    digest: str
    position: Mapping[str, JsonValue]
    #: Of its source.
    metadata: Mapping[str, JsonValue]
    #: `None` unless it was asked for.
    vector: Vector | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    sources: int
    chunks: int


class Store(ABC):
    """Where indexes are kept.

    What takes an `Index` raises `NotFound` when that one is gone, also where another of the same name came after it.
    Everything raises `Unavailable` where the store cannot be reached, is full or is damaged; a write then has changed
    nothing. Names and values were checked before: a store trusts them, and encodes what its own rules do not allow.
    """

    @abstractmethod
    def create(self, index: Index) -> None:
        """Raises `Conflict` where the tenant has one of this name."""

    @abstractmethod
    def describe(self, tenant: str, name: str) -> Index:
        """Raises `NotFound`, with the nearest name that the tenant has."""

    @abstractmethod
    def indexes(self, tenant: str) -> list[Index]:
        """All of one tenant's, by name."""

    def unreadable(self, tenant: str) -> dict[str, str]:
        """What is said of those that have a name and cannot be read, by name; `indexes` leaves them out."""
        return {}

    @abstractmethod
    def pin(self, index: Index, dimension: int) -> Index:
        """Set the dimension where none is set; the index as it is now: of two that pin at once, the first decides."""

    @abstractmethod
    def drop(self, index: Index) -> None:
        """Forget it and all that is in it."""

    def discard(self, tenant: str, name: str) -> None:
        """Drop what has this name, also where it cannot be read. Raises `NotFound`."""
        self.drop(self.describe(tenant, name))

    @abstractmethod
    def put(self, index: Index, updates: Sequence[Update]) -> None:
        """Let these sources consist of these chunks and no others; all of them or, where it fails, none.

        A source that is not there yet is added. Vectors have the dimension of the index, which is pinned by now. An
        update without chunks is kept, too: an empty document need not be read again.
        """

    @abstractmethod
    def remove(self, index: Index, sources: Collection[str]) -> None:
        """Forget these sources and their chunks; names that are not there do no harm."""

    @abstractmethod
    def sources(self, index: Index) -> dict[str, Source]:
        """What there is, by name."""

    @abstractmethod
    def vectors(self, index: Index, digests: Collection[str]) -> dict[str, Vector]:
        """The vectors of those digests that some chunk of this index has, so that they are not made again."""

    @abstractmethod
    def by_vector(self, index: Index, vector: Vector, limit: int, clauses: Clauses = ()) -> list[Hit]:
        """The nearest chunks by cosine, the best first."""

    @abstractmethod
    def by_text(self, index: Index, query: str, limit: int, clauses: Clauses = ()) -> list[Hit]:
        """The chunks that hold words of the query, the best by BM25 first. Nothing in a query is syntax."""

    @abstractmethod
    def fetch(self, index: Index, ids: Sequence[ChunkId], *, vectors: bool = False) -> list[Found]:
        """These chunks, in this order; those that are gone are left out."""

    @abstractmethod
    def counts(self, index: Index) -> Counts: ...

    @abstractmethod
    def close(self) -> None:
        """Give back connections and memory; the store may be used again."""


# Filters: what a store compares is text, so that 1 is 1.0 and is not true or "1", alike in all of them.

#: For each key, the facts of which a source must have at least one.
Clauses: TypeAlias = Sequence[Sequence[str]]


def facts(source: Source) -> list[str]:
    """What filters can ask of a source, a text for each value of its metadata, and one for its name.

    A list counts as each of its items. A store keeps them with the source, or with each of its chunks.
    """
    pairs = {SOURCE: source.name, **source.metadata}
    return sorted({_fact(key, item) for key, value in pairs.items() for item in _items(value)})


def clauses(filter: Mapping[str, JsonValue]) -> Clauses:
    """What a filter asks: for each key, a value, or a list of values of which it is one."""
    return [[_fact(key, item) for item in _items(value)] for key, value in filter.items()]


def _items(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else [value]


def _fact(key: str, value: JsonValue) -> str:
    plain = int(value) if isinstance(value, float) and value.is_integer() else value
    return json.dumps([key, plain], ensure_ascii=False, separators=(",", ":"))

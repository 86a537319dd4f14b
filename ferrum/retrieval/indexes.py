"""The front door to indexes: create, add, search, list, drop, for one tenant at a time."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Self, TypeAlias
from urllib.parse import unquote, urlsplit

from pydantic import JsonValue
from ulid import ULID

from ferrum.errors import Conflict, InputError, NotFound, SettingsError, Unavailable
from ferrum.governance.acts import Ingest, IngestReply, NewDocument, NotTaken, Search, SearchReply
from ferrum.local.home import own
from ferrum.retrieval import embedders
from ferrum.retrieval import search as searching
from ferrum.retrieval.cutting import FEWEST, MAX_CHARS, MOST, cut
from ferrum.retrieval.documents import LeftOut, Original, Place, check_metadata, clean
from ferrum.retrieval.store import SOURCE, Chunk, Counts, Index, Source, Store, Update, Vector
from ferrum.settings import Settings

#: What asks a provider's model for vectors, a model and texts in, a vector for each out. Calling it is an act, so it
#: comes from whoever may act.
Embed: TypeAlias = Callable[[str, Sequence[str]], Awaitable[Sequence[Sequence[float]]]]

#: Texts in one request for vectors.
AT_ONCE: Final = 64
#: So many chunks are put at once, or those of one document, however many.
_PUT: Final = 512

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LONGEST_QUERY: Final = 20_000


@dataclass(slots=True)
class Added:
    """What adding documents did, so far."""

    #: Documents that are new in the index, that took the place of what was there, that were there as they are.
    added: int = 0
    updated: int = 0
    unchanged: int = 0
    #: Documents that are no longer among those given, and were taken out.
    removed: int = 0
    #: Texts for which a vector had to be made.
    embedded: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    #: Documents that were looked at; some of them are not in the index yet.
    seen: int = 0


class Indexes:
    """The indexes of a fleet. Plain methods block; `add` and `search` are for the event loop, and block in threads."""

    def __init__(self, store: Store) -> None:
        self.store: Final = store

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Those that the settings name: `FERRUM_INDEXES`, by default a directory under `home`."""
        return cls(open_store(settings))

    def create(self, tenant: str, name: str, embedding: str) -> Index:
        """Make an empty index, pinned to an embedder for good.

        Raises `Conflict` where the tenant has one of this name, and `InputError` for a name or embedder that cannot be.
        """
        _check_name(name)
        if not tenant or len(tenant) > 100 or clean(tenant) != tenant:
            raise InputError(f"{tenant[:80]!r} cannot be a tenant: it has 1 to 100 characters")
        embedding = embedders.check(embedding)
        index = Index(
            id=f"idx_{str(ULID()).lower()}",
            tenant=tenant,
            name=name,
            embedding=embedding,
            dimension=embedders.dimension(embedding),
            created_at=time.time(),
        )
        self.store.create(index)
        return index

    def ensure(self, tenant: str, name: str, embedding: str | None, default: str) -> Index:
        """The index of this name, made where there is none: with `embedding`, else with `default`.

        Raises `Conflict` where it is pinned to another embedder than `embedding`.
        """
        try:
            index = self.describe(tenant, name)
        except NotFound:
            with suppress(Conflict):
                return self.create(tenant, name, embedding or default)
            # Somebody else was quicker.
            index = self.describe(tenant, name)
        if embedding is not None and embedders.check(embedding) != index.embedding:
            raise Conflict(
                f"index {name!r} is pinned to embedder {index.embedding!r}, and vectors of {embedding!r} cannot be "
                "compared with its own: leave the embedder out, or take another index"
            )
        return index

    def describe(self, tenant: str, name: str) -> Index:
        """Raises `NotFound`, with the nearest name that the tenant has."""
        _check_name(name)
        return self.store.describe(tenant, name)

    def list(self, tenant: str) -> list[tuple[Index, Counts]]:
        """All of a tenant's indexes, by name, and how much is in them; but not those that are `unreadable`."""
        found = []
        for index in self.store.indexes(tenant):
            try:
                found.append((index, self.store.counts(index)))
            except NotFound:
                # Dropped since.
                continue
            except Unavailable:
                if index.name not in self.store.unreadable(tenant):
                    raise
        return found

    def unreadable(self, tenant: str) -> dict[str, str]:
        """The names of a tenant's indexes that cannot be read, as a file may be damaged: why, and what to do."""
        return self.store.unreadable(tenant)

    def drop(self, tenant: str, name: str) -> None:
        """Forget an index and all that is in it, also one that cannot be read. Raises `NotFound`."""
        _check_name(name)
        self.store.discard(tenant, name)

    async def add(
        self,
        tenant: str,
        name: str,
        originals: Iterable[Original | LeftOut],
        *,
        embed: Embed | None = None,
        max_chars: int = MAX_CHARS,
        prune: Collection[str] = (),
        progress: Callable[[Added], None] | None = None,
    ) -> Added:
        """Put documents into an index, in place of what it has of the same names.

        Only what changed is cut and embedded, and a text that the index has a vector of is not embedded again. Each
        document changes at once as a whole; where this is stopped, what was done stays, and the same call goes on from
        there. A piece has at most `max_chars` characters. `prune` names origins, and files, folders and patterns as
        `read` is asked for them: what came from there earlier and is not among `originals` any more is taken out.

        A file keeps the name under which it was added first, also where it is found by another path. What cannot be
        taken is left out, but for a file that was named by itself, of which `InputError` is raised. A name that stands
        for another file, which is still there, is not given to a second one. Raises what `embed` raises.
        """
        if not FEWEST <= max_chars <= MOST:
            raise InputError(f"pieces of {max_chars} characters: let them have {FEWEST} to {MOST} at the most")
        index = await asyncio.to_thread(self.describe, tenant, name)
        adding = _Adding(self.store, index, embed, max_chars, progress or (lambda _: None))
        return await adding.all(originals, prune)

    def has_from(self, tenant: str, name: str, asked: str) -> bool:
        """Whether something was read from this file, folder or pattern, there or not, and is in the index now."""
        from_there = _from([asked])
        return any(map(from_there, self.store.sources(self.describe(tenant, name)).values()))

    async def ingest(self, tenant: str, act: Ingest, *, embed: Embed | None = None, default: str) -> IngestReply:
        """Carry out an act of ingesting; `default` is the embedder of an index that is made and that names none.

        A document that cannot be taken is left out, and the others are not. Its `prune` takes out what earlier acts
        put, and nothing that was added by path.
        """
        index = await asyncio.to_thread(self.ensure, tenant, act.index, act.embedding, default)
        originals = [_given(one) for one in act.documents]
        done = await self.add(tenant, index.name, originals, embed=embed, prune=[""] if act.prune else ())
        counts = await asyncio.to_thread(self.store.counts, index)
        return IngestReply(
            added=done.added,
            updated=done.updated,
            unchanged=done.unchanged,
            removed=done.removed,
            embedded=done.embedded,
            chunks=counts.chunks,
            left_out=tuple(NotTaken(source=one.name, why=one.why) for one in done.left_out),
        )

    async def search(self, tenant: str, search: Search, *, embed: Embed | None = None) -> SearchReply:
        """What a search finds, the best first; see `ferrum.retrieval.search` for what scores say.

        `embed` makes the query's vector where that takes a provider's model.
        """
        index = await asyncio.to_thread(self.describe, tenant, search.index)
        _check_search(index, search)
        vector = None
        # An index in which nothing is has no dimension yet, and nothing to be found.
        if search.mode != "text" and index.has_vectors and index.dimension is not None:
            given = await _embedded(index, [search.query], embed)
            (vector,) = _vectors(index, given)
        return await asyncio.to_thread(searching.find, self.store, index, search, vector)

    def close(self) -> None:
        self.store.close()


def _given(one: NewDocument) -> Original | LeftOut:
    try:
        return Original(one.source, one.text, one.metadata)
    except InputError as error:
        return LeftOut(clean(one.source), str(error))


def _from(prune: Collection[str]) -> Callable[[Source], bool]:
    """Whether a document came from one of these."""
    places = [Place.of(one) for one in prune if one not in ("", "-")]
    # Each document of standard input has come alone.
    origins = {*prune} - {"-"}
    return lambda source: source.origin in origins or any(place.covers(source.origin) for place in places)


def open_store(settings: Settings) -> Store:
    """The store of `FERRUM_INDEXES`. Raises `SettingsError`."""
    if settings.indexes is None:
        return _directory(own(settings.home) / "indexes")
    url = settings.indexes.get_secret_value()
    parts = urlsplit(url)
    match parts.scheme:
        case "file" if not parts.netloc and parts.path.startswith("/"):
            return _directory(Path(unquote(parts.path)))
        case "postgresql" | "postgres":
            _need("psycopg_pool", "pgvector")
            from ferrum.retrieval.pgvector import PgvectorStore

            return PgvectorStore(url)
        case "qdrant+http" | "qdrant+https" if parts.hostname:
            _need("qdrant_client", "qdrant")
            from ferrum.retrieval.qdrant import QdrantStore

            host = parts.netloc.rpartition("@")[2]
            address = f"{parts.scheme.removeprefix('qdrant+')}://{host}{parts.path}"
            return QdrantStore(address, api_key=unquote(parts.password) if parts.password else None)
    # The rest is not shown: it may hold a password.
    begins = f", and begins with {parts.scheme + '://'!r}" if parts.scheme else ""
    raise SettingsError(
        f"FERRUM_INDEXES is not the URL of a store{begins}: write file:///path, "
        "postgresql://user:password@host/database, or qdrant+https://:key@host:6333"
    )


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SettingsError(f"FERRUM_INDEXES needs what is not installed: type pip install 'ferrum[{extra}]'")


def _directory(path: Path) -> Store:
    there = next((one for one in (path, *path.parents) if os.path.lexists(one)), path)
    if not there.is_dir():
        raise SettingsError(
            f"indexes are to be kept in {str(path)!r}, and {str(there)!r} is no directory: name another with "
            "FERRUM_INDEXES"
        )
    from ferrum.retrieval.sqlite import SqliteStore

    return SqliteStore(path)


class _Adding:
    """One call of `add`."""

    def __init__(
        self, store: Store, index: Index, embed: Embed | None, max_chars: int, progress: Callable[[Added], None]
    ) -> None:
        self._store = store
        self._index = index
        self._embed = embed
        self._max_chars = max_chars
        self._progress = progress
        #: Documents that are cut and not in the store yet.
        self._pending: list[Update] = []
        #: What was in the index at the beginning.
        self._known: Mapping[str, Source] = {}
        #: How each file is called in the index, by its path.
        self._names: dict[str, str] = {}
        #: The digests of what was given, by name; of what was left out it is empty.
        self._seen: dict[str, str] = {}
        self._added = Added()

    async def all(self, originals: Iterable[Original | LeftOut], prune: Collection[str]) -> Added:
        self._known = await asyncio.to_thread(self._store.sources, self._index)
        self._names = {one.origin: one.name for one in self._known.values() if _is_file(one)}
        given = iter(originals)
        # To read the next one blocks.
        while (original := await asyncio.to_thread(next, given, None)) is not None:
            await self._one(original)
            if sum(len(update.chunks) for update in self._pending) >= _PUT:
                await self._put()
            self._added.seen += 1
            self._progress(self._added)
        await self._put()
        if prune:
            gone = self._gone(prune)
            await asyncio.to_thread(self._store.remove, self._index, gone)
            self._added.removed = len(gone)
        self._progress(self._added)
        return self._added

    async def _one(self, original: Original | LeftOut) -> None:
        name = self._names.get(original.origin, original.name)
        if isinstance(original, LeftOut):
            self._leave_out(original, name)
            return
        original = replace(original, name=name)
        try:
            self._check_is_its(original)
            await self._take(original)
        except InputError as error:
            if original.named:
                raise
            self._leave_out(LeftOut(name, str(error), original.origin), name)

    def _gone(self, prune: Collection[str]) -> list[str]:
        """What came from there and was not given now; what is in a folder that could not be read may be there still."""
        is_from = _from(prune)
        unread = {one.origin for one in self._added.left_out if _is_file(one)}
        return [
            one.name
            for one in self._known.values()
            if one.name not in self._seen and is_from(one) and unread.isdisjoint(map(str, Path(one.origin).parents))
        ]

    def _leave_out(self, one: LeftOut, name: str) -> None:
        # Two patterns may well match the same file.
        if not (_is_file(one) and name in self._seen):
            self._added.left_out.append(one)
        self._seen.setdefault(name, "")

    async def _take(self, original: Original) -> None:
        digest = await asyncio.to_thread(original.digest, self._max_chars)
        source = Source(original.name, digest, original.origin, original.metadata)
        if before := self._seen.get(original.name):
            # Two patterns may well match the same file.
            if before != digest:
                raise InputError(f"{original.name!r} was given twice, with different contents: name them differently")
            return
        if self._known.get(original.name) == source:
            self._added.unchanged += 1
        else:
            self._pending.append(Update(source, await asyncio.to_thread(cut, original, self._max_chars)))
        self._seen[original.name] = digest
        if _is_file(original):
            self._names.setdefault(original.origin, original.name)

    def _check_is_its(self, original: Original) -> None:
        """Raises `InputError` where its name is that of another file, which is still there."""
        known = self._known.get(original.name)
        if known is None or known.origin == original.origin or not (_is_file(known) and _is_file(original)):
            return
        if os.path.lexists(known.origin):
            raise InputError(
                f"{original.name!r} in index {self._index.name!r} is {known.origin!r}, and this is {original.origin!r}:"
                " add it by its absolute path, so that they have two names"
            )

    async def _put(self) -> None:
        if not self._pending:
            return
        updates, self._pending = self._pending, []
        if self._index.has_vectors:
            vectors = await self._vectors_of([chunk for update in updates for chunk in update.chunks])
            updates = [
                replace(one, chunks=[replace(chunk, vector=vectors[chunk.digest]) for chunk in one.chunks])
                for one in updates
            ]
        await asyncio.to_thread(self._store.put, self._index, updates)
        new = sum(update.source.name not in self._known for update in updates)
        self._added.added += new
        self._added.updated += len(updates) - new

    async def _vectors_of(self, chunks: Sequence[Chunk]) -> Mapping[str, Vector]:
        """By digest: those that the index has, and the others made now."""
        subjects = {chunk.digest: chunk.subject for chunk in chunks}
        vectors = await asyncio.to_thread(self._store.vectors, self._index, subjects)
        missing = [digest for digest in subjects if digest not in vectors]
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            given = await _embedded(self._index, [subjects[digest] for digest in part], self._embed)
            if self._index.dimension is None:
                self._index = await asyncio.to_thread(self._store.pin, self._index, len(given[0]))
            vectors |= dict(zip(part, _vectors(self._index, given), strict=True))
            self._added.embedded += len(part)
            self._progress(self._added)
        return vectors


def _is_file(one: Source | Original | LeftOut) -> bool:
    return one.origin.startswith("/")


async def _embedded(index: Index, texts: Sequence[str], embed: Embed | None) -> Sequence[Sequence[float]]:
    if not embedders.is_provider(index.embedding):
        return list(await asyncio.to_thread(embedders.embed, index.embedding, texts))
    if embed is None:
        raise InputError(
            f"index {index.name!r} is embedded by {index.embedding!r}, a provider's model, which nothing was given to "
            "ask with: pass embed="
        )
    given = await embed(index.embedding, texts)
    if len(given) != len(texts):
        raise InputError(f"embedder {index.embedding!r} gave {len(given)} vectors for {len(texts)} texts")
    return given


def _vectors(index: Index, given: Sequence[Sequence[float]]) -> list[Vector]:
    """Vectors of length 1. Raises `Conflict` for those that cannot be compared with the index's own."""
    import numpy

    for vector in given:
        if len(vector) != index.dimension:
            raise Conflict(
                f"index {index.name!r} holds vectors of {index.dimension} numbers, made by {index.embedding!r}, and "
                f"now there is one of {len(vector)}: the model was changed at its provider, or another one was asked; "
                "make a new index for it"
            )
    made = numpy.array(given, numpy.float32)
    lengths = numpy.linalg.norm(made, axis=1, keepdims=True)
    return list(made / numpy.where(lengths == 0, 1, lengths))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name[:80]!r} cannot be the name of an index: it has up to 64 small letters, digits, '.', '-' and '_', "
            "and begins with a letter or digit"
        )


def _check_search(index: Index, search: Search) -> None:
    if not search.query.strip():
        raise InputError(f"the query to index {index.name!r} is empty: say what to look for")
    if len(search.query) > _LONGEST_QUERY:
        raise InputError(
            f"the query to index {index.name!r} has {len(search.query)} characters, and {_LONGEST_QUERY} are the most: "
            "shorten it"
        )
    if search.mode == "vector" and not index.has_vectors:
        raise InputError(f"index {index.name!r} has no vectors: search it with mode 'text'")
    check_filter(search.filter)


def check_filter(filter: Mapping[str, JsonValue]) -> None:
    """Raises `InputError` for what no metadata could be."""
    check_metadata({key: value for key, value in filter.items() if key != SOURCE}, "filter")
    check_metadata({"name": filter.get(SOURCE)}, "filter")

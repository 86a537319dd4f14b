"""The embedded store: a directory, with a SQLite file for each index.

Words are found by FTS5 (BM25, Porter's stemmer), meaning by an exact comparison with every vector: 50,000 of them take
a few milliseconds, and nothing has to be built or trained. A process that searches keeps the vectors in memory and
looks at a number in the file before each search, so it reads only what was put there since.

Many processes may read and write at once (WAL). What is committed outlives a killed process and a power cut. It is for
one machine: SQLite does not work on network file systems.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import ValidationError

from ferrum.errors import Conflict, NotFound, Unavailable, did_you_mean
from ferrum.retrieval.store import ChunkId, Clauses, Counts, Found, Hit, Index, Source, Store, Update, Vector, facts
from ferrum.retrieval.words import asked, words

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

#: How long a writer waits for the others.
_PATIENCE_S: Final = 60.0
#: Values in one statement; SQLite takes 32,766.
_BATCH: Final = 10_000
#: So many changes back, a process that searches can catch up; else it reads all vectors anew.
_REMEMBERED: Final = 1000
#: Indexes whose vectors a process keeps in memory, the last used ones.
_IN_MEMORY: Final = 8
#: Connections to one index that a process keeps open while nobody uses them.
_IDLE: Final = 4

_SCHEMA: Final = """
PRAGMA journal_mode = WAL;
BEGIN;
CREATE TABLE pinned (value TEXT NOT NULL, generation INTEGER NOT NULL);
CREATE TABLE source (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
  digest TEXT NOT NULL, origin TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE TABLE fact (fact TEXT NOT NULL, source_id INTEGER NOT NULL, PRIMARY KEY (fact, source_id)) WITHOUT ROWID;
CREATE INDEX fact_of_source ON fact (source_id);
CREATE TABLE chunk (
  id INTEGER PRIMARY KEY AUTOINCREMENT, source_id INTEGER NOT NULL,
  text TEXT NOT NULL, digest TEXT NOT NULL, position TEXT NOT NULL
);
CREATE INDEX chunk_of_source ON chunk (source_id);
CREATE INDEX chunk_by_digest ON chunk (digest);
CREATE TABLE vector (chunk_id INTEGER PRIMARY KEY, source_id INTEGER NOT NULL, vector BLOB NOT NULL);
CREATE TABLE gone (generation INTEGER NOT NULL, source_id INTEGER NOT NULL);
CREATE VIRTUAL TABLE words USING fts5 (body, tokenize = 'porter unicode61 remove_diacritics 2');
COMMIT;
"""

#: Connections of a parent process. SQLite forbids a child even to close them.
_inherited: list[object] = []


class SqliteStore(Store):
    """A store in a directory of its own, which is made when the first index is."""

    def __init__(self, directory: Path) -> None:
        self._directory: Final = directory
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._idle: dict[str, list[sqlite3.Connection]] = {}
        self._matrices: OrderedDict[str, _Matrix] = OrderedDict()

    def create(self, index: Index) -> None:
        folder = self._folder(index.tenant)
        with self._alone(folder, index.name):
            if _target(folder, index.name) is not None:
                raise Conflict(f"index {index.name!r} is there already: drop it, or take another name")
            _sweep(folder)
            path = folder / f"{index.id}.db"
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
                db.executescript(_SCHEMA)
                db.execute("INSERT INTO pinned (value, generation) VALUES (?, 0)", (index.model_dump_json(),))
            # Only what is whole gets a name.
            (folder / f"{index.name}.link").symlink_to(path.name)

    def describe(self, tenant: str, name: str) -> Index:
        folder = self._folder(tenant)
        with self._translated(name, folder):
            path = _target(folder, name)
        if path is None:
            raise NotFound(f"{_no_index(folder, name)}: create it with 'ferrum index create {name}'")
        with self._connection(name, path) as db:
            return _pinned(db)

    def indexes(self, tenant: str) -> list[Index]:
        found = []
        for name in _names(self._folder(tenant)):
            # One that is dropped in this moment is not there.
            with contextlib.suppress(NotFound, Unavailable):
                found.append(self.describe(tenant, name))
        return found

    def unreadable(self, tenant: str) -> dict[str, str]:
        said = {}
        for name in _names(self._folder(tenant)):
            try:
                self.counts(self.describe(tenant, name))
            except Unavailable as error:
                said[name] = str(error)
            except NotFound:
                continue
        return said

    def pin(self, index: Index, dimension: int) -> Index:
        with self._writing(index) as db:
            now = _pinned(db)
            if now.dimension is None:
                now = now.model_copy(update={"dimension": dimension})
                db.execute("UPDATE pinned SET value = ?", (now.model_dump_json(),))
        return now

    def drop(self, index: Index) -> None:
        folder = self._folder(index.tenant)
        with self._alone(folder, index.name):
            self._path(index)
            _unlink(folder, index.name)
        self._let_go(index.id)

    def discard(self, tenant: str, name: str) -> None:
        folder = self._folder(tenant)
        with self._translated(name, folder):
            path = _target(folder, name)
        if path is None:
            raise NotFound(_no_index(folder, name))
        with self._alone(folder, name):
            _unlink(folder, name)
        self._let_go(path.stem)

    def put(self, index: Index, updates: Sequence[Update]) -> None:
        with self._writing(index) as db:
            _remove(db, [update.source.name for update in updates])
            for update in updates:
                _insert(db, update)

    def remove(self, index: Index, sources: Collection[str]) -> None:
        with self._writing(index) as db:
            _remove(db, sources)

    def sources(self, index: Index) -> dict[str, Source]:
        with self._reading(index) as db:
            rows = db.execute("SELECT name, digest, origin, metadata FROM source").fetchall()
        return {name: Source(name, digest, origin, json.loads(data)) for name, digest, origin, data in rows}

    def vectors(self, index: Index, digests: Collection[str]) -> dict[str, Vector]:
        import numpy

        asking = "SELECT digest, vector FROM chunk JOIN vector ON chunk_id = id WHERE digest IN ({})"
        with self._reading(index) as db:
            rows = _in_batches(db, asking, list(dict.fromkeys(digests)))
            return {digest: numpy.frombuffer(data, numpy.float32) for digest, data in rows}

    def by_vector(self, index: Index, vector: Vector, limit: int, clauses: Clauses = ()) -> list[Hit]:
        with self._reading(index) as db:
            matrix = self._matrix(index).caught_up(db)
            allowed = None
            if clauses:
                where, values = _where("source.id", clauses)
                allowed = [row[0] for row in db.execute(f"SELECT id FROM source WHERE {where}", values)]  # noqa: S608
            return _hits(db, matrix.nearest(vector, limit, allowed))

    def by_text(self, index: Index, query: str, limit: int, clauses: Clauses = ()) -> list[Hit]:
        # In quotes nothing is an operator; a quote is no part of a word.
        match = " OR ".join(f'"{word}"' for word in asked(query))
        if not match:
            return []
        where, values = _where("chunk.source_id", clauses)
        joined = "JOIN chunk ON chunk.id = words.rowid" if clauses else ""
        statement = (
            f"SELECT words.rowid, rank FROM words {joined} WHERE words MATCH ? AND {where} "  # noqa: S608
            "ORDER BY rank LIMIT ?"
        )
        with self._reading(index) as db:
            rows = db.execute(statement, (match, *values, limit)).fetchall()
            # FTS5 gives the best the lowest number.
            return _hits(db, sorted(((id, -rank) for id, rank in rows), key=lambda row: (-row[1], row[0])))

    def fetch(self, index: Index, ids: Sequence[ChunkId], *, vectors: bool = False) -> list[Found]:
        asking = (
            "SELECT chunk.id, source.name, text, chunk.digest, position, metadata, vector FROM chunk "
            "JOIN source ON source.id = chunk.source_id LEFT JOIN vector ON chunk_id = chunk.id "
            "WHERE chunk.id IN ({})"
        )
        with self._reading(index) as db:
            found = {row[0]: _found(row, vectors) for row in _in_batches(db, asking, ids)}
        return [found[id] for id in ids if id in found]

    def counts(self, index: Index) -> Counts:
        with self._reading(index) as db:
            sources, chunks = db.execute(
                "SELECT (SELECT count(*) FROM source), (SELECT count(*) FROM chunk)"
            ).fetchone()
        return Counts(sources, chunks)

    def close(self) -> None:
        self._own()
        with self._lock:
            idle = [db for connections in self._idle.values() for db in connections]
            self._idle.clear()
            self._matrices.clear()
        for db in idle:
            db.close()

    # Files.

    def _folder(self, tenant: str) -> Path:
        # The hash tells tenants apart and is safe in a path; the rest is for people.
        readable = re.sub(r"[^a-z0-9]+", "-", tenant.lower())[:32].strip("-")
        digest = hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return self._directory / f"{readable}-{digest}"

    def _path(self, index: Index) -> Path:
        folder = self._folder(index.tenant)
        with self._translated(index.name, folder):
            path = _target(folder, index.name)
        if path is None or path.stem != index.id:
            self._let_go(index.id)
            raise NotFound(f"index {index.name!r} was dropped: look for it again, or create it")
        return path

    @contextmanager
    def _alone(self, folder: Path, name: str) -> Iterator[None]:
        """Nobody else gives or takes names in this folder; the kernel gives the lock back when its holder dies."""
        self._own()
        with self._translated(name, folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield

    # Connections.

    @contextmanager
    def _reading(self, index: Index) -> Iterator[sqlite3.Connection]:
        """Everything inside sees the same moment."""
        with self._connection(index.name, self._path(index)) as db:
            db.execute("BEGIN")
            yield db
            db.execute("COMMIT")

    @contextmanager
    def _writing(self, index: Index) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, one writer at a time."""
        with self._connection(index.name, self._path(index)) as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("UPDATE pinned SET generation = generation + 1")
            yield db
            db.execute("COMMIT")

    @contextmanager
    def _connection(self, name: str, path: Path) -> Iterator[sqlite3.Connection]:
        self._own()
        with self._translated(name, path):
            if not path.exists():
                # What is still open of it would take what is written and be gone with it.
                self._let_go(path.stem)
                raise _lost(name, path)
            unlocked = _unlocked(path)
            with self._lock:
                idle = self._idle.get(path.stem) if unlocked is None else None
                db = idle.pop() if idle else None
            db = db or _connect(path, immutable=unlocked is not None)
            try:
                yield db
            except BaseException:
                # Closing rolls back what was begun.
                db.close()
                raise
            if unlocked is not None:
                db.close()
                if unlocked != _unlocked(path):
                    self._let_go(path.stem)
                    raise Unavailable(f"index {name!r} was changed while it was read: try again")
                return
            with self._lock:
                kept = self._idle.setdefault(path.stem, [])
                if len(kept) < _IDLE:
                    kept.append(db)
                    return
            db.close()

    def _own(self) -> None:
        if self._process != os.getpid():
            _inherited.append((self._idle, self._matrices))
            self._forget()

    def _let_go(self, index_id: str) -> None:
        with self._lock:
            idle = self._idle.pop(index_id, [])
            self._matrices.pop(index_id, None)
        for db in idle:
            db.close()

    def _matrix(self, index: Index) -> _Matrix:
        with self._lock:
            matrix = self._matrices.setdefault(index.id, _Matrix())
            self._matrices.move_to_end(index.id)
            while len(self._matrices) > _IN_MEMORY:
                self._matrices.popitem(last=False)
        return matrix

    @contextmanager
    def _translated(self, name: str, path: Path) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise Unavailable(_sentence(error, name, path)) from error


def _connect(path: Path, *, immutable: bool) -> sqlite3.Connection:
    # Never one that is not there: it was dropped in this moment.
    how = "mode=ro&immutable=1" if immutable else "mode=rw"
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?{how}", uri=True, timeout=_PATIENCE_S, isolation_level=None,
        check_same_thread=False,
    )  # fmt: skip
    db.execute("PRAGMA synchronous = FULL")
    return db


def _unlocked(path: Path) -> tuple[int, int] | None:
    """By what it is seen that a file has changed that SQLite can read, but not lock; `None` for one that it can lock.

    Readers of a file in WAL mode lock another one beside it. On a read-only store they can do so while a writer has it
    open elsewhere; else there is none, and none can be made.
    """
    if os.access(path.parent, os.W_OK) or _is_filled(_log(path)):
        return None
    now = path.stat()
    return now.st_mtime_ns, now.st_size


def _log(path: Path) -> Path:
    """Where SQLite keeps what is committed and not in the file itself yet."""
    return path.with_name(f"{path.name}-wal")


def _is_filled(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _sentence(error: Exception, name: str, path: Path) -> str:
    if isinstance(error, OSError):
        return f"the index store cannot use {str(error.filename or path)!r}: {error.strerror}"
    what, index = str(error), f"index {name!r} (file {str(path)!r})"
    said = {
        ("full",): f"has no room left: {_STAYS}; make room and do the same again",
        _DAMAGE: f"is damaged ({what}): {_CURE.format(name)}",
        ("locked",): f"was in use by other writers for {_PATIENCE_S:g} s: try again",
        ("readonly",): "cannot be changed, for its store is read-only",
    }
    for signs, sentence in said.items():
        if any(sign in what for sign in signs):
            return f"{index} {sentence}"
    if "unable to open" in what and _is_filled(_log(path)):
        return (
            f"{index} is in a store that is read-only, and was not closed by who wrote it last: use it once where it "
            "can be written, as by 'ferrum index list'"
        )
    return f"{index} cannot be used ({what}); {_STAYS}"


_STAYS: Final = "what was put into it before stays"
#: What SQLite says of a file that it cannot make sense of; an empty one is to it a database without tables.
_DAMAGE: Final = ("malformed", "not a database", "no such table", "no such column", "unsupported file format")
_CURE: Final = "restore the file, or drop the index with 'ferrum index drop {}' and fill a new one"


def _lost(name: str, path: Path) -> NotFound | Unavailable:
    if _target(path.parent, name) != path:
        return NotFound(f"index {name!r} was dropped just now: look for it again, or create it")
    return Unavailable(f"index {name!r} has lost its file {str(path)!r}: {_CURE.format(name)}")


def _no_index(folder: Path, name: str) -> str:
    return f"there is no index {name!r}{did_you_mean(name, _names(folder))}"


def _target(folder: Path, name: str) -> Path | None:
    """The file of the index that has this name now, whether or not it is there."""
    try:
        return folder / (folder / f"{name}.link").readlink()
    except FileNotFoundError:
        return None


def _names(folder: Path) -> list[str]:
    return sorted(link.name.removesuffix(".link") for link in folder.glob("*.link"))


def _unlink(folder: Path, name: str) -> None:
    (folder / f"{name}.link").unlink(missing_ok=True)
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Delete files that have no name: what was dropped, and what was killed while it was made."""
    named = {str(link.readlink()).removesuffix(".db") for link in folder.glob("*.link")}
    for path in folder.glob("*.db*"):
        if path.name.partition(".")[0] not in named:
            path.unlink(missing_ok=True)


# Statements.


def _pinned(db: sqlite3.Connection) -> Index:
    row = db.execute("SELECT value FROM pinned").fetchone()
    try:
        return Index.model_validate_json(row[0] if row else "")
    except ValidationError as error:
        raise sqlite3.DatabaseError("what it says of itself is malformed") from error


def _generation(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT generation FROM pinned").fetchone()[0])


def _in_batches(db: sqlite3.Connection, statement: str, values: Sequence[object]) -> Iterator[tuple[Any, ...]]:
    for start in range(0, len(values), _BATCH):
        part = values[start : start + _BATCH]
        yield from db.execute(statement.format(_marks(part)), part)


def _hits(db: sqlite3.Connection, ranked: Sequence[tuple[int, float]]) -> list[Hit]:
    """Those of these ids and scores, in this order."""
    digests = dict(_in_batches(db, "SELECT id, digest FROM chunk WHERE id IN ({})", [id for id, _ in ranked]))
    return [Hit(id, score, digests[id]) for id, score in ranked]


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _where(column: str, clauses: Clauses) -> tuple[str, list[str]]:
    """A condition on the id of a source, and the values of its marks."""
    each = [f"{column} IN (SELECT source_id FROM fact WHERE fact IN ({_marks(clause)}))" for clause in clauses]  # noqa: S608
    return " AND ".join(each) or "TRUE", [fact for clause in clauses for fact in clause]


def _remove(db: sqlite3.Connection, names: Collection[str]) -> None:
    generation = _generation(db)
    asking = "SELECT id FROM source WHERE name IN ({})"
    for (id,) in list(_in_batches(db, asking, list(names))):
        db.execute("DELETE FROM words WHERE rowid IN (SELECT id FROM chunk WHERE source_id = ?)", (id,))
        db.execute("DELETE FROM vector WHERE chunk_id IN (SELECT id FROM chunk WHERE source_id = ?)", (id,))
        db.execute("DELETE FROM chunk WHERE source_id = ?", (id,))
        db.execute("DELETE FROM fact WHERE source_id = ?", (id,))
        db.execute("DELETE FROM source WHERE id = ?", (id,))
        db.execute("INSERT INTO gone (generation, source_id) VALUES (?, ?)", (generation, id))
    db.execute("DELETE FROM gone WHERE generation <= ?", (generation - _REMEMBERED,))


def _insert(db: sqlite3.Connection, update: Update) -> None:
    source = update.source
    # Ids are never used twice: whoever has read up to one knows that all that is new is above it.
    source_id = db.execute(
        "INSERT INTO source (name, digest, origin, metadata) VALUES (?, ?, ?, ?)",
        (source.name, source.digest, source.origin, _json(source.metadata)),
    ).lastrowid
    db.executemany("INSERT INTO fact (fact, source_id) VALUES (?, ?)", [(one, source_id) for one in facts(source)])
    for chunk in update.chunks:
        id = db.execute(
            "INSERT INTO chunk (source_id, text, digest, position) VALUES (?, ?, ?, ?)",
            (source_id, chunk.text, chunk.digest, _json(chunk.position)),
        ).lastrowid
        db.execute("INSERT INTO words (rowid, body) VALUES (?, ?)", (id, " ".join(words(chunk.subject))))
        if chunk.vector is not None:
            data = chunk.vector.astype("<f4", copy=False).tobytes()
            db.execute("INSERT INTO vector (chunk_id, source_id, vector) VALUES (?, ?, ?)", (id, source_id, data))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _found(row: Sequence[Any], vectors: bool) -> Found:
    id, source, text, digest, position, metadata, data = row
    vector = None
    if vectors and data is not None:
        import numpy

        vector = numpy.frombuffer(data, numpy.float32)
    return Found(id, source, text, digest, json.loads(position), json.loads(metadata), vector)


# Vectors in memory.


@dataclass(frozen=True, slots=True)
class _Rows:
    """The vectors of one moment. What comes later never changes these arrays, as far as they are seen from here."""

    generation: int
    ids: NDArray[numpy.int64]
    sources: NDArray[numpy.int64]
    #: False for those that are gone and not yet cleared away.
    alive: NDArray[numpy.bool_]
    vectors: NDArray[numpy.float32]

    @classmethod
    def none(cls) -> Self:
        import numpy

        ids = numpy.empty(0, numpy.int64)
        return cls(-1, ids, ids, numpy.empty(0, numpy.bool_), numpy.empty((0, 0), numpy.float32))

    def nearest(self, vector: Vector, limit: int, sources: Sequence[int] | None) -> list[tuple[int, float]]:
        """The ids of the nearest chunks and their cosines, the best first."""
        import numpy

        seen = self.alive if sources is None else self.alive & numpy.isin(self.sources, sources)
        rows = numpy.flatnonzero(seen)
        if not len(rows):
            return []
        few = len(rows) * 4 < len(self.ids)
        # To copy most of the vectors costs more than to compare some in vain.
        scores = self.vectors[rows] @ vector if few else (self.vectors @ vector)[rows]
        if limit < len(rows):
            best = numpy.argpartition(-scores, limit - 1)[:limit]
            rows, scores = rows[best], scores[best]
        order = numpy.lexsort((self.ids[rows], -scores))
        return [(int(self.ids[rows[at]]), float(scores[at])) for at in order]


class _Matrix:
    """The vectors of one index, kept in step with its file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: _Rows | None = None

    def caught_up(self, db: sqlite3.Connection) -> _Rows:
        """The vectors as this transaction sees them, which must not have read anything yet."""
        with self._lock:
            # What a transaction sees is decided by its first read. Here, so that nobody who began later has been before
            # it, and what it goes on to read is of the same moment as the vectors.
            generation = _generation(db)
            rows = self._rows
            if rows is None or rows.generation < generation - _REMEMBERED:
                rows = _Rows.none()
            if rows.generation < generation:
                rows = _added(db, _without_gone(db, rows), generation)
            self._rows = rows
        return rows


def _without_gone(db: sqlite3.Connection, rows: _Rows) -> _Rows:
    import numpy

    gone = [row[0] for row in db.execute("SELECT source_id FROM gone WHERE generation > ?", (rows.generation,))]
    alive = rows.alive & ~numpy.isin(rows.sources, gone) if gone else rows.alive
    if alive.sum() * 4 > len(alive) * 3:
        return _Rows(rows.generation, rows.ids, rows.sources, alive, rows.vectors)
    return _Rows(rows.generation, rows.ids[alive], rows.sources[alive], alive[alive], rows.vectors[alive])


def _added(db: sqlite3.Connection, rows: _Rows, generation: int) -> _Rows:
    import numpy

    last = int(rows.ids[-1]) if len(rows.ids) else 0
    found = db.execute(
        "SELECT chunk_id, source_id, vector FROM vector WHERE chunk_id > ? ORDER BY 1", (last,)
    ).fetchall()
    if not found:
        return _Rows(generation, rows.ids, rows.sources, rows.alive, rows.vectors)
    new = numpy.frombuffer(b"".join(row[2] for row in found), numpy.float32).reshape(len(found), -1)
    return _Rows(
        generation,
        numpy.append(rows.ids, [row[0] for row in found]),
        numpy.append(rows.sources, [row[1] for row in found]),
        numpy.append(rows.alive, numpy.ones(len(found), numpy.bool_)),
        _longer(rows.vectors, new) if len(rows.ids) else new,
    )


def _longer(vectors: NDArray[numpy.float32], new: NDArray[numpy.float32]) -> NDArray[numpy.float32]:
    """Both, one after the other; in the room behind the first where there is some, so that not all has to be copied."""
    import numpy

    base, used, needed = vectors.base, len(vectors), len(vectors) + len(new)
    if not (isinstance(base, numpy.ndarray) and base.ndim == 2 and len(base) >= needed and base.flags.writeable):
        base = numpy.empty((needed + needed // 4, vectors.shape[1]), numpy.float32)
        base[:used] = vectors
    base[used:needed] = new
    return base[:needed]

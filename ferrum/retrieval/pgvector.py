"""Indexes in a PostgreSQL with pgvector, for many machines: `ferrum[pgvector]`.

All of it is in a schema of its own, `ferrum_retrieval`, made on first use. Each index has a table of its own, so that
one tenant's chunks are in no scan and in no statistics of another's; who asks gets at the table only by the index's id
and tenant together.

Vectors are compared with all others in a small index, and found by HNSW, which is approximate, in a big one. Words are
found by a full text index, and ranked by BM25 over what that counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, LiteralString, TypeAlias

from ferrum.errors import Conflict, NotFound, SettingsError, Unavailable, did_you_mean
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
    from psycopg import Connection, Cursor
    from psycopg.rows import TupleRow
    from psycopg.sql import Composable, Composed
    from psycopg_pool import ConnectionPool

    Rows: TypeAlias = Cursor[TupleRow]

#: Of what stands in the schema; another one is not read.
_VERSION: Final = 1
#: Any number, but the same in all of ferrum: two that make the schema at once take turns.
_PGVECTOR: Final = (0, 8)
_LOCK: Final = 0x6665_7272_756D
_TIMEOUT_S: Final = 10.0
#: With fewer chunks all vectors are compared, which is exact and takes some milliseconds. For more there is an HNSW
#: index.
_EXACT: Final = 10_000
#: pgvector indexes no more; vectors that are longer are always compared one by one.
_HNSW_DIMENSIONS: Final = 2000
#: How many candidates HNSW keeps. 40, pgvector's default, finds 9 of 10 neighbours where this finds all but a few.
_EF_SEARCH: Final = 200
#: BM25's own two, as everybody sets them.
_K1: Final = 1.2
_B: Final = 0.75
#: In an index of this many chunks or more, a word that a quarter of them holds is not looked for if rarer ones are.
_MANY: Final = 1000

_SCHEMA: Final[LiteralString] = """
    CREATE SCHEMA IF NOT EXISTS ferrum_retrieval;
    -- English endings are cut off; no word is left out, as "if" and "not" are names in code.
    CREATE TEXT SEARCH DICTIONARY ferrum_retrieval.stem (TEMPLATE = snowball, LANGUAGE = english);
    CREATE TEXT SEARCH CONFIGURATION ferrum_retrieval.words (PARSER = default);
    ALTER TEXT SEARCH CONFIGURATION ferrum_retrieval.words
        ADD MAPPING FOR asciiword, word, numword, int, uint, float, sfloat WITH ferrum_retrieval.stem;
    CREATE TABLE ferrum_retrieval.indexes (
        key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        id text NOT NULL UNIQUE,
        tenant text NOT NULL,
        name text NOT NULL,
        embedding text NOT NULL,
        dimension integer,
        created_at double precision NOT NULL,
        chunks bigint NOT NULL DEFAULT 0,
        length bigint NOT NULL DEFAULT 0,
        UNIQUE (tenant, name)
    );
    CREATE TABLE ferrum_retrieval.sources (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        index_key bigint NOT NULL REFERENCES ferrum_retrieval.indexes ON DELETE CASCADE,
        name_sha256 text NOT NULL,
        name text NOT NULL,
        digest text NOT NULL,
        origin text NOT NULL,
        metadata text NOT NULL,
        UNIQUE (index_key, name_sha256)
    );
    CREATE TABLE ferrum_retrieval.version (version integer NOT NULL);
"""

_TABLE: Final[LiteralString] = """
    CREATE TABLE {chunks} (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        source_id bigint NOT NULL REFERENCES ferrum_retrieval.sources,
        text text NOT NULL,
        digest text NOT NULL,
        position text NOT NULL,
        facts text[] NOT NULL,
        length integer NOT NULL,
        words tsvector NOT NULL
    -- Vectors stay in their rows: to compare with all of a small index would else fetch each from elsewhere.
    ) WITH (toast_tuple_target = 8160);
    CREATE INDEX ON {chunks} (source_id);
    CREATE INDEX ON {chunks} (digest);
    CREATE INDEX ON {chunks} USING gin (facts);
    CREATE INDEX ON {chunks} USING gin (words);
"""


class PgvectorStore(Store):
    """Indexes in the database that `url` names, over at most `connections` connections of this process."""

    def __init__(self, url: str, *, connections: int = 8) -> None:
        from psycopg import ProgrammingError
        from psycopg.conninfo import conninfo_to_dict

        try:
            self._where = conninfo_to_dict(url)
        except ProgrammingError:
            # What it says quotes what it could not read, and so perhaps the password.
            raise SettingsError(
                "what names the PostgreSQL of retrieval is not like postgresql://user:password@host/database"
            ) from None
        self._url = url
        self._connections = connections
        self._pool: ConnectionPool[Connection[TupleRow]] | None = None
        self._pid = 0
        self._opening = threading.Lock()

    def create(self, index: Index) -> None:
        with self._transaction() as cursor:
            cursor.execute(
                "INSERT INTO ferrum_retrieval.indexes (id, tenant, name, embedding, dimension, created_at)"
                " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (tenant, name) DO NOTHING RETURNING key",
                [
                    index.id,
                    _kept(index.tenant),
                    _kept(index.name),
                    _kept(index.embedding),
                    index.dimension,
                    index.created_at,
                ],
            )
            row = cursor.fetchone()
            if row is None:
                raise Conflict(f"there is an index {index.name!r} already; drop it first, or take another name")
            cursor.execute(_sql(_TABLE, row[0]))
            if index.dimension is not None:
                _add_vectors(cursor, row[0], index.dimension)

    def describe(self, tenant: str, name: str) -> Index:
        found = {index.name: index for index in self.indexes(tenant)}
        if name not in found:
            raise NotFound(f"no index {name!r}{did_you_mean(name, found)}")
        return found[name]

    def indexes(self, tenant: str) -> list[Index]:
        with self._transaction() as cursor:
            cursor.execute(
                "SELECT id, tenant, name, embedding, dimension, created_at FROM ferrum_retrieval.indexes"
                ' WHERE tenant = %s ORDER BY name COLLATE "C"',
                [_kept(tenant)],
            )
            return [
                Index(
                    id=id, tenant=_given(tenant), name=_given(name), embedding=_given(embedding),
                    dimension=dimension, created_at=created_at,
                )
                for id, tenant, name, embedding, dimension, created_at in cursor
            ]  # fmt: skip

    def pin(self, index: Index, dimension: int) -> Index:
        with self._transaction() as cursor:
            key, _ = _place(cursor, index, "FOR UPDATE")
            cursor.execute(
                "UPDATE ferrum_retrieval.indexes SET dimension = %s WHERE key = %s AND dimension IS NULL",
                [dimension, key],
            )
            if cursor.rowcount:
                _add_vectors(cursor, key, dimension)
            cursor.execute("SELECT dimension FROM ferrum_retrieval.indexes WHERE key = %s", [key])
            return index.model_copy(update={"dimension": _one(cursor)[0]})

    def drop(self, index: Index) -> None:
        with self._transaction() as cursor:
            # Waits for those that write, and whoever comes to write after it finds the index gone.
            key, _ = _place(cursor, index, "FOR UPDATE")
            cursor.execute(_sql("DROP TABLE {chunks}", key))
            cursor.execute("DELETE FROM ferrum_retrieval.indexes WHERE key = %s", [key])

    def put(self, index: Index, updates: Sequence[Update]) -> None:
        with self._transaction() as cursor:
            key, _ = _place(cursor, index, "FOR KEY SHARE")
            # In one order, so that two that write the same sources wait for each other in turn and not crosswise.
            ordered = sorted(updates, key=lambda update: _sha256(update.source.name))
            ids = _put_sources(cursor, key, [update.source for update in ordered])
            chunks, length = _delete_chunks(cursor, key, ids)
            rows = [
                _row(id, chunk, [_sha256(fact) for fact in facts(update.source)])
                for id, update in zip(ids, ordered, strict=True)
                for chunk in update.chunks
            ]
            _insert_chunks(cursor, key, rows)
            there = _count(cursor, key, len(rows) - chunks, sum(int(str(row["length"])) for row in rows) - length)
        if there >= _EXACT:
            self._index_vectors(index)

    def remove(self, index: Index, sources: Collection[str]) -> None:
        with self._transaction() as cursor:
            key, _ = _place(cursor, index, "FOR KEY SHARE")
            cursor.execute(
                "SELECT id FROM ferrum_retrieval.sources WHERE index_key = %s AND name_sha256 = ANY(%s)"
                " ORDER BY name_sha256 FOR UPDATE",
                [key, [_sha256(name) for name in sources]],
            )
            ids = [id for (id,) in cursor]
            chunks, length = _delete_chunks(cursor, key, ids)
            cursor.execute("DELETE FROM ferrum_retrieval.sources WHERE id = ANY(%s)", [ids])
            _count(cursor, key, -chunks, -length)

    def sources(self, index: Index) -> dict[str, Source]:
        with self._transaction() as cursor:
            cursor.execute(
                "SELECT name, digest, origin, metadata FROM ferrum_retrieval.sources WHERE index_key = %s",
                [_place(cursor, index)[0]],
            )
            found = [
                Source(_given(name), digest, _given(origin), json.loads(metadata))
                for name, digest, origin, metadata in cursor
            ]
        return {source.name: source for source in found}

    def vectors(self, index: Index, digests: Collection[str]) -> dict[str, Vector]:
        with self._transaction() as cursor:
            key, dimension = _place(cursor, index)
            if dimension is None:
                return {}
            cursor.execute(
                _sql(
                    "SELECT DISTINCT ON (digest) digest, vector_send(vector) FROM {chunks}"
                    " WHERE digest = ANY(%s) AND vector IS NOT NULL",
                    key,
                ),
                [list(digests)],
            )
            return {digest: _read(sent) for digest, sent in cursor}

    def by_vector(self, index: Index, vector: Vector, limit: int, clauses: Clauses = ()) -> list[Hit]:
        with self._transaction() as cursor:
            key, dimension = _place(cursor, index)
            if dimension is None:
                return []
            values = {"vector": _written(vector), "limit": limit}
            some = _filter(clauses)
            nearest = _sql(
                "SELECT id, -(vector <#> %(vector)s::vector), digest FROM {chunks} WHERE vector IS NOT NULL{some}"
                " ORDER BY vector <#> %(vector)s::vector LIMIT %(limit)s",
                key,
                some=some,
            )
            hits = _hits(cursor.execute(nearest, values))
            if len(hits) < limit:
                # HNSW gives up after so many. With a filter those that it lets through are few then; without one all
                # are compared, as they are where the index has no more than this.
                exact = _sql(
                    "WITH passed AS MATERIALIZED"
                    " (SELECT id, vector, digest FROM {chunks} WHERE vector IS NOT NULL{some})"
                    " SELECT id, -(vector <#> %(vector)s::vector) AS score, digest FROM passed"
                    " ORDER BY score DESC, id LIMIT %(limit)s",
                    key,
                    some=some,
                )
                hits = _hits(cursor.execute(exact, values))
            return hits

    def by_text(self, index: Index, query: str, limit: int, clauses: Clauses = ()) -> list[Hit]:
        with self._transaction() as cursor:
            key, _ = _place(cursor, index)
            terms = _terms(cursor, key, _joined(asked(query)))
            if not terms:
                return []
            # Only the query's own words are taken apart (those that weigh `A`), not all of each chunk.
            ranked = _sql(
                "SELECT c.id, sum(t.weight * cardinality(w.positions) * ({k1} + 1) / (cardinality(w.positions)"
                " + {k1} * (1 - {b} + {b} * c.length * i.chunks / greatest(i.length, 1)))) AS score, c.digest"
                " FROM {chunks} c JOIN ferrum_retrieval.indexes i ON i.key = {key},"
                " unnest(ts_filter(setweight(c.words, 'A', %(terms)s), '{{a}}')) w"
                " JOIN unnest(%(terms)s, %(weights)s::float8[]) AS t (lexeme, weight) USING (lexeme)"
                " WHERE c.words @@ %(any)s::tsquery{some}"
                " GROUP BY c.id ORDER BY score DESC, c.id LIMIT %(limit)s",
                key,
                key=key,
                k1=_K1,
                b=_B,
                some=_filter(clauses),
            )
            values = {
                "terms": list(terms),
                "weights": list(terms.values()),
                # Letters and digits, so that quoting them is all.
                "any": " | ".join(f"'{lexeme}'" for lexeme in terms),
                "limit": limit,
            }
            return _hits(cursor.execute(ranked, values))

    def fetch(self, index: Index, ids: Sequence[ChunkId], *, vectors: bool = False) -> list[Found]:
        from psycopg.sql import SQL

        with self._transaction() as cursor:
            key, dimension = _place(cursor, index)
            sent = SQL("vector_send(c.vector)" if vectors and dimension is not None else "NULL::bytea")
            cursor.execute(
                _sql(
                    "SELECT c.id, s.name, c.text, c.digest, c.position, s.metadata, {sent} FROM {chunks} c"
                    " JOIN ferrum_retrieval.sources s ON s.id = c.source_id WHERE c.id = ANY(%s)",
                    key,
                    sent=sent,
                ),
                [[int(id) for id in ids]],
            )
            found = {
                id: Found(
                    id, _given(name), _given(text), digest, json.loads(position), json.loads(metadata),
                    None if vector is None else _read(vector),
                )
                for id, name, text, digest, position, metadata, vector in cursor
            }  # fmt: skip
        return [found[int(id)] for id in ids if int(id) in found]

    def counts(self, index: Index) -> Counts:
        with self._transaction() as cursor:
            key, _ = _place(cursor, index)
            cursor.execute(
                "SELECT (SELECT count(*) FROM ferrum_retrieval.sources WHERE index_key = key), chunks"
                " FROM ferrum_retrieval.indexes WHERE key = %s",
                [key],
            )
            return Counts(*_one(cursor))

    def close(self) -> None:
        with self._opening:
            pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.close()

    @contextmanager
    def _transaction(self) -> Iterator[Rows]:
        """A cursor whose work is kept as a whole or not at all."""
        import psycopg
        from psycopg_pool import PoolTimeout

        try:
            with self._open().connection(_TIMEOUT_S) as connection, connection.cursor() as cursor:
                yield cursor
        except psycopg.errors.UndefinedTable as error:
            raise NotFound("the index was dropped just now") from error
        except PoolTimeout as error:
            remedy = f"is it up, and are {self._connections} enough?"
            raise self._unavailable(f"no connection within {_TIMEOUT_S:g} s; {remedy}") from error
        except psycopg.Error as error:
            raise self._unavailable(str(error).strip().partition("\n")[0] or type(error).__name__) from error

    def _index_vectors(self, index: Index) -> None:
        """Make the HNSW index, unless it is there or cannot be; searches go on meanwhile, and writers wait."""
        from psycopg.sql import Identifier

        with self._transaction() as cursor:
            key, dimension = _place(cursor, index)
            name = f"chunks_{key}_hnsw"
            cursor.execute("SELECT to_regclass(%s)", [f"ferrum_retrieval.{name}"])
            if _one(cursor)[0] is not None or dimension is None or dimension > _HNSW_DIMENSIONS:
                return
            # Nobody is writing then: who had begun is waited for, and who comes waits at this row.
            _place(cursor, index, "FOR UPDATE")
            # By inner product, which for vectors of length 1 is the cosine and for those of length 0 is something, too.
            cursor.execute(
                _sql(
                    "CREATE INDEX IF NOT EXISTS {name} ON {chunks} USING hnsw (vector vector_ip_ops)",
                    key,
                    name=Identifier(name),
                )
            )

    def _open(self) -> ConnectionPool[Connection[TupleRow]]:
        from psycopg_pool import ConnectionPool

        with self._opening:
            # Connections are not shared with a parent: after a fork both would write into the same one.
            if self._pool is None or self._pid != os.getpid():
                self._prepare()
                self._pid = os.getpid()
                self._pool = ConnectionPool(
                    self._url,
                    kwargs={"application_name": "ferrum", "connect_timeout": int(_TIMEOUT_S)},
                    min_size=1,
                    max_size=self._connections,
                    configure=_configure,
                    # One that the server has closed meanwhile, as by a restart, is replaced and not handed out.
                    check=ConnectionPool.check_connection,
                    open=True,
                    name="ferrum-retrieval",
                )
            return self._pool

    def _prepare(self) -> None:
        """Make the schema where there is none; raises `Unavailable` where there is one that we do not know."""
        import psycopg

        connection = psycopg.connect(self._url, connect_timeout=int(_TIMEOUT_S), application_name="ferrum")
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
            cursor.execute("SELECT to_regclass('ferrum_retrieval.version')")
            if _one(cursor)[0] is None:
                _make_extension(cursor)
                cursor.execute(_SCHEMA)
                cursor.execute("INSERT INTO ferrum_retrieval.version VALUES (%s)", [_VERSION])
            cursor.execute("SELECT max(version) FROM ferrum_retrieval.version")
            (version,) = _one(cursor)
        if version != _VERSION:
            raise self._unavailable(f"its schema ferrum_retrieval has version {version}; this ferrum reads {_VERSION}")

    def _unavailable(self, reason: str) -> Unavailable:
        where = self._where
        place = f"PostgreSQL {where.get('dbname', '')!r} at {where.get('host', 'localhost')}:{where.get('port', 5432)}"
        # What a server or a library says may quote anything.
        password = where.get("password")
        said = f"{place}: {reason}"
        return Unavailable(said.replace(str(password), "***") if password else said)


def _configure(connection: Connection[TupleRow]) -> None:
    # Goes on where a filter has refused what was found. Kept by the connection, not by its transaction.
    connection.autocommit = True
    connection.execute(_sql("SET hnsw.iterative_scan = strict_order"))
    connection.execute(_sql("SET hnsw.ef_search = {ef_search}", ef_search=_EF_SEARCH))
    connection.autocommit = False


def _make_extension(cursor: Rows) -> None:
    import psycopg

    try:
        cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except psycopg.Error as error:
        raise Unavailable(
            "PostgreSQL has no pgvector in this database: install it on the server, and have its superuser say"
            " CREATE EXTENSION vector"
        ) from error
    cursor.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
    (version,) = _one(cursor)
    if tuple(map(int, version.split(".")[:2])) < _PGVECTOR:
        raise Unavailable(
            f"pgvector {version} is too old, 0.8 is needed: have its superuser say ALTER EXTENSION vector UPDATE"
        )


def _sql(text: LiteralString, key: int = 0, /, **values: object) -> Composed:
    """A statement about one index's own table, `{chunks}`."""
    from psycopg.sql import SQL, Composable, Identifier, Literal

    parts = {name: value if isinstance(value, Composable) else Literal(value) for name, value in values.items()}
    return SQL(text).format(chunks=Identifier("ferrum_retrieval", f"chunks_{key}"), **parts)


def _place(cursor: Rows, index: Index, lock: LiteralString = "") -> tuple[int, int | None]:
    """The number of the index's own table, and the dimension of the vectors in it."""
    from psycopg.sql import SQL

    cursor.execute(
        _sql(
            "SELECT key, dimension FROM ferrum_retrieval.indexes WHERE id = %s AND tenant = %s {lock}", lock=SQL(lock)
        ),
        [index.id, _kept(index.tenant)],
    )
    row = cursor.fetchone()
    if row is None:
        raise NotFound(f"the index {index.name!r} is gone")
    return row[0], row[1]


def _add_vectors(cursor: Rows, key: int, dimension: int) -> None:
    cursor.execute(_sql("ALTER TABLE {chunks} ADD COLUMN vector vector({dimension})", key, dimension=dimension))


def _put_sources(cursor: Rows, key: int, sources: Sequence[Source]) -> list[int]:
    """The ids of these sources, which are there now."""
    cursor.executemany(
        "INSERT INTO ferrum_retrieval.sources (index_key, name_sha256, name, digest, origin, metadata)"
        " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (index_key, name_sha256) DO UPDATE"
        " SET digest = excluded.digest, origin = excluded.origin, metadata = excluded.metadata RETURNING id",
        [
            [key, _sha256(source.name), _kept(source.name), source.digest, _kept(source.origin),
             json.dumps(dict(source.metadata))]
            for source in sources
        ],
        returning=True,
    )  # fmt: skip
    return [_one(result)[0] for result in cursor.results()] if sources else []


def _delete_chunks(cursor: Rows, key: int, source_ids: Sequence[int]) -> tuple[int, int]:
    """How many there were, and how many words in them."""
    cursor.execute(
        _sql(
            "WITH gone AS (DELETE FROM {chunks} WHERE source_id = ANY(%s) RETURNING length)"
            " SELECT count(*), coalesce(sum(length), 0)::bigint FROM gone",
            key,
        ),
        [source_ids],
    )
    chunks, length = _one(cursor)
    return chunks, length


def _insert_chunks(cursor: Rows, key: int, rows: Sequence[dict[str, object]]) -> None:
    from psycopg.sql import SQL

    has_vectors = any(row["vector"] is not None for row in rows)
    cursor.executemany(
        _sql(
            "INSERT INTO {chunks} (source_id, text, digest, position, facts, length, words{column})"
            " VALUES (%(source_id)s, %(text)s, %(digest)s, %(position)s, %(facts)s, %(length)s,"
            " to_tsvector('ferrum_retrieval.words', %(words)s){value})",
            key,
            column=SQL(", vector" if has_vectors else ""),
            value=SQL(", %(vector)s" if has_vectors else ""),
        ),
        rows,
    )


def _count(cursor: Rows, key: int, chunks: int, length: int) -> int:
    """Add to what is counted of an index; how many chunks it has then."""
    # Last in its transaction: who writes to the same index waits for this row.
    cursor.execute(
        "UPDATE ferrum_retrieval.indexes SET chunks = chunks + %s, length = length + %s WHERE key = %s"
        " RETURNING chunks",
        [chunks, length, key],
    )
    there: int = _one(cursor)[0]
    return there


def _row(source_id: int, chunk: Chunk, facts: Sequence[str]) -> dict[str, object]:
    joined = _joined(words(chunk.subject))
    return {
        "source_id": source_id,
        "text": _kept(chunk.text),
        "digest": chunk.digest,
        "position": json.dumps(dict(chunk.position)),
        "facts": facts,
        "length": joined.count(" ") + 1,
        "words": joined,
        "vector": None if chunk.vector is None else _written(chunk.vector),
    }


def _terms(cursor: Rows, key: int, joined: str) -> dict[str, float]:
    """The words to look for, each with its weight: the rarer, the heavier."""
    cursor.execute(
        _sql(
            "SELECT t.lexeme, (SELECT count(*) FROM {chunks} WHERE words @@ quote_literal(t.lexeme)::tsquery), i.chunks"
            " FROM unnest(to_tsvector('ferrum_retrieval.words', %s)) t"
            " JOIN ferrum_retrieval.indexes i ON i.key = {key}",
            key,
            key=key,
        ),
        [joined],
    )
    held = [(lexeme, chunks, count) for lexeme, chunks, count in cursor if chunks]
    rare = [term for term in held if term[2] < _MANY or term[1] * 4 <= term[2]]
    return {
        lexeme: math.log(1 + (max(count, chunks) - chunks + 0.5) / (chunks + 0.5))
        for lexeme, chunks, count in rare or held
    }


def _filter(clauses: Clauses) -> Composable:
    from psycopg.sql import SQL, Literal

    return SQL("").join(
        SQL(" AND facts && {}").format(Literal([_sha256(fact) for fact in clause])) for clause in clauses
    )


def _hits(cursor: Rows) -> list[Hit]:
    return [Hit(id, score, digest) for id, score, digest in cursor]


def _one(cursor: Rows) -> TupleRow:
    row = cursor.fetchone()
    assert row is not None
    return row


def _joined(words: Iterable[str]) -> str:
    """Words of letters and digits alone, in lower case and without accents, so that nothing in them is syntax."""
    plain = unicodedata.normalize("NFKD", " ".join(words).casefold())
    return "".join(letter for letter in plain if not unicodedata.combining(letter))


def _written(vector: Vector) -> str:
    return str(vector.tolist())


def _read(sent: bytes) -> Vector:
    """From what pgvector sends: two numbers of 16 bits, and then as many of 32 as the first of them says."""
    import numpy

    return numpy.frombuffer(sent, ">f4", offset=4).astype(numpy.float32)


def _sha256(text: str) -> str:
    # For what an index of PostgreSQL may not hold: anything longer than 2,700 bytes.
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(text: str) -> str:
    """As PostgreSQL can keep it: it has no character 0."""
    return text.replace("\x1a", "\x1a1").replace("\0", "\x1a0")


def _given(text: str) -> str:
    return text.replace("\x1a0", "\0").replace("\x1a1", "\x1a")

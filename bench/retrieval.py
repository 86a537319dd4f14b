"""What retrieval costs and how well it finds: 50,000 chunks of 384 dimensions, 4 processes that read and 2 that write.

Made up vectors lie around 500 centres, texts are drawn from 20,000 words by Zipf's law; the judged corpora are those of
the tests. PostgreSQL is measured where the tests can start one, or where FERRUM_BENCH_POSTGRES names one.

    python -m bench.retrieval [--chunks N] [--searches N] [--store NAME] [--no-quality]
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from ferrum.governance.acts import Search
from ferrum.retrieval import search as searching
from ferrum.retrieval.store import Chunk, Index, Source, Store, Update, Vector

if TYPE_CHECKING:
    import numpy as np

DIMENSION = 384
#: Chunks of one document, and in one put.
PARTS, BATCH = 10, 500
READERS, WRITERS = 4, 2
#: By name, what is searched for: a mode, and whether one document in ten passes the filter.
KINDS = {
    "vector": ("vector", False),
    "text": ("text", False),
    "hybrid": ("hybrid", False),
    "hybrid, filtered": ("hybrid", True),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=50_000)
    parser.add_argument("--searches", type=int, default=200, help="of each kind, in each process")
    parser.add_argument("--store", default="", help="sqlite or pgvector; else both")
    parser.add_argument("--no-quality", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for place in _places(Path(folder)):
            if options.store in place[0]:
                _cost(place, options.chunks, options.searches)
        if not options.no_quality:
            _quality(Path(folder) / "judged")


Place = tuple[str, str]


def _places(folder: Path) -> Iterator[Place]:
    yield "sqlite", str(folder / "indexes")
    if url := os.environ.get("FERRUM_BENCH_POSTGRES"):
        yield "pgvector", url
        return
    from postgres import CannotStart, Postgres

    try:
        server = Postgres().start()
    except CannotStart as reason:
        print(f"pgvector: not measured, {reason}")
        return
    try:
        yield "pgvector", server.url
    finally:
        server.stop()


def _open(place: Place) -> Store:
    kind, where = place
    if kind == "sqlite":
        from ferrum.retrieval.sqlite import SqliteStore

        return SqliteStore(Path(where))
    from ferrum.retrieval.pgvector import PgvectorStore

    return PgvectorStore(where)


# What it costs.


class Making:
    """Documents and queries as they are drawn; the same ones from the same seed."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._centres = np.random.default_rng(0).standard_normal((500, DIMENSION)).astype(np.float32)
        self._random = np.random.default_rng(seed)

    def vectors(self, count: int) -> np.ndarray[Any, Any]:
        import numpy as np

        noise = self._random.standard_normal((count, DIMENSION)).astype(np.float32)
        vectors = self._centres[self._random.integers(500, size=count)] + noise
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def text(self, words: int) -> str:
        return " ".join(f"w{min(number, 20_000)}" for number in self._random.zipf(1.2, words))

    def document(self, number: int) -> Update:
        texts = [f"document {number} part {part} {self.text(60)}" for part in range(PARTS)]
        chunks = [
            Chunk(text, text, hashlib.sha256(text.encode()).hexdigest(), {"line": part}, vector)
            for part, (text, vector) in enumerate(zip(texts, self.vectors(PARTS), strict=True))
        ]
        return Update(Source(f"{number}.md", uuid.uuid4().hex, "bench", {"group": number % 10}), chunks)

    def query(self, index: Index, kind: str) -> tuple[Search, Vector]:
        mode, filtered = KINDS[kind]
        # Rarer words than a text has: nobody asks for the commonest.
        words = " ".join(f"w{number}" for number in self._random.integers(20, 2000, size=5))
        search = Search(index=index.name, query=words, top_k=10, mode=mode, filter={"group": 3} if filtered else {})  # type: ignore[arg-type]
        return search, self.vectors(1)[0]


@dataclass(frozen=True)
class Read:
    """What one reader measured."""

    #: By kind, milliseconds of each search.
    took: dict[str, list[float]]
    #: MB that the process had at most.
    memory: float


def _cost(place: Place, count: int, searches: int) -> None:
    store, making = _open(place), Making(1)
    index = Index(
        id=uuid.uuid4().hex, tenant="bench", name=uuid.uuid4().hex, embedding="bench", dimension=DIMENSION, created_at=0
    )
    store.create(index)
    documents = [making.document(number) for number in range(count // PARTS)]
    began = time.perf_counter()
    for start in range(0, len(documents), BATCH // PARTS):
        store.put(index, documents[start : start + BATCH // PARTS])
    built = time.perf_counter() - began
    print(f"\n{place[0]}: {count:,} chunks of {DIMENSION} dimensions")
    print(f"  build {built:.1f} s, {count / built:,.0f} chunks a second")
    print(f"  recall@10 by vector against comparing with all: {_recall(store, index, documents):.4f}")
    [alone] = _together(place, index, 1, 0, searches)
    together = _together(place, index, READERS, WRITERS, searches)
    print(f"  {'ms for a search':20}{'one process':>20}{f'{READERS} read, {WRITERS} write':>22}")
    print(f"  {'':20}{'p50':>10}{'p95':>10}{'p50':>12}{'p95':>10}")
    for kind in KINDS:
        many = [took for read in together for took in read.took[kind]]
        print(f"  {kind:20}{_row(alone.took[kind], 10)}{_row(many, 12)}")
    print(f"  memory of a process that searches: {alone.memory:.0f} MB, of which {_bare():.0f} MB before the first")
    store.drop(index)
    store.close()


def _row(took: Sequence[float], width: int) -> str:
    cuts = statistics.quantiles(took, n=20)
    return f"{cuts[9]:>{width}.1f}{cuts[18]:>10.1f}"


def _recall(store: Store, index: Index, documents: Sequence[Update]) -> float:
    import numpy as np

    vectors = np.array([chunk.vector for document in documents for chunk in document.chunks])
    texts = [chunk.text for document in documents for chunk in document.chunks]
    found = 0
    queries = Making(2).vectors(50)
    for query in queries:
        exact = {texts[at] for at in np.argpartition(-(vectors @ query), 10)[:10]}
        hits = store.by_vector(index, query, 10)
        found += len(exact & {one.text for one in store.fetch(index, [hit.id for hit in hits])})
    return found / (10 * len(queries))


def _together(place: Place, index: Index, readers: int, writers: int, searches: int) -> list[Read]:
    spawn = multiprocessing.get_context("spawn")
    results: Any = spawn.Queue()
    end = spawn.Event()
    reading = [
        spawn.Process(target=_reader, args=(place, index, number, searches, results)) for number in range(readers)
    ]
    writing = [spawn.Process(target=_writer, args=(place, index, number, end)) for number in range(writers)]
    for process in [*writing, *reading]:
        process.start()
    reads = [results.get() for _ in reading]
    end.set()
    for process in [*reading, *writing]:
        process.join()
    return reads


def _reader(place: Place, index: Index, number: int, searches: int, results: Any) -> None:
    store, making = _open(place), Making(100 + number)
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    # The first one opens and reads everything.
    searching.find(store, index, *making.query(index, "hybrid"))
    for _ in range(searches):
        for kind in KINDS:
            search, vector = making.query(index, kind)
            began = time.perf_counter()
            searching.find(store, index, search, None if search.mode == "text" else vector)
            took[kind].append((time.perf_counter() - began) * 1000)
    results.put(Read(took, _peak()))


def _writer(place: Place, index: Index, number: int, end: Event) -> None:
    """Put documents anew, ten at a time, half of them new, until it is the end."""
    store, making = _open(place), Making(200 + number)
    turn = 0
    while not end.is_set():
        first = 1_000_000 * (number + 1) + 5 * turn
        store.put(index, [making.document(at) for at in [*range(first, first + 5), *range(5 * turn, 5 * turn + 5)]])
        turn += 1
        # As fast as documents are read and embedded, and not as fast as a disk can write.
        end.wait(0.1)


def _peak() -> float:
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    # Linux's ru_maxrss counts what the parent had before this program took its place.
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 2**10


def _bare() -> float:
    """MB of a process that has imported what a search needs and done nothing."""
    spawn = multiprocessing.get_context("spawn")
    results: Any = spawn.Queue()
    process = spawn.Process(target=_imported, args=(results,))
    process.start()
    memory: float = results.get()
    process.join()
    return memory


def _imported(results: Any) -> None:
    import numpy  # noqa: F401

    results.put(_peak())


# How well it finds.


def _quality(folder: Path) -> None:
    from judged import constitution, indexed, judge, libraries

    from ferrum.retrieval import embedders
    from ferrum.retrieval.sqlite import SqliteStore

    store = SqliteStore(folder)
    given = ["lexical", *(["local"] if embedders.is_installed() else [])]
    corpora: dict[str, Callable[[], Any]] = {"Constitution": constitution, "libraries": libraries}
    print(f"\n{'recall@10, nDCG@10':46}{'text':>14}{'vector':>14}{'hybrid':>14}")
    for title, make in corpora.items():
        corpus = make()
        # A model takes minutes for thousands of documents.
        for embedding in given if len(corpus.documents) < 1000 else given[:1]:
            began = time.perf_counter()
            name = indexed(store, corpus, embedding)
            took = time.perf_counter() - began
            print(f"{title}, {len(corpus.documents)} documents, {embedding} ({took:.1f} s to embed)")
            for kind in sorted({query.kind for query in corpus.queries}):
                queries = [query for query in corpus.queries if query.kind == kind]
                figures = [judge(store, name, queries, mode) for mode in ("text", "vector", "hybrid")]
                cells = "".join(f"{f'{one.recall:.3f} {one.ndcg:.3f}':>14}" for one in figures)
                print(f"  {f'{kind} ({len(queries)} queries)':44}{cells}")
    store.close()


if __name__ == "__main__":
    main()

"""Processes that read and write one index at once: what they do, and what they check."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ferrum.retrieval.store import Chunk, Index, Source, Store, Update, Vector, clauses

#: How many chunks each document has, whatever its version.
PARTS = 12
DIMENSION = 32


def open_store(kind: str, place: str) -> Store:
    if kind == "pgvector":
        from ferrum.retrieval.pgvector import PgvectorStore

        return PgvectorStore(place)
    from ferrum.retrieval.sqlite import SqliteStore

    return SqliteStore(Path(place))


def direction(seed: str) -> Vector:
    digest = hashlib.sha256(seed.encode()).digest()
    vector = np.random.default_rng(list(digest[:8])).standard_normal(DIMENSION).astype(np.float32)
    return vector / np.linalg.norm(vector)


def document(name: str, version: int) -> Update:
    texts = [f"{name} version {version} part {part}" for part in range(PARTS)]
    chunks = [
        Chunk(text, text, hashlib.sha256(text.encode()).hexdigest(), {"line": 1}, direction(name)) for text in texts
    ]
    return Update(Source(name, str(version), "here", {}), chunks)


def whole(name: str, version: int) -> list[str]:
    return sorted(chunk.text for chunk in document(name, version).chunks)


@dataclass(frozen=True)
class Work:
    """What one process does, until it is killed or the file `until` is there."""

    #: write or read.
    what: str
    kind: str
    place: str
    index: Index
    names: Sequence[str]
    #: The first version that is written.
    first: int = 1
    until: str = ""


def write(work: Work, say: Callable[[object], None]) -> None:
    """Put one version of all these documents after the other, and say each once it is there."""
    store = open_store(work.kind, work.place)
    for version in itertools.count(work.first):
        store.put(work.index, [document(name, version) for name in work.names])
        say(version)


def read(work: Work, say: Callable[[object], None]) -> None:
    """Search for each document in turn; say at the end how many were whole, and what was torn."""
    store = open_store(work.kind, work.place)
    oldest = dict.fromkeys(work.names, 0)
    seen, torn = 0, []
    for turn, name in enumerate(itertools.cycle(work.names)):
        if Path(work.until).exists():
            break
        asked = clauses({"source": name})
        hits = (
            store.by_vector(work.index, direction(name), 100, asked)
            if turn % 2
            else store.by_text(work.index, f"{name} version", 100, asked)
        )
        texts = sorted(found.text for found in store.fetch(work.index, [hit.id for hit in hits]))
        # None where it was replaced between the two calls.
        if texts:
            version = int(texts[0].split()[2])
            if texts != whole(name, version) or version < oldest[name]:
                torn.append([name, oldest[name], texts])
            oldest[name] = version
            seen += 1
    say([seen, torn])


class Crew:
    """Starts processes that work, each a fork of one that has imported everything and has no threads."""

    def __init__(self) -> None:
        self._master = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._heard: dict[int, deque[Any]] = {}
        self._pids: dict[int, int] = {}

    def start(self, work: Work) -> int:
        """A number for the process."""
        number = len(self._heard)
        self._heard[number] = deque()
        self._send([number, dataclasses.asdict(work) | {"index": work.index.model_dump()}])
        self._pids[number] = self.hear(number)
        return number

    def hear(self, number: int) -> Any:
        """The next thing that this process says."""
        while not self._heard[number]:
            self._take()
        return self._heard[number].popleft()

    def kill(self, number: int) -> list[Any]:
        """Kill this process; all that it had said and nobody had heard."""
        os.kill(self._pids[number], signal.SIGKILL)
        with suppress(ProcessLookupError):
            while True:
                os.kill(self._pids[number], 0)
                time.sleep(0.001)
        # What it had said is in the pipe before the answer to this.
        mark = len(self._heard)
        self._heard[mark] = deque()
        self._send([mark, None])
        self.hear(mark)
        return list(self._heard[number])

    def end(self) -> None:
        assert self._master.stdin
        assert self._master.stdout
        self._master.stdin.close()
        self._master.wait()
        self._master.stdout.close()

    def _send(self, message: object) -> None:
        assert self._master.stdin
        self._master.stdin.write(json.dumps(message).encode() + b"\n")
        self._master.stdin.flush()

    def _take(self) -> None:
        assert self._master.stdout
        line = self._master.stdout.readline()
        if not line:
            raise EOFError("the processes are gone")
        number, said = json.loads(line)
        self._heard[number].append(said)


def _lead() -> None:
    """Start what is asked for, line by line, and end all of it with the one that asks."""
    # So that no child has to.
    import psycopg_pool  # noqa: F401

    # Nobody waits for the children.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children = []
    for line in sys.stdin:
        number, asked = json.loads(line)
        child = os.fork() if asked else 0
        if child or not asked:
            children.append(child)
            _say(number, child)
            continue
        work = Work(**asked | {"index": Index(**asked["index"])})
        ({"write": write, "read": read}[work.what])(work, lambda said, number=number: _say(number, said))
        os._exit(0)
    for child in filter(None, children):
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _say(number: int, said: object) -> None:
    # Short enough to be written in one piece.
    os.write(1, json.dumps([number, said]).encode()[:4000] + b"\n")


if __name__ == "__main__":
    _lead()

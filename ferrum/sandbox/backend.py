"""What can hold a sandbox: the interface that `bubblewrap`, `gvisor` and `container` have in common.

A backend starts one confined process, our PID 1, and hands over a pair of pipes to it. Everything else (what is said
through the pipes, what PID 1 does, limits inside, outputs, time limits, the pool) is the same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from ferrum.errors import OperatorError
from ferrum.governance.acts import CodeRun
from ferrum.sandbox.runtimes import Runtime

MemoryBy = Literal["cgroup", "watchdog"]


class Kind(StrEnum):
    """Which backends there are, in the order in which they are tried where none is named."""

    BUBBLEWRAP = "bubblewrap"
    GVISOR = "gvisor"
    CONTAINER = "container"


class Missing(OperatorError):
    """This machine lacks what a backend needs; says what, and what to type."""


class Unconfined(OperatorError):
    """A sandbox was not as confined as it has to be, and was killed before it ran anything."""


@dataclass(frozen=True, slots=True)
class Box:
    """What one sandbox is and may use; a job fits into any sandbox that was made for the same."""

    runtime: Runtime
    #: Bytes.
    memory: int
    #: Bytes that may be in its files: `/job`, `/tmp` and `/dev/shm` together, and each of them.
    disk: int
    cpus: float
    #: Processes and threads of the job.
    processes: int

    @classmethod
    def of(cls, run: CodeRun, runtime: Runtime) -> Box:
        return cls(runtime, memory=run.memory, disk=run.disk, cpus=run.cpus, processes=run.processes)


class Cell(ABC):
    """One confined process, from its start to its end. None of its calls but `reap` waits for anything.

    PID 1 ends by itself when its stdin does, so that it does not outlive a worker that is killed.
    """

    #: What PID 1 reads from and writes to; the caller closes both.
    stdin: int
    stdout: int
    #: Whether PID 1 is started as another user than the job is to be, with the right to make it that.
    apart: bool = False
    #: What PID 1 has to filter the system calls of the job with, where the backend has no filter of ours.
    filter: bytes = b""
    #: How memory is held here.
    memory_by: MemoryBy

    @abstractmethod
    def confirm(self) -> None:
        """Check from outside that it is confined, and put it under its limits.

        Called once, when PID 1 has said `UP` and was told nothing. Raises `Unconfined`.
        """

    @abstractmethod
    def kill(self) -> None:
        """End everything in it at once; may be called at any time and more than once.

        Before `confirm` it may do nothing: nothing but our own code runs in it, and that ends when stdin does.
        """

    @abstractmethod
    def reap(self) -> None:
        """Kill it, wait until nothing of it is left, and clean up; called when the caller has closed both pipes.

        Blocks for a short time; may be called again.
        """

    @abstractmethod
    def last_words(self) -> str:
        """What whatever holds it wrote to its stderr, in short; empty where it wrote nothing."""

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel ended it, or a part of it, for its memory."""
        return False

    def peak_memory(self) -> int | None:
        """The most memory that it used at any one time, in bytes, where the kernel counts it."""
        return None


class Backend(ABC):
    """Starts confined processes."""

    kind: Kind

    @abstractmethod
    def check(self) -> None:
        """Raise `Missing` where it surely cannot work here; that it does is only known by running something."""

    @abstractmethod
    def start(self, box: Box) -> Cell:
        """Start PID 1 (`program.command(box.runtime)`), confined, with an empty environment.

        `/job`, `/tmp` and `/dev/shm` are empty, writable, bounded by `box.disk` each, and all else is read-only.
        Always called from the same thread, which lives as long as the backend and does nothing else: what belongs to a
        thread (a view of the file system, the cores it may use) may be changed for it.
        Raises `Missing`, with what to type, where it cannot be started.
        """

    def explain(self, words: str) -> str:
        """What to do about a sandbox that died before it was up and left these words; empty where that is unknown."""
        return ""

    def close(self) -> None:  # noqa: B027
        """Let go of what it holds; called when all its cells are reaped."""

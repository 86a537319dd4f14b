"""What a step type is, and the registry of those there are: one file each in `tasks/`."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue

from ferrum.errors import Denied, StepError, StepTimeout
from ferrum.governance.acts import Act, R
from ferrum.record import Verdict
from ferrum.untrusted import Marks
from ferrum.workflow import Retry, Step


class Params(BaseModel):
    """What an author may write in a step of one type, once its expressions are evaluated."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Attempt(Protocol):
    """What a step type sees of the attempt that it is run for."""

    @property
    def run_id(self) -> str: ...
    @property
    def step_id(self) -> str: ...
    @property
    def number(self) -> int:
        """1 for the first try."""
        ...

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt at this step; tools get it, so that they can tell a repetition."""
        ...

    @property
    def timeout_s(self) -> float | None:
        """The step's `timeout`."""
        ...

    @property
    def verdict(self) -> Verdict | None:
        """What a person decided about this step; `None` before."""
        ...

    @property
    def memory(self) -> JsonValue:
        """What it asked to be told again when it last waited; `None` before."""
        ...

    def now(self) -> float:
        """Return the time of all workers, in seconds since 1970: Redis's, in `run_inline` that of its clock."""
        ...

    @property
    def marks(self) -> Marks:
        """The marks of text in a prompt that somebody else wrote."""
        ...

    def signal(self) -> tuple[JsonValue] | None:
        """The data of the signal that it waited for; `None` while none came."""
        ...

    async def perform(self, act: Act[R], /) -> R:
        """Let the act happen, if it may: decided, recorded and reserved before it begins.

        Raises `Denied`, `Park` to ask a person, and what the act raises.
        """
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """What one frame inside a step came to."""

    #: False while something in it still goes on.
    over: bool
    output: JsonValue = None
    #: Why it failed; empty where it did not.
    error: str = ""
    #: What the policy had against it, where that is why.
    denied: str = ""
    #: What its steps left, by their names.
    outputs: Mapping[str, JsonValue] = field(default_factory=dict)

    def or_raise(self, too_long: str) -> JsonValue:
        """Its output. Raises `StepError` where it failed, and `StepTimeout` where it is not over."""
        if self.denied:
            raise Denied(self.denied)
        if self.error:
            raise StepError(self.error, retry=True)
        if not self.over:
            raise StepTimeout(too_long, retry=True)
        return self.output


class Composed(Attempt, Protocol):
    """What a step that is made of other steps sees besides."""

    @property
    def spec(self) -> Step:
        """What the author wrote."""
        ...

    @property
    def address(self) -> str:
        """Its workflow's name and its id, the same in all runs and frames."""
        ...

    @property
    def own_label(self) -> str:
        """The label of the frame that this try of a block has: its number, or none."""
        ...

    def frame(self, label: str) -> Done:
        """What its frame with this label came to."""
        ...

    def frames(self, count: int) -> Iterator[Done]:
        """What its frames 0 to `count - 1` came to."""
        ...

    def until(self, done: Done, label: str) -> bool:
        """Whether its `until` is true after this round."""
        ...

    def start_run(
        self, workflow: Mapping[str, JsonValue], input: Mapping[str, JsonValue], budget: Mapping[str, JsonValue] | None
    ) -> str:
        """Start a run inside this one, once for each attempt; its id. Raises `StepError`."""
        ...

    def registered(self, name: str, version: str | None) -> Mapping[str, JsonValue]:
        """The workflow that is registered so. Raises `StepError`."""
        ...

    def run_end(self, run_id: str) -> Done:
        """What a run that it started came to."""
        ...

    def health(self, targets: Sequence[str]) -> Mapping[str, Health]:
        """How these targets are doing."""
        ...

    def allowed(self, target: str) -> bool:
        """Whether the target may be used now; how that went must be reported."""
        ...

    def report(self, target: str, *, ok: bool, latency_ms: float) -> None:
        """Tell all workers how a use of the target went."""
        ...


@dataclass(frozen=True, slots=True)
class Health:
    """How a target has been doing lately."""

    #: Whether it may perhaps be used: not while its circuit breaker is open.
    usable: bool
    failures: int = 0
    latency_ms: float | None = None


class Inside(Exception):
    """Raised by a composed step to let frames run inside it; it is run again when they have ended."""

    def __init__(
        self, message: str, *, label: str | None = None, items: Sequence[JsonValue] = (), window: int = 1,
        chunk: int = 1, fail_fast: bool = False, memory: JsonValue = None, wake_in_s: float | None = None,
    ) -> None:  # fmt: skip
        """One frame called `label`, given the only item, if any; or one for each of `items`, numbered from 0.

        `window`: how many at a time; `chunk`: how many more begin together once there is room for so many.
        """
        super().__init__(message)
        self.message = message
        self.label = label
        self.items = items
        self.window = window
        self.chunk = chunk
        self.fail_fast = fail_fast
        self.memory = memory
        self.wake_in_s = wake_in_s


class Skip(Exception):
    """Raised by a step type where there is nothing to do: the step counts as skipped, for this reason."""


class Park(Exception):
    """Raised by a step type to wait without a worker; it is run again from its start when the wait is over."""

    def __init__(  # noqa: PLR0917 - pickled by position
        self, kind: str, message: str, wake_in_s: float | None = None, act: JsonValue = None, bound: str = "",
        memory: JsonValue = None, awaited: str = "",
    ) -> None:  # fmt: skip
        super().__init__(kind, message, wake_in_s, act, bound, memory, awaited)
        self.kind = kind
        self.message = message
        self.wake_in_s = wake_in_s
        #: The act that a person is asked about, and its digest.
        self.act = act
        self.bound = bound
        #: What `Attempt.memory` is when it is run again.
        self.memory = memory
        #: The signal, or the run, that it waits for.
        self.awaited = awaited


P = TypeVar("P", bound=Params)


class StepType(ABC, Generic[P]):
    """One kind of step. Stateless; one value serves all steps of the type."""

    #: What authors write after `type:`; see `task` and `queue`. Composed ones, which only decide what is next, share a
    #: queue.
    name: ClassVar[str]
    params: type[P]
    #: How often a step of this type is tried where its author says nothing.
    retry: ClassVar[Retry] = Retry(max_attempts=1)
    #: Seconds that one attempt may take where its author says nothing; `None`: no limit.
    timeout_s: ClassVar[float | None] = None
    #: Whether an author can write it; the others are made of what changes how a step is run.
    written: ClassVar[bool] = True
    #: Whether it is made of other steps.
    composed: ClassVar[bool] = False
    #: Its `timeout` is how long it waits, not how long an attempt may take; the workflow's default is not for it.
    waits: ClassVar[bool] = False
    #: What it returns may be text that somebody else wrote: where that enters a prompt, it is marked.
    foreign: ClassVar[bool] = False
    #: What it returns may hold text of its parameters, and is as foreign as these.
    passes_on: ClassVar[bool] = True
    #: Those of its parameters that a model reads.
    prompts: ClassVar[frozenset[str]] = frozenset()
    #: Parameters that are JSON Schemas which a model reads.
    schemas: ClassVar[frozenset[str]] = frozenset()
    #: It ends by itself at its `timeout`, and says how; the executor only steps in where it does not.
    keeps_time: ClassVar[bool] = False

    @abstractmethod
    def run(self, params: P, attempt: Attempt) -> Awaitable[JsonValue] | JsonValue:
        """Do it, and return the step's output.

        A coroutine function runs on the process's event loop and is cancelled at its time limit; a plain one runs
        in the worker's thread and gets an exception there. Raises `StepError`, or `Park` to wait.
        """

    def act(self, params: P) -> Act[Any] | None:
        """Return the act that is decided on before `run`, for a type that does it itself, where it runs.

        `None` where `run` asks for whatever it does by `Attempt.perform`.
        """
        return None

    @property
    def queue(self) -> str:
        return "ferrum.flow" if self.composed else f"ferrum.{self.name}"

    @property
    def task(self) -> str:
        """The Celery task that runs it."""
        return f"ferrum.flow.{self.name}" if self.composed else f"ferrum.{self.name}"


@cache
def step_types() -> Mapping[str, StepType[Any]]:
    """Every step type, by name.

    The files are found beside the `ferrum` package and not by the import path: `tasks` is a name that many
    Celery projects give their own modules.
    """
    found: dict[str, StepType[Any]] = {}
    for file in sorted((Path(__file__).parent.parent / "tasks").glob("[!_]*.py")):
        for value in vars(_load(file)).values():
            if (
                isinstance(value, type)
                and issubclass(value, StepType)
                and value.__module__ == f"ferrum_tasks.{file.stem}"
            ):
                kind = value()
                found[kind.name] = kind
    return found


def _load(file: Path) -> object:
    name = f"ferrum_tasks.{file.stem}"
    spec = spec_from_file_location(name, file)
    # A .py file always has a loader.
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

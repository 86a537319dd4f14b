"""What a step type is, and the registry of those there are: one file each in `tasks/`."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, overload

from pydantic import BaseModel, ConfigDict, JsonValue

from ferrum.governance.acts import ModelCall, ModelReply, ToolCall, ToolReply
from ferrum.record import Verdict
from ferrum.workflow import Retry


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

    @overload
    async def perform(self, act: ModelCall) -> ModelReply: ...
    @overload
    async def perform(self, act: ToolCall) -> ToolReply: ...


class Park(Exception):
    """Raised by a step type to wait without a worker; it is run again from its start when the wait is over."""

    def __init__(
        self, kind: str, message: str, wake_in_s: float | None = None, act: JsonValue = None, bound: str = ""
    ) -> None:
        super().__init__(kind, message, wake_in_s, act, bound)
        self.kind = kind
        self.message = message
        self.wake_in_s = wake_in_s
        #: The act that a person is asked about, and its digest.
        self.act = act
        self.bound = bound


P = TypeVar("P", bound=Params)


class StepType(ABC, Generic[P]):
    """One kind of step. Stateless; one value serves all steps of the type."""

    #: What authors write after `type:`; the Celery task is `ferrum.<name>`, and so is its queue.
    name: ClassVar[str]
    params: type[P]
    #: How often a step of this type is tried where its author says nothing.
    retry: ClassVar[Retry] = Retry(max_attempts=1)
    #: Seconds that one attempt may take where its author says nothing; `None`: no limit.
    timeout_s: ClassVar[float | None] = None
    #: Its `timeout` is how long it waits, not how long an attempt may take; the workflow's default is not for it.
    waits: ClassVar[bool] = False

    @abstractmethod
    def run(self, params: P, attempt: Attempt) -> Awaitable[JsonValue] | JsonValue:
        """Do it, and return the step's output.

        A coroutine function runs on the process's event loop and is cancelled at its time limit; a plain one runs
        in the worker's thread and gets an exception there. Raises `StepError`, or `Park` to wait.
        """

    @property
    def queue(self) -> str:
        return f"ferrum.{self.name}"


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

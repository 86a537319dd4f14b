"""A workflow without a fleet: in this process, on a clock that jumps, with steps that do as a test says."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from os import PathLike
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, Unpack

from pydantic import JsonValue

from ferrum.artifacts import Artifacts
from ferrum.events import Event
from ferrum.executor import Actors
from ferrum.governance.acts import Act, By, R
from ferrum.governance.policy import Policy
from ferrum.inline import (
    Ask,
    Behaviour,
    Person,
    Result,
    Scripted,
    Sent,
    Shared,
    Signal,
    Stuck,
    check_steps,
    execute,
)
from ferrum.plan import Built, Plan, template_id
from ferrum.record import Verdict
from ferrum.results import RunStatus, StepResult, StepStatus, Usage
from ferrum.workflow import Workflow

if TYPE_CHECKING:
    from ferrum.actors import LiveActors

__all__ = ["InlineRun", "Scripted", "Sent", "Shared", "Stuck", "run_inline"]

#: What a person says of one step: yes or no, more than that, or a function of what is asked.
Answer = bool | Verdict | Callable[[Ask], bool | Verdict | None]

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


def run_inline(
    workflow: Workflow | Built | Mapping[str, object] | str | PathLike[str],
    input: Mapping[str, JsonValue] | None = None,
    *,
    steps: Mapping[str, Behaviour] | None = None,
    signals: Mapping[str, Signal] | None = None,
    approvals: Mapping[str, Answer] | Person | None = None,
    policy: Policy | Mapping[str, list[str]] | None = None,
    actors: Actors | None = None,
    workflows: Mapping[str, Mapping[str, JsonValue]] | None = None,
    shared: Shared | None = None,
) -> InlineRun:
    """Run a workflow here and now, to its end, and say what happened.

    `steps` says by their ids (`fetch`, `each.3`, `each.*.sum`, `report/fetch` in a sub-workflow) what steps do instead
    of what they would: a value that is returned, an exception that is raised, a function of the step's parameters, or
    a `Scripted`. Those without run for real: `policy` is asked first, which denies all that it does not allow, and
    then a `task` step calls its Celery task, an `llm` or `tool` step `actors`: real ones where none are given. What a
    flow hands over as objects, functions and tasks, is the caller's own code, and the policy is not asked about it.

    `signals` are a run's signals by name, there from the start, or later as `Sent`. `approvals` are the answers of
    people, by step, or a function of the `Ask`; one that is missing is an answer that never comes. `workflows` are
    the registered ones. `shared`, given to one call after the other, is what they share: cache, limits, breakers.

    Time is virtual. Where all wait, the clock jumps to what is due next: a retry, a `wait` of a week, the `delay_s` of
    a script, and `asyncio.sleep` in an `async` function of one. While a step runs for real, it goes with the real time.

    It may be called where an event loop is running, which then waits for it. Raises `WorkflowError`, `InputError`, and
    `Stuck` when the run waits for what will not come.
    """
    plan, own = _planned(workflow)

    async def run(loop: _VirtualLoop) -> Result:
        real = _Real()
        try:
            with _Threads() as threads:
                return await execute(
                    plan, input, actors=actors or real, policy=_policy(policy), artifacts=Artifacts("memory://"),
                    steps=steps, signals=signals, approve=_person(plan, approvals), workflows=workflows, own=own,
                    clock=loop.clock, shared=shared, threads=threads, random=Random(0).random,  # noqa: S311 - the same in each run
                )  # fmt: skip
        finally:
            await real.aclose()

    return InlineRun(_on_its_own_loop(run))


def _planned(source: Workflow | Built | Mapping[str, object] | str | PathLike[str]) -> tuple[Plan, frozenset[str]]:
    """The plan, and the functions that the caller hands over, which are its own code."""
    if isinstance(source, Mapping):
        return Plan.of(source), frozenset()
    # Here and not above: who tests files needs none of it.
    from ferrum.primitives.flow import Flow

    if isinstance(source, Flow):
        from ferrum.primitives.build import Builder

        builder = Builder({})
        plan = Plan(builder.workflow(source, None, {}))
        return plan, frozenset(f"task:{name}" for name in builder.functions)
    return Plan(source if isinstance(source, Workflow | Built) else Workflow.load(source)), frozenset()


def _policy(given: Policy | Mapping[str, list[str]] | None) -> Policy:
    return given if isinstance(given, Policy) else Policy.of(given or {}, "the policy that run_inline was given")


def _person(plan: Plan, given: Mapping[str, Answer] | Person | None) -> Person | None:
    if given is None or not isinstance(given, Mapping):
        return given
    check_steps(plan, given, "approvals")

    def answer(ask: Ask) -> bool | Verdict | None:
        general = "/".join(template_id(part) for part in ask.step_id.split("/"))
        said = given.get(ask.step_id, given.get(general))
        return said(ask) if callable(said) else said

    return answer


# What real steps need.


class _Real:
    """The real actors, made by the first act that is allowed."""

    def __init__(self) -> None:
        self._made: LiveActors | None = None

    def _actors(self) -> LiveActors:
        if self._made is None:
            from ferrum.actors import LiveActors
            from ferrum.settings import settings

            self._made = LiveActors(settings())
        return self._made

    async def warm(self, kinds: frozenset[str]) -> None:
        await self._actors().warm(kinds)

    def estimate(self, act: Act[Any]) -> Usage:
        return self._actors().estimate(act)

    async def carry_out(self, act: Act[R], by: By) -> R:
        return await self._actors().carry_out(act, by)

    async def aclose(self) -> None:
        if self._made is not None:
            await self._made.aclose()


class _Threads(ThreadPoolExecutor):
    """Where blocking steps run, with the Celery app of whoever asked."""

    def __init__(self) -> None:
        from celery import current_app

        app = current_app._get_current_object()
        super().__init__(64, "ferrum-inline", initializer=app.set_current)

    def __exit__(self, *_: object) -> None:
        # What was interrupted may still be on its way out.
        self.shutdown(wait=False, cancel_futures=True)


# Time that jumps.


class _Clock:
    def __init__(self, loop: _VirtualLoop) -> None:
        self._loop = loop
        # `until` of a `wait` is a real time.
        self._began = time.time()

    def now(self) -> float:
        return self._began + self._loop.time()

    @contextmanager
    def busy(self) -> Iterator[None]:
        self._loop.working += 1
        try:
            yield
        finally:
            self._loop.working -= 1


class _VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that never sleeps: where nothing is left to do, it is the time of what is due next.

    While something is working, a thread or a real step, it waits like any other.
    """

    def __init__(self) -> None:
        self.working = 0
        self.elapsed = 0.0
        self.clock = _Clock(self)
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.elapsed

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[_Ts]], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        self.working += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._worked)
        return future

    def _worked(self, _: object) -> None:
        self.working -= 1


class _Jumping(selectors.DefaultSelector):
    """A selector that lets time jump instead of waiting for it."""

    def __init__(self, loop: _VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None or self._loop.working:
            began = time.monotonic()
            ready = super().select(timeout)
            self._loop.elapsed += time.monotonic() - began
            return ready
        self._loop.elapsed += timeout
        return []


def _on_its_own_loop(work: Callable[[_VirtualLoop], Any]) -> Result:
    def run() -> Result:
        loop = _VirtualLoop()
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            result: Result = runner.run(work(loop))
            return result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    # A loop cannot run inside another one.
    with ThreadPoolExecutor(1, "ferrum-run-inline") as thread:
        return thread.submit(run).result()


# What happened.


class InlineRun:
    """What came of a run, and what can be said about it. What does not hold fails with all that happened."""

    def __init__(self, result: Result) -> None:
        self.result = result

    @property
    def status(self) -> RunStatus:
        return self.result.status

    @property
    def outputs(self) -> JsonValue:
        return self.result.outputs

    @property
    def reason(self) -> str:
        """Why it did not complete; empty where it did."""
        return self.result.reason

    @property
    def usage(self) -> Usage:
        return self.result.usage

    @property
    def events(self) -> tuple[Event, ...]:
        return self.result.events

    @property
    def seconds(self) -> float:
        """How long it took, by its own clock."""
        return self.events[-1].at - self.events[0].at

    @property
    def order(self) -> list[str]:
        """The steps, in the order in which they began; each once."""
        return list(dict.fromkeys(event.step for event in self.events if event.type == "step.started"))

    def step(self, step_id: str) -> StepResult:
        """What one step left; a step that never began is `pending`."""
        return self.result.steps.get(step_id) or StepResult(step_id=step_id)

    def output(self, step_id: str) -> JsonValue:
        """The output of a step, which must have completed."""
        found = self.step(step_id)
        self._check(found.status is StepStatus.COMPLETED, f"{step_id!r} did not complete, it is {found.status}")
        return found.output

    def attempts(self, step_id: str) -> int:
        """How often a step was tried; 0 for one that never began."""
        return self.step(step_id).attempt

    def inside(self, step_id: str) -> InlineRun:
        """The run that this step started."""
        self._check(step_id in self.result.inside, f"{step_id!r} started no run")
        return InlineRun(self.result.inside[step_id])

    def happened(self, kind: str, step_id: str | None = None) -> list[Event]:
        """The events of this type, of one step or of all."""
        return [
            event for event in self.events if event.type == kind and step_id in (None, getattr(event, "step", None))
        ]

    def assert_happened(self, kind: str, step_id: str | None = None, /, **facts: object) -> None:
        """An event of this type has these facts: `run.assert_happened("step.failed", "a", error="no")`."""
        found = self.happened(kind, step_id)
        fits = any(all(getattr(event, name, None) == fact for name, fact in facts.items()) for event in found)
        what = " ".join([kind, *([f"of {step_id!r}"] if step_id else []), *(f"{k}={v!r}" for k, v in facts.items())])
        self._check(fits, f"there was no {what}")

    def assert_not_happened(self, kind: str, step_id: str | None = None) -> None:
        whose = f" of {step_id!r}" if step_id else ""
        self._check(not self.happened(kind, step_id), f"there was a {kind}{whose}")

    def assert_order(self, *step_ids: str) -> None:
        """These steps began in this order; others may have begun in between."""
        order = self.order
        missing = [step_id for step_id in step_ids if step_id not in order]
        self._check(not missing, f"these never began: {', '.join(missing)}")
        said = f"they did not begin in the order {', '.join(step_ids)}, but {', '.join(order)}"
        self._check([step_id for step_id in order if step_id in step_ids] == list(step_ids), said)

    def assert_completed(self) -> None:
        self._check(self.status is RunStatus.COMPLETED, "the run did not complete")

    def __str__(self) -> str:
        """All that happened, a line for each event."""
        return "\n".join(_lines(self.result, ""))

    def _check(self, holds: bool, what: str) -> None:
        # Raised and not asserted: pytest would add the text of the condition, which says less.
        __tracebackhide__ = True
        if not holds:
            raise AssertionError(f"{what}\n{self}")


def _lines(result: Result, indent: str) -> Iterator[str]:
    yield f"{indent}run {result.status}" + (f": {result.reason}" if result.reason else "")
    began = result.events[0].at
    for event in result.events:
        where = f"  {event.step}" if hasattr(event, "step") else ""
        yield f"{indent}  {event.at - began:9.3f} s  {event.type}{where}{_about(event)}"
    for step_id, inside in result.inside.items():
        yield f"{indent}  inside of {step_id}:"
        yield from _lines(inside, f"{indent}  ")


def _about(event: Event) -> str:
    attempt = getattr(event, "attempt", 0)
    tried = f"  try {attempt}" if event.type == "step.started" and attempt > 1 else ""
    for name in ("error", "reason", "message", "why", "output"):
        if text := getattr(event, name, None):
            return f"{tried}  {name} {_short(text)}"
    return tried


def _short(text: str) -> str:
    # An envelope's value says it.
    shown = text[5:-1] if text.startswith('{"v":') else text
    return shown if len(shown) <= 200 else f"{shown[:199]}…"

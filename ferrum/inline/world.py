"""What the runs of one `execute` have in common: a clock, what acts and what decides, and what goes on."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import JsonValue

from ferrum.artifacts import Artifacts, Kept
from ferrum.errors import FerrumError, StepError, did_you_mean
from ferrum.events import Event
from ferrum.executor import Actors
from ferrum.governance.policy import Policy
from ferrum.inline.attempt import Attempt
from ferrum.inline.run import Run, State
from ferrum.inline.script import Said
from ferrum.inline.shared import Shared
from ferrum.plan import Plan
from ferrum.record import Verdict, new_run_id
from ferrum.results import RunStatus
from ferrum.settings import redact
from ferrum.untrusted import Marks


class Stuck(FerrumError):
    """The run waits for what will not come: a person, a signal."""


class Clock(Protocol):
    """Which time it is. Delays are those of the event loop."""

    def now(self) -> float:
        """Seconds since 1970."""
        ...

    def busy(self) -> AbstractContextManager[object]:
        """Held while something goes on that takes real time."""
        ...


class WallClock:
    def now(self) -> float:
        return time.time()

    def busy(self) -> AbstractContextManager[object]:
        return nullcontext()


@dataclass(frozen=True, slots=True)
class Ask:
    """Something that waits for a person."""

    #: A step of a sub-workflow stands behind the step that runs it: `report/gate`.
    step_id: str
    #: What the person is asked.
    message: str
    #: The act itself, as it would be sent, where the policy asks about one.
    act: JsonValue


#: A person: yes, no, more than that, or `None` for no answer.
Person = Callable[[Ask], bool | Verdict | Awaitable[bool | Verdict | None] | None]


class World:
    def __init__(
        self, *, actors: Actors, policy: Policy, artifacts: Artifacts, approve: Person | None, clock: Clock,
        shared: Shared, workflows: Mapping[str, Mapping[str, JsonValue]], threads: Executor,
        random: Callable[[], float], tell: Callable[[Event], None], own: Collection[str],
    ) -> None:  # fmt: skip
        self.actors = actors
        self.policy = policy
        self.artifacts = artifacts
        self.clock = clock
        self.shared = shared
        self.threads = threads
        self.random = random
        self.tell = tell
        #: Acts that are code of this process itself, by kind and target: nobody decides about them.
        self.own = own
        #: By id, in the order in which they were begun.
        self.runs: dict[str, Run] = {}
        self._approve = approve
        self._workflows = workflows
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Signals that will be sent.
        self._later: list[asyncio.TimerHandle] = []
        self._root: Run | None = None
        self._last_ms, self._number = 0, 0

    async def run(self, plan: Plan, given: Mapping[str, JsonValue], said: Said) -> Run:
        """Run it, and all that it starts, to its end. Raises `InputError`, and `Stuck`."""
        root = self._begin(plan, given, said, None)
        self._root = root
        root.begin()
        self.look()
        try:
            await self._done
        finally:
            await self._stop()
        return root

    async def _stop(self) -> None:
        for run in self.runs.values():
            run.stop()
        for handle in self._later:
            handle.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def now(self) -> float:
        return self.clock.now()

    def opened(self, envelope: str) -> JsonValue:
        return self.artifacts.resolve(Kept.loads(envelope)) if envelope else None

    def at(self, delay_s: float, then: Callable[[], None]) -> asyncio.TimerHandle:
        return self._loop.call_later(delay_s, then)

    def event_id(self) -> str:
        """The next in the order of all runs."""
        ms = round(self.now() * 1000)
        self._last_ms, self._number = (ms, 0) if ms > self._last_ms else (self._last_ms, self._number + 1)
        return f"{self._last_ms}-{self._number}"

    # Runs.

    def new_run(
        self, document: Mapping[str, object], given: Mapping[str, JsonValue], up: tuple[Run, str], fed: frozenset[str]
    ) -> Run:
        """A run inside of another one; it begins once there is somebody to come back to. Raises `AuthorError`."""
        return self._begin(Plan.of(document), given, up[0].said.inside(up[1]), up, fed)

    def _begin(
        self, plan: Plan, given: Mapping[str, JsonValue], said: Said, up: tuple[Run, str] | None,
        fed: frozenset[str] = frozenset(),
    ) -> Run:  # fmt: skip
        envelope = self.artifacts.keep(plan.workflow.check_input(given)).dumps()
        run_id = new_run_id(beside=up[0].run_id if up else None)
        run = self.runs[run_id] = Run(self, run_id, plan, given=envelope, said=said, marks=Marks.new(fed), up=up)
        for name, sent in said.sent:
            self._send(run, name, sent.after_s, self.artifacts.keep(sent.data).dumps())
        return run

    def _send(self, run: Run, name: str, after_s: float, envelope: str) -> None:
        def due() -> None:
            self._later.remove(handle)
            run.signal(name, envelope)
            self.look()

        if after_s <= 0:
            run.signal(name, envelope)
            return
        handle = self.at(after_s, due)
        self._later.append(handle)

    def registered(self, name: str, version: str | None) -> Mapping[str, JsonValue]:
        """Raises `StepError`."""
        found = self._workflows.get(name)
        if found is None:
            hint = did_you_mean(name, self._workflows)
            raise StepError(f"no workflow {name!r} is registered here{hint}: give workflows={{{name!r}: …}}")
        known = str(found.get("version", "0"))
        if version not in (None, known):
            raise StepError(f"workflow {name!r} has no version {version!r}{did_you_mean(str(version), [known])}")
        return found

    def close(self, run: Run) -> None:
        """Evaluate its outputs and end it."""
        wanted = run.plan.outputs
        try:
            scope = {name: self._opened_of(run, name) for name in wanted.references}
            outputs = self.artifacts.keep(wanted.evaluate(scope)).dumps()
        except FerrumError as error:
            run.close(RunStatus.FAILED, reason=redact(f"the workflow's outputs: {error}"))
        else:
            run.close(RunStatus.COMPLETED, outputs=outputs)

    def _opened_of(self, run: Run, name: str) -> JsonValue:
        return self.opened(run.given if name == "input" else run.steps[name].output)

    # What goes on.

    def start(self, run: Run, step_id: str) -> None:
        """Try a step that is ready."""
        self._spawn(self._attempt(run, step_id))

    async def _attempt(self, run: Run, step_id: str) -> None:
        claim = run.claim(step_id)
        if claim is not None:
            await Attempt(self, claim).go()

    def ask(self, run: Run, step_id: str, state: State, act: object) -> None:
        """Ask whoever answers here."""
        if self._approve is not None:
            ask = Ask(run.path + step_id, state.message, act)  # type: ignore[arg-type] # as the event will hold it
            self._spawn(self._answer(run, step_id, ask, state.token))

    async def _answer(self, run: Run, step_id: str, ask: Ask, token: int) -> None:
        assert self._approve is not None
        said = self._approve(ask)
        if inspect.isawaitable(said):
            said = await said
        if said is not None and run.steps[step_id].token == token:
            run.decide(step_id, said if isinstance(said, Verdict) else Verdict(said, "inline"))

    def let_go(self, run: Run, step_id: str) -> None:
        """A step needs nothing any more of what is shared."""
        who = (run.run_id, step_id)
        self.shared.cache.forget(who)
        self.shared.limits.leave(who)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._done.done():
            self._done.set_exception(error)
        self.look()

    def look(self) -> None:
        """Whether it is at its end, or nothing will bring it there."""
        if self._done.done() or self._root is None:
            return
        # One that was given up by a run that has completed may still undo what it did.
        undoing = any(run.status is RunStatus.COMPENSATING for run in self.runs.values())
        if self._root.status.ended and not undoing:
            self._done.set_result(None)
        elif not self._tasks and not self._later and not any(run.timed for run in self.runs.values()):
            self._done.set_exception(Stuck("\n".join(self._stuck())))

    def _stuck(self) -> Iterator[str]:
        yield "nothing more can happen in this run, and it has not ended:"
        for run in self.runs.values():
            for step_id, state in run.waits():
                if state.kind in _HELP:
                    path = run.path + step_id
                    awaited = run.path + state.awaited
                    yield f"  {path} waits: {state.message}: " + _HELP[state.kind].format(step=path, signal=awaited)


_HELP = {
    "approval": "give approvals={{{step!r}: True}}, or False",
    "ask": "give approvals={{{step!r}: True}}, or False",
    "signal": "give signals={{{signal!r}: …}}",
    "cache": "what it waits for waits itself",
    "limit": "who is in waits itself",
}

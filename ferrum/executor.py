"""One attempt at one step: claim → resolve inputs → decide → act → check output → finish. No Celery in it.

Here is the one place that lets an act happen (`_Attempt.perform`), and the one `except Exception`: even a bug becomes a
recorded result, because the steps behind it wait for one.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol, overload

from pydantic import JsonValue

from ferrum.artifacts import Artifacts, Kept
from ferrum.errors import AuthorError, Denied, FerrumError, SettingsError, StepError, StepTimeout, Unavailable
from ferrum.governance.acts import Act, ModelCall, ModelReply, Reply, ToolCall, ToolReply
from ferrum.governance.door import decide
from ferrum.governance.policy import Decision, Effect, Policy
from ferrum.loop import Blocking, Interrupted, LoopThread
from ferrum.plan import Plan, PlannedStep
from ferrum.record import Claimed, Dropped, Ended, Held, Lost, Need, Over, Passed, Record, Verdict
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.settings import redact
from ferrum.steps import Park

log = logging.getLogger(__name__)

_PLANS_KEPT = 256


class Actors(Protocol):
    """What carries out acts once they are allowed; nothing but the executor calls it."""

    def warm(self) -> None:
        """Import what acts need, so that the first is not slow."""
        ...

    def estimate(self, act: Act) -> Usage:
        """What the act may use at most, so far as one can know before."""
        ...

    async def model(self, call: ModelCall) -> ModelReply: ...

    async def tool(self, call: ToolCall, idempotency_key: str) -> ToolReply: ...


class Then(Enum):
    """What becomes of the message that brought the step."""

    PASS = auto()
    """Its canvas goes on."""
    DROP = auto()
    """Its canvas goes no further: another copy of the message has the step, or its run has ended."""
    WAIT = auto()
    """Its canvas goes no further yet: the step is parked with it."""
    RETURN = auto()
    """It goes back to its queue: this worker is stopping."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the worker must do after an attempt."""

    then: Then
    run_id: str = ""
    plan: Plan | None = None
    #: What must be sent before the message is done with.
    send: Ended = field(default_factory=Ended)
    #: To be released once all that was sent.
    held: Held | None = None


@dataclass(slots=True)
class _Hold:
    held: Held
    #: Stops the attempt; `None` once it has ended, or before it can be stopped.
    stop: Callable[[], None] | None = None
    lost: bool = False
    stopping: bool = False


class Holds:
    """The claims of this process: what the heartbeat renews, and what it can stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holds: dict[Held, _Hold] = {}
        self._released: list[Held] = []
        self._stopping = False

    def add(self, held: Held) -> _Hold:
        with self._lock:
            hold = self._holds[held] = _Hold(held, stopping=self._stopping)
        return hold

    def stoppable(self, hold: _Hold, stop: Callable[[], None] | None) -> None:
        """From here on `stop` stops it; at once where that was asked already."""
        with self._lock:
            hold.stop = stop
            asked = hold.lost or hold.stopping
        if asked and stop is not None:
            stop()

    def drop(self, held: Held) -> None:
        """No longer ours, and nothing to release."""
        with self._lock:
            self._holds.pop(held, None)

    def release(self, held: Held) -> None:
        """Ended, and what follows was sent."""
        with self._lock:
            if self._holds.pop(held, None):
                self._released.append(held)

    def current(self) -> list[Held]:
        with self._lock:
            return list(self._holds)

    def take_released(self) -> list[Held]:
        with self._lock:
            released, self._released = self._released, []
        return released

    def put_back(self, released: Sequence[Held]) -> None:
        with self._lock:
            self._released += released

    def lose(self, lost: Sequence[Held]) -> None:
        """The record says that these are not ours any more."""
        with self._lock:
            holds = [hold for held in lost if (hold := self._holds.get(held))]
            for hold in holds:
                hold.lost = True
        _stop(holds)

    def stop_all(self) -> None:
        """The worker is stopping: running attempts, and any that come after, are handed back."""
        with self._lock:
            self._stopping = True
            holds = list(self._holds.values())
            for hold in holds:
                hold.stopping = True
        _stop(holds)


def _stop(holds: Sequence[_Hold]) -> None:
    for hold in holds:
        if hold.stop is not None:
            hold.stop()


@dataclass(slots=True)
class Executor:
    """What an attempt needs, made once per process."""

    record: Record
    artifacts: Artifacts
    policy: Policy
    actors: Actors
    loop: LoopThread
    worker: str
    lease_s: float
    holds: Holds = field(default_factory=Holds)
    _plans: dict[str, Plan] = field(default_factory=dict)
    _compiling: threading.Lock = field(default_factory=threading.Lock)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def attempt(self, run_id: str, step_id: str, signature: Callable[[], str]) -> Outcome:
        """Try the step once, if the record says that it may run.

        `signature` gives the message to send when the step has waited. Raises nothing but `Unavailable`.
        """
        held = Held(run_id, step_id, f"{self.worker}#{next(self._numbers)}")
        claim = self.record.claim(held, self.worker, self.lease_s)
        match claim:
            case Dropped():
                log.debug("%s.%s dropped: %s", run_id, step_id, claim.why)
                return Outcome(Then.DROP)
            case Passed():
                return Outcome(Then.PASS)
            case Ended():
                return self._after(run_id, self.plan(run_id, self.record.plan_digest(run_id)), claim, None)
        return self._claimed(held, claim, signature)

    def plan(self, run_id: str, digest: str) -> Plan:
        """The plan with this digest, which `run_id` follows."""
        plan = self._plans.get(digest)
        if plan is not None:
            return plan
        # Compiled once, though a wide run brings it to every thread at the same moment.
        with self._compiling:
            if digest not in self._plans:
                plan = Plan.loads(self.record.plan_document(run_id, digest))
                if len(self._plans) >= _PLANS_KEPT:
                    self._plans.pop(next(iter(self._plans)))
                self._plans[digest] = plan
            return self._plans[digest]

    def _claimed(self, held: Held, claim: Claimed, signature: Callable[[], str]) -> Outcome:
        hold = self.holds.add(held)
        try:
            plan = self.plan(held.run_id, claim.plan)
            attempt = _Attempt(self, hold, claim, plan.steps[held.step_id])
            then, send = attempt.go(signature)
            outcome = self._after(held.run_id, plan, send, held) if then is Then.PASS else Outcome(then)
        except (Lost, Over):
            self.holds.drop(held)
            return Outcome(Then.DROP)
        except BaseException:
            # No longer renewed, so that the step is given to another worker.
            self.holds.drop(held)
            raise
        if outcome.held is None:
            self.holds.drop(held)
        return outcome

    def _after(self, run_id: str, plan: Plan, send: Ended, held: Held | None) -> Outcome:
        if send.close:
            self._close(run_id, plan)
        return Outcome(Then.PASS, run_id, plan, send, held)

    def _close(self, run_id: str, plan: Plan) -> None:
        ends = self.record.step_outputs(run_id, plan.outputs.references - {"input"})
        try:
            scope = self.scope(plan.outputs.references, ends, lambda: self.record.input(run_id))
            outputs = self.artifacts.keep(plan.outputs.evaluate(scope)).dumps()
        except Unavailable:
            # Not the workflow's fault: whoever gets this step next closes the run.
            raise
        except FerrumError as error:
            self.record.close(run_id, RunStatus.FAILED, reason=redact(f"the workflow's outputs: {error}"))
        else:
            self.record.close(run_id, RunStatus.COMPLETED, outputs=outputs)

    def scope(
        self, names: frozenset[str], ends: Mapping[str, Need], run_input: Callable[[], str]
    ) -> dict[str, JsonValue]:
        """What expressions see: the input, and the outputs of steps (`None` for one that has none)."""
        scope: dict[str, JsonValue] = {}
        for name in names:
            if name == "input":
                scope[name] = self.artifacts.resolve(Kept.loads(run_input()))
            else:
                end = ends.get(name)
                scope[name] = self.artifacts.resolve(Kept.loads(end.output)) if end and end.output else None
        return scope


class _Attempt:
    """One attempt, from the claim to what became of it; the `Attempt` that step types see."""

    def __init__(self, executor: Executor, hold: _Hold, claim: Claimed, step: PlannedStep) -> None:
        self._executor = executor
        self._hold = hold
        self._claim = claim
        self._step = step
        self._began = time.monotonic()
        self._acts = 0
        #: By the acts of this attempt, and the part of it that the record knows already.
        self._usage = Usage()
        self._settled = Usage()
        #: Held while the record is told of usage: an act may be on its way to it when its attempt is stopped.
        self._telling = threading.Lock()

    @property
    def run_id(self) -> str:
        return self._hold.held.run_id

    @property
    def step_id(self) -> str:
        return self._hold.held.step_id

    @property
    def number(self) -> int:
        return self._claim.attempt

    @property
    def idempotency_key(self) -> str:
        return f"{self.run_id}.{self.step_id}"

    @property
    def timeout_s(self) -> float | None:
        return self._step.timeout_s

    @property
    def verdict(self) -> Verdict | None:
        return self._claim.verdict

    def go(self, signature: Callable[[], str]) -> tuple[Then, Ended]:  # noqa: PLR0911 - one per way to end
        """Raises `Lost`, and `Over` when the run's budget ended it."""
        try:
            scope = self._scope()
            if self._step.when is not None and not self._step.when.evaluate(scope):
                return Then.PASS, self._skip()
            output = self._act(scope)
            envelope = self._executor.artifacts.keep(output).dumps()
        except (Lost, Over):
            raise
        except Park as park:
            self._park(park, signature)
            return Then.WAIT, Ended()
        except _Stopping:
            self._hand_back()
            return Then.RETURN, Ended()
        except StepError as error:
            return self._failed(error, signature)
        except (AuthorError, SettingsError) as error:
            return self._failed(StepError(str(error)), signature)
        except Unavailable as error:
            return self._failed(StepError(str(error), retry=True), signature)
        except Exception as error:
            log.exception("%s.%s: a bug in step type %r", self.run_id, self.step_id, self._step.type.name)
            return self._failed(
                StepError(f"{type(error).__name__}: {error} (a bug in ferrum or in a step type)"), signature
            )
        return Then.PASS, self._finish(StepStatus.COMPLETED, {}, output=envelope)

    def _scope(self) -> dict[str, JsonValue]:
        return self._executor.scope(self._step.references, self._claim.needs, lambda: self._claim.input)

    def _act(self, scope: Mapping[str, JsonValue]) -> JsonValue:
        params = self._step.resolve(scope)
        kind = self._step.type
        if inspect.iscoroutinefunction(kind.run):
            return self._on_loop(kind.run(params, self))
        return self._in_thread(lambda: kind.run(params, self))

    def _on_loop(self, work: Awaitable[JsonValue]) -> JsonValue:
        holds = self._executor.holds
        future = self._executor.loop.submit(self._limited(work))
        holds.stoppable(self._hold, lambda: _cancel(future))
        try:
            return future.result()
        except (CancelledError, asyncio.CancelledError):
            raise (Lost if self._hold.lost else _Stopping) from None
        finally:
            holds.stoppable(self._hold, None)

    async def _limited(self, work: Awaitable[JsonValue]) -> JsonValue:
        try:
            async with asyncio.timeout(self._step.timeout_s) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._too_long() from None

    def _too_long(self) -> StepTimeout:
        return StepTimeout(f"took longer than its timeout of {self._step.timeout_s:g} s", retry=True)

    def _in_thread(self, work: Callable[[], JsonValue | Awaitable[JsonValue]]) -> JsonValue:
        holds, blocking = self._executor.holds, Blocking()
        limit = None if self._step.type.waits else self._step.timeout_s
        alarm = threading.Timer(limit, blocking.interrupt) if limit is not None else None
        if alarm is not None:
            alarm.daemon = True
            alarm.start()
        holds.stoppable(self._hold, blocking.interrupt)
        try:
            result = blocking.run(work)
        except Interrupted:
            if self._hold.lost:
                raise Lost from None
            if self._hold.stopping:
                raise _Stopping from None
            raise self._too_long() from None
        finally:
            if alarm is not None:
                alarm.cancel()
            holds.stoppable(self._hold, None)
        if inspect.isawaitable(result):
            return self._on_loop(result)
        return result

    # The choke point.

    @overload
    async def perform(self, act: ModelCall) -> ModelReply: ...
    @overload
    async def perform(self, act: ToolCall) -> ToolReply: ...
    async def perform(self, act: Act) -> Reply:
        """Let the act happen, if it may: decided, recorded and reserved before it begins.

        Raises `Denied`, `Park` to ask a person, and what the act raises.
        """
        decision = decide(act, self._executor.policy, self._claim.grants)
        await asyncio.to_thread(self._admit, decision, self._executor.actors.estimate(act))
        if decision.effect is Effect.DENY:
            raise Denied(decision.reason)
        if decision.effect is Effect.ASK:
            raise self._ask(act, decision)
        return await self._do(act)

    def _admit(self, decision: Decision, wanted: Usage) -> None:
        with self._telling:
            self._acts += 1
            spent = self._unsettled()
            self._executor.record.admit(
                self._hold.held, self._acts, self._decided(decision),
                allowed=decision.effect is Effect.ALLOW, wanted=wanted, spent=spent,
            )  # fmt: skip
            self._settled += spent

    def _ask(self, act: Act, decision: Decision) -> Denied | Park:
        verdict = self._claim.verdict
        if verdict is not None and self._claim.bound == act.digest:
            if verdict.expired:
                return Denied(f"nobody decided about {act.target} in time")
            return Denied(
                f"{verdict.by or 'a person'} refused {act.target}" + (f": {verdict.note}" if verdict.note else "")
            )
        shown = act.model_dump(mode="json")
        return Park("ask", f"{act.kind} {act.target}: {decision.reason}", act=shown, bound=act.digest)

    async def _do(self, act: Act) -> Reply:
        actors = self._executor.actors
        if isinstance(act, ModelCall):
            reply = await actors.model(act)
            self._usage += reply.usage
            return reply
        # Counted whatever comes of it: the call was made.
        self._usage += Usage(tool_calls=1)
        return await actors.tool(act, self.idempotency_key)

    def _decided(self, decision: Decision) -> dict[str, object]:
        return {**decision.model_dump(mode="json"), "attempt": self.number}

    def _unsettled(self) -> Usage:
        """What was used since the record was last told."""
        return Usage(**{name: getattr(self._usage, name) - getattr(self._settled, name) for name in Usage.model_fields})

    # What becomes of it.

    def _finish(self, status: StepStatus, data: Mapping[str, object], *, output: str = "", denied: str = "") -> Ended:
        seconds = round(time.monotonic() - self._began, 4)
        body = {"attempt": self.number, "seconds": seconds, **data}
        with self._telling:
            return self._executor.record.finish(
                self._hold.held, status, body, output=output, usage=self._unsettled(), denied=denied
            )

    def _skip(self) -> Ended:
        return self._finish(StepStatus.SKIPPED, {"reason": "its 'when' is false"})

    def _failed(self, error: StepError, signature: Callable[[], str]) -> tuple[Then, Ended]:
        message = redact(error.message)
        tries = self._claim.failed_tries + 1
        retry = self._step.retry
        if error.retry and tries < retry.max_attempts:
            delay = retry.delay(tries, random.random(), error.retry_after_s)  # noqa: S311
            self._leave("retry", signature, {"error": message}, wake_in_s=delay)
            return Then.WAIT, Ended()
        denied = message if isinstance(error, Denied) else ""
        return Then.PASS, self._finish(StepStatus.FAILED, {"error": message}, denied=denied)

    def _park(self, park: Park, signature: Callable[[], str]) -> None:
        data = {"message": redact(park.message), "act": park.act}
        self._leave(park.kind, signature, data, wake_in_s=park.wake_in_s, bound=park.bound)

    def _leave(
        self,
        kind: str,
        signature: Callable[[], str],
        data: Mapping[str, Any],
        *,
        wake_in_s: float | None,
        bound: str = "",
    ) -> None:
        with self._telling:
            self._executor.record.park(
                self._hold.held, kind, signature(), {"attempt": self.number, **data},
                wake_in_s=wake_in_s, usage=self._unsettled(), bound=bound,
            )  # fmt: skip

    def _hand_back(self) -> None:
        with self._telling:
            self._executor.record.hand_back(self._hold.held, self._executor.worker, self.number, self._unsettled())


def _cancel(future: Future[JsonValue]) -> None:
    future.cancel()


class _Stopping(Exception):
    pass

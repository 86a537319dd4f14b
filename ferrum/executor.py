"""One attempt at one step: claim → resolve inputs → decide → act → check output → finish. No Celery in it.

Here is the one place that lets an act happen (`_Attempt._decide`), and the one `except Exception`: even a bug becomes a
recorded result, because the steps behind it wait for one.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Protocol

from pydantic import JsonValue

from ferrum import cache as cached
from ferrum import limits
from ferrum.artifacts import Artifacts, Kept
from ferrum.breaker import Allowed, Breaker, Breaking, State
from ferrum.cache import Cache, Hit, base_of_digest, digest_of
from ferrum.errors import (
    LONGEST_ERROR,
    AuthorError,
    Conflict,
    Denied,
    FerrumError,
    NotFound,
    SettingsError,
    StepError,
    StepTimeout,
    Unavailable,
    WorkflowError,
    bug,
)
from ferrum.governance.acts import Act, By, R
from ferrum.governance.door import decide
from ferrum.governance.policy import Decision, Effect, Policy
from ferrum.keeper import clock
from ferrum.limits import Concurrency, Entered, Limits, Rate
from ferrum.loop import Blocking, Interrupted, LoopThread, contained, contained_on_loop
from ferrum.plan import PARAMS, Body, Plan, PlannedStep
from ferrum.record import (
    MAX_DEPTH,
    SPREAD_BATCH,
    Claimed,
    Dropped,
    Ended,
    FrameEnd,
    Frames,
    Held,
    Lost,
    Need,
    Over,
    Passed,
    Record,
    Resend,
    TooDeep,
    Verdict,
    base_of,
    new_run_id,
)
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.scripts import Who
from ferrum.settings import redact
from ferrum.steps import Done, Health, Inside, Park, Skip
from ferrum.untrusted import Marks
from ferrum.voice import Voice
from ferrum.workflow import Step

log = logging.getLogger(__name__)

_PLANS_KEPT = 256
#: What a step can wait for besides a person, its time and a signal.
CHILDREN, RUN, CACHE, LIMIT = "children", "run", "cache", "limit"


class Actors(Protocol):
    """What carries out acts once they are allowed; nothing but the executor calls it."""

    async def warm(self, kinds: frozenset[str]) -> None:
        """Make ready what acts of these kinds need, so that the first is not slow, and say what is missing."""
        ...

    def estimate(self, act: Act[Any]) -> Usage:
        """What the act may use at most, so far as one can know before."""
        ...

    async def carry_out(self, act: Act[R], by: By) -> R: ...


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
    sends: tuple[Resend, ...] = ()
    #: To be released once all that was sent.
    held: Held | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """What steps of all runs share the use of."""

    limits: Limits
    cache: Cache
    breaker: Breaker

    @classmethod
    def of(cls, record: Record, breaking: Breaking | None = None) -> Shared:
        scripts = record.scripts()
        return cls(Limits(scripts), Cache(scripts), Breaker(scripts, breaking))


#: What a keeper is told (see `ferrum/keeper.py`).
Line = list[Any]
#: Tells it: a line, and how to get all that a new one must know.
Tell = Callable[[Line, Callable[[], Sequence[Line]]], None]


@dataclass(slots=True)
class _Hold:
    held: Held
    #: When its lease was last renewed for certain, by `clock`.
    renewed: float = 0.0
    #: The slot that it has, and the digest of what it computes for all.
    slot: str = ""
    digest: str = ""

    #: Whether the record has said so; until then it is only told to the keeper.
    claimed: bool = False
    #: Of the message that brought it, at the broker.
    tag: str = ""
    #: When its act is to be over; `None` where it has all the time there is.
    until: float | None = None
    #: It may finish though its lease could not be renewed.
    finishes: bool = False

    #: Stops the attempt; `None` once it has ended, or before it can be stopped.
    stop: Callable[[], None] | None = None
    lost: bool = False
    stopping: bool = False
    #: Its lease could not be renewed in time.
    cut_off: bool = False

    @property
    def line(self) -> Line:
        held = self.held
        said: dict[str, object] = {"base": base_of(held.run_id), "run": held.run_id, "step": held.step_id}
        if self.until is not None:
            said["until"] = self.until
        if self.slot:
            said["slot"] = self.slot
        if self.digest:
            said["digest"] = [base_of_digest(self.digest), self.digest]
        if self.tag:
            said["tag"] = self.tag
        return ["+", held.token, self.renewed, said]

    @property
    def shared(self) -> list[tuple[str, str]]:
        """Both, as the record keeps them."""
        return [pair for pair in ((LIMIT, self.slot), (CACHE, self.digest)) if pair[1]]


class Holds:
    """The claims of this process: what the heartbeat renews, and what it can stop."""

    def __init__(self, limit_s: float = math.inf) -> None:
        """`limit_s`: an act that was not renewed for so long is stopped, before its lease is over."""
        self.limit_s = limit_s
        self._lock = threading.RLock()
        self._holds: dict[Held, _Hold] = {}
        self._released: list[Held] = []
        self._stopping = False
        self._tell: Tell | None = None
        self._answers: Callable[[], Sequence[Line]] = list

    def listen(self, tell: Tell, answers: Callable[[], Sequence[Line]]) -> None:
        """Tell a keeper of each claim from here on, and hear what it answers."""
        self._tell, self._answers = tell, answers

    def say(self, line: Line) -> None:
        # Under the lock, or what was dropped might be told as held.
        with self._lock:
            if self._tell is not None:
                self._tell(line, lambda: [hold.line for hold in self._holds.values()])

    def _say(self, hold: _Hold) -> None:
        if self._tell is not None:
            self.say(hold.line)

    def hear(self) -> None:
        """Take in what the keeper did while this process could not."""
        # Under the lock: whoever finds a claim too old must not be told so while the news is on its way.
        with self._lock:
            for answer in self._answers():
                if answer[0] == "!":
                    self.lose(self._of(answer[1]))
                else:
                    self.renewed(self._of(answer[2]), answer[1])

    def add(self, held: Held, tag: str = "") -> _Hold:
        """Before it is claimed: what holds the interpreter while the answer is on its way must not cost the lease."""
        with self._lock:
            hold = self._holds[held] = _Hold(held, clock(), tag=tag, stopping=self._stopping)
            self._say(hold)
        return hold

    def stoppable(self, hold: _Hold, stop: Callable[[], None] | None, limit_s: float | None = None) -> None:
        """From here on `stop` stops it; at once where that was asked already. `limit_s`: how long it may take."""
        with self._lock:
            hold.stop = stop
            asked = stop is not None and not self.may_act(hold)
            if stop is not None and limit_s is not None:
                hold.until = clock() + limit_s
                self._say(hold)
        if asked and stop is not None:
            stop()

    def may_act(self, hold: _Hold) -> bool:
        """Tell whether an act of it may begin: it is held for certain, and nobody asked it to stop."""
        with self._lock:
            if self._is_old(hold):
                self.hear()
                hold.cut_off = hold.cut_off or self._is_old(hold)
            return not (hold.lost or hold.stopping or hold.cut_off)

    def has_slot(self, hold: _Hold, slot: str) -> None:
        with self._lock:
            hold.slot = slot
            if slot:
                self._say(hold)

    def computes(self, hold: _Hold, digest: str) -> None:
        with self._lock:
            hold.digest = digest
            self._say(hold)

    def drop(self, held: Held) -> None:
        """No longer ours, and nothing to release."""
        with self._lock:
            if self._holds.pop(held, None):
                self.say(["-", held.token])

    def release(self, held: Held) -> None:
        """Ended, and what follows was sent."""
        with self._lock:
            if self._holds.pop(held, None):
                self._released.append(held)
                self.say(["-", held.token])

    def _of(self, tokens: Sequence[str]) -> list[Held]:
        wanted = frozenset(tokens)
        return [held for held in self._holds if held.token in wanted]

    def is_fresh(self, hold: _Hold) -> bool:
        with self._lock:
            if clock() - hold.renewed > self.limit_s:
                self.hear()
            return clock() - hold.renewed <= self.limit_s

    def _is_old(self, hold: _Hold) -> bool:
        return not hold.finishes and clock() - hold.renewed > self.limit_s

    def renewed(self, held: Sequence[Held], at: float) -> None:
        """Count these, but for the lost, as certain for a lease from then on, by `clock`."""
        with self._lock:
            for one in held:
                if (hold := self._holds.get(one)) and not hold.lost:
                    hold.renewed = max(hold.renewed, at)

    def cut_off(self) -> None:
        """Stop every act that was not renewed for too long: soon somebody else may begin it."""
        with self._lock:
            self.hear()
            acting = [hold for hold in self._holds.values() if hold.stop is not None and not hold.cut_off]
            late = [hold for hold in acting if self._is_old(hold)]
            for hold in late:
                hold.cut_off = True
        if late:
            log.warning("%d acts are stopped: their leases could not be renewed in time", len(late))
        _stop(late)

    def slots(self) -> list[tuple[str, Who]]:
        """The slots that running steps have."""
        with self._lock:
            return [(hold.slot, _who(hold.held)) for hold in self._holds.values() if hold.slot]

    def digests(self) -> list[tuple[str, Who]]:
        """What running steps compute for all."""
        with self._lock:
            return [(hold.digest, _who(hold.held)) for hold in self._holds.values() if hold.digest]

    def current(self) -> list[Held]:
        with self._lock:
            return [held for held, hold in self._holds.items() if hold.claimed]

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


def _who(held: Held) -> Who:
    return Who(held.run_id, held.step_id)


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
    breaking: Breaking | None = None
    #: Step types that finish though their leases could not be renewed; `*` for all.
    finishing: frozenset[str] = frozenset()
    holds: Holds = field(default_factory=Holds)
    shared: Shared = field(init=False)
    _plans: dict[str, Plan] = field(default_factory=dict)
    _compiling: threading.Lock = field(default_factory=threading.Lock)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.shared = Shared.of(self.record, self.breaking)
        self.holds.limit_s = self.lease_s * 7 / 8

    def wake_at_limit(self, whos: Sequence[Who]) -> tuple[Resend, ...]:
        """Wake these, whose turn came; what must be sent."""
        return self.wake(whos, LIMIT, "its turn came", instead=self.shared.limits.forget)

    def wake_at_cache(self, digest: str, whos: Sequence[Who], why: str) -> tuple[Resend, ...]:
        """Wake these, who wait for that; what must be sent."""
        return self.wake(whos, CACHE, why, instead=lambda who: self.shared.cache.give_up(digest, who))

    def wake(
        self, whos: Sequence[Who], kind: str, why: str, *, instead: Callable[[Who], Sequence[Who]] = lambda _: ()
    ) -> tuple[Resend, ...]:
        """Wake these, if they wait for that; what must be sent. Who has ended says who is to be woken `instead`."""
        sends: list[Resend] = []
        left = list(whos)
        while left:
            who = left.pop(0)
            try:
                sends += self.record.wake(who.run_id, who.step_id, kind, why)
            except Lost:
                left += instead(who)
        return tuple(sends)

    @property
    def hold_s(self) -> float:
        """How long what is shared is held unless it is renewed."""
        return 2 * self.lease_s

    def keep_shared(self) -> tuple[Resend, ...]:
        """Renew what steps hold whose parts run, and give back what those held that have ended; what must be sent."""
        found = [(one, Who(one.run_id, one.step_id)) for one in self.record.holding()]
        going = {
            kind: [(one.key, who) for one, who in found if one.going and one.kind == kind] for kind in (LIMIT, CACHE)
        }
        self.shared.limits.renew(going[LIMIT], self.hold_s)
        self.shared.cache.renew(going[CACHE], self.hold_s)
        sends: tuple[Resend, ...] = ()
        for one, who in found:
            if not one.going and one.kind == LIMIT:
                sends += self.wake_at_limit(self.shared.limits.leave(who, one.key))
            elif not one.going:
                left = self.shared.cache.give_up(one.key, who)
                sends += self.wake_at_cache(one.key, left, "it may compute it")
        return sends

    def share(self) -> tuple[Resend, ...]:
        """Give to those who wait what the dead held of what all share; what must be sent."""
        sends = self.wake_at_limit(self.shared.limits.sweep())
        for digest, who in self.shared.cache.sweep():
            sends += self.wake_at_cache(digest, [who], "it may look again")
        return sends

    def attempt(self, run_id: str, step_id: str, signature: Callable[[], str], tag: str = "") -> Outcome:
        """Try the step once, if the record says that it may run.

        `signature` gives the message to send when the step has waited; `tag` is that message's at the broker. Raises
        nothing but `Unavailable`.
        """
        held = Held(run_id, step_id, f"{self.worker}#{next(self._numbers)}")
        hold = self.holds.add(held, tag)
        try:
            claim = self._claim(hold)
            hold.claimed = isinstance(claim, Claimed)
        finally:
            if not hold.claimed:
                self.holds.drop(held)
        try:
            match claim:
                case Dropped():
                    log.debug("%s.%s dropped: %s", run_id, step_id, claim.why)
                    return Outcome(Then.DROP)
                case Passed():
                    return Outcome(Then.PASS)
                case Ended():
                    return self._after(run_id, self.plan_of(run_id), claim, None)
            return self._claimed(hold, claim, signature)
        except WorkflowError as error:
            return self._cannot_read(run_id, error)

    def _cannot_read(self, run_id: str, error: WorkflowError) -> Outcome:
        """End a run whose plan has what this ferrum does not know; no attempt at any of its steps can say so."""
        reason = (
            f"this worker cannot read the plan of the run: {error}; run the same ferrum, with the same step types, on "
            "all workers, then resume it"
        )
        log.error("%s: %s", run_id, redact(reason))
        with suppress(Conflict, NotFound):
            self.record.cancel(run_id, f"worker {self.worker}", redact(reason)[:LONGEST_ERROR])
        return Outcome(Then.DROP)

    def _claim(self, hold: _Hold) -> Claimed | Passed | Dropped | Ended:
        while True:
            asked_at = clock()
            claim = self.record.claim(hold.held, self.worker, self.lease_s)
            self.holds.renewed([hold.held], asked_at)
            # The answer may be as old as the lease that it speaks of; who asks again with its token renews that.
            if not isinstance(claim, Claimed) or self.holds.is_fresh(hold):
                return claim

    def plan_of(self, run_id: str) -> Plan:
        """The plan that a run follows. Raises `NotFound`."""
        return self.plan(run_id, self.record.plan_digest(run_id))

    def plan(self, run_id: str, digest: str) -> Plan:
        """The plan with this digest, which `run_id` follows."""
        plan = self._plans.get(digest)
        if plan is not None:
            return plan
        # Compiled once, though a wide run brings it to every thread at the same moment.
        with self._compiling:
            if digest not in self._plans:
                self.remember(Plan.loads(self.record.plan_document(run_id, digest)), digest)
            return self._plans[digest]

    def remember(self, plan: Plan, digest: str | None = None) -> Plan:
        """Keep a plan that steps of this process will soon ask for; another ferrum may have given it another digest."""
        if len(self._plans) >= _PLANS_KEPT:
            self._plans.pop(next(iter(self._plans)), None)
        return self._plans.setdefault(digest or plan.digest, plan)

    def _claimed(self, hold: _Hold, claim: Claimed, signature: Callable[[], str]) -> Outcome:
        held = hold.held
        attempt: _Attempt | None = None
        try:
            plan = self.plan(held.run_id, claim.plan)
            attempt = _Attempt(self, hold, claim, plan, plan.step(held.step_id))
            then, send = attempt.go(signature)
            if then is Then.PASS:
                return self._after(held.run_id, plan, send, held)
        except Over as over:
            self.holds.drop(held)
            sends = attempt.give_way() if attempt else ()
            return Outcome(Then.DROP, held.run_id, sends=over.sends + sends)
        except Lost:
            self.holds.drop(held)
            sends = attempt.give_way() if attempt else ()
            return Outcome(Then.DROP, held.run_id, sends=sends) if sends else Outcome(Then.DROP)
        except BaseException:
            # No longer renewed, so that the step is given to another worker.
            self.holds.drop(held)
            raise
        self.holds.drop(held)
        return Outcome(then, held.run_id, plan, send.sends)

    def _after(self, run_id: str, plan: Plan, send: Ended, held: Held | None) -> Outcome:
        sends = send.sends + self._close(run_id, plan) if send.close else send.sends
        return Outcome(Then.PASS, run_id, plan, sends, held)

    def _close(self, run_id: str, plan: Plan) -> tuple[Resend, ...]:
        ends = self.record.step_outputs(run_id, plan.outputs.references - {"input"})
        try:
            scope = self.scope(plan.outputs.references, ends, lambda: self.record.input(run_id))
            outputs = self.artifacts.keep(plan.outputs.evaluate(scope)).dumps()
        except Unavailable:
            # Not the workflow's fault: whoever gets this step next closes the run.
            raise
        except FerrumError as error:
            return self.record.close(run_id, RunStatus.FAILED, reason=redact(f"the workflow's outputs: {error}"))
        except Exception as error:
            # Else whoever gets the step next meets it again, and the run never ends.
            log.exception("%s: its outputs", run_id)
            return self.record.close(run_id, RunStatus.FAILED, reason=redact(f"the workflow's outputs: {bug(error)}"))
        return self.record.close(run_id, RunStatus.COMPLETED, outputs=outputs)

    def scope(
        self, names: frozenset[str], ends: Mapping[str, Need], run_input: Callable[[], str]
    ) -> dict[str, JsonValue]:
        """What expressions see: the input, and the outputs of steps (`None` for one that has none)."""
        scope: dict[str, JsonValue] = {}
        for name in names:
            if name == "input":
                scope[name] = self.opened(run_input())
            else:
                end = ends.get(name)
                scope[name] = self.opened(end.output) if end else None
        return scope

    def opened(self, envelope: str) -> JsonValue:
        """What an envelope holds; `None` where there is none."""
        return self.artifacts.resolve(Kept.loads(envelope)) if envelope else None


class _Attempt:
    """One attempt, from the claim to what became of it; the `Attempt` that step types see."""

    def __init__(self, executor: Executor, hold: _Hold, claim: Claimed, plan: Plan, step: PlannedStep) -> None:
        self._executor = executor
        self._hold = hold
        self._claim = claim
        self._plan = plan
        self._step = step
        #: What its expressions see, once it was looked at.
        self._scoped: dict[str, JsonValue] = {}
        #: Whether what it is parked for is there by now.
        self._look_again: Callable[[], bool] | None = None
        self._began = time.monotonic()
        hold.finishes = not executor.finishing.isdisjoint(("*", step.type.name))
        self._acts = 0
        self._said = 0
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

    @property
    def memory(self) -> JsonValue:
        return self._claim.memory

    def now(self) -> float:
        return self._claim.at + time.monotonic() - self._began

    @property
    def marks(self) -> Marks:
        return self._claim.marks

    def signal(self) -> tuple[JsonValue] | None:
        return (self._executor.opened(self._claim.signal),) if self._claim.signal else None

    def go(self, signature: Callable[[], str]) -> tuple[Then, Ended]:
        """Raises `Lost`, `Over` when the run's budget ended it, and `Unavailable` when Redis is away.

        Nothing else: what the step did may not be done again for want of words to record it with.
        """
        try:
            return self._go(signature)
        except (Lost, Over, Unavailable):
            raise
        except Exception as error:
            log.exception("%s.%s: what came of it cannot be recorded", self.run_id, self.step_id)
            return Then.PASS, self._finish(StepStatus.FAILED, {"error": redact(bug(error))[:LONGEST_ERROR]})

    def _go(self, signature: Callable[[], str]) -> tuple[Then, Ended]:  # noqa: PLR0911 - one per way to end
        try:
            self._scoped = self._scope()
            tried = self._alternative()
            if tried is None and self._step.when is not None and not self._step.when.evaluate(self._scoped):
                raise Skip("its 'when' is false")
            if (found := self._look_up()) is not None:
                return Then.PASS, self._finish(StepStatus.COMPLETED, {"cached": True}, output=found)
            if tried is not None:
                return self._fell_back(*tried, signature)
            output = self._act(self._scoped)
            envelope = self._executor.artifacts.keep(output).dumps()
        except (Lost, Over):
            raise
        except (Park, Inside, Skip, _Stopping) as left:
            return self._left(left, signature)
        except StepError as error:
            return self._failed(error, signature)
        except (AuthorError, SettingsError) as error:
            return self._failed(StepError(str(error)), signature)
        except Unavailable as error:
            away = StepError(str(error), retry=True)
            away.kind = "unavailable"
            return self._failed(away, signature)
        except Exception as error:
            log.exception("%s.%s: a bug in step type %r", self.run_id, self.step_id, self._step.type.name)
            return self._failed(StepError(bug(error)), signature)
        return Then.PASS, self._finish(StepStatus.COMPLETED, {}, output=envelope)

    def _left(self, why: Park | Inside | Skip | _Stopping, signature: Callable[[], str]) -> tuple[Then, Ended]:
        match why:
            case Park():
                return Then.WAIT, self._park(why, signature)
            case Inside():
                return Then.WAIT, self._inside(why, signature)
            case Skip():
                return Then.PASS, self._finish(StepStatus.SKIPPED, {"reason": redact(str(why))})
            case _:
                return Then.RETURN, self._hand_back(str(why))

    def _scope(self) -> dict[str, JsonValue]:
        step = self._step
        scope = self._seen(step.references - {"params"}, "")
        if (undone := step.params_of) is not None:
            scope["params"] = undone.params.evaluate(self._seen(undone.references, PARAMS))
        return scope

    def _seen(self, names: frozenset[str], prefix: str) -> dict[str, JsonValue]:
        """What these names stand for, which the claim has with this before them."""
        claim = self._claim
        numbers = {name: _number(self.step_id, parts) for name, parts in self._step.numbers}
        ends = {name: claim.needs[prefix + name] for name in names if prefix + name in claim.needs}
        scope = self._executor.scope(names, ends, lambda: claim.input)
        return scope | {name: numbers[prefix + name] for name in names if prefix + name in numbers}

    def _act(self, scope: Mapping[str, JsonValue]) -> JsonValue:
        params = self._plan.resolved(self._step, scope, self.marks)
        self._take_turn(scope)
        kind = self._step.type
        if (own := kind.act(params)) is not None:
            self._decide(own)
            self._usage += own.counts
        if inspect.iscoroutinefunction(kind.run):
            return self._on_loop(kind.run(params, self))
        return self._in_thread(lambda: kind.run(params, self))

    # What it shares with other runs.

    @property
    def _who(self) -> Who:
        return _who(self._hold.held)

    def _look_up(self) -> str | None:
        """The envelope that is in the cache; `None` where this step is the one that computes it, or has no cache.

        Raises `Park` while another one computes it.
        """
        cache = self._step.spec.cache
        if self._step.cache is None or cache is None:
            return None
        workflow = self._plan.workflow.name
        scope = "global" if cache.scope == "global" else f"{workflow}.{self._step.id}"
        digest = digest_of(scope, self._step.cache.evaluate(self._scoped))

        def enter() -> Hit | cached.Compute | cached.Wait:
            return self._executor.shared.cache.enter(digest, self._who, self._executor.hold_s)

        match enter():
            case Hit(envelope):
                return envelope
            case cached.Wait(wake_in_s):
                self._look_again = lambda: not isinstance(enter(), cached.Wait)
                raise Park(CACHE, "for another step that computes the same", wake_in_s)
            case _:
                self._executor.holds.computes(self._hold, digest)
                return None

    def _take_turn(self, scope: Mapping[str, JsonValue]) -> None:
        """Raises `Park` while there are as many others as there may be."""
        if self._step.limits is None:
            return
        keys = self._step.limits.evaluate(scope)
        assert isinstance(keys, dict)
        spec = self._step.spec
        concurrency = Concurrency(str(keys["concurrency"]), spec.concurrency.limit) if spec.concurrency else None
        rate = Rate(str(keys["rate"]), spec.rate.limit, spec.rate.per) if spec.rate else None

        def enter() -> Entered | limits.Wait:
            return self._executor.shared.limits.enter(
                self._who, concurrency, rate, hold_s=self._executor.hold_s, attempt=self.number
            )

        turn = enter()
        if not isinstance(turn, Entered):
            self._look_again = lambda: isinstance(enter(), Entered)
            raise Park(LIMIT, turn.why, turn.wake_in_s)
        self._executor.holds.has_slot(self._hold, concurrency.key if concurrency else "")

    def _let_go(self, envelope: str = "") -> tuple[Resend, ...]:
        """Give back what is shared, and to the cache what was computed; what must be sent."""
        shared, wake = self._executor.shared.cache, self._executor.wake_at_cache
        sends = self._leave_slot()
        cache = self._step.spec.cache
        if self._hold.digest and cache is not None:
            digest, self._hold.digest = self._hold.digest, ""
            if envelope:
                sends += wake(digest, shared.put(digest, self._who, envelope, cache.ttl), "it is there")
            else:
                sends += wake(digest, shared.give_up(digest, self._who), "it may compute it")
        return sends

    def give_way(self) -> tuple[Resend, ...]:
        """Its claim was lost: what is shared is given back, unless the step goes on elsewhere and needs it."""
        if not self._hold.shared:
            return ()
        try:
            self._executor.record.wake(self.run_id, self.step_id, "", "")
        except Lost:
            return self._let_go()
        return ()

    def _leave_slot(self) -> tuple[Resend, ...]:
        slot, self._hold.slot = self._hold.slot, ""
        limits = self._executor.shared.limits
        return self._executor.wake_at_limit(limits.leave(self._who, slot)) if slot else ()

    # What composed steps ask for.

    @property
    def spec(self) -> Step:
        return self._step.spec

    @property
    def address(self) -> str:
        return f"{self._plan.workflow.name}.{self._step.id}"

    @property
    def own_label(self) -> str:
        # Not of the attempt: one that died with its worker was no try.
        return "" if "" in self._step.bodies else str(self._claim.failed_tries + 1)

    def frame(self, label: str) -> Done:
        frame = f"{self.step_id}.{label}" if label else self.step_id
        body = self._step.bodies.get(label) or self._step.bodies["*"]
        return self._done(body, [frame])[0]

    def frames(self, count: int) -> Iterator[Done]:
        body = self._step.bodies["*"]
        for start in range(0, count, SPREAD_BATCH):
            yield from self._done(body, [f"{self.step_id}.{n}" for n in range(start, min(start + SPREAD_BATCH, count))])

    def _done(self, body: Body, frames: Sequence[str]) -> list[Done]:
        wanted = set(body.last) if body.output is None else body.output.references & body.steps.keys()
        if self._step.until is not None:
            wanted |= self._step.until.references & body.steps.keys()
        names = [name for name in body.steps if name in wanted]
        own = self._step.own_names
        seen = body.output is not None and own is not None and own[0] in body.output.references
        ends = self._executor.record.frame_ends(self.run_id, frames, names, items=seen)
        return [self._one_done(body, frame, end) for frame, end in zip(frames, ends, strict=True)]

    def _one_done(self, body: Body, frame: str, end: FrameEnd) -> Done:
        if end.failed:
            where = "" if "" in body.steps else f"{end.failed!r} failed: "
            return Done(end.over, error=where + end.error, denied=end.denied)
        outputs = {name: self._executor.opened(need.output) for name, need in end.ends.items()}
        if not end.over:
            return Done(over=False, outputs=outputs)
        if body.output is not None:
            output = body.output.evaluate({**self._scoped, **self._own(frame, end.item), **outputs})
        else:
            last = body.last
            output = outputs.get(last[0]) if len(last) == 1 else {name: outputs.get(name) for name in last}
        return Done(over=True, output=output, outputs=outputs)

    def _own(self, frame: str, item: str) -> dict[str, JsonValue]:
        """What is a frame's own."""
        if (own := self._step.own_names) is None:
            return {}
        return {own[0]: self._executor.opened(item), own[1]: int(frame.rpartition(".")[2])}

    def until(self, done: Done, label: str) -> bool:
        assert self._step.until is not None
        own = {self._step.spec.id: done.output, "round": int(label), "previous": done.output}
        return bool(self._step.until.evaluate({**self._scoped, **done.outputs, **own}))

    def start_run(
        self, workflow: Mapping[str, JsonValue], input: Mapping[str, JsonValue], budget: Mapping[str, JsonValue] | None
    ) -> str:
        document = dict(workflow) if budget is None else {**workflow, "budget": dict(budget)}
        plan = self._executor.remember(Plan.of(document))
        checked = plan.workflow.check_input(input)
        # Whoever had this try before may have died when the run was there and the step not yet parked.
        key = f"{self.idempotency_key}#{self._claim.failed_tries + 1}"
        run = plan.new_run(
            new_run_id(beside=self.run_id), key, self._executor.artifacts.keep(checked).dumps(),
            tenant=self._claim.tenant, parent=(self.run_id, self.step_id),
            fed=self._plan.feeding(self._step, "input", self.marks.fed),
        )  # fmt: skip
        try:
            return self._executor.record.create(run).run_id
        except TooDeep:
            raise StepError(f"workflows are inside of each other more than {MAX_DEPTH} deep") from None

    def registered(self, name: str, version: str | None) -> Mapping[str, JsonValue]:
        try:
            return self._executor.record.registered(name, version)
        except NotFound as error:
            raise StepError(str(error)) from None

    def run_end(self, run_id: str) -> Done:
        ended = self._executor.record.ending(run_id, 0)
        if ended is None:
            return Done(over=False)
        if ended.status is RunStatus.COMPLETED:
            return Done(over=True, output=self._executor.opened(ended.output or ""))
        why = f"{run_id} {ended.status}" + (f": {ended.reason}" if ended.reason else "")
        return Done(over=True, error=why, denied=why if ended.status is RunStatus.POLICY_BLOCKED else "")

    def health(self, targets: Sequence[str]) -> Mapping[str, Health]:
        known = self._executor.shared.breaker.health(targets)
        return {name: Health(one.state is not State.OPEN, one.failures, one.latency_ms) for name, one in known.items()}

    def allowed(self, target: str) -> bool:
        return isinstance(self._executor.shared.breaker.allow(target, self._who), Allowed)

    def report(self, target: str, *, ok: bool, latency_ms: float) -> None:
        self._executor.shared.breaker.report(target, self._who, ok=ok, latency_ms=latency_ms)

    # What happens instead when it failed.

    def _alternative(self) -> tuple[int, list[str]] | None:
        """The number of the alternative that was tried last, and what went wrong before it."""
        memory = self._claim.memory
        if not (isinstance(memory, dict) and "fallback" in memory):
            return None
        errors = memory["errors"]
        assert isinstance(errors, list)
        return int(str(memory["fallback"])), [str(error) for error in errors]

    @property
    def _denied(self) -> str:
        """What the policy had against a try before this one."""
        memory = self._claim.memory
        return str(memory.get("denied", "")) if isinstance(memory, dict) else ""

    def _fell_back(self, number: int, errors: list[str], signature: Callable[[], str]) -> tuple[Then, Ended]:
        done = self.frame(f"fallback{number}")
        if not done.error and done.over:
            envelope = self._executor.artifacts.keep(done.output).dumps()
            return Then.PASS, self._finish(
                StepStatus.COMPLETED, {"fallback": number, "errors": errors}, output=envelope
            )
        return self._give_up([*errors, done.error or "it did not end"], number, self._denied or done.denied, signature)

    def _give_up(self, errors: list[str], number: int, denied: str, signature: Callable[[], str]) -> tuple[Then, Ended]:
        """Every try has failed: the next alternative, or the end."""
        if number < self._step.fallbacks:
            memory: JsonValue = {"fallback": number + 1, "errors": list[JsonValue](errors), "denied": denied}
            left = Inside(
                f"fallback {number + 1}: {errors[-1]}", label=f"fallback{number + 1}", items=[errors[-1]], memory=memory
            )
            # Its own act is over, and so is its turn.
            sends = self._leave_slot()
            ended = self._inside(left, signature)
            return Then.WAIT, replace(ended, sends=ended.sends + sends)
        data: dict[str, object] = {"error": errors[0], "errors": errors[1:]} if errors[1:] else {"error": errors[0]}
        if self._step.tolerated:
            data["tolerated"] = True
        return Then.PASS, self._finish(StepStatus.FAILED, data, denied=denied)

    def _on_loop(self, work: Awaitable[JsonValue]) -> JsonValue:
        holds = self._executor.holds
        future = self._executor.loop.submit(self._limited(work))
        holds.stoppable(self._hold, lambda: _cancel(future), self._step.cut_off_s)
        try:
            return future.result()
        except GeneratorExit as error:
            # On the loop it cannot be told from the end of a coroutine that nobody awaits any more.
            raise StepError("its code raised GeneratorExit", retry=True) from error
        except (CancelledError, asyncio.CancelledError):
            raise self._stopped() from None
        finally:
            holds.stoppable(self._hold, None)

    async def _limited(self, work: Awaitable[JsonValue]) -> JsonValue:
        try:
            async with asyncio.timeout(self._step.cut_off_s) as limit:
                return await contained_on_loop(work)
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
        holds.stoppable(self._hold, blocking.interrupt, limit)
        try:
            result = blocking.run(lambda: contained(work))
        except Interrupted:
            if self._hold.lost or self._hold.stopping or self._hold.cut_off:
                raise self._stopped() from None
            raise self._too_long() from None
        finally:
            if alarm is not None:
                alarm.cancel()
            holds.stoppable(self._hold, None)
        if inspect.isawaitable(result):
            return self._on_loop(result)
        return result

    def _stopped(self) -> Exception:
        """Why the act was stopped from outside."""
        if self._hold.lost:
            return Lost()
        return _Stopping("its worker could not renew its lease" if self._hold.cut_off else "its worker is stopping")

    # The choke point.

    async def perform(self, act: Act[R], /) -> R:
        await asyncio.to_thread(self._decide, act)
        return await self._do(act)

    def _decide(self, act: Act[Any]) -> None:
        """Returns where the act may be done now. Raises `Denied`, and `Park` to ask a person."""
        decision = decide(act, self._executor.policy, self._claim.grants)
        self._admit(decision, self._executor.actors.estimate(act))
        if decision.effect is Effect.DENY:
            raise Denied(decision.reason)
        if decision.effect is Effect.ASK:
            raise self._ask(act, decision)
        if not self._executor.holds.may_act(self._hold):
            # Between the decision and the act this process stood still, or could not reach Redis.
            raise self._stopped()

    def _admit(self, decision: Decision, wanted: Usage) -> None:
        with self._telling:
            self._acts += 1
            spent = self._unsettled()
            self._executor.record.admit(
                self._hold.held, self._acts, self._decided(decision),
                allowed=decision.effect is Effect.ALLOW, wanted=wanted, spent=spent,
            )  # fmt: skip
            self._settled += spent

    def _ask(self, act: Act[Any], decision: Decision) -> Denied | Park:
        verdict = self._claim.verdict
        if verdict is not None and self._claim.bound == act.digest:
            if verdict.expired:
                return Denied(f"nobody decided about {act.target} in time")
            return Denied(
                f"{verdict.by or 'a person'} refused {act.target}" + (f": {verdict.note}" if verdict.note else "")
            )
        shown = act.model_dump(mode="json")
        return Park("ask", f"{act.kind} {act.target}: {decision.reason}", act=shown, bound=act.digest)

    async def _do(self, act: Act[R]) -> R:
        self._usage += act.counts
        voice = Voice(self._say)
        by = By(self.idempotency_key, self._claim.tenant, voice.say, self.perform)
        try:
            reply = await self._executor.actors.carry_out(act, by)
        finally:
            await voice.aclose()
        self._usage += reply.usage
        for doubt in reply.doubts:
            log.warning("%s.%s: %s", self.run_id, self.step_id, doubt)
            await self._say("usage", doubt)
        return reply

    async def _say(self, stream: str, text: str) -> None:
        """Tell those who watch the run what this attempt is saying."""
        self._said += 1
        data = {"attempt": self.number, "stream": stream, "text": redact(text)}
        # A courtesy: who lost the step hears of it by the heartbeat.
        with suppress(Lost, Unavailable):
            await asyncio.to_thread(self._executor.record.say, self._hold.held, self._said, data)

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
            ended = self._executor.record.finish(
                self._hold.held, status, body, output=output, usage=self._unsettled(), denied=denied
            )
        return replace(ended, sends=ended.sends + self._let_go(output))

    def _failed(self, error: StepError, signature: Callable[[], str]) -> tuple[Then, Ended]:
        message = redact(error.message)[:LONGEST_ERROR]
        tries = self._claim.failed_tries + 1
        retry = self._step.retry
        if error.retry and tries < retry.max_attempts and (retry.on is None or error.kind in retry.on):
            delay = retry.delay(tries, random.random(), error.retry_after_s)  # noqa: S311
            return Then.WAIT, self._leave("retry", signature, {"error": message}, wake_in_s=delay)
        return self._give_up([message], 0, message if isinstance(error, Denied) else "", signature)

    def _park(self, park: Park, signature: Callable[[], str]) -> Ended:
        data = {"message": redact(park.message), "act": park.act}
        ended = self._leave(
            park.kind, signature, data, wake_in_s=park.wake_in_s, bound=park.bound, memory=park.memory,
            awaited=park.awaited,
        )  # fmt: skip
        # What came before it was parked found nobody to wake.
        if self._look_again is not None and self._look_again():
            return replace(ended, sends=ended.sends + self._executor.wake([self._who], park.kind, "its turn had come"))
        return ended

    def _inside(self, inside: Inside, signature: Callable[[], str]) -> Ended:
        keep = self._executor.artifacts.keep
        item = ""
        if inside.label is None:
            frames = Frames(None, len(inside.items), inside.window, inside.chunk, inside.fail_fast)
            for start in range(0, len(inside.items), SPREAD_BATCH):
                batch = enumerate(inside.items[start : start + SPREAD_BATCH], start)
                items = [(f"{self.step_id}.{number}", keep(value).dumps()) for number, value in batch]
                self._executor.record.spread(self._hold.held, items)
        else:
            frames = Frames(inside.label)
            item = keep(inside.items[0]).dumps() if inside.items else ""
        return self._leave(
            CHILDREN, signature, {"message": redact(inside.message)}, wake_in_s=inside.wake_in_s,
            memory=inside.memory, frames=frames, item=item,
        )  # fmt: skip

    def _leave(
        self, kind: str, signature: Callable[[], str], data: Mapping[str, Any], *, wake_in_s: float | None,
        bound: str = "", memory: JsonValue = None, awaited: str = "", frames: Frames | None = None, item: str = "",
    ) -> Ended:  # fmt: skip
        with self._telling:
            ended = self._executor.record.park(
                self._hold.held, kind, signature(), {"attempt": self.number, **data}, wake_in_s=wake_in_s,
                usage=self._unsettled(), bound=bound, memory=memory, awaited=awaited, frames=frames, item=item,
                holding=self._hold.shared if kind in (CHILDREN, RUN) else (),
            )  # fmt: skip
        # What goes on inside of it goes on in its turn.
        return ended if kind in (CHILDREN, RUN) else replace(ended, sends=ended.sends + self._let_go())

    def _hand_back(self, why: str) -> Ended:
        with self._telling:
            self._executor.record.hand_back(
                self._hold.held, self._executor.worker, self.number, self._unsettled(), reason=why
            )
        return Ended(self._let_go())


def _number(step_id: str, parts: int) -> int:
    """The number of the frame that the first so many parts of a step's id name."""
    return int(step_id.split(".", parts)[parts - 1])


def _cancel(future: Future[JsonValue]) -> None:
    future.cancel()


class _Stopping(Exception):
    """The act was stopped and its step is handed back, for this reason."""

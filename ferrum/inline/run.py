"""The record of a run in memory: the rules of `ferrum/lua/`, for one process and one event loop.

What a script of the record does in one round trip is one method here, and nothing is awaited in it. Names are those of
the scripts, where there is more about each: `lib.lua` above all.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import JsonValue

from ferrum import events
from ferrum.events import Event
from ferrum.governance.budget import Limits, ceilings, counters, passed
from ferrum.inline.script import Said
from ferrum.plan import Body, Plan, PlannedStep
from ferrum.record import Verdict
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.untrusted import Marks

if TYPE_CHECKING:
    from ferrum.inline.world import World

_LIVE = frozenset({RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING_APPROVAL})
#: What waits for a person, and what waits for what is inside of it, which is counted itself.
ASKS = frozenset({"approval", "ask"})
CHILDREN, RUN = "children", "run"
_NOTHING = Usage()

_UNPRICED = "budget.cost_usd is set, but a model has no price: add it to the price file (FERRUM_PRICES)"


@dataclass(slots=True)
class Frames:
    """The frames that a step waits for."""

    #: The name of the only one, else they are numbered from 0.
    label: str | None
    total: int = 1
    window: int = 1
    fail_fast: bool = False
    left: int = 0
    next: int = 0


@dataclass(slots=True)
class State:
    """What is known of one step."""

    status: StepStatus = StepStatus.PENDING
    attempt: int = 0
    #: Of the claim; what is said for an earlier one is not heard.
    token: int = 0
    task: asyncio.Task[None] | None = None
    #: It may be claimed.
    ready: bool = False
    failed_tries: int = 0
    #: The next claim goes on with the same attempt.
    same: bool = False
    #: What it waits for: how the record calls it, for a person's eyes, and the name of a signal or run.
    kind: str = ""
    message: str = ""
    awaited: str = ""
    memory: JsonValue = None
    verdict: Verdict | None = None
    bound: str = ""
    grants: frozenset[str] = frozenset()
    #: Envelopes: of the signal that came for it, and of its output.
    signal: str = ""
    output: str = ""
    error: str = ""
    #: What the policy had against it.
    denied: str = ""
    tolerated: bool = False
    #: The failed step behind its being skipped.
    cause: str = ""
    frames: Frames | None = None
    #: The run that it waits for, and whether that one waits for people only.
    inside: Run | None = None
    inside_asks: bool = False
    reserved: Usage = field(default_factory=lambda: _NOTHING)


@dataclass(frozen=True, slots=True)
class Claim:
    """A step that is this attempt's."""

    run: Run
    step_id: str
    token: int
    state: State


class Lost(Exception):
    """The claim is no longer held: the step was withdrawn, or its run ended."""


class Run:
    """One run, from its start to its end."""

    def __init__(
        self, world: World, run_id: str, plan: Plan, *, given: str, said: Said, marks: Marks,
        up: tuple[Run, str] | None = None,
    ) -> None:  # fmt: skip
        self.world = world
        self.run_id = run_id
        self.plan = plan
        #: Envelope.
        self.given = given
        self.said = said
        self.marks = marks
        #: The run and the step that it is part of.
        self.up = up
        self.status = RunStatus.QUEUED
        self.reason = ""
        #: Envelope; empty unless it completed with some.
        self.outputs = ""
        self.events: list[Event] = []
        self.steps: defaultdict[str, State] = defaultdict(State)
        #: Envelopes of the items of frames.
        self.items: dict[str, str] = {}
        budget = plan.workflow.budget
        self.limits = Limits(**budget.model_dump(exclude={"wall_time"})) if budget else Limits()
        self.spent = Usage()
        self._wall_s = budget.wall_time if budget else None
        self._wall_spent_s = 0.0
        self._since: float | None = None
        self._homes = _homes(plan)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._ended_needs: defaultdict[str, int] = defaultdict(int)
        self._left: defaultdict[tuple[str, bool], int] = defaultdict(int)
        self._failed: dict[tuple[str, bool], str] = {}
        self._open: dict[str, None] = {}
        self._undo: list[str] = []
        self._undoing = ""
        self._not_undone: list[str] = []
        self._ending: dict[str, JsonValue] = {}
        self._signals: defaultdict[str, list[str]] = defaultdict(list)
        self._waiting: defaultdict[str, list[str]] = defaultdict(list)
        self._steps_left = len(plan.top.steps)
        self._failure = self._denial = ""
        # Counted by what is done now, told at its end, so that a run does not seem to wait between two of its steps.
        self._active = self._asking = self._now_active = self._now_asking = 0
        parent = [up[0].run_id, up[1]] if up else None
        made = {"workflow": plan.workflow.name, "version": plan.workflow.version, "plan": plan.digest}
        self._emit("run.created", "", made | ({"parent": parent} if parent else {}), given)
        if plan.workflow.deadline is not None:
            self._timer("!deadline", plan.workflow.deadline, self._too_old)

    @property
    def path(self) -> str:
        """What the ids of its steps stand behind, seen from the outermost run: `report/`."""
        return "" if self.up is None else f"{self.up[0].path}{self.up[1]}/"

    @property
    def depth(self) -> int:
        return 1 if self.up is None else self.up[0].depth + 1

    def begin(self) -> None:
        for step in self.plan.roots:
            self._make_ready(step.id)
        self._tell()

    # Where a step stands.

    def frame_of(self, step_id: str) -> tuple[str | None, str]:
        """The frame that a step is in, and what its siblings' ids begin with."""
        step = self.plan.step(step_id)
        home = self._homes[step.id]
        if home is None or not home.frame:
            return None, ""
        if "" in home.steps:
            return step_id, ""
        frame = step_id.rpartition(".")[0]
        return frame, f"{frame}."

    def _home(self, step_id: str) -> Body | None:
        return self._homes[self.plan.step(step_id).id]

    def live(self, step: PlannedStep | None = None) -> bool:
        """Whether this step may still do something: its run goes on, or it undoes something of one that ends."""
        undoes = step is not None and (step.undoing or step.undoes is not None)
        return self.status in _LIVE or (self.status is RunStatus.COMPENSATING and undoes)

    def is_over(self, frame: str, body: Body) -> bool:
        """Whether all that is in a frame has ended; not before it has begun."""
        return self._left.get((frame, body.nameless)) == 0

    def failed_in(self, frame: str, body: Body) -> tuple[str, State] | None:
        """The step in a frame that failed first, and may not."""
        step_id = self._failed.get((frame, body.nameless))
        return None if step_id is None else (step_id, self.steps[step_id])

    # What an attempt says.

    def claim(self, step_id: str) -> Claim | None:
        """`None` where there is nothing to do."""
        step, state = self.plan.step(step_id), self.steps[step_id]
        if not self.live(step) or not state.ready:
            return None
        state.ready = False
        if self.status is RunStatus.QUEUED:
            self.status = RunStatus.RUNNING
            self._emit("run.started")
            self._start_clock()
        skipped = self._why_skipped(step_id, state)
        if skipped:
            self._skip(step_id, state, skipped)
            return None
        if state.same:
            state.same = False
        else:
            state.attempt += 1
        state.status, state.token, state.task = StepStatus.RUNNING, state.token + 1, asyncio.current_task()
        self._emit("step.started", step_id, {"attempt": state.attempt, "worker": "inline"})
        self._tell()
        return Claim(self, step_id, state.token, state)

    def _why_skipped(self, step_id: str, state: State) -> str:
        home = self._home(step_id)
        needs = self.plan.step(step_id).needs if home else ()
        _, prefix = self.frame_of(step_id)
        skipped = 0
        for name in needs:
            need = self.steps[prefix + name]
            if (need.status is StepStatus.FAILED and not need.tolerated) or need.cause:
                state.cause = state.cause or need.cause or prefix + name
            skipped += need.status is StepStatus.SKIPPED
        if state.cause:
            return f"'{state.cause}' failed"
        return "all that it needs was skipped" if skipped and skipped == len(needs) else ""

    def admit(self, claim: Claim, decided: Mapping[str, object], *, allowed: bool, wanted: Usage, spent: Usage) -> None:
        """Keep the decision, and reserve what the act may use. Raises `Lost` when that ended the run."""
        state = self._held(claim)
        self._settle(state, spent)
        self._emit("act.decided", claim.step_id, decided)
        if allowed:
            if over := self._passes(wanted):
                self._kill(*over)
                self._tell()
                raise Lost
            state.reserved = wanted

    def say(self, claim: Claim, data: Mapping[str, object]) -> None:
        """What an attempt says while it runs. Raises `Lost`."""
        self._held(claim)
        self._emit("step.output", claim.step_id, data)

    def finish(
        self, claim: Claim, status: StepStatus, data: Mapping[str, object], *, output: str = "", usage: Usage,
        denied: str = "",
    ) -> None:  # fmt: skip
        """Raises `Lost`."""
        state, step = self._held(claim), self.plan.step(claim.step_id)
        self._settle(state, usage)
        self._end_inside(state)
        state.status, state.signal, state.frames, state.output = status, "", None, output
        state.error = str(data.get("error") or "")
        self._emit(f"step.{status}", claim.step_id, {**data, "usage": usage}, output)
        if status is StepStatus.FAILED:
            state.tolerated, state.denied = step.tolerated, denied
            if denied and self._is_top(claim.step_id) and not step.tolerated:
                self._denial = self._denial or denied
        if over := self._passes(_NOTHING):
            self._kill(*over)
        else:
            self._conclude(claim.step_id, state)
        self._tell()

    def park(
        self, claim: Claim, kind: str, data: Mapping[str, object], *, wake_in_s: float | None, usage: Usage,
        bound: str = "", memory: JsonValue = None, awaited: str = "", frames: Frames | None = None,
        items: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Raises `Lost`."""
        state, step_id = self._held(claim), claim.step_id
        step = self.plan.step(step_id)
        self._settle(state, usage)
        self._end_inside(state)
        state.status, state.kind, state.verdict, state.bound = StepStatus.WAITING, kind, None, bound
        state.task, state.message = None, str(data.get("message") or data.get("error") or "")
        state.awaited, state.memory = awaited, state.memory if memory is None else memory
        if kind == "retry":
            state.failed_tries, state.memory = state.failed_tries + 1, None
        else:
            state.same = True
        if wake_in_s is not None:
            self._timer(step_id, wake_in_s, lambda: self._its_time(step_id))
        self._emit("step.waiting", step_id, {**data, "kind": kind, "wakes_in": wake_in_s, "usage": usage})
        if step.composed:
            self._cancel_inside(step_id)
        if kind == CHILDREN:
            state.frames = frames
            self._now_active -= 1
        if over := self._passes(_NOTHING):
            self._kill(*over)
        elif kind in ASKS:
            self._now_active, self._now_asking = self._now_active - 1, self._now_asking + 1
            self.world.ask(self, step_id, state, data.get("act"))
        elif kind == CHILDREN:
            self._begin_frames(step_id, items)
        elif kind == RUN:
            self._wait_for_run(step_id, state, awaited)
        elif kind == "signal":
            self._wait_for_signal(step_id, state, awaited)
        self._tell()

    def _held(self, claim: Claim) -> State:
        state = self.steps[claim.step_id]
        if (
            state.token != claim.token
            or state.status is not StepStatus.RUNNING
            or not self.live(self.plan.step(claim.step_id))
        ):
            raise Lost
        return state

    def _is_top(self, step_id: str) -> bool:
        home = self._home(step_id)
        return home is not None and not home.frame

    # What comes from outside.

    def decide(self, step_id: str, verdict: Verdict, why: str = "decided") -> None:
        state = self.steps[step_id]
        if not self.live(self.plan.step(step_id)) or state.status is not StepStatus.WAITING or state.kind not in ASKS:
            return
        state.verdict = verdict
        if verdict.approved and state.bound:
            state.grants |= {state.bound}
        said = {"approved": verdict.approved, "by": verdict.by, "note": verdict.note, "expired": verdict.expired}
        self._emit("approval.decided", step_id, said)
        self._wake(step_id, state, why)
        self._tell()

    def signal(self, name: str, envelope: str) -> None:
        # What undoes may wait for one, too.
        if self.status not in _LIVE and self.status is not RunStatus.COMPENSATING:
            return
        self._emit("signal.received", "", {"name": name, "by": ""}, envelope)
        waiting = self._waiting[name]
        while waiting:
            step_id = waiting.pop(0)
            state = self.steps[step_id]
            going = self.live(self.plan.step(step_id))
            if going and state.status is StepStatus.WAITING and state.kind == "signal":
                state.signal = envelope
                self._wake(step_id, state, "its signal came")
                break
        else:
            self._signals[name].append(envelope)
        self._tell()

    def wake_for(self, step_id: str, kind: str, why: str) -> None:
        """What the step waited for outside of its run is there."""
        state = self.steps[step_id]
        if self.live(self.plan.step(step_id)) and state.status is StepStatus.WAITING and state.kind == kind:
            self._wake(step_id, state, why)
            self._tell()

    def close(self, status: RunStatus, *, reason: str | None = None, outputs: str = "") -> None:
        """All steps have ended, and the outputs are known."""
        if self.live():
            self._end(status, {"reason": reason} if reason else {}, outputs)
            self._tell()

    def waits(self) -> list[tuple[str, State]]:
        """The steps that wait for something."""
        return [(step_id, state) for step_id, state in self.steps.items() if state.status is StepStatus.WAITING]

    def stop(self) -> None:
        """Nothing is waited for any more."""
        for name in list(self._timers):
            self._untimed(name)

    @property
    def timed(self) -> bool:
        """Whether time alone will change something."""
        return bool(self._timers)

    # Timers.

    def _timer(self, name: str, delay_s: float, then: Callable[[], None]) -> None:
        def due() -> None:
            del self._timers[name]
            then()
            self._tell()
            self.world.look()

        self._untimed(name)
        # To the millisecond, as in the record: so what is due at the same time is done in the order it was asked for.
        self._timers[name] = self.world.at(round(max(0.0, delay_s), 3), due)

    def _untimed(self, name: str) -> None:
        if handle := self._timers.pop(name, None):
            handle.cancel()

    def _its_time(self, step_id: str) -> None:
        state = self.steps[step_id]
        if state.status is not StepStatus.WAITING or not self.live(self.plan.step(step_id)):
            return
        if state.kind in ASKS:
            self.decide(step_id, Verdict(False, "", expired=True), "its time came")
            return
        if state.kind == "timer" and isinstance(state.memory, float):
            # When it is due, by a clock that is not this one; it is now.
            state.memory = 0.0
        self._wake(step_id, state, "its time came")

    def _too_late(self, step_id: str) -> None:
        step, state = self.plan.step(step_id), self.steps[step_id]
        if not state.status.ended and self.live(step):
            self._fail(step_id, state, f"was not over by its deadline of {step.deadline_s:g} s")

    def _too_old(self) -> None:
        if self.live():
            self._end(RunStatus.FAILED, {"reason": "its deadline has passed"})

    def _start_clock(self) -> None:
        self._since = self.world.now()
        if self._wall_s is not None:
            self._timer("!wall", self._wall_s - self._wall_spent_s, lambda: self._kill("wall_time", self))

    def _stop_clock(self) -> None:
        if self._since is not None:
            self._wall_spent_s += self.world.now() - self._since
        self._untimed("!wall")

    # Counting.

    def _tell(self) -> None:
        active, asking = self._now_active, self._now_asking
        if not active and not asking:
            return
        self._now_active = self._now_asking = 0
        self._active += active
        self._asking += asking
        waits = self._active == 0 and self._asking > 0 and self.status is RunStatus.RUNNING
        goes_on = self._active > 0 and self.status is RunStatus.WAITING_APPROVAL
        if waits:
            self.status = RunStatus.WAITING_APPROVAL
            self._emit("run.waiting")
            self._stop_clock()
        elif goes_on:
            self.status = RunStatus.RUNNING
            self._emit("run.resumed")
            self._start_clock()
        if self.up is not None and (waits or goes_on):
            self.up[0]._inside_asks(self.up[1], waits)

    def _inside_asks(self, step_id: str, asks: bool) -> None:
        state = self.steps[step_id]
        if self.live() and state.status is StepStatus.WAITING and state.inside and state.inside_asks != asks:
            change = 1 if asks else -1
            self._now_active, self._now_asking = self._now_active - change, self._now_asking + change
            state.inside_asks = asks
            self._tell()

    def _uncount(self, state: State) -> None:
        if state.kind in ASKS:
            self._now_asking -= 1
        elif state.inside_asks:
            state.inside_asks = False
            self._now_asking -= 1
        elif state.kind != CHILDREN:
            self._now_active -= 1

    # Going on.

    def _make_ready(self, step_id: str) -> None:
        state, deadline_s = self.steps[step_id], self.plan.step(step_id).deadline_s
        state.ready = True
        self._now_active += 1
        if deadline_s is not None and state.attempt == 0:
            self._timer(f"{step_id}!d", deadline_s, lambda: self._too_late(step_id))
        self.world.start(self, step_id)

    def _wake(self, step_id: str, state: State, why: str) -> None:
        self._uncount(state)
        state.status, state.kind = StepStatus.PENDING, ""
        self._untimed(step_id)
        self._emit("step.resumed", step_id, {"why": why})
        self._make_ready(step_id)

    def _begin_frames(self, parent: str, items: tuple[str, ...]) -> None:
        frames = self.steps[parent].frames
        assert frames is not None
        frames.left = frames.total
        for number, envelope in enumerate(items):
            self.items[_label(parent, frames, number)] = envelope
        last = min(frames.total, frames.window)
        frames.next = last
        for number in range(last):
            self._begin_frame(parent, frames, number)

    def _begin_frame(self, parent: str, frames: Frames, number: int) -> None:
        frame = _label(parent, frames, number)
        body = body_of(self.plan.step(parent), frames.label)
        self._left[frame, body.nameless] = len(body.steps)
        for name, needs in body.needs.items():
            if not needs:
                step_id = f"{frame}.{name}" if name else frame
                self._open[step_id] = None
                self._make_ready(step_id)

    def _wait_for_run(self, step_id: str, state: State, run_id: str) -> None:
        inside = self.world.runs[run_id]
        state.inside = inside
        if inside.status.ended:
            self._wake(step_id, state, "its run ended")
        elif inside.status is RunStatus.QUEUED:
            # Its first steps were not begun before there was somebody to come back to.
            inside.begin()

    def _wait_for_signal(self, step_id: str, state: State, name: str) -> None:
        if self._signals[name]:
            state.signal = self._signals[name].pop(0)
            self._wake(step_id, state, "its signal had come")
        else:
            self._waiting[name].append(step_id)

    def _advance(self, step_id: str) -> None:
        home = self._home(step_id)
        if home is None:
            return
        _, prefix = self.frame_of(step_id)
        own = step_id.removeprefix(prefix) if "" not in home.steps else ""
        for name, needs in home.needs.items():
            if own in needs:
                self._ended_needs[prefix + name] += 1
                if self._ended_needs[prefix + name] == len(needs):
                    if prefix:
                        self._open[prefix + name] = None
                    self._make_ready(prefix + name)

    # Ending.

    def _skip(self, step_id: str, state: State, reason: str) -> None:
        state.status = StepStatus.SKIPPED
        self._emit("step.skipped", step_id, {"reason": reason, "cause": state.cause or None})
        self._conclude(step_id, state)
        self._tell()

    def _fail(self, step_id: str, state: State, error: str) -> None:
        """It fails though no attempt says so."""
        step = self.plan.step(step_id)
        self._withdraw(step_id, state)
        self._now_active += 1
        state.status, state.tolerated, state.error = StepStatus.FAILED, step.tolerated, error
        data = {"attempt": state.attempt, "error": error, "tolerated": step.tolerated}
        self._emit("step.failed", step_id, data)
        self._conclude(step_id, state)

    def _withdraw(self, step_id: str, state: State) -> None:
        """Take a step that has not ended out of whatever it is in."""
        if state.status is StepStatus.RUNNING:
            self._now_active -= 1
            self._stop(state)
        elif state.status is StepStatus.WAITING:
            self._untimed(step_id)
            self._uncount(state)
        elif state.ready:
            state.ready = False
            self._now_active -= 1
        self._end_inside(state)
        self._untimed(f"{step_id}!d")
        state.reserved = _NOTHING
        state.kind = ""
        state.token += 1
        self.world.let_go(self, step_id)

    def _end_inside(self, state: State) -> None:
        inside, state.inside = state.inside, None
        if inside is not None and inside.live():
            inside._end(RunStatus.CANCELLED, {"reason": "what it is part of has ended"})

    def _stop(self, state: State) -> None:
        if state.task is not None and state.task is not asyncio.current_task():
            state.task.cancel()

    def _cancel_inside(self, step_id: str) -> None:
        """What goes on inside a step goes on no longer."""
        for name in [name for name in self._open if name.startswith(f"{step_id}.")]:
            state = self.steps[name]
            if not state.status.ended:
                self._withdraw(name, state)
                state.status = StepStatus.CANCELLED
                self._emit("step.cancelled", name, {"attempt": state.attempt})
            self._open.pop(name, None)

    def _conclude(self, step_id: str, state: State) -> None:
        """The last thing of a step that ended: what follows it, and whether its run ended with it."""
        step = self.plan.step(step_id)
        self._now_active -= 1
        state.task = None
        self._untimed(f"{step_id}!d")
        if step.composed:
            self._cancel_inside(step_id)
        if state.status is StepStatus.COMPLETED and step.undoable:
            self._undo.append(step_id)
        if step.undoes is not None:
            if state.status is StepStatus.FAILED:
                self._not_undone.append(f"'{step_id.rpartition('.')[0]}'")
            self._undo_next()
            return
        failed = state.status is StepStatus.FAILED and not state.tolerated
        self._advance(step_id)
        frame, _ = self.frame_of(step_id)
        if frame is not None:
            self._in_frame(step_id, frame, failed)
            return
        if failed:
            self._failure = self._failure or f"'{step_id}' failed"
        self._steps_left -= 1
        if self._steps_left == 0:
            self._last_ended()

    def _in_frame(self, step_id: str, frame: str, failed: bool) -> None:
        self._open.pop(step_id, None)
        home = self._home(step_id)
        assert home is not None
        key = (frame, home.nameless)
        if failed:
            self._failed.setdefault(key, step_id)
        self._left[key] -= 1
        parent = frame if home.nameless else frame.rpartition(".")[0]
        above = self.steps[parent]
        frames = above.frames
        if above.status is not StepStatus.WAITING or frames is None:
            return
        if self._left[key] == 0:
            frames.left -= 1
        elif not failed:
            return
        failed = key in self._failed
        if failed and frames.fail_fast:
            self._wake(parent, above, "a part of it failed")
        elif self._left[key] == 0:
            if frames.next < frames.total:
                frames.next += 1
                self._begin_frame(parent, frames, frames.next - 1)
            if frames.left == 0:
                self._wake(parent, above, "all of it ended")

    def _last_ended(self) -> None:
        if self._denial:
            self._end(RunStatus.POLICY_BLOCKED, {"reason": self._denial})
        elif self._failure:
            self._end(RunStatus.FAILED, {"reason": self._failure})
        elif self.plan.workflow.outputs:
            self.world.close(self)
        else:
            self._end(RunStatus.COMPLETED, {})

    def _end(self, status: RunStatus, data: Mapping[str, JsonValue], outputs: str = "") -> None:
        """The run ends. What completed and can be undone is undone first, unless all went well."""
        self.stop()
        for step_id, state in list(self.steps.items()):
            self._stop(state)
            state.ready = False
            if not state.status.ended:
                self.world.let_go(self, step_id)
            self._end_inside(state)
        ending = {"status": status.value, **data}
        if status is RunStatus.COMPLETED or not (self._undo or self._going_inside):
            self._really_end(ending, outputs)
            return
        self._now_active = self._now_asking = self._active = self._asking = 0
        self.status, self._ending = RunStatus.COMPENSATING, ending
        self._emit("run.compensating", "", ending)
        self._undo_next()

    @property
    def _going_inside(self) -> bool:
        """Whether a run inside of it has not ended; one that was ended has something to undo first."""
        return any(run.up and run.up[0] is self and not run.status.ended for run in self.world.runs.values())

    @property
    def _between_two(self) -> bool:
        """Whether nothing is being undone just now."""
        return not self._undoing or self.steps[self._undoing].status.ended

    def _undo_next(self) -> None:
        # What was done inside of it came last.
        if self._going_inside:
            return
        if self._undo:
            self._undoing = f"{self._undo.pop()}.compensate"
            self._make_ready(self._undoing)
            return
        ending = self._ending
        if self._not_undone:
            reason = ending.get("reason") or ending["status"]
            ending["reason"] = f"{reason}; not undone: {', '.join(self._not_undone)}"
        self._really_end(ending)

    def _really_end(self, ending: Mapping[str, JsonValue], outputs: str = "") -> None:
        self.status = RunStatus(str(ending["status"]))
        self.reason, self.outputs = str(ending.get("reason") or ""), outputs
        self._now_active = self._now_asking = self._active = self._asking = 0
        self._emit("run.ended", "", ending, outputs)
        if self.up is not None:
            above, step_id = self.up
            state = above.steps[step_id]
            if above.live(above.plan.step(step_id)) and state.status is StepStatus.WAITING and state.inside is self:
                above._wake(step_id, state, "its run ended")
                above._tell()
            elif above.status is RunStatus.COMPENSATING and above._between_two:
                above._undo_next()
                above._tell()

    # The budget.

    def _above(self) -> list[Run]:
        """The runs that it is inside of, from the inside out."""
        return [] if self.up is None else [self.up[0], *self.up[0]._above()]

    def reserved(self) -> Usage:
        own = sum((state.reserved for state in self.steps.values() if state.reserved), Usage())
        return sum((run.reserved() for run in self.world.runs.values() if run.up and run.up[0] is self), own)

    def _settle(self, state: State, used: Usage) -> None:
        state.reserved = _NOTHING
        if used:
            for run in (self, *self._above()):
                run.spent += used

    def _passes(self, wanted: Usage) -> tuple[str, Run] | None:
        """The limit that would be passed, and the run whose limit it is. What undoes is not kept from it."""
        if self.status is RunStatus.COMPENSATING:
            return None
        for run in (self, *self._above()):
            limited = run.status in _LIVE and ceilings(run.limits)
            if limited and (row := passed(run.limits, run.spent, run.reserved(), wanted)):
                return row.value, run
        return None

    def _kill(self, limit: str, whose: Run) -> None:
        if not whose.live():
            return
        reason = _UNPRICED if limit == "unpriced" else f"budget.{limit} is used up"
        whose._end(RunStatus.BUDGET_KILLED, {"reason": reason})
        whose._tell()

    # Events.

    def _emit(self, kind: str, step_id: str = "", data: Mapping[str, object] | None = None, output: str = "") -> None:
        wire = {name: _wire(value) for name, value in (data or {}).items() if value is not None}
        fields = {"t": kind, "s": step_id, "d": json.dumps(wire, ensure_ascii=False), "o": output}
        event = events.read(self.run_id, self.world.event_id(), fields)
        self.events.append(event)
        self.world.tell(event)


def _wire(value: object) -> object:
    if isinstance(value, Usage):
        return {name: amount for name, amount in counters(value).items() if amount}
    return value


def _label(parent: str, frames: Frames, number: int) -> str:
    if frames.label is None:
        return f"{parent}.{number}"
    return f"{parent}.{frames.label}" if frames.label else parent


def body_of(step: PlannedStep, label: str | None) -> Body:
    """The body of its frames with this label; `None`: the numbered ones."""
    return step.bodies["*"] if label is None else step.bodies.get(label) or step.bodies["*"]


def _homes(plan: Plan) -> dict[str, Body | None]:
    """The body that each step is part of; `None` for what undoes, which is in none."""
    bodies = [plan.top, *(body for step in plan.steps.values() for body in step.bodies.values())]
    homes: dict[str, Body | None] = {step_id: body for body in bodies for step_id in body.steps.values()}
    return homes | {step.id: None for step in plan.steps.values() if step.undoes is not None}


def reads(step_id: str, step: PlannedStep) -> dict[str, str]:
    """By name, the ids of the steps further out that a step sees."""
    found: dict[str, str] = {}
    for read in step.reads:
        outer = ".".join(step_id.split(".")[: read.parts])
        found[read.name] = ".".join(filter(None, (outer, read.step)))
    return found

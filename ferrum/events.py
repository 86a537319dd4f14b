"""What happened in a run, in order: the closed set of events, and the state that they add up to.

The events are the history of a run and hold its outputs; folding them gives what `ferrum runs show` prints. An
event's `id` is its place in the stream (`<ms>-<n>`) and can be used to take up again after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from ferrum.governance.budget import usage_of
from ferrum.results import RunStatus, StepResult, StepStatus, Usage


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    #: `<milliseconds since 1970>-<number>`, rising.
    id: str
    run_id: str

    @property
    def at(self) -> float:
        """When, in seconds since 1970, by Redis's clock."""
        return int(self.id.partition("-")[0]) / 1000


class _StepEvent(_Event):
    step: str
    attempt: int = 0


class RunCreated(_Event):
    type: Literal["run.created"] = "run.created"
    workflow: str
    version: str
    #: sha256 of the plan.
    plan: str
    tenant: str = "default"
    #: From 0 to 9, the most urgent.
    priority: int = 5
    #: The run and the step that it is part of.
    parent: tuple[str, str] | None = None
    #: The run whose results it takes over, and how it came about: `rerun`, `resume` or `fork`.
    origin: str | None = None
    how: str | None = None
    #: The input's envelope: a value, or a reference to an artifact.
    output: str | None = None


class RunStarted(_Event):
    """The first step was claimed."""

    type: Literal["run.started"] = "run.started"


class RunWaiting(_Event):
    """Nothing can go on before a person decides."""

    type: Literal["run.waiting"] = "run.waiting"


class RunResumed(_Event):
    type: Literal["run.resumed"] = "run.resumed"


class RunCompensating(_Event):
    """The run will end so, but what completed and can be undone is undone first, the last first."""

    type: Literal["run.compensating"] = "run.compensating"
    status: RunStatus
    reason: str | None = None
    by: str | None = None


class SignalReceived(_Event):
    type: Literal["signal.received"] = "signal.received"
    name: str
    by: str = ""
    #: The data's envelope.
    output: str | None = None


class RunEnded(_Event):
    type: Literal["run.ended"] = "run.ended"
    status: RunStatus
    #: One sentence; `None` for a run that completed.
    reason: str | None = None
    #: Who cancelled it.
    by: str | None = None
    #: The outputs' envelope.
    output: str | None = None


class StepStarted(_StepEvent):
    type: Literal["step.started"] = "step.started"
    worker: str


class ActDecided(_StepEvent):
    """The choke point said what may happen, before it happened."""

    type: Literal["act.decided"] = "act.decided"
    kind: str
    target: str
    effect: str
    rule: str
    reason: str
    digest: str
    #: What the acts before this one in the same attempt used.
    usage: Usage = Usage()


class StepWaiting(_StepEvent):
    """The step left its worker."""

    type: Literal["step.waiting"] = "step.waiting"
    #: `approval` and `ask` wait for a person, `retry` and `timer` for their time, `signal` for one, `children` for what
    #: is inside of it, `run` for a run that is, `cache` for another step that computes the same, `limit` for its turn.
    kind: str
    message: str = ""
    #: Seconds until it goes on by itself, or `None`.
    wakes_in: float | None = None
    error: str | None = None
    #: What a person is asked about (`ask`): the act, as it would be sent.
    act: JsonValue = None
    usage: Usage = Usage()

    @property
    def digest(self) -> str:
        """sha256 over all that a person is shown, and when: the same question asked again is another one."""
        text = json.dumps([self.id, self.run_id, self.step, self.message, self.act], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class StepResumed(_StepEvent):
    type: Literal["step.resumed"] = "step.resumed"
    why: str


class ApprovalDecided(_StepEvent):
    type: Literal["approval.decided"] = "approval.decided"
    approved: bool
    by: str
    note: str = ""
    expired: bool = False


class StepLost(_StepEvent):
    """A try came to nothing: its worker died or stopped. The step is sent again."""

    type: Literal["step.lost"] = "step.lost"
    worker: str = ""
    reason: str
    #: What the try had reserved: nobody knows what it used.
    usage: Usage = Usage()


class StepOutput(_StepEvent):
    """What a running step says while it runs."""

    type: Literal["step.output"] = "step.output"
    #: `stdout` or `stderr`; `usage` where a count of a provider is not believed.
    stream: str
    text: str


class StepCompleted(_StepEvent):
    type: Literal["step.completed"] = "step.completed"
    seconds: float
    output: str | None = None
    usage: Usage = Usage()
    #: The number of the alternative that did it, and why those before did not.
    fallback: int | None = None
    errors: tuple[str, ...] = ()
    #: It was taken from the cache.
    cached: bool = False


class StepFailed(_StepEvent):
    type: Literal["step.failed"] = "step.failed"
    error: str
    seconds: float = 0.0
    usage: Usage = Usage()
    #: Why its alternatives failed.
    errors: tuple[str, ...] = ()
    #: It may fail: those behind it see null.
    tolerated: bool = False


class StepSkipped(_StepEvent):
    type: Literal["step.skipped"] = "step.skipped"
    reason: str
    #: The failed step behind it; `None` when the workflow wanted it so.
    cause: str | None = None


class StepCancelled(_StepEvent):
    """A step was cancelled: whatever it is inside of goes on no longer, or its Celery task was revoked."""

    type: Literal["step.cancelled"] = "step.cancelled"
    #: Who revoked it; `None` where it is a part of what goes on no longer.
    error: str | None = None
    #: The run goes on as if it had completed without an output.
    tolerated: bool = False
    #: What it had reserved: nobody knows what it used.
    usage: Usage = Usage()


class StepKept(_StepEvent):
    """Its result was taken over from another run."""

    type: Literal["step.kept"] = "step.kept"
    origin: str
    status: StepStatus
    error: str | None = None
    cause: str | None = None
    tolerated: bool = False
    output: str | None = None


Event = Annotated[
    RunCreated
    | RunStarted
    | RunWaiting
    | RunResumed
    | RunEnded
    | StepStarted
    | ActDecided
    | StepWaiting
    | StepResumed
    | ApprovalDecided
    | StepLost
    | StepOutput
    | StepCompleted
    | StepFailed
    | StepSkipped
    | StepCancelled
    | StepKept
    | RunCompensating
    | SignalReceived,
    Field(discriminator="type"),
]
_adapter: TypeAdapter[Event] = TypeAdapter(Event)


def read(run_id: str, event_id: str, fields: Mapping[str, str]) -> Event:
    """An event as the record keeps it: `t` type, `s` step, `d` data as JSON, `o` an envelope."""
    data = _data(fields["d"])
    data |= {"id": event_id, "run_id": run_id, "type": fields["t"]}
    if step := fields.get("s"):
        data["step"] = step
    if output := fields.get("o"):
        data["output"] = output
    return _adapter.validate_python(data)


def _data(text: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(text)
    if "usage" in data:
        data["usage"] = usage_of(_counted.validate_python(data["usage"] or {}))
    return data


_counted: TypeAdapter[dict[str, int]] = TypeAdapter(dict[str, int])


@dataclass
class RunState:
    """What the events so far add up to."""

    run_id: str = ""
    status: RunStatus = RunStatus.QUEUED
    workflow: str = ""
    version: str = ""
    plan: str = ""
    tenant: str = "default"
    priority: int = 5
    #: The run and the step that it is part of.
    parent: tuple[str, str] | None = None
    #: The run whose results it took over, and how it came about.
    origin: str | None = None
    how: str | None = None
    #: Envelopes: `Kept.loads` opens them.
    input: str | None = None
    outputs: str | None = None
    reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    steps: dict[str, StepResult] = field(default_factory=dict)
    #: The envelope of each completed step's output.
    step_outputs: dict[str, str] = field(default_factory=dict)
    #: Steps that did not complete and need not: skipped as the workflow wanted it, or failed as they may.
    passed_over: set[str] = field(default_factory=set)
    created_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    #: The last event that was folded in.
    last: str = "0-0"

    def step(self, step_id: str) -> StepResult:
        return self.steps.get(step_id) or StepResult(step_id=step_id)

    def _change(self, event: _StepEvent, **changes: object) -> None:
        spent = getattr(event, "usage", Usage())
        self.usage += spent
        before = self.step(event.step)
        self.steps[event.step] = before.model_copy(update={"usage": before.usage + spent, **changes})


def fold(events: Iterable[Event], state: RunState | None = None) -> RunState:
    """The state that `events` lead to, from `state` or from nothing.

    When a run ends, whatever had not ended is cancelled.
    """
    state = state or RunState()
    for event in events:
        _apply(state, event)
        state.last = event.id
    return state


def _apply(state: RunState, event: Event) -> None:  # noqa: PLR0912 - one case per member of a closed set
    match event:
        case RunCreated():
            _create(state, event)
        case RunStarted():
            state.status, state.started_at = RunStatus.RUNNING, event.at
        case RunWaiting():
            state.status = RunStatus.WAITING_APPROVAL
        case RunResumed():
            state.status = RunStatus.RUNNING
        case RunCompensating():
            state.status, state.reason = RunStatus.COMPENSATING, event.reason
            _cancel_rest(state)
        case SignalReceived() | StepOutput():
            pass
        case StepCancelled():
            state._change(event, status=StepStatus.CANCELLED, error=event.error)
        case StepKept():
            state._change(event, status=event.status, error=event.error)
            if event.status is not StepStatus.COMPLETED:
                state.passed_over.add(event.step)
            if event.output is not None:
                state.step_outputs[event.step] = event.output
        case RunEnded():
            state.status, state.reason, state.ended_at, state.outputs = (
                event.status,
                event.reason,
                event.at,
                event.output,
            )
            _cancel_rest(state)
        case StepStarted():
            state._change(event, status=StepStatus.RUNNING, attempt=event.attempt, error=None)
        case ActDecided():
            state._change(event)
        case StepWaiting():
            state._change(event, status=StepStatus.WAITING, error=event.error)
        case StepResumed() | StepLost():
            state._change(event, status=StepStatus.PENDING)
        case ApprovalDecided():
            pass
        case StepCompleted():
            state._change(event, status=StepStatus.COMPLETED, error=None)
            if event.output is not None:
                state.step_outputs[event.step] = event.output
        case StepFailed():
            state._change(event, status=StepStatus.FAILED, error=event.error)
            if event.tolerated:
                state.passed_over.add(event.step)
        case StepSkipped():
            state._change(event, status=StepStatus.SKIPPED, error=event.reason)
            if event.cause is None:
                state.passed_over.add(event.step)
        case _:
            assert_never(event)


def _cancel_rest(state: RunState) -> None:
    for step_id, step in state.steps.items():
        if not step.status.ended:
            state.steps[step_id] = step.model_copy(update={"status": StepStatus.CANCELLED})


def _create(state: RunState, event: RunCreated) -> None:
    state.run_id, state.plan, state.input = event.run_id, event.plan, event.output
    state.workflow, state.version, state.created_at = event.workflow, event.version, event.at
    state.tenant, state.priority, state.parent = event.tenant, event.priority, event.parent
    state.origin, state.how = event.origin, event.how

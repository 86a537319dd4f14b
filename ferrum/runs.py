"""The front door: submit, wait, watch, decide, signal, cancel, resume, rerun, fork."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from os import PathLike

from pydantic import BaseModel, ConfigDict, JsonValue

from ferrum.artifacts import Artifacts, Kept, process_artifacts
from ferrum.cache import Cache, Stats
from ferrum.dead_letters import DeadLetter, DeadLetters
from ferrum.errors import Conflict, FerrumError, NotFound, Problem, WorkflowError, did_you_mean
from ferrum.events import Event, RunState
from ferrum.plan import Built, Plan
from ferrum.record import Asked, Record, Resend, Verdict, follow, new_run_id
from ferrum.results import RunStatus, StepResult, StepStatus, Usage
from ferrum.sending import hand_over, start
from ferrum.workflow import Workflow

#: How long a call outlasts a Redis that is away; the last try may take a little longer.
_PATIENCE_S = 3.0
_WAITING_PATIENCE_S = 60.0


class RunView(BaseModel):
    """A run as people want to see it, with everything that large or hidden references stood for."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    workflow: str
    version: str
    tenant: str
    #: The run and the step that it is part of; `None` for one that stands alone.
    parent: tuple[str, str] | None
    #: The run whose results it took over, if any, and how: `rerun`, `resume` or `fork`.
    origin: str | None
    how: str | None
    status: RunStatus
    #: Why it ended so; `None` for a run that completed or has not ended.
    reason: str | None
    input: JsonValue
    outputs: JsonValue
    usage: Usage
    steps: tuple[StepResult, ...]
    created_at: float | None
    started_at: float | None
    ended_at: float | None


#: Characters of a digest that are shown and are enough to name it.
SHORT = 16


class Approval(BaseModel):
    """Something that waits for a person."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    step_id: str
    workflow: str
    #: What the person is asked.
    message: str
    #: The act itself, as it would be sent, where the policy asks about one.
    act: JsonValue
    since: float
    #: Of all that is shown: a decision names it, and counts for nothing else.
    digest: str
    #: How often the step has asked so far, this time included.
    times: int


class RunFailed(FerrumError):
    """A run that was waited for ended without completing."""

    def __init__(self, run_id: str, status: str, reason: str) -> None:
        super().__init__(run_id, status, reason)
        self.run_id = run_id
        self.status = RunStatus(status)
        self.reason = reason

    def __str__(self) -> str:
        return f"run {self.run_id!r} is {self.status}: {self.reason}"


@cache
def record() -> Record:
    """The record of this process, as its front door uses it."""
    from ferrum.celery import redis_url

    return Record(redis_url(), patience_s=_PATIENCE_S)


def _waiting(timeout_s: float | None = None) -> Record:
    """The same, for whoever waits anyway: a failover takes longer than one wants to wait for an answer."""
    until = math.inf if timeout_s is None else time.monotonic() + timeout_s
    return record().with_patience(_WAITING_PATIENCE_S, until)


def submit(
    workflow: Workflow | Built | Mapping[str, object] | str | PathLike[str],
    input: Mapping[str, JsonValue] | None = None,
    *,
    key: str | None = None,
    priority: int | None = None,
    tenant: str | None = None,
) -> str:
    """Start a run and return its id at once.

    `workflow` is a value, a flow of `ferrum.primitives`, a mapping, or a file's path. It is planned before anything is
    sent, so a mistake raises `WorkflowError` or `InputError` here and not in a worker. The same `key` within 24 h
    returns the run that it started first. `priority`, 0 to 9, is used instead of the workflow's; 9 is most urgent.
    `tenant` is whose run it is, else `FERRUM_TENANT`: who has few runs is served before who has many.
    """
    from ferrum.celery import app

    plan = _planned(workflow)
    return start(app, record(), process_artifacts(), plan, input or {}, key=key, priority=priority, tenant=tenant)


def _planned(source: Workflow | Built | Mapping[str, object] | str | PathLike[str]) -> Plan:
    if isinstance(source, Mapping):
        return Plan.of(source)
    return Plan(source if isinstance(source, (Workflow, Built)) else Workflow.load(source))


def wait(run_id: str, *, timeout_s: float | None = None) -> JsonValue:
    """The outputs of a run, once it has completed.

    Raises `RunFailed` when it ended otherwise, `TimeoutError` after `timeout_s`, `NotFound`, also when its data are
    removed meanwhile, and `Unavailable` when Redis is away for a minute, or at the end of `timeout_s`.
    """
    end = _waiting(timeout_s).ending(run_id, timeout_s)
    if end is None:
        raise TimeoutError(f"run {run_id!r} has not ended after {timeout_s:g} s")
    if end.status is not RunStatus.COMPLETED:
        raise RunFailed(run_id, end.status.value, end.reason or "")
    return _opened(end.output, process_artifacts())


def watch(run_id: str, *, after: str = "0-0") -> Iterator[Event]:
    """The events of a run as they happen, until it ends; `after` is the id of the last one seen. Raises `NotFound`."""
    return follow(_waiting(), run_id, after)


def plan_of(run_id: str) -> Plan:
    """The plan that a run follows. Raises `NotFound`."""
    return Plan.loads(record().plan_document(run_id, record().plan_digest(run_id)))


def show(run_id: str) -> RunView:
    """All that is known of a run. Raises `NotFound`."""
    state = record().state(run_id)
    # Those inside of others are there once they were begun.
    steps = dict.fromkeys([*plan_of(run_id).top.steps, *state.steps])
    return view_of(state, tuple(steps), process_artifacts())


def view_of(state: RunState, steps: Sequence[str], store: Artifacts) -> RunView:
    def step(step_id: str) -> StepResult:
        result = state.step(step_id)
        if not result.status.ended and state.status.ended:
            return result.model_copy(update={"status": StepStatus.CANCELLED})
        return result.model_copy(update={"output": _opened(state.step_outputs.get(step_id), store)})

    return RunView(
        run_id=state.run_id,
        workflow=state.workflow,
        version=state.version,
        tenant=state.tenant,
        parent=state.parent,
        origin=state.origin,
        how=state.how,
        status=state.status,
        reason=state.reason,
        input=_opened(state.input, store),
        outputs=_opened(state.outputs, store),
        usage=state.usage,
        steps=tuple(step(step_id) for step_id in steps),
        created_at=state.created_at,
        started_at=state.started_at,
        ended_at=state.ended_at,
    )


def _opened(envelope: str | None, store: Artifacts) -> JsonValue:
    return store.resolve(Kept.loads(envelope)) if envelope else None


def approvals(run_id: str | None = None) -> list[Approval]:
    """Return what waits for a person, oldest first: of one run, or of all."""
    asked = record().asked(run_id)
    begun = record().created(dict.fromkeys(one.run_id for one in asked))
    return [
        Approval(
            run_id=one.run_id,
            step_id=one.step_id,
            workflow=begun[one.run_id].workflow,
            message=event.message,
            act=event.act,
            since=one.since,
            digest=event.digest,
            times=one.times,
        )
        for one, event in zip(asked, record().asks(asked), strict=True)
        if event is not None and one.run_id in begun
    ]


def decide(
    run_id: str, step_id: str | None = None, *, approved: bool, by: str, note: str = "", digest: str | None = None
) -> str:
    """Answer what waits for a person; returns the step that was answered.

    `digest` is the `Approval.digest` of what the person saw, or its first 16 characters or more. Without it, the step
    must not have asked for anything else before. Without `step_id` it is the one that waits. Raises `NotFound`, and
    `Conflict` when it was answered before, and when it asks for something else than the person saw.
    """
    step = step_id or _one_that_waits(run_id)
    # Not the empty id: what is asked from now on was seen by nobody.
    event = "-"
    if asked := next((one for one in record().asked(run_id) if one.step_id == step), None):
        _refuse_unseen(asked, digest)
        event = asked.event
    _send(record().decide(run_id, step, Verdict(approved, by, note), event))
    return step


def _refuse_unseen(asked: Asked, digest: str | None) -> None:
    [event] = record().asks([asked])
    current = event.digest if event is not None else ""
    where = f"{asked.step_id!r} of run {asked.run_id!r}"
    if digest is None and asked.times > 1:
        raise Conflict(
            f"{where} asks for the {_nth(asked.times)} time: say what you saw, which is digest={current[:SHORT]!r} for "
            "what it asks now (ferrum approvals list shows it)"
        )
    if digest is not None and (len(digest) < SHORT or not current.startswith(digest)):
        raise Conflict(f"{where} asks for something else by now, not {digest!r}: look again, then decide")


def _nth(times: int) -> str:
    return {2: "second", 3: "third"}.get(times, f"{times}th")


def signal(run_id: str, name: str, data: JsonValue = None, *, by: str = "") -> None:
    """Give a run a signal, for the step that waits for it now or later.

    Raises `NotFound`, and `Conflict` for a run that has ended, or that holds a thousand of them already.
    """
    _send(record().signal(run_id, name, process_artifacts().keep(data).dumps(), by))


def _one_that_waits(run_id: str) -> str:
    record().status(run_id)
    waiting = [one.step_id for one in record().asked(run_id)]
    if len(waiting) == 1:
        return waiting[0]
    if not waiting:
        raise NotFound(f"nothing in run {run_id!r} waits for a person")
    raise NotFound(f"several steps of run {run_id!r} wait for a person; say which: {', '.join(waiting)}")


def cancel(run_id: str, *, by: str = "", reason: str | None = None) -> None:
    """End a run now, whatever it is doing. Raises `NotFound`, and `Conflict` for one that has ended."""
    _send(record().cancel(run_id, by, reason))


def resume(run_id: str) -> str:
    """Let a run go on; returns the id of the run that does.

    In a live run everything that could go on goes on now, instead of at its time: steps that wait to be tried again
    are tried, and what is ready is sent again. Where a run has failed, or was ended, a new one takes over what it
    completed and runs the rest. Raises `NotFound`, and `Conflict` for a run that has completed.
    """
    status = record().status(run_id)
    if status is RunStatus.COMPLETED:
        raise Conflict(f"run {run_id!r} has completed: nothing is left to do; to run it again: ferrum runs rerun")
    if status.ended:
        return _take_over(run_id, "resume", plan_of(run_id), {}, again=())
    _send(record().nudge(run_id))
    return run_id


def rerun(run_id: str, *, from_step: str | None = None) -> str:
    """Run an ended run again, with its input and its workflow as it was then; returns the new run's id.

    With `from_step`, results are taken over but for those of that step and all that wait for it. Raises `NotFound`,
    also for a step that the workflow does not have, and `Conflict` for a run that has not ended.
    """
    status = record().status(run_id)
    if not status.ended:
        what = "wait until it is undone" if status is RunStatus.COMPENSATING else "cancel it first, or fork it"
        raise Conflict(f"run {run_id!r} has not ended, it is {status}: {what}")
    plan = plan_of(run_id)
    if from_step is not None and from_step not in plan.top.steps:
        raise NotFound(f"run {run_id!r} has no step {from_step!r}{did_you_mean(from_step, plan.top.steps)}")
    again = plan.top.steps if from_step is None else [from_step]
    return _take_over(run_id, "rerun", plan, {}, again=again)


def fork(run_id: str, input: Mapping[str, JsonValue]) -> str:
    """A new run of the same workflow with other values for some inputs; returns its id.

    Results are taken over from `run_id`, but for those of steps that see one of the inputs that differ, and of all that
    wait for them. Raises `NotFound` and `InputError`.
    """
    return _take_over(run_id, "fork", plan_of(run_id), input, again=())


def _take_over(run_id: str, how: str, plan: Plan, changes: Mapping[str, JsonValue], *, again: Collection[str]) -> str:
    state = record().state(run_id)
    before = _opened(state.input, process_artifacts())
    assert isinstance(before, dict)
    given = plan.workflow.check_input({**before, **changes})
    changed = [name for name in {*given, *before} if given.get(name) != before.get(name)]
    kept = _kept(state, plan, plan.behind([*again, *plan.reading(changed)]))
    kept_input = process_artifacts().keep(given).dumps()
    run = plan.new_run(
        new_run_id(), None, kept_input, priority=state.priority, tenant=state.tenant, origin=(run_id, how),
        fed=record().marks(run_id).fed,
    )  # fmt: skip
    record().create(run)
    record().adopt(
        run.run_id,
        [(name, _kept_event(state, name), state.step_outputs.get(name, "")) for name in plan.in_order if name in kept],
    )
    needs = {name: plan.top.needs[name] for name in plan.top.steps if name not in kept}
    ready = [name for name, before_it in needs.items() if kept.issuperset(before_it)]
    ended = {name: len(kept.intersection(needs[name])) for name in needs if name not in ready}
    roots = [(name, plan.steps[name].type.queue, plan.steps[name].deadline_ms) for name in ready]
    _send(record().begin(run.run_id, next(iter(kept), ""), roots, ended))
    return run.run_id


def _kept(state: RunState, plan: Plan, again: Collection[str]) -> frozenset[str]:
    """The steps whose results are taken over: those that are good, and whose needs are all taken over too."""
    undone = {step.partition(".")[0] for step in state.steps if step.endswith(".compensate")}
    kept: set[str] = set()
    for name in plan.in_order:
        result = state.step(name)
        good = result.status is StepStatus.COMPLETED or name in state.passed_over
        if good and name not in again and name not in undone and kept.issuperset(plan.top.needs[name]):
            kept.add(name)
    return frozenset(kept)


def _kept_event(state: RunState, name: str) -> dict[str, object]:
    result = state.step(name)
    data: dict[str, object] = {"origin": state.run_id, "status": result.status.value, "error": result.error}
    return data | ({"tolerated": True} if result.status is StepStatus.FAILED else {})


def cache_stats() -> Stats:
    """How often steps with a `cache` were answered from it, since it was last left alone for a week."""
    return Cache(record().scripts()).stats()


@cache
def _letters() -> DeadLetters:
    from ferrum.celery import redis_url

    return DeadLetters(redis_url(), patience_s=10)


def dead_letters() -> list[DeadLetter]:
    """The messages that workers dropped and that are kept, newest first."""
    return _letters().all()


def dead_letter(id: str) -> tuple[DeadLetter, str]:
    """One of them, and its text as it stood in the queue. Raises `NotFound`."""
    return _letters().find(id)


def replay_dead_letter(id: str) -> DeadLetter:
    """Put a dropped message back into its queue. Raises `NotFound`, and `Conflict` where not all of it was kept."""
    return _letters().replay(id)


def delete_dead_letter(id: str) -> None:
    """Forget a dropped message. Raises `NotFound`."""
    _letters().delete(id)


def register(workflow: Workflow | Built | Mapping[str, object] | str | PathLike[str]) -> tuple[str, str]:
    """Keep a workflow under its name and version, for `type: workflow` steps; returns both.

    Raises `WorkflowError`, also where it leads back to itself, and `Conflict` for a version that says something else.
    """
    plan = _planned(workflow)
    name, version = plan.workflow.name, plan.workflow.version
    _refuse_cycles(plan.workflow.to_dict(), (name,))
    record().register(name, version, plan.document)
    return name, version


def _refuse_cycles(document: JsonValue, path: tuple[str, ...]) -> None:
    for name, version in _named_workflows(document):
        if name == path[0]:
            raise WorkflowError([Problem(f"these workflows need each other: {' -> '.join([*path, name])}")])
        try:
            inner = record().registered(name, version)
        except NotFound:
            # It may be registered later; whoever does so is told then.
            continue
        if name not in path:
            _refuse_cycles(dict(inner), (*path, name))


def _named_workflows(value: JsonValue) -> Iterator[tuple[str, str | None]]:
    """Every registered workflow that a workflow's steps name."""
    if isinstance(value, dict):
        name, version = value.get("name"), value.get("version")
        if value.get("type") == "workflow" and isinstance(name, str):
            yield name, version if isinstance(version, str) else None
        for part in value.values():
            yield from _named_workflows(part)
    elif isinstance(value, list):
        for part in value:
            yield from _named_workflows(part)


def _send(sends: Sequence[Resend]) -> None:
    if sends:
        from ferrum.celery import app

        hand_over(app, plan_of, sends)

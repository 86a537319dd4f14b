"""workflow → plan → canvas: what will run, in which order, as which Celery canvas. Deciding only; nothing is sent here.

The graph is cut into segments. A segment is a canvas: a chain of steps and of chords (branches side by side, then the
step that joins them). An edge inside a segment is carried by Celery; an edge into the first steps of another one is a
join through the record: the finish that makes a step ready says so, and that worker sends the segment that it begins.
So every step starts as soon as its own needs have ended, whatever the graph's shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, ValidationError

from ferrum.errors import Problem, WorkflowError, did_you_mean
from ferrum.expressions import Condition, Template
from ferrum.record import Node
from ferrum.steps import Params, StepType, step_types
from ferrum.workflow import COMMON, Retry, Step, Workflow

if TYPE_CHECKING:
    from celery.canvas import Signature

#: Steps that one chain carries. Each message of a chain holds the rest of it, so bytes grow with the square of this;
#: a new segment costs about as much as half a step. Measured by `bench/steps.py --chain`.
CHAIN = 16
#: Steps side by side that one chord may hold; each of its messages carries the join.
CHORD = 100


@dataclass(frozen=True, slots=True)
class Beside:
    """Branches that run side by side, each a chain of steps; the step after them joins them."""

    branches: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """One canvas."""

    id: str
    #: A step, or branches followed by the step that joins them.
    elements: tuple[str | Beside, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        """The steps that begin it."""
        first = self.elements[0]
        return tuple(branch[0] for branch in first.branches) if isinstance(first, Beside) else (first,)

    @property
    def steps(self) -> Iterator[str]:
        for element in self.elements:
            if isinstance(element, Beside):
                for branch in element.branches:
                    yield from branch
            else:
                yield element

    def __str__(self) -> str:
        parts = [_beside(element) if isinstance(element, Beside) else element for element in self.elements]
        return parts[0] if len(parts) == 1 else f"chain({', '.join(parts)})"


def _beside(beside: Beside) -> str:
    parts = [branch[0] if len(branch) == 1 else f"chain({', '.join(branch)})" for branch in beside.branches]
    shown = parts if len(parts) <= 8 else [*parts[:6], f"… {len(parts) - 6} more"]
    return f"group({', '.join(shown)})"


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step, ready to be run."""

    id: str
    type: StepType[Any]
    needs: tuple[str, ...]
    when: Condition | None
    params: Template
    retry: Retry
    timeout_s: float | None
    #: The names that its expressions use.
    references: frozenset[str]

    def resolve(self, scope: Mapping[str, JsonValue]) -> Params:
        """Its parameters, with every expression evaluated.

        Raises `ExpressionError`, and `WorkflowError` when a value does not fit.
        """
        values = self.params.evaluate(scope)
        try:
            checked: Params = self.type.params.model_validate(values)
        except ValidationError as error:
            raise WorkflowError(
                Problem(_sentence(one), f"steps.{self.id}{_path(one['loc'])}") for one in error.errors()
            ) from None
        return checked


class Plan:
    """A workflow that was checked and compiled. A value; the same workflow makes the same plan."""

    def __init__(self, workflow: Workflow) -> None:
        """Raises `WorkflowError` with everything that is wrong."""
        self.workflow = workflow
        self.steps = _compile(workflow)
        self.outputs = Template.compile(workflow.outputs)
        self.segments = _segments({step.id: step.needs for step in self.steps.values()})

    @cached_property
    def document(self) -> str:
        """The workflow as canonical JSON: what is kept of the plan, and what its digest is of."""
        return json.dumps(self.workflow.to_dict(), separators=(",", ":"), ensure_ascii=False)

    @cached_property
    def digest(self) -> str:
        # The order of the segments is part of what is kept, so a new way to cut them is a new plan.
        return sha256(f"{CHAIN}/{CHORD}\n{self.document}".encode()).hexdigest()

    @classmethod
    def of(cls, workflow: Mapping[str, object]) -> Plan:
        """The plan of a workflow that is plain data; the same data again costs only a look.

        Raises `WorkflowError`.
        """
        try:
            document = json.dumps(workflow)
        except (TypeError, ValueError, RecursionError):
            # No JSON: what is wrong with it is said by the workflow itself.
            return cls(Workflow.of(workflow))
        return _remembered(document)

    @classmethod
    def loads(cls, document: str) -> Plan:
        return cls(Workflow.of(json.loads(document)))

    @cached_property
    def segment_of(self) -> Mapping[str, Segment]:
        return {step: segment for segment in self.segments for step in segment.steps}

    @cached_property
    def next(self) -> Mapping[str, tuple[str, ...]]:
        """What waits for each step."""
        behind: dict[str, list[str]] = {step: [] for step in self.steps}
        for step in self.steps.values():
            for need in step.needs:
                behind[need].append(step.id)
        return {step: tuple(names) for step, names in behind.items()}

    @property
    def roots(self) -> tuple[PlannedStep, ...]:
        return tuple(step for step in self.steps.values() if not step.needs)

    def nodes(self) -> dict[str, Node]:
        """The graph as the record keeps it."""
        heads = {head for segment in self.segments for head in segment.heads}

        def edge(name: str) -> tuple[str, int, bool, str, str]:
            step = self.steps[name]
            return name, len(step.needs), name not in heads, step.type.queue, self.segment_of[name].id

        return {
            step.id: Node(
                queue=step.type.queue,
                segment=self.segment_of[step.id].id,
                needs=step.needs,
                next=tuple(edge(name) for name in self.next[step.id]),
                wants_input="input" in step.references,
            )
            for step in self.steps.values()
        }

    def starting_with(self, heads: Sequence[str]) -> list[Segment]:
        """The segments that these steps begin, each once."""
        return list({self.segment_of[head].id: self.segment_of[head] for head in heads}.values())

    def canvas(self, run_id: str, segment: Segment) -> Signature:
        """The Celery canvas of one segment; its messages hold `(run_id, step_id)` and nothing else."""
        from celery import chain, group

        parts: list[Signature] = []
        for element in segment.elements:
            if isinstance(element, Beside):
                branches = [chain(*(self.signature(run_id, step) for step in branch)) for branch in element.branches]
                parts.append(group(*branches))
            else:
                parts.append(self.signature(run_id, element))
        return parts[0] if len(parts) == 1 else chain(*parts)

    def signature(self, run_id: str, step: str) -> Signature:
        """One step as an immutable signature, under the task id that it always has."""
        from celery import Signature

        task = f"ferrum.{self.steps[step].type.name}"
        return Signature(task, (run_id, step), immutable=True, options={"task_id": task_id(run_id, step)})

    def __str__(self) -> str:
        return "\n".join(_describe(self))


@lru_cache(maxsize=64)
def _remembered(document: str) -> Plan:
    return Plan.loads(document)


def task_id(run_id: str, step_id: str) -> str:
    """The Celery task id of a step: the same for every message that it ever has."""
    return f"{run_id}.{step_id}"


# Checking.


def _compile(workflow: Workflow) -> dict[str, PlannedStep]:
    problems: list[Problem] = []
    for step in workflow.steps.values():
        problems += _problems(workflow, step)
    if problems:
        raise WorkflowError(problems, workflow.source)
    return {step.id: _planned(workflow, step) for step in workflow.steps.values()}


def _problems(workflow: Workflow, step: Step) -> Iterator[Problem]:
    known = step_types()
    kind = known.get(step.type)
    if kind is None:
        hint = did_you_mean(step.type, known)
        yield workflow.problem(f"there is no step type {step.type!r}{hint}", "steps", step.id, "type")
        return
    try:
        kind.params.model_validate(step.params)
    except ValidationError as error:
        for one in error.errors():
            where = one["loc"]
            if one["type"] == "extra_forbidden" and len(where) == 1:
                hint = did_you_mean(str(where[0]), [*kind.params.model_fields, *COMMON])
                yield workflow.problem(
                    f"a step of type {step.type!r} has no {where[0]!r}{hint}", "steps", step.id, *where, key=True
                )
            elif one["type"] == "missing" or not where or not _is_template(step.params, where):
                yield workflow.problem(_sentence(one), "steps", step.id, *where)


def _is_template(value: JsonValue, where: Sequence[int | str]) -> bool:
    """Whether what stands there is known only at run time."""
    for part in where:
        if isinstance(value, dict) and str(part) in value:
            value = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            break
    return "{{" in json.dumps(value)


def _sentence(error: Mapping[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{error['loc'][-1]!r} is missing"
    return message[:1].lower() + message[1:]


def _path(where: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)


def _planned(workflow: Workflow, step: Step) -> PlannedStep:
    kind = step_types()[step.type]
    defaults = workflow.defaults
    params = Template.compile(dict(step.params))
    when = Condition.compile(step.when) if step.when is not None else None
    return PlannedStep(
        id=step.id,
        type=kind,
        needs=workflow.needs_of(step.id),
        when=when,
        params=params,
        retry=step.retry or defaults.retry or kind.retry,
        timeout_s=step.timeout or (None if kind.waits else defaults.timeout) or kind.timeout_s,
        references=params.references | (when.references if when else frozenset()),
    )


# Cutting.


def _segments(needs: Mapping[str, tuple[str, ...]]) -> tuple[Segment, ...]:
    return tuple(_Cutter(needs).cut())


class _Cutter:
    def __init__(self, needs: Mapping[str, tuple[str, ...]]) -> None:
        self._needs = _reduce(needs)
        self._next: dict[str, list[str]] = {step: [] for step in self._needs}
        for step, before in self._needs.items():
            for need in before:
                self._next[need].append(step)
        self._cut: set[str] = set()

    def cut(self) -> Iterator[Segment]:
        number = 0
        starts: list[tuple[str, ...]] = [tuple(step for step, before in self._needs.items() if not before)]
        while starts:
            for first in self._beginnings(starts.pop()):
                elements = self._follow(first)
                segment = Segment(f"s{number}", elements)
                number += 1
                yield segment
                starts += self._behind(segment)

    def _beginnings(self, together: Sequence[str]) -> Iterator[str | Beside]:
        """How steps that become ready together begin segments: those that meet again in one, the others alone."""
        steps = [step for step in together if step not in self._cut]
        joined: dict[str, list[tuple[str, ...]]] = {}
        for step in steps:
            branch = self._branch(step)
            joined.setdefault(self._join_of(branch), []).append(branch)
        for join, branches in joined.items():
            if self._meet(join, branches):
                yield Beside(tuple(branches))
            else:
                yield from (branch[0] for branch in branches)

    def _meet(self, join: str, branches: Sequence[tuple[str, ...]]) -> bool:
        """Whether these branches are all that the join waits for, and few enough for one chord."""
        ends = {branch[-1] for branch in branches}
        size = sum(len(branch) for branch in branches)
        return bool(join) and len(branches) > 1 and size <= CHORD and set(self._needs[join]) == ends

    def _join_of(self, branch: tuple[str, ...]) -> str:
        joins = [step for step in self._next[branch[-1]] if len(self._needs[step]) > 1]
        return joins[0] if len(joins) == 1 else ""

    def _branch(self, step: str) -> tuple[str, ...]:
        """The chain from here, as long as nothing forks or joins."""
        branch = [step]
        while len(branch) < CHAIN and (after := self._only_next(branch[-1])):
            branch.append(after)
        return tuple(branch)

    def _only_next(self, step: str) -> str | None:
        own = self._own(step)
        return own[0] if len(own) == 1 else None

    def _own(self, step: str) -> list[str]:
        """What waits for this step and for nothing else."""
        return [after for after in self._next[step] if len(self._needs[after]) == 1]

    def _follow(self, first: str | Beside) -> tuple[str | Beside, ...]:
        elements: list[str | Beside] = []
        length = 0
        element: str | Beside | None = first
        while element is not None:
            elements.append(element)
            if isinstance(element, Beside):
                self._cut.update(step for branch in element.branches for step in branch)
                length += sum(len(branch) for branch in element.branches)
                join = self._join_of(element.branches[0])
                elements.append(join)
                last = join
            else:
                last = element
            self._cut.add(last)
            length += 1
            element = self._after(last, length)
        return tuple(elements)

    def _after(self, step: str, length: int) -> str | Beside | None:
        """What goes on in the same segment after this step."""
        own = self._own(step)
        if length >= CHAIN or not own:
            return None
        if len(own) == 1:
            return own[0]
        beginnings = list(self._beginnings(own))
        if len(beginnings) == 1 and isinstance(beginnings[0], Beside):
            return beginnings[0]
        return None

    def _behind(self, segment: Segment) -> Iterator[tuple[str, ...]]:
        """What a segment's steps make ready and it does not carry itself; what forks from one step, together."""
        for step in reversed(list(segment.steps)):
            for after in self._next[step]:
                if after not in self._cut and len(self._needs[after]) > 1 and set(self._needs[after]) <= self._cut:
                    yield (after,)
            own = tuple(after for after in self._own(step) if after not in self._cut)
            if own:
                yield own


def _reduce(needs: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The graph without the edges that follow from others (transitive reduction), in an order that goes forward."""
    order = _forward(needs)
    bit = {step: 1 << place for place, step in enumerate(order)}
    above: dict[str, int] = {}
    reduced: dict[str, tuple[str, ...]] = {}
    for step in order:
        far = 0
        for need in needs[step]:
            far |= above[need]
        reduced[step] = tuple(need for need in needs[step] if not far & bit[need])
        above[step] = far
        for need in needs[step]:
            above[step] |= bit[need]
    return reduced


def _forward(needs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Every step after what it needs, otherwise in the author's order."""
    from graphlib import TopologicalSorter

    return list(TopologicalSorter(needs).static_order())


# Printing.


def _describe(plan: Plan) -> Iterator[str]:
    workflow = plan.workflow
    yield f"{workflow.name} {workflow.version}  {len(plan.steps)} steps, {len(plan.segments)} canvas"
    width = max(len(step) for step in plan.steps)
    kinds = max(len(step.type.name) for step in plan.steps.values())
    for step in plan.steps.values():
        after = f"  after {', '.join(step.needs)}" if step.needs else ""
        when = f"  when {workflow.steps[step.id].when}" if step.when else ""
        yield f"  {step.id:<{width}}  {step.type.name:<{kinds}}{after}{when}".rstrip()
    yield "canvas"
    for segment in plan.segments:
        yield f"  {segment.id}  {segment}"
    carried, joined = edges(plan)
    yield f"edges on a canvas     {_edges(carried)}"
    yield f"joins by the record   {_edges(joined)}"


def edges(plan: Plan) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The edges that Celery carries, and those that are joins through the record."""
    heads = {head for segment in plan.segments for head in segment.heads}
    reduced = _reduce({step.id: step.needs for step in plan.steps.values()})
    carried: list[tuple[str, str]] = []
    joined: list[tuple[str, str]] = []
    for step in plan.steps.values():
        for need in step.needs:
            on_canvas = step.id not in heads and need in reduced[step.id]
            (carried if on_canvas else joined).append((need, step.id))
    return carried, joined


def _edges(pairs: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(f"{a} → {b}" for a, b in pairs[:40])
    return shown + (f", … {len(pairs) - 40} more" if len(pairs) > 40 else "") if pairs else "none"

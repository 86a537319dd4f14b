"""workflow → plan → canvas: what will run, in which order, as which Celery canvas. Deciding only; nothing is sent here.

The graph is cut into segments. A segment is a canvas: a chain of steps and of chords (branches side by side, then the
step that joins them). An edge inside a segment is carried by Celery; an edge into the first steps of another one is a
join through the record: the finish that makes a step ready says so, and that worker sends the segment that it begins.
So every step starts as soon as its own needs have ended, whatever the graph's shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import JsonValue, ValidationError

from ferrum.errors import Problem, WorkflowError, did_you_mean
from ferrum.expressions import Condition, Path, Template, Write
from ferrum.governance.budget import Limits, ceilings
from ferrum.record import LANES, Edge, Frame, NewRun, Node, Read
from ferrum.settings import settings
from ferrum.steps import Params, StepType, step_types
from ferrum.untrusted import Marks, in_schema, noted, said_in
from ferrum.workflow import COMMON, Defaults, Retry, Step, Workflow, inner_needs, labels

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature

#: Steps that one chain carries. Each message of a chain holds the rest of it, so bytes grow with the square of this;
#: a new segment costs about as much as half a step. Measured by `bench/steps.py --chain`.
CHAIN = 16
#: Steps side by side that one chord may hold; each of its messages carries the join.
CHORD = 100
#: What the names begin with that the parameters of an undone step see.
PARAMS = "params:"
#: Which way of keeping plans in the record this is.
_LAYOUT = 2

#: How late a step may be that ends by itself at its timeout.
_LATE_S = 10.0


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
class Body:
    """Steps that run together: those of the workflow, or those of each frame inside a step."""

    #: The id of its frames; `*` stands for a number, empty for the workflow's own.
    frame: str
    #: By their names in it; a frame that is one step has it under an empty name.
    steps: Mapping[str, str]
    needs: Mapping[str, tuple[str, ...]]
    segments: tuple[Segment, ...]
    #: What its frames leave behind; `None`: what its last steps do.
    output: Template | None = None
    #: Its frame is called as the step around it is.
    nameless: bool = False

    @property
    def last(self) -> list[str]:
        """The steps that no other one in it waits for."""
        before = {need for needs in self.needs.values() for need in needs}
        return [name for name in self.steps if name not in before]

    def starting_with(self, head: str) -> Segment:
        return next(segment for segment in self.segments if head in segment.heads)


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step, ready to be run; for a step in frames, all that it is in any of them."""

    #: With `*` for each number.
    id: str
    type: StepType[Any]
    #: What the author wrote; several planned steps come from it where it is repeated.
    spec: Step
    #: The steps beside it that must have ended.
    needs: tuple[str, ...]
    when: Condition | None
    params: Template
    #: What is a parameter as it stands, though it may look like a template.
    fixed: dict[str, JsonValue]
    retry: Retry
    timeout_s: float | None
    deadline_s: float | None
    #: The names that its expressions use.
    references: frozenset[str]
    #: Those of them that are outputs of steps further out, items, and numbers of frames (by parts of its id).
    reads: tuple[Read, ...] = ()
    items: tuple[tuple[str, int], ...] = ()
    numbers: tuple[tuple[str, int], ...] = ()
    #: It may fail.
    tolerated: bool = False
    #: What may run inside of it, by the label of the frame; `*` for numbered ones.
    bodies: Mapping[str, Body] = field(default_factory=dict)
    #: How many alternatives it has.
    fallbacks: int = 0
    until: Condition | None = None
    cache: Template | None = None
    limits: Template | None = None
    #: There is a step that undoes it.
    undoable: bool = False
    #: The step that it undoes.
    undoes: PlannedStep | None = None
    #: The step whose parameters it sees as `params`; what they see is among `reads`, `items`, `numbers`, by `PARAMS`.
    params_of: PlannedStep | None = None
    #: It is inside of something that undoes.
    undoing: bool = False
    #: Where what its names stand for comes from, as `Plan.foreign` calls it.
    origins: Mapping[str, str] = field(default_factory=dict)
    #: The body that it is part of.
    body: str = ""

    @property
    def deadline_ms(self) -> int:
        """As the record wants it; 0 for none."""
        return 0 if self.deadline_s is None else max(1, round(self.deadline_s * 1000))

    @property
    def cut_off_s(self) -> float | None:
        """How long a coroutine of it may take: its timeout, and a little more where it keeps that itself."""
        return self.timeout_s + _LATE_S if self.timeout_s is not None and self.type.keeps_time else self.timeout_s

    @property
    def own_names(self) -> tuple[str, str] | None:
        """What the item and the number of each of its frames are called in them; `None` where frames have none."""
        names = {"for_each": (self.spec.item, self.spec.index), "repeat": ("previous", "round")}
        return names.get(self.type.name)

    @property
    def composed(self) -> bool:
        """Whether anything may go on inside of it."""
        return bool(self.bodies) or self.type.composed

    def resolve(
        self, scope: Mapping[str, JsonValue], write: Write | None = None, in_schemas: Write | None = None
    ) -> Params:
        """Its parameters, with every expression evaluated; `write` says how values are written that a model reads.

        `in_schemas` says the same of what it reads in a JSON Schema.

        Raises `ExpressionError`, and `WorkflowError` when a value does not fit.
        """
        values = self.params.evaluate(scope, write, self.type.prompts)
        assert isinstance(values, dict)
        if write is not None:
            values |= {name: noted(values[name]) for name in self.type.prompts & values.keys()}
            if schemas := self.type.schemas & values.keys():
                shown = self.params.evaluate(scope, in_schemas, schemas)
                assert isinstance(shown, dict)
                values |= {name: in_schema(values[name], shown[name]) for name in schemas}
        try:
            checked: Params = self.type.params.model_validate(values | self.fixed)
        except ValidationError as error:
            raise WorkflowError(
                Problem(_sentence(one), f"steps.{self.id}{_path(one['loc'])}") for one in error.errors()
            ) from None
        return checked


@runtime_checkable
class Built(Protocol):
    """What a workflow can be made of, like the flows of `ferrum.primitives`."""

    def __workflow__(self) -> Workflow: ...


class Plan:
    """A workflow that was checked and compiled. A value; the same workflow makes the same plan."""

    def __init__(self, workflow: Workflow | Built) -> None:
        """Raises `WorkflowError` with everything that is wrong."""
        workflow = workflow if isinstance(workflow, Workflow) else workflow.__workflow__()
        self.workflow = workflow
        if problems := list(_problems_in(workflow, workflow.steps, ("steps",))):
            raise WorkflowError(problems, workflow.source)
        compiler = _Compiler(workflow.defaults)
        self.top = compiler.body("", workflow.steps, {}, ())
        #: Every step, those inside of others too, by id.
        self.steps: Mapping[str, PlannedStep] = compiler.steps
        self.bodies: Mapping[str, Body] = compiler.bodies
        self.outputs = Template.compile(workflow.outputs)
        self.segments = self.top.segments

    @cached_property
    def document(self) -> str:
        """The workflow as canonical JSON: what is kept of the plan, and what its digest is of."""
        return json.dumps(self.workflow.to_dict(), separators=(",", ":"), ensure_ascii=False)

    @cached_property
    def digest(self) -> str:
        # The order of the segments is part of what is kept, so a new way to cut them is a new plan.
        return sha256(f"{_LAYOUT}/{CHAIN}/{CHORD}\n{self.document}".encode()).hexdigest()

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
        """The plan that has this `document`."""
        return cls(Workflow.kept(document))

    @property
    def lane(self) -> int:
        """The lane of its messages: the more urgent a run, the lower."""
        return LANES - 1 - self.workflow.priority

    def step(self, step_id: str) -> PlannedStep:
        """The step with this id, in whichever frame."""
        return self.steps[template_id(step_id)]

    @cached_property
    def segment_of(self) -> Mapping[str, Segment]:
        return {step: segment for segment in self.segments for step in segment.steps}

    @property
    def roots(self) -> tuple[PlannedStep, ...]:
        return tuple(self.steps[name] for name in self.top.steps if not self.top.needs[name])

    def nodes(self) -> dict[str, str]:
        """The graph as the record keeps it: each step, and the frames by ` f:<id>`."""
        texts = {f" f:{body.frame}": self._frame(body).dumps() for body in self.bodies.values()}
        for body in self.bodies.values():
            heads = {head for segment in body.segments for head in segment.heads}
            behind: dict[str, list[str]] = {name: [] for name in body.steps}
            for name, needs in body.needs.items():
                for need in needs:
                    behind[need].append(name)
            segments = {name: segment.id for segment in body.segments for name in segment.steps}
            edges = {
                name: Edge(
                    name, len(body.needs[name]), name not in heads, self.steps[step].type.queue, segments[name],
                    self.steps[step].deadline_ms,
                )
                for name, step in body.steps.items()
            }  # fmt: skip
            for name, step in body.steps.items():
                node = self._node(self.steps[step], body, segments[name], [edges[after] for after in behind[name]])
                texts[step] = node.dumps()
        for undo in self.steps.values():
            if undo.undoes is not None:
                texts[undo.id] = self._node(undo, None, "s0", []).dumps()
        return texts

    def _frame(self, body: Body) -> Frame:
        segments = {name: segment.id for segment in body.segments for name in segment.steps}
        return Frame(
            len(body.steps),
            tuple(
                (name, self.steps[step].type.queue, segments[name], self.steps[step].deadline_ms)
                for name, step in body.steps.items()
                if not body.needs[name]
            ),
        )

    def _node(self, step: PlannedStep, body: Body | None, segment: str, behind: Sequence[Edge]) -> Node:
        inside = None
        if body is not None and body.frame:
            inside = 0 if "" in body.steps else 1
        references = step.references | (step.params_of.references if step.params_of else frozenset())
        return Node(
            queue=step.type.queue,
            segment=segment,
            needs=step.needs,
            next=tuple(behind),
            wants_input="input" in references,
            reads=step.reads,
            items=step.items,
            inside=inside,
            siblings=len(body.steps) if body else 1,
            nameless=body.nameless if body else False,
            tolerated=step.tolerated,
            undoable=step.undoable,
            undoes=step.undoing,
            undo=step.undoes is not None,
            composed=step.composed,
            deadline_ms=step.deadline_ms,
        )

    def new_run(
        self, run_id: str, key: str | None, given: str, *, priority: int | None = None, tenant: str | None = None,
        parent: tuple[str, str] | None = None, origin: tuple[str, str] | None = None, fed: frozenset[str] = frozenset(),
    ) -> NewRun:  # fmt: skip
        """Return all that the record needs to begin a run; `given` is the envelope of its input, `fed` as `Marks`."""
        workflow = self.workflow
        budget = workflow.budget
        limits = Limits(**budget.model_dump(exclude={"wall_time"})) if budget else Limits()
        return NewRun(
            run_id=run_id,
            key=key,
            plan=self.digest,
            document=lambda: self.document,
            nodes=self.nodes,
            steps=len(self.top.steps),
            roots=tuple((step.id, step.type.queue, step.deadline_ms) for step in self.roots),
            workflow=workflow.name,
            version=workflow.version,
            input=given,
            has_outputs=bool(workflow.outputs),
            limits=ceilings(limits),
            wall_time_s=budget.wall_time if budget else None,
            keep_s=settings().keep_runs,
            lane=LANES - 1 - (workflow.priority if priority is None else priority),
            deadline_s=workflow.deadline,
            tenant=tenant or settings().tenant,
            parent=parent,
            origin=origin,
            marks=Marks.new(fed),
        )

    @cached_property
    def in_order(self) -> list[str]:
        """The steps of the workflow, each after all that it needs."""
        return _forward(self.top.needs)

    def behind(self, steps: Iterable[str]) -> frozenset[str]:
        """These steps of the workflow and all that wait for them."""
        found = set(steps)
        for name in self.in_order:
            if found.intersection(self.top.needs[name]):
                found.add(name)
        return frozenset(found)

    def reading(self, inputs: Collection[str]) -> list[str]:
        """The steps of the workflow whose expressions, or those of what is inside of them, see one of these inputs."""
        return [name for name in self.top.steps if any(_sees(path, inputs) for path in self._paths(name))]

    def _paths(self, name: str) -> Iterator[tuple[str, ...]]:
        for step in self.steps.values():
            if step.id == name or step.id.startswith(f"{name}."):
                outputs = (body.output for body in step.bodies.values())
                for expression in (step.params, step.when, step.until, step.cache, step.limits, *outputs):
                    yield from expression.paths if expression else ()

    # What somebody else wrote.

    def resolved(self, step: PlannedStep, scope: Mapping[str, JsonValue], marks: Marks) -> Params:
        """A step's parameters; what a model reads of them and somebody else wrote is marked.

        Raises `ExpressionError`, and `WorkflowError` when a value does not fit.
        """
        if not step.type.prompts:
            return step.resolve(scope)
        foreign = self._foreign(marks.fed)

        def write(paths: frozenset[Path], value: JsonValue) -> JsonValue:
            origins = sorted(path[0] for path in paths if foreign.intersection(_origins(step, [path], marks.fed)))
            return marks.written(value, origins[0], scope.get(origins[0])) if origins else None

        def in_schemas(paths: frozenset[Path], value: JsonValue) -> JsonValue:
            if isinstance(value, str):
                return write(paths, value)
            return said_in(value, lambda text: str(write(paths, text) or text))

        return step.resolve(scope, write, in_schemas)

    def feeding(self, step: PlannedStep, name: str, fed: frozenset[str]) -> frozenset[str]:
        """The fields of this parameter of a step that may hold text which somebody else wrote; `*` for all."""
        foreign, value = self._foreign(fed), step.spec.params.get(name, {})
        fields = value if isinstance(value, dict) else {"*": value}
        return frozenset(
            field
            for field, one in fields.items()
            if foreign.intersection(_origins(step, Template.compile(one).paths, fed))
        )

    def _foreign(self, fed: frozenset[str]) -> frozenset[str]:
        """Return the outputs and parameters of steps that may hold text of somebody else, where these inputs do."""
        if fed not in self._tainted:
            self._tainted[fed] = _reached(self._flows(fed))
        return self._tainted[fed]

    @cached_property
    def _tainted(self) -> dict[frozenset[str], frozenset[str]]:
        return {}

    def _flows(self, fed: frozenset[str]) -> Iterator[tuple[str, str]]:
        """From where to where text may come."""
        for step in self.steps.values():
            output = _output(step.id)
            if step.type.foreign or step.spec.on_error == "collect":
                yield _ELSEWHERE, output
            for origin in _origins(step, step.params.paths, fed):
                yield origin, _params(step.id)
            if step.type.passes_on:
                yield _params(step.id), output
            for body in step.bodies.values():
                names = body.last if body.output is None else body.output.references & body.steps.keys()
                yield from ((_output(body.steps[name]), output) for name in names)
                if body.output is not None:
                    yield from ((origin, output) for origin in _origins(step, body.output.paths, fed))

    def starting_with(self, head: str) -> tuple[Segment, str]:
        """The segment that a step begins, and what the ids of its steps begin with."""
        template = template_id(head)
        body = self.bodies[self.steps[template].body]
        if "" in body.steps:
            return body.segments[0], head
        name = head.rpartition(".")[2]
        return body.starting_with(name), head[: len(head) - len(name)]

    def canvas(
        self, run_id: str, segment: Segment, prefix: str = "", lane: int | None = None, app: Celery | None = None
    ) -> Signature:
        """The Celery canvas of one segment; its messages hold `(run_id, step_id)` and nothing else."""
        from celery import chain, group

        def signature(step: str) -> Signature:
            return self.signature(run_id, prefix + step, lane, app)

        parts: list[Signature] = []
        for element in segment.elements:
            if isinstance(element, Beside):
                parts.append(group(*(chain(*map(signature, branch)) for branch in element.branches)))
            else:
                parts.append(signature(element))
        return parts[0] if len(parts) == 1 else chain(*parts)

    def signature(self, run_id: str, step: str, lane: int | None = None, app: Celery | None = None) -> Signature:
        """One step as an immutable signature, under the task id that it always has.

        Without an `app` it is of whichever was made last in this process, which may be the user's own.
        """
        from celery import Signature

        options = {"task_id": task_id(run_id, step), "priority": self.lane if lane is None else lane}
        return Signature(self.step(step).type.task, (run_id, step), immutable=True, options=options, app=app)

    def __str__(self) -> str:
        return "\n".join(_describe(self))


@lru_cache(maxsize=64)
def _remembered(document: str) -> Plan:
    return Plan(Workflow.of(json.loads(document)))


def task_id(run_id: str, step_id: str) -> str:
    """The Celery task id of a step: the same for every message that it ever has."""
    return f"{run_id}.{step_id}"


def template_id(step_id: str) -> str:
    """The id under which a plan knows a step: `each.3.sum` is `each.*.sum`."""
    return _NUMBER.sub(".*", step_id) if "." in step_id else step_id


_NUMBER: Final = re.compile(r"\.\d+(?=\.|$)")


def _sees(path: tuple[str, ...], inputs: Collection[str]) -> bool:
    """Whether a reference leads to one of these inputs; `input` alone and `input[*]` lead to all."""
    return path[0] == "input" and (len(path) == 1 or path[1] == "*" or path[1] in inputs)


#: Where text comes from that somebody else wrote.
_ELSEWHERE: Final = "elsewhere"


def _output(step_id: str) -> str:
    return f"output of {step_id}"


def _params(step_id: str) -> str:
    return f"parameters of {step_id}"


def _origins(step: PlannedStep, paths: Iterable[Path], fed: frozenset[str]) -> Iterator[str]:
    """Return the origins of all that these references of a step lead to."""
    own = step.own_names
    for path in paths:
        if path[0] == "input":
            if fed and ("*" in fed or _sees(path, fed)):
                yield _ELSEWHERE
        elif path[0] in step.origins:
            yield step.origins[path[0]]
        elif own is not None and path[0] == own[0]:
            # In what its frames leave behind.
            yield from (_params(step.id), _output(step.id)) if step.type.name == "repeat" else (_params(step.id),)


def _reached(flows: Iterable[tuple[str, str]]) -> frozenset[str]:
    """All that text may come to from elsewhere."""
    onward: dict[str, list[str]] = {}
    for source, target in flows:
        onward.setdefault(source, []).append(target)
    reached, left = {_ELSEWHERE}, [_ELSEWHERE]
    while left:
        for target in onward.get(left.pop(), ()):
            if target not in reached:
                reached.add(target)
                left.append(target)
    return frozenset(reached)


# Checking.


def _problems_in(workflow: Workflow, steps: Mapping[str, Step], where: tuple[str | int, ...]) -> Iterator[Problem]:
    for name, step in steps.items():
        yield from _problems(workflow, step, (*where, name))


def _problems(workflow: Workflow, step: Step, where: tuple[str | int, ...]) -> Iterator[Problem]:
    for way, inner in step.inner:
        yield from _problems(workflow, inner, (*where, *way))
    known = {name: kind for name, kind in step_types().items() if kind.written}
    kind = known.get(step.type)
    if kind is None:
        hint = did_you_mean(step.type, known)
        yield workflow.problem(f"there is no step type {step.type!r}{hint}", *where, "type")
        return
    try:
        kind.params.model_validate(step.params)
    except ValidationError as error:
        for one in error.errors():
            part = one["loc"]
            if one["type"] == "extra_forbidden" and len(part) == 1:
                hint = did_you_mean(str(part[0]), [*kind.params.model_fields, *COMMON])
                message = f"a step of type {step.type!r} has no {part[0]!r}{hint}"
                yield workflow.problem(message, *where, *part, key=True)
            elif one["type"] == "missing" or not part or not _is_template(step.params, part):
                yield workflow.problem(_sentence(one), *where, *part)


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


# Compiling.


@dataclass(frozen=True, slots=True)
class _Bound:
    """What a name means to a step."""

    #: `step` for an output, `item` for what a frame was given, `number` for its number, `params` for a step's own.
    kind: Literal["step", "item", "number", "params"]
    #: How many parts of the id of whoever uses it lead there.
    parts: int
    #: The step's name behind those.
    step: str = ""
    #: Where it comes from; empty for what holds no text.
    origin: str = ""


_Scope: TypeAlias = Mapping[str, _Bound]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step stands."""

    scope: _Scope
    needs: tuple[str, ...] = ()
    body: str = ""
    undoing: bool = False


class _Compiler:
    """Turns steps as they were written into steps as they are run.

    What changes how a step is run becomes a step around it: `for_each` and `repeat` are steps whose frames hold the
    rest of what was written, under ids that go on with a number.
    """

    def __init__(self, defaults: Defaults) -> None:
        self._defaults = defaults
        self.steps: dict[str, PlannedStep] = {}
        self.bodies: dict[str, Body] = {}

    def body(
        self, frame: str, specs: Mapping[str, Step], scope: _Scope, only: tuple[Step, ...], *,
        output: JsonValue = None, undoing: bool = False, nameless: bool = False,
    ) -> Body:  # fmt: skip
        """The body whose frames have this id: several steps, or only one, which is the frame itself."""
        needs = inner_needs(specs) if not only else {"": ()}
        ids = {name: f"{frame}.{name}" if frame else name for name in specs} if not only else {"": frame}
        compiled = Template.compile(output) if output is not None else None
        body = Body(frame, ids, needs, _segments(needs), compiled, nameless)
        self.bodies[frame] = body
        if only:
            self._add(frame, only[0], _Place(scope, (), frame, undoing))
            return body
        inner = {
            **scope,
            **{name: _Bound("step", _parts(frame), name, origin=_output(ids[name])) for name in specs},
        }
        for name, spec in specs.items():
            self._add(ids[name], spec, _Place(inner, needs[name], frame, undoing))
        return body

    def _inside(self, frame: str, spec: Step, scope: _Scope, place: _Place, layer: _Layer) -> Body:
        """The body that runs the rest of a step in each frame; a plain block's steps are it."""
        if _is_plain(spec, layer):
            output = spec.params.get("output")
            return self.body(frame, spec.steps, scope, (), output=output, undoing=place.undoing)
        if layer is _Layer.ALL:
            return self.body(frame, {}, scope, (spec,), undoing=place.undoing)
        body = Body(frame, {"": frame}, {"": ()}, _segments({"": ()}))
        self.bodies[frame] = body
        self._layer(frame, spec, _Place(scope, (), frame, place.undoing), layer, outer=False)
        return body

    def _add(self, id: str, spec: Step, place: _Place) -> None:
        self._layer(id, spec, place, _Layer.EACH, outer=True)

    def _layer(self, id: str, spec: Step, place: _Place, layer: _Layer, *, outer: bool) -> None:
        if layer is _Layer.EACH and spec.has_for_each:
            self._each(id, spec, place)
        elif layer <= _Layer.REPEAT and spec.repeat is not None:
            self._repeat(id, spec, place, outer=outer)
        else:
            self._base(id, spec, place, outer=outer, recovers=layer <= _Layer.REPEAT)

    def _each(self, id: str, spec: Step, place: _Place) -> None:
        frame = f"{id}.*"
        here = _parts(frame)
        item = _Bound("item", here, origin=_params(id))
        scope = {**place.scope, spec.item: item, spec.index: _Bound("number", here)}
        body = self._inside(frame, spec, scope, place, _Layer.REPEAT)
        params: dict[str, JsonValue] = {
            "for_each": spec.for_each,
            "max_parallel": spec.max_parallel,
            "on_error": "collect" if spec.on_error == "collect" else "fail_fast",
        }
        self._planned(id, "for_each", spec, place, params=params, bodies={"*": body}, outer=True)

    def _repeat(self, id: str, spec: Step, place: _Place, *, outer: bool) -> None:
        frame = f"{id}.*"
        here = _parts(frame)
        scope = {
            **place.scope,
            "previous": _Bound("item", here, origin=_output(id)),
            "round": _Bound("number", here),
        }
        body = self._inside(frame, spec, scope, place, _Layer.ACT)
        assert spec.repeat is not None
        params: dict[str, JsonValue] = {"max": spec.repeat.max, "on_max": spec.repeat.on_max}
        until = Condition.compile(spec.repeat.until)
        self._planned(
            id, "repeat", spec, place, params=params, bodies={"*": body}, outer=outer, recovers=True, until=until,
        )  # fmt: skip

    def _base(self, id: str, spec: Step, place: _Place, *, outer: bool, recovers: bool) -> None:
        bodies: dict[str, Body] = {}
        scope = place.scope
        if spec.type == "block":
            # What is inside has no number of its own unless there are several tries, or the block is a frame itself.
            numbered = id in self.bodies or (spec.retry is not None and spec.retry.max_attempts > 1)
            frame = f"{id}.*" if numbered else id
            bodies["*" if numbered else ""] = self.body(
                frame, spec.steps, scope, (), output=spec.params.get("output"), undoing=place.undoing,
                nameless=not numbered,
            )  # fmt: skip
        inner = {**dict(zip(labels(spec.cases).values(), spec.cases.values(), strict=True)), **spec.among}
        if spec.default is not None:
            inner["default"] = spec.default
        for label, one in inner.items():
            bodies[label] = self._inside(f"{id}.{label}", one, scope, place, _Layer.ALL)
        self._planned(id, spec.type, spec, place, params=None, bodies=bodies, outer=outer, recovers=recovers)

    def _planned(
        self, id: str, kind_name: str, spec: Step, place: _Place, *, params: dict[str, JsonValue] | None,
        bodies: dict[str, Body], outer: bool, recovers: bool = False, until: Condition | None = None,
    ) -> None:  # fmt: skip
        kind = step_types()[kind_name]
        defaults = self._defaults
        acts = params is None
        written = {name: value for name, value in spec.templates.items() if not (kind.composed and name == "output")}
        values = written if params is None else params
        compiled = Template.compile(values)
        when = Condition.compile(spec.when) if outer and spec.when is not None else None
        cache = Template.compile(spec.cache.key) if recovers and spec.cache else None
        keys = {name: limit.key for name in ("concurrency", "rate") if (limit := getattr(spec, name))}
        limits = Template.compile(dict[str, JsonValue](keys)) if acts and keys else None
        references = compiled.references
        for expression in (when, cache, limits):
            references |= expression.references if expression else frozenset()
        # What is evaluated when a frame has ended sees what is in it, too.
        for body in bodies.values():
            if body.output is not None:
                references |= body.output.references - body.steps.keys()
        if until is not None:
            references |= until.references - {spec.id, "previous", "round"} - bodies["*"].steps.keys()
        fallbacks = self._fallbacks(id, spec, place) if recovers else {}
        named = kind.composed or not acts
        step = PlannedStep(
            id=id,
            type=kind,
            spec=spec,
            needs=place.needs,
            when=when,
            params=compiled,
            fixed={name: spec.params[name] for name in spec.params.keys() - spec.templates.keys()} if acts else {},
            retry=(spec.retry if acts else None) or (None if named else defaults.retry) or kind.retry,
            timeout_s=(
                (spec.timeout if acts else None)
                or (None if kind.waits or named else defaults.timeout)
                or kind.timeout_s
            ),
            deadline_s=spec.deadline if outer else None,
            references=references,
            **self._bound(references, id, place),
            tolerated=outer and spec.on_error == "continue",
            bodies={**bodies, **fallbacks},
            fallbacks=len(fallbacks),
            until=until,
            cache=cache,
            limits=limits,
            undoable=recovers and spec.compensate is not None,
            undoing=place.undoing,
            origins={name: place.scope[name].origin for name in references & place.scope.keys()},
            body=place.body,
        )
        self.steps[id] = step
        if recovers and spec.compensate is not None:
            self._compensate(step, spec.compensate, place)

    def _bound(self, references: frozenset[str], id: str, place: _Place) -> dict[str, Any]:
        """What these names mean to the step with this id, which is not a sibling."""
        reads: list[Read] = []
        items: list[tuple[str, int]] = []
        numbers: list[tuple[str, int]] = []
        params_of: PlannedStep | None = None
        for name in sorted(references & place.scope.keys()):
            bound = place.scope[name]
            if bound.kind == "params":
                params_of = self.steps[bound.step]
                around = _parts(params_of.id) - 1
                needs = [need for need in params_of.needs if need in params_of.references]
                reads += [Read(PARAMS + need, around, need) for need in needs]
                reads += [replace(read, name=PARAMS + read.name) for read in params_of.reads]
                items += [(PARAMS + item, parts) for item, parts in params_of.items]
                numbers += [(PARAMS + number, parts) for number, parts in params_of.numbers]
            elif bound.kind == "item":
                items.append((name, bound.parts))
            elif bound.kind == "number":
                numbers.append((name, bound.parts))
            elif name not in place.needs or bound.step != name:
                reads.append(Read(name, bound.parts, bound.step))
        found = {"reads": tuple(reads), "items": tuple(items), "numbers": tuple(numbers)}
        return {**found, "params_of": params_of}

    def _fallbacks(self, id: str, spec: Step, place: _Place) -> dict[str, Body]:
        bodies: dict[str, Body] = {}
        for number, one in enumerate(spec.fallback, 1):
            frame = f"{id}.fallback{number}"
            scope = {**place.scope, "error": _Bound("item", _parts(frame), origin=_ELSEWHERE)}
            bodies[f"fallback{number}"] = self._inside(frame, one, scope, place, _Layer.ALL)
        return bodies

    def _compensate(self, step: PlannedStep, spec: Step, place: _Place) -> None:
        id = f"{step.id}.compensate"
        # Its step's siblings have ended long since, and are read as what is further out is.
        seen = {
            "output": _Bound("step", _parts(step.id), origin=_output(step.id)),
            "params": _Bound("params", 0, step.id, origin=_params(step.id)),
        }
        self._layer(id, spec, _Place({**place.scope, **seen}, (), "", undoing=True), _Layer.ALL, outer=False)
        self.steps[id] = replace(self.steps[id], undoes=step, deadline_s=spec.deadline)


class _Layer(IntEnum):
    """What of a step is still to be turned into a step of its own, from the outside in."""

    EACH = 0
    ALL = 1
    """As `EACH`, for what stands by itself in a frame."""
    REPEAT = 2
    ACT = 3


def _is_plain(spec: Step, layer: _Layer) -> bool:
    """Whether what is left of the step is nothing but a block of others."""
    if spec.type != "block" or spec.retry or spec.timeout or spec.concurrency or spec.rate:
        return False
    if layer <= _Layer.REPEAT and (spec.repeat or spec.fallback or spec.compensate or spec.cache):
        return False
    return layer > _Layer.ALL or not (
        spec.has_for_each or spec.when or spec.deadline or (spec.on_error and spec.on_error != "fail")
    )


def _parts(id: str) -> int:
    return id.count(".") + 1 if id else 0


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
    more = [f"priority {workflow.priority}"] if workflow.priority != Workflow.model_fields["priority"].default else []
    more += [f"within {workflow.deadline:g} s"] if workflow.deadline is not None else []
    yield f"{workflow.name} {workflow.version}  {', '.join([_count(plan), f'{len(plan.segments)} canvas', *more])}"
    rows = list(_rows(plan))
    width = max(len(name) for name, _, _ in rows)
    kinds = max(len(kind) for _, kind, _ in rows)
    for name, kind, about in rows:
        yield f"  {name:<{width}}  {kind:<{kinds}}{about}".rstrip()
    yield "canvas"
    for body in plan.bodies.values():
        where = f"{body.frame}: " if body.frame else ""
        for segment in body.segments:
            if not body.frame or "" not in body.steps:
                yield f"  {where}{segment.id}  {segment}"
    carried, joined = edges(plan)
    yield f"edges on a canvas     {_edges(carried)}"
    yield f"joins by the record   {_edges(joined)}"


def _count(plan: Plan) -> str:
    inner = len(plan.steps) - len(plan.top.steps)
    return f"{len(plan.top.steps)} steps" + (f" and {inner} inside of them" if inner else "")


def _rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Each step in the order of the file: its id, its type, and what else is to be known of it."""
    for name in plan.top.steps:
        yield from _row(plan, plan.steps[name], 0)


def _row(plan: Plan, step: PlannedStep, depth: int) -> Iterator[tuple[str, str, str]]:
    yield "  " * depth + step.id, step.type.name, "".join(f"  {about}" for about in _about(step))
    for body in step.bodies.values():
        for inner in body.steps.values():
            yield from _row(plan, plan.steps[inner], depth + 1)
    if step.undoable:
        yield from _row(plan, plan.steps[f"{step.id}.compensate"], depth + 1)


def _about(step: PlannedStep) -> Iterator[str]:
    spec = step.spec
    if step.needs:
        yield f"after {', '.join(step.needs)}"
    if step.when:
        yield f"when {_flat(spec.when)}"
    if step.until is not None and spec.repeat is not None:
        yield f"until {_flat(spec.repeat.until)}, at most {spec.repeat.max} rounds"
    elif step.type.name == "for_each":
        at_a_time = f", {spec.max_parallel} at a time" if spec.max_parallel else ""
        yield f"over {_short(spec.for_each)}{at_a_time}"
    elif step.type.name in _TOLD:
        told = [f"{name} {_short(spec.params[name])}" for name in _TOLD[step.type.name] if name in spec.params]
        yield ", ".join(told)
    if step.retry.max_attempts > 1:
        yield f"up to {step.retry.max_attempts} tries"
    if step.timeout_s is not None:
        yield f"for at most {step.timeout_s:g} s" + (" each" if step.retry.max_attempts > 1 else "")
    if step.deadline_s is not None:
        yield f"within {step.deadline_s:g} s in all"
    if step.tolerated:
        yield "may fail"
    if step.cache is not None:
        yield "cached"
    for name in ("concurrency", "rate"):
        limit = getattr(step.spec, name) if step.limits else None
        if limit is not None:
            yield f"{name} {limit.limit} of {_flat(limit.key)}"


#: Parameters that say what becomes of a plan's shape.
_TOLD: Final[Mapping[str, tuple[str, ...]]] = {
    "switch": ("value",),
    "router": ("by",),
    "wait": ("for", "until", "signal"),
    "workflow": ("name", "version"),
}


def _short(value: JsonValue) -> str:
    text = _flat(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:59]}…"


def _flat(text: object) -> str:
    """On one line: the next one would look like another step."""
    return " ".join(str(text).split())


def edges(plan: Plan) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The edges that Celery carries, and those that are joins through the record."""
    carried: list[tuple[str, str]] = []
    joined: list[tuple[str, str]] = []
    for body in plan.bodies.values():
        heads = {head for segment in body.segments for head in segment.heads}
        reduced = _reduce(body.needs)
        for name, needs in body.needs.items():
            for need in needs:
                on_canvas = name not in heads and need in reduced[name]
                (carried if on_canvas else joined).append((body.steps[need], body.steps[name]))
    return carried, joined


def _edges(pairs: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(f"{a} → {b}" for a, b in pairs[:40])
    return shown + (f", … {len(pairs) - 40} more" if len(pairs) > 40 else "") if pairs else "none"

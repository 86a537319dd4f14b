"""What an author may write, as values; what a step's own type asks for is checked where the types are known."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice
from os import PathLike
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from ferrum import schemas
from ferrum.errors import InputError, Problem, WorkflowError, did_you_mean
from ferrum.expressions import Condition, Template
from ferrum.workflow import check, parts
from ferrum.workflow.files import gathered
from ferrum.workflow.text import Format, Places, Where, plain, read

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(?:\d{1,12}(?:\.\d{1,12})?(?:ms|[smhd]))+", re.ASCII)
_DURATION_PART: Final = re.compile(r"([\d.]+)(ms|[smhd])", re.ASCII)
#: Ten years, in seconds: a longer wait is a slip of the pen.
_MAX_DURATION: Final = 10 * 365 * 86400.0

#: Most problems that are looked for; whoever has more has another kind of problem.
_MAX_PROBLEMS: Final = 100


def seconds(value: object) -> float:
    """A duration as an author writes it, `90`, `"250ms"`, `"15m"`, `"1h30m"`, in seconds. Raises `ValueError`."""
    if isinstance(value, str) and _DURATION.fullmatch(value):
        duration = math.fsum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(value))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        duration = float(value) if abs(value) <= _MAX_DURATION else math.inf
    else:
        raise ValueError(
            'a duration is a number of seconds, or a text like "250ms", "60s", "15m", "24h", "7d", "1h30m"'
        )
    if not duration <= _MAX_DURATION:
        raise ValueError("a duration is at most ten years")
    if duration < 0:
        raise ValueError("a duration cannot be negative")
    return duration


def _not_zero(value: float) -> float:
    if value == 0:
        raise ValueError("a duration of zero leaves no time at all")
    return value


_DURATION_SCHEMA: Final = WithJsonSchema(
    {
        "anyOf": [
            {"type": "number", "minimum": 0, "maximum": _MAX_DURATION},
            {"type": "string", "pattern": r"^([0-9]+(\.[0-9]+)?(ms|[smhd]))+$"},
        ]
    }
)
#: Seconds, read by `seconds`.
Duration = Annotated[float, BeforeValidator(seconds), _DURATION_SCHEMA]
#: Seconds, more than none.
Timeout = Annotated[float, BeforeValidator(seconds), AfterValidator(_not_zero), _DURATION_SCHEMA]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ignored_types=(cached_property,))


class Budget(_Part):
    """What a run may use up at most; `None` is no limit."""

    input_tokens: int | None = Field(None, ge=0, description="Tokens sent to models.")
    output_tokens: int | None = Field(None, ge=0, description="Tokens that models generate.")
    total_tokens: int | None = Field(None, ge=0, description="Tokens of both kinds.")
    cost_usd: float | None = Field(None, ge=0, allow_inf_nan=False, description="US dollars, by the price table.")
    tool_calls: int | None = Field(None, ge=0, description="Calls of tools.")
    wall_time: Timeout | None = Field(None, description="Time of the run; not while only people are waited for.")


#: The failures that a `retry` may choose from; `error` is any other that may pass.
FailureKind: TypeAlias = Literal["timeout", "rate_limit", "unavailable", "error"]


class Retry(_Part):
    """How often a step is tried and how long is waited in between."""

    max_attempts: int = Field(3, ge=1, le=1000, description="Tries in all, the first one included.")
    backoff: Duration = Field(1.0, description="The longest wait before the second try.")
    factor: float = Field(2.0, ge=1, le=100, description="By how much each further wait may be longer.")
    max_delay: Duration = Field(60.0, description="No wait is longer, unless the other side asks for it.")
    on: tuple[FailureKind, ...] | None = Field(
        None,
        min_length=1,
        strict=False,
        description="Which failures are tried again: `timeout`, `rate_limit`, `unavailable`, `error` (any other that"
        " may pass). Default: all of them.",
    )

    def delay(self, attempt: int, random: float, retry_after_s: float | None = None) -> float:
        """Seconds to wait after try number `attempt` (1 for the first) has failed: full jitter.

        `random` is from [0, 1). Where the other side said when to come back it is never earlier than that, and spread
        over `backoff` seconds, so that all who were sent away together do not come back together.
        See https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
        """
        try:
            longest = min(self.max_delay, self.backoff * self.factor ** (attempt - 1))
        except OverflowError:
            longest = self.max_delay
        jittered = random * longest
        if retry_after_s is None or not math.isfinite(retry_after_s):
            return jittered
        return max(jittered, min(retry_after_s, _MAX_DURATION) + random * self.backoff)


class Defaults(_Part):
    """What holds for every step that does not say otherwise."""

    retry: Retry | None = None
    timeout: Timeout | None = None


#: How many problems of one input are told.
_MOST_PROBLEMS: Final = 20


class InputSpec(_Part):
    """One thing that a run is given."""

    type: Literal["string", "integer", "number", "boolean", "array", "object"]
    description: str = ""
    #: Whether a run cannot start without it: by default where there is no `default`.
    required: bool = True
    #: What it is when a run is not given it; see `has_default`.
    default: JsonValue = None
    #: The other keywords of its JSON Schema, `enum`, `minLength`, `items`, …
    keywords: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def has_default(self) -> bool:
        return "default" in self.model_fields_set

    @cached_property
    def schema_(self) -> dict[str, JsonValue]:
        """Its JSON Schema (2020-12)."""
        description: dict[str, JsonValue] = {"description": self.description} if self.description else {}
        return {"type": self.type, **description, **self.keywords}

    def problems(self, value: JsonValue) -> list[str]:
        """What keeps a value from being this input."""
        try:
            errors = sorted(schemas.errors(self.schema_, value), key=lambda error: error.json_path)
        except schemas.TooCostly as error:
            return [f"it cannot be held against its schema: {error}"]
        said = [
            f"{error.json_path[1:].removeprefix('.')}: {_short(error.message)}".removeprefix(": ")
            for error in errors[:_MOST_PROBLEMS]
        ]
        more = len(errors) - len(said)
        return [*said, f"and {more} problems more"] if more else said

    @model_validator(mode="after")
    def _holds_together(self) -> InputSpec:
        if _has_reference(self.keywords):
            raise ValueError("$ref is not supported here: write the schema out")
        try:
            schemas.check(self.schema_)
        except schemas.SchemaFault as error:
            raise ValueError(f"not a JSON Schema: {_short(str(error))}") from error
        if self.has_default and self.required:
            raise ValueError("what has a default is not required: leave out one of the two")
        if self.has_default and (found := self.problems(self.default)):
            raise ValueError(f"the default does not fit: {'; '.join(found)}")
        return self

    def to_dict(self) -> dict[str, JsonValue]:
        value = dict(self.schema_)
        if self.has_default:
            value["default"] = self.default
        elif not self.required:
            value["required"] = False
        return value


class Repeat(_Part):
    """Rounds of the same step, one after the other."""

    until: str = Field(description="CEL without braces, asked after each round: whether that was the last one.")
    max: int = Field(ge=1, le=100_000, description="Most rounds.")
    on_max: Literal["fail", "pass"] = Field(
        "fail", description="What the step does when `until` was never true: `fail`, or `pass` with the last output."
    )


class Cache(_Part):
    """When the output of another run is taken."""

    key: JsonValue = Field(description="What the output depends on, usually with expressions.")
    ttl: Timeout = Field(description="How long an output may be taken again.")
    scope: Literal["workflow", "global"] = Field(
        "workflow", description="Who shares it: runs of the same `workflow`, or of all (`global`)."
    )


class Concurrency(_Part):
    """How many steps of the same key are run at the same time, in all runs."""

    key: str = Field(min_length=1, description="Which steps count together; may hold expressions.")
    limit: int = Field(ge=1, description="Most steps at the same time.")


class Rate(_Part):
    """How many steps of the same key are started in a time, in all runs."""

    key: str = Field(min_length=1, description="Which steps count together; may hold expressions.")
    limit: int = Field(ge=1, description="Most starts within `per`.")
    per: Timeout = Field(description="The time that the starts are counted in.")


class Route(_Part):
    """What a router knows of one step that it may choose."""

    tier: int | None = Field(None, description="How good it is: more is better.")
    cost: float | None = Field(None, ge=0, allow_inf_nan=False, description="What one use costs, in any one unit.")
    latency: float | None = Field(None, ge=0, allow_inf_nan=False, description="How long one use takes, in ms.")
    target: str | None = Field(
        None, min_length=1, description="What its health is kept under. Default: its model, its tool server, its name."
    )


class Step(_Part):
    """One node of a workflow, or of what is inside another step."""

    model_config = ConfigDict(validate_by_name=True)

    #: Its own name, without those of the steps around it: the key that it stands under. For what has none: `default`,
    #: `fallback1`, …, `compensate`, and for a case that is no name `case1`, …; see `parts.labels`.
    id: str
    type: str = Field(min_length=1)
    #: Steps beside it that have to be over before, besides those that its expressions refer to.
    needs: tuple[str, ...] = Field((), strict=False)
    #: A bare expression; the step is skipped where it is false.
    when: str | None = None
    retry: Retry | None = None
    #: Longest time of one attempt, in seconds.
    timeout: Timeout | None = None
    #: Longest time from when it was ready until it is over, all attempts and waits included, in seconds.
    deadline: Timeout | None = None
    on_error: Literal["fail", "continue", "fail_fast", "collect"] | None = None
    #: A list, or a template that gives one; see `has_for_each`.
    for_each: JsonValue = None
    #: What an item of `for_each` is called; its index is this and `_index`, except for `item`, where it is `index`.
    item: str = Field("item", alias="as")
    max_parallel: int | None = Field(None, ge=1)
    repeat: Repeat | None = None
    fallback: tuple[Step, ...] = Field((), strict=False)
    compensate: Step | None = None
    cache: Cache | None = None
    concurrency: Concurrency | None = None
    rate: Rate | None = None
    #: What is inside a `block`, in the order of the file.
    steps: dict[str, Step] = Field(default_factory=dict)
    #: What a `switch` chooses from, by the text that the value is compared with.
    cases: dict[str, Step] = Field(default_factory=dict)
    #: What a `switch` runs where no case is the value's.
    default: Step | None = None
    #: What a `router` chooses from.
    among: dict[str, Step] = Field(default_factory=dict)
    #: Only where it is among those of a router.
    route: Route | None = None
    #: All that the step's type makes sense of.
    params: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("params")
    @classmethod
    def _no_common_names(cls, params: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := [name for name in params if name in parts.COMMON]:
            raise ValueError(f"{taken[0]!r} is the same for all steps and no parameter of a type")
        return params

    @property
    def has_for_each(self) -> bool:
        return "for_each" in self.model_fields_set

    @property
    def index(self) -> str:
        """What the index of an item is called."""
        return parts.index_name(self.item)

    @property
    def templates(self) -> dict[str, JsonValue]:
        """Those of its `params` that may hold expressions: all but an inline workflow, whose own they are."""
        if self.type != "workflow":
            return self.params
        return {name: value for name, value in self.params.items() if name != "workflow"}

    @property
    def inner(self) -> Iterator[tuple[Where, Step]]:
        """The steps directly inside, each with the way to it in the file: `("steps", "sum")`, `("fallback", 0)`."""
        for body in parts.BODIES.values():
            yield from (((body, name), step) for name, step in getattr(self, body).items())
        if self.default is not None:
            yield ("default",), self.default
        yield from ((("fallback", index), step) for index, step in enumerate(self.fallback))
        if self.compensate is not None:
            yield ("compensate",), self.compensate

    @cached_property
    def own_references(self) -> frozenset[str]:
        """The names that its own expressions refer to, those of the steps inside left out."""
        until = _condition(self.repeat.until) if self.repeat else frozenset()
        return (
            _condition(self.when)
            | _names(self.for_each)
            | _names(self.cache.key if self.cache else None)
            | self._act_references
            | until
        )

    @cached_property
    def references(self) -> frozenset[str]:
        """The names that it and all that is inside it take from around it: steps, `input`, names of loops around."""
        inside = (self._act_references | _union(self.steps.values())) - self.steps.keys()
        inside |= _union([*self.cases.values(), *self.among.values(), *filter(None, [self.default])])
        if self.repeat:
            inside |= _condition(self.repeat.until) - {self.id} - self.steps.keys()
            inside -= {"round", "previous"}
        inside |= _names(self.cache.key if self.cache else None)
        inside |= _union(self.fallback) - {"error"}
        if self.compensate:
            inside |= self.compensate.references - {"output", "params"}
        if self.has_for_each:
            inside -= {self.item, self.index}
        return inside | _names(self.for_each) | _condition(self.when)

    @cached_property
    def _act_references(self) -> frozenset[str]:
        """Those of what is evaluated anew in each round."""
        keys = [limit.key for limit in (self.concurrency, self.rate) if limit]
        return _names(self.templates) | _names(list[JsonValue](keys))

    def to_dict(self) -> dict[str, JsonValue]:
        """The step as an author would write it, without its name."""
        inside: dict[str, JsonValue] = {}
        for body in parts.BODIES.values():
            if steps := getattr(self, body):
                inside[body] = {name: step.to_dict() for name, step in steps.items()}
        if self.fallback:
            inside["fallback"] = [step.to_dict() for step in self.fallback]
        for part, step in (("default", self.default), ("compensate", self.compensate)):
            if step is not None:
                inside[part] = step.to_dict()
        own = self.model_dump(mode="json", exclude_defaults=True, by_alias=True, exclude=_NOT_DUMPED)
        route = self.route.model_dump(mode="json", exclude_defaults=True) if self.route else {}
        return {**own, **route, **inside, **self.params}


_NOT_DUMPED: Final = {"id", "params", "route", "steps", "cases", "default", "among", "fallback", "compensate"}


def _names(value: JsonValue) -> frozenset[str]:
    return Template.compile(value).references if value else frozenset()


def _condition(text: str | None) -> frozenset[str]:
    return frozenset() if text is None else Condition.compile(text).references


def _union(steps: Iterable[Step]) -> frozenset[str]:
    return frozenset[str]().union(*(step.references for step in steps))


def inner_needs(steps: Mapping[str, Step]) -> dict[str, tuple[str, ...]]:
    """For each step of one body those beside it that have to be over before, in the order of the file."""
    order = {name: number for number, name in enumerate(steps)}
    return {
        name: tuple(sorted((set(step.needs) | step.references) & order.keys(), key=order.__getitem__))
        for name, step in steps.items()
    }


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,99}", value, re.ASCII):
        raise ValueError("a workflow's name is made of a-z, 0-9, '-', '_' and '.', up to 100, a letter or digit first")
    return value


class Workflow(_Part):
    """What an author wrote. Made by `parse`, `load` and `of`, which check that it holds together."""

    name: Annotated[str, AfterValidator(_name)]
    version: str = Field("0", min_length=1, max_length=100)
    description: str = ""
    inputs: dict[str, InputSpec] = Field(default_factory=dict)
    budget: Budget | None = None
    #: The run fails when it is not over by then, in seconds from its start.
    deadline: Timeout | None = None
    #: 9 is most urgent.
    priority: int = Field(5, ge=0, le=9)
    defaults: Defaults = Defaults()
    #: In the order of the file.
    steps: dict[str, Step] = Field(min_length=1)
    outputs: dict[str, JsonValue] = Field(default_factory=dict)

    _places: Places = PrivateAttr(default_factory=Places)

    @classmethod
    def parse(cls, text: str, source: str = "", format: Format | None = None) -> Workflow:
        """A workflow from YAML or JSON; `source` is the name that errors give it.

        Without a `format` the end of the source's name tells (`.json`, `.yaml`); else a text that is JSON is read as
        JSON. Raises `WorkflowError` with all that is wrong (the first hundred), each with line and column.
        """
        return cls._built(*read(text, source, format))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Workflow:
        """A workflow from a file, with the files that its steps name in their places.

        Raises `WorkflowError`, also for a file that cannot be read.
        """
        return cls._built(*gathered(path))

    @classmethod
    def of(cls, value: Mapping[str, object]) -> Workflow:
        """A workflow from plain data, as an author would write it. Raises `WorkflowError`."""
        return cls._built(plain(value), Places())

    @classmethod
    def kept(cls, document: str) -> Workflow:
        """A workflow from the JSON of its `to_dict`: it was found to hold together then, and is not looked at again."""
        return cls.model_validate(json.loads(document))

    @classmethod
    def _built(cls, value: JsonValue, places: Places) -> Workflow:
        workflow, found = cls._examined(value, places)
        problems = list(islice(found, _MAX_PROBLEMS))
        if problems or workflow is None:
            ordered = sorted(dict.fromkeys(problems), key=lambda problem: (problem.line, problem.column))
            raise WorkflowError(ordered, places.source)
        workflow._places = places
        return workflow

    @classmethod
    def _examined(cls, value: JsonValue, places: Places) -> tuple[Workflow | None, Iterator[Problem]]:
        """The workflow that a value is, if it is of that shape, and all that is wrong with it."""
        if not isinstance(value, dict):
            return None, iter([places.problem("a workflow is a mapping with a `name` and `steps`")])
        try:
            workflow, shape = cls.model_validate(value), []
        except ValidationError as error:
            workflow, shape = None, list(_shape_problems(error.errors(include_url=False), places))
        return workflow, chain(check.problems(value, places), shape, cls._inline_problems(value, places))

    @classmethod
    def _inline_problems(cls, value: parts.Written, places: Places) -> Iterator[Problem]:
        """What is wrong with the workflows that stand in a workflow, and with what they are given."""
        for where, step in parts.walk(value):
            document = step.get("workflow")
            if parts.kind_of(step) == "workflow" and isinstance(document, dict):
                inline, found = cls._examined(document, places.below(*where, "workflow"))
                yield from found
                if inline is not None:
                    given = step.get("input", {})
                    yield from (places.problem(reason, *where, *way) for reason, way in inline._misgiven(given))

    def _misgiven(self, given: JsonValue) -> Iterator[tuple[str, Where]]:
        """What keeps the `input` of a step from being this workflow's, as far as that can be told before it runs."""
        if not isinstance(given, dict):
            return
        for name, value in given.items():
            if (spec := self.inputs.get(name)) is None:
                hint = did_you_mean(name, self.inputs) or " (it declares no `inputs`)"
                yield f"{self.name!r} has no input {name!r}{hint}", ("input", name)
            elif "{{" not in json.dumps(value):
                yield from ((problem, ("input", name)) for problem in spec.problems(value))
        for name, spec in self.inputs.items():
            if spec.required and name not in given:
                yield f"the input {name!r} of {self.name!r} is missing", ("input",)

    @field_validator("inputs", mode="before")
    @classmethod
    def _inputs(cls, value: object) -> object:
        return {name: _input_fields(one) for name, one in value.items()} if isinstance(value, dict) else value

    @field_validator("steps", mode="before")
    @classmethod
    def _steps(cls, value: object) -> object:
        return {name: _step_fields(name, one) for name, one in value.items()} if isinstance(value, dict) else value

    @property
    def source(self) -> str:
        """The name of the file that it was read from; empty for a value made in Python."""
        return self._places.source

    def problem(self, message: str, *where: str | int, key: bool = False) -> Problem:
        """A problem with what stands at `where` in the file (`"steps", "fix", "model"`), or with its key."""
        return self._places.problem(message, *where, key=key)

    def needs_of(self, step_id: str) -> tuple[str, ...]:
        """The steps that have to be over before this one, in the order of the file."""
        return self._needs_by_step[step_id]

    @cached_property
    def _needs_by_step(self) -> Mapping[str, tuple[str, ...]]:
        return inner_needs(self.steps)

    def check_input(self, input: Mapping[str, object]) -> dict[str, JsonValue]:
        """The input of a run with defaults filled in.

        What is neither given nor required nor has a default stays out. Raises `InputError`, which lists all that is
        wrong.
        """
        try:
            given = plain(input)
        except WorkflowError as error:
            raise InputError(f"the input is not plain JSON: {error}") from error
        if not isinstance(given, dict):
            raise InputError("the input has to be a mapping of names to values")
        if problems := list(self._input_problems(given)):
            raise InputError("\n".join(problems))
        defaults = {name: copy.deepcopy(spec.default) for name, spec in self.inputs.items() if spec.has_default}
        return {name: {**defaults, **given}[name] for name in self.inputs if name in given or name in defaults}

    def _input_problems(self, given: Mapping[str, JsonValue]) -> Iterator[str]:
        for name in given:
            if name not in self.inputs:
                hint = did_you_mean(name, self.inputs) or " (the workflow declares no `inputs`)"
                yield f"there is no input {name!r}{hint}"
        for name, spec in self.inputs.items():
            if name in given:
                yield from (f"input {name!r}: {problem}" for problem in spec.problems(given[name]))
            elif spec.required:
                yield f"input {name!r} is missing"

    def to_dict(self) -> dict[str, JsonValue]:
        """The workflow as an author would write it, in plain JSON: `Workflow.of` makes the same of it."""
        value: dict[str, JsonValue] = {"name": self.name, "version": self.version}
        if self.description:
            value["description"] = self.description
        if self.inputs:
            value["inputs"] = {name: spec.to_dict() for name, spec in self.inputs.items()}
        if self.budget is not None:
            value["budget"] = self.budget.model_dump(mode="json", exclude_defaults=True)
        if self.deadline is not None:
            value["deadline"] = self.deadline
        if self.priority != 5:
            value["priority"] = self.priority
        if self.defaults != Defaults():
            value["defaults"] = self.defaults.model_dump(mode="json", exclude_defaults=True)
        value["steps"] = {name: step.to_dict() for name, step in self.steps.items()}
        if self.outputs:
            value["outputs"] = self.outputs
        return value

    def __eq__(self, other: object) -> bool:
        # Where it was read from does not count; nor does the order of keys, except that of steps, at any depth.
        if not isinstance(other, Workflow):
            return False
        mine, others = self.to_dict(), other.to_dict()
        return mine == others and [where for where, _ in parts.walk(mine)] == [where for where, _ in parts.walk(others)]

    __hash__ = None  # type: ignore[assignment]


def _input_fields(value: object) -> object:
    """An input as it is written, in the fields of `InputSpec`."""
    if not isinstance(value, dict):
        return value
    fields = {name: item for name, item in value.items() if name in check.INPUT_FIELDS}
    keywords = {name: item for name, item in value.items() if name in check.INPUT_KEYWORDS}
    if isinstance(fields.get("required"), list):
        # JSON Schema's own `required`, the properties of an object.
        keywords["required"] = fields.pop("required")
    fields.setdefault("required", "default" not in fields)
    return {**fields, "keywords": keywords}


def _step_fields(name: str, value: object, routed: bool = False) -> object:
    """A step as it is written, in the fields of `Step`; `routed` where a router may choose it."""
    if not isinstance(value, dict):
        return value
    kind = parts.kind_of(value)
    fields: dict[str, object] = {"id": name, **({"type": kind} if kind is not None else {})}
    params: dict[str, object] = {}
    route: dict[str, object] = {}
    for key, item in value.items():
        if key in parts.COMMON or key in parts.parts_of(kind):
            fields[key] = _inner_fields(key, item)
        elif routed and key in Route.model_fields:
            route[key] = item
        else:
            params[key] = item
    return {**fields, "params": params, **({"route": route} if routed else {})}


def _inner_fields(key: str, value: object) -> object:
    """What stands under a key of a step, with the steps in it in the fields of `Step`."""
    match key, value:
        case "steps" | "among", dict():
            return {name: _step_fields(name, one, key == "among") for name, one in value.items()}
        case "cases", dict():
            labels = parts.labels(value)
            return {text: _step_fields(labels[text], one) for text, one in value.items()}
        case "fallback", list():
            return [_step_fields(f"fallback{number}", one) for number, one in enumerate(value, 1)]
        case "default" | "compensate", _:
            return _step_fields(key, value)
    return value


def _has_reference(value: JsonValue) -> bool:
    if isinstance(value, dict):
        return "$ref" in value or "$dynamicRef" in value or any(_has_reference(item) for item in value.values())
    return isinstance(value, list) and any(_has_reference(item) for item in value)


# What pydantic says, said to an author


_WANTED: Final = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


_MISSING: Final[Mapping[tuple[int | str, ...], str]] = {
    ("repeat", "max"): "'max' is missing: a loop has to end, so say how many rounds at most",
    ("repeat", "until"): "'until' is missing: say when the loop is done",
}


def _shape_problems(errors: Sequence[ErrorDetails], places: Places) -> Iterator[Problem]:
    wheres = {error["loc"][:length] for error in errors for length in range(len(error["loc"]))}
    # What is wrong with its parts is counted as missing by pydantic.
    return (_problem(one, places) for one in errors if not (one["type"] == "too_short" and one["loc"] in wheres))


def _problem(error: ErrorDetails, places: Places) -> Problem:
    where = _written(error["loc"])
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(str(where[-1]), _known(where[:-1]))
        return places.problem(f"there is no {where[-1]!r} here{hint}", *where, key=True)
    return places.problem(_sentence(error), *where)


def _written(where: tuple[int | str, ...]) -> Where:
    """Where the author wrote what pydantic found there: what a router knows of a step stands beside all else in it."""
    for index in range(2, len(where)):
        if where[index] == "route" and where[index - 2] == "among":
            return (*where[:index], *where[index + 1 :])
    return where


def _known(where: tuple[int | str, ...]) -> list[str]:
    """What may stand in a part of a workflow."""
    known: dict[str, type[BaseModel]] = {
        "budget": Budget,
        "defaults": Defaults,
        "retry": Retry,
        "repeat": Repeat,
        "cache": Cache,
        "concurrency": Concurrency,
        "rate": Rate,
    }
    part = known[str(where[-1])] if where else Workflow
    return list(part.model_fields)


def _sentence(error: ErrorDetails) -> str:
    kind, given = error["type"], error["input"]
    context: Mapping[str, Any] = error.get("ctx", {})
    if kind == "missing":
        if error["loc"][-2:] in _MISSING:
            return _MISSING[error["loc"][-2:]]
        return f"{error['loc'][-1]!r} is missing"
    if kind in _WANTED:
        hint = ": put quotes around it" if kind == "string_type" and isinstance(given, (int, float)) else ""
        return f"this has to be {_WANTED[kind]}{hint}"
    if kind == "literal_error":
        hint = did_you_mean(given, re.findall(r"'(\w+)'", context["expected"])) if isinstance(given, str) else ""
        return f"this has to be {context['expected']}{hint}"
    if kind in ("too_short", "string_too_short"):
        return "this cannot be empty"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "this has to")
    return message[:1].lower() + message[1:]


def _short(message: str) -> str:
    return message if len(message) <= 300 else f"{message[:200]} … {message[-90:]}"

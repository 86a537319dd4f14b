"""Whether a workflow holds together: names that are there, expressions that compile, no step that waits for itself.

Works on the author's own mapping, whatever its shape, so that a file with one wrong type still hears of all the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Final

from pydantic import JsonValue

from ferrum.errors import ExpressionError, Problem, did_you_mean
from ferrum.expressions import RESERVED_NAMES, Condition, Template
from ferrum.workflow.text import Places, Where

#: What any step may say; everything else belongs to its type.
COMMON: Final = (
    *("type", "needs", "when", "retry", "timeout", "deadline", "on_error", "for_each", "as", "max_parallel"),
    *("repeat", "fallback", "compensate", "cache", "concurrency", "rate"),
)
#: The types that are made of steps, and where those stand.
BODIES: Final[Mapping[str, str]] = {"block": "steps", "switch": "cases", "router": "among"}

#: Keywords of JSON Schema that may stand beside an input's `type`.
INPUT_KEYWORDS: Final = (
    *("title", "examples", "enum", "const", "format", "pattern", "minLength", "maxLength"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("items", "prefixItems", "contains", "minContains", "maxContains", "minItems", "maxItems", "uniqueItems"),
    *("properties", "patternProperties", "additionalProperties", "propertyNames", "minProperties", "maxProperties"),
    *("dependentRequired", "anyOf", "oneOf", "allOf", "not", "if", "then", "else"),
)
#: What may stand in an input besides.
INPUT_FIELDS: Final = ("type", "description", "required", "default")

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
#: Longest name of a step or an input.
_MAX_NAME: Final = 64
#: Longest cycle that is shown in full.
_SHOWN_OF_CYCLE: Final = 20


def kind_of(step: Mapping[str, object]) -> object:
    """The type that a step is of: what it says, or a block where it only has `steps`; `None` where nothing tells."""
    return step.get("type", "block" if "steps" in step else None)


def parts_of(kind: object) -> tuple[str, ...]:
    """The keys of a step of this type that hold steps, besides those that any type may have."""
    if not isinstance(kind, str) or kind not in BODIES:
        return ()
    return (BODIES[kind], "default") if kind == "switch" else (BODIES[kind],)


#: Names in ids of steps that mean something else than what the author called so.
_SET_ASIDE: Final = re.compile(r"default|compensate|(case|fallback)[0-9]+")


def labels(cases: Iterable[str]) -> dict[str, str]:
    """What each case of a switch is called in ids: its text where that is a name, else `case` and its number."""
    return {
        text: text if _is_name(text) and not _SET_ASIDE.fullmatch(text) else f"case{number}"
        for number, text in enumerate(cases, 1)
    }


def index_name(item: str) -> str:
    """What the index is called where the item of a `for_each` is called so."""
    return "index" if item == "item" else f"{item}_index"


def problems(workflow: Mapping[str, JsonValue], places: Places) -> Iterator[Problem]:
    """What is wrong with a workflow beyond the shape of its parts."""
    yield from _Check(workflow, places).problems()


@dataclass(frozen=True, slots=True)
class _Found:
    """An expression, where it stands."""

    where: Where
    compiled: Template | Condition


class _Check:
    def __init__(self, workflow: Mapping[str, JsonValue], places: Places) -> None:
        self._places = places
        self._steps = _mapping(workflow.get("steps"))
        self._outputs = workflow.get("outputs")
        inputs = workflow.get("inputs", {})
        #: `None` where it is no mapping: then nobody knows which inputs there are.
        self._inputs = inputs if isinstance(inputs, dict) else None
        self._edges: dict[str, set[str]] = {name: set() for name in self._steps}

    def problems(self) -> Iterator[Problem]:
        for name, spec in (self._inputs or {}).items():
            yield from self._input(name, _mapping(spec))
        for name, step in self._steps.items():
            yield from self._step_name(name)
            yield from self._step(name, _mapping(step))
        yield from self._expressions(self._outputs, ("outputs",), None)
        yield from self._cycles()

    def _input(self, name: str, spec: Mapping[str, JsonValue]) -> Iterator[Problem]:
        known = (*INPUT_FIELDS, *INPUT_KEYWORDS)
        if not _is_name(name):
            yield self._places.problem(_NOT_A_NAME.format(f"the input {name!r}"), "inputs", name, key=True)
        for key in spec:
            if key not in known:
                message = f"there is no {key!r} here{did_you_mean(key, known)}"
                yield self._places.problem(message, "inputs", name, key, key=True)

    def _step_name(self, name: str) -> Iterator[Problem]:
        where: Where = ("steps", name)
        if "-" in name and _is_name(underscored := name.replace("-", "_")):
            message = f"in an expression the dash in {name!r} would be a minus: call the step {underscored!r}"
            yield self._places.problem(message, *where, key=True)
        elif not _is_name(name):
            yield self._places.problem(_NOT_A_NAME.format(f"the step {name!r}"), *where, key=True)
        elif name in RESERVED_NAMES or name in ("input", "run") or name.startswith("__"):
            yield self._places.problem(f"a step cannot be called {name!r}: the name is taken", *where, key=True)

    def _step(self, name: str, step: Mapping[str, JsonValue]) -> Iterator[Problem]:
        where: Where = ("steps", name)
        needs = step.get("needs")
        yield from self._needs(name, needs if isinstance(needs, list) else [])
        when = step.get("when")
        if isinstance(when, str):
            yield from self._expression(when, (*where, "when"), name)
        if kind_of(step) in (*BODIES, "workflow") or step.keys() & {"for_each", "repeat"}:
            return
        params = {key: value for key, value in step.items() if key not in (*COMMON, *parts_of(kind_of(step)))}
        yield from self._expressions(params, where, name)

    def _needs(self, name: str, needs: Sequence[JsonValue]) -> Iterator[Problem]:
        for index, need in enumerate(needs):
            where: Where = ("steps", name, "needs", index)
            if not isinstance(need, str):
                continue
            if need in needs[:index]:
                yield self._places.problem(f"{need!r} is there twice", *where)
            elif need == name:
                yield self._places.problem(f"the step {name!r} needs itself", *where)
            elif need not in self._steps:
                yield self._places.problem(f"{need!r} is not a step{did_you_mean(need, self._steps)}", *where)
            else:
                self._edges[name].add(need)

    def _expressions(self, value: JsonValue, where: Where, step: str | None) -> Iterator[Problem]:
        if isinstance(value, str):
            if "{{" in value:
                yield from self._expression(value, where, step)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from self._expressions(item, (*where, index), step)
        elif isinstance(value, dict):
            for key, item in value.items():
                if "{{" in key:
                    message = "a key cannot be an expression, only a value can"
                    yield self._places.problem(message, *where, key, key=True)
                yield from self._expressions(item, (*where, key), step)

    def _expression(self, text: str, where: Where, step: str | None) -> Iterator[Problem]:
        try:
            compiled = Condition.compile(text) if where[2:] == ("when",) else Template.compile(text)
        except ExpressionError as error:
            yield self._places.problem(str(error), *where)
            return
        # A name that is missing is said once, however often the expression uses it.
        messages = {message: None for path in sorted(compiled.paths) if (message := self._wrong(path, step))}
        for message in messages:
            yield self._places.problem(message, *where)
        if step is not None:
            self._edges[step] |= compiled.references & self._steps.keys() - {step}

    def _wrong(self, path: tuple[str, ...], step: str | None) -> str | None:
        """What is wrong with a reference, or nothing."""
        name = path[0]
        if name == "input":
            if self._inputs is None or len(path) == 1 or path[1] == "*" or path[1] in self._inputs:
                return None
            hint = did_you_mean(path[1], self._inputs) if self._inputs else " (the workflow declares no `inputs`)"
            return f"there is no input {path[1]!r}{hint}"
        if name == step:
            return f"the step {name!r} refers to itself"
        if name not in self._steps:
            return f"{name!r} is not a step{did_you_mean(name, [*self._steps, 'input'])}"
        return None

    def _cycles(self) -> Iterator[Problem]:
        """One cycle of every knot of steps that wait for each other."""
        edges = {name: set(needs) for name, needs in self._edges.items()}
        while cycle := _cycle(edges):
            first = min(cycle, key=list(edges).index)
            start = cycle.index(first)
            around = [*cycle[start:], *cycle[:start], first]
            if len(around) > _SHOWN_OF_CYCLE:
                around[_SHOWN_OF_CYCLE // 2 : -(_SHOWN_OF_CYCLE // 2)] = ["…"]
            yield self._places.problem(f"these steps need each other: {' -> '.join(around)}", "steps", first, key=True)
            edges = {name: needs - set(cycle) for name, needs in edges.items() if name not in cycle}


_NOT_A_NAME: Final = f"{{}}: a name is made of letters, digits and _, starts with no digit and has at most {_MAX_NAME}"


def _mapping(value: JsonValue) -> Mapping[str, JsonValue]:
    return value if isinstance(value, dict) else {}


def _is_name(name: str) -> bool:
    return len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None


def _cycle(edges: Mapping[str, set[str]]) -> list[str]:
    """Steps in a circle, each before one that it needs; empty if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        # graphlib names each before the one that needs it, and the first again at the end.
        return list(reversed(error.args[1][1:]))
    return []

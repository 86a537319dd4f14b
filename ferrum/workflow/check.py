"""Whether a workflow holds together: names that are there, expressions that compile, no step that waits for itself.

What a name means depends on where it stands: an expression sees the steps beside its own, those beside each step that
it is inside of, and what the loops, fallbacks and compensations around it bind. What may stand beside what is in
`rules`. Works on the author's own mapping, whatever its shape, so that a file with one wrong type still hears of all
the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Final

from pydantic import JsonValue

from ferrum.errors import ExpressionError, Problem, did_you_mean
from ferrum.expressions import RESERVED_NAMES, Condition, Template
from ferrum.workflow import rules
from ferrum.workflow.parts import (
    COMMON,
    MAX_NAME,
    Written,
    index_name,
    inner,
    is_name,
    is_set_aside,
    kind_of,
    labels,
    mapping,
    parts_of,
    walk,
)
from ferrum.workflow.text import Places, Where

__all__ = ["INPUT_FIELDS", "INPUT_KEYWORDS", "labels", "problems"]

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

#: Longest cycle that is shown in full.
_SHOWN_OF_CYCLE: Final = 20
#: Names that mean something in some places, and where that is.
_PLACED: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("item", "index"), "in what is done for each item of a 'for_each', where 'as' does not call it something else"
    ),
    **dict.fromkeys(("round", "previous"), "in what is done in each round of a 'repeat'"),
    "error": "in a 'fallback', where it says why the step failed",
    "output": "in a 'compensate', where it is what its step returned",
    "params": "in a 'compensate', where it is what its step was given, unless a 'repeat' gives it more than once",
}


def problems(workflow: Written, places: Places) -> Iterator[Problem]:
    """What is wrong with a workflow beyond the shape of its parts; a workflow inside it is left to itself."""
    yield from _Check(workflow, places).problems()


@dataclass(frozen=True, slots=True)
class _Body:
    """Steps beside each other: those of the workflow, or of a block."""

    where: Where
    steps: Written
    #: What each of them has to wait for.
    edges: dict[str, set[str]]

    @classmethod
    def of(cls, steps: Written, where: Where) -> _Body:
        return cls(where, steps, {name: set() for name in steps})


@dataclass(frozen=True, slots=True)
class _Scope:
    """What can be seen from one place."""

    #: The bodies around it, the innermost last, each with the step in it that the place belongs to, if there is one.
    around: tuple[tuple[_Body, str | None], ...] = ()
    #: Names that are no steps here.
    bound: frozenset[str] = frozenset()
    #: The part of that innermost step that the place is in; `steps` for what the step says of itself.
    part: str = "steps"

    def bind(self, *names: str) -> _Scope:
        return replace(self, bound=self.bound.union(names))

    def enter(self, body: _Body, step: str | None) -> _Scope:
        return replace(self, around=(*self.around, (body, step)), part="steps")

    @property
    def steps(self) -> set[str]:
        """The steps whose names mean something here."""
        return {name for body, _ in self.around for name in body.steps}

    def has_step(self, name: str) -> bool:
        return any(name in body.steps for body, _ in self.around)


class _Check:
    def __init__(self, workflow: Written, places: Places) -> None:
        self._workflow = workflow
        self._places = places
        inputs = workflow.get("inputs", {})
        #: `None` where it is no mapping: then nobody knows which inputs there are.
        self._inputs = inputs if isinstance(inputs, dict) else None

    def problems(self) -> Iterator[Problem]:
        for name, spec in (self._inputs or {}).items():
            yield from self._input(name, mapping(spec))
        body = _Body.of(mapping(self._workflow.get("steps")), ("steps",))
        yield from self._body(body, _Scope())
        yield from self._values(self._workflow.get("outputs"), ("outputs",), _Scope(((body, None),)))
        yield from self._hold_ups()

    def _input(self, name: str, spec: Written) -> Iterator[Problem]:
        known = (*INPUT_FIELDS, *INPUT_KEYWORDS)
        if not is_name(name):
            yield self._places.problem(_NOT_A_NAME.format(f"the input {name!r}"), "inputs", name, key=True)
        for key in spec:
            if key not in known:
                message = f"there is no {key!r} here{did_you_mean(key, known)}"
                yield self._places.problem(message, "inputs", name, key, key=True)

    # Steps

    def _body(self, body: _Body, scope: _Scope) -> Iterator[Problem]:
        for name, value in body.steps.items():
            step, where = mapping(value), (*body.where, name)
            inside = scope.enter(body, name)
            if reason := _wrong_name(name, scope):
                yield self._places.problem(reason, *where, key=True)
            needs = step.get("needs")
            yield from self._needs(needs if isinstance(needs, list) else [], (*where, "needs"), inside)
            yield from self._step(name, step, where, inside)
        yield from self._cycles(body)

    def _needs(self, needs: Sequence[JsonValue], where: Where, scope: _Scope) -> Iterator[Problem]:
        body, name = scope.around[-1]
        for index, need in enumerate(needs):
            if not isinstance(need, str):
                continue
            if need in needs[:index]:
                yield self._places.problem(f"{need!r} is there twice", *where, index)
            elif need == name:
                yield self._places.problem(f"the step {name!r} needs itself", *where, index)
            elif name is not None and need in body.steps:
                body.edges[name].add(need)
            else:
                yield self._places.problem(self._not_beside(need, scope), *where, index)

    def _not_beside(self, need: str, scope: _Scope) -> str:
        """Why a step cannot need this one."""
        for body, holder in reversed(scope.around[:-1]):
            if need == holder:
                return _AROUND.format(need)
            if need in body.steps:
                return f"{need!r} is outside of {holder!r}: let {holder!r} need it"
        return self._inside(need, scope) or f"{need!r} is not a step{did_you_mean(need, scope.around[-1][0].steps)}"

    def _step(self, name: str, step: Written, where: Where, scope: _Scope) -> Iterator[Problem]:
        """One step; `name` is what it is called in its own `until`."""
        for reason, part in rules.broken(step, scope.part):
            yield self._places.problem(reason, *where, *part)
        yield from self._condition(step.get("when"), (*where, "when"), scope)
        yield from self._values(step.get("for_each"), (*where, "for_each"), scope)
        each = scope
        if "for_each" in step:
            item = step.get("as", "item")
            names = (item, index_name(item)) if isinstance(item, str) else ()
            for wrong in [wrong for one in names if (wrong := _wrong_item(one, scope))][:1]:
                yield self._places.problem(wrong, *where, "as")
            each = scope.bind(*names)
        yield from self._values(mapping(step.get("cache")).get("key"), (*where, "cache", "key"), each)
        yield from self._round(name, step, where, each)
        if "compensate" in step and "output" in scope.bound and scope.part != "compensate":
            message = "this is part of what undoes a step, and is not undone itself: leave out 'compensate'"
            yield self._places.problem(message, *where, "compensate", key=True)
        undone = each.bind("output", *(() if "repeat" in step else ("params",)))
        yield from self._parts(step, where, {"fallback": each.bind("error"), "compensate": undone})

    def _round(self, name: str, step: Written, where: Where, scope: _Scope) -> Iterator[Problem]:
        """What is done anew in each round of a `repeat`, or once."""
        kind = kind_of(step)
        steps = mapping(step.get("steps")) if kind == "block" else {}
        if isinstance(repeat := step.get("repeat"), dict):
            scope = scope.bind("round", "previous")
            yield from self._condition(repeat.get("until"), (*where, "repeat", "until"), scope.bind(name, *steps))
        for limit in ("concurrency", "rate"):
            yield from self._values(mapping(step.get(limit)).get("key"), (*where, limit, "key"), scope)
        seen = scope
        if kind == "block":
            body = _Body.of(steps, (*where, "steps"))
            yield from self._body(body, scope)
            seen = scope.enter(body, None)
        others = (*COMMON, *parts_of(kind), *(("workflow",) if kind == "workflow" else ()))
        yield from self._values({key: value for key, value in step.items() if key not in others}, where, seen)
        yield from self._parts(step, where, dict.fromkeys(("cases", "default", "among"), scope))

    def _parts(self, step: Written, where: Where, scopes: Mapping[str, _Scope]) -> Iterator[Problem]:
        """The steps in some parts of another, which have no others beside them."""
        for way, name, one in inner(step):
            part = str(way[0])
            if part in scopes:
                yield from self._step(name, one, (*where, *way), replace(scopes[part], part=part))

    def _cycles(self, body: _Body) -> Iterator[Problem]:
        """One cycle of every knot of steps that wait for each other."""
        edges = {name: set(needs) for name, needs in body.edges.items()}
        while cycle := _cycle(edges):
            first = min(cycle, key=list(edges).index)
            start = cycle.index(first)
            around = [*cycle[start:], *cycle[:start], first]
            if len(around) > _SHOWN_OF_CYCLE:
                around[_SHOWN_OF_CYCLE // 2 : -(_SHOWN_OF_CYCLE // 2)] = ["…"]
            message = f"these steps need each other: {' -> '.join(around)}"
            yield self._places.problem(message, *body.where, first, key=True)
            edges = {name: needs - set(cycle) for name, needs in edges.items() if name not in cycle}

    def _hold_ups(self) -> Iterator[Problem]:
        """What waits for something that a step around it keeps until all inside of it is over."""
        around = {where: kept for where, step in walk(self._workflow) if (kept := _kept(step))}
        if not around:
            return
        # Also what is inside of a workflow in this one: that is checked by itself, and knows nothing of what is around.
        for where, step in walk(self._workflow, deep=True):
            for way, key in _kept(step):
                holders = (where[:end] for end in range(2, len(where)) if (way, key) in around.get(where[:end], ()))
                if holder := next((one for one in holders if where[len(one)] not in _AFTER[way[0]]), None):
                    name = ".".join(str(part) for part in holder if part != "steps")
                    yield self._places.problem(_HOLDS_UP[way[0]].format(name, key), *where, *way)

    # Expressions

    def _values(self, value: JsonValue, where: Where, scope: _Scope) -> Iterator[Problem]:
        if isinstance(value, str):
            if "{{" in value:
                yield from self._expression(Template.compile, value, where, scope)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from self._values(item, (*where, index), scope)
        elif isinstance(value, dict):
            for key, item in value.items():
                if "{{" in key:
                    message = "a key cannot be an expression, only a value can"
                    yield self._places.problem(message, *where, key, key=True)
                yield from self._values(item, (*where, key), scope)

    def _condition(self, text: JsonValue, where: Where, scope: _Scope) -> Iterator[Problem]:
        if isinstance(text, str):
            yield from self._expression(Condition.compile, text, where, scope)

    def _expression(
        self, compile: Callable[[str], Template | Condition], text: str, where: Where, scope: _Scope
    ) -> Iterator[Problem]:
        try:
            compiled = compile(text)
        except ExpressionError as error:
            yield self._places.problem(str(error), *where)
            return
        # A name that is missing is said once, however often the expression uses it.
        messages = {message: None for path in sorted(compiled.paths) if (message := self._wrong(path, scope))}
        for message in messages:
            yield self._places.problem(message, *where)

    def _wrong(self, path: tuple[str, ...], scope: _Scope) -> str | None:
        """What is wrong with a reference, or nothing: then whatever has to wait for it does from now on."""
        name = path[0]
        if name in scope.bound:
            return None
        if name == "input":
            return self._wrong_input(path)
        for body, step in reversed(scope.around):
            if name == step:
                return _itself(name, scope, body)
            if name in body.steps:
                if step is not None:
                    body.edges[step].add(name)
                return None
        if name in _PLACED:
            return f"{name!r} is there only {_PLACED[name]}"
        known = [*scope.steps, *scope.bound, "input"]
        return self._inside(name, scope) or f"{name!r} is not a step{did_you_mean(name, known)}"

    def _wrong_input(self, path: tuple[str, ...]) -> str | None:
        if self._inputs is None or len(path) == 1 or path[1] == "*" or path[1] in self._inputs:
            return None
        hint = did_you_mean(path[1], self._inputs) if self._inputs else " (the workflow declares no `inputs`)"
        return f"there is no input {path[1]!r}{hint}"

    def _inside(self, name: str, scope: _Scope) -> str | None:
        """Why a step that is inside another cannot be used from outside of it; nothing where there is none."""
        known = scope.steps
        for holders in self._holders.get(name, ()):
            if holder := next((one for one in reversed(holders) if one in known), None):
                if holder in (step for _, step in scope.around):
                    return f"{name!r} is inside {holder!r} and cannot be used here"
                return f"{name!r} is inside {holder!r}: only what {holder!r} returns can be used"
        return None

    @cached_property
    def _holders(self) -> Mapping[str, list[tuple[str, ...]]]:
        """For the name of each step that is inside a block the named steps around it, the outermost first."""
        found: dict[str, list[tuple[str, ...]]] = {}
        for where, _ in walk(self._workflow):
            names = tuple(str(name) for part, name in pairwise(where) if part == "steps")
            if where[-2:-1] == ("steps",) and len(names) > 1:
                found.setdefault(names[-1], []).append(names[:-1])
        return found


_NOT_A_NAME: Final = f"{{}}: a name is made of letters, digits and _, starts with no digit and has at most {MAX_NAME}"
_AROUND: Final = "{!r} is around this step: what it returns is known only when all that is inside is over"


#: Parts of a step that are done when it keeps nothing any more.
_AFTER: Final = {"concurrency": ("fallback", "compensate"), "cache": ("compensate",)}
_HOLDS_UP: Final = {
    "concurrency": "{0!r} has a place of {1!r} until all inside of it is over, and this would wait for one: each could"
    " wait for the other for ever; call this key something else, or leave out one of the two",
    "cache": "{0!r} computes {1!r} until all inside of it is over, and this would wait for that: each would wait for"
    " the other for ever; call this key something else, or leave out one of the two",
}


def _kept(step: Written) -> list[tuple[tuple[str, str], str]]:
    """What a step keeps from all others while it runs, and where it says so; of expressions nobody knows before."""
    said = [("concurrency", step.get("concurrency"))]
    if mapping(step.get("cache")).get("scope") == "global":
        said.append(("cache", step.get("cache")))
    keys = [(way, mapping(spec).get("key")) for way, spec in said]
    return [((way, "key"), key) for way, key in keys if isinstance(key, str) and "{{" not in key]


def _wrong_name(name: str, scope: _Scope) -> str | None:
    """Why a step cannot be called so, or nothing."""
    if "-" in name and is_name(underscored := name.replace("-", "_")):
        return f"in an expression the dash in {name!r} would be a minus: call the step {underscored!r}"
    if not is_name(name):
        return _NOT_A_NAME.format(f"the step {name!r}")
    if _is_taken(name) or (scope.around and is_set_aside(name)):
        return f"a step cannot be called {name!r}: the name is taken"
    if scope.has_step(name):
        return f"there is a step {name!r} around this one already: call it something else"
    if name in scope.bound:
        return f"{name!r} is what the item of a 'for_each' around this step is called: call one of them something else"
    return None


def _wrong_item(name: str, scope: _Scope) -> str | None:
    """Why an item or its index cannot be called so, or nothing."""
    if name in ("item", "index"):
        return None
    if not is_name(name):
        return _NOT_A_NAME.format(f"the item {name!r}")
    if _is_taken(name):
        return f"an item cannot be called {name!r}: the name is taken"
    if scope.has_step(name):
        return f"there is a step {name!r} already: call the item something else"
    return None


def _is_taken(name: str) -> bool:
    return name in RESERVED_NAMES or name in ("input", "run") or name in _PLACED or name.startswith("__")


def _itself(name: str, scope: _Scope, body: _Body) -> str:
    """What is wrong with a reference to the step that it is in."""
    if body is not scope.around[-1][0] or scope.part in ("cases", "default", "among"):
        return _AROUND.format(name)
    hints = {
        "fallback": ": this runs because it has failed, and `error` says why",
        "compensate": ": what it returned is `output` here",
    }
    if "repeat" in mapping(body.steps[name]):
        return f"the step {name!r} refers to itself: what it returned in the round before is `previous`"
    return f"the step {name!r} refers to itself{hints.get(scope.part, '')}"


def _cycle(edges: Mapping[str, set[str]]) -> list[str]:
    """Steps in a circle, each before one that it needs; empty if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        # graphlib names each before the one that needs it, and the first again at the end.
        return list(reversed(error.args[1][1:]))
    return []

"""From a flow to a workflow: which steps stand beside each other, what each is called with, and what it is named."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import JsonValue

from ferrum.errors import ExpressionError, Problem, WorkflowError
from ferrum.expressions import RESERVED_NAMES, Condition, Template
from ferrum.primitives.flow import FLOWING, Chosen, Flow, OneStep, Parallel, Sequential, template, yes_or_no
from ferrum.primitives.functions import BY_NAME, VARIADIC, address_of, has_json_default, parameters_of, shown
from ferrum.primitives.inputs import Inputs
from ferrum.workflow import Workflow
from ferrum.workflow.parts import is_name, is_set_aside, mapping
from ferrum.workflow.rules import REFUSED

#: Names that a step cannot have, or not everywhere.
_TAKEN: Final = RESERVED_NAMES | frozenset(
    ["input", "run", "item", "index", "round", "previous", "error", "output", "params"]
)


@dataclass(frozen=True, slots=True)
class Given:
    """What a step is called with."""

    #: Expressions, in order; `None`: the run's inputs, by name.
    values: tuple[str, ...] | None = None
    #: The steps beside it that it comes after.
    after: tuple[str, ...] = ()
    #: From the second round on the first is what the round before left.
    carried: bool = False

    @property
    def inside(self) -> Given:
        """The same, seen from inside of a step."""
        return replace(self, after=())

    def expressions(self, values: Sequence[str]) -> list[str]:
        """These, with what is carried from round to round."""
        first = [f"round == 1 ? ({values[0]}) : previous"] if self.carried and values else values[:1]
        return [*first, *values[1:]]

    def value(self) -> JsonValue:
        """All of it as one value, as in a workflow file."""
        values = self.expressions(["input"] if self.values is None else self.values)
        return template(values[0]) if len(values) == 1 else [template(one) for one in values]


@dataclass(frozen=True, slots=True)
class Made:
    """A step, or the steps of a body, as in a workflow file."""

    written: dict[str, Any]
    #: The names that expressions in it use.
    references: frozenset[str]
    #: For a body, its last steps, and the one that is asked about them.
    last: tuple[str, ...] = ()
    check: str = ""


class Names:
    """What the steps of one body are called."""

    def __init__(self, around: Iterable[str], steps: Sequence[OneStep]) -> None:
        self._taken = {*around, *(step.name for step in steps if step.name)}

    def of(self, step: OneStep) -> str:
        """What it was called, else a name after what it does, with a number where that is taken."""
        if step.name:
            return step.name
        base = re.sub(r"\W", "_", _what(step), flags=re.ASCII)[:50] or "step"
        if base in _TAKEN or is_set_aside(base) or not is_name(base) or base.startswith("__"):
            base = f"{base.strip('_')}_" if base.strip("_")[:1].isalpha() else f"step_{base.strip('_')}"
        numbered = (base if number == 1 else f"{base}_{number}" for number in itertools.count(1))
        name = next(one for one in numbered if one not in self._taken)
        self._taken.add(name)
        return name


def _what(step: OneStep) -> str:
    if "task" in step.params:
        return str(step.params["task"]).rpartition(".")[2]
    if step.function is not None:
        name = getattr(step.function, "__name__", type(step.function).__name__)
        return "step" if name == "<lambda>" else name
    return str(step.params["tool"]) if step.kind == "tool" else step.kind


class Builder:
    """Makes one workflow."""

    def __init__(
        self, inputs: Mapping[str, object], *, here: bool = False, sample: Mapping[str, JsonValue] | None = None
    ) -> None:
        """`here` where no worker has to find the functions, with the run's input, which then tells missing types."""
        self._here = here
        self._inputs = Inputs(inputs, sample or {}, self._wrong)
        self._problems: dict[Problem, None] = {}
        #: What each `task` step calls, by the name that stands there.
        self.functions: dict[str, Callable[..., Any]] = {}

    def workflow(self, flow: Flow, name: str | None, more: Mapping[str, object]) -> Workflow:
        if isinstance(flow, OneStep) and flow == OneStep("block", flow.name, body=flow.body) and flow.body is not None:
            # Only its name was put around it.
            name, flow = name or flow.name, flow.body
        body = self._body(flow, Given(), frozenset())
        inputs = self._inputs.declared()
        if self._problems:
            raise WorkflowError(self._problems)
        outputs = {one: template(one) for one in body.last}
        return Workflow.of(
            {
                "name": name or "-".join(body.last).lower().strip("_")[:100] or "flow",
                **({"inputs": inputs} if inputs else {}),
                "steps": body.written,
                "outputs": outputs,
                **more,
            }
        )

    def _wrong(self, message: str) -> None:
        self._problems[Problem(message)] = None

    # Bodies

    def _body(self, flow: Flow, given: Given, around: frozenset[str], check: Flow | None = None) -> Made:
        """The steps of a flow; `check` is asked about its outputs."""
        steps = [*_direct(flow), *(_direct(check) if check else ())]
        names = Names(around, steps)
        placed: dict[str, tuple[OneStep, Given]] = {}
        last = self._place(flow, given, placed, names)
        checks = self._place(check, Given(last, last), placed, names) if check else ("",)
        around |= placed.keys()
        made = {name: self._beside(name, step, given, around) for name, (step, given) in placed.items()}
        references = frozenset[str]().union(*(one.references for one in made.values()))
        return Made({name: one.written for name, one in made.items()}, references, last, checks[0])

    def _place(
        self, flow: Flow, given: Given, placed: dict[str, tuple[OneStep, Given]], names: Names
    ) -> tuple[str, ...]:
        """Put the steps of a flow beside those that are there; its last ones."""
        match flow:
            case Sequential():
                last: tuple[str, ...] = ()
                for one in flow.flows:
                    last = self._place(one, given, placed, names)
                    given = Given(last, last)
                return last
            case Parallel():
                return tuple(name for one in flow.flows for name in self._place(one, given, placed, names))
            case Chosen():
                (name,) = self._place(flow.by.as_one(), given, placed, names)
                value = yes_or_no(name) if flow.yes_or_no else template(name)
                after = replace(given, after=(*given.after, name))
                return self._place(replace(flow.switch, params={"value": value}), after, placed, names)
        step = flow.as_one()
        name = names.of(step)
        if name in placed:
            self._wrong(f"two steps beside each other are called {name!r}: call one of them something else")
        placed[name] = step, given
        return (name,)

    def _beside(self, name: str, step: OneStep, given: Given, around: frozenset[str]) -> Made:
        """A step with others beside it."""
        made = self._step(step, given.inside, around, name)
        needs = [*step.keys.get("needs", ())]
        needs += [one for one in given.after if one not in made.references and one not in needs]
        return replace(made, written={**made.written, "needs": needs}) if needs else made

    def _alone(self, flow: Flow, given: Given, around: frozenset[str], part: str, name: str) -> Made:
        """A step with none beside it, in this part of another."""
        if not isinstance(flow, OneStep) or flow.said.intersection(REFUSED[part]):
            flow = OneStep("block", body=flow)
        return self._step(flow, given, around, name)

    # Steps

    def _step(self, step: OneStep, given: Given, around: frozenset[str], name: str) -> Made:
        written: dict[str, Any] = {"type": step.kind, **step.params, **step.keys}
        if "for_each" in step.keys:
            written["for_each"] = self._items(step.keys["for_each"], given, name)
            given = Given((str(step.keys.get("as", "item")),))
        if isinstance(cache := step.keys.get("cache"), Mapping):
            written["cache"] = {**cache, "key": given.value()} if cache.get("key") is FLOWING else cache
        inside: dict[str, Any] = {
            "fallback": [self._alone(one, given, around, "fallback", name) for one in step.fallback],
            "compensate": step.undo and self._alone(step.undo, Given(("output",)), around, "compensate", name),
        }
        if isinstance(repeat := step.keys.get("repeat"), Mapping):
            written["repeat"], given = self._rounds(repeat, given, name)
        inside |= self._act(step, given, around, name, written)
        paths = _paths(written)
        self._inputs.use(path[1] for path in paths if path[0] == "input" and len(path) > 1)
        references = frozenset(path[0] for path in paths)
        for key, part in inside.items():
            if part:
                written[key] = _written(part)
                references |= _inner_references(part)
        return Made(written, references)

    def _items(self, over: Any, given: Given, name: str) -> Any:
        if over is not FLOWING:
            return over
        if given.values is None:
            self._wrong(
                f"{name!r} is the first, and its items are not known: say over='{{{{ input.documents }}}}' in for_each"
            )
        return given.value()

    def _rounds(self, repeat: Mapping[str, Any], given: Given, name: str) -> tuple[dict[str, Any], Given]:
        if given.carried:
            self._wrong(
                f"{name!r} repeats what begins each round of a repeat that carries: the two 'previous' would be one;"
                " put another step before it"
            )
        written = {key: value for key, value in repeat.items() if key != "carry" and value is not FLOWING}
        return written, replace(given, carried=bool(repeat.get("carry")))

    def _act(
        self, step: OneStep, given: Given, around: frozenset[str], name: str, written: dict[str, Any]
    ) -> dict[str, Any]:
        """Write what the step does; the parts of it that are steps."""
        if step.function is not None:
            written |= self._called(step, name)
            if given_to := self._arguments(step, given, name):
                written["input"] = given_to
        if step.body is not None:
            body = self._body(step.body, given, around, step.until)
            if body.check:
                written["repeat"] |= {"until": body.check}
                outputs = {one: template(one) for one in body.last}
                written.setdefault("output", outputs if len(outputs) > 1 else template(body.last[0]))
            return {"steps": body}
        cases = {text: self._alone(one, given, around, "cases", name) for text, one in step.choices.items()}
        default = step.otherwise and self._alone(step.otherwise, given, around, "cases", name)
        return {"among" if step.kind == "router" else "cases": cases, "default": default}

    # Functions

    def _called(self, step: OneStep, name: str) -> dict[str, str]:
        """How the step's function is named in a workflow file."""
        assert step.function is not None
        if "task" in step.params:
            self.functions[step.params["task"]] = step.function
            return {}
        address = address_of(step.function)
        if address is None and not self._here:
            self._wrong(
                f"{name!r} can only be executed here: no worker can import {shown(step.function)}; define it at the"
                " top of a module that FERRUM_IMPORTS names on the workers"
            )
        # Not an address that a worker would take.
        address = address or f"here:{name}_{len(self.functions)}"
        self.functions[address] = step.function
        return {"function": address}

    def _arguments(self, step: OneStep, given: Given, name: str) -> JsonValue:
        """What a function is called with: by name, or as a list where that cannot be."""
        if "input" in step.params:
            said: JsonValue = step.params["input"]
            return said
        parameters = parameters_of(step)
        if parameters is None:
            if given.values is None:
                self._wrong(f"{name!r} is the first, and its parameters are not known: say input= in step()")
            return [template(one) for one in given.expressions(given.values or ())]
        if given.values is None:
            taken = [one for one in parameters if one.kind not in VARIADIC and has_json_default(one)]
            values = given.expressions([self._inputs.expression(one, step, name) for one in taken])
        else:
            taken, values = self._taken(parameters, given, name)
        bound = {key: _literal(value) for key, value in step.bound.items()}
        if all(one.kind in BY_NAME for one in taken) and len(taken) == len(values):
            return {**{one.name: template(value) for one, value in zip(taken, values, strict=True)}, **bound}
        if bound or any(one.kind is one.KEYWORD_ONLY for one in taken):
            self._wrong(f"{name!r} cannot be called both with a list of arguments and by name: say input= in step()")
        return [template(one) for one in values]

    def _taken(
        self, parameters: Sequence[inspect.Parameter], given: Given, name: str
    ) -> tuple[list[inspect.Parameter], list[str]]:
        """The parameters that what flows in is for, and it; a function without any is given nothing."""
        values = given.expressions(given.values or ())
        positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        any_number = any(one.kind is one.VAR_POSITIONAL for one in parameters)
        if not positional and not any_number:
            values = []
        if len(values) > len(positional) and not any_number:
            self._wrong(
                f"{name!r} is called with {len(values)} arguments ({', '.join(values)}) and takes {len(positional)}"
            )
        taken = positional[: len(values)]
        missing = [one.name for one in parameters if one.default is one.empty and one.kind not in VARIADIC]
        if missing := [one for one in missing if one not in [taken.name for taken in taken]]:
            self._wrong(
                f"{name!r} is called with {', '.join(values) or 'nothing'}, and nothing is there for its"
                f" {', '.join(map(repr, missing))}: say input= in step()"
            )
        return taken, values


# What is written


def _direct(flow: Flow) -> Iterator[OneStep]:
    """The steps of a flow that stand beside each other."""
    match flow:
        case Sequential() | Parallel():
            for one in flow.flows:
                yield from _direct(one)
        case Chosen():
            yield from (flow.by.as_one(), flow.switch)
        case _:
            yield flow.as_one()


def _literal(value: Any) -> Any:
    """A value as a workflow file has to say it so that nothing in it is an expression."""
    if isinstance(value, str):
        return value.replace("{{", '{{ "{{" }}')
    if isinstance(value, Mapping):
        return {key: _literal(one) for key, one in value.items()}
    return [_literal(one) for one in value] if isinstance(value, (list, tuple)) else value


def _written(part: Any) -> Any:
    match part:
        case Made():
            return part.written
        case dict():
            return {key: _written(one) for key, one in part.items()}
        case _:
            return [_written(one) for one in part]


def _inner_references(part: Any) -> frozenset[str]:
    if isinstance(part, Made):
        return part.references
    parts = part.values() if isinstance(part, dict) else part
    return frozenset[str]().union(*map(_inner_references, parts))


def _paths(step: Mapping[str, Any]) -> frozenset[tuple[str, ...]]:
    """What a step's own expressions reach for; what is wrong with them is said when the workflow is made."""
    conditions = [step.get("when"), mapping(step.get("repeat")).get("until")]
    values = [value for key, value in step.items() if key not in ("when", "repeat", "workflow")]
    found = frozenset[tuple[str, ...]]()
    with suppress(ExpressionError):
        found |= Template.compile(values).paths
    for condition in conditions:
        if isinstance(condition, str):
            with suppress(ExpressionError):
                found |= Condition.compile(condition).paths
    return found

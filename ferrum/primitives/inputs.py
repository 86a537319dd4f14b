"""The inputs of a workflow: what its author said, and what the first functions ask for."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Final, Union

from pydantic import JsonValue, TypeAdapter
from pydantic.errors import PydanticUserError

from ferrum.primitives.flow import OneStep
from ferrum.primitives.functions import code
from ferrum.workflow.check import INPUT_KEYWORDS

#: What a value of an input is called.
TYPES: Final[Mapping[type, str]] = dict(
    zip((str, bool, int, float, list, dict), ("string", "boolean", "integer", "number", "array", "object"), strict=True)
)


class Inputs:
    """What a workflow is given: what its author said, and what the first functions ask for."""

    def __init__(
        self, said: Mapping[str, object], sample: Mapping[str, JsonValue], wrong: Callable[[str], None]
    ) -> None:
        self._said = said
        self._sample = sample
        self._wrong = wrong
        self._asked: dict[str, dict[str, JsonValue]] = {}
        #: Who asked first.
        self._by: dict[str, str] = {}

    def use(self, names: Iterable[str]) -> None:
        """Expressions use these: in process, what they are given declares them."""
        for name in names:
            if name in self._sample and name not in {*self._said, *self._asked}:
                self._ask(name, {}, "an expression")

    def expression(self, parameter: inspect.Parameter, step: OneStep, by: str) -> str:
        """How the input for this parameter is written."""
        name = parameter.name
        if name not in self._said:
            self._ask(name, input_spec(parameter, step), by)
        reference = f"input.{name}"
        return f"has({reference}) ? {reference} : null" if parameter.default is None else reference

    def _ask(self, name: str, spec: dict[str, JsonValue], by: str) -> None:
        before, first = self._asked.get(name, spec), self._by.setdefault(name, by)
        kinds = [str(one["type"]) for one in (before, spec) if "type" in one]
        if len(set(kinds)) > 1:
            self._wrong(f"the input {name!r} is {kinds[0]} for {first!r} and {kinds[1]} for {by!r}: say inputs=")
        without = [_left_out(one) for one in (before, spec)]
        if all(without) and without[0] != without[1]:
            self._wrong(f"where {name!r} is not given, {first!r} and {by!r} take different values: say inputs=")
        # Whoever cannot do without it decides.
        optional = without[0] if all(without) else {}
        self._asked[name] = {**_always(spec), **_always(before), **optional}

    def declared(self) -> dict[str, object]:
        """All inputs, as in a workflow file."""
        return {**{name: self._typed(name, spec) for name, spec in self._asked.items()}, **self._said}

    def _typed(self, name: str, spec: dict[str, JsonValue]) -> dict[str, JsonValue]:
        kind = spec.get("type") or TYPES.get(type(spec.get("default"))) or TYPES.get(type(self._sample.get(name)))
        if kind is None:
            self._wrong(
                f"nothing says of what type the input {name!r} is: annotate the parameter of {self._by[name]!r} (str,"
                f" int, float, bool, list, dict), or say inputs={{{name!r}: {{'type': …}}}}"
            )
        return {"type": kind, **spec}


def _left_out(spec: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """What is said of a run that is not given it; empty where it has to be."""
    return {key: value for key, value in spec.items() if key in ("default", "required")}


def _always(spec: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {key: value for key, value in spec.items() if key not in ("default", "required")}


def input_spec(parameter: inspect.Parameter, step: OneStep) -> dict[str, JsonValue]:
    """What a parameter says of the input of its name; without a `type` where it does not."""
    spec: dict[str, JsonValue] = _schema(_hint(parameter, step))
    if parameter.default is None:
        return {**spec, "required": False}
    return spec if parameter.default is parameter.empty else {**spec, "default": parameter.default}


def _hint(parameter: inspect.Parameter, step: OneStep) -> Any:
    """Its annotation, without `None`."""
    try:
        hint = typing.get_type_hints(code(step)).get(parameter.name, Any)
    except (NameError, TypeError):
        return Any
    if typing.get_origin(hint) in (Union, UnionType):
        return Union[tuple(one for one in typing.get_args(hint) if one is not NoneType)]  # noqa: UP007
    return hint


def _schema(hint: Any) -> dict[str, JsonValue]:
    """The JSON Schema of a type, as far as it can be said of an input."""
    try:
        schema = TypeAdapter(hint).json_schema()
    except (PydanticUserError, NameError, TypeError):
        return {}
    if schema.get("type") not in TYPES.values():
        return {}
    if "$defs" in schema:
        return {"type": schema["type"]}
    return {key: value for key, value in schema.items() if key in ("type", *INPUT_KEYWORDS)}

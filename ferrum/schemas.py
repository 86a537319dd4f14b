"""Values held against JSON Schemas that others wrote: within a bound, and with patterns that are found in linear time.

A schema can make its own check endless: by a pattern, by branches that double at each level, by comparing each item
with each. The library of the name does what a schema says for as long as it takes. Here the parts that would not end
are done in another way, all of its steps are counted, and one that takes too many is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, Final, TypeAlias, TypeVar

from attrs import fields
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import Draft202012Validator, extend, validator_for
from pydantic import JsonValue
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import lookup_recursive_ref

from ferrum import sameness
from ferrum.patterns import Pattern, PatternError, schema_pattern

#: Most work of one check, in microseconds of a usual processor. The other threads of the process run meanwhile.
MAX_WORK: Final = 5_000_000
#: Most work of looking for one pattern in one text, during which no other thread runs.
MAX_SEARCH: Final = 500_000

#: One keyword on one value, in microseconds.
_STEP: Final = 15

_T = TypeVar("_T")
_Keyword: TypeAlias = Callable[[Any, Any, Any, Any], Iterable[ValidationError] | None]


class SchemaFault(ValueError):
    """A schema that is none, or that asks for what cannot be done; it says what."""


class TooCostly(ValueError):
    """A value that cannot be held against a schema within `MAX_WORK`."""


class _Work:
    """The work of one check so far."""

    __slots__ = ("_left", "lenient")

    def __init__(self, *, lenient: bool) -> None:
        self._left = MAX_WORK
        #: Whether patterns that cannot be looked for are passed over.
        self.lenient = lenient

    def spend(self, microseconds: int) -> None:
        self._left -= microseconds
        if self._left < 0:
            raise TooCostly("it would take too long")

    def found(self, pattern: str, text: str, otherwise: bool) -> bool:
        """Tell whether a pattern is in a text; `otherwise` for one that is passed over."""
        known = self.pattern(pattern)
        if known is None:
            return otherwise
        price = known.price(text)
        if price > MAX_SEARCH:
            raise TooCostly(f"it would take too long to look for {known.source[:100]!r} in {len(text)} characters")
        self.spend(price)
        return known.search(text)

    def pattern(self, source: str) -> Pattern | None:
        try:
            return schema_pattern(source)
        except PatternError as error:
            if self.lenient:
                return None
            raise SchemaFault(str(error)) from error


_WORK: Final[ContextVar[_Work]] = ContextVar("work")


def check(schema: Mapping[str, JsonValue], *, lenient: bool = False) -> None:
    """Raises `SchemaFault` for what is not a JSON Schema (2020-12 where it does not say), or none that can be used."""
    try:
        text = json.dumps(schema)
    except (RecursionError, ValueError) as error:
        raise SchemaFault("it is nested too deep") from error
    if fault := _fault(text, lenient):
        raise SchemaFault(fault)


def errors(schema: Mapping[str, JsonValue], value: JsonValue, *, lenient: bool = False) -> list[ValidationError]:
    """All that keeps a value from being what a schema asks for.

    What a schema refers to is never fetched from the network. Raises `SchemaFault`, and `TooCostly`. Where it is
    `lenient`, a pattern that cannot be looked for is passed over.
    """
    kind = _counted(_kind(schema))
    return _run(lambda: list(kind(dict(schema), registry=Registry()).iter_errors(value)), lenient=lenient)


def worst(found: Iterable[ValidationError]) -> ValidationError | None:
    """The error that tells most; `None` if there is none."""
    best: ValidationError | None = best_match(found)
    return best


def _run(do: Callable[[], _T], *, lenient: bool) -> _T:
    token = _WORK.set(_Work(lenient=lenient))
    try:
        return do()
    except RecursionError as error:
        raise TooCostly("it is nested too deep, or refers to itself without end") from error
    except Unresolvable as error:
        raise SchemaFault(f"it refers to {error.ref!r}, which is not in it") from error
    except OverflowError as error:
        raise TooCostly("it holds a number that is too large to be compared") from error
    except (SchemaFault, TooCostly):
        raise
    except ValueError as error:
        # An `$id` or a `$ref` that is no address.
        raise SchemaFault(str(error)) from error
    finally:
        _WORK.reset(token)


@lru_cache(maxsize=128)
def _fault(text: str, lenient: bool) -> str | None:
    """Return what is wrong with a schema, written as JSON."""
    schema = json.loads(text)
    try:
        return _run(lambda: _broken_rule(schema), lenient=lenient)
    except (SchemaFault, TooCostly) as error:
        return str(error)


def _broken_rule(schema: dict[str, JsonValue]) -> str | None:
    kind = _counted(_kind(schema))
    found = worst(kind(kind.META_SCHEMA).iter_errors(schema))
    if found is not None:
        return f"{found.message}, at {found.json_path}"
    for pattern in _patterns(schema):
        _WORK.get().pattern(pattern)
    return None


#: Keywords whose value is data, in which nothing is a schema.
_DATA: Final = frozenset(("const", "default", "enum", "examples"))
#: Keywords whose value has schemas under names that the author chose.
_NAMED: Final = frozenset(
    ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")
)


def _patterns(schema: Any) -> Iterator[str]:
    """The patterns of a schema and of those in it."""
    todo = [schema]
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            todo += one
        if not isinstance(one, dict):
            continue
        if isinstance(pattern := one.get("pattern"), str):
            yield pattern
        for keyword, value in one.items():
            if keyword == "patternProperties" and isinstance(value, dict):
                yield from value
            if keyword in _NAMED and isinstance(value, dict):
                todo += value.values()
            elif keyword not in _DATA:
                todo.append(value)


def _kind(schema: Mapping[str, JsonValue]) -> Any:
    return validator_for(dict(schema), default=Draft202012Validator)


@cache
def _counted(kind: Any) -> Any:
    """A draft of JSON Schema, as the library knows it, with its work counted and its endless parts replaced."""
    known: dict[str, _Keyword] = dict(kind.VALIDATORS)
    known |= {name: keyword for name, keyword in _OURS.items() if name in known}
    counted: Any = extend(kind, {name: _metered(one) for name, one in known.items()})  # type: ignore[no-untyped-call]
    evolve = counted.evolve

    def evolved(self: Any, **changes: Any) -> Any:
        # A schema that names its draft itself would be taken out of our hands.
        made = evolve(self, **changes)
        if hasattr(made, "counted"):
            return made
        kind: Any = type(made)
        return _counted(kind)(**{one.alias: getattr(made, one.name) for one in fields(kind) if one.init})

    counted.evolve = evolved
    counted.counted = True
    return counted


def _metered(keyword: _Keyword) -> _Keyword:
    def metered(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        spend = _WORK.get().spend
        spend(_STEP + _size(value) + _size(instance))
        for error in keyword(validator, value, instance, schema) or ():
            # It quotes what is wrong, whole.
            spend(_STEP + (len(error.message) >> 5))
            yield error

    return metered


def _size(value: Any) -> int:
    return len(value) >> (5 if isinstance(value, str) else 0) if isinstance(value, str | list | dict) else 0


# Keywords that the library does by comparing each with each, or with Python's patterns


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _WORK.get().found(pattern, instance, True):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    for pattern, subschema in patterns.items():
        for name, value in instance.items():
            if _WORK.get().found(pattern, name, False):
                yield from validator.descend(value, subschema, path=name, schema_path=pattern)


def _additional(instance: dict[str, Any], schema: Any) -> list[str]:
    """Names that neither `properties` nor `patternProperties` speak of."""
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    return [
        name
        for name in instance
        if name not in named and not any(_WORK.get().found(pattern, name, True) for pattern in patterns)
    ]


def _additional_properties(validator: Any, allowed: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    names = _additional(instance, schema)
    if isinstance(allowed, dict):
        for name in names:
            yield from validator.descend(instance[name], allowed, path=name)
    elif not allowed and names:
        if patterns := sorted(schema.get("patternProperties", ())):
            verb = "does" if len(names) == 1 else "do"
            shown = ", ".join(map(repr, sorted(names)))
            yield ValidationError(f"{shown} {verb} not match any of the regexes: {', '.join(map(repr, patterns))}")
        else:
            yield ValidationError(f"Additional properties are not allowed ({_unexpected(names)} unexpected)")


def _unexpected(names: list[str]) -> str:
    return f"{', '.join(map(repr, names))} {'was' if len(names) == 1 else 'were'}"


def _unique_items(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not wanted or not isinstance(instance, list):
        return
    spend = _WORK.get().spend
    if len({sameness.key(item, spend) for item in instance}) < len(instance):
        yield ValidationError(f"{instance!r} has non-unique elements")


def _const(validator: Any, const: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    spend = _WORK.get().spend
    if sameness.key(const, spend) != sameness.key(instance, spend):
        yield ValidationError(f"{const!r} was expected")


def _enum(validator: Any, values: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    spend = _WORK.get().spend
    if isinstance(instance, str):
        found = instance in values
    else:
        given = sameness.key(instance, spend)
        found = any(sameness.key(value, spend) == given for value in values if not isinstance(value, str))
    if not found:
        yield ValidationError(f"{instance!r} is not one of {values!r}")


def _unevaluated_properties(validator: Any, allowed: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    known = set(_evaluated(validator, instance, schema))
    names = [name for name in instance if name not in known and not _fits(validator, instance[name], allowed)]
    if names and allowed is False:
        yield ValidationError(f"Unevaluated properties are not allowed ({_unexpected(sorted(names))} unexpected)")
    elif names:
        yield ValidationError(
            "Unevaluated properties are not valid under the given schema "
            f"({_unexpected(names)} unevaluated and invalid)"
        )


def _evaluated(validator: Any, instance: dict[str, Any], schema: Any) -> Iterator[str]:
    """Names that a schema, or one that it applies in the same place, has something to say of."""
    if not isinstance(schema, dict):
        return
    _WORK.get().spend(_STEP + len(schema) + len(instance))
    yield from instance.keys() & schema.get("properties", {}).keys()
    if "additionalProperties" in schema:
        yield from _additional(instance, schema)
    if "unevaluatedProperties" in schema:
        below = schema["unevaluatedProperties"]
        yield from [name for name, value in instance.items() if _fits(validator, value, below)]
    for pattern in schema.get("patternProperties", ()):
        yield from [name for name in instance if _WORK.get().found(pattern, name, True)]
    for applied, below in _applied(validator, instance, schema):
        yield from _evaluated(applied, instance, below)


def _unevaluated_items(validator: Any, allowed: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, list):
        return
    known = set(_evaluated_items(validator, instance, schema))
    if left := [repr(item) for at, item in enumerate(instance) if at not in known]:
        verb = "was" if len(left) == 1 else "were"
        yield ValidationError(f"Unevaluated items are not allowed ({', '.join(left)} {verb} unexpected)")


def _evaluated_items(validator: Any, instance: list[Any], schema: Any) -> Iterator[int]:
    """Places of items that a schema, or one that it applies in the same place, has something to say of."""
    if not isinstance(schema, dict):
        return
    _WORK.get().spend(_STEP + len(schema) + len(instance))
    items = schema.get("items")
    if isinstance(items, list) and "additionalItems" not in schema:
        # Up to the draft of 2019-09.
        yield from range(len(items))
    elif "items" in schema:
        yield from range(len(instance))
    yield from range(len(schema.get("prefixItems", ())))
    for keyword in ("contains", "unevaluatedItems"):
        if keyword in schema:
            yield from [at for at, item in enumerate(instance) if _fits(validator, item, schema[keyword])]
    for applied, below in _applied(validator, instance, schema):
        yield from _evaluated_items(applied, instance, below)


def _applied(validator: Any, instance: Any, schema: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The schemas that a schema applies in the same place, where they fit."""
    for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
        if keyword in schema:
            resolver = validator._resolver
            found = lookup_recursive_ref(resolver) if keyword == "$recursiveRef" else resolver.lookup(schema[keyword])
            yield validator.evolve(schema=found.contents, _resolver=found.resolver), found.contents
    for name, below in schema.get("dependentSchemas", {}).items():
        if isinstance(instance, dict) and name in instance:
            yield validator, below
    for keyword in ("allOf", "oneOf", "anyOf"):
        for below in schema.get(keyword, ()):
            if _fits(validator, instance, below):
                yield validator, below
    if "if" in schema:
        if _fits(validator, instance, schema["if"]):
            yield validator, schema["if"]
            yield validator, schema.get("then", True)
        else:
            yield validator, schema.get("else", True)


def _fits(validator: Any, instance: Any, schema: Any) -> bool:
    _WORK.get().spend(1)
    return next(validator.descend(instance, schema), None) is None


_OURS: Final[Mapping[str, _Keyword]] = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "uniqueItems": _unique_items,
    "const": _const,
    "enum": _enum,
    "unevaluatedItems": _unevaluated_items,
    "unevaluatedProperties": _unevaluated_properties,
}

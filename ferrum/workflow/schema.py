"""A JSON Schema of workflow files, for editors: completion and squiggles while an author types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from pydantic import BaseModel, TypeAdapter

from ferrum.workflow.check import INPUT_KEYWORDS
from ferrum.workflow.spec import Budget, Defaults, InputSpec, Timeout

Schema: TypeAlias = dict[str, Any]

_NAME: Final = "^[A-Za-z_][A-Za-z0-9_]{0,63}$"
#: An expression may stand wherever a value may.
_EXPRESSION: Final[Schema] = {"type": "string", "pattern": r"\{\{"}
_COMMON: Final[Schema] = {
    "needs": {
        "type": "array",
        "items": {"type": "string"},
        "uniqueItems": True,
        "description": "Steps that have to be over before, besides those that the step's expressions refer to.",
    },
    "when": {"type": "string", "description": "CEL without braces; the step is skipped where it is false."},
    "retry": {"$ref": "#/$defs/Retry", "description": "How often the step is tried, and the waits in between."},
    "timeout": {"$ref": "#/$defs/duration", "description": "Longest time of one attempt: 250ms, 60s, 15m, 24h, 7d."},
}


def workflow_schema(step_types: Mapping[str, Mapping[str, Any]]) -> Schema:
    """A JSON Schema (2020-12) of workflow files, given the JSON Schema of each step type's parameters.

    Looser than the real check: it takes any text with `{{` for an expression and does not follow references.
    """
    models = _models()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ferrum workflow",
        "type": "object",
        "required": ["name", "steps"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_.-]{0,99}$"},
            "version": {
                "type": "string",
                "minLength": 1,
                "maxLength": 100,
                "description": "In quotes where it looks like a number.",
            },
            "description": {"type": "string"},
            "inputs": _named("What a run is given.", {"$ref": "#/$defs/input"}),
            "budget": {"$ref": "#/$defs/Budget", "description": "What a run may use up at most."},
            "defaults": {
                "$ref": "#/$defs/Defaults",
                "description": "What holds for every step that does not say otherwise.",
            },
            "steps": _named("The work, one step each.", {"$ref": "#/$defs/step"}) | {"minProperties": 1},
            "outputs": {"type": "object", "description": "What a run returns; references any step."},
        },
        "$defs": {
            **models,
            "input": _input(),
            "step": _step(step_types),
            **{f"step.{name}": _typed(name, schema) for name, schema in step_types.items()},
            **{
                f"{name}.{part}": _open(schema, name)
                for name, params in step_types.items()
                for part, schema in params.get("$defs", {}).items()
            },
        },
    }


def _named(description: str, value: Schema) -> Schema:
    return {
        "type": "object",
        "description": description,
        "propertyNames": {"pattern": _NAME},
        "additionalProperties": value,
    }


def _models() -> Schema:
    """`Budget`, `Defaults` and what they are made of."""
    found: Schema = {"duration": TypeAdapter(Timeout).json_schema()}
    models: tuple[type[BaseModel], ...] = (Budget, Defaults)
    for model in models:
        schema = model.model_json_schema()
        found |= schema.pop("$defs", {})
        found[model.__name__] = schema
    return found


def _input() -> Schema:
    types = InputSpec.model_json_schema()["properties"]["type"]["enum"]
    return {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": types},
            "description": {"type": "string"},
            "default": {"description": "What it is when a run is not given it."},
            "required": {
                "type": ["boolean", "array"],
                "description": "Whether a run cannot start without it; by default where there is no `default`.",
            },
            **dict.fromkeys(INPUT_KEYWORDS, True),
        },
        "additionalProperties": False,
    }


def _step(step_types: Mapping[str, Mapping[str, Any]]) -> Schema:
    return {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": [*step_types], "description": "What the step does."}},
        "allOf": [
            {
                "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
                "then": {"$ref": f"#/$defs/step.{name}"},
            }
            for name in step_types
        ],
    }


def _typed(name: str, params: Mapping[str, Any]) -> Schema:
    """The schema of a whole step of one type."""
    opened = _open(params, name)
    properties = {**opened.get("properties", {}), "type": {"const": name}, **_COMMON}
    return {**opened, "properties": properties, "required": ["type", *params.get("required", [])]}


def _open(schema: Mapping[str, Any], name: str) -> Schema:
    """A schema of parameters in which an expression may stand for any value inside."""
    opened: Schema = {}
    for key, value in schema.items():
        match key, value:
            case "$defs" | "discriminator", _:
                continue
            case "$ref", str():
                opened[key] = value.replace("#/$defs/", f"#/$defs/{name}.")
            case "properties" | "patternProperties", dict():
                opened[key] = {part: _or_expression(inner, name) for part, inner in value.items()}
            case "items" | "additionalProperties", dict():
                opened[key] = _or_expression(value, name)
            case "prefixItems", list():
                opened[key] = [_or_expression(inner, name) for inner in value]
            case "anyOf" | "oneOf" | "allOf", list():
                opened[key] = [_open(inner, name) if isinstance(inner, dict) else inner for inner in value]
            case _:
                opened[key] = value
    return opened


def _or_expression(schema: Schema | bool, name: str) -> Schema | bool:
    if not isinstance(schema, dict):
        return schema
    opened = _open(schema, name)
    about: Schema = {key: opened.pop(key) for key in ("title", "description", "default", "examples") if key in opened}
    if not opened or opened == {"type": "string"}:
        return {**opened, **about}
    return {**about, "anyOf": [opened, _EXPRESSION]}

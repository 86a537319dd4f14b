"""A JSON Schema of workflow files, for editors: completion and squiggles while an author types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from pydantic import BaseModel, TypeAdapter

from ferrum.workflow.check import INPUT_KEYWORDS
from ferrum.workflow.rules import NO_CACHE, NO_RETRY, REFUSED
from ferrum.workflow.spec import Budget, Cache, Concurrency, Defaults, InputSpec, Rate, Repeat, Route, Timeout

Schema: TypeAlias = dict[str, Any]

_NAME: Final = "^[A-Za-z_][A-Za-z0-9_]{0,63}$"
#: An expression may stand wherever a value may.
_EXPRESSION: Final[Schema] = {"type": "string", "pattern": r"\{\{"}
#: What cannot be there; said so, and not as `false`, errors point at it and not at what it is in.
_NEVER: Final[Schema] = {"not": {}}
_STEP: Final[Schema] = {"$ref": "#/$defs/step"}
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
    "deadline": {
        "$ref": "#/$defs/duration",
        "description": "Longest time from when the step was ready until it is over, all attempts and waits included.",
    },
    "on_error": {
        "enum": ["fail", "continue", "fail_fast", "collect"],
        "description": "`continue`: the step may fail, and is `null` for what refers to it. With `for_each` also"
        " `fail_fast`, the default: the first item that fails ends the others; and `collect`: an item that failed is"
        " `{error, index}` in the list.",
    },
    "for_each": {
        "anyOf": [{"type": "array"}, _EXPRESSION],
        "description": "A list, or an expression that gives one. The step is run for each `item` of it, whose number"
        " from 0 is `index`, and returns a list in the same order.",
    },
    "as": {
        "type": "string",
        "pattern": _NAME,
        "description": "What an item is called instead of `item`; its `index` is then called this and `_index`.",
    },
    "max_parallel": {"type": "integer", "minimum": 1, "description": "Most items at the same time."},
    "repeat": {
        "$ref": "#/$defs/Repeat",
        "description": "The step is run again until it is done. `previous` is what it returned in the round before,"
        " `round` the number of the round, from 1.",
    },
    "fallback": {
        "type": "array",
        "items": {"$ref": "#/$defs/fallback"},
        "description": "Steps that are tried in its place, one after the other, when it has failed. `error` is why.",
    },
    "compensate": {
        "$ref": "#/$defs/compensate",
        "description": "The step that undoes what this one did, when the run fails or is cancelled after it completed."
        " `output` is what it returned, `params` what it was given.",
    },
    "cache": {"$ref": "#/$defs/Cache", "description": "When the output of an earlier run is taken."},
    "concurrency": {
        "$ref": "#/$defs/Concurrency",
        "description": "How many such steps are run at the same time, in all runs.",
    },
    "rate": {"$ref": "#/$defs/Rate", "description": "How many such steps are started in a time, in all runs."},
}
#: What the types that are made of steps say besides their parameters, and what of it they have to say.
COMPOSED: Final[Mapping[str, Schema]] = {
    "block": {"steps": {"$ref": "#/$defs/steps", "description": "What is inside."}},
    "switch": {
        "cases": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"$ref": "#/$defs/case"},
            "description": 'A step for each value, which is written as text: `bug`, `"3"`, `"true"`.',
        },
        "default": {"$ref": "#/$defs/case", "description": "The step for any other value."},
    },
    "router": {
        "among": {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": _NAME},
            "additionalProperties": {"$ref": "#/$defs/routed"},
            "description": "The steps that it may choose. The best is tried first; when it fails, the next.",
        },
    },
    "workflow": {
        "file": {
            "type": "string",
            "description": "The path of a workflow's file, relative to this one; put in when this one is read.",
        },
        "workflow": {"$ref": "#", "description": "Or the workflow itself."},
    },
}
REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {"block": ("steps",), "switch": ("cases",), "router": ("among",)}


def workflow_schema(step_types: Mapping[str, Mapping[str, Any]]) -> Schema:
    """A JSON Schema (2020-12) of workflow files, given the JSON Schema of the parameters of each type that is written.

    Looser than the real check: it takes any text with `{{` for an expression and does not follow references.
    """
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
            "inputs": _named({"$ref": "#/$defs/input"}) | {"description": "What a run is given."},
            "budget": {"$ref": "#/$defs/Budget", "description": "What a run may use up at most."},
            "deadline": {
                "$ref": "#/$defs/duration",
                "description": "The run fails when it is not over by then, whatever it waits for.",
            },
            "priority": {
                "type": "integer",
                "minimum": 0,
                "maximum": 9,
                "default": 5,
                "description": "9 is most urgent. Default: 5.",
            },
            "defaults": {
                "$ref": "#/$defs/Defaults",
                "description": "What holds for every step that does something itself and does not say otherwise.",
            },
            "steps": {"$ref": "#/$defs/steps", "description": "The work, one step each."},
            "outputs": {"type": "object", "description": "What a run returns; references any step."},
        },
        "$defs": {
            **_models(),
            "input": _input(),
            "steps": _named(_STEP) | {"minProperties": 1},
            "step": _step(step_types, "step"),
            "routed": _step(step_types, "routed"),
            **{name: _restricted(part) for name, part in _PARTS.items()},
            **{f"step.{name}": _typed(name, schema) for name, schema in step_types.items()},
            **{f"routed.{name}": _routed(_typed(name, schema)) for name, schema in step_types.items()},
            **{
                f"{name}.{part}": _open(schema, name)
                for name, params in step_types.items()
                for part, schema in params.get("$defs", {}).items()
            },
        },
    }


def _named(value: Schema) -> Schema:
    return {"type": "object", "propertyNames": {"pattern": _NAME}, "additionalProperties": value}


def _models() -> Schema:
    """The parts that are the same wherever they stand, and what they are made of."""
    found: Schema = {"duration": TypeAdapter(Timeout).json_schema()}
    models: tuple[type[BaseModel], ...] = (Budget, Defaults, Repeat, Cache, Concurrency, Rate)
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


#: Steps that stand in a part of another one, and the part.
_PARTS: Final = {"case": "cases", "fallback": "fallback", "compensate": "compensate"}


def _restricted(part: str) -> Schema:
    """A step that cannot have all that others have."""
    return {**_STEP, "properties": dict.fromkeys(REFUSED[part], _NEVER)}


def _step(types: Mapping[str, Any], base: str) -> Schema:
    """A step of any type; where it does not say which, it is a block."""
    block: Schema = {"if": {"not": {"required": ["type"]}}, "then": {"$ref": f"#/$defs/{base}.block"}}
    typed = [
        {
            "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
            "then": {"$ref": f"#/$defs/{base}.{name}"},
        }
        for name in types
    ]
    return {
        "type": "object",
        "properties": {"type": {"enum": [*types], "description": "What the step does."}},
        **({"allOf": [*typed, block]} if "block" in types else {"allOf": typed, "required": ["type"]}),
    }


def _typed(name: str, params: Mapping[str, Any]) -> Schema:
    """The schema of a whole step of one type."""
    opened = _open(params, name)
    refused = [*(["retry"] if name in NO_RETRY else []), *(["cache"] if name in NO_CACHE else [])]
    return {
        **opened,
        "properties": {
            **COMPOSED.get(name, {}),
            **{
                key: schema for key, schema in opened.get("properties", {}).items() if key not in COMPOSED.get(name, {})
            },
            "type": {"const": name},
            **_COMMON,
            **dict.fromkeys(refused, _NEVER),
        },
        "required": [
            *([] if name == "block" else ["type"]),
            *REQUIRED.get(name, ()),
            *params.get("required", []),
        ],
        "dependentRequired": {"as": ["for_each"], "max_parallel": ["for_each"]},
        **({"oneOf": [{"required": [key]} for key in ("file", "workflow", "name")]} if name == "workflow" else {}),
    }


def _routed(step: Schema) -> Schema:
    """The same step where a router may choose it."""
    route = Route.model_json_schema()["properties"]
    return {**step, "properties": {**step["properties"], **route, **dict.fromkeys(REFUSED["among"], _NEVER)}}


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

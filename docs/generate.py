"""Writes the parts of these pages that the code knows better: `python docs/generate.py`.

A part stands between `<!-- generated: name -->` and `<!-- end -->`; a test checks that the pages are in step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from ferrum import errors, expressions, patterns
from ferrum.settings import Settings
from ferrum.steps import StepType, step_types
from ferrum.workflow import (
    COMMON,
    Budget,
    Cache,
    Concurrency,
    Rate,
    Repeat,
    Retry,
    Route,
    text,
    workflow_schema,
)
from ferrum.workflow.check import INPUT_KEYWORDS
from ferrum.workflow.rules import NO_RETRY
from ferrum.workflow.schema import COMPOSED, REQUIRED

HERE: Final = Path(__file__).parent
PAGES: Final = ("workflow-reference.md", "operations.md")

_PART: Final = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The text of a page with every generated part written anew."""
    return _PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]()}\n\n{part[3]}", page)


def main() -> None:
    for name in PAGES:
        path = HERE / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


# Tables.


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    rows = (
        [f"`{name}`", _type(field), _default(field, required=name in required), field.get("description", "")]
        for name, field in schema["properties"].items()
    )
    return _table(("field", "type", "default", "what it says"), rows)


def _model(model: type[BaseModel]) -> Callable[[], str]:
    return lambda: _fields(model.model_json_schema())


def _type(schema: Mapping[str, Any]) -> str:
    match schema:
        case {"anyOf": list(choices)}:
            kinds = list(dict.fromkeys(_type(one) for one in choices if one.get("type") != "null"))
            return "duration" if any(_is_duration(one) for one in choices) else " or ".join(kinds)
        case {"$ref": str(ref)}:
            return {"#": "workflow", "#/$defs/steps": "steps by name", "#/$defs/case": "step"}.get(ref, "any value")
        case {"type": "object", "additionalProperties": {"$ref": "#/$defs/case" | "#/$defs/routed"}}:
            return "steps by name"
        case {"type": "array", **rest}:
            inner = _type(rest["items"]) if "items" in rest else ""
            return f"list of {inner}" if inner and inner != "any value" else "list"
        case {"type": str(kind)}:
            return {"object": "mapping", "string": "text", "boolean": "true or false"}.get(kind, kind)
    return "any value"


def _is_duration(schema: Mapping[str, Any]) -> bool:
    return "ms|[smhd]" in schema.get("pattern", "")


def _default(schema: Mapping[str, Any], *, required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "" if default in (None, [], {}, "") else f"`{json.dumps(default)}`"


# The workflow reference.


def _schema() -> dict[str, Any]:
    return workflow_schema({name: kind.params.model_json_schema() for name, kind in _written().items()})


def _written() -> dict[str, StepType[Any]]:
    """The types that an author may write."""
    return {name: kind for name, kind in step_types().items() if kind.written}


def _top() -> str:
    schema = _schema()
    said = {
        "name": "What it is called: `a-z`, `0-9`, `-`, `_` and `.`, up to 100, a letter or digit first.",
        "description": "For people.",
    }
    rows = (
        [
            f"`{name}`",
            "required" if name in schema["required"] else "",
            field.get("description") or said[name],
        ]
        for name, field in schema["properties"].items()
    )
    return _table(("field", "", "what it says"), rows)


def _common() -> str:
    """What every step may say."""
    parts = _schema()["$defs"]
    steps = [parts[f"step.{kind}"]["properties"] for kind in _written()]
    said = {"type": "What the step does. May be left out where there are `steps`: then it is a `block`."}
    for name in COMMON[1:]:
        # A type that cannot have it says nothing about it.
        said[name] = next(step[name]["description"] for step in steps if "description" in step[name])
    return _table(("field", "what it says"), ([f"`{name}`", what] for name, what in said.items()))


def _inputs() -> str:
    types = _schema()["$defs"]["input"]["properties"]["type"]["enum"]
    kinds = ", ".join(f"`{name}`" for name in types)
    keywords = ", ".join(f"`{name}`" for name in INPUT_KEYWORDS)
    return f"Types: {kinds}.\n\nKeywords of JSON Schema that may stand beside the type: {keywords}."


def _types() -> str:
    return "\n\n".join("\n".join(_one_type(kind)) for kind in _written().values())


def _one_type(kind: StepType[Any]) -> Iterator[str]:
    yield f"### `type: {kind.name}`"
    yield ""
    own = kind.params.model_json_schema()
    steps = COMPOSED.get(kind.name, {})
    yield _fields(
        {
            "properties": {**steps, **{name: field for name, field in own["properties"].items() if name not in steps}},
            "required": [*own.get("required", []), *REQUIRED.get(kind.name, ())],
        }
    )
    yield ""
    tries = kind.retry.max_attempts
    limit = f"{kind.timeout_s:g} s" if kind.timeout_s is not None else "none"
    tried = "" if kind.name in NO_RETRY else f" Tries without a `retry`: {tries}."
    yield f"Queue `{kind.queue}`.{tried} `timeout` without one: {limit}."


def _functions() -> str:
    groups = {
        "Of CEL": sorted(expressions._NATIVE),
        "Macros, called on a list or a map": sorted(expressions._BINDING),
        "Added": sorted(name for name in expressions.FUNCTIONS if name not in expressions._NATIVE),
    }
    return "\n".join(f"- {title}: {', '.join(f'`{name}`' for name in names)}." for title, names in groups.items())


def _limits() -> str:
    rows = [
        ["size of a workflow file", f"{text.MAX_BYTES:,} bytes"],
        ["nesting of a workflow file", f"{text.MAX_DEPTH} levels"],
        ["values in a workflow file, aliases written out", f"{text.MAX_VALUES:,}"],
        ["length of an expression", f"{expressions.MAX_LENGTH:,} characters, {expressions.MAX_TOKENS} words and signs"],
        ["nesting of an expression", f"{expressions.MAX_NESTING} levels, a macro counts as three"],
        ["items that the macros of an expression go over, in all", f"{expressions.MAX_ITEMS:,}"],
        ["nesting of a value that an expression computes with", f"{expressions.MAX_DATA_NESTING} levels"],
        ["text that an expression builds", f"{expressions.MAX_TEXT:,} characters"],
        ["all that an expression builds", f"{expressions.MAX_LIST:,} characters, an item of a list counts as 32"],
        [
            "steps of an expression: operations in macros, items compared, 64 characters read",
            f"{expressions.MAX_STEPS:,}",
        ],
        ["length of a pattern", f"{patterns.MAX_PATTERN:,} characters"],
    ]
    return _table(("what", "at most"), rows)


def _errors() -> str:
    tree = (errors.__doc__ or "").partition("\n\n")[2].strip()
    return f"```text\n{tree}\n```"


# Operations.


def _settings() -> str:
    rows = (
        [f"`FERRUM_{name.upper()}`", _setting_default(field.default), field.description or ""]
        for name, field in Settings.model_fields.items()
    )
    return _table(("variable", "default", "what it says"), rows)


def _setting_default(value: object) -> str:
    if isinstance(value, float):
        return f"`{value:g}`"
    return "" if value in (None, "") else f"`{value}`"


PARTS: Final[Mapping[str, Callable[[], str]]] = {
    "workflow": _top,
    "common": _common,
    "inputs": _inputs,
    "budget": _model(Budget),
    "retry": _model(Retry),
    "repeat": _model(Repeat),
    "cache": _model(Cache),
    "concurrency": _model(Concurrency),
    "rate": _model(Rate),
    "route": _model(Route),
    "types": _types,
    "functions": _functions,
    "limits": _limits,
    "errors": _errors,
    "settings": _settings,
}


if __name__ == "__main__":
    main()

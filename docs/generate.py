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

from ferrum import errors, expressions
from ferrum.settings import Settings
from ferrum.steps import StepType, step_types
from ferrum.workflow import Budget, Retry, text, workflow_schema
from ferrum.workflow.check import INPUT_KEYWORDS

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
    return workflow_schema({name: kind.params.model_json_schema() for name, kind in step_types().items()})


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
    """What every step may say: what all types have in common."""
    steps = [part for name, part in _schema()["$defs"].items() if name in {f"step.{kind}" for kind in step_types()}]
    shared = [name for name in steps[0]["properties"] if all(name in step["properties"] for step in steps)]
    rows = (
        [f"`{name}`", steps[0]["properties"][name].get("description") or "What the step does."]
        for name in ("type", *(one for one in shared if one != "type"))
    )
    return _table(("field", "what it says"), rows)


def _inputs() -> str:
    types = _schema()["$defs"]["input"]["properties"]["type"]["enum"]
    kinds = ", ".join(f"`{name}`" for name in types)
    keywords = ", ".join(f"`{name}`" for name in INPUT_KEYWORDS)
    return f"Types: {kinds}.\n\nKeywords of JSON Schema that may stand beside the type: {keywords}."


def _types() -> str:
    return "\n\n".join("\n".join(_one_type(kind)) for kind in step_types().values())


def _one_type(kind: StepType[Any]) -> Iterator[str]:
    yield f"### `type: {kind.name}`"
    yield ""
    yield _fields(kind.params.model_json_schema())
    yield ""
    tries = kind.retry.max_attempts
    limit = f"{kind.timeout_s:g} s" if kind.timeout_s is not None else "none"
    yield f"Queue `{kind.queue}`. Tries without a `retry`: {tries}. `timeout` without one: {limit}."


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
        ["nesting of an expression", f"{expressions.MAX_NESTING} levels"],
        ["nesting of a value that an expression computes with", f"{expressions.MAX_DATA_NESTING} levels"],
        ["text that an expression builds", f"{expressions.MAX_TEXT:,} characters"],
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
    "types": _types,
    "functions": _functions,
    "limits": _limits,
    "errors": _errors,
    "settings": _settings,
}


if __name__ == "__main__":
    main()

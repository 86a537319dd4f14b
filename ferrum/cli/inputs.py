"""`--input k=v`, `--input k=@file` and `--input @file.json`: what a run is given."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ferrum.errors import InputError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from ferrum.workflow import Workflow


def read_inputs(workflow: Workflow, texts: Sequence[str]) -> dict[str, JsonValue]:
    """The input of a run from `name=value` and `@file.json`; where a name comes twice, the last one counts.

    A value `@file` is what is in the file, `@-` what comes through stdin, and `@@…` a text that begins with one `@`.
    What the workflow declares as a string stays as it is written, everything else is read as JSON. Raises `InputError`.
    """
    given: dict[str, JsonValue] = {}
    for text in texts:
        if text.startswith("@"):
            given |= input_file(text[1:])
            continue
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--input {text!r}: write name=value, name=@file, or @file.json")
        given[name] = _input_value(workflow, name, _written(name, value))
    return given


def input_file(name: str) -> dict[str, JsonValue]:
    try:
        value = json.loads(_read(name))
    except (ValueError, RecursionError) as error:
        raise InputError(f"--input @{name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"--input @{name}: the file has to hold a JSON object, of names to values")
    return value


def _written(name: str, value: str) -> str:
    if not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    try:
        return _read(value[1:])
    except InputError as error:
        raise InputError(f"{error}; a text that begins with '@' is written {f'{name}=@{value}'!r}") from error


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--input @{name}: the file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--input @{name}: the file is not UTF-8") from error


def _input_value(workflow: Workflow, name: str, text: str) -> JsonValue:
    spec = workflow.inputs.get(name)
    if spec is None or spec.type == "string":
        return text
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = {"array": ", such as [1, 2]", "object": ', such as {"a": 1}', "boolean": ": true or false"}
        raise InputError(
            f"input {name!r} has to be of type {spec.type}, written as JSON{hint.get(spec.type, '')}; got {text!r}"
        ) from error
    return value

"""Answers that must be JSON of a given shape: read strictly, and asked for once more where they are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from string import ascii_letters
from typing import Final, NoReturn

from jsonschema.exceptions import ValidationError
from pydantic import JsonValue

from ferrum import schemas
from ferrum.errors import OutputError
from ferrum.governance.acts import ModelCall
from ferrum.untrusted import Marks, noted

_FENCE: Final = "```"

#: How much of a value or of an answer a message quotes.
_QUOTED: Final = 200


def parse(text: str, schema: dict[str, JsonValue]) -> JsonValue:
    """The value that an answer's text is, by a JSON Schema (2020-12 where it does not say).

    The JSON may stand in one fenced block with words around it. Raises `OutputError`, which says where and why: to be
    tried again where the answer is at fault, final where the schema is.
    """
    value = _value(text)
    try:
        schemas.check(schema)
    except schemas.SchemaFault as error:
        raise OutputError(f"output_schema is not a JSON Schema: {error}") from error
    try:
        wrong = schemas.worst(schemas.errors(schema, value))
    except schemas.SchemaFault as error:
        raise OutputError(f"output_schema {str(error).removeprefix('it ')}") from error
    except schemas.TooCostly as error:
        raise OutputError(f"the answer cannot be held against output_schema: {error}", retry=True) from error
    if wrong is not None:
        raise OutputError(f"the answer breaks output_schema at {wrong.json_path}: {_reason(wrong)}", retry=True)
    return value


def instructions(schema: dict[str, JsonValue]) -> str:
    """What to tell a model that cannot be held to a schema by its provider."""
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return (
        "Answer with one JSON value that satisfies this JSON Schema, and nothing else: no other words, no code fence.\n"
        f"{text}"
    )


def repair_messages(call: ModelCall, reply_text: str, error: OutputError, marks: Marks) -> ModelCall:
    """The call that shows a model its answer, says what is wrong with it, and asks for a right one.

    Parts of the answer that are quoted may be somebody else's words by now, and they stand in a user's message: marked.
    """
    said: list[dict[str, JsonValue]] = []
    # Providers refuse an empty answer in a conversation.
    if reply_text.strip():
        said.append({"role": "assistant", "content": reply_text})
    wanted = "Answer again, with the whole corrected JSON value and nothing else."
    wrong = marks.marked(error.message, "answer")
    said.append({"role": "user", "content": noted(f"That answer cannot be used: {wrong}. {wanted}")})
    return call.model_copy(update={"messages": (*call.messages, *said)})


def _value(text: str) -> JsonValue:
    try:
        return _read(text)
    except OutputError:
        blocks = list(islice(_fenced(text), 2))
        if len(blocks) != 1:
            raise
    return _read(blocks[0])


def _fenced(text: str) -> Iterator[str]:
    """Fenced blocks, as models write them around JSON even when they are asked not to."""
    at = 0
    while (start := text.find(_FENCE, at)) >= 0 and (end := text.find(_FENCE, start + len(_FENCE))) >= 0:
        inside = text[start + len(_FENCE) : end].lstrip(ascii_letters)
        if "\n" in inside[: len(inside) - len(inside.lstrip())]:
            yield inside.strip()
            at = end + len(_FENCE)
        else:
            at = start + 1


def _read(text: str) -> JsonValue:
    try:
        value: JsonValue = json.loads(text, parse_constant=_no_constant)
        # A lone surrogate is legal in JSON's escapes and cannot be written as UTF-8.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise OutputError(f"the answer is not JSON: {where}, in {_quoted(text)}", retry=True) from error
    except (ValueError, RecursionError) as error:
        raise OutputError(
            f"the answer is not JSON that can be kept: {error}, in {_quoted(text)}", retry=True
        ) from error
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _reason(error: ValidationError) -> str:
    if len(error.message) <= 2 * _QUOTED:
        return error.message
    # jsonschema quotes the whole value first, so that the rule is what a cut would lose.
    rule = json.dumps({error.validator: error.validator_value}, ensure_ascii=False, default=str)
    return f"{_quoted(error.message)} breaks {rule[: 2 * _QUOTED]}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + "…")

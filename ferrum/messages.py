"""The messages that a worker takes: their limits, and the checks before kombu or Celery sees one. Pure.

Anybody who can push to Redis can push anything, and kombu and Celery trust what they read: a header of the wrong type
ends the process, and the message goes back to its queue for the next one. So nothing is handed on as it came. A message
is read here, checked, and made anew from what was checked; a header or property that is not named here does not reach
Celery at all.

Reading is linear in the size of the message, and the limits hold before the JSON parser runs: it recurses into what is
nested and is quadratic in the digits of a number.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Any, Final, NoReturn

from ferrum.errors import did_you_mean

#: Longest text of a message as it stands in the queue, in bytes.
MAX_BYTES: Final = 16 * 1024 * 1024
#: Deepest nesting of a value in it.
MAX_DEPTH: Final = 100
#: The most commas and opening brackets in it, outside of texts.
MAX_VALUES: Final = 500_000
#: Longest run of digits in a number.
MAX_DIGITS: Final = 300
#: Longest id of a message, and of what else it names.
MAX_ID: Final = 255
#: Longest id of a step: its names, and those of what it is inside of.
MAX_STEP_ID: Final = 4_000
#: A `ferrum.run` that was delivered so often without an answer is not delivered again.
MAX_DELIVERIES: Final = 9
#: A message is not held by a worker for longer than this before it is begun.
_LONGEST_WAIT: Final = timedelta(days=1)
#: Longest sentence about what is wrong.
_MAX_REASON: Final = 500

RUN: Final = "ferrum.run"
#: What `ferrum.run` takes, in this order where they come by place.
ARGUMENTS: Final = ("workflow", "input", "key", "priority", "tenant")

#: Texts of a JSON text; the last one may have no end. Possessive, and it matches at every quote: never tried twice.
_TEXTS: Final = re.compile(r'"(?:[^"\\]++|\\.|\\\Z)*+(?:"|\Z)', re.DOTALL)
_STEP: Final = tuple({"[": 1, "{": 1, "]": -1, "}": -1}.get(chr(byte), 0) for byte in range(256))
_NO_BRACKETS: Final = bytes(byte for byte in range(256) if not _STEP[byte])
_ZEROS: Final = bytes.maketrans(b"123456789", b"000000000")
_EXPONENT: Final = re.compile(r"[0-9][eE]")

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,200}", re.ASCII)
_RUN_ID: Final = re.compile(r"run_[0-9A-HJKMNP-TV-Z]{26}", re.ASCII)
_STEP_ID: Final = re.compile(rf"[A-Za-z0-9_.]{{1,{MAX_STEP_ID}}}", re.ASCII)
_STEPS_TASK: Final = re.compile(rf"({_RUN_ID.pattern})\.({_STEP_ID.pattern})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Refused:
    """A message that is not taken."""

    #: Why, in one sentence that holds nothing a terminal would obey.
    reason: str
    task: str | None = None
    #: The id of the message, where it has one that can be shown.
    id: str | None = None
    #: Whether its sender may wait for an answer under its id.
    answered: bool = False


#: One of which not even the beginning is looked at.
TOO_LONG: Final = Refused(f"the message has more than {MAX_BYTES:,} bytes")


class _Wrong(Exception):
    """A message is wrong; raised while it is read."""


def read(text: str, queue: str, tasks: Collection[str]) -> dict[str, Any] | Refused:
    """The message that stands in a queue as this text, as kombu and Celery may have it, or why they may not.

    `tasks` are the names that run on ferrum's queues. The message counts how often it was read, in its properties.
    """
    try:
        message = _parsed(text, "the message")
    except _Wrong as wrong:
        return _refused(wrong)
    return checked(message, queue, tasks)


def checked(message: object, queue: str, tasks: Collection[str]) -> dict[str, Any] | Refused:
    """As `read`, of a message that was parsed."""
    try:
        return _made_anew(message, queue, tasks)
    except _Wrong as wrong:
        headers = message.get("headers") if isinstance(message, dict) else None
        return _refused(wrong, headers if isinstance(headers, dict) else {}, tasks)


def decoded(raw: bytes) -> str | Refused:
    """The text that these bytes are."""
    try:
        return raw.decode() if len(raw) <= MAX_BYTES else TOO_LONG
    except UnicodeDecodeError:
        return Refused("it is not text in UTF-8")


def step_of(task_id: str) -> tuple[str, str] | None:
    """The run and the step that have this id as a Celery task; `None` where it is no step's."""
    found = _STEPS_TASK.fullmatch(task_id)
    return None if found is None else (found[1], found[2])


def is_run_id(text: str) -> bool:
    """Tell whether a run may have this id."""
    return _RUN_ID.fullmatch(text) is not None


def is_message_id(text: str) -> bool:
    """Tell whether a `ferrum.run` message may have this id."""
    return _ID[1](text)


def control(text: str) -> dict[str, Any] | Refused:
    """A message of `celery control` and `celery inspect`, as the worker's mailbox may have it, or why it may not."""
    try:
        envelope, headers, properties = _envelope(_parsed(text, "the message"))
        body = _body(envelope, properties)
        _check_control(body)
        clock = _given(headers, "clock", "headers.", _count(2**53))
    except _Wrong as wrong:
        return _refused(wrong)
    return _envelope_of(envelope, {"clock": clock or 0}, properties, "")


def other(text: str) -> dict[str, Any] | Refused:
    """A message that calls no task: an answer of a worker, an event."""
    try:
        envelope, headers, properties = _envelope(_parsed(text, "the message"))
        _body(envelope, properties)
        if headers.get("compression") is not None:
            raise _Wrong("headers.compression: compressed messages are not taken")
        return _envelope_of(envelope, headers, properties, "")
    except _Wrong as wrong:
        return _refused(wrong)


def failed(message: Mapping[str, Any], error: Exception, tasks: Collection[str]) -> Refused:
    """A message that was read and then could not be received."""
    wrong = _Wrong(f"it could not be received: {type(error).__name__}: {error}")
    return _refused(wrong, message["headers"], tasks)


def delivered_again(text: str, *, counted: bool = True) -> str:
    """A message that goes back to its queue, marked as that; what is no message stays as it is.

    It is `counted` where its worker is gone: one that lives may put it back often, as its connection was cut.
    """

    def mark(message: dict[str, Any]) -> None:
        info = message["properties"]["delivery_info"]
        info["redelivered"] = True
        if counted:
            times = info.get("deliveries", 1)
            info["deliveries"] = times + 1 if type(times) is int and 0 < times < 10**6 else 2

    return _changed(text, mark)


def renewed(text: str) -> str:
    """A message that was refused, to be tried once more: its deliveries are counted from the start."""
    return _changed(text, lambda message: message["properties"]["delivery_info"].pop("deliveries", None))


def _changed(text: str, change: Callable[[dict[str, Any]], object]) -> str:
    try:
        message = _parsed(text, "the message")
        change(message)
    except (_Wrong, AttributeError, KeyError, TypeError):
        return text
    return json.dumps(message)


def arguments(given: Sequence[object], named: Mapping[str, object]) -> dict[str, Any] | str:
    """Return the arguments of a `ferrum.run`, by name, or a sentence on what is wrong with them."""
    try:
        return _arguments(given, named)
    except _Wrong as wrong:
        return str(wrong)


# Reading.


def _parsed(text: str, what: str) -> Any:
    """The value that a JSON text says. Raises `_Wrong`."""
    if len(text) > MAX_BYTES:
        raise _Wrong(f"{what} has more than {MAX_BYTES:,} bytes")
    bare = _TEXTS.sub('"', text)
    _check_size(bare, what)
    # Escapes may spell what is looked for.
    odd = "\\u" in text or "__type__" in text
    try:
        value = (_READ_ODD if odd else _READ).decode(text)
        if "\\u" in text or _EXPONENT.search(bare):
            # Half a surrogate pair, or a number beyond all numbers, is read and can never be written.
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise _Wrong(f"{what} holds a text with half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"{what} is not JSON: {error}") from None
    return value


def _check_size(bare: str, what: str) -> None:
    """Raise `_Wrong` for more than the parser should see; `bare` is the JSON text without its texts."""
    opened = bare.count("[") + bare.count("{")
    if opened + bare.count(",") > MAX_VALUES:
        raise _Wrong(f"{what} has more than {MAX_VALUES:,} values")
    raw = bare.encode(errors="replace")
    if opened > MAX_DEPTH and max(accumulate(map(_STEP.__getitem__, raw.translate(None, _NO_BRACKETS)))) > MAX_DEPTH:
        raise _Wrong(f"{what} is nested more than {MAX_DEPTH} deep")
    if b"0" * (MAX_DIGITS + 1) in raw.translate(_ZEROS):
        raise _Wrong(f"{what} has a number of more than {MAX_DIGITS} digits")


def _no_constant(name: str) -> NoReturn:
    raise _Wrong(f"{name} is not JSON")


def _no_python_value(value: dict[str, Any]) -> dict[str, Any]:
    if value.keys() == {"__type__", "__value__"}:
        raise _Wrong(f"it holds a value of Python's own, {_quoted(value['__type__'])}: give dates and decimals as text")
    return value


_READ: Final = json.JSONDecoder(parse_constant=_no_constant)
_READ_ODD: Final = json.JSONDecoder(parse_constant=_no_constant, object_hook=_no_python_value)


# Checking.


def _made_anew(message: object, queue: str, tasks: Collection[str]) -> dict[str, Any]:
    envelope, headers, properties = _envelope(message)
    if headers.get("compression") is not None:
        raise _Wrong("headers.compression: compressed messages are not taken, a large input goes as an artifact")
    task, id_ = _named(headers)
    ours = queue == "ferrum" or queue.startswith("ferrum.")
    if ours and task not in tasks:
        raise _Wrong(f"there is no task {_quoted(task)} for ferrum's queues{did_you_mean(task, tasks)}")
    body = _body(envelope, properties)
    shown = _check_call(body, task, id_, ours=ours)
    deliveries = _given(properties["delivery_info"], "deliveries", "properties.delivery_info.", _count(10**6)) or 1
    if task == RUN and deliveries > MAX_DELIVERIES:
        raise _Wrong(f"it was delivered {MAX_DELIVERIES} times and never answered: it may end the workers that take it")
    return _envelope_of(
        envelope,
        {
            **{name: _given(headers, name, "headers.", kind) for name, kind in _HEADERS.items()},
            # What a step waits for is in its record; of a message that waits the record knows nothing.
            **{name: _time(headers, name) if task == RUN else None for name in ("eta", "expires")},
            "task": task,
            "id": id_,
            "argsrepr": shown,
            "kwargsrepr": "{}" if not body[1] else "{…}",
        },
        properties,
        queue,
    )


def _named(headers: Mapping[str, Any]) -> tuple[str, str]:
    """The task of a message and its id. Raises `_Wrong`."""
    task, id_ = headers.get("task"), headers.get("id")
    if not isinstance(task, str) or not _NAME.fullmatch(task):
        raise _Wrong("headers.task is missing, or not the name of a task")
    kind = _ID if task == RUN else _OTHER_ID
    if not isinstance(id_, str) or not kind[1](id_):
        raise _Wrong(f"headers.id is missing, or not {_ID[0]}")
    return task, id_


def _envelope(message: object) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A message, its headers and its properties. Raises `_Wrong`."""
    if not isinstance(message, dict):
        raise _Wrong("it is not a JSON object")
    headers, properties = message.get("headers"), message.get("properties")
    if not isinstance(headers, dict) or not isinstance(message.get("body"), str):
        raise _Wrong("its headers are no object, or its body is no text")
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_tag"), str):
        raise _Wrong("it has no properties.delivery_tag")
    info = properties.get("delivery_info")
    if not isinstance(info, dict) or not all(isinstance(info.get(name), str) for name in ("exchange", "routing_key")):
        raise _Wrong("it has no properties.delivery_info with exchange and routing_key")
    if message.get("content-type") != "application/json":
        raise _Wrong("its content-type is not application/json")
    encoding = message.get("content-encoding", "utf-8")
    if not isinstance(encoding, str) or encoding.lower() not in ("utf-8", "utf8", "us-ascii", "binary"):
        raise _Wrong("its content-encoding is not utf-8")
    return message, headers, properties


def _envelope_of(
    message: Mapping[str, Any], headers: Mapping[str, Any], properties: Mapping[str, Any], queue: str
) -> dict[str, Any]:
    """A message made of what was checked, that goes back to its own queue when it is given back."""
    info = properties["delivery_info"]
    return {
        "body": message["body"],
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {name: value for name, value in headers.items() if value is not None},
        "properties": {
            **{name: _given(properties, name, "properties.", kind) for name, kind in _PROPERTIES.items()},
            "body_encoding": _base64(properties),
            "delivery_tag": properties["delivery_tag"],
            "delivery_info": {
                "exchange": "",
                "routing_key": queue,
                "redelivered": info.get("redelivered") is True,
                "deliveries": _given(info, "deliveries", "properties.delivery_info.", _count(10**6)) or 1,
            },
        },
    }


def _base64(properties: Mapping[str, Any]) -> str | None:
    encoding = properties.get("body_encoding")
    if encoding not in (None, "base64", "utf-8"):
        raise _Wrong("its body is not encoded as properties.body_encoding says, which is base64 or not there")
    return None if encoding is None else str(encoding)


def _body(message: Mapping[str, Any], properties: Mapping[str, Any]) -> Any:
    """The value of a message's body. Raises `_Wrong`."""
    text: str = message["body"]
    if _base64(properties) == "base64":
        try:
            text = base64.b64decode(text).decode()
        except ValueError:
            raise _Wrong("its body is not the base64 of a text in utf-8") from None
    return _parsed(text, "the body")


def _check_call(body: object, task: str, id_: str, *, ours: bool) -> str:
    """Raise `_Wrong` unless a task may be called so; what people see of its arguments."""
    if not isinstance(body, list) or [type(part) for part in body] != [list, dict, dict]:
        raise _Wrong("its body is not [[arguments…], {named arguments}, {}]")
    given, named, embedded = body
    if embedded.keys() - _EMBEDDED:
        # Celery makes attributes of the task's context of them.
        raise _Wrong(f"the third part of its body has more than {', '.join(sorted(_EMBEDDED))}")
    if not ours:
        return "(…)"
    if task == RUN:
        if any(embedded[name] not in (None, []) for name in embedded):
            raise _Wrong("its body links other tasks to it: callbacks, errbacks, chain and chord are not taken")
        if "self" in named:
            # What Celery calls the task by.
            raise _Wrong("'self' is not known: ferrum.run takes workflow, input, key, priority and tenant")
        return "(…)" if given else "()"
    if named or len(given) != 2 or not _is_step(*given):
        raise _Wrong("its arguments are not the ids of a run and of a step in it")
    if id_ != f"{given[0]}.{given[1]}":
        raise _Wrong("headers.id is not the id of the run, '.' and the id of the step")
    _check_embedded(embedded)
    return f"('{given[0]}', '{given[1]}')"


def _arguments(given: Sequence[object], named: Mapping[str, object]) -> dict[str, Any]:
    takes = f"{RUN} takes {', '.join(ARGUMENTS[:-1])} and {ARGUMENTS[-1]}"
    if len(given) > len(ARGUMENTS):
        raise _Wrong(f"{len(given)} arguments are too many: {takes}")
    found = dict(zip(ARGUMENTS, given, strict=False))
    if twice := found.keys() & named.keys():
        raise _Wrong(f"{', '.join(map(_quoted, sorted(twice)))} is given twice, by place and by name")
    if unknown := sorted(named.keys() - set(ARGUMENTS)):
        raise _Wrong(f"{', '.join(map(_quoted, unknown))} is not known{did_you_mean(unknown[0], ARGUMENTS)}: {takes}")
    found |= named
    if found.get("workflow") is None:
        raise _Wrong(f"'workflow' is missing: {takes}")
    for name, kind in _ARGUMENTS.items():
        _given(found, name, "the argument ", kind)
    return found


def _check_control(body: object) -> None:
    if not isinstance(body, dict) or not isinstance(body.get("method"), str):
        raise _Wrong("its body is no object with a method")
    if unknown := body.keys() - {"method", *_CONTROL}:
        raise _Wrong(f"{_quoted(min(unknown))} is not known of control messages")
    for name, kind in _CONTROL.items():
        _given(body, name, "", kind)
    if body.get("matcher") not in (None, "glob"):
        # A regular expression of somebody else's would run where the heartbeat does.
        raise _Wrong("workers are matched by a glob pattern, or named by destination")


def _check_embedded(embedded: Mapping[str, Any]) -> None:
    """Raise `_Wrong` for a canvas that is not made of steps."""
    if any(embedded.get(name) not in (None, []) for name in ("callbacks", "errbacks")):
        raise _Wrong("its body has callbacks or errbacks, which no step has")
    for signature in _list(embedded, "chain"):
        _check_signature(signature)
    if (chord := embedded.get("chord")) is not None:
        _check_signature(chord)


def _check_signature(signature: object) -> None:
    """Raise `_Wrong` unless this is a step, or a chain, group or chord of steps."""
    if not isinstance(signature, dict) or signature.keys() - _SIGNATURE:
        raise _Wrong("its canvas holds what is no signature")
    task, kind, options = signature.get("task"), signature.get("subtask_type"), signature.get("options")
    given, named = signature.get("args"), signature.get("kwargs")
    if not isinstance(given, list) or not isinstance(named, dict) or not isinstance(options, dict):
        raise _Wrong("a signature of its canvas has no args, kwargs or options")
    _check_options(options)
    _given(signature, "chord_size", "signature.", _count(10**6))
    if kind is None and isinstance(task, str) and task.startswith("ferrum.") and task != RUN:
        if named or len(given) != 2 or not _is_step(*given):
            raise _Wrong("a step of its canvas is not called with the ids of a run and of a step in it")
    elif isinstance(kind, str) and kind in _PARTS and task == f"celery.{kind}" and not given:
        if named.keys() - _PARTS[kind] or named.get("kwargs"):
            raise _Wrong("a part of its canvas has arguments that ferrum's have not")
        for part in _parts(kind, named):
            _check_signature(part)
    else:
        raise _Wrong("its canvas holds a task that is no step of ferrum's")


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is None:
            continue
        if name == "chord":
            _check_signature(value)
        elif name == "chain":
            for part in _list(options, name):
                _check_signature(part)
        elif (kind := _OPTIONS.get(name)) is None or not kind[1](value):
            raise _Wrong(f"a signature of its canvas has an option {_quoted(name)} that no step has")


def _parts(kind: str, named: Mapping[str, Any]) -> list[Any]:
    """Return the parts of a chain, a group or a chord."""
    if kind != "chord":
        return _list(named, "tasks")
    header = named.get("header")
    # A group, or its members.
    return [*([header] if isinstance(header, dict) else _list(named, "header")), named.get("body")]


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    value = values.get(name)
    if value is not None and not isinstance(value, list):
        raise _Wrong(f"{name} is no list")
    return value or []


# Kinds of values: how a sentence calls one, and whether a value is of it.

_Kind = tuple[str, Callable[[Any], bool]]


def _text(longest: int) -> _Kind:
    # What is not printable steers a terminal or turns the writing around; surrogates cannot even be written.
    return (
        f"text of 1 to {longest} printable characters",
        lambda value: isinstance(value, str) and 0 < len(value) <= longest and value.isprintable(),
    )


def _count(most: int) -> _Kind:
    return f"a whole number from 0 to {most}", lambda value: type(value) is int and 0 <= value <= most


def _of(kind: type) -> _Kind:
    return f"a JSON {_JSON_NAMES[kind]}", lambda value: isinstance(value, kind)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text(MAX_ID)[1], value))


def _address(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"exchange", "routing_key"}
        and all(map(_text(MAX_ID)[1], value.values()))
    )


_JSON_NAMES: Final[Mapping[type, str]] = {bool: "boolean", dict: "object"}
_ID: Final = _text(MAX_ID)
#: What other messages are called: steps as well.
_OTHER_ID: Final = _text(MAX_STEP_ID + MAX_ID)
_BOOLEAN: Final = _of(bool)
_OBJECT: Final = _of(dict)
_TIME: Final = "a time such as 2030-01-31T12:00:00+00:00, from this century"

#: Headers that are handed on, besides those that are checked on their own. All others are left out: Celery would take a
#: header for an attribute of the task's context, whatever it is called.
_HEADERS: Final[Mapping[str, _Kind]] = {
    "lang": _ID,
    "origin": _ID,
    "root_id": _OTHER_ID,
    "parent_id": _OTHER_ID,
    "group": _OTHER_ID,
    "group_index": _count(10**6),
    "retries": _count(10**6),
    "replaced_task_nesting": _count(1000),
    "ignore_result": _BOOLEAN,
    # W3C Trace Context and Baggage.
    "traceparent": _ID,
    "tracestate": _text(8192),
    "baggage": _text(8192),
}
_PROPERTIES: Final[Mapping[str, _Kind]] = {
    "correlation_id": _OTHER_ID,
    "reply_to": _OTHER_ID,
    "delivery_mode": _count(2),
    "priority": _count(9),
}
_ARGUMENTS: Final[Mapping[str, _Kind]] = {
    "workflow": _OBJECT,
    "input": _OBJECT,
    "key": _text(1000),
    "priority": _count(9),
    "tenant": _text(100),
}
_CONTROL: Final[Mapping[str, _Kind]] = {
    "arguments": _OBJECT,
    "destination": ("a list of names", _texts),
    "pattern": _ID,
    "matcher": _ID,
    "ticket": _ID,
    "reply_to": ("an object of exchange and routing_key", _address),
}
#: What may stand beside the arguments.
_EMBEDDED: Final = frozenset({"callbacks", "chain", "chord", "errbacks"})
_SIGNATURE: Final = frozenset({"task", "args", "kwargs", "options", "subtask_type", "immutable", "chord_size"})
#: What the parts of a canvas are called with.
_PARTS: Final[Mapping[str, frozenset[str]]] = {
    "chain": frozenset({"tasks"}),
    "group": frozenset({"tasks"}),
    "chord": frozenset({"header", "body", "kwargs"}),
}
_OPTIONS: Final[Mapping[str, _Kind]] = {
    "task_id": _OTHER_ID,
    "group_id": _OTHER_ID,
    "root_id": _OTHER_ID,
    "parent_id": _OTHER_ID,
    "reply_to": _OTHER_ID,
    "group_index": _count(10**6),
    "priority": _count(9),
}


def _given(values: Mapping[str, Any], name: str, where: str, kind: _Kind) -> Any:
    """The value of this name, or `None` where there is none. Raises `_Wrong` where it is not of its kind."""
    value = values.get(name)
    if value is not None and not kind[1](value):
        raise _Wrong(f"{where}{name} is not {kind[0]}")
    return value


def _time(headers: Mapping[str, Any], name: str) -> str | None:
    value = headers.get(name)
    if value is None:
        return None
    try:
        at = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise _Wrong(f"headers.{name} is not {_TIME}") from None
    if not 2000 <= at.year < 2100:
        raise _Wrong(f"headers.{name} is not {_TIME}")
    # A worker holds it until then.
    if name == "eta" and at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC) > _LONGEST_WAIT:
        raise _Wrong("headers.eta is more than a day from now: use a schedule, or a step that waits")
    return at.isoformat()


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_id(value: object) -> bool:
    return _OTHER_ID[1](value)


def _is_step(run_id: object, step_id: object) -> bool:
    return (
        isinstance(run_id, str)
        and isinstance(step_id, str)
        and _RUN_ID.fullmatch(run_id) is not None
        and _STEP_ID.fullmatch(step_id) is not None
    )


# Saying.


def _refused(wrong: _Wrong, headers: Mapping[str, Any] | None = None, tasks: Collection[str] = ()) -> Refused:
    said = str(wrong)
    reason = said if len(said) <= _MAX_REASON else f"{said[: _MAX_REASON - 1]}…"
    printable = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in reason)
    headers = headers or {}
    task, id_ = headers.get("task"), headers.get("id")
    task, id_ = task if _is_name(task) else None, id_ if _is_id(id_) else None
    waits = id_ is not None and (task == RUN or task not in tasks) and headers.get("ignore_result") is not True
    return Refused(printable, task, id_, answered=waits)


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"

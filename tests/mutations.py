"""Messages as nobody should send them: seeded mutations of good ones."""

from __future__ import annotations

import base64
import json
import random
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

#: What kombu and Celery read of a message, and some that they do not.
HEADERS = (
    *("task", "id", "root_id", "parent_id", "group", "group_index", "timelimit", "eta", "expires", "retries", "lang"),
    *("origin", "shadow", "argsrepr", "kwargsrepr", "ignore_result", "replaced_task_nesting", "stamped_headers"),
    *("stamps", "compression", "redelivered", "clock", "meth", "taskset", "chain", "chord", "callbacks", "errbacks"),
    *("headers", "properties", "args", "kwargs", "delivery_info", "get", "update", "_children", "utc", "groups"),
)
PROPERTIES = (
    *("correlation_id", "reply_to", "delivery_mode", "delivery_tag", "delivery_info", "body_encoding", "priority"),
    *("deliveries", "headers", "expiration", "message_id", "content_type"),
)
TOP = ("body", "content-type", "content-encoding", "headers", "properties", "redelivered", "errors")
EMBEDDED = ("callbacks", "errbacks", "chain", "chord", "timelimit", "id", "args", "x")


@cache
def _compressed() -> bytes:
    """A few kilobytes that would be megabytes."""
    return zlib.compress(b"[" + b" " * 50_000_000 + b"]", 9)


#: Another app's task, as it may stand in a canvas.
FOREIGN = {"task": "user.echo", "args": [1], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": True}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


#: Values of each type, and such as are hard to read, to keep or to show.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 1.5, 2**63, 10**30, 10**400, -(10**299), 1e300),
    *("", "x", "0", "tomorrow", "9999-12-31T23:59:59", "0001-01-01T00:00:00+14:00", "2030-01-01", "base64", "pickle"),
    *("\ud800", "\x1b]52;c;aGk=\x07", "\u202etxt.exe", "a\nb\r\x00c", "é" * 300, "A" * 70_000, "\U0001f600"),
    *([], [[]], [None, None], [1], ["x", 2], {}, {"a": 1}, {"x": {"y": []}}, deep(60), deep(150), list(range(2000))),
    *({"__type__": "bytes", "__value__": 5}, {"__type__": "datetime", "__value__": "2030-01-01"}, [FOREIGN], FOREIGN),
    *({"exchange": [], "routing_key": {}}, {"exchange": "no", "routing_key": "where"}, "celery.map", "user.echo"),
)


def mutations(make: Callable[[], dict[str, Any]], body: list[Any], seed: int, count: int) -> Iterator[str]:
    """So many texts, each a message gone wrong in one way or two; the same for the same seed.

    `make` gives a good message, whose body is `body`.
    """
    random_ = random.Random(seed)
    kinds = (_header, _header, _property, _top, _argument, _embedded, _raw, _encoding, _bomb)
    for _ in range(count):
        message, call = make(), json.loads(json.dumps(body))
        text: str | None = None
        for kind in random_.choices(kinds, k=random_.choice((1, 1, 1, 2))):
            text = kind(random_, message, call) or text
        yield text if text is not None else _dumped(message)


def _dumped(message: dict[str, Any]) -> str:
    try:
        return json.dumps(message)
    except RecursionError:
        return "[" * 5000


def _header(random_: random.Random, message: dict[str, Any], _: list[Any]) -> None:
    if isinstance(headers := message.get("headers"), dict):
        headers[random_.choice(HEADERS)] = random_.choice(VALUES)


def _property(random_: random.Random, message: dict[str, Any], _: list[Any]) -> None:
    if isinstance(properties := message.get("properties"), dict):
        properties[random_.choice(PROPERTIES)] = random_.choice(VALUES)


def _top(random_: random.Random, message: dict[str, Any], _: list[Any]) -> None:
    name = random_.choice(TOP)
    if random_.random() < 0.3:
        message.pop(name, None)
    else:
        message[name] = random_.choice(VALUES)


def _argument(random_: random.Random, message: dict[str, Any], call: list[Any]) -> None:
    if [type(part) for part in call] != [list, dict, dict]:
        # The mutation before this one has been here.
        return
    given, named, _ = call
    value = random_.choice(VALUES)
    how = random_.randrange(5)
    if how == 0:
        given.append(value)
    elif how == 1 and given:
        given[random_.randrange(len(given))] = value
    elif how == 2:
        named[random_.choice(("workflow", "input", "key", "priority", "tenant", "self", "args", "x"))] = value
    elif how == 3:
        call[random_.randrange(3)] = value
    else:
        call.append(value)
    _put(message, json.dumps(call).encode())


def _embedded(random_: random.Random, message: dict[str, Any], call: list[Any]) -> None:
    if isinstance(call[-1], dict):
        call[-1][random_.choice(EMBEDDED)] = random_.choice((*VALUES, [FOREIGN], FOREIGN))
    _put(message, json.dumps(call).encode())


def _raw(random_: random.Random, message: dict[str, Any], _: list[Any]) -> str:
    text = _dumped(message)
    how, place = random_.randrange(6), random_.randrange(len(text))
    if how == 0:
        return text[:place]
    if how == 1:
        return text[:place] + random_.choice(("\x00", '"', "{", "}", "\\", ",", "1", "\\ud800", "NaN")) + text[place:]
    if how == 2:
        return text.replace('"', random_.choice(("'", '""')), random_.randrange(9))
    if how == 3:
        return random_.choice(("[", '{"a":', "[{},")) * random_.choice((101, 3_000, 100_000))
    if how == 4:
        return text.replace("null", random_.choice(("1" * 5000, "-" + "9" * 301, "1e999", "Infinity", "01")), 1)
    return json.dumps(random_.choice(VALUES))


def _encoding(random_: random.Random, message: dict[str, Any], call: list[Any]) -> None:
    text = json.dumps(call)
    kind = random_.randrange(7)
    if kind == 0:
        _put(message, text.encode("utf-16"))
    elif kind == 1:
        _put(message, b"\xff\xfe" + text.encode())
    elif kind == 2:
        _put(message, random_.choice(("[", '{"a":')).encode() * random_.choice((3_000, 100_000)))
    elif kind == 3:
        _put(message, text.replace("{}", "1" * 5000, 1).encode())
    elif kind == 4:
        _put(message, text.replace("{}", random_.choice(("NaN", "1e999", '"\\ud800"')), 1).encode())
    elif kind == 5:
        message["body"] = text[random_.randrange(len(text)) :]
    else:
        message["body"] = random_.choice(("", "====", "AAA", text + text))


def _bomb(random_: random.Random, message: dict[str, Any], _: list[Any]) -> None:
    _put(message, _compressed())
    if isinstance(headers := message.get("headers"), dict):
        headers["compression"] = random_.choice(("application/x-gzip", "zlib", "application/x-lzma", "nothing"))


def _put(message: dict[str, Any], body: bytes) -> None:
    message["body"] = base64.b64encode(body).decode()
    if isinstance(properties := message.get("properties"), dict):
        properties["body_encoding"] = "base64"

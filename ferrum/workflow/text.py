"""Text in, plain JSON values out, with the line and column of every key and value.

YAML is read as YAML 1.2 (core schema): only `true` and `false` are booleans, so `on`, `yes` and `no` are texts, as are
dates and `12:30`. JSON is read as JSON, strictly.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

import yaml
from pydantic import JsonValue

from ferrum.errors import Problem, WorkflowError

#: Largest file, in bytes.
MAX_BYTES: Final = 1_000_000
#: Deepest nesting of a value.
MAX_DEPTH: Final = 64
#: Most values in one file, aliases written out.
MAX_VALUES: Final = 100_000

Format: TypeAlias = Literal["yaml", "json"]
#: The way to a part of a value: keys and indexes.
Where: TypeAlias = tuple[str | int, ...]
_Spot: TypeAlias = tuple[int, int]

_Loader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of a value stand in the file that it was read from; empty for a value made in Python."""

    source: str = ""
    keys: Mapping[Where, _Spot] = field(default_factory=dict)
    values: Mapping[Where, _Spot] = field(default_factory=dict)
    #: What is scalar: pointed at itself, where a list or a mapping is pointed at by its key.
    scalars: frozenset[Where] = frozenset()
    #: The parts that were read from other files, which stand there instead of a `file`.
    files: Mapping[Where, Places] = field(default_factory=dict)
    #: The part that problems are told the places of from here on.
    base: Where = ()

    def below(self, *where: str | int) -> Places:
        """The same for one part: what `problem` is told is then where in it."""
        return replace(self, base=(*self.base, *where))

    def problem(self, message: str, *where: str | int, key: bool = False) -> Problem:
        """A problem with what stands at `where`, or with its key.

        What is not there is pointed at by the nearest part around it that is. What is in another file is pointed at
        there, in a problem with the `file` that names it.
        """
        where = (*self.base, *where)
        for length in range(1, len(where) + 1) if self.files else ():
            if inner := self.files.get(where[:length]):
                found = inner.problem(message, *where[length:], key=key)
                where, key = (*where[: length - 1], "file"), False
                message = str(WorkflowError([found], inner.source))
                break
        line, column = self._spot(where, key)
        return Problem(message, path_text(where), line, column)

    def _spot(self, where: Where, key: bool) -> _Spot:
        while where and where not in self.values:
            where, key = where[:-1], False
        at_key = key or where not in self.scalars
        return (self.keys.get(where) if at_key else None) or self.values.get(where, (0, 0))


def path_text(where: Sequence[str | int]) -> str:
    """A path as an author reads it: `steps.fix.needs[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")


def read(text: str, source: str = "", format: Format | None = None) -> tuple[JsonValue, Places]:
    """The value that a text holds, and where its parts stand.

    Without a `format` the name of the source tells (`.json`, `.yaml`); else a text that is JSON is read as JSON.
    Raises `WorkflowError` with everything that keeps it from being a plain JSON value.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _failed(source, "there is half a character (a lone surrogate)", _spot_of(text, error.start)) from error
    if size > MAX_BYTES:
        raise _failed(source, f"the file has {size} bytes, more than {MAX_BYTES}")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise _failed(source, "the file is empty")
    kind = format or _format(text, source)
    return _unfold(_json(text, source) if kind == "json" else _yaml(text, source), source)


def plain(value: object) -> JsonValue:
    """A value made in Python as plain JSON: tuples as lists. Raises `WorkflowError` for what JSON cannot say."""
    try:
        return _copied(value, iter(range(MAX_VALUES)))
    except ValueError:
        # What is wrong, and where, is known to the long way.
        return _unfold(_python(value, 0), "")[0]


def _failed(source: str, message: str, spot: _Spot = (0, 0)) -> WorkflowError:
    return WorkflowError([Problem(message, "", *spot)], source)


def _format(text: str, source: str) -> Format:
    suffix = source.rpartition(".")[2].lower()
    if suffix == "json":
        return "json"
    if suffix in ("yaml", "yml") or text.lstrip()[:1] not in ("{", "["):
        return "yaml"
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return "yaml"
    return "json"


def _spot_of(text: str, offset: int) -> _Spot:
    before = text[:offset]
    return before.count("\n") + 1, offset - before.rfind("\n")


# Nodes: a value that knows where it stands


@dataclass(frozen=True, slots=True)
class _Node:
    value: str | int | float | bool | list[_Node] | list[tuple[_Node, _Node]] | None
    line: int = 0
    column: int = 0
    is_mapping: bool = False
    #: Why there is no such value; the value does not count then.
    problem: str | None = None


@dataclass(slots=True)
class _Unfolding:
    source: str
    count: int = 0
    problems: list[Problem] = field(default_factory=list)
    keys: dict[Where, _Spot] = field(default_factory=dict)
    values: dict[Where, _Spot] = field(default_factory=dict)
    scalars: set[Where] = field(default_factory=set)

    def add(self, node: _Node, where: Where) -> JsonValue:
        self.count += 1
        if self.count > MAX_VALUES:
            raise _failed(self.source, f"more than {MAX_VALUES} values, aliases written out", (node.line, node.column))
        if len(where) > MAX_DEPTH:
            raise _failed(self.source, f"nested deeper than {MAX_DEPTH} levels", (node.line, node.column))
        self.values[where] = node.line, node.column
        if node.is_mapping:
            return self._mapping(node.value, where)  # type: ignore[arg-type]
        if isinstance(node.value, list):
            return [self.add(item, (*where, index)) for index, item in enumerate(node.value)]  # type: ignore[arg-type]
        self.scalars.add(where)
        if reason := node.problem or _not_json(node.value):
            self._problem(reason, where, node)
        return node.value

    def _mapping(self, pairs: list[tuple[_Node, _Node]], where: Where) -> JsonValue:
        value: dict[str, JsonValue] = {}
        for key, node in pairs:
            name = key.value
            if not isinstance(name, str) or key.problem or _not_json(name):
                shown = "" if isinstance(name, list) else f', like "{json.dumps(name)}"'
                self._problem(key.problem or f"a key has to be text in quotes{shown}", where, key)
            elif name in value:
                self._problem(f"{name!r} is there twice", (*where, name), key)
            else:
                self.keys[(*where, name)] = key.line, key.column
                value[name] = self.add(node, (*where, name))
        return value

    def _problem(self, message: str, where: Where, node: _Node) -> None:
        self.problems.append(Problem(message, path_text(where), node.line, node.column))


def _unfold(root: _Node, source: str) -> tuple[JsonValue, Places]:
    unfolding = _Unfolding(source)
    value = unfolding.add(root, ())
    if unfolding.problems:
        raise WorkflowError(unfolding.problems, source)
    return value, Places(source, unfolding.keys, unfolding.values, frozenset(unfolding.scalars))


_HALF: Final = re.compile("[\ud800-\udfff]")


def _not_json(value: object) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    if isinstance(value, str) and _HALF.search(value):
        return "there is half a character (a lone surrogate)"
    return None


# YAML

_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_DECIMAL: Final = re.compile(r"[-+]?[0-9]+", re.ASCII)
_BASED: Final = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT: Final = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII
)


def _yaml(text: str, source: str) -> _Node:
    try:
        return _Composer(text, source).document()
    except yaml.reader.ReaderError as error:
        raise _failed(source, "a control character, which YAML does not allow", _bad_character(text)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        spot = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        reason = ", ".join(part for part in (error.problem, error.context) if part)
        raise _failed(source, f"not YAML: {reason}", spot) from error
    except ValueError as error:
        # PyYAML without libyaml passes an escape beyond Unicode straight to chr().
        raise _failed(source, f"not YAML: {error}") from error


def _bad_character(text: str) -> _Spot:
    match = re.search("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text)
    return _spot_of(text, match.start()) if match else (0, 0)


class _Composer:
    """Nodes from YAML's events; an alias is the node that it stands for."""

    def __init__(self, text: str, source: str) -> None:
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=_Loader)
        self._source = source
        self._anchors: dict[str, _Node] = {}

    def document(self) -> _Node:
        next(self._events)
        if isinstance(next(self._events), yaml.StreamEndEvent):
            raise _failed(self._source, "the file is empty")
        root = self._node(next(self._events), 0)
        next(self._events)
        after = next(self._events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise _failed(self._source, "a second document starts here; a file holds one workflow", _start(after))
        return root

    def _node(self, event: yaml.Event, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise _failed(self._source, f"nested deeper than {MAX_DEPTH} levels", _start(event))
        anchor = str(event.anchor) if isinstance(event, yaml.NodeEvent) and event.anchor else None
        if isinstance(event, yaml.AliasEvent):
            if anchor not in self._anchors:
                raise _failed(self._source, f"*{anchor}: no &{anchor} is complete before it", _start(event))
            return self._anchors[anchor]
        node = self._scalar(event) if isinstance(event, yaml.ScalarEvent) else self._collection(event, depth)
        if anchor:
            self._anchors[anchor] = node
        return node

    def _collection(self, event: yaml.Event, depth: int) -> _Node:
        items: list[_Node] = []
        while not isinstance(inner := next(self._events), yaml.CollectionEndEvent):
            items.append(self._node(inner, depth + 1))
        if isinstance(event, yaml.CollectionStartEvent) and event.tag:
            return _Node(None, *_start(event), problem=f"the tag {event.tag} is not supported")
        if isinstance(event, yaml.MappingStartEvent):
            return _Node(list(zip(items[::2], items[1::2], strict=True)), *_start(event), is_mapping=True)
        return _Node(items, *_start(event))

    def _scalar(self, event: yaml.ScalarEvent) -> _Node:
        if event.tag:
            return _Node(None, *_start(event), problem=f"the tag {event.tag} is not supported; quotes make a text")
        if event.style:
            return _Node(event.value, *_start(event))
        try:
            return _Node(_resolve(event.value), *_start(event))
        except ValueError:
            return _Node(None, *_start(event), problem="a number with too many digits")


def _start(event: yaml.Event) -> _Spot:
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (0, 0)


def _resolve(text: str) -> str | int | float | bool | None:
    """What a scalar without quotes means, by the core schema of YAML 1.2."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _DECIMAL.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".", "") if text[-1].isalpha() else text)
    return text


# JSON


def _json(text: str, source: str) -> _Node:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _failed(source, f"not JSON: {error.msg}", (error.lineno, error.colno)) from error
    except ValueError as error:
        # Python's own limit on the digits of a number, or one of JavaScript's constants.
        reason = "a number with too many digits" if "digits" in str(error) else str(error)
        raise _failed(source, f"not JSON: {reason}") from error
    except RecursionError as error:
        raise _failed(source, f"nested deeper than {MAX_DEPTH} levels") from error
    return _JsonNodes(text, source).node(0)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


class _JsonNodes:
    """Nodes of a text that is known to be JSON; `json` tells values but not where they stand."""

    _BLANKS: Final = re.compile(r"[ \t\n\r:,]*")

    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]
        self._decoder = json.JSONDecoder()
        self._offset = 0

    def node(self, depth: int) -> _Node:
        first = self._peek()
        spot = self._spot()
        if depth > MAX_DEPTH:
            raise _failed(self._source, f"nested deeper than {MAX_DEPTH} levels", spot)
        if first not in "{[":
            value, self._offset = self._decoder.raw_decode(self._text, self._offset)
            return _Node(value, *spot)
        self._offset += 1
        items: list[_Node] = []
        while self._peek() not in "}]":
            items.append(self.node(depth + 1))
        self._offset += 1
        if first == "{":
            return _Node(list(zip(items[::2], items[1::2], strict=True)), *spot, is_mapping=True)
        return _Node(items, *spot)

    def _peek(self) -> str:
        blanks = self._BLANKS.match(self._text, self._offset)
        self._offset = blanks.end() if blanks else self._offset
        return self._text[self._offset]

    def _spot(self) -> _Spot:
        line = bisect_right(self._lines, self._offset)
        return line, self._offset - self._lines[line - 1] + 1


# Python


def _copied(value: object, left: Iterator[int], depth: int = 0) -> JsonValue:
    """Raises `ValueError` for what is not plain, and where nothing is left of how many values there may be."""
    if depth > MAX_DEPTH or next(left, None) is None:
        raise ValueError
    match value:
        case str():
            return _whole(value)
        case None | bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
        case dict():
            return {_whole(key): _copied(item, left, depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [_copied(item, left, depth + 1) for item in value]
    raise ValueError


def _whole(text: object) -> str:
    """Raises `ValueError` for what is no text, and for half a character in it."""
    if not isinstance(text, str):
        raise ValueError
    if not text.isascii():
        text.encode()
    return text


def _python(value: object, depth: int) -> _Node:
    if depth > MAX_DEPTH:
        return _Node(None, problem=f"nested deeper than {MAX_DEPTH} levels")
    match value:
        case None | bool() | int() | float() | str():
            return _Node(value)
        case Mapping():
            pairs = [(_python(key, depth + 1), _python(item, depth + 1)) for key, item in value.items()]
            return _Node(pairs, is_mapping=True)
        case list() | tuple():
            return _Node([_python(item, depth + 1) for item in value])
    return _Node(None, problem=f"a {type(value).__name__} is nothing that JSON can hold")

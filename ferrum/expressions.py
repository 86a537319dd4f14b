"""`{{ … }}` and `when:`: CEL, compiled once, evaluated once; what comes out is data and never parsed again.

The language is the Common Expression Language (https://cel.dev) with three additions. `a.list[*].x` stands for
`a.list.map(item, item.x)`; it reaches over the fields and indexes that follow and ends at a call, so
`docs[*].text.join(", ")` joins the list. `string(x)` takes any value (compact JSON). And there are the functions of
cel-go's strings, math and lists libraries that `FUNCTIONS` names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, TypeAlias

from pydantic import JsonValue

from ferrum import sameness
from ferrum.errors import ExpressionError, did_you_mean
from ferrum.evaluation import (
    FAILURES,
    Exceeded,
    Function,
    Limits,
    Program,
    Token,
    Type,
    Uint,
    Undefined,
    Work,
    shown_key,
    spelled,
)
from ferrum.patterns import STDLIB, compile_cel

#: How an author reaches a value: `("classify", "kind")`; `*` stands for any item of a list.
Path: TypeAlias = tuple[str, ...]

#: Longest expression, in characters. Like the next three it keeps the CEL library, which recurses on the native
#: stack and would take the whole process down, far from the end of the smallest thread stack (512 KB).
MAX_LENGTH: Final = 4_000
#: Most tokens of one expression.
MAX_TOKENS: Final = 500
#: Deepest nesting of brackets and conditionals; a macro counts as three, since it is compiled to as many.
MAX_NESTING: Final = 30
#: Deepest nesting of a value that an expression other than a plain path may look at.
MAX_DATA_NESTING: Final = 100
#: Longest text that an interpolation or a function may build, in characters.
MAX_TEXT: Final = 10_000_000
#: Most items that the macros of one expression (`map`, `all`, …) may go over in all.
MAX_ITEMS: Final = 500_000
#: Most that an expression may build and give, in characters; an item of a list counts as 32 more.
MAX_LIST: Final = 50_000_000
#: Most steps of an expression: operations in its macros, items that are compared, 64 characters that are read. About a
#: second of a processor, in which the other threads of the worker run too.
MAX_STEPS: Final = 10_000_000


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_RESERVED: Final = _words(
    "as break const continue else for function if import let loop package namespace return var void while"
)
_KEYWORDS: Final = _words("true false null in")
_TYPES: Final = _words("bool bytes double int list map null_type string type uint")
#: Macros that bind their first argument as a name.
_BINDING: Final = _words("all exists exists_one existsOne filter map")
_NATIVE: Final = _words(
    "bytes contains double duration dyn endsWith getDate getDayOfMonth getDayOfWeek getDayOfYear getFullYear getHours "
    "getMilliseconds getMinutes getMonth getSeconds has int matches size startsWith string timestamp type uint"
)
#: Functions of cel-go's libraries, taken from `cel.stdlib`.
_LIBRARY: Final = _words(
    "bool max min sum charAt indexOf lastIndexOf lowerAscii reverse split substring trim upperAscii distinct flatten "
    "slice sort math.abs math.ceil math.floor math.greatest math.least math.round math.sign math.trunc"
)

#: Names that mean something in the language and so cannot be the name of a value.
RESERVED_NAMES: Final = _RESERVED | _KEYWORDS | _TYPES | _BINDING | _NATIVE | {"cel", "math", "optional"}


def _string(work: Work, value: object) -> str:
    if isinstance(value, float | bytes | datetime | timedelta):
        text = spelled(value)
    else:
        if not isinstance(value, str):
            work.written(value)
        text = _as_text(_to_json(value))
    work.text(len(text))
    return text


def _replace(work: Work, text: str, old: str, new: str, limit: int = -1) -> str:
    count = text.count(old) if limit < 0 else min(limit, text.count(old))
    work.text(len(text) + count * (len(new) - len(old)))
    return text.replace(old, new, limit)


def _join(work: Work, items: list[str], separator: str = "") -> str:
    work.text(sum(map(len, items)) + len(separator) * len(items))
    return separator.join(items)


def _split(work: Work, text: str, separator: str, limit: int = -1) -> list[str]:
    pieces = text.count(separator) + 1 if separator else len(text)
    work.grown(pieces if limit < 0 else min(limit, pieces))
    split: Callable[..., list[str]] = STDLIB["split"]
    return split(text, separator, limit)


def _distinct(work: Work, items: list[Any]) -> list[Any]:
    # The library's own looks through all that it has for each item.
    seen: dict[object, Any] = {}
    for item in items:
        seen.setdefault(sameness.key(item, work.spend), item)
    return list(seen.values())


def _flatten(work: Work, items: list[Any], depth: int = 1) -> list[Any]:
    if depth < 0:
        raise ValueError("flatten() takes a depth of 0 or more")
    built: list[Any] = []
    for item in items:
        if isinstance(item, list) and depth:
            work.grown(len(item))
            built += _flatten(work, item, depth - 1)
        else:
            built.append(item)
    return built


def _last_index_of(work: Work, text: str, part: str, offset: int | None = None) -> int:
    # `rfind` takes time by the product of the lengths, `find` by their sum.
    if offset is not None:
        if not 0 <= offset <= len(text):
            raise ValueError(f"the text has {len(text)} characters, and no place {offset}")
        text = text[: offset + len(part)]
    found = text[::-1].find(part[::-1])
    return found if found < 0 else len(text) - len(part) - found


def _lower_ascii(work: Work, text: str) -> str:
    # Of bytes, it is the letters of ASCII.
    work.build(len(text))
    return text.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")


def _upper_ascii(work: Work, text: str) -> str:
    work.build(len(text))
    return text.encode("utf-8", "surrogatepass").upper().decode("utf-8", "surrogatepass")


#: They compare values with each other.
_COMPARING: Final = _words("sort max min math.greatest math.least")


def _library(name: str, function: Function) -> Function:
    """A function of `cel.stdlib`, or one of ours instead, within bounds and with its errors in our words."""

    ours = function.__module__ == __name__

    def call(work: Work, *arguments: Any) -> Any:
        if name != "string" and arguments and isinstance(arguments[0], dict):
            arguments = _of_keys(work, arguments, name)
        _read(work, arguments)
        if name in _COMPARING:
            _read_compared(work, arguments)
        try:
            value = function(work, *arguments) if ours else function(*arguments)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{name}(): {error}") from error
        if isinstance(value, list):
            work.grown(len(value))
        elif isinstance(value, str) and not ours:
            work.build(len(value))
        elif type(value) is int and not -(2**63) <= value < 2**63:
            raise OverflowError(f"{name}() gives {value}, which does not fit 64 bits")
        return value

    return call


def _of_keys(work: Work, arguments: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """An object stands for its keys, where a function takes a list."""
    first, *more = arguments
    if more and name in _COMPARING:
        raise TypeError("objects are not compared with each other")
    work.grown(len(first))
    return ([shown_key(key) for key in first], *more)


def _read(work: Work, arguments: Iterable[Any]) -> None:
    for argument in arguments:
        if isinstance(argument, str | bytes):
            work.spend(len(argument) >> 6)
        elif isinstance(argument, list):
            work.spend(len(argument))


def _read_compared(work: Work, arguments: Sequence[Any]) -> None:
    """Pay for values that are compared, each with all that is in it."""
    items = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], list) else arguments
    times, todo = len(items).bit_length(), [*items]
    while todo:
        one = todo.pop()
        if isinstance(one, str | bytes):
            work.spend((len(one) >> 6) * times)
        elif isinstance(one, list | dict):
            work.spend((len(one) + 1) * times)
            todo += one.values() if isinstance(one, dict) else one


#: What an expression may call besides the functions of CEL itself.
FUNCTIONS: Final[Mapping[str, Function]] = {
    **{name: _library(name, STDLIB[name]) for name in _LIBRARY},
    "string": _library("string", _string),
    "replace": _library("replace", _replace),
    "join": _library("join", _join),
    "split": _library("split", _split),
    "lastIndexOf": _library("lastIndexOf", _last_index_of),
    "distinct": _library("distinct", _distinct),
    "flatten": _library("flatten", _flatten),
    "lowerAscii": _library("lowerAscii", _lower_ascii),
    "upperAscii": _library("upperAscii", _upper_ascii),
}


class Template:
    """A JSON value whose texts may hold `{{ expression }}`, compiled.

    A text that is exactly one `{{ … }}` becomes the expression's value, whatever its type. In a longer text the value
    is written out: texts as they are, `null` as nothing, everything else as compact JSON. To write two opening
    braces, write `{{ "{{" }}`. Keys of objects are never templates, and one that holds `{{` is refused.
    """

    __slots__ = ("_node", "paths", "references", "source")

    def __init__(self, source: JsonValue, node: _Node) -> None:
        self.source = source
        self._node = node
        #: What it reaches for, as far as that can be seen without a value.
        self.paths: frozenset[Path] = frozenset(path for found in _expressions(node) for path in found.paths)
        #: The names that have to be in the scope.
        self.references: frozenset[str] = frozenset(path[0] for path in self.paths)

    @classmethod
    def compile(cls, value: JsonValue) -> Template:
        """Raises `ExpressionError` for the first expression that is none."""
        return cls(value, _node(value, 0))

    def evaluate(
        self, scope: Mapping[str, JsonValue], write: Write | None = None, within: Collection[str] = ()
    ) -> JsonValue:
        """The value with every expression replaced by what it comes to.

        Plain paths give what is in `scope` itself and not a copy. In the fields of an object that are `within`, `write`
        is asked first how to write a value. Raises `ExpressionError`.
        """
        if write is None or not isinstance(self._node, _Fields):
            return _evaluate(self._node, scope, None)
        return {key: _evaluate(item, scope, write if key in within else None) for key, item in self._node.nodes.items()}

    def __repr__(self) -> str:
        return f"Template({self.source!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and self.source == other.source

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[[JsonValue], Template], tuple[JsonValue]]:
        return Template.compile, (self.source,)


class Condition:
    """A bare expression that says yes or no, compiled: what stands in `when:`."""

    __slots__ = ("_expression", "paths", "references", "source")

    def __init__(self, expression: _Expression) -> None:
        self.source = expression.text
        self._expression = expression
        self.paths = expression.paths
        self.references: frozenset[str] = frozenset(path[0] for path in self.paths)

    @classmethod
    def compile(cls, text: str) -> Condition:
        """Raises `ExpressionError` for a text that is no expression."""
        if text.lstrip().startswith("{{"):
            raise ExpressionError(f"in {_shown(text)}: a condition is an expression already, leave out the {{{{ }}}}")
        return cls(_expression(text.strip()))

    def evaluate(self, scope: Mapping[str, JsonValue]) -> bool:
        """Raises `ExpressionError`, also for a value that is neither true nor false."""
        value = self._expression.evaluate(scope)
        if not isinstance(value, bool):
            raise self._expression.error(f"a condition has to be true or false, this is {_kind(value)}")
        return value

    def __repr__(self) -> str:
        return f"Condition({self.source!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Condition) and self.source == other.source

    def __hash__(self) -> int:
        return hash(self.source)

    def __reduce__(self) -> tuple[Callable[[str], Condition], tuple[str]]:
        return Condition.compile, (self.source,)


# Templates


#: How a value is written that an expression with these paths came to; `None`: as ever.
Write: TypeAlias = "Callable[[frozenset[Path], JsonValue], JsonValue]"


@dataclass(frozen=True, slots=True)
class _Text:
    """A text with expressions in it."""

    parts: tuple[str | _Expression, ...]


@dataclass(frozen=True, slots=True)
class _Items:
    nodes: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Fields:
    nodes: Mapping[str, _Node]


#: A scalar stands for itself.
_Node: TypeAlias = "str | int | float | bool | _Expression | _Text | _Items | _Fields | None"


def _node(value: JsonValue, depth: int) -> _Node:
    if depth > MAX_DATA_NESTING:
        raise ExpressionError(f"the value is nested deeper than {MAX_DATA_NESTING} levels")
    match value:
        case str():
            return _text_node(value) if "{{" in value else value
        case list():
            return _Items(tuple(_node(item, depth + 1) for item in value))
        case dict():
            for key in value:
                if "{{" in key:
                    raise ExpressionError(f"the key {key!r}: a key cannot be an expression, only a value can")
            return _Fields({key: _node(item, depth + 1) for key, item in value.items()})
    return value


def _text_node(text: str) -> _Expression | _Text:
    parts = tuple(_parts(text))
    if len(parts) == 1 and isinstance(parts[0], _Expression):
        return parts[0]
    return _Text(parts)


def _parts(text: str) -> Iterator[str | _Expression]:
    position = 0
    while (start := text.find("{{", position)) >= 0:
        if start > position:
            yield text[position:start]
        end = _closing(text, start)
        yield _expression(text[start + 2 : end].strip())
        position = end + 2
    if position < len(text):
        yield text[position:]


def _closing(text: str, start: int) -> int:
    """Where the `}}` stands that closes the `{{` at `start`: the first outside of literals."""
    braces = 0
    for token in _tokens(text, start + 2):
        if token.text == "{":
            braces += 1
        elif token.text == "}" and braces:
            braces -= 1
        elif token.text == "}" and text.startswith("}}", token.start):
            return token.start
        if token.start - start > MAX_LENGTH:
            raise ExpressionError(f"in {_shown(text[start:])}: longer than {MAX_LENGTH} characters")
    shown = _shown(text[start:])
    raise ExpressionError(f'in {shown}: `{{{{` without its `}}}}`; two literal braces are written {{{{ "{{{{" }}}}')


def _expressions(node: _Node) -> Iterator[_Expression]:
    match node:
        case _Expression():
            yield node
        case _Text(parts):
            yield from (part for part in parts if isinstance(part, _Expression))
        case _Items(nodes):
            for item in nodes:
                yield from _expressions(item)
        case _Fields(fields):
            for item in fields.values():
                yield from _expressions(item)


def _evaluate(node: _Node, scope: Mapping[str, JsonValue], write: Write | None) -> JsonValue:
    match node:
        case _Expression():
            value = node.evaluate(scope)
            return value if write is None or (written := write(node.paths, value)) is None else written
        case _Text(parts):
            return _interpolate(parts, scope, write)
        case _Items(nodes):
            return [_evaluate(item, scope, write) for item in nodes]
        case _Fields(fields):
            return {key: _evaluate(item, scope, write) for key, item in fields.items()}
    return node


def _interpolate(parts: Iterable[str | _Expression], scope: Mapping[str, JsonValue], write: Write | None) -> str:
    texts: list[str] = []
    length = 0
    for part in parts:
        text = part if isinstance(part, str) else _as_text(_evaluate(part, scope, write))
        length += len(text)
        if length > MAX_TEXT and isinstance(part, _Expression):
            raise part.error(f"the text around it grows beyond {MAX_TEXT} characters")
        texts.append(text)
    return "".join(texts)


def _as_text(value: JsonValue) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# Expressions


@dataclass(frozen=True, slots=True)
class _Expression:
    """One CEL expression, compiled."""

    #: As the author wrote it.
    text: str
    program: Program
    paths: frozenset[Path]
    #: Set where the whole text is one path: looked up here, so that values of any size and depth pass untouched.
    plain: Path | None

    def evaluate(self, scope: Mapping[str, JsonValue]) -> JsonValue:
        if self.plain:
            return self._lookup(self.plain, scope)
        try:
            value = self.program.run(scope, Limits(MAX_ITEMS, MAX_LIST, MAX_TEXT, MAX_STEPS))
            return _to_json(value)
        except FAILURES as error:
            raise self.error(self._explain(error, scope)) from error
        except Exceeded as error:
            raise self.error(str(error)) from error
        except RecursionError as error:
            raise self.error(f"a value is {_TOO_DEEP}") from error

    def error(self, reason: str) -> ExpressionError:
        return ExpressionError(f"in {_shown(self.text)}: {reason}")

    def _lookup(self, path: Path, scope: Mapping[str, JsonValue]) -> JsonValue:
        value: JsonValue = None
        found: Mapping[str, JsonValue] | JsonValue = scope
        for name in path:
            if not isinstance(found, Mapping) or name not in found:
                raise self.error(_missing(path, scope) or f"no {name!r}")
            value = found = found[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error("the value is not a finite number")
        return value

    def _explain(self, error: Exception, scope: Mapping[str, JsonValue]) -> str:
        """Why it failed, in the author's names where they can be told."""
        if isinstance(error, Undefined):
            name = str(error)
            return _missing((name,), scope) or f"{name!r} is not there"
        if isinstance(error, KeyError):
            missed = error.args[0]
            key = missed if isinstance(missed, str) else json.dumps(missed)
            reasons = [_missing(path, scope) for path in sorted(self.paths) if key in path]
            return next((reason for reason in reasons if reason), f"no {key!r}")
        if isinstance(error, TypeError):
            reasons = [_missing(path, scope) for path in sorted(self.paths)]
            if reason := next((reason for reason in reasons if reason and "so it has no" in reason), None):
                return reason
        return str(error)


def _missing(path: Path, scope: Mapping[str, JsonValue]) -> str | None:
    """Where `path` ends before its end, said for the author; `None` if it does not."""
    if path[0] not in scope:
        return f"nothing is called {path[0]!r}{did_you_mean(path[0], scope)}"
    values: list[JsonValue] = [scope[path[0]]]
    for depth, name in enumerate(path[1:], 1):
        below: list[JsonValue] = []
        for value in values:
            if name == "*":
                below.extend(value if isinstance(value, list) else [])
            elif not isinstance(value, dict):
                return f"{_dotted(path[:depth])} is {_kind(value)}, so it has no {name!r}"
            elif name not in value:
                return f"no {name!r} in {_dotted(path[:depth])}{did_you_mean(name, value)}"
            else:
                below.append(value[name])
        values = below
    return None


def _dotted(path: Path) -> str:
    return "".join("[*]" if name == "*" else f".{name}" for name in path).removeprefix(".")


def _kind(value: JsonValue) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "text"
        case int() | float():
            return "a number"
        case list():
            return "a list"
    return "an object"


_TOO_DEEP: Final = f"nested deeper than {MAX_DATA_NESTING} levels; only a plain path can pass it on"


def _to_json(value: Any) -> JsonValue:
    """Turn the value of an expression into JSON. Raises `ValueError` for what JSON cannot say."""
    level: list[Any] = [value]
    known = True
    for _ in range(MAX_DATA_NESTING):
        below: list[Any] = []
        for item in level:
            if isinstance(item, list):
                below += item
            elif isinstance(item, dict):
                known = known and all(isinstance(key, str) for key in item)
                below += item.values()
            elif item is not None and type(item) not in (str, bool, int):
                known = _is_json(item) and known
        if not below:
            return value if known else _converted(value)
        level = below
    raise ValueError(f"the result is {_TOO_DEEP}")


def _is_json(value: object) -> bool:
    """Tell whether a scalar is JSON as it stands. Raises `ValueError` for one that JSON has nothing for."""
    match value:
        case Uint() | Type():
            return False
        case float():
            if not math.isfinite(value):
                raise ValueError("the result is not a finite number")
        case str() | int():
            pass
        case _:
            kind = type(value).__name__
            raise ValueError(f"the result is a {kind}, which JSON cannot hold; string(…) makes a text of it")
    return True


def _converted(value: Any) -> JsonValue:
    match value:
        case Uint():
            return int(value)
        case Type():
            return str(value)
        case list():
            return [_converted(item) for item in value]
        case dict():
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"the result has a key {json.dumps(shown_key(key))} that is not text")
            return {key: _converted(item) for key, item in value.items()}
    return value  # type: ignore[no-any-return]


@lru_cache(maxsize=4096)
def _expression(text: str) -> _Expression:
    tokens = _checked(text)
    expanded = _expand(text, tokens)
    nesting = _nesting(expanded)
    if nesting > MAX_NESTING:
        raise ExpressionError(f"in {_shown(text)}: nested deeper than {MAX_NESTING} levels")
    found = _scan(text, expanded)
    source = text if len(expanded) == len(tokens) else " ".join(token.text for token in expanded)
    try:
        # CEL's own parser says what an expression is.
        compile_cel(source)
    except ValueError as error:
        raise ExpressionError(f"in {_shown(text)}: {_syntax(str(error), source == text)}") from error
    program = Program.of(expanded, {name: FUNCTIONS[name] for name in found.functions if name in FUNCTIONS})
    return _Expression(text=text, program=program, paths=frozenset(found.paths), plain=_plain_path(expanded))


def _plain_path(tokens: list[Token]) -> Path | None:
    names, dots = tokens[::2], tokens[1::2]
    if len(tokens) % 2 == 0 or any(token.text != "." for token in dots) or any(token.kind != "name" for token in names):
        return None
    path = tuple(token.text for token in names)
    return None if path[0] in _KEYWORDS | _RESERVED | _TYPES else path


def _syntax(message: str, positioned: bool) -> str:
    """The first of the parser's complaints, in words."""
    match = re.search(r"ERROR: <input>:(\d+):(\d+): (?:Syntax error: )?(.*)", message)
    if match is None:
        return "this is not an expression"
    line, column, what = match.groups()
    if "<EOF>" in what and not what.startswith("extraneous"):
        return "the expression ends too early"
    what = re.sub(r"^(?:mismatched|extraneous) input (.*?) expecting .*", r"\1 is not expected here", what)
    where = f" (character {column}{'' if line == '1' else f' of line {line}'})" if positioned else ""
    return f"{what}{where}"


def _shown(text: str) -> str:
    """An expression in one line of a message."""
    line = " ".join(text[:1000].split())
    return f"`{line}`" if len(line) <= 200 and len(text) <= 1000 else f"`{line[:200]}…`"


# Tokens: as much of CEL's grammar as it takes to see where an expression ends and what it refers to


_LEXER: Final = re.compile(
    r"""
      (?P<space>   \s+ | //[^\n]* )
    | (?P<string>  (?:[rR][bB]?|[bB][rR]) (?: \"{3}[\s\S]*?\"{3} | '{3}[\s\S]*?'{3} | "[^"\r\n]*" | '[^'\r\n]*' )
                 | [bB]? (?: \"{3}(?:\\[\s\S]|[^\\])*?\"{3} | '{3}(?:\\[\s\S]|[^\\])*?'{3}
                           | "(?:\\.|[^"\\\r\n])*" | '(?:\\.|[^'\\\r\n])*' ) )
    | (?P<number>  0x[0-9a-fA-F]+u? | (?:\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d+)?[uU]? )
    | (?P<name>    [A-Za-z_][A-Za-z0-9_]* )
    | (?P<sign>    && | \|\| | [<>=!]= | . )
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)


def _tokens(text: str, start: int = 0) -> Iterator[Token]:
    """The tokens from `start` on, blanks and comments left out. Raises `ExpressionError` for an open text literal."""
    for match in _LEXER.finditer(text, start):
        kind = str(match.lastgroup)
        if kind == "space":
            continue
        if kind == "sign" and match[0] in "\"'":
            raise ExpressionError(f"in {_shown(text[start:])}: a text starts with {match[0]} and never ends")
        yield Token(kind, match[0], match.start())


def _checked(text: str) -> list[Token]:
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"in {_shown(text)}: longer than {MAX_LENGTH} characters")
    tokens = list(_tokens(text))
    if not tokens:
        raise ExpressionError("an empty expression")
    if len(tokens) > MAX_TOKENS:
        raise ExpressionError(f"in {_shown(text)}: longer than {MAX_TOKENS} words and signs")
    return tokens


def _nesting(tokens: list[Token]) -> int:
    opened: list[int] = []
    deepest = 0
    for position, token in enumerate(tokens):
        if token.text in ("(", "[", "{"):
            opened.append(3 if _is_macro(tokens, position - 1) else 1)
        elif token.text in (")", "]", "}") and opened:
            opened.pop()
        deepest = max(deepest, sum(opened))
    return deepest + sum(token.text == "?" for token in tokens)


def _expand(text: str, tokens: list[Token]) -> list[Token]:
    """`list[*].x` written as `list.map(item, item.x)`."""
    expanded: list[Token] = []
    position = 0
    while position < len(tokens):
        if not _is_star(tokens, position):
            expanded.append(tokens[position])
            position += 1
            continue
        before = expanded[-1] if expanded else None
        if before is None or not (before.kind in ("name", "string") or before.text in (")", "]", "}")):
            raise ExpressionError(f"in {_shown(text)}: [*] needs a list before it")
        position = _expand_star(text, tokens, position, expanded)
    return expanded


def _expand_star(text: str, tokens: list[Token], position: int, expanded: list[Token]) -> int:
    """Append the map that the star at `position` stands for; where to go on."""
    opened = 0
    while position < len(tokens):
        if _is_star(tokens, position):
            # Named by where it stands, so that the names of nested stars differ.
            item = f"__item{tokens[position].start}"
            opened += 1
            position += 3
            expanded += _tokens(f".map({item},{item}")
        elif tokens[position].text == "." and _is_field(tokens, position + 1):
            expanded += tokens[position : position + 2]
            position += 2
        elif tokens[position].text == "[":
            end = _matching(tokens, position)
            expanded += [tokens[position], *_expand(text, tokens[position + 1 : end]), *tokens[end : end + 1]]
            position = end + 1
        else:
            break
    expanded += [Token("sign", ")", 0)] * opened
    return position


def _is_macro(tokens: list[Token], position: int) -> bool:
    """Whether the name at `position` is a macro that binds a name."""
    return (
        _text(tokens, position) in _BINDING
        and _text(tokens, position - 1) == "."
        and _text(tokens, position + 1) == "("
        and _text(tokens, position + 3) == ","
    )


def _is_star(tokens: list[Token], position: int) -> bool:
    return [token.text for token in tokens[position : position + 3]] == ["[", "*", "]"]


def _is_field(tokens: list[Token], position: int) -> bool:
    """Whether the name at `position`, after a dot, is a field and not a method."""
    return position < len(tokens) and tokens[position].kind == "name" and _text(tokens, position + 1) != "("


def _text(tokens: list[Token], position: int) -> str:
    return tokens[position].text if 0 <= position < len(tokens) else ""


def _matching(tokens: list[Token], position: int) -> int:
    """Where the bracket at `position` closes, or the end."""
    depth = 0
    for index in range(position, len(tokens)):
        if tokens[index].text in ("(", "[", "{"):
            depth += 1
        elif tokens[index].text in (")", "]", "}"):
            depth -= 1
            if depth == 0:
                return index
    return len(tokens)


@dataclass(slots=True)
class _Found:
    paths: set[Path]
    functions: set[str]


@dataclass(frozen=True, slots=True)
class _Bound:
    """A name that a macro binds, up to where its bracket closes."""

    name: str
    until: int
    #: What the name stands for, where that can be told.
    path: Path | None


def _scan(text: str, tokens: list[Token]) -> _Found:
    """What an expression refers to and calls."""
    found = _Found(set(), set())
    bound: list[_Bound] = []
    # Where a path ends → the path, for the macro that may follow.
    ends: dict[int, Path] = {}
    skip: set[int] = set()
    for position, token in enumerate(tokens):
        if token.kind != "name" or position in skip:
            continue
        after = _text(tokens, position + 1)
        is_member = _text(tokens, position - 1) == "."
        if after == "{" and token.text != "in":
            raise ExpressionError(f"in {_shown(text)}: messages like {token.text}{{…}} are not supported")
        if after == "(":
            if _is_macro(tokens, position):
                receiver = ends.get(position - 2)
                name = _text(tokens, position + 2)
                bound.append(_Bound(name, _matching(tokens, position + 1), (*receiver, "*") if receiver else None))
                skip.add(position + 2)
            found.functions.add(_function(text, tokens, position))
        elif not is_member and token.text not in _KEYWORDS:
            _reference(tokens, position, bound, found, ends)
    return found


def _function(text: str, tokens: list[Token], position: int) -> str:
    name = tokens[position].text
    if _text(tokens, position - 1) == "." and (dotted := f"{_text(tokens, position - 2)}.{name}") in FUNCTIONS:
        return dotted
    known = _NATIVE | _BINDING | FUNCTIONS.keys()
    if name not in known:
        raise ExpressionError(f"in {_shown(text)}: there is no function {name!r}{did_you_mean(name, known)}")
    return name


def _reference(tokens: list[Token], position: int, bound: list[_Bound], found: _Found, ends: dict[int, Path]) -> None:
    name = tokens[position].text
    binding = next((one for one in reversed(bound) if one.name == name and position < one.until), None)
    if binding is None and (name in _TYPES or f"{name}.{_text(tokens, position + 2)}" in FUNCTIONS):
        return
    path = binding.path if binding else (name,)
    if path is None:
        return
    end = position
    while (step := _step(tokens, end + 1)) is not None:
        names, width = step
        path += names
        end += width
    found.paths.add(path)
    ends[end] = path


def _step(tokens: list[Token], position: int) -> tuple[Path, int] | None:
    """One more part of a path, `.name`, `["name"]` or `[0]`, and how many tokens it takes."""
    if _text(tokens, position) == "." and _is_field(tokens, position + 1):
        return (tokens[position + 1].text,), 2
    if _text(tokens, position) == "[" and _text(tokens, position + 2) == "]":
        inside = tokens[position + 1]
        if inside.kind == "number":
            return ("*",), 3
        if literal := re.fullmatch(r"""(["'])([^"'\\*]+)\1""", inside.text):
            return (literal[2],), 3
    return None

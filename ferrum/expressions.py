"""`{{ … }}` and `when:`: CEL, compiled once, evaluated once; what comes out is data and never parsed again.

The language is the Common Expression Language (https://cel.dev) with three additions. `a.list[*].x` stands for
`a.list.map(item, item.x)`; it reaches over the fields and indexes that follow and ends at a call, so
`docs[*].text.join(", ")` joins the list. `string(x)` takes any value (compact JSON). And there are the functions of
cel-go's strings, math and lists libraries that `FUNCTIONS` names.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Final, NamedTuple, TypeAlias

from pydantic import JsonValue

from ferrum.errors import ExpressionError, did_you_mean

# The package imports its interactive command line, prompt_toolkit and all: fifteen times as long as the rest of it.
_COMMAND_LINE: Final = ModuleType("cel.cli")
sys.modules.setdefault("cel.cli", _COMMAND_LINE)
import cel  # noqa: E402
from cel.stdlib import STDLIB_FUNCTIONS  # noqa: E402

if sys.modules["cel.cli"] is _COMMAND_LINE:
    del sys.modules["cel.cli"]
# It warns of each error of a function, which is raised as well.
logging.getLogger("cel").setLevel(logging.CRITICAL)

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
#: Largest list that a macro may build, in characters; an item counts as 32 more.
MAX_LIST: Final = 50_000_000


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


def _string(value: object) -> str:
    return _as_text(_to_json(value))


def _replace(text: str, old: str, new: str, limit: int = -1) -> str:
    count = text.count(old) if limit < 0 else min(limit, text.count(old))
    if len(text) + count * (len(new) - len(old)) > MAX_TEXT:
        raise ValueError(f"the text would be longer than {MAX_TEXT} characters")
    return text.replace(old, new, limit)


def _join(items: list[str], separator: str = "") -> str:
    if sum(map(len, items)) + len(separator) * len(items) > MAX_TEXT:
        raise ValueError(f"the text would be longer than {MAX_TEXT} characters")
    return separator.join(items)


def _distinct(items: list[Any]) -> list[Any]:
    # The library's own looks through all that it has for each item.
    seen: dict[object, Any] = {}
    for item in items:
        seen.setdefault(json.dumps(item, sort_keys=True) if isinstance(item, list | dict) else item, item)
    return list(seen.values())


#: What an expression may call besides the functions of CEL itself.
FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    **{name: STDLIB_FUNCTIONS[name] for name in _LIBRARY},
    "string": _string,
    "replace": _replace,
    "join": _join,
    "distinct": _distinct,
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

#: Items that `map` and `filter` go over at a time.
_PART: Final = 16


class _Work:
    """What the macros of one evaluation have done, and the functions that keep it within bounds.

    An expression is evaluated in one call that nothing interrupts, so one that goes over too much has to stop itself,
    and has to let the other threads of the worker run meanwhile, as each call of a function does. The library's `map`
    and `filter` copy all that they have with each item: a list of 100,000 would take minutes. So they are given a
    list in parts, and what comes of those is kept here: `list.map(x, f)` is compiled as
    `list.__parts(1).all(part, __keep(1, part.map(x, f))).__kept(1)`, where 1 says which macro it is.
    """

    def __init__(self) -> None:
        self._items = 0
        self._built: dict[int, list[Any]] = {}
        #: Why it was stopped; `None` if it was not. `all` and `exists` go on over an error, and may come to a value.
        self.refused: str | None = None
        self.functions: Mapping[str, Callable[..., Any]] = {
            "__counted": self._counted,
            "__parts": self._parts,
            "__keep": self._keep,
            "__kept": self._kept,
        }

    def _counted(self, value: Any) -> Any:
        if isinstance(value, list | dict):
            self._items += len(value)
            if self._items > MAX_ITEMS:
                self._refuse(f"it goes over more than {MAX_ITEMS} items in all")
        return value

    def _parts(self, value: Any, macro: int) -> Any:
        value = self._counted(value)
        if not isinstance(value, list | dict):
            # The library says what is wrong with it.
            return value
        self._built[macro] = []
        items = list(value)
        return [items[start : start + _PART] for start in range(0, len(items), _PART)]

    def _keep(self, macro: int, items: list[Any]) -> bool:
        self._built[macro] += items
        return True

    def _kept(self, _: bool, macro: int) -> list[Any]:
        built = self._built.pop(macro)
        if _outgrows(built, MAX_LIST):
            self._refuse(f"it builds a list of more than {MAX_LIST} characters")
        return built

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        raise ValueError(reason)


def _outgrows(value: object, most: int) -> bool:
    left, todo = most, [value]
    while todo and left >= 0:
        match todo.pop():
            case str() as text:
                left -= len(text)
            case list() as items:
                left -= 32 * len(items)
                todo += items
            case dict() as fields:
                left -= 32 * len(fields)
                todo += fields.values()
    return left < 0


#: Which parts of the scope an expression looks at: a name maps to what is looked at below it, `None` to all of it.
_View: TypeAlias = "dict[str, _View | None]"


@dataclass(frozen=True, slots=True)
class _Expression:
    """One CEL expression, compiled."""

    #: As the author wrote it.
    text: str
    program: cel.Program
    paths: frozenset[Path]
    #: Set where the whole text is one path: looked up here, so that values of any size and depth pass untouched.
    plain: Path | None
    functions: Mapping[str, Callable[..., Any]]
    view: _View
    #: Whether it has macros, whose work is measured.
    measured: bool

    def evaluate(self, scope: Mapping[str, JsonValue]) -> JsonValue:
        if self.plain:
            return self._lookup(self.plain, scope)
        seen = self._visible(scope)
        work = _Work()
        try:
            functions = {**self.functions, **work.functions} if self.measured else dict(self.functions)
            value = self.program.execute(cel.Context(seen, functions))
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise self.error(work.refused or self._explain(error, scope)) from error
        if work.refused:
            raise self.error(work.refused)
        try:
            return _to_json(value)
        except ValueError as error:
            raise self.error(str(error)) from error

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

    def _visible(self, scope: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        seen = {name: _narrow(scope[name], below) for name, below in self.view.items() if name in scope}
        for name, value in seen.items():
            if reason := _not_for_cel(value):
                raise self.error(f"{name!r} {reason}")
        return seen

    def _explain(self, error: Exception, scope: Mapping[str, JsonValue]) -> str:
        """Why CEL failed, in the author's names where they can be told."""
        if isinstance(error, KeyError):
            key = str(error.args[0])
            reasons = [_missing(path, scope) for path in sorted(self.paths) if key in path]
            return next((reason for reason in reasons if reason), f"no {key!r}")
        text = str(error)
        if unknown := re.match(r"Undefined variable or function: '(.*?)'", text):
            name = unknown[1]
            if name in self.view:
                return _missing((name,), scope) or f"{name!r} is not there"
            return f"{name}() does not take these values, or not so many"
        if isinstance(error, TypeError):
            reasons = [_missing(path, scope) for path in sorted(self.paths)]
            if reason := next((reason for reason in reasons if reason and "so it has no" in reason), None):
                return reason
        return _plainly(text)


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


def _plainly(text: str) -> str:
    """The library's message without its advice to callers of the library."""
    text = re.split(r"\. (?:CEL|Check|Convert|The value)\b", text)[0].removesuffix(".")
    text = text.replace("Python function call failed: ", "")
    if text.startswith("No such overload"):
        text = "the types do not fit"
    elif not text.startswith(("Unsupported operation", "Cannot mix")):
        return " ".join(text.split())
    return f"{text}; nothing is converted by itself: use int(x), double(x) or string(x)"


def _narrow(value: JsonValue, view: _View | None) -> JsonValue:
    """Only what is looked at, since the library copies all that it is given."""
    if view is None or not isinstance(value, dict):
        return value
    return {name: _narrow(value[name], below) for name, below in view.items() if name in value}


def _not_for_cel(value: JsonValue) -> str | None:
    """Why CEL cannot compute with a value, or nothing."""
    level: list[JsonValue] = [value]
    for _ in range(MAX_DATA_NESTING):
        below: list[JsonValue] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif type(item) is int and not -(2**63) <= item < 2**63:
                return f"holds {item}, which does not fit 64 bits; only a plain path can pass it on"
        if not below:
            return None
        level = below
    return f"is nested deeper than {MAX_DATA_NESTING} levels; only a plain path can pass it on"


def _to_json(value: object) -> JsonValue:
    """What CEL returned, as JSON. Raises `ValueError` for what JSON cannot say."""
    match value:
        case None | bool() | str() | int():
            return value
        case float():
            if not math.isfinite(value):
                raise ValueError("the result is not a finite number")
            return value
        case list():
            return [_to_json(item) for item in value]
        case dict():
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"the result has a key {key!r} that is not text")
            return {key: _to_json(item) for key, item in value.items()}
    raise ValueError(f"the result is a {type(value).__name__}, which JSON cannot hold; string(…) makes a text of it")


@lru_cache(maxsize=4096)
def _expression(text: str) -> _Expression:
    tokens = _checked(text)
    expanded = _expand(text, tokens)
    nesting = _nesting(expanded)
    if nesting > MAX_NESTING:
        raise ExpressionError(f"in {_shown(text)}: nested deeper than {MAX_NESTING} levels")
    found = _scan(text, expanded)
    written = _measured(expanded)
    source = text if len(written) == len(tokens) else " ".join(token.text for token in written)
    try:
        program = cel.compile(source)
    except ValueError as error:
        raise ExpressionError(f"in {_shown(text)}: {_syntax(str(error), source == text)}") from error
    return _Expression(
        text=text,
        program=program,
        paths=frozenset(found.paths),
        plain=_plain_path(expanded),
        functions={name: FUNCTIONS[name] for name in found.functions if name in FUNCTIONS},
        view=_view(found.paths),
        measured=len(written) > len(expanded),
    )


def _view(paths: Iterable[Path]) -> _View:
    view: _View = {}
    # Longest first, so that a shorter path, which asks for all below it, has the last word.
    for path in sorted(paths, key=len, reverse=True):
        fields = path[: path.index("*")] if "*" in path else path
        below = view
        for name in fields[:-1]:
            step = below.setdefault(name, {})
            if step is None:
                break
            below = step
        else:
            below[fields[-1]] = None
    return view


def _plain_path(tokens: list[_Token]) -> Path | None:
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


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


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


def _tokens(text: str, start: int = 0) -> Iterator[_Token]:
    """The tokens from `start` on, blanks and comments left out. Raises `ExpressionError` for an open text literal."""
    for match in _LEXER.finditer(text, start):
        kind = str(match.lastgroup)
        if kind == "space":
            continue
        if kind == "sign" and match[0] in "\"'":
            raise ExpressionError(f"in {_shown(text[start:])}: a text starts with {match[0]} and never ends")
        yield _Token(kind, match[0], match.start())


def _checked(text: str) -> list[_Token]:
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"in {_shown(text)}: longer than {MAX_LENGTH} characters")
    tokens = list(_tokens(text))
    if not tokens:
        raise ExpressionError("an empty expression")
    if len(tokens) > MAX_TOKENS:
        raise ExpressionError(f"in {_shown(text)}: longer than {MAX_TOKENS} words and signs")
    return tokens


def _nesting(tokens: list[_Token]) -> int:
    opened: list[int] = []
    deepest = 0
    for position, token in enumerate(tokens):
        if token.text in ("(", "[", "{"):
            opened.append(3 if _is_macro(tokens, position - 1) else 1)
        elif token.text in (")", "]", "}") and opened:
            opened.pop()
        deepest = max(deepest, sum(opened))
    return deepest + sum(token.text == "?" for token in tokens)


def _expand(text: str, tokens: list[_Token]) -> list[_Token]:
    """`list[*].x` written as `list.map(item, item.x)`."""
    expanded: list[_Token] = []
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


def _expand_star(text: str, tokens: list[_Token], position: int, expanded: list[_Token]) -> int:
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
    expanded += [_Token("sign", ")", 0)] * opened
    return position


def _measured(tokens: list[_Token]) -> list[_Token]:
    """The macros of an expression with what bounds their work: see `_Work`."""
    written: list[_Token] = []
    closing: dict[int, Iterable[_Token]] = {}
    for position, token in enumerate(tokens):
        if _is_macro(tokens, position) and token.text in ("map", "filter"):
            part = f"__part{position}"
            written += _tokens(f"__parts({position}).all({part}, __keep({position}, {part}.{token.text}")
            closing[_matching(tokens, position + 1)] = [*_tokens(f")).__kept({position})")]
        elif _is_macro(tokens, position):
            written += [*_tokens("__counted()."), token]
        else:
            written.append(token)
        written += closing.get(position, ())
    return written


def _is_macro(tokens: list[_Token], position: int) -> bool:
    """Whether the name at `position` is a macro that binds a name."""
    return (
        _text(tokens, position) in _BINDING
        and _text(tokens, position - 1) == "."
        and _text(tokens, position + 1) == "("
        and _text(tokens, position + 3) == ","
    )


def _is_star(tokens: list[_Token], position: int) -> bool:
    return [token.text for token in tokens[position : position + 3]] == ["[", "*", "]"]


def _is_field(tokens: list[_Token], position: int) -> bool:
    """Whether the name at `position`, after a dot, is a field and not a method."""
    return position < len(tokens) and tokens[position].kind == "name" and _text(tokens, position + 1) != "("


def _text(tokens: list[_Token], position: int) -> str:
    return tokens[position].text if 0 <= position < len(tokens) else ""


def _matching(tokens: list[_Token], position: int) -> int:
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


def _scan(text: str, tokens: list[_Token]) -> _Found:
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
        if after == "{":
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


def _function(text: str, tokens: list[_Token], position: int) -> str:
    name = tokens[position].text
    if _text(tokens, position - 1) == "." and (dotted := f"{_text(tokens, position - 2)}.{name}") in FUNCTIONS:
        return dotted
    known = _NATIVE | _BINDING | FUNCTIONS.keys()
    if name not in known:
        raise ExpressionError(f"in {_shown(text)}: there is no function {name!r}{did_you_mean(name, known)}")
    return name


def _reference(tokens: list[_Token], position: int, bound: list[_Bound], found: _Found, ends: dict[int, Path]) -> None:
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


def _step(tokens: list[_Token], position: int) -> tuple[Path, int] | None:
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

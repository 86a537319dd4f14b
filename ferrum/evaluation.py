"""CEL, evaluated over the values themselves: in the order of an object's keys, and within bounds.

The package that parses CEL keeps objects in hash maps, which forget the order of their keys, copies all that an
expression looks at, and cannot be stopped while it works, nor can any other thread of the process go on meanwhile. So
what it has found to be an expression is compiled here to functions of Python. It still does what is best done in its
own language: patterns, and times.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple, TypeAlias

from ferrum import sameness
from ferrum.patterns import PatternError, cel_pattern, compile_cel


class Token(NamedTuple):
    """A word or sign of an expression."""

    kind: str
    text: str
    start: int


class Exceeded(Exception):
    """An evaluation that would take or build too much; no part of the expression can pass over it."""


class Undefined(Exception):
    """A name that nothing has; its only argument."""


class Uint(int):
    """An unsigned number: `1u`."""


class Type(str):
    """The value of `type(x)`."""


class Limits(NamedTuple):
    """The bounds of one evaluation."""

    #: Items that the macros go over.
    items: int
    #: Characters of all that is built; an item of a list counts as 32.
    built: int
    #: Characters of one text.
    text: int
    #: Operations in macros, items that are compared, and 64 characters that are read, each one step.
    steps: int


class Work:
    """The work of one evaluation so far. Each method raises `Exceeded`."""

    __slots__ = ("_built", "_indexes", "_items", "_limits", "_steps")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._items = limits.items
        self._built = limits.built
        self._steps = limits.steps
        self._indexes: dict[int, tuple[list[Any], set[Any], list[Any]]] = {}

    def over(self, items: int) -> None:
        """A macro goes over so many items."""
        self._items -= items
        if self._items < 0:
            raise Exceeded(f"it goes over more than {self._limits.items} items in all")

    def spend(self, steps: int) -> None:
        """So many steps are done."""
        self._steps -= steps
        if self._steps < 0:
            raise Exceeded(f"it takes more than {self._limits.steps} steps")

    def text(self, length: int) -> None:
        """A text of this length is built."""
        if length > self._limits.text:
            raise Exceeded(f"the text would be longer than {self._limits.text} characters")
        self.build(length)

    def grown(self, items: int) -> None:
        """A list of so many items is built."""
        self.build(32 * items)

    def build(self, characters: int) -> None:
        """So many characters are built."""
        self._built -= characters
        if self._built < 0:
            raise Exceeded(f"it builds a list of more than {self._limits.built} characters")

    def written(self, value: Any) -> None:
        """A value is written out, each of its parts as often as it is in there."""
        left, todo = self._limits.built, [value]
        while todo:
            match todo.pop():
                case str() as text:
                    left -= len(text)
                case list() as items:
                    left -= 32 * len(items)
                    todo += items if left >= 0 else ()
                case dict() as fields:
                    left -= 32 * len(fields)
                    todo += fields.values() if left >= 0 else ()
            if left < 0:
                self.build(self._limits.built + 1)

    def contains(self, items: list[Any], wanted: Any) -> bool:
        """Tell whether a list has an item, without looking through it each time that it is asked."""
        if len(items) <= 8:
            self.spend(4 * len(items))
            return any(equal(item, wanted, self) for item in items)
        _, scalars, others = self._index(items)
        if isinstance(wanted, list | dict):
            self.spend(4 * len(others))
            return any(equal(item, wanted, self) for item in others)
        return sameness.key(wanted, self.spend) in scalars

    def _index(self, items: list[Any]) -> tuple[list[Any], set[Any], list[Any]]:
        found = self._indexes.get(id(items))
        if found is None:
            self.spend(4 * len(items))
            scalars = {sameness.key(item, self.spend) for item in items if not isinstance(item, list | dict)}
            # The list itself is kept with it, so that no other list gets its id.
            found = (items, scalars, [item for item in items if isinstance(item, list | dict)])
            if len(self._indexes) == 4:
                del self._indexes[next(iter(self._indexes))]
            self._indexes[id(items)] = found
        return found


class Frame:
    """The scope of an evaluation, and what its macros have bound."""

    __slots__ = ("scope", "slots", "work")

    def __init__(self, scope: Mapping[str, Any], slots: int, work: Work) -> None:
        self.scope = scope
        self.slots: list[Any] = [None] * slots
        self.work = work


#: A part of an expression, compiled.
Code: TypeAlias = Callable[[Frame], Any]
#: A function that an expression may call, with the work that it is part of.
Function: TypeAlias = Callable[..., Any]

#: Failures that `&&`, `||`, `all` and `exists` pass over where they come to a value anyway.
FAILURES: Final = (ArithmeticError, LookupError, TypeError, ValueError, Undefined)

_CONVERT: Final = "nothing is converted by itself: use int(x), double(x) or string(x)"
_NO_FIT: Final = f"the types do not fit; {_CONVERT}"


class Program:
    """A compiled expression."""

    __slots__ = ("_code", "_slots")

    def __init__(self, code: Code, slots: int) -> None:
        self._code = code
        self._slots = slots

    @classmethod
    def of(cls, tokens: Sequence[Token], functions: Mapping[str, Function]) -> Program:
        """Compile tokens that CEL's own parser accepts."""
        parser = _Parser(tokens, functions)
        return cls(parser.expression(), parser.slots)

    def run(self, scope: Mapping[str, Any], limits: Limits) -> Any:
        """Evaluate it. Raises one of `FAILURES`, or `Exceeded`."""
        work = Work(limits)
        value = self._code(Frame(scope, self._slots, work))
        if isinstance(value, list | dict):
            work.written(value)
        return value


# Types and equality


_KINDS: Final[Sequence[tuple[type, str]]] = (
    (bool, "bool"),
    (Uint, "uint"),
    (int, "int"),
    (float, "double"),
    (Type, "type"),
    (str, "string"),
    (bytes, "bytes"),
    (list, "list"),
    (dict, "map"),
    (datetime, "timestamp"),
    (timedelta, "duration"),
)


def _kind(value: Any) -> str:
    """Return the name that CEL gives the type of a value."""
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "null")


def equal(one: Any, other: Any, work: Work) -> bool:
    """Tell whether two values are the same: numbers of any type by what they are worth, all else by type and value."""
    if isinstance(one, list | dict):
        if type(one) is not type(other) or len(one) != len(other):
            return False
        work.spend(4 * len(one) + 4)
        return one is other or _equal_inside(one, other, work)
    if _is_number(one) and _is_number(other):
        return bool(one == other)
    _read(one, work)
    return type(one) is type(other) and bool(one == other)


def _equal_inside(one: Any, other: Any, work: Work) -> bool:
    if isinstance(one, list):
        return all(equal(left, right, work) for left, right in zip(one, other, strict=True))
    return all(_has(other, name, work) and equal(item, other[name], work) for name, item in one.items())


def _has(value: dict[Any, Any], key: Any, work: Work) -> bool:
    _read(key, work)
    return key in value


def _read(value: Any, work: Work) -> None:
    """Pay for a scalar that is read to its end."""
    if isinstance(value, str | bytes):
        work.spend(len(value) >> 6)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _key(value: Any) -> Any:
    """A key of an object, so that true and 1 are two."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return (bool, value)
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"a {_kind(value)} cannot be a key; keys are text, whole numbers, true and false")


def shown_key(key: Any) -> Any:
    """A key of an object, as the expression has it."""
    return key[1] if isinstance(key, tuple) else key


def _whole(value: int, kind: type[int], what: str, *operands: int) -> int:
    low, high = (0, 2**64) if kind is Uint else (-(2**63), 2**63)
    if low <= value < high:
        return kind(value)
    for operand in operands:
        if not low <= operand < high:
            raise OverflowError(f"{operand} does not fit 64 bits; it can be passed on but not computed with")
    raise OverflowError(f"{what} gives {value}, which does not fit 64 bits")


# Operators


def _add(one: Any, other: Any, work: Work) -> Any:
    match one, other:
        case str(), str():
            work.text(len(one) + len(other))
            return one + other
        case list(), list():
            work.grown(len(one) + len(other))
            return one + other
        case bytes(), bytes():
            work.text(len(one) + len(other))
            return one + other
        case (datetime(), timedelta()) | (timedelta(), timedelta()):
            return one + other
    return _computed("+", one, other)


def _subtract(one: Any, other: Any, work: Work) -> Any:
    match one, other:
        case (datetime(), timedelta()) | (timedelta(), timedelta()) | (datetime(), datetime()):
            return one - other
    return _computed("-", one, other)


def _computed(sign: str, one: Any, other: Any) -> Any:
    kind = type(one)
    if kind is not type(other) or kind not in (int, float, Uint) or (kind is float and sign == "%"):
        raise TypeError(f"Unsupported operation: {_kind(one)} {sign} {_kind(other)}; {_CONVERT}")
    if kind is float:
        return _fraction(sign, one, other)
    match sign:
        case "+":
            value = int(one) + int(other)
        case "-":
            value = int(one) - int(other)
        case "*":
            value = int(one) * int(other)
        case _:
            if other == 0:
                raise ZeroDivisionError("division by zero")
            # CEL rounds towards zero, Python down.
            value = abs(int(one)) // abs(int(other)) * (1 if (one < 0) == (other < 0) else -1)
            if sign == "%":
                value = int(one) - value * int(other)
    return _whole(value, kind, f"{sign!r}", one, other)


def _fraction(sign: str, one: float, other: float) -> float:
    match sign:
        case "+":
            return one + other
        case "-":
            return one - other
        case "*":
            return one * other
    if other == 0:
        return math.nan if one == 0 or math.isnan(one) else math.copysign(math.inf, one) * math.copysign(1, other)
    return one / other


def _multiply(one: Any, other: Any, work: Work) -> Any:
    return _computed("*", one, other)


def _divide(one: Any, other: Any, work: Work) -> Any:
    return _computed("/", one, other)


def _remainder(one: Any, other: Any, work: Work) -> Any:
    return _computed("%", one, other)


_ORDERED: Final = frozenset(("string", "bytes", "bool", "timestamp", "duration"))


def _compared(test: Callable[[Any, Any], Any], one: Any, other: Any, work: Work) -> bool:
    numbers = _is_number(one) and _is_number(other)
    if not numbers and (_kind(one) != _kind(other) or _kind(one) not in _ORDERED):
        raise TypeError(_NO_FIT)
    _read(one, work)
    return bool(test(one, other))


def _in(one: Any, other: Any, work: Work) -> bool:
    if isinstance(other, dict):
        return _has(other, _key(one), work)
    if not isinstance(other, list):
        raise TypeError(_NO_FIT)
    return work.contains(other, one)


_OPERATORS: Final[Mapping[str, Callable[[Any, Any, Work], Any]]] = {
    "+": _add,
    "-": _subtract,
    "*": _multiply,
    "/": _divide,
    "%": _remainder,
    "==": equal,
    "!=": lambda one, other, work: not equal(one, other, work),
    "<": partial(_compared, operator.lt),
    "<=": partial(_compared, operator.le),
    ">": partial(_compared, operator.gt),
    ">=": partial(_compared, operator.ge),
    "in": _in,
}
_RELATIONS: Final = frozenset(("==", "!=", "<", "<=", ">", ">=", "in"))


def _field(value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise TypeError(_NO_FIT)
    if name not in value:
        raise KeyError(name)
    return value[name]


def _item(value: Any, index: Any, work: Work) -> Any:
    if isinstance(value, dict):
        key = _key(index)
        if not _has(value, key, work):
            raise KeyError(shown_key(key))
        return value[key]
    if not isinstance(value, list):
        raise TypeError(_NO_FIT)
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"an item of a list has a whole number, not a {_kind(index)}")
    if not 0 <= index < len(value):
        raise IndexError(f"index out of bounds: {int(index)}")
    return value[index]


def _yes(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(_NO_FIT)
    return value


def _decided(conditions: Iterable[Code], frame: Frame, decisive: bool) -> bool:
    """The first condition that is `decisive` settles it, whatever failed before; else the first failure is raised."""
    failure: Exception | None = None
    for condition in conditions:
        try:
            if _yes(condition(frame)) is decisive:
                return decisive
        except FAILURES as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return not decisive


def _items(value: Any, work: Work) -> list[Any]:
    """Return the items that a macro goes over."""
    if isinstance(value, dict):
        work.over(len(value))
        return [shown_key(key) for key in value]
    if not isinstance(value, list):
        raise TypeError(_NO_FIT)
    work.over(len(value))
    return value


# Parsing


class _Parser:
    """CEL's grammar by recursive descent; each method compiles what it reads and goes past it.

    It trusts that the text is an expression: CEL's own parser has read it before.
    """

    def __init__(self, tokens: Sequence[Token], functions: Mapping[str, Function]) -> None:
        self._tokens = tokens
        self._functions = functions
        self._at = 0
        self._bound: dict[str, int] = {}
        #: Names that macros bind, each at a place of its own.
        self.slots = 0
        #: Parts so far.
        self._parts = 0

    def expression(self) -> Code:
        chosen = self._either()
        if not self._took("?"):
            return chosen
        yes = self._either()
        self._took(":")
        no = self.expression()
        return lambda frame: yes(frame) if _yes(chosen(frame)) else no(frame)

    def _either(self) -> Code:
        return self._logic("||", self._both, decisive=True)

    def _both(self) -> Code:
        return self._logic("&&", self._relation, decisive=False)

    def _logic(self, sign: str, part: Callable[[], Code], *, decisive: bool) -> Code:
        parts = [part()]
        while self._took(sign):
            parts.append(part())
        if len(parts) == 1:
            return parts[0]

        return lambda frame: _decided(parts, frame, decisive)

    def _relation(self) -> Code:
        return self._chain(_RELATIONS, self._sum)

    def _sum(self) -> Code:
        return self._chain(("+", "-"), self._product)

    def _product(self) -> Code:
        return self._chain(("*", "/", "%"), self._unary)

    def _chain(self, signs: Sequence[str] | frozenset[str], part: Callable[[], Code]) -> Code:
        first = part()
        rest: list[tuple[Callable[[Any, Any, Work], Any], Code]] = []
        while self._text in signs:
            compute = _OPERATORS[self._text]
            self._at += 1
            rest.append((compute, part()))
        if not rest:
            return first
        if len(rest) == 1:
            [(only, second)] = rest
            return lambda frame: only(first(frame), second(frame), frame.work)

        def run(frame: Frame) -> Any:
            value = first(frame)
            for compute, operand in rest:
                value = compute(value, operand(frame), frame.work)
            return value

        return run

    def _unary(self) -> Code:
        self._parts += 1
        if self._text not in ("!", "-"):
            return self._member()
        sign, times = self._text, 0
        while self._took(sign):
            times += 1
        if sign == "-" and self._kind == "number":
            # A sign belongs to its number: the smallest has no positive counterpart.
            number = _number(self._text)
            if isinstance(number, Uint):
                return self._negated(self._member(), times)
            self._tokens = [*self._tokens]
            self._tokens[self._at] = Token("number", f"-{self._text}", self._tokens[self._at].start)
            return self._negated(self._member(), times - 1)
        if sign == "-":
            return self._negated(self._member(), times)
        inner = self._unary()
        odd = times % 2 == 1
        return lambda frame: _yes(inner(frame)) is not odd

    def _negated(self, inner: Code, times: int) -> Code:
        if times == 0:
            return inner

        def run(frame: Frame) -> Any:
            value = inner(frame)
            for _ in range(times):
                if type(value) is float:
                    value = -value
                elif type(value) is int:
                    value = _whole(-value, int, "'-'", value)
                else:
                    raise TypeError(_NO_FIT)
            return value

        return run

    def _member(self) -> Code:
        code = self._primary()
        while True:
            if self._took("."):
                code = self._selected(code)
            elif self._text == "[":
                self._at += 1
                code = self._indexed(code, self.expression())
                self._took("]")
            else:
                return code

    def _indexed(self, code: Code, index: Code) -> Code:
        self._parts += 1
        return lambda frame: _item(code(frame), index(frame), frame.work)

    def _selected(self, code: Code) -> Code:
        self._parts += 1
        name = self._next()
        if not self._took("("):
            return lambda frame: _field(code(frame), name)
        if name in _MACROS and self._tokens[self._at + 1].text == ",":
            return self._macro(name, code)
        return self._call(name, [code, *self._list(")")])

    def _primary(self) -> Code:
        token = self._tokens[self._at]
        self._at += 1
        if token.kind == "string":
            return _constant(_literal(token.text))
        if token.kind == "number":
            return _constant(_number(token.text))
        if token.kind == "name":
            return self._named(token.text)
        return self._bracketed(token.text)

    def _bracketed(self, opened: str) -> Code:
        if opened == "(":
            inner = self.expression()
            self._took(")")
            return inner
        if opened == "[":
            return self._list_literal(self._list("]"))
        if opened == "{":
            return self._map_literal()
        # A dot before a name: the name as it is outside of macros.
        name = self._next()
        return lambda frame: _named(frame, name)

    def _named(self, name: str) -> Code:
        if self._text == "(":
            self._at += 1
            return self._has() if name == "has" else self._call(name, self._list(")"))
        if (dotted := self._dotted(name)) is not None:
            return self._call(dotted, self._list(")"))
        if name in self._bound:
            slot = self._bound[name]
            return lambda frame: frame.slots[slot]
        if name in _CONSTANTS:
            return _constant(_CONSTANTS[name])
        return lambda frame: _named(frame, name)

    def _dotted(self, name: str) -> str | None:
        """A function with a dot in its name, past its bracket."""
        ahead = [token.text for token in self._tokens[self._at : self._at + 3]]
        if len(ahead) < 3 or ahead[0] != "." or ahead[2] != "(" or f"{name}.{ahead[1]}" not in self._functions:
            return None
        self._at += 3
        return f"{name}.{ahead[1]}"

    def _has(self) -> Code:
        start, end = self._at, self._closing(self._at - 1)
        after = end + 1
        while self._tokens[start].text == "(" and self._closing(start) == end - 1:
            start, end = start + 1, end - 1
        if end - start < 3 or self._tokens[end - 2].text != "." or self._tokens[end - 1].kind != "name":
            self._at = after
            return self._call("has", [])
        # The last field is asked for, and what is before it is evaluated.
        name, whole = self._tokens[end - 1].text, self._tokens
        self._tokens, self._at = [*whole[: end - 2], Token("end", "", 0)], start
        inner = self._member()
        alone = self._kind == "end"
        self._tokens, self._at = whole, after
        if not alone:
            return self._call("has", [])

        def run(frame: Frame) -> bool:
            value = inner(frame)
            if not isinstance(value, dict):
                raise TypeError(_NO_FIT)
            return name in value

        return run

    def _closing(self, at: int) -> int:
        """Find where the bracket closes that opens there."""
        depth = 0
        while True:
            depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(self._tokens[at].text, 0)
            if depth == 0:
                return at
            at += 1

    def _call(self, name: str, arguments: list[Code]) -> Code:
        self._parts += 1
        function = self._functions.get(name)
        if function is None:
            function = NATIVE[name] if name in NATIVE else _unfit(name)

        def run(frame: Frame) -> Any:
            return function(frame.work, *[argument(frame) for argument in arguments])

        return run

    def _list(self, end: str) -> list[Code]:
        parts: list[Code] = []
        while not self._took(end):
            parts.append(self.expression())
            self._took(",")
        return parts

    def _list_literal(self, parts: list[Code]) -> Code:
        self._parts += len(parts)

        def run(frame: Frame) -> list[Any]:
            frame.work.grown(len(parts))
            return [part(frame) for part in parts]

        return run

    def _map_literal(self) -> Code:
        entries: list[tuple[Code, Code]] = []
        while not self._took("}"):
            key = self.expression()
            self._took(":")
            entries.append((key, self.expression()))
            self._took(",")
        self._parts += 2 * len(entries)

        def run(frame: Frame) -> dict[Any, Any]:
            frame.work.grown(len(entries))
            return {_key(key(frame)): value(frame) for key, value in entries}

        return run

    def _macro(self, name: str, source: Code) -> Code:
        variable = self._next()
        self._took(",")
        slot, before = self.slots, self._bound
        self.slots += 1
        self._bound = {**before, variable: slot}
        parts = self._parts
        arguments = self._list(")")
        self._bound = before
        return _MACROS[name](source, slot, arguments, self._parts - parts + 1)

    # Tokens

    @property
    def _text(self) -> str:
        return self._tokens[self._at].text if self._at < len(self._tokens) else ""

    @property
    def _kind(self) -> str:
        return self._tokens[self._at].kind if self._at < len(self._tokens) else ""

    def _next(self) -> str:
        text = self._text
        self._at += 1
        return text

    def _took(self, sign: str) -> bool:
        """Go past a sign, if it is there."""
        if self._text != sign:
            return False
        self._at += 1
        return True


_CONSTANTS: Final[Mapping[str, Any]] = {
    "true": True,
    "false": False,
    "null": None,
    **{
        name: Type(name)
        for name in ("bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint")
    },
}


def _constant(value: Any) -> Code:
    return lambda frame: value


def _named(frame: Frame, name: str) -> Any:
    if name not in frame.scope:
        raise Undefined(name)
    return frame.scope[name]


# Macros: each is given what it goes over, where its item is kept, its other arguments, and the steps of one round


def _map(source: Code, slot: int, arguments: list[Code], steps: int) -> Code:
    *conditions, body = arguments

    def run(frame: Frame) -> list[Any]:
        built = []
        slots, spend = frame.slots, frame.work.spend
        for item in _items(source(frame), frame.work):
            spend(steps)
            slots[slot] = item
            if all(_yes(condition(frame)) for condition in conditions):
                built.append(body(frame))
        frame.work.grown(len(built))
        return built

    return run


def _filter(source: Code, slot: int, arguments: list[Code], steps: int) -> Code:
    [condition] = arguments

    def run(frame: Frame) -> list[Any]:
        built = []
        slots, spend = frame.slots, frame.work.spend
        for item in _items(source(frame), frame.work):
            spend(steps)
            slots[slot] = item
            if _yes(condition(frame)):
                built.append(item)
        frame.work.grown(len(built))
        return built

    return run


def _quantified(decisive: bool) -> Callable[[Code, int, list[Code], int], Code]:
    def macro(source: Code, slot: int, arguments: list[Code], steps: int) -> Code:
        [condition] = arguments

        def per_item(frame: Frame) -> Iterator[Code]:
            slots, spend = frame.slots, frame.work.spend
            for item in _items(source(frame), frame.work):
                spend(steps)
                slots[slot] = item
                yield condition

        return lambda frame: _decided(per_item(frame), frame, decisive)

    return macro


def _exists_one(source: Code, slot: int, arguments: list[Code], steps: int) -> Code:
    found = _filter(source, slot, arguments, steps)
    return lambda frame: len(found(frame)) == 1


_MACROS: Final[Mapping[str, Callable[[Code, int, list[Code], int], Code]]] = {
    "all": _quantified(False),
    "exists": _quantified(True),
    "exists_one": _exists_one,
    "existsOne": _exists_one,
    "map": _map,
    "filter": _filter,
}


# Literals

_ESCAPES: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_ESCAPE: Final = re.compile(r"\\(?:[xX]([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)


def _literal(text: str) -> str | bytes:
    prefix = text[: min(text.index(quote) for quote in "\"'" if quote in text)].lower()
    body = text[len(prefix) :]
    width = 3 if body[:3] in ('"""', "'''") and len(body) >= 6 else 1
    body = body[width : len(body) - width]
    if width == 3:
        # The ends of lines are the same on each system.
        body = body.replace("\r\n", "\n").replace("\r", "\n")
    if "b" in prefix:
        return body.encode() if "r" in prefix else b"".join(_bytes(body))
    return body if "r" in prefix else _ESCAPE.sub(_unescaped, body)


def _unescaped(match: re.Match[str]) -> str:
    *numbers, octal, character = match.groups()
    number = next((int(one, 16) for one in numbers if one), None)
    if number is None and octal:
        number = int(octal, 8)
    return chr(number) if number is not None else _ESCAPES.get(character, character)


def _bytes(body: str) -> Iterator[bytes]:
    at = 0
    for match in _ESCAPE.finditer(body):
        yield body[at : match.start()].encode()
        number = int(match[1], 16) if match[1] else int(match[4], 8) if match[4] else None
        yield _unescaped(match).encode() if number is None else bytes([number])
        at = match.end()
    yield body[at:].encode()


def _number(text: str) -> int | float:
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    if digits[-1] in "uU":
        return Uint(int(digits[:-1], 16 if "x" in digits else 10))
    if "x" in digits:
        return sign * int(digits, 16)
    return sign * (int(digits) if digits.isdigit() else float(digits))


# Functions of CEL itself


def _unfit(name: str) -> Function:
    def refuse(work: Work, *arguments: Any) -> Any:
        raise TypeError(f"{name}() does not take these values, or not so many")

    return refuse


def _native(*kinds: type | tuple[type, ...]) -> Callable[[Function], Function]:
    """A function of these arguments and no others; a text that is read is paid for."""

    def decorate(function: Function) -> Function:
        refuse = _unfit(function.__name__.strip("_"))

        def checked(work: Work, *arguments: Any) -> Any:
            if len(arguments) != len(kinds):
                return refuse(work)
            for argument, kind in zip(arguments, kinds, strict=True):
                if not isinstance(argument, kind) or isinstance(argument, bool | Type):
                    return refuse(work)
                if isinstance(argument, str | bytes):
                    work.spend(len(argument) >> 6)
            return function(work, *arguments)

        return checked

    return decorate


@_native((str, bytes, list, dict))
def _size(work: Work, value: Any) -> int:
    return len(value)


@_native(str, str)
def _contains(work: Work, text: str, part: str) -> bool:
    return part in text


@_native(str, str)
def _starts_with(work: Work, text: str, part: str) -> bool:
    return text.startswith(part)


@_native(str, str)
def _ends_with(work: Work, text: str, part: str) -> bool:
    return text.endswith(part)


@_native(str, str)
def _matches(work: Work, text: str, pattern: str) -> bool:
    try:
        found = cel_pattern(pattern)
        # A step is about a tenth of a microsecond.
        work.spend(10 * found.price(text))
        return found.search(text)
    except PatternError as error:
        raise ValueError(str(error)) from error


@_native((str, bytes))
def _bytes_of(work: Work, value: str | bytes) -> bytes:
    work.build(len(value))
    return value.encode() if isinstance(value, str) else value


@_native((str, float, int))
def _int(work: Work, value: Any) -> int:
    return _whole(_truncated(value, "int"), int, "int(…)")


@_native((str, float, int))
def _uint(work: Work, value: Any) -> int:
    if isinstance(value, float) and value < 0:
        raise OverflowError(f"uint({value}) does not fit 64 bits")
    return _whole(_truncated(value, "uint"), Uint, "uint(…)")


def _truncated(value: Any, name: str) -> int:
    if isinstance(value, str):
        if not re.fullmatch(r"[+-]?[0-9]{1,40}", value):
            raise ValueError(f"{name}() takes a text of digits, this is {value[:100]!r}")
        return int(value)
    if isinstance(value, float) and not -1e30 < value < 1e30:
        raise OverflowError(f"{name}({value}) does not fit 64 bits")
    return int(value)


@_native((str, float, int))
def _double(work: Work, value: Any) -> float:
    if isinstance(value, str) and not re.fullmatch(r"(?i)[+-]?([0-9.]+(e[+-]?[0-9]+)?|inf|infinity|nan)", value):
        raise ValueError(f"double() takes a number as text, this is {value[:100]!r}")
    return float(value)


def _dyn(work: Work, *arguments: Any) -> Any:
    return arguments[0] if len(arguments) == 1 else _unfit("dyn")(work)


_TYPE_NAMES: Final = {
    "null": "null_type",
    "timestamp": "google.protobuf.Timestamp",
    "duration": "google.protobuf.Duration",
}


def _type(work: Work, *arguments: Any) -> Any:
    if len(arguments) != 1:
        return _unfit("type")(work)
    kind = _kind(arguments[0])
    return Type(_TYPE_NAMES.get(kind, kind))


@lru_cache(maxsize=64)
def _in_rust(call: str) -> Any:
    return compile_cel(call)


def spelled(value: Any) -> str:
    """A fraction, bytes, a point in time or a duration, as `string(…)` spells it."""
    if isinstance(value, timedelta) and value < timedelta():
        return f"-{spelled(-value)}"
    return str(_in_rust("string(value)").execute({"value": value}))


def _of_time(name: str, method: bool, *kinds: type) -> Function:
    def call(work: Work, value: Any) -> Any:
        work.spend(100)
        try:
            return _in_rust(f"value.{name}()" if method else f"{name}(value)").execute({"value": value})
        except RuntimeError as error:
            return _not_read(name, value, error)

    call.__name__ = name
    return _native(kinds)(call)


def _not_read(name: str, value: Any, error: Exception) -> Any:
    if isinstance(value, str):
        raise ValueError(f"{name}() cannot read {value[:100]!r}") from error
    raise TypeError(f"{name}() does not take these values, or not so many") from error


#: Functions of CEL itself; a call is the same as a method and as a function.
NATIVE: Final[Mapping[str, Function]] = {
    "size": _size,
    "contains": _contains,
    "startsWith": _starts_with,
    "endsWith": _ends_with,
    "matches": _matches,
    "bytes": _bytes_of,
    "int": _int,
    "uint": _uint,
    "double": _double,
    "dyn": _dyn,
    "type": _type,
    "timestamp": _of_time("timestamp", False, str, datetime),
    "duration": _of_time("duration", False, str, timedelta),
    **{
        name: _of_time(name, True, datetime)
        for name in ("getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear", "getMonth")
    },
    **{
        name: _of_time(name, True, datetime, timedelta)
        for name in ("getHours", "getMilliseconds", "getMinutes", "getSeconds")
    },
}

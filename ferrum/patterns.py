"""Regular expressions that others wrote, in time that grows with the text: by the engine that comes with CEL.

Python's own engine tries one way after the other, and a pattern such as `^(a|a)*$` has it try for ever. The one here,
Rust's `regex`, goes over a text once. It has no look-around and no back-references; a pattern that needs them is
refused when it is read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Final

# The package imports its interactive command line, prompt_toolkit and all: fifteen times as long as the rest of it.
_COMMAND_LINE: Final = ModuleType("cel.cli")
sys.modules.setdefault("cel.cli", _COMMAND_LINE)
import cel  # noqa: E402
from cel.stdlib import STDLIB_FUNCTIONS  # noqa: E402

if sys.modules["cel.cli"] is _COMMAND_LINE:
    del sys.modules["cel.cli"]

#: Longest pattern, in characters.
MAX_PATTERN: Final = 4_000
#: Most work of reading a pattern, in the units of `Pattern.cost`: what is said with `{1,1000}` is written out by the
#: engine, each time that it is asked.
MAX_COST: Final = 100_000

#: The package's own, to be had from here: it must not be imported before what stands above.
compile_cel: Final = cel.compile
STDLIB: Final[Mapping[str, Callable[..., Any]]] = STDLIB_FUNCTIONS

_MATCHES: Final = compile_cel("text.matches(pattern)")


class PatternError(ValueError):
    """A pattern that is none, or that cannot be looked for in linear time; it says why."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pattern, ready to be looked for."""

    #: As its author wrote it.
    source: str
    #: As the engine reads it.
    rust: str
    #: What reading it takes, in microseconds of a usual processor.
    cost: int
    #: How many places of the pattern the engine may be in at once.
    places: int

    def search(self, text: str) -> bool:
        """Tell whether it is found anywhere in a text."""
        return _asked(self.rust, text)

    def price(self, text: str) -> int:
        """Return the most that looking for it in a text takes, in the units of `cost`."""
        return self.cost + len(text) * (self.places + 1) // 200


@lru_cache(maxsize=1024)
def schema_pattern(source: str) -> Pattern:
    """The `pattern` of a JSON Schema, an ECMA-262 expression.

    Raises `PatternError` for look-around, back-references, and all that ECMA-262 does not know either.
    """
    _bounded(source)
    rust = "".join(_ecma(piece, source) for piece in _pieces(source))
    return _tried(source, rust, heavy=7)


@lru_cache(maxsize=1024)
def cel_pattern(source: str) -> Pattern:
    """The pattern of `matches()` in an expression. Raises `PatternError`."""
    _bounded(source)
    return _tried(source, source, heavy=300)


def _bounded(source: str) -> None:
    if len(source) > MAX_PATTERN:
        raise PatternError(f"the pattern {_shown(source)} is longer than {MAX_PATTERN} characters")


def _tried(source: str, rust: str, heavy: int) -> Pattern:
    cost, places = _weighed(source, heavy)
    if cost > MAX_COST:
        raise PatternError(f"the pattern {_shown(source)} repeats too much, all in all")
    try:
        _asked(rust, "")
    except PatternError as error:
        raise PatternError(f"the pattern {_shown(source)} cannot be used: {error}") from error
    return Pattern(source, rust, cost, places)


def _asked(rust: str, text: str) -> bool:
    try:
        return bool(_MATCHES.execute({"text": text, "pattern": rust}))
    except RuntimeError as error:
        raise PatternError(_plainly(str(error))) from error
    except UnicodeEncodeError:
        # JSON's escapes can say half of a character. No pattern has one.
        return _asked(rust, text.encode(errors="replace").decode())


def _plainly(message: str) -> str:
    if "size limit" in message:
        return "it repeats too much"
    found = re.search(r"error: ([^\n]*)", message[:20_000].rpartition("\n")[2])
    return found[1].removesuffix(". Check function arguments and their types.").rstrip(".") if found else "no pattern"


def _shown(source: str) -> str:
    return repr(source if len(source) <= 100 else source[:100] + "…")


# Reading a pattern: as much of the grammar as it takes to say it in the engine's words

_PIECE: Final = re.compile(
    r"""
      (?P<escape>  \\(?:u\{[0-9a-fA-F]{1,6}\}|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}
                   |x[0-9a-fA-F]{2}|c[A-Za-z]|[pP]\{[^{}]{0,50}\}|.) )
    | (?P<group>   \((?:\?(?:<?[=!]|:|<[A-Za-z_][A-Za-z0-9_]{0,50}>|i\)|i:))? )
    | (?P<count>   \{\d{1,6}(?:,\d{0,6})?\}\?? )
    | (?P<many>    [*+?]\?? )
    | (?P<plain>   . )
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class _Piece:
    kind: str
    text: str
    #: What stands in a class `[…]`, without its brackets.
    inside: tuple[_Piece, ...] = ()


def _pieces(source: str) -> Iterator[_Piece]:
    found = _PIECE.finditer(source)
    before = ""
    for match in found:
        piece = _Piece(str(match.lastgroup), match[0])
        if piece.text == "[":
            piece = _class(found, source)
        if piece.kind in ("many", "count") and before in ("many", "count"):
            raise PatternError(
                f"the pattern {_shown(source)} cannot be used: there is nothing that {piece.text} repeats"
            )
        before = piece.kind
        yield piece


def _class(found: Iterator[re.Match[str]], source: str) -> _Piece:
    inside: list[_Piece] = []
    for match in found:
        if match["plain"] == "]":
            negated = bool(inside) and inside[0].text == "^"
            return _Piece("class", "[^" if negated else "[", tuple(inside[negated:]))
        if match.lastgroup == "escape":
            inside.append(_Piece("escape", match[0]))
            continue
        # What means something outside is a list of characters here, and a `]` may stand in the middle of it: `(?<]`.
        inside += [_Piece("plain", character) for character in match[0]]
    raise PatternError(f"the pattern {_shown(source)} cannot be used: a class [ without its ]")


_CLASSES: Final = {
    "d": "0-9",
    "w": "0-9A-Za-z_",
    "s": r"\t\n\x0b\x0c\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}",
}
_CONTROLS: Final = {"t": "\t", "n": "\n", "v": "\x0b", "f": "\x0c", "r": "\r", "0": "\x00"}


def _ecma(piece: _Piece, source: str) -> str:
    """A piece of an ECMA-262 expression in the words of Rust's `regex`."""
    match piece.kind:
        case "escape":
            return _escape(piece.text, source)
        case "class":
            return _said_class(piece, source)
        case "group":
            if piece.text.endswith(("=", "!")):
                raise PatternError(f"the pattern {_shown(source)} cannot be used: look-around is not supported")
            return piece.text
        case "count" | "many":
            return piece.text
    if piece.text == ".":
        return r"[^\n\r\x{2028}\x{2029}]"
    return piece.text if piece.text in ")|^$" else _literal(piece.text)


def _escape(text: str, source: str) -> str:
    name = text[1]
    if name in "bB" and len(text) == 2:
        return f"(?-u:{text})"
    if name in "123456789k":
        raise PatternError(f"the pattern {_shown(source)} cannot be used: back-references are not supported")
    if (inside := _CLASSES.get(name.lower())) and len(text) == 2:
        return f"[{'^' if name.isupper() else ''}{inside}]"
    return text if _is_property(text) else _literal(_character(text, source))


def _said_class(piece: _Piece, source: str) -> str:
    if not piece.inside:
        # `[]` finds nothing, and `[^]` anything.
        return r"[\x00-\x{10ffff}]" if piece.text == "[^" else r"[a&&b]"
    said = [_in_class(one, source) for one in piece.inside]
    for at, one in enumerate(piece.inside):
        if one == _Piece("plain", "-") and not _is_range(piece.inside, at):
            said[at] = r"\-"
    return piece.text + "".join(said) + "]"


def _is_range(inside: tuple[_Piece, ...], at: int) -> bool:
    return 0 < at < len(inside) - 1 and not any(_is_set(inside[beside]) for beside in (at - 1, at + 1))


def _is_set(piece: _Piece) -> bool:
    return piece.kind == "escape" and (_is_property(piece.text) or piece.text[1] in "dDwWsS")


def _in_class(piece: _Piece, source: str) -> str:
    text = piece.text
    if piece.kind == "plain":
        return "-" if text == "-" else _literal(text)
    if text == r"\b":
        return r"\x08"
    if _is_set(piece):
        return text if _is_property(text) else _escape(text, source)
    return _literal(_character(text, source))


def _is_property(text: str) -> bool:
    return text[1] in "pP" and text.endswith("}")


def _character(text: str, source: str) -> str:
    """The one character that an escape stands for."""
    name = text[1]
    if name == "c" and len(text) == 3:
        return chr(ord(text[2]) % 32)
    if name in "ux" and len(text) > 2:
        return _by_number(text, source)
    if name in _CONTROLS:
        return _CONTROLS[name]
    if name.isascii() and name.isalnum():
        raise PatternError(f"the pattern {_shown(source)} cannot be used: {text} means nothing in ECMA-262")
    return name


def _by_number(text: str, source: str) -> str:
    numbers = [int(part.strip("{}"), 16) for part in re.split(r"\\[ux]", text)[1:]]
    number = numbers[0]
    if len(numbers) == 2:
        number = 0x10000 + ((number - 0xD800) << 10) + (numbers[1] - 0xDC00)
    if 0xD800 <= number < 0xE000 or number > 0x10FFFF:
        raise PatternError(f"the pattern {_shown(source)} cannot be used: {text} is no character")
    return chr(number)


def _literal(character: str) -> str:
    if character.isascii() and character.isalnum():
        return character
    if 0xD800 <= ord(character) < 0xE000:
        raise PatternError("the pattern cannot be used: it holds half of a character")
    return rf"\x{{{ord(character):x}}}"


# Weighing a pattern


def _weighed(source: str, heavy: int) -> tuple[int, int]:
    """Return the cost of the engine's reading of a pattern, and its number of places, with counted repetitions."""
    # A level for each open group: (twice the cost, places) of all of it and of its last part.
    levels: list[list[tuple[int, int]]] = [[(30, 0), (0, 0)]]
    for piece in _pieces(source):
        if piece.kind == "group":
            levels.append([(0, 0), (0, 0)])
            continue
        if piece.text == ")" and len(levels) > 1:
            inside = levels.pop()
            _append(levels[-1], (inside[0][0] + inside[1][0], inside[0][1] + inside[1][1] + 1))
        elif piece.kind == "count":
            times = max(map(int, re.findall(r"\d+", piece.text))) + 1
            cost, places = levels[-1][1]
            levels[-1][1] = (cost * times, places * times)
        elif piece.kind != "many":
            _append(levels[-1], (2 * heavy if _is_heavy(piece) else 1, 1))
    whole = [part for level in levels for part in level]
    return sum(cost for cost, _ in whole) // 2, sum(places for _, places in whole)


def _append(level: list[tuple[int, int]], part: tuple[int, int]) -> None:
    (cost, places), (last_cost, last_places) = level
    level[:] = [(cost + last_cost, places + last_places), part]


def _is_heavy(piece: _Piece) -> bool:
    """Tell whether a part stands for thousands of characters, each in the one to four bytes that the engine goes by."""
    if piece.kind == "class":
        return piece.text == "[^" or any(map(_is_heavy, piece.inside))
    if piece.kind == "escape":
        return piece.text[1] in "dDwWsSpP"
    return piece.text == "." or not piece.text.isascii()

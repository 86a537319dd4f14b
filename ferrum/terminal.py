"""Foreign text on a person's terminal: all of it is seen, none of it steers, and none of it passes for ours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Final
from unicodedata import category, east_asian_width

#: Before each visual line of quoted text. Plain ASCII, so that it is as wide everywhere.
MARK: Final = "  | "
#: Printable by the letter of Unicode, and nothing is seen of them.
_UNSEEN: Final = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
#: More accents on one letter than any language writes: they paint over the lines above.
_ACCENTS: Final = 4
#: A terminal that says it is narrower than this does not know.
_NARROWEST: Final = 20


def visible(text: str) -> str:
    """Text from elsewhere, safe for a terminal; it keeps its lines.

    Whatever would steer the terminal, turn the writing around or not be seen at all is written out as an escape.
    """
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    if text.isascii():
        return "".join(one if " " <= one <= "~" or one == "\n" else _escape(one) for one in text)
    return "".join(_seen(text))


def _seen(text: str) -> Iterator[str]:
    accents = 0
    for one in text:
        accents = accents + 1 if category(one) in ("Mn", "Me") else 0
        selects = "\ufe00" <= one <= "\ufe0f" or "\U000e0100" <= one <= "\U000e01ef"
        safe = one.isprintable() and one not in _UNSEEN and not selects and accents <= _ACCENTS
        yield one if safe or one == "\n" else _escape(one)


def _escape(one: str) -> str:
    return ascii(one)[1:-1]


def quoted(text: str, width: int | None = None, mark: str = MARK) -> str:
    """Text from elsewhere as a quotation: whole, and each line that a person sees begins with the mark.

    It is broken at `width` columns, else at those of the terminal (80 where there is none): a line that the terminal
    broke would begin with whatever the text has there, and look like one of ours.
    """
    room = max(_NARROWEST, width or shutil.get_terminal_size().columns) - len(mark)
    lines = visible(text).strip("\n").split("\n")
    return "\n".join((mark + piece).rstrip() for line in lines for piece in _broken(line, room))


def _broken(line: str, room: int) -> Iterator[str]:
    """Pieces of one line, each of which fits."""
    start, used = 0, 0
    for place, one in enumerate(line):
        wide = _columns(one)
        if used + wide > room:
            yield line[start:place]
            start, used = place, 0
        used += wide
    yield line[start:]


def _columns(one: str) -> int:
    """The most columns that a terminal gives it."""
    if one.isascii():
        return 1
    if category(one) in ("Mn", "Me"):
        return 0
    # Ambiguous: two where the terminal is an East Asian one.
    return 2 if east_asian_width(one) in "WFA" else 1

"""How documents are cut: by what they consist of, and never into more than can be embedded at once.

Markdown is cut at its headings, Python at its definitions (by its own grammar), other languages where a definition
begins at the start of a line, everything else between paragraphs. A piece is always a slice of its text; what is too
long is cut again, between paragraphs, lines, sentences or words, the first of these that can be had.
"""

from __future__ import annotations

import ast
import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, takewhile
from typing import Final

from pydantic import JsonValue

from ferrum.retrieval import extract
from ferrum.retrieval.documents import HTML, PYTHON, Original
from ferrum.retrieval.store import Chunk

MARKDOWN: Final = frozenset({".md", ".markdown", ".mdx"})
CODE: Final = frozenset(
    re.findall(
        r"\S+",
        ".bash .c .cc .cpp .cs .cxx .dart .ex .exs .go .h .hpp .java .js .jsx .kt .kts .lua .mjs .php .pl .proto .r "
        ".rb .rs .scala .sh .sql .swift .ts .tsx .zig .zsh",
    )
)

#: Neighbours that are together no longer than this share of the bound are one piece.
_SMALL: Final = 1 / 5


#: The most characters of a piece, where nothing else is said: about what small embedders look at.
MAX_CHARS: Final = 1000
#: What may be said instead.
FEWEST, MOST = 100, 20_000

#: Where a paragraph had to be cut in two, up to this share of the bound is in both pieces.
_OVERLAP: Final = 1 / 10


@dataclass(frozen=True, slots=True)
class _Section:
    """A part of a text that belongs together: from `start` up to `end`, in characters."""

    start: int
    end: int
    #: The headings that it stands under, the outermost first.
    headings: tuple[str, ...] = ()
    #: What is defined there, as it would be named from outside: `Class.method`.
    name: str = ""


def cut(original: Original, max_chars: int = MAX_CHARS) -> list[Chunk]:
    """The pieces of a document, in order, none of them empty and none longer than `max_chars`.

    What is given as text is no PDF, whatever it is called. Raises `InputError` for what is no text, for pages without
    any, and for PDF and HTML without the extra that reads them.
    """
    if original.suffix in extract.PDF and isinstance(original.content, bytes):
        parts = enumerate(extract.pages(original, original.content), 1)
        return [chunk for page, text in parts for chunk in _chunks(text, _plain(text), max_chars, {"page": page})]
    if original.suffix in HTML and extract.is_html(original.text):
        text = extract.markdown(original)
        return list(_chunks(text, _markdown(text, max_chars), max_chars, {}))
    text = original.text
    return list(_chunks(text, _sections(original.suffix, text, max_chars), max_chars, None))


def _sections(suffix: str, text: str, max_chars: int) -> list[_Section]:
    if suffix in MARKDOWN:
        return _markdown(text, max_chars)
    if suffix in PYTHON:
        return _python(text, max_chars)
    return _code(text) if suffix in CODE else _plain(text)


def _chunks(text: str, sections: list[_Section], max_chars: int, place: dict[str, JsonValue] | None) -> Iterator[Chunk]:
    """`place` is where all of it is; `None` where that is said by lines."""
    lines = _line_starts(text)
    for section in sections:
        for start, end in _pieces(text, section, max_chars):
            piece = text[start:end]
            position: dict[str, JsonValue] = {} if place is None else {**place}
            if place is None:
                position |= {"line": bisect_right(lines, start), "end_line": bisect_right(lines, end - 1)}
            if section.headings:
                position["heading"] = " > ".join(section.headings)
            if section.name:
                position["name"] = section.name
            above = [one for one in section.headings if one not in piece]
            if section.name and section.name not in piece:
                above.append(section.name)
            subject = "\n".join([" > ".join(above), piece]) if above else piece
            yield Chunk(piece, subject, hashlib.sha256(subject.encode()).hexdigest(), position)


# Sections.


def _plain(text: str) -> list[_Section]:
    return [_Section(0, len(text))]


_FENCE: Final = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_HEADING: Final = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
_CLOSING: Final = re.compile(r"(?:^|[ \t])#+[ \t]*$")
_UNDERLINE: Final = re.compile(r" {0,3}(=+|-+)[ \t]*")
#: What a line that an underline makes a heading cannot be: a list, a quote, a table, code, another heading.
_NO_TITLE: Final = re.compile(r"\s*$|    |\t| {0,3}(?:[-*+>|#]|\d+[.)])")


def _markdown(text: str, max_chars: int) -> list[_Section]:
    """A section for each heading (CommonMark 4.2 and 4.3), from it to the next."""
    starts = _line_starts(text)
    found = [(0, 0, ""), *((starts[line], level, title) for line, level, title in _titles(text.split("\n")))]
    sections, path = [], list[tuple[int, str]]()
    for (start, level, title), (end, _, _) in pairwise([*found, (len(text), 0, "")]):
        if title:
            path = [*((deep, above) for deep, above in path if deep < level), (level, title)]
        sections.append(_Section(start, end, tuple(title for _, title in path)))
    return _joined(sections, int(max_chars * _SMALL))


#: Each piece under a heading says it, and its place does.
_LONGEST_TITLE: Final = 200


def _titles(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """The line, the level and the words of each heading."""
    fence = ""
    for at in range(_front_matter(lines), len(lines)):
        line = lines[at]
        if mark := _FENCE.fullmatch(line):
            if not fence and not (mark[1][0] == "`" and "`" in mark[2]):
                fence = mark[1]
            elif fence and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        elif fence:
            continue
        elif (heading := _HEADING.fullmatch(line)) and (title := _CLOSING.sub("", heading[2]).strip()):
            yield at, len(heading[1]), title[:_LONGEST_TITLE]
        elif (under := _UNDERLINE.fullmatch(line)) and at and not _NO_TITLE.match(lines[at - 1]):
            # Of several lines above an underline, the last stands for all.
            yield at - 1, 1 if under[1][0] == "=" else 2, lines[at - 1].strip()[:_LONGEST_TITLE]


def _front_matter(lines: list[str]) -> int:
    """The line after the metadata that many tools put at the top, between two lines of `---`."""
    if lines[0].rstrip() != "---":
        return 0
    return next((at + 1 for at in range(1, len(lines)) if lines[at].rstrip() in ("---", "...")), 0)


def _joined(sections: list[_Section], small: int) -> list[_Section]:
    """Neighbours put together while they are small: a title alone finds nothing."""
    joined: list[_Section] = []
    for section in sections:
        if joined and section.end - joined[-1].start <= small:
            last = joined[-1]
            # An empty beginning is under no heading, and takes none from what follows.
            shared = section.headings if not last.headings else _shared(last.headings, section.headings)
            joined[-1] = replace(last, end=section.end, headings=shared)
        else:
            joined.append(section)
    return joined


def _shared(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _python(text: str, max_chars: int) -> list[_Section]:
    """A section for each function and class, and for what stands between them; a long class is cut at its methods."""
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _code(text)
    lines = text.split("\n")
    return list(_Source(lines, [*_line_starts(text), len(text)], max_chars).sections(module, 0, len(text), ""))


@dataclass(frozen=True, slots=True)
class _Source:
    """A source of Python."""

    lines: list[str]
    #: Where each line begins, and the end of the text.
    starts: list[int]
    #: A class above this is cut.
    longest: int

    def sections(self, inside: ast.Module | ast.ClassDef, start: int, end: int, outer: str) -> Iterator[_Section]:
        for node in inside.body:
            if not isinstance(node, _Definition):
                continue
            first, last = self.starts[self._first(node)], self.starts[node.end_lineno or node.lineno]
            # Of several on one line, after semicolons, the first has taken the line.
            if first < start:
                continue
            if first > start:
                yield _Section(start, first, name=outer)
            name = f"{outer}.{node.name}".lstrip(".")[:_LONGEST_TITLE]
            if isinstance(node, ast.ClassDef) and last - first > self.longest:
                yield from self.sections(node, first, last, name)
            else:
                yield _Section(first, last, name=name)
            start = last
        if start < end:
            yield _Section(start, end, name=outer)

    def _first(self, node: _Definition) -> int:
        """The line, from 0, on which a definition begins, with its decorators and the comment right above."""
        at = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
        while at and self.lines[at - 1].lstrip().startswith("#"):
            at -= 1
        return at


_BEGINS: Final = re.compile(
    r"(?:(?:export|default|pub(?:\([\w:]+\))?|public|private|protected|internal|static|async|final|abstract|sealed|open|"
    r"data|override|unsafe|extern|inline|partial|declare|local|case)\s+)*"
    r"(?:function\*?|class|interface|struct|enum|union|trait|impl|fn|func|fun|type|typedef|def|defmodule|module|namespace|"
    r"object|record|protocol|extension|mod|macro_rules!|message|service|sub|create(?:\s+or\s+replace)?\s+\w+)\b"
    r"\s*(?:<[^>]*>\s*|\([^)]*\)\s*)?(?P<name>[\w$:.]+)?"
    # A function of C and its like, of a shell, or one that is the value of a name.
    r"|(?:[A-Za-z_][\w:<>,&*\s]*[\s&*])?(?P<c>[A-Za-z_~][\w:~]*)\s*\([^;]*$"
    r"|(?:export\s+)?(?:const|let|var)\s+(?P<js>[\w$]+)\s*=\s*(?:async\s*)?(?:function\b|\(.*=>|\w+\s*=>)",
    re.IGNORECASE,
)
#: So much of a line says what it begins; a file of one long line is not searched in vain.
_BEGINNING: Final = 300
#: Lines that belong to the definition under them.
_ABOVE: Final = re.compile(r"(?://|/\*|\*|#|--|@|\[|\s+\*)")
_FLOW: Final = frozenset({"if", "for", "while", "switch", "return", "else", "catch", "sizeof", "case", "do", "until"})


def _code(text: str) -> list[_Section]:
    """A section for each definition that begins at the start of a line, from it to the next."""
    lines, starts = text.split("\n"), _line_starts(text)
    found = [(0, "")]
    for at, line in enumerate(lines):
        begins = _BEGINS.match(line[:_BEGINNING])
        name = begins and (begins["name"] or begins["c"] or begins["js"])
        if not name or name.lower() in _FLOW:
            continue
        while at and _ABOVE.match(lines[at - 1]):
            at -= 1  # noqa: PLW2901
        if starts[at] >= found[-1][0]:
            found.append((starts[at], name))
    return [
        _Section(start, end, name=name)
        for (start, name), (end, _) in pairwise([*found, (len(text), "")])
        if start < end
    ]


def _line_starts(text: str) -> list[int]:
    return [0, *accumulate(len(line) + 1 for line in text.split("\n")[:-1])]


# Pieces.

_INK: Final = re.compile(r"\S")
_PARAGRAPH: Final = re.compile(r"\n[^\S\n]*\n")
_LINE: Final = re.compile(r"\n")
_SENTENCE: Final = re.compile(r"[.!?…。！？][)\"'”’]*(?:\s|(?<=[。！？]))")
_WORD: Final = re.compile(r"\s")
#: Where a text is best cut, the best first; and where what is said again may begin.
_BOUNDARIES: Final = ((_PARAGRAPH, None), (_LINE, _LINE), (_SENTENCE, _WORD), (_WORD, _WORD))


def _pieces(text: str, section: _Section, max_chars: int) -> Iterator[tuple[int, int]]:
    """Where each piece of a section begins and ends; a piece begins with a line that is not blank."""
    start, end = section.start, section.start + len(text[section.start : section.end].rstrip())
    while start < end:
        start = _inked(text, start, end, max_chars)
        if end - start <= max_chars:
            stop, following = end, end
        else:
            stop, following = _stop(text, start, max_chars)
        if text[start:stop].strip():
            yield start, start + len(text[start:stop].rstrip())
        start = following


def _inked(text: str, start: int, end: int, max_chars: int) -> int:
    """The beginning of the first line from `start` on that is not blank; in it, where its blanks would fill a piece."""
    found = _INK.search(text, start, end)
    ink = found.start() if found else end
    start = max(start, text.rfind("\n", start, ink) + 1)
    return start if ink - start < max_chars else ink


def _stop(text: str, start: int, max_chars: int) -> tuple[int, int]:
    """Where a piece that begins at `start` ends, and where the next one begins: a little before, within a paragraph."""
    # A first third is too short to be a piece of its own, if it can be helped.
    least, most = start + max_chars // 3, start + max_chars
    for boundary, again in _BOUNDARIES:
        ends = [found.end() for found in boundary.finditer(text, least, most)]
        if ends:
            return ends[-1], _back(text, ends[-1], max_chars, again)
    return most, _back(text, most, max_chars, _WORD)


def _back(text: str, stop: int, max_chars: int, again: re.Pattern[str] | None) -> int:
    found = again.search(text, stop - int(max_chars * _OVERLAP), stop) if again else None
    return found.end() if found else stop

"""What is read into an index: files, patterns of files, standard input, or texts that somebody has."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, Final

from pydantic import JsonValue

from ferrum.errors import InputError
from ferrum.retrieval.store import SOURCE

#: A file above this is no document.
LARGEST: Final = 64 * 2**20
#: Source names are shown, kept and compared.
LONGEST_NAME: Final = 1000

_SURROGATES: Final = re.compile("[\ud800-\udfff]")

#: Folders that hold no documents; so does everything whose name begins with a dot.
_NOT_READ: Final = frozenset({"node_modules", "__pycache__"})

#: Taken into every digest. A change in how documents are read or cut changes it, and they are all cut anew.
_EDITION: Final = 2

PYTHON: Final = frozenset({".py", ".pyi"})
HTML: Final = frozenset({".html", ".htm", ".xhtml"})

#: The longer ones first: that of UTF-32 begins as that of UTF-16 does.
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
#: How Python says in one of its first two lines what it is encoded in (PEP 263).
_CODING: Final = re.compile(rb"\A(?:[ \t\f]*(?:#[^\r\n]*)?\r?\n)?[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
#: How HTML says it at its beginning.
_CHARSET: Final = re.compile(
    rb"""<(?:meta\b[^>]*?\bcharset|\?xml\b[^>]*?\bencoding)\s*=\s*["']?\s*([-\w.:]+)""", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Original:
    """A document as it was given. The end of its name says what it is: `.md`, `.py`, `.pdf`, …; else it is plain text.

    Raises `InputError` for a name or metadata that cannot be kept.
    """

    name: str
    content: bytes | str
    metadata: Mapping[str, JsonValue] = field(default_factory=dict)
    #: What was asked for when it was read; documents of the same origin are pruned together.
    origin: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_metadata(self.metadata, self.name)

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1].lower()  # noqa: PTH122 - it may be a URL

    @property
    def text(self) -> str:
        """Its text with plain line ends. Raises `InputError` for what is no text, or in who knows what encoding."""
        if isinstance(self.content, str):
            return clean(self.content)
        encoding, mark = _encoding(self.content, self.suffix)
        if b"\0" in self.content[:8192] and not mark:
            raise InputError(f"{self.name!r} is no text: leave it out, or convert it first")
        try:
            return clean(self.content[len(mark) :].decode(encoding))
        except (UnicodeError, LookupError):
            said = "" if encoding == "utf-8" else f", and not the {encoding} that it says it is"
        raise InputError(f"{self.name!r} is not UTF-8{said}: convert it first, as with iconv -f LATIN1 -t UTF-8")

    def digest(self, *ways: JsonValue) -> str:
        """sha256 over all that its chunks are made from; `ways` is how they are."""
        content = self.content.encode("utf-8", "replace") if isinstance(self.content, str) else self.content
        facts = json.dumps([_EDITION, self.suffix, self.metadata, ways], sort_keys=True)
        return hashlib.sha256(facts.encode() + b"\0" + content).hexdigest()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that is there and was not read."""

    name: str
    #: For people.
    why: str


def clean(text: str) -> str:
    """Text that every store can keep: line ends are `\\n`, and what is no character is `�`."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "�")
    return text if text.isascii() else _SURROGATES.sub("�", text)


def _encoding(content: bytes, suffix: str) -> tuple[str, bytes]:
    """What a file is encoded in, as far as it says, and the mark by which it begins."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return encoding, mark
    said = _CODING.match(content) if suffix in PYTHON else _CHARSET.search(content[:1024]) if suffix in HTML else None
    encoding = said[1].decode("ascii", "replace").lower() if said else "utf-8"
    if suffix in HTML:
        # By the HTML standard (13.2.3.2 and its labels): who reads this can read it, so it is not UTF-16; and what is
        # called Latin-1 is what Windows understands by it.
        encoding = "utf-8" if encoding.startswith("utf") else encoding
        encoding = "cp1252" if encoding in ("iso-8859-1", "latin-1", "latin1", "ascii", "us-ascii") else encoding
    return encoding, b""


def read(
    asked: Sequence[str],
    *,
    metadata: Mapping[str, JsonValue] | None = None,
    stdin: BinaryIO | None = None,
    stdin_name: str = "stdin",
) -> Iterator[Original | LeftOut]:
    """The documents of these files, folders and patterns (`docs/**/*.md`), in order; `-` is `stdin`.

    Of folders everything is read but hidden files and what is no text. Raises `InputError` for one that does not exist
    or that matches nothing, and for a file that was named and cannot be read.
    """
    for one in asked:
        if one == "-":
            if stdin is None:
                raise InputError("'-' stands for standard input, and there is none")
            yield Original(stdin_name, stdin.read(), metadata or {}, "-")
            continue
        origin = origin_of(one)
        paths = _paths(one, origin)
        for path in paths:
            yield _document(path, metadata or {}, origin, named=paths == [origin])


def origin_of(asked: str) -> str:
    """The `origin` of all that `read` finds for one of the things that it is asked for."""
    return asked if asked == "-" else os.path.normpath(asked)


def count(asked: Sequence[str]) -> int:
    """How many documents `read` will come to. Raises `InputError` as that does, before anything is read."""
    return sum(1 if one == "-" else len(_paths(one, origin_of(one))) for one in asked)


def _paths(asked: str, origin: str) -> list[str]:
    if os.path.isdir(origin):  # noqa: PTH112 - patterns are texts
        return list(_walk(origin))
    if os.path.lexists(origin):
        return [origin]
    found = _matches(origin)
    if not found:
        raise InputError(f"{asked!r}: there is no such file or folder, and as a pattern it matches nothing")
    return found


def _matches(pattern: str) -> list[str]:
    """The files that a pattern matches; it follows no links to folders, so it comes to an end."""
    parts = Path(pattern).parts
    fixed = list(takewhile(lambda part: not glob.has_magic(part), parts))
    if len(fixed) == len(parts):
        return []
    top = Path(*fixed)
    found = (path for path in top.glob(str(Path(*parts[len(fixed) :]))) if path.is_file())
    return sorted(str(path) for path in found if all(map(_is_read, path.relative_to(top).parts)))


def _is_read(name: str) -> bool:
    return not name.startswith(".") and name not in _NOT_READ


def _walk(folder: str) -> Iterator[str]:
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(filter(_is_read, folders))
        yield from (os.path.normpath(Path(at) / name) for name in sorted(filter(_is_read, files)))


def _document(path: str, metadata: Mapping[str, JsonValue], origin: str, *, named: bool) -> Original | LeftOut:
    name = path.replace(os.sep, "/")
    try:
        return Original(name, _content(path), metadata, origin)
    except InputError as error:
        if named:
            raise
        return LeftOut(name, str(error))


def _content(path: str) -> bytes:
    try:
        if not os.path.isfile(path):  # noqa: PTH113
            raise InputError(f"{path!r} is no file that can be read")
        with open(path, "rb") as file:  # noqa: PTH123
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise InputError(f"{path!r} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST:
        raise InputError(f"{path!r} has more than {LARGEST // 2**20} MiB: cut it into several files")
    return content


def check_name(name: str) -> None:
    """Raises `InputError` for what cannot be the name of a source."""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise InputError(
            f"{name[:80]!r} cannot be the name of a source: it has 1 to {LONGEST_NAME} characters that can be printed"
        )


def check_metadata(metadata: Mapping[str, JsonValue], where: str) -> None:
    """Raises `InputError` for what filters could not ask for."""
    for key, value in metadata.items():
        if not key or len(key) > 100 or not key.isprintable() or key == SOURCE:
            raise InputError(
                f"metadata {key[:80]!r} of {where!r}: a name has 1 to 100 characters that can be printed, and is not "
                f"{SOURCE!r}, which stands for the document's own name"
            )
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, str | int | float | bool | None) or item != item or item in _INFINITE:  # noqa: PLR0124
                raise InputError(
                    f"metadata {key!r} of {where!r} is a text, a number, true, false, null, or a list of these; "
                    f"got {type(item).__name__}"
                )


_INFINITE: Final = (float("inf"), float("-inf"))

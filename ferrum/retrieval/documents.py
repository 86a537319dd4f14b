"""What is read into an index: files, patterns of files, standard input, or texts that somebody has."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, Final, Self

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
    #: The path of its file, absolute and without links on the way; `-` for standard input; else whatever it is that
    #: groups documents that are pruned together.
    origin: str = ""
    #: Whether it was asked for by itself: then it is an error that it cannot be taken, else it is left out.
    named: bool = False

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
    """A document that was not taken."""

    name: str
    #: For people.
    why: str
    #: As that of an `Original`.
    origin: str = ""


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
    if suffix in PYTHON:
        # Emacs says line ends there, too, and Python takes no notice.
        encoding = re.sub(r"-(?:unix|dos|mac)$", "", encoding)
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

    Of folders everything is read but hidden files and what is no text; links that lead out of a folder, or out of where
    a pattern begins, are left out. A file that was named is read wherever it leads. Raises `InputError` for what does
    not exist or matches nothing, and for a file that was named and cannot be read.
    """
    for one in asked:
        if one == "-":
            if stdin is None:
                raise InputError("'-' stands for standard input, and there is none")
            yield Original(stdin_name, stdin.read(), metadata or {}, "-", named=True)
            continue
        place = Place.of(one)
        for path in place.files():
            yield _document(path, metadata or {}, place)


def count(asked: Sequence[str]) -> int:
    """How many documents `read` will come to. Raises `InputError` as that does, before anything is read."""
    return sum(1 if one == "-" else len(Place.of(one).files()) for one in asked)


def absent(asked: Sequence[str]) -> list[str]:
    """Those of which there is nothing now. Raises `InputError` for what could never be something."""
    return [one for one in asked if one != "-" and not Place.of(one).is_there()]


def not_there(asked: str, then: str) -> InputError:
    return InputError(f"{asked!r}: there is no such file or folder, and as a pattern it matches nothing{then}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where `read` looks for one of the things that it is asked for."""

    asked: str
    #: The file or folder, or the folder in which a pattern begins: absolute, and without links on the way.
    top: str
    #: How files are to be called, from `top` on; empty where it is no pattern.
    pattern: tuple[str, ...] = ()

    @classmethod
    def of(cls, asked: str) -> Self:
        """Raises `InputError` for nothing, which would be the whole current directory to the system."""
        if not asked:
            raise InputError("'' names no file or folder: write . for the current directory")
        path = os.path.normpath(asked)
        parts = Path(path).parts
        fixed = list(takewhile(lambda part: not glob.has_magic(part), parts))
        if len(fixed) == len(parts) or os.path.lexists(path):
            return cls(asked, os.path.realpath(path) if os.path.isdir(path) else _entry(path))  # noqa: PTH112
        return cls(asked, os.path.realpath(Path(*fixed)), parts[len(fixed) :])

    @property
    def is_file(self) -> bool:
        return not self.pattern and not os.path.isdir(self.top)  # noqa: PTH112

    def is_there(self) -> bool:
        return bool(self._matches()) if self.pattern else os.path.lexists(self.top)

    def files(self) -> list[str]:
        """Their paths as they were asked for, in order. Raises `InputError` where there is nothing."""
        path = os.path.normpath(self.asked)
        if not self.is_file and not self.pattern:
            return list(_walk(path))
        found = self._matches() if self.pattern else [path] if self.is_there() else []
        if not found:
            raise not_there(self.asked, "")
        return found

    def _matches(self) -> list[str]:
        """The files that a pattern matches; `**` follows no links to folders, so it comes to an end."""
        top = Path(*Path(os.path.normpath(self.asked)).parts[: -len(self.pattern)])
        return sorted(str(top / path) for path in _matching(str(top), self.pattern))

    def covers(self, origin: str) -> bool:
        """Whether a document of this origin would be found here, if it were there."""
        if origin == self.top:
            return not self.pattern
        parts = _below(self.top, origin)
        return parts is not None and all(map(_is_read, parts)) and (not self.pattern or _fits(parts, self.pattern))

    def holds(self, path: str) -> bool:
        """Whether a file that was found here is here, and its path is no link to elsewhere or to what is not read."""
        real = os.path.realpath(path)
        parts = _below(self.top, real)
        return real == self.top if parts is None else all(map(_is_read, parts))


def _entry(path: str) -> str:
    """The absolute path without links on the way; what it leads to may be one itself."""
    folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118


def _below(folder: str, path: str) -> tuple[str, ...] | None:
    inside = path.startswith(folder.rstrip(os.sep) + os.sep)
    return Path(path[len(folder) :].lstrip(os.sep)).parts if inside else None


def _matching(top: str, pattern: tuple[str, ...]) -> Iterator[str]:
    """The paths, from `top` on, of the files that a pattern matches: each folder is read once, whatever it says.

    `Path.glob` goes through all that is below once more for each `**`.
    """
    left = [("", os.path.realpath(top), _free(pattern, {0}), frozenset[str]())]
    while left:
        folder, real, reached, followed = left.pop()
        for entry in _entries(os.path.join(top, folder)):  # noqa: PTH118
            named = {at + 1 for at in reached if at < len(pattern) and _is(entry.name, pattern[at])}
            under = {at for at in reached if pattern[at : at + 1] == ("**",)}
            path = os.path.join(folder, entry.name)  # noqa: PTH118
            if not entry.is_dir():
                if len(pattern) in _free(pattern, named | under) and entry.is_file():
                    yield path
            elif not entry.is_symlink():
                if on := _free(pattern, named | under):
                    left.append((path, os.path.join(real, entry.name), on, followed))  # noqa: PTH118
            elif on := _free(pattern, named):
                target = os.path.realpath(entry.path)
                # Else what is there would be gone through again within itself.
                if target not in followed and _below(target, os.path.join(real, "x")) is None:  # noqa: PTH118
                    left.append((path, target, on, followed | {target}))


def _free(pattern: tuple[str, ...], reached: set[int]) -> frozenset[int]:
    """The places in a pattern that are reached with those: `**` may stand for nothing."""
    found = set(reached)
    for start in sorted(reached):
        at = start
        while pattern[at : at + 1] == ("**",):
            at += 1
            found.add(at)
    return frozenset(found)


def _is(name: str, part: str) -> bool:
    return part != "**" and fnmatchcase(name, part)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """All of a folder that is read; nothing of one that cannot be."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if _is_read(entry.name)]
    except OSError:
        return []


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    # How many of the parts what is read of the pattern may stand for.
    reached = {0}
    for name in pattern:
        if name == "**":
            reached = set(range(min(reached), len(parts) + 1))
        else:
            reached = {at + 1 for at in reached if at < len(parts) and fnmatchcase(parts[at], name)}
        if not reached:
            return False
    return len(parts) in reached


def _is_read(name: str) -> bool:
    return not name.startswith(".") and name not in _NOT_READ


def _walk(folder: str) -> Iterator[str]:
    """The files of a folder and of those in it, and the folders that cannot be read."""
    unread: list[OSError] = []
    for at, folders, files in os.walk(folder, onerror=unread.append):
        folders[:] = sorted(filter(_is_read, folders))
        yield from (os.path.normpath(Path(at) / name) for name in sorted(filter(_is_read, files)))
    yield from (os.path.normpath(error.filename) for error in unread)


def _document(path: str, metadata: Mapping[str, JsonValue], place: Place) -> Original | LeftOut:
    name, origin = path.replace(os.sep, "/"), _entry(path)
    try:
        if not place.is_file and not place.holds(path):
            raise InputError(f"{path!r} is a link that leads out of {place.asked!r}, or to what is hidden there")
        return Original(name, _content(path), metadata, origin, named=place.is_file)
    except InputError as error:
        if place.is_file:
            raise
        return LeftOut(name.encode("utf-8", "backslashreplace").decode(), str(error), origin)


def _content(path: str) -> bytes:
    try:
        kind = os.stat(path).st_mode  # noqa: PTH116
        if stat.S_ISDIR(kind):
            raise InputError(f"{path!r} is a folder that cannot be read: what is in the index of it stays")
        if not stat.S_ISREG(kind):
            raise InputError(f"{path!r} is {_KINDS.get(stat.S_IFMT(kind), 'no file')}, and no file that can be read")
        with open(path, "rb") as file:  # noqa: PTH123
            content = file.read(LARGEST + 1)
    except FileNotFoundError as error:
        gone = "is a link to what is not there" if os.path.islink(path) else "is gone"  # noqa: PTH114
        raise InputError(f"{path!r} {gone}") from error
    except OSError as error:
        raise InputError(f"{path!r} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST:
        raise InputError(f"{path!r} has more than {LARGEST // 2**20} MiB: cut it into several files")
    return content


_KINDS: Final = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_name(name: str) -> None:
    """Raises `InputError` for what cannot be the name of a source."""
    if _SURROGATES.search(name):
        raise InputError(f"{name[:80]!r} has a name that is not UTF-8: rename it")
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

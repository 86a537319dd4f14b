"""Files that are found by their default name: believed once a person has seen them.

The directory that one stands in may be a stranger's, and its `ferrum.policy.yaml` and `ferrum.servers.yaml` say what
may happen and which programs a tool is. So such a file is believed as it was when somebody trusted it, in the place
where it was. A file that a setting names needs no trust: who can write this process's environment can do more.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ferrum.errors import SettingsError
from ferrum.local.home import own, read_own
from ferrum.settings import Settings

POLICY: Final = Path("ferrum.policy.yaml")
SERVERS: Final = Path("ferrum.servers.yaml")

#: The setting that names another file instead.
_SETTINGS: Final = {POLICY: "FERRUM_POLICY", SERVERS: "FERRUM_SERVERS"}
#: Nobody reads more than that before a yes.
_LONGEST: Final = 2**20


@dataclass(frozen=True, slots=True)
class Found:
    """A file that was found by its default name, as it is now."""

    path: Path
    content: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """Raises `SettingsError` where it is none."""
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SettingsError(f"{self.path}: is not UTF-8 text") from error

    @property
    def digest(self) -> str:
        """Of the place and the content: the same servers file starts other programs in another directory."""
        return hashlib.sha256(os.fsencode(self.path) + b"\0" + self.content).hexdigest()

    def trusted(self, home: Path) -> bool:
        """Tell if somebody has seen it as it is now. Raises `Unavailable` for a home that others may have written."""
        mark = _mark(own(home), self)
        # Where others may write, they may give a mark of ours another name.
        own(mark.parent)
        return read_own(mark) is not None

    def trust(self, home: Path) -> None:
        """Remember it as it is now. Raises `Unavailable` where the home cannot be written."""
        mark = _mark(own(home, make=True), self)
        mark.parent.mkdir(mode=0o700, exist_ok=True)
        mark.touch(mode=0o600)
        mark.write_bytes(os.fsencode(self.path))

    def distrust(self) -> SettingsError:
        """The error of one that nobody has trusted."""
        name = Path(self.path.name)
        return SettingsError(
            f"{self.path} was found by its name, and nobody has said that it can be trusted as it is now: "
            f"look at it, then 'ferrum trust {self.path.parent}', or name it with {_SETTINGS[name]}"
        )


def find(directory: Path) -> Iterator[Found]:
    """The files of a directory that would be found by their names."""
    for name in _SETTINGS:
        if found := _find(directory / name):
            yield found


def untrusted(settings: Settings) -> Iterator[Found]:
    """The files that a worker which is started here would not believe."""
    unnamed = {
        POLICY: settings.policy is None,
        SERVERS: settings.servers is None and settings.mcp_servers is None,
    }
    for name, by_name in unnamed.items():
        if by_name and (found := _find(name)) and not found.trusted(settings.home):
            yield found


def read_trusted(name: Path, settings: Settings) -> str | None:
    """The text of a file of the working directory that has its default name; `None` where there is none.

    Raises `SettingsError` for one that nobody has trusted as it is now.
    """
    found = _find(name)
    if found is None:
        return None
    if not found.trusted(settings.home):
        raise found.distrust()
    return found.text


def _find(path: Path) -> Found | None:
    path = path.absolute().parent.resolve() / path.name
    try:
        # A pipe of that name would hold up whoever opens it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SettingsError(f"{path}: is not a file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(_LONGEST + 1)
    finally:
        os.close(descriptor)
    if len(content) > _LONGEST:
        raise SettingsError(f"{path}: is larger than {_LONGEST:,} bytes; name it with {_SETTINGS[Path(path.name)]}")
    return Found(path, content)


def _mark(home: Path, found: Found) -> Path:
    return home / "trusted" / found.digest

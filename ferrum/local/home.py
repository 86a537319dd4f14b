"""The home: believed where nobody else can have written it.

It holds a password, addresses and code, and it may be named in a place that others can write to (`/tmp/ferrum`), where
someone else may have been first.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

from ferrum.errors import Unavailable


def own(home: Path, *, make: bool = False) -> Path:
    """`home`, absolute, once it is sure that only this user and root can have written it; made if `make`.

    Raises `Unavailable` for one that belongs to someone else or that others may write to, or that is below such a
    directory, unless only the owners of what is in that may change it (the sticky bit, as of `/tmp`).
    """
    home = home.absolute()
    if make:
        _make(home)
    place, followed = home, 0
    while True:
        link = None
        for path in (*reversed(place.parents), place):
            if (problem := _problem(path, last=path == place)) is not None:
                raise Unavailable(f"the home {str(place)!r} cannot be trusted: {problem}; {_REMEDY}")
            if path.is_symlink():
                link = path
                break
        if link is None:
            return home
        # One link after the other: each lies in a directory of its own, where others may put another one.
        followed += 1
        if followed > _MOST_LINKS:
            raise Unavailable(f"the home {str(home)!r} cannot be trusted: its links have no end; {_REMEDY}")
        place = link.parent / link.readlink() / place.relative_to(link)


def read_own(path: Path) -> bytes | None:
    """The content of a file of the home; `None` where there is none.

    Raises `Unavailable` where someone else owns it or may write to it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}; {_REMEDY}") from error
    try:
        found = os.fstat(descriptor)
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o022 or not stat.S_ISREG(found.st_mode):
            raise Unavailable(f"{path} cannot be trusted: others own it or may write to it; {_REMEDY}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


#: As many as Linux follows.
_MOST_LINKS = 40
_REMEDY = "remove it, or name a directory that only you can write to with FERRUM_HOME"


def _make(home: Path) -> None:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(
            f"the directory {str(home)!r} cannot be made: {error.strerror}; name another one with FERRUM_HOME"
        ) from error


def _problem(path: Path, *, last: bool) -> str | None:
    try:
        found = path.lstat()
    except OSError:
        # What is not there holds nothing, and what cannot be looked at is said by whoever opens it.
        return None
    if found.st_uid not in (os.geteuid(), 0):
        return f"{str(path)!r} belongs to {_name_of(found.st_uid)}"
    if stat.S_ISLNK(found.st_mode):
        return None
    loose = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid))
    if loose and (last or not found.st_mode & stat.S_ISVTX):
        return f"others may write to {str(path)!r}"
    return None


def _name_of(user: int) -> str:
    try:
        return f"the user {pwd.getpwuid(user).pw_name!r}"
    except KeyError:
        return f"the user {user}"


def _is_private(group: int) -> bool:
    """Tell whether only this user and root are in a group: where each user has one, files are writable by it."""
    if group == 0:
        return True
    try:
        us, members = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return us.pw_gid == group and us.pw_name == members.gr_name and set(members.gr_mem) <= {us.pw_name}

"""Lets another user of this machine reach what a root worker has in places that are its own.

A root worker starts sandboxes as a user that may read the interpreter, but often cannot get to it: the directory
`/root` above it is closed. So the thread that starts sandboxes gets a view of its own of the file system (a mount
namespace, which ends with it), in which such a directory is covered by an empty one that holds the interpreter and
nothing else. The machine's own view is not touched, and what else was in there is hidden all the better.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ferrum.sandbox.backend import Missing

_CLONE_NEWNS = 0x20000
_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000


class Reach:
    """Belongs to one thread, from the first time that it is asked to make something reachable."""

    def __init__(self) -> None:
        self._made: set[str] = set()
        #: The closed directories that are covered by now, as they were.
        self._covered: dict[Path, int] = {}

    def make(self, paths: Iterable[str], uid: int) -> None:
        """Let `uid` get to these. Raises `Missing` where we may not do that."""
        for path in paths:
            if path not in self._made:
                closed = next((covered for covered in self._covered if covered in Path(path).parents), None)
                closed = closed or _closed(Path(path))
                if closed is not None:
                    self._open(closed, Path(path), uid)
                self._made.add(path)

    def close(self) -> None:
        """Nothing can be made reachable any more; what was is until its thread ends."""
        while self._covered:
            os.close(self._covered.popitem()[1])

    def _open(self, closed: Path, path: Path, uid: int) -> None:
        try:
            if not self._covered:
                libc("unshare", _CLONE_NEWNS)
                # What is mounted on the machine later is seen here too, but nothing of ours there.
                _mount("none", "/", "", _MS_REC | _MS_SLAVE)
            if closed not in self._covered:
                self._covered[closed] = os.open(closed, os.O_PATH | os.O_DIRECTORY)
                _mount("tmpfs", str(closed), "tmpfs", 0, "mode=755")
            source = f"/proc/thread-self/fd/{self._covered[closed]}/{path.relative_to(closed)}"
            _place(path, is_directory=Path(source).is_dir())
            _mount(source, str(path), "", _MS_BIND | _MS_REC)
        except PermissionError as error:
            raise Missing(
                f"sandboxes of a root worker run as user {uid}, who cannot get to {str(path)!r} because "
                f"{str(closed)!r} is closed to others: run the worker as an ordinary user, or with a Python that is "
                "installed for all"
            ) from error


def _closed(path: Path) -> Path | None:
    """The uppermost directory above a path that others may not pass through."""
    for directory in reversed(path.parents):
        if not directory.stat().st_mode & stat.S_IXOTH:
            return directory
    return None


def _place(path: Path, is_directory: bool) -> None:
    """Something to mount on."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if is_directory:
        path.mkdir(mode=0o755, exist_ok=True)
    else:
        path.touch(mode=0o644)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    libc("mount", source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)


def libc(name: str, *arguments: object) -> None:
    """Call a function of the C library; raises `OSError` for what it returns but 0."""
    if getattr(_LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")

"""What a root file system consists of for the backends that want one as a directory or an image.

Nothing but places to mount on, links into `/usr`, and an `/etc` that knows nobody. All of it is in one directory of
this process, which is gone with it: what a process left that was killed is removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ferrum.local.process import take_lock
from ferrum.sandbox.backend import Missing
from ferrum.sandbox.bubblewrap import ETC, MERGED
from ferrum.sandbox.runtimes import Runtime

#: What `/usr` alone leaves out: where libraries are, and which of several programs is meant (`awk`).
_ALSO = ("/etc/ld.so.cache", "/etc/alternatives")
_EMPTY = ("proc", "dev", "sys", "tmp", "job", "run", "usr", "etc", "etc/alternatives")


class Ours:
    """A directory that lives as long as this process or until it is closed, and that others may look into."""

    def __init__(self, kind: str, left: Callable[[Path], None] = lambda path: None) -> None:
        """`left` is called with each directory of a process that is dead, before it is removed.

        Raises `Missing` where there is no place for it.
        """
        base = Path(tempfile.gettempdir(), f"ferrum-{kind}-{os.geteuid()}")
        try:
            base.mkdir(mode=0o755, exist_ok=True)
            if base.lstat().st_uid != os.geteuid() or base.is_symlink():
                raise Missing(f"{base} belongs to somebody else: remove it, or set TMPDIR to a directory of yours")
            for old in base.iterdir():
                _sweep(old, left)
            self.path = Path(tempfile.mkdtemp(dir=base))
            lock = take_lock(self.path / "lock")
            assert lock is not None
            self._lock = lock
            self.path.chmod(0o755)
        except OSError as error:
            raise Missing(f"a sandbox needs a temporary directory, and {base} cannot be used: {error}") from error

    def directory(self, name: str) -> Path:
        """A new directory in it, which everyone can read whatever the umask."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o755)
        return path

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(old: Path, left: Callable[[Path], None]) -> None:
    try:
        lock = os.open(old / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # Somebody is making it just now, or it is going away.
        return
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left(old)
        shutil.rmtree(old, ignore_errors=True)
    os.close(lock)


def fill(root: Path) -> None:
    """Make the root file system, in an empty directory."""
    for name in _EMPTY:
        _directory(root / name)
    for name in ("job", "tmp"):
        # runc gives what is mounted the mode of what it is mounted on.
        (root / name).chmod(0o1777)
    for name, content in ETC.items():
        _file(root / "etc" / name, content)
    for name in MERGED:
        if (outside := Path("/", name)).is_symlink():
            (root / name).symlink_to(outside.readlink())


def mounts(runtime: Runtime, ours: Ours) -> Iterator[tuple[str, str]]:
    """All that is seen read-only: where it is outside and inside, in the order in which it has to be mounted."""
    yield "/usr", "/usr"
    for name in MERGED:
        if (outside := Path("/", name)).is_dir() and not outside.is_symlink():
            yield str(outside), str(outside)
    for path in _ALSO:
        if Path(path).exists():
            yield path, path
    # What the operator has installed is not for others to see, unless it is the interpreter.
    yield str(_local(runtime, ours)), "/usr/local"
    for path in runtime.mounts:
        yield path, path
    yield from runtime.placed
    for path in runtime.hidden:
        yield str(ours.directory("empty")), path


def points(root: Path, runtime: Runtime, ours: Ours) -> None:
    """Make all that is mounted on, where it is not in something that is mounted itself."""
    for outside, inside in mounts(runtime, ours):
        if inside not in runtime.hidden and not inside.startswith("/usr/"):
            _point(root / inside.lstrip("/"), Path(outside))


def _local(runtime: Runtime, ours: Ours) -> Path:
    """An `/usr/local` with the interpreter and nothing else."""
    local = ours.directory(f"local-{abs(hash((runtime.interpreter, runtime.mounts)))}")
    _directory(local / "bin")
    within = [path for path in runtime.mounts if path.startswith("/usr/local/")]
    for path in within:
        _point(local / path.removeprefix("/usr/local/"), Path(path))
    for name in ("python", "python3"):
        if not within and not (local / "bin" / name).is_symlink():
            (local / "bin" / name).symlink_to(runtime.interpreter)
    return local


def _point(path: Path, like: Path) -> None:
    if like.is_dir():
        _directory(path)
    elif not path.exists():
        _directory(path.parent)
        _file(path, b"")


def _directory(path: Path) -> None:
    if not path.is_dir():
        _directory(path.parent)
        path.mkdir(exist_ok=True)
        path.chmod(0o755)


def _file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o644)

"""Child processes that leave no orphans, locks that end with their holder, and the ends of logs."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_TIED = Path(__file__).with_name("tied.py")
_TAIL_BYTES = 2_000
_LOG_MAX_BYTES = 10_000_000


def tied(command: Sequence[str]) -> list[str]:
    """`command`, such that on Linux the kernel kills it when the thread that starts it dies; elsewhere as it is."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", str(_TIED), str(os.getpid()), *command]


def findable(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that let an interpreter find a ferrum in a checkout, beside its `PYTHONPATH`, if any.

    For `python -P`, which does not look where it stands.
    """
    home = Path(__file__).resolve().parents[2]
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    if home in installed:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (environ.get("PYTHONPATH"), str(home))))}


def end(process: subprocess.Popen[bytes], by: signal.Signals, patience_s: float) -> int:
    """Send a signal, wait, and kill what is still there after `patience_s`; the exit code."""
    process.send_signal(by)
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def take_lock(path: Path, patience_s: float = 0) -> int | None:
    """A descriptor that holds the lock on `path` until it and its copies in children are closed; `None` if taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            os.close(descriptor)
            return None
        return descriptor


def log_size(path: Path) -> int:
    """How long a log is by now; 0 for one that is not there."""
    return path.stat().st_size if path.exists() else 0


def tail(path: Path, since: int = 0) -> str:
    """The last lines of a log, none of them from before `since` bytes; empty for one that is not there."""
    size = log_size(path)
    start = max(since if since <= size else 0, size - _TAIL_BYTES)
    if start >= size:
        return ""
    with path.open("rb") as log:
        log.seek(start)
        text = log.read().decode(errors="replace")
    return (text.partition("\n")[2] if start > since else text).rstrip()


def open_log(path: Path) -> int:
    """A descriptor that appends to a log; one that has grown beyond 10 MB makes way as `….1` first."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log_size(path) > _LOG_MAX_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

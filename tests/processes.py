"""Which processes a test has left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def of(directory: Path) -> list[str]:
    """The processes that were told of this directory, by their environment or command line, or that are in it."""
    if sys.platform != "linux":
        listed = subprocess.run(["ps", "-Aww", "-o", "pid=,command="], capture_output=True, text=True, check=True)
        return [line for line in listed.stdout.splitlines() if str(directory) in line]
    return [one for one in Path("/proc").iterdir() if one.name.isdigit() for one in _told(one, directory)]


def _told(process: Path, directory: Path) -> list[str]:
    if int(process.name) == os.getpid():
        return []
    try:
        command = process.joinpath("cmdline").read_bytes()
        known = command + process.joinpath("environ").read_bytes() + os.fsencode(process.joinpath("cwd").readlink())
    except OSError:
        # It has ended, or is not ours.
        return []
    # What has ended and was not waited for has no command line any more.
    return [f"{process.name} {command.decode()!r}"] if command and os.fsencode(directory) in known else []


def descendants(pid: int) -> list[int]:
    """The processes below this one."""
    below: dict[int, list[int]] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            # What has ended meanwhile has no parent.
            with suppress(OSError):
                parent = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1])
                below.setdefault(parent, []).append(int(process.name))
    found: list[int] = []
    left = [pid]
    while left:
        found += (children := below.get(left.pop(), []))
        left += children
    return found


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

"""Limits that the kernel itself holds for a whole sandbox, where a part of the cgroup v2 tree is ours to write.

That is so where systemd runs the worker with `Delegate=yes` and `DelegateSubgroup=worker`, and for root on a machine
that is not a container. Elsewhere the watchdog of PID 1 bounds memory.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from ferrum.sandbox.backend import Box

_CONTROLLERS = ("memory", "pids", "cpu")
#: PID 1 is in there too, and a Python.
_OUR_OWN = 32 * 2**20
_OUR_PROCESSES = 4
_PERIOD_US = 100_000
_PATIENCE_S = 2.0


class Cgroups:
    """A directory of the tree in which groups for sandboxes can be made."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._count = 0
        self._sweep()

    @classmethod
    def find(cls) -> Cgroups | None:
        """Where there is such a directory and its groups can have limits."""
        for parent in _candidates():
            with suppress(OSError):
                if not set(_CONTROLLERS) <= set(parent.joinpath("cgroup.controllers").read_text().split()):
                    continue
                control = parent / "cgroup.subtree_control"
                if not set(_CONTROLLERS) <= set(control.read_text().split()):
                    control.write_text(" ".join(f"+{name}" for name in _CONTROLLERS))
                return cls(parent)
        return None

    def make(self, box: Box) -> Cgroup:
        self._count += 1
        path = self._parent / f"ferrum-sandbox-{os.getpid()}-{self._count}"
        path.mkdir()
        limits = {
            "memory.max": str(box.memory + box.disk + _OUR_OWN),
            "memory.swap.max": "0",
            # All of it or nothing: a half of a program is no use.
            "memory.oom.group": "1",
            "pids.max": str(box.processes + _OUR_PROCESSES),
            "cpu.max": f"{int(box.cpus * _PERIOD_US)} {_PERIOD_US}",
        }
        try:
            for name, value in limits.items():
                # There is no swap file where the kernel has no swap.
                if name != "memory.swap.max" or (path / name).exists():
                    (path / name).write_text(value)
        except OSError:
            path.rmdir()
            raise
        return Cgroup(path)

    def _sweep(self) -> None:
        """Remove what workers left that were killed: empty by now, for their sandboxes died with them."""
        for path in self._parent.glob("ferrum-sandbox-*-*"):
            if not Path("/proc", path.name.split("-")[2]).exists():
                with suppress(OSError):
                    path.rmdir()


class Cgroup:
    """The group of one sandbox."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, pid: int) -> None:
        """Put a process in, and with it what it will start."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def ran_out_of_memory(self) -> bool:
        return any(int(self._counts("memory.events").get(name, "0")) for name in ("oom_kill", "oom_group_kill"))

    def peak_memory(self) -> int | None:
        """`None` before Linux 5.19, which has no such count."""
        try:
            return int((self.path / "memory.peak").read_text())
        except OSError:
            return None

    def remove(self) -> None:
        """Called when all in it are dead; the kernel may take a moment to know."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.path.exists():
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.001)

    def _counts(self, name: str) -> dict[str, str]:
        try:
            return dict(line.split() for line in (self.path / name).read_text().splitlines())
        except OSError:
            return {}


def _candidates() -> list[Path]:
    """The group above ours, for one that has processes may have no groups with limits; or the root, which may."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::") for line in groups if line.startswith("0::")), None)
    root = next((line.split()[4] for line in mounts if line.partition(" - ")[2].startswith("cgroup2 ")), None)
    if own is None or root is None:
        return []
    return [Path(root) if own == "/" else Path(root, own.lstrip("/")).parent]

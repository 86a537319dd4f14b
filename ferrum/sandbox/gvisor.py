"""The backend `gvisor`: a kernel of its own for each sandbox, written in Go, through `runsc`.

What code does reaches the host's kernel only as the few system calls that gVisor's makes. `runsc` is run rootless, also
by a root worker, which gives each sandbox a user of its own: nothing of it is ever the host's root.

gVisor holds neither memory nor processor by itself: our PID 1 watches memory inside, as it does everywhere, and all of
it runs on the cores that the sandbox may use.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from pydantic import JsonValue

from ferrum.sandbox import program, seccomp, skeleton
from ferrum.sandbox.backend import Backend, Box, Cell, Kind, MemoryBy, Missing, Unconfined
from ferrum.sandbox.bubblewrap import NOBODY, Cores
from ferrum.sandbox.held import Holder, loose, shared, status
from ferrum.sandbox.reach import Reach
from ferrum.sandbox.user import User, borrowed

_INSTALL = "apt install runsc (Debian 12 and newer), or https://gvisor.dev/docs/user_guide/install"
_PATIENCE_S = 5.0
_RIGHTS = ("CAP_KILL", "CAP_SETUID", "CAP_SETGID")
_RLIMITS = ("RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "RLIMIT_SIGPENDING")
_ABOVE = 2**20
#: What gVisor's kernel has to have of its own on the host; it has a PID namespace of its own making inside.
_NAMESPACES = ("user", "net", "mnt", "ipc", "uts")


class GVisor(Backend):
    kind = Kind.GVISOR

    def __init__(self) -> None:
        self._reach = Reach()
        self._cores = Cores()
        self._turns = itertools.count()
        self._ours: skeleton.Ours | None = None

    def check(self) -> None:
        if sys.platform != "linux":
            raise Missing("gVisor is for Linux only: run the workers that execute code on Linux")
        if not shutil.which("runsc"):
            raise Missing(f"there is no runsc on PATH: {_INSTALL}")

    def start(self, box: Box) -> Cell:
        # This thread, and with it what it starts; nobody inside may change it.
        os.sched_setaffinity(0, self._cores.take(box.cpus))
        runsc = shutil.which("runsc")
        if runsc is None:
            raise Missing(f"there is no runsc on PATH: {_INSTALL}")
        if self._ours is None:
            self._ours = skeleton.Ours("gvisor")
            skeleton.fill(self._ours.directory("root"))
        skeleton.points(self._ours.path / "root", box.runtime, self._ours)
        # Its own on the whole machine: runsc listens at this name, outside of any directory.
        name = f"{self._ours.path.name}-{next(self._turns)}"
        bundle = self._ours.directory(name)
        (bundle / "config.json").write_text(json.dumps(self.config(box, self._ours)))
        (bundle / "config.json").chmod(0o644)
        state = bundle / "state"
        state.mkdir(mode=0o700)
        command = [runsc, *self.flags(state), "run", "--bundle", str(bundle), name]
        with ExitStack() as undo:
            user = User.take()
            if user is not None:
                undo.callback(user.release)
                try:
                    os.chown(state, user.uid, user.uid)
                except OSError as error:
                    raise Missing(f"root cannot give a file to user {user.uid} here: {error}") from error
                placed = (path for path, _ in box.runtime.placed)
                self._reach.make((runsc, *box.runtime.mounts, *placed), user.uid)
            with borrowed(user):
                holder = Holder.start(command, {})
            undo.pop_all()
        return _Cell(holder, user, bundle)

    def flags(self, state: Path) -> list[str]:
        return [
            "--root", str(state),
            "--rootless",
            # Nothing but a loopback of its own.
            "--network=none",
            # They are root's.
            "--ignore-cgroups",
            # All that is written to is in memory already, and bounded.
            "--overlay2=none",
            # Nobody changes these while it runs, so what was looked up once needs no second look.
            "--file-access-mounts=exclusive",
            # No sockets and pipes of the host, wherever one may lie.
            "--host-uds=none", "--host-fifo=none",
        ]  # fmt: skip

    def config(self, box: Box, ours: skeleton.Ours) -> dict[str, JsonValue]:
        """The bundle's configuration, as the OCI runtime specification has it."""
        return {
            "ociVersion": "1.0.0",
            "process": {
                "terminal": False,
                # Root of gVisor's small world, with the right to become nobody, see `init.py`; the job is nobody.
                "user": {"uid": 0, "gid": 0},
                "args": [*program.command(box.runtime)],
                "env": [],
                "cwd": "/",
                "noNewPrivileges": True,
                # Above what PID 1 sets for the job: gVisor's own are zero.
                "rlimits": [{"type": name, "soft": _ABOVE, "hard": _ABOVE} for name in _RLIMITS],
                "capabilities": {name: [*_RIGHTS] for name in ("effective", "permitted")},
            },
            "root": {"path": str(ours.path / "root"), "readonly": True},
            "hostname": "sandbox",
            "mounts": [*_mounts(box, ours)],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
        }

    def explain(self, words: str) -> str:
        if "user namespace" in words or "operation not permitted" in words or "clone" in words:
            return (
                "runsc may make no user namespace here: sysctl -w user.max_user_namespaces=15000; on Ubuntu 24.04 and "
                "newer sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; in a container start that with "
                "--security-opt seccomp=unconfined"
            )
        if "flag provided but not defined" in words:
            return f"this runsc is older than December 2022: {_INSTALL}"
        return ""

    def close(self) -> None:
        self._reach.close()
        if self._ours is not None:
            self._ours.close()
            self._ours = None


def _mounts(box: Box, ours: skeleton.Ours) -> list[JsonValue]:
    mounts: list[JsonValue] = [{"destination": "/proc", "type": "proc", "source": "proc"}]
    for path in ("/job", "/tmp", "/dev/shm"):  # noqa: S108 - the sandbox's own
        options: list[JsonValue] = [
            "nosuid",
            "nodev",
            f"size={box.disk}",
            "mode=0700",
            f"uid={NOBODY}",
            f"gid={NOBODY}",
        ]
        mounts.append({"destination": path, "type": "tmpfs", "source": "tmpfs", "options": options})
    for outside, inside in skeleton.mounts(box.runtime, ours):
        options = ["ro", "rbind", "nosuid", "nodev"]
        mounts.append({"destination": inside, "type": "bind", "source": outside, "options": options})
    return mounts


class _Cell(Cell):
    memory_by: MemoryBy = "watchdog"
    apart = True

    def __init__(self, holder: Holder, user: User | None, bundle: Path) -> None:
        self.stdin, self.stdout = holder.stdin, holder.stdout
        self.filter = seccomp.program()
        self._holder = holder
        self._user = user
        self._bundle = bundle
        self._reaped = False

    def confirm(self) -> None:
        """Nothing of the host can look into gVisor's kernel, but that is confined itself, and that can be seen."""
        problem = _unconfined(self._holder.process.pid, self._user.uid if self._user else os.geteuid())
        if problem:
            self.kill()
            raise Unconfined(f"a sandbox was killed before it ran anything: gVisor's kernel: {problem}")

    def kill(self) -> None:
        """Each process of runsc dies with the one that started it."""
        if not self._reaped:
            self._holder.process.kill()

    def reap(self) -> None:
        if self._reaped:
            return
        self.kill()
        self._holder.process.wait()
        # The others are not our children, but each of them has our pipe as its stderr.
        poll = select.poll()
        poll.register(self._holder.errors, select.POLLHUP)
        poll.poll(_PATIENCE_S * 1000)
        self._reaped = True
        self._holder.close()
        shutil.rmtree(self._bundle, ignore_errors=True)
        if self._user is not None:
            self._user.release()

    def last_words(self) -> str:
        return self._holder.words()


def _unconfined(runsc: int, uid: int) -> str:
    """What is wrong with gVisor's kernel, which is one of the processes of runsc; empty where nothing is."""
    for pid in _below(runsc):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"runsc-sandbox\0"):
                told = status(pid)
                other = set(told["Uid"]) != {str(uid)}
                return loose(told) or ("it is the wrong user" if other else "") or shared(pid, _NAMESPACES)
    return "it cannot be found among the processes of runsc"


def _below(pid: int) -> list[int]:
    """The processes that this one started, and those that they did."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(stat[1]), []).append(int(entry.name))
    found, look = [], [pid]
    while look:
        children = parents.get(look.pop(), [])
        found += children
        look += children
    return found

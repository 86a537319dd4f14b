"""The backend `container`: podman or docker, for machines that have one of them and no bubblewrap.

Nothing is pulled: the image is a few empty directories, imported from what this module makes, and everything in it is
mounted from this machine, read-only. A container ends with the wire, whoever was killed: PID 1 leaves, and `--rm` is
done by what podman and docker leave running for it. What is still there after all has a label, and the next worker
removes it.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_NOFILE, RLIMIT_NPROC, getrlimit

from ferrum.sandbox import program, seccomp, skeleton
from ferrum.sandbox.backend import Backend, Box, Cell, Kind, MemoryBy, Missing, Unconfined
from ferrum.sandbox.bubblewrap import NOBODY, TELLING
from ferrum.sandbox.held import Holder, loose, shared, status
from ferrum.sandbox.profile import profile

_INSTALL = "apt install podman (or install docker, and start its daemon)"
_LABEL = "ferrum.sandbox"
_PATIENCE_S = 20.0
#: PID 1 is in there too, and a Python; and files in memory count as memory.
_OUR_OWN = 32 * 2**20
_OUR_PROCESSES = 4
#: What the programs need of our environment to find their daemon, their storage and themselves.
_FOR_PROGRAMS = ("DOCKER_", "CONTAINER", "XDG_", "DBUS_")
_ALSO_FOR_PROGRAMS = frozenset({"PATH", "HOME", "USER", "LOGNAME", "TMPDIR"})
#: No proxies of ours, no list of hosts, nothing that can be written to and was not asked for.
_PODMAN = (
    "--http-proxy=false",
    "--no-hosts",
    "--read-only-tmpfs=false",
    "--systemd=false",
    # What tells of the machine; docker hides less of it, and has no word for more.
    f"--security-opt=mask=/sys:{':'.join(f'/proc/{name}' for name in TELLING)}",
)
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_NAMESPACES = ("ipc", "mnt", "net", "pid", "uts")


class Container(Backend):
    kind = Kind.CONTAINER

    def __init__(self) -> None:
        self._turns = itertools.count()
        self._ours: skeleton.Ours | None = None
        self._tool: _Tool | None = None
        self._image = ""

    def check(self) -> None:
        """Also makes the image where it is not there yet, and removes what killed workers left."""
        if sys.platform != "linux":
            raise Missing(
                "containers of macOS and Windows run in a virtual machine that does not see this machine's Python: run "
                "the workers that execute code on Linux"
            )
        seccomp.rules(os.uname().machine)
        self._opened()

    def start(self, box: Box) -> Cell:
        tool, ours = self._opened()
        token = f"{ours.path.name}-{next(self._turns)}"
        # In a session of its own, so that it is not ended by what ends a worker: it clears away behind it.
        holder = Holder.start(self.command(tool, ours, box, token), tool.env)
        return _Cell(holder, tool, token)

    def command(self, tool: _Tool, ours: skeleton.Ours, box: Box, token: str) -> list[str]:
        memory = str(box.memory + box.disk + _OUR_OWN)
        arguments = [
            *tool.command, "run", "--rm", "--interactive",
            "--name", f"ferrum-{token}", "--label", f"{_LABEL}={ours.path}",
            "--pull=never", "--log-driver=none",
            "--user", f"{NOBODY}:{NOBODY}",
            # None of the rights of root, also not by way of a program that would have them.
            "--cap-drop=ALL", "--security-opt=no-new-privileges",
            "--security-opt", f"seccomp={ours.path / 'seccomp.json'}",
            # Nothing of it is the host's, and no way out.
            "--network=none", "--ipc=private", "--hostname=sandbox",
            # All that can be written to is in memory, bounded, and gone with it.
            "--read-only",
            *(f"--tmpfs={path}:rw,nosuid,nodev,size={box.disk},mode=1777" for path in ("/job", "/tmp")),  # noqa: S108
            f"--shm-size={box.disk}",
            f"--memory={memory}", f"--memory-swap={memory}",
            f"--cpus={box.cpus:g}",
            f"--pids-limit={box.processes + _OUR_PROCESSES}",
            # The kernel counts these by user, and nobody is in more than one of them; the line above is the limit.
            f"--ulimit=nproc={_hard_limit(RLIMIT_NPROC, 4096)}",
            f"--ulimit=nofile={_hard_limit(RLIMIT_NOFILE, 1024)}",
            "--ulimit=core=1:1",
            "--workdir=/",
            *tool.extra,
        ]  # fmt: skip
        for outside, inside in skeleton.mounts(box.runtime, ours):
            arguments += ["--volume", f"{outside}:{inside}:ro"]
        # As `bubblewrap.py` has it.
        arguments += ["--volume", "/dev/full:/dev/zero:ro"]
        # The token is how its PID 1 is known among the processes of this machine.
        return [*arguments, self._image, *program.command(box.runtime), token]

    def explain(self, words: str) -> str:
        return _explained(words)

    def close(self) -> None:
        if self._ours is not None:
            self._ours.close()
            self._ours = None

    def _opened(self) -> tuple[_Tool, skeleton.Ours]:
        if self._tool is None:
            self._tool = _Tool.find(os.environ)
        if self._ours is None:
            ours = skeleton.Ours("container", left=self._tool.remove)
            (ours.path / "seccomp.json").write_text(json.dumps(profile(os.uname().machine)))
            skeleton.fill(ours.directory("root"))
            self._image = self._tool.image(ours.path / "root")
            self._ours = ours
        return self._tool, self._ours


@dataclass(frozen=True, slots=True)
class _Tool:
    """The program that is asked for containers."""

    command: tuple[str, ...]
    #: What only this one knows of.
    extra: tuple[str, ...]
    env: Mapping[str, str]

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> _Tool:
        """The first that answers. Raises `Missing` with what each of them said."""
        env = {
            name: value
            for name, value in environ.items()
            if name.startswith(_FOR_PROGRAMS) or name in _ALSO_FOR_PROGRAMS
        }
        said = []
        for name, extra in (("podman", _PODMAN), ("docker", ())):
            if path := shutil.which(name):
                tool = cls((path,), extra, env)
                try:
                    tool.ask("ps", "--quiet")
                except Missing as error:
                    said.append(str(error))
                else:
                    return tool
        raise Missing("; ".join(said) or f"there is neither podman nor docker on PATH: {_INSTALL}")

    def ask(self, *arguments: str, told: bytes | None = None) -> str:
        """Raises `Missing` with what it said where it fails."""
        done = subprocess.run([*self.command, *arguments], input=told, capture_output=True, env=self.env, check=False)  # noqa: S603
        if done.returncode:
            words = (done.stderr or done.stdout).decode(errors="replace").strip()[-300:]
            remedy = _explained(words)
            raise Missing(f"{Path(self.command[0]).name} {arguments[0]} failed: {words}{remedy and f': {remedy}'}")
        return done.stdout.decode()

    def image(self, root: Path) -> str:
        """The name of an image of these directories, which is imported where it is not there yet."""
        data = _packed(root)
        name = f"localhost/ferrum-sandbox:{sha256(data).hexdigest()[:16]}"
        try:
            self.ask("image", "inspect", name)
        except Missing:
            self.ask("import", "-", name, told=data)
        return name

    def remove(self, ours: Path) -> None:
        """Remove the containers of a process that is dead."""
        for name in self.ask("ps", "--all", "--quiet", "--filter", f"label={_LABEL}={ours}").split():
            with suppress(Missing):
                self.ask("rm", "--force", name)


def _packed(root: Path) -> bytes:
    """A directory as a tar file, the same one each time."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as file:
        for path in sorted(root.rglob("*")):
            entry = file.gettarinfo(path, path.relative_to(root).as_posix())
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            if entry.isfile():
                file.addfile(entry, io.BytesIO(path.read_bytes()))
            else:
                file.addfile(entry)
    return packed.getvalue()


class _Cell(Cell):
    memory_by: MemoryBy = "watchdog"

    def __init__(self, holder: Holder, tool: _Tool, token: str) -> None:
        self.stdin, self.stdout = holder.stdin, holder.stdout
        self._holder = holder
        self._tool = tool
        self._token = token
        self._init: int | None = None
        self._group: Path | None = None
        self._killing: subprocess.Popen[bytes] | None = None
        self._reaped = False

    def confirm(self) -> None:
        pid = _find(self._token)
        if not pid:
            self.kill()
            raise Unconfined("its PID 1 is not among the processes of this machine: is the daemon on another one?")
        self._init = os.pidfd_open(pid)
        if problem := _unconfined(pid):
            self.kill()
            raise Unconfined(f"a sandbox was killed before it ran anything: {problem}")
        self._group = memory_group(pid)
        self.memory_by = "watchdog" if self._group is None else "cgroup"

    def kill(self) -> None:
        if self._reaped or self._killing is not None:
            return
        try:
            if self._init is not None:
                # The kernel ends a namespace with its PID 1, and what started it clears away.
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
                return
        except ProcessLookupError:
            return
        except PermissionError:
            # The daemon is root's, and we are not.
            pass
        self._killing = subprocess.Popen(  # noqa: S603
            [*self._tool.command, "rm", "--force", f"ferrum-{self._token}"],
            env=self._tool.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def reap(self) -> None:
        if self._reaped:
            return
        self.kill()
        process = self._holder.process
        try:
            # With `--rm` it ends when its container is removed.
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            with suppress(Missing):
                self._tool.ask("rm", "--force", f"ferrum-{self._token}")
            process.kill()
            process.wait()
        if self._killing is not None:
            self._killing.wait()
        self._reaped = True
        self._holder.close()
        if self._init is not None:
            os.close(self._init)

    def last_words(self) -> str:
        return self._holder.words()

    def ran_out_of_memory(self) -> bool:
        counts = _counted(self._group, "memory.events", "memory.oom_control")
        return any(line.startswith("oom_kill ") and line != "oom_kill 0" for line in counts)

    def peak_memory(self) -> int | None:
        counts = _counted(self._group, "memory.peak", "memory.max_usage_in_bytes")
        return int(counts[0]) if counts else None


def _counted(group: Path | None, *names: str) -> list[str]:
    """The lines of the first of these files that is there: of cgroup v2, of v1. It goes away with the container."""
    for name in names:
        with suppress(OSError):
            if group is not None:
                return (group / name).read_text().splitlines()
    return []


def memory_group(pid: int) -> Path | None:
    """The directory of the group that limits a process's memory; `None` where nothing does, or it cannot be seen."""
    try:
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                group = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
                for name in ("memory.max", "memory.limit_in_bytes"):
                    limit = group / name
                    # Without a limit v2 says "max", and v1 a number beyond all memory.
                    if limit.exists() and limit.read_text().strip() not in ("max", "9223372036854771712"):
                        return group
    except OSError:
        pass
    return None


def _find(token: str) -> int:
    """The PID 1 of the container whose command line ends with this; 0 where there is none."""
    wanted = f"\0{token}\0".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if (entry / "cmdline").read_bytes().endswith(wanted):
                    spaces = status(int(entry.name))["NSpid"]
                    # podman and docker have it in theirs, too.
                    if len(spaces) > 1 and spaces[-1] == "1":
                        return int(entry.name)
    return 0


def _unconfined(pid: int) -> str:
    """What is wrong with a process that should be confined; empty where nothing is."""
    told = status(pid)
    rights = next((f"it has capabilities ({name})" for name in _CAPABILITIES if int(told[name][0], 16)), "")
    return rights or loose(told) or shared(pid, _NAMESPACES)


def _hard_limit(kind: int, wanted: int) -> str:
    """What may be asked for without the right to raise limits."""
    hard = getrlimit(kind)[1]
    limit = wanted if hard == RLIM_INFINITY else min(hard, wanted)
    return f"{limit}:{limit}"


def _explained(words: str) -> str:
    if any(sign in words for sign in ("newuidmap", "subuid", "subgid")):
        return "podman cannot run rootless here: apt install uidmap, and add this user to /etc/subuid and /etc/subgid"
    if "hybrid mode" in words:
        return "crun does not know this machine's cgroups: apt install runc && apt remove crun"
    if "Docker daemon" in words:
        return "start the docker daemon, and let this user use it: usermod -aG docker USER"
    return ""

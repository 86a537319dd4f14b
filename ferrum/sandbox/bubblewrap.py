"""The backend `bubblewrap`: Linux's own namespaces and filters, through `bwrap`.

`bwrap` as tutorials call it holds about half of the attacks of our suite. What holds is the whole of this: each line
of `arguments` has its reason beside it, and the test that fails without it in `tests/test_sandbox_attacks.py`.

Not `--die-with-parent`: a bwrap that is killed between making its child and telling it to go on leaves that child
waiting for ever, and with this flag that is what becomes of every sandbox that is just being started by a worker that
is killed. PID 1 ends when the wire does, and that is when the worker is gone; and it dies with bwrap once it runs. For
the same reason nothing here kills bwrap before PID 1 is known.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ferrum.sandbox import program, seccomp
from ferrum.sandbox.backend import Backend, Box, Cell, Kind, MemoryBy, Missing, Unconfined
from ferrum.sandbox.cgroup import Cgroup, Cgroups
from ferrum.sandbox.init import WRITABLE
from ferrum.sandbox.reach import Reach
from ferrum.sandbox.runtimes import Runtime
from ferrum.sandbox.user import User, borrowed

#: Inside everyone is nobody.
NOBODY = 65534

_NEEDED = (0, 8)
_INSTALL = "apt install bubblewrap (Debian 12, Ubuntu 24.04), dnf install bubblewrap, apk add bubblewrap"
_LAST_WORDS = 1000
_PATIENCE_S = 5.0

#: What a program finds in `/etc`, and nothing else: what is needed to know that it is nobody, and of no network.
ETC: dict[str, bytes] = {
    "passwd": b"nobody:x:65534:65534:nobody:/tmp:/bin/sh\n",
    "group": b"nogroup:x:65534:\n",
    "hosts": b"127.0.0.1 localhost\n::1 localhost\n",
    "nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files\n",
}

#: What `/proc` tells of the machine and of others on it. What programs need (`meminfo`, `cpuinfo`, `stat`, one's own
#: processes) stays; what only root may read needs no cover, for nobody here is; and each cover takes 0.15 ms.
TELLING = (
    "cmdline", "config.gz", "kallsyms", "keys", "key-users", "modules", "diskstats", "partitions", "swaps", "mdstat",
    "sched_debug", "timer_list", "fs", "pressure", "sys",
)  # fmt: skip

#: `full` reads like `zero`, which could be mapped besides: memory that no limit holds and nobody counts.
_DEVICES = {"null": "null", "zero": "full", "full": "full", "random": "random", "urandom": "urandom"}
#: Directories that are links into `/usr` where it is merged, as it is everywhere by now.
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_NAMESPACES = ("ipc", "mnt", "net", "pid", "uts")


class Bubblewrap(Backend):
    kind = Kind.BUBBLEWRAP

    def __init__(self, cgroups: Cgroups | None = None) -> None:
        self._cgroups = Cgroups.find() if cgroups is None else cgroups
        self._reach = Reach()
        self._cores = Cores()
        #: The flags of what is seen read-only, which are the same each time.
        self._seen: dict[Runtime, list[str]] = {}

    def check(self) -> None:
        if sys.platform != "linux":
            raise Missing(
                "bubblewrap is for Linux only: on macOS and Windows run the workers that execute code in a Linux "
                "virtual machine or on another machine; all other steps work here"
            )
        seccomp.rules(os.uname().machine)
        if not self._executable():
            raise Missing(f"there is no bwrap on PATH: {_INSTALL}")
        version = _version(self._executable())
        if version < _NEEDED:
            have, need = (".".join(map(str, one)) for one in (version, _NEEDED))
            raise Missing(f"bwrap is version {have}, and {need} or newer is needed: {_INSTALL}")

    def start(self, box: Box) -> Cell:
        cores = self._cores.take(box.cpus)
        if not _MAY_BIND_OTHERS:
            # This thread, and with it what it starts.
            os.sched_setaffinity(0, cores)
        # What is the sandbox's from now on, and what only its start needs.
        with ExitStack() as kept, ExitStack() as closing:
            user = User.take()
            if user is not None:
                kept.callback(user.release)
                outside = (path for path, _ in box.runtime.placed)
                self._reach.make((*box.runtime.mounts, *outside), user.uid)
            cgroup = self._cgroup(box)
            if cgroup is not None:
                kept.callback(cgroup.remove)
            files = _Files(closing)
            to_init, stdin = os.pipe()
            stdout, from_init = os.pipe()
            errors, errors_end = os.pipe()
            # Not a pipe: a bwrap that writes into one that nobody has any more is killed by that, see above.
            info = os.memfd_create("ferrum")
            for descriptor in (stdin, stdout, info, errors):
                kept.callback(os.close, descriptor)
            for descriptor in (to_init, from_init, errors_end):
                closing.callback(os.close, descriptor)
            bwrap = [self._executable(), *self.arguments(box, files, info), "--"]
            try:
                # Never with the host's uid 0 inside: it may write to files of /proc, and limits do not hold it.
                with borrowed(user), _no_core_dumps():
                    process = subprocess.Popen(  # noqa: S603
                        [*bwrap, *program.command(box.runtime)],
                        # `--clearenv` is for what runs inside; this is for what can be read of bwrap itself.
                        env={},
                        stdin=to_init,
                        stdout=from_init,
                        stderr=errors_end,
                        pass_fds=(info, *files.descriptors),
                        cwd="/",
                        start_new_session=True,
                    )
            except (OSError, subprocess.SubprocessError) as error:
                raise Missing(f"bwrap cannot be started: {error}") from error
            kept.pop_all()
        return _Cell(process, _Ends(stdin, stdout, info, errors), cores, user, cgroup)

    def arguments(self, box: Box, files: _Files, info: int) -> list[str]:
        """The flags, in order: a later mount covers an earlier one."""
        return [
            *self.namespaces(),
            *self.privileges(),
            *self.seen(box.runtime),
            *self.etc(files),
            *self.writable(box.disk),
            *self.sealed(box.runtime),
            *self.filter(files),
            # Tells us the process id of PID 1 and its namespaces, so that we can check them from outside.
            "--info-fd", str(info),
        ]  # fmt: skip

    def namespaces(self) -> list[str]:
        return [
            # Its own users (so that nobody is anybody), processes, network (none but a loopback of its own), System V
            # and POSIX message queues, host name, and view of cgroups.
            "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
            "--unshare-cgroup-try",
            # No namespaces within: they open a lot of the kernel that is otherwise only root's.
            "--disable-userns",
            "--hostname", "sandbox",
            # Else bwrap stays as PID 1, which can be looked into and has the worker's environment.
            "--as-pid-1",
            # No controlling terminal, so nothing can be typed into it.
            "--new-session",
        ]  # fmt: skip

    def privileges(self) -> list[str]:
        return ["--clearenv", "--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL"]

    def seen(self, runtime: Runtime) -> list[str]:
        if runtime not in self._seen:
            self._seen[runtime] = [*self.system(runtime), *self.proc(), *self.devices()]
        return self._seen[runtime]

    def system(self, runtime: Runtime) -> list[str]:
        arguments = ["--ro-bind", "/usr", "/usr"]
        for name in MERGED:
            path = Path("/", name)
            if path.is_symlink():
                arguments += ["--symlink", str(path.readlink()), str(path)]
            elif path.is_dir():
                arguments += ["--ro-bind", str(path), str(path)]
        # What the operator has installed is not for others to see, unless it is the interpreter.
        arguments += ["--tmpfs", "/usr/local"]
        for path in map(Path, runtime.mounts):
            arguments += ["--ro-bind", str(path), str(path)]
        for outside, inside in runtime.placed:
            arguments += ["--ro-bind", outside, inside]
        for directory in runtime.hidden:
            arguments += ["--tmpfs", directory]
        if not any(mount.startswith("/usr/local/") for mount in runtime.mounts):
            for name in ("python", "python3"):
                arguments += ["--symlink", runtime.interpreter, f"/usr/local/bin/{name}"]
        return arguments

    def etc(self, files: _Files) -> list[str]:
        arguments = []
        for name, content in ETC.items():
            arguments += ["--file", str(files.hold(content)), f"/etc/{name}"]
        # Where libraries are, and which of several programs is meant (`awk`): what `/usr` alone leaves out.
        for path in ("/etc/ld.so.cache", "/etc/alternatives"):
            arguments += ["--ro-bind-try", path, path]
        return arguments

    def proc(self) -> list[str]:
        arguments = ["--proc", "/proc"]
        for path in _telling():
            if path.is_dir():
                arguments += ["--tmpfs", str(path), "--remount-ro", str(path)]
            else:
                arguments += ["--ro-bind", "/dev/null", str(path)]
        return arguments

    def devices(self) -> list[str]:
        # Not `--dev`: that brings a pseudo terminal along.
        arguments = []
        for name, device in _DEVICES.items():
            arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{name}"]
        for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
            arguments += ["--symlink", f"/proc/self/fd{target}", f"/dev/{name}"]
        return arguments

    def writable(self, disk: int) -> list[str]:
        arguments = []
        for path in WRITABLE:
            arguments += ["--perms", "0700", "--size", str(disk), "--tmpfs", path]
        return arguments

    def sealed(self, runtime: Runtime) -> list[str]:
        """Last: all these are file systems in memory that have no size, made for mount points to stand in."""
        arguments = []
        for path in (*runtime.hidden, "/usr/local", "/"):
            arguments += ["--remount-ro", path]
        return arguments

    def filter(self, files: _Files) -> list[str]:
        return ["--seccomp", str(files.hold(seccomp.program()))]

    def explain(self, words: str) -> str:
        return _explain(words)

    def close(self) -> None:
        self._reach.close()

    def _cgroup(self, box: Box) -> Cgroup | None:
        if self._cgroups is None:
            return None
        try:
            return self._cgroups.make(box)
        except OSError as error:
            raise Missing(f"no cgroup can be made for a sandbox, though that was possible before: {error}") from error

    def _executable(self) -> str:
        return shutil.which("bwrap") or ""


class Cores:
    """The processor cores of this machine, given out in turn."""

    def __init__(self) -> None:
        self._turns = itertools.count()
        self._all = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []

    def take(self, cpus: float) -> set[int]:
        """As many as that takes."""
        count = min(len(self._all), math.ceil(cpus))
        first = next(self._turns) * count
        return {self._all[(first + at) % len(self._all)] for at in range(count)}


class _Files:
    """Bytes that bwrap reads through a descriptor; gone when it was started."""

    def __init__(self, closing: ExitStack) -> None:
        self._closing = closing
        self.descriptors: list[int] = []

    def hold(self, content: bytes) -> int:
        descriptor = os.memfd_create("ferrum")
        self._closing.callback(os.close, descriptor)
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        self.descriptors.append(descriptor)
        return descriptor


@contextmanager
def _no_core_dumps() -> Iterator[None]:
    """See `job.limits`. What is started now has this limit, and the filter does not let it have another one.

    Where the machine's own limit is 0 it stays 0.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


@dataclass(frozen=True, slots=True)
class _Ends:
    """Our ends of its pipes."""

    stdin: int
    stdout: int
    #: What bwrap says of itself.
    info: int
    errors: int


class _Cell(Cell):
    def __init__(
        self,
        process: subprocess.Popen[bytes],
        ends: _Ends,
        cores: set[int],
        user: User | None,
        cgroup: Cgroup | None,
    ) -> None:
        self.stdin, self.stdout = ends.stdin, ends.stdout
        self.memory_by: MemoryBy = "watchdog" if cgroup is None else "cgroup"
        self._process = process
        self._cores = cores
        self._info, self._errors = ends.info, ends.errors
        os.set_blocking(self._errors, False)
        self._user, self._cgroup = user, cgroup
        self._init: int | None = None
        self._words = ""
        self._reaped = False

    def confirm(self) -> None:
        told = self._told()
        pid = told["child-pid"]
        self._init = os.pidfd_open(pid)
        problem = _unconfined(_status(pid), told, self._process.pid, self._user.uid if self._user else os.geteuid())
        if problem:
            self.kill()
            raise Unconfined(f"a sandbox was killed before it ran anything: {problem}")
        if _MAY_BIND_OTHERS:
            # Not before, for it starts faster on all of them. What it starts inherits this, and nobody inside may
            # change it.
            os.sched_setaffinity(pid, self._cores)
        if self._cgroup is not None:
            self._cgroup.add(pid)

    def kill(self) -> None:
        if self._init is None or self._reaped:
            # It is not up yet, and was told nothing: it ends when the caller closes its end of the wire.
            return
        with suppress(ProcessLookupError):
            # The kernel ends a namespace with its PID 1, and bwrap ends with that.
            signal.pidfd_send_signal(self._init, signal.SIGKILL)

    def reap(self) -> None:
        if self._reaped:
            return
        self.kill()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._kill_by_name()
            self._process.wait()
        if self._init is not None:
            poll = select.poll()
            poll.register(self._init, select.POLLIN)
            poll.poll(_PATIENCE_S * 1000)
            os.close(self._init)
        self._words = self.last_words()
        self._reaped = True
        os.close(self._info)
        os.close(self._errors)
        if self._cgroup is not None:
            self._cgroup.remove()
        if self._user is not None:
            self._user.release()

    def _kill_by_name(self) -> None:
        """End one that did not come up and does not go, either."""
        if self._init is None:
            with suppress(Unconfined, ProcessLookupError):
                self._init = os.pidfd_open(self._told()["child-pid"])
        self.kill()
        self._process.kill()

    def _told(self) -> dict[str, int]:
        """What bwrap says of what it started."""
        told: dict[str, int] = {}
        with suppress(ValueError):
            told = json.loads(os.pread(self._info, _LAST_WORDS, 0))
        if "child-pid" not in told:
            raise Unconfined("bwrap did not say what it started")
        return told

    def last_words(self) -> str:
        if not self._reaped:
            with suppress(BlockingIOError):
                self._words += os.read(self._errors, _LAST_WORDS).decode(errors="replace")
        return self._words.strip()

    def ran_out_of_memory(self) -> bool:
        return self._cgroup is not None and self._cgroup.ran_out_of_memory()

    def peak_memory(self) -> int | None:
        return None if self._cgroup is None else self._cgroup.peak_memory()


def _may_bind_others() -> bool:
    """Whether we may say which cores a process of another user runs on: a container's root may not (CAP_SYS_NICE)."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return True
    return bool(int(_status(os.getpid())["CapEff"], 16) >> 23 & 1)


def _telling() -> list[Path]:
    """What is to be covered of what there is."""
    paths = [Path("/proc", name) for name in TELLING]
    return [path for path in paths if path.exists() and path.stat().st_mode & stat.S_IROTH]


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return status | {"uid_map": " ".join(Path(f"/proc/{pid}/uid_map").read_text().split())}


def _unconfined(status: Mapping[str, str], told: Mapping[str, int], parent: int, uid: int) -> str:
    """What is wrong with a process that should be confined; empty where nothing is."""
    capabilities = [f"{name} {status[name]}" for name in _CAPABILITIES if int(status[name], 16)]
    shared = [kind for kind in _NAMESPACES if told.get(f"{kind}-namespace") in (None, _namespace(kind))]
    wrong = {
        "its PID 1 is not what bwrap started": status["PPid"] != str(parent) or status["NSpid"].split()[-1] != "1",
        f"it has capabilities ({', '.join(capabilities)})": bool(capabilities),
        "it can gain privileges (NoNewPrivs is not set)": status["NoNewPrivs"] != "1",
        "no filter holds its system calls": status["Seccomp"] != "2",
        f"it is the wrong user ({status['Uid']}; {status['uid_map']})": uid == 0
        or set(status["Uid"].split()) != {str(uid)}
        or status["uid_map"] != f"{NOBODY} {uid} 1",
        f"it shares namespaces with us ({', '.join(shared)})": bool(shared),
    }
    return "; ".join(problem for problem, holds in wrong.items() if holds)


def _namespace(kind: str) -> int:
    """The number of our own."""
    return Path(f"/proc/self/ns/{kind}").stat().st_ino


def _version(executable: str) -> tuple[int, ...]:
    said = subprocess.run(  # noqa: S603
        [executable, "--version"], capture_output=True, text=True, env={}, check=False
    ).stdout
    number = said.split()[-1] if said.split() else "0"
    return tuple(int(part) for part in number.split(".") if part.isdigit())


def _explain(words: str) -> str:
    """What to do about a bwrap that did not start, from what it said."""
    if "Creating new namespace failed" in words or "setting up uid map" in words or "No permissions to cr" in words:
        return _about_namespaces()
    if "proc" in words and "mount" in words.lower():
        return (
            "this container hides parts of /proc, so no new one can be mounted: start it with "
            "--security-opt systempaths=unconfined (Docker, Podman) or procMount: Unmasked (Kubernetes)"
        )
    if "execvp" in words:
        return "the interpreter cannot be run inside: its directories must be readable by everyone"
    return ""


def _about_namespaces() -> str:
    """Why an ordinary user may make no namespaces here, and how to allow it."""
    if _setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor keeps bwrap from making user namespaces (Ubuntu 24.04 and newer): "
            "apt install apparmor-profiles && ln -s /usr/share/apparmor/extra-profiles/bwrap-userns-restrict "
            "/etc/apparmor.d/ && apparmor_parser -r /etc/apparmor.d/bwrap-userns-restrict"
        )
    if _setting("kernel/unprivileged_userns_clone") == "0":
        return "user namespaces are switched off here: sysctl -w kernel.unprivileged_userns_clone=1"
    if _setting("user/max_user_namespaces") == "0":
        return "user namespaces are switched off here: sysctl -w user.max_user_namespaces=15000"
    return (
        "new namespaces are forbidden here. In Docker or Podman its seccomp profile does that: start the container "
        "with --security-opt seccomp=unconfined --security-opt systempaths=unconfined, or with a profile that allows "
        "clone, unshare, mount, umount2 and pivot_root"
    )


def _setting(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


_MAY_BIND_OTHERS = _may_bind_others()

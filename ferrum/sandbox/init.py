"""PID 1 of every sandbox: writes the inputs, runs the job in a child, watches it, ends it, collects what it left.

It comes in through stdin (see `program.py`), so there is nothing of ferrum's inside but what it is made of: this file
and `wire.py`. Only built-in and small modules are imported, and no `os`, `re`, `json` or `signal`: each costs every
sandbox its time.

What keeps the job from forging a result: the only way to the host is the two descriptors of the wire, which the child
closes before anything but ours runs in it; PID 1 is not dumpable, so no process inside can look into its memory or
open its descriptors; and signals from inside do nothing to it, for the kernel keeps those from a namespace's init.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _sitebuiltins
import builtins
import gc
import marshal

# What of `os` is used here is there too, without the millisecond that importing that takes.
import posix as os
import sys
from _stat import S_ISDIR, S_ISREG
from time import monotonic, sleep, tzset

from ferrum.sandbox import wire

# Importing `typing`, even to ask whether types are being checked, would take as long as Python itself.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

JOB = "/job"
#: All that can be written to.
WRITABLE = (JOB, "/tmp", "/dev/shm")
TICK_S = 0.02
_CHUNK = 64 * 1024
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_NICE = 5
_NOBODY = 65534
_CAN_READ, _CAN_WRITE = 1, 4
_MAY_FAIL = (4, 11, 12)  # RLIMIT_CORE, RLIMIT_SIGPENDING, RLIMIT_MSGQUEUE
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_MOST_REFUSED = 100
_LOOKS = 8
_MOST_OPEN = 1024
#: Characters of a path.
LONGEST_PATH = 1000
#: What Linux lets a process have, where nobody has changed that.
_MOST_MAPPINGS = 65530


class suppress:
    """`contextlib.suppress`, without what importing that brings along."""

    def __init__(self, *errors: type[Exception]) -> None:
        self._errors = errors

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, self._errors)


class _Gone(Exception):
    """The host has closed the wire."""


def main() -> Callable[[], object]:
    """Be PID 1 and never return; what is returned is what the child has to do, and returns in the child only."""
    # Python's own handler for SIGINT would make PID 1 a process that a signal from inside can end.
    for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):
        _signal.signal(number, _signal.SIG_IGN)
    _prctl(_PR_SET_DUMPABLE, 0)
    # Whoever holds the sandbox takes it along. That the worker is gone is seen by the end of the wire.
    _prctl(_PR_SET_PDEATHSIG, _signal.SIGKILL)
    host = _Host()
    try:
        prepare = host.expect(wire.PREPARE)
        child = _Child.fork(prepare)
        if child is None:
            return _Child.job
        host.send(wire.READY, child.wait_until_ready(host))
        nobody = _Nobody(prepare["apart"])
        with nobody:
            job = host.take_job()
        child.start(job)
        ended = _Watch(host, child, job).until_it_ends()
        kill_all()
        with nobody:
            host.tell_all(child, job, ended)
    except _Gone:
        pass
    # The kernel ends whatever is left in a namespace whose PID 1 leaves.
    os._exit(0)


class _Nobody:
    """A time in which files are the job's.

    gVisor knows of no process that its own user may not look into or kill, so PID 1 is root of that small world there,
    with the right to become somebody else and no other. Elsewhere it is the same user as the job, and this is nothing.
    """

    def __init__(self, apart: bool) -> None:
        self._apart = apart

    def __enter__(self) -> None:
        if self._apart:
            os.setegid(_NOBODY)
            os.seteuid(_NOBODY)

    def __exit__(self, *_: object) -> None:
        if self._apart:
            os.seteuid(0)
            os.setegid(0)


def _filter_calls(program: bytes) -> None:
    """Put a filter on the system calls of this process and of all that it starts."""
    address = id(program) + bytes.__basicsize__ - 1
    head = (len(program) // 8).to_bytes(8, sys.byteorder) + address.to_bytes(8, sys.byteorder)
    _prctl(_PR_SET_SECCOMP, 2, head)


def _prctl(option: int, value: int, pointer: bytes | int = 0) -> None:
    if _libc("prctl", option, value, pointer, 0, 0) != 0:
        raise SystemExit("prctl failed")


def _libc(name: str, *arguments: bytes | int) -> int:
    """Call a function of the C library: what `ctypes` does, without the 3 ms that importing it takes."""
    import _ctypes

    result: int = _ctypes.call_function(_ctypes.dlsym(_ctypes.dlopen(None, 0), name), arguments)  # type: ignore[arg-type]
    return result


def kill_all() -> None:
    """Kill every process but PID 1 until there is none. The kernel does that at one stroke, gVisor does not."""
    while True:
        try:
            os.kill(-1, _signal.SIGKILL)
        except OSError:
            pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        sleep(0.0005)


def _ready(waited_for: dict[int, int], timeout_s: float | None = None) -> list[int]:
    """Which of these descriptors can be read or written, or have ended, once one can."""
    # Not before the child is there, which has no use for it.
    from select import poll

    events = poll()
    for descriptor, event in waited_for.items():
        events.register(descriptor, event)
    return [descriptor for descriptor, _ in events.poll(None if timeout_s is None else timeout_s * 1000)]


class _Host:
    """PID 1's end of the wire."""

    def __init__(self) -> None:
        self._in, self._out = os.dup(0), os.dup(1)
        null = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        self._frames = wire.Frames()
        self._heard: list[tuple[bytes, bytes]] = []
        #: What was said and is not written yet.
        self._pending = bytearray()
        os.set_blocking(self._out, False)

    @property
    def descriptors(self) -> tuple[int, int]:
        return self._in, self._out

    @property
    def waiting(self) -> bool:
        return bool(self._pending)

    def expect(self, kind: bytes) -> Any:
        """The body of the next frame, which is of this kind."""
        got, body = self._next()
        if got != kind:
            raise _Gone
        return marshal.loads(body)

    def take_job(self) -> dict[str, Any]:
        """Write the input files as they come, and return the job that ends them."""
        parts = bytearray()
        file = -1
        while True:
            kind, body = self._next()
            if kind == wire.FILE:
                if file >= 0:
                    os.close(file)
                file = _create(body.decode())
            elif kind == wire.DATA and file >= 0:
                _write_all(file, body)
            elif kind == wire.JOB:
                # A long program comes in several pieces; an empty one ends it.
                parts += body
                if not body:
                    if file >= 0:
                        os.close(file)
                    job: dict[str, Any] = marshal.loads(parts)
                    return job
            else:
                raise _Gone

    def say(self, kind: bytes, body: bytes) -> None:
        """Send when there is room; never waits."""
        self._pending += wire.frame(kind, body)
        self.flush()

    def flush(self) -> None:
        try:
            while self._pending:
                del self._pending[: os.write(self._out, self._pending[:_CHUNK])]
        except BlockingIOError:
            pass
        except OSError:
            raise _Gone from None

    def send(self, kind: bytes, body: bytes = b"") -> None:
        """Send now."""
        self.say(kind, body)
        while self._pending:
            _ready({self._out: _CAN_WRITE})
            self.flush()

    def tell_all(self, child: _Child, job: dict[str, Any], ended: dict[str, object]) -> None:
        """How it ended, the rest of what it said, and what it left. Nothing of it runs any more."""
        for stream in child.streams:
            stream.drain(self)
        ended["stdout"], ended["stderr"] = (stream.size for stream in child.streams)
        times = os.times()
        ended["cpu"] = times.children_user + times.children_system
        self.send(wire.END, _json(ended))
        self.send(wire.DONE, _json(_Collect(self, job).all()))

    def _next(self) -> tuple[bytes, bytes]:
        while not self._heard:
            data = os.read(self._in, _CHUNK)
            if not data:
                raise _Gone
            self._heard.extend(self._frames.feed(data))
        return self._heard.pop(0)


class _Stream:
    """What the job writes to stdout or stderr, read by PID 1."""

    def __init__(self, kind: bytes) -> None:
        self._kind = kind
        self.read_end, self.write_end = os.pipe()
        self.size = 0
        #: Somebody may still write.
        self.open = True
        self._keep = 0

    def start(self, keep: int) -> None:
        os.close(self.write_end)
        os.set_blocking(self.read_end, False)
        self._keep = keep

    def pump(self, host: _Host) -> None:
        """Take what is there, and send what is kept of it."""
        try:
            data = os.read(self.read_end, _CHUNK)
        except BlockingIOError:
            return
        self.open = bool(data)
        kept = data[: max(0, self._keep - self.size)]
        self.size += len(data)
        if kept:
            host.say(self._kind, kept)

    def drain(self, host: _Host) -> None:
        """Take all that is left of it. Whoever could write is dead, so it ends."""
        while self.open:
            self.pump(host)


class _Child:
    """The process that the job runs in: forked early, so that it has imported what it needs before the job comes."""

    #: In the child itself: what it has to do.
    job: Callable[[], object]

    def __init__(self) -> None:
        self.pid = 0
        self.streams = (_Stream(wire.STDOUT), _Stream(wire.STDERR))
        self._job_read, self._job_write = os.pipe()
        self._ready_read, self._ready_write = os.pipe()

    @classmethod
    def fork(cls, prepare: dict[str, Any]) -> _Child | None:
        """Returns `None` in the child, where `_Child.job` waits for its job."""
        child = cls()
        # What is there by now is never garbage. To look for that at its end the child would have to copy all of it.
        gc.freeze()
        child.pid = os.fork()
        if child.pid == 0:
            child._become(prepare)
            return None
        os.close(child._job_read)
        os.close(child._ready_write)
        return child

    def wait_until_ready(self, host: _Host) -> bytes:
        """Wait for its imports; returns what could not be imported, one a line."""
        said = b""
        while True:
            # The end of the wire only: what comes through it is for later.
            if self._ready_read not in _ready({self._ready_read: _CAN_READ, host.descriptors[0]: 0}):
                raise _Gone
            data = os.read(self._ready_read, _CHUNK)
            if not data:
                os.close(self._ready_read)
                return said[: wire.LONGEST]
            said += data

    def start(self, job: dict[str, Any]) -> None:
        for stream in self.streams:
            stream.start(job["keep"])
        body = marshal.dumps(job)
        try:
            _write_all(self._job_write, len(body).to_bytes(4, "big") + body)
        except OSError:
            # It died of what it imported; how is seen when it is waited for.
            pass
        os.close(self._job_write)

    def _become(self, prepare: dict[str, Any]) -> None:
        """What the child does first: let go of everything that is PID 1's."""
        for standard, stream in zip((1, 2), self.streams, strict=True):
            os.dup2(stream.write_end, standard)
        first = 3
        for kept in sorted((self._job_read, self._ready_write, _MOST_OPEN)):
            os.closerange(first, kept)
            first = kept + 1
        # Out of PID 1's session; and a process like any other, which may look into itself and its children.
        os.setsid()
        _prctl(_PR_SET_DUMPABLE, 1)
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        for number in (_signal.SIGTERM, _signal.SIGHUP):
            _signal.signal(number, _signal.SIG_DFL)
        # The kernel should rather end this than PID 1 when memory runs out, and PID 1 should never wait for it.
        with suppress(OSError):
            file = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            os.write(file, b"1000")
            os.close(file)
        os.nice(_NICE)
        if prepare["apart"]:
            # Who may not open it for writing cannot map it as memory that stays and that nobody counts.
            os.chmod("/dev/zero", 0o444)
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        if prepare["filter"]:
            _filter_calls(prepare["filter"])
        _set_environment(prepare["env"])
        sys.path.extend(prepare["paths"])
        for path, target in prepare["links"]:
            _make_directories_above(path)
            os.symlink(target, path)
        missing = []
        for name in prepare["warm"]:
            try:
                __import__(name)
            except ImportError:
                missing.append(name)
        os.write(self._ready_write, "\n".join(missing).encode())
        os.close(self._ready_write)
        _Child.job = staticmethod(lambda: _run(_received(self._job_read)))


def _received(descriptor: int) -> dict[str, Any]:
    """The job, through the pipe from PID 1."""
    data = bytearray()
    while more := os.read(descriptor, _CHUNK):
        data += more
    os.close(descriptor)
    if not data:
        os._exit(1)
    job: dict[str, Any] = marshal.loads(data[4:])
    return job


def _run(job: dict[str, Any]) -> None:
    """Become the job."""
    for limit, value in job["limits"].items():
        # One is set already where nobody in here may set it; two are for show in gVisor, whose memory they would be.
        if _libc("setrlimit", limit, value.to_bytes(8, sys.byteorder) * 2) != 0 and limit not in _MAY_FAIL:
            raise SystemExit(f"limit {limit} cannot be {value}")
    os.umask(0o022)
    os.chdir(JOB)
    _set_environment(job["env"])
    if "TZ" in job["env"]:
        tzset()
    if job["programs"]:
        _execute(job["programs"], job["arguments"])
    _run_python(job["code"])


def _set_environment(variables: dict[str, str]) -> None:
    """What `os.environ` is to be, whether it is there by now or made later, of what is in `posix`."""
    if "os" in sys.modules:
        sys.modules["os"].environ.clear()
        sys.modules["os"].environ.update(variables)
    for old in os.environ:
        os.unsetenv(old)
    os.environ.clear()
    for name, value in variables.items():
        pair = name.encode(errors="surrogateescape"), value.encode(errors="surrogateescape")
        os.environ[pair[0]] = pair[1]
        os.putenv(*pair)


def _execute(programs: list[str], arguments: list[str]) -> None:
    """Become the first of these programs that is there."""
    from os import execvp

    # Python ignores these for itself; a program expects what every other process has.
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)
    code = 127
    for program in programs:
        try:
            execvp(program, [program, *arguments])
        except OSError as error:
            code = 126 if isinstance(error, PermissionError) else 127
            said = f"{program}: {error.strerror}\n"
    os.write(2, said.encode(errors="replace"))
    os._exit(code)


def _run_python(code: str) -> None:
    """Run a program as `python -c` does, in this interpreter."""
    for name in [name for name in sys.modules if name.startswith("ferrum")]:
        del sys.modules[name]
    main = type(sys)("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.argv = ["-c"]
    sys.path.insert(0, "")
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    # What is printed is seen when it is printed.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        exec(compile(code, "<code>", "exec"), main.__dict__)  # noqa: S102
    except SystemExit:
        raise
    except BaseException as error:
        # Without the frames of ours, and with the lines of the program, which is in no file.
        import linecache

        linecache.cache["<code>"] = (len(code), None, code.splitlines(True), "<code>")
        import traceback

        trace = error.__traceback__
        error = error.with_traceback(trace and trace.tb_next)
        if sys.excepthook is sys.__excepthook__:
            traceback.print_exception(error)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None


class _Watch:
    """Looks after the job from the moment that it starts until it ends or has to be ended."""

    def __init__(self, host: _Host, child: _Child, job: dict[str, Any]) -> None:
        self._host = host
        self._child = child
        self._job = job
        self._peak = 0
        #: Whether its files were ever as full as they may be.
        self._full = False
        self._areas = _areas()
        self._kernel = _Kernel(job)
        self._deadline = monotonic() + job["timeout"]

    def until_it_ends(self) -> dict[str, object]:
        """How it ended: `exit` or `signal` if by itself, else `why` it has to be killed now."""
        wake, alarm = os.pipe()
        for descriptor in (wake, alarm):
            os.set_blocking(descriptor, False)
        _signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        status, why = None, ""
        # Not at once: the job has the processor first.
        looked = monotonic()
        while True:
            status = self._reap()
            if monotonic() - looked >= TICK_S or status is not None:
                why = self._look() if status is None else ""
                looked = monotonic()
            why = why or self._said_too_much() or ("timeout" if monotonic() >= self._deadline else "")
            if status is not None or why:
                break
            self._wait(wake)
        ended: dict[str, object] = {"why": why, "peak": self._peak, "full": self._full}
        if status is not None:
            code = os.waitstatus_to_exitcode(status)
            ended["exit" if code >= 0 else "signal"] = abs(code)
        return ended

    def _wait(self, wake: int) -> None:
        """Pass on what is said, until something happens or it is time to look again."""
        host_in, host_out = self._host.descriptors
        streams = {stream.read_end: stream for stream in self._child.streams if stream.open}
        waited_for = dict.fromkeys((host_in, wake, *streams), _CAN_READ)
        if self._host.waiting:
            waited_for[host_out] = _CAN_WRITE
        for descriptor in _ready(waited_for, min(TICK_S, max(0.0, self._deadline - monotonic()))):
            if descriptor in streams:
                streams[descriptor].pump(self._host)
            elif descriptor == wake:
                os.read(wake, _CHUNK)
            elif descriptor == host_in:
                # It has nothing to say any more, so this is the end of the wire.
                raise _Gone
            else:
                self._host.flush()

    def _reap(self) -> int | None:
        """Wait for whoever has ended; returns the status of the job's own process once it has."""
        found = None
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return found
            if pid == 0:
                return found
            # One that was quick may never have been looked at.
            self._peak = max(self._peak, used.ru_maxrss * 1024)
            if pid == self._child.pid:
                found = status

    def _said_too_much(self) -> str:
        return "output" if any(stream.size > self._job["most"] for stream in self._child.streams) else ""

    def _look(self) -> str:
        """Whether it uses more than it may of what no limit of the kernel holds."""
        for _ in range(_LOOKS):
            memory, surely = self._memory()
            if surely:
                return "memory"
            if memory <= self._job["memory"]:
                break
            # A process and its child that has not yet become another program (`vfork`) have one memory between them,
            # which is seen twice. That passes; where many threads start programs all the time, it takes a few looks.
            sleep(0.002)
        else:
            return "memory"
        if _sockets() > self._job["sockets"] or self._kernel.keeps_too_much():
            return "memory"
        threads = sum(_usage(pid)[1] for pid in _processes())
        if threads > self._job["processes"]:
            return "processes"
        return "disk" if self._fills_its_files() else ""

    def _memory(self) -> tuple[int, bool]:
        """Bytes that are in use by the job's processes, and whether one of them alone has more than it may."""
        processes = _processes()
        used = [_usage(pid)[0] for pid in processes]
        memory, surely = sum(used), max(used, default=0) > self._job["memory"]
        if memory > self._job["memory"] and not surely:
            # Only now, for it is slow: what processes share is counted once. One that hides that counts in full.
            memory = sum(_proportional(pid) for pid in processes)
        self._peak = max(self._peak, memory)
        return memory, surely

    def _fills_its_files(self) -> bool:
        used, inodes = 0, 0
        for area in self._areas:
            held = os.statvfs(area)
            used += (held.f_blocks - held.f_bfree) * held.f_frsize
            inodes += held.f_files - held.f_ffree
            self._full = self._full or held.f_bfree == 0
        return bool(used > self._job["disk"] or inodes > self._job["inodes"])


def _areas() -> list[str]:
    """What can be written to, each file system once."""
    found: dict[int, str] = {}
    for area in WRITABLE:
        with suppress(OSError):
            found.setdefault(os.stat(area).st_dev, area)
    return list(found.values())


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]


def _usage(pid: int) -> tuple[int, int]:
    """Bytes that a process has in memory, in page tables and swapped out, and its threads.

    From `status`, which no process can hide, as it can what tells what is shared.
    """
    status = _status(f"/proc/{pid}")
    threads = _number(status, b"\nThreads:")
    if threads > 1 and b"\nVmRSS:" not in status:
        # Its first thread has left, and with that all that is told of the process; its other threads still tell.
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                status = _status(f"/proc/{pid}/task/{task}")
                if b"\nVmRSS:" in status:
                    break
    return 1024 * sum(_number(status, name) for name in (b"\nVmRSS:", b"\nVmSwap:", b"\nVmPTE:")), threads


def _proportional(pid: int) -> int:
    """The same, where what it shares with others is divided among them; in full where that cannot be seen."""
    try:
        shares = _read(f"/proc/{pid}/smaps_rollup")
    except OSError:
        shares = b""
    if b"Pss:" not in shares:
        return _usage(pid)[0]
    tables = _number(_status(f"/proc/{pid}"), b"\nVmPTE:")
    return 1024 * (tables + sum(_number(shares, name) for name in (b"\nPss:", b"\nSwapPss:")))


def _status(directory: str) -> bytes:
    """Empty for what has ended."""
    try:
        return _read(f"{directory}/status")
    except OSError:
        return b""


def _number(text: bytes, name: bytes) -> int:
    """The number behind a name; 0 where it is not there."""
    found = text.partition(name)[2].split(maxsplit=1)
    return int(found[0]) if found else 0


def _sockets() -> int:
    """How many sockets there are: each may hold 200 kB of the kernel's memory that is nobody's."""
    with suppress(OSError):
        return _number(_read("/proc/1/net/sockstat"), b"sockets: used")
    return 0


class _Kernel:
    """What the kernel keeps for the job beside its memory and has no limit for: locks on ranges of files, mappings.

    To count locks makes the kernel wait until each of its processors has done something else (`synchronize_rcu`), which
    takes 5 to 20 ms. So all that is done once a second, and when the kernel has taken memory that could be for them.
    """

    _EACH_S = 1.0
    #: Some 10,000 of either.
    _GROWN = 2 * 2**20

    def __init__(self, job: dict[str, Any]) -> None:
        self._most_locks: int = job["locks"]
        self._most_mappings: int = job["mappings"]
        self._counted = monotonic()
        self._taken = self._taken_now()

    def keeps_too_much(self) -> bool:
        taken = self._taken_now()
        if taken < self._taken + self._GROWN and monotonic() - self._counted < self._EACH_S:
            self._taken = min(taken, self._taken)
            return False
        self._counted, self._taken = monotonic(), taken
        return self._too_many_locks() or self._too_many_mappings()

    def _taken_now(self) -> int:
        """Bytes that the kernel has taken for what it cannot give back."""
        with suppress(OSError):
            return 1024 * _number(_read("/proc/meminfo"), b"SUnreclaim:")
        return 0

    def _too_many_locks(self) -> bool:
        found = 0
        with suppress(OSError):
            # Those on whole files are there too; there are no more of them than open files.
            for piece in _pieces("/proc/locks"):
                found += piece.count(b"POSIX")
                if found > self._most_locks:
                    return True
        return False

    def _too_many_mappings(self) -> bool:
        found = 0
        for pid in _processes():
            try:
                for piece in _pieces(f"/proc/{pid}/maps"):
                    found += piece.count(b"\n")
                    if found > self._most_mappings:
                        return True
            except PermissionError:
                # One that hides them has as many as it may.
                found += _MOST_MAPPINGS
            except OSError:
                pass
        return found > self._most_mappings


class _Collect:
    """Reads the files that the job left and was asked for. Whoever could change them meanwhile is dead."""

    def __init__(self, host: _Host, job: dict[str, Any]) -> None:
        self._host = host
        self._patterns = [tuple(pattern.split("/")) for pattern in job["outputs"]]
        self._files, self._bytes, self._depth = job["most_files"], job["most_bytes"], job["depth"]
        self._refused: list[str] = []
        self._too_much = False

    def all(self) -> dict[str, object]:
        """Send every file; returns what was refused, with why, and whether there was more than is given back."""
        try:
            self._directory(os.open(JOB, _DIRECTORY), ())
        except OSError as error:
            self._refuse((".",), error.strerror or "cannot be read")
        return {"refused": self._refused, "too_much": self._too_much}

    def _directory(self, directory: int, path: tuple[str, ...]) -> None:
        try:
            for name in sorted(os.listdir(directory)):
                self._entry(directory, (*path, name))
        finally:
            os.close(directory)

    def _entry(self, directory: int, path: tuple[str, ...]) -> None:
        wanted = any(matches(path, pattern) for pattern in self._patterns)
        within = any(leads(path, pattern) for pattern in self._patterns)
        if not (wanted or within):
            return
        try:
            mode = os.stat(path[-1], dir_fd=directory, follow_symlinks=False).st_mode
            if S_ISDIR(mode):
                if len(path) >= self._depth:
                    self._refuse(path, "it is nested too deeply")
                elif within:
                    self._directory(os.open(path[-1], _DIRECTORY, dir_fd=directory), path)
            elif wanted:
                self._file(directory, path, regular=S_ISREG(mode))
        except OSError as error:
            self._refuse(path, error.strerror or "cannot be read")

    def _file(self, directory: int, path: tuple[str, ...], regular: bool) -> None:
        name = "/".join(path)
        if not regular:
            return self._refuse(path, "it is no regular file")
        try:
            encoded = name.encode()
        except UnicodeEncodeError:
            return self._refuse(path, "its name is not UTF-8")
        if not name.isprintable() or "\\" in name:
            return self._refuse(path, "its name cannot be written down")
        if len(name) > LONGEST_PATH:
            return self._refuse(path, "its path is too long")
        file = os.open(path[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        try:
            size = os.fstat(file).st_size
            if self._files < 1 or size > self._bytes:
                self._too_much = True
                return self._refuse(path, "with it there are too many files, or too many bytes in them")
            self._files -= 1
            self._bytes -= size
            self._host.send(wire.FILE, encoded)
            while data := os.read(file, _CHUNK):
                self._host.send(wire.DATA, data)
        finally:
            os.close(file)
        return None

    def _refuse(self, path: tuple[str, ...], why: str) -> None:
        if len(self._refused) < _MOST_REFUSED:
            name = "/".join(path).encode(errors="replace").decode()
            self._refused.append(f"{name[:200]}: {why}")


def matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a pattern means this path, both cut at `/`. `**` is any number of directories, none included."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        rest = pattern[1:]
        return (bool(path) and not rest) or any(matches(path[cut:], rest) for cut in range(len(path)) if rest)
    return bool(path) and _same(path[0], pattern[0]) and matches(path[1:], pattern[1:])


def leads(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether something below this directory may be meant by a pattern."""
    for part, wanted in zip(path, pattern, strict=False):
        if wanted == "**":
            return True
        if not _same(part, wanted):
            return False
    return len(path) < len(pattern)


def _same(name: str, pattern: str) -> bool:
    """Whether a name is meant by a pattern of `*` and `?`; goes back to the last `*` only, so it is never slow."""
    at, where = 0, 0
    star, resume = -1, 0
    while at < len(name):
        if where < len(pattern) and pattern[where] == "*":
            star, resume = where, at
            where += 1
        elif where < len(pattern) and pattern[where] in ("?", name[at]):
            at += 1
            where += 1
        elif star >= 0:
            resume += 1
            at, where = resume, star + 1
        else:
            return False
    return not pattern[where:].strip("*")


def _create(path: str) -> int:
    """A new file of the job's, with the directories above it."""
    whole = f"{JOB}/{path}"
    _make_directories_above(whole)
    return os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)


def _make_directories_above(path: str) -> None:
    parts = path.split("/")
    for count in range(2, len(parts)):
        with suppress(FileExistsError):
            os.mkdir("/".join(parts[:count]))


def _write_all(descriptor: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read(path: str) -> bytes:
    """The beginning of a file of /proc."""
    read = b""
    for piece in _pieces(path):
        read += piece
        if len(read) >= _CHUNK:
            break
    return read


def _pieces(path: str) -> Iterator[bytes]:
    """A file of /proc, as it is given out."""
    file = os.open(path, os.O_RDONLY)
    try:
        while piece := os.read(file, _CHUNK):
            yield piece
    finally:
        os.close(file)


def _json(value: object) -> bytes:
    """JSON of the few things that are said here."""
    if isinstance(value, dict):
        return b"{" + b",".join(_json(key) + b":" + _json(one) for key, one in value.items()) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(_json(one) for one in value) + b"]"
    if isinstance(value, str):
        return b'"' + "".join(map(_escaped, value)).encode() + b'"'
    if isinstance(value, bool):
        return b"true" if value else b"false"
    return repr(value).encode()


def _escaped(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if letter < " " or letter in '"\\' else letter

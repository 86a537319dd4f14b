"""Whether a backend holds here, found out by running something through it that tries to get out.

A program on PATH or a device node says nothing: kernels, containers and distributions forbid parts of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from tempfile import NamedTemporaryFile

from ferrum.errors import FerrumError
from ferrum.governance.acts import CodeReply, CodeRun, WhyEnded
from ferrum.sandbox.backend import Backend, Box, Kind, MemoryBy
from ferrum.sandbox.job import Job
from ferrum.sandbox.life import Starter
from ferrum.sandbox.runtimes import Runtime


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of trying a backend."""

    kind: Kind
    #: What is missing and what to type; empty where it works.
    missing: str = ""
    #: How memory is held; `None` where it does not work.
    memory_by: MemoryBy | None = None

    @property
    def works(self) -> bool:
        return not self.missing


#: Prints what it could do and should not. Each is one line of defence; all of them are in the attack suite.
_ATTACK = """
import ctypes, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
through = []
def attack(name, act):
    try:
        if act() not in (None, False, -1):
            through.append(name)
    except Exception:
        pass
attack("reads files of the worker", lambda: os.stat(os.environ["PROBE_FILE"]))
attack("sees processes of the host", lambda: sum(map(str.isdigit, os.listdir("/proc"))) > 3)
def opened():
    for name in os.listdir("/proc/1/fd"):
        for how in (os.O_RDONLY, os.O_WRONLY):
            try:
                # What is a file or a device in here can be had without PID 1.
                if not os.readlink(f"/proc/1/fd/{name}").startswith("/"):
                    return os.open(f"/proc/1/fd/{name}", how | os.O_NONBLOCK)
            except OSError:
                pass
attack("reads the environment of PID 1", lambda: open("/proc/1/environ").read().replace("HOME=/\\0", "") or None)
attack("opens the wire", opened)
# Where PID 1 is another user than this, its list tells nothing that could be opened.
attack("looks into PID 1", lambda: os.stat("/proc/1").st_uid == os.getuid() and os.listdir("/proc/1/fd"))
attack("writes to the system", lambda: open("/usr/probe", "w"))
attack("makes internet sockets", lambda: socket.socket(socket.AF_INET))
attack("makes sockets to the hypervisor", lambda: socket.socket(40))
attack("makes namespaces", lambda: libc.unshare(0x10000000) == 0)
attack("mounts", lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0)
attack("traces PID 1", lambda: libc.ptrace(16, 1, 0, 0) == 0)
attack("has capabilities", lambda: [line for line in open("/proc/self/status") if line.startswith("Cap")
    and int(line.split()[1], 16)] or None)
attack("is root", lambda: os.getuid() == 0)
attack("tells PID 1 to end", lambda: os.kill(1, 9))
json.dump(through, open("output.json", "w"))
"""


async def probe(backend: Backend, start: Starter, runtime: Runtime) -> Probe:
    """Run a small attack in a sandbox of this backend."""
    try:
        backend.check()
        with NamedTemporaryFile() as file:
            run = CodeRun(code=_ATTACK, env={"PROBE_FILE": file.name})
            reply = await _ran(run, start, runtime)
    except FerrumError as error:
        return Probe(backend.kind, missing=str(error))
    if reply.reason is not WhyEnded.OK or not isinstance(reply.output, list):
        return Probe(
            backend.kind, missing=f"a sandbox started, but nothing ran in it: {reply.detail} {reply.stderr[-300:]}"
        )
    if reply.output:
        return Probe(backend.kind, missing=f"it does not hold here: code in it {', '.join(map(str, reply.output))}")
    return Probe(backend.kind, memory_by=reply.memory_by)


async def _ran(run: CodeRun, start: Starter, runtime: Runtime) -> CodeReply:
    sandbox = await start(Box.of(run, runtime), False)
    try:
        return await sandbox.run(Job.of(run, {}, runtime), lambda stream, text: None)
    finally:
        await sandbox.end()

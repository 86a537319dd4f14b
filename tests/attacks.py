"""What code in a sandbox might try. Each attack is a program that says whether it got through.

They run inside, many in one sandbox, each in a process of its own.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weakened import Without

from ferrum.sandbox import seccomp
from ferrum.sandbox.runtimes import basic

_MACHINE = os.uname().machine

PRELUDE = """
import ctypes, errno, json, mmap, os, resource, socket, stat, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = json.loads(os.environ["NUMBERS"])

def call(name, *arguments):
    "A system call: what it returned, and the error."
    ctypes.set_errno(0)
    number = NUMBERS[name] if isinstance(name, str) else name
    libc.syscall.restype = ctypes.c_long
    words = [one if isinstance(one, (bytes, ctypes.Array)) else ctypes.c_long(one) for one in arguments]
    return libc.syscall(ctypes.c_long(number), *words), ctypes.get_errno()

def reached(name, *arguments):
    "Whether the kernel did it, or looked at it at all."
    done, error = call(name, *arguments)
    return done >= 0 or error not in (errno.EPERM, errno.ENOSYS)

def did(act, *arguments):
    try:
        return act(*arguments) is not False
    except (OSError, ValueError):
        return False

OPEN_AT_START = [one for one in range(3, 200) if did(os.fstat, one)]
RESULTS = {}
def attack(name, act):
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        through = False
        try:
            through = bool(act())
        finally:
            os.write(theirs, b"1" if through else b"0")
            os._exit(0)
    os.close(theirs)
    RESULTS[name] = os.read(ours, 1) == b"1"
    os.close(ours)
    os.waitpid(child, 0)
"""

EPILOGUE = """
json.dump(RESULTS, open("output.json", "w"))
"""


@dataclass(frozen=True)
class Attack:
    name: str
    #: The body of a function that returns whether it got through.
    code: str
    #: Without these it gets through.
    without: Without
    #: It would get through only where the worker is root.
    only_root: bool = False

    @property
    def function(self) -> str:
        body = "\n".join(f"    {line}" for line in self.code.strip().splitlines())
        return f"def act():\n{body}\nattack({self.name!r}, act)\n"


def program(attacks: list[Attack]) -> str:
    return PRELUDE + "\n".join(one.function for one in attacks) + EPILOGUE


def numbers() -> str:
    """The numbers of all system calls that have a name here."""
    tables = seccomp._ALLOWED + seccomp._CHECKED + seccomp._REFUSED
    column = seccomp._MACHINES[_MACHINE][1]
    return json.dumps({**dict(seccomp._numbers(tables, column)), "clone3": 435})


#: Where packages are installed to, where there are any: a bare machine has none.
HIDDEN = next((path for path in basic().hidden if any(Path(path).iterdir())), "")

_OF_THE_HOST = ((("--proc", "/proc"), ("--ro-bind", "/var", "/var", "--proc", "/proc")),)
_DUMPABLE = (("_prctl(_PR_SET_DUMPABLE, 0)", "pass"),)
_CAPABLE = (("--cap-drop", "ALL"), ("--cap-add", "ALL"))
_USERNS = ("--disable-userns",)


def _sealed(path: str) -> Without:
    return Without(swap=((("--remount-ro", path), ()),))


def _write_to(path: str) -> str:
    return f"""
name = os.path.join({path!r}, "planted")
if did(lambda: os.close(os.open(name, os.O_WRONLY | os.O_CREAT))):
    return True
"""


ATTACKS = [
    # The host's files.
    Attack(
        "read a file of the host",
        """return did(lambda: open(os.environ["HOST_FILE"]).read())""",
        Without(swap=_OF_THE_HOST),
    ),
    Attack(
        "connect to a socket in a directory of the host",
        """
one = socket.socket(socket.AF_UNIX)
return did(one.connect, os.environ["HOST_SOCKET"])""",
        Without(swap=_OF_THE_HOST),
    ),
    Attack(
        "see what is mounted nowhere",
        """
names = ("etc/shadow", "home", "root/.ssh", "run", "sys", "var", "boot", "mnt", "opt", "srv")
return [name for name in names if os.path.exists("/" + name)]""",
        Without(swap=_OF_THE_HOST),
    ),
    *(
        [Attack("see what was installed for the interpreter", f"return os.listdir({HIDDEN!r})", Without(hidden=True))]
        if HIDDEN
        else []
    ),
    Attack(
        "read what /proc tells of the machine",
        """
found = []
for name in ("cmdline", "kallsyms", "keys", "modules", "sys/kernel/core_pattern", "sys/kernel/random/boot_id"):
    did(lambda: open("/proc/" + name).read(1) and found.append(name))
return found""",
        Without(covers=True),
    ),
    Attack(
        "have the machine watched for it",
        """return did(os.open, "/proc/pressure/cpu", os.O_RDWR) or did(os.listdir, "/proc/sys/kernel")""",
        Without(covers=True),
    ),
    # Writing where it may not.
    *(Attack(f"write to {path}", _write_to(path), _sealed("/")) for path in ("/", "/dev", "/etc")),
    Attack("write to /usr/local", _write_to("/usr/local"), _sealed("/usr/local")),
    *([Attack("write to what is hidden", _write_to(HIDDEN), _sealed(HIDDEN))] if HIDDEN else []),
    # Other processes.
    Attack(
        "read the worker's environment",
        """
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if os.environ["MARK"][::-1].encode() in open(f"/proc/{pid}/environ", "rb").read():
            return True
    except OSError:
        pass""",
        Without(flags=("--as-pid-1", "--clearenv"), environment=True),
    ),
    Attack(
        "open what PID 1 has open",
        """return did(os.listdir, "/proc/1/fd")""",
        Without(lines=_DUMPABLE),
    ),
    Attack("read the memory of PID 1", """return did(open, "/proc/1/mem", "rb")""", Without(lines=_DUMPABLE)),
    Attack("read the environment of PID 1", """return did(open, "/proc/1/environ", "rb")""", Without(lines=_DUMPABLE)),
    Attack(
        "take a descriptor of PID 1",
        """return call("pidfd_getfd", call("pidfd_open", 1, 0)[0], 0, 0)[0] >= 0""",
        Without(lines=_DUMPABLE, calls=("pidfd_getfd",)),
    ),
    Attack(
        "read the memory of PID 1 by process_vm_readv",
        """
there = next(line for line in open("/proc/self/maps") if "[stack]" in line or "python" in line).split("-")[0]
room = ctypes.create_string_buffer(8)
ours = struct.pack("QQ", ctypes.addressof(room), 8)
theirs = struct.pack("QQ", int(there, 16), 8)
done, error = call("process_vm_readv", 1, ours, 1, theirs, 1, 0)
return done > 0 or error == errno.EFAULT""",
        Without(lines=_DUMPABLE, calls=("process_vm_readv",)),
    ),
    Attack(
        "trace PID 1", """return call("ptrace", 0x4206, 1, 0, 0)[0] == 0""", Without(lines=_DUMPABLE, calls=("ptrace",))
    ),
    Attack("be traced", """return call("ptrace", 0, 0, 0, 0)[0] == 0""", Without(calls=("ptrace",))),
    Attack(
        "have descriptors of PID 1",
        """return OPEN_AT_START""",
        Without(lines=(("        first = 3\n", "        first = 6\n"),)),
    ),
    Attack(
        "slow PID 1 down",
        """return call("setpriority", 0, 1, 19)[0] == 0""",
        Without(calls=("setpriority",)),
    ),
    Attack(
        "limit PID 1",
        """return call("prlimit64", 1, resource.RLIMIT_NOFILE, struct.pack("QQ", 4096, 4096), 0)[0] == 0""",
        Without(calls=("prlimit64",)),
    ),
    Attack(
        "use another processor",
        """return call("sched_setaffinity", 0, 8, struct.pack("Q", 2**64 - 1))[0] == 0
""",
        Without(calls=("sched_setaffinity",)),
    ),
    # The network.
    Attack(
        "make a socket of another family",
        """
found = []
for family in range(64):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        if family != socket.AF_UNIX and did(lambda: socket.socket(family, kind).close()):
            found.append(family)
return found""",
        Without(calls=("socket",)),
    ),
    Attack(
        "make a pair of sockets of another family",
        """return call("socketpair", 2, 1, 0, ctypes.create_string_buffer(8))[1] != errno.EAFNOSUPPORT""",
        Without(calls=("socketpair",)),
    ),
    Attack(
        "connect to a server of the host",
        """return did(lambda: socket.create_connection(("127.0.0.1", int(os.environ["HOST_PORT"])), 5))""",
        Without(flags=("--unshare-net",), calls=("socket",)),
    ),
    Attack(
        "connect to an abstract socket of the host",
        """
one = socket.socket(socket.AF_UNIX)
return did(one.connect, "\\0" + os.environ["HOST_ABSTRACT"])""",
        Without(flags=("--unshare-net",)),
    ),
    Attack(
        "enlarge a socket's buffer",
        """
one, other = socket.socketpair()
before = one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
did(one.setsockopt, socket.SOL_SOCKET, socket.SO_SNDBUF, 2**30)
return one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > before""",
        Without(calls=("setsockopt",)),
    ),
    Attack(
        "enlarge a pipe",
        """return call("fcntl", os.pipe()[0], 1031, 2**20)[0] >= 2**20""",
        Without(calls=("fcntl",)),
    ),
    # Privileges.
    Attack(
        "be root", """return 0 in (os.getuid(), os.getgid())""", Without(swap=((("--uid", "65534"), ("--uid", "0")),))
    ),
    Attack(
        "become root",
        """return did(os.setuid, 0) or did(os.setgid, 0) or did(os.setgroups, [0])""",
        Without(swap=((("--uid", "65534"), ("--uid", "0")),)),
    ),
    Attack(
        "have a capability",
        """
lines = [line.split() for line in open("/proc/self/status") if line.startswith("Cap")]
return [name for name, value in lines if name != "CapBnd:" and int(value, 16)]""",
        Without(swap=(_CAPABLE,)),
    ),
    Attack(
        "mount",
        """return call("mount", b"none", b"/tmp", b"tmpfs", 0, 0)[0] == 0""",
        Without(flags=_USERNS, swap=(_CAPABLE,), calls=("mount",)),
    ),
    Attack(
        "unmount what covers /proc",
        """return call("umount2", b"/proc/sys", 2)[0] == 0""",
        Without(flags=_USERNS, swap=(_CAPABLE,), calls=("umount2",)),
    ),
    Attack(
        "use the new way to mount",
        """return reached("fsopen", b"tmpfs", 0)""",
        Without(flags=_USERNS, swap=(_CAPABLE,), calls=("fsopen",)),
    ),
    Attack(
        "change the root",
        """return call("chroot", b"/tmp")[0] == 0""",
        Without(swap=(_CAPABLE,), calls=("chroot",)),
    ),
    Attack(
        "make a namespace",
        """return call("unshare", 0x10000000)[0] == 0""",
        Without(flags=_USERNS, calls=("unshare",)),
    ),
    Attack(
        "make a namespace by clone",
        """
done, error = call("clone", 0x10000000 | 17, 0, 0, 0, 0)
if done == 0:
    os._exit(0)
return done > 0""",
        Without(flags=_USERNS, calls=("clone",)),
    ),
    Attack(
        "make a namespace by clone3",
        """
asked = struct.pack("8Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0)
done, error = call("clone3", asked, len(asked))
if done == 0:
    os._exit(0)
return done > 0""",
        Without(flags=_USERNS, calls=("clone3",)),
    ),
    Attack(
        "enter a namespace",
        """return call("setns", os.open("/proc/self/ns/uts", 0), 0)[0] == 0""",
        Without(flags=_USERNS, swap=(_CAPABLE,), calls=("setns",)),
    ),
    Attack(
        "write where only the host's root may",
        """return did(os.open, "/proc/sys/kernel/core_pattern", os.O_WRONLY)""",
        Without(covers=True, user=True),
        only_root=True,
    ),
    Attack(
        "give up the layout of memory",
        """return call("personality", 0x0040000)[0] >= 0""",
        Without(calls=("personality",)),
    ),
    # Parts of the kernel that no program here needs.
    Attack(
        "make a key",
        """return call("add_key", b"user", b"name", b"value", 5, -3)[0] > 0""",
        Without(calls=("add_key",)),
    ),
    Attack("ask for keys", """return reached("keyctl", 0, -3, 1, 0, 0)""", Without(calls=("keyctl",))),
    Attack(
        "use io_uring",
        """return reached("io_uring_setup", 1, ctypes.create_string_buffer(120))""",
        Without(calls=("io_uring_setup",)),
    ),
    Attack(
        "use asynchronous requests",
        """return call("io_setup", 1, ctypes.create_string_buffer(8))[0] == 0""",
        Without(calls=("io_setup",)),
    ),
    Attack("use bpf", """return reached("bpf", 15, ctypes.create_string_buffer(64), 64)""", Without(calls=("bpf",))),
    Attack("use perf", """return reached("perf_event_open", 0, 0, -1, -1, 0)""", Without(calls=("perf_event_open",))),
    Attack("handle page faults", """return reached("userfaultfd", -1)""", Without(calls=("userfaultfd",))),
    Attack(
        "change descriptor tables of the processor",
        """return reached("modify_ldt", 0, 0, 0)""",
        Without(calls=("modify_ldt",)),
    ),
    Attack(
        "give pages to a pipe", """return reached("vmsplice", os.pipe()[1], 0, 0, 0)""", Without(calls=("vmsplice",))
    ),
    Attack(
        "open by handle",
        """return reached("name_to_handle_at", -100, b"/tmp", 0, 0, 0)""",
        Without(calls=("name_to_handle_at",)),
    ),
    Attack(
        "compare descriptors", """return reached("kcmp", os.getpid(), os.getpid(), 0, 0, 0)""", Without(calls=("kcmp",))
    ),
    Attack("write out the host's disks", """return call("sync")[0] == 0""", Without(calls=("sync",))),
    Attack(
        "spy on the host's page cache", """return reached("cachestat", 0, 0, 0, 0)""", Without(calls=("cachestat",))
    ),
    Attack("filter system calls", """return reached("seccomp", 2, 0, 0)""", Without(calls=("seccomp",))),
    # Memory that is nobody's.
    Attack(
        "make a file of memory", """return call("memfd_create", b"x", 0)[0] >= 0""", Without(calls=("memfd_create",))
    ),
    Attack(
        "make shared memory of System V",
        """return call("shmget", 0, 4096, 0o1600)[0] >= 0""",
        Without(calls=("shmget",)),
    ),
    Attack(
        "make a message queue of System V", """return call("msgget", 0, 0o1600)[0] >= 0""", Without(calls=("msgget",))
    ),
    Attack(
        "make semaphores of System V", """return call("semget", 0, 1, 0o1600)[0] >= 0""", Without(calls=("semget",))
    ),
    Attack(
        "make a message queue of POSIX",
        """return call("mq_open", b"queue", 0o102, 0o600, 0)[0] >= 0""",
        Without(calls=("mq_open",), limits=(resource.RLIMIT_MSGQUEUE,)),
    ),
    Attack(
        "have huge pages",
        """return reached("mmap", 0, 2**21, 3, 0x22 | 0x40000, -1, 0)""",
        Without(calls=("mmap",)),
    ),
    *(
        # What is mapped in part stays in full, and only that part is seen.
        Attack(
            f"have memory of no file that stays ({kind})",
            f"""return reached("mmap", 0, 2**21, 3, {flags}, -1, 0)""",
            Without(calls=("mmap",)),
        )
        for kind, flags in (("shared", 0x21), ("shared and validated", 0x23))
    ),
    Attack(
        "have memory of /dev/zero that stays",
        """
file = os.open("/dev/zero", os.O_RDWR)
assert os.read(file, 2) == bytes(2)
return did(mmap.mmap, file, 4096)""",
        Without(swap=((("/dev/full", "/dev/zero"), ("/dev/zero", "/dev/zero")),)),
    ),
    Attack(
        "share open files with another process, whose locks nobody sees when it has ended",
        """
done, error = call("clone", 0x400 | 17, 0, 0, 0, 0)
if done == 0:
    os._exit(0)
return done > 0""",
        Without(calls=("clone",)),
    ),
    Attack(
        "hang attributes on files",
        """
open("/tmp/with", "w").close()
return reached("setxattr", b"/tmp/with", b"user.x", b"x", 1, 9)""",
        Without(calls=("setxattr",)),
    ),
    # What a terminal would do.
    Attack(
        "type into a terminal",
        """
ours, theirs = os.openpty()
os.setsid()
import fcntl, termios
fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
try:
    fcntl.ioctl(theirs, termios.TIOCSTI, b"x")
    return True
except OSError as error:
    return error.errno == errno.EIO""",
        Without(devices=True, calls=("ioctl",)),
    ),
    Attack(
        "have a core dump made on the host",
        """
limit = resource.RLIMIT_CORE
return resource.getrlimit(limit)[0] > 1 or did(resource.setrlimit, limit, (0, 0))""",
        Without(calls=("prlimit64",)),
    ),
]


@contextmanager
def reachable(mark: str) -> Iterator[dict[str, str]]:
    """What there is on the host to be reached, and is reachable for everyone on it, as attacks are told of it.

    `mark` is what must not be found anywhere inside.
    """
    directory = Path(tempfile.mkdtemp(prefix="ferrum-host-", dir="/var/tmp"))
    directory.chmod(0o755)
    (directory / "secret").write_text("secret")
    by_path, by_port, abstract = socket.socket(socket.AF_UNIX), socket.socket(), socket.socket(socket.AF_UNIX)
    by_path.bind(str(directory / "socket"))
    (directory / "socket").chmod(0o777)
    by_port.bind(("127.0.0.1", 0))
    name = f"ferrum-test-{os.getpid()}"
    abstract.bind(f"\0{name}")
    for listening in (by_path, by_port, abstract):
        listening.listen(64)
    try:
        yield {
            "HOST_FILE": str(directory / "secret"),
            "HOST_SOCKET": str(directory / "socket"),
            "HOST_PORT": str(by_port.getsockname()[1]),
            "HOST_ABSTRACT": name,
            "NUMBERS": numbers(),
            "MARK": mark[::-1],
        }
    finally:
        for listening in (by_path, by_port, abstract):
            listening.close()
        shutil.rmtree(directory)

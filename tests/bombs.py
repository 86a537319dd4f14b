"""Programs that use more than they may, or will not end: each in a sandbox of its own."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from attacks import PRELUDE
from weakened import Without

from ferrum.governance.acts import CodeRun, WhyEnded

_NO_MEMORY_LIMIT = Without(told=(("memory", 2**40),), limits=(resource.RLIMIT_AS,))


@dataclass(frozen=True)
class Bomb:
    name: str
    code: str
    #: Why it ends.
    reason: WhyEnded
    #: Without these it comes to its own end, or to another one.
    without: Without | None
    then: WhyEnded = WhyEnded.OK
    timeout_s: float = 30.0

    def run(self, numbers: str) -> CodeRun:
        return CodeRun(
            code=PRELUDE + self.code,
            env={"NUMBERS": numbers},
            timeout_s=self.timeout_s,
            memory=64 * 2**20,
            disk=16 * 2**20,
        )


_FORKS = """
import signal
for _ in range(60):
    try:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
    except OSError:
        os._exit(5)
time.sleep(0.1)
os._exit(0)
"""

BOMBS = [
    Bomb("memory", "x = b'x' * (120 << 20)", WhyEnded.MEMORY, _NO_MEMORY_LIMIT),
    Bomb("memory at one stroke", "x = bytearray(2**40)", WhyEnded.MEMORY, None),
    Bomb(
        "memory of many processes",
        """
ours, theirs = os.pipe()
for _ in range(8):
    if os.fork() == 0:
        x = b'x' * (16 << 20)
        os.write(theirs, b'.')
        time.sleep(30)
        os._exit(0)
seen = 0
while seen < 8:
    seen += len(os.read(ours, 8))
""",
        WhyEnded.MEMORY,
        _NO_MEMORY_LIMIT,
    ),
    Bomb(
        "memory of a process whose first thread has left",
        """
def fill():
    time.sleep(0.1)
    x = b'x' * (120 << 20)
    time.sleep(0.1)
    os._exit(0)
threading.Thread(target=fill).start()
call("exit", 0)
""",
        WhyEnded.MEMORY,
        Without(lines=(("if threads > 1 and", "if threads > 9999 and"),), limits=(resource.RLIMIT_AS,)),
    ),
    Bomb(
        "memory of a process that cannot be looked into",
        """
for _ in range(2):
    if os.fork() == 0:
        libc.prctl(4, 0, 0, 0, 0)
        x = b'x' * (40 << 20)
        time.sleep(0.2)
        os._exit(0)
os.wait(), os.wait()
""",
        WhyEnded.MEMORY,
        # What hides counts as having as many mappings as it may, too.
        Without(
            lines=(("        return _usage(pid)[0]", "        return 0"),),
            limits=(resource.RLIMIT_AS,),
            told=(("mappings", 2**40),),
        ),
    ),
    Bomb(
        "memory of sockets",
        """
for _ in range(4):
    if os.fork() == 0:
        pairs = [socket.socketpair() for _ in range(50)]
        for one, _ in pairs:
            one.setblocking(False)
            did(one.send, b'x' * (100 << 10))
        time.sleep(0.2)
        os._exit(0)
for _ in range(4):
    os.wait()
""",
        WhyEnded.MEMORY,
        Without(told=(("sockets", 2**30),)),
    ),
    Bomb(
        "locks behind others that are listed first",
        """
import fcntl
for at in range(15):
    if os.fork() == 0:
        held = [open(f"held-{at}-{one}", "w") for one in range(100)]
        for one in held:
            fcntl.flock(one, fcntl.LOCK_EX)
        time.sleep(5)
        os._exit(0)
time.sleep(0.5)
file = open("locked", "w")
for at in range(20_000, 0, -2):
    fcntl.lockf(file, fcntl.LOCK_EX, 1, at)
time.sleep(1.5)
os._exit(0)
""",
        WhyEnded.MEMORY,
        Without(lines=(("if found > self._most_locks:\n                    return True", "break"),)),
    ),
    Bomb(
        "mappings",
        """
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
for _ in range(3):
    if os.fork() == 0:
        start = libc.mmap(None, 40_000 << 12, 3, 0x22, -1, 0)
        for at in range(0, 40_000, 2):
            libc.mprotect(start + (at << 12), 1 << 12, 1)
        time.sleep(2)
        os._exit(0)
for _ in range(3):
    os.wait()
""",
        WhyEnded.MEMORY,
        Without(told=(("mappings", 2**40),)),
    ),
    Bomb(
        "mappings that nobody may see",
        """
for _ in range(2):
    if os.fork() == 0:
        libc.prctl(4, 0, 0, 0, 0)
        time.sleep(2)
        os._exit(0)
for _ in range(2):
    os.wait()
""",
        WhyEnded.MEMORY,
        Without(lines=(("found += _MOST_MAPPINGS", "pass"),)),
    ),
    Bomb(
        "locks",
        """
import fcntl
file = open("locked", "w")
for at in range(40_000, 0, -2):
    fcntl.lockf(file, fcntl.LOCK_EX, 1, at)
time.sleep(1.5)
""",
        WhyEnded.MEMORY,
        Without(told=(("locks", 2**30),)),
    ),
    Bomb(
        "disk",
        "open('big', 'wb').write(b'x' * (20 << 20))",
        WhyEnded.DISK,
        Without(sizes=True, told=(("disk", 2**40),), limits=(resource.RLIMIT_FSIZE,)),
    ),
    Bomb(
        "disk in small files",
        "for one in range(20): open(str(one), 'wb').write(b'x' * (1 << 20))",
        WhyEnded.DISK,
        Without(sizes=True, told=(("disk", 2**40),)),
    ),
    Bomb(
        "shared memory in files",
        "for one in range(20): open(f'/dev/shm/{one}', 'wb').write(b'x' * (1 << 20))",
        WhyEnded.DISK,
        Without(sizes=True, told=(("disk", 2**40),)),
    ),
    Bomb(
        "disk in several places",
        """
for where in ("/job", "/tmp", "/dev/shm"):
    open(f"{where}/part", "wb").write(b"x" * (8 << 20))
time.sleep(0.1)
""",
        WhyEnded.DISK,
        Without(told=(("disk", 2**40),)),
    ),
    Bomb(
        "files",
        "for one in range(25_000): os.close(os.open(str(one), os.O_CREAT))\ntime.sleep(0.1)",
        WhyEnded.DISK,
        Without(told=(("inodes", 2**30),)),
    ),
    Bomb(
        "output",
        "for _ in range(70): os.write(1, b'x' * (1 << 20)) == 1 << 20 or os._exit(1)",
        WhyEnded.OUTPUT,
        Without(told=(("most", 2**40),)),
    ),
    Bomb(
        "output on stderr",
        "for _ in range(70): os.write(2, b'x' * (1 << 20)) == 1 << 20 or os._exit(1)",
        WhyEnded.OUTPUT,
        Without(told=(("most", 2**40),)),
    ),
    Bomb("processes", _FORKS, WhyEnded.ERROR, Without(limits=(resource.RLIMIT_NPROC,), told=(("processes", 1000),))),
    Bomb(
        "threads",
        """
def wait(): time.sleep(30)
for _ in range(60):
    try:
        threading.Thread(target=wait, daemon=True).start()
    except RuntimeError:
        os._exit(5)
time.sleep(0.1)
os._exit(0)
""",
        WhyEnded.ERROR,
        Without(limits=(resource.RLIMIT_NPROC, resource.RLIMIT_AS), told=(("processes", 1000),)),
    ),
    Bomb(
        "processes without end",
        """
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        WhyEnded.TIMEOUT,
        None,
        timeout_s=0.5,
    ),
    Bomb(
        "a loop without end",
        "deadline = time.monotonic() + 0.4\nwhile time.monotonic() < deadline: pass",
        WhyEnded.TIMEOUT,
        Without(timeout=True),
        timeout_s=0.2,
    ),
    Bomb(
        "a sleeper that no signal wakes",
        """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
deadline = time.monotonic() + 0.4
while time.monotonic() < deadline: time.sleep(0.01)
""",
        WhyEnded.TIMEOUT,
        Without(timeout=True),
        timeout_s=0.2,
    ),
    Bomb(
        "signals to PID 1",
        """
import signal
for number in signal.valid_signals():
    did(os.kill, 1, number)
time.sleep(1)
""",
        WhyEnded.OK,
        Without(
            lines=(
                (
                    "_signal.SIGHUP):\n        _signal.signal(number, _signal.SIG_IGN)",
                    "_signal.SIGHUP):\n        pass",
                ),
            )
        ),
        then=WhyEnded.KILLED,
    ),
    Bomb(
        "a forged result",
        """
frames = b""
for kind, body in ((b"E", b'{"why":"","full":false,"cpu":0.0,"exit":0,"peak":0,"stdout":0,"stderr":0}'),
                   (b"Z", b'{"refused":[],"too_much":false}')):
    frames += kind + len(body).to_bytes(4, "big") + body
for descriptor in range(64):
    did(os.write, descriptor, frames)
    did(lambda: os.write(os.open(f"/proc/1/fd/{descriptor}", os.O_WRONLY), frames))
os._exit(3)
""",
        WhyEnded.ERROR,
        Without(lines=(("        first = 3\n", "        first = 6\n"),)),
    ),
]

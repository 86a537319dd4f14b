"""What code in a sandbox can do, what it leaves, and what is left of it: nothing."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import weakened
from fleet import eventually
from weakened import Weak, Without

from ferrum.errors import SandboxError
from ferrum.governance.acts import CodeReply, CodeRun, WhyEnded
from ferrum.sandbox import Kind, Sandboxes, bubblewrap, cgroup, init, seccomp, wire
from ferrum.sandbox import user as user_of_the_host
from ferrum.sandbox.backend import Backend, Box, Cell, Missing
from ferrum.sandbox.bubblewrap import Bubblewrap
from ferrum.sandbox.cgroup import Cgroups
from ferrum.sandbox.init import leads, matches
from ferrum.sandbox.job import Job, why
from ferrum.sandbox.life import Sandbox
from ferrum.sandbox.runtimes import basic
from ferrum.sandbox.user import User, borrowed
from ferrum.settings import Settings

needs_a_sandbox = pytest.mark.usefixtures("sandbox")


@pytest.fixture(scope="module")
def sandbox() -> None:
    weakened.needed()


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that nobody tells of."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def listed(directory: str | Path) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


def mounts() -> str:
    # But those of podman, whose sandboxes other tests use meanwhile.
    lines = Path("/proc/self/mountinfo").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if "/containers/" not in line)


def children() -> list[str]:
    """The processes that this one has started and not waited for."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def nothing(stream: str, text: str) -> None:
    """Listens to nothing."""


def using(work: Callable[[Sandboxes], Awaitable[Any]], **options: Any) -> Any:
    """What `work` returns, with sandboxes that are closed behind it."""

    async def whole() -> Any:
        sandboxes = Sandboxes(**options)
        try:
            return await work(sandboxes)
        finally:
            await sandboxes.aclose()

    return asyncio.run(whole())


def ran(run: CodeRun, files: dict[str, bytes] | None = None, say: Callable[[str, str], None] = nothing) -> CodeReply:
    return weakened.run(run, files=files or {}, say=say)


# What code can do.


@needs_a_sandbox
def test_python_runs_and_says_how_it_went() -> None:
    reply = ran(CodeRun(code="import sys\nprint('out')\nprint('err', file=sys.stderr)"))
    assert (reply.reason, reply.exit_code, reply.signal, reply.detail) == (WhyEnded.OK, 0, None, "")
    assert (reply.stdout, reply.stderr) == ("out\n", "err\n")
    assert (reply.backend, reply.memory_by) == ("bubblewrap", "watchdog")
    assert reply.cut == ()
    assert reply.wall_s > 0
    assert reply.cpu_s is not None


@needs_a_sandbox
def test_files_go_in_and_come_out_and_json_is_its_output() -> None:
    code = """
import json, pathlib
rows = pathlib.Path("data/in.csv").read_text().split(",")
pathlib.Path("made/deep").mkdir(parents=True)
pathlib.Path("made/deep/chart.png").write_bytes(bytes(range(256)) * 2000)
pathlib.Path("made/note.txt").write_text("not asked for")
json.dump({"rows": len(rows)}, open("output.json", "w"))
"""
    reply = ran(CodeRun(code=code, outputs=("made/**/*.png",)), {"data/in.csv": b"1,2,3", "big": bytes(1_000_000)})
    assert (reply.has_output, reply.output) == (True, {"rows": 3})
    assert reply.files == {"made/deep/chart.png": bytes(range(256)) * 2000}


@needs_a_sandbox
def test_shell_and_commands_run_too() -> None:
    reply = ran(CodeRun(language="shell", code='read -r line < in; echo "$line $X" | awk "{print \\$2, \\$1}"; exit 7',
                        env={"X": "there"}), {"in": b"hello\n"})  # fmt: skip
    assert (reply.stdout, reply.exit_code, reply.reason) == ("there hello\n", 7, WhyEnded.ERROR)
    reply = ran(CodeRun(command=("python3", "-c", "import sys; print(sys.argv)", "a b")))
    assert reply.stdout == "['-c', 'a b']\n"
    reply = ran(CodeRun(command=("no-such-program",)))
    assert (reply.exit_code, reply.stderr) == (127, "no-such-program: No such file or directory\n")
    reply = ran(CodeRun(command=("/usr",)))
    assert (reply.exit_code, reply.stderr) == (126, "/usr: Permission denied\n")


@needs_a_sandbox
def test_a_program_finds_what_it_expects() -> None:
    code = """
import json, multiprocessing, os, sqlite3, subprocess, sys, tempfile, threading, asyncio, socket
def square(x): return x * x
found = {
    "cwd": os.getcwd(), "argv": sys.argv, "env": sorted(os.environ), "name": __name__, "stdin": sys.stdin.read(),
    "user": os.getuid(), "home": os.path.expanduser("~"), "cores": len(os.sched_getaffinity(0)),
    "pool": multiprocessing.get_context("fork").Pool(2).map(square, [1, 2, 3]),
    "child": subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout,
    "loop": asyncio.run(asyncio.sleep(0, 5)), "temporary": tempfile.gettempdir(),
    "host": socket.gethostname(), "installed": [p for p in sys.path if "site-packages" in p],
}
base = sqlite3.connect("x.db")
base.execute("create table t (x)")
base.execute("insert into t values (3)")
base.commit()
found["sql"] = base.execute("select x from t").fetchone()
thread = threading.Thread(target=lambda: found.update(thread=True))
thread.start()
thread.join()
import local
found["local"] = local.VALUE
json.dump(found, open("output.json", "w"))
"""
    reply = ran(CodeRun(code=code, env={"GIVEN": "1"}, cpus=0.5), {"local.py": b"VALUE = 'mine'"})
    assert reply.reason is WhyEnded.OK, reply.stderr
    assert reply.output == {
        "cwd": "/job", "argv": ["-c"], "env": ["GIVEN", "HOME", "LANG", "PATH", "TMPDIR"], "name": "__main__",
        "stdin": "", "user": 65534, "home": "/tmp", "cores": 1, "pool": [1, 4, 9], "sql": [3], "child": "42\n",
        "loop": 5, "temporary": "/tmp", "host": "sandbox", "installed": [], "thread": True, "local": "mine",
    }  # fmt: skip


@needs_a_sandbox
def test_how_python_ends_is_how_it_ends_here() -> None:
    assert ran(CodeRun(code="exit(3)")).exit_code == 3
    assert ran(CodeRun(code="import sys; sys.exit('why')")).stderr == "why\n"
    assert ran(CodeRun(code="import atexit; atexit.register(print, 'last')")).stdout == "last\n"
    assert ran(CodeRun(code="f = open('output.json', 'w'); f.write('[1]')")).output == [1]
    failed = ran(CodeRun(code="def f():\n    return 1 / 0\nf()"))
    # Newer versions of Python mark more of a line.
    lines = [line for line in failed.stderr.splitlines() if set(line) - set(" ~^")]
    assert lines == [
        "Traceback (most recent call last):",
        '  File "<code>", line 3, in <module>',
        "    f()",
        '  File "<code>", line 2, in f',
        "    return 1 / 0",
        "ZeroDivisionError: division by zero",
    ]
    assert "SyntaxError" in ran(CodeRun(code="def")).stderr
    hooked = ran(CodeRun(code="import sys\nsys.excepthook = lambda *a: print('hook', a[1])\n1 / 0"))
    assert (hooked.stdout, hooked.exit_code) == ("hook division by zero\n", 1)
    died = ran(CodeRun(code="import ctypes; ctypes.string_at(0)"))
    assert (died.reason, died.signal, died.detail) == (WhyEnded.ERROR, "SIGSEGV", "it was ended by SIGSEGV")


@needs_a_sandbox
def test_variables_for_an_interpreter_reach_its_own_and_not_pid_1() -> None:
    code = "import sys; print(sys.flags.optimize, sys.flags.isolated, open('/proc/1/cmdline').read().split(chr(0))[1])"
    reply = ran(CodeRun(code=code, env={"PYTHONOPTIMIZE": "2", "LD_PRELOAD": "/job/evil.so"}))
    assert reply.stdout == "2 0 -I\n"


@needs_a_sandbox
def test_what_it_says_is_heard_as_it_says_it() -> None:
    heard: list[tuple[str, str]] = []
    # It waits for what is put there only once it was heard, so hearing it late would be never.
    code = "import time\nprint('Grüße')\ntime.sleep(60)"

    async def work(sandboxes: Sandboxes) -> None:
        task = asyncio.create_task(sandboxes.run(CodeRun(code=code), {}, lambda *said: heard.append(said)))
        await until(lambda: bool(heard))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    using(work)
    assert heard[0] == ("stdout", "Grüße\n")


@needs_a_sandbox
def test_a_lot_is_heard_in_part_kept_in_part_and_counted() -> None:
    heard: list[str] = []
    reply = ran(CodeRun(code="import sys\nsys.stdout.write('x' * (3 << 20))"), say=lambda _, text: heard.append(text))
    assert sum(map(len, heard)) == 64 * 1024
    assert len(reply.stdout) == 2**20
    assert reply.cut == ("stdout",)
    assert reply.reason is WhyEnded.OK


@needs_a_sandbox
@pytest.mark.parametrize(
    ("left", "problem"),
    [
        ("'{'", "it is not JSON"),
        ("'NaN'", "it is not JSON"),
        ("'1e999'", "it is not JSON"),
        ("'\"' + chr(92) + 'ud800\"'", "it is not JSON"),
        ("'[' * 200000", "it is not JSON"),
        ("'[' + '1,' * (2 << 20) + '1]'", "more than 2097152 bytes"),
        ("'[' * 101 + ']' * 101", "more than 100 lists and objects in each other"),
    ],
)
def test_an_output_that_nobody_could_keep_is_none(left: str, problem: str) -> None:
    reply = ran(CodeRun(code=f"open('output.json', 'w').write({left})"))
    assert not reply.has_output
    assert len(reply.cut) == 1
    assert problem in reply.cut[0]


@needs_a_sandbox
def test_an_output_that_is_deep_comes_back_as_it_is() -> None:
    reply = ran(CodeRun(code="open('output.json', 'w').write('[' * 99 + '{\"a\": 1}' + ']' * 99)"))
    assert CodeReply.model_validate_json(reply.model_dump_json()) == reply
    assert reply.has_output


@needs_a_sandbox
def test_a_file_whose_path_is_too_long_is_refused_alone() -> None:
    code = """
import os
deep = "/".join(["d" * 250] * 4)
os.makedirs(deep)
for path in (deep + "/far.txt", "near.txt"):
    open(path, "w").write("here")
print("well")
"""
    reply = ran(CodeRun(code=code, outputs=("**/*.txt",)))
    assert (reply.reason, reply.stdout, reply.files) == (WhyEnded.OK, "well\n", {"near.txt": b"here"})
    assert len(reply.cut) == 1
    assert reply.cut[0].endswith("its path is too long")


@needs_a_sandbox
def test_one_that_takes_too_long_says_what_it_used_until_then_and_gives_back_what_it_left() -> None:
    code = "open('half.txt', 'w').write('done')\nwhile True: pass"
    reply = ran(CodeRun(code=code, outputs=("half.txt",), timeout_s=0.5, cpus=2))
    assert (reply.reason, reply.detail) == (WhyEnded.TIMEOUT, "it ran for longer than 0.5 s")
    assert reply.files == {"half.txt": b"done"}
    assert reply.cpu_s is not None
    assert reply.cpu_s > 0
    assert reply.peak_memory is not None
    assert reply.peak_memory > 2**20


@needs_a_sandbox
def test_the_time_zone_is_the_one_that_is_asked_for() -> None:
    ask = "import time; print(time.tzname[0], end=' ', flush=True); import os; os.system('date +%Z')"
    assert ran(CodeRun(code=ask, env={"TZ": "JST-9"})).stdout == "JST JST\n"


@needs_a_sandbox
def test_a_worker_with_less_than_a_job_may_have_shares_that() -> None:
    program = """
import asyncio, resource
from ferrum.governance.acts import CodeRun
from ferrum.sandbox import Sandboxes
for limit, value in ((resource.RLIMIT_NOFILE, 100), (resource.RLIMIT_FSIZE, 2**20)):
    resource.setrlimit(limit, (value, value))
code = "import resource as r; print(r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_FSIZE))"
async def main():
    sandboxes = Sandboxes(warm=0)
    print((await sandboxes.run(CodeRun(code=code), {}, lambda *_: None)).stdout, end="")
    await sandboxes.aclose()
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(100, 100) (1048576, 1048576)\n", "")


# Why it ended.


@pytest.mark.parametrize(
    ("ended", "last_words", "reason"),
    [
        ({"exit": 0, "full": True}, "MemoryError", WhyEnded.OK),
        ({"exit": 1}, "", WhyEnded.ERROR),
        ({"exit": 1}, "Traceback\nMemoryError\n", WhyEnded.MEMORY),
        ({"exit": 1}, "MemoryError\nbut that was caught", WhyEnded.ERROR),
        ({"exit": 1, "full": True}, "", WhyEnded.DISK),
        ({"exit": 1}, "OSError: [Errno 28] No space left on device", WhyEnded.DISK),
        ({"signal": 25}, "", WhyEnded.DISK),
        ({"signal": 24}, "", WhyEnded.TIMEOUT),
        ({"signal": 9, "cpu": 29.5}, "", WhyEnded.TIMEOUT),
        ({"signal": 9, "cpu": 0.1}, "", WhyEnded.ERROR),
        ({"signal": 40}, "", WhyEnded.ERROR),
        ({"why": "disk"}, "", WhyEnded.DISK),
    ],
)
def test_why_it_ended_follows_from_what_is_known(ended: dict[str, Any], last_words: str, reason: WhyEnded) -> None:
    assert why(CodeRun(code="x"), ended, last_words, no_memory=False)[0] is reason
    if ended.get("exit") != 0:
        assert why(CodeRun(code="x"), ended, last_words, no_memory=True)[0] is WhyEnded.MEMORY


@needs_a_sandbox
def test_processor_time_ends_it_too() -> None:
    spinning = CodeRun(code="while True: pass", timeout_s=1, cpus=0.01)
    reply = weakened.run(spinning, Without(timeout=True))
    assert (reply.reason, reply.signal) == (WhyEnded.TIMEOUT, "SIGKILL")


# What cannot be asked for.


@pytest.mark.parametrize(
    ("run", "files", "message"),
    [
        (CodeRun(code="x", runtime="python-dta"), {}, "there is no runtime 'python-dta' here"),
        (CodeRun(), {}, "either 'code' or 'command'"),
        (CodeRun(code="x", command=("ls",)), {}, "either 'code' or 'command'"),
        (CodeRun(command=()), {}, "it names no program"),
        (CodeRun(command=("",)), {}, "it names no program"),
        (CodeRun(command=("ls", "\ud800")), {}, "no half of a character"),
        (CodeRun(code="'\ud800'"), {}, "half a character"),
        (CodeRun(code="x", env={"A": "\ud800"}), {}, "'A' cannot be a variable"),
        (CodeRun(code="x"), {"../x": b""}, "no path within the working directory"),
        (CodeRun(code="x"), {"/etc/x": b""}, "no path within the working directory"),
        (CodeRun(code="x"), {"a//b": b""}, "no path within the working directory"),
        (CodeRun(code="x"), {"a\nb": b""}, "no path within the working directory"),
        (CodeRun(code="x", outputs=("../*",)), {}, "no path within the working directory"),
        (CodeRun(code="x", outputs=("**/a/**/b/**/c/**",)), {}, "more than 3"),
        (CodeRun(code="x", outputs=tuple(f"{n}" for n in range(65))), {}, "65 patterns are too many"),
        (CodeRun(code="x"), {".": b""}, "no path within the working directory"),
        (CodeRun(code="x"), {"a" * 256: b""}, "no path within the working directory"),
        (CodeRun(code="x"), {"a": b"", "a/b": b""}, "'a' is a file and cannot be the directory of 'a/b'"),
        (CodeRun(code="x"), dict.fromkeys(map(str, range(5001)), b""), "5001 are too many"),
        (CodeRun(code="x", output_file="*.json"), {}, "without '.' and '.'"),
        (CodeRun(code="x", disk=10), {"a": bytes(11)}, "bigger than its disk"),
        (CodeRun(code="x", env={"A=B": ""}), {}, "cannot be a variable"),
        (CodeRun(command=("a\0b",)), {}, "holds no NUL"),
        (CodeRun(language="shell", code=":" * 200_000), {}, "at most 128 KiB"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(run: CodeRun, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(SandboxError, match=message):
        using(lambda sandboxes: sandboxes.run(run, files, nothing), backends={})


def test_without_a_backend_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = CodeRun(code="print('ran')")
    with pytest.raises(SandboxError, match="code never runs without one: bubblewrap: there is no bwrap on PATH: apt "):
        using(lambda sandboxes: sandboxes.run(run, {}, nothing))
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho bubblewrap 0.4.1\n")
    old.chmod(0o755)
    with pytest.raises(SandboxError, match=r"bwrap is version 0.4.1, and 0.8 or newer is needed"):
        using(lambda sandboxes: sandboxes.run(run, {}, nothing))
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="bubblewrap is for Linux only: on macOS"):
        using(lambda sandboxes: sandboxes.run(run, {}, nothing))


@pytest.mark.parametrize(
    ("words", "setting", "remedy"),
    [
        (
            "setting up uid map: Permission denied",
            "kernel/apparmor_restrict_unprivileged_userns=1",
            "bwrap-userns-restr",
        ),
        ("No permissions to create new namespace", "kernel/unprivileged_userns_clone=0", "unprivileged_userns_clone=1"),
        ("Creating new namespace failed", "user/max_user_namespaces=0", "user.max_user_namespaces=15000"),
        ("Creating new namespace failed: Operation not permitted", "", "seccomp=unconfined"),
        ("Can't mount proc on /newroot/proc: Operation not permitted", "", "systempaths=unconfined"),
        ("execvp /opt/python: Permission denied", "", "readable by everyone"),
        ("something new", "", ""),
    ],
)
def test_what_keeps_it_from_starting_comes_with_a_remedy(
    words: str, setting: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, value = setting.partition("=")
    monkeypatch.setattr(bubblewrap, "_setting", lambda asked: value if asked == name else "")
    said = Bubblewrap().explain(f"bwrap: {words}")
    assert remedy in said
    assert bool(said) == bool(remedy)


# Probing and checking from outside.


@needs_a_sandbox
def test_a_worker_hears_what_holds_here() -> None:
    (found,) = using(lambda sandboxes: sandboxes.probe())
    assert (found.kind, found.works, found.missing, found.memory_by) == (Kind.BUBBLEWRAP, True, "", "watchdog")


@needs_a_sandbox
def test_a_backend_that_does_not_hold_fails_its_probe() -> None:
    weak = Without(calls=("socket",))
    with weakened.taken_out(weak):
        (found,) = using(lambda sandboxes: sandboxes.probe(), backends={Kind.BUBBLEWRAP: lambda: Weak(weak)})
    assert not found.works
    assert found.missing == "it does not hold here: code in it makes internet sockets, makes sockets to the hypervisor"


@needs_a_sandbox
@pytest.mark.parametrize(
    ("without", "problem"),
    [
        (Without(filter=True), "no filter holds its system calls"),
        (Without(swap=((("--cap-drop", "ALL"), ("--cap-add", "ALL")),)), "it has capabilities"),
        (Without(swap=((("--uid", "65534"), ("--uid", "0")),)), "it is the wrong user"),
        (Without(flags=("--unshare-net",)), "it shares namespaces with us .net"),
        (Without(flags=("--as-pid-1",)), None),
    ],
)
def test_what_is_not_confined_is_killed_before_it_runs_anything(without: Without, problem: str | None) -> None:
    ran_it: list[str] = []
    options = {"backends": {Kind.BUBBLEWRAP: lambda: Weak(without)}}
    run = CodeRun(code="print('ran')")
    with pytest.raises(SandboxError, match=problem or "no sandbox"):
        using(lambda sandboxes: sandboxes.run(run, {}, lambda _, text: ran_it.append(text)), **options)
    assert ran_it == []


def test_each_thing_that_is_wrong_from_outside_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "_namespace", lambda kind: 1)
    good = {
        "PPid": "7", "NSpid": "9 1", "NoNewPrivs": "1", "Seccomp": "2", "Uid": "60001 60001 60001 60001",
        "uid_map": "65534 60001 1", **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16),
    }  # fmt: skip
    told = {f"{kind}-namespace": 2 for kind in ("ipc", "mnt", "net", "pid", "uts")}
    assert bubblewrap._unconfined(good, told, 7, 60001) == ""
    for change in (
        {"PPid": "1"}, {"NSpid": "9 2"}, {"NoNewPrivs": "0"}, {"Seccomp": "0"}, {"Uid": "0 0 0 0"}, {"CapBnd": "1"},
        {"uid_map": "0 0 4294967295"},
    ):  # fmt: skip
        assert bubblewrap._unconfined(good | change, told, 7, 60001)
    assert bubblewrap._unconfined(good | {"Uid": "0 0 0 0", "uid_map": "65534 0 1"}, told, 7, 0)
    assert bubblewrap._unconfined(good, told | {"net-namespace": 1}, 7, 60001)
    assert bubblewrap._unconfined(good, {}, 7, 60001)


# PID 1 is believed no further than what it may say.


class Liar(Backend):
    """A backend whose PID 1 has been taken over."""

    kind = Kind.BUBBLEWRAP

    def __init__(self, said: bytes) -> None:
        self._said = said

    def check(self) -> None:
        pass

    def start(self, box: Box) -> Cell:
        return LiarCell(self._said)


class LiarCell(Cell):
    memory_by = "watchdog"

    def __init__(self, said: bytes) -> None:
        reads, self.stdin = os.pipe()
        self.stdout, writes = os.pipe()
        import fcntl

        for descriptor in (self.stdin, writes):
            fcntl.fcntl(descriptor, 1031, 2**20)
        os.write(writes, said)
        os.close(writes)
        self._reads = reads

    def confirm(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def reap(self) -> None:
        os.close(self._reads)

    def last_words(self) -> str:
        return "I am PID 1"


_UP = wire.frame(wire.UP) + wire.frame(wire.READY)
_END = wire.frame(wire.END, b'{"why":"","full":false,"cpu":0,"peak":1,"exit":0,"stdout":0,"stderr":0}')
_DONE = wire.frame(wire.DONE, b'{"refused":["a\\u001b[2Jb"],"too_much":false}')


def lied(said: bytes) -> CodeReply:
    return weakened.run_with(Liar(said), CodeRun(code="x", outputs=("*.txt",)))


def test_what_a_sandbox_may_say_is_taken() -> None:
    reply = lied(_UP + _END + wire.frame(wire.FILE, b"a.txt") + wire.frame(wire.DATA, b"1") + _DONE)
    assert (reply.reason, reply.files, reply.cut) == (WhyEnded.OK, {"a.txt": b"1"}, ("a\N{REPLACEMENT CHARACTER}[2Jb",))


@pytest.mark.parametrize(
    "said",
    [
        wire.frame(wire.FILE, b"../a.txt"),
        wire.frame(wire.FILE, b"/a.txt"),
        wire.frame(wire.FILE, b"a.png"),
        wire.frame(wire.FILE, b"a\n.txt"),
        wire.frame(wire.FILE, b"\xff.txt") * 2,
        wire.frame(wire.FILE, b"a.txt") + wire.frame(wire.FILE, b"a.txt") * 2,
        wire.frame(wire.DATA, b"of no file"),
        b"".join(wire.frame(wire.FILE, f"{n}.txt".encode()) for n in range(300)),
        wire.frame(wire.STDOUT, b"after the end"),
        wire.frame(wire.DONE, b"no JSON"),
        wire.frame(wire.DONE, b"{}"),
        b"F\x00\x00",
    ],
)
def test_what_it_may_not_give_back_is_not_taken(said: bytes) -> None:
    reply = lied(_UP + _END + said + _DONE)
    assert (reply.reason, reply.detail) == (WhyEnded.KILLED, "its sandbox died; it last wrote: I am PID 1")


@pytest.mark.parametrize(
    "end",
    [b"no JSON", b"[]", b"{}", b'{"why":"","full":false,"cpu":0,"exit":"0"}', b'{"why":"","full":0,"cpu":[],"exit":0}',
     b'{"why":"","full":false,"cpu":0,"exit":-1}', b"[" * 100_000],
)  # fmt: skip
def test_an_end_that_cannot_be_is_none(end: bytes) -> None:
    assert lied(_UP + wire.frame(wire.END, end) + _DONE).reason is WhyEnded.KILLED


def test_a_sandbox_that_does_not_come_up_is_an_error() -> None:
    for said in (b"", wire.frame(wire.READY), b"U\xff\xff\xff\xff"):
        with pytest.raises(SandboxError, match="a sandbox did not start: it died; it last wrote: I am PID 1"):
            lied(said)


def test_a_sandbox_that_says_too_much_is_ended() -> None:
    reply = lied(_UP + wire.frame(wire.STDOUT, bytes(200_000)) * 4 + _END + _DONE)
    assert len(reply.stdout) == 800_000


def test_one_that_is_cancelled_while_it_starts_is_cleared_away() -> None:
    go_on, reaped = threading.Event(), threading.Event()

    class SlowCell(LiarCell):
        def reap(self) -> None:
            super().reap()
            reaped.set()

    class Slow(Liar):
        def __init__(self) -> None:
            super().__init__(b"")

        def start(self, box: Box) -> Cell:
            go_on.wait()
            return SlowCell(b"")

    async def work(sandboxes: Sandboxes) -> None:
        task = asyncio.create_task(sandboxes.run(CodeRun(code="x"), {}, nothing))
        await asyncio.sleep(0)
        await until(sandboxes._opening.locked)
        task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(reaped.is_set)

    using(work, backends={Kind.BUBBLEWRAP: Slow})


# The pool.


@needs_a_sandbox
def test_a_sandbox_that_waits_has_its_runtime_and_is_used_once() -> None:
    code = "import sys; print('csv' in sys.modules, open('/proc/self/stat').read().split()[21])"
    run = CodeRun(code=code)

    async def work(sandboxes: Sandboxes) -> tuple[CodeReply, CodeReply]:
        await sandboxes.prepare(run)
        await _ready(sandboxes, 1)
        first = await sandboxes.run(run, {}, nothing)
        await _ready(sandboxes, 1)
        return first, await sandboxes.run(run, {}, nothing)

    first, second = using(work)
    assert first.stdout.startswith("True ")
    assert second.stdout.startswith("True ")
    assert first.stdout != second.stdout


@needs_a_sandbox
def test_one_that_dies_while_it_waits_is_replaced() -> None:
    run = CodeRun(code="print(1)")

    async def work(sandboxes: Sandboxes) -> str:
        await sandboxes.prepare(run)
        await _ready(sandboxes, 1)
        waiting = _waiting(sandboxes)[0]
        waiting.kill()
        await until(lambda: _waiting(sandboxes) not in ([], [waiting]))
        return (await sandboxes.run(run, {}, nothing)).stdout

    assert using(work) == "1\n"


@needs_a_sandbox
def test_one_that_died_before_its_code_began_is_no_result_but_an_error_to_try_again() -> None:
    async def work() -> None:
        job = Job.of(CodeRun(code="print(1)"), {}, basic())
        with ThreadPoolExecutor(1) as thread:
            sandbox = await Sandbox.start(Bubblewrap(), Box.of(job.run, basic()), thread, warm=True)
            try:
                await sandbox.ready()
                sandbox.kill()
                await until(lambda: _at_its_end(sandbox.stdout))
                with pytest.raises(SandboxError, match="a sandbox died before its code began") as raised:
                    await sandbox.run(job, nothing)
                assert raised.value.retry
            finally:
                await sandbox.end()

    asyncio.run(work())


@needs_a_sandbox
def test_there_are_as_many_as_were_used_at_once_and_none_when_idle() -> None:
    run = CodeRun(code="import time; time.sleep(0.1)")

    async def work(sandboxes: Sandboxes) -> None:
        await asyncio.gather(*(sandboxes.run(run, {}, nothing) for _ in range(5)))
        await _ready(sandboxes, 3)
        # Of another kind, for which one of the others makes way.
        other = CodeRun(code="1", processes=5)
        await sandboxes.run(other, {}, nothing)
        await until(lambda: any(one.box.processes == 5 for one in _waiting(sandboxes)))
        assert len(_waiting(sandboxes)) <= 3
        await _ready(sandboxes, 0)

    using(work, warm=3, idle_s=0.6)


@needs_a_sandbox
def test_a_runtime_that_is_damaged_is_said_to_be() -> None:
    damaged = replace(basic(), name="damaged", warm=("no_such_module",))
    run = CodeRun(code="print(1)", runtime="damaged")

    async def work(sandboxes: Sandboxes) -> tuple[str, int]:
        # One that waits is not to be had, and one that does not need it works.
        await sandboxes.prepare(run)
        reply = await sandboxes.run(run, {}, nothing)
        return reply.stdout, len(_waiting(sandboxes))

    assert using(work, find=lambda name: damaged if name == "damaged" else basic()) == ("1\n", 0)


def _at_its_end(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))


def _busy(sandboxes: Sandboxes) -> bool:
    """Whether any is being made or cleared away."""
    assert sandboxes._open is not None
    return bool(sandboxes._open._ending or sandboxes._open.pool._tasks)


def _waiting(sandboxes: Sandboxes) -> list[Any]:
    assert sandboxes._open is not None
    return [one for waiting in sandboxes._open.pool._ready.values() for one in waiting]


async def _ready(sandboxes: Sandboxes, count: int) -> None:
    await until(lambda: len(_waiting(sandboxes)) == count)


# Nothing stays behind.


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """A directory that sandboxes of a test have mounted, by which their processes are known from outside."""
    directory = Path(f"/var/tmp/ferrum-mark-{os.getpid()}-{random.randrange(10**9)}")
    directory.mkdir()
    try:
        yield str(directory)
    finally:
        directory.rmdir()


def marked(mark: str) -> list[str]:
    """The processes that are in sandboxes with this mark, and those that hold them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            known = process.joinpath("mountinfo").read_text() + process.joinpath("cmdline").read_text()
        except OSError:
            continue
        if mark in known and int(process.name) != os.getpid():
            found.append(process.name)
    return found


@needs_a_sandbox
def test_a_cancelled_run_is_killed_at_once_and_one_that_is_closed_on_says_so(mark: str) -> None:
    run = CodeRun(code="import os, time\nprint('up')\nos.fork()\ntime.sleep(600)", timeout_s=900)
    runtime = replace(basic(), mounts=(*basic().mounts, mark))

    async def work() -> CodeReply:
        sandboxes = Sandboxes(find=lambda _: runtime)
        up: list[asyncio.Event] = [asyncio.Event(), asyncio.Event()]
        one, other = (
            asyncio.create_task(sandboxes.run(run, {}, lambda *_, event=event: event.set()))  # type: ignore[misc]
            for event in up
        )
        for event in up:
            await event.wait()
        assert len(marked(mark)) >= 6
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        await sandboxes.aclose()
        with pytest.raises(SandboxError, match="it is stopping"):
            await sandboxes.run(run, {}, nothing)
        return await other

    reply = asyncio.run(work())
    assert reply.reason is WhyEnded.KILLED
    assert marked(mark) == []


_WORKER = """
import asyncio, sys
from dataclasses import replace
from ferrum.governance.acts import CodeRun
from ferrum.sandbox import Sandboxes
from ferrum.sandbox.runtimes import basic

runtime = replace(basic(), mounts=(*basic().mounts, sys.argv[1]))
code = "import os, time\\nopen('big', 'wb').write(bytes(1 << 20))\\ntime.sleep(0.02 if os.fork() else 60)"

async def one(sandboxes):
    while True:
        print("job", flush=True)
        reply = await sandboxes.run(CodeRun(code=code), {"a": b"b"}, lambda *_: None)
        assert reply.reason == "ok", reply

async def main():
    sandboxes = Sandboxes(find=lambda _: runtime, warm=2)
    await asyncio.gather(*(one(sandboxes) for _ in range(4)))

asyncio.run(main())
"""


@needs_a_sandbox
def test_workers_that_are_killed_leave_nothing_behind(mark: str) -> None:
    """Two processes, each killed and started anew again and again. `bench/sandbox.py` does it with more."""
    chance = random.Random(4)
    jobs = 0
    while jobs < 100:
        workers = [
            subprocess.Popen([sys.executable, "-c", _WORKER, mark], stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        for worker in workers:
            assert worker.stdout is not None
            for _ in range(chance.randrange(15, 40)):
                assert worker.stdout.readline() == "job\n"
                jobs += 1
            worker.send_signal(signal.SIGKILL)
        for worker in workers:
            worker.communicate()
    eventually(lambda: marked(mark) == [])
    assert mark not in mounts()
    assert listed(mark) == []


@needs_a_sandbox
def test_a_worker_is_no_bigger_after_many_jobs() -> None:
    async def work(sandboxes: Sandboxes) -> list[tuple[int, int, int]]:
        seen = []
        for _ in range(3):
            for _ in range(10):
                await sandboxes.run(CodeRun(code="print(1)"), {"a": bytes(100_000)}, nothing)
            await _ready(sandboxes, 1)
            await until(lambda: not _busy(sandboxes))
            gc.collect()
            seen.append((len(listed("/proc/self/fd")), len(children()), len(asyncio.all_tasks())))
        return seen

    seen = using(work, warm=1)
    assert seen[1] == seen[2]


@needs_a_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a view of its own of the file system")
def test_what_is_made_reachable_for_sandboxes_is_not_for_others() -> None:
    kept = listed(Path.home())
    seen: list[list[str]] = []

    async def work(sandboxes: Sandboxes) -> None:
        assert (await sandboxes.run(CodeRun(code="pass"), {}, nothing)).reason is WhyEnded.OK
        seen.append(listed(Path.home()))

    using(work)
    assert seen == [kept]
    # Others may mount what they like meanwhile, but not there.
    assert basic().interpreter not in mounts()
    assert f" {Path.home()} " not in mounts()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_only_the_thread_that_starts_a_sandbox_is_somebody_else_and_only_meanwhile() -> None:
    user = User.take()
    assert user is not None
    mine = os.getresuid(), os.getresgid(), os.getgroups()
    with borrowed(user):
        assert (os.getresuid(), os.getresgid(), os.getgroups()) == (
            (user.uid, user.uid, 0),
            (user.uid, user.uid, 0),
            [],
        )
        threads = [Path(f"/proc/self/task/{thread}/status").read_text() for thread in listed("/proc/self/task")]
        assert [f"\nUid:\t{user.uid}\t" in status for status in threads].count(True) == 1
        program = subprocess.run(["/usr/bin/grep", "^[UG]id", "/proc/self/status"], capture_output=True, check=True)
        assert program.stdout.split() == [b"Uid:", *[b"%d" % user.uid] * 4, b"Gid:", *[b"%d" % user.uid] * 4]
    assert (os.getresuid(), os.getresgid(), os.getgroups()) == mine
    user.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_root_that_may_not_be_somebody_else_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    libc, asked = user_of_the_host.libc, itertools.count()

    def refuse_the_last(name: str, *arguments: object) -> None:
        if next(asked) == 3:
            raise PermissionError(1, "Operation not permitted")
        libc(name, *arguments)

    monkeypatch.setattr(user_of_the_host, "libc", refuse_the_last)
    user = User.take()
    assert user is not None
    mine = os.getresuid(), os.getresgid(), os.getgroups()
    with pytest.raises(Missing, match=r"root cannot become user .*Operation not permitted.*CAP_SETUID"), borrowed(user):
        pytest.fail("that is nobody")
    assert (os.getresuid(), os.getresgid(), os.getgroups()) == mine
    user.release()


def test_what_the_kernel_keeps_is_counted_each_second_and_when_there_may_be_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, kernel, counted = 0.0, 50_000, 0

    def pieces(path: str) -> Iterator[bytes]:
        nonlocal counted
        if path == "/proc/meminfo":
            yield f"MemTotal: 1 kB\nSUnreclaim: {kernel} kB\n".encode()
        elif path == "/proc/locks":
            counted += 1
            yield b"1: POSIX  ADVISORY  WRITE 1 00:01:1 0 0\n" * 513

    monkeypatch.setattr(init, "_pieces", pieces)
    monkeypatch.setattr(init, "monotonic", lambda: now)
    few, many = (init._Kernel({"locks": most, "mappings": 1}) for most in (513, 512))
    # When it looks, what the kernel has then, and whether it counts: what was given back may have been taken again.
    for now, kernel, counts in (  # noqa: B007
        (0.25, 52_047, False), (0.5, 52_048, True), (0.75, 40_000, False), (1.0, 42_048, True), (1.25, 42_048, False),
        (1.75, 44_095, False), (2.0, 44_095, True),
    ):  # fmt: skip
        assert many.keeps_too_much() == counts
        assert not few.keeps_too_much()
        assert counted == 2 * counts
        counted = 0


@needs_a_sandbox
def test_what_the_page_shows_is_what_it_prints(tmp_path: Path) -> None:
    page = Path(__file__).parent.parent.joinpath("docs", "isolation.md").read_text(encoding="utf-8")
    page = page.partition("## From Python")[2]
    code = page.partition("```python\n")[2].partition("```")[0]
    shown = page.partition("```text\n")[2].partition("```")[0]
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (said.stdout, said.stderr) == (shown, "")


def test_the_settings_say_what_is_used() -> None:
    chosen = Sandboxes.of(Settings(sandbox="bubblewrap", sandbox_warm=7, sandbox_idle=3))
    assert (chosen._kinds, chosen._warm, chosen._idle_s) == ([Kind.BUBBLEWRAP], 7, 3)
    assert Sandboxes.of(Settings())._kinds == list(Kind)


# Limits of the kernel's own.


def test_a_cgroup_has_the_limits_of_its_sandbox_and_goes_with_it(tmp_path: Path) -> None:
    parent = tmp_path / "delegated"
    parent.mkdir()
    dead = parent / "ferrum-sandbox-999999999-1"
    dead.mkdir()
    groups = Cgroups(parent)
    assert not dead.exists()
    group = groups.make(Box(basic(), memory=2**28, disk=2**26, cpus=0.5, processes=32))
    read = {file.name: file.read_text() for file in group.path.iterdir()}
    assert read == {
        "memory.max": str(2**28 + 2**26 + 2**25),
        "memory.oom.group": "1",
        "pids.max": "36",
        "cpu.max": "50000 100000",
    }
    group.add(os.getpid())
    assert (group.path / "cgroup.procs").read_text() == str(os.getpid())
    assert not group.ran_out_of_memory()
    assert group.peak_memory() is None
    (group.path / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    (group.path / "memory.peak").write_text("1000\n")
    assert group.ran_out_of_memory()
    assert group.peak_memory() == 1000


def test_a_part_of_the_tree_that_is_ours_is_found_and_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    poor, ours = tmp_path / "poor", tmp_path / "ours"
    for directory, controllers in ((poor, "hugetlb"), (ours, "cpu memory pids io")):
        directory.mkdir()
        (directory / "cgroup.controllers").write_text(controllers)
        (directory / "cgroup.subtree_control").write_text("")
    monkeypatch.setattr(cgroup, "_candidates", lambda: [tmp_path / "not-there", poor])
    assert Cgroups.find() is None
    monkeypatch.setattr(cgroup, "_candidates", lambda: [poor, ours])
    assert Cgroups.find() is not None
    assert (ours / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    monkeypatch.undo()
    # Where ours is, is known, whatever it is worth.
    assert all(path.is_absolute() for path in cgroup._candidates())


@needs_a_sandbox
def test_a_cgroup_that_cannot_be_made_is_an_error_and_no_sandbox_without_one(tmp_path: Path) -> None:
    groups = Cgroups(tmp_path)
    tmp_path.rmdir()
    run = CodeRun(code="print('ran')")
    with pytest.raises(SandboxError, match="no cgroup can be made for a sandbox"):
        using(
            lambda sandboxes: sandboxes.run(run, {}, nothing),
            backends={Kind.BUBBLEWRAP: lambda: Bubblewrap(groups)},
        )


def _hierarchy() -> Path | None:
    """A cgroup v2 tree that is ours to write to, with whatever controllers."""
    for path in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
        if (path / "cgroup.controllers").exists() and os.access(path, os.W_OK):
            return path
    return None


@needs_a_sandbox
@pytest.mark.skipif(_hierarchy() is None, reason="there is no cgroup v2 tree to write to")
def test_a_sandbox_is_in_its_cgroup_before_its_job_and_the_group_is_gone_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tree without the controllers there are no limits, but all else is as it is with them."""
    parent = _hierarchy()
    assert parent is not None
    parent = parent / f"ferrum-test-{os.getpid()}"
    parent.mkdir()
    made: list[Path] = []

    def make(self: Cgroups, box: Box) -> Any:
        from ferrum.sandbox.cgroup import Cgroup

        made.append(parent / f"ferrum-sandbox-{os.getpid()}-{len(made)}")
        made[-1].mkdir()
        return Cgroup(made[-1])

    monkeypatch.setattr(Cgroups, "make", make)
    try:
        backend = {Kind.BUBBLEWRAP: lambda: Bubblewrap(Cgroups(parent))}
        code = "import os, time\nos.fork()\nprint(open('/proc/self/cgroup').read().count('0::/\\n'))\ntime.sleep(0.3)"
        inside: list[int] = []

        async def work(sandboxes: Sandboxes) -> CodeReply:
            def heard(*_: str) -> None:
                inside.append(len((made[-1] / "cgroup.procs").read_text().split()))

            return await sandboxes.run(CodeRun(code=code), {}, heard)

        reply = using(work, backends=backend, warm=0)
        assert reply.memory_by == "cgroup"
        # PID 1, the job and its child.
        assert max(inside) == 3
        assert not any(path.exists() for path in made)
    finally:
        parent.rmdir()


# The wire, the patterns, the filter.


def test_frames_are_read_however_they_come() -> None:
    sent = b"".join([wire.frame(b"U"), *wire.pieces(b"D", bytes(600_000)), wire.frame(b"E", b"{}")])
    frames = wire.Frames()
    got = [frame for at in range(0, len(sent), 7777) for frame in frames.feed(sent[at : at + 7777])]
    assert [(kind, len(body)) for kind, body in got] == [
        (b"U", 0), (b"D", wire.LONGEST), (b"D", wire.LONGEST), (b"D", 600_000 - 2 * wire.LONGEST), (b"E", 2),
    ]  # fmt: skip
    with pytest.raises(wire.Broken):
        list(wire.Frames().feed(b"D\x7f\xff\xff\xff"))


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("a.txt", ["a.txt"], ["b/a.txt", "a.txtx"]),
        ("*.txt", ["a.txt", ".txt"], ["b/a.txt", "a.png"]),
        ("**", ["a", "a/b/c"], []),
        ("**/*.txt", ["a.txt", "b/c/a.txt"], ["a.png"]),
        ("out/**", ["out/a", "out/b/c"], ["out", "a"]),
        ("a?c/*", ["abc/x"], ["ac/x", "abc/x/y"]),
        ("**/x/**/y", ["x/y", "a/x/b/c/y"], ["y", "x"]),
        ("[a]", ["[a]"], ["a"]),
    ],
)
def test_patterns_mean_what_they_mean_in_a_shell(pattern: str, yes: list[str], no: list[str]) -> None:
    parts = tuple(pattern.split("/"))
    for path in yes:
        split = tuple(path.split("/"))
        assert matches(split, parts), path
        assert all(leads(split[:depth], parts) for depth in range(1, len(split)))
    for path in no:
        assert not matches(tuple(path.split("/")), parts), path
    assert not leads(("other", "place"), ("out", "*"))


def test_no_name_makes_a_pattern_slow() -> None:
    assert not matches(("a" * 250,), ("*a" * 100 + "b",))
    assert not matches(tuple("a" * 16), ("**", "a", "**", "a", "**", "b"))


def verdict(program: bytes, number: int, arguments: tuple[int, ...] = (), architecture: int = 0xC000003E) -> int:
    """What the kernel would do: an interpreter of the classic BPF that seccomp uses."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *(*arguments, *(0,) * (6 - len(arguments))))
    instructions = list(struct.iter_unpack("=HBBI", program))
    at, value = 0, 0
    while True:
        code, true, false, k = instructions[at]
        at += 1
        if code == 0x20:
            value = struct.unpack_from("<I", data, k)[0]
        elif code == 0x06:
            return int(k)
        else:
            holds = {0x15: value == k, 0x25: value > k, 0x45: bool(value & k)}[code]
            at += true if holds else false


@pytest.mark.parametrize(("machine", "architecture"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_does_what_its_tables_say(machine: str, architecture: int) -> None:
    program = seccomp.program(machine)
    assert len(program) // 8 < 4096

    numbers = {name: number for number, name in seccomp.names(machine).items()}

    def asked(name: str, *arguments: int) -> int:
        return verdict(program, numbers[name], arguments, architecture)

    column = seccomp._MACHINES[machine][1]
    allowed, checked, refused = (
        dict(seccomp._numbers(table, column)) for table in (seccomp._ALLOWED, seccomp._CHECKED, seccomp._REFUSED)
    )
    assert not allowed.keys() & refused.keys() | checked.keys() & (allowed.keys() | refused.keys())
    assert len({*allowed.values(), *checked.values(), *refused.values()}) == len(allowed) + len(checked) + len(refused)
    for number in range(2000):
        said = verdict(program, number, (0, 0, 0, 0), architecture)
        if number in allowed.values():
            assert said == seccomp.ALLOW
        elif number in refused.values():
            assert said == seccomp.REFUSE
        elif number not in checked.values():
            assert said == seccomp.UNKNOWN
    # Another architecture's numbers mean other calls: the compat ones of each machine, and the other machine.
    for other in (0x40000003, 0x40000028, 0xC000003E ^ 0xC00000B7 ^ architecture):
        assert verdict(program, 0, (), other) == seccomp.KILL
    assert verdict(program, 0x40000000 | 39, (), architecture) == seccomp.UNKNOWN
    assert verdict(program, 0xFFFFFFFF, (), architecture) == seccomp.UNKNOWN
    # 435 is clone3 on both.
    assert verdict(program, 435, (), architecture) == seccomp.UNKNOWN

    # As `fork`, `posix_spawn` and threads are made; and a process with the open files of another.
    assert asked("clone", 0x1200011) == asked("clone", 0x4111) == asked("clone", 0x3D0F00) == seccomp.ALLOW
    assert asked("clone", 0x411) == asked("clone", 0x4511) == seccomp.REFUSE
    for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert asked("clone", bit | 17) == seccomp.REFUSE
    for family in range(2, 64):
        assert asked("socket", family) == asked("socketpair", family) == seccomp.NO_FAMILY
    assert asked("socket", 1) == asked("socketpair", 1) == seccomp.ALLOW
    # The kernel looks at the lower half only, and so does the filter.
    assert asked("socket", 2**32 | 2) == seccomp.NO_FAMILY
    assert asked("setsockopt", 3, 1, 9) == asked("setsockopt", 3, 6, 7) == seccomp.ALLOW
    for name in (7, 8, 32, 33):
        assert asked("setsockopt", 3, 1, name) == seccomp.REFUSE
    assert asked("ioctl", 0, 0x5401) == asked("ioctl", 0, 0x541B) == seccomp.ALLOW
    for request in (0x5412, 0x541C, 0x5423, 2**32 | 0x5412, 0x8912):
        assert asked("ioctl", 0, request) == seccomp.NO_TERMINAL
    assert asked("prctl", 15) == seccomp.ALLOW
    for option in (22, 35, 36, 24, 0x59616D61):
        assert asked("prctl", option) == seccomp.REFUSE
    assert asked("prlimit64", 0, 7, 1234) == asked("prlimit64", 0, 4, 0, 1234) == seccomp.ALLOW
    assert asked("prlimit64", 1, 7, 1234) == asked("prlimit64", 0, 4, 1234) == seccomp.REFUSE
    assert asked("prlimit64", 0, 4, 0xFFFF << 32) == seccomp.REFUSE
    assert asked("setrlimit", 7) == seccomp.ALLOW
    assert asked("setrlimit", 4) == seccomp.REFUSE
    assert asked("setpriority", 0, 0, 5) == seccomp.ALLOW
    assert asked("setpriority", 0, 1, 19) == asked("setpriority", 2, 0, 19) == seccomp.REFUSE
    assert asked("personality", 0xFFFFFFFF) == asked("personality", 0) == seccomp.ALLOW
    assert asked("personality", 0x0040000) == seccomp.REFUSE
    assert asked("fcntl", 3, 2) == seccomp.ALLOW
    for command in (1024, 1026, 1031, 37, 38):
        assert asked("fcntl", 3, command) == seccomp.REFUSE
    assert asked("mmap", 0, 0, 3, 0x22) == seccomp.ALLOW
    for flags in (0x40022, 0x21, 0x23, 0x8021):
        assert asked("mmap", 0, 0, 3, flags) == seccomp.REFUSE
    for flags in (0x2, 0x1, 0x3, 0x20022, 0x8):
        assert asked("mmap", 0, 0, 3, flags) == seccomp.ALLOW


def test_another_machine_has_no_sandbox() -> None:
    with pytest.raises(Missing, match="no sandbox on riscv64"):
        seccomp.program("riscv64")


def test_the_worker_imports_nothing_of_it_before_it_is_needed() -> None:
    code = (
        "import sys, ferrum, ferrum.actors; print([name for name in sys.modules if name.startswith('ferrum.sandbox')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"

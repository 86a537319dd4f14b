"""What code in a sandbox must not be able to do, as root and as an ordinary user.

Each attack is run twice: against the sandbox, which holds, and against one that lacks the defence, which does not. So
no test here can pass because of a typing error in an attack.
"""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import weakened
from attacks import ATTACKS as ALL_ATTACKS
from attacks import PRELUDE, Attack, numbers, program, reachable
from bombs import BOMBS as ALL_BOMBS
from bombs import Bomb
from sizes import SIZE, sized
from weakened import Without

from ferrum.governance.acts import CodeReply, CodeRun, WhyEnded
from ferrum.sandbox.reach import Reach

T = TypeVar("T")

#: Set where a fair sample is run, and not all: for an ordinary user, after root.
_SAMPLE = "SAMPLED_ATTACKS"


def _sampled(all_of_them: Sequence[T]) -> Sequence[T]:
    """All, or as many as this process is to run, from all over; the same ones each time."""
    many = min(len(all_of_them), sized(math.ceil(len(all_of_them) / 3)))
    every = range(many) if _SAMPLE in os.environ else range(len(all_of_them))
    return [all_of_them[at * len(all_of_them) // len(every)] for at in every]


ATTACKS = _sampled(ALL_ATTACKS)
BOMBS = _sampled(ALL_BOMBS)

ROOT = Path(__file__).parent.parent
ORDINARY = 12345
MARK = "the-worker's-secret"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NO SANDBOX IS TESTED HERE: it is not Linux")


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> None:
    weakened.needed()


@pytest.fixture(scope="module")
def host() -> Iterator[dict[str, str]]:
    with reachable(MARK) as host:
        yield host


@pytest.fixture(scope="module")
def results(host: dict[str, str]) -> dict[Attack, tuple[bool, bool]]:
    """Whether each attack got through the sandbox, and through the one without its defence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FERRUM_TEST_MARK", MARK)
        attacks = [attack for attack in ATTACKS if not attack.only_root or os.geteuid() == 0]
        held = _run(attacks, Without(), host)
        weak: dict[str, bool] = {}
        for without, some in _grouped(attacks).items():
            weak |= _run(some, without, host)
    return {attack: (held[attack.name], weak[attack.name]) for attack in attacks}


def _grouped(attacks: list[Attack]) -> dict[Without, list[Attack]]:
    """By what is taken out; whoever lacks only a system call or two lacks all of these together."""
    calls = tuple(
        sorted(
            {name for one in attacks if one.without == Without(calls=one.without.calls) for name in one.without.calls}
        )
    )
    groups = defaultdict(list)
    for one in attacks:
        groups[Without(calls=calls) if one.without == Without(calls=one.without.calls) else one.without].append(one)
    return groups


def _run(attacks: list[Attack], without: Without, env: dict[str, str]) -> dict[str, bool]:
    reply = weakened.run(CodeRun(code=program(attacks), env=env, timeout_s=60), without)
    assert reply.reason is WhyEnded.OK, f"{reply.detail}\n{reply.stderr}"
    assert isinstance(reply.output, dict)
    return {name: bool(value) for name, value in reply.output.items()}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_it_cannot(attack: Attack, results: dict[Attack, tuple[bool, bool]]) -> None:
    if attack not in results:
        pytest.skip("only a root worker could be harmed by this")
    held, weak = results[attack]
    assert not held
    assert weak, "it does not get through without its defence either: the attack is no test"


@pytest.fixture(scope="module")
def ends() -> dict[str, tuple[CodeReply, CodeReply | None]]:
    """How each bomb ended, and how without what held it."""
    held = weakened.run_all([(bomb.run(numbers()), {}) for bomb in BOMBS])
    weak: dict[str, CodeReply] = {}
    groups = defaultdict(list)
    for bomb in BOMBS:
        if bomb.without is not None:
            groups[bomb.without].append(bomb)
    for without, some in groups.items():
        replies = weakened.run_all([(bomb.run(numbers()), {}) for bomb in some], without)
        weak |= {bomb.name: reply for bomb, reply in zip(some, replies, strict=True)}
    return {bomb.name: (reply, weak.get(bomb.name)) for bomb, reply in zip(BOMBS, held, strict=True)}


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.name)
def test_it_is_ended_for(bomb: Bomb, ends: dict[str, tuple[CodeReply, CodeReply | None]]) -> None:
    held, weak = ends[bomb.name]
    assert held.reason is bomb.reason, f"{held.detail}\n{held.stderr[-1000:]}"
    if weak is not None:
        assert weak.reason is bomb.then, f"{weak.detail}\n{weak.stderr[-1000:]}"


def test_the_watchdog_counts_processes_where_the_kernel_does_not() -> None:
    bomb = next(bomb for bomb in ALL_BOMBS if bomb.name == "processes")
    reply = weakened.run(bomb.run(numbers()), Without(limits=(resource.RLIMIT_NPROC,)))
    assert (reply.reason, reply.detail) == (WhyEnded.KILLED, "it had more than 32 processes and threads")


#: Everything that a program could leave in the place of a file, and the directories that lead there.
TRICKS = r"""
import os, socket
open("plain.txt", "w").write("plain")
os.makedirs("deep/" * 20)
open("deep/" * 20 + "file.txt", "w").write("deep")
os.symlink("/etc/passwd", "link.txt")
os.symlink("/etc", "linked")
os.symlink("plain.txt", "near.txt")
os.link("plain.txt", "hard.txt")
os.mkfifo("fifo.txt")
socket.socket(socket.AF_UNIX).bind("socket.txt")
os.mkdir("directory.txt")
open("closed.txt", "w").close()
os.chmod("closed.txt", 0)
os.mkdir("shut")
open("shut/in.txt", "w").close()
os.chmod("shut", 0)
open("colour\x1b[31m.txt", "w").close()
open(b"latin-\xe9.txt", "w").close()
open("big.txt", "w").truncate(8 << 20)
os.symlink("plain.txt", "output.json")
"""
_FOLLOWS = Without(
    lines=(
        ("os.stat(path[-1], dir_fd=directory, follow_symlinks=False)", "os.stat(path[-1], dir_fd=directory)"),
        ("os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDONLY | os.O_NONBLOCK"),
        ("os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW", "os.O_RDONLY | os.O_DIRECTORY"),
    )
)


def test_what_it_leaves_is_a_regular_file_or_refused() -> None:
    run = CodeRun(code=TRICKS, outputs=("**/*.txt", "linked/pass*"))
    reply = weakened.run(run)
    assert reply.reason is WhyEnded.OK, reply.stderr
    assert set(reply.files) == {"plain.txt", "hard.txt", "big.txt"}
    assert reply.files["big.txt"] == bytes(8 << 20)
    assert not reply.has_output
    refused = dict(line.rsplit(": ", 1) for line in reply.cut)
    assert refused == {
        "link.txt": "it is no regular file",
        "near.txt": "it is no regular file",
        "output.json": "it is no regular file",
        "fifo.txt": "it is no regular file",
        "socket.txt": "it is no regular file",
        "closed.txt": "Permission denied",
        "shut": "Permission denied",
        "/".join(["deep"] * 16): "it is nested too deeply",
        "colour\N{REPLACEMENT CHARACTER}[31m.txt": "its name cannot be written down",
        "latin-?.txt": "its name is not UTF-8",
    }
    followed = weakened.run(run, _FOLLOWS)
    assert b"nobody" in followed.files["link.txt"]
    assert b"nobody" in followed.files["linked/passwd"]


def test_it_gives_back_so_many_files_and_no_more() -> None:
    reply = weakened.run(CodeRun(code="for one in range(300): open(f'{one}.txt', 'w').close()", outputs=("*.txt",)))
    assert reply.reason is WhyEnded.OUTPUT
    assert len(reply.files) == 256
    assert "files" in reply.cut


def test_nothing_of_it_runs_while_its_files_are_collected() -> None:
    """Whatever it left running would change them meanwhile: put a link where a file was, or write for ever."""
    late = CodeRun(
        code="""
import os, time
if os.fork() == 0:
    os.setsid()
    os.close(1)
    os.close(2)
    if os.fork():
        os._exit(0)
    while os.getppid() != 1:
        pass
    while os.path.exists("/proc/2"):
        time.sleep(0.001)
    open("late.txt", "w").write("late")
    time.sleep(30)
""",
        outputs=("*.txt",),
    )
    assert weakened.run(late).files == {}
    alive = Without(lines=(("        kill_all()\n", "        sleep(0.5)\n"),))
    assert weakened.run(late, alive).files == {"late.txt": b"late"}


def test_nothing_of_it_runs_when_it_has_ended() -> None:
    mark = f"ferrum-daemon-{os.getpid()}"
    code = f"""
import os, signal, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    if os.fork() == 0:
        daemon = "import time; print('up', flush=True); time.sleep(60)"
        os.execv(sys.executable, [sys.executable, "-c", daemon, "{mark}"])
    os._exit(0)
sys.stdin = os.fdopen(os.dup(0))
time.sleep(WAIT)
"""
    seen: list[bool] = []
    # What is looked for can be seen while it runs.
    weakened.run(
        CodeRun(code=code.replace("WAIT", "0.5"), timeout_s=20), say=lambda *_: seen.append(_runs_on_the_host(mark))
    )
    assert seen == [True]
    assert not _runs_on_the_host(mark)


def _runs_on_the_host(mark: str) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in process.joinpath("cmdline").read_bytes() and process.name != str(os.getpid()):
                return True
        except OSError:
            continue
    return False


_COMPAT = r"""
import ctypes, mmap
# mov eax, 20 (getpid); int 0x80; ret
private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
code = mmap.mmap(-1, 4096, private, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
pid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
import os
assert pid == os.getpid()
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="there are no such calls on this machine")
def test_the_system_calls_of_32_bits_end_it() -> None:
    assert weakened.run(CodeRun(code=_COMPAT)).signal == "SIGSYS"
    if subprocess.run([sys.executable, "-c", _COMPAT], capture_output=True, check=False).returncode == 0:
        assert weakened.run(CodeRun(code=_COMPAT), Without(filter=True)).reason is WhyEnded.OK


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="there are no such calls on this machine")
def test_the_system_calls_of_x32_do_not_exist() -> None:
    code = PRELUDE + "print(call(0x40000000 | 39)[1] == errno.ENOSYS)"
    assert weakened.run(CodeRun(code=code, env={"NUMBERS": numbers()})).stdout == "True\n"


def test_no_sandbox_sees_another() -> None:
    code = "import os, time\ntime.sleep(0.3)\nprint(sorted(name for name in os.listdir('/proc') if name.isdigit()))"
    replies = weakened.run_all([(CodeRun(code=code), {}), (CodeRun(code=code), {})])
    assert {reply.stdout for reply in replies} == {"['1', '2']\n"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_all_of_it_holds_for_an_ordinary_user() -> None:
    """This file again, with a sample of the attacks, in a process of one.

    Where only root gets to the interpreter, that is made reachable.
    """
    paths = [sys.base_prefix, str(Path(sys.prefix).resolve()), str(ROOT)]
    child = os.fork()
    if child == 0:
        try:
            Reach().make([path for path in paths if not _inside(path, paths)], ORDINARY)
            os.setgroups([])
            os.setresgid(ORDINARY, ORDINARY, ORDINARY)
            os.setresuid(ORDINARY, ORDINARY, ORDINARY)
            os.chdir(ROOT)
            command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-cov", __file__]
            environ = {"PATH": os.environ["PATH"], "FERRUM_REQUIRE_SANDBOX": "1", "HOME": "/tmp"}
            os.execve(sys.executable, command, {**environ, _SAMPLE: "1", "FERRUM_TEST_SIZE": str(SIZE)})
        except OSError as error:
            os.write(2, str(error).encode())
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def _inside(path: str, others: list[str]) -> bool:
    return any(other != path and path.startswith(other + "/") for other in others)

"""gVisor and containers: the same PID 1, the same wire, the same attacks; and nothing stays behind of them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from attacks import ATTACKS, program, reachable
from sandboxes import why_not

from ferrum.governance.acts import CodeReply, CodeRun, WhyEnded
from ferrum.sandbox import Kind, Sandboxes, container, gvisor, held, seccomp, skeleton
from ferrum.sandbox.backend import Backend, Box, Cell, Missing, Unconfined
from ferrum.sandbox.container import Container
from ferrum.sandbox.gvisor import GVisor
from ferrum.sandbox.profile import profile
from ferrum.sandbox.runs import BACKENDS
from ferrum.sandbox.runtimes import Runtime, basic

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NO SANDBOX IS TESTED HERE: it is not Linux")

#: What an attack of the suite calls "through" although nothing of the host's is reached by it.
HARMLESS: Mapping[Kind, set[str]] = {
    Kind.GVISOR: {
        # All of these are gVisor's own: it has a /run, a /sys and a /proc that tell of no machine, the list of what
        # PID 1 has open can be read (what is in it cannot be opened), and its environment is one line, `HOME=/`.
        "see what is mounted nowhere",
        "read what /proc tells of the machine",
        "open what PID 1 has open",
        "read the environment of PID 1",
        # Of what its own kernel says of itself.
        "have the machine watched for it",
    },
    Kind.CONTAINER: {
        # An empty /sys, and a /run with an empty file.
        "see what is mounted nowhere",
        # It is refused with another word.
        "make a pair of sockets of another family",
    },
}


@pytest.fixture(scope="module", params=[Kind.GVISOR, Kind.CONTAINER])
def kind(request: pytest.FixtureRequest) -> Kind:
    """A backend that works on this machine."""
    found: Kind = request.param

    if missing := why_not(found):
        pytest.skip(f"NOT TESTED HERE: {missing}")
    return found


def run(kind: Kind, *acts: CodeRun, runtime: Runtime | None = None, files: Mapping[str, bytes] = {}) -> list[CodeReply]:
    """Run these at the same time."""

    async def story() -> list[CodeReply]:
        sandboxes = Sandboxes(kind, warm=0, find=lambda name: runtime or basic())
        try:
            return await asyncio.gather(*(sandboxes.run(act, files, lambda stream, text: None) for act in acts))
        finally:
            await sandboxes.aclose()

    return asyncio.run(story())


def processes_with(text: str) -> list[int]:
    """The processes of this machine whose command line has it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in line:
                found.append(int(entry.name))
    return found


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def ours(kind: Kind) -> Path:
    return Path(tempfile.gettempdir(), f"ferrum-{kind.value}-{os.geteuid()}")


def test_code_runs_and_gives_back_what_it_was_asked_for(kind: Kind) -> None:
    python, shell = run(
        kind,
        CodeRun(
            code="import json, os, sys\nprint(open('in/a.txt').read(), os.getuid())\nprint('oops', file=sys.stderr)\n"
            "open('in/b.txt', 'w').write('b')\njson.dump([1], open('output.json', 'w'))\nsys.exit(3)",
            outputs=("in/*",),
        ),
        CodeRun(
            language="shell", code="cat in/a.txt; touch /usr/x /etc/x /x 2>/dev/null; id -un; cd /usr/local/bin; echo *"
        ),
        files={"in/a.txt": b"hello"},
    )
    assert (python.reason, python.exit_code) == (WhyEnded.ERROR, 3)
    assert (python.stdout, python.stderr) == ("hello 65534\n", "oops\n")
    assert python.output == [1]
    assert python.files == {"in/a.txt": b"hello", "in/b.txt": b"b"}
    assert python.backend == kind.value
    assert shell.reason is WhyEnded.OK
    assert shell.stdout.split() == ["hellonobody", "python", "python3"]


def test_what_uses_too_much_is_ended_for_it(kind: Kind) -> None:
    act = CodeRun(timeout_s=30)
    endless, memory, processes, disk, output = run(
        kind,
        act.model_copy(update={"code": "while True: pass", "timeout_s": 1.0}),
        act.model_copy(update={"code": "kept = []\nwhile True: kept.append(bytearray(2**20))"}),
        act.model_copy(
            update={"memory": 2**31, "code": "import os, time\nfor _ in range(99):\n  if not os.fork(): time.sleep(99)"}
        ),
        act.model_copy(update={"code": "for n in range(9): open(f'/tmp/{n}', 'wb').write(bytes(16 * 2**20))"}),
        act.model_copy(update={"code": "while True: print('x' * 2**20)"}),
    )
    assert endless.reason is WhyEnded.TIMEOUT
    assert memory.reason is WhyEnded.MEMORY
    assert disk.reason is WhyEnded.DISK
    assert output.reason is WhyEnded.OUTPUT
    # Refused another one, or ended for having had one more.
    assert "BlockingIOError" in processes.stderr or "processes" in processes.detail


def test_a_built_runtime_is_found_inside(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tiny.py").write_text("VERSION = 7")
    tmp_path.chmod(0o755)
    (tmp_path / "site").chmod(0o755)
    runtime = Runtime(
        **{name: getattr(basic(), name) for name in ("interpreter", "mounts", "hidden")},
        name="mine",
        placed=((str(tmp_path), "/opt/runtime"),),
        paths=("/opt/runtime/site",),
        env=(("PYTHONPATH", "/opt/runtime/site"),),
        links=(("/tmp/a/b", "/opt/runtime/site/tiny.py"),),
    )
    code = "import subprocess, sys, tiny\nprint(tiny.VERSION, open('/tmp/a/b').read())\n"
    code += (
        "print(subprocess.run([sys.executable, '-c', 'import tiny; print(tiny.VERSION)'], capture_output=True).stdout)"
    )
    (reply,) = run(kind, CodeRun(runtime="mine", code=code), runtime=runtime)
    assert (reply.stdout, reply.stderr) == ("7 VERSION = 7\nb'7\\n'\n", "")


@pytest.fixture(scope="module")
def host() -> Iterator[dict[str, str]]:
    with reachable("the-worker's-secret") as host:
        yield host


def test_the_attacks_that_bubblewrap_holds_are_held(
    kind: Kind, host: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FERRUM_TEST_MARK", "the-worker's-secret")
    attacks = [attack for attack in ATTACKS if not attack.only_root or os.geteuid() == 0]
    (reply,) = run(kind, CodeRun(code=program(attacks), env=host, timeout_s=60))
    assert reply.reason is WhyEnded.OK, f"{reply.detail}\n{reply.stderr}"
    assert isinstance(reply.output, dict)
    assert set(reply.output) == {attack.name for attack in attacks}
    assert {name for name, through in reply.output.items() if through} <= HARMLESS[kind]


WORKER = """
import asyncio, sys
from ferrum.governance.acts import CodeRun
from ferrum.sandbox import Kind, Sandboxes
async def story():
    sandboxes = Sandboxes(Kind(sys.argv[1]), warm=0)
    say = lambda stream, text: print(text, end="", flush=True)
    await sandboxes.run(CodeRun(code="import time; print('up'); time.sleep(999)", timeout_s=999), {}, say)
asyncio.run(story())
"""


def test_a_worker_that_is_killed_leaves_nothing_running_and_the_next_one_cleans_up(kind: Kind) -> None:
    with subprocess.Popen([sys.executable, "-c", WORKER, kind.value], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"up\n"
        (place,) = (one for one in ours(kind).iterdir() if str(worker.pid) in _holders(one / "lock"))
        assert processes_with(place.name)
        worker.kill()
    until(lambda: not processes_with(place.name), f"still there: {processes_with(place.name)}")
    assert place.exists()
    run(kind, CodeRun(code="1"))
    assert not place.exists()
    if kind is Kind.CONTAINER:
        assert not _containers(place)


def _holders(lock: Path) -> set[str]:
    """Who has a file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == lock:
                found.add(link.parts[2])
        except OSError:
            continue
    return found


def _containers(place: Path) -> list[str]:
    tool = container._Tool.find(os.environ)
    return tool.ask("ps", "--all", "--quiet", "--filter", f"label=ferrum.sandbox={place}").split()


def test_a_cancelled_run_is_over_at_once(kind: Kind) -> None:
    async def story() -> None:
        sandboxes = Sandboxes(kind, warm=0)
        up = asyncio.Event()
        act = CodeRun(code="import time; print('up'); time.sleep(999)", timeout_s=999)
        task = asyncio.create_task(sandboxes.run(act, {}, lambda stream, text: up.set()))
        await up.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await sandboxes.aclose()

    asyncio.run(story())
    assert not [place for place in ours(kind).iterdir() if str(os.getpid()) in _holders(place / "lock")]


def test_two_workers_of_a_machine_have_sandboxes_at_the_same_time(kind: Kind) -> None:
    async def story() -> None:
        one, other = (Sandboxes(kind, warm=0) for _ in range(2))
        up = asyncio.Event()
        act = CodeRun(code="import time; print('up'); time.sleep(999)", timeout_s=999)
        task = asyncio.create_task(one.run(act, {}, lambda stream, text: up.set()))
        await up.wait()
        reply = await other.run(CodeRun(code="print(1)"), {}, lambda stream, text: None)
        assert reply.stdout == "1\n"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await one.aclose()
        await other.aclose()

    asyncio.run(story())


def start(backend: Backend) -> Cell:
    """A sandbox that was told nothing yet; in a thread of its own, for that gets a view of its own of the files."""
    backend.check()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(backend.start, Box.of(CodeRun(code="1"), basic())).result()


def test_what_is_not_as_confined_as_it_has_to_be_is_killed(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS[kind]()
    module = gvisor if kind is Kind.GVISOR else container
    monkeypatch.setattr(module, "_unconfined", lambda *_: "it is on fire")
    if kind is Kind.CONTAINER:
        monkeypatch.setattr(container, "_find", lambda _: os.getpid() and _a_process())
    cell = start(backend)
    try:
        with pytest.raises(Unconfined, match="on fire"):
            cell.confirm()
    finally:
        for descriptor in (cell.stdin, cell.stdout):
            os.close(descriptor)
        cell.reap()
        cell.reap()
        backend.close()


_SLEEPERS: list[subprocess.Popen[bytes]] = []


def _a_process() -> int:
    """One that may be killed in the place of another."""
    _SLEEPERS.append(subprocess.Popen(["sleep", "60"]))
    return _SLEEPERS[-1].pid


@pytest.fixture(autouse=True)
def _no_sleepers() -> Iterator[None]:
    yield
    while _SLEEPERS:
        sleeper = _SLEEPERS.pop()
        sleeper.kill()
        sleeper.wait()


CONFINED = {"NoNewPrivs": ["1"], "Seccomp": ["2"], "Uid": ["1", "1", "1", "1"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"NoNewPrivs": ["0"]}, "it can gain privileges (NoNewPrivs is not set)"),
        ({"Seccomp": ["0"]}, "no filter holds its system calls"),
        ({"Uid": ["1", "0", "1", "1"]}, "it is root"),
    ],
)
def test_what_lets_a_process_do_more_is_seen_from_outside(change: dict[str, list[str]], said: str) -> None:
    assert held.loose(CONFINED | change) == said


def test_a_process_like_any_other_is_not_confined() -> None:
    sleeper = _a_process()
    assert container._unconfined(sleeper) != ""
    assert held.shared(sleeper, ["net"]) == "it shares our net namespace"
    assert gvisor._unconfined(os.getpid(), 1) == "it cannot be found among the processes of runsc"
    assert container._find("there is no such token") == 0
    assert container.memory_group(0) is None


def test_a_program_that_is_not_there_leaves_no_pipe_open() -> None:
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    with pytest.raises(Missing, match="/nowhere cannot be started: "):
        held.Holder.start(["/nowhere"], {})
    assert {path.name for path in Path("/proc/self/fd").iterdir()} == before


# Without runsc, podman and docker.


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of its own, and nothing on PATH."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def program_of(places: Path, name: str, body: str) -> None:
    path = places / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("backend", "said"), [(GVisor, "no runsc on PATH: apt"), (Container, "neither podman nor docker")]
)
def test_what_is_not_installed_is_told_with_what_to_type(places: Path, backend: type[Backend], said: str) -> None:
    with pytest.raises(Missing, match=said):
        backend().check()
    with pytest.raises(Missing, match=said):
        backend().start(Box.of(CodeRun(code="1"), basic()))


def test_a_docker_without_its_daemon_is_told_with_what_to_do(places: Path) -> None:
    program_of(places, "docker", "echo 'Cannot connect to the Docker daemon at unix:///x.' >&2; exit 1")
    with pytest.raises(Missing, match=r"docker ps failed: Cannot connect.*start the docker daemon"):
        Container().check()


def test_an_image_is_imported_once_and_nothing_is_pulled(places: Path) -> None:
    program_of(
        places,
        "docker",
        f'echo "$*" >> {places}/asked; [ "$1" = image ] && exec /usr/bin/test -e {places}/there; '
        f'[ "$1" = import ] && exec /bin/cp /dev/stdin {places}/there; exit 0',
    )
    backend = Container()
    backend.check()
    backend.check()
    backend.close()
    Container().check()
    asked = (places / "asked").read_text().splitlines()
    assert [line.split()[0] for line in asked if line.split()[0] in ("image", "import")] == ["image", "import", "image"]
    assert not any("pull" in line for line in asked)
    listed = subprocess.run(["/bin/tar", "-tf", places / "there"], capture_output=True, text=True, check=True).stdout
    assert "etc/passwd" in listed.split()


def test_the_command_for_a_container_takes_everything_away(places: Path) -> None:
    program_of(places, "docker", "exit 0")
    backend = Container()
    tool, place = backend._opened()
    box = Box.of(CodeRun(code="1", memory=2**28, disk=2**26, cpus=0.5, processes=7), basic())
    command = backend.command(tool, place, box, "token")
    backend.close()
    for flag in (
        "--rm", "--pull=never", "--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges",
        "--pids-limit=11", "--cpus=0.5", f"--memory={2**28 + 2**26 + 2**25}", "--ipc=private",
        f"--tmpfs=/job:rw,nosuid,nodev,size={2**26},mode=1777",
    ):  # fmt: skip
        assert flag in command, flag
    volumes = [value for flag, value in pairwise(command) if flag == "--volume"]
    assert all(volume.endswith(":ro") for volume in volumes)
    assert command[-1] == "token"
    # The keys of model providers are none of its business.
    assert not any(name.endswith("_KEY") for name in container._Tool.find({**os.environ, "OPENAI_API_KEY": "x"}).env)


def test_the_bundle_for_gvisor_takes_everything_away(places: Path) -> None:
    backend, place = GVisor(), skeleton.Ours("gvisor")
    skeleton.fill(place.directory("root"))
    runtime = Runtime(
        "mine", "/usr/local/bin/python3.x", mounts=("/usr/local/lib/x", "/srv/y"), placed=(("/a", "/opt/runtime"),)
    )
    config: Any = backend.config(Box.of(CodeRun(code="1"), runtime), place)
    place.close()
    assert not place.path.exists()
    assert config["root"]["readonly"] is True
    assert config["process"]["noNewPrivileges"] is True
    assert config["process"]["env"] == []
    bound = {one["destination"]: one for one in config["mounts"] if one["type"] == "bind"}
    assert {"/usr", "/usr/local", "/usr/local/lib/x", "/srv/y", "/opt/runtime"} <= set(bound)
    assert all("ro" in one["options"] for one in bound.values())
    sizes = [one["options"] for one in config["mounts"] if one["type"] == "tmpfs"]
    assert all(f"size={2**26}" in options for options in sizes)
    assert "--network=none" in backend.flags(Path("/x"))


def test_a_container_that_cannot_be_seen_is_not_trusted_and_is_removed_by_name(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the daemon is on another machine, or root's; `rm` is what ends it then."""
    os.mkfifo(places / "life")
    program_of(
        places,
        "docker",
        f'echo "$*" >> {places}/asked; [ "$1" = run ] && {{ echo "what it says" >&2; exec /bin/cat {places}/life; }}; '
        f'[ "$1" = rm ] && : > {places}/life; exit 0',
    )
    backend = Container()
    cell = start(backend)
    with pytest.raises(Unconfined, match="is the daemon on another one"):
        cell.confirm()
    for descriptor in (cell.stdin, cell.stdout):
        os.close(descriptor)
    cell.reap()
    cell.kill()
    backend.close()
    assert cell.last_words() == "what it says"
    assert (cell.ran_out_of_memory(), cell.peak_memory()) == (False, None)
    name = next(line.split()[-1] for line in (places / "asked").read_text().splitlines() if line.startswith("rm "))
    assert name.startswith("ferrum-")


def test_a_container_that_does_not_go_is_given_up(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "_PATIENCE_S", 0.05)
    program_of(places, "docker", '[ "$1" = run ] && exec /bin/sleep 60; [ "$1" = rm ] && exit 1; exit 0')
    backend = Container()
    cell = start(backend)
    for descriptor in (cell.stdin, cell.stdout):
        os.close(descriptor)
    cell.reap()
    backend.close()


def test_what_a_dead_worker_left_is_removed_by_its_label(places: Path) -> None:
    program_of(
        places, "docker", f'echo "$*" >> {places}/asked; [ "$1" = ps ] && [ "$2" = --all ] && echo one two; exit 0'
    )
    dead = places / f"ferrum-container-{os.geteuid()}" / "dead"
    dead.mkdir(parents=True)
    (dead / "lock").touch()
    being_made = dead.with_name("being-made")
    being_made.mkdir()
    backend = Container()
    backend.check()
    backend.close()
    asked = (places / "asked").read_text().splitlines()
    assert f"ps --all --quiet --filter label=ferrum.sandbox={dead}" in asked
    assert [line for line in asked if line.startswith("rm")] == ["rm --force one", "rm --force two"]
    assert not dead.exists()
    assert being_made.exists()


def test_the_kernels_counts_of_memory_are_read_in_either_form(tmp_path: Path) -> None:
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    (tmp_path / "memory.max_usage_in_bytes").write_text("4096\n")
    cell = object.__new__(container._Cell)
    cell._group = tmp_path
    assert (cell.ran_out_of_memory(), cell.peak_memory()) == (True, 4096)
    (tmp_path / "memory.events").write_text("low 0\noom 0\noom_kill 0\n")
    (tmp_path / "memory.peak").write_text("8192\n")
    assert (cell.ran_out_of_memory(), cell.peak_memory()) == (False, 8192)


@pytest.mark.parametrize(
    ("backend", "words", "said"),
    [
        (GVisor, "flag provided but not defined: -overlay2", "older than December 2022"),
        (GVisor, "cannot create a user namespace", "max_user_namespaces"),
        (GVisor, "something else", ""),
        (Container, "cannot find newuidmap: exec", "apt install uidmap"),
        (Container, "crun: cgroups in hybrid mode not supported", "apt install runc"),
        (Container, "something else", ""),
    ],
)
def test_what_they_say_is_explained(backend: type[Backend], words: str, said: str) -> None:
    told = backend().explain(words)
    assert said in told
    assert bool(told) == bool(said)


def test_a_temporary_directory_of_somebody_else_is_not_used(places: Path) -> None:
    (places / f"ferrum-gvisor-{os.geteuid()}").symlink_to("/")
    with pytest.raises(Missing, match="belongs to somebody else"):
        skeleton.Ours("gvisor")
    (places / f"ferrum-container-{os.geteuid()}").touch()
    with pytest.raises(Missing, match="cannot be used"):
        skeleton.Ours("container")


# The filter in the words of podman and docker.


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_profile_allows_what_the_filter_allows(machine: str) -> None:
    """Both are asked about each call, with the values that they know, those beside them, and some by chance."""
    rules, names = seccomp.rules(machine), seccomp.names(machine)
    entries: dict[str, list[list[dict[str, int]]]] = {}
    for entry in json.loads(json.dumps(profile(machine)))["syscalls"]:
        if entry["action"] == "SCMP_ACT_ALLOW":
            for name in entry["names"]:
                entries.setdefault(name, []).append(entry.get("args", []))
    chance = random.Random(4)
    compared = 0
    for number, block in rules.items():
        known = sorted({step.k for step in block if step.code in (seccomp.JUMP_EQUAL, seccomp.JUMP_ANY_BIT)})
        words = {word for value in known for word in (value, value ^ 1, value - 1, value + 1)} | {0, 1, 0xFFFFFFFF}
        words = {word & 0xFFFFFFFF for word in words} | {chance.getrandbits(32) for _ in range(20)}
        values = [word | high << 32 for word in words for high in (0, 1, chance.getrandbits(32))]
        for _ in range(400 if known else 3):
            arguments = [chance.choice(values) for _ in range(6)]
            allowed = any(
                all(arguments[arg["index"]] & arg["value"] == arg["valueTwo"] for arg in args)
                for args in entries.get(names[number], [])
            )
            assert allowed == _allows(block, arguments), (names[number], arguments)
            compared += allowed
    assert compared > 300


def _allows(block: seccomp.Block, arguments: list[int]) -> bool:
    """Run a block as the kernel does."""
    data = struct.pack("=IIQ6Q", 0, 0, 0, *arguments)
    at, held = 0, 0
    while (step := block[at]).code != seccomp.RETURN:
        if step.code == seccomp.LOAD:
            (held,) = struct.unpack_from("=I", data, step.k)
            at += 1
        else:
            found = held == step.k if step.code == seccomp.JUMP_EQUAL else bool(held & step.k)
            at += 1 + (step.true if found else step.false)
    return step.k == seccomp.ALLOW

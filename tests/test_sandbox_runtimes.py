"""Runtimes: what is built is whole, is read by everyone, and replaces the one before at once or not at all."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from sandboxes import why_not

from ferrum.cli import status_of
from ferrum.errors import AuthorError, NotFound, Unavailable
from ferrum.governance.acts import CodeReply, CodeRun, WhyEnded
from ferrum.sandbox import Kind, prepared
from ferrum.sandbox.here import sandboxes, trial
from ferrum.sandbox.runtimes import BASIC, Runtime, basic
from ferrum.settings import Settings
from ferrum.testing.environment import environment

ROOT = Path(__file__).parent.parent


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with a place for runtimes of its own, and the uv of `make setup`."""
    monkeypatch.setenv("PATH", f"{ROOT / '.tools' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return Settings(runtimes=tmp_path / "runtimes")


def wheel(directory: Path, name: str = "tiny", version: str = "1.0", size: int = 0) -> Path:
    """A wheel with one module that holds its version, and as many bytes of data."""
    directory.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    contents = {
        f"{name}.py": f"VERSION = {version!r}\n".encode(),
        f"{name}.bin": os.urandom(size),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_hash(data)},{len(data)}\n" for path, data in contents.items())
    path = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for inside, data in contents.items():
            file.writestr(inside, data)
        file.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def asks(directory: Path, *lines: object) -> Path:
    path = directory / "requirements.txt"
    path.write_text("--no-index\n" + "".join(f"{line}\n" for line in lines))
    return path


def program(directory: Path, name: str, body: str) -> Path:
    """A program of that name, alone in a directory for PATH."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(body)}")
    path.chmod(0o755)
    return directory


def version_in(runtime: prepared.Built) -> str:
    text = (runtime.directory / "site" / "tiny.py").read_text()
    return text.split("'")[1]


def left_behind(settings: Settings) -> list[str]:
    return [path.name for path in prepared.place(settings).rglob(".building-*")]


def test_a_runtime_is_made_of_a_requirements_file(settings: Settings, tmp_path: Path) -> None:
    made = prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path)), imports=["tiny"])
    assert made.packages == {"tiny": "1.0"}
    assert made.imports == ("tiny",)
    assert prepared.built(settings) == (made,)
    runtime = prepared.find("mine", settings)
    assert runtime == made.runtime
    assert runtime.placed == ((str(made.directory), "/opt/runtime"),)
    assert runtime.paths == ("/opt/runtime/site",)
    assert runtime.warm[-1] == "tiny"
    assert list(made.directory.rglob("*.pyc"))
    assert left_behind(settings) == []


def test_the_standard_library_is_always_there_and_needs_no_building(settings: Settings) -> None:
    assert prepared.find(BASIC, settings) == basic()
    with pytest.raises(AuthorError, match="needs no building"):
        prepared.build(BASIC, settings)
    with pytest.raises(AuthorError, match="cannot be dropped"):
        prepared.drop(BASIC, settings)


def test_an_unknown_runtime_is_told_with_the_nearest_name_and_what_to_type(settings: Settings) -> None:
    with pytest.raises(
        NotFound, match=r"no runtime 'python-dta' \(did you mean 'python-data'\?\).*ferrum sandbox build"
    ):
        prepared.find("python-dta", settings)
    with pytest.raises(NotFound, match="not built on this machine: ferrum sandbox build python-data"):
        prepared.find("python-data", settings)
    with pytest.raises(NotFound, match=r"'\.\./x'"):
        prepared.ready("../x", settings)


@pytest.mark.parametrize(
    ("name", "file", "imports", "said"),
    [
        ("Mine", "requirements.txt", [], "cannot name a runtime"),
        ("../mine", "requirements.txt", [], "cannot name a runtime"),
        ("mine", None, [], "ferrum sandbox build mine requirements.txt"),
        ("python-dat", None, [], "did you mean 'python-data'"),
        ("mine", "missing.txt", [], "there is no file"),
        ("mine", "requirements.txt", ["os; x"], "not the name of a module"),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_reason(
    settings: Settings, tmp_path: Path, *, name: str, file: str | None, imports: list[str], said: str
) -> None:
    asks(tmp_path)
    with pytest.raises(AuthorError, match=said):
        prepared.build(name, settings, tmp_path / file if file else None, imports)


def test_a_runtime_that_is_built_anew_replaces_the_one_before_which_stays_for_what_runs_in_it(
    settings: Settings, tmp_path: Path
) -> None:
    made = [
        prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path, version=version)))
        for version in ("1.0", "2.0", "3.0")
    ]
    assert version_in(*prepared.built(settings)) == "3.0"
    assert [one.directory.exists() for one in made] == [False, True, True]
    assert len({one.digest for one in made}) == 3


def test_building_the_same_again_is_the_same_runtime(settings: Settings, tmp_path: Path) -> None:
    first = prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path)))
    assert prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path))) == first
    assert left_behind(settings) == []


def test_a_dropped_runtime_is_gone(settings: Settings, tmp_path: Path) -> None:
    made = prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path)))
    prepared.drop("mine", settings)
    assert not made.directory.exists()
    with pytest.raises(NotFound):
        prepared.drop("mine", settings)


def test_everyone_can_read_a_runtime_whatever_the_umask(settings: Settings, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path)))
    finally:
        os.umask(before)
    assert settings.runtimes is not None
    for path in [settings.runtimes, *settings.runtimes.rglob("*")]:
        wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
        if path.suffix != ".lock":
            assert path.stat().st_mode & wanted == wanted, path
    assert made.directory in settings.runtimes.glob("*/*/*")


def test_what_cannot_be_installed_leaves_the_runtime_in_use(settings: Settings, tmp_path: Path) -> None:
    prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path)))
    with pytest.raises(Unavailable, match="could not be installed"):
        prepared.build("mine", settings, asks(tmp_path, "there-is-no-such-package-of-ferrum"))
    assert version_in(*prepared.built(settings)) == "1.0"
    assert left_behind(settings) == []


def test_a_runtime_that_fails_its_trial_is_not_used(settings: Settings, tmp_path: Path) -> None:
    prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path)))

    def trial(runtime: Runtime, program: str) -> dict[str, bytes]:
        assert (Path(runtime.placed[0][0]) / "site" / "tiny.py").read_text() == "VERSION = '2.0'\n"
        assert program == "import tiny\n"
        raise Unavailable("it does not import")

    newer = asks(tmp_path, wheel(tmp_path, version="2.0"))
    with pytest.raises(Unavailable, match="does not import"):
        prepared.build("mine", settings, newer, imports=["tiny"], trial=trial)
    assert version_in(*prepared.built(settings)) == "1.0"
    assert left_behind(settings) == []


BUILD = """
import sys
from pathlib import Path
from ferrum.sandbox import prepared
from ferrum.settings import Settings
prepared.build("mine", Settings(runtimes=Path(sys.argv[1])), Path(sys.argv[2]))
"""


def building(settings: Settings, requirements: Path, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(settings.runtimes), str(requirements)]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


def test_a_build_that_is_killed_leaves_the_runtime_in_use(settings: Settings, tmp_path: Path) -> None:
    prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path)))
    os.mkfifo(tmp_path / "begun")
    slow = program(
        tmp_path / "bin",
        "uv",
        f"""
        import pathlib, signal, sys
        site = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
        (site / "half.py").write_text("x = ")
        open({str(tmp_path / "begun")!r}, "w").close()
        signal.pause()
        """,
    )
    env = {**os.environ, "PATH": f"{slow}{os.pathsep}{os.environ['PATH']}"}
    with building(settings, asks(tmp_path, "anything"), env=env, start_new_session=True) as build:
        (tmp_path / "begun").open().close()
        assert left_behind(settings) != []
        os.killpg(build.pid, signal.SIGKILL)
    assert version_in(*prepared.built(settings)) == "1.0"
    prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path, version="2.0")))
    assert version_in(*prepared.built(settings)) == "2.0"
    assert left_behind(settings) == []


def test_an_installer_stands_where_the_requirements_do_and_trusts_what_the_machine_trusts(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A uv.toml in the directory one stands in names an index; behind a proxy uv's own certificates know no issuer."""
    uv = program(
        tmp_path / "bin",
        "uv",
        """
        import os, sys
        sys.exit(f"in {os.getcwd()} with {os.environ['UV_SYSTEM_CERTS']} and {os.environ['UV_NATIVE_TLS']}")
        """,
    )
    (tmp_path / "mine").mkdir()
    asks(tmp_path / "mine", "anything")
    monkeypatch.setenv("PATH", f"{uv}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("UV_NATIVE_TLS", "false")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Unavailable, match=f"in {tmp_path}/mine with 1 and false"):
        prepared.build("mine", settings, Path("mine/requirements.txt"))


def test_the_directory_one_stands_in_is_not_where_pip_is_looked_for(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('a stranger ran')")
    file = asks(tmp_path, "anything")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Unavailable) as refused:
        prepared.build("mine", settings, file)
    assert "a stranger ran" not in str(refused.value)


def test_two_builds_at_once_are_one_after_the_other(settings: Settings, tmp_path: Path) -> None:
    both = [
        building(settings, asks(wheel(tmp_path / version, version=version).parent, tmp_path / version / name))
        for version in ("1.0", "2.0")
        for name in [f"tiny-{version}-py3-none-any.whl"]
    ]
    for build in both:
        _, said = build.communicate()
        assert (build.returncode, said) == (0, "")
    assert version_in(*prepared.built(settings)) in {"1.0", "2.0"}
    assert left_behind(settings) == []


def test_a_full_disk_leaves_the_runtime_in_use(settings: Settings, tmp_path: Path) -> None:
    assert settings.runtimes is not None
    settings.runtimes.mkdir()
    small, large = (wheel(tmp_path / name, size=size) for name, size in (("small", 0), ("large", 4 * 2**20)))
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from pathlib import Path
        from ferrum.errors import Unavailable
        from ferrum.sandbox import prepared
        from ferrum.settings import Settings
        settings = Settings(runtimes=Path(sys.argv[1]))
        made = prepared.build("mine", settings, Path(sys.argv[2]))
        try:
            prepared.build("mine", settings, Path(sys.argv[3]))
        except Unavailable:
            assert prepared.built(settings) == (made,)
            assert not list(Path(sys.argv[1]).rglob(".building-*"))
            print("held")
        """)
    )
    mounted = f'mount -t tmpfs -o size=2m none "{settings.runtimes}" && exec "$@"'
    arguments = [str(settings.runtimes), *(str(asks(path.parent, path)) for path in (small, large))]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted, "sh", sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare failed" in done.stderr:
        pytest.skip(f"a small disk needs a user namespace: {done.stderr}")
    assert (done.stdout, done.stderr) == ("held\n", "")


def test_an_installer_gets_what_it_needs_and_no_other_secret(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"""
        import os, pathlib, sys
        pathlib.Path({str(tmp_path / "seen")!r}).write_text("\\n".join(os.environ))
        sys.exit("no route to https://someone:hunter2@index.example/simple")
        """
    directory = program(tmp_path / "bin", "uv", body)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-operator")
    monkeypatch.setenv("PIP_INDEX_URL", "https://someone:hunter2@index.example/simple")
    with pytest.raises(Unavailable, match=r"https://\*\*\*@index\.example") as told:
        prepared.build("mine", settings, asks(tmp_path, "anything"))
    assert "hunter2" not in str(told.value)
    seen = (tmp_path / "seen").read_text().split()
    assert "PIP_INDEX_URL" in seen
    assert "OPENAI_API_KEY" not in seen


def test_without_uv_a_runtime_is_built_by_pip(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = getattr(sys, "_base_executable", sys.executable)
    if subprocess.run([base, "-I", "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("this Python has no pip")
    monkeypatch.setenv("PATH", str(tmp_path))
    made = prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path)))
    assert made.packages == {"tiny": "1.0"}


def test_without_uv_and_pip_it_is_said_what_to_do(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(prepared, "_outer_pip", lambda: None)
    monkeypatch.setattr(prepared, "find_spec", lambda _: None)
    with pytest.raises(Unavailable, match="put uv on PATH"):
        prepared.build("mine", settings, asks(tmp_path, wheel(tmp_path)))


def test_a_place_that_cannot_be_written_is_told_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="FERRUM_RUNTIMES names another place"):
        prepared.build("mine", Settings(runtimes=tmp_path / "file" / "below"), asks(tmp_path, wheel(tmp_path)))


# python-data, and the command line.


@pytest.fixture(scope="module")
def needs_sandbox() -> None:
    if missing := why_not(Kind.BUBBLEWRAP):
        pytest.skip(f"NOT TESTED: no sandbox on this machine: {missing}")


CHART = """
import os, subprocess, sys, numpy, pandas, matplotlib, matplotlib.pyplot as plot
table = pandas.read_csv("data.csv")
plot.plot(table["n"], numpy.sqrt(table["n"]))
plot.savefig("chart.png")
print(matplotlib.get_backend(), matplotlib.get_cachedir(), [os.path.islink(one) for one in
    [os.path.join("/tmp/.matplotlib", name) for name in os.listdir("/tmp/.matplotlib")]])
print(table["n"].sum(), os.access(os.path.dirname(numpy.__file__), os.W_OK))
other = [sys.executable, "-c", "import numpy; print(numpy.arange(3))"]
print(subprocess.run(other, capture_output=True, text=True).stdout)
"""


@pytest.mark.usefixtures("needs_sandbox")
def test_python_data_draws_a_chart_without_network_and_without_a_word(runtimes: Path) -> None:
    act = CodeRun(runtime="python-data", code=CHART, outputs=("*.png",), memory=2**30, timeout_s=100)

    async def story() -> CodeReply:
        opened = sandboxes(Settings(runtimes=runtimes))
        try:
            return await opened.run(act, {"data.csv": b"n\n1\n4\n9\n"}, lambda stream, text: None)
        finally:
            await opened.aclose()

    reply = asyncio.run(story())
    assert (reply.reason, reply.stderr) == (WhyEnded.OK, "")
    assert reply.stdout == "Agg /tmp/.matplotlib [True]\n14 False\n[0 1 2]\n\n"
    assert reply.files["chart.png"].startswith(b"\x89PNG\r\n")


def test_a_runtime_of_ours_that_is_there_is_not_built_anew(runtimes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_link", lambda *_: pytest.fail("it is built again"))
    settings = Settings(runtimes=runtimes)
    assert prepared.ready("python-data", settings).name == "python-data"
    assert prepared.build("python-data", settings).packages.keys() >= {"numpy", "pandas", "matplotlib"}


def test_a_runtime_of_ours_is_built_when_it_is_first_asked_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"python-tiny": prepared.Ours(("iniconfig",), ("iniconfig",))}
    monkeypatch.setattr(prepared, "OURS", ours)
    assert "iniconfig" in prepared.ready("python-tiny", settings).warm
    (made,) = prepared.built(settings)
    assert made.packages.keys() == {"iniconfig"}
    assert (made.directory / "site" / "iniconfig" / "__init__.py").exists()
    monkeypatch.setattr(prepared, "OURS", {"python-none": prepared.Ours(("there-is-no-such-package",), ())})
    with pytest.raises(NotFound, match="not built on this machine: ferrum sandbox build python-none"):
        prepared.ready("python-none", settings)


def test_what_is_installed_is_copied_where_it_cannot_be_linked(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(prepared, "OURS", {"python-tiny": prepared.Ours(("iniconfig",), ())})
    made = prepared.build("python-tiny", settings)
    copied = made.directory / "site" / "iniconfig" / "__init__.py"
    assert copied.stat().st_nlink == 1
    assert copied.stat().st_mode & stat.S_IROTH


def test_the_pins_that_ship_with_ferrum_are_those_of_the_lock() -> None:
    """`make lock` where this fails."""
    pins = {line for line in (ROOT / "ferrum/sandbox/python-data.txt").read_text().splitlines() if "==" in line}
    locked = set((ROOT / "requirements.lock").read_text().splitlines())
    assert {pin.split(" ; ")[0].removesuffix(" \\") for pin in pins} <= {
        line.split(" ; ")[0].removesuffix(" \\") for line in locked
    }
    assert {"numpy", "pandas", "matplotlib"} <= {pin.partition("==")[0] for pin in pins}


def ferrum(*arguments: object) -> int:
    return status_of([str(one) for one in ("sandbox", *arguments)])


@pytest.fixture
def command_line(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to stand in, with settings that lead to one place for runtimes."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with environment({"FERRUM_RUNTIMES": str(settings.runtimes), "FERRUM_SANDBOX": "bubblewrap"}):
        yield tmp_path / "here"


@pytest.mark.usefixtures("needs_sandbox")
def test_a_runtime_is_built_listed_used_and_dropped_by_commands(
    command_line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = asks(command_line, wheel(command_line))
    assert ferrum("build", "mine", file, "--import", "tiny") == 0
    assert capsys.readouterr().out == "mine  tiny 1.0\n"
    assert ferrum("list") == 0
    listed = capsys.readouterr().out
    assert "mine                 tiny 1.0\n" in listed
    assert "python-data          not built: ferrum sandbox build python-data\n" in listed
    assert "bubblewrap           works, memory is held by a " in listed
    assert ferrum("list", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {"name": "mine", "ready": True, "packages": {"tiny": "1.0"}} in told["runtimes"]
    assert [one["backend"] for one in told["backends"]] == ["bubblewrap", "gvisor", "container"]
    assert ferrum("run", "--runtime", "mine", "-c", "import tiny; print(tiny.VERSION)") == 0
    assert capsys.readouterr().out == "1.0\n"
    assert ferrum("drop", "mine", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"name": "mine", "dropped": True}
    assert ferrum("drop", "mine") == 2


@pytest.mark.usefixtures("needs_sandbox")
def test_what_does_not_import_in_a_sandbox_is_not_used(command_line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ferrum("build", "mine", asks(command_line, wheel(command_line)), "--import", "tinny") == 2
    assert "does not work in a sandbox: ModuleNotFoundError: No module named 'tinny'" in capsys.readouterr().err
    assert ferrum("drop", "mine") == 2


@pytest.mark.usefixtures("needs_sandbox")
def test_a_program_is_tried_in_a_sandbox(command_line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command_line / "program.py").write_text("text = open('in.txt').read(); open('a/b.txt', 'w').write(text.upper())")
    (command_line / "in.txt").write_text("hello")
    assert ferrum("run", "program.py") == 1
    said = capsys.readouterr().err
    assert "No such file or directory: 'in.txt'" in said
    assert "ferrum: error: it exited with 1" in said
    code = "import os; os.mkdir('a'); exec(open('program.py').read())"
    assert ferrum("run", "-c", code, "--with", "program.py", "--with", "in.txt", "--out", "a/*", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["files"] == ["a/b.txt"]
    assert captured.err == "out/a/b.txt  5 bytes\n"
    assert (command_line / "out" / "a" / "b.txt").read_text() == "HELLO"
    # What is there already is not written over.
    assert ferrum("run", "--shell", "-c", "mkdir a; echo > a/b.txt", "--out", "a/*") == 2
    assert "out/a/b.txt cannot be written: File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "give a file, or a program with -c"),
        (["run", "missing.py"], "missing.py cannot be read: No such file"),
        (["build", "python-basic"], "needs no building"),
        (["run", "-c", "1", "--timeout", "0"], "--timeout"),
    ],
)
@pytest.mark.usefixtures("command_line")
def test_a_mistake_in_what_was_asked_ends_with_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ferrum(*arguments) == 2
    assert said in capsys.readouterr().err


def test_where_no_sandbox_works_a_runtime_is_built_without_a_trial(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = asks(tmp_path, wheel(tmp_path))
    path = os.environ["PATH"]
    tried = trial(settings)

    def without_sandbox(runtime: Runtime, program: str) -> Mapping[str, bytes]:
        monkeypatch.setenv("PATH", str(tmp_path))
        try:
            return tried(runtime, program)
        finally:
            monkeypatch.setenv("PATH", path)

    assert prepared.build("mine", settings, file, ["tiny"], without_sandbox).imports == ("tiny",)

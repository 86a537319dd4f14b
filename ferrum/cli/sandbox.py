"""`ferrum sandbox …`: where code runs that nobody has read, and what it finds there."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrum.cli.options import COMPLETED, FAILED, as_json_option, done, pass_on, raw_option, say, show_json
from ferrum.errors import AuthorError

if TYPE_CHECKING:
    from ferrum.governance.acts import CodeReply, CodeRun
    from ferrum.sandbox import Probe
    from ferrum.sandbox.prepared import Built
    from ferrum.settings import Settings

_name = click.argument("name")


@click.group()
def sandbox() -> None:
    """Isolation for code, and the environments that it runs in."""


@sandbox.command("list")
@as_json_option
def list_sandboxes(as_json: bool) -> None:
    """List the runtimes, and what isolates code here, found out by running something in each."""
    from ferrum.sandbox.prepared import OURS, built
    from ferrum.sandbox.runtimes import BASIC
    from ferrum.settings import settings

    there = {one.name: one for one in built(settings())}
    probes = asyncio.run(_probes())
    runtimes = {BASIC: _Runtime(BASIC, True)}
    runtimes |= {name: _Runtime(name, name in there) for name in OURS}
    runtimes |= {name: _Runtime(name, True, one) for name, one in there.items()}
    if as_json:
        show_json(
            {
                "runtimes": [runtime.value for runtime in runtimes.values()],
                "backends": [_probe_value(probe) for probe in probes],
            }
        )
        return
    for runtime in runtimes.values():
        say(f"{runtime.name:<20} {runtime.text}")
    say()
    for probe in probes:
        held = f"works, memory is held by a {probe.memory_by}"
        say(f"{probe.kind.value:<20} {held if probe.works else probe.missing}")


class _Runtime:
    """A runtime as it is shown."""

    def __init__(self, name: str, ready: bool, built: Built | None = None) -> None:
        self.name, self._ready, self._built = name, ready, built

    @property
    def value(self) -> Mapping[str, object]:
        packages = dict(self._built.packages) if self._built else {}
        return {"name": self.name, "ready": self._ready, "packages": packages}

    @property
    def text(self) -> str:
        if not self._ready:
            return f"not built: ferrum sandbox build {self.name}"
        if self._built is None:
            return "the standard library"
        return ", ".join(f"{name} {version}" for name, version in sorted(self._built.packages.items()))


def _probe_value(probe: Probe) -> Mapping[str, object]:
    return {
        "backend": probe.kind.value,
        "works": probe.works,
        "missing": probe.missing or None,
        "memory_by": probe.memory_by,
    }


async def _probes() -> list[Probe]:
    from ferrum.sandbox import Kind, Sandboxes

    probes: list[Probe] = []
    for kind in Kind:
        sandboxes = Sandboxes(kind, warm=0)
        try:
            probes += await sandboxes.probe()
        finally:
            await sandboxes.aclose()
    return probes


@sandbox.command()
@_name
@click.argument("requirements", type=click.Path(path_type=Path), required=False)
@click.option("--import", "imports", multiple=True, metavar="MODULE", help="A waiting sandbox has it imported already.")
@as_json_option
def build(name: str, requirements: Path | None, imports: Sequence[str], as_json: bool) -> None:
    """Make a runtime of a requirements file, wheels only; python-data needs no file.

    It is tried in a sandbox before it is used. A runtime of that name that is there already stays in use until then.
    """
    from ferrum.sandbox.here import trial
    from ferrum.sandbox.prepared import build as make
    from ferrum.settings import settings

    made = make(name, settings(), requirements, imports, trial(settings()))
    packages = ", ".join(f"{package} {version}" for package, version in sorted(made.packages.items()))
    done(
        {"name": made.name, "packages": dict(made.packages), "directory": str(made.directory)},
        f"{made.name}  {packages}",
        as_json,
    )


@sandbox.command()
@_name
@as_json_option
def drop(name: str, as_json: bool) -> None:
    """Remove a runtime that was built."""
    from ferrum.sandbox.prepared import drop as remove
    from ferrum.settings import settings

    remove(name, settings())
    done({"name": name, "dropped": True}, f"{name} is gone", as_json)


@sandbox.command("run")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("-c", "code", metavar="CODE", help="The program itself, in place of a file.")
@click.option("--shell", is_flag=True, help="It is a shell script and no Python.")
@click.option("--runtime", default="python-basic", show_default=True, help="What it finds there.")
@click.option("--with", "inputs", multiple=True, type=click.Path(path_type=Path), help="A file that it is given.")
@click.option("--out", "outputs", multiple=True, metavar="PATTERN", help="Files that it gives back.")
@click.option(
    "--to", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Where to put them."
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, help="Seconds.")
@click.option("--memory", type=click.IntRange(16), default=256, show_default=True, help="MiB.")
@raw_option
@as_json_option
def run_code(
    *,
    file: Path | None,
    code: str | None,
    shell: bool,
    runtime: str,
    inputs: Sequence[Path],
    outputs: Sequence[str],
    to: Path,
    timeout: float,
    memory: int,
    raw: bool,
    as_json: bool,
) -> int:
    """Run a program in a sandbox, on trial: nothing of it is recorded, and no policy is asked.

    The exit status is 0 where it ended well, 1 where it did not, 2 where it could not be run.
    """
    from ferrum.governance.acts import CodeRun, InputFile
    from ferrum.settings import settings

    if (file is None) == (code is None):
        raise click.UsageError("give a file, or a program with -c")
    given = {path.name: _read(path) for path in inputs}
    act = CodeRun(
        runtime=runtime,
        language="shell" if shell else "python",
        code=code if file is None else _read(file).decode(errors="replace"),
        files={name: InputFile(text="") for name in given},
        outputs=tuple(outputs),
        timeout_s=timeout,
        memory=memory * 2**20,
    )
    reply = asyncio.run(_run(act, given, settings(), quiet=as_json, raw=raw))
    for path, content in reply.files.items():
        _write(to / path, content)
    if as_json:
        show_json({**reply.model_dump(mode="json", exclude={"files"}), "files": sorted(reply.files)})
    elif reply.detail:
        say(f"ferrum: {reply.reason}: {reply.detail}", err=True)
    return COMPLETED if reply.reason == "ok" else FAILED


async def _run(act: CodeRun, files: Mapping[str, bytes], settings: Settings, *, quiet: bool, raw: bool) -> CodeReply:
    from ferrum.sandbox.here import sandboxes

    def say(stream: str, text: str) -> None:
        if not quiet:
            pass_on(text, raw=raw, err=stream == "stderr")

    opened = sandboxes(settings)
    try:
        return await opened.run(act, files, say)
    finally:
        await opened.aclose()


def _read(path: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise AuthorError(f"{path} cannot be read: {error.strerror}") from error


def _write(path: Path, content: bytes) -> None:
    """A path that a sandbox named is relative and goes only down; what is there already is not written over."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(content)
    except OSError as error:
        raise AuthorError(f"{path} cannot be written: {error.strerror}") from error
    say(f"{path}  {len(content):,} bytes", err=True)

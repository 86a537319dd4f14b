"""What code in a sandbox finds there: an interpreter and what may be imported, read-only."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BASIC = "python-basic"

#: Most programs import these; a warm sandbox has them already.
_USUAL = ("json", "re", "math", "random", "datetime", "collections", "itertools", "functools", "pathlib", "csv", "io")


@dataclass(frozen=True, slots=True)
class Runtime:
    """A prepared environment, by name."""

    name: str
    #: An absolute path, the same inside and outside.
    interpreter: str
    #: Directories and files that are there read-only, at their own paths. `/usr` is always there.
    mounts: tuple[str, ...] = ()
    #: Directories that are there read-only at another path: where they are outside, and inside.
    placed: tuple[tuple[str, str], ...] = ()
    #: Directories within `mounts` that are not to be seen: they are empty inside.
    hidden: tuple[str, ...] = ()
    #: What Python finds modules in, after its standard library.
    paths: tuple[str, ...] = ()
    #: Modules that a warm sandbox has imported before it gets its code.
    warm: tuple[str, ...] = ()
    #: Variables of the environment before those of the job.
    env: tuple[tuple[str, str], ...] = ()
    #: Links that are made in `/tmp` before anything is imported: where, and to what.
    links: tuple[tuple[str, str], ...] = ()


@cache
def basic() -> Runtime:
    """The interpreter that runs this and its standard library, without anything that was installed into it."""
    # A virtual environment's own interpreter is a link to this one.
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return Runtime(
        name=BASIC,
        interpreter=interpreter,
        mounts=tuple(_outside_usr([interpreter, *_libraries()])),
        hidden=tuple(sorted({str(path) for path in _installed() if path.is_dir()})),
        warm=_USUAL,
    )


def _libraries() -> Iterator[str]:
    """Where the standard library and the shared libraries of this interpreter are.

    Not its whole prefix, which is somebody's home directory where Python was built with `--prefix=$HOME`.
    """
    for name in ("lib", sys.platlibdir):
        directory = Path(sys.base_prefix, name)
        if directory.is_dir():
            yield str(directory)


def _installed() -> Iterator[Path]:
    """Where packages are installed to, in the prefix of this interpreter."""
    version = sysconfig.get_python_version()
    for name in ("lib", sys.platlibdir):
        for packages in ("site-packages", "dist-packages"):
            yield Path(sys.base_prefix, name, f"python{version}", packages)
    if sys.base_prefix == "/usr":
        # Debian's, for any version.
        yield Path("/usr/lib/python3/dist-packages")


def _outside_usr(paths: list[str]) -> list[str]:
    """Without what `/usr` brings along; `/usr/local` is not brought along."""
    return sorted({path for path in paths if not path.startswith("/usr/") or path.startswith("/usr/local/")})

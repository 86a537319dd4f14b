"""What runs as PID 1 of a sandbox, and how it gets there: as the first thing that comes through its stdin.

So there is no file of ours inside to find, to copy into images, or to change, and each backend needs one plain command.
"""

from __future__ import annotations

import importlib.util
import marshal
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ferrum.sandbox import wire
from ferrum.sandbox.runtimes import Runtime, basic

#: Compiled code is for one version of Python only: another one, in a container's image, compiles the source.
#: It is up before it is complete: the host looks at it from outside meanwhile.
_BOOT = f"""\
import sys
from marshal import loads
from posix import read, write
from _frozen_importlib_external import MAGIC_NUMBER
write(1, {wire.frame(wire.UP)!r})
def take(size):
    data = b""
    while len(data) < size:
        more = read(0, size - len(data))
        if not more:
            raise SystemExit
        data += more
    return data
magic, modules = loads(take(int.from_bytes(take(4), "big")))
for name, code, source in modules:
    module = type(sys)(name)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
    exec(loads(code) if magic == MAGIC_NUMBER else compile(source, name, "exec"), module.__dict__)
module.main()()
"""

#: In the order in which they are made; the packages are empty inside.
_MODULES = ("ferrum", "ferrum.sandbox", "ferrum.sandbox.wire", "ferrum.sandbox.init")
_HERE = Path(__file__).parent


def command(runtime: Runtime) -> list[str]:
    """The command line of PID 1. Nothing that is told to it, and no file of the job, changes what it imports."""
    return [runtime.interpreter, "-I", "-S", "-c", _BOOT]


@cache
def program(runtime: Runtime) -> bytes:
    """What PID 1 has to be sent first."""
    return packed(sources(), with_sources=runtime.interpreter != basic().interpreter)


def sources() -> dict[str, str]:
    """The modules that PID 1 is made of, by name."""
    files = {name: _HERE / f"{name.rpartition('.')[2]}.py" for name in _MODULES}
    return {name: file.read_text(encoding="utf-8") if file.exists() else "" for name, file in files.items()}


def packed(modules: Mapping[str, str], *, with_sources: bool) -> bytes:
    """Modules as PID 1 wants to be sent them. What is compiled here is of use only to the same version of Python."""
    compiled = [
        (
            name,
            marshal.dumps(compile(source, name, "exec", dont_inherit=True, optimize=2)),
            source if with_sources else "",
        )
        for name, source in modules.items()
    ]
    # Version 2 of the format is read by every Python 3.
    body = marshal.dumps((importlib.util.MAGIC_NUMBER, compiled), 2)
    return len(body).to_bytes(4, "big") + body

"""An MCP server that runs code in sandboxes: `python -m ferrum.mcp.servers.sandbox`.

An agent gets it as the tools `run_python` and `run_shell`. Each call is one sandbox, made for it and ended with it: no
network, nothing of this machine but an interpreter, and nothing stays. What one may use is said by the server's own
arguments; who calls can only ask for less.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, JsonValue, ValidationError

from ferrum.errors import FerrumError
from ferrum.governance.acts import CodeReply, CodeRun, InputFile
from ferrum.sandbox.here import sandboxes
from ferrum.sandbox.runs import Sandboxes
from ferrum.settings import settings

#: The most of each stream, and of all text files together, that one call gives back, in characters: a model reads it.
_MOST_SAID = 32 * 2**10
_MOST_TEXT = 256 * 2**10
_MIB = 2**20


class Ran(BaseModel):
    """What became of the code."""

    #: `ok` where it exited with 0, else `error`, `timeout`, `memory`, `output`, `disk` or `killed`.
    reason: str
    #: One sentence about it, where it is not `ok`.
    detail: str
    exit_code: int | None
    signal: str | None
    stdout: str
    stderr: str
    #: The JSON in `output.json`, if it wrote that.
    output: JsonValue
    #: The text files that it gave back, by path.
    files: dict[str, str]
    #: What there was more of than is given here.
    cut: list[str]
    seconds: float


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one call may use."""

    runtime: str = "python-basic"
    #: Seconds.
    timeout: float = 30.0
    #: MiB.
    memory: int = 256
    disk: int = 64
    cpus: float = 1.0
    processes: int = 32


def server(limits: Limits) -> MCPServer:
    """The server for one set of limits."""
    tools = _Tools(limits)
    app = MCPServer("ferrum-sandbox", instructions=_about(limits), lifespan=tools.life, log_level="WARNING")
    # Whatever code does, nothing of it is left: so a call may be made again.
    harmless = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)
    for tool in (tools.run_python, tools.run_shell):
        app.add_tool(tool, annotations=harmless)
    return app


def _about(limits: Limits) -> str:
    return (
        f"Runs code in sandboxes with the runtime {limits.runtime}: no network, {limits.memory} MiB of memory, "
        f"{limits.disk} MiB of files, {limits.timeout:g} seconds. Nothing stays from one call to the next."
    )


class _Tools:
    """What the server offers; a tool's description is its docstring."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sandboxes: Sandboxes

    @asynccontextmanager
    async def life(self, _: MCPServer) -> AsyncIterator[None]:
        self._sandboxes = sandboxes(settings())
        try:
            yield
        finally:
            await self._sandboxes.aclose()

    async def run_python(
        self,
        code: str,
        files: dict[str, str] | None = None,
        outputs: list[str] | None = None,
        timeout: float | None = None,
        memory: int | None = None,
    ) -> Ran:
        """Run a Python program in a sandbox of its own and return what it printed and left.

        `files` are texts that lie in its working directory, by path. `outputs` are the paths of text files that it
        gives back, where `*`, `?` and `**` stand for more. Print a result, or write it as JSON to `output.json`. There
        is no network, and nothing stays for the next call. `timeout` (seconds) and `memory` (MiB) can only be less
        than what the server allows.
        """
        return await self._run("python", code, files=files or {}, outputs=outputs or [], timeout=timeout, memory=memory)

    async def run_shell(
        self,
        script: str,
        files: dict[str, str] | None = None,
        outputs: list[str] | None = None,
        timeout: float | None = None,
        memory: int | None = None,
    ) -> Ran:
        """Run a shell script in a sandbox of its own and return what it printed and left.

        The programs are those of a small Linux system. `files` are texts that lie in its working directory, by path.
        `outputs` are the paths of text files that it gives back, where `*`, `?` and `**` stand for more. There is no
        network, and nothing stays for the next call. `timeout` (seconds) and `memory` (MiB) can only be less than what
        the server allows.
        """
        return await self._run(
            "shell", script, files=files or {}, outputs=outputs or [], timeout=timeout, memory=memory
        )

    async def _run(
        self,
        language: Literal["python", "shell"],
        code: str,
        *,
        files: Mapping[str, str],
        outputs: list[str],
        timeout: float | None,
        memory: int | None,
    ) -> Ran:
        most = self._limits
        try:
            act = CodeRun(
                runtime=most.runtime,
                language=language,
                code=code,
                files={path: InputFile(text=text) for path, text in files.items()},
                outputs=tuple(outputs),
                timeout_s=_less(timeout, most.timeout),
                memory=int(_less(memory, most.memory)) * _MIB,
                disk=most.disk * _MIB,
                cpus=most.cpus,
                processes=most.processes,
            )
            contents = {path: text.encode(errors="replace") for path, text in files.items()}
            reply = await self._sandboxes.run(act, contents, lambda stream, text: None)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise ToolError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except FerrumError as error:
            raise ToolError(str(error)) from error
        return _ran(reply)


def _less(asked: float | None, most: float) -> float:
    return most if asked is None else min(asked, most)


def _ran(reply: CodeReply) -> Ran:
    cut = list(reply.cut)
    files: dict[str, str] = {}
    room = _MOST_TEXT
    for path, data in sorted(reply.files.items()):
        try:
            text = data.decode()
        except UnicodeDecodeError:
            cut.append(f"{path}: it is not text, {len(data)} bytes")
            continue
        if len(text) > room:
            cut.append(f"{path}: there is too much text, {len(data)} bytes")
            continue
        files[path] = text
        room -= len(text)
    for name, said in (("stdout", reply.stdout), ("stderr", reply.stderr)):
        if len(said) > _MOST_SAID and name not in cut:
            cut.append(name)
    return Ran(
        reason=reply.reason.value,
        detail=reply.detail,
        exit_code=reply.exit_code,
        signal=reply.signal,
        stdout=_shortened(reply.stdout),
        stderr=_shortened(reply.stderr),
        output=reply.output,
        files=files,
        cut=cut,
        seconds=round(reply.wall_s, 3),
    )


def _shortened(said: str) -> str:
    """The beginning and the end: an error comes last."""
    if len(said) <= _MOST_SAID:
        return said
    half = _MOST_SAID // 2
    return f"{said[:half]}\n… {len(said) - 2 * half} characters are left out …\n{said[-half:]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ferrum.mcp.servers.sandbox", description="Runs code in sandboxes, each call in one of its own."
    )
    most = Limits()
    parser.add_argument("--runtime", default=most.runtime, help="what the code finds there; %(default)s")
    for name, kind, what in (
        ("timeout", float, "seconds"),
        ("memory", int, "MiB of memory"),
        ("disk", int, "MiB of files"),
        ("cpus", float, "cores, also a part of one"),
        ("processes", int, "processes and threads"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(most, name), help=f"at most, {what}; %(default)s")
    given = Limits(**vars(parser.parse_args()))
    for name in ("timeout", "memory", "disk", "cpus", "processes"):
        if getattr(given, name) <= 0:
            parser.error(f"--{name} has to be more than 0")
    server(given).run("stdio")


if __name__ == "__main__":
    main()

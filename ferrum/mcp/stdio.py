"""A server's process and its pipes, as a transport of the MCP SDK.

The SDK has one of its own. That one hands HOME, USER and SHELL to every server, and its stderr is ours; here a
server gets what its spec says, and what it writes to stderr is kept for the error that will want it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

from ferrum.local import here_last
from ferrum.mcp.specs import ServerSpec
from ferrum.settings import redact

#: How long a server may take to leave after its stdin closed, and again after SIGTERM, in seconds.
_GRACE = 2.0
#: A server that writes more than this without a line break is no MCP server, in bytes.
_LONGEST_MESSAGE = 64 * 2**20
_CHUNK = 64 * 2**10
_HERE_LAST = Path(here_last.__file__)
_POLL = 0.01

_Streams = tuple[MemoryObjectReceiveStream[SessionMessage | Exception], MemoryObjectSendStream[SessionMessage]]


class Wire:
    """One server process; entered and left by one task, for one session."""

    def __init__(self, spec: ServerSpec, ended: Callable[[], None], heard: logging.Logger) -> None:
        self._spec = spec
        self._ended = ended
        self._heard = heard
        self._said: deque[str] = deque(maxlen=5)
        self._over = False
        #: How many messages went into the server's stdin, or were about to.
        self.written = 0
        #: The server does not read: a message has not gone into its stdin yet.
        self.stuck = False

    async def __aenter__(self) -> _Streams:
        env = {"PATH": os.environ.get("PATH", os.defpath), **self._spec.env}
        self._process = await asyncio.create_subprocess_exec(
            *_command(self._spec, env["PATH"]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
            cwd=self._spec.cwd,
            start_new_session=True,
        )
        self._inbound, receives = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        sends, self._outbound = anyio.create_memory_object_stream[SessionMessage](0)
        self._ends = (self._inbound, receives, sends, self._outbound)
        self._listening = asyncio.create_task(self._listen())
        self._pumps = [asyncio.create_task(self._read()), asyncio.create_task(self._write()), self._listening]
        return receives, sends

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        # Whoever waits to send something learns now that it will not be sent.
        self._outbound.close()
        try:
            await self._stop()
        finally:
            self._signal(signal.SIGKILL)
            for pump in self._pumps:
                pump.cancel()
            for end in self._ends:
                end.close()
            # A grandchild may hold the pipes open for ever; asyncio has no public way to let go of them.
            getattr(self._process, "_transport").close()  # noqa: B009
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def last_words(self) -> str:
        """How the process ended and what it last wrote to stderr, as the end of a sentence."""
        status = getattr(getattr(self, "_process", None), "returncode", None)
        how = "" if status is None else f"; exit status {status}" if status >= 0 else f"; {_signal_name(-status)}"
        said = " | ".join(self._said)
        return f"{how}; it last wrote: {said}" if said else how

    async def _stop(self) -> None:
        """Close stdin, wait, ask, kill: the order that the MCP specification gives."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.close()
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if await self._exited():
                break
            self._signal(sign)
        await self._exited()
        await asyncio.wait({self._listening}, timeout=0.2)

    async def _exited(self) -> bool:
        # Not `process.wait()`: that also waits for the pipes, which a grandchild may hold.
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
                while self._process.returncode is None:  # noqa: ASYNC110
                    await asyncio.sleep(_POLL)
        return self._process.returncode is not None

    def _signal(self, sign: signal.Signals) -> None:
        """Signal the server and its children, while the process id is sure to be its own."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, sign)

    def _end(self) -> None:
        """From here on nothing is written, so that `written` can be trusted."""
        self._over = True
        self._ended()

    async def _read(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        try:
            async for line in _lines(stdout, _LONGEST_MESSAGE):
                await self._inbound.send(self._message(line))
        except _TooLong:
            self._note(f"more than {_LONGEST_MESSAGE} bytes on stdout without a line break")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        self._end()
        self._inbound.close()
        # Read on, or a server that still writes cannot leave.
        while await stdout.read(_CHUNK):
            pass

    def _message(self, line: bytes) -> SessionMessage | Exception:
        try:
            return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
        except ValueError as error:
            self._note(f"not MCP on stdout: {line[:2000].decode(errors='replace')}")
            return error

    async def _write(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for message in self._outbound:
                if self._over:
                    break
                self.written += 1
                self.stuck = True
                stdin.write(message.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
                await stdin.drain()
                self.stuck = False
        self._end()
        self._inbound.close()

    async def _listen(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        try:
            async for line in _lines(stderr, _CHUNK):
                self._note(line.decode(errors="replace").rstrip())
        except _TooLong:
            while await stderr.read(_CHUNK):
                pass

    def _note(self, line: str) -> None:
        if line:
            # Before it is cut, or half of a secret would be left.
            line = redact(line)[:300]
            self._said.append(line)
            self._heard.debug("%s", line)


class _TooLong(Exception):
    """A line that does not end."""


async def _lines(stream: asyncio.StreamReader, longest: int) -> AsyncIterator[bytes]:
    """The lines of a stream, the last one too where it does not end in a line break."""
    parts: list[bytes] = []
    size = 0
    while chunk := await stream.read(_CHUNK):
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        size += len(first)
        for following in rest:
            yield b"".join(parts)
            parts, size = [following], len(following)
        if size > longest:
            raise _TooLong
    if size:
        yield b"".join(parts)


def _command(spec: ServerSpec, path: str) -> list[str]:
    """The program of a spec and its arguments; see `ServerSpec.command`.

    What `python -m` runs is looked for in the working directory last: there may be a stranger's `json.py`.
    """
    program = _program(spec.command, path)
    if program == sys.executable and spec.args[:1] == ("-m",):
        return [program, "-P", str(_HERE_LAST), *spec.args[1:]]
    return [program, *spec.args]


def _program(command: str, path: str) -> str:
    if command in ("python", "python3"):
        return sys.executable
    if os.sep in command:
        return command
    beside = str(Path(sys.executable).parent)
    return shutil.which(command, path=os.pathsep.join((path, beside))) or command


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

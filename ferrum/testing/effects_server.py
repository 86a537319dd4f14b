"""An MCP server whose effects can be counted: `python -m ferrum.testing.effects_server --log FILE`.

Each `append` leaves one line in the log, `{idempotency key}⇥{text}`, in one write, so that a test that kills workers
can say how often a step had its effect and under which key.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import JsonValue

from ferrum.mcp.specs import IDEMPOTENCY_KEY

_READ_ONLY = ToolAnnotations(read_only_hint=True)


class _Log:
    """A file that is only ever added to, line by line."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, key: str, text: str) -> None:
        if "\n" in text:
            raise ToolError("the text must be one line: a line is what the log counts")
        os.write(self._fd, f"{key}\t{text}\n".encode())


def server(log: Path) -> MCPServer:
    """The server, with its effects going to `log`."""
    app = MCPServer("ferrum-effects", log_level="WARNING")
    effects = _Log(log)

    @app.tool()
    async def append(text: str, ctx: Context, delay_s: float = 0, linger_s: float = 0) -> dict[str, str]:
        """Add one line to the log after `delay_s`, and answer `linger_s` after that."""
        await asyncio.sleep(delay_s)
        effects.add(_key(ctx), text)
        await asyncio.sleep(linger_s)
        return {"written": text}

    @app.tool(annotations=_READ_ONLY)
    async def sleep(seconds: float) -> dict[str, float]:
        """Answer after so many seconds."""
        await asyncio.sleep(seconds)
        return {"slept": seconds}

    @app.tool()
    async def fail(message: str) -> None:
        """Fail with this message."""
        raise ToolError(message)

    @app.tool()
    async def die(ctx: Context, text: str | None = None) -> None:
        """End the server without an answer, after adding `text` to the log where it is given."""
        if text is not None:
            effects.add(_key(ctx), text)
        os._exit(1)

    @app.tool(annotations=_READ_ONLY)
    async def environment() -> list[str]:
        """The names of the server's environment variables."""
        return sorted(os.environ)

    @app.tool(annotations=_READ_ONLY)
    async def echo(value: JsonValue) -> JsonValue:
        """Return what was given."""
        return value

    return app


def _key(ctx: Context) -> str:
    return str((ctx.request_context.meta or {}).get(IDEMPOTENCY_KEY, ""))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ferrum.testing.effects_server", description="Countable effects.")
    parser.add_argument("--log", type=Path, required=True, help="the file that effects are added to")
    server(parser.parse_args().log).run("stdio")


if __name__ == "__main__":
    main()

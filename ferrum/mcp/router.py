"""The way to every tool: finds the server, keeps its session, calls."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from ferrum.errors import ToolError, did_you_mean
from ferrum.governance.acts import ToolCall, ToolReply
from ferrum.mcp.specs import ServerSpec, ToolSpec
from ferrum.settings import hide

if TYPE_CHECKING:
    from ferrum.mcp.session import Session

_T = TypeVar("_T")


class Router:
    """One kept session per server, for one event loop.

    A server is started when it is first needed, once however many ask, and again when it has died. Cancelling a
    call tells the server so and leaves the session good for the others.
    """

    def __init__(self, servers: Mapping[str, ServerSpec]) -> None:
        self._servers = dict(servers)
        hide(secret for spec in servers.values() for secret in spec.secrets)
        self._sessions: dict[str, asyncio.Task[Session]] = {}
        self._closed = False

    async def call(self, call: ToolCall, idempotency_key: str) -> ToolReply:
        """Call a tool and return what it returned; the server finds the key in the request's `_meta`.

        Raises `ToolError`, free of secrets. A call that was lost with its server is sent once more where that is
        safe: it never left, or the tool is marked read-only or idempotent. Else `retry` is false and the message says
        that the effect may have happened: to call again is then the author's decision.
        """
        output = await self._use(call.server, lambda session: session.call(call.tool, call.arguments, idempotency_key))
        return ToolReply(output=output)

    async def tools(self, server: str) -> tuple[ToolSpec, ...]:
        """The tools of a server, as it describes them now."""
        return await self._use(server, lambda session: session.tools())

    async def aclose(self) -> None:
        """End every server and wait until all are gone; calls after this fail."""
        self._closed = True
        openings = list(self._sessions.values())
        for opening in openings:
            opening.cancel()
        for outcome in await asyncio.gather(*openings, return_exceptions=True):
            if not isinstance(outcome, BaseException):
                await outcome.close()

    async def _use(self, server: str, act: Callable[[Session], Awaitable[_T]]) -> _T:
        for again in (False, True):
            session = await self._session(server)
            from ferrum.mcp.session import ConnectionLost

            try:
                return await act(session)
            except ConnectionLost as lost:
                if again or not lost.retry:
                    raise
        raise AssertionError("unreachable")

    async def _session(self, server: str) -> Session:
        spec = self._spec(server)
        opening = self._sessions.get(server)
        if opening is None or _is_of_no_use(opening):
            opening = self._sessions[server] = asyncio.create_task(_open(server, spec, opening))
        # Shielded: others may wait for the same start, and a caller that gave up must not take it from them.
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            if opening.cancelled() and self._closed:
                raise _stopping() from None
            raise

    def _spec(self, server: str) -> ServerSpec:
        if self._closed:
            raise _stopping()
        if server not in self._servers:
            what_to_do = did_you_mean(server, self._servers) or "; name it in ferrum.servers.yaml"
            raise ToolError(f"there is no MCP server {server!r}{what_to_do}")
        return self._servers[server]


def _stopping() -> ToolError:
    return ToolError("the MCP router is closed: this process is stopping", retry=True)


def _is_of_no_use(opening: asyncio.Task[Session]) -> bool:
    if not opening.done():
        return False
    return opening.cancelled() or opening.exception() is not None or not opening.result().alive


async def _open(server: str, spec: ServerSpec, last: asyncio.Task[Session] | None) -> Session:
    if last and not last.cancelled() and not last.exception():
        await last.result().close()
    # In a thread: the import takes half a second, in which the loop has other calls to serve.
    await asyncio.to_thread(importlib.import_module, "ferrum.mcp.session")
    from ferrum.mcp.session import Session

    return await Session.open(server, spec)

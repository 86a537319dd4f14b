"""Those who carry out acts: models through litellm, tools over MCP. Only the executor calls them, after a decision."""

from __future__ import annotations

import os

from ferrum.governance.acts import Act, ModelCall, ModelReply, ToolCall, ToolReply
from ferrum.mcp.router import Router
from ferrum.mcp.specs import load_servers
from ferrum.models import calls, prices
from ferrum.results import Usage
from ferrum.settings import Settings


class LiveActors:
    """Real models and real tools. Its coroutines run on one event loop."""

    def __init__(self, settings: Settings) -> None:
        """Raises `SettingsError` for a servers file that cannot be read."""
        self._router = Router(load_servers(settings, os.environ))

    def warm(self) -> None:
        calls.warm()

    def estimate(self, act: Act) -> Usage:
        return prices.estimate(act) if isinstance(act, ModelCall) else Usage(tool_calls=1)

    async def model(self, call: ModelCall) -> ModelReply:
        return await calls.complete(call)

    async def tool(self, call: ToolCall, idempotency_key: str) -> ToolReply:
        return await self._router.call(call, idempotency_key)

    async def aclose(self) -> None:
        """End every session and connection."""
        await self._router.aclose()
        await calls.aclose()

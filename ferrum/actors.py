"""Those who carry out acts: models through litellm, tools over MCP. Only the executor calls them, after a decision."""

from __future__ import annotations

import os
from typing import Any, cast

from ferrum.governance.acts import Act, By, ModelCall, R, Reply, ToolCall
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

    def estimate(self, act: Act[Any]) -> Usage:
        return prices.estimate(act) if isinstance(act, ModelCall) else act.counts

    async def carry_out(self, act: Act[R], by: By) -> R:
        match act:
            case ModelCall():
                reply: Reply = await calls.complete(act)
            case ToolCall():
                reply = await self._router.call(act, by.idempotency_key)
            case _:
                raise NotImplementedError(f"nobody carries out {act.kind} acts")
        return cast("R", reply)

    async def aclose(self) -> None:
        """End every session and connection."""
        await self._router.aclose()
        await calls.aclose()

"""Those who carry out acts: models through litellm, tools over MCP, code in sandboxes.

Only the executor calls them, after a decision.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any, cast

from ferrum.artifacts import Ref, process_artifacts
from ferrum.governance.acts import Act, By, CodeRun, InputFile, ModelCall, R, Reply, ToolCall
from ferrum.mcp.router import Router
from ferrum.mcp.specs import load_servers
from ferrum.models import calls, prices
from ferrum.results import Usage
from ferrum.sandbox.runs import Sandboxes
from ferrum.settings import Settings

log = logging.getLogger(__name__)


class LiveActors:
    """Real models, tools, sandboxes. Its coroutines run on one event loop."""

    def __init__(self, settings: Settings) -> None:
        """Raises `SettingsError` for a servers file that cannot be read."""
        self._router = Router(load_servers(settings, os.environ))
        self._sandboxes = Sandboxes()

    async def warm(self, kinds: frozenset[str]) -> None:
        if "model" in kinds:
            # Not waited for, also when the process ends.
            threading.Thread(target=calls.warm, name="ferrum-warm", daemon=True).start()
        if "sandbox" in kinds:
            for probe in await self._sandboxes.probe():
                log.info("%s", probe)

    def estimate(self, act: Act[Any]) -> Usage:
        return prices.estimate(act) if isinstance(act, ModelCall) else act.counts

    async def carry_out(self, act: Act[R], by: By) -> R:
        match act:
            case ModelCall():
                reply: Reply = await calls.complete(act)
            case ToolCall():
                reply = await self._router.call(act, by.idempotency_key)
            case CodeRun():
                reply = await self._sandboxes.run(act, await asyncio.to_thread(_contents, act.files), by.say)
            case _:
                raise NotImplementedError(f"nobody carries out {act.kind} acts")
        return cast("R", reply)

    async def aclose(self) -> None:
        """End every session, connection and sandbox."""
        await self._sandboxes.aclose()
        await self._router.aclose()
        await calls.aclose()


def _contents(files: Mapping[str, InputFile]) -> dict[str, bytes]:
    return {path: _content(file) for path, file in files.items()}


def _content(file: InputFile) -> bytes:
    if file.artifact is None:
        # A lone surrogate, which JSON can say and UTF-8 cannot, becomes a question mark.
        return (file.text or "").encode(errors="replace")
    return process_artifacts().get(Ref(digest=file.artifact, size=0, media_type=""))

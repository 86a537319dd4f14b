"""Those who carry out acts: models through litellm, tools over MCP, code in sandboxes.

Only the executor calls them, after a decision.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from ferrum.artifacts import Ref, process_artifacts
from ferrum.governance.acts import (
    Act,
    By,
    CodeRun,
    Embedding,
    Ingest,
    InputFile,
    ModelCall,
    R,
    Reply,
    Search,
    ToolCall,
)
from ferrum.mcp.router import Router
from ferrum.mcp.specs import load_servers
from ferrum.models import calls, embeddings, prices
from ferrum.results import Usage
from ferrum.retrieval import embedders
from ferrum.retrieval.indexes import Embed, Indexes
from ferrum.settings import Settings

if TYPE_CHECKING:
    from ferrum.sandbox import Sandboxes

log = logging.getLogger(__name__)


class LiveActors:
    """Real models, tools, sandboxes. Its coroutines run on one event loop."""

    def __init__(self, settings: Settings) -> None:
        """Raises `SettingsError` for a servers file that cannot be read."""
        self._router = Router(load_servers(settings, os.environ))
        self._settings = settings

    async def warm(self, kinds: frozenset[str]) -> None:
        if "model" in kinds:
            # Not waited for, also when the process ends.
            threading.Thread(target=calls.warm, name="ferrum-warm", daemon=True).start()
        if "sandbox" in kinds:
            for probe in await self._sandboxes.probe():
                log.info("%s", probe)

    def estimate(self, act: Act[Any]) -> Usage:
        return prices.estimate(act) if isinstance(act, ModelCall | Embedding) else act.counts

    async def carry_out(self, act: Act[R], by: By) -> R:
        match act:
            case ModelCall():
                reply: Reply = await calls.complete(act)
            case ToolCall():
                reply = await self._router.call(act, by.idempotency_key)
            case CodeRun():
                reply = await self._sandboxes.run(act, await asyncio.to_thread(_contents, act.files), by.say)
            case Embedding():
                reply = await embeddings.embed(act)
            case Search():
                reply = await self._indexes.search(by.tenant, act, embed=_embedder(by))
            case Ingest():
                default = embedders.default(self._settings, os.environ)
                reply = await self._indexes.ingest(by.tenant, act, embed=_embedder(by), default=default)
            case _:
                raise NotImplementedError(f"nobody carries out {act.kind} acts")
        return cast("R", reply)

    @cached_property
    def _sandboxes(self) -> Sandboxes:
        # Here and not above: a worker that runs no code needs none of it.
        from ferrum.sandbox.here import sandboxes

        return sandboxes(self._settings)

    @cached_property
    def _indexes(self) -> Indexes:
        return Indexes.of(self._settings)

    async def aclose(self) -> None:
        """End every session, connection and sandbox."""
        if "_sandboxes" in vars(self):
            await self._sandboxes.aclose()
        await self._router.aclose()
        if "_indexes" in vars(self):
            await asyncio.to_thread(self._indexes.close)
        await calls.aclose()


def _embedder(by: By) -> Embed:
    """Asks a provider's model for vectors, which is an act of its own."""

    async def embed(model: str, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        return (await by.perform(Embedding(model=prices.resolve(model), texts=tuple(texts)))).vectors

    return embed


def _contents(files: Mapping[str, InputFile]) -> dict[str, bytes]:
    return {path: _content(file) for path, file in files.items()}


def _content(file: InputFile) -> bytes:
    if file.artifact is None:
        # A lone surrogate, which JSON can say and UTF-8 cannot, becomes a question mark.
        return (file.text or "").encode(errors="replace")
    return process_artifacts().get(Ref(digest=file.artifact, size=0, media_type=""))

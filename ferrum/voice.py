"""What an act says while it is carried out, on its way to those who watch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import groupby

#: How long pieces are gathered before they are told, in seconds: an event for each line would be many.
_GATHER_S = 0.1


class Voice:
    """Gathers pieces of text by stream and tells them in order, a few times a second, without anyone waiting for it."""

    def __init__(self, tell: Callable[[str, str], Awaitable[None]]) -> None:
        self._tell = tell
        self._pieces: list[tuple[str, str]] = []
        self._telling: asyncio.Task[None] | None = None
        self._order = asyncio.Lock()

    def say(self, stream: str, text: str) -> None:
        """Say this next, on the loop's thread."""
        self._pieces.append((stream, text))
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._later())

    async def aclose(self) -> None:
        """Tell what is left; what is being told when this is cancelled may be told or not."""
        if self._telling is not None:
            self._telling.cancel()
            with suppress(asyncio.CancelledError):
                await self._telling
        await self._flush()

    async def _later(self) -> None:
        while self._pieces:
            await asyncio.sleep(_GATHER_S)
            # Not cut off in the middle: nobody would know whether the piece was told.
            await asyncio.shield(self._flush())

    async def _flush(self) -> None:
        async with self._order:
            pieces, self._pieces = self._pieces, []
            for stream, some in groupby(pieces, key=lambda piece: piece[0]):
                await self._tell(stream, "".join(text for _, text in some))

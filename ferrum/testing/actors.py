"""Actors that do as a test says, and keep what they were asked."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from pydantic import JsonValue

from ferrum.governance.acts import Act, By, ModelCall, ModelReply, R, Reply, ToolCall, ToolReply
from ferrum.results import Usage

#: What comes of an act: what a model or a tool returns, the whole reply, an error that is raised, or a coroutine
#: function that is given the act.
Say = JsonValue | Reply | Exception | Callable[[Act[Any]], Awaitable[JsonValue | Reply]]


@dataclass(frozen=True, slots=True)
class Done:
    """One act that was carried out."""

    act: Act[Any]
    #: Empty for a model call.
    idempotency_key: str = ""


class ScriptedActors:
    """Each act gets what was said next for its target, and the last of it from then on.

    actors = ScriptedActors().on("git.log", ToolError("busy", retry=True), ["a commit"]).on("test/model", "hello")
    """

    def __init__(self, *, costs: Usage | None = None) -> None:
        """`costs`: what each model call uses, and what is expected of it before."""
        self.costs = costs or Usage(input_tokens=10, output_tokens=5, model_calls=1)
        #: In the order in which they began.
        self.done: list[Done] = []
        self._said: defaultdict[str, deque[Say]] = defaultdict(deque)

    def on(self, target: str, *what: Say) -> ScriptedActors:
        """Say what comes of acts on this target (`provider/model` or `server.tool`), one after the other."""
        self._said[target].extend(what)
        return self

    async def warm(self, kinds: frozenset[str]) -> None:
        """Nothing to make ready."""

    def estimate(self, act: Act[Any]) -> Usage:
        return self.costs if isinstance(act, ModelCall) else act.counts

    async def carry_out(self, act: Act[R], by: By) -> R:
        self.done.append(Done(act, "" if isinstance(act, ModelCall) else by.idempotency_key))
        said = await self._next(act)
        if isinstance(act, ModelCall):
            said = ModelReply(text=str(said), model=act.model, finish_reason="stop", usage=self.costs)
        elif isinstance(act, ToolCall):
            said = ToolReply(output=said)
        return cast("R", said)

    async def _next(self, act: Act[Any]) -> JsonValue | Reply:
        said = self._said[act.target]
        if not said:
            raise LookupError(f"nothing was said about {act.target!r}")
        what = said.popleft() if len(said) > 1 else said[0]
        if isinstance(what, Exception):
            raise what
        return await what(act) if callable(what) else what

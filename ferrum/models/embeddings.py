"""One request to one model to embed texts, through litellm."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from ferrum.errors import ModelError
from ferrum.governance.acts import Embedding, EmbeddingReply
from ferrum.models import calls, prices

#: Before each further try of `direct`, unless the provider says how long.
_WAITS_S: Final = (1.0, 4.0, 16.0)
_LONGEST_WAIT_S: Final = 60.0


async def embed(call: Embedding) -> EmbeddingReply:
    """Make one request and return a vector for each text, its cost by the price table.

    How many texts a request may have is the provider's to say; 64 go everywhere. Nothing is tried again and nothing
    times out here. Raises `ModelError`, whose `retry` says whether the same call might work later.
    """
    litellm = await calls.loaded()
    import openai

    try:
        calls.check_route(litellm, call.model)
        # Else litellm asks OpenAI for base64, which not every server of one's own speaks.
        response = await litellm.aembedding(
            model=call.model, input=list(call.texts), encoding_format="float", drop_params=True, **calls.ONCE
        )
    except openai.OpenAIError as error:
        raise calls.translated(call.model, error) from error
    read, doubts = _tokens(call, response)
    return EmbeddingReply(
        vectors=_vectors(call, response.data or ()),
        model=response.model or call.model,
        usage=prices.usage(call.model, read, 0),
        doubts=doubts,
    )


@asynccontextmanager
async def direct() -> AsyncIterator[Callable[[str, Sequence[str]], Awaitable[Sequence[Sequence[float]]]]]:
    """What asks a model for vectors on behalf of the person at the keyboard: nobody decides, no budget is charged.

    What a workflow does goes through `Attempt.perform`. What may pass is tried again a few times.
    """

    async def ask(model: str, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        call = Embedding(model=prices.resolve(model), texts=tuple(texts))
        for wait_s in _WAITS_S:
            try:
                return (await embed(call)).vectors
            except ModelError as error:
                if not error.retry:
                    raise
                await asyncio.sleep(
                    min(wait_s if error.retry_after_s is None else error.retry_after_s, _LONGEST_WAIT_S)
                )
        return (await embed(call)).vectors

    try:
        yield ask
    finally:
        await calls.aclose()


def _vectors(call: Embedding, data: Any) -> tuple[tuple[float, ...], ...]:
    # The order is that of the texts, by what each says of itself.
    by_place = {item["index"]: item["embedding"] for item in data}
    try:
        vectors = tuple(tuple(map(float, by_place[place])) for place in range(len(call.texts)))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"model {call.model!r} did not answer with a vector for each of {len(call.texts)} texts: try again, and "
            "check that it is a model for embeddings",
            retry=True,
        ) from error
    if any(not math.isfinite(number) for vector in vectors for number in vector):
        raise ModelError(f"model {call.model!r} answered with a vector that is not of numbers: try again", retry=True)
    return vectors


def _tokens(call: Embedding, response: Any) -> tuple[int, tuple[str, ...]]:
    counted = getattr(response.usage, "prompt_tokens", None) if getattr(response, "usage", None) else None
    # Some servers of one's own do not count; an estimate is nearer to the truth than 0.
    estimated = prices.estimate(call).input_tokens
    return prices.believed(call.model, "input", counted, estimated) if counted else (estimated, ())

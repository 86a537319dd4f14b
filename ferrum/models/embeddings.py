"""One request to one model to embed texts, through litellm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ferrum.errors import ModelError
from ferrum.governance.acts import Embedding, EmbeddingReply
from ferrum.models import calls, prices


async def embed(call: Embedding) -> EmbeddingReply:
    """Make one request and return a vector for each text, its cost by the price table.

    How many texts a request may have is the provider's to say; 64 go everywhere. Nothing is tried again and nothing
    times out here. Raises `ModelError`, whose `retry` says whether the same call might work later.
    """
    litellm = await calls.loaded()
    import openai

    try:
        # Else litellm asks OpenAI for base64, which not every server of one's own speaks.
        response = await litellm.aembedding(
            model=call.model, input=list(call.texts), encoding_format="float", drop_params=True, **calls.ONCE
        )
    except openai.OpenAIError as error:
        raise calls.translated(call.model, error) from error
    return EmbeddingReply(
        vectors=_vectors(call, response.data or ()),
        model=response.model or call.model,
        usage=prices.usage(call.model, _tokens(call, response), 0),
    )


async def vectors(model: str, texts: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """A vector for each text, asked for by the person at the keyboard: nobody decides, and no budget is charged.

    What a workflow does goes through `Attempt.perform`.
    """
    return (await embed(Embedding(model=model, texts=tuple(texts)))).vectors


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
        raise ModelError(
            f"model {call.model!r} answered with a vector that has no numbers in it: try again", retry=True
        )
    return vectors


def _tokens(call: Embedding, response: Any) -> int:
    counted = getattr(response.usage, "prompt_tokens", None) if getattr(response, "usage", None) else None
    # Some servers of one's own do not count; an estimate is nearer to the truth than 0.
    return counted or prices.estimate(call).input_tokens

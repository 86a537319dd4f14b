"""`type: retrieval`: what an index holds that is near to a question."""

from __future__ import annotations

import os
from typing import Final, Literal

from pydantic import Field, JsonValue

from ferrum.governance.acts import MOST_FOUND, Document, Search
from ferrum.models import prices
from ferrum.models.choice import default_model
from ferrum.retrieval import grading
from ferrum.settings import settings
from ferrum.steps import Attempt, Params, StepType
from ferrum.workflow import Retry

#: So many times as many as are wanted, if one search finds so many, are looked at where a model grades them.
_WIDER: Final = 3


class RetrievalParams(Params):
    index: str = Field(min_length=1, description="The index that is searched, one of the run's tenant.")
    query: str = Field(min_length=1, description="What is looked for, in words.")
    top_k: int = Field(5, ge=1, le=MOST_FOUND, description=f"At most so many documents, 1 to {MOST_FOUND}.")
    mode: Literal["hybrid", "vector", "text"] = Field(
        "hybrid", description="By words and by meaning together, or by one of both."
    )
    filter: dict[str, JsonValue] = Field(
        {}, description="Metadata that a document must have: for each name a value, or a list of which it is one."
    )
    min_score: float | None = Field(None, ge=0, le=1, description="Documents with a lower score are left out.")
    diversity: float | None = Field(
        None, ge=0, le=1, description="0: the nearest; towards 1: such as differ from each other."
    )
    rerank: bool | str = Field(
        False, description="Whether a model grades what was found, and which: `true`, or the name of one."
    )


class Retrieval(StepType[RetrievalParams]):
    """Its output is `{"documents": [{"text", "score", "source", "position", "metadata"}]}`, the best first."""

    name = "retrieval"
    params = RetrievalParams
    retry = Retry(max_attempts=3)
    timeout_s = 120.0
    foreign = True

    async def run(self, params: RetrievalParams, attempt: Attempt) -> JsonValue:
        search = Search.model_validate(params.model_dump(exclude={"rerank"}))
        if params.rerank is False:
            documents = (await attempt.perform(search)).documents
        else:
            documents = await _reranked(search, params.rerank, attempt)
        return {"documents": [document.model_dump(mode="json") for document in documents]}


async def _reranked(search: Search, by: str | Literal[True], attempt: Attempt) -> tuple[Document, ...]:
    most = min(search.top_k * _WIDER, MOST_FOUND)
    wider = search.model_copy(update={"top_k": most, "min_score": None})
    found = (await attempt.perform(wider)).documents
    if not found:
        return ()
    model = default_model(settings(), os.environ) if by is True else by
    reply = await attempt.perform(grading.question(prices.resolve(model), search.query, found, attempt.marks))
    grades = grading.grades(reply.text, found)
    return grading.graded(found, grades, search.min_score or 0.0)[: search.top_k]

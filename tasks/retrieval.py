"""`type: retrieval`: what an index holds that is near to a question."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from ferrum.governance.acts import Search
from ferrum.steps import Attempt, Params, StepType
from ferrum.workflow import Retry


class RetrievalParams(Params):
    index: str = Field(min_length=1, description="The index that is searched, one of the run's tenant.")
    query: str = Field(min_length=1, description="What is looked for, in words.")
    top_k: int = Field(5, ge=1, le=100, description="At most so many documents.")
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
        found = await attempt.perform(Search.model_validate(params.model_dump(exclude={"rerank"})))
        return {"documents": [document.model_dump(mode="json") for document in found.documents]}

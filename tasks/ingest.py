"""`type: ingest`: documents for an index."""

from __future__ import annotations

from pydantic import Field, JsonValue

from ferrum.governance.acts import Ingest as IngestAct
from ferrum.governance.acts import NewDocument
from ferrum.steps import Attempt, Params, StepType
from ferrum.workflow import Retry


class IngestParams(Params):
    index: str = Field(
        min_length=1, description="The index, of the run's tenant; it is made where it is not there yet."
    )
    documents: list[NewDocument] = Field(
        description="Each with its `text`, its `source` (what it is called, and what it replaces) and `metadata`."
    )
    embedding: str | None = Field(
        None, description="What embeds, where the index is made: a model of a provider, `local`, `lexical` or `none`."
    )
    prune: bool = Field(
        False, description="Whether documents are removed that a step gave earlier and that are not among these."
    )


class Ingest(StepType[IngestParams]):
    """Its output counts what changed: `{"added", "updated", "unchanged", "removed", "embedded", "chunks", "left_out"}`.

    `left_out` lists the documents that could not be taken, each with its `source` and `why`.
    """

    name = "ingest"
    params = IngestParams
    retry = Retry(max_attempts=3)
    timeout_s = 600.0

    async def run(self, params: IngestParams, attempt: Attempt) -> JsonValue:
        reply = await attempt.perform(
            IngestAct(
                index=params.index,
                documents=tuple(params.documents),
                embedding=params.embedding,
                prune=params.prune,
            )
        )
        return reply.model_dump(mode="json", exclude={"usage"})

"""`type: approval`: a person says yes or no; until then the step holds no worker."""

from __future__ import annotations

from pydantic import Field, JsonValue

from ferrum.errors import StepError
from ferrum.steps import Attempt, Params, Park, StepType


class ApprovalParams(Params):
    message: str = Field(description="What the person is asked.")


class Approval(StepType[ApprovalParams]):
    """Its `timeout` is how long it waits: without an answer by then, it fails. Default: it waits for ever."""

    name = "approval"
    params = ApprovalParams
    passes_on = False
    waits = True

    def run(self, params: ApprovalParams, attempt: Attempt) -> JsonValue:
        verdict = attempt.verdict
        if verdict is None:
            raise Park("approval", params.message, wake_in_s=attempt.timeout_s)
        if verdict.expired:
            raise StepError("nobody decided in time")
        if not verdict.approved:
            raise StepError(f"rejected by {verdict.by or 'someone'}" + (f": {verdict.note}" if verdict.note else ""))
        return {"approved": True, "by": verdict.by, "note": verdict.note}

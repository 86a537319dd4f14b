"""`type: workflow`: another workflow as a step. Its run is a run like any other, inside of this one."""

from __future__ import annotations

from pydantic import Field, JsonValue, model_validator

from ferrum.steps import Attempt, Composed, Params, Park, StepType


class WorkflowParams(Params):
    workflow: dict[str, JsonValue] | None = Field(None, description="The workflow itself; `file` is put here.")
    name: str | None = Field(None, description="The name that it is registered under.")
    version: str | None = Field(None, description="Which of those that are registered; the newest by default.")
    input: dict[str, JsonValue] = Field(default_factory=dict, description="What its run is given.")
    budget: dict[str, JsonValue] | None = Field(
        None, description="What its run may use up, within what this run may: in place of its own `budget`."
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> WorkflowParams:
        if (self.workflow is None) == (self.name is None):
            raise ValueError("a sub-workflow is either a 'file' or 'workflow', or the 'name' of a registered one")
        if self.version is not None and self.name is None:
            raise ValueError("'version' goes with the 'name' of a registered workflow")
        return self


class SubWorkflow(StepType[WorkflowParams]):
    """Its output is the outputs of its run. Cancelling the run around it cancels it."""

    name = "workflow"
    params = WorkflowParams
    foreign = True
    passes_on = False
    composed = True

    def run(self, params: WorkflowParams, attempt: Attempt) -> JsonValue:
        whole: Composed = attempt  # type: ignore[assignment] # composed types are given one
        if isinstance(whole.memory, dict):
            done = whole.run_end(str(whole.memory["run"]))
            return done.or_raise(f"took longer than its timeout of {attempt.timeout_s} s")
        document = params.workflow
        if document is None:
            document = dict(whole.registered(str(params.name), params.version))
        run_id = whole.start_run(document, params.input, params.budget)
        raise Park("run", f"for run {run_id}", attempt.timeout_s, memory={"run": run_id}, awaited=run_id)

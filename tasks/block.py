"""`type: block`: steps inside a step, which are retried, timed out, repeated and undone together."""

from __future__ import annotations

from pydantic import Field, JsonValue

from ferrum.steps import Attempt, Composed, Inside, Params, StepType


class BlockParams(Params):
    output: JsonValue = Field(None, description="What it leaves, by expressions over the steps inside.")


class Block(StepType[BlockParams]):
    """Its output is its `output`; without one that of its last step, or those of its last steps by name."""

    name = "block"
    params = BlockParams
    passes_on = False
    composed = True

    def run(self, params: BlockParams, attempt: Attempt) -> JsonValue:
        whole: Composed = attempt  # type: ignore[assignment] # composed types are given one
        label = whole.own_label
        if whole.memory is None:
            count = len(whole.spec.steps)
            raise Inside(f"{count} steps", label=label, memory={"label": label}, wake_in_s=attempt.timeout_s)
        return whole.frame(label).or_raise(f"took longer than its timeout of {attempt.timeout_s} s")

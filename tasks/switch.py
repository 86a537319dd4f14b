"""`type: switch`: one of several branches, by a value."""

from __future__ import annotations

import json

from pydantic import Field, JsonValue

from ferrum.steps import Attempt, Composed, Inside, Params, Skip, StepType
from ferrum.workflow import labels


class SwitchParams(Params):
    value: JsonValue = Field(description="What the cases are compared with: as text, or the JSON of it.")


class Switch(StepType[SwitchParams]):
    """Its output is that of the branch; where no case is the value's and there is no default, it is skipped."""

    name = "switch"
    params = SwitchParams
    passes_on = False
    composed = True

    def run(self, params: SwitchParams, attempt: Attempt) -> JsonValue:
        whole: Composed = attempt  # type: ignore[assignment] # composed types are given one
        if isinstance(whole.memory, dict):
            done = whole.frame(str(whole.memory["label"]))
            return done.or_raise(f"took longer than its timeout of {attempt.timeout_s} s")
        text = params.value if isinstance(params.value, str) else json.dumps(params.value, ensure_ascii=False)
        label = labels(whole.spec.cases).get(text)
        if label is None and whole.spec.default is None:
            raise Skip(f"no case is {text!r:.100}, and there is no default")
        chosen = f"case {text!r}" if label else f"the default, no case is {text!r:.100}"
        label = label or "default"
        raise Inside(chosen, label=label, memory={"label": label}, wake_in_s=attempt.timeout_s)

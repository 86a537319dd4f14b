"""`repeat`: the step again and again, each round given the last one's output, until a condition is true."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from ferrum.errors import StepError
from ferrum.steps import Attempt, Composed, Inside, Params, StepType


class RepeatParams(Params):
    max: int
    on_max: Literal["fail", "pass"] = "fail"


class Repeat(StepType[RepeatParams]):
    """Its output is the last round's."""

    name = "repeat"
    params = RepeatParams
    passes_on = False
    written = False
    composed = True

    def run(self, params: RepeatParams, attempt: Attempt) -> JsonValue:
        whole: Composed = attempt  # type: ignore[assignment] # composed types are given one
        if not isinstance(whole.memory, dict):
            raise Inside("round 1", label="1", memory={"round": 1})
        number = int(str(whole.memory["round"]))
        done = whole.frame(str(number))
        output = done.or_raise("its round did not end")
        if whole.until(done, str(number)):
            return output
        if number == params.max:
            if params.on_max == "fail":
                raise StepError(f"its 'until' was still false after {number} rounds, the most it may have")
            return output
        raise Inside(f"round {number + 1}", label=str(number + 1), items=[output], memory={"round": number + 1})

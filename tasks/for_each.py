"""`for_each`: the step once for each item of a list that is known only at run time."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, JsonValue

from ferrum.errors import Denied, StepError
from ferrum.steps import Attempt, Composed, Done, Inside, Params, StepType

#: Items that are on their way at the same time where the author says nothing; it also bounds what one script begins.
WINDOW: Final = 1000
#: How many of them follow at once where it is not the author who bounds it.
CHUNK: Final = 100


class ForEachParams(Params):
    #: Called as the author wrote it, for the errors' sake.
    items: list[JsonValue] = Field(alias="for_each")
    max_parallel: int | None = None
    on_error: Literal["fail_fast", "collect"] = "fail_fast"


class ForEach(StepType[ForEachParams]):
    """Its output is the list of what the items came to, in their order."""

    name = "for_each"
    params = ForEachParams
    passes_on = False
    written = False
    composed = True

    def run(self, params: ForEachParams, attempt: Attempt) -> JsonValue:
        whole: Composed = attempt  # type: ignore[assignment] # composed types are given one
        count = len(params.items)
        if count == 0:
            return []
        if whole.memory is None:
            window = min(params.max_parallel or WINDOW, WINDOW)
            at_a_time = f", {window} at a time" if window < count else ""
            raise Inside(
                f"{count} items{at_a_time}",
                items=params.items,
                window=window,
                chunk=1 if params.max_parallel else CHUNK,
                fail_fast=params.on_error == "fail_fast",
                memory={"count": count},
            )
        ends = whole.frames(count)
        if params.on_error == "collect":
            return [_collected(index, done) for index, done in enumerate(ends)]
        outputs: list[JsonValue] = []
        unfinished = False
        for done in ends:
            if done.denied:
                raise Denied(done.denied)
            if done.error:
                raise StepError(done.error)
            unfinished |= not done.over
            outputs.append(done.output)
        if unfinished:
            # Only a failure ends the wait early, and it would have been found.
            raise StepError("an item did not end")
        return outputs


def _collected(index: int, done: Done) -> JsonValue:
    return {"error": done.error, "index": index} if done.error else done.output

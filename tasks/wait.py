"""`type: wait`: for a while, until a time, or for a signal from outside. It holds no worker."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field, JsonValue, field_validator, model_validator

from ferrum.errors import StepError
from ferrum.steps import Attempt, Params, Park, StepType
from ferrum.workflow import Duration


class WaitParams(Params):
    for_: Duration | None = Field(None, alias="for", description="How long.")
    until: str | None = Field(None, description='A time as ISO 8601 with its offset, "2026-12-24T18:00:00+01:00".')
    signal: str | None = Field(None, min_length=1, max_length=100, description="The name of a signal.")

    @field_validator("until")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        # With an expression in it, it is a time only at run time.
        if value is not None and "{{" not in value:
            _seconds(value)
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> WaitParams:
        given = [
            name for name in ("for", "until", "signal") if getattr(self, "for_" if name == "for" else name) is not None
        ]
        if len(given) != 1:
            raise ValueError(f"a wait is for one of 'for', 'until' and 'signal', not {' and '.join(given) or 'none'}")
        return self


class Wait(StepType[WaitParams]):
    """Its output is the signal's data, and null after a time. Its `timeout` is how long a signal is waited for."""

    name = "wait"
    params = WaitParams
    passes_on = False
    waits = True

    def run(self, params: WaitParams, attempt: Attempt) -> JsonValue:
        if params.signal is not None:
            return self._for_signal(params.signal, attempt)
        if isinstance(attempt.memory, (int, float)):
            due = float(attempt.memory)
        else:
            due = attempt.now() + params.for_ if params.for_ is not None else _seconds(str(params.until))
        left = due - attempt.now()
        # Redis counts in milliseconds: woken a moment early, it is not sent to sleep again.
        if left <= 0.05:
            return None
        raise Park("timer", f"until {datetime.fromtimestamp(due).astimezone():%Y-%m-%d %H:%M:%S %z}", left, memory=due)

    def _for_signal(self, name: str, attempt: Attempt) -> JsonValue:
        came = attempt.signal()
        if came is not None:
            return came[0]
        if attempt.memory is not None:
            raise StepError(f"no signal {name!r} came within {attempt.timeout_s:g} s")
        raise Park("signal", f"for the signal {name!r}", attempt.timeout_s, memory=True, awaited=name)


def _seconds(text: str) -> float:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no time as ISO 8601, like 2026-12-24T18:00:00+01:00") from None
    if when.tzinfo is None:
        raise ValueError(f"{text!r} does not say in which time zone: put an offset behind it, like +01:00 or Z")
    return when.timestamp()

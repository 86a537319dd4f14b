"""What a run and its steps leave behind."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, JsonValue, field_validator


class RunStatus(StrEnum):
    """Where a run stands; a terminal status never changes."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING_APPROVAL = "waiting_approval"
    COMPENSATING = "compensating"
    """It has failed or was cancelled, and what completed is being undone."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    BUDGET_KILLED = "budget_killed"
    POLICY_BLOCKED = "policy_blocked"

    @property
    def ended(self) -> bool:
        return self not in _LIVE_RUN


class StepStatus(StrEnum):
    """Where a step stands; a terminal status never changes."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in _LIVE_STEP


_LIVE_RUN = frozenset({RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING_APPROVAL, RunStatus.COMPENSATING})
_LIVE_STEP = frozenset({StepStatus.PENDING, StepStatus.RUNNING, StepStatus.WAITING})


#: The most that one counter holds: exact in a float, and far from the end of Redis's integers.
_MOST = 10**15
#: Of US dollars.
_MOST_USD = 1e9


class Usage(BaseModel):
    """The cost of something. Adding two is adding their fields.

    Counters come from providers and are added up in Redis, so none is ever negative, more than a thousand million
    million, or anything but a number: such a one is the nearest that can be, and 0 where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_tokens: int = 0
    output_tokens: int = 0
    #: US dollars, by the price table; 0 where the model has no price (see `unpriced_calls`).
    cost_usd: float = 0.0
    model_calls: int = 0
    tool_calls: int = 0
    #: Model calls whose price nobody knows.
    unpriced_calls: int = 0

    @field_validator("input_tokens", "output_tokens", "model_calls", "tool_calls", "unpriced_calls", mode="before")
    @classmethod
    def _countable(cls, value: object) -> int:
        if type(value) is int and 0 <= value <= _MOST:
            return value
        return int(_nearest(value, _MOST))

    @field_validator("cost_usd", mode="before")
    @classmethod
    def _payable(cls, value: object) -> float:
        return _nearest(value, _MOST_USD)

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in Usage.model_fields})

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in Usage.model_fields)


def _nearest(value: object, most: float) -> float:
    """The number from 0 to `most` that is nearest to a value; 0 for what is no number."""
    if not isinstance(value, int | float) or value != value:  # noqa: PLR0124 - NaN
        return 0.0
    return float(min(max(value, 0), most))


class StepResult(BaseModel):
    """What one step left behind."""

    model_config = ConfigDict(frozen=True)

    step_id: str
    status: StepStatus = StepStatus.PENDING
    #: How often it was tried, the present try included; 0 before the first.
    attempt: int = 0
    #: What the step returned; `None` unless it completed. Large ones are an artifact reference.
    output: JsonValue = None
    #: One sentence for the workflow's author; `None` unless it failed, was skipped or is waiting to be tried again.
    error: str | None = None
    usage: Usage = Usage()

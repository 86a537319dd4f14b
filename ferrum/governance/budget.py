"""The budget of a run: what may be spent, and whether one more act would pass it.

The rule, in whole numbers, so that every place that enforces it (the record does, in Lua, where it is atomic) comes to
the same answer. `c` are the `counters` of a usage, `limit` the `ceilings` of the limits; a limit that is not set has no
ceiling. The first row that holds is the answer, and where none does the act may go on:

| row | answer          | holds when                                                                                 |
|-----|-----------------|--------------------------------------------------------------------------------------------|
| 1   | `input_tokens`  | it has a ceiling and `c(spent) + c(reserved) + c(wanted) > ceiling`, of `input_tokens`      |
| 2   | `output_tokens` | the same, of `output_tokens`                                                               |
| 3   | `total_tokens`  | the same, of `total_tokens`, which are input and output tokens together                    |
| 4   | `unpriced`      | `cost_micro_usd` has a ceiling and `c(wanted).unpriced_calls > 0`                          |
| 5   | `cost_usd`      | the same as rows 1 to 3, of `cost_micro_usd`                                               |
| 6   | `tool_calls`    | the same, of `tool_calls`                                                                  |

Exactly reaching a limit is within it. An act that wants nothing of a limit is still refused where others have passed
that limit already. How long a run takes (`wall_time`) is not judged here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from enum import StrEnum
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from ferrum.results import Usage

#: Lua and Redis Cluster clients count in doubles, which are exact up to here.
_MOST: Final = 2**53
_MOST_USD: Final = 1e9

_Count = Annotated[int, Field(ge=0, le=_MOST)]


class Limits(BaseModel):
    """What a run may spend; `None` is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    total_tokens: _Count | None = None
    cost_usd: Annotated[float, Field(ge=0, le=_MOST_USD)] | None = None
    tool_calls: _Count | None = None


class Passed(StrEnum):
    """Which row of the rule refused."""

    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    TOTAL_TOKENS = "total_tokens"
    UNPRICED = "unpriced"
    COST_USD = "cost_usd"
    TOOL_CALLS = "tool_calls"


def micro_usd(usd: float) -> int:
    """Dollars as whole millionths of a dollar, rounded up.

    What is below a thousandth of that is the noise of adding floats and is dropped first, so that 0.1 + 0.2 is 300,000.
    Raises `ValueError` for what is no price: below 0, above a thousand million, NaN.
    """
    return _micro(usd, ROUND_CEILING)


def counters(usage: Usage) -> dict[str, int]:
    """A usage in whole numbers: what the rule adds up."""
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "cost_micro_usd": micro_usd(usage.cost_usd),
        "model_calls": usage.model_calls,
        "tool_calls": usage.tool_calls,
        "unpriced_calls": usage.unpriced_calls,
    }


def usage_of(counted: Mapping[str, int]) -> Usage:
    """The usage that `counters` gave, its cost rounded up to a millionth of a dollar; a counter not there is 0."""
    return Usage(
        input_tokens=counted.get("input_tokens", 0),
        output_tokens=counted.get("output_tokens", 0),
        cost_usd=counted.get("cost_micro_usd", 0) / 1e6,
        model_calls=counted.get("model_calls", 0),
        tool_calls=counted.get("tool_calls", 0),
        unpriced_calls=counted.get("unpriced_calls", 0),
    )


def ceilings(limits: Limits) -> dict[str, int]:
    """The limits that are set, by the counter that they bind. A cost is rounded down, so nothing slips past it."""
    found = {
        "input_tokens": limits.input_tokens,
        "output_tokens": limits.output_tokens,
        "total_tokens": limits.total_tokens,
        "cost_micro_usd": None if limits.cost_usd is None else _micro(limits.cost_usd, ROUND_FLOOR),
        "tool_calls": limits.tool_calls,
    }
    return {name: ceiling for name, ceiling in found.items() if ceiling is not None}


def passed(limits: Limits, spent: Usage, reserved: Usage, wanted: Usage) -> Passed | None:
    """The first row of the rule that refuses, or `None` where the act may go on."""
    ceiling = ceilings(limits)
    together = _together(spent, reserved, wanted)
    for row in Passed:
        if row is Passed.UNPRICED:
            if "cost_micro_usd" in ceiling and wanted.unpriced_calls > 0:
                return row
        elif together[_counter(row)] > ceiling.get(_counter(row), math.inf):
            return row
    return None


def over(limits: Limits, spent: Usage, reserved: Usage, wanted: Usage) -> str | None:
    """A sentence that names the first limit which would be passed, or `None` where the act may go on."""
    row = passed(limits, spent, reserved, wanted)
    return None if row is None else refusal(row, limits, spent, reserved, wanted)


def refusal(row: Passed, limits: Limits, spent: Usage, reserved: Usage, wanted: Usage) -> str:
    """The sentence for a row that refused, for an author who may raise the limit or want less."""
    if row is Passed.UNPRICED:
        return (
            f"budget.cost_usd is {limits.cost_usd}, but the model has no price, so its cost cannot be kept within it: "
            "add its price to the price file (FERRUM_PRICES) or remove budget.cost_usd"
        )
    name = _counter(row)
    shown = [
        _shown(row, value)
        for value in (ceilings(limits)[name], *(counters(u)[name] for u in (spent, reserved, wanted)))
    ]
    return "budget.{} is {}, but {} spent, {} reserved and {} wanted would pass it".format(row, *shown)


def left(limits: Limits, spent: Usage, reserved: Usage) -> Limits:
    """What may still be wanted of each limit; 0 where it has been passed."""
    together = _together(spent, reserved)
    rest = {name: max(ceiling - together[name], 0) for name, ceiling in ceilings(limits).items()}
    micro = rest.pop("cost_micro_usd", None)
    return Limits(cost_usd=None if micro is None else micro / 1e6, **rest)


def _together(*usages: Usage) -> dict[str, int]:
    # Counted first and then added, as the record does it: a cost is rounded once for each act.
    each = [counters(usage) for usage in usages]
    return {name: sum(one[name] for one in each) for name in each[0]}


def _counter(row: Passed) -> str:
    return "cost_micro_usd" if row is Passed.COST_USD else row.value


def _shown(row: Passed, count: int) -> str:
    return f"{count / 1e6:.6f}".rstrip("0").rstrip(".") if row is Passed.COST_USD else str(count)


def _micro(usd: float, rounding: str) -> int:
    if not 0 <= usd <= _MOST_USD:
        raise ValueError(f"{usd!r} is no cost in US dollars: it is a number from 0 to {_MOST_USD:,.0f}")
    exact = Decimal(repr(float(usd))).quantize(Decimal("1e-9"))
    return int((exact * 1_000_000).to_integral_value(rounding))

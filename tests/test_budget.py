"""The budget's rule. `cases`, `rule` and `examples` are what every place that enforces it is tested with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ferrum.governance.budget import (
    Limits,
    Passed,
    ceilings,
    counters,
    left,
    micro_usd,
    over,
    passed,
    refusal,
    usage_of,
)
from ferrum.results import Usage

#: A busy machine is not a failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NOTHING = Usage()
NAN = float("nan")

#: Small numbers, so that sums meet limits exactly, just below and just above; and one that is larger than 32 bits.
counts = st.integers(0, 6) | st.just(2**40)
micros = st.integers(0, 6) | st.integers(0, 3_000_000)

usages = st.builds(
    Usage,
    input_tokens=counts,
    output_tokens=counts,
    cost_usd=micros.map(lambda micro: micro / 1e6),
    model_calls=st.integers(0, 3),
    tool_calls=counts,
    unpriced_calls=st.integers(0, 2),
)
limits = st.builds(
    Limits,
    input_tokens=st.none() | counts,
    output_tokens=st.none() | counts,
    total_tokens=st.none() | counts,
    cost_usd=st.none() | micros.map(lambda micro: micro / 1e6),
    tool_calls=st.none() | counts,
)
cases = st.tuples(limits, usages, usages, usages)


def rule(limits: Limits, spent: Usage, reserved: Usage, wanted: Usage) -> str | None:
    """The table of the module, row by row and in whole numbers."""

    def passes(limit: int | None, counter: str) -> bool:
        return limit is not None and sum(counters(usage)[counter] for usage in (spent, reserved, wanted)) > limit

    cost = None if limits.cost_usd is None else round(limits.cost_usd * 1e6)
    rows = {
        "input_tokens": passes(limits.input_tokens, "input_tokens"),
        "output_tokens": passes(limits.output_tokens, "output_tokens"),
        "total_tokens": passes(limits.total_tokens, "total_tokens"),
        "unpriced": cost is not None and wanted.unpriced_calls > 0,
        "cost_usd": passes(cost, "cost_micro_usd"),
        "tool_calls": passes(limits.tool_calls, "tool_calls"),
    }
    return next((name for name, holds in rows.items() if holds), None)


#: Limits, spent, reserved, wanted and the row that refuses.
examples: list[tuple[Limits, Usage, Usage, Usage, str | None]] = [
    (Limits(), Usage(input_tokens=2**50), NOTHING, Usage(unpriced_calls=1), None),
    (Limits(tool_calls=2), Usage(tool_calls=1), NOTHING, Usage(tool_calls=1), None),
    (Limits(tool_calls=2), Usage(tool_calls=1), Usage(tool_calls=1), Usage(tool_calls=1), "tool_calls"),
    (Limits(tool_calls=0), NOTHING, NOTHING, Usage(tool_calls=1), "tool_calls"),
    (Limits(tool_calls=0), NOTHING, NOTHING, Usage(model_calls=1), None),
    (Limits(input_tokens=9), Usage(input_tokens=10), NOTHING, Usage(tool_calls=1), "input_tokens"),
    (Limits(output_tokens=9), NOTHING, NOTHING, Usage(output_tokens=10), "output_tokens"),
    (Limits(total_tokens=9), NOTHING, NOTHING, Usage(input_tokens=5, output_tokens=5), "total_tokens"),
    (Limits(total_tokens=9), NOTHING, NOTHING, Usage(input_tokens=5, output_tokens=4), None),
    (Limits(cost_usd=0.3), Usage(cost_usd=0.1), NOTHING, Usage(cost_usd=0.2), None),
    (Limits(cost_usd=0.3), Usage(cost_usd=0.1), Usage(cost_usd=0.1), Usage(cost_usd=0.100001), "cost_usd"),
    (Limits(cost_usd=1.0), Usage(unpriced_calls=1), Usage(unpriced_calls=1), Usage(model_calls=1), None),
    (Limits(cost_usd=1.0), Usage(cost_usd=2.0), NOTHING, Usage(unpriced_calls=1), "unpriced"),
    (Limits(cost_usd=0.0), NOTHING, NOTHING, Usage(model_calls=1), None),
]


@unhurried
@given(case=cases)
def test_the_first_row_of_the_table_that_holds_is_the_answer(case: tuple[Limits, Usage, Usage, Usage]) -> None:
    assert passed(*case) == rule(*case)


@pytest.mark.parametrize(("limits", "spent", "reserved", "wanted", "row"), examples)
def test_an_act_is_refused_by_the_limit_it_would_pass(
    limits: Limits, spent: Usage, reserved: Usage, wanted: Usage, row: str | None
) -> None:
    assert passed(limits, spent, reserved, wanted) == row


@unhurried
@given(case=cases)
def test_there_is_a_sentence_exactly_where_an_act_is_refused(case: tuple[Limits, Usage, Usage, Usage]) -> None:
    row = passed(*case)
    assert over(*case) == (None if row is None else refusal(row, *case))


def test_the_sentence_names_the_limit_and_where_the_budget_went() -> None:
    sentence = over(
        Limits(total_tokens=1000),
        Usage(input_tokens=900),
        Usage(input_tokens=40, output_tokens=10),
        Usage(output_tokens=100),
    )
    assert sentence == "budget.total_tokens is 1000, but 900 spent, 50 reserved and 100 wanted would pass it"


def test_the_sentence_shows_costs_in_dollars() -> None:
    sentence = over(Limits(cost_usd=10), Usage(cost_usd=9.5), NOTHING, Usage(cost_usd=0.500001))
    assert sentence == "budget.cost_usd is 10, but 9.5 spent, 0 reserved and 0.500001 wanted would pass it"


def test_a_model_without_a_price_is_refused_under_a_cost_limit_with_the_remedy() -> None:
    sentence = over(Limits(cost_usd=2), NOTHING, NOTHING, Usage(model_calls=1, unpriced_calls=1))
    assert sentence is not None
    assert "add its price to the price file (FERRUM_PRICES)" in sentence


@unhurried
@given(case=cases)
def test_what_is_left_may_be_wanted_and_no_more(case: tuple[Limits, Usage, Usage, Usage]) -> None:
    limits, spent, reserved, _ = case
    rest = left(limits, spent, reserved)
    assert ceilings(rest).keys() == ceilings(limits).keys()
    for name, ceiling in ceilings(rest).items():
        one_limit = Limits.model_validate({_field(name): getattr(limits, _field(name))})
        all_of_it = _wanting(name, ceiling)
        already_passed = passed(one_limit, spent, reserved, NOTHING) is not None
        assert (passed(one_limit, spent, reserved, all_of_it) is None) is not already_passed
        assert passed(one_limit, spent, reserved, all_of_it + _wanting(name, 1)) is not None


def _field(counter: str) -> str:
    return "cost_usd" if counter == "cost_micro_usd" else counter


def _wanting(counter: str, amount: int) -> Usage:
    return usage_of({"input_tokens" if counter == "total_tokens" else counter: amount})


@unhurried
@given(micro=st.integers(0, 10**15))
def test_whole_micro_dollars_survive_being_a_float(micro: int) -> None:
    assert micro_usd(micro / 1e6) == micro


@unhurried
@given(usd=st.floats(0, 1e6))
def test_a_cost_is_rounded_up_and_by_less_than_a_micro_dollar(usd: float) -> None:
    noise = 1e-9 + usd * 1e-15
    assert usd - noise <= micro_usd(usd) / 1e6 <= usd + 1e-6 + noise


@pytest.mark.parametrize(
    ("usd", "micro"),
    [
        (0.0, 0),
        (0.1 + 0.2, 300_000),
        (1.1, 1_100_000),
        (0.0000001, 1),
        (0.0000011, 2),
        (1e9, 10**15),
        (0.1 * 3, 300_000),
    ],
)
def test_the_noise_of_adding_floats_is_not_rounded_up(usd: float, micro: int) -> None:
    assert micro_usd(usd) == micro


@pytest.mark.parametrize("usd", [-0.01, float("nan"), float("inf"), 1.1e9])
def test_what_is_no_price_is_refused(usd: float) -> None:
    with pytest.raises(ValueError, match="is no cost in US dollars"):
        micro_usd(usd)


def test_a_limit_finer_than_a_micro_dollar_is_rounded_down() -> None:
    assert ceilings(Limits(cost_usd=0.0000019)) == {"cost_micro_usd": 1}


@unhurried
@given(usage=usages)
def test_a_usage_survives_being_counted(usage: Usage) -> None:
    assert usage_of(counters(usage)) == usage


@pytest.mark.parametrize(
    "wrong",
    [
        {"wall_time": 1},
        {"tool_calls": -1},
        {"cost_usd": -1.0},
        {"cost_usd": float("nan")},
        {"cost_usd": float("inf")},
        {"total_tokens": 2**53 + 1},
    ],
)
def test_a_limit_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Limits.model_validate(wrong)


def test_the_rows_of_the_rule_stand_in_the_order_of_the_table() -> None:
    assert [row.value for row in Passed] == [
        "input_tokens",
        "output_tokens",
        "total_tokens",
        "unpriced",
        "cost_usd",
        "tool_calls",
    ]


@pytest.mark.parametrize(
    ("given", "counted"),
    [
        (-1, 0), (10**30, 10**15), (NAN, 0), (float("inf"), 10**15), (float("-inf"), 0), ("12", 0), (None, 0), ([], 0),
        (2.0, 2), (7, 7),
    ],
)  # fmt: skip
def test_a_usage_holds_what_can_be_counted(given: Any, counted: int) -> None:
    assert Usage(input_tokens=given).input_tokens == counted
    assert Usage(cost_usd=given).cost_usd == min(counted, 10**9)
    assert all(type(count) is int and 0 <= count < 2**63 for count in counters(Usage(cost_usd=given)).values())


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_a_cost_told_bit_by_bit_is_never_less_than_nothing(costs: list[float]) -> None:
    """What was told before is taken off what is used, and floats do not add up."""
    used = told = Usage()
    for cost in costs:
        used += Usage(cost_usd=cost)
        left = Usage(cost_usd=used.cost_usd - told.cost_usd)
        told += left
        assert counters(left)["cost_micro_usd"] >= 0
    assert counters(Usage(cost_usd=used.cost_usd - told.cost_usd))["cost_micro_usd"] == 0

"""What people see of a run: lines, durations, where the time went."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ferrum.events import Event, read
from ferrum.follow import duration, line_of, one_line, render, report, times
from ferrum.results import RunStatus, StepResult, StepStatus, Usage
from ferrum.runs import RunView
from ferrum.terminal import visible


def event(at_s: float, type: str, step: str = "", /, **data: Any) -> Event:
    fields = {"t": type, "s": step, "d": json.dumps(data)}
    return read("run_1", f"{round(at_s * 1000)}-0", fields)


@pytest.mark.parametrize(
    ("happened", "line"),
    [
        (event(1, "run.created", workflow="x", version="1.0", plan="p"), "● run  x 1.0  run_1"),
        (event(1, "step.started", "a.2.b", attempt=1, worker="w"), "→ a.2.b  try 1"),
        (
            event(1, "step.waiting", "a", attempt=1, kind="retry", error="rate limited", wakes_in=2.0),
            "↻ a    try 1  rate limited, again in 2 s",
        ),
        (
            event(1, "step.waiting", "a", kind="approval", message="Go on?\nWhy not"),
            "⏸ a    waiting for a person",
        ),
        (event(1, "step.completed", "a", attempt=2, seconds=8.1), "← a    try 2  8.1 s"),
        (event(1, "step.failed", "a", attempt=1, error="the model\nrefused"), "! a    try 1  the model refused"),
        (event(1, "step.skipped", "a", reason="'b' failed"), "⊘ a    skipped, 'b' failed"),
        (
            event(1, "step.lost", "a", attempt=1, reason="its worker died"),
            "↻ a    try 1  its worker died; it is sent again",
        ),
        (
            event(
                1,
                "act.decided",
                "a",
                kind="tool",
                target="g.log",
                effect="allow",
                rule="allow[0]",
                reason="",
                digest="",
            ),
            "✓ a    allow tool g.log  by allow[0]",
        ),
        (
            event(
                1, "act.decided", "a", kind="tool", target="g.x", effect="deny", rule="default", reason="no", digest=""
            ),
            "✗ a    deny tool g.x  no",
        ),
        (
            event(1, "approval.decided", "a", approved=False, by="kim", note="not yet"),
            "✗ a    rejected by kim: not yet",
        ),
        (event(1, "approval.decided", "a", approved=False, by="", expired=True), "✗ a    nobody decided in time"),
        (event(1, "run.ended", status="cancelled", by="kim"), "■ run  cancelled by kim"),
    ],
)
def test_each_event_is_one_line(happened: Event, line: str) -> None:
    assert render(line_of(happened), 3, colour=False)[8:] == f"  {line}"


def test_a_terminal_that_can_gets_colours() -> None:
    assert render(line_of(event(1, "step.completed", "a", seconds=1)), 3, colour=True).startswith("\x1b[32m")


def test_what_comes_from_elsewhere_cannot_steer_a_terminal() -> None:
    assert visible("a\x1b[2J\u202eb\r\x9b\tc\n") == "a\\x1b[2J\\u202eb\\r\\x9b    c\n"
    assert one_line("a\nb" + "c" * 200, 10) == "a bcccccc…"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0121, "12 ms"),
        (2, "2 s"),
        (8.14, "8.1 s"),
        (59.96, "1 m 00 s"),
        (3725, "1 h 02 m"),
        (1e6, "11 d 13 h"),
    ],
)
def test_a_duration_is_as_exact_as_it_need_be(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_time_is_spent_working_or_waiting_and_the_longest_comes_first() -> None:
    story = [
        event(10, "step.started", "a", attempt=1, worker="w"),
        event(11, "step.waiting", "a", attempt=1, kind="retry", error="e", wakes_in=3),
        event(14, "step.resumed", "a", why="due"),
        event(14.5, "step.started", "a", attempt=2, worker="w"),
        event(15, "step.completed", "a", attempt=2, seconds=0.5, usage={"input_tokens": 5}),
        event(15, "step.started", "b", attempt=1, worker="w"),
        event(15, "step.skipped", "c", reason="r"),
        event(25, "run.ended", status="cancelled"),
    ]
    spent = times(story)
    assert [(one.step, one.tries, one.working_s, one.waiting_s, one.usage.input_tokens) for one in spent] == [
        ("b", 1, 10.0, 0.0, 0),
        ("a", 2, 1.5, 3.5, 5),
    ]
    assert times(story[:2], now=12)[0].waiting_s == 1.0


def test_the_report_has_outputs_usage_cost_and_time() -> None:
    view = RunView(
        tenant="default",
        parent=None,
        origin=None,
        how=None,
        run_id="run_1",
        workflow="x",
        version="1",
        status=RunStatus.COMPLETED,
        reason=None,
        input={},
        outputs={"text": "one\ntwo", "number": 3},
        usage=Usage(input_tokens=1200, output_tokens=300, cost_usd=0.0123, model_calls=1, unpriced_calls=1),
        steps=(StepResult(step_id="a", status=StepStatus.COMPLETED),),
        created_at=1.0,
        started_at=1.0,
        ended_at=3.5,
    )
    spent = times([event(1, "step.started", "a", attempt=1, worker="w"), event(3, "step.completed", "a", seconds=2)])
    assert report(view, spent).splitlines() == [
        "outputs",
        "  text:",
        "    one",
        "    two",
        "  number: 3",
        "usage     1,500 tokens (1,200 in, 300 out), 1 model call, 0 tool calls",
        "cost      $0.0123 and 1 call without a price",
        "time      2.5 s",
        "where the time went  seconds  waiting  tokens  cost",
        "  a                     2.00",
    ]

"""Events: read back as what they were, and folded into the state that they add up to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import get_args

import pytest
from by_hand import ByHand

from ferrum.events import (
    ActDecided,
    Event,
    RunCompensating,
    RunCreated,
    RunEnded,
    RunResumed,
    RunStarted,
    RunState,
    RunWaiting,
    SignalReceived,
    StepCancelled,
    StepCompleted,
    StepFailed,
    StepKept,
    StepLost,
    StepResumed,
    StepSkipped,
    StepStarted,
    StepWaiting,
    fold,
    read,
)
from ferrum.record import Record, Verdict, base_of
from ferrum.results import RunStatus, StepResult, StepStatus, Usage

RUN = "run_0123"
#: One of each type: its step, its data and its envelope, as the record keeps them.
KEPT: dict[str, tuple[str, dict[str, object], str]] = {
    "run.created": ("", {"workflow": "w", "version": "1", "plan": "abc"}, '{"v":{}}'),
    "run.started": ("", {}, ""),
    "run.waiting": ("", {}, ""),
    "run.resumed": ("", {}, ""),
    "run.compensating": ("", {"status": "failed", "reason": "'a' failed"}, ""),
    "signal.received": ("", {"name": "go", "by": "ann"}, '{"v":1}'),
    "run.ended": ("", {"status": "failed", "reason": "'a' failed"}, ""),
    "step.started": ("a", {"attempt": 1, "worker": "w"}, ""),
    "act.decided": (
        "a",
        {"kind": "tool", "target": "s.t", "effect": "allow", "rule": "r", "reason": "why", "digest": "d"},
        "",
    ),
    "step.waiting": ("a", {"kind": "retry", "wakes_in": 1.5, "error": "busy"}, ""),
    "step.resumed": ("a", {"why": "its time came"}, ""),
    "approval.decided": ("a", {"approved": True, "by": "ann"}, ""),
    "step.lost": ("a", {"reason": "its worker died", "usage": {"tool_calls": 1}}, ""),
    "step.output": ("a", {"attempt": 1, "stream": "stdout", "text": "hello\n"}, ""),
    "step.completed": ("a", {"seconds": 0.5, "usage": {"cost_micro_usd": 1500000}}, '{"v":1}'),
    "step.failed": ("a", {"error": "no", "seconds": 0.1}, ""),
    "step.skipped": ("a", {"reason": "'b' failed", "cause": "b"}, ""),
    "step.cancelled": ("a.0.b", {"attempt": 1}, ""),
    "step.kept": ("a", {"origin": "run_0", "status": "completed"}, '{"v":1}'),
}


@pytest.fixture(scope="module")
def record(redis_url: str) -> Iterator[Record]:
    record = Record(redis_url)
    yield record
    record.close_connections()


def kept(kind: str, event_id: str = "1700000000500-0", **more: object) -> Event:
    step, data, output = KEPT[kind]
    return read(RUN, event_id, {"t": kind, "s": step, "d": json.dumps(data | more), "o": output})


def test_one_of_each_type_is_tested_here() -> None:
    types = [member.model_fields["type"].default for member in get_args(get_args(Event)[0])]
    assert sorted(KEPT) == sorted(types)


@pytest.mark.parametrize("kind", KEPT)
def test_an_event_is_read_back_as_what_it_was(kind: str) -> None:
    step, data, output = KEPT[kind]
    event = kept(kind)
    assert (event.type, event.run_id, event.id, event.at) == (kind, RUN, "1700000000500-0", 1700000000.5)
    assert getattr(event, "step", "") == step
    assert (getattr(event, "output", None) or "") == output
    assert {name: getattr(event, name) for name in data if name != "usage"} == {
        name: value for name, value in data.items() if name != "usage"
    }


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_later_ferrum_says_besides_is_ignored(kind: str) -> None:
    assert kept(kind, colour="green") == kept(kind)


def test_usage_is_counted_in_whole_numbers_and_read_as_a_usage() -> None:
    event = kept("step.completed")
    assert isinstance(event, StepCompleted)
    assert event.usage == Usage(cost_usd=1.5)
    empty = kept("step.completed", usage={})
    assert isinstance(empty, StepCompleted)
    assert empty.usage == Usage()


def at(number: int) -> dict[str, str]:
    return {"id": f"{number * 1000}-0", "run_id": RUN}


def test_the_state_of_a_run_is_what_its_events_add_up_to() -> None:
    a, b, c = ({"step": step} for step in "abc")
    decided = {"kind": "tool", "target": "s.t", "effect": "allow", "rule": "r", "reason": "", "digest": "d"}
    state = fold(
        [
            RunCreated(**at(1), workflow="w", version="2", plan="p", output='{"v":{"q":1}}'),
            RunStarted(**at(2)),
            StepStarted(**at(3), **a, attempt=1, worker="w"),
            ActDecided(**at(4), **a, **decided, usage=Usage(input_tokens=3)),
            StepWaiting(**at(5), **a, kind="retry", error="busy", usage=Usage(tool_calls=1)),
            RunWaiting(**at(6)),
            RunResumed(**at(7)),
            StepResumed(**at(8), **a, why="its time came"),
            StepStarted(**at(9), **a, attempt=2, worker="w"),
            StepCompleted(**at(10), **a, seconds=1, output='{"v":1}', usage=Usage(tool_calls=1)),
            StepStarted(**at(11), **b, attempt=1, worker="w"),
            StepFailed(**at(12), **b, error="no"),
            StepSkipped(**at(13), **c, reason="'b' failed", cause="b"),
            RunEnded(**at(14), status=RunStatus.FAILED, reason="'b' failed"),
        ]
    )
    assert state == RunState(
        run_id=RUN,
        status=RunStatus.FAILED,
        workflow="w",
        version="2",
        plan="p",
        input='{"v":{"q":1}}',
        reason="'b' failed",
        usage=Usage(input_tokens=3, tool_calls=2),
        steps={
            "a": StepResult(
                step_id="a", status=StepStatus.COMPLETED, attempt=2, usage=Usage(input_tokens=3, tool_calls=2)
            ),
            "b": StepResult(step_id="b", status=StepStatus.FAILED, attempt=1, error="no"),
            "c": StepResult(step_id="c", status=StepStatus.SKIPPED, error="'b' failed"),
        },
        step_outputs={"a": '{"v":1}'},
        created_at=1,
        started_at=2,
        ended_at=14,
        last="14000-0",
    )


def test_what_had_not_ended_when_its_run_did_is_cancelled() -> None:
    state = fold(
        [
            StepStarted(**at(1), step="a", attempt=1, worker="w"),
            StepLost(**at(2), step="b", reason="its worker died"),
            StepCompleted(**at(3), step="c", seconds=1),
            RunEnded(**at(4), status=RunStatus.CANCELLED, by="ann"),
        ]
    )
    assert {step: result.status for step, result in state.steps.items()} == {
        "a": StepStatus.CANCELLED, "b": StepStatus.CANCELLED, "c": StepStatus.COMPLETED,
    }  # fmt: skip
    assert state.step("unknown") == StepResult(step_id="unknown")
    assert state.step_outputs == {}


def test_what_goes_on_when_a_run_begins_to_undo_is_cancelled_and_what_undoes_is_seen() -> None:
    state = fold(
        [
            RunCreated(**at(1), workflow="w", version="1", plan="p"),
            StepKept(**at(2), step="kept", origin="run_0", status=StepStatus.COMPLETED, output='{"v":7}'),
            StepKept(**at(2), step="off", origin="run_0", status=StepStatus.SKIPPED),
            StepStarted(**at(3), step="a", attempt=1, worker="w"),
            StepStarted(**at(4), step="b", attempt=1, worker="w"),
            StepCancelled(**at(5), step="b"),
            SignalReceived(**at(6), name="go", by="ann"),
            RunCompensating(**at(7), status=RunStatus.FAILED, reason="'c' failed"),
        ]
    )
    assert (state.status, state.reason) == (RunStatus.COMPENSATING, "'c' failed")
    assert {step: result.status.value for step, result in state.steps.items()} == {
        "kept": "completed", "off": "skipped", "a": "cancelled", "b": "cancelled",
    }  # fmt: skip
    assert (state.step_outputs, state.passed_over) == ({"kept": '{"v":7}'}, {"off"})
    undone = StepCompleted(**at(8), step="kept.compensate", seconds=1)
    fold([undone, RunEnded(**at(9), status=RunStatus.FAILED, reason="'c' failed")], state)
    assert (state.status, state.step("kept.compensate").status) == (RunStatus.FAILED, StepStatus.COMPLETED)


def test_what_did_not_complete_and_need_not_is_known() -> None:
    state = fold(
        [
            StepFailed(**at(1), step="may", error="no", tolerated=True),
            StepFailed(**at(1), step="must", error="no"),
            StepSkipped(**at(2), step="off", reason="its 'when' is false"),
            StepSkipped(**at(2), step="behind", reason="'must' failed", cause="must"),
        ]
    )
    assert state.passed_over == {"may", "off"}


def test_folding_can_be_taken_up_again_after_any_event(record: Record) -> None:
    run = ByHand(record, {"a": [], "b": ["a"], "c": ["a"]})
    run.begin("a")
    run.park("a", usage=Usage(input_tokens=2))
    record.decide(run.run_id, "a", Verdict(True, "ann"))
    run.do("a")
    run.begin("b")
    run.finish("b", StepStatus.FAILED, usage=Usage(input_tokens=3, cost_usd=0.25))
    run.do("c")
    events = record.events(run.run_id)
    whole = fold(events)
    assert whole == record.state(run.run_id)
    for cut in range(len(events) + 1):
        first = fold(events[:cut])
        assert fold(record.events(run.run_id, after=first.last), first) == whole
    assert whole.usage == Usage(input_tokens=5, cost_usd=0.25)
    assert {step: result.status.value for step, result in whole.steps.items()} == {
        "a": "completed", "b": "failed", "c": "completed",
    }  # fmt: skip
    assert whole.status is RunStatus.FAILED


def test_the_usage_that_events_add_up_to_is_the_usage_that_the_record_counted(record: Record) -> None:
    run = ByHand(record, {"a": [], "b": []})
    for step, usage in (("a", Usage(input_tokens=7, cost_usd=0.5, model_calls=1)), ("b", Usage(tool_calls=2))):
        run.begin(step)
        run.finish(step, usage=usage)
    state = record.state(run.run_id)
    counted = record._redis.hgetall(f"{base_of(run.run_id)}:run:{run.run_id}")
    assert {name[2:]: int(value) for name, value in counted.items() if name.startswith("u:")} == {
        "input_tokens": 7, "total_tokens": 7, "cost_micro_usd": 500000, "model_calls": 1, "tool_calls": 2,
    }  # fmt: skip
    assert state.usage == Usage(input_tokens=7, cost_usd=0.5, model_calls=1, tool_calls=2)

"""Corners of the engine: where two things happen at once, and where there is more or other than one thinks of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from by_hand import ByHand
from fleet import assert_events_agree, eventually
from office import Given, Office

from ferrum import runs
from ferrum.artifacts import Artifacts
from ferrum.cache import digest_of
from ferrum.errors import StepError
from ferrum.events import Event
from ferrum.governance.budget import Limits
from ferrum.governance.policy import Policy
from ferrum.loop import LoopThread
from ferrum.plan import Plan, _remembered
from ferrum.record import Claimed, Frames, Held, Lost, Record, new_run_id
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.scripts import Who
from ferrum.steps import Attempt, step_types
from ferrum.testing import Sent, run_inline
from ferrum.workflow import Workflow

T = {"type": "task", "task": "t"}
ALLOWED = {"kind": "k", "target": "t", "effect": "allow", "rule": "", "reason": "", "digest": "", "attempt": 1}


@pytest.fixture
def record(clean_redis: str) -> Iterator[Record]:
    record = Record(clean_redis)
    yield record
    record.close_connections()


@pytest.fixture
def office(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    loop = LoopThread()
    office = Office(record, loop, Artifacts(f"file://{tmp_path}"))
    monkeypatch.setattr("ferrum.plan.step_types", lambda: {**step_types(), "act": office._type})
    _remembered.cache_clear()
    yield office
    _remembered.cache_clear()
    loop.stop()


def by_hand(record: Record, steps: dict[str, Any], **more: Any) -> ByHand:
    return ByHand(record, Workflow.of({"name": "w", "steps": steps}), **more)


def test_a_signal_is_not_given_twice_though_others_come_before_it_is_asked_again(record: Record) -> None:
    run = by_hand(record, {"a": T})
    for request in ("first", "second", "first"):
        record._run("signal", run.run_id, run.run_id, "go", f'{{"v":"{request}"}}', '{"name":"go","by":""}', 9, request)
    assert run.happened().count("signal.received") == 2


def test_what_undoes_may_wait_for_a_signal(record: Record) -> None:
    wait = {"type": "wait", "signal": "go"}
    run = by_hand(record, {"a": {**T, "compensate": wait}, "b": wait, "c": {**T, "needs": ["a"]}})
    run.do("a")
    run.begin("b")
    run.park("b", "signal", awaited="go")
    run.begin("c")
    run.finish("c", StepStatus.FAILED)
    record.cancel(run.run_id, "ann")
    run.begin("a.compensate")
    run.park("a.compensate", "signal", awaited="go")
    # Not for `b`, which was there first, but goes on no longer.
    [sent] = record.signal(run.run_id, "go", '{"v":1}', "ann")
    assert sent.step_id == "a.compensate"
    assert run.begin("a.compensate").signal == '{"v":1}'


def test_no_run_begins_inside_of_a_step_that_is_undone_meanwhile(record: Record) -> None:
    inner = {"name": "i", "steps": {"s": T}}
    run = by_hand(record, {"a": {**T, "compensate": T}, "w": {"type": "workflow", "workflow": inner}})
    run.do("a")
    run.begin("w")
    record.cancel(run.run_id, "ann")
    new = Plan.of(inner).new_run(new_run_id(beside=run.run_id), None, '{"v":{}}', parent=(run.run_id, "w"))
    assert record.status(run.run_id) is RunStatus.COMPENSATING
    with pytest.raises(Lost):
        record.create(new)


@pytest.mark.parametrize("ended_by", ["the step around it", "its deadline"])
def test_what_was_cut_off_used_what_it_had_reserved(record: Record, clean_redis: str, ended_by: str) -> None:
    steps = {"b": {"steps": {"x": {**T, "deadline": "1ms"} if ended_by == "its deadline" else T}}}
    run = by_hand(record, steps, limits=Limits(tool_calls=5))
    run.begin("b")
    run.park("b", "children", frames=Frames(""))
    # Its deadline is looked at by the sweeper, which is not here.
    run.begin("b.x")
    used = Usage(tool_calls=2)
    record.admit(run.held["b.x"], 1, ALLOWED, allowed=True, wanted=used, spent=Usage())
    if ended_by == "the step around it":
        record.wake(run.run_id, "b", "children", "its time came")
        run.begin("b")
        run.finish("b", StepStatus.FAILED)
    else:
        while "step.failed b.x" not in run.happened():
            run.sweep()
        run.begin("b")
        run.finish("b", StepStatus.FAILED)
    assert record.state(run.run_id).step("b.x").usage == used
    assert_events_agree(clean_redis, run.run_id)


def test_a_step_may_need_thousands_of_others(record: Record) -> None:
    names = [f"s{number}" for number in range(8001)]
    run = by_hand(record, {**dict.fromkeys(names, T), "z": {**T, "needs": names}})
    record.adopt(run.run_id, [(name, {"status": "completed"}, '{"v":1}') for name in names])
    claimed = run.begin("z")
    assert isinstance(claimed, Claimed)
    assert len(claimed.needs) == 8001


def waiting(**more: Any) -> dict[str, Any]:
    return {"a": {"steps": {"x": {"type": "wait", "signal": "go"}}, **more}}


def test_who_was_cancelled_while_it_waited_for_its_turn_gives_it_to_the_next(office: Office) -> None:
    steps = waiting(concurrency={"key": "k", "limit": 1})
    first, *others, last = (office.run(steps) for _ in range(4))
    # What is in it goes on, and so it keeps its turn.
    assert office.executor.keep_shared() == ()
    for other in others:
        office.record.cancel(other, "ann")
    assert office.statuses(last) == {"a": "waiting"}
    office.go_on(office.record.signal(first, "go", '{"v":1}', ""))
    assert office.statuses(last) == {"a": "waiting", "a.x": "waiting"}


def test_who_was_cancelled_while_another_computed_is_passed_by_when_that_fails(office: Office) -> None:
    steps = waiting(cache={"key": "k", "ttl": "1h"})
    first, *others, last = (office.run(steps) for _ in range(4))
    for other in (*others, first):
        office.record.cancel(other, "ann")
    office.go_on(office.executor.keep_shared())
    assert office.statuses(last) == {"a": "waiting", "a.x": "waiting"}


def test_what_the_dead_were_computing_is_computed_by_who_waits_for_it(office: Office) -> None:
    dead = Who(new_run_id(), "a")
    office.executor.shared.cache.enter(digest_of("x.a", "k"), dead, 0.5)
    run = office.run({"a": {"type": "act", "value": 1, "cache": {"key": "k", "ttl": "1h"}}})
    eventually(lambda: office.go_on(office.executor.share()) or office.said(run)[0] == "completed")
    assert office.did == ["a"]


def test_who_lost_its_step_leaves_the_turn_to_who_has_it_now(office: Office) -> None:
    step = {"a": {"type": "act", "value": 1, "concurrency": {"key": "k", "limit": 1}}}
    others: list[str] = []

    def lose_it(_: Given, attempt: Attempt) -> None:
        office.says.clear()
        (held,) = office.executor.holds.current()
        office._lose(held)
        queues = {(kind.queue, 4): True for kind in step_types().values()}
        office.record.sweep(queues, resend_after_s=60, reap=True)
        assert isinstance(office.record.claim(Held(held.run_id, "a", "w2#1"), "w2", 60), Claimed)
        others.append(office.submit(step))

    office.says["a"] = lose_it
    office.attempt(office.submit(step))
    office.attempt(others[0])
    assert office.statuses(others[0]) == {"a": "waiting"}


def test_an_error_may_have_half_a_character_in_it(office: Office) -> None:
    office.says["a"] = StepError("no file 'a\udcff'")
    run = office.run({"a": {"type": "act", "value": 1}})
    assert office.state(run).step("a").error == "no file 'a?'"
    assert office.did == ["a"]


def test_a_run_again_is_of_the_same_tenant(clean_redis: str) -> None:
    first = runs.submit({"name": "x", "steps": {"a": T}}, tenant="acme")
    runs.cancel(first)
    assert runs.show(runs.rerun(first)).tenant == "acme"


DENIED = {"type": "tool", "tool": "git.log", "input": {}}


@pytest.mark.parametrize(
    "step",
    [
        {"type": "router", "by": "cost", "among": {"one": {**DENIED, "cost": 1}, "two": {"type": "act", "cost": 2}}},
        {**DENIED, "fallback": [{"type": "act"}]},
        {"type": "act", "fallback": [DENIED, {"type": "act"}]},
    ],
)
def test_what_was_denied_and_what_nothing_then_did_blocks_the_run(office: Office, step: dict[str, Any]) -> None:
    office.executor.policy = Policy.of({})
    office.says |= dict.fromkeys(("a", "a.two", "a.fallback1", "a.fallback2"), StepError("no"))
    assert office.said(office.run({"a": step}))[0] == "policy_blocked"
    office.says |= dict.fromkeys(("a.two", "a.fallback1", "a.fallback2"), 1)
    assert office.said(office.run({"a": step}))[0] == "completed"


def test_what_undoes_may_have_a_deadline(office: Office) -> None:
    office.says["b"] = StepError("no")
    undo = {"type": "wait", "signal": "go", "deadline": "1ms"}
    run = office.run({"a": {"type": "act", "compensate": undo}, "b": {"type": "act", "needs": ["a"]}})
    eventually(lambda: office.go_on(office.sweep()) or office.said(run)[0] == "failed", every_s=0.001)
    assert office.said(run) == ("failed", "'b' failed; not undone: 'a'")


@pytest.mark.parametrize(
    "shared", [{"concurrency": {"key": "k", "limit": 1}}, {"cache": {"key": "k", "ttl": "1h"}}], ids=["limit", "cache"]
)
def test_a_step_whose_run_is_cancelled_while_it_acts_gives_way_to_the_next(
    office: Office, shared: dict[str, Any]
) -> None:
    step = {"a": {"type": "act", "value": 1, **shared}}
    others: list[str] = []

    def cancel_itself(_: Given, attempt: Attempt) -> None:
        office.says.clear()
        others.append(office.run(step))
        assert office.statuses(others[0]) == {"a": "waiting"}
        office.record.cancel(attempt.run_id, "ann")

    office.says["a"] = cancel_itself
    assert office.said(office.run(step))[0] == "cancelled"
    assert office.said(others[0])[0] == "completed"


def test_what_undoes_may_wait_for_a_signal_in_this_process_too() -> None:
    undo = {"type": "wait", "signal": "go", "timeout": "1h"}
    gone = {"type": "wait", "signal": "never", "timeout": "1s", "needs": ["a"]}
    steps = {"a": {"type": "wait", "for": "1s", "compensate": undo}, "b": gone}
    run = run_inline({"name": "x", "steps": steps}, signals={"go": Sent("now", after_s=60)})
    assert (run.status, run.reason) == (RunStatus.FAILED, "'b' failed")


def inside(name: str, first: dict[str, Any]) -> dict[str, Any]:
    """A step whose run did something that takes an hour to undo, and goes on."""
    slow = {"type": "wait", "for": "1h"}
    steps = {name: {**first, "compensate": slow}, "on": {"type": "wait", "signal": "never", "needs": [name]}}
    return {"type": "workflow", "workflow": {"name": "inside", "steps": steps}}


def in_order(event: Event) -> list[int]:
    return [int(part) for part in event.id.split("-")]


def test_what_a_run_inside_did_is_undone_first_in_this_process_too() -> None:
    """It was not undone at all: the outer run had ended, and nothing went on any more."""
    soon = {"type": "wait", "for": "1s"}
    steps = {"a": {**soon, "compensate": soon}, "b": {**inside("x", soon), "needs": ["a"]}}
    run = run_inline({"name": "x", "deadline": "1m", "steps": steps})
    assert (run.status, run.inside("b").status) == (RunStatus.FAILED, RunStatus.CANCELLED)
    undone, before = (
        run.inside("b").happened("step.completed", "x.compensate"),
        run.happened("step.started", "a.compensate"),
    )
    # In one process the ids are in the order of all runs.
    assert in_order(undone[0]) < in_order(before[0])


@pytest.mark.parametrize("on_error", ["continue", "fail"])
def test_what_a_step_gave_up_is_undone_in_this_process_too(on_error: str) -> None:
    soon = {"type": "wait", "for": "1s"}
    run = run_inline({"name": "x", "steps": {"b": {**inside("x", soon), "timeout": "1m", "on_error": on_error}}})
    assert run.status is (RunStatus.COMPLETED if on_error == "continue" else RunStatus.FAILED)
    assert run.inside("b").happened("step.completed", "x.compensate")
    assert run.inside("b").status is RunStatus.CANCELLED

"""Running again what has run: what is taken over from another run, and what is done anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from office import Office
from pydantic import JsonValue

from ferrum import runs
from ferrum.artifacts import process_artifacts
from ferrum.errors import Conflict, InputError, NotFound, StepError
from ferrum.loop import LoopThread
from ferrum.plan import Plan, _remembered
from ferrum.record import Verdict, new_run_id
from ferrum.results import RunStatus
from ferrum.steps import step_types


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.stop()


@pytest.fixture
def office(clean_redis: str, loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    """It finds in the record what the front door has sent; nobody takes its messages."""
    office = Office(runs.record(), loop, process_artifacts(), mute=True)
    monkeypatch.setattr("ferrum.plan.step_types", lambda: {**step_types(), "act": office._type})
    _remembered.cache_clear()
    yield office
    _remembered.cache_clear()


def act(value: JsonValue = None, **more: Any) -> dict[str, Any]:
    return {"type": "act", "value": value, **more}


def ran(office: Office, steps: dict[str, Any], given: dict[str, JsonValue] | None = None, **more: Any) -> str:
    """A run that went as far as it goes by itself; what was done for it is forgotten."""
    inputs = {name: {"type": "integer"} for name in given or {}}
    run_id = runs.submit({"name": "x", "inputs": inputs, "steps": steps, **more}, given)
    office.go_on([])
    office.did.clear()
    return run_id


def kept(run_id: str) -> list[str]:
    return [event.step for event in runs.record().events(run_id) if event.type == "step.kept"]


CHAIN = {"a": act(1), "b": act("{{ a + 1 }}"), "c": act("{{ b + 1 }}"), "beside": act("{{ a + 10 }}")}


def test_a_run_is_run_again_from_a_step_with_the_results_of_all_that_does_not_wait_for_it(office: Office) -> None:
    first = ran(office, CHAIN, outputs={"r": "{{ [c, beside] }}"})
    again = runs.rerun(first, from_step="b")
    office.go_on([])
    assert sorted(office.did) == ["b", "c"]
    assert sorted(kept(again)) == ["a", "beside"]
    run = runs.show(again)
    assert (run.status, run.outputs) == (RunStatus.COMPLETED, {"r": [3, 11]})
    assert {step.step_id: step.output for step in run.steps} == {"a": 1, "b": 2, "c": 3, "beside": 11}
    created: Any = runs.record().events(again)[0]
    assert (created.origin, created.how) == (first, "rerun")
    assert office.left_behind(again) == []


def test_a_run_is_run_again_from_its_start(office: Office) -> None:
    again = runs.rerun(ran(office, CHAIN))
    office.go_on([])
    assert (sorted(office.did), kept(again)) == (["a", "b", "beside", "c"], [])
    assert runs.show(again).status is RunStatus.COMPLETED


def test_a_run_that_failed_is_resumed_where_it_failed(office: Office) -> None:
    office.says |= {"b": StepError("no"), "may": StepError("as it may")}
    more = {"may": act(1, on_error="continue"), "off": act(1, when="false"), "end": act("{{ [b, may, off] }}")}
    first = ran(office, {**CHAIN, **more})
    assert runs.show(first).status is RunStatus.FAILED
    office.says.clear()
    again = runs.resume(first)
    office.go_on([])
    assert sorted(kept(again)) == ["a", "beside", "may", "off"]
    assert sorted(office.did) == ["b", "c", "end"]
    assert (office.output(again, "end"), office.said(again)) == ([2, None, None], ("completed", None))
    assert office.statuses(again)["may"] == "failed"
    assert office.left_behind(again) == []


def test_a_run_that_was_cancelled_is_resumed_in_the_midst_of_a_join(office: Office) -> None:
    steps = {"a": act(1), "ask": {"type": "approval", "message": "?"}, "b": act("{{ a }}", needs=["ask", "a"])}
    first = ran(office, steps)
    runs.cancel(first)
    again = runs.resume(first)
    office.go_on([])
    assert kept(again) == ["a"]
    runs.record().decide(again, "ask", Verdict(True, "ann"))
    office.go_on([])
    assert (office.did, office.said(again)) == (["b"], ("completed", None))


def test_what_is_inside_of_a_step_is_taken_over_with_it_or_done_again_with_it(office: Office) -> None:
    office.says["b.1"] = StepError("no")
    first = ran(office, {"a": act("{{ item }}", for_each=[1, 2]), "b": act("{{ item }}", for_each="{{ a }}")})
    office.says.clear()
    again = runs.resume(first)
    office.go_on([])
    assert (kept(again), sorted(office.did), office.output(again, "b")) == (["a"], ["b.0", "b.1"], [1, 2])


def test_what_was_undone_is_done_again_and_what_another_run_did_is_not_undone(office: Office) -> None:
    office.says["c"] = StepError("no")
    undo = {"compensate": act("{{ output }}")}
    steps = {"a": act(1, **undo), "b": act(2), "c": act(1, needs=["a", "b"])}
    first = ran(office, steps)
    assert office.statuses(first)["a.compensate"] == "completed"
    again = runs.resume(first)
    office.go_on([])
    assert kept(again) == ["b"]
    assert office.did == ["a", "c", "a.compensate"]
    second = runs.rerun(first, from_step="c")
    office.go_on([])
    assert kept(second) == ["b"]


def test_a_fork_does_again_what_sees_an_input_that_differs(office: Office) -> None:
    steps = {
        "a": act("{{ input.x }}"),
        "b": act("{{ input.y }}"),
        "c": {"type": "block", "steps": {"inner": act("{{ b + 1 }}")}},
        "d": act("{{ [item, input] }}", for_each=[1]),
    }
    first = ran(office, steps, {"x": 1, "y": 1})
    again = runs.fork(first, {"y": 5})
    office.go_on([])
    assert kept(again) == ["a"]
    assert sorted(office.did) == ["b", "c.inner", "d.0"]
    assert office.output(again, "c") == 6
    assert runs.show(again).input == {"x": 1, "y": 5}
    with pytest.raises(InputError):
        runs.fork(first, {"z": 1})


def test_a_fork_that_changes_nothing_is_closed_at_once(office: Office) -> None:
    first = ran(office, {"a": act("{{ input.x }}")}, {"x": 1}, outputs={"r": "{{ a }}"})
    again = runs.fork(first, {"x": 1})
    office.go_on(list(office.record.sweep({}, resend_after_s=0, reap=True).sends))
    assert office.did == []
    office.attempt(again, "a")
    assert (office.said(again), runs.show(again).outputs) == (("completed", None), {"r": 1})


def test_only_what_has_ended_is_run_again_and_only_what_has_not_completed_is_resumed(office: Office) -> None:
    live = ran(office, {"ask": {"type": "approval", "message": "?"}})
    with pytest.raises(Conflict, match="has not ended, it is waiting_approval: cancel it first, or fork it"):
        runs.rerun(live)
    assert runs.resume(live) == live
    done = ran(office, {"a": act(1)})
    with pytest.raises(Conflict, match="has completed: nothing is left to do"):
        runs.resume(done)
    with pytest.raises(NotFound, match="has no step 'aa'"):
        runs.rerun(done, from_step="aa")
    runs.cancel(live)


def test_a_run_that_was_never_begun_because_its_maker_died_ends(office: Office) -> None:
    first = ran(office, {"a": act(1)})
    plan = Plan.of({"name": "x", "steps": {"a": act(1)}})
    orphan = new_run_id()
    runs.record().create(plan.new_run(orphan, None, '{"v":{}}', origin=(first, "rerun")))
    office.time_comes(orphan, "!begin")
    assert office.said(orphan) == ("failed", "whoever began it died before it was begun")
    # Too late.
    runs.record().adopt(orphan, [("a", {"status": "completed", "origin": first}, '{"v":1}')])
    assert runs.record().begin(orphan, "a", [], {}) == ()
    assert kept(orphan) == []

"""Steps inside of steps, through the executor: as workers do it, and where answers or messages are lost on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import eventually
from office import Deaf, Given, Office
from pydantic import JsonValue

from ferrum.artifacts import Artifacts
from ferrum.errors import Conflict, NotFound, StepError
from ferrum.governance.policy import Policy
from ferrum.loop import LoopThread
from ferrum.plan import Plan, _remembered
from ferrum.record import _PARTITIONS, MAX_SIGNALS, Claimed, Held, Record, Resend, Verdict, base_of, new_run_id
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.scripts import Who
from ferrum.steps import Attempt, step_types

#: How a fleet may fare; what comes of a run is the same.
FARES = ("all is heard", "each answer is lost once", "each message is lost", "each worker dies")


#: The next try is far away, unless a test makes it time.
LATER = {"max_attempts": 2, "backoff": "24h", "max_delay": "24h"}


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.stop()


@pytest.fixture(params=FARES)
def fare(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def office(
    fare: str, clean_redis: str, loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Office]:
    record = (Deaf if fare == FARES[1] else Record)(clean_redis)
    office = Office(record, loop, Artifacts(f"file://{tmp_path}"), mute=fare == FARES[2], deadly=fare == FARES[3])
    monkeypatch.setattr("ferrum.plan.step_types", lambda: {**step_types(), "act": office._type})
    # Most of what is done here is to sweep, which costs by their number.
    monkeypatch.setattr("ferrum.record.PARTITIONS", 2)
    monkeypatch.setattr("ferrum.record._PARTITIONS", _PARTITIONS[:2])
    # A plan holds its step types, and with them the office of another test.
    _remembered.cache_clear()
    yield office
    _remembered.cache_clear()
    record.close_connections()


def act(value: JsonValue = None, **more: Any) -> dict[str, Any]:
    return {"type": "act", "value": value, **more}


def block(steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "block", "steps": steps, **more}


def failing(message: str = "no", *, retry: bool = False) -> StepError:
    return StepError(message, retry=retry)


def times(office: Office, *steps: str) -> tuple[int, ...]:
    """How often each of these was done."""
    return tuple(office.did.count(step) for step in steps)


# for_each.


def test_a_step_is_run_for_each_item_and_leaves_a_list_in_their_order(office: Office) -> None:
    each = act("{{ [index, item + start] }}", for_each="{{ tens }}")
    run = office.run({"tens": act([10, 20, 30]), "start": act(1), "a": each, "b": act("{{ a }}")})
    assert office.output(run, "b") == [[0, 11], [1, 21], [2, 31]]
    assert times(office, "a.0", "a.1", "a.2") == (1, 1, 1)
    assert office.said(run) == ("completed", None)
    assert office.left_behind(run) == []


def test_no_items_leave_an_empty_list(office: Office) -> None:
    run = office.run({"a": act("{{ item }}", for_each=[]), "b": act("{{ a }}")})
    assert (office.output(run, "b"), office.left_behind(run)) == ([], [])


def test_many_items_are_all_done(office: Office) -> None:
    run = office.run({"a": act("{{ item }}", for_each=list(range(450)))})
    assert office.output(run, "a") == list(range(450))
    assert len(office.did) == 450


def test_items_have_their_names_and_those_around_them_too(office: Office) -> None:
    inner = act("{{ row + col + string(row_index) + string(col_index) + x }}", for_each="{{ cols }}", **{"as": "col"})
    body = block({"x": act("{{ row + '!' }}"), "y": inner}, for_each=["a", "b"], output="{{ y }}", **{"as": "row"})
    run = office.run({"cols": act(["c", "d"]), "a": body})
    assert office.output(run, "a") == [["ac00a!", "ad01a!"], ["bc10b!", "bd11b!"]]
    assert times(office, "a.0.x", "a.0.y.1", "a.1.y.1") == (1, 1, 1)
    assert office.left_behind(run) == []


def test_items_may_be_large(office: Office) -> None:
    large = ["x" * 20_000, "y" * 20_000]
    assert office.output(office.run({"a": act("{{ item }}", for_each=large)}), "a") == large


def test_the_first_item_that_fails_ends_the_others(office: Office) -> None:
    office.says["a.1"] = failing()
    steps = {"ask": {"type": "approval", "message": "?"}, "do": act("{{ item }}", needs=["ask"])}
    body = block({"x": act("{{ item }}"), **steps}, for_each=[0, 1, 2, 3])
    run = office.run({"a": act("{{ item }}", for_each=[0, 1, 2, 3], max_parallel=2), "b": act("{{ a }}")})
    assert office.said(run) == ("failed", "'a' failed")
    state = office.state(run)
    assert (state.step("a").error, state.step("b").error) == ("no", "'a' failed")
    assert "a.3" not in office.did
    assert office.left_behind(run) == []
    office.says["a.2.x"] = failing("not this one")
    run = office.run({"a": body})
    assert office.state(run).step("a").error == "'a.2.x' failed: not this one"
    assert office.statuses(run)["a.0.ask"] in ("cancelled", "skipped")
    assert office.said(run) == ("failed", "'a' failed")
    assert office.left_behind(run) == []
    assert office.record.asked() == []


def test_failed_items_can_be_collected_among_the_others(office: Office) -> None:
    office.says["a.1"] = failing()
    run = office.run({"a": act("{{ item }}", for_each=["x", "y", "z"], on_error="collect")})
    assert office.output(run, "a") == ["x", {"error": "no", "index": 1}, "z"]
    assert (office.said(run), office.left_behind(run)) == (("completed", None), [])


def test_a_fan_out_may_fail_where_it_says_so(office: Office) -> None:
    office.says["a.1"] = failing()
    run = office.run({"a": act(1, for_each=[1, 2], on_error="continue"), "b": act("{{ a == null }}")})
    assert office.output(run, "b") is True
    assert office.said(run) == ("completed", None)


def test_what_is_no_list_fails_the_step(office: Office) -> None:
    run = office.run({"word": act("text"), "a": act(1, for_each="{{ word }}")})
    assert "list" in (office.state(run).step("a").error or "")


def test_an_item_is_tried_again_by_itself(office: Office) -> None:
    tries = iter([failing(retry=True), failing(retry=True)])

    def work(params: Given, attempt: Attempt) -> JsonValue:
        for error in tries:
            raise error
        return "at last"

    office.says["a.0"] = work
    run = office.run({"a": act(1, for_each=[1, 2], retry={**LATER, "max_attempts": 3})})
    office.time_comes(run, "a.0")
    office.time_comes(run, "a.0")
    assert (office.output(run, "a"), times(office, "a.0", "a.1")) == (["at last", 1], (3, 1))
    assert office.left_behind(run) == []


# block.


def test_a_block_leaves_what_it_says_or_what_its_last_steps_do(office: Office) -> None:
    inner = {"x": act(1), "y": act("{{ x + one }}")}
    run = office.run(
        {
            "one": act(1),
            "said": block(inner, output={"both": "{{ [x, y, one] }}"}),
            "last": block(inner),
            "several": block({"x": act(1), "y": act(2), "z": act("{{ x }}")}),
        }
    )
    assert {step: office.output(run, step) for step in ("said", "last", "several")} == {
        "said": {"both": [1, 2, 1]}, "last": 2, "several": {"y": 2, "z": 1},
    }  # fmt: skip
    assert times(office, "said.x", "last.y", "several.z") == (1, 1, 1)
    assert office.left_behind(run) == []


def test_what_a_block_leaves_may_name_its_item_and_its_number(office: Office) -> None:
    each = {
        "for_each": [5, 6],
        "as": "one",
        "steps": {"x": act("{{ one + 1 }}")},
        "output": {"of": "{{ one }}", "at": "{{ one_index }}", "x": "{{ x }}"},
    }
    again = {
        "repeat": {"until": "b.round == 3", "max": 5},
        "steps": {"y": act("{{ round }}")},
        "output": {"round": "{{ round }}", "before": "{{ previous == null ? 0 : previous.round }}", "y": "{{ y }}"},
    }
    run = office.run({"a": each, "b": again})
    assert office.output(run, "a") == [{"of": 5, "at": 0, "x": 6}, {"of": 6, "at": 1, "x": 7}]
    assert office.output(run, "b") == {"round": 3, "before": 2, "y": 3}


def test_a_block_fails_as_what_is_inside_of_it_does_once_all_of_it_has_ended(office: Office) -> None:
    office.says["a.x"] = failing()
    run = office.run({"a": block({"x": act(1), "y": act("{{ x }}"), "z": act(3)})})
    assert office.statuses(run) == {"a": "failed", "a.x": "failed", "a.y": "skipped", "a.z": "completed"}
    assert office.state(run).step("a").error == "'a.x' failed: no"
    assert (office.said(run), office.left_behind(run)) == (("failed", "'a' failed"), [])


def test_what_is_inside_may_fail_where_it_says_so(office: Office) -> None:
    office.says["a.x"] = failing()
    run = office.run({"a": block({"x": act(1, on_error="continue"), "y": act("{{ x == null }}")})})
    assert (office.output(run, "a"), office.said(run)) == (True, ("completed", None))


def test_a_block_is_tried_again_as_a_whole(office: Office) -> None:
    office.says["a.1.y"] = failing()
    run = office.run({"a": block({"x": act(1), "y": act("{{ x + 1 }}")}, retry=LATER)})
    office.time_comes(run, "a")
    assert office.output(run, "a") == 2
    assert times(office, "a.1.x", "a.1.y", "a.2.x", "a.2.y") == (1, 1, 1, 1)
    assert office.left_behind(run) == []


def test_a_block_that_takes_too_long_is_cut_off_with_all_that_is_inside_of_it(office: Office) -> None:
    inner = {"ask": {"type": "approval", "message": "?"}, "nap": {"type": "wait", "for": "1h"}}
    deep = block({f"{name}2": step for name, step in inner.items()})
    run = office.run({"a": block({**inner, "deep": deep}, timeout="60s", on_error="continue"), "b": act(1)})
    office.time_comes(run, "a")
    statuses = office.statuses(run)
    assert statuses["a"] == "failed"
    assert {statuses[step] for step in ("a.ask", "a.nap", "a.deep", "a.deep.ask2", "a.deep.nap2")} == {"cancelled"}
    assert "took longer than its timeout of 60" in (office.state(run).step("a").error or "")
    assert (office.said(run), office.left_behind(run)) == (("completed", None), [])


def test_a_condition_of_a_block_is_for_all_of_it(office: Office) -> None:
    run = office.run({"a": block({"x": act(1)}, when="false"), "b": act("{{ a == null }}", when="true")})
    assert office.statuses(run) == {"a": "skipped", "b": "skipped"}
    assert office.did == []


def test_blocks_inside_of_blocks_share_the_names_around_them(office: Office) -> None:
    deep = block({"q": act("{{ top + x }}"), "r": block({"s": act("{{ q + x + top }}")})})
    run = office.run({"top": act(1), "a": block({"x": act(10), "y": deep})})
    assert (office.output(run, "a"), office.left_behind(run)) == (22, [])


# switch.


@pytest.mark.parametrize(
    ("value", "came"), [("red", "r"), (7, "seven"), (True, "yes"), ("other", "else"), ("{{ null }}", "else")]
)
def test_a_switch_takes_the_case_of_its_value(office: Office, fare: str, value: JsonValue, came: str) -> None:
    cases = {"red": act("r"), "7": block({"x": act("seven")}), "true": act("yes")}
    run = office.run({"a": {"type": "switch", "value": value, "cases": cases, "default": act("else")}})
    assert office.output(run, "a") == came
    assert len(office.did) == 1
    assert office.left_behind(run) == []


def test_a_switch_without_a_case_for_its_value_is_skipped(office: Office) -> None:
    switch = {"type": "switch", "value": "{{ v }}", "cases": {"x": act(1)}}
    run = office.run({"v": act("y"), "a": switch, "b": act("{{ [a, v] }}")})
    assert office.state(run).step("a").error == "no case is 'y', and there is no default"
    assert office.output(run, "b") == [None, "y"]
    assert office.left_behind(run) == []


def test_a_switch_fails_as_its_case_does(office: Office) -> None:
    office.says["a.x"] = failing()
    run = office.run({"a": {"type": "switch", "value": "x", "cases": {"x": act(1)}}})
    assert office.state(run).step("a").error == "no"


# repeat.


def test_rounds_go_on_until_the_condition_holds_each_with_what_the_last_one_left(office: Office) -> None:
    loop = {"until": "a >= 6", "max": 9}
    run = office.run({"a": act("{{ round == 1 ? 1 : int(previous) + round }}", repeat=loop), "b": act("{{ a }}")})
    assert office.output(run, "b") == 6
    assert times(office, "a.1", "a.2", "a.3", "a.4") == (1, 1, 1, 0)
    assert office.left_behind(run) == []


def test_the_steps_of_a_round_are_seen_by_its_condition(office: Office) -> None:
    inner = {"x": act("{{ round }}"), "y": act("{{ x * 10 }}")}
    run = office.run({"two": act(2), "a": block(inner, repeat={"until": "x == two && y == 20", "max": 5})})
    assert (office.output(run, "a"), times(office, "a.2.y", "a.3.y")) == (20, (1, 0))


@pytest.mark.parametrize(("on_max", "came"), [("fail", "failed"), ("pass", "completed")])
def test_the_last_round_ends_it(office: Office, fare: str, on_max: str, came: str) -> None:
    run = office.run({"a": act("{{ round }}", repeat={"until": "a > 2", "max": 2, "on_max": on_max})})
    assert (office.said(run)[0], len(office.did)) == (came, 2)
    if on_max == "fail":
        assert "still false after 2 rounds" in (office.state(run).step("a").error or "")
    assert office.left_behind(run) == []


def test_a_round_that_fails_ends_it(office: Office) -> None:
    office.says["a.2"] = failing()
    run = office.run({"a": act("{{ round }}", repeat={"until": "a > 2", "max": 5})})
    assert (office.state(run).step("a").error, len(office.did)) == ("no", 2)


def test_each_item_has_rounds_of_its_own(office: Office) -> None:
    step = act("{{ round * item }}", for_each=[1, 5], repeat={"until": "a >= 5", "max": 9})
    run = office.run({"a": step})
    assert (office.output(run, "a"), times(office, "a.0.5", "a.1.1", "a.1.2")) == ([5, 5], (1, 1, 0))
    assert office.left_behind(run) == []


# fallback.


def test_when_a_step_has_failed_its_alternatives_are_tried_one_after_the_other(office: Office) -> None:
    office.says |= {"a": failing("first"), "a.fallback1.x": failing("second")}
    steps = {"one": act(1), "a": act(0, fallback=[block({"x": act(0)}), act("{{ error + string(one) }}")])}
    run = office.run({**steps, "b": act("{{ a }}")})
    assert office.output(run, "b") == "'a.fallback1.x' failed: second1"
    [done] = [event for event in office.record.events(run) if event.type == "step.completed" and event.step == "a"]
    assert (done.fallback, done.errors) == (2, ("first", "'a.fallback1.x' failed: second"))
    assert times(office, "a", "a.fallback1.x", "a.fallback2") == (1, 1, 1)
    assert office.left_behind(run) == []


def test_when_all_alternatives_fail_the_first_error_is_said_and_the_others_with_it(office: Office) -> None:
    office.says |= {"a": failing("first"), "a.fallback1": failing("second")}
    run = office.run({"a": act(0, fallback=[act(1)])})
    [failed] = [event for event in office.record.events(run) if event.type == "step.failed" and event.step == "a"]
    assert (failed.error, failed.errors) == ("first", ("second",))
    assert (office.said(run), office.left_behind(run)) == (("failed", "'a' failed"), [])


def test_each_item_and_each_block_has_its_own_alternative(office: Office) -> None:
    office.says |= {"a.1": failing("x"), "b.y": failing("y")}
    steps = {
        "a": act("{{ item }}", for_each=[1, 2], fallback=[act("{{ item * 10 }}")]),
        "b": block({"y": act(1)}, fallback=[act("{{ error }}")]),
    }
    run = office.run(steps)
    assert (office.output(run, "a"), office.output(run, "b")) == ([1, 20], "'b.y' failed: y")
    assert office.left_behind(run) == []


def test_a_block_for_each_item_has_its_own_alternative_and_its_own_undoing(office: Office) -> None:
    office.says["b"] = failing()
    body = block({"x": act("{{ item }}"), "y": act("{{ x < 2 ? x : [][0] }}")}, for_each=[1, 2])
    body |= {"fallback": [act("instead")], "compensate": act("{{ output }}")}
    run = office.run({"a": body, "b": act(1, needs=["a"])})
    assert office.output(run, "a") == [1, "instead"]
    assert [office.output(run, f"a.{number}.compensate") for number in (0, 1)] == [1, "instead"]


# What may fail.


def test_a_failure_that_is_tolerated_is_null_to_those_behind_it(office: Office) -> None:
    office.says["a"] = failing()
    run = office.run({"a": act(1, on_error="continue"), "b": act("{{ a == null }}"), "c": act(1, needs=["a"])})
    assert office.statuses(run) == {"a": "failed", "b": "completed", "c": "completed"}
    assert (office.output(run, "b"), office.said(run)) == (True, ("completed", None))


# router.


def router(among: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "router", "among": among, **more}


def test_a_router_takes_the_best_and_the_next_when_that_fails(office: Office) -> None:
    office.says["a.cheap"] = failing()
    among = {"dear": act("d", cost=3), "cheap": act("c", cost=1), "middle": act("m", cost=2)}
    run = office.run({"a": router(among, by="cost")})
    assert (office.output(run, "a"), times(office, "a.cheap", "a.middle", "a.dear")) == ("m", (1, 1, 0))
    assert office.left_behind(run) == []


def test_a_router_all_of_whose_steps_fail_says_why_each_did(office: Office) -> None:
    office.says |= {"a.x": failing("one"), "a.y": failing("two")}
    run = office.run({"a": router({"x": act(1), "y": act(2)})})
    assert office.state(run).step("a").error == "x: one; y: two"
    assert office.said(run) == ("failed", "'a' failed")
    assert office.left_behind(run) == []


def test_a_router_passes_what_is_failing_by(office: Office) -> None:
    for number in range(20):
        office.executor.shared.breaker.report("db", _who(number), ok=False, latency_ms=1)
    run = office.run({"a": router({"x": act(1, target="db"), "y": act(2)}, by=["health", "cost"])})
    assert (office.output(run, "a"), office.did) == (2, ["a.y"])


def _who(number: int) -> Who:
    return Who("run", f"s{number}")


def test_a_router_gives_up_on_what_takes_too_long(office: Office) -> None:
    among = {"slow": {"type": "wait", "for": "1h", "tier": 2}, "quick": act("q", tier=1)}
    run = office.run({"a": router(among, by="tier", timeout="60s")})
    office.time_comes(run, "a")
    assert office.output(run, "a") == "q"
    assert office.statuses(run)["a.slow"] == "cancelled"
    assert office.left_behind(run) == []


# compensate.


def undo(name: str = "undo", **more: Any) -> dict[str, Any]:
    return act([name, "{{ output }}", "{{ params.value }}"], **more)


def test_what_completed_is_undone_in_reverse_when_the_run_fails(office: Office) -> None:
    office.says["c"] = failing()
    steps = {
        "one": act(1),
        "a": act("{{ one + 1 }}", compensate=undo()),
        "b": act("{{ a + 1 }}", compensate=block({"x": act("{{ [output, a] }}"), "y": act("{{ x }}")})),
        "c": act(1, needs=["b"], compensate=undo()),
        "d": act(1, needs=["c"]),
    }
    run = office.run(steps)
    assert office.did == ["one", "a", "b", "c", "b.compensate.x", "b.compensate.y", "a.compensate"]
    assert office.output(run, "a.compensate") == ["undo", 2, 2]
    assert office.output(run, "b.compensate") == [3, 2]
    assert office.said(run) == ("failed", "'c' failed")
    kinds = [event.type for event in office.record.events(run) if event.type.startswith("run.")]
    assert kinds == ["run.created", "run.started", "run.compensating", "run.ended"]


def test_what_undoes_in_several_steps_sees_the_parameters_of_what_it_undoes(office: Office) -> None:
    office.says["b"] = failing()
    again = act("{{ [item, index, params.value, output] }}", for_each=["x", "y"])
    steps = {
        "one": act(1),
        "a": act("{{ item + index + one }}", for_each=[10, 20], compensate=block({"deep": again})),
        "b": act(1, needs=["a"]),
    }
    run = office.run(steps)
    assert office.output(run, "a.1.compensate") == [["x", 0, 22, 22], ["y", 1, 22, 22]]
    assert office.output(run, "a.0.compensate") == [["x", 0, 11, 11], ["y", 1, 11, 11]]
    assert office.said(run) == ("failed", "'b' failed")


def test_what_completed_is_undone_when_the_run_is_cancelled(office: Office) -> None:
    steps = {"a": act(1, compensate=undo()), "b": {"type": "approval", "message": "?", "needs": ["a"]}}
    run = office.run(steps)
    assert office.record.status(run) is RunStatus.WAITING_APPROVAL
    sends = office.record.cancel(run, "ann", "enough")
    assert office.record.status(run) is RunStatus.COMPENSATING
    with pytest.raises(Conflict, match="is being undone"):
        office.record.cancel(run, "bob")
    with pytest.raises(Conflict, match="the run is compensating"):
        office.record.decide(run, "b", Verdict(True, "bob"))
    office.go_on([] if office.mute else sends)
    assert office.said(run) == ("cancelled", "enough")
    assert office.statuses(run) == {"a": "completed", "b": "cancelled", "a.compensate": "completed"}


def test_a_run_that_completes_undoes_nothing(office: Office) -> None:
    run = office.run({"a": act(1, compensate=undo())})
    assert (office.did, office.said(run)) == (["a"], ("completed", None))


def test_what_could_not_be_undone_is_said_and_the_rest_is_undone_all_the_same(office: Office) -> None:
    office.says |= {"z": failing(), "b.compensate": failing("not now"), "a.compensate": failing("never")}
    steps = {name: act(1, compensate=undo()) for name in "ab"} | {"z": act(1, needs=["a", "b"])}
    run = office.run(steps | {"c": act(1, compensate=undo(), needs=["a", "b"])})
    status, reason = office.said(run)
    assert status == "failed"
    assert reason is not None
    first, _, rest = reason.partition("; not undone: ")
    assert (first, sorted(rest.split(", "))) == ("'z' failed", ["'a'", "'b'"])
    assert times(office, "a.compensate", "b.compensate", "c.compensate") == (1, 1, 1)


def test_undoing_is_tried_again(office: Office) -> None:
    tries = iter([failing("busy", retry=True)])

    def undoes(params: Given, attempt: Attempt) -> JsonValue:
        for error in tries:
            raise error
        return params.value

    office.says |= {"b": failing(), "a.compensate": undoes}
    run = office.run({"a": act(1, compensate=undo(retry=LATER)), "b": act(1, needs=["a"])})
    assert office.record.status(run) is RunStatus.COMPENSATING
    office.time_comes(run, "a.compensate")
    assert (office.output(run, "a.compensate"), office.said(run)) == (["undo", 1, 1], ("failed", "'b' failed"))


def test_what_undoes_and_lost_its_worker_is_done_by_another(office: Office) -> None:
    office.says["b"] = failing()
    run = office.submit({"a": act(1, compensate=undo()), "b": act(1, needs=["a"])})
    for step in ("a", "b"):
        office.attempt(run, step)
    held = Held(run, "a.compensate", "dead#1")
    assert isinstance(office.record.claim(held, "dead", 0.001), Claimed)
    office.go_on(_swept(office))
    assert (office.output(run, "a.compensate"), office.said(run)) == (["undo", 1, 1], ("failed", "'b' failed"))
    assert "a.compensate" in [event.step for event in office.record.events(run) if event.type == "step.lost"]


def _swept(office: Office) -> list[Any]:
    """What the sweeper finds, as soon as it finds something."""
    return list(eventually(office.sweep, every_s=0.005))


def test_what_is_undone_is_not_begun_out_of_turn(office: Office) -> None:
    run = office.submit({"a": act(1, compensate=undo()), "b": act(1, needs=["a"])})
    office.attempt(run, "a")
    office.attempt(run, "a.compensate")
    assert office.did == ["a"]


def test_each_item_is_undone(office: Office) -> None:
    office.says["b"] = failing()
    run = office.run({"a": act("{{ item }}", for_each=[1, 2], compensate=undo("{{ item }}")), "b": act(needs=["a"])})
    assert office.output(run, "a.0.compensate") == [1, 1, 1]
    assert office.output(run, "a.1.compensate") == [2, 2, 2]
    assert office.said(run) == ("failed", "'b' failed")


# What the policy has against it.


@pytest.mark.parametrize(
    "around",
    [
        {"for_each": [1, 2]},
        {"repeat": {"until": "a == 1", "max": 2}},
        {"fallback": [{"type": "tool", "tool": "git.log", "input": {}}]},
        {},
    ],
)
def test_what_the_policy_denies_inside_of_a_step_blocks_the_run(
    office: Office, fare: str, around: dict[str, Any]
) -> None:
    office.executor.policy = Policy.of({})
    call = {"type": "tool", "tool": "git.log", "input": {}}
    run = office.run({"a": call | around if around else block({"x": call})})
    status, reason = office.said(run)
    assert (status, "nothing allows tool 'git.log'" in (reason or "")) == ("policy_blocked", True)
    assert office.left_behind(run) == []


def test_what_is_denied_and_may_fail_blocks_nothing(office: Office) -> None:
    office.executor.policy = Policy.of({})
    call = {"type": "tool", "tool": "git.log", "input": {}}
    run = office.run({"a": block({"x": {**call, "on_error": "continue"}}), "b": {**call, "on_error": "continue"}})
    assert office.said(run) == ("completed", None)
    run = office.run({"a": call | {"for_each": [1], "on_error": "collect"}})
    assert office.said(run) == ("completed", None)


def test_a_denied_step_of_a_router_gives_way_to_the_next_and_is_not_held_against_its_target(office: Office) -> None:
    office.executor.policy = Policy.of({})
    among = {"x": {"type": "tool", "tool": "git.log", "input": {}, "tier": 2}, "y": act("y", tier=1)}
    run = office.run({"a": router(among, by="tier")})
    assert (office.output(run, "a"), office.said(run)) == ("y", ("completed", None))
    assert office.executor.shared.breaker.health(["git"])["git"].failures == 0


# Where a run is served.


def test_of_a_wide_fan_out_only_the_first_items_are_served_as_the_run_is(office: Office) -> None:
    run = office.submit({"a": act(1, for_each=list(range(103)))})
    lanes = {one.step_id: one.lane for one in office.attempt(run, "a").sends}
    if lanes:  # Else they were said once, and not heard.
        assert (lanes["a.0"], lanes["a.99"], lanes["a.100"], lanes["a.102"]) == (4, 4, 9, 9)
    office.go_on([])
    office.go_on([] if office.mute else [Resend(run, step, "", lane) for step, lane in lanes.items()])
    assert (office.said(run), office.left_behind(run)) == (("completed", None), [])


def test_who_has_many_runs_waits_behind_who_has_few(office: Office) -> None:
    def lane_of(run: str) -> Any:
        return office.record._redis.hget(f"{base_of(run)}:run:{run}", "lane")

    plan = Plan.of({"name": "x", "steps": {"a": act(1)}})
    first = new_run_id("one partition")

    def begin(tenant: str, *, beside: str = first) -> str:
        made = plan.new_run(new_run_id(beside=beside), None, '{"v":{}}', tenant=tenant)
        return office.record.create(made).run_id

    many = [begin("many") for _ in range(9)]
    assert [lane_of(run) for run in many] == ["4"] * 8 + ["9"]
    assert lane_of(begin("few")) == "4"
    for run in many[:2]:
        office.record.cancel(run, "ann")
    assert lane_of(begin("many")) == "4"


# deadline.


def test_a_step_that_is_not_over_by_its_deadline_fails_whatever_it_waits_for(office: Office) -> None:
    body = block({"ask": {"type": "approval", "message": "?"}}, deadline="60s", on_error="continue")
    run = office.run({"a": body, "b": act("{{ a == null }}")})
    assert office.record.status(run) is RunStatus.WAITING_APPROVAL
    office.time_comes(run, "a!d")
    assert office.state(run).step("a").error == "was not over by its deadline of 60 s"
    assert office.statuses(run)["a.ask"] == "cancelled"
    assert (office.output(run, "b"), office.said(run)) == (True, ("completed", None))
    assert office.left_behind(run) == []


def test_the_last_step_of_a_run_may_be_late_too(office: Office) -> None:
    nap = {"type": "wait", "for": "1h", "deadline": "60s", "on_error": "continue"}
    run = office.run({"a": nap}, outputs={"r": "{{ a == null }}"})
    office.time_comes(run, "a!d")
    assert (office.said(run), office.state(run).outputs) == (("completed", None), '{"v":{"r":true}}')


def test_a_step_that_was_never_claimed_may_be_late(office: Office) -> None:
    run = office.submit({"a": act(1, deadline="60s")})
    office.time_comes(run, "a!d")
    assert (office.said(run), office.did) == (("failed", "'a' failed"), [])


def test_the_end_of_a_run_leaves_no_deadline_behind(office: Office) -> None:
    nap: dict[str, Any] = {"type": "wait", "for": "1h"}
    steps = {"a": nap | {"deadline": "2h"}, "b": block({"x": nap | {"deadline": "3h"}}), "c": act(deadline="4h")}
    run = office.submit(steps)
    office.go_on(office.heads(run)[:2])
    office.record.cancel(run, "ann")
    client, base = office.record._redis, base_of(run)
    assert client.zrange(f"{base}:timers", 0, -1) == []
    assert client.exists(f"{base}:late:{run}") == 0


def test_an_inner_step_has_its_own_deadline(office: Office) -> None:
    body = block({"x": {"type": "wait", "for": "1h", "deadline": "60s"}, "y": act("{{ x }}")})
    run = office.run({"a": body})
    office.time_comes(run, "a.x!d")
    assert office.statuses(run) == {"a": "failed", "a.x": "failed", "a.y": "skipped"}
    assert office.left_behind(run) == []


def test_what_was_in_time_is_not_late_afterwards(office: Office) -> None:
    run = office.run({"a": act(1, deadline="60s"), "b": {"type": "approval", "message": "?", "needs": ["a"]}})
    with pytest.raises(AssertionError, match="no timer"):
        office.time_comes(run, "a!d")
    assert office.record.status(run) is RunStatus.WAITING_APPROVAL


def test_a_run_that_is_not_over_by_its_deadline_fails(office: Office) -> None:
    run = office.run({"a": {"type": "approval", "message": "?"}}, deadline="60s")
    office.time_comes(run, "!deadline")
    assert office.said(run) == ("failed", "its deadline has passed")
    assert office.record.asked() == []


# wait.


def test_a_step_waits_for_its_time(office: Office) -> None:
    until = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 3600))
    run = office.run({"a": {"type": "wait", "until": until}, "b": {"type": "wait", "for": "0s"}, "c": act("{{ b }}")})
    assert office.statuses(run) == {"a": "waiting", "b": "completed", "c": "completed"}
    # Woken too early it goes on waiting.
    office.time_comes(run, "a")
    assert office.statuses(run)["a"] == "waiting"
    office.record.cancel(run, "ann")


def send_signal(office: Office, run: str, name: str, data: str) -> None:
    sends = office.record.signal(run, name, f'{{"v":{data}}}', "ann")
    office.go_on([] if office.mute else sends)


def test_a_signal_wakes_the_step_that_waits_for_it_with_its_data(office: Office) -> None:
    run = office.run({"a": {"type": "wait", "signal": "go"}, "b": act("{{ a.x }}")})
    assert office.statuses(run) == {"a": "waiting"}
    send_signal(office, run, "stop", "0")
    assert office.statuses(run) == {"a": "waiting"}
    send_signal(office, run, "go", '{"x":7}')
    assert (office.output(run, "b"), office.said(run)) == (7, ("completed", None))
    with pytest.raises(Conflict, match="it is completed"):
        send_signal(office, run, "go", "1")
    with pytest.raises(NotFound, match="there is no run"):
        office.record.signal(run[:-5] + "00000", "go", "{}", "ann")


def test_signals_that_nobody_waits_for_yet_are_kept_in_their_order(office: Office) -> None:
    wait = {"type": "wait", "signal": "go"}
    run = office.submit(
        {"a": wait, "b": {**wait, "needs": ["a"]}, "c": act("{{ [a, b] }}"), "d": {**wait, "needs": ["c"]}}
    )
    for data in "123":
        send_signal(office, run, "go", data)
    office.go_on(office.heads(run))
    assert (office.output(run, "c"), office.output(run, "d")) == ([1, 2], 3)
    assert office.left_behind(run) == []


def test_of_two_steps_that_wait_for_a_signal_each_gets_one_the_first_first(office: Office) -> None:
    wait = {"type": "wait", "signal": "go"}
    run = office.run({"a": wait, "b": wait})
    send_signal(office, run, "go", '"first"')
    assert sorted(office.statuses(run).values()) == ["completed", "waiting"]
    send_signal(office, run, "go", '"second"')
    first = next(event.step for event in office.record.events(run) if event.type == "step.waiting")
    assert office.output(run, first) == "first"
    assert office.said(run) == ("completed", None)


def test_a_signal_is_waited_for_only_so_long(office: Office) -> None:
    wait = {"type": "wait", "signal": "go", "timeout": "60s", "on_error": "continue"}
    run = office.run({"a": wait, "b": {"type": "wait", "signal": "go"}})
    office.time_comes(run, "a")
    assert office.state(run).step("a").error == "no signal 'go' came within 60 s"
    # Who waits no longer takes nothing away from who does.
    send_signal(office, run, "go", "1")
    assert (office.output(run, "b"), office.said(run)) == (1, ("completed", None))


def test_so_many_signals_are_kept_and_no_more(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrum.record.MAX_SIGNALS", 2)
    run = office.run({"a": {"type": "approval", "message": "?"}})
    send_signal(office, run, "go", "1")
    # In a run that never waits for it.
    sends = office.record.signal(run, "go", '{"v":2}', "ann")
    assert sends == ()
    with pytest.raises(Conflict, match="keeps 2 signals 'go'"):
        office.record.signal(run, "go", '{"v":3}', "ann")
    assert MAX_SIGNALS == 1000


# workflow.


def inner(steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "workflow", "workflow": {"name": "inner", "steps": steps, **more}}


def children(office: Office, run: str) -> list[str]:
    return [
        one.run_id for one in office.record.runs() if getattr(office.record.events(one.run_id)[0], "parent", None)
        and office.record.events(one.run_id)[0].parent[0] == run  # type: ignore[union-attr,index]
    ]  # fmt: skip


def test_a_run_inside_of_a_step_leaves_its_outputs(office: Office) -> None:
    sub = inner(
        {"x": act("{{ input.n }}")}, inputs={"n": {"type": "integer"}}, outputs={"double": "{{ x * 2 }}"}
    ) | {"input": {"n": "{{ one + 20 }}"}}  # fmt: skip
    run = office.run({"one": act(1), "a": sub, "b": act("{{ a.double }}")})
    assert (office.output(run, "b"), office.said(run)) == (42, ("completed", None))
    [child] = children(office, run)
    assert (office.said(child), office.left_behind(child), office.left_behind(run)) == (("completed", None), [], [])


def test_a_step_fails_as_the_run_inside_of_it_does(office: Office) -> None:
    office.says["x"] = failing()
    run = office.run({"a": inner({"x": act(1)})})
    [child] = children(office, run)
    assert office.state(run).step("a").error == f"{child} failed: 'x' failed"
    assert office.left_behind(run) == []


def test_a_run_inside_is_tried_again_by_a_new_run(office: Office) -> None:
    tries = iter([failing()])

    def work(params: Given, attempt: Attempt) -> JsonValue:
        for error in tries:
            raise error
        return "done"

    office.says["x"] = work
    run = office.run({"a": inner({"x": act(1)}, outputs={"r": "{{ x }}"}) | {"retry": LATER}})
    office.time_comes(run, "a")
    assert (office.output(run, "a"), len(children(office, run))) == ({"r": "done"}, 2)


def test_a_run_inside_ends_with_the_one_around_it(office: Office) -> None:
    deep = inner({"y": inner({"z": {"type": "wait", "for": "1h"}})})
    run = office.run({"a": deep})
    [child] = children(office, run)
    [grandchild] = children(office, child)
    sends = office.record.cancel(run, "ann")
    assert sends == ()
    assert office.said(run)[0] == "cancelled"
    for one in (child, grandchild):
        assert office.said(one) == ("cancelled", "what it is part of has ended")


def test_a_run_inside_ends_with_the_step_around_it(office: Office) -> None:
    nap = inner({"z": {"type": "wait", "for": "1h"}})
    run = office.run({"a": nap | {"timeout": "60s", "on_error": "continue"}, "b": block({"x": nap}, timeout="60s")})
    first, second = sorted(children(office, run), key=lambda one: office.record.events(one)[0].parent[1])  # type: ignore[union-attr,index]
    office.time_comes(run, "a")
    assert office.said(first)[0] == "cancelled"
    office.time_comes(run, "b")
    assert office.said(second) == ("cancelled", "what it is part of has ended")
    assert (office.said(run), office.left_behind(run)) == (("failed", "'b' failed"), [])


def assert_nothing_waits(office: Office, *runs: str) -> None:
    """Of runs that were cut off, and so have counters that are not even."""
    assert [found for run in runs for found in office.left_behind(run) if not found.startswith("active")] == []


def test_what_the_run_inside_did_is_undone_before_what_was_done_before_it(office: Office) -> None:
    """The outer run ended at once, and its own undoing went on beside that of the run inside."""
    tries = iter([failing("busy", retry=True)])

    def undoes(params: Given, attempt: Attempt) -> JsonValue:
        for error in tries:
            raise error
        return None

    office.says["x.compensate"] = undoes
    deep = inner({"x": act(1, compensate=undo(retry=LATER)), "y": {"type": "wait", "for": "1h", "needs": ["x"]}})
    run = office.run({"a": act(1, compensate=undo()), "b": {**inner({"mid": deep}), "needs": ["a"]}})
    [child] = children(office, run)
    [grandchild] = children(office, child)
    sends = office.record.cancel(run, "ann", "enough")
    office.go_on([] if office.mute else sends)
    for one in (run, child, grandchild):
        assert office.record.status(one) is RunStatus.COMPENSATING
    assert times(office, "x.compensate", "a.compensate") == (1, 0)
    office.time_comes(grandchild, "x.compensate")
    assert office.did[-2:] == ["x.compensate", "a.compensate"]
    assert office.said(run) == ("cancelled", "enough")
    assert [office.said(one)[0] for one in (child, grandchild)] == ["cancelled"] * 2
    assert_nothing_waits(office, run, child, grandchild)


def test_a_run_is_not_undone_while_one_that_a_step_of_it_gave_up_is(office: Office) -> None:
    tries = iter([failing("busy", retry=True)])

    def undoes(params: Given, attempt: Attempt) -> JsonValue:
        for error in tries:
            raise error
        return None

    office.says["x.compensate"] = undoes
    office.says["z"] = failing()
    long = inner({"x": act(1, compensate=undo(retry=LATER)), "y": {"type": "wait", "for": "1h", "needs": ["x"]}})
    steps = {"a": act(1, compensate=undo()), "b": {**long, "needs": ["a"], "timeout": "60s", "on_error": "continue"}}
    run = office.run({**steps, "z": act(needs=["b"])})
    [child] = children(office, run)
    office.time_comes(run, "b")
    assert [office.record.status(one) for one in (run, child)] == [RunStatus.COMPENSATING] * 2
    assert times(office, "z", "x.compensate", "a.compensate") == (1, 1, 0)
    office.time_comes(child, "x.compensate")
    assert (office.said(run), office.said(child)[0]) == (("failed", "'z' failed"), "cancelled")
    assert office.did[-1] == "a.compensate"
    assert_nothing_waits(office, run, child)


def test_a_run_waits_for_a_person_when_the_run_inside_of_it_does(office: Office) -> None:
    run = office.run({"a": inner({"x": {"type": "approval", "message": "?"}}, outputs={"by": "{{ x.by }}"})})
    [child] = children(office, run)
    assert {office.record.status(one) for one in (run, child)} == {RunStatus.WAITING_APPROVAL}
    sends = office.record.decide(child, "x", Verdict(True, "ann"))
    assert {office.record.status(one) for one in (run, child)} == {RunStatus.RUNNING}
    office.go_on([] if office.mute else sends)
    assert office.output(run, "a") == {"by": "ann"}
    assert (office.left_behind(run), office.left_behind(child)) == ([], [])


def test_a_run_does_not_wait_for_a_person_while_anything_else_goes_on(office: Office) -> None:
    nap: dict[str, Any] = {"type": "wait", "for": "1h"}
    run = office.run({"a": inner({"x": {"type": "approval", "message": "?"}}), "b": nap})
    [child] = children(office, run)
    assert (office.record.status(child), office.record.status(run)) == (
        RunStatus.WAITING_APPROVAL, RunStatus.RUNNING,
    )  # fmt: skip
    office.record.cancel(child, "ann")
    office.go_on(office.sweep())
    office.record.cancel(run, "ann")


def calls(params: Given, attempt: Attempt) -> Any:
    from test_executor import LOG

    return attempt.perform(LOG)


def test_what_a_run_inside_uses_counts_in_both_and_its_own_budget_ends_it(office: Office) -> None:
    office.actors.on("git.log", 1)
    call = {"type": "tool", "tool": "git.log", "input": {}}
    sub = inner({"x": call, "y": {**call, "needs": ["x"]}}, budget={"tool_calls": 1})
    run = office.run({"a": {**sub, "on_error": "continue"}, "b": {**call, "needs": ["a"]}}, budget={"tool_calls": 2})
    [child] = children(office, run)
    assert office.said(child) == ("budget_killed", "budget.tool_calls is used up")
    assert office.state(run).step("a").error == f"{child} budget_killed: budget.tool_calls is used up"
    # One call in the run inside and one outside of it are the two that there may be.
    assert (office.said(run), len(office.actors.done)) == (("completed", None), 2)
    assert office.state(child).usage == Usage(tool_calls=1)
    assert office.state(run).usage == Usage(tool_calls=1)


def test_a_run_inside_that_would_pass_the_budget_around_it_ends_both(office: Office) -> None:
    office.actors.on("git.log", 1)
    call = {"type": "tool", "tool": "git.log", "input": {}}
    sub = inner({"x": call, "y": {**call, "needs": ["x"]}}, budget={"tool_calls": 9})
    run = office.run({"a": inner({"deep": sub}), "b": act(1)}, budget={"tool_calls": 1})
    assert office.said(run) == ("budget_killed", "budget.tool_calls is used up")
    [child] = children(office, run)
    [grandchild] = children(office, child)
    assert office.said(child)[0] == office.said(grandchild)[0] == "cancelled"
    assert len(office.actors.done) == 1


def test_a_budget_of_the_step_is_that_of_the_run_inside(office: Office) -> None:
    office.actors.on("git.log", 1)
    sub = inner({"x": {"type": "tool", "tool": "git.log", "input": {}}}) | {"budget": {"tool_calls": 0}}
    run = office.run({"a": sub})
    assert "budget.tool_calls is used up" in (office.state(run).step("a").error or "")


def test_a_policy_that_blocks_the_run_inside_blocks_the_one_around_it(office: Office) -> None:
    office.executor.policy = Policy.of({})
    run = office.run({"a": inner({"x": {"type": "tool", "tool": "git.log", "input": {}}})})
    assert office.said(run)[0] == "policy_blocked"


def test_runs_are_inside_of_each_other_only_so_deep(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrum.record.MAX_DEPTH", 2)
    run = office.run({"a": inner({"b": inner({"c": act(1)})})})
    [child] = children(office, run)
    assert "inside of each other more than" in (office.state(child).step("b").error or "")
    assert office.said(run) == ("failed", "'a' failed")
    assert office.did == []


def test_a_registered_workflow_is_run_by_its_name(office: Office) -> None:
    def document(value: int) -> str:
        return json.dumps({"name": "shared", "steps": {"x": act(value)}, "outputs": {"v": "{{ x }}"}})

    office.record.register("shared", "1", document(1))
    office.record.register("shared", "2", document(2))
    office.record.register("shared", "1", document(1))
    with pytest.raises(Conflict, match="version '1' of workflow 'shared' is registered and says something else"):
        office.record.register("shared", "1", document(3))
    run = office.run({
        "old": {"type": "workflow", "name": "shared", "version": "2"}, "new": {"type": "workflow", "name": "shared"},
        "odd": {"type": "workflow", "name": "shared", "version": "22", "on_error": "continue"},
        "none": {"type": "workflow", "name": "nothing", "on_error": "continue"},
    })  # fmt: skip
    assert (office.output(run, "old"), office.output(run, "new")) == ({"v": 2}, {"v": 1})
    state = office.state(run)
    assert "has no version '22'" in (state.step("odd").error or "")
    assert "no workflow 'nothing' is registered" in (state.step("none").error or "")
    assert [(name, version) for name, version, _ in office.record.registrations()] == [("shared", "1"), ("shared", "2")]


# cache, concurrency, rate.


def test_what_was_computed_once_is_taken_from_the_cache_by_other_runs(office: Office) -> None:
    steps = {"k": act("x"), "a": act([1], cache={"key": "{{ k }}", "ttl": "1h"})}
    first, second = office.run(steps), office.run(steps)
    assert (office.output(second, "a"), office.output(first, "a"), office.did.count("a")) == ([1], [1], 1)
    done: Any = [event for event in office.record.events(second) if event.type == "step.completed"][-1]
    assert done.cached
    other = office.run({**steps, "k": act("y")})
    assert (office.said(other), office.did.count("a")) == (("completed", None), 2)


@pytest.mark.parametrize("kind", ["completes", "fails"])
def test_what_another_step_computes_is_waited_for_and_computed_by_another_when_it_fails(
    office: Office, fare: str, kind: str
) -> None:
    step = {"type": "block", "steps": {"x": {"type": "wait", "signal": "go", "timeout": "9h"}, "y": act("{{ x }}")}}
    steps = {"a": {**step, "cache": {"key": "k", "ttl": "1h", "scope": "global"}}}
    first, second = office.run(steps), office.run(steps)
    assert office.statuses(second) == {"a": "waiting"}
    if kind == "completes":
        send_signal(office, first, "go", "7")
        assert office.output(second, "a") == 7
        assert office.did == ["a.y"]
    else:
        office.says["a.y"] = failing()
        send_signal(office, first, "go", "7")
        assert office.said(first) == ("failed", "'a' failed")
        office.says.clear()
        send_signal(office, second, "go", "8")
        assert office.output(second, "a") == 8
    assert office.left_behind(second) == []


def test_only_so_many_run_at_once_and_the_next_has_its_turn_when_one_ends(office: Office) -> None:
    limit = {"concurrency": {"key": "{{ k }}", "limit": 1}}
    steps = {"k": act("one"), "a": block({"x": {"type": "wait", "signal": "go"}}, **limit)}
    first, second = office.run(steps), office.run(steps)
    assert office.statuses(second) == {"k": "completed", "a": "waiting"}
    send_signal(office, first, "go", "1")
    assert office.said(first) == ("completed", None)
    assert office.statuses(second) == {"k": "completed", "a": "waiting", "a.x": "waiting"}
    send_signal(office, second, "go", "2")
    assert (office.output(second, "a"), office.left_behind(second)) == (2, [])


def test_a_slot_is_free_again_when_its_run_was_cancelled(office: Office) -> None:
    steps = {"a": block({"x": {"type": "wait", "signal": "go"}}, concurrency={"key": "k", "limit": 1})}
    first, second = office.run(steps), office.run(steps)
    office.record.cancel(first, "ann")
    office.go_on(office.executor.keep_shared())
    assert office.statuses(second) == {"a": "waiting", "a.x": "waiting"}


def test_what_a_cancelled_run_was_computing_is_computed_by_another(office: Office) -> None:
    body = block({"x": {"type": "wait", "signal": "go"}}, cache={"key": "k", "ttl": "1h", "scope": "global"})
    first, second = office.run({"a": body}), office.run({"a": body})
    assert office.statuses(second) == {"a": "waiting"}
    office.record.cancel(first, "ann")
    office.go_on(office.executor.keep_shared())
    assert office.statuses(second) == {"a": "waiting", "a.x": "waiting"}


def test_a_turn_that_came_before_the_step_was_parked_is_not_missed(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"a": block({"x": {"type": "wait", "signal": "go"}}, concurrency={"key": "k", "limit": 1})}
    first, second = office.run(steps), office.submit(steps)
    real = office.record.park

    def park(held: Held, kind: str, *data: Any, **more: Any) -> Any:
        if kind == "limit":
            office.executor.shared.limits.leave(Who(first, "a"), "k")
        return real(held, kind, *data, **more)

    monkeypatch.setattr(office.record, "park", park)
    office.go_on(office.heads(second))
    assert office.statuses(second) == {"a": "waiting", "a.x": "waiting"}


def test_a_step_that_waits_for_a_person_lets_others_in_meanwhile(office: Office) -> None:
    limit = {"concurrency": {"key": "k", "limit": 1}}
    run = office.run({"ask": {"type": "approval", "message": "?", **limit}, "a": act(1, **limit)})
    assert office.statuses(run) == {"ask": "waiting", "a": "completed"}
    sends = office.record.decide(run, "ask", Verdict(True, "ann"))
    office.go_on([] if office.mute else sends)
    assert (office.said(run), office.left_behind(run)) == (("completed", None), [])


def test_only_so_many_start_in_a_time(office: Office) -> None:
    step = act("{{ item }}", for_each=[1, 2], rate={"key": "k", "limit": 1, "per": "1h"})
    run = office.run({"a": step})
    assert sorted(office.statuses(run).values()) == ["completed", "waiting", "waiting"]
    [waits] = [event for event in office.record.events(run) if event.type == "step.waiting" and event.kind == "limit"]
    assert waits.wakes_in is not None
    office.record.nudge(run)
    office.record.cancel(run, "ann")


# A worker that dies, a lease that is lost.


def test_a_composed_step_whose_worker_died_goes_on_with_what_is_inside_of_it(office: Office) -> None:
    run = office.submit({"a": block({"x": act(1), "y": act("{{ x }}")})})
    held = Held(run, "a", "dead#1")
    assert isinstance(office.record.claim(held, "dead", 0.001), Claimed)
    office.go_on(_swept(office))
    assert (office.output(run, "a"), office.left_behind(run)) == (1, [])


def test_a_composed_step_whose_worker_died_after_its_parts_had_ended_does_not_do_them_again(office: Office) -> None:
    run = office.submit({"a": block({"x": act(1)})})
    office.attempt(run, "a")
    office.attempt(run, "a.x")
    held = Held(run, "a", "dead#1")
    assert isinstance(office.record.claim(held, "dead", 0.001), Claimed)
    office.go_on(_swept(office))
    assert (office.output(run, "a"), office.did) == (1, ["a.x"])


def test_what_is_inside_is_not_begun_before_its_time_or_after_it(office: Office) -> None:
    run = office.submit({"a": act("{{ item }}", for_each=[1, 2, 3], max_parallel=1)})
    office.attempt(run, "a.0")
    office.attempt(run, "a")
    office.attempt(run, "a.1")
    assert office.did == []
    office.attempt(run, "a.0")
    office.attempt(run, "a.1")
    assert office.did == ["a.0", "a.1"]
    office.record.cancel(run, "ann")


def test_a_stopping_worker_hands_inner_steps_back(office: Office) -> None:
    office.executor.holds.stop_all()
    run = office.submit({"a": block({"x": act(1)})})
    office.attempt(run, "a")
    assert office.record.state(run).step("a").status is StepStatus.PENDING
    office.record.cancel(run, "ann")

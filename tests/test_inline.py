"""A run in this process does what it does on a fleet, and a test can say what its steps do."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import user_tasks  # noqa: F401 - the tasks that `run_inline` calls

import ferrum.runs
from ferrum.artifacts import Artifacts
from ferrum.errors import InputError, StepError, WorkflowError
from ferrum.events import fold
from ferrum.governance.policy import Policy
from ferrum.inline import Stuck, execute
from ferrum.plan import Plan
from ferrum.record import Verdict, base_of
from ferrum.results import Usage
from ferrum.testing import InlineRun, Scripted, Sent, Shared
from ferrum.testing import run_inline as run_inline_by_policy
from ferrum.testing.actors import ScriptedActors

Json = Any


def run_inline(*arguments: Any, **more: Any) -> InlineRun:
    """With a policy that allows the tests' own tasks, where a test says nothing of it."""
    return run_inline_by_policy(*arguments, **{"policy": {"allow": ["task:user.*"]}, **more})


def echo(value: Json, **more: Json) -> Json:
    return {"type": "task", "task": "user.echo", "input": {"value": value}, **more}


def boom(message: str = "no", **more: Json) -> Json:
    return {"type": "task", "task": "user.boom", "input": {"message": message}, **more}


def workflow(steps: Json, outputs: Json = None, **more: Json) -> Json:
    inputs = {"xs": {"type": "array", "default": [1, 2, 3]}}
    return {"name": "tried", "inputs": inputs, "steps": steps, "outputs": outputs or {}, **more}


_BAD_SECOND = {"type": "switch", "value": "{{ item }}", "cases": {"2": boom("bad")}, "default": echo("{{ item }}")}
_INNER = {
    "name": "inner",
    "inputs": {"n": {"type": "integer"}},
    "steps": {"s": echo("{{ input.n + 1 }}")},
    "outputs": {"o": "{{ s }}"},
}

#: Workflows that go the same way in this process and on a fleet.
ALIKE: dict[str, Json] = {
    # See `OVERDUE`.
    "a deadline": workflow({"w": {"type": "wait", "signal": "never", "deadline": "1h"}, "x": echo(1, needs=["w"])}),
    "the deadline of a run": workflow({"w": {"type": "wait", "signal": "never"}}, deadline="1h"),
    "a chain": workflow({"a": echo(1), "b": echo("{{ a + 1 }}")}, {"r": "{{ b }}"}),
    "a cross": workflow({"a": echo(1), "b": echo(2), "c": echo("{{ a + b }}"), "d": echo("{{ b }}")}, {"r": "{{ c }}"}),
    "what is behind a failure is skipped": workflow({"a": boom(), "b": echo("{{ a }}"), "c": echo("{{ b }}")}),
    "a false when": workflow({"a": echo(1, when="1 > 2"), "b": echo("{{ a }}"), "c": echo(1)}, {"r": "{{ b }}"}),
    "a join behind a skipped step": workflow(
        {"a": echo(1, when="false"), "b": echo(2), "c": echo(["{{ a }}", "{{ b }}"])}, {"r": "{{ c }}"}
    ),
    "a failure that may be": workflow({"a": boom(on_error="continue"), "b": echo("{{ a }}")}, {"r": "{{ b }}"}),
    "an expression that fails": workflow({"a": echo({"k": 1}), "b": echo("{{ a.missing }}")}),
    "outputs that fail": workflow({"a": echo({"k": 1})}, {"r": "{{ a.missing }}"}),
    "a list": workflow({"e": echo("{{ item * 10 + index }}", for_each="{{ input.xs }}")}, {"r": "{{ e }}"}),
    "an empty list": workflow({"e": echo("{{ item }}", for_each=[]), "f": echo("{{ e }}")}, {"r": "{{ f }}"}),
    "two at a time": workflow({"e": echo("{{ item }}", for_each=[*range(9)], max_parallel=2)}, {"r": "{{ e }}"}),
    "a block for each": workflow(
        {"a": echo(9), "b": {"for_each": [1, 2], "steps": {"x": echo("{{ item + a }}"), "y": echo("{{ x + index }}")}}},
        {"r": "{{ b }}"},
    ),
    "a list for each of a list": workflow(
        {"b": {"for_each": [1, 2], "as": "o", "steps": {"i": echo("{{ o * 10 + item }}", for_each=[1, 2])}}},
        {"r": "{{ b }}"},
    ),
    "failed items are collected": workflow(
        {"e": {**_BAD_SECOND, "for_each": "{{ input.xs }}", "on_error": "collect"}}, {"r": "{{ e }}"}
    ),
    "the first failed item fails the step": workflow({"e": {**_BAD_SECOND, "for_each": [1, 2], "max_parallel": 1}}),
    "a failed item that may be": workflow(
        {"e": {**_BAD_SECOND, "for_each": [2], "on_error": "continue"}, "f": echo("{{ e }}")}, {"r": "{{ f }}"}
    ),
    "a block": workflow(
        {"b": {"steps": {"x": echo(1), "y": echo("{{ x + 1 }}"), "z": echo("{{ x }}")}}}, {"r": "{{ b }}"}
    ),
    "a block with an output": workflow(
        {"b": {"steps": {"x": echo(1), "y": echo(2)}, "output": ["{{ y }}", "{{ x }}"]}}, {"r": "{{ b }}"}
    ),
    "a block that fails": workflow({"b": {"steps": {"x": boom(), "y": echo("{{ x }}"), "z": echo(1)}}}),
    "rounds until": workflow(
        {"n": echo("{{ (previous == null ? 0 : previous) + round }}", repeat={"until": "n >= 6", "max": 9})},
        {"r": "{{ n }}"},
    ),
    "rounds of a block": workflow(
        {"n": {"repeat": {"until": "x == 2", "max": 3}, "steps": {"x": echo("{{ round }}"), "y": echo("{{ x * 2 }}")}}},
        {"r": "{{ n }}"},
    ),
    "rounds that may run out": workflow(
        {"n": echo("{{ round }}", repeat={"until": "false", "max": 3, "on_max": "pass"})}, {"r": "{{ n }}"}
    ),
    "rounds that run out": workflow({"n": echo("{{ round }}", repeat={"until": "n > 5", "max": 2})}),
    "a case": workflow({"s": {"type": "switch", "value": 1, "cases": {"1": echo("one")}}}, {"r": "{{ s }}"}),
    "a case that is a block": workflow(
        {"s": {"type": "switch", "value": "two", "cases": {"two": {"steps": {"q": echo(2), "p": echo("{{ q }}")}}}}},
        {"r": "{{ s }}"},
    ),
    "no case": workflow({"s": {"type": "switch", "value": "x", "cases": {"1": echo(1)}}, "t": echo("{{ s }}")}),
    "the default case": workflow({"s": {"type": "switch", "value": "x", "cases": {"1": boom()}, "default": echo(2)}}),
    "a router whose best fails": workflow(
        {"r": {"type": "router", "by": "cost", "among": {"dear": echo("dear", cost=5), "cheap": boom("b", cost=1)}}},
        {"r": "{{ r }}"},
    ),
    "alternatives": workflow({"f": boom("1", fallback=[boom("2"), echo("{{ error }} ok")])}, {"r": "{{ f }}"}),
    "alternatives that all fail": workflow({"f": boom("1", fallback=[boom("2"), boom("3")])}),
    "tries that run out": workflow({"a": boom(retry={"max_attempts": 3, "backoff": "1ms"})}),
    "failures that are not tried again": workflow({"a": boom(retry={"max_attempts": 3, "on": ["timeout"]})}),
    "a block with a timeout for each": workflow(
        {"b": {"for_each": [1, 2], "timeout": "1h", "steps": {"x": echo("{{ item }}"), "y": echo("{{ x }}")}}},
        {"r": "{{ b }}"},
    ),
    "a case that is a block with a timeout": workflow(
        {"s": {"type": "switch", "value": "a", "cases": {"a": {"timeout": "1h", "steps": {"x": echo(1)}}}}}
    ),
    "what a block of an item and of a round leaves": workflow(
        {
            "a": {
                "for_each": [3, 4],
                "steps": {"x": echo("{{ item }}")},
                "output": ["{{ index }}", "{{ item }}", "{{ x }}"],
            },
            "b": {
                "repeat": {"until": "b.size() > 2", "max": 3},
                "steps": {"x": echo("{{ round }}")},
                "output": "{{ (previous == null ? [] : previous) + [round] }}",
            },
        },
        {"a": "{{ a }}", "b": "{{ b }}"},
    ),
    "tries of a block": workflow({"b": {"retry": {"max_attempts": 2, "backoff": "1ms"}, "steps": {"x": boom()}}}),
    "a saga": workflow(
        {
            "a": echo("A", compensate=echo("undo {{ output }} {{ params.input.value }}")),
            "b": echo("B", needs=["a"], compensate=boom("cannot")),
            "c": echo("C", needs=["b"], compensate={"steps": {"u": echo("u {{ output }}"), "v": echo("{{ u }}")}}),
            "d": boom("x", needs=["c"]),
        }
    ),
    "waits": workflow({"w": {"type": "wait", "for": "60ms"}, "x": echo(1, needs=["w"])}, {"r": "{{ x }}"}),
    "a signal that never comes": workflow({"w": {"type": "wait", "signal": "never", "timeout": "60ms"}}),
    "nobody decides in time": workflow({"g": {"type": "approval", "message": "?", "timeout": "60ms"}}),
    "workflows for each": workflow(
        {"w": {"type": "workflow", "workflow": _INNER, "input": {"n": "{{ item }}"}, "for_each": [1, 2]}},
        {"r": "{{ w }}"},
    ),
    "a workflow that is given the wrong input": workflow(
        {"w": {"type": "workflow", "workflow": _INNER, "input": {"n": "{{ input.xs[0] == 1 ? 'x' : 'y' }}"}}}
    ),
    "a workflow that takes too long": workflow(
        {
            "w": {
                "type": "workflow",
                "workflow": {"name": "inner", "steps": {"s": {"type": "wait", "signal": "never"}}},
                "timeout": "100ms",
                "fallback": [echo("{{ error }}")],
            }
        },
        {"r": "{{ w }}"},
    ),
    "alternatives of what has its turn": workflow(
        {"e": boom(for_each=[1, 2], concurrency={"key": "alt", "limit": 1}, fallback=[echo("{{ item }}")])},
        {"r": "{{ e }}"},
    ),
    "one at a time": workflow({"e": echo("{{ item }}", for_each=[1, 2], concurrency={"key": "k", "limit": 1})}),
    "the same is computed once": workflow(
        {
            "a": echo(1, cache={"key": "{{ input.xs }}", "ttl": "1m", "scope": "global"}),
            "b": echo(2, needs=["a"], cache={"key": "{{ input.xs }}", "ttl": "1m", "scope": "global"}),
        },
        {"r": ["{{ a }}", "{{ b }}"]},
    ),
    "a task that is not there": workflow({"a": {"type": "task", "task": "user.missing"}}),
}


#: Timers that are made due on the fleet once their run waits: nobody knows how long a worker takes until then.
OVERDUE = {"a deadline": "w!d", "the deadline of a run": "!deadline"}


@pytest.fixture(scope="module")
def on_a_fleet(worker: Any, redis_url: str) -> dict[str, str]:
    """All of them, at once."""
    from fleet import eventually, happened

    runs = {name: ferrum.submit(document) for name, document in ALIKE.items()}
    with redis.Redis.from_url(redis_url) as client:
        for name, timer in OVERDUE.items():
            eventually(lambda name=name: happened(runs[name], "step.waiting"))
            member = {f"{runs[name]} {timer}": 0}
            assert client.zadd(f"{base_of(runs[name])}:timers", member, xx=True, ch=True) == 1
    return runs


def _story(events: Any, run_id: str) -> Json:
    """What happened to each step, and what the run came to; not in which order steps side by side were."""
    steps: defaultdict[str, list[str]] = defaultdict(list)
    for event in events:
        detail = [getattr(event, name, None) for name in ("attempt", "error", "reason", "kind", "cause", "output")]
        about = " ".join(str(one) for one in detail if one)
        steps[getattr(event, "step", "run")].append(f"{event.type} {about}".replace(run_id, "RUN").strip())
    return dict(steps)


def _comparable(story: Json) -> Json:
    """Without what is up to chance: which of those that share a limit has to wait."""
    chance = ("step.waiting 1 limit", "step.resumed")
    return {
        step: list(dict.fromkeys(line for line in lines if not line.startswith(chance)))
        for step, lines in story.items()
    }


@pytest.mark.parametrize("name", ALIKE)
def test_a_workflow_goes_the_same_way_in_this_process_and_on_a_fleet(
    name: str, on_a_fleet: dict[str, str], worker: Any
) -> None:
    from fleet import ended

    run_id = on_a_fleet[name]
    there = ended(run_id)
    here = run_inline(ALIKE[name], policy=Policy.load(Path(worker.environ["FERRUM_POLICY"])))
    assert (here.status, here.outputs, here.reason) == (there.status, there.outputs, there.reason or "")
    assert {step_id: (s.status, s.attempt, s.output, s.error) for step_id, s in here.result.steps.items()} == {
        s.step_id: (s.status, s.attempt, s.output, s.error) for s in there.steps if s.status != "cancelled" or s.attempt
    }, str(here)
    events = ferrum.runs.record().events(run_id)
    assert _comparable(_story(here.events, here.result.run_id)) == _comparable(_story(events, run_id))


def test_answers_and_signals_have_the_same_effect_in_this_process_and_on_a_fleet(worker: Any) -> None:
    from fleet import ended, eventually

    document = workflow(
        {
            "g": {"type": "approval", "message": "Go?"},
            "w": {"type": "wait", "signal": "go", "needs": ["g"]},
            "b": {"type": "approval", "message": "Sure?", "needs": ["w"], "on_error": "continue"},
        },
        {"r": ["{{ g.by }}", "{{ w }}", "{{ b }}"]},
    )
    run_id = ferrum.submit(document)
    for step, approved in (("g", True), ("b", False)):
        eventually(lambda step=step: (run_id, step) in {(one.run_id, one.step_id) for one in ferrum.approvals()})
        ferrum.decide(run_id, step, approved=approved, by="ann")
        if approved:
            eventually(lambda: ferrum.runs.record().state(run_id).step("w").status == "waiting")
            ferrum.runs.signal(run_id, "go", {"n": 1})
    there = ended(run_id)
    answers = {"g": Verdict(True, "ann"), "b": Verdict(False, "ann")}
    here = run_inline(document, approvals=answers, signals={"go": Sent({"n": 1}, after_s=1)})
    assert (here.status, here.outputs, here.reason) == (there.status, there.outputs, there.reason or "")
    events = ferrum.runs.record().events(run_id)
    assert _story(here.events, here.result.run_id) == _story(events, run_id)


# What steps do.


def test_a_script_says_what_a_step_returns_raises_or_does() -> None:
    async def doubled(params: Json) -> int:
        return int(params["input"]["value"]) * 2

    run = run_inline(
        workflow(
            {"a": echo(1), "b": echo("{{ a }}"), "c": echo("{{ b }}"), "d": echo("{{ c }}"), "e": echo("{{ d }}")}
        ),
        steps={
            "a": 5,
            "b": lambda params: params["input"]["value"] + 1,
            "c": doubled,
            "d": None,
            "e": ValueError("no"),
        },
    )
    assert [run.output(step) for step in "abcd"] == [5, 6, 12, None]
    run.assert_happened("step.failed", "e", error="e raised ValueError: no")
    assert run.reason == "'e' failed"


def test_a_script_says_what_each_try_does() -> None:
    run = run_inline(
        workflow({"a": echo(1, retry={"max_attempts": 5})}, {"r": "{{ a }}"}),
        steps={"a": Scripted(times=[ValueError("busy"), TimeoutError, Scripted("late", delay_s=10), "never"])},
    )
    assert run.outputs == {"r": "late"}
    assert run.attempts("a") == 3
    assert [event.error for event in run.happened("step.waiting", "a")] == [
        "a raised ValueError: busy",
        "a raised TimeoutError: ",
    ]


def test_a_failure_that_cannot_pass_is_not_tried_again() -> None:
    steps = {"a": echo(1, retry={"max_attempts": 5})}
    assert run_inline(workflow(steps), steps={"a": StepError("never")}).attempts("a") == 1
    assert run_inline(workflow(steps), steps={"a": StepError("later", retry=True)}).attempts("a") == 5


def test_what_is_said_of_one_item_goes_before_what_is_said_of_all() -> None:
    run = run_inline(
        workflow({"e": {"for_each": [1, 2, 3], "steps": {"x": echo("{{ item }}"), "y": echo("{{ x }}")}}}),
        steps={"e.*.x": lambda params: params["input"]["value"] * 10, "e.1.x": "other"},
    )
    assert run.output("e") == [10, "other", 30]


def test_a_step_that_is_made_of_others_can_be_said_as_a_whole() -> None:
    run = run_inline(workflow({"b": {"steps": {"x": boom()}}, "c": echo("{{ b }}")}), steps={"b": "whole"})
    assert run.output("c") == "whole"
    assert run.order == ["b", "c"]


def test_a_step_without_a_script_runs_for_real() -> None:
    run = run_inline(workflow({"a": {"type": "task", "task": "user.asleep", "input": {"seconds": 0.01}}, "b": boom()}))
    assert run.output("a") == 0.01
    run.assert_happened("step.failed", "b", error="user.boom raised ValueError: no")


def test_a_name_that_no_step_has_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"steps names 'fetsh', but 'tried' has no step 'fetsh' \(did you mean 'fetch'"
    ):
        run_inline(workflow({"fetch": echo(1)}), steps={"fetsh": 1})
    with pytest.raises(InputError, match="approvals names 'gate'"):
        run_inline(workflow({"fetch": echo(1)}), approvals={"gate": True})


def test_a_value_that_is_not_json_fails_the_step() -> None:
    run = run_inline(workflow({"a": echo(1)}), steps={"a": object()})
    run.assert_happened("step.failed", "a", error="a returned object, which is not JSON")


# Time.


def test_time_jumps_to_what_is_due_next() -> None:
    run = run_inline(
        workflow({"w": {"type": "wait", "for": "7d"}, "s": echo(1, needs=["w"]), "t": echo(2, needs=["s"])}),
        steps={"s": Scripted(delay_s=3600)},
    )
    run.assert_completed()
    assert round(run.seconds) == 7 * 86400 + 3600


def test_a_wait_until_a_time_ends_then_however_far_the_clock_has_jumped() -> None:
    when = (datetime.now(UTC) + timedelta(days=2)).isoformat()
    run = run_inline(
        workflow({"a": {"type": "wait", "for": "1d"}, "b": {"type": "wait", "until": when, "needs": ["a"]}})
    )
    run.assert_completed()
    assert round(run.seconds / 86400, 2) == 2


def test_the_same_run_again_goes_the_same_way() -> None:
    document = workflow(
        {
            "e": echo("{{ item }}", for_each=[*range(6)], max_parallel=3, retry={"max_attempts": 9}),
            "w": {"type": "wait", "for": "3s"},
        }
    )
    script = {
        "e.*": Scripted(times=[ValueError("busy"), Scripted(1, delay_s=2)], delay_s=1),
        "e.2": Scripted(delay_s=9),
    }

    def story(run: InlineRun) -> Json:
        return [(event.type, getattr(event, "step", ""), round(event.at - run.events[0].at, 2)) for event in run.events]

    assert story(run_inline(document, steps=script)) == story(run_inline(document, steps=script))


def test_a_scripted_step_that_takes_too_long_times_out() -> None:
    run = run_inline(workflow({"a": echo(1, timeout="5s")}), steps={"a": Scripted(delay_s=6)})
    run.assert_happened("step.failed", "a", error="took longer than its timeout of 5 s")
    assert run_inline(workflow({"a": echo(1, timeout="5s")}), steps={"a": Scripted(delay_s=4)}).status == "completed"


def test_a_real_step_that_takes_too_long_is_interrupted() -> None:
    sleep = {"type": "task", "task": "user.sleep", "input": {"seconds": 60}, "timeout": "50ms"}
    run_inline(workflow({"a": sleep})).assert_happened(
        "step.failed", "a", error="took longer than its timeout of 0.05 s"
    )


def test_deadlines_and_the_wall_time_of_a_budget_are_kept() -> None:
    slow = {"a": Scripted(delay_s=60)}
    run_inline(workflow({"a": echo(1, deadline="5s", on_error="continue")}), steps=slow).assert_completed()
    assert run_inline(workflow({"a": echo(1)}, deadline="5s"), steps=slow).reason == "its deadline has passed"
    killed = run_inline(workflow({"a": echo(1)}, budget={"wall_time": "5s"}), steps=slow)
    assert (killed.status, killed.reason) == ("budget_killed", "budget.wall_time is used up")


# Several at a time.


def test_only_so_many_items_are_on_their_way_at_a_time() -> None:
    run = run_inline(
        workflow({"e": echo("{{ item }}", for_each=[*range(6)], max_parallel=2)}), steps={"e.*": Scripted(delay_s=10)}
    )
    assert round(run.seconds) == 30
    run.assert_order(*[f"e.{number}" for number in range(6)])


def test_the_first_item_that_fails_stops_those_beside_it() -> None:
    run = run_inline(
        workflow({"e": echo("{{ item }}", for_each=[0, 1, 2])}),
        steps={"e.*": Scripted(delay_s=60), "e.1": Scripted(raises=ValueError("bad"), delay_s=1)},
    )
    assert run.reason == "'e' failed"
    run.assert_happened("step.cancelled", "e.0")
    run.assert_happened("step.cancelled", "e.2")
    assert round(run.seconds) == 1


def test_a_limit_lets_in_so_many_at_once_in_the_order_in_which_they_came() -> None:
    run = run_inline(
        workflow({"e": echo("{{ item }}", for_each=[*range(4)], concurrency={"key": "k", "limit": 2})}),
        steps={"e.*": Scripted(delay_s=10)},
    )
    assert round(run.seconds) == 20
    assert [event.step for event in run.happened("step.completed")] == ["e.0", "e.1", "e.2", "e.3", "e"]
    run.assert_happened("step.waiting", "e.2", kind="limit", message="'k' lets in 2 at once")


def test_a_slot_is_given_back_by_what_failed_and_by_what_fell_back() -> None:
    run = run_inline(
        workflow(
            {
                "e": echo("{{ item }}", for_each=[0, 1], on_error="collect", concurrency={"key": "k", "limit": 1}),
                "f": echo(0, concurrency={"key": "k", "limit": 1}, fallback=[echo(2)]),
            }
        ),
        steps={"e.0": ValueError("bad"), "f": ValueError("bad")},
    )
    assert run.output("e") == [{"error": "e.0 raised ValueError: bad", "index": 0}, 1]
    assert run.output("f") == 2


def test_a_rate_lets_in_so_many_in_a_time() -> None:
    run = run_inline(
        workflow({"e": echo("{{ item }}", for_each=[*range(5)], rate={"key": "k", "limit": 2, "per": "10s"})}),
        steps={"e.*": "done"},
    )
    began = run.events[0].at
    assert [round(event.at - began) for event in run.happened("step.completed")] == [0, 0, 5, 10, 15, 15]


def test_what_several_ask_for_is_computed_by_one_of_them() -> None:
    steps = {"e": echo("{{ item }}", for_each=[0, 1, 2], cache={"key": "k", "ttl": "1h"})}
    run = run_inline(workflow(steps), steps={"e.*": Scripted(times=["once"], delay_s=5)})
    assert run.output("e") == ["once"] * 3
    assert [event.step for event in run.happened("step.completed") if event.cached] == ["e.1", "e.2"]
    failing = run_inline(workflow(steps), steps={"e.0": Scripted(raises=ValueError, delay_s=5), "e.*": "second"})
    assert failing.status == "failed"


def test_runs_can_share_a_cache() -> None:
    shared = Shared()
    document = workflow({"a": echo(1, cache={"key": "k", "ttl": "1h"})})
    assert run_inline(document, steps={"a": "first"}, shared=shared).output("a") == "first"
    assert run_inline(document, steps={"a": "second"}, shared=shared).output("a") == "first"
    assert run_inline(document, steps={"a": "second"}).output("a") == "second"


def test_a_router_leaves_alone_what_has_been_failing() -> None:
    shared = Shared()
    router = {"type": "router", "by": "cost", "among": {"cheap": echo(1, cost=1), "dear": echo(2, cost=9)}}
    failing = {"r.cheap": ValueError("down")}
    for _ in range(5):
        run = run_inline(workflow({"r": router}), steps=failing, shared=shared)
        run.assert_order("r", "r.cheap", "r.dear")
    assert run_inline(workflow({"r": router}), shared=shared).order == ["r", "r.dear"]


# People and signals.


_GATE = {"type": "approval", "message": "Ship it?"}


def test_a_person_is_whoever_the_test_says() -> None:
    gate = workflow({"g": _GATE, "s": echo("{{ g.by }}")})
    assert run_inline(gate, approvals={"g": True}).output("s") == "inline"
    assert run_inline(gate, approvals={"g": Verdict(True, "ann", "fine")}).output("g") == {
        "approved": True,
        "by": "ann",
        "note": "fine",
    }
    refused = run_inline(gate, approvals=lambda ask: ask.message != "Ship it?")
    refused.assert_happened("step.failed", "g", error="rejected by inline")


def test_nobody_to_ask_is_an_error_that_says_what_to_give() -> None:
    with pytest.raises(Stuck, match=r"g waits: Ship it\?: give approvals=\{'g': True\}"):
        run_inline(workflow({"g": _GATE}))
    inner = {"name": "inner", "steps": {"e": {**_GATE, "for_each": [1]}}}
    with pytest.raises(Stuck, match=r"w/e.0 waits: Ship it\?: give approvals=\{'w/e.0': True\}"):
        run_inline(workflow({"w": {"type": "workflow", "workflow": inner}}))


def test_an_approval_with_a_time_limit_that_nobody_answers_is_over_then() -> None:
    run = run_inline(workflow({"g": {**_GATE, "timeout": "3d"}}))
    run.assert_happened("approval.decided", "g", expired=True)
    run.assert_happened("step.failed", "g", error="nobody decided in time")


def test_a_run_that_waits_for_people_only_is_waiting_for_approval() -> None:
    run = run_inline(workflow({"g": _GATE, "w": {"type": "wait", "for": "1h"}}), approvals={"g": True})
    run.assert_not_happened("run.waiting")
    run = run_inline(workflow({"g": _GATE}), approvals={"g": True})
    assert [event.type for event in run.events if event.type.startswith("run.")] == [
        "run.created",
        "run.started",
        "run.waiting",
        "run.resumed",
        "run.ended",
    ]


def test_signals_are_there_from_the_start_or_come_later() -> None:
    waits = {"type": "wait", "signal": "go"}
    document = workflow({"a": waits, "b": {**waits, "needs": ["a"]}}, {"r": ["{{ a }}", "{{ b }}"]})
    run = run_inline(document, signals={"go": ("first", Sent({"n": 2}, after_s=3600))})
    assert run.outputs == {"r": ["first", {"n": 2}]}
    assert round(run.seconds) == 3600
    with pytest.raises(Stuck, match=r"a waits: for the signal 'go': give signals=\{'go': …\}"):
        run_inline(document)


# Workflows in workflows.


def test_steps_of_a_sub_workflow_are_said_behind_the_step_that_runs_it() -> None:
    inner = {
        "name": "inner",
        "steps": {"s": echo(1), "g": {**_GATE, "needs": ["s"]}, "w": {"type": "wait", "signal": "go", "needs": ["g"]}},
        "outputs": {"o": ["{{ s }}", "{{ w }}"]},
    }
    run = run_inline(
        workflow({"e": {"type": "workflow", "workflow": inner, "for_each": [0, 1]}}),
        steps={"e.*/s": "said", "e.1/s": "other"},
        approvals={"e.*/g": True},
        signals={"e.*/go": 7},
    )
    assert run.output("e") == [{"o": ["said", 7]}, {"o": ["other", 7]}]
    assert run.inside("e.1").output("s") == "other"
    assert run.inside("e.0").events[0].parent == (run.result.run_id, "e.0")


def test_a_sub_workflow_ends_with_the_step_that_runs_it() -> None:
    run = run_inline(
        workflow({"w": {"type": "workflow", "workflow": _INNER, "input": {"n": 1}, "timeout": "5s"}}),
        steps={"w/s": Scripted(delay_s=60)},
    )
    run.assert_happened("step.failed", "w", error="took longer than its timeout of 5.0 s")
    assert run.inside("w").status == "cancelled"


def test_registered_workflows_are_those_that_are_given() -> None:
    document = workflow({"w": {"type": "workflow", "name": "inner", "input": {"n": 1}}}, {"r": "{{ w.o }}"})
    assert run_inline(document, workflows={"inner": _INNER}).outputs == {"r": 2}
    run_inline(document).assert_happened(
        "step.failed", "w", error="no workflow 'inner' is registered here: give workflows={'inner': …}"
    )


# The choke point.


_TOOL = {"type": "tool", "tool": "git.log", "input": {"n": 1}, "retry": {"max_attempts": 1}}
_ASK = {"type": "llm", "model": "test/model", "prompt": "?", "retry": {"max_attempts": 1}}


def test_nothing_acts_that_the_policy_does_not_allow() -> None:
    actors = ScriptedActors().on("git.log", "a commit")
    run = run_inline(workflow({"t": _TOOL}), actors=actors)
    assert run.status == "policy_blocked"
    assert run.reason.startswith("nothing allows tool 'git.log': add 'tool:git.log' to allow")
    assert actors.done == []
    run.assert_happened("act.decided", "t", effect="deny")


def test_what_is_allowed_is_done_and_what_a_person_is_asked_about_waits_for_the_answer() -> None:
    actors = ScriptedActors().on("git.log", "a commit")
    run = run_inline(workflow({"t": _TOOL}), actors=actors, policy={"allow": ["tool:git.*"]})
    assert run.output("t") == "a commit"
    assert [done.idempotency_key for done in actors.done] == [f"{run.result.run_id}.t"]

    asked: list[Json] = []
    person = {"t": lambda ask: asked.append(ask.act) or True}
    run = run_inline(workflow({"t": _TOOL}), actors=actors, policy={"ask": ["tool:git.*"]}, approvals=person)
    assert run.output("t") == "a commit"
    assert [act["arguments"] for act in asked] == [{"n": 1}]
    refused = run_inline(workflow({"t": _TOOL}), actors=actors, policy={"ask": ["tool:git.*"]}, approvals={"t": False})
    assert refused.status == "policy_blocked"


def test_the_budget_of_a_run_and_of_those_around_it_ends_it() -> None:
    actors = ScriptedActors(costs=Usage(input_tokens=60, model_calls=1)).on("test/model", "hello")
    allow = {"allow": ["model:*"]}
    twice = {"a": _ASK, "b": {**_ASK, "needs": ["a"]}}
    run = run_inline(workflow(twice, budget={"input_tokens": 100}), actors=actors, policy=allow)
    assert (run.status, run.reason) == ("budget_killed", "budget.input_tokens is used up")
    assert run.usage.input_tokens == 60
    inner = {"name": "inner", "steps": twice}
    around = workflow({"w": {"type": "workflow", "workflow": inner}}, budget={"input_tokens": 100})
    run = run_inline(around, actors=actors, policy=allow)
    assert run.status == "budget_killed"
    assert run.inside("w").status == "cancelled"


# The result.


def test_what_completed_is_undone_in_reverse() -> None:
    undo = {step: echo(step, compensate=echo("{{ output }}")) for step in ("a", "b")}
    run = run_inline(workflow({**undo, "c": boom(needs=["a", "b"])}), steps={"a": Scripted("A", delay_s=5)})
    run.assert_order("b", "c", "a.compensate", "b.compensate")
    assert run.output("a.compensate") == "A"
    run.assert_happened("run.compensating", status="failed")


def test_the_events_add_up_to_the_state_of_the_run() -> None:
    run = run_inline(workflow({"a": echo(1), "b": boom(needs=["a"])}))
    state = fold(run.events)
    assert (state.status, state.reason) == (run.status, run.reason)
    assert {name: step.status for name, step in state.steps.items()} == {"a": "completed", "b": "failed"}


def test_what_does_not_hold_says_what_happened() -> None:
    run = run_inline(workflow({"a": echo(1), "b": boom(needs=["a"])}))
    for check, said in (
        (lambda: run.assert_order("b", "a"), "they did not begin in the order b, a, but a, b"),
        (lambda: run.assert_order("a", "z"), "these never began: z"),
        (lambda: run.assert_happened("step.skipped", "a"), "there was no step.skipped of 'a'"),
        (lambda: run.assert_happened("step.failed", error="other"), "there was no step.failed error='other'"),
        (lambda: run.assert_not_happened("step.failed", "b"), "there was a step.failed of 'b'"),
        (lambda: run.output("b"), "'b' did not complete, it is failed"),
        (run.assert_completed, "the run did not complete"),
        (lambda: run.inside("a"), "'a' started no run"),
    ):
        with pytest.raises(AssertionError) as error:
            check()
        assert str(error.value).startswith(f"{said}\nrun failed: 'b' failed\n")
        assert "step.failed  b  error user.boom raised ValueError: no" in str(error.value)


def test_a_mistake_in_a_workflow_is_raised() -> None:
    with pytest.raises(WorkflowError):
        run_inline({"name": "x", "steps": {"a": {"type": "nothing"}}})
    with pytest.raises(InputError):
        run_inline(workflow({"a": echo(1)}), {"xs": "no list"})


def test_it_may_be_called_where_an_event_loop_is_running() -> None:
    async def notebook() -> InlineRun:
        return run_inline(workflow({"w": {"type": "wait", "for": "1h"}}))

    asyncio.run(notebook()).assert_completed()


# `execute`, on a loop of one's own.


def _executed(document: Json, **options: Json) -> Json:
    return execute(
        Plan.of(document), actors=ScriptedActors(), policy=Policy(), artifacts=Artifacts("memory://"), **options
    )


def test_a_plan_is_executed_on_the_loop_of_whoever_awaits_it() -> None:
    told: list[str] = []

    async def person(_: Json) -> bool:
        await asyncio.sleep(0)
        return True

    document = workflow({"a": echo(1), "g": {**_GATE, "needs": ["a"]}}, {"r": "{{ a }}"})
    result = asyncio.run(
        _executed(document, steps={"a": 7}, approve=person, tell=lambda event: told.append(event.type))
    )
    assert (result.status, result.outputs) == ("completed", {"r": 7})
    assert told == [event.type for event in result.events]


def test_what_is_cancelled_stops_with_all_that_goes_on_in_it() -> None:
    stopped: list[str] = []

    async def main() -> None:
        begun = asyncio.Event()

        async def forever(_: Json) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.append("a")

        running = asyncio.create_task(_executed(workflow({"a": echo(1)}), steps={"a": forever}))
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert stopped == ["a"]


def test_what_comes_back_is_taken_as_a_fleet_takes_it() -> None:
    """The same of workers is in `test_after_the_act.py`."""
    odd = StepError("no", retry=True, retry_after_s="soon")  # type: ignore[arg-type]
    steps = {"a": echo(1), "b": echo(1, on_error="continue", retry={"max_attempts": 2})}
    run = run_inline(workflow(steps), steps={"a": StepError("x" * 100_000), "b": odd})
    assert (run.attempts("a"), run.attempts("b")) == (1, 1)
    assert len(run.step("a").error or "") == 8192
    assert "a bug in ferrum" in (run.step("b").error or "")

"""A run in this process does what it does on a fleet, and a test can say what its steps do."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import user_tasks  # noqa: F401 - the tasks that `run_inline` calls

import ferrum.runs
from ferrum.testing.inline import run_inline

Json = Any


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
        {"b": {"for_each": [1, 2], "timeout": "9s", "steps": {"x": echo("{{ item }}"), "y": echo("{{ x }}")}}},
        {"r": "{{ b }}"},
    ),
    "a case that is a block with a timeout": workflow(
        {"s": {"type": "switch", "value": "a", "cases": {"a": {"timeout": "9s", "steps": {"x": echo(1)}}}}}
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
    "a deadline": workflow({"w": {"type": "wait", "signal": "never", "deadline": "1500ms"}, "x": echo(1, needs=["w"])}),
    "the deadline of a run": workflow({"w": {"type": "wait", "signal": "never"}}, deadline="1500ms"),
    "nobody decides in time": workflow({"g": {"type": "approval", "message": "?", "timeout": "60ms"}}),
    "workflows for each": workflow(
        {"w": {"type": "workflow", "workflow": _INNER, "input": {"n": "{{ item }}"}, "for_each": [1, 2]}},
        {"r": "{{ w }}"},
    ),
    "a workflow that is given the wrong input": workflow(
        {"w": {"type": "workflow", "workflow": _INNER, "input": {"n": "{{ input.xs[0] == 1 ? 'x' : 'y' }}"}}}
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


@pytest.fixture(scope="module")
def on_a_fleet(worker: Any) -> dict[str, str]:
    """All of them, at once."""
    return {name: ferrum.submit(document) for name, document in ALIKE.items()}


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
def test_a_workflow_goes_the_same_way_in_this_process_and_on_a_fleet(name: str, on_a_fleet: dict[str, str]) -> None:
    from fleet import ended

    run_id = on_a_fleet[name]
    there = ended(run_id)
    here = run_inline(ALIKE[name])
    assert (here.status, here.outputs, here.reason) == (there.status, there.outputs, there.reason or "")
    assert {step_id: (s.status, s.attempt, s.output, s.error) for step_id, s in here.result.steps.items()} == {
        s.step_id: (s.status, s.attempt, s.output, s.error) for s in there.steps if s.status != "cancelled" or s.attempt
    }, str(here)
    events = ferrum.runs.record().events(run_id)
    assert _comparable(_story(here.events, here.result.run_id)) == _comparable(_story(events, run_id))

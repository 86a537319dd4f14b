"""Workflows that are built in Python."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flow_steps as f
import pytest
from fleet import Fleet, ended
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ferrum
from ferrum.errors import WorkflowError
from ferrum.inline import Result
from ferrum.plan import Plan
from ferrum.primitives import (
    Conditional,
    Fallback,
    Flow,
    Parallel,
    Retry,
    Router,
    Saga,
    Sequential,
    Switch,
    Timeout,
    approval,
    cached,
    for_each,
    llm,
    repeat,
    step,
    step_of,
    task,
    tool,
    wait,
)
from ferrum.results import RunStatus
from ferrum.workflow import Workflow

fetch, summarise = f.fetch, f.summarise


def built(flow: Flow, **more: Any) -> Workflow:
    """The workflow of a flow, which a worker could run."""
    made = flow.workflow(**more)
    Plan(made)
    return made


def steps_of(flow: Flow, **more: Any) -> dict[str, Any]:
    steps: Any = built(flow, **more).to_dict()["steps"]
    return steps


def refusal(flow: Flow) -> str:
    with pytest.raises(WorkflowError) as caught:
        flow.workflow()
    return str(caught.value)


def executed(flow: Flow, **input: Any) -> Result:
    return asyncio.run(flow.execute(input))


@pytest.fixture(autouse=True)
def _redis(redis_url: str) -> None:
    """Celery wants one as soon as a task is looked at."""


# Data flows as in the composition of functions


def test_a_flow_is_the_workflow_that_one_would_write() -> None:
    flow = fetch >> (summarise | f.classify) >> f.merge
    assert flow.workflow("triage", version="2", budget={"tool_calls": 3}, priority=9) == Workflow.parse(
        """
name: triage
version: "2"
priority: 9
budget: {tool_calls: 3}
inputs:
  url: {type: string}
  tries: {type: integer, default: 3}
steps:
  fetch: {type: task, function: "flow_steps:fetch", input: {url: "{{ input.url }}", tries: "{{ input.tries }}"}}
  summarise: {type: task, function: "flow_steps:summarise", input: {text: "{{ fetch }}"}}
  classify: {type: task, function: "flow_steps:classify", input: {text: "{{ fetch }}"}}
  merge:
    type: task
    function: flow_steps:merge
    input: {summary: "{{ summarise }}", kind: "{{ classify }}"}
outputs: {merge: "{{ merge }}"}
"""
    )


def test_then_binds_tighter_than_beside() -> None:
    a, b, c, d = (step(f.words, name=name) for name in "abcd")
    assert a >> b | c >> d == Parallel(Sequential(a, b), Sequential(c, d))
    assert a >> (b | c) >> d == Sequential(a, Parallel(b, c), d)


def test_how_a_chain_is_put_together_makes_no_difference() -> None:
    a, b, c = (step(f.words, name=name) for name in "abc")
    assert (a >> b) >> c == a >> (b >> c) == Sequential(a, b, c)
    assert (a | b) | c == a | (b | c) == Parallel(a, b, c)


def test_a_function_is_lifted_on_either_side_of_an_operator() -> None:
    assert f.words >> fetch == Sequential(f.words, fetch)
    assert f.words | fetch == Parallel(step(f.words), fetch)
    assert Sequential(f.words, f.twice) == step(f.words) >> f.twice


def test_outputs_of_what_ends_side_by_side_are_arguments_in_their_order() -> None:
    flow = fetch >> (summarise | Sequential(f.words, (step(f.classify) | f.is_bug))) >> f.together
    assert steps_of(flow)["together"]["input"] == ["{{ summarise }}", "{{ classify }}", "{{ is_bug }}"]
    assert built(fetch >> (summarise | f.words)).outputs == {"summarise": "{{ summarise }}", "words": "{{ words }}"}


def test_what_something_is_put_around_is_one_step_with_one_output() -> None:
    steps = steps_of(fetch >> (summarise | f.words).named("both") >> f.together)
    assert steps["together"]["input"] == ["{{ both }}"]
    assert "output" not in steps["both"]  # that of a block: a mapping by name
    assert executed(fetch >> (summarise | f.words).named("both") >> f.together, url="u").outputs == {
        "together": [{"summarise": "U AFTER 3", "words": ["u", "after", "3"]}]
    }


def test_what_takes_nothing_comes_after_all_the_same() -> None:
    steps = steps_of(fetch >> (summarise | f.words) >> approval("Go on?") >> f.nothing)
    assert steps["approval"]["needs"] == ["summarise", "words"]
    assert steps["nothing"] == {"type": "task", "function": "flow_steps:nothing", "needs": ["approval"]}
    assert "needs" not in steps["summarise"]
    inside = steps_of(fetch >> Retry(step(f.nothing) >> f.words))
    assert (inside["block"]["needs"], inside["block"]["steps"]["words"]["input"]) == (
        ["fetch"],
        {"text": "{{ nothing }}"},
    )


def test_arguments_that_are_said_are_all_that_a_function_gets() -> None:
    said = step(f.merge, input={"summary": "{{ fetch }} by {{ input.url }}", "kind": {"kind": "x"}})
    steps = steps_of(fetch >> approval("?") >> said)
    assert steps["merge"]["input"] == {"summary": "{{ fetch }} by {{ input.url }}", "kind": {"kind": "x"}}
    assert steps["merge"]["needs"] == ["approval"]


def test_partial_fixes_arguments_and_nothing_in_them_is_an_expression() -> None:
    flow = fetch >> partial(f.merge, kind={"kind": "{{ fetch }}"})
    assert steps_of(flow)["merge"]["function"] == "flow_steps:merge"
    assert executed(flow, url="u").outputs == {"merge": "u after 3: {{ fetch }}"}


def test_a_parameter_that_has_no_name_for_a_caller_is_given_in_a_list() -> None:
    assert steps_of(Parallel(f.twice, fetch) >> f.add, inputs={"n": {"type": "integer"}})["add"]["input"] == [
        "{{ twice }}",
        "{{ fetch }}",
    ]


def test_the_first_functions_say_what_the_inputs_are() -> None:
    made = built(step(f.wants) | fetch)
    inputs: Any = made.to_dict()["inputs"]
    assert inputs == {
        "kind": {"type": "string", "enum": ["a", "b"]},
        "many": {"type": "array", "items": {"type": "integer"}},
        "how": {"type": "object", "additionalProperties": {"type": "integer"}},
        "maybe": {"type": "string", "required": False},
        "rate": {"type": "number", "default": 0.5},
        "loud": {"type": "boolean", "default": False},
        "url": {"type": "string"},
        "tries": {"type": "integer", "default": 3},
    }
    given = {"kind": "a", "many": [1], "how": {"x": 1}}
    assert executed(step(f.wants), **given).outputs == {"wants": ["a", [1], {"x": 1}, None, 0.5, False, True]}


def test_an_input_that_two_ask_for_has_to_be_there_if_one_cannot_do_without_it() -> None:
    def other(tries: int) -> int:
        return tries

    assert executed(fetch | other, url="u", tries=5).outputs == {"fetch": "u after 5", "other": 5}
    assert built(fetch | step(f.fetch.function, name="more")).inputs["tries"].default == 3
    with pytest.raises(ferrum.errors.InputError, match="input 'tries' is missing"):
        executed(fetch | other, url="u")


def test_inputs_that_are_said_win() -> None:
    made = built(fetch, inputs={"url": {"type": "string", "format": "uri"}, "more": {"type": "array"}})
    assert made.inputs.keys() == {"url", "tries", "more"}
    assert made.inputs["url"].keywords == {"format": "uri"}


# What goes around


@pytest.mark.parametrize(
    ("flow", "said"),
    [
        (
            Retry(f.words, 5, on=["timeout"]),
            "  words: {type: task, function: 'flow_steps:words', input: {text: '{{ input.text }}'},"
            " retry: {max_attempts: 5, on: [timeout]}}",
        ),
        (
            Retry(Timeout(f.words, "5s"), 2),
            "  words: {type: task, function: 'flow_steps:words', input: {text: '{{ input.text }}'},"
            " retry: {max_attempts: 2}, timeout: 5s}",
        ),
        (
            Timeout(Retry(f.words, 2), 5).named("whole"),
            "  whole: {timeout: 5s, steps: {words: {type: task, function: 'flow_steps:words',"
            " input: {text: '{{ input.text }}'}, retry: {max_attempts: 2}}}}",
        ),
        (
            Fallback(f.words, f.summarise >> f.words, Retry(Fallback(f.words, f.words))),
            """
  words:
    {type: task, function: 'flow_steps:words', input: {text: '{{ input.text }}'}, fallback: [
      {steps: {summarise: {type: task, function: 'flow_steps:summarise', input: {text: '{{ input.text }}'}},
               words_2: {type: task, function: 'flow_steps:words', input: {text: '{{ summarise }}'}}}},
      {retry: {}, steps: {words_2: {type: task, function: 'flow_steps:words', input: {text: '{{ input.text }}'},
        fallback: [{type: task, function: 'flow_steps:words', input: {text: '{{ input.text }}'}}]}}}]}""",
        ),
        (
            Saga((f.twice, f.enough), (Retry(f.twice), step(f.nothing) >> f.nothing), f.twice),
            """
  twice: {type: task, function: 'flow_steps:twice', input: {n: '{{ input.n }}'},
    compensate: {type: task, function: 'flow_steps:enough', input: {n: '{{ output }}'}}}
  twice_2: {type: task, function: 'flow_steps:twice', input: {n: '{{ twice }}'}, retry: {}, compensate: {steps: {
    nothing: {type: task, function: 'flow_steps:nothing'},
    nothing_2: {type: task, function: 'flow_steps:nothing', needs: [nothing]}}}}
  twice_3: {type: task, function: 'flow_steps:twice', input: {n: '{{ twice_2 }}'}}""",
        ),
        (
            fetch >> cached(f.words, ttl="1h") >> cached(for_each(Retry(f.is_bug)), ttl="1h", key="k", scope="global"),
            """
  fetch: {type: task, function: 'flow_steps:fetch', input: {url: '{{ input.url }}', tries: '{{ input.tries }}'}}
  words: {type: task, function: 'flow_steps:words', input: {text: '{{ fetch }}'},
    cache: {key: '{{ fetch }}', ttl: 1h}}
  block: {cache: {key: k, ttl: 1h, scope: global}, steps: {
    is_bug: {type: task, function: 'flow_steps:is_bug', input: {text: '{{ item }}'}, for_each: '{{ words }}',
      retry: {}}}}""",
        ),
        (
            f.fetch >> (step(f.words) | f.words) >> for_each(f.is_bug, as_="doc", max_parallel=2, on_error="collect"),
            """
  fetch: {type: task, function: 'flow_steps:fetch', input: {url: '{{ input.url }}', tries: '{{ input.tries }}'}}
  words: {type: task, function: 'flow_steps:words', input: {text: '{{ fetch }}'}}
  words_2: {type: task, function: 'flow_steps:words', input: {text: '{{ fetch }}'}}
  is_bug: {type: task, function: 'flow_steps:is_bug', input: {text: '{{ doc }}'},
    for_each: ['{{ words }}', '{{ words_2 }}'], as: doc, max_parallel: 2, on_error: collect}""",
        ),
        (
            repeat(f.twice, until="twice > 20", max=9, carry=True, on_max="pass"),
            "  twice: {type: task, function: 'flow_steps:twice', input:"
            " {n: '{{ round == 1 ? (input.n) : previous }}'}, repeat: {until: twice > 20, max: 9, on_max: pass}}",
        ),
        (
            repeat(f.twice, until=f.enough, max=9),
            """
  block: {repeat: {until: enough, max: 9}, output: '{{ twice }}', steps: {
    twice: {type: task, function: 'flow_steps:twice', input: {n: '{{ input.n }}'}},
    enough: {type: task, function: 'flow_steps:enough', input: {n: '{{ twice }}'}}}}""",
        ),
        (
            f.fetch >> Conditional(f.is_bug, f.summarise >> f.words),
            """
  fetch: {type: task, function: 'flow_steps:fetch', input: {url: '{{ input.url }}', tries: '{{ input.tries }}'}}
  is_bug: {type: task, function: 'flow_steps:is_bug', input: {text: '{{ fetch }}'}}
  switch: {type: switch, value: '{{ is_bug ? "then" : "otherwise" }}', cases: {then: {steps: {
    summarise: {type: task, function: 'flow_steps:summarise', input: {text: '{{ fetch }}'}},
    words: {type: task, function: 'flow_steps:words', input: {text: '{{ summarise }}'}}}}}}""",
        ),
        (
            Conditional("input.n > 3 || false", f.twice, f.nothing),
            """
  switch: {type: switch, value: '{{ (input.n > 3 || false) ? "then" : "otherwise" }}', cases: {
    then: {type: task, function: 'flow_steps:twice', input: {n: '{{ input.n }}'}},
    otherwise: {type: task, function: 'flow_steps:nothing'}}}""",
        ),
        (
            f.fetch >> Switch("{{ fetch }}", {"a": f.words, "b c": Retry(f.words)}, approval("?")).named("kind"),
            """
  fetch: {type: task, function: 'flow_steps:fetch', input: {url: '{{ input.url }}', tries: '{{ input.tries }}'}}
  kind: {type: switch, value: '{{ fetch }}', cases: {
    a: {type: task, function: 'flow_steps:words', input: {text: '{{ fetch }}'}},
    b c: {type: task, function: 'flow_steps:words', input: {text: '{{ fetch }}'}, retry: {}}},
    default: {type: approval, message: '?'}}""",
        ),
        (
            Router({"small": llm("x", model="s").with_(cost=1), "big": (llm("x") >> f.words).with_(cost=9)}, by="cost"),
            """
  router: {type: router, by: cost, among: {small: {type: llm, prompt: x, model: s, cost: 1}, big: {cost: 9, steps: {
    llm: {type: llm, prompt: x}, words: {type: task, function: 'flow_steps:words', input: {text: '{{ llm }}'}}}}}}""",
        ),
        (
            tool("git.log", {"count": 5}) >> wait(for_="1h") >> task("flows.shout", {"text": "x"})
            >> step_of("artifact", name_="r.md", content="{{ git_log }}", when="size(git_log) > 2"),
            """
  git_log: {type: tool, tool: git.log, input: {count: 5}}
  wait: {type: wait, for: 1h, needs: [git_log]}
  shout: {type: task, task: flows.shout, input: {text: x}, needs: [wait]}
  artifact: {type: artifact, name: r.md, content: '{{ git_log }}', when: size(git_log) > 2, needs: [shout]}""",
        ),
    ],
)  # fmt: skip
def test_what_goes_around_is_what_one_would_write(flow: Flow, said: str) -> None:
    inputs = {name: {"type": "string"} for name in ("text", "url", "tries")} | {"n": {"type": "integer"}}
    hand = Workflow.parse(f"name: x\ninputs: {json.dumps(inputs)}\nsteps:\n{said}")
    made = built(flow, name="x", inputs=inputs)
    assert made.steps == hand.steps
    assert [*made.steps] == [*hand.steps]
    assert Workflow.of(made.to_dict()) == made


def test_what_stands_further_in_already_gets_a_step_around_it() -> None:
    assert [*steps_of(Retry(Retry(f.fetch)))] == ["block"]
    assert [*steps_of(Retry(Timeout(cached(for_each(f.words, over=["a"]), ttl=1), 2)))] == ["block"]
    assert steps_of(Retry(Conditional("true", f.fetch)))["block"]["steps"]["switch"]["type"] == "switch"
    assert steps_of(for_each(cached(Retry(Timeout(f.words, 1)), ttl=1), over=["a"]))["words"]["timeout"] == 1.0


def test_with_says_anything_that_a_file_may_say() -> None:
    flow = step(f.twice, retry={"max_attempts": 2}).with_(when="input.n > 1", on_error="continue", fallback=[f.nothing])
    twice = steps_of(flow, inputs={"n": {"type": "integer"}})["twice"]
    assert (twice["when"], twice["on_error"], twice["retry"]) == ("input.n > 1", "continue", {"max_attempts": 2})
    assert twice["fallback"] == [{"type": "task", "function": "flow_steps:nothing"}]
    assert steps_of(step(f.twice).with_(compensate=f.enough))["twice"]["compensate"]["input"] == {"n": "{{ output }}"}


def test_a_flow_is_a_value() -> None:
    plain = step(f.twice)
    plain.with_(when="true")
    plain.named("other")
    assert plain == step(f.twice)
    assert fetch >> plain == fetch >> step(f.twice)


def test_a_plan_takes_a_flow_as_it_is() -> None:
    assert Plan(fetch >> summarise).digest == Plan((fetch >> summarise).workflow()).digest


def test_a_decorator_may_say_what_a_step_may_say() -> None:
    @step(name="whole", timeout="5s")
    def inner(n: int) -> int:
        return n

    assert inner == step(inner.function, name="whole", timeout="5s")
    assert inner(3) == 3


def test_the_name_of_the_whole_is_that_of_the_workflow() -> None:
    named = (fetch >> summarise).named("triage")
    assert (named.workflow().name, [*named.workflow().steps]) == ("triage", ["fetch", "summarise"])
    assert named.workflow("other").name == "other"
    assert (fetch | summarise).workflow(inputs={"text": {"type": "string"}}).name == "fetch-summarise"


def test_steps_are_called_after_their_functions() -> None:
    def filter(n: int) -> int:
        return n

    def __x(n: int) -> int:
        return n

    async def names() -> list[str]:
        flow = Parallel(filter, __x, lambda n: n, lambda n: n, f.fetch, f.fetch, step(f.twice, name="fetch_2"))
        return [*(await flow.execute({"n": 1, "url": "u"})).steps]

    assert asyncio.run(names()) == ["filter_", "x_", "step", "step_2", "fetch", "fetch_3", "fetch_2"]


def test_steps_in_different_branches_may_have_the_same_name() -> None:
    case = summarise >> f.words
    cases = steps_of(fetch >> Switch(f.classify, {"a": case, "b": case}))["switch"]["cases"]
    assert cases["a"] == cases["b"]
    assert [*cases["a"]["steps"]] == ["summarise", "words"]


# What is refused


def test_what_no_worker_could_import_is_refused_but_for_here() -> None:
    def inner(n: int) -> int:
        return n

    said = refusal(Parallel(inner, partial(lambda n: n, n=1), f.Kind().static, len, fetch))
    assert said.splitlines()[:4] == [
        "'inner' can only be executed here: no worker can import 'inner', which is defined inside another function;"
        " define it at the top of a module that FERRUM_IMPORTS names on the workers",
        "'step' can only be executed here: no worker can import a lambda;"
        " define it at the top of a module that FERRUM_IMPORTS names on the workers",
        "'static' can only be executed here: no worker can import 'Kind.static', which 'flow_steps' does not export;"
        " define it at the top of a module that FERRUM_IMPORTS names on the workers",
        "'len' can only be executed here: no worker can import 'len', which is no function of a module;"
        " define it at the top of a module that FERRUM_IMPORTS names on the workers",
    ]
    with pytest.raises(WorkflowError, match="no worker can import a lambda"):
        ferrum.submit(step(lambda: 1))


def test_a_function_that_cannot_be_called_so_is_refused() -> None:
    assert refusal((fetch | f.nothing | f.fetch) >> f.merge) == (
        "'merge' is called with 3 arguments (fetch, nothing, fetch_2) and takes 2"
    )
    assert refusal(fetch >> f.merge) == (
        "'merge' is called with fetch, and nothing is there for its 'kind': say input= in step()"
    )
    assert "'add' cannot be called both with a list of arguments and by name" in refusal(fetch >> partial(f.add, b=1))


def test_inputs_that_nobody_can_tell_are_refused() -> None:
    assert refusal(step(untyped)) == (
        "nothing says of what type the input 'thing' is: annotate the parameter of 'untyped' (str, int, float, bool,"
        " list, dict), or say inputs={'thing': {'type': …}}"
    )
    assert "the input 'text' is array for 'other_text' and string for 'words'" in refusal(Parallel(other_text, f.words))
    refused = refusal(Parallel(fetch, hasty))
    assert refused == "where 'tries' is not given, 'fetch' and 'hasty' take different values: say inputs="
    assert "'words' is the first, and its items are not known: say over=" in refusal(for_each(f.words))
    assert "there is no input 'topic'" in refusal(llm("{{ input.topic }}"))


def untyped(thing: Any) -> Any:
    return thing


def hasty(tries: int = 1) -> int:
    return tries


def other_text(text: list[str]) -> list[str]:
    return text


def test_two_steps_cannot_be_called_the_same() -> None:
    ask = llm("x", name="ask")
    assert refusal(ask >> ask) == "two steps beside each other are called 'ask': call one of them something else"
    assert "there is a step 'ask' around this one already" in refusal(ask >> Retry(f.nothing >> ask))


def test_a_loop_whose_rounds_begin_with_a_loop_is_refused_where_both_would_be_previous() -> None:
    inner = repeat(f.twice, until="twice > 3", max=3)
    refused = refusal(repeat(inner >> f.twice, until=f.enough, max=3, carry=True))
    assert "the two 'previous' would be one" in refused


@pytest.mark.parametrize("value", [3, "fetch", None, partial(f.merge, "x")])
def test_what_is_no_step_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="is no step"):
        fetch >> value
    with pytest.raises(TypeError, match="is no step"):
        value | fetch


def test_celery_signatures_are_not_taken_and_celery_tasks_are() -> None:
    with pytest.raises(TypeError, match="a Celery signature is no step: put the task itself here"):
        fetch >> f.shout.s()
    with pytest.raises(TypeError, match="a Celery signature is no step"):
        f.shout.s() | fetch
    assert steps_of(fetch >> f.shout)["shout"] == {
        "type": "task",
        "task": "flows.shout",
        "input": {"text": "{{ fetch }}"},
    }
    assert executed(fetch >> f.shout, url="u").outputs == {"shout": "u after 3!"}


def test_an_empty_flow_is_refused() -> None:
    with pytest.raises(TypeError, match="Parallel is of at least one step"):
        Parallel()
    with pytest.raises(TypeError, match="is a flow already"):
        step(fetch >> summarise)  # type: ignore[call-overload]


# Here and now


def test_a_step_can_be_called_as_the_function_that_it_is_of() -> None:
    assert f.fetch("u", tries=1) == "u after 1"
    assert asyncio.run(f.summarise("a")) == "A"


def test_lambdas_and_functions_inside_others_are_executed_here() -> None:
    seen: list[int] = []

    async def keep(n: int) -> int:
        seen.append(n)
        return n

    flow = step(lambda n: n + 1) >> (step(keep) | (lambda n: n * 10)) >> (lambda *ns: sum(ns))
    result = executed(flow, n=1)
    assert (result.status, result.outputs, seen) == (RunStatus.COMPLETED, {"step_3": 22}, [2])


def test_what_is_not_annotated_has_the_type_of_what_it_is_given() -> None:
    flow = step(lambda topic, n: [topic, n]) >> for_each(lambda item: item) >> repeat(
        lambda items: [*items, "x"], until=lambda items: len(items) > 4, max=5, carry=True
    )  # fmt: skip
    assert executed(flow, topic="tides", n=2).outputs == {"block": ["tides", 2, "x", "x", "x"]}
    assert executed(Conditional("input.n > 1", f.nothing, lambda: "else"), n=1).outputs == {"switch": "else"}


def test_a_choice_is_made_by_a_function_or_by_an_expression() -> None:
    flow = fetch >> Conditional(f.is_bug, lambda text: "a bug", lambda text: "no bug")
    assert [executed(flow, url=url).outputs for url in ("a bug", "a cat")] == [
        {"switch": "a bug"},
        {"switch": "no bug"},
    ]
    kinds = fetch >> Switch(lambda text: text[0], {"a": f.words, "1": f.nothing}, default=lambda text: "?")
    assert [executed(kinds, url=url, tries=1).outputs for url in ("a", "1", "x")] == [
        {"switch": ["a", "after", "1"]},
        {"switch": "nothing"},
        {"switch": "?"},
    ]


def test_a_saga_undoes_what_was_done_the_last_first() -> None:
    undone: list[str] = []

    def fail() -> None:
        raise ferrum.errors.StepError("full")

    saga = Saga((lambda: "hotel", undone.append), (lambda: "train", undone.append), fail)
    result = executed(saga)
    assert (result.status, undone) == (RunStatus.FAILED, ["train", "hotel"])
    assert result.steps["fail"].error == "full"


def test_a_failure_is_tried_again_and_then_something_else_is_tried() -> None:
    tries: list[int] = []

    def flaky(n: int) -> int:
        tries.append(n)
        raise OSError("away")

    flow = Fallback(Retry(flaky, 3, backoff=0), lambda n: -n)
    assert (executed(flow, n=2).outputs, tries) == ({"flaky": -2}, [2, 2, 2])


# On workers


@pytest.fixture(scope="module")
def workers(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(redis_url, tmp_path_factory.mktemp("flows"), {"FERRUM_IMPORTS": "user_tasks,flow_steps"})
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


def test_a_flow_runs_on_workers_as_it_does_here(workers: Fleet) -> None:
    flow = (
        fetch
        >> (summarise | f.classify)
        >> f.merge
        >> Conditional(f.is_bug, f.words, f.shout >> summarise >> f.words)
        >> for_each(f.shout)
        >> f.together
    )
    for url in ("a bug", "a cat"):
        run = ended(ferrum.submit(Conditional("input.url == 'a bug'", flow, flow), {"url": url, "tries": 1}))
        here = executed(Conditional("input.url == 'a bug'", flow, flow), url=url, tries=1)
        assert (run.status, run.outputs) == (here.status, here.outputs), run.reason
        assert run.status is RunStatus.COMPLETED


def test_rounds_are_carried_on_workers(workers: Fleet) -> None:
    run = ended(ferrum.submit(repeat(f.twice, until=f.enough, max=9, carry=True).named("twiced"), {"n": 3}))
    assert run.outputs == {"twiced": 24}, run.reason


def test_a_saga_is_undone_on_workers(workers: Fleet, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    booked = [(step(f.book, input={"log": log, "what": what}), f.cancel) for what in ("hotel", "train")]
    run = ended(ferrum.submit(Saga(*booked, step(f.full, input=[log]))))
    assert run.status is RunStatus.FAILED
    assert Path(log).read_text().split("\n") == ["book hotel", "book train", "cancel train", "cancel hotel", ""]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (
            "os:system",
            "functions of the modules in FERRUM_IMPORTS (user_tasks,flow_steps); name 'os' there",
        ),
        ("flow_stepsx:fetch", "name 'flow_stepsx' there"),
        ("flow_steps:system", "there is no function 'system' in 'flow_steps'"),
        ("flow_steps:shared_task", "'flow_steps' does not export 'shared_task'"),
        ("flow_steps:missing", "there is no function 'missing' in 'flow_steps'"),
        ("flow_steps:shout", "a Celery task goes by its name"),
        ("flow_steps.deeper:x", "this worker cannot import 'flow_steps.deeper'"),
    ],
)
def test_a_workflow_reaches_no_function_that_the_worker_was_not_told_of(
    workers: Fleet, function: str, why: str
) -> None:
    run = ended(ferrum.submit({"name": "x", "steps": {"a": {"type": "task", "function": function, "input": ["true"]}}}))
    assert run.status is RunStatus.FAILED
    assert why in (run.steps[0].error or "")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"function": "os.system"}, "'os.system' is no function: write module:function"),
        ({"function": "a:b()"}, "is no function"),
        ({"function": "flow_steps:os.path.join"}, "is no function"),
        ({"function": "a:b", "task": "c"}, "give either a 'task' or a 'function'"),
        ({}, "give either a 'task' or a 'function'"),
    ],
)
def test_a_task_step_says_which_task_or_which_function(said: dict[str, str], why: str) -> None:
    with pytest.raises(WorkflowError, match=why.replace("(", r"\(")):
        Plan.of({"name": "x", "steps": {"a": {"type": "task", **said}}})


# Any of them

_LEAVES = st.sampled_from([f.fetch, f.nothing, f.together, approval("?"), llm("x")])


def _grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        several.map(lambda flows: Sequential(*flows)),
        several.map(lambda flows: Parallel(*flows)),
        inner.map(Retry),
        inner.map(lambda flow: Timeout(flow, 5)),
        inner.map(lambda flow: for_each(flow, over=[1, 2])),
        several.map(lambda flows: Fallback(*flows)),
        st.tuples(inner, inner).map(lambda two: Conditional(f.nothing, *two)),
        inner.map(lambda flow: Switch("{{ input.url }}", {"a b": flow, "default": f.nothing})),
        st.tuples(inner, st.sampled_from([f.nothing, f.together])).map(Saga),
    )


@settings(max_examples=60, deadline=None)
@given(st.recursive(_LEAVES, _grown, max_leaves=12))
def test_any_tree_makes_a_plan_that_is_read_back_the_same(flow: Any) -> None:
    flow = Sequential(step(f.together, input=[]), flow, step(f.together, name="last"))
    try:
        made = flow.workflow(inputs={"url": {"type": "string"}, "tries": {"type": "integer"}})
    except WorkflowError as error:
        # More outputs before a function than it has parameters: refused, and not what this is about.
        assume("is called with" not in str(error))
        raise
    assert Workflow.of(made.to_dict()) == made
    # The last one comes after everything.
    before = {need for name in made.steps for need in made.needs_of(name)}
    assert set(made.steps) - before == {"last"}
    assert len(Plan(made).top.last) == 1

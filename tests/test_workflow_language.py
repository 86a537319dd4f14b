"""Steps that are made of steps, and what changes how a step is run: what an author may say, and what is refused."""

from __future__ import annotations

import contextlib
import json
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ferrum.errors import WorkflowError
from ferrum.workflow import Cache, Concurrency, Rate, Repeat, Retry, Route, Step, Workflow, inner_needs, workflow_schema

LANGUAGE = """\
name: everything
deadline: 2d
priority: 7
inputs:
  urls: {type: array}
steps:
  each:
    for_each: "{{ input.urls }}"
    as: url
    max_parallel: 4
    on_error: collect
    steps:
      page: {type: task, task: fetch, input: {url: "{{ url }}", number: "{{ url_index }}"}}
      sum: {type: llm, prompt: "{{ page.text }}", needs: [page]}
      both:
        steps:
          deep: {type: task, task: t, input: "{{ [sum, url, page] }}"}
    output: "{{ sum }}"
    fallback:
      - {type: task, task: other, input: {url: "{{ url }}", why: "{{ error }}"}}
      - steps:
          again: {type: task, task: other, input: "{{ error }}"}
    compensate: {type: task, task: undo, input: ["{{ output }}", "{{ params }}", "{{ url }}"]}
    cache: {key: "{{ url }}", ttl: 1h, scope: global}
  draft:
    type: llm
    when: size(each) > 0
    prompt: "{{ each }} {{ previous }} {{ round }}"
    repeat: {until: 'draft.good || round > 3 || previous == ""', max: 5, on_max: pass}
    concurrency: {key: "draft-{{ round }}", limit: 2}
    rate: {key: draft, limit: 10, per: 1m}
    retry: {max_attempts: 5, on: [timeout, rate_limit]}
    deadline: 1h
    on_error: continue
  sort:
    type: switch
    value: "{{ draft.kind }}"
    cases:
      bug: {type: approval, message: "{{ draft.kind }}"}
      a question: {steps: {q: {type: task, task: t, default: kept, steps: [kept]}}}
      "default": {type: task, task: t}
    default: {type: task, task: t}
  pick:
    type: router
    by: [health, cost]
    max_cost: "{{ size(draft) }}"
    among:
      small: {type: llm, tier: 1, cost: 0.5, latency: 200, prompt: "{{ sort }}"}
      big: {type: llm, tier: 2, target: far, prompt: "{{ each[0] }}"}
      odd: {type: llm, prompt: x}
  sub:
    type: workflow
    input: {n: "{{ pick }}"}
    workflow:
      name: sub
      inputs: {n: {type: integer}}
      steps:
        each: {type: task, task: t, input: "{{ input.n }}"}
        gone: {type: task, task: t, input: "{{ each }}"}
outputs: {sub: "{{ sub }}"}
"""


def workflow(steps: str) -> Workflow:
    return Workflow.parse(f"name: test\ninputs: {{list: {{type: array}}}}\nsteps:\n{steps}")


def refusals(steps: str) -> list[str]:
    with pytest.raises(WorkflowError) as caught:
        workflow(steps)
    return [str(problem) for problem in caught.value.problems]


def refusal(steps: str) -> str:
    [problem] = refusals(steps)
    return problem


# What is read


def test_everything_that_the_language_has_is_read() -> None:
    made = Workflow.parse(LANGUAGE)
    each, draft, sort, pick = (made.steps[name] for name in ("each", "draft", "sort", "pick"))

    assert (made.deadline, made.priority) == (172_800.0, 7)
    assert (each.type, each.for_each, each.item, each.index) == ("block", "{{ input.urls }}", "url", "url_index")
    assert (each.max_parallel, each.on_error, each.has_for_each) == (4, "collect", True)
    assert [*each.steps] == ["page", "sum", "both"]
    assert each.params == {"output": "{{ sum }}"}
    assert each.cache == Cache(key="{{ url }}", ttl=3600.0, scope="global")
    assert draft.repeat == Repeat(until='draft.good || round > 3 || previous == ""', max=5, on_max="pass")
    assert draft.concurrency == Concurrency(key="draft-{{ round }}", limit=2)
    assert draft.rate == Rate(key="draft", limit=10, per=60.0)
    assert draft.retry == Retry(max_attempts=5, on=("timeout", "rate_limit"))
    assert (draft.deadline, draft.on_error, draft.has_for_each) == (3600.0, "continue", False)
    assert sort.params == {"value": "{{ draft.kind }}"}
    assert pick.params == {"by": ["health", "cost"], "max_cost": "{{ size(draft) }}"}
    assert pick.among["small"].route == Route(tier=1, cost=0.5, latency=200.0)
    assert pick.among["big"].params == {"prompt": "{{ each[0] }}"}
    assert pick.among["odd"].route == Route()


def test_a_step_inside_another_has_its_local_name() -> None:
    steps = Workflow.parse(LANGUAGE).steps
    assert [step.id for _, step in steps["each"].inner] == [
        *("page", "sum", "both", "fallback1", "fallback2", "compensate"),
    ]
    assert [where for where, _ in steps["each"].inner] == [
        *(("steps", "page"), ("steps", "sum"), ("steps", "both")),
        *(("fallback", 0), ("fallback", 1), ("compensate",)),
    ]
    assert {text: step.id for text, step in steps["sort"].cases.items()} == {
        "bug": "bug",
        "a question": "case2",
        "default": "case3",
    }
    assert steps["sort"].default is not None
    assert steps["sort"].default.id == "default"
    assert [step.id for step in steps["pick"].among.values()] == ["small", "big", "odd"]


def test_only_a_type_that_is_made_of_steps_takes_them() -> None:
    inner = Workflow.parse(LANGUAGE).steps["sort"].cases["a question"].steps["q"]
    assert (inner.params, inner.default, inner.steps) == ({"task": "t", "default": "kept", "steps": ["kept"]}, None, {})


def test_a_step_waits_for_what_is_named_anywhere_inside_it() -> None:
    made = Workflow.parse(LANGUAGE)
    assert {name: made.needs_of(name) for name in made.steps} == {
        "each": (),
        "draft": ("each",),
        "sort": ("draft",),
        "pick": ("each", "draft", "sort"),
        "sub": ("pick",),
    }
    assert inner_needs(made.steps["each"].steps) == {"page": (), "sum": ("page",), "both": ("page", "sum")}


def test_what_is_bound_inside_a_step_is_nothing_that_it_takes_from_outside() -> None:
    steps = Workflow.parse(LANGUAGE).steps
    assert steps["each"].references == {"input"}
    assert steps["each"].own_references == {"input", "url", "sum"}
    assert steps["each"].steps["both"].references == {"sum", "url", "page"}
    assert steps["draft"].references == {"each"}
    assert steps["draft"].own_references == {"each", "draft", "round", "previous"}
    assert steps["sort"].references == {"draft"}
    assert steps["sub"].references == {"pick"}
    assert steps["sub"].templates == {"input": {"n": "{{ pick }}"}}


def test_it_comes_back_from_its_dictionary() -> None:
    made = Workflow.parse(LANGUAGE)
    written = json.loads(json.dumps(made.to_dict()))
    again = Workflow.of(written)
    assert again == made
    assert again.to_dict() == written
    assert written["steps"]["each"]["as"] == "url"
    assert written["steps"]["pick"]["among"]["big"] == {
        "type": "llm",
        "tier": 2,
        "target": "far",
        "prompt": "{{ each[0] }}",
    }


def test_workflows_whose_steps_inside_are_in_another_order_differ() -> None:
    one, other = "a: {steps: {b: {type: x}, c: {type: x}}}", "a: {steps: {c: {type: x}, b: {type: x}}}"
    assert workflow(f"  {one}") != workflow(f"  {other}")
    assert workflow(f"  {one}") == workflow("  a: {type: block, steps: {b: {type: x}, c: {type: x}}}")


def test_what_is_not_said_is_not_in_its_dictionary() -> None:
    made = workflow("  a: {type: x}")
    assert {"deadline", "priority"} & made.to_dict().keys() == set()
    assert made.steps["a"].to_dict() == {"type": "x"}
    assert made.steps["a"].has_for_each is False


def test_steps_are_values_that_can_be_made_in_python() -> None:
    inner = Step(id="a", type="x", for_each="{{ input.list }}", item="one", params={"p": "{{ one }}"})
    outer = Step(id="b", type="block", steps={"a": inner})
    assert workflow("  b: {steps: {a: {type: x, for_each: '{{ input.list }}', as: one, p: '{{ one }}'}}}").steps == {
        "b": outer
    }


def test_loops_inside_of_loops_bind_what_is_innermost() -> None:
    made = workflow("""\
  a:
    for_each: "{{ input.list }}"
    steps:
      b: {for_each: "{{ item }}", type: x, p: "{{ item }} {{ index }}"}
      c: {for_each: "{{ [item] }}", as: other, type: x, p: "{{ item }} {{ other }} {{ index }} {{ other_index }}"}
""")
    assert made.steps["a"].references == {"input"}
    assert made.steps["a"].steps["b"].references == {"item"}
    assert made.steps["a"].steps["c"].references == {"item", "index"}


def test_until_sees_the_steps_of_the_round() -> None:
    made = workflow("""\
  a: {type: x}
  b:
    steps: {try: {type: x, p: "{{ previous }}"}, test: {type: x, p: "{{ try }} {{ a }}"}}
    repeat: {until: test.passed && b != null && a.fine, max: 3}
""")
    assert made.needs_of("b") == ("a",)


def test_a_case_is_called_by_its_own_label_in_its_until() -> None:
    assert (
        workflow("""\
  a:
    type: switch
    value: x
    cases: {yes please: {type: x, repeat: {until: case1.done, max: 2}}}
""").needs_of("a")
        == ()
    )


# What is refused


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        # Names at any depth.
        (
            "  a: {steps: {b: {steps: {prepare: {type: x}, d: {type: x, p: '{{ prepair }}'}}}}}",
            "4:63: steps.a.steps.b.steps.d.p: 'prepair' is not a step (did you mean 'prepare'?)",
        ),
        (
            "  a: {type: x, fallback: [{type: x}, {type: x, p: '{{ eror }}'}]}",
            "4:51: steps.a.fallback[1].p: 'eror' is not a step (did you mean 'error'?)",
        ),
        (
            "  a: {type: x, for_each: [1], as: document, p: '{{ documnt }}'}",
            "4:48: steps.a.p: 'documnt' is not a step (did you mean 'document'?)",
        ),
        (
            "  a: {type: x, compensate: {steps: {b: {type: x, p: '{{ input.lst }}'}}}}",
            "4:53: steps.a.compensate.steps.b.p: there is no input 'lst' (did you mean 'list'?)",
        ),
        (
            "  a: {type: switch, value: x, cases: {'the first': {type: x, p: '{{ bb }}'}}}",
            "4:65: steps.a.cases.the first.p: 'bb' is not a step (there is: a, input)",
        ),
        (
            "  a: {steps: {first: {type: x}, b: {type: x, needs: [frist]}}}",
            "4:54: steps.a.steps.b.needs[0]: 'frist' is not a step (did you mean 'first'?)",
        ),
        (
            "  a: {steps: {b: {type: x, retry: {max_attempt: 1}}}}",
            "4:36: steps.a.steps.b.retry.max_attempt: there is no 'max_attempt' here (did you mean 'max_attempts'?)",
        ),
        (
            "  a: {type: x, rate: {key: k, limt: 1, limit: 1, per: 1}}",
            "4:31: steps.a.rate.limt: there is no 'limt' here (did you mean 'limit'?)",
        ),
        ("  a: {steps: {b: {p: 1}}}", "4:15: steps.a.steps.b.type: 'type' is missing"),
        ("  a: {steps: {b: 1}}", "4:18: steps.a.steps.b: this has to be a mapping"),
        (
            "  a: {type: x, fallback: [{type: x, p: '{{ b + }}'}]}",
            "4:40: steps.a.fallback[0].p: in `b +`: the expression ends too early",
        ),
        # Cycles.
        (
            "  a: {steps: {b: {type: x, p: '{{ c }}'}, c: {type: x, needs: [b]}}}",
            "4:15: steps.a.steps.b: these steps need each other: b -> c -> b",
        ),
        (
            "  a: {steps: {b: {type: x, p: '{{ c }}'}}}\n  c: {type: x, fallback: [{type: x, p: '{{ a }}'}]}",
            "4:3: steps.a: these steps need each other: a -> c -> a",
        ),
        # What is inside and what is around.
        (
            "  each: {steps: {total: {type: x}}}\n  b: {type: x, p: '{{ total }}'}",
            "5:19: steps.b.p: 'total' is inside 'each': only what 'each' returns can be used",
        ),
        (
            "  each: {steps: {total: {type: x}}}\n  b: {type: x, needs: [total]}",
            "5:24: steps.b.needs[0]: 'total' is inside 'each': only what 'each' returns can be used",
        ),
        (
            "  a: {steps: {b: {steps: {c: {type: x}}}, d: {type: x, p: '{{ c }}'}}}",
            "4:59: steps.a.steps.d.p: 'c' is inside 'b': only what 'b' returns can be used",
        ),
        (
            "  a: {steps: {b: {type: x}}, fallback: [{type: x, p: '{{ b }}'}]}",
            "4:54: steps.a.fallback[0].p: 'b' is inside 'a' and cannot be used here",
        ),
        (
            "  a: {steps: {b: {type: x, p: '{{ a }}'}}}",
            "4:31: steps.a.steps.b.p: 'a' is around this step: what it returns is known only when all that is inside is"
            " over",
        ),
        (
            "  a: {type: switch, value: x, cases: {b: {type: x, p: '{{ a }}'}}}",
            "4:55: steps.a.cases.b.p: 'a' is around this step: what it returns is known only when all that is inside is"
            " over",
        ),
        (
            "  a: {steps: {b: {type: x, needs: [a]}}}",
            "4:36: steps.a.steps.b.needs[0]: 'a' is around this step: what it returns is known only when all that is"
            " inside is over",
        ),
        (
            "  a: {type: x}\n  b: {steps: {c: {type: x, needs: [a]}}}",
            "5:36: steps.b.steps.c.needs[0]: 'a' is outside of 'b': let 'b' need it",
        ),
        (
            "  a: {type: x, fallback: [{type: x, p: '{{ a.x }}'}]}",
            "4:40: steps.a.fallback[0].p: the step 'a' refers to itself: this runs because it has failed, and `error`"
            " says why",
        ),
        (
            "  a: {type: x, compensate: {type: x, p: '{{ a.x }}'}}",
            "4:41: steps.a.compensate.p: the step 'a' refers to itself: what it returned is `output` here",
        ),
        (
            "  a: {type: x, p: '{{ a.x }}', repeat: {until: a.y, max: 2}}",
            "4:19: steps.a.p: the step 'a' refers to itself: what it returned in the round before is `previous`",
        ),
        # Names that are taken.
        ("  round: {type: x}", "4:3: steps.round: a step cannot be called 'round': the name is taken"),
        (
            "  a: {steps: {error: {type: x}}}",
            "4:15: steps.a.steps.error: a step cannot be called 'error': the name is taken",
        ),
        (
            "  a: {steps: {fallback1: {type: x}}}",
            "4:15: steps.a.steps.fallback1: a step cannot be called 'fallback1': the name is taken",
        ),
        (
            "  a: {type: x}\n  b: {steps: {a: {type: x}}}",
            "5:15: steps.b.steps.a: there is a step 'a' around this one already: call it something else",
        ),
        (
            "  a: {steps: {b: {steps: {a: {type: x}}}}}",
            "4:27: steps.a.steps.b.steps.a: there is a step 'a' around this one already: call it something else",
        ),
        (
            "  a: {for_each: [1], as: doc, steps: {doc_index: {type: x}}}",
            "4:39: steps.a.steps.doc_index: 'doc_index' is what the item of a 'for_each' around this step is called:"
            " call one of them something else",
        ),
        (
            "  a: {type: x}\n  b: {type: x, for_each: [1], as: a}",
            "5:35: steps.b.as: there is a step 'a' already: call the item something else",
        ),
        (
            "  a: {type: x, for_each: [1], as: input}",
            "4:35: steps.a.as: an item cannot be called 'input': the name is taken",
        ),
        (
            "  a: {type: x, for_each: [1], as: a-b}",
            "4:35: steps.a.as: the item 'a-b': a name is made of letters, digits and _, starts with no digit and has at"
            " most 64",
        ),
        # Names that mean something elsewhere.
        (
            "  a: {type: x, p: '{{ item }}'}",
            "4:19: steps.a.p: 'item' is there only in what is done for each item of a 'for_each', where 'as' does not"
            " call it something else",
        ),
        (
            "  a: {type: x, for_each: [1], as: doc, p: '{{ index }}'}",
            "4:43: steps.a.p: 'index' is there only in what is done for each item of a 'for_each', where 'as' does not"
            " call it something else",
        ),
        (
            "  a: {type: x, for_each: '{{ [round] }}'}",
            "4:26: steps.a.for_each: 'round' is there only in what is done in each round of a 'repeat'",
        ),
        (
            "  a: {type: x, repeat: {until: 'true', max: 2}, when: round == 1}",
            "4:55: steps.a.when: 'round' is there only in what is done in each round of a 'repeat'",
        ),
        (
            "  a: {type: x, for_each: [1], when: item > 1}",
            "4:37: steps.a.when: 'item' is there only in what is done for each item of a 'for_each', where 'as' does"
            " not call it something else",
        ),
        (
            "  a: {type: x, repeat: {until: 'true', max: 2}, fallback: [{type: x, p: '{{ previous }}'}]}",
            "4:73: steps.a.fallback[0].p: 'previous' is there only in what is done in each round of a 'repeat'",
        ),
        (
            "  a: {type: x, p: '{{ error }}'}",
            "4:19: steps.a.p: 'error' is there only in a 'fallback', where it says why the step failed",
        ),
        (
            "  a: {type: x, fallback: [{type: x, p: '{{ output }}'}]}",
            "4:40: steps.a.fallback[0].p: 'output' is there only in a 'compensate', where it is what its step returned",
        ),
        # Parts that do not go together.
        (
            "  a: {type: x, repeat: {until: 'true'}}",
            "4:16: steps.a.repeat.max: 'max' is missing: a loop has to end, so say how many rounds at most",
        ),
        (
            "  a: {type: x, repeat: {max: 2}}",
            "4:16: steps.a.repeat.until: 'until' is missing: say when the loop is done",
        ),
        (
            "  a: {type: x, repeat: {until: 'true', max: 0}}",
            "4:45: steps.a.repeat.max: this has to be greater than or equal to 1",
        ),
        (
            "  a: {type: x, repeat: {until: 'false', max: 2}}",
            "4:32: steps.a.repeat.until: a loop without an end: 'until' is never true, so the step can only fail; say"
            " when it is done, or 'on_max: pass' for so many rounds",
        ),
        (
            "  a: {type: x, when: 'false', compensate: {type: x}}",
            "4:31: steps.a.compensate: this step never completes, so there is never anything to undo: leave out"
            " 'compensate'",
        ),
        (
            "  a: {type: x, for_each: null}",
            "4:26: steps.a.for_each: 'for_each' needs a list, or one expression that gives a list, not null",
        ),
        (
            "  a: {type: x, for_each: {b: 1}}",
            "4:16: steps.a.for_each: 'for_each' needs a list, or one expression that gives a list, not a mapping",
        ),
        (
            "  a: {type: x, for_each: 3}",
            "4:26: steps.a.for_each: 'for_each' needs a list, or one expression that gives a list, not a number",
        ),
        (
            "  a: {type: x, for_each: true}",
            "4:26: steps.a.for_each: 'for_each' needs a list, or one expression that gives a list, not true or false",
        ),
        (
            "  a: {type: x, for_each: input.list}",
            "4:26: steps.a.for_each: 'for_each' needs a list, or one expression that gives a list: an expression stands"
            ' in braces, "{{ input.list }}"',
        ),
        (
            "  a: {type: x, for_each: 'all of {{ input.list }}'}",
            "4:26: steps.a.for_each: 'for_each' needs a list, or one expression that gives a list: with something"
            " before or after its braces it gives text",
        ),
        (
            "  a: {type: x, max_parallel: 3}",
            "4:30: steps.a.max_parallel: 'max_parallel' is for the items of 'for_each', and there is no 'for_each'"
            " here",
        ),
        (
            "  a: {type: x, as: doc}",
            "4:20: steps.a.as: 'as' is what an item of 'for_each' is called, and there is no 'for_each' here",
        ),
        (
            "  a: {type: x, on_error: collect}",
            "4:26: steps.a.on_error: 'collect' puts what failed into the list of a 'for_each', which is not here; say"
            " 'continue' or 'fail'",
        ),
        (
            "  a: {type: x, on_error: fail_fast}",
            "4:26: steps.a.on_error: 'fail_fast' stops the other items of a 'for_each', which is not here; say"
            " 'continue' or 'fail'",
        ),
        (
            "  a: {type: x, on_error: contniue}",
            "4:26: steps.a.on_error: this has to be 'fail', 'continue', 'fail_fast' or 'collect' (did you mean"
            " 'continue'?)",
        ),
        (
            "  a: {type: x, fallback: [{type: x, when: 'true'}]}",
            "4:43: steps.a.fallback[0].when: a fallback cannot have 'when': it runs in the place of its step, when what"
            " is before it has failed",
        ),
        (
            "  a: {type: x, compensate: {type: x, fallback: [{type: x}]}}",
            "4:38: steps.a.compensate.fallback: a compensation cannot have 'fallback': it runs once, to undo what its"
            " step did",
        ),
        (
            "  a: {type: x, compensate: {type: x, cache: {key: 1, ttl: 1}}}",
            "4:38: steps.a.compensate.cache: a compensation cannot have 'cache': it runs once, to undo what its"
            " step did",
        ),
        (
            "  a: {type: x, fallback: {type: x}}",
            "4:16: steps.a.fallback: this has to be a list",
        ),
        (
            "  a: {type: x, retry: {on: [timeuot]}}",
            "4:29: steps.a.retry.on[0]: this has to be 'timeout', 'rate_limit', 'unavailable' or 'error' (did you mean"
            " 'timeout'?)",
        ),
        (
            "  a: {type: approval, message: x, cache: {key: 1, ttl: 1}}",
            "4:35: steps.a.cache: what a person decided is not for other runs: an approval has no 'cache'",
        ),
        (
            "  a: {type: wait, for: 1, cache: {key: 1, ttl: 1}}",
            "4:27: steps.a.cache: a wait leaves nothing that another run could use: it has no 'cache'",
        ),
        (
            "  a: {type: x, cache: {key: 1, ttl: 1, scope: run}}",
            "4:47: steps.a.cache.scope: this has to be 'workflow' or 'global' (there is: global, workflow)",
        ),
        ("  a: {type: x, deadline: 0}", "4:26: steps.a.deadline: a duration of zero leaves no time at all"),
        (
            "  a: {type: x, concurrency: {key: x, limit: 0}}",
            "4:45: steps.a.concurrency.limit: this has to be greater than or equal to 1",
        ),
        (
            "  a: {concurrency: {key: desk, limit: 2}, steps: {b: {steps: {c: {type: x, concurrency: {key: desk,"
            " limit: 1}}}}}}",
            "4:95: steps.a.steps.b.steps.c.concurrency.key: 'a' has a place of 'desk' until all inside of it is over,"
            " and this would wait for one: each could wait for the other for ever; call this key something else, or"
            " leave out one of the two",
        ),
        (
            "  a: {steps: {b: {cache: {key: k, ttl: 1, scope: global}, type: switch, value: 1, cases: {c: {type: x,"
            " fallback: [{type: x, cache: {key: k, ttl: 1, scope: global}}]}}}}}",
            "4:138: steps.a.steps.b.cases.c.fallback[0].cache.key: 'a.b' computes 'k' until all inside of it is over,"
            " and this would wait for that: each would wait for the other for ever; call this key something else, or"
            " leave out one of the two",
        ),
        # Steps that are made of steps.
        ("  a: {type: block}", "4:3: steps.a: a block has to have 'steps'"),
        ("  a: {steps: {}}", "4:7: steps.a.steps: a block has to have at least one of 'steps'"),
        ("  a: {type: switch, value: 1}", "4:3: steps.a: a switch has to have 'cases'"),
        (
            "  a: {type: switch, value: 1, cases: {}}",
            "4:31: steps.a.cases: a switch has to have at least one of 'cases'",
        ),
        (
            "  a: {type: switch, value: 1, cases: {true: {type: x}}}",
            """4:39: steps.a.cases: a key has to be text in quotes, like "true\"""",
        ),
        (
            "  a: {type: switch, value: 1, cases: {b: {type: x, needs: [a]}}}",
            "4:52: steps.a.cases.b.needs: a case cannot have 'needs': it runs when the switch chooses it",
        ),
        (
            "  a: {type: switch, value: 1, cases: {b: {type: x}}, default: {type: x, when: 'true'}}",
            "4:79: steps.a.default.when: a default cannot have 'when': it runs when the switch finds no case",
        ),
        (
            "  a: {type: switch, value: 1, cases: {b: {type: x}}, retry: {}}",
            "4:54: steps.a.retry: a switch itself does nothing that could be tried again: put 'retry' on its cases",
        ),
        ("  a: {type: router, by: cost}", "4:3: steps.a: a router has to have 'among'"),
        (
            "  a: {type: router, by: csot, among: {b: {type: x}}}",
            "4:25: steps.a.by: a router cannot go by 'csot' (did you mean 'cost'?)",
        ),
        (
            "  a: {type: router, by: [cost, speed], among: {b: {type: x}}}",
            "4:32: steps.a.by[1]: a router cannot go by 'speed' (there is: cost, health, latency, tier)",
        ),
        (
            "  a: {type: router, by: [], among: {b: {type: x}}}",
            "4:21: steps.a.by: 'by' is empty: say 'cost', 'latency', 'tier' or 'health', or several of them",
        ),
        (
            "  a: {type: router, by: cost, among: {b: {type: x, tier: high}}}",
            "4:58: steps.a.among.b.tier: this has to be a whole number",
        ),
        (
            "  a: {type: router, by: cost, among: {b-c: {type: x}}}",
            "4:39: steps.a.among.b-c: 'b-c' becomes part of an id: letters, digits and _, no digit first",
        ),
        (
            "  a: {type: router, by: cost, among: {fallback1: {type: x}}}",
            "4:39: steps.a.among.fallback1: a step of a router cannot be called 'fallback1': the name is taken",
        ),
        (
            "  a: {type: router, by: cost, among: {b: {type: x, when: 'true'}}}",
            "4:58: steps.a.among.b.when: what is among those of a router cannot have 'when': it runs when the router"
            " chooses it",
        ),
        (
            "  a: {type: router, by: cost, among: {b: {type: x}}, retry: {}}",
            "4:54: steps.a.retry: a router goes on to the next of those it may choose: put 'retry' on what is 'among'"
            " them",
        ),
        # Workflows in workflows.
        (
            "  a: {type: workflow}",
            "4:3: steps.a: which workflow? say 'file', 'name', or put it here under 'workflow'",
        ),
        (
            "  a: {type: workflow, name: b, file: c.yaml}",
            "4:29: steps.a.name: 'file' and 'name' each say which workflow: leave out all but one",
        ),
        (
            "  a: {type: workflow, workflow: b.yaml}",
            "4:33: steps.a.workflow: the workflow itself has to stand here, a mapping with `name` and `steps`",
        ),
        (
            "  a: {type: workflow, version: '1', workflow: {name: b, steps: {a: {type: x}}}}",
            "4:32: steps.a.version: 'version' is for a workflow that is registered under a 'name'",
        ),
        (
            "  a: {type: workflow, file: b.yaml}",
            "4:29: steps.a.file: a file can only be named in a file, which is then loaded by its own path; here put the"
            " workflow itself, under 'workflow'",
        ),
        (
            "  a: {type: workflow, workflow: {name: b, steps: {c: {type: x, p: '{{ cc }}'}}}}",
            "4:67: steps.a.workflow.steps.c.p: 'cc' is not a step (did you mean 'c'?)",
        ),
        (
            "  a: {type: x}\n  b: {type: workflow, workflow: {name: b, steps: {c: {type: x, p: '{{ a }}'}}}}",
            "5:67: steps.b.workflow.steps.c.p: 'a' is not a step (there is: c, input)",
        ),
        (
            "  a: {type: workflow, workflow: {name: b, step: {}, steps: {c: {type: x}}}}",
            "4:43: steps.a.workflow.step: there is no 'step' here (did you mean 'steps'?)",
        ),
        (
            "  a: {type: workflow, workflow: {name: b, inputs: {n: {type: string}}, steps: {c: {type: x}}}}",
            "4:3: steps.a.input: the input 'n' of 'b' is missing",
        ),
        (
            "  a: {type: workflow, input: {m: 1}, workflow: {name: b, steps: {c: {type: x}}}}",
            "4:34: steps.a.input.m: 'b' has no input 'm' (it declares no `inputs`)",
        ),
        (
            "  a: {type: workflow, input: {m: 1}, workflow: {name: b, inputs: {m: {type: string}},"
            " steps: {c: {type: x}}}}",
            "4:34: steps.a.input.m: 1 is not of type 'string'",
        ),
    ],
)
def test_what_cannot_be_is_refused_where_it_stands(steps: str, message: str) -> None:
    assert refusal(steps) == message


def test_the_priority_of_a_workflow_is_from_0_to_9() -> None:
    with pytest.raises(WorkflowError, match="priority: this has to be less than or equal to 9"):
        Workflow.parse("name: test\npriority: 10\nsteps: {a: {type: x}}")
    with pytest.raises(WorkflowError, match="priority: this has to be greater than or equal to 0"):
        Workflow.parse("name: test\npriority: -1\nsteps: {a: {type: x}}")


def test_all_that_is_wrong_inside_is_said_at_once() -> None:
    assert refusals("""\
  a:
    for_each: input.list
    steps:
      b: {type: x, p: "{{ nope }}", repeat: {until: "false", max: 2}}
      c: {type: x, needs: [d]}
      d: {type: x, p: "{{ c }}"}
""") == [
        "5:15: steps.a.for_each: 'for_each' needs a list, or one expression that gives a list: an expression stands in"
        ' braces, "{{ input.list }}"',
        "7:23: steps.a.steps.b.p: 'nope' is not a step (there is: a, b, c, d, index, input, item, previous, round)",
        "7:53: steps.a.steps.b.repeat.until: a loop without an end: 'until' is never true, so the step can only fail;"
        " say when it is done, or 'on_max: pass' for so many rounds",
        "8:7: steps.a.steps.c: these steps need each other: c -> d -> c",
    ]


@pytest.mark.parametrize(
    "steps",
    [
        "  a: {type: x, retry: {}, for_each: []}",
        "  a: {type: x, on_error: fail, for_each: [1]}",
        "  a: {type: x, repeat: {until: 'false', max: 2, on_max: pass}, compensate: {type: x}}",
        "  a: {type: wait, for: 1s, compensate: {type: x}}",
        "  a: {type: approval, message: x, compensate: {steps: {b: {type: x, when: 'true'}}}}",
        "  a: {type: x, for_each: [1], as: item, p: '{{ item }} {{ index }}'}",
        "  a: {steps: {b: {type: x}}, fallback: [{steps: {b: {type: x}}}]}",
        "  a: {type: router, by: '{{ input.list }}', among: {b: {type: x}}}",
        "  a: {type: workflow, input: '{{ input }}', workflow: {name: b, inputs: {n: {type: string}},"
        " steps: {c: {type: x}}}}",
        "  a: {type: workflow, name: '{{ input.list[0] }}', version: '1'}",
        "  a: {steps: {default: {type: x}, case1: {type: x, p: '{{ default }}'}}}",
        "  a: {type: switch, value: 1, cases: {b: {type: x}}, default: {type: x, repeat: {until: default.x, max: 2}}}",
        "  compensate: {type: x}\n  fallback1: {type: x, p: '{{ compensate }}'}",
    ],
)
def test_what_only_looks_wrong_is_taken(steps: str) -> None:
    made = workflow(steps)
    assert Workflow.of(made.to_dict()) == made


# Workflows in files of their own


def write(home: Path, **files: str) -> None:
    for name, text in files.items():
        (home / f"{name}.yaml").parent.mkdir(exist_ok=True)
        (home / f"{name}.yaml").write_text(text, encoding="utf-8")


def refused_file(path: Path) -> list[str]:
    with pytest.raises(WorkflowError) as caught:
        Workflow.load(path)
    return [str(problem) for problem in caught.value.problems]


def test_a_file_that_a_step_names_is_put_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(
        tmp_path,
        **{
            "a": "name: a\nsteps:\n  b: {type: workflow, file: sub/b.yaml, input: {n: 1}}",
            "sub/b": "name: b\ninputs: {n: {type: integer}}\n"
            "steps: {c: {steps: {d: {type: workflow, file: ../c.yaml}}}}",
            "c": "name: c\nsteps: {e: {type: x}}",
        },
    )
    made = Workflow.load(tmp_path / "a.yaml")
    inner: Any = made.steps["b"].params["workflow"]
    assert list(made.steps["b"].params) == ["workflow", "input"]
    assert inner["steps"]["c"]["steps"]["d"]["workflow"] == {"name": "c", "steps": {"e": {"type": "x"}}}
    assert Workflow.of(json.loads(json.dumps(made.to_dict()))) == made


def test_what_is_wrong_in_a_file_is_said_with_both_places(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="name: a\nsteps:\n  b: {type: workflow, file: b.yaml}\n  c: {type: workflow, file: c.yaml}",
        b="name: b\nsteps:\n  c: {type: x, p: '{{ d }}'}\n  e: {type: workflow, file: e.yaml}",
        c="- c",
        e="name: e\nstep: {}\nsteps: {a: {type: x}}",
    )
    assert refused_file(tmp_path / "a.yaml") == [
        f"3:29: steps.b.file: {tmp_path}/b.yaml:3:19: steps.c.p: 'd' is not a step (there is: c, e, input)",
        f"3:29: steps.b.file: {tmp_path}/b.yaml:4:29: steps.e.file: {tmp_path}/e.yaml:2:1: step: there is no 'step'"
        " here (did you mean 'steps'?)",
        f"4:29: steps.c.file: {tmp_path}/c.yaml:1:1: the workflow itself has to stand here, a mapping with `name` and"
        " `steps`",
    ]


def test_a_problem_that_is_found_later_in_a_file_has_its_position_too(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="name: a\nsteps:\n  b: {type: workflow, file: b.yaml}",
        b="name: b\nsteps:\n  c: {type: x}",
    )
    problem = Workflow.load(tmp_path / "a.yaml").problem("no such type", "steps", "b", "workflow", "steps", "c", "type")
    assert str(problem) == f"3:29: steps.b.file: {tmp_path}/b.yaml:3:13: steps.c.type: no such type"


def test_files_that_need_each_other_are_refused_with_the_way_around(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="name: a\nsteps:\n  b: {type: workflow, file: b.yaml}",
        b="name: b\nsteps:\n  a: {type: workflow, file: ./a.yaml}",
        c="name: c\nsteps: {c: {type: workflow, file: c.yaml}}",
    )
    assert refused_file(tmp_path / "a.yaml") == [
        f"3:29: steps.b.file: {tmp_path}/b.yaml:3:29: steps.a.file: these files need each other:"
        " a.yaml -> b.yaml -> a.yaml"
    ]
    assert refused_file(tmp_path / "c.yaml") == ["2:35: steps.c.file: these files need each other: c.yaml -> c.yaml"]


def test_a_file_that_cannot_be_put_in_is_refused(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="""\
name: a
steps:
  b: {type: workflow, file: gone.yaml}
  c: {type: workflow, file: 3}
  d: {type: workflow, file: "{{ input.file }}"}
  e: {type: workflow, file: broken.yaml}
""",
        broken="a: [",
    )
    assert refused_file(tmp_path / "a.yaml") == [
        f"3:29: steps.b.file: {tmp_path}/gone.yaml: the file cannot be read: No such file or directory",
        "4:29: steps.c.file: a file is named by its path, relative to this file",
        "5:29: steps.d.file: a file is put in when this one is read: its path cannot be an expression",
        f"6:29: steps.e.file: {tmp_path}/broken.yaml:2:1: not YAML: did not find expected node content, while parsing a"
        " flow node",
    ]


def test_files_in_files_are_nested_only_so_deep(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path, **{f"w{number}": f"name: a\nsteps: {{b: {{type: workflow, file: w{number + 1}.yaml}}}}"})
    write(tmp_path, w30="name: a\nsteps: {b: {type: x}}")
    [problem] = refused_file(tmp_path / "w0.yaml")
    assert problem.endswith("steps.b.file: with this file in its place the workflow has more than 64 levels")
    made = Workflow.load(tmp_path / "w12.yaml")
    assert Workflow.of(json.loads(json.dumps(made.to_dict()))) == made


def test_a_few_files_cannot_make_a_large_workflow(tmp_path: Path) -> None:
    twenty = "".join(f"  s{n}: {{type: workflow, file: w{{}}.yaml}}\n" for n in range(20))
    for number in range(8):
        write(tmp_path, **{f"w{number}": "name: a\nsteps:\n" + twenty.replace("{}", str(number + 1))})
    write(tmp_path, w8="name: a\nsteps: {b: {type: x}}")
    assert "with this file in its place the workflow has more than" in refused_file(tmp_path / "w0.yaml")[0]


# The schema for editors

_ANY: dict[str, Any] = {"type": "object"}
_TYPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["task", "llm", "approval", "wait"], _ANY),
    "block": {"properties": {"output": {}}, "additionalProperties": False},
    "switch": {"properties": {"value": {}}, "required": ["value"], "additionalProperties": False},
    "router": {
        "properties": {"by": {"$ref": "#/$defs/By"}, "max_cost": {"type": "number"}},
        "additionalProperties": False,
        "$defs": {"By": {"anyOf": [{"enum": ["cost"]}, {"type": "array"}]}},
    },
    "workflow": {
        "properties": {"workflow": {}, "name": {"type": "string"}, "input": {"type": "object"}},
        "additionalProperties": False,
    },
}


def schema_errors(steps: Any, **more: Any) -> list[str]:
    schema = workflow_schema(_TYPES)
    Draft202012Validator.check_schema(schema)
    value = {"name": "test", "steps": steps, **more}
    return [error.json_path for error in Draft202012Validator(schema).iter_errors(value)]


def test_the_schema_takes_all_of_the_language() -> None:
    written: Any = Workflow.parse(LANGUAGE).to_dict()
    assert schema_errors(**written | {"name": "x"}) == []
    del written["steps"]["each"]["type"]
    written["steps"]["sub"] = {"type": "workflow", "file": "sub.yaml"}
    assert schema_errors(written["steps"]) == []


@pytest.mark.parametrize(
    ("step", "path"),
    [
        ({"type": "task", "repeat": {"until": "true"}}, "$.steps.a.repeat"),
        ({"type": "task", "repeat": {"until": "true", "max": 0}}, "$.steps.a.repeat.max"),
        ({"type": "task", "retry": {"on": ["timeuot"]}}, "$.steps.a.retry.on"),
        ({"type": "task", "on_error": "ignore"}, "$.steps.a.on_error"),
        ({"type": "task", "for_each": "input.list"}, "$.steps.a.for_each"),
        ({"type": "task", "for_each": None}, "$.steps.a.for_each"),
        ({"type": "task", "max_parallel": 2}, "$.steps.a"),
        ({"type": "task", "as": "doc"}, "$.steps.a"),
        ({"type": "task", "deadline": "1y"}, "$.steps.a.deadline"),
        ({"type": "task", "cache": {"key": 1}}, "$.steps.a.cache"),
        ({"type": "task", "rate": {"key": "k", "limit": 0, "per": 1}}, "$.steps.a.rate.limit"),
        ({"type": "task", "fallback": [{"type": "task", "needs": ["b"]}]}, "$.steps.a.fallback[0].needs"),
        ({"type": "task", "fallback": {"type": "task"}}, "$.steps.a.fallback"),
        ({"type": "task", "compensate": {"type": "tsak"}}, "$.steps.a.compensate.type"),
        ({"type": "task", "compensate": {"type": "task", "cache": {"key": 1, "ttl": 1}}}, "$.steps.a.compensate.cache"),
        ({"type": "approval", "cache": {"key": 1, "ttl": 1}}, "$.steps.a.cache"),
        ({"type": "switch", "value": 1, "cases": {"x": {"type": "task"}}, "retry": {}}, "$.steps.a.retry"),
        ({"type": "switch", "value": 1, "cases": {"x": {"type": "task", "when": "x"}}}, "$.steps.a.cases.x.when"),
        ({"type": "switch", "cases": {"x": {"type": "task"}}}, "$.steps.a"),
        ({"type": "switch", "value": 1, "cases": {}}, "$.steps.a.cases"),
        ({"steps": {"b": {"steps": {"c": {"type": "taks"}}}}}, "$.steps.a.steps.b.steps.c.type"),
        ({"steps": {}}, "$.steps.a.steps"),
        ({"step": {}}, "$.steps.a"),
        ({"type": "router", "by": "cost", "among": {"b": {"type": "task", "tier": "x"}}}, "$.steps.a.among.b.tier"),
        ({"type": "router", "by": "speed", "among": {"b": {"type": "task"}}}, "$.steps.a.by"),
        ({"type": "router", "by": "cost"}, "$.steps.a"),
        ({"type": "workflow"}, "$.steps.a"),
        ({"type": "workflow", "file": "x.yaml", "name": "x"}, "$.steps.a"),
        ({"type": "workflow", "workflow": {"name": "x", "steps": {}}}, "$.steps.a.workflow.steps"),
    ],
)
def test_the_schema_refuses_what_cannot_be(step: Any, path: str) -> None:
    assert path in schema_errors({"a": step})


def test_the_schema_refuses_a_priority_that_there_is_not() -> None:
    assert schema_errors({"a": {"type": "task"}}, priority=10, deadline="0x") == ["$.deadline", "$.priority"]


# Anything at all

_expression = st.sampled_from(
    ["a", "b", "c", "d", "item", "index", "doc", "round", "previous", "error", "output", "params", "input"]
)
_template = _expression.map("{{{{ {} }}}}".format)
_more = {
    "when": _expression,
    "needs": st.lists(st.sampled_from("abcd"), max_size=1),
    "for_each": _template | st.just([1]),
    "as": st.just("doc"),
    "repeat": st.builds(lambda until: {"until": until, "max": 2}, _expression),
    "cache": st.builds(lambda key: {"key": key, "ttl": 1}, _template),
    "rate": st.builds(lambda key: {"key": key, "limit": 1, "per": 1}, _template),
    "retry": st.just({}),
    "on_error": st.sampled_from(["fail", "continue", "collect"]),
    "nonsense": st.none(),
}


def _of_steps(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Steps that are made of others, with or without more."""
    named = st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=2)
    made = (
        st.builds(lambda steps, p: {"steps": steps, "output": p}, named, _template)
        | st.builds(lambda cases, p: {"type": "switch", "value": p, "cases": cases, "default": p}, named, inner)
        | st.builds(lambda among: {"type": "router", "by": "cost", "among": among}, named)
        | st.builds(lambda steps: {"type": "workflow", "workflow": {"name": "w", "steps": steps}}, named)
        | inner
    )
    parts = st.fixed_dictionaries({}, optional={"fallback": st.lists(inner, max_size=2), "compensate": inner})
    return st.builds(lambda step, more: {**step, **more}, made, parts)


def _with_more(step: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    more = st.fixed_dictionaries({}, optional=_more)
    return st.builds(lambda step, more: {**step, **more}, step, st.just({}) | more)


_leaf = _with_more(st.builds(lambda p: {"type": "x", "p": p}, st.just(1) | _template))
_steps = st.recursive(_leaf, lambda inner: _with_more(_of_steps(inner)), max_leaves=6)


@given(st.dictionaries(st.sampled_from("abcd"), _steps, min_size=1, max_size=3))
def test_any_steps_in_steps_are_a_workflow_that_comes_back_or_a_workflow_error(steps: dict[str, Any]) -> None:
    with contextlib.suppress(WorkflowError):
        made = Workflow.of({"name": "test", "steps": steps})
        assert Workflow.of(json.loads(json.dumps(made.to_dict()))) == made
        names = {"input", *made.steps}
        assert all(step.references <= names - {name} for name, step in made.steps.items())
        assert set(TopologicalSorter(inner_needs(made.steps)).static_order()) == {*made.steps}


def test_what_undoes_is_not_undone_itself_and_sees_no_params_of_rounds() -> None:
    inner = {"type": "task", "task": "t", "compensate": {"type": "task", "task": "t"}}
    nested = {"type": "task", "task": "t", "compensate": {"type": "block", "steps": {"x": inner}}}
    with pytest.raises(WorkflowError, match="this is part of what undoes a step, and is not undone itself"):
        Workflow.of({"name": "w", "steps": {"a": nested}})
    rounds = {"type": "task", "task": "t", "repeat": {"until": "round == 2", "max": 2}}
    undo = {"type": "task", "task": "t", "input": {"p": "{{ params.task }}"}}
    with pytest.raises(WorkflowError, match="unless a 'repeat' gives it more than once"):
        Workflow.of({"name": "w", "steps": {"a": {**rounds, "compensate": undo}}})
    assert Workflow.of({"name": "w", "steps": {"a": {"type": "task", "task": "t", "compensate": undo}}})


PLACE = {"concurrency": {"key": "desk", "limit": 1}}
COMPUTED = {"cache": {"key": "k", "ttl": 1, "scope": "global"}}


def test_a_workflow_inside_of_a_step_may_not_wait_for_what_that_step_keeps() -> None:
    inside = {"name": "inside", "steps": {"b": {"type": "x", **PLACE}}}
    with pytest.raises(
        WorkflowError, match=r"steps\.a\.workflow\.steps\.b\.concurrency\.key: 'a' has a place of 'desk'"
    ) as refused:
        Workflow.of({"name": "x", "steps": {"a": {"type": "workflow", "workflow": inside, **PLACE}}})
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize(
    "step",
    [
        {"type": "x", "fallback": [{"type": "x", **PLACE}], **PLACE},
        {"type": "x", "compensate": {"type": "x", **PLACE}, **PLACE},
        {"type": "x", "compensate": {"steps": {"b": {"type": "x", **COMPUTED}}}, **COMPUTED},
        {"steps": {"b": {"type": "x", "concurrency": {"key": "other", "limit": 1}}}, **PLACE},
        {"steps": {"b": {"type": "x", "cache": {"key": "k", "ttl": 1}}}, **COMPUTED},
        {"steps": {"b": {"type": "x", "rate": {"key": "desk", "limit": 1, "per": 1}}}, **PLACE},
        {"steps": {"b": {"type": "x", **PLACE}, "c": {"type": "x", **PLACE}}},
    ],
)
def test_what_does_not_keep_its_step_waiting_may_have_the_same_key(step: dict[str, Any]) -> None:
    Workflow.of({"name": "x", "steps": {"a": step}})

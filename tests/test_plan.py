"""workflow → plan → canvas: whatever the graph, each step starts when its own needs are done, and not later."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from by_hand import workflow_of
from celery.canvas import Signature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from ferrum.errors import WorkflowError
from ferrum.plan import CHAIN, CHORD, Beside, Plan, Segment, _segments, edges
from ferrum.steps import Attempt, Params, StepType
from ferrum.workflow import Workflow

Graph = Mapping[str, tuple[str, ...]]

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def graphs(draw: st.DrawFn, most: int = 40) -> dict[str, tuple[str, ...]]:
    """Any graph without a cycle; the order in which it is written is not the order in which it runs."""
    size = draw(st.integers(1, most))
    near = draw(st.integers(1, most))
    needs: dict[str, tuple[str, ...]] = {}
    for number in range(size):
        before = range(max(0, number - near), number)
        chosen = draw(st.sets(st.sampled_from(before), max_size=4)) if before else set()
        needs[f"s{number}"] = tuple(f"s{need}" for need in sorted(chosen))
    return {step: needs[step] for step in draw(st.permutations(list(needs)))}


@st.composite
def shaped(draw: st.DrawFn) -> dict[str, tuple[str, ...]]:
    """What authors write: chains, fans and joins after each other, and a few edges across."""
    needs: dict[str, tuple[str, ...]] = {}
    ends: tuple[str, ...] = ()

    def new(*before: str) -> str:
        needs[f"s{len(needs)}"] = before
        return f"s{len(needs) - 1}"

    for part in draw(st.lists(st.sampled_from(["chain", "fan", "join"]), min_size=1, max_size=8)):
        if part == "join" or not ends:
            ends = (new(*ends),)
        for _ in range(draw(st.integers(0, 5)) if part == "chain" else 0):
            ends = (*ends[:-1], new(ends[-1]))
        if part == "fan":
            ends = tuple(new(ends[0]) for _ in range(draw(st.integers(2, 6))))
            ends = tuple(new(end) if draw(st.booleans()) else end for end in ends)
    names = list(needs)
    for _ in range(draw(st.integers(0, 3))):
        late, early = sorted(draw(st.tuples(*[st.integers(0, len(names) - 1)] * 2)), reverse=True)
        if late != early and names[early] not in needs[names[late]]:
            needs[names[late]] += (names[early],)
    return needs


def reduced(needs: Graph) -> dict[str, set[str]]:
    """Each step's needs without those that another of its needs has before it."""
    above: dict[str, set[str]] = {}

    def all_above(step: str) -> set[str]:
        if step not in above:
            above[step] = {far for need in needs[step] for far in {need} | all_above(need)}
        return above[step]

    return {step: {n for n in before if not any(n in all_above(m) for m in before)} for step, before in needs.items()}


def carried(segment: Segment) -> Iterator[tuple[set[str], str]]:
    """What a canvas starts, with the steps that it waits for before it does."""
    last: set[str] = set()
    for element in segment.elements:
        if isinstance(element, Beside):
            for branch in element.branches:
                yield from zip((last, *({one} for one in branch)), branch, strict=False)
            last = {branch[-1] for branch in element.branches}
        else:
            yield last, element
            last = {element}


@unhurried
@given(needs=graphs() | shaped())
def test_every_step_is_in_one_segment(needs: Graph) -> None:
    steps = [step for segment in _segments(needs) for step in segment.steps]
    assert sorted(steps) == sorted(needs)


@unhurried
@given(needs=graphs() | shaped())
def test_a_canvas_waits_for_nothing_but_a_steps_own_needs(needs: Graph) -> None:
    direct = reduced(needs)
    for segment in _segments(needs):
        for before, step in carried(segment):
            if step not in segment.heads:
                assert before == direct[step]


@unhurried
@given(needs=graphs() | shaped())
def test_the_heads_of_a_segment_become_ready_together(needs: Graph) -> None:
    direct = reduced(needs)
    for segment in _segments(needs):
        if len(segment.heads) > 1:
            assert len({frozenset(direct[head]) for head in segment.heads}) == 1
            assert len(direct[segment.heads[0]]) <= 1


@unhurried
@given(needs=graphs() | shaped())
def test_segments_are_small(needs: Graph) -> None:
    for segment in _segments(needs):
        _is_small(segment)


def _is_small(segment: Segment) -> None:
    for element in segment.elements:
        if isinstance(element, Beside):
            assert len(element.branches) >= 2
            assert sum(len(branch) for branch in element.branches) <= CHORD
            assert all(len(branch) <= CHAIN for branch in element.branches)
    assert len(list(segment.steps)) < CHAIN + CHORD + 1


@dataclass
class Celery:
    """Chains and chords as Celery runs them, and the joins of the record beside them."""

    needs: Graph
    segments: Sequence[Segment]
    sent: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    def begin(self, segment: Segment) -> None:
        self.sent += segment.heads

    def finish(self, step: str) -> set[str]:
        """Returns what the finish sent."""
        self.done.add(step)
        before = len(self.sent)
        for segment in self.segments:
            if set(segment.heads) & self.ready_by(step):
                self.begin(segment)
            for waits_for, following in carried(segment):
                if step in waits_for and following not in segment.heads and waits_for <= self.done:
                    self.sent.append(following)
        return set(self.sent[before:])

    def ready_by(self, step: str) -> set[str]:
        return {one for one, before in self.needs.items() if step in before and set(before) <= self.done}


@unhurried
@given(needs=graphs() | shaped(), seed=st.integers())
def test_whatever_ends_first_each_finish_starts_what_it_makes_ready_and_nothing_else(needs: Graph, seed: int) -> None:
    chance = random.Random(seed)
    celery = Celery(needs, _segments(needs))
    roots = {step for step, before in needs.items() if not before}
    for segment in celery.segments:
        if set(segment.heads) & roots:
            celery.begin(segment)
    assert sorted(celery.sent) == sorted(roots)
    running = list(celery.sent)
    while running:
        step = running.pop(chance.randrange(len(running)))
        started = celery.finish(step)
        assert started == celery.ready_by(step)
        running += started
    assert sorted(celery.sent) == sorted(needs)


@settings(unhurried, max_examples=20)
@given(needs=graphs(most=12) | shaped())
def test_the_nodes_of_the_record_say_what_the_canvas_carries(needs: Graph) -> None:
    plan = Plan(workflow_of(needs))
    heads = {head for segment in plan.segments for head in segment.heads}
    nodes = {step: json.loads(text) for step, text in plan.nodes().items()}
    top = nodes.pop(" f:")
    assert sorted(nodes) == sorted(needs)
    for step, node in nodes.items():
        assert sorted(node["n"]) == sorted(needs[step])
        for behind, count, canvas, queue, segment, deadline_ms in node["x"]:
            assert step in needs[behind]
            assert (count, canvas == 1) == (len(needs[behind]), behind not in heads)
            assert (queue, segment, deadline_ms) == (nodes[behind]["q"], plan.segment_of[behind].id, 0)
    assert top["s"] == len(needs)
    assert sorted(root[0] for root in top["r"]) == sorted(step for step, before in needs.items() if not before)
    assert sorted(step.id for step in plan.roots) == sorted(step for step, before in needs.items() if not before)
    on_canvas, joined = edges(plan)
    assert sorted(on_canvas + joined) == sorted((need, step) for step, before in needs.items() for need in before)


def test_a_chain_of_five_thousand_steps_and_a_fan_of_a_thousand_are_cut_at_once() -> None:
    chain = {f"s{number}": (f"s{number - 1}",) if number else () for number in range(5000)}
    fan: dict[str, tuple[str, ...]] = {"a": (), **{f"b{number}": ("a",) for number in range(1000)}}
    fan["end"] = tuple(f"b{number}" for number in range(1000))
    began = time.process_time()
    segments = [*_segments(chain), *_segments(fan)]
    assert time.process_time() - began < 5
    assert sum(len(list(segment.steps)) for segment in segments) == 6002
    for segment in segments:
        _is_small(segment)


def test_a_chord_holds_as_many_steps_as_it_may_and_not_one_more() -> None:
    def fan(width: int) -> int:
        names = tuple(f"b{number}" for number in range(width))
        return len(_segments({"a": (), **dict.fromkeys(names, ("a",)), "end": names}))

    assert (fan(CHORD), fan(CHORD + 1)) == (1, CHORD + 3)


def test_what_forks_from_one_step_and_meets_again_is_one_canvas() -> None:
    diamond = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c"), "e": ("d",)}
    assert [str(segment) for segment in _segments(diamond)] == ["chain(a, group(b, c), d, e)"]
    roots = {"a": (), "b": (), "c": ("a",), "d": ("c", "b")}
    assert [str(segment) for segment in _segments(roots)] == ["chain(group(chain(a, c), b), d)"]


def test_what_no_canvas_can_say_is_joined_by_the_record() -> None:
    cross = {"a": (), "b": (), "c": ("a", "b"), "d": ("b",)}
    assert [str(segment) for segment in _segments(cross)] == ["a", "chain(b, d)", "c"]


# The canvas.


def leaves(part: Signature | Sequence[Signature] | None) -> Iterator[Signature]:
    """The steps of a canvas."""
    if isinstance(part, list | tuple):
        for one in part:
            yield from leaves(one)
    elif part is not None and part["task"].startswith("ferrum."):
        yield part
    elif part is not None:
        yield from leaves([part["kwargs"].get(name) for name in ("tasks", "header", "body")])


def test_the_messages_of_a_canvas_hold_the_run_and_the_step_and_nothing_else() -> None:
    needs = {"a": (), "b": ("a",), "c": ("a",), "c2": ("c",), "d": ("b", "c2"), "x": ("a", "d"), "y": ("d",)}
    plan = Plan(workflow_of(needs))
    run_id = "run_0123"
    steps = [leaf for segment in plan.segments for leaf in leaves(plan.canvas(run_id, segment))]
    assert sorted(step["args"][1] for step in steps) == sorted(needs)
    for step in steps:
        assert step["task"] == "ferrum.task"
        assert tuple(step["args"]) == (run_id, step["args"][1])
        assert step["kwargs"] == {}
        assert step["immutable"] is True
        assert step["options"]["task_id"] == f"{run_id}.{step['args'][1]}"


def test_each_head_of_a_segment_says_which_one_it_begins() -> None:
    plan = Plan(workflow_of({"a": (), "b": (), "c": ("a", "b"), "d": ()}))
    assert [(plan.starting_with(head)[0].heads, plan.starting_with(head)[1]) for head in "abd"] == [
        (("a", "b"), ""), (("a", "b"), ""), (("d",), ""),
    ]  # fmt: skip


def test_a_plan_is_the_same_when_it_is_read_back_and_another_when_the_workflow_is() -> None:
    plan = Plan(workflow_of({"a": (), "b": ("a",)}))
    again = Plan.loads(plan.document)
    assert (again.digest, again.segments) == (plan.digest, plan.segments)
    assert Plan(workflow_of({"a": (), "b": ()})).digest != plan.digest


# Printing.


def test_a_plan_prints_its_steps_its_canvas_and_how_each_edge_is_carried() -> None:
    steps = {
        "ask": {"type": "approval", "message": "Go on?"},
        "first": {"type": "task", "task": "t", "when": "input.go"},
        "second": {"type": "task", "task": "t", "needs": ["ask", "first"]},
        "aside": {"type": "task", "task": "t", "needs": ["first"]},
    }
    workflow = Workflow.of({"name": "x", "version": "1.2.0", "inputs": {"go": {"type": "boolean"}}, "steps": steps})
    assert str(Plan(workflow)).splitlines() == [
        "x 1.2.0  4 steps, 3 canvas",
        "  ask     approval",
        "  first   task      when input.go",
        "  second  task      after ask, first",
        "  aside   task      after first",
        "canvas",
        "  s0  ask",
        "  s1  chain(first, aside)",
        "  s2  second",
        "edges on a canvas     first → aside",
        "joins by the record   ask → second, first → second",
    ]


def test_a_wide_plan_prints_shortly() -> None:
    names = tuple(f"b{number}" for number in range(50))
    text = str(Plan(workflow_of({"a": (), **dict.fromkeys(names, ("a",)), "end": names})))
    assert "chain(a, group(b0, b1, b2, b3, b4, b5, … 44 more), end)" in text
    assert "b38 → end" not in text
    assert "… 60 more" in text
    assert "joins by the record   none" in text
    chains = Plan(workflow_of({"a": (), "a2": ("a",), "b": (), "end": ("a2", "b")}))
    assert "chain(group(chain(a, a2), b), end)" in str(chains)


def t(**more: object) -> dict[str, object]:
    return {"type": "task", "task": "t", **more}


#: One of each way to have steps inside of a step.
COMPOSED = {
    "pick": {
        "type": "switch",
        "value": "{{ input.kind }}",
        "cases": {"a b": t(), "x": {"steps": {"p": t(), "q": t(needs=["p"])}}},
        "default": t(),
    },
    "each": t(
        for_each="{{ pick }}", max_parallel=3, retry={"max_attempts": 2}, timeout="9s", fallback=[t()], compensate=t()
    ),
    "again": {
        "steps": {"draft": t(), "check": t(needs=["draft"])},
        "repeat": {"until": "check == 1", "max": 4},
        "deadline": "1h",
        "on_error": "continue",
    },
    "way": {"type": "router", "by": "cost", "among": {"one": t(), "two": t()}, "needs": ["again"]},
    "nap": {"type": "wait", "for": "5m"},
    "sub": {"type": "workflow", "name": "other", "input": {"x": "{{ nap }}"}},
    "shared": t(
        cache={"key": "k", "ttl": "1h"},
        concurrency={"key": "db", "limit": 2},
        rate={"key": "api", "limit": 5, "per": "1m"},
        when="input.kind == 'x'",
    ),
    "long": t(for_each=list(range(60))),
}


@pytest.fixture(scope="module")
def composed() -> Plan:
    return Plan(Workflow.of({"name": "x", "inputs": {"kind": {"type": "string"}}, "steps": COMPOSED}))


def test_a_plan_prints_what_is_inside_of_its_steps_and_what_changes_how_they_are_run(composed: Plan) -> None:
    assert str(composed).splitlines() == [
        "x 0  8 steps and 12 inside of them, 5 canvas",
        "  pick                   switch    value {{ input.kind }}",
        "    pick.case1           task",
        "    pick.x.p             task",
        "    pick.x.q             task      after p",
        "    pick.default         task",
        "  each                   for_each  after pick  over {{ pick }}, 3 at a time",
        "    each.*               task      up to 2 tries  for at most 9 s each",
        "      each.*.fallback1   task",
        "      each.*.compensate  task",
        "  again                  repeat    until check == 1, at most 4 rounds  within 3600 s in all  may fail",
        "    again.*.draft        task",
        "    again.*.check        task      after draft",
        "  way                    router    after again  by cost",
        "    way.one              task",
        "    way.two              task",
        "  nap                    wait      for 5m",
        "  sub                    workflow  after nap  name other",
        "  shared                 task      when input.kind == 'x'  cached  concurrency 2 of db  rate 5 of api",
        "  long                   for_each  over [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, …",
        "    long.*               task",
        "canvas",
        "  s0  chain(pick, each)",
        "  s1  chain(again, way)",
        "  s2  chain(nap, sub)",
        "  s3  shared",
        "  s4  long",
        "  pick.x: s0  chain(p, q)",
        "  again.*: s0  chain(draft, check)",
        "edges on a canvas     pick → each, again → way, nap → sub, pick.x.p → pick.x.q, again.*.draft → again.*.check",
        "joins by the record   none",
    ]


@pytest.mark.parametrize(
    ("head", "steps", "prefix"),
    [
        ("pick.x.p", ["p", "q"], "pick.x."),
        ("each.7", [""], "each.7"),
        ("again.3.draft", ["draft", "check"], "again.3."),
        ("each.12.fallback1", [""], "each.12.fallback1"),
        ("nap", ["nap", "sub"], ""),
    ],
)
def test_a_step_in_a_frame_begins_the_segment_of_its_frame(
    composed: Plan, head: str, steps: list[str], prefix: str
) -> None:
    segment, before = composed.starting_with(head)
    assert (list(segment.steps), before) == (steps, prefix)
    signatures = list(leaves(composed.canvas("run_0123", segment, before, lane=2)))
    assert [one["args"][1] for one in signatures] == [before + step for step in steps]
    assert {one["options"]["priority"] for one in signatures} == {2}


def test_the_lane_of_a_plan_is_the_lower_the_more_urgent_it_is() -> None:
    steps = {"a": t()}
    assert [Plan(Workflow.of({"name": "x", "steps": steps, "priority": n})).lane for n in (0, 5, 9)] == [9, 4, 0]


def test_every_edge_of_every_frame_is_known_to_the_record(composed: Plan) -> None:
    nodes = {step: json.loads(text) for step, text in composed.nodes().items()}
    frames = {step: node for step, node in nodes.items() if step.startswith(" f:")}
    assert frames.keys() == {f" f:{frame}" for frame in composed.bodies}
    assert {root[0] for root in frames[" f:again.*"]["r"]} == {"draft"}
    assert nodes["again.*.draft"]["x"] == [["check", 1, 1, "ferrum.task", "s0", 0]]
    assert nodes["again"]["d"] == 3_600_000
    # Whoever undoes is reached by no edge, only by its name.
    assert nodes["each.*.compensate"]["kr"] == 1
    assert nodes["each.*"]["c"] == 1


def test_what_an_input_or_a_step_leads_to_is_known(composed: Plan) -> None:
    assert composed.reading(["kind"]) == ["pick", "shared"]
    assert composed.reading(["other"]) == []
    assert composed.behind(["pick", "nap"]) == {"pick", "each", "nap", "sub"}
    whole = Plan(
        Workflow.of({"name": "x", "inputs": {"q": {"type": "string"}}, "steps": {"a": t(input={"x": "{{ input }}"})}})
    )
    assert whole.reading(["q"]) == ["a"]


# What is wrong in a workflow.


def problems(text: str) -> list[str]:
    with pytest.raises(WorkflowError) as caught:
        Plan(Workflow.parse(text, source="w.yaml"))
    return str(caught.value).splitlines()


def test_a_step_type_that_is_not_there_is_named_with_the_nearest() -> None:
    assert problems("name: x\nsteps:\n  a:\n    type: aproval\n    message: hi\n") == [
        "w.yaml:4:11: steps.a.type: there is no step type 'aproval' (did you mean 'approval'?)"
    ]


def test_everything_that_is_wrong_with_parameters_is_said_at_once_with_its_place() -> None:
    text = """\
name: x
steps:
  a:
    type: llm
    promt: hello
    messages: []
    max_tokens: 0
  b:
    type: tool
    input: {x: 1}
  c:
    type: task
    task: ferrum.run
  d:
    type: llm
    prompt: hi
    fallbacks: [1]
"""
    found = problems(text)
    assert "w.yaml:5:5: steps.a.promt: a step of type 'llm' has no 'promt' (did you mean 'prompt'?)" in found
    assert "w.yaml:7:17: steps.a.max_tokens: input should be greater than or equal to 1" in found
    assert any("steps.b" in line and line.endswith("'tool' is missing") for line in found)
    assert any(
        line.startswith("w.yaml:13:11: steps.c.task: 'ferrum.run' belongs to the platform") for line in found
    )  # fmt: skip
    assert "w.yaml:17:17: steps.d.fallbacks[0]: input should be a valid string" in found


def test_a_typed_parameter_may_be_known_only_at_run_time() -> None:
    steps = {
        "a": {"type": "llm", "prompt": "x", "max_tokens": "{{ input.n }}", "fallbacks": ["{{ input.m }}"]},
        "b": {"type": "llm", "messages": "{{ input.messages }}"},
    }
    inputs = {"n": {"type": "integer"}, "m": {"type": "string"}, "messages": {"type": "array"}}
    plan = Plan(Workflow.of({"name": "x", "inputs": inputs, "steps": steps}))
    resolved = plan.steps["a"].resolve({"input": {"n": 7, "m": "test/m"}})
    assert (resolved.max_tokens, resolved.fallbacks) == (7, ["test/m"])  # type: ignore[attr-defined]
    with pytest.raises(WorkflowError, match=r"steps\.a\.max_tokens: input should be a valid integer"):
        plan.steps["a"].resolve({"input": {"n": "many", "m": "test/m"}})
    with pytest.raises(WorkflowError, match=r"steps\.b\.messages\[0\]"):
        plan.steps["b"].resolve({"input": {"messages": [1]}})


class SizedParams(Params):
    size: int | list[int]


class Sized(StepType[SizedParams]):
    name = "sized"
    params = SizedParams

    def run(self, params: SizedParams, attempt: Attempt) -> JsonValue:
        return None


def test_a_parameter_of_several_shapes_may_be_known_only_at_run_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrum.plan.step_types", lambda: {"sized": Sized()})
    Plan(Workflow.of({"name": "x", "steps": {"a": {"type": "sized", "size": "{{ 1 + 1 }}"}}}))
    found = problems("name: x\nsteps:\n  a:\n    type: sized\n    size: big\n")
    assert found[0].startswith("w.yaml:5:11: steps.a.size")


def test_what_a_step_does_not_say_its_workflow_does_and_then_its_type() -> None:
    steps: dict[str, object] = {
        "llm": {"type": "llm", "prompt": "x"},
        "own": {"type": "llm", "prompt": "x", "timeout": "7s", "retry": {"max_attempts": 9}},
        "ask": {"type": "approval", "message": "m"},
        "task": {"type": "task", "task": "t"},
    }
    plain = Plan(Workflow.of({"name": "x", "steps": steps})).steps
    assert {step: (one.timeout_s, one.retry.max_attempts) for step, one in plain.items()} == {
        "llm": (120, 3), "own": (7, 9), "ask": (None, 1), "task": (None, 1),
    }  # fmt: skip
    defaults = {"timeout": "30s", "retry": {"max_attempts": 2}}
    told = Plan(Workflow.of({"name": "x", "defaults": defaults, "steps": steps})).steps
    assert {step: (one.timeout_s, one.retry.max_attempts) for step, one in told.items()} == {
        "llm": (30, 2), "own": (7, 9), "ask": (None, 2), "task": (30, 2),
    }  # fmt: skip


def test_parameters_that_do_not_go_together_are_refused_also_where_they_hold_expressions() -> None:
    both = {"type": "llm", "prompt": "{{ input.q }}", "messages": [{"role": "user", "content": "{{ input.q }}"}]}
    with pytest.raises(WorkflowError, match="give either a prompt or messages"):
        Plan(Workflow.of({"name": "x", "inputs": {"q": {"type": "string"}}, "steps": {"a": both}}))


def test_the_same_data_is_planned_once() -> None:
    data = {"name": "x", "steps": {"a": {"type": "approval", "message": "?"}}}
    assert Plan.of(data) is Plan.of(dict(data))
    assert Plan.of({**data, "version": "2"}) is not Plan.of(data)


def test_data_that_is_no_json_is_refused_by_the_workflow() -> None:
    with pytest.raises(WorkflowError, match="message"):
        Plan.of({"name": "x", "steps": {"a": {"type": "approval", "message": object()}}})

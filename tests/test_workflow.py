"""The door for authors: text in, a workflow or everything that is wrong with it out."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict

from ferrum.errors import InputError, WorkflowError
from ferrum.workflow import Budget, Format, InputSpec, Retry, Workflow, seconds, workflow_schema

TRIAGE = """\
name: triage-issue
version: 1.2.0
inputs:
  repo:  {type: string}
  issue: {type: string}
budget: {total_tokens: 150000, cost_usd: 2.00, tool_calls: 50, wall_time: 15m}
defaults: {retry: {max_attempts: 3}, timeout: 60s}
steps:
  classify:
    type: llm
    prompt: "Classify this issue: {{ input.issue }}"
    output_schema: {type: object, required: [kind], properties: {kind: {enum: [bug, question]}}}
  context:
    type: retrieval
    index: repo-docs
    query: "{{ input.issue }}"
    top_k: 5
  fix:
    type: agent                     # a loop of llm and tool steps, each a task of its own
    when: classify.kind == "bug"
    prompt: "Fix it. Context: {{ context.documents }}"
    tools: [git.*, tests.run_pytest]
    max_turns: 12
  check:
    type: sandbox
    language: python
    code: "…"
    files: {"patch.diff": "{{ fix.patch }}"}
    network: none
  gate:
    type: approval
    message: "Open a pull request for {{ fix.title }}?"
    timeout: 24h
  publish:
    type: tool
    tool: git.push
    input: {branch: "{{ fix.branch }}"}
    needs: [gate]
outputs:
  branch: "{{ fix.branch }}"
"""


def workflow(steps: str = "  a: {type: x}", head: str = "") -> Workflow:
    return Workflow.parse(f"name: test\n{head}\nsteps:\n{steps}\n")


def refusals(text: str, format: Format | None = None) -> list[str]:
    with pytest.raises(WorkflowError) as caught:
        Workflow.parse(text, format=format)
    return [str(problem) for problem in caught.value.problems]


def refusal(text: str, format: Format | None = None) -> str:
    [problem] = refusals(text, format)
    return problem


# What is read


def test_the_example_of_the_design_is_a_workflow() -> None:
    triage = Workflow.parse(TRIAGE, "triage.yaml")

    assert (triage.name, triage.version, triage.source) == ("triage-issue", "1.2.0", "triage.yaml")
    assert triage.budget == Budget(total_tokens=150_000, cost_usd=2.0, tool_calls=50, wall_time=900.0)
    assert triage.defaults.retry == Retry(max_attempts=3)
    assert triage.defaults.timeout == 60.0
    assert list(triage.steps) == ["classify", "context", "fix", "check", "gate", "publish"]
    assert triage.steps["context"].params == {"index": "repo-docs", "query": "{{ input.issue }}", "top_k": 5}
    assert triage.steps["gate"].timeout == 86_400.0
    assert triage.outputs == {"branch": "{{ fix.branch }}"}


def test_a_step_needs_what_it_names_and_what_it_refers_to_in_the_order_of_the_file() -> None:
    triage = Workflow.parse(TRIAGE)
    assert triage.needs_of("classify") == ()
    assert triage.needs_of("fix") == ("classify", "context")
    assert triage.needs_of("publish") == ("fix", "gate")
    assert triage.steps["fix"].references == {"classify", "context"}
    assert triage.steps["classify"].references == {"input"}


def test_a_workflow_comes_back_from_its_dictionary() -> None:
    triage = Workflow.parse(TRIAGE, "triage.yaml")
    again = Workflow.of(json.loads(json.dumps(triage.to_dict())))
    assert again == triage
    assert again.to_dict() == triage.to_dict()
    assert again.needs_of("publish") == triage.needs_of("publish")


def test_json_and_yaml_of_the_same_workflow_are_equal() -> None:
    triage = Workflow.parse(TRIAGE)
    text = json.dumps(triage.to_dict(), indent="\t")
    assert Workflow.parse(text, format="json") == Workflow.parse(text) == Workflow.parse(text, "w.json") == triage


def test_a_workflow_can_be_copied_and_pickled() -> None:
    triage = Workflow.parse(TRIAGE, "triage.yaml")
    assert triage.needs_of("fix")
    assert copy.deepcopy(triage) == pickle.loads(pickle.dumps(triage)) == triage


def test_workflows_that_differ_are_not_equal() -> None:
    one, other = workflow("  a: {type: x}\n  b: {type: x}"), workflow("  b: {type: x}\n  a: {type: x}")
    assert one != other
    assert one != workflow("  a: {type: x}\n  b: {type: y}")


def test_a_file_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "triage.yaml"
    path.write_text("\ufeff" + TRIAGE, encoding="utf-8")
    assert Workflow.load(path) == Workflow.parse(TRIAGE)
    assert Workflow.load(path).source == str(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match=r"gone\.yaml: the file cannot be read: No such file"):
        Workflow.load(tmp_path / "gone.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff")
    with pytest.raises(WorkflowError, match="not UTF-8"):
        Workflow.load(binary)


def test_only_true_and_false_are_booleans() -> None:
    written = {
        "on": "on",
        "yes": "yes",
        "no": "no",
        "true": True,
        "False": False,
        "2026-01-01": "2026-01-01",
        "12:30:45": "12:30:45",
        "1_000": "1_000",
        "1.2.3": "1.2.3",
        "'1'": "1",
        "~": None,
        "": None,
        "-7": -7,
        "0x1F": 31,
        "0o17": 15,
        "1e3": 1000.0,
        ".5": 0.5,
    }
    values = "".join(f"\n      - {text}" for text in written)
    assert repr(workflow(f"  a:\n    type: x\n    p:{values}").steps["a"].params["p"]) == repr([*written.values()])


def test_an_alias_stands_for_what_it_names() -> None:
    steps = workflow("  a: {type: x, p: &p {q: [1]}}\n  b: {type: x, p: *p}").steps
    assert steps["a"].params == steps["b"].params == {"p": {"q": [1]}}


def test_json_texts_are_read_as_json() -> None:
    text = '{"name":\t"j",\n\t"steps": {"a": {"type": "x", "p": "\\ud83d\\ude00 \\/ {{ input }}"}}}'
    assert Workflow.parse(text).steps["a"].params == {"p": "😀 / {{ input }}"}


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a", "1:1: a workflow is a mapping with a `name` and `steps`"),
        ("name: a\nname: b\nsteps: {a: {type: x}}", "2:1: name: 'name' is there twice"),
        ("name: a\nsteps:\n  a: {type: x}\n  a: {type: y}", "4:3: steps.a: 'a' is there twice"),
        ("name: a\nsteps: {a: {type: x, p: .nan}}", "2:25: steps.a.p: not a finite number"),
        ("name: a\nsteps: {a: {type: x, p: -.Inf}}", "2:25: steps.a.p: not a finite number"),
        ("name: a\nsteps: {a: {type: x, p: {1: 2}}}", '2:26: steps.a.p: a key has to be text in quotes, like "1"'),
        (
            "name: a\nsteps: {a: {type: x, p: {true: 2}}}",
            '2:26: steps.a.p: a key has to be text in quotes, like "true"',
        ),
        ("name: a\nsteps: {a: {type: x, p: {[b]: 2}}}", "2:26: steps.a.p: a key has to be text in quotes"),
        ("name: a\nsteps: {a: {type: x, p: &p [*p]}}", "2:29: *p: no &p is complete before it"),
        ("a: 1\n---\nb: 2", "2:1: a second document starts here; a file holds one workflow"),
        ("name: a\n---\n", "2:1: a second document starts here; a file holds one workflow"),
        (
            "a: !!python/object:os.system x",
            "1:4: a: the tag tag:yaml.org,2002:python/object:os.system is not supported; quotes make a text",
        ),
        ("a: " + "9" * 5000, "1:4: a: a number with too many digits"),
        ("a: " + "[" * 100 + "]" * 100, "1:68: nested deeper than 64 levels"),
        ("a: \x07", "1:4: a control character, which YAML does not allow"),
        ("name: \ud800", "1:7: there is half a character (a lone surrogate)"),
    ],
)
def test_a_text_that_is_no_plain_value_is_refused_where_it_goes_wrong(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "position"),
    [("name: a: b", "1:8"), ("name: x\nsteps:\n\ta: 1", "3:1"), ("name: @x", "1:7"), ("- a\nb: c", "2:1")],
)
def test_broken_yaml_is_refused_with_its_position(text: str, position: str) -> None:
    assert refusal(text).startswith(f"{position}: not YAML: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "x",}', "1:1"),
        ('{"name": NaN}', "NaN is not a number in JSON"),
        ('{"name": "x",\n "name": "y"}', "2:2: name: 'name' is there twice"),
        ('{\n\t"name": "\\ud800"}', "2:10: name: there is half a character"),
        ('{"a": 1e999}', "1:7: a: not a finite number"),
        ('{"a": ' + "9" * 5000 + "}", "a number with too many digits"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("[" * 100 + "]" * 100, "nested deeper than 64 levels"),
        ("name: x", "1:1: not JSON: Expecting value"),
    ],
)
def test_broken_json_is_refused_in_the_words_of_json(text: str, message: str) -> None:
    assert message in refusal(text, "json")


def test_aliases_cannot_make_a_small_file_large() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert "more than 100000 values, aliases written out" in refusal("\n".join(lines))


def test_a_file_of_more_than_a_megabyte_is_refused(tmp_path: Path) -> None:
    text = "name: test\nsteps: {a: {type: x}}\n" + "#" * 1_000_000
    assert "more than 1000000" in refusal(text)
    path = tmp_path / "large.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(WorkflowError, match="more than 1000000"):
        Workflow.load(path)


def test_everything_that_is_wrong_is_said_at_once_with_line_and_column() -> None:
    text = """\
name: Triage
vresion: "1"
version: 1.0
inputs:
  a: {type: strin}
  b: {type: integer, default: x}
  c-d: {type: string, minimun: 1}
budget: {total_token: 1, cost_usd: -1, wall_time: 15x}
defaults: {retry: {max_attempt: 3}, timeout: 0}
steps:
  my-step: {type: x, prompt: "{{ inptu.a }} {{ input.aa }}", timeout: true, retry: 3}
  size: {type: x}
  b: {type: x, needs: [b, c, c, d, my_step, 5]}
  c:
    type: x
    when: b.x ==
    needs: b
  d: {needs: [e]}
  e: {type: x, p: [1, {q: "{{ d.x }}{{ nope }}"}], when: true}
  f:
  g: {type: x, x: "{{ g.y }}", "{{ k }}": 1}
outputs:
  x: "{{ classify.x"
"""
    assert refusals(text) == [
        "1:7: name: a workflow's name is made of a-z, 0-9, '-', '_' and '.', up to 100, a letter or digit first",
        "2:1: vresion: there is no 'vresion' here (did you mean 'version'?)",
        "3:10: version: this has to be text: put quotes around it",
        "5:13: inputs.a.type: this has to be 'string', 'integer', 'number', 'boolean', 'array' or 'object'"
        " (did you mean 'string'?)",
        "6:3: inputs.b: the default does not fit: 'x' is not of type 'integer'",
        "7:3: inputs.c-d: the input 'c-d': a name is made of letters, digits and _, starts with no digit and has at"
        " most 64",
        "7:23: inputs.c-d.minimun: there is no 'minimun' here (did you mean 'minimum'?)",
        "8:10: budget.total_token: there is no 'total_token' here (did you mean 'total_tokens'?)",
        "8:36: budget.cost_usd: this has to be greater than or equal to 0",
        "8:51: budget.wall_time: a duration is a number of seconds, or a text like"
        ' "250ms", "60s", "15m", "24h", "7d", "1h30m"',
        "9:20: defaults.retry.max_attempt: there is no 'max_attempt' here (did you mean 'max_attempts'?)",
        "9:46: defaults.timeout: a duration of zero leaves no time at all",
        "11:3: steps.my-step: in an expression the dash in 'my-step' would be a minus: call the step 'my_step'",
        "11:30: steps.my-step.prompt: 'inptu' is not a step (did you mean 'input'?)",
        "11:30: steps.my-step.prompt: there is no input 'aa' (did you mean 'a'?)",
        "11:71: steps.my-step.timeout: a duration is a number of seconds, or a text like"
        ' "250ms", "60s", "15m", "24h", "7d", "1h30m"',
        "11:84: steps.my-step.retry: this has to be a mapping",
        "12:3: steps.size: a step cannot be called 'size': the name is taken",
        "13:24: steps.b.needs[0]: the step 'b' needs itself",
        "13:30: steps.b.needs[2]: 'c' is there twice",
        "13:36: steps.b.needs[4]: 'my_step' is not a step (did you mean 'my-step'?)",
        "13:45: steps.b.needs[5]: this has to be text: put quotes around it",
        "16:11: steps.c.when: in `b.x ==`: the expression ends too early",
        "17:12: steps.c.needs: this has to be a list",
        "18:3: steps.d: these steps need each other: d -> e -> d",
        "18:3: steps.d.type: 'type' is missing",
        "19:27: steps.e.p[1].q: 'nope' is not a step (there is: b, c, d, e, f, g, input, my-step, size)",
        "19:58: steps.e.when: this has to be text: put quotes around it",
        "20:5: steps.f: this has to be a mapping",
        "21:19: steps.g.x: the step 'g' refers to itself",
        "21:32: steps.g.{{ k }}: a key cannot be an expression, only a value can",
        '23:6: outputs.x: in `{{ classify.x`: `{{` without its `}}`; two literal braces are written {{ "{{" }}',
    ]


def test_an_error_names_the_file() -> None:
    with pytest.raises(WorkflowError) as caught:
        Workflow.parse("name: test\nsteps: {a: {type: x, needs: [b]}}", "flows/a.yaml")
    assert str(caught.value) == "flows/a.yaml:2:30: steps.a.needs[0]: 'b' is not a step (there is: a)"


def test_a_value_made_in_python_is_refused_without_a_position() -> None:
    with pytest.raises(WorkflowError) as caught:
        Workflow.of({"name": "test", "steps": {"a": {"type": "x", "needs": ("b",), "p": "{{ c.d }}"}}})
    assert str(caught.value) == (
        "steps.a.needs[0]: 'b' is not a step (there is: a)\nsteps.a.p: 'c' is not a step (there is: a, input)"
    )
    with pytest.raises(WorkflowError, match=r"steps\.a\.p: a set is nothing that JSON can hold"):
        Workflow.of({"name": "test", "steps": {"a": {"type": "x", "p": {1}}}})


@pytest.mark.parametrize("name", ["input", "run", "true", "in", "as", "package", "map", "has", "size", "string", "__x"])
def test_a_step_cannot_take_a_name_of_the_language(name: str) -> None:
    assert "the name is taken" in refusal(f"name: test\nsteps: {{'{name}': {{type: x}}}}")


def test_a_workflow_without_steps_is_refused() -> None:
    assert refusal("name: test\nsteps: {}") == "2:1: steps: this cannot be empty"
    assert refusal("name: test") == "1:1: steps: 'steps' is missing"


def test_one_cycle_of_each_knot_is_shown() -> None:
    text = """\
name: test
steps:
  a: {type: x, p: "{{ c.y }}"}
  b: {type: x, when: a.y}
  c: {type: x, needs: [b]}
  d: {type: x, needs: [a]}
  e: {type: x, needs: [f]}
  f: {type: x, needs: [e, d]}
"""
    assert refusals(text) == [
        "3:3: steps.a: these steps need each other: a -> c -> b -> a",
        "7:3: steps.e: these steps need each other: e -> f -> e",
    ]


def test_outputs_may_refer_to_any_step_and_to_the_input() -> None:
    made = workflow("  a: {type: x}", "inputs: {n: {type: integer}}\noutputs: {x: '{{ a.y }}', n: '{{ input.n }}'}")
    assert made.outputs == {"x": "{{ a.y }}", "n": "{{ input.n }}"}
    assert "'b' is not a step" in refusal("name: test\nsteps: {a: {type: x}}\noutputs: {x: ['{{ b }}']}")


def test_a_reference_to_an_input_that_is_not_declared_is_refused() -> None:
    assert "there is no input 'isue' (did you mean 'issue'?)" in refusal(
        "name: test\ninputs: {issue: {type: string}}\nsteps: {a: {type: x, when: input.isue == ''}}"
    )
    assert "there is no input 'x' (the workflow declares no `inputs`)" in refusal(
        "name: test\nsteps: {a: {type: x, p: '{{ input.x }}'}}"
    )
    assert workflow("  a: {type: x, p: '{{ input }}', q: '{{ size(input) }}'}")


def test_a_problem_that_is_found_later_has_a_position_too() -> None:
    triage = Workflow.parse(TRIAGE, "triage.yaml")
    assert str(triage.problem("no such tool", "steps", "fix", "tools", 1)) == "22:20: steps.fix.tools[1]: no such tool"
    assert (
        str(triage.problem("no such key", "steps", "fix", "prompt", key=True)) == "21:5: steps.fix.prompt: no such key"
    )
    assert str(triage.problem("'model' is missing", "steps", "fix", "model")) == (
        "18:3: steps.fix.model: 'model' is missing"
    )
    assert str(Workflow.of(triage.to_dict()).problem("bad", "steps", "fix")) == "steps.fix: bad"


# Durations and retries


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("250ms", 0.25),
        ("60s", 60),
        ("15m", 900),
        ("24h", 86_400),
        ("7d", 604_800),
        ("1h30m", 5400),
        ("1.5h", 5400),
        (90, 90),
    ],
)
def test_durations_are_seconds(text: str | int, duration: float) -> None:
    assert seconds(text) == pytest.approx(duration)


@pytest.mark.parametrize(
    "text", ["", "5", "5 s", "m", "1y", "-5s", -1, True, None, float("nan"), float("inf"), "9999999d", 10**400]
)
def test_what_is_no_duration_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="duration"):
        seconds(text)


def test_retries_wait_longer_each_time_up_to_the_most() -> None:
    retry = Retry(max_attempts=5, backoff=1, factor=2, max_delay=5)
    assert [retry.delay(attempt, 1.0) for attempt in (1, 2, 3, 4, 5000)] == [1, 2, 4, 5, 5]
    assert retry.delay(3, 0.25) == 1.0
    assert retry.delay(3, 0.0) == 0.0


def test_a_retry_is_never_earlier_than_the_other_side_asked_for() -> None:
    retry = Retry(backoff=1, max_delay=5)
    assert retry.delay(1, 0.0, retry_after_s=30) == 30
    assert retry.delay(1, 0.5, retry_after_s=30) == 30.5
    assert retry.delay(3, 1.0, retry_after_s=0.5) == 4


# Inputs

INPUTS = """\
inputs:
  issue: {type: string, minLength: 1, description: What is wrong}
  limit: {type: integer, default: 5, minimum: 1}
  kind: {type: string, enum: [bug, question], required: false}
  labels: {type: array, items: {type: string}, default: []}
  owner: {type: object, properties: {name: {type: string}}, required: [name], default: {name: nobody}}
"""


def test_defaults_are_filled_in() -> None:
    made = workflow(head=INPUTS)
    assert made.check_input({"issue": "x", "limit": 2}) == {
        "issue": "x",
        "limit": 2,
        "labels": [],
        "owner": {"name": "nobody"},
    }
    made.check_input({"issue": "x"})["labels"].append("mine")  # type: ignore[union-attr]
    assert made.check_input({"issue": "x"})["labels"] == []


def test_an_input_that_does_not_fit_is_refused_with_everything_that_is_wrong() -> None:
    with pytest.raises(InputError) as caught:
        workflow(head=INPUTS).check_input({"isue": "x", "limit": "5", "kind": "bug?", "labels": ["a", 1], "owner": {}})
    assert str(caught.value).splitlines() == [
        "there is no input 'isue' (did you mean 'issue'?)",
        "input 'issue' is missing",
        "input 'limit': '5' is not of type 'integer'",
        "input 'kind': 'bug?' is not one of ['bug', 'question']",
        "input 'labels': [1]: 1 is not of type 'string'",
        "input 'owner': 'name' is a required property",
    ]


def test_an_input_that_is_not_json_is_refused() -> None:
    for value in ({"issue": object()}, {"issue": float("nan")}, {1: 2}):
        with pytest.raises(InputError):
            workflow(head=INPUTS).check_input(value)  # type: ignore[arg-type]


def test_a_workflow_without_inputs_takes_none() -> None:
    assert workflow().check_input({}) == {}
    with pytest.raises(InputError, match="the workflow declares no `inputs`"):
        workflow().check_input({"a": 1})


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("{type: integer, default: 1, required: true}", "leave out one of the two"),
        ("{type: string, pattern: '('}", "not a JSON Schema: the pattern '(' cannot be used: unclosed group"),
        ("{type: string, pattern: '(?=a)'}", "the pattern '(?=a)' cannot be used: look-around is not supported"),
        ("{type: array, items: {type: strnig}}", "not a JSON Schema"),
        ("{type: array, items: {$ref: 'http://localhost/schema'}}", "$ref is not supported"),
        ("{type: string, keywords: {}}", "there is no 'keywords' here"),
        ("{type: string, default: null}", "the default does not fit: None is not of type 'string'"),
    ],
)
def test_an_input_that_cannot_be_is_refused(spec: str, reason: str) -> None:
    assert reason in refusal(f"name: test\ninputs: {{a: {spec}}}\nsteps: {{a: {{type: x}}}}")


def test_inputs_come_back_from_their_dictionary() -> None:
    made = workflow(head=INPUTS)
    assert Workflow.of(made.to_dict()) == made
    assert made.inputs["kind"] == InputSpec(type="string", required=False, keywords={"enum": ["bug", "question"]})
    assert made.inputs["owner"].keywords["required"] == ["name"]


# The schema for editors


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: str
    weight: int = 1


class _Llm(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prompt: str
    top_k: int = 5
    history: list[_Turn] = []
    output_schema: dict[str, Any] | None = None


class _Approval(BaseModel):
    model_config = ConfigDict(extra="forbid")
    message: str


def _schema_errors(steps: Any, **more: Any) -> list[str]:
    schema = workflow_schema({"llm": _Llm.model_json_schema(), "approval": _Approval.model_json_schema()})
    Draft202012Validator.check_schema(schema)
    value = {"name": "test", "steps": steps, **more}
    return [error.json_path for error in Draft202012Validator(schema).iter_errors(value)]


def test_the_schema_takes_what_the_door_takes() -> None:
    steps = {
        "a": {"type": "llm", "prompt": "{{ input.x }}", "top_k": "{{ input.k }}", "retry": {"max_attempts": 2}},
        "b": {
            "type": "llm",
            "prompt": "x",
            "output_schema": {"type": "object"},
            "needs": ["a"],
            "timeout": "1h30m",
            "history": [{"role": "user", "weight": "{{ a.w }}"}, "{{ a.turn }}"],
        },
        "c": {"type": "approval", "message": "Really?", "when": "b.x", "timeout": 60},
    }
    more = {
        "version": "1",
        "inputs": {"x": {"type": "string", "default": "y"}, "k": {"type": "integer", "minimum": 1}},
        "budget": {"cost_usd": 1, "wall_time": "15m"},
        "defaults": {"retry": {"backoff": "250ms"}, "timeout": "60s"},
        "outputs": {"x": "{{ c }}"},
    }
    assert _schema_errors(steps, **more) == []
    assert Workflow.of({"name": "test", "steps": steps, **more})


@pytest.mark.parametrize(
    ("steps", "more", "path"),
    [
        ({"a": {"type": "lmm", "prompt": "x"}}, {}, "$.steps.a.type"),
        ({"a": {"type": "llm", "promtp": "x"}}, {}, "$.steps.a"),
        ({"a": {"type": "llm", "prompt": "x", "message": "y"}}, {}, "$.steps.a"),
        ({"a": {"type": "llm", "prompt": "x", "top_k": "five"}}, {}, "$.steps.a.top_k"),
        ({"a": {"type": "llm", "prompt": "x", "history": [{"rol": "user"}]}}, {}, "$.steps.a.history"),
        ({"a": {"type": "llm", "prompt": "x", "timeout": "1y"}}, {}, "$.steps.a.timeout"),
        ({"a": {"type": "llm", "prompt": "x", "retry": {"attempts": 2}}}, {}, "$.steps.a.retry"),
        ({"a-b": {"type": "llm", "prompt": "x"}}, {}, "$.steps"),
        ({}, {}, "$.steps"),
        ({"a": {"type": "llm", "prompt": "x"}}, {"budgte": {}}, "$"),
        ({"a": {"type": "llm", "prompt": "x"}}, {"budget": {"tokens": 1}}, "$.budget"),
        ({"a": {"type": "llm", "prompt": "x"}}, {"inputs": {"x": {"type": "strin"}}}, "$.inputs.x.type"),
        ({"a": {"type": "llm", "prompt": "x"}}, {"inputs": {"x": {"type": "string", "minimun": 1}}}, "$.inputs.x"),
    ],
)
def test_the_schema_refuses_typos(steps: Any, more: dict[str, Any], path: str) -> None:
    assert path in _schema_errors(steps, **more)


# Anything at all


@given(
    st.text(max_size=200) | st.binary(max_size=100).map(lambda data: data.decode("latin-1")),
    st.sampled_from(["yaml", "json", None]),
)
def test_any_text_is_a_workflow_or_a_workflow_error(text: str, format: Format | None) -> None:
    with contextlib.suppress(WorkflowError):
        Workflow.parse(text, format=format)


_SOUP = r"""name: test steps: inputs: outputs: needs: when: type: {type:x} a: b: [a] "{{a.b}}" {{ }} [ ] { } , : - ? & *
! | > ' " # % @ &a *a --- ... \ ~ 1 true x"""


@given(st.lists(st.sampled_from([*_SOUP.split(), "\n", "\n  ", "\n    ", "\t"]), max_size=40).map(" ".join))
def test_any_mixture_of_what_workflows_are_made_of_is_one_or_a_workflow_error(text: str) -> None:
    with contextlib.suppress(WorkflowError):
        Workflow.parse(f"name: test\nsteps:\n  a: {{type: x}}\n{text}")


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "{{ a.b }}", "1h"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "default", "x", "a"]), inner),
    max_leaves=8,
)
_part = st.sampled_from(["version", "inputs", "budget", "defaults", "steps", "outputs", "other"])
_step = st.dictionaries(st.sampled_from(["type", "needs", "when", "retry", "timeout", "p"]), _json)


@given(st.dictionaries(_part, _json), st.dictionaries(st.sampled_from(["a", "b", "c"]), _step))
def test_any_data_is_a_workflow_that_comes_back_or_a_workflow_error(
    parts: dict[str, Any], steps: dict[str, Any]
) -> None:
    with contextlib.suppress(WorkflowError):
        made = Workflow.of({"name": "test", "steps": {"z": {"type": "x"}, **steps}, **parts})
        assert Workflow.of(made.to_dict()) == made

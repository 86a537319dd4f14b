"""A task or a function of the user's own is an act like any other: decided before it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flow_steps
import pytest
import with_all
from fleet import Fleet, ended, eventually, happened

import ferrum
from ferrum.errors import WorkflowError
from ferrum.governance import Policy
from ferrum.plan import Plan
from ferrum.primitives import Flow, Sequential, step, task
from ferrum.results import RunStatus
from ferrum.testing import run_inline
from ferrum.testing.environment import environment

POLICY = """\
allow: ["task:user.echo", "task:flow_steps:*", "task:with_all:*"]
ask: ["task:user.nothing"]
deny: ["task:with_all:words", "task:flow_steps:twice"]
"""


@pytest.fixture(scope="module")
def fleet(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    home = tmp_path_factory.mktemp("tasks")
    (home / "some.policy.yaml").write_text(POLICY)
    fleet = Fleet(
        redis_url,
        home,
        {"FERRUM_POLICY": str(home / "some.policy.yaml"), "FERRUM_IMPORTS": "user_tasks,flow_steps,with_all"},
    )
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


def workflow(**params: Any) -> dict[str, Any]:
    return {"name": "x", "steps": {"a": {"type": "task", **params}}, "outputs": {"a": "{{ a }}"}}


def test_a_task_that_nothing_allows_is_denied_before_it_runs(fleet: Fleet, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = ended(ferrum.submit(workflow(task="user.effect", input={"log": str(log), "text": "refund"})))
    assert run.status is RunStatus.POLICY_BLOCKED
    assert "nothing allows task 'user.effect': add 'task:user.effect' to allow in" in (run.reason or "")
    (decided,) = happened(run.run_id, "act.decided")
    assert (decided.kind, decided.target, decided.effect) == ("task", "user.effect", "deny")
    assert not log.exists()


def test_a_task_that_is_allowed_is_decided_on_and_runs(fleet: Fleet) -> None:
    run = ended(ferrum.submit(workflow(task="user.echo", input={"value": 3})))
    assert run.outputs == {"a": 3}
    (decided,) = happened(run.run_id, "act.decided")
    assert (decided.effect, decided.rule) == ("allow", "allow[0] task:user.echo")


def test_a_person_is_asked_about_a_task_with_its_arguments(fleet: Fleet) -> None:
    run_id = ferrum.submit(workflow(task="user.nothing", input={}))
    (asked,) = eventually(lambda: [one for one in ferrum.approvals() if one.run_id == run_id])
    assert asked.act == {"kind": "task", "name": "user.nothing", "arguments": {}}
    ferrum.decide(run_id, approved=True, by="ada")
    assert ended(run_id).status is RunStatus.COMPLETED


def test_a_function_is_decided_on_by_its_module_and_name(fleet: Fleet, tmp_path: Path) -> None:
    run = ended(ferrum.submit(workflow(function="with_all:leave", input={"log": str(tmp_path / "log")})))
    assert run.outputs == {"a": "left"}
    assert happened(run.run_id, "act.decided")[0].target == "with_all:leave"
    run = ended(ferrum.submit(workflow(function="with_all:words", input={"text": "a b"})))
    assert (run.status, happened(run.run_id, "act.decided")[0].rule) == (
        RunStatus.POLICY_BLOCKED,
        "deny[0] task:with_all:words",
    )


def test_what_denies_a_function_holds_by_whichever_of_its_names_it_is_called(fleet: Fleet) -> None:
    """`with_all` exports it too, and `flow_steps` defines it."""
    run = ended(ferrum.submit(workflow(function="flow_steps:words", input={"text": "a b"})))
    assert (run.status, happened(run.run_id, "act.decided")[0].rule) == (
        RunStatus.POLICY_BLOCKED,
        "deny[0] task:with_all:words",
    )


def test_what_is_allowed_of_a_function_is_only_the_name_that_is_said() -> None:
    with environment({"FERRUM_IMPORTS": "flow_steps,with_all"}):
        run = run_inline(
            workflow(function="with_all:words", input={"text": "a"}), policy={"allow": ["task:flow_steps:*"]}
        )
        assert run.status is RunStatus.POLICY_BLOCKED
        asked = {"allow": ["task:*"], "ask": ["task:flow_steps:words"]}
        run = run_inline(
            workflow(function="with_all:words", input={"text": "a"}), policy=asked, approvals=lambda _: True
        )
        assert run.status is RunStatus.COMPLETED
        run.assert_happened("act.decided", "a", effect="ask", rule="ask[0] task:flow_steps:words")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("with_all:unsaid", "'with_all' does not export 'unsaid'"),
        ("with_all:shop", "there is no function 'shop' in 'with_all'"),
        ("with_all:Shop", "there is no function 'Shop' in 'with_all'"),
        ("with_all:kept", "'with_all' does not export 'kept'"),
        ("with_all:leav", "there is no function 'leav' in 'with_all' (did you mean 'leave'?)"),
        ("with_all:rmtree", "it is defined in 'shutil', which FERRUM_IMPORTS does not name"),
        ("flow_steps:system", "there is no function 'system' in 'flow_steps'"),
    ],
)
def test_a_function_that_its_module_does_not_export_is_refused_whatever_the_policy_says(
    fleet: Fleet, function: str, why: str
) -> None:
    run = ended(ferrum.submit(workflow(function=function, input={"log": "/dev/null"})))
    assert run.status is RunStatus.FAILED
    assert why in (run.steps[0].error or "")


@pytest.mark.parametrize(
    "function", ["with_all:_private", "with_all:Shop.close", "with_all:shop.open", "a._b:c", "with_all:__doc__"]
)
def test_names_with_underscores_in_front_and_parts_of_objects_are_no_functions(function: str) -> None:
    with pytest.raises(WorkflowError, match="is no function: write module:function"):
        Plan.of(workflow(function=function))


def test_the_flow_that_is_submitted_is_decided_on(fleet: Fleet) -> None:
    run = ended(ferrum.submit(step(flow_steps.twice, input=[2])))
    assert run.status is RunStatus.POLICY_BLOCKED


# In this process.


def test_a_workflow_that_is_run_inline_is_decided_on_like_one_that_is_submitted() -> None:
    said = workflow(task="user.echo", input={"value": 3})
    denied = run_inline(said)
    assert denied.status is RunStatus.POLICY_BLOCKED
    assert "add 'task:user.echo' to allow in the policy that run_inline was given" in denied.reason
    assert run_inline(said, policy={"allow": ["task:user.*"]}).outputs == {"a": 3}
    asked = run_inline(said, policy={"ask": ["task:*"]}, approvals={"a": True})
    assert (asked.outputs, asked.happened("act.decided")[0].effect) == ({"a": 3}, "ask")  # type: ignore[union-attr]


@pytest.fixture
def _imports() -> Iterator[None]:
    with environment({"FERRUM_IMPORTS": "flow_steps,with_all"}):
        yield


@pytest.mark.parametrize(
    "flow",
    [
        step(with_all.words, input=["a b"], name="last"),
        Sequential(step(flow_steps.shout, input=["a"]), step(flow_steps.words, name="last")),
    ],
)
@pytest.mark.usefixtures("_imports")
def test_a_function_that_this_process_hands_over_is_its_own_and_is_not_decided_on(flow: Flow) -> None:
    inline = run_inline(flow)
    assert (inline.status, inline.happened("act.decided")) == (RunStatus.COMPLETED, [])
    executed = asyncio.run(flow.execute({}, policy=Policy()))
    assert executed.status is RunStatus.COMPLETED
    assert not [event for event in executed.events if event.type == "act.decided"]
    assert executed.outputs == inline.outputs


def test_a_task_that_is_only_named_is_decided_on_in_a_flow_too() -> None:
    flow = task("user.echo", {"value": 3})
    assert run_inline(flow).status is RunStatus.POLICY_BLOCKED
    assert asyncio.run(flow.execute({}, policy=Policy())).status is RunStatus.POLICY_BLOCKED


def test_a_step_with_a_script_does_not_act_and_is_not_decided_on() -> None:
    run = run_inline(workflow(task="user.echo"), steps={"a": 4})
    assert (run.outputs, run.happened("act.decided")) == ({"a": 4}, [])


@pytest.mark.parametrize("function", [with_all._private, with_all.unsaid, with_all.Shop.close])
def test_what_no_worker_would_run_is_refused_where_a_flow_is_built(function: Any) -> None:
    with pytest.raises(WorkflowError, match="no worker can import"):
        step(function, input={"log": "x"}).workflow()

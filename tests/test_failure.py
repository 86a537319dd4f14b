"""What goes wrong, takes too long, costs too much or is stopped: tried again, cut off, recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import PATIENCE_S, Fleet, assert_events_agree, effects, ended, eventually, happened, lines

import ferrum
from ferrum.results import RunStatus, StepStatus
from ferrum.testing.model_server import ModelServer, Outcome

#: Prices of the models that the script answers for; `openai/unpriced` has none.
PRICES = {"models": {"openai/priced": {"input": 1.0, "output": 1.0}}}


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    rules = [
        {"match": {"contains": "busy"}, "fail": 429, "retry_after": 0.3, "times": 1},
        {"match": {"contains": "broken"}, "fail": 500},
        {"match": {"contains": "never"}, "fail": "timeout"},
        {"match": {"contains": "slow"}, "reply": "at last", "delay": 0.5},
        {"match": {"contains": "dear"}, "reply": "ok", "usage": {"input_tokens": 900, "output_tokens": 100}},
    ]
    with ModelServer({"rules": rules, "default": {"reply": "ok"}}) as server:
        yield server


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("effects") / "effects.log"


@pytest.fixture(scope="module")
def fleet(redis_url: str, tmp_path_factory: pytest.TempPathFactory, log: Path, models: ModelServer) -> Iterator[Fleet]:
    home = tmp_path_factory.mktemp("failure")
    (home / "prices.yaml").write_text(json.dumps(PRICES))
    environ = {"FERRUM_MCP_SERVERS": effects(log), "FERRUM_PRICES": str(home / "prices.yaml"), "FERRUM_SWEEP": "0.1"}
    fleet = Fleet(redis_url, home, {**environ, **models.environ})
    try:
        fleet.start()
        # What is slow the first time (a large import, a server's start) is behind us: time limits below are short.
        assert ended(submit({"a": llm("hello"), "b": tool("echo", {"value": 1})})).status is RunStatus.COMPLETED
        yield fleet
    finally:
        fleet.stop()


def llm(prompt: str, model: str = "openai/unpriced", **more: Any) -> dict[str, Any]:
    return {"type": "llm", "model": model, "prompt": prompt, "max_tokens": 100, **more}


def tool(name: str, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "tool", "tool": f"effects.{name}", "input": arguments, **more}


def task(name: str, arguments: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "task", "task": f"user.{name}", "input": arguments or {}, **more}


def submit(steps: dict[str, Any], **more: Any) -> str:
    return ferrum.submit({"name": "x", "steps": steps, **more})


TWICE = {"max_attempts": 2, "backoff": "50ms"}


# Trying again.


def test_a_step_that_fails_and_then_does_not_is_tried_again_without_holding_a_worker(
    fleet: Fleet, redis_url: str, tmp_path: Path
) -> None:
    steps = {
        "a": task(
            "fail_until", {"path": str(tmp_path / "tries"), "times": 2}, retry={"max_attempts": 3, "backoff": "50ms"}
        )
    }
    run_id = submit(steps, outputs={"tries": "{{ a }}"})
    assert ferrum.wait(run_id, timeout_s=PATIENCE_S) == {"tries": 3}
    waits = happened(run_id, "step.waiting")
    assert [(wait.kind, wait.error) for wait in waits] == [
        ("retry", "user.fail_until raised RuntimeError: try 1"),
        ("retry", "user.fail_until raised RuntimeError: try 2"),
    ]
    # Full jitter: from nothing up to a wait that doubles.
    assert [0 <= wait.wakes_in <= limit for wait, limit in zip(waits, (0.05, 0.1), strict=True)] == [True, True]
    assert [event.attempt for event in happened(run_id, "step.started")] == [1, 2, 3]
    assert_events_agree(redis_url, run_id)


def test_a_step_that_waits_for_its_next_try_is_parked_and_resume_does_not_make_it_wait(
    fleet: Fleet, redis_url: str, tmp_path: Path
) -> None:
    """A thousand seconds from now nobody would have seen the end of this test."""
    retry = {"max_attempts": 2, "backoff": "1000s", "max_delay": "1000s"}
    run_id = submit({"a": task("fail_until", {"path": str(tmp_path / "tries"), "times": 1}, retry=retry)})
    eventually(lambda: happened(run_id, "step.waiting"))
    assert ferrum.runs.show(run_id).steps[0].status is StepStatus.WAITING
    ferrum.resume(run_id)
    assert ended(run_id).status is RunStatus.COMPLETED
    assert [event.why for event in happened(run_id, "step.resumed")] == ["asked to"]
    assert_events_agree(redis_url, run_id)


def test_a_step_that_fails_after_its_last_try_fails_the_run(fleet: Fleet, redis_url: str) -> None:
    run_id = submit({"a": tool("fail", {"message": "no luck"}, retry=TWICE)})
    run = ended(run_id)
    assert (run.status, run.steps[0].attempt) == (RunStatus.FAILED, 2)
    assert "no luck" in (run.steps[0].error or "")
    assert run.usage.tool_calls == 2
    assert_events_agree(redis_url, run_id)


def test_a_provider_that_says_when_to_come_back_is_not_asked_before(
    fleet: Fleet, redis_url: str, models: ModelServer
) -> None:
    run_id = submit({"a": llm("busy", retry=TWICE)}, outputs={"r": "{{ a }}"})
    assert ferrum.wait(run_id, timeout_s=PATIENCE_S) == {"r": "ok"}
    [wait] = happened(run_id, "step.waiting")
    assert 0.3 <= wait.wakes_in <= 0.35
    first, second = (event for event in happened(run_id, "step.started"))
    assert second.at - first.at >= 0.3
    assert_events_agree(redis_url, run_id)


def test_the_next_model_is_asked_when_one_fails(fleet: Fleet, models: ModelServer) -> None:
    step = llm("broken but for", model="openai/first", fallbacks=["openai/second"], retry={"max_attempts": 1})
    run = ended(submit({"a": step}))
    assert run.status is RunStatus.FAILED
    asked = [call.question.model for call in models.asked if "broken but for" in call.question.text]
    assert asked == ["first", "second"]


# Time limits.


def test_a_model_call_is_cut_off_at_its_time_limit(fleet: Fleet, redis_url: str, models: ModelServer) -> None:
    run_id = submit({"a": llm("never 1", timeout="300ms", retry={"max_attempts": 1})})
    run = ended(run_id)
    assert (run.status, run.steps[0].error) == (RunStatus.FAILED, "took longer than its timeout of 0.3 s")
    models.wait(lambda asked: _outcome(asked, "never 1") is Outcome.HUNG_UP)
    assert_events_agree(redis_url, run_id)


def _outcome(asked: Any, text: str) -> Outcome | None:
    return next((call.outcome for call in asked if text in call.question.text), None)


def test_a_tool_call_is_cut_off_at_its_time_limit_and_the_server_stops(fleet: Fleet, redis_url: str, log: Path) -> None:
    """The server would write after its delay: nobody sees that line if the call was cancelled there too."""
    slow = tool("append", {"text": "late", "delay_s": 3}, timeout="200ms", retry={"max_attempts": 1})
    after = tool("append", {"text": "after", "delay_s": 3.2})
    run = ended(submit({"slow": slow, "after": after}))
    assert run.steps[0].error == "took longer than its timeout of 0.2 s"
    assert f"{run.run_id}.after" in lines(log)
    assert f"{run.run_id}.slow" not in lines(log)
    assert_events_agree(redis_url, run.run_id)


@pytest.mark.parametrize("name", ["sleep", "asleep"])
def test_a_task_of_the_users_own_is_interrupted_at_its_time_limit(fleet: Fleet, redis_url: str, name: str) -> None:
    run = ended(submit({"a": task(name, {"seconds": 1000}, timeout="200ms")}))
    assert (run.status, run.steps[0].error) == (RunStatus.FAILED, "took longer than its timeout of 0.2 s")
    assert_events_agree(redis_url, run.run_id)


# Cancelling.


def test_cancelling_stops_what_is_running_at_once(
    fleet: Fleet, redis_url: str, models: ModelServer, log: Path, tmp_path: Path
) -> None:
    steps = {
        "model": llm("never 2"),
        "tool": tool("append", {"text": "never", "delay_s": 5}),
        "task": task("sleep", {"seconds": 1000, "log": str(tmp_path / "began")}),
        "async": task("asleep", {"seconds": 1000}),
        "after": task("echo", {"value": 1}, needs=["task"]),
    }
    run_id = submit(steps)
    models.wait(lambda asked: _outcome(asked, "never 2") is Outcome.OPEN)
    eventually(lambda: (tmp_path / "began").exists() and len(happened(run_id, "act.decided")) == 4)
    ferrum.cancel(run_id, by="ada", reason="enough")
    assert ferrum.runs.record().status(run_id) is RunStatus.CANCELLED
    models.wait(lambda asked: _outcome(asked, "never 2") is Outcome.HUNG_UP, timeout_s=PATIENCE_S)
    run = ended(run_id)
    assert (run.reason, {step.status for step in run.steps}) == ("enough", {StepStatus.CANCELLED})
    eventually(_idle)
    # The server was told, too: a call with the same delay that began later is done, and that one is not.
    later = ended(submit({"tool": tool("append", {"text": "later", "delay_s": 5})}))
    assert later.status is RunStatus.COMPLETED
    assert f"{run_id}.tool" not in lines(log)
    assert_events_agree(redis_url, run_id)


def _idle() -> bool:
    """No worker is at any task."""
    from ferrum.celery import app

    active = app.control.inspect(timeout=5, limit=1).active() or {}
    return bool(active) and not any(active.values())


# Budgets.


def test_a_run_ends_before_the_tool_call_that_its_budget_does_not_hold(fleet: Fleet, redis_url: str, log: Path) -> None:
    steps = {
        "a": tool("append", {"text": "1"}),
        "b": tool("append", {"text": "2"}, needs=["a"]),
        "c": tool("append", {"text": "3"}, needs=["b"]),
    }
    run = ended(submit(steps, budget={"tool_calls": 2}))
    assert (run.status, run.reason) == (RunStatus.BUDGET_KILLED, "budget.tool_calls is used up")
    assert [key for key in lines(log) if key.startswith(run.run_id)] == [f"{run.run_id}.a", f"{run.run_id}.b"]
    assert run.usage.tool_calls == 2
    assert [step.status for step in run.steps] == [StepStatus.COMPLETED, StepStatus.COMPLETED, StepStatus.CANCELLED]
    assert_events_agree(redis_url, run.run_id)


def test_calls_side_by_side_cannot_pass_a_budget_together(fleet: Fleet, redis_url: str, log: Path) -> None:
    steps = {f"s{number}": tool("append", {"text": "x", "delay_s": 0.2}) for number in range(20)}
    run = ended(submit(steps, budget={"tool_calls": 5}))
    assert run.status is RunStatus.BUDGET_KILLED
    assert len([key for key in lines(log) if key.startswith(run.run_id)]) <= 5
    assert_events_agree(redis_url, run.run_id)


def test_a_budget_that_is_used_up_cancels_the_calls_that_run(fleet: Fleet, redis_url: str, models: ModelServer) -> None:
    gate = {"type": "approval", "message": "go on?"}
    steps = {"long": llm("never 3"), "gate": gate, "dear": llm("dear 1", needs=["gate"])}
    steps["next"] = llm("dear 2", needs=["dear"])
    run_id = submit(steps, budget={"total_tokens": 1150})
    models.wait(lambda asked: _outcome(asked, "never 3") is Outcome.OPEN)
    eventually(lambda: happened(run_id, "step.waiting", "gate"))
    ferrum.decide(run_id, approved=True, by="ada")
    run = ended(run_id)
    assert (run.status, run.reason) == (RunStatus.BUDGET_KILLED, "budget.total_tokens is used up")
    models.wait(lambda asked: _outcome(asked, "never 3") is Outcome.HUNG_UP)
    assert _outcome(models.asked, "dear 2") is None
    assert_events_agree(redis_url, run.run_id)


def test_a_run_ends_before_the_model_call_whose_cost_might_pass_its_budget(
    fleet: Fleet, redis_url: str, models: ModelServer
) -> None:
    steps = {"a": llm("dear 4", model="openai/priced"), "b": llm("dear 5", model="openai/priced", needs=["a"])}
    run = ended(submit(steps, budget={"cost_usd": 0.00105}))
    assert (run.status, run.reason) == (RunStatus.BUDGET_KILLED, "budget.cost_usd is used up")
    assert run.usage.cost_usd == pytest.approx(0.001)
    assert _outcome(models.asked, "dear 5") is None
    assert_events_agree(redis_url, run.run_id)


def test_a_model_without_a_price_is_not_asked_where_cost_has_a_limit(
    fleet: Fleet, redis_url: str, models: ModelServer
) -> None:
    run = ended(submit({"a": llm("free?")}, budget={"cost_usd": 1.0}))
    assert run.status is RunStatus.BUDGET_KILLED
    assert "a model has no price" in (run.reason or "")
    assert _outcome(models.asked, "free?") is None
    assert_events_agree(redis_url, run.run_id)


def test_a_run_ends_when_its_time_is_over_and_what_runs_is_cancelled(
    fleet: Fleet, redis_url: str, models: ModelServer
) -> None:
    run = ended(submit({"a": llm("never 6")}, budget={"wall_time": "1500ms"}))
    assert (run.status, run.reason) == (RunStatus.BUDGET_KILLED, "budget.wall_time is used up")
    models.wait(lambda asked: _outcome(asked, "never 6") is Outcome.HUNG_UP)
    assert_events_agree(redis_url, run.run_id)


def test_the_time_of_a_run_stands_still_while_only_people_are_waited_for(fleet: Fleet, redis_url: str) -> None:
    """Another run with the same time limit, begun after the approval was asked for, ends in the meantime."""
    budget = {"wall_time": "700ms"}
    gate = {"type": "approval", "message": "ok?"}
    waiting = submit({"gate": gate}, budget=budget)
    eventually(lambda: ferrum.runs.record().status(waiting) is RunStatus.WAITING_APPROVAL)
    sleeping = ended(submit({"a": task("asleep", {"seconds": 1000})}, budget=budget))
    assert sleeping.status is RunStatus.BUDGET_KILLED
    ferrum.decide(waiting, approved=True, by="ada")
    assert ended(waiting).status is RunStatus.COMPLETED
    assert_events_agree(redis_url, waiting)

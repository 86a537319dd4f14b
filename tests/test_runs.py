"""A workflow, what its steps do, what the record says: through the front door, on a real worker."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, ended

import ferrum
from ferrum.results import RunStatus, StepStatus
from ferrum.runs import RunFailed


def echo(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "task", "task": "user.echo", "input": {"value": value}, **more}


def test_a_step_gets_the_outputs_of_the_steps_that_it_names(worker: Fleet) -> None:
    steps = {"a": echo("{{ input.q }}"), "b": echo("{{ a + '!' }}"), "c": echo("{{ [a, b] }}")}
    run_id = ferrum.submit(
        {"name": "x", "inputs": {"q": {"type": "string"}}, "steps": steps, "outputs": {"r": "{{ c }}"}}, {"q": "hi"}
    )
    assert ferrum.wait(run_id, timeout_s=PATIENCE_S) == {"r": ["hi", "hi!"]}


def test_what_depends_on_a_failed_step_is_skipped_and_the_rest_still_finishes(worker: Fleet) -> None:
    boom = {"type": "task", "task": "user.boom"}
    steps = {"a": boom, "b": echo(1, needs=["a"]), "c": echo(2), "d": echo(3, needs=["b", "c"])}
    run_id = ferrum.submit({"name": "x", "steps": steps})
    with pytest.raises(RunFailed, match="'a' failed"):
        ferrum.wait(run_id, timeout_s=PATIENCE_S)
    run = ended(run_id)
    assert run.status is RunStatus.FAILED
    assert {step.step_id: (step.status, step.error) for step in run.steps} == {
        "a": (StepStatus.FAILED, "user.boom raised ValueError: no"),
        "b": (StepStatus.SKIPPED, "'a' failed"),
        "c": (StepStatus.COMPLETED, None),
        "d": (StepStatus.SKIPPED, "'a' failed"),
    }


def test_waiting_again_and_again_opens_no_connection_anew(worker: Fleet, redis_url: str) -> None:
    run_id = ferrum.submit({"name": "x", "steps": {"gate": {"type": "approval", "message": "Go on?"}}})
    gc.disable()
    try:
        with redis.Redis.from_url(redis_url) as client:
            ids: list[set[str]] = []
            for _ in range(6):
                with pytest.raises(TimeoutError):
                    ferrum.wait(run_id, timeout_s=0.01)
                ids.append({str(one["id"]) for one in client.client_list() if one["cmd"] == "xread"})
    finally:
        gc.enable()
        ferrum.cancel(run_id)
    assert len(ids[-1]) == len(ids[0]) == 1

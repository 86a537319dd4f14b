"""Code that means to end its process ends its step, and nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import user_tasks
from fleet import Fleet, ended, happened

import ferrum
from ferrum.results import RunStatus
from ferrum.runs import record
from ferrum.testing import run_inline

#: How it ends, its words, and what is said of that; `None` where it succeeds.
ENDS = [
    ("exit", None, None),
    ("exit", 0, None),
    ("exit", 3, "ended by sys.exit(3)"),
    ("exit", "no disk", "ended by sys.exit('no disk')"),
    ("exit", 241, "ended by sys.exit(241)"),
    ("keyboard", "stop", "raised KeyboardInterrupt: stop"),
    ("cancelled", "off", "raised CancelledError: off"),
    ("generator", "over", "raised GeneratorExit: over"),
    ("own", "mine", "raised Own: mine"),
]
NAMES = [f"s{number}" for number in range(len(ENDS))]


def workflow(task: str) -> dict[str, Any]:
    steps: dict[str, Any] = {
        name: {"type": "task", "task": task, "input": {"how": how, "words": words}, "retry": {"max_attempts": 1}}
        for name, (how, words, _) in zip(NAMES, ENDS, strict=True)
    }
    # Beside them, and through it all.
    steps["beside"] = {"type": "task", "task": "user.sleep", "input": {"seconds": 0.3}}
    return {"name": "x", "steps": steps}


def assert_each_ended_as_it_said(run_id: str, task: str) -> None:
    steps = {step.step_id: step for step in ended(run_id).steps}
    for name, (how, _, error) in zip(NAMES, ENDS, strict=True):
        step = steps[name]
        if error is None:
            assert (step.status.value, step.output) == ("completed", None)
        else:
            # On a loop, nothing tells this one from a coroutine that is thrown away, so its words are lost.
            words = "raised GeneratorExit" if how == "generator" and "later" in task else error
            assert step.status.value == "failed"
            assert words in (step.error or "")
        assert step.attempt == 1
    assert steps["beside"].status.value == "completed"
    assert not happened(run_id, "step.lost")


def test_a_task_that_leaves_in_a_process_of_a_pool_does_not_end_that(redis_url: str, tmp_path: Path) -> None:
    fleet = Fleet(redis_url, tmp_path)
    try:
        fleet.start_alone("-P", "processes", "-c", "2", "-Q", "ferrum.task")
        run_id = ferrum.submit(workflow("user.leave"))
        assert_each_ended_as_it_said(run_id, "user.leave")
        assert "exited prematurely" not in fleet.log(0).read_text()
    finally:
        fleet.stop()


@pytest.mark.parametrize("task", ["user.leave", "user.leave_later"])
def test_a_task_that_leaves_ends_its_attempt_and_the_worker_lives(worker: Fleet, task: str) -> None:
    run_id = ferrum.submit(workflow(task))
    assert_each_ended_as_it_said(run_id, task)
    assert [process.poll() for process in worker.workers] == [None]


def test_an_exit_that_may_pass_is_tried_again(worker: Fleet) -> None:
    step = {"type": "task", "task": "user.leave", "input": {"how": "exit", "words": 1}}
    run_id = ferrum.submit({"name": "x", "steps": {"a": {**step, "retry": {"max_attempts": 2, "max_delay": "10ms"}}}})
    assert ended(run_id).status is RunStatus.FAILED
    assert record().state(run_id).step("a").attempt == 2


@pytest.mark.parametrize("task", ["user.leave", "user.leave_later"])
def test_in_this_process_a_task_leaves_no_more_than_its_step(task: str) -> None:
    document = workflow(task)
    if task == "user.leave_later":
        # Nothing tells it from a coroutine that is thrown away.
        del document["steps"][NAMES[[how for how, _, _ in ENDS].index("generator")]]
    run = run_inline(document, policy={"allow": ["task:*"]})
    for name, (_, _, error) in zip(NAMES, ENDS, strict=True):
        if name in document["steps"]:
            step = run.step(name)
            assert (step.status.value, error in (step.error or "") if error else step.output) == (
                ("failed", True) if error else ("completed", None)
            )


@pytest.mark.parametrize(("how", "words", "error"), [end for end in ENDS if end[0] != "generator"])
def test_a_function_in_place_of_a_step_leaves_no_more_than_its_step(how: str, words: object, error: str | None) -> None:
    steps = {"a": {"type": "task", "task": "user.nothing"}}
    run = run_inline({"name": "x", "steps": steps}, steps={"a": lambda _: user_tasks._leave(how, words)})
    step = run.step("a")
    assert step.status.value == ("failed" if error else "completed")
    assert (error or "") in (step.error or "")


def test_code_of_other_step_types_that_leaves_fails_its_attempt() -> None:
    from ferrum.errors import StepError
    from ferrum.loop import contained, contained_on_loop

    with pytest.raises(StepError, match=r"its code ended by sys\.exit\(0\)"):
        contained(lambda: user_tasks._leave("exit", 0))
    # The pool's own signal handler.
    with pytest.raises(SystemExit):
        contained(lambda: user_tasks._leave("exit", -(256 - 15)))

    async def leave() -> None:
        user_tasks._leave("keyboard", "no")

    with pytest.raises(StepError, match="its code raised KeyboardInterrupt: no"):
        asyncio.run(contained_on_loop(leave()))

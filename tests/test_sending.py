"""The front door without a worker: what it puts into the queues, and what it says of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, _state
from fleet import lane

import ferrum
from ferrum import runs
from ferrum.artifacts import Kept
from ferrum.errors import Conflict, InputError, NotFound, WorkflowError
from ferrum.plan import Plan
from ferrum.record import Claimed, Held, Resend
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.runs import RunFailed
from ferrum.sending import send
from ferrum.workflow import Workflow

TASK = {"type": "task", "task": "t"}
DIAMOND = {"a": TASK, **{step: {**TASK, "needs": ["a"]} for step in "bc"}, "d": {**TASK, "needs": ["b", "c"]}}


@pytest.fixture
def queue(clean_redis: str) -> Iterator[Queue]:
    with redis.Redis.from_url(clean_redis, decode_responses=True) as client:
        yield Queue(client)


class Queue:
    """What lies in the queue of `task` steps."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client

    def take(self) -> list[str]:
        """The steps whose messages are there, oldest first; they are gone after that."""
        messages: Any = self.client.lrange(lane("ferrum.task"), 0, -1)
        self.client.delete(lane("ferrum.task"))
        return [json.loads(message)["headers"]["id"].partition(".")[2] for message in reversed(messages)]


def workflow(steps: object, **more: object) -> dict[str, object]:
    return {"name": "x", "version": "1.2", "steps": steps, **more}


def claim(run_id: str, step: str) -> Held:
    held = Held(run_id, step, f"w#{step}")
    claimed = runs.record().claim(held, "w", 60)
    assert isinstance(claimed, Claimed)
    return held


def finish(run_id: str, step: str, output: object = 1, status: StepStatus = StepStatus.COMPLETED) -> None:
    data: dict[str, object] = {"seconds": 0.1} | ({"error": "no"} if status is StepStatus.FAILED else {})
    envelope = Kept(inline=output).dumps() if status is StepStatus.COMPLETED else ""
    runs.record().finish(claim(run_id, step), status, data, output=envelope, usage=Usage(tool_calls=1))


def park(run_id: str, step: str, kind: str = "approval", *, signature: str = "{}") -> None:
    runs.record().park(
        claim(run_id, step), kind, signature, {"attempt": 1, "message": "Go on?", "act": {"tool": "x"}},
        wake_in_s=60, usage=Usage(),
    )  # fmt: skip


# Submitting.


def test_what_a_run_begins_with_is_in_the_queue_and_nothing_else(queue: Queue) -> None:
    ferrum.submit(workflow({**DIAMOND, "x": TASK}))
    assert sorted(queue.take()) == ["a", "x"]


def test_another_celery_app_of_the_same_process_has_no_say_in_where_messages_go(queue: Queue) -> None:
    before = _state._tls.current_app
    mine = Celery("mine", broker="memory://", set_as_current=True)
    try:
        ferrum.submit(workflow(DIAMOND))
        assert queue.take() == ["a"]
    finally:
        mine.close()
        _state._set_current_app(before)


def test_many_beginnings_are_all_sent(queue: Queue) -> None:
    ferrum.submit(workflow({f"s{number}": TASK for number in range(230)}))
    assert sorted(queue.take()) == sorted(f"s{number}" for number in range(230))


def test_a_key_that_was_used_sends_nothing_again(queue: Queue) -> None:
    first = ferrum.submit(workflow(DIAMOND), key="k")
    assert queue.take() == ["a"]
    assert ferrum.submit(workflow(DIAMOND), key="k") == first
    assert queue.take() == []


def test_a_workflow_is_a_value_a_mapping_or_a_file(queue: Queue, tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(json.dumps(workflow(DIAMOND)))
    value = Workflow.of(workflow(DIAMOND))
    assert {runs.show(ferrum.submit(source)).version for source in (value, value.to_dict(), file, str(file))} == {"1.2"}


def test_a_mistake_is_said_at_once_and_nothing_is_sent(queue: Queue) -> None:
    with pytest.raises(WorkflowError, match="there is no step type 'tusk'"):
        ferrum.submit(workflow({"a": {"type": "tusk"}}))
    with pytest.raises(InputError, match="q"):
        ferrum.submit(workflow(DIAMOND, inputs={"q": {"type": "string"}}))
    assert queue.take() == []
    assert runs.record().runs() == []


def test_limits_of_the_workflow_are_those_of_the_run(queue: Queue) -> None:
    run_id = ferrum.submit(workflow(DIAMOND, budget={"tool_calls": 0, "wall_time": "1h"}))
    finish(run_id, "a")
    assert runs.show(run_id).reason == "budget.tool_calls is used up"


# Sending.


def test_a_segment_is_sent_from_its_head_and_a_step_alone_by_itself(queue: Queue) -> None:
    run_id = ferrum.submit(workflow({"a": TASK, "b": TASK, "c": {**TASK, "needs": ["a", "b"]}, "d": TASK}))
    queue.take()
    # Not above: the app asks for its Redis when it is imported.
    from ferrum.celery import app

    plan = runs.plan_of(run_id)
    send(app, lambda _: plan, [])
    assert queue.take() == []
    send(app, lambda _: plan, [Resend(run_id, "a", "head")])
    assert sorted(queue.take()) == ["a", "b"]
    send(app, lambda _: plan, [Resend(run_id, "c", "")])
    assert queue.take() == ["c"]


def test_a_parked_step_is_sent_with_the_signature_it_left(queue: Queue) -> None:
    plan = Plan(Workflow.of(workflow(DIAMOND)))
    run_id = ferrum.submit(plan.workflow)
    queue.take()
    park(run_id, "a", signature=json.dumps(plan.signature(run_id, "a")))
    assert runs.decide(run_id, approved=True, by="ann") == "a"
    assert queue.take() == ["a"]


# Seeing.


def test_a_run_shows_what_its_steps_left_behind(queue: Queue) -> None:
    run_id = ferrum.submit(workflow(DIAMOND, inputs={"q": {"type": "string"}}), {"q": "hi"})
    finish(run_id, "a", {"n": 1})
    finish(run_id, "b", status=StepStatus.FAILED)
    claim(run_id, "c")
    run = runs.show(run_id)
    assert (run.status, run.input, run.outputs, run.usage) == (
        RunStatus.RUNNING, {"q": "hi"}, None, Usage(tool_calls=2),
    )  # fmt: skip
    assert [(step.step_id, step.status.value, step.output) for step in run.steps] == [
        ("a", "completed", {"n": 1}), ("b", "failed", None), ("c", "running", None), ("d", "pending", None),
    ]  # fmt: skip
    runs.cancel(run_id, by="ann", reason="enough")
    assert [step.status.value for step in runs.show(run_id).steps] == ["completed", "failed", "cancelled", "cancelled"]
    with pytest.raises(Conflict):
        runs.cancel(run_id)


def test_waiting_gives_the_outputs_or_says_how_it_ended(queue: Queue) -> None:
    run_id = ferrum.submit(workflow({"a": TASK}))
    with pytest.raises(TimeoutError, match=r"has not ended after 0\.01 s"):
        ferrum.wait(run_id, timeout_s=0.01)
    finish(run_id, "a")
    assert ferrum.wait(run_id) is None
    failed = ferrum.submit(workflow({"a": TASK}))
    finish(failed, "a", status=StepStatus.FAILED)
    with pytest.raises(RunFailed) as caught:
        ferrum.wait(failed)
    assert str(caught.value) == f"run {failed!r} is failed: 'a' failed"
    assert caught.value.status is RunStatus.FAILED
    given = ferrum.submit(workflow({"a": TASK}, outputs={"r": "{{ a }}"}))
    finish(given, "a")
    runs.record().close(given, RunStatus.COMPLETED, outputs='{"v":{"r":1}}')
    assert ferrum.wait(given) == {"r": 1}


def test_a_run_is_watched_from_any_event_on(queue: Queue) -> None:
    run_id = ferrum.submit(workflow({"a": TASK}))
    finish(run_id, "a")
    events = list(ferrum.watch(run_id))
    assert [event.type for event in events][-1] == "run.ended"
    assert list(ferrum.watch(run_id, after=events[-2].id)) == events[-1:]


# Deciding.


def test_what_waits_for_a_person_is_listed_with_what_is_asked(queue: Queue) -> None:
    run_id = ferrum.submit(workflow(DIAMOND))
    with pytest.raises(NotFound, match="waits for a person"):
        runs.decide(run_id, approved=True, by="ann")
    park(run_id, "a")
    [approval] = runs.approvals()
    assert (approval.run_id, approval.step_id, approval.workflow) == (run_id, "a", "x")
    assert (approval.message, approval.act) == ("Go on?", {"tool": "x"})


def test_where_several_steps_wait_one_must_be_named(queue: Queue) -> None:
    run_id = ferrum.submit(workflow({"a": TASK, "b": TASK}))
    plan = runs.plan_of(run_id)
    for step in "ab":
        park(run_id, step, signature=json.dumps(plan.signature(run_id, step)))
    with pytest.raises(NotFound, match="say which: a, b"):
        runs.decide(run_id, approved=True, by="ann")
    assert runs.decide(run_id, "b", approved=False, by="ann") == "b"
    with pytest.raises(Conflict, match="was rejected by ann"):
        runs.decide(run_id, "b", approved=True, by="bob")


def test_a_question_whose_run_is_gone_is_not_listed(queue: Queue) -> None:
    run_id = ferrum.submit(workflow({"a": TASK, "b": TASK}))
    park(run_id, "a")
    for key in queue.client.scan_iter(f"*:events:{run_id}"):
        queue.client.delete(key)
    assert runs.approvals() == []


def test_resuming_sends_what_could_go_on(queue: Queue) -> None:
    run_id = ferrum.submit(workflow({"a": TASK, "b": TASK}))
    queue.take()
    park(run_id, "a", "retry", signature=json.dumps(runs.plan_of(run_id).signature(run_id, "a")))
    runs.resume(run_id)
    assert sorted(queue.take()) == ["a", "b"]


# Signals, priorities, names.


def test_a_signal_sends_the_step_that_waited_for_it(queue: Queue) -> None:
    run_id = ferrum.submit(workflow({"a": TASK}))
    queue.take()
    signature = json.dumps(runs.plan_of(run_id).signature(run_id, "a"))
    runs.record().park(
        claim(run_id, "a"), "signal", signature, {"attempt": 1}, wake_in_s=None, usage=Usage(), awaited="go"
    )
    runs.signal(run_id, "stop", 1)
    assert queue.take() == []
    runs.signal(run_id, "go", {"x": 1}, by="ann")
    assert queue.take() == ["a"]


def test_a_priority_chooses_the_lane_and_is_one_of_ten(queue: Queue) -> None:
    run_id = ferrum.submit(workflow({"a": TASK}), priority=9)
    assert queue.client.llen(lane("ferrum.task", 0)) == 1
    ferrum.submit(workflow({"a": TASK}, priority=0))
    assert queue.client.llen(lane("ferrum.task", 9)) == 1
    for wrong in (10, -1, True):
        with pytest.raises(InputError, match="a priority is a whole number from 0 to 9"):
            ferrum.submit(workflow({"a": TASK}), priority=wrong)
    assert runs.record().status(run_id) is RunStatus.QUEUED


def test_workflows_that_need_each_other_are_not_registered(queue: Queue) -> None:
    def needs(name: str, *others: str) -> dict[str, object]:
        steps = {other: {"type": "workflow", "name": other} for other in others}
        return {"name": name, "version": "1", "steps": {**steps, "own": {"steps": {"t": TASK}}}}

    assert runs.register(needs("one", "two", "three")) == ("one", "1")
    runs.register(needs("two", "three"))
    with pytest.raises(WorkflowError, match="these workflows need each other: three -> one -> two -> three"):
        runs.register(needs("three", "one"))
    with pytest.raises(WorkflowError, match="these workflows need each other: self -> self"):
        runs.register(needs("self", "self"))
    runs.register(needs("three"))


def test_messages_whose_batch_failed_are_sent_one_by_one(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    from kombu.exceptions import BatchPublishError
    from kombu.transport.redis import PublishBatch

    def fail(self: PublishBatch) -> None:
        self.discard()
        raise BatchPublishError("delivery is uncertain")

    monkeypatch.setattr(PublishBatch, "flush", fail)
    ferrum.submit(workflow({"a": TASK, "b": TASK, "c": TASK}))
    assert sorted(queue.take()) == ["a", "b", "c"]

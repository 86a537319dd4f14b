"""People say yes or no: to a step, or to an act that the policy asks about. Until then nothing is held."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, assert_events_agree, effects, ended, eventually, happened, lines, status_of
from sizes import sized

import ferrum
from ferrum.broker import UNACKED
from ferrum.errors import Conflict, NotFound
from ferrum.results import RunStatus, StepStatus
from ferrum.runs import record
from ferrum.testing.model_server import ModelServer
from ferrum.workflow import Workflow

POLICY = """
allow: ["tool:effects.echo"]
ask: ["tool:effects.append", "model:openai/*"]
deny: ["tool:effects.die"]
"""

GATE = {"type": "approval", "message": "Publish {{ input.title }}?"}


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    rules = [{"match": {"contains": "as JSON", "turn": 1}, "reply": "no"}, {"match": {"turn": 2}, "json": {"n": 1}}]
    with ModelServer({"rules": rules, "default": {"reply": "yes"}}) as server:
        yield server


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("effects") / "effects.log"


@pytest.fixture(scope="module")
def fleet(redis_url: str, tmp_path_factory: pytest.TempPathFactory, log: Path, models: ModelServer) -> Iterator[Fleet]:
    """One worker whose policy allows, asks and denies."""
    home = tmp_path_factory.mktemp("approvals")
    policy = home / "ask.policy.yaml"
    policy.write_text(POLICY)
    environ = {"FERRUM_POLICY": str(policy), "FERRUM_MCP_SERVERS": effects(log), "FERRUM_SWEEP": "0.1"}
    fleet = Fleet(redis_url, home, {**environ, **models.environ})
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


def append(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "tool", "tool": "effects.append", "input": {"text": text}, **more}


def submit(steps: dict[str, Any], **more: Any) -> str:
    workflow = {"name": "x", "inputs": {"title": {"type": "string", "default": "it"}}, "steps": steps, **more}
    return ferrum.submit(workflow)


def asked(run_id: str) -> ferrum.runs.Approval:
    """What the run asks a person, once it does."""
    eventually(lambda: status_of(run_id) is RunStatus.WAITING_APPROVAL)
    [approval] = [one for one in ferrum.approvals() if one.run_id == run_id]
    return approval


def test_an_approved_run_goes_on_and_says_who_approved_it(fleet: Fleet, redis_url: str) -> None:
    run_id = submit({"gate": GATE}, outputs={"by": "{{ gate.by }}", "note": "{{ gate.note }}"})
    approval = asked(run_id)
    assert (approval.step_id, approval.message, approval.act) == ("gate", "Publish it?", None)
    assert ferrum.decide(run_id, approved=True, by="ada", note="looks good") == "gate"
    assert ferrum.wait(run_id, timeout_s=PATIENCE_S) == {"by": "ada", "note": "looks good"}
    assert_events_agree(redis_url, run_id)


def test_a_rejected_run_fails_and_says_who_rejected_it_and_why(fleet: Fleet, redis_url: str) -> None:
    run_id = submit({"gate": GATE, "after": append("no", needs=["gate"])})
    asked(run_id)
    ferrum.decide(run_id, approved=False, by="ada", note="not today")
    run = ended(run_id)
    assert (run.status, run.reason) == (RunStatus.FAILED, "'gate' failed")
    assert [(step.status, step.error) for step in run.steps] == [
        (StepStatus.FAILED, "rejected by ada: not today"),
        (StepStatus.SKIPPED, "'gate' failed"),
    ]
    assert_events_agree(redis_url, run_id)


def test_nobody_decided_in_time(fleet: Fleet, redis_url: str) -> None:
    run_id = submit({"gate": {**GATE, "timeout": "200ms"}})
    run = ended(run_id)
    assert (run.status, run.steps[0].error) == (RunStatus.FAILED, "nobody decided in time")
    assert [event.expired for event in happened(run_id, "approval.decided")] == [True]
    with pytest.raises(Conflict):
        ferrum.decide(run_id, "gate", approved=True, by="ada")
    assert_events_agree(redis_url, run_id)


def test_a_second_decision_is_refused_and_says_who_decided(fleet: Fleet) -> None:
    run_id = submit({"gate": GATE, "other": GATE})
    eventually(lambda: len([one for one in ferrum.approvals() if one.run_id == run_id]) == 2)
    with pytest.raises(NotFound, match=r"several steps of run .* wait for a person; say which"):
        ferrum.decide(run_id, approved=True, by="ada")
    ferrum.decide(run_id, "gate", approved=True, by="ada")
    with pytest.raises(Conflict, match=r"'gate' of run .* was approved by ada; a decision is final"):
        ferrum.decide(run_id, "gate", approved=False, by="bob")
    with pytest.raises(NotFound, match="has no step 'gat'"):
        ferrum.decide(run_id, "gat", approved=True, by="bob")
    ferrum.decide(run_id, "other", approved=True, by="ada")
    assert ended(run_id).status is RunStatus.COMPLETED
    with pytest.raises(Conflict, match=r"'gate' of run .* was approved by ada; a decision is final"):
        ferrum.decide(run_id, "gate", approved=False, by="bob")


def test_what_waits_for_a_person_is_forgotten_when_its_run_is_cancelled(fleet: Fleet, redis_url: str) -> None:
    run_id = submit({"gate": GATE})
    asked(run_id)
    ferrum.cancel(run_id, by="ada", reason="no longer needed")
    assert not [one for one in ferrum.approvals() if one.run_id == run_id]
    with pytest.raises(Conflict, match="the run is cancelled"):
        ferrum.decide(run_id, "gate", approved=True, by="bob")
    assert ferrum.runs.show(run_id).steps[0].status is StepStatus.CANCELLED
    assert_events_agree(redis_url, run_id)


def test_an_act_that_the_policy_asks_about_waits_for_a_yes_to_exactly_it(
    fleet: Fleet, redis_url: str, log: Path
) -> None:
    run_id = submit({"act": append("asked")}, outputs={"r": "{{ act.written }}"})
    approval = asked(run_id)
    assert approval.act == {
        "kind": "tool", "server": "effects", "tool": "append", "arguments": {"text": "asked"},
    }  # fmt: skip
    assert "needs a person's yes by ask[0] tool:effects.append" in approval.message
    assert f"{run_id}.act" not in lines(log)
    ferrum.decide(run_id, approved=True, by="ada")
    assert ferrum.wait(run_id, timeout_s=PATIENCE_S) == {"r": "asked"}
    assert lines(log).count(f"{run_id}.act") == 1
    decisions = happened(run_id, "act.decided")
    assert [decision.effect for decision in decisions] == ["ask", "allow"]
    assert decisions[0].digest == decisions[1].digest
    assert decisions[1].rule.startswith("approved ")
    assert_events_agree(redis_url, run_id)


def test_a_yes_does_not_carry_over_to_other_arguments(fleet: Fleet, redis_url: str, models: ModelServer) -> None:
    """The model's first answer breaks the schema; the call that repairs it is another act, and is asked about too."""
    schema = {"type": "object", "required": ["n"]}
    step = {"type": "llm", "model": "openai/scripted", "prompt": "as JSON", "output_schema": schema}
    before = len(models.asked)
    run_id = submit({"act": step}, outputs={"r": "{{ act.n }}"})
    first = asked(run_id)
    assert len(models.asked) == before
    ferrum.decide(run_id, approved=True, by="ada")
    eventually(lambda: len(happened(run_id, "step.waiting")) == 2)
    second = asked(run_id)
    assert isinstance(first.act, dict)
    assert isinstance(second.act, dict)
    assert len(first.act["messages"]) < len(second.act["messages"])  # type: ignore[arg-type]
    # Bob saw the first, too, and is late: his yes is not one to what he has not seen.
    with pytest.raises(Conflict, match=r"'act' of run .* asks for something else by now, not .*: look again"):
        ferrum.decide(run_id, approved=True, by="bob", digest=first.digest)
    with pytest.raises(Conflict, match="asks for the second time: say what you saw"):
        ferrum.decide(run_id, approved=True, by="bob")
    with pytest.raises(Conflict, match="asks for something else by now"):
        ferrum.decide(run_id, approved=True, by="bob", digest=second.digest[:8])
    assert (first.times, second.times) == (1, 2)
    ferrum.decide(run_id, approved=True, by="ada", digest=second.digest[:16])
    assert ferrum.wait(run_id, timeout_s=PATIENCE_S) == {"r": 1}
    assert [decision.effect for decision in happened(run_id, "act.decided")] == [
        "ask",
        "allow",
        "ask",
        "allow",
        "allow",
    ]
    assert_events_agree(redis_url, run_id)


def test_an_act_that_a_person_refuses_does_not_happen_and_ends_the_run(fleet: Fleet, redis_url: str, log: Path) -> None:
    run_id = submit({"act": append("refused")})
    asked(run_id)
    ferrum.decide(run_id, approved=False, by="ada", note="too risky")
    run = ended(run_id)
    assert (run.status, run.reason) == (RunStatus.POLICY_BLOCKED, "ada refused effects.append: too risky")
    assert f"{run_id}.act" not in lines(log)
    assert_events_agree(redis_url, run_id)


@pytest.mark.parametrize(
    ("tool", "rule", "reason"),
    [
        (
            "effects.die",
            "deny[0] tool:effects.die",
            r"tool 'effects.die' is denied by deny\[0\] tool:effects.die in .*",
        ),
        ("effects.fail", "default", "nothing allows tool 'effects.fail': add 'tool:effects.fail' to allow in .*"),
    ],
)
def test_a_denied_act_never_reaches_its_server_and_the_run_says_by_which_rule(
    fleet: Fleet, log: Path, tool: str, rule: str, reason: str
) -> None:
    run_id = submit({"act": {"type": "tool", "tool": tool, "input": {"text": "never"}}})
    run = ended(run_id)
    assert run.status is RunStatus.POLICY_BLOCKED
    [decision] = happened(run_id, "act.decided")
    assert (decision.effect, decision.rule) == ("deny", rule)
    assert decision.reason == run.reason
    assert decision.target == tool
    assert re.fullmatch(reason, run.reason or "")
    assert f"{run_id}.act" not in lines(log)
    assert run.usage.tool_calls == 0


def test_hundreds_of_waiting_approvals_hold_nothing_and_each_is_decided_once(clean_redis: str, tmp_path: Path) -> None:
    many = min(1000, sized(334))
    policy = tmp_path / "nothing.policy.yaml"
    policy.write_text("allow: []\n")
    fleet = Fleet(clean_redis, tmp_path, {"FERRUM_POLICY": str(policy)})
    worker = fleet.start()
    try:
        workflow = Workflow.of({"name": "x", "steps": {"gate": {"type": "approval", "message": "go?"}}})
        runs = [ferrum.submit(workflow) for _ in range(many)]
        eventually(lambda: len(record().asked()) == many, every_s=0.5)
        with redis.Redis.from_url(clean_redis) as client:
            eventually(lambda: _nothing_held(client))
            # The worker ends, and ends at once: there is nothing that it waits for. What waits needs no worker.
            fleet.stop()
            assert worker.returncode == 0
            assert _nothing_held(client)
        assert {record().status(run_id) for run_id in runs} == {RunStatus.WAITING_APPROVAL}
        fleet.start()
        said = [_decide_all(runs, by) for by in ("ada", "bob")]
        for thread, _, _ in said:
            thread.start()
        for thread, _, _ in said:
            thread.join()
        eventually(lambda: all(record().status(run_id) is RunStatus.COMPLETED for run_id in runs))
    finally:
        fleet.stop()
    (_, by_ada, refused_ada), (_, by_bob, refused_bob) = said
    assert by_ada | by_bob == set(runs)
    assert (refused_ada.keys(), refused_bob.keys()) == (by_bob, by_ada)
    for run_id in runs:
        winner, answer = ("ada", refused_bob[run_id]) if run_id in by_ada else ("bob", refused_ada[run_id])
        assert f"was approved by {winner}; a decision is final" in answer
        kinds = Counter(event.type for event in record().events(run_id))
        assert (kinds["step.completed"], kinds["approval.decided"]) == (1, 1)
    assert_events_agree(clean_redis, runs[0])


def _nothing_held(client: redis.Redis) -> bool:
    """No message, no acknowledgement that is due, no lease."""
    from ferrum.celery import app

    queues = [queue.name for queue in app.conf.task_queues]
    leases = [key for key in client.scan_iter("ferrum:*:leases") if client.zcard(key)]
    return not (client.hlen(UNACKED) or leases or any(client.llen(name) for name in queues))


def _decide_all(runs: list[str], by: str) -> tuple[threading.Thread, set[str], dict[str, str]]:
    won: set[str] = set()
    refused: dict[str, str] = {}

    def decide() -> None:
        for run_id in runs:
            try:
                ferrum.decide(run_id, "gate", approved=True, by=by)
                won.add(run_id)
            except Conflict as error:
                refused[run_id] = str(error)

    return threading.Thread(target=decide, name=by), won, refused

"""One attempt at one step, on a real record, with actors that do as a test says; no Celery."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from by_hand import ByHand
from fleet import PATIENCE_S, eventually
from office import Given, Office, step_type
from pydantic import JsonValue

import ferrum.settings
from ferrum.artifacts import Artifacts, Kept
from ferrum.errors import ModelError, SettingsError, StepError, ToolError, Unavailable
from ferrum.events import ActDecided, RunState, StepOutput, StepWaiting
from ferrum.executor import Holds, Outcome, Then
from ferrum.governance.acts import (
    Act,
    By,
    CodeReply,
    CodeRun,
    Document,
    Embedding,
    EmbeddingReply,
    ModelCall,
    R,
    Search,
    SearchReply,
    ToolCall,
    WhyEnded,
)
from ferrum.governance.budget import Limits
from ferrum.governance.policy import Policy
from ferrum.loop import LoopThread
from ferrum.record import Held, Lost, Record, Resend, Verdict
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.steps import Attempt, step_types
from ferrum.testing.actors import Done, ScriptedActors

MODEL = "test/model"
LOG = ToolCall(server="git", tool="log", arguments={})
ASK = ModelCall(model=MODEL, messages=({"role": "user", "content": "hi"},))
TOOL = {"type": "tool", "tool": "git.log"}
RAN = CodeReply(reason=WhyEnded.OK, exit_code=0, wall_s=0.1, backend="none", memory_by="watchdog")


@pytest.fixture(scope="module")
def record(redis_url: str) -> Iterator[Record]:
    record = Record(redis_url)
    yield record
    record.close_connections()


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.stop()


@pytest.fixture
def office(record: Record, loop: LoopThread, tmp_path: Path) -> Office:
    return Office(record, loop, Artifacts(f"file://{tmp_path}"))


Types = Callable[..., None]


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> Types:
    """Adds step types: `types(name=run)`, where `run(params, attempt)` is what a step of this type does."""

    def add(waits: bool = False, **runs: Callable[[Given, Attempt], Any]) -> None:
        own = {name: step_type(name, run, waits=waits) for name, run in runs.items()}
        monkeypatch.setattr("ferrum.plan.step_types", lambda: {**step_types(), **own})

    return add


async def model(params: Given, attempt: Attempt) -> JsonValue:
    return (await attempt.perform(ASK)).text


class Chatty(ScriptedActors):
    """Speaks while it acts, and embeds what is searched for."""

    tenant = ""

    async def carry_out(self, act: Act[R], by: By) -> R:
        for stream, text in [("stdout", "one\n"), ("stdout", "two\n"), ("stderr", "oh")]:
            by.say(stream, text)
        if isinstance(act, Search):
            await by.perform(Embedding(model="test/embedder", texts=(act.query,)))
            assert by.tenant == self.tenant
        return await super().carry_out(act, by)


# What comes of an attempt.


def test_a_step_that_works_leaves_its_output_and_its_canvas_goes_on(office: Office) -> None:
    office.actors.on("git.log", ["a commit"])
    run = office.begin({"a": TOOL, "b": {**TOOL, "needs": ["a"]}})
    outcome = office.attempt(run)
    assert (outcome.then, outcome.run_id, outcome.sends) == (Then.PASS, run.run_id, ())
    assert outcome.plan is not None
    state = office.record.state(run.run_id)
    assert (state.step("a").status, state.step_outputs["a"]) == (StepStatus.COMPLETED, '{"v":["a commit"]}')
    assert office.actors.done == [Done(LOG, f"{run.run_id}.a")]


def test_a_claim_is_held_until_what_follows_was_sent(office: Office) -> None:
    office.actors.on("git.log", 1)
    outcome = office.attempt(office.begin({"a": TOOL}))
    assert outcome.held is not None
    assert office.executor.holds.current() == [outcome.held]
    office.executor.holds.release(outcome.held)
    assert office.executor.holds.current() == []
    assert office.executor.holds.take_released() == [outcome.held]


def test_what_an_act_says_is_an_event_while_the_step_runs(office: Office, types: Types) -> None:
    async def code(params: Given, attempt: Attempt) -> JsonValue:
        reply = await attempt.perform(CodeRun(code="…"))
        events = office.record.events(attempt.run_id)
        said = [(event.step, event.stream, event.text) for event in events if isinstance(event, StepOutput)]
        assert said == [("a", "stdout", "one\ntwo\n"), ("a", "stderr", "oh")]
        return reply.reason

    types(code=code)
    office.executor.actors = Chatty().on("python-basic", RAN)
    state = office.play({"a": {"type": "code"}})
    assert state.step_outputs["a"] == '{"v":"ok"}'
    # What is run counts as a tool does.
    assert state.usage == Usage(tool_calls=1)


def test_what_is_said_twice_is_told_once_and_what_the_dead_say_is_not_told(office: Office) -> None:
    run = office.begin({"a": TOOL})
    held = Held(run.run_id, "a", "w#1")
    office.record.claim(held, "w", 60)
    for number in (1, 1, 2):
        office.record.say(held, number, {"attempt": 1, "stream": "stdout", "text": str(number)})
    events = office.record.events(run.run_id)
    assert [event.text for event in events if isinstance(event, StepOutput)] == ["1", "2"]
    with pytest.raises(Lost):
        office.record.say(Held(run.run_id, "a", "w#0"), 3, {"attempt": 1, "stream": "stdout", "text": "3"})


def test_what_a_step_loses_while_it_speaks_does_not_stop_its_act(office: Office, types: Types) -> None:
    async def code(params: Given, attempt: Attempt) -> JsonValue:
        office.record.cancel(attempt.run_id, "ada", None)
        return (await attempt.perform(CodeRun(code="…"))).reason

    types(code=code)
    office.executor.actors = Chatty().on("python-basic", RAN)
    assert office.play({"a": {"type": "code"}}).status is RunStatus.CANCELLED


def test_what_an_act_needs_done_besides_is_decided_for_itself(office: Office, types: Types) -> None:
    async def search(params: Given, attempt: Attempt) -> JsonValue:
        return (await attempt.perform(Search(index="docs", query="how?"))).model_dump(mode="json")["documents"]

    types(search=search)
    found = SearchReply(documents=(Document(text="so", score=1, source="a.md"),))
    vector = EmbeddingReply(vectors=((1.0,),), model="m", usage=Usage(input_tokens=3, model_calls=1))
    office.executor.actors = actors = Chatty().on("docs", found).on("test/embedder", vector)
    office.executor.policy = Policy.of({"allow": ["retrieval:*", "model:*"]})
    run = office.begin({"a": {"type": "search"}})
    actors.tenant = run.queue
    office.attempt(run)
    state = office.record.state(run.run_id)
    assert json.loads(state.step_outputs["a"])["v"][0]["text"] == "so"
    assert state.usage == Usage(input_tokens=3, model_calls=1)
    decided = [event for event in office.record.events(run.run_id) if isinstance(event, ActDecided)]
    assert [(one.kind, one.target) for one in decided] == [("retrieval", "docs"), ("model", "test/embedder")]

    office.executor.policy = Policy.of({"allow": ["retrieval:*"]})
    run = office.begin({"a": {"type": "search"}})
    actors.tenant = run.queue
    office.attempt(run)
    assert "nothing allows model 'test/embedder'" in str(office.record.state(run.run_id).step("a").error)


def test_the_input_and_the_outputs_of_other_steps_reach_a_step(office: Office) -> None:
    office.actors.on("git.log", {"x": [1, 2]}).on("s.take", "taken")
    take = {"type": "tool", "tool": "s.take", "input": {"all": "{{ a.x }}", "said": "{{ input.q }}"}}
    state = office.play({"a": TOOL, "b": take}, {"q": "hi"}, outputs={"r": "{{ b + '!' }}", "q": "{{ input.q }}"})
    assert office.actors.done[1].act == ToolCall(server="s", tool="take", arguments={"all": [1, 2], "said": "hi"})
    assert (state.status, state.outputs) == (RunStatus.COMPLETED, '{"v":{"r":"taken!","q":"hi"}}')


def test_a_large_output_goes_by_reference_and_arrives_whole(office: Office) -> None:
    large = ["x" * 1000] * 50
    office.actors.on("git.log", large).on("s.take", large)
    take = {"type": "tool", "tool": "s.take", "input": {"all": "{{ a }}"}}
    state = office.play({"a": TOOL, "b": take}, outputs={"r": "{{ b }}"})
    assert '"$artifact"' in state.step_outputs["a"]
    assert len(state.step_outputs["a"]) < 300
    assert office.actors.done[1].act == ToolCall(server="s", tool="take", arguments={"all": large})
    assert state.status is RunStatus.COMPLETED


def test_a_step_whose_condition_does_not_hold_is_skipped(office: Office) -> None:
    state = office.play({"a": {**TOOL, "when": "input.q == 'yes'"}}, {"q": "no"})
    assert (state.step("a").status, state.step("a").error) == (StepStatus.SKIPPED, "its 'when' is false")
    assert state.status is RunStatus.COMPLETED
    office.actors.on("git.log", 1)
    assert office.play({"a": {**TOOL, "when": "input.q == 'yes'"}}, {"q": "yes"}).step_outputs["a"] == '{"v":1}'


def test_a_step_that_was_skipped_is_null_to_those_behind_it(office: Office) -> None:
    office.actors.on("git.log", 1).on("s.take", 2)
    take = {"type": "tool", "tool": "s.take", "input": {"all": "{{ [a, b] }}"}}
    state = office.play({"a": {**TOOL, "when": "false"}, "b": TOOL, "c": take})
    assert state.step("c").status is StepStatus.COMPLETED
    assert office.actors.done[-1].act == ToolCall(server="s", tool="take", arguments={"all": [None, 1]})


def test_a_message_that_has_nothing_to_do_goes_no_further(office: Office) -> None:
    office.actors.on("git.log", 1)
    run = office.begin({"a": TOOL, "b": {**TOOL, "needs": ["a"]}})
    assert office.attempt(run, "b").then is Then.DROP
    office.attempt(run, "a")
    assert office.attempt(run, "a") == Outcome(Then.PASS)
    assert len(office.actors.done) == 1


def test_what_depends_on_a_failed_step_is_skipped_and_says_what_follows_it(office: Office) -> None:
    office.actors.on("git.log", ToolError("no"))
    run = office.begin({"a": TOOL, "b": {**TOOL, "needs": ["a"]}})
    assert office.attempt(run, "a").then is Then.PASS
    outcome = office.attempt(run, "b")
    assert (outcome.then, outcome.held) == (Then.PASS, None)
    state = office.record.state(run.run_id)
    assert (state.step("a").error, state.step("b").error, state.reason) == ("no", "'a' failed", "'a' failed")


# Trying again.


def test_a_step_that_may_work_later_waits_and_is_tried_again(office: Office) -> None:
    office.actors.on("git.log", ToolError("busy", retry=True), "at last")
    run = office.begin({"a": {**TOOL, "retry": {"max_attempts": 2, "backoff": "40s"}}})
    assert office.attempt(run).then is Then.WAIT
    waiting = office.record.events(run.run_id)[-1]
    assert isinstance(waiting, StepWaiting)
    assert (waiting.kind, waiting.error, waiting.attempt) == ("retry", "busy", 1)
    assert waiting.wakes_in is not None
    assert 0 <= waiting.wakes_in <= 40
    assert office.record.nudge(run.run_id) == (Resend(run.run_id, "a", "signature of a"),)
    assert office.attempt(run).then is Then.PASS
    step = office.record.state(run.run_id).step("a")
    assert (step.status, step.attempt, step.usage.tool_calls) == (StepStatus.COMPLETED, 2, 2)


def test_a_step_is_not_tried_again_before_the_other_side_said(office: Office) -> None:
    office.actors.on("git.log", ToolError("busy", retry=True, retry_after_s=30))
    run = office.begin({"a": {**TOOL, "retry": {"backoff": "1ms"}}})
    office.attempt(run)
    waiting = office.record.events(run.run_id)[-1]
    assert isinstance(waiting, StepWaiting)
    assert waiting.wakes_in is not None
    assert waiting.wakes_in >= 30


def test_a_step_fails_after_its_last_try(office: Office) -> None:
    office.actors.on("git.log", ToolError("busy", retry=True))
    run = office.begin({"a": {**TOOL, "retry": {"max_attempts": 3}}})
    thens = []
    for _ in range(3):
        thens.append(office.attempt(run).then)
        if thens[-1] is Then.WAIT:
            office.record.nudge(run.run_id)
    assert thens == [Then.WAIT, Then.WAIT, Then.PASS]
    step = office.record.state(run.run_id).step("a")
    assert (step.status, step.attempt, step.error) == (StepStatus.FAILED, 3, "busy")


def test_an_attempt_knows_its_number_and_has_one_key_for_all(office: Office, types: Types) -> None:
    seen: list[tuple[object, ...]] = []

    def look(params: Given, attempt: Attempt) -> JsonValue:
        seen.append((attempt.run_id, attempt.step_id, attempt.number, attempt.idempotency_key, attempt.timeout_s))
        raise StepError("again", retry=True)

    types(look=look)
    run = office.begin({"a": {"type": "look", "retry": {"max_attempts": 2}, "timeout": "9s"}})
    office.attempt(run)
    office.record.nudge(run.run_id)
    office.attempt(run)
    key = f"{run.run_id}.a"
    assert seen == [(run.run_id, "a", 1, key, 9.0), (run.run_id, "a", 2, key, 9.0)]


# What goes wrong.


def failing(office: Office, types: Types, error: BaseException, **step: object) -> RunState:
    async def fail(params: Given, attempt: Attempt) -> JsonValue:
        raise error

    types(fail=fail)
    return office.play({"a": {"type": "fail", **step}})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "KeyError: 'x' (a bug in ferrum or in a step type)"),
        (SettingsError("FERRUM_MODEL is missing"), "FERRUM_MODEL is missing"),
        (Unavailable("no store"), "no store"),
        (TimeoutError("of its own"), "TimeoutError: of its own (a bug in ferrum or in a step type)"),
        (ModelError("refused"), "refused"),
    ],
)
def test_whatever_goes_wrong_is_recorded(office: Office, types: Types, error: Exception, said: str) -> None:
    state = failing(office, types, error)
    assert (state.step("a").status, state.step("a").error) == (StepStatus.FAILED, said)
    assert state.status is RunStatus.FAILED


def test_a_store_that_is_away_may_be_there_at_the_next_try(office: Office, types: Types) -> None:
    state = failing(office, types, Unavailable("no store"), retry={"max_attempts": 2})
    assert (state.step("a").status, state.step("a").error) == (StepStatus.WAITING, "no store")


def test_parameters_that_do_not_fit_fail_the_step(office: Office) -> None:
    office.actors.on("git.log", "many")
    state = office.play({"a": TOOL, "b": {"type": "llm", "prompt": "x", "model": MODEL, "max_tokens": "{{ a }}"}})
    assert state.step("b").status is StepStatus.FAILED
    assert "steps.b.max_tokens: input should be a valid integer" in (state.step("b").error or "")


def test_an_output_that_is_not_json_fails_the_step(office: Office, types: Types) -> None:
    types(odd=lambda params, attempt: {"x": object()})
    assert office.play({"a": {"type": "odd"}}).step("a").status is StepStatus.FAILED


def test_outputs_that_cannot_be_kept_now_are_kept_later(office: Office, tmp_path: Path) -> None:
    office.actors.on("git.log", "x" * 20_000)
    run = office.begin({"a": TOOL}, outputs={"r": "{{ a + a }}"})
    in_the_way = tmp_path / "sha256"
    in_the_way.write_text("not a directory")
    for _ in range(2):
        with pytest.raises(Unavailable):
            office.attempt(run)
        assert office.executor.holds.current() == []
        assert office.record.status(run.run_id) is RunStatus.RUNNING
    in_the_way.unlink()
    office.attempt(run)
    state = office.record.state(run.run_id)
    assert (state.status, '"$artifact"' in (state.outputs or "")) == (RunStatus.COMPLETED, True)


def test_outputs_that_cannot_be_evaluated_fail_the_run(office: Office) -> None:
    office.actors.on("git.log", {"x": 1})
    state = office.play({"a": TOOL}, outputs={"r": "{{ a.y }}"})
    assert state.status is RunStatus.FAILED
    assert (state.reason or "").startswith("the workflow's outputs: ")
    assert state.step("a").status is StepStatus.COMPLETED


def test_outputs_that_meet_a_bug_fail_the_run(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    office.actors.on("git.log", 1)
    keep = office.executor.artifacts.keep
    bugs = iter([None, KeyError("what")])

    def keep_or_not(value: JsonValue) -> Kept:
        if error := next(bugs):
            raise error
        return keep(value)

    run = office.begin({"a": TOOL}, outputs={"r": "{{ a }}"})
    monkeypatch.setattr(office.executor.artifacts, "keep", keep_or_not)
    office.attempt(run)
    state = office.record.state(run.run_id)
    assert (state.status, state.step("a").status) == (RunStatus.FAILED, StepStatus.COMPLETED)
    assert state.reason == "the workflow's outputs: KeyError: 'what' (a bug in ferrum or in a step type)"


def test_a_run_whose_closer_died_is_closed_by_the_next_message(office: Office) -> None:
    office.actors.on("git.log", 7)
    run = office.begin({"a": TOOL}, outputs={"r": "{{ a }}"})
    run.begin("a")
    assert run.finish("a", output='{"v":7}').close
    outcome = office.attempt(run)
    assert (outcome.then, outcome.held) == (Then.PASS, None)
    state = office.record.state(run.run_id)
    assert (state.status, state.outputs) == (RunStatus.COMPLETED, '{"v":{"r":7}}')


def test_secrets_are_not_recorded(office: Office, types: Types, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SOME_API_KEY", "sk-very-secret")
    ferrum.settings._secrets.cache_clear()
    try:
        state = failing(office, types, StepError("the key sk-very-secret is wrong"))
    finally:
        ferrum.settings._secrets.cache_clear()
    assert state.step("a").error == "the key *** is wrong"


def test_when_redis_stays_away_the_claim_is_let_go(
    office: Office, types: Types, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise Unavailable("Redis does not answer")

    types(quick=lambda params, attempt: 1)
    run = office.begin({"a": {"type": "quick"}})
    monkeypatch.setattr(office.record, "finish", away)
    with pytest.raises(Unavailable):
        office.attempt(run)
    assert office.executor.holds.current() == []


# Time.


def test_an_act_that_takes_too_long_is_cancelled(office: Office) -> None:
    cancelled = threading.Event()

    async def hang(act: Act) -> JsonValue:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return None

    office.actors.on("git.log", hang)
    state = office.play({"a": {**TOOL, "timeout": "50ms", "retry": {"max_attempts": 1}}})
    assert state.step("a").error == "took longer than its timeout of 0.05 s"
    assert cancelled.wait(PATIENCE_S)


def busy(params: Given, attempt: Attempt) -> JsonValue:
    began.set()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        time.sleep(0.001)
    return None


#: A `busy` or `hang` step is at work.
began = threading.Event()


async def hang(params: Given, attempt: Attempt) -> JsonValue:
    began.set()
    await asyncio.sleep(60)
    return None


def test_blocking_code_that_takes_too_long_is_interrupted(office: Office, types: Types) -> None:
    types(busy=busy)
    state = office.play({"a": {"type": "busy", "timeout": "50ms"}})
    assert state.step("a").error == "took longer than its timeout of 0.05 s"


def test_blocking_code_that_is_quick_enough_is_not_interrupted(office: Office, types: Types) -> None:
    types(quick=lambda params, attempt: params.value)
    state = office.play({"a": {"type": "quick", "value": "done", "timeout": "60s"}})
    assert state.step_outputs["a"] == '{"v":"done"}'


def test_a_type_that_waits_has_its_timeout_for_that_and_not_for_an_attempt(office: Office, types: Types) -> None:
    def slow(params: Given, attempt: Attempt) -> JsonValue:
        time.sleep(0.01)
        return attempt.timeout_s

    types(waits=True, slow=slow)
    assert office.play({"a": {"type": "slow", "timeout": "1ms"}}).step_outputs["a"] == '{"v":0.001}'


def test_a_plain_function_may_give_a_coroutine(office: Office, types: Types) -> None:
    async def later() -> JsonValue:
        await asyncio.sleep(0)
        return "later"

    types(late=lambda params, attempt: later())
    assert office.play({"a": {"type": "late"}}).step_outputs["a"] == '{"v":"later"}'


# Stopping.


def in_the_midst(office: Office, run: ByHand, then: Callable[[Holds], None]) -> Outcome:
    """The outcome of an attempt during which `then` happens."""
    began.clear()
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(office.attempt(run)))
    thread.start()
    assert began.wait(PATIENCE_S)
    then(office.executor.holds)
    thread.join(10)
    return outcomes[0]


@pytest.mark.parametrize("run", [busy, hang])
def test_a_step_that_is_no_longer_ours_is_stopped(office: Office, types: Types, run: Callable[..., Any]) -> None:
    types(work=run)
    begun = office.begin({"a": {"type": "work"}})

    def cancel(holds: Holds) -> None:
        office.record.cancel(begun.run_id, "ann")
        holds.lose(office.record.renew(holds.current(), 60))

    assert in_the_midst(office, begun, cancel) == Outcome(Then.DROP)
    assert office.executor.holds.current() == []
    assert office.record.status(begun.run_id) is RunStatus.CANCELLED


@pytest.mark.parametrize("run", [busy, hang])
def test_a_stopping_worker_gives_its_steps_back(office: Office, types: Types, run: Callable[..., Any]) -> None:
    types(work=run)
    begun = office.begin({"a": {"type": "work"}})
    assert in_the_midst(office, begun, Holds.stop_all).then is Then.RETURN
    assert office.executor.holds.current() == []
    assert office.record.state(begun.run_id).step("a").status is StepStatus.PENDING
    # And whatever comes after.
    assert office.attempt(begun).then is Then.RETURN
    assert begun.happened().count("step.lost a") == 2


def test_what_a_lost_step_says_is_not_recorded(office: Office, types: Types) -> None:
    def cancelled(params: Given, attempt: Attempt) -> JsonValue:
        office.record.cancel(attempt.run_id, "ann")
        return 1

    types(cancelled=cancelled)
    run = office.begin({"a": {"type": "cancelled"}})
    assert office.attempt(run).then is Then.DROP
    assert run.happened()[-1] == "run.ended"


def test_holds_know_only_what_they_hold() -> None:
    holds, held = Holds(), Held("r", "s", "t")
    holds.lose([held])
    holds.release(held)
    holds.drop(held)
    assert holds.take_released() == []
    hold = holds.add(held)
    hold.claimed = True
    holds.lose([held])
    stopped: list[str] = []
    holds.stoppable(hold, lambda: stopped.append("stopped"))
    holds.stoppable(hold, None)
    assert stopped == ["stopped"]
    holds.put_back([held])
    assert holds.take_released() == [held]


# The choke point.


def test_what_no_rule_allows_does_not_happen(office: Office) -> None:
    office.executor.policy = Policy.of({"allow": ["model:*"]})
    office.actors.on("git.log", 1)
    state = office.play({"a": {**TOOL, "retry": {"max_attempts": 3}}})
    assert office.actors.done == []
    assert state.status is RunStatus.POLICY_BLOCKED
    assert "nothing allows tool 'git.log'" in (state.reason or "")


def test_every_decision_is_an_event_with_its_rule(office: Office) -> None:
    office.actors.on("git.log", 1)
    run = office.begin({"a": TOOL})
    office.attempt(run)
    [decided] = [event for event in office.record.events(run.run_id) if isinstance(event, ActDecided)]
    assert (decided.effect, decided.rule, decided.target) == ("allow", "allow[0] tool:*", "git.log")
    assert (decided.digest, decided.attempt) == (LOG.digest, 1)


def asking(office: Office) -> ByHand:
    office.executor.policy = Policy.of({"ask": ["tool:*"]})
    office.actors.on("git.log", 1)
    run = office.begin({"a": TOOL})
    assert office.attempt(run).then is Then.WAIT
    assert office.actors.done == []
    return run


def test_an_act_that_a_person_must_allow_waits_and_happens_after_a_yes(office: Office) -> None:
    run = asking(office)
    waiting = office.record.events(run.run_id)[-2]
    assert isinstance(waiting, StepWaiting)
    assert (waiting.kind, waiting.act) == ("ask", LOG.model_dump(mode="json"))
    assert waiting.message.startswith("tool git.log: ")
    sends = office.record.decide(run.run_id, "a", Verdict(True, "ann"))
    assert sends == (Resend(run.run_id, "a", "signature of a"),)
    assert office.attempt(run).then is Then.PASS
    state = office.record.state(run.run_id)
    assert (state.status, state.step("a").attempt) == (RunStatus.COMPLETED, 1)
    assert [done.act for done in office.actors.done] == [LOG]


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Verdict(False, "bob", "not today"), "bob refused git.log: not today"),
        (Verdict(False, ""), "a person refused git.log"),
    ],
)
def test_an_act_that_a_person_refused_does_not_happen(office: Office, verdict: Verdict, said: str) -> None:
    run = asking(office)
    office.record.decide(run.run_id, "a", verdict)
    office.attempt(run)
    state = office.record.state(run.run_id)
    assert (state.status, state.reason, office.actors.done) == (RunStatus.POLICY_BLOCKED, said, [])


def test_an_act_about_which_nobody_decided_in_time_does_not_happen(office: Office) -> None:
    run = asking(office)
    state = json.loads(office.record._redis.hget(_steps(run), "a") or "")
    office.record._redis.zadd(_steps(run).partition(":steps")[0] + ":timers", {f"{run.run_id} a": 0})
    assert state["p"] == "ask"
    assert run.sweep() == [Resend(run.run_id, "a", "signature of a")]
    office.attempt(run)
    assert office.record.state(run.run_id).reason == "nobody decided about git.log in time"


def _steps(run: ByHand) -> str:
    from ferrum.record import base_of

    return f"{base_of(run.run_id)}:steps:{run.run_id}"


def test_a_yes_to_one_act_is_not_a_yes_to_another(office: Office, types: Types) -> None:
    numbers = iter(range(9))

    async def changing(params: Given, attempt: Attempt) -> JsonValue:
        call = ToolCall(server="git", tool="log", arguments={"number": next(numbers)})
        return (await attempt.perform(call)).output

    types(changing=changing)
    office.executor.policy = Policy.of({"ask": ["tool:*"]})
    run = office.begin({"a": {"type": "changing"}})
    for _ in range(2):
        assert office.attempt(run).then is Then.WAIT
        office.record.decide(run.run_id, "a", Verdict(True, "ann"))
    assert office.actors.done == []


def test_an_approval_waits_for_its_answer_and_leaves_it_as_its_output(office: Office) -> None:
    run = office.begin({"a": {"type": "approval", "message": "Go on?", "timeout": "1h"}})
    assert office.attempt(run).then is Then.WAIT
    waiting = office.record.events(run.run_id)[-2]
    assert isinstance(waiting, StepWaiting)
    assert (waiting.kind, waiting.message, waiting.wakes_in) == ("approval", "Go on?", 3600)
    office.record.decide(run.run_id, "a", Verdict(True, "ann", "fine"))
    office.attempt(run)
    assert office.record.state(run.run_id).step_outputs["a"] == '{"v":{"approved":true,"by":"ann","note":"fine"}}'


# Usage.


def test_the_usage_of_all_acts_of_an_attempt_adds_up(office: Office, types: Types) -> None:
    async def several(params: Given, attempt: Attempt) -> JsonValue:
        for _ in range(3):
            await attempt.perform(ASK)
            await attempt.perform(LOG)
        return None

    types(several=several)
    office.actors.on(MODEL, "x").on("git.log", 1)
    run = office.begin({"a": {"type": "several"}}, limits=Limits(total_tokens=45, tool_calls=3))
    office.attempt(run)
    state = office.record.state(run.run_id)
    assert (state.status, state.reason) == (RunStatus.COMPLETED, None)
    assert state.usage == Usage(input_tokens=30, output_tokens=15, model_calls=3, tool_calls=3)
    assert state.step("a").usage == state.usage


def test_an_act_that_would_pass_a_limit_does_not_happen_and_ends_the_run(office: Office, types: Types) -> None:
    types(model=model)
    office.actors.on(MODEL, "x")
    run = office.begin({"a": {"type": "model"}}, limits=Limits(total_tokens=14))
    assert office.attempt(run).then is Then.DROP
    assert office.executor.holds.current() == []
    assert office.actors.done == []
    state = office.record.state(run.run_id)
    assert (state.status, state.reason) == (RunStatus.BUDGET_KILLED, "budget.total_tokens is used up")


def test_a_tool_call_counts_whatever_comes_of_it_and_a_model_call_that_failed_does_not(
    office: Office, types: Types
) -> None:
    types(model=model)
    office.actors.on("git.log", ToolError("no")).on(MODEL, ModelError("no"))
    state = office.play({"a": TOOL, "b": {"type": "model"}})
    assert state.step("a").usage == Usage(tool_calls=1)
    assert state.step("b").usage == Usage()


def test_usage_counts_once_when_an_attempt_is_stopped_while_an_act_is_admitted(
    office: Office, types: Types, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def two(params: Given, attempt: Attempt) -> JsonValue:
        await attempt.perform(ASK)
        await attempt.perform(ASK)
        return None

    types(two=two)
    office.actors.on(MODEL, "x")
    run = office.begin({"a": {"type": "two"}})
    real, stopping = office.record.admit, threading.Event()

    def admit(held: Held, act: int, *data: Any, **usage: Any) -> None:
        real(held, act, *data, **usage)
        if act == 2:
            threading.Thread(target=lambda: (office.executor.holds.stop_all(), stopping.set())).start()
            assert stopping.wait(PATIENCE_S)
            time.sleep(0.02)

    monkeypatch.setattr(office.record, "admit", admit)
    assert office.attempt(run).then is Then.RETURN
    assert office.record.state(run.run_id).usage == office.actors.costs


# Plans.


def test_a_plan_is_read_once_and_not_kept_for_ever(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrum.executor._PLANS_KEPT", 1)
    first, second = office.begin({"a": TOOL}), office.begin({"a": TOOL})
    plan = office.executor.plan(first.run_id, first.new.plan)
    assert office.executor.plan(first.run_id, first.new.plan) is plan
    office.executor.plan(second.run_id, second.new.plan)
    assert list(office.executor._plans) == [second.new.plan]


def test_a_plan_that_another_thread_compiled_meanwhile_is_used(office: Office) -> None:
    run = office.begin({"a": TOOL})

    class Late:
        """A lock that is free only after someone else had it."""

        def __enter__(self) -> None:
            office.executor._plans[run.new.plan] = run.plan

        def __exit__(self, *_: object) -> None:
            pass

    office.executor._compiling = Late()  # type: ignore[assignment]
    assert office.executor.plan(run.run_id, run.new.plan) is run.plan


def test_an_attempt_leaves_no_timer_behind(office: Office, types: Types) -> None:
    types(quick=lambda params, attempt: 1)
    office.play({"a": {"type": "quick", "timeout": "60s"}})
    eventually(lambda: not [one for one in threading.enumerate() if isinstance(one, threading.Timer)])

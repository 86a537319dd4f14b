"""The run record: what each script promises, on a real Redis and without workers."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from by_hand import ByHand
from fleet import eventually
from hypothesis import HealthCheck, given, settings
from test_budget import cases, examples, rule

from ferrum.errors import Conflict, NotFound, Unavailable
from ferrum.governance.budget import Limits, ceilings
from ferrum.local.redis import PrivateRedis
from ferrum.record import (
    LANES,
    MAX_LOST,
    POISON,
    Claimed,
    Created,
    Dropped,
    Ended,
    Frames,
    Held,
    Lost,
    Need,
    Over,
    Passed,
    Record,
    Resend,
    Verdict,
    base_of,
    follow,
    new_run_id,
)
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.workflow import Workflow

CHAIN = {"a": [], "b": ["a"], "c": ["b"]}
DIAMOND = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}
#: `c` begins a segment: no canvas can express this.
CROSS: dict[str, list[str]] = {"a": [], "b": [], "c": ["a", "b"], "d": ["b"]}

YES = Verdict(True, "ann", "fine")
NO_USAGE = Usage()


@pytest.fixture(scope="module")
def record(redis_url: str) -> Iterator[Record]:
    record = Record(redis_url)
    yield record
    record.close_connections()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def lose_an_answer(monkeypatch: pytest.MonkeyPatch, record: Record) -> Callable[[], None]:
    """From here on, the next thing that is asked is done, but its answer does not arrive."""

    def once(real: Callable[..., Any]) -> Callable[..., Any]:
        def lossy(*args: Any, **options: Any) -> Any:
            answer = real(*args, **options)
            if not lost:
                lost.append(answer)
                raise redis.exceptions.ConnectionError("the answer was lost")
            return answer

        return lossy

    lost: list[Any] = []

    def arm() -> None:
        monkeypatch.setattr(record._redis, "evalsha", once(record._redis.evalsha))
        monkeypatch.setattr("redis.client.Pipeline.execute", once(redis.client.Pipeline.execute))
        monkeypatch.setattr(time, "sleep", lambda _: None)

    return arm


def admit(
    run: ByHand, step: str, act: int = 1, *, allowed: bool = True, wanted: Usage = NO_USAGE, spent: Usage = NO_USAGE
) -> None:
    data = {
        "kind": "tool", "target": "s.t", "effect": "allow", "rule": "r", "reason": "", "digest": "d", "attempt": 1,
    }  # fmt: skip
    run.record.admit(run.held[step], act, data, allowed=allowed, wanted=wanted, spent=spent)


def alone(ended: object) -> list[str]:
    """What must be sent without a canvas."""
    assert isinstance(ended, Ended)
    return [one.step_id for one in ended.sends if one.signature == ""]


def heads(ended: object) -> list[str]:
    """What must be sent with the segment that it begins."""
    assert isinstance(ended, Ended)
    return [one.step_id for one in ended.sends if one.signature == "head"]


# Ids.


def test_a_run_id_says_its_partition_and_runs_of_one_key_share_theirs() -> None:
    assert len({base_of(new_run_id("some key")) for _ in range(20)}) == 1
    assert len({base_of(new_run_id()) for _ in range(200)}) > 8


def test_no_two_runs_have_one_id_however_quickly_they_are_begun() -> None:
    assert len({new_run_id("some key") for _ in range(2000)}) == 2000


@pytest.mark.parametrize("wrong", ["", "run_", "run_" + "0" * 25 + "U", "xyz_" + "0" * 26, "run_" + "0" * 27])
def test_what_cannot_be_a_run_id_is_not_found(wrong: str) -> None:
    with pytest.raises(NotFound, match="is not a run's id"):
        base_of(wrong)


# Beginning.


def test_a_new_run_is_queued_and_can_be_seen(record: Record) -> None:
    run = ByHand(record, CHAIN)
    assert record.status(run.run_id) is RunStatus.QUEUED
    assert record.plan_digest(run.run_id) == run.new.plan
    assert record.plan_document(run.run_id, run.new.plan) == run.plan.document
    assert record.input(run.run_id) == '{"v":{}}'
    assert record.runs(limit=1)[0].run_id == run.run_id
    assert record.any_live()


def test_a_run_is_live_until_it_ends(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN)
    live = f"{base_of(run.run_id)}:live"
    assert client.sismember(live, run.run_id)
    record.cancel(run.run_id, "ann")
    assert not client.sismember(live, run.run_id)


def test_one_key_starts_one_run(record: Record) -> None:
    key = uuid.uuid4().hex
    first = ByHand(record, CHAIN, key=key)
    second = ByHand(record, CHAIN, key=key)
    assert second.new.run_id != first.run_id
    assert second.run_id == first.run_id


def test_a_run_is_begun_once_although_the_answer_was_lost(record: Record, lose_an_answer: Callable[[], None]) -> None:
    run = ByHand(record, CHAIN)
    lose_an_answer()
    assert record.create(run.new) == Created(run.run_id, 4)
    assert run.happened() == ["run.created"]


def test_a_plan_is_stored_although_the_answer_was_lost(record: Record, lose_an_answer: Callable[[], None]) -> None:
    lose_an_answer()
    run = ByHand(record, CHAIN)
    assert record.plan_document(run.run_id, run.new.plan) == run.plan.document


def test_a_plan_is_kept_while_a_live_run_follows_it(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN)
    plan_key = f"{base_of(run.run_id)}:plan:{run.new.plan}"
    assert client.ttl(plan_key) == -1
    record.cancel(run.run_id, "ann")
    assert 0 < client.ttl(plan_key) <= 60


def test_ids_made_in_the_same_millisecond_are_different() -> None:
    assert len({new_run_id("one key") for _ in range(20_000)}) == 20_000


def test_two_runs_of_one_plan_hold_it_together(record: Record, client: redis.Redis) -> None:
    key = uuid.uuid4().hex
    first = ByHand(record, CHAIN, key=key)
    second = record.create(replace(first.new, run_id=new_run_id(key), key=None)).run_id
    plan_key = f"{base_of(first.run_id)}:plan:{first.new.plan}"
    record.cancel(first.run_id, "ann")
    assert client.ttl(plan_key) == -1
    record.cancel(second, "ann")
    assert client.ttl(plan_key) > 0


def test_the_plan_of_a_run_that_is_gone_is_not_found(record: Record) -> None:
    with pytest.raises(NotFound, match="no longer kept"):
        record.plan_document(new_run_id(), "0" * 64)


# Claiming.


def test_a_claim_hands_out_the_input_and_what_the_needs_left_behind(record: Record) -> None:
    run = ByHand(record, DIAMOND)
    assert run.begin("a").input == '{"v":{}}'
    run.finish("a", output='{"v":"from a"}')
    claimed = run.begin("b")
    assert claimed.needs == {"a": Need(StepStatus.COMPLETED, '{"v":"from a"}')}
    assert (claimed.attempt, claimed.failed_tries, claimed.plan) == (1, 0, run.new.plan)
    assert (claimed.verdict, claimed.bound, claimed.grants) == (None, "", frozenset())
    assert run.happened() == ["run.created", "run.started", "step.started a", "step.completed a", "step.started b"]


def test_a_step_is_never_claimed_before_what_it_needs_has_ended(record: Record) -> None:
    run = ByHand(record, DIAMOND)
    assert run.claim("d") == Dropped("what it needs has not ended")
    run.do("a", "b")
    assert run.claim("d") == Dropped("what it needs has not ended")
    run.do("c")
    assert isinstance(run.claim("d"), Claimed)


def test_of_two_copies_of_a_message_one_gets_the_step(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    assert run.claim("a") == Dropped("it is running")


def test_a_claim_may_be_repeated(record: Record, lose_an_answer: Callable[[], None]) -> None:
    run = ByHand(record, CHAIN)
    lose_an_answer()
    claimed = run.begin("a")
    assert claimed.attempt == 1
    assert run.happened() == ["run.created", "run.started", "step.started a"]


def test_a_copy_of_an_ended_step_passes_as_long_as_its_canvas_may_be_needed(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.do("a")
    assert record.claim(run.copy("a"), "w", 60) == Passed()
    run.do("b")
    assert record.claim(run.copy("a"), "w", 60) == Dropped("it ended before")


def test_a_step_that_waits_is_not_claimed(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a")
    assert run.claim("a") == Dropped("it is waiting")


def test_a_step_that_is_not_of_the_plan_is_not_claimed(record: Record) -> None:
    run = ByHand(record, CHAIN)
    assert run.claim("nobody") == Dropped("its run has no such step")


def test_nothing_of_an_ended_run_is_claimed(record: Record) -> None:
    run = ByHand(record, CHAIN)
    record.cancel(run.run_id, "ann")
    assert run.claim("a") == Dropped("its run has ended")
    assert record.claim(Held(new_run_id(), "a", "t"), "w", 60) == Dropped("its run has ended")


def test_a_running_step_whose_lease_is_not_there_is_claimed_anew(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    client.delete(f"{base_of(run.run_id)}:leases")
    assert run.begin("a").attempt == 2


# Skipping.


def test_a_step_whose_need_failed_is_skipped_and_so_is_what_depends_on_that(record: Record) -> None:
    run = ByHand(record, {**CHAIN, "d": ["c"]})
    run.begin("a")
    run.finish("a", StepStatus.FAILED)
    assert run.claim("b") == Ended()
    assert run.claim("c") == Ended()
    assert run.claim("d") == Ended()
    state = record.state(run.run_id)
    assert {step: (state.step(step).status, state.step(step).error) for step in "bcd"} == dict.fromkeys(
        "bcd", (StepStatus.SKIPPED, "'a' failed")
    )
    assert (state.status, state.reason) == (RunStatus.FAILED, "'a' failed")


def test_a_step_skipped_by_its_own_condition_does_not_stop_what_depends_on_it_and_on_others(record: Record) -> None:
    run = ByHand(record, DIAMOND)
    run.do("a", "b")
    run.begin("c")
    run.finish("c", StepStatus.SKIPPED)
    claimed = run.begin("d")
    assert claimed.needs["c"] == Need(StepStatus.SKIPPED, "")
    run.finish("d")
    assert record.status(run.run_id) is RunStatus.COMPLETED


def test_a_step_all_of_whose_needs_were_skipped_is_skipped(record: Record) -> None:
    run = ByHand(record, DIAMOND)
    run.do("a")
    for step in "bc":
        run.begin(step)
        run.finish(step, StepStatus.SKIPPED)
    run.claim("d")
    state = record.state(run.run_id)
    assert state.step("d").error == "all that it needs was skipped"
    assert state.status is RunStatus.COMPLETED


def test_a_failure_goes_on_through_a_skipped_step_beside_a_completed_one(record: Record) -> None:
    run = ByHand(record, {"a": [], "b": ["a"], "ok": [], "end": ["b", "ok"]})
    run.begin("a")
    run.finish("a", StepStatus.FAILED)
    run.claim("b")
    run.do("ok")
    run.claim("end")
    assert record.state(run.run_id).step("end").error == "'a' failed"


def test_a_claim_that_skipped_may_be_repeated(record: Record, lose_an_answer: Callable[[], None]) -> None:
    run = ByHand(record, {**CROSS, "e": ["c"], "f": ["c", "d"]})
    run.begin("a")
    run.finish("a", StepStatus.FAILED)
    run.do("b", "d")
    lose_an_answer()
    assert "f" in heads(run.claim("c"))
    assert run.happened().count("step.skipped c") == 1


def test_the_last_claim_that_skipped_may_be_repeated(record: Record, lose_an_answer: Callable[[], None]) -> None:
    run = ByHand(record, {"a": [], "b": ["a"]})
    run.begin("a")
    run.finish("a", StepStatus.FAILED)
    lose_an_answer()
    assert run.claim("b") == Ended()
    assert record.status(run.run_id) is RunStatus.FAILED


# Finishing.


def test_a_finish_says_which_segments_begin_and_leaves_the_rest_to_the_canvas(record: Record) -> None:
    run = ByHand(record, CROSS)
    assert run.do("a") == Ended()
    assert run.do("b") == Ended((Resend(run.run_id, "c", "head"),))
    run = ByHand(record, DIAMOND)
    assert run.do("a", "b", "c") == Ended()


def test_a_segment_with_several_heads_is_named_by_one_of_them(record: Record) -> None:
    run = ByHand(record, {"a": [], **dict.fromkeys("bcde", ("a",)), "f": ["b", "c"], "g": ["d", "e"]})
    assert run.plan.segment_of["b"].heads == ("b", "c")
    assert heads(run.do("a")) == ["b", "d"]


def test_a_finish_may_be_repeated(record: Record) -> None:
    run = ByHand(record, CROSS)
    run.do("a")
    run.begin("b")
    first = run.finish("b")
    assert run.finish("b") == first
    assert run.happened().count("step.completed b") == 1


def test_the_last_finish_may_be_repeated(record: Record) -> None:
    run = ByHand(record, {"a": []})
    run.begin("a")
    assert run.finish("a") == Ended()
    assert run.finish("a") == Ended()
    assert run.happened()[-2:] == ["step.completed a", "run.ended"]


def test_the_last_finish_of_a_run_with_outputs_asks_to_close_it_each_time(record: Record) -> None:
    run = ByHand(record, {"a": []}, outputs={"x": "{{ a }}"})
    run.begin("a")
    assert run.finish("a").close
    assert run.finish("a").close
    assert run.claim("a") == Ended(close=True)
    record.close(run.run_id, RunStatus.COMPLETED, outputs='{"v":{"x":1}}')
    record.close(run.run_id, RunStatus.FAILED, reason="too late")
    state = record.state(run.run_id)
    assert (state.status, state.outputs, state.reason) == (RunStatus.COMPLETED, '{"v":{"x":1}}', None)


def test_a_run_is_not_closed_before_its_steps_have_ended(record: Record) -> None:
    run = ByHand(record, CHAIN)
    record.close(run.run_id, RunStatus.COMPLETED)
    assert record.status(run.run_id) is RunStatus.QUEUED


def test_a_run_ends_as_its_first_failure_says(record: Record) -> None:
    run = ByHand(record, {"a": [], "b": []})
    run.begin("b")
    run.finish("b", StepStatus.FAILED)
    run.begin("a")
    run.finish("a", StepStatus.FAILED)
    assert record.state(run.run_id).reason == "'b' failed"


def test_a_run_one_of_whose_acts_was_denied_is_policy_blocked(record: Record) -> None:
    run = ByHand(record, {"a": []})
    run.begin("a")
    run.finish("a", StepStatus.FAILED, denied="not that")
    state = record.state(run.run_id)
    assert (state.status, state.reason) == (RunStatus.POLICY_BLOCKED, "not that")


def test_outputs_of_steps_are_read_back(record: Record, lose_an_answer: Callable[[], None]) -> None:
    run = ByHand(record, {"a": [], "b": [], "c": []})
    run.do("a")
    run.begin("b")
    run.finish("b", StepStatus.SKIPPED)
    lose_an_answer()
    assert record.step_outputs(run.run_id, ["a", "b", "c"]) == {
        "a": Need(StepStatus.COMPLETED, '{"v":1}'),
        "b": Need(StepStatus.SKIPPED, ""),
    }
    assert record.step_outputs(run.run_id, []) == {}


# Stale tokens.


def test_whatever_is_said_with_a_token_that_is_no_longer_current_is_refused(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a", lease_s=0)
    assert run.sweep() == [Resend(run.run_id, "a", "")]
    for _ in range(2):
        with pytest.raises(Lost):
            run.finish("a")
        with pytest.raises(Lost):
            run.park("a")
        with pytest.raises(Lost):
            admit(run, "a")
        with pytest.raises(Lost):
            record.hand_back(run.held["a"], "w", 1, NO_USAGE)
        record.claim(run.copy("a"), "other", 60)


def test_a_step_that_left_its_worker_is_not_finished_parked_again_or_given_back_by_it(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a")
    with pytest.raises(Lost):
        run.finish("a")
    with pytest.raises(Lost):
        record.hand_back(run.held["a"], "w", 1, NO_USAGE)
    record.decide(run.run_id, "a", YES)
    with pytest.raises(Lost):
        run.park("a")
    with pytest.raises(Lost):
        run.finish("a")


def test_nothing_is_recorded_for_a_run_that_was_cancelled_meanwhile(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    record.cancel(run.run_id, "ann", "enough")
    for say in (
        lambda: run.finish("a"),
        lambda: run.park("a"),
        lambda: admit(run, "a"),
        lambda: record.hand_back(run.held["a"], "w", 1, NO_USAGE),
    ):
        with pytest.raises(Lost):
            say()
    assert run.happened()[-1] == "run.ended"
    state = record.state(run.run_id)
    assert (state.status, state.reason) == (RunStatus.CANCELLED, "enough")


# Waiting.


def test_a_park_may_be_repeated(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a", usage=Usage(tool_calls=1))
    run.park("a", usage=Usage(tool_calls=1))
    assert record.state(run.run_id).usage == Usage(tool_calls=1)
    assert run.happened().count("step.waiting a") == 1


def test_a_decision_gives_back_the_signature_that_the_step_was_parked_with(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a")
    assert record.decide(run.run_id, "a", YES) == (Resend(run.run_id, "a", "its signature"),)
    claimed = run.begin("a")
    assert claimed.verdict == YES
    assert claimed.attempt == 1


def test_a_second_decision_is_refused_and_says_who_made_the_first(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a")
    record.decide(run.run_id, "a", Verdict(False, "bob"))
    with pytest.raises(Conflict, match=r"'a' of run '.*' was rejected by bob; a decision is final"):
        record.decide(run.run_id, "a", YES)
    run.begin("a")
    with pytest.raises(Conflict, match="was rejected by bob"):
        record.decide(run.run_id, "a", YES)


def test_of_many_decisions_at_the_same_moment_one_counts(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a")
    gate, refused, counted = threading.Barrier(8), [], []

    def decide(number: int) -> None:
        gate.wait()
        try:
            counted.append(record.decide(run.run_id, "a", Verdict(bool(number % 2), f"p{number}")))
        except Conflict as error:
            refused.append(error)

    threads = [threading.Thread(target=decide, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(counted), len(refused)) == (1, 7)
    assert run.happened().count("approval.decided a") == 1


def test_a_decision_whose_answer_was_lost_is_not_taken_for_a_second_one(
    record: Record, lose_an_answer: Callable[[], None]
) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a")
    lose_an_answer()
    assert record.decide(run.run_id, "a", YES) == (Resend(run.run_id, "a", ""),)
    # Its signature is gone with the answer, so that its canvas goes no further.
    assert alone(run.do("a")) == ["b"]


def test_a_decision_that_was_lost_and_acted_on_meanwhile_is_known_again(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a")
    with pytest.raises(NotFound):
        record.decide(new_run_id(), "a", YES)  # From here on Redis knows the script.
    at_once = record._redis.evalsha

    def claimed_before_the_answer(*args: Any) -> Any:
        record._redis.evalsha = at_once  # type: ignore[method-assign]
        at_once(*args)
        run.begin("a")
        return at_once(*args)

    record._redis.evalsha = claimed_before_the_answer  # type: ignore[method-assign]
    assert record.decide(run.run_id, "a", YES) == ()


def test_what_waits_for_no_decision_cannot_be_decided(record: Record) -> None:
    run = ByHand(record, CHAIN)
    with pytest.raises(NotFound, match="there is no run"):
        record.decide(new_run_id(), "a", YES)
    with pytest.raises(NotFound, match="has no step 'x'"):
        record.decide(run.run_id, "x", YES)
    with pytest.raises(Conflict, match=r"'a' of run '.*' waits for no decision: it is pending"):
        record.decide(run.run_id, "a", YES)
    run.begin("a")
    run.park("a", "retry", wake_in_s=60)
    with pytest.raises(Conflict, match="it is waiting"):
        record.decide(run.run_id, "a", YES)
    record.cancel(run.run_id, "ann")
    with pytest.raises(Conflict, match=r"'a' of run '.*' waits for no decision: the run is cancelled"):
        record.decide(run.run_id, "a", YES)
    with pytest.raises(NotFound, match="has no step 'x'"):
        record.decide(run.run_id, "x", YES)


def test_a_yes_is_bound_to_the_act_that_was_asked_about(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a", "ask", bound="digest-1")
    record.decide(run.run_id, "a", YES)
    assert run.begin("a").grants == {"digest-1"}
    run.park("a", "ask", bound="digest-2")
    record.decide(run.run_id, "a", YES)
    assert run.begin("a").grants == {"digest-1", "digest-2"}
    run.park("a", "ask", bound="digest-3")
    record.decide(run.run_id, "a", Verdict(False, "bob"))
    claimed = run.begin("a")
    assert (claimed.grants, claimed.bound, claimed.verdict) == (
        {"digest-1", "digest-2"}, "digest-3", Verdict(False, "bob"),
    )  # fmt: skip


def test_a_decision_answers_one_question_and_not_the_next(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a", "ask", bound="digest")
    record.decide(run.run_id, "a", YES)
    assert run.begin("a").verdict == YES
    run.park("a", "retry")
    record.nudge(run.run_id)
    claimed = run.begin("a")
    assert (claimed.verdict, claimed.bound, claimed.grants) == (None, "", {"digest"})


def test_what_nobody_decided_in_time_expires(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a", wake_in_s=0)
    assert run.sweep() == [Resend(run.run_id, "a", "its signature")]
    assert run.begin("a").verdict == Verdict(False, "", expired=True)
    with pytest.raises(Conflict, match="was not decided in time"):
        record.decide(run.run_id, "a", YES)
    assert run.sweep() == []


def test_a_retry_waits_for_its_time_and_counts_as_a_try_that_failed(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a", "retry", wake_in_s=60)
    assert run.sweep() == []
    assert record.nudge(run.run_id) == (Resend(run.run_id, "a", "its signature"),)
    claimed = run.begin("a")
    assert (claimed.attempt, claimed.failed_tries) == (2, 1)


def test_a_timer_of_a_step_that_no_longer_waits_wakes_nobody(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN)
    timers = f"{base_of(run.run_id)}:timers"
    run.begin("a")
    run.park("a", wake_in_s=60)
    record.decide(run.run_id, "a", YES)
    assert client.zscore(timers, f"{run.run_id} a") is None
    client.zadd(timers, {f"{run.run_id} a": 0})
    assert run.sweep() == []
    run.begin("a")
    run.park("a", wake_in_s=0)
    record.cancel(run.run_id, "ann")
    assert run.sweep() == []


def test_what_waits_for_a_person_is_listed_oldest_first_until_it_is_answered(record: Record) -> None:
    run = ByHand(record, {"a": [], "b": []})
    other = ByHand(record, {"a": []})
    for one, step in ((run, "b"), (run, "a"), (other, "a")):
        one.begin(step)
        one.park(step)
        time.sleep(0.002)

    def asked() -> list[tuple[str, str]]:
        return [(one.run_id, one.step_id) for one in record.asked() if one.run_id in (run.run_id, other.run_id)]

    assert asked() == [(run.run_id, "b"), (run.run_id, "a"), (other.run_id, "a")]
    record.decide(run.run_id, "b", YES)
    record.cancel(other.run_id, "ann")
    assert asked() == [(run.run_id, "a")]
    record.cancel(run.run_id, "ann")


# What a run waits for.


def test_a_run_waits_when_only_people_are_waited_for_and_resumes_when_one_answers(record: Record) -> None:
    run = ByHand(record, {"a": [], "b": [], "c": ["b"]})
    run.begin("a")
    run.park("a")
    assert record.status(run.run_id) is RunStatus.RUNNING
    run.do("b", "c")
    assert record.status(run.run_id) is RunStatus.WAITING_APPROVAL
    record.decide(run.run_id, "a", YES)
    assert record.status(run.run_id) is RunStatus.RUNNING
    run.do("a")
    assert [name for name in run.happened() if name.startswith("run.")] == [
        "run.created", "run.started", "run.waiting", "run.resumed", "run.ended",
    ]  # fmt: skip


def test_a_run_that_begins_with_an_approval_waits_and_resumes(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a")
    assert record.status(run.run_id) is RunStatus.WAITING_APPROVAL
    record.decide(run.run_id, "a", YES)
    run.do("a", "b", "c")
    assert record.status(run.run_id) is RunStatus.COMPLETED


def test_a_run_that_waits_for_a_retry_does_not_wait_for_a_person(record: Record) -> None:
    run = ByHand(record, {"a": [], "b": []})
    for step, kind in (("a", "approval"), ("b", "retry")):
        run.begin(step)
        run.park(step, kind)
    assert record.status(run.run_id) is RunStatus.RUNNING


def test_active_and_asking_add_up_to_nothing_when_every_step_has_ended(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, {**DIAMOND, "e": ["a"], "f": ["e"]})
    run.begin("a")
    run.park("a")
    record.decide(run.run_id, "a", YES)
    run.do("a", "b")
    run.begin("c", lease_s=0)
    run.sweep()
    run.do("c", "d")
    run.begin("e")
    record.hand_back(run.held["e"], "w", 1, NO_USAGE)
    run.begin("e")
    run.finish("e", StepStatus.FAILED)
    run.claim("f")
    assert client.hmget(f"{base_of(run.run_id)}:run:{run.run_id}", "active", "asking", "left") == ["0", "0", "0"]


# Frames.


def fan_out(record: Record, **frames: Any) -> tuple[ByHand, tuple[Resend, ...]]:
    """A run whose step `a` has begun to wait for frames of one step each, and what that sent."""
    workflow = Workflow.of({"name": "x", "steps": {"a": {"type": "task", "task": "t", "for_each": [1]}}})
    run = ByHand(record, workflow)
    run.begin("a")
    record.spread(run.held["a"], [(f"a.{number}", f'{{"v":{number}}}') for number in range(frames["total"])])
    return run, run.park("a", "children", frames=Frames(None, **frames)).sends


def began(ended: Ended | tuple[Resend, ...]) -> list[str]:
    return [one.step_id for one in (ended.sends if isinstance(ended, Ended) else ended)]


def test_so_many_frames_begin_as_there_may_be_at_a_time_and_another_when_one_ends(record: Record) -> None:
    run, sends = fan_out(record, total=4, window=2)
    assert began(sends) == ["a.0", "a.1"]
    assert run.claim("a.2") == Dropped("it was not begun")
    assert began(run.do("a.1")) == ["a.2"]
    assert began(run.do("a.0")) == ["a.3"]
    assert run.do("a.3") == Ended()
    assert run.do("a.2").sends == (Resend(run.run_id, "a", "its signature"),)
    run.do("a")
    assert record.status(run.run_id) is RunStatus.COMPLETED


def test_frames_begin_together_once_there_is_room_for_so_many(record: Record) -> None:
    run, sends = fan_out(record, total=7, window=4, chunk=2)
    assert began(sends) == ["a.0", "a.1", "a.2", "a.3"]
    assert began(run.do("a.0")) == []
    assert began(run.do("a.1")) == ["a.4", "a.5"]
    assert [began(run.do(step)) for step in ("a.2", "a.3")] == [[], ["a.6"]]
    assert [began(run.do(step)) for step in ("a.4", "a.5", "a.6")] == [[], [], ["a"]]


def test_a_frame_that_fails_ends_the_wait_once_and_no_other_begins(record: Record) -> None:
    run, _ = fan_out(record, total=5, window=3, fail_fast=True)
    run.begin("a.0")
    run.begin("a.1")
    run.finish("a.1", StepStatus.FAILED)
    assert run.claim("a.3") == Dropped("it was not begun")
    run.begin("a")
    # Its parts go on until it has ended, too.
    assert began(run.finish("a.0")) == []
    run.begin("a.2")
    run.finish("a", StepStatus.FAILED)
    with pytest.raises(Lost):
        run.finish("a.2")
    assert {step: one.status.value for step, one in record.state(run.run_id).steps.items()} == {
        "a": "failed", "a.0": "completed", "a.1": "failed", "a.2": "cancelled",
    }  # fmt: skip
    assert (began(run.sweep(resend_after_s=0)), record.renew([run.held["a.2"]], 60)) == ([], [run.held["a.2"]])


def test_what_frames_came_to_is_read_back(record: Record) -> None:
    run, _ = fan_out(record, total=3, window=3)
    run.do("a.0")
    run.begin("a.1")
    run.finish("a.1", StepStatus.FAILED, denied="not that")
    done, failed, waits = record.frame_ends(run.run_id, ["a.0", "a.1", "a.2"], [""])
    assert (done.over, done.ends) == (True, {"": Need(StepStatus.COMPLETED, '{"v":1}')})
    assert (failed.over, failed.failed, failed.error, failed.denied) == (True, "a.1", "no", "not that")
    assert (waits.over, waits.ends) == (False, {})


def test_an_item_is_what_its_frame_was_given(record: Record) -> None:
    each = {"type": "task", "task": "t", "input": {"x": "{{ item }}"}, "for_each": [1]}
    run = ByHand(record, Workflow.of({"name": "x", "steps": {"a": each}}))
    run.begin("a")
    for _ in range(2):
        record.spread(run.held["a"], [("a.0", '{"v":"first"}'), ("a.1", '{"v":"second"}')])
    run.park("a", "children", frames=Frames(None, 2, window=2))
    assert run.begin("a.1").needs["item"] == Need(StepStatus.COMPLETED, '{"v":"second"}')
    with pytest.raises(Lost):
        record.spread(run.held["a"], [("a.0", '{"v":"late"}')])
    assert run.begin("a.0").needs["item"].output == '{"v":"first"}'


def test_a_nudge_and_a_lost_message_reach_what_is_inside_of_a_step(record: Record) -> None:
    run, _ = fan_out(record, total=2, window=2)
    assert sorted(began(record.nudge(run.run_id))) == ["a.0", "a.1"]
    assert sorted(one.step_id for one in run.sweep(resend_after_s=0)) == ["a.0", "a.1"]
    run.begin("a.0", lease_s=0)
    assert [one.step_id for one in run.sweep()] == ["a.0"]
    run.begin("a.0")
    run.park("a.0", "retry", wake_in_s=60)
    assert sorted(began(record.nudge(run.run_id))) == ["a.0", "a.1"]
    run.do("a.0", "a.1")
    assert run.begin("a").attempt == 1


def test_a_step_inside_that_took_too_many_workers_with_it_fails_and_ends_the_wait(record: Record) -> None:
    run, _ = fan_out(record, total=1)
    sent: list[Resend] = []
    for _ in range(MAX_LOST):
        sent = run.lose("a.0")
    assert [(one.step_id, one.signature) for one in sent] == [("a", "its signature")]
    assert record.state(run.run_id).step("a.0").status is StepStatus.FAILED


def test_the_last_step_that_took_too_many_workers_with_it_closes_its_run(record: Record) -> None:
    step = {"type": "task", "task": "t", "on_error": "continue"}
    run = ByHand(record, Workflow.of({"name": "x", "steps": {"a": step}, "outputs": {"r": "{{ a }}"}}))
    for _ in range(MAX_LOST):
        sent = run.lose("a")
    assert sent == [Resend(run.run_id, "a", "")]
    assert run.claim("a") == Ended(close=True)


def test_a_run_inside_of_one_that_has_ended_is_not_begun(record: Record) -> None:
    run = ByHand(record, {"a": []})
    record.cancel(run.run_id, "ann")
    inside = replace(run.new, run_id=new_run_id(beside=run.run_id), parent=(run.run_id, "a"))
    with pytest.raises(Lost):
        record.create(inside)


def test_the_sweeper_knows_when_the_next_timer_is_due(record: Record, clean_redis: str) -> None:
    assert record.sweep({}, resend_after_s=60, reap=True).next_in_s is None
    run = ByHand(record, {"a": [], "b": []})
    for step, wake_in_s in (("a", 60), ("b", 9)):
        run.begin(step)
        run.park(step, wake_in_s=wake_in_s)
    due = record.sweep({}, resend_after_s=60, reap=True).next_in_s
    assert due is not None
    assert 0 < due <= 9


def test_a_question_of_a_run_that_is_gone_is_asked_no_more(record: Record, client: redis.Redis) -> None:
    gone = new_run_id()
    asks = f"{base_of(gone)}:asks"
    client.zadd(asks, {f"{gone} a": 1})
    assert gone not in [one.run_id for one in record.asked()]
    assert client.zscore(asks, f"{gone} a") is None


# Cancelling, nudging.


def test_a_run_is_cancelled_once(record: Record, lose_an_answer: Callable[[], None]) -> None:
    run = ByHand(record, CHAIN)
    lose_an_answer()
    record.cancel(run.run_id, "ann")
    with pytest.raises(Conflict, match="has ended: it is cancelled, and that does not change"):
        record.cancel(run.run_id, "bob")
    with pytest.raises(NotFound, match="there is no run"):
        record.cancel(new_run_id(), "ann")
    assert run.happened() == ["run.created", "run.ended"]


def test_a_nudge_wakes_retries_and_sends_what_is_ready_and_leaves_people_their_time(record: Record) -> None:
    run = ByHand(record, {"ask": [], "retry": [], "ready": [], "runs": [], "later": ["ask"]})
    run.begin("ask")
    run.park("ask")
    run.begin("retry")
    run.park("retry", "retry", wake_in_s=60)
    run.begin("runs")
    sent = record.nudge(run.run_id)
    assert sorted(sent, key=lambda one: one.step_id) == [
        Resend(run.run_id, "ready", ""), Resend(run.run_id, "retry", "its signature"),
    ]  # fmt: skip


def test_an_ended_run_is_not_nudged(record: Record) -> None:
    run = ByHand(record, {"a": []})
    run.do("a")
    with pytest.raises(Conflict, match="it is completed"):
        record.nudge(run.run_id)
    with pytest.raises(NotFound):
        record.nudge(new_run_id())


# Leases.


def test_a_renewed_lease_does_not_run_out_and_a_lost_one_is_reported(record: Record) -> None:
    runs = [ByHand(record, CHAIN) for _ in range(3)]
    for run in runs:
        run.begin("a", lease_s=0)
    first, second, third = (run.held["a"] for run in runs)
    record.cancel(third.run_id, "ann")
    stale = runs[0].copy("a")
    assert set(record.renew([first, second, third, stale], 60)) == {third, stale}
    assert runs[0].sweep() == []
    assert record.renew([], 60) == []


def test_a_released_claim_needs_no_repair(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a", lease_s=0)
    run.finish("a")
    record.release([run.held["a"]])
    assert run.sweep() == []


def test_a_step_whose_worker_died_is_sent_alone_and_its_successors_with_it(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a", lease_s=0)
    admit(run, "a", wanted=Usage(tool_calls=1))
    assert run.sweep(reap=False) == []
    assert run.sweep() == [Resend(run.run_id, "a", "")]
    assert "step.lost a" in run.happened()
    assert run.begin("a").attempt == 2
    assert alone(run.finish("a")) == ["b"]
    assert alone(run.do("b")) == ["c"]
    # What the dead worker had reserved counts as used.
    assert record.state(run.run_id).usage == Usage(tool_calls=1)


def test_when_a_branch_was_sent_alone_the_step_that_joins_is_too(record: Record) -> None:
    run = ByHand(record, DIAMOND)
    run.do("a")
    run.begin("b", lease_s=0)
    run.sweep()
    run.do("b")
    assert alone(run.do("c")) == ["d"]


def test_when_a_worker_died_after_its_finish_what_follows_is_sent(record: Record) -> None:
    run = ByHand(record, CROSS)
    run.do("a")
    run.begin("b", lease_s=0)
    run.finish("b")
    assert run.sweep() == [Resend(run.run_id, "c", "head"), Resend(run.run_id, "d", "")]


def test_when_a_worker_died_after_a_branch_its_join_does_not_wait_for_the_canvas(record: Record) -> None:
    run = ByHand(record, DIAMOND)
    run.do("a")
    run.begin("b", lease_s=0)
    run.finish("b")
    assert run.sweep() == []
    # The chord counts one branch too few, so the join must not wait for it.
    assert alone(run.do("c")) == ["d"]


def test_when_a_worker_died_between_a_finish_and_its_canvas_the_next_step_is_sent_alone(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a", lease_s=0)
    run.finish("a")
    assert run.sweep() == [Resend(run.run_id, "b", "")]


def test_when_a_worker_died_before_it_closed_the_run_the_last_step_is_sent_to_close_it(record: Record) -> None:
    run = ByHand(record, {"a": []}, outputs={"x": "{{ a }}"})
    run.begin("a", lease_s=0)
    assert run.finish("a").close
    assert run.sweep() == [Resend(run.run_id, "a", "")]
    assert run.claim("a") == Ended(close=True)


@pytest.mark.parametrize(("needs", "follows"), [(CHAIN, ("b", "")), (CROSS, ("c", "head"))])
def test_a_step_that_took_too_many_workers_with_it_fails(
    record: Record, needs: dict[str, list[str]], follows: tuple[str, str]
) -> None:
    run = ByHand(record, needs)
    if needs is CROSS:
        run.do("b", "d")
    for _ in range(MAX_LOST):
        sent = run.lose("a")
    step = record.state(run.run_id).step("a")
    assert (step.status, step.error) == (
        StepStatus.FAILED, f"its worker died {MAX_LOST} times while it ran, within an hour; it is not tried again",
    )  # fmt: skip
    assert sent == [Resend(run.run_id, *follows)]
    for rest in run.plan.steps:
        run.claim(rest)
    assert record.state(run.run_id).reason == "'a' failed"


def test_a_lease_of_an_ended_run_or_of_an_old_claim_is_dropped(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN)
    leases = f"{base_of(run.run_id)}:leases"
    run.begin("a")
    client.zadd(leases, {f"{run.run_id} a old-token": 0})
    assert run.sweep() == []
    assert client.zscore(leases, f"{run.run_id} a old-token") is None
    client.zadd(leases, {f"{run.run_id} a {run.held['a'].token}": 0})
    record.cancel(run.run_id, "ann")
    assert run.sweep() == []
    run = ByHand(record, CHAIN)
    run.begin("a")
    run.park("a")
    client.zadd(f"{base_of(run.run_id)}:leases", {f"{run.run_id} a {run.held['a'].token}": 0})
    assert run.sweep() == []


def test_a_stopping_worker_gives_a_step_back_once(record: Record) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    for _ in range(2):
        record.hand_back(run.held["a"], "w", 1, Usage(tool_calls=1))
    assert run.happened().count("step.lost a") == 1
    assert record.state(run.run_id).usage == Usage(tool_calls=1)
    assert run.begin("a").attempt == 2


# Lost messages.


def test_a_message_is_not_sent_again_while_it_may_still_be_on_its_way(record: Record) -> None:
    run = ByHand(record, CHAIN)
    assert run.sweep(empty=False, resend_after_s=0) == []
    assert run.sweep(empty=True, resend_after_s=60) == []


def test_a_message_is_sent_again_when_its_queue_is_empty(record: Record) -> None:
    run = ByHand(record, CHAIN)
    assert run.sweep(empty=True, resend_after_s=0) == [Resend(run.run_id, "a", "")]
    assert run.sweep(empty=True, resend_after_s=60) == []
    assert alone(run.do("a")) == ["b"]


def test_a_message_is_sent_again_when_younger_ones_of_its_queue_were_claimed(
    record: Record, client: redis.Redis
) -> None:
    run = ByHand(record, {"a": [], "b": []})
    ready = f"{base_of(run.run_id)}:ready:{run.queue}:4"
    client.zadd(ready, {f"{run.run_id} a": float(client.zscore(ready, f"{run.run_id} b")) - 2000})  # type: ignore[arg-type]
    assert run.sweep(empty=False, resend_after_s=0) == []
    run.begin("b")
    assert run.sweep(empty=False, resend_after_s=0) == [Resend(run.run_id, "a", "")]


@pytest.mark.parametrize("empty", [True, False])
def test_a_message_that_a_worker_has_only_just_taken_is_not_taken_for_lost(
    record: Record, client: redis.Redis, empty: bool
) -> None:
    run = ByHand(record, {"a": [], "b": []})
    base, lane = base_of(run.run_id), f"{run.queue}:4"
    client.zincrby(f"{base}:ready:{lane}", -200_000, f"{run.run_id} a")
    client.zincrby(f"{base}:ready:{lane}", -90_000, f"{run.run_id} b")
    assert run.sweep(empty=False) == []
    # Both were taken from the queue, and `b` was quicker.
    run.begin("b")
    client.hincrby(f"{base}:marks", f"{lane} t", -31_000)
    assert run.sweep(empty=empty) == []
    assert run.sweep(empty=empty) == []
    client.hincrby(f"{base}:marks", f"{lane} t", -31_000)
    assert run.sweep(empty=empty) == [Resend(run.run_id, "a", "")]


def test_a_step_that_is_no_longer_ready_is_not_sent_again(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN)
    run.begin("a")
    client.zadd(f"{base_of(run.run_id)}:ready:{run.queue}:4", {f"{run.run_id} a": 0})
    assert run.sweep(resend_after_s=0) == []
    assert not client.exists(f"{base_of(run.run_id)}:ready:{run.queue}:4")


def test_an_old_step_that_is_claimed_late_does_not_make_young_ones_look_lost(
    record: Record, client: redis.Redis
) -> None:
    run = ByHand(record, {"old": [], "young": [], "between": []})
    base = base_of(run.run_id)
    client.zincrby(f"{base}:ready:{run.queue}:4", -9000, f"{run.run_id} old")
    client.zincrby(f"{base}:ready:{run.queue}:4", -5000, f"{run.run_id} between")
    run.begin("young")
    mark = client.hget(f"{base}:marks", f"{run.queue}:4")
    run.begin("old")
    assert client.hget(f"{base}:marks", f"{run.queue}:4") == mark
    assert run.sweep(empty=False, resend_after_s=0) == [Resend(run.run_id, "between", "")]


def test_a_step_as_old_as_one_that_was_claimed_is_not_taken_for_lost(record: Record) -> None:
    run = ByHand(record, {"a": [], "b": []})
    run.begin("b")
    assert run.sweep(empty=False, resend_after_s=0) == []


def test_what_is_ready_in_a_run_that_ended_is_forgotten(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN)
    record.cancel(run.run_id, "ann")
    assert run.sweep(resend_after_s=0) == []
    assert not client.exists(f"{base_of(run.run_id)}:ready:{run.queue}:4")


# Budgets.


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(case=cases)
def test_the_record_keeps_the_same_rule_as_the_table(record: Record, case: tuple[Limits, Usage, Usage, Usage]) -> None:
    _keeps_the_rule(record, case, rule(*case))


@pytest.mark.parametrize(("case", "row"), [(example[:4], example[4]) for example in examples])
def test_the_record_refuses_what_would_pass_a_limit(
    record: Record, case: tuple[Limits, Usage, Usage, Usage], row: str | None
) -> None:
    _keeps_the_rule(record, case, row)


def _keeps_the_rule(record: Record, case: tuple[Limits, Usage, Usage, Usage], row: str | None) -> None:
    """Spend and reserve as the case says, without limits; then set them and ask for what is wanted."""
    limits, spent, reserved, wanted = case
    run = ByHand(record, {"a": [], "b": [], "c": []})
    for step in "abc":
        run.begin(step)
    run.finish("a", usage=spent)
    admit(run, "b", wanted=reserved)
    if bounds := ceilings(limits):
        record._redis.hset(f"{base_of(run.run_id)}:run:{run.run_id}", "limits", json.dumps(bounds))
    if row is None:
        admit(run, "c", wanted=wanted)
        assert record.status(run.run_id) is RunStatus.RUNNING
        return
    for _ in range(2):
        with pytest.raises(Over, match=row):
            admit(run, "c", wanted=wanted)
    state = record.state(run.run_id)
    assert state.status is RunStatus.BUDGET_KILLED
    assert state.reason is not None
    assert ("cost_usd" if row == "unpriced" else row) in state.reason


def test_what_was_reserved_is_settled_by_what_was_used(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN, limits=Limits(total_tokens=100))
    run.begin("a")
    admit(run, "a", 1, wanted=Usage(input_tokens=60))
    admit(run, "a", 1, wanted=Usage(input_tokens=60))
    admit(run, "a", 2, wanted=Usage(input_tokens=60), spent=Usage(input_tokens=10))
    run.finish("a", usage=Usage(input_tokens=5))
    counted = client.hgetall(f"{base_of(run.run_id)}:run:{run.run_id}")
    assert (counted["r:total_tokens"], counted["u:total_tokens"]) == ("0", "15")
    assert record.state(run.run_id).usage == Usage(input_tokens=15)
    assert run.happened().count("act.decided a") == 2


def test_an_act_that_was_not_allowed_reserves_nothing(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN, limits=Limits(tool_calls=0))
    run.begin("a")
    admit(run, "a", allowed=False, wanted=Usage(tool_calls=1))
    assert record.status(run.run_id) is RunStatus.RUNNING
    assert client.hget(f"{base_of(run.run_id)}:run:{run.run_id}", "r:tool_calls") is None


def test_a_run_ends_when_a_step_used_more_than_was_reserved(record: Record) -> None:
    run = ByHand(record, CHAIN, limits=Limits(output_tokens=5))
    run.begin("a")
    assert run.finish("a", usage=Usage(output_tokens=6)) == Ended()
    assert run.finish("a", usage=Usage(output_tokens=6)) == Ended()
    state = record.state(run.run_id)
    assert (state.status, state.reason) == (RunStatus.BUDGET_KILLED, "budget.output_tokens is used up")
    run = ByHand(record, CHAIN, limits=Limits(output_tokens=5))
    run.begin("a")
    for _ in range(2):
        run.park("a", "retry", wake_in_s=1, usage=Usage(output_tokens=6))
    assert record.status(run.run_id) is RunStatus.BUDGET_KILLED


def test_a_run_that_takes_longer_than_its_wall_time_ends(record: Record) -> None:
    run = ByHand(record, CHAIN, wall_time_s=0)
    assert run.sweep() == []
    assert record.status(run.run_id) is RunStatus.QUEUED
    run.begin("a")
    run.sweep()
    state = record.state(run.run_id)
    assert (state.status, state.reason) == (RunStatus.BUDGET_KILLED, "budget.wall_time is used up")


def test_the_clock_stops_while_only_people_are_waited_for(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN, wall_time_s=0.03)
    timers, wall = f"{base_of(run.run_id)}:timers", f"{run.run_id} !wall"
    run.begin("a")
    first = client.zscore(timers, wall)
    run.park("a")
    assert client.zscore(timers, wall) is None
    time.sleep(0.05)
    run.sweep()
    assert record.status(run.run_id) is RunStatus.WAITING_APPROVAL
    record.decide(run.run_id, "a", YES)
    assert isinstance(first, float)
    assert client.zscore(timers, wall) > first  # type: ignore[operator]

    def killed() -> bool:
        run.sweep()
        return record.status(run.run_id) is RunStatus.BUDGET_KILLED

    eventually(killed, every_s=0.005)


def test_the_time_before_a_person_was_waited_for_counts(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN, wall_time_s=60)
    run.begin("a")
    time.sleep(0.05)
    run.park("a")
    record.decide(run.run_id, "a", YES)
    seconds, microseconds = client.time()
    ends_at = client.zscore(f"{base_of(run.run_id)}:timers", f"{run.run_id} !wall")
    assert isinstance(ends_at, float)
    assert ends_at <= seconds * 1000 + microseconds / 1000 + 60_000 - 50 + 1


def test_the_clock_of_an_ended_run_is_gone(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, {"a": []}, wall_time_s=60)
    run.do("a")
    assert client.zscore(f"{base_of(run.run_id)}:timers", f"{run.run_id} !wall") is None


# What can be seen, and for how long.


def test_an_ended_run_leaves_redis_after_its_time(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, {"a": []}, keep_s=0.05)
    run.begin("a")
    run.park("a")
    record.decide(run.run_id, "a", YES)
    run.do("a")
    base = base_of(run.run_id)
    eventually(lambda: not client.exists(f"{base}:run:{run.run_id}"), every_s=0.01)
    eventually(lambda: not list(client.scan_iter(f"{base}:*{run.run_id}*", count=1000)), every_s=0.01)
    assert not client.exists(f"{base}:plan:{run.new.plan}")
    for ask in (record.status, record.state, record.plan_digest, lambda run_id: next(follow(record, run_id))):
        with pytest.raises(NotFound, match="it may have been removed after its time"):
            ask(run.run_id)
    assert run.run_id not in [one.run_id for one in record.runs()]
    assert client.zscore(f"{base}:runs", run.run_id) is None


def test_the_index_forgets_runs_that_redis_let_go_of(record: Record, client: redis.Redis) -> None:
    run, stays = ByHand(record, {"a": []}, keep_s=0.001), ByHand(record, {"a": []})
    run.do("a")
    runs = f"{base_of(run.run_id)}:runs"
    client.zadd(runs, {run.run_id: 0})
    client.zadd(f"{base_of(stays.run_id)}:runs", {stays.run_id: 1})

    def forgotten() -> bool:
        record.forget_ended()
        return client.zscore(runs, run.run_id) is None

    eventually(forgotten, every_s=0.01)
    assert client.zscore(f"{base_of(stays.run_id)}:runs", stays.run_id) is not None


def test_runs_are_listed_although_an_answer_was_lost(record: Record, lose_an_answer: Callable[[], None]) -> None:
    runs = [ByHand(record, {"a": []}).run_id for _ in range(3)]
    lose_an_answer()
    assert {one.run_id for one in record.runs(limit=1000)} >= set(runs)


def test_events_are_followed_as_they_happen_until_the_run_ends(record: Record) -> None:
    run = ByHand(record, {"a": []})
    seen = follow(record, run.run_id)
    assert next(seen).type == "run.created"
    run.do("a")
    assert [event.type for event in seen] == ["run.started", "step.started", "step.completed", "run.ended"]


def test_events_can_be_taken_up_again_after_any_and_also_after_the_last(record: Record) -> None:
    run = ByHand(record, {"a": []})
    run.do("a")
    events = list(follow(record, run.run_id))
    assert list(follow(record, run.run_id, after=events[1].id)) == events[2:]
    assert list(follow(record, run.run_id, after=events[-1].id)) == []


def test_following_goes_on_while_nothing_happens(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ByHand(record, {"a": []})
    real, asked = record.events, []

    def impatient(run_id: str, after: str = "0-0", *, block_s: float | None = None) -> list[Any]:
        asked.append(after)
        if len(asked) == 3:
            run.do("a")
        return real(run_id, after, block_s=block_s and 0.001)

    monkeypatch.setattr(record, "events", impatient)
    assert [event.type for event in follow(record, run.run_id)][-1] == "run.ended"


def test_the_end_of_a_run_is_waited_for_as_long_as_wanted(record: Record) -> None:
    run = ByHand(record, {"a": [], "b": ["a"]})
    assert record.ending(run.run_id, 0) is None
    assert record.ending(run.run_id, 0.01) is None
    run.do("a")
    other = threading.Timer(0.01, lambda: run.do("b"))
    other.start()
    end = record.ending(run.run_id)
    other.join()
    assert end is not None
    assert end.status is RunStatus.COMPLETED
    assert record.ending(run.run_id, 0) == end
    with pytest.raises(NotFound, match="there is no run"):
        record.ending(new_run_id(), 0)


@pytest.mark.parametrize("protocol", [2, 3])
def test_events_are_read_in_either_protocol_of_redis(redis_url: str, protocol: int) -> None:
    record = Record(f"{redis_url}{'&' if '?' in redis_url else '?'}protocol={protocol}")
    run = ByHand(record, {"a": []})
    run.do("a")
    assert [event.type for event in record.events(run.run_id)][-1] == "run.ended"
    assert record.events(run.run_id, record.events(run.run_id)[-1].id) == []
    record.close_connections()


# The fleet.


def test_workers_are_known_while_they_beat(record: Record) -> None:
    name = uuid.uuid4().hex
    record.beat(name, 60)
    assert name in record.workers()
    record.gone(name)
    assert name not in record.workers()
    record.beat(name, -1)
    assert name not in record.workers()


def test_one_at_a_time_holds_a_lock(record: Record) -> None:
    lock = uuid.uuid4().hex
    assert record.alone(lock, "one", 60)
    assert record.alone(lock, "one", 60)
    assert not record.alone(lock, "two", 60)


def test_a_queue_is_empty_when_the_broker_holds_no_message(record: Record, client: redis.Redis) -> None:
    full, empty = uuid.uuid4().hex, uuid.uuid4().hex
    client.rpush(full, "message")
    client.rpush(f"{full}\x06\x163", "message")
    found = record.empty_queues([full, empty])
    assert [lane for lane, is_empty in found.items() if not is_empty] == [(full, 0), (full, 3)]
    assert len(found) == 2 * LANES


# Redis.


def test_scripts_that_redis_forgot_are_given_to_it_again(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN)
    client.script_flush()
    run.begin("a", lease_s=0)
    client.script_flush()
    assert run.sweep() == [Resend(run.run_id, "a", "")]


def test_a_redis_that_stays_away_is_unavailable() -> None:
    record = Record("redis://127.0.0.1:1/0", patience_s=0.1)
    with pytest.raises(Unavailable, match=r"Redis does not answer \(ConnectionError\); is it running, and not full\?"):
        record.status(new_run_id())


def test_a_redis_that_comes_back_in_time_is_waited_for(tmp_path: Path) -> None:
    with PrivateRedis(tmp_path) as server:
        record = Record(server.url, patience_s=30)
        run = ByHand(record, CHAIN)
        begun = threading.Event()
        results: list[Claimed] = []

        def claim() -> None:
            begun.set()
            results.append(run.begin("a"))

        thread = threading.Thread(target=claim)
    thread.start()
    begun.wait()
    with PrivateRedis(tmp_path):
        thread.join(20)
    assert [claimed.attempt for claimed in results] == [1]
    record.close_connections()


def test_every_call_touches_the_keys_of_one_partition_only(redis_url: str, client: redis.Redis) -> None:
    """By what Redis says that it was told: no key but those of one hash tag, and the few of the whole fleet."""
    base, keys = "ferrum:{p", set[str]()
    record = Record(redis_url)
    done = uuid.uuid4().hex
    with client.monitor() as monitor:
        run = ByHand(record, DIAMOND, key=uuid.uuid4().hex, limits=Limits(tool_calls=9), wall_time_s=60)
        run.begin("a")
        admit(run, "a", wanted=Usage(tool_calls=1))
        run.park("a")
        record.decide(run.run_id, "a", YES)
        run.do("a", "b")
        run.begin("c")
        record.hand_back(run.held["c"], "w", 1, NO_USAGE)
        record.renew([run.held["b"]], 60)
        run.begin("c", lease_s=0)
        run.sweep()
        record.nudge(run.run_id)
        record.cancel(run.run_id, "ann")
        client.echo(done)
        for entry in monitor.listen():
            command = entry["command"]
            if done in command:
                break
            name, *words = command.split(" ")
            if entry["client_type"] == "lua" and words and name not in ("TIME", "SELECT"):
                keys.add(words[0])
    record.close_connections()
    assert keys
    assert {key for key in keys if not key.startswith(base)} == set()
    of_this_run = {key.partition(":")[2].partition(":")[0] for key in keys if run.run_id in key}
    assert of_this_run == {base_of(run.run_id).partition(":")[2]}


# What a fresh pair of eyes found.


def test_a_plan_that_is_stored_twice_at_once_lives_as_long_as_its_run(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, CHAIN)
    record._store_plan(run.new)
    assert client.ttl(f"{base_of(run.run_id)}:plan:{run.new.plan}") == -1


def test_a_run_whose_plan_is_gone_does_not_stop_the_repair_of_others(record: Record, client: redis.Redis) -> None:
    broken = ByHand(record, CHAIN)
    client.delete(f"{base_of(broken.run_id)}:plan:{broken.new.plan}")
    other = ByHand(record, CHAIN)
    queues = {(broken.queue, 4): True, (other.queue, 4): True}
    sent = record.sweep(queues, resend_after_s=0, reap=True).sends
    assert other.run_id in {what.run_id for what in sent}
    assert broken.run_id not in {what.run_id for what in sent}


def test_an_ended_run_asks_nobody_and_waits_for_no_time(record: Record, client: redis.Redis) -> None:
    run = ByHand(record, {"a": []})
    run.begin("a")
    run.park("a", "approval", wake_in_s=3600)
    base = base_of(run.run_id)
    keys = (f"{base}:asks", f"{base}:timers")
    assert all(client.zscore(key, f"{run.run_id} a") is not None for key in keys)
    record.cancel(run.run_id, "ann")
    assert all(client.zscore(key, f"{run.run_id} a") is None for key in keys)


def test_a_full_redis_is_waited_for(redis_url: str, client: redis.Redis) -> None:
    patient = Record(redis_url, patience_s=20)
    run = ByHand(patient, {"a": []})
    run.begin("a")
    client.config_set("maxmemory", "1mb")
    room = threading.Timer(0.3, lambda: client.config_set("maxmemory", "0"))
    room.start()
    try:
        run.finish("a")
    finally:
        room.join()
        client.config_set("maxmemory", "0")
        patient.close_connections()
    assert patient.status(run.run_id) is RunStatus.COMPLETED


# A step that ends its workers, and a night in which they end anyway.


def _died_at(record: Record, workers: Iterable[str]) -> None:
    """These died just now, whatever they ran."""
    for worker in workers:
        other = ByHand(record, {"a": []})
        other.begin("a", lease_s=0, worker=worker)
        other.sweep()


def test_a_step_that_ends_one_worker_after_the_other_is_given_up_before_it_ends_many(record: Record) -> None:
    record._redis.delete("ferrum:died")
    run = ByHand(record, {"a": [], "b": ["a"]})
    for number in range(POISON):
        assert record.state(run.run_id).step("a").status is not StepStatus.FAILED
        run.lose("a", f"w{number}")
    assert record.state(run.run_id).step("a").error == (
        f"{POISON} workers died while they ran it and 0 others did; it is not tried again"
    )


def test_a_step_is_not_to_blame_for_a_night_in_which_all_workers_die(record: Record) -> None:
    record._redis.delete("ferrum:died")
    run = ByHand(record, {"a": []})
    for number in range(2 * POISON):
        _died_at(record, [f"beside{number}"])
        run.lose("a", f"w{number}")
    assert record.state(run.run_id).step("a").status is StepStatus.PENDING


def test_a_worker_that_lost_a_step_again_and_again_and_lives_is_one_worker(record: Record) -> None:
    record._redis.delete("ferrum:died")
    run = ByHand(record, {"a": []})
    for _ in range(2 * POISON):
        run.lose("a", "the same")
    assert record.state(run.run_id).step("a").status is StepStatus.PENDING
    # Nobody has died, so nobody waits for that.
    assert [one.step_id for one in run.lose("a", "the same")] == ["a"]


def test_a_step_that_lost_its_worker_again_waits_before_it_is_tried_again(record: Record) -> None:
    run = ByHand(record, {"a": []})
    assert [one.step_id for one in run.lose("a", "w1")] == ["a"]
    assert run.lose("a", "w2") == []
    # Its message, which comes again when its worker is gone, is too early.
    assert run.claim("a") == Dropped("its workers died, it is tried again later")
    assert run.sweep() == []
    timers = f"{base_of(run.run_id)}:timers"
    steps = f"{base_of(run.run_id)}:steps:{run.run_id}"
    state = json.loads(record._redis.hget(steps, "a") or "")
    record._redis.hset(steps, "a", json.dumps({**state, "nb": 1}))
    record._redis.zadd(timers, {f"{run.run_id} a": 0})
    assert [one.step_id for one in run.sweep()] == ["a"]
    assert run.begin("a").attempt == 3


def test_a_run_whose_step_waits_after_its_workers_died_can_be_cancelled(record: Record) -> None:
    run = ByHand(record, {"b": []}, keep_s=60)
    run.lose("b", "w1")
    run.lose("b", "w2")
    record.cancel(run.run_id, "ann")
    assert record.status(run.run_id) is RunStatus.CANCELLED
    assert run.sweep() == []


def test_a_decision_counts_for_what_was_seen_alone(record: Record) -> None:
    run = ByHand(record, {"a": []})
    for _ in range(2):
        run.begin("a")
        run.park("a", "ask")
        [asked] = record.asked(run.run_id)
        with pytest.raises(Conflict, match="asks for something else by now"):
            record.decide(run.run_id, "a", YES, "1-1")
        record.decide(run.run_id, "a", YES, asked.event)
    assert asked.times == 2


def test_what_waits_for_a_person_is_found_at_a_cost_for_each_that_does_not_grow(
    record: Record, client: redis.Redis
) -> None:
    def commands(count: int) -> int:
        run = ByHand(record, {f"s{number}": [] for number in range(count)})
        for step in run.plan.steps:
            run.begin(step)
            run.park(step, "ask")
        before: Any = client.info("commandstats")
        found = record.asks(record.asked(run.run_id))
        assert len(found) == count
        after: Any = client.info("commandstats")
        read = {name: after[name]["calls"] - before.get(name, {"calls": 0})["calls"] for name in after}
        record.cancel(run.run_id, "ann")
        return read.get("cmdstat_xrange", 0) + read.get("cmdstat_hget", 0) + read.get("cmdstat_zrange", 0)

    commands(1)
    assert commands(40) <= 40 * 3 + 20

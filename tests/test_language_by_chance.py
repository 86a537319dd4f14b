"""Random workflows in one process, where any call may be a worker's last and any message be lost, doubled or late."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from comparison import Comparison, Story
from office import Given, Office, step_type
from pydantic import JsonValue
from random_workflows import EXAMPLES, GIVEN, SEED, Document, some
from reference import expected
from user_tasks import number_of

import ferrum
from ferrum.artifacts import Artifacts
from ferrum.errors import StepError
from ferrum.events import RunCreated
from ferrum.executor import Then
from ferrum.loop import LoopThread
from ferrum.plan import _remembered
from ferrum.record import NewRun, Record, Resend, base_of
from ferrum.runs import record
from ferrum.steps import Attempt, step_types


class Fragile(Record):
    """One call in so many is the last of whoever makes it: it dies before the call or after it."""

    chance = random.Random()
    one_in = 0

    def _eval(self, name: str, base: str, *arguments: str | int) -> list[Any]:
        dies = self.one_in and self.chance.randrange(self.one_in) == 0
        if dies and self.chance.random() < 0.5:
            raise _Killed
        reply = super()._eval(name, base, *arguments)
        if dies:
            raise _Killed
        return reply


class _Killed(BaseException):
    """Of a worker that died here."""


class Chaos:
    """An office in which everything goes wrong now and then, the same way for the same seed."""

    def __init__(self, office: Office, redis_url: str) -> None:
        self.office = office
        self.redis_url = redis_url
        self.effects: list[str] = []
        # What was sent once is sent again as soon as there is nothing else to do.
        office.mute = True

    def work(self, params: Given, attempt: Attempt) -> JsonValue:
        given: Any = params.value
        self.effects.append(attempt.idempotency_key)
        if given.get("fail") or self.effects.count(attempt.idempotency_key) <= given.get("fail_tries", 0):
            raise StepError("it was told to fail", retry=True)
        if "fail_rounds" in given and int(attempt.step_id.split(".")[-2]) <= given["fail_rounds"]:
            raise StepError("it fails in this try of its block", retry=True)
        return number_of(given["values"])

    def run(self, document: Document, seed: int) -> str:
        """Submit it and do all that follows."""
        self.chance = random.Random(seed)
        run_id = ferrum.submit(document, GIVEN)
        queue = self.office.heads(run_id)
        record: Any = self.office.record
        record.chance, record.one_in = self.chance, 40
        for _ in range(20_000):
            if not queue:
                record.one_in, calm = 0, record.one_in
                if record.status(run_id).ended:
                    return run_id
                queue = list(self.office.sweep())
                record.one_in = calm
                continue
            what = queue.pop(self.chance.randrange(len(queue)))
            luck = self.chance.randrange(20)
            if luck == 0:
                queue.append(what)
            if luck != 1:
                queue += self._deliver(what)
        raise AssertionError(f"{run_id} does not end")

    def _deliver(self, what: Resend) -> Iterator[Resend]:
        try:
            for step in self.office._first_of(what):
                yield from self.office._followed(what.run_id, step)
        except _Killed:
            self._miss()

    def _miss(self) -> None:
        """Whoever holds a step is given up."""
        with redis.Redis.from_url(self.redis_url) as client:
            for leases in client.scan_iter("*:leases"):
                client.zadd(leases, dict.fromkeys(client.zrange(leases, 0, -1), 0), xx=True)


def for_an_office(value: Any) -> Any:
    """The same document with steps that an office knows."""
    if isinstance(value, str):
        return value.replace("params.input", "params.value")
    if isinstance(value, list):
        return [for_an_office(one) for one in value]
    if not isinstance(value, dict):
        return value
    changed = {name: for_an_office(one) for name, one in value.items()}
    if value.get("type") == "task":
        changed |= {"type": "act", "value": {"values": [], **changed.pop("input")}}
        del changed["task"]
    return changed | ({"for": "1ms"} if value.get("type") == "wait" and "for" in value else {})


@pytest.mark.timeout(300 + 4 * EXAMPLES)
def test_random_workflows_come_to_the_same_wherever_a_worker_dies_and_whatever_becomes_of_a_message(
    clean_redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, fragile = LoopThread(), Fragile(clean_redis)
    office = Office(fragile, loop, Artifacts(f"file://{tmp_path}"))
    try:
        chaos = Chaos(office, clean_redis)
        kind = step_type("act", chaos.work)
        monkeypatch.setattr("ferrum.plan.step_types", lambda: {**step_types(), "act": kind})
        for number, document in enumerate(some(2 * EXAMPLES, SEED + 4)):
            run_id = chaos.run(for_an_office(document), SEED + number)
            comparison = Comparison.of(clean_redis, Counter(chaos.effects), [run_id], killed=True)
            comparison.check(run_id, expected(document, GIVEN))
            comparison.nothing_else()
            if comparison.wrong:
                pytest.fail("\n".join([*comparison.wrong, f"{SEED + number}", json.dumps(document)]), pytrace=False)
    finally:
        _remembered.cache_clear()
        fragile.close_connections()
        loop.stop()


# What once went wrong.


@pytest.fixture
def office(clean_redis: str, tmp_path: Path) -> Iterator[Office]:
    loop, record = LoopThread(), Record(clean_redis)
    yield Office(record, loop, Artifacts(f"file://{tmp_path}"))
    record.close_connections()
    loop.stop()


def die_before_it_waits(office: Office, run_id: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that has this step dies when all is ready for the step to wait for what is inside."""

    def die(*_: object, **__: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(office.record, "park", die)
        with pytest.raises(_Killed):
            office.attempt(run_id, step)


def miss_the_worker(office: Office, redis_url: str, run_id: str) -> None:
    """The leases of the run run out, and what is to be done is done."""
    leases = f"{base_of(run_id)}:leases"
    with redis.Redis.from_url(redis_url) as client:
        client.zadd(leases, dict.fromkeys(client.zrange(leases, 0, -1), 0), xx=True)
    office.go_on([])


def runs_inside() -> list[Story]:
    stories = [Story.of(run.run_id) for run in record().runs()]
    return [story for story in stories if isinstance(story.events[0], RunCreated) and story.events[0].parent]


WAIT = {"type": "wait", "signal": "s"}
INSIDE = {"type": "workflow", "workflow": {"name": "inside", "steps": {"x": WAIT}}}


def test_a_worker_that_dies_between_a_run_inside_and_its_wait_leaves_one_run(
    office: Office, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by kills: the next attempt began a second run, and the first one went on beside it."""
    run_id = office.submit({"a": INSIDE})
    die_before_it_waits(office, run_id, "a", monkeypatch)
    miss_the_worker(office, redis_url, run_id)
    [inside] = runs_inside()
    office.go_on(office.record.signal(inside.run_id, "s", '{"v":1}', ""))
    assert office.said(run_id) == ("completed", None)


def test_no_run_begins_inside_a_step_that_has_ended(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = office.submit({"a": {**INSIDE, "deadline": "1h"}, "b": WAIT})
    create = office.record.create

    def too_late(run: NewRun) -> str:
        office.time_comes(run_id, "a!d")
        return create(run)

    with monkeypatch.context() as patch:
        patch.setattr(office.record, "create", too_late)
        assert office.attempt(run_id, "a").then is Then.DROP
    assert office.statuses(run_id)["a"] == "failed"
    assert runs_inside() == []


def test_a_try_of_a_block_whose_worker_died_before_it_began_is_none(
    office: Office, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = office.submit({"a": {"retry": {"max_attempts": 2}, "steps": {"x": WAIT}}})
    die_before_it_waits(office, run_id, "a", monkeypatch)
    miss_the_worker(office, redis_url, run_id)
    assert office.statuses(run_id) == {"a": "waiting", "a.1.x": "waiting"}

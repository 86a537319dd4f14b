"""Random workflows on real workers come to what a small interpreter says, also when workers die or messages come twice.

`LANGUAGE_EXAMPLES` (how many) and `LANGUAGE_SEED` (which) make a long hunt of it.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from subprocess import Popen
from typing import Any

import hypothesis
import pytest
import redis
import twice
from fleet import Fleet, assert_events_agree, eventually, lines
from hypothesis import HealthCheck, Phase, given
from office import Given, Office, step_type
from pydantic import JsonValue
from random_workflows import workflows
from reference import COMPLETED, Expected, Seen, expected
from user_tasks import number_of

import ferrum
from ferrum.artifacts import Artifacts
from ferrum.errors import Conflict, StepError
from ferrum.events import Event, RunCreated, StepCompleted
from ferrum.executor import Then
from ferrum.loop import LoopThread
from ferrum.plan import _remembered
from ferrum.record import NewRun, Record, Resend, base_of
from ferrum.results import RunStatus
from ferrum.runs import RunView, record
from ferrum.steps import Attempt, step_types

EXAMPLES = int(os.environ.get("LANGUAGE_EXAMPLES", "25"))
SEED = int(os.environ.get("LANGUAGE_SEED", "0"))
#: What each run is given.
GIVEN: dict[str, Any] = {"n": [1, 2]}
#: A worker that died is noticed soon.
QUICK = {"FERRUM_LEASE": "1.5", "FERRUM_HEARTBEAT": "0.2", "FERRUM_SWEEP": "0.1", "FERRUM_RESEND_AFTER": "1"}

Document = dict[str, Any]


def some(count: int, seed: int) -> list[Document]:
    """So many random workflows, the same ones for the same seed."""
    found: list[Document] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(workflows())
    def draw(document: Document) -> None:
        found.append(document)

    draw()
    return found


STEADY, TWICE, MORTAL = {}, {"FERRUM_IMPORTS": "user_tasks,twice_in_workers"}, {"FERRUM_IMPORTS": "user_tasks,mortal"}


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two workers of the kind that the test asks for; of mortal ones only the second is."""
    kind: dict[str, str] = request.param
    home = tmp_path_factory.mktemp("language")
    fleet = Fleet(redis_url, home, {**QUICK, "EFFECTS": str(home / "effects.log"), "MORTAL": "300"})
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    try:
        fleet.start("-c", "8", **({} if kind is MORTAL else kind))
        start(fleet, kind)
        yield fleet
    finally:
        fleet.stop()


def start(fleet: Fleet, kind: Mapping[str, str]) -> Popen[bytes]:
    """A worker that lives for long enough to be ready."""
    while True:
        try:
            return fleet.start("-c", "8", **kind)
        except AssertionError:
            assert fleet.workers[-1].poll() == -signal.SIGKILL, fleet.log(len(fleet.workers) - 1).read_text()[-4000:]


def on(kind: Mapping[str, str]) -> pytest.MarkDecorator:
    name = kind.get("FERRUM_IMPORTS", "steady").rpartition(",")[2]
    return pytest.mark.parametrize("fleet", [kind], indirect=True, ids=[name])


# What a run was.


@dataclass(frozen=True)
class Story:
    """What the events of one run tell, by their places in the order."""

    run_id: str
    events: Sequence[Event]

    @classmethod
    def of(cls, run_id: str) -> Story:
        return cls(run_id, record().events(run_id))

    @cached_property
    def view(self) -> RunView:
        return ferrum.runs.show(self.run_id)

    @cached_property
    def of_steps(self) -> dict[str, list[tuple[int, str]]]:
        """For each step where its events are, and of what type."""
        found: dict[str, list[tuple[int, str]]] = {}
        for place, event in enumerate(self.events):
            if step := getattr(event, "step", None):
                found.setdefault(step, []).append((place, event.type))
        return found

    def first(self, step: str) -> int:
        return self.of_steps[step][0][0]

    def end(self, step: str) -> int:
        """Where it ended; beyond all where it did not."""
        ends = [place for place, kind in self.of_steps.get(step, ()) if kind in _ENDS]
        return ends[0] if ends else len(self.events)

    def span(self, prefix: str) -> tuple[int, int] | None:
        """From where to where anything happened in there by itself; what is undone later is not of it."""
        places = [
            place
            for step, events in self.of_steps.items()
            if step == prefix or step.startswith(f"{prefix}.")
            if ".compensate" not in step.removeprefix(prefix)
            for place, kind in events
            if kind != "step.cancelled"
        ]
        return (min(places), max(places)) if places else None

    @property
    def completed(self) -> list[str]:
        """The steps that completed, in order."""
        return [event.step for event in self.events if isinstance(event, StepCompleted)]

    @property
    def undoing(self) -> list[str]:
        """The steps that undo another, in the order in which they began."""
        return [step for step in self.of_steps if step.endswith(".compensate")]


_ENDS = frozenset({"step.completed", "step.failed", "step.skipped", "step.cancelled"})


@dataclass
class Comparison:
    """What the runs of a fleet were against what they should have been."""

    redis_url: str
    #: How often each step acted, by its key.
    effects: Counter[str]
    #: Workers died: a step may have acted more than once.
    killed: bool
    #: The runs inside of others, by run and step, in order.
    inside: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, redis_url: str, acted: Counter[str], runs: Sequence[str], *, killed: bool) -> Comparison:
        """Of these runs and all inside of them."""
        parents: dict[tuple[str, str], list[str]] = {}
        for run in sorted(record().runs(limit=100_000), key=lambda run: run.run_id):
            created = record().events(run.run_id)[0]
            assert isinstance(created, RunCreated)
            if created.parent:
                parents.setdefault(created.parent, []).append(run.run_id)
        family = set(runs)
        while more := {run for (above, _), inside in parents.items() if above in family for run in inside} - family:
            family |= more
        effects = Counter({key: times for key, times in acted.items() if key.partition(".")[0] in family})
        return cls(
            redis_url, effects, killed, {above: inside for above, inside in parents.items() if above[0] in family}
        )

    def check(self, run_id: str, said: Expected, *, loose: bool = False) -> None:
        """`loose`: the run is inside of what may have been cancelled."""
        story = Story.of(run_id)
        view = story.view
        cut_off = loose and view.status.value == "cancelled"
        self._same(run_id, "status", view.status.value, "cancelled" if cut_off else said.status)
        if view.status.value == COMPLETED:
            self._same(run_id, "outputs", _without_errors(view.outputs), _without_errors(said.outputs))
        steps = {step.step_id: step for step in view.steps}
        known = said.steps | {step: seen for undo in said.undo.values() for step, seen in undo.items()}
        for step in steps.keys() - known.keys():
            self._wrong(run_id, f"{step} should not be there")
        for step, seen in said.steps.items():
            self._step(story, step, seen, cut_off)
        self._order(story, said)
        self._undone(story, said)
        assert_events_agree(self.redis_url, run_id)

    def _step(self, story: Story, step: str, seen: Seen, cut_off: bool) -> None:
        found = {one.step_id: one for one in story.view.steps}.get(step)
        status = found.status.value if found else "absent"
        loose = cut_off or seen.loose
        if loose and status in ("absent", "cancelled", "pending"):
            pass
        else:
            self._same(story.run_id, f"status of {step}", status, seen.status)
        if found and status == COMPLETED:
            self._same(story.run_id, f"output of {step}", _without_errors(found.output), _without_errors(seen.output))
        ends = [kind for _, kind in story.of_steps.get(step, ()) if kind in _ENDS]
        if len(ends) > 1 or (ends and story.of_steps[step][-1][1] not in _ENDS):
            self._wrong(story.run_id, f"{step} went on after its end: {story.of_steps[step]}")
        self._acted(f"{story.run_id}.{step}", seen.effects, loose)
        runs = self.inside.pop((story.run_id, step), [])
        if len(runs) > len(seen.runs) or (len(runs) < len(seen.runs) and not loose):
            self._wrong(story.run_id, f"{step} has the runs {runs}, and should have {len(seen.runs)}")
        for inner, said in zip(runs, seen.runs, strict=False):
            self.check(inner, said, loose=loose)

    def _acted(self, key: str, times: int, loose: bool) -> None:
        acted = self.effects.pop(key, 0)
        least = 0 if loose else times
        if acted < least or (acted > times and not (self.killed and times)):
            self._wrong(key, f"acted {acted} times, not {times}")

    def _order(self, story: Story, said: Expected) -> None:
        for step, seen in said.steps.items():
            if step in story.of_steps:
                for before in seen.after:
                    if story.end(before) > story.first(step):
                        self._wrong(story.run_id, f"{step} began before {before} was over")
        for step, events in story.of_steps.items():
            own = [place for place, kind in events if kind != "step.cancelled"]
            around = _around(step, story)
            if around and own and not (story.first(around) < own[0] and own[-1] < story.end(around)):
                self._wrong(story.run_id, f"{step} was not inside of {around}")
        for prefixes, at_a_time in said.in_turn:
            spans = [span for prefix in prefixes if (span := story.span(prefix))]
            if any(sum(begin <= at <= end for begin, end in spans) > at_a_time for at, _ in spans):
                self._wrong(story.run_id, f"more than {at_a_time} of {prefixes} at a time: {spans}")

    def _undone(self, story: Story, said: Expected) -> None:
        undone: list[str] = []
        if story.view.status.value != COMPLETED:
            undone = [f"{step}.compensate" for step in reversed(story.completed) if step in said.undo]
        self._same(story.run_id, "undone", story.undoing, undone)
        for one, after in pairwise(undone):
            if story.end(one) > story.first(after):
                self._wrong(story.run_id, f"{after} began before {one} was over")
        for step in undone:
            for id, seen in said.undo[step.removesuffix(".compensate")].items():
                self._step(story, id, seen, cut_off=False)

    def _same(self, run_id: str, what: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            self._wrong(run_id, f"{what} is {found!r}, not {wanted!r}")

    def _wrong(self, run_id: str, message: str) -> None:
        self.wrong.append(f"{run_id}: {message}")

    def nothing_else(self) -> None:
        """Nothing acted and no run was begun that nobody asked for."""
        self.wrong += [f"{key} acted, and should not have" for key in self.effects]
        self.wrong += [f"{step} of {run} has the runs {runs}" for (run, step), runs in self.inside.items()]


def _around(step: str, story: Story) -> str | None:
    """The step that this one is inside of."""
    parts = step.split(".")
    if parts[-1] == "compensate":
        return None
    above = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((one for one in above if one in story.of_steps), None)


def _without_errors(value: Any) -> Any:
    """Which of several failed steps an error names, nobody knows before."""
    if isinstance(value, dict):
        return {name: _without_errors(one) for name, one in value.items() if name != "error"}
    return [_without_errors(one) for one in value] if isinstance(value, list) else value


def all_ended(runs: Sequence[str]) -> bool:
    return all(record().status(run_id).ended for run_id in runs)


def how_far(runs: Sequence[str], documents: Sequence[Document]) -> str:
    """What is still going on, for whoever has to find out why."""
    stuck = [pair for pair in zip(runs, documents, strict=True) if not record().status(pair[0]).ended]
    told = [
        [f"{event.type} {getattr(event, 'step', '')}" for event in record().events(run_id)][-12:] for run_id, _ in stuck
    ]
    return "\n".join(
        f"{run_id} does not end: {events}\n{json.dumps(document)}"
        for (run_id, document), events in zip(stuck, told, strict=True)
    )


def assert_as_said(
    redis_url: str,
    fleet: Fleet,
    documents: Sequence[Document],
    runs: Sequence[str],
    *,
    killed: bool = False,
    cancelled: bool = False,
) -> None:
    comparison = Comparison.of(redis_url, Counter(lines(fleet.home / "effects.log")), runs, killed=killed)
    failed: list[str] = []
    for run_id, document in zip(runs, documents, strict=True):
        before = len(comparison.wrong)
        comparison.check(run_id, expected(document, GIVEN), loose=cancelled)
        if new := comparison.wrong[before:]:
            failed.append("\n".join([*new, json.dumps(document)]))
    before = len(comparison.wrong)
    comparison.nothing_else()
    if comparison.wrong:
        pytest.fail("\n\n".join([*failed, *comparison.wrong[before:]]), pytrace=False)


def submit(documents: Sequence[Document]) -> list[str]:
    return [ferrum.submit(document, GIVEN) for document in documents]


def wait_for(runs: Sequence[str], documents: Sequence[Document]) -> None:
    try:
        eventually(lambda: all_ended(runs), timeout_s=30 + EXAMPLES)
    except AssertionError:
        raise AssertionError(how_far(runs, documents)) from None


@on(STEADY)
@pytest.mark.timeout(60 + 4 * EXAMPLES)
def test_random_workflows_come_to_what_the_reference_says(fleet: Fleet, redis_url: str) -> None:
    documents = some(EXAMPLES, SEED)
    runs = submit(documents)
    wait_for(runs, documents)
    assert_as_said(redis_url, fleet, documents, runs)


@on(STEADY)
@pytest.mark.timeout(60 + 4 * EXAMPLES)
def test_random_workflows_that_are_cancelled_on_their_way_undo_what_they_did(fleet: Fleet, redis_url: str) -> None:
    documents = some(EXAMPLES // 2, SEED + 1)
    chance = random.Random(SEED)
    runs = submit(documents)
    for run_id in runs:
        enough = chance.randrange(30)
        eventually(lambda run_id=run_id, enough=enough: all_ended([run_id]) or len(record().events(run_id)) > enough)
        with suppress(Conflict):
            ferrum.cancel(run_id, by="ada")
    wait_for(runs, documents)
    assert RunStatus.CANCELLED in map(record().status, runs), "all were over by then: the test proved nothing"
    assert_as_said(redis_url, fleet, documents, runs, cancelled=True)


@on(TWICE)
@pytest.mark.timeout(60 + 4 * EXAMPLES)
def test_random_workflows_come_to_the_same_when_every_message_is_delivered_twice(fleet: Fleet, redis_url: str) -> None:
    documents = some(EXAMPLES // 2, SEED + 2)
    twice.install()
    try:
        runs = submit(documents)
        wait_for(runs, documents)
    finally:
        twice.remove()
    assert_as_said(redis_url, fleet, documents, runs)


@on(MORTAL)
@pytest.mark.timeout(60 + 8 * EXAMPLES)
def test_random_workflows_come_to_the_same_when_workers_are_killed(fleet: Fleet, redis_url: str) -> None:
    documents = some(EXAMPLES // 2, SEED + 3)
    runs = submit(documents)
    killed = 0
    while killed < EXAMPLES // 8:
        eventually(lambda: fleet.workers[-1].poll() is not None or all_ended(runs), timeout_s=30 + EXAMPLES)
        if fleet.workers[-1].poll() is None:
            break
        killed += 1
        start(fleet, MORTAL if killed < EXAMPLES // 8 else STEADY)
    wait_for(runs, documents)
    assert killed, "nobody died: the test proved nothing"
    assert_as_said(redis_url, fleet, documents, runs, killed=True)


# In one process, where a worker may die at each of its calls, and a message be lost, doubled or late.


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


@pytest.mark.timeout(60 + 4 * EXAMPLES)
def test_random_workflows_come_to_the_same_wherever_a_worker_dies_and_whatever_becomes_of_a_message(
    clean_redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, fragile = LoopThread(), Fragile(clean_redis)
    office = Office(fragile, loop, Artifacts(f"file://{tmp_path}"))
    try:
        chaos = Chaos(office, clean_redis)
        kind = step_type("act", chaos.work)
        monkeypatch.setattr("ferrum.plan.step_types", lambda: {**step_types(), "act": kind})
        for number, document in enumerate(some(EXAMPLES, SEED + 4)):
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

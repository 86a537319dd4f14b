"""Random workflows on real workers come to what a small interpreter says, also when workers die or messages come twice.

`LANGUAGE_EXAMPLES` (how many) and `LANGUAGE_SEED` (which) make a long hunt of it.
"""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from subprocess import Popen

import pytest
import redis
import twice
from comparison import Comparison
from fleet import PATIENCE_S, Fleet, eventually, lines
from random_workflows import EXAMPLES, GIVEN, SEED, Document, some
from reference import expected

import ferrum
from ferrum.errors import Conflict
from ferrum.results import RunStatus
from ferrum.runs import record

#: A worker that died is noticed soon.
QUICK = {"FERRUM_LEASE": "1.5", "FERRUM_HEARTBEAT": "0.2", "FERRUM_SWEEP": "0.1", "FERRUM_RESEND_AFTER": "1"}


STEADY, TWICE, MORTAL = {}, {"FERRUM_IMPORTS": "user_tasks,twice_in_workers"}, {"FERRUM_IMPORTS": "user_tasks,mortal"}


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A worker of the kind that the test asks for; beside a mortal one there is one that is not."""
    kind: dict[str, str] = request.param
    home = tmp_path_factory.mktemp("language")
    fleet = Fleet(redis_url, home, {**QUICK, "EFFECTS": str(home / "effects.log"), "MORTAL": "100"})
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    try:
        if kind is MORTAL:
            fleet.start("-c", "8")
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
        eventually(lambda: all_ended(runs), timeout_s=PATIENCE_S + EXAMPLES)
        # One that was given up inside of one that has ended may still undo what it did.
        eventually(lambda: not record().any_live())
    except AssertionError:
        raise AssertionError(how_far(runs, documents)) from None


@on(STEADY)
@pytest.mark.timeout(300 + 4 * EXAMPLES)
def test_random_workflows_come_to_what_the_reference_says(fleet: Fleet, redis_url: str) -> None:
    documents = some(EXAMPLES, SEED)
    runs = submit(documents)
    wait_for(runs, documents)
    assert_as_said(redis_url, fleet, documents, runs)


@on(STEADY)
@pytest.mark.timeout(300 + 4 * EXAMPLES)
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
@pytest.mark.timeout(300 + 4 * EXAMPLES)
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
@pytest.mark.timeout(300 + 8 * EXAMPLES)
def test_random_workflows_come_to_the_same_when_workers_are_killed(fleet: Fleet, redis_url: str) -> None:
    documents = some(EXAMPLES // 2, SEED + 3)
    runs = submit(documents)
    killed = 0
    while killed < EXAMPLES // 8:
        eventually(lambda: fleet.workers[-1].poll() is not None or all_ended(runs), timeout_s=PATIENCE_S + EXAMPLES)
        if fleet.workers[-1].poll() is None:
            break
        killed += 1
        start(fleet, MORTAL if killed < EXAMPLES // 8 else STEADY)
    wait_for(runs, documents)
    assert killed, "nobody died: the test proved nothing"
    assert_as_said(redis_url, fleet, documents, runs, killed=True)

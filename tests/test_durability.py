"""Nothing lost, nothing doubled: workers die, Redis dies, messages come twice or never."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import twice
from fleet import PATIENCE_S, Fleet, assert_events_agree, effects, ended, eventually, happened, lane, lines
from sizes import SIZE

import ferrum
from ferrum.artifacts import Kept
from ferrum.errors import Conflict, NotFound
from ferrum.local.redis import PrivateRedis
from ferrum.record import PARTITIONS, POISON, Claimed, Dropped, Ended, Held
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.runs import record
from ferrum.workflow import Workflow

#: Of the sample: what is lost with a worker is back four times as soon.
LEASE_S = 8.0 if SIZE > 1 else 2.0
#: What is promised of a step whose worker died.
RECOVERY_S = LEASE_S + 7


def append(step: str, delay_s: float = 0.0, linger_s: float = 0.0, **more: Any) -> dict[str, Any]:
    arguments = {"text": step, "delay_s": delay_s, "linger_s": linger_s}
    return {"type": "tool", "tool": "effects.append", "input": arguments, **more}


def six_steps(work_s: float = 0.0) -> dict[str, Any]:
    """A chain, a diamond, a cross edge (c to the gate, beside b and c to d) and an approval."""
    half = work_s / 2
    steps: dict[str, Any] = {
        "a": append("a", half, half),
        "b": append("b", half, half, needs=["a"]),
        "c": append("c", half, half, needs=["a"]),
        "d": append("d", half, half, needs=["b", "c"]),
        "gate": {"type": "approval", "message": "go on?", "needs": ["c"]},
        "e": append("e", half, half, needs=["gate", "d"]),
    }
    return {"name": "six", "steps": steps, "outputs": {"last": "{{ e.written }}", "by": "{{ gate.by }}"}}


ACTING = ("a", "b", "c", "d", "e")


@contextmanager
def somebody_who_says_yes() -> Iterator[None]:
    """A person who answers everything that is asked, until the end."""
    enough = threading.Event()

    def answer() -> None:
        while not enough.wait(0.1):
            for asked in record().asked():
                try:
                    ferrum.decide(asked.run_id, asked.step_id, approved=True, by="ada")
                except (Conflict, NotFound):
                    continue

    person = threading.Thread(target=answer, name="ada")
    person.start()
    try:
        yield
    finally:
        enough.set()
        person.join()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "effects.log"


@pytest.fixture
def fleet(clean_redis: str, tmp_path: Path, log: Path) -> Iterator[Fleet]:
    """A fleet with default settings and nobody in it yet; its only tools are countable effects, its tasks ours."""
    policy = tmp_path / "tools.policy.yaml"
    policy.write_text('allow: ["tool:effects.*", "task:user.*"]\n')
    fleet = Fleet(clean_redis, tmp_path, {"FERRUM_MCP_SERVERS": effects(log), "FERRUM_POLICY": str(policy)})
    try:
        yield fleet
    finally:
        fleet.stop()


def all_ended(runs: list[str]) -> bool:
    return all(record().status(run_id).ended for run_id in runs)


def assert_whole(redis_url: str, run_id: str, acted: Counter[str], *, more: int = 0) -> None:
    """The run completed; every step ended once and acted once, or once more for each time that it was lost."""
    run = ferrum.runs.show(run_id)
    assert run.status is RunStatus.COMPLETED, (run_id, run.reason)
    assert run.outputs == {"last": "e", "by": "ada"}
    for step in run.steps:
        assert step.status is StepStatus.COMPLETED
        assert len(happened(run_id, "step.completed", step.step_id)) == 1
    for step_id in ACTING:
        lost = len(happened(run_id, "step.lost", step_id))
        assert 1 <= acted[f"{run_id}.{step_id}"] <= 1 + lost + more, (run_id, step_id, lost)
    assert_events_agree(redis_url, run_id)


@pytest.mark.timeout(400)
def test_killing_a_worker_again_and_again_loses_nothing_and_doubles_nothing(
    fleet: Fleet, redis_url: str, log: Path
) -> None:
    quick = {} if SIZE > 1 else {"FERRUM_LEASE": str(LEASE_S)}
    alive = [fleet.start("-c", "8", **quick), fleet.start("-c", "8", **quick)]
    killed: dict[int, float] = {}
    chance = random.Random(7)
    workflow = Workflow.of(six_steps(work_s=0.4))
    with somebody_who_says_yes():
        runs = [ferrum.submit(workflow) for _ in range(100 if SIZE > 1 else 20)]
        while not all_ended(runs):
            _wait_for_work(log, runs)
            victim = alive.pop(chance.randrange(2))
            _wait_until_it_holds_steps(redis_url, victim.pid, runs)
            victim.send_signal(signal.SIGKILL)
            killed[victim.pid] = time.time()
            victim.wait()
            alive.append(fleet.start("-c", "8", **quick))
    acted = Counter(lines(log))
    for run_id in runs:
        assert_whole(redis_url, run_id, acted)
    assert set(acted) == {f"{run_id}.{step}" for run_id in runs for step in ACTING}
    lost = [event for run_id in runs for event in happened(run_id, "step.lost")]
    assert lost, "no kill hit a step: the test proved nothing"
    # A lease is looked at twice a second; a worker is `host:pid:…`, and both clocks are this machine's.
    slowest = max(event.at - killed[int(event.worker.split(":")[1])] for event in lost)
    assert slowest < RECOVERY_S


def _wait_for_work(log: Path, runs: list[str]) -> None:
    """Until some more steps have acted, or nothing is left to do; not for long, as all may wait for a repair."""
    enough, end = len(lines(log)) + 20, time.monotonic() + 2
    while len(lines(log)) < enough and time.monotonic() < end and not all_ended(runs):
        time.sleep(0.05)


def _wait_until_it_holds_steps(redis_url: str, pid: int, runs: list[str]) -> None:
    """Until the worker is amid some steps; not for long, as all may wait for a repair."""
    end = time.monotonic() + 2
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        keys = [f"ferrum:{{p{partition:02}}}:leases" for partition in range(PARTITIONS)]
        while time.monotonic() < end and not all_ended(runs):
            if sum(f":{pid}:" in name for key in keys for name in client.zrange(key, 0, -1)) >= 6:
                return
            time.sleep(0.02)


def test_killing_redis_again_and_again_loses_nothing(
    fleet: Fleet, redis_server: PrivateRedis, redis_url: str, log: Path
) -> None:
    workers = [fleet.start("-c", "8"), fleet.start("-c", "8")]
    kills = 3
    runs = [ferrum.submit(six_steps(work_s=0.3)) for _ in range(20)]
    for number in range(kills):
        # Amid the work: late acknowledgements are due, and Celery 5.7 by itself would not outlive that.
        eventually(lambda enough=10 * (number + 1): len(lines(log)) >= enough)
        redis_server.kill()
        redis_server.start()
    with somebody_who_says_yes():
        eventually(lambda: all_ended(runs))
    assert [worker.poll() for worker in workers] == [None, None]
    acted = Counter(lines(log))
    for run_id in runs:
        # What Redis had not yet written when it died is not known as lost: such a step may act again without a trace.
        assert_whole(redis_url, run_id, acted, more=kills)


def test_a_worker_outlives_a_redis_that_is_away_while_its_steps_run(
    fleet: Fleet, redis_server: PrivateRedis, redis_url: str, tmp_path: Path
) -> None:
    """Celery 5.7 by itself does not: see `_connparams` of our channel."""
    log = tmp_path / "began"
    worker = fleet.start()
    sleep = {"type": "task", "task": "user.sleep", "input": {"seconds": 1, "log": str(log)}}
    run_id = ferrum.submit(
        {"name": "x", "steps": {**{f"s{i}": sleep for i in range(8)}, "after": echo(1, needs=["s0"])}}
    )
    eventually(lambda: log.exists() and len(log.read_text().splitlines()) == 8)
    redis_server.kill()
    try:
        eventually(lambda: "onnection to broker lost" in fleet.log(0).read_text())
        eventually(lambda: "Cannot connect to" in fleet.log(0).read_text())
    finally:
        redis_server.start()
    assert ended(run_id).status is RunStatus.COMPLETED
    assert worker.poll() is None
    assert len(log.read_text().splitlines()) == 8
    assert_events_agree(redis_url, run_id)


def test_every_message_sent_twice_changes_nothing(fleet: Fleet, redis_url: str, log: Path) -> None:
    for _ in range(2):
        fleet.start("-c", "8", FERRUM_IMPORTS="twice_in_workers")
    twice.install()
    try:
        with somebody_who_says_yes():
            runs = [ferrum.submit(six_steps()) for _ in range(20)]
            eventually(lambda: all_ended(runs))
    finally:
        twice.remove()
    acted = Counter(lines(log))
    for run_id in runs:
        assert_whole(redis_url, run_id, acted)
        assert not happened(run_id, "step.lost")
        assert [event.attempt for event in happened(run_id, "step.completed")] == [1] * 6
    assert acted.total() == len(runs) * len(ACTING)


def test_messages_that_redis_loses_are_sent_again(fleet: Fleet, redis_url: str, log: Path) -> None:
    """A client that stands in line with the worker takes every other message away, and drops it."""
    fleet.start("-c", "8", FERRUM_RESEND_AFTER="1")
    stolen: list[str] = []
    with redis.Redis.from_url(redis_url, decode_responses=True) as client, somebody_who_says_yes():
        runs = [ferrum.submit(six_steps()) for _ in range(8)]
        while len(stolen) < 15 and not all_ended(runs):
            if found := client.brpop([lane("ferrum.tool"), lane("ferrum.approval")], timeout=0.2):
                stolen.append(found[0])
        eventually(lambda: all_ended(runs))
    assert stolen, "nothing was lost: the test proved nothing"
    acted = Counter(lines(log))
    for run_id in runs:
        assert_whole(redis_url, run_id, acted)
    assert acted.total() == len(runs) * len(ACTING)


def echo(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "task", "task": "user.echo", "input": {"value": value}, **more}


def test_a_chain_and_a_chord_go_on_after_their_message_was_lost(fleet: Fleet, redis_url: str, log: Path) -> None:
    steps = {
        "first": echo(1),
        "lost": append("lost", needs=["first"]),
        "after": echo(2, needs=["lost"]),
        "left": echo("l", needs=["after"]),
        "right": append("right", needs=["after"]),
        "join": echo("{{ [left, right.written] }}"),
        "end": echo("{{ join }}"),
    }
    fleet.start("-Q", "ferrum.task", FERRUM_RESEND_AFTER="1", FERRUM_SWEEP="0.1")
    run_id = ferrum.submit({"name": "x", "steps": steps, "outputs": {"r": "{{ end }}"}})
    with redis.Redis.from_url(redis_url) as client:
        # Nobody takes tools yet: the message that the canvas sent is the one that is taken away.
        eventually(lambda: client.lpop(lane("ferrum.tool")))
        eventually(lambda: client.llen(lane("ferrum.tool")))
        fleet.start("-Q", "ferrum.tool", FERRUM_RESEND_AFTER="1", FERRUM_SWEEP="0.1")
        assert ferrum.wait(run_id, timeout_s=PATIENCE_S) == {"r": ["l", "right"]}
    assert lines(log) == [f"{run_id}.lost", f"{run_id}.right"]
    assert_events_agree(redis_url, run_id)


def test_what_follows_a_step_is_sent_though_its_worker_died_before_it_could(fleet: Fleet, redis_url: str) -> None:
    """The worker finished the step in the record and died before Celery had sent the next: acted here by hand."""
    steps = {"a": echo(1), "b": echo(2, needs=["a"]), "c": echo(3, needs=["a"]), "d": echo(4, needs=["b", "c"])}
    run_id = ferrum.submit({"name": "x", "steps": steps})
    with redis.Redis.from_url(redis_url) as client:
        assert client.delete(lane("ferrum.task")) == 1
    held = Held(run_id, "a", "dead:1:x#0")
    assert isinstance(record().claim(held, "dead:1:x", lease_s=1), Claimed)
    record().finish(
        held, StepStatus.COMPLETED, {"attempt": 1, "seconds": 0}, output=Kept(inline=1).dumps(), usage=Usage()
    )
    fleet.start()
    assert ended(run_id).status is RunStatus.COMPLETED
    assert not happened(run_id, "step.lost")
    assert len(happened(run_id, "step.started", "a")) == 1
    assert_events_agree(redis_url, run_id)


def test_the_record_answers_the_same_when_it_is_asked_again(clean_redis: str) -> None:
    """An answer that was lost on its way: the call is made once more, and nothing happens twice."""
    run_id = ferrum.submit({"name": "x", "steps": {"a": echo(1), "b": echo(2, needs=["a"]), "c": echo(3)}})
    held = Held(run_id, "a", "me:1:x#0")
    assert record().claim(held, "me:1:x", 10) == record().claim(held, "me:1:x", 10)
    assert record().claim(Held(run_id, "a", "you:1:x#0"), "you:1:x", 10) == Dropped("it is running")
    body, usage = {"attempt": 1, "seconds": 0}, Usage(tool_calls=1)
    first = record().finish(held, StepStatus.COMPLETED, body, output="1", usage=usage)
    again = record().finish(held, StepStatus.COMPLETED, body, output="1", usage=usage)
    assert (first, again.close) == (Ended(), False)
    assert [event.type for event in record().events(run_id)] == [
        "run.created", "run.started", "step.started", "step.completed",
    ]  # fmt: skip
    assert record().state(run_id).usage == usage
    assert_events_agree(clean_redis, run_id)


def _swept_lost(run_id: str) -> int:
    """How often its first step lost its worker, after one more look of the sweeper's."""
    record().sweep({}, resend_after_s=60, reap=True)
    return len(happened(run_id, "step.lost", "a"))


def test_a_step_that_kills_its_worker_again_and_again_is_given_up(fleet: Fleet, redis_url: str) -> None:
    run_id = ferrum.submit({"name": "x", "steps": {"a": echo(1), "b": echo(2, needs=["a"]), "c": echo(3)}})
    with redis.Redis.from_url(redis_url) as client:
        client.delete(lane("ferrum.task"))
    for number in range(POISON):
        # Else it waits, each time longer than before.
        record().nudge(run_id)
        worker = f"dead:{number}:x"
        held = Held(run_id, "a", f"{worker}#0")
        eventually(lambda held=held, name=worker: isinstance(record().claim(held, name, lease_s=0.01), Claimed))
        eventually(lambda lost=number + 1: _swept_lost(run_id) == lost)
    fleet.start(FERRUM_RESEND_AFTER="1")
    run = ended(run_id)
    assert (run.status, run.reason) == (RunStatus.FAILED, "'a' failed")
    assert {step.step_id: step.status.value for step in run.steps} == {
        "a": "failed", "b": "skipped", "c": "completed",
    }  # fmt: skip
    assert_events_agree(redis_url, run_id)


def test_a_step_that_its_worker_could_not_even_begin_is_not_held_for_ever(fleet: Fleet, redis_url: str) -> None:
    """Nobody could read the plan for a while; the worker that tried lives on and must let go of the step."""
    run_id = ferrum.submit({"name": "unread", "steps": {"a": echo(1), "b": echo(2, needs=["a"])}})
    with redis.Redis.from_url(redis_url) as client:
        [plan] = client.keys("ferrum:*:plan:*")
        document = client.hget(plan, " doc")
        assert document is not None
        client.hdel(plan, " doc")
        fleet.start(FERRUM_LEASE="1", FERRUM_HEARTBEAT="0.2")
        eventually(lambda: happened(run_id, "step.lost"))
        client.hset(plan, " doc", document)
    assert ended(run_id).status is RunStatus.COMPLETED
    assert_events_agree(redis_url, run_id)


def test_what_a_worker_could_not_send_is_sent_by_the_repair(fleet: Fleet, redis_url: str) -> None:
    """The broker refuses the worker's first messages after a step has finished; the worker lives on."""
    steps = {"a": echo(1), "b": echo(2, needs=["a"]), "c": echo(3, needs=["a"]), "d": echo(4, needs=["b"])}
    run_id = ferrum.submit({"name": "x", "steps": steps | {"e": echo(5, needs=["b", "c"])}})
    quick = {"FERRUM_LEASE": "1", "FERRUM_HEARTBEAT": "0.2", "FERRUM_RESEND_AFTER": "1"}
    worker = fleet.start(FERRUM_IMPORTS="user_tasks,mute", FERRUM_EXIT_WHEN_IDLE="1", **quick)
    assert ended(run_id).status is RunStatus.COMPLETED
    assert "this message cannot be sent" in fleet.log(0).read_text()
    assert len(happened(run_id, "step.completed")) == 5
    # It holds nothing any more, for only then does it stop by itself.
    assert worker.wait(PATIENCE_S) == 0
    assert_events_agree(redis_url, run_id)

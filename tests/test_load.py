"""A queue that is long is no reason to send anything again: without a fault each step is sent once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import redis
from fleet import Fleet, ended, eventually, happened, lane
from sizes import sized

import ferrum
from ferrum import runs
from ferrum.record import PARTITIONS
from ferrum.results import RunStatus

TASK = {"type": "task", "task": "user.asleep", "input": {"seconds": 0.002}}


def flow(steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "load", "steps": steps, **more}


def in_a_row(count: int) -> dict[str, Any]:
    return {f"s{i}": {**TASK, "needs": [f"s{i - 1}"] if i else []} for i in range(count)}


CHAIN = flow(in_a_row(4))
JOIN = flow({
    "a": TASK, "b": {**TASK, "needs": ["a"]}, "c": {**TASK, "needs": ["a"]}, "d": {**TASK, "needs": ["b", "c"]},
    "e": {**TASK, "needs": ["d"]},
})  # fmt: skip
CROSSED = flow({
    "a": TASK, "b": TASK, "c": {**TASK, "needs": ["a"]}, "d": {**TASK, "needs": ["a", "b"]},
    "e": {**TASK, "needs": ["c", "d"]},
})  # fmt: skip
WIDE = flow({
    "each": {**TASK, "for_each": "{{ input.items }}"}, "z": {**TASK, "needs": ["each"]},
}, inputs={"items": {"type": "array"}})  # fmt: skip
INSIDE = flow({"sub": {"type": "workflow", "workflow": CHAIN}, "z": {**TASK, "needs": ["sub"]}})


class Messages:
    """Counts what is published: every message is one LPUSH."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._before = self._all()

    def _all(self) -> int:
        stats: Any = self._client.info("commandstats")
        return int(stats.get("cmdstat_lpush", {"calls": 0})["calls"])

    def sent(self) -> int:
        return self._all() - self._before


@pytest.fixture
def client(clean_redis: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(clean_redis, decode_responses=True) as client:
        yield client


def lanes_of_messages(client: redis.Redis) -> dict[str, int]:
    lengths = {str(number): client.llen(lane("ferrum.task", number)) for number in range(10)}
    return {number: int(length) for number, length in lengths.items() if length}  # type: ignore[arg-type]


def lanes_of_the_record(client: redis.Redis) -> dict[str, int]:
    found: Counter[str] = Counter()
    for key in client.scan_iter("*:ready:ferrum.task:*"):
        found[str(key).rpartition(":")[2]] += int(client.zcard(key))  # type: ignore[arg-type]
    return dict(found)


def test_messages_lie_in_the_lane_where_the_record_looks_for_them(client: redis.Redis) -> None:
    """The ninth run of a tenant in a partition, and all after it, are served behind those of others."""
    for number in range(400):
        ferrum.submit(CHAIN, priority=(4, 4, 7)[number % 3], tenant=f"t{number % 2}")
    assert lanes_of_messages(client) == lanes_of_the_record(client)
    assert lanes_of_messages(client).keys() == {"2", "5", "7", "9"}


def keys_of_few_partitions() -> Iterator[str]:
    """Idempotency keys: runs of one key share a partition."""
    return (key for number in count() if crc32((key := f"key {number}").encode()) % PARTITIONS < 3)


@pytest.fixture
def fleet(clean_redis: str, tmp_path: Path) -> Iterator[Fleet]:
    """A fleet of the test's own: a worker that serves all tests of the file would take what is to wait."""
    fleet = Fleet(clean_redis, tmp_path, {"FERRUM_RESEND_AFTER": "1", "FERRUM_SWEEP": "0.1"})
    try:
        yield fleet
    finally:
        fleet.stop()


def test_every_message_of_a_run_comes_in_the_lane_of_the_run(fleet: Fleet) -> None:
    asking = {"type": "task", "task": "user.lane"}
    steps = {
        "a": asking, "b": {**asking, "needs": ["a"]}, "c": {**asking, "needs": ["a"]},
        "d": {**asking, "needs": ["b", "c"]}, "e": {**asking, "needs": ["d"]}, "f": {**asking, "needs": ["d"]},
        "g": {**asking, "needs": ["e", "f"]}, "h": {**asking, "needs": ["g"], "for_each": [1, 2]},
        "i": {"type": "workflow", "workflow": flow({"x": asking, "y": {**asking, "needs": ["x"]}}), "needs": ["h"]},
    }  # fmt: skip
    run_id = ferrum.submit(flow(steps), priority=2)
    fleet.start_alone()
    ended(run_id)
    every = [step for one in runs.record().runs() for step in runs.show(one.run_id).steps]
    came = {step.step_id: step.output for step in every if step.step_id not in ("h", "i")}
    assert came == dict.fromkeys(["a", "b", "c", "d", "e", "f", "g", "h.0", "h.1", "x", "y"], 7)


def test_runs_inside_a_wide_fan_out_are_served_as_its_items_are(fleet: Fleet) -> None:
    inside = flow({"x": {"type": "task", "task": "user.lane"}}, outputs={"lane": "{{ x }}"})
    each = {"type": "workflow", "workflow": inside, "for_each": "{{ input.items }}"}
    work = flow({"each": each}, inputs={"items": {"type": "array"}}, outputs={"lanes": "{{ each[*].lane }}"})
    run_id = ferrum.submit(work, {"items": list(range(103))})
    fleet.start_alone()
    assert ended(run_id).outputs == {"lanes": [4] * 100 + [9] * 3}


def sent_by_the_record(run_id: str) -> int:
    """One for each step that was begun, and one for each time that it was woken."""
    return len({event.step for event in happened(run_id, "step.started")}) + len(happened(run_id, "step.resumed"))


def messages_needed() -> int:
    every = [one.run_id for one in runs.record().runs(limit=10_000)]
    return sum(map(sent_by_the_record, every))


@pytest.mark.parametrize("threads", [(1,), (3,), (1, 2, 2)], ids=["one thread", "three", "three workers"])
def test_each_step_is_sent_once_however_long_it_waits(
    client: redis.Redis, fleet: Fleet, threads: tuple[int, ...]
) -> None:
    messages = Messages(client)
    found = [ferrum.submit(WIDE, {"items": list(range(130))})]
    shapes = (CHAIN, JOIN, CHAIN, CROSSED, CHAIN, INSIDE)
    for number, key in enumerate(islice(keys_of_few_partitions(), sized(120))):
        found.append(
            ferrum.submit(shapes[number % 6], key=key, priority=(4, 4, 4, 7, 0)[number % 5], tenant=f"t{number % 2}")
        )
    for concurrency in threads:
        fleet.start_alone("-c", str(concurrency))
    assert {ended(run_id).status for run_id in found} == {RunStatus.COMPLETED}
    assert messages.sent() == messages_needed()


@pytest.mark.parametrize("steps", [1, 3])
def test_who_has_hundreds_of_runs_waiting_holds_up_nobody_who_has_five(
    client: redis.Redis, fleet: Fleet, tmp_path: Path, steps: int
) -> None:
    log = tmp_path / "begun"
    task = {"type": "task", "task": "user.effects", "input": {"log": str(log), "every_s": 0, "count": 1}}
    work = flow({f"s{at}": {**task, "needs": [f"s{at - 1}"] if at else []} for at in range(steps)})
    messages = Messages(client)
    many = [ferrum.submit(work, tenant="many") for _ in range(200)]
    few = [ferrum.submit(work, tenant="few") for _ in range(5)]
    # Eight runs of a tenant in a partition are served before its others, which come behind those of all tenants.
    first = lanes_of_messages(client)["4"] - len(few)
    assert 0 < first <= 8 * PARTITIONS
    fleet.start_alone("-c", "1")
    assert {ended(run_id).status for run_id in [*many, *few]} == {RunStatus.COMPLETED}
    begun = [line.partition(".")[0] for line in log.read_text().splitlines()]
    last = max(at for at, run_id in enumerate(begun) if run_id in few)
    # Where but one thread works, a lane is never empty before its last step has ended.
    assert last == (first + len(few)) * steps - 1
    assert messages.sent() == messages_needed() == 205 * steps


def test_queues_of_one_lane_are_served_in_turn(fleet: Fleet) -> None:
    """Else steps of one type would hold up those of all others for as long as there are any."""
    ask = flow({"s": {"type": "approval", "message": "go on?"}})
    asks = [ferrum.submit(ask) for _ in range(40)]
    tasks = [ferrum.submit(flow({"s": TASK})) for _ in range(40)]
    fleet.start_alone("-c", "1")
    begun = [eventually(lambda one=one: happened(one, "step.started"))[0] for one in (*asks, *tasks)]  # type: ignore[misc]
    in_order = sorted(zip(begun, (*asks, *tasks), strict=True), key=lambda pair: pair[0].at)
    first = [run_id for _, run_id in in_order[:40]]
    # Within one, as two may begin in the same millisecond.
    assert sum(run_id in asks for run_id in first) == pytest.approx(20, abs=1)

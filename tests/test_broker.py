"""No message is lost between Redis and a worker, wherever either of them dies, and no other app's is touched."""

from __future__ import annotations

import json
import os
import random
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, eventually
from sizes import sized

import celeryconfig
from ferrum.broker import UNACKED, UNACKED_INDEX
from ferrum.testing.proxy import Proxy

#: What starts at once, and runs nothing.
WORKFLOW = {"name": "greet", "steps": {"ask": {"type": "approval", "message": "Go on?"}}}


def push(client: redis.Redis, *, task_id: str | None = None, queue: str = "ferrum", tag: str | None = None) -> str:
    """A message as docs/enqueue.md has it."""
    task_id = task_id or str(uuid.uuid4())
    message = {
        "body": json.dumps([[WORKFLOW], {}, {}]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "ferrum.run", "id": task_id},
        "properties": {
            "delivery_tag": tag or str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
        },
    }
    client.lpush(queue, json.dumps(message))
    return task_id


def answered(client: redis.Redis, task_id: str) -> bool:
    kept: Any = client.get(f"celery-task-meta-{task_id}")
    return kept is not None and json.loads(kept)["result"].keys() == {"run_id"}


def nothing_left(client: redis.Redis) -> bool:
    return not (client.llen("ferrum") or client.hlen(UNACKED) or client.zcard(UNACKED_INDEX))


def config(home: Path, **options: object) -> dict[str, str]:
    """The environment of workers with a `celeryconfig` in this home: ours, with other transport options."""
    lines = [f"broker_transport_options[{name!r}] = {value!r}\n" for name, value in options.items()]
    (home / "celeryconfig.py").write_text(Path(celeryconfig.__file__).read_text() + "".join(lines))
    return {"PYTHONPATH": os.pathsep.join([str(home), str(Path(__file__).parent)])}


@pytest.fixture
def client(clean_redis: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(clean_redis, decode_responses=True) as client:
        yield client


@pytest.fixture
def proxy(redis_url: str) -> Iterator[Proxy]:
    with Proxy(redis_url) as proxy:
        yield proxy


@pytest.fixture
def fleet(client: redis.Redis, proxy: Proxy, tmp_path: Path) -> Iterator[Fleet]:
    """Workers behind the proxy, which find what a dead one held after a second."""
    fleet = Fleet(proxy.url, tmp_path, config(tmp_path, visibility_timeout=1, unacked_restore_interval=0.2))
    try:
        yield fleet
    finally:
        proxy.rule = None
        fleet.stop()


def test_a_message_whose_answer_was_cut_off_is_put_back_and_started_once(
    fleet: Fleet, proxy: Proxy, client: redis.Redis
) -> None:
    worker = fleet.start()
    cut: list[bytes] = []

    def rule(data: bytes, up: bool) -> bool:
        if up or cut or b'"ferrum.run"' not in data:
            return True
        cut.append(data)
        return False

    proxy.rule = rule
    task_id = push(client)
    eventually(lambda: answered(client, task_id))
    assert len(cut) == 1
    eventually(lambda: nothing_left(client))
    assert worker.poll() is None


def test_a_question_that_was_cut_off_leaves_the_message_in_its_list(
    fleet: Fleet, proxy: Proxy, client: redis.Redis
) -> None:
    fleet.start()
    cut: list[bytes] = []

    def rule(data: bytes, up: bool) -> bool:
        # The worker has been told that its list was written to, and asks.
        if up and not cut and b"EVALSHA" in data and b"ferrum.task" in data:
            cut.append(data)
            return False
        return True

    proxy.rule = rule
    task_id = push(client)
    eventually(lambda: answered(client, task_id))
    assert len(cut) == 1
    eventually(lambda: nothing_left(client))


@pytest.mark.parametrize("answer_arrives", [True, False])
def test_a_worker_that_is_killed_with_a_message_in_hand_loses_none(
    fleet: Fleet, proxy: Proxy, client: redis.Redis, answer_arrives: bool
) -> None:
    first = fleet.start()

    def rule(data: bytes, up: bool) -> bool:
        if not up and b'"ferrum.run"' in data and first.poll() is None:
            first.kill()
            return answer_arrives
        return True

    proxy.rule = rule
    task_id = push(client)
    assert first.wait(PATIENCE_S) == -9
    proxy.rule = None
    assert client.hlen(UNACKED) == 1
    fleet.start()
    eventually(lambda: answered(client, task_id))
    eventually(lambda: nothing_left(client))


def test_kills_and_cuts_at_any_instant_lose_no_message(fleet: Fleet, proxy: Proxy, client: redis.Redis) -> None:
    choose = random.Random(8)
    fleet.start()
    sent: list[str] = []
    for kill in range(sized(2)):
        for _ in range(20):
            sent += [push(client) for _ in range(choose.randint(1, 5))]
            time.sleep(choose.uniform(0, 0.05))
            proxy.cut()
        sent += [push(client) for _ in range(20)]
        time.sleep(choose.uniform(0, 0.3))
        fleet.workers[kill].kill()
        fleet.start()
    eventually(lambda: all(answered(client, task_id) for task_id in sent))
    eventually(lambda: nothing_left(client))
    assert fleet.workers[-1].poll() is None

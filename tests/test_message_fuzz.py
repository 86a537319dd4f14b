"""Whatever is pushed to a queue, the worker answers the next good message: thousands of seeded mutations."""

from __future__ import annotations

import base64
import json
import random
import uuid
from pathlib import Path
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, eventually
from mutations import VALUES, mutations
from sizes import sized

import ferrum

WORKFLOW = {
    "name": "hello",
    "inputs": {"who": {"type": "string"}},
    "steps": {"hi": {"type": "task", "task": "user.echo", "input": {"value": "hi {{ input.who }}"}}},
    "outputs": {"said": "{{ hi }}"},
}
#: So many mutations go out before a good message that has to be answered.
BATCH = 60
RUN_BODY: list[Any] = [[WORKFLOW, {"who": "you"}], {}, {"callbacks": None, "errbacks": None, "chain": None}]
STEP_BODY: list[Any] = [["run_01M8HX4999NGGBVZ42QVBC4VBB", "hi"], {}, {"chain": [], "chord": None}]


def message(task: str, task_id: str, body: list[Any]) -> dict[str, Any]:
    return {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "any", "task": task, "id": task_id, "root_id": task_id, "eta": None, "retries": 0},
        "properties": {
            "correlation_id": task_id,
            "reply_to": "me",
            "delivery_mode": 2,
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": "ferrum"},
            "body_encoding": "base64",
            "priority": 0,
        },
    }


def a_run() -> dict[str, Any]:
    return message("ferrum.run", str(uuid.uuid4()), RUN_BODY)


def a_step() -> dict[str, Any]:
    return message("ferrum.task", ".".join(STEP_BODY[0]), STEP_BODY)


def _answered(client: redis.Redis) -> None:
    """A good message is answered, and whatever came before it has left the queue."""
    good = a_run()
    client.lpush("ferrum", json.dumps(good))
    kept: Any = eventually(lambda: client.get(f"celery-task-meta-{good['headers']['id']}"))
    assert json.loads(kept)["result"].keys() == {"run_id"}


def _most_memory(pid: int) -> int:
    """The most megabytes that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


@pytest.fixture
def client(redis_url: str, worker: Fleet) -> Any:
    """Redis, and one worker on it that is the same at the end, holds nothing and has not grown beyond bounds."""
    process = worker.workers[0]
    before = _most_memory(process.pid)
    with redis.Redis.from_url(redis_url) as client:
        yield client
        assert process.poll() is None
        eventually(lambda: not client.llen("ferrum") and not client.llen("ferrum.task") and not _held(client))
    # What one message may take, twice, and room for what Python keeps.
    assert _most_memory(process.pid) - before < 300


def _held(client: redis.Redis) -> int:
    return int(client.hlen("unacked")) + int(client.hlen("ferrum:unacked"))


@pytest.mark.parametrize(("queue", "make", "body"), [("ferrum", a_run, RUN_BODY), ("ferrum.task", a_step, STEP_BODY)])
def test_a_worker_outlives_every_mutation_of_a_message(
    client: redis.Redis, queue: str, make: Any, body: list[Any]
) -> None:
    for batch in range(sized(6)):
        for text in mutations(make, body, seed=batch, count=BATCH):
            client.lpush(queue, text.encode(errors="surrogatepass"))
        _answered(client)


def test_a_worker_outlives_every_mutation_of_a_control_message(client: redis.Redis) -> None:
    # Not before there is a Redis.
    from ferrum.celery import app

    channel = "/ferrum-0.celery.pidbox"
    for batch in range(sized(4)):
        random_ = random.Random(batch)
        for _ in range(BATCH):
            body: dict[str, Any] = {"method": "ping", "arguments": {}, "destination": None, "pattern": None}
            names = ("method", "arguments", "destination", "pattern", "matcher", "ticket", "reply_to", "self", "x")
            for name in random_.sample(names, random_.choice((1, 2))):
                body[name] = random_.choice(VALUES)
            whole = message("x", "y", [])
            whole["headers"]["clock"] = random_.choice((1, *VALUES))
            whole["body"] = base64.b64encode(json.dumps(body if random_.random() < 0.9 else [body]).encode()).decode()
            assert client.publish(channel, json.dumps(whole))
        for text in mutations(a_run, [{}, {}, {}], seed=batch, count=BATCH):
            client.publish(channel, text.encode(errors="surrogatepass"))
        # Asked once: a worker that made its connection anew would not have heard it.
        assert app.control.ping(timeout=PATIENCE_S, limit=1)
    _answered(client)


def test_none_of_ferrums_own_messages_is_dropped(client: redis.Redis) -> None:
    def echo(value: str, **more: object) -> dict[str, Any]:
        return {"type": "task", "task": "user.echo", "input": {"value": value}, **more}

    wide = {f"w{number}": echo("{{ a }}") for number in range(12)}
    wide |= {f"x{number}": echo(f"{{{{ w{number} }}}}") for number in range(12)}
    items = {"p": echo("{{ n }}"), "q": echo("{{ p }}"), "r": echo("{{ p }}"), "s": echo("{{ q + r }}")}
    steps: dict[str, Any] = {
        "a": echo("{{ 1 }}"),
        **wide,
        "b": echo(f"{{{{ {' + '.join(f'x{number}' for number in range(12))} }}}}"),
        "c": echo("{{ b }}"),
        "d": echo("{{ b }}"),
        "e": echo("{{ c + d }}"),
        "f": echo("{{ e }}"),
        "each": {"for_each": "{{ [1, 2, 3] }}", "as": "n", "steps": items},
        "later": {"type": "wait", "for": "0.1s", "needs": ["c"]},
        "g": echo("{{ f }}", needs=["later", "each"]),
    }
    run_id = ferrum.submit({"name": "wide", "steps": steps, "outputs": {"g": "{{ g }}"}})
    before = {letter.id for letter in ferrum.runs.dead_letters()}
    assert ferrum.wait(run_id, timeout_s=PATIENCE_S) == {"g": 24}
    assert not {letter.id for letter in ferrum.runs.dead_letters()} - before

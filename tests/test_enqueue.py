"""One Celery message, made by hand as any language can make it, starts a run."""

from __future__ import annotations

import base64
import json
import socket
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import redis
from fleet import Fleet, ended, eventually

from ferrum.broker import UNACKED
from ferrum.results import RunStatus
from ferrum.runs import record


def message(kwargs: dict[str, Any], task_id: str) -> str:
    """A Celery message (protocol 2) for the Redis list `ferrum`, made of nothing but JSON and base64."""
    body = [[], kwargs, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    return json.dumps(
        {
            "body": base64.b64encode(json.dumps(body).encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "any", "task": "ferrum.run", "id": task_id, "root_id": task_id},
            "properties": {
                "correlation_id": task_id,
                "delivery_mode": 2,
                "delivery_tag": str(uuid.uuid4()),
                "delivery_info": {"exchange": "", "routing_key": "ferrum"},
                "body_encoding": "base64",
                "priority": 0,
            },
        }
    )


WORKFLOW = {
    "name": "hello",
    "inputs": {"who": {"type": "string"}},
    "steps": {"hi": {"type": "task", "task": "user.echo", "input": {"value": "hi {{ input.who }}"}}},
    "outputs": {"said": "{{ hi }}"},
}


@pytest.fixture(scope="module")
def fleet(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(redis_url, tmp_path_factory.mktemp("enqueue"))
    (fleet.home / "echo.policy.yaml").write_text('allow: ["task:user.echo"]\n')
    try:
        fleet.start(FERRUM_POLICY=str(fleet.home / "echo.policy.yaml"))
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def result(client: redis.Redis, task_id: str) -> dict[str, Any]:
    """What Celery's result backend says of the message, once it does."""
    kept: Any = eventually(lambda: client.get(f"celery-task-meta-{task_id}"))
    return dict(json.loads(kept))


def test_a_message_made_by_hand_starts_a_run_and_its_result_is_the_runs_id(fleet: Fleet, client: redis.Redis) -> None:
    task_id = str(uuid.uuid4())
    client.lpush("ferrum", message({"workflow": WORKFLOW, "input": {"who": "you"}}, task_id))
    answer = result(client, task_id)
    assert answer["status"] == "SUCCESS"
    assert answer["result"].keys() == {"run_id"}
    run = ended(answer["result"]["run_id"])
    assert (run.status, run.outputs) == (RunStatus.COMPLETED, {"said": "hi you"})


def test_the_same_message_twice_starts_one_run(fleet: Fleet, client: redis.Redis) -> None:
    workflow, task_id = {**WORKFLOW, "name": uuid.uuid4().hex}, str(uuid.uuid4())
    for _ in range(2):
        client.lpush("ferrum", message({"workflow": workflow, "input": {"who": "you"}}, task_id))
    other = str(uuid.uuid4())
    client.lpush("ferrum", message({"workflow": workflow, "input": {"who": "you"}}, other))
    runs = {result(client, one)["result"]["run_id"] for one in (task_id, other)}
    assert len(runs) == 2
    eventually(lambda: not client.llen("ferrum") and not client.hlen(UNACKED))
    plans = [run.plan for run in record().runs(limit=1000)]
    ours = {record().plan_digest(run_id) for run_id in runs}
    assert [plan for plan in plans if plan in ours] == [*ours] * 2


def test_the_same_key_in_two_messages_starts_one_run(fleet: Fleet, client: redis.Redis) -> None:
    first, second, key = str(uuid.uuid4()), str(uuid.uuid4()), uuid.uuid4().hex
    for task_id in (first, second):
        client.lpush("ferrum", message({"workflow": WORKFLOW, "input": {"who": "you"}, "key": key}, task_id))
    assert result(client, first)["result"] == result(client, second)["result"]


def test_a_message_through_a_bare_socket_starts_a_run(fleet: Fleet, client: redis.Redis, redis_url: str) -> None:
    """As `redis-cli` would send it: the Redis protocol and nothing else."""
    task_id = str(uuid.uuid4())
    url = urlsplit(redis_url)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(unquote(url.path))
        raw.sendall(_command("AUTH", url.password or ""))
        raw.sendall(_command("SELECT", parse_qs(url.query)["db"][0]))
        raw.sendall(_command("LPUSH", "ferrum", message({"workflow": WORKFLOW, "input": {"who": "me"}}, task_id)))
        assert raw.makefile("rb").readline() == b"+OK\r\n"
        assert ended(result(client, task_id)["result"]["run_id"]).outputs == {"said": "hi me"}


def _command(*words: str) -> bytes:
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"workflow": {**WORKFLOW, "stepz": {}}}, "did you mean 'steps'"),
        (
            {"workflow": {"name": "x", "steps": {"a": {"type": "tsk", "task": "x"}}}},
            "steps.a.type: there is no",
        ),
        ({"workflow": WORKFLOW, "input": {}}, "who"),
        ({"workflow": WORKFLOW, "input": {"who": 1}}, "who"),
        ({"workflow": "hello.yaml"}, "workflow"),
        ({"workflow": WORKFLOW, "input": [1]}, "input"),
        ({"workflow": WORKFLOW, "imput": {}}, "'imput' is not known"),
        ({}, "'workflow' is missing"),
    ],
)
def test_what_cannot_be_started_says_why_and_where(
    fleet: Fleet, client: redis.Redis, arguments: dict[str, Any], error: str
) -> None:
    task_id = str(uuid.uuid4())
    client.lpush("ferrum", message(arguments, task_id))
    answer = result(client, task_id)
    assert (answer["status"], answer["result"].keys()) == ("SUCCESS", {"error"}), answer
    assert error in answer["result"]["error"]


def _but(**changes: Any) -> str:
    """A message in which some of what stands at its top is another, or is not there."""
    changed = {**json.loads(message({"workflow": WORKFLOW}, str(uuid.uuid4()))), **changes}
    return json.dumps({name: value for name, value in changed.items() if value is not None})


def _with(**changes: Any) -> str:
    properties: dict[str, Any] = json.loads(message({}, "any"))["properties"]
    changed = {**properties, **changes}
    return _but(properties={name: value for name, value in changed.items() if value is not None})


_HEADERS = {"task": "ferrum.run", "id": "slip"}
_PLAIN = {"delivery_tag": "slip", "delivery_info": {"exchange": "", "routing_key": "ferrum"}}


@pytest.mark.parametrize(
    "slip",
    [
        "}{",
        "7",
        _but(properties=None),
        _with(delivery_tag=None),
        _with(delivery_info={"exchange": ""}),
        _with(body_encoding="rot13"),
        _but(body="not base64"),
        _but(body=None),
        _but(headers=None),
        _but(headers={"task": "ferrum.run"}),
        _but(headers=_HEADERS, properties=_PLAIN, body="not JSON"),
        _but(headers=_HEADERS, properties=_PLAIN, body='"x"'),
        _but(headers=_HEADERS, properties=_PLAIN, body="[[], {}]"),
        _but(headers=_HEADERS, properties=_PLAIN, body="[[], [], 7]"),
    ],
)
def test_what_is_no_message_is_dropped_and_the_worker_goes_on(fleet: Fleet, client: redis.Redis, slip: str) -> None:
    client.lpush("ferrum", slip)
    task_id = str(uuid.uuid4())
    client.lpush("ferrum", message({"workflow": WORKFLOW, "input": {"who": "you"}}, task_id))
    assert result(client, task_id)["result"].keys() == {"run_id"}
    eventually(lambda: not client.llen("ferrum") and not client.hlen(UNACKED))
    assert fleet.workers[0].poll() is None

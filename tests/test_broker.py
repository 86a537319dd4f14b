"""No message is lost between Redis and a worker, wherever either of them dies, and no other app's is touched."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, ended, eventually, lane
from sizes import sized

import celeryconfig
import ferrum
from ferrum import broker
from ferrum.broker import UNACKED, UNACKED_INDEX, OwnConnection, SentinelTransport, Transport, renew
from ferrum.dead_letters import SAMPLE
from ferrum.local.redis import PrivateRedis, celery_url
from ferrum.messages import MAX_BYTES
from ferrum.record import base_of, new_run_id
from ferrum.results import RunStatus
from ferrum.testing.environment import environment
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


def test_two_messages_with_one_tag_are_two_messages(fleet: Fleet, client: redis.Redis) -> None:
    sent = [push(client, tag="slip") for _ in range(5)]
    fleet.start()
    eventually(lambda: all(answered(client, task_id) for task_id in sent))
    eventually(lambda: nothing_left(client))


def test_where_redis_tells_nothing_and_forgets_scripts_messages_are_taken_all_the_same(
    fleet: Fleet, client: redis.Redis
) -> None:
    client.acl_setuser(
        "narrow", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-client|tracking"]
    )
    try:
        fleet.environ["FERRUM_REDIS_URL"] = fleet.environ["FERRUM_REDIS_URL"].replace("redis://:", "redis://narrow:")
        worker = fleet.start()
        for _ in range(3):
            task_id = push(client)
            eventually(lambda task_id=task_id: answered(client, task_id))
            client.script_flush()
        assert "Redis does not tell this worker of new messages" in fleet.log(0).read_text()
        assert worker.poll() is None
    finally:
        fleet.stop()
        client.acl_deluser("narrow")


@pytest.mark.parametrize(
    ("url", "transport"),
    [
        ("redis://:p@here:1/2", Transport),
        ("redis://:p@here:1/2;redis://:p@there:1/2", Transport),
        ("rediss://:p@here:1/2?ssl_cert_reqs=required", Transport),
        ("redis+socket://:p@/run/redis.sock?virtual_host=2", Transport),
        ("sentinel://here:1;sentinel://there:1", SentinelTransport),
    ],
)
def test_every_way_to_redis_is_ferrums_own_also_after_a_failover_and_out_of_a_pool(
    url: str, transport: type[Transport]
) -> None:
    with OwnConnection(url) as connection, connection.Pool(1).acquire() as pooled:
        for one in (connection, connection.clone(), pooled):
            assert type(one.transport) is transport
            assert bool(one.ssl) == url.startswith("rediss")
            one.maybe_switch_next()
            assert type(one.transport) is transport


def test_of_an_element_that_is_no_message_for_its_size_only_the_beginning_leaves_redis(
    fleet: Fleet, proxy: Proxy, client: redis.Redis
) -> None:
    worker = fleet.start()
    came: list[int] = []

    def rule(data: bytes, up: bool) -> bool:
        came.append(0 if up else len(data))
        return True

    proxy.rule = rule
    size = MAX_BYTES + 1
    client.lpush("ferrum", b"x" * size)
    task_id = push(client)
    eventually(lambda: answered(client, task_id))
    eventually(lambda: nothing_left(client))
    assert sum(came) < 1_000_000
    # A worker that is too slow to say so is given what is left of it once more.
    letter = ferrum.runs.dead_letters()[-1]
    assert (letter.queue, letter.size, letter.whole) == ("ferrum", size, False)
    assert "more than 16,777,216 bytes" in letter.reason
    assert worker.poll() is None


def test_what_is_left_of_such_an_element_is_never_taken_for_a_message(channel: Any, client: redis.Redis) -> None:
    task_id = push(client)
    padded = client.rpop("ferrum")
    client.lpush("ferrum", str(padded) + " " * MAX_BYTES)
    taken = channel.run(broker._TAKE, [UNACKED, UNACKED_INDEX, "ferrum"], ["", "tag", MAX_BYTES, SAMPLE])
    assert taken[2] == len(str(padded)) + MAX_BYTES
    # Whoever took it has died.
    assert channel.qos.restore_by_tag("tag")
    with pytest.raises(Empty):
        channel._get("ferrum")
    (letter,) = ferrum.runs.dead_letters()
    assert not letter.whole
    assert not answered(client, task_id)


@pytest.mark.parametrize("key", ["ferrum.llm", lane("ferrum", 4)])
def test_a_worker_takes_from_its_other_lists_where_something_else_stands_in_place_of_one(
    fleet: Fleet, client: redis.Redis, key: str
) -> None:
    worker = fleet.start()
    client.xadd(key, {"mistaken": "for a stream"})
    task_id = push(client)
    eventually(lambda: answered(client, task_id))
    eventually(lambda: f"'{key}'".encode("unicode_escape").decode() in fleet.log(0).read_text())
    # It is there when a worker starts, too.
    fleet.stop()
    worker = fleet.start()
    task_id = push(client)
    eventually(lambda: answered(client, task_id))
    client.delete(key)
    task_id = push(client, queue=key) if key.startswith("ferrum\x06") else push(client)
    eventually(lambda: answered(client, task_id))
    assert worker.poll() is None


_KEYS = [
    UNACKED, "ferrum:workers", "ferrum:{p00}:timers", "ferrum:binding:ferrum", UNACKED_INDEX, "ferrum:died",
    "ferrum:revoked", "ferrum:lock:sweeper", "ferrum:artifact-store", "ferrum:binding:celery.pidbox",
]  # fmt: skip
#: Keys that hold a text, those that a worker speaks of, and those without which it takes messages and sweeps.
_TEXTS = {"ferrum:lock:sweeper", "ferrum:artifact-store"}
_SAID = {*_KEYS} - {"ferrum:artifact-store", "ferrum:binding:ferrum", "ferrum:binding:celery.pidbox"}
_STOPS = {UNACKED, UNACKED_INDEX, "ferrum:revoked", "ferrum:lock:sweeper"}


@pytest.mark.parametrize("key", _KEYS[: sized(4)])
def test_a_worker_outlives_something_else_in_place_of_a_key_of_ferrums(
    fleet: Fleet, client: redis.Redis, key: str
) -> None:
    # It looks at some of them a few times in a lease.
    fleet.environ["FERRUM_LEASE"] = "6"
    worker = fleet.start()
    waits = {"name": "waits", "steps": {"a": {"type": "wait", "for": "0.1s"}}}
    first = ferrum.submit(waits)
    ended(first)
    client.delete(key)
    (client.lpush if key in _TEXTS else client.set)(key, "mistaken")
    task_id = push(client)
    if key in _SAID:
        eventually(lambda: f"'{key}' in Redis is " in fleet.log(0).read_text())
    if key not in _STOPS:
        eventually(lambda: answered(client, task_id))
        assert ended(ferrum.submit(waits, key=_not_in("{p00}"))).status is RunStatus.COMPLETED
    # It is there when a worker starts, too.
    second = fleet.launch()
    eventually(lambda: b" ready." in fleet.log(1).read_bytes())
    client.delete(key)
    # What waited for it.
    eventually(lambda: answered(client, task_id))
    assert ended(ferrum.submit(waits)).status is RunStatus.COMPLETED
    assert (worker.poll(), second.poll()) == (None, None)
    assert not any(bad in fleet.log(0).read_text() for bad in ("Unrecoverable", "a sweep failed"))


def _not_in(partition: str) -> str:
    """A key of a run in another partition."""
    keys = (str(uuid.uuid4()) for _ in range(1000))
    return next(key for key in keys if partition not in base_of(new_run_id(key)))


@pytest.fixture
def channel(client: redis.Redis) -> Iterator[Any]:
    """A channel of ferrum's app, in this process."""
    from ferrum.celery import app

    with app.connection_for_read() as connection, connection.channel() as channel:
        yield channel


def test_a_message_that_is_put_back_is_in_its_list_again_and_counts_the_workers_that_were_lost_with_it(
    channel: Any, client: redis.Redis
) -> None:
    where = lane("ferrum", 3)
    push(client, queue=where)
    for times, worker in ((1, "lives"), (2, "is lost"), (2, "lives"), (3, "is lost")):
        message = channel.basic_get("ferrum")
        assert (client.llen(where), client.hlen(UNACKED), client.zcard(UNACKED_INDEX)) == (0, 1, 1)
        if worker == "lives":
            message.requeue()
        else:
            client.zadd(UNACKED_INDEX, {message.delivery_tag: 0})
            channel.qos.restore_visible()
        assert (client.llen(where), client.hlen(UNACKED), client.zcard(UNACKED_INDEX)) == (1, 0, 0)
        kept: Any = client.lindex(where, 0)
        info = json.loads(kept)["properties"]["delivery_info"]
        assert (info["redelivered"], info.get("deliveries", 1)) == (True, times)
    channel.basic_get("ferrum").ack()
    assert nothing_left(client)


def test_a_channel_that_closes_puts_back_what_it_has_and_what_was_on_its_way(channel: Any, client: redis.Redis) -> None:
    sent = [push(client) for _ in range(3)]
    taken: list[Any] = []
    channel.basic_qos(0, 2, False)
    channel.basic_consume("ferrum", no_ack=False, callback=taken.append, consumer_tag="c")
    while not taken:
        channel.connection.drain_events(channel.connection, timeout=1)
    # Asks for the second, whose answer nobody reads.
    channel.connection.cycle.on_poll_start()
    eventually(lambda: client.hlen(UNACKED) == 2)
    channel.close()
    kept: Any = client.lrange("ferrum", 0, -1)
    assert sorted(json.loads(text)["headers"]["id"] for text in kept) == sorted(sent)
    assert not client.hlen(UNACKED)


@pytest.mark.parametrize("end", ["ack", "reject", "requeue"])
def test_a_message_whose_end_redis_does_not_hear_of_holds_no_place_and_comes_again(
    channel: Any, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    def away(*_: object, **__: object) -> None:
        raise redis.exceptions.TimeoutError

    channel.basic_qos(0, 1, False)
    push(client)
    message = channel.basic_get("ferrum")
    channel.qos.append(message, message.delivery_tag)
    assert not channel.qos.can_consume()
    with monkeypatch.context() as patched:
        patched.setattr(channel, "run", away)
        with pytest.raises(redis.exceptions.TimeoutError):
            getattr(message, end)()
    assert channel.qos.can_consume()
    client.zadd(UNACKED_INDEX, {message.delivery_tag: 0})
    channel.qos.restore_visible()
    assert channel.basic_get("ferrum").body == message.body


def test_what_was_told_before_a_question_is_not_taken_for_its_answer(channel: Any, redis_server: PrivateRedis) -> None:
    channel.basic_consume("ferrum", no_ack=False, callback=lambda _: None, consumer_tag="c")
    channel.connection.cycle.on_poll_start()
    asked = channel.client.connection
    # That somebody has written to a list came with the answer before, and waits for a turn.
    asked._parser._reader.feed(b">2\r\n$10\r\ninvalidate\r\n*1\r\n$6\r\nferrum\r\n")
    eventually(lambda: broker._has_come(asked._sock))
    channel.look_after(time.monotonic() + channel._answer_s)
    assert asked._sock is not None, "its answer has come"
    with contextlib.suppress(Empty):
        channel.connection.cycle.on_readable(asked._sock.fileno())
    asked._parser._reader.feed(b">2\r\n$10\r\ninvalidate\r\n*1\r\n$6\r\nferrum\r\n")
    os.kill(redis_server.pid, signal.SIGSTOP)
    try:
        channel._in_poll, channel._waiting, channel._ask_from = None, False, 0
        channel.connection.cycle.on_poll_start()
        channel.look_after(time.monotonic() + channel._answer_s)
        assert asked._sock is None
    finally:
        os.kill(redis_server.pid, signal.SIGCONT)


def test_a_message_is_put_back_when_nobody_has_renewed_it_and_only_then(channel: Any, client: redis.Redis) -> None:
    for _ in range(2):
        push(client)
    held, left = channel.basic_get("ferrum"), channel.basic_get("ferrum")
    for message in (held, left):
        client.zadd(UNACKED_INDEX, {message.delivery_tag: 1})
    renew(client, [held.delivery_tag])
    channel.qos.restore_visible()
    assert (client.llen("ferrum"), client.hkeys(UNACKED)) == (1, [held.delivery_tag])
    held.ack()


def test_what_is_noted_as_taken_and_is_no_message_keeps_none_from_being_put_back(
    channel: Any, client: redis.Redis
) -> None:
    push(client)
    lost = channel.basic_get("ferrum")
    noted = {"a": "garbage", "b": "x:ferrum{}", "c": "999:ferrum", "d": "1" * 5_000 + ":ferrum{}"}
    client.hset(UNACKED, mapping=noted)
    client.zadd(UNACKED_INDEX, {**dict.fromkeys(noted, 1), lost.delivery_tag: 2})
    channel.qos.restore_visible()
    assert (client.llen("ferrum"), client.hlen(UNACKED), client.zcard(UNACKED_INDEX)) == (1, 0, 0)


def test_a_message_comes_to_who_waits_for_it_and_answers_that_are_not_acknowledged_are_not_kept(
    channel: Any, client: redis.Redis
) -> None:
    taken: list[Any] = []
    channel.basic_consume("ferrum", no_ack=True, callback=taken.append, consumer_tag="c")
    for _ in range(3):
        threading.Timer(0.1, push, (client,)).start()
        before = len(taken)
        while len(taken) == before:
            with contextlib.suppress(socket.timeout):
                channel.connection.drain_events(channel.connection, timeout=5)
        assert not client.hlen(UNACKED)
    channel.basic_cancel("c")


@pytest.mark.timeout(5 * PATIENCE_S)
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
    # Whatever the killed ones held comes back in portions.
    eventually(lambda: all(answered(client, task_id) for task_id in sent), timeout_s=3 * PATIENCE_S)
    eventually(lambda: nothing_left(client))
    assert fleet.workers[-1].poll() is None


@pytest.mark.parametrize("lease_s", [1.0, 2.0, 8.0, 3600.0])
@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_a_connection_is_given_up_well_within_a_lease_however_short_it_is(
    client: redis.Redis, proxy: Proxy, redis_url: str, lease_s: float, scheme: str
) -> None:
    from ferrum.celery import App
    from ferrum.scripts import TIMEOUT_S

    url = celery_url(redis_url) if scheme == "unix" else proxy.url
    most_s = min(TIMEOUT_S, lease_s / 4)
    with environment({"FERRUM_LEASE": str(lease_s), "FERRUM_HEARTBEAT": "0.3"}):
        app = App("timed", set_as_current=False, amqp=broker.Broker, broker=url, backend=url)
        app.loader.override_backends = broker.BACKENDS
        # An operator's own, be they longer or none.
        app.conf.update(broker_transport_options={"socket_timeout": 60}, redis_socket_timeout=None)
        try:
            with app.connection_for_read() as connection:
                channel = connection.default_channel
                kept = channel.pool.connection_kwargs, app.backend.connparams
                assert [options["socket_timeout"] for options in kept] == [most_s, most_s]
                assert {options.get("socket_connect_timeout", 0) <= min(2, most_s) for options in kept} == {True}
                # What it waits for an answer on the connection where messages come, after so long without any.
                assert channel.brpop_timeout + channel._answer_s <= lease_s / 2
        finally:
            app.close()


def test_the_next_question_begins_behind_the_queue_that_was_served() -> None:
    from ferrum.broker import _InTurn

    queues = _InTurn()
    queues.update(["c", "a", "b"])
    assert queues.consume(3) == ["a", "b", "c"]
    queues.rotate("b")
    assert queues.consume(3) == ["c", "a", "b"]
    # One that is no longer asked for, whose last message is still on its way.
    queues.rotate("gone")
    assert queues.consume(3) == ["c", "a", "b"]
    queues.rotate("c")
    assert queues.consume(3) == ["a", "b", "c"]

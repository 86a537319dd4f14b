"""Redis refuses for some seconds: everybody waits, and nothing is lost or done twice."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, assert_events_agree, ended, eventually, happened
from redis import exceptions
from redis._parsers.base import BaseParser

import ferrum
from ferrum.errors import NotFound, Unavailable
from ferrum.local.redis import PrivateRedis
from ferrum.record import Record, new_run_id
from ferrum.refusals import Refused, locked_out, passes, refusal
from ferrum.results import RunStatus
from ferrum.schedules import Beat
from ferrum.scripts import CONNECT_TIMEOUT_S
from ferrum.testing.proxy import Proxy
from ferrum.testing.refusing import REFUSALS, refused


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def three_times(log: Path, seconds: float = 0.4) -> dict[str, Any]:
    """A step, three beside each other, their join: each leaves a line when it begins, and takes some time."""
    step = {"type": "task", "task": "user.sleep", "input": {"seconds": seconds, "log": str(log)}}
    middle = {f"b{number}": step | {"needs": ["a"]} for number in range(3)}
    return {"name": "three", "steps": {"a": step, **middle, "c": step | {"needs": list(middle)}}}


def begun(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def fleet(redis_url: str, tmp_path: Path) -> Fleet:
    return Fleet(redis_url, tmp_path)


def test_a_connection_that_goes_silent_is_given_up_and_made_anew(fleet: Fleet, redis_url: str, tmp_path: Path) -> None:
    log = tmp_path / "begun"
    with Proxy(redis_url) as proxy:
        worker = fleet.start_alone(FERRUM_REDIS_URL=proxy.url)
        try:
            assert ended(ferrum.submit(three_times(log, 0))).status is RunStatus.COMPLETED
            proxy.go_silent()
            assert ended(ferrum.submit(three_times(log, 0))).status is RunStatus.COMPLETED
            # And where nothing at all comes through for a while.
            proxy.dead = True
            proxy.go_silent()
            run_id = ferrum.submit(three_times(log, 0))
            time.sleep(3)
            proxy.dead = False
            proxy.cut()
            assert ended(run_id).status is RunStatus.COMPLETED
            assert worker.poll() is None
        finally:
            fleet.stop()


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_redis_refuses_for_a_while_is_waited_for_by_all(
    worker: Fleet, redis_url: str, client: redis.Redis, tmp_path: Path, kind: str
) -> None:
    log = tmp_path / "begun"
    run_id = ferrum.submit(three_times(log))
    eventually(lambda: begun(log) >= 2)
    with REFUSALS[kind](client):
        # Steps end meanwhile, and have nowhere to say so.
        assert kind in refused(client)
        time.sleep(1)
    assert ended(run_id).status is RunStatus.COMPLETED
    assert begun(log) == 5
    assert not happened(run_id, "step.lost")
    assert worker.workers[0].poll() is None
    assert "Unrecoverable" not in worker.log(0).read_text()
    assert_events_agree(redis_url, run_id)
    # The consumer, too, is there again.
    assert ended(ferrum.submit(three_times(log, 0))).status is RunStatus.COMPLETED


@pytest.mark.parametrize("kind", ["READONLY", "BUSY"])
def test_submit_says_within_seconds_that_redis_refuses(
    clean_redis: str, client: redis.Redis, tmp_path: Path, kind: str
) -> None:
    with REFUSALS[kind](client), pytest.raises(Unavailable, match=rf"Redis refuses for now, .* \({kind}\)"):
        ferrum.submit(three_times(tmp_path / "begun"))


def test_submit_asks_no_longer_than_five_seconds_for_a_redis_that_is_not_there() -> None:
    assert ferrum.runs._PATIENCE_S + max(CONNECT_TIMEOUT_S, 0.25) <= 5
    record = Record("redis://127.0.0.1:1/0", patience_s=0.2)
    with pytest.raises(Unavailable, match=r"Redis does not answer \(ConnectionError\); is it running, and not full\?"):
        record.status(new_run_id())


def test_what_the_record_has_is_submitted_though_the_broker_takes_no_message(
    worker: Fleet, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ferrum.broker import Channel

    def refuse(*_: object, **__: object) -> None:
        raise Refused("READONLY")

    with monkeypatch.context() as patched:
        patched.setattr(Channel, "_put", refuse)
        patched.setattr(Channel, "_put_fanout", refuse)
        run_id = ferrum.submit(three_times(tmp_path / "begun", 0))
    # The sweeper of a worker sends it.
    assert ended(run_id).status is RunStatus.COMPLETED
    assert begun(tmp_path / "begun") == 5


ANSWERS = {
    "READONLY You can't write against a read only replica.": "READONLY",
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)": "UNBLOCKED",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": "MASTERDOWN",
    "NOREPLICAS Not enough good replicas to write.": "NOREPLICAS",
    "MISCONF Errors writing to the AOF file: No space left on device": "MISCONF",
    "OOM command not allowed when used memory > 'maxmemory'. script: 5d3, on @user_script:1.": "OOM",
    "BUSY Valkey is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": "BUSY",
    "LOADING Valkey is loading the dataset in memory": "LOADING",
    "CLUSTERDOWN The cluster is down": "CLUSTERDOWN",
    "TRYAGAIN Multiple keys request during rehashing of slot": "TRYAGAIN",
    "EXECABORT Transaction discarded because of: NOREPLICAS Not enough good replicas to write.": "NOREPLICAS",
    # These last.
    "EXECABORT Transaction discarded because of previous errors.": "",
    "BUSYKEY Target key name already exists.": "",
    "BUSYGROUP Consumer Group name already exists": "",
    "WRONGTYPE Operation against a key holding the wrong kind of value": "",
    "ERR unknown command 'EVALSHA'": "",
    "NOSCRIPT No matching script.": "",
    "MOVED 3999 127.0.0.1:6381": "",
    "NOPERM User ann has no permissions to run the 'set' command": "",
    "WRONGPASS invalid username-password pair or user is disabled.": "",
    "NOAUTH Authentication required.": "",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_pass_are_told_from_those_that_last(answer: str) -> None:
    error = BaseParser.parse_error(answer)
    found = refusal(error)
    assert (found.code if found else "") == ANSWERS[answer]
    assert passes(error) is bool(ANSWERS[answer])
    assert locked_out(error) is answer.startswith(("NOPERM", "WRONGPASS", "NOAUTH"))
    # Said once more, as by the connection of who passes it on.
    assert found is None or refusal(found) is found


def test_a_redis_that_is_away_passes_and_what_is_no_answer_of_redis_does_not() -> None:
    assert passes(exceptions.ConnectionError("Error 111 connecting"))
    assert passes(exceptions.TimeoutError("Timeout reading"))
    assert passes(exceptions.ReadOnlyError("You can't write against a read only replica."))
    assert not passes(ValueError("READONLY"))


def test_whom_redis_does_not_let_in_is_told_at_once(redis_url: str) -> None:
    record = Record(redis_url.replace("unix://:", "unix://:not-", 1), patience_s=PATIENCE_S)
    with pytest.raises(Unavailable, match=r"Redis does not let us in: .*; is the user or the password in FERRUM"):
        record.status(new_run_id())


def test_whom_redis_knew_before_is_waited_for_while_its_password_changes(client: redis.Redis, redis_url: str) -> None:
    record = Record(redis_url, patience_s=PATIENCE_S)
    known = record.runs(limit=1)
    client.acl_setuser("default", enabled=True, reset_passwords=True, passwords="+another")
    record.close_connections()
    password = redis_url.partition("unix://:")[2].partition("@")[0]
    back = threading.Timer(0.5, client.acl_setuser, ("default",), {"enabled": True, "passwords": f"+{password}"})
    back.start()
    assert record.runs(limit=1) == known
    back.join()
    client.acl_setuser("default", enabled=True, passwords="-another")


def says(fleet: Fleet, what: str) -> int:
    """How often the first worker said so until now."""
    return fleet.log(0).read_text().count(what)


WAITS = "this worker waits for Redis and then goes on"


def test_a_worker_that_is_started_on_a_replica_or_before_redis_says_so_once_and_goes_on_when_it_can(
    fleet: Fleet, tmp_path: Path
) -> None:
    with PrivateRedis(tmp_path / "late") as server:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("REPLICAOF", "127.0.0.1", "1")
        worker = fleet.launch(FERRUM_REDIS_URL=server.url)
        eventually(lambda: says(fleet, f"{WAITS}: Redis refuses for now, it is a replica, which takes no writes"))
        server.kill()
        time.sleep(0.3)
        # Of a replica, nothing of it being one is left.
        server.start()
        eventually(lambda: says(fleet, " ready."))
        assert says(fleet, WAITS) == 1
        assert says(fleet, "Redis is there again after") == 1
        worker.terminate()
        assert worker.wait(PATIENCE_S) == 0


def test_a_worker_that_waits_for_redis_can_be_stopped(fleet: Fleet) -> None:
    worker = fleet.launch(FERRUM_REDIS_URL="redis://127.0.0.1:1/0")
    eventually(lambda: says(fleet, WAITS))
    worker.terminate()
    assert worker.wait(PATIENCE_S) == 0


def test_a_worker_that_redis_does_not_let_in_does_not_start(fleet: Fleet, redis_url: str) -> None:
    worker = fleet.launch(FERRUM_REDIS_URL=redis_url.replace("unix://:", "unix://:not-", 1))
    assert worker.wait(PATIENCE_S) == 1
    assert says(fleet, "this worker cannot start: Redis does not let us in")


class _Old(PrivateRedis):
    """Without what came with Redis 7."""

    def _config(self, data: Path) -> str:
        return super()._config(data) + "rename-command LMPOP ''\n"


def test_a_worker_whose_redis_is_older_than_7_does_not_start(fleet: Fleet, tmp_path: Path) -> None:
    with _Old(tmp_path / "old") as server:
        worker = fleet.launch(FERRUM_REDIS_URL=server.url)
        assert worker.wait(PATIENCE_S) == 1
    assert says(fleet, "this worker cannot start: its Redis has no LMPOP; ferrum needs Redis 7 or later, or Valkey")
    assert not says(fleet, "Traceback")


def test_beat_waits_for_a_redis_that_refuses_and_says_so_once(
    clean_redis: str, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    from ferrum.celery import app

    # Whatever level another test's worker has left to the root.
    caplog.set_level(logging.WARNING, "ferrum.schedules")
    beat = Beat(app=app, lazy=True)
    with REFUSALS["READONLY"](client):
        for _ in range(2):
            assert beat.tick() <= beat.max_interval
    assert beat.tick() <= beat.max_interval
    waited, went_on = (record.getMessage() for record in caplog.records if record.name == "ferrum.schedules")
    assert waited.startswith("beat waits for Redis and then goes on: Redis refuses for now, it is a replica")
    assert went_on.endswith(": beat goes on")


def test_whoever_waits_for_a_run_hears_that_its_data_are_gone(clean_redis: str, client: redis.Redis) -> None:
    run_id = ferrum.submit({"name": "x", "steps": {"a": {"type": "approval", "message": "go on?"}}})
    gone = threading.Timer(0.3, client.flushall)
    gone.start()
    with pytest.raises(NotFound, match="it may have been removed"):
        ferrum.wait(run_id, timeout_s=PATIENCE_S)
    gone.join()


def test_whoever_waits_for_a_run_outlasts_a_failover(worker: Fleet, client: redis.Redis, tmp_path: Path) -> None:
    run_id = ferrum.submit(three_times(tmp_path / "begun"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ferrum.wait, run_id, timeout_s=PATIENCE_S)
        with REFUSALS["MASTERDOWN"](client):
            time.sleep(4)
        assert waiting.result() is None


def test_whoever_waits_for_a_run_with_a_limit_waits_no_longer_for_redis(
    clean_redis: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ferrum.runs, "_WAITING_PATIENCE_S", 10 * PATIENCE_S)
    run_id = ferrum.submit({"name": "x", "steps": {"a": {"type": "approval", "message": "go on?"}}})
    with REFUSALS["MASTERDOWN"](client), pytest.raises(Unavailable):
        ferrum.wait(run_id, timeout_s=0.5)

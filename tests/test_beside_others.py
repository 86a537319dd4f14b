"""ferrum in the process, and on the Redis, of somebody who has a Celery app of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, eventually
from preloading import into
from test_broker import config

from ferrum.local.redis import celery_url


@pytest.fixture
def environ(clean_redis: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    return {**os.environ, "PYTHONPATH": path, "THEIR_REDIS": celery_url(clean_redis), "FERRUM_POLICY": ""}


@pytest.fixture
def theirs(environ: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of theirs, ready."""
    log = tmp_path / "theirs.log"
    options = ["-c", "4", "-P", "threads", "-l", "info", "-n", "theirs@here", "--without-gossip", "--without-mingle"]
    with log.open("wb") as out:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "their_app", "worker", *options],
            env=into(environ), cwd=tmp_path, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        eventually(lambda: b" ready." in log.read_bytes())
        yield worker
    finally:
        worker.kill()
        worker.wait()


def test_the_messages_of_another_app_on_the_same_database_are_its_own(
    theirs: subprocess.Popen[bytes], environ: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    log = tmp_path / "began"
    fleet = Fleet(redis_url, tmp_path, config(tmp_path, visibility_timeout=1, unacked_restore_interval=0.2))
    try:
        fleet.start()
        code = (
            "import sys; from their_app import app, long\n"
            "long.apply_async((sys.argv[1], 3))\n"
            "long.apply_async((sys.argv[1], 0), countdown=3)\n"
        )
        command = [sys.executable, "-c", code, str(log)]
        subprocess.run(command, env=into(environ, "-c"), check=True, timeout=PATIENCE_S)
        with redis.Redis.from_url(redis_url) as client:
            eventually(lambda: client.hlen("unacked") == 2)
            # They hold both for three times as long as ferrum lets messages lie, which it looks for all the time.
            eventually(lambda: not client.hlen("unacked"))
        assert log.read_text().splitlines() == ["began"] * 2
        said = eventually(lambda: "another Celery app" in fleet.log(0).read_text())
        assert said
    finally:
        fleet.stop()


def test_remote_control_reaches_the_workers_of_its_own_app_only(
    theirs: subprocess.Popen[bytes], environ: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    fleet = Fleet(redis_url, tmp_path)
    try:
        fleet.start("-n", "ours@here")
        for app, name in (("their_app", "theirs@here"), ("ferrum", "ours@here")):
            command = [sys.executable, "-W", "ignore", "-m", "celery", "-A", app, "inspect", "ping", "--json"]
            assert eventually(partial(_asked, command, into({**fleet.environ, **environ}))) == {name: {"ok": "pong"}}
    finally:
        fleet.stop()


def _asked(command: list[str], environ: dict[str, str]) -> Any:
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


# In a process.

#: Prints, as JSON, what `tell` says, in a process with an app and shared tasks of its own.
_PROCESS = """
import gc, json, logging, os, signal, sys, threading, warnings, locale, asyncio
from celery import Celery, shared_task, signals, _state
import celery.app.backends, celery.app.task, kombu.transport, kombu.transport.redis, kombu.transport.virtual
import kombu.utils.json, kombu.connection, kombu.serialization, redis.connection, redis.client

def members(of):
    return {f"{getattr(of, '__name__', of)}.{name}": id(value) for name, value in vars(of).items()
            if name != "__warningregistry__"}

def state():
    found = {}
    for module in (kombu.transport, kombu.transport.redis, kombu.transport.virtual, kombu.utils.json, kombu.connection,
                   kombu.serialization, celery.app.backends, celery.app.task, redis.connection, redis.client):
        found |= members(module)
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= members(value)
    found |= {f"transport {name}": str(cls) for name, cls in kombu.transport.TRANSPORT_ALIASES.items()}
    found |= {f"signal {number}": str(signal.getsignal(number)) for number in signal.valid_signals()}
    for name in signals.__all__:
        found[f"receivers of {name}"] = len(getattr(signals, name).receivers)
    known = [one for one in list(logging.root.manager.loggerDict.values()) if isinstance(one, logging.Logger)]
    for one in [logging.root, *known]:
        plain = (one.level, one.propagate, one.disabled,
                 len([handler for handler in one.handlers if not isinstance(handler, logging.NullHandler)]))
        if one is logging.root or plain != (0, True, False, 0):
            found[f"logger {one.name}"] = plain
    found |= {"current app": id(_state._tls.current_app), "default app": id(_state.default_app),
              "environment": dict(os.environ), "warnings": [str(one) for one in warnings.filters],
              "directory": os.getcwd(), "path": list(sys.path),
              "hooks": [id(sys.excepthook), id(threading.excepthook), id(sys.stdout), id(sys.stderr)],
              "locale": locale.setlocale(locale.LC_ALL), "collects": gc.isenabled(), "limit": sys.getrecursionlimit()}
    return found

def differences(before):
    after = state()
    return {name: [str(before.get(name)), str(after.get(name))] for name in before.keys() | after.keys()
            if before.get(name) != after.get(name)}
"""

_USE = """
before = state()
import ferrum
run_id = ferrum.submit({"name": "x", "steps": {"a": {"type": "task", "task": "mine.shared"}}})
ferrum.runs.show(run_id)
ferrum.runs.cancel(run_id)
from ferrum.testing import run_inline
assert run_inline({"name": "y", "inputs": {"n": {"type": "integer"}}, "steps": {"a": {"type": "wait", "for": "1s"}},
                   "outputs": {"n": "{{ input.n + 1 }}"}}, {"n": 1}).outputs == {"n": 2}
told = differences(before)
"""

_APP = 'app = Celery("mine", broker="memory://", backend="cache+memory://")\n'

_SHARED = """
@shared_task(name="mine.shared")
def shared():
    return 1
"""

_TELL = """
shared.delay()
with app.connection() as connection:
    waiting = connection.channel()._size("celery")
print(json.dumps({"told": told, "is theirs": shared.app is app, "waiting": waiting}))
"""


@pytest.mark.parametrize(
    "order",
    [
        pytest.param([_APP, _SHARED, _USE], id="an app and then ferrum"),
        pytest.param([_SHARED, _USE, _APP], id="tasks, then ferrum, then an app"),
        pytest.param([_USE, _APP, _SHARED], id="ferrum first of all"),
    ],
)
def test_using_ferrum_changes_nothing_for_the_rest_of_the_process(
    clean_redis: str, environ: dict[str, str], tmp_path: Path, order: list[str]
) -> None:
    code = "".join([_PROCESS, *order, _TELL])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environ, cwd=tmp_path, capture_output=True, text=True,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"told": {}, "is theirs": True, "waiting": 1}
    with redis.Redis.from_url(clean_redis) as client:
        assert not client.exists("celery")

"""Ways to make a real Redis refuse, each for as long as its `with` lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

_PATIENCE_S = 60.0


def _eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError("the Redis that was to refuse does not")
        time.sleep(0.02)


@contextmanager
def _readonly(client: redis.Redis) -> Iterator[None]:
    # Of a master that nobody is: it keeps its data, and whoever waits for a message is thrown out (UNBLOCKED).
    client.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        client.replicaof("NO", "ONE")


@contextmanager
def _masterdown(client: redis.Redis) -> Iterator[None]:
    client.config_set("replica-serve-stale-data", "no")
    try:
        with _readonly(client):
            yield
    finally:
        client.config_set("replica-serve-stale-data", "yes")


def _set(name: str, value: str, before: str) -> Callable[[redis.Redis], AbstractContextManager[None]]:
    @contextmanager
    def refusing(client: redis.Redis) -> Iterator[None]:
        client.config_set(name, value)
        try:
            yield
        finally:
            client.config_set(name, before)

    return refusing


@contextmanager
def _busy(client: redis.Redis) -> Iterator[None]:
    client.config_set("busy-reply-threshold", "1")

    def be_busy() -> None:
        pool = client.connection_pool
        # Waits for as long as it takes, and asks once: asked again, it would be busy again.
        kwargs = {**pool.connection_kwargs, "socket_timeout": None, "retry": Retry(NoBackoff(), 0)}
        own = redis.ConnectionPool(pool.connection_class, **kwargs)
        with redis.Redis.from_pool(own) as busy, suppress(redis.exceptions.ResponseError):
            busy.eval("while true do end", 0)

    thread = threading.Thread(target=be_busy)
    thread.start()

    def refuses() -> bool:
        try:
            return not client.ping()
        except redis.exceptions.ResponseError as error:
            return str(error).startswith("BUSY ")

    try:
        _eventually(refuses)
        yield
    finally:
        client.script_kill()
        thread.join()
        client.config_set("busy-reply-threshold", "5000")


@contextmanager
def _misconf(client: redis.Redis) -> Iterator[None]:
    """A disk that takes nothing: there is a directory where the server wants to write its file."""
    config: Any = client.config_get()
    place = Path(config["dir"]) / config["dbfilename"]

    def saves(how: str) -> bool:
        return bool(client.info("persistence")["rdb_last_bgsave_status"] == how)

    # Else the only thing that is wrong would be that a save is under way.
    _eventually(lambda: not client.info("persistence")["rdb_bgsave_in_progress"])
    place.unlink(missing_ok=True)
    (place / "full").mkdir(parents=True)
    client.config_set("save", "3600 1")
    try:
        client.bgsave()
        _eventually(lambda: saves("err"))
        yield
    finally:
        client.config_set("save", "")
        (place / "full").rmdir()
        place.rmdir()
        client.bgsave()
        _eventually(lambda: saves("ok"))


#: By the first word of what Redis says.
REFUSALS: dict[str, Callable[[redis.Redis], AbstractContextManager[None]]] = {
    "READONLY": _readonly,
    "MASTERDOWN": _masterdown,
    "NOREPLICAS": _set("min-replicas-to-write", "1", "0"),
    "OOM": _set("maxmemory", "1", "0"),
    "BUSY": _busy,
    "MISCONF": _misconf,
}


def refused(client: redis.Redis) -> set[str]:
    """The first words of what Redis says to a write and to a read."""
    return {_answer(lambda: client.set("refusing", "1")), _answer(lambda: client.get("refusing"))}


def _answer(call: Callable[[], object]) -> str:
    try:
        call()
    except redis.exceptions.ResponseError as error:
        return error.status_code or str(error).partition(" ")[0]
    return ""

"""The heartbeat of a process of steps: what renews its leases, and what stops its acts when they cannot be renewed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha1
from pathlib import Path
from typing import Any

import redis
from redis.connection import SSLConnection, parse_url

from ferrum import keeper
from ferrum.errors import Unavailable
from ferrum.executor import Holds, Line, Shared
from ferrum.keeper import clock
from ferrum.record import Record
from ferrum.scripts import script
from ferrum.sentinels import watched

log = logging.getLogger(__name__)

AWAY = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, Unavailable)

#: What the keeper needs of this process's environment: where an interpreter and certificates are.
_PASSED_ON = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR")
#: The most that waits to be told to a keeper that does not read.
_MOST_BYTES = 1 << 22


class Every:
    """Something done again and again, on a thread of its own."""

    def __init__(self, name: str, every_s: float, once: Callable[[], None]) -> None:
        self._every_s = every_s
        self._once = once
        self._next_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def soon(self, in_s: float | None) -> None:
        """Take the next turn in so many seconds, if that is earlier than it would be."""
        if in_s is not None:
            self._next_s = max(0.01, min(self._every_s, in_s))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopped.wait(self._next_s):
            self._next_s = self._every_s
            self._once()


class Watch:
    """The keeper's process (`ferrum/keeper.py`): started by the first claim, told of each, started again if it dies.

    Safe to share between threads. It must not be what a step fails by: where it cannot be started, the pulse renews
    alone.
    """

    def __init__(
        self, redis_url: str, *, lease_s: float, grace_s: float, heartbeat_s: float, timeout_s: float,
        custody: tuple[str, str],
    ) -> None:  # fmt: skip
        """`custody`: where the broker has the messages that workers hold, and the script that renews them there."""
        index, renew = custody
        self._config = {
            "redis": _where(redis_url),
            "lease_s": lease_s,
            "grace_s": grace_s,
            "tick_s": min(heartbeat_s, lease_s / 12),
            "timeout_s": timeout_s,
            "index": index,
            "scripts": {
                "renew": script("", "renew"),
                "slots": script("shared", "limits/renew"),
                "digests": script("shared", "cache/renew"),
                "custody": (sha1(renew.encode(), usedforsecurity=False).hexdigest(), renew),
            },
        }
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting = bytearray()
        self._heard = b""
        self._not_before = 0.0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def tell(self, line: Line, lines: Callable[[], Sequence[Line]]) -> None:
        """Tell it this; a new keeper is told `lines` instead, which is all that it must know."""
        with self._lock:
            if self._process is None:
                self._start(lines)
            else:
                self._send([line])

    def _start(self, lines: Callable[[], Sequence[Line]]) -> None:
        if (now := clock()) < self._not_before or not (known := lines()):
            return
        self._not_before = now + 1
        environ = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        try:
            self._process = subprocess.Popen(  # noqa: S603 - ours
                [sys.executable, "-I", "-S", str(Path(keeper.__file__))], env=environ, cwd="/",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        except OSError as error:
            log.warning("leases are renewed by this process alone, a keeper cannot be started: %s", error)
            return
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self._send([self._config, *known])

    def _send(self, lines: Sequence[Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        for line in lines:
            self._waiting += json.dumps(line).encode() + b"\n"
        try:
            while self._waiting:
                del self._waiting[: os.write(self._process.stdin.fileno(), self._waiting)]
        except BlockingIOError:
            if len(self._waiting) > _MOST_BYTES:
                self._end()
        except OSError:
            self._end()

    def answers(self) -> list[Any]:
        """Return the words that it said since."""
        with self._lock:
            if self._process is None:
                return []
            assert self._process.stdout is not None
            try:
                while data := os.read(self._process.stdout.fileno(), 1 << 16):
                    self._heard += data
                self._end()
            except BlockingIOError:
                pass
            *lines, self._heard = self._heard.split(b"\n")
            return [json.loads(line) for line in lines]

    def stop(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        """It ends at the end of its pipe; one that does not is killed."""
        process, self._process = self._process, None
        self._waiting.clear()
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def forget(self) -> None:
        """In a child of this process: the keeper is its parent's, who alone must hold the pipes."""
        process, self._process = self._process, None
        self._lock = threading.Lock()
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):
                    pipe.close()
            # Not this process's child, and not to be complained about.
            process.returncode = 0


def _where(redis_url: str) -> dict[str, Any]:
    """Return the parts of the URL, as the keeper wants them; there is no parser in it."""
    if behind := watched(redis_url):
        asked = {"username": behind.sentinel_username, "password": behind.sentinel_password}
        return {
            "username": behind.username, "password": behind.password, "db": behind.db, "master": behind.master,
            "sentinels": [{**asked, "host": host, "port": port} for host, port in behind.sentinels],
        }  # fmt: skip
    said: dict[str, Any] = parse_url(redis_url)  # type: ignore[no-untyped-call]
    found: dict[str, Any] = {name: said[name] for name in ("username", "password", "db", "path") if name in said}
    found |= {"host": said.get("host", "localhost"), "port": said.get("port", 6379)}
    if said.get("connection_class") is SSLConnection:
        found["tls"] = {name.removeprefix("ssl_"): value for name, value in said.items() if name.startswith("ssl_")} | {
            "check_hostname": said.get("ssl_check_hostname", True)
        }
    return found


class Pulse:
    """Renews the leases of this process and hears which steps are no longer its own.

    So a cancelled run stops here within one beat, and a step whose lease ran out while this process was stopped does
    not go on beside its successor. Where leases cannot be renewed, acts are stopped before those are over.
    """

    def __init__(
        self,
        record: Record,
        holds: Holds,
        shared: Shared,
        *,
        every_s: float,
        lease_s: float,
        watch: Watch | None = None,
    ) -> None:
        self._record = record
        self._shared = shared
        self._holds = holds
        self._lease_s = lease_s
        self._watch = watch
        self._renewed_at = 0.0
        self._every = Every("ferrum-pulse", every_s, self.beat)
        # Apart from the pulse, which waits for Redis.
        self._guard = Every("ferrum-guard", min(every_s, lease_s / 16), self.guard)
        if watch is not None:
            holds.listen(watch.tell, watch.answers)

    def start(self) -> None:
        self._every.start()
        self._guard.start()

    def stop(self) -> None:
        self._guard.stop()
        self._every.stop()
        self.beat()
        if self._watch is not None:
            self._watch.stop()

    def forget(self) -> None:
        """In a child of this process."""
        if self._watch is not None:
            self._watch.forget()

    def beat(self) -> None:
        released = self._holds.take_released()
        began = clock()
        try:
            if released:
                self._record.release(released)
                released = []
            if held := self._holds.current():
                lost = self._record.renew(held, self._lease_s)
                self._holds.lose(lost)
                self._holds.renewed(held, began)
            self._renewed_at = began
            if slots := self._holds.slots():
                self._shared.limits.renew(slots, 2 * self._lease_s)
            if digests := self._holds.digests():
                self._shared.cache.renew(digests, 2 * self._lease_s)
        except AWAY as error:
            self._holds.put_back(released)
            log.warning("leases were not renewed, Redis does not answer: %s", type(error).__name__)
        except Exception:
            # Without a pulse, every step of this worker would be given to another while it runs here.
            self._holds.put_back(released)
            log.exception("leases were not renewed")

    def guard(self) -> None:
        """Hear the keeper, let it hear that this process is well, and stop what has not been renewed for too long."""
        if self._holds.current():
            self._holds.say(["=", self._renewed_at])
        self._holds.cut_off()

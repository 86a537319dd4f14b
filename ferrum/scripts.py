"""How Redis is asked to run a Lua script: by its name, and patiently.

A script is one atomic change. Redis may have done it although its answer is lost, so every script is written to be
asked again; that is what makes it right to be patient.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib import resources
from typing import Any, Self, TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.retry import Retry

from ferrum.errors import Misplaced, Unavailable
from ferrum.refusals import Refused, locked_out, misplaced, passes, patient
from ferrum.sentinels import pool_of

#: How long an answer may take, and a connection. Under a lease, so that a connection that has gone silent is given up
#: while there is time to renew it on another; over what a blocking read waits.
TIMEOUT_S = 4.0
CONNECT_TIMEOUT_S = 2.0

#: How long one blocking read waits at most; a run that is gone is noticed this late.
BLOCK_S = 2.0

_T = TypeVar("_T")


def timeout_of(lease_s: float) -> float:
    """Return how long a connection to Redis may be silent: well below a lease, so that a dead one costs none."""
    return min(TIMEOUT_S, lease_s / 4)


@dataclass(frozen=True, slots=True, order=True)
class Who:
    """The step on whose behalf something that all runs share is asked for."""

    run_id: str
    step_id: str

    def __str__(self) -> str:
        """As the scripts know it."""
        return f"{self.run_id} {self.step_id}"

    @classmethod
    def of(cls, text: str) -> Self:
        """The one that `str` was made of."""
        run_id, _, step_id = text.partition(" ")
        return cls(run_id, step_id)


@dataclass(frozen=True, slots=True)
class _Script:
    text: str
    sha: str


@cache
def _script(folder: str, name: str) -> _Script:
    *rooms, last = name.split("/")
    places = [resources.files("ferrum") / "lua" / folder]
    for room in rooms:
        places.append(places[-1] / room)
    libs = [lib.read_text() for place in places if (lib := place / "lib.lua").is_file()]
    text = "".join(libs) + (places[-1] / f"{last}.lua").read_text()
    return _Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


def script(folder: str, name: str) -> tuple[str, str]:
    """The sha and the text of a script, for whoever has it run without this module."""
    found = _script(folder, name)
    return found.sha, found.text


class Scripts:
    """The scripts of one folder, through one Redis client. Safe to share between threads."""

    def __init__(
        self, client: redis.Redis, patience_s: float = 5.0, *, folder: str = "shared", until: float = math.inf
    ) -> None:
        """`client` decodes responses. `patience_s`: how long a call outlasts a Redis that is away, but not beyond
        `until`, of `time.monotonic`.

        A script `room/name` is `ferrum/lua/<folder>/room/name.lua`, with the `lib.lua` of the folder and that of the
        room, where there is one, put before it.
        """
        self._redis = client
        self._patience_s = patience_s
        self._until = until
        self._folder = folder
        self._let_in = False

    def eval(self, name: str, key_base: str, *arguments: str | int) -> Any:
        """Run the script and return its answer. Raises `Unavailable`, and `Misplaced` for a key of another kind."""
        script = _script(self._folder, name)

        def once() -> Any:
            try:
                return self._redis.evalsha(script.sha, 1, key_base, *arguments)
            except redis.exceptions.NoScriptError:
                return self._redis.eval(script.text, 1, key_base, *arguments)

        try:
            return self.patiently(once)
        except redis.exceptions.ResponseError as error:
            if misplaced(error) and (kind := str(self.patiently(lambda: self._redis.type(key_base)))) != "none":
                raise Misplaced(key_base, kind) from error
            raise

    def eval_each(
        self, name: str, key_bases: Sequence[str], *arguments: str | int, pass_over: bool = False
    ) -> list[Any]:
        """Run the script for each of these bases, in one round trip. Raises `Unavailable`.

        With `pass_over`, an empty list is the answer of one that has a key of another kind.
        """
        script = _script(self._folder, name)

        def once() -> list[Any]:
            # A pipeline that was executed is empty, so each try fills a new one.
            pipe = self._redis.pipeline(transaction=False)
            for key_base in key_bases:
                pipe.evalsha(script.sha, 1, key_base, *arguments)
            return known(pipe.execute(raise_on_error=not pass_over))

        def loaded() -> list[Any]:
            try:
                return once()
            except redis.exceptions.NoScriptError:
                self._redis.script_load(script.text)
                return once()

        return self.patiently(loaded)

    def patiently(self, call: Callable[[], _T]) -> _T:
        """Make the call once Redis answers and takes it. Raises `Unavailable` when it does not for too long.

        A user that Redis does not let in is told at once; one that it knew before is waited for, as a password that is
        being changed is no reason to lose what was done.
        """
        deadline = min(time.monotonic() + self._patience_s, self._until)
        while True:
            try:
                answer = call()
            except redis.exceptions.RedisError as error:
                shut = locked_out(error)
                if not shut and not passes(error):
                    raise
                if time.monotonic() >= deadline or (shut and not self._let_in):
                    raise unavailable(error) from error
                time.sleep(random.uniform(0.05, 0.25))  # noqa: S311
            else:
                self._let_in = True
                return answer


def known(answers: list[Any]) -> list[Any]:
    """The answers of Redis, where an empty list stands for one of a key of another kind. Raises other errors."""
    for answer in answers:
        if isinstance(answer, Exception) and not misplaced(answer):
            raise answer
    return [[] if isinstance(answer, Exception) else answer for answer in answers]


def unavailable(error: BaseException) -> Unavailable:
    """Return what to say of a Redis that is away, refuses for now, or lets nobody in."""
    if isinstance(error, Refused):
        return Unavailable(f"{error}; look at its log and its replication")
    if locked_out(error):
        return Unavailable(f"Redis does not let us in: {error}; is the user or the password in FERRUM_REDIS_URL right?")
    return Unavailable(f"Redis does not answer ({type(error).__name__}); is it running, and not full?")


class Outage:
    """Tells an operator once that Redis is away, or refuses for now, and once that it is back."""

    def __init__(self, log: logging.Logger, who: str) -> None:
        """`who` waits meanwhile."""
        self._log = log
        self._who = who
        self._since: float | None = None

    def began(self, error: BaseException) -> None:
        if self._since is None:
            self._since = time.monotonic()
            what = error if isinstance(error, Unavailable) else unavailable(error)
            self._log.warning("%s waits for Redis and then goes on: %s", self._who, what)

    def over(self) -> None:
        if self._since is not None:
            seconds = time.monotonic() - self._since
            self._log.warning("Redis is there again after %.1f s: %s goes on", seconds, self._who)
            self._since = None


def client_of(url: str, *, connections: int = 256, timeout_s: float = TIMEOUT_S) -> redis.Redis:
    """A client that decodes, tries each call once, gives up a silent connection, and raises `Refused`."""
    pool = pool_of(
        url, decode_responses=True, retry=Retry(NoBackoff(), 0), max_connections=connections,
        socket_timeout=timeout_s, socket_connect_timeout=min(timeout_s, CONNECT_TIMEOUT_S),
    )  # fmt: skip
    pool.connection_class = patient(pool.connection_class)
    return redis.Redis.from_pool(pool)


class Connection:
    """One Redis client, its scripts, and patience with a Redis that is away. Safe to share between threads."""

    def __init__(
        self, url: str, *, patience_s: float = 5.0, timeout_s: float = TIMEOUT_S, connections: int = 256,
        folder: str = "",
    ) -> None:  # fmt: skip
        """`patience_s`: how long a call outlasts a Redis that is away before it raises `Unavailable`.

        `timeout_s`: a connection on which nothing came for so long is given up, and the call is made on another one.
        """
        self._redis = client_of(url, connections=connections, timeout_s=timeout_s)
        #: For reads that wait for up to `BLOCK_S`, which is longer than a connection may be silent else.
        self._waiting = client_of(url, connections=connections, timeout_s=BLOCK_S + timeout_s)
        self._folder = folder
        self._set_patience(patience_s)

    def _set_patience(self, patience_s: float, until: float = math.inf) -> None:
        self._patience_s = patience_s
        self._scripts = Scripts(self._redis, patience_s, folder=self._folder, until=until)
        self._patiently = self._scripts.patiently

    def with_patience(self, patience_s: float, until: float = math.inf) -> Self:
        """The same, through the same client, with another patience, which ends at `until` of `time.monotonic`."""
        other = copy(self)
        other._set_patience(patience_s, until)
        return other

    def scripts(self) -> Scripts:
        """The scripts of what all runs share, through the same client."""
        return Scripts(self._redis, self._patience_s)

    def close_connections(self) -> None:
        for client in (self._redis, self._waiting):
            client.close()
            client.connection_pool.disconnect()

    def _at_once(self, fill: Callable[[Pipeline], None], *, transaction: bool = False) -> list[Any]:
        """The replies to several commands. A pipeline that was executed is empty, so a new one is filled each time."""
        pipe = self._redis.pipeline(transaction=transaction)
        fill(pipe)
        return pipe.execute()


class Room:
    """What the rooms of all that runs share have in common: they ask scripts, and scripts ask what time it is."""

    def __init__(self, scripts: Scripts, clock: Callable[[], float] | None = None) -> None:
        """`clock`, in seconds, is for tests that move time by hand; everybody else goes by the clock of Redis."""
        self._scripts = scripts
        self._clock = clock

    def _ask(self, name: str, key_base: str, *arguments: str | int) -> Any:
        return self._scripts.eval(name, key_base, self._now(), *arguments)

    def _now(self) -> str:
        return "" if self._clock is None else str(us(self._clock()))


def us(seconds: float) -> int:
    """The scripts count in microseconds."""
    return round(seconds * 1_000_000)


def whos(texts: object) -> list[Who]:
    """Those that a script names."""
    return [Who.of(text) for text in cast("list[str]", texts)]

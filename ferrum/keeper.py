"""Renews the leases of a process of steps while C code holds its interpreter.

    python -I -S keeper.py

A program of its own, which the process starts beside itself and feeds through a pipe: no thread of a process runs while
C code in it (a regular expression, a parser) keeps the GIL, and its steps would be given to others. It imports little,
connects when it is first needed, and ends with the process. Lines are JSON; times are those of `clock`.

It is told, on its standard input:

    {…}                                          first of all: a `Config`
    ["+", token, claimed at, {…}]                a claim, or what changed of it (`Claim`)
    ["-", token]                                 it is held no longer
    ["=", time]                                  the process is well, and renewed its leases itself at that time

and answers on its standard output:

    ["=", time, [token, …]]                      these were renewed
    ["!", [token, …]]                            these are lost
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

#: The most that is read of the pipe at once.
_CHUNK = 1 << 16
#: How often it looks, while nothing is held, whether its parent is still there: the end of the pipe tells it sooner.
_IDLE_S = 5.0


def clock() -> float:
    """Seconds that go on while the machine sleeps, where the system has such a clock; the same in every process."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


def is_stopped(pid: int) -> bool:
    """Tell whether this process does not go on, by a signal or a debugger."""
    try:
        if sys.platform == "linux":
            # The name, in parentheses, may have anything in it.
            with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123 - `pathlib` is half of its start
                state = stat.read().rpartition(b")")[2].split()[0]
        else:  # pragma: no cover - not on Linux
            with os.popen(f"ps -o state= -p {pid}") as listed:  # noqa: S605 - a number
                state = listed.read().strip().encode()
    except OSError:
        return True
    return state[:1] in (b"T", b"t", b"Z", b"X", b"")


class Refused(Exception):
    """An answer of Redis that is an error."""


class Wire:
    """One connection to Redis that speaks RESP2. Raises `OSError` where Redis does not answer in time."""

    def __init__(self, where: dict[str, Any], timeout_s: float) -> None:
        self._where = where
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._buffer = b""

    def ask(self, commands: list[list[str]]) -> list[Any]:
        """The answers to these commands; an error of one is a `Refused` in its place."""
        try:
            return self._ask(commands)
        except (OSError, ValueError):
            self.close()
            raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._buffer = None, b""

    def _ask(self, commands: list[list[str]]) -> list[Any]:
        if self._socket is None:
            self._socket = self._connected()
            greetings = self._greetings()
            self._socket.sendall(b"".join(map(_packed, greetings)))
            for _ in greetings:
                if isinstance(error := self._read(), Refused):
                    raise OSError(str(error))
        self._socket.sendall(b"".join(map(_packed, commands)))
        return [self._read() for _ in commands]

    def _greetings(self) -> list[list[str]]:
        where = self._where
        found = []
        if where.get("password"):
            found.append(["AUTH", *([where["username"]] if where.get("username") else []), where["password"]])
        if where.get("db"):
            found.append(["SELECT", str(where["db"])])
        return found

    def _connected(self) -> socket.socket:
        where = self._where
        if where.get("path"):
            made = socket.socket(socket.AF_UNIX)
            made.settimeout(self._timeout_s)
            made.connect(where["path"])
            return made
        address = self._master() if where.get("sentinels") else (where["host"], where["port"])
        made = socket.create_connection(address, self._timeout_s)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _secured(made, where) if where.get("tls") else made

    def _master(self) -> tuple[str, int]:
        """The server that one of the sentinels says is the master."""
        for sentinel in self._where["sentinels"]:
            wire = Wire(sentinel, self._timeout_s)
            try:
                [answer] = wire.ask([["SENTINEL", "get-master-addr-by-name", self._where["master"]]])
            except (OSError, ValueError):
                continue
            finally:
                wire.close()
            if isinstance(answer, list):
                return answer[0], int(answer[1])
        raise ConnectionError("no sentinel knows the master")

    def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            self._more()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def _more(self) -> None:
        assert self._socket is not None
        if not (data := self._socket.recv(_CHUNK)):
            raise ConnectionError("Redis closed the connection")
        self._buffer += data

    def _read(self) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            return Refused(rest.decode(errors="replace"))
        if kind == b":":
            return int(rest)
        if kind == b"*":
            return [self._read() for _ in range(int(rest))]
        if kind != b"$":
            return rest.decode()
        length = int(rest)
        if length < 0:
            return None
        while len(self._buffer) < length + 2:
            self._more()
        text, self._buffer = self._buffer[:length], self._buffer[length + 2 :]
        return text.decode(errors="replace")


def _packed(command: list[str]) -> bytes:
    parts = [part.encode() for part in command]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def _secured(plain: socket.socket, where: dict[str, Any]) -> socket.socket:
    import ssl

    tls = where["tls"]
    context = ssl.create_default_context(cafile=tls.get("ca_certs"), capath=tls.get("ca_path"))
    context.check_hostname = bool(tls.get("check_hostname")) and tls.get("cert_reqs") != "none"
    if tls.get("cert_reqs") in ("none", "optional"):
        context.verify_mode = ssl.CERT_NONE if tls["cert_reqs"] == "none" else ssl.CERT_OPTIONAL
    if tls.get("certfile"):
        context.load_cert_chain(tls["certfile"], tls.get("keyfile"))
    return context.wrap_socket(plain, server_hostname=where["host"])


class Claim:
    """One claim of the process."""

    __slots__ = ("at", "base", "digest", "is_known", "run_id", "slot", "step_id", "tag", "token", "until")

    def __init__(self, token: str, at: float, said: dict[str, Any]) -> None:
        self.token = token
        #: When it was last renewed, as far as is known.
        self.at = at
        #: Whether Redis had it once: it is told before it is claimed.
        self.is_known = False
        self.base: str = said["base"]
        self.run_id: str = said["run"]
        self.step_id: str = said["step"]
        #: When its attempt is to be over; `None` where it has all the time there is.
        self.until: float | None = said.get("until")
        #: What it has of all that runs share: a place, and what it computes (a base and a digest).
        self.slot: str = said.get("slot", "")
        self.digest: list[str] = said.get("digest", [])
        #: Of the message that brought it.
        self.tag: str = said.get("tag", "")

    @property
    def who(self) -> str:
        return f"{self.run_id} {self.step_id}"


class Keeper:
    """The keeper: its claims, and the renewals that they are due."""

    def __init__(self, config: dict[str, Any], wire: Wire, answer: Any, kill: Any, stopped: Any) -> None:
        """`answer` takes a line, `kill` the words to say before it ends the process, `stopped` says whether it is."""
        self._lease_s: float = config["lease_s"]
        self._grace_s: float = config["grace_s"]
        self._scripts: dict[str, list[str]] = config["scripts"]
        self._index: str = config["index"]
        self._wire = wire
        self._answer, self._kill, self._stopped = answer, kill, stopped
        self.claims: dict[str, Claim] = {}
        #: Claims that are lost and still run, and since when.
        self._lost: dict[str, Claim] = {}
        self._renewed = self._heard = self._looked = clock()
        self._again = 0.0

    def hear(self, line: bytes) -> None:
        said = json.loads(line)
        self._heard = clock()
        if said[0] == "+":
            known = self.claims.get(said[1])
            self.claims[said[1]] = Claim(*said[1:])
            self.claims[said[1]].is_known = known is not None and known.is_known
        elif said[0] == "-":
            self.claims.pop(said[1], None)
            self._lost.pop(said[1], None)
        else:
            self._renewed = max(self._renewed, said[1])

    def look(self) -> None:
        """Renew what the process does not, and end it where a step in it is far over its time and it says nothing."""
        now = clock()
        # It was asleep itself, and so was the process.
        if now - self._looked > self._lease_s / 2:
            self._heard = now
        self._looked = now
        if not self.claims and not self._lost:
            return
        late = [one for one in self.claims.values() if now - max(one.at, self._renewed) > self._lease_s / 3]
        quiet = now - self._heard > max(self._grace_s, self._lease_s / 2)
        if not late and not quiet:
            return
        if self._stopped():
            self._heard = now
            return
        if quiet:
            self._end_what_is_over(now)
        if late and now >= self._again:
            self._renew(now)

    def _end_what_is_over(self, now: float) -> None:
        for one in (*self.claims.values(), *self._lost.values()):
            if one.until is not None and now > one.until + self._grace_s:
                why = "is lost" if one.token in self._lost else "is over its time"
                self._kill(
                    f"{one.run_id}.{one.step_id} {why} since {now - one.until:.1f} s, and this process has said nothing"
                    f" for {now - self._heard:.1f} s: something in it holds the interpreter. It is killed; its steps go"
                    " on elsewhere"
                )
                return

    def _renew(self, now: float) -> None:
        """Ask once for all; where Redis does not answer, again in a moment."""
        # An attempt is not kept beyond its time: it ends, or the process is ended.
        kept = [
            one for one in self.claims.values() if one.until is None or now <= one.until + self._grace_s
        ]  # fmt: skip
        try:
            lost = self._renewed_at_redis(kept)
        except (OSError, ValueError, Refused):
            # A master that has become a replica refuses for good on a connection that stays open.
            self._wire.close()
            self._again = now + self._lease_s / 16
            return
        # What it never renewed may be on its way to be claimed.
        unknown = [one for one in lost if not one.is_known]
        lost = [one for one in lost if one.is_known]
        for one in lost:
            # Whoever has lost it must not go on with it for long.
            one.until = now if one.until is None else min(now, one.until)
            self._lost[one.token] = self.claims.pop(one.token)
        kept = [one for one in kept if one.token in self.claims and one not in unknown]
        for one in kept:
            one.at, one.is_known = now, True
        if lost:
            self._answer(["!", [one.token for one in lost]])
        self._answer(["=", now, [one.token for one in kept]])

    def _renewed_at_redis(self, kept: list[Claim]) -> list[Claim]:
        """Renew these; returns those that are no longer held."""
        groups: dict[str, list[Claim]] = {}
        for one in kept:
            groups.setdefault(one.base, []).append(one)
        asked = [
            self._command(
                "renew", base, "", round(self._lease_s * 1000),
                *(text for one in group for text in (one.run_id, one.step_id, one.token)),
            )
            for base, group in groups.items()
        ]  # fmt: skip
        replies = self._ask(asked)
        self._ask([*self._shared(kept), *self._custody(kept)])
        return [group[int(number)] for group, reply in zip(groups.values(), replies, strict=True) for number in reply]

    def _shared(self, kept: list[Claim]) -> list[list[str]]:
        hold_us = round(2_000_000 * self._lease_s)
        slots = [text for one in kept if one.slot for text in (one.slot, one.who)]
        asked = [self._command("slots", "ferrum:{limits}", "", hold_us, *slots)] if slots else []
        computing = [one for one in kept if one.digest]
        return asked + [
            self._command("digests", one.digest[0], "", hold_us // 1000, one.digest[1], one.who) for one in computing
        ]

    def _custody(self, kept: list[Claim]) -> list[list[str]]:
        tags = [one.tag for one in kept if one.tag]
        return [self._command("custody", self._index, *tags)] if tags else []

    def _command(self, script: str, base: str, *arguments: str | int) -> list[str]:
        return ["EVALSHA", self._scripts[script][0], "1", base, *map(str, arguments)]

    def _ask(self, commands: list[list[str]]) -> list[Any]:
        replies = self._wire.ask(commands)
        texts = {sha: text for sha, text in self._scripts.values()}
        for number, reply in enumerate(replies):
            if isinstance(reply, Refused) and str(reply).startswith("NOSCRIPT"):
                command = commands[number]
                [replies[number]] = self._wire.ask([["EVAL", texts[command[1]], *command[2:]]])
        for reply in replies:
            if isinstance(reply, Refused):
                raise reply
        return replies


class _Lines:
    """The lines of a pipe, read without waiting."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._rest = b""
        os.set_blocking(pipe, False)

    def read(self) -> list[bytes] | None:
        """Return the ones that came; `None` at its end."""
        found: list[bytes] = []
        while True:
            try:
                data = os.read(self._pipe, _CHUNK)
            except BlockingIOError:
                return found
            if not data:
                return None
            *lines, self._rest = (self._rest + data).split(b"\n")
            found += lines


def main() -> None:
    parent = os.getppid()
    # It ends with its process and not before: whoever stops a group means that one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    lines, ends, comes = _Lines(0), select.poll(), select.poll()
    # Of a pipe that is asked for nothing the poll says when its other end is closed, and wakes for nothing else.
    ends.register(0, 0)
    comes.register(0, select.POLLIN)
    keeper: Keeper | None = None
    tick_s = _IDLE_S

    def answer(line: list[Any]) -> None:
        try:
            os.write(1, json.dumps(line).encode() + b"\n")
        except (BlockingIOError, BrokenPipeError):
            # It hears of it from Redis.
            return

    def kill(words: str) -> None:
        os.write(2, f"ferrum keeper of {parent}: {words}\n".encode())
        os.kill(parent, signal.SIGKILL)

    os.set_blocking(1, False)
    while os.getppid() == parent:
        if (came := lines.read()) is None:
            return
        if came and keeper is None:
            config = json.loads(came.pop(0))
            tick_s = config["tick_s"]
            keeper = Keeper(
                config, Wire(config["redis"], config["timeout_s"]), answer, kill, lambda: is_stopped(parent)
            )
        for line in came if keeper else ():
            keeper.hear(line)  # type: ignore[union-attr]
        if keeper is not None:
            keeper.look()
        # Many lines are read at once: whoever has much to do wakes it no more often than whoever has little.
        if came or (keeper is not None and keeper.claims):
            ends.poll(tick_s * 1000)
        else:
            comes.poll(_IDLE_S * 1000)


if __name__ == "__main__":
    main()

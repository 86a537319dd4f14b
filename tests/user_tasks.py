"""A user's own Celery tasks, for `type: task` steps."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import shared_task
from celery._state import _task_stack

from ferrum.errors import StepError


@shared_task(name="user.echo")
def echo(value: Any = None) -> Any:
    return value


@shared_task(name="user.nothing")
def nothing() -> None:
    pass


@shared_task(name="user.boom")
def boom(message: str = "no") -> None:
    raise ValueError(message)


class Own(BaseException):
    pass


_ENDS: dict[str, type[BaseException]] = {
    "exit": SystemExit, "keyboard": KeyboardInterrupt, "cancelled": asyncio.CancelledError, "generator": GeneratorExit,
    "own": Own,
}  # fmt: skip


def _leave(how: str, words: Any) -> None:
    raise _ENDS[how](words)


@shared_task(name="user.leave")
def leave(how: str, words: Any = None) -> None:
    """Ends by an exception that is no `Exception`."""
    _leave(how, words)


@shared_task(name="user.leave_later")
async def leave_later(how: str, words: Any = None) -> None:
    await asyncio.sleep(0.01)
    _leave(how, words)


@shared_task(name="user.sleep")
def sleep(seconds: float, log: str | None = None) -> float:
    """Sleeps in small pieces, so that it can be interrupted; writes to `log` when it begins."""
    if log:
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\n")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    return seconds


@shared_task(name="user.asleep")
async def asleep(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


@shared_task(name="user.fail_until")
def fail_until(path: str, times: int) -> int:
    """Fails the first `times` times, counted in a file."""
    with Path(path).open("a") as file:
        file.write(".")
    tried = Path(path).stat().st_size
    if tried <= times:
        raise RuntimeError(f"try {tried}")
    return tried


@shared_task(name="user.sleep_once")
def sleep_once(path: str) -> int:
    """Sleeps for ever the first time; afterwards says in how many processes it was begun."""
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()}\n")
    began = Path(path).read_text().splitlines()
    while len(began) == 1:
        time.sleep(0.01)
    return len(set(began))


def key() -> str:
    """The idempotency key of the step that runs this task: the id of the step's own Celery task."""
    return str(_task_stack.stack[-2].request.id)


@shared_task(name="user.lane")
def lane() -> int:
    """The lane in which the message of the step came."""
    return int(_task_stack.stack[-2].request.delivery_info["priority"])


@shared_task(name="user.effect")
def effect(log: str, text: str, fail: bool = False, stuck: str | None = None, late: bool = False) -> str:
    """Leaves one line in `log`, once for its key however often it is tried.

    The first try that finds no file at `stuck` makes it and goes no further, before its line or (`late`) after it.
    """
    if stuck is not None and not late:
        _wait_for_ever_the_first_time(Path(stuck))
    if fail:
        raise RuntimeError(f"{text} cannot be done")
    file = Path(log)
    if not (file.exists() and f"{key()}\t" in file.read_text()):
        with file.open("a") as lines:
            lines.write(f"{key()}\t{text}\n")
    if stuck is not None and late:
        _wait_for_ever_the_first_time(Path(stuck))
    return text


def _wait_for_ever_the_first_time(path: Path) -> None:
    if path.exists():
        return
    path.touch()
    while True:
        time.sleep(0.01)


@shared_task(name="user.work")
def work(values: Any = None, ms: int = 0, fail: bool = False, fail_tries: int = 0, fail_rounds: int = 0) -> int:
    """A number that follows from `values`; a line in the file `$EFFECTS` for every time that it is run.

    `fail_tries`: how often it fails before it does not, by the lines with its key. `fail_rounds`: the same for a step
    of a block that is tried again, whose id says in which try it is.
    """
    with Path(os.environ["EFFECTS"]).open("a") as log:
        log.write(f"{key()}\n")
    time.sleep(ms / 1000)
    if fail:
        raise RuntimeError("it was told to fail")
    if fail_tries and Path(os.environ["EFFECTS"]).read_text().splitlines().count(key()) <= fail_tries:
        raise RuntimeError("it fails for now")
    if fail_rounds and int(key().split(".")[-2]) <= fail_rounds:
        raise RuntimeError("it fails in this try of its block")
    return number_of(values)


def number_of(values: Any) -> int:
    """What `user.work` returns; the texts of errors, which may name any of several failed steps, are left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items() if name != "error"}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return zlib.crc32(json.dumps(plain(values), sort_keys=True).encode()) % 1000


class _Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("nothing to say")


class _MuteForEver(Exception):
    def __str__(self) -> str:
        raise self


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _endless() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def _raise(error: BaseException) -> Any:
    raise error


#: What a task may return or raise, by a name.
HOSTILE: dict[str, Callable[[], Any]] = {
    "nan": lambda: float("nan"),
    "infinity": lambda: [float("inf")],
    "half a character": lambda: "\ud800",
    "half a character as key": lambda: {"\udfff": 1},
    "zero character": lambda: "a\0b",
    "huge number": lambda: 10**5000,
    "big number": lambda: 10**30,
    "nested": lambda: _nested(900),
    "deeply nested": lambda: _nested(100_000),
    "endless": _endless,
    "tuple": lambda: (1, 2),
    "set": lambda: {1},
    "bytes": lambda: b"\xff",
    "object": object,
    "class": lambda: int,
    "generator": lambda: (number for number in range(3)),
    "odd keys": lambda: {1: 2, None: 3, (1,): 2},
    "large": lambda: "x" * 5_000_000,
    "odd wait": lambda: _raise(StepError("no", retry=True, retry_after_s="soon")),  # type: ignore[arg-type]
    "raise and wait for ever": lambda: _raise(StepError("no", retry=True, retry_after_s=float("inf"))),
    "raise plainly": lambda: _raise(ValueError("no")),
    "raise half a character": lambda: _raise(ValueError("\udce4")),
    "raise at length": lambda: _raise(ValueError("x" * 5_000_000)),
    "raise mutely": lambda: _raise(_Mute()),
    "raise mutely for ever": lambda: _raise(_MuteForEver()),
    "raise a group": lambda: _raise(ExceptionGroup("many", [_Mute(), ValueError("no")])),
    "raise nested": lambda: _raise(RecursionError(_nested(900))),
}


@shared_task(name="user.hostile")
def hostile(log: str, what: str) -> Any:
    with Path(log).open("a") as file:
        file.write(".")
    return HOSTILE[what]()


@shared_task(name="user.hold")
def hold(log: str, seconds: float, times: int = 1) -> int:
    """Holds the interpreter, as a C function does that never lets go of it, `times` times; a line when it begins."""
    with Path(log).open("a") as file:
        file.write(f"{key()} {os.getpid()}\n")
    libc = ctypes.PyDLL(None)
    for _ in range(times):
        libc.usleep(round(seconds * 1_000_000))
    return os.getpid()


@shared_task(name="user.effects")
def effects(log: str, every_s: float, count: int) -> int:
    """Leaves `count` lines in `log`, one each `every_s` seconds, each with the time and its process."""
    for _ in range(count):
        with Path(log).open("a") as file:
            file.write(f"{key()} {os.getpid()} {time.time()}\n")
        end = time.monotonic() + every_s
        while time.monotonic() < end:
            time.sleep(0.01)
    return count

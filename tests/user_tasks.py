"""A user's own Celery tasks, for `type: task` steps."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from celery import shared_task


@shared_task(name="user.echo")
def echo(value: Any = None) -> Any:
    return value


@shared_task(name="user.nothing")
def nothing() -> None:
    pass


@shared_task(name="user.boom")
def boom(message: str = "no") -> None:
    raise ValueError(message)


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

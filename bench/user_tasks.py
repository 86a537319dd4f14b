"""What ferrum's `task` steps run here."""

from __future__ import annotations

import asyncio
import ctypes

from celery import shared_task


@shared_task(name="bench.nothing")
def nothing() -> None:
    pass


@shared_task(name="bench.nap")
async def nap(seconds: float) -> None:
    await asyncio.sleep(seconds)


@shared_task(name="bench.hold")
def hold(seconds: int) -> None:
    """Holds the interpreter, as C code does that never lets go of it."""
    ctypes.PyDLL(None).sleep(seconds)


@shared_task(name="bench.numbers")
def numbers(count: int) -> list[int]:
    return list(range(count))

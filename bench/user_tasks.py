"""What ferrum's `task` steps run here."""

from __future__ import annotations

import asyncio

from celery import shared_task


@shared_task(name="bench.nothing")
def nothing() -> None:
    pass


@shared_task(name="bench.nap")
async def nap(seconds: float) -> None:
    await asyncio.sleep(seconds)


@shared_task(name="bench.numbers")
def numbers(count: int) -> list[int]:
    return list(range(count))

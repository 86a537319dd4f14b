"""Sandboxes that wait for their job: confined already, with their runtime imported, for one job each."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Awaitable
from contextlib import suppress

from ferrum.errors import FerrumError
from ferrum.sandbox.backend import Box
from ferrum.sandbox.life import Sandbox, Starter

_LATER_S = 0.25


class Pool:
    """Keeps as many ready as were lately used at once, of each kind of sandbox, and at most `size` in all.

    What was not used for `idle_s` is let go of, so nothing is kept for a worker that runs no code. One that dies while
    it waits is replaced.
    """

    def __init__(self, start: Starter, size: int, idle_s: float) -> None:
        self._start = start
        self._size = size
        self._idle_s = idle_s
        self._ready: dict[Box, deque[Sandbox]] = defaultdict(deque)
        #: Sandboxes on their way, by what they are.
        self._coming: dict[Box, int] = defaultdict(int)
        self._demand: dict[Box, _Demand] = defaultdict(_Demand)
        self._tasks: set[asyncio.Task[None]] = set()
        self._clock: asyncio.TimerHandle | None = None
        self._closed = False

    async def take(self, box: Box) -> Sandbox:
        """One that nobody else has; the caller ends it, and says with `back` that it did."""
        self._demand[box].begin()
        self._watch_the_clock()
        # A moment later, so that the job has the processor first.
        asyncio.get_running_loop().call_later(_LATER_S, self.fill, box)
        try:
            sandbox = self._of(box)
            if sandbox is None:
                sandbox = await self._start(box, False)
        except BaseException:
            self._demand[box].end()
            raise
        return sandbox

    def back(self, box: Box) -> None:
        """A job has ended; now there is time to make the next ones ready."""
        self._demand[box].end()
        self.fill(box)

    def expect(self, box: Box) -> None:
        """Be ready for one job more than nothing."""
        self._demand[box].begin()
        self._watch_the_clock()
        self.back(box)

    def fill(self, box: Box) -> None:
        """Start as many as are wanted; returns at once."""
        for _ in range(self._wanted(box) - len(self._ready[box]) - self._coming[box]):
            if self._closed or not self._make_room(box):
                break
            self._coming[box] += 1
            self._go(self._add(box))

    async def close(self) -> None:
        """End all that wait, and wait until nothing is left of them."""
        self._closed = True
        if self._clock is not None:
            self._clock.cancel()
        for sandboxes in self._ready.values():
            for sandbox in sandboxes:
                self._dismiss(sandbox)
        self._ready.clear()
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def waiting(self) -> int:
        """How many are ready now."""
        return sum(map(len, self._ready.values()))

    def _of(self, box: Box) -> Sandbox | None:
        """One that is ready and alive."""
        while self._ready[box]:
            sandbox = self._ready[box].popleft()
            asyncio.get_running_loop().remove_reader(sandbox.stdout)
            return sandbox
        return None

    def _wanted(self, box: Box) -> int:
        return min(self._size, self._demand[box].lately(self._idle_s))

    def _make_room(self, box: Box) -> bool:
        """Whether one more may be made; the one that waited longest of another kind makes way for it."""
        if self.waiting() + sum(self._coming.values()) < self._size:
            return True
        others = [other for other in self._ready if self._ready[other] and other != box]
        oldest = min(others, key=lambda other: self._demand[other].last, default=None)
        if oldest is None:
            return False
        self._let_go(oldest)
        return True

    async def _add(self, box: Box) -> None:
        try:
            sandbox = await self._start(box, True)
            try:
                await sandbox.ready()
            except BaseException:
                await sandbox.end()
                raise
        except FerrumError:
            # Whoever takes one next starts one, and hears why that cannot be.
            return
        finally:
            self._coming[box] -= 1
        if self._closed:
            await sandbox.end()
            return
        self._ready[box].append(sandbox)
        asyncio.get_running_loop().add_reader(sandbox.stdout, self._died, box, sandbox)

    def _died(self, box: Box, sandbox: Sandbox) -> None:
        """It has nothing to say before it has a job, so this is its end."""
        self._ready[box].remove(sandbox)
        self._dismiss(sandbox)
        self.fill(box)

    def _let_go(self, box: Box) -> None:
        self._dismiss(self._ready[box].popleft())

    def _dismiss(self, sandbox: Sandbox) -> None:
        asyncio.get_running_loop().remove_reader(sandbox.stdout)
        sandbox.kill()
        self._go(sandbox.end())

    def _watch_the_clock(self) -> None:
        if self._clock is None:
            self._clock = asyncio.get_running_loop().call_later(self._idle_s / 4, self._shrink)

    def _shrink(self) -> None:
        """Let go of what is not wanted any more."""
        self._clock = None
        for box in list(self._ready):
            while len(self._ready[box]) > self._wanted(box):
                self._let_go(box)
            if not self._wanted(box) and not self._coming[box]:
                del self._ready[box], self._demand[box], self._coming[box]
        if self._demand:
            self._watch_the_clock()

    def _go(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(_awaited(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Demand:
    """How many of a kind were used at once."""

    def __init__(self) -> None:
        self._now = 0
        #: The most at once, in this stretch of time and the one before.
        self._most, self._before = 0, 0
        self._since = time.monotonic()
        self.last = self._since

    def begin(self) -> None:
        self._now += 1
        self._most = max(self._most, self._now)
        self.last = time.monotonic()

    def end(self) -> None:
        self._now -= 1
        self.last = time.monotonic()

    def lately(self, stretch_s: float) -> int:
        now = time.monotonic()
        if now - self._since > stretch_s:
            # After two stretches without any it is as if there never had been one.
            self._before = self._most if now - self._since < 2 * stretch_s else self._now
            self._most, self._since = self._now, now
        return max(self._most, self._before)


async def _awaited(work: Awaitable[None]) -> None:
    with suppress(asyncio.CancelledError):
        await work

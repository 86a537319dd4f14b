"""What all runs share the use of: so many at once, so many in a time.

Nothing waits in a worker: who cannot be let in is told so, is parked, and is woken when its turn comes. Waiters are
served in the order in which they came first. Who was granted a slot and does not come for it in time loses it, but
goes before all others when it comes after all.

All of it is in `ferrum:{limits}` (see `ferrum/lua/shared/limits/lib.lua`) and goes away by itself when unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ferrum.scripts import Room, Who, us, whos

#: Whoever waits for a slot looks again after this time, whatever was lost.
SAFETY_S = 600.0

_BASE = "ferrum:{limits}"
#: The most limits that one sweep looks at.
_BATCH = 100


@dataclass(frozen=True, slots=True)
class Concurrency:
    """At most `limit` (1 or more) are in at once, of all that name this key."""

    key: str
    limit: int

    def __str__(self) -> str:
        return f"{self.key!r} lets in {self.limit} at once"


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `limit` (1 or more) start at once, and over time so many in each `per_s` seconds."""

    key: str
    limit: int
    per_s: float

    def __str__(self) -> str:
        return f"{self.key!r} lets in {self.limit} each {self.per_s:g} s"


@dataclass(frozen=True, slots=True)
class Entered:
    """It may start now."""


@dataclass(frozen=True, slots=True)
class Wait:
    """It may not start yet, and has its place among those who wait."""

    #: When to ask again, whether it was woken or not.
    wake_in_s: float
    #: For the workflow's author.
    why: str


class Limits(Room):
    """Every call may be repeated when its answer was lost."""

    def enter(
        self, who: Who, concurrency: Concurrency | None, rate: Rate | None, *, hold_s: float, attempt: int = 1
    ) -> Entered | Wait:
        """Ask to start. A slot is held for `hold_s` from now unless it is renewed.

        The rate (GCRA, ITU-T I.371) charges each attempt once, and gives one that is too early a time of its own to
        come back at; who comes later than that is let in all the same. Only then a slot is asked for, so nobody
        holds one while it waits for its time. Who has a slot already keeps it.
        """
        if concurrency is None and rate is None:
            return Entered()
        # Rounded up: never more than was allowed.
        every = ceil(us(rate.per_s) / rate.limit) if rate else 0
        reply = self._ask(
            "limits/enter", _BASE, str(who), attempt, us(hold_s),
            concurrency.key if concurrency else "", concurrency.limit if concurrency else 0,
            rate.key if rate else "", every, every * (rate.limit - 1) if rate else 0,
        )  # fmt: skip
        match reply:
            case ["rate", wait_us]:
                return Wait(int(wait_us) / 1_000_000, str(rate))
            case ["slot"]:
                return Wait(SAFETY_S, str(concurrency))
            case _:
                return Entered()

    def leave(self, who: Who, key: str) -> list[Who]:
        """Give the slot back; returns who has it now and must be woken."""
        return whos(self._ask("limits/leave", _BASE, str(who), key))

    def forget(self, who: Who) -> list[Who]:
        """It waits for no slot any more; returns who has what it had been granted, and must be woken.

        A slot that it came for is not given back by this.
        """
        return whos(self._ask("limits/leave", _BASE, str(who), ""))

    def renew(self, held: Sequence[tuple[str, Who]], hold_s: float) -> list[tuple[str, Who]]:
        """Hold these slots, each a key and who has it, for `hold_s` from now; returns those that are lost."""
        if not held:
            return []
        names = [text for key, who in held for text in (key, str(who))]
        return [held[int(number)] for number in self._ask("limits/renew", _BASE, us(hold_s), *names)]

    def sweep(self) -> list[Who]:
        """Give the slots of the dead to those who wait; returns everyone who must be woken.

        That is also who was granted a slot a second ago or more and has not come: its wake-up may have been lost, or
        have come before it was parked.
        """
        return whos(self._ask("limits/sweep", _BASE, _BATCH))

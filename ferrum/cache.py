"""What was computed once and may be used again, by every run of the fleet.

What several ask for at once is computed by one of them. The others wait, in no worker: they are parked, and woken
when it is there, or when the one that computes it has given up or died.

A digest says what was asked; its entry is in one of sixteen partitions, `ferrum:{cNN}` (see
`ferrum/lua/shared/cache/lib.lua`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from pydantic import JsonValue

from ferrum.scripts import Room, Who, whos

#: Whoever waits looks again after this time, whatever was lost.
SAFETY_S = 600.0

#: The most digests that one sweep looks at in one partition.
_BATCH = 100
#: How often the sweep names who was to be woken and does not come, a second apart.
_NAMED = 5
_PARTITIONS = tuple(f"ferrum:{{c{number:02}}}" for number in range(16))


@dataclass(frozen=True, slots=True)
class Hit:
    """It is there."""

    #: As it was put: text that the cache does not look into.
    envelope: str


@dataclass(frozen=True, slots=True)
class Compute:
    """It is not there, and the one that asked is the one that computes it."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Another one computes it."""

    #: When to ask again, whether it was woken or not.
    wake_in_s: float


@dataclass(frozen=True, slots=True)
class Stats:
    """How often the cache was asked, and what it said. Who waited and then found it is among `waits` and `hits`."""

    hits: int = 0
    misses: int = 0
    waits: int = 0

    @property
    def hit_rate(self) -> float:
        """From 0 to 1; 0 where nothing was asked."""
        return self.hits / max(1, self.hits + self.misses)


def digest_of(scope: str, value: JsonValue) -> str:
    """The name of what was asked. The order of an object's keys does not matter; `1` and `1.0` are different.

    What is computed in one scope is not found in another.
    """
    text = json.dumps([scope, value], sort_keys=True, separators=(",", ":"))
    return f"{scope}:{sha256(text.encode()).hexdigest()}"


class Cache(Room):
    """Every call may be repeated when its answer was lost."""

    def enter(self, digest: str, who: Who, hold_s: float) -> Hit | Compute | Wait:
        """Ask for it. Who is to compute it has `hold_s` for that, unless it renews, and must `put` or `give_up`."""
        match self._ask("cache/enter", base_of_digest(digest), digest, str(who), _ms(hold_s)):
            case ["hit", envelope]:
                return Hit(str(envelope))
            case ["wait"]:
                return Wait(SAFETY_S)
            case _:
                return Compute()

    def put(self, digest: str, who: Who, envelope: str, ttl_s: float) -> list[Who]:
        """Keep it for so long, to the millisecond; returns who waits for it and must be woken.

        It is kept even when another one computes it by now, since `who` was slow to renew: it is as good.
        """
        return whos(self._ask("cache/put", base_of_digest(digest), digest, str(who), envelope, _ms(ttl_s)))

    def give_up(self, digest: str, who: Who) -> list[Who]:
        """`who` neither computes it nor waits for it any more; returns who must be woken, since it may compute it."""
        return whos(self._ask("cache/give_up", base_of_digest(digest), digest, str(who)))

    def renew(self, held: Sequence[tuple[str, Who]], hold_s: float) -> list[tuple[str, Who]]:
        """These, each a digest and who computes it, go on for `hold_s`; returns those whose turn it is no more."""
        lost: list[tuple[str, Who]] = []
        groups: dict[str, list[tuple[str, Who]]] = {}
        for digest, who in held:
            groups.setdefault(base_of_digest(digest), []).append((digest, who))
        for base, group in groups.items():
            names = [text for digest, who in group for text in (digest, str(who))]
            lost += [group[int(number)] for number in self._ask("cache/renew", base, _ms(hold_s), *names)]
        return lost

    def sweep(self) -> list[tuple[str, Who]]:
        """Returns everyone who must be woken, and for what: where nobody computes it any more, the first who waits.

        That is also who waits for what has been there for a second: its wake-up may have been lost, or have come
        before it was parked.
        """
        replies = self._scripts.eval_each("cache/sweep", _PARTITIONS, self._now(), _BATCH, _NAMED)
        return [pair for reply in replies for pair in zip(reply[::2], whos(reply[1::2]), strict=True)]

    def stats(self, scope: str | None = None) -> Stats:
        """Since the cache was last left alone for a week, in this scope or in all."""
        counts: Counter[str] = Counter()
        for flat in self._scripts.eval_each("cache/stats", _PARTITIONS, self._now()):
            for name, number in zip(flat[::2], flat[1::2], strict=True):
                what, _, where = str(name).partition(" ")
                counts[what] += int(number) if scope in (None, where) else 0
        return Stats(**counts)


def base_of_digest(digest: str) -> str:
    return _PARTITIONS[int(digest[-1], 16)]


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))

"""What runs of one process share: a cache, limits and circuit breakers, with the rules of those of a fleet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ferrum.breaker import Breaking
from ferrum.limits import Concurrency, Rate
from ferrum.steps import Health

#: A step of a run.
Who = tuple[str, str]


@dataclass(slots=True)
class _Entry:
    """What is known of one digest."""

    envelope: str = ""
    until: float = 0.0
    computes: Who | None = None
    waiting: dict[Who, Callable[[], None]] = field(default_factory=dict)


class Cache:
    """See `ferrum.cache`."""

    def __init__(self) -> None:
        self._entries: defaultdict[str, _Entry] = defaultdict(_Entry)

    def enter(self, digest: str, who: Who, now: float, wake: Callable[[], None]) -> str | bool:
        """The envelope that is there; else whether `who` is to compute it. If not it is woken."""
        entry = self._entries[digest]
        if entry.envelope and now < entry.until:
            entry.waiting.pop(who, None)
            return entry.envelope
        if entry.computes in (None, who):
            entry.computes = who
            entry.waiting.pop(who, None)
            return True
        entry.waiting[who] = wake
        return False

    def put(self, digest: str, envelope: str, until: float) -> None:
        entry = self._entries[digest]
        entry.envelope, entry.until, entry.computes = envelope, until, None
        waiting, entry.waiting = entry.waiting, {}
        for wake in waiting.values():
            wake()

    def forget(self, who: Who) -> None:
        """It neither computes nor waits for anything any more; the first that waits may compute it."""
        for entry in self._entries.values():
            entry.waiting.pop(who, None)
            if entry.computes == who:
                entry.computes = None
                if entry.waiting:
                    entry.waiting.pop(next(iter(entry.waiting)))()


@dataclass(slots=True)
class _Slots:
    inside: set[Who] = field(default_factory=set)
    waiting: dict[Who, Callable[[], None]] = field(default_factory=dict)
    limit: int = 1


@dataclass(slots=True)
class _Turns:
    #: When the next one would be due if they came evenly (GCRA).
    due: float = 0.0
    #: When each that asked may start, by its attempt.
    given: dict[tuple[Who, int], float] = field(default_factory=dict)


class Limits:
    """See `ferrum.limits`."""

    def __init__(self) -> None:
        self._slots: defaultdict[str, _Slots] = defaultdict(_Slots)
        self._turns: defaultdict[str, _Turns] = defaultdict(_Turns)

    def turn(self, rate: Rate, who: Who, attempt: int, now: float) -> float:
        """In how many seconds this attempt may start; 0: now. Each attempt is counted once."""
        turns = self._turns[rate.key]
        at = turns.given.get((who, attempt))
        if at is None:
            every = rate.per_s / rate.limit
            turns.due = max(turns.due, now)
            at = turns.given[who, attempt] = turns.due - every * (rate.limit - 1)
            turns.due += every
        # To the millisecond, as the clock of an event loop is not finer.
        return at - now if at - now > 0.001 else 0.0

    def enter(self, concurrency: Concurrency, who: Who, wake: Callable[[], None]) -> bool:
        """Whether it has a slot; if not it is given the next, and woken."""
        slots = self._slots[concurrency.key]
        slots.limit = concurrency.limit
        if who in slots.inside:
            return True
        if len(slots.inside) < slots.limit and not slots.waiting:
            slots.inside.add(who)
            return True
        slots.waiting[who] = wake
        return False

    def leave(self, who: Who) -> None:
        """It has no slot any more and waits for none; the first that waits gets it."""
        for slots in self._slots.values():
            slots.waiting.pop(who, None)
            slots.inside.discard(who)
            while slots.waiting and len(slots.inside) < slots.limit:
                following = next(iter(slots.waiting))
                slots.inside.add(following)
                slots.waiting.pop(following)()


@dataclass(slots=True)
class _Circuit:
    failed: list[float] = field(default_factory=list)
    open_until: float = 0.0
    #: Who tries whether it is well again, and until when that one is waited for.
    probe: Who | None = None
    probe_until: float = 0.0
    latency_ms: float | None = None


class Breaker:
    """See `ferrum.breaker`."""

    def __init__(self, breaking: Breaking | None = None) -> None:
        self._rule = breaking or Breaking()
        self._circuits: defaultdict[str, _Circuit] = defaultdict(_Circuit)

    def health(self, targets: Sequence[str], now: float) -> dict[str, Health]:
        return {target: self._health(self._circuits[target], now) for target in targets}

    def _health(self, circuit: _Circuit, now: float) -> Health:
        recent = [at for at in circuit.failed if at > now - self._rule.window_s]
        return Health(now >= circuit.open_until, len(recent), circuit.latency_ms)

    def allow(self, target: str, who: Who, now: float) -> bool:
        circuit = self._circuits[target]
        if not circuit.open_until:
            return True
        if now < circuit.open_until:
            return False
        if circuit.probe not in (None, who) and now < circuit.probe_until:
            return False
        circuit.probe, circuit.probe_until = who, now + self._rule.probe_s
        return True

    def report(self, target: str, who: Who, *, ok: bool, latency_ms: float, now: float) -> None:
        circuit = self._circuits[target]
        if ok:
            known = circuit.latency_ms
            circuit.latency_ms = latency_ms if known is None else known + 0.2 * (latency_ms - known)
        else:
            circuit.failed = [*(at for at in circuit.failed if at > now - self._rule.window_s), now]
        # Once it has opened, only the one that was let through to try has a say; others report on calls from before.
        if circuit.open_until:
            if now >= circuit.open_until and circuit.probe == who:
                circuit.open_until = 0.0 if ok else now + self._rule.open_s
                circuit.failed, circuit.probe = [] if ok else circuit.failed, None
        elif not ok and len(circuit.failed) >= self._rule.failures:
            circuit.open_until = now + self._rule.open_s


@dataclass(frozen=True, slots=True)
class Shared:
    """Given to several runs, one after the other, it is what they share."""

    cache: Cache = field(default_factory=Cache)
    limits: Limits = field(default_factory=Limits)
    breaker: Breaker = field(default_factory=Breaker)

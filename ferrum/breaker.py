"""The circuit breaker that all workers share: what fails is left alone for a while, then tried by one.

A target is whatever may fail as a whole: a model of a provider, a tool server. Its circuit is *closed* while it is
well. After some failures within a window it is *open* and every call is refused. When that time is over it is *half
open*: exactly one call, the probe, is let through, and what becomes of it closes the circuit or opens it again. (M.
Nygard, Release It!, "Circuit Breaker".)

All of it is in `ferrum:{health}` (see `ferrum/lua/shared/breaker/lib.lua`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from ferrum.scripts import Room, Scripts, Who, us

_BASE = "ferrum:{health}"
#: How much the newest call counts in the mean latency.
_WEIGHT = "0.2"
#: What nobody has reported on for so long is forgotten, its latency too.
_KEEP_S = 3600.0


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class Breaking:
    """When a circuit opens, and for how long."""

    #: So many failures open it …
    failures: int = 5
    #: … within this time.
    window_s: float = 60.0
    #: How long it stays open before it is tried.
    open_s: float = 30.0
    #: A probe that nobody has reported on for so long has died, and another one is let through.
    probe_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Allowed:
    """The call may be made, and what became of it must be reported."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The target is not well."""

    #: When to ask again.
    retry_in_s: float


@dataclass(frozen=True, slots=True)
class Health:
    """What a router can choose by."""

    state: State = State.CLOSED
    #: How many calls failed within the window.
    failures: int = 0
    #: Exponentially weighted mean of the calls that went well; `None` before the first.
    latency_ms: float | None = None


class Breaker(Room):
    """Every call may be repeated when its answer was lost."""

    def __init__(
        self, scripts: Scripts, breaking: Breaking | None = None, clock: Callable[[], float] | None = None
    ) -> None:
        """`clock`: see `Room`."""
        super().__init__(scripts, clock)
        self._breaking = breaking or Breaking()

    def state(self, target: str) -> State:
        return self.health([target])[target].state

    def allow(self, target: str, who: Who) -> Allowed | Refused:
        """Whether this call may be made. The one that is the probe is allowed again as often as it asks."""
        reply = self._ask("breaker/allow", _BASE, target, str(who), us(self._breaking.probe_s))
        return Allowed() if reply[0] == "yes" else Refused(int(reply[1]) / 1_000_000)

    def report(self, target: str, who: Who, *, ok: bool, latency_ms: float) -> None:
        """What became of a call that was allowed. `ok`: the target is well, even if its answer was a refusal."""
        rule = self._breaking
        keep_s = max(_KEEP_S, rule.window_s + rule.open_s + rule.probe_s)
        # By its token, a failure that is reported again since the answer was lost counts once.
        self._ask(
            "breaker/report", _BASE, target, str(who), int(ok), round(latency_ms * 1000), os.urandom(8).hex(),
            rule.failures, us(rule.window_s), us(rule.open_s), _WEIGHT, round(keep_s * 1000),
        )  # fmt: skip

    def health(self, targets: Iterable[str]) -> dict[str, Health]:
        """How these are, in one round trip; one that nobody knows is well."""
        names = list(targets)
        flat = self._ask("breaker/health", _BASE, us(self._breaking.window_s), *names)
        return {
            name: Health(State(flat[i]), int(flat[i + 1]), int(flat[i + 2]) / 1000 if flat[i + 2] else None)
            for name, i in zip(names, range(0, len(flat), 3), strict=True)
        }

"""Schedules: runs that begin by the clock, started by `celery -A ferrum beat`, by as many of them as one likes.

What a beat does about a due time is in three steps, and it may die between any two of them:

1. It *decides* which times to start a run for, and what the next time is. The first decision for a due time is kept in
   Redis, and every other beat, and the one that comes after a crash, is handed that one.
2. It *starts* the runs, each under the idempotency key `schedule:<id>:<due time>`: a second start is the same run.
3. It *advances* the schedule to its next time, where that is still the due one.

So a time that was decided is started, and it is started once. Times are those of Redis: no clock of a beat counts.

Keys, all under `ferrum:{schedules}`:

    :names          hash    the id of the schedule of each name
    :schedule:<id>  hash    the schedule; `firing` is what was decided and not yet advanced
    :due            sorted set of the schedules that are not paused, by their next time
    :beat           there while any beat runs
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import takewhile
from typing import Any, Final, cast
from zoneinfo import ZoneInfo, available_timezones

from celery.beat import Scheduler
from cronsim import CronSim, CronSimError
from kombu.exceptions import OperationalError
from pydantic import BaseModel, ConfigDict, JsonValue
from redis.client import Pipeline
from ulid import ULID

from ferrum.errors import AuthorError, Conflict, NotFound, Unavailable, did_you_mean
from ferrum.plan import Plan
from ferrum.runs import submit
from ferrum.scripts import Connection, Outage
from ferrum.settings import Missed, settings
from ferrum.workflow import Workflow

#: A time that is later than this when a beat looks at it was missed. A beat that is restarted misses nothing.
LATE_S: Final = 60
#: The most times that `missed: all` makes up for at once, the newest: an outage must not end in a flood.
AT_MOST: Final = 100

#: How often a beat looks, and so how late it hears of a new schedule.
_LOOK_S: Final = 1.0
#: How long after its last look a beat counts as gone.
_BEAT_LIFE_S: Final = 10

_BASE: Final = "ferrum:{schedules}"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}", re.ASCII)
_FIELDS: Final = ("minute", "hour", "day of month", "month", "day of week")
#: Longer than any that means something.
_LONGEST_CRON: Final = 1000

_log = logging.getLogger("ferrum.schedules")


class ScheduleError(AuthorError):
    """A schedule that cannot be: its cron expression, time zone or name."""


class Schedule(BaseModel):
    """A workflow that is run by the clock. Times are in seconds since 1970."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    #: The workflow as it was when the schedule was added; its file may have changed since.
    document: dict[str, JsonValue]
    input: dict[str, JsonValue]
    cron: str
    timezone: str
    missed: Missed
    paused: bool = False
    created_at: float
    #: `None` while it is paused.
    next_at: int | None = None
    #: The last time that it was due and runs were started for, and the run of it.
    fired_at: int | None = None
    run_id: str | None = None
    #: Why no run could be started the last time.
    error: str | None = None

    def key(self, due: int) -> str:
        """The idempotency key of its run for this time."""
        return f"schedule:{self.id}:{datetime.fromtimestamp(due, UTC):%Y-%m-%dT%H:%M:%SZ}"

    def upcoming(self, now: float) -> Iterator[int]:
        """Its times after this one, whether or not it is paused."""
        return Cron.of(self.cron, self.timezone).after(int(now))


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron expression in a time zone."""

    text: str
    zone: ZoneInfo

    @classmethod
    def of(cls, text: str, timezone: str) -> Cron:
        """Raises `ScheduleError`, also for an expression that is well written and never comes."""
        cron = cls(_five_fields(text), _zone(timezone))
        try:
            _ = next(cron.after(int(time.time())))
        except CronSimError as error:
            raise ScheduleError(f"cron {text!r}: {_what_is_wrong(cron.text, str(error))}") from error
        except StopIteration:
            raise ScheduleError(f"cron {text!r}: never comes: no day in the next 50 years is like that") from None
        return cron

    def after(self, time_s: int) -> Iterator[int]:
        """The times after this one, in order.

        As Debian's cron has it when clocks are put forward and back: where hour and minute are fixed, a time that the
        day leaves out comes right after the gap, and one that it has twice comes the first time; where one of them
        begins with `*`, time goes on as it passes.
        """
        last = time_s
        for at in CronSim(self.text, datetime.fromtimestamp(time_s, self.zone)):
            # Two times that the day leaves out come at the same instant; of a repeated hour, it may give the first.
            if (stamp := int(at.timestamp())) > last:
                last = stamp
                yield stamp

    def last(self, count: int, since: int, until: int) -> list[int]:
        """The newest so many times from `since` to `until`, both included, in order; cheap after any outage."""
        span = 3600
        while True:
            begin = max(since, until - span)
            found = deque(takewhile(lambda at: at <= until, self.after(begin - 1)), maxlen=count)
            if begin == since or len(found) == count:
                return list(found)
            span *= 8


def _five_fields(text: str) -> str:
    fields = text.split()
    if len(fields) == 5 and len(text) <= _LONGEST_CRON:
        return " ".join(fields)
    hint = "; @daily is '0 0 * * *', @hourly '0 * * * *'" if text.startswith("@") else ""
    raise ScheduleError(
        f"cron {text[:80]!r}: it has {len(fields)} fields and needs five, {', '.join(_FIELDS)}: "
        f"'30 9 * * MON-FRI' is half past nine on weekdays{hint}"
    )


def _what_is_wrong(text: str, said: str) -> str:
    """The library's "Bad minute", as a sentence."""
    fields = text.split()
    # Of one kind are well written expressions: days that none of the months has.
    anywhen = " ".join([*fields[:3], "*", *fields[4:]])
    try:
        CronSim(anywhen, datetime.now(UTC))
        CronSim(f"0 0 1 {fields[3]} *", datetime.now(UTC))
    except CronSimError:
        pass
    else:
        return f"never comes: none of the months {fields[3]!r} has a day {fields[2]!r}"
    name = said.removeprefix("Bad ").replace("-", " ")
    if name not in _FIELDS:
        return said
    return f"{fields[_FIELDS.index(name)]!r} is no {name} ({_CAN_BE[name]})"


_CAN_BE: Final = {
    "minute": "0-59, lists 1,2, ranges 1-5, steps */5",
    "hour": "0-23, lists 1,2, ranges 1-5, steps */5",
    "day of month": "1-31, L for the last, LW for the last weekday",
    "month": "1-12 or JAN-DEC",
    "day of week": "0-7 or SUN-SAT, 5L for the last Friday, MON#2 for the second Monday",
}


def _zone(name: str) -> ZoneInfo:
    # Not by trying: `ZoneInfo` opens files by names that have to be no more than likely.
    if name not in _zones():
        near = did_you_mean(name, _zones()) if name else ""
        hint = near if "did you mean" in near else ": they are named Europe/Berlin, America/New_York, UTC"
        raise ScheduleError(f"time zone {name!r} is not known{hint}")
    return ZoneInfo(name)


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


# Deciding.


@dataclass(frozen=True, slots=True)
class Firing:
    """What is done about a due time."""

    #: What runs are started for, oldest first; none where all were missed and are skipped.
    times: tuple[int, ...]
    #: When the schedule is due after that.
    then: int

    def dumps(self) -> str:
        return json.dumps({"times": self.times, "then": self.then})

    @classmethod
    def loads(cls, text: str) -> Firing:
        value = json.loads(text)
        return cls(tuple(value["times"]), value["then"])


def firing_of(schedule: Schedule, now: float) -> Firing:
    """What to do about a schedule whose next time has come. Raises `ScheduleError` where there is no next one."""
    assert schedule.next_at is not None
    cron, until = Cron.of(schedule.cron, schedule.timezone), int(now)
    many = AT_MOST if schedule.missed is Missed.ALL else 1
    # The kept time itself counts whatever the rules of the time zone have become since.
    times = cron.last(many, schedule.next_at, until) or [schedule.next_at]
    if schedule.missed is Missed.SKIP:
        times = [at for at in times if now - at <= LATE_S]
    return Firing(tuple(times), next(cron.after(until)))


# Keeping.


class Schedules(Connection):
    """All schedules of one Redis, through one client. Safe to share between threads."""

    def __init__(self, url: str, *, patience_s: float = 5.0) -> None:
        super().__init__(url, patience_s=patience_s, connections=16, folder="schedules")

    # What people do.

    def add(
        self,
        workflow: Workflow,
        cron: str,
        *,
        timezone: str = "UTC",
        input: Mapping[str, JsonValue] | None = None,
        name: str | None = None,
        missed: Missed | None = None,
    ) -> Schedule:
        """Run a workflow by the clock; its name is the workflow's where none is given.

        Everything that could go wrong at the due time is looked at now: raises `ScheduleError`, `WorkflowError`,
        `InputError`, and `Conflict` for a name that is taken.
        """
        Plan(workflow)
        schedule = Schedule(
            id=f"sch_{ULID()}",
            name=_checked_name(name or workflow.name),
            document=workflow.to_dict(),
            input=workflow.check_input(input or {}),
            cron=" ".join(cron.split()),
            timezone=timezone,
            missed=missed or settings().missed,
            created_at=(now := self.now()),
            next_at=next(Cron.of(cron, timezone).after(int(now))),
        )
        reply = self._do("add", schedule.id, schedule.name, cast("int", schedule.next_at), *_fields(schedule))
        if reply[0] == "taken":
            raise Conflict(
                f"there is a schedule {schedule.name!r} already: give this one another name (--name), "
                f"or delete that one first (ferrum schedule delete {schedule.name})"
            )
        return schedule

    def pause(self, name: str) -> Schedule:
        """Let it not fire until it is resumed. Raises `NotFound`."""
        return self._change("pause", self.find(name), "")

    def resume(self, name: str) -> Schedule:
        """Let it fire again, from its next time on: what passed meanwhile was not missed. Raises `NotFound`."""
        schedule = self.find(name)
        return self._change("resume", schedule, next(schedule.upcoming(self.now())))

    def delete(self, name: str) -> Schedule:
        """Forget it; its runs go on. Raises `NotFound`."""
        schedule = self.find(name)
        self._do("delete", schedule.id, schedule.name)
        return schedule

    def _change(self, how: str, schedule: Schedule, argument: str | int) -> Schedule:
        self._do(how, schedule.id, argument)
        return self.find(schedule.name)

    def find(self, name: str) -> Schedule:
        """Raises `NotFound`."""
        names = cast("dict[str, str]", self._patiently(lambda: self._redis.hgetall(f"{_BASE}:names")))
        found = self._read([names[name]]) if name in names else []
        if not found:
            raise NotFound(f"there is no schedule {name!r}{did_you_mean(name, set(names) - {name})}")
        return found[0]

    def all(self) -> list[Schedule]:
        """By name."""
        names = cast("dict[str, str]", self._patiently(lambda: self._redis.hgetall(f"{_BASE}:names")))
        return sorted(self._read(names.values()), key=lambda one: one.name)

    def _read(self, ids: Any) -> list[Schedule]:
        def ask(pipe: Pipeline) -> None:
            for one in ids:
                pipe.hgetall(f"{_BASE}:schedule:{one}")

        # One that is not there was deleted this moment.
        return [_schedule(fields) for fields in self._patiently(lambda: self._at_once(ask)) if fields]

    # What beats do.

    def now(self) -> float:
        """What time it is for every beat."""
        return _seconds(self._patiently(self._redis.time))

    def look(self) -> tuple[float, float | None]:
        """What time it is, and when the next schedule is due, if any; and say that a beat runs."""

        *clock, soonest = self._do("look", f"{socket.gethostname()}:{os.getpid()}", _BEAT_LIFE_S)
        return _seconds(clock), float(soonest) if soonest else None

    def beat_runs(self) -> bool:
        """Whether anything fires what is due."""
        return bool(self._do("beats"))

    def due(self, now: float) -> list[Schedule]:
        """Those whose time has come, longest due first."""
        return self._read(self._patiently(lambda: self._redis.zrangebyscore(f"{_BASE}:due", "-inf", now)))

    def decide(self, schedule: Schedule, firing: Firing) -> Firing | None:
        """What is to be done about its due time: this, unless another beat has decided before.

        `None` when there is nothing left to do about it.
        """
        reply = self._do("decide", schedule.id, cast("int", schedule.next_at), firing.dumps())
        return Firing.loads(str(reply[1])) if reply[0] == "ok" else None

    def advance(self, schedule: Schedule, firing: Firing, run_id: str | None, error: str | None) -> bool:
        """Its runs were started: on to the next time. False when another beat was first."""
        newest = firing.times[-1] if firing.times else ""
        due = cast("int", schedule.next_at)
        reply = self._do("advance", schedule.id, due, firing.then, newest, run_id or "", error or "")
        return bool(reply[0] == "ok")

    def give_up(self, schedule: Schedule, why: str) -> None:
        """Pause what no beat can fire; `error` says why."""
        self._do("pause", schedule.id, why)

    def _do(self, name: str, *arguments: str | int) -> list[Any]:
        return cast("list[Any]", self._scripts.eval(name, _BASE, *arguments))


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ScheduleError(
            f"name {name[:120]!r}: a schedule's name is made of a-z, 0-9, '-', '_' and '.', up to 100, "
            "a letter or digit first"
        )
    return name


def _seconds(clock: Any) -> float:
    return int(clock[0]) + int(clock[1]) / 1e6


def _fields(schedule: Schedule) -> list[str]:
    """What is kept of a new one, as field and value in turn."""
    kept = {
        "document": json.dumps(schedule.document, ensure_ascii=False),
        "input": json.dumps(schedule.input, ensure_ascii=False),
        "cron": schedule.cron,
        "timezone": schedule.timezone,
        "missed": schedule.missed.value,
        "paused": "0",
        "created": repr(schedule.created_at),
    }
    return [text for pair in kept.items() for text in pair]


def _schedule(fields: Mapping[str, str]) -> Schedule:
    return Schedule(
        id=fields["id"],
        name=fields["name"],
        document=json.loads(fields["document"]),
        input=json.loads(fields["input"]),
        cron=fields["cron"],
        timezone=fields["timezone"],
        missed=Missed(fields["missed"]),
        paused=fields["paused"] == "1",
        created_at=float(fields["created"]),
        next_at=int(fields["next"]) if "next" in fields else None,
        fired_at=int(fields["fired"]) if "fired" in fields else None,
        run_id=fields.get("run") or None,
        error=fields.get("error") or None,
    )


# Doing.


def fire_due(store: Schedules, now: float | None = None, start: Callable[..., str] = submit) -> float:
    """Start every run that is due; returns in how many seconds to look again.

    One schedule that cannot be fired holds up no other. Raises `Unavailable` when Redis is away.
    """
    clock, soonest = store.look()
    at = clock if now is None else now
    if soonest is None or soonest > at:
        return _LOOK_S if soonest is None else min(soonest - at, _LOOK_S)
    for schedule in store.due(at):
        try:
            _fire(store, schedule, at, start)
        except (Unavailable, OperationalError) as error:
            # It stays due. Redis or the artifact store will be back.
            _log.warning("schedule %s waits: %s", schedule.name, error)
    return _LOOK_S


def _fire(store: Schedules, schedule: Schedule, now: float, start: Callable[..., str]) -> None:
    try:
        firing = store.decide(schedule, firing_of(schedule, now))
    except ScheduleError as error:
        # What was right when it was added: a time zone that is gone from this machine, a calendar that ended.
        _log.error("schedule %s is paused: %s", schedule.name, error)
        store.give_up(schedule, str(error))
        return
    if firing is None:
        return
    run_id, error_text = None, None
    for due in firing.times:
        try:
            run_id = start(schedule.document, schedule.input, key=schedule.key(due))
        except AuthorError as error:
            # It fitted when it was added and does not fit this version: tried again at its next time.
            error_text = str(error)
            _log.error("schedule %s could not be started: %s", schedule.name, error)
    if store.advance(schedule, firing, run_id, error_text):
        _tell(schedule, firing, run_id)


def _tell(schedule: Schedule, firing: Firing, run_id: str | None) -> None:
    if not firing.times:
        _log.warning("schedule %s skipped what it missed", schedule.name)
    elif run_id is not None:
        _log.info("schedule %s was due; runs: %d, newest %s", schedule.name, len(firing.times), run_id)
    if len(firing.times) == AT_MOST and firing.times[0] != schedule.next_at:
        _log.warning("schedule %s missed more than %d times; the oldest are left out", schedule.name, AT_MOST)


class Beat(Scheduler):  # type: ignore[misc] # Celery is untyped
    """What `celery -A ferrum beat` runs: these schedules, beside Celery's own `beat_schedule`."""

    max_interval = _LOOK_S

    def __init__(self, *args: Any, **more: Any) -> None:
        self._store: Schedules | None = None
        self._away = Outage(_log, "beat")
        super().__init__(*args, **more)

    def tick(self, *args: Any, **more: Any) -> float:
        """Fire what is due; in how many seconds to tick again."""
        rest = float(super().tick(*args, **more))
        try:
            soon = min(rest, fire_due(self._schedules()))
        except Unavailable as error:
            self._away.began(error)
            return _LOOK_S
        self._away.over()
        return soon

    def _schedules(self) -> Schedules:
        if self._store is None:
            from ferrum.celery import redis_url

            self._store = Schedules(redis_url(), patience_s=1)
        return self._store

    @property
    def info(self) -> str:
        return "    . schedules -> ferrum schedule list"

"""The run record in Redis: the truth about every run. The only room that knows Redis keys.

Each change is one Lua script and one round trip (`ferrum/lua/`), an atomic compare-and-set that also adds usage,
appends the event and answers what the caller needs. A claim hands out a token; whatever is later said with a token
that is no longer current is refused, and whatever is said twice with the same one is answered the same, so every
call may be repeated when its answer was lost on the way.

Keys, all under `ferrum:{pNN}` where NN is the run's partition:

    :run:<run>      hash    status, plan, budget, usage, counters
    :steps:<run>    hash    one JSON object per touched step (see lib.lua)
    :events:<run>   stream  what happened; holds inputs and outputs
    :parked:<run>   hash    signatures of waiting steps
    :plan:<sha256>  hash    one JSON object per step, and the workflow itself
    :open:<run>     set     the steps inside of others that were begun and have not ended
    :inner:<run>    set     the runs inside of it that have not ended, each behind the step that waits for it, or `!`
    :late:<run>     set     the steps that a deadline waits for
    :undo:<run>     list    the steps that completed and can be undone, in that order
    :leases :timers :asks :ready:<queue>:<lane>   sorted sets of `run step`, by time
    :marks          hash    per queue and lane, when the youngest claimed step had become ready, and what sweeps saw
    :runs           sorted set of runs, by creation
    :live           set of the runs that have not ended
    :holding        set     what steps that wait for their parts hold of all that runs share
    :tenants        hash    how many of them each tenant has
    :key:<key>      until when (ms), and the run that an idempotency key started
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeVar, cast
from zlib import crc32

from pydantic import JsonValue
from redis.client import Pipeline
from redis.exceptions import ResponseError
from ulid import ULID

from ferrum.errors import Conflict, Misplaced, NotFound, did_you_mean
from ferrum.events import Event, RunCreated, RunEnded, RunState, StepWaiting, fold, read
from ferrum.governance.budget import counters
from ferrum.refusals import misplaced
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.scripts import BLOCK_S, TIMEOUT_S, Connection, Scripts, known, us
from ferrum.untrusted import Marks

#: Fixed: a run's partition is part of its id, and every process must agree on it.
PARTITIONS = 16
#: The same idempotency key starts one run within this time.
KEY_LIFE_S = 86400
#: A step is not tried again when so many workers died while they ran it, and at most half as many others did …
POISON = 5
#: … or, whoever else died, when it lost its worker so often …
MAX_LOST = 20
#: … within this time.
POISON_WITHIN_S = 3600.0
#: The youngest deaths of workers that are looked at.
_DEATHS = 100
#: The most of each kind that one sweep of one partition repairs.
SWEEP_BATCH = 200
#: Items or results that one script is given at most.
SPREAD_BATCH = 200
#: Signals of one name that a run keeps until a step waits for them.
MAX_SIGNALS = 1000
#: How many runs may be inside of each other.
MAX_DEPTH = 200
#: A queue is a list for each lane; the first is served first.
LANES = 10

#: Longer than anybody waits, and a time that a timer can have.
_LONGEST_WAIT_S = 100 * 365 * 86400.0

#: Who is alive, by when that must be said again.
_WORKERS = "ferrum:workers"
#: Messages that were revoked, by when: a sorted set.
_REVOKED = "ferrum:revoked"
#: How long that is remembered, in seconds, and of how many at most.
REVOKED_LIFE_S = 7 * 86400
_MOST_REVOKED = 50_000
#: Workers that died while they ran a step, by when.
_DIED = "ferrum:died"
#: Field of a registered workflow that names its newest version.
_NEWEST = " newest"

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_T = TypeVar("_T")


def new_run_id(key: str | None = None, *, beside: str | None = None) -> str:
    """`run_` and a ULID, whose last character says the partition.

    Runs of one key share theirs, and so does a run with that `beside` which it is to be.
    """
    if beside is not None:
        partition = _CROCKFORD.index(beside[-1]) % PARTITIONS
    else:
        partition = crc32(key.encode()) % PARTITIONS if key else random.randrange(PARTITIONS)  # noqa: S311
    # Its time, by the clock of this process, decides nothing; what is sorted by time goes by that of Redis.
    # Not `ULID()`: it counts up within a millisecond, so two ids may differ in nothing but the last character.
    fresh = ULID.from_bytes(round(time.time() * 1000).to_bytes(6, "big") + os.urandom(10))
    return f"run_{str(fresh)[:-1]}{_CROCKFORD[partition + PARTITIONS * random.randrange(2)]}"  # noqa: S311


def base_of(run_id: str) -> str:
    """The start of every key of this run.

    Raises `NotFound` for what cannot be a run's id.
    """
    place = _CROCKFORD.find(run_id[-1:])
    if len(run_id) != 30 or not run_id.startswith("run_") or place < 0:
        raise NotFound(f"{run_id!r} is not a run's id: they look like run_01JD3Y…, 30 characters")
    return _base(place % PARTITIONS)


@cache
def _base(partition: int) -> str:
    return f"ferrum:{{p{partition:02}}}"


_PARTITIONS = tuple(_base(partition) for partition in range(PARTITIONS))


@dataclass(frozen=True, slots=True)
class Edge:
    """A step that waits for another one."""

    #: Its name among its siblings.
    step: str
    #: How many needs it has.
    needs: int
    #: Whether the canvas of the step before carries it.
    on_canvas: bool
    queue: str
    segment: str
    deadline_ms: int = 0


@dataclass(frozen=True, slots=True)
class Read:
    """An ended step whose output another one sees."""

    #: What its expressions call it.
    name: str
    #: The step: the first so many parts of the reader's own id, and this behind them.
    parts: int
    step: str


@dataclass(frozen=True, slots=True)
class Node:
    """What the record must know of one step of a plan."""

    queue: str
    #: The canvas that it belongs to.
    segment: str
    #: Siblings that must have ended, by their names.
    needs: tuple[str, ...]
    next: tuple[Edge, ...]
    #: Whether a claim must hand out the run's input.
    wants_input: bool
    reads: tuple[Read, ...] = ()
    #: Names of items that it sees, and how many parts of its id are the frame whose item that is.
    items: tuple[tuple[str, int], ...] = ()
    #: How it stands in a frame: `None` outside of any, 0 where it is the frame, 1 where it is one of its steps.
    inside: int | None = None
    #: How many steps its frame has.
    siblings: int = 1
    #: Its frame is called as the step around it is.
    nameless: bool = False
    tolerated: bool = False
    #: It can be undone: there is a step `<id>.compensate`.
    undoable: bool = False
    #: It, or what it is inside of, undoes something.
    undoes: bool = False
    #: It is what undoes, as a whole.
    undo: bool = False
    #: Steps may go on inside of it.
    composed: bool = False
    deadline_ms: int = 0

    def dumps(self) -> str:
        edges = [
            [edge.step, edge.needs, int(edge.on_canvas), edge.queue, edge.segment, edge.deadline_ms]
            for edge in self.next
        ]
        node: dict[str, object] = {
            "q": self.queue, "g": self.segment, "n": self.needs, "x": edges, "i": int(self.wants_input),
            "s": self.siblings,
        }  # fmt: skip
        if self.reads:
            node["o"] = [[read.name, read.parts, read.step] for read in self.reads]
        if self.items:
            node["v"] = self.items
        if self.inside is not None:
            node["u"] = self.inside
        flags = {
            "own": self.nameless, "y": self.tolerated, "c": self.undoable, "k": self.undoes, "kr": self.undo,
            "b": self.composed, "d": self.deadline_ms,
        }  # fmt: skip
        node |= {name: int(value) for name, value in flags.items() if value}
        return _dumps(node)


@dataclass(frozen=True, slots=True)
class Frame:
    """Steps that run together inside another one, or all of a workflow's."""

    steps: int
    #: Those that wait for none of the others: name, queue, segment and deadline in ms.
    roots: tuple[tuple[str, str, str, int], ...]

    def dumps(self) -> str:
        return _dumps({"s": self.steps, "r": self.roots})


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames that a step waits for."""

    #: The name of the only one, else they are numbered from 0.
    label: str | None
    total: int = 1
    #: How many at a time, and how many more begin together once there is room for so many.
    window: int = 1
    chunk: int = 1
    #: Whether the first that fails ends the wait.
    fail_fast: bool = False

    def dumps(self) -> str:
        known = {
            "total": self.total, "left": self.total, "next": 0, "window": self.window, "chunk": self.chunk,
            "ff": int(self.fail_fast),
        }  # fmt: skip
        return _dumps(known if self.label is None else {**known, "label": self.label})


@dataclass(frozen=True, slots=True)
class NewRun:
    """All that the record needs to begin a run."""

    run_id: str
    key: str | None
    #: sha256 of the plan, and how to make what is kept of it: the workflow as JSON, and its nodes.
    plan: str
    document: Callable[[], str]
    nodes: Callable[[], Mapping[str, str]]
    steps: int
    #: Name, queue and deadline in ms.
    roots: tuple[tuple[str, str, int], ...]
    workflow: str
    version: str
    #: Envelope.
    input: str
    has_outputs: bool
    limits: Mapping[str, int]
    wall_time_s: float | None
    keep_s: float
    #: 0 is served first.
    lane: int = 4
    deadline_s: float | None = None
    #: Whose run it is: those who have few runs are served before those who have many.
    tenant: str = "default"
    #: The run and the step that it is part of.
    parent: tuple[str, str] | None = None
    #: The run whose results it takes over, and how: it begins by `begin`, not at once.
    origin: tuple[str, str] | None = None
    marks: Marks = field(default_factory=Marks.new)


@dataclass(frozen=True, slots=True)
class Created:
    """A run that is there."""

    run_id: str
    #: Of its messages: a tenant with many runs waits behind those with few. `None` where its key began it before.
    lane: int | None


@dataclass(frozen=True, slots=True)
class Need:
    status: StepStatus
    #: Envelope; empty unless it completed.
    output: str
    #: The reason of the policy, where that is why it failed.
    denied: str = ""


@dataclass(frozen=True, slots=True)
class FrameEnd:
    """What a frame came to."""

    #: Whether nothing in it goes on.
    over: bool
    ends: Mapping[str, Need]
    #: The step in it that failed and may not, why, and what the policy had against it.
    failed: str = ""
    error: str = ""
    denied: str = ""
    #: Envelope of what it was given; empty where that was not asked for.
    item: str = ""


@dataclass(frozen=True, slots=True)
class Claimed:
    """This worker has the step now."""

    plan: str
    attempt: int
    failed_tries: int
    #: What a person decided, and the digest of the act that it was about.
    verdict: Verdict | None
    bound: str
    #: Digests of the acts of this step that a person approved.
    grants: frozenset[str]
    #: Envelope; empty unless the step wants it.
    input: str
    #: What the step asked to be told again when it was parked.
    memory: JsonValue
    #: Envelope of the signal that it waited for; empty before that came.
    signal: str
    tenant: str
    #: When it was claimed, by the clock of Redis, in seconds since 1970.
    at: float = field(compare=False)
    marks: Marks
    needs: Mapping[str, Need]


@dataclass(frozen=True, slots=True)
class Dropped:
    """This copy of the message has nothing to do, and neither has its canvas."""

    why: str


@dataclass(frozen=True, slots=True)
class Passed:
    """The step ended before; its canvas may go on."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The step has ended: what its worker must send, since no canvas will."""

    sends: tuple[Resend, ...] = ()
    #: Every step has ended: evaluate the run's outputs and close it.
    close: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    approved: bool
    by: str
    note: str = ""
    expired: bool = False


@dataclass(frozen=True, slots=True)
class Resend:
    """A step that must be sent now."""

    run_id: str
    step_id: str
    #: The signature it was parked with; empty: alone; `head`: the segment that it begins.
    signature: str
    lane: int = 4


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep found."""

    sends: tuple[Resend, ...]
    #: In how many seconds the next timer is due; `None` where there is none.
    next_in_s: float | None


@dataclass(frozen=True, slots=True)
class Holding:
    """Something that all runs share and one step holds while its parts run."""

    run_id: str
    step_id: str
    kind: str
    key: str
    #: Whether the step has not ended.
    going: bool


@dataclass(frozen=True, slots=True)
class Held:
    """A claim that this process holds."""

    run_id: str
    step_id: str
    token: str


@dataclass(frozen=True, slots=True)
class Summary:
    run_id: str
    status: RunStatus
    plan: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Asked:
    """Something that waits for a person."""

    run_id: str
    step_id: str
    since: float
    #: The id of the event that says what is asked, and how often the step has asked so far.
    event: str
    times: int


class Lost(Exception):
    """The claim is no longer held: the run ended, or the step was given to another worker."""


class Over(Exception):
    """The run ended, because an act would have passed a limit of its budget."""

    def __init__(self, limit: str, sends: tuple[Resend, ...] = ()) -> None:
        super().__init__(limit, sends)
        #: What must be sent because of that.
        self.sends = sends


class TooDeep(Exception):
    """The run would be inside of too many others."""


def _wire(usage: Usage) -> dict[str, int]:
    """Usage as the scripts add it up, zeros left out."""
    return {name: amount for name, amount in counters(usage).items() if amount}


def _dumps(value: object) -> str:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    # Half a character, as an error has that names a file whose name is not UTF-8, cannot be sent.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class Record(Connection):
    """The record, through one Redis client. Safe to share between threads."""

    def __init__(
        self, url: str, *, patience_s: float = 5.0, timeout_s: float = TIMEOUT_S, connections: int = 256
    ) -> None:
        super().__init__(url, patience_s=patience_s, timeout_s=timeout_s, connections=connections)
        self._forgotten_to: dict[int, int] = {}

    # What a run goes through.

    def create(self, run: NewRun) -> Created:
        """Begin a run, or say which one its key began first.

        Raises `TooDeep`, and `Lost` when the run that it is part of has ended.
        """
        limits = _dumps(dict(run.limits)) if run.limits else ""
        wall = str(round(run.wall_time_s * 1000)) if run.wall_time_s is not None else ""
        deadline = str(round(run.deadline_s * 1000)) if run.deadline_s is not None else ""
        parent = " ".join(run.parent) if run.parent else ""
        made: dict[str, object] = {"workflow": run.workflow, "version": run.version, "plan": run.plan}
        made |= {"tenant": run.tenant, "priority": LANES - 1 - run.lane}
        if run.parent:
            made["parent"] = run.parent
        if run.origin:
            made["origin"], made["how"] = run.origin
        created = _dumps(made)
        keep_ms = round(run.keep_s * 1000)
        arguments: list[str | int] = [
            run.run_id, run.key or "", KEY_LIFE_S * 1000, run.plan, keep_ms, limits, wall, int(run.has_outputs),
            run.steps, run.input, created, run.lane, deadline, parent, MAX_DEPTH, int(not run.origin), run.tenant,
            run.marks.dumps(), *(text for root in run.roots for text in root),
        ]  # fmt: skip
        reply = self._run("create", run.run_id, *arguments)
        while reply[0] == "plan":
            self._store_plan(run)
            reply = self._run("create", run.run_id, *arguments)
        if reply[0] == "deep":
            raise TooDeep
        if reply[0] == "gone":
            raise Lost
        return Created(run.run_id, int(reply[1])) if reply[0] == "new" else Created(str(reply[1]), None)

    def _store_plan(self, run: NewRun) -> None:
        fields = {**run.nodes(), " doc": run.document()}
        self._run("store_plan", run.run_id, run.run_id, run.plan, *(text for pair in fields.items() for text in pair))

    def plan_document(self, run_id: str, plan: str) -> str:
        """The workflow of a run, as it was when the run began, as JSON."""
        text = self._patiently(lambda: self._redis.hget(f"{base_of(run_id)}:plan:{plan}", " doc"))
        if text is None:
            raise NotFound(f"the plan of run {run_id!r} is no longer kept")
        return str(text)

    def claim(self, held: Held, worker: str, lease_s: float) -> Claimed | Passed | Dropped | Ended:
        """Take the step, if it may run now."""
        reply = self._run("claim", held.run_id, held.run_id, held.step_id, held.token, worker, round(lease_s * 1000))
        match reply[0]:
            case "run":
                return _claimed(reply)
            case "pass":
                return Passed()
            case "drop":
                return Dropped(str(reply[1]))
            case _:
                return _ended(reply)

    def admit(
        self, held: Held, act: int, data: Mapping[str, object], *, allowed: bool, wanted: Usage, spent: Usage
    ) -> None:
        """Keep the decision about the `act`-th act of this claim and reserve what it may use.

        Raises `Over` when that would pass a limit, which ends the run, and `Lost`.
        """
        body = {**data, "usage": _wire(spent)}
        reply = self._run(
            "admit", held.run_id, held.run_id, held.step_id, held.token, act, int(allowed),
            _dumps(_wire(wanted)), _dumps(_wire(spent)), _dumps(body),
        )  # fmt: skip
        if reply[0] == "over":
            raise Over(str(reply[1]), _sends(reply[2]))
        _held(reply)

    def say(self, held: Held, number: int, data: Mapping[str, object]) -> None:
        """Keep the `number`-th piece of what this claim's attempt says. Raises `Lost`."""
        _held(self._run("say", held.run_id, held.run_id, held.step_id, held.token, number, _dumps(data)))

    def finish(
        self,
        held: Held,
        status: StepStatus,
        data: Mapping[str, object],
        *,
        output: str = "",
        usage: Usage,
        denied: str = "",
    ) -> Ended:
        """The step ended, with this status. Raises `Lost`."""
        wire = _wire(usage)
        body = {**data, "usage": wire} if wire else data
        reply = self._run(
            "finish", held.run_id, held.run_id, held.step_id, held.token, status.value, _dumps(body), output,
            _dumps(wire), denied,
        )  # fmt: skip
        _held(reply)
        return _ended(reply)

    def park(
        self, held: Held, kind: str, signature: str, data: Mapping[str, object], *, wake_in_s: float | None,
        usage: Usage, bound: str = "", memory: JsonValue = None, awaited: str = "", frames: Frames | None = None,
        item: str = "", holding: Sequence[tuple[str, str]] = (),
    ) -> Ended:  # fmt: skip
        """The step leaves its worker to wait; `awaited` is a signal's name or a run's id. Raises `Lost`.

        `holding`: what it holds meanwhile of all that runs share, kind and key.
        """
        wire = _wire(usage)
        wake = "" if wake_in_s is None else str(max(0, round(min(wake_in_s, _LONGEST_WAIT_S) * 1000)))
        body = {**data, "kind": kind, "wakes_in": wake_in_s, "usage": wire}
        reply = self._run(
            "park", held.run_id, held.run_id, held.step_id, held.token, kind, wake, signature, _dumps(body),
            _dumps(wire), bound, _dumps(memory) if memory is not None else "", awaited,
            frames.dumps() if frames else "", item, *(text for pair in holding for text in pair),
        )  # fmt: skip
        _held(reply)
        return _ended(reply)

    def spread(self, held: Held, items: Sequence[tuple[str, str]]) -> None:
        """Keep the items of frames that are to begin: frame and envelope. Raises `Lost`."""
        for start in range(0, len(items), SPREAD_BATCH):
            batch = items[start : start + SPREAD_BATCH]
            texts = [text for item in batch for text in item]
            _held(self._run("spread", held.run_id, held.run_id, held.step_id, held.token, *texts))

    def wake(self, run_id: str, step_id: str, kind: str, why: str) -> tuple[Resend, ...]:
        """What the step waited for outside of its run is there; what must be sent. Raises `Lost` when it has ended."""
        reply = self._run("wake", run_id, run_id, step_id, kind, why)
        if reply[0] == "gone":
            raise Lost
        return _ended(reply).sends

    def hand_back(
        self, held: Held, worker: str, attempt: int, usage: Usage, *, reason: str = "its worker is stopping"
    ) -> None:
        """A worker gives the step back, to run again elsewhere. Raises `Lost`."""
        wire = _wire(usage)
        body = {"reason": reason, "worker": worker, "attempt": attempt, "usage": wire}
        _held(self._run("hand_back", held.run_id, held.run_id, held.step_id, held.token, _dumps(wire), _dumps(body)))

    def close(
        self, run_id: str, status: RunStatus, *, outputs: str = "", reason: str | None = None
    ) -> tuple[Resend, ...]:
        """End a run whose steps have all ended, and return what must be sent.

        Nothing happens to one that ended already.
        """
        data = {"status": status.value} | ({"reason": reason} if reason else {})
        reply = self._run("close", run_id, run_id, status.value, _dumps(data), outputs)
        return _sends(reply[2]) if reply[0] == "ok" else ()

    def adopt(self, run_id: str, kept: Sequence[tuple[str, Mapping[str, object], str]]) -> None:
        """Results that a run takes over before it begins: step, what its event says, envelope."""
        for start in range(0, len(kept), SPREAD_BATCH):
            batch = kept[start : start + SPREAD_BATCH]
            texts = [text for step, data, output in batch for text in (step, _dumps(data), output)]
            self._run("adopt", run_id, run_id, *texts)

    def begin(
        self, run_id: str, kept: str, ready: Sequence[tuple[str, str, int]], ended: Mapping[str, int]
    ) -> tuple[Resend, ...]:
        """Begin a run whose results were taken over; returns what must be sent.

        `kept`: one of those results; `ready`: name, queue and deadline in ms of what can run; `ended`: of the others,
        how many needs have ended.
        """
        texts = [text for step in ready for text in step]
        counts = [text for pair in ended.items() for text in pair]
        reply = self._run("begin", run_id, run_id, kept, len(ready), *texts, *counts)
        return _sends(reply[2]) if reply[0] == "ok" else ()

    # What people do to a run.

    def decide(self, run_id: str, step_id: str, verdict: Verdict, asked: str = "") -> tuple[Resend, ...]:
        """Answer what waits for a person; returns what must be sent.

        `asked` is the id of the event with what they were shown; where it is empty they are not asked what they saw.
        Raises `NotFound`, and `Conflict` for a second answer, and where the step asks for something else by now.
        """
        data = {"approved": verdict.approved, "by": verdict.by, "note": verdict.note}
        # The time makes this answer ours: when the reply is lost and we ask again, we know it.
        text = _dumps({**data, "at": time.time_ns()})
        reply = self._run("decide", run_id, run_id, step_id, text, _dumps(data), int(verdict.approved), asked)
        if reply[0] == "ok":
            return _sends(reply[2])
        state, first = str(reply[1]), str(reply[2])
        if first == text:
            return ()
        if state == "missing":
            raise NotFound(f"there is no run {run_id!r}; it may have been removed after its time")
        if state == "no step":
            raise NotFound(f"run {run_id!r} has no step {step_id!r}")
        if first:
            raise Conflict(f"{step_id!r} of run {run_id!r} {_said(first)}; a decision is final")
        if state == "another":
            raise Conflict(f"{step_id!r} of run {run_id!r} asks for something else by now: look again, then decide")
        raise Conflict(f"{step_id!r} of run {run_id!r} waits for no decision: {_who_is(state)}")

    def signal(self, run_id: str, name: str, envelope: str, by: str) -> tuple[Resend, ...]:
        """Hand a signal to the step that waits for it, or keep it until one does; returns what must be sent.

        Raises `NotFound`, and `Conflict` for a run that has ended or holds too many signals of that name.
        """
        data = _dumps({"name": name, "by": by})
        reply = self._run("signal", run_id, run_id, name, envelope, data, MAX_SIGNALS, str(ULID()))
        _live(run_id, reply)
        if reply[0] == "full":
            raise Conflict(f"run {run_id!r} keeps {MAX_SIGNALS} signals {name!r} that no step has waited for")
        return _sends(reply[2])

    def cancel(self, run_id: str, by: str, reason: str | None = None) -> tuple[Resend, ...]:
        """End a run now; returns what must be sent. Raises `NotFound`, and `Conflict` for one that has ended."""
        data = {"status": "cancelled", "by": by} | ({"reason": reason} if reason else {})
        # The last argument makes this cancel ours: when the reply is lost and we ask again, the record knows it.
        reply = self._run("cancel", run_id, run_id, _dumps(data), str(ULID()))
        _live(run_id, reply)
        return _sends(reply[2])

    def revoke(self, run_id: str, step_id: str, why: str) -> tuple[Resend, ...]:
        """Cancel one step of a run, whatever it does; returns what must be sent.

        Raises `NotFound`, and `Conflict` for a step that has ended or was not begun.
        """
        reply = self._run("revoke", run_id, run_id, step_id, why)
        if reply[0] == "ok":
            return _sends(reply[2])
        if reply[1] == "missing":
            raise NotFound(f"there is no run {run_id!r}; it may have been removed after its time")
        if reply[1] == "no step":
            raise NotFound(f"run {run_id!r} has no step {step_id!r}")
        raise Conflict(f"{step_id!r} of run {run_id!r} cannot be revoked: {_who_is(str(reply[1]))}")

    def revoke_messages(self, ids: Sequence[str]) -> None:
        """Remember for `REVOKED_LIFE_S` that no run is to be begun by a message with one of these ids."""
        scripts = Scripts(self._redis, self._patience_s)
        for begin in range(0, len(ids), 1000):
            some = ids[begin : begin + 1000]
            scripts.eval("revoked/add", _REVOKED, "", us(REVOKED_LIFE_S), _MOST_REVOKED, *some)

    def is_revoked(self, id: str) -> bool:
        """Tell whether the message with this id was revoked."""
        scripts = Scripts(self._redis, self._patience_s)
        return bool(scripts.eval("revoked/has", _REVOKED, "", us(REVOKED_LIFE_S), id))

    def nudge(self, run_id: str) -> tuple[Resend, ...]:
        """Wake what waits for its time and send again what is ready. Raises `NotFound` and `Conflict`."""
        reply = self._run("nudge", run_id, run_id)
        _live(run_id, reply)
        return _sends(reply[2])

    # What keeps runs going.

    def renew(self, held: Sequence[Held], lease_s: float) -> list[Held]:
        """Renew these claims; returns those that are no longer held."""
        lost: list[Held] = []
        for base, group in _by_base(held).items():
            names = [text for one in group for text in (one.run_id, one.step_id, one.token)]
            # Not patiently: whoever cannot renew in time has something else to do about it.
            numbers = Scripts(self._redis, 0, folder="").eval("renew", base, "", round(lease_s * 1000), *names)
            lost += [group[int(number)] for number in numbers]
        return lost

    def release(self, held: Sequence[Held]) -> None:
        """What follows these steps was sent: their claims need no repair any more."""
        pipe = self._redis.pipeline(transaction=False)
        for base, group in _by_base(held).items():
            pipe.zrem(f"{base}:leases", *(f"{one.run_id} {one.step_id} {one.token}" for one in group))
        pipe.execute()

    def sweep(self, queues: Mapping[tuple[str, int], bool], *, resend_after_s: float, reap: bool) -> Swept:
        """Repair every partition once: due timers, dead workers, lost messages.

        `queues` says of each queue and lane whether it is empty at the broker.
        """
        lanes = [[f"{queue}:{lane}", int(empty)] for (queue, lane), empty in queues.items()]
        pipe = self._redis.pipeline(transaction=False)
        pipe.time()
        pipe.zrange(_DIED, -_DEATHS, -1, withscores=True)
        clock, deaths = known(pipe.execute(raise_on_error=False))
        rule = {
            "few": POISON, "many": MAX_LOST, "within": round(POISON_WITHIN_S * 1000),
            "deaths": [[worker, round(at)] for worker, at in deaths],
        }  # fmt: skip
        arguments: list[str | int] = [
            "", int(reap), round(resend_after_s * 1000), _dumps(rule), SWEEP_BATCH, _dumps(lanes),
        ]  # fmt: skip
        # Not patiently: when Redis was away, whose leases ran out is to be thought over first.
        answers = Scripts(self._redis, 0, folder="").eval_each("sweep", _PARTITIONS, *arguments, pass_over=True)
        replies = [reply for reply in answers if reply]
        self._note_deaths({name for reply in replies for name in reply[2]}, int(clock[0]) * 1000)
        waits = [int(reply[1]) / 1000 for reply in replies if reply[1] != ""]
        return Swept(tuple(one for reply in replies for one in _sends(reply[0])), min(waits, default=None))

    def _note_deaths(self, workers: set[str], now_ms: int) -> None:
        """Remember who died when: by that, a step that ends its workers is told from a bad night."""
        if workers:
            pipe = self._redis.pipeline(transaction=False)
            pipe.zadd(_DIED, dict.fromkeys(workers, now_ms), nx=True)
            pipe.zremrangebyrank(_DIED, 0, -_DEATHS - 1)
            pipe.expire(_DIED, round(2 * POISON_WITHIN_S))
            known(pipe.execute(raise_on_error=False))

    def holding(self) -> list[Holding]:
        """What steps that wait for their parts hold of all that runs share; those that have ended are told once."""
        replies = Scripts(self._redis, 0, folder="").eval_each("holding", _PARTITIONS, "", pass_over=True)
        return [
            Holding(flat[i], flat[i + 1], flat[i + 2], flat[i + 3], flat[i + 4] == "1")
            for flat in replies
            for i in range(0, len(flat), 5)
        ]

    def alone(self, name: str, holder: str, for_s: float) -> bool:
        """Whether this holder has the lock `name` now, for so long; holding it already renews it."""
        # Not patiently: whoever cannot ask does not hold it.
        scripts = Scripts(self._redis, 0)
        return bool(scripts.eval("workers/alone", f"ferrum:lock:{name}", "", holder, us(for_s)))

    def misplaced(self) -> list[Misplaced]:
        """Keys of all runs, and of all runs of a partition, in whose place something else stands in Redis."""
        kinds = {_WORKERS: "zset", _REVOKED: "zset", _DIED: "zset"}
        for name, kind in (("leases", "zset"), ("timers", "zset"), ("marks", "hash"), ("holding", "set")):
            kinds |= {f"{base}:{name}": kind for base in _PARTITIONS}
        pipe = self._redis.pipeline(transaction=False)
        for key in kinds:
            pipe.type(key)
        return [
            Misplaced(key, str(kind))
            for (key, right), kind in zip(kinds.items(), pipe.execute(), strict=True)
            if kind not in (right, "none")
        ]

    def beat(self, worker: str, for_s: float) -> None:
        """This worker is alive, for so long by the clock of Redis."""
        Scripts(self._redis, 0).eval("workers/beat", _WORKERS, "", worker, us(for_s))

    def is_old(self) -> bool:
        """Tell whether this Redis is older than 7: it lacks the command that takes messages."""
        try:
            self._patiently(lambda: self._redis.lmpop(1, "ferrum:nothing", direction="RIGHT"))
        except ResponseError as error:
            return str(error).lower().startswith("unknown command")
        return False

    def other_store(self, identity: str, url: str, worker: str) -> str | None:
        """The URL of the artifact store that other workers have, where it is not this one; else this one is noted."""
        key, mine = "ferrum:artifact-store", _dumps({"id": identity, "url": url})
        if self._patiently(lambda: self._redis.set(key, mine, nx=True)):
            return None
        kept = self._kept_store(key)
        if kept is not None and kept["id"] == identity:
            return None
        if kept is not None and any(name != worker for name in self.workers()):
            return str(kept["url"])
        # Nobody uses the other one any more.
        self._patiently(lambda: self._redis.set(key, mine))
        return None

    def _kept_store(self, key: str) -> dict[str, str] | None:
        """The store that is noted; `None` for what no worker wrote."""
        try:
            kept = json.loads(str(self._patiently(lambda: self._redis.get(key))))
        except (ValueError, ResponseError) as error:
            if isinstance(error, ResponseError) and not misplaced(error):
                raise
            return None
        return kept if isinstance(kept, dict) and kept.keys() == {"id", "url"} else None

    def gone(self, worker: str) -> None:
        try:
            self._redis.zrem(_WORKERS, worker)
        except ResponseError as error:
            if not misplaced(error):
                raise

    def workers(self) -> list[str]:
        """The workers that are alive."""
        return [str(name) for name in self.scripts().eval("workers/alive", _WORKERS, "")]

    def now(self) -> float:
        """The time of the fleet, which is that of Redis, in seconds since 1970."""
        clock: Any = self._patiently(self._redis.time)
        return int(clock[0]) + int(clock[1]) / 1e6

    def empty_queues(self, queues: Iterable[str]) -> dict[tuple[str, int], bool]:
        """Whether each queue is empty at the broker, for each lane of it."""
        lanes = [(queue, lane) for queue in queues for lane in range(LANES)]
        pipe = self._redis.pipeline(transaction=False)
        for queue, lane in lanes:
            # As kombu names the list of a priority.
            pipe.llen(f"{queue}\x06\x16{lane}" if lane else queue)
        # What is no list gives an error in its place: it is not empty, and nothing can be sent there.
        lengths = pipe.execute(raise_on_error=False)
        return {lane: length == 0 for lane, length in zip(lanes, lengths, strict=True)}

    # What can be seen.

    def events(self, run_id: str, after: str = "0-0", *, block_s: float | None = None) -> list[Event]:
        """The events after the one with id `after`; with `block_s`, waits so long for the first."""
        entries = self._entries(f"{base_of(run_id)}:events:{run_id}", after, block_s)
        return [read(run_id, event_id, fields) for event_id, fields in entries]

    def _entries(self, key: str, after: str, block_s: float | None) -> list[tuple[str, dict[str, str]]]:
        deadline = None if block_s is None else time.monotonic() + block_s

        def once() -> Any:
            if deadline is None:
                return self._redis.xread({key: after})
            left = min(BLOCK_S, deadline - time.monotonic())
            return self._waiting.xread({key: after}, block=max(1, round(left * 1000)))

        while not (reply := self._patiently(once)):
            if deadline is None or time.monotonic() >= deadline:
                return []
        # redis-py answers in the shape of RESP2 or of RESP3.
        entries: list[tuple[str, dict[str, str]]] = reply[0][1] if isinstance(reply, list) else reply[key][0]
        return entries

    def ending(self, run_id: str, timeout_s: float | None = None) -> RunEnded | None:
        """The event that a run ended with, once it has; `None` after `timeout_s`. Raises `NotFound`."""
        key = f"{base_of(run_id)}:events:{run_id}"
        deadline = None if timeout_s is None else time.monotonic() + timeout_s

        def last() -> Any:
            return self._patiently(lambda: self._redis.xrevrange(key, count=1))

        newest = last()
        while True:
            if not newest:
                raise NotFound(f"there is no run {run_id!r}; it may have been removed after its time")
            event_id, fields = newest[-1]
            # Nothing comes after it, and no other event needs to be read to wait for it.
            if fields["t"] == "run.ended":
                return cast("RunEnded", read(run_id, event_id, fields))
            left = BLOCK_S if deadline is None else min(BLOCK_S, deadline - time.monotonic())
            if left <= 0:
                return None
            # Nothing new for so long: maybe there is nothing left that could come.
            newest = self._entries(key, event_id, left) or last()

    def state(self, run_id: str) -> RunState:
        """What a run's events add up to. Raises `NotFound`."""
        state = fold(self.events(run_id))
        if not state.run_id:
            raise NotFound(f"there is no run {run_id!r}; it may have been removed after its time")
        return state

    def status(self, run_id: str) -> RunStatus:
        """Where the run stands. Raises `NotFound`."""
        status = self._patiently(lambda: self._redis.hget(f"{base_of(run_id)}:run:{run_id}", "status"))
        if status is None:
            raise NotFound(f"there is no run {run_id!r}; it may have been removed after its time")
        return RunStatus(str(status))

    def plan_digest(self, run_id: str) -> str:
        """sha256 of the plan that the run follows. Raises `NotFound`."""
        digest = self._patiently(lambda: self._redis.hget(f"{base_of(run_id)}:run:{run_id}", "plan"))
        if digest is None:
            raise NotFound(f"there is no run {run_id!r}; it may have been removed after its time")
        return str(digest)

    def marks(self, run_id: str) -> Marks:
        """Return the marks of the run. Raises `NotFound`."""
        marks = self._patiently(lambda: self._redis.hget(f"{base_of(run_id)}:run:{run_id}", "marks"))
        if marks is None:
            raise NotFound(f"there is no run {run_id!r}; it may have been removed after its time")
        return Marks.loads(str(marks))

    def step_outputs(self, run_id: str, steps: Iterable[str]) -> dict[str, Need]:
        """How these steps ended, and with what."""
        names = list(steps)
        if not names:
            return {}
        base = base_of(run_id)
        raws = self._patiently(lambda: self._redis.hmget(f"{base}:steps:{run_id}", names))
        found: dict[str, Any] = {
            name: state
            for name, raw in zip(names, cast("list[Any]", raws), strict=True)
            if raw and "e" in (state := json.loads(raw))
        }

        def ask(pipe: Pipeline) -> None:
            for state in found.values():
                pipe.xrange(f"{base}:events:{run_id}", state["e"], state["e"])

        entries = self._patiently(lambda: self._at_once(ask))
        return {
            name: Need(StepStatus(state["s"]), entry[0][1].get("o", ""), state.get("x", ""))
            for (name, state), entry in zip(found.items(), entries, strict=True)
        }

    def frame_ends(
        self, run_id: str, frames: Sequence[str], names: Sequence[str], *, items: bool = False
    ) -> list[FrameEnd]:
        """How these frames ended: what the steps called `names` in them left, what failed, and if asked their items."""
        base = base_of(run_id)
        ids = [[f"{frame}.{name}" if name else frame for name in names] for frame in frames]
        fields = [
            field for frame, inner in zip(frames, ids, strict=True) for field in (f"F:{frame}", f"L:{frame}", *inner)
        ]
        raws = cast("list[Any]", self._patiently(lambda: self._redis.hmget(f"{base}:steps:{run_id}", fields)))
        width = 2 + len(names)
        rows = [raws[i : i + width] for i in range(0, len(raws), width)]
        failing = [row[0] for row in rows if row[0]]
        culprits = dict(zip(failing, self._states(run_id, failing), strict=True))
        states = [state for row in rows for raw in row[2:] if raw and "e" in (state := json.loads(raw))]
        states += culprits.values()

        def ask(pipe: Pipeline) -> None:
            for state in states:
                pipe.xrange(f"{base}:events:{run_id}", state["e"], state["e"])

        entries = self._patiently(lambda: self._at_once(ask)) if states else []
        events = {state["e"]: entry[0][1] for state, entry in zip(states, entries, strict=True)}
        ended = [_frame_end(row, names, culprits, events) for row in rows]
        if not items:
            return ended
        given = self._patiently(lambda: self._redis.hmget(f"{base}:steps:{run_id}", [f"i:{frame}" for frame in frames]))
        return [replace(end, item=item or "") for end, item in zip(ended, cast("list[Any]", given), strict=True)]

    def _states(self, run_id: str, steps: Sequence[str]) -> list[dict[str, Any]]:
        if not steps:
            return []
        raws = self._patiently(lambda: self._redis.hmget(f"{base_of(run_id)}:steps:{run_id}", list(steps)))
        return [json.loads(raw) for raw in cast("list[str]", raws)]

    def register(self, name: str, version: str, document: str) -> None:
        """Keep a workflow under its name and version, which is the newest from here on.

        Raises `Conflict` for a version that is there and says something else.
        """
        key = f"ferrum:{{workflows}}:{name}"
        if not self._patiently(lambda: self._redis.hsetnx(key, version, document)):
            known = self._patiently(lambda: self._redis.hget(key, version))
            if known != document:
                raise Conflict(f"version {version!r} of workflow {name!r} is registered and says something else")
        self._patiently(lambda: self._redis.hset(key, _NEWEST, version))

    def registered(self, name: str, version: str | None) -> Mapping[str, JsonValue]:
        """The workflow that is kept under this name, and version; the newest without one. Raises `NotFound`."""
        key = f"ferrum:{{workflows}}:{name}"
        wanted = version or self._patiently(lambda: self._redis.hget(key, _NEWEST))
        text = self._patiently(lambda: self._redis.hget(key, str(wanted))) if wanted else None
        if text is None:
            known = [str(one) for one in cast("Any", self._patiently(lambda: self._redis.hkeys(key))) if one != _NEWEST]
            if not known:
                raise NotFound(f"no workflow {name!r} is registered: ferrum workflows register FILE")
            raise NotFound(f"workflow {name!r} has no version {version!r}{did_you_mean(str(version), known)}")
        found: dict[str, JsonValue] = json.loads(str(text))
        return found

    def registrations(self) -> list[tuple[str, str, bool]]:
        """Every registered workflow: name, version, whether it is the newest."""
        found: list[tuple[str, str, bool]] = []
        for key in self._patiently(lambda: list(self._redis.scan_iter("ferrum:{workflows}:*", count=1000))):
            versions = cast("dict[str, str]", self._patiently(partial(self._redis.hgetall, key)))
            newest = versions.pop(_NEWEST, "")
            found += [(str(key).split(":", 2)[2], version, version == newest) for version in versions]
        return sorted(found)

    def input(self, run_id: str) -> str:
        """The envelope of the run's input."""
        base = base_of(run_id)
        entries = self._patiently(lambda: self._redis.xrange(f"{base}:events:{run_id}", count=1))
        return str(cast("Any", entries)[0][1]["o"])

    def runs(self, *, limit: int = 50) -> list[Summary]:
        """The newest runs, newest first; those whose time is over are dropped from the index on the way."""
        found: list[Summary] = []
        for partition in range(PARTITIONS):
            found += self._runs_of(_base(partition), limit)
        return sorted(found, key=lambda run: run.created_at, reverse=True)[:limit]

    def _runs_of(self, base: str, limit: int) -> list[Summary]:
        scored = self._patiently(lambda: self._redis.zrevrange(f"{base}:runs", 0, limit - 1, withscores=True))
        pairs = cast("list[tuple[str, float]]", scored)

        def ask(pipe: Pipeline) -> None:
            for run_id, _ in pairs:
                pipe.hmget(f"{base}:run:{run_id}", "status", "plan")

        found: list[Summary] = []
        replies = self._patiently(lambda: self._at_once(ask))
        for (run_id, created_ms), (status, plan) in zip(pairs, replies, strict=True):
            if status is None:
                self._patiently(partial(self._redis.zrem, f"{base}:runs", run_id))
            else:
                found.append(Summary(run_id, RunStatus(status), str(plan), created_ms / 1000))
        return found

    def forget_ended(self) -> None:
        """Drop runs from the index where Redis has let go of them: a page of each partition, the next one next time."""
        for partition in range(PARTITIONS):
            base = _base(partition)
            # Not the oldest: those may wait for a person for months, with the ended ones behind them.
            found: Any = self._redis.zscan(f"{base}:runs", self._forgotten_to.get(partition, 0), count=2000)
            cursor, page = found
            self._forgotten_to[partition] = cursor
            pipe = self._redis.pipeline(transaction=False)
            for run_id, _ in page:
                pipe.exists(f"{base}:run:{run_id}")
            gone = [run_id for (run_id, _), there in zip(page, pipe.execute(), strict=True) if not there]
            if gone:
                self._redis.zrem(f"{base}:runs", *gone)

    def any_live(self) -> bool:
        """Whether any run has not ended."""

        def count(pipe: Pipeline) -> None:
            for partition in range(PARTITIONS):
                pipe.scard(f"{_base(partition)}:live")

        return any(self._patiently(lambda: self._at_once(count)))

    def asked(self, run_id: str | None = None) -> list[Asked]:
        """Return what waits for a person, oldest first: of one run, or of all."""
        bases = [base_of(run_id)] if run_id else _PARTITIONS
        found = [one for base in bases for one in self._asked_in(base)]
        return sorted((one for one in found if run_id in (None, one.run_id)), key=lambda one: one.since)

    def _asked_in(self, base: str) -> list[Asked]:
        scored = self._patiently(partial(self._redis.zrange, f"{base}:asks", 0, -1, withscores=True))
        pairs = [(name.split(" "), since_ms) for name, since_ms in cast("list[tuple[str, float]]", scored)]

        def ask(pipe: Pipeline) -> None:
            for (run_id, step_id), _ in pairs:
                pipe.hget(f"{base}:run:{run_id}", "status")
                pipe.hget(f"{base}:steps:{run_id}", step_id)

        replies = iter(self._patiently(lambda: self._at_once(ask)) if pairs else ())
        found: list[Asked] = []
        for ((run_id, step_id), since_ms), status, raw in zip(pairs, replies, replies, strict=True):
            state = json.loads(raw) if raw else {}
            if status is None or RunStatus(status).ended or "ak" not in state:
                self._patiently(partial(self._redis.zrem, f"{base}:asks", f"{run_id} {step_id}"))
            else:
                found.append(Asked(run_id, step_id, since_ms / 1000, state["ak"], state["an"]))
        return found

    def asks(self, asked: Sequence[Asked]) -> list[StepWaiting | None]:
        """The events with what is asked; `None` where a run is gone."""

        def ask(pipe: Pipeline) -> None:
            for one in asked:
                pipe.xrange(f"{base_of(one.run_id)}:events:{one.run_id}", one.event, one.event)

        replies = self._patiently(lambda: self._at_once(ask)) if asked else []
        return [
            cast("StepWaiting", read(one.run_id, *entries[0])) if entries else None
            for one, entries in zip(asked, replies, strict=True)
        ]

    def created(self, run_ids: Iterable[str]) -> dict[str, RunCreated]:
        """The first event of each of these runs; those that are gone are left out."""
        names = list(run_ids)

        def ask(pipe: Pipeline) -> None:
            for run_id in names:
                pipe.xrange(f"{base_of(run_id)}:events:{run_id}", count=1)

        replies = self._patiently(lambda: self._at_once(ask)) if names else []
        first = {run_id: read(run_id, *entries[0]) for run_id, entries in zip(names, replies, strict=True) if entries}
        return {run_id: event for run_id, event in first.items() if isinstance(event, RunCreated)}

    # How it is asked.

    def _run(self, name: str, run_id: str, *arguments: str | int) -> list[Any]:
        return self._eval(name, base_of(run_id), *arguments)

    def _eval(self, name: str, base: str, *arguments: str | int) -> list[Any]:
        return cast("list[Any]", self._scripts.eval(name, base, *arguments))


def _claimed(reply: list[Any]) -> Claimed:
    _, plan, attempt, failed, verdict, bound, grants, run_input, memory, signal, tenant, at, marks, *needs = reply
    ends = {needs[i]: Need(StepStatus(needs[i + 1]), needs[i + 2]) for i in range(0, len(needs), 3)}
    said = _verdict(verdict) if verdict else None
    kept = json.loads(memory) if memory else None
    return Claimed(
        plan, attempt, failed, said, bound, frozenset(json.loads(grants)), run_input, kept, signal, tenant,
        int(at) / 1000, Marks.loads(marks), ends,
    )  # fmt: skip


def _frame_end(
    row: Sequence[Any],
    names: Sequence[str],
    culprits: Mapping[str, dict[str, Any]],
    events: Mapping[str, dict[str, str]],
) -> FrameEnd:
    failing, left, *raws = row
    ends: dict[str, Need] = {}
    for name, raw in zip(names, raws, strict=True):
        state = json.loads(raw) if raw else {}
        if "e" in state:
            ends[name] = Need(StepStatus(state["s"]), events[state["e"]].get("o", ""))
    # A frame of one step counts nothing: it has ended when that has.
    over = len(ends) == len(names) if left is None else left == "0"
    if not failing:
        return FrameEnd(over, ends)
    culprit = culprits[failing]
    error = str(json.loads(events[culprit["e"]]["d"]).get("error", ""))
    return FrameEnd(over, ends, failing, error, culprit.get("x", ""))


def _verdict(text: str) -> Verdict:
    said = json.loads(text)
    return Verdict(said["approved"], said["by"], said["note"], said.get("expired", False))


def _said(text: str) -> str:
    verdict = _verdict(text)
    if verdict.expired:
        return "was not decided in time"
    return f"was {'approved' if verdict.approved else 'rejected'} by {verdict.by or 'someone'}"


def _who_is(state: str) -> str:
    """`run failed` is about the run, all else about the step."""
    status = state.removeprefix("run ")
    return f"it is {state}" if status == state else f"the run is {status}"


def _ended(reply: list[Any]) -> Ended:
    return Ended(_sends(reply[2]), bool(reply[1]))


def _sends(flat: list[Any]) -> tuple[Resend, ...]:
    return tuple(Resend(flat[i], flat[i + 1], flat[i + 2], int(flat[i + 3])) for i in range(0, len(flat), 4))


def _held(reply: list[Any]) -> None:
    if reply[0] == "stale":
        raise Lost


def _live(run_id: str, reply: list[Any]) -> None:
    if reply[0] == "no":
        if reply[1] == "missing":
            raise NotFound(f"there is no run {run_id!r}; it may have been removed after its time")
        if reply[1] == "compensating":
            raise Conflict(f"what run {run_id!r} did is being undone; when that is done, it ends by itself")
        raise Conflict(f"run {run_id!r} has ended: it is {reply[1]}, and that does not change")


def _by_base(held: Iterable[Held]) -> dict[str, list[Held]]:
    groups: dict[str, list[Held]] = {}
    for one in held:
        groups.setdefault(base_of(one.run_id), []).append(one)
    return groups


def follow(record: Record, run_id: str, after: str = "0-0") -> Iterator[Event]:
    """The events of a run as they happen, until it ends. Raises `NotFound`."""
    over = record.status(run_id).ended
    while True:
        events = record.events(run_id, after, block_s=None if over else 2.0)
        for event in events:
            yield event
            after = event.id
        if over or (events and events[-1].type == "run.ended"):
            return
        if not events:
            over = record.status(run_id).ended

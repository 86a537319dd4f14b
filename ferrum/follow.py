"""What people see of a run: a line for each event, what came of it, and where the time went."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, assert_never

import click
from pydantic import JsonValue

from ferrum.events import (
    ActDecided,
    ApprovalDecided,
    Event,
    RunCompensating,
    RunCreated,
    RunEnded,
    RunResumed,
    RunStarted,
    RunWaiting,
    SignalReceived,
    StepCancelled,
    StepCompleted,
    StepFailed,
    StepKept,
    StepLost,
    StepOutput,
    StepResumed,
    StepSkipped,
    StepStarted,
    StepWaiting,
)
from ferrum.results import RunStatus, Usage
from ferrum.runs import RunView
from ferrum.terminal import visible

#: What a line about the run itself has where others have the step.
RUN: Final = "run"

#: What a step waits for where it waits for a person.
ASKS: Final = ("approval", "ask")

_PADDING: Final = re.compile(r"\s{3,}")

#: Longest text of a line, in characters: a line is for a glance, `ferrum runs show` has it whole.
_LONGEST: Final = 160


@dataclass(frozen=True, slots=True)
class Line:
    """One event as a person reads it."""

    #: Seconds since 1970.
    at: float
    mark: str
    #: The step, or `run`.
    address: str
    text: str
    #: `good`, `bad`, `waits`, `quiet` or nothing: what a terminal that can will colour.
    tone: str = ""


def line_of(event: Event) -> Line:
    """The line for an event."""
    mark, text, tone = _said(event)
    return Line(event.at, mark, getattr(event, "step", RUN), text, tone)


def render(line: Line, width: int, *, colour: bool) -> str:
    """A line as text, `12:04:31  → research  try 1`; `width` is that of the longest address."""
    clock = time.strftime("%H:%M:%S", time.localtime(line.at))
    text = one_line(line.text)
    plain = f"{clock}  {line.mark} {one_line(line.address):<{width}}  {text}".rstrip()
    if not colour or not line.tone:
        return plain
    return click.style(plain, fg=_COLOURS.get(line.tone), dim=line.tone == "quiet")


_COLOURS: Final[Mapping[str, str]] = {"good": "green", "bad": "red", "waits": "yellow"}


def _said(event: Event) -> tuple[str, str, str]:  # noqa: PLR0911, PLR0912 - one case per member of a closed set
    match event:
        case RunCreated():
            return "●", f"{event.workflow} {event.version}  {event.run_id}", ""
        case RunStarted():
            return "●", "started", ""
        case RunWaiting():
            return "⏸", "waiting for a person", "waits"
        case RunResumed():
            return "●", "goes on", ""
        case RunEnded():
            by = f" by {event.by}" if event.by else ""
            why = f": {event.reason}" if event.reason else ""
            good = event.status is RunStatus.COMPLETED
            return "■", f"{event.status}{by}{why}", "good" if good else "bad"
        case StepStarted():
            return "→", f"try {event.attempt}", ""
        case ActDecided():
            return _decided(event)
        case StepWaiting():
            return _waiting(event)
        case StepResumed():
            return "▸", f"goes on, {event.why}", "quiet"
        case ApprovalDecided():
            return _answered(event)
        case StepLost():
            return "↻", f"try {event.attempt}  {event.reason}; it is sent again", "bad"
        case StepOutput():
            return "│", one_line(event.text), "quiet"
        case StepCompleted():
            by = f"  by fallback {event.fallback}" if event.fallback else "  from the cache" if event.cached else ""
            return "←", f"try {event.attempt}  {duration(event.seconds)}{by}", "good"
        case StepFailed():
            return "!", f"try {event.attempt}  {event.error}", "bad"
        case StepCancelled():
            return "⊘", f"cancelled, {event.error or 'what it is part of goes on no longer'}", "quiet"
        case StepKept():
            return "=", f"{event.status}, taken over from {event.origin}", "quiet"
        case RunCompensating():
            why = f": {event.reason}" if event.reason else ""
            return "↶", f"{event.status}{why}; what completed is undone", "bad"
        case SignalReceived():
            return "▸", f"signal {event.name!r}" + (f" by {event.by}" if event.by else ""), ""
        case StepSkipped():
            return "⊘", f"skipped, {event.reason}", "quiet"
        case _:
            assert_never(event)


def _decided(event: ActDecided) -> tuple[str, str, str]:
    if event.effect == "allow":
        return "✓", f"allow {event.kind} {event.target}  by {event.rule}", "quiet"
    mark, tone = ("?", "waits") if event.effect == "ask" else ("✗", "bad")
    return mark, f"{event.effect} {event.kind} {event.target}  {event.reason}", tone


def _waiting(event: StepWaiting) -> tuple[str, str, str]:
    if event.kind == "retry":
        again = f", again in {duration(event.wakes_in)}" if event.wakes_in is not None else ""
        return "↻", f"try {event.attempt}  {one_line(event.error or '', 120)}{again}", "waits"
    until = f" for at most {duration(event.wakes_in)}" if event.wakes_in is not None else ""
    said = event.message.strip().partition("\n")[0]
    if event.kind in ASKS:
        # What is asked is not one line's worth, and stands below.
        return "⏸", f"waiting for a person{until}", "waits"
    if event.kind == "children":
        return "▾", said, "quiet"
    return "⏸", f"waits {said}" if event.kind != "limit" else f"waits for its turn, {said}", "waits"


def _answered(event: ApprovalDecided) -> tuple[str, str, str]:
    if event.expired:
        return "✗", "nobody decided in time", "bad"
    said = "approved" if event.approved else "rejected"
    by = f" by {event.by}" if event.by else ""
    note = f": {event.note}" if event.note else ""
    return ("✓", f"{said}{by}{note}", "good") if event.approved else ("✗", f"{said}{by}{note}", "bad")


def duration(seconds: float) -> str:
    """`12 ms`, `8.1 s`, `2 m 05 s`, `3 h 20 m`, `4 d 02 h`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02} {smaller}"
    return f"{whole} s"


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Text on one line, shortened."""
    # No padding up to where a terminal breaks the line: what comes then would look like a line of ours.
    flat = visible(_PADDING.sub("  ", " ".join(text.split("\n")).strip()))
    return flat if len(flat) <= longest else f"{flat[: longest - 1]}…"


def shown(value: JsonValue) -> str:
    """A value as people read it: text as it is, everything else as indented JSON."""
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2))


# Where the time went.


@dataclass(slots=True)
class StepTime:
    """Where one step's time went, in seconds."""

    step: str
    tries: int = 0
    #: On a worker, all tries together.
    working_s: float = 0.0
    #: Off it: for a person, for its time, for another worker.
    waiting_s: float = 0.0
    usage: Usage = field(default_factory=Usage)


def times(events: Iterable[Event], now: float | None = None) -> list[StepTime]:
    """Where the time of a run went, longest first; what has not ended counts until `now`.

    By Redis's clock, so that it adds up across machines. Steps that never began are left out.
    """
    found: dict[str, StepTime] = {}
    #: What each step is doing, and since when.
    doing: dict[str, tuple[str, float]] = {}
    end = now
    for event in events:
        step = getattr(event, "step", None)
        if isinstance(event, RunEnded):
            end = event.at
        if step is None:
            continue
        one = found.setdefault(step, StepTime(step))
        one.usage += getattr(event, "usage", Usage())
        match event:
            case StepStarted():
                _spend(one, doing.pop(step, None), event.at)
                one.tries = max(one.tries, event.attempt)
                doing[step] = ("working", event.at)
            case StepWaiting() | StepLost():
                _spend(one, doing.pop(step, None), event.at)
                doing[step] = ("waiting", event.at)
            case StepCompleted() | StepFailed() | StepSkipped() | StepCancelled():
                _spend(one, doing.pop(step, None), event.at)
    for step, since in doing.items():
        _spend(found[step], since, since[1] if end is None else end)
    began = [one for one in found.values() if one.tries]
    return sorted(began, key=lambda one: one.working_s + one.waiting_s, reverse=True)


def _spend(one: StepTime, doing: tuple[str, float] | None, until: float) -> None:
    if doing is None:
        return
    what, since = doing
    if what == "working":
        one.working_s += max(until - since, 0)
    else:
        one.waiting_s += max(until - since, 0)


# What came of it.


def report(view: RunView, spent: Sequence[StepTime]) -> str:
    """Outputs, usage, cost, and where the time went."""
    return "\n".join(_report(view, spent))


def _report(view: RunView, spent: Sequence[StepTime]) -> Iterator[str]:
    if isinstance(view.outputs, dict) and view.outputs:
        yield "outputs"
        for name, value in view.outputs.items():
            text = shown(value)
            yield f"  {visible(name)}: {text}" if "\n" not in text else f"  {visible(name)}:"
            yield from (f"    {line}".rstrip() for line in text.split("\n") if "\n" in text)
    yield f"usage     {_usage(view.usage)}"
    yield f"cost      {cost(view.usage)}"
    if view.created_at is not None and view.ended_at is not None:
        yield f"time      {duration(view.ended_at - view.created_at)}"
    if spent:
        rows = [("where the time went", "seconds", "waiting", "tokens", "cost")]
        rows += [
            (
                f"  {one.step}" + (f" ({one.tries} tries)" if one.tries > 1 else ""),
                f"{one.working_s:.2f}",
                f"{one.waiting_s:.2f}" if one.waiting_s else "",
                f"{one.usage.total_tokens:,}" if one.usage.total_tokens else "",
                f"${one.usage.cost_usd:.4f}" if one.usage.model_calls else "",
            )
            for one in spent
        ]
        yield from table(rows, left=1)


def _usage(usage: Usage) -> str:
    return (
        f"{usage.total_tokens:,} tokens ({usage.input_tokens:,} in, {usage.output_tokens:,} out), "
        f"{_count(usage.model_calls, 'model call')}, {_count(usage.tool_calls, 'tool call')}"
    )


def cost(usage: Usage) -> str:
    """`$0.0012`, and how many calls have no price."""
    unpriced = f" and {_count(usage.unpriced_calls, 'call')} without a price" if usage.unpriced_calls else ""
    return f"${usage.cost_usd:.4f}{unpriced}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def table(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Rows in columns, the first `left` of them to the left and the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            f"{cell:<{width}}" if place < left else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()

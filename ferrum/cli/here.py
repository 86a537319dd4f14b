"""The Redis and the worker that a command stands on, and what a person sees of the run that it follows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final, TypeVar

import click

from ferrum.cli.options import COMPLETED, FAILED, say, view_json
from ferrum.errors import Unavailable

if TYPE_CHECKING:
    from pydantic import JsonValue

    from ferrum.events import Event
    from ferrum.local.supervisor import Local
    from ferrum.plan import Plan
    from ferrum.record import Record
    from ferrum.runs import RunView
    from ferrum.workflow import Workflow

_T = TypeVar("_T")

#: How long one look for news of a run lasts; after each that brings none, whether a worker is there is looked at.
_LOOK_S: Final = 2.0


class Here:
    """Redis and a worker for what one command does: found, or started and stopped again.

    Where settings name a Redis nothing is started, and a worker that is not there is said and waited for.
    """

    def __init__(self) -> None:
        self._started: Local | None = None
        self._told = False

    def ensure(self) -> None:
        """Make sure of both. Raises `Unavailable`."""
        from ferrum.cli.trust import ask_about_files_here
        from ferrum.local import supervisor
        from ferrum.local.redis import place
        from ferrum.settings import settings

        local = supervisor.ensure(
            settings(),
            os.environ,
            need_worker=lambda url: not _worker_beats(url),
            worker_ready=_worker_beats,
            starting=ask_about_files_here,
        )
        if local.started:
            self._started = local
        if settings().redis_url is not None and not self._told and not _worker_beats(local.url):
            self._told = True
            click.echo(
                f"no worker is there for the Redis at {place(local.url)}, and none is started here: FERRUM_REDIS_URL "
                "(or REDIS_URL) names it. A run waits for one; start it where its policy is: celery -A ferrum worker",
                err=True,
            )

    def submit(
        self, workflow: Workflow, given: Mapping[str, JsonValue], key: str | None, priority: int | None = None
    ) -> str:
        """Start a run, once both are there; its id."""
        from ulid import ULID

        from ferrum.runs import submit

        # With a key, asking again starts nothing twice.
        key = key or f"cli.{ULID()}"
        return self._insisting(lambda: submit(workflow, given, key=key, priority=priority))

    def _insisting(self, call: Callable[[], _T]) -> _T:
        self.ensure()
        try:
            return call()
        except Unavailable:
            # What was there may have been on its way out, for it had nothing left to do.
            self.ensure()
            return call()

    def do(self, call: Callable[[], _T]) -> _T:
        """Do what a worker must then carry on; on a Redis of its own, both are made sure of first."""
        from ferrum.settings import settings

        if settings().redis_url is not None:
            return call()
        try:
            return self._insisting(call)
        finally:
            self.stop()

    def watch(self, run_id: str) -> Iterator[Event]:
        """The events of a run until it ends, whatever becomes of Redis and the worker meanwhile."""
        from ferrum.runs import record

        after, over = "0-0", False
        while not over:
            try:
                ended = record().status(run_id).ended
                events = record().events(run_id, after, block_s=None if ended else _LOOK_S)
                if not events and not ended and not record().workers():
                    self.ensure()
            except Unavailable:
                self.ensure()
                continue
            for event in events:
                after = event.id
                yield event
            over = ended or (bool(events) and events[-1].type == "run.ended")

    def stop(self, *, whatever_runs: bool = False) -> None:
        """Stop what this command started, unless other runs need it; by itself it stops when nothing is left to do."""
        if self._started is None:
            return
        if whatever_runs or not _any_live():
            self._started.stop()


def _any_live() -> bool:
    from ferrum.runs import record

    try:
        return record().any_live()
    except Unavailable:
        return False


def _worker_beats(url: str) -> bool:
    return bool(_record(url).workers())


@cache
def _record(url: str) -> Record:
    from ferrum.record import Record

    return Record(url, patience_s=2, connections=4)


def _follow_to_its_end(here: Here, run_id: str, *, as_json: bool) -> int:
    from ferrum.runs import plan_of, show

    lines = Lines(plan_of(run_id))
    events: list[Event] = []
    for event in here.watch(run_id):
        events.append(event)
        if not as_json:
            lines.echo(event)
            if hint := how_to_decide(event):
                say(hint)
    view = show(run_id)
    if as_json:
        view_json(view)
    else:
        echo_report(view, events)
    return _status(view)


def _status(view: RunView) -> int:
    from ferrum.results import RunStatus

    return COMPLETED if view.status is RunStatus.COMPLETED else FAILED


class Lines:
    """Prints events, one line each, aligned for the steps of one plan."""

    def __init__(self, plan: Plan) -> None:
        # Not wider than a glance, and never narrower than "run".
        self._width = max(3, min(max(map(len, plan.steps)), 40))
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def echo(self, event: Event) -> None:
        from ferrum.follow import line_of, render

        click.echo(render(line_of(event), self._width, colour=self._colour), color=self._colour)


def how_to_decide(event: Event) -> str | None:
    """The question and the command that answers it, where an event says that a person is waited for."""
    from ferrum.events import StepWaiting
    from ferrum.follow import ASKS

    if not isinstance(event, StepWaiting) or event.kind not in ASKS:
        return None
    return "\n".join([*asks(event.message, event.act), *how_to_answer(event.run_id, event.step, event.digest)])


def asks(message: str, act: JsonValue) -> Iterator[str]:
    """All that a person is asked, as a quotation: whatever it says, no line of it looks like one of ours."""
    from ferrum.follow import shown
    from ferrum.terminal import quoted

    yield quoted(message)
    if act is not None:
        yield quoted(shown(act))


def how_to_answer(run_id: str, step_id: str, digest: str) -> Iterator[str]:
    """A command to type, on a line of its own that no terminal breaks in the middle of a quotation."""
    yield f"  ferrum approvals approve {run_id} {step_id} --digest {short(digest)}   (or reject)"


def short(digest: str) -> str:
    from ferrum.runs import SHORT

    return digest[:SHORT]


def echo_report(view: RunView, events: Sequence[Event]) -> None:
    """Print what came of a run and where the time went."""
    from ferrum.follow import report, times
    from ferrum.runs import record

    click.echo()
    say(report(view, times(events, record().now())))

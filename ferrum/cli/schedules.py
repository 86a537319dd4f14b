"""`ferrum schedule …`: runs that begin by the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from ferrum.cli.here import Here
from ferrum.cli.inputs import read_inputs
from ferrum.cli.options import as_json_option, done, file_argument, say, show_json

if TYPE_CHECKING:
    from ferrum.schedules import Schedule, Schedules

_T = TypeVar("_T")


@click.group()
def schedule() -> None:
    """Run workflows by the clock; 'celery -A ferrum beat' starts them."""


_schedule_name = click.argument("name")


def _on_schedules(do: Callable[[Schedules], _T]) -> _T:
    """Do it on the schedules of this Redis; a private one is started for it where it does not run."""

    def call() -> _T:
        # Here, because there has to be a Redis already.
        from ferrum.celery import redis_url
        from ferrum.schedules import Schedules

        store = Schedules(redis_url())
        try:
            return do(store)
        finally:
            store.close_connections()

    return Here().do(call)


@schedule.command("add")
@file_argument
@click.option("--cron", required=True, metavar="'M H D M W'", help="When: minute, hour, day, month, day of week.")
@click.option("--timezone", default="UTC", show_default=True, help="Of the cron expression, such as Europe/Berlin.")
@click.option("--name", help="What the schedule is called. Default: the name of the workflow.")
@click.option(
    "--input", "-i", "inputs", multiple=True, metavar="K=V", help="An input, or @file.json for several; repeatable."
)
@click.option(
    "--missed",
    type=click.Choice(["skip", "once", "all"]),
    help="What to do about times that passed while no beat ran. Default: FERRUM_MISSED, else once.",
)
@as_json_option
def add_schedule(
    file: Path,
    *,
    cron: str,
    timezone: str,
    name: str | None,
    inputs: tuple[str, ...],
    missed: str | None,
    as_json: bool,
) -> None:
    """Run a workflow, as it is now, by the clock."""
    from ferrum.plan import Plan
    from ferrum.schedules import Cron
    from ferrum.settings import Missed
    from ferrum.workflow import Workflow

    workflow = Workflow.load(file)
    given = read_inputs(workflow, inputs)
    # All of it once more in `add`; here, so that nothing is started for a mistake.
    Plan(workflow)
    workflow.check_input(given)
    Cron.of(cron, timezone)
    policy = Missed(missed) if missed is not None else None
    added, fires = _on_schedules(
        lambda store: (
            store.add(workflow, cron, timezone=timezone, input=given, name=name, missed=policy),
            store.beat_runs(),
        )
    )
    done(_schedule_value(added), f"{added.name} is due at {_when(added, added.next_at)}", as_json)
    if not fires:
        say("no beat runs yet: nothing is started before 'celery -A ferrum beat' runs", err=True)


@schedule.command("list")
@as_json_option
def list_schedules(as_json: bool) -> None:
    """List the schedules by name: when each was due, when it is, and the run that it started last."""
    from ferrum.follow import one_line, table

    found = _on_schedules(lambda store: store.all())
    if as_json:
        show_json([_schedule_value(one) for one in found])
        return
    rows = [
        (
            one.name,
            one.cron,
            one.timezone,
            "paused" if one.paused else f"due {_when(one, one.next_at)}",
            one_line(f"! {one.error}") if one.error else one.run_id or "",
        )
        for one in found
    ]
    for row in table(rows, left=5) if rows else ():
        say(row)
    if not found:
        say("no schedules yet: add one with 'ferrum schedule add FILE --cron …'", err=True)


@schedule.command("show")
@_schedule_name
@as_json_option
def show_schedule(name: str, as_json: bool) -> None:
    """Print all that is known of a schedule, and its next times."""
    from itertools import islice

    from ferrum.follow import shown, table
    from ferrum.terminal import visible

    found, now = _on_schedules(lambda store: (store.find(name), store.now()))
    coming = [] if found.paused else list(islice(found.upcoming(now), 3))
    if as_json:
        show_json({**_schedule_value(found), "document": found.document, "upcoming": coming})
        return
    last = f"{_when(found, found.fired_at)}  {found.run_id or ''}".strip() if found.fired_at is not None else "never"
    rows = [
        ("workflow", f"{found.document['name']} {found.document['version']}"),
        ("cron", f"{found.cron}  {found.timezone}"),
        ("missed", found.missed.value),
        *((("paused", "yes"),) if found.paused else ()),
        ("last", last),
        *(("next" if number == 0 else "", _when(found, at)) for number, at in enumerate(coming)),
        *((("error", visible(found.error)),) if found.error else ()),
    ]
    say(f"{found.name}  {found.id}")
    for row in table([(f"  {label}", text) for label, text in rows], left=2):
        say(row)
    if found.input:
        say(f"input\n{shown(found.input)}")


@schedule.command("pause")
@_schedule_name
@as_json_option
def pause_schedule(name: str, as_json: bool) -> None:
    """Let a schedule not start anything until it is resumed."""
    paused = _on_schedules(lambda store: store.pause(name))
    done(_schedule_value(paused), f"{name} is paused; let it go on with: ferrum schedule resume {name}", as_json)


@schedule.command("resume")
@_schedule_name
@as_json_option
def resume_schedule(name: str, as_json: bool) -> None:
    """Let a schedule go on, from its next time; what passed meanwhile is not made up for."""
    resumed = _on_schedules(lambda store: store.resume(name))
    done(_schedule_value(resumed), f"{name} is due at {_when(resumed, resumed.next_at)}", as_json)


@schedule.command("delete")
@_schedule_name
@as_json_option
def delete_schedule(name: str, as_json: bool) -> None:
    """Forget a schedule; the runs that it has started go on."""
    deleted = _on_schedules(lambda store: store.delete(name))
    done(_schedule_value(deleted), f"{name} is deleted", as_json)


def _schedule_value(one: Schedule) -> Mapping[str, object]:
    return {**one.model_dump(mode="json", exclude={"document"}), "workflow": one.document["name"]}


def _when(one: Schedule, at: int | None) -> str:
    """A time as it is in the schedule's time zone."""
    from datetime import datetime
    from zoneinfo import ZoneInfo

    return datetime.fromtimestamp(at or 0, ZoneInfo(one.timezone)).strftime("%Y-%m-%d %H:%M:%S %Z")

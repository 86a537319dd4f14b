"""`ferrum runs …`, `signal` and `cache`: what becomes of runs."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

from ferrum.cli.here import Here, Lines, _status, echo_report, how_to_decide
from ferrum.cli.inputs import input_file, read_inputs
from ferrum.cli.options import (
    INTERRUPTED,
    as_json_option,
    by_option,
    done,
    run_id_argument,
    say,
    say_json,
    show_json,
    user,
    view_json,
)
from ferrum.errors import InputError, NotFound

if TYPE_CHECKING:
    from pydantic import JsonValue


@click.group()
def runs() -> None:
    """See runs, and what people do to them."""


@runs.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="The newest so many.")
@as_json_option
def list_runs(limit: int, as_json: bool) -> None:
    """List the newest runs, newest first."""
    from ferrum.runs import record

    names = _Names()
    found = [
        {
            "run_id": one.run_id,
            "status": one.status.value,
            "workflow": names.of(one.run_id, one.plan),
            "created_at": one.created_at,
        }
        for one in record().runs(limit=limit)
    ]
    if as_json:
        show_json(found)
        return
    for one in found:
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(one["created_at"])))
        say(f"{one['run_id']}  {created}  {one['status']:<16}  {one['workflow']}")
    if not found:
        say("no runs yet: start one with 'ferrum run FILE'", err=True)


class _Names:
    """The names of workflows, read once per plan."""

    def __init__(self) -> None:
        self._by_plan: dict[str, str] = {}

    def of(self, run_id: str, plan: str) -> str:
        from ferrum.runs import record

        if plan not in self._by_plan:
            try:
                document = json.loads(record().plan_document(run_id, plan))
                self._by_plan[plan] = f"{document['name']} {document['version']}"
            except NotFound:
                return ""
        return self._by_plan[plan]


@runs.command("show")
@run_id_argument
@as_json_option
def show_run(run_id: str, as_json: bool) -> None:
    """Print all that is known of a run."""
    from ferrum.follow import one_line, table
    from ferrum.runs import record, show
    from ferrum.terminal import quoted

    view = show(run_id)
    if as_json:
        view_json(view)
        return
    # More than a line of words of others is quoted: it would look like steps of ours.
    long = view.reason is not None and (one_line(view.reason) != view.reason)
    why = f": {view.reason}" if view.reason and not long else ""
    say(f"{view.run_id}  {view.workflow} {view.version}  {view.status}{why}")
    if view.reason and long:
        say(quoted(view.reason))
    if view.parent:
        say(f"  part of {view.parent[1]} of {view.parent[0]}")
    if view.origin:
        say(f"  {view.how} of {view.origin}")
    rows = [
        (
            f"  {step.step_id}",
            step.status.value,
            f"try {step.attempt}" if step.attempt else "",
            one_line(step.error or ""),
        )
        for step in view.steps
    ]
    for row in table(rows, left=4):
        say(row)
    echo_report(view, record().events(run_id))


@runs.command("watch")
@run_id_argument
@as_json_option
def watch_run(run_id: str, as_json: bool) -> int:
    """Print a run's events, those that were and those to come, until it ends; with --json one per line."""
    from ferrum.runs import plan_of, show, watch

    lines = Lines(plan_of(run_id))
    try:
        for event in watch(run_id):
            if as_json:
                say_json(event.model_dump_json())
            else:
                lines.echo(event)
                if hint := how_to_decide(event):
                    say(hint)
    except KeyboardInterrupt:
        say(f"\n{run_id} goes on", err=True)
        return INTERRUPTED
    return _status(show(run_id))


@runs.command("cancel")
@run_id_argument
@by_option
@click.option("--reason", help="Why, for whoever looks at the run later.")
@as_json_option
def cancel_run(run_id: str, by: str | None, reason: str | None, as_json: bool) -> None:
    """End a run now, whatever it is doing."""
    from ferrum.runs import cancel

    cancel(run_id, by=by or user(), reason=reason)
    done({"run_id": run_id, "status": "cancelled"}, f"{run_id} is cancelled", as_json)


@runs.command("resume")
@run_id_argument
@as_json_option
def resume_run(run_id: str, as_json: bool) -> None:
    """Let a run go on now; of one that failed, a new run takes over what it completed and does the rest."""
    from ferrum.runs import resume

    _goes_on(Here().do(lambda: resume(run_id)), as_json)


@runs.command("rerun")
@run_id_argument
@click.option("--from", "from_step", metavar="STEP", help="Take over all results but this step's and those behind it.")
@as_json_option
def rerun_run(run_id: str, from_step: str | None, as_json: bool) -> None:
    """Run an ended run again, all of it or from a step on."""
    from ferrum.runs import rerun

    _goes_on(Here().do(lambda: rerun(run_id, from_step=from_step)), as_json)


@runs.command("fork")
@run_id_argument
@click.option(
    "--input",
    "-i",
    "inputs",
    multiple=True,
    metavar="K=V",
    help="An input that differs, k=@file, or @file.json; repeatable.",
)
@as_json_option
def fork_run(run_id: str, inputs: tuple[str, ...], as_json: bool) -> None:
    """Run it again with another input; results that the change does not touch are taken over."""
    from ferrum.runs import fork, plan_of

    def do() -> str:
        return fork(run_id, read_inputs(plan_of(run_id).workflow, inputs))

    _goes_on(Here().do(do), as_json)


def _goes_on(run_id: str, as_json: bool) -> None:
    done({"run_id": run_id}, f"{run_id} goes on; watch it with: ferrum runs watch {run_id}", as_json)


@click.command("signal")
@run_id_argument
@click.argument("name")
@click.option("--data", help="What the waiting step gets, as JSON, or @file.json.")
@by_option
@as_json_option
def signal_run(run_id: str, name: str, data: str | None, by: str | None, as_json: bool) -> None:
    """Give a run the signal that one of its steps waits for, or will."""
    from ferrum.runs import signal

    value = _signal_data(data)
    Here().do(lambda: signal(run_id, name, value, by=by or user()))
    done({"run_id": run_id, "signal": name}, f"{run_id} has the signal {name!r}", as_json)


def _signal_data(text: str | None) -> JsonValue:
    if text is None:
        return None
    if text.startswith("@"):
        return input_file(text[1:])
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--data has to be JSON, such as 7, {json.dumps(text)} or @file.json: {error}") from error
    return value


@click.command("cache")
@as_json_option
def show_cache(as_json: bool) -> None:
    """Show how often steps with a `cache` are answered from it."""
    from ferrum.runs import cache_stats

    stats = cache_stats()
    counts = {"hits": stats.hits, "misses": stats.misses, "waits": stats.waits, "hit_rate": stats.hit_rate}
    text = f"{stats.hit_rate:.1%} found: {stats.hits} times there, {stats.misses} times computed"
    done(counts, f"{text}; {stats.waits} waited for another that computed the same", as_json)

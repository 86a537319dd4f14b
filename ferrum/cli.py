"""`ferrum …`: the command line.

The exit status is 0 where what was asked was done (and, for `run` and `watch`, the run completed), 1 for a run that
ended otherwise, 2 for a mistake in what was asked or in how ferrum is set up, 130 after Ctrl-C.

What a command needs is imported in it: `ferrum --help` has to be there at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

import click

from ferrum import __version__
from ferrum.errors import FerrumError, InputError, NotFound, Unavailable

if TYPE_CHECKING:
    from pydantic import JsonValue

    from ferrum.artifacts import Ref
    from ferrum.events import Event
    from ferrum.local.supervisor import Local
    from ferrum.plan import Plan
    from ferrum.record import Record
    from ferrum.runs import Approval, RunView
    from ferrum.schedules import Schedule, Schedules
    from ferrum.workflow import Workflow

_T = TypeVar("_T")

COMPLETED: Final = 0
FAILED: Final = 1
MISTAKE: Final = 2
INTERRUPTED: Final = 130

#: How long one look for news of a run lasts; after each that brings none, whether a worker is there is looked at.
_LOOK_S: Final = 2.0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no "→" gets a question mark, not a traceback.
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")
    sys.exit(status_of(arguments))


def status_of(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        said = ferrum.main(args=arguments, prog_name="ferrum", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return MISTAKE
    except click.Abort:
        return INTERRUPTED
    except FerrumError as error:
        click.echo(f"ferrum: {error}", err=True)
        return MISTAKE
    return said if isinstance(said, int) else COMPLETED


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ferrum")
def ferrum() -> None:
    """Run AI agents in production, as durable workflows on Celery."""


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_file = click.argument("file", type=click.Path(path_type=Path))
_run_id = click.argument("run_id", metavar="ID")


def _show_json(value: object) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def _view_json(view: RunView) -> None:
    _show_json(view.model_dump(mode="json"))


# Workflows.


@ferrum.command()
@_file
@as_json_option
def plan(file: Path, as_json: bool) -> None:
    """Check a workflow and print its plan and the canvas it becomes."""
    from ferrum.plan import Plan
    from ferrum.workflow import Workflow

    planned = Plan(Workflow.load(file))
    if as_json:
        _show_json(_plan_value(planned))
    else:
        click.echo(str(planned))


def _plan_value(planned: Plan) -> Mapping[str, object]:
    from ferrum.plan import edges

    carried, joined = edges(planned)
    workflow = planned.workflow
    return {
        "name": workflow.name,
        "version": workflow.version,
        "digest": planned.digest,
        "steps": [
            {
                "id": step.id,
                "type": step.type.name,
                "queue": step.type.queue,
                "needs": step.needs,
                "when": workflow.steps[step.id].when,
                "max_attempts": step.retry.max_attempts,
                "timeout_s": step.timeout_s,
                "segment": planned.segment_of[step.id].id,
            }
            for step in planned.steps.values()
        ],
        "segments": [
            {"id": one.id, "canvas": str(one), "heads": one.heads, "steps": [*one.steps]} for one in planned.segments
        ],
        "edges": {"canvas": carried, "record": joined},
    }


@ferrum.command()
@as_json_option
def schema(as_json: bool) -> None:
    """Print the JSON Schema of workflow files, for editors."""
    from ferrum.steps import step_types
    from ferrum.workflow import workflow_schema

    del as_json  # It is JSON anyway.
    _show_json(
        workflow_schema({name: kind.params.model_json_schema() for name, kind in step_types().items() if kind.written})
    )


@ferrum.command()
@_file
@click.option(
    "--input", "-i", "inputs", multiple=True, metavar="K=V", help="An input, or @file.json for several; repeatable."
)
@click.option("--detach", is_flag=True, help="Start it, print its id, and do not wait.")
@click.option("--key", help="The same key within 24 h is the same run.")
@click.option("--priority", type=int, help="0 to 9, 9 is most urgent; instead of the workflow's.")
@as_json_option
def run(  # noqa: PLR0917 - click gives them by name
    file: Path, inputs: tuple[str, ...], detach: bool, key: str | None, priority: int | None, as_json: bool
) -> int:
    """Run a workflow and follow it; starts Redis and a worker where there are none."""
    from ferrum.plan import Plan
    from ferrum.workflow import Workflow

    workflow = Workflow.load(file)
    given = read_inputs(workflow, inputs)
    # Both once more in `submit`; here, so that nothing is started for a mistake.
    Plan(workflow)
    workflow.check_input(given)
    here = Here()
    try:
        run_id = here.submit(workflow, given, key, priority)
    except BaseException:
        here.stop()
        raise
    if detach:
        _show_json({"run_id": run_id}) if as_json else click.echo(run_id)
        click.echo(f"watch it with: ferrum runs watch {run_id}", err=True)
        return COMPLETED
    try:
        status = _follow_to_its_end(here, run_id, as_json=as_json)
    except KeyboardInterrupt:
        click.echo(
            f"\n{run_id} goes on; watch it with: ferrum runs watch {run_id}\n"
            f"               or end it with: ferrum runs cancel {run_id}",
            err=True,
        )
        return INTERRUPTED
    here.stop()
    return status


def read_inputs(workflow: Workflow, texts: Sequence[str]) -> dict[str, JsonValue]:
    """The input of a run from `name=value` and `@file.json`; where a name comes twice, the last one counts.

    What the workflow declares as a string stays as it is written, everything else is read as JSON. Raises `InputError`.
    """
    given: dict[str, JsonValue] = {}
    for text in texts:
        if text.startswith("@"):
            given |= _input_file(text[1:])
            continue
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--input {text!r}: write name=value, or @file.json")
        given[name] = _input_value(workflow, name, value)
    return given


def _input_file(name: str) -> dict[str, JsonValue]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        value = json.loads(text)
    except OSError as error:
        raise InputError(f"--input @{name}: the file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--input @{name}: the file is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--input @{name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"--input @{name}: the file has to hold a JSON object, of names to values")
    return value


def _input_value(workflow: Workflow, name: str, text: str) -> JsonValue:
    spec = workflow.inputs.get(name)
    if spec is None or spec.type == "string":
        return text
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = {"array": ", such as [1, 2]", "object": ', such as {"a": 1}', "boolean": ": true or false"}
        raise InputError(
            f"input {name!r} has to be of type {spec.type}, written as JSON{hint.get(spec.type, '')}; got {text!r}"
        ) from error
    return value


# Runs.


class Here:
    """Redis and a worker for what one command does: found, or started and stopped again."""

    def __init__(self) -> None:
        self._started: Local | None = None

    def ensure(self) -> None:
        """Make sure of both. Raises `Unavailable`."""
        from ferrum.local import supervisor
        from ferrum.settings import settings

        local = supervisor.ensure(
            settings(), os.environ, need_worker=lambda url: not _worker_beats(url), worker_ready=_worker_beats
        )
        if local.started:
            self._started = local

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
                click.echo(hint)
    view = show(run_id)
    if as_json:
        _view_json(view)
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
    """What to type where an event says that a person is waited for."""
    from ferrum.events import StepWaiting
    from ferrum.follow import ASKS

    if not isinstance(event, StepWaiting) or event.kind not in ASKS:
        return None
    return f"{'':>12}ferrum approvals approve {event.run_id} {event.step}   (or reject)"


def echo_report(view: RunView, events: Sequence[Event]) -> None:
    """Print what came of a run and where the time went."""
    from ferrum.follow import report, times

    click.echo()
    click.echo(report(view, times(events, time.time())))


@ferrum.group()
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
        _show_json(found)
        return
    for one in found:
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(one["created_at"])))
        click.echo(f"{one['run_id']}  {created}  {one['status']:<16}  {one['workflow']}")
    if not found:
        click.echo("no runs yet: start one with 'ferrum run FILE'", err=True)


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
@_run_id
@as_json_option
def show_run(run_id: str, as_json: bool) -> None:
    """Print all that is known of a run."""
    from ferrum.follow import clean, one_line, table
    from ferrum.runs import record, show

    view = show(run_id)
    if as_json:
        _view_json(view)
        return
    why = f": {clean(view.reason)}" if view.reason else ""
    click.echo(f"{view.run_id}  {view.workflow} {view.version}  {view.status}{why}")
    if view.parent:
        click.echo(f"  part of {view.parent[1]} of {view.parent[0]}")
    if view.origin:
        click.echo(f"  {view.how} of {view.origin}")
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
        click.echo(row)
    echo_report(view, record().events(run_id))


@runs.command("watch")
@_run_id
@as_json_option
def watch_run(run_id: str, as_json: bool) -> int:
    """Print a run's events, those that were and those to come, until it ends; with --json one per line."""
    from ferrum.runs import plan_of, show, watch

    lines = Lines(plan_of(run_id))
    try:
        for event in watch(run_id):
            if as_json:
                click.echo(event.model_dump_json())
            else:
                lines.echo(event)
                if hint := how_to_decide(event):
                    click.echo(hint)
    except KeyboardInterrupt:
        click.echo(f"\n{run_id} goes on", err=True)
        return INTERRUPTED
    return _status(show(run_id))


_by = click.option("--by", help="Who says so. Default: you, by your name on this machine.")


@runs.command("cancel")
@_run_id
@_by
@click.option("--reason", help="Why, for whoever looks at the run later.")
@as_json_option
def cancel_run(run_id: str, by: str | None, reason: str | None, as_json: bool) -> None:
    """End a run now, whatever it is doing."""
    from ferrum.runs import cancel

    cancel(run_id, by=by or _user(), reason=reason)
    _done({"run_id": run_id, "status": "cancelled"}, f"{run_id} is cancelled", as_json)


@runs.command("resume")
@_run_id
@as_json_option
def resume_run(run_id: str, as_json: bool) -> None:
    """Let a run go on now; of one that failed, a new run takes over what it completed and does the rest."""
    from ferrum.runs import resume

    _goes_on(Here().do(lambda: resume(run_id)), as_json)


@runs.command("rerun")
@_run_id
@click.option("--from", "from_step", metavar="STEP", help="Take over all results but this step's and those behind it.")
@as_json_option
def rerun_run(run_id: str, from_step: str | None, as_json: bool) -> None:
    """Run an ended run again, all of it or from a step on."""
    from ferrum.runs import rerun

    _goes_on(Here().do(lambda: rerun(run_id, from_step=from_step)), as_json)


@runs.command("fork")
@_run_id
@click.option(
    "--input", "-i", "inputs", multiple=True, metavar="K=V", help="An input that differs, or @file.json; repeatable."
)
@as_json_option
def fork_run(run_id: str, inputs: tuple[str, ...], as_json: bool) -> None:
    """Run it again with another input; results that the change does not touch are taken over."""
    from ferrum.runs import fork, plan_of

    def do() -> str:
        return fork(run_id, read_inputs(plan_of(run_id).workflow, inputs))

    _goes_on(Here().do(do), as_json)


def _goes_on(run_id: str, as_json: bool) -> None:
    _done({"run_id": run_id}, f"{run_id} goes on; watch it with: ferrum runs watch {run_id}", as_json)


@ferrum.command("signal")
@_run_id
@click.argument("name")
@click.option("--data", help="What the waiting step gets, as JSON, or @file.json.")
@_by
@as_json_option
def signal_run(run_id: str, name: str, data: str | None, by: str | None, as_json: bool) -> None:
    """Give a run the signal that one of its steps waits for, or will."""
    from ferrum.runs import signal

    value = _signal_data(data)
    Here().do(lambda: signal(run_id, name, value, by=by or _user()))
    _done({"run_id": run_id, "signal": name}, f"{run_id} has the signal {name!r}", as_json)


def _signal_data(text: str | None) -> JsonValue:
    if text is None:
        return None
    if text.startswith("@"):
        return _input_file(text[1:])
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--data has to be JSON, such as 7, {json.dumps(text)} or @file.json: {error}") from error
    return value


@ferrum.command("cache")
@as_json_option
def show_cache(as_json: bool) -> None:
    """Show how often steps with a `cache` are answered from it."""
    from ferrum.runs import cache_stats

    stats = cache_stats()
    counts = {"hits": stats.hits, "misses": stats.misses, "waits": stats.waits, "hit_rate": stats.hit_rate}
    text = f"{stats.hit_rate:.1%} found: {stats.hits} times there, {stats.misses} times computed"
    _done(counts, f"{text}; {stats.waits} waited for another that computed the same", as_json)


@ferrum.group()
def workflows() -> None:
    """Workflows that others use as a step, by name and version."""


@workflows.command("register")
@_file
@as_json_option
def register_workflow(file: Path, as_json: bool) -> None:
    """Keep a workflow under its name and version; it is the newest of its name from here on."""
    from ferrum.runs import register

    name, version = Here().do(lambda: register(file))
    _done({"name": name, "version": version}, f"{name} {version} is registered", as_json)


@workflows.command("list")
@as_json_option
def list_workflows(as_json: bool) -> None:
    """List what is registered."""
    from ferrum.runs import record

    found = record().registrations()
    if as_json:
        _show_json([{"name": name, "version": version, "newest": newest} for name, version, newest in found])
        return
    from ferrum.follow import table

    for row in table([(name, version, "newest" if newest else "") for name, version, newest in found], left=3):
        click.echo(row)


def _done(value: Mapping[str, object], text: str, as_json: bool) -> None:
    if as_json:
        _show_json(value)
    else:
        click.echo(text)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container's user often has no name.
        return f"uid {os.getuid()}"


# Approvals.


@ferrum.group()
def approvals() -> None:
    """See what waits for a person, and decide."""


@approvals.command("list")
@as_json_option
def list_approvals(as_json: bool) -> None:
    """List what waits for a person, oldest first, with the exact arguments of what would be done."""
    from ferrum.runs import approvals as waiting

    found = waiting()
    if as_json:
        _show_json([one.model_dump(mode="json") for one in found])
        return
    for one in found:
        click.echo(_approval(one))
    if not found:
        click.echo("nothing waits for a person", err=True)


def _approval(one: Approval) -> str:
    from ferrum.follow import clean, duration, shown

    text = [f"{one.run_id} {one.step_id}  {one.workflow}  for {duration(max(time.time() - one.since, 0))}"]
    text += [f"  {line}".rstrip() for line in clean(one.message).strip().split("\n")]
    if one.act is not None:
        text += [f"  {line}" for line in shown(one.act).split("\n")]
    return "\n".join([*text, f"  ferrum approvals approve {one.run_id} {one.step_id}   (or reject)"])


_step_id = click.argument("step_id", metavar="[STEP]", required=False)
_note = click.option("--note", default="", help="Why, for whoever looks at the run later.")


@approvals.command("approve")
@_run_id
@_step_id
@_note
@_by
@as_json_option
def approve(run_id: str, step_id: str | None, note: str, by: str | None, as_json: bool) -> None:
    """Say yes to the step of a run that waits for a person."""
    _decide(run_id, step_id, approved=True, note=note, by=by, as_json=as_json)


@approvals.command("reject")
@_run_id
@_step_id
@_note
@_by
@as_json_option
def reject(run_id: str, step_id: str | None, note: str, by: str | None, as_json: bool) -> None:
    """Say no to the step of a run that waits for a person."""
    _decide(run_id, step_id, approved=False, note=note, by=by, as_json=as_json)


def _decide(run_id: str, step_id: str | None, *, approved: bool, note: str, by: str | None, as_json: bool) -> None:
    from ferrum.runs import decide

    who = by or _user()
    step = Here().do(lambda: decide(run_id, step_id, approved=approved, by=who, note=note))
    value = {"run_id": run_id, "step_id": step, "approved": approved, "by": who, "note": note}
    _done(value, f"{step} of {run_id} is {'approved' if approved else 'rejected'} by {who}", as_json)


# Artifacts.


@ferrum.group()
def artifacts() -> None:
    """Read what steps have kept."""


@artifacts.command("get")
@click.argument("digest", metavar="SHA256")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file.")
@as_json_option
def get_artifact(digest: str, output: Path | None, as_json: bool) -> None:
    """Print an artifact, or write it to a file, once its bytes are checked against its hash."""
    from ferrum.runs import artifacts as store

    data = store().get(_ref(digest))
    if output is not None:
        try:
            output.write_bytes(data)
        except OSError as error:
            raise click.ClickException(f"{output} cannot be written: {error.strerror}") from error
    if as_json:
        _show_json(_artifact_value(digest, data, output))
    elif output is not None:
        click.echo(f"{output}  {len(data):,} bytes")
    else:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()


def _ref(digest: str) -> Ref:
    from pydantic import ValidationError

    from ferrum.artifacts import Ref

    try:
        return Ref(digest=digest, size=0, media_type="")
    except ValidationError:
        raise NotFound(f"{digest!r} is not an artifact: they are named sha256: and 64 hexadecimal digits") from None


def _artifact_value(digest: str, data: bytes, output: Path | None) -> Mapping[str, object]:
    import base64

    value: dict[str, object] = {"artifact": digest, "size": len(data)}
    if output is not None:
        return {**value, "file": str(output)}
    try:
        return {**value, "text": data.decode()}
    except UnicodeDecodeError:
        return {**value, "base64": base64.b64encode(data).decode()}


# What ferrum brings along.


@ferrum.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Listen on this port of 127.0.0.1, too.")
@click.option("--url", "only_url", is_flag=True, help="Only print the URL of the one that runs, password included.")
@as_json_option
def redis(port: int | None, only_url: bool, as_json: bool) -> None:
    """Run the Redis that ferrum brings, until Ctrl-C."""
    from ferrum.local.redis import running, serve
    from ferrum.settings import settings

    home = settings().home
    if only_url:
        url = running(home)
        if url is None:
            raise Unavailable(f"no Redis runs in {home}: start it with 'ferrum redis'")
        _done({"url": url}, url, as_json)
        return

    def ready(_: str) -> None:
        _done(
            {"home": str(home), "port": port, "url_file": str(home / "redis.json")},
            f"Redis runs in {home}; Ctrl-C stops it.\n"
            "On this machine, as this user and with the same FERRUM_HOME, all find it by themselves:\n"
            "  celery -A ferrum worker\n"
            "Who cannot, gets its URL. It holds the password; it is kept in "
            f"{home / 'redis.json'}, which only you can read:\n"
            '  export FERRUM_REDIS_URL="$(ferrum redis --url)"',
            as_json,
        )
        sys.stdout.flush()

    serve(home, port, ready)


@ferrum.command("stub-llm")
@click.option("--script", type=click.Path(path_type=Path), help="What it answers. Default: what it was asked.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where it listens.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: a free one.")
@as_json_option
def stub_llm(script: Path | None, host: str, port: int, as_json: bool) -> None:
    """Run a scripted model server that speaks the OpenAI API, until Ctrl-C."""
    from ferrum.testing.model_server import API_KEY, serve
    from ferrum.testing.script import Script

    answers = (
        Script.load(script) if script is not None else Script.of({"default": {"reply": "You said: $last_message"}})
    )

    def ready(url: str) -> None:
        environ = {"OPENAI_API_BASE": url, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": API_KEY}
        exports = "\n".join(f"  export {name}={value}" for name, value in environ.items())
        _done(
            {"url": url, "environ": environ},
            f"the scripted models answer at {url}; Ctrl-C stops them.\n"
            f"For workers that shall ask them for every openai/… model:\n{exports}",
            as_json,
        )
        sys.stdout.flush()

    try:
        serve(answers, host, port, ready)
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


# Schedules.


@ferrum.group()
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
@_file
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
    _done(_schedule_value(added), f"{added.name} is due at {_when(added, added.next_at)}", as_json)
    if not fires:
        click.echo("no beat runs yet: nothing is started before 'celery -A ferrum beat' runs", err=True)


@schedule.command("list")
@as_json_option
def list_schedules(as_json: bool) -> None:
    """List the schedules by name: when each was due, when it is, and the run that it started last."""
    from ferrum.follow import one_line, table

    found = _on_schedules(lambda store: store.all())
    if as_json:
        _show_json([_schedule_value(one) for one in found])
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
        click.echo(row)
    if not found:
        click.echo("no schedules yet: add one with 'ferrum schedule add FILE --cron …'", err=True)


@schedule.command("show")
@_schedule_name
@as_json_option
def show_schedule(name: str, as_json: bool) -> None:
    """Print all that is known of a schedule, and its next times."""
    from itertools import islice

    from ferrum.follow import clean, shown, table

    found, now = _on_schedules(lambda store: (store.find(name), store.now()))
    coming = [] if found.paused else list(islice(found.upcoming(now), 3))
    if as_json:
        _show_json({**_schedule_value(found), "document": found.document, "upcoming": coming})
        return
    last = f"{_when(found, found.fired_at)}  {found.run_id or ''}".strip() if found.fired_at is not None else "never"
    rows = [
        ("workflow", f"{found.document['name']} {found.document['version']}"),
        ("cron", f"{found.cron}  {found.timezone}"),
        ("missed", found.missed.value),
        *((("paused", "yes"),) if found.paused else ()),
        ("last", last),
        *(("next" if number == 0 else "", _when(found, at)) for number, at in enumerate(coming)),
        *((("error", clean(found.error)),) if found.error else ()),
    ]
    click.echo(f"{found.name}  {found.id}")
    for row in table([(f"  {label}", text) for label, text in rows], left=2):
        click.echo(row)
    if found.input:
        click.echo(f"input\n{shown(found.input)}")


@schedule.command("pause")
@_schedule_name
@as_json_option
def pause_schedule(name: str, as_json: bool) -> None:
    """Let a schedule not start anything until it is resumed."""
    paused = _on_schedules(lambda store: store.pause(name))
    _done(_schedule_value(paused), f"{name} is paused; let it go on with: ferrum schedule resume {name}", as_json)


@schedule.command("resume")
@_schedule_name
@as_json_option
def resume_schedule(name: str, as_json: bool) -> None:
    """Let a schedule go on, from its next time; what passed meanwhile is not made up for."""
    resumed = _on_schedules(lambda store: store.resume(name))
    _done(_schedule_value(resumed), f"{name} is due at {_when(resumed, resumed.next_at)}", as_json)


@schedule.command("delete")
@_schedule_name
@as_json_option
def delete_schedule(name: str, as_json: bool) -> None:
    """Forget a schedule; the runs that it has started go on."""
    deleted = _on_schedules(lambda store: store.delete(name))
    _done(_schedule_value(deleted), f"{name} is deleted", as_json)


def _schedule_value(one: Schedule) -> Mapping[str, object]:
    return {**one.model_dump(mode="json", exclude={"document"}), "workflow": one.document["name"]}


def _when(one: Schedule, at: int | None) -> str:
    """A time as it is in the schedule's time zone."""
    from datetime import datetime
    from zoneinfo import ZoneInfo

    return datetime.fromtimestamp(at or 0, ZoneInfo(one.timezone)).strftime("%Y-%m-%d %H:%M:%S %Z")

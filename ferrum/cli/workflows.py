"""`ferrum plan`, `schema`, `run` and `workflows …`: from a file to a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrum.cli.here import Here, _follow_to_its_end
from ferrum.cli.inputs import read_inputs
from ferrum.cli.options import COMPLETED, INTERRUPTED, as_json_option, done, file_argument, say, show_json

if TYPE_CHECKING:
    from ferrum.plan import Plan


@click.command()
@file_argument
@as_json_option
def plan(file: Path, as_json: bool) -> None:
    """Check a workflow and print its plan and the canvas it becomes."""
    from ferrum.plan import Plan
    from ferrum.workflow import Workflow

    planned = Plan(Workflow.load(file))
    if as_json:
        show_json(_plan_value(planned))
    else:
        say(str(planned))


def _plan_value(planned: Plan) -> Mapping[str, object]:
    from ferrum.plan import edges

    carried, joined = edges(planned)
    workflow = planned.workflow
    bodies = planned.bodies.values()
    segments = {body.steps[name]: segment.id for body in bodies for segment in body.segments for name in segment.steps}
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
                "when": step.spec.when if step.when else None,
                "max_attempts": step.retry.max_attempts,
                "timeout_s": step.timeout_s,
                # What undoes a step is sent on its own.
                "segment": segments.get(step.id),
            }
            for step in planned.steps.values()
        ],
        "segments": [
            {"frame": body.frame, "id": one.id, "canvas": str(one), "heads": one.heads, "steps": [*one.steps]}
            for body in bodies
            for one in body.segments
        ],
        "edges": {"canvas": carried, "record": joined},
    }


@click.command()
@as_json_option
def schema(as_json: bool) -> None:
    """Print the JSON Schema of workflow files, for editors."""
    from ferrum.steps import step_types
    from ferrum.workflow import workflow_schema

    del as_json  # It is JSON anyway.
    show_json(
        workflow_schema({name: kind.params.model_json_schema() for name, kind in step_types().items() if kind.written})
    )


@click.command()
@file_argument
@click.option(
    "--input",
    "-i",
    "inputs",
    multiple=True,
    metavar="K=V",
    help="An input, k=@file, or @file.json for several; repeatable.",
)
@click.option("--detach", is_flag=True, help="Start it, print its id, and do not wait.")
@click.option("--key", help="The same key within 24 h is the same run.")
@click.option("--priority", type=click.IntRange(0, 9), help="0 to 9, 9 is most urgent; instead of the workflow's.")
@as_json_option
def run(  # noqa: PLR0917 - click gives them by name
    file: Path, inputs: tuple[str, ...], detach: bool, key: str | None, priority: int | None, as_json: bool
) -> int:
    """Run a workflow and follow it; without FERRUM_REDIS_URL, starts Redis and a worker where there are none."""
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
        show_json({"run_id": run_id}) if as_json else say(run_id)
        say(f"watch it with: ferrum runs watch {run_id}", err=True)
        return COMPLETED
    try:
        status = _follow_to_its_end(here, run_id, as_json=as_json)
    except KeyboardInterrupt:
        say(
            f"\n{run_id} goes on; watch it with: ferrum runs watch {run_id}\n"
            f"               or end it with: ferrum runs cancel {run_id}",
            err=True,
        )
        return INTERRUPTED
    here.stop()
    return status


@click.group()
def workflows() -> None:
    """Workflows that others use as a step, by name and version."""


@workflows.command("register")
@file_argument
@as_json_option
def register_workflow(file: Path, as_json: bool) -> None:
    """Keep a workflow under its name and version; it is the newest of its name from here on."""
    from ferrum.runs import register

    name, version = Here().do(lambda: register(file))
    done({"name": name, "version": version}, f"{name} {version} is registered", as_json)


@workflows.command("list")
@as_json_option
def list_workflows(as_json: bool) -> None:
    """List what is registered."""
    from ferrum.runs import record

    found = record().registrations()
    if as_json:
        show_json([{"name": name, "version": version, "newest": newest} for name, version, newest in found])
        return
    from ferrum.follow import table

    rows = [(name, version, "newest" if newest else "") for name, version, newest in found]
    for row in table(rows, left=3):
        say(row)
    if not found:
        say("no workflow is registered: do it with 'ferrum workflows register FILE'", err=True)

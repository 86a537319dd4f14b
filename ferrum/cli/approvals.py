"""`ferrum approvals …`: what people are asked."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ferrum.cli.here import Here
from ferrum.cli.options import as_json_option, by_option, done, run_id_argument, say, show_json, user

if TYPE_CHECKING:
    from ferrum.runs import Approval


@click.group()
def approvals() -> None:
    """See what waits for a person, and decide."""


@approvals.command("list")
@as_json_option
def list_approvals(as_json: bool) -> None:
    """List what waits for a person, oldest first, with the exact arguments of what would be done."""
    from ferrum.runs import approvals as waiting

    found = waiting()
    if as_json:
        show_json([one.model_dump(mode="json") for one in found])
        return
    for one in found:
        say(_approval(one))
    if not found:
        say("nothing waits for a person", err=True)


def _approval(one: Approval) -> str:
    from ferrum.follow import duration, shown
    from ferrum.terminal import visible

    text = [f"{one.run_id} {one.step_id}  {one.workflow}  for {duration(max(time.time() - one.since, 0))}"]
    text += [f"  {line}".rstrip() for line in visible(one.message).strip().split("\n")]
    if one.act is not None:
        text += [f"  {line}" for line in shown(one.act).split("\n")]
    return "\n".join([*text, f"  ferrum approvals approve {one.run_id} {one.step_id}   (or reject)"])


_step_id = click.argument("step_id", metavar="[STEP]", required=False)
_note = click.option("--note", default="", help="Why, for whoever looks at the run later.")


@approvals.command("approve")
@run_id_argument
@_step_id
@_note
@by_option
@as_json_option
def approve(run_id: str, step_id: str | None, note: str, by: str | None, as_json: bool) -> None:
    """Say yes to the step of a run that waits for a person."""
    _decide(run_id, step_id, approved=True, note=note, by=by, as_json=as_json)


@approvals.command("reject")
@run_id_argument
@_step_id
@_note
@by_option
@as_json_option
def reject(run_id: str, step_id: str | None, note: str, by: str | None, as_json: bool) -> None:
    """Say no to the step of a run that waits for a person."""
    _decide(run_id, step_id, approved=False, note=note, by=by, as_json=as_json)


def _decide(run_id: str, step_id: str | None, *, approved: bool, note: str, by: str | None, as_json: bool) -> None:
    from ferrum.runs import decide

    who = by or user()
    step = Here().do(lambda: decide(run_id, step_id, approved=approved, by=who, note=note))
    value = {"run_id": run_id, "step_id": step, "approved": approved, "by": who, "note": note}
    done(value, f"{step} of {run_id} is {'approved' if approved else 'rejected'} by {who}", as_json)

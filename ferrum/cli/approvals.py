"""`ferrum approvals …`: what people are asked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ferrum.cli.here import Here, asks, how_to_answer, short
from ferrum.cli.options import as_json_option, by_option, done, run_id_argument, say, show_json, user
from ferrum.errors import Conflict

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
    from ferrum.follow import duration
    from ferrum.runs import record

    head = f"{one.run_id} {one.step_id}  {one.workflow}  for {duration(max(record().now() - one.since, 0))}"
    return "\n".join([head, *asks(one.message, one.act), *how_to_answer(one.run_id, one.step_id, one.digest)])


_step_id = click.argument("step_id", metavar="[STEP]", required=False)
_note = click.option("--note", default="", help="Why, for whoever looks at the run later.")
_digest = click.option("--digest", help="What you saw, as 'ferrum approvals list' shows it; all else is refused.")
_yes = click.option("--yes", is_flag=True, help="Do not ask again: what waits now is what you saw.")


@approvals.command("approve")
@run_id_argument
@_step_id
@_digest
@_yes
@_note
@by_option
@as_json_option
def approve(
    run_id: str, step_id: str | None, *, digest: str | None, yes: bool, note: str, by: str | None, as_json: bool
) -> None:
    """Say yes to the step of a run that waits for a person.

    Without --digest it shows what is asked first, and asks you. Where nobody can be asked, an act, and whatever a step
    asks for the second time, needs the --digest of what you saw.
    """
    digest = digest or _shown_first(run_id, step_id, yes=yes, quiet=as_json)
    _decide(run_id, step_id, digest, approved=True, note=note, by=by, as_json=as_json)


@approvals.command("reject")
@run_id_argument
@_step_id
@_digest
@_note
@by_option
@as_json_option
def reject(run_id: str, step_id: str | None, *, digest: str | None, note: str, by: str | None, as_json: bool) -> None:
    """Say no to the step of a run that waits for a person."""
    if digest is None and (one := _waiting(run_id, step_id)):
        digest = one.digest
    _decide(run_id, step_id, digest, approved=False, note=note, by=by, as_json=as_json)


def _waiting(run_id: str, step_id: str | None) -> Approval | None:
    """Return what this step asks, or the only one that asks; `None` where nothing or more than one thing is asked."""
    from ferrum.runs import approvals as waiting

    found = [one for one in Here().do(lambda: waiting(run_id)) if step_id in (None, one.step_id)]
    return found[0] if len(found) == 1 else None


def _shown_first(run_id: str, step_id: str | None, *, yes: bool, quiet: bool) -> str | None:
    """The digest of what waits, once a person has seen it and wants it."""
    one = _waiting(run_id, step_id)
    if one is None:
        # Whoever decides says what is wrong.
        return None
    if not quiet:
        say("\n".join([f"{one.step_id} of {one.run_id} asks", *asks(one.message, one.act)]), err=True)
    if yes:
        return one.digest
    if sys.stdin.isatty():
        click.confirm("Do you approve this?", abort=True, err=True)
    elif one.act is not None or one.times > 1:
        raise Conflict(
            f"{one.step_id!r} of run {run_id!r} asks for an act, or not for the first time: look at it, then add "
            f"--digest {short(one.digest)} to approve this, or --yes to approve whatever waits"
        )
    return one.digest


def _decide(
    run_id: str, step_id: str | None, digest: str | None, *, approved: bool, note: str, by: str | None, as_json: bool
) -> None:
    from ferrum.runs import decide

    who = by or user()
    step = Here().do(lambda: decide(run_id, step_id, approved=approved, by=who, note=note, digest=digest))
    value = {"run_id": run_id, "step_id": step, "approved": approved, "by": who, "note": note}
    done(value, f"{step} of {run_id} is {'approved' if approved else 'rejected'} by {who}", as_json)

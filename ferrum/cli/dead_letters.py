"""`ferrum dead-letters …`: messages that workers dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import click

from ferrum.cli.options import as_json_option, show_json
from ferrum.errors import NotFound

if TYPE_CHECKING:
    from ferrum.dead_letters import DeadLetter

_ids = click.argument("ids", metavar="ID...", nargs=-1)
_all_option = click.option("--all", "all_of_them", is_flag=True, help="All that are kept.")


@click.group("dead-letters")
def dead_letters() -> None:
    """See messages that workers dropped, and put them back."""


@dead_letters.command("list")
@as_json_option
def list_dead_letters(as_json: bool) -> None:
    """List dropped messages, newest first, and why each was."""
    from ferrum.follow import one_line, table
    from ferrum.runs import dead_letters as kept

    found = kept()
    if as_json:
        show_json([_value(one) for one in found])
        return
    rows = [(one.id, _when(one), one.queue, one_line(one.task_id or "-", 40), one_line(one.reason)) for one in found]
    for row in table(rows, left=5) if rows else ():
        click.echo(row)
    if not found:
        click.echo("no message was dropped", err=True)


@dead_letters.command("show")
@click.argument("id", metavar="ID")
@as_json_option
def show_dead_letter(id: str, as_json: bool) -> None:
    """Print all that is known of a dropped message, and its text."""
    from ferrum.follow import table
    from ferrum.runs import dead_letter
    from ferrum.terminal import visible

    letter, text = dead_letter(id)
    if as_json:
        show_json({**_value(letter), "text": text})
        return
    rows = [
        ("dropped", _when(letter)),
        ("queue", letter.queue),
        ("task", letter.task or "-"),
        ("id", letter.task_id or "-"),
        ("reason", letter.reason),
        ("size", f"{letter.size:,} bytes{'' if letter.whole else ', not all of it was kept'}"),
    ]
    click.echo(letter.id)
    for row in table([(f"  {label}", visible(value)) for label, value in rows], left=2):
        click.echo(row)
    click.echo(visible(text))


@dead_letters.command("replay")
@_ids
@_all_option
@as_json_option
def replay_dead_letters(ids: tuple[str, ...], *, all_of_them: bool, as_json: bool) -> None:
    """Put dropped messages back into their queues, oldest first."""
    from ferrum.runs import replay_dead_letter

    _each(ids, all_of_them, replay_dead_letter, "put back", as_json)


@dead_letters.command("delete")
@_ids
@_all_option
@as_json_option
def delete_dead_letters(ids: tuple[str, ...], *, all_of_them: bool, as_json: bool) -> None:
    """Forget dropped messages."""
    from ferrum.runs import delete_dead_letter

    _each(ids, all_of_them, delete_dead_letter, "deleted", as_json)


def _each(ids: tuple[str, ...], all_of_them: bool, do: Callable[[str], object], done: str, as_json: bool) -> None:
    from ferrum.runs import dead_letters as kept

    if all_of_them == bool(ids):
        raise click.UsageError("name dead letters by their ids, or say --all")
    chosen = [one.id for one in reversed(kept()) if one.whole or done == "deleted"] if all_of_them else list(ids)
    told: list[str] = []
    missing: NotFound | None = None
    for id_ in dict.fromkeys(chosen):
        try:
            do(id_)
        except NotFound as error:
            # Of all, some may make room for new ones meanwhile, or somebody else is at it.
            missing = missing or (None if all_of_them else error)
            continue
        told.append(id_)
        if not as_json:
            click.echo(f"{id_} is {done}")
    if as_json:
        show_json([{"id": id_} for id_ in told])
    if missing is not None:
        raise missing


def _value(one: DeadLetter) -> Mapping[str, object]:
    return one.model_dump(mode="json")


def _when(one: DeadLetter) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.at))

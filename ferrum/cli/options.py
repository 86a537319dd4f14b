"""What several commands share: their exit status, what they are asked, and how they answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ferrum.terminal import visible

if TYPE_CHECKING:
    from ferrum.runs import RunView

COMPLETED: Final = 0
FAILED: Final = 1
MISTAKE: Final = 2
INTERRUPTED: Final = 130


raw_option = click.option("--raw", is_flag=True, help="Control codes too, also on a terminal.")
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
file_argument = click.argument("file", type=click.Path(path_type=Path))
run_id_argument = click.argument("run_id", metavar="ID")
by_option = click.option("--by", help="Who says so. Default: you, by your name on this machine.")


def say(text: str = "", *, err: bool = False) -> None:
    """Print lines in which there may be words of others: none of them steers a terminal."""
    click.echo(visible(text), err=err)


def pass_on(text: str, *, raw: bool, err: bool = False) -> None:
    """Print what a program or a step wrote: as it is into a file or a pipe and with `raw`, to be seen on a terminal."""
    stream = sys.stderr if err else sys.stdout
    click.echo(text if raw or not stream.isatty() else visible(text), nl=False, err=err, color=True)
    stream.flush()


def show_json(value: object) -> None:
    say_json(json.dumps(value, ensure_ascii=False, indent=2))


def say_json(text: str) -> None:
    """Print JSON; what would steer a terminal is written as JSON's escapes, so it means the same."""
    click.echo("".join(map(_harmless, text)) if not (text.isascii() and "\x7f" not in text) else text)


def _harmless(one: str) -> str:
    if one == "\n" or visible(one) == one:
        return one
    return f"\\u{ord(one):04x}" if ord(one) < 0x10000 else json.dumps(one)[1:-1]


def view_json(view: RunView) -> None:
    show_json(view.model_dump(mode="json"))


def done(value: Mapping[str, object], text: str, as_json: bool) -> None:
    if as_json:
        show_json(value)
    else:
        say(text)


def user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container's user often has no name.
        return f"uid {os.getuid()}"

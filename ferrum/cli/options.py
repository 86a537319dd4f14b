"""What several commands share: their exit status, what they are asked, and how they answer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from ferrum.runs import RunView

COMPLETED: Final = 0
FAILED: Final = 1
MISTAKE: Final = 2
INTERRUPTED: Final = 130


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
file_argument = click.argument("file", type=click.Path(path_type=Path))
run_id_argument = click.argument("run_id", metavar="ID")
by_option = click.option("--by", help="Who says so. Default: you, by your name on this machine.")


def show_json(value: object) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def view_json(view: RunView) -> None:
    show_json(view.model_dump(mode="json"))


def done(value: Mapping[str, object], text: str, as_json: bool) -> None:
    if as_json:
        show_json(value)
    else:
        click.echo(text)


def user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container's user often has no name.
        return f"uid {os.getuid()}"

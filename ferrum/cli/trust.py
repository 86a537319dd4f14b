"""`ferrum trust`: a person has seen the files that are found here by their names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrum.cli.options import as_json_option, done

if TYPE_CHECKING:
    from ferrum.local.trust import Found


@click.command()
@click.argument(
    "directory", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False, default=Path()
)
@as_json_option
def trust(directory: Path, as_json: bool) -> None:
    """Trust the policy and servers files of a directory as they are now.

    Files that are found by their names, ferrum.policy.yaml and ferrum.servers.yaml, say what may happen and which
    programs are started. They are shown, and remembered by their content; one that changes has to be trusted again.
    """
    from ferrum.local.trust import find
    from ferrum.settings import settings

    found = list(find(directory))
    for file in found:
        if not as_json:
            click.echo(_shown(file))
        file.trust(settings().home)
    done(
        {"trusted": [{"path": str(file.path), "sha256": file.digest} for file in found]},
        f"trusted as they are now: {', '.join(file.path.name for file in found)}"
        if found
        else f"nothing in {directory} has to be trusted: neither ferrum.policy.yaml nor ferrum.servers.yaml is there",
        as_json,
    )


def ask_about_files_here() -> None:
    """Ask about each file here that a worker would not believe. Raises `SettingsError` without a terminal or a yes."""
    from ferrum.local.trust import untrusted
    from ferrum.settings import settings

    for file in untrusted(settings()):
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise file.distrust()
        click.echo(f"a worker that is started here would believe {_shown(file)}", err=True)
        if not click.confirm("Trust it as it is now?", err=True):
            raise file.distrust()
        file.trust(settings().home)


def _shown(file: Found) -> str:
    from ferrum.terminal import quoted

    return f"{quoted(str(file.path), mark='')}\n{quoted(file.text)}"

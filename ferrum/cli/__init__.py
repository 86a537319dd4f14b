"""`ferrum …`: the command line.

The exit status is 0 where what was asked was done (and, for `run` and `watch`, the run completed), 1 for a run that
ended otherwise, 2 for a mistake in what was asked or in how ferrum is set up, 130 after Ctrl-C.

What a command needs is imported in it: `ferrum --help` has to be there at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from ferrum import __version__
from ferrum.cli import approvals, artifacts, dead_letters, index, local, runs, sandbox, schedules, trust, workflows
from ferrum.cli.options import COMPLETED, INTERRUPTED, MISTAKE
from ferrum.errors import FerrumError


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
        from ferrum.settings import redact
        from ferrum.terminal import visible

        click.echo(f"ferrum: {visible(redact(str(error)))}", err=True)
        return MISTAKE
    return said if isinstance(said, int) else COMPLETED


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ferrum")
def ferrum() -> None:
    """Run AI agents in production, as durable workflows on Celery."""


for command in (
    workflows.plan,
    workflows.schema,
    workflows.run,
    workflows.workflows,
    runs.runs,
    runs.signal_run,
    runs.show_cache,
    approvals.approvals,
    artifacts.artifacts,
    dead_letters.dead_letters,
    index.index,
    sandbox.sandbox,
    schedules.schedule,
    local.redis,
    local.stub_llm,
    trust.trust,
):
    ferrum.add_command(command)

"""`ferrum redis` and `ferrum stub-llm`: what ferrum brings along."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrum.cli.options import as_json_option, done
from ferrum.errors import Unavailable

if TYPE_CHECKING:
    pass


@click.command()
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
        done({"url": url}, url, as_json)
        return

    def ready(_: str) -> None:
        done(
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


@click.command("stub-llm")
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
        done(
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

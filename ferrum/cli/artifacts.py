"""`ferrum artifacts …`: what runs left that is big."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrum.cli.options import as_json_option, pass_on, raw_option, say, show_json
from ferrum.errors import NotFound

if TYPE_CHECKING:
    from ferrum.artifacts import Ref


@click.group()
def artifacts() -> None:
    """Read what steps have kept."""


@artifacts.command("get")
@click.argument("digest", metavar="SHA256")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file.")
@raw_option
@as_json_option
def get_artifact(digest: str, output: Path | None, raw: bool, as_json: bool) -> None:
    """Print an artifact, or write it to a file, once its bytes are checked against its hash.

    On a terminal, control codes are shown and do nothing.
    """
    from ferrum.artifacts import process_artifacts as store

    data = store().get(_ref(digest))
    if output is not None:
        try:
            output.write_bytes(data)
        except OSError as error:
            raise click.ClickException(f"{output} cannot be written: {error.strerror}") from error
    if as_json:
        show_json(_artifact_value(digest, data, output))
    elif output is not None:
        say(f"{output}  {len(data):,} bytes")
    elif sys.stdout.isatty() and not raw:
        pass_on(data.decode(errors="backslashreplace"), raw=False)
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

"""The directory that one stands in is data: nothing that lies there runs because of its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import processes
import pytest
import yaml
from fleet import PATIENCE_S, eventually

from ferrum.governance.acts import Kind

#: Modules of the standard library and of packages that some process of ferrum imports, and Celery's settings.
_NAMES = ("redis", "yaml", "pydantic", "click", "kombu", "statistics", "tomllib", "mcp", "jsonschema", "celeryconfig")

#: A tool server of one's own, in the directory that one stands in.
_SERVER = """
import statistics
from mcp.server import MCPServer

server = MCPServer("sums")


@server.tool()
def mean(numbers: list[float]) -> float:
    return statistics.mean(numbers)


server.run()
"""

#: Tasks of one's own, in the directory that one stands in.
_TASKS = """
import tomllib
from celery import shared_task


@shared_task(name="mine.double")
def double(number):
    return tomllib.loads(f"x = {number * 2}")["x"]
"""


@pytest.fixture
def strangers(tmp_path: Path) -> Iterator[Path]:
    """A directory of a stranger's: what of it runs leaves its name in `ran`."""
    place = tmp_path / "theirs"
    place.mkdir()
    for name in _NAMES:
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + chr(10))\n")
    yield place
    eventually(lambda: not processes.of(tmp_path))


def _called(place: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FERRUM_", "REDIS_URL"))}
    return subprocess.run(
        [sys.executable, "-m", "ferrum", *arguments],
        env={**kept, "FERRUM_HOME": str(place.parent / "home"), "FERRUM_WARM": "false", **more},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def _ran(place: Path) -> str:
    file = place.parent / "ran"
    return file.read_text() if file.exists() else ""


def _workflow(place: Path, steps: dict[str, object], **outputs: str) -> str:
    (place / "workflow.yaml").write_text(yaml.safe_dump({"name": "x", "steps": steps, "outputs": outputs}))
    return "workflow.yaml"


def test_no_process_that_ferrum_starts_runs_a_module_of_the_directory_it_stands_in(strangers: Path) -> None:
    (strangers / "sums.py").write_text(_SERVER)
    (strangers / "mine.py").write_text(_TASKS)
    (strangers.parent / "p.yaml").write_text(json.dumps({"allow": [f"{kind}:*" for kind in get_args(Kind)]}))
    python = {"command": "python", "args": ["-m", "sums"]}
    file = _workflow(
        strangers,
        {
            "one": {"type": "tool", "tool": "sums.mean", "input": {"numbers": [1, 2, 6]}},
            "two": {"type": "tool", "tool": "again.mean", "input": {"numbers": [1, 2, 6]}},
            "three": {"type": "task", "task": "mine.double", "input": {"number": 3}},
        },
        one="{{ one }}", two="{{ two }}", three="{{ three }}",
    )  # fmt: skip
    done = _called(
        strangers, "run", file, "--json",
        FERRUM_IMPORTS="mine",
        FERRUM_POLICY=str(strangers.parent / "p.yaml"),
        FERRUM_MCP_SERVERS=json.dumps({"sums": {"module": "sums"}, "again": python}),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # What was named is found there, by the modules that are meant.
    assert json.loads(done.stdout)["outputs"] == {"one": 3.0, "two": 3.0, "three": 6}
    assert _ran(strangers) == ""


def test_no_command_runs_a_module_of_the_directory_it_stands_in(strangers: Path) -> None:
    file = _workflow(strangers, {"gate": {"type": "approval", "message": "?"}})
    assert _called(strangers, "plan", file).returncode == 0
    assert "there is no Redis" in _called(strangers, "runs", "list").stderr
    assert _called(strangers, "index", "list").returncode == 0
    assert _ran(strangers) == ""

"""The registry of step types: a type is a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ferrum.steps import Park, StepType, step_types

FILE = """
from tool import Tool
from ferrum.steps import Attempt, Params, StepType

class EchoParams(Params):
    value: str

class Echo(StepType[EchoParams]):
    name = "echo"
    params = EchoParams

    def run(self, params: EchoParams, attempt: Attempt) -> str:
        return params.value

NOT_A_TYPE = Echo()
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A ferrum that has no step types yet."""
    monkeypatch.setattr("ferrum.steps.__file__", str(tmp_path / "ferrum" / "steps.py"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    yield tasks
    sys.modules.pop("ferrum_tasks.zz_echo", None)


def test_the_types_that_ship_with_ferrum_are_there_each_with_its_queue() -> None:
    types = step_types()
    assert {"approval", "llm", "task", "tool"} <= set(types)
    composed = {"block", "for_each", "repeat", "router", "switch", "workflow"}
    assert {name for name, kind in types.items() if kind.composed} == composed
    assert {name: kind.queue for name, kind in types.items()} == {
        name: "ferrum.flow" if name in composed else f"ferrum.{name}" for name in types
    }


def test_adding_a_type_is_adding_a_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = home / "other"
    other.mkdir()
    (other / "tool.py").write_text("from ferrum.steps import StepType\nclass Tool(StepType):\n    name = 'tool'\n")
    monkeypatch.syspath_prepend(str(other))
    (home / "zz_echo.py").write_text(FILE)
    (home / "_draft.py").write_text("raise AssertionError('not a step type')")
    (home / "notes.txt").write_text("neither")
    types = step_types.__wrapped__()
    # What a file only imports is not its own.
    assert list(types) == ["echo"]
    assert types["echo"].queue == "ferrum.echo"
    assert isinstance(types["echo"], StepType)
    sys.modules.pop("tool", None)


def test_a_type_says_nothing_of_retries_and_time_where_it_need_not() -> None:
    task = step_types()["task"]
    assert (task.retry.max_attempts, task.timeout_s, task.waits) == (1, None, False)


def test_a_park_says_for_what_and_how_long() -> None:
    park = Park("approval", "Go on?", wake_in_s=5)
    assert (park.kind, park.message, park.wake_in_s, park.act, park.bound) == ("approval", "Go on?", 5, None, "")

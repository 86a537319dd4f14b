"""`make counterparts`: what others' programs tests may use, and what is said of what cannot be had."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def counterparts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, with a place of its own and one entry that is made here."""
    spec = importlib.util.spec_from_file_location("counterparts", ROOT / ".ci" / "counterparts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "counterparts", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PLACE", tmp_path)
    monkeypatch.setattr(module, "ALL", (module.Counterpart("hello", "here", "@a/hello", "1.0", "hello.sh", "greets"),))
    return module


def fetched(module: ModuleType, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    def fetch(one: object, directory: Path, run: object) -> None:
        run(["sh", "-c", f"cd '{directory}'; {script}"])  # type: ignore[operator]

    monkeypatch.setattr(module, "INDEXES", {"here": fetch})
    module.main()


def test_a_program_is_fetched_once(
    counterparts: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fetched(counterparts, monkeypatch, "printf '#!/bin/sh\necho hi' > hello.sh; chmod +x hello.sh")
    assert "  there  (greets)" in capsys.readouterr().out
    assert (tmp_path / "bin" / "hello").stat().st_mode & 0o111
    fetched(counterparts, monkeypatch, "exit 1")
    assert "  there  (greets)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no such package; exit 3", "not to be had: sh says: no such package"),
        ("true", "not to be had: there is no hello.sh in it"),
        ("sleep 600 & wait", "not to be had: sh took longer than 1 s"),
    ],
)
def test_what_cannot_be_had_is_named_and_fails_nothing(  # noqa: PLR0917 - pytest gives them by name
    counterparts: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    script: str,
    said: str,
) -> None:
    monkeypatch.setattr(counterparts, "LIMIT_S", 1.0)
    fetched(counterparts, monkeypatch, script)
    assert said in capsys.readouterr().out
    assert not (tmp_path / "bin").exists()
    assert not list(tmp_path.glob(".*"))


def test_all_together_take_no_longer_than_they_may(
    counterparts: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counterparts, "ALL_S", 0.0)
    fetched(counterparts, monkeypatch, "true")
    assert "not to be had: no time was left for it" in capsys.readouterr().out

"""What programs, steps and strangers wrote, as the command line prints it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ferrum import cli
from ferrum.artifacts import process_artifacts
from ferrum.cli import sandbox
from ferrum.cli.options import say_json
from ferrum.governance.acts import CodeReply, CodeRun
from ferrum.testing.environment import environment

#: Writes to the clipboard, turns the writing around, clears the screen by C1.
EVIL = "a\x1b]52;c;cm0gLXJmIC8=\x07b\u202ec\x9b2Jd é\n"
SEEN = "a\\x1b]52;c;cm0gLXJmIC8=\\x07b\\u202ec\\x9b2Jd é\n"


terminal = pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])


def on(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: terminal)


@terminal
def test_an_artifact_steers_no_terminal_and_is_unchanged_in_a_pipe(
    terminal: bool, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(terminal, monkeypatch)
    with environment({"FERRUM_ARTIFACTS": tmp_path.as_uri()}):
        data = EVIL.encode() + b"\xff"
        digest = process_artifacts().put(data, "text/plain").digest
        assert cli.status_of(["artifacts", "get", digest]) == 0
        assert capfdbinary.readouterr().out == ((SEEN + "\\xff").encode() if terminal else data)
        assert cli.status_of(["artifacts", "get", digest, "--raw"]) == 0
        assert capfdbinary.readouterr().out == data


@terminal
def test_a_program_in_a_sandbox_steers_no_terminal(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opened:
        async def run(self, act: CodeRun, files: Mapping[str, bytes], say: Any) -> CodeReply:
            say("stdout", EVIL)
            say("stderr", EVIL)
            return CodeReply.model_construct(reason="ok", files={}, detail="")

        async def aclose(self) -> None: ...

    monkeypatch.setattr("ferrum.sandbox.here.sandboxes", lambda settings: Opened())
    on(terminal, monkeypatch)
    for options, shown in ((("--raw",), EVIL), ((), SEEN if terminal else EVIL)):
        assert cli.status_of(["sandbox", "run", "-c", "1", *options]) == 0
        said = capsys.readouterr()
        assert (said.out, said.err) == (shown, shown)


def test_a_file_that_a_sandbox_named_steers_no_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sandbox._write(tmp_path / EVIL.strip(), b"x")
    assert "\x1b" not in capsys.readouterr().err


def test_json_means_the_same_and_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": EVIL + "\x7f\U000e0001\ud800", "plain": "Grüße, 世界"}
    say_json(json.dumps(value, ensure_ascii=False, indent=2))
    said = capsys.readouterr().out
    assert json.loads(said) == value
    assert not {"\x7f", "\x9b", "\u202e", "\U000e0001"} & set(said)
    assert "Grüße, 世界" in said


def test_the_words_of_an_error_steer_no_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text('name: x\nsteps: {a: {type: "\\x9b2J\\u202e"}}\n')
    assert cli.status_of(["plan", str(file)]) == 2
    said = capsys.readouterr().err
    assert "there is no step type" in said
    assert not {"\x9b", "\u202e"} & set(said)


def test_lists_of_what_others_named_steer_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = SimpleNamespace(registrations=lambda: [(EVIL.strip(), EVIL.strip(), True)])
    monkeypatch.setattr("ferrum.runs.record", lambda: kept)
    assert cli.status_of(["workflows", "list"]) == 0
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(capsys.readouterr().out)

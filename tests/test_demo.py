"""`make demo`, end to end: on a repository with one commit, with and without a person at a terminal."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import processes
import pytest
from fleet import PATIENCE_S, eventually
from preloading import into

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A git repository with the demo in it and one commit; at the end nothing of the demo runs any more."""
    top = tmp_path / "checkout"
    shutil.copytree(ROOT / "examples", top / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (top / "README.md").write_text("# A small repository\n\nIt is for a test.\n")
    (top / ".gitignore").write_text(".state/\n")
    who = ("-c", "user.name=Kim", "-c", "user.email=kim@example.com")
    for command in (["init", "-q", "-b", "main"], ["add", "."], [*who, "commit", "-q", "-m", "Begin with a demo"]):
        subprocess.run(["git", *command], cwd=top, check=True)
    yield top
    assert processes.of(tmp_path) == []
    assert not list((top / ".state" / "demo").glob("home-*"))


def environ() -> dict[str, str]:
    """Ours, without what would make the demo ask a real model."""
    words = ("FERRUM_", "ANTHROPIC_", "OPENAI_", "OLLAMA_", "REDIS_URL")
    return {name: value for name, value in os.environ.items() if not name.startswith(words)}


def command(checkout: Path) -> list[str]:
    return [sys.executable, str(checkout / "examples" / "demo.py")]


def test_without_a_terminal_the_demo_says_yes_by_itself_and_keeps_the_summary(checkout: Path) -> None:
    # Other settings of the user's are none of the demo's.
    more = {"FERRUM_REDIS_URL": "redis://127.0.0.1:1/0", "FERRUM_POLICY": "/nowhere"}
    done = subprocess.run(
        command(checkout),
        env=into(environ() | more, "demo.py"),
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    out = done.stdout
    assert out.index("joins by the record") < out.index("● run") < out.index("where the time went")
    assert "no terminal to ask at: the demo says yes by itself" in out
    assert "✓ gate     approved by demo" in out
    assert '`README.md` begins: "# A small repository"' in out
    assert "**Begin with a demo**" in out
    assert "■ run      completed" in out
    found = re.search(r"cost      \$(\d\.\d+)\n", out)
    assert found is not None
    assert float(found[1]) > 0
    kept = re.search(r"FERRUM_HOME=.state/demo .venv/bin/ferrum artifacts get sha256:(\w\w)(\w{62})", out)
    assert kept is not None
    text = (checkout / ".state" / "demo" / "artifacts" / "sha256" / kept[1] / kept[2]).read_text()
    assert text.startswith("# What happened here")


class Terminal:
    """A demo with a person before it."""

    def __init__(self, checkout: Path, *also: str) -> None:
        self._ours, theirs = pty.openpty()
        self.said = ""
        # A session of its own with this terminal, so that what is typed as Ctrl-C is one.
        self.demo = subprocess.Popen(
            [sys.executable, "-c", _WITH_TERMINAL, *command(checkout)],
            env=into(environ() | {"TERM": "dumb", "USER": "kim"}, *also),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def read_until(self, text: str) -> None:
        while text not in self.said:
            assert self._read(), f"{text!r} was never said, but:\n{self.said}"

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def end(self) -> int:
        """The exit status, once all was said."""
        while self._read():
            pass
        return self.demo.wait(PATIENCE_S)

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 65536)
        except OSError:
            # Linux's way to say that nobody holds the other side any more.
            return False
        self.said += data.decode(errors="replace")
        return bool(data)

    def close(self) -> None:
        os.close(self._ours)
        if self.demo.poll() is None:
            self.demo.kill()
            self.demo.wait()


_WITH_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell in the background has its children ignore it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextmanager
def terminal(checkout: Path, *also: str) -> Iterator[Terminal]:
    """`also` names what else is a fork, which hears of no key that is pressed but by way of another process."""
    opened = Terminal(checkout, *also)
    try:
        yield opened
    finally:
        opened.close()


def test_the_person_at_the_terminal_is_asked_and_says_yes(checkout: Path) -> None:
    with terminal(checkout, "demo.py") as demo:
        demo.read_until("yes? [Y/n]")
        assert "# What happened here" in demo.said
        demo.type("y\n")
        assert demo.end() == 0
    assert "approved by kim" in demo.said
    assert "\x1b[32m" in demo.said


def test_after_a_no_nothing_is_kept(checkout: Path) -> None:
    with terminal(checkout, "demo.py") as demo:
        demo.read_until("yes? [Y/n]")
        demo.type("n\n")
        assert demo.end() == 0
    assert "rejected by kim" in demo.said
    assert "you said no, so nothing was kept" in demo.said
    assert not (checkout / ".state" / "demo" / "artifacts" / "sha256").exists()


@pytest.mark.parametrize("moment", ["starting a Redis and a worker", "yes? [Y/n]"])
def test_ctrl_c_leaves_nothing_behind_at_any_moment(checkout: Path, moment: str) -> None:
    with terminal(checkout) as demo:
        demo.read_until(moment)
        if moment.startswith("starting"):
            eventually(lambda: len(processes.of(checkout)) > 1)
        demo.type("\x03")
        assert demo.end() == 130
    assert "stopped; nothing of the demo runs any more" in demo.said
    assert "Traceback" not in demo.said


def test_a_demo_that_is_told_to_end_stops_what_it_started(checkout: Path) -> None:
    with terminal(checkout) as demo:
        demo.read_until("● run      started")
        demo.demo.send_signal(signal.SIGTERM)
        assert demo.end() == 130

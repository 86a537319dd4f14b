"""A sandbox that another program holds for us, by its process and the pipes to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ferrum.sandbox.backend import Missing

_LAST_WORDS = 1000


@dataclass(slots=True)
class Holder:
    """`runsc`, `podman` or `docker`, running for one sandbox."""

    process: subprocess.Popen[bytes]
    #: What PID 1 reads from and writes to; the caller of `Cell` closes both.
    stdin: int
    stdout: int
    #: What the program says for itself.
    errors: int
    _said: str = ""

    @classmethod
    def start(cls, command: Sequence[str], env: Mapping[str, str]) -> Holder:
        """Start a program. Raises `Missing` where that cannot be."""
        to_init, stdin = os.pipe()
        stdout, from_init = os.pipe()
        errors, errors_end = os.pipe()
        try:
            process = subprocess.Popen(  # noqa: S603
                command,
                env=env,
                stdin=to_init,
                stdout=from_init,
                stderr=errors_end,
                cwd="/",
                start_new_session=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            for descriptor in (stdin, stdout, errors):
                os.close(descriptor)
            raise Missing(f"{command[0]} cannot be started: {error}") from error
        finally:
            for descriptor in (to_init, from_init, errors_end):
                os.close(descriptor)
        os.set_blocking(errors, False)
        return cls(process, stdin, stdout, errors)

    def words(self) -> str:
        """What it said so far, in short; never waits."""
        with suppress(BlockingIOError, OSError):
            self._said += os.read(self.errors, _LAST_WORDS).decode(errors="replace")
        return self._said.strip()

    def close(self) -> None:
        self.words()
        os.close(self.errors)
        self.errors = -1


def status(pid: int) -> dict[str, list[str]]:
    """What the kernel says of a process. Raises `OSError` where there is none."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def loose(status: Mapping[str, Sequence[str]]) -> str:
    """What a process may do that it must not; empty where that is nothing."""
    if list(status["NoNewPrivs"]) != ["1"]:
        return "it can gain privileges (NoNewPrivs is not set)"
    if list(status["Seccomp"]) != ["2"]:
        return "no filter holds its system calls"
    if "0" in status["Uid"]:
        return "it is root"
    return ""


def shared(pid: int, namespaces: Iterable[str]) -> str:
    """Which of these namespaces a process shares with us; empty where that is none.

    Those of another user's process cannot be looked at by all; then nothing is said of them.
    """
    for kind in namespaces:
        with suppress(PermissionError):
            if Path(f"/proc/{pid}/ns/{kind}").stat().st_ino == Path(f"/proc/self/ns/{kind}").stat().st_ino:
                return f"it shares our {kind} namespace"
    return ""

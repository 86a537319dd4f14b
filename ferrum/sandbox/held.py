"""A sandbox that another program holds for us, by its process and the pipes to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

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
    def start(cls, command: Sequence[str], env: Mapping[str, str], uid: int | None = None) -> Holder:
        """Start a program, as another user where one is given. Raises `Missing` where that cannot be."""
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
                user=uid,
                group=uid,
                extra_groups=None if uid is None else [],
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

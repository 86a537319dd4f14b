"""Processes of ferrum that a test starts without waiting seconds for their imports: forks of one that has them.

`preloaded/server.py` forks, once for all test processes of a run of pytest. A test starts a fork by itself (`Forked`),
or gives a process an environment (`into`) in which every `ferrum` and `celery` below it becomes one.
"""

from __future__ import annotations

import marshal
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent / "preloaded"
_SOCKET = "PRELOADED_SOCKET"
_COVERAGE = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")

#: For a pytest that is a fork, where warnings are errors: what it has is not rewritten as its plugins are elsewhere.
AS_FORK = {"PYTEST_ADDOPTS": "-W ignore::pytest.PytestAssertRewriteWarning"}


class Server:
    """The one that forks; it ends, with all its forks, when the process that started it does."""

    def __init__(self, directory: Path) -> None:
        path = directory / "preloaded.sock"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "server.py"), str(path)], stdin=subprocess.PIPE
        )
        os.environ[_SOCKET] = str(path)

    def stop(self) -> None:
        os.environ.pop(_SOCKET, None)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def into(environ: Mapping[str, str], *also: str) -> dict[str, str]:
    """This environment, in which processes of ferrum and Celery are forks.

    `also` names what else is one: other modules, and `-c` for code that is given on the command line.
    """
    path = os.environ.get(_SOCKET)
    if path is None:
        return dict(environ)
    aside = {f"PRELOADED_{name}": os.environ[name] for name in _COVERAGE if name in os.environ}
    kept = {name: value for name, value in environ.items() if name not in _COVERAGE}
    python_path = os.pathsep.join(filter(None, [str(HERE), environ.get("PYTHONPATH")]))
    return {**kept, **aside, _SOCKET: path, "PRELOADED_ALSO": " ".join(also), "PYTHONPATH": python_path}


def forked(*also: str) -> dict[str, str]:
    """All that a process without any other environment needs to be a fork, if it is ferrum's, Celery's or in `also`."""
    return {name: value for name, value in into({}, *also).items() if name.startswith("P")}


class Forked:
    """What `subprocess.Popen` would be for `python COMMAND…`, as far as tests of ferrum ask it."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: str | os.PathLike[str], stdout: IO[bytes]
    ) -> None:
        """`command` is without the interpreter: its options, `-m`, a module, and the module's arguments."""
        environ = into(env)
        self.args = [sys.executable, *command]
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(environ[_SOCKET])
        asked = marshal.dumps((self.args, self.args.index("-m") + 1, environ, os.fspath(cwd), 0o022))
        with Path(os.devnull).open("rb") as nothing:
            out = stdout.fileno()
            socket.send_fds(self._server, [len(asked).to_bytes(4, "big")], [nothing.fileno(), out, out])
            self._server.sendall(asked)
        self.pid = int.from_bytes(self._server.recv(4), "big")

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        code = self._look(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._server, selectors.EVENT_READ)
                if not ready.select(timeout):
                    return None
            status = self._server.recv(4)
            self._server.close()
            self.returncode = int.from_bytes(status, "big", signed=True) if status else -signal.SIGKILL
        return self.returncode

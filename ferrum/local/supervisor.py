"""Redis and a worker for who has none: started by the first `ferrum run`, gone when there is nothing left to do.

    local = ensure(settings(), os.environ, need_worker=no_worker_beats, worker_ready=a_worker_beats)

starts `python -m ferrum.local.supervisor`, a process of its own that outlives its caller. That starts the private Redis
(unless there is one already) and one worker, and starts again what dies. When the worker ends by itself, having been
idle for `FERRUM_EXIT_WHEN_IDLE`, or at SIGTERM, it stops both. There is one supervisor per home. Where settings name a
Redis, nothing is started: it is other people's too, and a worker from here would decide on their runs by a policy from
here.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

from ferrum.errors import OperatorError, Unavailable
from ferrum.local.home import own
from ferrum.local.process import end, findable, log_size, open_log, tail, take_lock, tied
from ferrum.local.redis import PrivateRedis, alive, answers, place, running
from ferrum.settings import Settings, read

#: Run with the supervisor's own interpreter.
WORKER = ("-P", "-m", "ferrum.start_worker")

#: How long a worker waits for work where `FERRUM_EXIT_WHEN_IDLE` does not say.
_IDLE_S = 600.0
#: How the supervisor ends when the home has one already (EX_TEMPFAIL of sysexits.h).
_TAKEN = 75
#: A worker that ended so often by itself within a minute will not do better the next time.
_GIVE_UP_AFTER = 3
#: How often a Redis that someone else runs in this home is looked for.
_LOOK_EVERY_S = 5.0

_log = logging.getLogger("ferrum.local")


@dataclass(frozen=True, slots=True)
class Local:
    """Redis and a worker that are there."""

    #: Of Redis, as redis-py reads it.
    url: str
    #: The supervisor that this call started; `None` when all was there before.
    pid: int | None = None
    #: How long `stop` waits before it kills.
    patience_s: float = 30.0

    @property
    def started(self) -> bool:
        return self.pid is not None

    def stop(self) -> None:
        """Stop what this call started, and wait until it has gone; nothing happens if it started nothing."""
        if self.pid is None or _exit_code(self.pid) is not None:
            return
        os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + self.patience_s
        while _exit_code(self.pid) is None:
            if time.monotonic() > deadline:
                # Its children are tied to it.
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)


def ensure(
    settings: Settings,
    environ: Mapping[str, str],
    *,
    need_worker: Callable[[str], bool],
    worker_ready: Callable[[str], bool],
    starting: Callable[[], None] = lambda: None,
    worker: Sequence[str] = WORKER,
    timeout_s: float = 60.0,
) -> Local:
    """Make sure of a private Redis and, where `need_worker(url)`, of a worker; returns when both are there.

    The worker gets this process's directory and `environ`. Both questions may raise `Unavailable`: a Redis that has
    just answered can be on its way out, with a supervisor that had nothing left to do. `starting` is called before
    anything is started, and may raise to prevent it. Of a Redis that settings name it
    makes sure that it answers, asks nothing and starts nothing. Raises `Unavailable` where that does not answer, and,
    with what the logs say, where one of the two does not come up.
    """
    if settings.redis_url is not None:
        return Local(_answering(settings.redis_url.get_secret_value()))
    url = running(settings.home)
    if url is not None and _says(need_worker, url) is False:
        return Local(url)
    starting()
    launch = _Launch(settings, environ, worker)
    try:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            url = running(settings.home)
            if url is not None and _says(worker_ready, url):
                return Local(url, launch.pid, settings.grace + 20)
            launch.look()
            time.sleep(0.05)
        raise Unavailable(f"no worker was ready after {timeout_s:.0f} s; {launch.told()}")
    except BaseException:
        Local("", launch.pid, settings.grace + 20).stop()
        raise


class _Launch:
    """A supervisor that is coming up: ours, or one that another process has started a moment before."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], worker: Sequence[str]) -> None:
        self._home = own(settings.home, make=True)
        self._worker = worker
        self._env = {**environ, **findable(environ), "FERRUM_HOME": str(self._home)}
        self._logs = {path: log_size(path) for path in (_worker_log(self._home), _own_log(self._home))}
        #: Of our own; `None` while another holds the lock.
        self.pid: int | None = _start(self._home, self._env, worker)

    def look(self) -> None:
        """Raise `Unavailable` if our supervisor ended; start one where the other's did."""
        code = _exit_code(self.pid) if self.pid is not None else _TAKEN
        if code == _TAKEN:
            self.pid = _start(self._home, self._env, self._worker) if _is_free(_lock_file(self._home)) else None
        elif code is not None:
            self.pid = None
            raise Unavailable(f"Redis or the worker would not start; {self.told()}")

    def told(self) -> str:
        """What the logs say since we looked first."""
        tails = ((path, tail(path, since)) for path, since in self._logs.items())
        return "\n".join(["the logs end:", *(f"{path}:\n{text}" for path, text in tails if text)])


def _answering(url: str) -> str:
    if not answers(url):
        raise Unavailable(f"no Redis answers at {place(url)}: start it, or unset FERRUM_REDIS_URL for a private one")
    return url


def _says(question: Callable[[str], bool], url: str) -> bool | None:
    """The answer; `None` where that Redis has gone since it was found."""
    try:
        return question(url)
    except Unavailable:
        return None


def _start(home: Path, env: Mapping[str, str], worker: Sequence[str]) -> int:
    """Start a supervisor in a session of its own; its process id.

    Not a `Popen`, which complains when it is dropped while its process runs, and this one is meant to stay.
    """
    log = open_log(_own_log(home))
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", "ferrum.local.supervisor", *worker],
            env,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
        )
    finally:
        os.close(log)


def _exit_code(child: int) -> int | None:
    """How a child of ours ended, asked as often as one likes; `None` while it runs."""
    try:
        pid, status = os.waitpid(child, os.WNOHANG)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status) if pid else None


def _is_free(lock: Path) -> bool:
    if (held := take_lock(lock)) is None:
        return False
    os.close(held)
    return True


def _lock_file(home: Path) -> Path:
    return home / "supervisor.lock"


def _own_log(home: Path) -> Path:
    return home / "logs" / "supervisor.log"


def _worker_log(home: Path) -> Path:
    return home / "logs" / "worker.log"


@dataclass(slots=True)
class Restarts:
    """When something that died is started again."""

    #: When it died and whether by its own doing, within the last minute.
    deaths: list[tuple[float, bool]] = field(default_factory=list)

    def pause_s(self, code: int, now: float) -> float | None:
        """How long to wait after an end with this exit code; `None`: give it up.

        Who was killed (a negative code) is always started again: out of memory today says nothing about tomorrow. Who
        ends by itself again and again has a reason that stays.
        """
        self.deaths = [death for death in self.deaths if now - death[0] < 60] + [(now, code > 0)]
        if sum(own for _, own in self.deaths) >= _GIVE_UP_AFTER:
            return None
        return min(0.1 * 2.0 ** (len(self.deaths) - 1), 5.0)


class Supervisor:
    """One Redis (if there is none) and one worker, kept alive until `run` returns."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], worker: Sequence[str]) -> None:
        self._settings = settings
        self._home = settings.home.absolute()
        self._environ = dict(environ)
        self._command = [sys.executable, *worker]
        #: Numbers of signals; its `put` is the one thing that a signal handler may safely do.
        self._signals: SimpleQueue[int] = SimpleQueue()
        #: The Redis that is ours to keep; `None` while we use one that was there.
        self._redis: PrivateRedis | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self._worker_due = 0.0
        self._restarts = Restarts()

    def run(self) -> int:
        """Run until the worker ends by itself or a signal says so; the exit code, 1 if it had to give up."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, self._note)
        try:
            self._find_redis()
            while (code := self._turn()) is None:
                pass
            return code
        finally:
            self._stop()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signals.put(number)

    def _find_redis(self) -> None:
        url = running(self._home)
        if url is None:
            self._redis = PrivateRedis(self._home).start()
            url = self._redis.url
        self._environ["FERRUM_REDIS_URL"] = url
        if self._settings.exit_when_idle is None:
            self._environ["FERRUM_EXIT_WHEN_IDLE"] = str(_IDLE_S)

    def _turn(self) -> int | None:
        """Put right what is not as it should be, then wait for the next signal; the exit code once there is one."""
        if self._redis is not None and self._redis.pid is None:
            _log.warning("Redis ended; it is started again")
            time.sleep(self._restarts.pause_s(-1, time.monotonic()) or 0)
            self._redis.start()
        if self._redis is None and not alive(self._home):
            _log.info("the Redis of %s has been stopped, so the worker is", self._home)
            return 0
        if self._worker is not None and (code := self._worker.poll()) is not None:
            if code == 0:
                _log.info("the worker had nothing left to do")
                return 0
            pause = self._restarts.pause_s(code, time.monotonic())
            _log.warning("the worker ended with %d", code)
            if pause is None:
                _log.error("gave it up: the worker ended %d times within a minute", _GIVE_UP_AFTER)
                return 1
            self._worker, self._worker_due = None, time.monotonic() + pause
        if self._worker is None and time.monotonic() >= self._worker_due:
            self._worker = self._start_worker()
        return self._await_signal()

    def _await_signal(self) -> int | None:
        wait_s = _LOOK_EVERY_S if self._worker else max(self._worker_due - time.monotonic(), 0)
        try:
            number = self._signals.get(timeout=wait_s)
        except Empty:
            return None
        return None if number == signal.SIGCHLD else 0

    def _start_worker(self) -> subprocess.Popen[bytes]:
        log = open_log(_worker_log(self._home))
        try:
            return subprocess.Popen(  # noqa: S603
                tied(self._command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environ
            )
        finally:
            os.close(log)

    def _stop(self) -> None:
        if self._worker is not None:
            end(self._worker, signal.SIGTERM, self._settings.grace + 5)
        if self._redis is not None:
            self._redis.stop()


def main(worker: Sequence[str]) -> int:
    """Supervise until there is nothing left to do; the exit code, 75 if this home has a supervisor already."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    settings = read(os.environ)
    own(settings.home, make=True)
    lock = take_lock(_lock_file(settings.home))
    if lock is None:
        return _TAKEN
    try:
        return Supervisor(settings, os.environ, worker).run()
    except OperatorError as error:
        _log.error("%s", error)
        return 1
    finally:
        os.close(lock)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or WORKER))

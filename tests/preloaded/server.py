"""Forks processes that have imported what is slow to import; see `sitecustomize.py`.

    python server.py SOCKET

Listens at once and imports with the first that asks. Ends, with all its forks, when its standard input does.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import inspect
import io
import locale
import marshal
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

_HERE = str(Path(__file__).parent)

#: What processes of ferrum spend their start with. Not `ferrum.celery`, which reads the environment.
_SLOW = (
    "celery.apps.beat", "celery.apps.worker", "celery.backends.redis", "celery.bin.celery", "celery.bin.worker",
    "celery.concurrency.prefork", "celery.concurrency.thread", "celery.worker.autoscale", "celery.worker.consumer",
    "celery.worker.control", "celery.worker.strategy", "kombu.transport.redis", "redis.asyncio",
    "obstore.store", "numpy", "mcp.client", "mcp.server", "mcp.client.stdio", "mcp.server.stdio",
    "litellm", "aiohttp.web", "ferrum.actors", "ferrum.cli", "ferrum.cli.runs", "ferrum.inline", "ferrum.mcp.session",
    "ferrum.mcp.servers.git", "ferrum.mcp.servers.sandbox", "ferrum.models.calls", "ferrum.models.embeddings",
    "ferrum.primitives", "ferrum.retrieval.indexes", "ferrum.retrieval.sqlite", "ferrum.runs", "ferrum.schedules",
    "ferrum.sandbox.bubblewrap", "ferrum.sandbox.pool", "ferrum.testing.effects_server", "ferrum.testing.model_server",
    "ferrum.local.supervisor", "ferrum.follow", "ferrum.worker", "ferrum.executor", "ferrum.exports", "ferrum.pool",
    "ferrum.remote", "ferrum.retrieval.grading", "celery.app.control", "celery.app.events", "celery.app.log",
    "celery.concurrency.solo", "celery.contrib.testing.worker", "celery.worker.consumer.delayed_delivery",
    "xdist.dsession", "xdist.remote", "xdist.scheduler",
)  # fmt: skip

#: How long one that has connected may take to ask.
_PATIENCE_S = 10.0


def _load(environ: Mapping[str, str]) -> None:
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        if (value := environ.get(f"PRELOADED_{name}")) is not None:
            os.environ[name] = value
            import coverage

            # Each fork begins its own measurement with this one's settings.
            coverage.process_startup(slug="preloaded")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _call_a_model()
        for name in (*_SLOW, *_pytest()):
            # Some belong to extras.
            with suppress(ImportError):
                importlib.import_module(name)
        # Of files beside the package, which are in no list of modules.
        importlib.import_module("ferrum.steps").step_types()
    # coverage.py asks for it in each fork; the first time, that looks up the file of each module that there is.
    inspect.stack()
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()


def _call_a_model() -> None:
    """The first call costs half a second more than the next ones, after the two and more of litellm's import."""
    from ferrum.governance.acts import ModelCall
    from ferrum.models import calls
    from ferrum.testing.environment import environment
    from ferrum.testing.model_server import ModelServer

    async def call(**more: Any) -> None:
        message = {"role": "user", "content": "Hello"}
        await calls.complete(ModelCall.model_validate({"model": "openai/scripted", "messages": [message], **more}))

    async def first_calls() -> None:
        await call()
        await calls.aclose()

    with ModelServer("Hello") as server, environment({**calls._ENVIRONMENT, **server.environ}):
        asyncio.run(first_calls())
    # It reads the environment, and each fork has its own.
    calls._litellm.cache_clear()


def _pytest() -> list[str]:
    """Its own plugins, and those that are installed."""
    from _pytest.config import default_plugins

    theirs = [one.module for one in entry_points(group="pytest11")]
    return ["pytest", "hypothesis", "pdb", *(f"_pytest.{name}" for name in default_plugins), *theirs]


class Server:
    """Accepts those who ask, forks, and tells each how its fork ended."""

    def __init__(self, path: str) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(path)
        self._listening.listen(128)
        self._forks: dict[int, socket.socket] = {}
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._listening, selectors.EVENT_READ)
        self._ready.register(0, selectors.EVENT_READ)
        wakes, self._wake = socket.socketpair()
        wakes.setblocking(False)
        self._wake.setblocking(False)
        self._ready.register(wakes, selectors.EVENT_READ)
        self._wakes = wakes
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake.fileno())
        self._loaded = False

    def serve(self) -> None:
        while True:
            for key, _ in self._ready.select():
                if key.fileobj == 0:
                    return
                if key.fileobj is self._listening:
                    self._accept()
                elif key.fileobj is self._wakes:
                    with suppress(BlockingIOError):
                        self._wakes.recv(4096)
                else:
                    self._left(key.data)
            self._reap()

    def stop(self) -> None:
        for pid in self._forks:
            os.kill(pid, signal.SIGKILL)

    def _accept(self) -> None:
        asking, _ = self._listening.accept()
        # Who has connected is about to ask, unless a signal ended or stopped it just then.
        asking.settimeout(_PATIENCE_S)
        descriptors: list[int] = []
        try:
            head, descriptors, _, _ = socket.recv_fds(asking, 4, 3)
            asked = b""
            while len(asked) < int.from_bytes(head, "big"):
                if not (more := asking.recv(65536)):
                    raise ConnectionResetError
                asked += more
            if not asked:
                raise ConnectionResetError
        except OSError:
            for descriptor in descriptors:
                os.close(descriptor)
            asking.close()
            return
        command, at, environ, cwd, umask = marshal.loads(asked)
        if not self._loaded:
            _load(environ)
            self._loaded = True
        pid = os.fork()
        if pid == 0:
            self._become(asking, descriptors)
            _run(command, at, environ, cwd, umask)
        for descriptor in descriptors:
            os.close(descriptor)
        self._forks[pid] = asking
        self._ready.register(asking, selectors.EVENT_READ, pid)
        with suppress(OSError):
            asking.sendall(pid.to_bytes(4, "big"))

    def _left(self, pid: int) -> None:
        """Whoever stood in for this fork was killed, for it says nothing."""
        self._ready.unregister(self._forks[pid])
        os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        for pid in list(self._forks):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                asking = self._forks.pop(pid)
                with suppress(KeyError):
                    self._ready.unregister(asking)
                with suppress(OSError):
                    asking.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
                asking.close()

    def _become(self, asking: socket.socket, descriptors: list[int]) -> None:
        """Let go of all that is the server's."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
        os.setsid()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        for one in (self._listening, self._wakes, self._wake, asking, *self._forks.values()):
            one.close()
        self._ready.close()
        for descriptor in descriptors:
            if descriptor > 2:
                os.close(descriptor)


def _run(command: list[str], at: int, environ: dict[str, str], cwd: str, umask: int) -> NoReturn:
    """Be the process that this command would have started."""
    code = 1
    try:
        os.umask(umask)
        os.environ.clear()
        os.environ.update(environ)
        time.tzset()
        random.seed()
        _streams("-u" in command[1:at] or bool(environ.get("PYTHONUNBUFFERED")))
        _path(command, at, environ)
        _warn(command[1:at], environ)
        os.chdir(cwd)
        sys.orig_argv = command
        sys.argv = command[at:]
        if command[at - 1] == "-m":
            runpy.run_module(command[at], run_name="__main__", alter_sys=True)
        elif command[at - 1] == "-c":
            sys.argv[0] = "-c"
            exec(compile(command[at], "<string>", "exec"), _main())
        else:
            runpy.run_path(command[at], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        _end(code)


def _main() -> dict[str, Any]:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    return module.__dict__


def _end(code: int) -> NoReturn:
    import atexit

    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    with suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
    os._exit(code & 0xFF)


def _streams(unbuffered: bool) -> None:
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0] or locale.getpreferredencoding(False)
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), encoding=encoding)
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        raw = open(number, "wb", 0 if unbuffered else -1, closefd=False)
        line = number == 2 or os.isatty(number)
        stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=line, write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _path(command: list[str], at: int, environ: dict[str, str]) -> None:
    safe = "-P" in command[1:at] or bool(environ.get("PYTHONSAFEPATH"))
    given = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = [] if safe else ["" if command[at - 1] in ("-m", "-c") else str(Path(command[at]).parent)]
    sys.path[:] = [*first, *given, *(path for path in sys.path if path not in ("", _HERE))]
    importlib.invalidate_caches()


def _warn(options: list[str], environ: dict[str, str]) -> None:
    given = [option for option in environ.get("PYTHONWARNINGS", "").split(",") if option]
    for number, option in enumerate(options):
        if option == "-W":
            given.append(options[number + 1])
        elif option.startswith("-W"):
            given.append(option[2:])
    sys.warnoptions[:] = given
    warnings.resetwarnings()
    # As Python has them.
    warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category, append=True)
    warnings._processoptions(given)  # type: ignore[attr-defined]


if __name__ == "__main__":
    server = Server(sys.argv[1])
    try:
        server.serve()
    finally:
        server.stop()
        Path(sys.argv[1]).unlink(missing_ok=True)
        # It has measured nothing that the test processes have not.
        os.kill(os.getpid(), signal.SIGKILL)

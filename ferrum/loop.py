"""The one asyncio loop of a process, on a thread of its own, and code of others that must be stopped in theirs."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ferrum.errors import StepError, TaskError, words

T = TypeVar("T")

#: Threads for the short blocking calls that coroutines make (the record, the artifact store).
_HELPERS = 64


class LoopThread:
    """An event loop that threads hand coroutines to, started by the first.

    It holds the process's HTTP connections and MCP sessions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        os.register_at_fork(after_in_child=self._forget)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._started())

    def stop(self, last: Coroutine[Any, Any, None] | None = None, timeout_s: float = 10) -> None:
        """End the loop after `last` has run; what still runs on it is cancelled."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            if last is not None:
                last.close()
            return
        try:
            if last is not None:
                asyncio.run_coroutine_threadsafe(last, loop).result(timeout_s)
        finally:
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(timeout_s)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout_s)
            loop.close()

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is not None:
            return self._loop
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                loop.set_default_executor(ThreadPoolExecutor(_HELPERS, "ferrum-blocking"))
                self._thread = threading.Thread(target=loop.run_forever, name="ferrum-loop", daemon=True)
                self._thread.start()
                self._loop = loop
            return self._loop

    def _forget(self) -> None:
        # A thread does not survive a fork: the child starts its own loop when it needs one.
        self._lock = threading.Lock()
        self._loop = self._thread = None


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()


#: Code of others that raises one of these means to end its process, or a task of its own, and not ours.
_ENDS = (SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError)


def is_terminated(error: BaseException) -> bool:
    """Tell if a pool ends this process: the signal handler of its children leaves with the code -(256 - signal)."""
    return isinstance(error, SystemExit) and isinstance(error.code, int) and -256 < error.code < -128


def raised(name: str, error: BaseException) -> None:
    """Code called `name` ended by an exception: nothing where that was `sys.exit(0)`, which is how a program succeeds.

    Raises `TaskError`, which may be tried again, for all else.
    """
    if not (isinstance(error, SystemExit) and error.code in (None, 0)):
        raise TaskError(f"{name} {_words(error)}", retry=True) from error


def _words(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"ended by sys.exit({error.code!r})"
    return f"raised {type(error).__name__}: {words(error)}"


def contained(call: Callable[[], T]) -> T:
    """Make the call. An exception that would end this process is a `StepError`: it may end only its step."""
    try:
        return call()
    except _ENDS as error:
        if is_terminated(error):
            raise
        raise StepError(f"its code {_words(error)}", retry=True) from error


async def contained_on_loop(work: Awaitable[T]) -> T:
    """The same of a coroutine, in which an exit would stop the event loop, and with it every step of the process."""
    try:
        return await work
    except asyncio.CancelledError as error:
        if is_cancelled():
            raise
        raise StepError(f"its code {_words(error)}", retry=True) from error
    except (SystemExit, KeyboardInterrupt) as error:
        raise StepError(f"its code {_words(error)}", retry=True) from error


def is_cancelled() -> bool:
    """Tell whether somebody asked to cancel the task that runs here; if not, a `CancelledError` is its code's own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Interrupted(BaseException):
    """Raised in the midst of blocking code that must stop; not an `Exception`, so that the code does not swallow it."""


class Blocking:
    """Blocking code in the calling thread, which another thread may interrupt.

    Python can raise an exception in another thread only between two of its instructions: code that waits inside a
    C function (a socket, `time.sleep`) hears of it when that returns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._asked = False

    def run(self, call: Callable[[], T]) -> T:
        """Raises `Interrupted` when it was interrupted, before it began or since."""
        with self._lock:
            if self._asked:
                raise Interrupted
            self._thread = threading.get_ident()
        try:
            return call()
        finally:
            self._leave()

    def interrupt(self) -> None:
        with self._lock:
            if self._asked:
                return
            self._asked = True
            if self._thread is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(Interrupted))

    def _leave(self) -> None:
        with self._lock:
            self._thread = None
            asked = self._asked
        # An exception that is on its way must strike here and not in what this thread does next. It cannot be taken
        # back: clearing it leaves CPython checking for it at every call, for ever. A second is for code that ate it.
        deadline = time.monotonic() + 1
        while asked and not isinstance(sys.exception(), Interrupted) and time.monotonic() < deadline:
            time.sleep(0.001)

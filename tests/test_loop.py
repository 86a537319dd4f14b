"""The loop of a process, and blocking code that another thread stops, whenever it does."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial

import pytest
from fleet import PATIENCE_S

from ferrum.loop import Blocking, Interrupted, LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.stop()


async def on_which_thread() -> int:
    return threading.get_ident()


def test_all_coroutines_run_on_one_thread_that_is_not_the_callers(loop: LoopThread) -> None:
    found = {loop.submit(on_which_thread()).result(5) for _ in range(5)}
    assert len(found) == 1
    assert threading.get_ident() not in found


def test_the_loop_is_started_once_however_many_threads_begin(loop: LoopThread) -> None:
    gate, found = threading.Barrier(8), set[int]()

    def ask() -> None:
        gate.wait()
        found.add(loop.submit(on_which_thread()).result(5))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1


def test_a_loop_that_another_thread_started_meanwhile_is_used() -> None:
    loop = LoopThread()

    class Late:
        """A lock that is free only after someone else has started the loop."""

        def __enter__(self) -> None:
            loop._lock = threading.Lock()
            loop.submit(on_which_thread()).result(5)

        def __exit__(self, *_: object) -> None:
            pass

    loop._lock = Late()  # type: ignore[assignment]
    loop.submit(on_which_thread()).result(5)
    assert len([thread for thread in threading.enumerate() if thread is loop._thread]) == 1
    loop.stop()


def test_stopping_runs_the_last_coroutine_and_cancels_what_still_runs(loop: LoopThread) -> None:
    began, last = threading.Event(), threading.Event()

    async def hang() -> None:
        began.set()
        await asyncio.sleep(60)

    async def end() -> None:
        last.set()

    hanging = loop.submit(hang())
    assert began.wait(PATIENCE_S)
    thread = loop._thread
    loop.stop(end())
    assert last.is_set()
    with pytest.raises(CancelledError):
        hanging.result(5)
    assert thread is not None
    assert not thread.is_alive()


def test_a_loop_that_never_ran_is_stopped_without_a_word(loop: LoopThread) -> None:
    async def never() -> None:
        raise AssertionError

    last = never()
    loop.stop(last)
    loop.stop()
    assert last.cr_frame is None


def test_a_stopped_loop_starts_anew_when_it_is_needed(loop: LoopThread) -> None:
    loop.submit(on_which_thread()).result(5)
    loop.stop()
    loop.submit(on_which_thread()).result(5)


def test_the_loop_ends_although_its_last_coroutine_failed(loop: LoopThread) -> None:
    async def fail() -> None:
        raise ValueError("no")

    loop.submit(on_which_thread()).result(5)
    thread = loop._thread
    with pytest.raises(ValueError, match="no"):
        loop.stop(fail())
    assert thread is not None
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_starts_a_loop_of_its_own(loop: LoopThread) -> None:
    loop.submit(on_which_thread()).result(5)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            loop.submit(on_which_thread()).result(5)
            os.write(write, b"ran")
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"ran"
    loop.submit(on_which_thread()).result(5)


# Blocking code.


def test_code_that_nobody_interrupts_returns_what_it_returns_and_raises_what_it_raises() -> None:
    assert Blocking().run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        Blocking().run(lambda: 1 // 0)


def test_what_was_interrupted_before_it_began_does_not_begin() -> None:
    blocking, ran = Blocking(), []
    blocking.interrupt()
    with pytest.raises(Interrupted):
        blocking.run(lambda: ran.append("ran"))
    assert ran == []


def spin(began: threading.Event) -> None:
    began.set()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        time.sleep(0.001)


def test_code_is_interrupted_in_its_midst() -> None:
    blocking, began = Blocking(), threading.Event()
    other = threading.Thread(target=lambda: (began.wait(), blocking.interrupt(), blocking.interrupt()))
    other.start()
    with pytest.raises(Interrupted):
        blocking.run(lambda: spin(began))
    other.join()
    calm()


def test_an_interruption_that_comes_too_late_hits_nobody() -> None:
    blocking = Blocking()
    blocking.run(lambda: None)
    blocking.interrupt()
    calm()


def calm() -> None:
    """Raises what is still on its way to this thread."""
    for _ in range(20):
        time.sleep(0.0005)


def test_an_interruption_hits_the_code_or_nobody_whenever_it_comes() -> None:
    """Many times, so that it comes at every moment: before, between two instructions, while it leaves, after."""
    for delay in range(300):
        blocking, go = Blocking(), threading.Event()

        def strike(blocking: Blocking = blocking, go: threading.Event = go, delay: int = delay) -> None:
            go.wait()
            for _ in range(delay % 60 * 10):
                pass
            blocking.interrupt()

        other = threading.Thread(target=strike)
        other.start()
        with suppress(Interrupted):
            go.set()
            assert blocking.run(partial(sum, range(delay * 10))) == sum(range(delay * 10))
        other.join()
    calm()


def test_code_that_eats_its_interruption_does_not_hand_it_on() -> None:
    blocking, began = Blocking(), threading.Event()

    def stubborn() -> str:
        try:
            spin(began)
        except Interrupted:
            return "went on"
        return "never"

    other = threading.Thread(target=lambda: (began.wait(), blocking.interrupt()))
    other.start()
    assert blocking.run(stubborn) == "went on"
    other.join()
    calm()


def test_only_the_thread_of_the_code_is_interrupted() -> None:
    first, second = threading.Event(), threading.Event()
    stopped, going = Blocking(), Blocking()
    done: list[str] = []

    def run(blocking: Blocking, began: threading.Event, name: str) -> None:
        try:
            blocking.run(lambda: spin(began))
        except Interrupted:
            done.append(name)

    threads = [
        threading.Thread(target=run, args=(stopped, first, "stopped")),
        threading.Thread(target=run, args=(going, second, "going")),
    ]
    for thread in threads:
        thread.start()
    assert first.wait(PATIENCE_S)
    assert second.wait(PATIENCE_S)
    stopped.interrupt()
    threads[0].join(5)
    assert done == ["stopped"]
    going.interrupt()
    threads[1].join(5)
    assert done == ["stopped", "going"]

"""What a sandbox costs: cold beside a bare interpreter, warm, over a thousand jobs, and under workers that are killed.

Cold is a sandbox that is made for a program, beside a bare subprocess of the same interpreter: as sandboxes start it
(`-I -S`), and as everybody does, which looks for what is installed first. Warm is a program for which a sandbox was
waiting. To the first output, and to the result with all that the program left. The machine is shared, so read the
medians and the least.

    python -m bench.sandbox [--rounds N] [--jobs N]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ferrum.errors import FerrumError
from ferrum.governance.acts import CodeRun
from ferrum.sandbox import Sandboxes
from ferrum.sandbox.runtimes import basic

PROGRAM = "print('hello')"
RUN = CodeRun(code=PROGRAM)
#: Between two rounds, so that what was started for the next one is there, and what is left of the last one is not.
PAUSE_S = 0.3


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1000)
    options = parser.parse_args(arguments)
    try:
        asyncio.run(_probe())
    except FerrumError as error:
        print(f"no sandbox here: {error}")
        return
    bare = [_bare() for _ in range(options.rounds)]
    _row("a bare interpreter, python -I -S, ms", bare)
    _row("a bare interpreter, python, ms", [_bare(()) for _ in range(options.rounds)])
    first, whole = zip(*asyncio.run(_cold(options.rounds)), strict=True)
    _row("cold: to the first output, ms", first, bare)
    _row("cold: to the result, ms", whole, bare)
    _row("cold: processor time beside bare, ms", asyncio.run(_processor(options.rounds)))
    first, whole = zip(*asyncio.run(_warm(options.rounds)), strict=True)
    _row("warm: to the first output, ms", first)
    _row("warm: to the result, ms", whole)
    asyncio.run(_memory(options.jobs))
    _kills(200)


def _row(name: str, values: Sequence[float], beside: Sequence[float] = ()) -> None:
    """`beside` is what it is more than."""
    more = [f"{kind(values) - kind(beside):+.1f}" if beside else "" for kind in (statistics.median, min)]
    print(f"{name:<42} median {statistics.median(values):7.1f} {more[0]:>6}   least {min(values):7.1f} {more[1]:>6}")


async def _probe() -> None:
    sandboxes = Sandboxes(warm=0)
    await sandboxes.run(RUN, {}, _nothing)
    await sandboxes.aclose()


def _bare(flags: Sequence[str] = ("-I", "-S")) -> float:
    begun = time.perf_counter()
    subprocess.run([basic().interpreter, *flags, "-c", PROGRAM], capture_output=True, env={}, check=True)
    return (time.perf_counter() - begun) * 1000


async def _cold(rounds: int) -> list[tuple[float, float]]:
    sandboxes = Sandboxes(warm=0)
    await sandboxes.probe()
    took = []
    for _ in range(rounds):
        await asyncio.sleep(PAUSE_S)
        took.append(await _timed(sandboxes))
    await sandboxes.aclose()
    return took


async def _timed(sandboxes: Sandboxes) -> tuple[float, float]:
    """Milliseconds to the first output, and to the result."""
    begun = time.perf_counter()
    heard: list[float] = []
    await sandboxes.run(RUN, {}, lambda *_: heard.append(time.perf_counter() - begun))
    return heard[0] * 1000, (time.perf_counter() - begun) * 1000


async def _processor(rounds: int) -> list[float]:
    """What all processes of a cold sandbox use together, less what a bare interpreter does: load does not change it."""
    before = _used()
    for _ in range(rounds):
        _bare()
    bare = (_used() - before) / rounds
    sandboxes = Sandboxes(warm=0)
    await sandboxes.probe()
    await asyncio.sleep(0.1)
    before = _used()
    for _ in range(rounds):
        await sandboxes.run(RUN, {}, _nothing)
    await sandboxes.aclose()
    return [(_used() - before) / rounds - bare]


def _used() -> float:
    times = os.times()
    return (times.children_user + times.children_system) * 1000


async def _warm(rounds: int) -> list[tuple[float, float]]:
    sandboxes = Sandboxes(warm=2)
    await sandboxes.prepare(RUN)
    took = []
    for _ in range(rounds):
        await asyncio.sleep(PAUSE_S)
        took.append(await _timed(sandboxes))
    await sandboxes.aclose()
    return took


async def _memory(jobs: int) -> None:
    sandboxes = Sandboxes(warm=2)
    sizes = []
    begun = time.perf_counter()
    for number in range(jobs + 1):
        if number in (jobs // 10, jobs):
            sizes.append(_size())
        await sandboxes.run(RUN, {"in": bytes(100_000)}, _nothing)
    took = time.perf_counter() - begun
    await sandboxes.aclose()
    print(
        f"the worker after {jobs // 10} and after {jobs} jobs: {sizes[0]:.1f} MB, {sizes[1]:.1f} MB; "
        f"{jobs / took:.0f} jobs/s one after the other"
    )


def _size() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


_WORKER = """
import asyncio, sys
from dataclasses import replace
from ferrum.governance.acts import CodeRun
from ferrum.sandbox import Sandboxes
from ferrum.sandbox.runtimes import basic

runtime = replace(basic(), mounts=(*basic().mounts, sys.argv[1]))
code = "import os, time\\nif os.fork(): time.sleep(0.02)\\nelse: time.sleep(60)"

async def one(sandboxes):
    while True:
        print("job", flush=True)
        await sandboxes.run(CodeRun(code=code), {}, lambda *_: None)

async def main():
    sandboxes = Sandboxes(find=lambda _: runtime)
    await asyncio.gather(*(one(sandboxes) for _ in range(4)))

asyncio.run(main())
"""


def _kills(most: int) -> None:
    """Two workers, killed at random until so many jobs were begun; what has their mark mounted is theirs."""
    mark = Path(f"/var/tmp/ferrum-bench-{os.getpid()}")
    mark.mkdir()
    jobs, kills = 0, 0
    try:
        while jobs < most:
            workers = [
                subprocess.Popen([sys.executable, "-c", _WORKER, str(mark)], stdout=subprocess.PIPE, text=True)
                for _ in range(2)
            ]
            for worker in workers:
                assert worker.stdout is not None
                for _ in range(random.randrange(5, 40)):
                    worker.stdout.readline()
                    jobs += 1
                worker.send_signal(signal.SIGKILL)
                kills += 1
            for worker in workers:
                worker.communicate()
        begun = time.perf_counter()
        while _left(mark) and time.perf_counter() - begun < 10:
            time.sleep(0.005)
        print(
            f"{jobs} jobs in workers of which {kills} were killed: {_left(mark)} processes left after "
            f"{time.perf_counter() - begun:.2f} s"
        )
    finally:
        mark.rmdir()


def _left(mark: Path) -> int:
    left = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            known = process.joinpath("mountinfo").read_text() + process.joinpath("cmdline").read_text()
        except OSError:
            continue
        left += str(mark) in known and int(process.name) != os.getpid()
    return left


def _nothing(stream: str, text: str) -> None:
    """Listens to nothing."""


if __name__ == "__main__":
    main()

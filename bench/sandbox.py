"""What a sandbox costs: cold beside a bare interpreter, warm, over a thousand jobs, and under workers that are killed.

Cold is a bare subprocess of the same interpreter, and the same program in a sandbox that is made for it. Warm is the
time to the first output of a program for which a sandbox was waiting. The machine is shared, so read the medians and
the least.

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
#: Between two rounds, so that what was started for the next one is there.
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
    cold = asyncio.run(_cold(options.rounds))
    _row("a bare interpreter, ms", bare)
    _row("cold: a sandbox and its result, ms", cold, f"{statistics.median(cold) - statistics.median(bare):+.1f}")
    _row("cold: processor time beside bare, ms", asyncio.run(_processor(options.rounds)))
    _row("warm: to the first output, ms", asyncio.run(_warm(options.rounds)))
    asyncio.run(_memory(options.jobs))
    _kills(200)


def _row(name: str, values: Sequence[float], note: str = "") -> None:
    print(f"{name:<42} median {statistics.median(values):7.1f}   least {min(values):7.1f}   {note}")


async def _probe() -> None:
    sandboxes = Sandboxes(warm=0)
    await sandboxes.run(RUN, {}, _nothing)
    await sandboxes.aclose()


def _bare() -> float:
    begun = time.perf_counter()
    subprocess.run([basic().interpreter, "-I", "-S", "-c", PROGRAM], capture_output=True, env={}, check=True)
    return (time.perf_counter() - begun) * 1000


async def _cold(rounds: int) -> list[float]:
    sandboxes = Sandboxes(warm=0)
    await sandboxes.probe()
    took = []
    for _ in range(rounds):
        begun = time.perf_counter()
        await sandboxes.run(RUN, {}, _nothing)
        took.append((time.perf_counter() - begun) * 1000)
        await asyncio.sleep(0.05)
    await sandboxes.aclose()
    return took


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


async def _warm(rounds: int) -> list[float]:
    sandboxes = Sandboxes(warm=2)
    await sandboxes.prepare(RUN)
    took = []
    for _ in range(rounds):
        await asyncio.sleep(PAUSE_S)
        begun = time.perf_counter()
        heard: list[float] = []
        await sandboxes.run(RUN, {}, lambda *_, begun=begun, heard=heard: heard.append(time.perf_counter() - begun))
        took.append(heard[0] * 1000)
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

"""What a step costs: plain Celery canvas and ferrum, side by side in one run.

Plain Celery does no-op tasks with its results on; ferrum does no-op steps with claim, finish and events. Both have the
same Redis, the same worker settings and one worker process each; they take turns, and each figure is the median.

    python -m bench.steps [--rounds N] [--only NAME] [--chain N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kombu.utils.imports import symbol_by_name

from ferrum.local.redis import PrivateRedis


@dataclass(frozen=True)
class Row:
    name: str
    unit: str
    #: Whether a smaller figure is the better one.
    less_is_better: bool
    plain: Callable[[], float]
    ferrum: Callable[[], float]


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as folder, PrivateRedis(Path(folder)) as server:
        environment(server.url, Path(folder))
        if options.chain:
            _chains_of(options.chain)
        print(f"{'':34}{'plain Celery':>14}{'ferrum':>12}{'ratio':>9}")
        with worker("bench.plain", "300"), worker("ferrum", "300"):
            for row in _rows():
                if options.only in row.name:
                    _measure(row, options.rounds)
        if options.only in "cold start, memory":
            _cold(options.rounds)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of a row's name")
    parser.add_argument("--chain", type=int, help="steps that one chain carries (ferrum.plan.CHAIN)")
    return parser.parse_args(arguments)


def environment(url: str, folder: Path) -> None:
    """The settings of the worker and of this process."""
    (folder / "policy.yaml").write_text('allow: ["task:*"]\n')
    os.environ |= {
        "FERRUM_REDIS_URL": url,
        "FERRUM_HOME": str(folder),
        "FERRUM_POLICY": str(folder / "policy.yaml"),
        "FERRUM_IMPORTS": "bench.user_tasks",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }


def _chains_of(steps: int) -> None:
    import ferrum.plan

    ferrum.plan.CHAIN = steps
    os.environ["BENCH_CHAIN"] = str(steps)


@contextmanager
def worker(app: str, threads: str) -> Iterator[subprocess.Popen[bytes]]:
    process, _ = _start(app, threads)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _start(app: str, threads: str) -> tuple[subprocess.Popen[bytes], float]:
    """A worker, and how many seconds it took until it was ready."""
    code = (
        "import os, sys\n"
        "import ferrum.plan\n"
        "ferrum.plan.CHAIN = int(os.environ.get('BENCH_CHAIN', ferrum.plan.CHAIN))\n"
        "from celery.__main__ import main\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "-A", app, "worker", "-c", threads, "-n", f"{app}@bench"]
    if app != "ferrum":
        command += ["--without-mingle", "--without-gossip"]
    log = Path(os.environ["FERRUM_HOME"]) / f"{app}.log"
    began = time.monotonic()
    with log.open("wb") as out:
        worker = subprocess.Popen([*command, "-l", "warning"], stdout=out, stderr=out)
    asking = symbol_by_name("ferrum.celery:app" if app == "ferrum" else "bench.plain:app")
    while not asking.control.ping(destination=[f"{app}@bench"], timeout=0.05):
        if worker.poll() is not None or time.monotonic() - began > 60:
            raise SystemExit(log.read_text())
    return worker, time.monotonic() - began


def _rows() -> Iterator[Row]:
    for steps in (10, 100, 1000):
        yield Row(f"{steps} in sequence, ms a step", "ms", True, *_sequence(steps))
    yield Row("200 runs of 5, steps a second", "/s", False, *_many(200, 5))
    yield Row("1000 side by side and a join, s", "s", True, *_fan_out(1000))
    yield Row("300 runs of three naps of 0.2 s, s", "s", True, *_naps(300))


def _measure(row: Row, rounds: int) -> None:
    plain: list[float] = []
    ours: list[float] = []
    if rounds > 1:
        row.plain(), row.ferrum()  # connections, plans and imports are there from here on
    for _ in range(rounds):
        plain.append(row.plain())
        ours.append(row.ferrum())
    one, other = statistics.median(plain), statistics.median(ours)
    ratio = other / one if row.less_is_better else one / other
    print(f"{row.name:34}{one:>14.2f}{other:>12.2f}{ratio:>9.2f}", flush=True)


def _sequence(steps: int) -> tuple[Callable[[], float], Callable[[], float]]:
    def plain() -> float:
        from celery import chain

        from bench.plain import nothing

        return timed(lambda: chain(*(nothing.si() for _ in range(steps))).apply_async().get(timeout=600)) / steps * 1e3

    def ours() -> float:
        return timed(lambda: run(workflow(steps, "bench.nothing"))) / steps * 1e3

    return plain, ours


def _many(runs: int, steps: int) -> tuple[Callable[[], float], Callable[[], float]]:
    def plain() -> float:
        from celery import chain

        from bench.plain import nothing

        def all_of_them() -> None:
            last = [chain(*(nothing.si() for _ in range(steps))).apply_async() for _ in range(runs)]
            for one in last:
                one.get(timeout=600)

        return runs * steps / timed(all_of_them)

    def ours() -> float:
        return runs * steps / timed(lambda: _runs(runs, workflow(steps, "bench.nothing")))

    return plain, ours


def _fan_out(width: int) -> tuple[Callable[[], float], Callable[[], float]]:
    def plain() -> float:
        from celery import chord

        from bench.plain import nothing

        return timed(lambda: chord([nothing.si() for _ in range(width)], nothing.si()).apply_async().get(timeout=600))

    def ours() -> float:
        steps: dict[str, Any] = {f"s{i}": step("bench.nothing") for i in range(width)}
        steps["join"] = {**step("bench.nothing"), "needs": list(steps)}
        return timed(lambda: run({"name": "wide", "steps": steps}))

    return plain, ours


def _naps(runs: int) -> tuple[Callable[[], float], Callable[[], float]]:
    def plain() -> float:
        from celery import chain

        from bench.plain import nap

        def all_of_them() -> None:
            last = [chain(*(nap.si(0.2) for _ in range(3))).apply_async() for _ in range(runs)]
            for one in last:
                one.get(timeout=600)

        return timed(all_of_them)

    def ours() -> float:
        return timed(lambda: _runs(runs, workflow(3, "bench.nap", seconds=0.2)))

    return plain, ours


def workflow(steps: int, task: str, **given: float) -> dict[str, Any]:
    chain = {f"s{i}": {**step(task, **given), "needs": [f"s{i - 1}"] if i else []} for i in range(steps)}
    return {"name": "chain", "steps": chain}


def step(task: str, **given: float) -> dict[str, Any]:
    return {"type": "task", "task": task, "input": given}


def run(workflow: dict[str, Any]) -> None:
    import ferrum

    ferrum.wait(ferrum.submit(workflow))


def _runs(runs: int, workflow: dict[str, Any]) -> None:
    import ferrum
    from ferrum.workflow import Workflow

    value = Workflow.of(workflow)
    for run_id in [ferrum.submit(value) for _ in range(runs)]:
        ferrum.wait(run_id)


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _cold(rounds: int) -> None:
    """From the command to an answer, and the memory of an idle worker."""
    ready: dict[str, list[float]] = {"bench.plain": [], "ferrum": []}
    memory: dict[str, list[float]] = {"bench.plain": [], "ferrum": []}
    for _ in range(rounds):
        for app, times in ready.items():
            worker, seconds = _start(app, "64")
            times.append(seconds)
            memory[app].append(_resident_mb(worker.pid))
            worker.terminate()
            worker.wait()
    for name, found in (("cold start, s", ready), ("memory when ready, MB", memory)):
        one, other = (statistics.median(found[app]) for app in ("bench.plain", "ferrum"))
        print(f"{name:34}{one:>14.2f}{other:>12.2f}{other / one:>9.2f}")


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()

"""What the parts of the language cost: branches, fan-outs, loops, timers; how cost grows with size; who waits for whom.

There is no peer here: each row is a case beside the plainest thing that does the same work, in the same run on the same
worker, and the ratio of the two.

    python -m bench.language [--rounds N] [--only NAME]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.steps import environment, run, step, timed, worker, workflow
from ferrum.local.redis import PrivateRedis

#: Steps that another tenant has on its way while ten are timed.
MILLION = 1_000_000


@dataclass(frozen=True)
class Row:
    name: str
    #: What it is beside.
    beside: str
    base: Callable[[], float]
    case: Callable[[], float]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of a row's name")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, PrivateRedis(Path(folder)) as server:
        environment(server.url, Path(folder))
        with worker("ferrum", "64"):
            for row in _rows():
                if options.only in row.name:
                    _measure(row, options.rounds)
            if options.only in "timer":
                _timer(options.rounds)
            if options.only in "memory":
                _memory(server.url)
            if options.only in "fairness":
                _fairness()


def _rows() -> Iterator[Row]:
    chain = _each_ms(lambda: run(workflow(100, "bench.nothing")), 100)
    yield Row("branch: 100 switches, ms each", "100 steps", chain, _each_ms(lambda: run(_switches(100)), 100))
    yield Row("loop: 100 rounds, ms each", "100 steps", chain, _each_ms(lambda: run(_loop(100)), 100))
    wide = _each_ms(lambda: run(_side_by_side(1000)), 1000)
    yield Row("fan-out: 1,000 items, ms each", "1,000 steps", wide, _each_ms(lambda: run(_items(1000)), 1000))
    thousand = _each_ms(lambda: run(_items(1000)), 1000)
    yield Row("fan-out: 10,000 items, ms each", "1,000 items", thousand, _each_ms(lambda: run(_items(10_000)), 10_000))
    yield Row("chain: 5,000 steps, ms each", "100 steps", chain, _each_ms(lambda: run(_plain(5000)), 5000))
    _register(100)
    ten = _each_ms(lambda: run(_nested(10)), 10)
    yield Row("nesting: 100 runs deep, ms each", "10 deep", ten, _each_ms(lambda: run(_nested(100)), 100))


def _measure(row: Row, rounds: int) -> None:
    base: list[float] = []
    case: list[float] = []
    if rounds > 1:
        row.base(), row.case()  # plans and connections are there from here on
    for _ in range(rounds):
        base.append(row.base())
        case.append(row.case())
    one, other = statistics.median(base), statistics.median(case)
    print(f"{row.name:34}{one:>9.2f} ({row.beside}){other:>{24 - len(row.beside)}.2f}{other / one:>9.2f}", flush=True)


def _each_ms(work: Callable[[], object], count: int) -> Callable[[], float]:
    return lambda: timed(work) / count * 1e3


def _switches(count: int) -> dict[str, Any]:
    one = {"type": "switch", "value": "a", "cases": {"a": step("bench.nothing"), "b": step("bench.nothing")}}
    return {"name": "switches", "steps": {f"s{i}": {**one, "needs": [f"s{i - 1}"] if i else []} for i in range(count)}}


def _loop(rounds: int) -> dict[str, Any]:
    repeat = {"until": f"round == {rounds}", "max": rounds}
    return {"name": "loop", "steps": {"a": {**step("bench.nothing"), "repeat": repeat}}}


def _items(count: int) -> dict[str, Any]:
    # Longer lists than a file may hold are what a step before it gives.
    first = step("bench.numbers", count=count)
    return {"name": "items", "steps": {"n": first, "e": {**step("bench.nothing"), "for_each": "{{ n }}"}}}


def _side_by_side(width: int) -> dict[str, Any]:
    steps: dict[str, Any] = {f"s{i}": step("bench.nothing") for i in range(width)}
    return {"name": "wide", "steps": {**steps, "join": {**step("bench.nothing"), "needs": list(steps)}}}


def _plain(steps: int) -> dict[str, Any]:
    return workflow(steps, "bench.nothing")


def _register(depth: int) -> None:
    import ferrum

    for level in range(1, depth + 1):
        inner = {"type": "workflow", "name": f"deep-{level - 1}"} if level > 1 else step("bench.nothing")
        ferrum.register({"name": f"deep-{level}", "steps": {"a": inner}})


def _nested(depth: int) -> dict[str, Any]:
    return {"name": "nested", "steps": {"a": {"type": "workflow", "name": f"deep-{depth}"}}}


def _timer(rounds: int) -> None:
    """How late a wait of 0.3 s ends, in ms."""
    import ferrum

    late: list[float] = []
    for _ in range(rounds * 10):
        run_id = ferrum.submit({"name": "timer", "steps": {"a": {"type": "wait", "for": "300ms"}}})
        ferrum.wait(run_id)
        at = {event.type: event.at for event in ferrum.watch(run_id)}
        late.append((at["step.resumed"] - at["step.waiting"] - 0.3) * 1e3)
    print(f"timer: how late, ms{'':>15}{statistics.median(late):>9.1f} (median){max(late):>16.1f} (worst)", flush=True)


def _memory(url: str) -> None:
    """What Redis holds of a run that has ended, for each step, in bytes."""
    import redis

    client = redis.Redis.from_url(url)

    def used() -> int:
        info: Any = client.info("memory")
        return int(info["used_memory"])

    run(_items(10))
    for name, work, count in (("item", _items(10_000), 10_000), ("step of a chain", _plain(1000), 1000)):
        before = used()
        run(work)
        time.sleep(1)
        print(f"memory: bytes in Redis of an {name:20}{(used() - before) / count:>9.0f}", flush=True)


def _fairness() -> None:
    """Ten steps of one tenant: alone, beside a million of another tenant's, and behind a million of its own."""
    import ferrum

    ten = _plain(10)

    def seconds(tenant: str) -> float:
        return timed(lambda: ferrum.wait(ferrum.submit(ten, tenant=tenant)))

    alone = statistics.median(seconds("small") for _ in range(5))
    crowd = [ferrum.submit(_items(10_000), tenant="big") for _ in range(MILLION // 10_000)]
    time.sleep(5)
    beside = statistics.median(seconds("small") for _ in range(5))
    for run_id in crowd:
        with suppress(ferrum.runs.Conflict):
            ferrum.cancel(run_id)
    print(f"fairness: ten steps, s{'':>12}{alone:>9.2f} (alone){beside:>17.2f}{beside / alone:>9.2f}", flush=True)


if __name__ == "__main__":
    main()

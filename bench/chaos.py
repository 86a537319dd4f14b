"""Cost of faults: runs while workers are killed, connections are cut or go silent, and Redis refuses or fails over.

For each kind of fault, runs of six steps with countable effects are started on two workers and a Redis of their own,
and the fault happens again and again until they have ended. It prints, for each kind:

- runs: how many were started;
- lost: runs that did not complete, or lack an effect;
- doubled: effects that happened more often than the record knows of attempts that were lost;
- recovered: attempts that were lost with their worker, or taken from it, and begun anew.

In the last two rows the master itself is lost, and a replica goes on that had not heard everything: the rest did not
happen, so zeros are not promised there.

    python -m bench.chaos [--rows PART] [--runs N] [--faults N] [--seconds S] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from ferrum.local.process import tied
from ferrum.local.redis import PrivateRedis
from ferrum.testing.environment import environment
from ferrum.testing.proxy import Proxy
from ferrum.testing.refusing import REFUSALS

#: How long runs may take after the last fault; past it they are lost.
_PATIENCE_S = 180.0


@dataclass
class Stage:
    """Two workers and a Redis, and what can be done to them."""

    folder: Path
    chance: random.Random
    #: How long a fault lasts that has a length.
    fault_s: float
    #: The master.
    server: PrivateRedis = field(init=False)
    #: The workers' way to it, and that of this process.
    theirs: Proxy = field(init=False)
    ours: Proxy = field(init=False)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    servers: list[PrivateRedis] = field(default_factory=list)
    followed_by: tuple[PrivateRedis, Proxy] | None = None
    lines: ExitStack = field(default_factory=ExitStack)

    def add_server(self) -> PrivateRedis:
        """One more Redis, with the password of the first."""
        home = self.folder / f"redis-{len(self.servers)}"
        (home / "redis").mkdir(parents=True, mode=0o700)
        home.chmod(0o700)
        if self.servers:
            (home / "redis" / "password").write_text(urlsplit(self.servers[0].url).password or "")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = PrivateRedis(home, port=port).start()
        self.servers.append(server)
        return server

    def replica(self) -> tuple[PrivateRedis, Proxy]:
        """The one replica of the master, made when it is first asked for, and its way to it."""
        if self.followed_by is None or self.followed_by[0] is self.server:
            new, line = self.add_server(), self.lines.enter_context(Proxy(self.server.url))
            with redis.Redis.from_url(self.server.url) as master, redis.Redis.from_url(new.url) as replica:
                _follow(master, replica, line.url)
            self.followed_by = new, line
        return self.followed_by

    def start_worker(self, clock_s: float = 0) -> None:
        """One more, whose clock is so many seconds off."""
        number = len(list(self.folder.glob("worker-*.log")))
        code = (
            "import runpy, sys, time\n"
            f"real = time.time\ntime.time = lambda: real() + {clock_s}\n"
            "runpy.run_module('ferrum.start_worker', run_name='__main__', alter_sys=True)"
        )
        with (self.folder / f"worker-{number}.log").open("wb") as log:
            command = tied([sys.executable, "-W", "ignore", "-c", code, "-c", "8", "-l", "info"])
            environ = os.environ | {"FERRUM_REDIS_URL": self.theirs.url}
            self.workers.append(
                subprocess.Popen(command, env=environ, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)
            )

    def effects(self) -> Counter[str]:
        """How often each step had its effect, by `run.step`."""
        log = self.folder / "effects.log"
        return Counter(line.partition("\t")[0] for line in log.read_text().splitlines()) if log.exists() else Counter()

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.server.url, decode_responses=True)


@dataclass(frozen=True)
class Result:
    name: str
    runs: int
    lost: int
    doubled: int
    recovered: int


Fault = Callable[[Stage], None]


def kill(stage: Stage) -> None:
    """A worker is killed, and another one started."""
    victim = stage.workers.pop(stage.chance.randrange(len(stage.workers)))
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    stage.start_worker()


def refuse(kind: str) -> Fault:
    """Redis refuses, in one way."""

    def fault(stage: Stage) -> None:
        with stage.client() as client, REFUSALS[kind](client):
            time.sleep(stage.fault_s)

    return fault


def restart(stage: Stage) -> None:
    """Redis is stopped, and started again."""
    stage.server.stop()
    time.sleep(stage.fault_s / 3)
    stage.server.start()


def cut(stage: Stage) -> None:
    """Every connection of the workers is cut."""
    stage.theirs.cut()


def silence(stage: Stage) -> None:
    """Nothing comes any more through the connections that the workers have, and no end of them either."""
    stage.theirs.go_silent()
    time.sleep(stage.fault_s)


def partition(stage: Stage) -> None:
    """No worker reaches Redis for two leases, and what was connected before is never heard of again."""
    stage.theirs.dead = True
    stage.theirs.go_silent()
    time.sleep(16)
    stage.theirs.dead = False


def clocks(stage: Stage) -> None:
    """Two workers are stopped, and two come whose clocks are five minutes ahead and behind."""
    for worker in stage.workers:
        worker.kill()
        worker.wait()
    stage.workers.clear()
    stage.start_worker(300)
    stage.start_worker(-300)


def hold_the_interpreter(stage: Stage) -> None:
    """A task holds the interpreter of its worker for almost two leases."""
    import ferrum

    hold = {"type": "task", "task": "bench.hold", "input": {"seconds": 15}}
    ferrum.wait(ferrum.submit({"name": "hold", "steps": {"hold": hold}}))


def failover(stage: Stage) -> None:
    """A replica becomes the master, and the master its replica; connections to it are left open."""
    old, new = stage.server, stage.add_server()
    with redis.Redis.from_url(old.url) as master, redis.Redis.from_url(new.url) as replica:
        _follow(master, replica, old.url)
        # It waits until the replica has all that the master took, and changes their places.
        master.execute_command("FAILOVER", "TO", "127.0.0.1", str(urlsplit(new.url).port), "TIMEOUT", "20000")
        _wait_for(lambda: replica.info("replication")["role"] == "master")
    # Who asks for the master is told the old one for a while.
    time.sleep(stage.fault_s)
    _go_on_with(stage, new)


def lose_the_master(behind_s: float) -> Fault:
    """The master is killed, and its replica, which heard nothing for the last `behind_s`, becomes the master."""

    def fault(stage: Stage) -> None:
        old, (new, line) = stage.server, stage.replica()
        if behind_s:
            line.go_silent()
            time.sleep(behind_s)
        old.kill()
        with redis.Redis.from_url(new.url) as replica:
            replica.execute_command("REPLICAOF", "NO", "ONE")
        time.sleep(stage.fault_s)
        _go_on_with(stage, new)

    return fault


def _follow(master: Any, replica: Any, url: str) -> None:
    """Have the replica be one of the master, which it reaches at this URL, and wait until it has all of its data."""
    parts = urlsplit(url)
    for client in (master, replica):
        client.config_set("masterauth", parts.password or "")
        # Nobody else is to follow it, for whom it would wait.
        client.config_set("repl-diskless-sync-delay", 0)
    replica.execute_command("REPLICAOF", "127.0.0.1", str(parts.port))
    _wait_for(lambda: replica.info("replication")["master_link_status"] == "up")


def _go_on_with(stage: Stage, new: PrivateRedis) -> None:
    """From now on whoever connects comes to this server."""
    stage.server = new
    stage.theirs.lead_to(new.url)
    stage.ours.lead_to(new.url)
    # What this process has open is not what is tried.
    stage.ours.cut()


def _wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError("the fault itself did not happen")
        time.sleep(0.05)


#: Each row: its name, and what happens.
ROWS: dict[str, Fault] = {
    "kills": kill,
    "cuts": cut,
    "silent connections": silence,
    "Redis restarts": restart,
    **{f"refusals, {kind}": refuse(kind) for kind in REFUSALS},
    "failover": failover,
    "partitions": partition,
    "clocks": clocks,
    "GIL": hold_the_interpreter,
    "master killed": lose_the_master(0),
    "master killed, 0.5 s behind": lose_the_master(0.5),
}

#: Where Redis itself forgets: the rows whose zeros are not promised.
FORGET = frozenset(("master killed", "master killed, 0.5 s behind"))


def main(arguments: list[str] | None = None) -> bool:
    """Print the table; whether nothing was lost and nothing doubled where that is promised."""
    options = _options(arguments)
    chosen = {name: fault for name, fault in ROWS.items() if options.rows in name}
    if not chosen:
        raise SystemExit(f"no row has {options.rows!r} in its name; there are: {', '.join(ROWS)}")
    print(f"{'':28}{'runs':>6}{'lost':>6}{'doubled':>9}{'recovered':>11}", flush=True)
    results = [_row(name, fault, options) for name, fault in chosen.items()]
    return not any(result.lost or result.doubled for result in results if result.name not in FORGET)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="a part of a row's name")
    parser.add_argument("--runs", type=int, default=30, help="how many runs are under way at each fault")
    parser.add_argument("--faults", type=int, default=3, help="how often it happens")
    parser.add_argument("--seconds", type=float, default=6, help="how long a fault lasts, as a failover does")
    parser.add_argument("--seed", type=int, default=7)
    return parser.parse_args(arguments)


def _row(name: str, fault: Fault, options: argparse.Namespace) -> Result:
    with _stage(random.Random(options.seed), options.seconds) as stage:
        runs: list[str] = []
        for _ in range(options.faults):
            if name in FORGET:
                stage.replica()
            runs += _submit(options.runs)
            _let_them_begin(stage, runs)
            fault(stage)
        result = _count(name, stage, runs)
    print(f"{name:28}{result.runs:>6}{result.lost:>6}{result.doubled:>9}{result.recovered:>11}", flush=True)
    return result


@contextmanager
def _stage(chance: random.Random, fault_s: float) -> Iterator[Stage]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        stage = Stage(folder, chance, fault_s)
        stage.server = stage.add_server()
        try:
            with (
                Proxy(stage.server.url) as stage.theirs,
                Proxy(stage.server.url) as stage.ours,
                environment(_settings(folder, stage.ours.url)),
            ):
                for _ in range(2):
                    stage.start_worker()
                _wait_for(lambda: _workers() == 2)
                yield stage
        finally:
            for worker in stage.workers:
                worker.kill()
                worker.wait()
            stage.lines.close()
            for server in stage.servers:
                server.kill()


def _settings(folder: Path, url: str) -> dict[str, str | None]:
    (folder / "policy.yaml").write_text('allow: ["tool:effects.*", "task:bench.*"]\n')
    module = {"module": "ferrum.testing.effects_server", "args": ["--log", str(folder / "effects.log")]}
    return {
        "FERRUM_REDIS_URL": url,
        "FERRUM_HOME": str(folder / "redis-0"),
        "FERRUM_ARTIFACTS": f"file://{folder / 'artifacts'}",
        "FERRUM_POLICY": str(folder / "policy.yaml"),
        "FERRUM_MCP_SERVERS": json.dumps({"mcpServers": {"effects": module}}),
        "FERRUM_WARM": "false",
        "FERRUM_IMPORTS": "bench.user_tasks",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }


def _workers() -> int:
    from ferrum.runs import record

    return len(record().workers())


STEPS: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": ["c"], "f": ["d", "e"]}


def _submit(count: int) -> list[str]:
    import ferrum

    def step(name: str, needs: list[str]) -> dict[str, Any]:
        return {"type": "tool", "tool": "effects.append", "needs": needs, "input": {"text": name, "linger_s": 0.2}}

    steps = {name: step(name, needs) for name, needs in STEPS.items()}
    return [ferrum.submit({"name": "chaos", "steps": steps}) for _ in range(count)]


def _let_them_begin(stage: Stage, runs: list[str]) -> None:
    """Until a third of what the newest runs do is done; not for long, as all may wait for a repair."""
    enough = (len(runs) - 1) * len(STEPS) // 2
    deadline = time.monotonic() + 10
    while stage.effects().total() < enough and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_known(run_id: str) -> bool:
    from ferrum.errors import NotFound
    from ferrum.runs import record

    try:
        record().status(run_id)
    except NotFound:
        return False
    return True


def _count(name: str, stage: Stage, runs: list[str]) -> Result:
    from ferrum.errors import NotFound, Unavailable
    from ferrum.results import RunStatus
    from ferrum.runs import record

    deadline, left = time.monotonic() + _PATIENCE_S, list(runs)
    while left and time.monotonic() < deadline:
        try:
            left = [run_id for run_id in left if not record().status(run_id).ended]
        except NotFound:
            # A master took it with it.
            left = [run_id for run_id in left if _is_known(run_id)]
        except Unavailable:
            continue
        time.sleep(0.1)
    acted = stage.effects()
    lost = doubled = recovered = 0
    for run_id in runs:
        if not _is_known(run_id):
            lost += 1
            continue
        times = [acted[f"{run_id}.{step}"] for step in STEPS]
        begun_anew = Counter(event.step for event in record().events(run_id) if event.type == "step.lost")
        lost += record().status(run_id) is not RunStatus.COMPLETED or 0 in times
        doubled += sum(max(0, count - 1 - begun_anew[step]) for step, count in zip(STEPS, times, strict=True))
        recovered += begun_anew.total()
    return Result(name, len(runs), lost, doubled, recovered)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)

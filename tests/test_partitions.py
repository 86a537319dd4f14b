"""A worker that cannot reach Redis stops what it does before others begin it, and takes work again when it can."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, assert_events_agree, effects, ended, eventually, happened

import ferrum
from ferrum.results import RunStatus
from ferrum.testing.proxy import Proxy

QUICK = {"FERRUM_LEASE": "2", "FERRUM_HEARTBEAT": "0.3", "FERRUM_SWEEP": "0.2", "FERRUM_RESEND_AFTER": "1"}


@pytest.fixture
def cable(redis_url: str) -> Iterator[Proxy]:
    with Proxy(redis_url) as cable:
        yield cable


def cut(cable: Proxy) -> None:
    """Packets are dropped from here on, and nobody is told."""
    cable.dead = True
    cable.go_silent()


def heal(cable: Proxy) -> None:
    """Who connects comes through again; what was connected before stays silent, as behind a firewall."""
    cable.dead = False


@pytest.fixture
def fleet(clean_redis: str, tmp_path: Path, cable: Proxy) -> Iterator[Fleet]:
    # With `cable`, which is there until the last worker has stopped.
    fleet = Fleet(clean_redis, tmp_path, {"FERRUM_MCP_SERVERS": effects(tmp_path / "tools.log"), **QUICK})
    try:
        yield fleet
    finally:
        fleet.stop()


#: So many effects of one step take longer than a lease.
EFFECTS = 70


def working(log: Path) -> dict[str, Any]:
    return {"type": "task", "task": "user.effects", "input": {"log": str(log), "every_s": 0.05, "count": EFFECTS}}


def lines_of(log: Path) -> list[tuple[int, float]]:
    """Process and time of each effect."""
    if not log.exists():
        return []
    return [(int(line.split()[1]), float(line.split()[2])) for line in log.read_text().splitlines()]


def test_no_effect_comes_after_the_lease_was_given_away(
    fleet: Fleet, redis_url: str, cable: Proxy, tmp_path: Path
) -> None:
    second = fleet.start()
    second.send_signal(signal.SIGSTOP)
    first = fleet.start(FERRUM_REDIS_URL=cable.url)
    log = tmp_path / "effects"
    steps = {
        "a": working(log),
        # On the event loop: its effect would come when the lease is over.
        "b": {"type": "tool", "tool": "effects.append", "input": {"text": "b", "delay_s": 3}},
    }
    run_id = ferrum.submit({"name": "x", "steps": steps})
    eventually(lambda: len(lines_of(log)) >= 3 and happened(run_id, "act.decided"))
    cut(cable)
    second.send_signal(signal.SIGCONT)
    assert ended(run_id).status is RunStatus.COMPLETED
    given_away = next(at for pid, at in lines_of(log) if pid == second.pid)
    assert max(at for pid, at in lines_of(log) if pid == first.pid) < given_away
    # Cut off, it did not go on to its effect; the second attempt did.
    assert (tmp_path / "tools.log").read_text().splitlines() == [f"{run_id}.b\tb"]
    assert len(happened(run_id, "step.completed")) == 2
    second.kill()
    heal(cable)
    # It takes work again.
    echo = {"type": "task", "task": "user.echo", "input": {"value": 1}}
    assert ended(ferrum.submit({"name": "x", "steps": {"a": echo}})).status is RunStatus.COMPLETED
    assert first.poll() is None
    assert_events_agree(redis_url, run_id)


def test_what_was_cut_off_goes_on_as_soon_as_redis_is_back(
    fleet: Fleet, redis_url: str, cable: Proxy, tmp_path: Path
) -> None:
    """With nobody else there to take it, and nothing to wait for."""
    worker = fleet.start(FERRUM_REDIS_URL=cable.url)
    log = tmp_path / "effects"
    run_id = ferrum.submit({"name": "x", "steps": {"a": working(log)}})
    eventually(lambda: lines_of(log))
    cut(cable)
    eventually(lambda: "could not be renewed in time" in fleet.log(0).read_text())
    stopped = len(lines_of(log))
    heal(cable)
    assert ended(run_id).status is RunStatus.COMPLETED
    assert len(lines_of(log)) == stopped + EFFECTS
    assert worker.poll() is None
    assert_events_agree(redis_url, run_id)


def test_a_setting_names_the_steps_that_finish_all_the_same(
    fleet: Fleet, redis_url: str, cable: Proxy, tmp_path: Path
) -> None:
    fleet.start(FERRUM_REDIS_URL=cable.url, FERRUM_FINISH_UNLEASED="task")
    log = tmp_path / "effects"
    run_id = ferrum.submit({"name": "x", "steps": {"a": working(log)}})
    eventually(lambda: lines_of(log))
    cut(cable)
    eventually(lambda: len(lines_of(log)) == EFFECTS)
    heal(cable)
    assert ended(run_id).status is RunStatus.COMPLETED
    # Nobody else was there to find the lease that had run out, so its result counts.
    assert len(lines_of(log)) == EFFECTS
    assert_events_agree(redis_url, run_id)

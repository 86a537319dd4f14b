"""What people do to runs of the whole language, on the command line: signals, registered workflows, runs again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fleet import Fleet, ended

import ferrum
from ferrum import cli
from ferrum.results import RunStatus

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ran(worker: Fleet, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process, with a worker at hand: its exit status, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = cli.status_of([str(one) for one in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def echo(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "task", "task": "user.echo", "input": {"value": value}, **more}


def test_a_signal_reaches_the_step_that_waits_for_it(ran: Run, tmp_path: Path) -> None:
    run_id = ferrum.submit(
        {"name": "wait", "steps": {"a": {"type": "wait", "signal": "paid"}}, "outputs": {"r": "{{ a.sum }}"}}
    )
    (tmp_path / "sum.json").write_text('{"sum": 7}')
    status, out, _ = ran("signal", run_id, "paid", "--data", f"@{tmp_path / 'sum.json'}", "--by", "kim")
    assert (status, out) == (0, f"{run_id} has the signal 'paid'\n")
    assert ended(run_id).outputs == {"r": 7}
    status, _, err = ran("signal", run_id, "paid")
    assert status == 2
    assert "has ended" in err


def test_the_data_of_a_signal_has_to_be_json(ran: Run) -> None:
    status, _, err = ran("signal", "run_01M7YXGKZ6SD19CQNQF35H5X47", "paid", "--data", "seven euros")
    assert status == 2
    assert '--data has to be JSON, such as 7, "seven euros" or @file.json' in err


def test_a_registered_workflow_can_be_a_step_by_its_name(ran: Run, tmp_path: Path) -> None:
    file = tmp_path / "double.yaml"
    inner = {
        "name": "double",
        "version": "1",
        "inputs": {"n": {"type": "integer"}},
        "steps": {"a": echo("{{ input.n * 2 }}")},
        "outputs": {"n": "{{ a }}"},
    }
    file.write_text(yaml.safe_dump(inner))
    assert ran("workflows", "register", file)[:2] == (0, "double 1 is registered\n")
    assert ran("workflows", "register", file)[0] == 0
    assert "double" in ran("workflows", "list")[1]
    assert {"name": "double", "version": "1", "newest": True} in json.loads(ran("workflows", "list", "--json")[1])
    step = {"type": "workflow", "name": "double", "input": {"n": 4}}
    outer = ferrum.submit({"name": "outer", "steps": {"a": step}, "outputs": {"n": "{{ a.n }}"}}, priority=9)
    assert ended(outer).outputs == {"n": 8}
    inside = next(event for event in ferrum.watch(outer) if event.type == "step.waiting").message.split()[-1]
    assert f"part of a of {outer}" in ran("runs", "show", inside)[1]
    file.write_text(yaml.safe_dump({**inner, "outputs": {}}))
    status, _, err = ran("workflows", "register", file)
    assert status == 2
    assert "version '1' of workflow 'double' is registered and says something else" in err


def test_a_run_goes_on_is_run_again_and_is_forked(ran: Run, tmp_path: Path) -> None:
    flaky = {"type": "task", "task": "user.fail_until", "input": {"path": str(tmp_path / "tries"), "times": 1}}
    failed = ferrum.submit(
        {
            "name": "again",
            "inputs": {"n": {"type": "integer"}},
            "steps": {"a": echo(1), "b": {**flaky, "needs": ["a"]}, "c": echo("{{ a + b + input.n }}")},
            "outputs": {"r": "{{ c }}"},
        },
        {"n": 10},
        priority=8,
        tenant="kim",
    )
    assert ended(failed).status is RunStatus.FAILED
    resumed = json.loads(ran("runs", "resume", failed, "--json")[1])["run_id"]
    assert ended(resumed).outputs == {"r": 13}
    created = next(event for event in ferrum.watch(resumed) if event.type == "run.created")
    assert (created.priority, created.tenant) == (8, "kim")
    assert f"resume of {failed}" in ran("runs", "show", resumed)[1]
    assert "has completed: nothing is left to do" in ran("runs", "resume", resumed)[2]
    again = json.loads(ran("runs", "rerun", resumed, "--from", "c", "--json")[1])["run_id"]
    assert ended(again).outputs == {"r": 13}
    forked = json.loads(ran("runs", "fork", resumed, "--input", "n=100", "--json")[1])["run_id"]
    assert ended(forked).outputs == {"r": 103}
    assert [event.step for event in ferrum.watch(forked) if event.type == "step.kept"] == ["a", "b"]
    status, _, err = ran("runs", "rerun", resumed, "--from", "bb")
    assert status == 2
    assert "has no step 'bb'" in err
    assert "there is no input 'm'" in ran("runs", "fork", resumed, "--input", "m=1")[2]


def test_the_cache_says_how_often_it_was_hit(ran: Run) -> None:
    cached = {"name": "cached", "steps": {"a": echo(1, cache={"key": "k", "ttl": "1m"})}}
    before = json.loads(ran("cache", "--json")[1])
    for _ in range(2):
        assert ended(ferrum.submit(cached)).status is RunStatus.COMPLETED
    stats = json.loads(ran("cache", "--json")[1])
    assert (stats["hits"] - before["hits"], stats["misses"] - before["misses"]) == (1, 1)
    assert f"{stats['hits']} times there, {stats['misses']} times computed" in ran("cache")[1]


def test_a_priority_out_of_range_is_refused(ran: Run, tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(yaml.safe_dump({"name": "w", "steps": {"a": echo(1)}}))
    status, _, err = ran("run", file, "--priority", "10", "--detach")
    assert status == 2
    assert "10 is not in the range 0<=x<=9" in err

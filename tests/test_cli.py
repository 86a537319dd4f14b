"""`ferrum …`, as people and scripts use it: what it prints, its exit status, what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import processes
import pytest
import yaml
from by_hand import ByHand
from fleet import PATIENCE_S, Fleet, ended, eventually, status_of
from preloading import into

import ferrum
from ferrum import cli, runs
from ferrum.cli.inputs import read_inputs
from ferrum.errors import InputError
from ferrum.local.redis import PrivateRedis
from ferrum.plan import Plan
from ferrum.results import RunStatus, Usage
from ferrum.testing.environment import environment
from ferrum.workflow import Workflow

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: its exit status, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = cli.status_of([str(one) for one in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def workflow(tmp_path: Path, steps: dict[str, Any], **more: Any) -> Path:
    file = tmp_path / "workflow.yaml"
    file.write_text(yaml.safe_dump({"name": "x", "steps": steps, **more}, sort_keys=False))
    return file


def echo(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "task", "task": "user.echo", "input": {"value": value}, **more}


GATE = {"type": "approval", "message": "Go on?"}
BOOM = {"type": "task", "task": "user.boom"}


# Without a worker.


def test_the_help_and_a_plan_load_nothing_heavy() -> None:
    code = f"""
import sys, ferrum.cli
heavy = {{"celery", "kombu", "litellm", "mcp", "aiohttp", "obstore"}}
assert not {{"redis", "pydantic"}} & set(sys.modules)
assert ferrum.cli.status_of(["--help"]) == 0
assert ferrum.cli.status_of(["plan", {str(EXAMPLES / "repo_summary.yaml")!r}]) == 0
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_example_of_a_workflow_can_be_planned(ran: Run) -> None:
    for file in _workflows():
        status, out, _ = ran("plan", file)
        assert (status, out.partition(" ")[0]) == (0, Workflow.load(file).name)


def test_no_expression_makes_a_line_of_a_plan_that_looks_like_a_step(ran: Run, tmp_path: Path) -> None:
    forged = "\n  pay  tool\n"
    steps = {
        "a": {"type": "approval", "message": "?", "when": f"1 ==\n{forged[:-1]} || 2 == 2".replace("pay  tool", "2")},
        "b": {"for_each": "{{ [1,\n\n  2] }}", "steps": {"c": GATE}},
        "d": {**GATE, "repeat": {"until": "round ==\n  2", "max": 3}},
        "e": {"type": "switch", "value": f"x{forged}", "cases": {f"x{forged}": GATE}},
        "f": {**GATE, "concurrency": {"key": f"k{forged}", "limit": 2}},
    }
    status, out, _ = ran("plan", workflow(tmp_path, steps))
    assert status == 0
    listed = out.partition("\ncanvas\n")[0].split("\n")[1:]
    assert [line.split()[0] for line in listed if line[2] != " "] == [*steps]
    assert all(line.split()[1] in {"approval", "for_each", "repeat", "switch"} for line in listed)


def test_where_no_workflow_is_registered_it_says_so(clean_redis: str, ran: Run) -> None:
    assert ran("workflows", "list") == (
        0,
        "",
        "no workflow is registered: do it with 'ferrum workflows register FILE'\n",
    )
    assert ran("workflows", "list", "--json")[:2] == (0, "[]\n")


def test_the_reason_of_a_run_makes_no_line_that_looks_like_one_of_ours(clean_redis: str, ran: Run) -> None:
    run = ByHand(runs.record(), {"a": []})
    ferrum.cancel(run.run_id, reason="no\n  pay  completed  try 1\x1b[2J")
    _, out, _ = ran("runs", "show", run.run_id)
    first, *lines = out.split("\n")
    assert first == f"{run.run_id}  by-hand 0  cancelled"
    assert lines[:2] == ["  | no", "  |   pay  completed  try 1\\x1b[2J"]


def test_every_example_of_a_workflow_can_be_planned_as_json(ran: Run) -> None:
    for file in _workflows():
        status, out, error = ran("plan", file, "--json")
        assert (status, error) == (0, "")
        said, planned = json.loads(out), Plan(Workflow.load(file))
        assert {step["id"] for step in said["steps"]} == planned.steps.keys()
        segments = {(one["frame"], one["id"]) for one in said["segments"]}
        assert segments == {(body.frame, one.id) for body in planned.bodies.values() for one in body.segments}
        for step in said["steps"]:
            whens = planned.steps[step["id"]].when
            assert step["when"] == (whens and whens.source)
            assert step["segment"] is not None or planned.steps[step["id"]].undoes


def _workflows() -> list[Path]:
    files = [file for file in EXAMPLES.glob("*.yaml") if "steps" in (yaml.safe_load(file.read_text()) or {})]
    assert files
    return files


def test_every_option_of_plan_is_tried_on_the_examples() -> None:
    from ferrum.cli.workflows import plan

    assert {option for one in plan.params for option in one.opts if option.startswith("-")} == {"--json"}


def test_every_other_example_is_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from ferrum.governance.policy import Policy
    from ferrum.mcp.specs import load_servers
    from ferrum.models.prices import PriceFile
    from ferrum.settings import Settings
    from ferrum.testing.script import Script

    readers: dict[str, Callable[[Path], object]] = {
        "policy": Policy.load,
        "servers": lambda path: load_servers(Settings.model_validate({"servers": path}), {}),
        "prices": PriceFile.load,
        "script": Script.load,
    }
    for file in EXAMPLES.glob("*.yaml"):
        kind = re.split(r"[._]", file.stem)[-1]
        if kind in readers:
            assert readers[kind](file)


def test_a_plan_as_json_says_which_edges_are_canvas_and_which_are_joins(ran: Run, tmp_path: Path) -> None:
    steps = {"a": echo(1), "b": echo("{{ a }}"), "c": echo("{{ b }}", needs=["a"])}
    status, out, _ = ran("plan", workflow(tmp_path, steps), "--json")
    plan = json.loads(out)
    assert status == 0
    assert [(step["id"], step["needs"]) for step in plan["steps"]] == [("a", []), ("b", ["a"]), ("c", ["a", "b"])]
    assert plan["segments"] == [
        {"frame": "", "id": "s0", "canvas": "chain(a, b, c)", "heads": ["a"], "steps": ["a", "b", "c"]},
    ]
    assert plan["edges"] == {"canvas": [["a", "b"], ["b", "c"]], "record": [["a", "c"]]}


def test_the_schema_is_one_and_takes_the_examples(ran: Run) -> None:
    status, out, _ = ran("schema")
    assert status == 0
    jsonschema.validate(yaml.safe_load((EXAMPLES / "repo_summary.yaml").read_text()), json.loads(out))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan"], "Missing argument 'FILE'"),
        (["plam"], "No such command 'plam'"),
        (["plan", "nowhere.yaml"], "nowhere.yaml: the file cannot be read"),
        (["run", "{file}", "--input", "n"], "write name=value"),
        (["run", "{file}", "--input", "n=two"], "input 'n' has to be of type integer, written as JSON; got 'two'"),
        (["run", "{file}"], "input 'n' is missing"),
        (["run", "{file}", "--input", "m=1"], "there is no input 'm' (there is: n)"),
        (["run", "{file}", "--nonsense"], "No such option"),
        (["artifacts", "get", "sha256:1"], "'sha256:1' is not an artifact"),
    ],
)
def test_a_mistake_is_said_on_stderr_with_status_2(ran: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    file = workflow(tmp_path, {"a": echo("{{ input.n }}")}, inputs={"n": {"type": "integer"}})
    status, out, err = ran(*(str(file) if one == "{file}" else one for one in arguments))
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_inputs_are_read_by_the_types_that_the_workflow_declares(tmp_path: Path) -> None:
    kinds = ("string", "integer", "number", "boolean", "array", "object")
    declared = Workflow.of({"name": "x", "inputs": {kind: {"type": kind} for kind in kinds}, "steps": {"a": GATE}})
    texts = ["string=12", "integer=12", "number=1.5", "boolean=true", "array=[1]", 'object={"a": "b=c"}']
    assert read_inputs(declared, texts) == {
        "string": "12",
        "integer": 12,
        "number": 1.5,
        "boolean": True,
        "array": [1],
        "object": {"a": "b=c"},
    }
    (tmp_path / "more.json").write_text('{"integer": 1, "string": "from a file"}')
    both = read_inputs(declared, [f"@{tmp_path / 'more.json'}", "string=a=b"])
    assert both == {"integer": 1, "string": "a=b"}


def test_an_input_may_be_what_is_in_a_file(tmp_path: Path) -> None:
    declared = Workflow.of({
        "name": "x", "inputs": {"csv": {"type": "string"}, "rows": {"type": "array"}}, "steps": {"a": GATE}
    })  # fmt: skip
    (tmp_path / "in").write_text("[1, 2]\n")
    texts = [f"csv=@{tmp_path / 'in'}", f"rows=@{tmp_path / 'in'}"]
    assert read_inputs(declared, texts) == {"csv": "[1, 2]\n", "rows": [1, 2]}
    assert read_inputs(declared, ["csv=@@ada"]) == {"csv": "@ada"}
    with pytest.raises(InputError, match=r"@ada: the file cannot be read: .*; a text .* is written 'csv=@@ada'"):
        read_inputs(declared, ["csv=@ada"])


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), ("{", "not JSON"), ("[1]", "a JSON object")])
def test_a_file_of_inputs_that_is_none_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "in.json"
    if content is not None:
        file.write_text(content)
    declared = Workflow.of({"name": "x", "steps": {"a": GATE}})
    with pytest.raises(InputError, match=f"--input @.*in.json: .*{said}"):
        read_inputs(declared, [f"@{file}"])


# On a worker that is there.


def test_a_run_is_followed_to_its_end_and_says_where_the_time_went(worker: Fleet, ran: Run, tmp_path: Path) -> None:
    steps = {"a": echo("{{ input.n + 1 }}"), "longer": echo("{{ a }}")}
    file = workflow(tmp_path, steps, inputs={"n": {"type": "integer"}}, outputs={"n": "{{ longer }}"})
    status, out, _ = ran("run", file, "--input", "n=1")
    assert status == 0
    lines = [re.sub(r"\d\d:\d\d:\d\d", "00:00:00", line) for line in out.splitlines()]
    assert lines[0].startswith("00:00:00  ● run     x 0")
    assert "00:00:00  → a       try 1" in lines
    assert any(re.fullmatch(r"00:00:00  ← longer  try 1  [\d.]+ m?s", line) for line in lines)
    assert "00:00:00  ■ run     completed" in lines
    assert "  n: 2" in lines
    assert "cost      $0.0000" in lines
    assert "\x1b" not in out


def test_the_exit_status_tells_a_failed_run_from_a_completed_one(worker: Fleet, ran: Run, tmp_path: Path) -> None:
    status, out, err = ran("run", workflow(tmp_path, {"a": BOOM, "b": echo(1, needs=["a"])}))
    assert (status, err) == (1, "")
    assert "! a    try 1  user.boom raised ValueError: no" in out
    assert "⊘ b    skipped, 'a' failed" in out


def test_a_run_as_json_is_one_document(worker: Fleet, ran: Run, tmp_path: Path) -> None:
    status, out, _ = ran("run", workflow(tmp_path, {"a": echo([1])}, outputs={"r": "{{ a }}"}), "--json")
    view = json.loads(out)
    assert (status, view["status"], view["outputs"]) == (0, "completed", {"r": [1]})
    assert ran("runs", "show", view["run_id"], "--json")[1] == out
    _, out, _ = ran("runs", "show", view["run_id"])
    assert "  a  completed  try 1" in out
    status, out, _ = ran("runs", "watch", view["run_id"], "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert (status, events[0]["type"], events[-1]["type"]) == (0, "run.created", "run.ended")
    listed = json.loads(ran("runs", "list", "--json")[1])
    assert [one["workflow"] for one in listed if one["run_id"] == view["run_id"]] == ["x 0"]
    assert view["run_id"] in ran("runs", "list")[1]


def test_the_same_key_is_the_same_run(worker: Fleet, ran: Run, tmp_path: Path) -> None:
    file = workflow(tmp_path, {"a": echo(1)})
    first, second = (json.loads(ran("run", file, "--key", "k1", "--json", "--detach")[1])["run_id"] for _ in range(2))
    assert first == second


@pytest.fixture
def parked(worker: Fleet, ran: Run, tmp_path: Path) -> str:
    """A run that waits for a person at `gate`."""
    _, out, err = ran("run", workflow(tmp_path, {"gate": GATE}), "--detach")
    run_id = out.strip()
    assert f"ferrum runs watch {run_id}" in err
    eventually(lambda: status_of(run_id) is RunStatus.WAITING_APPROVAL)
    return run_id


def test_what_waits_for_a_person_is_listed_and_approved_once(ran: Run, parked: str) -> None:
    _, out, _ = ran("approvals", "list")
    assert f"{parked} gate" in out
    assert "Go on?" in out
    assert f"ferrum approvals approve {parked} gate" in out
    status, out, _ = ran("approvals", "approve", parked, "--note", "fine", "--by", "kim", "--json")
    answer = {"run_id": parked, "step_id": "gate", "approved": True, "by": "kim", "note": "fine"}
    assert (status, json.loads(out)) == (0, answer)
    status, out, _ = ran("runs", "watch", parked)
    assert status == 0
    assert "✓ gate  approved by kim: fine" in out
    status, _, err = ran("approvals", "reject", parked, "gate")
    assert status == 2
    assert "Traceback" not in err


def test_who_rejects_is_by_default_the_user_of_this_machine(
    ran: Run, parked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "someone")
    assert ran("approvals", "reject", parked)[1] == f"gate of {parked} is rejected by someone\n"
    status, out, _ = ran("runs", "watch", parked)
    assert status == 1
    assert "! gate  try 1  rejected by someone" in out


def test_a_cancelled_run_is_over_and_cannot_be_cancelled_again(ran: Run, parked: str) -> None:
    assert ran("runs", "resume", parked)[0] == 0
    assert ran("runs", "cancel", parked, "--reason", "too late")[0] == 0
    assert ran("runs", "watch", parked)[0] == 1
    status, _, err = ran("runs", "cancel", parked)
    assert (status, err) == (2, f"ferrum: run {parked!r} has ended: it is cancelled, and that does not change\n")


def test_a_run_that_is_not_there_is_a_mistake(worker: Fleet, ran: Run) -> None:
    for command in ("show", "watch", "cancel", "resume"):
        assert ran("runs", command, "run_01JD3Y00000000000000000000")[0] == 2


# In an empty home.


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home with nothing in it; at the end nothing runs that was told of it."""
    home = tmp_path / "home"
    yield home
    eventually(lambda: not processes.of(tmp_path))


def alone(home: Path, **more: str) -> dict[str, str]:
    """An environment with no Redis and no worker but what `home` gets, which goes when nothing is left to do."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FERRUM_", "REDIS_URL"))}
    return {**kept, "FERRUM_HOME": str(home), "FERRUM_EXIT_WHEN_IDLE": "1", **more}


def called(home: Path, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ferrum", *map(str, arguments)]
    return subprocess.run(
        command,
        env=into(alone(home, **more)),
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_where_there_is_nothing_a_run_brings_its_own_and_takes_it_away_again(home: Path, tmp_path: Path) -> None:
    save = {"type": "artifact", "name": "note.md", "content": "{{ input.text }}"}
    inputs = {"text": {"type": "string"}}
    file = workflow(tmp_path, {"save": save}, inputs=inputs, outputs={"kept": "{{ save }}"})
    # It would wait long for more to do, but it is stopped.
    done = called(home, "run", file, "--input", "text=Grüße", "--json", FERRUM_EXIT_WHEN_IDLE="600")
    assert (done.returncode, done.stderr) == (0, "")
    assert processes.of(tmp_path) == []
    kept = json.loads(done.stdout)["outputs"]["kept"]
    assert (kept["name"], kept["size"], kept["media_type"]) == ("note.md", 7, "text/markdown")
    assert called(home, "artifacts", "get", kept["artifact"]).stdout == "Grüße"
    stored = home / "artifacts" / "sha256" / kept["artifact"][7:9] / kept["artifact"][9:]
    stored.write_text("tampered")
    damaged = called(home, "artifacts", "get", kept["artifact"], "-o", tmp_path / "got")
    assert (damaged.returncode, damaged.stdout) == (2, "")
    assert "is damaged" in damaged.stderr
    assert not (tmp_path / "got").exists()


@contextmanager
def waiting(home: Path, file: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`ferrum run` of a file, once it waits for a person at `gate`; and the id of the run."""
    with subprocess.Popen(
        [sys.executable, "-m", "ferrum", "run", str(file)],
        env=into(alone(home)),
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            assert run.stdout is not None
            found = None
            while found is None and (line := run.stdout.readline()):
                found = re.search(r"ferrum approvals approve (run_\w+) gate", line)
            assert found is not None
            yield run, found[1]
        finally:
            if run.poll() is None:
                run.kill()


def test_after_ctrl_c_the_run_goes_on(home: Path, tmp_path: Path) -> None:
    with waiting(home, workflow(tmp_path, {"gate": GATE})) as (run, run_id):
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 130
    assert f"{run_id} goes on; watch it with: ferrum runs watch {run_id}" in err
    assert "Traceback" not in err
    watch = [sys.executable, "-m", "ferrum", "runs", "watch", run_id]
    with subprocess.Popen(watch, env=into(alone(home)), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as again:
        assert again.stdout is not None
        assert run_id in again.stdout.readline()
        assert called(home, "approvals", "approve", run_id, "--by", "kim").returncode == 0
        assert "approved by kim" in again.stdout.read()
        assert again.wait(PATIENCE_S) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child to its parent")
def test_who_follows_a_run_brings_back_the_redis_and_the_worker_that_died_under_it(home: Path, tmp_path: Path) -> None:
    with waiting(home, workflow(tmp_path, {"gate": GATE})) as (run, run_id):
        # Redis writes to disk once a second.
        log = home / "redis"
        eventually(lambda: any(run_id.encode() in file.read_bytes() for file in log.rglob("*.aof")))
        (supervisor,) = [one for one in processes.of(tmp_path) if "ferrum.local.supervisor" in one]
        os.kill(int(supervisor.split()[0]), signal.SIGKILL)
        eventually(lambda: not any("ferrum.local.supervisor" in one for one in processes.of(tmp_path)))
        eventually(lambda: any("start_worker" in one for one in processes.of(tmp_path)))
        eventually(lambda: called(home, "approvals", "approve", run_id).returncode == 0)
        out, err = run.communicate(timeout=PATIENCE_S)
    assert (run.returncode, err) == (0, "")
    assert "■ run   completed" in out


def test_without_a_redis_what_needs_one_says_how_to_get_one(home: Path) -> None:
    done = called(home, "runs", "list")
    assert (done.returncode, done.stdout) == (2, "")
    assert "ferrum redis" in done.stderr
    assert "Traceback" not in done.stderr
    done = called(home, "run", EXAMPLES / "repo_summary.yaml", FERRUM_REDIS_URL="redis://127.0.0.1:1/0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no Redis answers at redis://127.0.0.1:1/0" in done.stderr


def test_the_redis_that_ferrum_brings_is_found_by_its_home_and_stops_at_ctrl_c(home: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ferrum", "redis", "--json"],
        env=into(alone(home)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        said = ""
        while not said.endswith("}\n"):
            said += server.stdout.readline()
        url_file = Path(json.loads(said)["url_file"])
        url = called(home, "redis", "--url").stdout.strip()
        assert json.loads(url_file.read_text())["url"] == url
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE_S) == 0
    assert not url_file.exists()


def test_the_scripted_model_server_answers_by_its_script(home: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ferrum", "stub-llm", "--script", str(EXAMPLES / "stub_script.yaml")],
        env=into(alone(home)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+/v1", server.stdout.readline())
        assert found is not None
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]}).encode()
        request = urllib.request.Request(f"{found[0]}/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"] == "You said: hello"
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE_S) == 0


def test_a_policy_that_asks_shows_exactly_what_would_be_done(home: Path, tmp_path: Path) -> None:
    (tmp_path / "ask.yaml").write_text('ask: ["tool:effects.*"]\n')
    servers = {"mcpServers": {"effects": {"module": "ferrum.testing.effects_server", "args": ["--log", "log"]}}}
    more = {"FERRUM_POLICY": str(tmp_path / "ask.yaml"), "FERRUM_MCP_SERVERS": json.dumps(servers)}
    step = {"type": "tool", "tool": "effects.append", "input": {"text": "a\u202eb"}}
    run_id = called(home, "run", workflow(tmp_path, {"a": step}), "--detach", **more).stdout.strip()
    listed = eventually(lambda: called(home, "approvals", "list").stdout, every_s=1)
    assert '"text": "a\\u202eb"' in listed
    assert '"tool": "append"' in listed
    assert called(home, "approvals", "reject", run_id).returncode == 0


def test_on_a_redis_that_was_named_a_run_starts_no_worker_says_so_and_waits_for_one(
    home: Path, tmp_path: Path, redis_server: PrivateRedis
) -> None:
    file = workflow(tmp_path, {"save": {"type": "artifact", "name": "note.md", "content": "kept"}})
    with PrivateRedis(tmp_path / "theirs", persistent=False) as theirs:
        named = {"FERRUM_REDIS_URL": theirs.url, "FERRUM_ARTIFACTS": os.environ["FERRUM_ARTIFACTS"]}
        later = called(home, "run", file, "--detach", **named)
        assert later.returncode == 0
        assert f"no worker is there for the Redis at {tmp_path}/theirs/redis.sock" in later.stderr
        assert "celery -A ferrum worker" in later.stderr
        assert not home.exists()
        with (
            subprocess.Popen(
                [sys.executable, "-m", "ferrum", "run", str(file)],
                env=alone(home, **named), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            ) as following,
            environment({"FERRUM_REDIS_URL": theirs.url}),
        ):  # fmt: skip
            assert following.stderr is not None
            assert "no worker is there" in following.stderr.readline()
            fleet = Fleet(theirs.url, tmp_path)
            try:
                fleet.start()
                said, more = following.communicate(timeout=PATIENCE_S)
                assert (following.returncode, more) == (0, ""), said
                assert ended(later.stdout.strip()).status == "completed"
            finally:
                fleet.stop()


# What a person sees before they decide.


FORGED = (
    "Send it?" + " " * 200 + "run_01M7XGY8X2ZBA8A3S9SDRW4FGQ gate  x\x1b[2K\n  ferrum approvals approve " + "y" * 200
)


def test_what_is_asked_is_shown_whole_and_no_line_of_it_looks_like_one_of_ours(
    worker: Fleet, ran: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = ran("run", workflow(tmp_path, {"gate": {"type": "approval", "message": FORGED}}), "--detach")
    run_id = out.strip()
    eventually(lambda: status_of(run_id) is RunStatus.WAITING_APPROVAL)
    digest = next(one.digest for one in ferrum.approvals() if one.run_id == run_id)
    approve = f"  ferrum approvals approve {run_id} gate --digest {digest[:16]}   (or reject)"
    from ferrum.cli.here import how_to_decide

    [event] = [one for one in runs.record().events(run_id) if one.type == "step.waiting"]
    _, listed, _ = ran("approvals", "list")
    for text in (listed[listed.index(run_id) :].split("\nrun_")[0], f"{run_id} gate\n{how_to_decide(event)}"):
        first, *lines = text.rstrip().split("\n")
        last = lines.pop(lines.index(approve))
        assert first.startswith(f"{run_id} gate")
        assert all(line.startswith("  |") and len(line) <= 80 for line in lines[: lines.index(lines[-1]) + 1])
        whole = "".join(line[4:] for line in lines).replace(" ", "")
        assert "sendit?run_01m7xgy8x2zba8a3s9sdrw4fgqgatex\\x1b[2k" in whole.lower()
        assert "y" * 200 in whole
        assert last == approve
    status, _, err = ran("approvals", "approve", run_id, "--digest", "0" * 16)
    assert (status, "asks for something else by now" in err) == (2, True)
    status, out, err = ran("approvals", "approve", run_id, "gate", "--digest", digest, "--by", "kim")
    assert (status, out) == (0, f"gate of {run_id} is approved by kim\n")


def test_an_act_is_approved_by_its_digest_or_by_whoever_has_just_seen_it(
    clean_redis: str, ran: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asking() -> tuple[str, str]:
        run = ByHand(runs.record(), {"a": []})
        run.begin("a")
        act = {"tool": "git.push", "arguments": {"to": "x"}}
        data = {"attempt": 1, "message": "tool git.push: ask[0]", "act": act}
        signature = json.dumps(run.plan.signature(run.run_id, "a"))
        runs.record().park(run.held["a"], "ask", signature, data, wake_in_s=None, usage=Usage())
        [asked] = ferrum.approvals(run.run_id)
        return run.run_id, asked.digest

    run_id, digest = asking()
    status, _, err = ran("approvals", "approve", run_id)
    assert status == 2
    assert '  |   "tool": "git.push"' in err
    assert f"add --digest {digest[:16]} to approve this, or --yes to approve whatever waits" in err
    assert ran("approvals", "approve", run_id, "--yes")[0] == 0
    assert ran("approvals", "approve", run_id)[0] == 2
    run_id, _ = asking()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, approved in (("n", False), ("y", True)):
        monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: answer)  # noqa: B023
        assert (ran("approvals", "approve", run_id)[0] == 0) is approved
    run_id, digest = asking()
    assert ran("approvals", "reject", run_id, "--by", "kim")[0] == 0

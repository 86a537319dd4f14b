"""`type: sandbox` on a real worker: what a workflow gives code, and what it gets back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fleet import Fleet, assert_events_agree, ended, eventually, happened, status_of
from sandboxes import needs_sandbox

import ferrum
from ferrum.artifacts import Ref, process_artifacts
from ferrum.events import StepOutput
from ferrum.results import RunStatus, StepStatus
from ferrum.runs import record
from ferrum.testing import run_inline
from ferrum.workflow import Workflow

pytestmark = needs_sandbox

POLICY = """
allow: ["sandbox:python-basic"]
ask: ["sandbox:asked"]
"""


@pytest.fixture(scope="module")
def fleet(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    home = tmp_path_factory.mktemp("sandbox")
    policy = home / "sandbox.policy.yaml"
    policy.write_text(POLICY)
    environ = {"FERRUM_POLICY": str(policy), "OPENAI_API_KEY": "sk-nobody-may-see-this"}
    fleet = Fleet(redis_url, home, environ)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


def code(code: str, **more: Any) -> dict[str, Any]:
    return {"type": "sandbox", "code": code, **more}


def run(**steps: Any) -> tuple[str, dict[str, Any]]:
    """The run's id, and the outputs of its steps."""
    outputs = {name: f"{{{{ {name} }}}}" for name in steps}
    workflow = Workflow.of({"name": "sandboxed", "steps": steps, "outputs": outputs})
    run_id = ferrum.submit(workflow)
    view = ended(run_id)
    assert view.status is RunStatus.COMPLETED, view
    return run_id, dict(view.outputs or {})  # type: ignore[call-overload]


def test_code_gets_files_and_gives_back_what_it_said_wrote_and_found(fleet: Fleet, redis_url: str) -> None:
    program = """
import json, os, pathlib, sys
table = json.load(open("in/table.json"))
pathlib.Path("out").mkdir()
pathlib.Path("out/sum.csv").write_text(str(sum(table)))
pathlib.Path("out/other.bin").write_bytes(bytes([0, 255]))
json.dump({"note": open("note.txt").read(), "lang": os.environ["GREETING"]}, open("output.json", "w"))
print("done"); print("careful", file=sys.stderr)
"""
    first = code(
        program, files={"in/table.json": [1, 2, 3], "note.txt": "grüße"}, outputs=["out/**"], env={"GREETING": "hello"}
    )
    again = {
        "type": "sandbox",
        "command": ["cat", "sum", "bin"],
        "files": {"sum": "{{ first.files['out/sum.csv'] }}", "bin": "{{ first.files['out/other.bin'].artifact }}"},
    }
    run_id, said = run(first=first, again=again)
    result = said["first"]
    assert (result["reason"], result["exit_code"], result["signal"], result["cut"]) == ("ok", 0, None, [])
    assert (result["stdout"], result["stderr"]) == ("done\n", "careful\n")
    assert result["output"] == {"note": "grüße", "lang": "hello"}
    assert sorted(result["files"]) == ["out/other.bin", "out/sum.csv"]
    kept = result["files"]["out/sum.csv"]
    assert (kept["media_type"], kept["size"]) == ("text/csv", 1)
    assert process_artifacts().get(Ref(digest=kept["artifact"], size=1, media_type="")) == b"6"
    assert result["wall_seconds"] > 0
    assert result["peak_memory"] > 0
    assert (result["backend"], result["memory_by"]) in [
        (backend, by) for backend in ("bubblewrap", "gvisor", "container") for by in ("cgroup", "watchdog")
    ]
    # An artifact by its reference is its bytes; a text that is a digest is a text.
    assert said["again"]["stdout"].startswith("6sha256:")
    assert_events_agree(redis_url, run_id)


def test_what_code_says_is_seen_while_it_runs(fleet: Fleet, redis_url: str) -> None:
    program = 'import sys, time\nprint("first", flush=True)\nsys.stdin.read()\ntime.sleep(3600)'
    run_id = ferrum.submit(Workflow.of({"name": "slow", "steps": {"s": code(program, timeout="90s")}}))
    eventually(lambda: happened(run_id, "step.output", "s"))
    said = happened(run_id, "step.output", "s")
    assert [(event.stream, event.text) for event in said] == [("stdout", "first\n")]
    assert status_of(run_id) is RunStatus.RUNNING
    record().cancel(run_id, "ada")
    assert ended(run_id).status is RunStatus.CANCELLED
    assert_events_agree(redis_url, run_id)


@pytest.mark.parametrize(
    ("program", "more", "reason", "told"),
    [
        ("raise SystemExit(3)", {}, "error", {"exit_code": 3}),
        ("import os; os.abort()", {}, "error", {"signal": "SIGABRT"}),
        ("while True: pass", {"timeout": "500ms"}, "timeout", {}),
        ("import time; x = b'x' * 200_000_000; time.sleep(60)", {"memory": "64MiB"}, "memory", {}),
        ("open('f', 'wb').write(bytes(50_000_000))", {"disk": "8MB"}, "disk", {}),
    ],
)
def test_the_result_says_why_code_ended(
    fleet: Fleet, program: str, more: dict[str, Any], reason: str, told: dict[str, Any]
) -> None:
    _, said = run(s=code(program, **more))
    assert said["s"]["reason"] == reason, said
    assert said["s"]["detail"]
    assert {name: said["s"][name] for name in told} == told


def test_a_step_that_checks_its_code_fails_with_its_last_words(fleet: Fleet) -> None:
    step = code("raise ValueError('no such column')", check=True)
    run_id = ferrum.submit(Workflow.of({"name": "checked", "steps": {"s": step}}))
    assert ended(run_id).status is RunStatus.FAILED
    result = record().state(run_id).step("s")
    assert result.status is StepStatus.FAILED
    assert result.error == "the code did not end well; it exited with 1; ValueError: no such column"


def test_code_that_nothing_allows_does_not_run(fleet: Fleet) -> None:
    run_id = ferrum.submit(Workflow.of({"name": "denied", "steps": {"s": code("print(1)", runtime="other")}}))
    assert ended(run_id).status is RunStatus.POLICY_BLOCKED
    error = record().state(run_id).step("s").error
    assert str(error).startswith("nothing allows sandbox 'other': add 'sandbox:other' to allow in ")


def test_a_person_is_asked_about_the_very_code(fleet: Fleet) -> None:
    run_id = ferrum.submit(Workflow.of({"name": "asked", "steps": {"s": code("print(1)", runtime="asked")}}))
    eventually(lambda: status_of(run_id) is RunStatus.WAITING_APPROVAL)
    (asked,) = [one for one in ferrum.approvals() if one.run_id == run_id]
    assert json.loads(json.dumps(asked.act))["code"] == "print(1)"
    ferrum.decide(run_id, "s", approved=True, by="ada")
    # What is missing is said once it may run.
    assert ended(run_id).status is RunStatus.FAILED
    assert "there is no runtime 'asked'" in str(record().state(run_id).step("s").error)


def test_nothing_of_the_worker_is_in_the_environment_of_code(fleet: Fleet) -> None:
    program = """
import os, pathlib
seen = [p.read_bytes() for p in pathlib.Path("/proc").glob("[0-9]*/environ") if os.access(p, os.R_OK)]
print(dict(os.environ), seen)
"""
    _, said = run(s=code(program))
    assert "OPENAI" not in said["s"]["stdout"]
    assert "sk-nobody" not in said["s"]["stdout"]
    assert "FERRUM" not in said["s"]["stdout"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"code": "1", "command": "ls"}, "give either code or a command"),
        ({}, "give either code or a command"),
        ({"command": []}, "the command is empty"),
        ({"code": "1", "language": "ruby"}, "input should be 'python' or 'shell'"),
        ({"code": "1", "memory": "lots"}, 'a size is a number of bytes, or a text like "64MB", "256MiB", "1.5GiB"'),
        ({"code": "1", "memory": "1KB"}, "input should be greater than or equal to 16777216"),
        ({"code": "1", "network": ["pypi.org"]}, "the only network is 'none'"),
        ({"code": "1", "output": ["x"]}, "a step of type 'sandbox' has no 'output' (did you mean 'outputs'?)"),
    ],
)
def test_a_mistake_in_a_step_is_refused_before_anything_runs(step: dict[str, Any], message: str) -> None:
    from ferrum.errors import WorkflowError
    from ferrum.plan import Plan

    with pytest.raises(WorkflowError) as caught:
        Plan.of({"name": "x", "steps": {"s": {"type": "sandbox", **step}}})
    assert message in str(caught.value)


def test_code_runs_in_process_too_and_keeps_its_time() -> None:
    found = run_inline(
        {
            "name": "x",
            "steps": {"s": code("import time; print('up'); time.sleep(60)", timeout="1s")},
            "outputs": {"s": "{{ s }}"},
        },
        policy={"allow": ["sandbox:*"]},
    )
    assert found.status is RunStatus.COMPLETED
    output: Any = found.outputs["s"]
    assert (output["reason"], output["stdout"]) == ("timeout", "up\n")
    assert [event.text for event in found.events if isinstance(event, StepOutput)] == ["up\n"]

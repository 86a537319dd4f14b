"""A worker that dies takes the code that it runs with it, and another worker runs that again."""

from __future__ import annotations

from pathlib import Path

from fleet import Fleet, ended, eventually, happened
from processes import descendants, is_running
from sandboxes import needs_sandbox

import ferrum
from ferrum.results import RunStatus
from ferrum.workflow import Workflow

pytestmark = needs_sandbox

PROGRAM = """
import time
print("up", flush=True)
time.sleep(2)
"""


def test_a_worker_that_is_killed_takes_its_code_with_it_and_another_runs_it_again(
    clean_redis: str, tmp_path: Path
) -> None:
    fleet = Fleet(clean_redis, tmp_path)
    try:
        worker = fleet.start()
        step = {"type": "sandbox", "code": PROGRAM, "timeout": "90s"}
        run_id = ferrum.submit(
            Workflow.of({"name": "killed", "steps": {"s": step}, "outputs": {"s": "{{ s.reason }}"}})
        )
        eventually(lambda: happened(run_id, "step.output", "s"))
        inside = descendants(worker.pid)
        assert inside
        worker.kill()
        worker.wait()
        eventually(lambda: not any(map(is_running, inside)))
        fleet.start()
        view = ended(run_id)
        assert (view.status, view.outputs) == (RunStatus.COMPLETED, {"s": "ok"})
        assert len(happened(run_id, "step.lost", "s")) == 1
    finally:
        fleet.stop()

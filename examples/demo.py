"""`make demo`: a real workflow on real input, the repository that it stands in.

It goes through what `ferrum run` goes through: a Redis and a worker of its own, a model (a real one where the
environment has a key, else ferrum's scripted model server), a git server over MCP. Nothing stays behind but what it
kept, under `.state/demo`.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import click

from ferrum.cli.here import Here, Lines, echo_report
from ferrum.cli.options import COMPLETED, FAILED, INTERRUPTED, MISTAKE
from ferrum.errors import Conflict, FerrumError
from ferrum.events import Event, StepWaiting
from ferrum.local.process import take_lock
from ferrum.local.redis import alive
from ferrum.models.choice import DEFAULTS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STATE = ROOT / ".state" / "demo"

#: All other settings are the demo's own; which model to use is the user's to say.
KEEP = {"FERRUM_MODEL", "FERRUM_PRICES"}


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    if not (ROOT / ".git").exists():
        print(f"the demo reads the git repository it stands in, and {ROOT} is none: clone it", file=sys.stderr)
        return MISTAKE
    os.chdir(ROOT)
    try:
        with own_home() as home:
            set_up(home)
            with model():
                return run()
    except (KeyboardInterrupt, click.Abort):
        print("\nstopped; nothing of the demo runs any more", file=sys.stderr)
        return INTERRUPTED
    except FerrumError as error:
        print(f"demo: {error}", file=sys.stderr)
        return MISTAKE


def interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def own_home() -> Iterator[Path]:
    """A directory for this demo's Redis, removed at its end; those of demos that were killed go too."""
    STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
    making = take_lock(STATE / "lock", patience_s=10)
    for old in STATE.glob("home-*"):
        if (left := take_lock(old / "demo.lock")) is not None:
            if not alive(old):
                shutil.rmtree(old, ignore_errors=True)
            os.close(left)
    home = Path(tempfile.mkdtemp(prefix="home-", dir=STATE))
    ours = take_lock(home / "demo.lock")
    if making is not None:
        os.close(making)
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)
        if ours is not None:
            os.close(ours)


def set_up(home: Path) -> None:
    """The demo's settings, for this process and the worker that it starts."""
    for name in [name for name in os.environ if name.startswith("FERRUM_") and name not in KEEP]:
        del os.environ[name]
    os.environ.pop("REDIS_URL", None)
    os.environ |= {
        "FERRUM_HOME": str(home),
        # Kept beyond the home: what the demo wrote can be read when it is over.
        "FERRUM_ARTIFACTS": (STATE / "artifacts").as_uri(),
        "FERRUM_POLICY": str(HERE / "demo.policy.yaml"),
        "FERRUM_SERVERS": str(HERE / "demo.servers.yaml"),
        # Should this process be killed, its worker follows when the run has come to its end.
        "FERRUM_EXIT_WHEN_IDLE": "20",
    }


@contextmanager
def model() -> Iterator[None]:
    """A real model where the environment names one, else the scripted one, for as long as the demo lasts."""
    if named := next((name for name in ("FERRUM_MODEL", *DEFAULTS) if os.environ.get(name)), None):
        print(f"model: a real one, by {named}")
        yield
        return
    from ferrum.testing.model_server import ModelServer

    with ModelServer(HERE / "demo.script.yaml") as server:
        os.environ |= server.environ
        os.environ |= {"FERRUM_MODEL": "openai/scripted", "FERRUM_PRICES": str(HERE / "demo.prices.yaml")}
        print(f"model: no key in the environment, so ferrum's scripted model server answers, at {server.url}")
        yield


def run() -> int:
    from ferrum.plan import Plan
    from ferrum.workflow import Workflow

    workflow = Workflow.load(HERE / "repo_summary.yaml")
    plan = Plan(workflow)
    print(f"\n{plan}\n", flush=True)
    here = Here()
    run_id = ""
    try:
        print("starting a Redis and a worker of its own …", flush=True)
        run_id = here.submit(workflow, {}, None)
        return follow(here, Lines(plan), run_id)
    finally:
        # Who presses Ctrl-C twice must not leave half of it behind.
        with uninterrupted():
            if run_id:
                cancel(run_id)
            here.stop(whatever_runs=True)


def follow(here: Here, lines: Lines, run_id: str) -> int:
    from ferrum.follow import ASKS
    from ferrum.results import RunStatus
    from ferrum.runs import show

    events: list[Event] = []
    refused = False
    for event in here.watch(run_id):
        events.append(event)
        lines.echo(event)
        if isinstance(event, StepWaiting) and event.kind in ASKS:
            refused = not ask(event)
    view = show(run_id)
    echo_report(view, events)
    if refused:
        print("\nyou said no, so nothing was kept")
        return COMPLETED
    if view.status is not RunStatus.COMPLETED:
        return FAILED
    saved = next(step.output for step in view.steps if step.step_id == "save")
    assert isinstance(saved, dict)
    print(f"\nread it again: FERRUM_HOME={STATE.relative_to(ROOT)} .venv/bin/ferrum artifacts get {saved['artifact']}")
    return COMPLETED


def ask(event: StepWaiting) -> bool:
    """Let the person at the terminal decide, or the demo where there is none; whether it was a yes."""
    from ferrum.follow import shown
    from ferrum.runs import decide

    print(f"\n{shown(event.message).rstrip()}\n")
    if sys.stdin.isatty():
        approved, by = said_yes(), os.environ.get("USER") or "you"
    else:
        print("no terminal to ask at: the demo says yes by itself")
        approved, by = True, "demo"
    with suppress(Conflict):
        decide(event.run_id, event.step, approved=approved, by=by, note="", digest=event.digest)
    return approved


def said_yes() -> bool:
    """Ask at the terminal; just Enter is a yes.

    Not by `input`: a Ctrl-C in the instant before that blocks is heard only at the next key.
    """
    while True:
        print("yes? [Y/n]: ", end="", flush=True)
        while not select.select([sys.stdin], [], [], 0.2)[0]:
            pass
        line = os.read(sys.stdin.fileno(), 1000)
        answer = line.decode(errors="replace").strip().lower()
        if not line:
            raise KeyboardInterrupt
        if answer in ("", "y", "yes", "n", "no"):
            return answer[:1] != "n"


def cancel(run_id: str) -> None:
    from ferrum import runs

    # It may have ended, or Redis may be gone; then there is nothing to cancel.
    with suppress(FerrumError):
        if not runs.record().status(run_id).ended:
            runs.cancel(run_id, by="demo", reason="the demo was stopped")


@contextmanager
def uninterrupted() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())

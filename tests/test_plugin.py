"""The pytest plugin, as a project of its users has it: pytest runs in a process of its own, on a few files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from fleet import PATIENCE_S, eventually
from preloading import AS_FORK, into

_MY_TASKS = """
import os, time
from pathlib import Path

from celery import shared_task


@shared_task(name="my.shout")
def shout(text):
    return text.upper() + "!"


@shared_task(name="my.linger")
def linger(log):
    with Path(log).open("a") as file:
        file.write(f"{os.getpid()}\\n")
    while len(Path(log).read_text().splitlines()) == 1:
        time.sleep(0.01)
    return "done"
"""

_GREETING = """
name: greeting
inputs:
  name: {type: string}
steps:
  greet:
    type: llm
    prompt: "Greet {{ input.name }}."
  shout:
    type: task
    task: my.shout
    input: {text: "{{ greet }}"}
outputs:
  said: "{{ shout }}"
"""

_SHOUT = """
name: shout
inputs:
  text: {type: string}
steps:
  shout:
    type: task
    task: my.shout
    input: {text: "{{ input.text }}"}
outputs:
  said: "{{ shout }}"
"""

_SCRIPT = """
rules:
  - match: {regex: 'Greet (?P<name>\\w+)'}
    reply: Hello, $name
"""

_CONFTEST = """
import pytest


@pytest.fixture(scope="session")
def ferrum_imports():
    return ["my_tasks"]
"""

#: Saves a second of start, of what is no fork, where pytest-celery's own fixtures have no say.
_LEAN = ("-p", "no:celery")

#: A machine whose settings must reach no test.
_MACHINE = {
    "FERRUM_REDIS_URL": "redis://127.0.0.1:1/0",
    "FERRUM_MODEL": "anthropic/real",
    "FERRUM_LEASE": "3600",
    "OPENAI_API_KEY": "sk-real",
    "OPENAI_API_BASE": "http://127.0.0.1:1/v1",
}


class Project:
    """A directory with tests of a user's."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.write("pytest.ini", "[pytest]\naddopts = -p no:cacheprovider --strict-markers -W error\n")
        self.write("my_tasks.py", _MY_TASKS)
        self.write("greeting.yaml", _GREETING)
        self.write("shout.yaml", _SHOUT)
        self.write("script.yaml", _SCRIPT)
        self.write("conftest.py", _CONFTEST)

    def write(self, name: str, text: str) -> None:
        (self.home / name).write_text(text, encoding="utf-8")

    def pytest(self, *options: str, passes: int, forked: bool = True, **environ: str) -> str:
        """Run all tests here: the output of pytest, once it is checked that so many passed and none failed.

        Unless `forked` is false it, and what it starts, are forks of a process that has imported everything.
        """
        machine = {name: value for name, value in os.environ.items() if not name.startswith(("FERRUM_", "PYTEST_"))}
        # By its directory, whatever it starts is known for what it is.
        told = {**machine, **environ, "PYTHONPATH": str(self.home)}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--basetemp", str(self.home / "base"), *options],
            cwd=self.home,
            env=into({**told, **AS_FORK}, "pytest", "-c") if forked else told,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|errors?)", done.stdout)}
        assert counts == {"passed": passes}, done.stdout
        return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Whatever its tests started has to have ended after them."""
    yield Project(tmp_path)
    eventually(lambda: not processes.of(tmp_path))


def test_a_workflow_with_a_model_and_a_task_of_ones_own_runs_whole(project: Project) -> None:
    project.write(
        "test_greeting.py",
        """
import ferrum, pytest

@pytest.mark.ferrum_script("script.yaml")
def test_it(ferrum_worker, model_server):
    run_id = ferrum.submit("greeting.yaml", {"name": "Ada"})
    assert ferrum.wait(run_id, timeout_s=120) == {"said": "HELLO, ADA!"}
    assert [call.question.model for call in model_server.asked] == ["scripted"]
""",
    )
    project.pytest(passes=1)


def test_nothing_of_the_machine_reaches_a_test_and_nothing_of_a_test_stays(project: Project) -> None:
    # A project's own conftest may have brought in the app, with the settings of the machine.
    project.write("conftest.py", "import ferrum.celery, ferrum.runs; ferrum.runs.record()\n")
    project.write(
        "test_greeting.py",
        """
import logging, os, threading, warnings

import celery, ferrum, pytest

MACHINE = {name: value for name, value in os.environ.items() if name.startswith(("FERRUM_", "OPENAI_", "CELERY_"))}
HANDLERS, SHOW = list(logging.getLogger().handlers), warnings.showwarning
MINE = celery.Celery("mine")

def check_that_nothing_stayed():
    now = {name: value for name, value in os.environ.items() if name.startswith(("FERRUM_", "OPENAI_", "CELERY_"))}
    assert now == MACHINE
    assert [one.name for one in threading.enumerate() if one.name.startswith(("ferrum", "scripted"))] == []
    assert warnings.showwarning is SHOW
    assert celery.current_app._get_current_object() is MINE

@pytest.fixture
def afterwards():
    yield
    check_that_nothing_stayed()

@pytest.mark.parametrize("number", [1, 2])
def test_it(afterwards, ferrum_worker, model_server, number, caplog):
    run_id = ferrum.submit("shout.yaml", {"text": "here"})
    assert ferrum.wait(run_id, timeout_s=120) == {"said": "HERE!"}
    assert os.environ["OPENAI_API_BASE"] == model_server.url
    assert os.environ["OPENAI_API_KEY"] != MACHINE["OPENAI_API_KEY"]
    logging.getLogger("mine").warning("heard")
    assert "heard" in caplog.messages
""",
    )
    project.pytest(*_LEAN, passes=2, FERRUM_IMPORTS="my_tasks", **_MACHINE)


def test_a_test_finds_nothing_that_another_has_left(project: Project) -> None:
    project.write(
        "test_two.py",
        """
import time

import ferrum
from ferrum.runs import record

LINGERS = {"name": "lingers", "steps": {"one": {"type": "task", "task": "my.linger", "input": {"log": "one.log"}}}}

def test_one_that_leaves_a_step_running(ferrum_worker):
    ferrum.submit(LINGERS, key="same")
    for event in ferrum.watch(ferrum.submit(LINGERS, key="same")):
        if event.type == "step.started":
            break
    assert record().any_live()

def test_another(ferrum_worker):
    assert not record().any_live()
    assert len(record().workers()) == 1
    assert ferrum.wait(ferrum.submit("shout.yaml", {"text": "here"}), timeout_s=120) == {"said": "HERE!"}
""",
    )
    project.pytest(*_LEAN, passes=2)


def test_the_stop_of_a_tests_worker_hands_back_no_step_of_the_next_ones(project: Project) -> None:
    project.write(
        "test_two.py",
        """
import threading

import ferrum, pytest

@pytest.fixture
def ferrum_environ():
    return {"FERRUM_GRACE": "0.2"}

def shout():
    return ferrum.wait(ferrum.submit("shout.yaml", {"text": "here"}), timeout_s=120)

def test_one(ferrum_worker):
    assert shout() == {"said": "HERE!"}

def test_another_that_goes_on_when_the_grace_of_the_first_is_over(ferrum_worker):
    for left in threading.enumerate():
        if isinstance(left, threading.Timer):
            left.join()
    assert shout() == {"said": "HERE!"}
""",
    )
    project.pytest(*_LEAN, passes=2)


def test_policy_script_and_settings_are_fixtures_to_override(project: Project) -> None:
    project.write("asks.policy.yaml", 'ask: ["model:*"]\nallow: ["task:*"]\n')
    project.write(
        "test_policies.py",
        """
from pathlib import Path

import ferrum, pytest
from ferrum.runs import RunFailed
from ferrum.settings import settings

def greet():
    return ferrum.wait(ferrum.submit("greeting.yaml", {"name": "Ada"}), timeout_s=120)

class TestDenied:
    @pytest.fixture
    def ferrum_policy(self):
        return {"deny": ["model:*"]}

    def test_it(self, ferrum_worker):
        with pytest.raises(RunFailed, match="is denied by"):
            greet()

class TestAsked:
    @pytest.fixture
    def ferrum_policy(self):
        return Path("asks.policy.yaml")

    @pytest.fixture
    def model_script(self):
        return "Well met"

    def test_it(self, ferrum_worker):
        run_id = ferrum.submit("greeting.yaml", {"name": "Ada"})
        next(event for event in ferrum.watch(run_id) if event.type == "step.waiting")
        ferrum.decide(run_id, approved=True, by="a test")
        assert ferrum.wait(run_id, timeout_s=120) == {"said": "WELL MET!"}

class TestSettings:
    @pytest.fixture
    def ferrum_environ(self):
        return {"FERRUM_MODEL": "openai/mine", "FERRUM_LEASE": "4"}

    def test_it(self, ferrum_worker, model_server):
        greet()
        assert [call.question.model for call in model_server.asked] == ["mine"]
        assert settings().lease == 4

@pytest.mark.ferrum_script({"default": {"json": "as it is"}})
def test_a_script_may_stand_in_the_mark(ferrum_worker):
    assert greet() == {"said": '"AS IT IS"!'}

def test_no_other_provider_is_ever_called(ferrum_worker):
    step = {"type": "llm", "model": "anthropic/claude-sonnet-5-5", "prompt": "Who pays?"}
    with pytest.raises(RunFailed, match="nothing allows model 'anthropic/"):
        ferrum.wait(ferrum.submit({"name": "costs", "steps": {"one": step}}), timeout_s=120)
""",
    )
    project.pytest(*_LEAN, passes=5, ANTHROPIC_API_KEY="sk-real")


def test_the_processes_of_xdist_share_no_redis(project: Project) -> None:
    project.write(
        "test_two.py",
        """
import os

import ferrum

def test_it(ferrum_redis, ferrum_worker):
    with open(os.environ["PYTEST_XDIST_WORKER"], "w") as file:
        file.write(ferrum_redis)
    assert ferrum.wait(ferrum.submit("shout.yaml", {"text": "here"}), timeout_s=120) == {"said": "HERE!"}
""",
    )
    project.pytest(*_LEAN, "-n", "2", "--dist", "each", passes=2)
    one, other = [(project.home / name).read_text() for name in ("gw0", "gw1")]
    assert one != other


def test_the_step_of_a_worker_that_is_killed_goes_on_in_another(project: Project) -> None:
    # Its workers start by themselves: a fork has another process before it, which would be killed in its place.
    project.write("conftest.py", _CONFTEST + "import os; os.environ.pop('PRELOADED_SOCKET', None)\n")
    project.write(
        "test_kill.py",
        """
import time
from pathlib import Path

import ferrum, pytest

@pytest.fixture
def ferrum_environ():
    return {"FERRUM_LEASE": "1.5", "FERRUM_SWEEP": "0.2"}

def test_it(ferrum_cluster, tmp_path):
    log = tmp_path / "log"
    cluster = ferrum_cluster(workers=2)
    steps = {"one": {"type": "task", "task": "my.linger", "input": {"log": str(log)}}}
    run_id = ferrum.submit({"name": "lingers", "steps": steps, "outputs": {"said": "{{ one }}"}})
    next(event for event in ferrum.watch(run_id) if event.type == "step.started")
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    (victim,) = [one for one in cluster.workers if one.container.pid == int(log.read_text())]
    (other,) = [one for one in cluster.workers if one is not victim]

    victim.kill()
    assert victim.container.status == "exited"
    assert ferrum.wait(run_id, timeout_s=120) == {"said": "done"}
    assert log.read_text().split() == [str(victim.container.pid), str(other.container.pid)]

    victim.restart()
    assert victim.container.status == "running"
    assert victim.logs().count(" ready.") == 2
    assert len(cluster.workers) == 2
    (answer,) = cluster.workers[0].app.control.ping([victim.hostname()], timeout=10, limit=1)
    assert answer == {victim.hostname(): {"ok": "pong"}}

def test_a_worker_that_cannot_start_says_why(ferrum_cluster):
    with pytest.raises(RuntimeError, match="is exited and not ready(?s:.*)--no-such-option"):
        ferrum_cluster(1, "--no-such-option")
""",
    )
    project.pytest(passes=2)


def test_without_pytest_celery_a_cluster_says_what_to_install(project: Project) -> None:
    project.write("conftest.py", "import sys; sys.modules['pytest_celery'] = None\n")
    project.write("test_it.py", "def test_it(ferrum_cluster): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *_LEAN],
        cwd=project.home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip install 'ferrum[testing]'" in done.stdout
    assert "1 error" in done.stdout


def test_a_pytest_that_uses_no_fixture_pays_for_none(project: Project) -> None:
    project.write(
        "test_it.py",
        """
import sys

def test_it(pytestconfig):
    assert pytestconfig.pluginmanager.has_plugin("ferrum")
    rooms = {name for name in sys.modules if name.partition(".")[0] in ("ferrum", "tasks")}
    assert rooms == {"ferrum", "ferrum.testing", "ferrum.testing.plugin"}
    assert not {"celery", "redis", "pydantic", "aiohttp", "litellm", "pytest_celery"} & set(sys.modules)
""",
    )
    # Plugins that are not ours import what they like.
    project.pytest(*_LEAN, "-p", "no:valkey", passes=1, forked=False)

"""What each type of step does in one attempt."""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import celery
import pytest
from celery import Celery
from pydantic import ValidationError

from ferrum.artifacts import Artifacts, Ref
from ferrum.errors import Denied, ModelError, OutputError, SettingsError, StepError, TaskError, ToolError
from ferrum.governance.acts import By, InputFile, ModelCall, ModelReply, ToolCall, ToolReply
from ferrum.record import Verdict
from ferrum.settings import Settings
from ferrum.steps import Health, Inside, Park, step_types
from ferrum.testing.actors import ScriptedActors
from ferrum.untrusted import Marks
from ferrum.workflow import Workflow


@dataclass
class Try:
    """An attempt at which every act is allowed."""

    actors: ScriptedActors = field(default_factory=ScriptedActors)
    verdict: Verdict | None = None
    timeout_s: float | None = None
    run_id: str = "run_0123"
    step_id: str = "a"
    number: int = 1
    idempotency_key: str = "run_0123.a"
    memory: Any = None
    marks: Marks = field(default_factory=Marks.new)

    def now(self) -> float:
        return time.time()

    async def perform(self, act: Any) -> Any:
        return await self.actors.carry_out(act, by(self))

    def at(self, kind: str, **params: Any) -> Any:
        """What a step of this type returns."""
        found = step_types()[kind]
        result = found.run(found.params.model_validate(params), self)
        return asyncio.run(_result(result)) if inspect.isawaitable(result) else result

    @property
    def calls(self) -> list[ModelCall]:
        return [done.act for done in self.actors.done if isinstance(done.act, ModelCall)]


def by(who: Any) -> By:
    return By(who.idempotency_key, "default", lambda stream, text: None, who.perform)


async def _result(work: Any) -> Any:
    return await work


def trying(**said: Any) -> Try:
    """An attempt at which `test/<name>` says these, one after the other."""
    actors = ScriptedActors()
    for name, what in said.items():
        actors.on(f"test/{name}", *(what if isinstance(what, tuple) else (what,)))
    return Try(actors)


# llm


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "give either a prompt or messages"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "give either a prompt or messages"),
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0 needs a role"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "user"}]}, "message 1 needs a role"),
        ({"prompt": "x", "temperature": 3}, "less than or equal to 2"),
        ({"prompt": "x", "max_tokens": 0}, "greater than or equal to 1"),
        ({"prompt": "x", "colour": "green"}, "Extra inputs are not permitted"),
    ],
)
def test_parameters_of_a_model_call_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        step_types()["llm"].params.model_validate(wrong)


def test_a_prompt_is_one_message_of_the_user_after_the_instructions() -> None:
    attempt = trying(m="hello")
    assert attempt.at("llm", model="test/m", prompt="hi", system="be brief", temperature=0, max_tokens=9) == "hello"
    assert attempt.calls == [
        ModelCall(
            model="test/m",
            messages=({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}),
            temperature=0,
            max_tokens=9,
        )
    ]


def test_messages_are_sent_as_they_are() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": 1}]
    attempt = trying(m="hello")
    attempt.at("llm", model="test/m", messages=messages)
    assert list(attempt.calls[0].messages) == messages


def test_a_step_that_names_no_model_takes_the_one_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = sys.modules[type(step_types()["llm"]).__module__]
    monkeypatch.setattr(llm, "settings", lambda: Settings(model="test/usual"))
    attempt = trying(usual="hello")
    assert attempt.at("llm", prompt="hi") == "hello"
    monkeypatch.setattr(llm, "settings", Settings)
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "OLLAMA_HOST", "OLLAMA_API_BASE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="no model to call"):
        attempt.at("llm", prompt="hi")


SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


def test_an_answer_with_a_schema_is_a_value() -> None:
    attempt = trying(m='{"n": 1}')
    assert attempt.at("llm", model="test/m", prompt="hi", output_schema=SCHEMA) == {"n": 1}
    assert attempt.calls[0].output_schema == SCHEMA


def test_an_answer_that_breaks_its_schema_is_repaired_once() -> None:
    attempt = trying(m=('{"n": "one"}', '{"n": 1}'))
    assert attempt.at("llm", model="test/m", prompt="hi", output_schema=SCHEMA) == {"n": 1}
    _, repair = attempt.calls
    assert repair.messages[1] == {"role": "assistant", "content": '{"n": "one"}'}
    assert "$.n" in str(repair.messages[2]["content"])


def test_an_answer_that_breaks_its_schema_twice_is_an_error_that_may_be_tried_again() -> None:
    attempt = trying(m="no")
    with pytest.raises(OutputError, match="the answer is not JSON") as caught:
        attempt.at("llm", model="test/m", prompt="hi", output_schema=SCHEMA, fallbacks=["test/never"])
    assert caught.value.retry
    assert len(attempt.calls) == 2


def test_fallbacks_are_asked_in_their_order_until_one_answers() -> None:
    attempt = trying(a=ModelError("a is away"), b=ModelError("b is away"), c="hello", d="never")
    params = {"prompt": "hi", "model": "test/a", "fallbacks": ["test/b", "test/c", "test/d"]}
    assert attempt.at("llm", **params) == "hello"
    assert [call.model for call in attempt.calls] == ["test/a", "test/b", "test/c"]


def test_when_no_model_answers_the_first_error_is_the_one_that_is_told() -> None:
    attempt = trying(a=ModelError("a is busy", retry=True, retry_after_s=3), b=ModelError("b is away"))
    with pytest.raises(ModelError, match="a is busy") as caught:
        attempt.at("llm", prompt="hi", model="test/a", fallbacks=["test/b"])
    assert (caught.value.retry, caught.value.retry_after_s) == (True, 3)


def test_a_model_that_is_denied_is_not_replaced_by_another() -> None:
    attempt = trying(a=Denied("not that one"), b="never")
    with pytest.raises(Denied):
        attempt.at("llm", prompt="hi", model="test/a", fallbacks=["test/b"])
    assert len(attempt.calls) == 1


# tool


@pytest.mark.parametrize("wrong", ["git", "git.", ".log", ""])
def test_a_tool_is_named_by_its_server_and_its_own_name(wrong: str) -> None:
    with pytest.raises(ValidationError, match=r"write server\.tool, as in git\.log"):
        step_types()["tool"].params.model_validate({"tool": wrong})


def test_a_tool_is_called_once_with_its_arguments_and_the_steps_key() -> None:
    attempt = Try(ScriptedActors().on("git.show.it", {"x": 1}))
    assert attempt.at("tool", tool="git.show.it", input={"ref": "HEAD"}) == {"x": 1}
    [done] = attempt.actors.done
    assert done.act == ToolCall(server="git", tool="show.it", arguments={"ref": "HEAD"})
    assert done.idempotency_key == "run_0123.a"


def test_a_tool_that_says_no_fails_its_step() -> None:
    with pytest.raises(ToolError, match="no such ref"):
        Try(ScriptedActors().on("git.log", ToolError("no such ref"))).at("tool", tool="git.log")


# approval


def test_an_approval_waits_for_a_person_as_long_as_its_timeout() -> None:
    with pytest.raises(Park) as caught:
        Try(timeout_s=60).at("approval", message="Go on?")
    park = caught.value
    assert (park.kind, park.message, park.wake_in_s) == ("approval", "Go on?", 60)


def test_a_yes_is_its_output() -> None:
    said = Try(verdict=Verdict(True, "ann", "fine")).at("approval", message="Go on?")
    assert said == {"approved": True, "by": "ann", "note": "fine"}


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Verdict(False, "bob", "too late"), "rejected by bob: too late"),
        (Verdict(False, ""), "rejected by someone"),
        (Verdict(False, "", expired=True), "nobody decided in time"),
    ],
)
def test_without_a_yes_it_fails_and_says_why(verdict: Verdict, said: str) -> None:
    with pytest.raises(StepError) as caught:
        Try(verdict=verdict).at("approval", message="Go on?")
    assert (str(caught.value), caught.value.retry) == (said, False)


# task


@pytest.fixture
def app() -> Iterator[Celery]:
    """A user's app with tasks of their own."""
    before = celery.current_app._get_current_object()
    app = Celery("theirs", set_as_current=False)
    app.set_current()
    yield app
    before.set_current()


def test_a_task_is_called_with_its_input_and_its_result_is_the_output(app: Celery) -> None:
    @app.task(name="mine.add", shared=False)  # type: ignore[untyped-decorator]
    def add(a: int, b: int) -> dict[str, int]:
        return {"sum": a + b}

    assert Try().at("task", task="mine.add", input={"a": 1, "b": 2}) == {"sum": 3}


def test_a_task_may_be_a_coroutine_function(app: Celery) -> None:
    @app.task(name="mine.later", shared=False)  # type: ignore[untyped-decorator]
    async def later(value: Any) -> Any:
        await asyncio.sleep(0)
        return value

    assert Try().at("task", task="mine.later", input={"value": [1]}) == [1]


def test_a_task_that_is_not_there_is_named_with_the_nearest(app: Celery) -> None:
    @app.task(name="mine.add", shared=False)  # type: ignore[untyped-decorator]
    def add() -> None:
        pass

    with pytest.raises(StepError, match=r"no task 'mine\.ad' .*did you mean 'mine\.add'.*FERRUM_IMPORTS"):
        Try().at("task", task="mine.ad")


@pytest.mark.parametrize("name", ["celery.backend_cleanup", "ferrum.llm", "ferrum.run"])
def test_the_tasks_of_the_platform_are_not_for_steps(name: str) -> None:
    with pytest.raises(ValidationError, match="belongs to the platform; a task step runs a task of your own"):
        step_types()["task"].params.model_validate({"task": name})


def fail(error: Exception) -> None:
    raise error


async def fail_later(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("body", [fail, fail_later])
def test_a_task_that_raises_fails_its_step_and_may_be_tried_again(app: Celery, body: Any) -> None:
    app.task(name="mine.fail", shared=False)(body)
    with pytest.raises(TaskError) as caught:
        Try().at("task", task="mine.fail", input={"error": ValueError("no")})
    assert (str(caught.value), caught.value.retry) == ("mine.fail raised ValueError: no", True)


@pytest.mark.parametrize("body", [fail, fail_later])
def test_a_task_may_say_itself_how_its_step_failed(app: Celery, body: Any) -> None:
    app.task(name="mine.fail", shared=False)(body)
    with pytest.raises(StepError, match=r"^for good$") as caught:
        Try().at("task", task="mine.fail", input={"error": StepError("for good")})
    assert not caught.value.retry


def give() -> object:
    return {"when": object()}


async def give_later() -> object:
    return object()


@pytest.mark.parametrize(("body", "said"), [(give, "dict"), (give_later, "object")])
def test_a_result_that_is_not_json_fails_the_step(app: Celery, body: Any, said: str) -> None:
    app.task(name="mine.odd", shared=False)(body)
    with pytest.raises(TaskError, match=f"mine.odd returned {said}, which is not JSON"):
        Try().at("task", task="mine.odd")


# artifact


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifacts:
    """The store of the settings."""
    own = Artifacts(f"file://{tmp_path}")
    monkeypatch.setattr("ferrum.artifacts.process_artifacts", lambda: own)
    return own


@pytest.mark.parametrize(
    ("given", "kept", "said"),
    [
        ({"content": "# Hi", "name": "report.md"}, b"# Hi", "text/markdown"),
        ({"content": "<p>", "name": "page.html"}, b"<p>", "text/html"),
        ({"content": "hi", "name": "notes"}, b"hi", "text/markdown"),
        ({"content": "hi", "name": "notes", "media_type": "text/x-own"}, b"hi", "text/x-own"),
        ({"content": {"a": "ö"}, "name": "value.md"}, '{\n  "a": "ö"\n}'.encode(), "application/json"),
        ({"content": "\ud800", "name": "odd.txt"}, b"?", "text/plain"),
    ],
)
def test_what_is_given_is_kept_under_its_hash(store: Artifacts, given: dict[str, Any], kept: bytes, said: str) -> None:
    digest = f"sha256:{sha256(kept).hexdigest()}"
    expected = {"name": given["name"], "artifact": digest, "size": len(kept), "media_type": said}
    assert Try().at("artifact", **given) == expected
    assert store.get(Ref(digest=digest, size=len(kept), media_type=said)) == kept


# wait


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "one of 'for', 'until' and 'signal', not none"),
        ({"for": "1s", "signal": "go"}, "not for and signal"),
        ({"until": "tomorrow"}, "'tomorrow' is no time as ISO 8601"),
        ({"until": "2026-12-24T18:00:00"}, "does not say in which time zone"),
    ],
)
def test_a_wait_is_for_one_thing_that_can_come(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        step_types()["wait"].params.model_validate(wrong)


def test_a_time_may_be_known_only_at_run_time() -> None:
    step_types()["wait"].params.model_validate({"until": "{{ input.when }}"})


def test_a_time_that_has_passed_is_not_waited_for() -> None:
    assert Try().at("wait", until="2020-01-01T00:00:00Z") is None
    assert Try(memory=1.0).at("wait", **{"for": "1h"}) is None


# workflow


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "either a 'file' or 'workflow', or the 'name'"),
        ({"name": "x", "workflow": {}}, "either a 'file' or 'workflow', or the 'name'"),
        ({"workflow": {}, "version": "1"}, "'version' goes with the 'name'"),
    ],
)
def test_a_workflow_inside_is_said_in_one_way(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        step_types()["workflow"].params.model_validate(wrong)


# router


@dataclass
class Routed(Try):
    """An attempt of a router, and how the targets of its steps are doing."""

    spec: Any = None
    ill: dict[str, Health] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    address: str = "x.a"

    def health(self, targets: Any) -> dict[str, Health]:
        return {name: self.ill.get(name, Health(usable=True)) for name in targets}

    def allowed(self, target: str) -> bool:
        return target not in self.refused

    def choice(self, **params: Any) -> str:
        """What it lets run, and why."""
        with pytest.raises(Inside) as caught:
            self.at("router", **params)
        return caught.value.message


def among(**routes: dict[str, Any]) -> Any:
    task = {"type": "task", "task": "t"}
    steps = {"a": {"type": "router", "among": {name: task | route for name, route in routes.items()}}}
    return Workflow.of({"name": "x", "steps": steps}).steps["a"]


@pytest.mark.parametrize(
    ("params", "chosen"),
    [
        ({"by": "cost"}, "'cheap', the best by cost of 3"),
        ({"by": "latency"}, "'quick', the best by latency of 3"),
        ({"by": "tier"}, "'good', the best by tier of 3"),
        ({"by": "health"}, "'good', the best by health of 3"),
        ({"by": ["health", "cost"]}, "'cheap', the best by health, cost of 3"),
        ({"by": "tier", "max_cost": 3}, "'quick', the best by tier of 2; 'good' costs too much"),
        ({"by": "tier", "max_latency": 150}, "'quick', the only one left; 'good' is too slow, 'cheap' is too slow"),
        ({"by": "cost", "min_tier": 3}, "'good', the only one left; 'cheap' is of too low a tier, 'quick' is of too"),
    ],
)
def test_a_router_chooses_by_what_it_was_told_and_says_why(params: dict[str, Any], chosen: str) -> None:
    spec = among(
        good={"tier": 3, "cost": 9, "latency": 900},
        cheap={"tier": 1, "cost": 1, "latency": 500},
        quick={"tier": 2, "cost": 2, "latency": 100},
    )
    assert Routed(spec=spec).choice(**params).startswith(chosen)


def test_a_router_goes_by_how_long_it_really_took_and_what_is_not_known_comes_last() -> None:
    spec = among(said={"latency": 100}, measured={"latency": 900}, unknown={})
    ill = {"x.a.measured": Health(usable=True, latency_ms=5)}
    assert Routed(spec=spec, ill=ill).choice(by="latency").startswith("'measured'")
    assert Routed(spec=among(unknown={}, dear={"cost": 5})).choice(by=["tier", "cost"]).startswith("'dear'")


def test_a_router_asks_the_next_where_another_step_tries_whether_the_best_is_well_again() -> None:
    spec = among(best={"cost": 1}, next={"cost": 2})
    assert Routed(spec=spec, refused={"x.a.best"}).choice(by="cost") == "'next', the only one left; 'best' is failing"
    with pytest.raises(StepError, match="nothing is left to choose: 'best' is failing, 'next' is failing"):
        Routed(spec=spec, ill={"x.a.next": Health(usable=False)}, refused={"x.a.best"}).at("router", by="cost")


def test_the_health_of_a_routers_step_is_that_of_its_target_model_or_server_or_its_own() -> None:
    steps = {
        "own": {"type": "task", "task": "t", "target": "db"},
        "model": {"type": "llm", "model": "openai/x", "prompt": "p"},
        "tool": {"type": "tool", "tool": "git.log"},
        "name": {"type": "task", "task": "t"},
    }
    spec = Workflow.of({"name": "x", "steps": {"a": {"type": "router", "among": steps}}}).steps["a"]
    target_of = sys.modules[type(step_types()["router"]).__module__].target_of
    assert {name: target_of(name, step, "x.a") for name, step in spec.among.items()} == {
        "own": "db", "model": "openai/x", "tool": "git", "name": "x.a.name",
    }  # fmt: skip


# The double itself.


def test_a_scripted_actor_says_one_thing_after_the_other_and_keeps_to_the_last() -> None:
    async def turned(act: Any) -> Any:
        return act.arguments["x"] * 2

    actors = ScriptedActors()
    actors.on("s.t", turned, ToolError("no"), "yes").on("test/m", "hello")
    call = ToolCall(server="s", tool="t", arguments={"x": 2})

    async def story() -> list[Any]:
        await actors.warm(frozenset())
        found: list[Any] = [await actors.carry_out(call, by(Try()))]
        with pytest.raises(ToolError):
            await actors.carry_out(call, by(Try()))
        found += [await actors.carry_out(call, by(Try())), await actors.carry_out(call, by(Try()))]
        with pytest.raises(LookupError, match=r"nothing was said about 's\.other'"):
            await actors.carry_out(call.model_copy(update={"tool": "other"}), by(Try()))
        ask = ModelCall(model="test/m", messages=())
        assert actors.estimate(ask) == actors.costs
        return [*found, await actors.carry_out(ask, by(Try()))]

    *tools, answer = asyncio.run(story())
    assert tools == [ToolReply(output=4), ToolReply(output="yes"), ToolReply(output="yes")]
    assert answer == ModelReply(text="hello", model="test/m", finish_reason="stop", usage=actors.costs)


@pytest.mark.parametrize("given", [{}, {"text": "a", "artifact": "sha256:" + "0" * 64}])
def test_a_file_for_code_is_its_text_or_an_artifact(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="a file is either its text or an artifact"):
        InputFile(**given)

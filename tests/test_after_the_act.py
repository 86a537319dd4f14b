"""Whatever comes back from an act, it is done as often as the step may be tried, and not once more."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from fleet import Fleet, ended, happened
from hostile_server import ANSWERS
from sandboxes import needs_sandbox
from sizes import sized
from user_tasks import HOSTILE

import ferrum
from ferrum.results import RunStatus, StepStatus
from ferrum.runs import RunView


class Provider:
    """Answers model calls with what the test says, byte by byte, and counts them."""

    def __init__(self) -> None:
        self.body = b""
        self.calls = 0
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                provider.calls += 1
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(provider.body)))
                self.end_headers()
                self.wfile.write(provider.body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, usage: str, content: str = '"hi"') -> None:
        choice = f'{{"index": 0, "finish_reason": "stop", "message": {{"role": "assistant", "content": {content}}}}}'
        text = f'{{"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [{choice}]'
        self.body = (text + (f', "usage": {usage}' if usage else "") + "}").encode()
        self.calls = 0

    def answer_at_all(self, text: str) -> None:
        self.body = text.encode()
        self.calls = 0

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.stop()


@pytest.fixture(scope="module")
def fleet(redis_url: str, provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    home = tmp_path_factory.mktemp("worker")
    (home / "prices.yaml").write_text("models: {openai/m: {input: 0.15, output: 0.60}}")
    # What is repeated is repeated soon.
    environ = {"FERRUM_LEASE": "1", "FERRUM_HEARTBEAT": "0.3", "FERRUM_PRICES": str(home / "prices.yaml")}
    provided = {"OPENAI_API_BASE": provider.url, "OPENAI_BASE_URL": provider.url, "OPENAI_API_KEY": "x"}
    program = str(Path(__file__).with_name("hostile_server.py"))
    server = {"command": sys.executable, "args": [program, str(home / "calls")], "timeout": 5}
    environ["FERRUM_MCP_SERVERS"] = json.dumps({"mcpServers": {"hostile": server}})
    fleet = Fleet(redis_url, home, environ | provided)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


def run(step: dict[str, Any], **more: Any) -> RunView:
    return ended(ferrum.submit({"name": "after", "steps": {"a": step}, **more}))


def some(cases: Iterable[str], sample: int) -> list[str]:
    """A sample of the cases, the same each time; all of them where `FERRUM_TEST_SIZE` asks for so many."""
    cases = list(cases)
    return random.Random(8).sample(cases, min(len(cases), sized(sample)))


ONCE = {"type": "llm", "model": "openai/m", "prompt": "Say hi", "retry": {"max_attempts": 1}}
TOKENS = [
    "-5000", "1000000000000000000", "9007199254740993000000", "1e18", "1e400", "-1", "0.5", '"12"', '"many"', "NaN",
    "Infinity", "true", "[]", "{}", "null", '"\\ud800"',
]  # fmt: skip


@pytest.mark.parametrize("tokens", TOKENS)
def test_no_count_of_a_provider_is_believed_that_cannot_be(fleet: Fleet, provider: Provider, tokens: str) -> None:
    provider.answer(f'{{"prompt_tokens": {tokens}, "completion_tokens": {tokens}, "total_tokens": {tokens}}}')
    view = run(ONCE, budget={"total_tokens": 100_000_000})
    assert provider.calls == 1
    assert view.status in (RunStatus.COMPLETED, RunStatus.FAILED)
    assert 0 < view.usage.total_tokens < 100_000 or view.status is RunStatus.FAILED


def test_what_was_not_believed_is_said(fleet: Fleet, provider: Provider) -> None:
    provider.answer('{"prompt_tokens": 7, "completion_tokens": -200000, "total_tokens": -199993}')
    view = run(ONCE)
    assert (view.status, view.usage.input_tokens, view.usage.output_tokens) == (RunStatus.COMPLETED, 7, 1)
    [said] = happened(view.run_id, "step.output")
    assert (said.stream, said.text) == (
        "usage", "model 'openai/m' says that it used fewer than 0 output tokens, which cannot be: counted as 1",
    )  # fmt: skip


@pytest.mark.parametrize("content", ['"\\ud800"', '"\\u0000"', '"' + "x" * 3_000_000 + '"', "[1]", "7", "{}"])
def test_a_model_whose_answer_is_odd_is_asked_once(fleet: Fleet, provider: Provider, content: str) -> None:
    provider.answer('{"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}', content)
    run(ONCE)
    assert provider.calls == 1


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("attempts", [1, 2])
def test_a_task_is_run_as_often_as_it_may_be_tried(fleet: Fleet, tmp_path: Path, what: str, attempts: int) -> None:
    log = tmp_path / "log"
    retry = {"max_attempts": attempts, "backoff": 0.01}
    view = run({"type": "task", "task": "user.hostile", "input": {"log": str(log), "what": what}, "retry": retry})
    [step] = view.steps
    raises = what.startswith("raise")
    assert log.read_text() == "." * (attempts if raises else 1)
    if raises:
        assert step.status is StepStatus.FAILED
        assert step.error
        assert len(step.error) < 20_000
    json.dumps(view.model_dump(mode="json"))


@pytest.mark.parametrize("what", some(ANSWERS, 8))
@pytest.mark.parametrize("attempts", [1, 2])
def test_a_tool_is_called_as_often_as_it_may_be_tried(fleet: Fleet, what: str, attempts: int) -> None:
    log = fleet.home / "calls"
    log.write_text("")
    retry = {"max_attempts": attempts, "backoff": 0.01}
    view = run({"type": "tool", "tool": "hostile.do", "input": {"what": what}, "retry": retry})
    [step] = view.steps
    assert 1 <= len(log.read_text()) <= attempts
    assert not happened(view.run_id, "step.lost")
    if step.status is StepStatus.FAILED:
        assert step.error
        assert len(step.error) < 20_000
    else:
        assert (step.status, len(log.read_text())) == (StepStatus.COMPLETED, 1)
    json.dumps(view.model_dump(mode="json")).encode()


VECTORS = [
    "[]", "[NaN, 1]", "[1e400, 1]", '["a", 1]', "[null]", "null", '"AAAA"', "[[1], [2]]", "{}", f"[1{'0' * 400}, 1]",
    f"[{'0.5, ' * 100_000}0.5]", "[0, 0]", "[true, false]",
]  # fmt: skip


@pytest.mark.parametrize("vector", some(VECTORS, 4))
@pytest.mark.parametrize("usage", ['{"prompt_tokens": -5000, "total_tokens": 1e18}'])
def test_an_embedder_that_answers_oddly_is_asked_once(
    fleet: Fleet, provider: Provider, vector: str, usage: str, tmp_path: Path
) -> None:
    provider.answer_at_all(
        f'{{"object": "list", "model": "m", "data": [{{"object": "embedding", "index": 0, "embedding": {vector}}}], '
        f'"usage": {usage}}}'
    )
    document = {"source": "a.md", "text": "A cat sleeps."}
    once = {"max_attempts": 1}
    view = run(
        {"type": "ingest", "index": tmp_path.name, "embedding": "openai/m", "documents": [document], "retry": once}
    )
    [step] = view.steps
    assert provider.calls == 1
    assert not happened(view.run_id, "step.lost")
    assert len(happened(view.run_id, "step.started")) == 1
    assert step.error or step.status is StepStatus.COMPLETED
    json.dumps(view.model_dump(mode="json")).encode()


#: Programs whose words, files and answers no JSON can hold, or not for long.
PROGRAMS = [
    'open("output.json", "w").write("NaN")', 'open("output.json", "w").write("1e400")',
    'open("output.json", "w").write("1" + "0" * 10_000)', 'open("output.json", "w").write("[" * 100_000)',
    'open("output.json", "w").write(chr(34) + chr(92) + "ud800" + chr(34))',
    'open("output.json", "wb").write(bytes([255, 254, 0]))', 'open("output.json", "w").write("x" * 5_000_000)',
    "import sys; sys.stdout.buffer.write(bytes(range(256)))", 'print("x" * 5_000_000)',
    'import os; os.mkdir("output.json")', 'import os; os.symlink("/etc/passwd", "output.json")',
    'open(b"\\xff.txt", "w").write("a")', 'open("a\\nb.txt", "w").write("a")',
]  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("program", some(PROGRAMS, 4))
def test_code_that_leaves_what_cannot_be_kept_is_run_once(fleet: Fleet, program: str) -> None:
    view = run({"type": "sandbox", "code": program, "outputs": ["*"], "retry": {"max_attempts": 1}})
    [step] = view.steps
    assert len(happened(view.run_id, "step.started")) == 1
    assert not happened(view.run_id, "step.lost")
    assert step.error or step.status is StepStatus.COMPLETED
    json.dumps(view.model_dump(mode="json")).encode()

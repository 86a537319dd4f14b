"""The scripted model server and its script."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fleet import PATIENCE_S

from ferrum.errors import SettingsError
from ferrum.testing.model_server import ModelServer, Outcome, embedding
from ferrum.testing.script import Script

EXAMPLE = Path(__file__).parent.parent / "examples" / "stub_script.yaml"


@contextmanager
def connection(url: str) -> Iterator[http.client.HTTPConnection]:
    parts = urlsplit(url)
    with closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)) as link:
        yield link


def post(url: str, path: str, body: object) -> tuple[int, http.client.HTTPMessage, bytes]:
    with connection(url) as link:
        link.request("POST", path, json.dumps(body), {"Authorization": "Bearer sk-do-not-keep"})
        response = link.getresponse()
        return response.status, response.headers, response.read()


def chat(server: ModelServer, *texts: str, **more: Any) -> tuple[int, Any]:
    """The status and value of a conversation in which user and assistant take turns."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    status, _, data = post(server.url, "/v1/chat/completions", {"model": "gpt-scripted", "messages": messages, **more})
    return status, json.loads(data)


def reply(server: ModelServer, *texts: str, **more: Any) -> str:
    status, value = chat(server, *texts, **more)
    assert status == 200, value
    return str(value["choices"][0]["message"]["content"])


def events(data: bytes) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in data.decode().splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_the_first_rule_that_matches_answers() -> None:
    script = {
        "rules": [
            {"match": {"model": "other-*"}, "reply": "other model"},
            {"match": {"contains": "weather"}, "reply": "sunny"},
            {"match": {"turn": 2}, "reply": "second turn"},
            {"match": {"regex": "^(sun|rain)$"}, "reply": "regex"},
            {"match": {"contains": "rain"}, "reply": "too late"},
        ],
        "default": {"reply": "default"},
    }
    with ModelServer(script) as server:
        assert reply(server, "how is the weather?") == "sunny"
        assert reply(server, "hello") == "default"
        assert reply(server, "hello", "default", "go on") == "second turn"
        assert reply(server, "rain") == "regex"
        assert reply(server, "rain", model="other-1") == "other model"
        assert [asked.rule for asked in server.asked] == [1, None, 2, 3, 0]


def test_an_answer_can_quote_what_was_asked_and_what_it_quotes_is_not_looked_at_again() -> None:
    script = {
        "rules": [
            {
                "match": {"regex": "Classify: (?P<title>.+)"},
                "json": {"title": "$title", "by": ["$model", "$count"], "price": "$$5"},
            }
        ],
        "default": {"reply": "you said <$last_message>"},
    }
    with ModelServer(script) as server:
        assert json.loads(reply(server, "Classify: $model is broken")) == {
            "title": "$model is broken",
            "by": ["gpt-scripted", "1"],
            "price": "$5",
        }
        assert reply(server, "$count") == "you said <$count>"


def test_a_rule_is_used_up_after_its_times() -> None:
    script = {"rules": [{"fail": 429, "retry_after": 1.5, "times": 2}, {"reply": "at last"}]}
    with ModelServer(script) as server:
        for _ in range(2):
            status, headers, data = post(server.url, "/v1/chat/completions", {"model": "m", "messages": []})
            assert status == 429
            assert headers["Retry-After"] == "1.5"
            assert json.loads(data)["error"]["code"] == "rate_limit_exceeded"
        assert reply(server, "hello") == "at last"


def test_without_a_rule_a_call_is_refused_in_words() -> None:
    with ModelServer({"rules": [{"match": {"contains": "poem"}, "reply": "a poem"}]}) as server:
        status, value = chat(server, "hello")
        assert status == 400
        assert value["error"]["message"] == (
            "no rule of the script answers model 'gpt-scripted' in turn 1, last message 'hello': "
            "add a rule, or a default"
        )


def test_usage_is_a_quarter_of_the_characters_unless_the_script_says_it() -> None:
    script = {
        "rules": [{"match": {"contains": "dear"}, "reply": "x", "usage": {"input_tokens": 9000}}, {"reply": "12345"}]
    }
    with ModelServer(script) as server:
        assert chat(server, "12345678")[1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
        assert chat(server, "dear")[1]["usage"]["prompt_tokens"] == 9000


def test_a_streamed_answer_adds_up_to_the_plain_one_and_ends_with_usage_where_asked() -> None:
    with ModelServer("to be  or\nnot to be") as server:
        body = {"model": "m", "messages": [{"role": "user", "content": "12345678"}], "stream": True}
        plain = events(post(server.url, "/v1/chat/completions", body)[2])
        assert (
            "".join(event["choices"][0]["delta"].get("content", "") for event in plain[:-1]) == "to be  or\nnot to be"
        )
        assert plain[-2]["choices"][0]["finish_reason"] == "stop"
        assert plain[-1] == "[DONE]"
        with_usage = events(
            post(server.url, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})[2]
        )
        assert with_usage[-2]["choices"] == []
        assert with_usage[-2]["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}


def test_it_can_ask_for_tools_plain_and_streamed() -> None:
    script = {"rules": [{"tool_calls": [{"name": "git.log", "arguments": {"branch": "$last_message"}}]}]}
    with ModelServer(script) as server:
        choice = chat(server, "main", tools=[])[1]["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call == {
            "id": "call_1",
            "type": "function",
            "function": {"name": "git.log", "arguments": '{"branch": "main"}'},
        }
        body = {"model": "m", "messages": [{"role": "user", "content": "main"}], "stream": True}
        chunks = events(post(server.url, "/v1/chat/completions", body)[2])
        (delta,) = [c["choices"][0]["delta"] for c in chunks[:-1] if "tool_calls" in c["choices"][0]["delta"]]
        assert delta["tool_calls"] == [{"index": 0, **call}]


def test_broken_json_is_sent_with_status_200() -> None:
    with ModelServer({"default": {"fail": "invalid_json"}}) as server:
        status, _, data = post(server.url, "/v1/chat/completions", {"model": "m", "messages": []})
        assert status == 200
        with pytest.raises(json.JSONDecodeError):
            json.loads(data)


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_answer_ends_in_the_middle(stream: bool) -> None:
    with ModelServer({"default": {"fail": "cut"}}) as server:
        with pytest.raises(http.client.IncompleteRead) as caught:
            post(server.url, "/v1/chat/completions", {"model": "m", "messages": [], "stream": stream})
        assert caught.value.partial
        assert server.asked[0].outcome is Outcome.CUT


def test_a_client_that_hangs_up_is_seen() -> None:
    with ModelServer({"default": {"fail": "timeout"}}) as server:
        with connection(server.url) as link:
            link.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": []}))
            server.wait(lambda asked: len(asked) == 1)
            assert server.asked[0].outcome is Outcome.OPEN
        server.wait(lambda asked: asked[0].outcome is Outcome.HUNG_UP)


def test_leaving_closes_the_calls_that_were_never_answered() -> None:
    with ExitStack() as stack:
        with ModelServer({"default": {"fail": "timeout"}}) as server:
            link = stack.enter_context(connection(server.url))
            link.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": []}))
            server.wait(lambda asked: len(asked) == 1)
        with pytest.raises(http.client.RemoteDisconnected):
            link.getresponse()


def test_what_was_asked_can_be_read_and_holds_no_key() -> None:
    with ModelServer("hello") as server:
        reply(server, "what?", response_format={"type": "json_object"})
        with connection(server.url) as link:
            link.request("GET", "/asked")
            text = link.getresponse().read().decode()
        (asked,) = json.loads(text)
        assert asked["question"] == {"endpoint": "chat", "model": "gpt-scripted", "texts": ["what?"], "turn": 1}
        assert asked["body"]["response_format"] == {"type": "json_object"}
        assert (asked["status"], asked["outcome"]) == (200, "answered")
        assert "do-not-keep" not in text


def test_a_body_that_is_no_request_is_refused() -> None:
    with ModelServer("hello") as server:
        for path, body in (
            ("/v1/chat/completions", {"model": "m"}),
            ("/v1/chat/completions", [1]),
            ("/v1/chat/completions", {"model": "m", "messages": "hi"}),
            ("/v1/embeddings", {"model": "m", "input": [1, 2]}),
        ):
            assert post(server.url, path, body)[0] == 400
        assert server.asked == ()


def test_models_are_those_that_the_script_names() -> None:
    script = {"rules": [{"match": {"model": name}, "reply": "x"} for name in ("b", "a", "gpt-*")]}
    with ModelServer(script) as server, connection(server.url) as link:
        link.request("GET", "/v1/models")
        assert [model["id"] for model in json.loads(link.getresponse().read())["data"]] == ["a", "b"]


def test_texts_that_share_words_have_near_vectors() -> None:
    def likeness(one: str, other: str) -> float:
        return sum(a * b for a, b in zip(embedding(one), embedding(other), strict=True))

    assert likeness("the cat sat", "the cat sat") == pytest.approx(1)
    assert likeness("the cat sat", "a cat sat") > likeness("the cat sat", "budgets in dollars")
    assert sum(value * value for value in embedding("")) == 1


def test_embeddings_come_as_numbers_or_as_base64_and_can_fail_by_script() -> None:
    script = {"rules": [{"match": {"endpoint": "embeddings"}, "fail": 503, "times": 1}]}
    with ModelServer(script) as server:
        body = {"model": "m", "input": ["a cat", "a dog"], "dimensions": 16}
        assert post(server.url, "/v1/embeddings", body)[0] == 503
        value = json.loads(post(server.url, "/v1/embeddings", body)[2])
        assert [item["embedding"] for item in value["data"]] == [embedding("a cat", 16), embedding("a dog", 16)]
        packed = json.loads(post(server.url, "/v1/embeddings", body | {"encoding_format": "base64"})[2])
        numbers = struct.unpack("<16f", base64.b64decode(packed["data"][1]["embedding"]))
        assert list(numbers) == pytest.approx(embedding("a dog", 16))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules:\n- reply: x\n  tmes: 2", "s.yaml:3: rules[0].tmes: is not known here (did you mean 'times'?)"),
        ("rules:\n- {json: 1, fail: 429}", "s.yaml:2: rules[0]: gives json and fail: keep one of them"),
        ("rules:\n- times: 1", "s.yaml:2: rules[0]: says no answer: give one of reply, json, tool_calls, fail"),
        (
            "default:\n  fail: 200",
            "s.yaml:2: default.fail: 200 is no failure: write a status from 400 to 599, or one of timeout, cut, "
            "invalid_json",
        ),
        (
            "rules:\n- match: {regex: '(?P<title>.*)'}\n  reply: about $titel",
            "s.yaml:2: rules[0]: $titel is not known here (did you mean 'title'?); '$$' is a dollar sign",
        ),
        (
            "default: {reply: costs $5}",
            "s.yaml:1: default: 'costs $5' has a '$' that names nothing: write '$$' for a dollar sign",
        ),
        (
            "default: {reply: x, retry_after: 1}",
            "s.yaml:1: default: error and retry_after belong to a fail with an HTTP status, such as 429",
        ),
        (
            "rules:\n- match: {endpoint: embeddings}\n  reply: x",
            "s.yaml:2: rules[0]: reply is no answer to an embeddings call: only fail, delay and usage are",
        ),
        ("rules: []\nrules: []", "s.yaml:2: rules is there twice"),
        ("- x", "s.yaml:1: must be a mapping; its keys: rules, default"),
        ("rules: [", "s.yaml:1: is not YAML: expected the node content, but found '<stream end>'"),
    ],
)
def test_a_script_that_cannot_be_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Script.parse(text, "s.yaml")
    assert str(caught.value) == message


def test_a_script_in_json_and_one_from_python_are_the_same() -> None:
    value = {"rules": [{"match": {"turn": 1}, "json": None}], "default": {"reply": "x"}}
    assert Script.parse(json.dumps(value, indent="\t")) == Script.of(value)
    assert Script.of(value).rules[0].has_value


def test_a_script_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read: No such file"):
        Script.load(tmp_path / "none.yaml")


def test_the_example_script_answers_what_its_comments_promise() -> None:
    with ModelServer(EXAMPLE) as server:
        title = "Classify this issue: it crashes\nplease help"
        assert json.loads(reply(server, title)) == {"kind": "bug", "title": "it crashes"}
        assert [chat(server, "call a busy model")[0] for _ in range(3)] == [429, 429, 200]
        assert chat(server, "call a broken model")[1]["error"]["message"] == "The model has fallen over."
        assert chat(server, "What changed last?")[1]["choices"][0]["finish_reason"] == "tool_calls"
        assert reply(server, "What changed last?", "", "a typo") == "The last change: a typo"
        assert reply(server, "hello") == "You said: hello"


def test_serve_runs_until_it_is_told_to_stop_even_with_a_call_open() -> None:
    code = (
        "from ferrum.testing.model_server import serve\n"
        "serve({'default': {'fail': 'timeout'}}, '127.0.0.1', 0, lambda url: print(url, flush=True))"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            with connection(url) as link:
                link.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": []}))
                while b'"open"' not in get(url, "/asked"):
                    pass
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def get(url: str, path: str) -> bytes:
    with connection(url) as link:
        link.request("GET", path)
        return link.getresponse().read()


def test_a_port_that_is_taken_is_an_error_of_serve() -> None:
    from ferrum.testing.model_server import serve

    with (
        closing(socket.create_server(("127.0.0.1", 0))) as taken,
        pytest.raises(OSError, match="address already in use"),
    ):
        serve("x", "127.0.0.1", taken.getsockname()[1], lambda url: None)


def test_many_clients_at_once_use_a_rule_up_exactly() -> None:
    script = {"rules": [{"reply": "first", "times": 5}], "default": {"reply": "rest"}}
    with ModelServer(script) as server:
        replies: list[str] = []
        threads = [threading.Thread(target=lambda: replies.append(reply(server, "hello"))) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(replies) == ["first"] * 5 + ["rest"] * 7

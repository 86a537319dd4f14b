"""A scripted model server: what a model provider answers over HTTP, by a script, without a model.

It speaks as much of the OpenAI API as clients use: chat completions (plain and streamed, with tools), embeddings and
the list of models. `GET /asked` says what it was asked.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import re
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web
from pydantic import BaseModel, ConfigDict, JsonValue

from ferrum.testing.script import Answer, Question, Script, ScriptedUsage, fill

#: What clients of a scripted server send as their key. The server does not look at it.
API_KEY: Final = "sk-scripted"

_DIMENSIONS: Final = 64

#: The error codes of OpenAI that clients look at.
_CODES: Final = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded", 500: "server_error"}


class Outcome(StrEnum):
    """What became of a call."""

    #: It was received and has no answer yet.
    OPEN = "open"
    #: An answer was sent whole; an HTTP error and broken JSON are answers too.
    ANSWERED = "answered"
    #: The server closed the connection in the middle of the answer, as the script said.
    CUT = "cut"
    #: The client closed the connection before it had its answer.
    HUNG_UP = "hung_up"


class Asked(BaseModel):
    """One call that the server received. No header is kept, so no key is."""

    model_config = ConfigDict(frozen=True)

    #: 1 for the first.
    number: int
    question: Question
    #: What was sent, whole.
    body: dict[str, JsonValue]
    #: The place of the rule that answers, from 0; `None` for the script's default, and where nothing matched.
    rule: int | None
    #: The HTTP status that the script says; 200 for answers that break off, too.
    status: int
    outcome: Outcome = Outcome.OPEN


class ModelServer:
    """A scripted model server on a thread and a port of its own, on 127.0.0.1, for the length of a `with`.

    `script` is a `Script`, a file's path, Python values, or one reply to everything. Leaving the `with` closes the
    connections of calls that are still open.
    """

    def __init__(self, script: Script | Path | str | Mapping[str, Any]) -> None:
        self._ledger = _Ledger(Script.of(script))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scripted-models", daemon=True)
        self._url = ""

    @property
    def url(self) -> str:
        """`http://127.0.0.1:<port>/v1`."""
        return self._url

    @property
    def environ(self) -> dict[str, str]:
        """What to set so that litellm and OpenAI's own client ask this server for every `openai/…` model."""
        return {"OPENAI_API_BASE": self.url, "OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": API_KEY}

    @property
    def asked(self) -> tuple[Asked, ...]:
        """The calls received so far, in order."""
        return self._ledger.asked

    def wait(self, until: Callable[[tuple[Asked, ...]], bool], timeout_s: float = 10) -> tuple[Asked, ...]:
        """What was asked, as soon as `until` is true of it. Raises `TimeoutError`."""
        return self._ledger.wait(until, timeout_s)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(_serve(self._ledger, "127.0.0.1", 0, self._started, self._stop))
        except OSError as error:
            self._failure = error
        finally:
            self._ready.set()

    def _started(self, url: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._url = url
        self._ready.set()


def serve(script: Script | Path | str | Mapping[str, Any], host: str, port: int, ready: Callable[[str], None]) -> None:
    """Run a scripted model server in the calling thread until SIGINT or SIGTERM, or forever outside the main thread.

    `ready` is called with the URL, which ends in `/v1`, once it listens. Port 0 takes a free one. Raises `OSError`
    where it cannot listen.
    """
    asyncio.run(_until_signalled(_Ledger(Script.of(script)), host, port, ready))


async def _until_signalled(ledger: _Ledger, host: str, port: int, ready: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
    await _serve(ledger, host, port, ready, stop)


async def _serve(ledger: _Ledger, host: str, port: int, ready: Callable[[str], None], stop: asyncio.Event) -> None:
    # A client that hangs up cancels its handler; so does a shutdown, after the short time that handlers get to end.
    runner = web.AppRunner(_application(ledger), handler_cancellation=True, shutdown_timeout=0.05, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        listening: tuple[str, int] = runner.addresses[0][:2]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{listening[1]}/v1")
        await stop.wait()
    finally:
        await runner.cleanup()


def _application(ledger: _Ledger) -> web.Application:
    async def chat(request: web.Request) -> web.StreamResponse:
        return await _answer(ledger, request, _chat_question)

    async def embeddings(request: web.Request) -> web.StreamResponse:
        return await _answer(ledger, request, _embeddings_question)

    async def models(_: web.Request) -> web.StreamResponse:
        names = [{"id": name, "object": "model", "created": 0, "owned_by": "script"} for name in ledger.models]
        return web.json_response({"object": "list", "data": names})

    async def asked(_: web.Request) -> web.StreamResponse:
        return web.json_response([call.model_dump(mode="json") for call in ledger.asked])

    application = web.Application(client_max_size=64 * 1024**2)
    application.router.add_post("/v1/chat/completions", chat)
    application.router.add_post("/v1/embeddings", embeddings)
    application.router.add_get("/v1/models", models)
    for path in ("/asked", "/v1/asked"):
        application.router.add_get(path, asked)
    return application


class _Ledger:
    """What was asked and how often each rule answered; read by any thread, written by the server's."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._changed = threading.Condition()
        self._asked: list[Asked] = []
        self._used: Counter[int] = Counter()

    @property
    def asked(self) -> tuple[Asked, ...]:
        with self._changed:
            return tuple(self._asked)

    @property
    def models(self) -> list[str]:
        named = {rule.match.model for rule in self.script.rules if rule.match.model}
        return sorted(name for name in named if not re.search(r"[*?\[]", name)) or ["scripted"]

    def take(self, question: Question, body: dict[str, JsonValue]) -> tuple[int, Answer]:
        """Write the call down; its number, and the answer with its texts filled in."""
        with self._changed:
            number = len(self._asked) + 1
            rule, answer = self._choose(question, number)
            if rule is not None:
                self._used[rule] += 1
            status = answer.fail if isinstance(answer.fail, int) else 200
            self._asked.append(Asked(number=number, question=question, body=body, rule=rule, status=status))
            self._changed.notify_all()
        return number, answer

    def close(self, number: int, outcome: Outcome) -> None:
        """Write down what became of a call."""
        with self._changed:
            self._asked[number - 1] = self._asked[number - 1].model_copy(update={"outcome": outcome})
            self._changed.notify_all()

    def wait(self, until: Callable[[tuple[Asked, ...]], bool], timeout_s: float) -> tuple[Asked, ...]:
        with self._changed:
            if not self._changed.wait_for(lambda: until(tuple(self._asked)), timeout_s):
                raise TimeoutError(f"waited {timeout_s} s; the model server was asked {self._asked}")
            return tuple(self._asked)

    def _choose(self, question: Question, number: int) -> tuple[int | None, Answer]:
        chosen = self.script.choose(question, self._used)
        if chosen is None:
            return None, Answer() if question.endpoint == "embeddings" else _no_rule(question)
        rule, answer, groups = chosen
        last = question.texts[-1] if question.texts else ""
        names = {**groups, "last_message": last, "model": question.model, "count": str(number)}
        calls = answer.tool_calls and tuple(
            call.model_copy(update={"arguments": fill(call.arguments, names)}) for call in answer.tool_calls
        )
        said = answer.model_fields_set & {"reply", "value", "error"}
        texts = {name: fill(getattr(answer, name), names) for name in said}
        return rule, answer.model_copy(update={**texts, "tool_calls": calls})


def _no_rule(question: Question) -> Answer:
    last = question.texts[-1][:80] if question.texts else ""
    return Answer(
        fail=400,
        error=f"no rule of the script answers model {question.model!r} in turn {question.turn}, last message {last!r}: "
        "add a rule, or a default",
    )


async def _answer(
    ledger: _Ledger, request: web.Request, ask: Callable[[dict[str, JsonValue]], Question]
) -> web.StreamResponse:
    try:
        body = json.loads(await request.read())
        question = ask(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _error(400, f"the body is not what this address takes: {type(error).__name__}: {error}", None)
    number, answer = ledger.take(question, body)
    outcome = Outcome.HUNG_UP
    try:
        response = await _perform(request, number, question, body, answer)
        outcome = Outcome.CUT if answer.fail == "cut" else Outcome.ANSWERED
        return response
    except ConnectionError:
        return web.Response()
    finally:
        ledger.close(number, outcome)


async def _perform(
    request: web.Request, number: int, question: Question, body: dict[str, JsonValue], answer: Answer
) -> web.StreamResponse:
    await asyncio.sleep(answer.delay)
    if answer.fail == "timeout":
        await asyncio.Event().wait()
    if isinstance(answer.fail, int):
        return _error(answer.fail, answer.error or f"scripted failure {answer.fail}", answer.retry_after)
    if question.endpoint == "embeddings":
        return await _send(request, answer, _embeddings(question, body, answer.usage))
    if body.get("stream"):
        options = body.get("stream_options")
        with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return await _stream(request, answer, _chunks(number, question, answer, with_usage))
    return await _send(request, answer, _completion(number, question, answer))


async def _send(request: web.Request, answer: Answer, value: Mapping[str, Any]) -> web.StreamResponse:
    data = json.dumps(value, ensure_ascii=False).encode()
    if answer.fail == "invalid_json":
        return web.Response(body=data[: len(data) // 2], content_type="application/json")
    response = web.Response(body=data, content_type="application/json")
    if answer.fail != "cut":
        return response
    partial = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(data))})
    await partial.prepare(request)
    await partial.write(data[: len(data) // 2])
    _cut(request)
    return partial


async def _stream(request: web.Request, answer: Answer, chunks: list[dict[str, Any]]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    if answer.fail in ("cut", "invalid_json"):
        chunks = chunks[: max(1, len(chunks) // 2)]
    for chunk in chunks:
        await response.write(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())
    if answer.fail == "cut":
        _cut(request)
        return response
    await response.write(b'data: {"id": "chatcmpl-\n\n' if answer.fail == "invalid_json" else b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        # Not abort(): what was written reaches the client first, so that it has half an answer and not none.
        request.transport.close()


def _error(status: int, message: str, retry_after: float | str | None) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = _CODES.get(status)
    if "maximum context length" in message:
        code = "context_length_exceeded"
    headers = {} if retry_after is None else {"Retry-After": _number(retry_after)}
    value = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return web.json_response(value, status=status, headers=headers)


def _number(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _chat_question(body: dict[str, JsonValue]) -> Question:
    messages = body["messages"]
    if not isinstance(messages, list):
        raise TypeError("messages must be a list")
    said = [message for message in messages if isinstance(message, dict)]
    return Question(
        endpoint="chat",
        model=str(body["model"]),
        texts=tuple(_text(message.get("content")) for message in said),
        turn=1 + sum(message.get("role") == "assistant" for message in said),
    )


def _text(content: JsonValue) -> str:
    """A message's content as text; of one in parts, the texts."""
    if isinstance(content, list):
        return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)
    return content if isinstance(content, str) else ""


def _embeddings_question(body: dict[str, JsonValue]) -> Question:
    given = body["input"]
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("input must be a text or a list of texts")
    return Question(endpoint="embeddings", model=str(body["model"]), texts=tuple(str(text) for text in texts))


def _completion(number: int, question: Question, answer: Answer) -> dict[str, Any]:
    content, calls = _content(answer), _tool_calls(answer)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return {
        **_head(number, question, "chat.completion"),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(answer)}],
        "usage": _usage(question, content, calls, answer.usage),
    }


def _chunks(number: int, question: Question, answer: Answer, with_usage: bool) -> list[dict[str, Any]]:
    content, calls = _content(answer), _tool_calls(answer)
    head = _head(number, question, "chat.completion.chunk")
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "" if content is not None else None}]
    deltas += [{"content": piece} for piece in re.findall(r"\s*\S+\s*?|\s+", content or "")]
    deltas += [{"tool_calls": [{"index": index, **call}]} for index, call in enumerate(calls)]
    reasons = [None] * len(deltas) + [_finish_reason(answer)]
    deltas.append({})
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        for delta, reason in zip(deltas, reasons, strict=True)
    ]
    if with_usage:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        chunks.append({**head, "choices": [], "usage": _usage(question, content, calls, answer.usage)})
    return chunks


def _head(number: int, question: Question, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{number}", "object": kind, "created": int(time.time()), "model": question.model}


def _content(answer: Answer) -> str | None:
    if answer.has_value:
        return json.dumps(answer.value, ensure_ascii=False)
    if answer.fail is not None:
        return "this answer breaks off before it has ended"
    return answer.reply


def _tool_calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id or f"call_{place}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for place, call in enumerate(answer.tool_calls or (), 1)
    ]


def _finish_reason(answer: Answer) -> str:
    return answer.finish_reason or ("tool_calls" if answer.tool_calls else "stop")


def _usage(
    question: Question, content: str | None, calls: list[dict[str, Any]], given: ScriptedUsage
) -> dict[str, int]:
    written = (content or "") + "".join(call["function"]["name"] + call["function"]["arguments"] for call in calls)
    asked = _tokens("".join(question.texts)) if given.input_tokens is None else given.input_tokens
    answered = _tokens(written) if given.output_tokens is None else given.output_tokens
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def _tokens(text: str) -> int:
    return math.ceil(len(text) / 4)


def _embeddings(question: Question, body: dict[str, JsonValue], given: ScriptedUsage) -> dict[str, Any]:
    wanted = body.get("dimensions")
    size = wanted if isinstance(wanted, int) and wanted > 0 else _DIMENSIONS
    vectors = [embedding(text, size) for text in question.texts]
    packed = body.get("encoding_format") == "base64"
    tokens = _tokens("".join(question.texts)) if given.input_tokens is None else given.input_tokens
    return {
        "object": "list",
        "model": question.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _pack(vector) if packed else vector}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def embedding(text: str, dimensions: int = _DIMENSIONS) -> list[float]:
    """A text's vector, of length 1: the same text has always the same, texts that share words are near each other.

    Each word adds one to, or takes one from, a place that its hash names (feature hashing).
    """
    vector = [0.0] * dimensions
    for word in re.findall(r"\w+", text.lower()):
        number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        vector[(number >> 1) % dimensions] += 1 if number & 1 else -1
    length = math.hypot(*vector)
    return [value / length for value in vector] if length else [1.0, *vector[1:]]


def _pack(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

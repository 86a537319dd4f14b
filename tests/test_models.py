"""Model calls, their prices, and answers of a given shape; litellm speaks to a scripted server over HTTP."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fleet import PATIENCE_S

from ferrum import settings as settings_room
from ferrum.errors import ModelError, OutputError, SettingsError
from ferrum.governance.acts import Embedding, ModelCall, ModelReply
from ferrum.models import calls, embeddings, prices, structured
from ferrum.models.calls import aclose, complete
from ferrum.models.choice import DEFAULTS, default_model, ollama_base
from ferrum.settings import Settings
from ferrum.testing.model_server import ModelServer, Outcome, embedding
from ferrum.untrusted import Marks

ROOT = Path(__file__).parent.parent

T = TypeVar("T")

KIND: dict[str, Any] = {
    "type": "object",
    "required": ["kind"],
    "properties": {"kind": {"enum": ["bug", "question"]}},
}


@pytest.fixture(autouse=True)
def fresh_settings() -> Iterator[None]:
    """Settings and secrets are read anew, before the test and after it."""
    settings_room.settings.cache_clear()
    settings_room._secrets.cache_clear()
    yield
    settings_room.settings.cache_clear()
    settings_room._secrets.cache_clear()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    async def main() -> T:
        try:
            return await coroutine
        finally:
            await aclose()

    return asyncio.run(main())


def call(text: str = "hello", model: str = "openai/scripted", **more: Any) -> ModelCall:
    return ModelCall(model=model, messages=({"role": "user", "content": text},), **more)


def asks(monkeypatch: pytest.MonkeyPatch, server: ModelServer) -> None:
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)


def answer_of(monkeypatch: pytest.MonkeyPatch, script: Any, asked: ModelCall) -> ModelReply:
    with ModelServer(script) as server:
        asks(monkeypatch, server)
        return run(complete(asked))


def error_of(monkeypatch: pytest.MonkeyPatch, script: Any, asked: ModelCall | None = None) -> ModelError:
    with ModelServer(script) as server:
        asks(monkeypatch, server)
        with pytest.raises(ModelError) as caught:
            run(complete(asked or call()))
    # The scripted server would have answered a second request, too: nothing below us tries again by itself.
    assert len(server.asked) == 1
    return caught.value


def price_file(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> Path:
    path = folder / "prices.yaml"
    path.write_text(text)
    monkeypatch.setenv("FERRUM_PRICES", str(path))
    return path


def test_an_answer_comes_with_its_usage_and_its_cost_by_the_price_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    price_file(monkeypatch, tmp_path, "models:\n  openai/scripted: {input: 0.5, output: 2}\n")
    script = {"default": {"reply": "you said $last_message", "usage": {"input_tokens": 1000, "output_tokens": 500}}}
    reply = answer_of(monkeypatch, script, call("hi"))
    assert (reply.text, reply.model, reply.finish_reason) == ("you said hi", "scripted", "stop")
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (1000, 500)
    assert reply.usage.cost_usd == pytest.approx(0.0015)
    assert (reply.usage.model_calls, reply.usage.unpriced_calls) == (1, 0)


def test_a_call_of_a_model_without_a_price_says_that_it_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = answer_of(monkeypatch, "hi", call()).usage
    assert (usage.cost_usd, usage.unpriced_calls) == (0.0, 1)


def test_what_the_call_says_is_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"})
    with ModelServer("hi") as server:
        asks(monkeypatch, server)
        run(complete(ModelCall(model="openai/scripted", messages=messages, temperature=0.2, max_tokens=7)))
    assert server.asked[0].body == {
        "model": "scripted",
        "messages": list(messages),
        "temperature": 0.2,
        "max_tokens": 7,
    }


def test_an_answer_that_was_cut_at_max_tokens_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = answer_of(monkeypatch, {"default": {"reply": "to be or", "finish_reason": "length"}}, call())
    assert reply.finish_reason == "length"


@pytest.mark.parametrize(
    ("failure", "what"),
    [
        ({"fail": 429}, "asks us to slow down: try again later"),
        ({"fail": 408}, "failed on its provider's side with status 408"),
        ({"fail": 500}, "failed on its provider's side: try again"),
        ({"fail": 502}, "failed on its provider's side with status 502"),
        ({"fail": 503}, "failed on its provider's side with status 503"),
        ({"fail": 504}, "failed on its provider's side with status 504"),
        ({"fail": 529}, "failed on its provider's side with status 529"),
        ({"fail": "cut"}, "the connection broke off"),
        ({"fail": "invalid_json"}, "answered with something that is no answer"),
    ],
)
def test_a_failure_that_may_pass_is_to_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, failure: dict[str, Any], what: str
) -> None:
    error = error_of(monkeypatch, {"default": failure})
    assert error.retry
    assert error.retry_after_s is None
    assert error.message.startswith("model 'openai/scripted' ")
    assert what in error.message


@pytest.mark.parametrize(
    ("failure", "what"),
    [
        ({"fail": 400}, "refused the call with status 400: change what is asked (scripted failure 400)"),
        ({"fail": 401}, "has no key that works"),
        ({"fail": 403}, "has no key that works"),
        ({"fail": 404}, "is not known to its provider"),
        ({"fail": 413}, "refused the call with status 413"),
        ({"fail": 422}, "refused the call with status 422"),
        ({"fail": 429, "error": "insufficient_quota: see your plan"}, "has no credit left"),
        ({"fail": 400, "error": "This model's maximum context length is 8192 tokens."}, "cannot take so long a prompt"),
        ({"fail": 400, "error": "content_policy_violation"}, "may not answer, by its provider's content policy"),
    ],
)
def test_a_failure_that_would_come_again_is_final(
    monkeypatch: pytest.MonkeyPatch, failure: dict[str, Any], what: str
) -> None:
    error = error_of(monkeypatch, {"default": failure})
    assert not error.retry
    assert error.message.startswith("model 'openai/scripted' ")
    assert what in error.message


def test_a_wait_that_the_provider_asks_for_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (429, 503, 529):
        assert error_of(monkeypatch, {"default": {"fail": status, "retry_after": 2.5}}).retry_after_s == 2.5
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=300), usegmt=True)
    seconds = error_of(monkeypatch, {"default": {"fail": 429, "retry_after": until}}).retry_after_s
    assert seconds is not None
    assert 250 < seconds <= 300
    assert error_of(monkeypatch, {"default": {"fail": 429, "retry_after": "soon"}}).retry_after_s is None


def test_an_error_met_while_another_is_handled_is_judged_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fall_back() -> None:
        try:
            await complete(call("first"))
        except ModelError:
            await complete(call("second"))

    long = {"fail": 400, "error": "This model's maximum context length is 8192 tokens.", "retry_after": 9}
    script = {"rules": [{"match": {"contains": "first"}, **long}], "default": {"fail": 500}}
    with ModelServer(script) as server:
        asks(monkeypatch, server)
        with pytest.raises(ModelError) as caught:
            run(fall_back())
    assert caught.value.retry
    assert caught.value.retry_after_s is None


def test_a_server_that_is_not_there_may_be_there_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelServer("gone") as server:
        asks(monkeypatch, server)
    with pytest.raises(ModelError, match="could not be reached") as caught:
        run(complete(call()))
    assert caught.value.retry


def test_a_missing_key_and_an_unknown_provider_are_final(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ModelError, match="has no key that works") as caught:
        run(complete(call()))
    assert not caught.value.retry
    with pytest.raises(ModelError, match="names no provider that is known") as caught:
        run(complete(call(model="nobody/gtp-5")))
    assert not caught.value.retry


def test_a_secret_that_the_provider_repeats_is_not_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret-1234")
    error = error_of(monkeypatch, {"default": {"fail": 401, "error": "Incorrect key: sk-very-secret-1234."}})
    assert "sk-very-secret-1234" not in str(error)
    assert "Incorrect key: ***." in error.message


def test_a_cancelled_call_hangs_up_on_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancel_when_asked(server: ModelServer) -> None:
        task = asyncio.create_task(complete(call()))
        await asyncio.to_thread(server.wait, lambda asked: len(asked) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Still inside the loop, before any connection is closed for another reason.
        await asyncio.to_thread(server.wait, lambda asked: asked[0].outcome is Outcome.HUNG_UP)

    with ModelServer({"default": {"fail": "timeout"}}) as server:
        asks(monkeypatch, server)
        run(cancel_when_asked(server))


def test_a_call_that_is_timed_out_from_outside_hangs_up_on_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def call_until_asked(server: ModelServer) -> None:
        async def end(limit: asyncio.Timeout) -> None:
            await asyncio.to_thread(server.wait, lambda asked: len(asked) == 1)
            limit.reschedule(asyncio.get_running_loop().time())

        async with asyncio.timeout(None) as limit:
            ending = asyncio.create_task(end(limit))
            await complete(call())
        await ending

    async def give_up(server: ModelServer) -> None:
        with pytest.raises(TimeoutError):
            await call_until_asked(server)
        await asyncio.to_thread(server.wait, lambda asked: asked[0].outcome is Outcome.HUNG_UP)

    with ModelServer({"default": {"fail": "timeout"}}) as server:
        asks(monkeypatch, server)
        run(give_up(server))


def test_calls_run_beside_each_other_and_again_after_the_connections_were_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def many() -> list[ModelReply]:
        first = await asyncio.gather(*(complete(call(f"n{number}")) for number in range(20)))
        await aclose()
        return [*first, await complete(call("again"))]

    with ModelServer({"default": {"reply": "$last_message"}}) as server:
        asks(monkeypatch, server)
        assert [reply.text for reply in run(many())] == [*(f"n{number}" for number in range(20)), "again"]


def test_a_model_that_knows_schemas_is_given_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelServer({"default": {"json": {"kind": "bug"}}}) as server:
        asks(monkeypatch, server)
        reply = run(complete(call(model="openai/gpt-4.1-mini", output_schema=KIND)))
    assert structured.parse(reply.text, KIND) == {"kind": "bug"}
    assert server.asked[0].body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": KIND, "strict": False},
    }
    assert server.asked[0].question.texts == ("hello",)


def test_a_model_that_knows_only_json_is_told_the_schema_after_the_authors_instruction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"})
    with ModelServer({"default": {"json": {"kind": "bug"}}}) as server:
        asks(monkeypatch, server)
        run(complete(ModelCall(model="openai/scripted", messages=messages, output_schema=KIND)))
    assert server.asked[0].body["response_format"] == {"type": "json_object"}
    first, second, third = server.asked[0].question.texts
    assert (first, third) == ("be brief", "hello")
    assert json.loads(second.splitlines()[-1]) == KIND


def test_a_schema_of_no_object_is_only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelServer({"default": {"json": [1]}}) as server:
        asks(monkeypatch, server)
        run(complete(call(model="openai/gpt-4.1-mini", output_schema={"type": "array"})))
    assert "response_format" not in server.asked[0].body
    assert '{"type":"array"}' in server.asked[0].question.text


def test_a_wrong_answer_is_repaired_in_one_more_round(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask_twice() -> object:
        asked = call(output_schema=KIND)
        reply = await complete(asked)
        try:
            return structured.parse(reply.text, KIND)
        except OutputError as error:
            again = await complete(structured.repair_messages(asked, reply.text, error, Marks("secret")))
            return structured.parse(again.text, KIND)

    script = {
        "rules": [
            {"match": {"turn": 1}, "reply": 'Sure: {"kind": "bug"}'},
            {
                "match": {"turn": 2, "regex": "cannot be used: <untrusted-.*>the answer is not JSON"},
                "json": {"kind": "question"},
            },
        ]
    }
    with ModelServer(script) as server:
        asks(monkeypatch, server)
        assert run(ask_twice()) == {"kind": "question"}
        assert server.asked[1].question.texts[2] == 'Sure: {"kind": "bug"}'


# When litellm streams it builds pydantic models from its own TypedDicts, and walks over attributes of instances.
@pytest.mark.filterwarnings("ignore:Item 'summary' on TypedDict class:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:Accessing the 'model_.*' attribute on the instance is deprecated:DeprecationWarning"
)
def test_litellm_understands_the_scripted_servers_streams_and_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.warm()
    import litellm

    async def stream() -> list[Any]:
        chunks = await litellm.acompletion(
            model="openai/scripted",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        return [chunk async for chunk in chunks]

    script = {"default": {"reply": "to be or not", "usage": {"input_tokens": 5, "output_tokens": 4}}}
    with ModelServer(script) as server:
        asks(monkeypatch, server)
        chunks = run(stream())
        vectors = run(litellm.aembedding(model="openai/embedder", input=["a cat", "a dog"]))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "to be or not"
    assert [chunk.usage.total_tokens for chunk in chunks if getattr(chunk, "usage", None)] == [9]
    assert [item["embedding"] for item in vectors.data] == [
        pytest.approx(embedding("a cat"), abs=1e-6),
        pytest.approx(embedding("a dog"), abs=1e-6),
    ]


def test_litellm_is_imported_by_the_first_call_and_by_nothing_before() -> None:
    code = (
        "import sys\n"
        "from ferrum.models import calls, choice, prices, structured\n"
        "from ferrum.testing import model_server\n"
        "prices.cost('openai/gpt-4.1-mini', 1, 1)\n"
        "assert not {'litellm', 'openai', 'httpx'} & sys.modules.keys(), 'too early'\n"
        "calls.warm()\n"
        "assert 'litellm' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_closing_before_any_call_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls._litellm, "cache_info", lambda: type("Info", (), {"currsize": 0}))
    asyncio.run(aclose())


def test_prices_are_litellms_table_where_the_operator_says_nothing() -> None:
    assert prices.cost("openai/gpt-4.1-mini", 1_000_000, 1_000_000) == pytest.approx(0.4 + 1.6)
    assert prices.cost("gpt-4.1-mini", 1_000_000, 0) == pytest.approx(0.4)
    assert prices.cost("anthropic/claude-sonnet-4-5", 1_000, 1_000) == pytest.approx(0.003 + 0.015)
    assert prices.cost("bedrock/anthropic.claude-haiku-4-5-20251001-v1:0", 1_000_000, 0) == pytest.approx(1)


def test_a_long_prompt_costs_what_long_prompts_cost() -> None:
    assert prices.cost("openai/gpt-5.6-terra", 272_000, 1_000) == pytest.approx(0.544 + 0.012)
    assert prices.cost("openai/gpt-5.6-terra", 300_000, 1_000) == pytest.approx(1.2 + 0.018)


def test_a_model_that_nobody_knows_has_no_price_and_one_of_ollama_is_free() -> None:
    assert prices.cost("openai/made-up", 1, 1) is None
    assert prices.cost("anthropic/gpt-4.1-mini", 1, 1) is None
    assert prices.cost("sample_spec", 1, 1) is None
    assert prices.cost("ollama/made-up", 1_000_000, 1_000_000) == 0.0


def test_the_price_file_wins_and_its_aliases_are_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    price_file(
        monkeypatch,
        tmp_path,
        "models: {openai/gpt-4.1-mini: {input: 1, output: 2}}\naliases: {mini: openai/gpt-4.1-mini}",
    )
    assert prices.cost("openai/gpt-4.1-mini", 1_000_000, 1_000_000) == pytest.approx(3)
    assert prices.cost("mini", 1_000_000, 0) == pytest.approx(1)
    assert prices.resolve("mini") == "openai/gpt-4.1-mini"
    assert prices.resolve("openai/other") == "openai/other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n  a/b: {input: -1, output: 2}", "2: models.a/b.input: Input should be greater than or equal to 0"),
        ("models:\n  a/b:\n    inptu: 1\n    output: 2", "2: models.a/b.input: is missing"),
        (
            "models:\n  a/b:\n    inptu: 1\n    output: 2",
            "3: models.a/b.inptu: is not known here (did you mean 'input'?)",
        ),
        ("aliases: {a: b, b: c}", "1: alias 'a' names 'b', which is an alias too: name the model itself"),
        ("models: {", "1: is not YAML: "),
    ],
)
def test_a_bad_price_file_is_refused_with_its_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, message: str
) -> None:
    path = price_file(monkeypatch, tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        prices.cost("a/b", 1, 1)
    assert f"{path}:{message}" in str(caught.value)


def test_an_estimate_is_above_what_the_scripted_server_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = call("word " * 400, max_tokens=50)
    estimate = prices.estimate(asked)
    used = answer_of(monkeypatch, "hi", asked).usage
    assert used.input_tokens < estimate.input_tokens < 2 * used.input_tokens
    assert estimate.output_tokens == 50
    assert estimate.unpriced_calls == 1
    assert prices.estimate(call()).output_tokens == prices.DEFAULT_OUTPUT_TOKENS


def test_an_estimate_counts_a_picture_as_a_picture_and_other_scripts_by_their_bytes() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    message: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "what is it?"}, picture]}
    assert prices.estimate(ModelCall(model="openai/m", messages=(message,))).input_tokens < 3_000
    assert prices.estimate(call("犬" * 300)).input_tokens >= 300


def test_the_default_model_is_the_settings_and_else_goes_with_the_key() -> None:
    assert default_model(Settings(model="openai/mine"), {"ANTHROPIC_API_KEY": "x"}) == "openai/mine"
    assert default_model(Settings(), {"ANTHROPIC_API_KEY": "x", "OPENAI_API_KEY": "x"}).startswith("anthropic/")
    assert default_model(Settings(), {"ANTHROPIC_API_KEY": "", "OPENAI_API_KEY": "x"}).startswith("openai/")
    assert default_model(Settings(), {"OLLAMA_HOST": "gpu"}).startswith("ollama/")
    with pytest.raises(SettingsError, match="set FERRUM_MODEL, or one of ANTHROPIC_API_KEY"):
        default_model(Settings(), {})


def test_every_default_model_has_a_price() -> None:
    assert all(prices.cost(model, 1, 1) is not None for model in DEFAULTS.values())


def test_ollamas_host_is_understood_as_its_own_clients_do() -> None:
    for host, url in {
        "gpu": "http://gpu:11434",
        "gpu:80": "http://gpu:80",
        "[::1]": "http://[::1]:11434",
        "https://gpu.example/": "https://gpu.example",
    }.items():
        assert ollama_base({"OLLAMA_HOST": host}) == url
    assert ollama_base({}) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "bug"}',
        ' \n{"kind": "bug"}\n',
        '```json\n{"kind": "bug"}\n```',
        'Here it is:\n```\n{"kind": "bug"}\n```\nAnything else?',
    ],
)
def test_an_answer_is_read_with_or_without_a_fence(text: str) -> None:
    assert structured.parse(text, KIND) == {"kind": "bug"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "poem"}', "the answer breaks output_schema at $.kind: 'poem' is not one of ['bug', 'question']"),
        ("{}", "the answer breaks output_schema at $: 'kind' is a required property"),
        ("a bug", "the answer is not JSON: Expecting value at line 1, column 1, in 'a bug'"),
        ('{"kind": NaN}', "the answer is not JSON that can be kept: NaN is not a JSON number"),
        ('{"kind": "\\ud800"}', "the answer is not JSON that can be kept: "),
        ("[" * 100_000, "the answer is not JSON that can be kept: "),
        ("", "the answer is not JSON: Expecting value at line 1, column 1, in ''"),
    ],
)
def test_a_wrong_answer_says_where_and_why_and_may_be_tried_again(text: str, message: str) -> None:
    with pytest.raises(OutputError) as caught:
        structured.parse(text, KIND)
    assert message in caught.value.message
    assert caught.value.retry
    assert len(caught.value.message) < 1000


def test_a_message_about_a_large_value_keeps_the_rule_that_it_breaks() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 10}}}
    with pytest.raises(OutputError) as caught:
        structured.parse(json.dumps({"text": "x" * 10_000}), schema)
    assert "$.text" in caught.value.message
    assert '{"maxLength": 10}' in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objekt"}, "output_schema is not a JSON Schema: "),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "output_schema refers to 'http://127.0.0.1:9/schema.json'"),
        ({"$ref": "#/$defs/none"}, "output_schema refers to "),
    ],
)
def test_a_schema_that_cannot_be_used_is_final_and_nothing_is_fetched_for_it(
    schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(OutputError) as caught:
        structured.parse("{}", schema)
    assert message in caught.value.message
    assert not caught.value.retry


def test_a_repair_of_an_empty_answer_does_not_repeat_it() -> None:
    asked = call(output_schema=KIND)
    repair = structured.repair_messages(asked, "  ", OutputError("the answer is not JSON", retry=True), Marks("secret"))
    assert [message["role"] for message in repair.messages] == ["user", "user"]
    assert repair.model_copy(update={"messages": asked.messages}) == asked


# Embeddings.


def test_embeddings_come_in_the_order_of_the_texts_with_their_cost_by_the_price_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    price_file(monkeypatch, tmp_path, "models:\n  openai/scripted: {input: 0.5, output: 2}\n")
    texts = ("one text", "another", "one text")
    asked = Embedding(model="openai/scripted", texts=texts)
    counted = {"match": {"endpoint": "embeddings"}, "delay": 0, "usage": {"input_tokens": 1000}}
    with ModelServer({"rules": [counted]}) as server:
        asks(monkeypatch, server)
        reply = run(embeddings.embed(asked))
    assert [list(vector) for vector in reply.vectors] == [pytest.approx(embedding(text)) for text in texts]
    assert reply.model == "scripted"
    assert (reply.usage.model_calls, reply.usage.input_tokens, reply.usage.output_tokens) == (1, 1000, 0)
    assert reply.usage.cost_usd == pytest.approx(0.0005)


def test_an_estimate_of_an_embedding_is_no_lower_than_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Embedding(model="openai/scripted", texts=("some words " * 50, "", "字" * 20))
    with ModelServer("never asked") as server:
        asks(monkeypatch, server)
        used = run(embeddings.embed(asked)).usage
    estimated = prices.estimate(asked)
    assert estimated.input_tokens >= used.input_tokens > 0
    assert (estimated.output_tokens, estimated.model_calls) == (0, 1)


@pytest.mark.parametrize(
    ("failure", "what", "retry"),
    [
        ({"fail": 429, "retry_after": 2.5}, "asks us to slow down", True),
        ({"fail": 503}, "failed on its provider's side with status 503", True),
        ({"fail": "cut"}, "the connection broke off", True),
        ({"fail": "invalid_json"}, "answered with something that is no answer", True),
        ({"fail": 401}, "has no key that works", False),
        ({"fail": 404}, "is not known to its provider", False),
        ({"fail": 400}, "refused the call with status 400", False),
    ],
)
def test_a_failure_to_embed_is_told_like_any_other_of_a_model(
    monkeypatch: pytest.MonkeyPatch, failure: dict[str, Any], what: str, retry: bool
) -> None:
    with ModelServer({"rules": [{"match": {"endpoint": "embeddings"}, **failure}]}) as server:
        asks(monkeypatch, server)
        with pytest.raises(ModelError) as caught:
            run(embeddings.embed(Embedding(model="openai/scripted", texts=("x",))))
    assert what in caught.value.message
    assert (caught.value.retry, len(server.asked)) == (retry, 1)
    assert caught.value.retry_after_s == failure.get("retry_after")


@pytest.mark.parametrize(
    "data",
    [[], [{"index": 1, "embedding": [1.0]}], [{"index": 0, "embedding": None}], [{"index": 0, "embedding": ["x"]}]],
)
def test_an_answer_that_is_no_vectors_is_tried_again(data: list[Any]) -> None:
    with pytest.raises(ModelError, match="did not answer with a vector for each of 1 texts") as caught:
        embeddings._vectors(Embedding(model="openai/scripted", texts=("x",)), data)
    assert caught.value.retry
    with pytest.raises(ModelError, match="not of numbers"):
        embeddings._vectors(
            Embedding(model="openai/scripted", texts=("x",)), [{"index": 0, "embedding": [float("nan")]}]
        )

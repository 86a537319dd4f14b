"""The name that is decided on is the provider and the model that are called."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
from sizes import sized

from ferrum.errors import InputError, ModelError
from ferrum.governance import Effect, ModelCall, Policy
from ferrum.governance.acts import Embedding
from ferrum.governance.names import canonical, providers
from ferrum.models import prices
from ferrum.plan import Plan
from ferrum.results import RunStatus
from ferrum.testing import run_inline
from ferrum.testing.environment import environment
from ferrum.testing.model_server import ModelServer

#: All but OpenAI.
POLICY = {"allow": ["model:*", "retrieval:*"], "deny": ["model:openai/*"]}


@pytest.fixture(scope="module")
def openai() -> Iterator[ModelServer]:
    """Stands for OpenAI."""
    with (
        ModelServer({"default": {"reply": "yes"}}) as server,
        environment({**server.environ, "FERRUM_MODEL": None, "AWS_EC2_METADATA_DISABLED": "true"}),
    ):
        yield server


def ask(model: str | None, **more: Any) -> dict[str, Any]:
    said = {} if model is None else {"model": model}
    return {"name": "x", "steps": {"a": {"type": "llm", "prompt": "?", "retry": {"max_attempts": 1}, **said, **more}}}


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4o-mini",
        "openai/gpt-4o-mini",
        "openai/openai/gpt-4o-mini",
        "litellm_proxy/openai/gpt-4o-mini",
        "litellm_proxy/gpt-4o-mini",
        "openrouter/openai/gpt-4o-mini",
        "openai/responses/gpt-4o-mini",
        "custom_openai/gpt-4o-mini",
        "aiohttp_openai/gpt-4o-mini",
        "text-completion-openai/davinci-002",
        "ft:gpt-4o-mini:us::1",
        "gpt-image-1",
    ],
)
def test_no_other_name_for_a_provider_passes_what_denies_it(openai: ModelServer, model: str) -> None:
    before = len(openai.asked)
    run = run_inline(ask(model), policy=POLICY)
    assert run.status is RunStatus.POLICY_BLOCKED
    run.assert_happened("act.decided", "a", effect="deny", rule="deny[0] model:openai/*")
    assert len(openai.asked) == before


@pytest.mark.parametrize("name", ["openai/gpt-4o-mini", "openai/openai/gpt-4o-mini", "openai/responses/gpt-4o-mini"])
def test_no_longer_name_of_a_model_passes_what_denies_it(name: str) -> None:
    policy = Policy.of({"allow": ["model:*"], "deny": ["model:openai/gpt-4o-mini"]})
    assert policy.decide(ModelCall(model=name, messages=())).effect is Effect.DENY
    assert policy.decide(Embedding(model=name, texts=())).effect is Effect.DENY


def test_what_is_allowed_is_only_what_is_named() -> None:
    policy = Policy.of({"allow": ["model:openai/*"]})
    assert policy.decide(ModelCall(model="gpt-4o-mini", messages=())).effect is Effect.ALLOW
    assert policy.decide(ModelCall(model="litellm_proxy/openai/gpt-4o-mini", messages=())).effect is Effect.DENY


def test_a_bare_name_is_called_at_the_provider_that_was_decided_on(openai: ModelServer) -> None:
    before = len(openai.asked)
    run = run_inline(ask("gpt-4o-mini"), policy={"allow": ["model:openai/gpt-4o-mini"]})
    assert run.output("a") == "yes"
    run.assert_happened("act.decided", "a", target="openai/gpt-4o-mini")
    assert [one.question.model for one in openai.asked[before:]] == ["gpt-4o-mini"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("", "should have at least 1 character"),
        ("openai/", "'openai/' names no model: write 'provider/model'"),
        ("/gpt-4o", "'/gpt-4o' names no provider: write 'provider/model'"),
        ("my-finetune", "model 'my-finetune' names no provider that is known: write 'provider/model'"),
        ("openai/ gpt-4o", "is no name of a model"),
        ("openai/gpt\x00", "is no name of a model"),
        ("a/" * 12 + "x", "is no name of a model"),
        ("openai/" + "x" * 300, "is no name of a model"),
    ],
)
def test_what_names_no_model_is_refused_and_no_other_one_is_called(openai: ModelServer, model: str, why: str) -> None:
    before = len(openai.asked)
    run = run_inline(ask("{{ input.m }}") | {"inputs": {"m": {"type": "string"}}}, {"m": model}, policy=POLICY)
    assert run.status is RunStatus.FAILED
    assert why in str(run.step("a").error)
    run = run_inline(
        ask("nobody/x", fallbacks=["{{ input.m }}"]) | {"inputs": {"m": {"type": "string"}}}, {"m": model},
        policy={"allow": ["model:*"]},
    )  # fmt: skip
    assert why in str(run.step("a").error)
    assert len(openai.asked) == before


def test_an_empty_name_makes_no_act() -> None:
    for make in (lambda: ModelCall(model="", messages=()), lambda: Embedding(model="", texts=())):
        with pytest.raises(InputError, match="a model has no name"):
            make()


def test_the_default_and_those_that_follow_a_failure_and_those_that_grade_are_decided_on_by_provider(
    openai: ModelServer,
) -> None:
    before = len(openai.asked)
    with environment({"FERRUM_MODEL": "gpt-4o-mini"}):
        assert run_inline(ask(None), policy=POLICY).status is RunStatus.POLICY_BLOCKED
    run = run_inline(ask("nobody/x", fallbacks=["gpt-4o-mini"]), policy=POLICY)
    assert run.status is RunStatus.POLICY_BLOCKED
    assert [event.target for event in run.happened("act.decided")] == ["nobody/x", "openai/gpt-4o-mini"]  # type: ignore[union-attr]
    assert len(openai.asked) == before


def test_a_router_knows_the_health_of_a_model_by_its_whole_name() -> None:
    router = Plan.of(
        {"name": "x", "steps": {"r": {"type": "router", "among": {"a": {"type": "llm", "prompt": "?", "model": "x"}}}}}
    ).step("r")
    from ferrum_tasks.router import target_of

    def target(model: str) -> str:
        step = router.spec.among["a"]
        return str(target_of("a", step.model_copy(update={"params": {**step.params, "model": model}}), "x.r"))

    assert target("gpt-4o-mini") == target("openai/gpt-4o-mini") == "openai/gpt-4o-mini"
    assert target("{{ input.m }}") == "{{ input.m }}"


# litellm's own reading of a name.


def test_a_name_that_litellm_would_take_elsewhere_is_called_nowhere(openai: ModelServer) -> None:
    before = len(openai.asked)
    run = run_inline(ask("nobody/ft:gpt-4o"), policy=POLICY)
    said = "model 'nobody/ft:gpt-4o' would be called at provider 'openai', and was decided on as one of 'nobody'"
    assert said in str(run.step("a").error)
    assert len(openai.asked) == before


@pytest.mark.parametrize("provider", ["xinference", "lm_studio", "litellm_proxy", "ai21"])
def test_a_provider_without_an_address_is_not_called_at_that_of_openai(openai: ModelServer, provider: str) -> None:
    before = len(openai.asked)
    run = run_inline(ask(f"{provider}/x"), policy=POLICY)
    assert f"would be called at OpenAI's address, for {provider!r} has none" in str(run.step("a").error)
    assert len(openai.asked) == before


def test_a_proxy_that_the_operator_puts_before_all_models_is_called(openai: ModelServer) -> None:
    before = len(openai.asked)
    proxy = {"USE_LITELLM_PROXY": "true", "LITELLM_PROXY_API_BASE": openai.url, "LITELLM_PROXY_API_KEY": "sk-x"}
    with environment(proxy):
        assert run_inline(ask("anthropic/x"), policy=POLICY).status is RunStatus.COMPLETED
    assert len(openai.asked) == before + 1


def test_the_providers_are_those_that_litellm_knows(openai: ModelServer) -> None:
    from ferrum.models.calls import loaded

    litellm = asyncio.run(loaded())
    known = {getattr(one, "value", one) for one in litellm.provider_list}
    assert known <= providers()


def test_a_bare_name_has_the_provider_that_litellm_has_for_it(openai: ModelServer) -> None:
    from ferrum.governance.names import _table, family, provider_of
    from ferrum.models.calls import loaded

    litellm = asyncio.run(loaded())
    wrong = []
    for name in _table():
        if provider_of(name) is None:
            continue
        try:
            _, found, *_ = litellm.get_llm_provider(name)
        except litellm.BadRequestError:
            # It is not called by that name at all.
            continue
        if family(found) != family(canonical(name).partition("/")[0]):
            wrong.append((name, found))
    assert wrong == []


@pytest.mark.timeout(900)
def test_by_no_provider_of_litellms_does_a_call_reach_openai_that_may_not_be_called(openai: ModelServer) -> None:
    """Those that look for credentials on the network or sign in are left out."""
    slow = {"bedrock", "bedrock_mantle", "chatgpt", "github_copilot", "sagemaker", "sagemaker_chat", "sagemaker_nova"}
    before = len(openai.asked)
    known = sorted(providers() - slow)
    some = random.Random(7).sample(known, min(len(known), sized(12)))
    steps = {
        f"a{number}": {
            "type": "llm", "prompt": "?", "model": f"{provider}/gpt-4o-mini", "on_error": "continue", "timeout": "5s",
            "retry": {"max_attempts": 1},
        }
        for number, provider in enumerate(some)
    }  # fmt: skip
    run_inline({"name": "x", "steps": steps}, policy=POLICY)
    assert not openai.asked[before:]


# Prices.


def test_prices_and_aliases_are_found_by_either_name(tmp_path: Any) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(
        "models: {gpt-4o-mini: {input: 1, output: 1}, openai/mine: {input: 2, output: 2}}\n"
        "aliases: {quick: openai/mine, openai/gpt-4o: openai/mine}\n"
    )
    with environment({"FERRUM_PRICES": str(file)}):
        assert prices.cost("openai/gpt-4o-mini", 10**6, 0) == prices.cost("gpt-4o-mini", 10**6, 0) == 1
        assert [prices.resolve(name) for name in ("quick", "gpt-4o", "openai/gpt-4o")] == ["openai/mine"] * 3


def test_calls_themselves_check_where_they_go(openai: ModelServer) -> None:
    from ferrum.models import calls, embeddings

    with pytest.raises(ModelError, match="would be called at OpenAI's address"):
        asyncio.run(embeddings.embed(Embedding(model="litellm_proxy/x", texts=("a",))))
    with pytest.raises(ModelError, match="would be called at OpenAI's address"):
        asyncio.run(calls.complete(ModelCall(model="litellm_proxy/x", messages=({"role": "user", "content": "?"},))))

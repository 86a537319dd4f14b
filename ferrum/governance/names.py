"""Names of models: which provider and model litellm calls for one, told without importing it, which takes seconds."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator

from ferrum.errors import InputError

#: No provider has longer ones, and each part of one is looked at by itself.
_LONGEST: Final = 300
_PARTS: Final = 12

_FORM: Final = "write 'provider/model', such as 'openai/gpt-5.6-terra'"

#: Other words of litellm for a provider, by which it is reached in another way.
_SAME: Final = {
    "aiohttp_openai": "openai",
    "anthropic_text": "anthropic",
    "azure_text": "azure",
    "ai21_chat": "ai21",
    "bedrock_converse": "bedrock",
    "chatgpt": "openai",
    "codestral": "mistral",
    "cohere_chat": "cohere",
    "custom_openai": "openai",
    "ollama_chat": "ollama",
    "sagemaker_chat": "sagemaker",
    "sagemaker_nova": "sagemaker",
    "text-completion-codestral": "mistral",
    "text-completion-openai": "openai",
    "vertex_ai_beta": "vertex_ai",
}

#: A proxy of one's own: what is behind it goes by the name that follows.
PROXY: Final = "litellm_proxy"


def canonical(model: str) -> str:
    """The provider and the model that are called for a name, as `provider/model`. Raises `InputError`.

    A name without a provider is that of the provider which litellm's table has for it: `gpt-4o-mini` is
    `openai/gpt-4o-mini`.
    """
    provider, slash, name = model.partition("/")
    if not model:
        raise InputError(f"a model has no name: {_FORM}")
    if len(model) > _LONGEST or model.count("/") >= _PARTS or not model.isprintable() or " " in model:
        raise InputError(f"{model[:80]!r} is no name of a model: {_FORM}")
    if slash and (not provider or not name):
        raise InputError(f"{model!r} names {'no model' if provider else 'no provider'}: {_FORM}")
    if slash:
        return model
    if found := provider_of(model):
        return f"{found}/{model}"
    raise InputError(f"model {model!r} names no provider that is known: {_FORM}")


ModelName = Annotated[str, AfterValidator(canonical)]


def family(provider: str) -> str:
    """The provider that this word of litellm's stands for."""
    return _SAME.get(provider, provider)


def also(model: str) -> tuple[str, ...]:
    """All that a canonical name may come to, itself first.

    Whoever is called may pass a request on to what the rest of the name says (`openrouter/openai/…`,
    `litellm_proxy/openai/…`), and parts of it may say only how it is reached (`openai/responses/…`).
    """
    provider, _, rest = model.partition("/")
    parts = rest.split("/")
    names = {model: None}
    for at in range(len(parts)):
        ending = "/".join(parts[at:])
        names |= {f"{provider}/{ending}": None, f"{family(provider)}/{ending}": None}
        if at < len(parts) - 1:
            names |= {ending: None, f"{family(parts[at])}/{'/'.join(parts[at + 1 :])}": None}
    if provider == PROXY and (behind := provider_of(parts[-1])):
        names[f"{behind}/{parts[-1]}"] = None
    return tuple(names)


def provider_of(name: str) -> str | None:
    """The provider of a model that is named without one; `None` where litellm's table does not know it."""
    if name.startswith(("ft:gpt-", "gpt-image")):
        return "openai"
    said = _table().get(name)
    if said is None:
        return None
    # Split there by kinds of models, which is no part of a name.
    for whole in ("vertex_ai", "bedrock", "fireworks_ai"):
        if said.startswith(whole):
            return whole
    return said if said in providers() else None


@cache
def providers() -> frozenset[str]:
    """The words for providers that litellm knows."""
    text = _read("types/utils.py")
    listed = text[text.find("class LlmProviders(") :].partition("\nclass ")[0].partition("\n\n\n")[0]
    return frozenset(re.findall(r'^    \w+ = "([^"]+)"', listed, re.MULTILINE)) | frozenset(
        json.loads(_read("llms/openai_like/providers.json") or "{}")
    )


@cache
def _table() -> dict[str, str]:
    facts: dict[str, Any] = json.loads(_read("model_prices_and_context_window_backup.json") or "{}")
    return {name: str(about.get("litellm_provider")) for name, about in facts.items() if "/" not in name}


def _read(path: str) -> str:
    """A file of litellm's; empty where that is not installed, or has no such file."""
    spec = find_spec("litellm")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(place) / path
        if file.exists():
            return file.read_text(encoding="utf-8")
    return ""

"""What a model call costs: the operator's price file, over the table that litellm ships.

```yaml
models:                     # US dollars per million tokens
  openai/scripted: {input: 0.15, output: 0.60}
aliases:
  claude-3-opus-20240229: anthropic/claude-opus-5-5
```
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from ferrum.errors import InputError
from ferrum.governance.acts import Embedding, ModelCall
from ferrum.governance.names import canonical
from ferrum.models import files
from ferrum.results import Usage
from ferrum.settings import settings

#: Output tokens that a call without `max_tokens` is estimated to generate.
DEFAULT_OUTPUT_TOKENS: Final = 4096

_BUNDLED: Final = "model_prices_and_context_window_backup.json"

#: Models of these run on machines of one's own: nobody sends a bill.
_FREE: Final = ("ollama", "ollama_chat")

#: What providers count for the roles and marks around a message.
_PER_MESSAGE: Final = 8
#: The marks before and after a text that is embedded.
_PER_TEXT: Final = 2
#: A picture counts by its size in pixels, up to about this; the characters of its data say nothing.
_PER_PICTURE: Final = 2000


#: More than any model reads or writes in one call.
_MOST_TOKENS: Final = 100_000_000


class Price(BaseModel):
    """US dollars per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: float = Field(ge=0, allow_inf_nan=False)
    output: float = Field(ge=0, allow_inf_nan=False)


class PriceFile(BaseModel):
    """What the operator says of models; the empty one says nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: dict[str, Price] = {}
    #: An old or short name, and the model that is called for it.
    aliases: dict[str, str] = {}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file, YAML or JSON. Raises `SettingsError`, with file and line, for whatever is no price file."""
        return files.load(path, cls)

    @model_validator(mode="after")
    def _aliases_name_models(self) -> Self:
        for old, new in self.aliases.items():
            if new in self.aliases:
                raise ValueError(f"alias {old!r} names {new!r}, which is an alias too: name the model itself")
        return self

    def resolve(self, model: str) -> str:
        """The model that is called for a name, as `provider/model`. Raises `InputError` where there is none."""
        name = canonical(self.aliases.get(model, model))
        return canonical(self.aliases.get(name, name))

    @cached_property
    def _by_model(self) -> Mapping[str, Price]:
        return {_named(name): price for name, price in self.models.items()}

    def cost(self, model: str, input_tokens: int, output_tokens: int) -> float | None:
        try:
            name = self.resolve(model)
        except InputError:
            # Nobody calls it.
            return None
        if price := self._by_model.get(name):
            return (price.input * input_tokens + price.output * output_tokens) / 1e6
        rates = _rates(name, input_tokens)
        return None if rates is None else rates[0] * input_tokens + rates[1] * output_tokens


def cost(model: str, input_tokens: int, output_tokens: int) -> float | None:
    """US dollars for so many tokens; `None` where nobody knows the model's price.

    Prices for long prompts are looked at, discounts for prompts that the provider has cached are not. Models that run
    under Ollama cost nothing.
    """
    return _operators().cost(model, input_tokens, output_tokens)


def resolve(model: str) -> str:
    """The model that is called for a name: what the price file's `aliases` say, else the name, with its provider.

    To be done before the choke point decides, so that it judges what is really called. Raises `InputError` for what
    names no model.
    """
    return _operators().resolve(model)


def estimate(call: ModelCall | Embedding) -> Usage:
    """What a call will use at the most, nearly always, made in microseconds: a token for every three bytes of text.

    Without `max_tokens` the answer is taken to be `DEFAULT_OUTPUT_TOKENS` long. Vectors are no tokens.
    """
    if isinstance(call, Embedding):
        return usage(call.model, sum(math.ceil(_bytes(text) / 3) + _PER_TEXT for text in call.texts), 0)
    size = sum(_bytes(message) for message in call.messages) + _bytes(call.output_schema)
    asked = math.ceil(size / 3) + _PER_MESSAGE * len(call.messages)
    answered = DEFAULT_OUTPUT_TOKENS if call.max_tokens is None else call.max_tokens
    return usage(call.model, asked, answered)


def believed(model: str, what: str, said: object, instead: int) -> tuple[int, tuple[str, ...]]:
    """Return how many tokens to count where a provider says so many, and a sentence where it is something else."""
    amount = "no whole number of"
    if isinstance(said, int) and not isinstance(said, bool):
        if 0 <= said <= _MOST_TOKENS:
            return said, ()
        amount = "fewer than 0" if said < 0 else f"more than {_MOST_TOKENS:,}"
    doubt = f"model {model!r} says that it used {amount} {what} tokens, which cannot be: counted as {instead}"
    return instead, (doubt,)


def usage(model: str, input_tokens: int, output_tokens: int) -> Usage:
    """The usage of one call with so many tokens."""
    dollars = cost(model, input_tokens, output_tokens)
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost_usd=dollars or 0.0,
        model_calls=1,
        unpriced_calls=int(dollars is None),
    )


def _operators() -> PriceFile:
    path = settings().prices
    return _loaded(path.expanduser()) if path is not None else _NOTHING


_NOTHING: Final = PriceFile()
_loaded = cache(PriceFile.load)


def _named(model: str) -> str:
    try:
        return canonical(model)
    except InputError:
        return model


def _bytes(value: JsonValue) -> int:
    """The bytes of all text in a value; a picture counts as much as its tokens."""
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if isinstance(value, Mapping):
        if value.get("type") in ("image_url", "input_image", "image"):
            return 3 * _PER_PICTURE
        return sum(_bytes(key) + _bytes(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(_bytes(item) for item in value)
    return len(str(value)) if value is not None else 0


def _rates(model: str, input_tokens: int) -> tuple[float, float] | None:
    """Dollars for an input and for an output token, by litellm's table."""
    provider, slash, name = model.partition("/")
    table = _bundled()
    found = table.get(model)
    if found is None and slash:
        entry = table.get(name)
        found = entry if entry is not None and _is_of(entry.provider, provider) else None
    if found is not None:
        return found.at(input_tokens)
    return (0.0, 0.0) if provider in _FREE else None


def _is_of(provider: str, prefix: str) -> bool:
    # litellm splits some providers by API or family: bedrock_converse, vertex_ai-language-models.
    return provider == prefix or provider.startswith((f"{prefix}_", f"{prefix}-"))


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True)

    provider: str
    #: Dollars for an input and for an output token, from so many input tokens on; the highest bound first.
    tiers: tuple[tuple[int, float, float], ...]

    def at(self, input_tokens: int) -> tuple[float, float]:
        # The whole prompt is charged at the rate of its length, not only what is above the bound.
        return next((paid, made) for bound, paid, made in self.tiers if input_tokens > bound or bound == 0)


@cache
def _bundled() -> dict[str, _Entry]:
    # Read as a file: importing litellm takes two seconds.
    spec = find_spec("litellm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    text = (Path(spec.submodule_search_locations[0]) / _BUNDLED).read_text(encoding="utf-8")
    entries = {name: _entry(facts) for name, facts in json.loads(text).items() if name != "sample_spec"}
    return {name: entry for name, entry in entries.items() if entry is not None}


def _entry(facts: Mapping[str, Any]) -> _Entry | None:
    paid = facts.get("input_cost_per_token")
    made = facts.get("output_cost_per_token", 0.0 if facts.get("mode") == "embedding" else None)
    if not isinstance(paid, int | float) or not isinstance(made, int | float):
        return None
    tiers = [(0, float(paid), float(made))]
    for key, dearer in facts.items():
        if found := re.fullmatch(r"input_cost_per_token_above_(\d+)k_tokens", key):
            tiers.append((int(found[1]) * 1000, float(dearer), float(facts.get(key.replace("input", "output"), made))))
    return _Entry(provider=str(facts.get("litellm_provider", "")), tiers=tuple(sorted(tiers, reverse=True)))

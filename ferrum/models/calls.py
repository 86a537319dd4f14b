"""One request to one model, through litellm.

litellm takes seconds and 160 MiB to import, so that is done by `warm` or by the first call, never by importing this
module. All calls of a process share one event loop, which holds their connections until `aclose`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from functools import cache
from types import ModuleType
from typing import Any, Final

from pydantic import JsonValue

from ferrum.errors import ModelError
from ferrum.governance.acts import ModelCall, ModelReply
from ferrum.governance.names import PROXY, family
from ferrum.models import prices, structured
from ferrum.models.choice import ollama_base
from ferrum.results import Usage
from ferrum.settings import redact

#: What litellm looks at while it is imported: no fetching of its tables, no reading of a `.env` file.
_ENVIRONMENT: Final = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_MODE": "PRODUCTION",
}

#: What every call says: try once, and wait for as long as it takes.
ONCE: Final[dict[str, Any]] = {
    # The attempt's own timeout is shorter, and cancels the call.
    "timeout": 86_400.0,
    # The client below litellm tries again by itself, unless told not to; attempts are ours to count.
    "max_retries": 0,
    "num_retries": 0,
}

#: Providers that litellm signs in at when it is asked about them.
_SIGNS_IN: Final = frozenset({"chatgpt", "github_copilot"})

#: Providers whose address litellm knows without saying so.
_HAS_ADDRESS: Final = frozenset({"cometapi"})

#: The statuses that say "not now"; all from 500 on do, too.
_LATER: Final = frozenset({408, 409, 425, 429})

#: The errors of the HTTP clients that litellm uses, by name: importing them for this would import the clients.
_CONNECTION: Final = frozenset(
    {
        "APIConnectionError",
        "APITimeoutError",
        "ConnectError",
        "ReadError",
        "RemoteProtocolError",
        "ClientConnectorError",
    }
)

#: How much of a provider's own words a message quotes.
_QUOTED: Final = 300

#: The names that litellm puts before a provider's words.
_PREFIXES: Final = re.compile(r"^(?:(?:litellm\.)?\w*(?:Error|Timeout|Violation)(?: Error)?: |\w+Exception(?: -|:) )+")

_NO_KEY: Final = (
    "has no key that works: set its provider's key in the environment it is asked from, in a run the worker's"
)

#: What to say of failures that the same call would meet again, by status, by the class of an error (its name, since
#: litellm is not imported yet), or by words. The first that is found counts.
_FINAL: Final[dict[int | str | re.Pattern[str], str]] = {
    re.compile(r"missing (credentials|\w+ api key)|api_key client option must be set", re.IGNORECASE): _NO_KEY,
    re.compile("insufficient_quota"): "has no credit left: pay, or raise the limit at its provider",
    re.compile("LLM Provider NOT provided"): (
        "names no provider that is known: write it as 'provider/model', such as 'openai/gpt-5.6-terra'"
    ),
    "AuthenticationError": _NO_KEY,
    "ContextWindowExceededError": "cannot take so long a prompt: shorten it, or name a model with a larger context",
    "ContentPolicyViolationError": "may not answer, by its provider's content policy: change the prompt",
    "UnsupportedParamsError": "does not take one of the step's parameters: leave it out",
    401: _NO_KEY,
    403: _NO_KEY,
    404: "is not known to its provider: check the name and the address",
}


def warm() -> None:
    """Import litellm and quieten it, so that the first call need not; safe to do from any thread, and again."""
    _litellm()


async def complete(call: ModelCall) -> ModelReply:
    """Make one request and return the answer, its cost by the price table.

    Nothing is tried again and nothing times out here. Raises `ModelError`, whose `retry` says whether the same call
    might work later. Cancelling the awaiting task aborts the HTTP request.
    """
    litellm = await loaded()
    import openai

    try:
        check_route(litellm, call.model)
        response = await litellm.acompletion(**_arguments(call))
    except openai.OpenAIError as error:
        raise translated(call.model, error) from error
    return _reply(call, response)


def check_route(litellm: Any, model: str) -> None:
    """Raises `ModelError` where litellm would send a call elsewhere than its name says, which was decided on."""
    said = model.partition("/")[0]
    if said in _SIGNS_IN:
        # They are asked only by those who call them, and are no other provider's.
        return
    _, found, _, base = litellm.get_llm_provider(model)
    if found == PROXY != said and base:
        # The operator's USE_LITELLM_PROXY: all calls go there.
        return
    if family(found) != family(said):
        raise ModelError(
            f"model {model!r} would be called at provider {found!r}, and was decided on as one of {said!r}: write"
            f" '{found}/…'"
        )
    if base is None and found in litellm.openai_compatible_providers and found not in _HAS_ADDRESS:
        raise ModelError(
            f"model {model!r} would be called at OpenAI's address, for {found!r} has none: set {found.upper()}_API_BASE"
        )


async def loaded() -> Any:
    """litellm, imported where it was not."""
    # The import would hold up the whole loop for seconds; in a thread it does not.
    return await asyncio.to_thread(_litellm) if _litellm.cache_info().currsize == 0 else _litellm()


async def aclose() -> None:
    """Close the connections of this process's calls and stop what litellm runs beside them.

    To be awaited on the loop that made the calls, when it makes no more; a later call opens new ones.
    """
    if _litellm.cache_info().currsize == 0:
        return
    litellm = _litellm()
    from litellm.litellm_core_utils.logging_worker import GLOBAL_LOGGING_WORKER
    from litellm.llms.custom_httpx.async_client_cleanup import close_litellm_async_clients

    await GLOBAL_LOGGING_WORKER.flush()
    await GLOBAL_LOGGING_WORKER.stop()
    await close_litellm_async_clients()
    # Else a later loop, which may have the same id, would be handed the closed clients.
    litellm.in_memory_llm_clients_cache.flush_cache()


@cache
def _litellm() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if base := ollama_base(os.environ):
        os.environ.setdefault("OLLAMA_API_BASE", base)
    collects = gc.isenabled()
    # An eighth of the import is looking for garbage in what is there to stay.
    gc.disable()
    try:
        import litellm
    finally:
        if collects:
            gc.enable()

    _quieten(litellm)
    return litellm


def _quieten(litellm: ModuleType) -> None:
    """No callbacks, no hints on stdout, no log lines beside the errors that are raised anyway."""
    for callbacks in ("callbacks", "input_callback", "success_callback", "failure_callback", "service_callback"):
        setattr(litellm, callbacks, [])
    litellm.suppress_debug_info = True  # type: ignore[attr-defined]
    # Of embeddings it takes `max_retries=0` for nothing said, and this instead.
    litellm.DEFAULT_MAX_RETRIES = 0  # type: ignore[attr-defined]
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logger = logging.getLogger(name)
        # LITELLM_LOG sets a level, which is what an operator wants who looks for an error in litellm.
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)


class _Ask(Enum):
    """How a model is asked for JSON."""

    SCHEMA = "schema"
    JSON = "json"
    WORDS = "words"


def _arguments(call: ModelCall) -> dict[str, Any]:
    # A copy down to the leaves: litellm changes messages in place for some providers.
    sent = call.model_dump()
    messages: list[dict[str, JsonValue]] = list(sent["messages"])
    arguments: dict[str, Any] = {"model": call.model, "messages": messages, **ONCE}
    if call.temperature is not None:
        arguments["temperature"] = call.temperature
    if call.max_tokens is not None:
        arguments["max_tokens"] = call.max_tokens
    if (schema := call.output_schema) is not None:
        # Providers take only schemas of objects, and JSON mode gives only objects.
        ask = _how_to_ask(call.model) if schema.get("type") == "object" else _Ask.WORDS
        if ask is _Ask.SCHEMA:
            wanted = {"name": "answer", "schema": sent["output_schema"], "strict": False}
            arguments["response_format"] = {"type": "json_schema", "json_schema": wanted}
        else:
            messages.insert(_after_system(messages), {"role": "system", "content": structured.instructions(schema)})
        if ask is _Ask.JSON:
            arguments["response_format"] = {"type": "json_object"}
    return arguments


@cache
def _how_to_ask(model: str) -> _Ask:
    litellm = _litellm()
    if litellm.supports_response_schema(model):
        return _Ask.SCHEMA
    return _Ask.JSON if "response_format" in (litellm.get_supported_openai_params(model) or ()) else _Ask.WORDS


def _after_system(messages: list[dict[str, JsonValue]]) -> int:
    """Where the first message stands that is not the author's instruction."""
    return next((at for at, message in enumerate(messages) if message.get("role") != "system"), len(messages))


def _reply(call: ModelCall, response: Any) -> ModelReply:
    if not response.choices:
        raise ModelError(f"model {call.model!r} answered without an answer in it: try again", retry=True)
    choice = response.choices[0]
    text = choice.message.content or ""
    refusal = (choice.message.get("provider_specific_fields") or {}).get("refusal")
    if refusal or (not text and choice.finish_reason == "content_filter"):
        said = f": {_quoted(refusal)}" if refusal else ""
        raise ModelError(f"model {call.model!r} refused to answer{said}; change the prompt")
    usage, doubts = _usage(call, text, getattr(response, "usage", None))
    return ModelReply(
        text=text,
        model=response.model or call.model,
        finish_reason=choice.finish_reason or "stop",
        usage=usage,
        doubts=doubts,
    )


def _usage(call: ModelCall, text: str, counted: Any) -> tuple[Usage, tuple[str, ...]]:
    asked = getattr(counted, "prompt_tokens", None) or 0
    answered = getattr(counted, "completion_tokens", None) or 0
    estimated, made = prices.estimate(call).input_tokens, math.ceil(len(text) / 3)
    if not asked and not answered:
        # Some servers of one's own do not count; an estimate is nearer to the truth than 0.
        return prices.usage(call.model, estimated, made), ()
    read, doubts = prices.believed(call.model, "input", asked, estimated)
    written, more = prices.believed(call.model, "output", answered, made)
    return prices.usage(call.model, read, written), doubts + more


def translated(model: str, error: Exception) -> ModelError:
    """A provider's error as one of ours: what happened, to which model, and what to do."""
    chain = tuple(_chain(error))
    names = frozenset(type(link).__name__ for link in chain)
    status = getattr(error, "status_code", None)
    said = _quoted(str(error))
    if final := _final(status, names, str(error)):
        return ModelError(f"model {model!r} {final} ({said})")
    passing = ModelError(f"model {model!r} {_passing(status, names)} ({said})", True, _retry_after(chain))
    passing.kind = "rate_limit" if status == 429 else "unavailable"
    return passing


def _final(status: int | None, names: frozenset[str], text: str) -> str | None:
    """What to say of a failure that the same call would meet again; `None` for one that may pass."""
    for mark, sentence in _FINAL.items():
        if mark in names or mark == status or (isinstance(mark, re.Pattern) and mark.search(text)):
            return sentence
    if status is not None and status < 500 and status not in _LATER:
        return f"refused the call with status {status}: change what is asked"
    return None


def _passing(status: int | None, names: frozenset[str]) -> str:
    """What to say of a failure that may pass."""
    if status == 429:
        return "asks us to slow down: try again later, or ask its provider for a higher limit"
    if "JSONDecodeError" in names or "APIResponseValidationError" in names:
        return "answered with something that is no answer: try again"
    if "HTTPStatusError" not in names and names & _CONNECTION:
        return "could not be reached, or the connection broke off: try again, and check its address"
    # litellm says 500, too, where it has no answer at all.
    return f"failed on its provider's side{f' with status {status}' if status not in (None, 500) else ''}: try again"


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    # A call made while an earlier one's error is handled (a fallback) has that as its context: not its own story.
    while link is not None and not isinstance(link, ModelError):
        yield link
        link = link.__cause__ or link.__context__


def _quoted(text: str) -> str:
    """A provider's own words: the first line, without litellm's prefixes and without secrets."""
    words = _PREFIXES.sub("", redact(text.strip())).partition("\n")[0].strip()
    return words if len(words) <= _QUOTED else words[:_QUOTED] + "…"


def _retry_after(chain: tuple[BaseException, ...]) -> float | None:
    """Seconds to wait, as the provider's `Retry-After` says; `None` where it says nothing that can be read."""
    for link in chain:
        for holder in (link, getattr(link, "response", None)):
            for name in ("litellm_response_headers", "headers"):
                headers = getattr(holder, name, None)
                if isinstance(headers, Mapping) and (seconds := _seconds(headers)) is not None:
                    return seconds
    return None


def _seconds(headers: Mapping[str, str]) -> float | None:
    """RFC 9110 knows seconds and an HTTP date; OpenAI and Azure also send milliseconds under a name of their own."""
    found = {name.lower(): value.strip() for name, value in headers.items() if isinstance(value, str)}
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = found.get(name, "")
        try:
            seconds = float(text) * unit
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        until = parsedate_to_datetime(found["retry-after"])
    except (KeyError, ValueError):
        return None
    try:
        # By the clock that the date is of, not by ours.
        now = parsedate_to_datetime(found["date"])
    except (KeyError, ValueError):
        now = datetime.now(UTC)
    return max(0.0, (until.astimezone(UTC) - now.astimezone(UTC)).total_seconds())

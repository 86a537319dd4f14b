"""`type: llm`: one answer of a model, as text or as JSON that fits a schema."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import Field, JsonValue, field_validator, model_validator

from ferrum import schemas
from ferrum.errors import ModelError, OutputError
from ferrum.governance.acts import ModelCall
from ferrum.models import prices, structured
from ferrum.models.choice import default_model
from ferrum.settings import settings
from ferrum.steps import Attempt, Params, StepType
from ferrum.workflow import Retry


class LlmParams(Params):
    prompt: str | None = Field(None, description="What the model is asked. Either this or `messages`.")
    messages: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="OpenAI chat messages: `role` and `content`. Either this or `prompt`."
    )
    system: str | None = Field(None, description="Instructions that come before the prompt.")
    model: str | None = Field(
        None, min_length=1, description="As litellm names it, `provider/model`. Default: `FERRUM_MODEL`."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is steady, 2 is wild.")
    max_tokens: int = Field(
        prices.DEFAULT_OUTPUT_TOKENS, ge=1, description="The most that may be generated; reserved of the budget."
    )
    output_schema: dict[str, Any] | None = Field(
        None, description="JSON Schema of the answer; the output is then the parsed answer. One repair round is made."
    )
    fallbacks: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="Models that are asked in this order when one fails."
    )

    @field_validator("messages")
    @classmethod
    def _has_roles(cls, messages: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for place, message in enumerate(messages or []):
            if message.get("role") not in ("system", "user", "assistant") or "content" not in message:
                raise ValueError(f"message {place} needs a role (system, user, assistant) and a content")
        return messages

    @field_validator("output_schema")
    @classmethod
    def _can_be_used(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            try:
                schemas.check(schema)
            except schemas.SchemaFault as error:
                raise ValueError(f"this is not a JSON Schema that can be used: {error}") from error
        return schema

    @model_validator(mode="after")
    def _asks_once(self) -> LlmParams:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        return self


class Llm(StepType[LlmParams]):
    name = "llm"
    prompts = frozenset({"prompt", "system", "messages"})
    schemas = frozenset({"output_schema"})
    params = LlmParams
    retry = Retry(max_attempts=3)
    timeout_s = 120.0

    async def run(self, params: LlmParams, attempt: Attempt) -> JsonValue:
        first: ModelError | None = None
        for model in (_first(params), *params.fallbacks):
            try:
                return await _answer(_call(params, model), attempt)
            except ModelError as error:
                first = first or error
        assert first is not None
        raise first


def _first(params: LlmParams) -> str:
    return default_model(settings(), os.environ) if params.model is None else params.model


async def _answer(call: ModelCall, attempt: Attempt) -> JsonValue:
    reply = await attempt.perform(call)
    if call.output_schema is None:
        return reply.text
    try:
        return structured.parse(reply.text, call.output_schema)
    except OutputError as error:
        repaired = await attempt.perform(structured.repair_messages(call, reply.text, error, attempt.marks))
        return structured.parse(repaired.text, call.output_schema)


def _call(params: LlmParams, model: str) -> ModelCall:
    messages = params.messages or [{"role": "user", "content": params.prompt or ""}]
    if params.system is not None:
        messages = [{"role": "system", "content": params.system}, *messages]
    return ModelCall(
        # The name that prices and policies know: an alias must not slip past a rule.
        model=prices.resolve(model),
        messages=tuple(messages),
        temperature=params.temperature,
        max_tokens=params.max_tokens,
        output_schema=params.output_schema,
    )

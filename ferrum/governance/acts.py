"""The acts that need a decision, as values: what would be done, before anything is done."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from ferrum.results import Usage


class _Act(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def digest(self) -> str:
        """sha256 over everything that the act would send: what a person's yes is bound to."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


class ModelCall(_Act):
    """One request to one model."""

    kind: Literal["model"] = "model"
    #: As litellm names it: `openai/gpt-4.1-mini`, `anthropic/claude-sonnet-4-5`, `ollama/llama3.2`.
    model: str
    #: OpenAI chat messages: `{"role": …, "content": …}`.
    messages: tuple[dict[str, JsonValue], ...]
    temperature: float | None = None
    #: The most output tokens that may be generated.
    max_tokens: int | None = None
    #: A JSON Schema that the answer must satisfy; the provider is asked for JSON.
    output_schema: dict[str, JsonValue] | None = None

    @property
    def target(self) -> str:
        return self.model


class ModelReply(BaseModel):
    """What a model answered."""

    model_config = ConfigDict(frozen=True)

    text: str
    #: The model that answered, in the provider's words.
    model: str
    #: `stop`, `length`, `tool_calls`, `content_filter`.
    finish_reason: str
    usage: Usage


class ToolCall(_Act):
    """One call of one tool."""

    kind: Literal["tool"] = "tool"
    server: str
    tool: str
    arguments: dict[str, JsonValue]

    @property
    def target(self) -> str:
        return f"{self.server}.{self.tool}"


class ToolReply(BaseModel):
    """What a tool returned."""

    model_config = ConfigDict(frozen=True)

    #: The structured result where the server gave one, else the text (parsed, where it is JSON).
    output: JsonValue


Act = ModelCall | ToolCall
Reply = ModelReply | ToolReply

"""The acts that need a decision, as values: what would be done, before anything is done."""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

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


class InputFile(BaseModel):
    """A file that code is given: its text, or the artifact that it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = None
    #: `sha256:…`. The content is what is named, so a person's yes is bound to it, too.
    artifact: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.text is None) == (self.artifact is None):
            raise ValueError("a file is either its text or an artifact")
        return self


class CodeRun(_Act):
    """One run of code that nobody has read, in a sandbox made for it and ended with it."""

    kind: Literal["sandbox"] = "sandbox"
    #: The prepared environment that it runs in.
    runtime: str = "python-basic"
    language: Literal["python", "shell"] = "python"
    #: A program in that language; or what is run instead, as arguments, without a shell.
    code: str | None = None
    command: tuple[str, ...] | None = None
    #: By path, relative to the working directory.
    files: dict[str, InputFile] = {}
    #: Which files it gives back: paths relative to the working directory, where `*`, `?` and `**` stand for more.
    outputs: tuple[str, ...] = ()
    #: The file that holds its output as JSON, if it writes one.
    output_file: str = "output.json"
    env: dict[str, str] = {}
    #: Seconds of the wall clock.
    timeout_s: float = Field(30.0, gt=0)
    #: Bytes.
    memory: int = Field(256 * 2**20, gt=0)
    #: Bytes that it may write to its files at any one time.
    disk: int = Field(64 * 2**20, gt=0)
    #: Cores; also a part of one.
    cpus: float = Field(1.0, gt=0)
    #: Processes and threads at any one time.
    processes: int = Field(32, gt=0)
    network: Literal["none"] = "none"

    @property
    def target(self) -> str:
        return self.runtime


class WhyEnded(StrEnum):
    """Why code in a sandbox came to its end."""

    OK = "ok"
    """It exited with 0."""
    ERROR = "error"
    """It exited with another code, or by a signal of its own making."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT = "output"
    """It said or gave back more than it may."""
    DISK = "disk"
    """It filled its files."""
    KILLED = "killed"
    """It was stopped from outside: its run was cancelled, or its sandbox died."""


class CodeReply(BaseModel):
    """What code in a sandbox left."""

    model_config = ConfigDict(frozen=True)

    reason: WhyEnded
    #: One sentence for people; empty where `reason` is `ok`.
    detail: str = ""
    #: One of both, or none where it was stopped before it had either.
    exit_code: int | None = None
    #: `SIGSEGV` and the like.
    signal: str | None = None
    #: The first of each stream, up to a cap.
    stdout: str = ""
    stderr: str = ""
    #: Whether it left an `output_file`, and what that holds.
    has_output: bool = False
    output: JsonValue = None
    #: What it gave back, by path.
    files: dict[str, bytes] = {}
    #: What there was more of than is kept: `stdout`, `stderr`, `files`; and what was refused, with why.
    cut: tuple[str, ...] = ()
    wall_s: float
    cpu_s: float | None = None
    #: Bytes; `None` where nobody could see.
    peak_memory: int | None = None
    #: What isolated it: `bubblewrap`, `gvisor`, `container`.
    backend: str
    #: How its memory was held.
    memory_by: Literal["cgroup", "watchdog"]


class Embedding(_Act):
    """One request to one model to embed texts."""

    kind: Literal["model"] = "model"
    model: str
    texts: tuple[str, ...]

    @property
    def target(self) -> str:
        return self.model


class EmbeddingReply(BaseModel):
    """A vector for each text, in order."""

    model_config = ConfigDict(frozen=True)

    vectors: tuple[tuple[float, ...], ...]
    model: str
    usage: Usage


class Search(_Act):
    """One search in one index."""

    kind: Literal["retrieval"] = "retrieval"
    index: str
    query: str
    top_k: int = Field(5, ge=1, le=1000)
    mode: Literal["hybrid", "vector", "text"] = "hybrid"
    #: Metadata that a document must have: a value, or a list of which it is one.
    filter: dict[str, JsonValue] = {}
    #: From 0 to 1; documents below are left out.
    min_score: float | None = None
    #: From 0 (nearest only) to 1 (as different from each other as can be): maximal marginal relevance.
    diversity: float | None = Field(None, ge=0, le=1)
    #: The query's, where a model made it; it follows from the query.
    vector: tuple[float, ...] | None = Field(None, exclude=True, repr=False)

    @property
    def target(self) -> str:
        return self.index


class Document(BaseModel):
    """One piece of a document, as a search found it."""

    model_config = ConfigDict(frozen=True)

    text: str
    #: From 0 to 1.
    score: float
    #: The file or URL that it is from.
    source: str
    #: Where in it: `line`, `end_line`, and what there is of `page`, `heading`, `name`.
    position: dict[str, JsonValue] = {}
    metadata: dict[str, JsonValue] = {}


class SearchReply(BaseModel):
    """What a search found, the best first."""

    model_config = ConfigDict(frozen=True)

    documents: tuple[Document, ...]


Act = ModelCall | ToolCall
Reply = ModelReply | ToolReply

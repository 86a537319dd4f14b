"""The acts that need a decision, as values: what would be done, before anything is done."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Final, Generic, Literal, Protocol, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from ferrum.errors import InputError, did_you_mean
from ferrum.governance.names import ModelName, also
from ferrum.results import Usage

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Reply(BaseModel):
    """What came of an act."""

    model_config = ConfigDict(frozen=True)

    usage: Usage = Usage()
    #: Sentences about what of it is not believed.
    doubts: tuple[str, ...] = Field(default=(), exclude=True)


R = TypeVar("R", bound=Reply)

#: What a policy's patterns begin with.
Kind = Literal["model", "tool", "sandbox", "retrieval", "ingest", "task"]


class Act(BaseModel, Generic[R]):
    """Something that may cost money or do harm, and what comes of it: an `R`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: What it uses whatever comes of it, for it was begun.
    counts: ClassVar[Usage] = Usage()

    kind: Kind

    @property
    @abstractmethod
    def target(self) -> str:
        """What it is done to, as a policy's patterns name it."""

    @property
    def names(self) -> tuple[str, ...]:
        """All that it may be done to: the target, and what that may pass it on to. Each may forbid it."""
        return (self.target,)

    @property
    def digest(self) -> str:
        """sha256 over everything that the act would send: what a person's yes is bound to."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


class Perform(Protocol):
    """Lets an act happen, if it may. Raises `Denied`, and what the act raises."""

    def __call__(self, act: Act[R], /) -> Awaitable[R]: ...


@dataclass(frozen=True, slots=True)
class By:
    """Whose act it is."""

    #: The same for every attempt at the step.
    idempotency_key: str
    tenant: str
    #: Tells those who watch the run what is being said: the stream, and a piece of it.
    say: Callable[[str, str], None]
    #: For what the act needs done besides, which is decided for itself.
    perform: Perform


class ModelReply(Reply):
    """What a model answered."""

    text: str
    #: The model that answered, in the provider's words.
    model: str
    #: `stop`, `length`, `tool_calls`, `content_filter`.
    finish_reason: str
    usage: Usage


class ModelCall(Act[ModelReply]):
    """One request to one model."""

    kind: Literal["model"] = "model"
    #: As litellm names it: `openai/gpt-4.1-mini`, `anthropic/claude-sonnet-4-5`, `ollama/llama3.2`. A name without its
    #: provider gets it; one that has none raises `InputError`.
    model: ModelName
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

    @property
    def names(self) -> tuple[str, ...]:
        return also(self.model)


class ToolReply(Reply):
    """What a tool returned."""

    #: The structured result where the server gave one, else the text (parsed, where it is JSON).
    output: JsonValue


class ToolCall(Act[ToolReply]):
    """One call of one tool."""

    counts: ClassVar[Usage] = Usage(tool_calls=1)

    kind: Literal["tool"] = "tool"
    server: str
    tool: str
    arguments: dict[str, JsonValue]

    @property
    def target(self) -> str:
        return f"{self.server}.{self.tool}"


class TaskCall(Act[Reply]):
    """One call of a Celery task, or of a function, of the user's own; the step that asks for it makes it itself."""

    kind: Literal["task"] = "task"
    #: The name that the task is registered under, or `module:function`.
    name: str
    arguments: dict[str, JsonValue] | list[JsonValue]
    #: The other names of the same function. What is sent, and a person's yes, are the same by each of them.
    known_as: tuple[str, ...] = Field(default=(), exclude=True)

    @property
    def target(self) -> str:
        return self.name

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.known_as)


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


class CodeReply(Reply):
    """What code in a sandbox left."""

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


class CodeRun(Act[CodeReply]):
    """One run of code that nobody has read, in a sandbox made for it and ended with it."""

    counts: ClassVar[Usage] = Usage(tool_calls=1)

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
    timeout_s: float = Field(30.0, gt=0, le=30 * 86_400)
    #: Bytes.
    memory: int = Field(256 * 2**20, gt=0, le=2**50)
    #: Bytes that it may write to its files at any one time.
    disk: int = Field(64 * 2**20, gt=0, le=2**50)
    #: Cores; also a part of one.
    cpus: float = Field(1.0, gt=0, le=10_000)
    #: Processes and threads at any one time.
    processes: int = Field(32, gt=0, le=2**20)
    network: Literal["none"] = "none"

    @property
    def target(self) -> str:
        return self.runtime


class EmbeddingReply(Reply):
    """A vector for each text, in order."""

    vectors: tuple[tuple[float, ...], ...]
    model: str
    usage: Usage


class Embedding(Act[EmbeddingReply]):
    """One request to one model to embed texts."""

    kind: Literal["model"] = "model"
    model: ModelName
    texts: tuple[str, ...]

    @property
    def target(self) -> str:
        return self.model

    @property
    def names(self) -> tuple[str, ...]:
        return also(self.model)


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


class SearchReply(Reply):
    """What a search found, the best first."""

    documents: tuple[Document, ...]


#: The most documents that one search finds.
MOST_FOUND: Final = 100


class Search(Act[SearchReply]):
    """One search in one index. To make one that cannot be raises `InputError`."""

    kind: Literal["retrieval"] = "retrieval"
    index: str
    query: str
    top_k: int = Field(5, ge=1, le=MOST_FOUND)
    mode: Literal["hybrid", "vector", "text"] = "hybrid"
    #: Metadata that a document must have: a value, or a list of which it is one.
    filter: dict[str, JsonValue] = {}
    #: From 0 to 1; documents below are left out.
    min_score: float | None = Field(None, ge=0, le=1)
    #: From 0 (nearest only) to 1 (as different from each other as can be): maximal marginal relevance.
    diversity: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="wrap")
    @classmethod
    def _refused_in_a_sentence(cls, value: object, check: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return check(value)
        except ValidationError as error:
            raise InputError("; ".join(_mistake(one) for one in error.errors())) from None

    @property
    def target(self) -> str:
        return self.index


_RULES: Final = {
    "top_k": f"a whole number from 1 to {MOST_FOUND}",
    "mode": "'hybrid', 'vector' or 'text'",
    "min_score": "a number from 0 to 1",
    "diversity": "a number from 0 to 1",
}


def _mistake(error: ErrorDetails) -> str:
    """What is wrong with a search, and what is right."""
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return f"a search needs {name!r}"
    if error["type"] == "extra_forbidden":
        return f"a search has no {name!r}{did_you_mean(name, Search.model_fields)}"
    rule = _RULES.get(name)
    # What is wrong within a filter is for JSON to say.
    right = f"let it be {rule}" if rule else error["msg"][:1].lower() + error["msg"][1:]
    return f"{name} is {repr(error['input'])[:80]}: {right}"


class NewDocument(BaseModel):
    """A document that an index is given, whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    #: What it is called, and what it replaces: a file's path, a URL.
    source: str = Field(min_length=1)
    metadata: dict[str, JsonValue] = {}


class NotTaken(BaseModel):
    """A document that an index was given and does not have."""

    model_config = ConfigDict(frozen=True)

    source: str
    #: For people.
    why: str


class IngestReply(Reply):
    """What became of the documents that an index was given."""

    #: Documents that are new, that took the place of what was there, that were there as they are, that were taken out.
    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    #: Texts for which a vector had to be made.
    embedded: int = 0
    #: Pieces that the index has now.
    chunks: int = 0
    left_out: tuple[NotTaken, ...] = ()


class Ingest(Act[IngestReply]):
    """Documents for one index; those of the same source are replaced."""

    kind: Literal["ingest"] = "ingest"
    index: str
    documents: tuple[NewDocument, ...]
    #: Where the index is not there yet, it is made with this one.
    embedding: str | None = None
    #: Whether documents are removed that an earlier one gave and this one does not.
    prune: bool = False

    @property
    def target(self) -> str:
        return self.index

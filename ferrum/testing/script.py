"""The script of a scripted model server: what it answers, as values.

```yaml
rules:
  - match: {regex: "Classify this issue: (?P<title>.+)"}
    json: {kind: bug, title: $title}
  - match: {model: "*mini", contains: "poem"}
    fail: 429
    retry_after: 1
    times: 2
  - match: {turn: 2}
    reply: You said $last_message
default:
  reply: ok
```

The first rule that matches and is not used up answers. Text may hold `$last_message`, `$model`, `$count` and the named
groups of the rule's own regex; `$$` is a dollar sign.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from ferrum.errors import did_you_mean
from ferrum.models import files

#: How a call may fail other than by an HTTP status: never answered, closed in the middle of the body, broken JSON.
_FAILURES = ("timeout", "cut", "invalid_json")

#: What any text of a script may quote.
_NAMES = frozenset({"last_message", "model", "count"})


def _failure(value: object) -> object:
    is_status = isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599
    if not is_status and value not in _FAILURES:
        raise ValueError(f"{value!r} is no failure: write a status from 400 to 599, or one of {', '.join(_FAILURES)}")
    return value


Failure = Annotated[int | Literal["timeout", "cut", "invalid_json"], BeforeValidator(_failure)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)


class Question(_Value):
    """What a model server was asked, as far as a rule can look at it."""

    endpoint: Literal["chat", "embeddings"]
    model: str
    #: The text of each message, or each text to embed.
    texts: tuple[str, ...]
    #: 1 for the first answer of a conversation: how many answers it already holds, and one.
    turn: int = 1

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


class Match(_Value):
    """Which calls a rule is for; what is not said matches all."""

    endpoint: Literal["chat", "embeddings"] = "chat"
    #: A glob over the name that the server sees, which is without the provider: `gpt-*`.
    model: str | None = None
    #: A text that one of the messages contains.
    contains: str | None = None
    #: Searched in all messages, joined by line ends; its named groups can be quoted in the answer.
    regex: str | None = None
    turn: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"{self.regex!r} is not a regular expression: {error}") from error
        return self

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(self.regex or "", re.MULTILINE)

    def groups(self, question: Question) -> dict[str, str] | None:
        """The regex's named groups where the question matches, else `None`."""
        asked = (
            question.endpoint == self.endpoint
            and (self.model is None or fnmatchcase(question.model, self.model))
            and (self.contains is None or any(self.contains in text for text in question.texts))
            and (self.turn is None or self.turn == question.turn)
        )
        found = self.pattern.search(question.text) if asked else None
        return None if found is None else {name: text or "" for name, text in found.groupdict().items()}


class ScriptedToolCall(_Value):
    """A tool that the model wants called."""

    name: str
    arguments: dict[str, JsonValue] = {}
    #: Default: `call_1`, `call_2` and so on.
    id: str | None = None


class ScriptedUsage(_Value):
    """What a call is said to have cost; what is not given is estimated as a quarter of the characters."""

    input_tokens: int | None = Field(None, ge=0)
    output_tokens: int | None = Field(None, ge=0)


class Answer(_Value):
    """What to answer. Exactly one of `reply`, `json`, `tool_calls` and `fail`."""

    reply: str | None = None
    #: A value, sent as JSON text.
    value: JsonValue = Field(None, alias="json")
    tool_calls: tuple[ScriptedToolCall, ...] | None = None
    fail: Failure | None = None
    #: The message of a failure with an HTTP status; such as the provider's own words, which clients look into.
    error: str | None = None
    #: The `Retry-After` header of a failure: seconds, or an HTTP date.
    retry_after: float | str | None = None
    #: Seconds to wait before answering.
    delay: float = Field(0, ge=0)
    #: Default: `stop`, or `tool_calls`.
    finish_reason: Literal["stop", "length", "content_filter", "tool_calls"] | None = None
    usage: ScriptedUsage = ScriptedUsage()

    @property
    def has_value(self) -> bool:
        """Whether `json` was given; `null` is a value like any other."""
        return "value" in self.model_fields_set

    @property
    def answers(self) -> list[str]:
        given = {
            "reply": self.reply is not None,
            "json": self.has_value,
            "tool_calls": self.tool_calls is not None,
            "fail": self.fail is not None,
        }
        return [name for name, is_given in given.items() if is_given]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.answers) > 1:
            raise ValueError(f"gives {' and '.join(self.answers)}: keep one of them")
        if not isinstance(self.fail, int) and (self.error is not None or self.retry_after is not None):
            raise ValueError("error and retry_after belong to a fail with an HTTP status, such as 429")
        return self


class Rule(Answer):
    """An answer, for the calls that match, so many times."""

    match: Match = Match()
    #: The rule is used up after so many answers; without it, never.
    times: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _can_answer(self) -> Self:
        embeds = self.match.endpoint == "embeddings"
        if embeds and self.answers not in ([], ["fail"]):
            raise ValueError(f"{self.answers[0]} is no answer to an embeddings call: only fail, delay and usage are")
        if not embeds and not self.answers:
            raise ValueError("says no answer: give one of reply, json, tool_calls, fail")
        _check_texts(self, _NAMES | self.match.pattern.groupindex.keys())
        return self


class Default(Answer):
    """What answers the chat calls that no rule matches."""

    @model_validator(mode="after")
    def _can_answer(self) -> Self:
        if not self.answers:
            raise ValueError("says no answer: give one of reply, json, tool_calls, fail")
        _check_texts(self, _NAMES)
        return self


class Script(_Value):
    """An ordered list of rules."""

    rules: tuple[Rule, ...] = ()
    #: Without it, a call that no rule matches is refused with status 400 and a message that says so.
    default: Default | None = None

    @classmethod
    def load(cls, path: Path) -> Script:
        """Read a file, YAML or JSON. Raises `SettingsError`, with file and line, for whatever is not a script."""
        return files.load(path, cls)

    @classmethod
    def parse(cls, text: str, source: str = "script") -> Script:
        return files.parse(text, cls, source)

    @classmethod
    def of(cls, value: Script | Path | str | Mapping[str, Any]) -> Script:
        """A script from itself, a file's path or Python values; `str` is one reply to everything."""
        if isinstance(value, Script):
            return value
        if isinstance(value, Path):
            return cls.load(value)
        if isinstance(value, str):
            return cls(default=Default(reply=value.replace("$", "$$")))
        return files.check(value, cls, "script")

    def choose(self, question: Question, used: Mapping[int, int]) -> tuple[int | None, Answer, dict[str, str]] | None:
        """The rule that answers: its place from 0 (`None` for the default), the answer, its regex's groups.

        `used` says how often each rule has answered. `None` where nothing in the script answers.
        """
        for index, rule in enumerate(self.rules):
            if rule.times is not None and used.get(index, 0) >= rule.times:
                continue
            groups = rule.match.groups(question)
            if groups is not None:
                return index, rule, groups
        if self.default is None or question.endpoint != "chat":
            return None
        return None, self.default, {}


def fill(value: JsonValue, names: Mapping[str, str]) -> JsonValue:
    """The value with every `$name` in its texts replaced, once; what was put in is not looked at again."""
    if isinstance(value, str):
        return Template(value).substitute(names)
    if isinstance(value, list):
        return [fill(item, names) for item in value]
    if isinstance(value, dict):
        return {key: fill(item, names) for key, item in value.items()}
    return value


def _check_texts(answer: Answer, names: frozenset[str]) -> None:
    calls = answer.tool_calls or ()
    for text in _texts([answer.reply, answer.value, answer.error, *(dict(call.arguments) for call in calls)]):
        template = Template(text)
        if not template.is_valid():
            raise ValueError(f"{text!r} has a '$' that names nothing: write '$$' for a dollar sign")
        for name in template.get_identifiers():
            if name not in names:
                raise ValueError(f"${name} is not known here{did_you_mean(name, names)}; '$$' is a dollar sign")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)

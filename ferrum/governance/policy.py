"""The policy: which acts are allowed, which are denied, and which a person is asked about.

A file with three lists of patterns:

```yaml
allow: ["tool:git.*", "model:openai/*"]
ask: ["tool:git.push"]
deny: ["tool:*.delete_*"]
```

A pattern is `tool:<server>.<tool>`, `model:<provider>/<model>`, `sandbox:<runtime>`, `retrieval:<index>`,
`ingest:<index>`, `task:<name>` or `task:<module>:<function>`. In it, `*` stands for any run of characters, none
and `.`, `/` and `:` included; everything else stands for itself, upper and lower case apart, from the first character
to the last. `deny` wins over `ask`, `ask` over `allow`, the order within a list changes nothing but which rule is
named, and what no pattern matches is denied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict

from ferrum.bounds import unbounded
from ferrum.errors import SettingsError, did_you_mean
from ferrum.governance.acts import Act, Kind
from ferrum.governance.patterns import nearest
from ferrum.local import trust
from ferrum.settings import Settings

#: Read from the working directory, once it is trusted, where `FERRUM_POLICY` names no other.
DEFAULT_FILE: Final = trust.POLICY

_KINDS: Final = ("tool", "model", "sandbox", "retrieval", "ingest", "task")
_BEGINNINGS: Final = ", ".join(f"'{kind}:'" for kind in _KINDS[:-1]) + f" or '{_KINDS[-1]}:'"
#: What other pattern languages give a meaning to; here it would be a rule that quietly never matches.
_ODD: Final = re.compile(r"[\s?\[\]{}]")


class Effect(StrEnum):
    """What is to become of an act. The order is the order of precedence, strongest first."""

    DENY = "deny"
    ASK = "ask"
    ALLOW = "allow"


class Decision(BaseModel):
    """What the choke point said of one act, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    effect: Effect
    #: The address of the rule, for the audit: `allow[0] tool:git.*`, `default`, `approved 3f1c…`.
    rule: str
    #: One sentence for the workflow's author.
    reason: str
    #: Of the act: what it is, what it is done to, and the sha256 of all that it would send.
    kind: Kind
    target: str
    digest: str

    @classmethod
    def on(cls, act: Act[Any], effect: Effect, rule: str, reason: str) -> Decision:
        return cls(effect=effect, rule=rule, reason=reason, kind=act.kind, target=act.target, digest=act.digest)


@dataclass(frozen=True, slots=True)
class Rule:
    """One pattern of one list."""

    effect: Effect
    #: Its place in the list, from 0.
    index: int
    pattern: str

    def __str__(self) -> str:
        """The address: `allow[0] tool:git.*`."""
        return f"{self.effect}[{self.index}] {self.pattern}"

    def matches(self, act: Act[Any]) -> bool:
        # What is allowed is what is named; what is not may hide behind it.
        names = (act.target,) if self.effect is Effect.ALLOW else act.names
        return any(_matches(self.pattern, f"{act.kind}:{name}") for name in names)


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy as a value; the empty one denies everything."""

    rules: tuple[Rule, ...] = ()
    #: The file that it came from, or that would have to be written.
    source: str = str(DEFAULT_FILE)

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a file, YAML or JSON. Raises `SettingsError`, with file and line, for whatever is not a policy."""
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SettingsError(f"{path}: is not UTF-8 text") from error
        except OSError as error:
            raise SettingsError(f"{path}: the policy cannot be read: {error.strerror}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str = str(DEFAULT_FILE)) -> Policy:
        """Read a policy from text, YAML or JSON; `source` is what its errors and reasons call it."""
        lists, lines = _read(text, source)
        return cls.of(lists, source, lines)

    @classmethod
    def of(
        cls, lists: Mapping[str, object], source: str = str(DEFAULT_FILE), lines: Mapping[str, int] | None = None
    ) -> Policy:
        """A policy from its lists, already read.

        `lines` says where each stood in the source, by address: `allow`, `allow[0]`.
        """
        lines = lines or {}
        rules: list[Rule] = []
        for name, patterns in lists.items():
            effect = _effect(name, source, lines.get(name, 0))
            if not isinstance(patterns, list | tuple):
                _refuse(source, lines.get(name, 0), f"{name} must be a list of patterns; write {name}: [] for none")
            for index, pattern in enumerate(patterns):
                address = f"{name}[{index}]"
                rules.append(Rule(effect, index, _pattern(pattern, address, source, lines.get(address, 0))))
        return cls(tuple(rules), source)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of acts of which any may happen."""
        rules = [rule.pattern for rule in self.rules if rule.effect is not Effect.DENY]
        return frozenset(pattern.partition(":")[0] for pattern in rules)

    def decide(self, act: Act[Any]) -> Decision:
        """The decision on an act, by the first rule of the strongest list that matches it."""
        for effect in Effect:
            for rule in self.rules:
                if rule.effect is effect and rule.matches(act):
                    return Decision.on(
                        act, effect, str(rule), f"{_named(act)} {_SAYS[effect]} by {rule} in {self.source}"
                    )
        return Decision.on(act, Effect.DENY, "default", f"nothing allows {_named(act)}{self._remedy(act)}")

    def _remedy(self, act: Act[Any]) -> str:
        # A name made by a model may hold a `*`, and an operator who copies it would allow more than this one act.
        if _ODD.search(act.target) or "*" in act.target:
            return f" in {self.source}"
        return f": add '{act.kind}:{act.target}' to allow in {self.source}"


def load_policy(settings: Settings) -> Policy:
    """The policy of this process: the file of the settings, else `ferrum.policy.yaml` here, else the empty one.

    Raises `SettingsError`, also for the file here where nobody has trusted it (`ferrum trust`).
    """
    if settings.policy is not None:
        return Policy.load(settings.policy.expanduser())
    text = trust.read_trusted(DEFAULT_FILE, settings)
    return Policy() if text is None else Policy.parse(text)


_SAYS: Final = {Effect.DENY: "is denied", Effect.ASK: "needs a person's yes", Effect.ALLOW: "is allowed"}


def _named(act: Act[Any]) -> str:
    return f"{act.kind} {act.target!r}"


def _matches(pattern: str, text: str) -> bool:
    head, *rest = pattern.split("*")
    if not rest:
        return text == pattern
    *middle, tail = rest
    if not text.startswith(head):
        return False
    at = len(head)
    # The leftmost place of each part leaves the most room for the next, so nothing need ever be tried twice.
    for part in middle:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return text.endswith(tail) and at + len(tail) <= len(text)


def _effect(name: str, source: str, line: int) -> Effect:
    try:
        return Effect(name)
    except ValueError:
        known = did_you_mean(str(name), [effect.value for effect in Effect])
        _refuse(source, line, f"{name!r} is not a list of a policy{known}")


def _pattern(pattern: object, address: str, source: str, line: int) -> str:
    if not isinstance(pattern, str):
        _refuse(source, line, f'{address} is not text: a pattern is written like "tool:git.*", in quotes')
    kind, colon, target = pattern.partition(":")
    if not colon or kind not in _KINDS:
        known = did_you_mean(kind.lower(), _KINDS)
        _refuse(source, line, f"{address} is {pattern!r}: a pattern begins with {_BEGINNINGS}{known}")
    if not target:
        _refuse(source, line, f"{address} is {pattern!r}, which matches nothing: write '{kind}:*' for every {kind}")
    if odd := _ODD.search(pattern):
        _refuse(source, line, f"{address} is {pattern!r}: {odd[0]!r} has no meaning in a pattern, only '*' has")
    if (other := nearest(kind, target)) is not None:
        _refuse(source, line, f"{address} is {pattern!r}, which can never match: write '{kind}:{other}'")
    return pattern


def _refuse(source: str, line: int, message: str) -> NoReturn:
    raise SettingsError(f"{source}:{line}: {message}" if line else f"{source}: {message}")


def _read(text: str, source: str) -> tuple[dict[str, object], dict[str, int]]:
    """The lists of a policy's text, and the line of each by its address.

    What is neither a list nor text comes out as its YAML node, which `Policy.of` refuses.
    """
    if too_much := unbounded(text):
        _refuse(source, 0, too_much)
    try:
        # JSON may be indented with tabs and YAML may not; inside a JSON string there is never a raw one.
        root = yaml.compose(text.replace("\t", " ") if text.lstrip().startswith("{") else text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        _refuse(source, _line(error.problem_mark), f"is not YAML: {error.problem}")
    except yaml.YAMLError as error:
        _refuse(source, 0, f"is not YAML: {error}")
    if root is None:
        return {}, {}
    if not isinstance(root, yaml.MappingNode):
        _refuse(source, _line(root.start_mark), "a policy is the lists allow, ask and deny")
    lists: dict[str, object] = {}
    lines: dict[str, int] = {}
    for key, value in root.value:
        name = str(key.value)
        if name in lists:
            _refuse(source, _line(key.start_mark), f"{name!r} is there twice; make it one list")
        lines[name] = _line(key.start_mark)
        lists[name] = value
        if isinstance(value, yaml.SequenceNode):
            lists[name] = [_plain(item) for item in value.value]
            lines.update({f"{name}[{index}]": _line(item.start_mark) for index, item in enumerate(value.value)})
    return lists, lines


def _plain(node: yaml.Node) -> object:
    return node.value if node.tag == "tag:yaml.org,2002:str" else node


def _line(mark: yaml.Mark | None) -> int:
    return mark.line + 1 if mark is not None else 0

"""What an MCP server is and what a tool of it is, as values; and the file that names the servers."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import JsonValue

from ferrum.bounds import unbounded
from ferrum.errors import Problem, SettingsError, did_you_mean
from ferrum.local import trust
from ferrum.local.process import findable
from ferrum.settings import Settings, passwords_in, says_secret

#: Where every tool call carries the idempotency key of its step: in the request's `_meta`.
IDEMPOTENCY_KEY = "ferrum/idempotency_key"

_TOP = ("servers", "mcpServers")
_KEYS = ("command", "module", "args", "env", "cwd", "timeout", "start_timeout", "type")
_NAME = re.compile(r"[a-z0-9_-]+")
_VARIABLE = re.compile(r"(\$?)\$\{([^}]{0,200})\}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_AUTHORIZATION = re.compile(r"\b(?:bearer|basic|token)\s(\S+)", re.IGNORECASE)

#: Variables whose values are no secret wherever they turn up.
_OPEN_VARIABLES = frozenset({"HOME", "LANG", "LOGNAME", "PATH", "PWD", "TMPDIR", "USER"})


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How to start one MCP server, over stdio."""

    #: A program's path, or its name: `python` and `python3` are the interpreter that runs ferrum; another name is
    #: looked for on PATH, then beside that interpreter.
    command: str
    args: tuple[str, ...] = field(default=(), repr=False)
    #: All of the server's environment but for PATH, which is ours unless it is named here.
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: Where the server runs; ours if `None`.
    cwd: Path | None = None
    #: The longest one call may take, in seconds.
    timeout: float = 30.0
    #: The longest a start may take, in seconds, up to the list of its tools.
    start_timeout: float = 30.0
    #: What came from our environment, and what the file itself gives the server in its own; blanked in messages.
    secrets: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """One tool, as its server describes it."""

    name: str
    description: str
    #: JSON Schema of the arguments.
    input_schema: Mapping[str, JsonValue]
    #: JSON Schema of the structured result, where the server declares one.
    output_schema: Mapping[str, JsonValue] | None
    #: The server says that the tool changes nothing.
    read_only: bool
    #: The server says that a second call with the same arguments changes nothing more.
    idempotent: bool

    @property
    def repeatable(self) -> bool:
        """Whether a call may be sent again when nobody knows what became of the first."""
        return self.read_only or self.idempotent


def load_servers(settings: Settings, environ: Mapping[str, str]) -> Mapping[str, ServerSpec]:
    """The servers that an operator configured, by name.

    Read from `settings.mcp_servers`, else the file `settings.servers`, else `ferrum.servers.yaml` in the working
    directory, once it is trusted (`ferrum trust`), else there are none. `${NAME}` in an argument or in a value of `env`
    is replaced from `environ`; `$${` stands for `${`.

    Raises `SettingsError` that says everything that is wrong, each with its line.
    """
    if settings.mcp_servers is not None:
        return _parse(settings.mcp_servers, "FERRUM_MCP_SERVERS", environ, bare=True)
    if settings.servers is None:
        here = trust.read_trusted(trust.SERVERS, settings)
        return MappingProxyType({}) if here is None else _parse(here, str(trust.SERVERS), environ, bare=False)
    try:
        text = settings.servers.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{settings.servers}: the servers file cannot be read: {error}") from error
    return _parse(text, str(settings.servers), environ, bare=False)


def _parse(text: str, source: str, environ: Mapping[str, str], *, bare: bool) -> Mapping[str, ServerSpec]:
    tree, marks, repeated = _load(text, source)
    reader = _Reader(marks, environ, repeated)
    servers = reader.servers(tree, bare=bare)
    if reader.problems:
        found = sorted(reader.problems, key=lambda problem: (problem.line, problem.column))
        raise SettingsError("\n".join(f"{source}:{'' if problem.line else ' '}{problem}" for problem in found))
    return MappingProxyType(servers)


_Path = tuple[str, ...]
_Marks = dict[_Path, tuple[int, int]]


def _load(text: str, source: str) -> tuple[Any, _Marks, list[Problem]]:
    # YAML forbids the tabs that JSON may be indented with; a bare tab in JSON is never more than blank space.
    if text.lstrip().startswith("{"):
        text = text.replace("\t", " ")
    if too_much := unbounded(text):
        raise SettingsError(f"{source}: {too_much}")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = _json_or_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise SettingsError(f"{source}{where}: neither YAML nor JSON: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: neither YAML nor JSON: {error}") from error
    marks: _Marks = {}
    repeated: list[Problem] = []
    _walk(node, (), marks, repeated)
    return tree, marks, repeated


def _json_or_yaml(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def _walk(node: yaml.Node | None, path: _Path, marks: _Marks, repeated: list[Problem]) -> None:
    """Note where each key stands, as deep as a servers file goes."""
    if not isinstance(node, yaml.MappingNode) or len(path) > 3:
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        line, column = key.start_mark.line + 1, key.start_mark.column + 1
        if here in marks:
            repeated.append(Problem("is there twice; keep one", ".".join(here), line, column))
        marks[here] = (line, column)
        _walk(value, here, marks, repeated)


class _Reader:
    """Makes specs of plain data and notes every problem on the way."""

    def __init__(self, marks: _Marks, environ: Mapping[str, str], problems: list[Problem]) -> None:
        self.problems = problems
        self._marks = marks
        self._environ = environ

    def servers(self, tree: Any, *, bare: bool) -> dict[str, ServerSpec]:
        path, found = self._find(tree, bare=bare)
        specs: dict[str, ServerSpec] = {}
        for name, value in found.items():
            here = (*path, str(name))
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                self._wrong(here, "a server's name is made of a-z, 0-9, '_' and '-'")
            elif not isinstance(value, dict):
                self._wrong(here, "a server is a map with `command` or `module`")
            elif spec := self._server(here, value):
                specs[name] = spec
        return specs

    def _find(self, tree: Any, *, bare: bool) -> tuple[_Path, dict[Any, Any]]:
        """The map of servers, and where it stands."""
        if tree is None:
            return (), {}
        if not isinstance(tree, dict):
            self._wrong((), "this must be a map with `servers:` (or `mcpServers:`) on top")
            return (), {}
        tops = [key for key in tree if key in _TOP]
        if not tops and bare:
            return (), tree
        for key in tree:
            if key not in _TOP:
                self._wrong((str(key),), f"unknown key {key!r}{did_you_mean(str(key), _TOP)}")
        if len(tops) > 1:
            self._wrong((tops[1],), f"{tops[0]!r} is there already; keep one")
        found = (tree[tops[0]] or {}) if tops else {}
        if not isinstance(found, dict):
            self._wrong((tops[0],), "this must be a map from a name to a server")
            return (), {}
        return tuple(tops[:1]), found

    def _server(self, path: _Path, raw: dict[Any, Any]) -> ServerSpec | None:
        before = len(self.problems)
        if "url" in raw:
            self._wrong((*path, "url"), "servers over HTTP are not there yet; give a `command` that is started here")
        for key in raw:
            if key != "url" and key not in _KEYS:
                self._wrong((*path, str(key)), f"unknown key {key!r}{did_you_mean(str(key), _KEYS)}")
        if raw.get("type", "stdio") != "stdio" and "url" not in raw:
            self._wrong((*path, "type"), "only `stdio` is there yet")
        command, first, extra = self._program(path, raw)
        args, in_args = self._args((*path, "args"), raw.get("args"))
        env, in_env = self._env((*path, "env"), raw.get("env"))
        cwd = self._text((*path, "cwd"), raw["cwd"]) if raw.get("cwd") is not None else None
        spec = ServerSpec(
            command=command,
            args=(*first, *args),
            env=MappingProxyType({**extra, **env}),
            cwd=Path(cwd) if cwd is not None else None,
            timeout=self._seconds((*path, "timeout"), raw.get("timeout", 30.0)),
            start_timeout=self._seconds((*path, "start_timeout"), raw.get("start_timeout", 30.0)),
            secrets=tuple(sorted(in_args | in_env, key=len, reverse=True)),
        )
        return spec if len(self.problems) == before else None

    def _program(self, path: _Path, raw: dict[Any, Any]) -> tuple[str, tuple[str, ...], dict[str, str]]:
        """The command, what goes before the arguments, and what goes into the environment."""
        if ("command" in raw) == ("module" in raw):
            if "url" not in raw:
                self._wrong(path, "give `command` (a program) or `module` (a Python module), and not both")
            return "", (), {}
        if "command" in raw:
            return self._text((*path, "command"), raw["command"]), (), {}
        module = self._text((*path, "module"), raw["module"])
        if not module.startswith("ferrum."):
            return sys.executable, ("-m", module), {}
        # -P: a server of ours may be given a stranger's repository as `cwd`, where modules must not be looked for.
        return sys.executable, ("-P", "-m", module), findable({})

    def _args(self, path: _Path, raw: Any) -> tuple[list[str], set[str]]:
        if raw is None:
            return [], set()
        if not isinstance(raw, list):
            self._wrong(path, "this must be a list")
            return [], set()
        filled = [self._fill(path, self._text(path, value, empty=True)) for value in raw]
        args = [text for text, _ in filled]
        return args, set().union(_secret_arguments(args), *(secrets for _, secrets in filled))

    def _env(self, path: _Path, raw: Any) -> tuple[dict[str, str], set[str]]:
        if raw is None:
            return {}, set()
        if not isinstance(raw, dict):
            self._wrong(path, "this must be a map")
            return {}, set()
        env: dict[str, str] = {}
        secrets: set[str] = set()
        for name, value in raw.items():
            here = (*path, str(name))
            if not isinstance(name, str) or not _VARIABLE_NAME.fullmatch(name):
                self._wrong(here, "not the name of an environment variable")
                continue
            env[name], used = self._fill(here, self._text(here, value, empty=True))
            secrets |= used | _secret_value(name, env[name])
        return env, secrets

    def _fill(self, path: _Path, text: str) -> tuple[str, set[str]]:
        """`text` with each `${NAME}` replaced, and those of the values that might be secret."""
        used: set[str] = set()

        def value(match: re.Match[str]) -> str:
            escaped, name = match.groups()
            if escaped:
                return match[0][1:]
            if not _VARIABLE_NAME.fullmatch(name):
                self._wrong(path, f"'${{{name}}}' is no variable; write `${{NAME}}`, or `$${{` for a plain `${{`")
                return ""
            if name not in self._environ:
                self._wrong(path, f"${{{name}}} is not set in the environment{_near(name, self._environ)}")
                return ""
            if name not in _OPEN_VARIABLES and len(self._environ[name]) >= 8:
                used.add(self._environ[name])
            return self._environ[name]

        return _VARIABLE.sub(value, text), used

    def _text(self, path: _Path, raw: Any, *, empty: bool = False) -> str:
        if not isinstance(raw, str):
            # Without the value, which may be a password of digits.
            self._wrong(path, "this must be text; put it in quotes")
            return ""
        if "\0" in raw or not (raw or empty):
            self._wrong(path, "this must not be empty" if not raw else "this must not hold a NUL character")
        return raw

    def _seconds(self, path: _Path, raw: Any) -> float:
        if isinstance(raw, bool) or not isinstance(raw, int | float) or not (math.isfinite(raw) and raw > 0):
            self._wrong(path, f"{raw!r} must be a number of seconds above 0")
            return 1.0
        return float(raw)

    def _wrong(self, path: _Path, message: str) -> None:
        mark = next((self._marks[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self._marks), (0, 0))
        self.problems.append(Problem(message, ".".join(path), *mark))


def _secret_value(name: str, value: str) -> set[str]:
    """Return the secret part of a value in a server's environment: all, unless its name or its look says otherwise."""
    if says_secret(name):
        return {value} if len(value) >= 4 else set()
    if "://" in value:
        return passwords_in(value)
    is_open = name in _OPEN_VARIABLES or value.startswith(("/", "./", "../", "~/"))
    return {value} if len(value) >= 8 and not is_open else set()


def _secret_arguments(args: Sequence[str]) -> set[str]:
    """The values of options whose names say so (`--token=…`, `--token …`), of `Authorization`, and in URLs."""
    found: set[str] = set()
    for option, value in zip(args, [*args[1:], ""], strict=True):
        name, assigned, inside = option.partition("=")
        if name.startswith("-") and says_secret(name):
            found.add(inside if assigned else value)
        found |= passwords_in(option) | {match[1] for match in _AUTHORIZATION.finditer(option)}
    return {secret for secret in found if len(secret) >= 4}


def _near(name: str, environ: Mapping[str, str]) -> str:
    """Like `did_you_mean`, without the list of everything that is in the environment."""
    near = did_you_mean(name, environ)
    return near if near.startswith(" (did") else ""

"""Small YAML or JSON files that an operator wrote, checked against a pydantic model, with errors by line."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ferrum.bounds import unbounded
from ferrum.errors import SettingsError, did_you_mean

M = TypeVar("M", bound=BaseModel)

_Loc = tuple[int | str, ...]


def load(path: Path, shape: type[M]) -> M:
    """Read a file, YAML or JSON. Raises `SettingsError`, with file and line, for whatever is not of that shape."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8 text") from error
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    return parse(text, shape, str(path))


def parse(text: str, shape: type[M], source: str) -> M:
    """Read text, YAML or JSON; `source` is what errors call it. An empty text is an empty mapping."""
    value, lines = _read(text, source)
    return check(value, shape, source, lines)


def check(value: object, shape: type[M], source: str, lines: dict[_Loc, int] | None = None) -> M:
    """Check a value that was already read; `lines` says where each part of it stood.

    Raises `SettingsError` with everything that is wrong, a line each.
    """
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        problems = [_sentence(problem, shape, source, lines or {}) for problem in error.errors(include_url=False)]
        raise SettingsError("\n".join(problems)) from error


def _sentence(problem: Any, shape: type[BaseModel], source: str, lines: dict[_Loc, int]) -> str:
    loc: _Loc = problem["loc"]
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = f"is not known here{did_you_mean(str(loc[-1]), _keys(shape, loc[:-1]))}"
    elif problem["type"] == "missing":
        message = "is missing"
    elif problem["type"] == "model_type":
        message = f"must be a mapping; its keys: {', '.join(_keys(shape, loc))}"
    line = next((lines[loc[:end]] for end in range(len(loc), -1, -1) if loc[:end] in lines), 0)
    where = f"{source}:{line}" if line else source
    return f"{where}: {_address(loc)}: {message}" if loc else f"{where}: {message}"


def _address(loc: _Loc) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _keys(shape: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys that may stand at `loc`, as they are written."""
    for part in loc:
        field = next((f for name, f in shape.model_fields.items() if part in (f.alias, name)), None)
        if field is not None:
            shape = next(_shapes(field.annotation), shape)
    return [field.alias or name for name, field in shape.model_fields.items()]


def _shapes(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _shapes(argument)


def _read(text: str, source: str) -> tuple[object, dict[_Loc, int]]:
    # JSON may be indented with tabs and YAML may not; inside a JSON string there is never a raw one.
    text = text.replace("\t", " ") if text.lstrip().startswith("{") else text
    if too_much := unbounded(text):
        _refuse(source, None, too_much)
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:
        _refuse(source, None, f"is not YAML: {error}", error)
    try:
        root = loader.get_single_node()
        if root is None:
            return {}, {}
        lines: dict[_Loc, int] = {}
        _walk(root, (), lines, source)
        return loader.construct_document(root), lines
    except yaml.MarkedYAMLError as error:
        _refuse(source, error.problem_mark, f"is not YAML: {error.problem}", error)
    except (yaml.YAMLError, ValueError) as error:
        _refuse(source, None, f"is not YAML: {error}", error)
    finally:
        loader.dispose()


def _walk(node: yaml.Node, loc: _Loc, lines: dict[_Loc, int], source: str) -> None:
    lines.setdefault(loc, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*loc, index), lines, source)
    elif isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            if key.value in seen:
                _refuse(source, key.start_mark, f"{_address((*loc, str(key.value)))} is there twice")
            seen.add(key.value)
            lines[(*loc, str(key.value))] = key.start_mark.line + 1
            _walk(value, (*loc, str(key.value)), lines, source)


def _refuse(source: str, mark: yaml.Mark | None, message: str, cause: Exception | None = None) -> NoReturn:
    where = f"{source}:{mark.line + 1}" if mark is not None else source
    raise SettingsError(f"{where}: {message}") from cause

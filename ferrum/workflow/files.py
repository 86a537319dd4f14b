"""A workflow that is made of several files: what a step names by `file` is read and put in its place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from pydantic import JsonValue

from ferrum.errors import Problem, WorkflowError
from ferrum.workflow import parts
from ferrum.workflow.text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Places, Where, read

_Step: TypeAlias = dict[str, JsonValue]


def gathered(path: str | os.PathLike[str]) -> tuple[JsonValue, Places]:
    """The value that a file holds, with the files that it names in their places, and where its parts stand.

    Raises `WorkflowError`. What is wrong in a file that another names is said at the place that names it.
    """
    whole = _Gathering(Path(path).parent).file(Path(path), str(path), ())
    return whole.value, whole.places


@dataclass(frozen=True, slots=True)
class _Whole:
    """A file with those that it names in their places."""

    value: JsonValue
    places: Places
    size: int
    count: int
    depth: int


@dataclass(slots=True)
class _Gathering:
    top: Path
    #: By their real paths, so that a file that is named often is read once, and what is wrong in it said once.
    read: dict[Path, _Whole] = field(default_factory=dict)
    failed: set[Path] = field(default_factory=set)

    def file(self, path: Path, source: str, chain: tuple[Path, ...], depth: int = 0) -> _Whole:
        real = path.resolve()
        if real in self.failed:
            raise WorkflowError([], source)
        if real not in self.read:
            try:
                self.read[real] = self._filled(_alone(path, source), path, (*chain, path), depth)
            except WorkflowError:
                self.failed.add(real)
                raise
        return self.read[real]

    def _filled(self, whole: _Whole, path: Path, chain: tuple[Path, ...], depth: int) -> _Whole:
        problems: list[Problem] = []
        failed = False
        for where, step in [*_by_file(whole.value)]:
            try:
                inner = self._named(step["file"], path, chain, depth + len(where) + 1)
            except WorkflowError as error:
                failed = True
                problems += (_at(problem, error.source, whole.places, where) for problem in error.problems)
                continue
            if not failed:
                whole = _with(whole, inner, where)
            # In the place of `file`, so that the order of keys stays the author's.
            items = [("workflow", inner.value) if key == "file" else (key, item) for key, item in step.items()]
            step.clear()
            step.update(items)
        if failed:
            raise WorkflowError(problems, whole.places.source)
        return whole

    def _named(self, name: JsonValue, path: Path, chain: tuple[Path, ...], depth: int) -> _Whole:
        if not isinstance(name, str) or not name:
            raise WorkflowError([Problem("a file is named by its path, relative to this file")])
        if "{{" in name:
            raise WorkflowError([Problem("a file is put in when this one is read: its path cannot be an expression")])
        inner = path.parent / name
        if inner.resolve() in [one.resolve() for one in chain]:
            first = [one.resolve() for one in chain].index(inner.resolve())
            shown = " -> ".join(os.path.relpath(one, self.top) for one in (*chain[first:], chain[first]))
            raise WorkflowError([Problem(f"these files need each other: {shown}")])
        if depth > MAX_DEPTH:
            raise WorkflowError([Problem(f"with this file in its place the workflow has more than {MAX_DEPTH} levels")])
        return self.file(inner, os.path.normpath(inner), chain, depth)


def _by_file(value: JsonValue) -> Iterator[tuple[Where, _Step]]:
    """The steps that name a file, also those of workflows that stand in this one; not where they name two things."""
    for where, step in parts.walk(parts.mapping(value), deep=True):
        named = step.keys() & {"file", "workflow", "name"}
        if isinstance(step, dict) and step.get("type") == "workflow" and named == {"file"}:
            yield where, step


def _alone(path: Path, source: str) -> _Whole:
    text = _text(path, source)
    value, places = read(text, source)
    return _Whole(value, places, len(text.encode()), len(places.values), max(map(len, places.values)))


def _with(whole: _Whole, inner: _Whole, where: Where) -> _Whole:
    """A file with another in its place at `where`. Raises `WorkflowError` where that is too much."""
    places = replace(whole.places, files={**whole.places.files, (*where, "workflow"): inner.places})
    both = _Whole(
        whole.value,
        places,
        whole.size + inner.size,
        whole.count + inner.count,
        max(whole.depth, len(where) + 1 + inner.depth),
    )
    for much, most, what in (
        (both.size, MAX_BYTES, "more than {} bytes"),
        (both.count, MAX_VALUES, "more than {} values"),
        (both.depth, MAX_DEPTH, "more than {} levels"),
    ):
        if much > most:
            reason = f"with this file in its place the workflow has {what.format(most)}"
            raise WorkflowError([_at(Problem(reason), "", whole.places, where)], whole.places.source)
    return both


def _at(problem: Problem, source: str, places: Places, where: Where) -> Problem:
    """A problem with a file that is named at `where`, or with naming it."""
    return places.problem(str(WorkflowError([problem], source)), *where, "file")


def _text(path: Path, source: str) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode()
    except OSError as error:
        raise WorkflowError([Problem(f"the file cannot be read: {error.strerror}")], source) from error
    except UnicodeDecodeError as error:
        raise WorkflowError([Problem(f"the file is not UTF-8: byte {error.start} is none")], source) from error

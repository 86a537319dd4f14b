"""`ferrum index …`: documents that workflows may search."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ferrum.cli.options import as_json_option, done, say, show_json
from ferrum.errors import InputError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from ferrum.governance.acts import Document
    from ferrum.retrieval.indexes import Added, Indexes
    from ferrum.retrieval.store import Counts, Index

_T = TypeVar("_T")

#: So much of a document is shown.
_SHOWN = 400

_name = click.argument("name")


@click.group("index")
def index() -> None:
    """Keep documents that workflows may search; those of your tenant, FERRUM_TENANT."""


def _on_indexes(do: Callable[[Indexes, str], _T]) -> _T:
    from ferrum.retrieval import Indexes
    from ferrum.settings import settings

    indexes = Indexes.of(settings())
    try:
        return do(indexes, settings().tenant)
    finally:
        indexes.close()


def _awaited(do: Callable[[Indexes, str, Any], Coroutine[Any, Any, _T]]) -> _T:
    """The same on an event loop, with a provider's model at hand, asked with this environment's key."""

    async def main(indexes: Indexes, tenant: str) -> _T:
        from ferrum.models import embeddings

        async with embeddings.direct() as embed:
            return await do(indexes, tenant, embed)

    return _on_indexes(lambda indexes, tenant: asyncio.run(main(indexes, tenant)))


@index.command("create")
@_name
@click.option(
    "--embedding",
    metavar="EMBEDDER",
    help="A provider's model, such as openai/text-embedding-3-small; local, lexical or none. Default: "
    "FERRUM_EMBEDDING, else by the provider's key that is set, else local where it is installed, else lexical.",
)
@as_json_option
def create_index(name: str, embedding: str | None, as_json: bool) -> None:
    """Make an empty index, pinned to what embeds its documents."""
    from ferrum.retrieval import embedders
    from ferrum.settings import settings

    chosen = embedding or embedders.default(settings(), os.environ)
    made = _on_indexes(lambda indexes, tenant: indexes.create(tenant, name, chosen))
    done(_value(made), f"{made.name}  {made.embedding} ({embedders.about(made.embedding)})", as_json)


@index.command("add")
@_name
@click.argument("paths", nargs=-1, required=True, metavar="PATH|GLOB|-...")
@click.option("--metadata", "-m", multiple=True, metavar="K=V", help="What filters can ask for; repeatable.")
@click.option("--prune", is_flag=True, help="Take out what came from these paths earlier and is gone from there.")
@click.option("--as", "stdin_name", default="stdin", show_default=True, help="What standard input is called: notes.md.")
@as_json_option
def add_documents(
    name: str, paths: tuple[str, ...], *, metadata: tuple[str, ...], prune: bool, stdin_name: str, as_json: bool
) -> None:
    """Put files, folders, patterns or standard input into an index; only what changed is embedded again."""
    from ferrum.retrieval import documents

    given = pairs("--metadata", metadata)
    gone = documents.absent(paths)
    if gone and not prune:
        raise documents.not_there(gone[0], "; what came from it earlier is taken out with --prune")
    there = [path for path in paths if path not in gone]
    total = documents.count(there)
    originals = documents.read(there, metadata=given, stdin=sys.stdin.buffer, stdin_name=stdin_name)

    async def fill(indexes: Indexes, tenant: str, embed: Any) -> Added:
        for path in gone:
            if not indexes.has_from(tenant, name, path):
                raise documents.not_there(path, f", and nothing in index {name!r} is from there")
        return await indexes.add(tenant, name, originals, embed=embed, prune=paths if prune else (), progress=show)

    with click.progressbar(length=total, file=sys.stderr, hidden=not sys.stderr.isatty(), label=name) as bar:

        def show(added: Added) -> None:
            bar.update(added.seen - bar.pos)

        added = _awaited(fill)
    for one in added.left_out:
        say(f"left out: {one.why}", err=True)
    value = asdict(added)
    del value["seen"]
    value["left_out"] = [{"name": one.name, "why": one.why} for one in added.left_out]
    done(value, _sentence(added), as_json)


def _sentence(added: Added) -> str:
    parts = [f"{added.added} added", f"{added.updated} updated", f"{added.unchanged} unchanged"]
    parts += [f"{added.removed} removed"] if added.removed else []
    parts += [f"{len(added.left_out)} left out"] if added.left_out else []
    return f"{', '.join(parts)}; {added.embedded} texts embedded"


@index.command("search")
@_name
@click.argument("query")
@click.option("--top-k", type=int, default=5, show_default=True, help="At most so many documents.")
@click.option(
    "--mode", type=click.Choice(["hybrid", "vector", "text"]), default="hybrid", show_default=True,
    help="By words and meaning, by meaning, or by words.",
)  # fmt: skip
@click.option("--filter", "-f", "filters", multiple=True, metavar="K=V", help="Metadata to have; repeatable.")
@click.option("--min-score", type=float, help="Leave out documents with a lower score, which is from 0 to 1.")
@click.option("--diversity", type=float, help="From 0, the nearest, to 1, unlike each other.")
@as_json_option
def search_index(name: str, query: str, *, filters: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Print the documents that answer a query best."""
    from ferrum.governance.acts import Search

    search = Search(index=name, query=query, filter=pairs("--filter", filters), **options)
    found = _awaited(lambda indexes, tenant, embed: indexes.search(tenant, search, embed=embed)).documents
    if as_json:
        show_json({"documents": [one.model_dump(mode="json") for one in found]})
        return
    for one in found:
        _show(one)
    if not found:
        say("nothing was found", err=True)


def _show(document: Document) -> None:
    # What others wrote must not steer a terminal.
    from ferrum.follow import one_line
    from ferrum.terminal import visible

    at = document.position
    lines = "-".join(dict.fromkeys(str(at[key]) for key in ("line", "end_line") if key in at))
    place = [f"{document.source}:{lines}" if lines else document.source]
    place += [f"page {at['page']}"] if "page" in at else []
    place += [str(at[key]) for key in ("heading", "name") if key in at]
    say(f"{document.score:.3f}  {one_line('  '.join(place))}")
    text = document.text if len(document.text) <= _SHOWN else f"{document.text[:_SHOWN]}…"
    say("".join(f"       {line}\n" for line in visible(text).split("\n")))


@index.command("list")
@as_json_option
def list_indexes(as_json: bool) -> None:
    """List what indexes there are, and how much is in them."""
    from ferrum.retrieval import embedders

    found, unreadable = _on_indexes(lambda indexes, tenant: (indexes.list(tenant), indexes.unreadable(tenant)))
    if as_json:
        wrong = [{"name": name, "unreadable": why} for name, why in unreadable.items()]
        show_json([*(_value(one, counts) for one, counts in found), *wrong])
        return
    for one, counts in found:
        held = f"{counts.sources:>7,} documents {counts.chunks:>9,} chunks"
        say(f"{one.name:<20}  {held}  {one.embedding} ({embedders.about(one.embedding)})")
    for why in unreadable.values():
        say(why, err=True)
    if not found and not unreadable:
        say("no indexes yet: make one with 'ferrum index create NAME'", err=True)


@index.command("drop")
@_name
@as_json_option
def drop_index(name: str, as_json: bool) -> None:
    """Forget an index and all that is in it."""
    _on_indexes(lambda indexes, tenant: indexes.drop(tenant, name))
    done({"dropped": name}, f"dropped {name}", as_json)


def _value(one: Index, counts: Counts | None = None) -> Mapping[str, object]:
    from ferrum.retrieval import embedders

    created = datetime.fromtimestamp(one.created_at, UTC).isoformat(timespec="seconds")
    value = {**one.model_dump(exclude={"created_at"}), "created": created, "about": embedders.about(one.embedding)}
    return value if counts is None else {**value, **asdict(counts)}


def pairs(option: str, texts: Sequence[str]) -> dict[str, JsonValue]:
    """Names and values from `name=value`; a name that comes again has a list of values.

    What is written as JSON writes a number, `true`, `false` or `null` is that, all else is text. Raises `InputError`.
    """
    found: dict[str, list[JsonValue]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"{option} {text!r}: write name=value")
        found.setdefault(name, []).append(_plain(value))
    return {name: values if len(values) > 1 else values[0] for name, values in found.items()}


def _plain(text: str) -> JsonValue:
    try:
        value: JsonValue = json.loads(text, parse_constant=lambda _: text)
    except (ValueError, RecursionError):
        return text
    # 1.10 is a version and no number: it would become 1.1.
    is_plain = isinstance(value, int | float | None) and json.dumps(value) == text
    return value if is_plain else text

"""Judged corpora: documents, what is asked of them, and which of them answer it; and how well a search did."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import math
import re
import statistics
import sysconfig
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import yaml

from ferrum.governance.acts import Search
from ferrum.retrieval.cutting import MOST
from ferrum.retrieval.documents import Original
from ferrum.retrieval.indexes import Indexes
from ferrum.retrieval.store import Store

Mode: TypeAlias = Literal["hybrid", "vector", "text"]

CORPORA = Path(__file__).parent / "corpora"

#: Written in Python alone, and with much to say.
_LIBRARIES = ("aiohttp", "anyio", "celery", "click", "hypothesis", "kombu", "tornado")


@dataclass(frozen=True)
class Query:
    text: str
    #: exact, paraphrase, mixed; or known, where one document is looked for.
    kind: str
    #: Names of documents.
    relevant: Set[str]


@dataclass(frozen=True)
class Corpus:
    #: Texts by name.
    documents: Mapping[str, str]
    queries: Sequence[Query]


def recall(found: Sequence[str], relevant: Set[str], k: int) -> float:
    """Which part of what is relevant is among the first `k` found."""
    return len(set(found[:k]) & relevant) / len(relevant)


def ndcg(found: Sequence[str], relevant: Set[str], k: int) -> float:
    """How far up the relevant ones are among the first `k`: 1 where they come first, less with each place further down.

    Normalized discounted cumulative gain with gains of 0 and 1 (Järvelin and Kekäläinen 2002). What is found again
    counts once.
    """
    ranks = [rank for rank, name in enumerate(dict.fromkeys(found[:k])) if name in relevant]
    best = range(min(k, len(relevant)))
    return sum(1 / math.log2(rank + 2) for rank in ranks) / sum(1 / math.log2(rank + 2) for rank in best)


def constitution() -> Corpus:
    """The Constitution of the United States by passages, with queries of three kinds."""
    documents: dict[str, str] = {}
    article, section, number = "", "", 0
    for block in (CORPORA / "constitution.md").read_text(encoding="utf-8").split("\n\n")[1:]:
        if block.startswith("# "):
            article, section, number = block, "", 0
        elif block.startswith("## "):
            section, number = block, 0
        else:
            number += 1
            place = [article.removeprefix("# ").removeprefix("Article "), section.removeprefix("## Section ")]
            name = ".".join(filter(None, [*place, str(number)]))
            documents[name] = "\n\n".join(filter(None, [article, section, block.strip()]))
    judged = yaml.safe_load((CORPORA / "constitution.queries.yaml").read_text(encoding="utf-8"))
    return Corpus(
        documents,
        [Query(text, kind, frozenset(names)) for kind in judged for text, names in judged[kind].items()],
    )


def libraries(questions: int = 200) -> Corpus:
    """The docstrings of some libraries: a document for each module, class and function.

    `requirements.lock` pins these libraries, so the corpus is the same on every machine and for every Python.

    Some documents have lost their first sentence, which is what is asked: the one that it was taken from is looked
    for, by the rest of it. Which ones that are follows from their names and not from chance.
    """
    documents = dict(_described())
    splits = {name: found for name, text in documents.items() if (found := _first_sentence(text))}
    asked = sorted(splits, key=lambda name: hashlib.sha256(name.encode()).digest())[:questions]
    documents |= {name: splits[name][1] for name in asked}
    return Corpus(documents, [Query(splits[name][0], "known", frozenset({name})) for name in asked])


def _first_sentence(text: str) -> tuple[str, str] | None:
    """The first sentence of what is said, and the document without it; `None` unless both are worth something."""
    head, _, said = text.partition("\n\n")
    match = re.match(r"([A-Z][^.\n]*(?:\n[^.\n]+)*\.)\s+(.+)", said, re.DOTALL)
    if match is None:
        return None
    sentence, rest = " ".join(match[1].split()), " ".join(match[2].split())
    if len(sentence.split()) < 5 or len(rest.split()) < 25 or sentence in rest:
        return None
    return sentence, f"{head}\n\n{match[2]}"


def _described() -> Iterator[tuple[str, str]]:
    site = Path(sysconfig.get_path("purelib"))
    for path in sorted(path for library in _LIBRARIES for path in (site / library).rglob("*.py")):
        parts = path.relative_to(site).with_suffix("").parts
        if {"test", "tests"} & set(parts) or any(part.startswith("_") for part in parts if part != "__init__"):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        yield from _in_source(module, path.read_text(encoding="utf-8"))


def _in_source(module: str, source: str) -> Iterator[tuple[str, str]]:
    tree = ast.parse(source)
    if said := ast.get_docstring(tree):
        yield module, f"# {module}\n\n{said}"
    todo: list[tuple[str, ast.AST]] = [(module, tree)]
    while todo:
        above, node = todo.pop()
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = f"{above}.{child.name}"
            if isinstance(child, ast.ClassDef):
                todo.append((name, child))
            said = ast.get_docstring(child)
            if said and not child.name.startswith("_"):
                signature = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                yield name, f"# {name}{signature}\n\n{said}"


@dataclass(frozen=True)
class Quality:
    """How well a search did, as means over queries."""

    queries: int
    recall: float
    ndcg: float


def indexed(store: Store, corpus: Corpus, embedding: str) -> str:
    """The name of a new index of tenant `judge` that holds the corpus."""
    indexes, name = Indexes(store), f"judged-{uuid.uuid4().hex}"
    indexes.create("judge", name, embedding)
    # Whole documents, as far as they have no headings within: what is judged is the search, and not how they are cut.
    originals = [Original(f"{title}.md", text) for title, text in corpus.documents.items()]
    asyncio.run(indexes.add("judge", name, originals, max_chars=MOST))
    return name


def judge(store: Store, name: str, queries: Sequence[Query], mode: Mode, *, k: int = 10) -> Quality:
    """How well an index answers these queries, by recall and nDCG of the first `k` documents."""

    async def ask() -> list[list[str]]:
        indexes = Indexes(store)
        asked = [Search(index=name, query=query.text, top_k=k, mode=mode) for query in queries]
        replies = [await indexes.search("judge", search) for search in asked]
        return [[document.source.removesuffix(".md") for document in reply.documents] for reply in replies]

    found = asyncio.run(ask())
    judged = list(zip(found, queries, strict=True))
    return Quality(
        len(queries),
        statistics.fmean(recall(names, query.relevant, k) for names, query in judged),
        statistics.fmean(ndcg(names, query.relevant, k) for names, query in judged),
    )

"""One search: what is found by words and by meaning, put together, without doubles, and if asked unlike each other.

The score of a document is from 0 to 1, and what it says depends on the mode:

- `vector`: the cosine between the query and the document. It can be compared between queries to the same index. Where
  it is 0 or less, the document is not found.
- `text`: BM25 as a share of the best document's, which has 1.
- `hybrid`: reciprocal rank fusion as a share of what a document has that is first by words and by meaning; one that
  only one of both found has at most 0.5, or, where embedder `lexical` stands for meaning, 0.91 by words and 0.09 by it.
  It says how far in front a document is, and not how well it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from ferrum.governance.acts import Document, Search, SearchReply
from ferrum.retrieval.embedders import LEXICAL
from ferrum.retrieval.store import Found, Hit, Index, Store, Vector, clauses
from ferrum.retrieval.words import words

#: How little it matters whether a document is first or second: Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion
#: outperforms Condorcet and individual Rank Learning Methods", SIGIR 2009.
_K: Final = 60
#: Of those found by words, what has less than this share of the best one's BM25 is left out of the fusion. It shares a
#: word or two with the query, which is chance where the query puts it in other words: with all of them, hybrid does
#: worse on the tests' judged corpora than meaning alone; with any share from 0.4 to 0.6 it does better than both.
_STRONG: Final = 0.5
#: How much the ranking of embedder `lexical` counts beside that of BM25: it looks at the same words, and not as well.
_LEXICAL: Final = 0.1
#: Of each kind at least so many are looked at, and so many times as many as are asked for.
_DEPTH: Final = 50
_TIMES: Final = 4
#: Where fewer than this share of them say different things, so many times as many are looked at.
_DISTINCT: Final = 0.5
_DEEPER: Final = 4


def find(store: Store, index: Index, search: Search, vector: Vector | None) -> SearchReply:
    """What `search` finds, the best first; `vector` is the query's, `None` where words alone are looked for. Blocks."""
    # A document that was put again between both looks has another id now.
    for _ in range(_TRIES):
        hits = _hits(store, index, search, vector)
        found = store.fetch(index, [hit.id for hit in hits], vectors=search.diversity is not None)
        if len(found) == len(hits):
            break
    scores = {hit.id: hit.score for hit in hits}
    ranked = [(one, scores[one.id]) for one in found if scores[one.id] >= (search.min_score or 0)]
    if search.diversity:
        ranked = diverse(ranked, search.top_k, search.diversity)
    return SearchReply(documents=tuple(_document(one, score) for one, score in ranked[: search.top_k]))


_TRIES: Final = 3


def _hits(store: Store, index: Index, search: Search, vector: Vector | None) -> list[Hit]:
    """What is found, each text once, the best first."""
    depth = max(_DEPTH, _TIMES * search.top_k)
    filter = clauses(search.filter)
    near: list[Hit] = []
    if vector is not None:
        nearest = _distinct(lambda limit: store.by_vector(index, vector, limit, filter), depth)
        # What has nothing in common with the query is not near to it, however few there are.
        near = [replace(hit, score=min(1.0, hit.score)) for hit in nearest if _shown(hit.score) > 0]
    if search.mode == "vector":
        return near
    by_text = _distinct(lambda limit: store.by_text(index, search.query, limit, filter), depth)
    best = by_text[0].score if by_text else 0
    if search.mode == "text" or not index.has_vectors:
        return [replace(hit, score=hit.score / best if best > 0 else 1.0) for hit in by_text]
    strong = [hit for hit in by_text if hit.score >= _STRONG * best]
    return fused([(strong, 1.0), (near, _LEXICAL if index.embedding == LEXICAL else 1.0)])


def _distinct(ask: Callable[[int], Sequence[Hit]], depth: int) -> list[Hit]:
    """The first of each text among the best `depth`, and of more where most of these say the same."""
    most, enough = depth, depth * _DISTINCT
    while True:
        hits = ask(depth)
        first: dict[str, Hit] = {}
        for hit in hits:
            first.setdefault(hit.digest, hit)
        if len(first) >= enough or len(hits) < depth:
            return list(first.values())[:most]
        depth *= _DEEPER


def fused(rankings: Sequence[tuple[Sequence[Hit], float]]) -> list[Hit]:
    """Several rankings, each with its weight, as one by reciprocal rank fusion: 1 is first in all of them.

    A text is the same in all of them, whichever of the sources that have it one names; that of the first is kept.
    """
    sums: dict[str, float] = {}
    first: dict[str, Hit] = {}
    for ranking, weight in rankings:
        for rank, hit in enumerate(ranking, 1):
            sums[hit.digest] = sums.get(hit.digest, 0.0) + weight / (_K + rank)
            first.setdefault(hit.digest, hit)
    most = sum(weight for _, weight in rankings) / (_K + 1)
    # Of equals, the one comes first that the first ranking has before the other.
    return sorted((replace(hit, score=sums[hit.digest] / most) for hit in first.values()), key=lambda hit: -hit.score)


def diverse(ranked: Sequence[tuple[Found, float]], most: int, diversity: float) -> list[tuple[Found, float]]:
    """The best that are unlike each other: maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998)."""
    rest, chosen = list(ranked), list[tuple[Found, float]]()
    nearest = [0.0] * len(rest)
    while rest and len(chosen) < most:
        gains = [(1 - diversity) * score - diversity * near for (_, score), near in zip(rest, nearest, strict=True)]
        at = max(range(len(rest)), key=gains.__getitem__)
        taken, _ = rest[at]
        chosen.append(rest.pop(at))
        nearest.pop(at)
        nearest = [max(near, _likeness(taken, other)) for near, (other, _) in zip(nearest, rest, strict=True)]
    return chosen


def _likeness(one: Found, other: Found) -> float:
    """From 0 to 1: the cosine, or where there are no vectors the share of words that both have."""
    if one.vector is not None and other.vector is not None:
        return max(0.0, float(one.vector @ other.vector))
    mine, theirs = set(words(one.text)), set(words(other.text))
    return len(mine & theirs) / len(mine | theirs) if mine or theirs else 1.0


def _shown(score: float) -> float:
    return round(score, 6)


def _document(found: Found, score: float) -> Document:
    return Document(
        text=found.text,
        score=_shown(score),
        source=found.source,
        position=dict(found.position),
        metadata=dict(found.metadata),
    )

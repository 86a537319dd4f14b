"""How well searches do: against comparing with everything, and hybrid against each of its halves, on judged corpora.

`bench/retrieval.py` prints the same figures as a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from judged import Corpus, constitution, indexed, judge, libraries, ndcg, recall

from ferrum.retrieval import embedders
from ferrum.retrieval.sqlite import SqliteStore
from ferrum.retrieval.store import Store

#: How much less than the better one of its halves hybrid may have: a few of 57 or 120 questions say nothing.
MARGIN = 0.02


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = SqliteStore(tmp_path_factory.mktemp("indexes"))
    yield store
    store.close()


@pytest.fixture(scope="module")
def law() -> Corpus:
    return constitution()


@pytest.fixture(scope="module")
def library() -> Corpus:
    return libraries(120)


@pytest.fixture(scope="module")
def law_by_words(store: Store, law: Corpus) -> str:
    return indexed(store, law, "lexical")


@pytest.fixture(scope="module")
def law_by_meaning(store: Store, law: Corpus) -> str:
    if not embedders.is_installed():
        pytest.skip("needs ferrum[embeddings]")
    return indexed(store, law, "local")


@pytest.fixture(scope="module")
def library_by_words(store: Store, library: Corpus) -> str:
    return indexed(store, library, "lexical")


# The measures, on what can be counted by hand.


def test_recall_is_the_part_of_the_relevant_that_was_found() -> None:
    assert recall(["a", "x", "b"], {"a", "b"}, 10) == 1
    assert recall(["a", "x", "b"], {"a", "b"}, 2) == 0.5
    assert recall(["x"], {"a"}, 10) == recall([], {"a"}, 10) == 0


def test_ndcg_is_one_where_the_relevant_come_first_and_less_further_down() -> None:
    assert ndcg(["a", "b", "x"], {"a", "b"}, 10) == 1
    assert ndcg(["b", "a"], {"a", "b"}, 10) == 1
    assert ndcg(["x", "a"], {"a"}, 10) == pytest.approx(1 / math.log2(3))
    assert ndcg(["x", "y", "a"], {"a"}, 10) == 0.5
    assert ndcg(["a", "x", "b"], {"a", "b"}, 10) == pytest.approx(1.5 / (1 + 1 / math.log2(3)))
    assert ndcg(["x", "a"], {"a"}, 1) == ndcg([], {"a"}, 10) == 0


def test_ndcg_counts_what_is_found_twice_once_and_cannot_ask_for_more_than_is_shown() -> None:
    assert ndcg(["a", "a"], {"a"}, 10) == 1
    assert ndcg(["a", "b"], {"a", "b", "c"}, 2) == 1


# The corpora.


def test_every_judgement_names_a_passage_that_is_there(law: Corpus) -> None:
    assert (len(law.documents), len(law.queries)) == (140, 57)
    assert {query.kind for query in law.queries} == {"exact", "paraphrase", "mixed"}
    assert all(query.relevant <= set(law.documents) for query in law.queries)


def test_what_is_asked_of_the_libraries_is_taken_out_of_the_document_that_is_looked_for(library: Corpus) -> None:
    assert len(library.documents) > 3000
    assert len(library.queries) == 120
    for query in library.queries:
        [name] = query.relevant
        assert query.text not in " ".join(library.documents[name].split())


# Searches.


def test_by_meaning_the_store_finds_what_comparing_with_all_finds(
    store: Store, library: Corpus, library_by_words: str
) -> None:
    index = store.describe("judge", library_by_words)
    names = [f"{name}.md" for name in library.documents]
    subjects: dict[str, list[int]] = {}
    found = store.fetch(
        index, [hit.id for hit in store.by_vector(index, np.ones(384, np.float32), 10**6)], vectors=True
    )
    for at, one in enumerate(found):
        subjects.setdefault(one.source, []).append(at)
    assert set(subjects) == set(names)
    vectors = np.array([one.vector for one in found])
    for query in library.queries[:50]:
        [vector] = embedders.embed(embedders.LEXICAL, [query.text])
        exact = np.sort(vectors @ vector)[::-1][:10]
        hits = store.by_vector(index, vector, 10)
        # By their scores: of two that are equally near, either may be the tenth.
        np.testing.assert_allclose([hit.score for hit in hits], exact, atol=1e-5)


def test_hybrid_is_no_worse_than_the_better_of_words_and_counted_words(
    store: Store, law: Corpus, law_by_words: str, library: Corpus, library_by_words: str
) -> None:
    for name, corpus in ((law_by_words, law), (library_by_words, library)):
        text, vector, hybrid = (judge(store, name, corpus.queries, mode) for mode in ("text", "vector", "hybrid"))
        assert hybrid.recall >= max(text.recall, vector.recall) - MARGIN
        assert hybrid.ndcg >= max(text.ndcg, vector.ndcg) - MARGIN
        assert hybrid.recall > 0.5


def test_hybrid_is_no_worse_than_the_better_of_words_and_a_models_meaning(
    store: Store, law: Corpus, law_by_meaning: str
) -> None:
    text, vector, hybrid = (judge(store, law_by_meaning, law.queries, mode) for mode in ("text", "vector", "hybrid"))
    assert hybrid.recall >= max(text.recall, vector.recall) - MARGIN
    assert hybrid.ndcg >= max(text.ndcg, vector.ndcg) - MARGIN
    assert hybrid.recall > text.recall + 0.1


def test_what_was_asked_for_in_its_own_words_is_found_without_a_model(
    store: Store, law: Corpus, law_by_words: str
) -> None:
    exact = [query for query in law.queries if query.kind == "exact"]
    assert judge(store, law_by_words, exact, "hybrid").recall == 1

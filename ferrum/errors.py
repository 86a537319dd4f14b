"""What can go wrong, sorted by who has to act.

FerrumError
├── AuthorError               whoever wrote the workflow or asked for something
│   ├── WorkflowError         the file does not say a workflow; carries every problem with line and column
│   ├── InputError            the input does not fit the workflow's `inputs`
│   ├── ExpressionError       a `{{ … }}` or `when:` that cannot be compiled or evaluated
│   ├── NotFound              no such run, step, approval, artifact
│   └── Conflict              it is there, but not in a state that allows this (already decided, already ended)
├── StepError                 the step: recorded as its result, tried again where `retry` is true
│   ├── StepTimeout           one attempt took longer than its `timeout`
│   ├── ModelError            a model provider refused, failed or answered nonsense
│   ├── ToolError             a tool said no, or its server failed
│   ├── SandboxError          code could not be run in a sandbox at all
│   ├── TaskError             the user's own Celery task raised
│   ├── OutputError           an output that breaks its schema or cannot be kept
│   └── Denied                the choke point said no
└── OperatorError             whoever runs ferrum
    ├── SettingsError         the environment, a policy file, a servers file
    └── Unavailable           Redis, the artifact store: not there, or not what was promised
        └── Misplaced         something else stands in Redis in place of a key of ferrum's
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from heapq import nlargest
from itertools import islice

#: The most characters of an error's words that are handed on, for they may be a whole answer of a tool; and those
#: that a run keeps of them once secrets are taken out, so that none is cut in half and kept.
_LONGEST = 65_536
LONGEST_ERROR = 8_192


class FerrumError(Exception):
    """Any error of ferrum's own."""


class AuthorError(FerrumError):
    """Whoever wrote the workflow, or asked for something, has to change it."""


class StepError(FerrumError):
    """An attempt at a step did not work.

    Raised inside a step; the executor records it as the step's result.
    """

    #: What `retry.on` calls it: `timeout`, `rate_limit`, `unavailable`, or `error` for all else.
    kind: str = "error"

    def __init__(self, message: str, retry: bool = False, retry_after_s: float | None = None) -> None:
        message = message[:_LONGEST]
        super().__init__(message, retry, retry_after_s)
        self.message = message
        #: Whether the same attempt might work later.
        self.retry = retry
        #: What the other side asked us to wait, in seconds (`Retry-After`).
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class OperatorError(FerrumError):
    """Whoever runs ferrum has to change something."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a file."""

    #: What is wrong and what to do, one sentence.
    message: str
    #: Where in the value, as an author reads it: `steps.fix.retry.max_attempts`.
    path: str = ""
    #: 1-based; 0 where the value did not come from a file.
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        where = f"{self.line}:{self.column}: " if self.line else ""
        return f"{where}{self.path}: {self.message}" if self.path else f"{where}{self.message}"


class WorkflowError(AuthorError):
    """A workflow that cannot be planned; says everything that is wrong with it at once."""

    def __init__(self, problems: Iterable[Problem], source: str = "") -> None:
        self.problems = tuple(problems)
        #: The file's name; empty for a value made in Python.
        self.source = source
        super().__init__(self.problems, source)

    def __str__(self) -> str:
        return "\n".join(self._place(problem) + str(problem) for problem in self.problems)

    def _place(self, problem: Problem) -> str:
        if not self.source:
            return ""
        return f"{self.source}:" if problem.line else f"{self.source}: "


class InputError(AuthorError):
    """The input of a run does not fit the workflow's `inputs`."""


class ExpressionError(AuthorError):
    """An expression that cannot be compiled or evaluated."""


class NotFound(AuthorError):
    """What was asked for is not there."""


class Conflict(AuthorError):
    """What was asked for is there, but its state does not allow this."""


class StepTimeout(StepError):
    """One attempt took longer than its `timeout`."""

    kind: str = "timeout"


class ModelError(StepError):
    """A model provider refused, failed, or answered with something that is no answer."""


class ToolError(StepError):
    """A tool said no, or the server behind it failed."""


class SandboxError(StepError):
    """Code could not be run in a sandbox: it asks for what there is not, or no sandbox can be had."""


class TaskError(StepError):
    """The user's own Celery task raised."""


class OutputError(StepError):
    """A step's output breaks its schema or cannot be kept."""


class Denied(StepError):
    """The choke point refused an act; never tried again."""


class SettingsError(OperatorError):
    """The environment, a policy file or a servers file says something that cannot be."""


class Unavailable(OperatorError):
    """Something ferrum stands on is not there, or not what it promised."""


class Misplaced(Unavailable):
    """Something else stands in Redis in place of a key of ferrum's."""

    def __init__(self, key: str, kind: str) -> None:
        super().__init__(key, kind)
        self.key = key
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.key!r} in Redis is a {self.kind}, which ferrum did not write: look at it, and then DEL it"


def words(error: BaseException) -> str:
    """The text of anybody's exception, and something else where it has none to give."""
    try:
        return str(error)[:_LONGEST]
    except Exception as worse:  # noqa: BLE001
        # Its own `__str__` is the user's code, and may do anything.
        return f"(its text cannot be had: its __str__ raised {type(worse).__name__})"


def bug(error: BaseException) -> str:
    """Return what to say of an exception that nobody expected."""
    return f"{type(error).__name__}: {words(error)} (a bug in ferrum or in a step type)"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest known name, or a list of what there is, or nothing."""
    names = sorted(islice(known, _MOST_NAMES))
    near = get_close_matches(name, _likely(name, names), n=1, cutoff=0.6)
    if near:
        return f" (did you mean {near[0]!r}?)"
    if not names:
        return ""
    shown = ", ".join(one if len(one) <= _LONGEST_NAME else f"{one[:_LONGEST_NAME]}…" for one in names[:12])
    return f" (there is: {shown}{', …' if len(names) > 12 else ''})"


#: To compare two names closely takes time by the product of their lengths, so that few are, and none that is no name.
_MOST_NAMES, _LIKELY, _LONGEST_NAME = 1000, 10, 100


def _likely(name: str, names: list[str]) -> list[str]:
    """The names that have most letters in common with one."""
    if len(name) > _LONGEST_NAME:
        return []
    letters = Counter(name)
    # By the most that the closer comparison can come to, whatever the order of the letters.
    shared = [
        ((letters & Counter(one)).total() / (len(name) + len(one)), one)
        for one in names
        # Names that differ more in length are never near.
        if 3 * len(one) <= 7 * len(name) and 3 * len(name) <= 7 * len(one)
    ]
    return [one for _, one in nlargest(_LIKELY, shared)]

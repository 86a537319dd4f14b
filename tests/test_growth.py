"""Text that somebody else wrote is read in time that grows with its size, or refused.

Each case is a reader of foreign text and inputs of growing size that are made to cost it much. From where a call takes
50 ms of the processor, each doubling of the input may take 2.6 times as long. A reader that refuses large inputs before
that, or that takes none of `LARGEST` so long, has passed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pdfs import sharing
from sizes import SIZE, sized

from ferrum import patterns, schemas
from ferrum.errors import FerrumError, did_you_mean
from ferrum.expressions import Template
from ferrum.governance.policy import Policy
from ferrum.mcp.specs import load_servers
from ferrum.models import files, structured
from ferrum.models.calls import translated
from ferrum.models.prices import PriceFile
from ferrum.plan import Plan
from ferrum.retrieval.cutting import cut
from ferrum.retrieval.documents import Original, Place
from ferrum.retrieval.words import words
from ferrum.settings import Settings, redact
from ferrum.terminal import quoted
from ferrum.testing.script import Script
from ferrum.untrusted import Marks
from ferrum.workflow import Workflow

#: Where a reader counts as quick, in the units of its input (characters, items, …).
LARGEST = min(2_000_000, sized(250_000))
STARTS_AT_S = 0.05
RATIO = 2.6
DOUBLINGS = 4
#: `FERRUM_TEST_SIZE` from which on all cases are tried.
WHOLE = 10
#: How often a doubling is measured again before it counts as too much.
PATIENCE = 8
#: What a check or an evaluation with a bound on its steps may take.
BOUND_S = 10


@dataclass(frozen=True)
class Case:
    name: str
    #: Reads an input.
    read: Callable[[Any], object]
    #: Makes an input of a size.
    make: Callable[[int], Any]
    #: It may take more than in proportion, up to a bound on its cost, at which it is refused.
    bounded: bool = False


def _document(suffix: str) -> Callable[[str], object]:
    return lambda text: cut(Original(f"document{suffix}", text))


def _pages(content: bytes) -> object:
    return cut(Original("document.pdf", content))


_LINE = b"(a) Tj "
#: How a font says which characters 65,536 codes are, in little space.
_MAP = b"1 begincodespacerange <0000> <FFFF> endcodespacerange\n1 beginbfrange\n<0000> <FFFF> <0000>\nendbfrange\n"


def _text(lines: int) -> bytes:
    return b"BT /F1 12 Tf 72 720 Td " + _LINE * lines + b"ET"


def _held(schema: Any) -> Callable[[Any], object]:
    return lambda value: schemas.errors(schema, value)


def _evaluated(text: str) -> Callable[[Any], object]:
    template = Template.compile(f"{{{{ {text} }}}}")
    return lambda value: template.evaluate({"input": {"v": value}})


def _answer(schema: Any) -> Callable[[str], object]:
    return lambda text: structured.parse(text, schema)


def _workflow(text: str) -> object:
    return Plan(Workflow.parse(text))


def _servers(text: str) -> object:
    return load_servers(Settings.model_validate({"mcp_servers": text}), {})


def _prices(text: str) -> object:
    return files.parse(text, PriceFile, "prices")


def _provider(error: Exception) -> object:
    return translated("a/b", error)


#: Without what it remembers.
_pattern = patterns.schema_pattern.__wrapped__


def _marked(value: Any) -> object:
    documents = [{"text": str(one), "source": f"{at}.md"} for at, one in enumerate(value)]
    return Marks("secret").written(value, "search", {"documents": documents})


def _covered(path: str) -> bool:
    pattern = "/".join(["**", "a"] * 100)
    return Place.of(f"/top/{pattern}/c").covers(f"/top/{path}")


def _steps(n: int, step: Callable[[int], dict[str, Any]]) -> str:
    return json.dumps({"name": "n", "steps": {f"step_number_{at}": step(at) for at in range(n)}})


def _wait(**more: Any) -> dict[str, Any]:
    return {"type": "wait", "for": "1s", **more}


def _bomb(n: int) -> str:
    """Each anchor has the one before it twice."""
    lines = ["a0: &a0 [x, y]"] + [f"a{at}: &a{at} [*a{at - 1}, *a{at - 1}]" for at in range(1, n)]
    return "\n".join(lines)


def _merges(n: int) -> str:
    lines = ["a0: &a0 {x: 1}"] + [f"a{at}: &a{at} {{<<: [*a{at - 1}, *a{at - 1}]}}" for at in range(1, n)]
    return "\n".join(lines)


def _doubled(n: int) -> Any:
    """Each definition is either of two that are the one before it."""
    defs: dict[str, Any] = {"d0": {"type": "string"}}
    defs |= {f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{at - 1}"}] * 2} for at in range(1, n)}
    return {"$defs": defs, "$ref": f"#/$defs/d{n - 1}"}


def _nested(n: int) -> Any:
    value: Any = {}
    for _ in range(min(n, 900)):
        value = {"not": value}
    return value


_OBJECT = {"type": "object"}
_NUMBERS = lambda n: list(range(n))  # noqa: E731
_OBJECTS = lambda n: [{"a": at} for at in range(n)]  # noqa: E731

CASES = [
    Case("an answer: a fence and newlines", _answer(_OBJECT), lambda n: "```json" + "\n" * n),
    Case("an answer: fences", _answer(_OBJECT), lambda n: "```json\n" * n),
    Case("an answer: backticks", _answer(_OBJECT), lambda n: "`" * n),
    Case("an answer: fences with blanks", _answer(_OBJECT), lambda n: "```json   \n \n" * n + "x"),
    Case("an answer: brackets", _answer({}), lambda n: "[" * n),
    Case("an answer: a long text", _answer({"type": "string", "pattern": "^(a|a)*$"}), lambda n: json.dumps("a" * n)),
    Case("an answer: many wrong items", _answer({"items": {"type": "string"}}), lambda n: json.dumps(_NUMBERS(n))),
    Case("a value: a pattern that doubles", _held({"pattern": "^(a|a)*$"}), lambda n: "a" * n + "b"),
    Case("a value: a pattern of stars", _held({"pattern": ".*.*.*=.*"}), lambda n: "x" * n),
    Case("a value: a long repetition", _held({"pattern": "(a|b|ab){1,200}c"}), lambda n: "ab" * n, bounded=True),
    Case("a value: items that must differ", _held({"uniqueItems": True}), _OBJECTS),
    Case("a value: numbers that must differ", _held({"uniqueItems": True}),
         lambda n: [at * (2**61 - 1) for at in range(n)]),
    Case("a value: one of many", _held({"items": {"enum": ["x"] * 100}}), _OBJECTS, bounded=True),
    Case("a value: names by pattern", _held({"patternProperties": {"^a": {}}, "additionalProperties": False}),
         lambda n: {f"a{at}": at for at in range(n)}),
    Case("a value: names that nothing speaks of", _held({"unevaluatedProperties": False, "allOf": [_OBJECT] * 20}),
         lambda n: {f"a{at}": at for at in range(n)}, bounded=True),
    Case("a value: items that nothing speaks of", _held({"unevaluatedItems": False, "contains": {}}), _NUMBERS),
    Case("a value: items that nothing speaks of, by an old draft",
         _held({"$schema": "https://json-schema.org/draft/2019-09/schema", "unevaluatedItems": False,
                "allOf": [{"contains": {"type": "integer"}}, {"items": [True, True]}]}), _NUMBERS, bounded=True),
    Case("a value: wrong in each branch", _held({"anyOf": [{"type": "string"}] * 100}), _NUMBERS, bounded=True),
    Case("a schema: branches that double", lambda schema: schemas.errors(schema, 1), _doubled, bounded=True),
    Case("a schema: deep", schemas.check, _nested),
    Case("a schema: wide", schemas.check,
         lambda n: {"allOf": [{"type": "string", "pattern": f"^a{at}$"} for at in range(n)]}),
    Case("a schema: its names", schemas.check, lambda n: {"required": [f"a{at}" for at in range(n)]}),
    Case("a pattern: long", _pattern, lambda n: "a?" * n),
    Case("a pattern: groups", _pattern, lambda n: "(" * n + ")" * n),
    Case("a pattern: repetitions", _pattern, lambda n: "(" * n + "a" + "){9}" * n),
    Case("a pattern: classes", _pattern, lambda n: "[" * n),
    Case("an expression: all in all", _evaluated("input.v.all(x, x in input.v)"), _NUMBERS),
    Case("an expression: objects in objects", _evaluated("input.v.all(x, x in input.v)"), _OBJECTS, bounded=True),
    Case("an expression: lists compared", _evaluated("input.v.all(x, input.v == input.v + [])"), _NUMBERS,
         bounded=True),
    Case("an expression: lists put together", _evaluated("input.v.map(x, input.v + [x])"), _NUMBERS, bounded=True),
    Case("an expression: texts put together", _evaluated("input.v.map(x, string(input.v))"), _NUMBERS, bounded=True),
    Case("an expression: the same once", _evaluated("input.v.distinct()"), _OBJECTS),
    Case("an expression: each letter", _evaluated("input.v.split('').map(c, c)"), lambda n: "a" * n),
    Case("an expression: a pattern of data", _evaluated("input.v.matches('^(a|a)*$')"), lambda n: "a" * n + "b"),
    Case("an expression: from behind", _evaluated("input.v.lastIndexOf('ab' + input.v.substring(input.v.size() / 2))"),
         lambda n: "a" * n),
    Case("an expression: small letters", _evaluated("input.v.lowerAscii()"), lambda n: "Ä" * n),
    Case("an expression: pairs in order", _evaluated("input.v.map(x, [x, -x]).sort().size()"), _NUMBERS, bounded=True),
    Case("an expression: an object in order", _evaluated("input.v.map(x, input.v.sort()).size()"),
         lambda n: {f"{at}": at for at in range(n)}, bounded=True),
    Case("an expression: bytes compared",
         _evaluated("[bytes(input.v + 'a')].all(b, [bytes(input.v + 'b')].all(c, input.v.split('').all(x, b != c)))"),
         lambda n: "a" * n, bounded=True),
    Case("an expression: a long one", Template.compile, lambda n: "{{ " + "a + " * n + "a }}"),
    Case("a text: many expressions", Template.compile, lambda n: "{{ a }}" * n),
    Case("a text: braces", Template.compile, lambda n: "{{" * n),
    Case("a text: quotes", Template.compile, lambda n: "{{ '''" + "'" * n),
    Case("a name: near ones", lambda names: did_you_mean("step_number_x", names),
         lambda n: [f"step_number_{at}" for at in range(n)]),
    Case("a name: a long one", lambda name: did_you_mean(name, [name + "x", "y" + name]), lambda n: "ab" * n),
    Case("a workflow: steps beside each other", _workflow, lambda n: _steps(n, lambda at: _wait())),
    Case("a workflow: names that are nearly right", _workflow,
         lambda n: _steps(n, lambda at: _wait(needs=[f"step_numbre_{at}"]))),
    Case("a workflow: keys that are nearly right", _workflow, lambda n: _steps(n, lambda at: _wait(timeoutt="1s"))),
    Case("a workflow: aliases", _workflow, lambda n: "name: n\nsteps: {}\n" + _bomb(n), bounded=True),
    Case("a workflow: merges", _workflow, lambda n: "name: n\nsteps: {}\n" + _merges(n), bounded=True),
    Case("a workflow: brackets", _workflow, lambda n: "name: n\nsteps: " + "[" * n),
    Case("a workflow: braces of JSON", _workflow, lambda n: '{"a":' * n),
    Case("a workflow: blanks", _workflow, lambda n: "name: n\nsteps:" + " " * n + "x"),
    Case("a workflow: indented", _workflow, lambda n: "\n".join(" " * at + "a:" for at in range(min(n, 2000)))),
    Case("a policy: aliases", Policy.parse, lambda n: "allow: []\n" + _bomb(n), bounded=True),
    Case("a policy: brackets", Policy.parse, lambda n: "allow: " + "[" * n),
    Case("prices: aliases", _prices, _bomb, bounded=True),
    Case("prices: merges", _prices, _merges, bounded=True),
    Case("prices: brackets", _prices, lambda n: "models: " + "[" * n),
    Case("a script: aliases", Script.parse, _bomb, bounded=True),
    Case("servers: aliases", _servers, _bomb, bounded=True),
    Case("servers: merges", _servers, _merges, bounded=True),
    Case("servers: brackets", _servers, lambda n: "[" * n),
    Case("servers: variables", _servers, lambda n: json.dumps({"a": {"command": ["x"], "env": {"A": "${" * n}}})),
    Case("a provider's words", _provider, lambda n: RuntimeError("Error: " * n + "Exception")),
    Case("a provider's one word", _provider, lambda n: RuntimeError("Error" * n)),
    Case("a document: blanks in a line", _document(".txt"), lambda n: " " * n + "x"),
    Case("a document: blanks between words", _document(".txt"), lambda n: "x" + " " * n + "x"),
    Case("a document: blank lines", _document(".txt"), lambda n: "x" + " \n" * n + "x"),
    Case("a document: points", _document(".txt"), lambda n: "." * n),
    Case("a document: quotes after a point", _document(".txt"), lambda n: "." + '"' * n),
    Case("a document: headings", _document(".md"), lambda n: "# a\n" * n),
    Case("a document: a long heading", _document(".md"), lambda n: "# " + "a" * n + "\n" + "word " * n),
    Case("a document: signs of a heading", _document(".md"), lambda n: "# a " + "# " * n + "x"),
    Case("a document: fences", _document(".md"), lambda n: "```\n" * n + "`" * n),
    Case("a document: underlines", _document(".md"), lambda n: "=" * n + "x\n" + "a\n---\n" * n),
    Case("a document: code", _document(".c"), lambda n: ("a " * 140 + "\n") * (n // 100)),
    Case("a document: code of one letter", _document(".c"), lambda n: ("a" * 290 + "\n") * (n // 100)),
    Case("a document: comments above", _document(".c"), lambda n: "// x\n" * n + "int f(\n" * n),
    Case("a document: Python", _document(".py"), lambda n: "# c\n" * n + "def f(): pass\n" * n),
    Case("a document: a long class", _document(".py"), lambda n: f"class {'A' * n}:\n" + "  def f(): pass\n" * n),
    Case("a document: Python's brackets", _document(".py"), lambda n: "(" * n),
    Case("a document: words", lambda text: list(words(text)), lambda n: "aB" * n),
    Case("a document: signs", lambda text: list(words(text)), lambda n: "字" * n + "a"),
    Case("a PDF: pages of one content", _pages, lambda n: sharing(n, _text(n)), bounded=True),
    Case("a PDF: pages of one form", _pages, lambda n: sharing(n, b"/X0 Do", forms=[_text(n)]), bounded=True),
    Case("a PDF: a form many times", _pages, lambda n: sharing(1, b"/X0 Do " * n, forms=[_text(n)]), bounded=True),
    Case("a PDF: forms that double", _pages,
         lambda n: sharing(n, b"/X0 Do", forms=[b"/X%d Do " % (at + 1) * 2 for at in range(min(n, 40))] + [_text(1)]),
         bounded=True),
    Case("a PDF: pages of one font", _pages, lambda n: sharing(n, _text(1), to_unicode=_MAP), bounded=True),
    Case("a PDF: pages", _pages, lambda n: sharing(n, _text(1))),
    Case("a path: folders of any depth", _covered, lambda n: "a/" * min(n, 400) + "a"),
    Case("marks: texts of documents", _marked, lambda n: [f"t{at}" for at in range(n)], bounded=True),
    Case("marks: texts of the same document", _marked, lambda n: ["a"] * n, bounded=True),
    Case("marks: a long text", _marked, lambda n: ["x" * n, *[f"{at}" for at in range(n)]], bounded=True),
    Case("marks: a conversation", _marked, lambda n: [{"role": "user", "content": "a"}] * n, bounded=True),
    Case("on a terminal", quoted, lambda n: "a\u0301\x1b字" * n),
    Case("on a terminal: accents", quoted, lambda n: "a" + "\u0301" * n),
    Case("secrets: URLs", redact, lambda n: "://a:" + "@:" * n + "://" * n),
    Case("secrets: queries", redact, lambda n: "?" + "password" * n + "?aaaaaaaa" * n),
    *[
        Case(f"a page: {piece!r}", _document(".html"), lambda n, piece=piece: "<html><p>x" + piece * n + "y")
        for piece in (
            "<", "<a", "<a ", "<!--", "<!-- >", "<![CDATA[", "</", "</a", "<?", "&", "&#", "<div>", "</b>", "<p>x", " ",
            "\n ", "<br>", "<li>x</li>", "<b>x</b>", "<header>", "<article>", "<article><header>x</header>", "<a b='",
            '<a b="c>', "<!doctype", "]]>", "*_", "`", "<pre> ", "<title>",
        )
    ],
]  # fmt: skip

#: A sample is of those that take no time where all is well.
_CHOSEN = (
    CASES
    if SIZE >= WHOLE
    else random.Random(8).sample([case for case in CASES if SIZE > 1 or not case.bounded], min(len(CASES), sized(10)))
)


@pytest.mark.parametrize("case", _CHOSEN, ids=lambda case: case.name)
def test_what_somebody_else_wrote_is_read_in_time_that_grows_with_its_size(case: Case) -> None:
    size, cost = 16, 0.0
    doublings = refusals = 0
    # What is refused at one size is refused at the next, too.
    while size <= LARGEST and doublings <= min(DOUBLINGS, sized(2)) and refusals < 2:
        given = case.make(size)
        before, (cost, refused) = cost, _cost(case, given)
        for _ in range(PATIENCE):
            if cost <= _allowed(case, before):
                break
            # What else the machine does counts in part, so that both are measured again, one right after the other.
            before = _cost(case, case.make(size // 2))[0]
            cost = _cost(case, given)[0]
        assert cost <= _allowed(case, before), f"{before:.3f} s for {size // 2}, {cost:.3f} s for {size}"
        doublings += cost >= STARTS_AT_S
        refusals += refused
        size *= 2


def _allowed(case: Case, before: float) -> float:
    return max(RATIO * max(before, STARTS_AT_S), BOUND_S if case.bounded else 0)


def _cost(case: Case, given: Any) -> tuple[float, bool]:
    """What reading takes, in seconds of this process, and whether it was refused."""
    refused = True
    # What the collector does goes by all that the suite keeps.
    gc.disable()
    began = time.process_time()
    try:
        with warnings.catch_warnings(), contextlib.suppress(FerrumError, ValueError):
            warnings.simplefilter("ignore")
            case.read(given)
            refused = False
        return time.process_time() - began, refused
    finally:
        gc.enable()

"""What authors write between `{{` and `}}`, and in `when:`."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
from fleet import PATIENCE_S
from hypothesis import given
from hypothesis import strategies as st

from ferrum import expressions
from ferrum.errors import ExpressionError
from ferrum.expressions import MAX_TEXT, Condition, Template
from ferrum.patterns import compile_cel

SCOPE: dict[str, Any] = {
    "input": {"issue": "it is broken", "limit": 3, "nothing": None, "big": 2**70},
    "classify": {"kind": "bug", "score": 0.5},
    "context": {
        "documents": [
            {"text": "one", "tags": [{"name": "a"}, {"name": "b"}]},
            {"text": "two", "tags": [{"name": "c"}]},
        ]
    },
}


def evaluated(value: Any) -> Any:
    return Template.compile(value).evaluate(SCOPE)


def refusal(value: Any) -> str:
    with pytest.raises(ExpressionError) as caught:
        evaluated(value)
    return str(caught.value)


def references(text: str) -> set[str]:
    return set(Template.compile(f"{{{{ {text} }}}}").references)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{{ classify.kind }}", "bug"),
        ("{{classify.score}}", 0.5),
        ("{{ input.nothing }}", None),
        ("{{ input.big }}", 2**70),
        ("{{ classify }}", {"kind": "bug", "score": 0.5}),
        ('{{ classify.kind == "bug" }}', True),
        ("{{ input.limit + 1 }}", 4),
        ('{{ input["issue"] }}', "it is broken"),
        ("{{ context.documents[1].text }}", "two"),
        ('{{ has(classify.reason) ? classify.reason : "none" }}', "none"),
        ("{{ input.limit // how many\n }}", 3),
    ],
)
def test_a_text_that_is_one_expression_becomes_its_value(text: str, value: Any) -> None:
    result = evaluated(text)
    assert result == value
    assert type(result) is type(value)


def test_inside_a_longer_text_a_value_is_written_out() -> None:
    assert evaluated("{{ classify.kind }}: {{ classify.score }}") == "bug: 0.5"
    assert evaluated("<{{ input.nothing }}>") == "<>"
    assert evaluated(" {{ classify }}") == ' {"kind":"bug","score":0.5}'
    assert evaluated("is {{ input.limit > 2 }}") == "is true"


def test_templates_reach_into_lists_and_objects_and_leave_the_rest_alone() -> None:
    value = {"a": ["{{ input.limit }}", {"b": "x{{ input.limit }}"}], "c": 1, "d": None, "e": "}}"}
    assert evaluated(value) == {"a": [3, {"b": "x3"}], "c": 1, "d": None, "e": "}}"}


def test_what_an_expression_returns_is_never_parsed_again() -> None:
    scope: dict[str, Any] = {"input": {"text": "{{ secret.key }}"}, "secret": {"key": "k"}}
    assert Template.compile("{{ input.text }}").evaluate(scope) == "{{ secret.key }}"
    assert Template.compile("say {{ input.text }}").evaluate(scope) == "say {{ secret.key }}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{{ {"a": {"b": 1}} }}', {"a": {"b": 1}}),
        ('{{{"a": {"b": 1}}}}', {"a": {"b": 1}}),
        ('{{ "}}" }}', "}}"),
        ("{{ '}}' + \"}}\" }}", "}}}}"),
        ('{{ """a "}}" b""" }}', 'a "}}" b'),
        (r'{{ "\"}}" }}', '"}}'),
        (r'{{ r"\}}" }}', "\\}}"),
        ('{"x": {{ input.limit }}}', '{"x": 3}'),
    ],
)
def test_closing_braces_inside_literals_do_not_end_an_expression(text: str, value: Any) -> None:
    assert evaluated(text) == value


def test_opening_braces_are_written_as_a_text_of_their_own() -> None:
    assert evaluated('{{ "{{" }} name }}') == "{{ name }}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{{ context.documents[*].text }}", ["one", "two"]),
        ("{{ context.documents[*].tags[*].name }}", [["a", "b"], ["c"]]),
        ("{{ context.documents[*].tags[0].name }}", ["a", "c"]),
        ("{{ context.documents[0].tags[*].name }}", ["a", "b"]),
        ("{{ context.documents[*].tags[*] }}", [[{"name": "a"}, {"name": "b"}], [{"name": "c"}]]),
        ("{{ size(context.documents[*].text) }}", 2),
        ('{{ context.documents[*].text.join(" and ") }}', "one and two"),
        ("{{ context.documents.map(d, d.tags[*].name) }}", [["a", "b"], ["c"]]),
        ('{{ context.documents.filter(d, d.text == "two")[*].text }}', ["two"]),
        ('{{ "a[*].b" }}', "a[*].b"),
    ],
)
def test_a_star_maps_over_a_list(text: str, value: Any) -> None:
    assert evaluated(text) == value


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.b", {"a"}),
        ("a.b[c.d]", {"a", "c"}),
        ("size(a)", {"a"}),
        ("a.size() > b.startsWith(c.d) ? d : e", {"a", "b", "c", "d", "e"}),
        ("a.map(x, x.y + z.w)", {"a", "z"}),
        ("a.filter(x, x.y).map(x, x.z)", {"a"}),
        ("a.map(a, a.b)", {"a"}),
        ("[1].map(a, a) + [a]", {"a"}),
        ("[1].map(a, [2].exists(b, a == b))", set()),
        ("a.all(x, x > 0) && x", {"a", "x"}),
        ("a[*].b[*].c", {"a"}),
        ("has(a.b)", {"a"}),
        ("'b.c' + a", {"a"}),
        ("{'b': a}", {"a"}),
        ("type(a) == string", {"a"}),
        ("math.greatest(a, 1)", {"a"}),
        ("true && null == a || 1 in b", {"a", "b"}),
    ],
)
def test_references_are_the_names_that_the_scope_has_to_hold(text: str, names: set[str]) -> None:
    assert references(text) == names


def test_references_of_a_value_are_those_of_all_its_expressions() -> None:
    template = Template.compile({"a": ["{{ one.x }}", "no"], "b": "{{ two }} and {{ three.y }}"})
    assert template.references == {"one", "two", "three"}
    assert template.paths == {("one", "x"), ("two",), ("three", "y")}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ clasify.kind }}", "nothing is called 'clasify' (did you mean 'classify'?)"),
        ("{{ clasify.kind + 'x' }}", "nothing is called 'clasify' (did you mean 'classify'?)"),
        ("{{ classify.kindd }}", "no 'kindd' in classify (did you mean 'kind'?)"),
        ("{{ classify.x == 1 }}", "no 'x' in classify (there is: kind, score)"),
        ("{{ context.documents[*].title }}", "no 'title' in context.documents[*] (there is: tags, text)"),
        ("{{ context.documents.map(d, d.txt) }}", "no 'txt' in context.documents[*] (did you mean 'text'?)"),
        ("{{ classify.kind.name }}", "classify.kind is text, so it has no 'name'"),
        ("{{ classify.kind.name + 'x' }}", "classify.kind is text, so it has no 'name'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ context.documents[7].text }}", "index out of bounds: 7"),
        ("{{ classify.score + 1 }}", "nothing is converted by itself: use int(x), double(x) or string(x)"),
        ("{{ input.big + 1 }}", "does not fit 64 bits"),
    ],
)
def test_an_evaluation_that_fails_says_which_expression_and_why(text: str, reason: str) -> None:
    message = refusal(text)
    assert message.startswith(f"in `{text.removeprefix('{{').removesuffix('}}').strip()}`: ")
    assert reason in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ 1.0 / 0.0 }}", "not a finite number"),
        ('{{ double("NaN") }}', "not a finite number"),
        ('{{ timestamp("2026-01-01T00:00:00Z") }}', "string(…) makes a text of it"),
        ('{{ [b"abc"] }}', "string(…) makes a text of it"),
        ("{{ {1: 2} }}", "a key 1 that is not text"),
    ],
)
def test_a_result_that_json_cannot_hold_is_refused(text: str, reason: str) -> None:
    assert reason in refusal(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ classify.kind", "`{{` without its `}}`"),
        ("{{ }}", "an empty expression"),
        ("{{ don't }}", "a text starts with ' and never ends"),
        ("{{ 1 + }}", "the expression ends too early"),
        ("{{ a b }}", "'b' is not expected here (character 3)"),
        ("{{ sise(a) }}", "there is no function 'sise' (did you mean 'size'?)"),
        ("{{ [*].x }}", "[*] needs a list before it"),
        ("{{ Point{x: 1} }}", "messages like Point{…} are not supported"),
        ("{{ package.x }}", "reserved identifier: package"),
        ({"{{ a }}": 1}, "a key cannot be an expression"),
    ],
)
def test_what_is_no_expression_is_refused_when_it_is_compiled(text: Any, reason: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        Template.compile(text)
    assert reason in str(caught.value)


def test_functions_of_the_library_can_be_called() -> None:
    assert evaluated('{{ ["b", "a"].sort().join("-").upperAscii() }}') == "A-B"
    assert evaluated("{{ math.greatest([1, 3, 2]) + [1, 2].sum() }}") == 6
    assert evaluated('{{ string(true) + string([1, null]) + "a,b".split(",")[1] }}') == "true[1,null]b"


@pytest.mark.parametrize("text", ["(" * 10_000 + "1" + ")" * 10_000, "[" * 1_900 + "]" * 1_900, "-!" * 1_000 + "1"])
def test_nesting_that_would_overflow_the_stack_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        Template.compile(f"{{{{ {text} }}}}")
    with pytest.raises(ExpressionError):
        Condition.compile(text)


def test_what_is_allowed_is_far_from_the_end_of_a_small_stack() -> None:
    """In a process of its own: what would go wrong takes the process down."""
    program = """
import threading
from ferrum.errors import ExpressionError
from ferrum.expressions import MAX_DATA_NESTING, Template

deep = []
for _ in range(MAX_DATA_NESTING - 3):
    deep = [deep]
deeper = deep
for _ in range(10_000):
    deeper = [deeper]
as_deep = []
for _ in range(10_097):
    as_deep = [as_deep]

def refused(text, scope):
    try:
        Template.compile(text).evaluate(scope)
    except ExpressionError as error:
        return "nested deeper" in str(error)

def all_of_it():
    assert Template.compile("{{ " + "!(" * 30 + "true" + ")" * 30 + " }}").evaluate({})
    assert Template.compile("{{ " + "1+" * 249 + "1 }}").evaluate({}) == 250
    assert Template.compile("{{ " + "[1].map(x," * 9 + "1" + ")" * 9 + " }}").evaluate({})
    assert refused("{{ " + "[1].map(x," * 11 + "1" + ")" * 11 + " }}", {})
    assert Template.compile("{{ " + "true?1:" * 30 + "1 }}").evaluate({}) == 1
    assert Template.compile("{{ [a] == [a] ? [a] : [] }}").evaluate({"a": deep}) == [deep]
    assert Template.compile("{{ a }}").evaluate({"a": deeper}) is deeper
    assert Template.compile("{{ size(a) }}").evaluate({"a": deeper}) == 1
    assert refused("{{ string(a) }}", {"a": deeper})
    assert refused("{{ a == b }}", {"a": deeper, "b": as_deep})
    assert refused("{{ [a, a].distinct() }}", {"a": deeper})
    print("alive")

threading.stack_size(512 * 1024)
thread = threading.Thread(target=all_of_it)
thread.start()
thread.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.stdout == "alive\n", done.stderr


def test_a_text_cannot_grow_without_bound() -> None:
    scope: dict[str, Any] = {"a": {"text": "x" * (MAX_TEXT // 2)}}
    with pytest.raises(ExpressionError, match="grows beyond"):
        Template.compile("{{ a.text }}, {{ a.text }}").evaluate(scope)
    with pytest.raises(ExpressionError, match="longer than"):
        Template.compile("{{ a.text.replace('', 'much longer than before') }}").evaluate(scope)
    with pytest.raises(ExpressionError, match="longer than"):
        Template.compile("{{ [a.text, a.text].join(', ') }}").evaluate(scope)


def test_only_what_an_expression_looks_at_is_touched() -> None:
    scope: dict[str, Any] = {"classify": {"kind": "bug", "other": object()}}
    assert Condition.compile('classify.kind == "bug"').evaluate(scope) is True


@pytest.mark.parametrize(
    ("text", "value"),
    [('classify.kind == "bug"', True), ("classify.score > 0.9", False), (" has(input.x) || true ", True)],
)
def test_a_condition_says_yes_or_no(text: str, value: bool) -> None:
    assert Condition.compile(text).evaluate(SCOPE) is value


def test_a_condition_that_is_neither_true_nor_false_is_an_error() -> None:
    with pytest.raises(ExpressionError, match="has to be true or false, this is text"):
        Condition.compile("classify.kind").evaluate(SCOPE)


def test_a_condition_in_braces_is_refused() -> None:
    with pytest.raises(ExpressionError, match=r"leave out the {{ }}"):
        Condition.compile("{{ classify.kind }}")


def test_compiled_expressions_can_be_copied_and_pickled() -> None:
    template, condition = Template.compile({"a": "{{ classify.kind }}"}), Condition.compile("classify.score > 0.1")
    assert copy.deepcopy(template) == pickle.loads(pickle.dumps(template)) == template
    assert pickle.loads(pickle.dumps(condition)) == condition


_plain_text = st.text().filter(lambda text: "{{" not in text)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _plain_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_plain_text, inner, max_size=4),
    max_leaves=20,
)


@given(_json)
def test_a_value_without_expressions_comes_out_as_it_went_in(value: Any) -> None:
    template = Template.compile(value)
    assert template.evaluate({}) == value
    assert template.references == frozenset()


@given(_json)
def test_any_value_passes_through_a_plain_path(value: Any) -> None:
    assert Template.compile("{{ a.b }}").evaluate({"a": {"b": value}}) == value


_SOUP = """a b.c ( ) [ ] { } . , ? : + - == && ! 1 2.5 'x' "y" true [*] map( size( has( in }} {{ \\ ' @ é"""


@given(st.lists(st.sampled_from(_SOUP.split()), max_size=12).map(" ".join) | st.text(max_size=30))
def test_any_text_compiles_and_evaluates_or_says_why_not(text: str) -> None:
    scope: dict[str, Any] = {"a": [{"x": 1}], "b": {"c": "d"}}
    for source in (text, f"{{{{ {text} }}}}"):
        with contextlib.suppress(ExpressionError):
            Template.compile(source).evaluate(scope)


def test_importing_expressions_does_not_import_the_command_line_of_cel() -> None:
    program = """
import sys
import ferrum.expressions
assert "prompt_toolkit" not in sys.modules
import cel.cli
assert cel.cli.PromptSession
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE_S)


_TEN = "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"


def _nested(macro: str, depth: int) -> str:
    return "true" if depth == 0 else f"{_TEN}.{macro}(x{depth}, {_nested(macro, depth - 1)})"


@pytest.mark.parametrize(
    "bomb",
    [
        _nested("map", 8),
        _nested("all", 8),
        _TEN + f".map(x, {_TEN}).flatten()" * 8,
        "[0, 1].all(x, " + _nested("all", 8) + " && false || x < 2)",
    ],
    ids=["map", "all", "flatten", "an error that is passed over"],
)
def test_an_expression_that_would_go_over_too_many_items_is_stopped(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "MAX_ITEMS", 10_000)
    with pytest.raises(ExpressionError, match="it goes over more than 10000 items in all"):
        Template.compile(f"{{{{ {bomb} }}}}").evaluate({})


@pytest.mark.parametrize("body", ["x + x", "[x, x]"], ids=["texts", "lists"])
def test_an_expression_that_would_build_too_much_is_stopped(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "MAX_LIST", 100_000)
    bomb = "['ten chars.']" + f".map(x, {body})" * 40
    with pytest.raises(ExpressionError, match="it builds a list of more than 100000 characters"):
        Template.compile(f"{{{{ {bomb} }}}}").evaluate({})


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("size(many[*].x)", 100_000),
        ("many.filter(one, one.x > 99_997)[*].x".replace("_", ""), [99_998, 99_999]),
        ("many.map(one, one.x % 10 == 0, one.x).size()", 10_000),
        ("many[*].x.distinct().size()", 100_000),
    ],
)
def test_a_hundred_thousand_items_are_gone_over(expression: str, expected: object) -> None:
    many = [{"x": number} for number in range(100_000)]
    assert Template.compile(f"{{{{ {expression} }}}}").evaluate({"many": many}) == expected


def test_the_same_is_the_same_to_distinct_whatever_it_is() -> None:
    same = "[1, 1.0, '1', [1, {'a': 2}], [1, {'a': 2}], {'a': 1, 'b': 2}, {'b': 2, 'a': 1}, null, null]"
    expected = [1, "1", [1, {"a": 2}], {"a": 1, "b": 2}, None]
    assert Template.compile(f"{{{{ {same}.distinct() }}}}").evaluate({}) == expected


def test_macros_go_over_the_keys_of_an_object() -> None:
    assert Template.compile("{{ o.map(key, key + '!') }}").evaluate({"o": {"only": 1}}) == ["only!"]


# The order of an object's keys, and what an evaluation may cost


_names = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
_objects = st.dictionaries(_names, st.integers(0, 9), min_size=5, max_size=60)


@given(_objects)
def test_the_keys_of_an_object_come_in_the_order_that_json_has_them(value: dict[str, int]) -> None:
    keys = list(value)
    literal = "{" + ", ".join(f"'{name}': 1" for name in keys) + "}"
    for text, expected in [
        ("o.map(k, k)", keys),
        ("o.map(k, o[k])", list(value.values())),
        ("o.filter(k, o[k] > 4)", [name for name in keys if value[name] > 4]),
        ("o.map(k, o[k] > 4, k + '!')", [f"{name}!" for name in keys if value[name] > 4]),
        ("o.map(k, {k: o[k]})", [{name: number} for name, number in value.items()]),
        ("string(o)", json.dumps(value, separators=(",", ":"))),
        ("[o, o].distinct()[0].map(k, k)", keys),
        ("(true ? o : {}).map(k, k)[0]", keys[0]),
        (f"{literal}.map(k, k)", keys),
        (f"string({literal})", json.dumps(dict.fromkeys(keys, 1), separators=(",", ":"))),
    ]:
        if len(text) < expressions.MAX_LENGTH and text.count("'") < 200:
            assert Template.compile(f"{{{{ {text} }}}}").evaluate({"o": value}) == expected
    written: Any = Template.compile({"made": f"{{{{ {literal} }}}}", "given": "{{ [o][0] }}"}).evaluate({"o": value})
    assert list(written["made"]) == list(written["given"]) == keys
    assert Template.compile("<{{ o }}>").evaluate({"o": value}) == f"<{json.dumps(value, separators=(',', ':'))}>"


def test_the_order_of_keys_is_the_same_in_each_process() -> None:
    program = """
import json
from ferrum.expressions import Template

scope = {"o": {f"{number * 7919 % 1000}": number for number in range(50)}}
texts = ["{{ o.map(k, k) }}", "{{ {'z': 1, 'a': o, 'm': 2} }}", "{{ o.filter(k, o[k] > 9) }}", "<{{ [o] }}>"]
print(json.dumps([Template.compile(text).evaluate(scope) for text in texts]))
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(said) == 1


def test_a_list_is_looked_through_for_each_of_its_items() -> None:
    scope: dict[str, Any] = {"input": {"l": list(range(25_000))}}
    assert Condition.compile("input.l.all(x, x in input.l)").evaluate(scope) is True
    assert Condition.compile("input.l.exists(x, -1 in input.l)").evaluate(scope) is False


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("l.all(x, l == m)", "it takes more than 10000000 steps"),
        ("l.all(x, !({'a': x} in n))", "it takes more than 10000000 steps"),
        ("l.map(x, long.contains('b'))", "it takes more than 10000000 steps"),
        ("l.map(x, long + '!')", "it builds a list of more than 50000000 characters"),
        ("long.split('')", "it builds a list of more than 50000000 characters"),
        ("l.map(x, l + l)", "it builds a list of more than 50000000 characters"),
        ("string(l.map(x, long))", "it builds a list of more than 50000000 characters"),
        ("l.map(x, long)", "it builds a list of more than 50000000 characters"),
        ("l.all(x, !short.matches('(a|b){1,900}x'))", "it takes more than 10000000 steps"),
        ("short.matches('(?=a)')", "the pattern '(?=a)' cannot be used: look-around"),
        ("short.matches('(.{900}){900}')", "repeats too much"),
        ("l.all(x, [pair, pair].sort() != [])", "it takes more than 10000000 steps"),
        ("l.all(x, o.sort() != [])", "it builds a list of more than 50000000 characters"),
        ("l.all(x, big in {long: 1})", "it takes more than 10000000 steps"),
        ("[bytes(long)].all(b, [bytes(big)].all(c, l.all(x, b == c)))", "it takes more than 10000000 steps"),
        ("[bytes(long)].all(b, [bytes(big)].all(c, l.all(x, b <= c)))", "it takes more than 10000000 steps"),
        ("l.map(x, bytes(long)).size()", "it builds a list of more than 50000000 characters"),
        ("l.map(x, long.substring(1)).size()", "it builds a list of more than 50000000 characters"),
        ("l.map(x, long.upperAscii()).size()", "it builds a list of more than 50000000 characters"),
        ("l.map(x, l).flatten().size()", "it builds a list of more than 50000000 characters"),
    ],
)
def test_an_evaluation_has_a_bound(text: str, reason: str) -> None:
    scope: dict[str, Any] = {"l": list(range(5_000)), "m": list(range(5_000)), "short": "ab" * 50}
    scope |= {"long": "a" * 2_000_000, "n": [{"a": number} for number in range(-5_000, 0)]}
    scope |= {"big": "a" * 2_000_000, "pair": [scope["l"], scope["l"]], "o": {f"{x}": x for x in range(5_000)}}
    with pytest.raises(ExpressionError) as caught:
        Template.compile(f"{{{{ {text} }}}}").evaluate(scope)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("string(2.0)", "2"),
        ("string(1e20)", "100000000000000000000"),
        ("string(0.1)", "0.1"),
        ("string(1.0 / 0.0)", "inf"),
        ("string(b'a\\xff')", "a�"),
        ("string(timestamp('2024-01-02T03:04:05+01:00'))", "2024-01-02T03:04:05+01:00"),
        ("string(timestamp('2024-01-02T03:04:05Z') - timestamp('2024-01-02T03:04:03.5Z'))", "1.5s"),
        ("string(duration('36h'))", "36h0m0s"),
        ("string(duration('1m') - duration('1h2m'))", "-1h1m0s"),
        ("string(timestamp(timestamp('2024-01-02T03:04:05Z')))", "2024-01-02T03:04:05+00:00"),
        ("duration(duration('1h')) == duration('60m')", True),
        ("[[2, 'b'], [1, 'z'], [1, 'a']].sort()", [[1, "a"], [1, "z"], [2, "b"]]),
        ("[[1, 2], [3]].max()", [3]),
        ("{'b': 1, 'a': 2}.sort()", ["a", "b"]),
        ("{true: 1, 'a': 2}.flatten()", [True, "a"]),
        ("max({'b': 1, 'a': 2})", "b"),
        ("'Äa'.upperAscii() + 'ÄA'.lowerAscii()", "ÄAÄa"),
        ("['abcabc'.lastIndexOf('a'), 'abcabc'.lastIndexOf('a', 2), 'abc'.lastIndexOf('x')]", [3, 0, -1]),
        ("'abc'.lastIndexOf('')", 3),
        (
            "[has((classify.kind)), has(((classify).no)), has({'a': -1}.a), has([{'a': 1}][0].a), -2]",
            [True, False, True, True, -2],
        ),
        ("'a' in {'a': 1} && !('b' in {'a': 1})", True),
    ],
)
def test_what_cel_spells_and_orders_is_spelled_and_ordered_here(expression: str, value: object) -> None:
    assert evaluated(f"{{{{ {expression} }}}}") == value


def test_the_ends_of_lines_are_the_same_wherever_a_workflow_was_written() -> None:
    assert evaluated('{{ """a\r\nb\rc""" }}') == "a\nb\nc"


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("has(classify.kind, classify.score)", "has() does not take these values, or not so many"),
        ("has(context.documents[0], input.limit)", "has() does not take these values, or not so many"),
        ("has(classify.kind, 1)", "has() does not take these values, or not so many"),
        ("!!-1", "the types do not fit"),
        ("uint(-0.5)", "uint(-0.5) does not fit 64 bits"),
        ("{1: 2}[true]", "no 'true'"),
        ("1 + 1.5", "Unsupported operation: int + double"),
        ("max({'a': 1}, {'b': 1})", "objects are not compared with each other"),
        ("'abc'.lastIndexOf('a', 9)", "the text has 3 characters, and no place 9"),
    ],
)
def test_what_cel_refuses_is_refused(expression: str, reason: str) -> None:
    assert reason in refusal(f"{{{{ {expression} }}}}")


def test_no_pattern_takes_for_ever() -> None:
    assert Condition.compile("a.matches('^(a|a)*$')").evaluate({"a": "a" * 50_000 + "b"}) is False


# Held against the package that CEL comes from


_LEAVES = [
    "1",
    "2.5",
    "-3",
    "0",
    "true",
    "false",
    "null",
    "'a'",
    "'bc'",
    "[1, 2]",
    "['a']",
    "{'a': 1}",
    "x.n",
    "x.t",
    "x.l",
    "b''",
]
_FORMS = [
    "({0} + {1})", "({0} - {1})", "({0} * {1})", "({0} / {1})", "({0} % {1})", "({0} == {1})", "({0} != {1})",
    "({0} < {1})", "({0} <= {1})", "({0} > {1})", "({0} >= {1})", "({0} in {1})", "({0} && {1})", "({0} || {1})",
    "({0} ? {1} : {0})", "{0}[{1}]", "[{0}, {1}]", "!({0})", "-({0})",
    "[{0}].map(i, [i, {1}])", "[{0}, 1].filter(i, i == {1})",
    "[{0}].all(i, {1})", "[{0}].exists_one(i, i == {1})", "size([{0}])", "type({0}) == type({1})", "{{'k': {0}}}.k",
    "has(x.n)", "has(x.no)", "int({0})", "double({0})", "x.t.startsWith({0})", "x.t.contains({0})", "x.t.matches({0})",
]  # fmt: skip
_expressions = st.recursive(
    st.sampled_from(_LEAVES),
    lambda inner: st.builds(lambda form, one, two: form.format(one, two), st.sampled_from(_FORMS), inner, inner),
    max_leaves=6,
)


@given(_expressions)
def test_what_an_expression_comes_to_is_what_cel_says(text: str) -> None:
    scope: dict[str, Any] = {"x": {"n": 4, "t": "abc", "l": [3, "a", None]}}
    try:
        expected = compile_cel(text).execute(scope)
        json.dumps(expected, allow_nan=False)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        # Or of what it refuses, we may know more: `all` and `exists` come to a value over an error, in any order.
        with contextlib.suppress(ExpressionError):
            Template.compile(f"{{{{ {text} }}}}").evaluate(scope)
        return
    result = Template.compile(f"{{{{ {text} }}}}").evaluate(scope)
    assert (type(result), result) == (type(expected), expected)

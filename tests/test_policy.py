"""The policy and the door."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferrum.errors import SettingsError
from ferrum.governance import Act, Effect, ModelCall, Policy, TaskCall, ToolCall, decide, load_policy
from ferrum.local import trust
from ferrum.settings import Settings

#: A busy machine is not a failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

EXAMPLE = Path(__file__).parent.parent / "examples" / "ferrum.policy.yaml"

BEGINS = "a pattern begins with 'tool:', 'model:', 'sandbox:', 'retrieval:', 'ingest:' or 'task:'"


def tool(name: str, **arguments: str) -> ToolCall:
    server, _, rest = name.partition(".")
    return ToolCall(server=server, tool=rest, arguments=dict(arguments))


def task(name: str) -> TaskCall:
    return TaskCall(name=name, arguments={})


def model(name: str) -> ModelCall:
    return ModelCall(model=name, messages=({"role": "user", "content": "hello"},))


def effect(policy: Policy, act: Act) -> str:
    return policy.decide(act).effect.value


def test_an_act_that_nothing_allows_is_denied_and_says_what_to_add_where() -> None:
    decision = Policy().decide(model("openai/gpt-4.1-mini"))
    assert decision.effect is Effect.DENY
    assert decision.rule == "default"
    assert decision.reason == (
        "nothing allows model 'openai/gpt-4.1-mini': add 'model:openai/gpt-4.1-mini' to allow in ferrum.policy.yaml"
    )


def test_a_decision_says_what_was_decided_on() -> None:
    act = tool("git.push", branch="main")
    decision = Policy().decide(act)
    assert (decision.kind, decision.target, decision.digest) == ("tool", "git.push", act.digest)


@pytest.mark.parametrize("name", ["git.*", "git.a b", "git.[push]"])
def test_a_name_that_is_no_plain_pattern_is_never_offered_for_copying(name: str) -> None:
    decision = Policy().decide(tool(name))
    assert decision.reason == f"nothing allows tool {name!r} in ferrum.policy.yaml"


def test_deny_wins_over_ask_and_ask_over_allow_in_whatever_order_they_stand() -> None:
    policy = Policy.of({"allow": ["tool:*"], "ask": ["tool:git.*"], "deny": ["tool:git.push"]})
    reversed_policy = Policy.of({"deny": ["tool:git.push"], "ask": ["tool:git.*"], "allow": ["tool:*"]})
    for each in (policy, reversed_policy):
        assert effect(each, tool("git.push")) == "deny"
        assert effect(each, tool("git.status")) == "ask"
        assert effect(each, tool("fs.read")) == "allow"
        assert effect(each, model("openai/x")) == "deny"


def test_a_decision_names_its_rule_by_list_place_and_pattern() -> None:
    policy = Policy.of({"allow": ["model:openai/*", "tool:git.*"], "deny": ["tool:git.push"]}, source="team.yaml")
    assert policy.decide(tool("git.log")).rule == "allow[1] tool:git.*"
    denied = policy.decide(tool("git.push"))
    assert denied.rule == "deny[0] tool:git.push"
    assert denied.reason == "tool 'git.push' is denied by deny[0] tool:git.push in team.yaml"


@pytest.mark.parametrize(
    ("pattern", "act", "matches"),
    [
        ("tool:git.push", tool("git.push"), True),
        ("tool:git.push", tool("git.push_force"), False),
        ("tool:git.push", tool("git.pus"), False),
        ("tool:git.push", tool("Git.push"), False),
        ("tool:git.*", tool("git.a.b/c"), True),
        ("tool:git.*", tool("git."), True),
        ("tool:git.*", tool("github.push"), False),
        ("tool:git.p.sh", tool("git.push"), False),
        ("tool:*.delete_*", tool("db.delete_table"), True),
        ("tool:*.delete_*", tool("db.undelete_table"), False),
        ("tool:*", tool("db.x\ny"), True),
        ("tool:*", model("openai/x"), False),
        ("model:openai/*", model("openai/ft:gpt/x"), True),
        ("model:*/llama*", model("ollama/llama3.2"), True),
        ("task:a*a", task("a"), False),
        ("task:a*a", task("aa"), True),
        ("task:a*b*b", task("ab"), False),
        ("task:a**b", task("ab"), True),
        ("task:*b*c", task("xcxb"), False),
        ("task:(a|b)+", task("a"), False),
    ],
)
def test_a_star_stands_for_anything_and_all_else_for_itself(pattern: str, act: Act, matches: bool) -> None:
    assert effect(Policy.of({"allow": [pattern]}), act) == ("allow" if matches else "deny")


@unhurried
@given(pattern=st.text("ab.*", min_size=1, max_size=8), name=st.text("ab.", max_size=10))
def test_matching_is_what_the_same_regular_expression_would_do(pattern: str, name: str) -> None:
    expected = re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None
    assert (effect(Policy.of({"allow": [f"task:{pattern}"]}), task(name)) == "allow") is expected


def test_a_pattern_of_many_stars_does_not_take_forever() -> None:
    policy = Policy.of({"allow": ["task:" + "*a" * 30 + "*b"]})
    assert effect(policy, task("a" * 20_000)) == "deny"


YAML = """\
# the team's policy
allow:
  - "tool:git.*"
  - model:openai/*
deny: ["tool:*.delete_*"]
"""


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    lists = {"allow": ["tool:git.*", "model:openai/*"], "deny": ["tool:*.delete_*"]}
    expected = Policy.of(lists, "p").rules
    assert Policy.parse(YAML, "p").rules == expected
    assert Policy.parse(json.dumps(lists, indent="\t"), "p").rules == expected
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(lists))
    assert Policy.load(path) == Policy(expected, str(path))


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}", "allow: []"])
def test_a_policy_that_says_nothing_denies_everything(text: str) -> None:
    assert effect(Policy.parse(text), tool("git.status")) == "deny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("allow: []\nalow: []\n", "p.yaml:2: 'alow' is not a list of a policy (did you mean 'allow'?)"),
        ("allow: []\nask: []\nallow: []\n", "p.yaml:3: 'allow' is there twice; make it one list"),
        ("\nallow: tool:git.*\n", "p.yaml:2: allow must be a list of patterns; write allow: [] for none"),
        ("deny:\n", "p.yaml:1: deny must be a list of patterns; write deny: [] for none"),
        (
            "deny:\n  - tool:a.b\n  - 12\n",
            'p.yaml:3: deny[1] is not text: a pattern is written like "tool:git.*", in quotes',
        ),
        ("deny:\n  - tool: a\n", 'p.yaml:2: deny[0] is not text: a pattern is written like "tool:git.*", in quotes'),
        (
            "deny:\n  - !!str [a]\n",
            'p.yaml:2: deny[0] is not text: a pattern is written like "tool:git.*", in quotes',
        ),
        ("ask: ['']\n", f"p.yaml:1: ask[0] is '': {BEGINS}"),
        ("ask: ['tools:x']\n", f"p.yaml:1: ask[0] is 'tools:x': {BEGINS}"),
        ("ask: ['*']\n", f"p.yaml:1: ask[0] is '*': {BEGINS}"),
        ("ask: ['tool:']\n", "p.yaml:1: ask[0] is 'tool:', which matches nothing: write 'tool:*' for every tool"),
        ("ask: ['tool:a?']\n", "p.yaml:1: ask[0] is 'tool:a?': '?' has no meaning in a pattern, only '*' has"),
        ("ask: ['tool: a']\n", "p.yaml:1: ask[0] is 'tool: a': ' ' has no meaning in a pattern, only '*' has"),
        ("ask: ['tool:{a,b}']\n", "p.yaml:1: ask[0] is 'tool:{a,b}': '{' has no meaning in a pattern, only '*' has"),
        ("- tool:a\n", "p.yaml:1: a policy is the lists allow, ask and deny"),
        ("just text", "p.yaml:1: a policy is the lists allow, ask and deny"),
        ("allow:\n  - *\n", "p.yaml:2: is not YAML:"),
        ("allow: []\n---\ndeny: []\n", "p.yaml:2: is not YAML:"),
        ("allow: [\n", "p.yaml:2: is not YAML:"),
        ("allow: \x00", "p.yaml: is not YAML:"),
    ],
)
def test_a_mistake_in_a_policy_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        Policy.load(tmp_path / "p.yaml")
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(message)


@pytest.mark.parametrize(
    ("pattern", "right"),
    [
        ("tool:git", "tool:git.*"),
        ("tool:Git", "tool:git.*"),
        ("tool:Git.*", "tool:git.*"),
        ("tool:Git*", "tool:git*"),
        ("tool:git/push.x", "tool:git-push.x"),
        ("tool:.push", "tool:*.push"),
        ("tool:git.", "tool:git.*"),
        ("model:openai", "model:openai/*"),
        ("model:OpenAI", "model:openai/*"),
        ("model:OpenAI/*", "model:openai/*"),
        ("model:OpenAI*", "model:openai*"),
        ("model:openia/gpt*", "model:openai/gpt*"),
        ("model:openai/", "model:openai/*"),
        ("model:/gpt-4o", "model:*/gpt-4o"),
        ("model:gpt-4o-mini", "model:openai/gpt-4o-mini"),
        ("model:gpt-4o*", "model:*/gpt-4o*"),
        ("model:my-finetune", "model:*/my-finetune"),
        ("sandbox:Python-Basic", "sandbox:python-basic"),
        ("retrieval:Hand/Book*", "retrieval:hand-book*"),
        ("ingest:-docs", "ingest:docs"),
        ("ingest:" + "a" * 65, "ingest:" + "a" * 64),
        ("ingest:Ä", "ingest:*"),
        ("task:ferrum.run", "task:*"),
        ("task:celery.*", "task:*"),
    ],
)
@pytest.mark.parametrize("effect", list(Effect))
def test_a_pattern_that_can_never_match_is_refused_with_the_nearest_that_can(
    effect: Effect, pattern: str, right: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        Policy.parse(f"{effect}:\n  - {pattern!r}\n", "p.yaml")
    assert str(caught.value) == f"p.yaml:2: {effect}[0] is {pattern!r}, which can never match: write {right!r}"
    assert Policy.of({effect: [right]}).rules


@pytest.mark.parametrize(
    "pattern",
    [
        "tool:*", "tool:git*", "tool:*push", "tool:g*.push", "tool:git.Push/x", "model:*", "model:open*", "model:*4o*",
        "model:openai/GPT*", "model:a-server-of-ours/x", "model:ollama_chat/*", "sandbox:*", "sandbox:python-*",
        "ingest:*Docs"[:8], "retrieval:a.b_c", "task:Shop.order", "task:shop.steps:*", "task:*",
    ],
)  # fmt: skip
def test_what_some_act_may_match_is_a_pattern(pattern: str) -> None:
    assert Policy.of({"deny": [pattern]}).rules


@pytest.mark.parametrize(
    ("pattern", "hint"), [("tools:x", "tool"), ("Model:openai/*", "model"), ("retreival:docs", "retrieval")]
)
def test_an_unknown_kind_is_refused_with_the_nearest(pattern: str, hint: str) -> None:
    with pytest.raises(SettingsError, match=rf"\(did you mean '{hint}'\?\)"):
        Policy.of({"deny": [pattern]})


@pytest.mark.parametrize("lists", [{"allow": "tool:*"}, {"allow": [None]}, {"permit": []}, {"allow": None}])
def test_a_mistake_in_a_policy_made_in_python_is_refused_too(lists: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=r"^ferrum\.policy\.yaml: "):
        Policy.of(lists)


def test_a_named_policy_file_that_is_not_there_is_an_error_and_not_an_empty_policy(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the policy cannot be read: No such file"):
        load_policy(Settings(policy=tmp_path / "gone.yaml"))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"allow: [\xff]")
    with pytest.raises(SettingsError, match="is not UTF-8 text"):
        Policy.load(tmp_path / "p.yaml")


def test_the_policy_is_the_file_named_else_the_one_here_else_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = Settings(home=tmp_path / "home")
    assert load_policy(here) == Policy()
    Path("ferrum.policy.yaml").write_text("allow: ['tool:here.*']")
    for found in trust.find(tmp_path):
        found.trust(here.home)
    Path("named.yaml").write_text("allow: ['tool:named.*']")
    assert effect(load_policy(here), tool("here.x")) == "allow"
    assert effect(load_policy(Settings(policy=Path("named.yaml"))), tool("here.x")) == "deny"
    assert effect(load_policy(Settings(policy=Path("named.yaml"))), tool("named.x")) == "allow"


def test_the_example_policy_is_one() -> None:
    policy = Policy.load(EXAMPLE)
    assert effect(policy, model("openai/gpt-4.1-mini")) == "allow"
    assert effect(policy, tool("git.log")) == "allow"
    assert effect(policy, tool("git.push")) == "ask"
    assert effect(policy, tool("git.delete_branch")) == "deny"
    assert effect(policy, tool("fs.read")) == "deny"


ASKING = Policy.of({"allow": ["tool:git.*"], "ask": ["tool:git.push"], "deny": ["tool:git.reset"]})


def test_an_act_that_must_be_asked_about_stays_so_until_a_person_said_yes() -> None:
    assert decide(tool("git.push", branch="x"), ASKING, frozenset()).effect is Effect.ASK


def test_a_persons_yes_allows_exactly_the_act_they_saw() -> None:
    act = tool("git.push", branch="x")
    decision = decide(act, ASKING, frozenset({act.digest}))
    assert decision.effect is Effect.ALLOW
    assert decision.rule == f"approved {act.digest[:12]}"
    assert decision.reason == (
        "a person approved exactly this tool call of 'git.push', which ask[0] tool:git.push asks for"
    )
    assert decision.digest == act.digest


def test_a_persons_yes_does_not_cover_the_same_tool_with_other_arguments() -> None:
    seen = tool("git.push", branch="x").digest
    assert decide(tool("git.push", branch="main"), ASKING, frozenset({seen})).effect is Effect.ASK


def test_a_persons_yes_never_opens_what_the_policy_denies() -> None:
    denied, unknown = tool("git.reset"), tool("fs.write")
    grants = frozenset({denied.digest, unknown.digest})
    assert decide(denied, ASKING, grants) == ASKING.decide(denied)
    assert decide(unknown, ASKING, grants).rule == "default"


def test_an_allowed_act_keeps_its_rule_whatever_was_approved() -> None:
    act = tool("git.log")
    assert decide(act, ASKING, frozenset({act.digest})).rule == "allow[0] tool:git.*"

"""`type: ingest` and `type: retrieval` on a real worker: decided, charged, and never another tenant's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fleet import Fleet, assert_events_agree, ended, eventually, happened, status_of

import ferrum
from ferrum.errors import WorkflowError
from ferrum.plan import Plan
from ferrum.results import RunStatus
from ferrum.runs import RunView, record
from ferrum.testing.model_server import ModelServer
from ferrum.workflow import Workflow

POLICY = """
allow: ["ingest:*", "retrieval:*", "model:openai/*"]
ask: ["ingest:asked"]
deny: ["retrieval:secret", "model:openai/denied*"]
"""
EMBEDDER = "openai/text-embedding-3-small"
PETS = [
    {"source": "cats.md", "text": "# Cats\n\nA cat sleeps sixteen hours a day.", "metadata": {"kind": "pet"}},
    {"source": "dogs.md", "text": "# Dogs\n\nA dog barks at night.", "metadata": {"kind": "pet"}},
    {"source": "iron.md", "text": "# Iron\n\nIron rusts in wet air.", "metadata": {"kind": "metal"}},
]


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    grades = {"grades": [{"document": number, "grade": grade} for number, grade in enumerate([1, 3, 0], 1)]}
    rules = [
        {"match": {"contains": "You grade how well"}, "json": grades},
        {"match": {"contains": "untrusted"}, "reply": "marked"},
        {"match": {"contains": "was written by others"}, "reply": "marked"},
    ]
    with ModelServer({"rules": rules, "default": {"reply": "plain"}}) as server:
        yield server


@pytest.fixture(scope="module")
def fleet(redis_url: str, tmp_path_factory: pytest.TempPathFactory, models: ModelServer) -> Iterator[Fleet]:
    home = tmp_path_factory.mktemp("retrieval")
    policy = home / "retrieval.policy.yaml"
    policy.write_text(POLICY)
    fleet = Fleet(redis_url, home, {"FERRUM_POLICY": str(policy), "FERRUM_EMBEDDING": "lexical", **models.environ})
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


def ingest(index: str, documents: Any = PETS, **more: Any) -> dict[str, Any]:
    return {"type": "ingest", "index": index, "documents": documents, **more}


def search(index: str, query: str, **more: Any) -> dict[str, Any]:
    return {"type": "retrieval", "index": index, "query": query, **more}


def run(steps: dict[str, Any], *, tenant: str = "default", **more: Any) -> RunView:
    outputs = {name: f"{{{{ {name} }}}}" for name in steps}
    run_id = ferrum.submit(Workflow.of({"name": "rag", "steps": steps, "outputs": outputs, **more}), tenant=tenant)
    return ended(run_id)


def outputs(steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    view = run(steps, **more)
    assert view.status is RunStatus.COMPLETED, view
    assert isinstance(view.outputs, dict)
    return view.outputs


def sources(found: Any) -> list[str]:
    return [document["source"] for document in found["documents"]]


def test_what_a_step_gives_an_index_another_finds_with_its_source(fleet: Fleet, redis_url: str) -> None:
    view = run({"fill": ingest("pets"), "find": search("pets", "how long does a cat sleep?", needs=["fill"])})
    assert view.status is RunStatus.COMPLETED, view
    said: Any = view.outputs
    assert said["fill"] == {
        "added": 3,
        "updated": 0,
        "unchanged": 0,
        "removed": 0,
        "embedded": 3,
        "chunks": 3,
        "left_out": [],
    }
    first = said["find"]["documents"][0]
    assert (first["source"], first["metadata"]) == ("cats.md", {"kind": "pet"})
    assert first["text"] == "# Cats\n\nA cat sleeps sixteen hours a day."
    assert first["position"] == {"line": 1, "end_line": 3, "heading": "Cats"}
    assert 0 < first["score"] <= 1
    assert_events_agree(redis_url, view.run_id)


def test_only_what_changed_is_put_again_and_what_is_not_given_any_more_goes_if_that_is_asked(fleet: Fleet) -> None:
    changed = [{**PETS[0], "text": "# Cats\n\nA cat purrs."}, PETS[1]]
    outputs({"fill": ingest("again")})
    said = outputs({"fill": ingest("again", changed, prune=True)})
    assert said["fill"] == {
        "added": 0,
        "updated": 1,
        "unchanged": 1,
        "removed": 1,
        "embedded": 1,
        "chunks": 2,
        "left_out": [],
    }
    assert sources(outputs({"find": search("again", "iron rusts", mode="text")})["find"]) == []


def test_a_document_that_cannot_be_taken_is_named_in_the_output_and_the_others_go_in(fleet: Fleet) -> None:
    report = {"source": "https://example.org/report.pdf", "text": "Tea was sold in May."}
    empty = {"source": "empty.html", "text": "<html><body></body></html>"}
    said = outputs({"fill": ingest("mixed-bag", [empty, report])})["fill"]
    assert (said["added"], [one["source"] for one in said["left_out"]]) == (1, ["empty.html"])
    assert said["left_out"][0]["why"].startswith("'empty.html' has no text")
    assert sources(outputs({"find": search("mixed-bag", "tea", mode="text")})["find"]) == [report["source"]]


def test_a_search_is_narrowed_by_what_documents_are_and_by_how_near_they_are(fleet: Fleet) -> None:
    outputs({"fill": ingest("narrow")})
    found = outputs(
        {
            "metal": search("narrow", "a day in wet air", filter={"kind": "metal"}),
            "either": search("narrow", "a day in wet air at night", filter={"kind": ["metal", "pet"]}, top_k=2),
            "none": search("narrow", "a day in wet air", filter={"kind": "stone"}),
            "near": search("narrow", "iron rusts in wet air", mode="text", min_score=0.9),
        }
    )
    assert sources(found["metal"]) == ["iron.md"]
    assert len(sources(found["either"])) == 2
    assert sources(found["none"]) == []
    assert sources(found["near"]) == ["iron.md"]


def test_a_model_grades_what_was_found_where_that_is_asked(fleet: Fleet) -> None:
    outputs({"fill": ingest("graded")})
    plain = outputs({"find": search("graded", "a day and a night in the air", mode="vector")})["find"]
    graded = outputs(
        {"find": search("graded", "a day and a night in the air", mode="vector", rerank="openai/judge", min_score=0.3)}
    )["find"]
    assert sources(graded) == [sources(plain)[1], sources(plain)[0]]
    assert [document["score"] for document in graded["documents"]] == [1.0, pytest.approx(1 / 3)]


def test_a_tenant_sees_only_its_own_indexes(fleet: Fleet) -> None:
    outputs({"fill": ingest("private")}, tenant="acme")
    assert sources(outputs({"find": search("private", "cats")}, tenant="acme")["find"])
    view = run({"find": search("private", "cats")}, tenant="other")
    assert view.status is RunStatus.FAILED
    assert "there is no index 'private'" in str(record().state(view.run_id).step("find").error)
    # A run inside a run is its tenant's, too.
    inner = {"name": "inner", "steps": {"find": search("private", "cats")}, "outputs": {"found": "{{ find }}"}}
    nested = {"sub": {"type": "workflow", "workflow": inner}}
    assert sources(outputs(nested, tenant="acme")["sub"]["found"])
    assert run(nested, tenant="other").status is RunStatus.FAILED


def test_a_providers_embedder_is_decided_charged_and_asked_over_http(fleet: Fleet, models: ModelServer) -> None:
    view = run({"fill": ingest("bought", embedding=EMBEDDER), "find": search("bought", "cats", needs=["fill"])})
    assert view.status is RunStatus.COMPLETED, view
    assert view.usage.model_calls == 2
    assert view.usage.input_tokens > 0
    decided = [(event.kind, event.target) for event in happened(view.run_id, "act.decided")]
    assert decided == [("ingest", "bought"), ("model", EMBEDDER), ("retrieval", "bought"), ("model", EMBEDDER)]
    # Bought once: what is there already is not embedded again.
    assert run({"fill": ingest("bought")}).usage.model_calls == 0


def test_an_embedder_that_nothing_allows_leaves_the_index_as_it_was(fleet: Fleet) -> None:
    view = run({"fill": ingest("unbought", embedding="openai/denied-embedder")})
    assert view.status is RunStatus.POLICY_BLOCKED
    assert "model 'openai/denied-embedder' is denied" in str(record().state(view.run_id).step("fill").error)
    assert sources(outputs({"find": search("unbought", "cats", mode="text")})["find"]) == []


def test_a_budget_holds_for_embedders(fleet: Fleet) -> None:
    many = [{"source": f"{number}.txt", "text": f"{number} " * 500} for number in range(20)]
    view = run({"fill": ingest("dear", many, embedding=EMBEDDER)}, budget={"input_tokens": 100})
    assert view.status is RunStatus.BUDGET_KILLED


def test_a_search_or_an_index_that_the_policy_has_something_against_is_not_looked_at(fleet: Fleet) -> None:
    view = run({"find": search("secret", "cats")})
    assert view.status is RunStatus.POLICY_BLOCKED
    run_id = ferrum.submit(Workflow.of({"name": "rag", "steps": {"fill": ingest("asked")}}))
    eventually(lambda: status_of(run_id) is RunStatus.WAITING_APPROVAL)
    (asked,) = [one for one in ferrum.approvals() if one.run_id == run_id]
    assert json.loads(json.dumps(asked.act))["documents"][0]["source"] == "cats.md"
    ferrum.decide(run_id, "fill", approved=True, by="ada")
    assert ended(run_id).status is RunStatus.COMPLETED


def test_documents_are_marked_in_the_prompt_of_a_model(fleet: Fleet) -> None:
    outputs({"fill": ingest("quoted")})
    ask = {"type": "llm", "model": "openai/scripted", "prompt": "Answer by {{ find.documents }}: how long?"}
    said = outputs({"find": search("quoted", "how long does a cat sleep?"), "ask": ask})
    assert said["ask"] == "marked"


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (search("pest", "cats"), "there is no index 'pest'"),
        (search("Not a name", "cats"), "'Not a name' cannot be the name of an index"),
        (ingest("mixed", embedding="lexical2"), "lexical2"),
    ],
)
def test_what_cannot_be_is_said_by_the_step(fleet: Fleet, step: dict[str, Any], error: str) -> None:
    view = run({"s": step})
    assert view.status is RunStatus.FAILED
    assert error in str(record().state(view.run_id).step("s").error)


def test_an_index_keeps_to_its_embedder(fleet: Fleet) -> None:
    outputs({"fill": ingest("pinned")})
    view = run({"fill": ingest("pinned", embedding="none")})
    assert "index 'pinned' is pinned to embedder 'lexical/1'" in str(record().state(view.run_id).step("fill").error)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"type": "retrieval", "index": "x"}, "'query' is missing"),
        ({"type": "retrieval", "index": "x", "query": "?", "top_k": 0}, "greater than or equal to 1"),
        ({"type": "retrieval", "index": "x", "query": "?", "mode": "both"}, "'hybrid', 'vector' or 'text'"),
        ({"type": "retrieval", "index": "x", "query": "?", "topk": 3}, "has no 'topk' (did you mean 'top_k'?)"),
        ({"type": "ingest", "index": "x", "documents": [{"text": "a"}]}, "'source' is missing"),
    ],
)
def test_a_mistake_in_a_step_is_refused_before_anything_runs(step: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        Plan.of({"name": "x", "steps": {"s": step}})
    assert message in str(caught.value)

"""What a message may be: its limits, its headers, its canvas, and what is handed on of it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from celery.app.task import Context
from test_message_fuzz import RUN_BODY, STEP_BODY, a_run, a_step

from ferrum import messages
from ferrum.messages import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_VALUES, Refused

TASKS = frozenset({"ferrum.run", "ferrum.task", "ferrum.llm"})
RUN_ID = STEP_BODY[0][0]


def _read(message: Mapping[str, Any], queue: str = "ferrum") -> dict[str, Any] | Refused:
    return messages.read(json.dumps(message), queue, TASKS)


def _reason(message: Mapping[str, Any] | str, queue: str = "ferrum") -> str:
    read = messages.read(message if isinstance(message, str) else json.dumps(message), queue, TASKS)
    assert isinstance(read, Refused), read
    return read.reason


def _with(part: str, **changes: Any) -> dict[str, Any]:
    message = a_run()
    message[part] = {**message[part], **changes}
    return message


def _saying(body: Any, make: Callable[[], dict[str, Any]] = a_run) -> dict[str, Any]:
    text = body if isinstance(body, str) else json.dumps(body)
    return {**make(), "body": base64.b64encode(text.encode()).decode()}


def test_a_good_message_is_handed_on_with_what_was_checked_and_nothing_else() -> None:
    message = _with("headers", shadow="x", timelimit=[1, 2], argsrepr="a secret", kwargsrepr="too", update=1, stamps={})
    message["properties"]["delivery_info"] |= {"exchange": "elsewhere", "routing_key": "nowhere"}
    read = _read({**message, "more": 1})
    assert isinstance(read, dict)
    assert read["headers"] == {
        "task": "ferrum.run", "id": message["headers"]["id"], "root_id": message["headers"]["id"], "lang": "any",
        "retries": 0, "argsrepr": "(…)", "kwargsrepr": "{}",
    }  # fmt: skip
    # It goes back to the queue that it was in, whatever it says.
    assert read["properties"]["delivery_info"] == {
        "exchange": "", "routing_key": "ferrum", "redelivered": False, "deliveries": 1,
    }  # fmt: skip
    assert read["body"] == message["body"]


def test_no_header_that_is_handed_on_is_anything_but_data_of_a_tasks_context() -> None:
    methods = {name for name in dir(Context) if callable(getattr(Context, name))}
    assert not methods & {*messages._HEADERS, *messages._EMBEDDED}


def test_a_plain_body_is_taken_too() -> None:
    message = {**a_run(), "body": json.dumps(RUN_BODY)}
    del message["properties"]["body_encoding"]
    del message["content-encoding"]
    assert isinstance(_read(message), dict)


def test_a_step_is_shown_by_its_ids_and_a_run_never_by_its_input() -> None:
    step, named = _read(a_step(), "ferrum.task"), _read(_saying([[], {"workflow": {}}, {}]))
    assert isinstance(step, dict)
    assert isinstance(named, dict)
    assert step["headers"]["argsrepr"] == f"('{RUN_ID}', 'hi')"
    assert (named["headers"]["argsrepr"], named["headers"]["kwargsrepr"]) == ("()", "{…}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * (MAX_DEPTH + 1), "the message is nested more than 100 deep"),
        ("[" * 100_000, "the message is nested more than 100 deep"),
        ('{"a":' * 5_000, "the message is nested more than 100 deep"),
        ("9" * (MAX_DIGITS + 1), "the message has a number of more than 300 digits"),
        ("[1" + ",1" * MAX_VALUES + "]", "the message has more than 500,000 values"),
        (f'"{"x" * MAX_BYTES}"', "the message has more than 16,777,216 bytes"),
        ("1e999", "the message is not JSON: Out of range float values are not JSON compliant"),
        ("[NaN]", "NaN is not JSON"),
        ('"\\ud800"', "the message holds a text with half a character (a lone surrogate)"),
        ('{"__type__": "decimal", "__value__": "1"}', "it holds a value of Python's own, 'decimal': give dates and"),
        ('{"\\u005f_type__": "decimal", "__value__": "1"}', "it holds a value of Python's own"),
        ('"\\', "the message is not JSON: Unterminated string"),
        ("7", "it is not a JSON object"),
    ],
)
def test_what_is_too_much_or_no_json_is_refused_before_it_is_parsed(text: str, reason: str) -> None:
    assert _reason(text).startswith(reason)
    if not reason.startswith(("it is", "the message has more than 16")):
        body = _reason(_saying(text))
        assert body.startswith(reason.replace("the message", "the body"))


def test_brackets_and_digits_in_texts_do_not_count() -> None:
    text = json.dumps("[" * 5_000 + '\\" {' * 5_000 + "1" * 5_000)
    assert isinstance(_read(_saying(f'[[{{"name": {text}}}], {{}}, {{}}]')), dict)


@pytest.mark.parametrize(
    "hostile",
    [
        lambda n: "[" * n,
        lambda n: "[]," * n,
        lambda n: '"\\"' * n,
        lambda n: '"' + '\\"' * n + "\\",
        lambda n: '"' + "\\" * (2 * n + 1),
        lambda n: '"' * n,
        lambda n: "1" * n,
        lambda n: ("9" * MAX_DIGITS + " ") * (n // MAX_DIGITS),
        lambda n: "1 " * n,
        lambda n: '{"a":"' + "x" * n,
        lambda n: " " * n,
        lambda n: "e1" * n,
    ],
)
def test_reading_is_linear_in_the_size_of_a_message(hostile: Callable[[int], str]) -> None:
    def cost(size: int) -> float:
        text = hostile(size)
        begun = time.process_time()
        assert _reason(text)
        return time.process_time() - begun

    least = [min(cost(size) for _ in range(3)) for size in (125_000, 1_000_000)]
    # Eight times as much costs about eight times as much; quadratic would be 64 times.
    assert least[1] < 24 * max(least[0], 0.002)


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("headers", {"task": []}, "headers.task is missing, or not the name of a task"),
        ("headers", {"task": {"a": 1}}, "headers.task is missing"),
        ("headers", {"task": "a\x1b[2J"}, "headers.task is missing"),
        ("headers", {"task": "ferrum.ran"}, "there is no task 'ferrum.ran' for ferrum's queues (did you mean"),
        ("headers", {"task": "shop.refund"}, "there is no task 'shop.refund' for ferrum's queues"),
        ("headers", {"task": "celery.map"}, "there is no task 'celery.map' for ferrum's queues"),
        ("headers", {"id": []}, "headers.id is missing, or not text of 1 to 255 printable characters"),
        ("headers", {"id": "\x1b]52;c;aGk=\x07"}, "headers.id is missing"),
        ("headers", {"id": "\u202eabc"}, "headers.id is missing"),
        ("headers", {"id": "x" * 256}, "headers.id is missing"),
        ("headers", {"root_id": 7}, "headers.root_id is not text of 1 to"),
        ("headers", {"group_index": "1"}, "headers.group_index is not a whole number"),
        ("headers", {"retries": True}, "headers.retries is not a whole number"),
        ("headers", {"ignore_result": 1}, "headers.ignore_result is not a JSON boolean"),
        ("headers", {"compression": "zlib"}, "headers.compression: compressed messages are not taken"),
        ("headers", {"eta": "tomorrow"}, "headers.eta is not a time such as 2030-01-31T12:00:00+00:00"),
        ("headers", {"eta": "0001-01-01T00:00:00+14:00"}, "headers.eta is not a time"),
        ("headers", {"eta": "2090-01-01"}, "headers.eta is more than a day from now: use a schedule"),
        ("headers", {"expires": 7}, "headers.expires is not a time"),
        ("properties", {"priority": "9"}, "properties.priority is not a whole number from 0 to 9"),
        ("properties", {"correlation_id": {}}, "properties.correlation_id is not text"),
        ("properties", {"delivery_tag": 7}, "it has no properties.delivery_tag"),
        ("properties", {"delivery_info": {"exchange": "", "routing_key": 7}}, "it has no properties.delivery_info"),
        ("properties", {"body_encoding": "rot13"}, "its body is not encoded as properties.body_encoding says"),
    ],
)
def test_a_header_or_a_property_of_another_kind_is_refused(part: str, changes: dict[str, Any], reason: str) -> None:
    assert _reason(_with(part, **changes)).startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"body": None}, "its headers are no object, or its body is no text"),
        ({"headers": []}, "its headers are no object"),
        ({"body": "AAA"}, "its body is not the base64 of a text in utf-8"),
        ({"body": base64.b64encode(b"\xff").decode()}, "its body is not the base64 of a text in utf-8"),
        ({"content-type": "application/x-python-serialize"}, "its content-type is not application/json"),
        ({"content-encoding": 7}, "its content-encoding is not utf-8"),
        ({"properties": {}}, "it has no properties.delivery_tag"),
    ],
)
def test_a_message_that_lacks_a_part_is_refused(change: dict[str, Any], reason: str) -> None:
    assert _reason({**a_run(), **change}).startswith(reason)


SIGNATURE = {"task": "ferrum.llm", "args": [RUN_ID, "b"], "kwargs": {}, "options": {}, "subtask_type": None}
FOREIGN = {**SIGNATURE, "task": "shop.refund", "args": []}


def _part(kind: str, **named: Any) -> dict[str, Any]:
    return {"task": f"celery.{kind}", "args": [], "kwargs": named, "options": {}, "subtask_type": kind}


@pytest.mark.parametrize(
    "embedded",
    [
        {"chain": [SIGNATURE, _part("chord", header=_part("group", tasks=[SIGNATURE]), body=SIGNATURE, kwargs={})]},
        {"chain": None, "chord": {**SIGNATURE, "chord_size": 2}, "callbacks": [], "errbacks": None},
        {"chain": [_part("chord", header=[_part("chain", tasks=[SIGNATURE])], body=SIGNATURE, kwargs={})]},
        {"chain": [{**SIGNATURE, "options": {"task_id": f"{RUN_ID}.b", "chord": SIGNATURE, "chain": [SIGNATURE]}}]},
        {"chain": [{**SIGNATURE, "options": {"root_id": None, "priority": 4, "reply_to": "x", "group_index": 0}}]},
    ],
)
def test_a_canvas_of_steps_is_handed_on(embedded: dict[str, Any]) -> None:
    assert isinstance(_read(_saying([STEP_BODY[0], {}, embedded], a_step), "ferrum.task"), dict)


@pytest.mark.parametrize(
    ("embedded", "reason"),
    [
        ({"chain": [FOREIGN]}, "its canvas holds a task that is no step of ferrum's"),
        ({"chain": [{**SIGNATURE, "task": "ferrum.run"}]}, "its canvas holds a task that is no step"),
        ({"chain": [{**_part("group", tasks=[FOREIGN])}]}, "its canvas holds a task that is no step"),
        ({"chain": [{**_part("chain", tasks=[SIGNATURE]), "task": "shop.refund"}]}, "its canvas holds a task that is"),
        ({"chain": [_part("map", task=FOREIGN, it=[[1]])]}, "its canvas holds a task that is no step"),
        ({"chain": [_part("chord", header=[SIGNATURE], body=FOREIGN)]}, "its canvas holds a task that is no step"),
        ({"chain": [_part("chord", header=_part("group", tasks=[FOREIGN]), body=SIGNATURE)]}, "its canvas holds a"),
        ({"chain": [_part("chord", header=[SIGNATURE], body=SIGNATURE, kwargs={"a": 1})]}, "a part of its canvas has"),
        ({"chord": FOREIGN}, "its canvas holds a task that is no step"),
        ({"chord": 7}, "its canvas holds what is no signature"),
        ({"chain": 7}, "chain is no list"),
        ({"chain": ["x"]}, "its canvas holds what is no signature"),
        ({"chain": [{**SIGNATURE, "more": 1}]}, "its canvas holds what is no signature"),
        ({"chain": [{**SIGNATURE, "args": None}]}, "a signature of its canvas has no args, kwargs or options"),
        ({"chain": [{**SIGNATURE, "args": ["x", "b"]}]}, "a step of its canvas is not called with the ids"),
        ({"chain": [{**SIGNATURE, "options": {"link": [FOREIGN]}}]}, "a signature of its canvas has an option 'link'"),
        ({"chain": [{**SIGNATURE, "options": {"chain": [FOREIGN]}}]}, "its canvas holds a task that is no step"),
        ({"chain": [{**SIGNATURE, "options": {"queue": "shop"}}]}, "a signature of its canvas has an option 'queue'"),
        ({"chain": [{**SIGNATURE, "options": {"priority": "x"}}]}, "a signature of its canvas has an option 'prior"),
        ({"callbacks": [FOREIGN]}, "its body has callbacks or errbacks, which no step has"),
        ({"errbacks": [SIGNATURE]}, "its body has callbacks or errbacks, which no step has"),
        ({"timelimit": [1, 1]}, "the third part of its body has more than callbacks, chain, chord, errbacks"),
    ],
)
def test_a_canvas_is_no_way_to_run_other_tasks(embedded: dict[str, Any], reason: str) -> None:
    assert _reason(_saying([STEP_BODY[0], {}, embedded], a_step), "ferrum.task").startswith(reason)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([[], {}], "its body is not [[arguments…], {named arguments}, {}]"),
        ([[], [], {}], "its body is not [[arguments…]"),
        ({"args": [], "kwargs": {}}, "its body is not [[arguments…]"),
        ([[RUN_ID], {}, {}], "its arguments are not the ids of a run and of a step in it"),
        ([[RUN_ID, "a b"], {}, {}], "its arguments are not the ids"),
        ([["run_1", "hi"], {}, {}], "its arguments are not the ids"),
        ([[RUN_ID, "hi"], {"x": 1}, {}], "its arguments are not the ids"),
        ([[RUN_ID, "other"], {}, {}], "headers.id is not the id of the run, '.' and the id of the step"),
    ],
)
def test_a_step_is_called_with_the_ids_of_a_run_and_a_step(body: Any, reason: str) -> None:
    assert _reason(_saying(body, a_step), "ferrum.task").startswith(reason)


@pytest.mark.parametrize("name", ["callbacks", "errbacks", "chain", "chord"])
def test_nothing_is_linked_to_the_start_of_a_run(name: str) -> None:
    linked = FOREIGN if name == "chord" else [FOREIGN]
    assert _reason(_saying([*RUN_BODY[:2], {name: linked}])).startswith("its body links other tasks to it")


def test_a_queue_that_is_not_ferrums_takes_other_tasks_and_checks_their_headers_all_the_same() -> None:
    message = _with("headers", task="shop.refund")
    assert isinstance(_read(message, "shop"), dict)
    assert _reason(_with("headers", task="shop.refund", retries=[]), "shop").startswith("headers.retries")


def test_who_may_wait_for_an_answer_is_told_under_the_id_of_the_message() -> None:
    def answered(message: dict[str, Any], queue: str = "ferrum") -> str | None:
        read = _read(message, queue)
        assert isinstance(read, Refused)
        return read.id if read.answered else None

    assert answered(_with("headers", id="mine", eta="tomorrow")) == "mine"
    assert answered(_with("headers", id="mine", task="ferum.run")) == "mine"
    assert answered(_with("headers", id="mine", eta="tomorrow", ignore_result=True)) is None
    assert answered(_with("headers", id="\x1b")) is None
    assert answered(_saying([[RUN_ID, "x"], {}, {}], a_step), "ferrum.task") is None


def test_a_reason_is_one_short_printable_line() -> None:
    for name in ("\x1b[2J\u202e", "x" * 100_000, "a\nb"):
        reason = _reason(_saying({"__type__": name, "__value__": 1}))
        assert reason.isprintable()
        assert len(reason) <= 500
    failed = messages.failed(a_run(), ValueError("\x1b[2J" * 1000), TASKS)
    assert failed.reason.startswith("it could not be received: ValueError: \\x1b[2J")
    assert len(failed.reason) < 4 * 500
    assert failed.answered


def test_a_message_that_comes_again_and_again_is_refused_and_counted_anew_when_it_is_renewed() -> None:
    text = json.dumps(a_run())
    for _ in range(messages.MAX_DELIVERIES):
        assert isinstance(messages.read(text, "ferrum", TASKS), dict)
        text = messages.delivered_again(text)
    assert json.loads(text)["properties"]["delivery_info"]["redelivered"] is True
    assert _reason(text) == "it was delivered 9 times and never answered: it may end the workers that take it"
    assert isinstance(messages.read(messages.renewed(text), "ferrum", TASKS), dict)
    forged = _with("properties", delivery_info={"exchange": "", "routing_key": "", "deliveries": "x"})
    assert isinstance(messages.read(messages.delivered_again(json.dumps(forged)), "ferrum", TASKS), dict)
    for odd in ("}{", "7", "[" * 5_000, "{}"):
        assert messages.delivered_again(odd) == messages.renewed(odd) == odd


@pytest.mark.parametrize(
    ("given", "named", "error"),
    [
        ([1, 2, 3, 4, 5, 6], {}, "6 arguments are too many: ferrum.run takes workflow, input, key, priority and"),
        ([{}], {"workflow": {}}, "'workflow' is given twice, by place and by name"),
        ([{}], {"imput": {}}, "'imput' is not known (did you mean 'input'?): ferrum.run takes"),
        ([], {}, "'workflow' is missing: ferrum.run takes"),
        (["hello.yaml"], {}, "the argument workflow is not a JSON object"),
        ([{}, [1]], {}, "the argument input is not a JSON object"),
        ([{}, {}, 7], {}, "the argument key is not text of 1 to 1000 printable characters"),
        ([{}, {}, "k", 10], {}, "the argument priority is not a whole number from 0 to 9"),
        ([{}], {"tenant": ["x"]}, "the argument tenant is not text of 1 to 100 printable characters"),
    ],
)
def test_arguments_of_another_kind_are_said_to_be_that(given: list[Any], named: dict[str, Any], error: str) -> None:
    said = messages.arguments(given, named)
    assert isinstance(said, str)
    assert said.startswith(error)


def test_arguments_come_by_place_and_by_name() -> None:
    assert messages.arguments([{"a": 1}, None], {"key": "k"}) == {"workflow": {"a": 1}, "input": None, "key": "k"}


def _control(**changes: Any) -> dict[str, Any]:
    body = {"method": "ping", "arguments": {}, "destination": None, "pattern": None, "matcher": None, **changes}
    return _saying({name: value for name, value in body.items() if value != "gone"})


def test_a_control_message_is_handed_on_with_its_clock() -> None:
    message = _control(ticket="t", reply_to={"exchange": "e", "routing_key": "k"}, destination=["celery@here"])
    message["headers"] = {"clock": 7, "expires": 1.5, "compression": None}
    read = messages.control(json.dumps(message))
    assert isinstance(read, dict)
    assert read["headers"] == {"clock": 7}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "gone"}, "its body is no object with a method"),
        ({"method": 7}, "its body is no object with a method"),
        ({"self": 1}, "'self' is not known of control messages"),
        ({"arguments": []}, "arguments is not a JSON object"),
        ({"destination": "x"}, "destination is not a list of names"),
        ({"destination": [7]}, "destination is not a list of names"),
        ({"pattern": "(a+)+$", "matcher": "pcre"}, "workers are matched by a glob pattern, or named by destination"),
        ({"reply_to": {"exchange": "x"}}, "reply_to is not an object of exchange and routing_key"),
        ({"ticket": "\x1b"}, "ticket is not text"),
    ],
)
def test_a_control_message_of_another_kind_is_refused(changes: dict[str, Any], reason: str) -> None:
    read = messages.control(json.dumps(_control(**changes)))
    assert isinstance(read, Refused)
    assert read.reason.startswith(reason)


def test_an_answer_or_an_event_is_handed_on_as_it_is_unless_it_is_compressed() -> None:
    message = _saying({"celery@here": {"ok": "pong"}})
    message["headers"] = {"ticket": "t", "clock": 1}
    read = messages.other(json.dumps(message))
    assert isinstance(read, dict)
    assert read["headers"] == {"ticket": "t", "clock": 1}
    message["headers"]["compression"] = "zlib"
    assert isinstance(messages.other(json.dumps(message)), Refused)
    assert isinstance(messages.other("}{"), Refused)


def test_bytes_that_are_no_text_or_too_many_are_refused() -> None:
    assert messages.decoded(b"abc") == "abc"
    assert messages.decoded(b"\xff") == Refused("it is not text in UTF-8")
    assert messages.decoded(b"x" * (MAX_BYTES + 1)) == Refused("the message has more than 16,777,216 bytes")

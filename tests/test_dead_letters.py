"""Messages that a worker drops: who hears of it, where they are kept, and how they come back."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from fleet import PATIENCE_S, Fleet, ended, eventually, lane
from test_message_fuzz import RUN_BODY, WORKFLOW, a_run, message

from ferrum import dead_letters, messages, runs
from ferrum.broker import UNACKED, UNACKED_INDEX
from ferrum.cli import status_of
from ferrum.dead_letters import DeadLetter, bury
from ferrum.errors import Conflict, NotFound
from ferrum.messages import MAX_BYTES, Refused
from ferrum.results import RunStatus


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def no_letters(client: redis.Redis) -> None:
    client.delete(*(f"ferrum:{{dead-letters}}:{part}" for part in ("list", "texts", "bytes")))


def _answer(client: redis.Redis, task_id: str) -> Any:
    kept: Any = eventually(lambda: client.get(f"celery-task-meta-{task_id}"))
    answer = json.loads(kept)
    assert answer["status"] == "SUCCESS"
    return answer["result"]


def _letter(task_id: str) -> DeadLetter:
    return eventually(lambda: next((one for one in runs.dead_letters() if one.task_id == task_id), None))  # type: ignore[return-value]


def _body(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("part", "change", "error"),
    [
        ("headers", {"eta": "tomorrow"}, "headers.eta is not a time such as"),
        ("headers", {"task": "shop.refund"}, "there is no task 'shop.refund' for ferrum's queues"),
        ("headers", {"task": "user.echo"}, "there is no task 'user.echo' for ferrum's queues"),
        ("headers", {"compression": "zlib"}, "compressed messages are not taken"),
        ("", {"body": _body('[[{"a":' + "[" * 3_000)}, "the body is nested more than 100 deep"),
        ("", {"body": _body(f"[[{'1' * 5_000}], {{}}, {{}}]")}, "the body has a number of more than 300 digits"),
        ("", {"body": _body(json.dumps([*RUN_BODY[:2], {"chain": [{"task": "user.echo"}]}]))}, "links other tasks"),
    ],
)
def test_who_sent_what_is_dropped_is_answered_and_it_is_kept(
    worker: Fleet, client: redis.Redis, part: str, change: dict[str, Any], error: str
) -> None:
    sent = a_run()
    (sent[part] if part else sent).update(change)
    task_id = sent["headers"]["id"]
    client.lpush(lane("ferrum", 3), text := json.dumps(sent))
    assert error in _answer(client, task_id)["error"]
    letter = _letter(task_id)
    assert (letter.queue, letter.task, letter.size, letter.whole) == (
        "ferrum",
        sent["headers"]["task"],
        len(text),
        True,
    )
    assert letter.reason == _answer(client, task_id)["error"]
    assert runs.dead_letter(letter.id) == (letter, text)
    eventually(lambda: not client.hlen(UNACKED))


def test_six_arguments_are_answered_with_a_sentence(worker: Fleet, client: redis.Redis) -> None:
    sent = message("ferrum.run", str(uuid.uuid4()), [[WORKFLOW, {"who": "x"}, None, None, None, "more"], {}, {}])
    client.lpush("ferrum", json.dumps(sent))
    assert _answer(client, sent["headers"]["id"])["error"].startswith("6 arguments are too many: ferrum.run takes")


def test_celerys_own_client_hears_what_is_wrong(worker: Fleet) -> None:
    from ferrum.celery import app

    sent = app.send_task("ferrum.run", args=[WORKFLOW], link=app.signature("user.echo"), queue="ferrum")
    assert "links other tasks" in sent.get(timeout=PATIENCE_S)["error"]


def test_neither_the_log_nor_an_event_shows_what_a_run_is_given(worker: Fleet, client: redis.Redis) -> None:
    from ferrum.celery import app

    secret = f"secret-{uuid.uuid4()}"
    with client.pubsub() as heard:
        heard.psubscribe("/ferrum-0.celeryev*")
        app.control.enable_events(reply=True, limit=1, timeout=PATIENCE_S)
        sent = app.send_task("ferrum.run", args=[WORKFLOW, {"who": secret}], queue="ferrum")
        client.lpush("ferrum", json.dumps({**a_run(), "body": _body(json.dumps([[secret], {"a": secret}]))}))
        assert ended(sent.get(timeout=PATIENCE_S)["run_id"]).status is RunStatus.COMPLETED
        events: list[str] = []

        def received() -> bool:
            if (told := heard.get_message(ignore_subscribe_messages=True, timeout=1)) is not None:
                events.append(base64.b64decode(json.loads(told["data"])["body"]).decode())
            return any("task-received" in event and sent.id in event for event in events)

        eventually(received)
        app.control.disable_events(reply=True, limit=1, timeout=PATIENCE_S)
    assert secret not in "".join(events)
    assert secret not in worker.log(0).read_text()


def test_an_id_that_would_steer_a_terminal_never_reaches_the_log(worker: Fleet, client: redis.Redis) -> None:
    sent = a_run()
    sent["headers"]["id"] = "\x1b]52;c;aGk=\x07\u202e" + (mark := uuid.uuid4().hex)
    client.lpush("ferrum", json.dumps(sent))
    letter: Any = eventually(
        lambda: next((one for one in runs.dead_letters() if mark in runs.dead_letter(one.id)[1]), 0)
    )
    assert letter.task_id is None
    # The log is written behind the letter.
    eventually(lambda: letter.id in worker.log(0).read_text())
    log = worker.log(0).read_text()
    assert not {"\x1b]", "\x07", "\u202e"} & set(log)


def test_an_answer_that_is_there_stays_whatever_becomes_of_a_later_message(
    worker: Fleet, no_letters: None, client: redis.Redis
) -> None:
    done = a_run()
    client.lpush("ferrum", json.dumps(done))
    answer = _answer(client, done["headers"]["id"])
    assert answer.keys() == {"run_id"}
    done["properties"]["delivery_info"]["deliveries"] = messages.MAX_DELIVERIES + 1
    client.lpush("ferrum", json.dumps(done))
    _letter(done["headers"]["id"])
    assert _answer(client, done["headers"]["id"]) == answer


def test_a_dropped_message_is_listed_shown_replayed_and_deleted(
    worker: Fleet, no_letters: None, client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str, status: int = 0) -> str:
        assert status_of(arguments) == status
        return capsys.readouterr().out

    assert said("dead-letters", "list") == ""
    worn = a_run()
    worn["properties"]["delivery_info"]["deliveries"] = messages.MAX_DELIVERIES + 1
    hopeless = a_run()
    hopeless["headers"] |= {"eta": "\x1b[2J", "id": "hopeless"}
    for one in (worn, hopeless):
        client.lpush("ferrum", json.dumps(one))
    kept, other = _letter(worn["headers"]["id"]), _letter("hopeless")
    rows = said("dead-letters", "list").splitlines()
    assert [row.split()[0] for row in rows] == [other.id, kept.id]
    assert "it was delivered 9 times and never answered" in rows[1]
    shown = said("dead-letters", "show", other.id)
    assert '"eta": "\\u001b[2J"' in shown
    assert "queue    ferrum" in shown
    assert json.loads(said("dead-letters", "show", kept.id, "--json"))["text"] == json.dumps(worn)
    client.delete(f"celery-task-meta-{kept.task_id}")
    assert said("dead-letters", "replay", kept.id) == f"{kept.id} is put back\n"
    assert _answer(client, str(kept.task_id)).keys() == {"run_id"}
    assert [one["id"] for one in json.loads(said("dead-letters", "list", "--json"))] == [other.id]
    assert json.loads(said("dead-letters", "delete", "--all", "--json")) == [{"id": other.id}]
    assert runs.dead_letters() == []
    said("dead-letters", "delete", other.id, status=2)
    said("dead-letters", "show", "nonsense", status=2)
    said("dead-letters", "replay", status=2)


def test_what_fails_although_it_was_checked_is_dropped_alone(no_letters: None, client: redis.Redis) -> None:
    from ferrum.celery import app

    sent = a_run()
    raw = json.dumps(sent).encode()
    with app.connection_for_read() as connection:
        channel, transport = connection.default_channel, connection.transport
        client.hset(UNACKED, "tag", "6:ferrum" + raw.decode())
        client.zadd(UNACKED_INDEX, {"tag": time.time()})

        def fail(*_: object) -> None:
            raise KeyError("no such thing")

        transport._deliver = fail
        transport.receive(channel, "ferrum", "tag", raw, len(raw))
        assert not client.hexists(UNACKED, "tag")
        assert client.zscore(UNACKED_INDEX, "tag") is None
        assert _answer(client, sent["headers"]["id"]) == {
            "error": "it could not be received: KeyError: 'no such thing'"
        }

        def lose(*_: object) -> None:
            raise redis.exceptions.ConnectionError

        transport._deliver = lose
        with pytest.raises(redis.exceptions.ConnectionError):
            transport.receive(channel, "ferrum", "tag", raw, len(raw))
    assert len(runs.dead_letters()) == 1


def test_letters_are_bounded_in_number_and_in_bytes_and_the_newest_stays(
    no_letters: None, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "MAX_LETTERS", 3)
    monkeypatch.setattr(dead_letters, "MAX_KEPT_BYTES", 100)
    ids = [bury(client, b"x" * size, "ferrum", Refused("why")) for size in (10, 10, 10, 10, 90, 200)]
    assert [one.id for one in runs.dead_letters()] == [ids[-1]]
    assert client.get("ferrum:{dead-letters}:bytes") == "200"
    more = [bury(client, b"x", "ferrum", Refused("why")) for _ in range(4)]
    assert [one.id for one in runs.dead_letters()] == more[:0:-1]
    runs.delete_dead_letter(more[-1])
    assert client.get("ferrum:{dead-letters}:bytes") == str(client.hlen("ferrum:{dead-letters}:texts")) == "2"


def test_letters_are_replayed_each_once_whatever_becomes_of_the_others(
    no_letters: None, client: redis.Redis, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = f"ferrum.{uuid.uuid4().hex}"
    ids = [bury(client, b"{}", here, Refused("why")) for _ in range(3)]
    assert status_of(("dead-letters", "replay", "9-9", ids[0], ids[0], ids[1], "--json")) == 2
    told = capsys.readouterr()
    assert json.loads(told.out) == [{"id": ids[0]}, {"id": ids[1]}]
    assert "there is no dead letter '9-9'" in told.err
    assert client.llen(here) == 2
    # Somebody else is at it, too.
    kept = runs.dead_letters()
    monkeypatch.setattr(runs, "dead_letters", lambda: [*kept, *kept])
    assert status_of(("dead-letters", "replay", "--all")) == 0
    assert capsys.readouterr().out == f"{ids[2]} is put back\n"
    assert client.llen(here) == 3


def test_a_letter_stays_where_its_queue_cannot_take_it(no_letters: None, client: redis.Redis) -> None:
    here = f"ferrum.{uuid.uuid4().hex}"
    letter = bury(client, b"{}", here, Refused("why"))
    client.set(here, "no list")
    with pytest.raises(Conflict, match="something else than a queue"):
        runs.replay_dead_letter(letter)
    assert [one.id for one in runs.dead_letters()] == [letter]


def test_what_is_too_long_or_no_text_is_kept_in_part_and_cannot_be_replayed(
    no_letters: None, client: redis.Redis
) -> None:
    for raw in (b"x" * (MAX_BYTES + 1), b"\xff\xfe"):
        letter = bury(client, raw, "ferrum", Refused("why"))
        assert len(runs.dead_letter(letter)[1]) <= 1_000
        with pytest.raises(Conflict, match="was not kept whole"):
            runs.replay_dead_letter(letter)
    with pytest.raises(NotFound, match="there is no dead letter '1-1'"):
        runs.dead_letter("1-1")

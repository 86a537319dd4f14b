"""Asking scripts: by name, again when an answer is lost, and not for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from sharing import connect, lose_an_answer, step

from ferrum.errors import Unavailable
from ferrum.limits import Concurrency, Entered, Limits
from ferrum.local.redis import PrivateRedis
from ferrum.scripts import Scripts, Who

SLOT = Concurrency("k", 1)


@pytest.fixture
def client(clean_redis: str) -> Iterator[redis.Redis]:
    with connect(clean_redis) as client:
        yield client


def test_a_redis_that_has_forgotten_a_script_is_told_again(client: redis.Redis) -> None:
    limits = Limits(Scripts(client))
    client.script_flush()
    assert limits.enter(step(1), SLOT, None, hold_s=60) == Entered()


def test_a_script_is_run_for_each_base_whether_redis_knows_it_or_not(client: redis.Redis) -> None:
    scripts = Scripts(client)
    client.script_flush()
    bases = [f"ferrum:{{t{number}}}" for number in range(3)]
    who = str(step(1))
    assert scripts.eval_each("limits/enter", bases, "", who, 1, 10**7, "k", 1, "", 0, 0) == [["in"]] * 3
    assert scripts.eval_each("limits/leave", bases, "", who, "k") == [[]] * 3


def test_what_was_done_and_not_answered_is_asked_again(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(Scripts(client))
    lose_an_answer(monkeypatch, client)
    assert limits.enter(step(1), SLOT, None, hold_s=60) == Entered()


def test_a_redis_that_is_gone_is_reported_in_the_end(tmp_path_factory: pytest.TempPathFactory) -> None:
    with PrivateRedis(tmp_path_factory.mktemp("gone")) as server:
        url = server.url
    with pytest.raises(Unavailable, match=r"Redis does not answer \(ConnectionError\)"):
        Limits(Scripts(connect(url), 0)).sweep()


def test_the_name_of_a_step_says_which_step_it_is() -> None:
    who = Who("run_1", "research.2.search")
    assert Who.of(str(who)) == who

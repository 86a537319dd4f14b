"""Secrets never stand in errors, events and logs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import PATIENCE_S, Fleet, ended

import ferrum
from ferrum.mcp.specs import load_servers
from ferrum.settings import Settings, redact
from ferrum.testing.environment import environment


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no: redis://:hunter2@host:6379/0, sorry", "no: redis://:***@host:6379/0, sorry"),
        ("postgresql+psycopg://ada:p%40ss%2Fw@db/x", "postgresql+psycopg://ada:***@db/x"),
        ("https://ada:a@b@host/ and amqp://g:h@i//", "https://ada:***@host/ and amqp://g:***@i//"),
        ("git clone https://ghp_0123456789abcdefghij@github.com/a/b", "git clone https://***@github.com/a/b"),
        ("GET https://api.example.org/v1?user=ada&api_key=sk-1&x=2", "GET https://api.example.org/v1?user=ada&api_key=***&x=2"),
        ("http://host/?X-Amz-Signature=abc", "http://host/?X-Amz-Signature=***"),
        ("https://g.example/v1beta/models?key=AIzaSyA0123456789", "https://g.example/v1beta/models?key=***"),
        ("https://a.blob.example/c/b?sv=2024&sig=Ab%2Fcd&se=1", "https://a.blob.example/c/b?sv=2024&sig=***&se=1"),
        ("{'Authorization': 'Bearer eyJhbGciOi.J9-x_y.z0123'}", "{'Authorization': 'Bearer ***'}"),
        ("authorization: basic YWRhOmh1bnRlcjI2Nw==", "authorization: basic ***"),
        # Nothing of this is a password.
        ("basic things: a bearer of news, ?keys=1&monkey=2", "basic things: a bearer of news, ?keys=1&monkey=2"),
        ("ssh://git@host/a:b@c and http://host:80/@me", "ssh://git@host/a:b@c and http://host:80/@me"),
        ('{"a": "http://h:80", "b": "m@x"}', '{"a": "http://h:80", "b": "m@x"}'),
    ],
)  # fmt: skip
def test_the_passwords_of_urls_are_blanked_wherever_they_stand(text: str, said: str) -> None:
    assert redact(text) == said


@pytest.mark.parametrize(
    "name", ["FERRUM_REDIS_URL", "REDIS_URL"]
)  # fmt: skip
@pytest.mark.parametrize("url", ["redis://:p%40ss/w0rd@host/0", "redis://host/0?password=p%40ss%2Fw0rd"])
def test_the_password_of_a_setting_is_blanked_as_it_is_written_and_decoded(name: str, url: str) -> None:
    with environment({"FERRUM_REDIS_URL": None, name: url}):
        assert redact("wrong: p@ss/w0rd, or p%40ss%2Fw0rd") == "wrong: ***, or ***"


def test_the_password_of_a_url_is_blanked_whatever_its_variable_is_called() -> None:
    with environment({"SHOP_DATABASE": "postgresql://ada:correct-horse@db/x"}):
        assert redact("password correct-horse refused") == "password *** refused"


@pytest.mark.parametrize("name", ["SMTP_PASS", "MYSQL_PWD", "SSH_PASSPHRASE", "NPM_AUTH", "PROXY_AUTHORIZATION"])
def test_a_variable_whose_name_says_so_in_short_is_secret(name: str) -> None:
    with environment({name: "correct-horse", "PWD": "/srv/a-directory"}):
        assert redact("correct-horse in /srv/a-directory") == "*** in /srv/a-directory"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host=db password=tiger7 user=u", "host=db password=*** user=u"),
        ("host=db password = 'a b' user=u", "host=db password = *** user=u"),
        ("AccountName=a;AccountKey=c2VjcmV0==;EndpointSuffix=x", "AccountName=a;AccountKey=***;EndpointSuffix=x"),
        ("no entry: api_key=abcd1234, top=3", "no entry: api_key=***, top=3"),
        ("https://h/#access_token=abc", "https://h/#access_token=***"),
        ("{'X-Api-Key': 'abcd1234', 'Accept': 'text/plain'}", "{'X-Api-Key': '***', 'Accept': 'text/plain'}"),
        ("Authorization: token abcd1234", "Authorization: token ***"),
        ("Authorization: Bearer abcd1234", "Authorization: Bearer ***"),
        ("""{"password": "it's \\"it", "user": "u"}""", '{"password": "***", "user": "u"}'),
        ("Incorrect API key provided: sk-proj-abcdefghijklmnop1234", "Incorrect API key provided: ***"),
        # Nothing of this is one.
        ("authorization: denied, tokens=150, total_tokens=5", "authorization: denied, tokens=150, total_tokens=5"),
        ("input.password == 'x', password: must be text", "input.password == 'x', password: must be text"),
        ('{"password": {"type": "string"}}', '{"password": {"type": "string"}}'),
        ("risk-averse-decision-making-takes-time-and-patience", "risk-averse-decision-making-takes-time-and-patience"),
    ],
)
def test_what_is_given_to_a_name_that_says_so_is_blanked(text: str, said: str) -> None:
    assert redact(text) == said


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HTTPS_PROXY", "ada:correct-horse@proxy:3128", "correct-horse"),
        ("all_proxy", "ada:correct%2Fhorse@proxy:3128", "correct/horse"),
        ("SHOP_DB", "host=db user=u password='correct horse'", "correct horse"),
        ("SHOP_DB", "AccountName=a;AccountKey=Y29ycmVjdGhvcnNl==;EndpointSuffix=x", "Y29ycmVjdGhvcnNl=="),
        ("AZURE_STORAGE_CONNECTION_STRING", "correct-horse", "correct-horse"),
        ("SESSION_COOKIE", "correct-horse", "correct-horse"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=b,authorization=Basic%20Y29ycmVjdA==", "Y29ycmVjdA=="),
        ("SENTRY_DSN", "https://0123456789abcdef0123456789abcdef@sentry/1", "0123456789abcdef0123456789abcdef"),
    ],
)  # fmt: skip
def test_a_secret_that_a_variable_holds_among_other_things_is_blanked(name: str, value: str, secret: str) -> None:
    with environment({name: value}):
        assert redact(f"refused: {secret}!") == "refused: ***!"


def test_blanking_takes_time_in_step_with_the_text() -> None:
    def seconds(size: int, pattern: str) -> float:
        began = time.process_time()
        redact(pattern * (size // len(pattern)))
        return time.process_time() - began

    for pattern in (
        "://", "://a:", "://a:b", "?token", "a", ":@", "?", "Bearer ", "bearer a", "?key", "password='", "password=",
        'password":"', "sk-", "sk-a", "Authorization: token ",
    ):  # fmt: skip
        once = max(seconds(250_000, pattern) for _ in range(2))
        assert seconds(1_000_000, pattern) < 16 * max(once, 0.01), pattern


def test_what_a_servers_file_gives_its_servers_is_secret_unless_it_looks_open() -> None:
    servers = {
        "shop": {
            "command": "x",
            "args": [
                "--token=abcd1234", "--api-key", "efgh5678", "--verbose", "http://u:ijkl9012@h/", "--header",
                "Authorization: Bearer mnop3456", "plain-words-of-an-argument",
            ],
            "env": {
                "SHOP_TOKEN": "tok5", "MAGIC": "open-sesame", "DIR": "/srv/data/shop", "DSN": "mysql://u:qrst7890@h/x",
                "SHORT": "debug", "PATH": "/usr/local/bin",
            },
        }
    }  # fmt: skip
    (spec,) = load_servers(Settings(mcp_servers=json.dumps(servers)), {}).values()
    assert set(spec.secrets) == {
        "abcd1234", "efgh5678", "ijkl9012", "mnop3456", "tok5", "open-sesame", "qrst7890",
    }  # fmt: skip


#: Says what it was given, at once and for ever.
_SERVER = """
import os, sys
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("shop")


@server.tool()
def buy() -> str:
    raise ToolError("401 for " + os.environ["MAGIC"] + " at http://ada:" + os.environ["SHOP_TOKEN"] + "@shop/")


@server.tool()
def leave() -> str:
    print("x" * 295 + os.environ["MAGIC"], file=sys.stderr, flush=True)
    os._exit(3)


server.run()
"""
_LITERAL = {"MAGIC": "hush-sesame-hush", "SHOP_TOKEN": "sk/live"}


@pytest.fixture
def shop(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    (tmp_path / "shop.py").write_text(_SERVER)
    servers = {"shop": {"module": "shop", "env": _LITERAL}}
    fleet = Fleet(redis_url, tmp_path, {"FERRUM_MCP_SERVERS": json.dumps(servers)})
    fleet.start("-l", "debug")
    yield fleet
    fleet.stop()


def test_literal_secrets_of_a_servers_file_stand_in_no_error_no_event_and_no_log(shop: Fleet, redis_url: str) -> None:
    def call(tool: str) -> dict[str, object]:
        return {"type": "tool", "tool": f"shop.{tool}", "retry": {"max_attempts": 1}, "on_error": "continue"}

    run_id = ferrum.submit({"name": "x", "steps": {"buy": call("buy"), "leave": {**call("leave"), "needs": ["buy"]}}})
    view = ended(run_id)
    errors = [step.error or "" for step in view.steps]
    assert "401 for *** at http://ada:***@shop/" in errors[0]
    assert "went away" in errors[1]
    told = [*errors, *map(repr, ferrum.runs.record().events(run_id)), shop.log(0).read_text()]
    for text in told:
        # No part of one is left either.
        assert not [part for part in ("hush-", "sk/live", "sesame") if part in text]


def test_the_input_of_a_run_that_came_as_a_message_stands_in_no_log(shop: Fleet) -> None:
    from ferrum.celery import app

    workflow = {"name": "x", "inputs": {"pin": {"type": "string"}}, "steps": {"a": {"type": "wait", "for": "1ms"}}}
    answer = app.send_task("ferrum.run", (workflow, {"pin": "my-own-pin-4711"}), queue="ferrum")
    ended(answer.get(timeout=PATIENCE_S)["run_id"])
    assert b"my-own-pin-4711" not in shop.log(0).read_bytes()

"""What the environment may say, and what is said of what it may not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fleet import PATIENCE_S, Fleet

from ferrum.errors import SettingsError
from ferrum.settings import read, settings, unknown
from ferrum.testing.environment import environment


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FERRUM_LEASE", "soon", "FERRUM_LEASE: Input should be a valid number"),
        ("FERRUM_LEASE", "inf", "FERRUM_LEASE: Input should be a finite number"),
        ("FERRUM_LEASE", "1", "FERRUM_LEASE must be at least three times FERRUM_HEARTBEAT"),
        ("FERRUM_KEEP_RUNS", "nan", "FERRUM_KEEP_RUNS: Input should be"),
        ("FERRUM_EXIT_WHEN_IDLE", "-1", "FERRUM_EXIT_WHEN_IDLE: Input should be greater than 0"),
        ("FERRUM_MISSED", "never", "FERRUM_MISSED: Input should be 'skip', 'once' or 'all'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(variable: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        read({variable: value})


@pytest.mark.parametrize("variable", ["FERRUM_REDIS_URL", "REDIS_URL"])
@pytest.mark.parametrize("url", ["banana", "http://:hunter22@host", "redis://:hunter22@host:port/0", "redis://[::1"])
def test_a_url_that_is_none_of_redis_is_refused_without_being_shown(variable: str, url: str) -> None:
    with pytest.raises(SettingsError, match=r"FERRUM_REDIS_URL \(or REDIS_URL\) is no URL of a Redis") as raised:
        read({variable: url})
    assert "hunter22" not in str(raised.value)


@pytest.mark.parametrize("variable", ["FERRUM_REDIS_URL", "REDIS_URL"])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://:hunter22@h/0?nonsense=1", r"there is no option 'nonsense' \(there is: db, password, username\)"),
        ("redis://h/0?passwort=hunter22", r"there is no option 'passwort' \(did you mean 'password'\?\)"),
        ("redis://:hunter22@h/0?db=x", "'db' is the number of a database, as 0, and not 'x'"),
        ("redis://:hunter22@h/0?db=-1", "'db' is the number of a database, as 0, and not '-1'"),
        ("redis://:hunter22@h/0?db=", "'db' is the number of a database, as 0, and not ''"),
        ("redis://:hunter22@h/x", "the path is the number of a database, as /0, and not '/x'"),
        ("redis://:hunter22@h/0/1", "the path is the number of a database, as /0, and not '/0/1'"),
        (
            "redis://h/0?password=hunter22&socket_timeout=abc",
            "'socket_timeout' is not for a URL: ferrum sets it itself",
        ),
        ("redis://h/0?password=hunter22&socket_timeout=5", "'socket_timeout' is not for a URL: ferrum sets it itself"),
        ("redis://:hunter22@h/0?ssl_cert_reqs=none", "'ssl_cert_reqs' is for rediss://, which speaks TLS"),
        (
            "rediss://:hunter22@h/0?ssl_cert_reqs=bad",
            "'ssl_cert_reqs' is 'required', 'optional' or 'none', and not 'bad'",
        ),
        ("rediss://:hunter22@h/0?ssl_check_hostname=x", "'ssl_check_hostname' is 'true' or 'false', and not 'x'"),
        ("rediss://:hunter22@h/0?ssl_ca_certs=/no/such/ca.pem", "'ssl_ca_certs': there is no '/no/such/ca.pem'"),
    ],
)
def test_an_option_of_a_url_that_redis_or_celery_would_choke_on_is_told(variable: str, url: str, said: str) -> None:
    with pytest.raises(SettingsError, match=rf"^FERRUM_REDIS_URL \(or REDIS_URL\): {said}") as raised:
        read({variable: url})
    assert "hunter22" not in str(raised.value)


@pytest.mark.parametrize("url", ["redis://:1?hunter22=4@host/0", "redis://host?/hunter22@"])
def test_a_password_with_a_question_mark_is_not_taken_for_options(url: str) -> None:
    with pytest.raises(SettingsError, match=r"FERRUM_REDIS_URL \(or REDIS_URL\) is no URL of a Redis") as raised:
        read({"FERRUM_REDIS_URL": url})
    assert "hunter22" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:pass@host:6379/0", "rediss://host", "unix://:pass@/run/redis.sock?db=1", "redis://host/?db=3",
        "redis://host?username=me&password=pass", "rediss://host?ssl_cert_reqs=none&ssl_check_hostname=false",
    ],
)  # fmt: skip
def test_the_urls_of_redis_are_taken(url: str) -> None:
    settings = read({"FERRUM_REDIS_URL": url})
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == url


def test_an_unknown_variable_is_a_warning_with_the_nearest_name_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), environment({"FERRUM_LEASES": "8"}):
        assert settings().lease == 8.0
        settings()
    said = [record.getMessage() for record in caplog.records if "FERRUM_LEASES" in record.getMessage()]
    assert said == ["FERRUM_LEASES is not a setting of ferrum (did you mean 'FERRUM_LEASE'?)"]


def test_an_unknown_variable_is_an_error_where_ferrum_is_strict() -> None:
    assert read({"FERRUM_LEASES": "8", "FERRUM_STRICT": "false"}).strict is False
    with pytest.raises(SettingsError, match=r"^FERRUM_LEASES is not a setting of ferrum \(did you mean 'FERRUM_LEASE'"):
        read({"FERRUM_LEASES": "8", "FERRUM_STRICT": "1"})


#: As Kubernetes tells a pod of the Services `ferrum`, `ferrum-redis` and `ferrum-home`.
_SERVICES = {
    "FERRUM_SERVICE_HOST": "10.0.0.1",
    "FERRUM_SERVICE_PORT": "8080",
    "FERRUM_PORT": "tcp://10.0.0.1:8080",
    "FERRUM_REDIS_SERVICE_HOST": "10.0.0.2",
    "FERRUM_REDIS_SERVICE_PORT": "6379",
    "FERRUM_REDIS_SERVICE_PORT_TCP_REDIS": "6379",
    "FERRUM_REDIS_PORT": "tcp://10.0.0.2:6379",
    "FERRUM_REDIS_PORT_6379_TCP": "tcp://10.0.0.2:6379",
    "FERRUM_REDIS_PORT_6379_TCP_PROTO": "tcp",
    "FERRUM_REDIS_PORT_6379_TCP_PORT": "6379",
    "FERRUM_REDIS_PORT_6379_TCP_ADDR": "10.0.0.2",
    "FERRUM_HOME_PORT": "udp://[fd00::1]:53",
}


def test_what_kubernetes_tells_of_services_is_no_setting_and_no_mistake() -> None:
    assert unknown(_SERVICES) == []
    assert read({**_SERVICES, "FERRUM_STRICT": "1", "FERRUM_LEASE": "9"}).lease == 9


def test_a_port_that_a_person_wrote_is_not_taken_for_a_service() -> None:
    (said,) = unknown({"FERRUM_REDIS_PORT": "6379"})
    assert said.startswith("FERRUM_REDIS_PORT is not a setting of ferrum")


def test_ferrums_own_tool_chain_is_no_mistake() -> None:
    assert unknown({"FERRUM_REQUIRE_SANDBOX": "1", "FERRUM_TEST_SIZE": "10"}) == []


@pytest.mark.parametrize("command", [["worker"], ["beat"], ["inspect", "ping"]])
def test_celery_says_what_is_wrong_with_a_url_in_one_sentence(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "ferrum", *command],
        env={"PATH": os.environ["PATH"], "FERRUM_REDIS_URL": "redis://:hunter22@127.0.0.1:1/0?nonsense=1"},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "FERRUM_REDIS_URL (or REDIS_URL): there is no option 'nonsense'" in said
    assert "Traceback" not in said
    assert "hunter22" not in said


def test_a_worker_says_what_is_wrong_with_its_servers_in_one_sentence(redis_url: str, tmp_path: Path) -> None:
    fleet = Fleet(redis_url, tmp_path, {"FERRUM_MCP_SERVERS": '{"mcpServers": {"a": {"command": 7}}}'})
    assert fleet.launch().wait(PATIENCE_S) == 1
    said = fleet.log(0).read_text()
    assert "this worker cannot start: FERRUM_MCP_SERVERS:1" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("variable", ["FERRUM_HOME", "FERRUM_POLICY", "FERRUM_SERVERS"])
def test_the_home_of_nobody_is_told_in_a_sentence(variable: str) -> None:
    with pytest.raises(SettingsError, match=f"^{variable}: '~nobody-here/x' begins with the home of nobody here$"):
        read({variable: "~nobody-here/x"})

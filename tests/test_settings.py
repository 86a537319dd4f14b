"""What the environment may say, and what is said of what it may not."""

from __future__ import annotations

import logging

import pytest

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


@pytest.mark.parametrize("url", ["redis://:pass@host:6379/0", "rediss://host", "unix://:pass@/run/redis.sock?db=1"])
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

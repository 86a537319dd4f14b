"""What the environment may say, and what is said of what it may not."""

from __future__ import annotations

import pytest

from ferrum.errors import SettingsError
from ferrum.settings import read


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FERRUM_LEASES", "8", r"FERRUM_LEASES is not a setting of ferrum \(did you mean 'FERRUM_LEASE'\?\)"),
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

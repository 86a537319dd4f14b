"""Redis behind Sentinel: whoever connects asks first which server is the master.

    sentinel://user:password@host:26379,host:26379/master/db?sentinel_password=…

User and password are those of Redis; `sentinel_username` and `sentinel_password` those of the sentinels, where they ask
for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    import redis
    from redis.sentinel import SentinelConnectionPool

#: Where sentinels listen unless a URL says otherwise.
PORT: Final = 26379
_OPTIONS: Final = frozenset(("sentinel_username", "sentinel_password"))
#: Of the connections to a Redis, what those to sentinels have as well.
_SHARED: Final = ("socket_timeout", "socket_connect_timeout", "socket_keepalive")


@dataclass(frozen=True)
class Watched:
    """A Redis whose sentinels know which of its servers is the master."""

    sentinels: tuple[tuple[str, int], ...]
    master: str
    db: int
    username: str | None
    password: str | None = field(repr=False)
    sentinel_username: str | None
    sentinel_password: str | None = field(repr=False)


def watched(url: str) -> Watched | None:
    """The Redis that this URL names, where it names sentinels; `None` for other schemes. Raises `ValueError`."""
    scheme, _, rest = url.partition("://")
    if scheme.lower() != "sentinel":
        return None
    # By hand: for `urlsplit` several hosts with an IPv6 address among them are none, in newer versions of Python.
    place, _, query = rest.partition("?")
    netloc, _, path = place.partition("/")
    given, at, hosts = netloc.rpartition("@")
    username, _, password = given.partition(":")
    options = {name: values[-1] for name, values in parse_qs(query, strict_parsing=bool(query)).items()}
    if options.keys() - _OPTIONS:
        raise ValueError(f"unknown: {', '.join(options.keys() - _OPTIONS)}")
    master, _, db = path.partition("/")
    if not master:
        raise ValueError("without the name of a master")
    return Watched(
        tuple(_address(host) for host in hosts.split(",")),
        unquote(master),
        int(db or 0),
        unquote(username) or None if at else None,
        unquote(password) or None,
        options.get("sentinel_username"),
        options.get("sentinel_password"),
    )


def _address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("without a host")
    return parts.hostname, parts.port or PORT


def pool_of(url: str, **options: Any) -> redis.ConnectionPool:
    """A pool of connections to the Redis of this URL, or to the one that its sentinels say is the master.

    `options` are those of redis-py's connections.
    """
    import redis

    found = watched(url)
    return redis.ConnectionPool.from_url(url, **options) if found is None else master_pool(found, **options)


def master_pool(found: Watched, **options: Any) -> SentinelConnectionPool:
    """A pool of connections to whichever server is the master when they are made."""
    # Settings are read with this module, also where no Redis is asked.
    from redis.backoff import NoBackoff
    from redis.retry import Retry
    from redis.sentinel import Sentinel, SentinelConnectionPool

    shared = {name: options[name] for name in _SHARED if options.get(name) is not None}
    manager = Sentinel(  # type: ignore[no-untyped-call]
        found.sentinels,
        sentinel_kwargs={
            **shared, "username": found.sentinel_username, "password": found.sentinel_password,
            "retry": Retry(NoBackoff(), 0), "decode_responses": True,
        },
    )  # fmt: skip
    here = {"db": found.db, "username": found.username, "password": found.password}
    return SentinelConnectionPool(found.master, manager, **{**options, **here})  # type: ignore[no-untyped-call]

"""How ferrum's messages are kept in Redis: Celery's broker and result backend, with keys of our own.

kombu's Redis transport is what other apps use, in the same process and on the same database. These are subclasses of
it that only ferrum's app has: nothing of kombu is changed, and no other app's messages are touched.
"""

from __future__ import annotations

import base64
import logging
from functools import partial
from queue import Empty
from typing import Any, Final

import redis
from celery.app.amqp import AMQP
from celery.backends.redis import RedisBackend, SentinelBackend
from kombu.connection import Connection
from kombu.transport import redis as kombu_redis
from kombu.utils.collections import HashedSeq
from kombu.utils.json import loads
from redis.backoff import NoBackoff
from redis.retry import Retry

from ferrum.refusals import hurried, patient

log = logging.getLogger(__name__)

#: Messages that a worker has taken and not yet acknowledged, by delivery tag.
UNACKED: Final = "ferrum:unacked"
#: The same tags by the time since when nobody has renewed them, a sorted set.
UNACKED_INDEX: Final = "ferrum:unacked:index"

_PROBE: Final = "ferrum:probe"
_PROBE_LIFE_MS: Final = 10_000
_RECONNECT_EVERY_S: Final = 1.0

_BINDING: Final = "ferrum:binding:%s"
_FANOUT: Final = "/ferrum-{db}."


class _Keys:
    """What stands in Redis beside the queues, under names that are not those of other Celery apps."""

    unacked_key = UNACKED
    unacked_index_key = UNACKED_INDEX
    unacked_mutex_key = "ferrum:unacked:mutex"
    keyprefix_queue = _BINDING
    keyprefix_binding_deadlines = "ferrum:binding-deadlines"
    keyprefix_binding_permanent = "ferrum:binding-permanent:%s"
    keyprefix_fanout = _FANOUT


class Channel(_Keys, kombu_redis.Channel):  # type: ignore[misc] # kombu is untyped
    """kombu's channel, mended."""

    _kept_client: Any = None

    def _connparams(self, asynchronous: bool = False) -> Any:
        # Kombu 5.7.0 dies with an AttributeError instead of reconnecting when Redis goes away while late acks are due:
        # a channel whose connection was collapsed has no client any more.
        if self.connection is None or self.connection.client is None:
            raise redis.exceptions.ConnectionError("the broker connection was closed")
        return patiently(super()._connparams(asynchronous))

    def _create_client(self, asynchronous: bool = False) -> Any:
        # kombu makes a Redis client, with its table of 200 callbacks, for every message that it sends or acknowledges;
        # it was an eighth of a worker's time. A client over a pool is safe to share between threads.
        if asynchronous:
            return super()._create_client(asynchronous)
        if self._kept_client is None or self._kept_client.connection_pool is not self.pool:
            self._kept_client = super()._create_client()
        return self._kept_client

    def _brpop_read(self, **options: Any) -> bool:
        try:
            try:
                found = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            if not found:
                raise Empty
            queue = found[0].decode().rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            self.connection._deliver(_message(found[1]), queue)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()


class SentinelChannel(Channel, kombu_redis.SentinelChannel):  # type: ignore[misc]
    """The same behind Redis Sentinel."""


class _Sifting:
    """Anybody may push to a queue, and kombu takes what is no message for a bug of its own: it ended the worker."""

    def _deliver(self, message: Any, queue: str) -> None:
        if wrong := no_message(message):
            log.error("what is no message was dropped from the queue %s: %s (see docs/enqueue.md)", queue, wrong)
        else:
            super()._deliver(message, queue)  # type: ignore[misc]


class _Probing:
    """A broker is there when it takes what is written: a replica, or one that is full, answers and does not."""

    def establish_connection(self) -> Any:
        established = super().establish_connection()  # type: ignore[misc]
        channel = self._avail_channels[-1]  # type: ignore[attr-defined]
        try:
            with channel.conn_or_acquire() as client:
                client.set(_PROBE, "", px=_PROBE_LIFE_MS)
        except Exception:
            self._avail_channels.remove(channel)  # type: ignore[attr-defined]
            channel.close()
            raise
        return established


class Transport(_Sifting, _Probing, kombu_redis.Transport):  # type: ignore[misc]
    Channel = Channel


class SentinelTransport(_Sifting, _Probing, kombu_redis.SentinelTransport):  # type: ignore[misc]
    Channel = SentinelChannel


_TRANSPORTS = {"redis": Transport, "rediss": Transport, "sentinel": SentinelTransport}


class OwnConnection(Connection):  # type: ignore[misc]
    """A connection that goes through our transport, whatever its URL; kombu finds its own by the scheme."""

    def get_transport_cls(self) -> Any:
        return _TRANSPORTS.get(self.transport_cls) or super().get_transport_cls()

    def _ensure_connection(self, *args: Any, interval_max: float = _RECONNECT_EVERY_S, **more: Any) -> Any:
        # kombu waits longer and longer, up to 30 s; a broker that is back would stay alone for so long.
        every_s = min(interval_max, _RECONNECT_EVERY_S)
        more["interval_start"] = min(more.get("interval_start", every_s), every_s)
        return super()._ensure_connection(*args, interval_max=every_s, **more)

    def __eqhash__(self) -> Any:
        # kombu has one pool of connections for all apps of a process, by this: another app on the same Redis would be
        # given ours.
        return HashedSeq("ferrum", *super().__eqhash__())


class Broker(AMQP):  # type: ignore[misc]
    """Celery's broker: `Celery(…, amqp=Broker)`."""

    Connection = OwnConnection
    BrokerConnection = OwnConnection


class _Results:
    #: Counters of chords. What a task returned stays at `celery-task-meta-<id>`, where whoever sent `ferrum.run` looks.
    group_keyprefix = "ferrum-taskset-meta-"
    chord_keyprefix = "ferrum-chord-unlock-"


class Results(_Results, RedisBackend):  # type: ignore[misc]
    """Celery's results, with keys of our own but for the answers to `ferrum.run`, and patience."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.connparams: dict[str, Any] = patiently(self.connparams)

    def ensure(self, fun: Any, args: Any, **policy: Any) -> Any:
        more = {"max_retries": 2} if hurried() else {}
        return super().ensure(fun, args, **policy, **more)

    def on_chord_part_return(self, *args: Any, **options: Any) -> Any:
        # Celery asks once. A part that is counted again is counted once.
        return self.ensure(partial(super().on_chord_part_return, *args, **options), ())


class SentinelResults(_Results, SentinelBackend):  # type: ignore[misc]
    """The same behind Redis Sentinel."""


#: For `app.loader.override_backends`.
BACKENDS: Final = {
    "redis": "ferrum.broker:Results",
    "rediss": "ferrum.broker:Results",
    "sentinel": "ferrum.broker:SentinelResults",
}


def patiently(connparams: dict[str, Any]) -> dict[str, Any]:
    """These parameters of a pool of redis-py's, for connections that raise `Refused` and try each call once.

    All that uses them tries again by itself, and not on the worker's one thread that hears of messages.
    """
    kind = connparams.get("connection_class", redis.Connection)
    return {**connparams, "connection_class": patient(kind), "retry": Retry(NoBackoff(), 0)}


def _message(text: bytes) -> Any:
    try:
        return loads(text)
    except ValueError:
        return None


def no_message(message: Any) -> str | None:
    """What kombu needs of a message and does not find in this one."""
    if not isinstance(message, dict):
        return "it is not a JSON object"
    if not isinstance(message.get("headers"), dict) or not isinstance(message.get("body"), str):
        return "its headers are no object, or its body is no text"
    properties = message.get("properties")
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_tag"), str):
        return "it has no properties.delivery_tag"
    info = properties.get("delivery_info")
    if not isinstance(info, dict) or not {"exchange", "routing_key"} <= info.keys():
        return "it has no properties.delivery_info with exchange and routing_key"
    if not _decodes(message["body"], properties.get("body_encoding")):
        return "its body is not encoded as properties.body_encoding says, which is base64 or not there"
    return None


def _decodes(body: str, encoding: object) -> bool:
    try:
        return encoding is None or (encoding == "base64" and base64.b64decode(body) is not None)
    except ValueError:
        return False

"""Ferrum's messages in Redis: Celery's broker and result backend, with keys of our own.

kombu's Redis transport is what other apps use, in the same process and on the same database. These are subclasses of
it that only ferrum's app has: nothing of kombu is changed, and no other app's messages are touched.

A message is at any instant in a queue's list or among the unacknowledged ones. kombu takes it off its list with BRPOP
and notes it afterwards: in between it is in one process only, and lost with it. Here a worker asks with a script that
takes a message and notes it as one, under a tag that the worker has chosen. Where there is none, the script has looked
at each list, so Redis tells the worker's connection when somebody has written to one (`CLIENT TRACKING`), and it asks
again. Whoever pushes, in whatever language, needs nothing but LPUSH.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import random
import select
import time
import uuid
from collections.abc import Callable, Iterable
from functools import cache, partial
from queue import Empty
from typing import Any, Final

import redis
from celery.app.amqp import AMQP
from celery.backends.redis import RedisBackend, SentinelBackend
from kombu.connection import Connection, ConnectionPool, PooledConnection
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.collections import HashedSeq
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import SentinelManagedConnection

from ferrum import messages
from ferrum.dead_letters import SAMPLE, bury
from ferrum.refusals import hurried, misplaced, patient
from ferrum.scripts import CONNECT_TIMEOUT_S, timeout_of
from ferrum.sentinels import Watched, master_pool, watched
from ferrum.settings import settings
from ferrum.steps import step_types

log = logging.getLogger(__name__)

#: Messages that a worker has taken and not yet acknowledged, by delivery tag: the list that it was taken from, as
#: `<length>:<name>`, and the text.
UNACKED: Final = "ferrum:unacked"
#: The same tags by the second, of Redis's clock, in which they were taken or renewed: a sorted set.
UNACKED_INDEX: Final = "ferrum:unacked:index"

_PROBE: Final = "ferrum:probe"
_PROBE_LIFE_MS: Final = 10_000
_RECONNECT_EVERY_S: Final = 1.0


#: Takes the first message of the first list that has one, and notes it. KEYS: unacked, index, lists in their order.
#: ARGV: a digit for each queue, 0 where messages are not acknowledged, or nothing where all are; the tag; the most
#: bytes of a message; of what is longer, so many are handed out.
#: Returns the list, the text, its bytes, and a key that is not of its kind, where there is one: '' for what there is
#: not. Nothing is taken where it could not be noted: a script that fails has done what it did before.
_TAKE: Final = """
local kinds = {'hash', 'zset'}
for at = 1, 2 do
  local kind = redis.call('TYPE', KEYS[at]).ok
  if kind ~= kinds[at] and kind ~= 'none' then
    redis.call('EXISTS', unpack(KEYS))
    return {'', '', 0, KEYS[at]}
  end
end
local function pop(lists)
  if #lists == 0 then return false end
  local command = {#lists, unpack(lists)}
  command[#lists + 2] = 'RIGHT'
  return redis.pcall('LMPOP', unpack(command))
end
local lists, wrong = {unpack(KEYS, 3)}, ''
local found = pop(lists)
if found and found.err then
  if found.err:sub(1, 9) ~= 'WRONGTYPE' then return found end
  lists = {}
  for at = 3, #KEYS do
    local kind = redis.call('TYPE', KEYS[at]).ok
    if kind == 'list' or kind == 'none' then lists[#lists + 1] = KEYS[at] else wrong = KEYS[at] end
  end
  found = pop(lists)
end
if not found then
  -- Read, not only popped from: of a list that it has read, the connection hears when it is written to.
  redis.call('EXISTS', unpack(KEYS, 3))
  return wrong ~= '' and {'', '', 0, wrong}
end
local list, text, kept = found[1], found[2][1], true
local bytes = #text
if bytes > tonumber(ARGV[3]) then
  -- Each further copy of hundreds of megabytes would hold up Redis for seconds, and a small worker dies of one. The
  -- last byte is none of UTF-8: what is left cannot be taken for a message.
  text, found = text:sub(1, ARGV[4]) .. '\\255', nil
  collectgarbage()
end
if ARGV[1] ~= '' then
  for at = 3, #KEYS do
    if KEYS[at] == list then
      local queue = (at - 3) % #ARGV[1] + 1
      kept = ARGV[1]:sub(queue, queue) ~= '0'
    end
  end
end
if kept then
  redis.call('HSET', KEYS[1], ARGV[2], #list .. ':' .. list .. text)
  redis.call('ZADD', KEYS[2], redis.call('TIME')[1], ARGV[2])
end
return {list, text, bytes, wrong}
"""

#: Of the scripts below: what stands in place of a key and is not of its kind holds no message, and is left alone.
_OF_KIND: Final = """
local function is(key, kind) return redis.call('TYPE', key).ok == kind end
"""

#: Puts a message back. KEYS: unacked, index, list. ARGV: tag, text, RPUSH for the front of the list and LPUSH for its
#: end, and for how many seconds nobody may have renewed it, or nothing.
_PUT_BACK: Final = (
    _OF_KIND
    + """
if not is(KEYS[1], 'hash') or not is(KEYS[2], 'zset') then return 0 end
if ARGV[4] ~= '' then
  local since = redis.call('ZSCORE', KEYS[2], ARGV[1])
  if since and tonumber(since) > redis.call('TIME')[1] - ARGV[4] then return 0 end
end
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call(ARGV[3], KEYS[3], ARGV[2])
return 1
"""
)

#: Forgets messages. KEYS: unacked, index. ARGV: tag.
_FORGET: Final = (
    _OF_KIND
    + """
if is(KEYS[2], 'zset') then redis.call('ZREM', KEYS[2], ARGV[1]) end
return is(KEYS[1], 'hash') and redis.call('HDEL', KEYS[1], ARGV[1]) or 0
"""
)

#: The list and the text of a message. KEYS: unacked. ARGV: tag.
_NOTED: Final = (
    _OF_KIND
    + """
return is(KEYS[1], 'hash') and redis.call('HGET', KEYS[1], ARGV[1])
"""
)

#: Tags that nobody has renewed for so long. KEYS: index. ARGV: seconds, how many at most.
_DUE: Final = (
    _OF_KIND
    + """
if not is(KEYS[1], 'zset') then return {} end
local before = redis.call('TIME')[1] - ARGV[1]
return redis.call('ZRANGE', KEYS[1], '-inf', before, 'BYSCORE', 'LIMIT', 0, ARGV[2])
"""
)

#: Keeps messages from being given to another. KEYS: index. ARGV: tags.
RENEW: Final = (
    _OF_KIND
    + """
if not is(KEYS[1], 'zset') then return end
local now = redis.call('TIME')[1]
for _, tag in ipairs(ARGV) do redis.call('ZADD', KEYS[1], 'XX', now, tag) end
"""
)

_TAKE_SHA: Final = hashlib.sha1(_TAKE.encode(), usedforsecurity=False).hexdigest()

#: What workers of another Celery app, or of ferrum before it had keys of its own, keep beside their queues.
_OTHERS: Final = ("unacked", "unacked_index", "_kombu.binding.celery.pidbox")

#: Messages that one look at what is due puts back; the rest is for the next.
_RESTORED_AT_ONCE: Final = 200

#: How often is asked where Redis does not tell of new messages.
_POLL_S: Final = 0.05
#: The longest that a worker waits before it asks when it was woken and others were quicker, again and again: else each
#: message would set a whole idle fleet asking.
_PAUSE_S: Final = 0.05

#: How often a key is named that stands where a list belongs.
_SAY_EVERY_S: Final = 30.0

#: How long the rest of a broadcast that has begun to come may take; it holds up the loop.
_REST_S: Final = 1.0

#: What reading a connection gives for "one of your lists was written to".
_WRITTEN: Final = object()

#: What ends in a new connection. kombu counts KeyError among these, which may as well come of a message.
_LOST: Final = (OSError, redis.exceptions.RedisError)

#: Tags of questions whose answer was lost with its connection, by when. What was taken with one is put back at once.
_unanswered: dict[str, float] = {}


def renew(client: redis.Redis, tags: Iterable[str], index: str = UNACKED_INDEX) -> None:
    """Keep these messages from being given to another worker, from now on for the visibility timeout."""
    if tags := list(tags):
        client.eval(RENEW, 1, index, *tags)


def warn_of_others(channel: Channel) -> None:
    """Say it in the log where workers of another Celery app use this database."""
    with channel.conn_or_acquire() as client:
        found = [key for key in _OTHERS if client.exists(key)]
    if found:
        log.warning(
            "another Celery app uses this Redis database (%s): neither touches the messages of the other, but what "
            "fills or empties the database does; give each one of its own", ", ".join(found),
        )  # fmt: skip


class _InTurn:
    """The queues that a channel asks for, with those first that were longest not served.

    kombu's `priority` serves a queue for as long as it has something, and others of the same lane never. Its
    `round_robin` comes by as many orders as there are; here there is one for each queue, so that a question is packed
    once.
    """

    def __init__(self) -> None:
        self._queues: list[str] = []
        self._first = 0

    def update(self, queues: Iterable[str]) -> None:
        self._queues, self._first = sorted(queues), 0

    def consume(self, n: int) -> list[str]:
        return (self._queues[self._first :] + self._queues[: self._first])[:n]

    def rotate(self, served: str) -> None:
        if served in self._queues:
            self._first = (self._queues.index(served) + 1) % len(self._queues)


class _Keys:
    """Keys in Redis beside the queues, under names that are not those of other Celery apps."""

    unacked_key = UNACKED
    unacked_index_key = UNACKED_INDEX
    keyprefix_queue = "ferrum:binding:%s"
    keyprefix_binding_deadlines = "ferrum:binding-deadlines"
    keyprefix_binding_permanent = "ferrum:binding-permanent:%s"
    keyprefix_fanout = "/ferrum-{db}."


class QoS(kombu_redis.QoS):  # type: ignore[misc] # kombu is untyped
    """Acknowledging and giving back, each one script; a tag is of one delivery, never of a later one."""

    def append(self, message: Any, delivery_tag: str) -> None:
        # Redis has noted it when it was taken.
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        self._end(delivery_tag, self.channel.forget)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self._end(delivery_tag, partial(self.restore_by_tag, leftmost=True) if requeue else self.channel.forget)

    def _end(self, delivery_tag: str, tell: Callable[[str], object]) -> None:
        try:
            tell(delivery_tag)
        finally:
            # Where Redis does not hear of it, nobody renews it any more, and another worker will look at it once: kept
            # here, it would be renewed, and take the place of another message, for as long as the connection lives.
            virtual.QoS.ack(self, delivery_tag)

    def restore_visible(self, start: int = 0, num: int | None = None, interval: int | None = 1) -> None:
        """Put back what nobody has renewed for the visibility timeout, and what was taken for a lost answer."""
        self._vrestore_count += 1
        if (self._vrestore_count - 1) % (interval or 1):
            return
        with self.channel.conn_or_acquire() as client:
            for tag, asked_at in list(_unanswered.items()):
                # The question itself may still be on its way to Redis.
                if self.restore_by_tag(tag, client) or time.monotonic() - asked_at > self.visibility_timeout:
                    _unanswered.pop(tag, None)
            due = self.channel.run(_DUE, [self.unacked_index_key], [self.visibility_timeout, num or _RESTORED_AT_ONCE])
            for tag in due:
                self.restore_by_tag(tag.decode(), client, idle_s=self.visibility_timeout)

    def restore_by_tag(
        self, tag: str, client: Any = None, leftmost: bool = False, *, idle_s: float | None = None
    ) -> bool:
        """Put a message back: to the front of its list, or with `leftmost` to the end. False where it was not there."""
        noted = self.channel.run(_NOTED, [self.unacked_key], [tag])
        listed = None if noted is None else _list_of(noted)
        if not listed:
            # It would hold up all that is due behind it.
            if noted is not None:
                log.error("what stands in Redis at %r under %r is no message that was taken", self.unacked_key, tag)
            self.channel.forget(tag)
            return False
        keys = [self.unacked_key, self.unacked_index_key, listed]
        push = "LPUSH" if leftmost else "RPUSH"
        idle = "" if idle_s is None else idle_s
        again = _delivered_again(_text_of(noted), counted=idle_s is not None)
        return bool(self.channel.run(_PUT_BACK, keys, [tag, again, push, idle]))


class Channel(_Keys, kombu_redis.Channel):  # type: ignore[misc]
    """kombu's channel, mended, and with another way of taking messages."""

    QoS = QoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._kept_client: Any = None
        self._scripts: dict[str, Any] = {}
        self._unkept: set[str] = set()
        self._name = uuid.uuid4().hex
        self._numbers = itertools.count(1)
        #: Of the question that is on its way.
        self._tag: str | None = None
        #: The socket on which Redis tells what was written, and whether it does.
        self._told_on: Any = None
        self._is_told = False
        #: There was nothing; Redis will say when there is.
        self._waiting = False
        self._woken = False
        self._misses = 0
        self._ask_from = 0.0
        self._send_script = True
        #: When a list that is none is named again.
        self._say_from = 0.0
        self._questions: dict[tuple[bool, tuple[str, ...]], bytes] = {}
        #: A question that has no answer after this long has none coming: its connection is given up.
        self._answer_s = silence_s()
        super().__init__(*args, **kwargs)
        self._queue_cycle = _InTurn()
        # Where nothing comes, so long passes until it is asked whether Redis is there.
        self.brpop_timeout: float = min(self.connection.brpop_timeout, silence_s())

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

    def run(self, script: str, keys: list[Any], args: list[Any]) -> Any:
        """Run one of our scripts."""
        client = self._create_client()
        known = self._scripts.get(script)
        if known is None:
            known = self._scripts[script] = client.register_script(script)
        return known(keys, args, client=client)

    def forget(self, tag: str) -> None:
        """Take a message from the unacknowledged ones: it is done with."""
        self.run(_FORGET, [self.unacked_key, self.unacked_index_key], [tag])

    # Taking messages. kombu's poller calls these two names.

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for a message, unless it is too early for that."""
        now = time.monotonic()
        queues = self._queue_cycle.consume(len(self.active_queues))
        if now < self._ask_from or not queues:
            return
        connection = self.client.connection
        self._be_told(connection)
        tag = f"{self._name}.{next(self._numbers)}"
        self._tag, self._waiting, self._in_poll, self._brpop_sent_at = tag, False, connection, now
        connection.send_packed_command([self._packed(queues), _bulk(tag.encode()), _LIMITS_PACKED], check_health=False)

    def _packed(self, queues: list[str]) -> bytes:
        """The question, but for its tag: the same for each order of the queues."""
        asked = (self._send_script, tuple(queues))
        if (packed := self._questions.get(asked)) is None:
            lists = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
            keys = [self.unacked_key, self.unacked_index_key, *lists]
            kept = "".join("0" if self._is_unkept(queue) else "1" for queue in queues)
            script = ("EVAL", _TAKE) if self._send_script else ("EVALSHA", _TAKE_SHA)
            parts = [*script, str(len(keys)), *(self.global_keyprefix + key for key in keys)]
            parts.append(kept if "0" in kept else "")
            packed = b"*%d\r\n" % (len(parts) + 1 + len(_LIMITS)) + b"".join(_bulk(part.encode()) for part in parts)
            self._questions[asked] = packed
        return packed

    def _is_unkept(self, queue: str) -> bool:
        return not self.ack_emulation or queue in self._unkept

    def _be_told(self, connection: Any) -> None:
        """Have Redis tell this connection when a list that it has read is written to."""
        if connection._sock is self._told_on:
            return
        self._told_on, self._send_script = connection._sock, True
        try:
            if connection.get_protocol() not in (3, "3"):
                raise redis.exceptions.ResponseError("the connection speaks RESP2")
            connection.send_command("CLIENT", "TRACKING", "ON", check_health=False)
            connection.read_response()
            connection._parser.set_invalidation_push_handler(lambda _: _WRITTEN)
            self._is_told = True
        except redis.exceptions.ResponseError as error:
            self._is_told = False
            log.warning(
                "Redis does not tell this worker of new messages (CLIENT TRACKING: %s), so it asks %d times a second",
                error, round(1 / _POLL_S),
            )  # fmt: skip

    def _brpop_read(self, **_: Any) -> bool:
        """Read what has come: a message, that there is none, or that somebody has written to one of the lists."""
        connection = self.client.connection
        while True:
            try:
                answer = connection.read_response(push_request=True)
            except redis.exceptions.NoScriptError:
                self._tag, self._in_poll, self._send_script = None, None, True
                raise Empty from None
            except self.connection_errors:
                # The next turn connects anew.
                connection.disconnect()
                raise
            except redis.exceptions.ResponseError:
                self._tag = self._in_poll = None
                raise
            if answer is _WRITTEN:
                self._be_woken()
            elif answer is not None and answer[0]:
                return self._take(*answer)
            elif self._tag is not None:
                if answer is not None:
                    self._say_misplaced(answer[3])
                self._begin_to_wait(connection)
            if not connection.can_read(timeout=0):
                raise Empty

    def _take(self, listed: bytes, text: bytes, size: int, wrong: bytes) -> bool:
        self._say_misplaced(wrong)
        tag, self._tag = self._tag, None
        self._in_poll, self._send_script, self._woken, self._misses = None, False, False, 0
        self._flush_brpop_reauth()
        taken_from = listed.decode().removeprefix(self.global_keyprefix)
        self._queue_cycle.rotate(self.queue_of(taken_from))
        self.connection.receive(self, taken_from, tag, text, size)
        return True

    def _say_misplaced(self, key: bytes) -> None:
        if not key or time.monotonic() < self._say_from:
            return
        self._say_from = time.monotonic() + _SAY_EVERY_S
        name = key.decode(errors="replace")
        if name.removeprefix(self.global_keyprefix) in (self.unacked_key, self.unacked_index_key):
            what = "where ferrum notes the messages that workers have taken, so none is taken"
        else:
            what = "and no list, so no message can be taken from it or sent to it"
        log.error("%r in Redis is something else, %s; look at it with TYPE, then remove it with DEL", name, what)

    def queue_of(self, listed: str) -> str:
        """The queue that a list is a lane of."""
        return str(listed.rsplit(self.sep, 1)[0])

    def _begin_to_wait(self, connection: Any) -> None:
        self._tag, self._send_script = None, False
        if self._woken:
            self._woken = False
            self._misses += 1
        if self._pending_reauth_token(connection) is not None:
            self._in_poll = None
            self._flush_brpop_reauth()
        elif self._is_told:
            self._waiting = True
        else:
            self._in_poll = None
            self._pause(_POLL_S)

    def _be_woken(self) -> None:
        if self._waiting:
            self._in_poll, self._waiting, self._woken = None, False, True
            if self._misses > 1:
                self._pause(min(_PAUSE_S, 0.001 * 2**self._misses) * random.uniform(0.5, 1))  # noqa: S311

    def _pause(self, seconds: float) -> None:
        self._ask_from = time.monotonic() + seconds
        self.connection.cycle.call_later(seconds)

    def look_after(self, now: float) -> None:
        """Ask again after a while in any case, and give up a connection that does not answer."""
        connection = self._in_poll
        if not connection or self._brpop_sent_at is None:
            return
        asked_for = now - self._brpop_sent_at
        if self._waiting and asked_for >= self.brpop_timeout:
            self._in_poll, self._waiting = None, False
        elif not self._waiting and asked_for >= self._answer_s and not _has_come(connection._sock):
            log.warning("Redis has not answered for %.0f s: connecting anew", asked_for)
            connection.disconnect()

    def _on_connection_disconnect(self, connection: Any) -> None:
        if self._in_poll is connection:
            self._waiting = False
            if self._tag is not None:
                _unanswered[self._tag] = time.monotonic()
                self._tag = None
        super()._on_connection_disconnect(connection)

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        (self._unkept.add if no_ack else self._unkept.discard)(queue)
        self._questions.clear()
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    # A queue's name is all that a message of ours needs to find it. kombu writes down which are bound, as others need.

    def _queue_bind(self, exchange: str, *args: Any, **kwargs: Any) -> None:
        self._noting(partial(super()._queue_bind, exchange, *args, **kwargs), self.keyprefix_queue % (exchange,))

    def _refresh_bindings(self, *args: Any, **kwargs: Any) -> None:
        self._noting(partial(super()._refresh_bindings, *args, **kwargs), self.keyprefix_queue % ("…",))

    def _noting(self, note: Callable[[], None], key: str) -> None:
        try:
            note()
        except redis.exceptions.ResponseError as error:
            if not misplaced(error):
                raise
            if time.monotonic() >= self._say_from:
                self._say_from = time.monotonic() + _SAY_EVERY_S
                log.error("%r in Redis is something else, and no set of queues: look at it, and then DEL it", key)

    def _size(self, queue: str) -> int:
        # kombu asks when it declares a queue, and fails where something else stands in place of a list.
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for step in self.priority_steps:
                pipe.llen(self._q_for_pri(queue, step))
            return sum(size for size in pipe.execute(raise_on_error=False) if isinstance(size, int))

    def _get(self, queue: str) -> Any:
        lists = [self._q_for_pri(queue, step) for step in self.priority_steps]
        keys = [self.unacked_key, *(self.global_keyprefix + key for key in (self.unacked_index_key, *lists))]
        tag = f"{self._name}.{next(self._numbers)}"
        found = self.run(_TAKE, keys, ["0" if self._is_unkept(queue) else "", tag, *_LIMITS])
        self._maybe_update_queues_expire(self._create_client(), queue)
        if found:
            self._say_misplaced(found[3])
        if not found or not found[0]:
            raise Empty
        listed = found[0].decode().removeprefix(self.global_keyprefix)
        message = self.connection.read(self, listed, tag, found[1], found[2])
        if message is None:
            raise Empty
        return message

    def close(self) -> None:
        self._closing = True
        if self._tag is not None:
            self._hand_back(self._tag, self._in_poll)
        self._tag = self._in_poll = None
        super().close()

    def _hand_back(self, tag: str, connection: Any) -> None:
        """Put back what an answer brings that nobody will read."""
        try:
            while connection.read_response(push_request=True, timeout=1) is _WRITTEN:
                continue
            self.qos.restore_by_tag(tag)
        except (*self.connection_errors, redis.exceptions.ResponseError):
            _unanswered[tag] = time.monotonic()

    def _restore(self, message: Any, leftmost: bool = False) -> None:
        self.qos.restore_by_tag(message.delivery_tag, leftmost=leftmost)

    def _receive_one(self, c: Any) -> bool:
        # kombu lets what it cannot read end the loop over what has come with it, which then waits for more to come.
        try:
            # Not waiting: a connection that was dropped meanwhile is made anew here, and nothing has come on it. But of
            # what has begun to come the rest is on its way, and not to wait for that would be to drop the connection.
            response = c.parse_response(block=False, timeout=_REST_S if _begun(c.connection) else 0)
        except self.connection_errors:
            self._in_listen = None
            raise
        heard = self._handle_message(c, response) if isinstance(response, (list, tuple)) else {}
        if not heard.get("type", b"").endswith(b"message") or not heard["data"]:
            return False
        exchange = heard["channel"].decode().removeprefix(self.keyprefix_fanout).partition("/")[0]
        message = _heard(heard["data"], exchange)
        if isinstance(message, messages.Refused):
            log.error("what was broadcast to %s was dropped: %s", exchange, message.reason)
            return False
        try:
            return bool(self._deliver_fanout_message(message, exchange))
        except _LOST:
            raise
        except Exception:
            log.exception("what was broadcast to %s could not be received", exchange)
            return False


class SentinelChannel(Channel, kombu_redis.SentinelChannel):  # type: ignore[misc]
    """The same behind Redis Sentinel."""

    def _sentinel_managed_pool(self, asynchronous: bool = False) -> Any:
        found = _watched()
        if found is None:
            return super()._sentinel_managed_pool(asynchronous)
        options = self._connparams(asynchronous)
        pool = master_pool(found, **{name: options[name] for name in options.keys() - {"host", "port"}})
        # kombu closes what they have open.
        if asynchronous:
            self._async_sentinel_manager = pool.sentinel_manager
        else:
            self._sentinel_manager = pool.sentinel_manager
        return pool


class Poller(kombu_redis.MultiChannelPoller):  # type: ignore[misc]
    """kombu's poller, for questions that are answered at once instead of a BRPOP that blocks."""

    def __init__(self) -> None:
        super().__init__()
        #: The worker's event loop, where there is one.
        self.loop: Any = None

    def on_poll_start(self) -> None:
        for channel in self._channels:
            if channel.active_queues and channel.qos.can_consume():
                self._register_BRPOP(channel)
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)

    def on_readable(self, fileno: int) -> Any:
        # Whether or not the channel may take more: an answer holds one message, and it is noted as taken.
        if (found := self._fd_to_chan.get(fileno)) is not None:
            channel, kind = found
            return channel.handlers[kind]()
        return None

    def maybe_check_brpop_health(self) -> None:
        now = time.monotonic()
        for channel in list(self._channels):
            channel.look_after(now)

    def call_later(self, seconds: float) -> None:
        """Begin another turn after so long."""
        if self.loop is not None:
            self.loop.call_later(seconds, _nothing)

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        now = time.monotonic()
        waits = [channel._ask_from - now for channel in self._channels if channel._ask_from > now]
        return super().get(callback, min([*waits, 1.0, math.inf if timeout is None else timeout]))


def _has_come(sock: Any) -> bool:
    """Tell whether a socket has something to read; what was read from it before, and waits for a turn, is not it."""
    if sock is None:
        return False
    look = select.poll()
    look.register(sock, select.POLLIN)
    return bool(look.poll(0))


def _begun(connection: Any) -> bool:
    """Tell whether something has come on a connection, be it the beginning of a message; never make it anew."""
    sock = getattr(connection, "_sock", None)
    return sock is not None and (_has_come(sock) or bool(connection.can_read(timeout=0)))


def _nothing() -> None:
    """Callback of a timer that is there to begin a turn."""


class _Sifting:
    """Anybody may push to a queue, and kombu and Celery trust what they read: what is no message ended the worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle: Poller = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)  # type: ignore[misc]
        self.cycle.loop = loop
        # kombu's own turns are every 25 s.
        looks = {"_brpop_health_tref": self.cycle.maybe_check_brpop_health}
        looks["_subclient_health_tref"] = self.cycle.maybe_check_subclient_health
        for name, look in looks.items():
            getattr(self.cycle, name).cancel()
            setattr(self.cycle, name, loop.call_repeatedly(min(1.0, silence_s()), look))

    def receive(self, channel: Channel, listed: str, tag: str, raw: bytes, size: int) -> None:
        """Deliver what was taken from a list, if it is a message; of more than is one, `raw` is the beginning."""
        message = self.read(channel, listed, tag, raw, size)
        if message is None:
            return
        try:
            self._deliver(message, channel.queue_of(listed))  # type: ignore[attr-defined]
        except _LOST:
            raise
        except Exception as error:
            log.exception("a message could not be received")
            self.drop(channel, listed, tag, raw, messages.failed(message, error, task_names()), size=size)

    def read(self, channel: Channel, listed: str, tag: str, raw: bytes, size: int) -> dict[str, Any] | None:
        """The message that this is, under the tag that it was taken with.

        `None` where kombu and Celery may not have it, which ends it.
        """
        message = messages.TOO_LONG if size > messages.MAX_BYTES else _read(raw, channel.queue_of(listed))
        if isinstance(message, messages.Refused):
            self.drop(channel, listed, tag, raw, message, size=size)
            return None
        message["properties"]["delivery_tag"] = tag
        return message

    def drop(
        self, channel: Channel, listed: str, tag: str, raw: bytes, refused: messages.Refused, *, size: int
    ) -> None:
        """Keep a message as a dead letter, and answer whoever waits for it."""
        held = (channel.unacked_key, channel.unacked_index_key, tag)
        with channel.conn_or_acquire() as client:
            letter = bury(client, raw, listed, refused, size=size, held=held)
        virtual.QoS.ack(channel.qos, tag)
        log.error(
            "a message was dropped from the queue %s, it is dead letter %s: %s (see docs/enqueue.md)",
            channel.queue_of(listed), letter, refused.reason,
        )  # fmt: skip


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


class _Own:
    """Goes through our transport, whatever its URL; kombu finds its own by the scheme."""

    transport_cls: Any

    def get_transport_cls(self) -> Any:
        return _TRANSPORTS.get(self.transport_cls) or super().get_transport_cls()  # type: ignore[misc]

    def _ensure_connection(
        self, errback: Any = None, max_retries: Any = None, interval_start: float = _RECONNECT_EVERY_S,
        interval_step: float = 0, interval_max: float = _RECONNECT_EVERY_S, *more: Any, **options: Any,
    ) -> Any:  # fmt: skip
        # kombu waits longer and longer, up to 30 s; a broker that is back would stay alone for so long.
        starts_s, ends_s = min(interval_start, _RECONNECT_EVERY_S), min(interval_max, _RECONNECT_EVERY_S)
        ensure = super()._ensure_connection  # type: ignore[misc]
        return ensure(errback, max_retries, starts_s, interval_step, ends_s, *more, **options)

    def __eqhash__(self) -> Any:
        # kombu has one pool of connections for all apps of a process, by this: another app on the same Redis would be
        # given ours.
        return HashedSeq("ferrum", *super().__eqhash__())  # type: ignore[misc]


class _Pooled(_Own, PooledConnection):  # type: ignore[misc]
    """One of a pool; kombu makes them of a class of their own."""


class _Pool(ConnectionPool):  # type: ignore[misc]
    def new(self) -> Any:
        return _Pooled(self, **dict(self.connection._info(resolve=False)))


class OwnConnection(_Own, Connection):  # type: ignore[misc]
    """A connection through our transport, whose pool has such connections, too."""

    def Pool(self, limit: int | None = None, **options: Any) -> Any:
        return _Pool(self, limit, **options)


class Broker(AMQP):  # type: ignore[misc]
    """Celery's broker: `Celery(…, amqp=Broker)`."""

    Connection = OwnConnection
    BrokerConnection = OwnConnection


class _Results:
    """Celery's results, with keys of our own but for the answers to `ferrum.run`, and patience."""

    #: Counters of chords. What a task returned stays at `celery-task-meta-<id>`, where whoever sent `ferrum.run` looks.
    group_keyprefix = "ferrum-taskset-meta-"
    chord_keyprefix = "ferrum-chord-unlock-"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.connparams: dict[str, Any] = self._patiently(self.connparams)

    def _patiently(self, connparams: dict[str, Any]) -> dict[str, Any]:
        return patiently(connparams)

    def ensure(self, fun: Any, args: Any, **policy: Any) -> Any:
        more = {"max_retries": 2} if hurried() else {}
        return super().ensure(fun, args, **policy, **more)  # type: ignore[misc]

    def on_chord_part_return(self, *args: Any, **options: Any) -> Any:
        # Celery asks once. A part that is counted again is counted once.
        return self.ensure(partial(super().on_chord_part_return, *args, **options), ())  # type: ignore[misc]


class Results(_Results, RedisBackend):  # type: ignore[misc]
    """Results in Redis, under keys of our own."""


class SentinelResults(_Results, SentinelBackend):  # type: ignore[misc]
    """The same behind Redis Sentinel."""

    def _patiently(self, connparams: dict[str, Any]) -> dict[str, Any]:
        return patiently({"connection_class": SentinelManagedConnection, **connparams})

    def _get_pool(self, **params: Any) -> Any:
        found = _watched()
        if found is None:
            return super()._get_pool(**params)
        return master_pool(found, **{name: params[name] for name in params.keys() - {"hosts"}})


def _watched() -> Watched | None:
    """The sentinels of `FERRUM_REDIS_URL`."""
    given = settings().redis_url
    return None if given is None else watched(given.get_secret_value())


#: For `app.loader.override_backends`.
BACKENDS: Final = {
    "redis": "ferrum.broker:Results",
    "rediss": "ferrum.broker:Results",
    "sentinel": "ferrum.broker:SentinelResults",
}


def silence_s() -> float:
    """Return how long nothing may come through a connection before it is given up, whatever Celery's settings say."""
    return timeout_of(settings().lease)


def patiently(connparams: dict[str, Any]) -> dict[str, Any]:
    """These parameters of a pool of redis-py's, for connections that raise `Refused` and try each call once.

    All that uses them tries again by itself, and not on the worker's one thread that hears of messages. Those that have
    gone silent are given up well before a lease is over.
    """
    kind, most_s = connparams.get("connection_class", redis.Connection), silence_s()
    most = {"socket_timeout": most_s, "health_check_interval": most_s}
    if "socket_connect_timeout" in connparams:
        # Not of a Unix socket.
        most["socket_connect_timeout"] = min(most_s, CONNECT_TIMEOUT_S)
    times = {name: min(connparams.get(name) or longest, longest) for name, longest in most.items()}
    return {**connparams, **times, "connection_class": patient(kind), "retry": Retry(NoBackoff(), 0)}


@cache
def task_names() -> frozenset[str]:
    """The tasks that ferrum's queues take."""
    return frozenset({messages.RUN, *(kind.task for kind in step_types().values())})


def _read(raw: bytes, queue: str) -> dict[str, Any] | messages.Refused:
    """Read what was taken from a queue."""
    text = messages.decoded(raw)
    if isinstance(text, messages.Refused):
        return text
    # Of workers that were asked something, by this process.
    answer = queue.endswith(".pidbox")
    return messages.other(text) if answer else messages.read(text, queue, task_names())


def _heard(raw: bytes, exchange: str) -> dict[str, Any] | messages.Refused:
    """Read what was broadcast."""
    text = messages.decoded(raw)
    if isinstance(text, messages.Refused):
        return text
    return messages.control(text) if exchange.endswith(".pidbox") else messages.other(text)


def _bulk(part: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(part), part)


#: What is said of a message's length to `_TAKE`, at the end of each question.
_LIMITS: Final = (str(messages.MAX_BYTES), str(SAMPLE))
_LIMITS_PACKED: Final = b"".join(_bulk(part.encode()) for part in _LIMITS)


def _list_of(noted: bytes) -> bytes | None:
    length, _, rest = noted.partition(b":")
    return rest[: int(length)] if length.isdigit() and len(length) < 9 and int(length) < len(rest) else None


def _text_of(noted: bytes) -> bytes:
    length, _, rest = noted.partition(b":")
    return rest[int(length) :]


def _delivered_again(raw: bytes, *, counted: bool) -> bytes:
    """The message, marked as one that was delivered before; what is no message stays as it is."""
    text = messages.decoded(raw)
    return raw if isinstance(text, messages.Refused) else messages.delivered_again(text, counted=counted).encode()

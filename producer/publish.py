"""Hints on the broker: Celery messages that carry ids, in four bands of priority per queue."""

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import redis
from pydantic_core import to_json
from redis.exceptions import RedisError, ResponseError

from contentfactory.errors import ServiceUnavailable
from contentfactory.settings import Settings
from contentfactory.states import Priority
from producer import transport

if TYPE_CHECKING:
    # Not loaded: Flower and a worker's parent come through here and never touch the ledger.
    from db.choice import Hint

URGENT, AHEAD, AGAIN, ORDINARY = BANDS = 0, 3, 6, 9
"""Redis priorities: 0 leaves first. Interactive jobs overtake the bulk work that waits in the broker, and so does the first micro-batch
of a project of which nothing waits there: another's million jobs cost it the micro-batches that run, not those that wait. Jobs that
come back, from a worker that died say, are not made to wait for all of it a second time."""

_SEPARATOR = "\x06\x16"
ENDED = "factory.ended"
"""Channel on which workers name interactive jobs that have ended. A hint, as everything on the broker: the ledger says how they ended."""
_Command = tuple[str | bytes, ...]
MAX_EARS = 8
"""Connections to that channel that are kept while nobody waits."""


def band(hint: "Hint") -> int:
    """The band of `BANDS` in which a hint travels."""
    if hint.priority >= Priority.INTERACTIVE:
        return URGENT
    return AHEAD if hint.ahead else AGAIN if hint.again else ORDINARY


def celery_options() -> dict[str, Any]:
    """Settings that the sending and the working side must share; from here on this process checks what a broker hands out."""
    transport.install()
    return {
        "task_serializer": "json",
        "accept_content": ["json"],
        "result_serializer": "json",
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": {
            "priority_steps": list(BANDS),
            "queue_order_strategy": "priority",
            # No visibility timeout: popped hints are not kept in the broker (producer/transport.py); the ledger sends them again.
            "socket_timeout": 15,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "retry_on_timeout": True,
        },
        "task_default_queue": "text",
        "task_create_missing_queues": True,
        "enable_utc": True,
        # Tells Flower each message's queue.
        "task_send_sent_event": True,
    }


class Publisher:
    """Sends hints and looks at what waits. One per process; connections are kept.

    Args:
        settings: Where the broker is.
    """

    def __init__(self, settings: Settings) -> None:
        url = settings.redis()
        tcp = {} if url.startswith("unix:") else {"socket_keepalive": True}
        self._redis = redis.Redis.from_url(url, socket_timeout=15, socket_connect_timeout=5, **tcp)
        self._line = _Line(self._redis)
        self._ears: deque[Any] = deque()
        """Connections of those who waited once and are ready for the next."""
        # Where kombu publishes events: a channel of the broker's database, of the exchange, of the routing key.
        self._events = f"/{self._redis.connection_pool.connection_kwargs.get('db') or 0}.celeryev/task.sent"

    def send(self, hints: Sequence["Hint"]) -> "list[Hint]":
        """Publish micro-batches: all of them in one round trip, as messages that Celery itself would have written.

        Returns:
            Those that could not be published; put their jobs back.
        """
        if not hints:
            return []
        messages = []
        commands: list[_Command] = []
        for hint in hints:
            priority = band(hint)
            messages.append(transport.hint_message(hint.kind, hint.ids, hint.queue, priority, hint.dispatched_at))
            commands.append(("LPUSH", self._key(hint.queue, priority), to_json(messages[-1])))

        def events() -> list[_Command]:
            # From these Flower learns each message's queue, while workers take the messages.
            return [("PUBLISH", self._events, to_json(transport.sent_event(message))) for message in messages]

        try:
            answers = self._line.ask(commands, events)
        except (RedisError, OSError):
            # Some may have arrived: their jobs are put back all the same, and a hint too many does no harm.
            return list(hints)
        return [hint for hint, answer in zip(hints, answers, strict=False) if isinstance(answer, Exception)]

    def ended(self, job_ids: Sequence[str]) -> None:
        """Tell whoever waits for these jobs that they have ended; see `listen`."""
        try:
            self._line.ask([("PUBLISH", ENDED, " ".join(job_ids))])
        except (RedisError, OSError):
            return  # they look at the ledger now and then

    @contextmanager
    def listen(self, job_ids: Collection[str]) -> Iterator["Listener | None"]:
        """Hear of the end of these jobs while the block lasts; None where the broker does not answer."""
        pubsub = self._subscribed()
        listener = Listener(pubsub, frozenset(job_ids), self._rest) if pubsub else None
        try:
            yield listener
        finally:
            if listener:
                listener.close()

    def _rest(self, pubsub: Any) -> None:
        """Keep a connection for the next who waits: to connect takes five round trips. The broker's answer is read then."""
        with suppress(RedisError, OSError):
            if len(self._ears) < MAX_EARS:
                pubsub.unsubscribe(ENDED)
                self._ears.append(pubsub)
                return
        with suppress(RedisError, OSError):
            pubsub.close()

    def _subscribed(self) -> Any:
        """A connection that hears of jobs that end, from here on without a gap; None where the broker does not answer."""
        while True:
            kept = self._kept()
            pubsub: Any = kept or self._redis.pubsub()  # type: ignore[no-untyped-call]
            try:
                pubsub.subscribe(ENDED)
                end = time.monotonic() + 1.0
                while (left := end - time.monotonic()) > 0:
                    message = pubsub.get_message(timeout=left)
                    if message is not None and message["type"] == "subscribe":
                        return pubsub
            except (RedisError, OSError):
                pass
            with suppress(RedisError, OSError):
                pubsub.close()
            if kept is None:
                return None
            # A connection that had rested, to a broker that was restarted perhaps: try the others, and at last a new one.

    def _kept(self) -> Any:
        with suppress(IndexError):
            return self._ears.pop()
        return None

    def waiting(self, queue: str) -> int:
        """Messages that wait on a queue."""
        try:
            return sum(int(self._redis.llen(key)) for key in self._keys(queue))
        except RedisError as error:
            raise ServiceUnavailable(f"the broker did not answer: {error}", code="broker_unavailable") from None

    def anything(self, queues: Sequence[str]) -> bool:
        """Whether a message waits on one of these queues.

        Raises:
            ServiceUnavailable: If the broker does not answer.
        """
        try:
            [found] = self._line.ask([("EXISTS", *(key for queue in queues for key in self._keys(queue)))])
        except (RedisError, OSError) as error:
            raise ServiceUnavailable(f"the broker did not answer: {error}", code="broker_unavailable") from None
        if isinstance(found, Exception):
            raise ServiceUnavailable(f"the broker did not answer: {found}", code="broker_unavailable")
        return bool(found)

    def oldest(self, queue: str) -> float | None:
        """Dispatch time (the ledger's clock) of the hint that waits longest; None where none waits, 0 where nobody knows.

        The list is a queue: what was pushed first lies at its right end.
        """
        found: list[float] = []
        try:
            for key in self._keys(queue):
                raw: Any = self._redis.lindex(key, -1)
                if raw is None:
                    continue
                try:
                    found.append(float(transport.read_hint(raw, queue)["headers"]["dispatched_at"]))
                except transport.Malformed:
                    # Whatever waits behind it may be of any age. A worker throws it out when it comes to it.
                    found.append(0.0)
        except RedisError as error:
            raise ServiceUnavailable(f"the broker did not answer: {error}", code="broker_unavailable") from None
        return min(found, default=None)

    def quarantined(self) -> dict[str, int]:
        """Items that were no messages of ours and were taken out, by reason."""
        try:
            return transport.counts(self._redis)
        except RedisError as error:
            raise ServiceUnavailable(f"the broker did not answer: {error}", code="broker_unavailable") from None

    def check(self) -> None:
        """Ask the broker for an answer.

        Raises:
            ServiceUnavailable: If it gives none.
        """
        try:
            self._redis.ping()
        except RedisError as error:
            raise ServiceUnavailable(f"the broker did not answer: {error}", code="broker_unavailable") from None

    def close(self) -> None:
        """Close every connection."""
        while (ear := self._kept()) is not None:
            with suppress(RedisError, OSError):
                ear.close()
        self._line.close()
        self._redis.close()

    @staticmethod
    def _key(queue: str, priority: int) -> str:
        return queue if priority == URGENT else f"{queue}{_SEPARATOR}{priority}"

    @classmethod
    def _keys(cls, queue: str) -> list[str]:
        return [cls._key(queue, priority) for priority in BANDS]


class _Line:
    """One connection to the broker that stays out of the client's pool, for the few commands that every job costs: what the client does around
    each takes as long as the broker's answer. Whoever comes while it is in use is served by the client, and so is whoever finds it broken.

    Args:
        client: The client.
    """

    def __init__(self, client: "redis.Redis") -> None:
        self._client = client
        self._rests: list[tuple[Any, int]] = []  # one; taken and put by single steps, which threads cannot divide

    def ask(self, commands: Sequence[_Command], further: Callable[[], Sequence[_Command]] | None = None) -> list[Any]:
        """Send commands; the answer to each, which is an exception where the broker refused it.

        Some may be sent twice, where the broker's answer is lost.

        Args:
            commands: Names of commands and their arguments.
            further: Makes more of them, while the broker does the first.

        Raises:
            RedisError: If the broker does not answer.
        """
        if (connection := self._take()) is not None:
            try:
                answers = _exchange(connection, commands, further)
            except (RedisError, OSError):
                self._client.connection_pool.release(connection)  # which has closed itself, and opens anew when it is wanted
            except BaseException:
                connection.disconnect()  # there may be answers on it that nobody has read
                self._client.connection_pool.release(connection)
                raise
            else:
                self._rest(connection)
                return answers
        with self._client.pipeline(transaction=False) as pipe:
            for command in (*commands, *(further() if further else ())):
                pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            answers = pipe.execute(raise_on_error=False)
        if not self._rests:
            with suppress(RedisError, OSError):
                self._rest(self._client.connection_pool.get_connection())
        return answers

    def _take(self) -> Any:
        try:
            connection, process = self._rests.pop()
        except IndexError:
            return None
        return connection if process == os.getpid() else None  # the one before this process was forked is that one's

    def _rest(self, connection: Any) -> None:
        if self._rests:
            self._client.connection_pool.release(connection)
        else:
            self._rests.append((connection, os.getpid()))

    def close(self) -> None:
        """Give the connection back."""
        if (connection := self._take()) is not None:
            self._client.connection_pool.release(connection)


def _exchange(connection: Any, commands: Sequence[_Command], further: Callable[[], Sequence[_Command]] | None) -> list[Any]:
    connection.send_packed_command(connection.pack_commands(commands))
    count = len(commands)
    if further:
        more = further()
        connection.send_packed_command(connection.pack_commands(more))
        count += len(more)
    answers: list[Any] = []
    for _ in range(count):
        try:
            answers.append(connection.read_response())
        except ResponseError as error:
            answers.append(error)
    return answers


class Listener:
    """Hears of jobs that ended."""

    def __init__(self, pubsub: Any, wanted: frozenset[str], rest: Callable[[Any], None]) -> None:
        self._pubsub = pubsub
        self._wanted = wanted
        self._rest = rest
        self.closed = False

    def close(self) -> None:
        """Hear no more; once is enough."""
        if not self.closed:
            self.closed = True
            self._rest(self._pubsub)

    def wait(self, timeout_s: float) -> bool:
        """Whether one of the jobs ended within so many seconds."""
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            try:
                message = self._pubsub.get_message(timeout=left)
            except (RedisError, OSError):
                time.sleep(max(0.0, end - time.monotonic()))
                return False
            data = message.get("data") if message else None
            if isinstance(data, bytes) and not self._wanted.isdisjoint(data.decode("ascii", "replace").split()):
                return True
        return False

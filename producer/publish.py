"""Hints on the broker: Celery messages that carry ids, in two bands of priority per queue."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import celery
import redis
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from contentfactory.errors import ServiceUnavailable
from contentfactory.settings import Settings
from contentfactory.states import Priority
from producer import transport

if TYPE_CHECKING:
    # Not loaded: Flower and a worker's parent come through here and never touch the ledger.
    from db.lifecycle import Hint

URGENT, ORDINARY = 0, 9
"""Redis priorities: 0 leaves first. Interactive jobs overtake the minute of bulk work that waits in the broker."""

_SEPARATOR = "\x06\x16"


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
            "priority_steps": [URGENT, ORDINARY],
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
        self._app = celery.Celery("factory", broker=settings.broker(), set_as_current=False)
        self._app.conf.update(celery_options())
        url = settings.redis()
        tcp = {} if url.startswith("unix:") else {"socket_keepalive": True}
        self._redis = redis.Redis.from_url(url, socket_timeout=15, socket_connect_timeout=5, **tcp)

    def send(self, hints: Sequence["Hint"]) -> "list[Hint]":
        """Publish micro-batches.

        Returns:
            Those that could not be published; put their jobs back.
        """
        if not hints:
            return []
        sent = 0
        try:
            with self._app.producer_or_acquire() as producer:
                for hint in hints:
                    self._app.send_task(
                        hint.kind,
                        args=[list(hint.ids)],
                        queue=hint.queue,
                        priority=URGENT if hint.priority >= Priority.INTERACTIVE else ORDINARY,
                        headers={"dispatched_at": hint.dispatched_at},
                        producer=producer,
                        ignore_result=True,
                        retry=False,
                    )
                    sent += 1
        except (KombuError, RedisError, OSError):
            return list(hints[sent:])
        return []

    def waiting(self, queue: str) -> int:
        """Messages that wait on a queue."""
        try:
            return sum(int(self._redis.llen(key)) for key in self._keys(queue))
        except RedisError as error:
            raise ServiceUnavailable(f"the broker did not answer: {error}", code="broker_unavailable") from None

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
        self._app.close()
        self._redis.close()

    @staticmethod
    def _keys(queue: str) -> list[str]:
        return [queue, f"{queue}{_SEPARATOR}{ORDINARY}"]

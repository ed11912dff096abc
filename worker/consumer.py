"""Celery's consumer without the messages that workers send each other, quick to come back and to stop without a broker."""

import time
from functools import partial
from typing import Any

from celery.app.events import Events as StockEvents
from celery.events.dispatcher import EventDispatcher
from celery.worker.consumer import Consumer as StockConsumer

RECONNECT_S = 2.0
"""Longest pause between two attempts to reach the broker."""
EVENTS_S = 0.05
"""How long a message's events may wait to be sent, seconds: Celery sends them before it hands the message to its child, which waits for the
broker's answer meanwhile."""


class Consumer(StockConsumer):
    """Hears hints and questions, never other workers, however it was started.

    Gossip and mingle tell of work of which the ledger knows more, and each of their messages is taken apart in the worker's main
    process, where a malformed one would end it.
    """

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        options = {**(worker_options or {}), "without_gossip": True, "without_mingle": True}
        super().__init__(*args, worker_options=options, **kwargs)
        self._events_at = 0.0

    def on_send_event_buffered(self) -> None:
        """Send events together in a moment, once the job is on its way."""
        at = time.monotonic()
        if self.hub and at >= self._events_at:
            self._events_at = at + EVENTS_S
            self.hub.call_later(EVENTS_S, self._flush_events)

    def stop(self) -> None:
        """Stop; what was to be sent in a moment is sent first."""
        if time.monotonic() < self._events_at:
            self._flush_events()
        super().stop()

    def ensure_connected(self, conn: Any) -> Any:
        """Wait for the broker; by itself Celery would pause for up to 30 s, long after the broker is back."""
        conn.ensure_connection = partial(conn.ensure_connection, interval_start=0.5, interval_step=0.5, interval_max=RECONNECT_S)
        return super().ensure_connected(conn)


class Dispatcher(EventDispatcher):
    """Sends events once.

    Celery repeats a heartbeat for as long as the broker is away, in the main process and deaf to signals: such a worker cannot be
    told to stop.
    """

    def _publish(self, *args: Any, retry: bool = False, **kwargs: Any) -> None:
        super()._publish(*args, retry=False, **kwargs)


class Events(StockEvents):
    """Events by way of `Dispatcher`."""

    dispatcher_cls = "worker.consumer:Dispatcher"

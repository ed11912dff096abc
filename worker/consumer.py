"""Celery's consumer without the messages that workers send each other, and quick to come back."""

from functools import partial
from typing import Any

from celery.worker.consumer import Consumer as StockConsumer

RECONNECT_S = 2.0
"""Longest pause between two attempts to reach the broker."""


class Consumer(StockConsumer):
    """Hears hints and questions, never other workers, however it was started.

    Gossip and mingle tell of work of which the ledger knows more, and each of their messages is taken apart in the worker's main
    process, where a malformed one would end it.
    """

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        options = {**(worker_options or {}), "without_gossip": True, "without_mingle": True}
        super().__init__(*args, worker_options=options, **kwargs)

    def ensure_connected(self, conn: Any) -> Any:
        """Wait for the broker; by itself Celery would pause for up to 30 s, long after the broker is back."""
        conn.ensure_connection = partial(conn.ensure_connection, interval_start=0.5, interval_step=0.5, interval_max=RECONNECT_S)
        return super().ensure_connected(conn)

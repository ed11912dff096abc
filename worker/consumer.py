"""Celery's consumer without the messages that workers send each other."""

from typing import Any

from celery.worker.consumer import Consumer as StockConsumer


class Consumer(StockConsumer):
    """Hears hints and questions, never other workers, however it was started.

    Gossip and mingle tell of work of which the ledger knows more, and each of their messages is taken apart in the worker's main
    process, where a malformed one would end it.
    """

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        options = {**(worker_options or {}), "without_gossip": True, "without_mingle": True}
        super().__init__(*args, worker_options=options, **kwargs)

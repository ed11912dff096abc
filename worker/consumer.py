"""Celery's consumer without what would let a message steer or stop a worker."""

from typing import Any

from celery.worker.consumer import Consumer as StockConsumer
from celery.worker.control import Panel

COMMANDS = frozenset({
    "active", "active_queues", "clock", "conf", "disable_events", "enable_events", "heartbeat", "ping", "query_task", "registered",
    "report", "reserved", "revoked", "scheduled", "stats",
})  # fmt: skip
"""Remote commands that a worker obeys: those that look. Jobs are cancelled in the ledger and workers stopped by a signal, so
`shutdown`, `cancel_consumer`, `revoke`, `rate_limit` and their like would only be ways to stop a worker with one message."""


class Consumer(StockConsumer):
    """Hears hints and questions, not the other workers.

    Gossip and mingle are chatter between workers about work of which the ledger knows more, and each of its messages is parsed
    in the worker's main process.
    """

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for name in set(Panel.data) - COMMANDS:
            del Panel.data[name]
        options = {**(worker_options or {}), "without_gossip": True, "without_mingle": True}
        super().__init__(*args, worker_options=options, **kwargs)

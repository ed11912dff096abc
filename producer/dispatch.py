"""Dispatch: queued rows become hints on the broker. Anybody may run it at any time; SQL decides who gets what."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import structlog

from contentfactory.errors import ServiceUnavailable
from contentfactory.settings import Settings
from db import lifecycle, waiting
from db.choice import Hint
from db.session import Database

if TYPE_CHECKING:
    from producer.publish import Publisher

log = structlog.get_logger(__name__)

LOOK, LOOK_MOST = 512, 4096
"""Queued rows of a project that are looked at in one go: at first, and at most."""

TOP_UP = 1024
"""Jobs after which a call that only tops up goes back to its work: the next comes soon, and commits wait meanwhile."""


class Dispatcher:
    """Moves queued jobs to the broker, up to the cap of each queue.

    Args:
        database: The ledger.
        publisher: Connection to the broker.
        settings: Caps.
    """

    def __init__(self, database: Database, publisher: "Publisher", settings: Settings) -> None:
        self.database = database
        self.publisher = publisher
        self.settings = settings

    def dispatch(self, queues: Iterable[str] | None = None, *, top_up: bool = False, patient: bool | None = None, spare: bool = False) -> int:
        """Dispatch what fits.

        Args:
            queues: Only these; every queue with queued jobs where left out.
            top_up: Leave queues alone in which more than half of what may be in flight still is: for callers that come
                by often, each time after a little room was made.
            patient: Whether to wait while somebody else dispatches or takes from a queue; it is left alone otherwise. Left out, who only
                tops up does not wait.
            spare: Leave queues alone whose workers take what there is by themselves: see `lifecycle.dispatch`.

        Returns:
            Number of jobs sent. A broker that is away is no error: the jobs stay queued.
        """
        if queues is None:
            with self.database.read() as conn:
                queues = waiting.queues_with_work(conn)
        step = partial(lifecycle.dispatch, cap_s=self.settings.inflight_s, top_up=top_up, patient=not top_up if patient is None else patient, spare=spare)
        sent = 0
        for queue in queues:
            window = LOOK
            while True:
                hints = self.database.run(partial(step, queue=queue, window=window), durable=False)
                if not hints:
                    break
                if not self.send(hints):
                    return sent
                moved = sum(len(hint.ids) for hint in hints)
                sent += moved
                if moved < window or (top_up and sent >= TOP_UP):
                    break  # all that was seen; whatever was held back waits for room or for company
                # Small jobs: look further ahead, so that a round trip moves more of them.
                window = min(2 * window, LOOK_MOST)
        return sent

    def send(self, hints: Sequence[Hint]) -> bool:
        """Publish what a committed transaction dispatched; what the broker does not take is queued again.

        Returns:
            Whether it took all of them.

        Raises:
            ServiceUnavailable: If neither the broker nor the ledger answers: the timer finds these jobs.
        """
        unsent = self.publisher.send(hints)
        if not unsent:
            return True
        ids = [i for hint in unsent for i in hint.ids]
        self.database.run(partial(lifecycle.undispatch, ids=ids))
        log.warning("broker_unavailable", action="undispatch", queue=unsent[0].queue, jobs=len(ids))
        return False

    def rescue(self, queues: Iterable[str], margin_s: float = 5.0) -> dict[str, int]:
        """Queue jobs again whose hints the broker has lost.

        Args:
            queues: Queues to look at.
            margin_s: A hint younger than this may still be on its way into a worker's hands.

        Returns:
            Number of jobs by queue, where there were any.
        """
        oldest: dict[str, float | None] = {}
        with suppress(ServiceUnavailable):
            for queue in queues:
                oldest[queue] = self.publisher.oldest(queue)
        if not oldest:
            return {}
        with self.database.write() as conn:
            lost = {queue: lifecycle.rescue_dispatched(conn, queue, at, margin_s) for queue, at in oldest.items()}
        lost = {queue: n for queue, n in lost.items() if n}
        for queue, n in lost.items():
            log.warning("hints_lost", action="rescue", queue=queue, jobs=n)
        return lost

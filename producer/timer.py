"""The timer: the safety net under everything that normally happens at once. Several may run; SQL keeps them apart.

Run it with ``python -m producer.timer``.
"""

import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import Connection

from contentfactory.errors import FactoryError, ServiceUnavailable
from contentfactory.jobs.spec import QUEUES, load_kinds
from contentfactory.process import collect_rarely
from contentfactory.settings import Settings, load_settings
from contentfactory.states import BatchState
from db import batches, counters, lifecycle
from db.session import Database
from producer.dispatch import Dispatcher
from producer.enqueue import Producer
from producer.logs import configure_logs
from producer.publish import Publisher
from producer.services import open_store
from producer.sweep import sweep

if TYPE_CHECKING:
    from producer.metrics import Metrics

log = structlog.get_logger(__name__)


class Timer:
    """Dispatches, rescues, folds, closes and expands, each at its own pace.

    Args:
        settings: Periods and caps.
        database: The ledger.
        publisher: Connection to the broker.
        producer: Expands batches.
        metrics: Told what each round did, where metrics are wanted.
    """

    def __init__(
        self, settings: Settings, database: Database, publisher: Publisher, producer: Producer, metrics: "Metrics | None" = None
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.database = database
        self.dispatcher = Dispatcher(database, publisher, settings)
        self.producer = producer

    def tick(self) -> None:
        """One quick round: expand, dispatch, fold and close. Raises what an expansion ran into, after all else is done."""
        with self.database.read() as conn:
            moving = batches.moving(conn)
        unread: Exception | None = None
        for batch_id, state in moving:
            if state == BatchState.CANCELLING:
                self.database.run(partial(lifecycle.cancel_batch, batch_id=batch_id))
            try:
                self.producer.expand(batch_id, seconds=self.settings.dispatch_period_s)
            except Exception as error:
                # The storage with its manifest is away, say: it goes on from there later, and nothing else waits for that.
                unread = error
        # Whoever holds the turn may have been stopped in it, and leases have to be looked at all the same.
        self.dispatcher.dispatch(patient=False, spare=True)
        self.database.run(_fold_and_close)
        if unread is not None:
            raise unread

    def rescue(self) -> None:
        """One slow round: leases, lost hints, stuck graphs."""
        s = self.settings
        states = self.database.run(lambda conn: lifecycle.reap(conn, lease_s=s.lease_s, period_s=s.reaper_period_s))
        if states:
            log.warning("leases_expired", action="reap", **states)
        for queue, lost in self.dispatcher.rescue(QUEUES).items():
            if self.metrics:
                self.metrics.hints_lost(queue, lost)
        stuck = self.database.run(lifecycle.unblock_stuck)
        if stuck:
            log.warning("blocked_jobs_freed", action="unblock", jobs=stuck)

    def _sweep(self) -> None:
        try:
            sweep(self.settings, self.database, self.producer.store)
        except FactoryError as error:
            log.warning("sweep_failed", action="sweep", code=error.code, error=error.message)
        except Exception:
            log.exception("sweep_failed", action="sweep")

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop; a service that is away is waited for."""
        next_rescue = 0.0
        sweeper: threading.Thread | None = None
        # Not at the very start: a crash loop of the timer must not become a loop of sweeps.
        next_sweep = time.monotonic() + self.settings.sweep_period_s / 10
        while not stop.is_set():
            started, outcome = time.monotonic(), "failed"
            try:
                # Last comes what may fail for one batch's sake: leases are looked at whatever it runs into.
                if started >= next_rescue:
                    next_rescue = started + self.settings.reaper_period_s
                    self.rescue()
                if started >= next_sweep and (sweeper is None or not sweeper.is_alive()):
                    next_sweep = started + self.settings.sweep_period_s
                    # A listing of millions of objects takes its time; dispatch and rescue must not wait for it.
                    sweeper = threading.Thread(target=self._sweep, name="sweep", daemon=True)
                    sweeper.start()
                self.tick()
                outcome = "ok"
            except ServiceUnavailable as error:
                outcome = "unavailable"
                log.warning("service_unavailable", action="timer", error=error.message)
            except FactoryError as error:
                log.error("timer_round_failed", action="timer", code=error.code, error=error.message)
            except Exception:
                # The net must not tear: whatever went wrong in this round, the next one comes.
                log.exception("timer_round_failed", action="timer")
            if self.metrics:
                self.metrics.round(outcome)
            stop.wait(max(0.05, self.settings.dispatch_period_s - (time.monotonic() - started)))


def _fold_and_close(conn: Connection) -> None:
    counters.fold_counts(conn)
    counters.close_batches(conn)


def main() -> None:
    """Entry point of the timer process."""
    settings = load_settings()
    configure_logs(settings)
    load_kinds()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    database = Database(settings.database())
    publisher = Publisher(settings)
    metrics, server = None, None
    if settings.metrics_port:
        from producer.metrics import Metrics

        metrics = Metrics(database, publisher)
        server = metrics.serve(settings.metrics_host, settings.metrics_port)
    timer = Timer(settings, database, publisher, Producer(settings, database, open_store(settings), publisher), metrics)
    log.info("timer_started", action="start", metrics_port=server.port if server else None)
    collect_rarely(first=False)
    timer.run(stop)
    if server:
        server.close()
    publisher.close()
    database.close()


if __name__ == "__main__":
    main()

"""Prometheus metrics of the whole factory, worked out from the ledger, and the timer's health checks.

The timer serves them (``FACTORY_METRICS_PORT``): one place to scrape, whatever the number of workers, and workers need no
port. Gauges are read from SQL; counters are fed from the event log as it grows, so that each ended attempt counts once. Two
timers show the same figures (take ``max`` over instances), except for ``factory_timer_*`` and ``factory_hints_lost_total``,
which count what that timer itself did.

Labels are kinds, queues, states, phases and error classes: a bounded set. Nothing that a user wrote ever becomes a label.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from contentfactory.errors import ServiceUnavailable
from contentfactory.jobs.spec import QUEUES, get_kind, load_kinds
from contentfactory.states import BatchState, JobState, Priority
from db import measurements
from db.measurements import Ended, Present
from db.session import Database
from producer.publish import Publisher
from producer.transport import REASONS

log = structlog.get_logger(__name__)

REFRESH_S = 5.0
"""Shortest time between two looks at the ledger, however often somebody scrapes."""
DUTY = 0.05
"""Largest part of the time that looking may take: a backlog of millions is counted less often, not at a higher price."""
CATCH_UP_S = 4.0
"""Longest time that one scrape spends on events, well below Prometheus' limit of ten seconds; the rest waits for the next."""
STALLED_S = 120.0
"""Seconds without a round of the timer after which its health check fails."""

CLASSES = ("input", "policy", "transient", "resource", "crash", "released", "deadline", "bug", "cancelled", "dependency")
PHASES = ("wait", "inputs", "compute", "upload")
_PHASE_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200)
_JOB_BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200, 43_200, 172_800)


def _one_of(value: str | None, allowed: Collection[str]) -> str:
    return value if value is not None and value in allowed else "other"


def _band(priority: int) -> str:
    if priority >= Priority.INTERACTIVE:
        return "interactive"
    return "normal" if priority >= Priority.NORMAL else "bulk"


class Metrics:
    """The figures of one ledger.

    Args:
        database: The ledger.
        publisher: Broker to look at; left out, its figures are missing.
        clock: Monotonic clock, seconds; tests hand in their own.
    """

    def __init__(self, database: Database, publisher: Publisher | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._database, self._publisher, self._clock = database, publisher, clock
        self._lock = threading.Lock()
        self._kinds = frozenset(load_kinds())
        self._present: Present | None = None
        self._broker: dict[str, int] | None = None
        self._quarantined: dict[str, int] = {}
        self._cursor: int | None = None
        self._next = 0.0
        self._round_at = clock()
        self._round_ok = False
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Gauges(self))
        r = self.registry
        self._ended = Counter("factory_jobs_ended", "jobs that reached a terminal state", ("queue", "kind", "state"), registry=r)
        self._reused = Counter("factory_jobs_reused", "jobs that took an earlier equal result", ("queue", "kind"), registry=r)
        self._errors = Counter(
            "factory_job_errors", "attempts that ended with an error, by its class", ("queue", "kind", "error_class"), registry=r
        )
        self._retries = Counter("factory_job_retries", "jobs queued again, by the class of their error", ("queue", "error_class"), registry=r)
        self._leases = Counter("factory_leases_lost", "attempts ended because their worker was gone", ("queue",), registry=r)
        self._job_s = Histogram(
            "factory_job_seconds", "seconds from acceptance to success", ("queue", "band"), buckets=_JOB_BUCKETS, registry=r
        )
        self._phase_s = Histogram(
            "factory_phase_seconds", "seconds that a job spent in a phase of its attempt", ("queue", "phase"), buckets=_PHASE_BUCKETS, registry=r
        )
        self._device_s = Counter("factory_device_seconds", "seconds that micro-batches computed", ("queue", "kind"), registry=r)
        self._loads = Counter("factory_model_loads", "models loaded into memory", ("queue",), registry=r)
        self._groups = Counter("factory_micro_batches", "micro-batches that ended", ("queue", "kind"), registry=r)
        self._group_jobs = Counter("factory_micro_batch_jobs", "jobs in micro-batches that ended", ("queue", "kind"), registry=r)
        self._group_slots = Counter(
            "factory_micro_batch_slots", "jobs that those micro-batches could have held (the kind's max_group)", ("queue", "kind"), registry=r
        )
        self._bytes = Counter("factory_stored_bytes", "bytes of published artifacts", ("queue", "kind"), registry=r)
        self._batches = Counter("factory_batches_ended", "batches that finished", ("state",), registry=r)
        self._hints = Counter("factory_hints_lost", "jobs queued again because the broker lost their message", ("queue",), registry=r)
        self._rounds = Counter("factory_timer_rounds", "rounds of this timer", ("outcome",), registry=r)
        self._look_s = Gauge("factory_metrics_look_seconds", "seconds that the last look at the ledger took", registry=r)
        # A series that only appears with its first event hides that event from rate(): start those that alerts are made of.
        for queue in QUEUES:
            self._leases.labels(queue)
            self._hints.labels(queue)
            self._loads.labels(queue)
        for outcome in ("ok", "unavailable", "failed"):
            self._rounds.labels(outcome)

    # --- what the timer tells ---

    def round(self, outcome: str) -> None:
        """Note a round of the timer: ``ok``, ``unavailable`` (a service was away) or ``failed``."""
        self._rounds.labels(outcome).inc()
        self._round_at, self._round_ok = self._clock(), outcome == "ok"

    def hints_lost(self, queue: str, jobs: int) -> None:
        """Note jobs whose messages the broker had lost."""
        self._hints.labels(_one_of(queue, QUEUES)).inc(jobs)

    @property
    def alive(self) -> bool:
        """Whether the timer turns, with or without its services."""
        return self._clock() - self._round_at < STALLED_S

    @property
    def ready(self) -> bool:
        """Whether the timer's last round did its work."""
        return self.alive and self._round_ok

    # --- looking ---

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format, after a look at the ledger where the last one is old enough."""
        with self._lock:
            self._refresh()
        return generate_latest(self.registry)

    def _refresh(self) -> None:
        started = self._clock()
        if started < self._next:
            return
        begun = time.perf_counter()
        try:
            with self._database.read(transaction=True) as conn:
                self._present = measurements.present(conn)
            self._catch_up()
        except ServiceUnavailable as error:
            # Old figures would look like a quiet factory: show none, and that there are none.
            self._present = None
            log.warning("metrics_unavailable", action="metrics", error=error.message)
        self._broker = self._waiting()
        took = time.perf_counter() - begun
        self._look_s.set(took)
        self._next = started + max(REFRESH_S, took / DUTY)

    def _catch_up(self) -> None:
        if self._cursor is None:
            with self._database.read() as conn:
                self._cursor = measurements.newest_event(conn)
            return
        until = time.perf_counter() + CATCH_UP_S
        more = True
        while more and time.perf_counter() < until:
            with self._database.read() as conn:
                past = measurements.past(conn, self._cursor)
            for one in past.ended:
                self._count(one)
            for state, n in past.batches.items():
                self._batches.labels(_one_of(state, tuple(BatchState))).inc(n)
            self._cursor, more = past.cursor, past.more

    def _count(self, one: Ended) -> None:
        queue, kind = _one_of(one.queue, QUEUES), _one_of(one.kind, self._kinds)
        error_class = _one_of(one.error_class, CLASSES)
        if one.state is None:
            self._retries.labels(queue, error_class).inc()
        else:
            self._ended.labels(queue, kind, _one_of(one.state, tuple(JobState))).inc()
        if one.error_class is not None:
            self._errors.labels(queue, kind, error_class).inc()
        if one.error_code == "worker_lost":
            self._leases.labels(queue).inc()
        if one.state == JobState.SUCCEEDED:
            self._bytes.labels(queue, kind).inc(one.stored_bytes)
            if one.reused:
                self._reused.labels(queue, kind).inc()
            if one.job_seconds is not None:
                self._job_s.labels(queue, _band(one.priority)).observe(max(0.0, one.job_seconds))
        if not one.phases or one.group_size < 1:
            return
        for phase in PHASES:
            seconds = one.phases.get(f"{phase}_s")
            if isinstance(seconds, int | float):
                self._phase_s.labels(queue, phase).observe(max(0.0, seconds))
        # What belongs to the micro-batch stands with each of its members: each brings its part.
        part = 1.0 / one.group_size
        self._device_s.labels(queue, kind).inc(part * max(0.0, float(one.phases.get("compute_s", 0.0))))
        self._loads.labels(queue).inc(part * max(0.0, float(one.phases.get("model_loads", 0.0))))
        self._groups.labels(queue, kind).inc(part)
        self._group_jobs.labels(queue, kind).inc()
        if kind != "other":
            self._group_slots.labels(queue, kind).inc(part * get_kind(kind).max_group)

    def _waiting(self) -> dict[str, int] | None:
        if self._publisher is None:
            return None
        try:
            self._quarantined = self._publisher.quarantined()
            return {queue: self._publisher.waiting(queue) for queue in QUEUES}
        except ServiceUnavailable:
            return None

    def gauges(self) -> Iterable[Metric]:
        """The present as metric families."""
        now = self._present
        yield _gauge("factory_ledger_up", "whether the ledger answered", (), [((), now is not None)])
        if self._publisher is not None:
            waiting = self._broker
            yield _gauge("factory_broker_up", "whether the broker answered", (), [((), waiting is not None)])
            if waiting is not None:
                rows = [((queue,), n) for queue, n in waiting.items()]
                yield _gauge("factory_broker_messages", "micro-batches that wait in the broker", ("queue",), rows)
                refused = CounterMetricFamily(
                    "factory_broker_quarantined", "items on the broker that were no messages of ours", labels=("reason",)
                )
                for reason in REASONS:
                    refused.add_metric([reason], self._quarantined.get(reason, 0))
                yield refused
        if now is None:
            return
        jobs: dict[tuple[str, ...], float] = {}
        for (queue, kind, state), n in now.jobs.items():
            key = (_one_of(queue, QUEUES), _one_of(kind, self._kinds), state)
            jobs[key] = jobs.get(key, 0) + n
        yield _gauge("factory_jobs", "jobs that are queued, dispatched or running", ("queue", "kind", "state"), jobs.items())
        states = ("queued", "dispatched", "running")
        yield _gauge(
            "factory_queue_seconds", "estimated compute seconds of those jobs, on the reference CPU", ("queue", "state"),
            [((queue, state), now.seconds.get((queue, state), 0.0)) for queue in QUEUES for state in states],
        )  # fmt: skip
        yield _gauge(
            "factory_queue_age_seconds", "how long the oldest job that may start has waited for a worker", ("queue",),
            [((queue,), now.age.get(queue, 0.0)) for queue in QUEUES],
        )  # fmt: skip
        yield _gauge("factory_queue_paused", "whether the queue is paused", ("queue",), [((q,), q in now.paused) for q in QUEUES])
        yield _gauge("factory_workers", "live workers that serve the queue", ("queue",), [((q,), now.workers.get(q, 0)) for q in QUEUES])
        yield _gauge("factory_workers_held_jobs", "jobs that live workers hold", (), [((), now.busy)])
        yield _gauge("factory_models_loaded", "models in the memory of live workers", (), [((), now.models)])
        yield _gauge("factory_leases_overdue", "running jobs whose lease ran out and that nobody rescued yet", (), [((), now.overdue)])
        open_states = (BatchState.EXPANDING, BatchState.RUNNING, BatchState.CANCELLING)
        yield _gauge("factory_batches_open", "batches that are not finished", ("state",), [((s,), now.batches.get(s, 0)) for s in open_states])
        kinds: dict[tuple[str, ...], float] = {}
        for kind, n in now.open_jobs.items():
            name = _one_of(kind, self._kinds)
            kinds[(name,)] = kinds.get((name,), 0) + n
        yield _gauge("factory_batch_jobs_open", "jobs of open batches that have not ended, blocked ones included", ("kind",), kinds.items())
        if now.reaper_age is not None:
            yield _gauge("factory_reaper_age_seconds", "seconds since any timer looked for expired leases", (), [((), now.reaper_age)])

    # --- serving ---

    def application(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """The WSGI application: ``/metrics``, ``/healthz`` (the timer turns) and ``/readyz`` (and its services answer)."""
        path = environ.get("PATH_INFO", "")
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            status, kind, body = "405 Method Not Allowed", "text/plain; charset=utf-8", b"GET only\n"
        elif path == "/metrics":
            status, kind, body = "200 OK", CONTENT_TYPE_LATEST, self.exposition()
        elif path in ("/healthz", "/readyz"):
            good = self.alive if path == "/healthz" else self.ready
            status = "200 OK" if good else "503 Service Unavailable"
            kind, body = "text/plain; charset=utf-8", b"ok\n" if good else b"not ok\n"
        else:
            status, kind, body = "404 Not Found", "text/plain; charset=utf-8", b"/metrics, /healthz, /readyz\n"
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("X-Content-Type-Options", "nosniff")]
        start_response(status, headers)
        return [b"" if environ.get("REQUEST_METHOD") == "HEAD" else body]

    def serve(self, host: str, port: int) -> "MetricsServer":
        """Serve from a thread of its own until the server is closed.

        Raises:
            OSError: If the port is taken.
        """
        return MetricsServer(self, host, port)


def _gauge(name: str, help_: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(name, help_, labels=labels)
    for values, value in rows:
        family.add_metric([str(v) for v in values], float(value))
    return family


class _Gauges:
    """Hands the present to the registry."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.gauges()


class _Handler(WSGIRequestHandler):
    timeout = 10

    def log_message(self, *_: Any) -> None:
        """A scrape every few seconds is no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class MetricsServer:
    """A small HTTP server in a thread.

    Args:
        metrics: What it serves.
        host: Address to listen on.
        port: Port; 0 takes a free one.

    Attributes:
        port: The port that it listens on.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        self._server = _Server((host, port), _Handler)
        self._server.set_app(metrics.application)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

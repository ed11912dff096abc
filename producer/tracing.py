"""Traces of jobs from acceptance to commit with OpenTelemetry, where it is installed and an endpoint is set.

A job's trace id is its own id: both are 128 bits, so the 32 hexadecimal digits behind ``job_`` are what to look for in the
tracing system, nothing has to be stored or sent along, and each attempt on whatever worker lands in the same trace. The worker
makes an attempt's spans after its commit out of the times that it noted anyway; the code on the way knows nothing of tracing.

``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``) turns it on; the other ``OTEL_*`` variables work as
their specification says, ``OTEL_TRACES_SAMPLER`` first of all: with a million jobs, sample.
"""

import hashlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from contentfactory.states import JobState

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

log = structlog.get_logger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


@dataclass(frozen=True)
class Attempted:
    """An attempt as the tracer wants to know it; times are unix seconds by the ledger's clock.

    Attributes:
        job_id: The job.
        kind: Its kind.
        queue: Its queue.
        attempt: Number of the attempt.
        group_size: Jobs in its micro-batch.
        model: Model version, where the kind takes one.
        created_at: When the job was accepted.
        dispatched_at: When its hint was sent.
        started_at: When it was claimed.
        uploads_at_s: Seconds from the claim until the commit's thread began to wait for the uploads.
        phases: Seconds of ``inputs_s``, ``compute_s`` and ``upload_s``.
        state: The job's state after the commit; ``queued`` where it is tried again.
        error_code: Code of the error, where there was one.
    """

    job_id: str
    kind: str
    queue: str
    attempt: int
    group_size: int
    model: str | None
    created_at: float
    dispatched_at: float | None
    started_at: float
    uploads_at_s: float
    phases: Mapping[str, float]
    state: JobState | None
    error_code: str | None = None


def trace_id(job_id: str) -> int:
    """The trace of a job: its id as a number of 128 bits."""
    return int(job_id.rpartition("_")[2], 16)


def root_span_id(job_id: str) -> int:
    """The span of the job's whole life, known before it is written: attempts refer to it from any worker."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8], "big") or 1


def open_tracer(service: str, exporter: "SpanExporter | None" = None) -> "Tracer | None":
    """A tracer, if OpenTelemetry is installed and configured; None otherwise, and then tracing costs nothing.

    Args:
        service: Last part of the service's name.
        exporter: Where to send spans; by default what the environment configures.
    """
    if exporter is None:
        disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        if disabled or not any(os.environ.get(name) for name in _ENDPOINTS):
            return None
    try:
        return Tracer(service, exporter)
    except ImportError as error:
        log.warning("tracing_unavailable", action="trace", error=str(error), mend="install opentelemetry-sdk and its OTLP exporter")
        return None


class Tracer:
    """Writes the spans of attempts; use `open_tracer`.

    Args:
        service: Last part of the service's name.
        exporter: Where to send spans; OTLP over HTTP where left out.

    Raises:
        ImportError: If the SDK or the exporter is not installed.
    """

    def __init__(self, service: str, exporter: "SpanExporter | None" = None) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        wanted = threading.local()

        class Ids(RandomIdGenerator):
            """Random ids, except for the one span whose ids follow from its job."""

            def generate_trace_id(self) -> int:
                return getattr(wanted, "trace", None) or super().generate_trace_id()

            def generate_span_id(self) -> int:
                return getattr(wanted, "span", None) or super().generate_span_id()

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
        self._wanted = wanted
        # The sampler that the environment asks for decides about jobs; spans of a job that it took are all written.
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler
        # A provider of our own: an application that embeds the producer may have a global one with other plans.
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create({"service.namespace": "contentfactory", "service.name": f"contentfactory-{service}"}),
            id_generator=Ids(),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("contentfactory")

    def attempt(self, it: Attempted) -> None:
        """Write the spans of an attempt, and with a terminal state that of the whole job. Never raises."""
        try:
            self._attempt(it)
        except Exception as error:
            # A broken tracing system is no reason to lose a committed group's place in the log.
            log.warning("trace_failed", action="trace", job=it.job_id, error=f"{type(error).__name__}: {error}")

    def _attempt(self, it: Attempted) -> None:
        from opentelemetry.sdk.trace.sampling import Decision

        trace = trace_id(it.job_id)
        # A function of the id, so every worker decides alike about one job. Not the id itself: half of it is a time stamp and
        # fixed bits, which a sampler by ratio would take for chance.
        lot = int.from_bytes(hashlib.sha256(it.job_id.encode()).digest()[8:24], "big")
        if self._sampler.should_sample(None, lot, "job").decision is not Decision.RECORD_AND_SAMPLE:
            return
        common: dict[str, Any] = {"factory.job": it.job_id, "factory.kind": it.kind, "factory.queue": it.queue}
        if it.model:
            common["factory.model"] = it.model
        # Everything on the ledger's clock: the claim's time plus what the worker's stopwatch said since.
        inputs, compute = float(it.phases.get("inputs_s", 0.0)), float(it.phases.get("compute_s", 0.0))
        computed = it.started_at + inputs + compute
        uploads = max(computed, it.started_at + it.uploads_at_s)
        uploaded = uploads + float(it.phases.get("upload_s", 0.0))
        ended = max(uploaded, min(time.time(), uploaded + 60.0))
        root = root_span_id(it.job_id)
        failed = it.error_code is not None
        if it.state is not None and JobState(it.state).terminal:
            self._wanted.trace, self._wanted.span = trace, root
            try:
                attributes = {**common, "factory.state": str(it.state), "factory.attempt": it.attempt}
                self._span("job", it.created_at, ended, attributes, error=it.error_code)
            finally:
                self._wanted.trace = self._wanted.span = None
        own = self._span(
            "attempt", it.dispatched_at or it.started_at, ended,
            {**common, "factory.attempt": it.attempt, "factory.group_size": it.group_size, "factory.state": str(it.state or "")},
            parent=(trace, root), error=it.error_code,
        )  # fmt: skip
        for name, start, end in (
            ("claim", it.dispatched_at or it.started_at, it.started_at),
            ("inputs", it.started_at, it.started_at + inputs),
            ("compute", it.started_at + inputs, computed),
            ("upload", uploads, uploaded),
            ("commit", uploaded, ended),
        ):
            if name == "upload" and failed:
                continue
            self._span(name, start, end, common, parent=(trace, own))

    def _span(
        self, name: str, start: float, end: float, attributes: Mapping[str, Any], *,
        parent: tuple[int, int] | None = None, error: str | None = None,
    ) -> int:  # fmt: skip
        from opentelemetry.context import Context
        from opentelemetry.trace import (
            NonRecordingSpan,
            SpanContext,
            Status,
            StatusCode,
            TraceFlags,
            set_span_in_context,
        )

        context = Context()
        if parent is not None:
            over = SpanContext(parent[0], parent[1], is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
            context = set_span_in_context(NonRecordingSpan(over), context)
        span = self._tracer.start_span(name, context=context, attributes=dict(attributes), start_time=int(start * 1e9))
        if error:
            span.set_attribute("error.type", error)
            # The code only: a message may quote what the user wrote.
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(end_time=int(max(start, end) * 1e9))
        return span.get_span_context().span_id

    def close(self) -> None:
        """Send what waits and stop."""
        self._provider.shutdown()

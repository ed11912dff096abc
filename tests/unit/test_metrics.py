"""Figures for Prometheus come out of the ledger, count everything once, and never carry what a user wrote; traces likewise."""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from silent import Silent
from sqlalchemy import update

from contentfactory.errors import ServiceUnavailable
from contentfactory.jobs.spec import get_kind
from contentfactory.settings import load_settings
from contentfactory.states import JobState
from db import lifecycle, measurements
from db.ended import NewArtifact
from db.lifecycle import Stop, Success
from db.models import Job
from producer import tracing
from producer.metrics import STALLED_S, Metrics
from producer.timer import Timer

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-7f3d-prompt"


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Broker:
    """A broker with three messages on each queue, or none at all."""

    away = False

    def waiting(self, queue):
        if self.away:
            raise ServiceUnavailable("away", code="broker_unavailable")
        return 3

    def quarantined(self):
        if self.away:
            raise ServiceUnavailable("away", code="broker_unavailable")
        return {"too_large": 2, CANARY: 1}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(sqlite_database, clock, monkeypatch):
    monkeypatch.setattr(measurements, "SETTLE_S", 0.0)
    return Metrics(sqlite_database, Broker(), clock)


@pytest.fixture
def database(sqlite_database):
    return sqlite_database


@pytest.fixture
def look(metrics, clock):
    """Scrape after the shortest time between two looks; gives sample name and labels → value."""

    def run():
        clock.now += 60.0
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(metrics.exposition().decode())
            for sample in family.samples
        }

    return run


def of(samples, name, **labels):
    return samples.get((name, frozenset(labels.items())))


def claim(database, ids, worker="w"):
    return database.run(lambda conn: lifecycle.claim(conn, ids, worker, 30.0))


def succeed(database, claimed, size=100, **phases):
    made = tuple(
        Success(c.id, c.attempt, (NewArtifact("text.txt", f"k/{c.id}", "0" * 64, size, "text/plain"),), phases=phases)
        for c in claimed
    )
    return database.run(lambda conn: lifecycle.finish(conn, made))


def test_the_present(look, make_jobs, database):
    ids = make_jobs(5, seconds=2.0, params={"text": CANARY})
    claim(database, ids[:2])
    database.run(lambda conn: lifecycle.report_worker(conn, "w", ["text", "image"], "cpu", 2, ["a", "b"]))
    database.run(lambda conn: lifecycle.pause(conn, "queue", "audio", True))
    database.run(lambda conn: conn.execute(update(Job).where(Job.id == ids[4]).values(created_at=Job.created_at - 100)))
    database.run(lambda conn: conn.execute(update(Job).where(Job.id == ids[0]).values(lease_until=1.0)))
    now = look()
    assert of(now, "factory_jobs", queue="text", kind="text.echo", state="queued") == 3
    assert of(now, "factory_jobs", queue="text", kind="text.echo", state="running") == 2
    assert of(now, "factory_queue_seconds", queue="text", state="queued") == 6.0
    assert 100 <= of(now, "factory_queue_age_seconds", queue="text") < 130
    assert of(now, "factory_queue_age_seconds", queue="image") == 0
    assert of(now, "factory_workers", queue="image") == 1 and of(now, "factory_workers", queue="video") == 0
    assert of(now, "factory_workers_held_jobs") == 2 and of(now, "factory_models_loaded") == 2
    assert of(now, "factory_queue_paused", queue="audio") == 1 and of(now, "factory_queue_paused", queue="text") == 0
    assert of(now, "factory_leases_overdue") == 1
    assert of(now, "factory_broker_messages", queue="text") == 3
    assert of(now, "factory_broker_quarantined_total", reason="too_large") == 2
    assert of(now, "factory_ledger_up") == 1 and of(now, "factory_broker_up") == 1


def test_a_paused_project_does_not_age(look, make_jobs, database, project):
    [job] = make_jobs(1)
    database.run(lambda conn: conn.execute(update(Job).where(Job.id == job).values(created_at=Job.created_at - 100)))
    database.run(lambda conn: lifecycle.pause(conn, "project", project, True))
    assert of(look(), "factory_queue_age_seconds", queue="text") == 0


def test_what_ended_before_the_start_is_not_counted_and_everything_after_once(look, make_jobs, database):
    succeed(database, claim(database, make_jobs(2)))
    look()
    group = claim(database, make_jobs(8, priority=100))
    succeed(database, group, size=10, wait_s=0.5, inputs_s=0.01, compute_s=4.0, upload_s=0.2, model_loads=1)
    for _ in range(3):
        after = look()
    labels = {"queue": "text", "kind": "text.echo"}
    assert of(after, "factory_jobs_ended_total", **labels, state="succeeded") == 8
    assert of(after, "factory_device_seconds_total", **labels) == pytest.approx(4.0)
    assert of(after, "factory_model_loads_total", queue="text") == pytest.approx(1.0)
    assert of(after, "factory_micro_batches_total", **labels) == pytest.approx(1.0)
    assert of(after, "factory_micro_batch_jobs_total", **labels) == 8
    assert of(after, "factory_micro_batch_slots_total", **labels) == pytest.approx(get_kind("text.echo").max_group)
    assert of(after, "factory_stored_bytes_total", **labels) == 80
    assert of(after, "factory_phase_seconds_count", queue="text", phase="compute") == 8
    assert of(after, "factory_phase_seconds_sum", queue="text", phase="wait") == pytest.approx(4.0)
    assert of(after, "factory_job_seconds_count", queue="text", band="interactive") == 8


def test_errors_retries_and_lost_leases(look, make_jobs, database):
    look()
    bad, lost, slow = claim(database, make_jobs(3))
    error = {"type": "input", "code": "bad_file", "message": CANARY}
    database.run(lambda conn: lifecycle.stop(conn, Stop(bad.id, bad.attempt, error, {"compute_s": 1.0})))
    database.run(lambda conn: lifecycle.crash(conn, [(lost.id, lost.attempt)], "gone"))
    database.run(lambda conn: lifecycle.stop(conn, Stop(slow.id, slow.attempt, {"type": "transient", "code": "storage"})))
    after = look()
    assert of(after, "factory_jobs_ended_total", queue="text", kind="text.echo", state="failed") == 1
    assert of(after, "factory_job_errors_total", queue="text", kind="text.echo", error_class="input") == 1
    assert of(after, "factory_job_retries_total", queue="text", error_class="crash") == 1
    assert of(after, "factory_job_retries_total", queue="text", error_class="transient") == 1
    assert of(after, "factory_leases_lost_total", queue="text") == 1
    assert of(after, "factory_leases_lost_total", queue="video") == 0


def test_nothing_that_a_user_wrote_shows(metrics, look, make_jobs, database):
    look()
    ids = make_jobs(2, params={"text": CANARY}, labels={"note": CANARY}, custom_id=None, model=None)
    [one, two] = claim(database, ids)
    error = {"type": CANARY, "code": CANARY, "message": CANARY}
    database.run(lambda conn: lifecycle.stop(conn, Stop(one.id, one.attempt, error)))
    succeed(database, [two], **{CANARY + "_s": 1.0})
    # A row of a kind that is installed no longer must not open a new series either.
    database.run(lambda conn: conn.execute(update(Job).where(Job.id == two.id).values(kind=CANARY, queue=CANARY)))
    look()
    text = metrics.exposition().decode()
    assert CANARY not in text and two.id not in text
    assert 'kind="other"' in text


def test_no_ledger_no_old_figures(metrics, look, clock, make_jobs, database, monkeypatch):
    make_jobs(1)
    assert of(look(), "factory_jobs", queue="text", kind="text.echo", state="queued") == 1

    def away(conn):
        raise ServiceUnavailable("away")

    monkeypatch.setattr(measurements, "present", away)
    metrics._publisher.away = True
    after = look()
    assert of(after, "factory_ledger_up") == 0 and of(after, "factory_broker_up") == 0
    assert of(after, "factory_jobs", queue="text", kind="text.echo", state="queued") is None


def test_many_scrapes_are_one_look(metrics, clock, monkeypatch):
    looks = []
    monkeypatch.setattr(measurements, "present", lambda conn: looks.append(1) or measurements.Present())
    for _ in range(5):
        metrics.exposition()
    assert len(looks) == 1
    clock.now += 6.0
    metrics.exposition()
    assert len(looks) == 2


def test_a_long_log_is_read_in_pieces(database, make_jobs, metrics, look):
    look()
    for start in range(0, 12, 3):
        succeed(database, claim(database, make_jobs(3, rank=start)))
    with database.read() as conn:
        first = measurements.past(conn, 0, limit=2)
        assert first.more and len(first.ended) == 6, "one event speaks for the three of a micro-batch"
        rest = measurements.past(conn, first.cursor, limit=500)
    assert not rest.more and len(rest.ended) == 6


def test_health_follows_the_timer(metrics, clock, database):
    class Idle:
        def send(self, hints):
            return []

        def oldest(self, queue):
            return None

    settings = load_settings(state_dir=ROOT / ".factory", dispatch_period_s=0.01)
    timer = Timer(settings, database, Idle(), None, metrics)  # type: ignore[arg-type]
    assert metrics.alive and not metrics.ready

    class Once:
        """An event that is set after one round."""

        done = False

        def is_set(self):
            return self.done

        def wait(self, seconds):
            self.done = True

    timer.run(Once())  # type: ignore[arg-type]
    assert metrics.alive and metrics.ready
    timer.tick = lambda: (_ for _ in ()).throw(ServiceUnavailable("away"))  # type: ignore[method-assign]
    timer.run(Once())  # type: ignore[arg-type]
    assert metrics.alive and not metrics.ready
    clock.now += STALLED_S + 1
    assert not metrics.alive


def test_the_server_answers(metrics):
    server = metrics.serve("127.0.0.1", 0)
    try:
        base = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(f"{base}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert b"factory_ledger_up 1.0" in answer.read()
        with urllib.request.urlopen(f"{base}/healthz") as answer:
            assert answer.status == 200
        for path, status in (("/readyz", 503), ("/etc/passwd", 404)):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(base + path)
            assert error.value.code == status
            error.value.close()
    finally:
        server.close()


def names_in(expression):
    return set(re.findall(r"\bfactory_\w+", expression))


def test_alarms_and_dashboard_ask_for_metrics_that_exist(metrics, look, database, make_jobs):
    look()
    ok, bad = claim(database, make_jobs(2))
    succeed(database, [ok], compute_s=1.0)
    database.run(lambda conn: lifecycle.stop(conn, Stop(bad.id, bad.attempt, {"type": "input", "code": "x"})))
    database.run(lambda conn: lifecycle.reap(conn, lease_s=30, period_s=5))
    look()
    known = set()
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        known.add(family.name)
        known.update(sample.name for sample in family.samples)
        if family.type == "counter":
            known.add(f"{family.name}_total")
        if family.type == "histogram":
            known.update(f"{family.name}_{part}" for part in ("bucket", "sum", "count"))
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    alarms = [rule for group in rules["groups"] for rule in group["rules"]]
    assert len(alarms) >= 10
    operations = (ROOT / "docs/operations.md").read_text()
    for rule in alarms:
        assert names_in(rule["expr"]) <= known, rule["alert"]
        assert names_in(rule["expr"]) or "up{" in rule["expr"], rule["alert"]
        assert f"### {rule['alert']}" in operations, f"{rule['alert']} is not explained in docs/operations.md"
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/factory.json").read_text())
    panels = [p for p in dashboard["panels"] if p["type"] != "row"]
    assert len(panels) >= 12
    asked = {target["expr"] for panel in panels for target in panel["targets"]}
    for expression in asked:
        assert names_in(expression) and names_in(expression) <= known, expression
    # What is exported is shown or alarmed about, or it is not worth its price.
    shown = set().union(*(names_in(e) for e in asked), *(names_in(r["expr"]) for r in alarms))
    silent = {name for name in known if not any(s.startswith(name.removesuffix("_total")) for s in shown)}
    assert {n for n in silent if not n.endswith(("_created", "_bucket", "_sum", "_count"))} == set()


# --- traces ---


def test_no_endpoint_no_tracer(monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert tracing.open_tracer("worker") is None


def attempted(job_id, attempt=1, state=JobState.SUCCEEDED, code=None):
    return tracing.Attempted(
        job_id, "text.echo", "text", attempt, 4, "model@1", 100.0, 101.0, 102.0, 3.0,
        {"inputs_s": 0.5, "compute_s": 2.0, "upload_s": 0.25}, state, code,
    )  # fmt: skip


def test_one_trace_from_acceptance_to_commit_over_two_attempts():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    job = "job_0197c1d2e5f17a3c8e0b4a6d9c2f1e77"
    # Two workers know nothing of each other, and yet write into one trace.
    for number, (state, code) in enumerate([(JobState.QUEUED, "storage_unavailable"), (JobState.SUCCEEDED, None)], 1):
        tracer = tracing.open_tracer("worker", exporter)
        tracer.attempt(attempted(job, number, state, code))
        tracer._provider.force_flush()
    spans = exporter.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in spans} == {job.removeprefix("job_")}
    [root] = [span for span in spans if span.name == "job"]
    assert root.parent is None
    tries = [span for span in spans if span.name == "attempt"]
    assert [span.parent.span_id for span in tries] == [root.context.span_id] * 2
    assert [span.status.is_ok for span in tries] == [False, True]
    assert tries[0].attributes["error.type"] == "storage_unavailable"
    last = {span.name: span for span in spans if span.parent and span.parent.span_id == tries[1].context.span_id}
    assert list(last) == ["claim", "inputs", "compute", "upload", "commit"]
    assert last["compute"].end_time - last["compute"].start_time == 2_000_000_000
    assert last["claim"].start_time == 101_000_000_000
    assert root.start_time == 100_000_000_000 and root.end_time >= last["commit"].end_time
    assert "model@1" in root.attributes.values()


def test_sampling_is_decided_by_the_job(monkeypatch):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    from contentfactory.ids import new_id

    ids = [new_id("job") for _ in range(200)]
    found = []
    for _ in range(2):
        exporter = InMemorySpanExporter()
        tracer = tracing.open_tracer("worker", exporter)
        for job in ids:
            tracer.attempt(attempted(job))
        tracer._provider.force_flush()
        found.append({span.context.trace_id for span in exporter.get_finished_spans()})
        tracer.close()
    assert found[0] == found[1]
    assert 20 <= len(found[0]) <= 90


def test_a_broken_exporter_hurts_nobody():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer = tracing.open_tracer("worker", exporter)
    tracer._tracer = None
    tracer.attempt(attempted("job_0197c1d2e5f17a3c8e0b4a6d9c2f1e77"))
    tracer.close()
    assert exporter.get_finished_spans() == ()


def test_a_workers_group_is_traced_and_its_loads_are_counted(database, make_jobs, metrics, look, tmp_path):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from storage.memory import MemoryStore
    from worker.execution import Executor

    look()
    executor = Executor(load_settings(state_dir=tmp_path, device="cpu"), database, MemoryStore(), Silent(), keeper=False)
    exporter = InMemorySpanExporter()
    assert executor.tracer is None
    executor.tracer = tracing.open_tracer("worker", exporter)
    ids = [make_jobs(1, params={"text": f"{CANARY} {n}"})[0] for n in range(3)]
    executor.run("text.echo", ids)
    executor.close()
    spans = exporter.get_finished_spans()
    for job in ids:
        mine = [span.name for span in spans if span.context.trace_id == tracing.trace_id(job)]
        assert sorted(mine) == ["attempt", "claim", "commit", "compute", "inputs", "job", "upload"]
    assert CANARY not in "".join(span.to_json() for span in spans)
    after = look()
    assert of(after, "factory_micro_batches_total", queue="text", kind="text.echo") == pytest.approx(1)
    assert of(after, "factory_model_loads_total", queue="text") == 0
    assert of(after, "factory_phase_seconds_count", queue="text", phase="upload") == 3

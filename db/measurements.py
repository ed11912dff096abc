"""What the metrics are made of: what waits and runs now, and what has ended since the last look.

Every query is bounded: the present is read through the partial indexes of jobs that are not finished, the past through the
event log by its primary key, so that a ledger of many millions of finished jobs costs no more than an empty one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, and_, case, func, select, text, tuple_

from contentfactory.states import TERMINAL, JobState
from db.models import Artifact, Attempt, Event, Job, Mark, MicroBatch, Queue, Worker
from db.session import now

WORKER_SEEN_S = 60.0
"""How fresh a worker's report must be for it to count as alive."""
SETTLE_S = 3.0
"""Age from which events are read: numbers are given out before the commit, so a younger one may still get a lower neighbour."""
STATEMENT_LIMIT_MS = 10_000


@dataclass(frozen=True)
class Present:
    """The ledger at one moment.

    Attributes:
        jobs: (queue, kind, state) → jobs that are queued, dispatched or running.
        seconds: (queue, state) → their estimated compute seconds.
        age: Queue → seconds that its oldest startable job has waited for a worker.
        overdue: Running jobs whose lease has run out and that no timer has rescued yet.
        paused: Paused queues.
        workers: Queue → live workers that serve it.
        busy: Jobs that live workers say they hold.
        models: Models that live workers have loaded.
        batches: State → batches that are not finished.
        open_jobs: Kind → jobs of those batches that have not ended, blocked ones included.
        reaper_age: Seconds since any timer last looked for expired leases; None where none ever did.
    """

    jobs: dict[tuple[str, str, str], int] = field(default_factory=dict)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    age: dict[str, float] = field(default_factory=dict)
    overdue: int = 0
    paused: frozenset[str] = frozenset()
    workers: dict[str, int] = field(default_factory=dict)
    busy: int = 0
    models: int = 0
    batches: dict[str, int] = field(default_factory=dict)
    open_jobs: dict[str, int] = field(default_factory=dict)
    reaper_age: float | None = None


# The places stand in the text, not in parameters: only so can the planner use the partial index of each.
_ACTIVE = """
    SELECT 'queued' AS state, queue, kind, count(*) AS n, sum(seconds) AS seconds, 0 AS overdue, min(CASE
        WHEN batch_id IN (SELECT id FROM batches WHERE finished_at IS NULL AND paused)
            OR project_id IN (SELECT id FROM projects WHERE paused) THEN NULL
        WHEN run_after > created_at THEN run_after ELSE created_at END) AS since
    FROM jobs WHERE place = 'queued' GROUP BY queue, kind
    UNION ALL
    SELECT 'dispatched', queue, kind, count(*), sum(seconds), 0, min(CASE
        WHEN batch_id IN (SELECT id FROM batches WHERE finished_at IS NULL AND paused)
            OR project_id IN (SELECT id FROM projects WHERE paused) THEN NULL
        WHEN run_after > created_at THEN run_after ELSE created_at END)
    FROM jobs WHERE place = 'flying' AND state = 'dispatched' GROUP BY queue, kind
    UNION ALL
    SELECT 'running', queue, kind, count(*), sum(seconds), sum(CASE WHEN lease_until < :at THEN 1 ELSE 0 END), NULL
    FROM jobs WHERE place = 'flying' AND state = 'running' GROUP BY queue, kind
"""

_OPEN_JOBS = """
    SELECT kind, sum(CASE WHEN state = 'total' THEN n ELSE -n END) AS n FROM (
        SELECT c.kind, c.state, c.n FROM batch_counts c JOIN batches b ON b.id = c.batch_id WHERE b.finished_at IS NULL
        UNION ALL
        SELECT d.kind, d.state, d.n FROM batch_deltas d JOIN batches b ON b.id = d.batch_id WHERE b.finished_at IS NULL
    ) AS counts WHERE state IN ('total', 'succeeded', 'failed', 'dead', 'cancelled') GROUP BY kind
"""


def present(conn: Connection) -> Present:
    """Read what waits and runs."""
    if conn.dialect.name == "postgresql":
        # A look at the figures must not pile up behind a slow database.
        conn.execute(text(f"SET LOCAL statement_timeout = {STATEMENT_LIMIT_MS}"))
    at = float(conn.execute(select(now())).scalar_one())
    jobs: dict[tuple[str, str, str], int] = {}
    seconds: dict[tuple[str, str], float] = {}
    since: dict[str, float] = {}
    overdue = 0
    for row in conn.execute(text(_ACTIVE), {"at": at}):
        jobs[row.queue, row.kind, row.state] = int(row.n)
        seconds[row.queue, row.state] = seconds.get((row.queue, row.state), 0.0) + float(row.seconds or 0.0)
        overdue += int(row.overdue or 0)
        if row.since is not None:
            since[row.queue] = min(since.get(row.queue, at), float(row.since))
    live = conn.execute(select(Worker.queues, Worker.running, Worker.models).where(Worker.seen_at > at - WORKER_SEEN_S)).all()
    workers: Counter[str] = Counter(queue for row in live for queue in row.queues)
    open_batches = conn.execute(text("SELECT state, count(*) AS n FROM batches WHERE finished_at IS NULL GROUP BY state")).all()
    reaper = conn.execute(select(Mark.value).where(Mark.name == "reaper")).scalar()
    return Present(
        jobs=jobs,
        seconds=seconds,
        age={queue: max(0.0, at - start) for queue, start in since.items()},
        overdue=overdue,
        paused=frozenset(conn.execute(select(Queue.name).where(Queue.paused)).scalars()),
        workers=dict(workers),
        busy=sum(row.running for row in live),
        models=sum(len(row.models) for row in live),
        batches={row.state: int(row.n) for row in open_batches},
        open_jobs={row.kind: int(row.n) for row in conn.execute(text(_OPEN_JOBS))},
        reaper_age=None if reaper is None else max(0.0, at - float(reaper)),
    )


@dataclass(frozen=True)
class Ended:
    """One attempt that has ended.

    Attributes:
        kind: Kind of the job.
        queue: Its queue.
        state: The job's terminal state; None where it is tried again.
        priority: Priority of the job.
        error_class: Class of the error, where it ended with one.
        error_code: Its code.
        job_seconds: From acceptance to the end, for a terminal state.
        group_size: Jobs in its micro-batch; 0 where the job ended without an attempt.
        phases: Seconds (and counts) of the attempt, as the worker noted them; the same for each member of a micro-batch.
        stored_bytes: Size of the artifacts that it published.
        reused: Whether it took an earlier equal result.
    """

    kind: str
    queue: str
    state: str | None
    priority: int
    error_class: str | None
    error_code: str | None
    job_seconds: float | None
    group_size: int
    phases: dict[str, Any]
    stored_bytes: int
    reused: bool = False


@dataclass(frozen=True)
class Past:
    """What happened after a given event.

    Attributes:
        cursor: Number of the last event that was read; ask for what comes after it next time.
        ended: Attempts that ended.
        batches: State → batches that finished.
        more: Whether there is more to read at once.
    """

    cursor: int
    ended: tuple[Ended, ...] = ()
    batches: dict[str, int] = field(default_factory=dict)
    more: bool = False


_JOB_TYPES = tuple(f"job.{state}" for state in sorted(TERMINAL))
_GROUP_TYPES = tuple(f"jobs.{state}" for state in sorted(TERMINAL))
_BATCH_TYPES = ("batch.completed", "batch.failed", "batch.cancelled")
_TYPES = (*_JOB_TYPES, *_GROUP_TYPES, *_BATCH_TYPES, "job.retrying")


def newest_event(conn: Connection) -> int:
    """Number of the newest event; 0 where there is none."""
    return int(conn.execute(select(func.coalesce(func.max(Event.id), 0))).scalar_one())


def past(conn: Connection, after: int, limit: int = 500) -> Past:
    """Read what ended since an event.

    Args:
        conn: Connection.
        after: Number of the last event that is known.
        limit: Most events to read; an event of a micro-batch speaks for all its jobs.
    """
    edge = float(conn.execute(select(now())).scalar_one()) - SETTLE_S
    query = select(Event.id, Event.type, Event.job_id, Event.data).where(Event.id > after, Event.at <= edge)
    events = conn.execute(query.where(Event.type.in_(_TYPES)).order_by(Event.id).limit(limit)).all()
    if not events:
        return Past(after)
    batches: Counter[str] = Counter()
    ends: list[tuple[str, int | None, str | None, dict[str, Any]]] = []  # job, attempt (None: its last), state, error
    for event in events:
        group, _, state = event.type.partition(".")
        data = event.data or {}
        if group == "batch":
            batches[state] += 1
        elif event.type == "job.retrying":
            ends.append((event.job_id, data.get("attempt"), None, data.get("error") or {}))
        else:
            ids = data.get("jobs", ()) if group == "jobs" else (event.job_id,)
            ends += [(job_id, None, state, data.get("error") or {}) for job_id in ids]
    return Past(events[-1].id, _ended(conn, ends), dict(batches), len(events) == limit)


def _ended(conn: Connection, ends: Sequence[tuple[str, int | None, str | None, dict[str, Any]]]) -> tuple[Ended, ...]:
    out = []
    # Whose attempt has no row of its own: what the members of a micro-batch share stands in its row.
    shared = and_(Attempt.job_id.is_(None), Job.state == JobState.SUCCEEDED, Job.micro_batch.is_not(None))
    for start in range(0, len(ends), 400):
        chunk = ends[start : start + 400]
        jobs = {
            row.id: row
            for row in conn.execute(
                select(
                    Job.id, Job.kind, Job.queue, Job.priority, Job.created_at, Job.finished_at, Job.reused_from, Job.attempt,
                    func.coalesce(Attempt.group_size, case((shared, Job.group_size))).label("group_size"),
                    func.coalesce(Attempt.phases, MicroBatch.phases).label("phases"),
                )
                .outerjoin(Attempt, and_(Attempt.job_id == Job.id, Attempt.attempt == Job.attempt))
                .outerjoin(MicroBatch, and_(MicroBatch.id == Job.micro_batch, shared))
                .where(Job.id.in_([e[0] for e in chunk]))
            )
        }  # fmt: skip
        # An attempt that was followed by another is rare; that of most jobs came with the job.
        keys = [(e[0], e[1]) for e in chunk if e[1] is not None and e[0] in jobs and jobs[e[0]].attempt != e[1]]
        earlier: dict[tuple[str, int | None], Any] = {}
        if keys:
            columns = (Attempt.job_id, Attempt.attempt, Attempt.group_size, Attempt.phases)
            query = select(*columns).where(tuple_(Attempt.job_id, Attempt.attempt).in_(keys))
            earlier = {(row.job_id, row.attempt): row for row in conn.execute(query)}
        # A reused result points at bytes that were stored before.
        fresh = [e[0] for e in chunk if e[2] == "succeeded" and e[0] in jobs and jobs[e[0]].reused_from is None]
        stored = select(Artifact.job_id, func.sum(Artifact.size)).where(Artifact.job_id.in_(fresh)).group_by(Artifact.job_id)
        sizes: dict[str, int] = {str(job_id): int(size) for job_id, size in conn.execute(stored)} if fresh else {}
        for job_id, number, state, error in chunk:
            job = jobs.get(job_id)
            if job is None:
                continue  # deleted meanwhile
            attempt = job if number is None or number == job.attempt else earlier.get((job_id, number))
            took = job.finished_at - job.created_at if state and job.finished_at else None
            out.append(
                Ended(
                    job.kind, job.queue, state, job.priority, error.get("type"), error.get("code"), took,
                    (attempt.group_size or 0) if attempt else 0, dict(attempt.phases or {}) if attempt else {}, sizes.get(job_id, 0),
                    state == "succeeded" and job.reused_from is not None,
                )
            )  # fmt: skip
    return tuple(out)

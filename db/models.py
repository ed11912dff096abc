"""Tables of the ledger, the same on SQLite and PostgreSQL.

Times are unix seconds (double precision) by the database's own clock. Ids are text made by `contentfactory.ids`. JSON
columns hold what is read back whole and never searched.
"""

from typing import Any, ClassVar

from sqlalchemy import (
    DDL,
    JSON,
    BigInteger,
    Boolean,
    Computed,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    UniqueConstraint,
    event,
    false,
    text,
    true,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ID = String(40).with_variant(String(40, collation="C"), "postgresql")
# SQLite only counts up by itself in a column declared INTEGER.
ZERO = text("0")
EMPTY = text("'{}'")
SERIAL = BigInteger().with_variant(Integer(), "sqlite")


class Base(DeclarativeBase):
    """Base of the tables, with constraint names that migrations can rely on."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON(), list[Any]: JSON(), float: Double(), int: Integer()}


class Project(Base):
    """Whose jobs they are; the unit of fairness and of isolation."""

    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    weight: Mapped[float] = mapped_column(default=1.0)
    paused: Mapped[bool] = mapped_column(Boolean, default=False)
    created_at: Mapped[float]


class Share(Base):
    """Virtual time of a project on a queue: compute seconds dispatched, divided by its weight."""

    __tablename__ = "shares"
    queue: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ID, ForeignKey("projects.id"), primary_key=True)
    virtual_seconds: Mapped[float] = mapped_column(default=0.0)


class Queue(Base):
    """Switches of a queue; a queue without a row has the defaults."""

    __tablename__ = "queues"
    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    paused: Mapped[bool] = mapped_column(Boolean, default=False)


class Batch(Base):
    """What a user submitted together."""

    __tablename__ = "batches"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    project_id: Mapped[str] = mapped_column(ID, ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(300))
    state: Mapped[str] = mapped_column(String(16))
    paused: Mapped[bool] = mapped_column(Boolean, default=False)
    priority: Mapped[int] = mapped_column(SmallInteger, default=0)
    source: Mapped[dict[str, Any]] = mapped_column(default=dict)
    source_digest: Mapped[str | None] = mapped_column(String(64))
    cursor: Mapped[int] = mapped_column(BigInteger, default=0)
    expander: Mapped[str | None] = mapped_column(String(200))
    expander_until: Mapped[float | None]
    total: Mapped[int] = mapped_column(BigInteger, default=0)
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_hash: Mapped[str | None] = mapped_column(String(64))
    retry_of: Mapped[str | None] = mapped_column(ID)
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    __table_args__ = (
        UniqueConstraint("project_id", "idempotency_key"),
        Index("ix_batches_project", "project_id", "id"),
        Index("ix_batches_open", "state", postgresql_where=text("finished_at IS NULL"), sqlite_where=text("finished_at IS NULL")),
    )


class BatchCount(Base):
    """Folded counters of a batch by kind and state (``total`` and the terminal states)."""

    __tablename__ = "batch_counts"
    batch_id: Mapped[str] = mapped_column(ID, ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(80), primary_key=True)
    state: Mapped[str] = mapped_column(String(16), primary_key=True)
    n: Mapped[int] = mapped_column(BigInteger, default=0)


class BatchDelta(Base):
    """Changes of those counters, appended so that no row is fought over; the timer folds them."""

    __tablename__ = "batch_deltas"
    id: Mapped[int] = mapped_column(SERIAL, primary_key=True, autoincrement=True)
    batch_id: Mapped[str] = mapped_column(ID, index=True)
    kind: Mapped[str] = mapped_column(String(80))
    state: Mapped[str] = mapped_column(String(16))
    n: Mapped[int] = mapped_column(BigInteger)


PLACE = "CASE WHEN state IN ('dispatched', 'running') THEN 'flying' ELSE state END"
"""Where the indexes find a job. Going from the broker into a worker's hands it stays in its place, so that a claim touches no index."""
_QUEUED = text("place = 'queued'")
_FLYING = text("place = 'flying'")
_RETRIED = text("retry_of IS NOT NULL")
_KEYED = text("idempotency_key IS NOT NULL")
_KEPT = text("result_key IS NOT NULL")
_BLOCKED = text("place = 'blocked'")
_STILL = text("place IN ('blocked', 'queued')")
_WAITING = text("place IN ('blocked', 'queued') AND batch_id IS NOT NULL")
_UNWELL = text("place IN ('failed', 'dead', 'cancelled')")
_SUCCEEDED = text("place = 'succeeded'")
_BATCH_SUCCEEDED = text("place = 'succeeded' AND batch_id IS NOT NULL")
_INPUT = text("role = 'input'")


class Job(Base):
    """One piece of work. Its row is the truth; `db.lifecycle` alone changes its state.

    Written four times in a job's life, so it has few indexes and no foreign keys: each index is paid with each change of state, and
    a foreign key with a lock on the one row of project and batch that all of them share (docs/decisions/0010-hot-path.md). No index may
    name ``state``: it changes with every write, and one that touches no index costs PostgreSQL a third. They go by ``place``; pages are
    left half empty so that the next version of a row finds room beside it.
    """

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    project_id: Mapped[str] = mapped_column(ID)
    batch_id: Mapped[str | None] = mapped_column(ID)
    custom_id: Mapped[str | None] = mapped_column(String(200))
    line: Mapped[int] = mapped_column(BigInteger, default=0, server_default=ZERO)
    kind: Mapped[str] = mapped_column(String(80))
    queue: Mapped[str] = mapped_column(String(40))
    state: Mapped[str] = mapped_column(String(16))
    place: Mapped[str] = mapped_column(String(16), Computed(PLACE))
    priority: Mapped[int] = mapped_column(SmallInteger, default=0, server_default=ZERO)
    # 100 - priority: ascending like rank, so that one plain index serves the dispatcher's order.
    band: Mapped[int] = mapped_column(SmallInteger, default=100, server_default=text("100"))
    rank: Mapped[int] = mapped_column(BigInteger, default=0, server_default=ZERO)
    params: Mapped[dict[str, Any]]
    model: Mapped[str | None] = mapped_column(String(300))
    seed: Mapped[int] = mapped_column(BigInteger, default=0, server_default=ZERO)
    seconds: Mapped[float] = mapped_column(default=1.0, server_default=text("1"))
    share_key: Mapped[str] = mapped_column(String(40))
    result_key: Mapped[str | None] = mapped_column(String(64))
    reuse: Mapped[bool] = mapped_column(Boolean, default=True, server_default=true())
    pending: Mapped[int] = mapped_column(default=0, server_default=ZERO)
    run_after: Mapped[float] = mapped_column(default=0.0, server_default=ZERO)
    attempt: Mapped[int] = mapped_column(default=0, server_default=ZERO)
    strikes: Mapped[int] = mapped_column(SmallInteger, default=0, server_default=ZERO)
    tries: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=EMPTY)
    group_limit: Mapped[int] = mapped_column(default=0, server_default=ZERO)
    group_size: Mapped[int] = mapped_column(default=1, server_default=text("1"))
    # Of its last claim; none while it waits, after an end without a result, and where an earlier release claimed it.
    micro_batch: Mapped[int | None] = mapped_column(BigInteger)
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[float | None]
    cancel_requested: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    progress: Mapped[float | None]
    message: Mapped[str | None] = mapped_column(String(500))
    error: Mapped[dict[str, Any] | None]
    reused_from: Mapped[str | None] = mapped_column(ID)
    retry_of: Mapped[str | None] = mapped_column(ID)
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_hash: Mapped[str | None] = mapped_column(String(64))
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=EMPTY)
    created_at: Mapped[float]
    dispatched_at: Mapped[float | None]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    __table_args__ = (
        Index("uq_jobs_idempotency_key", "project_id", "idempotency_key", unique=True, postgresql_where=_KEYED, sqlite_where=_KEYED),
        Index("ix_jobs_queued", "queue", "project_id", "band", "rank", "id", postgresql_where=_QUEUED, sqlite_where=_QUEUED),
        # What is on the broker and what runs; both are few. By what changes neither with a claim nor with a heartbeat.
        Index("ix_jobs_flying", "queue", "dispatched_at", postgresql_where=_FLYING, sqlite_where=_FLYING),
        Index("ix_jobs_result", "result_key", postgresql_where=_KEPT, sqlite_where=_KEPT),
        # A listing of all jobs of a project or a batch puts places together (`db.places`): each of these indexes is written when a job comes
        # to its place, one of all jobs would be with each change.
        Index("ix_jobs_project_waiting", "project_id", "id", postgresql_where=_STILL, sqlite_where=_STILL),
        Index("ix_jobs_waiting", "batch_id", "line", "id", postgresql_where=_WAITING, sqlite_where=_WAITING),
        # Those without a result are rare: these cost nothing on the way of a job that succeeds.
        Index("ix_jobs_batch_unwell", "batch_id", "line", "id", postgresql_where=_UNWELL, sqlite_where=_UNWELL),
        Index("ix_jobs_unwell", "project_id", "id", postgresql_where=_UNWELL, sqlite_where=_UNWELL),
        # Results are looked at newest first while the newest jobs still wait: without these, all of what waits is walked along.
        Index("ix_jobs_batch_succeeded", "batch_id", "line", "id", postgresql_where=_BATCH_SUCCEEDED, sqlite_where=_BATCH_SUCCEEDED),
        Index("ix_jobs_succeeded", "project_id", "id", postgresql_where=_SUCCEEDED, sqlite_where=_SUCCEEDED),
        Index("ix_jobs_blocked", "id", postgresql_where=_BLOCKED, sqlite_where=_BLOCKED),
        Index("ix_jobs_retry_of", "retry_of", postgresql_where=_RETRIED, sqlite_where=_RETRIED),
        {"postgresql_with": {"fillfactor": 45}},
    )


# The key is written three times in a job's life, next to where it stands already: into pages that are full, each time would split them or
# search them for versions that nobody sees any more.
event.listen(
    Job.__table__, "after_create", DDL("ALTER INDEX pk_jobs SET (fillfactor = 35)").execute_if(dialect="postgresql")  # type: ignore[no-untyped-call]
)


class Dependency(Base):
    """Edge of the graph: the job waits for the parent."""

    __tablename__ = "job_dependencies"
    job_id: Mapped[str] = mapped_column(ID, primary_key=True)
    parent_id: Mapped[str] = mapped_column(ID, primary_key=True, index=True)


class Attempt(Base):
    """One claim of a job by a worker that had no result: what came of it and where the time went.

    What succeeded has a row of its own only where a worker of an earlier release had claimed it; otherwise the job's row and that of its
    `MicroBatch` say as much. The view ``ended_attempts`` shows both.
    """

    __tablename__ = "attempts"
    job_id: Mapped[str] = mapped_column(ID, primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str] = mapped_column(String(200))
    group_size: Mapped[int] = mapped_column(default=1)
    started_at: Mapped[float]
    finished_at: Mapped[float | None]
    outcome: Mapped[str | None] = mapped_column(String(16))
    error: Mapped[dict[str, Any] | None]
    phases: Mapped[dict[str, Any] | None]


class MicroBatch(Base):
    """Jobs that one claim took together, once the first of them has succeeded: who ran them and where the time went.

    One row for all of them, in place of a row in ``attempts`` for each. ``jobs`` counts what was claimed, whatever came of the others;
    times and phases are those of the members that the first commit published. ``Job.micro_batch`` points here.
    """

    __tablename__ = "micro_batches"
    id: Mapped[int] = mapped_column(SERIAL, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(80))
    queue: Mapped[str] = mapped_column(String(40))
    worker: Mapped[str] = mapped_column(String(200))
    jobs: Mapped[int]
    started_at: Mapped[float]
    finished_at: Mapped[float] = mapped_column(index=True)
    phases: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


ENDED_ATTEMPTS = """\
CREATE VIEW ended_attempts AS
SELECT job_id, attempt, worker, group_size, started_at, finished_at, outcome, error, phases FROM attempts
UNION ALL
SELECT j.id, j.attempt, coalesce(m.worker, ''), j.group_size, j.started_at, j.finished_at, 'succeeded', NULL, m.phases
FROM jobs j LEFT JOIN micro_batches m ON m.id = j.micro_batch
WHERE j.place = 'succeeded' AND j.micro_batch IS NOT NULL
AND NOT EXISTS (SELECT 1 FROM attempts a WHERE a.job_id = j.id AND a.attempt = j.attempt)"""
"""Every attempt that has ended, for those who read whole tables. Not for joins by job: SQLite would make all of its rows first.

Where an earlier release ended a job's attempt or claimed it again, the number of the claim before may still stand in the job's row: the row in
``attempts`` is right then.
"""
# Migrations make it too; this is for a schema that is made without them.
event.listen(Base.metadata, "after_create", DDL(ENDED_ATTEMPTS))  # type: ignore[no-untyped-call]


class Artifact(Base):
    """A stored result (or input, or checkpoint): a row that points at immutable bytes."""

    __tablename__ = "artifacts"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    project_id: Mapped[str] = mapped_column(ID)
    job_id: Mapped[str | None] = mapped_column(ID)
    attempt: Mapped[int] = mapped_column(default=0)
    position: Mapped[int] = mapped_column(default=0)
    role: Mapped[str] = mapped_column(String(16), default="output")
    name: Mapped[str] = mapped_column(String(200))
    object_key: Mapped[str] = mapped_column(String(512))
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(120))
    meta: Mapped[dict[str, Any]] = mapped_column(default=dict)
    seed: Mapped[int | None] = mapped_column(BigInteger)
    model: Mapped[str | None] = mapped_column(String(300))
    parents: Mapped[list[Any]] = mapped_column(default=list)
    created_at: Mapped[float]
    __table_args__ = (
        UniqueConstraint("job_id", "name"),
        Index("ix_artifacts_object", "object_key"),
        Index("ix_artifacts_input", "project_id", "sha256", postgresql_where=_INPUT, sqlite_where=_INPUT),
    )


class ModelVersion(Base):
    """A version of a model: where its files lie, what it can do, where it comes from."""

    __tablename__ = "model_versions"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    project_id: Mapped[str] = mapped_column(ID, ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    version: Mapped[str] = mapped_column(String(64))
    engine: Mapped[str] = mapped_column(String(80))
    tasks: Mapped[list[Any]]
    files: Mapped[dict[str, Any]] = mapped_column(default=dict)
    options: Mapped[dict[str, Any]] = mapped_column(default=dict)
    config: Mapped[dict[str, Any]] = mapped_column(default=dict)
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    lineage: Mapped[dict[str, Any]] = mapped_column(default=dict)
    memory_mb: Mapped[int] = mapped_column(default=0)
    job_id: Mapped[str | None] = mapped_column(ID)
    created_at: Mapped[float]
    __table_args__ = (UniqueConstraint("project_id", "name", "version"),)


class ModelTuning(Base):
    """Inference options that were measured for a model version and chosen; the tag is part of the version jobs are pinned to."""

    __tablename__ = "model_tunings"
    project_id: Mapped[str] = mapped_column(ID, ForeignKey("projects.id"), primary_key=True)
    model: Mapped[str] = mapped_column(String(280), primary_key=True)
    tag: Mapped[str] = mapped_column(String(16), primary_key=True)
    device: Mapped[str] = mapped_column(String(40))
    options: Mapped[dict[str, Any]] = mapped_column(default=dict)
    report: Mapped[dict[str, Any]] = mapped_column(default=dict)
    active: Mapped[bool] = mapped_column(Boolean, default=True)
    created_at: Mapped[float]


class Dataset(Base):
    """A registered version of a data set: its digest and its bytes."""

    __tablename__ = "datasets"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    project_id: Mapped[str] = mapped_column(ID, ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    version: Mapped[int] = mapped_column(default=1)
    digest: Mapped[str] = mapped_column(String(64))
    items: Mapped[int] = mapped_column(BigInteger, default=0)
    artifact_id: Mapped[str] = mapped_column(ID, ForeignKey("artifacts.id"))
    meta: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[float]
    __table_args__ = (UniqueConstraint("project_id", "name", "version"), UniqueConstraint("project_id", "name", "digest"))


class Event(Base):
    """What happened, in order: for watchers, webhooks and the story of a job."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(SERIAL, primary_key=True, autoincrement=True)
    at: Mapped[float]
    type: Mapped[str] = mapped_column(String(40))
    project_id: Mapped[str | None] = mapped_column(ID)
    batch_id: Mapped[str | None] = mapped_column(ID)
    job_id: Mapped[str | None] = mapped_column(ID)
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    __table_args__ = (Index("ix_events_job", "job_id", "id"), Index("ix_events_batch", "batch_id", "id"))


class Worker(Base):
    """A worker's child as it last reported itself; for caps, warm-model preference and ``factory doctor``."""

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    queues: Mapped[list[Any]]
    device: Mapped[str] = mapped_column(String(40))
    started_at: Mapped[float]
    seen_at: Mapped[float]
    running: Mapped[int] = mapped_column(default=0)
    models: Mapped[list[Any]] = mapped_column(default=list)


class GroupLimit(Base):
    """What was learned of micro-batches that share a forward pass (kind, model version, shape) on one make of device."""

    __tablename__ = "group_limits"
    share_key: Mapped[str] = mapped_column(String(40), primary_key=True)
    device: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(80))
    model: Mapped[str | None] = mapped_column(String(300))
    # Jobs; 0 where nothing is known. `db.limits.Limit` says what each means.
    most: Mapped[int] = mapped_column(default=0)
    fits: Mapped[int] = mapped_column(default=0)
    refused: Mapped[int] = mapped_column(default=0)
    refusals: Mapped[int] = mapped_column(default=0)
    streak: Mapped[int] = mapped_column(default=0)
    best: Mapped[int] = mapped_column(default=0)
    speed: Mapped[dict[str, Any]] = mapped_column(default=dict)
    how: Mapped[str] = mapped_column(String(16), default="")
    learned_at: Mapped[float]


class Overtaken(Base):
    """The job at the head of a project's queue that others with a warm model have passed, and how many did."""

    __tablename__ = "overtaken"
    queue: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ID, ForeignKey("projects.id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ID)
    passed: Mapped[int] = mapped_column(default=0)


class DoomedObject(Base):
    """An object that the sweep is about to delete: whoever would reference it must put it again first."""

    __tablename__ = "doomed_objects"
    object_key: Mapped[str] = mapped_column(String(512), primary_key=True)
    at: Mapped[float]


class Mark(Base):
    """Small facts of the factory itself by name (time of the last reaper round …)."""

    __tablename__ = "marks"
    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    value: Mapped[float]



"""The life of a job: every change of state, each one fenced, on both databases. No other module writes ``jobs.state``.

All functions take a connection inside a write transaction and only use the database's clock. A caller that does not know
whether its commit took effect may repeat it: an update that finds no row in the state it expects changes nothing.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    Connection,
    Select,
    and_,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    tuple_,
    update,
)

from contentfactory.errors import DependencyFailed, TransientError
from contentfactory.ids import new_id
from contentfactory.jobs.spec import RetryPolicy, get_kind
from contentfactory.states import ACTIVE, TERMINAL, BatchState, JobState, Priority
from db.models import (
    Artifact,
    Attempt,
    Batch,
    BatchCount,
    BatchDelta,
    Dependency,
    DoomedObject,
    Event,
    Job,
    Mark,
    ModelVersion,
    Project,
    Queue,
    Share,
    Worker,
)
from db.session import insert_for, now

CHUNK = 500
"""Ids in one statement: below SQLite's limit on variables, and short transactions on both."""


MARK_S = 60.0
"""How long who marked an object may take to delete it, seconds: attempts that began later than that need not mind the mark."""


@dataclass(frozen=True)
class NewJob:
    """A validated job as `insert_jobs` takes it. ``parents`` are ids of jobs that it waits for."""

    id: str
    project_id: str
    kind: str
    queue: str
    params: dict[str, Any]
    share_key: str
    seconds: float
    seed: int
    model: str | None = None
    batch_id: str | None = None
    custom_id: str | None = None
    line: int = 0
    rank: int = 0
    priority: int = 0
    parents: tuple[str, ...] = ()
    reuse: bool = True
    retry_of: str | None = None
    idempotency_key: str | None = None
    request_hash: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hint:
    """A micro-batch to publish: ids and nothing else."""

    kind: str
    queue: str
    priority: int
    ids: tuple[str, ...]
    dispatched_at: float


@dataclass(frozen=True)
class NewArtifact:
    """An artifact whose object already lies in the store."""

    name: str
    object_key: str
    sha256: str
    size: int
    media_type: str
    role: str = "output"
    meta: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    model: str | None = None
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Success:
    """Result of one job's attempt."""

    job_id: str
    attempt: int
    artifacts: tuple[NewArtifact, ...] = ()
    models: tuple[dict[str, Any], ...] = ()
    result_key: str | None = None
    reused_from: str | None = None
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """End of one job's attempt without a result: an error's dictionary, its class in ``type``."""

    job_id: str
    attempt: int
    error: Mapping[str, Any]
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Claimed:
    """A job that this worker now holds; ``attempt`` is its fence."""

    id: str
    attempt: int
    project_id: str
    batch_id: str | None
    custom_id: str | None
    kind: str
    queue: str
    params: dict[str, Any]
    model: str | None
    seed: int
    reuse: bool
    seconds: float
    priority: int
    created_at: float
    dispatched_at: float | None
    started_at: float


def _chunks(items: Sequence[Any], size: int = CHUNK) -> Iterable[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def database_time(conn: Connection) -> float:
    """The database's clock, unix seconds."""
    return float(conn.execute(select(now())).scalar_one())


# --- accept ---------------------------------------------------------------------------------------------------------


def insert_jobs(conn: Connection, jobs: Sequence[NewJob]) -> int:
    """Write accepted jobs; rows that are already there (a repeated chunk) stay as they are.

    Returns:
        Number of rows that were new.
    """
    if not jobs:
        return 0
    created = database_time(conn)
    states = _lock_parents(conn, {p for job in jobs for p in job.parents} - {job.id for job in jobs})
    rows, edges = [], []
    for job in jobs:
        waits = [p for p in dict.fromkeys(job.parents) if states.get(p) != JobState.SUCCEEDED]
        rows.append(
            {
                "id": job.id, "project_id": job.project_id, "batch_id": job.batch_id, "custom_id": job.custom_id,
                "line": job.line, "rank": job.rank or int(created * 1000) * 1_000_000, "kind": job.kind, "queue": job.queue,
                "state": JobState.BLOCKED if waits else JobState.QUEUED, "priority": job.priority, "band": 100 - job.priority, "params": job.params,
                "model": job.model, "seed": job.seed, "seconds": job.seconds, "share_key": job.share_key,
                "reuse": job.reuse, "pending": len(waits), "retry_of": job.retry_of, "labels": job.labels,
                "idempotency_key": job.idempotency_key, "request_hash": job.request_hash, "created_at": created,
            }
        )  # fmt: skip
        edges += [{"job_id": job.id, "parent_id": p} for p in dict.fromkeys(job.parents)]
    new = _insert_ignore(conn, Job, rows)
    if edges:
        _insert_ignore(conn, Dependency, edges)
    deltas = Counter((j.batch_id, j.kind, "total") for j in jobs if j.batch_id and j.id in new)
    _add_deltas(conn, deltas)
    failed = [p for p, s in states.items() if s in TERMINAL and s != JobState.SUCCEEDED]
    if failed:
        _fail_children(conn, failed)
    return len(new)


def _lock_parents(conn: Connection, ids: set[str]) -> dict[str, str]:
    # Locked, so that a parent cannot end between our look at it and the commit of the edge.
    states: dict[str, str] = {}
    for chunk in _chunks(sorted(ids)):
        query = select(Job.id, Job.state).where(Job.id.in_(chunk)).order_by(Job.id).with_for_update(read=True)
        states.update({row.id: row.state for row in conn.execute(query)})
    return states


def _insert_ignore(conn: Connection, table: type[Any], rows: list[dict[str, Any]]) -> set[str]:
    new: set[str] = set()
    # The number of variables in one statement is bounded on SQLite (32,766) and PostgreSQL (65,535).
    for chunk in _chunks(rows, max(1, 20_000 // max(1, len(rows[0])))):
        statement = insert_for(conn, table).values(list(chunk)).on_conflict_do_nothing()
        if table is Job:
            new.update(conn.execute(statement.returning(Job.id)).scalars())
        else:
            conn.execute(statement)
    return new


def _add_deltas(conn: Connection, deltas: Mapping[Any, int]) -> None:
    rows = [{"batch_id": b, "kind": k, "state": s, "n": n} for (b, k, s), n in deltas.items() if b and n]
    if rows:
        conn.execute(insert(BatchDelta), rows)


def add_event(conn: Connection, type_: str, *, project_id: str | None = None, batch_id: str | None = None,
              job_id: str | None = None, data: Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Append an event."""
    conn.execute(
        insert(Event).values(
            at=now(), type=type_, project_id=project_id, batch_id=batch_id, job_id=job_id, data=dict(data or {})
        )
    )


# --- dispatch -------------------------------------------------------------------------------------------------------


def queues_with_work(conn: Connection) -> list[str]:
    """Queues that have queued jobs, found by skipping along the index."""
    return _skip_scan(conn, "SELECT min(queue) FROM jobs WHERE state = 'queued' AND queue > :after", {})


def _skip_scan(conn: Connection, sql: str, params: dict[str, Any]) -> list[str]:
    found: list[str] = []
    after = ""
    while (value := conn.execute(text(sql), {**params, "after": after}).scalar()) is not None:
        found.append(value)
        after = value
    return found


def dispatch(conn: Connection, queue: str, *, cap_s: float, max_jobs: int = 4096, window: int = 256,
             worker_seen_s: float = 60.0) -> list[Hint]:  # fmt: skip
    """Turn queued rows into micro-batches and mark them ``dispatched``. Publish the hints after the commit.

    Highest priority first; inside a band the project with the least virtual time (compute seconds over weight) goes next.
    Within a project, jobs in order of rank; whoever may share the head's forward pass and lies within the window goes along.

    Args:
        conn: Connection in a write transaction.
        queue: Queue to serve.
        cap_s: Compute seconds that may be in the broker for each live worker of the queue.
        max_jobs: Most jobs in one call.
        window: Rows looked at per project.
        worker_seen_s: How fresh a worker's report must be for it to count.

    Returns:
        Micro-batches in the order in which to publish them.
    """
    if conn.dialect.name == "postgresql":
        # Dispatchers of one queue take turns; SQLite's write lock does the same.
        conn.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"dispatch:{queue}"})
    if conn.execute(select(Queue.paused).where(Queue.name == queue)).scalar():
        return []
    at = database_time(conn)
    flying = conn.execute(
        select(func.coalesce(func.sum(Job.seconds), 0.0), func.count()).where(Job.queue == queue, Job.state == JobState.DISPATCHED)
    ).one()
    live = conn.execute(select(Worker.queues).where(Worker.seen_at > at - worker_seen_s)).scalars()
    workers = max(1, sum(1 for queues in live if queue in queues))
    room_s, room_jobs = cap_s * workers - float(flying[0]), 2 * workers - int(flying[1])
    if room_s <= 0 and room_jobs <= 0:
        return []
    candidates = _candidates(conn, queue, at, window)
    if not candidates:
        return []
    shares = dict(conn.execute(select(Share.project_id, Share.virtual_seconds).where(Share.queue == queue)).all())
    weights = dict(conn.execute(select(Project.id, Project.weight).where(Project.id.in_(list(candidates)))).all())
    # A project that was idle joins at the level of the least advanced busy one: idleness earns no credit to burst with.
    floor = min((shares[p] for p in candidates if p in shares), default=0.0)
    virtual = {p: max(shares.get(p, floor), floor) for p in candidates}
    hints: list[tuple[str, int, list[str], float]] = []
    taken = 0
    idle = int(flying[1]) == 0
    while candidates and (room_s > 0 or room_jobs > 0) and taken < max_jobs:
        project = min(candidates, key=lambda p: (-candidates[p][0].priority, virtual[p], p))
        rows = candidates[project]
        head = rows[0]
        spec = get_kind(head.kind)
        limit = min(spec.max_group, head.group_limit or spec.max_group)
        group: list[Any] = []
        rest: list[Any] = []
        for row in rows:
            fits = row.share_key == head.share_key and row.priority == head.priority and len(group) < limit
            if fits and (row is head or len(group) < (row.group_limit or limit)):
                group.append(row)
            else:
                rest.append(row)
        alone_too_early = (
            len(group) < limit and spec.wait_s > 0 and not idle and head.priority < Priority.INTERACTIVE
            and at - max(head.created_at, head.run_after) < spec.wait_s
        )  # fmt: skip
        if rest:
            candidates[project] = rest
        else:
            del candidates[project]
        if alone_too_early:
            continue
        cost = sum(row.seconds for row in group)
        virtual[project] += cost / max(weights.get(project, 1.0), 1e-6)
        room_s -= cost
        room_jobs -= len(group)
        taken += len(group)
        hints.append((head.kind, head.priority, [row.id for row in group], cost))
        idle = False
    ids = [i for hint in hints for i in hint[2]]
    marked: set[str] = set()
    for chunk in _chunks(ids):
        statement = (
            update(Job)
            .where(Job.id.in_(chunk), Job.state == JobState.QUEUED)
            .values(state=JobState.DISPATCHED, dispatched_at=literal(at))
            .returning(Job.id)
        )
        marked.update(conn.execute(statement).scalars())
    for project, value in virtual.items():
        statement_ = insert_for(conn, Share).values(queue=queue, project_id=project, virtual_seconds=value)
        conn.execute(
            statement_.on_conflict_do_update(
                index_elements=[Share.queue, Share.project_id], set_={"virtual_seconds": statement_.excluded.virtual_seconds}
            )
        )
    out = []
    for kind, priority, members, _ in hints:
        kept = tuple(i for i in members if i in marked)
        if kept:
            out.append(Hint(kind, queue, priority, kept, at))
    return out


def _candidates(conn: Connection, queue: str, at: float, window: int) -> dict[str, list[Any]]:
    sql = "SELECT min(project_id) FROM jobs WHERE state = 'queued' AND queue = :queue AND project_id > :after"
    projects = _skip_scan(conn, sql, {"queue": queue})
    if not projects:
        return {}
    paused = set(conn.execute(select(Project.id).where(Project.paused)).scalars())
    held = select(Batch.id).where(Batch.finished_at.is_(None), or_(Batch.paused, Batch.state == BatchState.CANCELLING))
    per_project = max(32, min(window, 8192 // len(projects)))
    found: dict[str, list[Any]] = {}
    for project in projects:
        if project in paused:
            continue
        query = (
            select(Job.id, Job.kind, Job.priority, Job.share_key, Job.seconds, Job.group_limit, Job.created_at, Job.run_after)
            .where(Job.state == text("'queued'"), Job.queue == queue, Job.project_id == project, Job.run_after <= at)
            .where(or_(Job.batch_id.is_(None), Job.batch_id.not_in(held)))
            .order_by(Job.band, Job.rank, Job.id)
            .limit(per_project)
        )
        if conn.dialect.name == "postgresql":
            query = query.with_for_update(skip_locked=True, of=Job)
        rows = list(conn.execute(query))
        if rows:
            found[project] = rows
    return found


def undispatch(conn: Connection, ids: Sequence[str]) -> int:
    """Put jobs back whose hint could not be published."""
    n = 0
    for chunk in _chunks(ids):
        statement = update(Job).where(Job.id.in_(chunk), Job.state == JobState.DISPATCHED).values(state=JobState.QUEUED, dispatched_at=None)
        n += conn.execute(statement).rowcount
    return n


def rescue_dispatched(conn: Connection, queue: str, before: float) -> int:
    """Queue jobs again whose hint is lost.

    Args:
        conn: Connection in a write transaction.
        queue: Queue.
        before: Dispatch time of the oldest hint that still waits in the broker (now, less a margin, where none waits):
            the broker hands hints out in order, so an older one that nobody claimed is gone.
    """
    statement = (
        update(Job)
        .where(Job.queue == queue, Job.state == JobState.DISPATCHED, Job.dispatched_at < before)
        .values(state=JobState.QUEUED, dispatched_at=None)
    )
    return conn.execute(statement).rowcount


# --- claim and heartbeat --------------------------------------------------------------------------------------------


_CLAIMED = (
    Job.id, Job.attempt, Job.project_id, Job.batch_id, Job.custom_id, Job.kind, Job.queue, Job.params, Job.model,
    Job.seed, Job.reuse, Job.seconds, Job.priority, Job.created_at, Job.dispatched_at, Job.started_at,
)  # fmt: skip
"""Columns of `Claimed`, in its order."""


def claim(conn: Connection, ids: Sequence[str], worker: str, lease_s: float) -> list[Claimed]:
    """Take jobs for this worker. Whatever is not due, not waiting, cancelled or paused is left out: drop its hint.

    Returns:
        The claimed jobs in the order of ``ids``.
    """
    held_batches = select(Batch.id).where(Batch.finished_at.is_(None), or_(Batch.paused, Batch.state == BatchState.CANCELLING))
    held_projects = select(Project.id).where(Project.paused)
    held_queues = select(Queue.name).where(Queue.paused)
    wanted = Job.state.in_((JobState.QUEUED, JobState.DISPATCHED))
    held = or_(
        and_(Job.batch_id.is_not(None), Job.batch_id.in_(held_batches)),
        Job.project_id.in_(held_projects),
        Job.queue.in_(held_queues),
    )
    claimed: dict[str, Claimed] = {}
    for chunk in _chunks(list(dict.fromkeys(ids))):
        free: Select[Any] = (
            select(Job.id).where(Job.id.in_(chunk), wanted, ~Job.cancel_requested, Job.run_after <= now(), ~held).order_by(Job.id)
        )
        if conn.dialect.name == "postgresql":
            free = free.with_for_update(skip_locked=True, of=Job)
        mine = list(conn.execute(free).scalars())
        if not mine:
            continue
        statement = (
            update(Job)
            .where(Job.id.in_(mine), wanted)
            .values(
                state=JobState.RUNNING, attempt=Job.attempt + 1, lease_owner=worker, lease_until=now() + lease_s,
                started_at=now(), progress=None, message=None, group_size=len(ids),
            )
            .returning(*_CLAIMED)
        )  # fmt: skip
        for row in conn.execute(statement):
            claimed[row.id] = Claimed(*row)
    # A hint of a paused job is used up: the row waits in SQL again.
    for chunk in _chunks([i for i in ids if i not in claimed]):
        conn.execute(
            update(Job).where(Job.id.in_(chunk), Job.state == JobState.DISPATCHED, held).values(state=JobState.QUEUED, dispatched_at=None)
        )
    if claimed:
        size = len(claimed)
        if size != len(ids):
            conn.execute(update(Job).where(Job.id.in_(list(claimed)), Job.state == JobState.RUNNING).values(group_size=size))
        conn.execute(
            insert(Attempt),
            [{"job_id": c.id, "attempt": c.attempt, "worker": worker, "group_size": size, "started_at": c.started_at} for c in claimed.values()],
        )
    return [claimed[i] for i in dict.fromkeys(ids) if i in claimed]


def claimed_by(conn: Connection, ids: Sequence[str], worker: str) -> list[Claimed]:
    """Those of the jobs that this worker holds already: what a claim took whose answer was lost."""
    held: list[Claimed] = []
    for chunk in _chunks(list(dict.fromkeys(ids))):
        query = select(*_CLAIMED).where(Job.id.in_(chunk), Job.state == JobState.RUNNING, Job.lease_owner == worker).order_by(Job.id)
        held += [Claimed(*row) for row in conn.execute(query)]
    return held


@dataclass(frozen=True)
class Beat:
    """Answer to a heartbeat: which of the jobs are not ours any more, and which were asked to stop."""

    lost: frozenset[tuple[str, int]]
    cancelled: frozenset[tuple[str, int]]


def heartbeat(conn: Connection, held: Mapping[tuple[str, int], tuple[float | None, str | None]], lease_s: float) -> Beat:
    """Extend leases and note progress.

    Args:
        conn: Connection in a write transaction.
        held: (job id, attempt) → (progress in [0, 1] or None, message or None) of everything this worker runs.
        lease_s: New length of the lease from now, seconds.
    """
    alive: dict[tuple[str, int], bool] = {}
    for chunk in _chunks(list(held)):
        statement = (
            update(Job)
            .where(tuple_(Job.id, Job.attempt).in_(chunk), Job.state == JobState.RUNNING)
            .values(lease_until=now() + lease_s)
            .returning(Job.id, Job.attempt, Job.cancel_requested)
        )
        alive.update({(row.id, row.attempt): row.cancel_requested for row in conn.execute(statement)})
    for key, (progress, message) in held.items():
        if key in alive and (progress is not None or message):
            conn.execute(
                update(Job)
                .where(Job.id == key[0], Job.attempt == key[1], Job.state == JobState.RUNNING)
                .values(progress=progress, message=(message or "")[:500] or None)
            )
    return Beat(frozenset(k for k in held if k not in alive), frozenset(k for k, c in alive.items() if c))


def report_worker(conn: Connection, worker: str, queues: Sequence[str], device: str, running: int, models: Sequence[str]) -> None:
    """Note that a worker's child is alive, what it serves and which models it holds."""
    values = {"queues": list(queues), "device": device, "running": running, "models": list(models)}
    statement = insert_for(conn, Worker).values(id=worker, started_at=now(), seen_at=now(), **values)
    conn.execute(statement.on_conflict_do_update(index_elements=[Worker.id], set_={"seen_at": now(), **values}))


def forget_worker(conn: Connection, worker: str) -> None:
    """A worker's child ended in order."""
    conn.execute(delete(Worker).where(Worker.id == worker))


# --- the end of an attempt ------------------------------------------------------------------------------------------


def finish(conn: Connection, results: Sequence[Success]) -> list[str]:
    """Commit successful attempts in one fenced transaction: state, artifacts, models, counters, events, children.

    Returns:
        Ids that were published. Others were fenced (another attempt holds the job) or cancelled meanwhile.
    """
    if not results:
        return []
    by_key = {(r.job_id, r.attempt): r for r in results}
    done: dict[str, Any] = {}
    for chunk in _chunks(sorted(by_key)):
        fence = (tuple_(Job.id, Job.attempt).in_(chunk), Job.state == JobState.RUNNING)
        statement = (
            update(Job)
            .where(*fence, ~Job.cancel_requested)
            .values(state=JobState.SUCCEEDED, finished_at=now(), progress=1.0, message=None, error=None, lease_owner=None, lease_until=None)
            .returning(Job.id, Job.attempt, Job.project_id, Job.batch_id, Job.kind, Job.seed, Job.model)
        )
        done.update({row.id: row for row in conn.execute(statement)})
        cancelled = list(conn.execute(select(Job.id, Job.attempt).where(*fence, Job.cancel_requested)))
        for job_id, attempt in cancelled:
            stop(conn, Stop(job_id, attempt, {"type": "cancelled", "code": "cancelled", "message": "cancelled while it ran"}))
    if not done:
        return []
    at = database_time(conn)
    refuse_doomed(conn, [a.object_key for r in results if r.job_id in done for a in r.artifacts], list(done))
    _refuse_gone(conn, [a.object_key for r in results if r.job_id in done and r.reused_from for a in r.artifacts])
    artifacts: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    keyed: list[Success] = []
    for result in results:
        row = done.get(result.job_id)
        if row is None or row.attempt != result.attempt:
            continue
        rows = _artifact_rows(result.artifacts, row.project_id, row.id, row.attempt, at, row.seed, row.model)
        artifacts += rows
        by_name = {r["name"]: r for r in rows}
        models += [_model_row(m, row, by_name, at) for m in result.models]
        if result.result_key or result.reused_from:
            keyed.append(result)
    if artifacts:
        conn.execute(insert(Artifact), artifacts)
    for model in models:
        insert_model(conn, model)
    for result in keyed:
        conn.execute(update(Job).where(Job.id == result.job_id).values(result_key=result.result_key, reused_from=result.reused_from))
    _close_attempts(conn, [(r.job_id, r.attempt, "succeeded", None, r.phases) for r in results if r.job_id in done], at)
    _ended(conn, list(done.values()), JobState.SUCCEEDED, reused={r.job_id for r in keyed if r.reused_from})
    _unblock(conn, list(done))
    return list(done)


def _artifact_rows(items: Sequence[NewArtifact], project_id: str, job_id: str, attempt: int, at: float,
                   seed: int | None, model: str | None, start: int = 0) -> list[dict[str, Any]]:  # fmt: skip
    return [
        {
            "id": new_id("art"), "project_id": project_id, "job_id": job_id, "attempt": attempt, "position": start + n,
            "role": a.role, "name": a.name, "object_key": a.object_key, "sha256": a.sha256, "size": a.size,
            "media_type": a.media_type, "meta": a.meta, "seed": a.seed if a.seed is not None else seed,
            "model": a.model or model, "parents": list(a.parents), "created_at": at,
        }
        for n, a in enumerate(items)
    ]  # fmt: skip


def _model_row(model: Mapping[str, Any], job: Any, artifacts: Mapping[str, Mapping[str, Any]], at: float) -> dict[str, Any]:
    files = {}
    for role, name in model["files"].items():
        row = artifacts[name]
        files[role] = {k: row[k] for k in ("object_key", "sha256", "size", "name")} | {"artifact_id": row["id"]}
    return {
        "id": new_id("mv"), "project_id": job.project_id, "name": model["name"], "engine": model["engine"],
        "tasks": list(model["tasks"]), "files": files, "options": model.get("options", {}), "config": model.get("config", {}),
        "metrics": model.get("metrics", {}), "lineage": model.get("lineage", {}), "memory_mb": model.get("memory_mb", 0),
        "job_id": job.id, "created_at": at,
    }  # fmt: skip


def insert_model(conn: Connection, row: dict[str, Any]) -> str:
    """Insert a version, numbered after the highest there is of that name. Returns the version."""
    taken = conn.execute(
        select(ModelVersion.version).where(ModelVersion.project_id == row["project_id"], ModelVersion.name == row["name"])
    ).scalars()
    number = 1 + max((int(v) for v in taken if v.isdigit()), default=0)
    version = str(row.get("version") or number)
    conn.execute(insert(ModelVersion).values(**{**row, "version": version}))
    return version


def refuse_doomed(conn: Connection, keys: Sequence[str], jobs: Sequence[str] = ()) -> None:
    """Make sure that none of these objects is, or was, deleted: called before rows that point at them are written.

    The shared lock lasts to the end of the transaction. Who deletes takes it exclusively to mark what goes, and looks for
    references after that; so either they see our rows, or we see their mark. A mark outlives the deletion: an object that was
    put before it and is committed after it would be missed otherwise.

    Args:
        conn: Connection in a write transaction.
        keys: Keys of the objects.
        jobs: Running jobs whose attempts have put them; left out, they were put within the last minute.

    Raises:
        TransientError: If one is marked and was not surely put after its deletion; put it again in another attempt.
    """
    if not keys:
        return
    if conn.dialect.name == "postgresql":
        conn.execute(text("SELECT pg_advisory_xact_lock_shared(hashtext('factory:sweep'))"))
    for chunk in _chunks(list(dict.fromkeys(keys))):
        newest = conn.execute(select(DoomedObject.at, DoomedObject.object_key).where(DoomedObject.object_key.in_(chunk)).order_by(DoomedObject.at.desc()).limit(1)).one_or_none()
        if newest is None:
            continue
        begun = conn.execute(select(func.min(Job.started_at)).where(Job.id.in_(list(jobs)))).scalar() if jobs else None
        doomed = newest.object_key
        if newest.at > (begun if begun is not None else database_time(conn) - MARK_S) - MARK_S:
            raise TransientError(f"object {doomed} is being swept; it must be stored again", code="object_swept")


def _refuse_gone(conn: Connection, keys: Sequence[str]) -> None:
    """Results that are taken over must still be somebody's: their own put did not make their objects young again."""
    for chunk in _chunks(list(dict.fromkeys(keys))):
        there = set(conn.execute(select(Artifact.object_key).where(Artifact.object_key.in_(chunk))).scalars())
        gone = sorted(set(chunk) - there)
        if gone:
            raise TransientError(f"object {gone[0]} of an earlier result is not kept any more", code="object_swept")


def publish(conn: Connection, job_id: str, attempt: int, artifact: NewArtifact) -> bool:
    """Add an artifact to a job that still runs (a checkpoint, a sample grid); one of the same name is replaced.

    Returns:
        False if the attempt is fenced: nothing was written.
    """
    row = conn.execute(
        select(Job.id, Job.project_id, Job.seed, Job.model)
        .where(Job.id == job_id, Job.attempt == attempt, Job.state == JobState.RUNNING)
        .with_for_update()
    ).one_or_none()
    if row is None:
        return False
    refuse_doomed(conn, [artifact.object_key], [job_id])
    conn.execute(delete(Artifact).where(Artifact.job_id == job_id, Artifact.name == artifact.name))
    last = conn.execute(select(func.max(Artifact.position)).where(Artifact.job_id == job_id)).scalar()
    # Published ones sort behind the outputs that the commit will number from 0.
    start = max(1000, (last or 0) + 1)
    at = database_time(conn)
    conn.execute(insert(Artifact), _artifact_rows([artifact], row.project_id, job_id, attempt, at, row.seed, row.model, start))
    return True


def drop_published(conn: Connection, job_id: str, attempt: int, names: Sequence[str]) -> list[str]:
    """Forget published artifacts (old checkpoints) of a job that this attempt still holds.

    Returns:
        Keys of their objects to which no other artifact points: delete them after the commit.
    """
    held = select(Job.id).where(Job.id == job_id, Job.attempt == attempt, Job.state == JobState.RUNNING)
    statement = delete(Artifact).where(Artifact.job_id.in_(held), Artifact.name.in_(list(names))).returning(Artifact.object_key)
    keys = set(conn.execute(statement).scalars())
    return sorted(keys - set(conn.execute(select(Artifact.object_key).where(Artifact.object_key.in_(keys))).scalars()))


@dataclass(frozen=True)
class Decision:
    """What becomes of a job after an error."""

    state: JobState
    delay_s: float = 0.0
    tries: Mapping[str, int] = field(default_factory=dict)
    strikes: int = 0
    group_limit: int = 0


def decide(error_class: str, *, group_size: int, strikes: int, tries: Mapping[str, int], group_limit: int, policy: RetryPolicy) -> Decision:
    """The table of error classes in one pure function.

    Args:
        error_class: Class of the error.
        group_size: Jobs in the micro-batch that ended so.
        strikes: Strikes before this.
        tries: Retries used up, by class.
        group_limit: Bound on its micro-batches so far (0: none).
        policy: The kind's policy.
    """
    used = dict(tries)

    def backoff(n: int) -> float:
        return float(min(policy.backoff_s * 2.0**n, policy.backoff_max_s) * random.uniform(0.5, 1.0))

    if error_class == "cancelled":
        return Decision(JobState.CANCELLED, 0, used, strikes, group_limit)
    if error_class in ("input", "policy"):
        return Decision(JobState.FAILED, 0, used, strikes, group_limit)
    if error_class == "released":
        return Decision(JobState.QUEUED, 0, used, strikes, group_limit)
    if error_class == "resource" and group_size > 1:
        return Decision(JobState.QUEUED, 0, used, strikes, max(1, group_size // 2))
    if error_class in ("crash", "deadline", "bug") and group_size > 1:
        # Only a job that ran alone can be blamed: its neighbours go singly and earn nothing.
        return Decision(JobState.QUEUED, 0, used, strikes, 1)
    if error_class == "crash":
        strikes += 1
        if strikes >= policy.strikes:
            return Decision(JobState.DEAD, 0, used, strikes, group_limit)
        return Decision(JobState.QUEUED, backoff(strikes - 1), used, strikes, 1)
    budget = {"transient": policy.transient, "deadline": policy.deadline, "resource": 1}.get(error_class, policy.bug)
    name = error_class if error_class in ("transient", "deadline", "resource") else "bug"
    n = used.get(name, 0)
    if n >= budget:
        return Decision(JobState.FAILED if name == "resource" else JobState.DEAD, 0, used, strikes, group_limit)
    used[name] = n + 1
    return Decision(JobState.QUEUED, backoff(n), used, strikes, group_limit)


def stop(conn: Connection, result: Stop) -> JobState | None:
    """End an attempt that has no result; the error's class decides whether the job is tried again.

    Returns:
        The job's new state, or None if the attempt was fenced.
    """
    row = conn.execute(
        select(
            Job.id, Job.attempt, Job.project_id, Job.batch_id, Job.kind, Job.group_size, Job.strikes, Job.tries,
            Job.group_limit, Job.cancel_requested, Job.seed, Job.model,
        )
        .where(Job.id == result.job_id, Job.attempt == result.attempt, Job.state == JobState.RUNNING)
        .with_for_update()
    ).one_or_none()  # fmt: skip
    if row is None:
        return None
    error_class = "cancelled" if row.cancel_requested else str(result.error.get("type", "bug"))
    verdict = decide(
        error_class, group_size=row.group_size, strikes=row.strikes, tries=row.tries or {}, group_limit=row.group_limit,
        policy=get_kind(row.kind).retry,
    )  # fmt: skip
    terminal = verdict.state in TERMINAL
    conn.execute(
        update(Job)
        .where(Job.id == row.id, Job.attempt == row.attempt, Job.state == JobState.RUNNING)
        .values(
            state=verdict.state, error=dict(result.error), tries=dict(verdict.tries), strikes=verdict.strikes,
            group_limit=verdict.group_limit, run_after=now() + verdict.delay_s if not terminal else Job.run_after,
            finished_at=now() if terminal else None, lease_owner=None, lease_until=None, dispatched_at=None, progress=None,
            message=None,
        )
    )  # fmt: skip
    at = database_time(conn)
    _close_attempts(conn, [(row.id, row.attempt, error_class, result.error, result.phases)], at)
    if terminal:
        _ended(conn, [row], verdict.state, error=result.error)
        _fail_children(conn, [row.id])
    else:
        data = {"attempt": row.attempt, "error": dict(result.error), "delay_s": round(verdict.delay_s, 3)}
        add_event(conn, "job.retrying", project_id=row.project_id, batch_id=row.batch_id, job_id=row.id, data=data)
    return verdict.state


def _close_attempts(conn: Connection, items: Sequence[tuple[str, int, str, Mapping[str, Any] | None, Mapping[str, float]]], at: float) -> None:
    for job_id, attempt, outcome, error, phases in items:
        conn.execute(
            update(Attempt)
            .where(Attempt.job_id == job_id, Attempt.attempt == attempt)
            .values(finished_at=at, outcome=outcome, error=dict(error) if error else None, phases=dict(phases) or None)
        )


def _ended(conn: Connection, rows: Sequence[Any], state: JobState, *, error: Mapping[str, Any] | None = None,
           reused: set[str] | None = None) -> None:  # fmt: skip
    """Counters and events of jobs that have just become terminal."""
    deltas = Counter((row.batch_id, row.kind, str(state)) for row in rows if row.batch_id)
    for row in rows:
        if reused and row.batch_id and row.id in reused:
            deltas[(row.batch_id, row.kind, "reused")] += 1
    _add_deltas(conn, deltas)
    events: list[dict[str, Any]] = []
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.batch_id and error is None:
            grouped[(row.project_id, row.batch_id)].append(row.id)
        else:
            data = {"state": str(state), **({"error": dict(error)} if error else {})}
            events.append({"type": f"job.{state}", "project_id": row.project_id, "batch_id": row.batch_id, "job_id": row.id, "data": data})
    for (project_id, batch_id), ids in grouped.items():
        data = {"state": str(state), "jobs": ids}
        events.append({"type": f"jobs.{state}", "project_id": project_id, "batch_id": batch_id, "job_id": None, "data": data})
    if events:
        conn.execute(insert(Event).values(at=now()), events)


def _unblock(conn: Connection, parents: Sequence[str]) -> None:
    waiting: Counter[str] = Counter()
    for chunk in _chunks(parents):
        waiting.update(conn.execute(select(Dependency.job_id).where(Dependency.parent_id.in_(chunk))).scalars())
    by_count: dict[int, list[str]] = defaultdict(list)
    for child, n in waiting.items():
        by_count[n].append(child)
    for n, children in by_count.items():
        for chunk in _chunks(sorted(children)):
            # Subtracted, not counted anew: two parents may end at the same time and see only their own edge.
            conn.execute(update(Job).where(Job.id.in_(chunk), Job.state == JobState.BLOCKED).values(pending=Job.pending - n))
            conn.execute(
                update(Job).where(Job.id.in_(chunk), Job.state == JobState.BLOCKED, Job.pending <= 0).values(state=JobState.QUEUED)
            )


def _fail_children(conn: Connection, parents: Sequence[str]) -> None:
    """Fail what waits for jobs that ended without a result, down the graph, each with a reason that names its parent."""
    level = list(parents)
    while level:
        names = {
            row.id: row for chunk in _chunks(level)
            for row in conn.execute(select(Job.id, Job.custom_id, Job.kind, Job.state, Job.error).where(Job.id.in_(chunk)))
        }  # fmt: skip
        edges: dict[str, str] = {}
        for chunk in _chunks(level):
            for edge in conn.execute(select(Dependency.job_id, Dependency.parent_id).where(Dependency.parent_id.in_(chunk))):
                edges.setdefault(edge.job_id, edge.parent_id)
        next_level = []
        for child, parent in edges.items():
            cause = names[parent]
            why = (cause.error or {}).get("message", "")
            error = DependencyFailed(
                f"needs {cause.custom_id or cause.id} ({cause.kind}), which is {cause.state}" + (f": {why}"[:400] if why else ""),
                parent=cause.custom_id or cause.id, parent_id=cause.id,
            ).to_dict()  # fmt: skip
            state = JobState.CANCELLED if cause.state == JobState.CANCELLED else JobState.FAILED
            row = conn.execute(
                update(Job)
                .where(Job.id == child, Job.state == JobState.BLOCKED)
                .values(state=state, error=error, finished_at=now())
                .returning(Job.id, Job.project_id, Job.batch_id, Job.kind)
            ).one_or_none()
            if row is not None:
                _ended(conn, [row], state, error=error)
                next_level.append(child)
        level = next_level


# --- rescue ---------------------------------------------------------------------------------------------------------


def reap(conn: Connection, *, lease_s: float, period_s: float, limit: int = 1000) -> dict[str, int]:
    """Return jobs whose lease ran out. After an outage of the reaper itself, and when it has never run, it first extends leases once.

    Returns:
        Count by new state, plus ``extended``.
    """
    at = database_time(conn)
    last = conn.execute(select(Mark.value).where(Mark.name == "reaper").with_for_update()).scalar()
    _set_mark(conn, "reaper", at)
    if last is None or at - last > max(3 * period_s, lease_s / 2):
        # Nobody could renew while the database or the whole factory was away: give live workers one lease to say so.
        n = conn.execute(
            update(Job).where(Job.state == JobState.RUNNING, Job.lease_until < at + lease_s).values(lease_until=at + lease_s)
        ).rowcount
        return {"extended": n}
    expired = conn.execute(
        select(Job.id, Job.attempt, Job.lease_owner).where(Job.state == JobState.RUNNING, Job.lease_until < at).limit(limit)
    ).all()
    return dict(_crash(conn, expired, "the worker {owner} stopped renewing its lease"))


def crash(conn: Connection, held: Iterable[tuple[str, int]], reason: str, *, released: bool = False) -> dict[str, int]:
    """Return jobs whose worker is known to have died (seen by its keeper), or that a stop released without a strike."""
    states: Counter[str] = Counter()
    for job_id, attempt in held:
        error = {"type": "released" if released else "crash", "code": "released" if released else "worker_lost", "message": reason}
        state = stop(conn, Stop(job_id, attempt, error))
        if state is not None:
            states[str(state)] += 1
    return dict(states)


def _crash(conn: Connection, rows: Iterable[Any], reason: str) -> Counter[str]:
    states: Counter[str] = Counter()
    for row in rows:
        error = {"type": "crash", "code": "worker_lost", "message": reason.format(owner=row.lease_owner)}
        state = stop(conn, Stop(row.id, row.attempt, error))
        if state is not None:
            states[str(state)] += 1
    return states


def release_all(conn: Connection, reason: str) -> int:
    """Queue everything again that runs; only for a caller who knows that no worker of this ledger lives."""
    rows = conn.execute(select(Job.id, Job.attempt).where(Job.state == JobState.RUNNING)).all()
    return sum(crash(conn, [(r.id, r.attempt) for r in rows], reason, released=True).values())


def unblock_stuck(conn: Connection, limit: int = 1000) -> int:
    """Safety net: queue blocked jobs all of whose parents have succeeded, fail those with a failed one."""
    open_parents = select(Job.id).where(Job.state != JobState.SUCCEEDED)
    stuck = list(
        conn.execute(
            select(Job.id)
            .where(Job.state == JobState.BLOCKED)
            .where(~select(Dependency.job_id).where(Dependency.job_id == Job.id, Dependency.parent_id.in_(open_parents)).exists())
            .limit(limit)
        ).scalars()
    )
    for chunk in _chunks(stuck):
        conn.execute(update(Job).where(Job.id.in_(chunk), Job.state == JobState.BLOCKED).values(state=JobState.QUEUED, pending=0))
    return len(stuck)


def _set_mark(conn: Connection, name: str, value: float) -> None:
    statement = insert_for(conn, Mark).values(name=name, value=value)
    conn.execute(statement.on_conflict_do_update(index_elements=[Mark.name], set_={"value": value}))


# --- batches --------------------------------------------------------------------------------------------------------


def fold_counts(conn: Connection, limit: int = 20_000) -> int:
    """Fold appended deltas into the counters; on PostgreSQL only those that no other folder holds."""
    query = select(BatchDelta.id, BatchDelta.batch_id, BatchDelta.kind, BatchDelta.state, BatchDelta.n).order_by(BatchDelta.id).limit(limit)
    if conn.dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    rows = conn.execute(query).all()
    if not rows:
        return 0
    sums: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        sums[(row.batch_id, row.kind, row.state)] += row.n
    for (batch_id, kind, state), n in sorted(sums.items()):
        statement = insert_for(conn, BatchCount).values(batch_id=batch_id, kind=kind, state=state, n=n)
        conn.execute(
            statement.on_conflict_do_update(
                index_elements=[BatchCount.batch_id, BatchCount.kind, BatchCount.state], set_={"n": BatchCount.n + n}
            )
        )
    for chunk in _chunks([row.id for row in rows]):
        conn.execute(delete(BatchDelta).where(BatchDelta.id.in_(chunk)))
    return len(rows)


def counts(conn: Connection, batch_id: str) -> dict[str, dict[str, int]]:
    """Counters of a batch: kind → state → n, where ``total`` counts accepted jobs and ``reused`` is part of ``succeeded``."""
    out: dict[str, dict[str, int]] = defaultdict(dict)
    both = select(BatchCount.kind, BatchCount.state, BatchCount.n).where(BatchCount.batch_id == batch_id).union_all(
        select(BatchDelta.kind, BatchDelta.state, BatchDelta.n).where(BatchDelta.batch_id == batch_id)
    )  # fmt: skip
    for kind, state, n in conn.execute(both):
        out[kind][state] = out[kind].get(state, 0) + int(n)
    return dict(out)


def close_batches(conn: Connection, batch_ids: Iterable[str] | None = None) -> list[str]:
    """Finish batches each of whose jobs is terminal; each finishes exactly once.

    Returns:
        Ids of the batches that this call finished.
    """
    query = select(Batch.id, Batch.project_id, Batch.state, Batch.total).where(
        Batch.finished_at.is_(None), Batch.state.in_((BatchState.RUNNING, BatchState.CANCELLING))
    )
    if batch_ids is not None:
        query = query.where(Batch.id.in_(list(batch_ids)))
    closed = []
    for row in conn.execute(query).all():
        per_kind = counts(conn, row.id)
        ended = sum(n for states in per_kind.values() for state, n in states.items() if state in TERMINAL)
        if ended < row.total:
            continue
        state = BatchState.CANCELLED if row.state == BatchState.CANCELLING else BatchState.COMPLETED
        hit = conn.execute(
            update(Batch).where(Batch.id == row.id, Batch.state == row.state, Batch.finished_at.is_(None)).values(state=state, finished_at=now())
        ).rowcount
        if hit:
            totals: Counter[str] = Counter()
            for states in per_kind.values():
                totals.update(states)
            add_event(conn, f"batch.{state}", project_id=row.project_id, batch_id=row.id, data={"counts": dict(totals)})
            closed.append(row.id)
    return closed


# --- cancel, pause --------------------------------------------------------------------------------------------------

_WAITING = (JobState.BLOCKED, JobState.QUEUED, JobState.DISPATCHED)


def cancel_jobs(conn: Connection, ids: Sequence[str]) -> dict[str, int]:
    """Cancel jobs: waiting ones at once, running ones by asking their worker; terminal ones stay as they are.

    Returns:
        ``{"cancelled": n, "requested": n}``.
    """
    error = {"type": "cancelled", "code": "cancelled", "message": "cancelled before it started"}
    ended, requested = 0, 0
    for chunk in _chunks(sorted(ids)):
        rows = conn.execute(
            update(Job)
            .where(Job.id.in_(chunk), Job.state.in_(_WAITING))
            .values(state=JobState.CANCELLED, finished_at=now(), error=error, cancel_requested=True, dispatched_at=None)
            .returning(Job.id, Job.project_id, Job.batch_id, Job.kind)
        ).all()
        requested += conn.execute(
            update(Job).where(Job.id.in_(chunk), Job.state == JobState.RUNNING, ~Job.cancel_requested).values(cancel_requested=True)
        ).rowcount
        _ended(conn, rows, JobState.CANCELLED)
        _fail_children(conn, [r.id for r in rows])
        ended += len(rows)
    return {"cancelled": ended, "requested": requested}


def cancel_batch(conn: Connection, batch_id: str, limit: int = 2000) -> int:
    """Cancel up to ``limit`` waiting jobs of a batch and ask its running ones to stop.

    The batch turns ``cancelling`` at once, which keeps every one of its jobs from being claimed; the timer calls this
    again until nothing waits.

    Returns:
        Jobs that still wait.
    """
    conn.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.state.in_((BatchState.RUNNING, BatchState.EXPANDING)))
        .values(state=BatchState.CANCELLING, paused=False)
    )
    ids = list(
        conn.execute(
            select(Job.id).where(Job.batch_id == batch_id, Job.state.in_([s for s in ACTIVE if s != JobState.RUNNING])).limit(limit)
        ).scalars()
    )
    cancel_jobs(conn, ids)
    conn.execute(
        update(Job).where(Job.batch_id == batch_id, Job.state == JobState.RUNNING, ~Job.cancel_requested).values(cancel_requested=True)
    )
    left = select(func.count()).select_from(Job).where(Job.batch_id == batch_id, Job.state.in_(_WAITING))
    return int(conn.execute(left).scalar_one())


def pause(conn: Connection, what: str, name: str, paused: bool) -> bool:
    """Pause or resume a ``queue``, ``project`` (id) or ``batch`` (id); looked at on dispatch and on claim.

    Returns:
        Whether there is such a thing (queues always are).
    """
    if what == "queue":
        statement = insert_for(conn, Queue).values(name=name, paused=paused)
        conn.execute(statement.on_conflict_do_update(index_elements=[Queue.name], set_={"paused": paused}))
        return True
    table: Any = {"project": Project, "batch": Batch}[what]
    hit = conn.execute(update(table).where(table.id == name).values(paused=paused)).rowcount
    if hit:
        owner = name if what == "project" else None
        batch_id = name if what == "batch" else None
        add_event(conn, f"{what}.{'paused' if paused else 'resumed'}", project_id=owner, batch_id=batch_id)
    return bool(hit)


def reprioritise(conn: Connection, ids: Sequence[str], priority: int) -> int:
    """Give waiting jobs another priority."""
    n = 0
    for chunk in _chunks(sorted(ids)):
        n += conn.execute(update(Job).where(Job.id.in_(chunk), Job.state.in_(_WAITING)).values(priority=priority, band=100 - priority)).rowcount
    return n

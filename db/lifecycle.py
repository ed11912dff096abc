"""The life of a job: every change of state, each one fenced, on both databases. No other module writes ``jobs.state``.

All functions take a connection inside a write transaction and only use the database's clock. A caller that does not know
whether its commit took effect may repeat it: an update that finds no row in the state it expects changes nothing.
"""

import json
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Double,
    String,
    and_,
    bindparam,
    cast,
    delete,
    func,
    insert,
    null,
    or_,
    select,
    true,
    update,
)

from contentfactory.errors import DependencyFailed, TransientError
from contentfactory.fastjson import dumps_ascii
from contentfactory.ids import new_id
from contentfactory.jobs.spec import RetryPolicy, get_kind
from contentfactory.states import TERMINAL, BatchState, JobState
from db import ended, prepared, waiting
from db.choice import Hint, Room, charge, choose
from db.ended import NewArtifact
from db.places import any_of
from db.prepared import BINARY
from db.session import insert_for, now, upsert
from db.sql import (
    NOT_DURABLE,
    among,
    among_given,
    dumps,
    has_state,
    insert_rows,
    insertion,
    packed,
    packed_rows,
    rows_given,
    statement_text,
    was,
)
from db.tables import (
    Artifact,
    Attempt,
    Batch,
    Dependency,
    Event,
    Job,
    Mark,
    ModelVersion,
    Project,
    Queue,
    Share,
    Worker,
)
from db.waiting import HELD_BATCHES, PAUSED_PROJECTS

CHUNK = 500
"""Ids in one statement: below SQLite's limit on variables, and short transactions on both."""


MARK_S = 60.0
"""How long who marked an object may take to delete it, seconds: attempts that began later than that need not mind the mark."""


@dataclass(slots=True)
class NewJob:
    """A validated job as `insert_jobs` takes it. ``parents`` are ids of jobs that it waits for; ``params`` may be JSON text already."""

    id: str
    project_id: str
    kind: str
    queue: str
    params: dict[str, Any] | str
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


@dataclass(slots=True)
class Success:
    """Result of one job's attempt."""

    job_id: str
    attempt: int
    artifacts: tuple[NewArtifact, ...] = ()
    models: tuple[dict[str, Any], ...] = ()
    result_key: str | None = None
    reused_from: str | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    claimed: "Claimed | None" = None
    """The job as it was claimed, where the caller has it: nothing of it is asked for again then."""


@dataclass(slots=True)
class Stop:
    """End of one job's attempt without a result: an error's dictionary, its class in ``type``."""

    job_id: str
    attempt: int
    error: Mapping[str, Any]
    phases: Mapping[str, float] = field(default_factory=dict)
    worker: str | None = None
    """Who ran it, where only that one's attempt is meant."""


@dataclass(slots=True)
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
    micro_batch: int | None
    group_size: int


def _chunks(items: Sequence[Any], size: int = CHUNK) -> Iterable[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


_CLOCK = select(now())


def database_time(conn: Connection) -> float:
    """The database's clock, unix seconds."""
    return float(prepared.scalars(conn, _CLOCK)[0])


# --- accept ---------------------------------------------------------------------------------------------------------


_ROW = (
    "id", "project_id", "batch_id", "custom_id", "line", "rank", "kind", "queue", "state", "priority", "band", "params", "model", "seed",
    "seconds", "share_key", "reuse", "pending", "retry_of", "labels", "idempotency_key", "request_hash", "created_at",
)  # fmt: skip
"""Columns of an accepted job; the others start with the table's defaults."""
_PLAIN_ROW = ("id", "project_id", "rank", "kind", "queue", "state", "priority", "band", "params", "seed", "seconds", "share_key", "reuse", "created_at")
"""Those of one that belongs to no batch, has no model and no further notes."""


def insert_jobs(conn: Connection, jobs: Sequence[NewJob], *, fresh: bool = False) -> int:
    """Write accepted jobs; rows that are already there (a repeated chunk) stay as they are.

    Args:
        conn: Connection in a write transaction.
        jobs: Accepted jobs.
        fresh: Whether the caller knows that none of them is there yet: by a cursor that it moved in the same transaction, or
            because the ids are new. Then they go in by the quickest way.

    Returns:
        Number of rows that were new.
    """
    if not jobs:
        return 0
    created = database_time(conn)
    rank = _rank(created)
    own = {job.id for job in jobs}
    states = _lock_parents(conn, {p for job in jobs for p in job.parents} - own)
    rows: list[tuple[Any, ...]] = []
    edges: list[tuple[str, str]] = []
    for job in jobs:
        waits = 0
        if job.parents:
            parents = dict.fromkeys(job.parents)
            waits = sum(states.get(p) != JobState.SUCCEEDED for p in parents)
            edges += [(job.id, p) for p in parents]
        rows.append(_row(job, "blocked" if waits else "queued", waits, created, rank))
    new = own
    if fresh:
        insert_rows(conn, Job, _ROW, rows)
        insert_rows(conn, Dependency, ("job_id", "parent_id"), edges)
    else:
        new = _insert_new(conn, Job, [dict(zip(_ROW, row, strict=True)) for row in rows])
        _insert_new(conn, Dependency, [{"job_id": job, "parent_id": parent} for job, parent in edges])
    ended.add_deltas(conn, Counter((j.batch_id, j.kind, "total") for j in jobs if j.batch_id and j.id in new))
    failed = [p for p, state in states.items() if state in TERMINAL and state != JobState.SUCCEEDED]
    if failed:
        _fail_children(conn, failed)
    return len(new)


def insert_alike(conn: Connection, project_id: str, kind: str, each: Iterable[tuple[str, str, str, float, int]], *, priority: int,
                 reuse: bool) -> None:  # fmt: skip
    """Write accepted jobs of one kind with new ids, no model and no batch: taken as they come, while the database writes those before them.

    Args:
        conn: Connection in a write transaction.
        project_id: Their project.
        kind: Their kind.
        each: Id, parameters as JSON, ``share_key``, estimated compute seconds and seed of each job.
        priority: 0 to 100.
        reuse: Whether equal earlier results may be taken.
    """
    created = database_time(conn)
    queue, rank, band = get_kind(kind).queue, _rank(created), 100 - priority
    insert_rows(conn, Job, _PLAIN_ROW, (
        (job_id, project_id, rank, kind, queue, "queued", priority, band, params, seed, seconds, share_key, reuse, created)
        for job_id, params, share_key, seconds, seed in each
    ))  # fmt: skip


def accept_alone(conn: Connection, job: NewJob) -> Hint | None:
    """Accept a job of no batch and without parents if its queue is idle, and dispatch it with the same row: nothing waits there and nothing
    is on the broker. Then there is nothing to weigh, and somebody waits for it.

    On PostgreSQL that is a single statement, which needs no transaction around it.

    Returns:
        The hint to publish after the commit. None where nothing was written, because the queue is not idle or the job (or its key) is
        there already: accept it by `insert_jobs`, and let `dispatch` decide.
    """
    if conn.dialect.name == "postgresql":
        given = dict(zip(_ROW, _row(job, "dispatched", 0, 0.0, 0), strict=True))
        values = {f"p_{name}": _ascii(given[name]) if name in _JSON else given[name] for name in _GIVEN}
        values |= {**waiting.idle_values(job.queue, job.project_id), "p_lock": _turn_of(job.queue)}
        found = prepared.scalars(conn, _accepted_alone(), values)
        return Hint(job.kind, job.queue, job.priority, (job.id,), found[0]) if found else None
    idle = waiting.idle(conn, job.queue, job.project_id)
    if idle is None:
        return None
    at, begins = float(idle.at), max(idle.virtual_seconds or 0.0, idle.clock)
    row = {**dict(zip(_ROW, _row(job, "dispatched", 0, at, _rank(at)), strict=True)), "dispatched_at": at}
    if not _insert_new(conn, Job, [row]):
        return None
    charge(conn, job.queue, {job.project_id: begins + job.seconds / max(idle.weight, 1e-6)}, begins if begins > idle.clock else None)
    return Hint(job.kind, job.queue, job.priority, (job.id,), at)


def hint_of(conn: Connection, job_id: str) -> Hint | None:
    """The hint of a job that `accept_alone` dispatched, for who did not get its answer; None where it is not dispatched (any more)."""
    row = conn.execute(select(Job.c.kind, Job.c.queue, Job.c.priority, Job.c.dispatched_at).where(Job.c.id == job_id, was(JobState.DISPATCHED))).one_or_none()
    return None if row is None else Hint(row.kind, row.queue, row.priority, (job_id,), float(row.dispatched_at))


_GIVEN = tuple(name for name in _ROW if name not in ("rank", "created_at"))
"""Columns of `_ROW` whose values do not depend on the time."""


@cache
def _accepted_alone() -> Any:
    """PostgreSQL's: the row, and if it was written its charge.

    Whether the queue is idle is as of the statement's beginning, and the turn to dispatch from it is taken a moment later: who had it in between
    has sent a job and charged for it, which this one then follows. So charge and clock only move on.
    """
    idle = waiting.IDLE.where(func.pg_try_advisory_xact_lock(func.hashtext(bindparam("p_lock", type_=String)))).cte("idle")
    begins = func.greatest(func.coalesce(idle.c.virtual_seconds, 0.0), idle.c.clock)
    ends = begins + bindparam("p_seconds", type_=Double) / func.greatest(idle.c.weight, 1e-6)
    rank = cast(func.floor(idle.c.at * 1000), BigInteger) * 1_000_000
    types = {name: Job.c[name].type for name in _GIVEN}
    values = [cast(bindparam(f"p_{n}", type_=String), t) if n in _JSON else bindparam(f"p_{n}", type_=t) for n, t in types.items()]
    made = select(*values, rank, idle.c.at, idle.c.at)
    row = upsert("postgresql", Job).from_select([*_GIVEN, "rank", "created_at", "dispatched_at"], made, include_defaults=False)
    job = row.on_conflict_do_nothing().returning(Job.c.dispatched_at).cte("job")
    both = idle.join(job, true())
    where = bindparam("p_queue", type_=String), bindparam("p_project_id", type_=String)
    share = upsert("postgresql", Share).from_select(["queue", "project_id", "virtual_seconds"], select(*where, ends).select_from(both))
    further = func.greatest(Share.c.virtual_seconds, share.excluded.virtual_seconds)
    share = share.on_conflict_do_update(index_elements=[Share.c.queue, Share.c.project_id], set_={"virtual_seconds": further})
    clock = select(bindparam("clock", type_=String), begins).select_from(both).where(begins > idle.c.clock)
    mark = upsert("postgresql", Mark).from_select(["name", "value"], clock)
    mark = mark.on_conflict_do_update(index_elements=[Mark.c.name], set_={"value": func.greatest(Mark.c.value, mark.excluded.value)})
    return select(job.c.dispatched_at).add_cte(share.cte("charged"), mark.cte("marked"))


def _rank(accepted: float) -> int:
    """Place in a project's queue of what was accepted at that time."""
    return int(accepted * 1000) * 1_000_000


def _row(job: NewJob, state: str, waits: int, created: float, rank: int) -> tuple[Any, ...]:
    """Values of `_ROW`."""
    return (
        job.id, job.project_id, job.batch_id, job.custom_id, job.line, job.rank or rank, job.kind, job.queue, state, job.priority,
        100 - job.priority, job.params if isinstance(job.params, str) else dumps(job.params), job.model, job.seed, job.seconds,
        job.share_key, job.reuse, waits, job.retry_of, dumps(job.labels) if job.labels else "{}", job.idempotency_key, job.request_hash,
        created,
    )  # fmt: skip


def _lock_parents(conn: Connection, ids: set[str]) -> dict[str, str]:
    # Locked, so that a parent cannot end between our look at it and the commit of the edge.
    if not ids:
        return {}
    query = select(Job.c.id, Job.c.state).where(among(conn, Job.c.id, ids)).order_by(Job.c.id).with_for_update(read=True)
    return {row.id: row.state for row in conn.execute(query).all()}


def _insert_new(conn: Connection, table: Any, rows: list[dict[str, Any]]) -> set[str]:
    if len(rows) == 1:
        # What a single submit writes.
        [row] = rows
        return {found[0] for found in prepared.run(conn, _insert_one(conn.dialect.name, table, tuple(row)), _values(row))}
    rows = [{k: json.loads(v) if k in _JSON else v for k, v in row.items()} for row in rows]
    new: set[str] = set()
    # The number of variables in one statement is bounded on SQLite (32,766) and PostgreSQL (65,535).
    for chunk in _chunks(rows, max(1, 20_000 // max(1, len(rows[0]) if rows else 1))):
        statement = insert_for(conn, table).values(list(chunk)).on_conflict_do_nothing()
        if table is Job:
            new.update(conn.execute(statement.returning(Job.c.id)).scalars())
        else:
            conn.execute(statement)
    return new


_JSON = ("params", "labels")


def _values(row: Mapping[str, Any]) -> list[Any]:
    return [_ascii(value) if name in _JSON else value for name, value in row.items()]


def _ascii(text_: str) -> str:
    """JSON with escapes for all that is not ASCII: a column takes halves of a surrogate pair in no other form."""
    return text_ if text_.isascii() else dumps_ascii(json.loads(text_))


@cache
def _insert_one(dialect: str, table: Any, columns: tuple[str, ...]) -> str:
    return f"{insertion(dialect, table, columns)} ON CONFLICT DO NOTHING RETURNING {'id' if table is Job else 'job_id'}"


def add_event(conn: Connection, type_: str, *, project_id: str | None = None, batch_id: str | None = None,
              job_id: str | None = None, data: Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Append an event."""
    row = {"type": type_, "project_id": project_id, "batch_id": batch_id, "job_id": job_id, "data": dict(data or {})}
    conn.execute(_HAPPENED, row)


_HAPPENED = insert(Event).values(at=now())


# --- dispatch -------------------------------------------------------------------------------------------------------


def dispatch(conn: Connection, queue: str, *, cap_s: float, max_jobs: int = 4096, per_worker: int = 1024, window: int = 512,
             worker_seen_s: float = 60.0, top_up: bool = False, patient: bool = True, spare: bool = False) -> list[Hint]:  # fmt: skip
    """Turn queued rows into micro-batches and mark them ``dispatched``. Publish the hints after the commit.

    Highest priority first; inside a band the project with the least virtual time (compute seconds over weight) goes next.
    Within a project, jobs in order of rank; whoever may share the head's forward pass and lies within the window goes along.

    Args:
        conn: Connection in a write transaction.
        queue: Queue to serve.
        cap_s: Compute seconds that may be in the broker for each live worker of the queue; where nothing is there, a micro-batch for
            each worker may be, whatever it takes.
        max_jobs: Most jobs in one call.
        per_worker: Jobs that may be in the broker for each live worker, however short they are: it fetches more of them by itself
            (`take`). A project that has nothing there may send one micro-batch past both caps.
        window: Rows looked at per project.
        worker_seen_s: How fresh a worker's report must be for it to count.
        top_up: Do nothing while more than half of what may be in flight is.
        patient: Whether to wait for somebody else who dispatches from this queue; nothing is done otherwise.
        spare: Do nothing where nothing is on the broker and each live worker has begun a micro-batch a moment ago: they take the next
            ones by themselves (`take`), and hints would only keep them from it. For one who comes again soon, and finds who has stopped.

    Returns:
        Micro-batches in the order in which to publish them.
    """
    if not _turn(conn, queue, patient=patient):
        return []
    look = waiting.look(conn, queue, worker_seen_s)
    if look.paused:
        return []
    workers = max(1, int(look.workers))
    if spare and look.workers and not look.jobs and waiting.at_work(conn, queue) >= workers:
        return []
    room = Room(cap_s * workers - float(look.seconds), 2 * workers - int(look.jobs), min(max_jobs, per_worker * workers - int(look.jobs)))
    if top_up and (room.full or (room.jobs <= 0 and (room.seconds < cap_s * workers / 2 or room.most < per_worker * workers / 2))):
        return []
    # Nothing waits on the broker: each worker may be out of work, however long a micro-batch takes.
    room.hints = workers if not look.jobs else 0
    room.strangers = waiting.STRANGERS if look.jobs < 2 * per_worker * workers else 0
    chosen = choose(conn, queue, look, room, window, worker_seen_s)
    if chosen is None:
        return []
    dialect, at = conn.dialect.name, float(look.at)
    ids = packed(dialect, (i for hint in chosen.hints for i in hint.ids))
    marked = set(prepared.scalars(conn, _dispatched(dialect), {"p_ids": ids, "p_at": at}))
    chosen.save(conn)
    out = []
    for hint in chosen.hints:
        kept = tuple(i for i in hint.ids if i in marked)
        if kept:
            out.append(hint if len(kept) == len(hint.ids) else replace(hint, ids=kept))
    return out


def take(conn: Connection, queue: str, kind: str, model: str | None, worker: str, lease_s: float, *, window: int = 512,
         worker_seen_s: float = 60.0, named: list[str] | None = None,
         fronts: dict[str, waiting.Front] | None = None) -> list[Claimed]:  # fmt: skip
    """Dispatch the next micro-batch of a queue straight into a worker's hands: one change of state instead of two, and no message.

    Whoever has the turn is chosen as by `dispatch`. For a worker that has just done such jobs, while nothing waits on the broker.

    Args:
        conn: Connection in a write transaction.
        queue: Queue.
        kind: Nothing is taken where the next micro-batch is of another kind…
        model: …or needs another model than this: both have a way to be made ready for, which begins with a hint.
        worker: Who takes it.
        lease_s: Length of the lease, seconds.
        window: Rows looked at per project.
        worker_seen_s: How fresh a worker's report must be for it to count.
        named: Gets the ids before anything is written: whoever does not learn whether the commit took effect asks for these.
        fronts: Where each project's queue begins, kept from one call to the next, empty at first: see `choice.choose`.

    Returns:
        The claimed jobs.
    """
    if not _turn(conn, queue, patient=True):
        return []
    look = waiting.glance(conn, queue, worker_seen_s)
    if look.paused:
        return []
    chosen = choose(conn, queue, look, Room(0.0, 1, 1), window, worker_seen_s, {} if fronts is None else fronts)  # one micro-batch
    if chosen is None:
        return []
    [hint] = chosen.hints
    if hint.kind != kind or hint.model != model:
        return []
    if named is not None:
        named += hint.ids
    claimed = claim(conn, hint.ids, worker, lease_s, kind, dispatched_at=hint.dispatched_at)
    if claimed:
        chosen.save(conn)
    return claimed


def _turn(conn: Connection, queue: str, *, patient: bool) -> bool:
    """Take the turn to dispatch from a queue until the transaction ends; false where somebody else has it and is not waited for.

    SQLite's write lock does the same.
    """
    if conn.dialect.name != "postgresql":
        return True
    lock = "pg_advisory_xact_lock" if patient else "pg_try_advisory_xact_lock"
    return prepared.scalars(conn, statement_text(f"SELECT {lock}(hashtext(:name))"), {"name": _turn_of(queue)})[0] is not False


def _turn_of(queue: str) -> str:
    """Name of the lock that says whose turn it is."""
    return f"dispatch:{queue}"


@cache
def _dispatched(dialect: str) -> Any:
    return (
        update(Job)
        .where(among_given(dialect, Job.c.id, "p_ids"), was(JobState.QUEUED), *_not_durable(dialect))
        .values(state=JobState.DISPATCHED, dispatched_at=bindparam("p_at"))
        .returning(Job.c.id)
    )


def _not_durable(dialect: str) -> list[Any]:
    """For dispatches and claims: who lost one finds the job as it was before, and does it again.

    The one to whom it was given meanwhile is fenced by his name, since the number of the attempt may be given again.
    """
    return [statement_text(NOT_DURABLE)] if dialect == "postgresql" else []


def undispatch(conn: Connection, ids: Sequence[str], delay_s: float = 0.0) -> int:
    """Put jobs back whose hint could not be published, or cannot be served for ``delay_s`` seconds."""
    later = {"run_after": now() + delay_s} if delay_s > 0 else {}
    waiting = update(Job).where(among(conn, Job.c.id, ids), was(JobState.DISPATCHED))
    return conn.execute(waiting.values(state=JobState.QUEUED, dispatched_at=None, **later)).rowcount


def rescue_dispatched(conn: Connection, queue: str, oldest: float | None, margin_s: float = 0.0) -> int:
    """Queue jobs again whose hint is lost.

    Args:
        conn: Connection in a write transaction.
        queue: Queue.
        oldest: Dispatch time of the oldest hint that still waits in the broker; None where none waits. The broker hands hints out in
            order, so an older one that nobody claimed is gone.
        margin_s: A hint younger than this may be on its way into a worker's hands, seconds.
    """
    return conn.execute(_LOST, {"p_queue": queue, "p_before": 1e18 if oldest is None else oldest, "p_margin": margin_s}).rowcount


_LOST = (
    update(Job)
    .where(
        Job.c.queue == bindparam("p_queue"), has_state(JobState.DISPATCHED), Job.c.dispatched_at < bindparam("p_before"),
        Job.c.dispatched_at < now() - bindparam("p_margin"),
    )
    .values(state=JobState.QUEUED, dispatched_at=None)
)


# --- claim and heartbeat --------------------------------------------------------------------------------------------


_CLAIMED = (
    Job.c.id, Job.c.attempt, Job.c.project_id, Job.c.batch_id, Job.c.custom_id, Job.c.kind, Job.c.queue, Job.c.params, Job.c.model,
    Job.c.seed, Job.c.reuse, Job.c.seconds, Job.c.priority, Job.c.created_at, Job.c.dispatched_at, Job.c.started_at,
)  # fmt: skip
"""Columns of `Claimed`, in its order, without those that say who was claimed together."""


def claim(conn: Connection, ids: Sequence[str], worker: str, lease_s: float, kind: str | None = None, *,
          dispatched_at: float | None = None) -> list[Claimed]:  # fmt: skip
    """Take jobs for this worker. Whatever is not due, not waiting, cancelled or paused is left out: drop its hint.

    Args:
        conn: Connection in a write transaction.
        ids: Jobs that a hint names.
        worker: Who takes them.
        lease_s: Length of the lease, seconds.
        kind: Only jobs of this kind: a forged hint may name others, which would wait here for their turn while their lease runs.
        dispatched_at: When they were dispatched, where no hint did it, on the database's clock.

    Returns:
        The claimed jobs in the order of ``ids``.
    """
    ids = list(dict.fromkeys(ids))
    dialect = conn.dialect.name
    values = {"p_ids": packed(dialect, ids), "p_worker": worker, "p_lease_s": lease_s, "p_n": len(ids), "p_kind": kind, "p_at": dispatched_at}
    # Not out of ``random``: a runner that seeds that for each of its jobs would make the same numbers again.
    values["p_micro_batch"] = micro_batch = secrets.randbits(62)
    found: list[Any] = prepared.rows(conn, _claim(dialect, kind is not None, dispatched_at is not None), values)
    size = len(found)
    claimed = {row[0]: Claimed(*(*row, micro_batch, size)) for row in found}
    if len(claimed) < len(ids):
        # A hint of a paused job is used up: the row waits in SQL again.
        rest = [i for i in ids if i not in claimed]
        back = update(Job).where(among(conn, Job.c.id, rest), was(JobState.DISPATCHED), _held())
        conn.execute(back.values(state=JobState.QUEUED, dispatched_at=None))
        if claimed:
            conn.execute(update(Job).where(among(conn, Job.c.id, claimed), was(JobState.RUNNING)).values(group_size=len(claimed)))
    return [claimed[i] for i in ids if i in claimed]


@cache
def _claim(dialect: str, one_kind: bool, dispatched: bool) -> Any:
    wanted = [
        among_given(dialect, Job.c.id, "p_ids"), was(JobState.QUEUED, JobState.DISPATCHED), ~Job.c.cancel_requested, Job.c.run_after <= now(),
        ~_held(),
        # A hint of before the jobs were told apart (their worker died, or they did not fit together) brings nobody together again.
        or_(Job.c.group_limit == 0, Job.c.group_limit >= bindparam("p_n")),
    ]  # fmt: skip
    if one_kind:
        wanted.append(Job.c.kind == bindparam("p_kind"))
    wanted += _not_durable(dialect)
    values = {
        "state": JobState.RUNNING, "attempt": Job.c.attempt + 1, "lease_owner": bindparam("p_worker"), "lease_until": now() + bindparam("p_lease_s"),
        "started_at": now(), "progress": None, "message": None, "group_size": bindparam("p_n"),
        "micro_batch": bindparam("p_micro_batch"), **({"dispatched_at": bindparam("p_at")} if dispatched else {}),
    }  # fmt: skip
    return update(Job).where(*wanted).values(values).returning(*_CLAIMED).execution_options(**BINARY)


@cache
def _held() -> ColumnElement[bool]:
    """Whether a job's batch, project or queue is paused or being cancelled."""
    return or_(
        and_(Job.c.batch_id.is_not(None), Job.c.batch_id.in_(HELD_BATCHES)),
        Job.c.project_id.in_(PAUSED_PROJECTS),
        Job.c.queue.in_(select(Queue.c.name).where(Queue.c.paused)),
    )


def claimed_by(conn: Connection, ids: Sequence[str], worker: str) -> list[Claimed]:
    """Those of the jobs that this worker holds already: what a claim took whose answer was lost."""
    query: Any = select(*_CLAIMED, Job.c.micro_batch, Job.c.group_size).where(among(conn, Job.c.id, ids), was(JobState.RUNNING), Job.c.lease_owner == worker)
    return [Claimed(*row) for row in conn.execute(query.order_by(Job.c.id)).all()]


def unclaimed(conn: Connection, ids: Sequence[str], kind: str) -> list[Claimed]:
    """Those of the jobs that nobody has claimed, as a claim would give them; they stay where they are."""
    query: Any = select(*_CLAIMED, Job.c.micro_batch, Job.c.group_size).where(
        among(conn, Job.c.id, ids), was(JobState.QUEUED, JobState.DISPATCHED), Job.c.kind == kind
    )
    return [Claimed(*row) for row in conn.execute(query).all()]


def _by_attempt(keys: Iterable[tuple[str, int]]) -> dict[int, list[str]]:
    """Ids by attempt number. Nearly all have the same one, and then one plain statement fences all of them."""
    out: dict[int, list[str]] = defaultdict(list)
    for job_id, attempt in keys:
        out[attempt].append(job_id)
    return out


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
        lease_s: New length of the lease from now, seconds. A lease of which two thirds are left is not written again.
    """
    alive: dict[tuple[str, int], bool] = {}
    dialect = conn.dialect.name
    for attempt, ids in _by_attempt(held).items():
        found = prepared.rows(conn, _looked_after(dialect), {"p_ids": packed(dialect, ids), "p_attempt": attempt})
        alive.update({(row[0], attempt): row[1] for row in found})
        aged = [row[0] for row in found if row[2] is None or row[2] < lease_s * 2 / 3]
        if aged:
            renewed = prepared.scalars(conn, _renewed(dialect), {"p_ids": packed(dialect, aged), "p_attempt": attempt, "p_lease_s": lease_s})
            for job_id in set(aged) - set(renewed):
                alive.pop((job_id, attempt))  # it ended between the two statements
    told = [
        {"p_job": key[0], "p_attempt": key[1], "p_progress": progress, "p_message": (message or "")[:500] or None}
        for key, (progress, message) in held.items()
        if key in alive and (progress is not None or message)
    ]
    if told:
        conn.execute(_PROGRESSED, told)
    return Beat(frozenset(k for k in held if k not in alive), frozenset(k for k, c in alive.items() if c))


_PROGRESSED = (
    update(Job)
    .where(Job.c.id == bindparam("p_job"), Job.c.attempt == bindparam("p_attempt"), was(JobState.RUNNING))
    .values(progress=bindparam("p_progress"), message=bindparam("p_message"))
)


def _fence(dialect: str) -> tuple[Any, ...]:
    """Running jobs ``p_ids`` in attempt ``p_attempt``."""
    return among_given(dialect, Job.c.id, "p_ids"), Job.c.attempt == bindparam("p_attempt"), was(JobState.RUNNING)


@cache
def _looked_after(dialect: str) -> Any:
    return select(Job.c.id, Job.c.cancel_requested, Job.c.lease_until - now()).where(*_fence(dialect))


@cache
def _renewed(dialect: str) -> Any:
    return update(Job).where(*_fence(dialect)).values(lease_until=now() + bindparam("p_lease_s")).returning(Job.c.id)


def report_worker(conn: Connection, worker: str, queues: Sequence[str], device: str, running: int, models: Sequence[str]) -> None:
    """Note that a worker's child is alive, what it serves and which models it holds."""
    values = {"id": worker, "queues": list(queues), "device": device, "running": running, "models": list(models)}
    conn.execute(_reported(conn.dialect.name), values)


@cache
def _reported(dialect: str) -> Any:
    statement = upsert(dialect, Worker).values(started_at=now(), seen_at=now())
    names = ("seen_at", "queues", "device", "running", "models")
    return statement.on_conflict_do_update(index_elements=[Worker.c.id], set_={name: statement.excluded[name] for name in names})


def forget_worker(conn: Connection, worker: str) -> None:
    """A worker's child ended in order."""
    conn.execute(delete(Worker).where(Worker.c.id == worker))


# --- the end of an attempt ------------------------------------------------------------------------------------------


def finish(conn: Connection, results: Sequence[Success], worker: str | None = None) -> list[str]:
    """Commit successful attempts in one fenced transaction: state, artifacts, models, counters, events, children.

    Args:
        conn: Connection in a write transaction.
        results: What the attempts came to.
        worker: Who ran them, and holds them still; looked up where left out.

    Returns:
        Ids that were published. Others were fenced (another attempt holds the job) or cancelled meanwhile.
    """
    if not results:
        return []
    done: dict[str, Any] = {}
    dialect = conn.dialect.name
    owners: dict[str, str | None] = {}
    if worker is None:
        owners = dict(prepared.rows(conn, _owners(dialect), {"p_ids": packed(dialect, [r.job_id for r in results])}))
    by_attempt: dict[int, list[Success]] = defaultdict(list)
    for result in results:
        by_attempt[result.attempt].append(result)
    published: list[Success] = []
    for attempt, some in by_attempt.items():
        fence = {"p_ids": packed(dialect, [r.job_id for r in some]), "p_attempt": attempt}
        keyed = any(r.result_key or r.reused_from for r in some)
        kept = packed_rows(dialect, "p_keyed", _KEYS, [(r.job_id, r.result_key, r.reused_from) for r in some]) if keyed else {}
        known = all(r.claimed for r in some)
        if worker:
            fence["p_worker"] = worker
        found = prepared.rows(conn, _succeeded(dialect, keyed, known, bool(worker)), {**fence, **kept})
        hit = {row[0]: row for row in (_as_claimed(some, dict(found)) if known else found)}
        done.update(hit)
        published += some if len(hit) == len(some) else [r for r in some if r.job_id in hit]
        if len(hit) < len(some):
            for job_id in prepared.scalars(conn, _asked_to_stop(dialect), fence):
                stop(conn, Stop(job_id, attempt, {"type": "cancelled", "code": "cancelled", "message": "cancelled while it ran"}))
    if not done:
        return []
    at = max([row[_FINISHED_AT] for row in done.values()])
    _refuse_gone(conn, {a.object_key for r in published if r.reused_from for a in r.artifacts})
    artifacts: list[tuple[Any, ...]] = []
    attempts: list[tuple[Any, ...]] = []
    groups: dict[int, dict[str, Any]] = {}
    for r in published:
        job_id, project_id, _, kind, queue, seed, model, size, micro_batch, started_at, finished_at = done[r.job_id]
        made = [ended.artifact_row(new_id("art"), n, a, job_id, r.attempt, project_id, seed, model, at) for n, a in enumerate(r.artifacts)]
        artifacts += made
        if r.models:
            by_name = {values[6]: dict(zip(ended.ARTIFACT, values, strict=True)) for values in made}
            for version in r.models:
                insert_model(conn, _model_row(version, project_id, job_id, by_name, at))
        if (group := groups.get(micro_batch)) is not None:
            group["started_at"] = min(group["started_at"], started_at)
            group["finished_at"] = max(group["finished_at"], finished_at)
            continue
        ran = worker or owners.get(job_id) or ""
        if micro_batch is None:
            # Claimed by an earlier release.
            told = dumps(dict(r.phases)) if r.phases else None
            attempts.append((job_id, r.attempt, ran, size, started_at, finished_at, "succeeded", None, told))
        else:
            groups[micro_batch] = {
                "id": micro_batch, "kind": kind, "queue": queue, "worker": ran, "jobs": size,
                "started_at": started_at, "finished_at": finished_at, "phases": dict(r.phases) or None,
            }  # fmt: skip
    insert_rows(conn, Attempt, ended.ATTEMPT, attempts)
    rows = [row[:4] for row in done.values()]
    ended.count(conn, rows, JobState.SUCCEEDED, reused={r.job_id for r in published if r.reused_from})
    # In order: two commits may end parts of the same micro-batches, and each waits for the other's row.
    ran_in = [group for _, group in sorted(groups.items())]
    keys = {a.object_key for r in published for a in r.artifacts}
    waiting_for, marked = ended.leave(conn, artifacts, ran_in, ended.events(rows, JobState.SUCCEEDED, at), list(done), keys)
    _refuse_marked(conn, marked, list(done))
    _unblock(conn, waiting_for)
    return list(done)


_KEYS = ("id", "result_key", "reused_from")
"""Columns of what `_succeeded` with ``keyed`` is given as ``p_keyed``."""
_FINISHED_AT = 10
"""Place of that column in what `_succeeded` returns."""


def _as_claimed(results: Sequence[Success], finished: Mapping[str, float]) -> list[tuple[Any, ...]]:
    """What `_succeeded` would return, of those that finished, but for when they did."""
    return [
        (c.id, c.project_id, c.batch_id, c.kind, c.queue, c.seed, c.model, c.group_size, c.micro_batch, c.started_at, finished[c.id])
        for r in results if (c := r.claimed) and c.id in finished
    ]  # fmt: skip


@cache
def _succeeded(dialect: str, keyed: bool, known: bool, owned: bool) -> Any:
    values: dict[str, Any] = {
        "state": JobState.SUCCEEDED, "finished_at": now(), "progress": 1.0, "message": None, "error": null(), "lease_owner": None,
        "lease_until": None,
    }  # fmt: skip
    columns = (Job.c.id, Job.c.finished_at) if known else (
        Job.c.id, Job.c.project_id, Job.c.batch_id, Job.c.kind, Job.c.queue, Job.c.seed, Job.c.model, Job.c.group_size, Job.c.micro_batch,
        Job.c.started_at, Job.c.finished_at,
    )  # fmt: skip
    named, *wanted = [*_fence(dialect), ~Job.c.cancel_requested]
    if owned:
        wanted.append(Job.c.lease_owner == bindparam("p_worker"))
    if dialect == "postgresql":
        # What `refuse_doomed` takes, without a round trip of its own.
        wanted.append(statement_text(f"(SELECT CAST({_NO_SWEEP} AS text)) IS NOT NULL"))
    if keyed:
        given = rows_given(dialect, "p_keyed", _KEYS)
        named = Job.c.id == given.c.id
        values |= {"result_key": given.c.result_key, "reused_from": given.c.reused_from}
    return update(Job).where(named, *wanted).values(values).returning(*columns).execution_options(**BINARY)


@cache
def _owners(dialect: str) -> Any:
    return select(Job.c.id, Job.c.lease_owner).where(among_given(dialect, Job.c.id, "p_ids"))


@cache
def _asked_to_stop(dialect: str) -> Any:
    return select(Job.c.id).where(*_fence(dialect), Job.c.cancel_requested)


def _model_row(model: Mapping[str, Any], project_id: str, job_id: str, artifacts: Mapping[str, Mapping[str, Any]], at: float) -> dict[str, Any]:
    files = {}
    for role, name in model["files"].items():
        row = artifacts[name]
        files[role] = {k: row[k] for k in ("object_key", "sha256", "size", "name")} | {"artifact_id": row["id"]}
    return {
        "id": new_id("mv"), "project_id": project_id, "name": model["name"], "engine": model["engine"],
        "tasks": list(model["tasks"]), "files": files, "options": model.get("options", {}), "config": model.get("config", {}),
        "metrics": model.get("metrics", {}), "lineage": model.get("lineage", {}), "memory_mb": model.get("memory_mb", 0),
        "job_id": job_id, "created_at": at,
    }  # fmt: skip


def insert_model(conn: Connection, row: dict[str, Any]) -> str:
    """Insert a version, numbered after the highest there is of that name. Returns the version."""
    taken = conn.execute(
        select(ModelVersion.c.version).where(ModelVersion.c.project_id == row["project_id"], ModelVersion.c.name == row["name"])
    ).scalars()
    number = 1 + max((int(v) for v in taken if v.isdigit()), default=0)
    version = str(row.get("version") or number)
    conn.execute(insert(ModelVersion).values(**{**row, "version": version}))
    return version


def refuse_doomed(conn: Connection, keys: Collection[str], jobs: Sequence[str] = ()) -> None:
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
        conn.execute(statement_text(f"SELECT {_NO_SWEEP}"))
    _refuse_marked(conn, ended.newest_mark(conn, keys), jobs)


_NO_SWEEP = "pg_advisory_xact_lock_shared(hashtext('factory:sweep'))"
"""Keeps objects from being marked until the transaction ends. Marks are to be looked for in a later statement: one sees what was there when
it began."""


def _refuse_marked(conn: Connection, newest: tuple[str, float] | None, jobs: Sequence[str]) -> None:
    """`refuse_doomed` for a transaction that had the lock when it looked for the ``newest`` mark."""
    if newest is None:
        return
    key, at = newest
    begun = conn.execute(select(func.min(Job.c.started_at)).where(among(conn, Job.c.id, jobs))).scalar() if jobs else None
    # A worker may have put the same bytes for an earlier job and not again for this one (`Executor._put`, a minute at most).
    put_at = begun - MARK_S if begun is not None else database_time(conn) - MARK_S
    if at > put_at - MARK_S:
        raise TransientError(f"object {key} is being swept; it must be stored again", code="object_swept")


def _refuse_gone(conn: Connection, keys: Collection[str]) -> None:
    """Results that are taken over must still be somebody's: their own put did not make their objects young again."""
    if not keys:
        return
    there = set(conn.execute(select(Artifact.c.object_key).distinct().where(among(conn, Artifact.c.object_key, keys))).scalars())
    gone = sorted(set(keys) - there)
    if gone:
        raise TransientError(f"object {gone[0]} of an earlier result is not kept any more", code="object_swept")


def publish(conn: Connection, job_id: str, attempt: int, artifact: NewArtifact) -> bool:
    """Add an artifact to a job that still runs (a checkpoint, a sample grid); one of the same name is replaced.

    Returns:
        False if the attempt is fenced: nothing was written.
    """
    row = conn.execute(
        select(Job.c.id, Job.c.attempt, Job.c.project_id, Job.c.seed, Job.c.model)
        .where(Job.c.id == job_id, Job.c.attempt == attempt, was(JobState.RUNNING))
        .with_for_update()
    ).one_or_none()
    if row is None:
        return False
    refuse_doomed(conn, [artifact.object_key], [job_id])
    conn.execute(delete(Artifact).where(Artifact.c.job_id == job_id, Artifact.c.name == artifact.name))
    last = conn.execute(select(func.max(Artifact.c.position)).where(Artifact.c.job_id == job_id)).scalar()
    # Published ones sort behind the outputs that the commit will number from 0.
    start = max(1000, (last or 0) + 1)
    at = database_time(conn)
    insert_rows(conn, Artifact, ended.ARTIFACT, [ended.artifact_row(new_id("art"), start, artifact, row.id, row.attempt, row.project_id, row.seed, row.model, at)])
    return True


def drop_published(conn: Connection, job_id: str, attempt: int, names: Sequence[str]) -> list[str]:
    """Forget published artifacts (old checkpoints) of a job that this attempt still holds.

    Returns:
        Keys of their objects to which no other artifact points: delete them after the commit.
    """
    held = select(Job.c.id).where(Job.c.id == job_id, Job.c.attempt == attempt, was(JobState.RUNNING))
    statement = delete(Artifact).where(Artifact.c.job_id.in_(held), Artifact.c.name.in_(list(names))).returning(Artifact.c.object_key)
    keys = set(conn.execute(statement).scalars())
    return sorted(keys - set(conn.execute(select(Artifact.c.object_key).where(Artifact.c.object_key.in_(keys))).scalars()))


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


_ENDING = (
    select(
        Job.c.id, Job.c.attempt, Job.c.project_id, Job.c.batch_id, Job.c.kind, Job.c.group_size, Job.c.strikes, Job.c.tries,
        Job.c.group_limit, Job.c.cancel_requested, Job.c.seed, Job.c.model, Job.c.lease_owner, Job.c.started_at,
    )
    .where(Job.c.id == bindparam("p_job"), Job.c.attempt == bindparam("p_attempt"), was(JobState.RUNNING))
    .with_for_update()
)  # fmt: skip


def stop(conn: Connection, result: Stop) -> JobState | None:
    """End an attempt that has no result; the error's class decides whether the job is tried again.

    Returns:
        The job's new state, or None if the attempt was fenced.
    """
    row = conn.execute(_ENDING, {"p_job": result.job_id, "p_attempt": result.attempt}).one_or_none()
    if row is None or (result.worker and row.lease_owner != result.worker):
        return None
    error_class = "cancelled" if row.cancel_requested else str(result.error.get("type", "bug"))
    verdict = decide(
        error_class, group_size=row.group_size, strikes=row.strikes, tries=row.tries or {}, group_limit=row.group_limit,
        policy=get_kind(row.kind).retry,
    )  # fmt: skip
    terminal = verdict.state in TERMINAL
    values = {
        "p_job": row.id, "p_attempt": row.attempt, "p_state": verdict.state, "p_error": dict(result.error), "p_tries": dict(verdict.tries),
        "p_strikes": verdict.strikes, "p_limit": verdict.group_limit, "p_delay_s": verdict.delay_s,
    }  # fmt: skip
    at = conn.execute(_stopped(terminal), values).scalar_one()
    told = dumps(dict(result.error)), dumps(dict(result.phases)) if result.phases else None
    attempt = (row.id, row.attempt, row.lease_owner or "", row.group_size, row.started_at, at, error_class, *told)
    # A worker of an earlier release wrote the row when it claimed the job.
    insert_rows(conn, Attempt, ended.ATTEMPT, [attempt], replacing=("job_id", "attempt"))
    if terminal:
        ended.tell(conn, [(row.id, row.project_id, row.batch_id, row.kind)], verdict.state, at, error=result.error)
        _fail_children(conn, [row.id])
    else:
        data = {"attempt": row.attempt, "error": dict(result.error), "delay_s": round(verdict.delay_s, 3)}
        add_event(conn, "job.retrying", project_id=row.project_id, batch_id=row.batch_id, job_id=row.id, data=data)
    return verdict.state


@cache
def _stopped(terminal: bool) -> Any:
    values = {
        "state": bindparam("p_state"), "error": bindparam("p_error", type_=Job.c.error.type), "tries": bindparam("p_tries", type_=Job.c.tries.type),
        "strikes": bindparam("p_strikes"), "group_limit": bindparam("p_limit"), "lease_owner": None, "lease_until": None, "dispatched_at": None,
        "micro_batch": None, "progress": None, "message": None, **({"finished_at": now()} if terminal else {"run_after": now() + bindparam("p_delay_s", type_=Double)}),
    }  # fmt: skip
    fence = (Job.c.id == bindparam("p_job"), Job.c.attempt == bindparam("p_attempt"), was(JobState.RUNNING))
    return update(Job).where(*fence).values(values).returning(now())


def _unblock(conn: Connection, children: Sequence[str]) -> None:
    """Jobs for which each of these has one parent less to wait for."""
    dialect = conn.dialect.name
    by_count: dict[int, list[str]] = defaultdict(list)
    for child, n in sorted(Counter(children).items()):
        by_count[n].append(child)
    for n, some in by_count.items():
        # Subtracted, not counted anew: two parents may end at the same time and see only their own edge.
        ids = packed(dialect, some)
        conn.execute(_less_pending(dialect), {"p_ids": ids, "p_n": n})
        conn.execute(_unblocked(dialect), {"p_ids": ids})


@cache
def _less_pending(dialect: str) -> Any:
    blocked = (among_given(dialect, Job.c.id, "p_ids"), was(JobState.BLOCKED))
    return update(Job).where(*blocked).values(pending=Job.c.pending - bindparam("p_n"))


@cache
def _unblocked(dialect: str) -> Any:
    blocked = (among_given(dialect, Job.c.id, "p_ids"), was(JobState.BLOCKED))
    return update(Job).where(*blocked, Job.c.pending <= 0).values(state=JobState.QUEUED)


def _fail_children(conn: Connection, parents: Sequence[str]) -> None:
    """Fail what waits for jobs that ended without a result, down the graph, each with a reason that names its parent."""
    level = list(parents)
    dialect = conn.dialect.name
    while level:
        edges: dict[str, str] = {}
        for child, parent in ended.children(conn, level):
            edges.setdefault(child, parent)
        if not edges:
            return
        names = {row.id: row for row in conn.execute(_causes(dialect), {"p_ids": packed(dialect, set(edges.values()))})}
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
                .where(Job.c.id == child, was(JobState.BLOCKED))
                .values(state=state, error=error, finished_at=now())
                .returning(Job.c.id, Job.c.project_id, Job.c.batch_id, Job.c.kind, Job.c.finished_at)
            ).one_or_none()
            if row is not None:
                ended.tell(conn, [row[:4]], state, row.finished_at, error=error)
                next_level.append(child)
        level = next_level


@cache
def _causes(dialect: str) -> Any:
    return select(Job.c.id, Job.c.custom_id, Job.c.kind, Job.c.state, Job.c.error).where(among_given(dialect, Job.c.id, "p_ids"))


# --- rescue ---------------------------------------------------------------------------------------------------------


def reap(conn: Connection, *, lease_s: float, period_s: float, limit: int = 1000) -> dict[str, int]:
    """Return jobs whose lease ran out. After an outage of the reaper itself, and when it has never run, it first extends leases once.

    Returns:
        Count by new state, plus ``extended``.
    """
    last = conn.execute(_LAST_REAPED).scalar()
    at = conn.execute(_marked_now(conn.dialect.name), {"name": "reaper"}).scalar_one()
    if last is None or at - last > max(3 * period_s, lease_s / 2):
        # Nobody could renew while the database or the whole factory was away: give live workers one lease to say so.
        n = conn.execute(
            update(Job).where(has_state(JobState.RUNNING), Job.c.lease_until < at + lease_s).values(lease_until=at + lease_s)
        ).rowcount
        return {"extended": n}
    expired = conn.execute(_EXPIRED, {"p_at": at, "p_most": limit}).all()
    return dict(_crash(conn, expired, "the worker {owner} stopped renewing its lease"))


_LAST_REAPED = select(Mark.c.value).where(Mark.c.name == "reaper").with_for_update()
_EXPIRED = (
    select(Job.c.id, Job.c.attempt, Job.c.lease_owner)
    .where(has_state(JobState.RUNNING), Job.c.lease_until < bindparam("p_at"))
    .limit(bindparam("p_most"))
)


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
    rows = conn.execute(select(Job.c.id, Job.c.attempt).where(has_state(JobState.RUNNING))).all()
    return sum(crash(conn, [(r.id, r.attempt) for r in rows], reason, released=True).values())


def unblock_stuck(conn: Connection, limit: int = 1000) -> int:
    """Safety net: queue blocked jobs all of whose parents have succeeded, fail those with a failed one."""
    stuck = list(conn.execute(_STUCK, {"p_most": limit}).scalars())
    for chunk in _chunks(stuck):
        conn.execute(update(Job).where(Job.c.id.in_(chunk), was(JobState.BLOCKED)).values(state=JobState.QUEUED, pending=0))
    return len(stuck)


_Parent = Job.alias("parent")
_STUCK = (
    select(Job.c.id)
    .where(has_state(JobState.BLOCKED))
    .where(
        ~select(Dependency.c.job_id)
        .where(Dependency.c.job_id == Job.c.id, Dependency.c.parent_id.in_(select(_Parent.c.id).where(_Parent.c.state != JobState.SUCCEEDED)))
        .exists()
    )
    .limit(bindparam("p_most"))
)


@cache
def _marked_now(dialect: str) -> Any:
    statement = upsert(dialect, Mark).values(value=now())
    return statement.on_conflict_do_update(index_elements=[Mark.c.name], set_={"value": statement.excluded.value}).returning(Mark.c.value)


# --- cancel, pause --------------------------------------------------------------------------------------------------

_WAITING = (JobState.BLOCKED, JobState.QUEUED, JobState.DISPATCHED)


def cancel_jobs(conn: Connection, ids: Sequence[str]) -> dict[str, int]:
    """Cancel jobs: waiting ones at once, running ones by asking their worker; terminal ones stay as they are.

    Returns:
        ``{"cancelled": n, "requested": n}``.
    """
    cancelled, requested = 0, 0
    dialect = conn.dialect.name
    for chunk in _chunks(sorted(ids)):
        some = {"p_ids": packed(dialect, chunk)}
        rows = conn.execute(_cancelled(dialect), some).all()
        requested += conn.execute(_asked(dialect), some).rowcount
        if rows:
            ended.tell(conn, [row[:4] for row in rows], JobState.CANCELLED, max(row.finished_at for row in rows))
            _fail_children(conn, [r.id for r in rows])
        cancelled += len(rows)
    return {"cancelled": cancelled, "requested": requested}


@cache
def _cancelled(dialect: str) -> Any:
    error = {"type": "cancelled", "code": "cancelled", "message": "cancelled before it started"}
    return (
        update(Job)
        .where(among_given(dialect, Job.c.id, "p_ids"), was(*_WAITING))
        .values(state=JobState.CANCELLED, finished_at=now(), error=error, cancel_requested=True, dispatched_at=None)
        .returning(Job.c.id, Job.c.project_id, Job.c.batch_id, Job.c.kind, Job.c.finished_at)
    )


@cache
def _asked(dialect: str) -> Any:
    running = (among_given(dialect, Job.c.id, "p_ids"), was(JobState.RUNNING), ~Job.c.cancel_requested)
    return update(Job).where(*running).values(cancel_requested=True)


def cancel_batch(conn: Connection, batch_id: str, limit: int = 2000) -> int:
    """Cancel up to ``limit`` waiting jobs of a batch and ask its running ones to stop.

    The batch turns ``cancelling`` at once, which keeps every one of its jobs from being claimed; the timer calls this
    again until nothing waits. Lines that are no rows yet become cancelled rows: the expander goes on.

    Returns:
        Jobs that still wait.
    """
    conn.execute(
        update(Batch)
        .where(Batch.c.id == batch_id, Batch.c.state.in_((BatchState.RUNNING, BatchState.EXPANDING)))
        .values(state=BatchState.CANCELLING, paused=False)
    )
    wait = any_of((Job.c.id,), [Job.c.batch_id == batch_id], batch=True, states=_WAITING)
    cancel_jobs(conn, list(conn.execute(select(wait.c.id).limit(limit)).scalars()))
    conn.execute(
        update(Job).where(Job.c.batch_id == batch_id, has_state(JobState.RUNNING), ~Job.c.cancel_requested).values(cancel_requested=True)
    )
    return int(conn.execute(select(func.count()).select_from(wait)).scalar_one())


def pause(conn: Connection, what: str, name: str, paused: bool) -> bool:
    """Pause or resume a ``queue``, ``project`` (id) or ``batch`` (id); looked at on dispatch and on claim.

    Returns:
        Whether there is such a thing (queues always are).
    """
    if what == "queue":
        statement = insert_for(conn, Queue).values(name=name, paused=paused)
        conn.execute(statement.on_conflict_do_update(index_elements=[Queue.c.name], set_={"paused": paused}))
        return True
    table = {"project": Project, "batch": Batch}[what]
    hit = conn.execute(update(table).where(table.c.id == name).values(paused=paused)).rowcount
    if hit:
        owner = name if what == "project" else None
        batch_id = name if what == "batch" else None
        add_event(conn, f"{what}.{'paused' if paused else 'resumed'}", project_id=owner, batch_id=batch_id)
    return bool(hit)


def reprioritise(conn: Connection, ids: Sequence[str], priority: int) -> int:
    """Give waiting jobs another priority."""
    n = 0
    for chunk in _chunks(sorted(ids)):
        n += conn.execute(update(Job).where(Job.c.id.in_(chunk), was(*_WAITING)).values(priority=priority, band=100 - priority)).rowcount
    return n

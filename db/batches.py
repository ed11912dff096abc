"""Batches: making, finding, expanding."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, func, insert, select, update

from contentfactory.states import ACTIVE, TERMINAL, BatchState, JobState
from db import counters, lifecycle
from db.models import Batch, Job
from db.places import any_of
from db.session import now
from db.sql import has_state

_COLUMNS = (
    Batch.id, Batch.project_id, Batch.name, Batch.state, Batch.paused, Batch.priority, Batch.source, Batch.source_digest,
    Batch.cursor, Batch.total, Batch.retry_of, Batch.labels, Batch.error, Batch.created_at, Batch.finished_at,
)  # fmt: skip


def create(conn: Connection, batch_id: str, project_id: str, name: str, *, source: Mapping[str, Any], digest: str | None,
           priority: int, labels: Mapping[str, str] | None = None, idempotency_key: str | None = None,
           request_hash: str | None = None, retry_of: str | None = None) -> None:  # fmt: skip
    """Insert a batch in state ``expanding``."""
    conn.execute(
        insert(Batch).values(
            id=batch_id, project_id=project_id, name=name[:300], state=BatchState.EXPANDING, source=dict(source),
            source_digest=digest, priority=priority, labels=dict(labels or {}), idempotency_key=idempotency_key,
            request_hash=request_hash, retry_of=retry_of, created_at=now(),
        )
    )  # fmt: skip
    lifecycle.add_event(conn, "batch.created", project_id=project_id, batch_id=batch_id, data={"name": name[:300]})


_ONE = select(*_COLUMNS).where(Batch.id == bindparam("p_batch"), Batch.project_id == bindparam("p_project"))


def project_of(conn: Connection, batch_id: str) -> str | None:
    """The project of a batch, None where there is no such batch."""
    found: str | None = conn.execute(select(Batch.project_id).where(Batch.id == batch_id)).scalar()
    return found


def get(conn: Connection, project_id: str, batch_id: str) -> RowMapping | None:
    """A batch of the project."""
    return conn.execute(_ONE, {"p_batch": batch_id, "p_project": project_id}).mappings().one_or_none()


def find_open(conn: Connection, project_id: str, digest: str) -> str | None:
    """The newest unfinished batch made from the same source; one that is being cancelled is not gone on with."""
    query = (
        select(Batch.id)
        .where(
            Batch.project_id == project_id, Batch.source_digest == digest, Batch.finished_at.is_(None), Batch.state != BatchState.CANCELLING
        )
        .order_by(Batch.id.desc())
        .limit(1)
    )
    return conn.execute(query).scalar()


def list_page(conn: Connection, project_id: str, *, after: str | None = None, limit: int = 20) -> Sequence[RowMapping]:
    """Batches, newest first; ``after`` is the id of the last batch of the page before."""
    query = select(*_COLUMNS).where(Batch.project_id == project_id).order_by(Batch.id.desc()).limit(limit)
    if after:
        query = query.where(Batch.id < after)
    return conn.execute(query).mappings().all()


_MOVING = (
    select(Batch.id, Batch.state)
    .where(Batch.finished_at.is_(None), Batch.state.in_((BatchState.EXPANDING, BatchState.CANCELLING)))
    .order_by(Batch.state.desc(), Batch.id)
)


def moving(conn: Connection) -> list[tuple[str, str]]:
    """Ids and states of the batches that a timer has to do something about: first those that expand, oldest first, then those that are
    being cancelled.
    """
    return [(row.id, row.state) for row in conn.execute(_MOVING)]


def advance(conn: Connection, batch_id: str, old: int, new: int, jobs: int) -> BatchState | None:
    """Move the expander's cursor.

    Returns:
        The batch's state, under a lock until the transaction ends: ``expanding``, or ``cancelling``, and then the rows are to be
        cancelled at once. None if somebody else has moved the cursor (then write nothing: they wrote those rows).
    """
    state = conn.execute(_ADVANCED, {"p_batch": batch_id, "p_old": old, "p_new": new, "p_jobs": jobs}).scalar()
    return BatchState(state) if state else None


_ADVANCED = (
    update(Batch)
    .where(Batch.id == bindparam("p_batch"), Batch.cursor == bindparam("p_old"), Batch.state.in_((BatchState.EXPANDING, BatchState.CANCELLING)))
    .values(cursor=bindparam("p_new"), total=Batch.total + bindparam("p_jobs"))
    .returning(Batch.state)
)


def expanded(conn: Connection, batch_id: str) -> bool:
    """All rows are there: the batch runs."""
    statement = update(Batch).where(Batch.id == batch_id, Batch.state == BatchState.EXPANDING).values(state=BatchState.RUNNING)
    hit = conn.execute(statement).rowcount == 1
    if hit:
        row = conn.execute(select(Batch.project_id, Batch.total).where(Batch.id == batch_id)).one()
        lifecycle.add_event(conn, "batch.in_progress", project_id=row.project_id, batch_id=batch_id, data={"total": row.total})
    return hit


def fail(conn: Connection, batch_id: str, error: Mapping[str, Any]) -> None:
    """The batch cannot be expanded (its stored source is gone or broken)."""
    statement = (
        update(Batch)
        .where(Batch.id == batch_id, Batch.finished_at.is_(None))
        .values(state=BatchState.FAILED, error=dict(error), finished_at=now())
        .returning(Batch.project_id)
    )
    row = conn.execute(statement).one_or_none()
    if row:
        lifecycle.add_event(conn, "batch.failed", project_id=row.project_id, batch_id=batch_id, data={"error": dict(error)})


def progress(conn: Connection, batch_id: str) -> dict[str, dict[str, int]]:
    """Kind → state → jobs, with ``total``, the terminal states, ``reused``, and of the others ``running`` and ``waiting``."""
    out = counters.counts(conn, batch_id)
    running = conn.execute(
        # Found by the index of what runs, whatever the size of the batch.
        select(Job.kind, func.count()).where(Job.batch_id + "" == batch_id, has_state(JobState.RUNNING)).group_by(Job.kind)
    )
    for kind, n in running:
        out.setdefault(kind, {})["running"] = n
    for states in out.values():
        for state in ("total", *TERMINAL, "running", "reused"):
            states.setdefault(str(state), 0)
        ended = sum(states.get(s, 0) for s in TERMINAL)
        states["waiting"] = max(0, states.get("total", 0) - ended - states.get("running", 0))
    return out


def totals(per_kind: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Counters summed over kinds."""
    out: Counter[str] = Counter()
    for states in per_kind.values():
        out.update(states)
    return dict(out)


def active_jobs(conn: Connection, batch_id: str) -> int:
    """Jobs that are not terminal, counted from the rows."""
    query = select(func.count()).select_from(any_of((Job.id,), [Job.batch_id == batch_id], batch=True, states=ACTIVE))
    return int(conn.execute(query).scalar_one())

"""Counters of batches: folded from what every commit appends, read, and the end of a batch by them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from sqlalchemy import Connection, bindparam, delete, select, update

from contentfactory.states import TERMINAL, BatchState
from db.lifecycle import CHUNK, add_event
from db.session import now, upsert
from db.sql import among, among_given, packed
from db.tables import Batch, BatchCount, BatchDelta


def fold_counts(conn: Connection, limit: int = 20_000) -> int:
    """Fold appended deltas into the counters; on PostgreSQL only those that no other folder holds."""
    rows = conn.execute(_DELTAS_UNLOCKED if conn.dialect.name == "postgresql" else _DELTAS, {"p_most": limit}).all()
    if not rows:
        return 0
    sums: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        sums[(row.batch_id, row.kind, row.state)] += row.n
    for (batch_id, kind, state), n in sorted(sums.items()):
        conn.execute(_counted(conn.dialect.name), {"batch_id": batch_id, "kind": kind, "state": state, "n": n})
    ids = [row.id for row in rows]
    for start in range(0, len(ids), CHUNK):
        conn.execute(delete(BatchDelta).where(BatchDelta.c.id.in_(ids[start : start + CHUNK])))
    return len(rows)


@cache
def _counted(dialect: str) -> Any:
    statement = upsert(dialect, BatchCount)
    key = [BatchCount.c.batch_id, BatchCount.c.kind, BatchCount.c.state]
    return statement.on_conflict_do_update(index_elements=key, set_={"n": BatchCount.c.n + statement.excluded.n})


_DELTAS = (
    select(BatchDelta.c.id, BatchDelta.c.batch_id, BatchDelta.c.kind, BatchDelta.c.state, BatchDelta.c.n)
    .order_by(BatchDelta.c.id)
    .limit(bindparam("p_most"))
)
_DELTAS_UNLOCKED = _DELTAS.with_for_update(skip_locked=True)


def counts(conn: Connection, batch_id: str) -> dict[str, dict[str, int]]:
    """Counters of a batch: kind → state → n, where ``total`` counts accepted jobs and ``reused`` is part of ``succeeded``."""
    return _counts(conn, [batch_id])[batch_id]


def _counts(conn: Connection, batch_ids: Iterable[str]) -> dict[str, dict[str, dict[str, int]]]:
    """`counts` of many batches."""
    dialect = conn.dialect.name
    out: dict[str, dict[str, dict[str, int]]] = {batch_id: {} for batch_id in batch_ids}
    for batch_id, kind, state, n in conn.execute(_counters(dialect), {"p_batches": packed(dialect, out)}).all():
        states = out[batch_id].setdefault(kind, {})
        states[state] = states.get(state, 0) + int(n)
    return out


@cache
def _counters(dialect: str) -> Any:
    folded, fresh = (
        select(table.c.batch_id, table.c.kind, table.c.state, table.c.n).where(among_given(dialect, table.c.batch_id, "p_batches"))
        for table in (BatchCount, BatchDelta)
    )
    return folded.union_all(fresh)


def all_ended(conn: Connection, batch_ids: Iterable[str]) -> set[str]:
    """Those of the batches all of whose jobs have ended by the counters: a look that needs no write transaction."""
    dialect = conn.dialect.name
    totals = conn.execute(_totals(dialect), {"p_batches": packed(dialect, batch_ids)}).all()
    counted = _counts(conn, [row.id for row in totals]) if totals else {}
    return {row.id for row in totals if _ended_jobs(counted[row.id]) >= row.total}


@cache
def _totals(dialect: str) -> Any:
    return select(Batch.c.id, Batch.c.total).where(among_given(dialect, Batch.c.id, "p_batches"), Batch.c.finished_at.is_(None))


def _ended_jobs(per_kind: Mapping[str, Mapping[str, int]]) -> int:
    return sum(n for states in per_kind.values() for state, n in states.items() if state in TERMINAL)


def close_batches(conn: Connection, batch_ids: Iterable[str] | None = None) -> list[str]:
    """Finish batches each of whose jobs is terminal; each finishes exactly once.

    Returns:
        Ids of the batches that this call finished.
    """
    query = _UNFINISHED
    if batch_ids is not None:
        query = query.where(among(conn, Batch.c.id, batch_ids))
    closed = []
    # One that was cancelled while it was expanding has lines that are no rows yet, and they have been accepted too.
    whole = [row for row in conn.execute(query).all() if row.cursor >= row.source.get("jobs", 0)]
    counted = _counts(conn, [row.id for row in whole]) if whole else {}
    for row in whole:
        per_kind = counted[row.id]
        if _ended_jobs(per_kind) < row.total:
            continue
        state = BatchState.CANCELLED if row.state == BatchState.CANCELLING else BatchState.COMPLETED
        if conn.execute(_FINISHED, {"p_batch": row.id, "p_old": row.state, "p_state": state}).rowcount:
            totals: Counter[str] = Counter()
            for states in per_kind.values():
                totals.update(states)
            add_event(conn, f"batch.{state}", project_id=row.project_id, batch_id=row.id, data={"counts": dict(totals)})
            closed.append(row.id)
    return closed


_FINISHED = (
    update(Batch)
    .where(Batch.c.id == bindparam("p_batch"), Batch.c.state == bindparam("p_old"), Batch.c.finished_at.is_(None))
    .values(state=bindparam("p_state"), finished_at=now())
)
_UNFINISHED = select(Batch.c.id, Batch.c.project_id, Batch.c.state, Batch.c.total, Batch.c.cursor, Batch.c.source).where(
    Batch.c.finished_at.is_(None), Batch.c.state.in_((BatchState.RUNNING, BatchState.CANCELLING))
)

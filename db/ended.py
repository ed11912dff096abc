"""What jobs leave behind when they end, besides their own rows: artifacts, micro-batches, attempts, counters, events, children to release.

Changes no job's state: that is `db.lifecycle`'s, which calls this in the same transaction.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sqlalchemy import Connection, select

from contentfactory.fastjson import dumps_ids
from contentfactory.states import JobState
from db import prepared
from db.sql import among_given, dumps, insert_rows, insertion, packed
from db.tables import (
    Artifact,
    BatchDelta,
    Dependency,
    DoomedObject,
    Event,
    MicroBatch,
)

# Columns of the rows, in the order in which their values are given.
MICRO_BATCH = ("id", "kind", "queue", "worker", "jobs", "started_at", "finished_at", "phases")
EVENT = ("at", "type", "project_id", "batch_id", "job_id", "data")
ATTEMPT = ("job_id", "attempt", "worker", "group_size", "started_at", "finished_at", "outcome", "error", "phases")
"""Written when an attempt ends without a result; until then, and if it succeeds, the job's own row says as much."""
ARTIFACT = (
    "id", "project_id", "job_id", "attempt", "position", "role", "name", "object_key", "sha256", "size", "media_type", "meta", "seed",
    "model", "parents", "created_at",
)  # fmt: skip


@dataclass(slots=True)
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


def artifact_row(artifact_id: str, position: int, a: NewArtifact, job_id: str, attempt: int, project_id: str, seed: int, model: str | None,
                  at: float) -> tuple[Any, ...]:  # fmt: skip
    """Values of `ARTIFACT`."""
    return (
        artifact_id, project_id, job_id, attempt, position, a.role, a.name, a.object_key, a.sha256, a.size, a.media_type,
        dumps(a.meta) if a.meta else "{}", a.seed if a.seed is not None else seed, a.model or model,
        dumps(list(a.parents)) if a.parents else "[]", at,
    )  # fmt: skip


def leave(conn: Connection, artifacts: Sequence[tuple[Any, ...]], micro_batches: Sequence[Mapping[str, Any]], told: Sequence[tuple[Any, ...]],
          parents: Sequence[str], keys: Collection[str]) -> tuple[list[str], tuple[str, float] | None]:  # fmt: skip
    """Write what successful jobs leave behind, and find who waits for them.

    Nearly always that is one micro-batch with one event: on PostgreSQL these, the artifact of a single job and the questions go in one round trip.

    Args:
        conn: Connection in a write transaction.
        artifacts: Values of `ARTIFACT`.
        micro_batches: Values of `MICRO_BATCH`, by name.
        told: Values of `EVENT`.
        parents: Ids of the jobs.
        keys: Keys of the artifacts' objects.

    Returns:
        Ids of those who wait, as often as for how many of them, and the `newest_mark` on the objects.
    """
    dialect = conn.dialect.name
    together = dialect == "postgresql" and len(micro_batches) == len(told) == 1
    one = together and len(artifacts) == 1
    if not one:
        insert_rows(conn, Artifact, ARTIFACT, artifacts)
    if together:
        [ran_in], [event] = micro_batches, told
        known = {**ran_in, "phases": dumps(ran_in["phases"]) if ran_in["phases"] else None}
        questions = packed(dialect, parents), packed(dialect, keys)
        found = prepared.run(conn, _left(one), (*(known[name] for name in MICRO_BATCH), *event, *(artifacts[0] if one else ()), *questions))
        return [child for child, key, _ in found if key is None], next(((key, at) for _, key, at in found if key is not None), None)
    if micro_batches:
        given = ({**one, "phases": dumps(one["phases"]) if one["phases"] else None} for one in micro_batches)
        prepared.run_many(conn, _micro_batches(dialect), [tuple(one[name] for name in MICRO_BATCH) for one in given])
    insert_rows(conn, Event, EVENT, told)
    return [child for child, _ in children(conn, parents)], newest_mark(conn, keys)


@cache
def _left(artifact: bool) -> str:
    parts = [_micro_batches("postgresql"), insertion("postgresql", Event, EVENT)]
    if artifact:
        parts.append(insertion("postgresql", Artifact, ARTIFACT))
    written = ", ".join(f"part{n} AS ({part})" for n, part in enumerate(parts))
    children = f"SELECT job_id, NULL, NULL FROM {Dependency.name} WHERE parent_id = ANY(CAST(%s AS VARCHAR[]))"  # noqa: S608 - names of our own
    marks = f"SELECT NULL, object_key, at FROM {DoomedObject.name} WHERE object_key = ANY(CAST(%s AS VARCHAR[])) ORDER BY at DESC LIMIT 1"  # noqa: S608
    return f"WITH {written} {children} UNION ALL ({marks})"


def newest_mark(conn: Connection, keys: Collection[str]) -> tuple[str, float] | None:
    """The object of these that was last marked to be deleted, and when; None where none is."""
    if not keys:
        return None
    dialect = conn.dialect.name
    found = prepared.rows(conn, _newest_mark(dialect), {"p_keys": packed(dialect, keys)})
    return tuple(found[0]) if found else None


@cache
def _newest_mark(dialect: str) -> Any:
    query = select(DoomedObject.c.object_key, DoomedObject.c.at).where(among_given(dialect, DoomedObject.c.object_key, "p_keys"))
    return query.order_by(DoomedObject.c.at.desc()).limit(1)


@cache
def _micro_batches(dialect: str) -> str:
    return f"{insertion(dialect, MicroBatch, MICRO_BATCH)} ON CONFLICT DO NOTHING"


def children(conn: Connection, parents: Sequence[str]) -> list[tuple[str, str]]:
    """Who waits for these jobs: pairs of child and parent."""
    dialect = conn.dialect.name
    return prepared.rows(conn, _edges(dialect), {"p_ids": packed(dialect, parents)})


@cache
def _edges(dialect: str) -> Any:
    return select(Dependency.c.job_id, Dependency.c.parent_id).where(among_given(dialect, Dependency.c.parent_id, "p_ids"))


def tell(conn: Connection, rows: Sequence[Any], state: JobState, at: float, *, error: Mapping[str, Any] | None = None) -> None:
    """Count jobs that have just become terminal, and tell of them.

    Args:
        conn: Connection in a write transaction.
        rows: Id, project, batch and kind of each job.
        state: What they became.
        at: When, on the database's clock.
        error: Why, where they have no result.
    """
    count(conn, rows, state)
    insert_rows(conn, Event, EVENT, events(rows, state, at, error))


def count(conn: Connection, rows: Sequence[Any], state: JobState, *, reused: Collection[str] = ()) -> None:
    """Add jobs that have just become terminal to their batches' counters; ``reused`` took another job's result."""
    deltas = Counter([(batch_id, kind, str(state)) for _, _, batch_id, kind in rows if batch_id])
    if reused:
        deltas.update([(batch_id, kind, "reused") for job_id, _, batch_id, kind in rows if batch_id and job_id in reused])
    add_deltas(conn, deltas)


def events(rows: Sequence[Any], state: JobState, at: float, error: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
    """Values of `EVENT` for jobs that have just become terminal.

    Jobs that end together have one event: those of a batch, and where they succeed those of a project that belong to none.
    """
    found: list[tuple[Any, ...]] = []
    grouped: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    together = state == JobState.SUCCEEDED and len(rows) > 1
    alone = dumps({"state": str(state), **({"error": dict(error)} if error else {})})
    for job_id, project_id, batch_id, _ in rows:
        if error is None and (batch_id or together):
            grouped[(project_id, batch_id)].append(job_id)
        else:
            found.append((at, f"job.{state}", project_id, batch_id, job_id, alone))
    for (project_id, batch_id), ids in grouped.items():
        found.append((at, f"jobs.{state}", project_id, batch_id, None, dumps_ids({"state": str(state), "jobs": ids})))
    return found


def add_deltas(conn: Connection, deltas: Mapping[Any, int]) -> None:
    """Add to counters of batches by (batch, kind, state); jobs without a batch have none."""
    insert_rows(conn, BatchDelta, ("batch_id", "kind", "state", "n"), [(b, k, str(s), n) for (b, k, s), n in deltas.items() if b and n])

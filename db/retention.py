"""What may go: rows of ended jobs past their time, and objects that nothing points at."""

from collections.abc import Sequence

from sqlalchemy import Connection, String, cast, delete, or_, select, text, update

from contentfactory.states import ACTIVE, TERMINAL
from db.lifecycle import MARK_S, database_time
from db.models import (
    Artifact,
    Attempt,
    Batch,
    BatchCount,
    BatchDelta,
    Dataset,
    Dependency,
    DoomedObject,
    Event,
    Job,
    MicroBatch,
    ModelVersion,
)
from db.places import there_is
from db.session import insert_for, now

LATER_S = 86_400.0
"""How much longer than a job the row of its micro-batch is kept: the last of its members may end a while after the first."""


def expire_jobs(conn: Connection, older_than_s: float, limit: int = 500) -> int:
    """Delete ended jobs that are old enough, with their artifacts' rows, attempts and events; `expire_micro_batches` follows.

    Jobs of a batch go only once the batch has finished; jobs that made a model version stay as long as the version does,
    and a job stays while another that is not ended waits for it or takes something from it.

    Args:
        conn: Connection in a write transaction.
        older_than_s: Age since their end, seconds.
        limit: Most jobs in one call.

    Returns:
        Number of jobs deleted.
    """
    open_batches = select(Batch.id).where(Batch.finished_at.is_(None))
    waiting_children = (
        select(Dependency.parent_id).join(Job, Job.id == Dependency.job_id).where(Job.state.in_([str(s) for s in ACTIVE]))
    )
    ids = list(
        conn.execute(
            select(Job.id)
            .where(Job.state.in_([str(s) for s in TERMINAL]), Job.finished_at < now() - older_than_s)
            .where(or_(Job.batch_id.is_(None), Job.batch_id.not_in(open_batches)))
            .where(Job.id.not_in(select(ModelVersion.job_id).where(ModelVersion.job_id.is_not(None))))
            .where(Job.id.not_in(waiting_children))
            .order_by(Job.finished_at)
            .limit(limit)
        ).scalars()
    )
    if not ids:
        return 0
    for table, column in ((Artifact, Artifact.job_id), (Attempt, Attempt.job_id), (Dependency, Dependency.job_id), (Event, Event.job_id)):
        conn.execute(delete(table).where(column.in_(ids)))
    conn.execute(delete(Job).where(Job.id.in_(ids)))
    return len(ids)


def expire_micro_batches(conn: Connection, older_than_s: float, limit: int = 500) -> int:
    """Delete rows of micro-batches whose jobs have had their time.

    By their own age, a day after that of their jobs: which jobs still point at one only a look at every job could tell, since an index
    of ``jobs.micro_batch`` would be paid with each job. So a job that is kept for longer (its batch is open, another waits for it) loses
    the name of its worker and its phases, which nothing but a look at the job needs; those that made a model version keep them.

    Args:
        conn: Connection in a write transaction.
        older_than_s: Age of jobs that go, seconds.
        limit: Most rows in one call.

    Returns:
        Number of rows deleted.
    """
    # Looked at once: PostgreSQL finds nothing by an index where the bound is a clock that runs.
    edge = database_time(conn) - older_than_s - LATER_S
    makers = select(Job.micro_batch).join(ModelVersion, ModelVersion.job_id == Job.id).where(Job.micro_batch.is_not(None))
    old = select(MicroBatch.id).where(MicroBatch.finished_at < edge, MicroBatch.id.not_in(makers)).order_by(MicroBatch.finished_at).limit(limit)
    ids = list(conn.execute(old).scalars())
    if ids:
        conn.execute(delete(MicroBatch).where(MicroBatch.id.in_(ids)))
    return len(ids)


def expire_batches(conn: Connection, older_than_s: float, limit: int = 500) -> int:
    """Delete finished batches that are old enough and have no job left."""
    ids = list(
        conn.execute(
            select(Batch.id)
            .where(Batch.finished_at < now() - older_than_s)
            .where(~there_is([Job.batch_id == Batch.id], batch=True))
            .limit(limit)
        ).scalars()
    )
    if ids:
        for table, column in ((BatchCount, BatchCount.batch_id), (BatchDelta, BatchDelta.batch_id), (Event, Event.batch_id)):
            conn.execute(delete(table).where(column.in_(ids)))
        conn.execute(delete(Batch).where(Batch.id.in_(ids)))
    return len(ids)


def expire_inputs(conn: Connection, older_than_s: float, limit: int = 500) -> int:
    """Delete rows of uploaded inputs that are old enough and that no data set, no artifact and no unfinished job names."""
    candidates = list(
        conn.execute(
            select(Artifact.id)
            .where(Artifact.role == "input", Artifact.job_id.is_(None), Artifact.created_at < now() - older_than_s)
            .where(Artifact.id.not_in(select(Dataset.artifact_id)))
            .limit(limit)
        ).scalars()
    )
    gone = []
    for artifact_id in candidates:
        named = cast(Job.params, String).like(f"%{artifact_id}%")
        derived = cast(Artifact.parents, String).like(f"%{artifact_id}%")
        used = conn.execute(select(Job.id).where(Job.state.in_([str(s) for s in ACTIVE]), named).limit(1)).scalar()
        if used is None and conn.execute(select(Artifact.id).where(derived).limit(1)).scalar() is None:
            gone.append(artifact_id)
    if gone:
        conn.execute(delete(Artifact).where(Artifact.id.in_(gone)))
    return len(gone)


def expire_events(conn: Connection, older_than_s: float, limit: int = 5000) -> int:
    """Delete events that are old enough."""
    ids = list(conn.execute(select(Event.id).where(Event.at < now() - older_than_s).order_by(Event.id).limit(limit)).scalars())
    for start in range(0, len(ids), 500):
        conn.execute(delete(Event).where(Event.id.in_(ids[start : start + 500])))
    return len(ids)


def referenced(conn: Connection, keys: Sequence[str]) -> set[str]:
    """Those of the object keys that something points at."""
    found: set[str] = set()
    for start in range(0, len(keys), 500):
        chunk = keys[start : start + 500]
        found.update(conn.execute(select(Artifact.object_key).where(Artifact.object_key.in_(chunk))).scalars())
        for key in chunk:
            if key not in found:
                # Sources of batches and files of models lie in JSON columns; both tables are small.
                inside = f'%"{key}"%'
                if conn.execute(select(Batch.id).where(Batch.finished_at.is_(None), cast(Batch.source, String).like(inside)).limit(1)).scalar() or conn.execute(select(ModelVersion.id).where(cast(ModelVersion.files, String).like(inside)).limit(1)).scalar():
                    found.add(key)
    return found


def doom(conn: Connection, keys: Sequence[str]) -> list[str]:
    """Mark objects as about to be deleted, once every transaction that may be writing rows for them has ended.

    Returns:
        Those that this call marked. The others bear somebody else's mark: they are that one's to delete, and whoever took that mark
        away would let rows point at what is about to go.
    """
    if not keys:
        return []
    hold(conn)
    statement = insert_for(conn, DoomedObject).values([{"object_key": key, "at": now()} for key in keys])
    return list(conn.execute(statement.on_conflict_do_nothing().returning(DoomedObject.object_key)).scalars())


def hold(conn: Connection) -> None:
    """Let nobody write rows for objects until this transaction ends; those who are at it are waited for."""
    if conn.dialect.name == "postgresql":
        conn.execute(text("SELECT pg_advisory_xact_lock(hashtext('factory:sweep'))"))


def gone(conn: Connection, keys: Sequence[str]) -> None:
    """The marked objects are deleted. Their marks stay for those who put them before, and let later attempts pass."""
    conn.execute(update(DoomedObject).where(DoomedObject.object_key.in_(list(keys))).values(at=now() - MARK_S))


def spare(conn: Connection, keys: Sequence[str]) -> None:
    """Take the marks away: the objects stay, or went long ago."""
    conn.execute(delete(DoomedObject).where(DoomedObject.object_key.in_(list(keys))))


def left_over(conn: Connection, older_than_s: float) -> list[str]:
    """Marks that nobody needs any more: of a sweep that died half-way, and of what went longer ago than any commit waits."""
    return list(conn.execute(select(DoomedObject.object_key).where(DoomedObject.at < now() - older_than_s)).scalars())




def any_artifact(conn: Connection) -> bool:
    """Whether the ledger knows any object at all."""
    return conn.execute(select(Artifact.id).limit(1)).scalar() is not None

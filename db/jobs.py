"""Jobs and artifacts as they are read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Connection, RowMapping, and_, bindparam, case, func, literal, null, or_, select, tuple_

from contentfactory.states import TERMINAL, JobState
from db import prepared
from db.models import Artifact, Attempt, Dependency, Event, Job, MicroBatch
from db.places import listed
from db.sql import among, among_given, has_state, packed, was

COLUMNS = (
    Job.id, Job.project_id, Job.batch_id, Job.custom_id, Job.line, Job.kind, Job.queue, Job.state, Job.priority, Job.params,
    Job.model, Job.seed, Job.seconds, Job.attempt, Job.strikes, Job.progress, Job.message, Job.error, Job.reused_from,
    Job.retry_of, Job.labels, Job.created_at, Job.started_at, Job.finished_at, Job.idempotency_key, Job.request_hash,
    Job.cancel_requested,
)  # fmt: skip

ARTIFACT_COLUMNS = (
    Artifact.id, Artifact.project_id, Artifact.job_id, Artifact.attempt, Artifact.position, Artifact.role, Artifact.name,
    Artifact.object_key, Artifact.sha256, Artifact.size, Artifact.media_type, Artifact.meta, Artifact.seed, Artifact.model,
    Artifact.parents, Artifact.created_at,
)  # fmt: skip


_ONE = select(*COLUMNS).where(Job.id == bindparam("p_job"), Job.project_id == bindparam("p_project"))
_KEYED = select(*COLUMNS).where(Job.project_id == bindparam("p_project"), Job.idempotency_key == bindparam("p_key"))


def get(conn: Connection, project_id: str, job_id: str) -> RowMapping | None:
    """A job of the project."""
    return conn.execute(_ONE, {"p_job": job_id, "p_project": project_id}).mappings().one_or_none()


def states(conn: Connection, job_ids: Sequence[str], *, meanwhile: Callable[[], None] | None = None) -> dict[str, JobState]:
    """State of each job that exists; ``meanwhile`` is done while the database looks."""
    if len(job_ids) == 1:  # one plan for all, which PostgreSQL makes for a list each time anew
        rows = prepared.rows(conn, _STATE, {"p_id": job_ids[0]}, meanwhile=meanwhile)
    else:
        if meanwhile:
            meanwhile()
        rows = list(conn.execute(select(Job.id, Job.state).where(among(conn, Job.id, job_ids))))
    return {job_id: JobState(state) for job_id, state in rows}


_STATE = select(Job.id, Job.state).where(Job.id == bindparam("p_id"))


def by_key(conn: Connection, project_id: str, key: str) -> RowMapping | None:
    """The job that an idempotency key made."""
    return conn.execute(_KEYED, {"p_project": project_id, "p_key": key}).mappings().one_or_none()


FEW = 1000
"""Rows up to which the jobs of a state are fetched by that state's own index and sorted."""


def list_page(conn: Connection, project_id: str, *, batch_id: str | None = None, state: str | None = None, kind: str | None = None,
              after: str | None = None, limit: int = 50) -> Sequence[RowMapping]:  # fmt: skip
    """Jobs, newest first (those of a batch by their lines, last first); ``after`` is the id of the last job of the page before.

    Quick at a million jobs: a state that is rare is found by its own index, one that is common along the way.
    """
    wanted: list[Any] = [Job.kind == kind] if kind else []
    if batch_id:
        # A job's id is made of its batch's: its lines are what says which comes first.
        wanted += [Job.project_id == project_id, Job.batch_id == batch_id]
        order: tuple[str, ...] = ("-line", "-id")
        line = conn.execute(select(Job.line).where(Job.id == after, Job.batch_id == batch_id)).scalar() if after else None
        if line is not None:
            # The first condition says no more than the second, but an index can be entered by it.
            wanted += [Job.line <= line, or_(Job.line < line, Job.id < after)]
    else:
        wanted += _of_project(project_id, before=after)
        order = ("-project_id", "-id")
    if state and state not in TERMINAL and (few := _few(conn, project_id, batch_id, state)) is not None:
        query = select(*COLUMNS).where(*wanted, was(JobState(state)), among(conn, Job.id, few))
        return conn.execute(query.order_by(*(getattr(Job, name[1:]).desc() for name in order)).limit(limit)).mappings().all()
    states = [JobState(state)] if state else []
    return conn.execute(listed(COLUMNS, wanted, order, limit, batch=bool(batch_id), states=states)).mappings().all()


def _of_project(project_id: str, before: str | None = None) -> list[Any]:
    """Conditions on a project's jobs, to be sorted by project and id.

    That both are compared at once keeps PostgreSQL from walking along the ids of all places and projects where it believes that nearly
    all of them are wanted, which it goes on to believe for a while after they have changed their place.
    """
    place = tuple_(Job.project_id, Job.id)
    return [place > tuple_(literal(project_id), literal("")), place < tuple_(literal(project_id), literal(before or "~"))]


def _few(conn: Connection, project_id: str, batch_id: str | None, state: str) -> list[str] | None:
    """Ids of the jobs of a state that is not terminal, where they are few; None where they are many, or may be."""
    scope = Job.batch_id + "" == batch_id if batch_id else Job.project_id + "" == project_id  # no index but the state's
    found = conn.execute(select(Job.id, scope.label("mine")).where(has_state(JobState(state))).limit(FEW)).all()
    return None if len(found) == FEW else [row.id for row in found if row.mine]


def of_batch(conn: Connection, batch_id: str, states: Sequence[JobState] = (), chunk: int = 1000) -> Iterator[RowMapping]:
    """Every job of a batch in the order of its lines, read page by page."""
    line, last = -1, ""
    while True:
        # An index is entered by the first of the two.
        wanted = [Job.batch_id == batch_id, Job.line >= line, or_(Job.line > line, Job.id > last)]
        rows = conn.execute(listed((*COLUMNS, Job.rank), wanted, ("line", "id"), chunk, batch=True, states=states)).mappings().all()
        yield from rows
        if len(rows) < chunk:
            return
        line, last = rows[-1]["line"], rows[-1]["id"]


def artifacts(conn: Connection, job_ids: Sequence[str], roles: Sequence[str] = ("output",)) -> dict[str, list[RowMapping]]:
    """Artifacts by job, in the order of their position."""
    out: dict[str, list[RowMapping]] = {}
    dialect = conn.dialect.name
    for start in range(0, len(job_ids), 500):
        chosen = {"p_jobs": packed(dialect, job_ids[start : start + 500]), "p_roles": packed(dialect, roles)}
        for row in conn.execute(_artifacts(dialect), chosen).mappings().all():
            out.setdefault(row["job_id"], []).append(row)
    return out


@cache
def _artifacts(dialect: str) -> Any:
    return (
        select(*ARTIFACT_COLUMNS)
        .where(among_given(dialect, Artifact.job_id, "p_jobs"), among_given(dialect, Artifact.role, "p_roles"))
        .order_by(Artifact.job_id, Artifact.position)
    )


def artifact(conn: Connection, project_id: str, artifact_id: str) -> RowMapping | None:
    """An artifact of the project."""
    query = select(*ARTIFACT_COLUMNS).where(Artifact.id == artifact_id, Artifact.project_id == project_id)
    return conn.execute(query).mappings().one_or_none()


def attempts(conn: Connection, job_id: str) -> Sequence[RowMapping]:
    """Every attempt of a job, in order.

    The last one has no row of its own while it is under way (it has no outcome either) and where it succeeded: then the job says what there is
    to say, and its micro-batch who ran it and its phases. That row goes with its time, before those of some jobs (`retention.expire_micro_batches`).
    """
    columns = (Attempt.attempt, Attempt.worker, Attempt.group_size, Attempt.started_at, Attempt.finished_at, Attempt.outcome, Attempt.error, Attempt.phases)
    succeeded = Job.state == JobState.SUCCEEDED
    last = (
        select(
            Job.attempt, func.coalesce(Job.lease_owner, MicroBatch.worker, "").label("worker"), Job.group_size, Job.started_at, Job.finished_at,
            case((succeeded, literal("succeeded"))).label("outcome"), null().label("error"), MicroBatch.phases,
        )
        .outerjoin(MicroBatch, and_(MicroBatch.id == Job.micro_batch, succeeded))
        .where(Job.id == job_id, or_(Job.state == JobState.RUNNING, and_(succeeded, Job.micro_batch.is_not(None))))
    )  # fmt: skip
    ended = conn.execute(select(*columns).where(Attempt.job_id == job_id).order_by(Attempt.attempt)).mappings().all()
    known = {row["attempt"] for row in ended}
    return [*ended, *(row for row in conn.execute(last).mappings() if row["attempt"] not in known)]


def events(conn: Connection, *, job_id: str | None = None, batch_id: str | None = None, after: int = 0, limit: int = 1000) -> Sequence[RowMapping]:
    """Events of a job or a batch after an event id, in order."""
    query = select(Event.id, Event.at, Event.type, Event.batch_id, Event.job_id, Event.data).where(Event.id > after)
    if job_id:
        query = query.where(Event.job_id == job_id)
    if batch_id:
        query = query.where(Event.batch_id == batch_id)
    return conn.execute(query.order_by(Event.id).limit(limit)).mappings().all()


def story(conn: Connection, job: Mapping[str, Any], after: int = 0) -> list[dict[str, Any]]:
    """Events of a job after an event id, its end among them: jobs that end together have one event, which names them all.

    Args:
        conn: Connection.
        job: The job's row.
        after: Id of the last event that is known.
    """
    found = [dict(event) for event in events(conn, job_id=job["id"], after=after)]
    ended = JobState(job["state"]).terminal
    if ended and not any(event["type"] == f"job.{job['state']}" for event in found):
        data = {"state": job["state"], **({"error": job["error"]} if job["error"] else {})}
        end = {"type": f"job.{job['state']}", "batch_id": job["batch_id"], "job_id": job["id"], "data": data}
        found.append({"id": None, "at": job["finished_at"], **end})
    return found


def parents(conn: Connection, job_id: str) -> list[str]:
    """Ids of the jobs that a job waits for."""
    return list(conn.execute(select(Dependency.parent_id).where(Dependency.job_id == job_id)).scalars())


def children(conn: Connection, job_ids: Sequence[str]) -> list[RowMapping]:
    """Jobs that wait for these, one level down."""
    out: list[RowMapping] = []
    for start in range(0, len(job_ids), 500):
        waiting = select(Dependency.job_id).where(Dependency.parent_id.in_(job_ids[start : start + 500]))
        out += conn.execute(select(*COLUMNS).where(Job.id.in_(waiting)).order_by(Job.id)).mappings().all()
    return out


def ids_where(conn: Connection, project_id: str, states: Sequence[str], *, queue: str | None = None, kind: str | None = None,
              batch_id: str | None = None, limit: int = 1000) -> list[str]:  # fmt: skip
    """Ids of jobs in these states, oldest first."""
    wanted = [Job.project_id == project_id] if batch_id else _of_project(project_id)
    if queue:
        wanted.append(Job.queue == queue)
    if kind:
        wanted.append(Job.kind == kind)
    if batch_id:
        wanted.append(Job.batch_id == batch_id)
    order = ("id",) if batch_id else ("project_id", "id")
    query = listed((Job.id, Job.project_id), wanted, order, limit, batch=bool(batch_id), states=[JobState(state) for state in states])
    return list(conn.execute(query).scalars())


def latest(conn: Connection, job_ids: Sequence[str]) -> dict[str, str]:
    """The newest retry of each job, where one was made: old id → new id."""
    out: dict[str, str] = {}
    frontier = {i: i for i in job_ids}
    while frontier:
        newer: dict[str, Any] = {}
        ids = list(frontier)
        for start in range(0, len(ids), 500):
            query = select(Job.id, Job.retry_of).where(Job.retry_of.in_(ids[start : start + 500])).order_by(Job.id)
            for row in conn.execute(query):
                newer[row.id] = frontier[row.retry_of]
        for new, root in newer.items():
            out[root] = new
        frontier = newer
    return out


def succeeded_with(conn: Connection, project_id: str, keys: Sequence[str]) -> dict[str, str]:
    """A succeeded job for each result key that has one: key → job id."""
    out: dict[str, str] = {}
    dialect = conn.dialect.name
    for start in range(0, len(keys), 500):
        chosen = {"p_keys": packed(dialect, keys[start : start + 500]), "p_project": project_id}
        for key, job_id in conn.execute(_with_result(dialect), chosen).all():
            if key:
                out[key] = job_id
    return out


@cache
def _with_result(dialect: str) -> Any:
    wanted = among_given(dialect, Job.result_key, "p_keys"), has_state(JobState.SUCCEEDED)
    return select(Job.result_key, Job.id).where(*wanted, Job.project_id == bindparam("p_project"))

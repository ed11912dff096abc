"""Jobs that ended without a result run again, as new jobs that are linked to the old ones."""

from collections.abc import Sequence
from typing import Any

from contentfactory.errors import Conflict, NotFound
from contentfactory.ids import new_id
from contentfactory.jobs.spec import get_kind
from contentfactory.states import UNWELL, JobState
from db import batches, jobs, lifecycle
from db.session import take_time
from producer.job_ids import job_id_for
from producer.references import rename_refs
from producer.spool import SPOOL_FORMAT

RETRYABLE = UNWELL


def failed(conn: Any, project_id: str, batch_id: str, new_batch: str) -> str | None:
    """Run a batch's failed, dead and cancelled jobs again as a new batch of linked jobs; what succeeded stays.

    A child that failed because its parent did comes along and waits for the parent's new job.

    Args:
        conn: Connection in a write transaction.
        project_id: The batch's project.
        batch_id: A batch that has ended.
        new_batch: Id of the new batch.

    Returns:
        The new batch's id, or None if nothing is to be retried.

    Raises:
        NotFound: If the project has no such batch.
        Conflict: If the batch still runs.
    """
    batch = batches.get(conn, project_id, batch_id)
    if batch is None:
        raise NotFound(f"batch {batch_id} does not exist")
    if batch["finished_at"] is None:
        raise Conflict(f"batch {batch_id} is {batch['state']}; wait for it or cancel it first", code="batch_not_finished")
    if batches.get(conn, project_id, new_batch) is not None:
        return new_batch  # an earlier try was committed and its answer lost
    take_time(conn)
    made = _replay(conn, list(jobs.of_batch(conn, batch_id, RETRYABLE)), new_batch)
    if not made:
        return None
    batches.create(
        conn, new_batch, project_id, batch["name"], digest=None, priority=batch["priority"],
        source={"retry_of": batch_id, "file": batch["source"].get("file"), "format": SPOOL_FORMAT}, labels=batch["labels"], retry_of=batch_id,
    )  # fmt: skip
    batches.advance(conn, new_batch, 0, len(made), len(made))
    lifecycle.insert_jobs(conn, made)
    batches.expanded(conn, new_batch)
    return new_batch


def chosen(conn: Any, project_id: str, job_ids: Sequence[str]) -> list[str]:
    """Run failed, dead or cancelled jobs again as new linked jobs, with the children that failed for their sake.

    A job that was retried already is not retried twice.

    Args:
        conn: Connection in a write transaction.
        project_id: The jobs' project.
        job_ids: The jobs.

    Returns:
        Ids of the new jobs, in the order of the given ones first.

    Raises:
        NotFound: If one is no job of the project.
        Conflict: If one is still under way or has succeeded.
    """
    take_time(conn)
    rows: dict[str, Any] = {}
    for job_id in dict.fromkeys(job_ids):
        row = jobs.get(conn, project_id, job_id)
        if row is None:
            raise NotFound(f"job {job_id} does not exist")
        if row["state"] not in RETRYABLE:
            raise Conflict(f"job {job_id} is {row['state']}; only failed, dead and cancelled jobs are retried", code="not_retryable")
        rows[job_id] = row
    frontier = list(rows)
    while frontier:
        found = [row for row in jobs.children(conn, frontier) if row["id"] not in rows and row["state"] in RETRYABLE]
        frontier = []
        for row in found:
            if (row["error"] or {}).get("code") == "dependency_failed" or row["state"] == JobState.CANCELLED:
                rows[row["id"]] = row
                frontier.append(row["id"])
    made = _replay(conn, list(rows.values()), None)
    lifecycle.insert_jobs(conn, made)
    return [job.id for job in made]


def _replay(conn: Any, rows: Sequence[Any], batch_id: str | None) -> list[lifecycle.NewJob]:
    """New linked jobs for ended ones, their references and dependencies pointing to each other's new jobs.

    Args:
        conn: Connection in a transaction.
        rows: Rows of the ended jobs; those that have a retry already are left out.
        batch_id: Batch of the new jobs; None for jobs of their own.
    """
    newer = jobs.latest(conn, [row["id"] for row in rows])
    rows = [row for row in rows if row["id"] not in newer]
    again = {row["id"]: job_id_for(batch_id, row["custom_id"] or row["id"]) if batch_id else new_id("job") for row in rows}
    parents = {row["id"]: jobs.parents(conn, row["id"]) for row in rows}
    newer |= jobs.latest(conn, sorted({p for found in parents.values() for p in found} - set(again)))

    def now_at(job: str) -> str:
        return again.get(job) or newer.get(job, job)

    made = []
    for row in rows:
        spec = get_kind(row["kind"])
        parsed = rename_refs(spec.validate(row["params"]), now_at)
        made.append(
            lifecycle.NewJob(
                id=again[row["id"]], project_id=row["project_id"], batch_id=batch_id, custom_id=row["custom_id"], line=row["line"],
                kind=row["kind"], queue=row["queue"], params=parsed.model_dump(mode="json"), share_key=spec.share_key(parsed, row["model"]),
                seconds=row["seconds"], seed=row["seed"], model=row["model"], priority=row["priority"],
                parents=tuple(now_at(p) for p in parents[row["id"]]), retry_of=row["id"], labels=row["labels"],
            )
        )  # fmt: skip
    return made

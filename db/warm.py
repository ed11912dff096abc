"""Warm models first, within bounds: a job whose model is loaded somewhere may pass up to 32 that wait for another one.

Loading a model costs seconds to minutes, so work for the model that is there goes first; and nobody starves: jobs pass only
within a project and a priority, and the job at the head of the line is passed by at most `AHEAD` jobs, ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Connection, select

from db.models import Overtaken, Worker
from db.session import insert_for

AHEAD = 32
"""Jobs that may pass the head of the line, all together."""


class Waiting(Protocol):
    """What is looked at of a waiting job."""

    id: str
    priority: int
    model: str | None


def choose(rows: Sequence[Any], warm: set[str] | frozenset[str], ahead: int = AHEAD) -> int:
    """The job to serve next.

    Args:
        rows: A project's waiting jobs (`Waiting`) in their order.
        warm: Model versions that are loaded.
        ahead: How many places ahead a job may lie.

    Returns:
        Its index: 0 for the head, where its model is warm, it needs none, or nobody near is warm.
    """
    head = rows[0]
    if not warm or head.model is None or head.model in warm:
        return 0
    for index in range(1, min(ahead, len(rows) - 1) + 1):
        row = rows[index]
        if row.priority != head.priority:
            return 0
        if row.model in warm:
            return index
    return 0


@dataclass
class _Line:
    job_id: str
    passed: int


class Preference:
    """Applies `choose` to the projects of a queue, and keeps count of who was passed.

    Nothing is read or written until a head is cold and somebody near it might be warm.

    Args:
        conn: Connection in the dispatcher's transaction.
        queue: Queue that is served.
        at: The database's time.
        worker_seen_s: How fresh a worker's report must be for it to count.
    """

    def __init__(self, conn: Connection, queue: str, at: float, worker_seen_s: float) -> None:
        self._conn, self._queue, self._since = conn, queue, at - worker_seen_s
        self._warm: frozenset[str] | None = None
        self._lines: dict[str, _Line] = {}
        self._changed: set[str] = set()

    def pick(self, project: str, rows: Sequence[Any]) -> tuple[int, int | None]:
        """Whom to serve next in a project.

        Args:
            project: Its id.
            rows: Its waiting jobs in their order; `AHEAD` and one of them suffice.

        Returns:
            Index of the job, and how many jobs may go with it at most (None: no bound of ours).
        """
        head = rows[0]
        # The usual queue wants one model: then there is nothing to choose.
        if head.model is None or all(row.model == head.model for row in rows[1 : AHEAD + 1]):
            return 0, None
        left = AHEAD - self._passed(project, head.id)
        index = choose(rows, self._loaded(), left) if left > 0 else 0
        return (index, left) if index else (0, None)

    def passed(self, project: str, head_id: str, count: int) -> None:
        """So many jobs were sent although this one waits at the head."""
        line = self._lines[project]
        if line.job_id != head_id:
            line = self._lines[project] = _Line(head_id, 0)
        line.passed += count
        self._changed.add(project)

    def save(self) -> None:
        """Write the counts; call it before the transaction ends."""
        for project in sorted(self._changed):
            line = self._lines[project]
            statement = insert_for(self._conn, Overtaken).values(
                queue=self._queue, project_id=project, job_id=line.job_id, passed=line.passed
            )
            self._conn.execute(
                statement.on_conflict_do_update(
                    index_elements=[Overtaken.queue, Overtaken.project_id], set_={"job_id": line.job_id, "passed": line.passed}
                )
            )

    def _passed(self, project: str, head_id: str) -> int:
        line = self._lines.get(project)
        if line is None:
            query = select(Overtaken.job_id, Overtaken.passed).where(Overtaken.queue == self._queue, Overtaken.project_id == project)
            row = self._conn.execute(query).one_or_none()
            line = self._lines[project] = _Line(row.job_id, row.passed) if row else _Line(head_id, 0)
        return line.passed if line.job_id == head_id else 0

    def _loaded(self) -> frozenset[str]:
        if self._warm is None:
            rows = self._conn.execute(select(Worker.queues, Worker.models).where(Worker.seen_at > self._since)).all()
            self._warm = frozenset(key.partition("|")[0] for row in rows if self._queue in row.queues for key in row.models)
        return self._warm


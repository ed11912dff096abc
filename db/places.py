"""Jobs of a project or a batch, whatever their places: each place has an index of its own, and a listing puts them together.

An index of all jobs of a project would be written with each change of a job's state, which one of a single place is not.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, or_, select, text, union_all

from contentfactory.states import UNWELL, JobState
from db.models import Job
from db.sql import was


@dataclass(frozen=True)
class Place:
    """Jobs that an index of a project's and one of a batch's jobs cover.

    Args:
        states: States that have it.
        where: The condition of the indexes, word for word: SQLite takes no other.
        of_project: Index of a project's jobs, by id.
        of_batch: Index of a batch's jobs, by line.
    """

    states: tuple[JobState, ...]
    where: str
    of_project: str
    of_batch: str


_LISTED = ", ".join(f"'{state}'" for state in UNWELL)
PLACES = (
    Place((JobState.BLOCKED, JobState.QUEUED), "jobs.place IN ('blocked', 'queued')", "ix_jobs_project_waiting", "ix_jobs_waiting"),
    # On the broker and in workers' hands: few, whoever's they are.
    Place((JobState.DISPATCHED, JobState.RUNNING), "jobs.place = 'flying'", "ix_jobs_flying", "ix_jobs_flying"),
    Place((JobState.SUCCEEDED,), "jobs.place = 'succeeded'", "ix_jobs_succeeded", "ix_jobs_batch_succeeded"),
    Place(UNWELL, f"jobs.place IN ({_LISTED})", "ix_jobs_unwell", "ix_jobs_batch_unwell"),
)
"""All places there are."""


def listed(columns: Sequence[Any], wanted: Sequence[Any], order: Sequence[str], limit: int, *, batch: bool,
           states: Collection[JobState] = ()) -> Any:  # fmt: skip
    """A query for jobs in order: the first of each place, of these the first.

    One statement, so that a job which changes its place meanwhile is seen once.

    Args:
        columns: Columns of `Job` to read; those of the order are among them.
        wanted: Conditions, that on the project or the batch among them.
        order: Names of columns to sort by, each with a ``-`` in front where descending.
        limit: Most rows.
        batch: Whether the jobs are a batch's; a project's otherwise.
        states: Only jobs in these states; all where empty.
    """
    parts = [part.order_by(*_order(Job, order)).limit(limit).subquery() for part in _parts(columns, wanted, batch, states)]
    if len(parts) == 1:
        return select(parts[0]).order_by(*_order(parts[0].c, order))
    found = union_all(*(select(part) for part in parts)).subquery()
    return select(found).order_by(*_order(found.c, order)).limit(limit)


def any_of(columns: Sequence[Any], wanted: Sequence[Any], *, batch: bool, states: Collection[JobState] = ()) -> Any:
    """As `listed`, all of them, in no order."""
    return union_all(*_parts(columns, wanted, batch, states)).subquery()


def there_is(wanted: Sequence[Any], *, batch: bool) -> ColumnElement[bool]:
    """Whether there is such a job: a condition for a statement whose own tables ``wanted`` may name."""
    # Not by way of `any_of`: what stands in a FROM would bring those tables in anew, and find the jobs of any row of theirs.
    return or_(*(part.exists() for part in _parts((Job.id,), wanted, batch, ())))


def _parts(columns: Sequence[Any], wanted: Sequence[Any], batch: bool, states: Collection[JobState]) -> list[Select[Any]]:
    out = []
    for place in PLACES:
        here = tuple(state for state in place.states if not states or state in states)
        if not here:
            continue
        part = select(*columns).where(*wanted, text(place.where))
        if len(here) < len(place.states):
            part = part.where(was(*here))
        # By name, since without statistics SQLite takes any index of two that look alike.
        out.append(part.with_hint(Job, f"INDEXED BY {place.of_batch if batch else place.of_project}", "sqlite"))
    return out


def _order(columns: Any, names: Sequence[str]) -> list[Any]:
    return [getattr(columns, name[1:]).desc() if name.startswith("-") else getattr(columns, name) for name in names]

"""Queued rows as a dispatcher sees them: which there are, in which order, and what may go together. Nothing here writes."""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import Connection, String, and_, bindparam, cast, func, literal, or_, select, text, tuple_

from contentfactory.jobs.spec import get_kind
from contentfactory.states import BatchState, JobState
from db import prepared
from db.prepared import BINARY
from db.session import now
from db.sql import among_given, has_state, packed
from db.tables import Batch, Job, Mark, Project, Queue, Share, Worker


def queues_with_work(conn: Connection) -> list[str]:
    """Queues that have queued jobs."""
    return prepared.scalars(conn, _QUEUES)


def _skipping(column: str, among: str, order: str, but: str = "") -> Any:
    """A query for the distinct values of an index's column that skips from each to the next, whatever number of rows lies between."""
    step = f"SELECT {column} FROM jobs WHERE {among} AND {column} > {{after}} ORDER BY {order} LIMIT 1"  # noqa: S608 - names of our own
    first, further = step.format(after="''"), step.format(after="found.value")
    return text(
        f"""WITH RECURSIVE found (value) AS (
            SELECT * FROM ({first}) AS first UNION ALL SELECT ({further}) FROM found WHERE found.value IS NOT NULL
        ) SELECT value FROM found WHERE value IS NOT NULL {but}"""  # noqa: S608
    )


_QUEUES = _skipping("queue", "place = 'queued'", "queue")
_PROJECTS = _skipping(
    "project_id", "place = 'queued' AND queue = :queue", "queue, project_id",
    "AND NOT EXISTS (SELECT 1 FROM projects WHERE projects.id = found.value AND projects.paused)",
)  # fmt: skip
"""Projects that have queued jobs on a queue, without those that are paused."""


Front = tuple[int, int, str]
"""Where a project's queue begins: band, rank and id of a job before which none of its jobs waits."""
HELD_BATCHES = select(Batch.c.id).where(Batch.c.finished_at.is_(None), or_(Batch.c.paused, Batch.c.state == BatchState.CANCELLING))
PAUSED_PROJECTS = select(Project.c.id).where(Project.c.paused)


class Queued(NamedTuple):
    """A row of `_QUEUED` by its values' names: made of the few that are next, since it takes longer than the row."""

    id: str
    kind: str
    priority: int
    share_key: str
    seconds: float
    group_limit: int
    created_at: float
    run_after: float
    model: str | None
    attempt: int
    band: int
    rank: int


_QUEUED = (
    select(*(Job.c[name] for name in Queued._fields))
    .where(has_state(JobState.QUEUED), Job.c.queue == bindparam("p_queue"), Job.c.project_id == bindparam("p_project"))
    .where(Job.c.run_after <= bindparam("p_at"), or_(Job.c.batch_id.is_(None), Job.c.batch_id.not_in(HELD_BATCHES)))
    .order_by(Job.c.band, Job.c.rank, Job.c.id)
    .limit(bindparam("p_most"))
    .execution_options(**BINARY)
)  # fmt: skip
"""A project's waiting jobs in their order."""
_ID, _PRIORITY, _SHARE_KEY, _SECONDS, _GROUP_LIMIT = 0, 2, 3, 4, 5
_QUEUED_FROM = _QUEUED.where(tuple_(Job.c.band, Job.c.rank, Job.c.id) >= tuple_(bindparam("p_band"), bindparam("p_rank"), bindparam("p_id")))
"""Those from a front on. What has left stands in PostgreSQL's index until it is vacuumed, and every look from the beginning passes over it."""
_IN_BROKER = (
    select(func.coalesce(func.sum(Job.c.seconds), 0.0).label("seconds"), func.count().label("jobs"))
    .where(Job.c.queue == bindparam("queue"), has_state(JobState.DISPATCHED))
    .subquery("in_broker")
)
_LOOK = select(
    now().label("at"),
    select(Queue.c.paused).where(Queue.c.name == bindparam("queue")).scalar_subquery().label("paused"),
    _IN_BROKER.c.seconds, _IN_BROKER.c.jobs,
    select(func.count()).where(Worker.c.seen_at > now() - bindparam("seen_s"), cast(Worker.c.queues, String).like(bindparam("serves")))
    .scalar_subquery().label("workers"),
    select(Mark.c.value).where(Mark.c.name == bindparam("clock")).scalar_subquery().label("clock"),
)  # fmt: skip
"""All that a dispatcher must know of a queue, in one round trip."""
_GLANCE = select(*(column for column in _LOOK.selected_columns if column.name not in ("seconds", "jobs")), literal(0).label("jobs"))
STRANGERS = 64
"""Projects that may each send a micro-batch though the broker holds all that it should."""
TAKING_S = 1.0
"""How long ago the last micro-batch of a worker may have begun that is thought to take the next one by itself, seconds."""
UNDIVIDED_S = 0.05
"""Compute seconds that the last jobs of a queue are not divided below: a micro-batch costs some 7 ms beside its jobs, and the last 512 no-ops
went in ten of them, each half as large as the one before."""
_IN_FLIGHT = (
    select(Job.c.project_id, func.sum(Job.c.seconds))
    .where(Job.c.queue == bindparam("queue"), has_state(JobState.DISPATCHED))
    .group_by(Job.c.project_id)
)


def look(conn: Connection, queue: str, worker_seen_s: float) -> Any:
    """A queue in one round trip: time (``at``), ``paused``, ``seconds`` and ``jobs`` in the broker, live ``workers``, its virtual ``clock``."""
    return prepared.one(conn, _LOOK, {"queue": queue, "seen_s": worker_seen_s, "serves": f'%"{queue}"%', "clock": clock_name(queue)})


def glance(conn: Connection, queue: str, worker_seen_s: float) -> Any:
    """As `look`, for who knows that nothing is on the broker: that is not counted."""
    return prepared.one(conn, _GLANCE, {"queue": queue, "seen_s": worker_seen_s, "serves": f'%"{queue}"%', "clock": clock_name(queue)})


_AT_WORK = select(func.count(Job.c.lease_owner.distinct())).where(
    Job.c.queue == bindparam("queue"), has_state(JobState.RUNNING), Job.c.started_at > now() - bindparam("within_s")
)


def at_work(conn: Connection, queue: str, within_s: float = TAKING_S) -> int:
    """Workers that run a job of this queue which began so few seconds ago."""
    return int(prepared.scalars(conn, _AT_WORK, {"queue": queue, "within_s": within_s})[0])


IDLE = (
    select(now().label("at"), Project.c.weight, Share.c.virtual_seconds, Mark.c.value.label("clock"))
    .select_from(
        Project.join(Mark, Mark.c.name == bindparam("clock"))
        .outerjoin(Share, and_(Share.c.project_id == Project.c.id, Share.c.queue == bindparam("queue")))
    )
    .where(Project.c.id == bindparam("project"), Project.c.paused.is_(False))
    .where(~select(Queue.c.name).where(Queue.c.name == bindparam("queue"), Queue.c.paused).exists())
    .where(~select(Job.c.id).where(Job.c.queue == bindparam("queue"), has_state(JobState.DISPATCHED)).exists())
    .where(~select(Job.c.id).where(Job.c.queue == bindparam("queue"), has_state(JobState.QUEUED)).exists())
)  # fmt: skip
"""Time (``at``), the queue's ``clock``, and the project's ``weight`` and ``virtual_seconds`` (None where it has none yet). No row where
anything is on the broker or waits, where the queue or the project is paused, or where the queue has no clock yet."""


def idle(conn: Connection, queue: str, project_id: str) -> Any:
    """The row of `IDLE`, None where there is none."""
    return prepared.one(conn, IDLE, idle_values(queue, project_id))


def idle_values(queue: str, project_id: str) -> dict[str, Any]:
    """Parameters of `IDLE`."""
    return {"queue": queue, "project": project_id, "clock": clock_name(queue)}


def clock_name(queue: str) -> str:
    """Name of the mark that keeps a queue's virtual clock."""
    return f"clock:{queue}"


def shares(conn: Connection, queue: str, projects: Iterable[str]) -> Sequence[tuple[str, float, float | None]]:
    """Id, weight and virtual time (None where it has none yet) of each project."""
    dialect = conn.dialect.name
    return prepared.rows(conn, _shares_of(dialect), {"p_queue": queue, "p_projects": packed(dialect, projects)})


@cache
def _shares_of(dialect: str) -> Any:
    return (
        select(Project.c.id, Project.c.weight, Share.c.virtual_seconds)
        .outerjoin(Share, and_(Share.c.project_id == Project.c.id, Share.c.queue == bindparam("p_queue")))
        .where(among_given(dialect, Project.c.id, "p_projects"))
    )


_FURTHEST = select(func.max(Share.c.virtual_seconds)).where(Share.c.queue == bindparam("queue"))


def in_flight(conn: Connection, queue: str) -> dict[str, float]:
    """Estimated compute seconds on the broker by project."""
    return {project: float(seconds) for project, seconds in prepared.rows(conn, _IN_FLIGHT, {"queue": queue})}


class Fair:
    """Start-time fair queueing over the projects of a queue: each micro-batch starts at its project's virtual time and moves it on.

    Virtual time is compute seconds over weight. What waits on the broker is charged already but not served yet, so a project stands where
    the oldest of its hints there began. The queue's clock is the least advanced of these: who was idle joins there, since idleness earns
    no credit to burst with, and is no worse off for what others have waiting.

    Args:
        conn: Connection in the dispatcher's transaction.
        queue: Queue.
        candidates: Projects that have due jobs.
        clock: The queue's clock so far; None where it never ran (a new queue, or a ledger from before there was one).
        busy: Whether anything is on the broker.
    """

    def __init__(self, conn: Connection, queue: str, candidates: Iterable[str], clock: float | None, busy: bool) -> None:
        if clock is None:
            clock = float(prepared.scalars(conn, _FURTHEST, {"queue": queue})[0] or 0.0)
        flying = in_flight(conn, queue) if busy else {}
        known = shares(conn, queue, {*candidates, *flying})
        self._weights = {project: max(weight, 1e-6) for project, weight, _ in known}
        told = {project: seconds for project, _, seconds in known if seconds is not None}
        self._began = {p: told[p] - seconds / self._weights[p] for p, seconds in flying.items() if p in told}
        self.clock = max(clock, min(self._began.values(), default=clock))
        self.virtual = {p: told.get(p, self.clock) if p in flying else max(told.get(p, 0.0), self.clock) for p in candidates}
        # Of these nothing is on the broker, and they have had no more than whoever has had least: they may go past what waits there.
        self.strangers = {p for p in candidates if flying and p not in flying and self.virtual[p] <= self.clock}
        self.charged: set[str] = set()

    def charge(self, project: str, seconds: float) -> None:
        """A micro-batch of a project leaves."""
        self._began.setdefault(project, self.virtual[project])
        self.virtual[project] += seconds / self._weights.get(project, 1.0)
        self.charged.add(project)

    def now(self) -> float:
        """The clock after what was charged."""
        return max(self.clock, min(self._began.values(), default=self.clock))


def spread(conn: Connection, queue: str, candidates: Mapping[str, "Waiting"], workers: int) -> dict[str, int]:
    """Most jobs of a micro-batch by ``share_key``, so that the last jobs of a queue keep all of its workers busy and not one of them.

    While every worker can have a full micro-batch there is no such bound.
    """
    if workers < 2:
        return {}
    most = for_all(candidates, workers)
    seen = sum(len(rows) for rows in candidates.values())
    return _shares_for(candidates, workers, seen if seen >= most else int(prepared.scalars(conn, _AHEAD, {"p_queue": queue, "p_most": most})[0]))


def spread_seen(candidates: Mapping[str, "Waiting"], workers: int) -> dict[str, int]:
    """As `spread`, without looking further than what is there: no bound where there may be more."""
    if workers < 2 or any(rows.cut for rows in candidates.values()):
        return {}
    return _shares_for(candidates, workers, 0)


def _shares_for(candidates: Mapping[str, "Waiting"], workers: int, waiting: int) -> dict[str, int]:
    seen = sum(len(rows) for rows in candidates.values())
    if max(waiting, seen) >= for_all(candidates, workers):
        return {}
    alike: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for rows in candidates.values():
        rows.measure(alike, seconds)
    return {
        key: max(-(-n * max(waiting, seen) // (seen * workers)), math.ceil(n * UNDIVIDED_S / seconds[key]) if seconds[key] > 0 else n)
        for key, n in alike.items()
    }


def for_all(candidates: Mapping[str, "Waiting"], workers: int) -> int:
    """Jobs of which every worker can have a full micro-batch."""
    return workers * max(get_kind(rows.head.kind).max_group for rows in candidates.values())


_AHEAD = select(func.count()).select_from(
    select(Job.c.id).where(has_state(JobState.QUEUED), Job.c.queue == bindparam("p_queue")).limit(bindparam("p_most")).subquery()
)


class Waiting:
    """Queued rows of one project in their order, taken a micro-batch at a time.

    Args:
        rows: The rows.
        cut: Whether there may be more behind them.
    """

    def __init__(self, rows: Sequence[Any], cut: bool = False) -> None:
        self.cut = cut
        self._rows = rows
        self._next = 0
        self._taken: set[str] = set()
        self._bounded = any(row[_GROUP_LIMIT] for row in rows)
        self._alike: dict[tuple[str, int], deque[Any]] = {}
        keys = [(row[_SHARE_KEY], row[_PRIORITY]) for row in rows]
        if keys.count(keys[0]) == len(keys):
            self._alike[keys[0]] = deque(rows)
        else:
            for key, row in zip(keys, rows, strict=True):
                self._alike.setdefault(key, deque()).append(row)

    def __len__(self) -> int:
        return len(self._rows) - len(self._taken)

    def __bool__(self) -> bool:
        while self._next < len(self._rows) and self._rows[self._next][_ID] in self._taken:
            self._next += 1
        return self._next < len(self._rows)

    @property
    def head(self) -> Any:
        """The row that is served next; ask whether there is one first."""
        bool(self)
        return Queued._make(self._rows[self._next])

    @property
    def front(self) -> Front:
        """Where the queue begins; behind the last row, that one's place."""
        row = Queued._make(self._rows[self._next if self else -1])
        return row.band, row.rank, row.id

    def measure(self, alike: Counter[str], seconds: Counter[str]) -> None:
        """Add the rows that may still be taken, and their compute seconds, by what they could share."""
        for (key, _), rows in self._alike.items():
            alike[key] += len(rows)
            seconds[key] += sum(row[_SECONDS] for row in rows)

    @property
    def share_keys(self) -> set[str]:
        """What the rows could share."""
        return {key for key, _ in self._alike}

    def first(self, count: int) -> list[Any]:
        """The next rows in their order; ask whether there is one first."""
        bool(self)
        found: list[Any] = []
        for row in islice(self._rows, self._next, None):
            if row[_ID] not in self._taken:
                found.append(Queued._make(row))
                if len(found) == count:
                    break
        return found

    def take(self, head: Any, most: int) -> tuple[tuple[str, ...], float]:
        """A row and those behind it that may share its forward pass, at most so many; each row may bound its company.

        Returns:
            Their ids, and what they are estimated to take together, compute seconds.
        """
        alike = self._alike[(head.share_key, head.priority)]
        group: list[Any] = []
        if not self._bounded:
            group = [alike.popleft() for _ in range(min(most, len(alike)))]
        left: list[Any] = []
        while self._bounded and alike and len(group) < most:
            row = alike.popleft()
            limit = row[_GROUP_LIMIT]
            if group and limit and len(group) >= limit:
                left.append(row)
                continue
            group.append(row)
            most = min(most, limit or most)
        alike.extendleft(reversed(left))
        ids = tuple([row[_ID] for row in group])
        self._taken.update(ids)
        return ids, sum([row[_SECONDS] for row in group])


def candidates(conn: Connection, queue: str, at: float, window: int, fronts: Mapping[str, Front] | None = None) -> dict[str, Waiting]:
    """The waiting jobs of each project that is not paused, at most ``window`` of one, those that are due.

    Args:
        conn: Connection.
        queue: Queue.
        at: The database's time.
        window: Most rows of a project.
        fronts: Projects to look at and where the queue of each begins; all projects from their beginning where there are none.
    """
    projects = fronts or dict.fromkeys(prepared.scalars(conn, _PROJECTS, {"queue": queue}))
    if not projects:
        return {}
    per_project = max(32, min(window, 8192 // len(projects)))
    found: dict[str, Waiting] = {}
    for project, front in projects.items():
        wanted: dict[str, Any] = {"p_queue": queue, "p_project": project, "p_at": at, "p_most": per_project}
        if front:
            wanted |= dict(zip(("p_band", "p_rank", "p_id"), front, strict=True))
        rows = prepared.rows(conn, _QUEUED_FROM if front else _QUEUED, wanted)
        if rows:
            found[project] = Waiting(rows, len(rows) == per_project)
    return found

"""Which micro-batches of a queue go next, and who is charged for them. Changes no job's state: that is `db.lifecycle`'s."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, bindparam

from contentfactory.jobs.spec import get_kind
from contentfactory.states import Priority
from db import limits, prepared, waiting, warm
from db.session import upsert
from db.tables import Mark, Share


@dataclass(frozen=True)
class Hint:
    """A micro-batch to publish: ids and nothing else."""

    kind: str
    queue: str
    priority: int
    ids: tuple[str, ...]
    dispatched_at: float
    ahead: bool = False
    """Whether it goes past the ordinary hints that wait: the first of a project that has none among them."""
    again: bool = False
    """Whether its first job was tried before: it has waited already, and goes past those that were not."""
    model: str | None = None
    """Model version of its first job; not part of the message."""


@dataclass
class Room:
    """What may leave a queue: compute seconds and jobs that are still to come, jobs at most, and micro-batches whatever they take."""

    seconds: float
    jobs: int
    most: int
    hints: int = 0
    strangers: int = 0
    """Projects of which nothing is on the broker that may send a micro-batch each though there is no room."""

    @property
    def full(self) -> bool:
        """Whether nothing may leave, but for strangers' micro-batches."""
        return (self.seconds <= 0 and self.jobs <= 0) or self.most <= 0


@dataclass(frozen=True)
class Choice:
    """Micro-batches that are next, in their order; nothing is written yet."""

    queue: str
    hints: list[Hint]
    fair: waiting.Fair
    prefer: warm.Preference
    clock: float | None

    def save(self, conn: Connection) -> None:
        """Charge their projects: they leave."""
        self.prefer.save()
        later = self.clock is None or self.fair.now() > self.clock
        charge(conn, self.queue, {p: self.fair.virtual[p] for p in self.fair.charged}, self.fair.now() if later else None)


def choose(conn: Connection, queue: str, look: Any, room: Room, window: int, worker_seen_s: float,
           fronts: dict[str, waiting.Front] | None = None) -> Choice | None:  # fmt: skip
    """What goes next, if anything does. The caller has the turn to dispatch from the queue.

    Highest priority first; inside a band the project with the least virtual time (compute seconds over weight) goes next. Within a project,
    jobs in order of rank; whoever may share the head's forward pass and lies within the window goes along.

    Args:
        conn: Connection in a write transaction.
        queue: Queue.
        look: What `waiting.look` told of it.
        room: How much may leave.
        window: Rows looked at per project.
        worker_seen_s: How fresh a worker's report must be for it to count.
        fronts: Where each project's queue begins, as this left it the last time: for one who comes for a single micro-batch, and so soon again
            that what was queued in front of these meanwhile, or by other projects, may wait for whoever does not bring them. Changed here;
            empty at first.
    """
    at, workers, full = float(look.at), max(1, int(look.workers)), room.full
    candidates = waiting.candidates(conn, queue, at, window, fronts)
    if not candidates:
        return None
    fair = waiting.Fair(conn, queue, candidates, look.clock, bool(look.jobs))
    # Their hints would stand behind seconds of other projects' work: each sends one past that.
    strangers = fair.strangers
    if full:
        strangers = set(sorted(strangers)[: room.strangers])
        candidates = {project: candidates[project] for project in strangers}
        if not candidates:
            return None
    # Who comes back soon takes little at a time: what is left for the others needs no count.
    spread = waiting.spread(conn, queue, candidates, workers) if fronts is None else waiting.spread_seen(candidates, workers)
    if fronts is None and spread and not full and any(rows.cut for rows in candidates.values()):
        # So little waits that workers get equal shares of it: then all of it must be seen.
        candidates = waiting.candidates(conn, queue, at, waiting.for_all(candidates, workers))
        spread = waiting.spread(conn, queue, candidates, workers)
    bounds = limits.caps(conn, queue, {key for rows in candidates.values() for key in rows.share_keys}, at, worker_seen_s)
    prefer = warm.Preference(conn, queue, at, worker_seen_s)
    hints: list[Hint] = []
    seen = dict(candidates)
    taken, room_s, room_jobs = 0, room.seconds, room.jobs
    idle = look.jobs == 0
    while candidates and (full or ((room_s > 0 or room_jobs > 0 or len(hints) < room.hints) and taken < room.most)):
        project = min(candidates, key=lambda p: (-candidates[p].head.priority, fair.virtual[p], p))
        rows = candidates[project].first(warm.AHEAD + 1)
        place, company = prefer.pick(project, rows)
        head = rows[place]
        spec = get_kind(head.kind)
        limit = min(spec.max_group, bounds.get(head.share_key, spec.max_group), company or spec.max_group, spread.get(head.share_key, spec.max_group))
        ids, cost = candidates[project].take(head, limit)
        alone_too_early = (
            len(ids) < limit and spec.wait_s > 0 and not idle and head.priority < Priority.INTERACTIVE
            and at - max(head.created_at, head.run_after) < spec.wait_s
        )  # fmt: skip
        if not candidates[project] or (full and not alone_too_early):
            del candidates[project]
        if alone_too_early:
            continue
        if place:
            prefer.passed(project, rows[0].id, len(ids))
        fair.charge(project, cost)
        room_s -= cost
        room_jobs -= len(ids)
        taken += len(ids)
        hints.append(Hint(head.kind, queue, head.priority, ids, at, project in strangers, head.attempt > 0, head.model))
        strangers.discard(project)
        idle = False
    if fronts is not None:
        fronts.update((project, rows.front) for project, rows in seen.items())
    return Choice(queue, hints, fair, prefer, look.clock) if hints else None


def charge(conn: Connection, queue: str, virtual: Mapping[str, float], clock: float | None) -> None:
    """Note the virtual time at which projects stand now, seconds, and where the queue's clock stands if that has moved."""
    if clock is not None and len(virtual) == 1 and conn.dialect.name == "postgresql":
        # Both in one round trip: a queue is mostly served one project at a time, and whoever is next waits for it.
        [(project, seconds)] = virtual.items()
        prepared.run(conn, _CHARGED_ALONE, (queue, project, seconds, waiting.clock_name(queue), clock))
        return
    rows = [{"p_queue": queue, "p_project": project, "p_seconds": virtual[project]} for project in sorted(virtual)]
    prepared.many(conn, _charged(conn.dialect.name), rows)
    if clock is not None:
        set_clock(conn, queue, clock)


def set_clock(conn: Connection, queue: str, virtual_seconds: float) -> None:
    """Move a queue's virtual clock."""
    prepared.rows(conn, _marked(conn.dialect.name), {"p_name": waiting.clock_name(queue), "p_value": virtual_seconds})


@cache
def _charged(dialect: str) -> Any:
    values: dict[Any, Any] = {"queue": bindparam("p_queue"), "project_id": bindparam("p_project"), "virtual_seconds": bindparam("p_seconds")}
    statement = upsert(dialect, Share).values(values)
    return statement.on_conflict_do_update(
        index_elements=[Share.c.queue, Share.c.project_id], set_={"virtual_seconds": statement.excluded.virtual_seconds}
    )


@cache
def _marked(dialect: str) -> Any:
    statement = upsert(dialect, Mark).values(name=bindparam("p_name"), value=bindparam("p_value"))
    return statement.on_conflict_do_update(index_elements=[Mark.c.name], set_={"value": statement.excluded.value})


_CHARGED_ALONE = """\
WITH charged AS (
INSERT INTO shares (queue, project_id, virtual_seconds) VALUES (%s, %s, %s)
ON CONFLICT (queue, project_id) DO UPDATE SET virtual_seconds = excluded.virtual_seconds
)
INSERT INTO marks (name, value) VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET value = excluded.value"""

"""What operators look at: workers and queues."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, func, select

from contentfactory.states import JobState
from db.models import Job, Queue, Worker
from db.session import now
from db.sql import has_state


def workers(conn: Connection, seen_s: float) -> Sequence[RowMapping]:
    """Workers that reported themselves in the last ``seen_s`` seconds."""
    query = select(Worker.id, Worker.queues, Worker.device, Worker.started_at, Worker.seen_at, Worker.running, Worker.models)
    return conn.execute(query.where(Worker.seen_at > now() - seen_s).order_by(Worker.id)).mappings().all()


def queues(conn: Connection, names: Sequence[str]) -> list[dict[str, Any]]:
    """Jobs by queue and state, pause and live workers."""
    states = (JobState.QUEUED, JobState.DISPATCHED, JobState.RUNNING)
    paused = set(conn.execute(select(Queue.name).where(Queue.paused)).scalars())
    live = workers(conn, 60.0)
    out = []
    for name in names:
        row: dict[str, Any] = {"queue": name}
        for state in states:
            query = select(func.count()).select_from(Job).where(Job.queue == name, has_state(state))
            row[str(state)] = int(conn.execute(query).scalar_one())
        row["workers"] = sum(1 for w in live if name in w["queues"])
        row["paused"] = "yes" if name in paused else ""
        out.append(row)
    return out

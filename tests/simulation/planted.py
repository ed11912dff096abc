"""Bugs planted on purpose: each replaces a piece of the real code while histories are played, and each must be caught.

A checker that finds nothing is worth what it would find. Each entry names the bug, the invariants that may tell of it, and
how many histories it may take.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from sim_history import Outcome, Simulation
from sim_world import SimTime, Stage, replaced
from sqlalchemy import delete, insert, select, update

import db.batches
import db.jobs
import db.lifecycle
import db.retention
import producer.enqueue
import worker.execution
from contentfactory.errors import FactoryError
from contentfactory.states import JobState
from db import counters, lifecycle
from db.models import Attempt, Batch, BatchDelta, Dependency, Job, Mark
from db.session import now

Places = list[tuple[Any, str, Any]]


@dataclass(frozen=True)
class Bug:
    """A bug that can be planted.

    Attributes:
        name: A few words.
        what: What is wrong with the code once it is planted.
        told_by: Invariants one of which must break.
        places: Makes (object, name, replacement) for each piece that is replaced.
        within: Most histories until it must be caught.
    """

    name: str
    what: str
    told_by: tuple[str, ...]
    places: Callable[[], Places]
    within: int = 200


@dataclass(frozen=True)
class Catch:
    """The first history that told of a planted bug."""

    bug: Bug
    histories: int
    seed: int
    violation: str

    @property
    def invariant(self) -> str:
        return self.violation.partition(":")[0]


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Plant a bug; inside `simulation`."""
    with replaced(*bug.places()):
        yield


def hunt(simulated: Simulation, bug: Bug, first: int = 1) -> Catch | None:
    """Play histories until one breaks an invariant that tells of the bug.

    Returns:
        None if none did within the bug's bound.
    """
    with planted(bug):
        for n in range(bug.within):
            outcome: Outcome = simulated.play(first + n)
            for violation in outcome.violations:
                if violation.partition(":")[0] in bug.told_by:
                    return Catch(bug, n + 1, first + n, violation)
    return None


# --- pieces ---------------------------------------------------------------------------------------------------------


def _seize(conn: Any, ids: Any, worker: str, lease_s: float, kind: str | None, *where: Any) -> list[Any]:
    """Claim these jobs of the kind without a look at what else `claim` has to look at."""
    waiting = Job.state.in_((JobState.QUEUED, JobState.DISPATCHED))
    if kind is not None:
        where = (*(where or (waiting,)), Job.kind == kind)
    taken = conn.execute(
        update(Job)
        .where(Job.id.in_(list(ids)), Job.run_after <= now(), *(where or (waiting,)))
        .values(
            state=JobState.RUNNING, attempt=Job.attempt + 1, lease_owner=worker, lease_until=now() + lease_s, started_at=now(), group_size=1,
            micro_batch=secrets.randbits(62),
        )
        .returning(Job.id, Job.attempt)
    ).all()  # fmt: skip
    return lifecycle.claimed_by(conn, [job for job, _ in taken], worker)


def _current(conn: Any, job: str) -> int | None:
    """The attempt that holds a job now."""
    found: int | None = conn.execute(select(Job.attempt).where(Job.id == job, Job.state == JobState.RUNNING)).scalar()
    return found


def _finish_without_fence() -> Places:
    real = lifecycle.finish

    def finish(conn: Any, results: Any, worker: str | None = None) -> list[str]:
        return real(conn, [replace(r, attempt=_current(conn, r.job_id) or r.attempt) for r in results], worker)

    return [(lifecycle, "finish", finish)]


def _stop_without_fence() -> Places:
    real = lifecycle.stop

    def stop(conn: Any, result: Any) -> Any:
        return real(conn, replace(result, attempt=_current(conn, result.job_id) or result.attempt))

    return [(lifecycle, "stop", stop)]


def _publish_without_fence() -> Places:
    real = lifecycle.publish

    def publish(conn: Any, job_id: str, attempt: int, artifact: Any) -> bool:
        return real(conn, job_id, _current(conn, job_id) or attempt, artifact)

    return [(lifecycle, "publish", publish)]


class _Later:
    """A store whose puts are only noted."""

    def __init__(self, store: Any, noted: list[Any]) -> None:
        self.store, self.noted = store, noted

    def put(self, *args: Any, **options: Any) -> None:
        self.noted.append((args, options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def _put_after_commit() -> Places:
    commit, upload = worker.execution.Executor._commit, worker.execution.Executor._upload

    def late_upload(self: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(self.store, _Later):
            self.store = _Later(self.store, [])
        return upload(self, *args, **options)

    def late_commit(self: Any, work: Any) -> Any:
        done = commit(self, work)
        while isinstance(self.store, _Later) and self.store.noted:
            args, options = self.store.noted.pop()
            try:
                self.store.store.put(*args, **options)
            except FactoryError:
                self.store.noted.append((args, options))
        return done

    return [(worker.execution.Executor, "_commit", late_commit), (worker.execution.Executor, "_upload", late_upload)]


def _commit_beside_upload() -> Places:
    return [(worker.execution, "_uploaded", lambda member: None)]


def _reap_by_wall_clock() -> Places:
    def reap(conn: Any, *, lease_s: float, period_s: float, limit: int = 1000) -> dict[str, int]:
        late = conn.execute(select(Job.id, Job.attempt).where(Job.state == JobState.RUNNING, Job.lease_until < SimTime.time())).all()
        return lifecycle.crash(conn, [(row.id, row.attempt) for row in late], "its lease is over by this machine's clock")

    return [(lifecycle, "reap", reap)]


def _lease_not_renewed() -> Places:
    real = lifecycle.heartbeat

    def heartbeat(conn: Any, held: Any, lease_s: float) -> Any:
        before = conn.execute(select(Job.id, Job.lease_until).where(Job.id.in_([i for i, _ in held]))).all()
        answer = real(conn, held, lease_s)
        for row in before:
            conn.execute(update(Job).where(Job.id == row.id, Job.state == JobState.RUNNING).values(lease_until=row.lease_until))
        return answer

    return [(lifecycle, "heartbeat", heartbeat)]


def _reap_without_grace() -> Places:
    real = lifecycle.reap

    def reap(conn: Any, **options: Any) -> dict[str, int]:
        if conn.execute(update(Mark).where(Mark.name == "reaper").values(value=now())).rowcount == 0:
            conn.execute(insert(Mark).values(name="reaper", value=now()))
        return real(conn, **options)

    return [(lifecycle, "reap", reap)]


def _attempt_not_counted() -> Places:
    real = lifecycle.claim

    def claim(conn: Any, ids: Any, worker: str, lease_s: float, kind: str | None = None, **options: Any) -> list[Any]:
        out = []
        for one in real(conn, ids, worker, lease_s, kind, **options):
            if one.attempt > 1:
                conn.execute(delete(Attempt).where(Attempt.job_id == one.id, Attempt.attempt == one.attempt - 1))
                conn.execute(update(Job).where(Job.id == one.id).values(attempt=one.attempt - 1))
                one = replace(one, attempt=one.attempt - 1)
            out.append(one)
        return out

    return [(lifecycle, "claim", claim)]


def _claim_anyway(*where: Any) -> Callable[[], Places]:
    """Claim also what the condition names."""

    def places() -> Places:
        real = lifecycle.claim

        def claim(conn: Any, ids: Any, worker: str, lease_s: float, kind: str | None = None, **options: Any) -> list[Any]:
            found = real(conn, ids, worker, lease_s, kind, **options)
            rest = sorted(set(ids) - {one.id for one in found})
            return found + _seize(conn, rest, worker, lease_s, kind, *where)

        return [(lifecycle, "claim", claim)]

    return places


def _blind_to_lost_answers() -> Places:
    return [(lifecycle, "claimed_by", lambda conn, ids, worker: [])]


def _counted_twice() -> Places:
    real = lifecycle.finish

    def finish(conn: Any, results: Any, worker: str | None = None) -> list[str]:
        done = real(conn, results, worker)
        for row in conn.execute(select(Job.batch_id, Job.kind).where(Job.id.in_(done), Job.batch_id.is_not(None))).all():
            conn.execute(insert(BatchDelta).values(batch_id=row.batch_id, kind=row.kind, state="succeeded", n=1))
        return done

    return [(lifecycle, "finish", finish)]


def _deltas_kept() -> Places:
    real = counters.fold_counts

    def fold_counts(conn: Any, limit: int = 20_000) -> int:
        rows = [dict(r) for r in conn.execute(select(BatchDelta.batch_id, BatchDelta.kind, BatchDelta.state, BatchDelta.n)).mappings()]
        n = real(conn, limit)
        if rows:
            conn.execute(insert(BatchDelta), rows)
        return n

    return [(counters, "fold_counts", fold_counts)]


def _children_stay_blocked() -> Places:
    return [(lifecycle, "_unblock", lambda conn, children: None), (lifecycle, "unblock_stuck", lambda conn, limit=1000: 0)]


def _children_do_not_fail() -> Places:
    return [(lifecycle, "_fail_children", lambda conn, parents: None)]


def _children_run_early() -> Places:
    real = lifecycle.finish

    def finish(conn: Any, results: Any, worker: str | None = None) -> list[str]:
        done = real(conn, results, worker)
        children = select(Dependency.job_id).where(Dependency.parent_id.in_(done))
        conn.execute(update(Job).where(Job.id.in_(children), Job.state == JobState.BLOCKED).values(state=JobState.QUEUED))
        return done

    return [(lifecycle, "finish", finish)]


def _key_ignored() -> Places:
    real = producer.enqueue.Producer.submit

    def submit(self: Any, *args: Any, idempotency_key: str | None = None, **fields: Any) -> str:
        if idempotency_key:
            Stage.world.facts["planted"] += 1
            idempotency_key = f"{idempotency_key}/{Stage.world.facts['planted']}"
        return real(self, *args, idempotency_key=idempotency_key, **fields)

    return [(producer.enqueue.Producer, "submit", submit)]


def _no_undispatch() -> Places:
    return [(lifecycle, "undispatch", lambda conn, ids, delay_s=0.0: 0)]


def _rescue_too_eager() -> Places:
    real = lifecycle.rescue_dispatched
    return [(lifecycle, "rescue_dispatched", lambda conn, queue, oldest, margin_s=0.0: real(conn, queue, None, -1e6))]


def _cursor_in_its_own_transaction() -> Places:
    real = db.batches.advance

    def advance(conn: Any, *args: Any, **options: Any) -> bool:
        moved = real(conn, *args, **options)
        Stage.world.ledger.raw.execute("COMMIT")
        Stage.world.ledger.raw.execute("BEGIN IMMEDIATE")
        return moved

    return [(db.batches, "advance", advance)]


def _sweep_takes_everything() -> Places:
    return [(db.retention, "referenced", lambda conn, keys: set())]


def _decide(error_class: str, **instead: Any) -> Callable[[], Places]:
    """The table of error classes with one row wrong."""

    def places() -> Places:
        real = lifecycle.decide

        def decide(given: str, **options: Any) -> Any:
            if given == error_class:
                options.update(instead)
            return real(given, **options)

        return [(lifecycle, "decide", decide)]

    return places


def _release_is_a_crash() -> Places:
    real = lifecycle.decide
    return [(lifecycle, "decide", lambda error_class, **options: real("crash" if error_class == "released" else error_class, **options))]


def _neighbours_are_blamed() -> Places:
    real = lifecycle.crash
    return [(lifecycle, "crash", lambda conn, held, reason, *, released=False: real(conn, held, reason, released=False))]


def _closed_by_dispatch() -> Places:
    """A batch is closed as soon as nothing of it waits, while some of it runs."""

    def close_batches(conn: Any, batch_ids: Any = None) -> list[str]:
        open_jobs = select(Job.id).where(Job.batch_id == Batch.id, Job.state.in_(("blocked", "queued", "dispatched"))).exists()
        rows = conn.execute(select(Batch.id, Batch.project_id).where(Batch.finished_at.is_(None), Batch.state == "running", ~open_jobs)).all()
        for row in rows:
            conn.execute(update(Batch).where(Batch.id == row.id).values(state="completed", finished_at=now()))
            lifecycle.add_event(conn, "batch.completed", project_id=row.project_id, batch_id=row.id)
        return [row.id for row in rows]

    return [(counters, "close_batches", close_batches)]


_HELD = Job.state.in_((JobState.QUEUED, JobState.DISPATCHED))
_CANCELLING = Job.batch_id.in_(select(Batch.id).where(Batch.state == "cancelling"))

BUGS = (
    Bug("finish without fence", "a result is committed whatever attempt holds the job", ("I3", "I4"), _finish_without_fence),
    Bug("stop without fence", "an error ends the attempt of somebody else", ("I3", "I4"), _stop_without_fence),
    Bug("put after commit", "the row is committed before its object is stored", ("I5",), _put_after_commit),
    Bug("commit beside upload", "a commit whose statements went beside the upload does not wait for it", ("I5",), _commit_beside_upload),
    Bug("reaper by wall clock", "leases are judged by the clock of the machine that reaps", ("I7", "I8", "I1"), _reap_by_wall_clock),
    Bug("lease not renewed", "a heartbeat does not move the end of the lease", ("I8",), _lease_not_renewed),
    Bug("reaper without grace", "after an outage leases are reaped before anybody could renew them", ("I8",), _reap_without_grace),
    Bug("attempt not counted", "a second claim has the number of the first", ("I3", "I4", "I9"), _attempt_not_counted),
    Bug("cancel ignored on claim", "jobs of a batch that is being cancelled are claimed", ("I11",), _claim_anyway(_HELD, _CANCELLING)),
    Bug("pause ignored on claim", "jobs that are paused are claimed", ("I11",), _claim_anyway(_HELD)),
    Bug("claim of ended jobs", "a stale hint starts a job that has ended", ("I6", "I11"), _claim_anyway(Job.state.not_in(("running", "blocked")))),
    Bug("claim of blocked jobs", "a forged hint starts a job whose parents have not ended", ("I3", "I6"), _claim_anyway(Job.state == "blocked")),
    Bug("lost answer of a claim", "what a claim took whose answer was lost is run by nobody", ("I8", "I9"), _blind_to_lost_answers),
    Bug("counted twice", "the counter of a batch moves twice for one job", ("I12",), _counted_twice),
    Bug("deltas folded and kept", "folding does not delete what it folded", ("I12",), _deltas_kept),
    Bug("batch closed early", "a batch is finished while its jobs still run", ("I12",), _closed_by_dispatch),
    Bug("children not unblocked", "the end of a parent does not release its children", ("I1",), _children_stay_blocked),
    Bug("children not failed", "the failure of a parent does not fail its children", ("I1",), _children_do_not_fail),
    Bug("children run early", "the first parent that succeeds releases a child of several", ("I3",), _children_run_early),
    Bug("idempotency key ignored", "the same key makes another job", ("I2",), _key_ignored),
    Bug("no undispatch", "jobs whose hint could not be sent are not put back", ("I13",), _no_undispatch),
    Bug("rescue too eager", "hints that still wait in the broker are sent again", ("I13",), _rescue_too_eager),
    Bug("cursor in its own transaction", "the expander's cursor is committed before the rows", ("I1", "I12"), _cursor_in_its_own_transaction),
    Bug("checkpoint without fence", "a fenced attempt publishes a checkpoint", ("I4",), _publish_without_fence),
    Bug("sweep takes everything", "the sweep deletes objects that rows point at", ("I5", "I18"), _sweep_takes_everything),
    Bug("group crash strikes all", "every member of a crashed group earns a strike", ("I9",), _decide("crash", group_size=1)),
    Bug("strikes without end", "strikes are never enough", ("I9",), _decide("crash", strikes=0)),
    Bug("release is a crash", "a worker that stops in order costs a strike", ("I9",), _release_is_a_crash),
    Bug("neighbours are blamed", "a job that waits for its commit earns a strike when another ends the process", ("I9",), _neighbours_are_blamed),
)  # fmt: skip
"""All of them; the first of each kind that issue 3 names are `NAMED`."""

NAMED = ("finish without fence", "put after commit", "reaper by wall clock")

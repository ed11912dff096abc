"""The lifecycle against a model: Hypothesis calls the functions of `db.lifecycle` in any order, a few lines of Python say what must
come of it, and after each step every row is compared.

The database's clock is moved, not waited for: on SQLite ``julianday`` is ours, on PostgreSQL ``clock_timestamp`` is found in a
schema of ours before the real one.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import planted
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import IntegrityError

from contentfactory.jobs.spec import get_kind
from contentfactory.states import TERMINAL, TRANSITIONS, JobState
from db import batches, counters, lifecycle, migrate, projects, waiting
from db.ended import NewArtifact
from db.lifecycle import NewJob, Stop, Success
from db.models import Artifact, Attempt, Base, Batch, Event, Job, Mark, MicroBatch
from db.session import Database

EPOCH, DAY = 1_700_000_000.0, 86_400.0
LEASE_S, PERIOD_S = 30.0, 5.0
KIND = "text.echo"
WAITING = (JobState.BLOCKED, JobState.QUEUED, JobState.DISPATCHED)
CLASSES = ("input", "policy", "transient", "resource", "crash", "released", "deadline", "bug", "cancelled")


class Clock:
    """The database's time, and the database."""

    at = EPOCH

    def __init__(self, database: Database) -> None:
        self.database = database

    def set(self, at: float) -> None:
        self.at = at


class _PostgresClock(Clock):
    def set(self, at: float) -> None:
        super().set(at)
        with self.database.write() as conn:
            conn.execute(text("UPDATE moved.clock SET at = :at"), {"at": at})


@contextmanager
def sqlite_clock() -> Iterator[Clock]:
    database = Database("sqlite://")
    clock = Clock(database)

    @event.listens_for(database.engine, "connect")
    def moved(connection: Any, record: Any) -> None:
        connection.create_function("julianday", 1, lambda what: clock.at / DAY + 2440587.5, deterministic=True)

    with database.write() as conn:
        Base.metadata.create_all(conn)
    try:
        yield clock
    finally:
        database.close()


@contextmanager
def postgres_clock(url: str) -> Iterator[Clock]:
    plain = Database(url)
    migrate.upgrade(plain)
    with plain.write() as conn:
        conn.execute(text("CREATE SCHEMA moved"))
        conn.execute(text(f"CREATE TABLE moved.clock AS SELECT {EPOCH}::double precision AS at"))
        conn.execute(
            text("CREATE FUNCTION moved.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT to_timestamp(at) FROM moved.clock'")
        )
    plain.close()
    database = Database(f"{url}?options=-csearch_path%3Dmoved,pg_catalog,public")
    try:
        yield _PostgresClock(database)
    finally:
        database.close()


@dataclass
class Modelled:
    """A job as it should be."""

    batch: str | None
    project: str
    parents: tuple[str, ...]
    priority: int
    state: JobState = JobState.QUEUED
    attempt: int = 0
    strikes: int = 0
    cancel: bool = False
    limit: int = 0
    size: int = 1
    tries: Counter[str] = field(default_factory=Counter)
    run_after: float = 0.0
    dispatched_at: float = 0.0
    lease_until: float = 0.0
    artifacts: dict[str, int] = field(default_factory=dict)
    outcomes: list[str | None] = field(default_factory=list)


class Lifecycle(RuleBasedStateMachine):
    """The rules. ``clock`` is set by the test before it runs."""

    clock: Clock

    @initialize(data=st.data())
    def begin(self, data: Any) -> None:
        self.n = 0
        self.jobs: dict[str, Modelled] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.hints: list[tuple[str, ...]] = []
        self.held: list[tuple[str, int]] = []
        self.paused: set[tuple[str, str]] = set()
        self.reaped_at: float | None = None
        self.now = EPOCH
        self.clock.set(EPOCH)
        with self.clock.database.write() as conn:
            for table in reversed(Base.metadata.sorted_tables):
                conn.execute(table.delete())
            self.projects = [projects.ensure(conn, name) for name in ("one", "two")]
        self._accept(data, 3, of_batch=True, again=False)
        self._accept(data, 3, of_batch=False, again=False)

    def run(self, function: Any, *args: Any, **options: Any) -> Any:
        return self.clock.database.run(lambda conn: function(conn, *args, **options))

    def pick(self, data: Any, most: int = 3) -> list[str]:
        return data.draw(st.lists(st.sampled_from(sorted(self.jobs)), min_size=1, max_size=most, unique=True))

    def keys(self, data: Any) -> list[tuple[str, int]]:
        """Attempts to speak for: those that hold their job, those that a later attempt has fenced, and any others."""
        live = [key for key in self.held if self.holds(key)]
        fenced = [key for key in self.held if not self.holds(key) and self.jobs[key[0]].state == JobState.RUNNING]
        among = data.draw(st.sampled_from([keys for keys in (live, fenced, fenced, self.held) if keys]))
        return data.draw(st.lists(st.sampled_from(among), min_size=1, max_size=3, unique=True))

    def key(self, data: Any) -> tuple[str, int]:
        return self.keys(data)[0]

    # --- model ---

    def move(self, job: str, state: JobState) -> None:
        assert state in TRANSITIONS[self.jobs[job].state], f"{job}: {self.jobs[job].state} -> {state}"
        self.jobs[job].state = state

    def children(self, job: str) -> list[str]:
        return [name for name, one in self.jobs.items() if job in one.parents and one.state == JobState.BLOCKED]

    def ended_badly(self, job: str) -> None:
        for child in self.children(job):
            if self.jobs[child].state != JobState.BLOCKED:
                continue  # ended meanwhile, for the sake of another parent further down
            self.move(child, JobState.CANCELLED if self.jobs[job].state == JobState.CANCELLED else JobState.FAILED)
            self.ended_badly(child)

    def ended_well(self, job: str) -> None:
        for child in self.children(job):
            if all(self.jobs[p].state == JobState.SUCCEEDED for p in self.jobs[child].parents):
                self.move(child, JobState.QUEUED)

    def is_held(self, one: Modelled) -> bool:
        batch = self.batches.get(one.batch or "")
        in_batch = batch is not None and not batch["finished"] and (("batch", one.batch) in self.paused or batch["state"] == "cancelling")
        return in_batch or ("project", one.project) in self.paused or ("queue", "text") in self.paused

    def holds(self, key: tuple[str, int]) -> bool:
        one = self.jobs[key[0]]
        return one.state == JobState.RUNNING and one.attempt == key[1]

    def after_error(self, job: str, given: str) -> JobState:
        """The table of error classes, in words of its own."""
        one, policy = self.jobs[job], get_kind(KIND).retry
        error_class = "cancelled" if one.cancel else given
        one.outcomes[-1] = error_class
        alone, end = one.size == 1, JobState.QUEUED
        if error_class == "cancelled":
            end = JobState.CANCELLED
        elif error_class in ("input", "policy"):
            end = JobState.FAILED
        elif error_class == "resource" and not alone:
            one.limit = max(1, one.size // 2)
        elif error_class in ("crash", "deadline", "bug") and not alone:
            one.limit = 1
        elif error_class == "crash":
            one.strikes += 1
            if one.strikes >= policy.strikes:
                end = JobState.DEAD
            else:
                one.limit = 1
        elif error_class != "released":
            budget = {"transient": policy.transient, "deadline": policy.deadline, "bug": policy.bug, "resource": 1}[error_class]
            if one.tries[error_class] >= budget:
                end = JobState.FAILED if error_class == "resource" else JobState.DEAD
            else:
                one.tries[error_class] += 1
        self.move(job, end)
        if end in TERMINAL:
            self.ended_badly(job)
        else:
            # How long it waits is chance within bounds; the rest of the model follows what was chosen.
            with self.clock.database.read() as conn:
                one.run_after = conn.execute(select(Job.run_after).where(Job.id == job)).scalar_one()
            assert self.now - 0.01 <= one.run_after <= self.now + policy.backoff_max_s + 0.01
        return end

    # --- accept ---

    @rule(data=st.data(), n=st.integers(1, 3), of_batch=st.booleans(), again=st.booleans())
    def accept(self, data: Any, n: int, of_batch: bool, again: bool) -> None:
        if len(self.jobs) < 20:
            self._accept(data, n, of_batch, again)

    @rule(data=st.data())
    def accept_and_dispatch(self, data: Any) -> None:
        if len(self.jobs) < 20:
            self._accept(data, 1, False, False, alone=True)

    def _accept(self, data: Any, n: int, of_batch: bool, again: bool, alone: bool = False) -> None:
        project = data.draw(st.sampled_from(self.projects))
        batch = None
        if of_batch:
            self.n += 1
            batch = f"batch_{self.n:032x}"
            self.batches[batch] = {"state": "running", "finished": False, "project": project}
        rows = []
        for _ in range(n):
            self.n += 1
            job = f"job_{self.n:032x}"
            known = sorted(name for name, one in self.jobs.items() if one.project == project and (one.batch == batch or of_batch))
            parents = tuple(data.draw(st.lists(st.sampled_from(known), max_size=2, unique=True))) if known else ()
            priority = data.draw(st.sampled_from((0, 50, 100)))
            share = data.draw(st.sampled_from("ab"))
            one = self.jobs[job] = Modelled(batch, project, parents, priority)
            states = {self.jobs[p].state for p in parents}
            if states - {JobState.SUCCEEDED}:
                one.state = JobState.BLOCKED
            rows.append(
                NewJob(
                    id=job, project_id=project, kind=KIND, queue="text", params={"text": job}, share_key=share, seconds=1.0, seed=1,
                    batch_id=batch, custom_id=job[-6:] if batch else None, line=self.n, rank=self.n, priority=priority, parents=parents,
                )
            )  # fmt: skip

        clocked, sent = False, None

        def work(conn: Any) -> int:
            nonlocal clocked, sent
            if batch:
                batches.create(conn, batch, project, "b", source={}, digest=None, priority=0)
                batches.advance(conn, batch, 0, n, n)
            if alone:
                clocked = conn.execute(select(Mark.value).where(Mark.name == waiting.clock_name("text"))).scalar() is not None
                sent = None if rows[0].parents else lifecycle.accept_alone(conn, rows[0])
                new = 1 if sent else lifecycle.insert_jobs(conn, rows)
            else:
                new = lifecycle.insert_jobs(conn, rows)
            if batch:
                batches.expanded(conn, batch)
            return new

        assert self.run(work) == n
        for row in rows:  # a parent that has ended already fails its child at once
            bad = {self.jobs[p].state for p in row.parents} & (TERMINAL - {JobState.SUCCEEDED})
            if bad and self.jobs[row.id].state == JobState.BLOCKED:
                with self.clock.database.read() as conn:
                    end = JobState(conn.execute(select(Job.state).where(Job.id == row.id)).scalar_one())
                assert end in ({JobState.CANCELLED} if bad == {JobState.CANCELLED} else {JobState.FAILED, JobState.CANCELLED})
                self.move(row.id, end)
        if alone:
            [job] = [row.id for row in rows]
            one = self.jobs[job]
            others = {o.state for name, o in self.jobs.items() if name != job}
            idle = clocked and not others & {JobState.QUEUED, JobState.DISPATCHED}
            assert (sent is not None) == (idle and not one.parents and not self.is_held(one))
            if sent:
                assert sent.ids == (job,)
                self.move(job, JobState.DISPATCHED)
                one.dispatched_at = self.now
                self.hints.append(sent.ids)
        if again:
            assert self.run(lifecycle.insert_jobs, rows) == 0

    # --- dispatch ---

    @rule(cap=st.sampled_from((0.5, 3.0, 1000.0)))
    def dispatch(self, cap: float) -> None:
        hints = self.run(lifecycle.dispatch, "text", cap_s=cap)
        sent = [i for hint in hints for i in hint.ids]
        assert len(sent) == len(set(sent))
        for hint in hints:
            limits = [self.jobs[i].limit for i in hint.ids if self.jobs[i].limit]
            assert len(hint.ids) <= min(limits, default=len(hint.ids))
            assert len({self.jobs[i].project for i in hint.ids}) == 1
            for job in hint.ids:
                one = self.jobs[job]
                assert one.state == JobState.QUEUED and one.run_after <= self.now + 0.01 and not self.is_held(one)
                self.move(job, JobState.DISPATCHED)
                one.dispatched_at = self.now
            self.hints.append(tuple(hint.ids))
        order = [self.jobs[hint.ids[0]].priority for hint in hints]
        assert order == sorted(order, reverse=True)
        if cap > 100:
            left = [i for i, o in self.jobs.items() if o.state == JobState.QUEUED and o.run_after < self.now - 0.01 and not self.is_held(o)]
            assert left == []

    @rule(worker=st.sampled_from(("w1", "w2")))
    def take(self, worker: str) -> None:
        named: list[str] = []
        got = self.run(lambda conn: lifecycle.take(conn, "text", KIND, None, worker, LEASE_S, named=named))
        assert [one.id for one in got] == named
        due = {i for i, o in self.jobs.items() if o.state == JobState.QUEUED and o.run_after <= self.now + 0.01 and not self.is_held(o)}
        assert set(named) <= due and len(named) == len(set(named))
        assert named or not any(self.jobs[i].run_after < self.now - 0.01 for i in due)
        taken = [self.jobs[i] for i in named]
        assert len({one.project for one in taken}) <= 1
        assert all(one.priority == max(self.jobs[i].priority for i in due) for one in taken)
        assert len(named) <= min((one.limit for one in taken if one.limit), default=len(named))
        self._claimed(got)
        for one in taken:
            one.dispatched_at = self.now

    def undispatch(self, data: Any) -> None:
        if not self.hints:
            return
        ids = data.draw(st.sampled_from(self.hints))
        back = [i for i in ids if self.jobs[i].state == JobState.DISPATCHED]
        assert self.run(lifecycle.undispatch, ids) == len(back)
        for job in back:
            self.move(job, JobState.QUEUED)

    def rescue_dispatched(self, age: float) -> None:
        before = self.now - age
        lost = [i for i, o in self.jobs.items() if o.state == JobState.DISPATCHED and o.dispatched_at < before]
        assert self.run(lifecycle.rescue_dispatched, "text", None, age) == len(lost)
        for job in lost:
            self.move(job, JobState.QUEUED)

    # --- claim, heartbeat ---

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), forged=st.booleans(), worker=st.sampled_from(("w1", "w2")))
    def claim(self, data: Any, forged: bool, worker: str) -> None:
        self._claim(self.pick(data, 4) if forged or not self.hints else list(data.draw(st.sampled_from(self.hints))), worker)

    @rule(data=st.data(), size=st.integers(1, 3), worker=st.sampled_from(("w1", "w2")))
    def claim_what_is_due(self, data: Any, size: int, worker: str) -> None:
        due = [i for i, o in sorted(self.jobs.items()) if o.state in (JobState.QUEUED, JobState.DISPATCHED) and o.run_after <= self.now]
        if due:
            start = data.draw(st.integers(0, len(due) - 1))
            self._claim(due[start : start + size], worker)

    @precondition(lambda self: any(o.state == JobState.RUNNING for o in self.jobs.values()))
    @rule(data=st.data(), alone=st.booleans())
    def worker_is_lost_and_another_takes_over(self, data: Any, alone: bool) -> None:
        """The way to an attempt that does not know that it is fenced."""
        running = [(i, o.attempt) for i, o in sorted(self.jobs.items()) if o.state == JobState.RUNNING]
        lost = [data.draw(st.sampled_from(running))] if alone else running
        states = self.run(lifecycle.crash, lost, "it died")
        assert states == Counter(str(self.after_error(job, "crash")) for job, _ in lost)
        self.now += 7.57
        self.clock.set(self.now)
        for job, _ in lost:
            self._claim([job], "w3")
        # The first attempt wakes up and goes on as if nothing had happened.
        match data.draw(st.sampled_from(("finish", "stop", "publish", "nothing"))):
            case "finish":
                self._finish(lost)
            case "stop":
                self._stop(lost[0], "input")
            case "publish":
                self._publish(lost[0], 1)

    def _claim(self, ids: list[str], worker: str) -> None:
        ids = list(dict.fromkeys(ids))
        due = {
            i for i in ids
            if self.jobs[i].state in (JobState.QUEUED, JobState.DISPATCHED) and self.jobs[i].run_after <= self.now
            and not self.jobs[i].cancel and not self.is_held(self.jobs[i]) and (self.jobs[i].limit or len(ids)) >= len(ids)
        }  # fmt: skip
        got = self.run(lifecycle.claim, ids, worker, LEASE_S)
        assert {c.id for c in got} == due
        self._claimed(got)
        for job_id in ids:
            if job_id not in due and self.jobs[job_id].state == JobState.DISPATCHED and self.is_held(self.jobs[job_id]):
                self.move(job_id, JobState.QUEUED)
        assert {c.id for c in self.run(lifecycle.claimed_by, ids, worker)} >= due

    def _claimed(self, got: list[lifecycle.Claimed]) -> None:
        for one in got:
            job = self.jobs[one.id]
            self.move(one.id, JobState.RUNNING)
            job.attempt, job.size, job.lease_until = job.attempt + 1, len(got), self.now + LEASE_S
            job.outcomes.append(None)
            assert one.attempt == job.attempt
            self.held.append((one.id, one.attempt))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def heartbeat(self, data: Any) -> None:
        keys = self.keys(data)
        beat = self.run(lifecycle.heartbeat, dict.fromkeys(keys, (0.5, "half")), LEASE_S)
        assert beat.lost == {key for key in keys if not self.holds(key)}
        assert beat.cancelled == {key for key in keys if self.holds(key) and self.jobs[key[0]].cancel}
        for key in keys:
            if self.holds(key):
                self.jobs[key[0]].lease_until = self.now + LEASE_S

    # --- the end of an attempt ---

    @precondition(lambda self: self.held)
    @rule(data=st.data(), again=st.booleans())
    def finish(self, data: Any, again: bool) -> None:
        keys = list({key[0]: key for key in self.keys(data)}.values())
        results = self._finish(keys)
        if again:
            assert self.run(lifecycle.finish, results) == []

    def _finish(self, keys: list[tuple[str, int]]) -> list[Success]:
        results = [Success(job, n, (NewArtifact("text.txt", f"projects/p/{job}-{n}", "a" * 64, 3, "text/plain"),)) for job, n in keys]
        done = {key[0] for key in keys if self.holds(key) and not self.jobs[key[0]].cancel}
        stopped = {key[0] for key in keys if self.holds(key) and self.jobs[key[0]].cancel}
        assert set(self.run(lifecycle.finish, results)) == done
        for job in sorted(stopped):
            self.after_error(job, "cancelled")
        for job in sorted(done):
            self.move(job, JobState.SUCCEEDED)
            self.jobs[job].outcomes[-1] = "succeeded"
            self.jobs[job].artifacts["text.txt"] = self.jobs[job].attempt
        for job in sorted(done):
            self.ended_well(job)
        return results

    @precondition(lambda self: self.held)
    @rule(data=st.data(), error_class=st.sampled_from(CLASSES), again=st.booleans())
    def stop(self, data: Any, error_class: str, again: bool) -> None:
        key = self.key(data)
        error = self._stop(key, error_class)
        if again:
            assert self.run(lifecycle.stop, error) is None

    def _stop(self, key: tuple[str, int], error_class: str) -> Stop:
        error = Stop(*key, {"type": error_class, "code": error_class, "message": "m"})
        fenced = not self.holds(key)
        end = self.run(lifecycle.stop, error)
        assert end == (None if fenced else self.after_error(key[0], error_class))
        return error

    @precondition(lambda self: self.held)
    @rule(data=st.data(), released=st.booleans())
    def crash(self, data: Any, released: bool) -> None:
        keys = self.keys(data)
        mine = [key for key in keys if self.holds(key)]
        states = self.run(lifecycle.crash, keys, "it died", released=released)
        assert states == Counter(str(self.after_error(job, "released" if released else "crash")) for job, _ in mine)

    @rule(seconds=st.sampled_from((0.37, 1.71, 7.13, 16.37, 31.79, 130.33)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.clock.set(self.now)

    @rule()
    def reap(self) -> None:
        last, self.reaped_at = self.reaped_at, self.now
        running = {i: o for i, o in self.jobs.items() if o.state == JobState.RUNNING}
        answer = self.run(lifecycle.reap, lease_s=LEASE_S, period_s=PERIOD_S)
        if last is None or self.now - last > max(3 * PERIOD_S, LEASE_S / 2):
            for one in running.values():
                one.lease_until = max(one.lease_until, self.now + LEASE_S)
            assert set(answer) == {"extended"}
            return
        expired = [i for i, o in running.items() if o.lease_until < self.now]
        assert answer == Counter(str(self.after_error(i, "crash")) for i in expired)

    # --- checkpoints ---

    @precondition(lambda self: self.held)
    @rule(data=st.data(), number=st.integers(1, 2))
    def publish(self, data: Any, number: int) -> None:
        self._publish(self.key(data), number)

    def _publish(self, key: tuple[str, int], number: int) -> None:
        name = f"checkpoint-{number}"
        artifact = NewArtifact(name, f"projects/p/{key[0]}-{key[1]}-{name}", "a" * 64, 3, "application/json", "checkpoint")
        assert self.run(lifecycle.publish, *key, artifact) == self.holds(key)
        if self.holds(key):
            self.jobs[key[0]].artifacts[name] = key[1]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop_published(self, data: Any) -> None:
        key = self.key(data)
        gone = self.run(lifecycle.drop_published, *key, ["checkpoint-1"])
        there = self.holds(key) and "checkpoint-1" in self.jobs[key[0]].artifacts
        assert len(gone) == there
        if there:
            del self.jobs[key[0]].artifacts["checkpoint-1"]

    # --- operators ---

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), again=st.booleans())
    def cancel(self, data: Any, again: bool) -> None:
        ids = self.pick(data)
        ended = [i for i in ids if self.jobs[i].state in WAITING]
        asked = [i for i in ids if self.jobs[i].state == JobState.RUNNING and not self.jobs[i].cancel]
        assert self.run(lifecycle.cancel_jobs, ids) == {"cancelled": len(ended), "requested": len(asked)}
        self._cancelled(ended, asked)
        if again:
            assert self.run(lifecycle.cancel_jobs, ids) == {"cancelled": 0, "requested": 0}

    def _cancelled(self, ended: list[str], asked: list[str]) -> None:
        for job in ended:
            self.move(job, JobState.CANCELLED)
            self.jobs[job].cancel = True
        for job in ended:
            self.ended_badly(job)
        for job in asked:
            self.jobs[job].cancel = True

    def cancel_batch(self, data: Any) -> None:
        batch = data.draw(st.sampled_from(sorted(self.batches)))
        mine = {i: o for i, o in self.jobs.items() if o.batch == batch}
        self._cancelled(
            [i for i, o in mine.items() if o.state in WAITING],
            [i for i, o in mine.items() if o.state == JobState.RUNNING and not o.cancel],
        )
        assert self.run(lifecycle.cancel_batch, batch) == 0
        if self.batches[batch]["state"] == "running":
            self.batches[batch]["state"] = "cancelling"
            self.paused.discard(("batch", batch))

    def pause(self, data: Any, paused: bool) -> None:
        things = [("queue", "text"), *(("project", p) for p in self.projects), *(("batch", b) for b in sorted(self.batches))]
        thing = data.draw(st.sampled_from(things))
        if not paused and self.paused:
            thing = sorted(self.paused)[0]
        assert self.run(lifecycle.pause, *thing, paused)
        (self.paused.add if paused else self.paused.discard)(thing)

    def reprioritise(self, data: Any, priority: int) -> None:
        ids = self.pick(data)
        waiting = [i for i in ids if self.jobs[i].state in WAITING]
        assert self.run(lifecycle.reprioritise, ids, priority) == len(waiting)
        for job in waiting:
            self.jobs[job].priority = priority

    @rule(data=st.data(), what=st.sampled_from(("pause", "resume", "cancel batch", "reprioritise")))
    def operate(self, data: Any, what: str) -> None:
        match what:
            case "pause" | "resume":
                self.pause(data, what == "pause")
            case "cancel batch":
                self.cancel_batch(data)
            case "reprioritise":
                self.reprioritise(data, data.draw(st.sampled_from((0, 50, 100))))

    # --- the timer's work ---

    @rule(data=st.data(), what=st.sampled_from(("close", "fold", "stuck", "rescue", "undispatch")))
    def keep_house(self, data: Any, what: str) -> None:
        match what:
            case "close":
                self.close()
            case "fold":
                self.fold()
            case "stuck":
                self.unblock_stuck()
            case "rescue":
                self.rescue_dispatched(data.draw(st.sampled_from((-1.0, 3.0, 20.0))))
            case "undispatch":
                self.undispatch(data)

    def fold(self) -> None:
        self.run(counters.fold_counts)

    def close(self) -> None:
        over = {
            name for name, batch in self.batches.items()
            if not batch["finished"] and all(o.state in TERMINAL for o in self.jobs.values() if o.batch == name)
        }  # fmt: skip
        assert set(self.run(counters.close_batches)) == over
        for name in over:
            batch = self.batches[name]
            batch.update(finished=True, state="cancelled" if batch["state"] == "cancelling" else "completed")

    def unblock_stuck(self) -> None:
        assert self.run(lifecycle.unblock_stuck) == 0  # nothing is ever stuck

    # --- after each step ---

    @invariant()
    def every_row_is_as_the_model_says(self) -> None:
        """I1, I4, I6, I9, I11: state, fence, strikes and cancel of every job, and the record of its attempts."""
        if not hasattr(self, "jobs"):
            return
        with self.clock.database.read() as conn:
            rows = conn.execute(
                select(
                    Job.id, Job.state, Job.attempt, Job.strikes, Job.cancel_requested, Job.group_limit, Job.priority, Job.lease_owner,
                    Job.micro_batch, Job.group_size,
                )
            ).all()  # fmt: skip
            attempts: dict[str, list[Any]] = {}
            for row in conn.execute(text("SELECT job_id, attempt, outcome FROM ended_attempts ORDER BY job_id, attempt")):
                attempts.setdefault(row.job_id, []).append((row.attempt, row.outcome))
            sizes = dict(conn.execute(select(MicroBatch.id, MicroBatch.jobs)).all())
            assert conn.execute(select(Attempt.job_id).where(Attempt.outcome == "succeeded")).all() == []
        assert {row.id for row in rows} == set(self.jobs)
        for row in rows:
            one = self.jobs[row.id]
            told = (row.state, row.attempt, row.strikes, bool(row.cancel_requested), row.group_limit, row.priority)
            assert told == (one.state, one.attempt, one.strikes, one.cancel, one.limit, one.priority), row.id
            assert (row.lease_owner is not None) == (one.state == JobState.RUNNING)
            # The attempt that is under way has no row yet.
            ended = [(n, outcome) for n, outcome in enumerate(one.outcomes, start=1) if outcome is not None]
            assert attempts.get(row.id, []) == ended
            assert one.strikes <= get_kind(KIND).retry.strikes
            assert (row.micro_batch is not None) == (one.state in (JobState.RUNNING, JobState.SUCCEEDED))
            if one.state == JobState.SUCCEEDED:
                assert sizes[row.micro_batch] == row.group_size == one.size

    @invariant()
    def results_are_of_one_attempt(self) -> None:
        """I3, I4: artifacts are those of the attempt that the model knows, and only who succeeded has a result."""
        if not hasattr(self, "jobs"):
            return
        with self.clock.database.read() as conn:
            rows = conn.execute(select(Artifact.job_id, Artifact.name, Artifact.attempt)).all()
        found: dict[str, dict[str, int]] = {}
        for row in rows:
            found.setdefault(row.job_id, {})[row.name] = row.attempt
        assert len(rows) == sum(len(names) for names in found.values())
        assert found == {i: o.artifacts for i, o in self.jobs.items() if o.artifacts}

    @invariant()
    def batches_count_their_rows(self) -> None:
        """I12: counters and rows agree at every moment, and each batch finishes once."""
        if not hasattr(self, "batches") or not self.batches:
            return
        with self.clock.database.read() as conn:
            states = dict(conn.execute(select(Batch.id, Batch.state)).all())
            ends = dict(
                conn.execute(
                    select(Event.batch_id, func.count()).where(Event.type.in_(("batch.completed", "batch.cancelled"))).group_by(Event.batch_id)
                ).all()
            )
            told = {name: counters.counts(conn, name).get(KIND, {}) for name in self.batches}
        for name, batch in self.batches.items():
            assert states[name] == batch["state"]
            assert ends.get(name, 0) == batch["finished"]
            mine = [o for o in self.jobs.values() if o.batch == name]
            want = Counter(str(o.state) for o in mine if o.state in TERMINAL) + Counter({"total": len(mine)})
            assert {k: n for k, n in told[name].items() if n} == want


def play(clock: Clock, examples: int, steps: int = 30, shrink: bool = True) -> None:
    machine = type("LifecycleMachine", (Lifecycle,), {"clock": clock})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        ),
    )  # fmt: skip


def test_sqlite_follows_the_model():
    with sqlite_clock() as clock:
        play(clock, 40)


def test_postgresql_follows_the_model(postgres_database):
    with postgres_clock(postgres_database) as clock:
        play(clock, 8)


@pytest.mark.parametrize(
    "name",
    ["finish without fence", "stop without fence", "checkpoint without fence", "attempt not counted", "counted twice",
     "group crash strikes all", "pause ignored on claim", "claim of ended jobs"],
)  # fmt: skip
def test_the_model_catches_planted_bugs(name):
    bug = next(b for b in planted.BUGS if b.name == name)
    with sqlite_clock() as clock, planted.planted(bug), pytest.raises((AssertionError, IntegrityError)):
        play(clock, 100, shrink=False)

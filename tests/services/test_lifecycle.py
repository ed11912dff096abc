"""The life of a job on both databases: every step, every error class, every fence."""

import threading
from collections import Counter
from dataclasses import replace

import pytest
from sqlalchemy import func, insert, select, text, update

from contentfactory.ids import new_id
from contentfactory.jobs.spec import get_kind
from contentfactory.states import JobState
from db import batches, counters, jobs, lifecycle, measurements, migrate, projects, waiting
from db.ended import NewArtifact
from db.lifecycle import Stop, Success
from db.models import Artifact, Attempt, Batch, Event, Job, Mark, MicroBatch, Share
from db.session import now
from producer.publish import BANDS, band

FULL = get_kind("text.echo").max_group
"""Jobs of a full micro-batch."""


def state_of(database, job_id):
    with database.read() as conn:
        return conn.execute(select(Job.state).where(Job.id == job_id)).scalar_one()


def row_of(database, job_id):
    with database.read() as conn:
        return conn.execute(select(Job).where(Job.id == job_id)).mappings().one()


def claim(database, ids, worker="w1", lease_s=30.0):
    return database.run(lambda conn: lifecycle.claim(conn, ids, worker, lease_s))


def dispatch(database, **options):
    return database.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=options.pop("cap_s", 1e9), **options))


def artifact(name="text.txt", sha="a" * 64):
    return NewArtifact(name, f"projects/p/objects/aa/{sha}.txt", sha, 3, "text/plain")


def finish(database, claimed, **fields):
    return database.run(
        lambda conn: lifecycle.finish(conn, [Success(c.id, c.attempt, (artifact(),), **fields) for c in claimed])
    )


def fail(database, claimed, error_class):
    error = {"type": error_class, "code": error_class, "message": f"{error_class} happened"}
    return database.run(lambda conn: lifecycle.stop(conn, Stop(claimed.id, claimed.attempt, error)))


def make_due(database, *ids):
    with database.write() as conn:
        conn.execute(update(Job).where(Job.id.in_(ids)).values(run_after=0.0))


def new_batch(database, project, total):
    batch_id = new_id("batch")

    def work(conn):
        batches.create(conn, batch_id, project, "b", source={}, digest=None, priority=0)
        batches.advance(conn, batch_id, 0, total, total)

    database.run(work)
    return batch_id


def start_batch(database, batch_id):
    database.run(lambda conn: batches.expanded(conn, batch_id))


def test_migrated_schema_equals_models(database):
    assert migrate.differences(database) == []


def test_a_job_goes_its_way(database, make_jobs):
    [job] = make_jobs()
    [hint] = dispatch(database)
    assert hint.ids == (job,)
    assert state_of(database, job) == "dispatched"
    [claimed] = claim(database, hint.ids)
    assert (claimed.attempt, claimed.params["text"]) == (1, "job 0")
    assert finish(database, [claimed]) == [job]
    row = row_of(database, job)
    assert row["state"] == "succeeded" and row["finished_at"] >= row["started_at"] > 0 and row["lease_owner"] is None
    with database.read() as conn:
        assert [a["name"] for a in jobs.artifacts(conn, [job])[job]] == ["text.txt"]
        assert [a["outcome"] for a in jobs.attempts(conn, job)] == ["succeeded"]


def test_groups_share_what_may_be_shared_and_no_more(database, make_jobs):
    same = make_jobs(FULL + 44)
    other = make_jobs(2, share_key="another")
    hints = dispatch(database, window=2 * FULL, per_worker=8 * FULL)
    assert [(h.ids[0] in other, len(h.ids)) for h in hints] == [(False, FULL), (False, 44), (True, 2)]
    assert {i for h in hints for i in h.ids} == {*same, *other}


def test_dispatch_stops_at_the_cap(database, make_jobs):
    make_jobs(FULL + 44, seconds=1.0)
    first = dispatch(database, cap_s=60)
    assert sum(len(h.ids) for h in first) == FULL  # one micro-batch reaches over the cap, then it is full
    assert dispatch(database, cap_s=60) == []


def test_priority_goes_first_then_rank(database, make_jobs):
    low = make_jobs(1, priority=0, rank=1, share_key="a")
    late = make_jobs(1, priority=50, rank=9, share_key="b")
    early = make_jobs(1, priority=50, rank=2, share_key="c")
    assert [h.ids[0] for h in dispatch(database)] == [early[0], late[0], low[0]]


def test_projects_share_by_weight(database, project, make_jobs):
    other = database.run(lambda conn: projects.ensure(conn, "other"))
    make_jobs(64, seconds=1.0, share_key="x")
    make_jobs(64, seconds=1.0, share_key="y", project_id=other)
    with database.write() as conn:
        conn.execute(update(Job).values(group_limit=1))
    hints = dispatch(database, cap_s=40)
    owners = Counter(row_of(database, h.ids[0])["project_id"] for h in hints)
    assert abs(owners[project] - owners[other]) <= 1 and sum(owners.values()) >= 40


def test_a_project_that_has_nothing_in_the_broker_goes_past_a_full_one(database, project, make_jobs):
    other = database.run(lambda conn: projects.ensure(conn, "other"))
    make_jobs(FULL + 44, seconds=1.0)
    assert not any(h.ahead for h in dispatch(database, cap_s=60))
    mine = make_jobs(FULL + 44, seconds=1.0, share_key="y", project_id=other)
    assert dispatch(database, cap_s=60, top_up=True) == []  # whoever tops up comes by too often for this look
    [hint] = dispatch(database, cap_s=60)
    assert hint.ahead and hint.ids == tuple(mine[:FULL])
    assert dispatch(database, cap_s=60) == []  # one micro-batch, then it waits for room as everybody does
    make_jobs(1, seconds=1.0, share_key="z")
    assert dispatch(database, cap_s=60) == []


def test_only_the_first_micro_batch_of_a_project_goes_ahead(database, project, make_jobs):
    other = database.run(lambda conn: projects.ensure(conn, "other"))
    make_jobs(1)
    dispatch(database)
    make_jobs(FULL + 44, share_key="x")
    make_jobs(FULL + 44, share_key="y", project_id=other)
    hints = dispatch(database, window=2 * FULL, per_worker=8 * FULL)
    owners = [(row_of(database, h.ids[0])["project_id"], h.ahead) for h in hints]
    assert sorted(owners) == sorted([(project, False)] * 2 + [(other, True), (other, False)])


def test_a_job_that_comes_back_goes_past_those_that_were_not_tried(database, make_jobs):
    [job] = make_jobs(1, share_key="x")
    make_jobs(1, share_key="y")
    first, _ = dispatch(database)
    [held] = claim(database, first.ids, "w")
    fail(database, held, "released")
    [back] = dispatch(database)
    assert (back.ids, back.again) == ((job,), True) and not first.again
    assert [band(replace(back, priority=p, ahead=a, again=g)) for p, a, g in ((100, 0, 1), (0, 1, 1), (0, 0, 1), (0, 0, 0))] == list(BANDS)


def test_idleness_earns_no_credit_and_costs_none(database, project, make_jobs):
    """Whoever comes back, or is new, starts where the others stand: also in a ledger from before there was a clock."""
    other = database.run(lambda conn: projects.ensure(conn, "other"))
    for owner, spent in ((project, 5000.0), (other, 7.0)):
        with database.write() as conn:
            conn.execute(insert(Share).values(queue="text", project_id=owner, virtual_seconds=spent))
    new = database.run(lambda conn: projects.ensure(conn, "new"))
    for owner in (project, other, new):
        make_jobs(60, seconds=1.0, share_key=owner[-8:], project_id=owner)
    with database.write() as conn:
        conn.execute(update(Job).values(group_limit=1))
    owners = Counter(row_of(database, h.ids[0])["project_id"] for h in dispatch(database, cap_s=30))
    assert len(owners) == 3 and max(owners.values()) - min(owners.values()) <= 1


def test_many_projects_do_not_flood_a_full_broker(database, make_jobs):
    make_jobs(64, seconds=1.0)
    dispatch(database, cap_s=30)
    for n in range(waiting.STRANGERS + 2):
        make_jobs(1, project_id=database.run(lambda conn, n=n: projects.ensure(conn, f"p{n}")))
    assert len(dispatch(database, cap_s=30)) == waiting.STRANGERS


def test_a_second_claim_gets_nothing(database, make_jobs):
    [job] = make_jobs()
    assert len(claim(database, [job], "w1")) == 1
    assert claim(database, [job], "w2") == []


def test_a_stale_hint_does_not_bring_jobs_together_again(database, make_jobs):
    # Found by simulation: a worker slept with a group's hint in hand while the group crashed; each was to be tried alone.
    ids = make_jobs(3)
    for one in claim(database, ids):
        fail(database, one, "crash")
    make_due(database, *ids)
    assert claim(database, ids, "w2") == []
    assert [len(claim(database, [i], "w3")) for i in ids] == [1, 1, 1]


def test_claim_race_has_one_winner(database, make_jobs):
    ids = make_jobs(20)
    won = []

    def race(name):
        won.extend((name, c.id) for c in claim(database, ids, name))

    threads = [threading.Thread(target=race, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(i for _, i in won) == sorted({i for _, i in won})
    left = [i for i in ids if state_of(database, i) == "queued"]
    assert len(won) + len(left) == 20


def test_a_fenced_attempt_changes_nothing(database, make_jobs):
    [job] = make_jobs()
    [old] = claim(database, [job], "w1")
    with database.write() as conn:
        lifecycle.reap(conn, lease_s=30, period_s=5)
        conn.execute(update(Job).where(Job.id == job).values(lease_until=now() - 1))
        lifecycle.reap(conn, lease_s=30, period_s=5)
    make_due(database, job)
    [new] = claim(database, [job], "w2")
    assert new.attempt == old.attempt + 1
    assert finish(database, [old]) == []
    assert fail(database, old, "input") is None
    assert not database.run(lambda conn: lifecycle.publish(conn, job, old.attempt, artifact("checkpoint-1.zip")))
    assert state_of(database, job) == "running"
    assert finish(database, [new]) == [job]
    with database.read() as conn:
        assert [a["attempt"] for a in jobs.artifacts(conn, [job])[job]] == [2]


def test_a_claim_that_a_crash_of_the_database_takes_back_is_fenced_by_name(database, make_jobs):
    """Claims do not wait for the disk, so a number may be given twice; what the first to have it made is not taken for the second's."""
    [job] = make_jobs()
    before = row_of(database, job)
    [old] = claim(database, [job], "w1")
    with database.write() as conn:  # what the server's recovery would leave
        conn.execute(update(Job).where(Job.id == job).values({Job.__table__.c[name]: value for name, value in before.items() if name != "place"}))
    [new] = claim(database, [job], "w2")
    assert new.attempt == old.attempt
    late = Success(job, old.attempt, (artifact(),), claimed=old)
    assert database.run(lambda conn: lifecycle.finish(conn, [late], "w1")) == []
    error = {"type": "input", "code": "input", "message": "m"}
    assert database.run(lambda conn: lifecycle.stop(conn, Stop(job, old.attempt, error, worker="w1"))) is None
    assert state_of(database, job) == "running"
    made = Success(job, new.attempt, (artifact(),), claimed=new)
    assert database.run(lambda conn: lifecycle.finish(conn, [made], "w2")) == [job]
    with database.read() as conn:
        assert conn.execute(select(MicroBatch.worker)).scalars().all() == ["w2"]


def test_who_dispatches_or_claims_does_not_wait_for_the_disk_and_who_accepts_or_finishes_does(database, make_jobs):
    def waits(work, **options):
        told = []

        def looked(conn):
            work(conn)
            told.append(conn.exec_driver_sql("PRAGMA synchronous" if database.sqlite else "SHOW synchronous_commit").scalar_one())

        database.run(looked, **options)
        return told == [2 if database.sqlite else "on"]

    def accept(conn):
        lifecycle.insert_jobs(conn, [replace(job, id=new_id("job"))])

    [first] = make_jobs()
    row = row_of(database, first)
    job = lifecycle.NewJob(first, row["project_id"], row["kind"], row["queue"], {"text": "x"}, row["share_key"], 0.1, 1)
    assert waits(accept)
    assert not waits(lambda conn: lifecycle.dispatch(conn, "text", cap_s=1e9), durable=False)
    assert not waits(lambda conn: lifecycle.claim(conn, [first], "w", 30.0), durable=False)
    assert waits(lambda conn: lifecycle.finish(conn, [Success(first, 1, (artifact(),))], "w"))


def test_terminal_states_never_change(database, make_jobs):
    [job] = make_jobs()
    [claimed] = claim(database, [job])
    finish(database, [claimed])
    assert fail(database, claimed, "input") is None
    assert database.run(lambda conn: lifecycle.cancel_jobs(conn, [job])) == {"cancelled": 0, "requested": 0}
    assert claim(database, [job]) == []
    assert state_of(database, job) == "succeeded"


@pytest.mark.parametrize(
    ("error_class", "tries", "end"),
    [("input", 1, "failed"), ("policy", 1, "failed"), ("bug", 3, "dead"), ("crash", 3, "dead"), ("transient", 9, "dead"),
     ("deadline", 3, "dead"), ("resource", 2, "failed")],
)  # fmt: skip
def test_error_classes_bound_the_tries(database, make_jobs, error_class, tries, end):
    [job] = make_jobs()
    states = []
    while not states or states[-1] == "queued":
        make_due(database, job)
        [claimed] = claim(database, [job])
        states.append(str(fail(database, claimed, error_class)))
    assert states == ["queued"] * (tries - 1) + [end]
    assert row_of(database, job)["error"]["message"] == f"{error_class} happened"


def test_released_costs_nothing(database, make_jobs):
    [job] = make_jobs()
    for _ in range(12):
        [claimed] = claim(database, [job])
        assert fail(database, claimed, "released") == JobState.QUEUED
    row = row_of(database, job)
    assert (row["strikes"], row["tries"], row["attempt"]) == (0, {}, 12)


def test_a_crashed_group_goes_on_singly_without_strikes(database, make_jobs):
    ids = make_jobs(4)
    for one in claim(database, ids):
        assert fail(database, one, "crash") == JobState.QUEUED
    assert {row_of(database, i)["strikes"] for i in ids} == {0}
    assert sorted(len(h.ids) for h in dispatch(database)) == [1, 1, 1, 1]


def test_out_of_memory_halves_the_group(database, make_jobs):
    ids = make_jobs(8)
    for one in claim(database, ids):
        fail(database, one, "resource")
    assert sorted(len(h.ids) for h in dispatch(database)) == [4, 4]


def test_reaper_spares_everything_once_after_its_own_outage(database, make_jobs):
    [job] = make_jobs()
    claim(database, [job])
    with database.write() as conn:
        lifecycle.reap(conn, lease_s=30, period_s=5)
        conn.execute(update(Job).values(lease_until=now() - 100))
        conn.execute(update(Mark).where(Mark.name == "reaper").values(value=now() - 200))
    assert database.run(lambda conn: lifecycle.reap(conn, lease_s=30, period_s=5)) == {"extended": 1}
    assert state_of(database, job) == "running"
    with database.write() as conn:
        conn.execute(update(Job).values(lease_until=now() - 1))
    assert database.run(lambda conn: lifecycle.reap(conn, lease_s=30, period_s=5)) == {"queued": 1}


def test_the_first_round_of_a_reaper_spares_everything(database, make_jobs):
    # Found by simulation: the timer first runs when an outage of the database ends that was longer than a lease.
    [job] = make_jobs()
    claim(database, [job])
    with database.write() as conn:
        conn.execute(update(Job).values(lease_until=now() - 1))
    assert database.run(lambda conn: lifecycle.reap(conn, lease_s=30, period_s=5)) == {"extended": 1}
    assert state_of(database, job) == "running"


def test_heartbeat_tells_lost_and_cancelled(database, make_jobs):
    kept, cancelled, lost = make_jobs(3)
    held = {(c.id, c.attempt): (0.5, "half") for c in claim(database, [kept, cancelled, lost])}
    database.run(lambda conn: lifecycle.cancel_jobs(conn, [cancelled]))
    with database.write() as conn:
        conn.execute(update(Job).where(Job.id == lost).values(attempt=7))
    beat = database.run(lambda conn: lifecycle.heartbeat(conn, held, 60))
    assert (beat.lost, beat.cancelled) == ({(lost, 1)}, {(cancelled, 1)})
    assert row_of(database, kept)["progress"] == 0.5


def test_cancel_waiting_and_running(database, make_jobs):
    waiting, running = make_jobs(2)
    [claimed] = claim(database, [running])
    assert database.run(lambda conn: lifecycle.cancel_jobs(conn, [waiting, running])) == {"cancelled": 1, "requested": 1}
    assert claim(database, [waiting]) == []
    assert finish(database, [claimed]) == []  # too late: never both cancelled and published
    assert state_of(database, running) == "cancelled"
    with database.read() as conn:
        assert conn.execute(select(func.count()).select_from(Artifact)).scalar() == 0


def test_children_wait_and_then_run(database, make_jobs):
    first, second = make_jobs(2)
    [child] = make_jobs(1, parents=(first, second))
    assert state_of(database, child) == "blocked"
    finish(database, claim(database, [first]))
    assert state_of(database, child) == "blocked"
    finish(database, claim(database, [second]))
    assert state_of(database, child) == "queued"


def test_a_child_of_finished_parents_is_queued_at_once(database, make_jobs):
    [parent] = make_jobs()
    finish(database, claim(database, [parent]))
    assert state_of(database, make_jobs(1, parents=(parent,))[0]) == "queued"


def test_a_failed_parent_fails_its_descendants_by_name(database, make_jobs):
    [parent] = make_jobs(1, custom_id="story")
    [child] = make_jobs(1, parents=(parent,), custom_id="speech")
    [grandchild] = make_jobs(1, parents=(child,), custom_id="clip")
    [claimed] = claim(database, [parent])
    fail(database, claimed, "input")
    assert [state_of(database, i) for i in (child, grandchild)] == ["failed", "failed"]
    assert "needs story (text.echo), which is failed: input happened" in row_of(database, child)["error"]["message"]
    assert "needs speech" in row_of(database, grandchild)["error"]["message"]
    late = make_jobs(1, parents=(parent,))[0]
    assert state_of(database, late) == "failed"


def test_concurrent_parents_release_their_child(database, make_jobs):
    parents = make_jobs(6)
    [child] = make_jobs(1, parents=tuple(parents))
    claimed = claim(database, parents)
    threads = [threading.Thread(target=finish, args=(database, [c])) for c in claimed]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (state_of(database, child), row_of(database, child)["pending"]) == ("queued", 0)


def test_a_batch_counts_and_finishes_once(database, project, make_jobs):
    batch = new_batch(database, project, 3)
    good, bad, gone = make_jobs(3, batch_id=batch)
    start_batch(database, batch)
    finish(database, claim(database, [good]))
    [claimed] = claim(database, [bad])
    fail(database, claimed, "input")
    assert database.run(counters.close_batches) == []
    database.run(lambda conn: lifecycle.cancel_jobs(conn, [gone]))
    database.run(counters.fold_counts)
    assert database.run(counters.close_batches) == [batch]
    assert database.run(counters.close_batches) == []
    with database.read() as conn:
        assert counters.counts(conn, batch) == {"text.echo": {"total": 3, "succeeded": 1, "failed": 1, "cancelled": 1}}
        assert conn.execute(select(func.count()).where(Event.type == "batch.completed")).scalar() == 1
        assert conn.execute(select(Batch.state).where(Batch.id == batch)).scalar() == "completed"


def test_cancelling_a_batch_keeps_its_jobs_from_starting(database, project, make_jobs):
    batch = new_batch(database, project, 5)
    ids = make_jobs(5, batch_id=batch)
    start_batch(database, batch)
    running = claim(database, ids[:1])
    assert database.run(lambda conn: lifecycle.cancel_batch(conn, batch, limit=2)) == 2
    assert claim(database, ids[1:]) == []
    assert database.run(lambda conn: lifecycle.cancel_batch(conn, batch, limit=2)) == 0
    assert finish(database, running) == []
    assert database.run(counters.close_batches) == [batch]
    with database.read() as conn:
        assert conn.execute(select(Batch.state).where(Batch.id == batch)).scalar() == "cancelled"


@pytest.mark.parametrize("what", ["queue", "project", "batch"])
def test_pause_holds_dispatch_and_claim_and_resume_lets_go(database, project, make_jobs, what):
    batch = new_batch(database, project, 2)
    ids = make_jobs(2, batch_id=batch)
    start_batch(database, batch)
    [hint] = dispatch(database)
    name = {"queue": "text", "project": project, "batch": batch}[what]
    assert database.run(lambda conn: lifecycle.pause(conn, what, name, True))
    assert claim(database, hint.ids) == []
    assert {state_of(database, i) for i in ids} == {"queued"}
    assert dispatch(database) == []
    database.run(lambda conn: lifecycle.pause(conn, what, name, False))
    assert sum(len(h.ids) for h in dispatch(database)) == 2


def test_workers_get_equal_shares_of_a_little_work_that_is_more_than_one_look(database, make_jobs):
    make_jobs(300, seconds=0.5)

    def report(conn):
        for n in range(10):
            lifecycle.report_worker(conn, f"w{n}", ["text"], "cpu", 0, [])

    database.run(report)
    # Whatever it takes: 150 seconds of work where 100 may be in flight.
    assert [len(hint.ids) for hint in dispatch(database, window=256, cap_s=10)] == [30] * 10


def test_long_micro_batches_go_to_all_workers_and_no_further(database, make_jobs):
    """A full micro-batch takes longer than what may be in flight: still each worker gets one, and the broker no more until they are taken."""
    make_jobs(6 * FULL, seconds=1.0)

    def report(conn):
        for n in range(4):
            lifecycle.report_worker(conn, f"w{n}", ["text"], "cpu", 0, [])

    database.run(report)
    hints = dispatch(database, window=4096, cap_s=10)
    assert [len(hint.ids) for hint in hints] == [FULL] * 4
    assert dispatch(database, window=4096, cap_s=10) == []
    claim(database, hints[0].ids)
    assert dispatch(database, window=4096, cap_s=10) == [], "three wait there for whoever comes next"
    for hint in hints[1:]:
        claim(database, hint.ids)
    assert sum(len(hint.ids) for hint in dispatch(database, window=4096, cap_s=10)) == 2 * FULL


def test_an_attempt_is_seen_before_its_row_is_written(database, make_jobs):
    [job] = make_jobs(1)
    [hint] = dispatch(database)
    [held] = claim(database, hint.ids)
    with database.read() as conn:
        [attempt] = jobs.attempts(conn, job)
        assert conn.execute(select(func.count()).select_from(Attempt)).scalar() == 0
    assert (attempt["attempt"], attempt["group_size"], attempt["started_at"]) == (1, 1, held.started_at)
    assert attempt["worker"] and attempt["finished_at"] is attempt["outcome"] is None
    database.run(lambda conn: lifecycle.stop(conn, lifecycle.Stop(job, 1, {"type": "transient", "message": "later"})))
    with database.read() as conn:
        [attempt] = jobs.attempts(conn, job)
    assert attempt["outcome"] == "transient" and attempt["error"]["message"] == "later" and attempt["finished_at"] >= held.started_at


def test_the_attempt_of_an_earlier_releases_worker_is_closed(database, make_jobs):
    # It wrote the row when it claimed the job; the reaper of this release ends the attempt.
    [job] = make_jobs(1)
    [hint] = dispatch(database)
    [held] = claim(database, hint.ids)
    with database.write() as conn:
        conn.execute(insert(Attempt).values(job_id=job, attempt=1, worker="old", group_size=1, started_at=held.started_at))
    database.run(lambda conn: lifecycle.crash(conn, [(job, 1)], "it died"))
    with database.read() as conn:
        [attempt] = jobs.attempts(conn, job)
    assert attempt["outcome"] == "crash" and attempt["finished_at"] is not None


def ended_attempts(database):
    with database.read() as conn:
        return conn.execute(text("SELECT * FROM ended_attempts ORDER BY job_id, attempt")).mappings().all()


def micro_batches(database):
    with database.read() as conn:
        return conn.execute(select(MicroBatch.__table__)).mappings().all()


def test_a_micro_batch_that_succeeds_is_one_row(database, make_jobs):
    ids = make_jobs(5)
    [hint] = dispatch(database)
    held = claim(database, hint.ids, "w7")
    assert finish(database, held, phases={"compute_s": 2.0}) == ids
    [row] = micro_batches(database)
    assert [row[k] for k in ("kind", "queue", "worker", "jobs", "phases")] == ["text.echo", "text", "w7", 5, {"compute_s": 2.0}]
    told = [row_of(database, i) for i in ids]
    assert {t["micro_batch"] for t in told} == {row["id"]}
    assert row["started_at"] == min(t["started_at"] for t in told) and row["finished_at"] == max(t["finished_at"] for t in told)
    with database.read() as conn:
        assert conn.execute(select(func.count()).select_from(Attempt)).scalar() == 0
        [attempt] = jobs.attempts(conn, ids[3])
    assert dict(attempt) == {
        "attempt": 1, "worker": "w7", "group_size": 5, "started_at": told[3]["started_at"], "finished_at": told[3]["finished_at"],
        "outcome": "succeeded", "error": None, "phases": {"compute_s": 2.0},
    }  # fmt: skip
    seen = ended_attempts(database)
    assert [s["job_id"] for s in seen] == ids
    assert {(s["attempt"], s["worker"], s["group_size"], s["outcome"], s["error"]) for s in seen} == {(1, "w7", 5, "succeeded", None)}


def test_each_claim_is_a_micro_batch_of_its_own(database, make_jobs):
    ids = make_jobs(4)
    dispatch(database)
    first, second = claim(database, ids[:2]), claim(database, ids[2:])
    # What came back from two claims may be committed at once.
    assert set(finish(database, [*first, *second])) == set(ids)
    rows = micro_batches(database)
    assert [r["jobs"] for r in rows] == [2, 2] and [r["phases"] for r in rows] == [None, None]
    with database.read() as conn:
        assert conn.execute(text("SELECT count(*) FROM micro_batches WHERE phases IS NULL")).scalar() == 2


def test_a_job_that_failed_and_then_succeeded_shows_both(database, make_jobs):
    [job, other] = make_jobs(2)
    dispatch(database)
    [one, two] = claim(database, [job, other], "w1")
    assert fail(database, one, "transient") == "queued"
    assert row_of(database, job)["micro_batch"] is None
    finish(database, [two])
    make_due(database, job)
    dispatch(database)
    [again] = claim(database, [job], "w2")
    with database.read() as conn:
        assert [(a["attempt"], a["outcome"], a["worker"]) for a in jobs.attempts(conn, job)] == [(1, "transient", "w1"), (2, None, "w2")]
    finish(database, [again])
    with database.read() as conn:
        told = jobs.attempts(conn, job)
    assert [(a["attempt"], a["outcome"], a["worker"], a["group_size"]) for a in told] == [(1, "transient", "w1", 2), (2, "succeeded", "w2", 1)]
    assert told[0]["error"]["code"] == "transient"
    seen = [(s["attempt"], s["outcome"], s["worker"]) for s in ended_attempts(database) if s["job_id"] == job]
    assert seen == [(1, "transient", "w1"), (2, "succeeded", "w2")]
    # The half of the first claim that succeeded counts what was claimed.
    assert sorted(r["jobs"] for r in micro_batches(database)) == [1, 2]


def test_two_commits_of_one_claim_are_one_row(database, make_jobs):
    ids = make_jobs(3)
    dispatch(database)
    held = claim(database, ids)
    finish(database, held[:1], phases={"compute_s": 1.0})
    # The others run on, and what their neighbour took is not theirs yet.
    with database.read() as conn:
        assert [(a["outcome"], a["phases"]) for a in jobs.attempts(conn, ids[1])] == [(None, None)]
    finish(database, held[1:2], phases={"compute_s": 9.0})
    assert fail(database, held[2], "input") == "failed"
    [row] = micro_batches(database)
    assert (row["jobs"], row["phases"]) == (3, {"compute_s": 1.0})
    assert [(s["group_size"], s["outcome"]) for s in ended_attempts(database)] == [(3, "succeeded"), (3, "succeeded"), (3, "input")]
    assert [row_of(database, i)["micro_batch"] for i in ids] == [row["id"], row["id"], None]


def test_what_an_earlier_release_claimed_keeps_an_attempt_of_its_own(database, make_jobs):
    ids = make_jobs(2)
    dispatch(database)
    held = claim(database, ids, "old")
    with database.write() as conn:
        conn.execute(update(Job).values(micro_batch=None))
    finish(database, held, phases={"compute_s": 1.0})
    assert micro_batches(database) == []
    with database.read() as conn:
        assert conn.execute(select(func.count()).select_from(Attempt)).scalar() == 2
        [attempt] = jobs.attempts(conn, ids[0])
    assert (attempt["worker"], attempt["outcome"], attempt["group_size"], attempt["phases"]) == ("old", "succeeded", 2, {"compute_s": 1.0})
    assert len(ended_attempts(database)) == 2


def test_a_number_that_an_earlier_release_left_in_a_job_is_not_believed(database, make_jobs):
    # Its reaper ended the first attempt and its worker made the second: neither knows of the column.
    [job, other] = make_jobs(2)
    dispatch(database)
    [_, two] = claim(database, [job, other], "w1")
    finish(database, [two], phases={"compute_s": 5.0})
    with database.write() as conn:
        conn.execute(update(Job).where(Job.id == job).values(state="succeeded", attempt=2, group_size=1, started_at=now(), finished_at=now()))
        for n, outcome in enumerate(("crash", "succeeded"), start=1):
            conn.execute(insert(Attempt).values(job_id=job, attempt=n, worker="old", group_size=1, started_at=1.0, finished_at=2.0, outcome=outcome))
        lifecycle.add_event(conn, "job.succeeded", job_id=job)
        conn.execute(update(Event).values(at=1.0))
    with database.read() as conn:
        assert [(a["attempt"], a["outcome"], a["worker"]) for a in jobs.attempts(conn, job)] == [(1, "crash", "old"), (2, "succeeded", "old")]
        told = {e.group_size: e.phases for e in measurements.past(conn, 0).ended}
    assert told == {2: {"compute_s": 5.0}, 1: {}}
    assert [(s["attempt"], s["worker"]) for s in ended_attempts(database) if s["job_id"] == job] == [(1, "old"), (2, "old")]


def test_figures_of_a_job_are_those_of_its_micro_batch(database, make_jobs):
    ids = make_jobs(4)
    dispatch(database)
    held = claim(database, ids)
    error = {"type": "transient", "code": "storage", "message": "later"}
    database.run(lambda conn: lifecycle.stop(conn, Stop(ids[0], 1, error, {"compute_s": 1.0})))
    finish(database, held[1:3], phases={"compute_s": 3.0})
    make_due(database, ids[0])
    finish(database, claim(database, ids[:1]), phases={"compute_s": 0.5})
    with database.write() as conn:
        conn.execute(update(Event).values(at=1.0))
    with database.read() as conn:
        ended = measurements.past(conn, 0).ended
    told = sorted((e.state or "", e.group_size, e.phases["compute_s"]) for e in ended)
    assert told == [("", 4, 1.0), ("succeeded", 1, 0.5), ("succeeded", 4, 3.0), ("succeeded", 4, 3.0)]
    # The row has gone with its time: the job is told without it.
    with database.write() as conn:
        conn.execute(MicroBatch.__table__.delete())
    with database.read() as conn:
        assert sorted((e.group_size, e.phases) for e in measurements.past(conn, 0).ended if e.state) == [(1, {}), (4, {}), (4, {})]
        [attempt] = jobs.attempts(conn, ids[1])
    assert (attempt["outcome"], attempt["worker"], attempt["group_size"], attempt["phases"]) == ("succeeded", "", 4, None)
    assert len([s for s in ended_attempts(database) if s["outcome"] == "succeeded"]) == 3


def test_lost_hints_are_sent_again(database, make_jobs):
    ids = make_jobs(3)
    [hint] = dispatch(database)
    assert database.run(lambda conn: lifecycle.rescue_dispatched(conn, "text", hint.dispatched_at, -1.0)) == 0
    assert database.run(lambda conn: lifecycle.rescue_dispatched(conn, "text", None, 60.0)) == 0
    assert database.run(lambda conn: lifecycle.rescue_dispatched(conn, "text", hint.dispatched_at + 1, -1.0)) == 3
    [again] = dispatch(database)
    assert set(again.ids) == set(ids)


def test_insert_is_idempotent(database, project, make_jobs):
    fixed = new_id("job")
    make_jobs(1, id=fixed)
    make_jobs(1, id=fixed)
    with database.read() as conn:
        assert conn.execute(select(func.count()).select_from(Job)).scalar() == 1


def test_reprioritise_moves_to_the_front(database, make_jobs):
    make_jobs(1, share_key="a")
    [later] = make_jobs(1, share_key="b")
    database.run(lambda conn: lifecycle.reprioritise(conn, [later], 90))
    assert dispatch(database)[0].ids == (later,)


def test_stuck_children_are_freed(database, make_jobs):
    [parent] = make_jobs()
    [child] = make_jobs(1, parents=(parent,))
    finish(database, claim(database, [parent]))
    with database.write() as conn:
        conn.execute(update(Job).where(Job.id == child).values(state="blocked", pending=1))
    assert database.run(lifecycle.unblock_stuck) == 1
    assert state_of(database, child) == "queued"


def test_the_last_jobs_of_a_queue_keep_every_worker_busy(database, make_jobs):
    """Two workers and ten jobs that could go together: five each. With a backlog, full micro-batches."""
    for name in ("w1", "w2"):
        database.run(lambda conn, name=name: lifecycle.report_worker(conn, name, ["text"], "cpu", 0, []))
    make_jobs(10)
    hints = database.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=1e6))
    assert [len(hint.ids) for hint in hints] == [5, 5]
    make_jobs(2 * FULL)
    hints = database.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=1e6, window=FULL))
    assert len(hints[0].ids) == FULL


@pytest.mark.parametrize("together", [1, 3])
def test_the_story_of_a_job_has_its_end(database, project, make_jobs, together):
    """Those that succeed together have one event for all of them; each one's story ends all the same, and once."""
    ids = make_jobs(together)
    finish(database, claim(database, ids))
    with database.read() as conn:
        written = conn.execute(select(Event.type).where(Event.type.like("job%.succeeded"))).scalars().all()
        assert written == ["job.succeeded" if together == 1 else "jobs.succeeded"]
        for job_id in ids:
            row = jobs.get(conn, project, job_id)
            [end] = jobs.story(conn, row)
            assert (end["type"], end["job_id"], end["at"], end["data"]["state"]) == ("job.succeeded", job_id, row["finished_at"], "succeeded")


def test_the_story_of_a_cancelled_job_has_its_end(database, project, make_jobs):
    [job_id] = make_jobs(1)
    with database.read() as conn:
        assert jobs.story(conn, jobs.get(conn, project, job_id)) == [], "it waits"
    database.run(lambda conn: lifecycle.cancel_jobs(conn, [job_id]))
    with database.read() as conn:
        [end] = jobs.story(conn, jobs.get(conn, project, job_id))
    assert end["type"] == "job.cancelled"


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
@pytest.mark.parametrize("fields", [{}, {"result_key": "f" * 64}])
def test_no_sweep_marks_anything_between_the_end_of_a_job_and_its_commit(database, make_jobs, fields):
    """The update that ends jobs takes the sweep's lock itself. (SQLite has one writer at a time.)"""
    held = claim(database, make_jobs(2))
    with database.write() as conn:
        assert len(lifecycle.finish(conn, [Success(c.id, c.attempt, (artifact(),), **fields) for c in held])) == 2
        with database.write() as other:
            free = other.exec_driver_sql("SELECT pg_try_advisory_xact_lock(hashtext('factory:sweep'))").scalar()
        assert free is False
    with database.write() as other:
        assert other.exec_driver_sql("SELECT pg_try_advisory_xact_lock(hashtext('factory:sweep'))").scalar() is True

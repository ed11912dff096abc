"""Retention and sweep: what nothing refers to goes, what something refers to stays, whatever happens in between."""

import os
import time

import pytest
from sqlalchemy import func, insert, select, text, update

from contentfactory.errors import Conflict, NotFound, TransientError
from contentfactory.ids import new_id
from contentfactory.settings import load_settings
from contentfactory.states import JobState
from db import batches, counters, jobs, lifecycle, migrate, registry, retention
from db.ended import NewArtifact
from db.lifecycle import Stop, Success
from db.models import Artifact, Batch, DoomedObject, Event, Job, MicroBatch, ModelVersion
from db.session import now
from producer.enqueue import Producer
from producer.sweep import sweep
from storage.keys import artifact_key, input_key
from storage.local import LocalStore

OLD = 3 * 3600


@pytest.fixture
def store(tmp_path):
    opened = LocalStore(tmp_path / "objects", durable=False, signing_secret=b"0123456789abcdef")
    yield opened
    opened.close()


@pytest.fixture
def settings(tmp_path):
    return load_settings(state_dir=tmp_path / "state", retention_days=1)


def put(store, project, data, age=OLD):
    import hashlib

    sha = hashlib.sha256(data).hexdigest()
    key = artifact_key(project, sha, ".txt")
    store.put(key, data, media_type="text/plain")
    then = time.time() - age
    os.utime(store.path_of(key), (then, then))
    return NewArtifact("text.txt", key, sha, len(data), "text/plain")


def end(database, ids, artifact, age_days=0.0):
    claimed = database.run(lambda conn: lifecycle.claim(conn, ids, "w", 30))
    database.run(lambda conn: lifecycle.finish(conn, [Success(c.id, c.attempt, (artifact,)) for c in claimed]))
    with database.write() as conn:
        conn.execute(update(Job).where(Job.id.in_(ids)).values(finished_at=now() - age_days * 86400))


def count(database, table):
    with database.read() as conn:
        return conn.execute(select(func.count()).select_from(table)).scalar()


def test_an_empty_ledger_sweeps_nothing(database, project, store, settings):
    orphan = put(store, project, b"orphan")
    assert sweep(settings, database, store).objects == 0
    assert store.head(orphan.object_key) is not None


def test_a_newer_ledger_is_left_as_it_is(database):
    with database.write() as conn:
        conn.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    migrate.upgrade(database)
    assert migrate.current(database) == "9999"


def test_orphans_go_and_referenced_objects_stay(database, project, make_jobs, store, settings):
    kept, orphan, young = put(store, project, b"kept"), put(store, project, b"orphan"), put(store, project, b"young", age=60)
    end(database, make_jobs(1), kept)
    assert sweep(settings, database, store, dry_run=True).objects == 1
    assert sweep(settings, database, store).objects == 1
    assert [store.head(a.object_key) is not None for a in (kept, orphan, young)] == [True, False, True]
    assert sweep(settings, database, store).objects == 0


def test_sources_of_open_batches_and_files_of_models_stay(database, project, store, settings):
    source, weights = put(store, project, b"source"), put(store, project, b"weights")
    registered = put(store, project, b"registered")
    database.run(
        lambda conn: registry.add_input(
            conn, project, name="i", object_key=registered.object_key, sha256=registered.sha256, size=10, media_type="text/plain"
        )
    )
    database.run(
        lambda conn: batches.create(conn, new_id("batch"), project, "b", source={"object_key": source.object_key}, digest=None, priority=0)
    )
    database.run(
        lambda conn: registry.add_model(
            conn, project, "m", engine="flow", tasks=["image.generate"], files={"weights": {"object_key": weights.object_key}}, options={}, lineage={}
        )
    )
    assert sweep(settings, database, store).objects == 0


def test_ended_jobs_go_after_their_time_with_everything_of_theirs(database, project, make_jobs, store, settings):
    old, fresh = make_jobs(1), make_jobs(1)
    end(database, old, put(store, project, b"old"), age_days=2)
    end(database, fresh, put(store, project, b"fresh"))
    waiting = make_jobs(1)
    swept = sweep(settings, database, store)
    assert (swept.jobs, swept.objects) == (1, 1)
    with database.read() as conn:
        assert set(conn.execute(select(Job.id)).scalars()) == {*fresh, *waiting}
        assert set(conn.execute(select(Artifact.job_id)).scalars()) == set(fresh)
        assert set(conn.execute(text("SELECT job_id FROM ended_attempts")).scalars()) == set(fresh)


def test_micro_batches_go_a_day_after_their_jobs(database, project, make_jobs, store, settings):
    old, late, kept, fresh = (make_jobs(2) for _ in range(4))
    for n, ids in enumerate((old, late, kept, fresh)):
        end(database, ids, put(store, project, b"%d" % n))
    database.run(
        lambda conn: registry.add_model(conn, project, "m", engine="flow", tasks=["image.generate"], files={}, options={}, lineage={})
    )
    with database.write() as conn:
        conn.execute(update(ModelVersion).values(job_id=kept[0]))
        for ids, days in ((old, 2.1), (late, 1.9), (kept, 9)):
            conn.execute(update(Job).where(Job.id.in_(ids)).values(finished_at=now() - days * 86400))
            number = select(Job.micro_batch).where(Job.id == ids[0]).scalar_subquery()
            conn.execute(update(MicroBatch).where(MicroBatch.id == number).values(finished_at=now() - days * 86400))
        # One of a batch that is still open: its job outlives the row.
        conn.execute(insert(MicroBatch).values(id=1, kind="k", queue="text", worker="w", jobs=1, started_at=1.0, finished_at=2.0))
        batches.create(conn, new_id("batch"), project, "b", source={}, digest=None, priority=0)
        conn.execute(update(Job).where(Job.id == fresh[1]).values(micro_batch=1, finished_at=2.0, batch_id=select(Batch.id).scalar_subquery()))
    assert sweep(settings, database, store).jobs == 5
    with database.read() as conn:
        pointed = dict(conn.execute(select(Job.id, Job.micro_batch)).all())
        assert set(pointed) == {kept[0], *fresh}
        left = set(conn.execute(select(MicroBatch.id)).scalars())
        # That of the late ones waits another day.
        assert left > {pointed[kept[0]], pointed[fresh[0]]} and len(left) == 3
        assert [(a["outcome"], a["worker"]) for a in jobs.attempts(conn, kept[0])] == [("succeeded", "w")]
        assert [(a["outcome"], a["worker"]) for a in jobs.attempts(conn, fresh[1])] == [("succeeded", "")]


def test_what_others_wait_for_stays(database, project, make_jobs, store, settings):
    [parent] = make_jobs()
    [other] = make_jobs()
    [child] = make_jobs(1, parents=(parent, other))
    end(database, [parent], put(store, project, b"parent"), age_days=9)
    assert sweep(settings, database, store).jobs == 0
    end(database, [other], put(store, project, b"other"), age_days=9)
    end(database, [child], put(store, project, b"child"), age_days=9)
    assert sweep(settings, database, store).jobs == 3


@pytest.mark.parametrize("state", list(JobState))
def test_a_batch_goes_whatever_another_one_still_has(database, project, make_jobs, state):
    """A batch stays for jobs of its own, in whatever place they are, and for no others."""
    empty, kept = new_id("batch"), new_id("batch")

    def made(conn):
        for batch in (empty, kept):
            batches.create(conn, batch, project, "b", source={}, digest=None, priority=0)
        conn.execute(update(Batch).values(finished_at=1.0, state="completed"))

    database.run(made)
    [job] = make_jobs(1, batch_id=kept)
    database.run(lambda conn: conn.execute(update(Job).where(Job.id == job).values(state=state)))
    assert database.run(lambda conn: retention.expire_batches(conn, 60.0)) == 1
    with database.read() as conn:
        assert conn.execute(select(Batch.id)).scalars().all() == [kept]


def test_batches_go_with_their_last_job(database, project, make_jobs, store, settings):
    batch = new_id("batch")

    def work(conn):
        batches.create(conn, batch, project, "b", source={}, digest=None, priority=0)
        batches.advance(conn, batch, 0, 1, 1)

    database.run(work)
    ids = make_jobs(1, batch_id=batch)
    database.run(lambda conn: batches.expanded(conn, batch))
    end(database, ids, put(store, project, b"x"), age_days=2)
    assert sweep(settings, database, store).jobs == 0, "its batch is not finished"
    database.run(counters.close_batches)
    with database.write() as conn:
        conn.execute(update(Batch).values(finished_at=now() - 2 * 86400))
    swept = sweep(settings, database, store)
    assert (swept.jobs, swept.batches) == (1, 1)
    assert count(database, Event) == 0


def test_inputs_go_when_nobody_names_them(database, project, make_jobs, store, settings):
    def add(data):
        made = put(store, project, data)
        key = input_key(project, made.sha256, ".txt")
        store.put(key, data, media_type="text/plain")
        return database.run(
            lambda conn: registry.add_input(conn, project, name="i", object_key=key, sha256=made.sha256, size=len(data), media_type="text/plain")
        )

    unused, named = add(b"unused"), add(b"named")
    make_jobs(1, params={"text": f"about {named}"})
    with database.write() as conn:
        conn.execute(update(Artifact).values(created_at=now() - 2 * 86400))
    assert sweep(settings, database, store).inputs == 1
    with database.read() as conn:
        assert list(conn.execute(select(Artifact.id)).scalars()) == [named]
    assert unused != named


def test_a_marked_object_cannot_be_published(database, project, make_jobs, store):
    doomed = put(store, project, b"doomed")
    ids = make_jobs(1)
    claimed = database.run(lambda conn: lifecycle.claim(conn, ids, "w", 30))
    database.run(lambda conn: retention.doom(conn, [doomed.object_key]))
    with pytest.raises(TransientError, match="is being swept"), database.write() as conn:
        lifecycle.finish(conn, [Success(claimed[0].id, claimed[0].attempt, (doomed,))])
    with database.read() as conn:
        assert conn.execute(select(Job.state)).scalar() == "running", "nothing was committed"
    database.run(lambda conn: retention.spare(conn, [doomed.object_key]))
    assert database.run(lambda conn: lifecycle.finish(conn, [Success(claimed[0].id, claimed[0].attempt, (doomed,))])) == ids


def test_two_sweeps_at_once_leave_the_mark_of_what_was_deleted(database, project, make_jobs, store, settings):
    # Found by simulation: the slower one saw that the object was gone and took the faster one's mark away.
    end(database, make_jobs(1), put(store, project, b"kept"))
    orphan = put(store, project, b"orphan")
    others = []

    class Slow:
        """A store that is so slow that a whole other sweep comes by between this one's mark and its look."""

        def __getattr__(self, name):
            return getattr(store, name)

        def head(self, key):
            if not others:
                others.append(sweep(settings, database, store).objects)
            return store.head(key)

    first = sweep(settings, database, Slow()).objects
    assert first + others[0] == 1
    assert store.head(orphan.object_key) is None
    ids = make_jobs(1)
    [claimed] = database.run(lambda conn: lifecycle.claim(conn, ids, "w", 30))
    # An attempt that began before the mark's minute is over may have put it earlier.
    with pytest.raises(TransientError, match="is being swept"), database.write() as conn:
        lifecycle.finish(conn, [Success(claimed.id, claimed.attempt, (orphan,))])


def test_an_object_put_before_its_deletion_cannot_be_published_after_it(database, project, make_jobs, store, settings):
    # Found by simulation: the attempt puts what the sweep has looked at a moment ago, and commits when the sweep is done.
    end(database, make_jobs(1), put(store, project, b"kept"))
    orphan, ids = put(store, project, b"orphan"), make_jobs(1)

    class Late:
        """A store in which the attempt puts its result between the sweep's last look and the deletion."""

        claimed = None

        def __getattr__(self, name):
            return getattr(store, name)

        def delete(self, keys):
            [self.claimed] = database.run(lambda conn: lifecycle.claim(conn, ids, "w", 30))
            store.put(orphan.object_key, b"orphan", media_type="text/plain")
            return store.delete(keys)

    late = Late()
    assert sweep(settings, database, late).objects == 1
    with pytest.raises(TransientError, match="is being swept"), database.write() as conn:
        lifecycle.finish(conn, [Success(late.claimed.id, late.claimed.attempt, (orphan,))])
    stopped = Stop(late.claimed.id, late.claimed.attempt, {"type": "transient", "code": "object_swept", "message": "m"})
    database.run(lambda conn: lifecycle.stop(conn, stopped))
    with database.write() as conn:
        conn.execute(update(Job).where(Job.id == ids[0]).values(run_after=0.0))
        conn.execute(update(DoomedObject).values(at=now() - 200))  # two minutes later
    [again] = database.run(lambda conn: lifecycle.claim(conn, ids, "w", 30))
    store.put(orphan.object_key, b"orphan", media_type="text/plain")
    assert database.run(lambda conn: lifecycle.finish(conn, [Success(again.id, again.attempt, (orphan,))])) == ids


def test_a_wrong_clock_makes_nothing_old(database, project, make_jobs, store, settings, monkeypatch):
    # Found by simulation: the timer's machine is a day ahead.
    end(database, make_jobs(1), put(store, project, b"kept"))
    young = put(store, project, b"young", age=60)
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 86_400)
    assert sweep(settings, database, store).objects == 0
    assert store.head(young.object_key) is not None


def test_a_result_that_went_is_not_taken_over(database, project, make_jobs, store):
    ids = make_jobs(1)
    claimed = database.run(lambda conn: lifecycle.claim(conn, ids, "w", 30))
    gone = put(store, project, b"gone")
    with pytest.raises(TransientError, match="not kept"), database.write() as conn:
        lifecycle.finish(conn, [Success(claimed[0].id, claimed[0].attempt, (gone,), (), "k" * 64, "job_" + "0" * 32)])


def test_scratch_of_dead_processes_goes(database, store, settings):
    settings.scratch.mkdir(parents=True)
    (settings.scratch / f"text.echo-{os.getpid()}-alive").mkdir()
    (settings.scratch / "text.echo-4194304-dead").mkdir()
    (settings.scratch / "something-else").mkdir()
    assert sweep(settings, database, store).temporary == 1
    assert sorted(p.name for p in settings.scratch.iterdir()) == ["something-else", f"text.echo-{os.getpid()}-alive"]


# --- retry ---


@pytest.fixture
def producer(database, store, tmp_path):
    return Producer(load_settings(state_dir=tmp_path / "state"), database, store)


def fail(database, job_id):
    [claimed] = database.run(lambda conn: lifecycle.claim(conn, [job_id], "w", 30))
    error = {"type": "input", "code": "x", "message": "bad"}
    database.run(lambda conn: lifecycle.stop(conn, Stop(job_id, claimed.attempt, error)))


def test_retrying_a_parent_revives_its_children(database, project, make_jobs, producer, store):
    [parent] = make_jobs(1, custom_id="story")
    [child] = make_jobs(1, params={"text": {"job": parent}}, parents=(parent,))
    [grandchild] = make_jobs(1, params={"text": {"job": child}}, parents=(child,))
    fail(database, parent)
    made = producer.retry_jobs([parent])
    assert len(made) == 3
    with database.read() as conn:
        rows = {r["retry_of"]: r for r in (jobs.get(conn, project, i) for i in made)}
        assert rows[child]["params"]["text"]["job"] == rows[parent]["id"]
        assert rows[grandchild]["params"]["text"]["job"] == rows[child]["id"]
        assert jobs.parents(conn, rows[child]["id"]) == [rows[parent]["id"]]
        assert [rows[i]["state"] for i in (parent, child, grandchild)] == ["queued", "blocked", "blocked"]
        assert jobs.get(conn, project, parent)["state"] == "failed", "terminal states never change"
    assert producer.retry_jobs([parent]) == [], "once is enough"
    end(database, [rows[parent]["id"]], put(store, project, b"story"))
    with database.read() as conn:
        assert jobs.get(conn, project, rows[child]["id"])["state"] == "queued"


def test_only_ended_jobs_are_retried(make_jobs, producer):
    [job] = make_jobs()
    with pytest.raises(Conflict, match="is queued"):
        producer.retry_jobs([job])
    with pytest.raises(NotFound):
        producer.retry_jobs(["job_" + "0" * 32])


# --- upgrade ---


def test_upgrade_from_the_first_schema_keeps_the_rows(database, project, make_jobs):
    ids = make_jobs(3)
    migrate.downgrade(database, "0001")
    assert migrate.current(database) == "0001"
    migrate.upgrade(database)
    assert migrate.differences(database) == []
    with database.read() as conn:
        assert set(conn.execute(select(Job.id)).scalars()) == set(ids)

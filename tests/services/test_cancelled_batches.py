"""A batch that is cancelled while it expands: every line that was accepted ends as a row, and none of them starts."""

import json

import pytest
from sqlalchemy import select, update

from contentfactory.settings import load_settings
from contentfactory.states import BatchState, JobState
from db import batches, counters, lifecycle
from db.models import Batch, Job
from producer import expand
from producer import manifest as manifests
from producer.cli.watch import snapshot
from producer.enqueue import Producer
from producer.timer import Timer
from storage.memory import MemoryStore

LINES = 25


@pytest.fixture
def producer(database, tmp_path, monkeypatch):
    monkeypatch.setattr(expand, "EXPAND_ROWS", 10)
    made = Producer(load_settings(state_dir=tmp_path / "state"), database, MemoryStore())
    made.project_id()
    return made


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [{"custom_id": f"{n:02}", "kind": "text.echo", "params": {"text": str(n)}} for n in range(LINES)]
    # One waits for a line of an earlier chunk, one for a line of its own, one for a later one.
    lines[11]["depends_on"] = ["03"]
    lines[13]["depends_on"] = ["12"]
    lines[4]["depends_on"] = ["22"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifests.open_manifest(path)


def states(database, batch_id):
    with database.read() as conn:
        return dict(conn.execute(select(Job.custom_id, Job.state).where(Job.batch_id == batch_id)).all())


def cancel(database, batch_id):
    while database.run(lambda conn: lifecycle.cancel_batch(conn, batch_id)):
        pass
    database.run(counters.close_batches)


def check_all_cancelled(database, producer, batch_id, succeeded=0):
    assert set(states(database, batch_id)) == {f"{n:02}" for n in range(LINES)}
    view = snapshot(database, producer.project_id(), batch_id)
    assert (view["state"], view["total"]) == (BatchState.CANCELLED, LINES)
    assert {k: n for k, n in view["counts"].items() if n} == {
        "total": LINES, "cancelled": LINES - succeeded, **({"succeeded": succeeded} if succeeded else {}),
    }  # fmt: skip
    assert database.run(counters.close_batches) == []
    with database.read() as conn:
        assert conn.execute(select(Job.id).where(Job.batch_id == batch_id, Job.finished_at.is_(None))).all() == []


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_the_lines_that_are_no_rows_yet_become_cancelled_rows(database, producer, manifest, chunks):
    batch_id, _ = producer.create_batch(manifest)
    for _ in range(chunks):
        assert producer.expand(batch_id, seconds=-1.0) is False
    assert len(states(database, batch_id)) == 10 * chunks
    cancel(database, batch_id)
    with database.read() as conn:
        assert conn.execute(select(Batch.state).where(Batch.id == batch_id)).scalar() == BatchState.CANCELLING
    assert producer.expand(batch_id) is True
    check_all_cancelled(database, producer, batch_id)
    assert producer.expand(batch_id) is True  # once more changes nothing
    check_all_cancelled(database, producer, batch_id)


def test_a_cancel_between_the_look_and_the_write_of_a_chunk(database, producer, manifest, monkeypatch):
    batch_id, _ = producer.create_batch(manifest)
    write = producer.expander._write_chunk

    def cancelled_meanwhile(*args):
        if len(states(database, batch_id)) == 10:
            cancel(database, batch_id)
        return write(*args)

    monkeypatch.setattr(producer.expander, "_write_chunk", cancelled_meanwhile)
    assert producer.expand(batch_id) is True
    check_all_cancelled(database, producer, batch_id)


def test_running_jobs_are_awaited_and_what_did_not_succeed_can_be_retried(database, producer, manifest):
    batch_id, _ = producer.create_batch(manifest)
    assert producer.expand(batch_id, seconds=-1.0) is False
    with database.read() as conn:
        ids = list(conn.execute(select(Job.id).where(Job.state == JobState.QUEUED).order_by(Job.rank).limit(2)).scalars())
    database.run(lambda conn: conn.execute(update(Job).where(Job.id.in_(ids)).values(state=JobState.DISPATCHED)))
    done, held = database.run(lambda conn: lifecycle.claim(conn, ids, "w", 30.0))
    database.run(lambda conn: lifecycle.finish(conn, [lifecycle.Success(done.id, done.attempt, ())]))
    cancel(database, batch_id)
    assert producer.expand(batch_id) is True
    with database.read() as conn:
        assert conn.execute(select(Batch.state).where(Batch.id == batch_id)).scalar() == BatchState.CANCELLING
    database.run(lambda conn: lifecycle.finish(conn, [lifecycle.Success(held.id, held.attempt, ())]))
    database.run(counters.close_batches)
    check_all_cancelled(database, producer, batch_id, succeeded=1)
    again = producer.retry_failed(batch_id)
    assert again is not None
    retried = states(database, again)
    assert len(retried) == LINES - 1
    assert {n for n, state in retried.items() if state == JobState.BLOCKED} == {"04", "13", "11"}


def test_the_timer_goes_on_with_it_and_the_same_manifest_makes_another(database, producer, manifest):
    batch_id, _ = producer.create_batch(manifest)
    assert producer.expand(batch_id, seconds=-1.0) is False
    database.run(lambda conn: lifecycle.cancel_batch(conn, batch_id))
    with database.read() as conn:
        digest = batches.get(conn, producer.project_id(), batch_id)["source_digest"]
        assert batches.find_open(conn, producer.project_id(), digest) is None

    class Silent:
        """A broker that takes everything."""

        def publish(self, *args, **options):
            return None

    timer = Timer(producer.settings, database, Silent(), producer)
    for _ in range(5):
        timer.tick()
    check_all_cancelled(database, producer, batch_id)
    again, continued = producer.create_batch(manifest)
    assert (again != batch_id, continued) == (True, False)

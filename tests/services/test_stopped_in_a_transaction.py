"""A process that is stopped (SIGSTOP, a suspended machine) in a transaction: what it had locked comes free, and others do not wait for it."""

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import bindparam, select, text, update

import db.session
from contentfactory.errors import ServiceUnavailable
from contentfactory.settings import load_settings
from db import lifecycle, prepared
from db.ended import EVENT
from db.models import Batch, Event, Job
from db.session import Database
from db.sql import COPY_FROM, insert_rows
from producer import manifest as manifests
from producer import retry
from producer.enqueue import Producer
from producer.timer import Timer
from storage.memory import MemoryStore

PROGRESS = update(Job).where(Job.id == bindparam("p_id")).values(progress=bindparam("p_progress"))

pytestmark = pytest.mark.parametrize("database", ["postgresql"], indirect=True)

HOLDER = """
import sys, time
from sqlalchemy import text
from db import lifecycle
from db.session import Database
import db.session
import producer.enqueue
db.session.IDLE_TRANSACTION_S = 1.0
with Database(sys.argv[1]).write() as conn:
    lifecycle.dispatch(conn, "text", cap_s=10)
    conn.execute(text("UPDATE jobs SET message = 'held' WHERE id = :id"), {"id": sys.argv[2]})
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def short(monkeypatch, database):
    monkeypatch.setattr(db.session, "IDLE_TRANSACTION_S", 1.0)
    opened = Database(database.engine.url.render_as_string(hide_password=False))
    yield opened
    opened.close()


def test_what_a_stopped_process_had_locked_comes_free(database, make_jobs):
    [job] = make_jobs(1)
    url = database.engine.url.render_as_string(hide_password=False)
    with subprocess.Popen([sys.executable, "-c", HOLDER, url, job], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline().strip() == "held"
            os.kill(holder.pid, signal.SIGSTOP)
            begun = time.monotonic()
            database.run(lambda conn: conn.execute(update(Job).where(Job.id == job).values(message="free")))
            assert time.monotonic() - begun < 10
            with database.read() as conn:
                state, message = conn.execute(text("SELECT state, message FROM jobs WHERE id = :id"), {"id": job}).one()
            assert (state, message) == ("queued", "free"), "its transaction never was"
            assert [hint.ids for hint in database.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=10))] == [(job,)]
        finally:
            holder.kill()


def _idle_in(database):
    with database.write() as conn:
        conn.execute(text("SELECT 1"))
        time.sleep(1.6)
        conn.execute(text("SELECT 1"))


def _by_sqlalchemy(conn, job):
    conn.execute(update(Job).where(Job.id == job).values(progress=0.5))


def _prepared(conn, job):
    prepared.rows(conn, PROGRESS, {"p_id": job, "p_progress": 0.5})


def _many(conn, job):
    prepared.many(conn, PROGRESS, [{"p_id": job, "p_progress": 0.5}, {"p_id": "job_x", "p_progress": 0.5}])


def _copied(conn, job):
    insert_rows(conn, Event.__table__, EVENT, [(1.0, "copied", None, None, job, "{}")] * COPY_FROM)
    _by_sqlalchemy(conn, job)


@pytest.mark.parametrize("goes_on", [_by_sqlalchemy, _prepared, _many, _copied])
def test_who_wakes_does_it_again(short, make_jobs, goes_on):
    """Whatever the way of the statement that finds the transaction gone; other connections are left whole."""
    [job] = make_jobs(1)
    tries = []

    def work(conn):
        tries.append(1)
        conn.execute(update(Job).where(Job.id == job).values(message=f"try {len(tries)}"))
        if len(tries) == 1:
            time.sleep(1.6)
        goes_on(conn, job)

    with short.read() as beside, short.read() as another:
        short.run(work)
        for conn in (beside, another):
            assert conn.execute(select(Job.message, Job.progress).where(Job.id == job)).one() == ("try 2", 0.5)
    del beside, another, conn
    gc.collect()  # a connection that went astray says so
    with pytest.raises(ServiceUnavailable):
        _idle_in(short)


@pytest.mark.parametrize("what", ["a batch", "jobs"])
def test_a_retry_of_many_jobs_may_compute_for_long(short, make_jobs, tmp_path, monkeypatch, what):
    """Between its statements it goes through all the jobs, and there may be hundreds of thousands."""
    made = Producer(load_settings(state_dir=tmp_path / "state"), short, MemoryStore())
    path = tmp_path / "rows.jsonl"
    path.write_text('{"custom_id":"a-1","kind":"text.echo","params":{"text":"x"}}\n')
    batch, _ = made.create_batch(manifests.open_manifest(path))
    made.expand(batch)
    with short.write() as conn:
        conn.execute(update(Job).values(state="failed"))
        conn.execute(update(Batch).values(finished_at=1.0, state="finished"))
        [job] = conn.execute(text("SELECT id FROM jobs")).scalars()
    slow, calls = retry.rename_refs, []

    def takes_long(*args):
        calls.append(1)
        time.sleep(1.6)
        return slow(*args)

    monkeypatch.setattr(retry, "rename_refs", takes_long)
    assert made.retry_failed(batch) if what == "a batch" else made.retry_jobs([job])
    assert calls == [1]


def test_who_only_reads_may_take_its_time(short, make_jobs):
    make_jobs(2)
    with short.read() as conn:
        assert conn.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 2
        time.sleep(1.6)
        assert conn.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 2


def test_the_timer_does_not_wait_for_a_dispatcher(database, make_jobs, tmp_path):
    """Leases are reaped while somebody else holds the turn to dispatch."""
    make_jobs(1)
    settings = load_settings(state_dir=tmp_path / "state")

    class Silent:
        def send(self, hints):
            return []

        def oldest(self, queue):
            return 0.0

    timer = Timer(settings, database, Silent(), Producer(settings, database, MemoryStore(), Silent()))
    with database.write() as holder:
        lifecycle.dispatch(holder, "text", cap_s=10)
        begun = time.monotonic()
        with ThreadPoolExecutor(1) as pool:  # one thread has one transaction at a time
            pool.submit(timer.tick).result(3)
            pool.submit(timer.rescue).result(3)
        assert time.monotonic() - begun < 3

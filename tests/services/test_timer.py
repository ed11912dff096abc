"""The timer's rounds: what fails in one part of them holds up no other."""

import threading
import time

from sqlalchemy import update

from contentfactory.errors import ServiceUnavailable
from contentfactory.ids import new_id
from contentfactory.settings import load_settings
from db import batches, lifecycle
from db.models import Job
from producer.timer import Timer


def test_leases_are_reaped_and_jobs_dispatched_while_a_batch_cannot_be_read(database, project, make_jobs, tmp_path):
    """A storage that is away stops neither the reaper nor the dispatcher."""
    settings = load_settings(state_dir=tmp_path / "state", dispatch_period_s=0.05, reaper_period_s=0.05)
    [lost] = make_jobs(1)
    database.run(lambda conn: lifecycle.reap(conn, lease_s=60, period_s=5))
    database.run(lambda conn: lifecycle.claim(conn, [lost], "gone", -1.0))
    database.run(lambda conn: batches.create(conn, new_id("batch"), project, "b", source={"object_key": "gone"}, digest=None, priority=0))
    [waits] = make_jobs(1)
    sent = []

    class Broker:
        def send(self, hints):
            sent.extend(i for hint in hints for i in hint.ids)
            return []

        def oldest(self, queue):
            return 0.0

    class Storage:
        def expand(self, batch_id, seconds):
            raise ServiceUnavailable("the storage answered 503", code="storage_unavailable")

    timer = Timer(settings, database, Broker(), Storage())
    stop = threading.Event()
    runs = threading.Thread(target=timer.run, args=(stop,))
    runs.start()
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end and not {lost, waits} <= set(sent):
            time.sleep(0.05)
            database.run(lambda conn: conn.execute(update(Job).where(Job.id == lost).values(run_after=0.0)))
    finally:
        stop.set()
        runs.join()
    assert {lost, waits} <= set(sent)

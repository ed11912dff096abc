"""I14: of K projects of equal weight each gets its share; one's backlog delays another's single job by what runs, not by what waits."""

import base64
import json
from collections import Counter

import pytest
import redis
from sqlalchemy import select

from contentfactory.jobs.spec import get_kind
from contentfactory.settings import load_settings
from db import lifecycle, projects
from db.models import Job
from producer import transport
from producer.dispatch import Dispatcher
from producer.publish import BANDS, Publisher

FULL = get_kind("text.echo").max_group
"""Jobs of a full micro-batch."""


class Line:
    """Dispatcher and broker, and a worker that takes one micro-batch after the other as Celery's consumer does: band by band."""

    def __init__(self, database, settings):
        self.database = database
        self.publisher = Publisher(settings)
        self.dispatcher = Dispatcher(database, self.publisher, settings)
        self.redis = redis.Redis.from_url(settings.redis())
        self.redis.delete(*self.keys)

    @property
    def keys(self):
        return [Publisher._key("text", band) for band in BANDS]

    def next(self):
        """Owners of the next micro-batch's jobs, done at once."""
        self.dispatcher.dispatch()
        found = self.redis.brpop(self.keys, timeout=1)
        if found is None:
            return Counter()
        message = transport.read_hint(found[1], "text")
        ids = json.loads(base64.b64decode(message["body"]))[0][0]
        claimed = self.database.run(lambda conn: lifecycle.claim(conn, ids, "w", 60.0))
        self.database.run(lambda conn: lifecycle.finish(conn, [lifecycle.Success(c.id, c.attempt) for c in claimed]))
        return Counter(c.project_id for c in claimed)

    def close(self):
        self.publisher.close()
        self.redis.close()


@pytest.fixture
def line(database, broker_url, tmp_path):
    made = Line(database, load_settings(state_dir=tmp_path, broker_url=broker_url))
    yield made
    made.close()


def test_a_single_job_waits_for_what_runs_and_not_for_anothers_backlog(database, line, project, make_jobs):
    other = database.run(lambda conn: projects.ensure(conn, "other"))
    for n in range(3):  # enough of them that much may wait on the broker
        database.run(lambda conn, n=n: lifecycle.report_worker(conn, f"w{n}", ["text"], "cpu", 0, []))
    make_jobs(8 * FULL, seconds=0.005)
    assert line.next() == {project: FULL}
    with database.read() as conn:
        assert len(conn.execute(select(Job.id).where(Job.state == "dispatched")).all()) > 2 * FULL  # seconds of work wait on the broker
    for _ in range(3):  # time and again, not just for the first
        make_jobs(1, seconds=0.01, share_key="y", project_id=other)
        assert line.next() == {other: 1}
        assert line.next() == {project: FULL}


def test_k_projects_get_their_shares_whatever_their_backlogs(database, line, project, make_jobs):
    names = [project, *(database.run(lambda conn, n=n: projects.ensure(conn, f"p{n}")) for n in range(3))]
    for index, (name, n) in enumerate(zip(names, (8, 4, 4, 4), strict=True)):
        make_jobs(n * FULL, seconds=0.01, share_key=f"k{index}", project_id=name)
    done = Counter()
    for _ in range(12):
        done += line.next()
    total = sum(done.values())
    assert all(done[name] >= 0.8 * total / len(names) for name in names), done

"""Requests whose COMMIT took effect while its answer was lost: the repeat gives the same thing, once."""

import contextlib
import json

import pytest
from sqlalchemy import func, select

from contentfactory.errors import ServiceUnavailable
from contentfactory.settings import load_settings
from contentfactory.states import JobState
from db import counters, lifecycle
from db.models import Batch, Job
from producer import manifest as manifests
from producer.enqueue import Producer
from storage.memory import MemoryStore


@pytest.fixture
def producer(database, tmp_path):
    made = Producer(load_settings(state_dir=tmp_path / "state"), database, MemoryStore())
    made.project_id()
    return made


@pytest.fixture
def lose(database, monkeypatch):
    """Lose the answer to the next commit."""
    write = database.write

    def arm():
        left = [1]

        @contextlib.contextmanager
        def lost(**how):
            with write(**how) as conn:
                yield conn
            if left:
                left.pop()
                raise ServiceUnavailable("the connection to the database was lost")

        monkeypatch.setattr(database, "write", lost)
        return left

    return arm


def count(database, table):
    with database.read() as conn:
        return conn.execute(select(func.count()).select_from(table)).scalar()


@pytest.mark.parametrize("key", [None, "a key"])
def test_a_job_is_accepted_once_and_answered(database, producer, lose, key):
    left = lose()
    made = producer.submit("text.echo", {"text": "x"}, idempotency_key=key)
    assert left == []
    with database.read() as conn:
        assert list(conn.execute(select(Job.id)).scalars()) == [made]


def test_a_batch_is_accepted_once_and_answered(database, producer, lose, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"custom_id": "a", "kind": "text.echo", "params": {"text": "x"}}) + "\n")
    left = lose()
    batch_id, _ = producer.create_batch(manifests.open_manifest(path))
    assert left == []
    lose()
    while not producer.expand(batch_id):
        pass
    assert (count(database, Batch), count(database, Job)) == (1, 1)


def test_a_batch_is_retried_once_and_answered(database, producer, lose, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"custom_id": "a", "kind": "text.echo", "params": {"text": "x"}}) + "\n")
    batch_id, _ = producer.create_batch(manifests.open_manifest(path))
    producer.expand(batch_id)
    with database.read() as conn:
        ids = list(conn.execute(select(Job.id)).scalars())
    database.run(lambda conn: lifecycle.cancel_jobs(conn, ids))
    database.run(counters.close_batches)
    left = lose()
    again = producer.retry_failed(batch_id)
    assert left == []
    assert again is not None
    assert count(database, Batch) == 2
    with database.read() as conn:
        assert sorted(conn.execute(select(Job.state)).scalars()) == [JobState.CANCELLED, JobState.QUEUED]

"""Ids of a batch's jobs: a function of batch and name, near each other where the names are, and what they were while a release changes."""

import json
from itertools import pairwise

import pytest
from sqlalchemy import select, update

from contentfactory.ids import is_id, new_id
from contentfactory.settings import load_settings
from db.models import Batch, Dependency, Job
from producer import manifest as manifests
from producer.cli.common import Factory
from producer.enqueue import Producer
from producer.job_ids import job_id_for
from producer.spool import NUMBERED, SPOOL_FORMAT
from storage.memory import MemoryStore


@pytest.fixture
def producer(database, tmp_path):
    return Producer(load_settings(state_dir=tmp_path / "state"), database, MemoryStore())


def hand_in(producer, tmp_path, names, parents=None):
    path = tmp_path / "rows.jsonl"
    lines = [{"custom_id": n, "kind": "text.echo", "params": {"text": n}, "depends_on": (parents or {}).get(n, [])} for n in names]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return producer.create_batch(manifests.open_manifest(path), resume=False)[0]


def ids_of(database, batch):
    with database.read() as conn:
        return dict(conn.execute(select(Job.custom_id, Job.id).where(Job.batch_id == batch).order_by(Job.line)).all())


@pytest.mark.parametrize("name", ["row-{}", "{}", "{:06}/text", "α{}β", "2026-11-28/row {:05}", "v2-{:04}-de"])
def test_numbered_names_give_ids_in_the_order_of_the_lines(name):
    batch = new_id("batch")
    ids = [job_id_for(batch, name.format(n)) for n in range(1, 3000)]
    assert all(is_id(i, "job") for i in ids) and len(set(ids)) == len(ids)
    # A name's other digits may turn the counter over once.
    assert sum(a > b for a, b in pairwise(ids)) <= 4


@pytest.mark.parametrize("name", ["", "no number", "٣", "½", "9" * 200, "0", "-1", "1e9", "\n7"])
def test_any_name_gives_an_id(name):
    batch = new_id("batch")
    made = job_id_for(batch, name)
    assert is_id(made, "job") and made == job_id_for(batch, name)
    assert made != job_id_for(new_id("batch"), name)


def test_names_of_one_number_have_ids_of_their_own():
    batch = new_id("batch")
    assert len({job_id_for(batch, f"{'x' * n}7") for n in range(2000)}) == 2000


def test_ids_of_a_batch_sort_after_those_of_earlier_batches():
    first, second = "batch_" + "0" * 12 + "f" * 20, "batch_" + "0" * 11 + "1" + "0" * 20
    assert job_id_for(first, "999999") < job_id_for(second, "0")


def test_a_batch_that_an_earlier_release_accepted_goes_on_with_its_ids(database, producer, tmp_path):
    """Half of it may be there already, and its edges point to ids of that form."""
    batch = hand_in(producer, tmp_path, ["child-1", "parent-2"], {"child-1": ["parent-2"]})
    with database.write() as conn:
        source = conn.execute(select(Batch.source).where(Batch.id == batch)).scalar_one()
        assert source["format"] == SPOOL_FORMAT >= NUMBERED
        conn.execute(update(Batch).where(Batch.id == batch).values(source={**source, "format": 2}))
    producer.expand(batch)
    assert ids_of(database, batch) == {n: job_id_for(batch, n, 2) for n in ("child-1", "parent-2")}
    with database.read() as conn:
        edges = conn.execute(select(Dependency.job_id, Dependency.parent_id)).all()
    assert edges == [(job_id_for(batch, "child-1", 2), job_id_for(batch, "parent-2", 2))]
    assert job_id_for(batch, "child-1", 2) != job_id_for(batch, "child-1")


@pytest.mark.parametrize("form", [2, SPOOL_FORMAT])
def test_a_job_is_found_by_its_batch_and_name(database, producer, tmp_path, form):
    batch = hand_in(producer, tmp_path, ["row-1", "row-2"])
    with database.write() as conn:
        source = conn.execute(select(Batch.source).where(Batch.id == batch)).scalar_one()
        conn.execute(update(Batch).where(Batch.id == batch).values(source={**source, "format": form}))
    producer.expand(batch)
    opened = Factory(load_settings(state_dir=tmp_path / "state"))
    opened.__dict__.update(database=database, producer=producer)
    assert opened.find_job(f"{batch}:row-2")["id"] == ids_of(database, batch)["row-2"]
    assert opened.find_job("last:row-1")["custom_id"] == "row-1"


def test_a_retried_batch_has_numbered_ids_and_its_jobs_are_found(database, producer, tmp_path):
    batch = hand_in(producer, tmp_path, ["row-1", "row-2"])
    producer.expand(batch)
    with database.write() as conn:
        conn.execute(update(Job).where(Job.batch_id == batch).values(state="failed"))
        conn.execute(update(Batch).where(Batch.id == batch).values(finished_at=1.0, state="finished"))
    again = producer.retry_failed(batch)
    assert ids_of(database, again) == {n: job_id_for(again, n) for n in ("row-1", "row-2")}
    opened = Factory(load_settings(state_dir=tmp_path / "state"))
    opened.__dict__.update(database=database, producer=producer)
    assert opened.find_job(f"{again}:row-1")["batch_id"] == again

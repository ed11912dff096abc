"""Dispatch prefers the model that is loaded, without starving the others."""

import pytest
from sqlalchemy import select, update

from db import lifecycle
from db.models import Job, Overtaken
from db.warm import AHEAD


def dispatch(database, **options):
    return database.run(lambda conn: lifecycle.dispatch(conn, "text", **{"cap_s": 1e6, **options}))


@pytest.fixture
def warm(database):
    def report(*models, queues=("text",), age_s=0.0):
        def work(conn):
            keys = [f"{m}|worker.runners.text.generate.load|cpu" for m in models]
            lifecycle.report_worker(conn, "w1", list(queues), "cpu", 0, keys)

        database.run(work)

    return report


@pytest.fixture
def make(make_jobs):
    def made(models, **fields):
        return [make_jobs(1, model=f"{m}@1", share_key=f"{m}-{n}", rank=n + 1, **fields)[0] for n, m in enumerate(models)]

    return made


def order(hints):
    return [i for hint in hints for i in hint.ids]


def test_the_loaded_model_goes_first(database, make, warm):
    ids = make("bab")
    warm("a@1")
    assert order(dispatch(database)) == [ids[1], ids[0], ids[2]]


def test_a_worker_of_another_queue_does_not_count(database, make, warm):
    ids = make("bab")
    warm("a@1", queues=("image",))
    assert order(dispatch(database)) == ids


def test_without_workers_the_order_stays(database, make):
    ids = make("bab")
    assert order(dispatch(database)) == ids


def test_priority_is_stronger_than_warmth(database, make, make_jobs, warm):
    ids = make("ab")
    [first] = make_jobs(1, model="b@1", priority=5)
    warm("a@1")
    assert order(dispatch(database)) == [first, *ids]


def test_at_most_so_many_pass_over_all_calls(database, make, make_jobs, warm):
    """Warm jobs keep coming, one dispatched at a time: the cold one is served after `AHEAD` of them."""
    [cold] = make("b")
    warm("a@1")
    for n in range(AHEAD + 5):
        make_jobs(2, model="a@1", share_key=f"k{n}", rank=100 + n)
        sent = order(dispatch(database, max_jobs=1))
        database.run(lambda conn: conn.execute(update(Job).where(Job.state == "dispatched").values(state="succeeded")))
        if cold in sent:
            break
    with database.read() as conn:
        before = conn.execute(select(Job.id).where(Job.state == "succeeded", Job.id != cold)).all()
        assert conn.execute(select(Overtaken.passed)).scalar() == len(before)
    assert cold in sent
    # Two travel together; the last group is cut to what is left.
    assert len(before) == AHEAD


def test_a_group_that_passes_is_cut_to_what_is_left(database, make, make_jobs, warm):
    [cold] = make("b")
    make_jobs(200, model="a@1", share_key="same", rank=10)
    warm("a@1")
    sent = order(dispatch(database, max_jobs=150))
    assert sent.index(cold) == AHEAD

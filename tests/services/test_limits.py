"""Out of memory is a signal: the size that fits is found, remembered, used by dispatch, and survives the worker."""

import threading
from collections import Counter

import pytest
from pydantic import Field
from silent import Silent
from sqlalchemy import select, update

from contentfactory.jobs import spec as specs
from contentfactory.jobs.spec import Params, kind
from contentfactory.settings import load_settings
from db import lifecycle, limits
from db.limits import STREAK, Limit, Measured
from db.models import GroupLimit, Job
from storage.memory import MemoryStore
from worker import meter, runners
from worker.context import Output
from worker.execution import Executor

memory = {"fits": 5}
sizes: list[int] = []
failures: list[int] = []


@pytest.fixture(scope="module")
def big_kind():
    """A kind whose forward pass only fits up to a number of jobs."""

    @kind("trial.big", queue="text", outputs=("text/plain",), max_group=32, group_by=("side",))
    class Big(Params):
        """Take memory."""

        side: int = Field(default=1, description="size of each")

    @runners.runs(Big)
    def big(params, context):
        if len(params) * params[0].side > memory["fits"]:
            failures.append(len(params))
            raise MemoryError(f"{len(params)} do not fit")
        sizes.append(len(params))
        for job, p in enumerate(params):
            path = context.scratch / f"{job}.txt"
            path.write_text(f"{p.side} {context.seeds[job]}")
            yield Output(job, "text.txt", "text/plain", path)

    yield Big
    specs._REGISTRY.pop("trial.big")
    runners._RUNNERS.pop("trial.big")


@pytest.fixture
def factory_of_workers(database, tmp_path, big_kind):
    made = []
    sizes.clear()
    failures.clear()
    memory["fits"] = 5

    def make():
        settings = load_settings(state_dir=tmp_path / "state", device="cpu")
        made.append(Executor(settings, database, MemoryStore(), Silent(), keeper=False))
        made[-1].dispatcher.dispatch = lambda *args, **kwargs: 0
        return made[-1]

    yield make
    for one in made:
        one.finishers.shutdown()
        one.uploads.shutdown()


def dispatch(database, cap_s=1e6):
    return database.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=cap_s))


def run_all(database, executors, cap_s=1e6):
    for _ in range(200):
        hints = dispatch(database, cap_s)
        if not hints:
            break
        for n, hint in enumerate(hints):
            executors[n % len(executors)].run(hint.kind, hint.ids)
        for one in executors:
            one.finishers.submit(lambda: None).result()
        database.run(lambda conn: conn.execute(update(Job).values(run_after=0)))


def states(database):
    with database.read() as conn:
        return Counter(conn.execute(select(Job.state)).scalars())


def make(make_jobs, count, **params):
    make_jobs(count, kind="trial.big", params=params, reuse=False)


def test_a_size_that_fits_is_found_and_remembered(database, make_jobs, factory_of_workers):
    worker = factory_of_workers()
    make(make_jobs, 100)
    run_all(database, [worker])
    assert states(database) == {"succeeded": 100}
    assert failures == [32, 16, 8]  # log2, although three micro-batches of 32 were under way
    with database.read() as conn:
        row = conn.execute(
            select(GroupLimit.most, GroupLimit.kind, GroupLimit.refused, GroupLimit.how)
        ).one()
    assert (row.kind, row.refused, row.how, row.most) == ("trial.big", 8, "memory", 4)

    # The next batch, in another process: no failure at all, and micro-batches of the learned size.
    failures.clear()
    sizes.clear()
    make(make_jobs, 40)
    run_all(database, [factory_of_workers()])
    assert states(database) == {"succeeded": 140}
    assert failures == []
    assert sizes == [4] * 10


def test_it_creeps_up_and_stays_below_what_failed(database, make_jobs, factory_of_workers, monkeypatch):
    monkeypatch.setattr(meter, "FLUSH_S", 0.0)
    monkeypatch.setattr(meter, "FRESH_S", 0.0)
    make(make_jobs, 320)
    run_all(database, [factory_of_workers()], cap_s=40)
    assert states(database) == {"succeeded": 320}
    assert failures == [32, 16, 8, 6]
    assert max(sizes) == 5


def test_each_shape_has_its_own_limit(database, make_jobs, factory_of_workers):
    worker = factory_of_workers()
    memory["fits"] = 16
    make(make_jobs, 32, side=1)
    make(make_jobs, 32, side=4)
    run_all(database, [worker])
    assert states(database) == {"succeeded": 64}
    with database.read() as conn:
        assert sorted(conn.execute(select(GroupLimit.most)).scalars()) == [4, 16]


def test_several_workers_share_what_one_learned(database, make_jobs, factory_of_workers):
    workers = [factory_of_workers() for _ in range(3)]
    make(make_jobs, 400)
    threads = []
    hints = dispatch(database)
    for n, one in enumerate(workers):
        mine = hints[n :: len(workers)]
        threads.append(threading.Thread(target=lambda one=one, mine=mine: [one.run(h.kind, h.ids) for h in mine]))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in workers:
        one.finishers.submit(lambda: None).result()
    run_all(database, workers)
    assert states(database) == {"succeeded": 400}
    assert len(failures) <= 3 * len(workers)


def test_a_job_that_does_not_fit_alone_fails(database, make_jobs, factory_of_workers):
    make(make_jobs, 2, side=100)
    run_all(database, [factory_of_workers()])
    assert states(database) == {"failed": 2}
    with database.read() as conn:
        assert conn.execute(select(GroupLimit.most)).scalar() == 1


def test_other_errors_teach_nothing(database, make_jobs, factory_of_workers, monkeypatch):
    def broken(params, context):
        raise ValueError("a bug")
        yield

    monkeypatch.setitem(runners._RUNNERS, "trial.big", broken)
    make(make_jobs, 4)
    run_all(database, [factory_of_workers()])
    with database.read() as conn:
        assert conn.execute(select(GroupLimit.most)).all() == []


def test_dispatch_heeds_only_devices_that_are_alive(database, make_jobs, big_kind):
    make(make_jobs, 64)
    with database.read() as conn:
        key = conn.execute(select(Job.share_key)).scalar()

    def learn(conn):
        for device, size in (("small card", 8), ("large card", 32)):
            limits.learn(conn, [Measured(key, device, "trial.big", None, size, 32, out_of_memory=1)])

    def bound(*devices):
        def work(conn):
            for n, device in enumerate(devices):
                lifecycle.report_worker(conn, f"w{n}", ["text"], device, 0, [])
            return limits.caps(conn, "text", [key], lifecycle.database_time(conn))

        return database.run(work)

    database.run(learn)
    assert bound() == {key: 4}
    assert bound("large card") == {key: 16}
    assert bound("large card", "small card") == {key: 4}
    [first, *_] = dispatch(database)
    assert len(first.ids) == 4


def test_speed_is_a_bound_too_while_it_is_fresh(database):
    def learn(conn):
        for size, seconds in ((4, 10.0), (8, 10.2), (16, 40.0)):
            limits.learn(conn, [Measured("k", "card", "trial.big", None, size, 32, 10, 10, size * 10.0 if size < 8 else 41.0, seconds)])

    database.run(learn)
    with database.read() as conn:
        at = lifecycle.database_time(conn)
        assert limits.caps(conn, "text", ["k"], at) == {"k": 4}
        assert limits.caps(conn, "text", ["k"], at + limits.BEST_KEPT_S + 10) == {}


def test_success_without_a_limit_writes_no_limit(database):
    database.run(lambda conn: limits.learn(conn, [Measured("k", "card", "trial.big", None, 8, 32, full=5)]))
    with database.read() as conn:
        assert limits.caps(conn, "text", ["k"], 0.0) == {}
        assert limits.fitting(conn, "k", "card") == 0


def test_growth_lifts_the_limit_at_the_kinds_size(database):
    database.run(lambda conn: limits.learn(conn, [Measured("k", "card", "trial.big", None, 32, 32, out_of_memory=1)]))
    for size in (16, 20, 25, 31):
        with database.read() as conn:
            assert limits.fitting(conn, "k", "card") == size
        database.run(lambda conn, size=size: limits.learn(conn, [Measured("k", "card", "trial.big", None, size, 32, full=STREAK)]))
    with database.read() as conn:
        assert limits.fitting(conn, "k", "card") == 31  # 32 has failed: only after very many
    assert Limit().most == 0

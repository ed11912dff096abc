"""A worker takes the next micro-batch of the same kind by itself while nothing waits on the broker."""

import functools
import operator
import threading
from collections import Counter

import pytest
from sqlalchemy import select, update

from contentfactory.errors import ServiceUnavailable
from contentfactory.settings import load_settings
from contentfactory.states import Priority
from db import lifecycle, projects, waiting
from db.models import Job, Queue, Share
from storage.memory import MemoryStore
from worker.execution import Executor

FULL = 512


class Broker:
    """A broker on which something may wait; counts how often it is asked, and keeps what it is sent."""

    def __init__(self):
        self.waits, self.asked, self.sent = False, 0, []

    def send(self, hints):
        self.sent += hints
        return []

    def anything(self, queues):
        self.asked += 1
        if isinstance(self.waits, Exception):
            raise self.waits
        return self.waits

    def ended(self, job_ids):
        pass

    def close(self):
        pass


@pytest.fixture
def broker():
    return Broker()


@pytest.fixture
def executor(database, tmp_path, broker):
    made = Executor(load_settings(state_dir=tmp_path / "state", device="cpu"), database, MemoryStore(), broker, keeper=False)
    made.stay_s = made.quick_s = 60.0  # whatever the machine is doing meanwhile
    yield made
    made.close()


def states(database):
    with database.read() as conn:
        return Counter(conn.execute(select(Job.state)).scalars())


def first(database, **options):
    [hint, *_] = database.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=1e-9, **options))
    return hint


def test_what_waits_is_taken_one_micro_batch_after_the_other(database, make_jobs, executor, broker):
    ids = make_jobs(3 * FULL + 7, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database, max_jobs=1)
    executor.run("text.echo", hint.ids)
    executor.finishers.submit(lambda: None).result()
    with database.read() as conn:
        rows = conn.execute(select(Job.id, Job.state, Job.attempt, Job.dispatched_at, Job.started_at).order_by(Job.rank, Job.id)).all()
    assert [row.id for row in rows] == ids
    assert {(row.state, row.attempt) for row in rows} == {("succeeded", 1)}
    assert all(row.dispatched_at <= row.started_at for row in rows)
    assert broker.sent == []


def test_a_hint_that_waits_goes_first(database, make_jobs, executor, broker):
    make_jobs(2 * FULL, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database, max_jobs=1)
    broker.waits = True
    executor.run("text.echo", hint.ids)
    executor.finishers.submit(lambda: None).result()
    assert states(database)["succeeded"] == FULL and broker.asked == 1
    assert broker.sent == []  # once the hints are used up, a quick worker takes for itself; more of them would keep it from that


def test_the_timer_leaves_a_queue_to_workers_that_take_for_themselves(database, make_jobs):
    make_jobs(4 * FULL, kind="text.echo", params={"text": "a"}, seconds=1e-6)

    def spared():
        return not database.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=1e-9, max_jobs=1, spare=True))

    for worker in ("a", "b"):
        database.run(lambda conn, worker=worker: lifecycle.report_worker(conn, worker, ["text"], "cpu", 0, []))
    take(database, worker="a")
    assert not spared()  # the other has nothing to do
    with database.write() as conn:
        conn.execute(update(Job).where(Job.state == "dispatched").values(state="queued", dispatched_at=None))
    take(database, worker="b")
    assert spared()
    with database.write() as conn:
        conn.execute(update(Job).where(Job.lease_owner == "a").values(started_at=Job.started_at - waiting.TAKING_S))
    assert not spared()  # this one's micro-batch takes its time, or it has died


def test_nothing_is_looked_for_after_a_job_that_came_alone(database, make_jobs, executor, broker):
    ids = make_jobs(1, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database)
    assert list(hint.ids) == ids
    executor.run("text.echo", hint.ids)
    assert broker.asked == 0


def test_a_broker_that_is_away_is_waited_for(database, make_jobs, executor, broker):
    make_jobs(2 * FULL, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database, max_jobs=1)
    broker.waits = ServiceUnavailable("away", code="broker_unavailable")
    executor.run("text.echo", hint.ids)
    executor.finishers.submit(lambda: None).result()
    assert states(database)["succeeded"] == FULL
    assert not executor._stays and not executor._unsure


def test_after_a_long_micro_batch_the_broker_decides(database, make_jobs, executor, broker):
    executor.stay_s = 0.0
    make_jobs(2 * FULL, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database, max_jobs=1)
    executor.run("text.echo", hint.ids)
    assert broker.asked == 0
    executor.finishers.submit(lambda: None).result()
    assert states(database)["running"] == 0 and broker.sent


def test_after_a_slow_micro_batch_the_broker_decides_too(database, make_jobs, executor, broker):
    executor.quick_s = 0.0
    make_jobs(2 * FULL, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database, max_jobs=1)
    executor.run("text.echo", hint.ids)
    executor.finishers.submit(lambda: None).result()
    assert broker.asked == 0 and states(database)["running"] == 0 and broker.sent


def test_a_worker_that_drains_takes_nothing_more(database, make_jobs, executor, broker, monkeypatch):
    make_jobs(2 * FULL, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database, max_jobs=1)
    monkeypatch.setattr(executor, "_should_release", lambda: True)
    executor.run("text.echo", hint.ids)
    executor.finishers.submit(lambda: None).result()
    assert broker.asked == 0 and states(database)["succeeded"] == FULL


def test_another_kind_is_left_to_its_hint(database, make_jobs, executor, broker):
    make_jobs(2, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    make_jobs(1, kind="text.embed", params={"input": ["b"]}, share_key="e", seconds=1e-6)
    hint = first(database, max_jobs=1)
    executor.run(hint.kind, hint.ids)
    executor.finishers.submit(lambda: None).result()
    assert states(database)["succeeded"] == 2
    assert [h.kind for h in broker.sent] == ["text.embed"]  # whoever stayed sees to it that it goes on


def take(database, kind="text.echo", model=None, worker="w", **options):
    return database.run(lambda conn: lifecycle.take(conn, "text", kind, model, worker, 60.0, **options))


def test_nothing_is_taken_from_a_paused_queue_or_for_another_model(database, make_jobs):
    make_jobs(1, kind="text.echo", model="m@1")
    assert take(database) == []
    database.run(lambda conn: conn.execute(Queue.__table__.insert().values(name="text", paused=True)))
    assert take(database, model="m@1") == []
    database.run(lambda conn: conn.execute(Queue.__table__.update().values(paused=False)))
    named = []
    assert [c.id for c in take(database, model="m@1", named=named)] == named != []
    assert take(database, model="m@1") == [] and states(database) == {"running": 1}


def test_what_is_taken_is_charged_to_its_project(database, project, make_jobs):
    other = database.run(lambda conn: projects.ensure(conn, "other"))
    make_jobs(4 * FULL, kind="text.echo", seconds=0.01)
    make_jobs(4 * FULL, kind="text.echo", seconds=0.01, share_key="y", project_id=other)
    owners = [take(database)[0].project_id for _ in range(6)]
    assert Counter(owners) == {project: 3, other: 3}
    with database.read() as conn:
        assert conn.execute(select(Share.virtual_seconds)).scalars().all() == pytest.approx([3 * FULL * 0.01] * 2)


def test_the_urgent_are_taken_first(database, make_jobs):
    make_jobs(1, kind="text.echo")
    [urgent] = make_jobs(1, kind="text.echo", priority=Priority.INTERACTIVE)
    assert [c.id for c in take(database)] == [urgent]


def test_jobs_that_go_alone_are_taken_alone(database, make_jobs):
    ids = make_jobs(3, kind="text.echo")
    database.run(lambda conn: conn.execute(Job.__table__.update().where(Job.id == ids[0]).values(group_limit=1)))
    assert [[c.id for c in take(database)] for _ in range(2)] == [ids[:1], ids[1:]]


def test_a_look_begins_where_the_last_one_ended(database, project, make_jobs):
    ids = make_jobs(2 * FULL + 3, kind="text.echo")
    fronts = {}
    taken = [take(database, fronts=fronts) for _ in range(2)]
    assert [[c.id for c in group] for group in taken] == [ids[:FULL], ids[FULL : 2 * FULL]]
    assert fronts == {project: (100, fronts[project][1], ids[2 * FULL - 1])}
    # What comes back in front of that waits for one who looks from the beginning.
    back = taken[0][5]
    database.run(lambda conn: lifecycle.crash(conn, [(back.id, back.attempt)], "given back", released=True))
    assert [c.id for c in take(database, fronts=fronts)] == ids[2 * FULL :]
    assert take(database, fronts=fronts) == []
    assert [c.id for c in take(database, fronts={})] == [back.id]


def test_what_is_passed_over_in_a_look_is_found_in_the_next(database, make_jobs):
    """The front stays at the first job that was not taken, however many behind it were."""
    alone = make_jobs(1, kind="text.echo", share_key="a", priority=5)
    others = make_jobs(3, kind="text.echo", share_key="b", priority=5)
    late = make_jobs(2, kind="text.echo", share_key="a", priority=5)
    fronts = {}
    assert [[c.id for c in take(database, fronts=fronts)] for _ in range(3)] == [[*alone, *late], others, []]


def test_projects_take_turns_in_looks_that_go_on(database, project, make_jobs):
    other = database.run(lambda conn: projects.ensure(conn, "other"))
    mine = make_jobs(2 * FULL, kind="text.echo", seconds=0.01)
    theirs = make_jobs(2 * FULL, kind="text.echo", seconds=0.01, share_key="y", project_id=other)
    fronts = {}
    taken = [[c.id for c in take(database, fronts=fronts)] for _ in range(4)]
    assert [*taken[0], *taken[2]] in (mine, theirs) and [*taken[1], *taken[3]] in (mine, theirs)
    assert sorted(functools.reduce(operator.iadd, taken, [])) == sorted(mine + theirs) and set(fronts) == {project, other}


def test_the_last_jobs_are_shared_among_workers_in_looks_that_go_on(database, make_jobs):
    for name in ("a", "b", "c"):
        database.run(lambda conn, name=name: lifecycle.report_worker(conn, name, ["text"], "cpu", 0, []))
    make_jobs(FULL + 300, kind="text.echo")
    fronts = {}
    sizes = [len(take(database, fronts=fronts)) for _ in range(4)]
    assert sizes == [FULL, 100, 67, 45]


def test_the_last_jobs_are_not_divided_for_less_than_they_cost(database, make_jobs):
    """A micro-batch costs milliseconds beside its jobs: 0.05 s of work goes in one."""
    for name in ("a", "b", "c"):
        database.run(lambda conn, name=name: lifecycle.report_worker(conn, name, ["text"], "cpu", 0, []))
    make_jobs(300, kind="text.echo", seconds=1e-4)
    assert [len(take(database)) for _ in range(2)] == [300, 0]
    make_jobs(300, kind="text.echo", seconds=1e-3)
    assert [len(take(database)) for _ in range(5)] == [100, 67, 50, 50, 33]


def test_nor_where_they_are_dispatched(database, make_jobs):
    for name in ("a", "b", "c"):
        database.run(lambda conn, name=name: lifecycle.report_worker(conn, name, ["text"], "cpu", 0, []))
    make_jobs(300, kind="text.echo", seconds=1e-4)
    make_jobs(30, kind="text.echo", seconds=1.0, share_key="slow")
    with database.write() as conn:
        hints = lifecycle.dispatch(conn, "text", cap_s=1000)
    assert sorted(len(hint.ids) for hint in hints) == [10, 10, 10, 300]


def test_a_take_that_was_undone_is_looked_for_from_the_beginning(database, make_jobs, executor, broker, monkeypatch):
    ids = make_jobs(2 * FULL, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database, max_jobs=1)
    real, failed = lifecycle.take, []

    def fails_once(conn, *args, **options):
        claimed = real(conn, *args, **options)
        if not failed:
            failed.append([c.id for c in claimed])
            raise ServiceUnavailable("gone before the commit", code="ledger_unavailable")
        return claimed

    monkeypatch.setattr(lifecycle, "take", fails_once)
    executor.run("text.echo", hint.ids)
    executor.finishers.submit(lambda: None).result()
    assert failed == [ids[FULL:]] and states(database) == {"succeeded": 2 * FULL}


def test_each_hint_begins_with_a_whole_look(database, project, make_jobs, executor, broker):
    make_jobs(2 * FULL, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database, max_jobs=1)
    executor._fronts[project] = (100, 2**60, "z")  # of an earlier hint: behind everything
    executor.run("text.echo", hint.ids)
    executor.finishers.submit(lambda: None).result()
    assert states(database) == {"succeeded": 2 * FULL}


@pytest.mark.parametrize("rest_s", [0.0, 60.0])
def test_now_and_then_the_whole_queue_is_looked_at(database, make_jobs, executor, broker, monkeypatch, rest_s):
    """A job that comes to stand in front of what was taken is found then, and not before."""
    ids = make_jobs(3 * FULL, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database, max_jobs=1)
    monkeypatch.setattr("worker.execution.LOOK_WHOLE_S", rest_s)
    real, taken = lifecycle.take, []

    def some_go_in_front(conn, *args, **options):
        if len(taken) == 1:
            # Of those that still wait: what was taken may have been committed by now.
            conn.execute(Job.__table__.update().where(Job.id.in_(ids[-3:])).values(rank=1))
        claimed = real(conn, *args, **options)
        taken.append(claimed)
        return claimed

    monkeypatch.setattr(lifecycle, "take", some_go_in_front)
    executor.run("text.echo", hint.ids)
    executor.finishers.submit(lambda: None).result()
    assert [c.id for c in taken[1]][:3] == (ids[-3:] if rest_s == 0.0 else ids[2 * FULL : 2 * FULL + 3])


def test_who_leaves_waits_for_the_turn_to_dispatch(database, make_jobs, executor, broker):
    """Others who stay have the turn most of the time: who only tried it would send nothing, and nobody would."""
    make_jobs(1, kind="text.echo")
    held, go = threading.Event(), threading.Event()

    def hold():
        with database.write() as conn:
            lifecycle._turn(conn, "text", patient=True)
            held.set()
            go.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(10)
    if not database.sqlite:  # where nobody writes beside whoever has the turn
        executor._dispatch(patient=False)
        assert broker.sent == []
    threading.Timer(0.2, go.set).start()
    executor._dispatch()
    other.join()
    assert len(broker.sent) == 1


def test_an_answer_that_is_lost_leaves_its_jobs_to_the_next_claim(database, make_jobs, executor, broker, monkeypatch):
    """Once what was taken is known by a second try; where that fails too, the next claim gives it back without a strike."""
    ids = make_jobs(2 * FULL + 1, kind="text.echo", params={"text": "a"}, seconds=1e-6)
    hint = first(database, max_jobs=1)
    real = database.run

    def lossy(work, *args, **how):
        answer = real(work, *args, **how)
        if answer and isinstance(answer, list) and isinstance(answer[0], lifecycle.Claimed) and answer[0].id == ids[FULL]:
            raise ServiceUnavailable("no answer", code="ledger_unavailable")
        return answer

    monkeypatch.setattr(database, "run", lossy)
    executor.run("text.echo", hint.ids)
    executor.finishers.submit(lambda: None).result()
    assert states(database) == {"succeeded": FULL, "running": FULL, "dispatched": 1}
    assert executor._unsure == set(ids[FULL : 2 * FULL])
    monkeypatch.undo()
    executor.stay_s = 0.0
    executor.run("text.echo", ids[2 * FULL :])
    executor.finishers.submit(lambda: None).result()
    with database.read() as conn:
        back = conn.execute(select(Job.state, Job.strikes).where(Job.id.in_(ids[FULL : 2 * FULL])).distinct()).all()
    assert {(row.state in ("queued", "dispatched"), row.strikes) for row in back} == {(True, 0)}
    assert not executor._unsure

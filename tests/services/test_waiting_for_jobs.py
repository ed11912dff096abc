"""Jobs that somebody waits for: at once on their way where the queue is idle, and heard of when they have ended."""

import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from factory_services import start_valkey
from sqlalchemy import select

from contentfactory.errors import ServiceUnavailable
from contentfactory.ids import new_id
from contentfactory.jobs.spec import get_kind
from contentfactory.settings import load_settings
from contentfactory.states import Priority
from db import choice, lifecycle, projects
from db.choice import Hint
from db.models import Job, Share
from producer.enqueue import Producer
from producer.publish import MAX_EARS, Publisher
from storage.memory import MemoryStore


class Sent:
    """A broker that only remembers."""

    def __init__(self, answers=True):
        self.hints = []
        self.answers = answers

    def send(self, hints):
        if not self.answers:
            return list(hints)
        self.hints += hints
        return []


def producer_with(database, tmp_path, publisher):
    return Producer(load_settings(state_dir=tmp_path / "state"), database, MemoryStore(), publisher)


@pytest.fixture
def producer(database, tmp_path):
    made = producer_with(database, tmp_path, Sent())
    # A queue has a clock from its first job on.
    made.submit("text.echo", {"text": "first"})
    [hint] = made.publisher.hints
    live(database, hint.ids)
    made.publisher.hints.clear()
    return made


def live(database, ids):
    """Let these jobs be done."""
    claimed = database.run(lambda conn: lifecycle.claim(conn, ids, "w", 30.0))
    database.run(lambda conn: lifecycle.finish(conn, [lifecycle.Success(c.id, c.attempt, (), (), None, None, {}) for c in claimed], "w"))


def row_of(database, job_id):
    with database.read() as conn:
        return conn.execute(select(Job.state, Job.dispatched_at).where(Job.id == job_id)).one()


def share_of(database, project):
    with database.read() as conn:
        return conn.execute(select(Share.virtual_seconds).where(Share.queue == "text", Share.project_id == project)).scalar_one()


@pytest.fixture
def commits(database, monkeypatch):
    """Counts write transactions."""
    seen = []
    run = database.run
    monkeypatch.setattr(database, "run", lambda work, *args, **more: (seen.append(1), run(work, *args, **more))[1])
    return seen


def test_an_interactive_job_of_an_idle_queue_is_accepted_and_dispatched_in_one_transaction(database, producer, commits):
    project = producer.project_id()
    before = share_of(database, project)
    job = producer.submit("text.echo", {"text": "x", "seconds": 2}, priority=Priority.INTERACTIVE)
    assert len(commits) == 1
    [hint] = producer.publisher.hints
    assert (hint.ids, hint.kind, hint.queue, hint.priority) == ((job,), "text.echo", "text", Priority.INTERACTIVE)
    row = row_of(database, job)
    assert (row.state, row.dispatched_at) == ("dispatched", hint.dispatched_at)
    assert share_of(database, project) == pytest.approx(before + 2), "it is charged like any other"


@pytest.mark.parametrize("key", [None, "a key"])
def test_one_whose_answer_was_lost_is_sent_all_the_same(database, producer, monkeypatch, key):
    accept, calls = lifecycle.accept_alone, []

    def lost(conn, row):
        calls.append(accept(conn, row))
        if len(calls) == 1:  # on PostgreSQL the statement is its own transaction; on SQLite it is undone
            raise ServiceUnavailable("the connection to the database was lost")
        return calls[-1]

    monkeypatch.setattr(lifecycle, "accept_alone", lost)
    job = producer.submit("text.echo", {"text": "x"}, priority=Priority.INTERACTIVE, idempotency_key=key)
    assert calls[0] is not None
    [hint] = producer.publisher.hints
    row = row_of(database, job)
    assert (hint.kind, hint.queue, hint.priority, hint.ids, hint.dispatched_at) == ("text.echo", "text", Priority.INTERACTIVE, (job,), row.dispatched_at)
    assert row.state == "dispatched"


def test_what_the_row_says_is_the_same_either_way(database, producer):
    """Written by one statement on an idle queue, and by the ordinary way while something is on the broker."""
    labels, params = {"ü": "\ud800"}, {"text": "ß \\ \t %s 'x'\n"}
    ids = [producer.submit("text.echo", params, priority=Priority.INTERACTIVE, seed=5, labels=labels, idempotency_key=f"key {n}") for n in range(2)]
    with database.read() as conn:
        alone, other = ({**conn.execute(select(Job).where(Job.id == i)).mappings().one(), "id": "", "idempotency_key": ""} for i in ids)
    for name in ("created_at", "dispatched_at", "rank"):
        assert 0 <= other.pop(name) - alone.pop(name) < 10 * (1e9 if name == "rank" else 1)
    assert alone == other
    assert alone["params"]["text"] == params["text"]


@pytest.mark.parametrize("why", ["bulk", "something waits", "something is on the broker"])
def test_otherwise_the_dispatcher_decides(database, producer, commits, why, monkeypatch):
    if why == "something waits":
        with monkeypatch.context() as without:
            without.setattr(producer, "dispatcher", None)
            producer.submit("text.echo", {"text": "before"})
    elif why == "something is on the broker":
        producer.submit("text.echo", {"text": "before"}, priority=Priority.INTERACTIVE)
    commits.clear()
    job = producer.submit("text.echo", {"text": "x"}, priority=Priority.BULK if why == "bulk" else Priority.INTERACTIVE)
    assert len(commits) > 1
    assert row_of(database, job).state == "dispatched"
    assert sum(job in hint.ids for hint in producer.publisher.hints) == 1


@pytest.mark.parametrize("what", ["queue", "project"])
def test_what_is_paused_is_not_dispatched(database, producer, what):
    name = {"queue": "text", "project": producer.project_id()}[what]
    database.run(lambda conn: lifecycle.pause(conn, what, name, True))
    job = producer.submit("text.echo", {"text": "x"}, priority=Priority.INTERACTIVE)
    assert row_of(database, job).state == "queued"
    assert producer.publisher.hints == []


def test_a_job_that_waits_for_another_is_not_dispatched(database, producer):
    parent = producer.submit("text.echo", {"text": "parent"}, priority=Priority.INTERACTIVE)
    child = producer.submit("text.echo", {"text": "child"}, priority=Priority.INTERACTIVE, depends_on=[parent])
    assert row_of(database, child).state == "blocked"
    assert [hint.ids for hint in producer.publisher.hints] == [(parent,)]


def test_a_child_alone_on_its_idle_queue_waits(database, producer):
    parent = producer.submit("text.echo", {"text": "parent"}, priority=Priority.INTERACTIVE)
    database.run(lambda conn: lifecycle.claim(conn, [parent], "w", 30.0))
    child = producer.submit("text.echo", {"text": "child"}, priority=Priority.INTERACTIVE, depends_on=[parent])
    assert row_of(database, child).state == "blocked"


def test_without_a_broker_it_is_queued_again(database, producer):
    producer.publisher.answers = False
    job = producer.submit("text.echo", {"text": "x"}, priority=Priority.INTERACTIVE)
    assert row_of(database, job).state == "queued"


def test_who_was_idle_long_earns_no_credit_by_it(database, producer):
    """The share starts at the queue's clock, as the dispatcher would have it."""
    project = database.run(lambda conn: projects.ensure(conn, "other"))
    database.run(lambda conn: choice.set_clock(conn, "text", 500.0))
    producer.submit("text.echo", {"text": "x", "seconds": 3}, priority=Priority.INTERACTIVE, project="other")
    assert share_of(database, project) == pytest.approx(503)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)  # on SQLite one writes at a time
def test_who_accepts_does_not_wait_for_who_dispatches(database, producer):
    """Whoever dispatches holds the queue's turn; an accept goes in all the same and leaves the job to the others."""
    spec, project = get_kind("text.echo"), producer.project_id()
    params = spec.validate({"text": "x"})
    row = lifecycle.NewJob(
        id=new_id("job"), project_id=project, kind=spec.name, queue=spec.queue, params=params.model_dump(mode="json"),
        share_key=spec.share_key(params, None), seconds=1.0, seed=1, priority=Priority.INTERACTIVE,
    )  # fmt: skip
    with database.write() as holder:
        lifecycle.dispatch(holder, "text", cap_s=10)
        with database.engine.begin() as conn:
            assert lifecycle.accept_alone(conn, row) is None
            assert lifecycle.insert_jobs(conn, [row]) == 1
    assert row_of(database, row.id).state == "queued"


# --- heard ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broker(tmp_path):
    (tmp_path / "valkey").mkdir()
    service, url = start_valkey(tmp_path / "valkey")
    yield service, url, tmp_path
    service.stop()


def publisher_of(url, tmp_path):
    return Publisher(load_settings(state_dir=tmp_path / "state", broker_url=url))


def connections(publisher):
    return int(publisher._redis.info("clients")["connected_clients"])


def ever_connected(publisher):
    return int(publisher._redis.info("stats")["total_connections_received"])


def test_who_waits_again_uses_the_same_connection_and_hears_only_of_its_own(broker):
    _, url, tmp_path = broker
    publisher, worker = publisher_of(url, tmp_path), publisher_of(url, tmp_path)
    made = []
    for n in range(5):
        with publisher.listen([f"job{n}"]) as heard:
            worker.ended(["another", f"job{n + 1}"])
            assert not heard.wait(0.05)
            worker.ended([f"job{n}"])
            assert heard.wait(5)
        worker.ended([f"job{n + 1}"])  # nobody listens: whoever waits next looks at the ledger first
        made.append(ever_connected(worker))
    assert made == [made[0]] * 5
    publisher.close()
    worker.close()


def test_several_wait_at_once_and_few_connections_stay(broker):
    _, url, tmp_path = broker
    publisher, worker = publisher_of(url, tmp_path), publisher_of(url, tmp_path)
    worker.ended(["nobody"])  # keeps a connection for this
    before = connections(worker)
    open_ones = [publisher.listen([f"job{n}"]) for n in range(MAX_EARS + 4)]
    heard = [one.__enter__() for one in open_ones]
    worker.ended([f"job{n}" for n in range(MAX_EARS + 4)])
    assert all(one.wait(5) for one in heard)
    for one in open_ones:
        one.__exit__(None, None, None)
    end = time.monotonic() + 5
    while connections(worker) > before + MAX_EARS and time.monotonic() < end:
        time.sleep(0.05)
    assert connections(worker) <= before + MAX_EARS
    publisher.close()
    worker.close()


def test_a_broker_that_was_restarted_is_heard_again(broker):
    service, url, tmp_path = broker
    publisher = publisher_of(url, tmp_path)
    with publisher.listen(["a"]) as heard:
        assert heard is not None
    service.stop()
    with publisher.listen(["a"]) as heard:
        assert heard is None, "nobody is there"
    place = urlsplit(url)
    again, _ = start_valkey(tmp_path / "valkey", place.port, place.password)
    try:
        with publisher.listen(["a"]) as heard:
            publisher.ended(["a"])
            assert heard.wait(5)
        again.stop()
        again, _ = start_valkey(tmp_path / "valkey", place.port, place.password)
        with publisher.listen(["a"]) as heard:  # the connection that was kept is a dead one
            assert heard is not None
            publisher.ended(["a"])
            assert heard.wait(5)
    finally:
        publisher.close()
        again.stop()


def hints(n):
    return [Hint("text.echo", "text", 100, (f"job_{k:032x}",), 1.0) for k in range(n)]


def test_hints_arrive_though_the_connection_that_was_kept_is_gone(broker):
    _, url, tmp_path = broker
    publisher, other = publisher_of(url, tmp_path), publisher_of(url, tmp_path)
    for n in range(1, 6):
        assert publisher.send(hints(1)) == []
        assert publisher.waiting("text") >= n
        other._redis.client_kill_filter(_type="normal", skipme=True)
    assert publisher.anything(["text"])
    before = ever_connected(other)
    for _ in range(20):
        assert publisher.send(hints(1)) == []
    assert ever_connected(other) <= before + 2
    publisher.close()
    other.close()


def test_a_hint_that_the_broker_refuses_comes_back_and_the_others_are_sent(broker):
    _, url, tmp_path = broker
    publisher = publisher_of(url, tmp_path)
    assert publisher.send(hints(1)) == []
    publisher._redis.set("image", "no list")
    bad = Hint("image.compose", "image", 100, ("job_" + "f" * 32,), 1.0)
    for _ in range(3):
        assert publisher.send([*hints(2), bad, *hints(1)]) == [bad]
    assert publisher.waiting("text") == 10
    publisher.close()


def test_threads_that_publish_at_once_do_not_mix_their_answers(broker):
    _, url, tmp_path = broker
    publisher = publisher_of(url, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert not any(found for found in pool.map(lambda n: publisher.send(hints(n % 3 + 1)), range(200)))
        assert all(pool.map(lambda n: publisher.anything(["text"]) and not publisher.anything(["audio"]), range(200)))
    assert publisher.waiting("text") == sum(n % 3 + 1 for n in range(200))
    publisher.close()


def test_without_a_broker_hints_come_back(broker):
    service, url, tmp_path = broker
    publisher = publisher_of(url, tmp_path)
    assert publisher.send(hints(1)) == []
    service.stop()
    assert publisher.send(hints(2)) == hints(2)
    publisher.ended(["job"])
    with pytest.raises(ServiceUnavailable):
        publisher.anything(["text"])
    publisher.close()

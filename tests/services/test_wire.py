"""Statements that a connection to PostgreSQL has the server keep: the driver's values and errors, and whatever happens to them."""

import signal
import threading
import time

import psycopg
import pytest
from sqlalchemy import event, text

from contentfactory.errors import ServiceUnavailable
from db import prepared, wire
from db.session import Database

TYPES = "SELECT %(word)s::text, %(none)s::text, %(yes)s::bool, %(small)s::int8, %(large)s::int8, %(real)s::float8, %(data)s::jsonb, %(word)s || \'%%\'"
GIVEN = {"word": "it's 5 % é 🦊", "none": None, "yes": True, "small": 7, "large": 2**40, "real": -1e-300, "data": '{"a": [1, null]}'}


@pytest.fixture
def ledger(postgres_database, monkeypatch):
    monkeypatch.setattr(wire, "SEEN", 1)
    database = Database(postgres_database)
    with database.write() as conn:
        conn.execute(text("CREATE TABLE things (n int PRIMARY KEY, word text)"))
    yield database
    database.close()


def add(conn, n, word="w", **options):
    return prepared.run(conn, "INSERT INTO things VALUES (%s, %s) RETURNING n", (n, word), **options)


def words(database):
    with database.read() as conn:
        return dict(conn.execute(text("SELECT n, word FROM things")).all())


def kept(conn):
    return {row[0] for row in conn.execute(text("SELECT name FROM pg_prepared_statements WHERE name LIKE 'kept_%'"))}


def test_a_statement_is_kept_once_it_was_seen(ledger):
    with ledger.read() as conn:
        for n in range(4):
            assert add(conn, n) == [(n,)]
            assert len(kept(conn)) == (n >= 1)
        assert add(conn, 2**31 - 1) == [(2**31 - 1,)]  # another type of number is another statement
    assert len(words(ledger)) == 5


@pytest.mark.parametrize("binary", [False, True])
def test_values_are_the_drivers(ledger, binary):
    with ledger.read() as conn:
        found = [prepared.run(conn, TYPES, GIVEN, binary=binary) for _ in range(3)]
    assert found[0] == found[1] == found[2] == [("it's 5 % é 🦊", None, True, 7, 2**40, -1e-300, {"a": [1, None]}, "it's 5 % é 🦊%")]


def test_names_and_places_do_not_mix():
    assert wire.numbered("SELECT %s, %s, '%%'") == (b"SELECT $1, $2, '%'", None)
    assert wire.numbered("SELECT %(a)s, %(b)s, %(a)s") == (b"SELECT $1, $2, $1", ("a", "b"))
    assert wire.numbered("SELECT 1") == (b"SELECT 1", ())
    with pytest.raises(TypeError, match="with and without names"):
        wire.numbered("SELECT %s, %(a)s")


def test_the_transaction_begins_with_the_first_statement_and_ends_as_a_whole(ledger):
    for n in range(3):
        with ledger.write() as conn:
            add(conn, n)
    with pytest.raises(ZeroDivisionError), ledger.write() as conn:  # noqa: PT012 - the transaction is what is tried
        add(conn, 7)
        raise ZeroDivisionError
    assert sorted(words(ledger)) == [0, 1, 2]
    with ledger.write() as conn:
        add(conn, 8)
        assert 8 not in words(ledger), "seen before it was committed"
    assert 8 in words(ledger)


def test_errors_are_the_drivers_and_cost_the_transaction_only(ledger):
    for n in range(3):
        with ledger.write() as conn:
            add(conn, n)
    for how in (ledger.write, ledger.read):
        with pytest.raises(psycopg.errors.UniqueViolation, match="things_pkey"), how() as conn:  # noqa: PT012
            add(conn, 5 if how == ledger.write else 6)
            add(conn, 1)
    assert sorted(words(ledger)) == [0, 1, 2, 6], "the statement before it was a transaction of its own only outside of one"
    with ledger.write() as conn:
        add(conn, 9)
    assert 9 in words(ledger)


def test_what_the_driver_had_the_server_forget_is_kept_anew(ledger):
    """After a rollback it forgets all statements, ours too, if it had any of its own."""
    for n in range(20):
        with ledger.write() as conn:
            add(conn, n)
            conn.exec_driver_sql("SELECT 1 WHERE %(n)s > 0", {"n": n})
    for n in range(20, 23):
        with pytest.raises(RuntimeError), ledger.write() as conn:  # noqa: PT012
            add(conn, n)
            raise RuntimeError
        with ledger.write() as conn:
            add(conn, n)
    assert sorted(words(ledger)) == list(range(23))
    with ledger.read() as conn:
        assert len(kept(conn)) <= 2


def test_a_statement_that_somebody_else_had_the_server_forget_is_done_on_another_connection(ledger):
    def work(conn):
        if not tries:
            for n in range(3):
                add(conn, n)
            conn.exec_driver_sql("DEALLOCATE ALL")
        tries.append(1)
        return add(conn, 5)

    tries = []
    assert ledger.run(work) == [(5,)]
    assert len(tries) == 2
    assert sorted(words(ledger)) == [5]


def test_a_driver_told_not_to_prepare_is_obeyed(postgres_database, monkeypatch):
    monkeypatch.setattr(wire, "SEEN", 0)
    database = Database(postgres_database)
    event.listen(database.engine, "connect", lambda raw, record: setattr(raw, "prepare_threshold", None))
    try:
        with database.read() as conn:
            for _ in range(8):
                assert prepared.run(conn, "SELECT 1", ()) == [(1,)]
            assert conn.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one() == 0
    finally:
        database.close()


def test_megabytes_go_through(ledger):
    long = "é" * 3_000_000
    with ledger.write() as conn:
        for n in range(3):
            add(conn, n, long)
            assert prepared.run(conn, "SELECT word FROM things WHERE n = %s", (n,)) == [(long,)]
    assert set(words(ledger).values()) == {long}


@pytest.mark.parametrize("how", ["read", "write"])
def test_something_else_is_done_meanwhile(ledger, postgres_database, how):
    other, seen = Database(postgres_database), []

    def look():
        with other.read() as conn:
            active = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"
            seen.append(conn.execute(text(active)).scalar_one())

    try:
        for _ in range(3):
            with getattr(ledger, how)() as conn:
                prepared.run(conn, "SELECT pg_sleep(%s)", (0.0,), meanwhile=look)
        seen.clear()
        with getattr(ledger, how)() as conn:
            prepared.run(conn, "SELECT pg_sleep(%s)", (1.5,), meanwhile=look)
        assert seen == [1]
    finally:
        other.close()


def test_what_fails_meanwhile_ends_the_transaction(ledger):
    def fail():
        raise RuntimeError("no")

    for n in range(4):
        with pytest.raises(RuntimeError, match="no"), ledger.write() as conn:
            add(conn, n, meanwhile=fail)
    with ledger.write() as conn:
        add(conn, 9)
    assert sorted(words(ledger)) == [9]


@pytest.mark.parametrize("how", ["read", "write"])
def test_a_signal_interrupts_a_statement_and_the_connection_stays_good(ledger, how):
    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    for _ in range(3):
        with getattr(ledger, how)() as conn:
            prepared.run(conn, "SELECT pg_sleep(%s)", (0.0,))
    earlier = signal.signal(signal.SIGUSR1, interrupt)
    pids = []
    try:
        begun = time.monotonic()
        with pytest.raises(Interrupted), getattr(ledger, how)() as conn:  # noqa: PT012
            pids += prepared.run(conn, "SELECT pg_backend_pid()", ())
            timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGUSR1])
            timer.start()
            prepared.run(conn, "SELECT pg_sleep(%s)", (30.0,))
        assert time.monotonic() - begun < 20
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    with getattr(ledger, how)() as conn:
        assert prepared.run(conn, "SELECT pg_sleep(%s)", (0.0,)) == [("",)]
        assert prepared.run(conn, "SELECT pg_backend_pid()", ()) == pids, "it took a new connection"


def test_a_server_that_goes_away_in_the_middle_is_told(ledger):
    for _ in range(3):
        with ledger.write() as conn:
            prepared.run(conn, "SELECT pg_sleep(%s)", (0.0,))

    def end():
        with ledger.read() as conn:
            conn.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"))

    with pytest.raises(ServiceUnavailable, match="did not answer"), ledger.write() as conn:
        prepared.run(conn, "SELECT pg_sleep(%s)", (30.0,), meanwhile=end)
    with ledger.write() as conn:
        assert add(conn, 1) == [(1,)]


@pytest.mark.parametrize("how", ["read", "write"])
def test_no_answer_at_all_is_a_lost_connection(ledger, monkeypatch, how):
    for n in range(3):
        with getattr(ledger, how)() as conn:
            add(conn, n)
    with monkeypatch.context() as patched:
        patched.setattr(wire.Wire, "_collect", lambda self, found, pipelined: None)
        with pytest.raises(ServiceUnavailable, match="before an answer came"), getattr(ledger, how)() as conn:
            add(conn, 7)
    with getattr(ledger, how)() as conn:
        assert add(conn, 8) == [(8,)]

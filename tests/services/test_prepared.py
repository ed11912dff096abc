"""Statements that go to the driver as they were compiled once give what SQLAlchemy would give, and fail as it would."""

import pytest
from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Double,
    Integer,
    MetaData,
    String,
    Table,
    bindparam,
    insert,
    select,
    text,
    update,
)

from contentfactory.errors import ServiceUnavailable
from db import migrate, prepared, wire
from db.models import Job
from db.prepared import BINARY
from db.session import Database

TABLE = Table(
    "kept", MetaData(), Column("n", Integer, primary_key=True), Column("truth", Boolean), Column("data", JSON), Column("measure", Double),
    Column("word", String, default="python's"),
)  # fmt: skip
ROWS = [(1, True, {"a": [1, "é"]}, 0.5, "x%"), (2, False, None, None, None), (3, None, "text", 1e300, "")]


@pytest.fixture(autouse=True, params=["by the driver's cursor", "kept by the server"])
def _way(request, monkeypatch):
    monkeypatch.setattr(wire, "SEEN", 10**9 if "cursor" in request.param else 0)


@pytest.fixture
def kept(database):
    with database.write() as conn:
        TABLE.create(conn)
        conn.execute(insert(TABLE), [dict(zip(TABLE.columns.keys(), row, strict=True)) for row in ROWS])
    return database


ALL = select(TABLE).order_by(TABLE.c.n)
ALL_BINARY = ALL.execution_options(**BINARY)
ONE = select(TABLE.c.n, TABLE.c.truth).where(TABLE.c.n == bindparam("p_n"), TABLE.c.n < 100)
CHANGE = update(TABLE).where(TABLE.c.n == bindparam("p_n")).values(data=bindparam("p_data"), word="5 %").returning(TABLE.c.n, TABLE.c.data)
SILENT = update(TABLE).where(TABLE.c.n == bindparam("p_n")).values(truth=True)


@pytest.mark.parametrize("statement", [ALL, ALL_BINARY])
def test_values_are_those_of_sqlalchemy(kept, statement):
    with kept.read() as conn:
        expected = conn.execute(statement).all()
        found = prepared.rows(conn, statement)
    assert [tuple(row) for row in found] == [tuple(row) for row in expected]
    assert [row[:1] for row in ROWS] == [tuple(row[:1]) for row in found]
    assert [type(row[1]) for row in found] == [bool, bool, type(None)]


def test_parameters_and_names(kept):
    with kept.read() as conn:
        row = prepared.one(conn, ONE, {"p_n": 2})
        assert (row.n, row.truth) == (2, False)
        assert prepared.one(conn, ONE, {"p_n": 7}) is None
        assert prepared.scalars(conn, ALL) == [1, 2, 3]
        assert [row.word for row in prepared.named(conn, ALL)] == ["x%", None, ""]


def test_what_is_written_goes_through_the_columns_types(kept):
    with kept.write() as conn:
        assert [tuple(row) for row in prepared.rows(conn, CHANGE, {"p_n": 1, "p_data": {"b": [None, "\ud800"]}})] == [(1, {"b": [None, "\ud800"]})]
        assert prepared.rows(conn, SILENT, {"p_n": 2}) == []
    with kept.read() as conn:
        assert conn.execute(select(TABLE.c.word, TABLE.c.data).where(TABLE.c.n == 1)).one() == ("5 %", {"b": [None, "\ud800"]})
        assert conn.execute(select(TABLE.c.truth).where(TABLE.c.n == 2)).scalar_one() is True


def test_one_statement_for_many_parameters(kept):
    with kept.write() as conn:
        prepared.many(conn, SILENT, [{"p_n": n} for n in (2, 3)])
        prepared.many(conn, SILENT, [])
    with kept.read() as conn:
        assert [row[1] for row in prepared.rows(conn, ALL)] == [True] * 3


def test_all_or_nothing_with_what_sqlalchemy_writes(kept):
    def work(conn):
        prepared.rows(conn, SILENT, {"p_n": 2})
        conn.execute(update(TABLE).values(truth=True))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        kept.run(work)
    with kept.read() as conn:
        assert [row[1] for row in prepared.rows(conn, ALL)] == [True, False, None]


@pytest.mark.parametrize(
    "statement",
    [select(TABLE).where(TABLE.c.n.in_([1, 2])), select(TABLE).where(TABLE.c.n.in_(bindparam("p", expanding=True))), insert(TABLE).values(n=9)],
    ids=["values", "parameter", "default"],
)  # fmt: skip
def test_what_is_only_known_later_is_refused(kept, statement):
    with kept.write() as conn, pytest.raises(TypeError, match="not to be prepared"):
        prepared.rows(conn, statement)


def test_a_mistake_is_the_drivers_own(kept):
    with pytest.raises(Exception, match="nowhere") as told, kept.write() as conn:
        prepared.run(conn, "INSERT INTO nowhere VALUES (1)", ())
    assert isinstance(told.value, ServiceUnavailable) == kept.sqlite  # SQLite calls it operational, as it does a locked file
    with kept.read() as conn:
        assert len(prepared.rows(conn, ALL)) == 3


def _end_all(admin: Database) -> None:
    with admin.read() as conn:
        conn.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"))


@pytest.mark.parametrize("how", ["read", "write"])
def test_a_server_that_ends_connections_costs_one_error_and_no_more(postgres_database, how):
    """The statement fails; the connections that rested, broken too, are gone with it."""
    statement = select(Job.id).where(Job.id == bindparam("p_id"))
    database, admin = Database(postgres_database), Database(postgres_database)
    try:
        migrate.upgrade(database)
        with database.read() as one, database.read() as two, database.write() as three:
            assert not any(prepared.rows(conn, statement, {"p_id": "job_x"}) for conn in (one, two, three))
        _end_all(admin)
        with pytest.raises(ServiceUnavailable), getattr(database, how)() as conn:
            prepared.rows(conn, statement, {"p_id": "job_x"})
        for _ in range(4):
            with database.read() as one, database.read() as two, database.write() as three:
                assert not any(prepared.rows(conn, statement, {"p_id": "job_x"}) for conn in (one, two, three))
        _end_all(admin)
        assert database.run(lambda conn: prepared.rows(conn, statement, {"p_id": "job_x"})) == []
    finally:
        database.close()
        admin.close()


def test_a_connection_lost_in_a_transaction_is_told_and_the_work_done_again(postgres_database):
    database, admin = Database(postgres_database), Database(postgres_database)
    try:
        tries = []

        def work(conn):
            tries.append(prepared.run(conn, "SELECT 1", ()))
            if len(tries) < 3:
                _end_all(admin)
            return prepared.run(conn, "SELECT 1", ())

        with pytest.raises(ServiceUnavailable):
            database.run(work, tries=1)
        assert database.run(work, tries=2) == [(1,)]
        assert len(tries) == 3
        with database.write() as conn:
            assert prepared.run(conn, "SELECT 1", ()) == [(1,)]
    finally:
        database.close()
        admin.close()

"""A ledger at rest is seen to be so without SQLAlchemy, and whatever else there is is left to it."""

import sqlite3
import subprocess
import sys

import pytest

from db import lifecycle, migrate
from db.glance import at_rest, newest
from db.session import Database


@pytest.fixture
def url(tmp_path):
    found = f"sqlite:///{tmp_path / 'a ledger#1'}.db"
    database = Database(found)
    migrate.upgrade(database)
    database.close()
    return found


def change(url, *statements):
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def test_one_of_the_newest_schema_with_nothing_under_way_is_at_rest(url):
    assert at_rest(url)
    change(url, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert at_rest(url)


def test_an_older_or_unknown_schema_is_not(url):
    for revision in ("0001", "9999"):
        change(url, f"UPDATE alembic_version SET version_num = '{revision}'")
        assert not at_rest(url)
    change(url, "DELETE FROM alembic_version")
    assert not at_rest(url)
    change(url, f"INSERT INTO alembic_version VALUES ('{newest()}')")
    assert at_rest(url)
    change(url, "DROP TABLE alembic_version")
    assert not at_rest(url)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_what_is_on_the_broker_or_in_a_worker_is_not(database, make_jobs):
    url = database.engine.url.render_as_string()
    ids = make_jobs(1)
    assert at_rest(url), "it only waits"
    database.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=1e6))
    assert not at_rest(url)
    database.run(lambda conn: lifecycle.claim(conn, ids, "w", 60.0))
    assert not at_rest(url)


def test_what_is_no_file_of_ours_is_left_to_others(tmp_path, url):
    (tmp_path / "words").write_text("no database at all, though long enough to have a header of sixteen bytes")
    (tmp_path / "empty").touch()
    for other in ("words", "empty", "nowhere", "."):
        assert not at_rest(f"sqlite:///{tmp_path / other}")
    assert not (tmp_path / "nowhere").exists(), "it was made"
    assert not any(at_rest(other) for other in ("postgresql://u:p@127.0.0.1/x", "sqlite://", "sqlite:///:memory:", f"{url}?mode=ro"))


def test_sqlalchemy_is_not_loaded(url):
    code = f"import sys; from db.glance import at_rest; assert at_rest({url!r}); assert 'sqlalchemy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

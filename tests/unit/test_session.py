"""Connections to a SQLite ledger: who writes when."""

import threading
import time
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from db.session import Database, _Turn


@pytest.fixture
def database(tmp_path):
    made = Database(f"sqlite:///{tmp_path / 'ledger.db'}")
    with made.write() as conn:
        conn.execute(text("CREATE TABLE notes (n INTEGER)"))
    yield made
    made.close()


def noted(database):
    with database.read() as conn:
        return conn.execute(text("SELECT count(*) FROM notes")).scalar()


def test_writers_of_several_connections_take_turns(database, tmp_path):
    other = Database(f"sqlite:///{tmp_path / 'ledger.db'}")
    inside, most = 0, 0

    def write(one):
        nonlocal inside, most
        for n in range(20):
            with one.write() as conn:
                inside += 1
                most = max(most, inside)
                conn.execute(text("INSERT INTO notes VALUES (:n)"), {"n": n})
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=write, args=(one,)) for one in (database, database, other, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert noted(database) == 80
    assert most == 1
    other.close()


def test_a_turn_is_given_back_when_the_work_fails(tmp_path):
    turn = _Turn(tmp_path / "turn")
    with pytest.raises(RuntimeError), turn.taken():
        raise RuntimeError("no")
    again = _Turn(tmp_path / "turn")
    started = time.monotonic()
    with again.taken():
        assert time.monotonic() - started < 5


def test_who_cannot_have_a_turn_writes_all_the_same(database):
    database._turn = _Turn(Path("/nowhere/at/all"))
    with database.write() as conn:
        conn.execute(text("INSERT INTO notes VALUES (1)"))
    assert noted(database) == 1


def test_a_turn_that_is_never_given_back_only_delays(database, monkeypatch, tmp_path):
    monkeypatch.setattr("db.session.BUSY_S", 0.2)
    started = time.monotonic()
    with _Turn(tmp_path / "ledger.db-turn").taken(), database.write() as conn:
        conn.execute(text("INSERT INTO notes VALUES (1)"))
    assert noted(database) == 1
    assert time.monotonic() - started >= 0.2


def test_threads_that_end_leave_no_handles(database):
    def write():
        with database.write() as conn:
            conn.execute(text("INSERT INTO notes VALUES (1)"))

    write()
    before = psutil.Process().num_fds()
    for _ in range(20):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    database.engine.dispose()
    assert psutil.Process().num_fds() <= before

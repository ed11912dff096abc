"""Connections to the ledger: SQLite in WAL mode or PostgreSQL, with explicit read and write transactions."""

import fcntl
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import Double

from contentfactory.errors import ConfigError, ServiceUnavailable
from contentfactory.fastjson import dumps_ascii, loads

T = TypeVar("T")

BUSY_S = 30.0
"""How long a writer waits for others on SQLite, seconds."""


class now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """The database's clock as unix seconds; worker clocks decide nothing."""

    type = Double()
    inherit_cache = True
    name = "factory_now"


@compiles(now, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    # unixepoch('subsec') needs SQLite 3.42; julianday is good to a millisecond everywhere.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    # As date_part: extract would go by way of a decimal, for each row that is written.
    return "date_part('epoch', clock_timestamp())"


def insert_for(conn: Connection, table: Any) -> Any:
    """The dialect's INSERT, which knows ON CONFLICT."""
    return upsert(conn.dialect.name, table)


def faults(engine: Engine) -> tuple[type[Exception], ...]:
    """What SQLAlchemy and the driver raise where a database does not answer."""
    driver: Any = engine.dialect.dbapi
    return OperationalError, InterfaceError, driver.OperationalError, driver.InterfaceError


def upsert(dialect: str, table: Any) -> Any:
    """As `insert_for`, by the dialect's name: for statements that are built once."""
    if dialect != "postgresql":
        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql  # which loads every driver of it that SQLAlchemy knows

    return postgresql.insert(table)


class Database:
    """An engine with the two kinds of transaction that the factory uses.

    Args:
        url: ``sqlite:///path`` or ``postgresql+psycopg://…`` (``postgresql://`` is accepted).
        pool_size: Connections kept on PostgreSQL.
        connect_timeout_s: Longest wait for a connection, seconds.

    Raises:
        ConfigError: If the URL is of another database.
    """

    _broke_at = -1e9
    """When a connection was last found broken: those that rest since before may be, too."""

    def __init__(self, url: str, pool_size: int = 5, connect_timeout_s: float = 5.0) -> None:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        backend = parsed.get_backend_name()
        self.sqlite = backend == "sqlite"
        self._thread = threading.local()
        self._turn: _Turn | None = None
        if self.sqlite:
            if parsed.database and parsed.database != ":memory:":
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
                self._turn = _Turn(Path(f"{parsed.database}-turn"))
            self.engine = create_engine(
                parsed, connect_args={"timeout": BUSY_S, "check_same_thread": False}, pool_pre_ping=False, json_deserializer=loads, json_serializer=dumps_ascii
            )
            self.engine.dialect.statement_compiler = _SQLiteCompiler
            event.listen(self.engine, "connect", _sqlite_connect)
            event.listen(self.engine, "begin", _sqlite_begin)
        elif backend == "postgresql":
            self.engine = create_engine(
                parsed,
                pool_size=pool_size,
                max_overflow=10,
                pool_timeout=connect_timeout_s,
                json_deserializer=loads,
                json_serializer=dumps_ascii,
                connect_args={
                    "connect_timeout": max(1, int(connect_timeout_s)),
                    "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
                    "application_name": "contentfactory",
                },
            )  # fmt: skip
            event.listen(self.engine, "connect", _set_up)
            event.listen(self.engine, "checkin", _note_use)
            event.listen(self.engine, "checkout", self._ping_if_doubtful)
        else:
            raise ConfigError(f"database_url names {backend!r}; allowed: sqlite, postgresql", param="database_url")
        self._faults = faults(self.engine)
        self._writers = _AtHand(self.engine.execution_options(factory_begin="IMMEDIATE") if self.sqlite else self.engine, self._doubtful)
        self._readers = _AtHand(self.engine if self.sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT"), self._doubtful)

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[Connection]:
        """A transaction that may write; on SQLite it takes the write lock at its start, so it never fails to upgrade.

        Args:
            durable: Whether the commit waits for the disk. Where it does not, a power cut or a crash of the server may take it back (the end of
                this process does not), unless something was committed after it that did wait. On PostgreSQL statements say so themselves
                (`db.sql.NOT_DURABLE`), which costs no round trip.

        Raises:
            ServiceUnavailable: If the database cannot be reached or stays locked.
        """
        if self.sqlite and getattr(self._thread, "writing", False):
            # It would wait for itself until the time-out; PostgreSQL would only do so for the same rows.
            raise RuntimeError("a write transaction was opened inside another one of the same thread")
        self._thread.writing = True
        try:
            with self._turn.taken() if self._turn else nullcontext(), self._mapped(), self._writers.lent() as connection:
                if self.sqlite:
                    _wait_for_disk(connection, durable)
                with connection.begin():
                    yield connection
        finally:
            self._thread.writing = False

    @contextmanager
    def read(self, *, transaction: bool = False) -> Iterator[Connection]:
        """A connection that only reads, for as long as its user likes.

        On SQLite all that it reads is of one moment. On PostgreSQL each statement sees what was committed when it began, as it would
        in a transaction of that database's usual kind, so there is none: it would cost two round trips, and end after `IDLE_TRANSACTION_S`.

        Args:
            transaction: Whether there has to be a transaction all the same: for settings that are to last as long as it, and for cursors.

        Raises:
            ServiceUnavailable: If the database cannot be reached.
        """
        if self.sqlite or transaction:
            with self._mapped(), self.engine.connect() if transaction else self._readers.lent() as connection, connection.begin():
                yield connection
            return
        with self._mapped(), self._readers.lent() as connection:
            yield connection
            if connection.in_transaction():
                connection.rollback()  # SQLAlchemy's word for it; there is none

    def run(self, work: Callable[[Connection], T], tries: int = 5, *, whole: bool = True, durable: bool = True) -> T:
        """Run a write transaction, again after a deadlock, serialisation failure or lost connection before the commit.

        The work must be safe to repeat: fenced updates are, since a repeat finds the row already changed.

        Args:
            work: What to do with the connection.
            tries: How often to try.
            whole: Whether what it does must be there as a whole or not at all. Where it need not, each statement is a transaction of its own
                on PostgreSQL, as on the connections of `read`: one round trip instead of three.
            durable: As in `write`.

        Raises:
            ServiceUnavailable: If each try failed.
        """
        for left in reversed(range(tries)):
            try:
                with self.write(durable=durable) if whole or self.sqlite else self.read() as connection:
                    return work(connection)
            except ServiceUnavailable:
                if not left:
                    raise
                time.sleep(random.uniform(0.02, 0.1) * (tries - left))
        raise AssertionError("unreachable")

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """Map connection faults, SQLAlchemy's and the driver's own, to ours; programming errors pass as they are."""
        caught: tuple[type[Exception], ...] = (DisconnectionError, DBAPIError, *self._faults)
        try:
            yield
        except caught as error:
            if isinstance(error, DisconnectionError) or getattr(error, "connection_invalidated", False):
                self._broke_at = time.monotonic()
            elif not isinstance(error, self._faults):
                raise
            told = str(getattr(error, "orig", error))[:300]
            raise ServiceUnavailable(f"the database did not answer: {told}", code="database_unavailable") from error

    def _doubtful(self, used: float) -> bool:
        """Whether a connection that was last used then may be broken by now: asking each time, a busy worker would pay with every transaction."""
        return used < self._broke_at or time.monotonic() - used > IDLE_S

    def _ping_if_doubtful(self, connection: Any, record: Any, proxy: Any) -> None:
        if not self._doubtful(record.info.get("used", time.monotonic())):
            return
        try:
            connection.execute("SELECT 1")
            connection.rollback()
        except Exception as error:
            raise DisconnectionError from error

    def check(self) -> None:
        """Ask the database for an answer.

        Raises:
            ServiceUnavailable: If it gives none.
        """
        with self.read() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close every connection."""
        self._writers.close()
        self._readers.close()
        self.engine.dispose()

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self.engine.dialect.name


class _AtHand:
    """One connection that stays out of the pool between two uses: taking one from there and giving it back costs a short transaction
    as much as one of its statements. Whoever comes while it is in use gets another, from the pool.

    Args:
        engine: Where connections come from.
        doubtful: Whether one that was last used at this time (monotonic clock) may be broken by now; the pool asks it, then.
    """

    def __init__(self, engine: Engine, doubtful: Callable[[float], bool]) -> None:
        self._engine = engine
        self._doubtful = doubtful
        self._rests: list[tuple[Connection, float, int]] = []  # one; taken and put by single steps, which threads cannot divide

    @contextmanager
    def lent(self) -> Iterator[Connection]:
        """A connection outside a transaction; to be left so."""
        connection = self._take() or self._engine.connect()
        try:
            yield connection
        except BaseException:
            if connection.dialect.name == "postgresql":
                from db import wire

                wire.doubt(connection)
            connection.close()  # whatever became of it, the pool knows
            raise
        if self._rests or connection.invalidated or connection.in_transaction():
            connection.close()
        else:
            self._rests.append((connection, time.monotonic(), os.getpid()))

    def _take(self) -> Connection | None:
        try:
            connection, used, process = self._rests.pop()
        except IndexError:
            return None
        if process != os.getpid():
            _FORKED.append(connection)
            return None
        if not self._doubtful(used):
            return connection
        self._give_back(connection, used)
        return None

    def _give_back(self, connection: Connection, used: float) -> None:
        connection.info["rests_since"] = used
        connection.close()

    def close(self) -> None:
        """Give the connection back to the pool."""
        while self._rests:
            connection, used, process = self._rests.pop()
            if process == os.getpid():
                self._give_back(connection, used)


_FORKED: list[Connection] = []
"""Connections of the process that this one was forked from: kept for good, since they would be closed under it otherwise."""


class _SQLiteCompiler(sqlite.base.SQLiteCompiler):
    """Writes hints (``INDEXED BY``), which SQLAlchemy leaves out for SQLite."""

    def get_from_hint_text(self, table: Any, text: str | None) -> str | None:
        return text


class _Turn:
    """Whose turn it is to write to a SQLite file, among all threads of all processes of a factory.

    SQLite itself lets those who wait sleep for up to 100 ms before they look again, and with several writers its lock is free for much
    of the time that all of them wait. This one is looked at more often. It is only a courtesy: whoever cannot have it goes on, and
    SQLite's own lock decides.

    Args:
        path: A file of its own beside the database.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = threading.local()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the turn; waited for as long as SQLite would wait."""
        handle = self._open()
        held = handle is not None and _take(handle.number)
        try:
            yield
        finally:
            if held and handle is not None:
                fcntl.flock(handle.number, fcntl.LOCK_UN)

    def _open(self) -> "_Handle | None":
        # One for each thread of each process: those of one open file share its lock.
        found: _Handle | None = getattr(self._thread, "handle", None)
        if found is None or found.process != os.getpid():
            try:
                found = self._thread.handle = _Handle(self._path)
            except OSError:
                return None
        return found


class _Handle:
    """An open file, closed with the thread that opened it."""

    def __init__(self, path: Path) -> None:
        self.process = os.getpid()
        self.number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self.number)


def _take(handle: int) -> bool:
    end, pause = time.monotonic() + BUSY_S, 0.0002
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(pause * 1.5, 0.002)
        except OSError:
            return False


def _set_up(connection: Any, record: Any) -> None:
    # A statement for a micro-batch is planned while its table is small, reads all of it, and keeps that plan while the table grows to
    # millions. Where there is no index a table is read as a whole all the same; the price that this puts on it must not start the JIT.
    connection.execute("SET enable_seqscan = off")
    connection.execute("SET jit = off")
    # A process that is stopped in a transaction keeps its locks, and whoever wants them waits with it: the timer, say, in a dispatch, and
    # then no lease is reaped. It loses the transaction instead, and does it again when it wakes.
    connection.execute(f"SET idle_in_transaction_session_timeout = {IDLE_TRANSACTION_S * 1000:.0f}")
    connection.commit()


IDLE_TRANSACTION_S = 5.0
"""Longest pause between two statements of a transaction on PostgreSQL, seconds: ours take milliseconds, but for those that `take_time`."""
IDLE_S = 1.0
"""A connection that rested longer is asked whether it still stands before it is used."""


def _note_use(connection: Any, record: Any) -> None:
    record.info["used"] = record.info.pop("rests_since", None) or time.monotonic()


def take_time(connection: Connection) -> None:
    """Let this transaction pause between its statements for as long as it likes: it computes over many rows, and holds nothing meanwhile."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")


def _sqlite_connect(connection: Any, record: Any) -> None:
    # The driver's own transaction handling would begin late and commit before DDL; we begin ourselves.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # FULL: an accepted job must survive a power cut, not only a crash of the process.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_S * 1000:.0f}")
    cursor.execute("PRAGMA cache_size=-32768")
    # A page is written at a job's acceptance, its start and its end: copied into the database after each, or once.
    cursor.execute("PRAGMA wal_autocheckpoint=8000")
    cursor.close()


def _wait_for_disk(connection: Connection, durable: bool) -> None:
    """Whether the next transaction's commit does; SQLite takes no word about it within one."""
    level = "FULL" if durable else "NORMAL"
    if connection.info.get("synchronous", "FULL") != level:
        raw: Any = connection.connection.dbapi_connection
        raw.execute(f"PRAGMA synchronous={level}")
        connection.info["synchronous"] = level


def _sqlite_begin(connection: Connection) -> None:
    mode = connection.get_execution_options().get("factory_begin", "DEFERRED")
    raw: Any = connection.connection.dbapi_connection  # SQLAlchemy would make more of this word than of the transaction's statements
    raw.execute(f"BEGIN {mode}")


__all__ = ["Database", "insert_for", "now", "take_time", "upsert"]

"""Statements of the hot path: taken apart once, then handed to the driver with nothing in between.

SQLAlchemy compiles a statement once too, but what it does around each call costs a small statement as much as the database's answer, and
several times that where the process has just slept. Results here are lists of the driver's own tuples; all of it runs in the transaction
of the connection that is given.
"""

from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Double, Float
from sqlalchemy.exc import DisconnectionError

BINARY = {"binary": True}
"""Execution options of a statement that returns numbers of many rows: on PostgreSQL neither side turns them into decimals and back."""
_NOTHING: Mapping[str, Any] = {}
_PREPARED: dict[str, dict[Any, "_Prepared"]] = {"sqlite": {}, "postgresql": {}}


class _Prepared:
    """A statement in a dialect's words.

    Args:
        statement: Statement of SQLAlchemy's, all of whose parameters are named or have their values.
        dialect: Dialect of the connection.

    Raises:
        TypeError: If something of it is only known when it is executed: lists that expand, defaults that Python makes.
    """

    __slots__ = ("_binds", "_given", "_results", "_row", "binary", "positions", "text")

    def __init__(self, statement: Any, dialect: Any) -> None:
        compiled = statement.compile(dialect=dialect)
        if getattr(compiled, "post_compile_params", None) or getattr(compiled, "insert_prefetch", None) or getattr(compiled, "update_prefetch", None):
            raise TypeError(f"not to be prepared: {compiled}")
        self.text = compiled.string
        self.positions: Sequence[str] | None = compiled.positiontup if compiled.positional else None
        self.binary = bool(statement.get_execution_options().get("binary"))
        self._binds: dict[str, Callable[[Any], Any]] = dict(getattr(compiled, "_bind_processors", {}))
        self._given = {
            name: self._bound(name, bind.effective_value) for bind, name in compiled.bind_names.items() if not bind.required
        }
        columns = getattr(compiled, "_result_columns", None) or ()
        self._results = [(at, read) for at, column in enumerate(columns) if (read := _reader(column.type, dialect)) is not None]
        names = [column.keyname for column in columns]
        self._row: Any = namedtuple("Row", names, rename=True) if names else None

    def _bound(self, name: str, value: Any) -> Any:
        process = self._binds.get(name)
        return process(value) if process else value

    def values(self, given: Mapping[str, Any]) -> Any:
        """Parameters as the driver takes them."""
        if self._binds:
            given = {name: self._bound(name, value) for name, value in given.items()}
        known = {**self._given, **given}
        return known if self.positions is None else [known[name] for name in self.positions]

    def read(self, rows: list[Any]) -> list[Any]:
        """Rows as Python values: JSON as objects, SQLite's numbers as the booleans they are."""
        if self._results and rows:
            taken = [list(row) for row in rows]
            for at, read in self._results:
                for row in taken:
                    row[at] = read(row[at])
            return taken
        return rows

    def named(self, row: Any) -> Any:
        """A row whose values have names."""
        return self._row._make(row)


def _reader(type_: Any, dialect: Any) -> Callable[[Any], Any] | None:
    if isinstance(type_, (Double, Float)):
        return None  # both drivers return floats
    found: Callable[[Any], Any] | None = type_.dialect_impl(dialect).result_processor(dialect, None)
    return found


def _prepare(conn: Connection, statement: Any) -> _Prepared:
    known = _PREPARED[conn.dialect.name]
    found = known.get(statement)
    if found is None:
        found = known[statement] = _Prepared(statement, conn.dialect)
    return found


def rows(conn: Connection, statement: Any, values: Mapping[str, Any] = _NOTHING, *, meanwhile: Callable[[], None] | None = None) -> list[Any]:
    """Run a statement; its rows, none where it returns none.

    Args:
        conn: Connection in a transaction.
        statement: One that is built once and kept: it is remembered for good.
        values: Its parameters.
        meanwhile: As in `run`.
    """
    prepared = _prepare(conn, statement)
    return prepared.read(run(conn, prepared.text, prepared.values(values), binary=prepared.binary, meanwhile=meanwhile))


def one(conn: Connection, statement: Any, values: Mapping[str, Any] = _NOTHING) -> Any:
    """The only row of a statement as `rows` runs it, its values by name; None where there is none."""
    found = named(conn, statement, values)
    return found[0] if found else None


def named(conn: Connection, statement: Any, values: Mapping[str, Any] = _NOTHING) -> list[Any]:
    """The rows of a statement as `rows` runs it, their values by name: of few rows, since names cost more than the row."""
    return [_prepare(conn, statement).named(row) for row in rows(conn, statement, values)]


def scalars(conn: Connection, statement: Any, values: Mapping[str, Any] = _NOTHING) -> list[Any]:
    """The first value of each row of a statement as `rows` runs it."""
    return [row[0] for row in rows(conn, statement, values)]


def many(conn: Connection, statement: Any, values: Iterable[Mapping[str, Any]]) -> None:
    """Run a statement as `rows` does, for each of these parameters: in one round trip to PostgreSQL."""
    prepared = _prepare(conn, statement)
    run_many(conn, prepared.text, [prepared.values(one) for one in values])


def run(conn: Connection, text: str, values: Any, *, binary: bool = False, meanwhile: Callable[[], None] | None = None) -> list[Any]:
    """Run a statement in the driver's words; its rows, none where it returns none.

    Args:
        conn: Connection in a transaction.
        text: The statement.
        values: Its parameters.
        binary: Whether the rows are numbers, which PostgreSQL then sends as it has them.
        meanwhile: What to do while the database works on it, or after that where the driver waits for it.
    """
    found: list[Any] | None = None
    if conn.dialect.name == "postgresql":
        from db import wire  # and with it the driver, which few processes on SQLite ever load

        with _faults(conn):
            found = wire.ask(conn, text, values, binary=binary, meanwhile=meanwhile)
        if found is not None:
            return found
    with cursor(conn) as its:
        if binary and conn.dialect.name == "postgresql":
            its.format = 1
        its.execute(text, values)
        found = its.fetchall() if its.description is not None else []
    if meanwhile:
        meanwhile()
    return found


@contextmanager
def cursor(conn: Connection) -> Iterator[Any]:
    """A cursor of the driver.

    Raises:
        sqlalchemy.exc.DisconnectionError: If the connection broke. The driver has several errors for it (one whose transaction was ended while it
            paused is 'internal'), and its own of everything else pass as they are.
    """
    with _faults(conn):
        found: Any = conn.connection.cursor()
        try:
            yield found
        finally:
            found.close()


@contextmanager
def _faults(conn: Connection) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not conn.invalidated and conn.dialect.is_disconnect(error, conn.connection.dbapi_connection, None):  # type: ignore[arg-type]
            conn.invalidate(error)
            raise DisconnectionError(str(error)) from error
        raise


def run_many(conn: Connection, text: str, values: Iterable[Sequence[Any]]) -> None:
    """Run a statement in the driver's words for each of these rows of parameters."""
    with cursor(conn) as its:
        its.executemany(text, values)


__all__ = ["BINARY", "cursor", "many", "named", "one", "rows", "run", "run_many", "scalars"]

"""What the hot path needs beyond SQLAlchemy's expressions: many ids in one parameter, many rows in one go, on both databases."""

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    String,
    and_,
    any_,
    func,
    literal,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY

from contentfactory.states import UNWELL, JobState
from db.tables import Job

COPY_FROM = 8
"""Rows from which on a COPY is worth its two further messages."""

_ARRAY = ARRAY(String)
_UNWELL = f"jobs.state IN ({', '.join(repr(str(state)) for state in UNWELL)})"


def among(conn: Connection, column: Any, values: Iterable[str]) -> ColumnElement[bool]:
    """Whether a text column is one of the values: one parameter, however many they are, and one statement for every number of them."""
    if conn.dialect.name == "postgresql":
        found: ColumnElement[bool] = column == any_(literal(list(values), _ARRAY))
    else:
        listed = func.json_each(json.dumps(list(values))).table_valued("value")
        found = column.in_(select(listed.c.value))
    return found


@functools.cache
def has_state(*states: JobState) -> ColumnElement[bool]:
    """Whether a job is in one of the states, written out: only then can a database use an index on jobs of that state."""
    if len(states) > 1:
        several: ColumnElement[bool] = Job.c.state.in_([literal_column(f"'{state}'") for state in states])
        return several
    one: ColumnElement[bool] = Job.c.state == literal_column(f"'{states[0]}'")
    # SQLite takes a partial index only where its condition stands in the query word for word.
    return and_(one, text(_UNWELL)) if states[0] in UNWELL else one


def insert_rows(conn: Connection, table: Any, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert many rows, quickly: COPY on PostgreSQL, one prepared statement on SQLite.

    Args:
        conn: Connection in a write transaction.
        table: Where to; of `db.tables`.
        columns: Names of the columns; all others take the database's default.
        rows: A value for each column; JSON as text.
    """
    if not rows:
        return
    names = ", ".join(columns)
    if conn.dialect.name == "postgresql" and len(rows) >= COPY_FROM:
        cursor: Any = conn.connection.cursor()
        with cursor, cursor.copy(f"COPY {table.name} ({names}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        return
    mark = "%s" if conn.dialect.name == "postgresql" else "?"
    values = ", ".join([mark] * len(columns))
    conn.exec_driver_sql(f"INSERT INTO {table.name} ({names}) VALUES ({values})", list(rows))  # noqa: S608 - names of our own


def dumps(value: Any) -> str:
    """A JSON column's text."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


__all__ = ["COPY_FROM", "among", "dumps", "has_state", "insert_rows"]

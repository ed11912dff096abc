"""What the hot path needs beyond SQLAlchemy's expressions: many ids in one parameter, many rows in one go, on both databases."""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    String,
    and_,
    any_,
    bindparam,
    cast,
    func,
    literal,
    literal_column,
    or_,
    select,
    text,
)

from contentfactory.fastjson import dumps
from contentfactory.states import JobState
from db import prepared
from db.tables import Job

COPY_FROM = 8
"""Rows from which on a COPY is worth its two further messages."""

COPY_BLOCK, COPY_BYTES = 512, 2**20
"""Rows that are written at once, and about how many characters of them: the server reads some while the next are put together."""

_PLAIN = re.compile(r"[\w./:@,-]+", re.ASCII)
"""Values that an array's text takes as they are, with their commas; our ids and keys are made of these."""
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_SPECIAL = re.compile(r"[\\\t\n\r]")
"""What COPY's text marks the ends of values and rows with, or reads as the beginning of an escape."""
_NONE = "-"
"""Stands for nothing in an array of text: what is empty would have to be quoted."""
_FLYING = (JobState.DISPATCHED, JobState.RUNNING)


NOT_DURABLE = "(SELECT set_config('synchronous_commit', 'off', true)) IS NOT NULL"
"""Condition of a statement of PostgreSQL's whose transaction need not wait for the disk at its commit: see `Database.write`."""


statement_text = functools.cache(text)
"""Statements in words, taken apart once."""


def among(conn: Connection, column: Any, values: Iterable[str]) -> ColumnElement[bool]:
    """Whether a text column is one of the values: one parameter, however many they are, and one statement for every number of them."""
    dialect = conn.dialect.name
    return _member(dialect, column, literal(packed(dialect, values), String))


def among_given(dialect: str, column: Any, name: str) -> ColumnElement[bool]:
    """As `among`, for statements that are built once: the values come as parameter ``name``, by way of `packed`."""
    return _member(dialect, column, bindparam(name, type_=String))


def packed(dialect: str, values: Iterable[str]) -> str:
    """Values for `among_given`."""
    return _array(values) if dialect == "postgresql" else json.dumps(list(values))


def packed_rows(dialect: str, name: str, columns: Sequence[str], rows: Iterable[Sequence[str | None]]) -> dict[str, str]:
    """Rows of text, one at least, as parameters for `rows_given`."""
    if dialect != "postgresql":
        return {name: json.dumps(list(rows))}
    values = zip(*([_NONE if value is None else value for value in row] for row in rows), strict=True)
    return {f"{name}_{column}": _array(of_column) for column, of_column in zip(columns, values, strict=True)}


def rows_given(dialect: str, name: str, columns: Sequence[str]) -> Any:
    """What `packed_rows` packed, as a table that a statement can join."""
    if dialect != "postgresql":
        row = func.json_each(bindparam(name, type_=String)).table_valued("value").c.value
        return select(*(func.json_extract(row, f"$[{n}]").label(column) for n, column in enumerate(columns))).subquery()
    arrays = {column: cast(bindparam(f"{name}_{column}", type_=String), _text_array()) for column in columns}
    given = select(*(func.unnest(array).label(column) for column, array in arrays.items())).subquery()
    return select(*(func.nullif(given.c[column], _NONE).label(column) for column in columns)).subquery()


def _member(dialect: str, column: Any, values: ColumnElement[str]) -> ColumnElement[bool]:
    if dialect == "postgresql":
        found: ColumnElement[bool] = column == any_(cast(values, _text_array()))
    else:
        found = column.in_(select(func.json_each(values).table_valued("value").c.value))
    return found


@functools.cache
def _text_array() -> Any:
    from sqlalchemy.dialects.postgresql import ARRAY  # which loads every driver of it that SQLAlchemy knows

    return ARRAY(String)


def _array(values: Iterable[str]) -> str:
    # As text, since the driver takes a list apart value by value.
    values = list(values)
    text_ = ",".join(values)
    # Looked at as a whole: one by one, this would cost as much as all else that a statement takes.
    if _PLAIN.fullmatch(text_) and text_.count(",") < len(values) and "null" not in text_.lower() and "" not in values:
        return f"{{{text_}}}"
    return "{" + ",".join('"' + re.sub(r'(["\\\\])', r"\\\1", v) + '"' for v in values) + "}"


@functools.cache
def was(*states: JobState) -> ColumnElement[bool]:
    """Whether a job that is found by its id is in one of the states: the condition for an update, never a way to find rows.

    As `has_state` it would offer the index on all rows of that state: planned while these were few, PostgreSQL then reads all of
    a million queued rows for each micro-batch.
    """
    plain: ColumnElement[str] = Job.c.state.concat(literal_column("''"))
    if len(states) > 1:
        return plain.in_([literal_column(f"'{state}'") for state in states])
    return plain == literal_column(f"'{states[0]}'")


@functools.cache
def has_state(*states: JobState) -> ColumnElement[bool]:
    """Whether a job is in one of the states, by its ``place``, written out: only then can a database use an index on jobs in that place."""
    still = [state for state in states if state not in _FLYING]
    flying = [state for state in states if state in _FLYING]
    found = []
    if len(still) == 1:
        found.append(Job.c.place == literal_column(f"'{still[0]}'"))
    elif still:
        found.append(Job.c.place.in_([literal_column(f"'{state}'") for state in still]))
    if flying:
        there: ColumnElement[bool] = Job.c.place == literal_column("'flying'")
        found.append(there if len(flying) == len(_FLYING) else and_(there, was(*flying)))
    return or_(*found)


def insert_rows(
    conn: Connection, table: Any, columns: Sequence[str], rows: Iterable[tuple[Any, ...]], replacing: Sequence[str] = ()
) -> None:
    """Insert many rows, quickly: COPY on PostgreSQL, one prepared statement on SQLite.

    Args:
        conn: Connection in a write transaction.
        table: Where to; of `db.tables`.
        columns: Names of the columns; all others take the database's default.
        rows: A value for each column; JSON as text. Of an iterator, which is taken for long, some are sent before the last are there.
        replacing: Columns of a unique key: a row that has the same values there is replaced.
    """
    count = len(rows) if isinstance(rows, Sequence) else None
    if count == 0:
        return
    if conn.dialect.name == "postgresql" and not replacing and (count is None or count >= COPY_FROM):
        with prepared.cursor(conn) as cursor, cursor.copy(f"COPY {table.name} ({', '.join(columns)}) FROM STDIN") as copy:
            coming, most = iter(rows), COPY_BLOCK // 8
            while block := list(islice(coming, most)):
                text_ = _copied(block)
                copy.write(text_)
                most = min(COPY_BLOCK, max(1, COPY_BYTES * len(block) // len(text_)))
        return
    conflict = ""
    if replacing:
        rest = ", ".join(f"{name} = excluded.{name}" for name in columns if name not in replacing)
        conflict = f" ON CONFLICT ({', '.join(replacing)}) DO UPDATE SET {rest}"
    prepared.run_many(conn, insertion(conn.dialect.name, table, columns) + conflict, rows)


def _copied(rows: Sequence[tuple[Any, ...]]) -> str:
    """Rows as COPY's text. By columns: most of them hold the same value throughout, or ids, which need no look at each of them."""
    return "\n".join(map("\t".join, zip(*map(_column, zip(*rows, strict=True)), strict=True))) + "\n"


def _column(values: tuple[Any, ...]) -> Sequence[str]:
    kinds = set(map(type, values))
    if len(kinds) == 1 and values.count(values[0]) == len(values):
        return [_cell(values[0])] * len(values)
    if kinds == {str} and not _SPECIAL.search("".join(values)):
        return values
    return list(map(_cell, values))


def _cell(value: Any) -> str:
    if value is None:
        return "\\N"
    return _SPECIAL.sub(lambda found: _ESCAPES[found[0]], str(value)) if isinstance(value, str) else str(value)


def insertion(dialect: str, table: Any, columns: Sequence[str]) -> str:
    """Text of a statement that inserts a row whose values follow as the driver takes them."""
    marks = ", ".join(["%s" if dialect == "postgresql" else "?"] * len(columns))
    return f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES ({marks})"  # noqa: S608 - names of our own


__all__ = ["COPY_FROM", "among", "among_given", "dumps", "has_state", "insert_rows", "insertion", "packed", "packed_rows", "rows_given", "statement_text", "was"]

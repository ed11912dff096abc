"""Rows on their quick way into a database come out as they went in."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Boolean, Column, Double, Integer, MetaData, Table, Text, select

from db.sql import COPY_FROM, insert_rows

ODD = ["", "\\N", "\\", "\\t", "\t", "a\tb\nc\rd", "100 %", "%s", "%%", "{}", "NULL", "Grüße 𝄞 مرحبا", '{"a": "\\\\"}', "\x0b\x0c\x85\u2028"]
WORDS = st.sampled_from(ODD) | st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]))
ROWS = st.lists(
    st.tuples(
        st.none() | WORDS, st.none() | st.integers(-(2**31), 2**31 - 1), st.none() | st.booleans(), st.none() | st.floats(allow_nan=False), st.just("%\t")
    ),
    min_size=COPY_FROM, max_size=COPY_FROM + 4,
)  # fmt: skip
TABLE = Table(
    "odd", MetaData(), Column("n", Integer, primary_key=True), Column("word", Text), Column("number", Integer), Column("truth", Boolean),
    Column("measure", Double), Column("same", Text),
)  # fmt: skip


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_what_goes_in_comes_out(database, rows):
    with database.write() as conn:
        TABLE.drop(conn, checkfirst=True)
        TABLE.create(conn)
        insert_rows(conn, TABLE, ("n", "word", "number", "truth", "measure", "same"), [(n, *row) for n, row in enumerate(rows)])
        assert [tuple(row) for row in conn.execute(select(*list(TABLE.c)[1:]).order_by(TABLE.c.n))] == rows

"""Statements of the hot path on their way to PostgreSQL: sent by libpq as soon as a connection knows them.

What a driver's cursor does around each statement (a query object, caches made anew, a generator for every step) costs a process that has just
slept as much as the database's answer, and a job that somebody waits for has a handful of statements. Values are written and read by the
driver's own adapters, errors are the driver's own.
"""

import itertools
import re
import select
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from psycopg import pq
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import Error, OperationalError, error_from_result
from sqlalchemy import Connection

SEEN = 4
"""How often a connection has seen a statement, with values of these types, before it has the server keep it: to do so takes a round trip."""
CANCEL_S = 5.0
"""Longest wait for the server's word that it gives up a statement, seconds."""
MOST = 500
"""Statements that a connection counts or keeps; beyond them the driver's cursor takes over."""
_IDLE, _INTRANS = pq.TransactionStatus.IDLE, pq.TransactionStatus.INTRANS
_FAULTS = frozenset({pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.BAD_RESPONSE, pq.ExecStatus.PIPELINE_ABORTED})
_NOT_KEPT = b"26000"
_PLACE = re.compile(r"%(?:\((\w+)\)s|s|%)")


@cache
def numbered(text: str) -> tuple[bytes, tuple[str, ...] | None]:
    """A statement of the driver's as the server reads it, and the names of its parameters in order; None where they have none."""
    names: dict[str, int] = {}
    places = 0

    def place(found: "re.Match[str]") -> str:
        nonlocal places
        if found[0] == "%%":
            return "%"
        if name := found[1]:
            return f"${names.setdefault(name, len(names) + 1)}"
        places += 1
        return f"${places}"

    told = _PLACE.sub(place, text).encode()
    if names and places:
        raise TypeError(f"parameters with and without names in one statement: {text}")
    return told, None if places else tuple(names)


class Wire:
    """A connection to PostgreSQL as `ask` uses it.

    Args:
        raw: The driver's connection.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._libpq = raw.pgconn
        self._values = Transformer(raw)
        self._seen: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self._kept: dict[tuple[bytes, tuple[int, ...]], bytes] = {}
        self._names = itertools.count()
        self.doubtful = False
        """Whether a transaction was rolled back since the last statement: the driver may then have told the server to keep nothing any more."""
        self._poll = select.poll()
        self._socket = self._libpq.socket
        self._poll.register(self._socket, select.POLLIN)

    def ask(
        self, text: str, values: Mapping[str, Any] | Sequence[Any], *, binary: bool = False, meanwhile: Callable[[], None] | None = None
    ) -> list[tuple[Any, ...]] | None:
        """Run a statement in the connection's transaction, which begins with it where there is none yet.

        Args:
            text: The statement, in the driver's words.
            values: Its parameters.
            binary: Whether the server is to answer in its own form of numbers.
            meanwhile: What to do while the server works on it.

        Returns:
            Its rows, none where it returns none. None where nothing was sent, because it is the driver's cursor's turn: the connection has not
            seen this statement often, or is in no state for another one.

        Raises:
            psycopg.Error: As the driver's cursor would.
        """
        libpq, raw = self._libpq, self._raw
        status = libpq.transaction_status
        if status not in (_IDLE, _INTRANS) or raw.prepare_threshold is None or libpq.pipeline_status:
            return None
        if self.doubtful:
            self._look()
        told, names = numbered(text)
        given: Any = values if names is None else [values[name] for name in names]  # type: ignore[call-overload]
        sent = self._values.dump_sequence(given, [PyFormat.AUTO] * len(given))
        types, formats = tuple(self._values.types or ()), self._values.formats
        name = self._kept.get((told, types))
        if name is None:
            name = self._keep(told, types)
            if name is None:
                return None
        begins = status == _IDLE and not raw.autocommit
        try:
            if begins:
                libpq.enter_pipeline_mode()
                libpq.send_query_params(b"BEGIN", None)
            libpq.send_query_prepared(name, sent, formats, pq.Format.BINARY if binary else pq.Format.TEXT)
            if begins:
                libpq.pipeline_sync()
            self._flush()
        except BaseException:
            raw.close()  # nobody knows how much of it was sent
            raise
        try:
            if meanwhile:
                meanwhile()
        except BaseException:
            self._answers(begins)
            raise
        return self._rows(self._answers(begins))

    def _look(self) -> None:
        """Forget what the server does not keep."""
        self._libpq.send_query_params(b"SELECT name FROM pg_prepared_statements", None)
        self._flush()
        there = {row[0].encode() for row in self._rows(self._answers(False))}
        self._kept = {key: name for key, name in self._kept.items() if name in there}
        self.doubtful = False

    def _keep(self, told: bytes, types: tuple[int, ...]) -> bytes | None:
        """Have the server keep a statement that was seen often enough; its name."""
        key = (told, types)
        seen = self._seen.get(key, 0)
        if seen < SEEN:
            if seen or len(self._seen) < MOST:
                self._seen[key] = seen + 1
            return None
        name = f"kept_{next(self._names)}".encode()
        self._libpq.send_prepare(name, told, types)
        self._flush()
        self._rows(self._answers(False))
        self._kept[key] = name
        return name

    def _rows(self, answers: list[Any]) -> list[tuple[Any, ...]]:
        answer = next((each for each in answers if each.status in _FAULTS), answers[-1])
        if answer.status in _FAULTS:
            if answer.error_field(pq.DiagnosticField.SQLSTATE) == _NOT_KEPT:
                self._raw.close()  # somebody else's doing, a pooler's say: on a new connection it can be done again
            raise error_from_result(answer, encoding=self._raw.info.encoding if not self._raw.closed else "utf-8")
        if not answer.nfields:
            return []
        self._values.set_pgresult(answer)
        return self._values.load_rows(0, answer.ntuples, tuple)

    def _flush(self) -> None:
        while self._libpq.flush():
            self._await(select.POLLIN | select.POLLOUT)

    def _await(self, for_what: int) -> None:
        """Wait for the server; in steps, since a signal's handler runs only between them."""
        if for_what != select.POLLIN:
            self._poll.modify(self._socket, for_what)
        try:
            while not (found := self._poll.poll(100)):
                pass
        finally:
            if for_what != select.POLLIN:
                self._poll.modify(self._socket, select.POLLIN)
        if any(event & ~select.POLLOUT for _, event in found):
            self._libpq.consume_input()

    def _answers(self, pipelined: bool) -> list[Any]:
        """What the server answers to all that was sent, but for the word that this is all."""
        found: list[Any] = []
        try:
            self._collect(found, pipelined)
        except Error:
            self._raw.close()
            raise
        except BaseException:
            # Interrupted: the statement is given up, and the connection stays good for the end of the transaction.
            try:
                self._raw.cancel_safe(timeout=CANCEL_S)
                self._collect(found, pipelined)
            except BaseException:
                self._raw.close()
            raise
        if not found:
            self._raw.close()
            raise OperationalError("the connection was lost before an answer came")
        return found

    def _collect(self, found: list[Any], pipelined: bool) -> None:
        libpq = self._libpq
        while True:
            while libpq.is_busy():
                self._await(select.POLLIN)
            answer = libpq.get_result()
            if answer is None:
                if not pipelined or libpq.status == pq.ConnStatus.BAD:
                    return
            elif answer.status == pq.ExecStatus.PIPELINE_SYNC:
                libpq.exit_pipeline_mode()
                return
            else:
                found.append(answer)


def doubt(conn: Connection) -> None:
    """Say that a transaction on this connection is rolled back."""
    if not conn.closed and not conn.invalidated and (known := conn.info.get("wire")) is not None:
        known.doubtful = True


def ask(
    conn: Connection, text: str, values: Any, *, binary: bool = False, meanwhile: Callable[[], None] | None = None
) -> list[tuple[Any, ...]] | None:
    """`Wire.ask` on a connection of SQLAlchemy's."""
    wire = conn.info.get("wire")
    if wire is None:
        wire = conn.info["wire"] = Wire(conn.connection.dbapi_connection)
    found: list[tuple[Any, ...]] | None = wire.ask(text, values, binary=binary, meanwhile=meanwhile)
    return found


__all__ = ["ask", "doubt", "numbered"]

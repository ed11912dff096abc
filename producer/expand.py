"""A batch's accepted lines become rows of the ledger, chunk by chunk, wherever the last one who did that stopped."""

import gzip
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import structlog

from contentfactory.errors import FactoryError, InputError, NotFound
from contentfactory.fastjson import dumps_sorted, loads
from contentfactory.ids import stable_seed
from contentfactory.jobs.spec import get_kind
from contentfactory.states import BatchState
from db import batches, counters, lifecycle
from db.session import Database
from producer.job_ids import form_of, job_ids
from producer.models import ModelPins
from producer.references import batch_job, pin_datasets, rename_refs
from producer.spool import KEY, as_dict, estimate, number_of, record_number
from storage.base import ObjectStore

log = structlog.get_logger(__name__)

EXPAND_ROWS = 4000
"""Rows in one transaction."""


class Expander:
    """Turns spools into rows.

    Args:
        database: The ledger.
        store: Where the spools are.
        reuse: Whether equal earlier results may be taken at all.
        kick: Called when rows are there that may be dispatched.
    """

    def __init__(self, database: Database, store: ObjectStore, *, reuse: bool, kick: Callable[[], None]) -> None:
        self.database = database
        self.store = store
        self._reuse = reuse
        self._kick = kick

    def expand(self, batch_id: str, seconds: float | None = None) -> bool:
        """Write a batch's rows, chunk by chunk, from where the last expander stopped. Several may try: the cursor decides.

        Args:
            batch_id: Batch in state ``expanding``; or ``cancelling``, and then its lines become cancelled jobs, for every accepted
                line ends as a row.
            seconds: Longest time to spend; None to go on to the end.

        Returns:
            Whether the batch is expanded.
        """
        end = None if seconds is None else time.monotonic() + seconds
        with self.database.read() as conn:
            project_id = batches.project_of(conn, batch_id)
            row = batches.get(conn, project_id, batch_id) if project_id else None
        if row is None:
            raise NotFound(f"batch {batch_id} does not exist")
        cancelling = row["state"] == BatchState.CANCELLING and row["cursor"] < row["source"].get("jobs", 0)
        if row["state"] != BatchState.EXPANDING and not cancelling:
            return True
        cursor = row["cursor"]
        rank0 = int(row["created_at"] * 1000) * 1_000_000
        # While the database copies one chunk in, the next one is read; SQLite works in this very process and gains nothing.
        with ExitStack() as stack:
            ahead = None if self.database.sqlite else stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="expand"))
            writing: tuple[int, Future[bool]] | None = None

            def written() -> bool:
                """Whether the chunk under way got in (then the cursor stands behind it); false where another expander is ahead."""
                nonlocal cursor, writing
                if writing is None:
                    return True
                new, future = writing
                writing = None
                if not future.result():
                    return False
                if cursor == 0:
                    self._kick()
                cursor = new
                return True

            try:
                before = cursor
                for chunk in self._records(row["source"]["object_key"], cursor):
                    new = record_number(chunk[-1])
                    rows = self._chunk_rows(row, chunk, rank0)
                    if not written():
                        return False
                    step = partial(self._write_chunk, batch_id, row["project_id"], rows, before, new)
                    if ahead is None:
                        done: Future[bool] = Future()
                        done.set_result(step())
                        writing = (new, done)
                    else:
                        writing = (new, ahead.submit(step))
                    before = new
                    if end is not None and time.monotonic() > end:
                        written()
                        return False
                if not written():
                    return False
            except FactoryError as error:
                if error.retryable:
                    raise
                told = error.to_dict()
                self.database.run(lambda conn: batches.fail(conn, batch_id, told))
                log.error("batch_failed", action="expand", batch=batch_id, code=error.code)
                return True
        self.database.run(lambda conn: batches.expanded(conn, batch_id))
        self.database.run(lambda conn: counters.close_batches(conn, [batch_id]))
        self._kick()
        return True

    def _records(self, object_key: str, after: int) -> Iterator[list[Any]]:
        chunk: list[Any] = []
        with self.store.open(object_key) as raw, gzip.GzipFile(fileobj=raw) as stream:
            for data in stream:
                if after and number_of(data) <= after:
                    continue
                chunk.append(loads(data))
                if len(chunk) >= EXPAND_ROWS:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk

    def _chunk_rows(self, batch: Any, chunk: Sequence[Any], rank0: int) -> list[lifecycle.NewJob]:
        batch_id, project_id, source = batch["id"], batch["project_id"], batch["source"]
        rows: list[lifecycle.NewJob] = []
        hard: list[tuple[int, Mapping[str, Any]]] = []
        job_id = job_ids(batch_id, form_of(batch))
        usual, reuse = source.get("priority", 0), source.get("reuse", True) and self._reuse
        for record in chunk:
            if isinstance(record, dict) or record[KEY] is None:
                hard.append((len(rows), record if isinstance(record, dict) else as_dict(record, usual, source.get("reuse", True))))
                rows.append(None)  # type: ignore[arg-type]
                continue
            n, custom_id, kind, params, parents, priority, seed, labels, seconds, model, share_key = record
            spec = get_kind(kind)
            rows.append(
                lifecycle.NewJob(
                    id=job_id(custom_id), project_id=project_id, batch_id=batch_id, custom_id=custom_id, line=n,
                    rank=rank0 + min(n, 999_999), kind=kind, queue=spec.queue, params=params, share_key=share_key, seconds=seconds,
                    seed=seed, model=model, priority=priority or usual,
                    parents=tuple(batch_job(job_id, p) for p in parents), reuse=reuse and spec.cacheable, labels=labels,
                )
            )  # fmt: skip
        if hard:
            with self.database.read() as conn:
                pins = ModelPins(conn, project_id)
                for at, record in hard:
                    rows[at] = self._row(conn, record, batch_id, project_id, pins, rank0, job_id)
        return rows

    def _write_chunk(self, batch_id: str, project_id: str, rows: Sequence[lifecycle.NewJob], old: int, new: int) -> bool:
        unsure = False

        def work(conn: Any) -> bool:
            nonlocal unsure
            state = batches.advance(conn, batch_id, old, new, len(rows))
            if state is None:
                # Where the answer to our own commit was lost, the one who moved the cursor was this call.
                row = batches.get(conn, project_id, batch_id) if unsure else None
                return row is not None and row["cursor"] == new
            unsure = True
            # The cursor moves in the same transaction, so nobody can have written these rows before.
            lifecycle.insert_jobs(conn, rows, fresh=True)
            if state == BatchState.CANCELLING:
                lifecycle.cancel_jobs(conn, [row.id for row in rows])
            return True

        return self.database.run(work)

    def _row(self, conn: Any, record: Mapping[str, Any], batch_id: str, project_id: str, pins: ModelPins, rank0: int,
             job_id: Callable[[str], str]) -> lifecycle.NewJob:  # fmt: skip
        spec = get_kind(record["kind"])
        parsed = pin_datasets(conn, project_id, rename_refs(spec.validate(record["params"]), partial(batch_job, job_id)))
        try:
            model = pins.pin(spec, getattr(parsed, "model", None))
        except InputError:
            if not record["parents"]:
                raise
            # Made by a training job of this batch: the worker takes the newest version once the parents have succeeded.
            model = parsed.model  # type: ignore[attr-defined]
        seed = record["seed"]
        return lifecycle.NewJob(
            id=job_id(record["id"]), project_id=project_id, batch_id=batch_id, custom_id=record["id"],
            line=record["n"], rank=rank0 + min(record["n"], 999_999), kind=spec.name, queue=spec.queue,
            params=parsed.model_dump(mode="json"), share_key=spec.share_key(parsed, model), seconds=estimate(spec, parsed),
            seed=seed if seed is not None else stable_seed(record["id"], dumps_sorted(record["params"])),
            model=model, priority=record["priority"],
            parents=tuple(batch_job(job_id, p) for p in record["parents"]),
            reuse=record["reuse"] and spec.cacheable and self._reuse, labels=record["labels"],
        )  # fmt: skip

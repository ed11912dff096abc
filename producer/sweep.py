"""The sweep: rows past their retention, objects that nothing points at, temporary files of processes that are gone."""

import itertools
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import structlog

from contentfactory.settings import Settings
from db import lifecycle, retention
from db.session import Database
from storage.base import ObjectStore

log = structlog.get_logger(__name__)

PAGE = 100
PATIENCE_S = lifecycle.MARK_S / 4
"""A sweep that has taken so long since it marked a page lets it be: its marks will not protect anybody much longer."""
MARKS_KEPT_S = 3600.0
"""How long a mark outlives the deletion: longer than finished work waits for its commit."""
_SCRATCH = re.compile(r"-(\d+)-[^-]*$")


@dataclass
class Swept:
    """What a sweep removed."""

    jobs: int = 0
    batches: int = 0
    inputs: int = 0
    events: int = 0
    objects: int = 0
    bytes: int = 0
    temporary: int = 0


def sweep(settings: Settings, database: Database, store: ObjectStore, *, dry_run: bool = False) -> Swept:
    """Remove what may go. Safe beside everything else that runs, and when it is killed half-way.

    Args:
        settings: ``retention_days`` and ``sweep_window_s``.
        database: The ledger.
        store: Object storage.
        dry_run: Only count objects; remove nothing.
    """
    out = Swept()
    if settings.retention_days and not dry_run:
        age = settings.retention_days * 86400
        out.jobs = _all(database, partial(retention.expire_jobs, older_than_s=age))
        _all(database, partial(retention.expire_micro_batches, older_than_s=age))
        out.batches = _all(database, partial(retention.expire_batches, older_than_s=age))
        out.inputs = database.run(partial(retention.expire_inputs, older_than_s=age))
        out.events = _all(database, partial(retention.expire_events, older_than_s=age))
    _objects(settings, database, store, out, dry_run)
    if not dry_run:
        out.temporary = store.sweep_temporary(settings.sweep_window_s) + _scratch(settings)
    log.info("swept", action="sweep", dry_run=dry_run, **asdict(out))
    return out


def _all(database: Database, work: Callable[[Any], int]) -> int:
    total = 0
    while n := database.run(work):
        total += n
    return total


def _objects(settings: Settings, database: Database, store: ObjectStore, out: Swept, dry_run: bool) -> None:
    if not dry_run:
        leftovers = database.run(partial(retention.left_over, older_than_s=MARKS_KEPT_S))
        if leftovers:
            database.run(partial(retention.spare, keys=leftovers))
    with database.read() as conn:
        if not retention.any_artifact(conn):
            # A ledger that was just made, or the wrong one, knows no object: everything in the store would be an orphan.
            log.warning("sweep_skipped", action="sweep", reason="the ledger has no artifact; is it the right one for this store?")
            return
        # The ledger's clock: this machine's may be a day ahead, and everything would look old.
        edge = lifecycle.database_time(conn) - settings.sweep_window_s
    found = (item for item in store.list("projects/") if item.modified_at < edge)
    while page := list(itertools.islice(found, PAGE)):
        sizes = {item.key: item.size for item in page}
        with database.read() as conn:
            orphans = sorted(set(sizes) - retention.referenced(conn, list(sizes)))
        if dry_run:
            out.objects += len(orphans)
            out.bytes += sum(sizes[key] for key in orphans)
            continue
        if orphans:
            _delete(settings, database, store, orphans, sizes, out)


def _delete(settings: Settings, database: Database, store: ObjectStore, orphans: list[str], sizes: dict[str, int], out: Swept) -> None:
    """Mark, look again, delete: nobody can begin to point at an object between the look and the deletion, nor at a deleted one."""
    # Another sweep may be at the same objects: each touches only what it marked itself.
    orphans = database.run(partial(retention.doom, keys=orphans))
    gone: list[str] = []
    try:
        with database.read() as conn:
            marked_at = lifecycle.database_time(conn)
            still = set(orphans) - retention.referenced(conn, orphans)
        # Put again a moment ago: somebody is about to point at it, and was refused only if they came after the mark.
        heads = [store.head(key) for key in sorted(still)]
        old = [head.key for head in heads if head is not None and head.modified_at < marked_at - settings.sweep_window_s]
        with database.read() as conn:
            late = lifecycle.database_time(conn) - marked_at > PATIENCE_S
        if old and not late:
            gone = old
            store.delete(gone)
            database.run(partial(retention.gone, keys=gone))
            out.objects += len(gone)
            out.bytes += sum(sizes[key] for key in gone)
    finally:
        database.run(partial(retention.spare, keys=sorted(set(orphans) - set(gone))))


def _scratch(settings: Settings) -> int:
    """Remove scratch folders whose process is gone (their names end in its number)."""
    n = 0
    if not settings.scratch.is_dir():
        return 0
    for folder in settings.scratch.iterdir():
        match = _SCRATCH.search(folder.name)
        if match is None:
            continue
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
            n += 1
        except OSError:
            continue
    return n



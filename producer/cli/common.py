"""What every command shares: opening services, output for people and machines, errors as exit codes."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from contentfactory.errors import ConfigError, FactoryError, NotFound, ServiceUnavailable

if TYPE_CHECKING:
    # pydantic takes as long to load as everything else that `factory --help` needs.
    from contentfactory.settings import Settings

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

EXIT_FAILED, EXIT_USAGE, EXIT_SERVICE, EXIT_INTERRUPTED = 1, 2, 3, 130


@dataclass
class Factory:
    """Services of one command, opened when first used."""

    settings: "Settings"
    broker: bool = False

    @cached_property
    def database(self) -> Any:
        """The ledger, migrated."""
        from db import migrate
        from db.session import Database

        database = Database(self.settings.database())
        migrate.upgrade(database)
        return database

    @cached_property
    def store(self) -> Any:
        """Object storage."""
        from producer.services import open_store

        return open_store(self.settings)

    @cached_property
    def publisher(self) -> Any:
        """The broker, or None where none runs: jobs then wait in the ledger."""
        from producer.publish import Publisher

        try:
            return Publisher(self.settings)
        except ServiceUnavailable:
            return None

    @cached_property
    def producer(self) -> Any:
        """The accepting side."""
        from producer.enqueue import Producer

        return Producer(self.settings, self.database, self.store, self.publisher)

    @cached_property
    def project_id(self) -> str:
        """Id of the settings' project."""
        from db import projects

        return str(self.database.run(lambda conn: projects.ensure(conn, self.settings.project)))

    def find_batch(self, batch_id: str) -> Mapping[str, Any]:
        """A batch by id, by the beginning of its id, or ``last``.

        Raises:
            NotFound: If there is none, or more than one fits.
        """
        from db import batches

        with self.database.read() as conn:
            row = batches.get(conn, self.project_id, batch_id)
            if row is not None:
                return dict(row)
            recent = batches.list_page(conn, self.project_id, limit=200)
        fitting = recent[:1] if batch_id == "last" else [r for r in recent if r["id"].startswith(batch_id)]
        if len(fitting) != 1:
            what = "does not exist" if not fitting else f"fits {len(fitting)} batches"
            raise NotFound(f"batch {batch_id!r} {what}; see `factory batch list`")
        return dict(fitting[0])

    def find_job(self, job_id: str) -> Mapping[str, Any]:
        """A job by id, or as ``<batch>:<custom_id>``.

        Raises:
            NotFound: If there is none.
        """
        from db import jobs
        from producer.job_ids import form_of, job_id_for

        batch, colon, custom_id = job_id.partition(":")
        if colon:
            found = self.find_batch(batch)
            job_id = job_id_for(found["id"], custom_id, form_of(found))
        with self.database.read() as conn:
            row = jobs.get(conn, self.project_id, job_id)
        if row is None:
            raise NotFound(f"job {job_id!r} does not exist; see `factory jobs list`")
        return dict(row)

    def close(self) -> None:
        """Close what was opened."""
        for name in ("publisher", "store", "database"):
            opened = self.__dict__.get(name)
            if opened is not None:
                opened.close()


@contextmanager
def factory(**overrides: Any) -> Iterator[Factory]:
    """Open a command's services; errors become one clear line and an exit code."""
    from contentfactory.service import load_quickly

    load_quickly(["structlog"])
    from contentfactory.settings import load_settings

    opened: Factory | None = None
    try:
        settings = load_settings(**overrides)
        _quiet(settings)
        opened = Factory(settings)
        yield opened
    except FactoryError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        if opened is not None:
            opened.close()


def _quiet(settings: "Settings") -> None:
    """The CLI talks to a person: only warnings of the libraries below come through."""
    import logging

    import structlog

    from producer.logs import StandardError

    level = logging.DEBUG if settings.log_level == "debug" else logging.ERROR
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level), logger_factory=structlog.PrintLoggerFactory(cast(TextIO, StandardError()))
    )


def fail(error: FactoryError) -> None:
    """Print an error and leave with the exit code of its class."""
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": error.to_dict()}, ensure_ascii=False) + "\n")
    sys.stderr.write(f"error: {error.message}\n")
    service = isinstance(error, ServiceUnavailable | ConfigError)
    raise typer.Exit(EXIT_SERVICE if service else EXIT_USAGE)


def emit(value: Any) -> None:
    """Print JSON."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def table(rows: Sequence[Sequence[Any]], header: Sequence[str], empty: str) -> None:
    """Print rows in columns."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print_line(empty)
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        grid.add_column(name, overflow="fold" if name in ("message", "error", "value") else "ellipsis", no_wrap=name in ("id",))
    for row in rows:
        grid.add_row(*("" if cell is None else str(cell) for cell in row))
    console = Console()
    # A pipe has no width of its own; ids must not be cut there.
    if not console.is_terminal:
        console = Console(width=240)
    console.print(grid)


def print_line(text: str = "") -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")


def moment(at: float | None) -> str:
    """A time for a person: local, to the second."""
    return "" if at is None else datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float | None) -> str:
    """A duration for a person."""
    if seconds is None:
        return ""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def ago(at: float) -> str:
    """How long since."""
    return duration(time.time() - at) + " ago"

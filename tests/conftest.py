"""Fixtures that several kinds of test share: a ledger on each database, a project, quick ways to make jobs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contentfactory.ids import new_id
from contentfactory.jobs.spec import get_kind
from db import lifecycle, migrate, projects
from db.session import Database


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A migrated, empty ledger; the test runs once on each database."""
    url = f"sqlite:///{tmp_path / 'factory.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_database")
    opened = Database(url)
    migrate.upgrade(opened)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    """A migrated, empty SQLite ledger."""
    opened = Database(f"sqlite:///{tmp_path / 'factory.db'}")
    migrate.upgrade(opened)
    yield opened
    opened.close()


@pytest.fixture
def project(database: Database) -> str:
    """Id of a project."""
    return database.run(lambda conn: projects.ensure(conn, "default"))


@pytest.fixture
def make_jobs(database: Database, project: str) -> Callable[..., list[str]]:
    """Accept ``n`` echo jobs; keyword arguments go into each `NewJob`."""

    def make(n: int = 1, **fields: Any) -> list[str]:
        kind = get_kind(fields.pop("kind", "text.echo"))
        rows = []
        for index in range(n):
            params = kind.validate(fields.get("params", {"text": f"job {index}"}))
            row = {
                "id": new_id("job"), "project_id": project, "kind": kind.name, "queue": kind.queue,
                "params": params.model_dump(mode="json"), "share_key": kind.share_key(params, None), "seconds": 1.0, "seed": index,
                **{k: v for k, v in fields.items() if k != "params"},
            }  # fmt: skip
            rows.append(lifecycle.NewJob(**row))
        database.run(lambda conn: lifecycle.insert_jobs(conn, rows, fresh=n > 8))
        return [row.id for row in rows]

    return make

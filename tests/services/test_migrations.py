"""A ledger with rows in it goes through every migration, up and down, and loses none."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from contentfactory.ids import new_id
from db import jobs, lifecycle, migrate, models
from db.session import Database

FIRST = "0001"
TABLES = ("projects", "batches", "jobs", "job_dependencies", "attempts", "artifacts", "events", "batch_counts", "shares")
LATER = {("jobs", "place"), ("jobs", "micro_batch")}
"""Columns that the first release did not have."""


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path):
    """A database without a table."""
    url = f"sqlite:///{tmp_path / 'factory.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_database")
    opened = Database(url)
    yield opened
    opened.close()


def insert(conn, table: str, **values: Any) -> None:
    conn.execute(text(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join(':' + v for v in values)})"), values)


def fill(database: Database, jobs: int = 5) -> None:
    """Rows as the first release wrote them: every column without a default of the database's own is named."""
    with database.write() as conn:
        insert(conn, "projects", id="p", name="default", weight=1.0, paused=False, created_at=1.0)
        insert(conn, "shares", queue="text", project_id="p", virtual_seconds=2.0)
        insert(conn, "batches", id="b", project_id="p", name="n", state="running", paused=False, priority=0, source="{}", cursor=5, total=5,
               labels="{}", created_at=1.0)  # fmt: skip
        insert(conn, "batch_counts", batch_id="b", kind="text.echo", state="total", n=5)
        for n in range(jobs):
            insert(
                conn, "jobs", id=f"job_{n:032x}", project_id="p", batch_id="b", custom_id=f"é{n}", line=n, kind="text.echo", queue="text",
                state=("queued", "running", "succeeded", "failed", "blocked")[n], priority=0, band=100, rank=n, params='{"text": "é"}', seed=n,
                seconds=0.5, share_key="k", reuse=True, pending=int(n == 4), run_after=0.0, attempt=int(n in (1, 2, 3)), strikes=0, tries="{}",
                group_limit=0, group_size=1, cancel_requested=False, labels="{}", created_at=1.0, idempotency_key=f"key{n}" if n < 2 else None,
                lease_until=5e9 if n == 1 else None, finished_at=2.0 if n in (2, 3) else None,
            )  # fmt: skip
        insert(conn, "job_dependencies", job_id=f"job_{4:032x}", parent_id=f"job_{0:032x}")
        insert(conn, "attempts", job_id=f"job_{2:032x}", attempt=1, worker="w", group_size=1, started_at=1.0)
        insert(conn, "artifacts", id="a", project_id="p", job_id=f"job_{2:032x}", attempt=1, position=0, role="output", name="text.txt",
               object_key="k", sha256="0" * 64, size=1, media_type="text/plain", meta="{}", parents="[]", created_at=1.0)  # fmt: skip
        insert(conn, "events", at=1.0, type="job.succeeded", project_id="p", batch_id="b", job_id=f"job_{2:032x}", data="{}")


def contents(database: Database) -> dict[str, list[Any]]:
    """Every row of every table, in the columns that the first release had."""
    with database.read() as conn:
        rows = {t: conn.execute(text(f"SELECT * FROM {t}")).mappings().all() for t in TABLES}
    return {t: sorted(tuple(str(v) for k, v in row.items() if (t, k) not in LATER) for row in found) for t, found in rows.items()}


def test_rows_go_through_every_migration(empty):
    migrate.upgrade(empty, FIRST)
    fill(empty)
    before = contents(empty)
    migrate.upgrade(empty)
    assert migrate.differences(empty) == []
    assert contents(empty) == before
    # What is written with the old rows around: a new job beside them, its state changed.
    row = lifecycle.NewJob(id=new_id("job"), project_id="p", kind="text.echo", queue="text", params={}, share_key="k", seconds=1.0, seed=1)
    empty.run(lambda conn: lifecycle.insert_jobs(conn, [row], fresh=True))
    hints = empty.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=1e6))
    assert {i for hint in hints for i in hint.ids} == {row.id, f"job_{0:032x}"}
    with empty.write() as conn:
        conn.execute(text("DELETE FROM jobs WHERE id = :id"), {"id": row.id})
        conn.execute(text("UPDATE jobs SET state = 'queued', dispatched_at = NULL WHERE state = 'dispatched'"))
        conn.execute(text("UPDATE shares SET virtual_seconds = 2.0"))
    migrate.downgrade(empty, FIRST)
    assert contents(empty) == before
    migrate.upgrade(empty)
    assert contents(empty) == before
    assert migrate.differences(empty) == []


def test_each_migration_can_be_taken_alone(empty):
    """Release by release, as an operator does who skips none."""
    from alembic.script import ScriptDirectory

    with empty.read() as conn:
        revisions = [s.revision for s in ScriptDirectory.from_config(migrate._config(conn)).walk_revisions()][::-1]
    assert migrate.newest() == revisions[-1]
    for revision in revisions:
        migrate.upgrade(empty, revision)
        assert migrate.current(empty) == revision
    assert migrate.differences(empty) == []
    for revision in revisions[-2::-1]:
        migrate.downgrade(empty, revision)
        assert migrate.current(empty) == revision


def test_successes_keep_their_attempts_on_the_way_back(empty):
    """An earlier release looks for them among the attempts, and finds those of before the migration and of after it."""
    migrate.upgrade(empty, "0006")
    fill(empty)
    migrate.upgrade(empty)
    rows = [
        lifecycle.NewJob(id=new_id("job"), project_id="p", kind="text.echo", queue="text", params={}, share_key="k", seconds=1.0, seed=n)
        for n in range(3)
    ]
    ids = [row.id for row in rows]
    empty.run(lambda conn: lifecycle.insert_jobs(conn, rows, fresh=True))
    claimed = empty.run(lambda conn: lifecycle.claim(conn, ids, "w", 30.0))
    results = [lifecycle.Success(c.id, c.attempt, phases={"compute_s": 1.0}) for c in claimed[:2]]
    empty.run(lambda conn: lifecycle.finish(conn, results))
    migrate.downgrade(empty, "0006")
    with empty.read() as conn:
        found = conn.execute(text("SELECT job_id, attempt, worker, group_size, outcome FROM attempts ORDER BY job_id")).all()
        assert [tuple(row) for row in found] == [(f"job_{2:032x}", 1, "w", 1, None), (ids[0], 1, "w", 3, "succeeded"), (ids[1], 1, "w", 3, "succeeded")]
    migrate.upgrade(empty)
    assert migrate.differences(empty) == []
    with empty.read() as conn:
        assert [a["outcome"] for a in jobs.attempts(conn, ids[0])] == ["succeeded"]
        assert conn.execute(text("SELECT count(*) FROM ended_attempts")).scalar() == 3


def test_the_view_of_the_models_is_that_of_the_migrations(empty):
    """Alembic compares tables only."""
    query = "SELECT pg_get_viewdef('ended_attempts')" if not empty.sqlite else "SELECT sql FROM sqlite_master WHERE name = 'ended_attempts'"
    migrate.upgrade(empty)
    with empty.write() as conn:
        migrated = conn.execute(text(query)).scalar()
        conn.execute(text("DROP VIEW ended_attempts"))
        conn.execute(text(models.ENDED_ATTEMPTS))
        assert conn.execute(text(query)).scalar() == migrated


def test_a_ledger_that_is_new_enough_needs_no_alembic(empty):
    """It takes as long to load as a listing."""
    migrate.upgrade(empty)
    url = empty.engine.url.render_as_string(hide_password=False)
    script = "import sys; from db import migrate; from db.session import Database; d = Database(sys.argv[1]); migrate.upgrade(d); d.close(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, url], check=True, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    assert "db.migrate" in done.stdout.split()
    assert "alembic" not in done.stdout.split()

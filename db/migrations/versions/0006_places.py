"""jobs are found by their place, which a claim does not change, and no index names their state; pages are left half empty"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_PLACE = "CASE WHEN state IN ('dispatched', 'running') THEN 'flying' ELSE state END"
_SAME = {
    "ix_jobs_queued": (["queue", "project_id", "band", "rank", "id"], "{} = 'queued'"),
    "ix_jobs_batch_unwell": (["batch_id", "line", "id"], "{} IN ('failed', 'dead', 'cancelled')"),
    "ix_jobs_unwell": (["project_id", "id"], "{} IN ('failed', 'dead', 'cancelled')"),
    "ix_jobs_batch_succeeded": (["batch_id", "line", "id"], "{} = 'succeeded' AND batch_id IS NOT NULL"),
    "ix_jobs_succeeded": (["project_id", "id"], "{} = 'succeeded'"),
    "ix_jobs_blocked": (["id"], "{} = 'blocked'"),
}
_NEW = {
    "ix_jobs_flying": (["queue", "dispatched_at"], "{} = 'flying'"),
    "ix_jobs_waiting": (["batch_id", "line", "id"], "{} IN ('blocked', 'queued') AND batch_id IS NOT NULL"),
}
_OLD = {
    "ix_jobs_dispatched": (["queue", "dispatched_at"], "{} = 'dispatched'"),
    "ix_jobs_running": (["id"], "{} = 'running'"),
    "ix_jobs_waiting": (["batch_id", "line", "id"], "{} IN ('blocked', 'queued')"),
}


def _create(indexes: dict[str, tuple[list[str], str]], column: str) -> None:
    for name, (columns, where) in indexes.items():
        condition = sa.text(where.format(column))
        op.create_index(name, "jobs", columns, postgresql_where=condition, sqlite_where=condition)


def upgrade() -> None:
    postgresql = op.get_bind().dialect.name == "postgresql"
    for name in (*_SAME, *_OLD):
        op.drop_index(name, table_name="jobs")
    # Not by way of a new table on SQLite: a column that is computed can be added to the one that is there.
    op.execute(f"ALTER TABLE jobs ADD COLUMN place VARCHAR(16) GENERATED ALWAYS AS ({_PLACE}) {'STORED' if postgresql else 'VIRTUAL'}")
    if postgresql:
        op.execute("ALTER TABLE jobs SET (fillfactor = 45)")
    _create({**_SAME, **_NEW}, "place")


def downgrade() -> None:
    for name in (*_SAME, *_NEW):
        op.drop_index(name, table_name="jobs")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE jobs RESET (fillfactor)")
    op.execute("ALTER TABLE jobs DROP COLUMN place")
    _create({**_SAME, **_OLD}, "state")

"""fewer indexes on what is written most, no foreign keys there, defaults of the database's own"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_DEFAULTS = {
    "line": "0", "priority": "0", "band": "100", "rank": "0", "seed": "0", "seconds": "1", "pending": "0", "run_after": "0",
    "attempt": "0", "strikes": "0", "tries": "'{}'", "group_limit": "0", "group_size": "1", "labels": "'{}'",
}  # fmt: skip
_NEW = {
    "ix_jobs_batch_line": (["batch_id", "line", "id"], "batch_id IS NOT NULL"),
    "ix_jobs_result": (["result_key"], "result_key IS NOT NULL"),
    "ix_jobs_waiting": (["batch_id", "line", "id"], "state IN ('blocked', 'queued')"),
    "ix_jobs_batch_unwell": (["batch_id", "line", "id"], "state IN ('failed', 'dead', 'cancelled')"),
    "ix_jobs_unwell": (["project_id", "id"], "state IN ('failed', 'dead', 'cancelled')"),
    "ix_jobs_blocked": (["id"], "state = 'blocked'"),
    "ix_jobs_running": (["id"], "state = 'running'"),
}
_OLD = {
    "ix_jobs_batch_line": (["batch_id", "line", "id"], None),
    "ix_jobs_result": (["result_key"], "state = 'succeeded'"),
    "ix_jobs_batch_state": (["batch_id", "state", "id"], None),
    "ix_jobs_running": (["lease_until"], "state = 'running'"),
}
_KEPT = {
    "ix_jobs_queued": (["queue", "project_id", "band", "rank", "id"], "state = 'queued'"),
    "ix_jobs_dispatched": (["queue", "dispatched_at"], "state = 'dispatched'"),
    "ix_jobs_project": (["project_id", "id"], None),
    "ix_jobs_retry_of": (["retry_of"], "retry_of IS NOT NULL"),
}
_FOREIGN = {
    "attempts": (("job_id", "jobs", "CASCADE"),),
    "job_dependencies": (("job_id", "jobs", "CASCADE"),),
    "artifacts": (("project_id", "projects", None), ("job_id", "jobs", None)),
    "jobs": (("project_id", "projects", None), ("batch_id", "batches", None)),
}


def _create(name: str, columns: list[str], where: str | None, table: str = "jobs", unique: bool = False) -> None:
    condition = sa.text(where) if where else None
    op.create_index(name, table, columns, unique=unique, postgresql_where=condition, sqlite_where=condition)


def upgrade() -> None:
    # Children first: SQLite makes the tables anew, and dropping a table that others refer to would empty them.
    for table, keys in _FOREIGN.items():
        if table == "jobs":
            # All of them: those that have a condition would lose it where SQLite copies the table.
            for name in (*_OLD, *_KEPT):
                op.drop_index(name, table_name="jobs")
        with op.batch_alter_table(table) as batch:
            for column, other, _ in keys:
                batch.drop_constraint(f"fk_{table}_{column}_{other}", type_="foreignkey")
            if table == "jobs":
                batch.drop_constraint("uq_jobs_batch_id_custom_id", type_="unique")
                batch.drop_constraint("uq_jobs_project_id_idempotency_key", type_="unique")
                for column, value in _DEFAULTS.items():
                    batch.alter_column(column, server_default=sa.text(value))
                batch.alter_column("reuse", server_default=sa.true())
                batch.alter_column("cancel_requested", server_default=sa.false())
    _create("uq_jobs_idempotency_key", ["project_id", "idempotency_key"], "idempotency_key IS NOT NULL", unique=True)
    for name, (columns, where) in {**_NEW, **_KEPT}.items():
        _create(name, columns, where)
    op.drop_index("ix_artifacts_sha", table_name="artifacts")
    _create("ix_artifacts_input", ["project_id", "sha256"], "role = 'input'", "artifacts")


def downgrade() -> None:
    op.drop_index("ix_artifacts_input", table_name="artifacts")
    op.create_index("ix_artifacts_sha", "artifacts", ["project_id", "sha256"])
    for name in ("uq_jobs_idempotency_key", *_NEW, *_KEPT):
        op.drop_index(name, table_name="jobs")
    for table, keys in reversed(_FOREIGN.items()):
        with op.batch_alter_table(table) as batch:
            for column, other, ondelete in keys:
                batch.create_foreign_key(f"fk_{table}_{column}_{other}", other, [column], ["id"], ondelete=ondelete)
            if table == "jobs":
                batch.create_unique_constraint("uq_jobs_batch_id_custom_id", ["batch_id", "custom_id"])
                batch.create_unique_constraint("uq_jobs_project_id_idempotency_key", ["project_id", "idempotency_key"])
                for column in (*_DEFAULTS, "reuse", "cancel_requested"):
                    batch.alter_column(column, server_default=None)
    for name, (columns, where) in {**_OLD, **_KEPT}.items():
        _create(name, columns, where)

"""jobs of a project and of a batch are listed by an index for each place: none is written with every change of a job's state"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def _create(name: str, columns: list[str], where: str | None = None) -> None:
    condition = sa.text(where) if where else None
    op.create_index(name, "jobs", columns, postgresql_where=condition, sqlite_where=condition)


def upgrade() -> None:
    _create("ix_jobs_project_waiting", ["project_id", "id"], "place IN ('blocked', 'queued')")
    op.drop_index("ix_jobs_project", table_name="jobs")
    op.drop_index("ix_jobs_batch_line", table_name="jobs")


def downgrade() -> None:
    _create("ix_jobs_project", ["project_id", "id"])
    _create("ix_jobs_batch_line", ["batch_id", "line", "id"], "batch_id IS NOT NULL")
    op.drop_index("ix_jobs_project_waiting", table_name="jobs")

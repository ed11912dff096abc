"""indexes of results, newest first; an index of artifacts by project that no query used and each artifact paid for goes"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_NEW = {
    "ix_jobs_batch_succeeded": (["batch_id", "line", "id"], "state = 'succeeded' AND batch_id IS NOT NULL"),
    "ix_jobs_succeeded": (["project_id", "id"], "state = 'succeeded'"),
}


def upgrade() -> None:
    for name, (columns, where) in _NEW.items():
        op.create_index(name, "jobs", columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))
    op.drop_index("ix_artifacts_project", table_name="artifacts")


def downgrade() -> None:
    op.create_index("ix_artifacts_project", "artifacts", ["project_id", "id"])
    for name in reversed(_NEW):
        op.drop_index(name, table_name="jobs")

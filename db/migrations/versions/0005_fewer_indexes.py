"""an index of artifacts by project that no query used and each artifact paid for"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_artifacts_project", table_name="artifacts")


def downgrade() -> None:
    op.create_index("ix_artifacts_project", "artifacts", ["project_id", "id"])

"""room in the key's pages for the versions of a job's row: PostgreSQL writes the key anew with each that changes places"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        # For pages that are written from now on; those that are there keep what they hold.
        op.execute("ALTER INDEX pk_jobs SET (fillfactor = 35)")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER INDEX pk_jobs RESET (fillfactor)")

"""a row for each micro-batch that succeeds, not for each of its jobs; a view of every attempt that has ended"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_COLUMNS = "job_id, attempt, worker, group_size, started_at, finished_at, outcome, error, phases"
_SUCCEEDED = """\
SELECT j.id, j.attempt, coalesce(m.worker, ''), j.group_size, j.started_at, j.finished_at, 'succeeded', NULL, m.phases
FROM jobs j LEFT JOIN micro_batches m ON m.id = j.micro_batch
WHERE j.place = 'succeeded' AND j.micro_batch IS NOT NULL
AND NOT EXISTS (SELECT 1 FROM attempts a WHERE a.job_id = j.id AND a.attempt = j.attempt)"""


def upgrade() -> None:
    op.create_table(
        "micro_batches",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=80), nullable=False),
        sa.Column("queue", sa.String(length=40), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=False),
        sa.Column("jobs", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=False),
        sa.Column("phases", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_micro_batches")),
    )
    op.create_index("ix_micro_batches_finished_at", "micro_batches", ["finished_at"])
    # Without a default and without a copy of the table: neither database writes a row for it.
    op.add_column("jobs", sa.Column("micro_batch", sa.BigInteger(), nullable=True))
    op.execute(f"CREATE VIEW ended_attempts AS\nSELECT {_COLUMNS} FROM attempts\nUNION ALL\n{_SUCCEEDED}")


def downgrade() -> None:
    # Earlier releases look for what succeeded among the attempts.
    op.execute(f"INSERT INTO attempts ({_COLUMNS}) {_SUCCEEDED}")
    op.execute("DROP VIEW ended_attempts")
    op.drop_column("jobs", "micro_batch")
    op.drop_table("micro_batches")

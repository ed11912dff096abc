"""learned sizes of micro-batches, jobs that warm models passed, measured inference options"""

import sqlalchemy as sa
from alembic import op

revision = '0004'
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('group_limits',
    sa.Column('share_key', sa.String(length=40), nullable=False),
    sa.Column('device', sa.String(length=40), nullable=False),
    sa.Column('kind', sa.String(length=80), nullable=False),
    sa.Column('model', sa.String(length=300), nullable=True),
    sa.Column('most', sa.Integer(), nullable=False),
    sa.Column('fits', sa.Integer(), nullable=False),
    sa.Column('refused', sa.Integer(), nullable=False),
    sa.Column('refusals', sa.Integer(), nullable=False),
    sa.Column('streak', sa.Integer(), nullable=False),
    sa.Column('best', sa.Integer(), nullable=False),
    sa.Column('speed', sa.JSON(), nullable=False),
    sa.Column('how', sa.String(length=16), nullable=False),
    sa.Column('learned_at', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('share_key', 'device', name=op.f('pk_group_limits'))
    )
    op.create_table('overtaken',
    sa.Column('queue', sa.String(length=40), nullable=False),
    sa.Column('project_id', sa.String(length=40).with_variant(sa.String(length=40, collation='C'), 'postgresql'), nullable=False),
    sa.Column('job_id', sa.String(length=40).with_variant(sa.String(length=40, collation='C'), 'postgresql'), nullable=False),
    sa.Column('passed', sa.Integer(), nullable=False),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_overtaken_project_id_projects')),
    sa.PrimaryKeyConstraint('queue', 'project_id', name=op.f('pk_overtaken'))
    )
    op.create_table('model_tunings',
    sa.Column('project_id', sa.String(length=40).with_variant(sa.String(length=40, collation='C'), 'postgresql'), nullable=False),
    sa.Column('model', sa.String(length=280), nullable=False),
    sa.Column('tag', sa.String(length=16), nullable=False),
    sa.Column('device', sa.String(length=40), nullable=False),
    sa.Column('options', sa.JSON(), nullable=False),
    sa.Column('report', sa.JSON(), nullable=False),
    sa.Column('active', sa.Boolean(), nullable=False),
    sa.Column('created_at', sa.Double(), nullable=False),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_model_tunings_project_id_projects')),
    sa.PrimaryKeyConstraint('project_id', 'model', 'tag', name=op.f('pk_model_tunings'))
    )


def downgrade() -> None:
    op.drop_table('model_tunings')
    op.drop_table('overtaken')
    op.drop_table('group_limits')

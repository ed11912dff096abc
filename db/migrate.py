"""Bring a ledger to the newest schema, and make new migrations (``python -m db.migrate revision -m '…'``).

Every command looks whether there is anything to migrate, and hardly ever there is: Alembic, which takes as long to load as a listing, only comes in
where it has something to do.
"""

import sys
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import Connection, text

from db.glance import MIGRATIONS, newest
from db.session import Database

if TYPE_CHECKING:
    from alembic.config import Config

log = structlog.get_logger(__name__)


def _stands_at(connection: Connection) -> str | None:
    there = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'" if connection.dialect.name == "sqlite" else "SELECT to_regclass('alembic_version')"
    if connection.execute(text(there)).scalar() is None:
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _config(connection: Connection) -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade(database: Database, revision: str = "head") -> None:
    """Migrate; safe when several processes start at once, and quick when there is nothing to do.

    Args:
        database: The ledger.
        revision: Where to.
    """
    if revision == "head" and current(database) == newest():
        return
    from alembic import command
    from alembic.script import ScriptDirectory

    with database.write() as connection:
        if not database.sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('factory:migrate'))"))
        found = _stands_at(connection)
        known = {script.revision for script in ScriptDirectory.from_config(_config(connection)).walk_revisions()}
        if found is not None and found not in known:
            # A rolled-back release meets the newer schema; migrations are such that it can live with it.
            log.warning("ledger_is_newer", action="migrate", revision=found)
            return
        command.upgrade(_config(connection), revision)


def downgrade(database: Database, revision: str) -> None:
    """Go back to an earlier schema."""
    from alembic import command

    with database.write() as connection:
        command.downgrade(_config(connection), revision)


def current(database: Database) -> str | None:
    """Revision that the ledger stands at."""
    with database.read() as connection:
        return _stands_at(connection)


def differences(database: Database) -> list[object]:
    """What the declared tables have that the migrated ones lack, and the other way round."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from db.models import Base

    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))


def _main() -> None:
    from alembic import command

    from contentfactory.settings import load_settings

    database = Database(load_settings().database())
    match sys.argv[1:]:
        case ["revision", "-m", message]:
            with database.write() as connection:
                command.revision(_config(connection), message, autogenerate=True)
        case [] | ["upgrade"]:
            upgrade(database)
        case _:
            sys.exit("usage: python -m db.migrate [upgrade | revision -m MESSAGE]")


if __name__ == "__main__":
    _main()

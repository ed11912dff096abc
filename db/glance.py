"""What can be seen of an embedded ledger without loading what speaks to databases, which takes longer than all else that starts a factory."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

MIGRATIONS = Path(__file__).with_name("migrations")
_FILE = "sqlite:///"


def newest() -> str:
    """The revision of the last migration: the number that its file's name begins with."""
    return max(path.name for path in (MIGRATIONS / "versions").glob("[0-9]*.py")).partition("_")[0]


def at_rest(url: str) -> bool:
    """Whether a ledger has the newest schema, and no job of it is on the broker or in a worker.

    Args:
        url: The ledger's URL; of one that is no plain file there is nothing to be seen.
    """
    path = url.removeprefix(_FILE)
    if not url.startswith(_FILE) or set(path) & set("?%") or not Path(path).is_file():
        return False
    try:
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, timeout=1.0)) as connection:
            [revision] = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            return revision == newest() and connection.execute("SELECT 1 FROM jobs WHERE place = 'flying' LIMIT 1").fetchone() is None
    except (sqlite3.Error, TypeError):
        return False  # whoever opens it in earnest says what is wrong

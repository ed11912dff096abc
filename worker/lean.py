"""``python -m worker.lean …`` is ``celery …`` without the plugins of Celery's command line.

Celery loads every plugin for every command: Flower, with a web server, in each worker. That is a second of computing a worker, and
`factory up` starts several at once. What it takes on its command line and what it does is otherwise the same.
"""

import importlib.metadata
from typing import Any

_entry_points = importlib.metadata.entry_points


def _without_plugins(**select: Any) -> Any:
    return () if select.get("group") == "celery.commands" else _entry_points(**select)


def main() -> None:
    """Run Celery's own command line."""
    importlib.metadata.entry_points = _without_plugins  # type: ignore[assignment]
    try:
        import celery.bin.celery  # noqa: F401
    finally:
        importlib.metadata.entry_points = _entry_points
    from celery.__main__ import main as celery_main

    celery_main()


if __name__ == "__main__":
    main()

"""Laying down a batch's results: the bridge from ledger and store to `producer.delivery`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contentfactory.states import TERMINAL
from db import jobs
from producer.delivery import DeliveryItem, DeliveryReport, deliver

PAGE = 500


def deliver_batch(database: Any, store: Any, project_id: str, batch: Any, target: Path, archive: Path | None = None,
                  progress: Any = None) -> DeliveryReport:  # fmt: skip
    """Deliver a batch; a job that was retried is delivered as its newest retry.

    Args:
        database: The ledger.
        store: Object storage.
        project_id: Project.
        batch: The batch's row.
        target: Folder.
        archive: Zip file to write as well.
        progress: Told (files laid down, files known so far).

    Raises:
        InputError: If the folder cannot be used.
    """
    keys: dict[tuple[str, str], tuple[str, str]] = {}

    def items() -> Iterator[DeliveryItem]:
        page: list[Any] = []
        with database.read() as conn:
            for row in jobs.of_batch(conn, batch["id"], tuple(TERMINAL)):
                page.append(row)
                if len(page) == PAGE:
                    yield from _page(conn, project_id, page, keys)
                    page = []
            yield from _page(conn, project_id, page, keys)

    def fetch(item: DeliveryItem, path: Path) -> None:
        key, sha256 = keys.pop((item.custom_id, item.name or ""))
        store.download(key, path, sha256=sha256)

    return deliver(items(), target, fetch, title=batch["name"], archive=archive, progress=progress)


def _page(conn: Any, project_id: str, rows: list[Any], keys: dict[tuple[str, str], tuple[str, str]]) -> Iterator[DeliveryItem]:
    newest = jobs.latest(conn, [row["id"] for row in rows])
    current = [jobs.get(conn, project_id, newest[row["id"]]) if row["id"] in newest else row for row in rows]
    made = jobs.artifacts(conn, [row["id"] for row in current if row])
    for row in current:
        if row is None:
            continue
        custom_id = row["custom_id"] or row["id"]
        common = {
            "custom_id": custom_id, "kind": row["kind"], "state": row["state"], "params_summary": _summary(row["params"]),
            "seed": row["seed"], "model": row["model"],
        }  # fmt: skip
        artifacts = made.get(row["id"], [])
        if not artifacts:
            yield DeliveryItem(name=None, error=row["error"], **common)
        for artifact in artifacts:
            keys[(custom_id, artifact["name"])] = (artifact["object_key"], artifact["sha256"])
            yield DeliveryItem(
                name=artifact["name"], media_type=artifact["media_type"], size=artifact["size"], sha256=artifact["sha256"],
                meta=dict(artifact["meta"] or {}), **common,
            )  # fmt: skip


def _summary(params: Any) -> str:
    for name in ("prompt", "text", "headline", "input"):
        value = params.get(name)
        if isinstance(value, str) and value:
            return value if len(value) <= 300 else value[:299] + "…"
    short = {k: v for k, v in params.items() if isinstance(v, str | int | float | bool) and v not in ("", None)}
    return json.dumps(short, ensure_ascii=False)[:300]

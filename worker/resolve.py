"""From a model's pinned name to its files on this worker's disk, and the options that were chosen for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from contentfactory.errors import InputError, ModelUnavailable
from contentfactory.settings import Settings
from db.session import Database
from producer.models import find
from worker.engines.files import ResolvedModel, locate


def resolve_model(settings: Settings, database: Database, store: Any, project_id: str, name: str) -> ResolvedModel:
    """Find a model and bring its files.

    Args:
        settings: The worker's settings.
        database: The ledger.
        store: Object storage, for files that a job made.
        project_id: Project that asks.
        name: ``name``, ``name@version`` or ``name@version+tag``.

    Raises:
        ModelUnavailable: If there is none, or a file cannot be had here.
    """
    with database.read() as conn:
        try:
            pinned = find(conn, project_id, name)
        except InputError as error:
            raise ModelUnavailable(error.message, code=error.code, param="model") from None
    if pinned.entry is not None:
        model = locate(pinned.entry, settings.models)
    else:
        row = pinned.row or {}
        folder = settings.models / f"{row['name']}@{row['version']}"
        files: dict[str, Path] = {}
        for role, file in row["files"].items():
            if "path" in file:
                files[role] = Path(file["path"])
                if not files[role].exists():
                    raise ModelUnavailable(f"model {pinned.key}: {role} {file['path']} is not on this worker's disk")
                continue
            files[role] = folder / "files" / file["name"]
            if not files[role].exists():
                store.download(file["object_key"], files[role], sha256=file["sha256"])
        options = {**row["options"], **({"config": row["config"]} if row["config"] else {})}
        model = ResolvedModel(row["name"], row["version"], row["engine"], files, folder, options, row["memory_mb"])
    if pinned.tuning:
        # The folder stays the version's own: converted weights serve every way of running them.
        model = replace(model, version=f"{model.version}+{pinned.tag}", options=tuned(model.options, pinned.tuning))
    return model


def tuned(options: dict[str, Any], inference: dict[str, Any]) -> dict[str, Any]:
    """A version's options with inference options over them; those that loaders have long known by name stand there too."""
    named = {key: inference[key] for key in ("dtype", "batch", "compute_type") if key in inference}
    return {**options, **named, "inference": dict(inference)}

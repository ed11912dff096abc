"""Model versions and data sets as registered in a project."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select

from contentfactory.ids import new_id
from db import lifecycle
from db.models import Artifact, Dataset, ModelVersion
from db.session import now

MODEL_COLUMNS = (
    ModelVersion.id, ModelVersion.project_id, ModelVersion.name, ModelVersion.version, ModelVersion.engine, ModelVersion.tasks,
    ModelVersion.files, ModelVersion.options, ModelVersion.config, ModelVersion.metrics, ModelVersion.lineage,
    ModelVersion.memory_mb, ModelVersion.job_id, ModelVersion.created_at,
)  # fmt: skip
DATASET_COLUMNS = (
    Dataset.id, Dataset.project_id, Dataset.name, Dataset.version, Dataset.digest, Dataset.items, Dataset.artifact_id,
    Dataset.meta, Dataset.created_at,
)  # fmt: skip


def model(conn: Connection, project_id: str, name: str, version: str | None = None) -> RowMapping | None:
    """A model version; the newest of its name where no version is given."""
    query = select(*MODEL_COLUMNS).where(ModelVersion.project_id == project_id, ModelVersion.name == name)
    if version is not None:
        query = query.where(ModelVersion.version == version)
    return conn.execute(query.order_by(ModelVersion.created_at.desc(), ModelVersion.id.desc()).limit(1)).mappings().one_or_none()


def models(conn: Connection, project_id: str) -> Sequence[RowMapping]:
    """Every model version of the project, newest first."""
    query = select(*MODEL_COLUMNS).where(ModelVersion.project_id == project_id)
    return conn.execute(query.order_by(ModelVersion.name, ModelVersion.created_at.desc())).mappings().all()


def add_model(conn: Connection, project_id: str, name: str, *, engine: str, tasks: Sequence[str], files: Mapping[str, Any],
              options: Mapping[str, Any], lineage: Mapping[str, Any], memory_mb: int = 0) -> str:  # fmt: skip
    """Register a version. Returns the version."""
    return lifecycle.insert_model(
        conn,
        {
            "id": new_id("mv"), "project_id": project_id, "name": name, "engine": engine, "tasks": list(tasks),
            "files": dict(files), "options": dict(options), "config": {}, "metrics": {}, "lineage": dict(lineage),
            "memory_mb": memory_mb, "job_id": None, "created_at": now(),
        },
    )  # fmt: skip


def dataset(conn: Connection, project_id: str, name: str, version: int | None = None) -> RowMapping | None:
    """A data set's version; the newest where none is given."""
    query = select(*DATASET_COLUMNS, Artifact.object_key, Artifact.sha256, Artifact.size).join(Artifact, Artifact.id == Dataset.artifact_id)
    query = query.where(Dataset.project_id == project_id, Dataset.name == name)
    if version is not None:
        query = query.where(Dataset.version == version)
    return conn.execute(query.order_by(Dataset.version.desc()).limit(1)).mappings().one_or_none()


def datasets(conn: Connection, project_id: str) -> Sequence[RowMapping]:
    """Every version of every data set of the project."""
    query = select(*DATASET_COLUMNS).where(Dataset.project_id == project_id)
    return conn.execute(query.order_by(Dataset.name, Dataset.version.desc())).mappings().all()


def add_dataset(conn: Connection, project_id: str, name: str, *, digest: str, items: int, artifact_id: str, meta: Mapping[str, Any]) -> tuple[str, int]:
    """Register a version; the same content again is the same version.

    Returns:
        Id and version.
    """
    same = conn.execute(
        select(Dataset.id, Dataset.version).where(Dataset.project_id == project_id, Dataset.name == name, Dataset.digest == digest)
    ).one_or_none()
    if same:
        return same.id, same.version
    last = conn.execute(select(func.max(Dataset.version)).where(Dataset.project_id == project_id, Dataset.name == name)).scalar()
    dataset_id, version = new_id("ds"), int(last or 0) + 1
    conn.execute(
        insert(Dataset).values(
            id=dataset_id, project_id=project_id, name=name, version=version, digest=digest, items=items,
            artifact_id=artifact_id, meta=dict(meta), created_at=now(),
        )
    )  # fmt: skip
    return dataset_id, version


def add_input(conn: Connection, project_id: str, *, name: str, object_key: str, sha256: str, size: int, media_type: str,
              meta: Mapping[str, Any] | None = None) -> str:  # fmt: skip
    """An artifact that a user handed in; equal bytes are one artifact. Returns its id."""
    found = conn.execute(
        select(Artifact.id).where(Artifact.project_id == project_id, Artifact.sha256 == sha256, Artifact.role == "input").limit(1)
    ).scalar()
    if found:
        return found
    lifecycle.refuse_doomed(conn, [object_key])
    artifact_id = new_id("art")
    conn.execute(
        insert(Artifact).values(
            id=artifact_id, project_id=project_id, job_id=None, role="input", name=name[:200], object_key=object_key,
            sha256=sha256, size=size, media_type=media_type, meta=dict(meta or {}), created_at=now(), attempt=0, position=0,
            parents=[],
        )
    )  # fmt: skip
    return artifact_id



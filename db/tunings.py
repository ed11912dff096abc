"""Inference options that were measured and chosen for a model version of a project."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, select, update

from db.models import ModelTuning
from db.session import insert_for, now

_COLUMNS = (ModelTuning.model, ModelTuning.tag, ModelTuning.device, ModelTuning.options, ModelTuning.report, ModelTuning.active, ModelTuning.created_at)


def tag_of(options: Mapping[str, Any]) -> str:
    """Name of a set of options: equal options, equal tag, whenever and for whom they were measured."""
    return "t" + hashlib.sha256(json.dumps(options, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:8]


def store(conn: Connection, project_id: str, model: str, *, device: str, options: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Keep options and use them from now on for jobs that name the model without a version. Returns their tag.

    Args:
        conn: Connection in a write transaction.
        project_id: Project.
        model: ``name@version``, without a tag.
        device: Make of the device that they were measured on.
        options: Inference options; not empty.
        report: What was measured.
    """
    tag = tag_of(options)
    clear(conn, project_id, model)
    values = {"device": device[:40], "options": dict(options), "report": dict(report), "active": True}
    statement = insert_for(conn, ModelTuning).values(project_id=project_id, model=model, tag=tag, created_at=now(), **values)
    keys = [ModelTuning.project_id, ModelTuning.model, ModelTuning.tag]
    conn.execute(statement.on_conflict_do_update(index_elements=keys, set_={**values, "created_at": now()}))
    return tag


def clear(conn: Connection, project_id: str, model: str) -> int:
    """Go back to a version's defaults. The options stay on record: jobs that are pinned to them still run. Returns how many."""
    where = (ModelTuning.project_id == project_id, ModelTuning.model == model, ModelTuning.active)
    return conn.execute(update(ModelTuning).where(*where).values(active=False)).rowcount


def active(conn: Connection, project_id: str, model: str) -> RowMapping | None:
    """The options in use for ``name@version``."""
    where = (ModelTuning.project_id == project_id, ModelTuning.model == model, ModelTuning.active)
    return conn.execute(select(*_COLUMNS).where(*where).order_by(ModelTuning.created_at.desc()).limit(1)).mappings().one_or_none()


def get(conn: Connection, project_id: str, model: str, tag: str) -> RowMapping | None:
    """The options of a tag."""
    where = (ModelTuning.project_id == project_id, ModelTuning.model == model, ModelTuning.tag == tag)
    return conn.execute(select(*_COLUMNS).where(*where)).mappings().one_or_none()


def of_model(conn: Connection, project_id: str, model: str) -> Sequence[RowMapping]:
    """Every set of options of ``name@version``, newest first."""
    where = (ModelTuning.project_id == project_id, ModelTuning.model == model)
    return conn.execute(select(*_COLUMNS).where(*where).order_by(ModelTuning.created_at.desc())).mappings().all()

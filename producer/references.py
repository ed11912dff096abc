"""What a job's parameters point to: other jobs, whose names may change on the way into the ledger, and data sets."""

from collections.abc import Callable
from typing import Any

from contentfactory.errors import InputError
from contentfactory.ids import is_id
from contentfactory.jobs.spec import Params, iter_inputs, iter_refs, put_at
from db import registry


def pin_datasets(conn: Any, project_id: str, params: Params) -> Params:
    """``dataset:NAME`` becomes the artifact of the version that is newest now.

    Raises:
        InputError: If there is no such data set.
    """
    found: dict[str, str] = {}
    for field, modality, value in iter_inputs(params):
        if modality != "dataset" or not isinstance(value, str) or not value.startswith("dataset:"):
            continue
        name, _, version = value.removeprefix("dataset:").partition("@")
        row = registry.dataset(conn, project_id, name, int(version) if version else None)
        if row is None:
            known = sorted({r["name"] for r in registry.datasets(conn, project_id)})
            hint = f"registered: {', '.join(known)}" if known else "register one with `factory datasets add`"
            raise InputError(f"{field}: data set {value.removeprefix('dataset:')!r} does not exist; {hint}", code="unknown_dataset", param=field)
        found[field] = row["artifact_id"]
    if not found:
        return params
    return type(params).model_validate({**params.model_dump(mode="json"), **found})


def batch_job(job_id: Callable[[str], str], name: str) -> str:
    """The job that a line of a batch means: an accepted one by its id, or one of the same batch by its ``custom_id``."""
    return name if is_id(name, "job") else job_id(name)


def rename_refs(params: Params, rename: Callable[[str], str]) -> Params:
    """The params with every reference pointing to another name of its job."""
    refs = list(iter_refs(params))
    if not refs:
        return params
    data = params.model_dump(mode="json")
    for path, ref in refs:
        put_at(data, path, {"job": rename(ref.job), "output": ref.output})
    return type(params).model_validate(data)

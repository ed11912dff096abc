"""Inputs of a job: references become text or files on the local disk, checked and fetched once a micro-batch."""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import RowMapping

from contentfactory.errors import FactoryError, InputError
from contentfactory.jobs.spec import OutputRef, Params, iter_inputs, iter_refs, put_at, takes_media
from contentfactory.settings import Settings
from db import jobs
from db.lifecycle import Claimed
from db.session import Database
from storage.base import ObjectStore
from storage.keys import suffix_for
from worker.input_file import InputFile
from worker.media import sniff

_DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(;[\w.+=-]+)*?;base64")
_MAX_DATA_HEAD = 200
_NESTED = frozenset({dict, list})
MAX_TEXT_BYTES = 1_000_000


@dataclass(slots=True)
class Resolved:
    """Params with text references filled in, and the artifacts that they use.

    Args:
        params: Params as the runner gets them.
        artifacts: Artifact row by reference (see `ref_key`) or artifact id.
        parents: Ids of the artifacts used.
        digest: What stands for the inputs in the result key: SHA-256 by field.
    """

    params: Params
    artifacts: Mapping[str, RowMapping]
    parents: tuple[str, ...]
    digest: Mapping[str, str]


def ref_key(ref: OutputRef) -> str:
    """A reference as a dictionary key."""
    return f"{ref.job}/{ref.output or ''}"


class Inputs:
    """Resolves and fetches the inputs of one worker's jobs.

    Args:
        settings: Caps on size and time.
        database: The ledger.
        store: Object storage.
    """

    def __init__(self, settings: Settings, database: Database, store: ObjectStore) -> None:
        self.settings = settings
        self.database = database
        self.store = store

    def resolve(self, job: Claimed, params: Params) -> Resolved:
        """Find the artifacts that a job's params point at and put referenced text in.

        Raises:
            InputError: If a reference leads nowhere or to something that is not text.
            TransientError: If the storage did not answer.
        """
        found: dict[str, RowMapping] = {}
        digest: dict[str, str] = {}
        texts: dict[str, str] = {}
        if not takes_media(type(params)) and not (_NESTED.intersection(map(type, job.params.values())) and any(iter_refs(params))):
            return Resolved(params, found, (), digest)
        with self.database.read() as conn:
            for field, modality, value in iter_inputs(params):
                if isinstance(value, OutputRef):
                    row = self._output(conn, job.project_id, field, value)
                    found[ref_key(value)] = row
                    digest[field] = row["sha256"]
                    if modality == "text":
                        texts[field] = ref_key(value)
                elif modality != "text" and value.startswith("art_"):
                    artifact = jobs.artifact(conn, job.project_id, value)
                    if artifact is None:
                        raise InputError(f"{field}: artifact {value} does not exist", code="unknown_artifact", param=field)
                    found[value] = artifact
                    digest[field] = artifact["sha256"]
        if texts:
            params = _fill(params, {field: self._text(found[key]) for field, key in texts.items()})
        return Resolved(params, found, tuple(dict.fromkeys(row["id"] for row in found.values())), digest)

    def _output(self, conn: Any, project_id: str, field: str, ref: OutputRef) -> RowMapping:
        parent = jobs.get(conn, project_id, ref.job)
        if parent is None:
            raise InputError(f"{field}: job {ref.job} does not exist", code="unknown_job", param=field)
        rows = jobs.artifacts(conn, [ref.job], ("output", "model", "sample")).get(ref.job, [])
        rows = [row for row in rows if ref.output is None or row["name"] == ref.output]
        if not rows:
            what = f"no output {ref.output!r}" if ref.output else "no outputs"
            raise InputError(f"{field}: {parent['custom_id'] or ref.job} ({parent['kind']}) has {what}", code="unknown_output", param=field)
        return rows[0]

    def _text(self, row: RowMapping) -> str:
        if row["size"] > MAX_TEXT_BYTES:
            raise InputError(f"{row['name']} has {row['size']} bytes; a text input may have {MAX_TEXT_BYTES}")
        if not row["media_type"].startswith(("text/", "application/json", "application/x-subrip")):
            raise InputError(f"{row['name']} is {row['media_type']}; a text field takes text")
        data = self.store.get(row["object_key"])
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise FactoryError(f"artifact {row['id']} does not match its SHA-256", code="integrity")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{row['name']} is not UTF-8 text: {error}") from None

    def fetch(self, value: str | OutputRef, resolved: Resolved, folder: Path) -> InputFile:
        """Bring an input to the local disk.

        Args:
            value: As it stands in the params.
            resolved: The job's resolved inputs.
            folder: Where to put it.

        Raises:
            InputError: If it cannot be had, is too large, or is something else by its content than the field takes.
            TransientError: If the storage did not answer.
        """
        file = self._bring(value, resolved, folder)
        if file.trusted:
            return file
        # Nobody's word is taken for what an outsider's bytes are.
        file = replace(file, media_type=sniff.sniff(file.path))
        for field, modality, one in iter_inputs(resolved.params):
            if one == value:
                sniff.check(file.media_type, modality, field=field, name=file.name)
        return file

    def _bring(self, value: str | OutputRef, resolved: Resolved, folder: Path) -> InputFile:
        folder.mkdir(parents=True, exist_ok=True)
        row = resolved.artifacts.get(ref_key(value) if isinstance(value, OutputRef) else value)
        if row is not None:
            path = folder / f"{row['sha256']}{suffix_for(row['media_type'])}"
            if not path.exists():
                self.store.download(row["object_key"], path, sha256=row["sha256"])
            # What a job of this factory wrote, not what somebody uploaded.
            made = row["job_id"] is not None and row["role"] in ("output", "sample", "model", "checkpoint")
            return InputFile(path, row["media_type"], row["name"], dict(row["meta"] or {}), trusted=made)
        if isinstance(value, OutputRef):
            raise InputError(f"reference to {value.job} is not part of this job's params")
        if value.startswith("data:"):
            return self._data_uri(value, folder)
        if value.startswith(("http://", "https://")):
            from worker.fetch import fetch_url

            return fetch_url(
                value, folder, max_bytes=self.settings.max_input_mb * 2**20, timeout_s=self.settings.input_timeout_s,
                allow_private=self.settings.allow_private_urls,
            )  # fmt: skip
        raise InputError(f"input {value[:60]!r} is no artifact id, http(s) address or data: URI")

    def _data_uri(self, value: str, folder: Path) -> InputFile:
        head, comma, body = value.partition(",")
        match = _DATA_URI.fullmatch(head) if comma and len(head) <= _MAX_DATA_HEAD else None
        if match is None:
            raise InputError("a data: URI must have the form data:<media type>;base64,<data>")
        try:
            data = base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise InputError(f"a data: URI holds bad base64: {error}") from None
        if not data:
            raise InputError("a data: URI is empty")
        media_type = match["type"] or "application/octet-stream"
        path = folder / f"{hashlib.sha256(data).hexdigest()}{suffix_for(media_type)}"
        path.write_bytes(data)
        return InputFile(path, media_type, "data: URI")


def _fill(params: Params, texts: Mapping[str, str]) -> Params:
    """Put texts in the place of their references (by dotted field) and validate again: limits hold for them, too."""
    data = params.model_dump(mode="json")
    for field, text in texts.items():
        put_at(data, field, text)
    return params.spec.validate(data)

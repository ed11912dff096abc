"""The spool: a checked manifest, one JSON line a job, from which the expander writes rows.

It needs neither the user's files nor a second look at the lines, may stop anywhere, and goes on at a number. A line says all that
a row will say: validated params, pinned model, what it may share a forward pass with. Only where something has to be looked up once
the batch has its id (references to other lines, data sets, a model that is trained in the same batch) is that left open.
"""

import gzip
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contentfactory.fastjson import dumps, dumps_sorted, loads
from contentfactory.ids import stable_seed
from contentfactory.jobs.spec import KindSpec, Params, takes_media
from producer.manifest.model import JobLine

SPOOL_FORMAT = 3
"""Form of the lines, and of the ids that jobs get: lists and numbered ids. The first form was objects, the second had ids without a
number; batches of all three may be waiting when a release changes."""

NUMBERED = 3
"""First form whose jobs have numbered ids."""

AT_ONCE = 256
"""Lines that are written, and taken into the digest, at once."""

# Places in a line's list.
NUMBER, ID, KIND, PARAMS, PARENTS, PRIORITY, SEED, LABELS, SECONDS, MODEL, KEY = range(11)


class Spool:
    """Writes a spool into a temporary file; `discard` it in the end."""

    def __init__(self) -> None:
        # Gone with this object, whatever happens in between.
        self._raw = tempfile.NamedTemporaryFile(prefix="factory-manifest-", suffix=".jsonl.gz")  # noqa: SIM115
        # Neither time nor the temporary file's name go into it: equal manifests are equal bytes, and one object.
        self._out = gzip.GzipFile(filename="", fileobj=self._raw.file, mode="wb", compresslevel=1, mtime=0)
        self._digest = hashlib.sha256()
        self._count = 0
        self._asked: list[str] = []
        self._lines: list[str] = []

    def add(self, line: JobLine, model: str | None, uploaded: Mapping[str, str] | None = None) -> None:
        """Write a job down.

        Args:
            line: The checked line.
            model: The model version that it will use; None where the kind takes none, or nobody knows it yet.
            uploaded: Artifact id by ``file:`` address, for lines that name local files.
        """
        self._count += 1
        spec, parsed = line.spec, line.parsed
        known = not line.refs and not line.files and not takes_media(type(parsed)) and (model is not None or not spec.takes_model)
        seed = line.seed if line.seed is not None else stable_seed(line.custom_id, dumps_sorted(line.with_files(uploaded or {})))
        params = spec.params_json(parsed) if known else dumps(line.with_files(uploaded or {}))
        data = dumps([self._count, line.custom_id, spec.name, params, line.parents, line.priority, seed, line.metadata])
        key = spec.share_key(parsed, model) if known else None
        rest = dumps([estimate(spec, parsed), model, key])
        # The digest says whether two manifests ask for the same, so what was looked up for them is no part of it.
        self._asked.append(data)
        self._lines.append(f"{data[:-1]},{rest[1:]}\n")
        if len(self._lines) >= AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._digest.update("".join(self._asked).encode())
        self._out.write("".join(self._lines).encode())
        self._asked.clear()
        self._lines.clear()

    def close(self, priority: int, reuse: bool) -> tuple[Path, str, int]:
        """Finish the file.

        Args:
            priority: Priority of lines that name none.
            reuse: Whether equal earlier results may be taken.

        Returns:
            The file, the digest of what it asks for, and the number of jobs.
        """
        self._flush()
        self._out.close()
        self._raw.flush()
        self._digest.update(f"{priority} {reuse}".encode())
        return Path(self._raw.name), self._digest.hexdigest(), self._count

    def discard(self) -> None:
        """Remove the file."""
        self._out.close()
        self._raw.close()


def estimate(spec: KindSpec, parsed: Params) -> float:
    """Estimated compute seconds of a job."""
    try:
        return max(1e-6, float(spec.seconds(parsed)))
    except Exception:
        # An estimate that trips over a reference where it expects text must not refuse the job.
        return 1.0


def number_of(data: bytes) -> int:
    """Number of a line, without parsing all of it where it can be seen at once."""
    if data.startswith(b"["):
        return int(data[1 : data.index(b",")])
    return record_number(loads(data))


def record_number(record: Any) -> int:
    """Number of a parsed line."""
    return int(record["n"] if isinstance(record, dict) else record[NUMBER])


def as_dict(record: list[Any], priority: int, reuse: bool) -> dict[str, Any]:
    """A line in the form of objects, for those that still have to be looked into."""
    return {
        "n": record[NUMBER], "id": record[ID], "kind": record[KIND], "params": loads(record[PARAMS]), "parents": record[PARENTS],
        "priority": record[PRIORITY] or priority, "seed": record[SEED], "labels": record[LABELS], "reuse": reuse,
    }  # fmt: skip

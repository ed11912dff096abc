"""Ids of a batch's jobs."""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from producer.spool import NUMBERED, SPOOL_FORMAT

_NO_DIGITS = re.compile(r"[^0-9]+")


def job_id_for(batch_id: str, custom_id: str, form: int = SPOOL_FORMAT) -> str:
    """The id of a batch's job: a function of both, so that a repeated chunk writes nothing twice and a dependency may point
    to a line that is not there yet. Its first half is the batch's own time stamp, so ids still sort by age.

    Args:
        batch_id: Batch.
        custom_id: The line's name.
        form: The batch's `form_of`.
    """
    return job_ids(batch_id, form)(custom_id)


def job_ids(batch_id: str, form: int = SPOOL_FORMAT) -> Callable[[str], str]:
    """`job_id_for` for many jobs of one batch.

    Names of most batches are numbered, and lines come in that order. The number goes before the digest: neighbours by line are
    neighbours in every index then, and a micro-batch touches a few of its pages instead of one for each job.
    """
    begun = hashlib.sha256(f"{batch_id}\x1f".encode())
    stamp = batch_id.partition("_")[2][:12]

    def numbered(custom_id: str) -> str:
        digest = begun.copy()
        digest.update(custom_id.encode())
        number = int(_NO_DIGITS.sub("", custom_id)[-12:] or 0) & 0xFFFFF
        return f"job_{stamp}{number:05x}{digest.hexdigest()[:15]}"

    def plain(custom_id: str) -> str:
        digest = begun.copy()
        digest.update(custom_id.encode())
        return f"job_{stamp}{digest.hexdigest()[:20]}"

    return numbered if form >= NUMBERED else plain


def form_of(batch: Mapping[str, Any]) -> int:
    """Form of a batch's spool and of its jobs' ids."""
    return int(batch["source"].get("format", 1))

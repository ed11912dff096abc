"""Manifests: what a user wants made, as a file. Reading, templates, and every mistake by its line before anything is accepted.

``open_manifest`` names a file, ``check`` reads all of it and reports, ``lines`` then yields what to enqueue. All three
stream: memory stays flat up to a million lines. Nothing here knows a database, Celery or the network.
"""

from producer.manifest.check import check
from producer.manifest.model import (
    MAX_ERRORS,
    MAX_JOBS,
    MAX_SEED,
    FileInput,
    JobLine,
    ManifestError,
    Plan,
    Ref,
    Report,
)
from producer.manifest.parse import lines, parse_job
from producer.manifest.recipe import Manifest, open_manifest

__all__ = [
    "MAX_ERRORS", "MAX_JOBS", "MAX_SEED", "FileInput", "JobLine", "Manifest", "ManifestError", "Plan", "Ref", "Report",
    "check", "lines", "open_manifest", "parse_job",
]  # fmt: skip

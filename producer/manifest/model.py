"""What a manifest turns into: job lines, errors with their place, and the report of a check."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from contentfactory.errors import InputError
from contentfactory.jobs.spec import KindSpec, Params, put_at

MAX_LINE_BYTES = 10_000_000
"""Longest line of a text source, bytes."""
MAX_SOURCE_BYTES = 8 * 1024**3
"""Most bytes that a source may have once unpacked."""
MAX_RECIPE_BYTES = 1_000_000
"""Longest recipe, bytes."""
MAX_JOBS = 1_000_000
"""Most jobs of one manifest."""
MAX_ERRORS = 1_000
"""Errors that a report keeps word for word; further ones are only counted."""
MAX_SEED = 2**32 - 1
"""Largest seed: what every random generator in use takes."""
MAX_ID = 200
"""Longest ``custom_id``, characters."""


@dataclass(frozen=True)
class ManifestError:
    """One mistake.

    Args:
        message: What is wrong: the value received and what is allowed.
        line: Line of the source as an editor counts it (row number in Parquet); None where no one line is at fault.
        field: Dotted field or column at fault.
        custom_id: The job at fault, where it is known.
        code: Machine-readable type.
    """

    message: str
    line: int | None = None
    field: str | None = None
    custom_id: str | None = None
    code: str = "invalid_params"

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line is not None else "manifest"
        if self.custom_id is not None:
            place += f" ({_short(self.custom_id)})"
        return f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """The error as JSON values, in the members that OpenAI's batch errors have too."""
        return {
            "code": self.code, "line": self.line, "param": self.field, "custom_id": self.custom_id,
            "message": self.message,
        }  # fmt: skip


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


class DraftError(Exception):
    """Mistakes of one draft, collected."""

    def __init__(self, *errors: ManifestError) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = errors


@dataclass(slots=True)
class Draft:
    """One job as the source has it, templates filled in, not yet validated.

    Args:
        line: Line or row of the source.
        raw: The job's object; None where ``errors`` says why there is none.
        job: Index of the job among those that the recipe makes of a row (``once`` first); 0 elsewhere.
        errors: What went wrong before validation.
        rows: Whether it comes from a table, whose cells may be strings that mean numbers.
    """

    line: int | None
    raw: Any
    job: int = 0
    errors: tuple[ManifestError, ...] = ()
    rows: bool = False


@dataclass(frozen=True)
class Ref:
    """A param that is another job's output.

    Args:
        field: Dotted path of the param.
        job: The other job's ``custom_id``, or the id of a job accepted earlier.
        output: Name of the artifact; None for the job's first.
        modality: What the param takes: ``text``, ``image``, ``audio``, ``video``, ``any`` …
    """

    field: str
    job: str
    output: str | None
    modality: str


@dataclass(frozen=True)
class FileInput:
    """A local file that a param names by ``file:PATH``: upload it and put the artifact's id in its place.

    Args:
        field: Dotted path of the param.
        address: The param's value as it stands.
        path: The file, absolute.
    """

    field: str
    address: str
    path: Path


@dataclass
class JobLine:
    """One validated job of a manifest.

    Args:
        line: Line or row of the source.
        job: Index of the job among those that the recipe makes of a row; 0 elsewhere. With ``line`` it names the job.
        custom_id: The user's name for it, unique in the manifest.
        kind: Canonical name of the kind.
        parsed: Params as the kind's class, so that nobody validates twice.
        depends_on: Names of jobs that must succeed first, as written, without repeats.
        refs: Params that are other jobs' outputs; each is a dependency too.
        priority: 0 to 100.
        seed: Seed, or None for one derived from the ``custom_id``.
        metadata: The user's own notes.
        files: Local files to upload.
        spec: The kind.
        last: Whether it is the last job of its line: a good place to end a chunk.
    """

    line: int | None
    job: int
    custom_id: str
    kind: str
    parsed: Params
    depends_on: tuple[str, ...]
    refs: tuple[Ref, ...]
    priority: int
    seed: int | None
    metadata: dict[str, str]
    files: tuple[FileInput, ...]
    spec: KindSpec = field(compare=False, repr=False)
    last: bool = True

    @cached_property
    def params(self) -> dict[str, Any]:
        """What the user gave, coerced to the kind's types: JSON values, defaults left out."""
        return self.parsed.model_dump(mode="json", exclude_unset=True)

    @property
    def parents(self) -> tuple[str, ...]:
        """Every job that this one waits for: named ones first, then referenced ones, each once."""
        if not self.depends_on and not self.refs:
            return ()
        return tuple(dict.fromkeys((*self.depends_on, *(ref.job for ref in self.refs))))

    @property
    def seconds(self) -> float:
        """Estimated compute seconds on the reference CPU."""
        try:
            return max(0.0, float(self.spec.seconds(self.parsed)))
        except (
            Exception
        ):  # an estimate that trips over a reference where it expects text must not refuse the job
            return 1.0

    def with_files(self, uploaded: Mapping[str, str]) -> dict[str, Any]:
        """The params with uploaded files in the place of local ones.

        Args:
            uploaded: Artifact id by ``file:`` address.
        """
        params = copy.deepcopy(self.params) if self.files else self.params
        for one in self.files:
            put_at(params, one.field, uploaded[one.address])
        return params


@dataclass
class Plan:
    """Jobs and estimated work of one kind."""

    kind: str
    queue: str
    jobs: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """What a check found.

    Attributes:
        jobs: Jobs in the manifest, wrong ones included.
        lines: Lines or rows of the source that hold something.
        errors: Mistakes in the order of their lines, at most the cap.
        error_count: All mistakes, also those beyond the cap.
        warnings: What is allowed but looks wrong.
        kinds: Jobs and estimated compute seconds (reference CPU) by kind.
        files: Distinct local files to upload.
        file_bytes: Their size together, bytes.
        dependencies: Edges between jobs.
        spool: What was checked, written down (`producer.spool.Spool`), where the caller asked for it.
    """

    jobs: int = 0
    lines: int = 0
    errors: tuple[ManifestError, ...] = ()
    error_count: int = 0
    warnings: tuple[str, ...] = ()
    kinds: dict[str, Plan] = field(default_factory=dict)
    files: int = 0
    file_bytes: int = 0
    dependencies: int = 0
    spool: Any = field(default=None, compare=False, repr=False)

    @property
    def ok(self) -> bool:
        """Whether the manifest may be accepted."""
        return self.error_count == 0

    @property
    def seconds(self) -> float:
        """Estimated compute seconds in all, on the reference CPU."""
        return sum(plan.seconds for plan in self.kinds.values())

    @property
    def queues(self) -> dict[str, float]:
        """Estimated compute seconds by queue."""
        out: dict[str, float] = {}
        for plan in self.kinds.values():
            out[plan.queue] = out.get(plan.queue, 0.0) + plan.seconds
        return out

    def raise_for_errors(self, shown: int = 20) -> None:
        """Refuse a manifest that has mistakes.

        Args:
            shown: How many of them the message spells out.

        Raises:
            InputError: With the first mistakes in its message and all kept ones in ``detail['errors']``.
        """
        if self.ok:
            return
        rest = self.error_count - min(shown, len(self.errors))
        text = "\n".join(str(error) for error in self.errors[:shown]) + (
            f"\n… and {rest} more" if rest else ""
        )
        noun = "mistake" if self.error_count == 1 else "mistakes"
        raise InputError(
            f"the manifest has {self.error_count} {noun}; nothing was accepted\n{text}",
            code="invalid_manifest", errors=[error.to_dict() for error in self.errors], count=self.error_count,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "ok": self.ok, "jobs": self.jobs, "lines": self.lines, "dependencies": self.dependencies,
            "files": self.files, "file_bytes": self.file_bytes, "seconds": round(self.seconds, 3),
            "kinds": {
                name: {"queue": plan.queue, "jobs": plan.jobs, "seconds": round(plan.seconds, 3)}
                for name, plan in sorted(self.kinds.items())
            },
            "queues": {name: round(value, 3) for name, value in sorted(self.queues.items())},
            "warnings": list(self.warnings), "error_count": self.error_count,
            "errors": [error.to_dict() for error in self.errors],
        }  # fmt: skip

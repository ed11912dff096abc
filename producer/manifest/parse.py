"""One job line: validated by its kind, with its references and local files."""

import copy
import difflib
import functools
import mimetypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from contentfactory.errors import InputError
from contentfactory.ids import is_id
from contentfactory.jobs.spec import KindSpec, Params, get_kind, iter_inputs, iter_refs
from contentfactory.states import Priority
from producer.manifest.model import (
    MAX_ID,
    MAX_SEED,
    Draft,
    DraftError,
    FileInput,
    JobLine,
    ManifestError,
    Ref,
    Report,
)
from producer.manifest.recipe import Manifest
from producer.manifest.template import to_text

FIELDS = ("custom_id", "kind", "params", "depends_on", "priority", "seed", "metadata")
PRIORITIES = {"bulk": Priority.BULK, "normal": Priority.NORMAL, "interactive": Priority.INTERACTIVE}
MAX_PARENTS = 1_000
MAX_METADATA = (16, 64, 512)
"""Pairs, characters of a key, characters of a value: OpenAI's own limits."""


def lines(manifest: Manifest, *, start_after: int | tuple[int, int] = 0) -> Iterator[JobLine]:
    """The jobs of a manifest that was checked, in the order of its lines.

    Args:
        manifest: An open manifest.
        start_after: Leave out every job up to this line (all of its jobs), or up to a (line, job) pair: where an earlier
            reading stopped.

    Yields:
        Validated jobs.

    Raises:
        InputError: If a line is wrong after all: the file was not checked, or has changed since.
    """

    def refuse(error: ManifestError) -> None:
        Report(errors=(error,), error_count=1).raise_for_errors()

    for error in manifest.errors[:1]:
        refuse(error)
    whole, part = start_after if isinstance(start_after, tuple) else (start_after, None)
    try:
        for drafts in manifest.drafts(refuse, whole - 1 if part is not None else whole):
            for draft in drafts:
                if part is None or (draft.line or 0, draft.job) > (whole, part):
                    yield parse_draft(draft, manifest.base, last=draft is drafts[-1])
    except DraftError as wrong:
        refuse(wrong.errors[0])


def parse_job(raw: Any, *, base: Path | None = None, line: int | None = None) -> JobLine:
    """Validate one job's object.

    Args:
        raw: The object as received (``custom_id``, ``kind``, ``params`` …).
        base: Folder of ``file:`` inputs; None forbids them.
        line: Line, for messages.

    Raises:
        InputError: Naming each mistake.
    """
    try:
        return parse_draft(Draft(line, raw), base)
    except DraftError as wrong:
        raise InputError(
            "; ".join(f"{e.field}: {e.message}" if e.field else e.message for e in wrong.errors),
            code=wrong.errors[0].code, param=wrong.errors[0].field, errors=[e.to_dict() for e in wrong.errors],
        ) from None  # fmt: skip


def parse_draft(draft: Draft, base: Path | None, last: bool = True) -> JobLine:
    """Validate a draft.

    Raises:
        DraftError: With every mistake of it.
    """
    if draft.raw is None:
        raise DraftError(*draft.errors)
    raw = draft.raw
    if not isinstance(raw, Mapping):
        raise DraftError(ManifestError("a job must be a JSON object", line=draft.line, code="not_an_object"))
    name = raw.get("custom_id")
    errors: list[ManifestError] = []

    def wrong(field: str | None, message: str, code: str = "invalid_params") -> None:
        shown = name if isinstance(name, str) and name else None
        errors.append(ManifestError(message, line=draft.line, field=field, custom_id=shown, code=code))

    for key in raw:
        if key not in FIELDS:
            close = difflib.get_close_matches(str(key), FIELDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(FIELDS)}"
            wrong(str(key), f"unknown field; {hint}", "unknown_field")
    if problem := _id_problem(name):
        wrong("custom_id", problem, "invalid_custom_id")
    depends_on = _depends_on(raw.get("depends_on"), name, wrong)
    priority = _priority(raw.get("priority"), draft.rows, wrong)
    seed = _seed(raw.get("seed"), draft.rows, wrong)
    metadata = _metadata(raw.get("metadata"), wrong)

    spec: KindSpec | None = None
    parsed: Params | None = None
    kind, params = raw.get("kind"), raw.get("params", {})
    if not isinstance(kind, str) or not kind:
        wrong(
            "kind",
            "is required: the kind of job, as a string" + (f" (received {_show(kind)})" if kind else ""),
            "unknown_kind",
        )
    else:
        try:
            spec = get_kind(kind)
        except InputError as error:
            wrong("kind", error.message, error.code)
    if not isinstance(params, Mapping):
        wrong("params", f"must be an object (received {_show(params)})")
    elif spec is not None:
        try:
            parsed = _validate(spec, params, draft.rows)
        except InputError as error:
            by_field: dict[str, list[str]] = {}
            for item in error.detail.get("errors", [{"field": error.param or "", "message": error.message}]):
                by_field.setdefault(item["field"], []).append(item["message"])
            for field, messages in by_field.items():
                unknown = messages == ["unknown field"]
                if unknown:
                    close = difflib.get_close_matches(field, spec.params.model_fields, n=1)
                    allowed = ", ".join(spec.params.model_fields)
                    hint = f"did you mean {close[0]}?" if close else f"fields of {spec.name}: {allowed}"
                    messages = [f"unknown field; {hint}"]
                place = f"params.{field}" if field else "params"
                wrong(place, " or ".join(messages), "unknown_field" if unknown else "invalid_params")

    refs: tuple[Ref, ...] = ()
    files: tuple[FileInput, ...] = ()
    if parsed is not None and _has_inputs(params):
        refs, files = _inputs(parsed, base, name, wrong)
    if errors or spec is None or parsed is None:
        raise DraftError(*errors)
    return JobLine(
        line=draft.line, job=draft.job, custom_id=name, kind=spec.name,  # type: ignore[arg-type]
        parsed=parsed, depends_on=depends_on, refs=refs, priority=priority,
        seed=seed, metadata=metadata, files=files, spec=spec, last=last,
    )  # fmt: skip


def _validate(spec: KindSpec, params: Mapping[str, Any], rows: bool) -> Params:
    """Validate params; out of a table also a number where the kind wants a text (a column of article numbers, say)."""
    try:
        return spec.validate(params)
    except InputError as error:
        if not rows:
            raise
        fields = [item["field"] for item in error.detail["errors"] if "valid string" in item["message"]]
        mended = copy.deepcopy(dict(params))
        done = [_number_to_text(mended, field.split(".")) for field in fields]
        if not any(done):
            raise
        return spec.validate(mended)


def _number_to_text(spot: Any, way: list[str]) -> bool:
    """Turn the number at the end of a path into text; False where there is none."""
    try:
        for part in way[:-1]:
            spot = spot[int(part)] if isinstance(spot, list) else spot[part]
        key: Any = int(way[-1]) if isinstance(spot, list) else way[-1]
        if not isinstance(spot[key], int | float):
            return False
        spot[key] = to_text(spot[key])
    except (KeyError, IndexError, ValueError, TypeError):
        return False
    return True


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _id_problem(name: Any) -> str | None:
    if name is None:
        return "is required: a name for the job, unique in the manifest"
    if not isinstance(name, str):
        return f"must be a string (received {_show(name)})"
    if not name.strip():
        return "is empty; it must name the job"
    if len(name) > MAX_ID:
        return f"has {len(name)} characters; allowed: {MAX_ID}"
    if name != name.strip() or not name.isprintable():
        return f"must not have spaces at its ends, line breaks or control characters (received {_show(name)})"
    if is_id(name, "job"):
        return f"{name} has the form of a job's id; choose a name of your own"
    return None


def _depends_on(value: Any, name: Any, wrong: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        wrong("depends_on", f"must be a list of custom_ids (received {_show(value)})")
        return ()
    if len(items) > MAX_PARENTS:
        wrong("depends_on", f"names {len(items)} jobs; allowed: {MAX_PARENTS}")
    if name in items:
        wrong("depends_on", "the job depends on itself", "self_reference")
    return tuple(dict.fromkeys(item for item in items if item != name))


def _priority(value: Any, rows: bool, wrong: Any) -> int:
    if value is None:
        return Priority.NORMAL
    if isinstance(value, str):
        if value.lower() in PRIORITIES:
            return PRIORITIES[value.lower()]
        if rows and value.strip().isdecimal():
            value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 100:
        return value
    wrong(
        "priority",
        f"must be bulk, normal, interactive or a whole number from 0 to 100 (received {_show(value)})",
    )
    return Priority.NORMAL


def _seed(value: Any, rows: bool, wrong: Any) -> int | None:
    if value is None:
        return None
    if rows and isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        value = int(value)
    if (
        rows and isinstance(value, float) and value.is_integer()
    ):  # Parquet turns a whole column with a gap into floats
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SEED:
        return value
    wrong("seed", f"must be a whole number from 0 to {MAX_SEED} (received {_show(value)})")
    return None


def _metadata(value: Any, wrong: Any) -> dict[str, str]:
    if value is None:
        return {}
    pairs, key_limit, value_limit = MAX_METADATA
    if not isinstance(value, Mapping) or not all(isinstance(item, str) for item in value.values()):
        wrong("metadata", f"must be an object of strings (received {_show(value)})")
    elif len(value) > pairs:
        wrong("metadata", f"has {len(value)} pairs; allowed: {pairs}")
    else:
        for key, item in value.items():
            if len(key) > key_limit or len(item) > value_limit:
                message = f"a key has {len(key)} and its value {len(item)} characters; allowed: {key_limit} and {value_limit}"
                wrong(f"metadata.{key[:key_limit]}", message)
        return dict(value)
    return {}


def _has_inputs(value: Any) -> bool:
    """Whether raw params may hold a reference or a local file: most do not, and are spared the walk over their class."""
    if isinstance(value, str):
        return value.startswith("file:")
    if isinstance(value, Mapping):
        return "job" in value or any(map(_has_inputs, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_inputs, value))


def _inputs(
    parsed: Params, base: Path | None, name: Any, wrong: Any
) -> tuple[tuple[Ref, ...], tuple[FileInput, ...]]:
    modalities: dict[str, str] = {}
    files: list[FileInput] = []
    for field, modality, value in iter_inputs(parsed):
        modalities[field] = modality
        if modality == "text" or not isinstance(value, str) or not value.startswith("file:"):
            continue
        path, problem = _local(str(base) if base else "", value)
        if path is None:
            wrong(f"params.{field}", problem, "file_not_found")
        elif not fits(mimetypes.guess_type(path.name)[0], modality):
            found = mimetypes.guess_type(path.name)[0]
            wrong(f"params.{field}", f"{path.name} is {found}; this field takes {modality}", "wrong_modality")
        else:
            files.append(FileInput(field, value, path))
    refs: list[Ref] = []
    for field, ref in iter_refs(parsed):
        if ref.job == name:
            wrong(f"params.{field}", "the job takes its own output", "self_reference")
            continue
        refs.append(Ref(field, ref.job, ref.output, modalities.get(field, "any")))
    return tuple(refs), tuple(files)


@functools.lru_cache(maxsize=65_536)
def _local(base: str, address: str) -> tuple[Path | None, str]:
    """A ``file:`` address as a path inside the manifest's folder, or what is wrong with it."""
    if not base:
        return (
            None,
            "file: inputs work only in manifests on the machine that submits them; upload the file and give its id",
        )
    relative, root = address.removeprefix("file:"), Path(base)
    try:
        path = (root / relative).resolve()
        if not path.is_relative_to(root):
            return None, f"{address!r} leaves the manifest's folder; put the file below it"
        if not path.is_file():
            return None, f"{address!r} does not exist or is no file (looked in the manifest's folder)"
        with open(path, "rb"):
            return path, ""
    except (OSError, ValueError) as error:
        return None, f"{address!r} cannot be read: {getattr(error, 'strerror', None) or error}"


_EXTRA = {
    "text": ("application/json", "application/x-subrip"),
    "video": ("image/gif", "image/webp"),
    "audio": ("video/",),
}


def fits(media_type: str | None, modality: str) -> bool:
    """Whether a media type may go into a field of that modality; True where it cannot be told."""
    if media_type is None or modality not in ("text", "image", "audio", "video"):
        return True
    return media_type.startswith((f"{modality}/", *_EXTRA.get(modality, ())))

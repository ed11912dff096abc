"""Delivery folders: results under names that a person can use, with checksums, a table, and a page that shows everything."""

import base64
import csv
import hashlib
import html
import io
import json
import os
import re
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from contentfactory.errors import FactoryError, InputError, IntegrityError, ObjectNotFound

TABLE, SUMS, PAGE = "manifest.csv", "SHA256SUMS", "index.html"
COLUMNS = (
    "custom_id", "kind", "state", "file", "media_type", "bytes", "sha256", "width", "height", "duration_s", "seed", "model",
    "error",
)  # fmt: skip
MAX_PART = 60
"""Longest piece of a path, characters; 8 pieces stay below Windows' 260."""
MAX_PARTS = 8
MAX_SHOWN = 20_000
"""Items that the page shows; the table has all."""
TEXT_SHOWN = 20_000
"""Characters of one text that the page shows."""
TEXT_TOTAL = 8_000_000
"""Characters of text in the page altogether; texts beyond it are cut to a taste."""
_TASTE = 400
_RESERVED = re.compile(r"^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\.|$)", re.IGNORECASE)
_MARK = "contentfactory delivery"


@dataclass(frozen=True)
class DeliveryItem:
    """One artifact of a finished job, or a job that made none.

    Args:
        custom_id: The user's name of the job; its parts between slashes become folders.
        kind: Kind of job.
        state: The job's state.
        name: The artifact's name within the job; None for a job that made nothing.
        media_type: Media type.
        size: Bytes.
        sha256: SHA-256 of the bytes, hexadecimal.
        meta: Facts about the content (``width``, ``height``, ``duration_s`` …).
        params_summary: What was asked for, in a line.
        error: Why the job failed, as stored with it, or in words.
        seed: The job's seed.
        model: Name and version of its model.
    """

    custom_id: str
    kind: str
    state: str
    name: str | None = None
    media_type: str | None = None
    size: int | None = None
    sha256: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    params_summary: str = ""
    error: Mapping[str, Any] | str | None = None
    seed: int | None = None
    model: str | None = None

    @property
    def reason(self) -> str:
        """The error in words; empty where there is none."""
        if isinstance(self.error, Mapping):
            return str(self.error.get("message") or self.error.get("code") or "failed")
        return self.error or ""


@dataclass
class DeliveryReport:
    """What a delivery did.

    Attributes:
        target: The folder.
        files: Artifacts that lie in it now.
        bytes: Their size together.
        fetched: Artifacts fetched in this run.
        kept: Artifacts that lay there already, unchanged.
        removed: Files of an earlier delivery that went.
        failed_jobs: Jobs that made nothing.
        missing: Artifacts that could not be fetched, with the reason.
        warnings: What a person should know.
        page: The page to open.
        archive: The zip file, where one was asked for.
    """

    target: Path
    files: int = 0
    bytes: int = 0
    fetched: int = 0
    kept: int = 0
    removed: int = 0
    failed_jobs: int = 0
    missing: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    page: Path = Path(PAGE)
    archive: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether every artifact lies in the folder."""
        return not self.missing


def deliver(
    items: Iterable[DeliveryItem],
    target: Path | str,
    fetch: Callable[[DeliveryItem, Path], None],
    *,
    title: str,
    archive: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DeliveryReport:
    """Lay results down in a folder, or bring an earlier delivery there up to date.

    Files that are there already and unchanged are kept. Files of the earlier delivery that are no longer part of it are
    removed, unless somebody has changed them. Nothing else in the folder is touched.

    Args:
        items: Artifacts and failed jobs, in the order of the manifest.
        target: The folder; made where it does not exist.
        fetch: Writes an artifact's bytes to a path.
        title: Heading of the page.
        archive: A zip file to write as well.
        progress: Told artifacts done and altogether.

    Returns:
        What was done.

    Raises:
        InputError: If the folder holds files of somebody else where the delivery's own must lie.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    root = target.resolve()
    earlier = _earlier(root)
    report = DeliveryReport(target=root, page=root / PAGE)
    names = _Names()
    rows = [(item, names.path(item) if item.name is not None else None) for item in items]
    total, done = sum(path is not None for _, path in rows), 0
    laid: list[tuple[DeliveryItem, str | None]] = []
    with tempfile.TemporaryDirectory(dir=root, prefix=".delivery-") as scratch:
        for item, path in rows:
            if path is None:
                laid.append((item, None))
                continue
            try:
                _lay(item, path, root, Path(scratch) / "part", fetch, earlier, report)
                laid.append((item, path))
                report.files += 1
                report.bytes += item.size or 0
            except (IntegrityError, ObjectNotFound) as error:
                report.missing.append((f"{item.custom_id}/{item.name}", error.message))
                laid.append((_lost(item, error), None))
            done += 1
            if progress:
                progress(done, total)
    report.failed_jobs = len(
        {item.custom_id for item, _ in rows if item.name is None and item.state != "succeeded"}
    )
    _remove_stale(root, earlier, {path for _, path in laid if path}, report)
    _write(root / TABLE, _table(laid))
    _write(root / PAGE, _page(laid, root, title).encode())
    sums = [f"{item.sha256}  {path}\n" for item, path in laid if path]
    sums += [f"{_sha256(root / name)}  {name}\n" for name in (TABLE, PAGE)]
    _write(root / SUMS, "".join(sums).encode())
    if archive is not None:
        report.archive = _zip(root, [path for _, path in laid if path], archive)
    return report


# --- names -----------------------------------------------------------------------------------------------------


def safe_part(text: str) -> str:
    """A text as one piece of a path that every file system takes.

    Letters and digits of any script stay; spaces and signs become ``-``; names that Windows reserves get a ``_``; long
    ones are cut and marked with a hash, their ending kept.
    """
    kept = []
    for char in unicodedata.normalize("NFC", text):
        kept.append(char if char in "._-" or unicodedata.category(char)[0] in "LNM" else "-")
    name = re.sub(r"-{2,}", "-", "".join(kept)).strip("-. ") or "_"
    if _RESERVED.match(name):
        name = "_" + name
    # Most file systems count bytes (255), Windows counts the characters of the whole path.
    if len(name) > MAX_PART or len(name.encode()) > 200:
        ending = PurePosixPath(name).suffix if len(PurePosixPath(name).suffix) <= 10 else ""
        mark = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
        stem = name[: MAX_PART - len(ending) - 9].encode()[:150].decode("utf-8", "ignore").rstrip("-. ")
        name = f"{stem}-{mark}{ending}"
    return name


class _Names:
    """Paths that never meet: not on file systems that ignore case, and never a file where another has a folder."""

    def __init__(self) -> None:
        self.files: set[str] = {_fold(name) for name in (TABLE, SUMS, PAGE)}
        self.folders: set[str] = {""}

    def path(self, item: DeliveryItem) -> str:
        parts = [safe_part(part) for part in f"{item.custom_id}/{item.name}".split("/") if part.strip(". ")]
        if len(parts) > MAX_PARTS:
            parts = [*parts[: MAX_PARTS - 2], safe_part("-".join(parts[MAX_PARTS - 2 : -1])), parts[-1]]
        if len(parts) < 2:
            parts.insert(0, "_")
        path, wanted, number = "/".join(parts), PurePosixPath("/".join(parts)), 0
        while self.clashes(path):
            # The mark hangs on the job and the artifact alone, so a second run gives the same name.
            text = f"{item.custom_id}\0{item.name}\0{number}"
            mark, number = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:6], number + 1
            path = (
                str(wanted.with_name(f"{wanted.stem}-{mark}{wanted.suffix}"))
                if not self.blocked(path)
                else "/".join([f"{parts[0]}-{mark}", *parts[1:]])
            )
        self.files.add(_fold(path))
        self.folders.update(map(_fold, _parents(path)))
        return path

    def clashes(self, path: str) -> bool:
        return _fold(path) in self.files or _fold(path) in self.folders or self.blocked(path)

    def blocked(self, path: str) -> bool:
        return any(_fold(folder) in self.files for folder in _parents(path))


def _fold(path: str) -> str:
    return unicodedata.normalize("NFKC", path).casefold()


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in PurePosixPath(path).parents if str(parent) != "."]


# --- files -----------------------------------------------------------------------------------------------------


def _lay(
    item: DeliveryItem,
    path: str,
    root: Path,
    part: Path,
    fetch: Callable[[DeliveryItem, Path], None],
    earlier: Mapping[str, str],
    report: DeliveryReport,
) -> None:
    goal = root / path
    if not goal.parent.resolve().is_relative_to(root):
        raise InputError(f"{path} leads out of {root} through a link; deliver into another folder")
    if goal.is_symlink() or goal.exists():
        if goal.is_file() and not goal.is_symlink() and _same(goal, item):
            report.kept += 1
            return
        if path not in earlier:
            raise InputError(f"{goal} exists and is not of an earlier delivery; deliver into another folder")
    part.unlink(missing_ok=True)
    fetch(item, part)
    found = _sha256(part)
    if item.sha256 and found != item.sha256:
        raise IntegrityError(
            f"{item.custom_id}/{item.name} arrived with SHA-256 {found}; expected {item.sha256}"
        )
    goal.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, goal)
    report.fetched += 1


def _lost(item: DeliveryItem, error: FactoryError) -> DeliveryItem:
    return replace(item, error=f"not delivered: {error.message}")


def _same(path: Path, item: DeliveryItem) -> bool:
    if item.size is not None and path.stat().st_size != item.size:
        return False
    return item.sha256 is not None and _sha256(path) == item.sha256


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write a file of the delivery's own in one step, so that a reader never sees half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".delivery-", delete=False) as stream:
        stream.write(data)
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, path)


def _earlier(root: Path) -> dict[str, str]:
    """SHA-256 by path of an earlier delivery in this folder.

    Raises:
        InputError: If a file of one of our names is there that is not ours.
    """
    for name in (TABLE, PAGE, SUMS):
        if (root / name).is_symlink() or (root / name).is_dir():
            raise InputError(f"{root / name} is no file of an earlier delivery; deliver into another folder")
    page = root / PAGE
    if page.exists():
        with open(page, "rb") as stream:
            if _MARK.encode() not in stream.read(2000):
                raise InputError(f"{page} is not of an earlier delivery; deliver into another folder")
    if not (root / TABLE).exists():
        return {}
    with open(root / TABLE, encoding="utf-8-sig", newline="", errors="replace") as text:
        reader = csv.DictReader(text)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(f"{root / TABLE} is not of an earlier delivery; deliver into another folder")
        return {row["file"]: row["sha256"] or "" for row in reader if row.get("file")}


def _remove_stale(root: Path, earlier: Mapping[str, str], now: set[str], report: DeliveryReport) -> None:
    # On a file system that ignores case the old name may be the new file.
    alive = {_fold(path) for path in now}
    for path, digest in earlier.items():
        pure = PurePosixPath(path)
        if _fold(path) in alive or pure.is_absolute() or ".." in pure.parts or "\\" in path:
            continue
        file = root / pure
        if not file.parent.resolve().is_relative_to(root) or not file.is_file() or file.is_symlink():
            continue
        if _sha256(file) != digest:
            report.warnings.append(
                f"{path} is no longer part of the delivery but was changed by somebody: kept"
            )
            continue
        file.unlink()
        report.removed += 1
        for folder in file.parents:
            if folder == root or any(folder.iterdir()):
                break
            folder.rmdir()


# --- table, page, archive ---------------------------------------------------------------------------------------


def _cell(value: Any) -> str:
    """A cell that no spreadsheet runs as a formula."""
    text = "" if value is None else str(value)
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _table(laid: list[tuple[DeliveryItem, str | None]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for item, path in laid:
        meta = item.meta
        cells = (
            item.custom_id, item.kind, item.state, path, item.media_type, item.size, item.sha256, meta.get("width"),
            meta.get("height"), meta.get("duration_s"), item.seed, item.model, item.reason,
        )  # fmt: skip
        writer.writerow([_cell(cell) for cell in cells])
    return out.getvalue().encode("utf-8-sig")  # with a byte-order mark Excel reads it as UTF-8


def _page(laid: list[tuple[DeliveryItem, str | None]], root: Path, title: str) -> str:
    left = TEXT_TOTAL
    groups: dict[str, list[dict[str, Any]]] = {}
    for item, path in laid[:MAX_SHOWN]:
        entry: dict[str, Any] = {"id": item.custom_id, "kind": item.kind, "state": item.state}
        if path is not None:
            entry |= {"file": quote(path), "name": item.name, "type": item.media_type, "size": item.size}
            if _is_text(item.media_type):
                text, cut = _text(root / path, TEXT_SHOWN if left > 0 else _TASTE)
                left -= len(text)
                entry |= {"text": text, "cut": cut}
        # A transcript of every word would weigh more than the page; only plain facts are shown.
        facts = {
            key: value for key, value in item.meta.items() if isinstance(value, int | float | str | bool)
        }
        facts = {key: value for key, value in facts.items() if len(str(value)) <= 200}
        extra = {
            "meta": facts,
            "ask": item.params_summary[:2000],
            "error": item.reason[:2000],
            "seed": item.seed,
        }
        extra["model"] = item.model
        entry |= {key: value for key, value in extra.items() if value not in (None, "", {})}
        groups.setdefault(item.custom_id.split("/")[0], []).append(entry)
    data = {
        "groups": [{"name": name, "items": entries} for name, entries in groups.items()],
        "left_out": max(0, len(laid) - MAX_SHOWN),
    }
    # "<" never stands in the data, so no text can close the element that holds it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").encode("utf-8", "replace").decode()
    folder = resources.files("producer") / "templates"
    style = (folder / "delivery.css").read_text("utf-8")
    script = (folder / "delivery.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = (folder / "delivery.html").read_text("utf-8")
    parts = {"title": html.escape(title), "style": style, "digest": digest, "script": script, "data": text}
    return re.sub(r"%%(title|style|digest|script|data)%%", lambda match: parts[match.group(1)], page)


def _is_text(media_type: str | None) -> bool:
    base = (media_type or "").partition(";")[0].strip()
    return base in ("application/json", "application/x-subrip") or (
        base.startswith("text/") and base != "text/html"
    )


def _text(path: Path, limit: int) -> tuple[str, bool]:
    with open(path, encoding="utf-8", errors="replace") as stream:
        text = stream.read(limit + 1)
    return text[:limit], len(text) > limit


def _zip(root: Path, paths: list[str], archive: Path) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(f".{archive.name}.part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as out:
        for path in [PAGE, TABLE, SUMS, *paths]:
            # A fixed time, so that equal deliveries give equal archives; media are packed already.
            entry = zipfile.ZipInfo(f"{root.name}/{path}", (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            squeeze = path.endswith((".txt", ".json", ".csv", ".html", ".srt", ".vtt"))
            entry.compress_type = zipfile.ZIP_DEFLATED if squeeze else zipfile.ZIP_STORED
            with out.open(entry, "w", force_zip64=True) as goal, open(root / path, "rb") as source:
                while block := source.read(1 << 20):
                    goal.write(block)
    os.replace(part, archive)
    return archive

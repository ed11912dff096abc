"""Pass one: every line validated, every name and edge looked at, nothing kept in memory but counts and the first mistakes."""

import difflib
import mimetypes
import os
import sqlite3
import tempfile
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from contentfactory.ids import is_id
from contentfactory.jobs.spec import KindSpec, load_kinds
from contentfactory.states import Priority
from producer.manifest.model import MAX_ERRORS, DraftError, JobLine, ManifestError, Plan, Report
from producer.manifest.parse import fits, parse_draft
from producer.manifest.recipe import Manifest

SAME_SHOWN = 5
"""Rows of a table that show the same mistake of the same job before it is only counted."""
_CYCLES_SHOWN = 50
_CHUNK = 5_000

_SCHEMA = """
CREATE TABLE jobs (n INTEGER PRIMARY KEY, name TEXT NOT NULL, line INTEGER, kind TEXT);
CREATE TABLE edges (src INTEGER NOT NULL, target TEXT NOT NULL, field TEXT NOT NULL, output TEXT, modality TEXT);
CREATE TABLE files (path TEXT PRIMARY KEY, size INTEGER NOT NULL) WITHOUT ROWID;
"""


def check(
    manifest: Manifest,
    *,
    max_errors: int = MAX_ERRORS,
    vet: Callable[[JobLine], Iterable[str]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Read a whole manifest and find every mistake before anything is accepted.

    Names and edges go to a temporary SQLite file, so memory stays flat; dependencies may point forwards.

    Args:
        manifest: An open manifest.
        max_errors: Mistakes to keep word for word; all are counted.
        vet: Further check of each valid line (whether its model exists, say); yields what is wrong.
        progress: Told the number of jobs read so far, now and then.

    Returns:
        Counts, estimated work, warnings and mistakes in the order of the lines.
    """
    # Only names are kept there: a delete on close would leave it behind after a crash, a folder of its own does no better,
    # so the file is unlinked as soon as it is open where the system allows that.
    handle, name = tempfile.mkstemp(prefix="factory-manifest-", suffix=".sqlite")
    os.close(handle)
    db = sqlite3.connect(name, isolation_level=None)
    try:
        db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16384; PRAGMA temp_store=FILE;"
        )
        db.executescript(_SCHEMA)
        return _Check(manifest, db, max_errors, vet, progress).run()
    finally:
        db.close()
        Path(name).unlink(missing_ok=True)


class _Check:
    def __init__(
        self,
        manifest: Manifest,
        db: sqlite3.Connection,
        max_errors: int,
        vet: Callable[[JobLine], Iterable[str]] | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.manifest, self.db, self.max_errors, self.vet, self.progress = (
            manifest,
            db,
            max_errors,
            vet,
            progress,
        )
        self.kept: list[ManifestError] = []
        self.count = 0
        self.same: Counter[tuple[int, str | None, str]] = Counter()
        self.report = Report(warnings=manifest.warnings)
        self.jobs: list[tuple[int, str, int | None, str | None]] = []
        self.edges: list[tuple[int, str, str, str | None, str | None]] = []
        self.urgent = 0

    def run(self) -> Report:
        for error in self.manifest.errors:
            self.add(error)
        if not self.manifest.errors:
            # The graph's mistakes get room of their own, so that a thousand bad params do not hide a cycle.
            self.read()
            if self.report.jobs == 0 and self.count == 0:
                self.add(ManifestError("the manifest holds no jobs", code="empty"))
            local, self.kept = self.kept, []
            self.names()
            self.graph()
            self.kept += local
        report = self.report
        report.errors = tuple(sorted(self.kept, key=lambda e: e.line or 0)[: self.max_errors])
        report.error_count = self.count
        report.files, report.file_bytes = self.db.execute(
            "SELECT count(*), coalesce(sum(size), 0) FROM files"
        ).fetchone()
        if self.urgent > 100:
            report.warnings += (
                f"{self.urgent:,} jobs have interactive priority: they leave alone, not in micro-batches",
            )
        return report

    def add(self, error: ManifestError) -> None:
        self.count += 1
        if len(self.kept) < self.max_errors:
            self.kept.append(error)

    # --- the lines -----------------------------------------------------------------------------------------------------

    def read(self) -> None:
        report = self.report
        try:
            for drafts in self.manifest.drafts(self.add):
                report.lines += 1
                for draft in drafts:
                    report.jobs += 1
                    if report.jobs > self.manifest.max_jobs:
                        message = f"the manifest makes more than the {self.manifest.max_jobs:,} jobs allowed"
                        raise DraftError(ManifestError(message, line=draft.line, code="too_many_jobs"))
                    number, line = report.jobs, None
                    try:
                        line = parse_draft(draft, self.manifest.base)
                    except DraftError as wrong:
                        for error in wrong.errors:
                            self.similar(error, draft.job, draft.rows)
                    name = draft.raw.get("custom_id") if isinstance(draft.raw, dict) else None
                    if draft.raw is None and draft.errors and draft.errors[0].code != "once_differs":
                        name = draft.errors[0].custom_id
                    if isinstance(name, str) and name.isprintable():
                        # A wrong line still owns its name: those that depend on it are not wrong as well.
                        self.jobs.append((number, name, draft.line, line.kind if line else None))
                    if line is not None:
                        self.take(number, line)
                    if len(self.jobs) >= _CHUNK or len(self.edges) >= _CHUNK:
                        self.flush()
        except DraftError as wrong:
            for error in wrong.errors:
                self.add(error)
        self.flush()

    def similar(self, error: ManifestError, job: int, rows: bool) -> None:
        """Count a mistake; the same one in row after row is told a few times only."""
        key = (job, error.field, error.code)
        self.same[key] += rows
        if rows and self.same[key] > SAME_SHOWN:
            self.count += 1
        else:
            self.add(error)

    def take(self, number: int, line: JobLine) -> None:
        plan = self.report.kinds.get(line.kind)
        if plan is None:
            plan = self.report.kinds[line.kind] = Plan(line.kind, line.spec.queue)
        plan.jobs += 1
        plan.seconds += line.seconds
        self.urgent += line.priority == Priority.INTERACTIVE
        for parent in line.depends_on:
            self.edges.append((number, parent, "depends_on", None, None))
        for ref in line.refs:
            self.edges.append((number, ref.job, f"params.{ref.field}", ref.output, ref.modality))
        for one in line.files:
            self.db.execute(
                "INSERT OR IGNORE INTO files VALUES (?, ?)", (str(one.path), one.path.stat().st_size)
            )
        for problem in self.vet(line) if self.vet else ():
            self.add(ManifestError(problem, line=line.line, custom_id=line.custom_id, code="refused"))

    def flush(self) -> None:
        self.db.execute("BEGIN")
        self.db.executemany("INSERT INTO jobs VALUES (?, ?, ?, ?)", self.jobs)
        self.db.executemany("INSERT INTO edges VALUES (?, ?, ?, ?, ?)", self.edges)
        self.db.execute("COMMIT")
        self.report.dependencies += len(self.edges)
        self.jobs.clear()
        self.edges.clear()
        if self.progress:
            self.progress(self.report.jobs)

    # --- names and edges -----------------------------------------------------------------------------------------------

    def names(self) -> None:
        self.db.execute("CREATE INDEX jobs_name ON jobs (name, n)")
        query = """
            SELECT later.line, later.name, first.line FROM jobs AS later
            JOIN (SELECT name, min(n) AS n FROM jobs GROUP BY name HAVING count(*) > 1) AS twin
              ON twin.name = later.name AND later.n > twin.n
            JOIN jobs AS first ON first.n = twin.n ORDER BY later.n"""
        for line, name, first in self.db.execute(query):
            where = "an earlier job of this row" if first == line else f"line {first}"
            message = f"{name!r} is the name of {where} already; it must be unique in the manifest"
            self.add(
                ManifestError(
                    message, line=line, field="custom_id", custom_id=name, code="duplicate_custom_id"
                )
            )

    def resolved(
        self,
    ) -> Iterator[tuple[int, str, int | None, str, str, str | None, str | None, int | None, str | None]]:
        query = """
            SELECT e.src, s.name, s.line, e.target, e.field, e.output, e.modality,
                   (SELECT t.n FROM jobs AS t WHERE t.name = e.target ORDER BY t.n LIMIT 1) AS found,
                   (SELECT t.kind FROM jobs AS t WHERE t.name = e.target ORDER BY t.n LIMIT 1)
            FROM edges AS e JOIN jobs AS s ON s.n = e.src"""
        yield from self.db.execute(query)

    def graph(self) -> None:
        kinds = load_kinds()
        sources, targets = array("I"), array("I")
        forward = False
        for src, name, line, target, field, output, modality, found, kind in self.resolved():
            if found is None:
                if not is_id(target, "job"):
                    message = f"no job of the manifest is named {target!r}{self.close(target)}"
                    self.add(
                        ManifestError(
                            message, line=line, field=field, custom_id=name, code="missing_dependency"
                        )
                    )
                continue
            if (
                modality is not None
                and kind is not None
                and (problem := _mismatch(kinds[kind], output, modality))
            ):
                message = f"job {target!r} ({kind}) {problem}"
                self.add(
                    ManifestError(message, line=line, field=field, custom_id=name, code="wrong_modality")
                )
            sources.append(src)
            targets.append(found)
            forward = forward or found >= src
        # Edges that all point backwards cannot close a circle, and that is how most manifests are written.
        if forward:
            self.cycles(sources, targets)

    def close(self, target: str) -> str:
        """A hint at a name that differs in a few letters; only small manifests are searched for one."""
        if self.report.jobs > 10_000:
            return ""
        names = [name for (name,) in self.db.execute("SELECT name FROM jobs")]
        near = difflib.get_close_matches(target, names, n=1, cutoff=0.75) if len(names) <= 500 else []
        near = near or [name for name in names if name.lower() == target.lower()]
        return f"; did you mean {near[0]!r}?" if near else ""

    def cycles(self, sources: "array[int]", targets: "array[int]") -> None:
        """Kahn's algorithm over compact arrays; what is left over is walked until it bites its tail."""
        size = self.report.jobs + 2
        waits, start = array("I", bytes(4 * size)), array("I", bytes(4 * (size + 1)))
        for src, target in zip(sources, targets, strict=True):
            waits[src] += 1
            start[target + 1] += 1
        for n in range(1, size + 1):
            start[n] += start[n - 1]
        fill, children = array("I", start), array("I", bytes(4 * len(sources)))
        for src, target in zip(sources, targets, strict=True):
            children[fill[target]] = src
            fill[target] += 1
        ready = deque(n for n in range(1, size) if waits[n] == 0)
        while ready:
            n = ready.popleft()
            for child in children[start[n] : start[n + 1]]:
                waits[child] -= 1
                if waits[child] == 0:
                    ready.append(child)
        left = {n for n in range(1, size) if waits[n]}
        if not left:
            return
        parent: dict[int, int] = {}
        for src, target in zip(sources, targets, strict=True):
            if src in left and target in left:
                parent.setdefault(src, target)
        done: set[int] = set()
        shown = 0
        for n in sorted(left):
            trail: dict[int, None] = {}
            while n not in trail and n not in done:
                trail[n] = None
                n = parent[n]
            if n in trail:
                loop = list(trail)[list(trail).index(n) :]
                first = loop.index(min(loop))
                shown += 1
                self.cycle(loop[first:] + loop[:first], shown <= _CYCLES_SHOWN)
            done.update(trail)

    def cycle(self, loop: list[int], spell: bool) -> None:
        if not spell:
            self.count += 1
            return
        names = [self.db.execute("SELECT name, line FROM jobs WHERE n = ?", (n,)).fetchone() for n in loop]
        shown = [name for name, _ in names]
        if len(shown) > 12:
            shown = [*shown[:10], f"({len(shown) - 11} more)", shown[-1]]
        message = f"jobs wait for each other: {' → '.join([*shown, shown[0]])}"
        self.add(
            ManifestError(
                message, line=names[0][1], field="depends_on", custom_id=names[0][0], code="dependency_cycle"
            )
        )


def _mismatch(kind: KindSpec, output: str | None, modality: str) -> str | None:
    """What is wrong with taking this kind's output for a field of that modality; None where nothing is, or can be told."""
    # "audio" says it as well as the six formats of audio.
    made = ", ".join(
        dict.fromkeys(one.removeprefix("application/").partition("/")[0] for one in kind.outputs)
    )
    if output is None:
        if fits(kind.outputs[0], modality):
            return None
        hint = "; name one with output" if any(fits(one, modality) for one in kind.outputs[1:]) else ""
        return f"makes {made}; this field takes {modality}{hint}"
    if not any(fits(one, modality) for one in kind.outputs):
        return f"makes {made}; this field takes {modality}"
    if not fits(mimetypes.guess_type(output)[0], modality):
        return f"has {output!r} of another kind than this field's: it takes {modality}"
    return None

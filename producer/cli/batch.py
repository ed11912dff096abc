"""``factory batch`` and ``factory run``."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from contentfactory.errors import Conflict, InputError
from producer.cli.common import EXIT_FAILED, Factory, Json, ago, duration, emit, factory, print_line, table

app = typer.Typer(no_args_is_help=True)

ManifestArg = Annotated[Path, typer.Argument(help="Manifest: a recipe (.yaml), job lines (.jsonl), or rows (.csv, .parquet) with --kind.")]
KindOption = Annotated[str | None, typer.Option(help="Kind of job to make of each row.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="FIELD=TEMPLATE for rows, such as input='{text}'; may be repeated.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first rows: a trial run.")]
NameOption = Annotated[str | None, typer.Option(help="Title of the batch.")]
PriorityOption = Annotated[int, typer.Option(min=0, max=100, help="Priority of jobs that name none.")]
ReuseOption = Annotated[bool, typer.Option(help="Take equal earlier results.")]
BatchArg = Annotated[str, typer.Argument(help="Batch id, its beginning, or 'last'.")]


def _open(path: Path, kind: str | None, sets: list[str] | None, limit: int | None) -> Any:
    from producer.manifest import open_manifest

    if not path.exists():
        raise InputError(f"manifest {path} does not exist")
    pairs = {}
    for pair in sets or []:
        name, equals, template = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair!r} must have the form FIELD=TEMPLATE")
        pairs[name] = template
    return open_manifest(path, kind=kind, sets=pairs or None, limit=limit)


def print_plan(report: Any, as_json: bool) -> None:
    """Print what a manifest would make, or what is wrong with it."""
    if as_json:
        emit(report.to_dict())
        return
    for error in report.errors:
        print_line(str(error))
    if report.error_count:
        print_line(f"\n{report.error_count} mistakes in {report.jobs} jobs; nothing would be accepted")
        return
    rows = [(p.kind, p.queue, p.jobs, duration(p.seconds)) for p in sorted(report.kinds.values(), key=lambda p: p.kind)]
    table(rows, ("kind", "queue", "jobs", "estimate"), "no jobs")
    for warning in report.warnings:
        print_line(f"warning: {warning}")
    print_line(
        f"\n{report.jobs} jobs, {report.dependencies} dependencies, {report.files} files to upload; about {duration(report.seconds)} "
        "of compute on one reference CPU core"
    )


@app.command()
def plan(manifest: ManifestArg, kind: KindOption = None, sets: SetOption = None, limit: LimitOption = None, as_json: Json = False) -> None:
    """Check every line and estimate the work; nothing is accepted."""
    with factory() as f:
        report = f.producer.plan(_open(manifest, kind, sets, limit))
        print_plan(report, as_json)
        if not report.ok:
            raise typer.Exit(2)


def _accept(f: Factory, manifest: Path, kind: str | None, sets: list[str] | None, limit: int | None, name: str | None, priority: int,
            reuse: bool, say: bool, report: Any = None) -> str:  # fmt: skip
    opened = _open(manifest, kind, sets, limit)
    batch_id: str
    batch_id, continued = f.producer.create_batch(opened, name=name, priority=priority, reuse=reuse, report=report)
    if say:
        print_line(f"continuing {batch_id}" if continued else f"accepted {batch_id}")
    return batch_id


def _expander(f: Factory, batch_id: str) -> Any:
    """A step for `watch` that writes the batch's rows a second at a time, so that progress shows meanwhile."""
    state = {"done": False}

    def step() -> None:
        if not state["done"]:
            state["done"] = f.producer.expand(batch_id, seconds=1.0)

    return step


def _report(view: dict[str, Any], as_json: bool, extra: dict[str, Any]) -> None:
    if as_json:
        emit({**view, **extra})
        return
    c = view["counts"]
    failed = {s: c[s] for s in ("failed", "dead", "cancelled") if c.get(s)}
    took = (view["finished_at"] or time.time()) - view["created_at"]
    words = f"{view['state']}: {c.get('succeeded', 0)} of {view['total']} jobs succeeded in {duration(took)}"
    if c.get("reused"):
        words += f", {c['reused']} of them taken from identical earlier results"
    if failed:
        words += "; " + ", ".join(f"{n} {s}" for s, n in failed.items()) + f" (see `factory jobs list --batch {view['id']} --state failed`)"
    print_line(words)


def _deliver(f: Factory, batch_id: str, target: Path, archive: Path | None, as_json: bool) -> dict[str, Any]:
    from producer.cli.deliver import deliver_batch

    report = deliver_batch(f.database, f.store, f.project_id, f.find_batch(batch_id), target, archive)
    if not as_json:
        for missing in report.missing:
            print_line(f"missing: {missing}")
        for warning in report.warnings:
            print_line(f"warning: {warning}")
        print_line(f"delivered {report.files} files ({report.fetched} new, {report.kept} unchanged) to {report.target}; open {report.page}")
    return {"delivery": {"target": str(report.target), "page": str(report.page), "files": report.files, "fetched": report.fetched, "kept": report.kept, "missing": len(report.missing)}}


@app.command("run")
def run_batch(
    manifest: ManifestArg, kind: KindOption = None, sets: SetOption = None, limit: LimitOption = None, name: NameOption = None,
    priority: PriorityOption = 0, reuse: ReuseOption = True,
    watch_: Annotated[bool, typer.Option("--watch", help="Watch it to its end.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Accept a manifest and let the running factory make it."""
    from producer.cli.watch import snapshot, watch

    with factory() as f:
        batch_id = _accept(f, manifest, kind, sets, limit, name, priority, reuse, not as_json)
        f.producer.expand(batch_id)
        if not watch_:
            if as_json:
                emit(snapshot(f.database, f.project_id, batch_id))
            elif f.publisher is None:
                print_line("no broker runs here: the jobs wait in the ledger; start one with `factory up`")
            return
        view = watch(f.database, f.project_id, batch_id, quiet=as_json)
        _report(view, as_json, {})
        _exit(view)


def _exit(view: dict[str, Any]) -> None:
    if view["counts"].get("succeeded", 0) < view["total"] or view["state"] != "completed":
        raise typer.Exit(EXIT_FAILED)


@app.command()
def watch(batch: BatchArg = "last", as_json: Json = False) -> None:
    """Watch a batch until it is finished."""
    from producer.cli.watch import watch as look

    with factory() as f:
        view = look(f.database, f.project_id, f.find_batch(batch)["id"], quiet=as_json)
        _report(view, as_json, {})
        _exit(view)


@app.command("show")
def show(batch: BatchArg = "last", as_json: Json = False) -> None:
    """A batch and its counters."""
    from rich.console import Console

    from producer.cli.watch import render, snapshot

    with factory() as f:
        view = snapshot(f.database, f.project_id, f.find_batch(batch)["id"])
        if as_json:
            emit(view)
            return
        Console().print(render(view, {}, f"created {ago(view['created_at'])}"))
        if view["error"]:
            print_line(f"error: {view['error'].get('message')}")


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most batches to show.")] = 20,
    after: Annotated[str | None, typer.Option(help="Start after this batch's id.")] = None,
    as_json: Json = False,
) -> None:
    """Batches, newest first."""
    from db import batches
    from producer.cli.watch import snapshot

    with factory() as f:
        with f.database.read() as conn:
            rows = batches.list_page(conn, f.project_id, after=after, limit=limit)
        views = [snapshot(f.database, f.project_id, r["id"]) for r in rows]
        if as_json:
            emit(views)
            return
        shown = [
            (v["id"], v["name"], "paused" if v["paused"] else v["state"], f"{v['counts'].get('succeeded', 0)}/{v['total']}",
             sum(v["counts"].get(s, 0) for s in ("failed", "dead", "cancelled")) or "", ago(v["created_at"]))
            for v in views
        ]  # fmt: skip
        table(shown, ("id", "name", "state", "done", "failed", "created"), "no batches")


def _pause(batch: str, paused: bool, as_json: bool) -> None:
    from db import lifecycle

    with factory() as f:
        row = f.find_batch(batch)
        if row["finished_at"] is not None:
            raise Conflict(f"batch {row['id']} is {row['state']} already", code="batch_finished")
        f.database.run(lambda conn: lifecycle.pause(conn, "batch", row["id"], paused))
        if not paused:
            f.producer.kick()
        emit({"id": row["id"], "paused": paused}) if as_json else print_line(f"{row['id']} {'paused: what runs ends, nothing new starts' if paused else 'goes on'}")


@app.command()
def pause(batch: BatchArg = "last", as_json: Json = False) -> None:
    """Let nothing of a batch start any more; what runs ends."""
    _pause(batch, True, as_json)


@app.command()
def resume(batch: BatchArg = "last", as_json: Json = False) -> None:
    """Let a paused batch go on."""
    _pause(batch, False, as_json)


@app.command()
def cancel(batch: BatchArg, as_json: Json = False) -> None:
    """Cancel a batch: waiting jobs at once, running ones as soon as their runners look up."""
    from db import counters, lifecycle

    with factory() as f:
        row = f.find_batch(batch)
        if row["finished_at"] is None:
            while f.database.run(lambda conn: lifecycle.cancel_batch(conn, row["id"])):
                pass
            f.producer.expand(row["id"])
            f.database.run(lambda conn: counters.close_batches(conn, [row["id"]]))
        row = f.find_batch(row["id"])
        emit({"id": row["id"], "state": row["state"]}) if as_json else print_line(f"{row['id']} {row['state']}")


@app.command()
def prioritise(batch: BatchArg, priority: Annotated[int, typer.Argument(min=0, max=100, help="0 to 100.")], as_json: Json = False) -> None:
    """Give a batch's waiting jobs another priority."""
    from db import jobs, lifecycle

    with factory() as f:
        row = f.find_batch(batch)
        n = 0
        seen: set[str] = set()
        while True:
            with f.database.read() as conn:
                ids = jobs.ids_where(conn, f.project_id, ["blocked", "queued", "dispatched"], batch_id=row["id"], limit=5000)
            ids = [i for i in ids if i not in seen]
            if not ids:
                break
            seen.update(ids)
            n += f.database.run(partial(lifecycle.reprioritise, ids=ids, priority=priority))
        f.producer.kick()
        emit({"id": row["id"], "jobs": n, "priority": priority}) if as_json else print_line(f"{n} jobs of {row['id']} have priority {priority} now")


@app.command("retry-failed")
def retry_failed(batch: BatchArg = "last", as_json: Json = False) -> None:
    """Run a finished batch's failed, dead and cancelled jobs again, and the children that failed with them."""
    with factory() as f:
        row = f.find_batch(batch)
        new = f.producer.retry_failed(row["id"])
        if as_json:
            emit({"id": new, "retry_of": row["id"]})
        else:
            print_line(f"accepted {new}" if new else f"nothing to retry in {row['id']}")


@app.command()
def deliver(
    batch: BatchArg = "last",
    to: Annotated[Path, typer.Option(help="Folder.")] = Path("delivery"),
    archive: Annotated[Path | None, typer.Option("--zip", help="Write a zip file as well.")] = None,
    as_json: Json = False,
) -> None:
    """Lay a batch's results down in a folder: files with names, manifest.csv, checksums, a page that shows and plays them."""
    with factory() as f:
        out = _deliver(f, f.find_batch(batch)["id"], to, archive, as_json)
        if as_json:
            emit(out)


def run(
    manifest: ManifestArg, kind: KindOption = None, sets: SetOption = None, limit: LimitOption = None, name: NameOption = None,
    priority: PriorityOption = 0, reuse: ReuseOption = True,
    deliver: Annotated[Path | None, typer.Option("--deliver", help="Folder for the results.")] = None,
    flower: Annotated[bool, typer.Option(help="Run Flower meanwhile.")] = True,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Start the factory, make one batch, lay it down, stop the factory. An unfinished batch of the same manifest is continued."""
    from producer.cli.system import start
    from producer.cli.watch import watch as look

    with factory() as f:
        # Mistakes are told before anything is started.
        opened = _open(manifest, kind, sets, limit)
        report = f.producer.plan(opened, spool=True)
        report.raise_for_errors(shown=1000)
        with start(f, flower=flower, quiet=as_json) as up:
            batch_id = _accept(f, manifest, kind, sets, limit, name, priority, reuse, not as_json, report)
            expand = _expander(f, batch_id)

            def step() -> None:
                if up is not None:
                    up.check()
                expand()

            view = look(f.database, f.project_id, batch_id, quiet=as_json, step=step)
            extra = _deliver(f, batch_id, deliver, None, as_json) if deliver else {}
        _report(view, as_json, extra)
        _exit(view)

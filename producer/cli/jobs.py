"""``factory jobs``: list, show, logs, cancel."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from contentfactory.errors import InputError, NotFound
from contentfactory.states import JobState
from producer.cli.common import Factory, Json, duration, emit, factory, moment, print_line, table

app = typer.Typer(no_args_is_help=True)


def wait_for(f: Factory, job_id: str, *, quiet: bool = False) -> Mapping[str, Any]:
    """Wait until a job is terminal."""
    said = ""
    while True:
        row = f.find_job(job_id)
        if JobState(row["state"]).terminal:
            return row
        done = "" if row["progress"] is None else f" {row['progress']:.0%}"
        word = f"{row['state']}{done} {row['message'] or ''}".strip()
        if word != said and not quiet:
            said = word
            typer.echo(f"{job_id}: {word}", err=True)
        time.sleep(0.1)


def _view(f: Factory, row: Mapping[str, Any]) -> dict[str, Any]:
    from db import jobs

    with f.database.read() as conn:
        artifacts = jobs.artifacts(conn, [row["id"]], ("output", "model", "sample", "checkpoint")).get(row["id"], [])
        attempts = jobs.attempts(conn, row["id"])
        parents = jobs.parents(conn, row["id"])
    hidden = ("idempotency_key", "request_hash")
    return {
        **{k: v for k, v in row.items() if k not in hidden},
        "depends_on": parents,
        "artifacts": [{k: v for k, v in a.items() if k not in ("job_id", "project_id")} for a in artifacts],
        "attempts": [dict(a) for a in attempts],
    }


def show_job(f: Factory, row: Mapping[str, Any], *, as_json: bool = False, out: Path | None = None) -> None:
    """Print a job with its artifacts; short texts are shown, files are copied where a folder is given."""
    view = _view(f, row)
    saved: list[str] = []
    if out is not None:
        for artifact in view["artifacts"]:
            if artifact["role"] != "output":
                continue
            path = out / artifact["name"]
            f.store.download(artifact["object_key"], path, sha256=artifact["sha256"])
            saved.append(str(path))
    if as_json:
        emit({**view, "saved": saved} if out is not None else view)
        return
    print_line(f"{view['id']}  {view['kind']}  {view['state']}" + (f"  ({view['custom_id']})" if view["custom_id"] else ""))
    for name in ("batch_id", "model", "seed", "priority", "message", "reused_from", "retry_of"):
        if view[name] not in (None, ""):
            print_line(f"  {name:<12} {view[name]}")
    for name in ("created_at", "started_at", "finished_at"):
        if view[name]:
            print_line(f"  {name:<12} {moment(view[name])}")
    if view["error"]:
        print_line(f"  error        {view['error'].get('code')}: {view['error'].get('message')}")
    for artifact in view["artifacts"]:
        print_line(f"  {artifact['role']:<12} {artifact['name']}  {artifact['media_type']}  {artifact['size']} bytes  {artifact['id']}")
        if artifact["media_type"] == "text/plain" and artifact["size"] <= 4000:
            print_line("      " + f.store.get(artifact["object_key"]).decode("utf-8", "replace").replace("\n", "\n      "))
    for path in saved:
        print_line(f"  saved        {path}")


@app.command("list")
def list_(
    batch: Annotated[str | None, typer.Option(help="Only jobs of this batch.")] = None,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only jobs of this kind.")] = None,
    after: Annotated[str | None, typer.Option(help="Start after this job's id (for the next page).")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most jobs to show.")] = 50,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    from db import jobs

    with factory() as f:
        if state is not None and state not in JobState.__members__.values():
            raise NotFound(f"state {state!r} does not exist; states: {', '.join(JobState)}")
        batch_id = f.find_batch(batch)["id"] if batch else None
        with f.database.read() as conn:
            rows = jobs.list_page(conn, f.project_id, batch_id=batch_id, state=state, kind=kind, after=after, limit=limit)
        if as_json:
            emit([dict(r) for r in rows])
            return
        shown = [
            (r["id"], r["custom_id"], r["kind"], r["state"], r["attempt"], moment(r["created_at"]),
             duration(r["finished_at"] - r["started_at"]) if r["finished_at"] and r["started_at"] else "",
             (r["error"] or {}).get("message", "")[:80])
            for r in rows
        ]  # fmt: skip
        table(shown, ("id", "custom_id", "kind", "state", "attempt", "created", "took", "error"), "no jobs")


@app.command()
def show(
    job: Annotated[str, typer.Argument(help="Job id, or BATCH:CUSTOM_ID (BATCH may be 'last').")],
    out: Annotated[Path | None, typer.Option(help="Copy its outputs into this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Show a job, its attempts and its artifacts."""
    with factory() as f:
        show_job(f, f.find_job(job), as_json=as_json, out=out)


@app.command()
def logs(
    job: Annotated[str, typer.Argument(help="Job id, or BATCH:CUSTOM_ID.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    as_json: Json = False,
) -> None:
    """The story of a job: attempts, retries, metrics, errors, in order."""
    from db import jobs

    with factory() as f:
        row = f.find_job(job)
        last = 0
        lines: list[Any] = []
        while True:
            row = f.find_job(row["id"])
            ended = JobState(row["state"]).terminal
            with f.database.read() as conn:
                events = jobs.story(conn, row, after=last)
                attempts = jobs.attempts(conn, row["id"])
            for event in events:
                last = event["id"] or last
                lines.append(event)
                if not as_json:
                    print_line(f"{moment(event['at'])}  {event['type']:<14} {_words(event['data'])}")
            if not follow or ended:
                break
            time.sleep(0.5)
        if as_json:
            emit({"events": lines, "attempts": [dict(a) for a in attempts]})
            return
        for a in attempts:
            took = duration(a["finished_at"] - a["started_at"]) if a["finished_at"] else "running"
            error = (a["error"] or {}).get("message", "")
            print_line(f"attempt {a['attempt']}: {a['outcome'] or 'running'}, {took}, group of {a['group_size']}, {a['worker']} {error}")
            if (a["error"] or {}).get("detail", {}).get("traceback"):
                print_line(a["error"]["detail"]["traceback"])


def _words(data: Mapping[str, Any]) -> str:
    if "metrics" in data:
        return "  ".join(f"{k}={v:.5g}" for k, v in data["metrics"].items())
    if "error" in data:
        return f"{data['error'].get('code')}: {data['error'].get('message')}"
    return "  ".join(f"{k}={v}" for k, v in data.items())


JobsArg = Annotated[list[str] | None, typer.Argument(help="Job ids, or BATCH:CUSTOM_ID; or choose with the options.")]
QueueOption = Annotated[str | None, typer.Option(help="Jobs of this queue.")]
KindOption = Annotated[str | None, typer.Option(help="Jobs of this kind.")]
AllOption = Annotated[bool, typer.Option("--all", help="Every job of the project.")]


def _chosen(f: Factory, ids: list[str] | None, states: Sequence[str], queue: str | None, kind: str | None, everything: bool) -> Iterator[list[str]]:
    """The jobs that a command means, in chunks; a second look finds none of those that it has dealt with."""
    from db import jobs

    if ids:
        if queue or kind or everything:
            raise InputError("name jobs, or choose them with --queue, --kind or --all; not both")
        yield [f.find_job(job)["id"] for job in ids]
        return
    if not (queue or kind or everything):
        raise InputError("name at least one job, or choose with --queue, --kind or --all")
    seen: set[str] = set()
    while True:
        with f.database.read() as conn:
            found = jobs.ids_where(conn, f.project_id, states, queue=queue, kind=kind, limit=1000)
        fresh = [i for i in found if i not in seen]
        if not fresh:
            return
        seen.update(fresh)
        yield fresh


@app.command()
def cancel(
    jobs: JobsArg = None, queue: QueueOption = None, kind: KindOption = None, everything: AllOption = False, as_json: Json = False
) -> None:
    """Cancel jobs: waiting ones at once, running ones as soon as their runner looks up. Ended ones stay as they are."""
    from db import counters, lifecycle

    with factory() as f:
        total = {"cancelled": 0, "requested": 0}
        for ids in _chosen(f, jobs, [s for s in JobState if not s.terminal], queue, kind, everything):
            found = f.database.run(partial(lifecycle.cancel_jobs, ids=ids))
            total = {k: total[k] + found[k] for k in total}
        f.database.run(counters.close_batches)
        emit(total) if as_json else print_line(f"{total['cancelled']} cancelled, {total['requested']} running ones asked to stop")


@app.command()
def retry(
    jobs: JobsArg = None, state: Annotated[str, typer.Option(help="With --queue, --kind or --all: failed, dead or cancelled.")] = "dead",
    queue: QueueOption = None, kind: KindOption = None, everything: AllOption = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Run failed, dead or cancelled jobs again as new linked jobs, with the children that failed for their sake."""
    with factory() as f:
        if state not in ("failed", "dead", "cancelled"):
            raise InputError(f"state is {state!r}; allowed: failed, dead, cancelled", param="state")
        made: list[str] = []
        for ids in _chosen(f, jobs, [state], queue, kind, everything):
            made += f.producer.retry_jobs(ids)
        emit({"jobs": made}) if as_json else print_line("\n".join(made) if made else "nothing to retry")


@app.command()
def prioritise(
    priority: Annotated[int, typer.Argument(min=0, max=100, help="0 to 100; higher leaves first.")],
    jobs: JobsArg = None, queue: QueueOption = None, kind: KindOption = None, everything: AllOption = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Give waiting jobs another priority."""
    from db import lifecycle

    with factory() as f:
        n = 0
        for ids in _chosen(f, jobs, ["blocked", "queued", "dispatched"], queue, kind, everything):
            n += f.database.run(partial(lifecycle.reprioritise, ids=ids, priority=priority))
        f.producer.kick()
        emit({"jobs": n, "priority": priority}) if as_json else print_line(f"{n} jobs have priority {priority} now")

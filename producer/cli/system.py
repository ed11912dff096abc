"""``factory up``, ``down``, ``doctor``, ``queues``, ``kinds``."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from contentfactory.errors import FactoryError, NotFound
from producer.cli.common import EXIT_SERVICE, Factory, Json, emit, factory, print_line, table

queues = typer.Typer(no_args_is_help=True)
kinds = typer.Typer(no_args_is_help=True)
projects = typer.Typer(no_args_is_help=True)


@contextmanager
def start(f: Factory, *, flower: bool = True, quiet: bool = False) -> Iterator[Any]:
    """The running factory of this state folder, or one for the length of the block; yields the supervisor if it is ours."""
    from producer.supervisor import ensure

    def prepare() -> None:
        if f.settings.embedded_broker:
            from db.glance import at_rest

            if at_rest(f.settings.database()):
                return
        # Broker and Flower start meanwhile: loading what speaks to a database takes as long as they need.
        database = f.database
        if f.settings.embedded_broker and database.sqlite:
            from db import lifecycle

            # This folder has no other supervisor, so no worker of it lives: what they held may go on at once, without waiting for leases.
            database.run(lambda conn: lifecycle.release_all(conn, "the factory was stopped"))

    with ensure(f.settings, flower=flower, prepare=prepare) as up:
        if up is not None:
            up.wait_ready()
            if not quiet and up.flower_url:
                print_line(f"Flower: {up.flower_url} (login {f.settings.flower_user}, password in {f.settings.run_dir / 'flower.password'})")
        # The timer looks at the ledger as soon as it runs; what was opened before had no broker yet.
        f.__dict__.pop("publisher", None)
        f.__dict__.pop("producer", None)
        yield up


def up(
    flower: Annotated[bool, typer.Option(help="Run Flower.")] = True,
    as_json: Json = False,
) -> None:
    """Start broker, timer, workers and Flower, and stay with them until Ctrl-C."""
    from contentfactory.service import load_quickly

    load_quickly()  # before the supervisor loads them
    from producer.supervisor import running

    with factory() as f:
        info = running(f.settings)
        if info is not None:
            raise FactoryError(f"a factory runs in {f.settings.state_dir} already (process {info.pid}); stop it with `factory down`")
        started = time.monotonic()
        with start(f, flower=flower, quiet=as_json) as supervisor:
            status = supervisor.status()
            if as_json:
                emit({"state_dir": str(f.settings.state_dir), "services": status, "flower": supervisor.flower_url})
                sys.stdout.flush()
            else:
                print_line(f"ready in {time.monotonic() - started:.1f} s: {', '.join(status)}; Ctrl-C stops them")
                sys.stdout.flush()
            supervisor.wait()
            if not as_json:
                print_line("stopping: running jobs end or are given back")


def down(as_json: Json = False) -> None:
    """Stop the factory that runs in this state folder."""
    from producer.supervisor import stop

    with factory() as f:
        stopped = stop(f.settings)
        emit({"stopped": stopped}) if as_json else print_line("stopped" if stopped else "no factory runs here")


@queues.command("list")
def list_queues(as_json: Json = False) -> None:
    """Queues: jobs that wait and run, and workers."""
    from contentfactory.jobs.spec import QUEUES
    from db import status

    with factory() as f:
        with f.database.read() as conn:
            rows = status.queues(conn, QUEUES)
        if as_json:
            emit(rows)
            return
        table([tuple(r.values()) for r in rows], tuple(rows[0]), "no queues")


def _set_paused(f: Factory, name: str, paused: bool) -> None:
    from contentfactory.jobs.spec import QUEUES
    from db import lifecycle

    if name not in QUEUES:
        raise NotFound(f"queue {name!r} does not exist; queues: {', '.join(QUEUES)}")
    f.database.run(lambda conn: lifecycle.pause(conn, "queue", name, paused))
    if not paused:
        f.producer.kick()


def _pause(name: str, paused: bool, as_json: bool) -> None:
    with factory() as f:
        _set_paused(f, name, paused)
        emit({"queue": name, "paused": paused}) if as_json else print_line(f"{name} {'paused' if paused else 'goes on'}")


@queues.command()
def pause(queue: str, as_json: Json = False) -> None:
    """Let nothing of a queue start any more."""
    _pause(queue, True, as_json)


@queues.command()
def resume(queue: str, as_json: Json = False) -> None:
    """Let a paused queue go on."""
    _pause(queue, False, as_json)


@queues.command()
def drain(
    queue: str, timeout: Annotated[float, typer.Option(min=0, help="Longest wait, seconds.")] = 3600.0, as_json: Json = False
) -> None:
    """Pause a queue and wait until nothing of it runs: before an upgrade or a change of machines."""
    from db import status

    with factory() as f:
        _set_paused(f, queue, True)
        end = time.monotonic() + timeout
        while True:
            with f.database.read() as conn:
                running = status.queues(conn, [queue])[0]["running"]
            if not running or time.monotonic() > end:
                break
            time.sleep(0.5)
        emit({"queue": queue, "paused": True, "running": running}) if as_json else print_line(
            f"{queue} is paused" + (f"; {running} jobs still run" if running else ", nothing runs")
        )
        if running:
            raise typer.Exit(1)


@projects.command("list")
def list_projects(as_json: Json = False) -> None:
    """Projects with their weight in the fair share."""
    from db import projects as repository

    with factory() as f:
        with f.database.read() as conn:
            rows = repository.list_all(conn)
        if as_json:
            emit([dict(r._mapping) for r in rows])
            return
        table([(r.id, r.name, r.weight, "yes" if r.paused else "") for r in rows], ("id", "name", "weight", "paused"), "no projects")


def _project(name: str, paused: bool, as_json: bool) -> None:
    from db import lifecycle

    with factory() as f:
        project_id = _find_project(f, name)
        f.database.run(lambda conn: lifecycle.pause(conn, "project", project_id, paused))
        if not paused:
            f.producer.kick()
        emit({"project": name, "paused": paused}) if as_json else print_line(f"{name} {'paused' if paused else 'goes on'}")


def _find_project(f: Factory, name: str) -> str:
    from db import projects as repository

    with f.database.read() as conn:
        for row in repository.list_all(conn):
            if row.name == name:
                return str(row.id)
    raise NotFound(f"project {name!r} does not exist; see `factory projects list`")


@projects.command("pause")
def pause_project(name: str, as_json: Json = False) -> None:
    """Let nothing of a project start any more."""
    _project(name, True, as_json)


@projects.command("resume")
def resume_project(name: str, as_json: Json = False) -> None:
    """Let a paused project go on."""
    _project(name, False, as_json)


@projects.command("weight")
def weight_project(
    name: str, weight: Annotated[float, typer.Argument(min=0.01, max=1000, help="Share beside others; 1 is usual.")], as_json: Json = False
) -> None:
    """Give a project a larger or smaller share of the compute."""
    from db import projects as repository

    with factory() as f:
        project_id = _find_project(f, name)
        f.database.run(lambda conn: repository.set_weight(conn, project_id, weight))
        emit({"project": name, "weight": weight}) if as_json else print_line(f"{name} has weight {weight:g}")


def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would go.")] = False, as_json: Json = False
) -> None:
    """Remove what is past its retention and what nothing refers to; the timer does it every hour by itself."""
    from dataclasses import asdict

    from producer.sweep import sweep as run

    with factory() as f:
        swept = asdict(run(f.settings, f.database, f.store, dry_run=dry_run))
        emit(swept) if as_json else print_line(", ".join(f"{v} {k}" for k, v in swept.items()))


@kinds.command("list")
def list_kinds(as_json: Json = False) -> None:
    """Kinds of job."""
    from contentfactory.jobs.spec import load_kinds

    specs = sorted(load_kinds().values(), key=lambda s: s.name)
    if as_json:
        emit([{"name": s.name, "queue": s.queue, "outputs": s.outputs, "default_model": s.default_model, "summary": s.summary} for s in specs])
        return
    table([(s.name, s.queue, s.default_model or "", s.summary) for s in specs], ("kind", "queue", "default model", "summary"), "no kinds")


@kinds.command("show")
def show_kind(name: str, as_json: Json = False) -> None:
    """A kind's fields with limits, units and defaults."""
    from contentfactory.jobs.spec import get_kind

    try:
        spec = get_kind(name)
    except FactoryError as error:
        sys.stderr.write(f"error: {error.message}\n")
        raise typer.Exit(2) from None
    schema = spec.params.model_json_schema()
    if as_json:
        emit({"name": spec.name, "queue": spec.queue, "outputs": spec.outputs, "max_group": spec.max_group, "default_model": spec.default_model, "schema": schema})
        return
    print_line(f"{spec.name}  (queue {spec.queue}, up to {spec.max_group} in a micro-batch, makes {', '.join(spec.outputs)})\n{spec.summary}\n")
    for field, info in spec.params.model_fields.items():
        default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
        print_line(f"  {field:<22} {info.description or ''} ({default})")


def doctor(
    deep: Annotated[bool, typer.Option(help="Also verify every built-in model's files.")] = False,
    as_json: Json = False,
) -> None:
    """Check broker, database, storage, devices and models, and say how to mend what is broken."""
    from producer.cli.doctor import examine

    with factory() as f:
        results = examine(f, deep=deep)
        if as_json:
            emit(results)
        else:
            marks = {"ok": "ok  ", "warning": "warn", "failed": "FAIL"}
            for r in results:
                print_line(f"{marks[r['status']]}  {r['check']:<12} {r['message']}" + (f"\n      mend: {r['mend']}" if r.get("mend") else ""))
        if any(r["status"] == "failed" for r in results):
            raise typer.Exit(EXIT_SERVICE)

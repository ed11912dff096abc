"""``factory tune``: measure how a model runs best on this machine, and use that from now on."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from contentfactory.errors import FactoryError, InputError
from producer.cli.common import Json, emit, factory, print_line, table


def tune(
    model: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")],
    kind: Annotated[str | None, typer.Option(help="Kind of job that it is tuned for; the first one that it serves where left out.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure shortly: seconds instead of minutes, rougher.")] = False,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="Also choose options that change results beyond the tolerance.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, store nothing.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Measure nothing; go back to the version's defaults.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a model's inference options on this machine and store the best with its version.

    Options that change results beyond the stated tolerance are shown and not chosen. Jobs that name the model without a
    version use the chosen options from now on; accepted ones stay as they are.
    """
    from contentfactory.jobs.spec import get_kind
    from db import tunings
    from producer.models import find

    with factory() as f:
        project_id = f.project_id
        with f.database.read() as conn:
            pinned = find(conn, project_id, model)
        base = pinned.key.removesuffix(f"+{pinned.tag}") if pinned.tag else pinned.key
        if clear:
            n = f.database.run(lambda conn: tunings.clear(conn, project_id, base))
            emit({"model": base, "cleared": n}) if as_json else print_line(f"{base}: back to its defaults" if n else f"{base} has no options in use")
            return
        spec = get_kind(kind or pinned.tasks[0])
        if spec.name not in pinned.tasks and spec.task not in pinned.tasks:
            raise InputError(f"model {base} does {', '.join(pinned.tasks)}, not {spec.name}", param="kind")
        command = [
            sys.executable, "-m", "worker.tuning", base, "--project", project_id, "--device", device,
            "--seconds", "0.2" if quick else "3", "--most", str(min(spec.max_group, 4) if quick else spec.max_group),
            *(["--allow-lossy"] if allow_lossy else []),
        ]  # fmt: skip
        report = _measure(command, f.settings.environment(), quiet=as_json)
        if report["options"] and not dry_run:
            kept = {key: report[key] for key in ("results", "gain", "chosen", "batch", "threads", "tolerance")}
            report["tag"] = f.database.run(
                lambda conn: tunings.store(conn, project_id, base, device=report["device"], options=report["options"], report=kept)
            )
        if as_json:
            emit(report)
            return
        _show(report)
        if report.get("tag"):
            print_line(f"stored: jobs that name {base.partition('@')[0]} use {base}+{report['tag']} from now on; `factory tune {base} --clear` goes back")
        elif report["options"]:
            print_line("nothing stored (--dry-run)")
        else:
            print_line("the defaults stay: nothing with the same results is at least 5 % faster")


def _measure(command: list[str], environment: Mapping[str, str], quiet: bool) -> dict[str, Any]:
    """Run the measuring process; its progress comes as lines on its standard error."""
    import os

    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )  # fmt: skip
    noise: list[str] = []
    assert process.stdout is not None and process.stderr is not None  # noqa: S101 - Popen was given pipes
    try:
        for line in process.stderr:
            try:
                result = json.loads(line)
                word = f"skipped: {result['skipped']}" if result["skipped"] else f"{_rate(result)} {result['unit']}/s"
                if not quiet:
                    sys.stderr.write(f"  {result['name']}: {word}\n")
            except (ValueError, KeyError, TypeError):
                noise.append(line.rstrip())
        out = process.stdout.read()
        process.wait()
    except BaseException:
        process.terminate()
        process.wait(10)
        raise
    try:
        report: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise FactoryError(f"measuring ended with code {process.returncode}: {' '.join(noise[-3:])[:500]}", code="tune_failed") from None
    if "error" in report:
        error = report["error"]
        raise FactoryError(error["message"], code=error["code"])
    return report


def _rate(result: Mapping[str, Any]) -> str:
    best = max(result["speed"].values(), default=0.0)
    return f"{best:.4g}"


def _show(report: Mapping[str, Any]) -> None:
    results = report["results"]
    base = max(results[0]["speed"].values(), default=0.0) or 1.0
    rows = []
    for r in results:
        if r["skipped"]:
            rows.append((r["name"], "", "", "", "", "", f"skipped: {r['skipped']}"))
            continue
        best = max(r["speed"], key=lambda size: r["speed"][size])
        quality = ", ".join(f"{k} {v:.4g}" for k, v in r["quality"].items())
        verdict = "chosen" if r["name"] == report["chosen"] else r["lossy"] or ("" if r["same"] else "results differ too much")
        speed = r["speed"][best]
        rows.append((r["name"], f"{speed:.4g}", f"{speed / base:.2f}×", best, f"{r['memory_mb']:.0f}", quality, verdict))
    limits = ", ".join(f"{k} {v:g}" for k, v in report["tolerance"].items())
    print_line(f"{report['model']} ({report['engine']}) on {report['device']}, {report['threads']} threads; tolerance: {limits}")
    table(rows, ("options", f"{results[0]['unit']}/s", "gain", "batch", "peak MB", "against the defaults", "note"), "nothing measured")

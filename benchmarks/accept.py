"""Bulk accept: rows a second from a file, checked, to committed rows, beside raw COPY or executemany of the very same rows.

The raw side gets ready-made values, one statement, one transaction, and the same table with all its indices and foreign keys; it
checks nothing. Ours reads, validates each line by its kind, computes ids, seeds and share keys, keeps the manifest, and commits in
chunks that may be continued after a crash.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import text

from benchmarks.harness import ROOT, Bench, Factory
from db.models import Job

WORDS = "river stone light engine garden winter paper signal copper orchard thunder violin harbour meadow lantern".split()


def words(n: int) -> str:
    """A short text of its own for each row."""
    return " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 5 + n % 12)) + f" number {n}"


def write_manifest(path: Path, rows: int) -> Path:
    """Rows as job lines (``.jsonl``) or as a table (``.csv``)."""
    with open(path, "w") as out:
        if path.suffix == ".csv":
            out.write("id,text\n")
            out.writelines(f"row-{n},{words(n)}\n" for n in range(rows))
        else:
            for n in range(rows):
                out.write(json.dumps({"custom_id": f"row-{n}", "kind": "text.echo", "params": {"text": words(n)}}) + "\n")
    return path


def accept(factory: Factory, path: Path) -> dict[str, float]:
    """Hand in a manifest; rows a second from the open file to the last commit."""
    from producer import manifest as manifests

    producer = factory.producer(publish=False)
    begun, cpu = time.monotonic(), time.process_time()
    table = {"kind": "text.echo", "sets": {"id": "{id}", "text": "{text}"}} if path.suffix == ".csv" else {}
    batch_id, _ = producer.create_batch(manifests.open_manifest(path, **table), resume=False)
    checked = time.monotonic()
    producer.expand(batch_id)
    ended, used = time.monotonic(), time.process_time() - cpu
    with factory.database.read() as conn:
        rows = int(conn.execute(text("SELECT count(*) FROM jobs")).scalar_one())
    return {"value": rows / (ended - begun), "checked/s": rows / (checked - begun), "written/s": rows / (ended - checked), "µs/row": used / rows * 1e6}


def _empty(factory: Factory) -> None:
    with factory.database.write() as conn:
        for table in ("batch_deltas", "batch_counts", "events", "job_dependencies", "jobs", "batches"):
            conn.execute(text(f"DELETE FROM {table}"))
    if not factory.database.sqlite:
        with factory.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(text("VACUUM jobs"))


def _captured(factory: Factory) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The rows that our side wrote, as the driver takes them back."""
    columns: list[str] = []
    with factory.database.read() as conn:
        # Without what the database computes: nobody may write that.
        columns = [column.name for column in Job.__table__.columns if column.computed is None]
        if factory.database.sqlite:
            cursor = conn.exec_driver_sql(f"SELECT {', '.join(columns)} FROM jobs")
            return columns, [tuple(r) for r in cursor]
        # JSON as text: nothing is decoded and encoded for the raw side.
        json_columns = set(
            conn.execute(text("SELECT column_name FROM information_schema.columns WHERE table_name = 'jobs' AND data_type LIKE 'json%'")).scalars()
        )
        chosen = ", ".join(f'"{c}"::text' if c in json_columns else f'"{c}"' for c in columns)
        return columns, [tuple(r) for r in conn.execute(text(f"SELECT {chosen} FROM jobs"))]


def raw(factory: Factory, columns: list[str], rows: list[tuple[Any, ...]]) -> dict[str, float]:
    """COPY or executemany of ready-made values in one transaction."""
    names = ", ".join(f'"{c}"' for c in columns)
    gc.collect()
    begun, cpu = time.monotonic(), time.process_time()
    with factory.database.write() as conn:
        driver = conn.connection.driver_connection
        if factory.database.sqlite:
            driver.executemany(f"INSERT INTO jobs ({names}) VALUES ({', '.join('?' * len(columns))})", rows)
        else:
            with driver.cursor() as cursor, cursor.copy(f"COPY jobs ({names}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
    took, used = time.monotonic() - begun, time.process_time() - cpu
    return {"value": len(rows) / took, "µs/row": used / len(rows) * 1e6}


def _compare(bench: Bench, profile: str, suffix: str) -> None:
    name = f"accept.{'postgresql' if profile == 'production' else 'sqlite'}_{suffix}"
    if not bench.wants(name):
        return
    rows = bench.pick(300, 20_000, 100_000)
    way = "COPY" if profile == "production" else "executemany"
    with bench.case(name, f"{rows:,} rows of a {suffix.upper()} manifest beside raw {way} into the same table", "rows/s") as case, bench.factory(profile) as factory:
        path = write_manifest(factory.folder / f"manifest.{suffix}", rows)
        captured: list[Any] = []

        def ours() -> dict[str, float]:
            _empty(factory)
            sample = accept(factory, path)
            captured[:] = _captured(factory)
            return sample

        def ready_made() -> dict[str, float]:
            columns, found = captured
            # The batch's row stays, for the foreign key.
            with factory.database.write() as conn:
                conn.execute(text("DELETE FROM jobs"))
            if not factory.database.sqlite:
                with factory.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
                    conn.execute(text("VACUUM jobs"))
            return raw(factory, columns, found)

        def one_call() -> dict[str, float]:
            _empty(factory)
            params = [{"text": words(n)} for n in range(rows)]
            producer = factory.producer(publish=False)
            begun, cpu = time.monotonic(), time.process_time()
            for start in range(0, rows, 10_000):
                producer.submit_many("text.echo", params[start : start + 10_000])
            took, used = time.monotonic() - begun, time.process_time() - cpu
            return {"value": rows / took, "µs/row": used / rows * 1e6}

        sides: dict[str, Callable[[], Any]] = {"ours": ours, f"raw {way}": ready_made}
        if suffix == "jsonl":
            sides["ours, submit_many"] = one_call
        for _ in range(bench.rounds):
            for side, call in sides.items():
                case.add(side, call())
        case.ratio("ours", f"raw {way}", target=0.5)
        if suffix == "jsonl":
            case.ratio("ours, submit_many", f"raw {way}", target=0.5)


def watched(command: list[str], folder: Path) -> tuple[str, list[float]]:
    """Run a command on an embedded factory of its own: what it printed, and its memory, MB, twenty times a second.

    The kernel's own maximum would be no smaller than what the process held that started it.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("FACTORY_")}
    env |= {"FACTORY_STATE_DIR": str(folder / "state"), "PYTHONPATH": str(ROOT)}
    samples: list[float] = []
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        one = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                if rss := one.memory_info().rss:  # none while it ends
                    samples.append(rss / 2**20)
            except psutil.Error:
                break
            time.sleep(0.05)
        out = process.stdout.read() if process.stdout else ""
        process.wait()
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"exit {process.returncode}: {errors.read()[-1500:]}")
    return out, samples


def _memory(bench: Bench) -> None:
    if not bench.wants("accept.memory"):
        return
    few, rows = bench.pick((100, 300), (50_000, 200_000), (100_000, 1_000_000))
    with bench.case("accept.memory", f"memory of the accepting process over {rows:,} rows (CSV, SQLite)", "MB", better="lower") as case:

        def taken(count: int) -> list[float]:
            folder = bench.folder / f"memory-{count}"
            folder.mkdir()
            path = write_manifest(folder / "rows.csv", count)
            out, samples = watched(
                [
                    *(sys.executable, "-m", "contentfactory", "batch", "run", str(path), "--kind", "text.echo"),
                    *("--set", "id={id}", "--set", "text={text}", "--json"),
                ],
                folder,
            )
            if (accepted := json.loads(out)["total"]) != count:
                raise RuntimeError(f"{accepted} of {count} rows were accepted")
            return samples

        # `flat`: several times the rows need no more, but for a little.
        least = max(taken(few))
        begun = time.monotonic()
        samples = taken(rows)
        took = time.monotonic() - begun
        for share in (0.25, 0.5, 0.75, 1.0):
            case.add(f"at {share:.0%} of the time", {"value": samples[min(len(samples) - 1, int(share * len(samples)))]})
        case.add("peak", {"value": max(samples)})
        case.add(f"peak with {few:,} rows", {"value": least})
        case.check("peak", max(samples), "<=", 300, "MB")
        case.check(f"peak over that with {few:,} rows", max(samples) / least, "<=", 1.1, "×")
        case.note(f"{rows / took:,.0f} rows a second, start of the process included.")


_MANY = """
import json, sys
import psutil
from benchmarks.accept import words
from contentfactory.jobs.spec import load_kinds
from contentfactory.settings import load_settings
from db import migrate
from db.session import Database
from producer.enqueue import Producer
from producer.services import open_store

settings = load_settings()
load_kinds()
database = Database(settings.database())
migrate.upgrade(database)
producer = Producer(settings, database, open_store(settings))
rows, at_once = int(sys.argv[1]), int(sys.argv[2])
after = []
for start in range(0, rows, at_once):
    producer.submit_many("text.echo", [{"text": words(n)} for n in range(start, min(rows, start + at_once))])
    after.append(psutil.Process().memory_info().rss / 2**20)
print(json.dumps(after))
"""


def _memory_many(bench: Bench) -> None:
    if not bench.wants("accept.memory_many"):
        return
    rows, at_once = bench.pick((300, 100), (300_000, 100_000), (1_000_000, 100_000))
    with bench.case("accept.memory_many", f"memory of a process that submits {rows:,} rows by submit_many (SQLite)", "MB", better="lower") as case:
        folder = bench.folder / "memory-many"
        folder.mkdir()
        out, samples = watched([sys.executable, "-c", _MANY, str(rows), str(at_once)], folder)
        after = json.loads(out)
        middle = after[(len(after) - 1) // 2]
        for name, value in (("after the first call", after[0]), ("after half of the calls", middle), ("after the last call", after[-1]), ("peak", max(samples))):
            case.add(name, {"value": value})
        case.check("peak", max(samples), "<=", 300, "MB")
        # The first calls fill the database's own cache.
        case.check("after the last call over after half of them", after[-1] / middle, "<=", 1.1, "×")


def run(bench: Bench) -> None:
    for profile in ("production", "embedded"):
        for suffix in ("jsonl", "csv"):
            _compare(bench, profile, suffix)
    _memory(bench)
    _memory_many(bench)

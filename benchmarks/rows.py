"""Many small jobs out of a CSV by `factory run`, on the embedded profile: jobs a second, and the memory of every process over time.

Memory that grows with the number of rows is what this looks for: the accepting side streams the manifest, the worker keeps nothing of
what it has committed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.accept import write_manifest
from benchmarks.harness import ROOT, Bench

KINDS = {"text.echo": "text", "text.embed": "input"}


def role_of(process: psutil.Process) -> str:
    """What a process of the factory does."""
    line = " ".join(process.cmdline())
    for name, mark in (("timer", "producer.timer"), ("keeper", "worker.keeper"), ("flower", " flower"), ("broker", "valkey")):
        if mark in line:
            return name
    if "spawn_main" in line or "billiard" in line:
        return "worker child " + process.environ().get("FACTORY_WORKER_NAME", "").split("@")[0]
    if "celery" in line:
        return "worker parent"
    return "producer" if "contentfactory" in line else "other"


def _memory(state: Path, pid: int) -> dict[str, float]:
    now: dict[str, float] = {}
    for one in psutil.process_iter():
        try:
            if one.pid == pid or one.environ().get("FACTORY_STATE_DIR") == str(state):
                role = role_of(one)
                now[role] = max(now.get(role, 0.0), one.memory_info().rss / 2**20)
        except (psutil.Error, OSError):
            continue
    return now


def run(bench: Bench) -> None:
    for kind, field in KINDS.items():
        if not bench.wants(f"rows.{kind.partition('.')[2]}"):
            continue
        rows = bench.pick(40, 5000, 30_000)
        with bench.case(f"rows.{kind.partition('.')[2]}", f"`factory run` of {rows:,} rows of a CSV as {kind}: start to end", "rows/s") as case:
            folder = Path(tempfile.mkdtemp(prefix="rows-", dir=bench.folder))
            state = folder / "state"
            path = write_manifest(folder / "rows.csv", rows)
            env = {k: v for k, v in os.environ.items() if not k.startswith("FACTORY_")}
            env |= {
                "FACTORY_STATE_DIR": str(state), "FACTORY_MODEL_DIR": str(Path(tempfile.gettempdir()) / "contentfactory-models"),
                "FACTORY_EMBEDDED_WORKERS": '{"text": 1}', "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            command = [
                *(sys.executable, "-m", "contentfactory", "run", str(path), "--kind", kind, "--set", f"{field}={{text}}", "--set", "id={id}"),
                *("--json", "--no-flower"),
            ]
            samples: list[dict[str, float]] = []
            begun = time.monotonic()
            with open(folder / "log", "w") as log, subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process:
                while process.poll() is None:
                    samples.append(_memory(state, process.pid))
                    time.sleep(bench.pick(0.2, 0.5, 1.0))
                out = process.stdout.read() if process.stdout else ""
            took = time.monotonic() - begun
            counts = json.loads(out)["counts"] if out else {}
            if counts.get("succeeded") != rows:
                raise RuntimeError(f"{counts} of {rows} rows\n{(folder / 'log').read_text()[-1500:]}")
            case.add("ours", {"value": rows / took})

            def at(share: float, role: str, samples: list[dict[str, float]] = samples) -> float:
                seen = [s[role] for s in samples if role in s]
                return seen[min(len(seen) - 1, int(share * len(seen)))] if seen else 0.0

            roles = sorted({r for s in samples for r in s})
            table = [[role, *(at(share, role) for share in (0.25, 0.5, 0.75, 1.0)), max(s.get(role, 0.0) for s in samples)] for role in roles]
            case.table("Memory, MB", ("process", "25 %", "50 %", "75 %", "end", "peak"), table)
            grown = {row[0]: row[4] / row[2] for row in table if row[2]}
            worst = max(grown, key=grown.__getitem__)
            case.check(f"memory at the end over the half ({worst})", grown[worst], "<=", 1.2, "×")

"""Many small jobs out of a CSV, on the embedded profile: jobs a second, and the memory of every process over time.

    python benchmarks/rows.py [--rows 10000] [--kind text.embed] [--accept-only]

Prints a table and writes it as JSON beside the state folder that it makes. Memory that grows with the number of rows is what
this looks for: the accepting side streams the manifest, the worker keeps nothing of what it has committed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
WORDS = "river stone light engine garden winter paper signal copper orchard thunder violin harbour meadow lantern".split()


def write_rows(path: Path, rows: int) -> None:
    with open(path, "w") as out:
        out.write("id,text\n")
        for n in range(rows):
            text = " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 5 + n % 12))
            out.write(f"row-{n},{text} number {n}\n")


def role_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    for name, mark in (("timer", "producer.timer"), ("keeper", "worker.keeper"), ("flower", " flower"), ("broker", "valkey")):
        if mark in line:
            return name
    if "spawn_main" in line or "billiard" in line:
        return "worker child " + process.environ().get("FACTORY_WORKER_NAME", "").split("@")[0]
    if "celery" in line:
        return "worker parent"
    return "producer" if "contentfactory" in line else "other"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--kind", default="text.embed")
    parser.add_argument("--field", default="input")
    parser.add_argument("--accept-only", action="store_true", help="accept and expand, run nothing")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="factory-rows-"))
    state = folder / "state"
    write_rows(folder / "rows.csv", options.rows)
    env = {**os.environ, "FACTORY_STATE_DIR": str(state), "FACTORY_FLOWER_PORT": "0"}
    env.setdefault("FACTORY_MODEL_DIR", str(Path(tempfile.gettempdir()) / "contentfactory-models"))
    command = [sys.executable, "-m", "contentfactory", *(("batch", "run") if options.accept_only else ("run",)), str(folder / "rows.csv"),
               "--kind", options.kind, "--set", f"{options.field}={{text}}", "--set", "id={id}", "--json"]  # fmt: skip
    command += [] if options.accept_only else ["--no-flower"]
    started = time.monotonic()
    samples: list[tuple[float, dict[str, float]]] = []
    with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            now: dict[str, float] = {}
            for one in psutil.process_iter():
                try:
                    if one.pid == process.pid or one.environ().get("FACTORY_STATE_DIR") == str(state):
                        role = role_of(one)
                        now[role] = max(now.get(role, 0.0), one.memory_info().rss / 2**20)
                except (psutil.Error, OSError):
                    continue
            samples.append((time.monotonic() - started, now))
            time.sleep(1.0)
        out = process.stdout.read() if process.stdout else ""
    total = time.monotonic() - started
    result = json.loads(out) if out else {}
    roles = sorted({r for _, s in samples for r in s})

    def at(share: float, role: str) -> float:
        seen = [s[role] for _, s in samples if role in s]
        return seen[min(len(seen) - 1, int(share * len(seen)))] if seen else 0.0

    table = {r: {"25 %": at(0.25, r), "50 %": at(0.5, r), "75 %": at(0.75, r), "end": at(1, r), "peak": max(s.get(r, 0) for _, s in samples)} for r in roles}
    print(f"{options.rows} rows of {options.kind}: {total:.0f} s, {options.rows / total:.0f} rows/s, counts {result.get('counts')}")
    print(f"{'MB':<28}" + "".join(f"{c:>9}" for c in ("25 %", "50 %", "75 %", "end", "peak")))
    for role, row in table.items():
        print(f"{role:<28}" + "".join(f"{v:>9.0f}" for v in row.values()))
    (folder / "result.json").write_text(json.dumps({"rows": options.rows, "seconds": total, "counts": result.get("counts"), "memory_mb": table}))
    print(folder / "result.json")


if __name__ == "__main__":
    main()

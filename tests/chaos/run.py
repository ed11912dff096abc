"""``make chaos``: inject every fault of the plan into a real factory and report what broke.

    python tests/chaos/run.py [--fault 3,4] [--seed 7] [--jobs 2000] [--out .factory-chaos]
"""

import argparse
import json
import math
import signal
import sys
import time
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from faults import FAULTS, Report
from harness import Scene, Services

ORDER = ["3", "10", "1", "2", "4", "5", "6", "7", "14", "15", "13", "8", "9", "11", "12", "16", "17"]


def table(rows: list[dict]) -> str:
    """The report as Markdown."""
    lines = ["| fault | jobs | injections | violations | recovery p50 s | p95 s | took s |", "|---|---:|---:|---:|---:|---:|---:|"]
    for r in rows:
        p50, p95 = (("–" if r[k] is None else f"{r[k]:.2f}") for k in ("p50", "p95"))
        lines.append(f"| {r['fault']} {r['title']} | {r['jobs']} | {r['injections']} | {r['count']} | {p50} | {p95} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> int:
    """Run the faults; 1 if an invariant was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", default="", help="numbers joined by commas; all where left out")
    parser.add_argument("--seed", type=int, default=None, help="seed of every random choice; printed, drawn from the clock where left out")
    parser.add_argument("--jobs", type=int, default=0, help="jobs in each fault; each fault's own number where left out")
    parser.add_argument("--out", type=Path, default=Path(".factory-chaos"), help="folder of reports and histories")
    parser.add_argument("--keep", type=Path, default=None, help="folder of servers and state to go on in later; fault 16 only")
    parser.add_argument("--seconds", type=float, default=math.inf, help="with --keep: stop in order after this time; call again to go on")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seed = args.seed if args.seed is not None else int(time.time())
    chosen = [x for x in args.fault.split(",") if x] or ORDER
    unknown = [x for x in chosen if x not in FAULTS]
    if unknown:
        parser.error(f"no fault {unknown[0]}; there are {', '.join(ORDER)}")
    if args.keep and chosen != ["16"]:
        parser.error("--keep goes with --fault 16 alone")
    deadline = time.monotonic() + args.seconds
    out = (args.out / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{seed}").absolute()
    out.mkdir(parents=True)
    print(f"seed {seed}; reports and histories in {out}", flush=True)
    services = Services(args.keep.absolute() if args.keep else None)
    rows: list[dict] = []
    try:
        for number in chosen:
            fault = FAULTS[number]
            report = Report()
            begun = time.monotonic()
            folder = (args.keep.absolute() if args.keep else out) / f"fault-{number}"
            scene = Scene(services, folder, f"f{number}", seed, deadline=deadline)
            try:
                fault.run(scene, args.jobs or fault.jobs, report)
            except Exception as error:
                report.violations.append(f"harness: {type(error).__name__}: {error}")
                traceback.print_exc()
            finally:
                report.seconds = time.monotonic() - begun
                scene.close()
            row = {
                "fault": number, "title": fault.title, **asdict(report), "count": len(report.violations), "p50": report.p50,
                "p95": report.p95, "recovery": [round(x, 2) for x in report.recovery],
            }  # fmt: skip
            rows.append(row)
            print(f"fault {number}: {row['jobs']} jobs, {row['injections']} injections, {row['count']} violations, recovery p50 {row['p50']} s, "
                  f"p95 {row['p95']} s, {row['seconds']:.0f} s; {json.dumps(report.notes)}", flush=True)  # fmt: skip
            for violation in report.violations[:10]:
                print(f"  VIOLATION {violation}", flush=True)
            (out / "report.json").write_text(json.dumps({"seed": seed, "faults": rows}, indent=1))
            (out / "report.md").write_text(f"Seed {seed}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n\n{table(rows)}\n")
    finally:
        services.close()
    print("\n" + table(rows))
    return int(any(r["count"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())

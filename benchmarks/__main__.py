"""``make bench``: measure this machine.

    python -m benchmarks [--only queues,accept.sqlite] [--sides ours,huey] [--size smoke|short|full] [--rounds N] [--out FILE] [--report FILE]

Writes a JSON file into ``benchmarks/results`` and a page beside it.
"""

import argparse
import importlib
import signal
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.harness import SIZES, Bench

FAMILIES = ("queues", "accept", "rows", "latency", "scale", "workers", "storage", "models", "startup")


def main() -> int:
    """Measure; 1 if a case could not be run. A missed target is no failure."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"families or cases joined by commas; families: {', '.join(FAMILIES)}")
    parser.add_argument("--sides", default="", help="of cases with many sides only those with one of these words in their name")
    parser.add_argument("--size", choices=SIZES, default="short", help="smoke: does it run; short: figures to work with; full: to publish")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of each case; 1, 3 or 5 by size where left out")
    parser.add_argument("--out", type=Path, help="where the JSON goes; benchmarks/results/<date>.json where left out")
    parser.add_argument("--report", type=Path, help="where the page goes; beside the JSON where left out")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    only = [x for x in options.only.split(",") if x]
    unknown = [x for x in only if x.partition(".")[0] not in FAMILIES]
    if unknown:
        parser.error(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    bench = Bench(options.size, only, [x for x in options.sides.split(",") if x], options.rounds)
    try:
        for name in FAMILIES:
            if bench.wants(name):
                importlib.import_module(f"benchmarks.{name}").run(bench)
    finally:
        if bench.cases:
            path = bench.write(options.out)
            page = options.report or path.with_suffix(".html")
            page.write_text(report.page([bench.result()]))
            print(f"\n{path}\n{page}")
        bench.close()
    if bench.failed:
        print(f"could not be run: {', '.join(bench.failed)}")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())

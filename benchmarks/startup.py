"""How long a person waits: for `factory --help`, and for `factory up` until everything answers.

    python benchmarks/startup.py [--times 5]

Prints a table and writes it as JSON. The first `factory up` of a state folder makes the database; the others are what counts. The
phases are the supervisor's own: from each service's start to its first answer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import structlog
from structlog.testing import capture_logs

from contentfactory.settings import load_settings
from producer.supervisor import Supervisor

ROOT = Path(__file__).parents[1]
FACTORY = [sys.executable, "-m", "contentfactory"]


def help_s() -> float:
    started = time.perf_counter()
    subprocess.run([*FACTORY, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def up_s(env: dict[str, str]) -> tuple[float, float]:
    """Seconds until `factory up` says that it is ready, and until it has ended again."""
    started = time.perf_counter()
    process = subprocess.Popen([*FACTORY, "up"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "ready in" not in (line := process.stdout.readline()):
        if not line:
            raise SystemExit("factory up ended before it was ready")
    ready = time.perf_counter() - started
    time.sleep(2.0)  # idle: the pools' children have come up too
    asked = time.perf_counter()
    process.terminate()
    process.communicate()
    return ready, time.perf_counter() - asked


def phases(state: Path) -> dict[str, float]:
    """Seconds from the supervisor's start to each service's start and first answer."""
    started = time.time()
    structlog.configure(processors=[structlog.processors.TimeStamper(key="at")])
    seen: dict[str, float] = {}
    with capture_logs(processors=[structlog.processors.TimeStamper(key="at")]) as entries:
        with Supervisor(load_settings(state_dir=state, flower_port=0)) as up:
            up.wait_ready()
            seen["all"] = time.time() - started
        for entry in entries:
            if entry["event"] in ("service_started", "service_ready"):
                seen[f"{entry['service']} {entry['event'].removeprefix('service_')}"] = entry["at"] - started
    return dict(sorted(seen.items(), key=lambda item: item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="factory-startup-"))
    env = {**os.environ, "FACTORY_STATE_DIR": str(folder / "state"), "FACTORY_FLOWER_PORT": "0"}
    helps = [help_s() for _ in range(options.times + 1)][1:]
    ups = [up_s(env) for _ in range(options.times + 1)]
    result = {
        "help_s": {"median": statistics.median(helps), "worst": max(helps)},
        "up_first_s": ups[0][0],
        "up_s": {"median": statistics.median(u for u, _ in ups[1:]), "worst": max(u for u, _ in ups[1:])},
        "down_s": {"median": statistics.median(d for _, d in ups[1:]), "worst": max(d for _, d in ups[1:])},
        "phases_s": phases(folder / "state"),
    }
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{name:<12} " + "  ".join(f"{key} {seconds:.2f}" for key, seconds in value.items()))
        else:
            print(f"{name:<12} {value:.2f}")
    (folder / "startup.json").write_text(json.dumps(result, indent=2))
    print(f"written to {folder / 'startup.json'}")


if __name__ == "__main__":
    main()

"""How long a person waits: for `factory --help`, and for `factory up` until everything answers.

The first `factory up` of a state folder makes the database; the others are what counts. The phases are the supervisor's own: from each
service's start to its first answer.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import structlog
from structlog.testing import capture_logs

from benchmarks.harness import Bench
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


def run(bench: Bench) -> None:
    if bench.wants("startup.help"):
        with bench.case("startup.help", "factory --help, from the shell's point of view", "s", better="lower") as case:
            helps = [help_s() for _ in range(bench.pick(2, 6, 20))][1:]  # the first one writes the compiled modules
            case.sides["help"] = {}
            for value in helps:
                case.add("help", {"value": value})
            case.check("median", statistics.median(helps), "<=", 0.25, "s")
    if bench.wants("startup.up"):
        with bench.case("startup.up", "factory up until every service has answered, after the first time", "s", better="lower") as case:
            state = bench.folder / "startup"
            env = {**os.environ, "FACTORY_STATE_DIR": str(state), "FACTORY_FLOWER_PORT": "0"}
            times = [up_s(env) for _ in range(bench.pick(2, 4, 11))]
            case.sides["up"] = {}
            for ready, down in times[1:]:
                case.add("up", {"value": ready, "down": down})
            case.check("median", statistics.median(ready for ready, _ in times[1:]), "<=", 5.0, "s")
            case.check("the first time, with its migrations", times[0][0], "<=", None, "s")
            case.table("From the supervisor's start", ("service", "s"), list(phases(state).items()))

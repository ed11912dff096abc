"""One interactive job, accepted in this process and waited for, on an idle factory: what everything around the bare call costs."""

import time
from typing import Any

from sqlalchemy import text

from benchmarks.harness import Bench, Factory, quantile


def once(factory: Factory, producer: Any, n: int) -> tuple[float, dict[str, float]]:
    """Submit and wait; milliseconds of the whole and of its phases."""
    from contentfactory.states import Priority

    begun_wall, begun = time.time(), time.perf_counter()
    job_id = producer.submit("text.echo", {"text": f"hello {n}"}, priority=Priority.INTERACTIVE)
    accepted = time.perf_counter()
    if hasattr(producer, "wait"):
        producer.wait([job_id], timeout_s=30)
    else:
        _poll(factory, job_id)
    ended = time.perf_counter()
    with factory.database.read() as conn:
        row = conn.execute(
            text("SELECT state, created_at, dispatched_at, started_at, finished_at FROM jobs WHERE id = :id"), {"id": job_id}
        ).one()
    if row.state != "succeeded":
        raise RuntimeError(f"job {job_id} is {row.state}\n{factory.log()}")
    total = (ended - begun) * 1e3
    # The ledger's clock is this machine's.
    phases = {
        "accept and dispatch": (accepted - begun) * 1e3, "dispatched to claimed": (row.started_at - row.dispatched_at) * 1e3,
        "claimed to committed": (row.finished_at - row.started_at) * 1e3,
        "committed to known": (begun_wall + (ended - begun) - row.finished_at) * 1e3,
    }  # fmt: skip
    return total, phases


def _poll(factory: Factory, job_id: str) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with factory.database.read() as conn:
            if conn.execute(text("SELECT finished_at FROM jobs WHERE id = :id"), {"id": job_id}).scalar() is not None:
                return
        time.sleep(0.002)
    raise TimeoutError(f"job {job_id} did not end\n{factory.log()}")


def bare(n: int) -> float:
    """The runner as a plain function; milliseconds."""
    import tempfile
    from pathlib import Path

    from contentfactory.jobs.diagnostic import TextEcho
    from worker.context import JobContext
    from worker.runners import get_runner

    runner = get_runner("text.echo")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        list(runner([TextEcho(text=f"hello {n}")], JobContext(Path(folder), seeds=[n])))
        return (time.perf_counter() - begun) * 1e3


def run(bench: Bench) -> None:
    for profile in ("production", "embedded"):
        name = f"latency.{'postgresql' if profile == 'production' else 'sqlite'}"
        if not bench.wants(name):
            continue
        with bench.case(name, "a single interactive job on an idle factory, over the bare call", "ms", better="lower") as case, bench.factory(profile, workers={"text": 1}) as factory:
            factory.up()
            producer = factory.producer()
            count = bench.pick(3, 100, 400)
            for n in range(bench.pick(1, 10, 20)):
                once(factory, producer, n)
            totals: list[float] = []
            phases: dict[str, list[float]] = {}
            for n in range(count):
                total, parts = once(factory, producer, n)
                totals.append(total)
                for key, value in parts.items():
                    phases.setdefault(key, []).append(value)
                time.sleep(bench.pick(0, 0.03, 0.03))  # idle again before the next one
            plain = [bare(n) for n in range(count)]
            case.sides["whole"], case.sides["bare call"] = {}, {}
            for side, values in (("whole", totals), ("bare call", plain)):
                case.add(side, {"value": quantile(values, 0.5), "p95": quantile(values, 0.95), "p99": quantile(values, 0.99)})
            added = [a - quantile(plain, 0.5) for a in totals]
            case.check("added, p50", quantile(added, 0.5), "<=", 15, "ms")
            case.check("added, p95", quantile(added, 0.95), "<=", 40, "ms")
            case.check("added, p99", quantile(added, 0.99), "<=", None, "ms")
            case.table(f"Phases of {count} jobs, ms", ("phase", "p50", "p95", "p99"), [(k, *(quantile(v, q) for q in (0.5, 0.95, 0.99))) for k, v in phases.items()])

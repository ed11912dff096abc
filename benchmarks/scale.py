"""Cost of a job when many wait: claim, dispatch and commit beside backlogs of a thousand to a million rows, and listings at a million."""

import statistics
import time
from typing import Any

from sqlalchemy import text

from benchmarks.harness import Bench, Factory, quantile

GROUP = 256
"""Jobs in a micro-batch: so few that the smallest backlog does not run dry."""


def fill(factory: Factory, rows: int, batch_rows: int = 20_000, *, tidy: bool = True) -> str:
    """Queued rows of one batch, through the ledger's own insert; tidied up after, as the database does by itself in time."""
    from contentfactory.ids import new_id
    from contentfactory.jobs.spec import get_kind
    from db import batches, counters, lifecycle
    from producer.job_ids import job_id_for

    project = factory.producer(publish=False).project_id()
    batch_id = new_id("batch")
    spec = get_kind("text.echo")
    params = spec.validate({"text": "x"})
    data, share = params.model_dump(mode="json"), spec.share_key(params, None)
    factory.database.run(lambda conn: batches.create(conn, batch_id, project, "scale", source={}, digest=None, priority=0))
    for start in range(0, rows, batch_rows):
        part = range(start, min(rows, start + batch_rows))
        jobs = [
            lifecycle.NewJob(
                id=job_id_for(batch_id, str(n)), project_id=project, batch_id=batch_id, custom_id=str(n), line=n + 1, rank=n + 1, kind=spec.name,
                queue=spec.queue, params=data, share_key=share, seconds=1e-4, seed=n,
            )
            for n in part
        ]  # fmt: skip

        def work(conn: Any, jobs: Any = jobs, old: int = start) -> None:
            lifecycle.insert_jobs(conn, jobs, fresh=True)
            batches.advance(conn, batch_id, old, old + len(jobs), len(jobs))

        factory.database.run(work)
    factory.database.run(lambda conn: batches.expanded(conn, batch_id))
    factory.database.run(counters.fold_counts)
    if tidy and not factory.database.sqlite:
        with factory.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(text("VACUUM ANALYZE"))
    return batch_id


def life(factory: Factory) -> dict[str, float]:
    """Dispatch, claim and commit a group; microseconds a job of each."""
    from contentfactory.ids import new_id
    from db import lifecycle
    from db.ended import NewArtifact

    settings, database = factory.settings, factory.database
    begun = time.perf_counter()
    hints = database.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=settings.inflight_s, window=GROUP))
    dispatched = time.perf_counter()
    if not hints:
        raise RuntimeError("nothing was dispatched")
    claimed = database.run(lambda conn: lifecycle.claim(conn, hints[0].ids, "bench", settings.lease_s))
    taken = time.perf_counter()
    results = [
        lifecycle.Success(
            c.id, c.attempt, (NewArtifact("text.txt", f"a/{new_id('art')}", "0" * 64, 1, "text/plain"),), (), None, None, {"compute_s": 0.0}
        )
        for c in claimed
    ]  # fmt: skip
    made = time.perf_counter()
    done = database.run(lambda conn: lifecycle.finish(conn, results, "bench"))
    ended = time.perf_counter()
    for hint in hints[1:]:
        database.run(lambda conn, hint=hint: lifecycle.undispatch(conn, hint.ids))
    spent = {
        "dispatch µs": (dispatched - begun) / sum(len(h.ids) for h in hints) * 1e6,
        "claim µs": (taken - dispatched) / len(done) * 1e6, "commit µs": (ended - made) / len(done) * 1e6,
    }  # fmt: skip
    return {**spent, "value": sum(spent.values())}


def listings(factory: Factory, batch_id: str, count: int) -> dict[str, list[float]]:
    """Milliseconds of what a user looks at."""
    from db import batches, jobs

    project = factory.producer(publish=False).project_id()
    with factory.database.read() as conn:
        lowest = conn.execute(text("SELECT id FROM jobs WHERE project_id = :p ORDER BY id LIMIT 1 OFFSET 30"), {"p": project}).scalar()
    looks = {
        "batch progress": lambda c: batches.progress(c, batch_id),
        "first page of jobs": lambda c: jobs.list_page(c, project),
        "last page of jobs": lambda c: jobs.list_page(c, project, after=lowest),
        "page of one batch": lambda c: jobs.list_page(c, project, batch_id=batch_id),
        "last page of one batch": lambda c: jobs.list_page(c, project, batch_id=batch_id, after=lowest),
        "queued of one batch": lambda c: jobs.list_page(c, project, batch_id=batch_id, state="queued"),
        "succeeded of the project": lambda c: jobs.list_page(c, project, state="succeeded"),
        "failed of one batch (none)": lambda c: jobs.list_page(c, project, batch_id=batch_id, state="failed"),
        "failed of the project (none)": lambda c: jobs.list_page(c, project, state="failed"),
        "one kind": lambda c: jobs.list_page(c, project, kind="text.echo"),
    }
    found: dict[str, list[float]] = {}
    for name, look in looks.items():
        for _ in range(count):
            begun = time.perf_counter()
            with factory.database.read() as conn:
                look(conn)
            found.setdefault(name, []).append((time.perf_counter() - begun) * 1e3)
    return found


def work_off(factory: Factory, parts: int) -> list[float]:
    """Take and commit all that waits, as a worker that stays does; microseconds a job in each part of the run."""
    from db import lifecycle
    from db.ended import NewArtifact
    from worker.execution import LOOK_WHOLE_S

    def take(conn: Any) -> list[Any]:
        return lifecycle.take(conn, "text", "text.echo", None, "bench", factory.settings.lease_s, fronts=fronts)

    with factory.database.read() as conn:
        waiting = int(conn.execute(text("SELECT count(*) FROM jobs WHERE place = 'queued'")).scalar_one())
    fronts: dict[str, Any] = {}
    spent: list[tuple[int, float]] = []
    looked_at = time.perf_counter()
    while True:
        begun = time.perf_counter()
        if begun - looked_at > LOOK_WHOLE_S:
            fronts.clear()
            looked_at = begun
        claimed = factory.database.run(take)
        if not claimed:
            break
        made = (NewArtifact("text.txt", "a/none", "0" * 64, 1, "text/plain"),)
        results = [lifecycle.Success(c.id, c.attempt, made, (), None, None, {"compute_s": 0.0}) for c in claimed]
        factory.database.run(lambda conn, results=results: lifecycle.finish(conn, results, "bench"))
        spent.append((len(claimed), time.perf_counter() - begun))
    if sum(n for n, _ in spent) != waiting:
        raise RuntimeError(f"{waiting} jobs waited, {sum(n for n, _ in spent)} were done")
    size = len(spent) / parts
    cut = [spent[round(k * size) : round((k + 1) * size)] for k in range(parts)]
    return [sum(t for _, t in part) / sum(n for n, _ in part) * 1e6 for part in cut]


def _run_worked_off(bench: Bench) -> None:
    """What has left a queue stays in an index until it is vacuumed: the last jobs of a long run must not pay for the first."""
    rows, parts = bench.pick(2000, 60_000, 400_000), bench.pick(2, 5, 10)
    for profile, database in (("production", "postgresql"), ("embedded", "sqlite")):
        if not bench.wants(f"scale.worked_off_{database}"):
            continue
        with bench.case(f"scale.worked_off_{database}", f"take and commit of a job while {rows:,} are worked off", "µs/job", better="lower") as case:
            for _ in range(bench.rounds):
                factory = bench.factory(profile)
                try:
                    fill(factory, rows)
                    costs = work_off(factory, parts)
                finally:
                    factory.close()
                for n, cost in enumerate(costs, 1):
                    case.add(f"part {n} of {parts}", {"value": cost})
            first, last = f"part 1 of {parts}", f"part {parts} of {parts}"
            case.check("last part ÷ first", case.series(last).median / case.series(first).median, "<=", 1.1, "×")


def run(bench: Bench) -> None:
    _run_worked_off(bench)
    sizes = bench.pick((500, 1000), (1000, 100_000), (1000, 100_000, 1_000_000))
    for profile in ("production", "embedded"):
        database = "postgresql" if profile == "production" else "sqlite"
        if not bench.wants(f"scale.{database}"):
            continue
        groups = bench.pick(2, 12, 12)
        with bench.case(f"scale.{database}", f"dispatch, claim and commit of a job beside a backlog, groups of up to {GROUP}", "µs/job", better="lower") as case:
            worlds = []
            try:
                for rows in sizes:
                    factory = bench.factory(profile)
                    worlds.append((rows, factory, fill(factory, rows)))
                    life(factory)
                # In turns, a group at a time: what the machine does besides lasts for longer than one. No backlog becomes smaller.
                for _ in range(bench.rounds):
                    spent: dict[str, list[dict[str, float]]] = {}
                    for _ in range(groups):
                        for rows, factory, _batch in worlds:
                            fill(factory, GROUP, tidy=False)
                            spent.setdefault(f"{rows:,} queued", []).append(life(factory))
                    for side, samples in spent.items():
                        case.add(side, {key: statistics.median(sample[key] for sample in samples) for key in samples[0]})
                large, small = f"{sizes[-1]:,} queued", f"{sizes[0]:,} queued"
                case.check(f"{large} ÷ {small}", case.series(large).median / case.series(small).median, "<=", 1.1, "×")
                rows, factory, batch_id = worlds[-1]
                looks = listings(factory, batch_id, bench.pick(2, 10, 20))
                case.table(f"Looks at {rows:,} jobs, ms", ("look", "p50", "worst"), [(k, quantile(v, 0.5), max(v)) for k, v in looks.items()])
                slowest = max(looks, key=lambda k: quantile(looks[k], 0.5))
                case.check(f"slowest look ({slowest})", quantile(looks[slowest], 0.5), "<=", 100, "ms")
            finally:
                for _, factory, _batch in worlds:
                    factory.close()

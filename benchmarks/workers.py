"""More workers: two on kinds that compute, ten on one that only waits."""

import json
import time
from functools import partial
from typing import Any

from sqlalchemy import text

from benchmarks.accept import words
from benchmarks.harness import Bench


def rate(bench: Bench, profile: str, workers: int, kind: str, queue: str, rows: list[dict[str, Any]], warm: list[dict[str, Any]]) -> float:
    """Jobs a second from the first claim to the last commit, workers warm."""
    from producer import manifest as manifests

    with bench.factory(profile, workers={queue: workers}) as factory:
        factory.up()
        producer = factory.producer()

        def hand_in(part: list[dict[str, Any]]) -> str:
            path = factory.folder / "rows.jsonl"
            path.write_text("".join(json.dumps({"custom_id": str(n), "kind": kind, "params": p, "seed": n}) + "\n" for n, p in enumerate(part)))
            batch_id, _ = producer.create_batch(manifests.open_manifest(path), resume=False, reuse=False)
            producer.expand(batch_id)
            factory.wait_idle()
            return batch_id

        # Every worker has loaded what it needs before anything is measured.
        for _ in range(20):
            hand_in(warm)
            with factory.database.read() as conn:
                seen = conn.execute(text("SELECT count(DISTINCT worker) FROM micro_batches")).scalar()
            if seen == workers:
                break
        else:
            raise RuntimeError(f"only {seen} of {workers} workers took a job\n{factory.log()}")
        batch_id = hand_in(rows)
        with factory.database.read() as conn:
            first, last, n = conn.execute(
                text("SELECT min(started_at), max(finished_at), count(*) FROM jobs WHERE batch_id = :b AND state = 'succeeded'"), {"b": batch_id}
            ).one()
        if n != len(rows):
            raise RuntimeError(f"{n} of {len(rows)} jobs succeeded\n{factory.log()}")
        return n / (last - first)


def run(bench: Bench) -> None:
    # The first computes for a fifth of a second a job, 32 at a time, often enough that the last of one worker, while the other has nothing
    # left, does not count; the second for 3 ms, and writes a file for each: with that one worker already fills
    # more than one core. Whether all of it runs shows without their models, which take minutes to load on a busy machine.
    smoke = bench.size == "smoke"
    cases = {
        "workers.cpu": (
            "text.generate", bench.pick(4, 128, 512), bench.pick(2, 32, 64), 1.8,
            lambda n: {"prompt": f"Write a product description of item {n}: {words(n)}.", "max_tokens": bench.pick(4, 16, 8)},
        ),
        "workers.light": ("text.embed", bench.pick(16, 3000, 8000), bench.pick(64, 512, 512), None, lambda n: {"input": words(n)}),
    }  # fmt: skip
    for name, (kind, count, first, target, params) in cases.items():
        if not bench.wants(name):
            continue
        if smoke:
            if name == "workers.light":
                continue  # without their models both are the same
            kind, params = "text.echo", lambda n: {"text": words(n), "seconds": 0.01}
        with bench.case(name, f"two workers beside one on {kind}, two cores", "jobs/s") as case:
            rows, warm = [params(n) for n in range(count)], [params(n) for n in range(10**6, 10**6 + first)]

            def measured(workers: int, kind: str = kind, rows: Any = rows, warm: Any = warm) -> dict[str, float]:
                return {"value": rate(bench, "production", workers, kind, "text", rows, warm)}

            case.measure({"ours, one worker": partial(measured, 1), "ours, two workers": partial(measured, 2)})
            case.ratio("ours, two workers", "ours, one worker", target=target, name="two workers ÷ one")
    if bench.wants("workers.waiting"):
        workers, pause = bench.pick(2, 10, 10), bench.pick(0.05, 0.5, 0.5)
        with bench.case("workers.waiting", f"{workers} workers on text.echo with a pause of {pause} s: share of the time that they wait in jobs", "share") as case:
            each = bench.pick(2, 30, 60)
            # A pause of its own for each job, so that none shares a micro-batch's clock with others by accident of size.
            rows = [{"text": str(n), "seconds": pause} for n in range(each * workers)]

            def one() -> dict[str, float]:
                found = rate(bench, "production", workers, "text.echo", "text", rows, [{"text": "w", "seconds": 0.01}] * workers * 2)
                return {"value": found * pause / workers, "jobs/s": found}

            begun = time.monotonic()
            case.measure({"ours": one})
            case.check("efficiency", case.series("ours").median, ">=", 0.95, "")
            case.note(f"Measured in {time.monotonic() - begun:.0f} s; start-up of the workers is not part of it.")

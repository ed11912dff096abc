"""No-op jobs a second: ours, each with a durable row, an artifact, its event and a terminal state, beside other queues' throwaway no-ops.

All peers use the same Valkey server as we do, with their own packages in an environment of their own, and two worker processes.

* ``drain``: jobs are there first, then workers start. The rate counts from the first tenth done (ours; a batch of jobs is committed
  at once) or the first job's start (peers) to the last job's end.
* ``end_to_end``: workers run and are warm; the clock goes from the first submit to the last job's end. The submitting process competes
  for the same cores.

Ours are counted in the ledger (``finished_at`` of succeeded rows). A peer's job adds one to a counter of its process, which a thread
writes to Valkey fifty times a second with the clock of the last job: no job pays a round trip for being counted (``peers/common.py``).
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import text

from benchmarks.harness import HERE, Bench, Case, Factory, cpu_seconds, flush, tree

WORKERS = 2


@dataclass(frozen=True)
class Peer:
    """How a library's workers are started.

    Args:
        module: File of ``peers/``.
        command: Command line of a worker; the first word is a program of the peers' environment.
        copies: How many of it make two processes that work.
        jobs: Jobs by size.
    """

    module: str
    command: tuple[str, ...]
    copies: int = 1
    jobs: tuple[int, int, int] = (60, 4000, 10_000)
    url: bool = field(default=False)


_CELERY = ("python", "-m", "celery", "-A", "on_celery", "worker", "--without-gossip", "--without-mingle", "-l", "ERROR")

PEERS = {
    "celery prefork": Peer("on_celery", (*_CELERY, "-P", "prefork", "-c", "2")),
    "celery solo": Peer("on_celery", (*_CELERY, "-P", "solo", "-n", "w{n}@bench"), 2),
    "celery threads": Peer("on_celery", (*_CELERY, "-P", "threads", "-c", "4", "-n", "w{n}@bench"), 2),
    "dramatiq": Peer("on_dramatiq", ("dramatiq", "on_dramatiq", "-p", "2", "-t", "8"), jobs=(60, 8000, 20_000)),
    "huey": Peer("on_huey", ("huey_consumer", "on_huey.huey", "-k", "process", "-w", "2", "-q"), jobs=(60, 15_000, 40_000)),
    "taskiq": Peer("on_taskiq", ("taskiq", "worker", "on_taskiq:broker", "--workers", "2", "--log-level", "ERROR"), jobs=(60, 15_000, 40_000)),
    "arq": Peer("on_arq", ("arq", "on_arq.WorkerSettings"), 2),
    "rq": Peer("on_rq", ("rq", "worker", "bench_rq", "-w", "rq.SimpleWorker", "-q", "--url", "{url}"), 2, jobs=(20, 1500, 3000)),
}  # fmt: skip
"""Settings are each library's faster ones: no stored results, no gossip, prefetching, threads or processes as they do best here."""

CELERY = ("celery prefork", "celery solo", "celery threads")


class PeerRun:
    """Workers of one peer on an empty broker."""

    def __init__(self, bench: Bench, name: str) -> None:
        import redis

        self.bench, self.peer, self.url = bench, PEERS[name], bench.valkey[1]
        flush(self.url)
        self.run = f"bench:{name}"
        self.env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "BENCH_BROKER_URL": self.url, "BENCH_RUN": self.run}
        self.log = bench.folder / f"{name.replace(' ', '-')}.log"
        self.client = redis.Redis.from_url(self.url)
        self.processes: list[subprocess.Popen[bytes]] = []

    def submit(self, jobs: int) -> dict[str, float]:
        """Submit from a process of its own; says when it began and ended (monotonic clock)."""
        command = [str(self.bench.peers), "common.py", self.peer.module, str(jobs)]
        with open(self.log, "ab") as log:
            done = subprocess.run(command, env=self.env, cwd=HERE / "peers", stdout=subprocess.PIPE, stderr=log, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    def start(self) -> None:
        for n in range(self.peer.copies):
            first, *rest = (word.format(n=n, url=self.url) for word in self.peer.command)
            with open(self.log, "ab") as log:
                self.processes.append(
                    subprocess.Popen(
                        [str(self.bench.peers.parent / first), *rest], env=self.env, cwd=HERE / "peers", stdin=subprocess.DEVNULL,
                        stdout=log, stderr=log, start_new_session=True,
                    )
                )  # fmt: skip

    def wait(self, jobs: int, timeout: float = 120) -> tuple[float, float]:
        """Wait until so many have run; start of the first and end of the last."""
        end = time.monotonic() + timeout
        while True:
            found = [json.loads(v) for v in self.client.hvals(self.run)]
            if sum(n for n, _, _ in found) >= jobs:
                return min(f for _, f, _ in found), max(x for _, _, x in found)
            if time.monotonic() > end:
                raise TimeoutError(f"{self.run}: {sum(n for n, _, _ in found)} of {jobs} jobs ran in {timeout:.0f} s\n{self.log.read_text()[-1500:]}")
            time.sleep(0.02)

    def cpu(self) -> float:
        return sum(cpu_seconds(tree(p.pid)) for p in self.processes)

    def close(self) -> None:
        for one in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()
        self.client.close()

    def __enter__(self) -> "PeerRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peer_drain(bench: Bench, name: str) -> dict[str, float]:
    jobs = bench.pick(*PEERS[name].jobs)
    with PeerRun(bench, name) as run:
        run.submit(jobs)
        run.start()
        first, last = run.wait(jobs)
        return {"value": jobs / (last - first)}


def peer_end_to_end(bench: Bench, name: str) -> dict[str, float]:
    jobs, warm = bench.pick(*PEERS[name].jobs), 20
    with PeerRun(bench, name) as run:
        run.start()
        run.submit(warm)
        run.wait(warm)
        server = bench.valkey[0].leash.pid
        before, served = run.cpu(), cpu_seconds(tree(server))
        told = run.submit(jobs)
        _, last = run.wait(warm + jobs)
        return {
            "value": jobs / (last - told["begun"]), "submit/s": jobs / (told["ended"] - told["begun"]),
            "worker µs/job": (run.cpu() - before) / jobs * 1e6, "producer µs/job": told["cpu"] / jobs * 1e6,
            "servers µs/job": (cpu_seconds(tree(server)) - served) / jobs * 1e6,
        }  # fmt: skip


# --- ours ---


def manifest(folder: Path, jobs: int, name: str = "noop.jsonl") -> Path:
    """A manifest of so many empty echoes."""
    path = folder / name
    with open(path, "w") as out:
        for n in range(jobs):
            out.write(f'{{"custom_id": "{n}", "kind": "text.echo", "params": {{"text": ""}}}}\n')
    return path


def submit(factory: Factory, path: Path, publish: bool) -> None:
    """Hand in a manifest as the command line does: check, store, expand."""
    from producer import manifest as manifests

    producer = factory.producer(publish)
    batch_id, _ = producer.create_batch(manifests.open_manifest(path), resume=False)
    producer.expand(batch_id)


def submit_many(factory: Factory, jobs: int) -> None:
    """Hand in jobs as a backend does, ten thousand in a call."""
    producer = factory.producer()
    for start in range(0, jobs, 10_000):
        producer.submit_many("text.echo", [{"text": ""}] * min(10_000, jobs - start))


def _check(factory: Factory, jobs: int) -> None:
    """Each job has its terminal row and its artifact."""
    with factory.database.read() as conn:
        states = factory.states()
        artifacts = conn.execute(text("SELECT count(*) FROM artifacts WHERE job_id IS NOT NULL")).scalar()
    if states != {"succeeded": jobs} or artifacts != jobs:
        raise RuntimeError(f"wanted {jobs} succeeded jobs with artifacts; there are {states} with {artifacts} artifacts\n{factory.log()}")


def _ends(factory: Factory, share: float) -> tuple[float, float, int]:
    """When the first share of the jobs had ended, when the last had, and how many ended between."""
    with factory.database.read() as conn:
        times = sorted(conn.execute(text("SELECT finished_at FROM jobs WHERE finished_at IS NOT NULL")).scalars())
    edge = times[int(share * (len(times) - 1))]
    # All that ended within the same commit count as before.
    after = [t for t in times if t > edge + 0.005]
    return edge, times[-1], len(after)


def our_drain(bench: Bench, profile: str, storage: str, way: str = "manifest") -> dict[str, float]:
    jobs = bench.pick(400, 20_000, 60_000)
    with bench.factory(profile, storage=storage, workers={"text": WORKERS}) as factory:
        begun = time.monotonic()
        submit(factory, manifest(factory.folder, jobs), publish=False)
        accepted = time.monotonic() - begun
        factory.up()
        factory.wait_idle()
        _check(factory, jobs)
        first, last, between = _ends(factory, 0.1)
        return {"value": between / max(last - first, 1e-3) if between else float("nan"), "accept/s": jobs / accepted}


def our_end_to_end(bench: Bench, profile: str, storage: str, way: str = "manifest") -> dict[str, float]:
    jobs, warm = bench.pick(400, 20_000, 60_000), bench.pick(50, 1000, 1000)
    with bench.factory(profile, storage=storage, workers={"text": WORKERS}) as factory:
        path, small = manifest(factory.folder, jobs), manifest(factory.folder, warm, "warm.jsonl")
        factory.up()
        submit(factory, small, publish=True)
        factory.wait_idle()
        before, mine = factory.cpu(), time.process_time()
        begun = time.time()
        if way == "manifest":
            submit(factory, path, publish=True)
        else:
            submit_many(factory, jobs)
        submitted, submitting = time.time(), time.process_time() - mine
        factory.wait_idle()
        after = factory.cpu()
        _check(factory, jobs + warm)
        _, last, _ = _ends(factory, 0.0)
        used = {k: (after[k] - before[k]) / jobs * 1e6 for k in after}
        return {
            "value": jobs / (last - begun), "submit/s": jobs / (submitted - begun), "worker µs/job": used["workers"],
            "producer µs/job": submitting / jobs * 1e6, "timer and broker µs/job": used["factory"] - used["workers"], "servers µs/job": used["servers"],
        }  # fmt: skip


PROFILES = {
    "ours, PostgreSQL, folder": ("production", "local"),
    "ours, PostgreSQL, S3": ("production", "s3"),
    "ours, SQLite, folder": ("embedded", "local"),
    "ours, PostgreSQL, folder, one call": ("production", "local", "many"),
    "ours, SQLite, folder, one call": ("embedded", "local", "many"),
}
"""Ledger and store; ``one call`` submits by `Producer.submit_many` where the others hand in a manifest file."""


def run(bench: Bench) -> None:
    ways: Iterator[tuple[str, str, Callable[..., Any], Callable[..., Any]]] = iter((
        ("queues.drain", "no-op jobs that wait already, two workers", our_drain, peer_drain),
        ("queues.end_to_end", "no-op jobs from the first submit to the last end, two warm workers", our_end_to_end, peer_end_to_end),
    ))  # fmt: skip
    for name, what, ours, peers in ways:
        if not bench.wants(name):
            continue
        with bench.case(name, what, "jobs/s") as case:
            sides: dict[str, Callable[[], Any]] = {}
            for side, how in PROFILES.items():
                if name == "queues.drain" and "many" in how:
                    continue  # how jobs came in makes no difference once they wait
                sides[side] = lambda how=how, ours=ours: ours(bench, *how)
            for side in PEERS:
                sides[side] = lambda side=side, peers=peers: peers(bench, side)
            sides = {side: call for side, call in sides.items() if bench.keeps(side)}
            if any(side in PEERS for side in sides):
                bench.peers  # noqa: B018 - made before anything is measured
            case.measure(sides)
            _judge(case)


def _judge(case: Case) -> None:
    others = [s for s in PEERS if s in case.sides]
    celery = [s for s in CELERY if s in case.sides]
    for side in PROFILES:
        if side not in case.sides:
            continue
        production = "PostgreSQL" in side
        if others:
            case.ratio(side, others, target=4.0 if production else 2.5, name=f"{side} ÷ best peer")
        if celery:
            case.ratio(side, celery, target=15.0 if production else None, name=f"{side} ÷ celery's best pool")
    case.note("Ours are durable: row, artifact row, event, terminal state; the peers' jobs leave nothing behind.")

"""Real services, real processes, and a history of what was done to them.

`Services` are started once a run; a `Scene` is one fault's world: a database, a prefix of the bucket, an emptied broker, and a
`Fleet` of timers and workers, each a process group of its own, restarted when it ends as any supervisor would.
"""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLUGIN = HERE / "plugin"
for folder in (ROOT, ROOT / "tests" / "plugins", PLUGIN):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import chaos_kinds  # noqa: E402
import factory_services as services  # noqa: E402
import psycopg  # noqa: E402
import redis  # noqa: E402
from psycopg import sql  # noqa: E402
from sqlalchemy import text  # noqa: E402
from sqlalchemy.engine import make_url  # noqa: E402

from contentfactory.errors import ServiceUnavailable  # noqa: E402
from contentfactory.jobs.spec import load_kinds  # noqa: E402
from contentfactory.process import tied  # noqa: E402
from contentfactory.settings import Settings, load_settings  # noqa: E402
from db import lifecycle, migrate  # noqa: E402
from db.session import Database  # noqa: E402
from producer import manifest as manifests  # noqa: E402
from producer.enqueue import Producer  # noqa: E402
from producer.plan import worker_command  # noqa: E402
from producer.publish import Publisher  # noqa: E402
from producer.services import open_store  # noqa: E402

LEASE_S = 6.0
REAPER_S = 1.0

AUDIT = """
CREATE TABLE chaos_audit (
    id BIGSERIAL PRIMARY KEY, at DOUBLE PRECISION, job_id TEXT, old TEXT, new TEXT, attempt INT, worker TEXT, cancel BOOLEAN);
CREATE FUNCTION chaos_audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO chaos_audit (at, job_id, old, new, attempt, worker, cancel) VALUES
        (extract(epoch from clock_timestamp()), NEW.id, OLD.state, NEW.state, NEW.attempt,
         coalesce(NEW.lease_owner, OLD.lease_owner), NEW.cancel_requested);
    RETURN NEW; END $$;
CREATE TRIGGER chaos_audit AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.state IS DISTINCT FROM NEW.state OR OLD.attempt IS DISTINCT FROM NEW.attempt) EXECUTE FUNCTION chaos_audit();
"""
"""Every change of state, written by the database itself in the transaction that makes it."""


class Services:
    """PostgreSQL, Valkey and an S3 server for one run of the harness."""

    def __init__(self, keep: Path | None = None) -> None:
        self.keep = keep is not None
        if keep is not None and (keep / "services.json").exists():
            self._start_again(keep)
            return
        if keep is None:
            self.folder = Path(tempfile.mkdtemp(prefix="factory-chaos-"))
        else:
            self.folder = keep
            keep.mkdir(parents=True)
        self.folder.chmod(0o755)
        for name in ("postgres", "broker", "s3"):
            (self.folder / name).mkdir()
        self.postgres, self.database_url = services.start_postgres(self.folder / "postgres")
        self.broker, self.broker_url = services.start_valkey(self.folder / "broker")
        self.s3 = services.start_s3(self.folder / "s3")
        if self.keep:
            s3 = {name: getattr(self.s3, name) for name in ("endpoint", "bucket", "access_key", "secret_key")}
            told = {"database": self.database_url, "broker": self.broker_url, "s3": s3}
            told |= {"of": {name: vars(one) | {"leash": None} for name, one in (("postgres", self.postgres), ("broker", self.broker), ("s3", self.s3.service))}}
            (self.folder / "services.json").write_text(json.dumps(told, default=str))

    def _start_again(self, folder: Path) -> None:
        """Start the servers of a kept folder on their old ports, with their data."""
        self.folder = folder
        told = json.loads((folder / "services.json").read_text())

        def service(name: str) -> services.Service:
            values = {**told["of"][name], "leash": None, "folder": Path(told["of"][name]["folder"])}
            return services.Service(**{**values, "stop_signal": signal.Signals(int(values["stop_signal"]))})

        self.postgres, self.database_url, self.broker_url = service("postgres"), told["database"], told["broker"]
        self.restart_postgres()
        self.broker = service("broker")
        self.restart_broker()
        self.s3 = services.S3Server(**told["s3"], service=service("s3"))

        def ready() -> None:
            urllib.request.urlopen(self.s3.endpoint, timeout=2).close()

        with contextlib.suppress(urllib.error.HTTPError):
            self.s3.service.start(ready, (urllib.error.URLError, OSError))

    def restart_postgres(self) -> None:
        """Start the stopped database again."""
        plain = make_url(self.database_url).set(drivername="postgresql").render_as_string(hide_password=False)
        self.postgres.start(lambda: psycopg.connect(plain, connect_timeout=2).close(), (psycopg.OperationalError,))

    def lose_broker(self, wipe: bool = True) -> None:
        """SIGKILL the broker; ``wipe`` takes its data as well."""
        pid = _server_pid(self.broker.leash)
        os.kill(pid, signal.SIGKILL)
        self.broker.stop()
        if wipe:
            for item in self.broker.folder.iterdir():
                shutil.rmtree(item) if item.is_dir() else item.unlink()

    def restart_broker(self) -> None:
        """Start the broker again on the same port."""
        password = self.broker_url.partition("://:")[2].partition("@")[0]
        self.broker, url = services.start_valkey(self.broker.folder, self.broker.port, password)
        assert url == self.broker_url

    def close(self) -> None:
        """Stop everything and remove it."""
        for service in (self.postgres, self.broker, self.s3.service):
            service.stop()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def _server_pid(leash: "subprocess.Popen[bytes] | None") -> int:
    return psutil.Process(leash.pid).children()[0].pid


class History:
    """JSON lines of injections and observations; the processes under test append to the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, event: str, **data: object) -> None:
        """Append a line."""
        with open(self.path, "a") as out:
            out.write(json.dumps({"at": time.time(), "event": event, **data}) + "\n")

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """What is written, or only lines of one event."""
        if not self.path.exists():
            return []
        found = [json.loads(line) for line in self.path.read_text().splitlines() if line]
        return [x for x in found if event is None or x["event"] == event]


@dataclass
class Member:
    """One process group of the fleet."""

    name: str
    command: list[str]
    env: dict[str, str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    wanted: bool = True
    starts: int = 0

    def tree(self) -> list[psutil.Process]:
        """The process and its descendants, while it lives."""
        if self.process is None or self.process.poll() is not None:
            return []
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def part(self, what: str) -> psutil.Process | None:
        """``child`` (the pool's child) or ``keeper``."""
        for one in self.tree()[1:]:
            with contextlib.suppress(psutil.Error):
                line = " ".join(one.cmdline())
                if "worker.keeper" in line and what == "keeper":
                    return one
                if "spawn_main" in line and what == "child":
                    return one
        return None

    def send(self, number: int) -> None:
        """A signal to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Fleet:
    """Timers and workers."""

    def __init__(self, folder: Path, history: History) -> None:
        self.folder, self.history = folder, history
        self.members: list[Member] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, name: str, command: list[str], env: dict[str, str]) -> Member:
        """A process to keep alive."""
        member = Member(name, command, env, self.folder / f"{name}.log")
        self._start(member)
        self.members.append(member)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return member

    def _start(self, member: Member) -> None:
        with open(member.log, "ab") as log:
            member.process = subprocess.Popen(
                tied(member.command), env=member.env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        member.starts += 1

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            for member in self.members:
                if member.wanted and member.process.poll() is not None:
                    # What is left of its group (a keeper that gives jobs back) ends by itself.
                    self.history.note("restart", member=member.name, code=member.process.returncode)
                    self._start(member)

    def named(self, prefix: str) -> list[Member]:
        """Members whose name begins so."""
        return [m for m in self.members if m.name.startswith(prefix)]

    def close(self) -> None:
        """SIGTERM, and after a while SIGKILL."""
        for member in self.members:
            member.wanted = False
        for member in self.members:
            member.send(signal.SIGCONT)
            if member.process.poll() is None:
                member.process.terminate()
        end = time.monotonic() + 15
        for member in self.members:
            with contextlib.suppress(subprocess.TimeoutExpired):
                member.process.wait(max(0.1, end - time.monotonic()))
            member.send(signal.SIGKILL)
            member.process.wait()
        # Last: the kernel kills what this thread has started when it ends.
        self._stop.set()
        if self._thread:
            self._thread.join()


@dataclass
class Scene:
    """One fault's world.

    Args:
        services: The servers.
        folder: Where history and logs go.
        name: Makes the database's name.
        seed: Of all choices.
    """

    services: Services
    folder: Path
    name: str
    seed: int
    database_port: int | None = None
    storage_port: int | None = None
    deadline: float = math.inf
    extra: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # What a fault must know when it goes on in another run (--keep).
        self.memo: dict[str, Any] = json.loads(self._memo.read_text()) if self._memo.exists() else {}
        self.rng = random.Random(f"{self.seed}/{self.name}/{len(self.memo)}" if self.memo else f"{self.seed}/{self.name}")
        self.history = History(self.folder / "history.jsonl")
        self.fleet = Fleet(self.folder, self.history)
        self.accepted: dict[str, str] = {}  # job id → text and seed as its content must be, "" where there is none
        self.batches: list[str] = []
        self.backlog: list[dict[str, float]] = []
        self.resources: dict[tuple[str, int], list[dict[str, float]]] = {}  # (what it is, process) → samples
        self._stop = threading.Event()
        url = make_url(self.services.database_url)
        self._admin = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self.database_name = self.memo.get("database") or f"chaos_{self.name}_{os.getpid()}_{int(time.time() * 1000)}"
        self.direct = url.set(database=self.database_name)
        self.database = Database(self.direct.render_as_string(hide_password=False))
        if "database" not in self.memo:
            with psycopg.connect(self._admin, autocommit=True) as conn:
                conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(self.database_name)))
            migrate.upgrade(self.database)
            with self.database.write() as conn:
                conn.exec_driver_sql(AUDIT)
        self.broker = redis.Redis.from_url(self.services.broker_url, socket_timeout=5)
        self.broker.flushall()
        load_kinds()
        self.open()

    @property
    def _memo(self) -> Path:
        return self.folder / "memo.json"

    def save(self) -> None:
        """Keep the memo for the next run."""
        self.memo["database"] = self.database_name
        self._memo.write_text(json.dumps(self.memo))

    def open(self, **overrides: Any) -> None:
        """Open what the harness itself needs; again where a fault wants other settings for all processes."""
        self.overrides.update(overrides)
        self.settings = self.make_settings(proxied=False)
        self.store = open_store(self.settings)
        self.publisher = Publisher(self.settings)
        self.producer = Producer(self.settings, self.database, self.store, self.publisher)

    def make_settings(self, proxied: bool = True) -> Settings:
        """Settings of the processes (through the proxies) or of the harness itself (past them)."""
        url = self.direct.set(port=self.database_port) if proxied and self.database_port else self.direct
        endpoint = self.services.s3.endpoint
        if proxied and self.storage_port:
            endpoint = f"http://127.0.0.1:{self.storage_port}"
        values = {
            "state_dir": self.folder / "state", "database_url": url.render_as_string(hide_password=False), "broker_url": self.services.broker_url,
            "storage_url": f"s3://{self.services.s3.bucket}/{self.database_name}", "storage_endpoint": endpoint,
            "storage_access_key": self.services.s3.access_key, "storage_secret_key": self.services.s3.secret_key, "device": "cpu",
            "lease_s": LEASE_S, "reaper_period_s": REAPER_S, "dispatch_period_s": 0.25, "inflight_s": 10.0, "log_format": "json", "drain_s": 15,
        }  # fmt: skip
        return load_settings(**{**values, **self.overrides})

    def environment(self, name: str, **extra: str) -> dict[str, str]:
        """Environment of one process."""
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("FACTORY_", "CHAOS_"))},
            **self.make_settings().environment(),
            "PYTHONPATH": os.pathsep.join([str(PLUGIN), str(ROOT)]), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1",
            "CHAOS_HISTORY": str(self.history.path), "CHAOS_SEED": str(self.seed), "CHAOS_MEMBER": name, **self.extra, **extra,
        }  # fmt: skip

    def start(self, workers: int = 2, timers: int = 1, queues: str = "text", **extra: str) -> None:
        """Start the fleet."""
        for n in range(timers):
            self.fleet.add(f"timer{n}", [sys.executable, "-m", "producer.timer"], self.environment(f"timer{n}", **extra))
        for n in range(workers):
            self.add_worker(f"worker{n}", queues, **extra)
        threading.Thread(target=self._sample, daemon=True).start()

    def add_worker(self, name: str, queues: str = "text", **extra: str) -> Member:
        """One more worker."""
        return self.fleet.add(name, worker_command(self.make_settings(), queues, name), self.environment(name, **extra))

    def workers_seen(self) -> list[str]:
        """Ids of workers that reported lately."""
        with self.database.read() as conn:
            return list(conn.execute(text("SELECT id FROM workers WHERE seen_at > extract(epoch from clock_timestamp()) - 30")).scalars())

    def wait_workers(self, count: int, timeout: float = 90) -> None:
        """Wait until so many workers have reported."""
        wait(lambda: len(self.workers_seen()) >= count, timeout, f"{count} workers to report")

    # --- work ---

    def batch(self, rows: Iterable[dict[str, Any]], expand: bool = False) -> str:
        """Accept a batch by its manifest, as the command line does; the timer expands it."""
        path = self.folder / f"manifest{len(self.batches)}.jsonl"
        expected: dict[str, str] = {}
        with open(path, "w") as out:
            for n, row in enumerate(rows):
                row = {"custom_id": f"j{n}", "seed": n, **row}
                expected[row["custom_id"]] = f"{row['params'].get('text', '')}:{row['seed']}" if row["kind"] in ("chaos.work", "chaos.wide") else ""
                out.write(json.dumps(row) + "\n")
        batch_id, _ = self.producer.create_batch(manifests.open_manifest(path), priority=0, resume=False)
        if expand:
            self.producer.expand(batch_id)
        from producer.job_ids import job_id_for

        self.accepted.update({job_id_for(batch_id, name): value for name, value in expected.items()})
        self.batches.append(batch_id)
        self.history.note("accepted", batch=batch_id, jobs=len(expected))
        return batch_id

    def work(self, n: int, seconds: tuple[float, float] = (0.0, 0.02), kind: str = "chaos.work", **params: Any) -> list[dict[str, Any]]:
        """Rows of ordinary work."""
        return [
            {"kind": kind, "params": {"text": f"t{i}", "seconds": round(self.rng.uniform(*seconds), 4), **params}} for i in range(n)
        ]

    def states(self) -> dict[str, int]:
        """Jobs by state."""
        with self.database.read() as conn:
            return dict(conn.execute(text("SELECT state, count(*) FROM jobs GROUP BY state")).all())

    def done(self) -> int:
        """Jobs in a terminal state."""
        states = self.states()
        return sum(states.get(s, 0) for s in ("succeeded", "failed", "dead", "cancelled"))

    def quiet(self, timeout: float) -> bool:
        """Wait until every accepted job is terminal and every batch closed; False if that does not come."""

        def check() -> bool:
            with self.database.read() as conn:
                if conn.execute(text("SELECT count(*) FROM batches WHERE finished_at IS NULL")).scalar():
                    return False
                if conn.execute(text("SELECT count(*) FROM batch_deltas")).scalar():
                    return False
            return self.done() >= len(self.accepted)

        try:
            wait(check, timeout, "quiet", step=0.5)
        except TimeoutError:
            self.history.note("not_quiet", states=self.states())
            return False
        return True

    def until_done(self, share: float, timeout: float = 120) -> None:
        """Wait until a share of the jobs is terminal."""
        wait(lambda: self.done() >= share * len(self.accepted), timeout, f"{share:.0%} done", step=0.1)

    # --- watching ---

    def _sample(self) -> None:
        keys = [key for queue in ("text", "image") for key in Publisher._keys(queue)]
        next_processes = 0.0
        while not self._stop.wait(0.5):
            with contextlib.suppress(Exception):
                with self.database.read() as conn:
                    n, cost = conn.execute(text("SELECT count(*), coalesce(sum(seconds), 0) FROM jobs WHERE place = 'flying' AND state = 'dispatched'")).one()
                    live = conn.execute(text("SELECT count(*) FROM workers WHERE seen_at > extract(epoch from clock_timestamp()) - 60")).scalar()
                waiting = sum(int(self.broker.llen(k)) for k in keys)
                self.backlog.append({"at": time.time(), "jobs": n, "seconds": float(cost), "messages": waiting, "workers": live})
            if time.monotonic() >= next_processes:
                next_processes = time.monotonic() + 2.0
                with contextlib.suppress(Exception):
                    done = self.counted()
                    for what, pid, found in self.measure():
                        self.resources.setdefault((what, pid), []).append({"at": time.time(), "done": done, **found})

    def counted(self) -> int:
        """Jobs of batches in a terminal state, by the counters: cheap with a million rows."""
        states = "('succeeded', 'failed', 'dead', 'cancelled')"
        query = f"SELECT coalesce(sum(n), 0) FROM (SELECT n, state FROM batch_counts UNION ALL SELECT n, state FROM batch_deltas) x WHERE state IN {states}"
        with self.database.read() as conn:
            return int(conn.execute(text(query)).scalar() or 0)

    def publisher_time(self) -> float:
        """When the newest hint was sent, by the database's clock."""
        with self.database.read() as conn:
            query = "SELECT max(dispatched_at) FROM jobs WHERE place = 'flying' AND state = 'dispatched'"
            return float(conn.execute(text(query)).scalar() or 0.0)

    def open_batches(self) -> int:
        """Batches that have not ended."""
        with self.database.read() as conn:
            return int(conn.execute(text("SELECT count(*) FROM batches WHERE finished_at IS NULL")).scalar() or 0)

    def measure(self) -> list[tuple[str, int, dict[str, float]]]:
        """Resident megabytes and open files of every process of the fleet that lives: (what it is, process, figures)."""
        out = []
        for member in self.fleet.members:
            for n, one in enumerate(member.tree()):
                with contextlib.suppress(psutil.Error):
                    line = " ".join(one.cmdline())
                    if member.name.startswith("timer"):
                        what = "timer" if "producer.timer" in line else ""
                    else:
                        marks = {"worker.keeper": "keeper", "worker.decoder": "decoder", "spawn_main": "child"}
                        what = next((name for mark, name in marks.items() if mark in line), "parent" if n == 0 or "celery" in line else "")
                    if what:
                        out.append((what, one.pid, {"rss": one.memory_info().rss / 2**20, "fds": one.num_fds()}))
        return out

    def measure_workers(self) -> dict[int, dict[str, float]]:
        """Resident megabytes and open files of each worker's child and keeper."""
        return {pid: found for what, pid, found in self.measure() if what in ("child", "keeper")}

    def close(self) -> None:
        """Stop the fleet, keep history and logs, drop the database."""
        self._stop.set()
        self.fleet.close()
        self.publisher.close()
        self.broker.close()
        self.store.close()
        self.database.close()
        if self.services.keep:
            return
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        with contextlib.suppress(psycopg.Error), psycopg.connect(self._admin, autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(self.database_name)))


def wait(check: Callable[[], bool], timeout: float, what: str, step: float = 0.2) -> None:
    """Poll until true; a database that is away or has come back a moment ago is asked again.

    Raises:
        TimeoutError: If it does not become true.
    """
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(ServiceUnavailable):
            if check():
                return
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout:.0f} s for {what}")
        time.sleep(step)


@contextlib.contextmanager
def repeating(action: Callable[[], None], period: Callable[[], float]) -> Iterator[None]:
    """Do something again and again in a thread, as long as the block lasts."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(period()):
            with contextlib.suppress(psutil.Error, ProcessLookupError, AttributeError):
                action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


__all__ = ["LEASE_S", "REAPER_S", "Fleet", "History", "Scene", "Services", "chaos_kinds", "lifecycle", "repeating", "socket", "wait"]

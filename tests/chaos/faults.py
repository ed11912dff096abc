"""The faults of the plan, one function each. A function starts what it needs, breaks it, waits for quiet, and is judged."""

import base64
import contextlib
import errno
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
import wave
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import celery
import checker
import psutil
from harness import LEASE_S, REAPER_S, ROOT, Member, Scene, repeating, wait
from proxy import PostgresProxy, S3Proxy
from sqlalchemy import text

from contentfactory.errors import FactoryError
from contentfactory.states import TERMINAL
from db import lifecycle
from db.session import Database
from producer.enqueue import Producer
from producer.plan import worker_host
from producer.publish import Publisher, celery_options

RESCUE_S = LEASE_S + 3 * REAPER_S + 3.0
"""Longest that a dead worker's job may stay running: lease and reaper, with slack for a machine under load."""


@dataclass
class Report:
    """What a fault's run showed."""

    jobs: int = 0
    injections: int = 0
    violations: list[str] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def p50(self) -> float | None:
        """Median recovery, seconds."""
        return round(statistics.median(self.recovery), 2) if self.recovery else None

    @property
    def p95(self) -> float | None:
        """95th percentile of recovery, seconds."""
        return round(sorted(self.recovery)[math.ceil(0.95 * len(self.recovery)) - 1], 2) if self.recovery else None


@dataclass(frozen=True)
class Fault:
    """One entry of the plan."""

    number: str
    title: str
    run: Callable[[Scene, int, Report], None]
    jobs: int = 2000


FAULTS: dict[str, Fault] = {}


def fault(number: str, title: str, jobs: int = 2000) -> Callable[[Callable[[Scene, int, Report], None]], Callable[[Scene, int, Report], None]]:
    """Register a fault."""

    def declare(run: Callable[[Scene, int, Report], None]) -> Callable[[Scene, int, Report], None]:
        FAULTS[number] = Fault(number, title, run, jobs)
        return run

    return declare


def victims(scene: Scene) -> dict[str, list[float]]:
    """Times at which each worker's child was struck, by its process number."""
    out: dict[str, list[float]] = defaultdict(list)
    for line in scene.history.lines("inject"):
        # A process says itself when it kills or hangs itself; whatever else it does must not cost it its lease.
        own = [line["pid"]] if "pid" in line and line.get("fault") in ("kill", "poison", "hang") else []
        for pid in line.get("victims", []) or own:
            out[str(pid)].append(line["at"])
    return out


def judge(scene: Scene, report: Report, timeout: float, *, expect: dict[str, str] | None = None, rescues: bool = True) -> dict[str, list[Any]]:
    """Wait for quiet and check every invariant that can be read off the ledger, the audit and the store."""
    if not scene.quiet(timeout):
        report.violations.append(f"I1: not quiet after {timeout:.0f} s: {scene.states()}")
    scene.database.close()  # connections of before a restart
    data = checker.ledger(scene.database)
    report.jobs = len(data["jobs"])
    report.violations += checker.check_ledger(data, scene.accepted, expect=expect)
    report.violations += checker.check_store(data, scene.store, scene.accepted, scene.rng)
    if rescues:
        report.violations += checker.check_rescues(data, victims(scene), bound_s=RESCUE_S)
    report.recovery += checker.recoveries(data, victims(scene))
    found = Counter(x.get("fault", "?") for x in scene.history.lines("inject"))
    report.injections = sum(x.get("n", 1) for x in scene.history.lines("inject"))
    report.notes["injected"] = dict(found)
    report.notes["states"] = dict(Counter(j["state"] for j in data["jobs"]))
    report.notes["attempts"] = dict(Counter(str(a["outcome"]) for a in data["attempts"]))
    bugs = Counter(str((a["error"] or {}).get("message"))[:160] for a in data["attempts"] if a["outcome"] == "bug")
    if bugs:
        report.notes["bugs"] = dict(bugs.most_common(5))
    _backlog(scene, report)
    grown, report.notes["memory"] = checker.check_growth(scene.resources)
    report.violations += grown
    return data


def keep_busy(scene: Scene, rows: Callable[[int], list[dict[str, Any]]], enough: Callable[[], bool], inject: Callable[[], None], seconds: float) -> None:
    """Inject again and again while there is work; more is accepted as long as it runs out before enough has been injected."""
    end = time.monotonic() + seconds
    while not enough() and time.monotonic() < end:
        if scene.counted() > len(scene.accepted) - 150:
            scene.batch(rows(250))
        inject()


def _backlog(scene: Scene, report: Report) -> None:
    """I13: what lies on the broker stays under the cap: a minute of work (here 10 s) for each worker, plus one group."""
    over = [x for x in scene.backlog if x["seconds"] > scene.settings.inflight_s * max(1, x["workers"]) + 60 and x["jobs"] > 2 * max(1, x["workers"]) + 256]
    if over:
        report.violations.append(f"I13: backlog of {over[0]}")
    if scene.backlog:
        report.notes["backlog_jobs_max"] = max(x["jobs"] for x in scene.backlog)


def _leftovers(scene: Scene, report: Report, before: dict[int, dict[str, float]]) -> None:
    """I20: handles and scratch of workers that lived through it all, against what they were at its beginning (`before`, warm)."""
    time.sleep(1.0)
    after = scene.measure_workers()
    for pid in set(before) & set(after):
        grown = after[pid]["rss"] - before[pid]["rss"]
        if grown > 80:
            report.violations.append(f"I20: process {pid} grew by {grown:.0f} MB")
        if after[pid]["fds"] > before[pid]["fds"] + 8:
            report.violations.append(f"I20: process {pid} holds {after[pid]['fds']} handles, {before[pid]['fds']} before")
        report.notes["rss_growth_mb"] = round(max(report.notes.get("rss_growth_mb", 0.0), grown), 1)
        report.notes["handles_growth"] = max(report.notes.get("handles_growth", 0), after[pid]["fds"] - before[pid]["fds"])
    alive = {pid for what, pid, _ in scene.measure() if what == "child"}
    scratch = list(scene.settings.scratch.iterdir()) if scene.settings.scratch.is_dir() else []
    held = [p.name for p in scratch if any(f"-{pid}-" in p.name for pid in alive)]
    if held:
        report.violations.append(f"I20: scratch of living workers: {held[:3]}")
    report.notes["scratch_of_the_dead"] = len(scratch) - len(held)


def warm_up(scene: Scene, rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Have the workers do some of everything first; gives what they take afterwards, the baseline of `_leftovers`."""
    scene.batch(rows)
    if not scene.quiet(180):
        raise TimeoutError(f"the warm-up did not end: {scene.states()}")
    time.sleep(1.0)
    return scene.measure_workers()


def strike(scene: Scene, member: Member, what: str) -> None:
    """Kill a part of a worker: ``child``, ``keeper``, ``parent`` or ``tree``."""
    child = member.part("child")
    pids = [child.pid] if child else []
    if what in ("child", "keeper"):
        target = member.part(what)
        if target is None:
            return
        scene.history.note("inject", fault=f"kill_{what}", member=member.name, victims=pids)
        target.kill()
        return
    scene.history.note("inject", fault=f"kill_{what}", member=member.name, victims=pids)
    if what == "parent":
        os.kill(member.process.pid, signal.SIGKILL)
    else:
        member.send(signal.SIGKILL)


# --- 1, 2: workers ----------------------------------------------------------------------------------------------------


@fault("1", "SIGKILL of workers: child, keeper, parent, tree; before claim, in the model, after the put, in the commit, before the ack")
def kills(scene: Scene, jobs: int, report: Report) -> None:
    each = max(1, jobs // 500)
    shares = {"before_claim": 0.05, "in_model": 0.01, "after_put": 0.01, "in_commit": 0.05, "after_commit": 0.05, "before_ack": 0.05}
    scene.start(3, 1, CHAOS_KILL=json.dumps({"shares": shares, "limit": each, "tree": 0.4}))
    scene.wait_workers(3)
    scene.batch(scene.work(jobs))

    def outside() -> None:
        ready = [m for m in scene.fleet.named("worker") if m.part("keeper")]
        if len(ready) >= 2:  # else nobody would be left to work, and nothing be learnt
            strike(scene, scene.rng.choice(ready), scene.rng.choice(["child", "keeper", "parent", "tree"]))

    with repeating(outside, lambda: scene.rng.uniform(2.0, 6.0)), contextlib.suppress(TimeoutError):
        scene.until_done(0.95, 240 + jobs / 10)
    judge(scene, report, 120)
    places = Counter(x["place"] for x in scene.history.lines("inject") if "place" in x)
    report.notes["places"] = dict(places)


@fault("2", "SIGSTOP past the lease; SIGCONT after the second attempt has finished, and while it runs")
def stops(scene: Scene, jobs: int, report: Report) -> None:
    scene.start(3, 1)
    scene.wait_workers(3)

    def rows(n: int) -> list[dict[str, Any]]:
        some = scene.work(n - n // 8) + scene.work(n // 8, (0.3, 0.5))
        scene.rng.shuffle(some)
        return some

    scene.batch(rows(jobs))
    scene.until_done(0.05)
    struck = 0

    def inject() -> None:
        nonlocal struck
        # One or two of three: somebody must be left to take over.
        chosen = []
        for member in scene.rng.sample(scene.fleet.named("worker"), scene.rng.choice([1, 2, 2])):
            child = member.part("child")
            if child is not None and _running(scene, child.pid):
                chosen.append((member, child.pid))
        if not chosen:
            time.sleep(0.1)
            return
        early = scene.rng.random() < 0.5
        held: list[tuple[str, int]] = []
        for member, pid in chosen:
            scene.history.note("inject", fault="stop_past_lease", member=member.name, victims=[pid], resume="early" if early else "late")
            member.send(signal.SIGSTOP)
            held += _running(scene, pid)
            struck += 1
        first = dict(held)

        def rescued() -> bool:
            with scene.database.read() as conn:
                rows = conn.execute(text("SELECT state, attempt, id FROM jobs WHERE id = ANY(:ids)"), {"ids": list(first)}).all()
            if early:
                return any(r.attempt > first[r.id] and r.state == "running" for r in rows) or all(r.state in TERMINAL for r in rows)
            return all(r.state in TERMINAL for r in rows)

        try:
            wait(rescued, 40, "the second attempt", step=0.05)
        except TimeoutError:
            report.violations.append(f"I7: jobs of a stopped worker were not taken over in 40 s: {held[:3]}")
        for member, _ in chosen:
            member.send(signal.SIGCONT)
            scene.history.note("resumed", member=member.name)
        time.sleep(1)

    keep_busy(scene, rows, lambda: struck >= max(3, min(24, jobs // 80)), inject, 330)
    judge(scene, report, 120)


def _running(scene: Scene, pid: int) -> list[tuple[str, int]]:
    with scene.database.read() as conn:
        query = "SELECT id, attempt FROM jobs WHERE place = 'flying' AND state = 'running' AND lease_owner LIKE :owner"
        return [(r.id, r.attempt) for r in conn.execute(text(query), {"owner": f"%/{pid}-%"})]


# --- 3, 4, 11: broker -------------------------------------------------------------------------------------------------


@fault("3", "the broker is killed with all its data while jobs are queued; FLUSHALL; down while jobs are accepted", jobs=5000)
def broker_loss(scene: Scene, jobs: int, report: Report) -> None:
    # All of them are accepted, and as many hints sent as the cap allows, before anybody works.
    scene.batch(scene.work(jobs), expand=True)
    with scene.database.read() as conn:
        report.notes["waiting_at_first_kill"] = conn.execute(text("SELECT count(*) FROM jobs WHERE place = 'queued' OR place = 'flying' AND state = 'dispatched'")).scalar()
    ends: list[float] = []

    def lose(down_s: float, wipe: bool = True) -> None:
        scene.history.note("inject", fault="broker_killed" + ("_data_lost" if wipe else ""), down_s=down_s)
        scene.services.lose_broker(wipe)
        time.sleep(down_s)

    def back() -> None:
        scene.services.restart_broker()
        ends.append(time.time())
        scene.history.note("broker_back")

    lose(1.0)
    scene.start(2, 1)
    back()
    scene.wait_workers(2)
    ends[0] = time.time()
    for share in (0.15, 0.3):
        scene.until_done(share, 300)
        scene.history.note("inject", fault="flushall")
        scene.broker.flushall()
        ends.append(time.time())
    scene.until_done(0.45, 300)
    lose(4.0)
    with contextlib.suppress(FactoryError):
        scene.batch(scene.work(max(10, jobs // 20)))  # accepted while the broker is away
    time.sleep(2)
    back()
    scene.until_done(0.65, 300)
    lose(0.2, wipe=False)
    back()
    scene.until_done(0.85, 300)
    lose(0.5)
    back()
    data = judge(scene, report, 240)
    report.recovery += _first_commit_after(data, ends)


def _first_commit_after(data: dict[str, list[Any]], moments: list[float]) -> list[float]:
    """Seconds from each moment to the start of the first attempt after it: when work went on."""
    starts = sorted(a["started_at"] for a in data["attempts"])
    return [min((s - m for s in starts if s > m), default=0.0) for m in moments]


@fault("4", "each message is delivered one to five times, shuffled, to different workers")
def copies(scene: Scene, jobs: int, report: Report) -> None:
    scene.start(3, 2, CHAOS_COPIES="5")
    scene.wait_workers(3)
    scene.batch(scene.work(jobs))
    data = judge(scene, report, 60 + jobs / 10)
    repeated = sum(1 for a in data["attempts"] if a["attempt"] > 1)
    if repeated:
        report.violations.append(f"I3: {repeated} jobs were run more than once because of doubled messages")


@fault("11", "malformed messages on every key and channel of a worker: not JSON, wrong types, bad base64, wrong arguments, unknown task, pickle, 64 MiB")
def malformed(scene: Scene, jobs: int, report: Report) -> None:
    # A broker whose keys are spoilt before anybody comes.
    for key, put in (("text", scene.broker.set), ("_kombu.binding.celery.pidbox", scene.broker.set), ("_kombu.binding_deadlines", scene.broker.set)):
        put(key, "of another type")
    scene.start(2, 1)
    scene.wait_workers(2)
    scene.batch(scene.work(jobs, (0.0, 0.02)))
    items = _malformed_items()
    hosts = [f"{worker_host(m.name)}.celery.pidbox" for m in scene.fleet.named("worker")]
    lists = [*Publisher._keys("text"), *hosts]
    channels = ["/0.celery.pidbox", "/0.celeryev/task.sent", "/0.celeryev/worker.heartbeat", "/0.reply.celery.pidbox", *(f"/0.{h}" for h in hosts)]
    report.notes["keys"], report.notes["kinds"] = [*lists, *channels], len(items)

    def put(name: str, raw: bytes) -> None:
        """Onto each of a worker's keys, at either end, and into each of Celery's channels."""
        keys = lists if len(raw) < 2**20 else Publisher._keys("text")  # nobody would ever take it from the others
        for key in keys:
            (scene.broker.rpush if scene.rng.random() < 0.5 else scene.broker.lpush)(key, raw)
        for channel in channels:
            scene.broker.publish(channel, raw)
        scene.history.note("inject", fault=name, n=len(keys) + len(channels))

    rounds = max(2, min(20, jobs // 100))
    spoil = [*Publisher._keys("text"), "_kombu.binding.celery.pidbox", "_kombu.binding.text", "unacked", "factory.quarantine"]
    for n in range(rounds):
        for name, raw in items.items():
            put(name, raw)
        if n % 7 == 1:
            put("64_mib", b'{"body": "' + b"A" * (64 << 20) + b'"}')
        if n % 3 == 2:
            # A key of another type: what waits on it is lost, and the ledger sends it again.
            key = scene.rng.choice(spoil)
            scene.broker.delete(key)
            scene.broker.hset(key, "x", "y")
            scene.history.note("inject", fault="key_of_another_type", key=key)
        with contextlib.suppress(TimeoutError):
            scene.until_done(min(0.9, (n + 1) / rounds), 15)
    before = {m.name: m.starts for m in scene.fleet.members}
    judge(scene, report, 60 + jobs / 10, expect=dict.fromkeys(scene.accepted, "succeeded"))
    # What was put on the last of them must be through as well, and the workers must still hear commands.
    app = celery.Celery("chaos", broker=scene.services.broker_url, set_as_current=False)
    app.conf.update(celery_options())
    heard = app.control.ping(timeout=5)
    app.close()
    report.notes["answer_a_ping"] = len(heard)
    if len(heard) < 2:
        report.violations.append(f"I10: only {len(heard)} of 2 workers answer a command")
    report.notes["quarantined"] = scene.publisher.quarantined()
    report.notes["restarts"] = {name: n - 1 for name, n in before.items() if n > 1}
    if report.notes["restarts"]:
        report.violations.append(f"I10: processes ended by malformed messages: {report.notes['restarts']}")


def _malformed_items() -> dict[str, bytes]:
    good = {"content-type": "application/json", "content-encoding": "utf-8", "headers": {"lang": "py", "task": "text.echo", "id": "x", "dispatched_at": 1.5}}
    props = {"delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": "text"}, "body_encoding": "base64", "priority": 9}

    def message(body: bytes | str = b"[[], {}, {}]", *, encode: bool = True, headers: dict[str, Any] | None = None, **over: Any) -> bytes:
        raw = base64.b64encode(body).decode() if encode else body
        own = {**props, "delivery_tag": str(uuid.uuid4()), "correlation_id": str(uuid.uuid4())}
        return json.dumps({"body": raw, **good, "headers": {**good["headers"], **(headers or {})}, "properties": own, **over}).encode()

    def command(method: Any, **more: Any) -> bytes:
        body = {"method": method, "arguments": {}, "destination": None, "pattern": None, "matcher": None, **more}
        return message(json.dumps(body).encode(), headers={"clock": 1})

    return {
        "not_json": b"this is not json", "one": b"1", "list": b"[]", "null": b"null", "not_utf8": b"\xff\xfe\x00{", "string": b'"x"',
        "empty": b"", "empty_object": b"{}", "bad_base64": message("!!!not base64", encode=False), "body_not_json": message(b"nonsense"),
        "no_properties": json.dumps({"body": "e30=", **good}).encode(), "no_headers": json.dumps({"body": "e30=", "properties": props}).encode(),
        "no_tag": json.dumps({"body": "e30=", **good, "properties": {"delivery_info": {}}}).encode(),
        "wrong_args": message(json.dumps([[1, 2, 3], {"x": 1}, {}]).encode()), "args_null": message(b"null"),
        "bad_ids": message(json.dumps([[["not an id"]], {}, {}]).encode()), "unknown_task": message(headers={"task": "os.system"}),
        "unknown_job": message(json.dumps([[["job_" + "0" * 32]], {}, {}]).encode()),
        "no_task": message(headers={"task": None}), "pickle": message(pickle.dumps({"a": 1}), **{"content-type": "application/x-python-serialize"}),
        "pickle_bare": pickle.dumps({"task": "text.echo", "args": [1]}),
        "eta": message(headers={"eta": "2999-01-01T00:00:00"}), "bad_eta": message(headers={"eta": "soon"}), "control": message(headers={"task": "celery.backend_cleanup"}),
        "deep": b"[" * 100_000 + b"]" * 100_000, "nan": b'{"a": NaN}', "huge_number": b'{"a": ' + b"9" * 100_000 + b"}",
        # Well formed commands, each of which stops a stock worker or its queue.
        "shutdown": command("shutdown"), "cancel_consumer": command("cancel_consumer", arguments={"queue": "text"}),
        "pool_shrink": command("pool_shrink", arguments={"n": 1}), "no_such_command": command("no_such"), "command_number": command(7),
        "rate_limit": command("rate_limit", arguments={"task_name": "chaos.work", "rate_limit": "1/h"}),
        "slow_pattern": command("ping", pattern="(a+)+$", matcher="pcre"), "reply_to_nobody": command("ping", reply_to="nobody"),
    }  # fmt: skip


# --- 5, 6: database ---------------------------------------------------------------------------------------------------


@fault("5", "PostgreSQL is stopped at once in mid-run, and left down while jobs run")
def database_stops(scene: Scene, jobs: int, report: Report) -> None:
    scene.start(2, 2)
    scene.wait_workers(2)
    before = scene.measure_workers()
    scene.batch(scene.work(jobs - jobs // 20) + scene.work(jobs // 20, (0.5, 1.0)))
    ends = []
    for share, down_s in zip((0.1, 0.25, 0.4, 0.55, 0.7), (0.0, 1.5, 4.0, 9.0, 14.0), strict=True):
        scene.until_done(share, 300)
        scene.history.note("inject", fault="database_down", down_s=down_s)
        scene.services.postgres.stop()
        time.sleep(down_s)
        scene.services.restart_postgres()
        ends.append(time.time())
        scene.history.note("database_back")
    data = judge(scene, report, 180)
    report.recovery = _first_commit_after(data, ends)
    _leftovers(scene, report, before)
    struck = [j["id"] for j in data["jobs"] if j["strikes"]]
    if struck:
        report.violations.append(f"I8: {len(struck)} jobs earned strikes though no worker died")


@fault("6", "the database's answer after COMMIT is lost, or the COMMIT itself")
def lost_commits(scene: Scene, jobs: int, report: Report) -> None:
    proxy = PostgresProxy(scene.services.postgres.port, scene.rng, lambda name, **d: scene.history.note("inject", fault=name, **d))
    scene.database_port = proxy.port
    try:
        scene.start(2, 1)
        scene.wait_workers(2)
        proxy.lose_answer, proxy.lose_commit = 0.05, 0.03
        scene.batch(scene.work(jobs - jobs // 10))
        _submit_with_keys(scene, jobs // 10, report)
        with contextlib.suppress(TimeoutError):
            scene.until_done(0.97, 120 + jobs / 5)
        proxy.lose_answer = proxy.lose_commit = 0.0
        data = judge(scene, report, 120, rescues=False)
        crashed = sum(1 for a in data["attempts"] if a["outcome"] == "crash")
        report.notes["attempts_given_up_to_the_lease"] = crashed
    finally:
        proxy.close()


def _submit_with_keys(scene: Scene, n: int, report: Report) -> None:
    """A client that repeats a request under its key until it is answered."""
    settings = scene.make_settings(proxied=True)
    database = Database(settings.database())
    client = Producer(settings, database, scene.store)
    errors = 0
    try:
        for i in range(n):
            for _ in range(20):
                try:
                    params = {"text": f"key {i}"}
                    job_id = client.submit("chaos.work", params, seed=i, idempotency_key=f"key-{i}")
                    scene.accepted[job_id] = f"key {i}:{i}"
                    break
                except FactoryError:
                    errors += 1
            else:
                report.violations.append(f"I2: request {i} was never answered")
    finally:
        database.close()
    report.notes["requests_repeated_by_the_client"] = errors


# --- 7, 8, 12: storage, disk, inputs ----------------------------------------------------------------------------------


@fault("7", "storage answers 500, 503, hangs for 60 s, cuts bodies, resets after success")
def storage(scene: Scene, jobs: int, report: Report) -> None:
    proxy = S3Proxy(scene.services.s3.service.port, scene.rng, lambda name, **d: scene.history.note("inject", fault=name, **d))
    scene.storage_port = proxy.port
    try:
        scene.start(2, 1)
        scene.wait_workers(2)
        before = scene.measure_workers()
        scene.batch(scene.work(jobs), expand=True)
        proxy.limits = {"hang": 3}
        proxy.shares = {"500": 0.06, "503": 0.06, "cut": 0.03, "reset_after": 0.05, "hang": 0.002}
        with contextlib.suppress(TimeoutError):
            scene.until_done(0.97, 240 + jobs / 5)
        proxy.shares = {}
        judge(scene, report, 240)
        _leftovers(scene, report, before)
    finally:
        proxy.close()


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int, files: int) -> Iterator[bool]:
    """A file system of its own for a folder, small enough to be filled; False where this user may not mount one."""
    folder.mkdir(parents=True)
    options = f"size={megabytes}m,nr_inodes={files},mode=0755"
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode == 0
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path, seconds: float, inodes: bool) -> None:
    """Keep a file system full for a while: of bytes, or of files."""
    ballast = folder / ".ballast"
    ballast.mkdir(exist_ok=True)
    end, n = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < end:
            n += 1
            try:
                if inodes:
                    for k in range(100_000):
                        os.close(os.open(ballast / f"{n}-{k}", os.O_CREAT | os.O_WRONLY))
                else:
                    with open(ballast / str(n), "wb", buffering=0) as out:
                        while out.write(bytes(65_536)) == 65_536:
                            pass
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            time.sleep(0.02)  # whatever a worker gave back meanwhile is taken again
    finally:
        shutil.rmtree(ballast, ignore_errors=True)


@fault("8", "file systems of scratch and store really full, handles used up, scratch folder unusable")
def disk(scene: Scene, jobs: int, report: Report) -> None:
    scratch_disk, store_disk = scene.folder / "small" / "scratch", scene.folder / "small" / "store"
    with small_disk(scratch_disk, 16, 400) as mounted, small_disk(store_disk, 128, 40_000) as also:
        real = mounted and also
        report.notes["file_systems"] = "two of tmpfs, really full" if real else "no right to mount: RLIMIT_FSIZE in the workers instead"
        scene.open(storage_url=(store_disk / "objects").as_uri(), scratch_dir=scratch_disk / "jobs")

        def rows(n: int) -> list[dict[str, Any]]:
            some = scene.work(n)
            for row in scene.rng.sample(some, n // 2):
                row["params"]["act"] = "scratch"
            for row in scene.rng.sample(some, max(1, n // 100)):
                row["params"]["act"] = scene.rng.choice(["disk", "handles"])
            return some

        scene.start(2, 1, CHAOS_NOFILE="256")
        scene.wait_workers(2)
        before = warm_up(scene, scene.work(200, act="scratch"))
        scene.batch(rows(jobs))
        done: Counter[str] = Counter()

        def processes() -> list[tuple[str, psutil.Process]]:
            found = []
            for what, pid, _ in scene.measure():
                if what != "decoder":
                    with contextlib.suppress(psutil.Error):
                        found.append((what, psutil.Process(pid)))
            return found

        def handles() -> None:
            # The limit comes down to what the process has open, give or take: whatever it opens next is refused.
            everybody = processes()
            what, one = scene.rng.choice([p for p in everybody if p[0] == scene.rng.choice(["child", "child", "keeper", "parent", "timer"])] or everybody)
            limit = one.rlimit(psutil.RLIMIT_NOFILE)
            scene.history.note("inject", fault=f"no_handles_{what}", pids=[one.pid])
            one.rlimit(psutil.RLIMIT_NOFILE, (one.num_fds() + scene.rng.choice([0, 0, 1, 3]), limit[1]))
            try:
                time.sleep(scene.rng.uniform(0.5, 3.0))
            finally:
                with contextlib.suppress(psutil.Error):
                    one.rlimit(psutil.RLIMIT_NOFILE, limit)

        def full() -> None:
            where, inodes, seconds = scene.rng.choice([scratch_disk, store_disk]), scene.rng.random() < 0.3, scene.rng.uniform(0.5, 3.0)
            if real:
                scene.history.note("inject", fault=f"full_{where.name}{'_of_files' if inodes else ''}", seconds=seconds)
                fill(where, seconds, inodes)
                return
            chosen = [p for what, p in processes() if what == "child"]
            scene.history.note("inject", fault="file_size_limit", seconds=seconds)
            for one in chosen:
                one.rlimit(psutil.RLIMIT_FSIZE, (0, -1))
            time.sleep(seconds)
            for one in chosen:
                with contextlib.suppress(psutil.Error):
                    one.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))

        def unusable() -> None:
            scratch = scene.settings.scratch
            scene.history.note("inject", fault="scratch_unusable")
            aside = scratch.with_name(f"aside-{time.monotonic_ns()}")
            with contextlib.suppress(OSError):
                scratch.rename(aside)
                scratch.write_text("a file in the place of the folder")
                time.sleep(2)
                scratch.unlink()
            shutil.rmtree(aside, ignore_errors=True)

        def inject() -> None:
            what = scene.rng.choice([handles, full, full, unusable] if done["all"] % 4 else [full])
            done["all"] += 1
            with contextlib.suppress(psutil.Error):
                what()
            time.sleep(scene.rng.uniform(0.3, 1.0))

        keep_busy(scene, rows, lambda: done["all"] >= max(6, min(60, jobs // 35)), inject, 300)
        judge(scene, report, 120, expect=dict.fromkeys(scene.accepted, "succeeded"))
        _leftovers(scene, report, before)
        report.notes["restarts"] = {m.name: m.starts - 1 for m in scene.fleet.members if m.starts > 1}
        if report.notes["restarts"]:
            report.violations.append(f"I10: processes ended for want of room or handles: {report.notes['restarts']}")


@fault("12", "corrupt, truncated, empty, wrong-type and bomb inputs", jobs=3000)
def inputs(scene: Scene, jobs: int, report: Report) -> None:
    from producer.job_ids import job_id_for

    scene.start(2, 1, queues="image")
    scene.wait_workers(2)
    good, bad = _pictures(scene.rng)
    sound, bad_sounds = _sounds(scene.rng)
    clip, bad_clips = _clips()

    def uri(data: bytes, media_type: str) -> str:
        return f"data:{media_type};base64,{base64.b64encode(data).decode()}"

    def rows(n: int, faults: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Every second input is bad; every fourth is a sound or a video."""
        made, ends = [], {}
        for k in range(n):
            hostile = k % 2 == 1
            if k % 8 in (2, 3):
                name = scene.rng.choice(list(bad_sounds)) if hostile else ""
                params = {"sound": uri(bad_sounds[name]() if name else sound, "audio/wav")}
            elif k % 8 in (4, 5):
                name = scene.rng.choice(list(bad_clips)) if hostile else ""
                params = {"clip": uri(bad_clips[name]() if name else clip, "video/mp4")}
            else:
                name = scene.rng.choice(list(bad)) if hostile else ""
                params = {"headline": f"card {k}", "width": 480, "height": 480, "picture": uri(bad[name]() if name else good, "image/png")}
            made.append({"kind": "image.compose" if "picture" in params else "chaos.look", "params": params})
            if name and faults:
                scene.history.note("inject", fault=name)
            ends[f"j{k}"] = "failed" if name else "succeeded"
        return made, ends

    expect: dict[str, str] = {}

    def known(batch_id: str, ends: dict[str, str]) -> None:
        expect.update({job_id_for(batch_id, name): end for name, end in ends.items()})

    # Libraries, fonts and decoders come in with the first of each: what counts is what grows after that.
    some, ends = rows(160, False)
    before = warm_up(scene, some)
    known(scene.batches[-1], ends)
    some, ends = rows(jobs, True)
    known(scene.batch(some), ends)
    judge(scene, report, 120 + jobs / 4, expect=expect)
    _leftovers(scene, report, before)
    if any(m.starts > 1 for m in scene.fleet.named("worker")):
        report.violations.append("I10: a worker ended")


Maker = Callable[[], bytes]


def _pictures(rng: random.Random) -> tuple[bytes, dict[str, Maker]]:
    """A good picture, and makers of bad ones."""
    from PIL import Image

    picture = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(picture, "PNG")
    good = picture.getvalue()

    def bomb() -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

        side = 30_000
        head = side.to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
        packer = zlib.compressobj(9)
        row = b"\x00" * (1 + 3 * side)
        body = b"".join(packer.compress(row) for _ in range(200)) + packer.flush()
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")

    ready = bomb()
    return good, {
        "corrupt": lambda: _spoilt(good, rng, 60, 40), "truncated": lambda: good[: rng.randrange(20, len(good) // 2)], "empty": lambda: b"",
        "wrong_type": lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "bomb": lambda: ready, "text": lambda: b"hello",
    }  # fmt: skip


def _sounds(rng: random.Random) -> tuple[bytes, dict[str, Maker]]:
    """A good sound, and makers of bad ones. A FLAC checks itself; of a WAV any bytes are a sound."""
    import numpy as np
    import soundfile

    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes((np.sin(np.arange(8000) / 5) * 9000).astype("<i2").tobytes())
    long = io.BytesIO()
    with soundfile.SoundFile(long, "w", 4000, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(30):
            file.write(np.zeros(4000 * 60, np.int16))
    good, hours = out.getvalue(), long.getvalue()
    return good, {
        "sound_empty": lambda: b"", "sound_truncated": lambda: good[: rng.randrange(5, 40)], "sound_bomb": lambda: hours,
        "sound_playlist": lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\nfile:///etc/passwd\n", "sound_concat": lambda: b"ffconcat version 1.0\nfile /etc/passwd\n",
        "sound_corrupt": lambda: b"fLaC" + bytes(rng.randrange(256) for _ in range(3000)),
    }  # fmt: skip


def _clips() -> tuple[bytes, dict[str, Maker]]:
    """A good video (an animation), and makers of bad ones."""
    from PIL import Image

    out = io.BytesIO()
    first, *rest = [Image.new("RGB", (32, 32), (50 * n, 9, 200 - 20 * n)) for n in range(5)]
    first.save(out, "GIF", save_all=True, append_images=rest)
    good = out.getvalue()
    return good, {
        "clip_empty": lambda: b"", "clip_text": lambda: b"hello", "clip_truncated": lambda: b"\0\0\0\x18ftypisom\0\0\2\0" + bytes(40),
        "clip_svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "clip_playlist": lambda: b"#EXTM3U\nfile:///etc/passwd\n",
        "clip_huge": lambda: b"GIF89a\xff\xff\xff\xff" + good[10:],
    }  # fmt: skip


def _spoilt(data: bytes, rng: random.Random, start: int, times: int) -> bytes:
    changed = bytearray(data)
    for _ in range(times):
        changed[rng.randrange(start, len(changed))] ^= 0xFF
    return bytes(changed)


# --- 9: clocks --------------------------------------------------------------------------------------------------------


@fault("9", "clocks of workers, reaper and dispatcher are wrong by a day and jump about, while workers are killed")
def clocks(scene: Scene, jobs: int, report: Report) -> None:
    folder = scene.folder / "clocks"
    folder.mkdir()

    def move(name: str, offset: float) -> None:
        whole = folder / f"{name}.new"
        whole.write_text(str(offset))
        whole.replace(folder / name)
        scene.history.note("inject", fault="clock", member=name, offset_s=offset)

    day = 86_400.0
    names = {"timer0": day, "timer1": -day, "worker0": day, "worker1": -day, "worker2": 0.0}
    for name, offset in names.items():
        move(name, offset)
    scene.start(3, 2, CHAOS_CLOCKS=str(folder))
    scene.wait_workers(3)
    scene.batch(scene.work(jobs))
    moved = struck = 0

    def inject() -> None:
        nonlocal moved, struck
        # By a day, by weeks, by less than a lease; the timers (reaper, dispatcher, expander) as often as the workers.
        move(scene.rng.choice(list(names)), scene.rng.choice([day, -day, 0.0, 30 * day, -30 * day, LEASE_S, -LEASE_S, 3600.0]))
        moved += 1
        if moved % 5 == 0:
            strike(scene, scene.rng.choice(scene.fleet.named("worker")), scene.rng.choice(["child", "tree"]))
            struck += 1
        time.sleep(scene.rng.uniform(0.5, 2.5))

    keep_busy(scene, scene.work, lambda: moved >= max(10, min(50, jobs // 40)), inject, 300)
    data = judge(scene, report, 120, expect=dict.fromkeys(scene.accepted, "succeeded"))
    wrong = [a for a in data["attempts"] if abs(a["started_at"] - time.time()) > 3600 or (a["finished_at"] and a["finished_at"] < a["started_at"])]
    if wrong:
        report.violations.append(f"I15: {len(wrong)} attempts carry a worker's time")


# --- 10, 13: jobs that misbehave --------------------------------------------------------------------------------------


@fault("10", "poison jobs inside groups of 32; out of memory", jobs=2000)
def poison(scene: Scene, jobs: int, report: Report) -> None:
    from producer.job_ids import job_id_for

    # One worker: the last jobs of a queue are spread over all that serve it.
    scene.start(1, 1)
    scene.wait_workers(1)
    # The case of the plan, alone: one poison job among 32.
    rows = scene.work(32, (0.0, 0.01), "chaos.wide")
    where = scene.rng.randrange(32)
    rows[where]["params"]["act"] = "poison"
    batch_id = scene.batch(rows, expand=True)
    culprit = job_id_for(batch_id, f"j{where}")
    if not scene.quiet(180):
        report.violations.append(f"I9: the 32 did not end: {scene.states()}")
    with scene.database.read() as conn:
        found = {r.id: r for r in conn.execute(text("SELECT id, state, attempt, strikes, error FROM jobs"))}
        sizes = [r.group_size for r in conn.execute(text("SELECT group_size FROM ended_attempts WHERE attempt = 1"))]
    bad = found[culprit]
    others = [r for r in found.values() if r.id != culprit]
    report.notes["among_32"] = {
        "first_group": max(sizes), "poison": bad.state, "strikes": bad.strikes, "attempts": bad.attempt, "reason": (bad.error or {}).get("message"),
        "succeeded": sum(r.state == "succeeded" for r in others), "most_runs_of_a_neighbour": max(r.attempt for r in others),
    }  # fmt: skip
    if (bad.state, bad.strikes) != ("dead", 3) or not (bad.error or {}).get("message"):
        report.violations.append(f"I9: the poison job is {bad.state} with {bad.strikes} strikes: {bad.error}")
    if any(r.state != "succeeded" for r in others) or max(r.attempt for r in others) > 2:
        report.violations.append(f"I9: neighbours of the poison job: {report.notes['among_32']}")
    if max(sizes) != 32:
        report.violations.append(f"I9: the 32 did not travel together: {sizes[:5]}")
    # Then many of them in ordinary traffic, with jobs that find no memory in company, or never.
    scene.add_worker("worker1")
    scene.wait_workers(2)
    rows = scene.work(max(32, jobs - 32), (0.0, 0.01), "chaos.wide")
    acts = ["poison"] * max(1, jobs // 500) + ["crowd"] * max(1, jobs // 100) + ["memory"] * max(1, jobs // 500)
    chosen = scene.rng.sample(range(len(rows)), len(acts))
    for n, act in zip(chosen, acts, strict=True):
        rows[n]["params"]["act"] = act
    batch_id = scene.batch(rows)
    ends = {"poison": "dead", "crowd": "succeeded", "memory": "failed"}
    expect = dict.fromkeys(scene.accepted, "succeeded")
    expect[culprit] = "dead"
    expect.update({job_id_for(batch_id, f"j{n}"): ends[act] for n, act in zip(chosen, acts, strict=True)})
    judge(scene, report, 240 + jobs / 10, expect=expect)


@fault("13", "a model hangs while its heart beats on")
def hangs(scene: Scene, jobs: int, report: Report) -> None:
    from producer.job_ids import job_id_for

    scene.start(3, 1)
    scene.wait_workers(3)
    rows = scene.work(jobs)
    chosen = scene.rng.sample(range(jobs), max(1, min(8, jobs // 30)))
    for n in chosen:
        rows[n]["params"]["act"] = "hang"
    batch_id = scene.batch(rows)
    expect = dict.fromkeys(scene.accepted, "succeeded")
    expect.update({job_id_for(batch_id, f"j{n}"): "dead" for n in chosen})
    data = judge(scene, report, 200 + jobs / 10, expect=expect)
    # From the moment it hung, which its own process wrote down, to the end of its attempt.
    hung: dict[str, list[float]] = defaultdict(list)
    for line in scene.history.lines("inject"):
        hung[str(line["pid"])].append(line["at"])
    ran = [
        a["finished_at"] - max((t for t in checker.struck(hung, a["worker"]) if t < a["finished_at"]), default=a["started_at"])
        for a in data["attempts"] if a["outcome"] == "deadline"
    ]  # fmt: skip
    report.notes["hung_for_s"] = {"p50": round(statistics.median(ran), 1), "max": round(max(ran), 1)} if ran else None
    if any(x > 4 + 5 for x in ran):
        report.violations.append(f"I7: a hung job was left for {max(ran):.0f} s with a limit of 4 s")


# --- 14, 15: cancels, rolling restart ---------------------------------------------------------------------------------


@fault("14", "a storm of cancels against commits")
def cancels(scene: Scene, jobs: int, report: Report) -> None:
    scene.start(3, 1)
    scene.wait_workers(3)
    scene.batch(scene.work(jobs - jobs // 4 - jobs // 20) + scene.work(jobs // 20, (1.0, 3.0)))
    second = scene.batch(scene.work(jobs // 4), expand=True)
    wait(lambda: scene.done() > 10, 90, "the first jobs")
    asked: dict[str, float] = {}
    ids = list(scene.accepted)
    scene.rng.shuffle(ids)
    lock = threading.Lock()

    def storm(n: int) -> None:
        rng = random.Random(f"{scene.seed}/storm/{n}")
        for _ in range(max(3, jobs // 60)):
            with scene.database.read() as conn:
                running = list(conn.execute(text("SELECT id FROM jobs WHERE place = 'flying' AND state = 'running' LIMIT 8")).scalars())
            some = rng.sample(ids, min(len(ids), 3)) + rng.sample(running, min(len(running), 2))
            with lock:
                for one in some:
                    asked.setdefault(one, time.time())
            answer = scene.database.run(lambda conn, some=some: lifecycle.cancel_jobs(conn, some))
            scene.history.note("inject", fault="cancel", n=len(some), **answer)
            time.sleep(rng.uniform(0, 0.1))

    threads = [threading.Thread(target=storm, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    scene.database.run(lambda conn: lifecycle.cancel_batch(conn, second))
    scene.history.note("inject", fault="cancel_batch")
    for thread in threads:
        thread.join()
    data = judge(scene, report, 120 + jobs / 10)
    never = {j["id"] for j in data["jobs"] if j["state"] == "cancelled"}
    late = [
        (a["job_id"], round(a["finished_at"] - asked[a["job_id"]], 1)) for a in data["attempts"]
        if a["job_id"] in asked and a["job_id"] in never and a["started_at"] < asked[a["job_id"]] and a["finished_at"] - asked[a["job_id"]] > 8
    ]  # fmt: skip
    report.recovery = [
        max(0.0, a["finished_at"] - asked[a["job_id"]]) for a in data["attempts"]
        if a["job_id"] in asked and a["job_id"] in never and a["started_at"] < asked[a["job_id"]] < a["finished_at"]
    ]  # fmt: skip
    if late:
        report.violations.append(f"I11: running jobs stopped late: {late[:3]}")
    report.notes["recovery_means"] = "seconds from the cancel of a running job to its end"


@fault("15", "SIGTERM to a third of the workers again and again")
def rolling(scene: Scene, jobs: int, report: Report) -> None:
    scene.start(3, 2)
    scene.wait_workers(3)
    scene.batch(scene.work(jobs))
    turn = 0

    def inject() -> None:
        nonlocal turn
        everybody = [*scene.fleet.named("worker"), *scene.fleet.named("timer")]
        member = everybody[turn % len(everybody)]
        turn += 1
        scene.history.note("inject", fault="sigterm", member=member.name)
        starts = member.starts
        member.process.terminate()
        with contextlib.suppress(TimeoutError):
            wait(lambda: member.starts > starts, 30, "the restart")
        # The next one goes before this one is quite back: at times only one of the three works.
        time.sleep(scene.rng.uniform(0.2, 2.5))

    keep_busy(scene, scene.work, lambda: turn >= max(5, min(25, jobs // 80)), inject, 330)
    data = judge(scene, report, 120, expect=dict.fromkeys(scene.accepted, "succeeded"))
    if any(j["strikes"] for j in data["jobs"]):
        report.violations.append("I19: a rolling restart added strikes")
    crashed = sum(1 for a in data["attempts"] if a["outcome"] == "crash")
    if crashed:
        report.violations.append(f"I19: {crashed} attempts were lost in a rolling restart")


# --- 16: a large batch ------------------------------------------------------------------------------------------------

ACCEPT = """
import json, resource, sys, time
from pathlib import Path
from contentfactory.jobs.spec import load_kinds
from contentfactory.settings import load_settings
from db.session import Database
from producer import manifest
from producer.enqueue import Producer
from producer.publish import Publisher
from producer.services import open_store

settings = load_settings()
load_kinds()
producer = Producer(settings, Database(settings.database()), open_store(settings), Publisher(settings))
started = time.monotonic()
batch, _ = producer.create_batch(manifest.open_manifest(Path(sys.argv[1])), priority=0, resume=False)
print(json.dumps({"batch": batch, "seconds": time.monotonic() - started, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""
"""One call accepts the batch, in a process of its own whose memory is looked at."""
MEMORY_MB = 300


@fault("16", "a million rows in one call, its expander and the dispatcher killed repeatedly", jobs=1_000_000)
def large(scene: Scene, jobs: int, report: Report) -> None:
    memo = scene.memo
    if "batch" not in memo:
        _accept_and_expand(scene, jobs, report)
    batch_id = memo["batch"]
    scene.batches = [batch_id]
    jobs = report.jobs = memo["jobs"]
    # The work, with the dispatcher killed as long as it lasts.
    if not memo.get("done"):
        _work_off(scene, jobs, report)
    report.injections = sum(x.get("n", 1) for x in scene.history.lines("inject"))
    report.notes["injected"] = dict(Counter(x.get("fault", "?") for x in scene.history.lines("inject")))
    report.notes.update({k: v for k, v in memo.items() if k not in ("batch", "backs")})
    _backlog(scene, report)
    for what, most in memo.get("mb", {}).items():
        if most > MEMORY_MB:
            report.violations.append(f"I13: {what} took {most} MB; the limit is {MEMORY_MB}")
    if not memo.get("done"):
        report.notes["unfinished"] = f"{scene.counted():,} of {jobs:,}; go on with --keep"
        return
    report.recovery = memo["backs"]
    report.notes["recovery_means"] = "seconds from the kill of the expander or dispatcher until it went on"
    began = time.monotonic()
    found, report.notes["ledger"] = checker.check_large(scene.database, batch_id, jobs)
    report.violations += found + checker.check_large_store(scene.database, scene.store, jobs, scene.rng)
    report.notes["checked_in_s"] = round(time.monotonic() - began, 1)


def _accept_and_expand(scene: Scene, jobs: int, report: Report) -> None:
    memo = scene.memo
    path = scene.folder / "large.jsonl"
    with open(path, "w") as out:
        for n in range(jobs):
            out.write(f'{{"custom_id":"r{n}","kind":"text.echo","params":{{"text":"row {n}"}},"seed":1}}\n')
    if jobs > 200_000:
        # The ledger itself tells of lost and doubled rows; three more rows for each job would be most of the work.
        with scene.database.write() as conn:
            conn.execute(text("DROP TRIGGER chaos_audit ON jobs"))
    done = subprocess.run([sys.executable, "-c", ACCEPT, str(path)], env=scene.environment("client"), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    told = json.loads(done.stdout.splitlines()[-1])
    path.unlink()
    memo.update(batch=told["batch"], jobs=jobs, accepted_in_s=round(told["seconds"], 1), mb={"client": round(told["mb"])}, backs=[], expander_kills=0)
    memo.update(dispatcher_kills=0, worked_s=0.0, expanded_in_s=0.0)
    began = time.monotonic()
    # A timer alone: it expands, and dispatches up to the cap.
    scene.start(0, 1)
    timer = scene.fleet.named("timer")[0]

    def state() -> tuple[str, int]:
        with scene.database.read() as conn:
            return tuple(conn.execute(text("SELECT state, cursor FROM batches WHERE id = :id"), {"id": memo["batch"]}).one())

    last, moved, killed_at = -1, time.monotonic(), 0.0
    while (now := state())[0] == "expanding":
        if now[1] != last:
            if killed_at:
                memo["backs"].append(round(time.monotonic() - killed_at, 2))
                killed_at = 0.0
            last, moved = now[1], time.monotonic()
        elif time.monotonic() - moved > 60:
            report.violations.append(f"I1: the expander stands at {now[1]}")
            break
        if now[1] >= (memo["expander_kills"] + 1) * jobs / 8 and memo["expander_kills"] < 7 and not killed_at:
            time.sleep(scene.rng.uniform(0, 0.4))  # anywhere in a chunk
            timer.send(signal.SIGKILL)
            last = state()[1]
            memo["expander_kills"] += 1
            killed_at = time.monotonic()
            scene.history.note("inject", fault="expander_killed", cursor=last)
        time.sleep(0.05)
    memo["expanded_in_s"] = round(time.monotonic() - began, 1)
    _largest(scene, memo)
    scene.save()


def _work_off(scene: Scene, jobs: int, report: Report) -> None:
    memo = scene.memo
    if not scene.fleet.named("timer"):
        scene.start(0, 1)
    began, first = time.monotonic(), scene.counted()
    for n in range(2):
        scene.add_worker(f"worker{n}")
    scene.wait_workers(2)
    timer = scene.fleet.named("timer")[0]
    next_kill = began + 5
    last, moved = first, began
    while (done := scene.counted()) < jobs and time.monotonic() < scene.deadline:
        at = time.monotonic()
        if done != last:
            last, moved = done, at
        elif at - moved > 90:
            report.violations.append(f"I1: the work stands at {done:,} of {jobs:,}")
            break
        if at >= next_kill and memo["dispatcher_kills"] < 12 and done < 0.98 * jobs:
            before = scene.publisher_time()
            timer.send(signal.SIGKILL)
            memo["dispatcher_kills"] += 1
            scene.history.note("inject", fault="dispatcher_killed", done=done)
            with contextlib.suppress(TimeoutError):
                wait(lambda before=before: scene.publisher_time() > before, 30, "a hint of the next dispatcher", step=0.05)
                memo["backs"].append(round(time.monotonic() - at, 2))
            next_kill = time.monotonic() + scene.rng.uniform(5, 15)
        time.sleep(0.25)
    memo["worked_s"] = round(memo["worked_s"] + time.monotonic() - began, 1)
    memo["done"] = scene.counted() >= jobs
    if memo["done"]:
        memo["jobs_per_s"] = round(jobs / memo["worked_s"], 1)
        with contextlib.suppress(TimeoutError):
            wait(lambda: not scene.open_batches(), 60, "the batch to close", step=0.5)
    _largest(scene, memo)
    grown, notes = checker.check_growth(scene.resources)
    report.violations += grown
    report.notes["memory"] = notes
    scene.save()


def _largest(scene: Scene, memo: dict[str, Any]) -> None:
    for (what, _), samples in scene.resources.items():
        memo["mb"][what] = max(memo["mb"].get(what, 0), round(max(s["rss"] for s in samples)))
    if scene.backlog:
        memo["backlog_jobs_max"] = max(memo.get("backlog_jobs_max", 0), *(x["jobs"] for x in scene.backlog))
        memo["backlog_seconds_max"] = round(max(memo.get("backlog_seconds_max", 0), *(x["seconds"] for x in scene.backlog)), 1)
        memo["backlog_messages_max"] = max(memo.get("backlog_messages_max", 0), *(x["messages"] for x in scene.backlog))


# --- 17: training -----------------------------------------------------------------------------------------------------


@fault("17", "training killed at random steps; newest checkpoint corrupted; a zombie writes a checkpoint", jobs=4)
def training(scene: Scene, jobs: int, report: Report) -> None:
    from training import run_trainings

    run_trainings(scene, jobs, report)

"""The faults of the plan, one function each. A function starts what it needs, breaks it, waits for quiet, and is judged."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import statistics
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import checker
from harness import LEASE_S, REAPER_S, Member, Scene, repeating, wait
from proxy import PostgresProxy, S3Proxy
from sqlalchemy import text

from contentfactory.errors import FactoryError
from contentfactory.states import TERMINAL
from db import lifecycle
from db.session import Database
from producer.enqueue import Producer
from producer.publish import Publisher

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
        return round(sorted(self.recovery)[int(0.95 * (len(self.recovery) - 1))], 2) if self.recovery else None


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
        for pid in line.get("victims", []) or ([line["pid"]] if "pid" in line else []):
            out[str(pid)].append(line["at"])
    return out


def judge(scene: Scene, report: Report, timeout: float, *, expect: dict[str, str] | None = None, rescues: bool = True) -> dict[str, list[Any]]:
    """Wait for quiet and check every invariant that can be read off the ledger, the audit and the store."""
    if not scene.quiet(timeout):
        report.violations.append(f"I1: not quiet after {timeout:.0f} s: {scene.states()}")
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
    _backlog(scene, report)
    return data


def _backlog(scene: Scene, report: Report) -> None:
    """I13: what lies on the broker stays under the cap: a minute of work (here 10 s) for each worker, plus one group."""
    over = [x for x in scene.backlog if x["seconds"] > scene.settings.inflight_s * max(1, x["workers"]) + 60 and x["jobs"] > 2 * max(1, x["workers"]) + 256]
    if over:
        report.violations.append(f"I13: backlog of {over[0]}")
    if scene.backlog:
        report.notes["backlog_jobs_max"] = max(x["jobs"] for x in scene.backlog)


def _leftovers(scene: Scene, report: Report, before: dict[int, dict[str, float]]) -> None:
    """I20: memory, handles and scratch of workers that lived through it all."""
    time.sleep(1.0)
    after = scene.measure_workers()
    for pid in set(before) & set(after):
        grown = (after[pid]["rss"] - before[pid]["rss"]) / 2**20
        if grown > 80:
            report.violations.append(f"I20: process {pid} grew by {grown:.0f} MB")
        if after[pid]["fds"] > before[pid]["fds"] + 16:
            report.violations.append(f"I20: process {pid} holds {after[pid]['fds']} handles, {before[pid]['fds']} before")
        report.notes["rss_growth_mb"] = round(max(report.notes.get("rss_growth_mb", 0.0), grown), 1)
    alive = {m.part("child").pid for m in scene.fleet.named("worker") if m.part("child")}
    scratch = list(scene.settings.scratch.iterdir()) if scene.settings.scratch.is_dir() else []
    held = [p.name for p in scratch if any(f"-{pid}-" in p.name for pid in alive)]
    if held:
        report.violations.append(f"I20: scratch of living workers: {held[:3]}")
    report.notes["scratch_of_the_dead"] = len(scratch) - len(held)


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
    rows = scene.work(jobs - jobs // 8) + scene.work(jobs // 8, (0.3, 0.5))
    scene.rng.shuffle(rows)
    scene.batch(rows)
    scene.until_done(0.05)
    while scene.done() < 0.9 * jobs:
        member = scene.rng.choice(scene.fleet.named("worker"))
        child = member.part("child")
        if child is None or not _running(scene, child.pid):
            time.sleep(0.1)
            continue
        early = scene.rng.random() < 0.5
        scene.history.note("inject", fault="stop_past_lease", member=member.name, victims=[child.pid], resume="early" if early else "late")
        member.send(signal.SIGSTOP)
        held = _running(scene, child.pid)

        def rescued(held=held, early=early) -> bool:
            with scene.database.read() as conn:
                rows = conn.execute(text("SELECT state, attempt, id FROM jobs WHERE id = ANY(:ids)"), {"ids": [h[0] for h in held]}).all()
            first = dict(held)
            if early:
                return any(r.attempt > first[r.id] and r.state == "running" for r in rows) or all(r.state in TERMINAL for r in rows)
            return all(r.state in TERMINAL for r in rows)

        try:
            wait(rescued, 40, "the second attempt", step=0.05)
        except TimeoutError:
            report.violations.append(f"I7: jobs of a stopped worker were not taken over in 40 s: {held[:3]}")
        member.send(signal.SIGCONT)
        scene.history.note("resumed", member=member.name)
        time.sleep(1)
    judge(scene, report, 120)


def _running(scene: Scene, pid: int) -> list[tuple[str, int]]:
    with scene.database.read() as conn:
        query = "SELECT id, attempt FROM jobs WHERE state = 'running' AND lease_owner LIKE :owner"
        return [(r.id, r.attempt) for r in conn.execute(text(query), {"owner": f"%/{pid}-%"})]


# --- 3, 4, 11: broker -------------------------------------------------------------------------------------------------


@fault("3", "the broker is killed with all its data while jobs are queued; FLUSHALL; down while jobs are accepted", jobs=5000)
def broker_loss(scene: Scene, jobs: int, report: Report) -> None:
    # All of them are accepted, and as many hints sent as the cap allows, before anybody works.
    scene.batch(scene.work(jobs), expand=True)
    with scene.database.read() as conn:
        report.notes["waiting_at_first_kill"] = conn.execute(text("SELECT count(*) FROM jobs WHERE state IN ('queued', 'dispatched')")).scalar()
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


@fault("11", "malformed messages: not JSON, wrong types, bad base64, wrong arguments, unknown task, pickle, 64 MiB")
def malformed(scene: Scene, jobs: int, report: Report) -> None:
    scene.start(2, 1)
    scene.wait_workers(2)
    scene.batch(scene.work(jobs, (0.0, 0.02)))
    good = {"content-type": "application/json", "content-encoding": "utf-8", "headers": {"lang": "py", "task": "text.echo", "id": "x"}}
    props = {"delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": "text"}, "body_encoding": "base64", "priority": 9}
    import base64
    import pickle

    def message(body: bytes | str = b"[[], {}, {}]", *, encode: bool = True, headers: dict[str, Any] | None = None, **over: Any) -> bytes:
        raw = base64.b64encode(body).decode() if encode else body
        own = {**props, "delivery_tag": str(uuid.uuid4()), "correlation_id": str(uuid.uuid4())}
        return json.dumps({"body": raw, **good, "headers": {**good["headers"], **(headers or {})}, "properties": own, **over}).encode()

    def items() -> dict[str, bytes]:
        return {
            "not_json": b"this is not json", "one": b"1", "list": b"[]", "null": b"null", "not_utf8": b"\xff\xfe\x00{", "string": b'"x"',
            "empty": b"", "empty_object": b"{}", "bad_base64": message("!!!not base64", encode=False), "body_not_json": message(b"nonsense"),
            "no_properties": json.dumps({"body": "e30=", **good}).encode(), "no_headers": json.dumps({"body": "e30=", "properties": props}).encode(),
            "no_tag": json.dumps({"body": "e30=", **good, "properties": {"delivery_info": {}}}).encode(),
            "wrong_args": message(json.dumps([[1, 2, 3], {"x": 1}, {}]).encode()), "args_null": message(b"null"),
            "bad_ids": message(json.dumps([[["not an id"]], {}, {}]).encode()), "unknown_task": message(headers={"task": "os.system"}),
            "no_task": message(headers={"task": None}), "pickle": message(pickle.dumps({"a": 1}), **{"content-type": "application/x-python-serialize"}),
            "eta": message(headers={"eta": "2999-01-01T00:00:00"}), "bad_eta": message(headers={"eta": "soon"}), "control": message(headers={"task": "celery.backend_cleanup"}),
            "deep": b"[" * 100_000 + b"]" * 100_000,
        }  # fmt: skip

    def put(name: str, raw: bytes) -> None:
        key = scene.rng.choice(Publisher._keys("text"))
        (scene.broker.rpush if scene.rng.random() < 0.5 else scene.broker.lpush)(key, raw)
        scene.history.note("inject", fault=name)

    rounds = max(2, min(20, jobs // 100))
    for n in range(rounds):
        for name, raw in items().items():
            put(name, raw)
        if n == 1:
            put("64_mib", b'{"body": "' + b"A" * (64 << 20) + b'"}')
        with contextlib.suppress(TimeoutError):
            scene.until_done(min(0.9, (n + 1) / rounds), 20)
    before = {m.name: m.starts for m in scene.fleet.members}
    judge(scene, report, 60 + jobs / 10)
    report.notes["restarts"] = {name: n - 1 for name, n in before.items() if n > 1}
    if report.notes["restarts"]:
        report.violations.append(f"I10: processes ended by malformed messages: {report.notes['restarts']}")


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


@fault("8", "no space left, handles used up, scratch folder unusable")
def disk(scene: Scene, jobs: int, report: Report) -> None:
    scene.start(2, 1)
    scene.wait_workers(2)
    before = scene.measure_workers()
    rows = scene.work(jobs)
    for row in scene.rng.sample(rows, max(4, jobs // 50)):
        row["params"]["act"] = scene.rng.choice(["disk", "handles"])
    scene.batch(rows)
    scratch = scene.settings.scratch
    for share in (0.2, 0.5):
        scene.until_done(share, 300)
        scene.history.note("inject", fault="scratch_unusable")
        aside = scratch.with_name(f"aside-{share}")
        scratch.rename(aside)
        scratch.write_text("a file in the place of the folder")
        time.sleep(2)
        scratch.unlink()
        shutil.rmtree(aside, ignore_errors=True)
    judge(scene, report, 120, expect=dict.fromkeys(scene.accepted, "succeeded"))
    _leftovers(scene, report, before)


@fault("12", "corrupt, truncated, empty, wrong-type and bomb inputs", jobs=400)
def inputs(scene: Scene, jobs: int, report: Report) -> None:
    import base64
    import zlib

    from PIL import Image

    scene.start(2, 1, queues="image")
    scene.wait_workers(2)
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

    def corrupt() -> bytes:
        data = bytearray(good)
        for _ in range(40):
            data[scene.rng.randrange(60, len(data))] ^= 0xFF
        return bytes(data)

    bad = {
        "corrupt": corrupt, "truncated": lambda: good[: scene.rng.randrange(20, len(good) // 2)], "empty": lambda: b"",
        "wrong_type": lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "bomb": bomb, "text": lambda: b"hello",
    }  # fmt: skip
    rows, expect = [], {}
    for n in range(jobs):
        name = scene.rng.choice(list(bad)) if n % 2 else ""
        data = bad[name]() if name else good
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        rows.append({"kind": "image.compose", "params": {"headline": f"card {n}", "picture": uri}})
        if name:
            scene.history.note("inject", fault=name)
        expect[f"j{n}"] = "failed" if name else "succeeded"
    # Libraries and fonts come in with the first jobs: what counts is what grows after that.
    warm = [{"kind": "image.compose", "params": {"headline": f"warm {n}", "picture": "data:image/png;base64," + base64.b64encode(good).decode()}} for n in range(24)]
    warmed = scene.batch(warm)
    scene.quiet(120)
    before = scene.measure_workers()
    batch_id = scene.batch(rows)
    from producer.enqueue import job_id_for

    expect = {**{job_id_for(batch_id, k): v for k, v in expect.items()}, **{job_id_for(warmed, f"j{n}"): "succeeded" for n in range(24)}}
    judge(scene, report, 120 + jobs, expect=expect)
    _leftovers(scene, report, before)
    if any(m.starts > 1 for m in scene.fleet.named("worker")):
        report.violations.append("I10: a worker ended")


# --- 9: clocks --------------------------------------------------------------------------------------------------------


@fault("9", "clocks of workers and timers are wrong by a day, either way, while workers are killed")
def clocks(scene: Scene, jobs: int, report: Report) -> None:
    scene.start(0, 1, CHAOS_CLOCK="86400")
    scene.start(0, 0)
    for n, offset in enumerate((86400, -86400, 0)):
        scene.add_worker(f"worker{n}", CHAOS_CLOCK=str(offset))
        scene.history.note("inject", fault="clock", member=f"worker{n}", offset_s=offset)
    scene.wait_workers(3)
    scene.batch(scene.work(jobs))
    for share in (0.2, 0.4, 0.6):
        scene.until_done(share, 300)
        strike(scene, scene.rng.choice(scene.fleet.named("worker")), scene.rng.choice(["child", "tree"]))
    data = judge(scene, report, 120)
    wrong = [a for a in data["attempts"] if abs(a["started_at"] - time.time()) > 3600 or (a["finished_at"] and a["finished_at"] < a["started_at"])]
    if wrong:
        report.violations.append(f"I15: {len(wrong)} attempts carry a worker's time")


# --- 10, 13: jobs that misbehave --------------------------------------------------------------------------------------


@fault("10", "poison jobs inside groups of 32; out of memory", jobs=2000)
def poison(scene: Scene, jobs: int, report: Report) -> None:
    from producer.enqueue import job_id_for

    scene.start(2, 1)
    scene.wait_workers(2)
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
        sizes = [r.group_size for r in conn.execute(text("SELECT group_size FROM attempts WHERE attempt = 1"))]
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
    from producer.enqueue import job_id_for

    scene.start(3, 1)
    scene.wait_workers(3)
    rows = scene.work(jobs)
    chosen = scene.rng.sample(range(jobs), max(1, min(3, jobs // 30)))
    for n in chosen:
        rows[n]["params"]["act"] = "hang"
    batch_id = scene.batch(rows)
    expect = dict.fromkeys(scene.accepted, "succeeded")
    expect.update({job_id_for(batch_id, f"j{n}"): "dead" for n in chosen})
    data = judge(scene, report, 200 + jobs / 10, expect=expect)
    ran = [a["finished_at"] - a["started_at"] for a in data["attempts"] if a["outcome"] == "deadline"]
    report.notes["hung_for_s"] = [round(x, 1) for x in ran[:12]]
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
                running = list(conn.execute(text("SELECT id FROM jobs WHERE state = 'running' LIMIT 8")).scalars())
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
    while scene.done() < 0.95 * jobs:
        everybody = [*scene.fleet.named("worker"), *scene.fleet.named("timer")]
        member = everybody[turn % len(everybody)]
        turn += 1
        scene.history.note("inject", fault="sigterm", member=member.name)
        starts = member.starts
        member.process.terminate()
        with contextlib.suppress(TimeoutError):
            wait(lambda member=member, starts=starts: member.starts > starts, 30, "the restart")
        time.sleep(1.5)
    data = judge(scene, report, 120, expect=dict.fromkeys(scene.accepted, "succeeded"))
    if any(j["strikes"] for j in data["jobs"]):
        report.violations.append("I19: a rolling restart added strikes")
    crashed = sum(1 for a in data["attempts"] if a["outcome"] == "crash")
    if crashed:
        report.violations.append(f"I19: {crashed} attempts were lost in a rolling restart")


# --- 16: a large batch ------------------------------------------------------------------------------------------------


@fault("16", "a large batch, its expander and the dispatcher killed repeatedly", jobs=100_000)
def large(scene: Scene, jobs: int, report: Report) -> None:
    begun = time.monotonic()
    scene.start(2, 1)
    scene.wait_workers(2)
    path = scene.folder / "large.jsonl"
    with open(path, "w") as out:
        for n in range(jobs):
            out.write(f'{{"custom_id":"r{n}","kind":"text.echo","params":{{"text":"row {n}"}},"seed":1}}\n')
    from producer import manifest as manifests
    from producer.enqueue import job_id_for

    accept = time.monotonic()
    batch_id, _ = scene.producer.create_batch(manifests.open_manifest(path), priority=0, resume=False)
    report.notes["accepted_in_s"] = round(time.monotonic() - accept, 1)
    scene.batches.append(batch_id)
    expanding = time.monotonic()
    kills = 0

    def state() -> tuple[str, int]:
        with scene.database.read() as conn:
            return tuple(conn.execute(text("SELECT state, cursor FROM batches WHERE id = :id"), {"id": batch_id}).one())

    timer = scene.fleet.named("timer")[0]
    last, stuck = -1, time.monotonic()
    while state()[0] == "expanding":
        cursor = state()[1]
        if cursor != last:
            last, stuck = cursor, time.monotonic()
        if time.monotonic() - stuck > 60:
            report.violations.append(f"I1: the expander stands at {cursor}")
            break
        # Wait until it works again, then strike.
        if cursor >= (kills + 1) * jobs / 8 and kills < 7:
            timer.send(signal.SIGKILL)
            kills += 1
            scene.history.note("inject", fault="expander_killed", cursor=cursor)
            time.sleep(0.5)
        time.sleep(0.02)
    report.notes["expanded_in_s"] = round(time.monotonic() - expanding, 1)
    report.notes["expander_kills"] = kills
    scene.accepted = dict.fromkeys((job_id_for(batch_id, f"r{n}") for n in range(jobs)), "")
    more = 0
    while scene.done() < 0.9 * jobs and time.monotonic() - begun < 60 + jobs / 60:
        time.sleep(8)
        if more < 5:
            timer.send(signal.SIGKILL)
            more += 1
            scene.history.note("inject", fault="dispatcher_killed")
    judge(scene, report, 60 + jobs / 50)
    rss = max((x["rss"] for x in scene.resources.get("timer", [])), default=0) / 2**20
    report.notes["timer_rss_mb_max"] = round(rss)
    if rss > 300:
        report.violations.append(f"I13: the timer took {rss:.0f} MB")


# --- 17: training -----------------------------------------------------------------------------------------------------


@fault("17", "training killed at random steps; newest checkpoint corrupted; a zombie writes a checkpoint", jobs=4)
def training(scene: Scene, jobs: int, report: Report) -> None:
    from training import run_trainings

    run_trainings(scene, jobs, report)

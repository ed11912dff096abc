"""One history: drawn from a seed, played, and checked when all is quiet."""

import gc
import hashlib
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sim_actors import (
    DISPATCH_S,
    LEASE_S,
    POLICY,
    REAPER_S,
    Crew,
    User,
    checkpoint_of,
    installed,
    line_of,
    result_of,
)
from sim_world import EPOCH, Ledger, Process, SimDatabase, SimStore, Stage, World
from sqlalchemy import text

from contentfactory.settings import Settings, load_settings
from contentfactory.states import TERMINAL, TRANSITIONS, JobState
from db import choice, counters, lifecycle, projects
from producer.manifest.model import JobLine
from producer.sweep import sweep
from storage.keys import artifact_key

FAULTS = {
    "kill": 0.004, "freeze": 0.002, "abort": 0.02, "unknown": 0.02, "lose": 0.15, "double": 0.15, "reorder": 0.1,
    "send_unknown": 0.05, "store": 0.1, "store_unknown": 0.1, "late": 0.1,
}  # fmt: skip
"""Rates of what may happen at any step; a history has a random subset of them."""
CROWD_SHARE = 0.06
"""Share of histories with a batch of which most has to wait in the broker: only there is something left to cancel or to pause."""
LATE_SHARE = 0.5
"""Share of histories in which workers with finished work are held up: nothing else meets a fence as often."""
BLOWS = ("outage", "broker", "flush", "restore", "store", "tree", "freeze", "cut", "keeper", "drain", "timer", "forge")
PATIENCE_S = 900.0
"""How long after the end of the chaos everything must be done: the longest way through all retries, and some."""


class Outcome:
    """What a history came to.

    Attributes:
        violations: Broken invariants, each with its job.
        log: Everything that happened, in order.
        digest: The same for two plays of one seed.
        injected: Faults that really happened, by name.
        moves: Changes of state, and how often.
        outcomes: How attempts ended.
    """

    def __init__(self, stage: World, jobs: int, steps: list[tuple[Any, ...]]) -> None:
        self.seed, self.violations, self.log, self.jobs = stage.seed, stage.violations, stage.log, jobs
        self.steps = steps
        self.injected = stage.injected
        self.moves = Counter(f"{old or 'new'} -> {new}" for _, _, what, _, old, new, *_ in steps if what == "job" and old != new)
        self.outcomes: Counter[str] = stage.facts["outcomes"] or Counter()
        self.seconds = stage.now - EPOCH
        self.digest = hashlib.sha256(repr((stage.log, steps)).encode()).hexdigest()

    def text(self) -> str:
        """The whole story for a file: what was noted and what the ledger saw, by time."""
        lines = [(at, 0, f"{at:9.3f}  {' '.join(str(w) for w in words)}") for at, *words in self.log]
        for at, actor, what, name, old, new, attempt, owner, cancel, strikes, note in self.steps:
            told = f"{what} {name}: {old} -> {new} attempt {attempt} by {actor}"
            told += "".join(f" {k}={v}" for k, v in (("owner", owner), ("cancel", cancel), ("strikes", strikes), ("note", note)) if v)
            lines.append((at - EPOCH, 1, f"{at - EPOCH:9.3f}      {told}"))
        return "\n".join([*(f"VIOLATION {v}" for v in self.violations), "", *(line for _, _, line in sorted(lines, key=lambda x: x[:2]))])


class Simulation:
    """Plays histories one after another on one ledger. Use it inside `simulation`."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger()
        self.settings = load_settings(
            state_dir=folder, device="cpu", lease_s=LEASE_S, reaper_period_s=REAPER_S, dispatch_period_s=DISPATCH_S,
            inflight_s=8.0, drain_s=10,
        )  # fmt: skip
        self.settings.scratch.mkdir(parents=True, exist_ok=True)
        self.played = 0

    def play(self, seed: int) -> Outcome:
        """Play the history of a seed."""
        stage = World(seed, self.ledger)
        Stage.world = stage
        self.played += 1
        if self.played % 50 == 0:
            gc.collect()
        # Names of folders repeat from history to history: what a killed worker left in one would be in the way in another.
        shutil.rmtree(self.settings.scratch, ignore_errors=True)
        return History(stage, self.settings).play()


@contextmanager
def simulation() -> Iterator[Simulation]:
    """Everything replaced and ready to play."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="factory-simulation-", dir=memory if memory.is_dir() else None) as folder, installed():
        made = Simulation(Path(folder))
        # What is alive now stays alive; between histories the rest is collected (`Simulation.play`).
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            yield made
        finally:
            gc.enable()
            gc.unfreeze()
            made.ledger.close()


class History:
    """The plan of one history and its checks."""

    def __init__(self, stage: World, settings: Settings) -> None:
        self.stage, self.rng = stage, stage.rng
        rng = self.rng
        # In some a sweep comes by again and again; its clock may be a day wrong like everybody's.
        self.settings = settings = settings.model_copy(update={"sweep_period_s": rng.choice((8.0, 1e9, 1e9))})
        stage.skewed = rng.random() < 0.5
        self.calm = rng.random() < 0.08
        if not self.calm:
            share = rng.choice((0.15, 0.35, 0.6))
            stage.rates.update({name: rate * rng.choice((0.3, 1.0)) for name, rate in FAULTS.items() if rng.random() < max(share, LATE_SHARE * (name == "late"))})
            self.blows = [blow for blow in BLOWS if rng.random() < share]
        else:
            self.blows = []
        # An outage tells most where somebody works through it.
        self.long_share = 0.25 if "outage" in self.blows else 0.1
        self.chaos_s = rng.choice((15.0, 25.0, 50.0))
        self.crew = Crew(stage, settings)
        self.scripts: dict[int, dict[str, Any]] = {}
        self.lines: dict[str, list[JobLine]] = {}
        self.calls: list[tuple[str, str, float]] = []
        self.users = [User(stage, settings, name) for name in ("alpha", "beta", "gamma")[: rng.choice((1, 1, 1, 2, 3))]]
        self.busy = 0
        self.most_workers = 0
        self.crowded = rng.random() < CROWD_SHARE

    # --- plan ---

    def script(self, user: int, wild: float) -> dict[str, Any]:
        """Parameters of a job; the number ties the job to what it must come to."""
        rng = self.rng
        act = "ok"
        if rng.random() < wild:
            act = rng.choice(("input", "bug", "flaky", "poison", "memory", "big", "big", "hang", "slow", "slow", "slow"))
        self.stage.injected[f"job: {act}"] += act != "ok"
        n = len(self.scripts) + 1
        same = rng.random() < 0.15
        params = {
            "n": 0 if same and act == "ok" else n, "text": "the same" if same else f"text {n}", "act": act,
            "takes": LEASE_S * 1.3 if rng.random() < self.long_share else rng.choice((0.01, 0.3, 0.3, 2.0)), "share": rng.choice((0, 0, 0, 1)),
        }  # fmt: skip
        if same and act == "ok":
            params["takes"], params["share"] = 0.3, 0
        self.scripts[n] = params
        return params

    def live(self, index: int, user: User) -> None:
        """What a user does."""
        stage, rng = self.stage, self.rng
        wild = rng.choice((0.0, 0.1, 0.3))
        if self.crowded and index == 0:
            self.crowd(user)
        for n in range(rng.choice((0, 1, 2))):
            lines: list[JobLine] = []
            for position in range(rng.randint(1, 6)):
                parents: tuple[str, ...] = ()
                params = self.script(index, wild)
                if lines and rng.random() < 0.3:
                    parents = tuple(line.custom_id for line in rng.sample(lines, min(len(lines), rng.choice((1, 1, 2)))))
                    if rng.random() < 0.5:
                        params["text"] = {"job": parents[0], "output": "text.txt"}
                lines.append(line_of(position + 1, f"line{position}", "sim.work", params, parents, rng.choice((7, position + 100 * index))))
                self.orphan(user, params, lines[-1].seed or 0)
            stage.sleep(rng.uniform(0, 3))
            made = user.batch(f"batch{n}", lines)
            if made:
                self.lines[made] = lines
        last: str | None = None
        for n in range(rng.randint(0, 4)):
            stage.sleep(rng.uniform(0, 4))
            parents = (last,) if last and rng.random() < 0.3 else ()
            key = f"key{n}" if rng.random() < 0.8 else None
            params, seed = self.script(index, wild), rng.choice((7, n))
            self.orphan(user, params, seed)
            last = user.submit(
                key, "sim.work", params, depends_on=parents, seed=seed,
                priority=rng.choice((0, 50, 100)), reuse=rng.random() < 0.7,
            )  # fmt: skip
        for n in range(rng.choice((0, 0, 1, 2))):
            number = len(self.scripts) + 1
            params = {"n": number, "steps": rng.randint(1, 8), "every": rng.randint(1, 3), "takes": 0.5}
            self.scripts[number] = params
            user.submit(f"train{n}", "sim.train", params, seed=rng.choice((7, 8)))
        for _ in range(rng.choice((0, 1, 2, 4))):
            stage.sleep(rng.uniform(0, 6))
            self.meddle(user)
        if user.batches and rng.random() < 0.3:
            stage.sleep(rng.uniform(5, 30))
            again = user.ask(lambda p: p.retry_failed(user.batches[0], project=user.project))
            if again:
                user.batches.append(again)
        self.busy -= 1

    def crowd(self, user: User) -> None:
        """A batch of many hints, and somebody who thinks better of it while most of them wait."""
        stage, rng = self.stage, self.rng
        lines = []
        for n in range(rng.randint(10, 16)):
            params = {**self.script(0, 0.0), "takes": rng.choice((0.3, 2.0)), "share": n}
            lines.append(line_of(n + 1, f"crowd{n}", "sim.work", params, (), n))
        made = user.batch("crowd", lines)
        if made is None:
            return
        self.lines[made] = lines
        stage.injected["crowd"] += 1
        stage.sleep(rng.uniform(0, 4))
        if rng.random() < 0.6:
            stage.note("cancels", made)
            user.write(partial(lifecycle.cancel_batch, batch_id=made, limit=1))
        else:
            self.hold(user, rng.choice((("queue", "text"), ("batch", made))))

    def hold(self, user: User, what: tuple[str, str]) -> None:
        """Pause something for a while."""
        kind, name = what
        self.stage.note("pauses", kind, name)
        user.write(partial(lifecycle.pause, what=kind, name=name, paused=True))
        self.stage.sleep(self.rng.uniform(1, 20))
        user.write(partial(lifecycle.pause, what=kind, name=name, paused=False))
        self.stage.note("resumes", kind, name)

    def orphan(self, user: User, params: dict[str, Any], seed: int) -> None:
        """Sometimes the object of a result lies in the store already, left over from long ago, and a sweep may be at it."""
        [project] = self.stage.ledger.rows("SELECT id FROM projects WHERE name = ?", user.project) or [None]
        if project is None or not isinstance(params["text"], str) or self.rng.random() > 0.3:
            return
        data = result_of(params["text"], seed)
        self.stage.store_shift = -10_000.0
        key = artifact_key(project[0], hashlib.sha256(data).hexdigest(), ".txt")
        self.stage.objects.put(key, data, media_type="text/plain")
        self.stage.store_shift = 0.0
        self.stage.injected["left-over object"] += 1

    def meddle(self, user: User) -> None:
        """Cancel, pause or reorder something; what is paused is resumed again."""
        stage, rng = self.stage, self.rng
        what = rng.choice(("cancel", "cancel", "cancel batch", "pause", "reprioritise"))
        known = [row[0] for row in stage.ledger.rows("SELECT j.id FROM jobs j JOIN projects p ON p.id = j.project_id WHERE p.name = ? ORDER BY j.id", user.project)]
        if what == "cancel batch" and user.batches:
            batch = rng.choice(user.batches)
            stage.note("cancels", batch)
            user.write(partial(lifecycle.cancel_batch, batch_id=batch, limit=1))
        elif what == "cancel" and known:
            ids = rng.sample(known, min(len(known), rng.choice((1, 1, 3))))
            stage.note("cancels", ids)
            user.write(partial(lifecycle.cancel_jobs, ids=ids))
        elif what == "reprioritise" and known:
            user.write(partial(lifecycle.reprioritise, ids=known[:3], priority=rng.choice((0, 60))))
        elif what == "pause":
            kind = rng.choice(("queue", "project", "batch"))
            projects = [row[0] for row in stage.ledger.rows("SELECT id FROM projects WHERE name = ?", user.project)]
            name = {"queue": "text", "project": projects[0] if projects else None, "batch": user.batches[-1] if user.batches else None}[kind]
            if name:
                self.hold(user, (kind, name))

    def nemesis(self) -> None:
        """The larger blows, at random times until the chaos ends."""
        stage, rng, crew = self.stage, self.rng, self.crew
        end = stage.now + self.chaos_s
        last_outage = 0.0
        n = 0
        while self.blows and stage.now < end:
            stage.sleep(min(rng.expovariate(1 / 8.0), end - stage.now))
            if stage.now >= end:
                break
            alive = [p for p in crew.workers if p.alive]
            victim = rng.choice(alive) if alive else None
            keeper = getattr(victim, "keeper", None)
            n += 1
            blow = "outage" if n == 1 and "outage" in self.blows else rng.choice(self.blows)
            stage.injected[f"blow: {blow}"] += 1
            match blow:
                case "outage" if stage.now - last_outage > 2 * LEASE_S:
                    # One at a time: in between, everybody must have had the time to renew.
                    last_outage = stage.now
                    seconds = rng.choice((1.0, 8.0, LEASE_S + 5, LEASE_S + 9, 2 * LEASE_S))
                    stage.note("database is away", seconds)
                    stage.db_down_until = stage.now + seconds
                    stage.outages.append((stage.now, stage.now + seconds))
                case "broker":
                    stage.broker.down_until = stage.now + rng.choice((1.0, 15.0))
                    stage.note("broker is away")
                    if rng.random() < 0.5:
                        stage.broker.flush()
                case "flush":
                    stage.broker.flush()
                case "restore":
                    stage.broker.restore()
                case "store":
                    stage.store_down_until = stage.now + rng.choice((1.0, 10.0))
                    stage.note("storage is away")
                case "tree" if victim:
                    if keeper:
                        keeper.process.kill("nemesis")
                    victim.kill("nemesis")
                case "freeze" if victim:
                    crew.halt(victim)
                case "cut" if victim:
                    seconds = rng.choice((2.0, LEASE_S + 10))
                    victim.cut(seconds)
                    if keeper:
                        keeper.process.cut(seconds)
                case "keeper" if keeper:
                    keeper.process.kill("nemesis")
                case "drain" if victim:
                    crew.drain(victim)
                case "timer" if crew.timers[-1].alive:
                    crew.timers[-1].kill("nemesis")
                case "forge":
                    self.forge()
        stage.sleep(max(0.0, end - stage.now))
        # An outage lasts as long as it lasts: what happens when it is over at last is what it was for.
        while stage.db_down_until > stage.now:
            stage.sleep(stage.db_down_until - stage.now)
        stage.note("the chaos ends")
        crew.thaw()

    def forge(self) -> None:
        """Hints by an unknown hand: any ids, any mixture, any number of times."""
        ids = [row[0] for row in self.stage.ledger.rows("SELECT id FROM jobs ORDER BY id")]
        if ids:
            rng = self.rng
            chosen = rng.choices(ids, k=rng.randint(1, 6))
            hint = choice.Hint("sim.work", rng.choice(("text", "train")), 0, (*chosen, "job_" + "0" * 32), self.stage.now - rng.choice((0, 20)))
            self.stage.broker.faithful = False
            self.stage.broker.push(hint)
            self.stage.note("forged hint", chosen)

    # --- play ---

    def play(self) -> Outcome:
        stage, rng = self.stage, self.rng
        boot = stage.process("boot", "boot")
        for user in self.users:
            if rng.random() < 0.5:
                with stage.ledger.transaction():
                    projects.ensure(stage.ledger.connection, user.project)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            self.crew.worker(rng.choice((["text"], ["text", "train"])))
        self.crew.worker(["text", "train"] if rng.random() < 0.7 else ["train"])
        for _ in range(rng.choice((1, 1, 1, 2))):
            self.crew.timer(delay=rng.uniform(0, 2))
        self.busy = len(self.users)
        for index, user in enumerate(self.users):
            stage.spawn(user.process, partial(self.live, index, user), then=self._lived)
        stage.spawn(boot, self.nemesis, then=self._lived)
        stage.quiet = self._quiet
        self._look = 0.0
        done = stage.run(EPOCH + self.chaos_s + 2 * LEASE_S + PATIENCE_S)
        stage.facts["over"] = True
        stage.quiet = lambda: False
        if done and not stage.violations and rng.random() < 0.4:
            self.tidy()
        Checker(self, done).check()
        steps = stage.ledger.rows(
            "SELECT at, actor, what, id, old, new, attempt, owner, cancel, strikes, note FROM sim_log ORDER BY n"
        )
        outcomes = stage.ledger.rows("SELECT coalesce(outcome, 'open'), count(*) FROM ended_attempts GROUP BY 1")
        stage.facts["outcomes"] = Counter(dict(outcomes))
        jobs = stage.ledger.rows("SELECT count(*) FROM jobs")[0][0]
        stage.close()
        return Outcome(stage, jobs, steps)

    def tidy(self) -> None:
        """Long after, one sweep: what nothing refers to goes, and nothing else (I18)."""
        stage = self.stage
        self.crew.thaw()  # all was done before the chaos had ended
        stage.now += self.settings.sweep_window_s + 100
        process = stage.process("sweeper", "sweeper")
        process.skew = 0.0
        ended: list[BaseException | None] = []
        task = stage.spawn(process, lambda: sweep(self.settings, SimDatabase(stage, process), SimStore(stage)), then=ended.append)  # type: ignore[arg-type]
        stage.quiet = lambda: bool(ended)
        stage.run(stage.now + 60)
        stage.quiet = lambda: False
        if self.settings.sweep_period_s < self.settings.sweep_window_s:
            # A timer woke with the same clock: what its sweep marked first is its own to delete, and it may still be at it.
            stage.run(stage.now + 20)
        if task.error is not None or not ended:
            stage.violate("I18", f"the sweep ended with {task.error!r}")

    def _lived(self, error: BaseException | None) -> None:
        if error is not None and not self.stage.facts["over"]:
            import traceback

            self.stage.violate("X", f"the simulation itself failed: {''.join(traceback.format_exception(error))[-1500:]}")
            self.busy = 0

    def _quiet(self) -> bool:
        stage = self.stage
        if stage.now < self._look:
            return False
        self._look = stage.now + 1.0
        self._backlog()
        if self.busy:
            return False
        open_jobs = stage.ledger.rows(
            "SELECT 1 FROM jobs WHERE state IN ('blocked', 'queued', 'dispatched', 'running') LIMIT 1"
        ) or stage.ledger.rows("SELECT 1 FROM batches WHERE finished_at IS NULL LIMIT 1")
        return not open_jobs

    def _backlog(self) -> None:
        """I13: what waits in the broker stays below the cap, and no job waits there over and over."""
        stage = self.stage
        [(seconds, n, largest)] = stage.ledger.rows(
            "SELECT coalesce(sum(seconds), 0), count(*), coalesce(max(seconds), 0) FROM jobs WHERE state = 'dispatched' AND queue = 'text'"
        )
        self.most_workers = max(self.most_workers, sum(1 for p in self.crew.workers if stage.now - (p.died_at or stage.now) < 61))
        cap = self.settings.inflight_s * self.most_workers + 6 * largest
        if seconds > cap + 1e-6 and n > 2 * self.most_workers + 6:
            stage.violate("I13", f"{seconds:.1f} s of work ({n} jobs) are in the broker; the cap is {cap:.1f} s")
        if stage.broker.faithful:
            waiting = Counter(i for hint in stage.broker.waiting() for i in hint.ids)
            # A hint outlives its use when its job was cancelled, paused or given back meanwhile; each such change allows one more.
            for job, times in waiting.items():
                if times > 2:
                    allowed = stage.ledger.rows(
                        "SELECT count(*) FROM sim_log WHERE what = 'job' AND id = ? AND new = 'queued' AND (old = 'running' OR actor NOT LIKE 'timer%')", job
                    )[0][0]
                    if times > 2 + allowed:
                        stage.violate("I13", f"{job} waits {times} times in the broker")


class Checker:
    """The invariants, over ledger, store and history."""

    def __init__(self, history: History, done: bool) -> None:
        self.history, self.stage, self.done = history, history.stage, done
        connection = self.stage.ledger.connection
        with self.stage.ledger.transaction():
            self.jobs = {r["id"]: dict(r) for r in connection.execute(text("SELECT * FROM jobs")).mappings()}
            self.artifacts = [dict(r) for r in connection.execute(text("SELECT * FROM artifacts")).mappings()]
            self.attempts = [dict(r) for r in connection.execute(text("SELECT * FROM ended_attempts ORDER BY job_id, attempt")).mappings()]
            self.sizes = dict(connection.execute(text("SELECT id, jobs FROM micro_batches")).all())
            self.doubled = connection.execute(text("SELECT job_id, attempt FROM attempts WHERE outcome = 'succeeded'")).all()
            self.batches = [dict(r) for r in connection.execute(text("SELECT * FROM batches")).mappings()]
        self.steps = [
            dict(zip(("n", "at", "actor", "what", "id", "old", "new", "attempt", "owner", "cancel", "strikes", "note"), row, strict=True))
            for row in self.stage.ledger.rows("SELECT * FROM sim_log ORDER BY n")
        ]
        self.by_job: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for step in self.steps:
            if step["what"] == "job":
                self.by_job[step["id"]].append(step)
        self.process = {p.name: p for p in self.stage.processes}
        import json

        for job in self.jobs.values():
            job["params"], job["tries"], job["error"] = (json.loads(job[k]) if job[k] else None for k in ("params", "tries", "error"))
        for attempt in self.attempts:
            attempt["error"] = json.loads(attempt["error"]) if attempt["error"] else None

    def fail(self, invariant: str, what: str) -> None:
        self.stage.violate(invariant, what)

    def check(self) -> None:
        self.accepted()
        self.transitions()
        self.results()
        self.tries()
        self.cancels()
        self.counts()
        self.training()
        self.swept()

    # I1, I2

    def accepted(self) -> None:
        for user in self.history.users:
            for job in user.jobs:
                if job not in self.jobs:
                    self.fail("I1", f"{job} was accepted and is not there")
            for key, answer in user.keys.items():
                made = [j["id"] for j in self.jobs.values() if j["idempotency_key"] == key and j["project_id"] == self.project(user)]
                if len(made) > 1:
                    self.fail("I2", f"key {key} made {len(made)} jobs")
                if answer and made != [answer]:
                    self.fail("I2", f"key {key} was answered with {answer}, the ledger has {made}")
        asked = Counter(j["params"]["n"] for j in self.jobs.values() if j["batch_id"] is None and j["retry_of"] is None and j["params"]["n"])
        for n, times in asked.items():
            if times > 1:
                self.fail("I2", f"request {n} made {times} jobs")
        for user in self.history.users:
            for batch in user.batches:
                [row] = [b for b in self.batches if b["id"] == batch] or [None]
                if row is None:
                    self.fail("I1", f"{batch} was accepted and is not there")
                elif row["state"] == "completed" and batch in self.history.lines:
                    n = sum(1 for j in self.jobs.values() if j["batch_id"] == batch)
                    if n != len(self.history.lines[batch]):
                        self.fail("I1", f"{batch} has {n} jobs of {len(self.history.lines[batch])} lines")
        for job in self.jobs.values():
            if job["state"] not in TERMINAL:
                self.fail("I1", f"{job['id']} is {job['state']} {PATIENCE_S:.0f} s after the last fault")
        for batch in self.batches:
            if batch["finished_at"] is None:
                self.fail("I12", f"{batch['id']} is {batch['state']} {PATIENCE_S:.0f} s after the last fault")

    def project(self, user: User) -> str | None:
        rows = self.stage.ledger.rows("SELECT id FROM projects WHERE name = ?", user.project)
        return rows[0][0] if rows else None

    # I6, I4, I7, I8, I11

    def transitions(self) -> None:
        for job, steps in self.by_job.items():
            claimed: dict[str, Any] | None = None
            asked: dict[str, Any] | None = None
            for step in steps:
                old, new = step["old"], step["new"]
                if old is not None and old != new and new not in TRANSITIONS[old]:
                    self.fail("I6", f"{job} went from {old} to {new} (by {step['actor']})")
                if step["cancel"] and asked is None:
                    asked = step
                if new == "running" and old != "running":
                    note = step["note"] or ""
                    if asked:
                        self.fail("I11", f"{job} started although it was cancelled")
                    if "cancelling" in note or "paused" in note:
                        self.fail("I11", f"{job} was claimed while held ({note})")
                    if "parent open" in note:
                        self.fail("I3", f"{job} was claimed before its parents had succeeded")
                    if claimed is not None and step["attempt"] <= claimed["attempt"]:
                        self.fail("I3", f"{job}: attempt {step['attempt']} was claimed twice; the number is the fence")
                    claimed = step
                if old == "running" and new != "running" and claimed is not None:
                    self.left(job, claimed, step, asked)

    def left(self, job: str, claimed: dict[str, Any], step: dict[str, Any], asked: dict[str, Any] | None) -> None:
        """A job leaves ``running``: was it the right one who ended it, and at the right time?"""
        actor = self.process.get(step["actor"])
        holder = self.process.get(claimed["actor"])
        if actor is None or holder is None:
            return
        child: Process = actor.child.child if actor.role == "keeper" else actor  # type: ignore[attr-defined]
        if child.role == "worker" and child is not holder:
            self.fail("I4", f"{job}: attempt {claimed['attempt']} of {holder.name} was ended by {actor.name}")
        reaped = actor.role == "timer"
        if reaped and not self.stage.facts.get("no I8"):
            # The beat comes every 2 s and a few more; whoever could do that in the last lease must not be rescued.
            keepers = [p for p in self.stage.processes if p.role == "keeper" and p.child.child is holder]  # type: ignore[attr-defined]
            start = step["at"] - LEASE_S
            fine = not holder.hindered(start, step["at"]) and not any(k.hindered(start, step["at"]) for k in keepers)
            aborted = any(
                at + EPOCH >= start and words and words[0] in ("commit fails", "commit's answer is lost") and words[1] in {k.name for k in keepers}
                for at, *words in self.stage.log
            )
            if fine and not aborted and claimed["at"] < step["at"] - 1:
                self.fail("I8", f"{job}: attempt {claimed['attempt']} was rescued although {holder.name} lives and could renew ({step['note']})")
        if holder.died_at is not None and step["at"] > holder.died_at:
            limit = max(holder.died_at, claimed["at"]) + LEASE_S + 2 * REAPER_S + 8
            for start, end in sorted([*self.stage.outages, *self.history.crew.timer_gaps]):
                if start <= limit and end >= holder.died_at:
                    limit = max(limit, end + LEASE_S + 2 * REAPER_S + 8)
            troubled = any(p.bad for p in self.history.crew.timers) or self.stage.rates["abort"] or self.stage.rates["unknown"]
            if step["at"] > limit and not troubled:
                self.fail("I7", f"{job} stayed running for {step['at'] - holder.died_at:.0f} s after {holder.name} had died")
        if asked is not None and asked["at"] >= claimed["at"] and step["at"] - asked["at"] > 20:
            busy = holder.hindered(asked["at"] - 1, step["at"]) or any(
                p.hindered(asked["at"] - 1, step["at"]) for p in self.stage.processes if p.role == "keeper" and p.child.child is holder  # type: ignore[attr-defined]
            )
            quiet = not any(a <= step["at"] and b >= asked["at"] for a, b in self.stage.outages)
            if not busy and quiet and not any(self.stage.rates[r] for r in ("abort", "unknown")):
                self.fail("I11", f"{job} went on for {step['at'] - asked['at']:.0f} s after it was cancelled")

    # I3, I5

    def results(self) -> None:
        names: Counter[tuple[str, str]] = Counter()
        outputs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for artifact in self.artifacts:
            stored = self.stage.objects.head(artifact["object_key"])
            if stored is None or stored.size != artifact["size"] or stored.sha256 != artifact["sha256"]:
                self.fail("I5", f"{artifact['job_id']}: artifact {artifact['name']} points at {stored or 'nothing'}")
            names[artifact["job_id"], artifact["name"]] += 1
            if artifact["role"] == "output" and artifact["job_id"]:
                outputs[artifact["job_id"]].append(artifact)
        for (job, name), n in names.items():
            if n > 1:
                self.fail("I3", f"{job} has {n} artifacts named {name}")
        for one, attempt in self.doubled:
            self.fail("I3", f"attempt {attempt} of {one} succeeded and has a row of its own beside its micro-batch's")
        for job in self.jobs.values():
            mine = outputs[job["id"]]
            if job["state"] == "succeeded" and self.sizes.get(job["micro_batch"]) != job["group_size"]:
                self.fail("I3", f"{job['id']} succeeded among {job['group_size']}, its micro-batch has {self.sizes.get(job['micro_batch'])}")
            if (job["micro_batch"] is not None) != (job["state"] in ("running", "succeeded")):
                self.fail("I3", f"{job['id']} is {job['state']} and its micro-batch is {job['micro_batch']}")
            if job["state"] != "succeeded":
                if mine:
                    self.fail("I11" if job["state"] == "cancelled" else "I3", f"{job['id']} is {job['state']} and has a result")
                continue
            if [a["attempt"] for a in mine] != [job["attempt"]]:
                self.fail("I3", f"{job['id']} succeeded in attempt {job['attempt']}, results are of {[a['attempt'] for a in mine]}")
                continue
            if self.stage.objects.head(mine[0]["object_key"]) is None:
                continue
            data = self.stage.objects.get(mine[0]["object_key"])
            if data != self.expected(job):
                self.fail("I3", f"{job['id']} holds {data!r} instead of {self.expected(job)!r}")

    def expected(self, job: dict[str, Any]) -> bytes:
        if job["kind"] == "sim.train":
            return checkpoint_of(job["seed"], job["params"]["steps"])
        words = job["params"]["text"]
        if isinstance(words, dict):
            words = self.expected(self.jobs[words["job"]]).decode()
        return result_of(words, job["seed"])

    # I9

    def tries(self) -> None:
        held: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for attempt in self.attempts:
            held[attempt["job_id"]].append(attempt)
        for job in self.jobs.values():
            mine = held[job["id"]]
            act = job["params"].get("act", "ok")
            count = Counter(a["outcome"] for a in mine)
            strikes = sum(1 for a in mine if a["outcome"] == "crash" and a["group_size"] == 1)
            if job["strikes"] != strikes:
                self.fail("I9", f"{job['id']} has {job['strikes']} strikes; it crashed alone {strikes} times")
            if len(mine) != job["attempt"] - (job["state"] == JobState.RUNNING):
                self.fail("I9", f"{job['id']} is at attempt {job['attempt']}; {len(mine)} are on record")
            alone = Counter(a["outcome"] for a in mine if a["group_size"] == 1)
            together = Counter(a["outcome"] for a in mine if a["group_size"] > 1)
            # A hint that is doubled, forged or comes back brings an old group together again; that costs a try, no strike.
            blamed = together["bug"] + together["crash"] + together["deadline"] if self.stage.broker.faithful else 0
            if strikes > POLICY.strikes or count["transient"] > POLICY.transient + 1 or alone["bug"] > POLICY.bug + 1 or blamed > 1:
                self.fail("I9", f"{job['id']} was tried again and again: alone {dict(alone)}, in groups {dict(together)}")
            self.justified(job, mine)
            end = job["state"]
            why = (job["error"] or {}).get("code")
            if end == "succeeded" and act in ("input", "bug", "poison", "memory", "hang"):
                self.fail("I9", f"{job['id']} was to end by {act} and succeeded")
            if end == "failed" and why != "dependency_failed" and act not in ("input", "memory"):
                self.fail("I9", f"{job['id']} ({act}) failed: {job['error']}")
            if (
                end == "dead" and act not in ("bug", "poison", "hang") and strikes < POLICY.strikes and count["transient"] <= POLICY.transient
                and not self.stood_still(mine)
            ):  # fmt: skip
                self.fail("I9", f"{job['id']} ({act}) is dead after {dict(count)}: {job['error']}")
            if act == "poison" and end == "dead" and strikes != POLICY.strikes:
                self.fail("I9", f"{job['id']} is poison and died after {strikes} strikes")

    def stood_still(self, attempts: list[dict[str, Any]]) -> bool:
        """Whether the job used up its deadlines, and in each attempt that one ended its worker stood still until its keeper gave up.

        To the keeper a process that is stopped looks like a runner that hangs. That again and again in one job is bad luck, but as promised.
        """
        ended = [a for a in attempts if a["outcome"] == "deadline"]
        for attempt in ended:
            process = self.stage.facts.get(("executor", attempt["worker"]))
            if process is None or not any(a < attempt["finished_at"] <= b and b > attempt["started_at"] for a, b in process.still):
                return False
        return len(ended) > POLICY.deadline and attempts[-1]["outcome"] == "deadline"

    def justified(self, job: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
        """A strike needs a worker that died, froze or was cut off."""
        for attempt in attempts:
            if attempt["outcome"] != "crash" or attempt["group_size"] > 1:
                continue
            process = self.stage.facts.get(("executor", attempt["worker"]))
            end = (attempt["finished_at"] or self.stage.now) + 0.01  # its clock has a coarser grain than ours
            keepers = [p for p in self.stage.processes if p.role == "keeper" and p.child.child is process]  # type: ignore[attr-defined]
            if process is None:
                continue
            if not any(p.hindered(attempt["started_at"] - 1, end) for p in (process, *keepers)):
                self.fail("I9", f"{job['id']}: attempt {attempt['attempt']} earned a strike although {process.name} never failed ({attempt['error']})")
            ended = next(s for s in self.by_job[job["id"]] if s["old"] == "running" and s["attempt"] == attempt["attempt"] and s["new"] != "running")
            computed = self.stage.facts["computing", process.name]
            # The keeper sees what the process died of; a reaper only sees that its leases ran out.
            if ended["actor"] in {k.name for k in keepers} and computed and job["params"]["n"] not in computed:
                self.fail("I9", f"{job['id']}: attempt {attempt['attempt']} earned a strike although {process.name} died of another job ({attempt['error']})")

    # I11

    def cancels(self) -> None:
        for job in self.jobs.values():
            if job["cancel_requested"] and job["state"] != "cancelled" and job["state"] in TERMINAL:
                self.fail("I11", f"{job['id']} was asked to stop and is {job['state']}")

    # I12

    def counts(self) -> None:
        for batch in self.batches:
            rows = Counter(j["state"] for j in self.jobs.values() if j["batch_id"] == batch["id"])
            with self.stage.ledger.transaction():
                per_kind = counters.counts(self.stage.ledger.connection, batch["id"])
            told: Counter[str] = Counter()
            for states in per_kind.values():
                told.update({k: v for k, v in states.items() if k != "reused"})
            want = Counter({**rows, "total": sum(rows.values())})
            if self.done and +told != +want:
                self.fail("I12", f"{batch['id']} counts {dict(told)}, its rows say {dict(want)}")
            ends = self.stage.ledger.rows(
                "SELECT count(*) FROM events WHERE batch_id = ? AND type IN ('batch.completed', 'batch.cancelled', 'batch.failed')", batch["id"]
            )[0][0]
            if batch["finished_at"] is not None and ends != 1:
                self.fail("I12", f"{batch['id']} finished {ends} times")
        for step in self.steps:
            if step["what"] == "batch" and step["note"] == "finished":
                self.fail("I12", f"{step['id']} went from {step['old']} to {step['new']} after it had finished")

    # I18

    def swept(self) -> None:
        if not self.done or not self.artifacts or "sweeper" not in self.process:
            return
        kept = {artifact["object_key"] for artifact in self.artifacts}
        for item in self.stage.objects.list("projects/"):
            # A worker that slept through everything puts its object when it wakes: that one is the next sweep's.
            if item.key not in kept and item.modified_at < self.stage.now - self.history.settings.sweep_window_s - 60:
                self.fail("I18", f"object {item.key} is left although nothing refers to it")

    # I16

    def training(self) -> None:
        for job in self.jobs.values():
            if job["kind"] != "sim.train" or job["state"] != "succeeded":
                continue
            params, done = job["params"], self.stage.facts["steps", job["params"]["n"]]
            if done > params["steps"] + (job["attempt"] - 1) * params["every"] and not self.stage.rates["store"] and "store" not in self.history.blows:
                self.fail("I16", f"{job['id']} made {done} of {params['steps']} steps in {job['attempt']} attempts, a checkpoint every {params['every']}")

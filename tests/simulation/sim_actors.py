"""Who lives in the world: worker children with their keepers, timers, users, and the nemesis that hurts them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from sim_world import (
    Killed,
    Process,
    SimDatabase,
    SimLock,
    SimLog,
    SimPool,
    SimPublisher,
    SimQueue,
    SimRandom,
    SimSemaphore,
    SimStore,
    SimThread,
    SimTime,
    Stage,
    World,
    namespace,
    replaced,
    world,
)

import db.lifecycle
import db.projects
import db.registry
import db.session
import producer.dispatch
import producer.enqueue
import producer.expand
import producer.retry
import producer.sweep
import producer.timer
import worker.execution
import worker.keeper
import worker.memory
import worker.meter
from contentfactory.errors import Conflict, FactoryError, InputError, NotFound, Released, TransientError
from contentfactory.jobs import spec as specs
from contentfactory.jobs.spec import Params, RetryPolicy, Text, kind, load_kinds
from contentfactory.settings import Settings
from producer.enqueue import Producer
from producer.manifest.model import JobLine
from producer.timer import Timer
from worker import runners
from worker.context import Failure, Output
from worker.execution import Executor

LEASE_S, REAPER_S, DISPATCH_S = 30.0, 7.0, 7.0
POLICY = RetryPolicy(transient=8, bug=1, deadline=1, strikes=3, backoff_s=0.5, backoff_max_s=40.0)
ACTS = ("ok", "input", "bug", "flaky", "poison", "memory", "big", "hang", "slow")


# --- kinds --------------------------------------------------------------------------------------------------


def result_of(text: str, seed: int) -> bytes:
    """What a job must yield, whoever runs it however often."""
    return f"{text}|{seed}".encode()


def checkpoint_of(seed: int, step: int) -> bytes:
    return json.dumps({"seed": seed, "step": step}).encode()


def _die(process: Process) -> None:
    process.kill("its job")


@contextmanager
def _computing(params: list[Any]) -> Iterator[None]:
    """Note what a process computes; what stands there when it dies is what it died of."""
    stage = world()
    here = stage.here()
    assert here is not None
    stage.facts["computing", here.name] = {one.n for one in params}
    try:
        yield
    finally:
        if here.alive:
            stage.facts["computing", here.name] = set()


def _work(params: list[Any], context: Any) -> Iterator[Any]:
    with _computing(params):
        yield from _work_on(params, context)


def _work_on(params: list[Any], context: Any) -> Iterator[Any]:
    stage = world()
    here = stage.here()
    assert here is not None
    for job, one in enumerate(params):
        tries = stage.facts["ran", one.n] = stage.facts["ran", one.n] + 1
        # A second attempt may take longer than the first: whoever comes back too late then meets it at work.
        slow = tries > 1 and one.n and (one.act == "slow" or one.n % 2 == 0)
        end = stage.now + (LEASE_S * 0.8 if slow else one.takes)
        while stage.now < end:
            for member in range(job, len(params)):
                context.check(member)
            context.progress(job, 0.5)
            stage.step("compute")
            stage.sleep(min(3.0, max(0.001, end - stage.now)))
        if one.act == "poison":
            _die(here)
        if one.act == "hang":
            stage.sleep(100_000)
        if one.act == "input":
            yield Failure(job, InputError("this one is bad"))
        elif one.act == "bug":
            raise RuntimeError("a bug")
        elif one.act == "flaky" and tries <= one.n % 3:
            yield Failure(job, TransientError("not now"))
        elif one.act == "memory" or (one.act == "big" and len(params) > 2):
            raise MemoryError("no room")
        else:
            made = partial(result_of, one.text, context.seeds[job])
            # Some are there when they are handed over, others are encoded on their way into the store.
            yield Output(job, "text.txt", "text/plain", made() if context.seeds[job] % 2 else made)


def _train(params: list[Any], context: Any) -> Iterator[Any]:
    with _computing(params):
        yield from _train_on(params, context)


def _train_on(params: list[Any], context: Any) -> Iterator[Any]:
    stage, [one] = world(), params
    tries = stage.facts["ran", one.n] = stage.facts["ran", one.n] + 1
    # As with work: whoever wakes with an old checkpoint in its hand then meets the next attempt.
    pause = LEASE_S * 0.8 / one.steps if tries > 1 and one.n % 2 == 0 else one.takes
    found = context.checkpoints(0)
    step = json.loads(found[0].read_bytes())["step"] if found else 0
    stage.note("training from", one.n, step)
    while step < one.steps:
        if context.should_release:
            raise Released("the worker stops")
        context.check(0)
        stage.step("train")
        end = stage.now + pause
        while stage.now < end:
            context.check(0)
            context.progress(0, step / one.steps)
            stage.sleep(min(3.0, max(0.001, end - stage.now)))
        step += 1
        stage.facts["steps", one.n] += 1
        context.progress(0, step / one.steps)
        if step % one.every == 0 and step < one.steps:
            context.publish(Output(0, f"checkpoint-{step:04}.json", "application/json", checkpoint_of(context.seeds[0], step)))
    yield Output(0, "model.json", "application/json", checkpoint_of(context.seeds[0], step))


@contextmanager
def sim_kinds() -> Iterator[None]:
    """The kinds of simulated jobs, registered as long as they are needed."""
    load_kinds()

    @kind("sim.work", queue="text", outputs=("text/plain",), max_group=6, group_by=("share",), progress_s=6, time_limit_s=60,
          retry=POLICY, seconds=lambda p: max(p.takes, 0.01))  # fmt: skip
    class SimWork(Params):
        """A simulated job that does what it is told."""

        n: int = Field(description="number of the script")
        text: Text = Field(description="what comes back")
        act: str = Field(default="ok", description="what happens to it")
        takes: float = Field(default=0.5, description="seconds of work")
        share: int = Field(default=0, description="jobs of equal value share a micro-batch")

    @kind("sim.train", queue="train", outputs=("application/json",), cacheable=False, progress_s=6, time_limit_s=600,
          retry=POLICY, seconds=lambda p: p.steps * p.takes)  # fmt: skip
    class SimTrain(Params):
        """A simulated training with checkpoints."""

        n: int = Field(description="number of the script")
        steps: int = Field(description="steps")
        every: int = Field(description="steps between checkpoints")
        takes: float = Field(default=0.5, description="seconds a step")

    runners._RUNNERS["sim.work"], runners._RUNNERS["sim.train"] = _work, _train
    try:
        yield
    finally:
        for name in ("sim.work", "sim.train"):
            specs._REGISTRY.pop(name, None)
            runners._RUNNERS.pop(name, None)


# --- keeper -------------------------------------------------------------------------------------------------


class SimKeeper:
    """`worker.keeper.Keeper` whose process runs the real `_Keeper` as a task."""

    def __init__(self, settings: Settings, worker: str, queues: Any, device: str) -> None:
        here = Stage.world.here()
        assert here is not None
        self.child, self.settings = here, settings
        self.hello = {"op": "hello", "worker": worker, "queues": list(queues), "device": device, "pid": here.number}
        self.held: dict[int, dict[str, Any]] = {}
        self._lost: set[Any] = set()
        self._cancelled: set[Any] = set()
        self._last: dict[Any, float] = {}
        self.closing = False
        self._n = self.groups = 0
        here.keeper = self  # type: ignore[attr-defined]
        self._start()
        here.on_death.append(self._hang_up)

    def _start(self) -> None:
        stage = Stage.world
        self._n += 1
        self.process = process = stage.process(f"{self.child.name}/keeper{self._n}", "keeper")
        process.child = self  # type: ignore[attr-defined]
        with replaced((db.session, "Database", lambda url, pool_size: SimDatabase(stage, process))):
            self.inner = inner = worker.keeper._Keeper(self.settings)
        inner.inbox = SimQueue()  # type: ignore[assignment]
        inner.inbox.put(self.hello)
        for message in self.held.values():
            inner.inbox.put(message)
        stage.spawn(process, inner.run, then=self._ended)

    def _ended(self, error: BaseException | None) -> None:
        stage = Stage.world
        if error is not None and not isinstance(error, Killed):
            stage.violate("X", f"the keeper of {self.child.name} ended with {error!r}")
        if self.child.alive and not self.closing:
            stage.note("keeper is started again", self.child.name)
            stage.spawn(self.child, self._start, delay=0.2)

    def _hang_up(self) -> None:
        # The pipe is closed by the kernel; the keeper notices a moment later.
        self.inner.inbox.put(None)

    def send(self, message: dict[str, Any]) -> None:
        if self.child.alive and self.process.alive:
            self.inner.inbox.put(json.loads(json.dumps(message)))

    def hear(self, text: str) -> None:
        message = json.loads(text)
        self._lost.update((i, a) for i, a in message["lost"])
        self._cancelled.update((i, a) for i, a in message["cancelled"])

    def hold(self, keys: Any, progress_s: float, limit_s: float) -> int:
        if not self.child.alive:
            return 0
        self.groups += 1
        self.held[self.groups] = {"op": "hold", "group": self.groups, "jobs": list(keys), "progress_s": progress_s, "limit_s": limit_s}
        self.send(self.held[self.groups])
        return self.groups

    def settle(self, group: int) -> None:
        self.send({"op": "settle", "group": group})

    def drop(self, group: int) -> None:
        if not self.child.alive:
            return
        keys = self.held.pop(group)["jobs"]
        self._lost.difference_update(keys)
        self._cancelled.difference_update(keys)
        self.send({"op": "drop", "group": group})

    def progress(self, key: Any, fraction: float | None, message: str) -> None:
        now = Stage.world.now
        if now - self._last.get(key, 0.0) >= 0.5:
            self._last[key] = now
            self.send({"op": "beat", "job": key, "fraction": fraction, "message": message})

    def models(self, names: Any, device: str | None = None) -> None:
        pass

    def gone(self, key: Any) -> bool:
        return key in self._cancelled or key in self._lost

    def lost(self, key: Any) -> bool:
        return key in self._lost

    def close(self) -> None:
        self.closing = True
        self.send({"op": "bye"})


class _Pipe:
    """Standard output of whichever keeper speaks."""

    @staticmethod
    def write(text: str) -> None:
        here = Stage.world.here()
        here.child.hear(text)  # type: ignore[union-attr]

    @staticmethod
    def flush() -> None:
        pass


def _kill_child(pid: int, signal: int) -> None:
    for process in Stage.world.processes:
        if process.number == pid:
            process.kill("its keeper")


class _NoThread:
    def __init__(self, **_: Any) -> None:
        pass

    def start(self) -> None:
        pass


# --- worker -------------------------------------------------------------------------------------------------


class _Drain:
    def __init__(self, process: Process) -> None:
        self.process = process

    def exists(self) -> bool:
        return self.process.draining


class Crew:
    """Workers and timers that a supervisor starts again when they end.

    Args:
        stage: The world.
        settings: The factory's settings.
    """

    def __init__(self, stage: World, settings: Settings) -> None:
        self.stage, self.settings = stage, settings
        self.n: Counter[str] = Counter()
        self.workers: list[Process] = []
        self.timers: list[Process] = []
        self.timer_gaps: list[tuple[float, float]] = []
        stage.strike = self.strike  # type: ignore[method-assign]
        stage.halt = self.halt  # type: ignore[method-assign]

    def strike(self, process: Process) -> None:
        """Kill a process; a worker's child sometimes with its keeper, so that only the lease tells."""
        self.stage.injected[f"{process.role} killed"] += 1
        if process.role == "worker":
            keeper = getattr(process, "keeper", None)
            if keeper and self.stage.rng.random() < 0.5:
                keeper.process.kill("the whole tree is killed")
        process.kill("by chance")

    def halt(self, process: Process, long: bool = False) -> None:
        seconds = self.stage.rng.choice((1.0, 5.0, LEASE_S + 8, LEASE_S + 20)[2 * long :])
        keeper = getattr(process, "keeper", None)
        if process.role == "worker" and keeper and (long or self.stage.rng.random() < 0.8):
            keeper.process.freeze(seconds)
        self.stage.injected[f"{process.role} frozen {'past' if seconds > LEASE_S else 'within'} the lease"] += 1
        process.freeze(seconds)

    def worker(self, queues: list[str], delay: float = 0.0) -> None:
        self.n["worker"] += 1
        process = self.stage.process(f"worker{self.n['worker']}", "worker")
        process.fragile = True
        self.workers.append(process)
        started = []

        def again(error: BaseException | None = None) -> None:
            if started:
                return
            started.append(True)
            if error is not None and not isinstance(error, Killed):
                self.stage.violate("X", f"{process.name} ended with {error!r}")
            if not self.stage.facts["over"]:
                self.worker(queues, delay=self.stage.rng.uniform(0.5, 8 if self.stage.chaos else 1))

        def ended(error: BaseException | None) -> None:
            if process.alive:  # it stopped in order
                process.died_at = self.stage.now
            again(error)

        process.on_death.append(again)
        self.stage.spawn(process, partial(self._work, process, queues), delay=delay, then=ended)

    def _work(self, process: Process, queues: list[str]) -> None:
        stage = self.stage
        os.environ["FACTORY_WORKER_NAME"], os.environ["FACTORY_WORKER_QUEUES"] = process.name, ",".join(queues)
        executor = Executor(self.settings, SimDatabase(stage, process), SimStore(stage), SimPublisher(stage))
        executor.goes_beside = True  # as on PostgreSQL
        executor._drain = _Drain(process)  # type: ignore[assignment]
        executor.stay_s = stage.rng.choice((0.0, executor.stay_s, 120.0))
        executor.quick_s = 120.0  # jobs take seconds here
        stage.facts["executor", executor.worker] = process
        stage.injected["worker clock wrong" if process.skew else "worker clock right"] += 1
        while not process.draining:
            hint = stage.broker.pop(queues, process)
            if hint is None:
                break
            stage.step("popped")
            stage.note("hint", process.name, [i[-4:] for i in hint.ids])
            try:
                executor.run(hint.kind, hint.ids)
            except FactoryError as error:
                stage.note("hint failed", process.name, error.code, error.message)
            except Exception as error:
                # Celery would log it and go on.
                stage.violate("X", f"unexpected {type(error).__name__} in {process.name}: {str(error)[:300]}")
        executor.close()

    def timer(self, delay: float = 0.0) -> None:
        self.n["timer"] += 1
        process = self.stage.process(f"timer{self.n['timer']}", "timer")
        process.fragile = True
        self.timers.append(process)
        started = []

        def again(error: BaseException | None = None) -> None:
            if started:
                return
            started.append(True)
            if error is not None and not isinstance(error, Killed):
                self.stage.violate("X", f"{process.name} ended with {error!r}")
            if not self.stage.facts["over"]:
                wait = self.stage.rng.choice((1.0, 5.0, LEASE_S + 10)) if self.stage.chaos else 1.0
                self.timer_gaps.append((self.stage.now, self.stage.now + wait))
                self.timer(delay=wait)

        process.on_death.append(again)

        class Stop:
            def is_set(self) -> bool:
                return not process.alive

            def wait(self, seconds: float) -> None:
                Stage.world.sleep(seconds)

        def work() -> None:
            database, store, publisher = SimDatabase(self.stage, process), SimStore(self.stage), SimPublisher(self.stage)
            timer = Timer(self.settings, database, publisher, Producer(self.settings, database, store, publisher))
            timer.run(Stop())  # type: ignore[arg-type]

        self.stage.spawn(process, work, delay=delay, then=again)

    def drain(self, process: Process) -> None:
        """SIGTERM: finish what is under way, then end."""
        if process.alive and not process.draining:
            self.stage.note("drains", process.name)
            process.draining = True
            self.stage.wake(self.stage.broker)
            # A worker that waits for a hint ends at once; the prefetch is one and unacknowledged.
            self.stage.spawn(self.stage.process(f"{process.name}/stop", "stop"), partial(self._grace, process), delay=20)

    def _grace(self, process: Process) -> None:
        if process.alive:
            process.kill("the grace is over")

    def thaw(self) -> None:
        """The end of the chaos: everything may live and work again."""
        stage = self.stage
        stage.chaos = False
        stage.db_down_until = stage.store_down_until = stage.broker.down_until = 0.0
        for process in stage.processes:
            process.cut_until = 0.0
        stage.wake(stage.broker)


# --- users --------------------------------------------------------------------------------------------------


def line_of(number: int, custom_id: str, kind_name: str, params: dict[str, Any], parents: tuple[str, ...], seed: int) -> JobLine:
    """A line of a manifest as it is after its check."""
    spec = specs.get_kind(kind_name)
    parsed = spec.validate(params)
    refs = tuple(ref for _, ref in specs.iter_refs(parsed))
    return JobLine(number, 0, custom_id, spec.name, parsed, parents, refs, 0, seed, {}, (), spec)


class SimManifest:
    def __init__(self, name: str, lines: list[JobLine]) -> None:
        self.name, self.path, self.lines = name, Path(f"{name}.jsonl"), lines


class _Report:
    files, spool = (), None

    def raise_for_errors(self, shown: int = 0) -> None:
        pass


class User:
    """Somebody who uses the front door, gives up never and remembers each answer.

    Args:
        stage: The world.
        settings: The factory's settings.
        project: Name of the project.
    """

    def __init__(self, stage: World, settings: Settings, project: str) -> None:
        self.stage, self.settings, self.project = stage, settings, project
        self.process = stage.process(f"user-{project}", "user")
        self.jobs: list[str] = []
        self.batches: list[str] = []
        self.keys: dict[str, str | None] = {}
        self.requests = 0

    def ask(self, request: Callable[[Producer], Any], tries: int = 60) -> Any:
        """Send a request to a server process that may die over it; again until there is an answer."""
        stage = self.stage
        for _ in range(tries):
            self.requests += 1
            server = stage.process(f"api-{self.project}{self.requests}", "api")
            server.fragile = True
            answer: list[Any] = []

            def serve(server: Process = server, answer: list[Any] = answer) -> None:
                database, store, publisher = SimDatabase(stage, server), SimStore(stage), SimPublisher(stage)
                made = Producer(self.settings, database, store, publisher)
                answer.append(request(made))

            done: list[BaseException | None] = []

            def then(error: BaseException | None, done: list[Any] = done) -> None:
                done.append(error)
                stage.wake(done)

            stage.spawn(server, serve, then=then)
            while not done:
                stage.park(done, 200)
            error = done[0]
            if server.alive:
                server.died_at = stage.now
            if error is None:
                return answer[0]
            if isinstance(error, NotFound | Conflict):
                return None
            if not isinstance(error, Killed | FactoryError):
                stage.violate("X", f"a request was answered with {type(error).__name__}: {str(error)[:300]}")
                return None
            if isinstance(error, FactoryError) and not error.retryable:
                stage.violate("X", f"a request was refused: {error.message}")
                return None
            stage.sleep(stage.rng.uniform(0.2, 3))
        return None

    def submit(self, key: str | None, kind_name: str, params: dict[str, Any], **fields: Any) -> str | None:
        if key:
            self.keys[key] = None
        made = self.ask(partial(_submit, kind_name, params, self.project, key, fields), tries=60 if key else 1)
        if made:
            self.jobs.append(made)
            if key:
                self.keys[key] = made
        return made  # type: ignore[no-any-return]

    def batch(self, name: str, lines: list[JobLine]) -> str | None:
        manifest = SimManifest(name, lines)
        found = self.ask(lambda p: p.create_batch(manifest, project=self.project, report=_Report()))
        if found:
            self.batches.append(found[0])
        return found[0] if found else None

    def write(self, work: Callable[[Any], Any]) -> Any:
        """An operator's change in the ledger."""
        return self.ask(lambda p: p.database.run(work))


def _submit(kind_name: str, params: dict[str, Any], project: str, key: str | None, fields: dict[str, Any], producer_: Producer) -> str:
    return producer_.submit(kind_name, params, project=project, idempotency_key=key, **fields)


# --- everything that is replaced ----------------------------------------------------------------------------


class _Counter:
    @property
    def hex(self) -> str:
        Stage.world.facts["uuid"] += 1
        return f"{Stage.world.facts['uuid']:08x}"


def _wait(futures: Any) -> None:
    for future in futures:
        future.settled()


def _new_id(prefix: str) -> str:
    return Stage.world.new_id(prefix)


def _lines(manifest: SimManifest) -> list[JobLine]:
    return manifest.lines


@contextmanager
def installed() -> Iterator[None]:
    """Put the world under the real code, for as long as histories are played."""
    log = SimLog()
    places: list[tuple[Any, str, Any]] = [
        (db.session, "time", SimTime), (db.session, "random", SimRandom), (db.lifecycle, "random", SimRandom),
        (db.lifecycle, "new_id", _new_id), (db.projects, "new_id", _new_id), (db.registry, "new_id", _new_id),
        (producer.enqueue, "new_id", _new_id), (producer.enqueue, "time", SimTime), (producer.enqueue, "log", log),
        (producer.expand, "EXPAND_ROWS", 4), (producer.expand, "time", SimTime), (producer.expand, "log", log),
        (producer.retry, "new_id", _new_id), (producer.enqueue, "manifests", namespace(producer.enqueue.manifests, lines=_lines)),
        (producer.dispatch, "log", log), (producer.timer, "log", log), (producer.timer, "time", SimTime),
        (producer.timer, "QUEUES", ("text", "train")),
        (producer.timer, "threading", namespace(__import__("threading"), Thread=SimThread)),
        (producer.sweep, "log", log),
        (worker.execution, "log", log), (worker.execution, "time", SimTime), (worker.execution, "ThreadPoolExecutor", SimPool),
        (worker.execution, "wait", _wait),
        (worker.execution, "threading", namespace(__import__("threading"), BoundedSemaphore=SimSemaphore)),
        (worker.execution, "Keeper", SimKeeper), (worker.execution, "open_tracer", lambda service: None),
        (worker.execution, "os", namespace(os, getpid=lambda: 1)), (worker.execution, "uuid", namespace(__import__("uuid"), uuid4=_Counter)),
        (worker.execution, "socket", namespace(__import__("socket"), gethostname=lambda: "sim")),
        (worker.meter, "time", SimTime), (worker.meter, "threading", namespace(__import__("threading"), Lock=SimLock)),
        (worker.keeper, "log", log), (worker.keeper, "time", SimTime), (worker.keeper, "LOAD_ALLOWANCE_S", 4.0),
        (worker.keeper, "threading", namespace(__import__("threading"), Thread=_NoThread)),
        (worker.keeper, "sys", namespace(__import__("sys"), stdout=_Pipe)),
        (worker.keeper, "os", namespace(os, kill=_kill_child)),
        # Nothing here has tensors to give back, and the collector has its own times (`Simulation.play`).
        (worker.memory, "release", lambda error=None: None),
    ]  # fmt: skip
    kept = {name: os.environ.get(name) for name in ("FACTORY_WORKER_NAME", "FACTORY_WORKER_QUEUES")}
    try:
        with replaced(*places), sim_kinds():
            yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


"""A world of one thread in which every process of the factory is a greenlet: clock, broker, store and database under control.

The code that runs in it is the real one (`Executor`, keeper, `Timer`, `Producer`, `Dispatcher`, every function and every
statement of `db.lifecycle` on SQLite). Only what it stands on is replaced: time, threads, the broker, the network to database
and store. One seed decides everything that happens, so a history can be played again.
"""

import heapq
import random
import sqlite3
import types
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

import greenlet
from sqlalchemy import create_engine, event
from sqlalchemy.pool import StaticPool

from contentfactory.errors import ServiceUnavailable, StorageError
from contentfactory.fastjson import dumps_ascii, loads
from db import session
from db.models import Base
from db.session import Database
from producer import publish
from storage.memory import MemoryStore

EPOCH = 1_700_000_000.0
DAY = 86_400.0


class Killed(BaseException):
    """SIGKILL: nothing of the process runs any more. Every fake refuses a dead process, so unwinding has no effect."""


class Process:
    """Something that can die, freeze, lose its network and have a wrong clock."""

    def __init__(self, world: "World", name: str, role: str) -> None:
        self.world, self.name, self.role, self.number = world, name, role, len(world.processes)
        self.skew = world.pick_skew()
        self.boot = world.now - world.rng.uniform(0, 1000)
        self.died_at: float | None = None
        self.frozen_until = 0.0
        self.cut_until = 0.0
        self.draining = False
        self.fragile = False
        self.tasks: list[Task] = []
        self.bad: list[tuple[float, float]] = []
        """Spans in which it could not do its work: frozen or cut off."""
        self.still: list[tuple[float, float]] = []
        """Those of them in which it was frozen."""
        self.on_death: list[Callable[[], None]] = []

    @property
    def alive(self) -> bool:
        return self.died_at is None

    def kill(self, why: str) -> None:
        """Kill it at this very moment. Where the one who asks is the victim, the call does not return."""
        if not self.alive:
            return
        self.died_at = self.world.now
        self.world.note("killed", self.name, why)
        for task in self.tasks:
            if task.greenlet and task is not self.world.current:
                self.world.push(self.world.now, task)
        for told in self.on_death:
            told()
        if self.world.current is not None and self.world.current.process is self:
            raise Killed

    def freeze(self, seconds: float) -> None:
        """Stop it (SIGSTOP) for so long."""
        if self.alive:
            self.world.note("frozen", self.name, round(seconds, 2))
            self.frozen_until = max(self.frozen_until, self.world.now + seconds)
            self.bad.append((self.world.now, self.frozen_until))
            self.still.append((self.world.now, self.frozen_until))

    def cut(self, seconds: float) -> None:
        """Cut it off from the database for so long."""
        if self.alive:
            self.world.note("cut off", self.name, round(seconds, 2))
            self.cut_until = max(self.cut_until, self.world.now + seconds)
            self.bad.append((self.world.now, self.cut_until))

    def hindered(self, start: float, end: float) -> bool:
        """Whether anything kept it from its work in this span."""
        return (self.died_at is not None and self.died_at <= end) or any(a <= end and b >= start for a, b in self.bad)


class Task:
    """One thread of a process."""

    def __init__(self, world: "World", process: Process, work: Callable[[], Any], then: Callable[[BaseException | None], None] | None) -> None:
        self.process = process
        self.error: BaseException | None = None
        self.turn = 0

        def body() -> None:
            try:
                if not process.alive:
                    raise Killed
                work()
            except Killed as error:
                self.error = error
            except Exception as error:
                self.error = error
            self.greenlet = None
            process.tasks.remove(self)
            if then:
                then(self.error)

        self.greenlet: greenlet.greenlet | None = greenlet.greenlet(body, world.main)
        process.tasks.append(self)


class World:
    """Clock, scheduler and services of one history.

    Args:
        seed: Decides everything.
        ledger: The in-memory database that histories share one after another.
    """

    def __init__(self, seed: int, ledger: "Ledger") -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = EPOCH
        self.main = greenlet.getcurrent()
        self.current: Task | None = None
        self.log: list[tuple[Any, ...]] = []
        self.violations: list[str] = []
        self.chaos = True
        self.skewed = False
        self.rates: dict[str, float] = defaultdict(float)
        self.processes: list[Process] = []
        self.in_transaction = False
        self.db_down_until = 0.0
        self.outages: list[tuple[float, float]] = []
        self.store_down_until = 0.0
        self.broker = Broker(self)
        self.store_shift = 0.0
        self.objects = MemoryStore(clock=lambda: self.now + self.store_shift)
        self.injected: Counter[str] = Counter()
        """Faults that really happened, by name."""
        self.unsent: dict[Task, tuple[str, ...]] = {}
        """Jobs whose hints a dispatcher has just failed to send: it must put them back before it commits anything else."""
        self.ledger = ledger
        self.facts: dict[str, Any] = defaultdict(int)
        self.quiet: Callable[[], bool] = lambda: False
        self._heap: list[tuple[float, int, int, Task]] = []
        self._parked: dict[int, list[Task]] = defaultdict(list)
        self._n = 0
        self._ids = 0
        self._until = 0.0
        ledger.reset(self)

    # --- time and tasks ---

    def pick_skew(self) -> float:
        return self.rng.choice((-DAY, -3600.0, 0.0, 3600.0, DAY)) if self.skewed else 0.0

    def process(self, name: str, role: str) -> Process:
        made = Process(self, name, role)
        self.processes.append(made)
        return made

    def spawn(self, process: Process, work: Callable[[], Any], *, delay: float = 0.0,
              then: Callable[[BaseException | None], None] | None = None) -> Task:  # fmt: skip
        task = Task(self, process, work, then)
        self.push(self.now + delay, task)
        return task

    def push(self, at: float, task: Task) -> None:
        self._n += 1
        heapq.heappush(self._heap, (at, self._n, task.turn, task))

    def sleep(self, seconds: float) -> None:
        """Let others run; come back after so many seconds, later if frozen meanwhile."""
        task = self.current
        if task is None:
            self.now += seconds
            return
        if self.in_transaction:
            raise RuntimeError("a transaction must not wait: on SQLite it holds the write lock")
        if not task.process.alive:
            raise Killed
        at = self.now + seconds
        if at < self._until and task.process.frozen_until <= at and (not self._heap or self._heap[0][0] > at):
            # Nobody else has anything to do until then: the clock alone moves on.
            self.now = at
            return
        self.push(at, task)
        self.main.switch()
        if not task.process.alive:
            raise Killed

    def park(self, where: Any, seconds: float | None = None) -> None:
        """Wait until `wake` is called for ``where``, at most so many seconds."""
        task = self.current
        if task is None or self.in_transaction:
            raise RuntimeError("only a task outside a transaction can wait")
        self._parked[id(where)].append(task)
        if seconds is not None:
            self.push(self.now + seconds, task)
        self.main.switch()
        if task in self._parked[id(where)]:
            self._parked[id(where)].remove(task)
        if not task.process.alive:
            raise Killed

    def wake(self, where: Any) -> None:
        for task in self._parked.pop(id(where), ()):
            if task.greenlet:
                self.push(self.now, task)

    def run(self, until: float) -> bool:
        """Play until everything is quiet (True) or the clock reaches ``until`` (False)."""
        heap = self._heap
        self._until = until
        while heap:
            at, _, turn, task = heapq.heappop(heap)
            if task.greenlet is None or turn != task.turn:
                continue  # it was woken earlier for another reason
            if at > until:
                self.push(at, task)
                self.now = until
                return False
            if task.process.alive and task.process.frozen_until > at:
                self.push(task.process.frozen_until, task)
                continue
            self.now = max(self.now, at)
            self.current = task
            task.turn += 1
            task.greenlet.switch()
            self.current = None
            if self.quiet():
                return True
        return False

    def close(self) -> None:
        """End what still runs, without effect."""
        for process in self.processes:
            process.died_at = process.died_at if process.died_at is not None else self.now
        for process in self.processes:
            for task in list(process.tasks):
                if task.greenlet:
                    self.current = task
                    task.greenlet.throw(Killed)
        self.current = None

    # --- what may happen at any step ---

    def step(self, what: str) -> None:
        """A moment between two effects of a process: others may run, and it may die or freeze here."""
        process = self.current.process if self.current else None
        if process is None:
            return
        if not process.alive:
            raise Killed
        if self.chaos and process.fragile:
            luck = self.rng.random()
            if luck < self.rates["kill"]:
                self.injected["kill"] += 1
                self.note("dies at", process.name, what)
                self.strike(process)
            elif luck < self.rates["kill"] + self.rates["freeze"]:
                self.injected["freeze"] += 1
                self.halt(process)
            elif what in ("put", "after put", "write") and process.role == "worker" and self.happens("late"):
                # It has computed and comes back when another attempt is under way or done.
                self.halt(process, long=True)
        self.sleep(self.rng.random() * 0.03)

    strike: Callable[[Process], None]
    halt: Callable[..., None]

    def happens(self, fault: str) -> bool:
        """Whether this fault happens now."""
        if self.chaos and self.rates[fault] > 0 and self.rng.random() < self.rates[fault]:
            self.injected[fault] += 1
            return True
        return False

    def note(self, *words: Any) -> None:
        self.log.append((round(self.now - EPOCH, 3), *words))

    def violate(self, invariant: str, text: str) -> None:
        self.violations.append(f"{invariant}: {text}")
        self.note("VIOLATION", invariant, text)

    def new_id(self, prefix: str) -> str:
        self._ids += 1
        return f"{prefix}_{int((self.now - EPOCH) * 1000):012x}{self._ids:020x}"

    def here(self) -> Process | None:
        return self.current.process if self.current else None


# --- database -----------------------------------------------------------------------------------------------

_LOG = """
CREATE TABLE sim_log (n INTEGER PRIMARY KEY, at REAL, actor TEXT, what TEXT, id TEXT, old TEXT, new TEXT, attempt INTEGER,
                      owner TEXT, cancel INTEGER, strikes INTEGER, note TEXT);
CREATE TRIGGER sim_job_new AFTER INSERT ON jobs BEGIN
  INSERT INTO sim_log (at, actor, what, id, old, new, attempt, cancel, strikes)
  VALUES (sim_now(), sim_actor(), 'job', new.id, NULL, new.state, new.attempt, new.cancel_requested, new.strikes);
END;
CREATE TRIGGER sim_job AFTER UPDATE OF state, attempt, cancel_requested ON jobs
WHEN old.state <> new.state OR old.attempt <> new.attempt OR old.cancel_requested <> new.cancel_requested BEGIN
  INSERT INTO sim_log (at, actor, what, id, old, new, attempt, owner, cancel, strikes, note)
  VALUES (sim_now(), sim_actor(), 'job', new.id, old.state, new.state, new.attempt, coalesce(old.lease_owner, new.lease_owner),
          new.cancel_requested, new.strikes,
          CASE WHEN new.state = 'running' AND old.state <> 'running' THEN
            coalesce((SELECT 'batch ' || state || CASE WHEN paused THEN ' paused' ELSE '' END FROM batches WHERE id = new.batch_id), '')
            || CASE WHEN (SELECT paused FROM projects WHERE id = new.project_id) THEN ' project paused' ELSE '' END
            || CASE WHEN (SELECT paused FROM queues WHERE name = new.queue) THEN ' queue paused' ELSE '' END
            || CASE WHEN EXISTS (SELECT 1 FROM job_dependencies d LEFT JOIN jobs p ON p.id = d.parent_id
                                 WHERE d.job_id = new.id AND coalesce(p.state, '') <> 'succeeded') THEN ' parent open' ELSE '' END
          WHEN old.state = 'running' AND new.state <> 'running' THEN json_extract(new.error, '$.message') END);
END;
CREATE TRIGGER sim_artifact_new AFTER INSERT ON artifacts BEGIN
  INSERT INTO sim_log (at, actor, what, id, old, new, attempt, owner, note)
  VALUES (sim_now(), sim_actor(), 'artifact', new.job_id, new.name, new.object_key, new.attempt,
          (SELECT lease_owner FROM jobs WHERE id = new.job_id),
          (SELECT state || ' ' || attempt FROM jobs WHERE id = new.job_id));
END;
CREATE TRIGGER sim_batch AFTER UPDATE OF state, finished_at ON batches
WHEN old.state <> new.state OR old.finished_at IS NOT new.finished_at BEGIN
  INSERT INTO sim_log (at, actor, what, id, old, new, note)
  VALUES (sim_now(), sim_actor(), 'batch', new.id, old.state, new.state, CASE WHEN old.finished_at IS NULL THEN NULL ELSE 'finished' END);
END;
"""


class Ledger:
    """An in-memory SQLite that histories use one after another; its clock is the world's.

    The production statement asks ``julianday('now')``; on this one connection that function is ours.
    """

    def __init__(self) -> None:
        self.world: World | None = None
        self.engine = create_engine("sqlite://", poolclass=StaticPool, json_serializer=dumps_ascii, json_deserializer=loads, connect_args={"check_same_thread": False, "cached_statements": 1024})
        event.listen(self.engine, "connect", self._connect)
        # Transactions are begun and ended by `transaction`, without SQLAlchemy's own bookkeeping of them.
        self.connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self.raw: sqlite3.Connection = self.connection.connection.driver_connection  # type: ignore[assignment]
        Base.metadata.create_all(self.connection)
        self.raw.executescript(_LOG)
        self.tables = [name for (name,) in self.raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        self.seen = 0

    def _connect(self, connection: Any, record: Any) -> None:
        connection.isolation_level = None
        # Said to be deterministic, so that SQLite asks once a statement and not once a row; its own clock stands still as long.
        connection.create_function("julianday", 1, lambda what: (self._now() / DAY) + 2440587.5, deterministic=True)
        connection.create_function("sim_now", 0, self._now)
        connection.create_function("sim_actor", 0, lambda: self._actor())

    def _now(self) -> float:
        return self.world.now if self.world else EPOCH

    def _actor(self) -> str:
        here = self.world.here() if self.world else None
        return here.name if here else "-"

    def reset(self, world: World) -> None:
        """Empty every table for the next history."""
        self.world = world
        self.raw.execute("PRAGMA foreign_keys=OFF")
        for table in self.tables:
            self.raw.execute(f"DELETE FROM {table}")
        self.raw.execute("PRAGMA foreign_keys=ON")
        self.seen = 0

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """A transaction as `Database.write` makes it: undone where the block ends with an exception."""
        self.raw.execute("BEGIN IMMEDIATE")
        try:
            yield self.connection
        except BaseException:
            self.raw.execute("ROLLBACK")
            raise
        self.raw.execute("COMMIT")

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Look without a transaction of the factory's."""
        return self.raw.execute(sql, values).fetchall()

    def close(self) -> None:
        self.connection.close()
        self.engine.dispose()


class SimDatabase(Database):
    """A process's own way to the shared ledger, with everything that may go wrong on it."""

    def __init__(self, world: World, process: Process) -> None:
        self.world, self.process, self.sqlite, self.engine = world, process, True, world.ledger.engine
        self._faults = session.faults(self.engine)

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[Any]:
        world = self.world
        self._reach("write")
        died = False
        try:
            with self._mapped(), world.ledger.transaction() as connection:
                world.in_transaction = True
                yield connection
                if world.happens("abort"):
                    world.note("commit fails", self.process.name)
                    raise ServiceUnavailable("the connection was lost before the commit", code="database_unavailable")
                if self.process.fragile and world.happens("kill"):
                    died = True
                    raise Killed
        except Killed:
            world.in_transaction = False
            if died:
                world.note("dies before the commit", self.process.name)
                world.strike(self.process)
            raise
        finally:
            world.in_transaction = False
        self._committed()
        if world.happens("unknown"):
            world.note("commit's answer is lost", self.process.name)
            raise ServiceUnavailable("the connection was lost during the commit", code="database_unavailable")
        world.step("after commit")

    @contextmanager
    def read(self) -> Iterator[Any]:
        self._reach("read")
        try:
            with self._mapped(), self.world.ledger.transaction() as connection:
                self.world.in_transaction = True
                yield connection
        finally:
            self.world.in_transaction = False

    def _reach(self, what: str) -> None:
        world, process = self.world, self.process
        if world.in_transaction:
            raise RuntimeError("transactions must not be nested")
        world.step(what)
        if world.db_down_until > world.now or process.cut_until > world.now:
            # Whoever could not put its unsent jobs back leaves them to the rescue of lost hints.
            world.unsent.pop(world.current, None)  # type: ignore[arg-type]
            # A refused connection answers at once, a cut one after its time-out.
            world.sleep(world.rng.choice((0.05, 1.0)))
            raise ServiceUnavailable("the database does not answer", code="database_unavailable")

    def _committed(self) -> None:
        """What must hold after every single commit."""
        world, ledger = self.world, self.world.ledger
        for job in world.unsent.pop(world.current, ()):  # type: ignore[arg-type]
            if ledger.rows("SELECT 1 FROM jobs WHERE id = ? AND state = 'dispatched' AND dispatched_at <= ?", job, world.now - 0.001):
                world.violate("I13", f"{job} stays dispatched although its hint could not be sent")
        for n, actor, what, job, name, key, attempt, owner, note in ledger.rows(
            "SELECT n, actor, what, id, old, new, attempt, owner, note FROM sim_log WHERE n > ? ORDER BY n", ledger.seen
        ):
            ledger.seen = n
            if what != "artifact":
                continue
            if key is not None and world.objects.head(key) is None:
                world.violate("I5", f"{job}: artifact {name} was committed before its object was stored")
            if note is not None and not note.endswith(f" {attempt}"):
                world.violate("I4", f"{job}: attempt {attempt} wrote artifact {name} while the job was {note}")
            holder = world.facts.get(("executor", owner))
            if holder is not None and holder.name != actor:
                world.violate("I4", f"{job}: {actor} wrote artifact {name} while {holder.name} held the job")

    def close(self) -> None:
        pass


# --- broker -------------------------------------------------------------------------------------------------


class Broker:
    """Lists of hints by queue and band, with a memory for what a restored snapshot would bring back."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lists: dict[tuple[str, int], deque[Any]] = defaultdict(deque)
        self.down_until = 0.0
        self.past: list[tuple[str, int, Any]] = []
        self.faithful = True
        """Whether no hint was ever doubled, reordered or sent without the sender's knowledge."""

    def push(self, hint: Any) -> None:
        band = publish.band(hint)
        self.past.append((hint.queue, band, hint))
        if self.world.happens("lose"):
            self.world.note("hint lost", hint.ids)
            return
        self.lists[hint.queue, band].append(hint)
        if self.world.happens("double"):
            self.faithful = False
            for _ in range(self.world.rng.randint(1, 3)):
                self.lists[hint.queue, band].append(hint)
        if self.world.happens("reorder"):
            self.faithful = False
            mixed = list(self.lists[hint.queue, band])
            self.world.rng.shuffle(mixed)
            self.lists[hint.queue, band] = deque(mixed)
        self.world.wake(self)

    def pop(self, queues: list[str], process: Process) -> Any:
        """The next hint of these queues, waited for; None where the one who waits shall stop."""
        while not process.draining:
            if self.down_until <= self.world.now:
                for band in publish.BANDS:
                    for queue in self.world.rng.sample(queues, len(queues)):
                        if self.lists[queue, band]:
                            return self.lists[queue, band].popleft()
                self.world.park(self)
            else:
                self.world.sleep(self.down_until - self.world.now + 0.01)
        return None

    def flush(self) -> None:
        self.world.note("FLUSHALL")
        self.lists.clear()

    def restore(self) -> None:
        """An old snapshot comes back: hints of long ago wait again."""
        if self.past:
            self.faithful = False
            for queue, band, hint in self.world.rng.sample(self.past, min(len(self.past), 5)):
                self.lists[queue, band].append(hint)
            self.world.note("old hints are back")
            self.world.wake(self)

    def waiting(self) -> list[Any]:
        return [hint for hints in self.lists.values() for hint in hints]


class SimPublisher:
    """`producer.publish.Publisher` on the world's broker."""

    def __init__(self, world: World) -> None:
        self.world, self.broker = world, world.broker

    def send(self, hints: Any) -> list[Any]:
        sent = 0
        for hint in hints:
            self.world.step("send")
            if self.broker.down_until > self.world.now:
                break
            self.broker.push(hint)
            if self.world.happens("send_unknown"):
                self.broker.faithful = False
                break
            sent += 1
        if sent < len(hints) and self.world.current:
            self.world.unsent[self.world.current] = tuple(i for hint in hints[sent:] for i in hint.ids)
        return list(hints[sent:])

    def ended(self, job_ids: Any) -> None:
        self.world.step("ended")

    def oldest(self, queue: str) -> float | None:
        self.world.step("oldest")
        if self.broker.down_until > self.world.now:
            raise ServiceUnavailable("the broker does not answer", code="broker_unavailable")
        ends = [hints[0].dispatched_at for (name, _), hints in self.broker.lists.items() if name == queue and hints]
        return min(ends, default=None)

    def waiting(self, queue: str) -> int:
        return sum(len(hints) for (name, _), hints in self.broker.lists.items() if name == queue)

    def anything(self, queues: Any) -> bool:
        self.world.step("anything")
        if self.broker.down_until > self.world.now:
            raise ServiceUnavailable("the broker does not answer", code="broker_unavailable")
        return any(self.waiting(queue) for queue in queues)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


# --- store --------------------------------------------------------------------------------------------------


class SimStore:
    """The memory store behind a network that fails, hangs and loses answers."""

    def __init__(self, world: World) -> None:
        self.world, self.objects = world, world.objects

    def _reach(self, what: str) -> None:
        self.world.step(what)
        if self.world.store_down_until > self.world.now or self.world.happens("store"):
            self.world.sleep(self.world.rng.choice((0.0, 0.1, 3.0)))
            raise StorageError(f"{what}: the storage answered 503")

    def put(self, key: str, data: Any, **options: Any) -> Any:
        self._reach("put")
        stored = self.objects.put(key, data, **options)
        if self.world.happens("store_unknown"):
            self.world.note("put's answer is lost", key[-12:])
            raise StorageError("the connection was reset after the last byte")
        self.world.step("after put")
        return stored

    def get(self, key: str, **options: Any) -> bytes:
        self._reach("get")
        return self.objects.get(key, **options)

    def open(self, key: str, **options: Any) -> Any:
        self._reach("open")
        return self.objects.open(key, **options)

    def download(self, key: str, path: Any, **options: Any) -> None:
        self._reach("download")
        self.objects.download(key, path, **options)

    def head(self, key: str) -> Any:
        self._reach("head")
        return self.objects.head(key)

    def delete(self, keys: Any) -> int:
        keys = list(keys)
        if not keys:
            return 0
        self._reach("delete")
        for key in keys:
            for job, name in self.world.ledger.rows("SELECT job_id, name FROM artifacts WHERE object_key = ?", key):
                self.world.violate("I5", f"{job}: the object of artifact {name} was deleted")
        return self.objects.delete(keys)

    def list(self, prefix: str = "") -> Iterator[Any]:
        self._reach("list")
        return iter([*self.objects.list(prefix)])

    def sweep_temporary(self, older_than_s: float) -> int:
        return 0

    def close(self) -> None:
        pass


# --- threads, clocks and chance of the code under test ------------------------------------------------------


class Stage:
    """The world that the replaced modules speak of."""

    world: World


def world() -> World:
    return Stage.world


class SimTime:
    """Module ``time`` of a process: its wall clock may be a day wrong, its monotonic clock starts anywhere."""

    @staticmethod
    def time() -> float:
        here = Stage.world.here()
        return Stage.world.now + (here.skew if here else 0.0)

    @staticmethod
    def monotonic() -> float:
        here = Stage.world.here()
        return Stage.world.now - (here.boot if here else 0.0)

    @staticmethod
    def sleep(seconds: float) -> None:
        Stage.world.sleep(seconds)


class SimRandom:
    """Module ``random``."""

    @staticmethod
    def uniform(a: float, b: float) -> float:
        return Stage.world.rng.uniform(a, b)


class SimLog:
    """A logger that writes into the history."""

    def bind(self, **_: Any) -> "SimLog":
        return self

    def debug(self, *_: Any, **__: Any) -> None:
        pass

    def info(self, name: str, **data: Any) -> None:
        here = Stage.world.here()
        Stage.world.note("log", here.name if here else "-", name, data.get("job"), data.get("error"), data.get("succeeded"))

    def exception(self, name: str, **data: Any) -> None:
        import sys
        import traceback

        Stage.world.violate("X", f"{name}: unexpected {traceback.format_exception(sys.exc_info()[1])[-1].strip()[:300]}")

    warning = error = info


class SimFuture(Future):  # type: ignore[type-arg]
    """A future that is waited for in the world's time."""

    def settled(self) -> None:
        while not self.done():
            Stage.world.park(self)

    def result(self, timeout: float | None = None) -> Any:
        if Stage.world.in_transaction and not self.done():
            raise TimeoutError  # nothing else happens within a transaction here: it would be waited for in vain
        self.settled()
        return super().result(0)


class SimPool:
    """`ThreadPoolExecutor` of tasks."""

    def __init__(self, size: int, thread_name_prefix: str = "") -> None:
        here = Stage.world.here()
        assert here is not None
        self.process, self.size, self.busy = here, size, 0
        self.queue: deque[Any] = deque()

    def submit(self, work: Callable[..., Any], *args: Any) -> SimFuture:
        future = SimFuture()
        self.queue.append((future, work, args))
        self._next()
        return future

    def _next(self) -> None:
        if self.busy >= self.size or not self.queue:
            return
        self.busy += 1
        future, work, args = self.queue.popleft()

        def body() -> None:
            try:
                value = work(*args)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(value)

        def then(error: BaseException | None) -> None:
            self.busy -= 1
            Stage.world.wake(future)
            Stage.world.wake(self)
            if self.process.alive:
                self._next()

        Stage.world.spawn(self.process, body, then=then)

    def shutdown(self, wait: bool = True) -> None:
        while self.busy or self.queue:
            Stage.world.park(self)


class SimThread:
    """`threading.Thread` of a process, as a task."""

    def __init__(self, target: Callable[[], Any], name: str = "", daemon: bool = False) -> None:
        self.target, self.task = target, None

    def start(self) -> None:
        here = Stage.world.here()
        assert here is not None
        self.task = Stage.world.spawn(here, self.target)

    def is_alive(self) -> bool:
        return self.task is not None and self.task.greenlet is not None


class SimSemaphore:
    """`threading.BoundedSemaphore` of tasks."""

    def __init__(self, value: int) -> None:
        self.value = value

    def acquire(self) -> None:
        while self.value <= 0:
            Stage.world.park(self)
        self.value -= 1

    def release(self) -> None:
        self.value += 1
        Stage.world.wake(self)


class SimLock(SimSemaphore):
    """`threading.Lock` of tasks."""

    def __init__(self) -> None:
        super().__init__(1)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()


class SimQueue:
    """`queue.Queue` of a keeper's messages; who waits on it sometimes wakes late, as on a busy machine."""

    def __init__(self) -> None:
        self.items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self.items.append(item)
        Stage.world.wake(self)

    def get(self, timeout: float) -> Any:
        import queue

        if not self.items:
            Stage.world.park(self, timeout * Stage.world.rng.uniform(4, 8))
        if not self.items:
            raise queue.Empty
        return self.items.popleft()


def namespace(module: Any, **instead: Any) -> Any:
    """A module with some names replaced."""
    return types.SimpleNamespace(**{**{n: getattr(module, n) for n in dir(module) if not n.startswith("__")}, **instead})


@contextmanager
def replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes of modules or classes and put the old ones back."""
    old = [(thing, name, getattr(thing, name)) for thing, name, _ in places]
    try:
        for thing, name, value in places:
            setattr(thing, name, value)
        yield
    finally:
        for thing, name, value in reversed(old):
            with suppress(AttributeError):
                setattr(thing, name, value)

"""The keeper: a process of its own that renews a worker's leases, so that no model code can starve the heartbeat.

The worker's child starts it and talks to it by lines of JSON. It renews leases, notes progress, tells of cancelled and lost
jobs, ends a cancelled one whose micro-batch goes on, kills a child that makes no progress, and gives the jobs of a child that died
back at once, without waiting for their lease. ``python -m worker.keeper`` is its entry point; `Keeper` is the child's side of it.
"""

import fcntl
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import structlog

from contentfactory.errors import FactoryError, ServiceUnavailable
from contentfactory.fastjson import dumps_ids, loads
from contentfactory.process import collect_rarely
from contentfactory.settings import Settings
from worker.loading import LoadWatch, usage

log = structlog.get_logger(__name__)
Key = tuple[str, int]
Note = tuple[float | None, str | None]

_CANCELLED = {"type": "cancelled", "code": "cancelled", "message": "cancelled while it ran"}
LOAD_ALLOWANCE_S = 600.0
"""Silence allowed on top of the kind's limit until the first sign of progress: a model may have to be loaded or converted."""
STILL_S = 4.0
"""The keeper wakes twice a second; after so long a pause of its own, seconds, it does not hold that time against the runner."""
LOOK_S = 0.25
"""Shortest pause between two looks at what is silent, seconds: with thousands of short jobs a second messages come more often."""
REST_S = 0.02
"""How long the keeper lets messages come together after a few, seconds. Of a short job there are three within milliseconds, and each would wake
this process while the job's own, the broker and the ledger want the cores."""
FEW_BYTES = 4096
"""What is more than this is read on: the child waits where the pipe is full."""
PIPE_BYTES = 2**20
"""Size of the pipe where the system lets it be chosen: what a micro-batch of the most jobs takes, five times."""
REPORT_S = 10.0
"""How often a worker about which nothing has changed reports itself; after 60 s without a report it counts as gone."""


class Keeper:
    """The child's side: starts the keeper process and keeps it running.

    Args:
        settings: Passed on to the process.
        worker: Id of this worker's child, the owner of its leases.
        queues: Queues that the worker serves, for its report.
        device: Its device, for its report.
    """

    def __init__(self, settings: Settings, worker: str, queues: Sequence[str], device: str) -> None:
        self._settings = settings
        self._hello = {"op": "hello", "worker": worker, "queues": list(queues), "device": device, "pid": os.getpid()}
        self._lock = threading.Lock()
        self._held: dict[int, dict[str, Any]] = {}  # by number of the micro-batch, the message that told of it
        self._numbers = itertools.count(1)
        self._lost: set[Key] = set()
        self._cancelled: set[Key] = set()
        self._last_beat: dict[Key, float] = {}
        self._last_word = 0.0
        self._models: dict[str, Any] | None = None  # what was last said of the loaded models
        self._closing = False
        self._process = self._start()
        threading.Thread(target=self._watch, name="keeper", daemon=True).start()

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.keeper"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            # Whoever sweeps a dead worker's processes away gives the keeper a moment to give its jobs back (producer.guard).
            env={**os.environ, **self._settings.environment(), "FACTORY_LINGER_S": "5"},
            # Ctrl-C reaches the whole foreground group: the keeper must outlive the child's last commit.
            start_new_session=False, preexec_fn=_ignore_interrupt,
        )  # fmt: skip
        with suppress(OSError, AttributeError):  # only Linux knows it
            fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # type: ignore[arg-type]
        _send(process, self._hello)
        for message in self._held.values():
            _send(process, message)
        if self._models:
            _send(process, self._models)
        return process

    def _watch(self) -> None:
        while True:
            process = self._process
            assert process.stdout is not None  # noqa: S101 - Popen was given a pipe
            for line in process.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue
                self._lost.update((i, a) for i, a in message.get("lost", ()))
                self._cancelled.update((i, a) for i, a in message.get("cancelled", ()))
            if self._closing:
                return
            log.warning("keeper_ended", action="restart", code=process.poll())
            time.sleep(0.2)
            with self._lock:
                self._process = self._start()

    def hold(self, keys: Sequence[Key], progress_s: float, limit_s: float) -> int:
        """Renew these jobs' leases from now on and watch their progress.

        Returns:
            Number of the micro-batch, by which it is settled and dropped.
        """
        with self._lock:
            group = next(self._numbers)
            self._held[group] = {"op": "hold", "group": group, "jobs": list(keys), "progress_s": progress_s, "limit_s": limit_s}
            _send(self._process, self._held[group])
        return group

    def settle(self, group: int) -> None:
        """The runner is done with these jobs: renew their leases until `drop`, but watch for progress no more."""
        with self._lock:
            _send(self._process, {"op": "settle", "group": group})

    def drop(self, group: int) -> None:
        """These jobs are finished here."""
        with self._lock:
            keys = self._held.pop(group)["jobs"]
            # Thousands of short jobs a second come by here, of which nobody has ever said anything.
            if self._last_beat:
                for key in keys:
                    self._last_beat.pop(key, None)
            for said in (self._lost, self._cancelled):
                if said:
                    said.difference_update(keys)
            _send(self._process, {"op": "drop", "group": group})

    def progress(self, key: Key, fraction: float | None, message: str) -> None:
        """Pass progress on, at most twice a second for each job; of one that is done only where its micro-batch was silent as long."""
        at = time.monotonic()
        if fraction is not None and fraction >= 1.0:
            last = 0.0 if message else self._last_word
        else:
            last = self._last_beat.get(key, 0.0)
        if at - last < 0.5:
            return
        self._last_beat[key] = self._last_word = at
        with self._lock:
            _send(self._process, {"op": "beat", "job": key, "fraction": fraction, "message": message})

    def models(self, names: Sequence[str], device: str | None = None) -> None:
        """Say which models are loaded, and on what make of device; nothing where that was said before."""
        message = {"op": "models", "names": list(names), "device": device}
        with self._lock:
            if message != self._models:
                self._models = message
                _send(self._process, message)

    def loading(self, model: str | None, limit_s: float) -> None:
        """Say that a model is being loaded and how long that may take, or (None) that it is done."""
        with self._lock:
            _send(self._process, {"op": "load", "model": model, "limit_s": limit_s})

    def gone(self, key: Key) -> bool:
        """Whether the job was cancelled or is held by another attempt."""
        return key in self._cancelled or key in self._lost

    def lost(self, key: Key) -> bool:
        """Whether another attempt holds the job."""
        return key in self._lost

    def close(self) -> None:
        """End the keeper; what is still held is given back without a strike."""
        self._closing = True
        with self._lock:
            _send(self._process, {"op": "bye"})
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _send(process: "subprocess.Popen[str]", message: dict[str, Any]) -> None:
    # Only a runner's own words may hold what the quick writer does not take.
    dumps = dumps_ids if message["op"] == "hold" else json.dumps
    try:
        assert process.stdin is not None  # noqa: S101 - Popen was given a pipe
        process.stdin.write(dumps(message) + "\n")
        process.stdin.flush()
    except (OSError, ValueError):
        pass  # it died; the watcher starts another and tells it everything again


@dataclass
class _Held:
    """A micro-batch. Its members share a forward pass: a sign of life of one is one of all."""

    jobs: Sequence[Any]
    """Pairs of id and attempt as they were told. Most micro-batches have ended before anybody asks which jobs they are."""
    progress_s: float
    limit_s: float
    started: float
    heard: float
    watched: bool = True
    spoke: bool = False

    @cached_property
    def keys(self) -> frozenset[Key]:
        return frozenset((str(i), int(a)) for i, a in self.jobs)


class _Keeper:
    """The process's side."""

    def __init__(self, settings: Settings) -> None:
        from db.session import Database

        self.settings = settings
        self.database = Database(settings.database(), pool_size=1)
        self.held: dict[int, _Held] = {}
        """By number of the micro-batch."""
        self.notes: dict[Key, Note] = {}
        """Progress that was told and is not written down yet."""
        self.told: set[Key] = set()
        self.worker = ""
        self.queues: list[str] = []
        self.device = "cpu"
        self.child = 0
        self.names: list[str] = []
        self.load: LoadWatch | None = None
        self.inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.looked_at = time.monotonic()
        self.watched_at = 0.0
        self.reported: list[Any] = []
        self.reported_at = 0.0

    def read(self) -> None:
        begun = b""
        while data := os.read(sys.stdin.fileno(), PIPE_BYTES):
            *lines, begun = (begun + data).split(b"\n")
            for line in lines:
                try:
                    self.inbox.put(loads(line))
                except ValueError:
                    continue
            if len(data) < FEW_BYTES:
                time.sleep(REST_S)
        self.inbox.put(None)

    def run(self) -> None:
        threading.Thread(target=self.read, daemon=True).start()
        period = self.settings.lease_s / 3
        next_beat = 0.0
        said_bye = False
        while True:
            try:
                message = self.inbox.get(timeout=max(0.05, min(0.5, next_beat - time.monotonic())))
            except queue.Empty:
                message = {}
            if message is None:
                break
            if message:
                said_bye = said_bye or self.take(message)
                if said_bye:
                    break
                if message.get("op") == "hello":
                    next_beat = 0.0
            if time.monotonic() - self.watched_at >= LOOK_S:
                self.watch()
            else:
                self.awake()
            if time.monotonic() >= next_beat:
                # Cancels are looked for more often than leases need renewing: who cancels, waits for it.
                next_beat = time.monotonic() + min(period, 2.0)
                self.beat()
        self.end(said_bye)

    def take(self, message: dict[str, Any]) -> bool:
        op, at = message.get("op"), time.monotonic()
        if op == "hello":
            self.worker, self.queues = message["worker"], message["queues"]
            self.device, self.child = message["device"], message["pid"]
        elif op == "hold":
            self.held[message["group"]] = _Held(message["jobs"], message["progress_s"], message["limit_s"], at, at)
        elif op == "settle":
            if (held := self.held.get(message["group"])) is not None:
                held.watched = False
        elif op == "drop":
            held = self.held.pop(message["group"], None)
            if held is not None and (self.notes or self.told):
                for key in held.keys:
                    self.notes.pop(key, None)
                self.told -= held.keys
        elif op == "beat":
            key = (message["job"][0], message["job"][1])
            if (held := self._of(key)) is not None:
                self.notes[key] = (message["fraction"], message["message"])
                held.heard, held.spoke = at, True
        elif op == "models":
            self.names, self.device = message["names"], message.get("device") or self.device
        elif op == "load":
            name = message["model"]
            self.load = LoadWatch(name, message["limit_s"], lambda: usage(self.child)) if name else None
        return op == "bye"

    def _of(self, key: Key) -> _Held | None:
        """The micro-batch that a job is in."""
        return next((held for held in self.held.values() if key in held.keys), None)

    def _keys(self) -> list[Key]:
        return [key for held in self.held.values() for key in held.keys]

    def beat(self) -> None:
        from db import lifecycle

        told, self.notes = self.notes, {}
        notes = {key: told.get(key, (None, None)) for key in self._keys()}
        report = [self.worker, self.queues, self.device, len(notes), self.names]
        fresh = report == self.reported and time.monotonic() - self.reported_at < REPORT_S
        if fresh and not notes:
            return
        try:
            with self.database.write() as conn:
                answer = lifecycle.heartbeat(conn, notes, self.settings.lease_s) if notes else None
                if not fresh:
                    lifecycle.report_worker(conn, *report)
        except ServiceUnavailable as error:
            # Nobody said 'not yours': the work goes on, and the reaper waits a lease after such an outage.
            self.notes = told
            log.warning("heartbeat_failed", action="beat", error=error.message)
            return
        if not fresh:
            self.reported, self.reported_at = report, time.monotonic()
        if answer is None:
            return
        overdue = answer.cancelled & self.told
        lost, cancelled = answer.lost - self.told, answer.cancelled - self.told
        if lost or cancelled:
            self.told |= lost | cancelled
            sys.stdout.write(json.dumps({"lost": sorted(lost), "cancelled": sorted(cancelled)}) + "\n")
            sys.stdout.flush()
        if overdue:
            # The child was told a beat ago and the job still runs: it shares a micro-batch that goes on, or its runner does not
            # look. Whoever cancelled it need not wait for that; the child's commit will find the job ended and leave it so. Not in
            # the heartbeat's own transaction: that holds rows which the commit may want, and no lease shall lapse over a deadlock.
            self._ledger(lambda conn: [lifecycle.stop(conn, lifecycle.Stop(i, a, _CANCELLED)) for i, a in sorted(overdue)])
        # What is lost or has ended is watched on: its runner may hang, and then nobody else would ever free this worker.

    def awake(self) -> float:
        """Note that this process runs; returns its clock."""
        at = time.monotonic()
        missed, self.looked_at = at - self.looked_at, at
        if missed > STILL_S:
            # This process stood still too (a machine that was suspended, a group that was stopped, a ledger waited for): nobody can say
            # that the runner was silent meanwhile.
            for held in self.held.values():
                held.heard += missed
                held.started += missed
        return at

    def watch(self) -> None:
        """Kill the child if a runner went silent, or ran longer than its kind allows."""
        at = self.watched_at = self.awake()
        reason = self.load.stuck() if self.load else None
        if reason:
            self.give_up_load(reason)
            return
        for held in self.held.values():
            if not held.watched:
                continue
            silence = held.progress_s + (0.0 if held.spoke else LOAD_ALLOWANCE_S)
            if at - held.heard > silence:
                self.kill(held, f"no progress for {at - held.heard:.0f} s (limit {silence:.0f} s)")
                return
            if at - held.started > held.limit_s + LOAD_ALLOWANCE_S:
                self.kill(held, f"ran for {at - held.started:.0f} s (limit {held.limit_s:.0f} s)")
                return

    def give_up_load(self, reason: str) -> None:
        """Kill a child whose model load hangs; what it still uploads is given back without a strike."""
        from db import lifecycle

        log.error("load_hung", action="kill", worker=self.worker, reason=reason)
        self.load = None
        try:
            os.kill(self.child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        held, self.held = self._keys(), {}
        self._ledger(lambda conn: lifecycle.crash(conn, held, reason, released=True))

    def kill(self, held: _Held, reason: str) -> None:
        from db import lifecycle

        log.error("worker_hung", action="kill", worker=self.worker, reason=reason, jobs=len(held.keys))
        others = [key for key in self._keys() if key not in held.keys]
        try:
            os.kill(self.child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        error = {"type": "deadline", "code": "no_progress", "message": reason}

        def work(conn: Any) -> None:
            for job_id, attempt in sorted(held.keys):
                lifecycle.stop(conn, lifecycle.Stop(job_id, attempt, error))
            lifecycle.crash(conn, others, "a neighbour hung the worker", released=True)

        self._ledger(work)
        self.held.clear()

    def end(self, said_bye: bool) -> None:
        """The child has gone: give its jobs back now instead of after their lease."""
        from db import lifecycle

        held, self.held = list(self.held.values()), {}
        reason = "the worker stopped" if said_bye else f"the worker {self.worker} died"
        computing = any(own.watched for own in held)
        # While one job computes, the end of the process is not laid to those that only wait for their upload.
        blamed = [key for own in held for key in own.keys if own.watched or not computing or len(own.jobs) > 1]
        waited = [key for own in held for key in own.keys if computing and not own.watched and len(own.jobs) == 1]

        def work(conn: Any) -> None:
            lifecycle.crash(conn, blamed, reason, released=said_bye)
            lifecycle.crash(conn, waited, f"a neighbour ended {self.worker}", released=True)
            lifecycle.forget_worker(conn, self.worker)

        self._ledger(work)
        self.database.close()

    def _ledger(self, work: Any) -> None:
        try:
            self.database.run(work)
        except FactoryError as error:
            log.error("release_failed", action="release", error=error.message)  # the reaper will do it


def main() -> None:
    """Entry point of the keeper process."""
    from contentfactory.jobs.spec import load_kinds
    from contentfactory.settings import load_settings
    from producer.logs import configure_logs

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A stop signal to the group reaches the child too; the keeper ends when the child closes the pipe.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = load_settings()
    configure_logs(settings)
    load_kinds()
    keeper = _Keeper(settings)
    # Names of jobs come and go by the hundred: looked through at the usual pace, they cost a half of this process.
    collect_rarely()
    keeper.run()


if __name__ == "__main__":
    main()

"""The life of a micro-batch in a worker: claim, inputs, runner, upload, one fenced commit."""

import errno
import hashlib
import json
import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from contentfactory.errors import (
    FactoryError,
    InputError,
    JobCancelled,
    LeaseLost,
    ServiceUnavailable,
    TransientError,
)
from contentfactory.jobs.spec import KindSpec, OutputRef, get_kind, put_at
from contentfactory.settings import Settings
from contentfactory.states import JobState, Priority
from db import counters, jobs, lifecycle, limits, retention
from db.ended import NewArtifact
from db.lifecycle import Claimed, Stop, Success
from db.session import Database
from db.waiting import Front
from producer.dispatch import Dispatcher
from producer.models import find
from producer.publish import Publisher
from producer.services import open_store
from producer.tracing import Attempted, open_tracer
from storage.keys import artifact_key, suffix_for
from storage.local import LocalStore
from worker import confined, failpoints, memory
from worker.context import Failure, InputFile, JobContext, NewModel, Output
from worker.drain import drain_file
from worker.engines.files import ResolvedModel
from worker.inputs import Inputs, Resolved
from worker.keeper import Keeper
from worker.meter import GroupMeter
from worker.models import ModelCache
from worker.resolve import resolve_model
from worker.runners import get_runner
from worker.scratch import Scratch
from worker.warmup import WarmUp

log = structlog.get_logger(__name__)
T = TypeVar("T")
_LOCAL_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO})

KEEP_CHECKPOINTS = 2
COMMIT_PATIENCE_S = 900.0
"""How long finished work waits for a ledger that is away, seconds; a worker that is told to stop waits no longer."""
INSTANT_BYTES = 65_536
"""Outputs up to this size are looked up among those that were just stored before they are put."""
BESIDE_S = 0.1
"""How long the transaction of a job that somebody waits for stays open for its uploads, seconds."""
APART_S = 60.0
"""How long uploads are waited for before the transaction begins, after one that took longer than that or went wrong, seconds."""
LOOK_REST_S = 0.15
"""Micro-batches that take less than this share looks at what the broker lacks: far less than it takes to work off half of what it may hold."""
STAY_S = 5.0
"""How long a worker goes on with micro-batches of the same kind without going back to the broker between them: the share of all work that
hints carry is small then, and a worker that is told to stop does so soon enough."""
QUICK_S = 1.0
"""It does so while a micro-batch takes no longer than this: longer ones are shared among workers by whoever dispatches them."""
LOOK_WHOLE_S = 1.0
"""How often it looks at the whole queue meanwhile, and not from where it took the last one."""
PENDING_GROUPS = 2
"""Micro-batches that may be encoded, uploaded and committed while the next one computes."""


def pick_device(wanted: str) -> str:
    """The device to compute on.

    Args:
        wanted: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(slots=True)
class _Upload:
    """An output on its way into the store."""

    ends: "Future[NewArtifact]"
    artifact: NewArtifact | None = None
    """What it comes to, where that is known before it is there."""


class _StillUploading(Exception):
    """A commit that would have come before its objects: it was given up, nothing is written."""


@dataclass(eq=False, slots=True)
class _Member:
    """One job of a micro-batch on its way through the worker."""

    claimed: Claimed
    resolved: Resolved | None = None
    result_key: str | None = None
    outputs: list["_Upload | NewArtifact"] = field(default_factory=list)
    models: list[NewModel] = field(default_factory=list)
    followers: list["_Member"] = field(default_factory=list)
    error: FactoryError | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.claimed.id, self.claimed.attempt

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits for it at this moment."""
        return self.claimed.priority >= Priority.INTERACTIVE


class Executor:
    """Runs micro-batches in one worker child.

    Args:
        settings: The worker's settings.
        database: The ledger; opened from the settings where left out (so for the next three).
        store: Object storage.
        publisher: Broker.
        keeper: Whether to start a keeper process; tests of a single attempt may do without.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database | None = None,
        store: Any = None,
        publisher: Publisher | None = None,
        keeper: bool = True,
    ) -> None:
        # Before torch and numpy come in: they size their pools on import.
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.torch_threads))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.settings = settings
        self.database = database or Database(settings.database())
        self.store = store or open_store(settings)
        publisher = publisher or Publisher(settings)
        self.dispatcher = Dispatcher(self.database, publisher, settings)
        self.inputs = Inputs(settings, self.database, self.store)
        name = os.environ.get("FACTORY_WORKER_NAME", "worker")
        self.worker = f"{socket.gethostname()}/{name}/{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.queues = [q for q in os.environ.get("FACTORY_WORKER_QUEUES", "").split(",") if q]
        self._device: str | None = settings.device if settings.device != "auto" else None
        self.cache = ModelCache(limit_mb=float(os.environ.get("FACTORY_WORKER_CACHE_MB", settings.model_cache_mb)))
        memory.device_name("cpu")  # looked up while there is a handle to do it with
        self.meter = GroupMeter(self.database, lambda: memory.device_name(self._device or "auto"))
        self.keeper = Keeper(settings, self.worker, self.queues, settings.device) if keeper else None
        self.warmup = WarmUp(self.database, self.cache, self._model, lambda: self.device, self.keeper, self._all_there)
        self.tracer = open_tracer("worker")
        self.uploads = ThreadPoolExecutor(settings.upload_threads, thread_name_prefix="upload")
        self.finishers = ThreadPoolExecutor(1, thread_name_prefix="finish")
        self._finishing: Future[None] | None = None
        """The micro-batch that was last handed to them."""
        self._slots = threading.BoundedSemaphore(PENDING_GROUPS)
        self._drain = drain_file(settings)
        self._drain_seen = 0.0
        self._looked_at = -1e9
        self.stay_s, self.quick_s = STAY_S, QUICK_S
        self._stays = False
        """Whether more is taken after this micro-batch: room on the broker is then left alone."""
        self._fronts: dict[str, Front] = {}
        """Where the queue of each project begins, since it last looked at the whole queue."""
        self._looked_whole_at = 0.0
        self._draining = False
        self._models: dict[str, ResolvedModel] = {}
        self._flying: set[str] = set()
        self._unsure: set[str] = set()  # named by a claim that was not answered; whether it took effect, the next one asks
        self._uncleared: list[Scratch] = []
        self.goes_beside = not self.database.sqlite
        """Whether a commit's statements may go while its outputs are uploaded. On SQLite they take a fraction of what the upload does, and nobody
        else could write meanwhile."""
        self._puts_at_once = not self.goes_beside and isinstance(self.store, LocalStore)
        """Whether what somebody waits for is put as soon as it is made: a folder takes it in less time than another thread would to wake for it, if
        the commit has to wait for that anyway."""
        self._beside_after = 0.0
        # Objects that this process put a moment ago, with the time: equal outputs (an empty text, a silence) are put once. The
        # sweep takes nothing that is younger than its window, so a fraction of that is safe.
        self._put: dict[tuple[str, str, str], tuple[str, float]] = {}
        self._put_s = min(60.0, settings.sweep_window_s / 4)

    @property
    def device(self) -> str:
        """The device, looked up when the first runner needs it."""
        if self._device is None:
            self._device = pick_device(self.settings.device)
        return self._device

    def run(self, kind: str, ids: Sequence[str]) -> None:
        """Claim these jobs and do what could be claimed, and more of their like while that is quick (`_take`).

        Returns when the runner is done; the commit may still be under way.
        """
        begun = self._looked_whole_at = time.monotonic()
        self._fronts.clear()
        if not self.warmup.ready(kind, ids):
            return
        failpoints.reached(failpoints.BEFORE_CLAIM)
        claimed = self._claim(kind, ids)
        if not claimed:
            log.debug("nothing_to_claim", action="claim", kind=kind, jobs=len(ids))
            return
        spec = get_kind(kind)
        try:
            while claimed:
                quick = self._run_group(spec, [_Member(c) for c in claimed])
                claimed = self._take(spec, claimed[0].model, begun) if quick else []
        finally:
            stayed, self._stays = self._stays, False
        failpoints.reached(failpoints.BEFORE_ACK)
        if stayed:
            self._dispatch()

    def _claim(self, kind: str, ids: Sequence[str]) -> list[Claimed]:
        """Claim the jobs that a hint names; those that are ours now."""
        tried = False

        def work(conn: Any) -> list[Claimed]:
            nonlocal tried
            # The answer to a commit may be lost: what an earlier try took is ours, though nobody told us.
            mine = [i for i in ids if i not in self._flying]
            taken = lifecycle.claimed_by(conn, mine, self.worker) if tried or not self._unsure.isdisjoint(mine) else []
            tried = True
            if stray := self._unsure - self._flying - set(ids):
                held = [(c.id, c.attempt) for c in lifecycle.claimed_by(conn, sorted(stray), self.worker)]
                lifecycle.crash(conn, held, "the answer to its claim was lost", released=True)
            return taken + lifecycle.claim(conn, ids, self.worker, self.settings.lease_s, kind)

        try:
            # Of one job there is only the claim itself: what may follow, where it was not to be had, may as well be missing.
            claimed = self.database.run(work, whole=len(ids) > 1 or bool(self._unsure), durable=False)
        except ServiceUnavailable as error:
            # Perhaps nothing was claimed; the next claim finds out. If none comes, the lease will expire.
            self._unsure.update(ids)
            log.warning("claim_failed", action="claim", kind=kind, jobs=len(ids), error=error.message)
            return []
        self._unsure.clear()
        self._flying.update(c.id for c in claimed)
        return claimed

    def _take(self, spec: KindSpec, model: str | None, begun: float) -> list[Claimed]:
        """The next micro-batch of the same kind and model, without a hint: none is needed where nobody else is to be served first.

        For jobs so short that their hints would cost as much as they do. Nothing once ``stay_s`` have passed, while anything waits on the
        broker, or while this worker drains.

        Args:
            spec: The kind that was just run.
            model: The model version that it used.
            begun: When the first of these micro-batches began.
        """
        if self._should_release():
            return []
        if time.monotonic() - begun > self.stay_s:
            self._stays = True  # until now: it goes, and sees to it that there are hints
            return []
        named: list[str] = []

        def work(conn: Any) -> list[Claimed]:
            if named:
                # The answer to a commit may be lost: what an earlier try took is ours, though nobody told us.
                if taken := lifecycle.claimed_by(conn, named, self.worker):
                    return taken
                self._fronts.clear()  # they are behind what was not taken after all
            return lifecycle.take(conn, spec.queue, spec.name, model, self.worker, self.settings.lease_s, named=named, fronts=self._fronts)

        try:
            if self.dispatcher.publisher.anything(self.queues or [spec.queue]):
                return []
            self._stays = True
            if time.monotonic() - self._looked_whole_at > LOOK_WHOLE_S:
                self._fronts.clear()
                self._looked_whole_at = time.monotonic()
            failpoints.reached(failpoints.BEFORE_CLAIM)
            claimed = self.database.run(work, durable=False)
        except ServiceUnavailable as error:
            self._unsure.update(named)  # the next claim finds out
            log.warning("claim_failed", action="take", kind=spec.name, jobs=len(named), error=error.message)
            return []
        self._flying.update(c.id for c in claimed)
        self._unsure.update(set(named) - self._flying)  # of a try whose answer was lost, and that was not there when asked for
        return claimed

    def _run_group(self, spec: KindSpec, members: list[_Member]) -> bool:
        """Run the micro-batch up to its commit, which goes on beside the next one.

        Returns:
            Whether this worker looks for the next one by itself (`_take`), because this one was quick.
        """
        started = time.monotonic()
        keys = [m.key for m in members]
        limit = spec.time_limit_s * len(members)
        group = self.keeper.hold(keys, spec.progress_s, limit) if self.keeper else 0
        first = members[0].claimed
        bound = log.bind(kind=spec.name, queue=spec.queue, jobs=len(members), job=first.id, attempt=first.attempt)
        # The process's number tells the sweep whether whoever made the folder still lives.
        scratch = Scratch(self.settings.scratch / f"{spec.name}-{os.getpid()}-{uuid.uuid4().hex[:12]}")
        reused: dict[_Member, Success] = {}
        phases: dict[str, float] = {"wait_s": max(0.0, first.started_at - (first.dispatched_at or first.created_at))}
        # A job that is tried again may be the one that ends processes: nothing else is in this one meanwhile, so that it
        # alone can be blamed, and alone suffers.
        alone = len(members) == 1 and first.attempt > 1
        if alone:
            self.finishers.submit(lambda: None).result()
        self._slots.acquire()
        try:
            loads = self.cache.loads
            try:
                ready = self._prepare(spec, members)
                reused.update(self._reuse(spec, ready))
                work = self._share([m for m in ready if m not in reused])
                phases["inputs_s"] = time.monotonic() - started
                # Jobs that share a forward pass share a model version: it is part of what they are grouped by. A forged
                # hint may still mix them.
                by_model: dict[str | None, list[_Member]] = {}
                for member in work:
                    by_model.setdefault(member.claimed.model, []).append(member)
                for n, piece in enumerate(p for part in by_model.values() for p in self.meter.pieces(spec, part)):
                    with self.meter.measure(spec, piece, self.cache):
                        self._compute(spec, piece, scratch if len(piece) == len(work) else scratch.part(n))
            except Exception as error:
                # A full disk, a ledger that went away: the jobs are told so, and the error's class decides.
                problem = classify(error)
                for member in members:
                    if member not in reused and not member.outputs and not member.models:
                        member.error = member.error or problem
            phases["compute_s"] = time.monotonic() - started - phases.setdefault("inputs_s", time.monotonic() - started)
            phases["model_loads"] = self.cache.loads - loads
            if self.keeper:
                self.keeper.settle(group)
                self.keeper.models(self.cache.keys, memory.device_name(self._device or "auto"))
        except BaseException:
            self._slots.release()
            self._clear(scratch)
            if self.keeper:
                self.keeper.drop(group)  # the leases run out and somebody else takes over
            self._flying.difference_update(i for i, _ in keys)
            raise
        # One that came alone had no company when it left: its commit shall have this process and the ledger to itself.
        quick = len(members) > 1 and time.monotonic() - started <= self.quick_s
        seconds = time.monotonic() - started
        computed = partial(bound.info, "computed", action="compute", seconds=round(seconds, 3), reused=len(reused))
        finish = partial(self._finish, spec, members, reused, scratch, phases, started, group, quick)
        waited_for = len(members) == 1 and members[0].waited_for
        if waited_for and (self._finishing is None or self._finishing.done()):
            # Somebody waits for that one: no other thread need wake for it, and what Celery does between two jobs comes after it.
            finish(computed)
            return quick
        self._finishing = self.finishers.submit(finish)
        computed()
        if alone or waited_for:
            wait([self._finishing])
        return quick

    def _clear(self, scratch: Scratch) -> None:
        """Remove a scratch folder, and those that could not be removed before: that takes handles, and there may be none left."""
        self._uncleared = [folder for folder in (*self._uncleared, scratch) if not folder.remove()]

    # --- before the runner ---

    def _prepare(self, spec: KindSpec, members: Sequence[_Member]) -> list[_Member]:
        ready = []
        for member in members:
            try:
                params = spec.validate(member.claimed.params)
                if member.claimed.model and "@" not in member.claimed.model:
                    # Named before it was trained: now its version is known.
                    with self.database.read() as conn:
                        pinned = find(conn, member.claimed.project_id, member.claimed.model)
                    member.claimed = replace(member.claimed, model=pinned.key)
                member.resolved = self.inputs.resolve(member.claimed, params)
            except Exception as error:
                member.error = classify(error)
                continue
            if member.claimed.reuse and spec.cacheable:
                member.result_key = result_key(spec, member.claimed, member.resolved)
            ready.append(member)
        return ready

    def _reuse(self, spec: KindSpec, members: Sequence[_Member]) -> dict[_Member, Success]:
        """Members whose result is already there, with that result."""
        wanted = {m.result_key: m.claimed.project_id for m in members if m.result_key}
        if not wanted:
            return {}
        found: dict[str, str] = {}
        with self.database.read() as conn:
            for project_id in set(wanted.values()):
                found.update(jobs.succeeded_with(conn, project_id, [k for k, p in wanted.items() if p == project_id and k]))
            artifacts = jobs.artifacts(conn, list(found.values()), ("output", "model", "sample")) if found else {}
        out: dict[_Member, Success] = {}
        for member in members:
            source = found.get(member.result_key or "")
            rows = artifacts.get(source or "", [])
            if source is None or not rows:
                continue
            copies = tuple(
                NewArtifact(
                    r["name"], r["object_key"], r["sha256"], r["size"], r["media_type"], r["role"], dict(r["meta"] or {}),
                    r["seed"], r["model"], tuple(r["parents"] or ()),
                )
                for r in rows
            )  # fmt: skip
            out[member] = Success(member.claimed.id, member.claimed.attempt, copies, (), member.result_key, source, claimed=member.claimed)
        return out

    def _all_there(self, kind: str, ids: Sequence[str]) -> bool:
        """Whether all of these jobs will take earlier equal results, as those of a manifest that was handed in again do."""
        spec = get_kind(kind)
        if not spec.cacheable:
            return False
        with self.database.read() as conn:
            members = [_Member(job) for job in lifecycle.unclaimed(conn, ids, kind)]
        if len(members) < len(ids) or not all(member.claimed.reuse for member in members):
            return False
        return len(self._reuse(spec, self._prepare(spec, members))) == len(members)

    def _share(self, members: Sequence[_Member]) -> list[_Member]:
        """Equal jobs of one micro-batch are computed once: the first leads, the others follow."""
        leaders: dict[str, _Member] = {}
        work = []
        for member in members:
            leader = leaders.get(member.result_key or "") if member.result_key else None
            if leader is None:
                work.append(member)
                if member.result_key:
                    leaders[member.result_key] = member
            else:
                leader.followers.append(member)
        return work

    # --- the runner ---

    def _compute(self, spec: KindSpec, members: list[_Member], scratch: Scratch) -> None:
        try:
            models = {}
            if members[0].claimed.model:
                models["model"] = self._model(members[0].claimed.project_id, members[0].claimed.model)
            runner = get_runner(spec.name)
        except Exception as error:
            for member in members:
                member.error = classify(error)
            return
        context = self._context(spec, members, scratch, models)
        params = [m.resolved.params for m in members if m.resolved]
        try:
            for item in runner(params, context):
                member = members[item.job]
                if isinstance(item, Failure):
                    member.error = classify(item.error)
                elif isinstance(item, NewModel):
                    member.models.append(item)
                else:
                    member.outputs.append(self._begin_upload(member, item))
        except Exception as error:
            problem = classify(error)
            if problem.error_class == "resource":
                # The next jobs must find a clean process: no models, no tensors in the frames of the failed pass.
                self.cache.clear()
                memory.release()  # `classify` took the frames from the error
            for index, member in enumerate(members):
                if member.error is not None:
                    continue
                if isinstance(error, JobCancelled) and not context.cancelled(index):
                    # A neighbour was cancelled and took the shared loop down: this one is given back without a strike.
                    member.error = FactoryError("a neighbour in the micro-batch was cancelled", code="released")
                    member.error.error_class = "released"
                else:
                    member.error = problem
        for member in members:
            if member.error is None and not member.outputs and not member.models:
                member.error = FactoryError(f"the runner of {spec.name} yielded nothing for this job", code="no_output")

    def _context(self, spec: KindSpec, members: list[_Member], scratch: Scratch, models: dict[str, ResolvedModel]) -> JobContext:
        keeper = self.keeper
        project_id = members[0].claimed.project_id

        def fetch(job: int, value: "str | OutputRef") -> InputFile:
            resolved = members[job].resolved
            if resolved is None:
                raise InputError("the job's inputs were not resolved")
            return self.inputs.fetch(value, resolved, scratch() / "inputs")

        def report(job: int, fraction: float | None, message: str, metrics: dict[str, float] | None) -> None:
            if keeper:
                keeper.progress(members[job].key, fraction, message)
            if metrics:
                claimed = members[job].claimed
                data = {"attempt": claimed.attempt, "fraction": fraction, "metrics": metrics}
                try:
                    with self.database.write() as conn:
                        lifecycle.add_event(
                            conn, "job.metrics", project_id=claimed.project_id, batch_id=claimed.batch_id, job_id=claimed.id, data=data
                        )
                except ServiceUnavailable:
                    pass  # a point of a curve is not worth the work of an attempt

        def publish(output: Output) -> None:
            member = members[output.job]
            artifact = self._upload(member.claimed, output, member.resolved, role=_published_role(output.name))

            def work(conn: Any) -> list[str] | None:
                if not lifecycle.publish(conn, member.claimed.id, member.claimed.attempt, artifact):
                    return None
                if artifact.role != "checkpoint":
                    return []
                rows = jobs.artifacts(conn, [member.claimed.id], ("checkpoint",)).get(member.claimed.id, [])
                return [r["name"] for r in rows[:-KEEP_CHECKPOINTS]]

            old = self.database.run(work)
            if old is None:
                raise LeaseLost(f"another attempt holds job {member.claimed.id}")
            if old:
                self._forget(member.claimed, old)

        def checkpoints(job: int) -> list[InputFile]:
            claimed = members[job].claimed
            with self.database.read() as conn:
                rows = jobs.artifacts(conn, [claimed.id], ("checkpoint",)).get(claimed.id, [])
            found = []
            for row in reversed(rows):
                path = scratch() / "checkpoints" / row["name"]
                try:
                    self.store.download(row["object_key"], path, sha256=row["sha256"])
                except FactoryError as error:
                    log.warning("checkpoint_unreadable", action="resume", job=claimed.id, artifact=row["id"], error=error.message)
                    continue
                found.append(InputFile(path, row["media_type"], row["name"], dict(row["meta"] or {}), trusted=True))
            return found

        return JobContext(
            scratch=scratch,
            seeds=[m.claimed.seed for m in members],
            models=models,
            cache=self.cache,
            device=lambda: self.device,
            fetch=fetch,
            report=report,
            is_cancelled=(lambda job: keeper.gone(members[job].key)) if keeper else None,
            publish=publish,
            checkpoints=checkpoints,
            resolve_model=lambda name: self._model(project_id, name),
            should_release=self._should_release,
        )

    def _forget(self, claimed: Claimed, names: list[str]) -> None:
        """Delete old checkpoints. Another job may just have put the same bytes: they are marked like what the sweep deletes."""

        def work(conn: Any) -> list[str]:
            retention.hold(conn)
            orphans = lifecycle.drop_published(conn, claimed.id, claimed.attempt, names)
            return retention.doom(conn, orphans)

        orphans = self.database.run(work)
        if not orphans:
            return
        try:
            self.store.delete(orphans)
            self.database.run(lambda conn: retention.gone(conn, orphans))
        except FactoryError as error:
            log.warning("checkpoints_left", action="publish", job=claimed.id, error=error.message)  # the sweep will find them

    def _should_release(self) -> bool:
        at = time.monotonic()
        if not self._draining and at - self._drain_seen > 0.5:
            self._drain_seen = at
            self._draining = self._drain.exists()
        return self._draining

    def _model(self, project_id: str, name: str) -> ResolvedModel:
        if name in self._models:
            return self._models[name]
        model = resolve_model(self.settings, self.database, self.store, project_id, name)
        self._models[name] = model
        return model

    # --- after the runner ---

    def _begin_upload(self, member: _Member, output: Output) -> "_Upload | NewArtifact":
        """The artifact itself where the bytes lie in the store already, and there is nothing to wait for."""
        data, claimed, artifact = output.data, member.claimed, None
        if isinstance(data, bytes) and len(data) <= INSTANT_BYTES:
            sha256 = hashlib.sha256(data).hexdigest()
            key, at = self._put.get((claimed.project_id, sha256, output.media_type), ("", -1e9))
            artifact = _artifact(claimed, output, member.resolved, key or _key(claimed, output, sha256), sha256, len(data), "output")
            if time.monotonic() - at < self._put_s:
                return artifact
        if artifact and member.waited_for and self._puts_at_once:
            ends: Future[NewArtifact] = Future()
            try:
                ends.set_result(self._upload(claimed, output, member.resolved))
            except Exception as error:
                ends.set_exception(error)
            return _Upload(ends, artifact)
        return _Upload(self.uploads.submit(self._upload, claimed, output, member.resolved), artifact)

    def _upload(self, claimed: Claimed, output: Output, resolved: Resolved | None, role: str = "output") -> NewArtifact:
        """Encode and store one output; returns its row. Runs in an upload thread."""
        data = output.data() if callable(output.data) else output.data
        if isinstance(data, Path):
            with open(data, "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            size = data.stat().st_size
        else:
            sha256, size = hashlib.sha256(data).hexdigest(), len(data)
        key = _key(claimed, output, sha256)
        began = time.monotonic()
        for left in reversed(range(3)):
            try:
                self.store.put(key, data, media_type=output.media_type, sha256=sha256, size=size)
                break
            except FactoryError as error:
                if not left or not error.retryable:
                    raise
                time.sleep(0.2 * (3 - left))
        failpoints.reached(failpoints.AFTER_PUT)
        if size <= INSTANT_BYTES:
            if len(self._put) > 1000:
                self._put.clear()
            self._put[(claimed.project_id, sha256, output.media_type)] = (key, began)
        return _artifact(claimed, output, resolved, key, sha256, size, role)

    def _finish(self, spec: KindSpec, members: Sequence[_Member], reused: Mapping[_Member, Success], scratch: Scratch,
                phases: dict[str, float], started: float, group: int, quick: bool, told: Callable[[], None] | None = None) -> None:  # fmt: skip
        """Wait for the uploads and commit the group; the next micro-batch computes meanwhile.

        Args:
            spec: The kind.
            members: The micro-batch.
            reused: Those that take earlier results.
            scratch: Its folder, which goes.
            phases: Seconds of each phase; more come.
            started: When it began, on the monotonic clock.
            group: Its number at the keeper.
            quick: Whether this worker takes the next one by itself.
            told: What is left to log of it, once it is committed.
        """
        keys = [m.key for m in members]
        try:
            begun = time.monotonic()
            learned = self.meter.due()
            known: dict[str, int] = {}
            stopped: dict[str, JobState | None] = {}

            def settle(beside: bool) -> list[str]:
                successes, stops = self._results(members, reused, phases, beside)
                phases["upload_s"] = time.monotonic() - begun  # what only then goes on is part of the commit
                return self._commit(partial(work, successes, stops, beside))

            def work(successes: list[Success], stops: list[Stop], beside: bool, conn: Any) -> list[str]:
                stopped.update({stop.job_id: lifecycle.stop(conn, stop) for stop in stops})
                published = lifecycle.finish(conn, successes, self.worker)
                known.update(limits.learn(conn, learned))
                failpoints.reached(failpoints.IN_COMMIT)
                if beside:
                    _uploaded(members[0])
                return published

            try:
                done = settle(self._goes_beside(members))
            except _StillUploading:
                self._beside_after = time.monotonic() + APART_S
                done = settle(beside=False)
            self.meter.told(learned, known)
            failpoints.reached(failpoints.AFTER_COMMIT)
            if self.tracer:
                self._trace(spec, members, phases, begun - started, {**stopped, **dict.fromkeys(done, JobState.SUCCEEDED)})
            waited_for = [m.claimed.id for m in members if m.waited_for]
            if waited_for:
                self.dispatcher.publisher.ended(waited_for)
            batch_ids = {m.claimed.batch_id for m in members if m.claimed.batch_id}
            if batch_ids:
                with self.database.read() as conn:
                    batch_ids = counters.all_ended(conn, batch_ids)
            if batch_ids:
                self.database.run(lambda conn: counters.close_batches(conn, batch_ids))
            if told:
                told()
            log.info(
                "committed", action="commit", kind=spec.name, queue=spec.queue, job=members[0].claimed.id, succeeded=len(done),
                stopped=len(stopped), reused=len(reused), seconds=round(time.monotonic() - started, 3),
            )  # fmt: skip
        except TransientError as error:
            # Nothing was committed; tell the ledger, which knows how often to try again.
            told = error.to_dict()
            stops = [Stop(m.claimed.id, m.claimed.attempt, told, phases, self.worker) for m in members]
            self._commit(lambda conn: [lifecycle.stop(conn, s) for s in stops])
            log.warning("commit_refused", action="commit", kind=spec.name, code=error.code)
        except ServiceUnavailable as error:
            # The leases run out and another attempt does it again; the objects already lie where that one will put them.
            log.error("commit_failed", action="commit", kind=spec.name, error=error.message)
        except Exception:
            log.exception("commit_failed", action="commit", kind=spec.name)
        finally:
            if self.keeper:
                self.keeper.drop(group)
            self._flying.difference_update(i for i, _ in keys)
            self._slots.release()
            self._clear(scratch)
        if not quick:
            # After a quick one this worker takes what there is once the broker is empty. Hints for the room it made would keep it from that for
            # as long as there are any: each micro-batch would pay for messages and two changes of state, and leave hints behind for the next.
            self._top_up(started)

    def _top_up(self, started: float) -> None:
        """Dispatch for the room that a commit made.

        Args:
            started: When the micro-batch began that was committed: where they follow upon each other quickly, one look serves several.
        """
        at = time.monotonic()
        if self._stays or (self._flying and at - min(started, self._looked_at) < LOOK_REST_S):
            return  # whoever stays takes what there is
        self._dispatch(patient=False)

    def _dispatch(self, *, patient: bool = True) -> None:
        """Dispatch what there is room for.

        Args:
            patient: Whether to wait for whoever has the turn: nobody else may come by for a while where workers stay and each takes for itself.
        """
        self._looked_at = time.monotonic()
        try:
            self.dispatcher.dispatch(top_up=True, patient=patient)
        except ServiceUnavailable:
            pass  # the timer will

    def _commit(self, work: Callable[[Any], T]) -> T:
        """Commit; while the ledger is away, wait for it. The work is done, and the fence says whether it still counts."""
        end = time.monotonic() + COMMIT_PATIENCE_S
        while True:
            try:
                return self.database.run(work, tries=8)
            except ServiceUnavailable as error:
                if time.monotonic() > end or self._should_release():
                    raise
                log.warning("commit_waits", action="commit", error=error.message)
                time.sleep(0.5)

    def _trace(
        self, spec: KindSpec, members: Sequence[_Member], phases: dict[str, float], uploads_at_s: float, states: Mapping[str, Any]
    ) -> None:
        """Tell the tracer how each job of the group fared; those of whom the commit said nothing were fenced."""
        for member in members:
            c = member.claimed
            if self.tracer and c.id in states:
                self.tracer.attempt(
                    Attempted(
                        c.id, spec.name, spec.queue, c.attempt, len(members), c.model, c.created_at, c.dispatched_at, c.started_at,
                        uploads_at_s, phases, states[c.id], member.error.code if member.error else None,
                    )
                )  # fmt: skip

    def _goes_beside(self, members: Sequence[_Member]) -> bool:
        """Whether the statements of this commit go while the outputs are uploaded: of one job that somebody waits for, and only small outputs."""
        one = members[0]
        return (
            self.goes_beside and len(members) == 1 and one.waited_for and not one.models and one.error is None
            and time.monotonic() > self._beside_after
            and any(isinstance(output, _Upload) for output in one.outputs)
            and all(isinstance(output, NewArtifact) or output.artifact for output in one.outputs)
        )  # fmt: skip

    def _results(
        self, members: Sequence[_Member], reused: Mapping[_Member, Success], phases: dict[str, float], beside: bool
    ) -> tuple[list[Success], list[Stop]]:
        """What the members came to, after their uploads or, for what goes ``beside`` them, before."""
        successes = [replace(r, phases=phases) for r in reused.values()]
        stops: list[Stop] = []
        led = {follower for member in members for follower in member.followers}
        for member in members:
            # A follower is settled with its leader.
            if member in reused or member in led or (member.error is None and member.resolved is None):
                continue
            self._collect(member, successes, stops, phases, beside)
        return successes, stops

    def _collect(self, member: _Member, successes: list[Success], stops: list[Stop], phases: Mapping[str, float], beside: bool) -> None:
        """One computed member and those that follow it: results if every upload arrived, the error otherwise."""
        artifacts: list[NewArtifact] = []
        models: list[dict[str, Any]] = []
        for output in member.outputs:
            try:
                known = output.artifact if beside and isinstance(output, _Upload) else None
                artifacts.append(output if isinstance(output, NewArtifact) else known or output.ends.result())
            except Exception as error:
                member.error = member.error or classify(error)
        if member.error is None:
            try:
                for model in member.models:
                    models.append(self._model_files(member, model, artifacts))
            except Exception as error:
                member.error = classify(error)
        for one in (member, *member.followers):
            if member.error is not None:
                stops.append(Stop(one.claimed.id, one.claimed.attempt, member.error.to_dict(), phases, self.worker))
            else:
                mine = tuple(models) if one is member else ()
                successes.append(Success(one.claimed.id, one.claimed.attempt, tuple(artifacts), mine, one.result_key, None, phases, one.claimed))

    def _model_files(self, member: _Member, model: NewModel, artifacts: list[NewArtifact]) -> dict[str, Any]:
        names = {}
        for role, path in model.files.items():
            output = Output(0, f"model/{path.name}", "application/octet-stream", path, {"role": role})
            artifacts.append(self._upload(member.claimed, output, member.resolved, role="model"))
            names[role] = output.name
        return {
            "name": model.name, "engine": model.engine, "tasks": model.tasks, "files": names, "options": model.options, "config": model.config,
            "metrics": model.metrics, "lineage": {**model.lineage, "job": member.claimed.id, "seed": member.claimed.seed},
            "memory_mb": model.memory_mb,
        }  # fmt: skip

    def close(self) -> None:
        """Commit what is under way, end the keeper, close connections."""
        self.finishers.shutdown(wait=True)
        self.uploads.shutdown(wait=True)
        self.meter.flush()
        if self.keeper:
            self.keeper.close()
        if self.tracer:
            self.tracer.close()
        confined.close()
        self.dispatcher.publisher.close()
        self.database.close()


def _uploaded(member: _Member) -> None:
    """Wait for the objects without which the transaction must not be committed.

    Raises:
        _StillUploading: If that takes longer, or one goes wrong.
    """
    end = time.monotonic() + BESIDE_S
    try:
        for output in member.outputs:
            if isinstance(output, _Upload):
                output.ends.result(max(0.0, end - time.monotonic()))
    except Exception as error:
        raise _StillUploading from error


def _key(claimed: Claimed, output: Output, sha256: str) -> str:
    return artifact_key(claimed.project_id, sha256, suffix_for(output.media_type))


def _artifact(claimed: Claimed, output: Output, resolved: Resolved | None, key: str, sha256: str, size: int, role: str) -> NewArtifact:
    parents = resolved.parents if resolved else ()
    return NewArtifact(output.name, key, sha256, size, output.media_type, role, output.meta, claimed.seed, claimed.model, parents)


def _published_role(name: str) -> str:
    return "checkpoint" if name.startswith("checkpoint") else "sample"


def result_key(spec: KindSpec, claimed: Claimed, resolved: Resolved) -> str:
    """What makes two results equal: kind and its version, params, inputs by digest, model version, seed."""
    seed = claimed.seed if spec.seeded else None
    parts = [spec.name, spec.version, _without_refs(resolved), dict(resolved.digest), claimed.model, seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _without_refs(resolved: Resolved) -> dict[str, Any]:
    """Params with inputs blanked: their digests stand beside, whichever job made the bytes."""
    data = resolved.params.model_dump(mode="json")
    for name in resolved.digest:
        put_at(data, name, None)
    return data


def classify(error: BaseException) -> FactoryError:
    """Any exception as one of ours; its class decides what happens to the job.

    The exception loses its traceback and what it was raised from: these hold the frames it passed through, with their pictures and
    tensors and with the very members that keep the error, a cycle that the collector finds hundreds of failed jobs later.
    """
    problem = _classified(error)
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return problem


def _classified(error: BaseException) -> FactoryError:
    if isinstance(error, FactoryError):
        if error.error_class == "service":  # the ledger or the store is away: never the job's fault
            return TransientError(error.message, code=error.code)
        return error
    if isinstance(error, OSError) and error.errno in _LOCAL_FAULTS:
        return TransientError(f"this worker's disk or handles: {error}", code="worker_resources")
    if memory.is_out_of_memory(error):
        problem = FactoryError(f"out of memory: {str(error)[:300]}", code="out_of_memory")
        problem.error_class = "resource"
        return problem
    text = "".join(traceback.format_exception(error))
    return FactoryError(f"{type(error).__name__}: {str(error)[:500]}", code="unexpected", traceback=text[-4000:])

"""Accepting: validated jobs become rows in one transaction; only then is anybody told, and only then is anything sent."""

import gzip
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import structlog

from contentfactory.errors import Conflict, FactoryError, InputError, NotFound, ServiceUnavailable
from contentfactory.fastjson import dumps_sorted, loads
from contentfactory.ids import is_id, new_id, stable_seed
from contentfactory.jobs.spec import Params, canonical, get_kind, iter_inputs, iter_refs, put_at, takes_media
from contentfactory.settings import Settings
from contentfactory.states import TERMINAL, UNWELL, BatchState, JobState, Priority
from db import batches, counters, jobs, lifecycle, projects, registry
from db.choice import Hint
from db.session import Database, take_time
from producer import manifest as manifests
from producer.dispatch import Dispatcher
from producer.job_ids import form_of, job_id_for, job_ids
from producer.models import ModelPins
from producer.publish import Publisher
from producer.spool import KEY, SPOOL_FORMAT, Spool, as_dict, estimate, number_of, record_number
from storage.base import ObjectStore
from storage.keys import input_key, media_type_for

log = structlog.get_logger(__name__)

EXPAND_ROWS = 4000
"""Rows in one transaction of the expander."""
MANY_ROWS = 2000
"""Rows written at once by `Producer.submit_many`: gone again before Python's collector counts them among what stays."""
_PLAIN = frozenset({str, int, float, bool, type(None)})
_Settled = tuple[str, str, float]
"""What a row needs of checked params: their JSON, what they share a forward pass by, estimated compute seconds."""
MAX_MANY = 100_000
"""Most jobs in one call of `Producer.submit_many`; what is larger goes in as a manifest, which streams."""


class Producer:
    """The accepting side: single jobs, batches, files.

    Args:
        settings: Project name, caps.
        database: The ledger.
        store: Object storage.
        publisher: Broker; without one, jobs wait for the timer.
    """

    def __init__(self, settings: Settings, database: Database, store: ObjectStore, publisher: Publisher | None = None) -> None:
        self.settings = settings
        self.database = database
        self.store = store
        self.publisher = publisher
        self.dispatcher = Dispatcher(database, publisher, settings) if publisher else None
        self._projects: dict[str, str] = {}

    def project_id(self, name: str | None = None) -> str:
        """Id of a project by name (the settings' one where left out), made if it is new."""
        name = name or self.settings.project
        if name not in self._projects:
            self._projects[name] = self.database.run(lambda conn: projects.ensure(conn, name))
        return self._projects[name]

    # --- one job ---

    def submit(
        self,
        kind: str,
        params: Mapping[str, Any],
        *,
        project: str | None = None,
        priority: int = Priority.NORMAL,
        seed: int | None = None,
        depends_on: Sequence[str] = (),
        idempotency_key: str | None = None,
        reuse: bool = True,
        labels: Mapping[str, str] | None = None,
    ) -> str:
        """Accept one job.

        Args:
            kind: Kind of job.
            params: Its parameters.
            project: Project's name.
            priority: 0 to 100.
            seed: Seed; random where left out.
            depends_on: Ids of jobs that must succeed first.
            idempotency_key: The same key with the same request gives the same job.
            reuse: Whether an equal earlier result may be taken.
            labels: The caller's own notes.

        Returns:
            The job's id; its row is committed.

        Raises:
            InputError: If something is wrong with the request.
            Conflict: If the key was used for another request.
            ServiceUnavailable: If the ledger cannot be written.
        """
        spec = get_kind(kind)
        parsed = spec.validate(params)
        if not 0 <= priority <= 100:
            raise InputError(f"priority is {priority}; allowed: 0 to 100", param="priority")
        if seed is not None and not 0 <= seed < 2**32:
            raise InputError(f"seed is {seed}; allowed: 0 to {2**32 - 1}", param="seed")
        if idempotency_key is not None and not 0 < len(idempotency_key) <= 255:
            raise InputError(f"idempotency_key has {len(idempotency_key)} characters; allowed: 1 to 255", param="idempotency_key")
        project_id = self.project_id(project)
        parents = tuple(dict.fromkeys((*depends_on, *(ref.job for _, ref in iter_refs(parsed)))))
        request = {"kind": spec.name, "params": canonical(parsed), "priority": priority, "seed": seed, "depends_on": list(depends_on)}
        request_hash = hashlib.sha256(dumps_sorted(request).encode()).hexdigest()
        job_id = new_id("job")
        chosen = seed if seed is not None else int.from_bytes(os.urandom(4), "big") >> 1
        hints: list[Hint] = []

        def look(conn: Any) -> lifecycle.NewJob | str:
            """The job to accept, or the id of the one that was accepted by the same key."""
            if idempotency_key is not None:
                earlier = jobs.by_key(conn, project_id, idempotency_key)
                if earlier is not None:
                    if earlier["request_hash"] != request_hash:
                        raise Conflict(f"idempotency key {idempotency_key!r} was used for another request", code="idempotency_conflict")
                    return str(earlier["id"])
            for parent in parents:
                if not is_id(parent, "job") or jobs.get(conn, project_id, parent) is None:
                    raise InputError(f"depends on {parent!r}, which is no job of this project", code="unknown_dependency", param="depends_on")
            model = ModelPins(conn, project_id).pin(spec, getattr(parsed, "model", None))
            self._check_artifacts(conn, project_id, parsed)
            pinned = _pin_datasets(conn, project_id, parsed)
            return lifecycle.NewJob(
                id=job_id, project_id=project_id, kind=spec.name, queue=spec.queue, params=pinned.model_dump(mode="json"),
                share_key=spec.share_key(parsed, model), seconds=estimate(spec, parsed), seed=chosen, model=model,
                priority=priority, parents=parents, reuse=reuse and spec.cacheable and self.settings.reuse_results,
                idempotency_key=idempotency_key, request_hash=request_hash, labels=dict(labels or {}),
            )  # fmt: skip

        def alone(conn: Any) -> str | None:
            row = look(conn)
            if isinstance(row, str):
                return row
            hint = lifecycle.accept_alone(conn, row)
            hints.extend([hint] if hint else [])
            return job_id if hint else None

        def work(conn: Any) -> str:
            row = look(conn)
            if isinstance(row, str):
                return row
            if not lifecycle.insert_jobs(conn, [row]):
                if jobs.get(conn, project_id, job_id) is None:
                    # Somebody else committed the same key between our look and our insert: look again.
                    raise ServiceUnavailable("the same idempotency key is being accepted right now", code="busy")
                # Our own earlier try, whose answer was lost, and with it the word that it was dispatched. A second hint does no harm.
                hint = lifecycle.hint_of(conn, row)
                hints.extend([hint] if hint else [])
            return job_id

        made: str | None = None
        if self.dispatcher and priority >= Priority.INTERACTIVE and not parents:
            # Somebody waits for it: one transaction instead of two, and on PostgreSQL one statement.
            made = self.database.run(alone, whole=False)
        made = made or self.database.run(work)
        if made == job_id:
            self.kick([spec.queue], hints=hints)
        return made

    def submit_many(
        self,
        kind: str,
        params: Sequence[Mapping[str, Any]],
        *,
        project: str | None = None,
        priority: int = Priority.BULK,
        seeds: Sequence[int] | None = None,
        reuse: bool = True,
        labels: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Accept many jobs of one kind in one transaction: all of them or none.

        Args:
            kind: Kind of job.
            params: Parameters of each job, at most `MAX_MANY`.
            project: Project's name.
            priority: 0 to 100.
            seeds: Seed of each job; random where left out.
            reuse: Whether equal earlier results may be taken.
            labels: The caller's own notes, the same for all.

        Returns:
            The jobs' ids in the order of ``params``; their rows are committed.

        Raises:
            InputError: If something is wrong with one of them; the message names the first by its index.
            ServiceUnavailable: If the ledger cannot be written.
        """
        spec = get_kind(kind)
        if len(params) > MAX_MANY:
            raise InputError(f"{len(params)} jobs in one call; the limit is {MAX_MANY}: hand in a manifest instead", param="params")
        if seeds is not None and len(seeds) != len(params):
            raise InputError(f"{len(seeds)} seeds for {len(params)} jobs", param="seeds")
        if not 0 <= priority <= 100:
            raise InputError(f"priority is {priority}; allowed: 0 to 100", param="priority")
        project_id = self.project_id(project)
        media = takes_media(spec.params)
        checked: list[Params | _Settled] = []
        referring: set[int] = set()
        for index, one in enumerate(params):
            try:
                parsed = spec.validate(one)
                if seeds is not None and not 0 <= seeds[index] < 2**32:
                    raise InputError(f"seed is {seeds[index]}; allowed: 0 to {2**32 - 1}", param="seed")
            except InputError as error:
                raise InputError(f"job {index}: {error.message}", code=error.code, param=error.param, index=index) from None
            # Whether there may be a reference in it: most params are plain values.
            if media or not isinstance(one, Mapping) or any(type(value) not in _PLAIN for value in one.values()):
                referring.add(index)
            # Nothing is kept that Python's collector would look at again and again, which took a third of the call.
            settled = None if spec.takes_model or index in referring else (spec.params_json(parsed), spec.share_key(parsed, None), estimate(spec, parsed))
            checked.append(settled or parsed)
        if not checked:
            return []
        ids = [new_id("job") for _ in checked]
        chosen = seeds if seeds is not None else [random.getrandbits(31) for _ in checked]
        cacheable, noted = reuse and spec.cacheable and self.settings.reuse_results, dict(labels or {})

        # Most are: then nothing is made of a job but its row.
        plain = cast("list[_Settled]", checked) if not (noted or referring or spec.takes_model) else []

        def settle(conn: Any, pins: ModelPins, index: int, one: Params) -> tuple[_Settled, str | None, tuple[str, ...]]:
            parents: tuple[str, ...] = ()
            if index in referring:
                parents = tuple(dict.fromkeys(ref.job for _, ref in iter_refs(one)))
                for parent in parents:
                    if not is_id(parent, "job") or jobs.get(conn, project_id, parent) is None:
                        raise InputError(f"job {index}: needs {parent!r}, which is no job of this project", code="unknown_dependency")
                self._check_artifacts(conn, project_id, one)
                one = _pin_datasets(conn, project_id, one)
            model = pins.pin(spec, getattr(one, "model", None) if spec.takes_model else None)
            return (spec.params_json(one), spec.share_key(one, model), estimate(spec, one)), model, parents

        def row(conn: Any, pins: ModelPins, index: int) -> lifecycle.NewJob:
            one = checked[index]
            settled, model, parents = (one, None, ()) if isinstance(one, tuple) else settle(conn, pins, index, one)
            text, share_key, seconds = settled
            return lifecycle.NewJob(
                ids[index], project_id, spec.name, spec.queue, text, share_key, seconds, chosen[index], model, priority=priority,
                parents=parents, reuse=cacheable, labels=noted,
            )  # fmt: skip

        def work(conn: Any) -> None:
            if jobs.get(conn, project_id, ids[0]) is not None:
                return  # an earlier try was committed and its answer lost
            if plain:
                each = ((i, *settled, seed) for i, settled, seed in zip(ids, plain, chosen, strict=True))
                lifecycle.insert_alike(conn, project_id, spec.name, each, priority=priority, reuse=cacheable)
                return
            pins = ModelPins(conn, project_id)
            for start in range(0, len(ids), MANY_ROWS):
                lifecycle.insert_jobs(conn, [row(conn, pins, i) for i in range(start, min(start + MANY_ROWS, len(ids)))], fresh=True)

        self.database.run(work)
        self.kick([spec.queue], bulk=priority < Priority.INTERACTIVE)
        return ids

    def wait(self, job_ids: Sequence[str], timeout_s: float) -> dict[str, JobState]:
        """Wait until jobs have ended.

        The worker that ends an interactive job says so on the broker at once; for others, and where that word is lost, the
        ledger is asked again and again, at growing intervals.

        Args:
            job_ids: Jobs of any project.
            timeout_s: Longest wait, seconds.

        Returns:
            State of each job, also of those that have not ended in time.

        Raises:
            ServiceUnavailable: If the ledger cannot be read.
        """
        end = time.monotonic() + timeout_s
        pause = 0.02 if self.publisher else 0.002
        with self.publisher.listen(job_ids) if self.publisher else nullcontext() as heard:
            while True:
                with self.database.read() as conn:
                    states = jobs.states(conn, job_ids)
                left = end - time.monotonic()
                if left <= 0 or all(state in TERMINAL for state in states.values()):
                    return states
                if heard is None:
                    time.sleep(min(left, pause))
                else:
                    heard.wait(min(left, pause))
                pause = min(pause * 1.5, 0.25)

    def _check_artifacts(self, conn: Any, project_id: str, params: Params) -> None:
        for field, modality, value in iter_inputs(params):
            if not isinstance(value, str) or modality == "text":
                continue
            if value.startswith("file:"):
                raise InputError(f"{field}: {value[:80]!r} names a file of this machine; upload it first", param=field)
            if value.startswith("art_") and jobs.artifact(conn, project_id, value) is None:
                raise InputError(f"{field}: {value} is no artifact of this project", code="unknown_artifact", param=field)

    def kick(self, queues: Sequence[str] | None = None, *, bulk: bool = False, hints: Sequence[Hint] = ()) -> None:
        """Dispatch now; whatever fails here, the timer does later.

        Args:
            queues: Queues that may have work; all where left out.
            bulk: Leave a queue alone whose workers have enough, or that somebody else serves at this moment: they fetch more themselves,
                and whoever hands in many jobs has more to do.
            hints: What was dispatched already and only has to be sent; then nothing else is dispatched.
        """
        if self.dispatcher is None:
            return
        try:
            if hints:
                self.dispatcher.send(hints)
            else:
                self.dispatcher.dispatch(queues, top_up=bulk)
        except ServiceUnavailable as error:
            log.warning("dispatch_deferred", action="kick", error=error.message)

    # --- files ---

    def upload(self, path: Path, *, media_type: str | None = None, project: str | None = None) -> str:
        """Store a local file as an input. Equal bytes are one artifact.

        Returns:
            Artifact id.

        Raises:
            InputError: If the file cannot be read or is too large.
        """
        try:
            size = path.stat().st_size
            if size > self.settings.max_input_mb * 2**20:
                raise InputError(f"{path} has {size} bytes; the limit is {self.settings.max_input_mb} MB (FACTORY_MAX_INPUT_MB)")
            with open(path, "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        project_id = self.project_id(project)
        media_type = media_type or media_type_for(path.name)
        key = input_key(project_id, sha256, path.suffix if path.suffix.lstrip(".").isalnum() else "")
        self.store.put(key, path, media_type=media_type, sha256=sha256, size=size)
        return self.database.run(
            lambda conn: registry.add_input(
                conn, project_id, name=path.name, object_key=key, sha256=sha256, size=size, media_type=media_type
            )
        )

    # --- batches ---

    def plan(self, manifest: manifests.Manifest, *, project: str | None = None, progress: Any = None, spool: bool = False) -> manifests.Report:
        """Check a manifest to the last line, models included; nothing is accepted.

        Args:
            manifest: An opened manifest.
            project: Project's name.
            progress: Told the number of jobs read, now and then.
            spool: Whether to write down what was checked, in ``report.spool``, so that `create_batch` need not read it again.
        """
        project_id = self.project_id(project)
        made: set[str] = set()
        awaited: list[tuple[str, manifests.ManifestError]] = []
        sink = Spool() if spool else None
        with self.database.read() as conn:
            pins = ModelPins(conn, project_id)

            def vet(line: manifests.JobLine) -> Iterator[str]:
                if line.kind.startswith("train."):
                    made.add(str(line.params.get("name")))
                model = getattr(line.parsed, "model", None) if line.spec.takes_model else None
                pinned = None
                try:
                    pinned = pins.pin(line.spec, model)
                except InputError as error:
                    if error.code == "unknown_model" and line.parents:
                        # A training job of the same manifest may make it; whether one does shows at the end.
                        wrong = manifests.ManifestError(error.message, line.line, "model", line.custom_id, error.code)
                        awaited.append((str(model), wrong))
                    else:
                        yield error.message
                if takes_media(type(line.parsed)):
                    try:
                        _pin_datasets(conn, project_id, line.parsed)
                    except InputError as error:
                        yield error.message
                    for field, _, value in iter_inputs(line.parsed):
                        if isinstance(value, str) and value.startswith("art_") and jobs.artifact(conn, project_id, value) is None:
                            yield f"{field}: {value} is no artifact of this project"
                if sink is not None:
                    sink.add(line, pinned)

            try:
                report = manifests.check(manifest, vet=vet, progress=progress)
            except BaseException:
                if sink:
                    sink.discard()
                raise
        missing = tuple(error for model, error in awaited if model not in made)
        report.errors = tuple(sorted((*report.errors, *missing), key=lambda e: e.line or 0)) if missing else report.errors
        report.error_count += len(missing)
        if sink is not None:
            if report.ok and not report.files:
                report.spool = sink
            else:  # local files get their artifacts' ids first
                sink.discard()
        return report

    def create_batch(
        self,
        manifest: manifests.Manifest,
        *,
        name: str | None = None,
        project: str | None = None,
        priority: int = Priority.BULK,
        reuse: bool = True,
        labels: Mapping[str, str] | None = None,
        resume: bool = True,
        report: manifests.Report | None = None,
        progress: Any = None,
    ) -> tuple[str, bool]:
        """Accept a manifest: check every line, store it, commit the batch's row. Expanding follows (`expand`).

        Args:
            manifest: An opened manifest.
            name: Title; the manifest's own or its file name where left out.
            project: Project's name.
            priority: Added to nothing: the priority of lines that name none.
            reuse: Whether equal earlier results may be taken.
            labels: Notes.
            resume: Whether an unfinished batch of the very same content is continued instead of making another.
            report: What `plan` found just now; planned here where left out.
            progress: Told the number of jobs read, now and then.

        Returns:
            Batch id, and whether it is a continued one.

        Raises:
            InputError: With every mistake by its line; nothing is accepted then.
        """
        report = report or self.plan(manifest, project=project, progress=progress, spool=True)
        report.raise_for_errors(shown=1000)
        project_id = self.project_id(project)
        spool, report.spool = report.spool, None
        if spool is None:
            spool = self._read_again(manifest, project_id, self._upload_files(manifest, project) if report.files else {})
        try:
            path, digest, total = spool.close(priority, reuse)
            if resume:
                with self.database.read() as conn:
                    found = batches.find_open(conn, project_id, digest)
                if found:
                    return found, True
            with open(path, "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            key = input_key(project_id, sha256, ".jsonl.gz")
            self.store.put(key, path, media_type="application/gzip", sha256=sha256)
        finally:
            spool.discard()
        batch_id = new_id("batch")
        source = {
            "object_key": key, "sha256": sha256, "jobs": total, "file": manifest.path.name, "format": SPOOL_FORMAT, "priority": priority,
            "reuse": reuse,
        }  # fmt: skip
        title = name or manifest.name or manifest.path.name

        def work(conn: Any) -> None:
            if batches.get(conn, project_id, batch_id) is None:  # else an earlier try was committed and its answer lost
                batches.create(conn, batch_id, project_id, title, source=source, digest=digest, priority=priority, labels=labels)

        self.database.run(work)
        return batch_id, False

    def _upload_files(self, manifest: manifests.Manifest, project: str | None) -> dict[str, str]:
        uploaded: dict[str, str] = {}
        for line in manifests.lines(manifest):
            for one in line.files:
                if one.address not in uploaded:
                    uploaded[one.address] = self.upload(one.path, project=project)
        return uploaded

    def _read_again(self, manifest: manifests.Manifest, project_id: str, uploaded: Mapping[str, str]) -> Spool:
        """The spool of a manifest that was checked before."""
        spool = Spool()
        try:
            with self.database.read() as conn:
                pins = ModelPins(conn, project_id)
                for line in manifests.lines(manifest):
                    try:
                        pinned = pins.pin(line.spec, getattr(line.parsed, "model", None))
                    except InputError:
                        pinned = None  # a training job of this manifest makes it
                    spool.add(line, pinned, uploaded)
        except BaseException:
            spool.discard()
            raise
        return spool

    def expand(self, batch_id: str, seconds: float | None = None) -> bool:
        """Write a batch's rows, chunk by chunk, from where the last expander stopped. Several may try: the cursor decides.

        Args:
            batch_id: Batch in state ``expanding``; or ``cancelling``, and then its lines become cancelled jobs, for every accepted
                line ends as a row.
            seconds: Longest time to spend; None to go on to the end.

        Returns:
            Whether the batch is expanded.
        """
        end = None if seconds is None else time.monotonic() + seconds
        with self.database.read() as conn:
            project_id = conn.execute(_batch_project(batch_id)).scalar()
            row = batches.get(conn, project_id, batch_id) if project_id else None
        if row is None:
            raise NotFound(f"batch {batch_id} does not exist")
        cancelling = row["state"] == BatchState.CANCELLING and row["cursor"] < row["source"].get("jobs", 0)
        if row["state"] != BatchState.EXPANDING and not cancelling:
            return True
        cursor = row["cursor"]
        rank0 = int(row["created_at"] * 1000) * 1_000_000
        # While the database copies one chunk in, the next one is read; SQLite works in this very process and gains nothing.
        with ExitStack() as stack:
            ahead = None if self.database.sqlite else stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="expand"))
            writing: tuple[int, Future[bool]] | None = None

            def written() -> bool:
                """Whether the chunk under way got in (then the cursor stands behind it); false where another expander is ahead."""
                nonlocal cursor, writing
                if writing is None:
                    return True
                new, future = writing
                writing = None
                if not future.result():
                    return False
                if cursor == 0:
                    self.kick(bulk=True)
                cursor = new
                return True

            try:
                before = cursor
                for chunk in self._records(row["source"]["object_key"], cursor):
                    new = record_number(chunk[-1])
                    rows = self._chunk_rows(row, chunk, rank0)
                    if not written():
                        return False
                    step = partial(self._write_chunk, batch_id, row["project_id"], rows, before, new)
                    if ahead is None:
                        done: Future[bool] = Future()
                        done.set_result(step())
                        writing = (new, done)
                    else:
                        writing = (new, ahead.submit(step))
                    before = new
                    if end is not None and time.monotonic() > end:
                        written()
                        return False
                if not written():
                    return False
            except FactoryError as error:
                if error.retryable:
                    raise
                told = error.to_dict()
                self.database.run(lambda conn: batches.fail(conn, batch_id, told))
                log.error("batch_failed", action="expand", batch=batch_id, code=error.code)
                return True
        self.database.run(lambda conn: batches.expanded(conn, batch_id))
        self.database.run(lambda conn: counters.close_batches(conn, [batch_id]))
        self.kick(bulk=True)
        return True

    def _records(self, object_key: str, after: int) -> Iterator[list[Any]]:
        chunk: list[Any] = []
        with self.store.open(object_key) as raw, gzip.GzipFile(fileobj=raw) as stream:
            for data in stream:
                if after and number_of(data) <= after:
                    continue
                chunk.append(loads(data))
                if len(chunk) >= EXPAND_ROWS:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk

    def _chunk_rows(self, batch: Any, chunk: Sequence[Any], rank0: int) -> list[lifecycle.NewJob]:
        batch_id, project_id, source = batch["id"], batch["project_id"], batch["source"]
        rows: list[lifecycle.NewJob] = []
        hard: list[tuple[int, Mapping[str, Any]]] = []
        job_id = job_ids(batch_id, form_of(batch))
        usual, reuse = source.get("priority", 0), source.get("reuse", True) and self.settings.reuse_results
        for record in chunk:
            if isinstance(record, dict) or record[KEY] is None:
                hard.append((len(rows), record if isinstance(record, dict) else as_dict(record, usual, source.get("reuse", True))))
                rows.append(None)  # type: ignore[arg-type]
                continue
            n, custom_id, kind, params, parents, priority, seed, labels, seconds, model, share_key = record
            spec = get_kind(kind)
            rows.append(
                lifecycle.NewJob(
                    id=job_id(custom_id), project_id=project_id, batch_id=batch_id, custom_id=custom_id, line=n,
                    rank=rank0 + min(n, 999_999), kind=kind, queue=spec.queue, params=params, share_key=share_key, seconds=seconds,
                    seed=seed, model=model, priority=priority or usual,
                    parents=tuple(_batch_job(job_id, p) for p in parents), reuse=reuse and spec.cacheable, labels=labels,
                )
            )  # fmt: skip
        if hard:
            with self.database.read() as conn:
                pins = ModelPins(conn, project_id)
                for at, record in hard:
                    rows[at] = self._row(conn, record, batch_id, project_id, pins, rank0, job_id)
        return rows

    def _write_chunk(self, batch_id: str, project_id: str, rows: Sequence[lifecycle.NewJob], old: int, new: int) -> bool:
        unsure = False

        def work(conn: Any) -> bool:
            nonlocal unsure
            state = batches.advance(conn, batch_id, old, new, len(rows))
            if state is None:
                # Where the answer to our own commit was lost, the one who moved the cursor was this call.
                row = batches.get(conn, project_id, batch_id) if unsure else None
                return row is not None and row["cursor"] == new
            unsure = True
            # The cursor moves in the same transaction, so nobody can have written these rows before.
            lifecycle.insert_jobs(conn, rows, fresh=True)
            if state == BatchState.CANCELLING:
                lifecycle.cancel_jobs(conn, [row.id for row in rows])
            return True

        return self.database.run(work)

    def _row(self, conn: Any, record: Mapping[str, Any], batch_id: str, project_id: str, pins: ModelPins, rank0: int,
             job_id: Callable[[str], str]) -> lifecycle.NewJob:  # fmt: skip
        spec = get_kind(record["kind"])
        parsed = _pin_datasets(conn, project_id, _rename_refs(spec.validate(record["params"]), partial(_batch_job, job_id)))
        try:
            model = pins.pin(spec, getattr(parsed, "model", None))
        except InputError:
            if not record["parents"]:
                raise
            # Made by a training job of this batch: the worker takes the newest version once the parents have succeeded.
            model = parsed.model  # type: ignore[attr-defined]
        seed = record["seed"]
        return lifecycle.NewJob(
            id=job_id(record["id"]), project_id=project_id, batch_id=batch_id, custom_id=record["id"],
            line=record["n"], rank=rank0 + min(record["n"], 999_999), kind=spec.name, queue=spec.queue,
            params=parsed.model_dump(mode="json"), share_key=spec.share_key(parsed, model), seconds=estimate(spec, parsed),
            seed=seed if seed is not None else stable_seed(record["id"], dumps_sorted(record["params"])),
            model=model, priority=record["priority"],
            parents=tuple(_batch_job(job_id, p) for p in record["parents"]),
            reuse=record["reuse"] and spec.cacheable and self.settings.reuse_results, labels=record["labels"],
        )  # fmt: skip

    def retry_failed(self, batch_id: str, *, project: str | None = None) -> str | None:
        """Run a batch's failed, dead and cancelled jobs again as a new batch of linked jobs; what succeeded stays.

        A child that failed because its parent did comes along and waits for the parent's new job.

        Returns:
            The new batch's id, or None if nothing is to be retried.

        Raises:
            NotFound: If the project has no such batch.
            Conflict: If the batch still runs.
        """
        project_id = self.project_id(project)
        new_batch = new_id("batch")

        def work(conn: Any) -> str | None:
            batch = batches.get(conn, project_id, batch_id)
            if batch is None:
                raise NotFound(f"batch {batch_id} does not exist")
            if batch["finished_at"] is None:
                raise Conflict(f"batch {batch_id} is {batch['state']}; wait for it or cancel it first", code="batch_not_finished")
            if batches.get(conn, project_id, new_batch) is not None:
                return new_batch  # an earlier try was committed and its answer lost
            take_time(conn)
            made = _replay(conn, list(jobs.of_batch(conn, batch_id, RETRYABLE)), new_batch)
            if not made:
                return None
            batches.create(
                conn, new_batch, project_id, batch["name"], digest=None, priority=batch["priority"],
                source={"retry_of": batch_id, "file": batch["source"].get("file"), "format": SPOOL_FORMAT}, labels=batch["labels"], retry_of=batch_id,
            )  # fmt: skip
            batches.advance(conn, new_batch, 0, len(made), len(made))
            lifecycle.insert_jobs(conn, made)
            batches.expanded(conn, new_batch)
            return new_batch

        made = self.database.run(work)
        if made:
            self.kick()
        return made

    def retry_jobs(self, job_ids: Sequence[str], *, project: str | None = None) -> list[str]:
        """Run failed, dead or cancelled jobs again as new linked jobs, with the children that failed for their sake.

        A job that was retried already is not retried twice.

        Returns:
            Ids of the new jobs, in the order of the given ones first.

        Raises:
            NotFound: If one is no job of the project.
            Conflict: If one is still under way or has succeeded.
        """
        project_id = self.project_id(project)

        def work(conn: Any) -> list[str]:
            take_time(conn)
            rows: dict[str, Any] = {}
            for job_id in dict.fromkeys(job_ids):
                row = jobs.get(conn, project_id, job_id)
                if row is None:
                    raise NotFound(f"job {job_id} does not exist")
                if row["state"] not in RETRYABLE:
                    raise Conflict(f"job {job_id} is {row['state']}; only failed, dead and cancelled jobs are retried", code="not_retryable")
                rows[job_id] = row
            frontier = list(rows)
            while frontier:
                found = [row for row in jobs.children(conn, frontier) if row["id"] not in rows and row["state"] in RETRYABLE]
                frontier = []
                for row in found:
                    if (row["error"] or {}).get("code") == "dependency_failed" or row["state"] == JobState.CANCELLED:
                        rows[row["id"]] = row
                        frontier.append(row["id"])
            made = _replay(conn, list(rows.values()), None)
            lifecycle.insert_jobs(conn, made)
            return [job.id for job in made]

        made = self.database.run(work)
        if made:
            self.kick()
        return made


RETRYABLE = UNWELL


def _replay(conn: Any, rows: Sequence[Any], batch_id: str | None) -> list[lifecycle.NewJob]:
    """New linked jobs for ended ones, their references and dependencies pointing to each other's new jobs.

    Args:
        conn: Connection in a transaction.
        rows: Rows of the ended jobs; those that have a retry already are left out.
        batch_id: Batch of the new jobs; None for jobs of their own.
    """
    newer = jobs.latest(conn, [row["id"] for row in rows])
    rows = [row for row in rows if row["id"] not in newer]
    again = {row["id"]: job_id_for(batch_id, row["custom_id"] or row["id"]) if batch_id else new_id("job") for row in rows}
    parents = {row["id"]: jobs.parents(conn, row["id"]) for row in rows}
    newer |= jobs.latest(conn, sorted({p for found in parents.values() for p in found} - set(again)))

    def now_at(job: str) -> str:
        return again.get(job) or newer.get(job, job)

    made = []
    for row in rows:
        spec = get_kind(row["kind"])
        parsed = _rename_refs(spec.validate(row["params"]), now_at)
        made.append(
            lifecycle.NewJob(
                id=again[row["id"]], project_id=row["project_id"], batch_id=batch_id, custom_id=row["custom_id"], line=row["line"],
                kind=row["kind"], queue=row["queue"], params=parsed.model_dump(mode="json"), share_key=spec.share_key(parsed, row["model"]),
                seconds=row["seconds"], seed=row["seed"], model=row["model"], priority=row["priority"],
                parents=tuple(now_at(p) for p in parents[row["id"]]), retry_of=row["id"], labels=row["labels"],
            )
        )  # fmt: skip
    return made


def _batch_project(batch_id: str) -> Any:
    from sqlalchemy import select

    from db.models import Batch

    return select(Batch.project_id).where(Batch.id == batch_id)


def _pin_datasets(conn: Any, project_id: str, params: Params) -> Params:
    """``dataset:NAME`` becomes the artifact of the version that is newest now.

    Raises:
        InputError: If there is no such data set.
    """
    found: dict[str, str] = {}
    for field, modality, value in iter_inputs(params):
        if modality != "dataset" or not isinstance(value, str) or not value.startswith("dataset:"):
            continue
        name, _, version = value.removeprefix("dataset:").partition("@")
        row = registry.dataset(conn, project_id, name, int(version) if version else None)
        if row is None:
            known = sorted({r["name"] for r in registry.datasets(conn, project_id)})
            hint = f"registered: {', '.join(known)}" if known else "register one with `factory datasets add`"
            raise InputError(f"{field}: data set {value.removeprefix('dataset:')!r} does not exist; {hint}", code="unknown_dataset", param=field)
        found[field] = row["artifact_id"]
    if not found:
        return params
    return type(params).model_validate({**params.model_dump(mode="json"), **found})


def _batch_job(job_id: Callable[[str], str], name: str) -> str:
    """The job that a line of a batch means: an accepted one by its id, or one of the same batch by its ``custom_id``."""
    return name if is_id(name, "job") else job_id(name)


def _rename_refs(params: Params, rename: Callable[[str], str]) -> Params:
    """The params with every reference pointing to another name of its job."""
    refs = list(iter_refs(params))
    if not refs:
        return params
    data = params.model_dump(mode="json")
    for path, ref in refs:
        put_at(data, path, {"job": rename(ref.job), "output": ref.output})
    return type(params).model_validate(data)

"""Accepting: validated jobs become rows in one transaction; only then is anybody told, and only then is anything sent."""

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import structlog

from contentfactory.errors import Conflict, InputError, ServiceUnavailable
from contentfactory.fastjson import dumps_sorted
from contentfactory.ids import is_id, new_id
from contentfactory.jobs.spec import Params, canonical, get_kind, iter_inputs, iter_refs, takes_media
from contentfactory.settings import Settings
from contentfactory.states import TERMINAL, JobState, Priority
from db import batches, jobs, lifecycle, projects, registry
from db.choice import Hint
from db.session import Database
from producer import manifest as manifests
from producer import retry
from producer.dispatch import Dispatcher
from producer.expand import Expander
from producer.models import ModelPins
from producer.references import pin_datasets
from producer.spool import SPOOL_FORMAT, Spool, estimate
from storage.base import ObjectStore
from storage.keys import input_key, media_type_for

if TYPE_CHECKING:
    from producer.publish import Publisher

log = structlog.get_logger(__name__)

MANY_ROWS = 2000
"""Rows written at once by `Producer.submit_many`: gone again before Python's collector counts them among what stays."""
_PLAIN = frozenset({str, int, float, bool, type(None)})
_Settled = tuple[str, str, float]
"""What a row needs of checked params: their JSON, what they share a forward pass by, estimated compute seconds."""
MAX_MANY = 100_000
"""Most jobs in one call of `Producer.submit_many`; what is larger goes in as a manifest, which streams."""


def _may_refer(media: bool, params: Any) -> bool:
    """Whether there may be a reference to a job, an artifact or a data set in params: most are plain values.

    Args:
        media: Whether the kind takes any (`takes_media`).
        params: As they were handed in.
    """
    return media or not isinstance(params, Mapping) or any(type(value) not in _PLAIN for value in params.values())


class Producer:
    """The accepting side: single jobs, batches, files.

    Args:
        settings: Project name, caps.
        database: The ledger.
        store: Object storage.
        publisher: Broker; without one, jobs wait for the timer.
    """

    def __init__(self, settings: Settings, database: Database, store: ObjectStore, publisher: "Publisher | None" = None) -> None:
        self.settings = settings
        self.database = database
        self.store = store
        self.publisher = publisher
        self.dispatcher = Dispatcher(database, publisher, settings) if publisher else None
        self.expander = Expander(database, store, reuse=settings.reuse_results, kick=partial(self.kick, bulk=True))
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
        refers = _may_refer(takes_media(spec.params), params)
        parents = tuple(dict.fromkeys((*depends_on, *(ref.job for _, ref in (iter_refs(parsed) if refers else ())))))
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
            pinned = parsed
            if refers:
                self._check_artifacts(conn, project_id, parsed)
                pinned = pin_datasets(conn, project_id, parsed)
            return lifecycle.NewJob(
                id=job_id, project_id=project_id, kind=spec.name, queue=spec.queue, params=pinned.model_dump(mode="json"),
                share_key=spec.share_key(parsed, model), seconds=estimate(spec, parsed), seed=chosen, model=model,
                priority=priority, parents=parents, reuse=reuse and spec.cacheable and self.settings.reuse_results,
                idempotency_key=idempotency_key, request_hash=request_hash, labels=dict(labels or {}),
            )  # fmt: skip

        seen: list[lifecycle.NewJob] = []

        def known(conn: Any, found: str) -> str:
            if found == job_id:
                # Our own earlier try, whose answer was lost, and with it the word that it was dispatched. A second hint does no harm.
                hint = lifecycle.hint_of(conn, job_id)
                hints.extend([hint] if hint else [])
            return found

        def alone(conn: Any) -> str | None:
            row = look(conn)
            if isinstance(row, str):
                return known(conn, row)
            hint = lifecycle.accept_alone(conn, row)
            if hint is None:
                seen[:] = [row]
                return None
            hints.append(hint)
            return job_id

        def work(conn: Any) -> str:
            # What was seen a moment ago is good for one try.
            row = seen.pop() if seen else look(conn)
            if isinstance(row, str):
                return known(conn, row)
            if not lifecycle.insert_jobs(conn, [row]):
                if jobs.get(conn, project_id, job_id) is None:
                    # Somebody else committed the same key between our look and our insert: look again.
                    raise ServiceUnavailable("the same idempotency key is being accepted right now", code="busy")
                return known(conn, job_id)
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
            if _may_refer(media, one):
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
                one = pin_datasets(conn, project_id, one)
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
            last: Callable[[], None] | None = None
            while True:
                with self.database.read() as conn:
                    states = jobs.states(conn, job_ids, meanwhile=last)
                left = end - time.monotonic()
                if left <= 0 or all(state in TERMINAL for state in states.values()):
                    return states
                if heard is None or heard.closed:
                    time.sleep(min(left, pause))
                elif heard.wait(min(left, pause)) and len(job_ids) == 1:
                    last = heard.close  # this was what it listened for; should the ledger not agree, it is asked now and then
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
                        pin_datasets(conn, project_id, line.parsed)
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
        """Write a batch's rows: see `Expander.expand`, which takes and returns the same."""
        return self.expander.expand(batch_id, seconds)

    # --- once more ---

    def retry_failed(self, batch_id: str, *, project: str | None = None) -> str | None:
        """Run what a batch has not got done again, as a new batch: see `producer.retry.failed`; dispatched at once.

        Args:
            batch_id: A batch that has ended.
            project: Project's name.
        """
        project_id, new_batch = self.project_id(project), new_id("batch")
        made = self.database.run(partial(retry.failed, project_id=project_id, batch_id=batch_id, new_batch=new_batch))
        if made:
            self.kick()
        return made

    def retry_jobs(self, job_ids: Sequence[str], *, project: str | None = None) -> list[str]:
        """Run jobs again as new ones: see `producer.retry.chosen`; dispatched at once.

        Args:
            job_ids: Jobs that ended without a result.
            project: Project's name.
        """
        made = self.database.run(partial(retry.chosen, project_id=self.project_id(project), job_ids=job_ids))
        if made:
            self.kick()
        return made

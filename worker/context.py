"""What a runner sees of the factory: seeds, inputs, models, progress, cancel checks. Never a session, bucket or Celery."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from contentfactory.errors import FactoryError, InputError, JobCancelled
from contentfactory.jobs.spec import OutputRef
from worker.engines.files import ResolvedModel
from worker.input_file import InputFile
from worker.models import ModelCache

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(slots=True)
class Output:
    """One artifact of one job of the micro-batch.

    Args:
        job: Index of the job within the micro-batch.
        name: File name, unique within the job; ASCII letters, digits, ``.``, ``_``, ``-`` and ``/`` for folders.
        media_type: IANA media type; one of the kind's ``outputs``.
        data: Bytes, a file in the scratch folder (handed over, not copied), or a function that encodes and returns either
            of them: such a function runs in the upload threads while the next forward pass runs.
        meta: Facts about the content: ``width``, ``height`` (pixels), ``duration_s``, ``sample_rate`` (Hz),
            ``frame_rate``, ``tokens`` …; JSON values only.
    """

    job: int
    name: str
    media_type: str
    data: "bytes | Path | Callable[[], bytes | Path]"
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """One job of the micro-batch failed; its neighbours go on."""

    job: int
    error: FactoryError


@dataclass(frozen=True)
class NewModel:
    """A trained model to register as a version with its lineage.

    Args:
        job: Index of the job.
        name: Name in the registry.
        engine: Loader in ``worker/engines``.
        tasks: Kinds that it can serve.
        files: File by role; each becomes an artifact of the job.
        options: Engine options (JSON values).
        config: Network configuration (JSON values).
        metrics: Final metrics.
        lineage: Dataset digest, parent version, recipe.
        memory_mb: What it takes once loaded.
    """

    job: int
    name: str
    engine: str
    tasks: tuple[str, ...]
    files: dict[str, Path]
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    memory_mb: int = 0


Yield = Output | Failure | NewModel


class JobContext:
    """The factory as one micro-batch sees it. Index ``job`` runs over the micro-batch's members, ``0`` to ``size - 1``.

    The worker passes callables that reach the ledger and the store; without them (tests, notebooks) the context stands
    alone, works in a folder and records what it is told.

    Args:
        scratch: Folder for temporary files, or what makes it when it is wanted; removed after the micro-batch.
        seeds: Seed of each job.
        models: Model of the micro-batch, by role; ``"model"`` is the params' ``model``.
        cache: Model cache of this worker.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        fetch: Brings an input to the local disk.
        report: Receives (job, fraction or None, message, metrics).
        is_cancelled: Says whether a job was cancelled or fenced.
        publish: Stores an output while the job still runs (checkpoints, sample grids) and returns when it is durable.
        checkpoints: Finds earlier attempts' checkpoints of a job, newest first.
        resolve_model: Finds another model by name.
    """

    def __init__(
        self,
        scratch: Path | Callable[[], Path],
        seeds: Sequence[int],
        models: dict[str, ResolvedModel] | None = None,
        cache: ModelCache | None = None,
        device: str | Callable[[], str] = "cpu",
        fetch: "Callable[[int, str | OutputRef], InputFile] | None" = None,
        report: Callable[[int, float | None, str, dict[str, float] | None], None] | None = None,
        is_cancelled: Callable[[int], bool] | None = None,
        publish: "Callable[[Output], None] | None" = None,
        checkpoints: "Callable[[int], list[InputFile]] | None" = None,
        resolve_model: Callable[[str], ResolvedModel] | None = None,
        should_release: Callable[[], bool] | None = None,
    ) -> None:
        self._scratch = scratch
        self.seeds = list(seeds)
        self.models = models or {}
        self.cache = cache or ModelCache(limit_mb=8192)
        self._device = device
        self.reports: list[tuple[int, float | None, str, dict[str, float] | None]] = []
        self.published: list[Output] = []
        self._fetch = fetch
        self._report = report
        self._is_cancelled = is_cancelled
        self._publish = publish
        self._checkpoints = checkpoints
        self._resolve_model = resolve_model
        self._should_release = should_release

    @property
    def scratch(self) -> Path:
        """Folder for temporary files; removed after the micro-batch.

        Raises:
            TransientError: If it cannot be made.
        """
        return self._scratch if isinstance(self._scratch, Path) else self._scratch()

    @property
    def device(self) -> str:
        """Where to compute: ``cpu``, ``cuda`` or ``cuda:N``. Only asked for by what computes there: finding out may load torch."""
        return self._device if isinstance(self._device, str) else self._device()

    @property
    def size(self) -> int:
        """Number of jobs in the micro-batch."""
        return len(self.seeds)

    @property
    def model(self) -> ResolvedModel:
        """The model that the params name.

        Raises:
            InputError: If the kind takes none.
        """
        if "model" not in self.models:
            raise InputError("this micro-batch was given no model", param="model")
        return self.models["model"]

    def resolve_model(self, name: str) -> ResolvedModel:
        """Another model by name, for runners that need helpers (a text encoder, a judge).

        Raises:
            ModelUnavailable: If it cannot be found here.
        """
        if name in self.models:
            return self.models[name]
        if self._resolve_model is not None:
            return self._resolve_model(name)
        from contentfactory.catalogue import load_catalogue
        from contentfactory.errors import ModelUnavailable
        from worker.engines.files import locate

        entry = load_catalogue().get(name)
        if entry is None:
            raise ModelUnavailable(f"model {name!r} is not in the catalogue")
        return locate(entry, Path(tempfile.gettempdir()) / "contentfactory-models")

    def load(self, loader: Callable[[ResolvedModel], T], model: ResolvedModel | None = None, variant: str = "") -> T:
        """A loaded model out of the cache.

        Args:
            loader: Loads it from its files; called only when it is not in memory.
            model: Which model; the params' one where left out.
            variant: Names what else the loaded form depends on (dtype, speaker …).
        """
        chosen = model or self.model
        key = "|".join((chosen.key, f"{loader.__module__}.{loader.__qualname__}", variant, self.device))
        return self.cache.get(key, lambda: loader(chosen), chosen.memory_mb or 64)

    def generator(self, job: int) -> "torch.Generator":
        """A CPU generator seeded with the job's own seed: its draws do not depend on its neighbours."""
        import torch

        return torch.Generator(device="cpu").manual_seed(self.seeds[job])

    def fetch(self, job: int, value: str | OutputRef) -> InputFile:
        """An input (artifact id, address, data: URI, reference) on the local disk, fetched once a micro-batch.

        Raises:
            InputError: If it cannot be had, is too large or is not what it claims to be.
            TransientError: If the storage did not answer.
        """
        if self._fetch is not None:
            return self._fetch(job, value)
        if isinstance(value, str) and value.startswith("file:"):
            path = Path(value.removeprefix("file:"))
            return InputFile(path, _guess(path), path.name)
        raise InputError(f"input {json.dumps(str(value))[:80]} cannot be fetched outside a worker")

    def progress(
        self, job: int, fraction: float | None = None, message: str = "", metrics: dict[str, float] | None = None
    ) -> None:
        """Say how far a job is; also tells the watchdog that the runner is alive. Cheap: call it often.

        Args:
            job: Index of the job.
            fraction: Done so far, in ``[0, 1]``; None where unknown.
            message: A few words for a person.
            metrics: Numbers to keep (training loss …) as an event; give them sparingly.
        """
        if self._report is not None:
            self._report(job, fraction, message, metrics)
        else:
            self.reports.append((job, fraction, message, metrics))

    def cancelled(self, job: int) -> bool:
        """Whether the job was cancelled, or belongs to another attempt by now."""
        return self._is_cancelled(job) if self._is_cancelled is not None else False

    def check(self, job: int) -> None:
        """Raise where the job was cancelled. Runners with long loops call it in each round.

        Raises:
            JobCancelled: If it was.
        """
        if self.cancelled(job):
            raise JobCancelled("the job was cancelled while it ran")

    def active(self, jobs: Iterable[int]) -> list[int]:
        """Those of the jobs that are not cancelled: what the next step of a shared loop still needs to work on."""
        return [job for job in jobs if not self.cancelled(job)]

    @property
    def should_release(self) -> bool:
        """Whether the worker drains and wants resumable work (training) back: checkpoint and raise `Released`."""
        return self._should_release() if self._should_release is not None else False

    def publish(self, output: Output) -> None:
        """Store an output now, while the job still runs; returns when it is durable.

        Raises:
            LeaseLost: If another attempt holds the job.
        """
        if self._publish is not None:
            self._publish(output)
        else:
            self.published.append(output)

    def checkpoints(self, job: int) -> list[InputFile]:
        """Checkpoints (outputs named ``checkpoint-*``) that earlier attempts of this job published, newest first."""
        return self._checkpoints(job) if self._checkpoints is not None else []


_TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".wav": "audio/wav",
    ".mp3": "audio/mpeg", ".flac": "audio/flac", ".mp4": "video/mp4", ".txt": "text/plain", ".json": "application/json",
    ".srt": "application/x-subrip", ".vtt": "text/vtt", ".zip": "application/zip", ".mid": "audio/midi",
}  # fmt: skip


def _guess(path: Path) -> str:
    return _TYPES.get(path.suffix.lower(), "application/octet-stream")

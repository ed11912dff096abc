"""Models are loaded before jobs are claimed: a slow load eats no lease, and a broken model costs no job a strike."""

import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import bindparam, select

from contentfactory.errors import FactoryError, InputError, ServiceUnavailable
from db import lifecycle, prepared
from db.models import Job
from db.session import Database
from worker.breaker import Breaker
from worker.context import JobContext
from worker.engines.files import ResolvedModel
from worker.keeper import Keeper
from worker.loading import deadline_s
from worker.models import ModelCache

log = structlog.get_logger(__name__)

LOADERS = {
    "audio.speech": "worker.runners.audio.speech:get_voice",
    "audio.transcribe": "worker.runners.audio.transcribe:get_recogniser",
    "image.generate": "worker.runners.image.generate:get_painter",
    "image.stylize": "worker.runners.image.stylize:get_stylizer",
    "image.upscale": "worker.runners.image.upscale:get_upscaler",
    "text.chat": "worker.runners.text.generate:load",
    "text.embed": "worker.runners.text.embed:load",
    "text.generate": "worker.runners.text.generate:load",
}
"""The function of each kind's runner that brings its model into the cache. Kinds that are not here load when they run."""

_NEEDS = select(Job.project_id, Job.model).where(Job.id == bindparam("p_id"))

GIVE_UP = 5
"""Failed loads in a row after which jobs are claimed all the same: each then ends by its own budget and says why."""


class WarmUp:
    """Loads the model of a hint before its jobs are claimed.

    Args:
        database: The ledger.
        cache: Model cache of this worker.
        resolve: Finds a model's files by project and name.
        device: Gives the device; asked only when something is loaded.
        keeper: Watches the load; None in tests.
        needless: Whether jobs of a kind will do without their model; asked only before it would be loaded.
    """

    def __init__(
        self, database: Database, cache: ModelCache, resolve: Callable[[str, str], ResolvedModel], device: Callable[[], str],
        keeper: Keeper | None = None, needless: Callable[[str, Sequence[str]], bool] = lambda kind, ids: False,
    ) -> None:  # fmt: skip
        self._database, self._cache, self._resolve, self._device, self._keeper = database, cache, resolve, device, keeper
        self._needless = needless
        self.breaker = Breaker()

    def ready(self, kind: str, ids: Sequence[str]) -> bool:
        """Make sure that the hint's model is loaded.

        Returns:
            Whether the jobs should be claimed now, because it is, or they need none. Where not, they are queued again for when the breaker lets
            a load through.
        """
        if kind not in LOADERS or not ids:
            return True
        try:
            with self._database.read() as conn:
                row = prepared.one(conn, _NEEDS, {"p_id": ids[0]})
        except ServiceUnavailable:
            return True  # the claim will meet it too, and knows what to do
        if row is None or row.model is None or "@" not in row.model:
            return True
        if any(key.startswith(f"{row.model}|") for key in self._cache.keys):
            return True
        try:
            if self._needless(kind, ids):
                return True
        except FactoryError:
            pass  # whoever loads it for nothing has only lost time
        wait_s = self.breaker.wait_s(row.model)
        if wait_s <= 0:
            try:
                self._load(kind, row.project_id, row.model)
            except InputError:
                return True  # the jobs' own fault, or so they will be told
            except FactoryError as error:
                if error.error_class == "input":
                    return True
                wait_s = self._failed(row.model, error)
            except Exception as error:
                wait_s = self._failed(row.model, error)
            else:
                self.breaker.worked(row.model)
                return True
        if self.breaker.failures(row.model) >= GIVE_UP:
            return True
        try:
            self._database.run(lambda conn: lifecycle.undispatch(conn, ids, delay_s=wait_s))
        except ServiceUnavailable:
            return True
        return False

    def _load(self, kind: str, project_id: str, name: str) -> None:
        model = self._resolve(project_id, name)
        if self._keeper:
            self._keeper.loading(name, deadline_s(model.memory_mb))
        try:
            module, _, function = LOADERS[kind].partition(":")
            loader: Callable[[JobContext], Any] = getattr(importlib.import_module(module), function)
            with tempfile.TemporaryDirectory(prefix="factory-load-") as folder:
                loader(
                    JobContext(
                        scratch=Path(folder), seeds=[0], models={"model": model}, cache=self._cache, device=self._device(),
                        resolve_model=lambda other: self._resolve(project_id, other),
                    )
                )  # fmt: skip
        finally:
            if self._keeper:
                self._keeper.loading(None, 0.0)

    def _failed(self, model: str, error: Exception) -> float:
        pause = self.breaker.failed(model, error)
        log.error(
            "model_load_failed", action="load", model=model, failures=self.breaker.failures(model), pause_s=pause,
            error=self.breaker.message(model),
        )  # fmt: skip
        return pause

"""The model cache: weights stay loaded, bounded by memory, least recently used out first."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from contentfactory.errors import ModelUnavailable, ResourceError, TransientError
from worker import memory
from worker.breaker import Breaker

log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass
class _Entry:
    value: Any
    megabytes: float
    loaded_at: float


class ModelCache:
    """Keeps loaded models by key within a bound of memory.

    A load is shared by all who wait for it. A model whose load failed is not tried again at once: the breaker stays open
    for 2, 4, 8 … seconds up to ``breaker_max_s``, so that a retry storm cannot load a broken model over and over.

    Args:
        limit_mb: Memory bound in megabytes over all loaded models; one model larger than it still loads, alone.
        breaker_max_s: Longest time that a broken model stays shut out, seconds.
    """

    def __init__(self, limit_mb: float, breaker_max_s: float = 300.0) -> None:
        if limit_mb <= 0:
            raise ValueError(f"model cache limit is {limit_mb} MB; it must be above 0")
        self.limit_mb = limit_mb
        self.breaker = Breaker(breaker_max_s)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.RLock()
        self.loads = 0

    def get(self, key: str, loader: Callable[[], T], megabytes: float) -> T:
        """The loaded model under ``key``.

        Args:
            key: Identity of weights, engine options and device.
            loader: Loads it; called only when it is not there.
            megabytes: What it takes once loaded.

        Returns:
            What the loader made.

        Raises:
            TransientError: While the breaker of this key is open.
            ModelUnavailable: If the loader says that the model cannot be had here.
            ResourceError: If memory ran out although everything else was unloaded.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return entry.value
            if self.breaker.wait_s(key) > 0:
                told = f"model {key} failed to load {self.breaker.failures(key)} times: {self.breaker.message(key)}"
                raise TransientError(told, code="model_breaker_open")
            self._make_room(megabytes)
            started = time.monotonic()
            try:
                value = self._load(key, loader, megabytes)
            except ModelUnavailable:
                raise
            except Exception as error:
                self.breaker.failed(key, error)
                memory.release(error)
                raise
            self.breaker.worked(key)
            self.loads += 1
            self._entries[key] = _Entry(value, megabytes, time.time())
            log.info("model_loaded", action="model_loaded", model=key, megabytes=megabytes, seconds=round(time.monotonic() - started, 3))
            return value

    def _load(self, key: str, loader: Callable[[], T], megabytes: float) -> T:
        """Load; where memory runs out, once more with everything else unloaded."""
        for last in (not self._entries, True):
            try:
                return loader()
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                self.clear()
                memory.release(error)
                if last:
                    # The size of the micro-batch is not to blame: another code than a runner's.
                    told = f"not enough memory to load model {key} ({megabytes:.0f} MB): {str(error)[:300]}"
                    raise ResourceError(told, code="model_out_of_memory") from None
                log.warning("model_load_out_of_memory", action="unload_all", model=key, megabytes=megabytes)
        raise AssertionError("unreachable")

    def _make_room(self, megabytes: float) -> None:
        while self._entries and self.used_mb + megabytes > self.limit_mb:
            key, _ = self._entries.popitem(last=False)
            log.info("model_evicted", action="model_evicted", model=key)
            memory.release()

    @property
    def used_mb(self) -> float:
        """Estimated memory of what is loaded, megabytes."""
        return sum(entry.megabytes for entry in self._entries.values())

    @property
    def keys(self) -> list[str]:
        """Keys of what is loaded, least recently used first."""
        with self._lock:
            return list(self._entries)

    def clear(self) -> None:
        """Unload everything."""
        with self._lock:
            self._entries.clear()
            memory.release()

"""The model cache: weights stay loaded, bounded by memory, least recently used out first."""

import gc
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from contentfactory.errors import ModelUnavailable, ResourceError, TransientError

log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass
class _Entry:
    value: Any
    megabytes: float
    loaded_at: float


@dataclass
class _Breaker:
    failures: int = 0
    open_until: float = 0.0
    message: str = ""


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
        self.breaker_max_s = breaker_max_s
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._breakers: dict[str, _Breaker] = {}
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
            breaker = self._breakers.get(key)
            if breaker and time.monotonic() < breaker.open_until:
                raise TransientError(f"model {key} failed to load {breaker.failures} times: {breaker.message}", code="model_breaker_open")
            self._make_room(megabytes)
            started = time.monotonic()
            try:
                value = loader()
            except MemoryError as error:
                self.clear()
                raise ResourceError(f"not enough memory to load model {key} ({megabytes:.0f} MB)") from error
            except ModelUnavailable:
                raise
            except Exception as error:
                breaker = self._breakers.setdefault(key, _Breaker())
                breaker.failures += 1
                breaker.message = f"{type(error).__name__}: {error}"
                breaker.open_until = time.monotonic() + min(2.0**breaker.failures, self.breaker_max_s)
                raise
            self._breakers.pop(key, None)
            self.loads += 1
            self._entries[key] = _Entry(value, megabytes, time.time())
            log.info("model_loaded", action="model_loaded", model=key, megabytes=megabytes, seconds=round(time.monotonic() - started, 3))
            return value

    def _make_room(self, megabytes: float) -> None:
        while self._entries and self.used_mb + megabytes > self.limit_mb:
            key, _ = self._entries.popitem(last=False)
            log.info("model_evicted", action="model_evicted", model=key)
            _release()

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
            _release()


def _release() -> None:
    gc.collect()
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()

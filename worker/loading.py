"""A model load has a deadline by the size of its files, and is judged by its progress before it is given up."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

BASE_S = 60.0
"""Time that any load may take, seconds."""

SLOWEST_MB_S = 20.0
"""Megabytes in a second that are read from the slowest disk that is put up with."""

QUIET_S = 60.0
"""Beyond its deadline a load goes on as long as it reads, computes or grows; this long without any of it is a hang, seconds."""

PATIENCE = 10.0
"""After so many times its deadline a load is given up whatever it does: a loop that spins also computes."""


def deadline_s(megabytes: float) -> float:
    """How long a model of this size may take to load, seconds."""
    return BASE_S + max(0.0, megabytes) / SLOWEST_MB_S


def usage(pid: int) -> tuple[float, ...]:
    """What moves while a process works: processor seconds, resident bytes, bytes read; empty for a process that is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        counted = getattr(process, "io_counters", lambda: None)()
        read = float(getattr(counted, "read_chars", 0) or 0)
        return (round(times.user + times.system, 1), float(process.memory_info().rss), read)
    except (psutil.Error, OSError):
        return ()


@dataclass
class LoadWatch:
    """One load under watch.

    Args:
        model: Which model.
        limit_s: Its deadline.
        sample: Gives the loading process's `usage`.
        clock: Monotonic seconds.
    """

    model: str
    limit_s: float
    sample: Callable[[], tuple[float, ...]]
    clock: Callable[[], float] = time.monotonic
    _started: float = field(init=False)
    _moved: float = field(init=False)
    _last: tuple[float, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self._started = self._moved = self.clock()

    def stuck(self) -> str | None:
        """Why the load must be given up; None while it may go on."""
        at = self.clock()
        seen = self.sample()
        if seen != self._last:
            self._last, self._moved = seen, at
        took = at - self._started
        if took > self.limit_s and at - self._moved > QUIET_S:
            return f"loading model {self.model} took {took:.0f} s (limit {self.limit_s:.0f} s) and stood still for {at - self._moved:.0f} s"
        if took > self.limit_s * PATIENCE:
            return f"loading model {self.model} took {took:.0f} s, {PATIENCE:.0f} times its limit"
        return None

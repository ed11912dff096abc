"""A breaker per model: what keeps failing to load is not loaded over and over by a storm of retries."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _State:
    failures: int = 0
    open_until: float = 0.0
    message: str = ""


class Breaker:
    """Counts failures by key and says when the next try may be made: after 2, 4, 8 … seconds.

    Args:
        most_s: Longest pause, seconds.
        clock: Monotonic seconds; tests move it.
    """

    def __init__(self, most_s: float = 300.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.most_s = most_s
        self._clock = clock
        self._states: dict[str, _State] = {}
        self._lock = threading.Lock()

    def wait_s(self, key: str) -> float:
        """Seconds until this key may be tried; 0 for now. When the pause is over one try is let through, then the next pause."""
        with self._lock:
            state = self._states.get(key)
            return max(0.0, state.open_until - self._clock()) if state else 0.0

    def failures(self, key: str) -> int:
        """Failures in a row."""
        with self._lock:
            state = self._states.get(key)
            return state.failures if state else 0

    def message(self, key: str) -> str:
        """What the last failure said."""
        with self._lock:
            state = self._states.get(key)
            return state.message if state else ""

    def failed(self, key: str, error: BaseException) -> float:
        """Note a failure. Returns the pause, seconds."""
        with self._lock:
            state = self._states.setdefault(key, _State())
            state.failures += 1
            # A text, never the exception: its frames would hold on to what was loaded half.
            state.message = f"{type(error).__name__}: {str(error)[:500]}"
            pause = min(2.0 ** min(state.failures, 30), self.most_s)
            state.open_until = self._clock() + pause
            return pause

    def worked(self, key: str) -> None:
        """Note that it loaded."""
        with self._lock:
            self._states.pop(key, None)

"""``CHAOS_CLOCKS``: this process's wall clock is wrong, by the seconds that stand in the file with its name in that folder.

It is in place before anything is imported, so that nobody has taken the right clock along, and it moves while the process runs.
The monotonic clock is right, as it is in life.
"""

import os
import threading
import time


def _install(path: str) -> None:
    real, real_ns = time.time, time.time_ns
    offset = [0.0]

    def read() -> None:
        try:
            with open(path) as file:
                offset[0] = float(file.read() or 0)
        except (OSError, ValueError):
            pass

    def follow() -> None:
        while True:
            time.sleep(0.1)
            read()

    read()
    time.chaos_real = real
    time.time = lambda: real() + offset[0]
    time.time_ns = lambda: real_ns() + int(offset[0] * 1e9)
    threading.Thread(target=follow, name="chaos-clock", daemon=True).start()


if os.environ.get("CHAOS_CLOCKS"):
    _install(os.path.join(os.environ["CHAOS_CLOCKS"], os.environ["CHAOS_MEMBER"]))

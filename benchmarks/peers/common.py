"""What all peers share: an empty job, and a count of how often it ran that costs them next to nothing.

Runs in the peers' own environment: nothing of the factory is imported here.

The job adds one to a counter of its own process and notes the clock. A thread of that process writes both to Valkey fifty times
a second, so that no job pays for a round trip of ours. The clock is the machine's monotonic one, the same in every process.
"""

import itertools
import json
import os
import threading
import time

import redis

URL = os.environ["BENCH_BROKER_URL"]
RUN = os.environ["BENCH_RUN"]
PERIOD_S = 0.02


class _State:
    pid = 0
    first = 0.0
    last = 0.0
    count = itertools.count()


def ran() -> None:
    """The whole of the job."""
    if _State.pid != os.getpid():
        _begin()
    next(_State.count)  # one step for the interpreter, so that no thread's job is lost
    _State.last = time.monotonic()


_lock = threading.Lock()


def _begin() -> None:
    with _lock:
        if _State.pid == os.getpid():
            return
        _State.count, _State.first = itertools.count(), time.monotonic()
        _State.pid = os.getpid()
        threading.Thread(target=_report, daemon=True).start()


def _report() -> None:
    client = redis.Redis.from_url(URL)
    told = -1
    while True:
        n = _State.count.__reduce__()[1][0]
        if n != told:
            client.hset(RUN, str(os.getpid()), json.dumps([n, _State.first, _State.last]))
            told = n
        time.sleep(PERIOD_S)


def submitted(begun: float, ended: float, cpu: float) -> None:
    """Tell how long submitting took, and how much CPU."""
    print(json.dumps({"begun": begun, "ended": ended, "cpu": cpu}))


def submit(send, jobs: int) -> None:
    """Call ``send`` once a job."""
    begun, cpu = time.monotonic(), time.process_time()
    for _ in range(jobs):
        send()
    submitted(begun, time.monotonic(), time.process_time() - cpu)


def submit_async(send, jobs: int, before=None, after=None, width: int = 100) -> None:
    """The same for libraries of coroutines: so many sends at once."""
    import asyncio

    async def work() -> None:
        if before:
            await before()
        begun, cpu = time.monotonic(), time.process_time()
        for start in range(0, jobs, width):
            await asyncio.gather(*(send() for _ in range(min(width, jobs - start))))
        ended, used = time.monotonic(), time.process_time() - cpu
        if after:
            await after()
        submitted(begun, ended, used)

    asyncio.run(work())


if __name__ == "__main__":
    import importlib
    import sys

    importlib.import_module(sys.argv[1]).submit(int(sys.argv[2]))

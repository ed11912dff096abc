"""The guard: a small process that outlives the supervisor by a moment and leaves none of its processes behind.

The supervisor starts it first and keeps the writing end of a pipe to its standard input. When that pipe closes, because the
supervisor ended in whatever way, SIGKILL included, the guard kills all processes that carry the supervisor's mark in their
environment (children and grandchildren inherit it, in whatever session or process group they are), and those whose ids it
was told (a process may overwrite its environment), and ends.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable

import psutil

MARK = "FACTORY_SUPERVISED"
"""Variable in the environment of every supervised process: ``<supervisor's token>:<service>``."""

LINGER = "FACTORY_LINGER_S"
"""Variable by which a process asks for a few seconds to end by itself once its siblings are dead: a worker's keeper uses
them to give the jobs of a killed child back."""

MAX_LINGER_S = 5.0

Known = tuple[int, float]
"""A process id and its time of creation in seconds since 1970: together they survive the reuse of ids."""


def identify(pid: int) -> Known | None:
    """Id and creation time of a running process, or None where it is gone."""
    try:
        return pid, psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def find(mark: str, known: Iterable[Known] = ()) -> list[psutil.Process]:
    """Processes of this user that carry a mark, or are known by id; never the caller itself.

    Args:
        mark: Value of `MARK`; one that ends with ``:`` stands for all services of that supervisor.
        known: Ids and creation times of further processes; their descendants are included.
    """
    found: dict[int, psutil.Process] = {}
    for pid, created in known:
        try:
            process = psutil.Process(pid)
            if abs(process.create_time() - created) < 0.1:
                for one in (process, *process.children(recursive=True)):
                    found[one.pid] = one
        except psutil.Error:
            continue
    for process in psutil.process_iter():
        try:
            # Only the environment tells; reading that of another user's process is refused, and it is none of ours.
            value = process.environ().get(MARK, "")
        except (psutil.Error, OSError):
            continue
        if value == mark or (mark.endswith(":") and value.startswith(mark)):
            found[process.pid] = process
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _alive(process)]


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def sweep(mark: str, known: Iterable[Known] = (), timeout_s: float = 10.0) -> int:
    """Kill everything that `find` finds, again and again until two looks in a row find nothing.

    Two, because a process in the middle of its ``exec`` shows no environment for an instant.

    Returns:
        How many processes were killed.

    Raises:
        TimeoutError: If some are still there after ``timeout_s`` (a process stuck in the kernel).
    """
    known = list(known)
    killed: set[int] = set()
    started = time.monotonic()
    quiet = 0
    while quiet < 2:
        left = find(mark, known)
        if not left:
            quiet += 1
            time.sleep(0.01)
            continue
        quiet = 0
        elapsed = time.monotonic() - started
        if elapsed > timeout_s:
            raise TimeoutError(f"processes {sorted(p.pid for p in left)} do not die")
        for process in left:
            try:
                if elapsed < _linger(process):
                    continue
                process.kill()
                killed.add(process.pid)
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=0.1)
    return len(killed)


def _linger(process: psutil.Process) -> float:
    try:
        return min(float(process.environ().get(LINGER, 0.0)), MAX_LINGER_S)
    except (ValueError, OSError):
        return 0.0


def main() -> None:
    """Read the token, then lines ``+PID CREATED`` and ``-PID``, until the pipe closes; then sweep."""
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(sig, signal.SIG_IGN)
    token = sys.stdin.readline().strip()
    known: dict[int, float] = {}
    for line in sys.stdin:
        pid, _, created = line[1:].strip().partition(" ")
        if line.startswith("+"):
            known[int(pid)] = float(created)
        else:
            known.pop(int(pid), None)
    if token:
        sweep(f"{token}:", known.items())


if __name__ == "__main__":
    main()

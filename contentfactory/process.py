"""Child processes that never outlive their parent. Standard library only, so that it also runs as a script by its path.

As a script (``python -I -S process.py PARENT_PID COMMAND …``) it asks the kernel to be killed with its parent and then
becomes the command. That is safe in a parent with threads, where ``preexec_fn`` is not.
"""

import ctypes
import gc
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
READY_FILE = "FACTORY_READY_FILE"
"""Variable that names the file by which a worker tells who started it that it listens to the broker."""


def die_with_parent(parent: int | None = None, sig: signal.Signals = signal.SIGKILL) -> bool:
    """Have the kernel send this process a signal once the thread that started it has ended (Linux).

    Call it first in a process that another one started, for example in Celery's ``worker_process_init``. It survives
    ``exec`` and is not inherited by children.

    Args:
        parent: Process that must still be the parent; where it is gone already, this process ends at once.
        sig: The signal.

    Returns:
        Whether the system knows such a thing. Elsewhere only the guard (``producer.guard``) cleans up.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0) != 0:
        return False
    if parent is not None and os.getppid() != parent:
        os._exit(128 + int(sig))
    return True


def tied(command: list[str]) -> list[str]:
    """The command line that runs ``command`` so that it dies with the thread that starts it."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *command]


def collect_rarely(*, first: bool = True) -> None:
    """Look for cycles of objects as seldom as a process can afford that makes thousands of small ones at a time and hardly a cycle.

    Call it once all is loaded: what is there then is never looked through again.

    Args:
        first: Whether to look for the last time now. What loading leaves behind is a few hundred objects, and to find them takes the tenth part
            of what loading took: a process on whose start others wait keeps them.
    """
    if first:
        gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])

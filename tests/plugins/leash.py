"""Runs a server for as long as the process that started this lives, and removes its folder afterwards.

Used as a script: ``leash.py PARENT_PID FOLDER STOP_SIGNAL USER COMMAND...`` (USER empty: the same one). The
test process may be killed with SIGKILL: then this one sees that it has another parent. If this one is killed,
the kernel kills the server (Linux).
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1


def main() -> int:
    parent, folder, stop, user, command = (
        int(sys.argv[1]),
        sys.argv[2],
        int(sys.argv[3]),
        sys.argv[4],
        sys.argv[5:],
    )
    # Looked up before the fork: the child may do next to nothing before it becomes the server.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def die_with_me() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, stop)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    identity = {"user": user, "group": os.stat(folder).st_gid, "extra_groups": []} if user else {}
    server = subprocess.Popen(command, cwd=folder, preexec_fn=die_with_me, **identity)
    try:
        while server.poll() is None and os.getppid() == parent:
            time.sleep(0.05)
        return server.returncode or 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if server.poll() is None:
            server.send_signal(stop)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        if os.getppid() != parent:  # else the fixture does it, which may want to look at the log first
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

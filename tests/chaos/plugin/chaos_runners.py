"""Runners of the kinds that misbehave."""

import errno
import os
import signal
import time

import chaos_kinds
from chaos_kinds import ChaosWide, ChaosWork

from worker import failpoints
from worker.context import Output
from worker.runners import runs


def _run(params, context):
    for job, one in enumerate(params):
        failpoints.reached(failpoints.IN_MODEL)
        context.progress(job, 0.0)
        if one.act == "poison":
            chaos_kinds.note("inject", fault="poison", group=len(params))
            os.kill(os.getpid(), signal.SIGKILL)
        if one.act == "memory" or (one.act == "crowd" and len(params) > 4):
            chaos_kinds.note("inject", fault="memory", group=len(params))
            raise MemoryError(f"no room for {len(params)}")
        if one.act == "hang":
            chaos_kinds.note("inject", fault="hang", group=len(params))
            while True:
                time.sleep(60)
        if one.act == "bug":
            raise RuntimeError("a bug on purpose")
        if one.act == "disk" and chaos_kinds.take_ticket("disk", 20):
                chaos_kinds.note("inject", fault="disk", group=len(params))
                raise OSError(errno.ENOSPC, "No space left on device")
        if one.act == "handles" and chaos_kinds.take_ticket("handles", 20):
            chaos_kinds.note("inject", fault="handles", group=len(params))
            held = []
            try:
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            finally:
                for handle in held:
                    os.close(handle)
        end = time.monotonic() + one.seconds
        while (left := end - time.monotonic()) > 0:
            if context.cancelled(job):
                break
            context.progress(job, 1 - left / one.seconds)
            time.sleep(min(left, 0.1))
        if context.cancelled(job):
            context.check(job)
        yield Output(job, "text.txt", "text/plain", f"{one.text}:{context.seeds[job]}".encode())


runs(ChaosWork)(_run)
runs(ChaosWide)(_run)

"""Runners of the kinds that misbehave."""

import errno
import os
import signal
import time

import chaos_kinds
from chaos_kinds import ChaosLook, ChaosWide, ChaosWork

from contentfactory.errors import FactoryError
from worker import failpoints
from worker.context import Failure, Output
from worker.media import audio, video
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
                # The uploads and the commit of the group before this one run meanwhile, in the same process.
                time.sleep(0.5)
                for handle in held:
                    os.close(handle)
        if one.act == "scratch":
            path = context.scratch / f"work-{job}.bin"
            with open(path, "wb") as out:
                for _ in range(16):
                    out.write(os.urandom(16_384))
            if path.stat().st_size != 16 * 16_384:
                raise RuntimeError("the file system took less than it said")
            path.unlink()
        end = time.monotonic() + one.seconds
        while (left := end - time.monotonic()) > 0:
            if context.cancelled(job):
                break
            context.progress(job, 1 - left / one.seconds)
            time.sleep(min(left, 0.1))
        if context.cancelled(job):
            context.check(job)
        yield Output(job, "text.txt", "text/plain", f"{one.text}:{context.seeds[job]}".encode())


@runs(ChaosLook)
def _look(params, context):
    for job, one in enumerate(params):
        try:
            if one.sound is not None:
                heard = audio.decode(context.fetch(job, one.sound), max_seconds=60, name="sound")
                seen = f"{heard.sample_rate} Hz, {heard.duration_s:.2f} s"
            else:
                pictures = list(video.frames(context.fetch(job, one.clip), name="clip"))
                seen = f"{len(pictures)} frames"
        except FactoryError as error:
            yield Failure(job, error)
            continue
        yield Output(job, "seen.txt", "text/plain", seen.encode())


runs(ChaosWork)(_run)
runs(ChaosWide)(_run)

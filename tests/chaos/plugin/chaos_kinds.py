"""Kinds that misbehave on purpose, and the faults that must happen inside a worker or timer.

A folder with a ``.dist-info`` on PYTHONPATH is an installed package as far as entry points go: the processes under test load
this by the same mechanism as anybody's own kinds. What it does to a process is told by ``CHAOS_*`` variables; without them it
only declares the kinds.
"""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from contentfactory.jobs.spec import AudioInput, Params, RetryPolicy, Text, VideoInput, kind

_QUICK = RetryPolicy(backoff_s=0.2, backoff_max_s=2.0, transient=20)
_clock = getattr(time, "chaos_real", time.time)  # see sitecustomize.py


class _Act(Params):
    text: Text = Field(description="what comes back, with the seed behind it")
    seconds: float = Field(default=0.0, ge=0, le=600, description="work, seconds")
    act: Literal["work", "poison", "crowd", "memory", "hang", "bug", "disk", "handles", "scratch"] = Field(
        default="work",
        description="work; kill the process; run out of memory in company or always; hang; raise; say that the disk is full; use all "
        "handles up; write to the scratch folder",
    )


@kind(
    "chaos.work", queue="text", outputs=("text/plain",), max_group=8, cacheable=False, progress_s=4, time_limit_s=120, retry=_QUICK,
    seconds=lambda p: p.seconds or 0.005,
)  # fmt: skip
class ChaosWork(_Act):
    """Work for a while, in small groups."""


@kind(
    "chaos.wide", queue="text", outputs=("text/plain",), max_group=32, wait_s=1.0, cacheable=False, progress_s=4, time_limit_s=120, retry=_QUICK,
    seconds=lambda p: p.seconds or 0.005,
)  # fmt: skip
class ChaosWide(_Act):
    """The same in groups of 32."""


@kind("chaos.look", queue="image", outputs=("text/plain",), max_group=16, cacheable=False, retry=_QUICK)
class ChaosLook(Params):
    """Decode a sound or a video through the functions that every runner uses, and say what was seen."""

    sound: AudioInput | None = None
    clip: VideoInput | None = None


# --- faults inside a process ----------------------------------------------------------------------------------------


def note(event: str, **data: object) -> None:
    """Append a line to the history; one write, so that it is whole even if the process is killed the next moment."""
    path = os.environ.get("CHAOS_HISTORY")
    if not path:
        return
    line = json.dumps({"at": _clock(), "event": event, "pid": os.getpid(), "worker": os.environ.get("FACTORY_WORKER_NAME"), **data})
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode() + b"\n")
    finally:
        os.close(handle)


def stream(purpose: str) -> random.Random:
    """Random numbers for one purpose in this life of this worker, determined by the seed of the run."""
    folder = Path(os.environ["CHAOS_HISTORY"]).parent / "lives"
    folder.mkdir(exist_ok=True)
    name = f"{purpose}-{os.environ.get('FACTORY_WORKER_NAME', 'timer')}"
    for life in range(100_000):
        try:
            os.close(os.open(folder / f"{name}-{life}", os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            continue
    return random.Random(f"{os.environ.get('CHAOS_SEED', '0')}/{name}/{life}")


def take_ticket(kind_: str, limit: int) -> bool:
    """Whether one more of a bounded number of strikes is left."""
    folder = Path(os.environ["CHAOS_HISTORY"]).parent / "tickets"
    folder.mkdir(exist_ok=True)
    for n in range(limit):
        try:
            os.close(os.open(folder / f"{kind_}-{n}", os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            continue
    return False


def _install_kills(spec: dict) -> None:
    """``CHAOS_KILL``: {"shares": {place: probability}, "limit": most kills at each place, "tree": share that take the whole tree}."""
    from worker import failpoints

    dice: list[random.Random] = []

    def hook(place: str) -> None:
        if not dice:
            dice.append(stream("kill"))
        if dice[0].random() >= spec["shares"].get(place, 0.0) or not take_ticket(f"kill-{place}", int(spec["limit"])):
            return
        whole = dice[0].random() < spec.get("tree", 0.0)
        note("inject", fault="kill", place=place, scope="tree" if whole else "child")
        if whole:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    failpoints.hook = hook


def _install_copies(most: int) -> None:
    """``CHAOS_COPIES``: each hint is sent one to so many times, in any order."""
    from producer.publish import Publisher

    send, dice = Publisher.send, []

    def many(self, hints):
        if not dice:
            dice.append(stream("copies"))
        copies = [hint for hint in hints for _ in range(dice[0].randint(1, most))]
        dice[0].shuffle(copies)
        note("inject", fault="copies", n=len(copies) - len(hints))
        return list(dict.fromkeys(send(self, copies)))

    Publisher.send = many


def _install() -> None:
    if os.environ.get("CHAOS_KILL"):
        _install_kills(json.loads(os.environ["CHAOS_KILL"]))
    if os.environ.get("CHAOS_COPIES"):
        _install_copies(int(os.environ["CHAOS_COPIES"]))
    if os.environ.get("CHAOS_NOFILE"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(os.environ["CHAOS_NOFILE"]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


_install()

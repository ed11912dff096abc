"""Runners: one function a kind of job, bound to its declaration with `runs`."""

import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, TypeVar

from contentfactory.jobs.spec import Params
from worker.context import JobContext, Yield

P = TypeVar("P", bound=Params)
Runner = Callable[[list[Any], JobContext], Iterator[Yield]]
ENTRY_POINT_GROUP = "contentfactory.runners"

MODULES = {
    "audio.music": "worker.runners.audio.music",
    "audio.speech": "worker.runners.audio.speech",
    "audio.transcribe": "worker.runners.audio.transcribe",
    "image.compose": "worker.runners.image.compose",
    "image.generate": "worker.runners.image.generate",
    "image.stylize": "worker.runners.image.stylize",
    "image.upscale": "worker.runners.image.upscale",
    "text.chat": "worker.runners.text.generate",
    "text.echo": "worker.runners.text.echo",
    "train.flow": "worker.runners.train.flow",
    "video.compose": "worker.runners.video.compose",
    "text.embed": "worker.runners.text.embed",
    "text.generate": "worker.runners.text.generate",
}
"""Module of each built-in kind's runner: a worker imports a runner, and its libraries, when the first job of it comes."""

_RUNNERS: dict[str, Runner] = {}


def runs(params: type[P]) -> Callable[[Callable[[list[P], JobContext], Iterator[Yield]]], Runner]:
    """Bind a runner to a kind.

    The function gets the params of a micro-batch and its context, and yields `Output`, `Failure` and `NewModel`. A job
    that neither fails nor yields an output is a bug of the runner.

    Args:
        params: The kind's params class.

    Raises:
        ValueError: If the kind already has a runner.
    """

    def bind(function: Callable[[list[P], JobContext], Iterator[Yield]]) -> Runner:
        name = params.spec.name
        if name in _RUNNERS:
            raise ValueError(f"kind {name} has two runners: {_RUNNERS[name].__module__} and {function.__module__}")
        _RUNNERS[name] = function
        return function

    return bind


def get_runner(kind: str) -> Runner:
    """The runner of a kind, imported now if it is not yet.

    Raises:
        LookupError: If no runner is bound to the kind.
    """
    if kind not in _RUNNERS:
        if kind in MODULES:
            importlib.import_module(MODULES[kind])
        else:
            for point in entry_points(group=ENTRY_POINT_GROUP):
                if point.name == kind:
                    point.load()
    if kind not in _RUNNERS:
        raise LookupError(f"kind {kind} has no runner; bind one with @runs and name its module in worker.runners.MODULES")
    return _RUNNERS[kind]

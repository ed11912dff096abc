"""``python -m contentfactory.service MODULE ARGUMENT…`` is ``python -m MODULE ARGUMENT…``, sooner ready.

`factory up` starts its processes at once, and what they do first is load libraries, on all cores. An eighth of that is spared here: the
collector does not look again and again through what has just been loaded and stays, and libraries come without companions that no service uses
(structlog loads rich for coloured tracebacks, redis-py the SDK of OpenTelemetry for metrics of its own, Celery's commands pygments).
"""

import gc
import importlib
import runpy
import sys
from collections.abc import Sequence

LOADING = (100_000, 20, 20)
"""Thresholds of the collector while a process loads; `contentfactory.process.collect_rarely` sets those of a loaded one."""
UNUSED = ("rich", "opentelemetry.sdk.metrics", "pygments")
LIBRARIES = ("structlog", "redis")


def load_quickly(libraries: Sequence[str] = LIBRARIES) -> None:
    """Let the collector rest, and load libraries as if what they can do without were not installed; others may load that later."""
    gc.set_threshold(*LOADING)
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        for name in libraries:
            importlib.import_module(name)
    finally:
        for name in hidden:
            del sys.modules[name]


def main() -> None:
    """Run the module."""
    load_quickly()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

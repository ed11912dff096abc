"""The Celery application: ``celery -A worker worker -Q text,image``.

This module is the entry point of a worker, so it reads the settings on import. It stays light: torch
comes in with the first job that needs it, and only in the pool's child.
"""

import gc
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from celery import Celery, signals

from contentfactory.ids import is_id
from contentfactory.jobs.spec import load_kinds
from contentfactory.process import READY_FILE, collect_rarely, die_with_parent
from contentfactory.settings import load_settings
from producer.logs import configure_logs
from producer.publish import celery_options
from worker.drain import drain_file

log = structlog.get_logger(__name__)

settings = load_settings()
app = Celery("factory", broker=settings.broker(), set_as_current=True, events="worker.consumer:Events")
app.conf.update(
    celery_options(),
    # The ledger's lease rescues lost work. Acknowledging late keeps the next hint on the broker until this one is done.
    task_acks_late=True,
    task_reject_on_worker_lost=False,
    task_track_started=False,
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # A child that starts afresh: no CUDA after fork, no inherited connections.
    worker_pool_start_method="spawn",
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_send_task_events=True,
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    broker_connection_max_retries=None,
    # A key of the wrong type, a full broker: try again, never give up.
    broker_channel_error_retry=True,
    worker_consumer="worker.consumer:Consumer",
    task_queues=None,
    task_routes={spec.name: {"queue": spec.queue} for spec in load_kinds().values()},
    worker_proc_alive_timeout=120.0,
)

MAX_IDS = 4096
_executor: Any = None


def executor() -> Any:
    """This process's executor, made on first use (never in the pool's parent)."""
    global _executor
    if _executor is None:
        from worker.execution import Executor

        _executor = Executor(settings)
    return _executor


def _declare(name: str) -> None:
    def run(ids: Any) -> None:
        # Whatever lies on the broker is a hint by an unknown hand: check its form, then let SQL decide.
        if not isinstance(ids, list) or not 0 < len(ids) <= MAX_IDS or not all(isinstance(i, str) and is_id(i, "job") for i in ids):
            log.warning("bad_hint", action="drop", kind=name)
            return
        executor().run(name, ids)

    app.task(name=name, ignore_result=True, acks_late=True, max_retries=0)(run)


for _kind in load_kinds():
    _declare(_kind)


@signals.celeryd_init.connect
def _remember(sender: str = "worker", options: dict[str, Any] | None = None, **_: Any) -> None:
    # The pool's children are spawned: what they must know of this worker goes with the environment.
    os.environ["FACTORY_WORKER_NAME"] = str(sender)
    queues = (options or {}).get("queues") or []
    os.environ["FACTORY_WORKER_QUEUES"] = queues if isinstance(queues, str) else ",".join(queues)


@signals.setup_logging.connect
def _logging(**_: Any) -> None:
    configure_logs(settings)


@signals.worker_process_init.connect
def _start_child(**_: Any) -> None:
    die_with_parent()
    configure_logs(settings)
    if not drain_file(settings).exists():  # who is told to stop while it starts has nothing to prepare
        executor()
    collect_rarely()  # a micro-batch costs a seventh less


@signals.worker_process_shutdown.connect
def _stop_child(**_: Any) -> None:
    if _executor is not None:
        _executor.close()


@signals.worker_ready.connect
def _tell_ready(**_: Any) -> None:
    if sign := os.environ.get(READY_FILE):
        with suppress(OSError):
            Path(sign).touch()
    if not gc.get_freeze_count():  # not after each loss of the broker: what is frozen is kept for good
        collect_rarely(first=False)


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:
    # Runs in the pool's parent; its child looks for this file and gives resumable work back.
    path = drain_file(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@signals.worker_init.connect
def _undrain(**_: Any) -> None:
    drain_file(settings).unlink(missing_ok=True)


__all__ = ["app"]

"""What the embedded profile runs: its services in order, and how each is called. `producer.supervisor` starts them and keeps them alive."""

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from contentfactory.process import READY_FILE
from contentfactory.settings import Settings, private_value
from producer.broker import prepare


@dataclass(frozen=True)
class Service:
    """One supervised process.

    Attributes:
        name: Unique; also the name of its log file.
        command: Command line.
        env: Variables added to the supervisor's own environment.
        stdin: What it reads from standard input; nothing where empty.
        ready: Whether it does its work; asked again and again until it says so. None: ready as soon as it runs.
        on_ready: Called each time it becomes ready.
        ready_timeout_s: Longest time until it must be ready, seconds.
        gate: Whether the services after it wait until it is ready.
        group: Neighbours of one group are stopped together.
        stop_timeout_s: Time to end after SIGTERM before SIGKILL, seconds.
        essential: Whether everything stops when it is given up.
        ledger: Whether it opens the ledger, which is prepared while others start.
        sign: File that it makes when it does its work; one of a process before it is deleted before it starts.
        lock: Takes a lock and returns its file descriptor, which the process inherits and thereby holds while it lives.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: str = field(default="", repr=False)
    ready: Callable[[], bool] | None = None
    on_ready: Callable[[], None] | None = None
    ready_timeout_s: float = 120.0
    gate: bool = False
    group: str = ""
    stop_timeout_s: float = 10.0
    essential: bool = True
    ledger: bool = False
    sign: Path | None = None
    lock: Callable[[], int] | None = None


def worker_command(settings: Settings, queues: Sequence[str] | str, name: str) -> list[str]:
    """The command line of one worker: one device, one prefork child.

    Args:
        settings: Settings.
        queues: Queues that it serves, as a list or joined by commas.
        name: First half of its host name; the second is this machine's.
    """
    joined = queues if isinstance(queues, str) else ",".join(queues)
    # Gossip and mingle are chatter between workers that know of each other's work; here the ledger knows. Events feed Flower.
    return [
        sys.executable, "-m", "celery", "-A", "worker", "worker", "--queues", joined, "--hostname", worker_host(name),
        "--concurrency", "1", "--pool", "prefork", "--without-gossip", "--without-mingle", "--task-events",
        "--loglevel", settings.log_level.upper(),
    ]  # fmt: skip


def worker_host(name: str) -> str:
    """A worker's host name, under which Flower and Celery's control commands know it."""
    return f"{name}@{socket.gethostname()}"


def lean(command: Sequence[str]) -> list[str]:
    """The same command line by `worker.lean`, which loads less of Celery."""
    return ["worker.lean" if part == "celery" else part for part in command]


def flower_command() -> list[str]:
    """The command line of Flower; everything else, its login first of all, comes by `flower_env`."""
    return [sys.executable, "-m", "celery", "-A", "producer.watching", "flower"]


def flower_env(settings: Settings, port: int) -> dict[str, str]:
    """Flower's options as variables: a command line can be read by every user of the machine."""
    return {
        "FLOWER_ADDRESS": settings.flower_host,
        "FLOWER_PORT": str(port),
        "FLOWER_BASIC_AUTH": f"{settings.flower_user}:{flower_password(settings)}",
        "FLOWER_PERSISTENT": "True",
        "FLOWER_DB": str(settings.state_dir / "flower" / "state"),
        "FLOWER_STATE_SAVE_INTERVAL": "10000",
        "FLOWER_MAX_TASKS": "20000",
        # The routing key is the queue; the arguments are ids.
        "FLOWER_TASKS_COLUMNS": "name,routing_key,state,worker,received,runtime,args",
    }


def flower_password(settings: Settings) -> str:
    """The password of Flower's login; made on first use where none is set."""
    if settings.flower_password is not None:
        return settings.flower_password.get_secret_value()
    return private_value(settings.run_dir / "flower.password")


def plan(
    settings: Settings, *, workers: Mapping[str, int] | None = None, timer: bool = True, flower: int | None = None
) -> list[Service]:
    """The services of the embedded profile, in the order in which they start (they stop in the reverse order).

    Args:
        settings: Settings; with a broker of their own in it, none is started.
        workers: Workers by queues, as in ``Settings.embedded_workers``, which is the default.
        timer: Whether to run the dispatcher's timer.
        flower: Port of Flower; None leaves it out.
    """
    base = settings.environment()
    services: list[Service] = []
    if settings.embedded_broker:
        services.append(_broker_service(settings))
    if flower is not None:
        (settings.state_dir / "flower").mkdir(parents=True, exist_ok=True)
        services.append(
            Service(
                "flower", lean(flower_command()), {**base, **flower_env(settings, flower)}, ready=lambda: _answers(settings.flower_host, flower), essential=False
            )
        )
    if timer:
        services.append(Service("timer", [sys.executable, "-m", "contentfactory.service", "producer.timer"], base, ledger=True))
    chosen = settings.embedded_workers if workers is None else workers
    total = max(1, sum(chosen.values()))
    env = {
        **base,
        "FACTORY_MODEL_CACHE_MB": str(max(64, settings.model_cache_mb // total)),
        # Read when the libraries load, so it must be there before them.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(settings.torch_threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONFAULTHANDLER": "1",
    }
    names = {
        queues.replace(",", "-") + (f"-{number}" if count > 1 else ""): queues
        for queues, count in chosen.items() for number in range(1, count + 1)
    }  # fmt: skip
    for name, queues in names.items():
        sign = settings.run_dir / f"{name}.ready"
        services.append(
            Service(
                name, lean(worker_command(settings, queues, name)), {**env, READY_FILE: str(sign)}, ready=sign.exists, sign=sign,
                ledger=True, group="workers", stop_timeout_s=settings.drain_s,
            )
        )  # fmt: skip
    return services


def _broker_service(settings: Settings) -> Service:
    broker = prepare(settings)

    def publish() -> None:
        write_private(
            settings.run_dir / "broker.json",
            json.dumps({"celery_url": broker.celery_url, "redis_url": broker.redis_url}),
        )

    return Service(
        "broker", broker.command, stdin=broker.config, ready=broker.ping, on_ready=publish, gate=True, lock=broker.lock,
        ready_timeout_s=300.0,
    )  # fmt: skip


def _answers(host: str, port: int) -> bool:
    """Whether something serves HTTP there; by the standard library, which asks no proxy and is loaded at once."""
    connection = HTTPConnection(host, port, timeout=1.0)
    try:
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status < 500
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def write_private(path: Path, text: str) -> None:
    """Replace a file as a whole; only its owner may read it."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as stream:
        stream.write(text)
    os.replace(temp, path)

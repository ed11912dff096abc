"""The embedded profile's processes: started in order, kept alive, stopped in order, never left behind.

`factory up` and `factory run` hold one `Supervisor` for a state folder. It starts the broker and, once that answers, Flower,
the dispatcher's timer and the workers, each in a session of its own with its output in ``logs/<service>.log``. A service that
ends is started again with growing waits; one that keeps ending stops everything with a message that shows why.

Three nets keep a process from being left behind: the stop order below, the kernel's parent-death signal on each child, and the
guard (`producer.guard`), which also finds grandchildren and survives a SIGKILL of the supervisor.
"""

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psutil
import structlog

from contentfactory.errors import Conflict, ServiceUnavailable
from contentfactory.process import tied
from contentfactory.settings import Settings
from producer.broker import free_port
from producer.guard import MARK, Known, identify, sweep
from producer.plan import Service, plan, write_private

log = structlog.get_logger(__name__)

TICK_S = 0.1
HEALTHY_S = 60.0
"""A service that ran this long before it ended starts again at once and with a clean record."""
MAX_CRASHES = 5
"""Ends in a row, each before `HEALTHY_S`, after which a service is given up."""
BACKOFF_S, BACKOFF_MAX_S = 0.5, 10.0
KEPT_LOGS = 3
"""Rotated log files kept for each service."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the holder of the supervisor to stop.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass(frozen=True)
class SupervisorInfo:
    """What others may know of a running supervisor.

    Attributes:
        pid: Its process.
        started_at: Seconds since 1970.
        services: Process id of each service that runs.
        flower_url: Address of Flower, where it runs.
    """

    pid: int
    started_at: float = 0.0
    services: Mapping[str, int] = field(default_factory=dict)
    flower_url: str | None = None


# Running


@dataclass
class _Child:
    """A service and what is known of its process."""

    service: Service
    process: subprocess.Popen[bytes] | None = None
    known: Known | None = None
    is_ready: bool = False
    started: float = 0.0
    restart_at: float | None = 0.0
    crashes: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_CRASHES))
    restarts: int = 0
    given_up: bool = False


class Supervisor:
    """Holds the processes of one state folder; use it as a context manager.

    In the main thread it turns SIGTERM and SIGHUP into `Interrupted`, as Ctrl-C raises `KeyboardInterrupt`, so that the
    ``with`` block ends and everything is stopped in order; the next signal after that kills at once. Under ``nohup`` SIGHUP
    stays ignored.

    Args:
        settings: Settings.
        workers: Workers by queues; ``settings.embedded_workers`` where left out.
        flower: Whether to run Flower.
        timer: Whether to run the dispatcher's timer.
        services: Services to run instead of the usual ones.
        prepare: Prepares the ledger, once the state folder is taken; services that need it start afterwards.

    Attributes:
        flower_url: Address of Flower once started, where it runs.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        workers: Mapping[str, int] | None = None,
        flower: bool = True,
        timer: bool = True,
        services: Sequence[Service] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.settings = settings
        self._prepare, self._prepared = prepare, threading.Event()
        self.flower_url: str | None = None
        self._workers, self._flower, self._timer, self._services = workers, flower, timer, services
        self._token = secrets.token_hex(16)
        self._children: list[_Child] = []
        self._guard: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._stop, self._kill = threading.Event(), threading.Event()
        self._failure = ""
        self._started_at = 0.0
        self._lock: int | None = None
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Take the state folder and begin to start the services; `wait_ready` waits for them.

        Raises:
            Conflict: If another supervisor holds the folder.
            ConfigError: If no broker can run here.
        """
        if self._thread is not None:
            raise RuntimeError("this supervisor was started before; make another one")
        # The ledger holds prompts and the run folder secrets: others of this machine have no business there.
        self.settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.settings.run_dir.mkdir(exist_ok=True)
        self.settings.run_dir.chmod(0o700)
        self.settings.log_dir.mkdir(exist_ok=True)
        self._lock = _take_lock(self.settings)
        try:
            _sweep_leftovers(self.settings)
            services = self._services
            if services is None:
                port = free_port(self.settings.flower_port, self.settings.flower_host) if self._flower else None
                services = plan(self.settings, workers=self._workers, timer=self._timer, flower=port)
                self.flower_url = f"http://{self.settings.flower_host}:{port}" if port else None
            self._children = [_Child(service) for service in services]
            self._started_at = time.time()
            self._publish()
            self._catch_signals()
            # The parent-death signal follows the thread that started a child, so one thread starts all of them.
            self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
            self._thread.start()
            if self._prepare:
                self._prepare()
            self._prepared.set()
        except BaseException:
            self.stop()
            raise

    def wait_ready(self, timeout_s: float = 180.0) -> None:
        """Wait until every service that is not given up does its work.

        Args:
            timeout_s: Longest wait, seconds.

        Raises:
            ServiceUnavailable: If a service was given up or the time passed; the message shows the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not all(child.is_ready or child.given_up for child in self._children):
                self._raise_failure()
                left = deadline - time.monotonic()
                if left <= 0:
                    late = next(child for child in self._children if not (child.is_ready or child.given_up))
                    raise ServiceUnavailable(
                        f"{late.service.name} is not ready after {timeout_s:.0f} s{self._tail(late.service)}", code="not_ready"
                    )
                self._changed.wait(min(left, 0.5))
            self._raise_failure()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Stay until a signal asks to stop (or everything failed).

        Args:
            timeout_s: Longest stay, seconds; None stays on.

        Returns:
            Whether a stop was asked for; False when the time passed.

        Raises:
            ServiceUnavailable: If a service was given up.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not self._stop.wait(0.2):
                self._raise_failure()
                if deadline is not None and time.monotonic() >= deadline:
                    return False
        except KeyboardInterrupt:
            return True
        self._raise_failure()
        return True

    def check(self) -> None:
        """Raise `ServiceUnavailable` if a service was given up; for loops that do other things meanwhile."""
        self._raise_failure()

    def status(self) -> dict[str, dict[str, Any]]:
        """State (``starting``, ``ready``, ``waiting``, ``given up``), process id and restarts of each service."""
        out: dict[str, dict[str, Any]] = {}
        for child in self._children:
            state = "given up" if child.given_up else "ready" if child.is_ready else "starting" if child.process else "waiting"
            out[child.service.name] = {
                "state": state, "pid": child.process.pid if child.process else None, "restarts": child.restarts,
                "log": str(_log_path(self.settings, child.service.name)),
            }  # fmt: skip
        return out

    def stop(self) -> None:
        """Stop everything in order and let go of the state folder. Harmless when called again."""
        self._stop.set()
        thread = self._thread
        while thread is not None and thread.is_alive():
            # Short joins: a signal's handler runs between them, in the main thread.
            thread.join(0.2)
        self._release()

    def kill(self) -> None:
        """Stop everything at once, without a drain; `stop` still has to be called (or the ``with`` block left)."""
        self._kill.set()
        self._stop.set()

    # Inside the supervising thread

    def _run(self) -> None:
        try:
            self._start_guard()
            next_rotation = 0.0
            while not self._stop.is_set():
                if self._guard is None or self._guard.poll() is not None:
                    self._start_guard()
                self._look()
                if time.monotonic() >= next_rotation:
                    for child in self._children:
                        rotate(_log_path(self.settings, child.service.name), self.settings.log_max_mb * 2**20)
                    next_rotation = time.monotonic() + 5.0
                self._stop.wait(TICK_S)
        except Exception as error:
            log.exception("supervisor_failed", action="supervisor_failed")
            self._fail(f"the supervisor failed: {type(error).__name__}: {error}")
        finally:
            self._shut_down()
            with self._changed:
                self._changed.notify_all()

    def _look(self) -> None:
        """One round: note who ended, start who is due, then ask who is not ready yet (an answer may take a moment)."""
        for child in self._children:
            if self._stop.is_set():
                return
            if child.given_up:
                continue
            if child.process is not None and child.process.poll() is not None:
                self._ended(child)
            due = child.restart_at is not None and time.monotonic() >= child.restart_at
            if child.process is None and due and (self._prepared.is_set() or not child.service.ledger):
                self._spawn(child)
            if child.service.gate and not child.is_ready:
                break
        for child in self._children:
            if child.process is not None and not child.is_ready and not self._stop.is_set():
                self._ask(child)

    def _ask(self, child: _Child) -> None:
        service = child.service
        if service.ready is None or service.ready():
            # An old owner of the address may have answered while ours has ended.
            if child.process is not None and child.process.poll() is None:
                child.is_ready = True
                if service.on_ready:
                    service.on_ready()
                log.info("service_ready", action="service_ready", service=service.name, seconds=round(time.monotonic() - child.started, 2))
                self._publish()
        elif time.monotonic() - child.started > service.ready_timeout_s:
            child.process.kill() if child.process else None
            child.crashes.append(f"not ready after {service.ready_timeout_s:.0f} s")

    def _spawn(self, child: _Child) -> None:
        service = child.service
        path = _log_path(self.settings, service.name)
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **service.env, MARK: f"{self._token}:{service.name}"}
        if service.sign:
            service.sign.unlink(missing_ok=True)
        handle = service.lock() if service.lock else None
        try:
            with open(path, "ab") as stream:
                process = subprocess.Popen(
                    tied(list(service.command)), stdin=subprocess.PIPE if service.stdin else subprocess.DEVNULL,
                    stdout=stream, stderr=subprocess.STDOUT, env=env, start_new_session=True,
                    pass_fds=() if handle is None else (handle,),
                )  # fmt: skip
        finally:
            if handle is not None:
                os.close(handle)
        child.process, child.started, child.restart_at, child.is_ready = process, time.monotonic(), None, False
        child.known = identify(process.pid)
        if child.known:
            self._tell_guard(f"+{child.known[0]} {child.known[1]!r}")
        if process.stdin is not None:
            try:
                process.stdin.write(service.stdin.encode())
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended already; the next round says so
        log.info("service_started", action="service_started", service=service.name, pid=process.pid)
        self._publish()

    def _ended(self, child: _Child) -> None:
        """Clean up after a process that ended by itself, and decide whether and when it starts again."""
        service, process = child.service, child.process
        if process is None:
            return
        code, ran = process.returncode, time.monotonic() - child.started
        self._forget(child)
        # What it started must not go on beside its successor.
        self._sweep(service.name)
        if ran >= HEALTHY_S:
            child.crashes.clear()
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        child.crashes.append(reason)
        child.restarts += 1
        if len(child.crashes) < MAX_CRASHES:
            wait = min(BACKOFF_S * 2 ** (len(child.crashes) - 1), BACKOFF_MAX_S)
            child.restart_at = time.monotonic() + wait
            log.warning("service_ended", action="service_ended", service=service.name, reason=reason, restart_in_s=wait)
        else:
            child.given_up = True
            message = f"{service.name} ended {MAX_CRASHES} times in a row ({', '.join(child.crashes)}){self._tail(service)}"
            log.error("service_given_up", action="service_given_up", service=service.name, reason=reason)
            if service.essential:
                self._fail(message)
        self._publish()

    def _sweep(self, service: str) -> None:
        """Kill what carries the mark of a service (of all, where empty); one stuck in the kernel must not stop the rest."""
        try:
            sweep(f"{self._token}:{service}")
        except TimeoutError as error:
            log.warning("processes_stuck", action="processes_stuck", service=service, reason=str(error))

    def _forget(self, child: _Child) -> None:
        if child.known:
            self._tell_guard(f"-{child.known[0]}")
        child.process, child.known, child.is_ready = None, None, False

    def _shut_down(self) -> None:
        """Stop the services, last started first; each group gets SIGTERM, its time, then SIGKILL."""
        for _, neighbours in groupby(reversed(self._children), key=lambda c: c.service.group or c.service.name):
            group = [child for child in neighbours if child.process is not None]
            for child in group:
                if child.process and child.process.poll() is None:
                    log.info("service_stopping", action="service_stopping", service=child.service.name)
                    child.process.terminate()
            for child in group:
                deadline = time.monotonic() + child.service.stop_timeout_s
                while child.process and child.process.poll() is None:
                    if self._kill.is_set() or time.monotonic() >= deadline:
                        if not self._kill.is_set():
                            log.warning("service_killed", action="service_killed", service=child.service.name, after_s=child.service.stop_timeout_s)
                        child.process.kill()
                        child.process.wait()
                    time.sleep(0.02)
                self._sweep(child.service.name)
                self._forget(child)
        self._sweep("")
        if self._guard is not None and self._guard.stdin is not None:
            try:
                self._guard.stdin.close()
            except BrokenPipeError:
                pass
            try:
                self._guard.wait(10)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
            self._guard = None
        for name in ("broker.json", "supervisor.json"):
            (self.settings.run_dir / name).unlink(missing_ok=True)
        log.info("stopped", action="stopped")

    # The guard

    def _start_guard(self) -> None:
        env = {name: value for name, value in os.environ.items() if name != MARK}
        if self._guard is not None and self._guard.stdin is not None:
            try:
                self._guard.stdin.close()
            except BrokenPipeError:
                pass
        with open(_log_path(self.settings, "guard"), "ab") as stream:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "producer.guard"], stdin=subprocess.PIPE, stdout=stream, stderr=stream,
                env=env, start_new_session=True, text=True, bufsize=1,
            )  # fmt: skip
        self._tell_guard(self._token)
        for child in self._children:
            if child.known:
                self._tell_guard(f"+{child.known[0]} {child.known[1]!r}")

    def _tell_guard(self, line: str) -> None:
        if self._guard is None or self._guard.stdin is None:
            return
        try:
            self._guard.stdin.write(line + "\n")
            self._guard.stdin.flush()
        except (BrokenPipeError, ValueError):
            log.warning("guard_gone", action="guard_gone")

    # Shared

    def _fail(self, message: str) -> None:
        with self._changed:
            self._failure = self._failure or message
            self._stop.set()
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure:
            raise ServiceUnavailable(self._failure, code="service_failed")

    def _publish(self) -> None:
        """Write down what `running` tells others, and what a successor needs to clean up after a crash of everything."""
        data = {
            "pid": os.getpid(),
            "started_at": self._started_at,
            "token": self._token,
            "flower_url": self.flower_url,
            "services": {c.service.name: c.process.pid for c in self._children if c.process},
            "known": [c.known for c in self._children if c.known],
        }
        write_private(self.settings.run_dir / "supervisor.json", json.dumps(data))
        with self._changed:
            self._changed.notify_all()

    def _tail(self, service: Service, lines: int = 8) -> str:
        path = _log_path(self.settings, service.name)
        try:
            with open(path, "rb") as stream:
                stream.seek(max(0, os.fstat(stream.fileno()).st_size - 4096))
                last = stream.read().decode(errors="replace").strip().splitlines()[-lines:]
        except OSError:
            last = []
        return f"; the end of {path}:\n  " + "\n  ".join(last or ["(empty)"])

    def _release(self) -> None:
        self._restore_signals()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup has it stay when the terminal closes. SIGINT is caught all the same: a shell ignores it in what runs in
            # the background, and the services, which have sessions of their own, would not hear it either.
            if sig == signal.SIGHUP and signal.getsignal(sig) == signal.SIG_IGN:
                continue
            self._old_handlers[sig] = signal.signal(sig, self._on_signal)

    def _restore_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for sig, handler in self._old_handlers.items():
                signal.signal(sig, handler)
            self._old_handlers.clear()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._stop.is_set():
            self._kill.set()
        else:
            raise Interrupted(signum)


# One supervisor a state folder


def running(settings: Settings) -> SupervisorInfo | None:
    """The supervisor that holds the state folder, or None."""
    try:
        handle = os.open(settings.run_dir / "supervisor.lock", os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        pid = int(os.pread(handle, 32, 0) or b"0")
    finally:
        os.close(handle)
    data = _read_json(settings.run_dir / "supervisor.json")
    if data.get("pid") != pid:
        return SupervisorInfo(pid)
    return SupervisorInfo(pid, data["started_at"], data["services"], data["flower_url"])


def stop(settings: Settings, timeout_s: float | None = None) -> bool:
    """Stop the supervisor of the state folder, from any process.

    Args:
        settings: Settings.
        timeout_s: Time for its orderly stop before it is killed, seconds; enough for its workers' drain where left out.

    Returns:
        Whether one was running.
    """
    info = running(settings)
    if info is None:
        return False
    deadline = time.monotonic() + (settings.drain_s + 45.0 if timeout_s is None else timeout_s)
    _signal(info.pid, signal.SIGTERM)
    while (now := running(settings)) is not None and now.pid == info.pid:
        if time.monotonic() >= deadline:
            _signal(info.pid, signal.SIGKILL)
            while running(settings) is not None:
                time.sleep(0.05)
            break
        time.sleep(0.05)
    _sweep_leftovers(settings)
    return True


def _signal(pid: int, sig: signal.Signals) -> None:
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        pass


def _take_lock(settings: Settings) -> int:
    """Lock the state folder; the kernel lets go of the lock when this process ends, so it cannot become stale."""
    handle = os.open(settings.run_dir / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o600)
    # A few tries: `running` holds the lock for an instant when it looks.
    for attempt in range(5):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if attempt == 4:
                pid = os.pread(handle, 32, 0).decode() or "unknown"
                os.close(handle)
                raise Conflict(
                    f"{settings.state_dir} is in use by process {pid}{_describe(pid)}; stop it with `factory down`, or choose "
                    "another folder with FACTORY_STATE_DIR",
                    code="already_running",
                ) from None
            time.sleep(0.05)
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle


def _describe(pid: str) -> str:
    try:
        return " (" + " ".join(psutil.Process(int(pid)).cmdline()[-3:]) + ")"
    except (psutil.Error, ValueError):
        return ""


def _sweep_leftovers(settings: Settings) -> None:
    """Kill what a supervisor left that was killed together with its guard. Only call it when none holds the folder."""
    path = settings.run_dir / "supervisor.json"
    data = _read_json(path)
    if token := data.get("token"):
        killed = sweep(f"{token}:", [(int(pid), float(created)) for pid, created in data.get("known", [])])
        if killed:
            log.warning("leftovers_killed", action="leftovers_killed", processes=killed)
    for name in ("supervisor.json", "broker.json"):
        (settings.run_dir / name).unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        return data
    except (OSError, ValueError):
        return {}


def _log_path(settings: Settings, name: str) -> Path:
    return settings.log_dir / f"{name}.log"


def rotate(path: Path, limit: int, kept: int = KEPT_LOGS) -> bool:
    """Move a log file's content aside once it is larger than ``limit`` bytes.

    The process keeps its file open for appending, so the content is copied and the file emptied; lines written in between
    are lost.

    Returns:
        Whether it was rotated.
    """
    try:
        if path.stat().st_size <= limit:
            return False
    except FileNotFoundError:
        return False
    for number in range(kept - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        if older.exists():
            os.replace(older, path.with_name(f"{path.name}.{number + 1}"))
    shutil.copyfile(path, path.with_name(f"{path.name}.1"))
    os.truncate(path, 0)
    return True


@contextmanager
def ensure(settings: Settings, **options: Any) -> Iterator[Supervisor | None]:
    """The running supervisor of the state folder where there is one (yields None), or a new one for this block.

    Args:
        settings: Settings.
        **options: As for `Supervisor`.
    """
    if running(settings) is not None:
        yield None
        return
    with Supervisor(settings, **options) as up:
        yield up

"""The supervisor with small fake services, and with the real broker."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis

from contentfactory.errors import Conflict, ServiceUnavailable
from contentfactory.settings import Settings, load_settings
from producer import broker, plan, supervisor
from producer.guard import MARK, find
from producer.plan import Service
from producer.supervisor import Supervisor, rotate, running, stop

SLEEP = "import time; time.sleep(600)"
# Writes a line when it is told to stop, then ends.
POLITE = """
import signal, sys, time
def end(*_):
    open({trace!r}, "a").write({name!r} + "\\n"); sys.exit(0)
signal.signal(signal.SIGTERM, end)
open({trace!r} + "." + {name!r}, "w").close()
time.sleep(600)
"""
# Ends by SIGKILL only; says when it is that far.
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.environ.get("FLAG", os.devnull), "w").close()
time.sleep(600)
"""
# A worker with a child in a session of its own that ignores everything: the hardest to find.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {stubborn!r}], start_new_session=True)
open({path!r}, "w").write(str(child.pid))
time.sleep(600)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(state_dir=tmp_path / "state", drain_s=1.0, flower_port=0)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor, "TICK_S", 0.02)


def started_since(before: set[int]) -> list[psutil.Process]:
    """The processes below this one that the test started: what a service of the whole suite starts meanwhile, as PostgreSQL
    does each minute to clean up, has that service above it."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.pid not in before and not before.intersection(parent.pid for parent in parents(process))
    ]


def parents(process: psutil.Process) -> list[psutil.Process]:
    """Everything above a process, nothing if it ended meanwhile."""
    try:
        return process.parents()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Whatever a test starts must be gone after it."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    assert started_since(before) == []


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_starts_in_order_and_stops_in_the_reverse(settings: Settings, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def polite(name: str, **options: object) -> Service:
        flag = Path(f"{trace}.{name}")
        return Service(name, python(POLITE.format(trace=str(trace), name=name)), ready=flag.exists, **options)  # type: ignore[arg-type]

    services = [polite("broker", gate=True), polite("timer"), polite("w1", group="workers"), polite("w2", group="workers")]
    with Supervisor(settings, services=services) as up:
        up.wait_ready(10)
        info = running(settings)
        assert info is not None
        assert info.pid == os.getpid()
        assert set(info.services) == {"broker", "timer", "w1", "w2"}
        assert {entry["state"] for entry in up.status().values()} == {"ready"}
        started = [psutil.Process(info.services[n]).create_time() for n in ("broker", "timer", "w1")]
        assert started == sorted(started)
        assert len({os.getsid(pid) for pid in info.services.values()}) == 4
        pids = list(info.services.values())
    order = trace.read_text().split()
    assert set(order[:2]) == {"w1", "w2"}
    assert order[2:] == ["timer", "broker"]
    assert not any(alive(pid) for pid in pids)
    assert running(settings) is None


def test_a_gate_holds_back_what_comes_after(settings: Settings, tmp_path: Path) -> None:
    door = tmp_path / "door"
    services = [Service("first", python(SLEEP), ready=door.exists, gate=True), Service("second", python(SLEEP))]
    with Supervisor(settings, services=services) as up:
        until(lambda: up.status()["first"]["pid"])
        time.sleep(0.2)
        assert up.status()["second"]["pid"] is None
        door.touch()
        up.wait_ready(5)
        assert alive(up.status()["second"]["pid"])


def test_what_needs_the_ledger_starts_once_it_is_prepared_and_the_rest_meanwhile(settings: Settings) -> None:
    seen: list[tuple[int | None, int | None]] = []
    services = [Service("timer", python(SLEEP), ledger=True), Service("flower", python(SLEEP))]

    def pids() -> tuple[int | None, int | None]:
        status = up.status()
        return status["timer"]["pid"], status["flower"]["pid"]

    def prepare() -> None:
        assert running(settings) is not None, "the folder is ours"
        until(lambda: pids()[1])
        time.sleep(0.2)
        seen.append(pids())

    up = Supervisor(settings, services=services, prepare=prepare)
    with up:
        up.wait_ready(5)
        assert all(pids())
    assert seen[0][0] is None


def test_a_ledger_that_cannot_be_prepared_stops_what_was_started(settings: Settings) -> None:
    started: list[int] = []
    up = Supervisor(settings, services=[Service("flower", python(SLEEP)), Service("timer", python(SLEEP), ledger=True)], prepare=lambda: fail())

    def fail() -> None:
        until(lambda: up.status()["flower"]["pid"])
        started.append(up.status()["flower"]["pid"])
        raise ServiceUnavailable("no database")

    with pytest.raises(ServiceUnavailable, match="no database"), up:
        pytest.fail("it began all the same")
    assert not alive(started[0])
    assert running(settings) is None
    with Supervisor(settings, services=[Service("flower", python(SLEEP))]) as again:
        again.wait_ready(5)


def test_a_sign_of_an_earlier_process_does_not_count(settings: Settings, tmp_path: Path) -> None:
    sign, go = tmp_path / "sign", tmp_path / "go"
    sign.touch()
    code = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.02)\nopen({str(sign)!r}, 'w').close()\ntime.sleep(600)"
    with Supervisor(settings, services=[Service("worker", python(code), ready=sign.exists, sign=sign)]) as up:
        until(lambda: up.status()["worker"]["pid"])
        time.sleep(0.2)
        assert up.status()["worker"]["state"] == "starting"
        go.touch()
        up.wait_ready(5)


def test_a_killed_service_comes_back_without_its_old_children(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "child"
    command = python(PARENT.format(stubborn=STUBBORN, path=str(path)))
    with Supervisor(settings, services=[Service("worker", command, ready=lambda: bool(path.exists() and path.read_text()))]) as up:
        up.wait_ready(5)
        first, child = up.status()["worker"]["pid"], int(path.read_text())
        os.kill(first, signal.SIGKILL)
        until(lambda: up.status()["worker"]["pid"] not in (first, None))
        until(lambda: not alive(child))
        assert up.status()["worker"]["restarts"] == 1
        up.wait_ready(5)


LEAVING = """
import os, signal, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", "import sys, time; sys.stdin.read(); time.sleep(0.3); open({path!r}, 'a').write('gave back')"],
    stdin=subprocess.PIPE, env={{**os.environ, "FACTORY_LINGER_S": "3"}},
)
open({path!r}, "w").close()
signal.pause()
"""


def test_a_keeper_may_give_jobs_back_before_it_ends(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "note"
    process = hold(settings, {"worker": python(LEAVING.format(path=str(path)))})
    until(path.exists)
    process.kill()
    process.communicate()
    until(lambda: path.read_text() == "gave back")


def test_a_crash_loop_is_given_up_with_the_reason(settings: Settings) -> None:
    broken = Service("timer", python("import sys; print('no such table: jobs'); sys.exit(4)"), ready=lambda: False)
    other = Service("worker", python(SLEEP))
    with Supervisor(settings, services=[other, broken]) as up:
        with pytest.raises(ServiceUnavailable) as caught:
            up.wait_ready(10)
        assert "timer ended 5 times in a row" in caught.value.message
        assert "status 4" in caught.value.message
        assert "no such table: jobs" in caught.value.message
        with pytest.raises(ServiceUnavailable):
            up.wait()


def test_a_service_that_is_not_essential_may_fail(settings: Settings) -> None:
    services = [Service("flower", python("raise SystemExit(1)"), ready=lambda: False, essential=False), Service("worker", python(SLEEP))]
    with Supervisor(settings, services=services) as up:
        until(lambda: up.status()["flower"]["state"] == "given up")
        up.wait_ready(5)
        assert up.wait(0.1) is False


def test_a_late_service_is_named(settings: Settings) -> None:
    with (
        Supervisor(settings, services=[Service("worker", python(SLEEP), ready=lambda: False)]) as up,
        pytest.raises(ServiceUnavailable, match="worker is not ready after 0 s"),
    ):
        up.wait_ready(0.3)


def test_one_supervisor_a_folder(settings: Settings) -> None:
    with Supervisor(settings, services=[Service("worker", python(SLEEP))]):
        with pytest.raises(Conflict) as caught:
            Supervisor(settings, services=[]).start()
        assert f"process {os.getpid()}" in caught.value.message
        assert "factory down" in caught.value.message
    with Supervisor(settings, services=[]):
        pass


HOLDER = """
import json
from pathlib import Path
from producer.logs import configure_logs
from producer.plan import Service
from producer.supervisor import Supervisor
from contentfactory.settings import load_settings
settings = load_settings(state_dir={state!r})
configure_logs(settings)  # to standard error: the supervising thread logs while this one prints
services = [
    Service(n, c, {{"FLAG": f"{state}.{{n}}"}}, ready=Path(f"{state}.{{n}}").exists if "FLAG" in c[-1] else None, stop_timeout_s=60)
    for n, c in json.loads({services!r})
]
try:
    with Supervisor(settings, services=services) as up:
        up.wait_ready(10)
        print("ready", flush=True)
        up.wait()
except KeyboardInterrupt:
    pass  # the signal came before wait()
print("ended", flush=True)
"""


def hold(settings: Settings, services: dict[str, list[str]], *, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A supervisor in a process of its own."""
    code = textwrap.dedent(HOLDER).format(state=str(settings.state_dir), services=json.dumps(list(services.items())))
    log = settings.state_dir.with_name("holder.log")
    with open(log, "w") as stderr:
        process = subprocess.Popen(
            [*launcher, sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
            # The tests themselves may run under nohup.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    if line != "ready\n":
        process.kill()
        process.communicate()
    assert line == "ready\n", log.read_text()
    return process


def children_of(settings: Settings, path: Path) -> list[int]:
    until(lambda: path.exists() and path.read_text())
    info = running(settings)
    assert info is not None
    return [*info.services.values(), int(path.read_text())]


def test_nothing_survives_a_sigkill_of_the_supervisor(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "child"
    process = hold(settings, {"worker": python(PARENT.format(stubborn=STUBBORN, path=str(path))), "timer": python(STUBBORN)})
    pids = children_of(settings, path)
    assert len(pids) == 3
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.communicate()
    until(lambda: not any(alive(pid) for pid in pids))
    assert running(settings) is None
    with Supervisor(settings, services=[Service("worker", python(SLEEP))]) as up:
        up.wait_ready(5)


def test_nothing_survives_when_the_guard_dies_too(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "child"
    process = hold(settings, {"worker": python(PARENT.format(stubborn=STUBBORN, path=str(path)))})
    worker, child = children_of(settings, path)
    guards = [p for p in psutil.Process(process.pid).children() if "producer.guard" in p.cmdline()]
    assert len(guards) == 1
    process.send_signal(signal.SIGSTOP)  # so that it cannot start another guard
    guards[0].kill()
    process.kill()
    process.communicate()
    until(lambda: not alive(worker))  # the kernel's parent-death signal
    assert alive(child)
    with Supervisor(settings, services=[]):
        assert not alive(child)  # the next supervisor cleans up before it starts


def test_a_lost_guard_is_replaced(settings: Settings) -> None:
    with Supervisor(settings, services=[Service("worker", python(SLEEP))]) as up:
        up.wait_ready(5)

        def guards() -> list[psutil.Process]:
            found = []
            for p in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):  # it may be gone by the time that it is looked at
                    if p.status() != psutil.STATUS_ZOMBIE and "producer.guard" in p.cmdline():
                        found.append(p)
            return found

        # A process that is just starting may show no command line yet.
        seen: list[psutil.Process] = []
        until(lambda: seen.extend(guards()) or seen)
        seen[0].kill()
        until(lambda: [p for p in guards() if p.pid != seen[0].pid])


def test_a_signal_stops_in_order_and_a_second_one_at_once(settings: Settings) -> None:
    process = hold(settings, {"worker": python(STUBBORN)})
    info = running(settings)
    assert info is not None
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # drains: the worker ignores SIGTERM and has 60 s
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=5)
    assert process.returncode == 0
    assert out == "ended\n"
    assert not alive(info.services["worker"])


def test_nohup_keeps_it_running_when_the_terminal_closes(settings: Settings) -> None:
    process = hold(settings, {"worker": python(SLEEP)}, launcher=("nohup",))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    assert running(settings) is not None
    assert stop(settings) is True
    assert process.communicate(timeout=5)[0] == "ended\n"
    assert process.returncode == 0


@pytest.mark.parametrize("sig", ["INT", "HUP", "TERM"])
def test_each_signal_stops_it_whatever_its_parent_ignored(settings: Settings, sig: str) -> None:
    # A shell without job control starts what runs in the background with SIGINT and SIGQUIT ignored. Within 30 s: the service
    # has 60 s, so it must not have inherited what is ignored.
    ignored = ("sh", "-c", "trap '' INT QUIT TERM; exec \"$@\"", "sh")
    process = hold(settings, {"worker": python(SLEEP)}, launcher=ignored)
    info = running(settings)
    assert info is not None
    process.send_signal(getattr(signal, f"SIG{sig}"))
    assert process.communicate(timeout=30)[0] == "ended\n"
    assert not alive(info.services["worker"])


def test_stop_from_another_process(settings: Settings, tmp_path: Path) -> None:
    assert stop(settings) is False
    process = hold(settings, {"worker": python(SLEEP)})
    info = running(settings)
    assert info is not None
    assert info.pid == process.pid
    assert stop(settings) is True
    assert process.communicate(timeout=5)[0] == "ended\n"
    assert not alive(info.services["worker"])
    assert running(settings) is None


def test_stop_kills_what_does_not_end(settings: Settings) -> None:
    process = hold(settings, {"worker": python(STUBBORN)})
    info = running(settings)
    assert info is not None
    assert stop(settings, timeout_s=0.3) is True
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGKILL
    assert not alive(info.services["worker"])


def test_an_error_in_the_block_stops_everything(settings: Settings) -> None:
    def fail() -> None:
        with Supervisor(settings, services=[Service("worker", python(SLEEP))]) as up:
            up.wait_ready(5)
            pids.append(up.status()["worker"]["pid"])
            raise RuntimeError("mine")

    pids: list[int] = []
    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert not alive(pids[0])


def test_output_goes_to_rotated_logs(tmp_path: Path, settings: Settings) -> None:
    with Supervisor(settings, services=[Service("worker", python("print('hello', flush=True); " + SLEEP))]) as up:
        path = Path(up.status()["worker"]["log"])
        until(lambda: path.exists() and "hello" in path.read_text())
    log = tmp_path / "x.log"
    with open(log, "a") as writer:  # a process that goes on writing through all rotations
        for number in range(6):
            writer.write(f"{number}" * 100)
            writer.flush()
            assert rotate(log, 50) is True
    assert log.stat().st_size == 0
    assert [(tmp_path / f"x.log.{n}").read_text()[0] for n in (1, 2, 3)] == ["5", "4", "3"]
    assert not (tmp_path / "x.log.4").exists()
    assert rotate(log, 50) is False
    assert rotate(tmp_path / "absent", 1) is False


def test_secrets_do_not_show_on_command_lines(settings: Settings) -> None:
    services = plan.plan(settings, flower=5999, workers={"text,image,audio,video": 1, "train": 1})
    password = plan.flower_password(settings)
    assert [s.name for s in services] == ["broker", "flower", "timer", "text-image-audio-video", "train"]
    for service in services:
        assert password not in " ".join(service.command)
        assert "requirepass" not in " ".join(service.command)
    assert services[1].env["FLOWER_BASIC_AUTH"] == f"factory:{password}"
    assert (settings.run_dir / "flower.password").stat().st_mode & 0o777 == 0o600
    worker = services[3]
    assert worker.command[worker.command.index("--queues") + 1] == "text,image,audio,video"
    assert int(worker.env["FACTORY_MODEL_CACHE_MB"]) == settings.model_cache_mb // 2
    assert worker.stop_timeout_s == settings.drain_s
    assert find(f"{MARK}:none") == []


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for a socket, which pytest's own may not."""
    with tempfile.TemporaryDirectory(prefix="cf-") as folder:
        yield Path(folder)


def with_broker(settings: Settings) -> Supervisor:
    return Supervisor(settings, workers={}, timer=False, flower=False)


@pytest.mark.parametrize("deep", [False, True], ids=["unix socket", "port"])
def test_the_real_broker_keeps_its_messages(short_path: Path, deep: bool) -> None:
    settings = load_settings(state_dir=short_path / ("d" * 120 if deep else "with a space"))
    with pytest.raises(ServiceUnavailable, match="factory up"):
        settings.broker()
    with with_broker(settings) as up:
        up.wait_ready(10)
        assert settings.redis().startswith("redis://:" if deep else "unix://")
        with redis.Redis.from_url(settings.redis()) as client:
            client.lpush("queue", "one")
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        if deep:
            port = settings.redis().rpartition(":")[2]
            with redis.Redis.from_url(f"redis://127.0.0.1:{port}") as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
        first = up.status()["broker"]["pid"]
        with pytest.raises(Conflict):
            broker.prepare(settings).lock()
        os.kill(first, signal.SIGKILL)
        until(lambda: up.status()["broker"]["pid"] not in (first, None) and up.status()["broker"]["state"] == "ready")
        with redis.Redis.from_url(settings.redis()) as client:
            assert client.lrange("queue", 0, -1) == [b"one"]
    with pytest.raises(ServiceUnavailable):
        settings.broker()
    with with_broker(settings) as up:
        up.wait_ready(10)
        with redis.Redis.from_url(settings.redis()) as client:
            assert client.lrange("queue", 0, -1) == [b"one"]


def test_celery_reaches_the_broker_over_its_socket(short_path: Path) -> None:
    from celery import Celery

    settings = load_settings(state_dir=short_path / "a b")
    with with_broker(settings) as up:
        up.wait_ready(10)
        app = Celery("test", broker=settings.broker(), set_as_current=False)
        with app.connection_for_write() as connection, connection.SimpleQueue("q") as queue:
            queue.put({"ids": ["job_1"]})
            assert queue.qsize() == 1
        app.close()

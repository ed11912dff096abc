"""The services of the tests leave nothing behind, however the test process ends."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import factory_services
import psutil
import pytest

SCRIPT = """
import sys, time
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
import factory_services
root = Path(sys.argv[3])
for name, start in [("s3", factory_services.start_s3), ("pg", factory_services.start_postgres), ("mq", factory_services.start_valkey)]:
    folder = root / name
    folder.mkdir()
    start(folder)
print("up", flush=True)
time.sleep(60)
"""


def test_sigkill_of_the_tests_takes_the_services_along() -> None:
    plugins = Path(factory_services.__file__).parent
    with tempfile.TemporaryDirectory(prefix="factory-die-") as root:
        os.chmod(root, 0o755)  # PostgreSQL may run as another user
        with subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(plugins.parent.parent), str(plugins), root],
            stdout=subprocess.PIPE,
        ) as tests:
            assert tests.stdout is not None
            assert tests.stdout.readline() == b"up\n"
            started = psutil.Process(tests.pid).children(recursive=True)
            names = {process.name() for process in started}
            assert {"weed", "postgres", "valkey-server"} <= names
            tests.kill()
        _, alive = psutil.wait_procs(started, timeout=10)
        assert alive == []
        assert list(Path(root).iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_sigkill_of_the_leash_takes_the_service_along(tmp_path: Path) -> None:
    service, _ = factory_services.start_valkey(tmp_path)
    assert service.leash is not None
    (server,) = psutil.Process(service.leash.pid).children()
    service.leash.send_signal(signal.SIGKILL)
    service.leash.wait()
    server.wait(5)


def test_the_broker_keeps_its_data_over_a_kill(tmp_path: Path) -> None:
    import redis

    service, url = factory_services.start_valkey(tmp_path)
    with redis.Redis.from_url(url) as client:
        client.lpush("queue", "message")
    time.sleep(1.1)  # 'everysec'
    service.stop()
    password = url.partition("redis://:")[2].partition("@")[0]
    service, url = factory_services.start_valkey(tmp_path, service.port, password)
    try:
        with redis.Redis.from_url(url) as client:
            assert client.lrange("queue", 0, -1) == [b"message"]
    finally:
        service.stop()


def test_each_database_is_empty_and_ones_own(postgres_database: str) -> None:
    import psycopg

    with psycopg.connect(postgres_database.replace("+psycopg", "")) as connection:
        assert connection.execute(
            "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        ).fetchone() == (0,)
        assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
        connection.execute("CREATE TABLE one (id int)")


def test_a_service_that_cannot_start_fails_and_says_why(tmp_path: Path) -> None:
    service = factory_services.Service(
        "nonsense", tmp_path, ["/bin/sh", "-c", "echo no such option; exit 3"], 1
    )

    def never() -> None:
        raise ConnectionError("not there")

    with pytest.raises(factory_services.ServiceFailed, match="no such option"):
        service.start(never, (ConnectionError,))

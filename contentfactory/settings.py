"""Settings: one frozen object, read once at an entry point and passed in.

Values come, first found first taken, from keyword arguments of `load_settings`, from ``FACTORY_*`` variables of the
environment, and from ``factory.toml`` in the working directory. Whatever is left out has a default that works on a bare
machine: one folder, one broker, SQLite, local objects.
"""

import json
import os
import secrets
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from contentfactory.errors import ConfigError, ServiceUnavailable
from contentfactory.jobs.spec import QUEUES, describe_errors

PREFIX = "FACTORY_"
FILE = "factory.toml"


def _memory_mb() -> int:
    """Memory that this process may use in megabytes: the machine's, or the container's limit where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(name).read_text()))
        except (OSError, ValueError):
            continue
    return total // 2**20


class Settings(BaseSettings):
    """Everything that an operator may set. Each field is the variable ``FACTORY_<NAME>`` or a key of ``factory.toml``."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", toml_file=FILE, validate_default=True, env_ignore_empty=True,
        hide_input_in_errors=True,
    )  # fmt: skip

    # Where things lie
    state_dir: Path = Field(
        default=Path(".factory"),
        description="folder that holds all state of the embedded profile; it may be deleted as a whole",
    )
    database_url: SecretStr = Field(
        default=SecretStr(""),
        description="SQLAlchemy URL of the ledger (sqlite:///… or postgresql+psycopg://…); SQLite in state_dir if unset",
    )
    broker_url: SecretStr | None = Field(
        default=None,
        description="Redis or Valkey of the production profile (redis://…); the embedded broker of state_dir if unset",
    )
    storage_url: str = Field(
        default="", description="object storage: file:///folder or s3://bucket/prefix; state_dir/objects if unset"
    )
    storage_endpoint: str | None = Field(
        default=None, description="address of an S3 server that is not Amazon's, for example http://s3.internal:8333"
    )
    storage_region: str = Field(default="us-east-1", description="S3 region, part of each signature")
    storage_access_key: SecretStr | None = Field(default=None, description="S3 access key; boto3's own chain if unset")
    storage_secret_key: SecretStr | None = Field(default=None, description="S3 secret key; boto3's own chain if unset")
    storage_prefix: str = Field(default="", max_length=200, description="put before each object key")
    secret_key: SecretStr | None = Field(
        default=None,
        description="signs links to local objects and hashes API keys; made in state_dir on first use if unset",
    )
    model_dir: Path | None = Field(
        default=None, description="folder of converted and downloaded models; state_dir/models if unset"
    )
    scratch_dir: Path | None = Field(
        default=None, description="folder for jobs' temporary files; state_dir/scratch if unset"
    )
    project: str = Field(
        default="default", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="project that the CLI works in"
    )

    # Compute
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N"
    )
    torch_threads: int = Field(default=1, ge=1, le=256, description="torch threads of one worker process")
    model_cache_mb: int = Field(
        default_factory=lambda: max(512, _memory_mb() // 2), ge=64,
        description="megabytes that loaded models may take, over all workers of one `factory up`; half of the memory if unset",
    )  # fmt: skip
    upload_threads: int = Field(default=4, ge=1, le=64, description="threads of one worker that encode and upload")
    embedded_workers: Annotated[dict[str, int], NoDecode] = Field(
        default={"text,audio": 1, "image,video": 1, "train": 1},
        description="workers that `factory up` starts: queues joined by commas, and how many processes serve them (JSON)",
    )

    # Life of a job
    lease_s: float = Field(default=30.0, ge=1, le=3600, description="seconds a claim holds without a heartbeat")
    reaper_period_s: float = Field(default=5.0, gt=0, le=600, description="seconds between looks for expired leases")
    dispatch_period_s: float = Field(default=1.0, gt=0, le=60, description="seconds between the timer's dispatches")
    inflight_s: float = Field(
        default=10.0, gt=0, le=3600,
        description="estimated compute seconds a queue may have in the broker for each of its workers; the rest waits in SQL, "
        "where priority and fairness still reach it",
    )
    drain_s: float = Field(
        default=30.0, ge=0, le=3600, description="seconds a stopping worker gets to finish or release its jobs before it is killed"
    )
    reuse_results: bool = Field(
        default=True, description="whether a job whose params, inputs, model and seed equal an earlier one's takes its artifacts"
    )

    # Retention
    retention_days: float = Field(
        default=0, ge=0, le=36_500, description="days that ended jobs and their results are kept; 0 keeps them for ever"
    )
    sweep_period_s: float = Field(default=3600.0, gt=0, le=604_800, description="seconds between sweeps of what nothing refers to")
    sweep_window_s: float = Field(
        default=7200.0, ge=3700, le=2_592_000, description="age in seconds at which an object without a row is deleted"
    )

    # Inputs
    max_input_mb: int = Field(default=512, ge=1, le=100_000, description="largest input file, megabytes")
    input_timeout_s: float = Field(default=60.0, gt=0, le=3600, description="longest fetch of one input address, seconds")
    allow_private_urls: bool = Field(
        default=False, description="whether inputs and webhooks may name private addresses (only in a closed test network)"
    )

    # Observability
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level logged")
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="console lines or JSON; auto: console on a terminal"
    )
    log_max_mb: int = Field(default=10, ge=1, le=10_000, description="megabytes at which a service's log file is rotated")
    metrics_host: str = Field(default="127.0.0.1", description="address that the timer's metrics are served on")
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="port of the timer's Prometheus metrics and health checks; 0 serves none"
    )
    flower_host: str = Field(default="127.0.0.1", description="address that Flower listens on")
    flower_port: int = Field(default=5555, ge=0, le=65535, description="Flower's port; 0, or one in use: a free one is taken")
    flower_user: str = Field(default="factory", pattern=r"^[\w.@-]{1,64}$", description="name of Flower's login")
    flower_password: SecretStr | None = Field(
        default=None, description="password of Flower's login; made in state_dir/run if unset"
    )
    api_host: str = Field(default="127.0.0.1", description="address that the HTTP API listens on")
    api_port: int = Field(default=8000, ge=0, le=65535, description="port of the HTTP API; 0 takes a free one")
    public_url: str | None = Field(default=None, description="address under which others reach the HTTP API")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keyword arguments, then the environment, then ``factory.toml``."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @field_validator("embedded_workers", mode="before")
    @classmethod
    def _parse_workers(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError('must be JSON such as {"text,image": 1, "train": 1}') from None

    @field_validator("embedded_workers")
    @classmethod
    def _check_workers(cls, value: dict[str, int]) -> dict[str, int]:
        clean: dict[str, int] = {}
        for queues, count in value.items():
            names = [name.strip() for name in queues.split(",")]
            unknown = [name for name in names if name not in QUEUES]
            if unknown:
                raise ValueError(f"names the unknown queue {unknown[0]!r}; allowed: {', '.join(QUEUES)}")
            if not 0 <= count <= 256:
                raise ValueError(f"has {count} workers for {queues!r}; allowed: 0 to 256")
            clean[",".join(names)] = count
        return clean

    @field_validator("storage_url")
    @classmethod
    def _check_storage(cls, value: str) -> str:
        if value and not value.startswith(("file://", "s3://")):
            raise ValueError("must start with file:// or s3://")
        return value

    @field_validator("broker_url")
    @classmethod
    def _check_broker(cls, value: SecretStr | None) -> SecretStr | None:
        allowed = ("redis://", "rediss://", "redis+socket://", "sentinel://")
        if value is not None and not value.get_secret_value().startswith(allowed):
            raise ValueError(f"must start with one of {', '.join(allowed)}")
        return value

    @model_validator(mode="after")
    def _fill(self) -> "Settings":
        """Make paths absolute and derive what was left out from the state folder."""
        state = self.state_dir.expanduser().absolute()
        filled: dict[str, Any] = {
            "state_dir": state,
            "model_dir": (self.model_dir or state / "models").expanduser().absolute(),
            "scratch_dir": (self.scratch_dir or state / "scratch").expanduser().absolute(),
            "storage_url": self.storage_url or (state / "objects").as_uri(),
            "database_url": self.database_url
            if self.database_url.get_secret_value()
            else SecretStr(f"sqlite:///{state / 'factory.db'}"),
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        if self.reaper_period_s > self.lease_s:
            raise ValueError(f"reaper_period_s is {self.reaper_period_s}; it must not exceed lease_s ({self.lease_s})")
        return self

    # Folders of the embedded profile

    @property
    def run_dir(self) -> Path:
        """Sockets, locks and generated secrets of what runs now; readable by its owner only."""
        return self.state_dir / "run"

    @property
    def log_dir(self) -> Path:
        """One log file a service."""
        return self.state_dir / "logs"

    @property
    def models(self) -> Path:
        """`model_dir`, always set."""
        return self.model_dir or self.state_dir / "models"

    @property
    def scratch(self) -> Path:
        """`scratch_dir`, always set."""
        return self.scratch_dir or self.state_dir / "scratch"

    @property
    def embedded_broker(self) -> bool:
        """Whether the broker is the one that `factory up` starts."""
        return self.broker_url is None

    def database(self) -> str:
        """The ledger's URL with its password, for the one who connects."""
        return self.database_url.get_secret_value()

    def broker(self) -> str:
        """The broker's URL in Celery's form, with its password.

        Raises:
            ServiceUnavailable: If the embedded broker of this state folder is not running.
        """
        return self.broker_url.get_secret_value() if self.broker_url else self._embedded_broker()["celery_url"]

    def redis(self) -> str:
        """The broker's URL in the form of ``redis.Redis.from_url`` (a unix socket is spelled differently there).

        Raises:
            ServiceUnavailable: As for `broker`.
        """
        if self.broker_url is None:
            return self._embedded_broker()["redis_url"]
        url = self.broker_url.get_secret_value()
        return "unix://" + url.removeprefix("redis+socket://") if url.startswith("redis+socket://") else url

    def _embedded_broker(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads((self.run_dir / "broker.json").read_text())
            return found
        except (OSError, ValueError):
            raise ServiceUnavailable(
                f"no broker runs for {self.state_dir}; start one with `factory up`, or set {PREFIX}BROKER_URL", code="no_broker"
            ) from None

    @cached_property
    def signing_key(self) -> bytes:
        """The secret key; made once in the state folder where none is set."""
        if self.secret_key is not None:
            return self.secret_key.get_secret_value().encode()
        return private_value(self.state_dir / "secret.key").encode()

    def environment(self) -> dict[str, str]:
        """These settings as variables for a child process, secrets included, so that it loads exactly the same."""
        out: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            out[PREFIX + name.upper()] = json.dumps(value) if isinstance(value, dict | bool) else str(value)
        return out


def private_value(path: Path) -> str:
    """A random value kept in a file that only its owner may read; made on first use, safely under concurrent callers.

    Args:
        path: The file; its folder is made where it is missing.

    Returns:
        43 characters that carry 256 random bits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    if not path.exists():
        handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(secrets.token_urlsafe(32))
            # A link, unlike a rename, leaves the value of whoever came first.
            os.link(temp, path)
        except FileExistsError:
            pass
        finally:
            temp.unlink()
    return path.read_text().strip()


def load_settings(**overrides: Any) -> Settings:
    """Read the settings, once, at an entry point.

    Args:
        **overrides: Fields of `Settings` that win over the environment and the file; ``None`` means not given.

    Returns:
        The frozen settings, every path absolute.

    Raises:
        ConfigError: Naming the setting, as the variable that sets it, and what is allowed.
    """
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        problems = describe_errors(error)
        lines = []
        for problem in problems:
            name = problem["field"].split(".")[0]
            # The value is left out: it may be a secret. `hide_input_in_errors` alone does not cover our own rendering.
            message = problem["message"].split(" (received ")[0].removeprefix("Value error, ")
            if message == "unknown field":
                message = f"is no setting (in {FILE}?)"
            lines.append(f"{PREFIX + name.upper()}: {message}" if name else message)
        raise ConfigError("; ".join(lines), param=problems[0]["field"] or None) from None
    except SettingsError as error:
        raise ConfigError(f"settings cannot be read: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{FILE} cannot be read: {error}", param=FILE) from None

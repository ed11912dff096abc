"""Settings: where values come from, what is refused, what stays secret."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from contentfactory.errors import ConfigError, ServiceUnavailable
from contentfactory.settings import PREFIX, Settings, load_settings, private_value


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings from outside."""
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_defaults_live_in_one_folder_under_the_working_directory(tmp_path: Path) -> None:
    settings = load_settings()
    state = tmp_path / ".factory"
    assert settings.state_dir == state
    assert settings.database() == f"sqlite:///{state}/factory.db"
    assert settings.storage_url == (state / "objects").as_uri()
    assert (settings.models, settings.scratch) == (state / "models", state / "scratch")
    assert settings.embedded_broker
    assert settings.model_cache_mb >= 512
    assert not state.exists()  # reading settings makes nothing


def test_keyword_wins_over_environment_over_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "factory.toml").write_text('lease_s = 11\ndrain_s = 12\nproject = "file"\n[embedded_workers]\n"text, image" = 2\n')
    monkeypatch.setenv("FACTORY_DRAIN_S", "13")
    monkeypatch.setenv("FACTORY_PROJECT", "env")
    monkeypatch.setenv("FACTORY_DEVICE", "")  # empty means not set
    settings = load_settings(project="word", lease_s=None)
    assert (settings.lease_s, settings.drain_s, settings.project, settings.device) == (11, 13, "word", "auto")
    assert settings.embedded_workers == {"text,image": 2}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("LEASE_S", "soon", "FACTORY_LEASE_S: Input should be a valid number"),
        ("LEASE_S", "0.5", "FACTORY_LEASE_S: Input should be greater than or equal to 1"),
        ("TORCH_THREADS", "0", "FACTORY_TORCH_THREADS: Input should be greater than or equal to 1"),
        ("DEVICE", "gpu", "FACTORY_DEVICE"),
        ("PROJECT", "Ümlaut", "FACTORY_PROJECT"),
        ("STORAGE_URL", "http://x", "FACTORY_STORAGE_URL: must start with file:// or s3://"),
        ("BROKER_URL", "amqp://user:hunter2@x", "FACTORY_BROKER_URL: must start with one of redis://"),
        ("EMBEDDED_WORKERS", "text=1", "FACTORY_EMBEDDED_WORKERS: must be JSON"),
        ("EMBEDDED_WORKERS", '{"text,txt": 1}', "names the unknown queue 'txt'; allowed: text, image, audio, video, train"),
        ("EMBEDDED_WORKERS", '{"text": 1000}', "has 1000 workers for 'text'; allowed: 0 to 256"),
        ("REAPER_PERIOD_S", "40", "reaper_period_s is 40.0; it must not exceed lease_s (30.0)"),
    ],
)
def test_a_bad_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert expected in caught.value.message
    assert "hunter2" not in caught.value.message


def test_an_unknown_or_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "factory.toml").write_text("leese_s = 3\n")
    with pytest.raises(ConfigError, match=r"FACTORY_LEESE_S: is no setting"):
        load_settings()
    (tmp_path / "factory.toml").write_text("lease_s =")
    with pytest.raises(ConfigError, match=r"factory\.toml cannot be read"):
        load_settings()


def test_secrets_are_not_shown_and_settings_do_not_change() -> None:
    settings = load_settings(
        broker_url="redis://:pa55@h:1/0", storage_secret_key="pa55", secret_key="pa55", flower_password="pa55",
        database_url="postgresql+psycopg://u:pa55@h/d",
    )  # fmt: skip
    assert "pa55" not in repr(settings) + str(settings) + settings.model_dump_json()
    assert settings.broker() == settings.redis() == "redis://:pa55@h:1/0"
    assert settings.signing_key == b"pa55"
    with pytest.raises(ValidationError, match="frozen"):
        settings.lease_s = 5  # type: ignore[misc]


def test_a_socket_is_spelled_differently_for_each_client() -> None:
    settings = load_settings(broker_url="redis+socket:///run/x.sock")
    assert (settings.broker(), settings.redis()) == ("redis+socket:///run/x.sock", "unix:///run/x.sock")
    with pytest.raises(ServiceUnavailable, match="factory up"):
        load_settings().broker()


def test_a_child_process_loads_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = load_settings(
        state_dir="here", embedded_workers={"train": 3}, allow_private_urls=True, storage_secret_key="s", drain_s=1.5
    )
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_settings() == settings


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_a_private_value_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "key"
    with ThreadPoolExecutor(8) as pool:
        values = set(pool.map(lambda _: private_value(path), range(32)))
    assert len(values) == 1
    assert len(values.pop()) == 43
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["key"]


def test_the_core_is_light() -> None:
    """A producer's environment must not get torch, Celery or SQLAlchemy by importing the shared package."""
    code = (
        "import sys, contentfactory.settings, contentfactory.jobs.spec as s, contentfactory.catalogue, contentfactory.process\n"
        "s.load_kinds()\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & "
        "{'torch', 'celery', 'sqlalchemy', 'numpy', 'boto3', 'redis', 'worker', 'producer', 'db', 'storage', 'transformers'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

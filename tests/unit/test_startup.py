"""What a process loads before it does anything: every one of these costs each command, or each process of ``factory up``."""

import subprocess
import sys
from pathlib import Path

import pytest

BROKER = {"FACTORY_BROKER_URL": "redis://127.0.0.1:1/0"}


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        (["contentfactory", "--help"], {"pydantic", "pydantic_settings", "sqlalchemy", "celery", "redis", "rich.table", "torch"}),
        (["worker.lean", "-A", "worker", "worker", "--help"], {"sqlalchemy", "flower", "tornado", "torch", "numpy", "boto3"}),
        (["worker.lean", "-A", "worker", "inspect", "--help"], {"flower"}),
    ],
    ids=["factory --help", "worker", "other commands"],
)
def test_only_what_is_needed_is_loaded(command: list[str], absent: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**BROKER, "FACTORY_STATE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage:" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert len(loaded) > 50
    assert loaded & absent == set()


def test_a_listing_needs_neither_broker_nor_migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**BROKER, "FACTORY_STATE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-X", "importtime", "-m", "contentfactory", "jobs", "list", "--json"]
    for _ in range(2):  # the first one makes the ledger
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "sqlalchemy" in loaded
    assert loaded & {"alembic", "redis", "kombu", "boto3", "producer.manifest", "celery"} == set()

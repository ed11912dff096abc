"""What a process loads before it does anything: every one of these costs each command, or each process of ``factory up``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

UNUSED = {"rich.console", "opentelemetry.sdk.metrics.export"}
BROKER = {"FACTORY_BROKER_URL": "redis://127.0.0.1:1/0"}


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        (["contentfactory", "--help"], {"pydantic", "pydantic_settings", "sqlalchemy", "celery", "redis", "rich.table", "torch"}),
        (["worker.lean", "-A", "worker", "worker", "--help"], {"sqlalchemy", "flower.app", "tornado.web", "prompt_toolkit", "torch", "numpy", "boto3", *UNUSED}),
        (["worker.lean", "-A", "producer.watching", "flower", "--help"], {"contentfactory.catalogue.text", "sqlalchemy", "torch", *UNUSED}),
    ],
    ids=["factory --help", "worker", "flower"],
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


def test_a_worker_by_itself_loads_what_the_other_would_have_spared_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked for above is to be seen where it is loaded."""
    for name, value in {**BROKER, "FACTORY_STATE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-X", "importtime", "-m", "celery", "-A", "worker", "worker", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert loaded >= {"flower.app", "tornado.web", "prompt_toolkit", *UNUSED}


def test_other_commands_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worker.lean", "-A", "worker", "inspect"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **BROKER, "FACTORY_STATE_DIR": str(tmp_path)})
    assert done.returncode == 2
    assert "No such command 'inspect'" in done.stderr


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


def test_a_service_runs_as_its_module_would(tmp_path: Path) -> None:
    """Its name, its arguments and its exit code; and what was not loaded with a library can be loaded afterwards."""
    (tmp_path / "trial.py").write_text(
        "import gc, sys\nimport structlog, redis\nassert 'rich' not in sys.modules\nimport rich, opentelemetry.sdk.metrics\n"
        "print(__name__, sys.argv[1:], __spec__.name, gc.isenabled())\nraise SystemExit(7)\n"
    )
    command = [sys.executable, "-m", "contentfactory.service", "trial", "-x", "ü"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout.split("\n")[0]) == (7, "__main__ ['-x', 'ü'] trial True"), done.stderr[-2000:]

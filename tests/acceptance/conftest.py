"""The commands of the README, in processes of their own, on the embedded profile."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


class Cli:
    """Runs ``factory`` with a state folder of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        # Converted models are shared between test runs: they are made once and checked by their SHA-256.
        models = Path(tempfile.gettempdir()) / "contentfactory-models"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("FACTORY_")},
            "FACTORY_STATE_DIR": str(state), "FACTORY_MODEL_DIR": str(models), "FACTORY_FLOWER_PORT": "0", "FACTORY_DRAIN_S": "10",
            "FACTORY_DISPATCH_PERIOD_S": "0.5", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip

    def only(self, queues: str) -> None:
        """Start no workers but one, for these queues: each takes as long to start as a job takes here."""
        self.env["FACTORY_EMBEDDED_WORKERS"] = json.dumps({queues: 1})

    def start(self, *args: str, **options) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "contentfactory", *args]
        return subprocess.Popen(command, env=self.env, cwd=ROOT, text=True, stdout=subprocess.PIPE, **{"stderr": subprocess.STDOUT, **options})

    def __call__(self, *args: str, code: int | None = 0, timeout: float = 150, **options) -> str:
        with self.start(*args, **options) as process:
            try:
                out, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.terminate()
                out, _ = process.communicate(timeout=60)
                raise AssertionError(f"factory {' '.join(args)} did not end in {timeout} s\n{out}\n{self.logs()}") from None
        assert code is None or process.returncode == code, f"factory {' '.join(args)} ended with {process.returncode}\n{out}\n{self.logs()}"
        return out

    def json(self, *args: str, code: int | None = 0, timeout: float = 150):
        return json.loads(self(*args, "--json", code=code, timeout=timeout, stderr=subprocess.DEVNULL))

    def logs(self) -> str:
        """The end of every service's log, for a failing test's message."""
        parts = []
        for path in sorted((self.state / "logs").glob("*.log")):
            parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(parts)[-6000:]

    def processes(self) -> list[psutil.Process]:
        """Living processes that belong to this state folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FACTORY_STATE_DIR") == str(self.state) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


@pytest.fixture
def cli(tmp_path: Path):
    """A factory of its own; whatever still lives afterwards is killed and fails the test."""
    made = Cli(tmp_path / "state")
    yield made
    _reap(made)


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A factory that runs for a module's tests; with the usual workers, or one for the module's ``QUEUES``."""
    made = Cli(tmp_path_factory.mktemp("factory") / "state")
    if queues := getattr(request.module, "QUEUES", ""):
        made.only(queues)
    process = made.start("up", "--no-flower")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready in"):
            break
    else:
        raise AssertionError("".join(lines) + made.logs())
    yield made
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    _reap(made)


def _reap(made: Cli) -> None:
    left = made.processes()
    for process in left:
        process.kill()
    assert left == [], f"processes stayed behind: {left}"

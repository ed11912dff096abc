"""The scripts: the choice of torch's build, pins for everything that is installed, and the reference pages."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("factory_setup", ROOT / "scripts" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    return module


def report(version: str, requires: list[str]) -> dict:
    return {"install": [{"metadata": {"version": version, "requires_dist": requires}}]}


CUDA = ["filelock", 'nvidia-cudnn-cu13==9.1; platform_system == "Linux"', "triton==3.5"]


def test_which_builds_are_for_the_cpu(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup.is_cpu_build(report("2.13.0+cpu", CUDA))
    assert not setup.is_cpu_build(report("2.13.0+cu130", []))
    assert not setup.is_cpu_build(report("2.13.0", CUDA))
    assert not setup.is_cpu_build(report("2.13.0", ["cuda-toolkit[cudart]==13.0"]))
    assert setup.is_cpu_build(report("2.13.0", ["filelock", "optree>=0.13.0; extra == 'optree'", "nvidia-x; extra == 'gpu'"]))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert setup.is_cpu_build(report("2.13.0", CUDA))


@pytest.mark.parametrize(
    ("choice", "offered", "expected"),
    [
        ("cpu", report("2.13.0+cpu", []), []),
        ("cpu", report("2.13.0", CUDA), ["--index-url", "https://download.pytorch.org/whl/cpu"]),
        ("cpu", None, ["--index-url", "https://download.pytorch.org/whl/cpu"]),
        ("cuda", report("2.13.0", CUDA), []),
        ("cuda", None, []),
    ],
)
def test_where_torch_comes_from(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, choice: str, offered: dict | None, expected: list[str]
) -> None:
    answer = subprocess.CompletedProcess([], 1 if offered is None else 0, json.dumps(offered or {}), "")
    monkeypatch.setattr(setup.subprocess, "run", lambda *a, **k: answer)
    assert setup.torch_arguments(["pip"], choice) == [setup.wanted("torch"), *expected]


def test_a_wish_for_cuda_is_not_quietly_dropped(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 0, json.dumps(report("2.13.0+cpu", [])), "")
    monkeypatch.setattr(setup.subprocess, "run", lambda *a, **k: answer)
    with pytest.raises(SystemExit, match="TORCH_INDEX"):
        setup.torch_arguments(["pip"], "cuda")
    monkeypatch.setenv("TORCH_INDEX", "https://mirror.example/torch")
    assert setup.torch_arguments(["pip"], "cuda")[1:] == ["--index-url", "https://mirror.example/torch"]


def test_every_extra_is_pinned() -> None:
    import re
    import tomllib

    def name(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).lower()

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name(line) for line in lines if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {name(r) for group in [project["dependencies"], *project["optional-dependencies"].values()] for r in group}
    assert wanted - {"contentfactory"} - pinned == set()


def test_every_package_with_model_files_is_pinned() -> None:
    from importlib.metadata import version

    from contentfactory.catalogue import load_catalogue

    lines = (ROOT / "requirements/models.txt").read_text() + (ROOT / "constraints.txt").read_text()
    pins = {line.split()[0].lower() for line in lines.splitlines() if line.strip()}
    packages = {model.distribution for model in load_catalogue().values() if model.distribution}
    assert packages
    assert [p for p in sorted(packages) if f"{p}=={version(p)}".lower() not in pins] == []


def test_the_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

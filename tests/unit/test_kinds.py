"""Completeness: every kind has a runner, a page and a model that can serve it; every runner has a kind."""

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

from contentfactory.catalogue import load_catalogue
from contentfactory.jobs.spec import load_kinds
from worker.runners import MODULES, get_runner

ROOT = Path(__file__).resolve().parents[2]


def test_every_kind_has_a_runner_and_every_runner_a_kind() -> None:
    kinds = load_kinds()
    problems = [f"runner of {name} has no kind" for name in MODULES if name not in kinds]
    for name in kinds:
        try:
            get_runner(name)
        except LookupError as error:
            problems.append(str(error))
    assert problems == []


def test_every_default_model_is_known_and_serves_its_kind() -> None:
    catalogue = load_catalogue()
    problems = []
    for name, spec in load_kinds().items():
        if spec.default_model is None:
            continue
        model = catalogue.get(spec.default_model)
        if model is None:
            problems.append(f"{name}: default model {spec.default_model} is not in the catalogue")
        elif spec.task not in model.tasks:
            problems.append(f"{name}: default model {model.name} serves {model.tasks}, not {spec.task}")
    assert problems == []


def test_every_field_has_help() -> None:
    missing = [
        f"{name}.{field}"
        for name, spec in load_kinds().items()
        for field, info in spec.params.model_fields.items()
        if not info.description and field != "model"
    ]
    assert missing == []


def test_every_model_package_is_pinned_and_its_files_have_a_digest() -> None:
    lines = (ROOT / "requirements/models.txt").read_text() + (ROOT / "constraints.txt").read_text()
    pins = {line.split()[0].lower() for line in lines.splitlines() if line}
    problems = []
    for model in load_catalogue().values():
        if model.distribution:
            wanted = f"{model.distribution}=={distribution(model.distribution).version}"
            if wanted.lower() not in pins:
                problems.append(f"{model.name}: {wanted} is pinned nowhere")
        problems += [f"{model.name}: file {role} has no SHA-256" for role in model.files if role not in model.sha256 and role != "folder"]
        if not model.licence:
            problems.append(f"{model.name}: no licence")
    assert problems == []


def test_the_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

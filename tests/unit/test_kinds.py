"""Every kind is whole: a runner, a page in the docs, a queue, limits on its fields; and nothing is left over."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from contentfactory.catalogue import load_catalogue
from contentfactory.errors import InputError
from contentfactory.jobs import spec as specs
from contentfactory.jobs.spec import (
    OutputRef,
    Params,
    Text,
    canonical,
    get_kind,
    iter_inputs,
    iter_refs,
    kind,
    load_kinds,
)
from worker.runners import MODULES, get_runner

ROOT = Path(__file__).parents[2]
KINDS = sorted(load_kinds())


@pytest.mark.parametrize("name", KINDS)
def test_kind_has_a_runner(name):
    assert name in MODULES, f"kind {name} has no runner: bind one with @runs and name its module in worker.runners.MODULES"
    assert callable(get_runner(name))


def test_no_runner_without_a_kind():
    assert sorted(set(MODULES) - set(KINDS)) == [], "runners without a kind"


@pytest.mark.parametrize("name", KINDS)
def test_kind_is_in_the_docs(name):
    page = (ROOT / "docs" / "reference" / "kinds.md").read_text()
    assert f"## {name}\n" in page, f"docs/reference/kinds.md lacks {name}: write it with `make docs`"


@pytest.mark.parametrize("name", KINDS)
def test_fields_explain_themselves(name):
    spec = get_kind(name)
    silent = [f for f, info in spec.params.model_fields.items() if not info.description and f != "model" and not _inherits(info)]
    assert silent == [], f"{name}: fields without a description"
    assert spec.summary.endswith(".")
    json.dumps(spec.params.model_json_schema())


def _inherits(info):
    return "description" in json.dumps(str(info.metadata)) or "description" in str(info.annotation)


@pytest.mark.parametrize("name", [n for n in KINDS if get_kind(n).default_model])
def test_default_models_exist_and_can_do_it(name):
    spec = get_kind(name)
    model = load_catalogue()[spec.default_model]
    assert spec.name in model.tasks or spec.task in model.tasks


@pytest.mark.parametrize("model", sorted(load_catalogue()))
def test_models_are_pinned_and_licensed(model):
    entry = load_catalogue()[model]
    assert entry.licence
    assert "GPL" not in entry.licence
    assert set(entry.sha256) <= set(entry.files)
    assert all(len(v) == 64 for v in entry.sha256.values())


def test_wrong_names_are_told_with_close_ones():
    with pytest.raises(InputError, match=r"did you mean text\.embed"):
        get_kind("text.embde")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queue": "nowhere"}, "queue 'nowhere' is unknown"),
        ({"outputs": ()}, "outputs is empty"),
        ({"max_group": 0}, "max_group is 0"),
        ({"wait_s": 60}, "wait_s is 60"),
        ({"group_by": ("size",)}, "unknown fields"),
        ({"name": "one"}, "modality.verb"),
        ({"name": "text.echo"}, "declared twice"),
    ],
)
def test_bad_declarations_are_refused(options, words):
    class Trial(Params):
        """A trial."""

        text: Text = Field(description="x")

    with pytest.raises(ValueError, match=words):
        kind(**{"name": "trial.bad", "queue": "text", "outputs": ("text/plain",), **options})(Trial)
    assert "trial.bad" not in specs._REGISTRY


def test_params_name_every_bad_field():
    with pytest.raises(InputError) as caught:
        get_kind("text.echo").validate({"text": 3, "seconds": -1, "colour": "red"})
    fields = {e["field"] for e in caught.value.detail["errors"]}
    assert fields == {"text", "seconds", "colour"}
    assert "-1" in caught.value.message


def test_references_are_found_with_their_place():
    params = get_kind("text.echo").validate({"text": {"job": "story", "output": "text.txt"}})
    assert list(iter_refs(params)) == [("text", OutputRef(job="story", output="text.txt"))]
    assert [(f, m) for f, m, _ in iter_inputs(params)] == [("text", "text")]


def test_equal_params_have_equal_text():
    one = get_kind("text.echo").validate({"text": "é", "seconds": 0})
    two = get_kind("text.echo").validate({"seconds": 0.0, "text": "é"})
    assert canonical(one) == canonical(two)


def test_what_checks_a_kinds_params_is_built_when_they_are_first_checked():
    """By whichever threads come first; most processes never need it."""
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from contentfactory.errors import InputError
from contentfactory.jobs.spec import load_kinds
kinds = list(load_kinds().values())
assert not any(spec.params.__pydantic_complete__ for spec in kinds)
start = Barrier(16)
def check(n):
    start.wait()
    for spec in kinds[n % 3:] + kinds[:n % 3]:
        try:
            spec.validate({"nonsense": 1})
        except InputError as error:
            assert "nonsense" in str(error.detail), error.detail
        else:
            raise AssertionError(spec.name)
        spec.params.model_json_schema()
    return [spec.params_json(spec.validate({"text": "é"})) for spec in kinds if spec.name == "text.echo"]
sys.setswitchinterval(1e-5)
with ThreadPoolExecutor(16) as pool:
    assert len({str(found) for found in pool.map(check, range(16))}) == 1
assert all(spec.params.__pydantic_complete__ for spec in kinds)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]

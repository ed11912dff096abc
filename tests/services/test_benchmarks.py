"""Each benchmark runs, on tiny sizes. How fast it is, is no test's business."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FAMILIES = {
    # The peers' packages are not part of this environment; the other kinds take the same way as these, and minutes.
    "queues": ["--only", "queues.end_to_end", "--sides", "S3,SQLite"], "models": ["--only", "models.embed"], "rows": ["--only", "rows.echo"],
    "accept": [], "latency": [], "scale": [], "workers": [], "storage": [], "startup": [],
}  # fmt: skip


def test_every_family_is_tried():
    from benchmarks.__main__ import FAMILIES as known

    assert set(known) == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs(family, tmp_path):
    out, page = tmp_path / "result.json", tmp_path / "page.html"
    env = {k: v for k, v in os.environ.items() if not k.startswith("FACTORY_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks", "--only", family, "--size", "smoke", "--out", str(out), "--report", str(page), *FAMILIES[family]]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["failed"] == [] and result["cases"]
    for case in result["cases"]:
        assert case["sides"], case["name"]
        # Every side gave a figure that is one (a rate over two commits of a tiny run may be none).
        for name, figures in case["sides"].items():
            assert all(run > 0 for run in figures["value"]["runs"] if run == run), (case["name"], name)
        assert case["name"] in page.read_text()

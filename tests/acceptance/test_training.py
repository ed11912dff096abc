"""A training that is killed goes on from its checkpoint and ends as an unbroken one does; its model generates by name."""

import json
import os
import signal
import time

import psutil
import pytest
from PIL import Image, ImageDraw
from sqlalchemy import func, select

from contentfactory.settings import load_settings
from db.models import Artifact, Job
from db.session import Database

pytestmark = pytest.mark.timeout(400)

SHAPES = {
    "steps": 120, "resolution": 64, "latent": 16, "condition": 32, "hidden": 32, "expansion": 64, "blocks": 1, "flow_batch": 16,
    "decoder_batch": 2, "checkpoint_every": 20, "samples_every": 60, "report_every": 5, "warmup": 5,
    "prompts": ["a red circle", "a blue square"],
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Drawn circles and squares in three colours, with captions."""
    folder = tmp_path_factory.mktemp("shapes")
    lines = []
    for n in range(24):
        name, colour = [("red", (220, 30, 30, 255)), ("green", (30, 160, 60, 255)), ("blue", (40, 60, 220, 255))][n % 3]
        picture = Image.new("RGBA", (64, 64))
        box = (22 - n // 2, 22 - n // 2, 42 + n // 2, 42 + n // 2)
        draw = ImageDraw.Draw(picture)
        shape = "circle" if n % 2 else "square"
        (draw.ellipse if n % 2 else draw.rectangle)(box, fill=colour)
        picture.save(folder / f"{n}.png")
        lines.append({"file": f"{n}.png", "captions": [f"a {name} {shape}", f"a {shape} in {name}, size {n}"]})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def losses(cli, job_id):
    events = cli.json("jobs", "logs", job_id)["events"]
    return [(e["data"]["attempt"], int(e["data"]["metrics"]["step"]), e["data"]["metrics"]) for e in events if e["type"] == "job.metrics"]


def train(cli, name, seed=5):
    return cli.json("submit", "train.flow", "--params", json.dumps({**SHAPES, "name": name, "dataset": "dataset:shapes"}), "--seed", str(seed))["id"]


def wait(cli, job_id, check, timeout=120):
    """The job as the command shows it, once it looks right; asked when the ledger has something new, for each command takes a core from training."""
    database, seen = Database(load_settings(state_dir=cli.state).database()), None
    end = time.monotonic() + timeout
    try:
        while True:
            with database.read() as conn:
                artifacts = select(func.count(Artifact.id)).where(Artifact.job_id == job_id).scalar_subquery()
                news = conn.execute(select(Job.state, Job.attempt, artifacts).where(Job.id == job_id)).one()
            if news != seen:
                seen, job = news, cli.json("jobs", "show", job_id)
                if check(job):
                    return job
            assert time.monotonic() < end, f"job is {job['state']}: {job['message']} {job['error']}\n{cli.logs()}"
            time.sleep(0.1)
    finally:
        database.close()


def test_a_killed_training_ends_like_an_unbroken_one(running, shapes, tmp_path):
    running("datasets", "add", "shapes", str(shapes))
    assert running.json("datasets", "add", "shapes", str(shapes))["version"] == 1
    whole = wait(running, train(running, "whole"), lambda j: j["state"] == "succeeded")
    broken = train(running, "broken")
    wait(running, broken, lambda j: any(a["role"] == "checkpoint" for a in j["artifacts"]))
    victims = [p for p in running.processes() if "train@" in p.environ().get("FACTORY_WORKER_NAME", "") and "spawn_main" in " ".join(p.cmdline())]
    assert len(victims) == 1, [p.cmdline() for p in victims]
    os.kill(victims[0].pid, signal.SIGKILL)
    psutil.wait_procs(victims, 10)
    ended = wait(running, broken, lambda j: j["state"] in ("succeeded", "dead", "failed"))
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)
    first, second = losses(running, whole["id"]), losses(running, broken)
    assert (first[-1][1], second[-1][1]) == (SHAPES["steps"], SHAPES["steps"])
    assert second[-1][2]["flow_loss"] == pytest.approx(first[-1][2]["flow_loss"], rel=0.01)
    assert second[-1][2]["decoder_loss"] == pytest.approx(first[-1][2]["decoder_loss"], rel=0.01)
    last_before = max(step for attempt, step, _ in second if attempt == 1)
    first_after = min(step for attempt, step, _ in second if attempt == 2)
    assert last_before - first_after <= SHAPES["checkpoint_every"], "more than one checkpoint interval was repeated"
    made = [{a["name"]: a["sha256"] for a in j["artifacts"]} for j in (whole, ended)]
    assert made[0]["model/model.safetensors"] == made[1]["model/model.safetensors"]
    versions = {m["name"]: m for m in running.json("models", "list")}
    assert versions["broken"]["tasks"] == ["image.generate"]
    lineage = running.json("models", "show", "broken")["lineage"]
    assert lineage["job"] == broken
    assert len(lineage["dataset_sha256"]) == 64
    picture = running.json("submit", "image.generate", "--prompt", "a red circle", "--model", "broken", "--out", str(tmp_path))
    assert picture["state"] == "succeeded"
    with Image.open(tmp_path / picture["artifacts"][0]["name"]) as image:
        assert image.size == (picture["artifacts"][0]["meta"]["width"], picture["artifacts"][0]["meta"]["height"])


def test_mistakes_of_a_training_are_told(running, tmp_path):
    assert "does not exist; " in running("submit", "train.flow", "--name", "x", "--dataset", "dataset:nowhere", code=2)
    assert "resolution" in running("submit", "train.flow", "--name", "x", "--dataset", "dataset:shapes", "--resolution", "100", code=2)
    (tmp_path / "captions.jsonl").write_text('{"file": "gone.png", "captions": ["a"]}\n')
    running("datasets", "add", "broken", str(tmp_path))
    job = running.json("submit", "train.flow", "--name", "x", "--dataset", "dataset:broken", "--wait", code=1)
    assert job["state"] == "failed"
    assert "gone.png" in job["error"]["message"]

"""Fault 17: trainings that are killed, find a broken checkpoint, or are overtaken, end as an unbroken one does (I4, I16)."""

import io
import itertools
import json
import signal
import time
import zipfile
from typing import Any

from harness import Member, Scene, wait
from PIL import Image, ImageDraw
from sqlalchemy import text

EVERY = 20
STEPS = 240
SIZES = {
    "steps": STEPS, "resolution": 64, "latent": 16, "condition": 32, "hidden": 32, "expansion": 64, "blocks": 1, "flow_batch": 16,
    "decoder_batch": 2, "checkpoint_every": EVERY, "samples_every": 60, "report_every": 5, "warmup": 5, "prompts": ["a red circle"],
}  # fmt: skip


def run_trainings(scene: Scene, jobs: int, report: Any) -> None:
    """One unbroken training, then ``jobs - 1`` that are broken in turn by kills, a corrupt checkpoint and a zombie."""
    from faults import judge, strike

    scene.start(2, 1, queues="train")
    scene.wait_workers(2)
    archive = scene.folder / "shapes.zip"
    archive.write_bytes(_shapes())
    dataset = scene.producer.upload(archive)
    whole = _submit(scene, "whole", dataset)
    _ended(scene, whole)
    reference = _files(scene, whole)
    took_over: dict[str, float] = {}
    for n in range(max(1, jobs - 1)):
        way = ("kills", "corrupt", "zombie")[n % 3]
        job = _submit(scene, f"{way}-{n}", dataset)
        if way == "kills":
            for _ in range(2):
                _at_step(scene, job, scene.rng.randrange(10, STEPS - 60))
                member = _holder(scene, job)
                if member is None:
                    break
                strike(scene, member, scene.rng.choice(["child", "tree"]))
                time.sleep(1)
        elif way == "corrupt":
            _at_step(scene, job, scene.rng.randrange(2 * EVERY + 2, STEPS - 60))
            member = _holder(scene, job)
            if member is not None:
                # A stop, so that no new checkpoint comes between; the kill then leaves the broken one as the newest.
                member.send(signal.SIGSTOP)
                rows = _checkpoints(scene, job)
                key = rows[-1]["object_key"]
                body = bytearray(scene.store.get(key))
                for _ in range(50):
                    body[scene.rng.randrange(len(body))] ^= 0xFF
                store = scene.store
                store._client.put_object(Bucket=store.bucket, Key=store._name(key), Body=bytes(body), Metadata={"sha256": rows[-1]["sha256"]})
                scene.history.note("inject", fault="checkpoint_corrupted", name=rows[-1]["name"])
                strike(scene, member, "tree")
        else:
            _at_step(scene, job, scene.rng.randrange(EVERY + 2, STEPS // 2))
            member = _holder(scene, job)
            if member is not None:
                child = member.part("child")
                before = _row(scene, job)["attempt"]
                scene.history.note("inject", fault="zombie", member=member.name, victims=[child.pid])
                member.send(signal.SIGSTOP)
                wait(lambda job=job, before=before: _row(scene, job)["attempt"] > before, 60, "the takeover")
                took_over[job] = time.time()
                time.sleep(2)
                member.send(signal.SIGCONT)  # goes on training, and soon has a checkpoint to write
        _ended(scene, job)
        broken = 2 if way == "corrupt" else 1
        _compare(scene, report, job, way, reference, broken)
        for row in _artifacts(scene, job):
            if job in took_over and row["attempt"] == 1 and row["created_at"] > took_over[job] + 0.5:
                report.violations.append(f"I4: the zombie of {job} wrote {row['name']}")
    judge(scene, report, 60)


def _compare(scene: Scene, report: Any, job: str, way: str, reference: dict[str, str], intervals: int) -> None:
    row = _row(scene, job)
    if row["state"] != "succeeded":
        report.violations.append(f"I16: training {way} is {row['state']}: {row['error']}")
        return
    if _files(scene, job) != reference:
        report.violations.append(f"I16: training {way} made another model than the unbroken one")
    with scene.database.read() as conn:
        data = conn.execute(text("SELECT data FROM events WHERE job_id = :id AND type = 'job.metrics' ORDER BY id"), {"id": job}).scalars()
        points = [(d["attempt"], int(d["metrics"]["step"])) for d in data if "step" in d["metrics"]]
    attempts = sorted({a for a, _ in points})
    repeated = []
    for earlier, later in itertools.pairwise(attempts):
        last = max(s for a, s in points if a == earlier)
        first = min(s for a, s in points if a == later)
        repeated.append(last - first)
        # A zombie computes on after the takeover until it learns of it; those steps are nobody's.
        if way != "zombie" and last - first > intervals * EVERY:
            report.violations.append(f"I16: training {way} repeated {last - first} steps, the interval is {EVERY}")
    if points and max(s for _, s in points) != STEPS:
        report.violations.append(f"I16: training {way} ended at step {max(s for _, s in points)}")
    report.notes[way] = {"attempts": row["attempt"], "steps_repeated": repeated, "same_model": _files(scene, job) == reference}


def _submit(scene: Scene, name: str, dataset: str) -> str:
    job = scene.producer.submit("train.flow", {**SIZES, "name": name, "dataset": dataset}, seed=5)
    scene.accepted[job] = ""
    return job


def _row(scene: Scene, job: str) -> Any:
    with scene.database.read() as conn:
        query = "SELECT state, attempt, progress, error, lease_owner FROM jobs WHERE id = :id"
        return conn.execute(text(query), {"id": job}).mappings().one()


def _artifacts(scene: Scene, job: str) -> list[Any]:
    with scene.database.read() as conn:
        query = "SELECT name, role, attempt, object_key, sha256, created_at FROM artifacts WHERE job_id = :id ORDER BY position"
        return list(conn.execute(text(query), {"id": job}).mappings())


def _checkpoints(scene: Scene, job: str) -> list[Any]:
    return [r for r in _artifacts(scene, job) if r["role"] == "checkpoint"]


def _files(scene: Scene, job: str) -> dict[str, str]:
    return {r["name"]: r["sha256"] for r in _artifacts(scene, job) if r["name"].endswith(".safetensors")}


def _at_step(scene: Scene, job: str, step: int) -> None:
    """Wait until the training is about there, with a checkpoint behind it, or has ended."""

    def there() -> bool:
        row = _row(scene, job)
        if row["state"] in ("succeeded", "failed", "dead"):
            return True
        return row["state"] == "running" and (row["progress"] or 0) * STEPS >= step and len(_checkpoints(scene, job)) > (step > 2 * EVERY)

    wait(there, 180, f"step {step}", step=0.05)


def _holder(scene: Scene, job: str) -> Member | None:
    row = _row(scene, job)
    if row["state"] != "running":
        return None
    pid = row["lease_owner"].rsplit("/", 1)[-1].partition("-")[0]
    for member in scene.fleet.named("worker"):
        child = member.part("child")
        if child is not None and str(child.pid) == pid:
            return member
    return None


def _ended(scene: Scene, job: str) -> None:
    wait(lambda: _row(scene, job)["state"] in ("succeeded", "failed", "dead"), 240, "the training's end")


def _shapes() -> bytes:
    out = io.BytesIO()
    lines = []
    with zipfile.ZipFile(out, "w") as archive:
        for n in range(24):
            name, colour = [("red", (220, 30, 30, 255)), ("green", (30, 160, 60, 255)), ("blue", (40, 60, 220, 255))][n % 3]
            picture = Image.new("RGBA", (64, 64))
            draw = ImageDraw.Draw(picture)
            box = (22 - n // 2, 22 - n // 2, 42 + n // 2, 42 + n // 2)
            (draw.ellipse if n % 2 else draw.rectangle)(box, fill=colour)
            data = io.BytesIO()
            picture.save(data, "PNG")
            archive.writestr(f"{n}.png", data.getvalue())
            lines.append({"file": f"{n}.png", "captions": [f"a {name} shape", f"a shape in {name}, size {n}"]})
        archive.writestr("captions.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    return out.getvalue()

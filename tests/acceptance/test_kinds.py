"""Each kind once through command, queue, worker, storage and delivery, and its file decoded and measured."""

import io
import json
import wave

import numpy as np
import pytest
from PIL import Image

from contentfactory.jobs.spec import load_kinds
from worker.media.video import probe

pytestmark = pytest.mark.timeout(400)

FACTS = "The lighthouse stands on a rock. It was built in 1850. Its light is seen 30 kilometres away."
LINES = [
    {"custom_id": "text", "kind": "text.generate", "params": {"prompt": "Write one short sentence about the sea.", "max_tokens": 30, "max_sentences": 1}},
    {"custom_id": "chat", "kind": "text.chat", "params": {"messages": [{"role": "user", "content": "What is the capital of France? Answer in one word."}], "max_tokens": 12, "temperature": 0}},
    {"custom_id": "vector", "kind": "text.embed", "params": {"input": ["a cat", "a kitten", "tax law"]}},
    {"custom_id": "echo", "kind": "text.echo", "params": {"text": FACTS}},
    {"custom_id": "speech", "kind": "audio.speech", "params": {"text": {"job": "echo"}}},
    {"custom_id": "check", "kind": "audio.transcribe", "params": {"audio": {"job": "speech"}, "reference": {"job": "echo"}}},
    {"custom_id": "music", "kind": "audio.music", "params": {"mood": "calm", "duration_s": 6}},
    {"custom_id": "picture", "kind": "image.generate", "params": {"prompt": "a red apple"}},
    {"custom_id": "style", "kind": "image.stylize", "params": {"image": {"job": "picture"}, "style": "mosaic"}},
    {"custom_id": "large", "kind": "image.upscale", "params": {"image": {"job": "picture"}, "scale": 2}},
    {"custom_id": "card", "kind": "image.compose", "params": {"picture": {"job": "picture"}, "headline": "An apple – 苹果 – تفاحة", "body": {"job": "echo"}}},
    {"custom_id": "clip", "kind": "video.compose", "params": {"scenes": [{"image": {"job": "card"}}, {"image": {"job": "picture"}}], "narration": {"job": "speech"},
     "narration_timings": {"job": "speech", "output": "timings.json"}, "music": {"job": "music"}, "width": 320, "height": 240, "fps": 12}},
]  # fmt: skip


@pytest.fixture(scope="module")
def made(running, tmp_path_factory):
    """Everything of LINES, delivered."""
    folder = tmp_path_factory.mktemp("kinds")
    style = running.json("kinds", "show", "image.stylize")["schema"]["properties"]["style"]
    names = json.dumps(style)
    lines = json.loads(json.dumps(LINES).replace('"mosaic"', '"mosaic"' if '"mosaic"' in names else json.dumps(_first(style))))
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = running.json("batch", "run", str(folder / "m.jsonl"), "--watch", code=None, timeout=280)
    failed = running.json("jobs", "list", "--batch", out["id"], "--state", "failed")
    assert out["counts"]["succeeded"] == len(LINES), [(j["custom_id"], j["error"]) for j in failed]
    running("batch", "deliver", out["id"], "--to", str(folder / "out"))
    return folder / "out"


def _first(schema):
    for branch in (schema, *schema.get("anyOf", [])):
        if "enum" in branch:
            return branch["enum"][0]
    raise AssertionError(schema)


def only(made, name, pattern):
    found = sorted((made / name).rglob(pattern))
    assert found, f"{name} has no {pattern}"
    return found[0]


def test_every_kind_is_here():
    trained = {n for n in load_kinds() if n.startswith("train.")}
    assert {line["kind"] for line in LINES} | trained == set(load_kinds())


def test_texts(made):
    assert only(made, "text", "*.txt").read_text().rstrip()[-1] in ".!?\"'”"
    assert "Paris" in only(made, "chat", "*.txt").read_text()
    vectors = np.array(json.loads(only(made, "vector", "*.json").read_text())["embeddings"])
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_speech_says_its_text(made):
    with wave.open(str(only(made, "speech", "*.wav"))) as sound:
        assert 4 < sound.getnframes() / sound.getframerate() < 15
    words = only(made, "check", "*.txt").read_text()
    assert "lighthouse" in words.lower()
    report = json.loads(only(made, "check", "*.json").read_text())
    assert report["wer"] <= 0.15, (report["wer"], words)


def test_music_sounds(made):
    with wave.open(str(only(made, "music", "*.wav"))) as sound:
        assert sound.getnframes() == 6 * sound.getframerate()
        samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(float)
    assert 500 < samples.std() < 20000


@pytest.mark.parametrize("name", ["picture", "style", "large", "card"])
def test_pictures_show_something(made, name):
    with Image.open(io.BytesIO(only(made, name, "*.png").read_bytes())) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(float)
    assert min(pixels.shape[:2]) >= 64
    assert pixels.std() > 12


def test_the_apple_is_red(made):
    with Image.open(only(made, "picture", "*.png")) as picture:
        rgba = np.asarray(picture.convert("RGBA")).astype(float)
    r, g, b = (rgba[..., :3] * (rgba[..., 3:] > 128)).sum((0, 1)) / max(1, (rgba[..., 3] > 128).sum())
    assert r > g + 30
    assert r > b + 30


def test_the_large_one_is_twice_as_large(made):
    with Image.open(only(made, "picture", "*.png")) as small, Image.open(only(made, "large", "*.png")) as large:
        assert large.size == (2 * small.width, 2 * small.height)


def test_the_clip_is_as_long_as_its_narration(made):
    with wave.open(str(only(made, "speech", "*.wav"))) as sound:
        spoken = sound.getnframes() / sound.getframerate()
    info = probe(only(made, "clip", "*.mp4"))
    assert abs(info.duration_s - spoken) <= 0.5
    assert (info.width, info.height) == (320, 240)
    assert "lighthouse" in only(made, "clip", "*.srt").read_text().lower()

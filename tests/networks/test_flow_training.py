"""The text-to-image recipe from a dataset on the disk to a weights file, and the dataset format."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from worker.networks import flow
from worker.training.checkpoints import CheckpointError
from worker.training.data import CAPTIONS_FILE, DatasetError, PictureDataset, digest
from worker.training.flow import FlowTrainingConfig, SizesError, embed_all, grid, train_flow
from worker.training.solver import SilentMonitor, TrainingInterrupted

CONFIG = FlowTrainingConfig(
    steps=6, resolution=64, latent=8, encoder_resolution=8, condition=16, hidden=16, expansion=16, blocks=1,
    flow_batch=16, decoder_batch=2, warmup=1, checkpoint_every=2, samples_every=3, report_every=1,
    prompts=("disc 0", "disc 1"), sample_steps=2, seed=3,
)  # fmt: skip


def embed(texts: list[str]) -> Tensor:
    """Vectors of width 16 that depend on the text alone."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts]
    return F.normalize(
        torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(s)) for s in seeds]), dim=-1
    )


def write_dataset(root: Path, count: int = 9, edge: int = 64) -> Path:
    root.mkdir(parents=True)
    lines = []
    for index in range(count):
        picture = Image.new("RGBA", (edge, edge))
        box = (4 + index, 6, 34 + index, 50)
        ImageDraw.Draw(picture).ellipse(box, fill=(25 * index, 200 - 20 * index, 90, 255))
        picture.save(root / f"{index}.png")
        lines.append({"file": f"{index}.png", "captions": [f"disc {index}", f"ellipse {index}"], "flip": index % 2 == 0})
    (root / CAPTIONS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> PictureDataset:
    return PictureDataset.load(folder, 64)


class Stopper(SilentMonitor):
    """Stops after some steps; keeps what it was shown."""

    def __init__(self, after: int = 10**9) -> None:
        self.left = after
        self.metrics: list[dict[str, float]] = []
        self.samples: list[Image.Image] = []

    def on_step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)

    def on_samples(self, step: int, picture: Image.Image) -> None:
        self.samples.append(picture)

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_the_recipe_ends_in_a_model(dataset: PictureDataset, tmp_path: Path) -> None:
    monitor = Stopper()
    result = train_flow(CONFIG, dataset, embed, monitor, tmp_path)
    assert result.step == 6 and result.model_path.parent == tmp_path
    assert len(monitor.metrics) == 6 and len(monitor.samples) == 2
    assert set(result.metrics) == {"flow_loss", "decoder_loss", "learning_rate", "pictures_per_second"}
    assert monitor.samples[0].size == (256, 64)
    model = flow.load(result.model_path)
    assert model.config.resolution == 64 and model.config.text_width == 16
    about = flow.describe(result.model_path)["about"]
    assert about == {"dataset": dataset.digest, "steps": "6", "seed": "3"}
    made = flow.sample(model, embed(["disc 1"]), generators=[torch.Generator().manual_seed(0)], steps=2, guidance=1.0)
    assert made.shape == (1, 4, 64, 64)


@pytest.mark.parametrize("flips", [False, True])
def test_a_resumed_training_ends_in_the_same_bytes(dataset: PictureDataset, tmp_path: Path, flips: bool) -> None:
    config = replace(CONFIG, flips=flips)
    whole = train_flow(config, dataset, embed, SilentMonitor(), tmp_path / "whole")
    with pytest.raises(TrainingInterrupted) as stopped:
        train_flow(config, dataset, embed, Stopper(3), tmp_path / "broken")
    assert stopped.value.step == 3
    resumed = train_flow(
        config, dataset, embed, SilentMonitor(), tmp_path / "broken", tmp_path / "broken" / "checkpoints"
    )
    one, other = load_file(whole.model_path), load_file(resumed.model_path)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.metrics["flow_loss"] == resumed.metrics["flow_loss"]
    assert whole.metrics["decoder_loss"] == resumed.metrics["decoder_loss"]


def test_the_global_generator_is_left_alone(dataset: PictureDataset, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first = train_flow(replace(CONFIG, steps=1), dataset, embed, SilentMonitor(), tmp_path / "a")
    assert torch.equal(torch.rand(1), expected)
    second = train_flow(replace(CONFIG, steps=1), dataset, embed, SilentMonitor(), tmp_path / "b")
    assert first.model_path.read_bytes() == second.model_path.read_bytes()


def test_another_dataset_cannot_be_resumed(dataset: PictureDataset, folder: Path, tmp_path: Path) -> None:
    train_flow(CONFIG, dataset, embed, SilentMonitor(), tmp_path / "work")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "note.txt").write_text("changed")
    with pytest.raises(CheckpointError, match="dataset differ"):
        train_flow(CONFIG, PictureDataset.load(other, 64), embed, SilentMonitor(), tmp_path / "work",
                   tmp_path / "work" / "checkpoints")  # fmt: skip


def test_fine_tuning_keeps_the_latents(dataset: PictureDataset, tmp_path: Path) -> None:
    first = train_flow(CONFIG, dataset, embed, SilentMonitor(), tmp_path / "a")
    tuned = train_flow(
        replace(CONFIG, steps=1, learning_rate=1e-6), dataset, embed, SilentMonitor(), tmp_path / "b",
        start_from=first.model_path,
    )  # fmt: skip
    one, other = load_file(first.model_path), load_file(tuned.model_path)
    assert torch.equal(one["coder.basis"], other["coder.basis"])
    assert torch.allclose(one["flow.enter.weight"].float(), other["flow.enter.weight"].float(), atol=1e-3)
    with pytest.raises(ValueError, match="the job asks for"):
        train_flow(replace(CONFIG, hidden=32), dataset, embed, SilentMonitor(), tmp_path / "c",
                   start_from=first.model_path)  # fmt: skip


REMEMBERING = replace(CONFIG, memory=6, recall=16, memory_steps=40, caption_jitter=0.01)


def test_a_memory_is_fitted_and_kept(dataset: PictureDataset, tmp_path: Path) -> None:
    monitor = Stopper()
    result = train_flow(REMEMBERING, dataset, embed, monitor, tmp_path)
    assert "memory_loss" in monitor.metrics[0] and len(monitor.metrics) == 7
    model = flow.load(result.model_path)
    assert (model.config.memory, model.config.subjects) == (6, 9)
    assert model.memory is not None
    texts = [captions[0] for captions in dataset.captions]
    right = (model.memory.likeness(embed(texts)).argmax(1) == torch.arange(9)).sum()
    assert right >= 7, f"{right} of 9 captions recall their picture"
    again = train_flow(REMEMBERING, dataset, embed, SilentMonitor(), tmp_path / "again")
    assert again.model_path.read_bytes() == result.model_path.read_bytes()


def test_a_resumed_training_remembers_the_same(dataset: PictureDataset, tmp_path: Path) -> None:
    whole = train_flow(REMEMBERING, dataset, embed, SilentMonitor(), tmp_path / "whole")
    with pytest.raises(TrainingInterrupted) as stopped:
        train_flow(REMEMBERING, dataset, embed, Stopper(43), tmp_path / "broken")
    assert stopped.value.step == 3
    monitor = Stopper()
    resumed = train_flow(
        REMEMBERING, dataset, embed, monitor, tmp_path / "broken", tmp_path / "broken" / "checkpoints"
    )
    assert not any("memory_loss" in metrics for metrics in monitor.metrics), "it was fitted twice"
    assert whole.model_path.read_bytes() == resumed.model_path.read_bytes()


def test_stopped_while_the_memory_is_fitted(dataset: PictureDataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted) as stopped:
        train_flow(REMEMBERING, dataset, embed, Stopper(5), tmp_path)
    assert stopped.value.step == 0


def test_fine_tuning_keeps_the_memory(dataset: PictureDataset, folder: Path, tmp_path: Path) -> None:
    first = train_flow(REMEMBERING, dataset, embed, SilentMonitor(), tmp_path / "a")
    other = shutil.copytree(folder, tmp_path / "other")
    lines = (other / CAPTIONS_FILE).read_text().splitlines()[:8]  # another number of subjects
    (other / CAPTIONS_FILE).write_text("".join(line + "\n" for line in lines))
    monitor = Stopper()
    tuned = train_flow(  # a job that says nothing of a memory takes what is there
        CONFIG, PictureDataset.load(other, 64), embed, monitor, tmp_path / "b", start_from=first.model_path
    )
    one, two = load_file(first.model_path), load_file(tuned.model_path)
    kept = [name for name in one if name.startswith("memory.")]
    assert kept and all(torch.equal(one[name], two[name]) for name in kept)
    assert not any("memory_loss" in metrics for metrics in monitor.metrics)
    monitor = Stopper()
    asked = train_flow(REMEMBERING, dataset, embed, monitor, tmp_path / "d", start_from=first.model_path)
    assert "memory_loss" in monitor.metrics[0]
    two = load_file(asked.model_path)
    assert torch.equal(one["memory.places"], two["memory.places"])
    assert not torch.equal(one["memory.straight.weight"], two["memory.straight.weight"])
    with pytest.raises(SizesError, match="the job asks for"):
        train_flow(replace(REMEMBERING, memory=5), dataset, embed, SilentMonitor(), tmp_path / "c",
                   start_from=first.model_path)  # fmt: skip


def test_a_memory_is_added_to_an_earlier_model(dataset: PictureDataset, tmp_path: Path) -> None:
    first = train_flow(CONFIG, dataset, embed, SilentMonitor(), tmp_path / "a")
    config = replace(REMEMBERING, steps=1, learning_rate=1e-7)
    grown = flow.load(
        train_flow(config, dataset, embed, SilentMonitor(), tmp_path / "b", start_from=first.model_path).model_path
    )
    assert grown.config.memory == 6
    text, generators = embed(["disc 1"]), [torch.Generator().manual_seed(0)]
    before = flow.sample(flow.load(first.model_path), text, generators=generators, steps=2, guidance=1.0)
    generators = [torch.Generator().manual_seed(0)]
    assert torch.allclose(before, flow.sample(grown, text, generators=generators, steps=2, guidance=1.0), atol=2e-2)


def test_pictures_of_one_subject_share_a_place(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    lines = [json.loads(text) for text in (copy / CAPTIONS_FILE).read_text().splitlines()]
    lines[3]["subject"] = lines[4]["subject"] = "2.png"
    (copy / CAPTIONS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = PictureDataset.load(copy, 64)
    assert dataset.subjects[:6] == ["0.png", "1.png", "2.png", "2.png", "2.png", "5.png"]
    result = train_flow(REMEMBERING, dataset, embed, SilentMonitor(), tmp_path / "work")
    assert flow.load(result.model_path).config.subjects == 7


def test_a_memory_wider_than_the_sentence_vectors(dataset: PictureDataset, tmp_path: Path) -> None:
    with pytest.raises(SizesError, match="memory is 17; allowed is at most 16"):
        train_flow(replace(REMEMBERING, memory=17), dataset, embed, SilentMonitor(), tmp_path)


def test_the_wrong_resolution(dataset: PictureDataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="64 pixels; allowed is 128"):
        train_flow(replace(CONFIG, resolution=128), dataset, embed, SilentMonitor(), tmp_path)


def test_texts_are_embedded_once() -> None:
    seen: list[str] = []

    def counting(texts: list[str]) -> Tensor:
        seen.extend(texts)
        return embed(texts)

    vectors = embed_all(counting, ["b", "a", "b"])
    assert sorted(seen) == ["a", "b"]
    assert torch.allclose(vectors, embed(["b", "a", "b"]), atol=1e-6)
    with pytest.raises(ValueError, match="embed returned"):
        embed_all(lambda texts: torch.zeros(1, 16), ["a", "b"])
    with pytest.raises(ValueError, match="not finite"):
        embed_all(lambda texts: torch.full((len(texts), 16), float("nan")), ["a", "b"])


def test_the_grid_is_on_white() -> None:
    pictures = torch.zeros(3, 4, 8, 8)
    pictures[1, 0], pictures[1, 3] = 1, 1
    sheet = grid(pictures, columns=2)
    assert sheet.size == (16, 16)
    assert sheet.getpixel((0, 0)) == (255, 255, 255) and sheet.getpixel((12, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("resolution", 96), ("caption_dropout", 1.0), ("flow_batch", 0), ("prompts", ()),
     ("learning_rate", 0), ("schedule", "steps"), ("guidance", 31), ("condition", 17), ("seed", -1),
     ("time_mean", 5.0), ("time_spread", 0.0), ("memory", -1), ("recall", 8), ("memory_steps", 0)],
)  # fmt: skip
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is "):
        replace(CONFIG, **{field: value})  # type: ignore[arg-type]


# The dataset format.


def test_a_dataset_is_read(dataset: PictureDataset) -> None:
    assert dataset.pictures.shape == (9, 64, 64, 4) and dataset.pictures.dtype == np.uint8
    assert dataset.captions[2] == ["disc 2", "ellipse 2"]
    assert dataset.flips.tolist() == [True, False] * 4 + [True]
    # Premultiplied: nothing shines where nothing is.
    assert not dataset.pictures[dataset.pictures[..., 3] == 0].any()
    assert dataset.pictures[..., 3].max() == 255


def test_a_folder_and_its_archives_are_the_same(dataset: PictureDataset, folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for path in sorted(folder.iterdir(), reverse=True):
            archive.write(path, path.name)
    with tarfile.open(tmp_path / "d.tar.gz", "w:gz") as tar:
        tar.add(folder, "inner")
    for name in ("d.zip", "d.tar.gz"):
        assert digest(tmp_path / name) == dataset.digest
        assert np.array_equal(PictureDataset.load(tmp_path / name, 64).pictures, dataset.pictures)


def test_the_digest_follows_the_content(folder: Path, dataset: PictureDataset, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert digest(copy) == dataset.digest
    (copy / CAPTIONS_FILE).write_text((copy / CAPTIONS_FILE).read_text().replace("disc 1", "disk 1"))
    assert digest(copy) != dataset.digest


def test_pictures_of_any_shape_and_mode_fit(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    Image.new("L", (100, 20), 128).save(copy / "0.png")
    picture = PictureDataset.load(copy, 64).pictures[0]
    assert picture[0].max() == 0 and picture[32, 32].tolist() == [128, 128, 128, 255]


def line(**changes: object) -> str:
    return json.dumps({"file": "0.png", "captions": ["x"], **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 10: not JSON"),
        ("[1]", "line 10: is a list"),
        (line(file="no.png"), "line 10: picture 'no.png' is missing"),
        (line(file="0.png"), "line 10: '0.png' stands in line 1"),
        (line(file="../x.png"), "line 10: file is '../x.png'"),
        (line(file="/etc/hosts"), "line 10: file is '/etc/hosts'"),
        (line(captions=[]), "line 10: captions is"),
        (line(captions=["ok", " "]), "line 10: a caption is ' '"),
        (line(captions="x"), "line 10: captions is 'x'"),
        (line(captions=["x" * 1001]), "1001 characters"),
        (line(weight=0), "line 10: weight is 0"),
        (line(weight=True), "line 10: weight is True"),
        (line(flip="yes"), "line 10: flip is 'yes'"),
        (line(subject=" "), "line 10: subject is ' '"),
        (line(subject=3), "line 10: subject is '3'"),
        (line(caption="x"), "line 10: unknown key 'caption'"),
        (line(file="bad.png"), "line 10: bad.png: not a picture"),
    ],
)
def test_a_bad_line_is_named(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "bad.png").write_bytes(b"\x89PNG no picture")
    with (copy / CAPTIONS_FILE).open("a") as handle:
        handle.write(text + "\n")
    with pytest.raises(DatasetError) as raised:
        PictureDataset.load(copy, 64)
    assert message in str(raised.value)


def break_nothing(root: Path) -> Path:
    return root / "missing"


def break_captions(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def break_archive(root: Path) -> Path:
    (root / "x.zip").write_bytes(b"nothing")
    return root / "x.zip"


def break_count(root: Path) -> Path:
    return write_dataset(root / "few", count=7)


def break_text(root: Path) -> Path:
    write_dataset(root / "latin")
    (root / "latin" / CAPTIONS_FILE).write_bytes(b"\xff\xfe")
    return root / "latin"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (break_nothing, "no such folder or file"),
        (break_captions, "holds no captions.jsonl"),
        (break_archive, "neither a folder nor a zip nor a tar"),
        (break_count, "7 pictures; allowed are at least 8"),
        (break_text, "not UTF-8"),
    ],
)
def test_a_bad_dataset_is_named(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        PictureDataset.load(make(tmp_path), 64)


def test_links_out_of_the_dataset_are_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGBA", (8, 8)).save(secret)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "0.png").unlink()
    (copy / "0.png").symlink_to(secret)
    with pytest.raises(DatasetError, match="outside the dataset"):
        PictureDataset.load(copy, 64)

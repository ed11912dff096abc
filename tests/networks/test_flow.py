"""The text-to-image network: shapes, gradients, learning, files, and items that ignore their neighbours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from worker.networks.flow import (
    FORMAT,
    LANES,
    Block,
    ConvBlock,
    FlowConfig,
    ModelFormatError,
    TextMemory,
    TextToImage,
    decoder_loss,
    describe,
    flow_loss,
    load,
    memory_loss,
    sample,
    save,
    straight_alpha,
)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def text_vectors(count: int, width: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def awake(config: FlowConfig) -> TextToImage:
    """A model whose zero-initialised layers are random, so that everything it holds has a say."""
    torch.manual_seed(0)
    model = TextToImage(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model.eval()


SHIPPED = replace(FlowConfig(), memory=128, subjects=1376)
"""Sizes of the model in the repository."""

FORGETFUL = replace(FlowConfig.tiny(), memory=0, subjects=0)
"""The tiny sizes without a memory: what weights files before it hold."""


@pytest.fixture(params=[FlowConfig.tiny(), FORGETFUL], ids=["memory", "plain"])
def model(request: pytest.FixtureRequest) -> TextToImage:
    return awake(request.param)


def pictures(count: int, edge: int) -> Tensor:
    """Discs of different places and colours, premultiplied RGBA, (count, 4, edge, edge)."""
    generator = torch.Generator().manual_seed(1)
    axis = torch.linspace(-1, 1, edge)
    made = torch.zeros(count, 4, edge, edge)
    for index in range(count):
        x, y = (torch.rand(2, generator=generator) - 0.5).tolist()
        alpha = ((axis[None] - x) ** 2 + (axis[:, None] - y) ** 2 < 0.25).float()
        made[index] = torch.cat([torch.rand(3, 1, 1, generator=generator) * alpha, alpha[None]])
    return made


def test_the_default_fits_its_file_limit() -> None:
    count = sum(tensor.numel() for tensor in TextToImage(SHIPPED).state_dict().values())
    assert 2 * count < 19_990_000
    assert FlowConfig().resolution == 128
    assert FlowConfig.for_resolution(64).resolution == 64


def test_shapes_and_ranges(model: TextToImage) -> None:
    config = model.config
    text = model.understand(text_vectors(3, 16))
    assert text.shape == (3, 16 + config.memory)
    assert model.flow(torch.randn(3, 8), torch.rand(3), text).shape == (3, 8)
    assert model.decoder(torch.randn(3, 8)).shape == (3, 4, 32, 32)
    assert model.coder(torch.rand(3, 4, 32, 32)).shape == (3, config.latent)
    made = sample(model, text_vectors(3, 16), generators=seeded(1, 2, 3), steps=4, guidance=2.0)
    assert made.shape == (3, 4, 32, 32)
    assert made.min() >= 0 and made.max() <= 1
    assert made.std() > 0
    assert sample(model, torch.zeros(0, 16), generators=[], steps=2, guidance=1.0).shape == (0, 4, 32, 32)


def test_same_seed_same_picture_and_another_seed_another(model: TextToImage) -> None:
    text = text_vectors(1, 16)
    first, again, other = (sample(model, text, generators=seeded(s), steps=5, guidance=2.0) for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_text_and_guidance_change_the_picture(model: TextToImage) -> None:
    first, second = text_vectors(2, 16).split(1)
    one = sample(model, first, generators=seeded(1), steps=5, guidance=2.0)
    assert not torch.equal(one, sample(model, second, generators=seeded(1), steps=5, guidance=2.0))
    assert not torch.equal(one, sample(model, first, generators=seeded(1), steps=5, guidance=0.0))


@pytest.mark.parametrize("config", [FlowConfig.tiny(), FlowConfig(), SHIPPED], ids=["tiny", "default", "shipped"])
def test_an_item_ignores_its_neighbours(config: FlowConfig) -> None:
    model = awake(config)
    count = 2 * LANES + 3
    text = text_vectors(count, config.text_width)
    together = sample(model, text, generators=seeded(*range(count)), steps=3, guidance=2.0)
    for index in (0, 1, 5, LANES - 1, LANES, count - 1):
        alone = sample(model, text[index : index + 1], generators=seeded(index), steps=3, guidance=2.0)
        assert torch.equal(alone[0], together[index]), f"item {index} differs alone and in a batch"
    turned = sample(model, text.flip(0), generators=seeded(*reversed(range(count))), steps=3, guidance=2.0)
    assert torch.equal(turned.flip(0), together)


def test_sample_says_what_is_wrong(model: TextToImage) -> None:
    text = text_vectors(2, 16)
    with pytest.raises(ValueError, match=r"text_vectors is \(2, 15\)"):
        sample(model, text[:, :15], generators=seeded(1, 2), steps=2, guidance=1.0)
    with pytest.raises(ValueError, match="1 generators for 2 items"):
        sample(model, text, generators=seeded(1), steps=2, guidance=1.0)
    with pytest.raises(ValueError, match="steps is 0"):
        sample(model, text, generators=seeded(1, 2), steps=0, guidance=1.0)
    with pytest.raises(ValueError, match="guidance is nan"):
        sample(model, text, generators=seeded(1, 2), steps=2, guidance=float("nan"))


def test_gradients_reach_every_parameter(model: TextToImage) -> None:
    (generator,) = seeded(0)
    text = model.understand(text_vectors(6, 16))
    flow_loss(model.flow, torch.randn(6, 8), text, generator, dropout=0.1, jitter=0.01).backward()
    if model.memory is not None:
        memory_loss(model.memory, text_vectors(6, 16), torch.arange(6) % 5).backward()
    decoder_loss(
        model.decoder, torch.randn(2, 8), torch.rand(2, 4, 32, 32), generator, noise=0.1, edges=1.0
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_new_network_starts_quiet() -> None:
    config = FlowConfig.tiny()
    stream = torch.randn(2, config.hidden)
    assert torch.equal(Block(config)(stream, torch.randn(2, config.condition)), stream)
    maps = torch.randn(2, 8, 4, 4)
    assert torch.equal(ConvBlock(8)(maps), maps)


def test_the_coder_keeps_what_it_can() -> None:
    config = FlowConfig.tiny()
    model = TextToImage(config)
    shown = pictures(40, 32)
    model.coder.fit(shown)
    latents = model.coder(shown)
    assert latents.mean(0).abs().max() < 1e-3
    assert latents.var(0, correction=0).mean() == pytest.approx(1.0, abs=1e-2)
    flat = F.interpolate(shown, size=(8, 8), mode="area").flatten(1)
    line = torch.linalg.lstsq(latents, flat - model.coder.mean).solution
    left = (flat - model.coder.mean - latents @ line).square().sum()
    centred = flat - flat.mean(0)
    best = torch.linalg.svdvals(centred)[config.latent :].square().sum()
    assert left == pytest.approx(best.item(), rel=1e-2)


def test_the_coder_takes_fewer_pictures_than_components() -> None:
    coder = TextToImage(FlowConfig.tiny()).coder
    coder.fit(pictures(4, 32))
    assert torch.isfinite(coder.basis).all()
    assert coder(pictures(4, 32)).std() > 0.1


@pytest.mark.parametrize("config", [FlowConfig.tiny(), FORGETFUL], ids=["memory", "plain"])
def test_one_batch_overfits(config: FlowConfig) -> None:
    torch.manual_seed(0)
    model = TextToImage(config)
    shown = pictures(4, 32)
    model.coder.fit(shown)
    latents, text = model.coder(shown), text_vectors(4, 16)
    understood = model.understand(text).detach()
    optimiser = torch.optim.Adam([*model.flow.parameters(), *model.decoder.parameters()], lr=4e-3)
    (generator,) = seeded(0)
    many = torch.arange(256) % 4
    for _ in range(300):
        optimiser.zero_grad()
        loss = flow_loss(model.flow, latents[many], understood[many], generator, dropout=0.0, jitter=0.0)
        loss = loss + decoder_loss(model.decoder, latents, shown, generator, noise=0.02, edges=0.5)
        loss.backward()
        optimiser.step()
    made = sample(model.eval(), text, generators=seeded(1, 2, 3, 4), steps=20, guidance=1.0)
    premultiplied = torch.cat([made[:, :3] * made[:, 3:], made[:, 3:]], dim=1)
    distance = (premultiplied[:, None] - shown[None]).abs().mean(dim=(2, 3, 4))
    assert distance.argmin(1).tolist() == [0, 1, 2, 3]
    assert distance.diagonal().max() < 0.08


def test_saved_and_loaded_makes_the_same(model: TextToImage, tmp_path: Path) -> None:
    with torch.no_grad():  # half precision on the disk: compare with weights that it holds exactly
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.half().float())
    path = tmp_path / "model.safetensors"
    save(model, path, {"dataset": "abc"})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert describe(path)["about"] == {"dataset": "abc"}
    read = load(path)
    assert read.config == model.config
    assert all(t.dtype == torch.float32 for t in read.state_dict().values())
    arguments = {"steps": 4, "guidance": 2.0}
    text = text_vectors(2, 16)
    assert torch.equal(
        sample(model, text, generators=seeded(1, 2), **arguments),  # type: ignore[arg-type]
        sample(read, text, generators=seeded(1, 2), **arguments),  # type: ignore[arg-type]
    )


def test_foreign_files_are_refused(model: TextToImage, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no weights")
    with pytest.raises(ModelFormatError, match="not readable"):
        load(path)
    with pytest.raises(ModelFormatError, match="not readable"):
        load(tmp_path / "missing.safetensors")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ModelFormatError, match="format is None"):
        load(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"contentfactory": json.dumps({"format": FORMAT})})
    with pytest.raises(ModelFormatError, match="do not make a model"):
        load(path)


def test_alpha_is_straightened() -> None:
    picture = torch.tensor([0.25, 0.5, 0.0, 0.5]).view(4, 1, 1)
    straight = straight_alpha(picture).flatten()
    assert straight[:2].tolist() == pytest.approx([0.5, 1.0])
    assert straight[3] == pytest.approx(0.5)
    assert straight_alpha(torch.tensor([0.3, 0.3, 0.3, 0.0]).view(4, 1, 1)).sum() == 0


@pytest.mark.parametrize(
    ("field", "value"), [("latent", 0), ("whitening", 1.5), ("channels", ()), ("condition", 15), ("blocks", -1)]
)
def test_sizes_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is "):
        FlowConfig(**{field: value})  # type: ignore[arg-type]


def test_unknown_resolution() -> None:
    with pytest.raises(ValueError, match="resolution is 96"):
        FlowConfig.for_resolution(96)


def test_times_follow_their_mean(model: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def record(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        seen.append(t)
        return x

    monkeypatch.setattr(model.flow, "forward", record)
    for mean in (-3.0, 0.0, 3.0):
        flow_loss(
            model.flow, torch.zeros(400, 8), model.understand(text_vectors(400, 16)), seeded(0)[0], dropout=0.0, jitter=0.0,
            time_mean=mean, time_spread=0.5,
        )  # fmt: skip
    low, middle, high = (t.mean().item() for t in seen)
    assert low < 0.1 < middle < 0.6 and high > 0.9


# The memory of subjects.


def subjects_and_captions() -> tuple[Tensor, Tensor, Tensor]:
    """Centres of 5 subjects, noisy captions of each, and whose they are."""
    centres = text_vectors(5, 16, seed=3)
    subject = torch.arange(60) % 5
    captions = F.normalize(centres[subject] + 0.5 * text_vectors(60, 16, seed=4), dim=-1)
    return centres, captions, subject


def fitted() -> TextMemory:
    centres, captions, subject = subjects_and_captions()
    torch.manual_seed(0)
    memory = TextMemory(FlowConfig.tiny())
    memory.begin(centres)
    optimiser = torch.optim.Adam(memory.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        memory_loss(memory, captions, subject).backward()
        optimiser.step()
    return memory.requires_grad_(False)


def test_a_memory_recalls_the_subject_of_a_caption_that_it_never_read() -> None:
    memory = fitted()
    centres, *_ = subjects_and_captions()
    fresh = F.normalize(centres + 0.4 * text_vectors(5, 16, seed=9), dim=-1)
    assert memory.likeness(fresh).argmax(1).tolist() == [0, 1, 2, 3, 4]
    recalled = memory(fresh)
    assert recalled.shape == (5, 6) and recalled.norm(dim=-1).max() <= 1 + 1e-5
    assert (recalled @ F.normalize(memory.places, dim=-1).T).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_a_memory_starts_from_the_centres() -> None:
    centres, *_ = subjects_and_captions()
    memory = TextMemory(FlowConfig.tiny())
    memory.begin(centres)
    assert memory.likeness(centres).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_no_text_recalls_nothing() -> None:
    text = torch.cat([torch.zeros(1, 16), text_vectors(1, 16)])
    recalled = fitted()(text)
    assert not recalled[0].any() and recalled[1].any()


def test_what_is_recalled_reaches_the_picture() -> None:
    model = awake(FlowConfig.tiny())
    text = text_vectors(1, 16)
    before = sample(model, text, generators=seeded(1), steps=3, guidance=2.0)
    assert model.memory is not None
    with torch.no_grad():
        model.memory.places.neg_()
    assert not torch.equal(before, sample(model, text, generators=seeded(1), steps=3, guidance=2.0))


def test_noise_on_the_words_leaves_what_they_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    model = awake(FlowConfig.tiny())
    seen: list[Tensor] = []

    def record(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        seen.append(text)
        return x

    monkeypatch.setattr(model.flow, "forward", record)
    text = model.understand(text_vectors(4, 16))
    flow_loss(model.flow, torch.zeros(4, 8), text, seeded(0)[0], dropout=0.0, jitter=0.5)
    assert torch.equal(seen[0][:, 16:], text[:, 16:])
    assert not torch.allclose(seen[0][:, :16], text[:, :16])


def test_files_without_a_memory_load_and_draw_as_before(tmp_path: Path) -> None:
    model = awake(FORGETFUL)
    path = tmp_path / "model.safetensors"
    save(model, path)
    tensors = load_file(path)
    assert not any(name.startswith("memory.") for name in tensors)
    document = describe(path)
    for key in ("memory", "subjects", "recall"):  # as such a file was written before there was a memory
        del document["config"][key]
    save_file(tensors, path, metadata={"contentfactory": json.dumps(document)})
    read = load(path)
    assert read.memory is None and replace(read.config, recall=FORGETFUL.recall) == FORGETFUL
    assert sample(read, text_vectors(1, 16), generators=seeded(1), steps=2, guidance=1.0).std() > 0


@pytest.mark.parametrize(("memory", "subjects"), [(4, 0), (0, 4), (17, 4), (-1, 0)])
def test_the_sizes_of_a_memory_are_checked(memory: int, subjects: int) -> None:
    with pytest.raises(ValueError, match="memory is "):
        replace(FlowConfig.tiny(), memory=memory, subjects=subjects)

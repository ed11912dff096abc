"""The recipe behind `train.flow`: text to picture on a folder of captioned pictures.

One step does one update of the flow and one of the decoder. Their losses share nothing but the latents, which are
computed once, so both may run side by side in a thread each. A memory of subjects, where the job asks for one, is fitted to
the captions before the first step, in a minute or so, and stays as it is from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from worker.networks import flow as network
from worker.networks.flow import FlowConfig, TextMemory, TextToImage
from worker.training import checkpoints
from worker.training.data import DatasetError, PictureDataset
from worker.training.solver import (
    MAY_CHANGE_ON_RESUME,
    Part,
    Solver,
    SolverConfig,
    TrainingInterrupted,
    TrainingMonitor,
    TrainingResult,
    step_seed,
)

DEFAULT_PROMPTS = (
    "a rocket", "a sunflower", "a slice of pizza", "a red apple", "a dog", "a house", "a wizard", "a cup of coffee",
    "a guitar", "a snowman", "a purple heart", "a robot", "a blue car", "a green dragon", "a pink elephant",
    "a happy face",
)  # fmt: skip
"""What the sample grid shows unless the job says otherwise."""

_COPIES = 0.1
"""Weight of a subject's second and further pictures while the memory is fitted."""

_MEMORY = "memory."
"""Prefix of the memory's tensors among a checkpoint's constants."""

_NOT_IDENTITY = MAY_CHANGE_ON_RESUME | {"prompts", "sample_steps", "guidance"}


class SizesError(ValueError):
    """The sizes that a job asks for fit neither its encoder nor the model that it starts from."""


@dataclass(frozen=True)
class FlowTrainingConfig:
    """Everything that decides how a text-to-image model is trained.

    The settings of steps, optimiser and intervals are those of `SolverConfig`, under the same names.

    Attributes:
        steps: Steps in all, 1 to 10,000,000; each updates flow and decoder once.
        seed: Seed of everything random, 0 to 2**63 - 1.
        resolution: Edge of the pictures made, pixels: 64 or 128.
        latent: Principal components kept, 8 to 1024.
        encoder_resolution: Edge at which they are taken, pixels, 8 to 64.
        whitening: How far components are brought to equal size, 0 to 1.
        condition: Width of the joint text and time vector, even, 16 to 1024.
        hidden: Width of the flow's residual stream, 16 to 4096.
        expansion: Width inside its blocks, 16 to 16384.
        blocks: Its blocks, 1 to 32.
        memory: Width of the memory of subjects, 0 to 1024 and at most that of the sentence vectors; 0 for none.
        recall: Hidden width of its query, 16 to 4096.
        memory_steps: Steps in which it is fitted, 1 to 1,000,000.
        flow_batch: Pictures in an update of the flow, 1 to 4096.
        decoder_batch: Pictures in an update of the decoder, 1 to 1024.
        caption_dropout: Probability in [0, 1) that a caption is hidden, which guidance needs.
        caption_blend: Probability in [0, 1] that a sentence vector is blended with another caption of its picture.
        caption_jitter: Largest standard deviation of noise on sentence vectors, 0 to 1.
        time_mean: Mean of the logit of the flow's times, -4 to 4; below 0 there are more times close to the noise.
        time_spread: Standard deviation of that logit, above 0, at most 4.
        latent_noise: Largest standard deviation of noise on the decoder's latents, 0 to 2.
        edge_weight: Weight of edges in the decoder's loss, 0 to 100.
        flips: Also learn the mirror images of pictures that allow it.
        optimiser: `adamw`, `adam` or `sgd`.
        learning_rate: The flow's peak, above 0, at most 10.
        decoder_rate_scale: The decoder's rate in proportion to it, above 0, at most 100.
        weight_decay: 0 to 1.
        schedule: `constant`, `cosine`, `linear` or `trapezoid`.
        warmup: Steps of linear rise.
        decay_share: Share of the steps in which `trapezoid` decays, above 0, at most 1.
        gradient_clip: Largest norm of a gradient, 0 for no limit.
        average: Decay of the weights' moving average, [0, 1).
        checkpoint_every: Steps between checkpoints.
        samples_every: Steps between sample grids, 0 for none.
        report_every: Steps between reports.
        keep_checkpoints: Checkpoints kept on the disk, at least 2.
        concurrent: Update flow and decoder in a thread each.
        prompts: What the sample grid shows, 1 to 64 texts.
        sample_steps: Euler steps of the grid, 1 to 1000.
        guidance: Guidance of the grid, 0 to 30.
    """

    steps: int = 30_000
    seed: int = 0
    resolution: Literal[64, 128] = 128
    latent: int = 384
    encoder_resolution: int = 24
    whitening: float = 0.5
    condition: int = 256
    hidden: int = 512
    expansion: int = 880
    blocks: int = 4
    memory: int = 0
    recall: int = 256
    memory_steps: int = 2000
    flow_batch: int = 256
    decoder_batch: int = 8
    caption_dropout: float = 0.1
    caption_blend: float = 0.5
    caption_jitter: float = 0.05
    time_mean: float = -1.2
    time_spread: float = 1.4
    latent_noise: float = 0.25
    edge_weight: float = 1.0
    flips: bool = False
    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    decoder_rate_scale: float = 1.0
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "linear", "trapezoid"] = "trapezoid"
    warmup: int = 200
    decay_share: float = 0.3
    gradient_clip: float = 1.0
    average: float = 0.999
    checkpoint_every: int = 1000
    samples_every: int = 1000
    report_every: int = 20
    keep_checkpoints: int = 2
    concurrent: bool = False
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    sample_steps: int = 30
    guidance: float = 3.0

    def __post_init__(self) -> None:
        def check(name: str, allowed: str, right: bool) -> None:
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}")

        check("steps", "1 to 10000000", 1 <= self.steps <= 10_000_000)
        check("resolution", "64 or 128", self.resolution in (64, 128))
        check("latent", "8 to 1024", 8 <= self.latent <= 1024)
        check("encoder_resolution", "8 to 64", 8 <= self.encoder_resolution <= 64)
        check("whitening", "0 to 1", 0 <= self.whitening <= 1)
        check("condition", "even, 16 to 1024", 16 <= self.condition <= 1024 and self.condition % 2 == 0)
        check("hidden", "16 to 4096", 16 <= self.hidden <= 4096)
        check("expansion", "16 to 16384", 16 <= self.expansion <= 16384)
        check("blocks", "1 to 32", 1 <= self.blocks <= 32)
        check("memory", "0 to 1024", 0 <= self.memory <= 1024)
        check("recall", "16 to 4096", 16 <= self.recall <= 4096)
        check("memory_steps", "1 to 1000000", 1 <= self.memory_steps <= 1_000_000)
        check("flow_batch", "1 to 4096", 1 <= self.flow_batch <= 4096)
        check("decoder_batch", "1 to 1024", 1 <= self.decoder_batch <= 1024)
        check("caption_dropout", "[0, 1)", 0 <= self.caption_dropout < 1)
        check("caption_blend", "0 to 1", 0 <= self.caption_blend <= 1)
        check("caption_jitter", "0 to 1", 0 <= self.caption_jitter <= 1)
        check("time_mean", "-4 to 4", -4 <= self.time_mean <= 4)
        check("time_spread", "above 0, at most 4", 0 < self.time_spread <= 4)
        check("latent_noise", "0 to 2", 0 <= self.latent_noise <= 2)
        check("edge_weight", "0 to 100", 0 <= self.edge_weight <= 100)
        check("decoder_rate_scale", "above 0, at most 100", 0 < self.decoder_rate_scale <= 100)
        check("prompts", "1 to 64 texts", 1 <= len(self.prompts) <= 64 and all(p.strip() for p in self.prompts))
        check("sample_steps", "1 to 1000", 1 <= self.sample_steps <= 1000)
        check("guidance", "0 to 30", 0 <= self.guidance <= 30)
        self.solver()  # checks the rest

    def solver(self) -> SolverConfig:
        """Return the solver's share of the settings."""
        return SolverConfig(**{f.name: getattr(self, f.name) for f in fields(SolverConfig) if hasattr(self, f.name)})

    def network(self, text_width: int, subjects: int = 0) -> FlowConfig:
        """Return the network's sizes for sentence vectors of `text_width` and so many subjects."""
        return FlowConfig.for_resolution(
            self.resolution,
            text_width=text_width,
            latent=self.latent,
            encoder_resolution=self.encoder_resolution,
            whitening=self.whitening,
            condition=self.condition,
            hidden=self.hidden,
            expansion=self.expansion,
            blocks=self.blocks,
            memory=self.memory,
            subjects=subjects if self.memory else 0,
            recall=self.recall,
        )


@dataclass(frozen=True)
class _Material:
    """A dataset as tensors: mirrored pictures, if any, stand behind the others and share their captions."""

    pictures: Tensor
    latents: Tensor
    weights: Tensor
    owner: Tensor
    vectors: Tensor
    first_caption: Tensor
    caption_count: Tensor
    subject: Tensor
    main: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw picture indices by weight, with replacement, (count,)."""
        return torch.multinomial(self.weights, count, replacement=True, generator=generator)

    def draw_vectors(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a caption's sentence vector for each chosen picture, (count, text_width)."""
        owner = self.owner[chosen]
        place = (torch.rand(len(chosen), generator=generator) * self.caption_count[owner]).long()
        return self.vectors[self.first_caption[owner] + place]

    def draw_blended(self, chosen: Tensor, blend: float, generator: torch.Generator) -> Tensor:
        """Draw as `draw_vectors`, blended with another caption's of the same picture with probability `blend`."""
        text = self.draw_vectors(chosen, generator)
        other = self.draw_vectors(chosen, generator)
        blended = torch.rand(len(chosen), 1, generator=generator) < blend
        share = torch.rand(len(chosen), 1, generator=generator) * blended
        return F.normalize(torch.lerp(text, other, share), dim=-1)


def as_floats(pictures: Tensor) -> Tensor:
    """Turn uint8 (batch, height, width, 4) into float (batch, 4, height, width) in [0, 1], channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float().div_(255)


def embed_all(embed: Callable[[list[str]], Tensor], texts: list[str], text_width: int | None = None) -> Tensor:
    """Embed distinct texts once each, in batches of like length, and return (len(texts), width) of length 1.

    Raises:
        ValueError: `embed` returned another shape than one row for each text, or a number that is not finite.
    """
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    rows: list[Tensor] = []
    for start in range(0, len(distinct), 256):
        batch = distinct[start : start + 256]
        vectors = embed(batch).detach().float().cpu()
        if vectors.ndim != 2 or len(vectors) != len(batch) or (text_width and vectors.shape[1] != text_width):
            raise ValueError(
                f"embed returned {tuple(vectors.shape)} for {len(batch)} texts; allowed is ({len(batch)}, "
                f"{text_width or 'width'})"
            )
        if not bool(torch.isfinite(vectors).all()):
            raise ValueError("embed returned a number that is not finite")
        rows.append(F.normalize(vectors, dim=-1))
    table = torch.cat(rows)
    place = {text: index for index, text in enumerate(distinct)}
    return table[torch.tensor([place[text] for text in texts])]


def _prepare(config: FlowTrainingConfig, dataset: PictureDataset, vectors: Tensor, model: TextToImage,
             coder: dict[str, Tensor] | None) -> _Material:  # fmt: skip
    pictures = torch.from_numpy(dataset.pictures)
    weights = torch.from_numpy(dataset.weights).float()
    owner = torch.arange(len(dataset))
    if config.flips and dataset.flips.any():
        mirrored = torch.from_numpy(np.flatnonzero(dataset.flips))
        pictures = torch.cat([pictures, pictures[mirrored].flip(2)])
        owner = torch.cat([owner, mirrored])
        weights = weights.clone()
        weights[mirrored] /= 2
        weights = torch.cat([weights, weights[mirrored]])
    small: list[Tensor] = []
    edge = config.encoder_resolution
    for start in range(0, len(pictures), 256):
        small.append(F.interpolate(as_floats(pictures[start : start + 256]), size=(edge, edge), mode="area"))
    shrunken = torch.cat(small)
    if coder is None:
        model.coder.fit(shrunken, weights)
    else:
        model.coder.load_state_dict(coder)
    counts = torch.tensor([len(texts) for texts in dataset.captions])
    numbers = {subject: index for index, subject in enumerate(dict.fromkeys(dataset.subjects))}
    return _Material(
        pictures=pictures,
        latents=model.coder(shrunken),
        weights=weights,
        owner=owner,
        vectors=vectors,
        first_caption=counts.cumsum(0) - counts,
        caption_count=counts,
        subject=torch.tensor([numbers[subject] for subject in dataset.subjects])[owner],
        main=torch.tensor([s not in dataset.subjects[:i] for i, s in enumerate(dataset.subjects)])[owner],
    )


def _fit_memory(config: FlowTrainingConfig, material: _Material, memory: TextMemory, monitor: TrainingMonitor,
                workdir: Path) -> None:  # fmt: skip
    """Fit the memory to the captions: a pure function of config and dataset, on one kind of processor.

    Places that cannot learn are those of an earlier model, whose flow reads them: only what is looked up is fitted then.
    """
    if memory.places.requires_grad:
        captions = material.subject[: len(material.first_caption)].repeat_interleave(material.caption_count)
        centres = torch.zeros(len(memory.places), material.vectors.shape[1])
        centres.index_add_(0, captions, material.vectors)
        memory.begin(F.normalize(centres, dim=-1))
    learning = [parameter for parameter in memory.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    # The captions of a subject's further pictures, "a blue car", are for the flow; here they would draw what is red to
    # all things that were painted red.
    weights = material.weights * torch.where(material.main, 1.0, _COPIES)
    total, counted = 0.0, 0
    for step in range(config.memory_steps):
        done = step / config.memory_steps
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * min(1.0, 0.02 + (1 - done) / 0.6)
        generator = torch.Generator().manual_seed(step_seed(config.seed, step, "memory"))
        chosen = torch.multinomial(weights, 256, replacement=True, generator=generator)
        text = material.draw_blended(chosen, 0.5, generator)
        strength = config.caption_jitter * torch.rand(len(chosen), 1, generator=generator)
        text = F.normalize(text + strength * torch.randn(text.shape, generator=generator), dim=-1)
        optimiser.zero_grad(set_to_none=True)
        loss = network.memory_loss(memory, text, material.subject[chosen])
        loss.backward()
        optimiser.step()
        total, counted = total + float(loss.detach()), counted + 1
        if (step + 1) % 100 == 0 or step + 1 == config.memory_steps:
            monitor.on_step(0, config.steps, {"memory_loss": total / counted})
            total, counted = 0.0, 0
        if monitor.should_stop():
            raise TrainingInterrupted(0, workdir / "checkpoints")


def grid(pictures: Tensor, columns: int = 4) -> Image.Image:
    """Lay RGBA pictures (count, 4, edge, edge) in [0, 1] on white, `columns` a row."""
    count, _, height, width = pictures.shape
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, picture in enumerate(pictures):
        tile = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
        sheet.paste(tile, (index % columns * width, index // columns * height), tile)
    return sheet


def _start(earlier: TextToImage, sizes: FlowConfig, name: str) -> TextToImage:
    """Return a model to train on from an earlier one, with the memory that the job asks for if that one has none.

    Raises:
        SizesError: The sizes do not agree.
    """
    theirs = earlier.config
    if theirs.memory or not sizes.memory:
        wanted = replace(sizes, memory=theirs.memory, subjects=theirs.subjects, recall=theirs.recall)
        if theirs != (sizes if sizes.memory else wanted):
            raise SizesError(f"{name} has {theirs}; the job asks for {sizes}")
        return earlier.requires_grad_(True).train()
    if replace(sizes, memory=0, subjects=0, recall=theirs.recall) != theirs:
        raise SizesError(f"{name} has {theirs}; the job asks for {sizes}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TextToImage(sizes)
    tensors = earlier.state_dict()
    columns = torch.zeros(sizes.condition, sizes.memory)  # at first the flow does not hear of it
    tensors["flow.text_in.weight"] = torch.cat([tensors["flow.text_in.weight"], columns], dim=1)
    model.load_state_dict(tensors, strict=False)
    return model.train()


def train_flow(
    config: FlowTrainingConfig,
    dataset: PictureDataset,
    embed: Callable[[list[str]], Tensor],
    monitor: TrainingMonitor,
    workdir: Path,
    resume_from: Path | None = None,
    start_from: Path | None = None,
) -> TrainingResult:
    """Train a text-to-image model.

    Args:
        config: How.
        dataset: Captioned pictures of the config's resolution.
        embed: Maps texts to vectors, (count, text_width). The same texts must always give the same vectors, and
            generation must use the same function.
        monitor: Who watches; the metrics are `flow_loss`, `decoder_loss`, `learning_rate`, `pictures_per_second`.
        workdir: Folder for checkpoints and the model.
        resume_from: A checkpoint or a folder of checkpoints of this training; None starts anew.
        start_from: Weights of an earlier model to start a new training from (fine-tuning); the sizes must agree. If it
            has a memory, that is kept; a config that asks for one, over as many subjects, fits anew what is looked up in it.

    Returns:
        The result; its `model_path` is what `worker.networks.flow.load` reads.

    Raises:
        DatasetError: The dataset is of another resolution.
        TrainingInterrupted, TrainingDiverged, CheckpointError: See `Solver.run`.
        ModelFormatError, SizesError: `start_from` is no model or of other sizes.
    """
    if dataset.resolution != config.resolution:
        raise DatasetError(f"dataset has pictures of {dataset.resolution} pixels; allowed is {config.resolution}")
    vectors = embed_all(embed, [caption for texts in dataset.captions for caption in texts])
    prompts = embed_all(embed, list(config.prompts), vectors.shape[1])
    if config.memory > vectors.shape[1]:
        raise SizesError(f"memory is {config.memory}; allowed is at most {vectors.shape[1]}, the encoder's width")
    sizes = config.network(vectors.shape[1], len(set(dataset.subjects)))
    if start_from is None:
        # Initial weights come from the global generator: it is seeded for them and given back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = TextToImage(sizes)
    else:
        model = _start(network.load(start_from), sizes, start_from.name)
    coder = dict(model.coder.state_dict()) if start_from is not None else None
    # A memory comes along with the weights that one starts from, as the latents do: the flow has learned to read it. A
    # job that asks for one fits what is looked up in it to its own captions.
    earlier = start_from is not None and bool(network.describe(start_from)["config"].get("memory"))
    remembers = earlier and not config.memory
    if resume_from is not None:
        checkpoint, _ = checkpoints.newest(resume_from)
        if checkpoint is not None:
            constants = checkpoint.tensors["constants"]
            coder = {name: value for name, value in constants.items() if not name.startswith(_MEMORY)}
            if model.memory is not None:
                kept = {n.removeprefix(_MEMORY): v for n, v in constants.items() if n.startswith(_MEMORY)}
                model.memory.load_state_dict(kept)
                remembers = True
    material = _prepare(config, dataset, vectors, model, coder)
    if model.memory is not None:
        model.memory.places.requires_grad_(not earlier)
        if not remembers:
            _fit_memory(config, material, model.memory, monitor, workdir)
        model.memory.requires_grad_(False)

    def loss_of_flow(module: nn.Module, generator: torch.Generator) -> Tensor:
        chosen = material.draw(config.flow_batch, generator)
        with torch.no_grad():
            text = model.understand(material.draw_blended(chosen, config.caption_blend, generator))
        return network.flow_loss(
            module, material.latents[chosen], text, generator,  # type: ignore[arg-type]
            dropout=config.caption_dropout, jitter=config.caption_jitter,
            time_mean=config.time_mean, time_spread=config.time_spread,
        )  # fmt: skip

    def loss_of_decoder(module: nn.Module, generator: torch.Generator) -> Tensor:
        chosen = material.draw(config.decoder_batch, generator)
        return network.decoder_loss(
            module, material.latents[chosen], as_floats(material.pictures[chosen]), generator,  # type: ignore[arg-type]
            noise=config.latent_noise, edges=config.edge_weight,
        )  # fmt: skip

    def draw_samples() -> Image.Image:
        generators = [torch.Generator().manual_seed(config.seed + index) for index in range(len(prompts))]
        made = network.sample(
            model, prompts, generators=generators, steps=config.sample_steps, guidance=config.guidance
        )
        return grid(made)

    def save_model(path: Path) -> None:
        network.save(model, path, {"dataset": dataset.digest, "steps": str(solver.step), "seed": str(config.seed)})

    identity: dict[str, Any] = {k: v for k, v in asdict(config).items() if k not in _NOT_IDENTITY}
    if not config.memory:
        # Checkpoints of the time before there was a memory do not have these.
        identity = {k: v for k, v in identity.items() if k not in ("memory", "recall", "memory_steps")}
    identity |= {"recipe": "flow", "dataset": dataset.digest}
    solver = Solver(
        [
            Part("flow", model.flow, loss_of_flow, items=config.flow_batch),
            Part("decoder", model.decoder, loss_of_decoder, config.decoder_rate_scale, config.decoder_batch),
        ],
        config.solver(),
        monitor=monitor,
        workdir=workdir,
        identity=identity,
        save_model=save_model,
        draw_samples=draw_samples,
        constants={
            **model.coder.state_dict(),
            **{f"{_MEMORY}{n}": v for n, v in (model.memory.state_dict() if model.memory is not None else {}).items()},
        },
    )
    return solver.run(resume_from)

"""Text to picture by rectified flow over a linear latent, with a convolutional decoder.

Papers: Liu, Gong, Liu, 'Flow Straight and Fast' (2022) for the flow; Peebles, Xie, 'Scalable Diffusion Models with
Transformers' (2022) for AdaLN-Zero; Ho, Salimans, 'Classifier-Free Diffusion Guidance' (2022); Esser et al., 'Scaling
Rectified Flow Transformers' (2024) for drawing times from a logit-normal distribution.

With a picture's latent `x1`, noise `x0 ~ N(0, 1)` and a time `t` in [0, 1], the network `v` is trained by

    x_t = (1 - t) x0 + t x1        minimise  || v(x_t, t, text) - (x1 - x0) ||^2

and a picture is made by following `dx/dt = v_null + guidance (v_text - v_null)` from `t = 0` to `t = 1` in Euler steps.

Deliberate differences from the papers, all because this has to be trained and run on ordinary processors:

- The latent is linear: principal components of the shrunken picture, scaled by a *part* of their standard deviation
  (`whitening`). It needs no training, and the coarse components weigh more in the loss than the grain.
- `v` is a residual MLP and no transformer, since such a latent has no places to attend to.
- The text is one sentence vector. In training it is blended with another caption of the same picture and shaken a
  little, so that captions the model has never read land where their meaning is.
- A small memory of the subjects, one place each, stands between the sentence and the flow: the sentence is compared with
  all places and recalls the nearest (`TextMemory`). Wordings that were never read then still ask for one subject and
  not for the middle between several; the sentence vector itself goes along and tells the rest, such as colours.
- The decoder sees noisy latents in training, so it cleans away what the flow gets slightly wrong.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

FORMAT = "contentfactory.text-to-image/1"
"""What the metadata of a weights file says it is."""

RECALL_TEMPERATURE = 0.02
"""How sharply a memory recalls: places whose cosine is this much lower count for 1/e."""

FIT_TEMPERATURE = 0.05
"""The same while a memory is fitted: softer, so that near misses still teach."""

LANES = 8
"""Rows of the flow's matrix products, whatever the number of items: see `sample`."""


class ModelFormatError(ValueError):
    """A weights file is not one that this network can read."""


@dataclass(frozen=True)
class FlowConfig:
    """Sizes of the network.

    Attributes:
        text_width: Length of the sentence vectors that condition the flow.
        latent: Principal components kept, at least 1.
        encoder_resolution: Edge in pixels to which a picture is shrunk before the components are taken.
        whitening: Exponent in [0, 1] by which components are divided by their standard deviation: 1 whitens fully,
            0 leaves them as they are.
        condition: Width of the joint text and time vector.
        hidden: Width of the residual stream.
        expansion: Width inside a residual block.
        blocks: Residual blocks.
        seed_channels: Channels of the 8x8 map that the decoder starts from.
        channels: Channels of the decoder at 8x8, 16x16 and so on; each stage doubles the edge, so the picture's edge is
            `8 * 2 ** len(channels)`.
        memory: Width of a place in the memory of subjects, at most `text_width`; 0 for no memory.
        subjects: Places in it; 0 without memory.
        recall: Hidden width of the layer that turns a sentence vector into what is looked up.
    """

    text_width: int = 384
    latent: int = 384
    encoder_resolution: int = 24
    whitening: float = 0.5
    condition: int = 256
    hidden: int = 512
    expansion: int = 880
    blocks: int = 4
    seed_channels: int = 48
    channels: tuple[int, ...] = (192, 128, 64, 24)
    memory: int = 0
    subjects: int = 0
    recall: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "whitening":
                if not 0.0 <= value <= 1.0:
                    raise ValueError(f"whitening is {value}; allowed is 0 to 1")
            elif field.name == "channels":
                if not 1 <= len(value) <= 6 or any(c < 1 for c in value):
                    raise ValueError(f"channels is {value}; allowed are 1 to 6 numbers of at least 1")
            elif field.name in ("memory", "subjects"):
                if value < 0:
                    raise ValueError(f"{field.name} is {value}; allowed is at least 0")
            elif value < 1:
                raise ValueError(f"{field.name} is {value}; allowed is at least 1")
        if self.memory > self.text_width or (self.memory > 0) != (self.subjects > 0):
            raise ValueError(
                f"memory is {self.memory} with {self.subjects} subjects; allowed are both 0, or 1 to {self.text_width} "
                "with at least one subject"
            )
        if self.condition % 2:
            raise ValueError(f"condition is {self.condition}; allowed are even numbers")
        if self.resolution % self.encoder_resolution and self.encoder_resolution > self.resolution:
            raise ValueError(
                f"encoder_resolution is {self.encoder_resolution}; allowed is at most the resolution {self.resolution}"
            )

    @property
    def resolution(self) -> int:
        """Edge of the pictures, pixels."""
        return int(8 * 2 ** len(self.channels))

    @classmethod
    def for_resolution(cls, resolution: int, **changes: object) -> FlowConfig:
        """Return the standard sizes for pictures of 64 or 128 pixels, with `changes` applied."""
        stages = {64: (192, 128, 48), 128: (192, 128, 64, 24)}
        if resolution not in stages:
            raise ValueError(f"resolution is {resolution}; allowed are {sorted(stages)}")
        return cls(**{"channels": stages[resolution], **changes})  # type: ignore[arg-type]

    @classmethod
    def tiny(cls) -> FlowConfig:
        """Return sizes that train within a test."""
        return cls(
            text_width=16, latent=8, encoder_resolution=8, condition=16, hidden=32, expansion=48, blocks=2,
            seed_channels=8, channels=(12, 8), memory=6, subjects=5, recall=12,
        )  # fmt: skip


class LatentCoder(nn.Module):
    """Linear encoder: principal components of shrunken premultiplied RGBA pictures.

    Both tensors are buffers: they are fitted in closed form and never trained.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.resolution = config.encoder_resolution
        self.whitening = config.whitening
        size = 4 * self.resolution**2
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.zeros(size, config.latent))

    def _flatten(self, pictures: Tensor) -> Tensor:
        return F.interpolate(pictures, size=(self.resolution, self.resolution), mode="area").flatten(1)

    @torch.no_grad()
    def fit(self, pictures: Tensor, weights: Tensor | None = None) -> None:
        """Take the components of a set of pictures.

        The result is a pure function of its arguments (on one machine and number of threads): double precision, and
        the sign of each component is fixed.

        Args:
            pictures: Premultiplied RGBA, (count, 4, height, width) in [0, 1].
            weights: Weight of each picture, (count,), positive; all alike by default.
        """
        flat = self._flatten(pictures).double()
        share = torch.ones(len(flat), dtype=torch.double) if weights is None else weights.double()
        share = share / share.sum()
        mean = (share[:, None] * flat).sum(0)
        scaled = (flat - mean) * share.sqrt()[:, None]
        if len(scaled) < scaled.shape[1]:
            power, left = torch.linalg.eigh(scaled @ scaled.T)
            basis = scaled.T @ left
            basis = basis / basis.norm(dim=0).clamp_min(1e-12)
        else:
            power, basis = torch.linalg.eigh(scaled.T @ scaled)
        count = self.basis.shape[1]
        available = min(count, basis.shape[1])
        basis = basis.flip(1)[:, :available]
        deviation = power.flip(0)[:available].clamp_min(0).sqrt()
        signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        signs[signs == 0] = 1
        # Components without any variance (fewer pictures than components) stay silent rather than amplify rounding.
        usable = deviation > 1e-5 * deviation.max().clamp_min(1e-12)
        scale = torch.where(usable, deviation.clamp_min(1e-12) ** -self.whitening, torch.zeros(()).double())
        spread = ((deviation * scale) ** 2).sum() / usable.sum().clamp_min(1)
        self.basis.zero_()
        self.basis[:, :available] = (basis * signs * scale / spread.clamp_min(1e-12).sqrt()).float()
        self.mean.copy_(mean.float())

    def forward(self, pictures: Tensor) -> Tensor:
        """Encode premultiplied RGBA pictures.

        Args:
            pictures: (batch, 4, height, width) in [0, 1].

        Returns:
            Latents, (batch, latent), of mean 0 and mean variance 1 over the set that was fitted.
        """
        latents: Tensor = (self._flatten(pictures) - self.mean) @ self.basis
        return latents


class TextMemory(nn.Module):
    """What a sentence recalls: `softmax(q(text) . k_i / temperature)` over the places `k_i`, one for each subject.

    `q` is a linear map with a small MLP beside it; queries and places have length 1. It is fitted before the flow, as a
    classifier of captions by subject, and stays as it is while the flow learns.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.text_width = config.text_width
        self.straight = nn.Linear(config.text_width, config.memory, bias=False)
        self.widen = nn.Linear(config.text_width, config.recall)
        self.narrow = nn.Linear(config.recall, config.memory)
        self.places = nn.Parameter(torch.randn(config.subjects, config.memory) / math.sqrt(config.memory))
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    @torch.no_grad()
    def begin(self, centres: Tensor) -> None:
        """Start from the subjects' mean sentence vectors, in their principal directions.

        Args:
            centres: (subjects, text_width).
        """
        centred = (centres - centres.mean(0)).double()
        _, directions = torch.linalg.eigh(centred.T @ centred)
        directions = directions.flip(1)[:, : self.places.shape[1]].float()
        self.straight.weight.copy_(directions.T)
        self.places.copy_(F.normalize(centres @ directions, dim=-1))

    def likeness(self, text: Tensor) -> Tensor:
        """Compare sentence vectors (batch, text_width) with all places: cosines, (batch, subjects)."""
        hidden = F.silu(self.widen(text * math.sqrt(self.text_width)))
        query = F.normalize(self.straight(text) + self.narrow(hidden), dim=-1)
        cosines: Tensor = query @ F.normalize(self.places, dim=-1).T
        return cosines

    def forward(self, text: Tensor) -> Tensor:
        """Recall.

        Args:
            text: Sentence vectors of length 1, (batch, text_width); a row of zeros recalls nothing.

        Returns:
            (batch, memory): means of places, of length at most 1.
        """
        weights = (self.likeness(text) / RECALL_TEMPERATURE).softmax(-1)
        asked = text.ne(0).any(-1, keepdim=True)
        recalled: Tensor = (weights @ F.normalize(self.places, dim=-1)) * asked
        return recalled


def memory_loss(memory: TextMemory, text: Tensor, subject: Tensor) -> Tensor:
    """Cross entropy of captions (batch, text_width) against the subjects that they belong to (batch,), a scalar."""
    return F.cross_entropy(memory.likeness(text) / FIT_TEMPERATURE, subject)


class Block(nn.Module):
    """Residual MLP block whose normalisation, and whose say in the result, the condition decides (AdaLN-Zero)."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden, elementwise_affine=False)
        self.modulation = nn.Linear(config.condition, 3 * config.hidden)
        self.widen = nn.Linear(config.hidden, config.expansion)
        self.narrow = nn.Linear(config.expansion, config.hidden)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, stream: Tensor, condition: Tensor) -> Tensor:
        """Map (batch, hidden) and (batch, condition) to (batch, hidden)."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        inner = self.norm(stream) * (1 + scale) + shift
        result: Tensor = stream + gate * self.narrow(F.silu(self.widen(inner)))
        return result


class FlowNet(nn.Module):
    """The velocity `v(x_t, t, text)`."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        frequencies = torch.exp(torch.linspace(0, math.log(1000), config.condition // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.text_in = nn.Linear(config.text_width + config.memory, config.condition)
        self.text_out = nn.Linear(config.condition, config.condition)
        self.time_in = nn.Linear(config.condition, config.condition)
        self.time_out = nn.Linear(config.condition, config.condition)
        self.enter = nn.Linear(config.latent, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.hidden, elementwise_affine=False)
        self.leave_modulation = nn.Linear(config.condition, 2 * config.hidden)
        self.leave = nn.Linear(config.hidden, config.latent)
        for layer in (self.leave_modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            x: Noisy latents, (batch, latent).
            t: Times, (batch,) in [0, 1]; 0 is noise, 1 is the picture.
            text: What `TextToImage.understand` makes of sentence vectors, (batch, text_width + memory); a row of zeros
                means 'no text'.

        Returns:
            Velocities, (batch, latent).
        """
        angles = t[:, None] * self.frequencies
        time = self.time_out(F.silu(self.time_in(torch.cat([angles.sin(), angles.cos()], dim=-1))))
        # Sentence vectors and places have length 1; their entries are brought to unit scale.
        width = self.config.text_width
        scaled = torch.cat([text[:, :width] * math.sqrt(width), text[:, width:] * math.sqrt(self.config.memory)], dim=-1)
        words = self.text_out(F.silu(self.text_in(scaled)))
        condition = F.silu(time + words)
        stream = self.enter(x)
        for block in self.blocks:
            stream = block(stream, condition)
        shift, scale = self.leave_modulation(condition).chunk(2, dim=-1)
        velocity: Tensor = self.leave(self.norm(stream) * (1 + scale) + shift)
        return velocity


class ConvBlock(nn.Module):
    """Two 3x3 convolutions around a skip; no normalisation, the second starts at zero instead."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        if self.second.bias is not None:
            nn.init.zeros_(self.second.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        result: Tensor = maps + self.second(F.leaky_relu(self.first(F.leaky_relu(maps, 0.2)), 0.2))
        return result


class Decoder(nn.Module):
    """From a latent to a premultiplied RGBA picture: a linear map to 8x8, then blocks and sub-pixel doublings."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.seed_channels = config.seed_channels
        self.seed = nn.Linear(config.latent, config.seed_channels * 64)
        stages: list[nn.Module] = [nn.Conv2d(config.seed_channels, config.channels[0], 3, padding=1)]
        for here, after in zip(config.channels, (*config.channels[1:], 4), strict=True):
            last = after == 4 and len(stages) == 3 * len(config.channels) - 2
            stages.append(ConvBlock(here))
            # 1x1 before a doubling is enough inside; the last one draws pixels and sees its neighbours.
            stages.append(nn.Conv2d(here, 4 * after, 3 if last else 1, padding=1 if last else 0))
            stages.append(nn.PixelShuffle(2))
        self.stages = nn.Sequential(*stages)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode.

        Args:
            latents: (batch, latent).

        Returns:
            Premultiplied RGBA, (batch, 4, resolution, resolution), nominally in [0, 1] and not clamped.
        """
        maps = self.seed(latents).view(-1, self.seed_channels, 8, 8)
        # A processor convolves faster with the channels last.
        pictures: Tensor = self.stages(maps.contiguous(memory_format=torch.channels_last))
        return pictures


class TextToImage(nn.Module):
    """The parts together: what a weights file holds."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.coder = LatentCoder(config)
        self.flow = FlowNet(config)
        self.decoder = Decoder(config).to(memory_format=torch.channels_last)
        self.memory = TextMemory(config) if config.memory else None

    def understand(self, text_vectors: Tensor) -> Tensor:
        """Put what sentence vectors (batch, text_width) recall behind them: (batch, text_width + memory)."""
        if self.memory is None:
            return text_vectors
        return torch.cat([text_vectors, self.memory(text_vectors)], dim=-1)


def flow_loss(
    net: FlowNet,
    latents: Tensor,
    text: Tensor,
    generator: torch.Generator,
    *,
    dropout: float,
    jitter: float,
    time_mean: float = 0.0,
    time_spread: float = 1.0,
) -> Tensor:
    """Rectified-flow loss on one batch.

    Args:
        net: The velocity network.
        latents: Pictures' latents `x1`, (batch, latent).
        text: Sentence vectors of length 1, and what they recall behind them, (batch, text_width + memory).
        generator: Source of noise, times and dropped captions.
        dropout: Probability in [0, 1] that a caption is hidden, which guidance needs.
        jitter: Largest standard deviation of the noise put on a sentence vector, 0 for none; each row draws its own
            strength below it. What it recalls is left as it is, so that the flow learns to trust it more.
        time_mean: Mean of the logit of the times; below 0 there are more times close to the noise. Among a few
            thousand pictures it is there, far below `t = 0.2`, that the text decides which one it will be.
        time_spread: Standard deviation of that logit, above 0.

    Returns:
        Mean squared error, a scalar.
    """
    batch = len(latents)
    x0 = torch.randn(latents.shape, generator=generator)
    t = (time_mean + time_spread * torch.randn(batch, generator=generator)).sigmoid()
    strength = jitter * torch.rand(batch, 1, generator=generator)
    width = net.config.text_width
    words = text[:, :width]
    words = F.normalize(words + strength * torch.randn(words.shape, generator=generator), dim=-1)
    text = torch.cat([words, text[:, width:]], dim=-1)
    kept = (torch.rand(batch, 1, generator=generator) >= dropout).to(text.dtype)
    x_t = (1 - t[:, None]) * x0 + t[:, None] * latents
    return F.mse_loss(net(x_t, t, text * kept), latents - x0)


def decoder_loss(
    decoder: Decoder, latents: Tensor, pictures: Tensor, generator: torch.Generator, *, noise: float, edges: float
) -> Tensor:
    """How far decoded pictures are from the originals: absolute error of values, of edges, and of a half-size copy.

    Args:
        decoder: The decoder.
        latents: (batch, latent).
        pictures: Premultiplied RGBA, (batch, 4, resolution, resolution) in [0, 1].
        generator: Source of the noise on latents.
        noise: Largest standard deviation of that noise; each row draws its own strength below it.
        edges: Weight of the differences between neighbouring pixels.

    Returns:
        A scalar.
    """
    strength = noise * torch.rand(len(latents), 1, generator=generator)
    made = decoder(latents + strength * torch.randn(latents.shape, generator=generator))
    error = made - pictures
    across = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    coarse = F.avg_pool2d(error, 2).abs().mean()
    return error.abs().mean() + coarse + edges * (across + down)


@torch.no_grad()
def sample_latents(
    model: TextToImage, text_vectors: Tensor, *, generators: Sequence[torch.Generator], steps: int, guidance: float
) -> Tensor:
    """Follow the flow from noise to latents; arguments as for `sample`.

    Returns:
        Latents, (batch, latent), on the flow's device.
    """
    config, flow = model.config, model.flow
    if text_vectors.ndim != 2 or text_vectors.shape[1] != config.text_width:
        raise ValueError(f"text_vectors is {tuple(text_vectors.shape)}; allowed is (batch, {config.text_width})")
    if len(generators) != len(text_vectors):
        raise ValueError(f"{len(generators)} generators for {len(text_vectors)} items; allowed is one for each")
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps is {steps}; allowed is 1 to 1000")
    if not math.isfinite(guidance) or not 0 <= guidance <= 30:
        raise ValueError(f"guidance is {guidance}; allowed is 0 to 30")
    device = flow.enter.weight.device
    done: list[Tensor] = []
    for start in range(0, len(text_vectors), LANES):
        group = generators[start : start + LANES]
        noise = torch.stack([torch.randn(config.latent, generator=generator) for generator in group])
        # Unused lanes are filled with zeros: a matrix product of another shape may add up in another order.
        x = torch.zeros(LANES, config.latent, device=device)
        x[: len(group)] = noise.to(device)
        text = torch.zeros(2 * LANES, config.text_width, device=device)
        text[: len(group)] = text_vectors[start : start + LANES].to(device)
        text = model.understand(text)
        for step in range(steps):
            t = torch.full((2 * LANES,), step / steps, device=device)
            with_text, without = flow(torch.cat([x, x]), t, text).chunk(2)
            x = x + (without + guidance * (with_text - without)) / steps
        done.append(x[: len(group)])
    return torch.cat(done) if done else torch.zeros(0, config.latent, device=device)


@torch.no_grad()
def sample(
    model: TextToImage,
    text_vectors: Tensor,
    *,
    generators: list[torch.Generator],
    steps: int = 30,
    guidance: float = 3.0,
) -> Tensor:
    """Make one picture for each sentence vector.

    What an item yields does not depend on its neighbours: its noise comes from its own generator, the flow always runs
    over `LANES` rows (twice, with and without text), filled up with zeros, and pictures are decoded one by one. On one
    processor, with one version of torch and one number of threads, the bytes are equal alone and in a batch of any size
    and at any place in it.

    Args:
        model: The network, in evaluation.
        text_vectors: (batch, text_width), of length 1 each; a row of zeros asks for any picture.
        generators: One CPU generator for each item; each is drawn from once.
        steps: Euler steps, 1 to 1000.
        guidance: Weight of the text, 0 to 30; 1 is the plain conditional flow, more follows the words more closely.

    Returns:
        RGBA with straight (not premultiplied) alpha, (batch, 4, resolution, resolution) in [0, 1], on the CPU.

    Raises:
        ValueError: A shape, count or number is out of range.
    """
    latents = sample_latents(
        model, text_vectors, generators=generators, steps=steps, guidance=guidance
    )
    resolution = model.config.resolution
    pictures = torch.zeros(len(latents), 4, resolution, resolution)
    for index in range(len(latents)):
        pictures[index] = straight_alpha(model.decoder(latents[index : index + 1])[0].cpu())
    return pictures


def straight_alpha(picture: Tensor) -> Tensor:
    """Turn premultiplied RGBA into straight RGBA.

    Args:
        picture: (4, height, width), nominally in [0, 1].

    Returns:
        (4, height, width) in [0, 1]; colours under an alpha below 1/255 are 0.
    """
    picture = picture.clamp(0, 1)
    alpha = picture[3:]
    # An alpha within rounding of nothing or of everything is meant to be just that.
    alpha = ((alpha - 0.02) / 0.96).clamp(0, 1)
    colour = torch.where(alpha >= 1 / 255, picture[:3] / picture[3:].clamp_min(1 / 255), torch.zeros(()))
    return torch.cat([colour.clamp(0, 1), alpha])


def save(model: TextToImage, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the weights as fp16 safetensors with the config in its metadata, atomically.

    Args:
        model: The network.
        path: File to write.
        metadata: Further strings to keep in the file, for example the dataset's digest.
    """
    tensors = {name: tensor.detach().half().contiguous().cpu() for name, tensor in model.state_dict().items()}
    document = {"format": FORMAT, "config": asdict(model.config), "about": metadata or {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # safetensors writes metadata in no certain order: one entry, so that equal weights are equal bytes.
        save_file(tensors, temporary, metadata={"contentfactory": json.dumps(document, sort_keys=True)})
        temporary.chmod(0o644)  # safetensors writes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def describe(path: Path) -> dict[str, Any]:
    """Return what a weights file says about itself: `format`, `config` and `about`, without reading the weights.

    Raises:
        ModelFormatError: The file is no such model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get("contentfactory", "{}"))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelFormatError(f"{path}: not readable as safetensors: {error}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ModelFormatError(f"{path}: format is {found!r}; allowed is {FORMAT!r}")
    return dict(document)


def load(path: Path) -> TextToImage:
    """Read a weights file into an fp32 model in evaluation mode, on the CPU.

    Raises:
        ModelFormatError: The file is no such model, or its tensors do not fit its config.
    """
    document = describe(path)
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelFormatError(f"{path}: not readable as safetensors: {error}") from error
    try:
        values = document["config"]
        model = TextToImage(FlowConfig(**{**values, "channels": tuple(values["channels"])}))
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelFormatError(f"{path}: config and tensors do not make a model: {error}") from error
    return model.eval().requires_grad_(False)

"""SPAN: super-resolution by a short stack of convolutions whose activations are their own attention.

Paper: Wan et al., 'Swift Parameter-free Attention Network for Efficient Super-Resolution' (2023). Each block runs three
3x3 convolutions and weighs the sum of its result and its input by

    attention = sigmoid(c3(silu(c2(silu(c1(x)))))) - 1/2        out = (c3(…) + x) * attention

This is the network as it runs: the three parallel convolutions that the paper trains are already merged into one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RECEPTIVE_RADIUS = 21
"""A result depends on input pixels at most this far away: two tiles that overlap by it agree exactly."""


@dataclass(frozen=True)
class SpanConfig:
    """Sizes of the network.

    Args:
        scale: Factor on height and width.
        channels: Width of the stack.
        blocks: Attention blocks, at least 2.
        mean: Mean colour of the training pictures, in [0, 1]; taken off the input.
        value_range: What the input is multiplied by.
    """

    scale: int = 4
    channels: int = 48
    blocks: int = 6
    mean: tuple[float, float, float] = (0.4488, 0.4371, 0.4040)
    value_range: float = 255.0

    @classmethod
    def tiny(cls) -> SpanConfig:
        """Sizes for tests."""
        return cls(scale=2, channels=8, blocks=2)


class SpanBlock(nn.Module):
    """One attention block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.c2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.c3 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (batch, channels, height, width) to the result and the first activation, both of that shape."""
        first = F.silu(self.c1(x))
        third = self.c3(F.silu(self.c2(first)))
        return (third + x) * (torch.sigmoid(third) - 0.5), first


class Span(nn.Module):
    """The network."""

    def __init__(self, config: SpanConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(SpanBlock(width) for _ in range(config.blocks))
        self.leave = nn.Conv2d(width, width, 3, padding=1)
        self.join = nn.Conv2d(4 * width, width, 1)
        self.grow = nn.Conv2d(width, 3 * config.scale**2, 3, padding=1)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Enlarge pictures.

        Args:
            pictures: (batch, 3, height, width) in [0, 1].

        Returns:
            (batch, 3, height * scale, width * scale), nominally in [0, 1] and not clamped.
        """
        start = self.enter((pictures - self.mean) * self.config.value_range)
        x, early, late = start, start, start
        for number, block in enumerate(self.blocks):
            x, first = block(x)
            if number == 0:
                early = x
            late = first
        joined = self.join(torch.cat([start, self.leave(x), early, late], dim=1))
        result: Tensor = F.pixel_shuffle(self.grow(joined), self.config.scale)
        return result

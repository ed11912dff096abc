"""Super-resolution: SPAN in torch, from weights that are published for ncnn.

The weights come as ncnn's ``.param`` and ``.bin``; they are read once (half-precision convolutions in the order of the
layers) and kept as safetensors in the model's folder. Large pictures run in tiles that overlap by the network's whole
reach, so that tiles leave no seams.
"""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from contentfactory.errors import InputError, ModelUnavailable
from worker.engines.files import ResolvedModel
from worker.engines.options import InferenceOptions, autocast, prepare
from worker.networks.span import RECEPTIVE_RADIUS, Span, SpanConfig

TILE = 160
"""Edge of a tile without its overlap, pixels; one fixed size keeps memory flat."""

_HALF = 0x01306B47


class Upscaler:
    """Enlarges pictures two or four times.

    Args:
        nets: Network by scale.
        device: Where they run.
    """

    def __init__(self, nets: dict[int, Span], device: str) -> None:
        self.nets = nets
        self.device = torch.device(device)

    def upscale(
        self,
        picture: Image.Image,
        scale: int,
        on_tile: Callable[[float], None] = lambda fraction: None,
        *,
        smooth_outline: bool = False,
    ) -> Image.Image:
        """Enlarge a picture; transparency is enlarged by the same network.

        Args:
            picture: ``RGB`` or ``RGBA``.
            scale: 2 or 4.
            on_tile: Told the share done, in [0, 1], after each tile; what it raises ends the work.
            smooth_outline: For solid things whose outline is ragged, as small generated pictures are: the outline is
                smoothed and colours at its edge come from within. The network would sharpen each step of it.

        Returns:
            A picture of the same mode.

        Raises:
            InputError: If the model has no network of that scale.
        """
        net = self.nets.get(scale)
        if net is None:
            raise InputError(f"scale {scale} is not offered by this model; allowed: {', '.join(map(str, sorted(self.nets)))}", param="scale")
        values = torch.from_numpy(np.asarray(picture.convert("RGBA" if picture.mode == "RGBA" else "RGB")).copy())
        pixels = values.permute(2, 0, 1).float() / 255
        if picture.mode != "RGBA":
            return _picture(self._run(net, pixels, on_tile))
        alpha = pixels[3:]
        if smooth_outline:
            sure = ((alpha - 0.55) / 0.35).clamp(0, 1)
            colour = self._run(net, spread_colour(pixels[:3], sure), on_tile)
            soft = F.interpolate(_blur(alpha, 0.9)[None], scale_factor=scale, mode="bicubic", align_corners=False)[0]
            return _picture(torch.cat([colour, (soft - 0.5) * 0.8 * scale + 0.5]))
        # Colour under full transparency is arbitrary; the nearest visible one keeps edges free of dark fringes.
        colour = self._run(net, spread_colour(pixels[:3], alpha), lambda done: on_tile(done / 2))
        if float(alpha.min()) == float(alpha.max()):
            large = alpha.expand(3, -1, -1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        else:
            large = self._run(net, alpha.expand(3, -1, -1), lambda done: on_tile(0.5 + done / 2))
            # The network rings a little beside hard edges; what is nearly nothing or everything is meant to be that.
            large = (large - 0.02) / 0.96
        return _picture(torch.cat([colour, large.mean(0, keepdim=True)]))

    @torch.inference_mode()
    def _run(self, net: Span, pixels: Tensor, on_tile: Callable[[float], None]) -> Tensor:
        """Enlarge (3, height, width) in [0, 1] by tiles."""
        scale, margin = net.config.scale, RECEPTIVE_RADIUS
        _, height, width = pixels.shape
        out = torch.empty(3, height * scale, width * scale)
        places = [(top, left) for top in range(0, height, TILE) for left in range(0, width, TILE)]
        for number, (top, left) in enumerate(places):
            bottom, right = min(top + TILE, height), min(left + TILE, width)
            above, before = max(0, top - margin), max(0, left - margin)
            tile = pixels[:, above : min(bottom + margin, height), before : min(right + margin, width)]
            made = net(tile[None].to(self.device))[0]
            y, x = (top - above) * scale, (left - before) * scale
            out[:, top * scale : bottom * scale, left * scale : right * scale] = made[
                :, y : y + (bottom - top) * scale, x : x + (right - left) * scale
            ].float().cpu()
            on_tile((number + 1) / len(places))
        return out


def _picture(pixels: Tensor) -> Image.Image:
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)


def _blur(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (1, height, width); ``sigma`` in pixels."""
    reach = int(4 * sigma)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(maps[None], (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    result: Tensor = F.conv2d(across, kernel.view(1, 1, -1, 1))[0]
    return result


def spread_colour(colour: Tensor, alpha: Tensor) -> Tensor:
    """Fill transparent parts with the colours nearest to them.

    Args:
        colour: (3, height, width) in [0, 1], straight alpha.
        alpha: (1, height, width) in [0, 1].

    Returns:
        (3, height, width); visible parts are unchanged.
    """
    levels: list[tuple[Tensor, Tensor]] = []
    weighted, weight = (colour * alpha)[None], alpha[None]
    while True:
        levels.append((weighted, weight))
        if min(weight.shape[-2:]) < 2:
            break
        weighted, weight = (F.avg_pool2d(part, 2, ceil_mode=True) for part in (weighted, weight))
    total = levels[-1][1].sum().clamp_min(1e-6)
    filled = (levels[-1][0].sum((2, 3), keepdim=True) / total).expand_as(levels[-1][0])
    for weighted, weight in reversed(levels):
        rough = F.interpolate(filled, size=weight.shape[-2:], mode="bilinear", align_corners=False)
        share = (weight * 4).clamp(0, 1)
        filled = weighted / weight.clamp_min(1e-6) * share + rough * (1 - share)
    return torch.where(alpha > 0.5, colour, filled[0]).clamp(0, 1)


def load_upscaler(model: ResolvedModel, device: str = "cpu") -> Upscaler:
    """Load SPAN.

    Args:
        model: ``files``: ``x2.param``, ``x2.bin``, ``x4.param``, ``x4.bin`` (either pair may be missing).
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ModelUnavailable: If files are missing or hold another network.
    """
    scales = [scale for scale in (2, 4) if f"x{scale}.param" in model.files and f"x{scale}.bin" in model.files]
    if not scales:
        raise ModelUnavailable(f"model {model.name}: an upscaler needs the files x2.param and x2.bin, or x4.param and x4.bin")

    def convert(folder: Path) -> None:
        for scale in scales:
            save_file(read_ncnn(model.files[f"x{scale}.param"], model.files[f"x{scale}.bin"]), folder / f"x{scale}.safetensors")

    options = InferenceOptions.of(model, device)
    try:
        folder = model.converted("safetensors", convert)
        nets = {}
        for scale in scales:
            tensors = {name: tensor.float() for name, tensor in load_file(folder / f"x{scale}.safetensors").items()}
            blocks = sum(name.endswith(".c1.weight") for name in tensors)
            net = Span(SpanConfig(scale, tensors["enter.weight"].shape[0], blocks))
            net.load_state_dict(tensors)
            net = autocast(net.eval().requires_grad_(False).to(device), options.dtype, device)
            nets[scale] = prepare(net, options)
    except (OSError, KeyError, ValueError, RuntimeError, struct.error) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ModelUnavailable(f"model {model.name}: its files do not hold a SPAN network: {error}") from error
    return Upscaler(nets, device)


def read_ncnn(param: Path, weights: Path) -> dict[str, Tensor]:
    """Convolutions out of ncnn's files, under this network's names.

    Args:
        param: The text file that lists the layers.
        weights: The binary file: for each convolution a tag, half-precision weights padded to four bytes, float biases.

    Raises:
        ValueError: If the files hold something else.
    """
    data, at = weights.read_bytes(), 0
    tensors: dict[str, Tensor] = {}
    channels = 3
    for line in param.read_text().splitlines()[2:]:
        parts = line.split()
        if len(parts) < 4 or parts[0] not in ("Convolution", "MemoryData"):
            continue
        values = dict(part.split("=", 1) for part in parts[4:] if "=" in part and not part.startswith("/"))
        if parts[0] == "MemoryData":
            at += 4 * 3  # the mean colour; the network has it as a constant
            continue
        outputs, kernel, count = int(values["0"]), int(values["1"]), int(values["6"])
        (tag,) = struct.unpack_from("<I", data, at)
        at += 4
        if tag == _HALF:
            flat = np.frombuffer(data, "<f2", count, at).astype(np.float32)
            at += -(-2 * count // 4) * 4
        elif tag == 0:
            flat = np.frombuffer(data, "<f4", count, at)
            at += 4 * count
        else:
            raise ValueError(f"weights of {parts[1]} have the unknown tag {tag:#x}")
        channels = count // (outputs * kernel * kernel)
        name = _name(parts[1])
        tensors[f"{name}.weight"] = torch.from_numpy(flat.copy()).view(outputs, channels, kernel, kernel)
        tensors[f"{name}.bias"] = torch.from_numpy(np.frombuffer(data, "<f4", outputs, at).copy())
        at += 4 * outputs
    if at != len(data):
        raise ValueError(f"{weights.name} has {len(data)} bytes; its layers take {at}")
    return {name: tensor.half() if name.endswith("weight") else tensor for name, tensor in tensors.items()}


def _name(layer: str) -> str:
    parts = layer.strip("/").split("/")
    if parts[0].startswith("block_"):
        return f"blocks.{int(parts[0].removeprefix('block_')) - 1}.{parts[1].partition('_')[0]}"
    names = {"conv_1": "enter", "conv_2": "leave", "conv_cat": "join", "upsampler": "grow"}
    if parts[0] not in names:
        raise ValueError(f"layer {layer} is not part of SPAN")
    return names[parts[0]]

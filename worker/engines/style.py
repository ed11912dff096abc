"""Style transfer by two small networks in ONNX: one with 26 styles of its own, one that takes the style of any picture.

The networks normalise by statistics of the whole picture (instance normalisation), so a picture always runs in one piece:
tiles would each get their own contrast and colours and show seams. Pictures are shrunk to a largest side instead.
"""

import typing
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from contentfactory.errors import InputError, ModelUnavailable
from contentfactory.jobs.image import StyleName
from worker.engines.files import ResolvedModel

STYLES: tuple[str, ...] = typing.get_args(StyleName)
CONTENT_SIDE = 384
STYLE_SIDE = 256
MIN_SIDE = 16
LANCZOS = Image.Resampling.LANCZOS


@dataclass
class Stylizer:
    """Repaints pictures.

    Attributes:
        many: Session of the network with styles of its own.
        predict: Session that turns a style picture into a style vector, or None.
        transform: Session that repaints by a style vector, or None.
        styles: Names of the own styles, in the network's order.
    """

    many: Any
    predict: Any
    transform: Any
    styles: tuple[str, ...] = STYLES

    def stylize(self, pixels: np.ndarray, style: str, strength: float = 1.0) -> np.ndarray:
        """Repaint in one of the network's styles.

        Args:
            pixels: (height, width, 3), 0 to 255.
            style: One of `styles`.
            strength: 0 gives the picture back, 1 the full style.

        Returns:
            (height, width, 3), uint8.

        Raises:
            InputError: If the style is unknown or the picture is smaller than 16 pixels a side.
        """
        if style not in self.styles:
            raise InputError(f"style {style!r} is unknown; allowed: {', '.join(self.styles)}", param="style")
        height, width = _size(pixels)
        weights = np.zeros(len(self.styles), np.float32)
        weights[self.styles.index(style)] = 1
        content = pixels.astype(np.float32) / 255
        # The network halves twice: sides must be multiples of four. A mirrored margin keeps its edges calm.
        margin = min(16, height - 1, width - 1)
        padded = np.pad(content, ((margin, margin + (-(height + 2 * margin)) % 4), (margin, margin + (-(width + 2 * margin)) % 4), (0, 0)), "reflect")
        made = self.many.run(None, {"image": np.ascontiguousarray(padded.transpose(2, 0, 1)[None]), "style_weights": weights})[0][0]
        made = made.transpose(1, 2, 0)[margin : margin + height, margin : margin + width]
        return _mix(made, content, strength)

    def style_vector(self, picture: Image.Image) -> np.ndarray:
        """What the style network sees in a picture, (1, 1, 1, 100).

        Raises:
            InputError: If this model takes no style pictures.
        """
        if self.predict is None:
            raise InputError("this model has its own styles only; leave style_image out", param="style_image")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.convert("RGB").resize((STYLE_SIDE, STYLE_SIDE), LANCZOS, box=(left, top, left + side, top + side))
        vector: np.ndarray = self.predict.run(None, {self.predict.get_inputs()[0].name: np.asarray(square, np.float32)[None] / 255})[0]
        return vector

    def stylize_like(self, pixels: np.ndarray, vector: np.ndarray, strength: float = 1.0) -> np.ndarray:
        """Repaint in the style of a vector from `style_vector`; worked at 384 pixels and enlarged, so softer.

        Args:
            pixels: (height, width, 3), 0 to 255.
            vector: (1, 1, 1, 100).
            strength: 0 gives the picture back, 1 the full style; between them style and picture are mixed evenly.

        Returns:
            (height, width, 3), uint8.
        """
        height, width = _size(pixels)
        scale = CONTENT_SIDE / max(height, width)
        small_size = max(1, round(width * scale)), max(1, round(height * scale))
        picture = Image.fromarray(pixels.astype(np.uint8))
        small = np.asarray(picture.resize(small_size, LANCZOS), np.float32) / 255
        # Below 1 the vector also moves towards the picture's own style, which looks better than fading alone.
        if strength < 1:
            vector = strength * vector + (1 - strength) * self.style_vector(picture)
        padded = np.pad(small, ((0, CONTENT_SIDE - small.shape[0]), (0, CONTENT_SIDE - small.shape[1]), (0, 0)), "symmetric")
        names = [node.name for node in self.transform.get_inputs()]
        made = self.transform.run(None, {names[0]: padded[None], names[1]: vector.astype(np.float32)})[0][0]
        made = made[: small.shape[0], : small.shape[1]]
        large = np.stack([
            np.asarray(Image.fromarray(np.ascontiguousarray(made[..., c])).resize((width, height), LANCZOS)) for c in range(3)
        ], axis=-1)  # fmt: skip
        return _mix(large, pixels.astype(np.float32) / 255, strength)


def _size(pixels: np.ndarray) -> tuple[int, int]:
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise InputError(f"the picture has {width}×{height} pixels; style transfer needs {MIN_SIDE} a side at least", param="image")
    return height, width


def _mix(made: np.ndarray, content: np.ndarray, strength: float) -> np.ndarray:
    mixed = content + (np.clip(made, 0, 1) - content) * strength
    return (np.clip(mixed, 0, 1) * 255 + 0.5).astype(np.uint8)


def load_stylizer(model: ResolvedModel, device: str = "cpu") -> Stylizer:
    """Load the networks.

    Args:
        model: ``files``: ``many`` (ONNX; inputs ``image`` (1, 3, h, w) in [0, 1] and ``style_weights`` (styles)), and
            optionally ``predict`` and ``transform`` for the style of any picture. ``options['styles']``: names of the own
            styles where they are not the default's 26.
        device: ``cpu``, ``cuda`` or ``cuda:N``; without onnxruntime's CUDA build the processor is used.

    Raises:
        ModelUnavailable: If a file is missing or is no such network.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")

    def open_(role: str) -> Any:
        if role not in model.files:
            return None
        try:
            return onnxruntime.InferenceSession(str(model.files[role]), options, providers=providers)
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            raise ModelUnavailable(f"model {model.name}: file {role} is no usable ONNX network: {str(error)[:200]}") from error

    many = open_("many")
    names = {node.name: node.shape for node in many.get_inputs()} if many is not None else {}
    styles = tuple(str(name) for name in model.options.get("styles", STYLES))  # type: ignore[union-attr]
    if set(names) != {"image", "style_weights"} or names["style_weights"] != [len(styles)]:
        raise ModelUnavailable(
            f"model {model.name}: file many must take image and style_weights of {len(styles)} styles; it takes {names or 'nothing'}"
        )
    return Stylizer(many, open_("predict"), open_("transform"), styles)

"""Words over the picture: subtitles, titles, lower thirds. Set by the typesetter, so every script comes out right."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from worker.engines.typeset import Bar, Piece, Typesetter, is_rtl, tidy
from worker.media.image import parse_colour
from worker.media.video import Frame

_SAFE = 0.05
"""Margin on each side that stays free of words, in parts of the frame."""


@dataclass(frozen=True)
class Sprite:
    """A cut-out to lay over frames.

    Args:
        x: Left edge, pixels.
        y: Upper edge, pixels.
        colour: Premultiplied RGB, uint16, shape ``(h, w, 3)``.
        keep: What shows through, ``255 - alpha``: uint16, shape ``(h, w, 1)``.
    """

    x: int
    y: int
    colour: npt.NDArray[np.uint16]
    keep: npt.NDArray[np.uint16]

    def draw(self, frame: Frame, opacity: float = 1.0) -> None:
        """Lay it over a frame, in place.

        Args:
            frame: RGB.
            opacity: In ``[0, 1]``.
        """
        if opacity <= 0:
            return
        h, w = self.keep.shape[:2]
        area = frame[self.y : self.y + h, self.x : self.x + w]
        if opacity >= 1:
            area[:] = (self.colour + area * self.keep // 255).astype(np.uint8)
            return
        part = round(opacity * 256)
        keep = 255 - (255 - self.keep) * part // 256
        area[:] = np.minimum(self.colour * part // 256 + area * keep // 255, 255).astype(np.uint8)


def _sprite(rgba: npt.NDArray[np.float32], x: int, y: int, width: int, height: int) -> Sprite | None:
    """A sprite out of premultiplied RGBA in ``[0, 1]``, cut to the frame and to what is not empty."""
    left, top = max(0, -x), max(0, -y)
    rgba = rgba[top : height - y, left : width - x]
    x, y = max(x, 0), max(y, 0)
    rows, cols = (
        np.flatnonzero(rgba[..., 3].max(axis=1) > 0.002),
        np.flatnonzero(rgba[..., 3].max(axis=0) > 0.002),
    )
    if not rows.size:
        return None
    rgba = rgba[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    alpha = np.rint(rgba[..., 3:] * 255).astype(np.uint16)
    # Rounded down so that colour + what shows through never passes 255.
    colour = np.minimum(np.floor(rgba[..., :3] * 255 + 1e-3).astype(np.uint16), alpha)
    return Sprite(x + int(cols[0]), y + int(rows[0]), colour, 255 - alpha)


@functools.cache
def _typesetter() -> Typesetter:
    return Typesetter()


def _set(
    pieces: Sequence[Piece | Bar], width: int, height: int, align: str
) -> tuple[npt.NDArray[np.float32], int, float, float]:
    """A column of text as premultiplied RGBA in ``[0, 1]``, its margin, its height and its widest line, pixels."""
    column = _typesetter().column(
        pieces, width=width, height=height, align=align, cut=("subtext", "text", "cue")
    )
    rgba = np.asarray(column.picture, dtype=np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    filled = np.flatnonzero(rgba[..., 3].max(axis=0) > 0.01)
    ink = float(filled[-1] - filled[0] + 1) if filled.size else 0.0
    return rgba, column.pad, column.height, ink


def _over(front: npt.NDArray[np.float32], back: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return front + back * (1 - front[..., 3:])


def _outline(rgba: npt.NDArray[np.float32], size: float) -> npt.NDArray[np.float32]:
    """A dark rim and a soft shadow around what is drawn."""
    alpha = np.ascontiguousarray(rgba[..., 3])
    radius = max(1.0, size * 0.075)
    reach = int(np.ceil(radius))
    grid = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1])
    rim = cv2.dilate(alpha, (grid <= radius + 0.3).astype(np.uint8))
    rim = np.clip(cv2.GaussianBlur(rim, (0, 0), 0.6) * 1.05, 0, 1)
    shadow = cv2.GaussianBlur(rim, (0, 0), size * 0.16) * 0.6
    shift = np.float64([[1, 0, 0], [0, 1, size * 0.04]])
    shadow = cv2.warpAffine(shadow, shift, (alpha.shape[1], alpha.shape[0]))
    dark = np.zeros_like(rgba)
    dark[..., 3] = 1 - (1 - rim * 0.92) * (1 - shadow)
    return _over(rgba, dark)


def subtitle_size(width: int, height: int) -> float:
    """Font size of burnt-in subtitles, pixels."""
    return max(9.0, min(height * 0.056, width * 0.062))


def subtitle_columns(width: int, height: int) -> int:
    """How many columns of a burnt-in line fit into a frame; never more than 42."""
    return max(12, min(42, int(width * (1 - 2 * _SAFE) / (subtitle_size(width, height) * 0.53))))


def subtitle(lines: Sequence[str], width: int, height: int, style: str) -> Sprite | None:
    """A cue at the foot of the frame.

    Args:
        lines: One or two.
        width: Of the frame, pixels.
        height: Of the frame, pixels.
        style: ``outline`` or ``box``.

    Returns:
        The sprite; None where no font has any of its characters.
    """
    size = subtitle_size(width, height)
    inner = round(width * (1 - 2 * _SAFE))
    # A line that is wider than counted (many capitals) is set smaller before it is wrapped again.
    piece = Piece("cue", "\n".join(lines), size, size * 0.72, "#ffffff", 600, max_lines=len(lines))
    rgba, pad, text_height, ink = _set([piece], inner, round(height * 0.45), "center")
    if not ink:
        return None
    room = round(size * 1.2)
    rgba = np.pad(rgba, ((room, room), (room, room), (0, 0)))
    if style == "box":
        back = np.zeros_like(rgba)
        middle, half = rgba.shape[1] / 2, ink / 2 + size * 0.5
        top, bottom = room + pad - size * 0.3, room + pad + text_height + size * 0.3
        back[..., 3] = _rounded(rgba.shape[:2], middle - half, top, middle + half, bottom, size * 0.28) * 0.72
        rgba = _over(rgba, back)
    else:
        rgba = _outline(rgba, size)
    foot = height * (1 - _SAFE * 1.2) - text_height
    return _sprite(rgba, round((width - inner) / 2) - pad - room, round(foot) - pad - room, width, height)


def _rounded(
    shape: tuple[int, ...], left: float, top: float, right: float, bottom: float, radius: float
) -> npt.NDArray[np.float32]:
    """Coverage of a rectangle with round corners."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32) + 0.5
    dx = np.maximum(np.maximum(left + radius - x, x - (right - radius)), 0)
    dy = np.maximum(np.maximum(top + radius - y, y - (bottom - radius)), 0)
    return np.clip(radius - np.hypot(dx, dy) + 0.5, 0, 1).astype(np.float32)


def title(
    text: str, subtext: str, width: int, height: int, *, accent: str, background: str, on_card: bool
) -> list[Sprite]:
    """Large words in the middle, on a card or over a picture.

    Args:
        text: Title.
        subtext: Line below it, or ``""``.
        width: Of the frame, pixels.
        height: Of the frame, pixels.
        accent: Colour of the bar, ``#rrggbb``.
        background: Colour of the card.
        on_card: Whether it stands on the background colour.

    Returns:
        Sprites to draw in this order.
    """
    ink = "#16181d" if on_card and _light(background) else "#ffffff"
    size = min(height * 0.135, width * 0.1)
    pieces: list[Piece | Bar] = [
        Piece("text", tidy(text), size, size * 0.42, ink, 700, display=True, max_lines=4)
    ]
    pieces.append(Bar(size * 1.1, max(2.0, size * 0.07), accent, size * 0.42))
    if subtext:
        pieces.append(
            Piece("subtext", tidy(subtext), size * 0.42, size * 0.26, ink, 400, gap=0.75, max_lines=4)
        )
    inner = round(width * 0.82)
    rgba, pad, text_height, _ = _set(pieces, inner, round(height * 0.74), "center")
    sprites: list[Sprite | None] = []
    if not on_card:
        veil = np.zeros((height, width, 4), np.float32)
        veil[..., 3] = 0.46
        sprites.append(_sprite(veil, 0, 0, width, height))
        room = round(size * 0.5)
        rgba = _shadowed(np.pad(rgba, ((room, room), (room, room), (0, 0))), size)
        pad += room
    sprites.append(
        _sprite(
            rgba, round((width - inner) / 2) - pad, round((height - text_height) / 2) - pad, width, height
        )
    )
    return [s for s in sprites if s is not None]


def lower_third(
    text: str, subtext: str, width: int, height: int, *, accent: str, raised: bool
) -> list[Sprite]:
    """Words at the lower left (lower right where they run so), beside a bar, over a soft dark ground.

    Args:
        text: First line, strong.
        subtext: Line below it, or ``""``.
        width: Of the frame, pixels.
        height: Of the frame, pixels.
        accent: Colour of the bar.
        raised: Whether room for two lines of subtitles stays free below.

    Returns:
        Sprites to draw in this order.
    """
    size = min(height * 0.075, width * 0.07)
    pieces: list[Piece | Bar] = [
        Piece("text", tidy(text), size, size * 0.6, "#ffffff", 700, display=True, max_lines=2)
    ]
    if subtext:
        pieces.append(
            Piece("subtext", tidy(subtext), size * 0.6, size * 0.45, "#e9ebf0", 400, gap=0.35, max_lines=2)
        )
    bar = max(3, round(size * 0.14))
    gap = round(size * 0.42)
    left = round(width * (_SAFE + 0.015))
    inner = round(width * 0.7) - bar - gap
    rgba, pad, text_height, _ = _set(pieces, inner, round(height * 0.35), "start")
    foot = height * (1 - _SAFE * 1.6) - (3.6 * subtitle_size(width, height) if raised else 0)
    top = foot - text_height
    rtl = is_rtl(text)
    ground = np.zeros((height, width, 4), np.float32)
    y = np.arange(height, dtype=np.float32)
    # Densest behind the words, gone before the middle of the frame.
    rise = np.clip((y - (top - size * 2.2)) / (size * 2.2), 0, 1)
    ground[..., 3] = (0.62 * rise**2 * (3 - 2 * rise))[:, None]
    x = left + bar + gap if not rtl else width - left - bar - gap - inner
    edge = left if not rtl else width - left - bar
    room = round(size * 0.5)
    words = _shadowed(np.pad(rgba, ((room, room), (room, room), (0, 0))), size)
    line = np.zeros((round(text_height + size * 0.2), bar, 4), np.float32)
    line[..., :3], line[..., 3] = np.array(parse_colour(accent), np.float32) / 255, 1
    found = (
        _sprite(ground, 0, 0, width, height),
        _sprite(line, edge, round(top - size * 0.1), width, height),
        _sprite(words, x - pad - room, round(top) - pad - room, width, height),
    )
    return [s for s in found if s is not None]


def _shadowed(rgba: npt.NDArray[np.float32], size: float) -> npt.NDArray[np.float32]:
    dark = np.zeros_like(rgba)
    dark[..., 3] = cv2.GaussianBlur(np.ascontiguousarray(rgba[..., 3]), (0, 0), size * 0.09) * 0.55
    return _over(rgba, dark)


def _light(colour: str) -> bool:
    red, green, blue = parse_colour(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 150

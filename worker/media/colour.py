"""Colour for design: contrast as WCAG counts it, and shades by Oklch, where equal steps look equal."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

RGB = tuple[int, int, int]

_TO_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                    [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
_TO_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                    [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip


def to_hex(colour: RGB) -> str:
    """An RGB triple as ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(pixels: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB.

    Args:
        pixels: (…, 3) in 0 to 255.

    Returns:
        (…) in [0, 1].
    """
    result: np.ndarray = _linear(np.asarray(pixels, np.float64) / 255) @ np.array([0.2126, 0.7152, 0.0722])
    return result


def contrast(one: RGB, other: RGB) -> float:
    """Contrast ratio by WCAG 2, 1 to 21."""
    light, dark = sorted((float(luminance(np.array(one))), float(luminance(np.array(other)))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def to_oklch(colour: RGB) -> tuple[float, float, float]:
    """Oklch of an sRGB colour: lightness 0 to 1, chroma 0 to about 0.37, hue in radians."""
    lightness, a, b = _oklab(np.array([colour]))[0]
    return float(lightness), math.hypot(a, b), math.atan2(b, a)


def _oklab(pixels: np.ndarray) -> np.ndarray:
    lab: np.ndarray = np.cbrt(_linear(np.asarray(pixels, np.float64) / 255) @ _TO_LMS.T) @ _TO_LAB.T
    return lab


def from_oklch(lightness: float, chroma: float, hue: float) -> RGB:
    """Oklch to sRGB; chroma is lowered where the colour lies outside sRGB."""
    lab_to_lms, lms_to_rgb = np.linalg.inv(_TO_LAB), np.linalg.inv(_TO_LMS)
    lightness = min(max(lightness, 0.0), 1.0)
    for _ in range(40):
        lms = lab_to_lms @ np.array([lightness, chroma * math.cos(hue), chroma * math.sin(hue)])
        linear = lms_to_rgb @ lms**3
        if np.all(linear >= -1e-4) and np.all(linear <= 1 + 1e-4):
            break
        chroma *= 0.92
    linear = np.clip(linear, 0, 1)
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (round(float(v) * 255) for v in srgb)
    return red, green, blue


def leading_colour(picture: Image.Image) -> RGB | None:
    """The colour that a picture is remembered by: the strongest hue among its opaque, coloured pixels.

    Args:
        picture: ``RGB`` or ``RGBA``.

    Returns:
        The colour, or None where the picture is grey.
    """
    small = picture.convert("RGBA").resize((64, 64), Image.Resampling.BOX)
    pixels = np.asarray(small, np.float64).reshape(-1, 4)
    lab = _oklab(pixels[:, :3])
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    weight = (pixels[:, 3] / 255) * np.where(chroma > 0.035, chroma, 0)
    if weight.sum() < 0.004 * len(pixels):
        return None
    hue = np.arctan2(lab[:, 2], lab[:, 1])
    bins = ((hue + math.pi) / (2 * math.pi) * 24).astype(int) % 24
    mass = np.bincount(bins, weight, minlength=24)
    # A hue may straddle two bins.
    best = int(np.argmax(mass + 0.5 * (np.roll(mass, 1) + np.roll(mass, -1))))
    near = np.isin(bins, [(best - 1) % 24, best, (best + 1) % 24])
    mean = np.average(lab[near], axis=0, weights=np.maximum(weight[near], 1e-9))
    return from_oklch(float(mean[0]), float(math.hypot(mean[1], mean[2])), math.atan2(mean[2], mean[1]))


def readable(colour: RGB, ground: RGB, ratio: float = 4.5) -> RGB:
    """The nearest shade of a colour that reads on a ground.

    Args:
        colour: Wished colour.
        ground: What it stands on.
        ratio: Least contrast.

    Returns:
        The colour itself where it already reads; else the same hue, lighter or darker.
    """
    if contrast(colour, ground) >= ratio:
        return colour
    lightness, chroma, hue = to_oklch(colour)
    best: tuple[float, RGB] | None = None
    for step in range(101):
        shade = from_oklch(step / 100, chroma, hue)
        if contrast(shade, ground) >= ratio:
            distance = abs(step / 100 - lightness)
            if best is None or distance < best[0]:
                best = (distance, shade)
    return best[1] if best else max(((0, 0, 0), (255, 255, 255)), key=lambda c: contrast(c, ground))


@dataclass(frozen=True)
class Palette:
    """Colours of a card, RGB triples.

    Args:
        background: The card's ground.
        panel: Ground behind a picture that does not fill its frame, and of strong areas.
        glow: Lighter shade of the panel for gradients.
        text: Text on the background.
        soft: Secondary text on the background.
        accent: Kicker and ornaments on the background; reads at 4.5 to 1.
        shadow: Colour of shadows.
    """

    background: RGB
    panel: RGB
    glow: RGB
    text: RGB
    soft: RGB
    accent: RGB
    shadow: RGB


def palette(
    lead: RGB,
    theme: str,
    *,
    background: RGB | None = None,
    text: RGB | None = None,
    accent: RGB | None = None,
) -> Palette:
    """Derive a card's colours from one.

    Args:
        lead: Leading colour.
        theme: ``light``, ``dark`` or ``vivid``.
        background: Given ground, else derived.
        text: Given text colour, else chosen for contrast. The caller checks that it reads.
        accent: Given accent, else derived; it is shaded until it reads.
    """
    lightness, chroma, hue = to_oklch(lead)
    grey = chroma < 0.02
    tone = 0.0 if grey else 1.0
    if background is None:
        if theme == "dark":
            background = from_oklch(0.21, 0.035 * tone, hue)
        elif theme == "vivid":
            background = (
                lead if chroma >= 0.08 and 0.3 <= lightness <= 0.88 else from_oklch(0.55, 0.16 * tone, hue)
            )
        else:
            background = from_oklch(0.975, 0.013 * tone, hue)
    ground_lightness, ground_chroma, ground_hue = to_oklch(background)
    dark = float(luminance(np.array(background))) < 0.18
    shade = ground_hue if ground_chroma > 0.02 else hue
    if text is None:
        options = [
            from_oklch(0.985, 0.008 * tone, shade),
            from_oklch(0.21, 0.04 * tone, shade),
            (255, 255, 255),
            (12, 12, 14),
        ]
        wished = options[0] if dark else options[1]
        text = (
            wished
            if contrast(wished, background) >= 7
            else max(options, key=lambda c: contrast(c, background))
        )
    mixed = from_oklch(
        0.72 * to_oklch(text)[0] + 0.28 * ground_lightness,
        max(0.02 * tone, to_oklch(text)[1]),
        shade if tone else 0.0,
    )
    soft = readable(mixed, background, 5.5 if contrast(text, background) >= 5.5 else 4.5)
    wished_accent = accent or (lead if chroma >= 0.06 else from_oklch(0.55, 0.12 * tone, hue))
    if theme == "vivid" and accent is None:
        wished_accent = from_oklch(0.93 if dark else 0.3, 0.09 * tone, shade)
    if theme == "dark":
        panel, glow = from_oklch(0.32, 0.07 * tone, hue), from_oklch(0.46, 0.1 * tone, hue)
    elif theme == "vivid":
        panel = from_oklch(min(0.93, ground_lightness + 0.12), min(0.13, ground_chroma) * tone, shade)
        glow = from_oklch(min(0.97, ground_lightness + 0.24), min(0.09, ground_chroma) * tone, shade)
    else:
        panel, glow = from_oklch(0.885, 0.055 * tone, hue), from_oklch(0.955, 0.028 * tone, hue)
    return Palette(
        background,
        panel,
        glow,
        text,
        soft,
        readable(wished_accent, background),
        from_oklch(0.25 if not dark else 0.08, 0.05 * tone, hue),
    )

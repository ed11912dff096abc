"""Runner of ``image.compose``: the design of cards.

Text is set first, since it must be readable; the picture gets the room that the text leaves, within what each layout
allows. Positions and sizes are fractions of the card, so that a layout works at any size.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from contentfactory.errors import FactoryError, InputError
from contentfactory.jobs.image import ImageCompose
from worker.context import Failure, JobContext, Output, Yield
from worker.engines.files import ResolvedModel
from worker.engines.typeset import Bar, Column, Piece, Typesetter, is_rtl, tidy
from worker.media.colour import (
    RGB,
    Palette,
    contrast,
    from_oklch,
    leading_colour,
    luminance,
    palette,
    to_hex,
    to_oklch,
)
from worker.media.image import MEDIA_TYPES, SUFFIXES, encode, open_image, parse_colour
from worker.runners import runs

MAX_PICTURE_PIXELS = 30_000_000
LANCZOS = Image.Resampling.LANCZOS
_BLUE: RGB = (58, 91, 190)
_TYPE = ResolvedModel("typesetter", "1", "typst", {}, folder=Path(), memory_mb=120)


def _typesetter(_: ResolvedModel) -> Typesetter:
    return Typesetter()


@runs(ImageCompose)
def compose(params: list[ImageCompose], context: JobContext) -> Iterator[Yield]:
    """Set one card after the other."""
    for job, one in enumerate(params):
        try:
            context.check(job)
            context.progress(job, 0.0)
            picture = logo = None
            if one.picture is not None:
                picture = open_image(context.fetch(job, one.picture), max_pixels=MAX_PICTURE_PIXELS, field="picture")
            if one.logo is not None:
                logo = open_image(context.fetch(job, one.logo), max_pixels=MAX_PICTURE_PIXELS, mode="RGBA", field="logo")
            card, meta = draw_card(one, picture, logo, context.load(_typesetter, _TYPE))
            context.progress(job, 0.9)
        except FactoryError as error:
            yield Failure(job, error)
            continue
        yield Output(
            job, f"card{SUFFIXES[one.format]}", MEDIA_TYPES[one.format],
            lambda card=card, one=one: encode(card, one.format, quality=one.quality), meta,
        )  # fmt: skip


@dataclass
class _Card:
    """What the layouts share while one card is drawn. Lengths are pixels; ``unit`` is a thousandth of the short side."""

    params: ImageCompose
    setter: Typesetter
    width: int
    height: int
    colours: Palette
    canvas: Image.Image
    picture: Image.Image | None
    thing: bool
    rtl: bool
    texts: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    report: list[dict[str, Any]] = field(default_factory=list)

    @property
    def unit(self) -> float:
        """A thousandth of the short side, a little more on long cards."""
        return min(self.width, self.height) / 1000 * (1.0 if self.width / self.height < 1.2 else 1.04)

    def px(self, thousandths: float) -> int:
        """Thousandths of the short side in pixels."""
        return max(1, round(thousandths * self.unit))


def draw_card(
    params: ImageCompose, picture: Image.Image | None, logo: Image.Image | None, setter: Typesetter
) -> tuple[Image.Image, dict[str, Any]]:
    """Draw a card.

    Args:
        params: What to draw; texts are plain strings by now.
        picture: ``RGB`` or ``RGBA``, or None.
        logo: ``RGBA``, or None.
        setter: Sets the text.

    Returns:
        The card (``RGB``) and facts about it: size, layout, colours, font sizes, warnings.

    Raises:
        InputError: If there is no text, too much of it, or the given text colour does not read on its ground.
    """
    width, height = params.pixels
    language = params.language or ""
    texts = {
        role: tidy(str(value or ""), curly=params.curly, language=language)
        for role, value in (("headline", params.headline), ("body", params.body), ("kicker", params.kicker), ("footer", params.footer))
    }
    for role, limit in (("headline", 400), ("body", 4000)):
        if len(texts[role]) > limit:
            raise InputError(f"{role} has {len(texts[role]):,} characters; allowed are {limit:,}", param=role)
    for role in ("headline", "kicker", "footer"):
        texts[role] = texts[role].replace("\n", " ")
    if not texts["headline"]:
        raise InputError("headline is empty; a card needs one", param="headline")
    if picture is not None:
        picture = _trim(picture)
    thing = picture is not None and (params.picture_fit == "contain" or (params.picture_fit == "auto" and _is_thing(picture)))
    if picture is not None and thing:
        picture = _trim(_cut_out(picture))
    layout = params.layout
    if layout == "auto":
        shape = width / height
        if picture is None:
            layout = "minimal"
        elif shape >= 1.2:
            layout = "split"
        else:
            layout = "hero" if thing or shape > 0.7 else "overlay"
    if layout == "overlay" and thing:
        # Words across a cut-out thing read badly; it gets its own room instead.
        layout = "hero"

    lead = parse_colour(params.primary) if params.primary else None
    if lead is None:
        lead = (leading_colour(picture) if picture is not None else None) or _BLUE
    theme = "vivid" if layout == "poster" and params.theme == "light" and params.background is None else params.theme
    colours = palette(
        lead, theme, background=parse_colour(params.background) if params.background else None,
        text=parse_colour(params.text) if params.text else None, accent=parse_colour(params.accent) if params.accent else None,
    )  # fmt: skip
    ratio = contrast(colours.text, colours.background)
    if ratio < 4.5 and layout != "overlay":
        raise InputError(
            f"text {to_hex(colours.text)} on background {to_hex(colours.background)} has a contrast of {ratio:.2f} to 1; "
            "allowed is 4.5 or more, or leave text out and it is chosen",
            code="low_contrast", param="text",
        )  # fmt: skip
    card = _Card(
        params, setter, width, height, colours, Image.new("RGB", (width, height), colours.background), picture, thing,
        is_rtl(texts["headline"]), texts,
    )  # fmt: skip
    if picture is not None and not thing and layout != "minimal":
        need = min(width, height) * 0.5
        if min(picture.size) < need / 2.5:
            card.warnings.append(f"the picture has only {picture.width}×{picture.height} pixels and is enlarged")
    if params.accent and colours.accent != parse_colour(params.accent):
        card.warnings.append(f"accent {params.accent} was shaded to {to_hex(colours.accent)} so that it reads on the background")
    drawn = {"hero": _hero, "split": _split, "overlay": _overlay, "minimal": _minimal, "poster": _poster}[layout](card, logo)
    meta = {
        "width": width, "height": height, "layout": layout, "theme": theme, "picture": None if picture is None else "thing" if thing else "photo",
        "direction": "rtl" if card.rtl else "ltr", "contrast": round(drawn, 2),
        "colours": {name: to_hex(getattr(colours, name)) for name in ("background", "text", "accent", "panel")},
        "text": card.report, "warnings": card.warnings,
    }  # fmt: skip
    return card.canvas, meta


# Pictures ------------------------------------------------------------------------------------------------------------


def _trim(picture: Image.Image) -> Image.Image:
    """Cut fully transparent edges off."""
    if picture.mode != "RGBA":
        return picture
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    return picture.crop(box) if box else picture


def _is_thing(picture: Image.Image) -> bool:
    """Whether a picture shows one thing on transparent or plain light ground rather than a scene."""
    small = picture.resize((48, 48), Image.Resampling.BOX)
    if picture.mode == "RGBA":
        alpha = np.asarray(small.getchannel("A"))
        if (alpha < 128).mean() > 0.03:
            return True
        small = small.convert("RGB")
    pixels = np.asarray(small.convert("RGB"), np.float64)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    plain = np.abs(edge - np.median(edge, axis=0)).max(axis=1) < 14
    return bool(plain.mean() > 0.93 and np.median(edge) > 235)


def _cut_out(picture: Image.Image) -> Image.Image:
    """A thing on plain light ground without that ground; pictures with transparency come back as they are."""
    if picture.mode == "RGBA":
        return picture
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(edge, axis=0)
    if np.median(np.abs(edge - ground).max(axis=1)) > 14:
        return picture.convert("RGBA")
    # Only ground that reaches the edge goes: light parts inside the thing stay.
    distance = np.abs(pixels - ground).max(axis=2)
    ring = Image.fromarray(np.where(distance < 26, 255, 0).astype(np.uint8))
    framed = Image.new("L", (picture.width + 2, picture.height + 2), 255)
    framed.paste(ring, (1, 1))
    ImageDraw.floodfill(framed, (0, 0), 128)
    outside = np.asarray(framed.crop((1, 1, picture.width + 1, picture.height + 1))) == 128
    alpha = np.where(outside, np.clip((distance - 6) / 20, 0, 1), 1.0)
    # What shines through half-open edges is taken out of their colour.
    safe = np.maximum(alpha, 0.05)[..., None]
    colour = np.clip((pixels - (1 - alpha[..., None]) * ground) / safe, 0, 255)
    return Image.fromarray(np.dstack([colour, alpha * 255]).round().astype(np.uint8), "RGBA")


def _cover(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Fill a frame, cropped to the part that draws the eye."""
    flat = picture.convert("RGB") if picture.mode != "RGBA" else picture
    scale = max(width / flat.width, height / flat.height)
    box_width, box_height = width / scale, height / scale
    left, top = _focus(flat, box_width, box_height)
    return flat.resize((width, height), LANCZOS, box=(left, top, left + box_width, top + box_height))


def _focus(picture: Image.Image, width: float, height: float) -> tuple[float, float]:
    """Where a crop of a size (pixels) shows most, as its left and top.

    Spectral-residual saliency (Hou, Zhang 2007) decides, with a leaning to the middle and, since heads and subjects are
    rarely at the foot, upwards.
    """
    side = 64
    grey = np.asarray(picture.convert("L").resize((side, side), Image.Resampling.BOX), np.float64)
    spectrum = np.fft.fft2(grey)
    amplitude = np.log(np.abs(spectrum) + 1e-9)
    smooth = sum(np.roll(amplitude, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)) / 9
    salient = np.abs(np.fft.ifft2(np.exp(amplitude - smooth + 1j * np.angle(spectrum)))) ** 2
    kernel = np.exp(-((np.minimum(np.arange(side), side - np.arange(side)) / 3.0) ** 2) / 2)
    blur = np.fft.ifft2(np.fft.fft2(salient) * np.fft.fft2(np.outer(kernel, kernel))).real
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    weight = blur / blur.sum() * np.exp(-((x - 0.5) ** 2) / 0.18 - ((y - 0.4) ** 2) / 0.2)

    def best(profile: np.ndarray, share: float, usual: float, pull: float = 0.12) -> float:
        length = max(1, round(share * side))
        if length >= side:
            return 0.0
        sums = np.convolve(profile, np.ones(length), "valid") / profile.sum()
        starts = np.arange(len(sums)) / max(1, len(sums) - 1)
        return float(starts[np.argmax(sums - pull * np.abs(starts - usual))])

    return (
        best(weight.sum(0), width / picture.width, 0.5) * max(0.0, picture.width - width),
        best(weight.sum(1), height / picture.height, 0.2, 0.35) * max(0.0, picture.height - height),
    )


def _contain(picture: Image.Image, width: int, height: int) -> Image.Image:
    """All of a picture within a frame, premultiplied while resampling so that edges stay clean."""
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.convert("RGBA").convert("RGBa").resize(size, LANCZOS).convert("RGBA")


def _round_mask(width: int, height: int, radius: float) -> Image.Image:
    """A rounded rectangle, drawn at four times its size for smooth edges."""
    mask = Image.new("L", (width * 4, height * 4), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, width * 4 - 1, height * 4 - 1), radius * 4, fill=255)
    return mask.resize((width, height), Image.Resampling.BOX)


def _shadow(canvas: Image.Image, mask: Image.Image, at: tuple[int, int], blur: float, drop: float, colour: RGB, strength: float) -> None:
    """Lay the soft shadow of a shape on the canvas."""
    margin = int(blur * 3) + 1
    shape = Image.new("L", (mask.width + 2 * margin, mask.height + 2 * margin), 0)
    shape.paste(mask.point(lambda value: round(value * strength)), (margin, margin))
    # Blurring a quarter-size copy looks the same and is much faster.
    small = shape.resize((max(1, shape.width // 4), max(1, shape.height // 4)), Image.Resampling.BOX)
    soft = small.filter(ImageFilter.GaussianBlur(blur / 4)).resize(shape.size, Image.Resampling.BICUBIC)
    canvas.paste(Image.new("RGB", soft.size, colour), (at[0] - margin, round(at[1] - margin + drop)), soft)


def _gradient(width: int, height: int, inner: RGB, outer: RGB, centre: tuple[float, float] = (0.5, 0.42), reach: float = 0.75) -> Image.Image:
    """A soft round glow; dithered so that it never shows bands."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    scale = max(width, height) * reach
    distance = np.hypot(x - centre[0] * width, y - centre[1] * height) / scale
    blend = np.clip(distance, 0, 1) ** 1.4
    first, last = np.array(inner, np.float32), np.array(outer, np.float32)
    return _dithered(first + (last - first) * blend[..., None])


@functools.cache
def _noise() -> np.ndarray:
    tile: np.ndarray = np.random.Generator(np.random.PCG64(7)).uniform(-0.5, 0.5, (256, 256, 1)).astype(np.float32)
    return tile


def _dithered(pixels: np.ndarray) -> Image.Image:
    """Round (height, width, 3) to a picture; fixed fine noise keeps slow gradients free of bands."""
    height, width = pixels.shape[:2]
    noise = np.tile(_noise(), (-(-height // 256), -(-width // 256), 1))[:height, :width]
    return Image.fromarray((np.clip(pixels + noise, 0, 255) + 0.5).astype(np.uint8))


def _mesh(width: int, height: int, lead: RGB, dark: bool) -> Image.Image:
    """Large soft fields of related colours, for cards without a picture."""
    _, chroma, hue = to_oklch(lead)
    chroma = max(chroma, 0.09)
    base = from_oklch(0.42 if dark else 0.62, chroma, hue)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / max(width, height), y / max(width, height)
    field_ = np.tile(np.array(base, np.float32), (height, width, 1))
    right, bottom = width / max(width, height), height / max(width, height)
    spots = ((0.1, 0.0, 0.5, 0.14, -0.5), (0.95, 0.25, 0.55, -0.04, 0.45), (0.25, 0.95, 0.6, -0.14, 0.2), (0.9, 1.0, 0.45, 0.2, -0.25))
    for at_x, at_y, radius, step, turn in spots:
        colour = np.array(from_oklch((0.42 if dark else 0.62) + step, chroma, hue + turn), np.float32)
        weight = np.exp(-(((x - at_x * right) ** 2 + (y - at_y * bottom) ** 2) / (2 * (radius * 0.55) ** 2)))[..., None]
        field_ = field_ + (colour - field_) * weight * 0.85
    return _dithered(field_)


def _place_thing(card: _Card, box: tuple[int, int, int, int], *, fill: float, disc: bool = False) -> None:
    """Stand a cut-out thing in a box (left, top, right, bottom) with a shadow under it."""
    width, height = box[2] - box[0], box[3] - box[1]
    if card.picture is None or min(width, height) < 8:
        return
    thing = _contain(card.picture, round(width * fill), round(height * fill))
    if max(thing.width / card.picture.width, thing.height / card.picture.height) > 3.5:
        card.warnings.append(f"the picture has only {card.picture.width}×{card.picture.height} pixels and is enlarged")
    left, top = box[0] + (width - thing.width) // 2, box[1] + (height - thing.height) // 2
    if disc:
        size = round(min(width, height) * 0.98)
        mask = _round_mask(size, size, size / 2)
        glow = _gradient(size, size, card.colours.glow, card.colours.panel)
        card.canvas.paste(glow, (box[0] + (width - size) // 2, box[1] + (height - size) // 2), mask)
    alpha = thing.getchannel("A")
    # A wide faint shadow and a tight one below: the thing floats just above the ground.
    side = min(thing.size)
    _shadow(card.canvas, alpha, (left, top), side * 0.07, side * 0.075, card.colours.shadow, 0.3)
    _shadow(card.canvas, alpha, (left, top), side * 0.016, side * 0.018, card.colours.shadow, 0.18)
    card.canvas.paste(thing, (left, top), alpha)


def _framed(card: _Card, box: tuple[int, int, int, int], radius: float, shadow: bool) -> None:
    """Fill a frame with the picture, or with the thing on a tinted ground, or with colour fields."""
    width, height = box[2] - box[0], box[3] - box[1]
    mask = _round_mask(width, height, radius) if radius else Image.new("L", (width, height), 255)
    if shadow:
        _shadow(card.canvas, mask, box[:2], card.px(26), card.px(20), card.colours.shadow, 0.26)
    if card.picture is None:
        lead = card.colours.accent
        fill = _mesh(width, height, lead, card.params.theme == "dark")
    elif card.thing or card.picture.mode == "RGBA":
        fill = _gradient(width, height, card.colours.glow, card.colours.panel)
        if not card.thing:
            fill.paste(covered := _cover(card.picture, width, height), (0, 0), covered.getchannel("A"))
    else:
        fill = _cover(card.picture, width, height)
    card.canvas.paste(fill, box[:2], mask)
    if card.thing and card.picture is not None:
        inside = card.canvas.copy()
        place = _Card(**{**card.__dict__, "canvas": inside})
        _place_thing(place, box, fill=0.74)
        # Shadows end at the frame.
        card.canvas.paste(inside.crop(box), box[:2], mask)


# Text ----------------------------------------------------------------------------------------------------------------


def _pieces(card: _Card, *, headline: float, least: float, body: float, lines: int, bar: bool, colours: Palette | None = None) -> list[Piece | Bar]:
    """The column of a card, sizes in thousandths of the short side."""
    tint = colours or card.colours
    language = card.params.language or ""
    serif = card.params.typeface == "serif"
    weight = _visual_length(card.texts["headline"])
    # Tall cards have the room for larger type; short headlines may be larger than long ones.
    tall = 1 + 0.28 * min(1.0, max(0.0, (card.height / card.width - 1) / 0.78))
    headline, body = headline * tall, body * (0.5 + tall / 2)
    headline *= 1.32 if weight <= 12 else 1.16 if weight <= 24 else 1.0 if weight <= 60 else 0.86
    pieces: list[Piece | Bar] = []
    if card.texts["kicker"]:
        pieces.append(Piece(
            "kicker", card.texts["kicker"], card.px(26), card.px(21), to_hex(tint.accent), 650, spaced=0.04, max_lines=2, language=language,
        ))  # fmt: skip
    pieces.append(Piece(
        "headline", card.texts["headline"], card.px(headline), card.px(least), to_hex(tint.text), 620 if serif else 780, True,
        -0.008 if serif else -0.026, 0.28, lines, "Fraunces" if serif else "Inter", language,
    ))  # fmt: skip
    if card.texts["body"]:
        if bar:
            pieces.append(Bar(card.px(64), card.px(6), to_hex(tint.accent), card.px(34)))
        pieces.append(Piece(
            "body", card.texts["body"], card.px(body), card.px(22), to_hex(tint.soft), 420, gap=1.05 if bar else 0.8, language=language,
        ))  # fmt: skip
    return pieces


def _visual_length(text: str) -> int:
    """Length in Latin letters: a CJK character counts as two."""
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _set(card: _Card, pieces: list[Piece | Bar], width: int, height: int, align: str, most: int = 0) -> Column:
    """Set a column and keep what there is to say about it; ``most`` is a second, larger height before words are cut."""
    column = card.setter.column(pieces, width=width, height=max(height, 24), align=align)
    if column.cut and most > height:
        column = card.setter.column(pieces, width=width, height=most, align=align)
    card.report += [{"role": p["role"], "size": round(p["size"], 1), "lines": p["lines"]} for p in column.pieces]
    for role in column.cut:
        card.warnings.append(f"{role} does not fit even at its smallest size and was cut with an ellipsis")
    if column.broken:
        card.warnings.append("a word is wider than its column and was broken")
    if column.missing:
        shown = ", ".join(f"{char} (U+{ord(char):04X})" for char in column.missing[:20])
        card.warnings.append(f"no font has these characters, they were left out: {shown}")
    return column


def _lay(card: _Card, column: Column, left: int, top: float) -> None:
    card.canvas.paste(column.picture, (left - column.pad, round(top) - column.pad), column.picture.getchannel("A"))


def _foot(card: _Card, logo: Image.Image | None, left: int, width: int, bottom: int, align: str, colours: Palette | None = None) -> int:
    """Set footer and logo so that they end at ``bottom``; returns the height that they take, gap above included."""
    tint = colours or card.colours
    if not card.texts["footer"] and logo is None:
        return 0
    tall = card.px(46)
    mark = None
    if logo is not None:
        mark = _contain(_trim(logo), min(width // 2, card.px(260)), tall)
    room = width - (mark.width + card.px(24) if mark else 0)
    column = None
    if card.texts["footer"]:
        piece = Piece(
            "footer", card.texts["footer"], card.px(23), card.px(18), to_hex(tint.soft), 480, max_lines=2, gap=0,
            language=card.params.language or "",
        )  # fmt: skip
        column = card.setter.column(
            [piece], width=room, height=card.px(64), align="start" if mark is not None else align, cut=("footer",)
        )
        card.report += [{"role": "footer", "size": round(column.pieces[0]["size"], 1), "lines": column.pieces[0]["lines"]}] if column.pieces else []
        if column.cut:
            card.warnings.append("footer does not fit even at its smallest size and was cut with an ellipsis")
        if column.missing:
            card.warnings.append(f"no font has these characters, they were left out: {', '.join(column.missing[:20])}")
    used = max(mark.height if mark else 0, round(column.height) if column else 0)
    middle = bottom - used / 2
    if mark is not None:
        lone = column is None
        at = left + (width - mark.width) // 2 if lone and align == "center" else left + width - mark.width if card.rtl else left
        card.canvas.paste(mark, (at, round(middle - mark.height / 2)), mark.getchannel("A"))
    if column is not None:
        shift = 0 if mark is None or card.rtl else mark.width + card.px(24)
        _lay(card, column, left + shift, middle - column.height / 2)
    return used + card.px(34)


def _align(card: _Card, usual: str) -> str:
    return usual if card.params.align == "auto" else card.params.align


# Layouts -------------------------------------------------------------------------------------------------------------


def _margins(card: _Card) -> tuple[int, int]:
    """Side and top margins; on stories the top and foot stay clear of what apps lay over them."""
    side = card.px(74)
    return side, round(card.height * 0.085) if card.height / card.width > 1.6 else side


def _hero(card: _Card, logo: Image.Image | None) -> float:
    """A framed picture above (beside, on wide cards) the words."""
    side, end = _margins(card)
    if card.width / card.height >= 1.2:
        return _beside(card, logo, framed=True)
    align = _align(card, "center")
    width = card.width - 2 * side
    bottom = card.height - end
    bottom -= _foot(card, logo, side, width, bottom, align)
    space = bottom - end
    gap = card.px(52)
    # The picture keeps at least half of the card, unless the words need the room at their smallest.
    column = _set(card, _pieces(card, headline=70, least=40, body=30, lines=3, bar=False), width, round(space * 0.47), align, round(space * 0.62))
    room = space - gap - column.height
    tall = min(room, width * 1.05) if card.thing else room
    if card.thing:
        tall = min(tall, space * 0.62)
    top = end + max(0.0, (room - tall) / 2)
    box = (side, round(top), side + width, round(top + tall))
    _framed(card, box, card.px(38), shadow=not card.thing or card.params.theme != "light")
    _lay(card, column, side, top + tall + gap)
    return contrast(card.colours.text, card.colours.background)


def _beside(card: _Card, logo: Image.Image | None, *, framed: bool) -> float:
    """Words on one side, the picture on the other; in right-to-left scripts they change places."""
    side, end = _margins(card)
    align = _align(card, "start")
    share = 0.44 if card.width / card.height < 2.2 else 0.38
    panel = round(card.width * share)
    left = side if not card.rtl else panel + side
    width = card.width - panel - 2 * side
    bottom = card.height - end
    foot = _foot(card, logo, left, width, bottom, align)
    space = card.height - 2 * end - foot
    column = _set(card, _pieces(card, headline=86, least=38, body=34, lines=4, bar=True), width, space, align)
    # Optically centred: a little above the middle.
    _lay(card, column, left, end + (space - column.height) * (0.46 if foot == 0 else 0.5))
    edge = 0 if card.rtl else card.width - panel
    if framed:
        inset = round(end * 0.72)
        box = (edge + (inset if card.rtl else 0), inset, edge + panel - (0 if card.rtl else inset), card.height - inset)
        _framed(card, box, card.px(38), shadow=not card.thing)
    else:
        _framed(card, (edge, 0, edge + panel, card.height), 0, shadow=False)
    return contrast(card.colours.text, card.colours.background)


def _split(card: _Card, logo: Image.Image | None) -> float:
    """Half picture, half words, edge to edge."""
    if card.width / card.height >= 1.2:
        return _beside(card, logo, framed=False)
    side, end = _margins(card)
    align = _align(card, "start")
    width = card.width - 2 * side
    bottom = card.height - end
    bottom -= _foot(card, logo, side, width, bottom, align)
    gap = card.px(56)
    most = bottom - gap - card.height * 0.36
    column = _set(card, _pieces(card, headline=78, least=40, body=32, lines=3, bar=True), width, round(most), align)
    cut = min(bottom - gap - column.height, card.height * 0.62)
    _framed(card, (0, 0, card.width, round(cut)), 0, shadow=False)
    _lay(card, column, side, cut + gap + max(0.0, (bottom - gap - cut - column.height) * 0.35))
    return contrast(card.colours.text, card.colours.background)


def _overlay(card: _Card, logo: Image.Image | None) -> float:
    """The picture fills the card; words stand on it, over a veil just as dark as they need."""
    side, end = _margins(card)
    align = _align(card, "start")
    ground = _mesh(card.width, card.height, card.colours.accent, True) if card.picture is None else _cover(card.picture, card.width, card.height)
    if ground.mode == "RGBA":
        base = _gradient(card.width, card.height, card.colours.glow, card.colours.panel)
        base.paste(ground, (0, 0), ground.getchannel("A"))
        ground = base
    hue = to_oklch(card.colours.accent)[2]
    veil: RGB = from_oklch(0.16, 0.03, hue)
    text: RGB = parse_colour(card.params.text) if card.params.text else (255, 255, 255)
    if luminance(np.array(text)) < 0.3:
        veil = from_oklch(0.97, 0.012, hue)
    soft: RGB = tuple(round(t * 0.88 + v * 0.12) for t, v in zip(text, veil, strict=True))  # type: ignore[assignment]
    lightness = to_oklch(card.colours.accent)[0]
    accent = from_oklch(max(lightness, 0.86) if luminance(np.array(veil)) < 0.3 else min(lightness, 0.4), 0.1, hue)
    tint = Palette(veil, veil, veil, text, soft, parse_colour(card.params.accent) if card.params.accent else accent, veil)
    wide = card.width / card.height >= 1.2
    width = round((card.width - 2 * side) * (0.62 if wide else 1))
    left = side if not (wide and card.rtl) else card.width - side - width
    card.canvas = ground
    holder = _Card(**{**card.__dict__, "canvas": Image.new("RGB", card.canvas.size)})
    foot = _foot(holder, logo, left, width, card.height - end, align, tint)
    del card.report[len(card.report) - (1 if card.texts["footer"] and card.report else 0):]
    space = card.height - 2 * end - foot
    column = _set(card, _pieces(card, headline=84, least=40, body=33, lines=4, bar=False, colours=tint), width, round(space * 0.8), align)
    top = card.height - end - foot - column.height
    box = (left, round(top), left + width, card.height - end)

    # The veil deepens until 97 of 100 pixels behind the words give body text enough contrast.
    y = np.arange(card.height, dtype=np.float32)[:, None]
    start, full = top - card.height * 0.26, top - card.height * 0.01
    ramp = np.clip((y - start) / max(1.0, full - start), 0, 1)
    ramp = ramp * ramp * (3 - 2 * ramp)
    pixels = np.asarray(ground, np.float32)
    sample = pixels[box[1] : box[3] : 3, box[0] : box[2] : 3]
    ratio, strength = 0.0, 0.45
    for strength in (0.45, 0.55, 0.65, 0.72, 0.79, 0.85, 0.9, 0.94, 0.97, 1.0):
        behind = luminance(sample + (np.array(veil, np.float32) - sample) * (ramp[box[1]:box[3]:3] * strength)[..., None])
        one = float(luminance(np.array(soft)))
        ratios = (np.maximum(behind, one) + 0.05) / (np.minimum(behind, one) + 0.05)
        ratio = float(np.percentile(ratios, 3))
        if ratio >= 4.6:
            break
    card.canvas = _dithered(pixels + (np.array(veil, np.float32) - pixels) * (ramp * strength)[..., None])
    _foot(card, logo, left, width, card.height - end, align, tint)
    _lay(card, column, left, top)
    if ratio < 4.5:
        raise InputError(
            f"text {to_hex(text)} reads at {ratio:.2f} to 1 on the picture even under a full veil; allowed is 4.5 or more",
            code="low_contrast", param="text",
        )  # fmt: skip
    return ratio


def _minimal(card: _Card, logo: Image.Image | None) -> float:
    """Type first: a large headline with air around it, a small picture beside or above."""
    side, end = _margins(card)
    side, end = round(side * 1.15), round(end * 1.15)
    align = _align(card, "start")
    wide = card.width / card.height >= 1.2
    width = card.width - 2 * side
    bottom = card.height - end
    foot = _foot(card, logo, side, width, bottom, align)
    thumb = 0
    if card.picture is not None:
        thumb = card.px(230) if not wide else card.px(400)
    text_width = width - (thumb + side if wide and thumb else 0)
    space = card.height - 2 * end - foot - (0 if wide else thumb + (card.px(44) if thumb else 0))
    pieces = _pieces(card, headline=108, least=42, body=35, lines=5, bar=True)
    column = _set(card, pieces, text_width, space, align)
    left = side if not (wide and thumb and card.rtl) else side + thumb + side
    if wide:
        top = end + (space - column.height) * 0.46
    else:
        # Picture at the head, words at the foot: the air between them is the design.
        top = card.height - end - foot - column.height if card.picture is not None or foot else end + (space - column.height) * 0.44
        if card.picture is None:
            top = end + (space - column.height) * 0.44
    _lay(card, column, left, top)
    if thumb:
        if wide:
            at = (card.width - side - thumb if not card.rtl else side, round(end + (space - thumb) * 0.46))
        elif align == "center":
            at = ((card.width - thumb) // 2, end)
        else:
            at = (side if not card.rtl else card.width - side - thumb, end)
        box = (at[0], at[1], at[0] + thumb, at[1] + thumb)
        if card.thing:
            _place_thing(card, box, fill=0.72, disc=True)
        else:
            _framed(card, box, thumb / 2, shadow=False)
    return contrast(card.colours.text, card.colours.background)


def _poster(card: _Card, logo: Image.Image | None) -> float:
    """Large type at the head on strong colour, the picture large below."""
    side, end = _margins(card)
    if card.width / card.height >= 1.2:
        return _beside(card, logo, framed=not card.thing)
    align = _align(card, "start")
    width = card.width - 2 * side
    bottom = card.height - end
    narrow = round(width * 0.36) if card.thing else width
    foot = _foot(card, logo, side if not card.rtl else side + width - narrow, narrow, bottom, "start" if card.thing else align)
    space = card.height - 2 * end - (0 if card.thing else foot)
    column = _set(card, _pieces(card, headline=100, least=44, body=32, lines=4, bar=False), width, round(space * 0.55), align, round(space * 0.7))
    top = round(end + column.height + card.px(44))
    if card.thing and card.picture is not None:
        # The thing stands large towards the far corner, on a disc that runs off the card where the footer leaves room.
        floor = card.height + round(end * 0.6)
        disc = min(floor - top, round(card.width * 0.84))
        if foot and disc > card.width - side - narrow:
            floor = card.height - end - foot
            disc = min(floor - top, round(card.width * 0.84))
        if disc > card.px(80):
            at = card.width - round(disc * 0.9) if not card.rtl else -round(disc * 0.1), floor - disc
            card.canvas.paste(_gradient(disc, disc, card.colours.glow, card.colours.panel), at, _round_mask(disc, disc, disc / 2))
            inset = round(disc * 0.12)
            right = min(at[0] + disc - inset, card.width - round(side * 0.4))
            left = max(at[0] + inset, round(side * 0.4))
            _place_thing(card, (left, at[1] + inset, right, min(at[1] + disc - inset, card.height - round(end * 0.4))), fill=1.0)
    else:
        _framed(card, (side, top, side + width, card.height - end - foot), card.px(30), shadow=True)
    _lay(card, column, side, end)
    return contrast(card.colours.text, card.colours.background)



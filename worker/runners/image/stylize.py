"""Runner of ``image.stylize``."""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from contentfactory.errors import FactoryError
from contentfactory.jobs.image import ImageStylize
from worker.context import Failure, JobContext, Output, Yield
from worker.engines.files import ResolvedModel
from worker.engines.style import MIN_SIDE, Stylizer, load_stylizer
from worker.engines.upscale import spread_colour
from worker.media.image import MEDIA_TYPES, SUFFIXES, encode, open_image
from worker.runners import runs

DEFAULT_STYLE = "impressionist"


def get_stylizer(context: JobContext, model: ResolvedModel | None = None) -> Stylizer:
    """The loaded networks; the same ones for every runner that asks."""

    def load(chosen: ResolvedModel) -> Stylizer:
        return load_stylizer(chosen, context.device)

    return context.load(load, model)


@runs(ImageStylize)
def stylize(params: list[ImageStylize], context: JobContext) -> Iterator[Yield]:
    """Repaint one picture after the other."""
    engine = get_stylizer(context)
    for job, one in enumerate(params):
        try:
            context.check(job)
            context.progress(job, 0.0)
            picture = open_image(context.fetch(job, one.image), min_side=MIN_SIDE, field="image")
            like = None
            if one.style_image is not None:
                like = open_image(context.fetch(job, one.style_image), min_side=MIN_SIDE, mode="RGB", field="style_image")
            result = repaint(engine, picture, one, like)
        except FactoryError as error:
            yield Failure(job, error)
            continue
        style = "image" if like is not None else one.style or DEFAULT_STYLE
        meta = {"width": result.width, "height": result.height, "style": style, "strength": one.strength}
        yield Output(
            job, f"image{SUFFIXES[one.format]}", MEDIA_TYPES[one.format],
            lambda result=result, one=one: encode(result, one.format, quality=one.quality), meta,
        )  # fmt: skip


def repaint(engine: Stylizer, picture: Image.Image, params: ImageStylize, like: Image.Image | None = None) -> Image.Image:
    """Repaint a picture, transparency kept.

    Args:
        engine: The networks.
        picture: ``RGB`` or ``RGBA``.
        params: Style, strength, largest side.
        like: Picture whose style is taken instead of a named one.
    """
    scale = params.max_side / max(picture.size)
    if scale < 1:
        size = tuple(max(MIN_SIDE, round(side * scale)) for side in picture.size)
        if picture.mode == "RGBA":
            picture = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
        else:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
    alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
    pixels = np.asarray(picture.convert("RGBA" if alpha else "RGB"))
    if alpha is not None:
        values = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        filled = spread_colour(values[:3], values[3:])
        pixels = (filled * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    if like is not None:
        made = engine.stylize_like(pixels, engine.style_vector(like), params.strength)
    else:
        made = engine.stylize(pixels, params.style or engine_default(engine), params.strength)
    result = Image.fromarray(made)
    if params.keep_colours:
        light = result.convert("YCbCr").getchannel(0)
        _, blue, red = Image.fromarray(np.ascontiguousarray(pixels)).convert("YCbCr").split()
        result = Image.merge("YCbCr", (light, blue, red)).convert("RGB")
    if alpha is not None:
        result.putalpha(alpha)
    return result


def engine_default(engine: Stylizer) -> str:
    """The style that is taken where none is named."""
    return DEFAULT_STYLE if DEFAULT_STYLE in engine.styles else engine.styles[0]

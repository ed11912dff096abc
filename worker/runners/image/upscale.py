"""Runner of ``image.upscale``."""

from collections.abc import Iterator

from contentfactory.errors import FactoryError, InputError
from contentfactory.jobs.image import ImageUpscale
from worker.context import Failure, JobContext, Output, Yield
from worker.engines.files import ResolvedModel
from worker.engines.upscale import Upscaler, load_upscaler
from worker.media.image import MEDIA_TYPES, SUFFIXES, encode, open_image
from worker.runners import runs


def get_upscaler(context: JobContext, model: ResolvedModel | None = None) -> Upscaler:
    """The loaded upscaler; the same one for every runner that asks.

    Args:
        context: Of the micro-batch.
        model: Which one; the params' one where left out.
    """

    def load(chosen: ResolvedModel) -> Upscaler:
        return load_upscaler(chosen, context.device)

    return context.load(load, model)


@runs(ImageUpscale)
def upscale(params: list[ImageUpscale], context: JobContext) -> Iterator[Yield]:
    """Enlarge one picture after the other, tile by tile."""
    engine = get_upscaler(context)
    for job, one in enumerate(params):

        def step(fraction: float, job: int = job) -> None:
            context.check(job)
            context.progress(job, fraction)

        try:
            step(0.0)
            most = one.max_pixels // one.scale**2
            picture = open_image(context.fetch(job, one.image), field="image")
            width, height = picture.width * one.scale, picture.height * one.scale
            if picture.width * picture.height > most:
                raise InputError(
                    f"image: {picture.width}×{picture.height} pixels times {one.scale} make {width * height:,} pixels; "
                    f"allowed are {one.max_pixels:,} (max_pixels)",
                    code="image_too_large", param="image",
                )  # fmt: skip
            large = engine.upscale(picture, one.scale, step)
        except FactoryError as error:
            yield Failure(job, error)
            continue
        meta = {"width": width, "height": height, "scale": one.scale, "from": [picture.width, picture.height]}
        yield Output(
            job, f"image{SUFFIXES[one.format]}", MEDIA_TYPES[one.format],
            lambda large=large, one=one: encode(large, one.format, quality=one.quality), meta,
        )  # fmt: skip

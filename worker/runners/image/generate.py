"""Runner of ``image.generate``."""

from collections.abc import Iterator

from PIL import Image

from contentfactory.errors import FactoryError, InputError, JobCancelled, PolicyError
from contentfactory.jobs.image import ImageGenerate
from worker.context import Failure, JobContext, Output, Yield
from worker.engines.diffusion import (
    PROMPT_CHARACTERS,
    DiffusersPainter,
    FlowPainter,
    Request,
    Stopped,
    load_painter,
)
from worker.engines.encoder import Encoder, load_encoder
from worker.engines.files import ResolvedModel
from worker.media.image import MEDIA_TYPES, SUFFIXES, encode, flatten
from worker.runners import runs
from worker.runners.image.upscale import get_upscaler

ENCODER = "all-minilm-l6-v2"
UPSCALER = "span"
NETWORK_PIXELS = 192 * 192
"""Largest picture that ``upscale=auto`` gives to the upscaling network on a processor; beyond it would take seconds."""

LANCZOS = Image.Resampling.LANCZOS


def get_encoder(context: JobContext, name: str = ENCODER) -> Encoder:
    """The loaded encoder of sentence vectors."""

    def load(chosen: ResolvedModel) -> Encoder:
        return load_encoder(chosen, context.device)

    return context.load(load, context.resolve_model(name))


def get_painter(context: JobContext) -> FlowPainter | DiffusersPainter:
    """The loaded text-to-image model of the micro-batch."""

    def load(chosen: ResolvedModel) -> FlowPainter | DiffusersPainter:
        return load_painter(chosen, lambda: get_encoder(context, str(chosen.options.get("encoder", ENCODER))), context.device)

    return context.load(load)


@runs(ImageGenerate)
def generate(params: list[ImageGenerate], context: JobContext) -> Iterator[Yield]:
    """Make the micro-batch's pictures together, then bring each to its size."""
    painter = get_painter(context)
    first = params[0]
    jobs: list[int] = []
    for job, one in enumerate(params):
        prompt = str(one.prompt).strip()
        if not prompt or len(prompt) > PROMPT_CHARACTERS:
            yield Failure(job, InputError(
                f"prompt has {len(prompt):,} characters; allowed are 1 to {PROMPT_CHARACTERS:,}", param="prompt",
            ))  # fmt: skip
        elif context.cancelled(job):
            yield Failure(job, JobCancelled("the job was cancelled before it began"))
        else:
            jobs.append(job)
    if not jobs:
        return
    try:
        _adapt(painter, first, context)
    except FactoryError as error:
        for job in jobs:
            yield Failure(job, error)
        return
    steps, guidance = first.steps or painter.steps, painter.guidance if first.guidance is None else first.guidance
    width, height = first.pixels
    own_width, own_height = painter.native(width, height)
    requests = [Request(str(params[job].prompt).strip(), (params[job].negative_prompt or "").strip(), context.generator(job)) for job in jobs]

    def on_step(fraction: float) -> bool:
        alive = context.active(jobs)
        for job in alive:
            context.progress(job, 0.05 + 0.75 * fraction)
        return bool(alive)

    done: set[int] = set()
    try:
        for row, picture in painter.paint(requests, own_width, own_height, steps, guidance, on_step):
            job = jobs[row]
            done.add(job)
            try:
                context.check(job)
                if picture.info.get("refused"):
                    raise PolicyError("the model's own safety checker refused the picture")
                finished, how = _resize(picture, params[job], context, job)
            except FactoryError as error:
                yield Failure(job, error)
                continue
            yield _output(job, params[job], finished, {
                "seed": context.seeds[job], "steps": steps, "guidance": guidance, "native": [own_width, own_height], "enlarged": how,
            })  # fmt: skip
    except Stopped:
        pass
    except FactoryError as error:
        for job in jobs:
            if job not in done:
                done.add(job)
                yield Failure(job, error)
    for job in jobs:
        if job not in done:
            yield Failure(job, JobCancelled("the job was cancelled while it ran"))


def _adapt(painter: FlowPainter | DiffusersPainter, params: ImageGenerate, context: JobContext) -> None:
    if isinstance(painter, DiffusersPainter):
        found = []
        for adapter in params.adapters:
            model = context.resolve_model(adapter.model)
            file = model.files.get("weights") or next(iter(sorted(model.files.get("folder", model.folder).glob("*.safetensors"))), None)
            if file is None:
                raise InputError(f"adapter {adapter.model}: no safetensors file is registered for it", param="adapters")
            found.append((model.name, file, adapter.weight))
        painter.use_adapters(found)
    elif params.adapters:
        raise InputError("adapters fit diffusers models only; leave them out or name such a model", param="adapters")


def _resize(picture: Image.Image, params: ImageGenerate, context: JobContext, job: int) -> tuple[Image.Image, str]:
    """Bring a picture to the wished size, enlarged by the network where that is wanted; says how."""
    width, height = params.pixels
    how = "none"
    if params.upscale != "lanczos":
        small = NETWORK_PIXELS if context.device == "cpu" else 1024 * 1024
        for _ in range(2):
            # A square picture stands whole inside a wide frame, so the shorter side counts.
            ratio = min(width / picture.width, height / picture.height)
            if ratio <= 1.05 or (params.upscale == "auto" and picture.width * picture.height > small):
                break
            engine = get_upscaler(context, context.resolve_model(UPSCALER))

            def step(fraction: float) -> None:
                context.check(job)
                context.progress(job, 0.8 + 0.15 * fraction)

            picture = engine.upscale(picture, 2 if ratio <= 2.05 else 4, step, smooth_outline=True)
            how = "network"
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    if size != picture.size:
        how = "lanczos" if how == "none" and scale > 1 else how
        if picture.mode == "RGBA":
            picture = picture.convert("RGBa").resize(size, LANCZOS).convert("RGBA")
        else:
            picture = picture.resize(size, LANCZOS)
    if size != (width, height):
        if picture.mode == "RGB":
            # A scene fills the frame; only a thing on transparent ground may stand in the middle of it.
            scale = max(width / picture.width, height / picture.height)
            box = ((picture.width - width / scale) / 2, (picture.height - height / scale) / 2)
            picture = picture.resize((width, height), LANCZOS, box=(*box, picture.width - box[0], picture.height - box[1]))
        else:
            frame = Image.new("RGBA", (width, height))
            frame.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
            picture = frame
    return picture, how


def _output(job: int, params: ImageGenerate, picture: Image.Image, meta: dict[str, object]) -> Output:
    ground = {"transparent": "#ffffff", "white": "#ffffff"}.get(params.background, params.background)
    if params.background != "transparent" or params.format == "jpeg":
        picture = flatten(picture, ground)
    meta = {"width": picture.width, "height": picture.height, "transparent": picture.mode == "RGBA", **meta}
    return Output(
        job, f"image{SUFFIXES[params.format]}", MEDIA_TYPES[params.format],
        lambda: encode(picture, params.format, quality=params.quality), meta,
    )  # fmt: skip

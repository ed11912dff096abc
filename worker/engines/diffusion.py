"""Text to image: the factory's own flow, and diffusers pipelines of the user's.

Both are used alike: `Painter.paint` takes prompts with a generator each and yields pictures. What a picture looks like
depends on its prompt and its generator; the own flow keeps that to the last bit, a diffusers pipeline as far as the
device's matrix library does.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from contentfactory.errors import InputError, ModelUnavailable
from worker.engines.encoder import Encoder, normalise
from worker.engines.files import ResolvedModel
from worker.engines.options import InferenceOptions, autocast, prepare
from worker.networks import flow

PROMPT_CHARACTERS = 2000


@dataclass(frozen=True)
class Request:
    """One picture to make.

    Args:
        prompt: What it shows.
        negative: What it should not show; empty for nothing.
        generator: A CPU generator with the job's seed.
    """

    prompt: str
    negative: str
    generator: torch.Generator


class Stopped(Exception):
    """Every picture of the batch was given up."""


class Painter(Protocol):
    """What makes pictures."""

    steps: int
    guidance: float

    def native(self, width: int, height: int) -> tuple[int, int]:
        """The size that it paints for a wished size, pixels."""
        ...

    def paint(
        self, requests: Sequence[Request], width: int, height: int, steps: int, guidance: float,
        on_step: Callable[[float], bool],
    ) -> Iterator[tuple[int, Image.Image]]:  # fmt: skip
        """Make pictures of a native size; ``on_step`` gets the share done and says whether to go on."""
        ...


class FlowPainter:
    """The factory's own flow over sentence vectors."""

    def __init__(self, net: flow.TextToImage, encoder: Encoder, steps: int, guidance: float) -> None:
        self.net = net
        self.encoder = encoder
        self.steps = steps
        self.guidance = guidance

    def native(self, width: int, height: int) -> tuple[int, int]:
        """The network's own square."""
        side = self.net.config.resolution
        return side, side

    def vectors(self, requests: Sequence[Request]) -> torch.Tensor:
        """Sentence vectors of length 1; a negative prompt pushes away from its meaning."""
        texts = [request.prompt for request in requests] + [request.negative for request in requests if request.negative]
        found = dict(self.encoder.embed([self.encoder.encode(text, truncate=True) for text in texts]))
        vectors = torch.from_numpy(normalise([found[n] for n in range(len(texts))]))  # type: ignore[arg-type]
        positive, negative = vectors[: len(requests)].clone(), iter(vectors[len(requests) :])
        for row, request in enumerate(requests):
            if request.negative:
                away = positive[row] - 0.35 * next(negative)
                positive[row] = away / away.norm().clamp_min(1e-6)
        return positive

    def paint(
        self, requests: Sequence[Request], width: int, height: int, steps: int, guidance: float,
        on_step: Callable[[float], bool],
    ) -> Iterator[tuple[int, Image.Image]]:  # fmt: skip
        """Make ``RGBA`` pictures, `flow.LANES` at a time."""
        vectors = self.vectors(requests)
        for start in range(0, len(requests), flow.LANES):
            if not on_step(start / len(requests)):
                raise Stopped
            chunk = requests[start : start + flow.LANES]
            pictures = flow.sample(
                self.net, vectors[start : start + flow.LANES], generators=[r.generator for r in chunk], steps=steps, guidance=guidance
            )
            for row, picture in enumerate(pictures):
                array = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
                yield start + row, Image.fromarray(array, "RGBA")


class DiffusersPainter:
    """A user's own text-to-image pipeline."""

    def __init__(self, pipeline: Any, steps: int, guidance: float, batch: int) -> None:
        self.pipeline = pipeline
        self.steps = steps
        self.guidance = guidance
        self.batch = batch
        self._takes = set(inspect.signature(pipeline.__call__).parameters)
        self._adapters: tuple[tuple[str, float], ...] = ()

    @property
    def _grain(self) -> int:
        """Sizes are multiples of this, pixels: two latent cells, since transformers take them in patches."""
        return max(8, 2 * self._cell)

    @property
    def _cell(self) -> int:
        """Pixels of one latent cell."""
        return int(getattr(self.pipeline, "vae_scale_factor", 8) or 8)

    def native(self, width: int, height: int) -> tuple[int, int]:
        """A size near the pipeline's own area, of the wished shape."""
        core = getattr(self.pipeline, "unet", None) or getattr(self.pipeline, "transformer", None)
        sample = getattr(getattr(core, "config", None), "sample_size", None)
        sample = sample[0] if isinstance(sample, list | tuple) else sample
        grain = self._grain
        side = int(sample or 64) * self._cell
        # Up to a quarter more than a model has learnt does no harm and spares the upscaler.
        scale = min(1.0, (side * 1.25) / max(width, height))
        return tuple(max(grain, round(length * scale / grain) * grain) for length in (width, height))  # type: ignore[return-value]

    def use_adapters(self, adapters: Sequence[tuple[str, Path, float]]) -> None:
        """Put LoRA adapters on the pipeline.

        Args:
            adapters: Name, safetensors file and weight of each; none takes all off.

        Raises:
            InputError: If one does not fit the pipeline.
        """
        wanted = tuple((name, weight) for name, _, weight in adapters)
        if wanted == self._adapters:
            return
        if not hasattr(self.pipeline, "load_lora_weights"):
            raise InputError("this pipeline takes no LoRA adapters; leave adapters out", param="adapters")
        try:
            self.pipeline.unload_lora_weights()
            self._adapters = ()
            for name, file, _ in adapters:
                if file.suffix != ".safetensors":
                    raise InputError(f"adapter {name}: {file.name} is no safetensors file", param="adapters")
                self.pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=_adapter_name(name))
            if adapters:
                self.pipeline.set_adapters([_adapter_name(name) for name, _, _ in adapters], [weight for *_, weight in adapters])
        except (ValueError, KeyError, OSError, ImportError) as error:
            raise InputError(f"adapters do not fit this model: {str(error)[:300]}", param="adapters") from error
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise InputError(f"adapters do not fit this model: {str(error)[:300]}", param="adapters") from error
        self._adapters = wanted

    def paint(
        self, requests: Sequence[Request], width: int, height: int, steps: int, guidance: float,
        on_step: Callable[[float], bool],
    ) -> Iterator[tuple[int, Image.Image]]:  # fmt: skip
        """Make ``RGB`` pictures, ``batch`` at a time."""
        for start in range(0, len(requests), self.batch):
            chunk = requests[start : start + self.batch]
            stopped = False

            def after(pipeline: Any, step: int, time: Any, values: dict[str, Any], start: int = start, size: int = len(chunk)) -> dict[str, Any]:
                nonlocal stopped
                done = (start + size * (step + 1) / steps) / len(requests)
                if not on_step(min(done, 1.0)):
                    stopped = True
                    pipeline._interrupt = True
                return values

            call: dict[str, Any] = {
                "prompt": [request.prompt for request in chunk], "width": width, "height": height, "num_inference_steps": steps,
                "generator": [request.generator for request in chunk], "output_type": "pil",
            }  # fmt: skip
            if "guidance_scale" in self._takes:
                call["guidance_scale"] = guidance
            if "negative_prompt" in self._takes and any(request.negative for request in chunk):
                call["negative_prompt"] = [request.negative for request in chunk]
            elif any(request.negative for request in chunk):
                raise InputError("this model takes no negative_prompt; leave it out", param="negative_prompt")
            if "callback_on_step_end" in self._takes:
                call["callback_on_step_end"] = after
            if not on_step(start / len(requests)):
                raise Stopped
            try:
                with torch.inference_mode():
                    made = self.pipeline(**call)
            except (ValueError, TypeError) as error:
                raise InputError(f"the model does not take these params: {str(error)[:300]}") from error
            if stopped:
                raise Stopped
            flagged = getattr(made, "nsfw_content_detected", None) or [False] * len(chunk)
            for row, (picture, refused) in enumerate(zip(made.images, flagged, strict=True)):
                if refused:
                    picture.info["refused"] = True
                yield start + row, picture


def _adapter_name(name: str) -> str:
    # peft takes adapter names as module names, which may hold no dots.
    return "".join(char if char.isalnum() else "_" for char in name)


def load_painter(model: ResolvedModel, encoder: Callable[[], Encoder], device: str = "cpu") -> FlowPainter | DiffusersPainter:
    """Load a text-to-image model.

    Args:
        model: Engine ``flow``: ``files['weights']`` (safetensors), optionally ``files['config']`` (JSON with ``steps`` and
            ``guidance``). Engine ``diffusers``: ``files['folder']`` or ``options['source']`` (a local folder or a Hugging
            Face name; safetensors only). ``options``: ``steps``, ``guidance``, ``batch`` (pictures in one forward pass),
            ``dtype``, ``revision``, ``variant``.
        encoder: Gives the encoder of sentence vectors, for the flow.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ModelUnavailable: If it cannot be loaded; the message says why.
    """
    if model.engine == "flow":
        return _load_flow(model, encoder(), device)
    if model.engine == "diffusers":
        return _load_diffusers(model, device)
    raise ModelUnavailable(f"model {model.name}: engine {model.engine!r} makes no pictures; allowed: flow, diffusers")


def _load_flow(model: ResolvedModel, encoder: Encoder, device: str) -> FlowPainter:
    weights = model.files.get("weights")
    if weights is None:
        raise ModelUnavailable(f"model {model.name}: no weights file is registered for it")
    settings: dict[str, Any] = {}
    if "config" in model.files:
        try:
            found = json.loads(model.files["config"].read_text(encoding="utf-8"))
            found = found.get("defaults", found)
            defaults = found.get("defaults", found)
            settings = {key: defaults[key] for key in ("steps", "guidance") if isinstance(defaults.get(key), int | float)}
        except (OSError, ValueError, AttributeError) as error:
            raise ModelUnavailable(f"model {model.name}: its config cannot be read: {error}") from error
    settings |= {key: model.options[key] for key in ("steps", "guidance") if key in model.options}
    try:
        net = flow.load(weights)
    except flow.ModelFormatError as error:
        raise ModelUnavailable(f"model {model.name}: {error}") from error
    if net.config.text_width != encoder.dimensions:
        raise ModelUnavailable(
            f"model {model.name}: it takes sentence vectors of {net.config.text_width} numbers, {encoder.name} gives {encoder.dimensions}"
        )
    options = InferenceOptions.of(model, device)
    net = net.to(device)
    for part in ("flow", "decoder"):
        setattr(net, part, prepare(autocast(getattr(net, part), options.dtype, device), replace(options, channels_last=False)))
    return FlowPainter(net, encoder, int(settings.get("steps", 30)), float(settings.get("guidance", 3.0)))


def _load_diffusers(model: ResolvedModel, device: str) -> DiffusersPainter:
    import diffusers

    from worker.engines.language import find_source, first_line, pick_dtype

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    more = {key: str(model.options[key]) for key in ("revision", "variant") if model.options.get(key)}
    try:
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
            find_source(model), dtype=pick_dtype(model, device), use_safetensors=True, trust_remote_code=False, **more
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ModelUnavailable(f"model {model.name}: no text-to-image pipeline can be loaded: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    options = InferenceOptions.of(model, device)
    pipeline = pipeline.to(device)
    for part in ("unet", "transformer"):
        if getattr(pipeline, part, None) is not None:
            setattr(pipeline, part, prepare(getattr(pipeline, part), options))
    if hasattr(pipeline, "enable_vae_slicing"):
        # Decoding one picture at a time keeps memory flat and pictures independent of each other.
        vae = getattr(pipeline, "vae", None)
        (vae.enable_slicing if hasattr(vae, "enable_slicing") else pipeline.enable_vae_slicing)()
    return DiffusersPainter(
        pipeline, int(model.options.get("steps", 30)), float(model.options.get("guidance", 5.0)),
        max(1, int(model.options.get("batch", 4 if device.startswith("cuda") else 1))),
    )  # fmt: skip

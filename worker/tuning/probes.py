"""One probe an engine family: a fixed piece of work whose speed and result can be compared between options."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contentfactory.errors import ModelUnavailable
from worker.engines.files import ResolvedModel

Outputs = dict[str, NDArray[Any]]

TEXTS = (
    "The lamp is made of recycled glass and stands on a foot of oak.",
    "A light rain jacket with two pockets, for walks in spring and autumn.",
    "Our coffee is roasted in small lots and shipped on the same day.",
    "This backpack holds a laptop of fifteen inches and a day's clothes.",
    "The blue teapot keeps warm for an hour and pours without a drop.",
    "A wooden train with three cars, painted by hand in bright colours.",
    "These running shoes weigh little and hold the heel firmly in place.",
    "The table lamp has three steps of brightness and a switch in the cord.",
)


@dataclass
class Probe:
    """Work to measure.

    Args:
        unit: What one piece of work is counted in.
        run: Does a batch of so many items; returns the units of work done.
        result: Makes the result by which options are compared.
        batches: Sizes of batch to measure.
    """

    unit: str
    run: Callable[[int], float]
    result: Callable[[], Outputs]
    batches: tuple[int, ...]


def open_probe(model: ResolvedModel, device: str, most: int, helper: Callable[[str], ResolvedModel]) -> Probe:
    """Load the model and make its probe.

    Args:
        model: The version with the options to measure.
        device: ``cpu`` or ``cuda``.
        most: Largest batch to measure.
        helper: Finds another model by name (the flow's encoder, a voice for a recogniser to listen to).

    Raises:
        ModelUnavailable: If the engine has no probe, or the model does not load.
    """
    makers = {
        "language": _language, "encoder": _encoder, "flow": _painter, "diffusers": _painter, "span": _upscaler, "style": _stylizer,
        "faster-whisper": _recogniser, "transformers-whisper": _recogniser, "hibari": _voice, "transformers-tts": _voice,
    }  # fmt: skip
    if model.engine not in makers:
        raise ModelUnavailable(f"model {model.name}: nothing can be tuned on the engine {model.engine}")
    return makers[model.engine](model, device, most, helper)


def _sizes(most: int, largest: int = 32) -> tuple[int, ...]:
    sizes = [1]
    while sizes[-1] * 2 <= min(most, largest):
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)


def _language(model: ResolvedModel, device: str, most: int, helper: Any) -> Probe:
    from worker.engines.language import Request, load_language

    loaded = load_language(model, device)
    prompts = [loaded.encode(text, special=True) for text in TEXTS]

    def run(batch: int) -> float:
        requests = [Request(prompts[n % len(prompts)], 16) for n in range(batch)]
        return float(sum(len(done.tokens) for _, done in loaded.generate(requests)))

    def result() -> Outputs:
        if not hasattr(loaded, "_run"):  # another engine: its own likelihoods are not to be had one by one
            done = dict(loaded.generate([Request(p, 16) for p in prompts]))
            return {"tokens": np.array([t for n in sorted(done) for t in done[n].tokens])}
        import torch

        tokens, likelihoods = [], []
        with torch.inference_mode():
            for prompt in prompts[:4]:
                row, logits = loaded._run.read(prompt[:1], len(prompt))
                for place, token in enumerate(prompt[1:]):
                    plain = logits.float()
                    tokens.append(int(plain.argmax()))
                    likelihoods.append(float(plain[token] - plain.logsumexp(0)))
                    if place + 2 < len(prompt):
                        logits = loaded._run.write([row], [token])[0]
        return {"tokens": np.array(tokens), "likelihoods": np.array(likelihoods)}

    return Probe("tokens", run, result, _sizes(most, 16))


def _encoder(model: ResolvedModel, device: str, most: int, helper: Any) -> Probe:
    from worker.engines.encoder import load_encoder

    loaded = load_encoder(model, device)
    texts = [loaded.encode(text) for text in TEXTS]

    def run(batch: int) -> float:
        return float(len(list(loaded.embed([texts[n % len(texts)] for n in range(batch)]))))

    def result() -> Outputs:
        found = dict(loaded.embed(texts))
        return {"vectors": np.stack([found[n] for n in sorted(found)])}

    return Probe("texts", run, result, _sizes(most, 64))


def _painter(model: ResolvedModel, device: str, most: int, helper: Any) -> Probe:
    import torch

    from worker.engines.diffusion import Request, load_painter
    from worker.engines.encoder import load_encoder

    loaded = load_painter(model, lambda: load_encoder(helper(str(model.options.get("encoder", "all-minilm-l6-v2"))), device), device)
    width, height = loaded.native(64, 64)
    steps = min(loaded.steps, 8)

    def paint(batch: int) -> list[Any]:
        requests = [Request(TEXTS[n % len(TEXTS)], "", torch.Generator().manual_seed(n)) for n in range(batch)]
        made = dict(loaded.paint(requests, width, height, steps, loaded.guidance, lambda share: True))
        return [made[n] for n in sorted(made)]

    def result() -> Outputs:
        return {"pictures": np.stack([np.asarray(picture) for picture in paint(2)])}

    return Probe("pictures", lambda batch: float(len(paint(batch))), result, _sizes(most, 8))


def _scene(side: int) -> NDArray[Any]:
    """A picture with edges, gradients and texture, (side, side, 3), uint8."""
    y, x = np.mgrid[0:side, 0:side] / side
    noise = np.random.default_rng(7).random((side, side))
    rings = (np.sin(40 * np.hypot(x - 0.5, y - 0.4)) > 0).astype(float)
    return (np.stack([x, (y + rings) / 2, 0.7 * rings + 0.3 * noise], -1) * 255).astype(np.uint8)


def _upscaler(model: ResolvedModel, device: str, most: int, helper: Any) -> Probe:
    from PIL import Image

    from worker.engines.upscale import load_upscaler

    loaded = load_upscaler(model, device)
    scale = min(loaded.nets)
    picture = Image.fromarray(_scene(96))

    def run(batch: int) -> float:
        for _ in range(batch):
            loaded.upscale(picture, scale)
        return float(batch)

    return Probe("pictures", run, lambda: {"pictures": np.asarray(loaded.upscale(picture, scale))}, (1,))


def _stylizer(model: ResolvedModel, device: str, most: int, helper: Any) -> Probe:
    from worker.engines.style import load_stylizer

    loaded = load_stylizer(model, device)
    pixels = _scene(128)

    def run(batch: int) -> float:
        for _ in range(batch):
            loaded.stylize(pixels, loaded.styles[0])
        return float(batch)

    return Probe("pictures", run, lambda: {"pictures": loaded.stylize(pixels, loaded.styles[0])}, (1,))


def _recogniser(model: ResolvedModel, device: str, most: int, helper: Any) -> Probe:
    import math

    from scipy.signal import resample_poly

    from worker.engines.speech import load_voice
    from worker.engines.whisper import RATE, load_recogniser

    voice = load_voice(helper("hibari-heart"))
    spoken = voice.say(TEXTS[1], voice=voice.voices[0], speed=1.0, seed=1)
    common = math.gcd(RATE, voice.sample_rate)
    samples = resample_poly(spoken, RATE // common, voice.sample_rate // common).astype(np.float32)
    loaded = load_recogniser(model, device)
    language = loaded.languages[0] if len(loaded.languages) == 1 else None

    def text() -> str:
        _, segments = loaded.transcribe(samples, language=language, prompt=None, beam_size=1, skip_silence=False)
        return " ".join(segment.text for segment in segments)

    def run(batch: int) -> float:
        for _ in range(batch):
            text()
        return batch * len(samples) / RATE

    return Probe("seconds of sound", run, lambda: {"words": np.array(text().split())}, (1,))


def _voice(model: ResolvedModel, device: str, most: int, helper: Any) -> Probe:
    from worker.engines.speech import load_voice

    loaded = load_voice(model)

    def say() -> NDArray[Any]:
        return loaded.say(TEXTS[1], voice=loaded.voices[0], speed=1.0, seed=1)

    def run(batch: int) -> float:
        return sum(len(say()) for _ in range(batch)) / loaded.sample_rate

    return Probe("seconds of sound", run, lambda: {"sound": say()}, (1,))


def measure(probe: Probe, seconds: float, batches: tuple[int, ...] | None = None) -> dict[str, float]:
    """Speed by size of batch: the best of rounds that last about so many seconds each.

    Args:
        probe: What to run.
        seconds: Time for each size.
        batches: Sizes; the probe's own where left out.
    """
    found: dict[str, float] = {}
    for batch in batches or probe.batches:
        probe.run(batch)  # compiles, fills caches
        rates: list[float] = []
        end = time.monotonic() + seconds
        while len(rates) < 2 or time.monotonic() < end:
            began = time.perf_counter()
            work = probe.run(batch)
            rates.append(work / max(time.perf_counter() - began, 1e-9))
            if len(rates) >= 50:
                break
        # Neighbours on the machine only ever make it slower.
        found[str(batch)] = round(max(rates), 4)
        sizes = list(found.values())
        if len(sizes) > 2 and sizes[-1] < 0.8 * max(sizes):
            break
    return found


def distances(kind: str, reference: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """How far results are from the defaults'.

    Args:
        kind: Key of `worker.tuning.plan.TOLERANCE`.
        reference: The defaults' result.
        found: The other one.
    """
    if kind == "language":
        a, b = reference["tokens"], found["tokens"]
        size = max(len(a), len(b), 1)
        same = float(np.sum(a[: len(b)] == b[: len(a)])) / size
        if "likelihoods" not in found or "likelihoods" not in reference:
            return {"agreement": same}
        change = float(np.exp(-found["likelihoods"].mean()) / np.exp(-reference["likelihoods"].mean()) - 1)
        return {"agreement": same, "perplexity": abs(change), "max_error": float(np.abs(found["likelihoods"] - reference["likelihoods"]).max())}
    if kind == "vectors":
        x, y = reference["vectors"], found["vectors"]
        cosine = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
        return {"cosine": float(cosine.min()), "max_error": float(np.abs(x - y).max())}
    if kind == "words":
        a, b = reference["words"], found["words"]
        return {"agreement": float(np.sum(a[: len(b)] == b[: len(a)])) / max(len(a), len(b), 1)}
    name = "pictures" if kind == "pictures" else "sound"
    x, y = reference[name].astype(float), found[name].astype(float)
    label = "psnr_db" if kind == "pictures" else "snr_db"
    if x.shape != y.shape:
        return {label: 0.0}
    error = float(((x - y) ** 2).mean())
    power = 255.0**2 if kind == "pictures" else float((x**2).mean())
    value = 200.0 if error == 0 else min(200.0, 10 * float(np.log10(max(power, 1e-20) / error)))
    return {label: value, "max_error": float(np.abs(x - y).max())}

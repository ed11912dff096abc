"""Which options to measure for an engine, and which measurement wins. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from worker.engines.options import InferenceOptions

GAIN = 1.05
"""Least speed over the defaults for which options are changed: below it, a rerun may say otherwise."""

PART = 1.02
"""Least speed of one option for it to be tried together with others."""

TOLERANCE: Mapping[str, Mapping[str, float]] = {
    "language": {"agreement": 0.99, "perplexity": 0.01},
    "vectors": {"cosine": 0.9999},
    "pictures": {"psnr_db": 40.0},
    "words": {"agreement": 1.0},
    "sound": {"snr_db": 40.0},
}
"""What counts as the same result: tokens that agree and relative change of perplexity; cosine of vectors; pictures' and sounds'
signal over their difference; words that agree."""

QUALITY: Mapping[str, str] = {
    "language": "language", "encoder": "vectors", "flow": "pictures", "diffusers": "pictures", "span": "pictures", "style": "pictures",
    "faster-whisper": "words", "transformers-whisper": "words", "hibari": "sound", "transformers-tts": "sound",
}  # fmt: skip
"""Which tolerance an engine's results are held to."""


@dataclass(frozen=True)
class Candidate:
    """Options to measure.

    Args:
        name: For a person.
        options: They.
        lossy: Why results may change by more than the quality check can see; empty where they may not.
        why_not: Known before: why they do not apply to this engine.
    """

    name: str
    options: InferenceOptions
    lossy: str = ""
    why_not: str = ""


@dataclass(frozen=True)
class Result:
    """What was measured of a candidate.

    Args:
        name: The candidate's.
        options: Its options as stored.
        speed: Units of work in a second, by items in a batch; empty where it did not run.
        unit: What is counted.
        quality: Distances from the defaults' result; empty for the defaults.
        same: Whether they are within tolerance.
        load_s: Seconds to load.
        memory_mb: Peak memory of the process, megabytes.
        skipped: Why it did not run.
        lossy: See `Candidate`.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, float] = field(default_factory=dict)
    unit: str = ""
    quality: Mapping[str, float] = field(default_factory=dict)
    same: bool = True
    load_s: float = 0.0
    memory_mb: float = 0.0
    skipped: str = ""
    lossy: str = ""

    @property
    def best(self) -> float:
        """Speed at its best batch."""
        return max(self.speed.values(), default=0.0)


def candidates(engine: str, device: str, options: Mapping[str, Any]) -> list[Candidate]:
    """What to measure, the defaults first.

    Args:
        engine: Engine of the version.
        device: ``cpu`` or ``cuda``.
        options: The version's own options: what they fix already is not measured as a change.
    """
    cuda = device.startswith("cuda")
    usual = str(options.get("dtype") or ("bfloat16" if cuda else "float32"))
    none = InferenceOptions()
    found = [Candidate("defaults", none)]

    def add(name: str, lossy: str = "", why_not: str = "", **changes: Any) -> None:
        found.append(Candidate(name, none.with_(**changes), lossy, why_not))

    torch_engines = ("language", "encoder", "flow", "diffusers", "span", "transformers-whisper", "transformers-tts")
    if engine in torch_engines:
        typed = "the engine computes in float32" if engine == "transformers-tts" else ""
        for dtype in ("float32", "bfloat16", "float16"):
            if dtype != (usual if engine in ("language", "encoder", "diffusers") else "float16" if cuda and "whisper" in engine else "float32"):
                add(dtype, why_not=typed, dtype=dtype)
    if engine in ("language", "encoder", "diffusers"):
        rows = "the engine brings its own attention" if engine == "language" else ""
        if engine == "diffusers":
            rows = "diffusers chooses its attention itself"
        add("eager attention", why_not=rows, attention="eager")
        add("flash attention", why_not=rows, attention="flash_attention_2")
    if engine in ("language", "encoder", "transformers-whisper", "transformers-tts"):
        add("int8 dynamic", quantize="int8-dynamic")
    elif engine in ("flow", "diffusers", "span"):
        why = "the sampler looks at the layers' own weights" if engine == "flow" else "no linear layers to speak of" if engine == "span" else ""
        add("int8 dynamic", why_not=why, quantize="int8-dynamic")
    if engine in torch_engines:
        grows = "a row's keys grow with each token: every length would be compiled anew" if engine == "language" else ""
        add("compile", why_not=grows, compile="default")
        add("CUDA graphs", why_not=grows, compile="reduce-overhead")
    if engine in ("span", "diffusers"):
        add("channels last", channels_last=True)
    elif engine == "flow":
        add("channels last", why_not="its decoder does so by itself", channels_last=True)
    if engine == "language":
        add("vllm", lossy="results may depend on neighbours", engine="vllm")
    if engine == "faster-whisper":
        own = str(options.get("compute_type") or ("float16" if cuda else "int8"))
        for compute in ("int8", "int8_float32", "int8_bfloat16", "bfloat16", "float32", "float16", "int8_float16"):
            if compute != own:
                add(compute, why_not="" if cuda or "float16" not in compute.replace("bfloat16", "") else "needs a GPU", compute_type=compute)
    return found


def combined(results: Sequence[Result], allow_lossy: bool = False) -> Candidate | None:
    """One candidate out of the options that each gained something; None where fewer than two did."""
    if not results:
        return None
    base = results[0].best
    good = [r for r in results[1:] if r.best >= PART * base and _allowed(r, allow_lossy) and "engine" not in r.options]
    merged: dict[str, Any] = {}
    names: list[str] = []
    for one in sorted(good, key=lambda r: -r.best):
        if not set(one.options) & set(merged):
            merged |= one.options
            names.append(one.name)
    return Candidate(" + ".join(names), InferenceOptions(**merged)) if len(names) > 1 else None


def choose(results: Sequence[Result], allow_lossy: bool = False) -> Result:
    """The fastest whose results are the same; the defaults (first) where nothing gains enough."""
    base = results[0]
    allowed = [r for r in results[1:] if r.best >= GAIN * base.best and _allowed(r, allow_lossy)]
    return max(allowed, key=lambda r: r.best, default=base)


def better(one: Result, other: Result) -> Result:
    """The same options measured twice: the better speed of each batch."""
    sizes = {**one.speed, **{size: max(rate, one.speed.get(size, 0.0)) for size, rate in other.speed.items()}}
    return replace(one, speed=sizes)


def _allowed(result: Result, allow_lossy: bool) -> bool:
    return not result.skipped and (allow_lossy or (result.same and not result.lossy))


def within(kind: str, quality: Mapping[str, float]) -> bool:
    """Whether distances from the defaults' result are within tolerance."""
    limits = TOLERANCE[kind]
    if "perplexity" in limits and not quality.get("perplexity", 0.0) <= limits["perplexity"]:
        return False
    return all(quality.get(name, 0.0) >= least for name, least in limits.items() if name != "perplexity")


def smallest_batch(speed: Mapping[str, float], share: float = 0.05) -> int:
    """The smallest batch within a share of the best speed."""
    top = max(speed.values(), default=0.0)
    return min((int(size) for size, rate in speed.items() if rate >= (1 - share) * top), default=1)

"""How a model is run: the inference options that `factory tune` measures, stored with the version and read at load time.

Options change bytes (another type of number, another kernel, another order of sums), so whoever stores them makes them part
of the model version's key; the engines only obey.
"""

import importlib.util
import shutil
import warnings
from dataclasses import asdict, dataclass, replace
from functools import wraps
from typing import Any

from contentfactory.errors import ModelUnavailable, TransientError
from worker.engines.files import ResolvedModel

DTYPES = ("float32", "bfloat16", "float16")
QUANTISATIONS = ("int8-dynamic",)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
"""torch.compile's; ``reduce-overhead`` records CUDA graphs on a GPU."""
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class InferenceOptions:
    """Options of one model version; what is left out is the engine's own default.

    Args:
        dtype: Type of the weights: one of `DTYPES`.
        quantize: One of `QUANTISATIONS`: linear layers with eight-bit weights, inputs scaled as they come.
        compile: One of `COMPILE_MODES`.
        attention: One of `ATTENTIONS`.
        channels_last: Whether convolutions run with channels last.
        batch: Items in one forward pass, for engines that cut their own batches.
        compute_type: CTranslate2's type of numbers (``int8``, ``int8_float32``, ``float32``, ``float16`` …).
        engine: Another engine than the version's own: ``vllm`` for language models.
        device: Kind of device that these were measured on (``cpu``, ``cuda``); on another one they are refused.
    """

    dtype: str | None = None
    quantize: str | None = None
    compile: str | None = None
    attention: str | None = None
    channels_last: bool = False
    batch: int | None = None
    compute_type: str | None = None
    engine: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        known = {"dtype": DTYPES, "quantize": QUANTISATIONS, "compile": COMPILE_MODES, "attention": ATTENTIONS, "engine": ("vllm",)}
        for name, allowed in known.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ModelUnavailable(f"inference option {name} is {value!r}; allowed: {', '.join(allowed)}")
        if self.batch is not None and self.batch < 1:
            raise ModelUnavailable(f"inference option batch is {self.batch}; it must be 1 or more")

    @classmethod
    def of(cls, model: ResolvedModel, device: str | None = None) -> "InferenceOptions":
        """The options that are stored with a version.

        Args:
            model: The version; ``options['inference']`` holds them.
            device: Where it is about to be loaded.

        Raises:
            ModelUnavailable: If one is unknown.
            TransientError: If they are meant for another kind of device; another worker may have one.
        """
        stored = dict(model.options.get("inference") or {})
        unknown = set(stored) - set(cls.__dataclass_fields__)
        if unknown:
            raise ModelUnavailable(f"model {model.key}: inference options {', '.join(sorted(unknown))} are not known")
        options = cls(**stored)
        if options.device and device and options.device != device.partition(":")[0]:
            raise TransientError(
                f"model {model.key} was tuned for {options.device}, this worker computes on {device}; name the version without its "
                f"tag, or tune it here",
                code="tuned_for_another_device",
            )
        return options

    def stored(self) -> dict[str, Any]:
        """Only what differs from the defaults: what is kept in the ledger."""
        plain = asdict(InferenceOptions())
        return {key: value for key, value in asdict(self).items() if value != plain[key]}

    def with_(self, **changes: Any) -> "InferenceOptions":
        """The same with changes."""
        return replace(self, **changes)


def prepare(net: Any, options: InferenceOptions) -> Any:
    """Apply options to a torch module that is loaded, in evaluation and on its device.

    Args:
        net: The module; changed in place where that is possible.
        options: What to apply; ``dtype`` and ``attention`` only where the loader cannot take them itself.

    Returns:
        The module to use.
    """
    import torch

    if options.channels_last:
        net = net.to(memory_format=torch.channels_last)
    if options.quantize:
        net = _quantised(net)
    if options.compile:
        # In place: the module keeps its class, its attributes and its signature.
        net.compile(mode=None if options.compile == "default" else options.compile, dynamic=None)
    return net


def autocast(net: Any, dtype: str | None, device: str) -> Any:
    """Run a module that was written for float32 in another type; its outputs are float32 again."""
    if dtype in (None, "float32"):
        return net
    import torch

    kind = device.partition(":")[0]
    inner, chosen = net.forward, getattr(torch, str(dtype))

    @wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, dtype=chosen):
            found = inner(*args, **kwargs)
        return found.float() if isinstance(found, torch.Tensor) else found

    net.forward = forward
    return net


def _quantised(net: Any) -> Any:
    """Linear layers in eight bits: torchao where it is installed, else torch's own on a processor."""
    import torch

    on_cpu = next(net.parameters()).device.type == "cpu"
    if importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(net, Int8DynamicActivationInt8WeightConfig())
        return net
    if not on_cpu:
        raise ModelUnavailable("int8-dynamic on a GPU needs the package torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, and there in every version that we allow
        return torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


def missing(options: InferenceOptions, device: str) -> str | None:
    """Why these options cannot run on this machine; None where they can."""
    kind = device.partition(":")[0]
    if options.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    if options.attention == "flash_attention_2" and (kind != "cuda" or importlib.util.find_spec("flash_attn") is None):
        return "flash_attn is not installed" if kind == "cuda" else "needs a GPU"
    if options.compile in ("reduce-overhead", "max-autotune") and kind != "cuda":
        return "CUDA graphs need a GPU" if options.compile == "reduce-overhead" else "tunes kernels of a GPU"
    if options.compile and kind == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler"
    if options.dtype == "float16" and kind == "cpu":
        return "processors compute float16 by way of float32"
    if options.quantize and importlib.util.find_spec("torchao") is None:
        if kind != "cpu":
            return "torchao is not installed"
        import torch

        if not hasattr(getattr(torch.ao, "quantization", None), "quantize_dynamic"):
            return "torchao is not installed, and this torch has no quantisation of its own"
    return None

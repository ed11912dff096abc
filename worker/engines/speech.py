"""Voices: loading and running text-to-speech models.

Two engines: ``hibari`` (small ONNX voices distilled from Kokoro, English, CPU) and ``transformers-tts`` (a folder with a
VITS model in the form of transformers, such as those of the MMS project, any of its languages).

The package ``hibari`` is used as a library, not only as a carrier of weights: its pronunciation rules and its vocoder are
small, permissively licensed and need nothing but numpy and onnxruntime. Its download of further voices is never reached,
because a model is always loaded from a local file that the factory has checked.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from contentfactory.errors import InputError, ModelUnavailable
from worker.engines.files import ResolvedModel
from worker.engines.options import InferenceOptions, prepare

Samples = npt.NDArray[np.float32]


class Voice(Protocol):
    """A loaded text-to-speech model."""

    sample_rate: int
    """Hz."""
    language: str
    """BCP 47 tag of what it speaks."""
    voices: tuple[str, ...]
    """Names of its voices, the default one first."""
    min_speed: float
    max_speed: float

    def say(self, text: str, *, voice: str, speed: float, seed: int) -> Samples:
        """Say one sentence or part of one.

        Args:
            text: Words, digits and punctuation.
            voice: One of `voices`.
            speed: Pace within ``[min_speed, max_speed]``; 1 is the voice's own.
            seed: Fixes everything that is drawn: the same arguments give the same samples.

        Returns:
            Samples of shape ``(n,)`` in about ``[-1, 1]``; empty where nothing in the text has a sound.

        Raises:
            InputError: If the text cannot be read.
        """
        ...


def load_voice(model: ResolvedModel) -> Voice:
    """Load a voice by its engine.

    Raises:
        ModelUnavailable: If the engine is unknown or the files are not a voice.
    """
    if model.engine == "hibari":
        return HibariVoice.load(model)
    if model.engine == "transformers-tts":
        return VitsVoice.load(model)
    raise ModelUnavailable(
        f"model {model.name}: engine {model.engine!r} does not speak; allowed: hibari, transformers-tts"
    )


@dataclass
class HibariVoice:
    """A distilled Kokoro voice through the library ``hibari``, on one CPU thread."""

    tts: Any
    language: str
    voices: tuple[str, ...]
    sample_rate: int = 24_000
    min_speed: float = 0.6
    max_speed: float = 1.8

    @classmethod
    def load(cls, model: ResolvedModel) -> "HibariVoice":
        """Load from ``files['weights']``, or the one ``.onnx`` file in ``files['folder']``.

        Options: ``voice`` (name shown and asked for), ``language`` (``en-US`` or ``en-GB``: which pronunciation).
        """
        try:
            from hibari import Hibari
            from hibari.g2p import G2P
        except ImportError:
            raise ModelUnavailable(
                f"model {model.name}: the package hibari-tts is not installed; run `make setup`"
            ) from None
        path = model.files.get("weights") or _only(model, "*.onnx")
        language = str(model.options.get("language", "en-US"))
        try:
            tts = Hibari(model=str(path), threads=1, g2p=G2P(british=language == "en-GB"))
        except MemoryError:
            raise
        except Exception as error:
            raise ModelUnavailable(
                f"model {model.name}: {path.name} is not a hibari voice ({str(error)[:200]})"
            ) from None
        wanted = {"ids", "speed"}
        if {i.name for i in tts.sess.get_inputs()} != wanted:
            raise ModelUnavailable(
                f"model {model.name}: {path.name} is not a hibari voice; its inputs must be ids and speed"
            )
        return cls(tts, language, (str(model.options.get("voice", model.name)),))

    def say(self, text: str, *, voice: str, speed: float, seed: int) -> Samples:
        """See `Voice.say`."""
        try:
            phonemes = self.tts.g2p(text)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"text cannot be read aloud near {text[:60]!r} ({type(error).__name__})", param="text"
            ) from None
        if not any(c.isalpha() for c in phonemes or ""):
            return np.zeros(0, np.float32)
        rng = np.random.default_rng(seed)
        parts = []
        # The network has learnt sentences of up to some 400 phonemes; what is longer is cut at a space.
        while phonemes:
            cut = len(phonemes) if len(phonemes) <= 400 else max(phonemes.rfind(" ", 0, 400), 200)
            parts.append(self.tts.from_ids(self.tts.ids(phonemes[:cut]), speed, rng))
            phonemes = phonemes[cut:].strip()
        return np.concatenate(parts).astype(np.float32, copy=False)


@dataclass
class VitsVoice:
    """A VITS model in the form of transformers; one folder with ``config.json`` and safetensors."""

    model: Any
    tokenizer: Any
    language: str
    voices: tuple[str, ...]
    sample_rate: int
    name: str
    min_speed: float = 0.5
    max_speed: float = 2.0

    @classmethod
    def load(cls, model: ResolvedModel) -> "VitsVoice":
        """Load from ``files['folder']``. Option ``language``: BCP 47 tag; the tokenizer's own where left out."""
        import transformers
        from transformers import VitsModel, VitsTokenizer

        transformers.utils.logging.disable_progress_bar()
        folder = model.files.get("folder")
        if folder is None or not folder.is_dir():
            raise ModelUnavailable(
                f"model {model.name}: engine transformers-tts needs a folder with config.json and safetensors"
            )
        options = InferenceOptions.of(model, "cpu")
        try:
            network = VitsModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            network = prepare(network, options)
            tokenizer = VitsTokenizer.from_pretrained(folder, local_files_only=True)
        except MemoryError:
            raise
        except Exception as error:
            raise ModelUnavailable(
                f"model {model.name}: {folder.name} is not a VITS voice ({str(error)[:200]})"
            ) from None
        count = int(network.config.num_speakers or 1)
        names = tuple(str(n) for n in range(count)) if count > 1 else ("default",)
        language = str(model.options.get("language") or getattr(tokenizer, "language", None) or "und")
        return cls(
            network,
            tokenizer,
            {"eng": "en"}.get(language, language),
            names,
            int(network.config.sampling_rate),
            model.name,
        )

    def say(self, text: str, *, voice: str, speed: float, seed: int) -> Samples:
        """See `Voice.say`."""
        import torch

        if any(c.isdigit() for c in text) and not any(t.isdigit() for t in self.tokenizer.get_vocab()):
            if not self.language.startswith("en"):
                raise InputError(
                    f"model {self.name} cannot read digits in {text[:60]!r}; write numbers in words",
                    param="text",
                )
            text = _digits_in_words(text)
        try:
            encoded = self.tokenizer(text, return_tensors="pt")
        except (ImportError, ValueError, KeyError) as error:
            raise InputError(
                f"text cannot be read by model {self.name} ({str(error)[:120]})", param="text"
            ) from None
        if encoded["input_ids"].shape[1] < 3:
            return np.zeros(0, np.float32)
        # The network draws from torch's global generator; forking it keeps what runs beside us out.
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            self.model.speaking_rate = speed
            speaker = int(voice) if len(self.voices) > 1 else None
            wave = self.model(**encoded, speaker_id=speaker).waveform[0]
        return np.ascontiguousarray(wave.float().cpu().numpy(), dtype=np.float32)


def _digits_in_words(text: str) -> str:
    from hibari.g2p import numbers

    def words(match: re.Match[str]) -> str:
        whole, _, decimals = match[0].replace(",", "").partition(".")
        said = str(numbers.cardinal(int(whole)))
        return said + (
            " point " + " ".join(str(numbers.cardinal(int(d))) for d in decimals) if decimals else ""
        )

    return re.sub(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,15}(?:\.\d+)?", words, text)


def _only(model: ResolvedModel, pattern: str) -> Path:
    folder = model.files.get("folder")
    found = sorted(folder.glob(pattern)) if folder is not None and folder.is_dir() else []
    if len(found) != 1:
        raise ModelUnavailable(
            f"model {model.name}: wanted one {pattern} file in its folder, found {len(found)}"
        )
    return found[0]


__all__ = ["HibariVoice", "VitsVoice", "Voice", "load_voice"]

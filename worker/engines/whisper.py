"""Speech recognisers: loading and running Whisper, through CTranslate2 (``faster-whisper``) or transformers.

Settings are deterministic: temperature 0, no fallback to sampling, and no text carried from one window to the next, so
that a slip cannot repeat itself through a long recording.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from contentfactory.errors import InputError, ModelUnavailable
from worker.engines.files import ResolvedModel
from worker.engines.options import InferenceOptions, prepare

Samples = npt.NDArray[np.float32]
RATE = 16_000
"""Sample rate that Whisper hears, Hz."""


@dataclass(frozen=True)
class Word:
    """A word and its time, seconds; ``probability`` in ``[0, 1]``, or None where the engine gives none."""

    start_s: float
    end_s: float
    text: str
    probability: float | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of speech and its time, seconds."""

    start_s: float
    end_s: float
    text: str
    words: tuple[Word, ...] = field(default=())


class Recogniser(Protocol):
    """A loaded recogniser."""

    languages: tuple[str, ...]
    """Languages that it knows (two letters); empty where it knows many."""

    def transcribe(
        self,
        samples: Samples,
        *,
        language: str | None,
        prompt: str | None,
        beam_size: int,
        skip_silence: bool,
    ) -> tuple[str, Iterator[Segment]]:
        """Write down speech.

        Args:
            samples: Mono at `RATE`, shape ``(n,)``.
            language: Two letters, or None to find it out.
            prompt: Names and terms to expect.
            beam_size: 1 to 5.
            skip_silence: Whether stretches without speech are left out first.

        Returns:
            The language, and the segments as they are found.
        """
        ...


def load_recogniser(model: ResolvedModel, device: str = "cpu") -> Recogniser:
    """Load a recogniser by its engine.

    Args:
        model: Files: ``folder`` with a CTranslate2 or a transformers Whisper.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ModelUnavailable: If the engine is unknown or the folder is not such a model.
    """
    folder = model.files.get("folder")
    if folder is None or not folder.is_dir():
        raise ModelUnavailable(
            f"model {model.name}: engine {model.engine} needs a folder with the model's files"
        )
    loaders: dict[str, Callable[[ResolvedModel, Path, str], Recogniser]] = {
        "faster-whisper": _Fast.load,
        "transformers-whisper": _Transformers.load,
    }
    if model.engine not in loaders:
        raise ModelUnavailable(
            f"model {model.name}: engine {model.engine!r} does not transcribe; allowed: {', '.join(loaders)}"
        )
    return loaders[model.engine](model, folder, device)


@dataclass
class _Fast:
    model: Any
    languages: tuple[str, ...]

    @classmethod
    def load(cls, model: ResolvedModel, folder: Path, device: str) -> "_Fast":
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise ModelUnavailable(
                f"model {model.name}: the package faster-whisper is not installed; run `make setup`"
            ) from None
        InferenceOptions.of(model, device)  # refuses what was tuned for another device
        kind, _, index = device.partition(":")
        compute = str(model.options.get("compute_type") or ("float16" if kind == "cuda" else "int8"))
        try:
            loaded = WhisperModel(
                str(folder), device=kind, device_index=int(index or 0), compute_type=compute, cpu_threads=1, num_workers=1,
                local_files_only=True,
            )  # fmt: skip
        except (RuntimeError, ValueError, OSError) as error:
            if "out of memory" in str(error).lower():
                raise MemoryError(str(error)) from error
            raise ModelUnavailable(
                f"model {model.name}: {folder.name} is not a faster-whisper model ({str(error)[:200]})"
            ) from None
        known = model.options.get("languages") or ([] if loaded.model.is_multilingual else ["en"])
        return cls(loaded, tuple(str(k) for k in known))

    def transcribe(
        self,
        samples: Samples,
        *,
        language: str | None,
        prompt: str | None,
        beam_size: int,
        skip_silence: bool,
    ) -> tuple[str, Iterator[Segment]]:
        try:
            found, info = self.model.transcribe(
                samples, language=language, initial_prompt=prompt or None, beam_size=beam_size, temperature=0.0,
                condition_on_previous_text=False, word_timestamps=True, vad_filter=skip_silence,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise _mapped(error) from None
        return str(info.language), self._segments(found)

    def _segments(self, found: Any) -> Iterator[Segment]:
        try:
            for one in found:
                words = _whole(
                    Word(w.start, w.end, w.word, round(float(w.probability), 4)) for w in one.words or ()
                )
                if one.text.strip():
                    yield Segment(one.start, one.end, one.text.strip(), words)
        except (RuntimeError, ValueError) as error:
            raise _mapped(error) from None


def _whole(found: Iterable[Word]) -> tuple[Word, ...]:
    """Words as people write them: what Whisper splits at a comma, point or apostrophe ('4' ',500') is one again.

    Args:
        found: Words with the space before them that Whisper writes; none means that the word goes on.
    """
    words: list[Word] = []
    for one in found:
        text = one.text.strip()
        if not text:
            continue
        if words and one.text[0] in ",.'’-%:/)0123456789":
            last = words[-1]
            likely = None if one.probability is None else min(last.probability or 0.0, one.probability)
            words[-1] = Word(last.start_s, one.end_s, last.text + text, likely)
        else:
            words.append(Word(one.start_s, one.end_s, text, one.probability))
    return tuple(words)


def _mapped(error: Exception) -> Exception:
    if "out of memory" in str(error).lower():
        return MemoryError(str(error))
    if isinstance(error, ValueError):
        return InputError(f"the recording cannot be transcribed: {str(error)[:200]}", param="audio")
    return error


@dataclass
class _Transformers:
    pipe: Any
    languages: tuple[str, ...]
    words: bool

    @classmethod
    def load(cls, model: ResolvedModel, folder: Path, device: str) -> "_Transformers":
        import torch
        import transformers
        from transformers import (
            AutomaticSpeechRecognitionPipeline,
            WhisperForConditionalGeneration,
            WhisperProcessor,
        )

        transformers.utils.logging.disable_progress_bar()
        options = InferenceOptions.of(model, device)
        dtype = getattr(torch, options.dtype or ("float16" if device.startswith("cuda") else "float32"))
        try:
            network = WhisperForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype
            ).eval()
            processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
        except MemoryError:
            raise
        except Exception as error:
            raise ModelUnavailable(
                f"model {model.name}: {folder.name} is not a Whisper model ({str(error)[:200]})"
            ) from None
        network = prepare(network.to(device), options)
        pipe = AutomaticSpeechRecognitionPipeline(
            model=network, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor,
            device=torch.device(device), dtype=dtype,
        )  # fmt: skip
        config = network.generation_config
        known = model.options.get("languages") or (
            [] if getattr(config, "is_multilingual", False) else ["en"]
        )
        return cls(pipe, tuple(str(k) for k in known), getattr(config, "alignment_heads", None) is not None)

    def transcribe(
        self,
        samples: Samples,
        *,
        language: str | None,
        prompt: str | None,
        beam_size: int,
        skip_silence: bool,
    ) -> tuple[str, Iterator[Segment]]:
        settings: dict[str, Any] = {
            "num_beams": beam_size,
            "do_sample": False,
            "temperature": 0.0,
            "condition_on_prev_tokens": False,
        }
        if not self.languages or len(self.languages) > 1:
            settings |= {"task": "transcribe"} | ({"language": language} if language else {})
        if prompt:
            settings["prompt_ids"] = self.pipe.tokenizer.get_prompt_ids(prompt, return_tensors="pt").to(
                self.pipe.device
            )
        answer = self.pipe(
            {"raw": np.ascontiguousarray(samples), "sampling_rate": RATE},
            return_timestamps="word" if self.words else True, return_language=False, generate_kwargs=settings,
        )  # fmt: skip
        return language or (self.languages[0] if self.languages else "und"), iter(
            self._segments(answer, samples.size / RATE)
        )

    def _segments(self, answer: dict[str, Any], end_s: float) -> list[Segment]:
        def timed(chunk: dict[str, Any]) -> Word:
            start, end = chunk["timestamp"]
            return Word(float(start or 0.0), float(end if end is not None else end_s), chunk["text"])

        chunks = _whole(timed(c) for c in answer.get("chunks", []))
        if not self.words:
            return [Segment(c.start_s, c.end_s, c.text) for c in chunks]
        found: list[Segment] = []
        group: list[Word] = []
        for index, word in enumerate(chunks):
            group.append(word)
            gap = chunks[index + 1].start_s - word.end_s if index + 1 < len(chunks) else 9.0
            if word.text[-1] in ".!?" or gap > 1.0:
                found.append(
                    Segment(group[0].start_s, group[-1].end_s, " ".join(w.text for w in group), tuple(group))
                )
                group = []
        return found


__all__ = ["RATE", "Recogniser", "Segment", "Word", "load_recogniser"]

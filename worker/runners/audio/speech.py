"""Runner of ``audio.speech``."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from contentfactory.errors import FactoryError, InputError, JobCancelled
from contentfactory.jobs.audio import AUDIO_TYPES, MAX_SPEECH_SECONDS, AudioSpeech
from worker.context import Failure, JobContext, Output, Yield
from worker.engines.speech import Samples, Voice, load_voice
from worker.media.audio import AudioBuffer, encode, limit, loudness, stretch
from worker.runners import runs
from worker.runners.audio import reading

LEAD_S = 0.08
"""Silence before the first word and after the last, seconds."""


@dataclass
class _Spoken:
    buffer: AudioBuffer
    sentences: list[dict[str, Any]]
    skipped: int


def get_voice(context: JobContext) -> Voice:
    """The micro-batch's voice out of the cache."""
    return context.load(load_voice)


@runs(AudioSpeech)
def speech(params: list[AudioSpeech], context: JobContext) -> Iterator[Yield]:
    """Say each job's text sentence by sentence; each sentence draws from its own seed, so neighbours change nothing."""
    voice = get_voice(context)
    for job, one in enumerate(params):
        try:
            made = _say(one, voice, context, job)
        except JobCancelled as error:
            yield Failure(job, error)
            continue
        except FactoryError as error:
            yield Failure(job, error)
            continue
        meta: dict[str, Any] = {
            "duration_s": round(made.buffer.duration_s, 4),
            "sample_rate": made.buffer.sample_rate,
            "channels": 1,
            "sentences": len(made.sentences),
            "language": one.language or voice.language,
        }
        if made.skipped:
            meta["skipped_sentences"] = made.skipped
        timings = {
            "duration_s": meta["duration_s"],
            "sample_rate": meta["sample_rate"],
            "language": meta["language"],
            "sentences": made.sentences,
        }
        yield Output(
            job,
            f"speech.{one.format}",
            AUDIO_TYPES[one.format],
            partial(encode, made.buffer, one.format),
            meta,
        )
        data = json.dumps(timings, ensure_ascii=False, indent=1).encode()
        yield Output(
            job,
            "timings.json",
            "application/json",
            data,
            {"sentences": len(made.sentences), "duration_s": meta["duration_s"]},
        )
        context.progress(job, 1.0)


def _say(params: AudioSpeech, voice: Voice, context: JobContext, job: int) -> _Spoken:
    text = str(params.text)
    name = _voice_name(params, voice)
    _check_language(params, voice)
    if not text.strip():
        raise InputError("text is empty; there is nothing to say", param="text")
    if not reading.speakable(text):
        raise InputError(
            f"text {text.strip()[:40]!r} has no letter or digit; there is nothing to say", param="text"
        )
    # Some 15 characters a second is an even pace; refuse early what cannot fit, not after minutes of work.
    if len(text) / 25 / params.speed > MAX_SPEECH_SECONDS:
        raise InputError(
            f"text has {len(text)} characters, more than {MAX_SPEECH_SECONDS:g} s of speech at speed {params.speed:g}; split it",
            param="text", code="too_large",
        )  # fmt: skip
    english = voice.language.startswith("en")
    own = min(max(params.speed, voice.min_speed), voice.max_speed)
    rate = voice.sample_rate
    parts: list[Samples] = [_silence(LEAD_S, rate)]
    at = parts[0].size
    timed: list[dict[str, Any]] = []
    skipped = 0
    todo = reading.sentences(text)
    previous: int | None = None
    for number, sentence in enumerate(todo):
        context.check(job)
        context.progress(job, number / len(todo))
        said: list[Samples] = []
        for index, piece in enumerate(reading.pieces(sentence.text)):
            words = reading.spoken(piece) if english else piece
            if not reading.speakable(words):
                continue
            seed = _seed(context.seeds[job], number, index)
            samples = _trim(voice.say(words, voice=name, speed=own, seed=seed), rate)
            if samples.size:
                said += [_silence(0.12 / params.speed, rate), samples] if said else [samples]
        if not said:
            skipped += 1
            continue
        wave = np.concatenate(said)
        if abs(own - params.speed) > 1e-6:
            wave = stretch(AudioBuffer(wave[None, :], rate), params.speed / own).samples[0]
        if previous is not None:
            pause = _silence(
                params.sentence_pause_s * (1 if sentence.paragraph == previous else 2) / params.speed, rate
            )
            parts.append(pause)
            at += pause.size
        previous = sentence.paragraph
        timed.append(
            {
                "start_s": round(at / rate, 4),
                "end_s": round((at + wave.size) / rate, 4),
                "text": sentence.text,
            }
        )
        parts.append(wave)
        at += wave.size
        if at > MAX_SPEECH_SECONDS * rate:
            raise InputError(
                f"text is longer than {MAX_SPEECH_SECONDS:g} s of speech; split it",
                param="text",
                code="too_large",
            )
    if not timed:
        raise InputError(
            f"nothing in the text can be spoken by this voice ({voice.language}): {text.strip()[:40]!r}",
            param="text",
        )
    parts.append(_silence(LEAD_S, rate))
    buffer = AudioBuffer(np.concatenate(parts)[None, :], rate)
    if params.loudness_lufs is not None:
        # Ten minutes tell how loud a voice is; measuring hours of it would only take memory.
        have = loudness(AudioBuffer(buffer.samples[:, : 600 * rate], rate))
        gain = np.float32(10 ** (min(params.loudness_lufs - have, 30.0) / 20))
        buffer = AudioBuffer(buffer.samples * gain, rate)
    return _Spoken(limit(buffer, -1.0), timed, skipped)


def _voice_name(params: AudioSpeech, voice: Voice) -> str:
    if params.voice is None:
        return voice.voices[0]
    if params.voice not in voice.voices:
        raise InputError(
            f"voice {params.voice!r} is not one of this model's; allowed: {', '.join(voice.voices[:20])}",
            param="voice",
        )
    return params.voice


def _check_language(params: AudioSpeech, voice: Voice) -> None:
    asked, has = params.language, voice.language
    if asked and has != "und" and asked.split("-")[0].lower() != has.split("-")[0].lower():
        raise InputError(
            f"language {asked!r} is not spoken by this voice; it speaks {has}. Name another model",
            param="language",
        )


def _seed(job_seed: int, sentence: int, piece: int) -> int:
    return int(np.random.SeedSequence([job_seed % 2**63, sentence, piece]).generate_state(1)[0])


def _silence(seconds: float, rate: int) -> Samples:
    return np.zeros(round(seconds * rate), np.float32)


def _trim(samples: Samples, rate: int) -> Samples:
    """Cut the silence that the model puts around a sentence, and soften the edges: pauses are set here, evenly."""
    if not samples.size:
        return samples
    loud = np.flatnonzero(np.abs(samples) > max(1e-3, 0.01 * float(np.abs(samples).max())))
    if not loud.size:
        return samples[:0]
    first, last = max(0, int(loud[0]) - rate // 50), min(samples.size, int(loud[-1]) + rate // 25)
    cut = samples[first:last].copy()
    edge = min(rate // 200, cut.size // 2)
    if edge:
        ramp = np.linspace(0, 1, edge, dtype=np.float32)
        cut[:edge] *= ramp
        cut[-edge:] *= ramp[::-1]
    return cut

"""Runner of ``audio.transcribe``."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from contentfactory.errors import FactoryError, InputError
from contentfactory.jobs.audio import MAX_TRANSCRIBE_SECONDS, AudioTranscribe
from worker.context import Failure, JobContext, Output, Yield
from worker.engines.files import ResolvedModel
from worker.engines.whisper import RATE, Recogniser, Samples, Segment, Word, load_recogniser
from worker.media.audio import decode
from worker.runners import runs
from worker.runners.audio.accuracy import compare

WINDOW_S = 600.0
"""Most seconds that a recogniser gets at once: memory stays flat on long recordings."""


def get_recogniser(context: JobContext) -> Recogniser:
    """The micro-batch's recogniser out of the cache."""

    def load(model: ResolvedModel) -> Recogniser:
        return load_recogniser(model, context.device)

    return context.load(load)


@runs(AudioTranscribe)
def transcribe(params: list[AudioTranscribe], context: JobContext) -> Iterator[Yield]:
    """Transcribe each recording alone: what one says cannot leak into its neighbours."""
    recogniser = get_recogniser(context)
    for job, one in enumerate(params):
        try:
            yield from _transcribe(one, recogniser, context, job)
        except FactoryError as error:
            yield Failure(job, error)


def _transcribe(
    params: AudioTranscribe, recogniser: Recogniser, context: JobContext, job: int
) -> Iterator[Output]:
    language = params.language.split("-")[0].lower() if params.language else None
    if language and recogniser.languages and language not in recogniser.languages:
        known = ", ".join(recogniser.languages)
        raise InputError(
            f"language {params.language!r} is not known to this model; it knows {known}", param="language"
        )
    if language is None and len(recogniser.languages) == 1:
        language = recogniser.languages[0]
    source = context.fetch(job, params.audio)
    audio = decode(source, max_seconds=MAX_TRANSCRIBE_SECONDS, sample_rate=RATE, mono=True, name="audio")
    segments: list[Segment] = []
    samples = audio.samples[0]
    for start, end in _windows(samples):
        context.check(job)
        context.progress(job, start / samples.size)
        found, heard = recogniser.transcribe(
            samples[start:end],
            language=language,
            prompt=params.prompt,
            beam_size=params.beam_size,
            skip_silence=params.skip_silence,
        )
        language = language or found
        offset, length = start / RATE, (end - start) / RATE
        for segment in heard:
            context.check(job)
            segments.append(_moved(segment, offset, length))
            context.progress(job, min(1.0, segments[-1].end_s / audio.duration_s))
    text = " ".join(s.text for s in segments)
    meta: dict[str, Any] = {
        "duration_s": round(audio.duration_s, 3), "language": language or "und", "segments": len(segments), "words": len(text.split()),
    }  # fmt: skip
    facts: dict[str, Any] = {"text": text, "language": meta["language"], "duration_s": meta["duration_s"]}
    if params.reference is not None:
        if not str(params.reference).strip():
            raise InputError("reference is empty; leave it out or give the words", param="reference")
        accuracy = compare(str(params.reference), text, meta["language"])
        meta["wer"] = accuracy.wer
        facts |= {"wer": accuracy.wer, "accuracy": asdict(accuracy), "reference": str(params.reference)}
    facts["segments"] = [asdict(s) for s in segments]
    writers = {
        "text": ("transcript.txt", "text/plain"),
        "srt": ("transcript.srt", "application/x-subrip"),
        "vtt": ("transcript.vtt", "text/vtt"),
    }
    name, media_type = writers[params.format]
    body = text + "\n" if params.format == "text" else subtitles(segments, params.format)
    yield Output(job, name, media_type, body.encode(), meta)
    yield Output(
        job,
        "transcript.json",
        "application/json",
        json.dumps(facts, ensure_ascii=False, indent=1).encode(),
        meta,
    )
    context.progress(job, 1.0)


def _windows(samples: Samples) -> Iterator[tuple[int, int]]:
    """Cut a long recording where it is quietest, in the last half minute of each window."""
    start, size, search, block = 0, int(WINDOW_S * RATE), 30 * RATE, RATE // 4
    while samples.size - start > size:
        tail = samples[start + size - search : start + size]
        power = (tail[: tail.size // block * block].reshape(-1, block) ** 2).mean(axis=1)
        end = start + size - search + int(power.argmin()) * block + block // 2
        yield start, end
        start = end
    yield start, samples.size


def _moved(segment: Segment, offset: float, length: float) -> Segment:
    def at(seconds: float) -> float:
        return round(min(max(0.0, float(seconds)), length) + offset, 3)

    words = tuple(Word(at(w.start_s), at(w.end_s), w.text, w.probability) for w in segment.words)
    return replace(segment, start_s=at(segment.start_s), end_s=at(segment.end_s), words=words)


def subtitles(segments: list[Segment], form: str, max_characters: int = 84, max_seconds: float = 6.0) -> str:
    """Segments as SubRip or WebVTT, cut into cues of at most two lines that can be read in time.

    Args:
        segments: With words where the engine gave them; a segment without words stays one cue.
        form: ``srt`` or ``vtt``.
        max_characters: Longest cue, characters; lines break at about half of it.
        max_seconds: Longest cue, seconds.
    """
    cues: list[tuple[float, float, str]] = []
    for segment in segments:
        if not segment.words:
            cues.append((segment.start_s, segment.end_s, segment.text))
            continue
        group: list[Word] = []
        for word in segment.words:
            longer = len(" ".join(w.text for w in [*group, word]))
            if group and (longer > max_characters or word.end_s - group[0].start_s > max_seconds):
                cues.append((group[0].start_s, group[-1].end_s, " ".join(w.text for w in group)))
                group = []
            group.append(word)
        if group:
            cues.append((group[0].start_s, group[-1].end_s, " ".join(w.text for w in group)))
    out = ["WEBVTT\n"] if form == "vtt" else []
    for number, (start, end, text) in enumerate(cues, 1):
        # An arrow or a blank line inside a cue would end it.
        lines = _two_lines(text.replace("-->", "->"), max_characters // 2)
        head = "" if form == "vtt" else f"{number}\n"
        out.append(f"{head}{_clock(start, form)} --> {_clock(max(end, start + 0.05), form)}\n{lines}\n")
    return "\n".join(out)


def _two_lines(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    spaces = [i for i, c in enumerate(text) if c == " "]
    if not spaces:
        return text
    at = min(spaces, key=lambda i: abs(i - len(text) / 2))
    return text[:at] + "\n" + text[at + 1 :]


def _clock(seconds: float, form: str) -> str:
    total = round(seconds * 1000)
    mark = "." if form == "vtt" else ","
    return f"{total // 3_600_000:02d}:{total // 60_000 % 60:02d}:{total // 1000 % 60:02d}{mark}{total % 1000:03d}"


__all__ = ["subtitles", "transcribe"]

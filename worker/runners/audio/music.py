"""Runner of ``audio.music``."""

from collections.abc import Iterator
from functools import partial

from contentfactory.errors import FactoryError, InputError
from contentfactory.jobs.audio import AUDIO_TYPES, AudioMusic
from worker.context import Failure, JobContext, Output, Yield
from worker.engines.synth import midi, render
from worker.media.audio import SILENCE_LUFS, AudioBuffer, encode, fade, loudness, normalize
from worker.runners import runs
from worker.runners.audio.composition import compose


@runs(AudioMusic)
def music(params: list[AudioMusic], context: JobContext) -> Iterator[Yield]:
    """Compose and render each job alone, from its own seed."""
    for job, one in enumerate(params):
        try:
            yield from _music(one, context, job)
        except FactoryError as error:
            yield Failure(job, error)


def _music(params: AudioMusic, context: JobContext, job: int) -> Iterator[Output]:
    def report(fraction: float) -> None:
        context.check(job)
        context.progress(job, fraction)

    report(0.0)
    score = compose(
        params.mood, params.duration_s, context.seeds[job], tempo_bpm=params.tempo_bpm, key=params.key, instruments=params.instruments
    )  # fmt: skip
    if not score.tracks:
        raise InputError(
            f"instruments {params.instruments} have nothing to play in a piece of {params.duration_s:g} s; add one",
            param="instruments",
        )
    rate = params.sample_rate
    wave = AudioBuffer(render(context.model, score, rate, report), rate).fit(round(params.duration_s * rate))
    # The last chord rings over its bar; what is left of it at the end goes out in a fade, never in a click.
    ring_s = params.duration_s - score.facts["bars"] * 240 / score.tempo_bpm
    wave = fade(wave, out_s=min(max(0.6 * ring_s, 0.35), 4.0, params.duration_s / 2))
    wave = normalize(wave, params.loudness_lufs)
    found = loudness(wave)
    if found <= SILENCE_LUFS:
        raise InputError("the piece came out silent; is the soundfont empty?", param="model")
    meta = {
        "duration_s": round(wave.duration_s, 4), "sample_rate": rate, "channels": 2, "loudness_lufs": round(found, 2),
        "tempo_bpm": round(score.tempo_bpm, 3), "key": score.key, "mood": params.mood, "bars": score.facts["bars"],
        "chords": score.facts["chords"], "form": score.facts["form"], "instruments": sorted({t.instrument for t in score.tracks}),
    }  # fmt: skip
    yield Output(
        job, f"music.{params.format}", AUDIO_TYPES[params.format], partial(encode, wave, params.format), meta
    )
    facts = {k: meta[k] for k in ("tempo_bpm", "key", "bars")}
    yield Output(job, "music.mid", "audio/midi", midi(score), facts)
    context.progress(job, 1.0)

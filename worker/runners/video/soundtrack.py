"""The sound of a clip: narration in front, music behind it that gives way to speech.

Everything that needs wider numbers or copies works in stretches, so that ten minutes take little more memory than their
samples.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from worker.media.audio import SILENCE_LUFS, AudioBuffer, channels, duck, fade, limit, loudness

RATE = 48_000
"""Sample rate of clips, Hz."""

_DUAL_MONO = 3.01
"""One voice on two loudspeakers is that much louder than the same samples on one, dB."""

_STRETCH = 30 * RATE
_STEPS = 100
"""Levels and gains are kept that often a second."""


def soundtrack(
    narration: AudioBuffer | None,
    music: AudioBuffer | None,
    samples: int,
    *,
    lead_s: float,
    loudness_lufs: float | None,
    music_gain_db: float,
    duck_db: float,
    fade_in_s: float,
    fade_out_s: float,
) -> npt.NDArray[np.float32]:
    """Mix narration and music to a clip's length.

    Args:
        narration: Mono at `RATE`.
        music: Mono or stereo at `RATE`; repeated or cut to the length.
        samples: Length, samples.
        lead_s: Silence before the narration, seconds.
        loudness_lufs: Loudness of the narration, or of the music where there is none; None changes neither.
        music_gain_db: Music against narration, dB.
        duck_db: How much further the music goes down under speech, dB.
        fade_in_s: Fade of the music at the start, seconds.
        fade_out_s: Fade of the music at the end, seconds; two seconds, or a quarter of the clip, at least.

    Returns:
        Stereo, shape ``(2, samples)``, peaks limited to -1.5 dBFS.
    """
    out = np.zeros((2, samples), np.float32)
    level = loudness_lufs
    envelope: AudioBuffer | None = None
    if music is not None:
        _fill(music, out)
        seconds = samples / RATE
        _fade(out, max(fade_in_s, min(0.25, seconds / 8)), max(fade_out_s, min(2.0, seconds / 4)))
    voice: npt.NDArray[np.float32] | None = None
    if narration is not None:
        heard = _loudness(narration)
        gain = 1.0
        if loudness_lufs is not None and heard > SILENCE_LUFS:
            gain = 10 ** (min(loudness_lufs - _DUAL_MONO - heard, 40.0) / 20)
        elif heard > SILENCE_LUFS:
            level = heard + _DUAL_MONO
        voice = np.zeros((1, samples), np.float32)
        start = min(round(lead_s * RATE), samples)
        part = narration.samples[:, : samples - start]
        np.multiply(part, np.float32(gain), out=voice[:, start : start + part.shape[1]])
        # Peaks of a lively voice are turned down here, so that the music does not dip with them.
        _limit(voice)
        envelope = _envelope(voice[0])
    if music is not None:
        bed_gain = 1.0
        heard = _loudness(music)
        # Mono music is about to sound from two loudspeakers.
        heard += _DUAL_MONO if music.channels == 1 else 0.0
        if level is not None and heard > SILENCE_LUFS:
            wanted = level + (music_gain_db if voice is not None else 0.0)
            bed_gain = 10 ** (min(wanted - heard, 40.0) / 20)
        elif voice is not None:
            bed_gain = 10 ** (music_gain_db / 20)
        curve = np.ones(1, np.float32)
        if envelope is not None and duck_db > 0:
            # Ducking a constant shows the gain.
            steps = math.ceil(samples / RATE * _STEPS) + 1
            curve = duck(AudioBuffer(np.ones((1, steps), np.float32), _STEPS), envelope, depth_db=duck_db)[0]
        for begin, end in _stretches(samples):
            at = np.arange(begin, end) * (_STEPS / RATE)
            out[:, begin:end] *= (np.interp(at, np.arange(curve.size), curve) * bed_gain).astype(np.float32)
    if voice is not None:
        out += voice
    _limit(out)
    return out


def _stretches(samples: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, samples, _STRETCH):
        yield begin, min(begin + _STRETCH, samples)


def _loudness(buffer: AudioBuffer) -> float:
    """Loudness, LUFS: the mean power of the stretches that are not silent."""
    found = [
        loudness(AudioBuffer(buffer.samples[:, a:b], RATE)) for a, b in _stretches(buffer.samples.shape[1])
    ]
    power = [10 ** (one / 10) for one in found if one > SILENCE_LUFS]
    return 10 * math.log10(sum(power) / len(power)) if power else SILENCE_LUFS


def _envelope(voice: npt.NDArray[np.float32]) -> AudioBuffer:
    """Level of a voice, as many times a second as gains are kept: all that ducking looks at."""
    hop = RATE // _STEPS
    out = np.zeros((1, math.ceil(voice.size / hop)), np.float32)
    for begin, end in _stretches(voice.size):
        block = voice[begin:end]
        block = np.pad(block, (0, -block.size % hop)).reshape(-1, hop)
        out[0, begin // hop : begin // hop + len(block)] = np.sqrt(np.mean(np.square(block), axis=1))
    return AudioBuffer(out, _STEPS)


def _fill(music: AudioBuffer, out: npt.NDArray[np.float32]) -> None:
    """Music to the whole length: cut, or repeated with its end faded into its beginning."""
    source = music.samples if music.channels <= 2 else channels(music, 2).samples  # one channel goes to both
    have, samples = source.shape[1], out.shape[1]
    cross = min(round(1.0 * RATE), have // 4)
    angle = np.linspace(0, math.pi / 2, cross, endpoint=False, dtype=np.float32)
    at = 0
    while at < samples:
        n = min(have, samples - at)
        if not at:
            out[:, :n] = source[:, :n]
        else:
            m = min(cross, n)
            out[:, at : at + m] = out[:, at : at + m] * np.cos(angle)[:m] + source[:, :m] * np.sin(angle)[:m]
            out[:, at + m : at + n] = source[:, m:n]
        at += max(1, have - cross)


def _fade(samples: npt.NDArray[np.float32], in_s: float, out_s: float) -> None:
    first, last = min(samples.shape[1], round(in_s * RATE)), min(samples.shape[1], round(out_s * RATE))
    if first:
        samples[:, :first] = fade(AudioBuffer(samples[:, :first], RATE), in_s=in_s).samples
    if last:
        samples[:, -last:] = fade(AudioBuffer(samples[:, -last:], RATE), out_s=out_s).samples


def _limit(samples: npt.NDArray[np.float32]) -> None:
    """`limit`, in place."""
    around = round(0.05 * RATE)
    before = samples[:, :0]
    for begin, end in _stretches(samples.shape[1]):
        # A little of both sides comes along, as it was before: the gain at the seam depends on it.
        part = np.concatenate([before, samples[:, begin : end + around]], axis=1)
        keep = before.shape[1]
        before = samples[:, max(begin, end - around) : end].copy()
        samples[:, begin:end] = limit(AudioBuffer(part, RATE)).samples[:, keep : keep + end - begin]

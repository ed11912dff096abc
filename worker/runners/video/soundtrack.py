"""The sound of a clip: narration in front, music behind it that gives way to speech."""

import math

import numpy as np
import numpy.typing as npt

from worker.media.audio import SILENCE_LUFS, AudioBuffer, channels, duck, fade, limit, loudness

RATE = 48_000
"""Sample rate of clips, Hz."""

_DUAL_MONO = 3.01
"""One voice on two loudspeakers is that much louder than the same samples on one, dB."""


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
    voice: AudioBuffer | None = None
    level = loudness_lufs
    if narration is not None:
        heard = loudness(narration)
        gain = 1.0
        if loudness_lufs is not None and heard > SILENCE_LUFS:
            gain = 10 ** (min(loudness_lufs - _DUAL_MONO - heard, 40.0) / 20)
        elif heard > SILENCE_LUFS:
            level = heard + _DUAL_MONO
        start = min(round(lead_s * RATE), samples)
        placed = np.zeros((1, samples), np.float32)
        part = narration.samples[:, : samples - start]
        np.multiply(part, np.float32(gain), out=placed[:, start : start + part.shape[1]])
        # Peaks of a lively voice are turned down here, so that the music does not dip with them.
        voice = AudioBuffer(_limited(placed), RATE)
        out += voice.samples
    if music is not None:
        bed = _fill(music, samples)
        heard = loudness(bed)
        if level is not None and heard > SILENCE_LUFS:
            wanted = level + (music_gain_db if voice is not None else 0.0)
            bed.samples[:] *= np.float32(10 ** (min(wanted - heard, 40.0) / 20))
        elif voice is not None:
            bed.samples[:] *= np.float32(10 ** (music_gain_db / 20))
        seconds = samples / RATE
        bed = fade(bed, max(fade_in_s, min(0.25, seconds / 8)), max(fade_out_s, min(2.0, seconds / 4)))
        out += duck(bed, voice, depth_db=duck_db) if voice is not None and duck_db > 0 else bed.samples
    return _limited(out)


def _fill(music: AudioBuffer, samples: int) -> AudioBuffer:
    """Music of exactly that length on two channels: cut, or repeated with its end faded into its beginning."""
    source = channels(music, 2).samples
    have = source.shape[1]
    out = np.zeros((2, samples), np.float32)
    cross = min(round(1.0 * RATE), have // 4)
    at = 0
    while at < samples:
        block = source[:, : samples - at].copy()
        if at and cross:
            rise = np.sin(np.linspace(0, math.pi / 2, cross, endpoint=False, dtype=np.float32))
            n = min(cross, block.shape[1])
            block[:, :n] *= rise[:n]
            out[:, at : at + n] *= np.cos(
                np.linspace(0, math.pi / 2, cross, endpoint=False, dtype=np.float32)
            )[:n]
        out[:, at : at + block.shape[1]] += block
        at += max(1, have - cross)
    return AudioBuffer(out, RATE)


def _limited(samples: npt.NDArray[np.float32], stretch_s: float = 20.0) -> npt.NDArray[np.float32]:
    """`limit` in stretches, so that a long clip does not need several times its length in memory."""
    step, around = round(stretch_s * RATE), round(0.05 * RATE)
    out = np.empty_like(samples)
    for start in range(0, samples.shape[1], step):
        low, stop = max(0, start - around), min(start + step, samples.shape[1])
        part = limit(AudioBuffer(samples[:, low : stop + around], RATE)).samples
        out[:, start:stop] = part[:, start - low : stop - low]
    return out

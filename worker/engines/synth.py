"""Rendering a score: the factory's own synthesiser, or a soundfont.

The synthesiser computes every sound: struck and plucked strings (inharmonic partials, Karplus-Strong), frequency-modulated
electric piano and bells, bowed, blown and brass sounds from detuned or breathing partials, drums from swept sines and
shaped noise; then chorus, echo, a room, and a master bus. Equal scores give equal samples.

A soundfont of the user's own (``.sf2``) is played by tinysoundfont, where that package is installed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import signal

from contentfactory.errors import ModelUnavailable
from worker.engines.files import ResolvedModel
from worker.media.audio import AudioBuffer, loudness

Wave = npt.NDArray[np.float32]
Report = Callable[[float], None]


@dataclass(frozen=True)
class Note:
    """One note.

    Args:
        start: Beats from the beginning.
        length: Beats until it is let go.
        pitch: MIDI number; for drums the General MIDI percussion key.
        velocity: ``(0, 1]``.
    """

    start: float
    length: float
    pitch: int
    velocity: float


@dataclass(frozen=True)
class Track:
    """One player.

    Args:
        role: What it plays (``melody``, ``bass`` …).
        instrument: Name in `INSTRUMENTS`, or ``drums``.
        notes: In order of start.
        level: Loudness within the mix, LUFS; only the differences between tracks count.
        pan: ``-1`` left to ``1`` right.
        room: Share sent to the reverb, ``[0, 1]``.
    """

    role: str
    instrument: str
    notes: tuple[Note, ...]
    level: float = -18.0
    pan: float = 0.0
    room: float = 0.25


@dataclass(frozen=True)
class Score:
    """A piece of music.

    Args:
        tempo_bpm: Beats a minute.
        duration_s: Length, seconds.
        tracks: Players.
        key: For example ``C major``.
        room_s: Reverberation time, seconds.
        facts: What else is known of it (chords, form).
    """

    tempo_bpm: float
    duration_s: float
    tracks: tuple[Track, ...]
    key: str
    room_s: float = 1.8
    facts: dict[str, Any] = field(default_factory=dict)


PROGRAMS: dict[str, int] = {
    "piano": 0, "electric_piano": 4, "guitar": 24, "harp": 46, "strings": 48, "pad": 89, "bell": 14, "flute": 73, "brass": 61,
    "pluck": 84, "lead": 80, "bass": 33, "sub_bass": 38, "drums": 0,
}  # fmt: skip
"""General MIDI program of each instrument."""


# Sounds: each takes frequency (Hz), seconds held, velocity and sample rate, and gives a mono wave with its own decay.


def _time(seconds: float, rate: int) -> npt.NDArray[np.float64]:
    return np.arange(max(1, round(seconds * rate))) / rate


def _envelope(
    t: npt.NDArray[np.float64],
    held: float,
    attack: float,
    release: float,
    sustain: float = 1.0,
    decay: float = 0.1,
) -> Any:
    up = np.clip(t / attack, 0, 1)
    shape = up * (sustain + (1 - sustain) * np.exp(-np.maximum(t - attack, 0) / decay))
    return shape * np.where(t > held, np.exp(-np.maximum(t - held, 0) / (release / 3)), 1.0)


def _partials(frequency: float, rate: int, most: int) -> int:
    return max(1, min(most, int(0.42 * rate / frequency)))


def _noise(count: int, key: int) -> Wave:
    return np.random.default_rng(key).standard_normal(count).astype(np.float32)


def _piano(f: float, held: float, v: float, rate: int) -> Any:
    ring = min(7.0, 1.1 * (440 / f) ** 0.45 * 2.4)
    t = _time(min(held + 0.35, ring + 0.5), rate)
    out = np.zeros(t.size)
    stiff = 0.00022 * (f / 220) ** 1.1
    soft = 1.75 - 0.75 * v
    for k in range(1, _partials(f, rate, 14) + 1):
        g = f * k * math.sqrt(1 + stiff * k * k)
        if g > 0.45 * rate:
            break
        strength = k**-soft * (0.35 + abs(math.sin(math.pi * k * 0.125)))  # struck at an eighth of the string
        fall = np.exp(-t * (0.7 + 0.34 * k) / (ring / 3.2))
        slow = np.exp(-t * (0.22 + 0.1 * k) / (ring / 3.2))
        out += strength * (
            (0.75 * fall + 0.25 * slow) * np.sin(2 * np.pi * g * t + 0.3 * k)
            + 0.3 * slow * np.sin(2 * np.pi * g * 1.0007 * t + k)
        )
    knock = _noise(t.size, int(f)) * np.exp(-t * 130)
    out = out * np.clip(t / 0.003, 0, 1) + signal.lfilter([0.12], [1, -0.88], knock) * 0.5 * v
    return out * np.where(t > held, np.exp(-np.maximum(t - held, 0) / 0.09), 1.0) * 0.62


def _electric_piano(f: float, held: float, v: float, rate: int) -> Any:
    t = _time(min(held, 5.0) + 0.4, rate)
    body = np.sin(2 * np.pi * f * t + (0.9 + 1.1 * v) * np.exp(-t * 2.6) * np.sin(2 * np.pi * f * t))
    tine = np.sin(
        2 * np.pi * f * t + 0.5 * v * np.exp(-t * 9) * np.sin(2 * np.pi * min(14 * f, 0.4 * rate) * t)
    )
    wobble = 1 + 0.1 * np.sin(2 * np.pi * 4.6 * t)
    return (
        (0.62 * body + 0.38 * tine)
        * np.exp(-t * (0.55 + f / 900))
        * _envelope(t, held, 0.004, 0.25)
        * wobble
        * 0.8
    )


def _bell(f: float, held: float, v: float, rate: int) -> Any:
    t = _time(3.6, rate)
    out = np.zeros(t.size)
    for ratio, strength, fall in (
        (1, 1, 1.0),
        (2.0, 0.5, 1.5),
        (3.01, 0.3, 2.2),
        (4.16, 0.16, 3.2),
        (5.43, 0.1, 4.6),
        (0.5, 0.12, 0.9),
    ):
        if f * ratio < 0.45 * rate:
            out += (
                strength
                * (0.5 + 0.5 * v) ** (ratio - 1)
                * np.exp(-t * fall * 1.25)
                * np.sin(2 * np.pi * f * ratio * t)
            )
    return out * np.clip(t / 0.004, 0, 1) * np.clip((3.6 - t) / 0.4, 0, 1) * 0.5


def _string(f: float, seconds: float, v: float, rate: int, ring: float, bright: float, place: float) -> Any:
    """A plucked string: noise going round a delay line that loses its treble (Karplus and Strong), tuned by interpolation."""
    delay = rate / f - 0.5
    whole = int(delay)
    part = delay - whole
    loss = 10 ** (-3 / (f * ring))
    line = np.zeros(whole + 3)
    line[0] = 1.0
    line[whole : whole + 3] = -loss * np.array([0.5 * (1 - part), 0.5, 0.5 * part])
    count = max(1, round(seconds * rate))
    burst = np.zeros(count)
    size = min(count, whole + 1)
    burst[:size] = _noise(size, round(f * 10))
    burst[:size] -= burst[:size].mean()
    # A finger is softer than noise: two poles take the hiss away, the less the harder it plucks.
    pole = math.exp(-2 * math.pi * min(0.4, (900 + 5200 * bright * (0.5 + v)) / rate))
    burst = signal.lfilter([(1 - pole) ** 2], np.convolve([1, -pole], [1, -pole]), burst)
    comb = max(1, round(place * whole))
    if comb < count:
        burst[comb:] -= 0.8 * burst[:-comb].copy()
    out = signal.lfilter([1.0], line, burst)
    level = float(np.sqrt(np.mean(out[: min(count, rate // 8)] ** 2))) or 1.0
    return np.tanh(out * (0.3 / level))


def _plucked(
    ring: float, bright: float, place: float, release: float, body: float
) -> Callable[[float, float, float, int], Any]:
    def play(f: float, held: float, v: float, rate: int) -> Any:
        seconds = min(held + release * 1.6, ring)
        t = _time(seconds, rate)
        wave = _string(f, seconds, v, rate, ring, bright, place)[: t.size]
        if body:
            # Two resonances of a wooden box, at about 105 and 210 Hz.
            for centre, width in ((105.0, 1.6), (210.0, 2.2)):
                b, a = signal.iirpeak(centre, width, fs=rate)
                wave = wave + body * signal.lfilter(b, a, wave)
        wave *= _envelope(t, held, 0.001, release) * np.clip((seconds - t) / 0.06, 0, 1)
        return wave * 0.6

    return play


def _sweet(
    f: float,
    held: float,
    rate: int,
    release: float,
    most: int,
    slope: Any,
    voices: tuple[float, ...],
    attack: float,
    vibrato: float,
) -> Any:
    """Several slightly detuned voices of falling partials; ``slope(k, t)`` is the strength of partial k over time."""
    t = _time(held + release, rate)
    out = np.zeros(t.size, np.float32)
    strengths = [np.asarray(slope(k, t), np.float32) for k in range(1, _partials(f, rate, most) + 1)]
    for number, cents in enumerate(voices):
        phase = 2 * np.pi * f * 2 ** (cents / 1200) * t
        if vibrato:
            swing = np.clip((t - 0.25) / 0.5, 0, 1) * np.sin(
                2 * np.pi * (5.1 + 0.31 * number) * t + number * 2.1
            )
            phase += 2 * np.pi * f * vibrato * np.cumsum(swing) / rate
        phase += number
        # Multiples of one sine come from a recurrence: much cheaper than a sine for each partial.
        now, twice = np.sin(phase).astype(np.float32), (2 * np.cos(phase)).astype(np.float32)
        before = np.zeros(t.size, np.float32)
        for strength in strengths:
            out += strength * now
            before, now = now, twice * now - before
    return out / math.sqrt(len(voices)) * _envelope(t, held, attack, release)


def _strings(f: float, held: float, v: float, rate: int) -> Any:
    attack = min(0.16, held * 0.35 + 0.02) * (1.25 - 0.5 * v)
    wave = _sweet(
        f,
        held,
        rate,
        0.5,
        16,
        lambda k, t: k**-1.25 * math.exp(-k * f / (2600 + 3600 * v)),
        (-7, 0, 6.5),
        attack,
        0.0026,
    )
    return wave * 0.34


def _pad(f: float, held: float, v: float, rate: int) -> Any:
    def slope(k: int, t: Any) -> Any:
        return k**-1.5 * np.exp(-k * f / (900 + 700 * v + 350 * np.sin(2 * np.pi * 0.11 * t + f)))

    attack = min(0.9, held * 0.4 + 0.05)
    return _sweet(f, held, rate, 1.4, 10, slope, (-9, -3.5, 4, 9.5), attack, 0.0008) * 0.42


def _flute(f: float, held: float, v: float, rate: int) -> Any:
    strengths = (1.0, 0.34 + 0.2 * v, 0.13, 0.06, 0.025)
    wave = _sweet(f, held, rate, 0.16, 5, lambda k, t: strengths[k - 1], (0.0,), 0.055, 0.0042)
    t = _time(held + 0.16, rate)
    b, a = signal.butter(2, [min(0.9, f * 1.6 / rate * 2), min(0.95, f * 6 / rate * 2)], "band")
    breath = signal.lfilter(b, a, _noise(t.size, int(f))) * _envelope(t, held, 0.03, 0.12, 0.45, 0.07)
    swell = 1 + 0.1 * np.clip((t - 0.25) / 0.5, 0, 1) * np.sin(2 * np.pi * 5.0 * t)
    return (wave * swell + 0.11 * breath) * 0.6


def _brass(f: float, held: float, v: float, rate: int) -> Any:
    def slope(k: int, t: Any) -> Any:
        # A horn opens up with loudness: the upper partials come after the lower ones.
        opening = np.clip(t / (0.03 + 0.012 * k), 0, 1) ** (1 + 0.25 * k)
        return k**-0.9 * math.exp(-k * f / (900 + 1900 * v)) * opening

    return _sweet(f, held, rate, 0.22, 14, slope, (-4, 4), 0.05, 0.002) * 0.5


def _pluck(f: float, held: float, v: float, rate: int) -> Any:
    def slope(k: int, t: Any) -> Any:
        return k**-1.0 * np.exp(-t * (2.2 + 1.7 * k * (1.15 - 0.6 * v)))

    return _sweet(f, min(held, 0.5), rate, 0.35, 12, slope, (-5, 5), 0.003, 0.0) * 0.55


def _lead(f: float, held: float, v: float, rate: int) -> Any:
    def slope(k: int, t: Any) -> Any:
        return (
            (1.0 if k % 2 else 0.35)
            * k**-1.25
            * np.exp(-k * f / (2200 + 1800 * v) - 0.12 * k * np.minimum(t, 1.5))
        )

    return _sweet(f, held, rate, 0.18, 11, slope, (-4.5, 4.5), 0.015, 0.0034) * 0.42


def _bass(f: float, held: float, v: float, rate: int) -> Any:
    t = _time(held + 0.12, rate)
    wave = np.zeros(t.size)
    for k in range(1, _partials(f, rate, 9) + 1):
        wave += k**-1.15 * np.exp(-t * (0.5 + 0.9 * k * (1.2 - 0.6 * v))) * np.sin(2 * np.pi * f * k * t)
    thump = signal.lfilter([0.2], [1, -0.8], _noise(t.size, 5)) * np.exp(-t * 90)
    return np.tanh(1.3 * (wave + 0.25 * thump) * _envelope(t, held, 0.005, 0.1)) * 0.72


def _sub_bass(f: float, held: float, v: float, rate: int) -> Any:
    t = _time(held + 0.18, rate)
    wave = np.sin(2 * np.pi * f * t) + 0.22 * np.sin(4 * np.pi * f * t) + 0.09 * np.sin(6 * np.pi * f * t)
    return np.tanh(1.15 * wave) * _envelope(t, held, 0.018, 0.15) * 0.72


INSTRUMENTS: dict[str, Callable[[float, float, float, int], Any]] = {
    "piano": _piano, "electric_piano": _electric_piano, "bell": _bell, "strings": _strings, "pad": _pad, "flute": _flute,
    "brass": _brass, "pluck": _pluck, "lead": _lead, "bass": _bass, "sub_bass": _sub_bass,
    "guitar": _plucked(ring=2.6, bright=0.55, place=0.18, release=0.3, body=0.55),
    "harp": _plucked(ring=3.6, bright=0.3, place=0.31, release=1.6, body=0.2),
}  # fmt: skip
"""Sound of each pitched instrument."""

KICK, RIM, SNARE, CLAP, CLOSED_HAT, OPEN_HAT, LOW_TOM, MID_TOM, CRASH, RIDE, SHAKER, TIMPANI = (
    36,
    37,
    38,
    39,
    42,
    46,
    45,
    47,
    49,
    51,
    70,
    41,
)


def _high(wave: Any, cut: float, rate: int) -> Any:
    return signal.sosfilt(signal.butter(2, min(cut, 0.45 * rate), "high", fs=rate, output="sos"), wave)


def _band(wave: Any, low: float, high: float, rate: int) -> Any:
    return signal.sosfilt(
        signal.butter(2, [low, min(high, 0.45 * rate)], "band", fs=rate, output="sos"), wave
    )


def _swept(t: Any, start: float, end: float, fall: float) -> Any:
    return np.sin(2 * np.pi * (end * t + (start - end) / fall * (1 - np.exp(-t * fall))))


def _drum(key: int, v: float, rate: int) -> Any:
    """One hit of a General MIDI percussion key."""
    if key == KICK:
        t = _time(0.42, rate)
        click = _high(_noise(t.size, 1), 2500, rate) * np.exp(-t * 320) * 0.16
        return np.tanh(1.6 * _swept(t, 165, 47, 32) * np.exp(-t * 9.5)) * 0.95 + click * v
    if key == SNARE:
        t = _time(0.32, rate)
        wires = _band(_noise(t.size, 2), 1400, 9000, rate) * np.exp(-t * 17)
        return (
            0.5 * (_swept(t, 260, 182, 60) + 0.5 * np.sin(2 * np.pi * 331 * t)) * np.exp(-t * 24)
            + 0.62 * wires
        )
    if key == RIM:
        t = _time(0.12, rate)
        return (np.sin(2 * np.pi * 1720 * t) + 0.6 * np.sin(2 * np.pi * 820 * t)) * np.exp(-t * 75) * 0.36
    if key == CLAP:
        t = _time(0.3, rate)
        bursts = sum(np.where(t >= s, np.exp(-np.maximum(t - s, 0) * 190), 0) for s in (0.0, 0.011, 0.021))
        return (
            _band(_noise(t.size, 3), 850, 4200, rate)
            * (0.6 * bursts + np.where(t >= 0.03, np.exp(-np.maximum(t - 0.03, 0) * 19), 0))
            * 0.75
        )
    if key in (CLOSED_HAT, OPEN_HAT, RIDE, CRASH):
        long = {CLOSED_HAT: 0.09, OPEN_HAT: 0.42, RIDE: 1.1, CRASH: 2.4}[key]
        t = _time(long, rate)
        metal = sum(
            np.sign(np.sin(2 * np.pi * 40 * r * t + r))
            for r in (2.0 * 3.1, 3.0 * 3.3, 4.16 * 3.7, 5.43 * 4.1, 6.79 * 4.4, 8.21 * 4.7)
        )
        wave = 0.1 * metal + 0.75 * _noise(t.size, key)
        wave = _high(wave, 4200 if key in (CRASH, RIDE) else 7000, rate) * np.exp(-t * 4.6 / long)
        if key == RIDE:
            wave = 0.5 * wave + 0.16 * np.sin(2 * np.pi * 3150 * t) * np.exp(-t * 7)
        return wave * np.clip((long - t) / 0.02, 0, 1) * 0.42
    if key == SHAKER:
        t = _time(0.1, rate)
        return _band(_noise(t.size, 6), 4500, 12000, rate) * np.clip(t / 0.018, 0, 1) * np.exp(-t * 42) * 0.55
    if key in (LOW_TOM, MID_TOM):
        t = _time(0.7, rate)
        base = 82 if key == LOW_TOM else 118
        skin = _band(_noise(t.size, key), 200, 2200, rate) * np.exp(-t * 45) * 0.2
        return _swept(t, base * 1.7, base, 22) * np.exp(-t * 6.5) * 0.9 + skin
    # Timpani and whatever else: a low membrane with its four strongest modes.
    t = _time(1.6, rate)
    modes = sum(
        a * np.sin(2 * np.pi * 73.4 * r * t) * np.exp(-t * d)
        for r, a, d in ((1, 1, 2.2), (1.5, 0.6, 2.8), (1.99, 0.35, 3.6), (2.44, 0.2, 4.6))
    )
    return (modes * 0.62 + _band(_noise(t.size, 8), 80, 900, rate) * np.exp(-t * 30) * 0.35) * np.clip(
        (1.6 - t) / 0.1, 0, 1
    )


def _play(track: Track, score: Score, rate: int, report: Report, share: tuple[float, float]) -> Wave:
    """A track as mono samples of the score's length."""
    total = round(score.duration_s * rate)
    out = np.zeros(total + rate, np.float32)
    beat = 60 / score.tempo_bpm
    kept: dict[tuple[int, int, int], Wave] = {}
    size = 0
    for number, note in enumerate(track.notes):
        if number % 16 == 0:
            report(share[0] + (share[1] - share[0]) * number / len(track.notes))
        at = round(note.start * beat * rate)
        if at >= total:
            continue
        # Three shades of touch and a hundredth of a second are as fine as anyone hears: equal notes are computed once.
        touch = min(2, int(note.velocity * 3))
        held = max(0.05, min(note.length * beat, score.duration_s - at / rate))
        key = (note.pitch, 0 if track.instrument == "drums" else round(held * 100), touch)
        wave = kept.get(key)
        if wave is None:
            shade = (0.35, 0.65, 0.95)[touch]
            if track.instrument == "drums":
                wave = np.asarray(_drum(note.pitch, shade, rate), np.float32)
            else:
                frequency = 440.0 * 2 ** ((note.pitch - 69) / 12)
                wave = np.asarray(
                    INSTRUMENTS[track.instrument](frequency, key[1] / 100, shade, rate), np.float32
                )
            if size > 24_000_000:
                kept.clear()
                size = 0
            kept[key] = wave
            size += wave.size
        end = min(out.size, at + wave.size)
        out[at:end] += wave[: end - at] * np.float32(0.25 + 0.75 * note.velocity)
    return out[:total]


@cache
def _room(seconds: float, rate: int) -> Wave:
    """Impulse response of a room, stereo: early reflections, then noise whose treble dies first."""
    t = _time(seconds * 1.1, rate)
    out = np.zeros((2, t.size), np.float32)
    for side in (0, 1):
        tail = np.zeros(t.size)
        for low, high, share in ((90, 500, 0.95), (500, 2500, 1.0), (2500, 9000, 0.5)):
            tail += (
                _band(_noise(t.size, 100 + side), low, high, rate)
                * np.exp(-6.9 * t / (seconds * share))
                * (1.0 if low < 2500 else 0.5)
            )
        tail *= np.clip((t - 0.012) / 0.03, 0, 1)
        for number, delay in enumerate((0.011, 0.019, 0.027, 0.038, 0.047)):
            at = round((delay + 0.0017 * side * (number + 1)) * rate)
            if at < t.size:
                tail[at] += (0.9 - 0.13 * number) * (-1) ** (number + side) * 6
        out[side] = tail
    return (out / np.sqrt((out**2).sum(axis=1, keepdims=True))).astype(np.float32)


_WIDE = frozenset(("strings", "pad", "electric_piano", "lead", "brass"))
_ECHO = frozenset(("bell", "pluck", "lead"))


def _chorus(wave: Wave, rate: int) -> Wave:
    """Mono to stereo: a slowly moving copy on each side."""
    n = np.arange(wave.size)
    out = np.empty((2, wave.size), np.float32)
    for side in (0, 1):
        lag = rate * (0.011 + 0.0035 * np.sin(2 * np.pi * (0.43 + 0.11 * side) * n / rate + 1.9 * side))
        out[side] = 0.75 * wave + 0.55 * np.interp(n - lag, n, wave)
    return out


def synthesize(score: Score, sample_rate: int, report: Report = lambda fraction: None) -> Wave:
    """Render a score with the factory's own sounds.

    Args:
        score: The music.
        sample_rate: Hz.
        report: Called with the share done; may raise to stop.

    Returns:
        float32 of shape ``(2, round(duration_s * sample_rate))``, not yet normalised.
    """
    total = round(score.duration_s * sample_rate)
    dry, send = np.zeros((2, total), np.float32), np.zeros((2, total), np.float32)
    weights = [len(t.notes) * (3.0 if t.instrument in _WIDE else 1.0) + 1 for t in score.tracks]
    done = 0.0
    for track, weight in zip(score.tracks, weights, strict=True):
        share = (0.85 * done / sum(weights), 0.85 * (done + weight) / sum(weights))
        mono = _play(track, score, sample_rate, report, share)
        done += weight
        # Levels are set by ear, as it were: by what each track measures, not by how its sound happens to be computed.
        gain = 10 ** (
            (track.level - loudness(AudioBuffer(mono[None, : 120 * sample_rate], sample_rate))) / 20
        )
        angle = (track.pan + 1) * math.pi / 4
        sides = np.array([[math.cos(angle)], [math.sin(angle)]], np.float32) * np.float32(
            min(gain, 8.0) * math.sqrt(2)
        )
        stereo = (_chorus(mono, sample_rate) if track.instrument in _WIDE else mono[None, :]) * sides
        if track.instrument in _ECHO:
            lag = round(0.75 * 60 / score.tempo_bpm * sample_rate)
            for count in (1, 2, 3):
                if count * lag < total:
                    swapped = stereo[::-1] if count % 2 else stereo
                    send[:, count * lag :] += swapped[:, : total - count * lag] * np.float32(0.24**count)
                    dry[:, count * lag :] += swapped[:, : total - count * lag] * np.float32(0.3**count)
        dry += stereo
        send += stereo * np.float32(track.room)
    report(0.87)
    response = _room(score.room_s, sample_rate)
    for side in (0, 1):
        wet = signal.oaconvolve(send[side], response[side])[:total]
        dry[side] += np.asarray(wet, np.float32) * np.float32(0.9)
        report(0.9 + 0.03 * side)
    sos = signal.butter(2, 32, "high", fs=sample_rate, output="sos")
    out = signal.sosfilt(sos, dry, axis=1)
    # A little glue: loud moments are bent softly instead of being cut.
    level = float(np.sqrt(np.mean(out**2))) or 1.0
    out *= 0.22 / level
    return np.ascontiguousarray(np.tanh(out * 0.8) / 0.8, dtype=np.float32)


def play_soundfont(
    model: ResolvedModel, score: Score, sample_rate: int, report: Report = lambda fraction: None
) -> Wave:
    """Render a score with a soundfont: ``files['weights']``, or the one ``.sf2`` file in ``files['folder']``.

    Returns:
        float32 of shape ``(2, round(duration_s * sample_rate))``, not yet normalised.

    Raises:
        ModelUnavailable: If tinysoundfont is not installed or the file is not a soundfont.
    """
    try:
        import tinysoundfont
    except ImportError:
        raise ModelUnavailable(
            f"model {model.name}: soundfonts need the package tinysoundfont (`pip install --no-deps tinysoundfont`)"
        ) from None
    path = model.files.get("weights")
    if path is None:
        folder = model.files.get("folder")
        found = sorted(folder.glob("*.sf2")) if folder is not None and folder.is_dir() else []
        if len(found) != 1:
            raise ModelUnavailable(
                f"model {model.name}: wanted one .sf2 file in its folder, found {len(found)}"
            )
        path = found[0]
    try:
        synth = tinysoundfont.Synth(gain=-6, samplerate=sample_rate)
        font = synth.sfload(str(path))
    except MemoryError:
        raise
    except Exception as error:
        raise ModelUnavailable(
            f"model {model.name}: {path.name} is not a soundfont ({str(error)[:200]})"
        ) from None
    channel = 0
    events: list[tuple[int, int, int, int, float]] = []
    total = round(score.duration_s * sample_rate)
    beat = 60 / score.tempo_bpm * sample_rate
    for track in score.tracks:
        if track.instrument == "drums":
            at_channel = 9
            synth.program_select(9, font, 128, 0, True)
        else:
            at_channel, channel = channel, channel + (2 if channel == 8 else 1)
            synth.program_select(at_channel, font, 0, PROGRAMS[track.instrument])
        synth.control_change(at_channel, 10, round(63.5 + 63.5 * track.pan))
        synth.control_change(at_channel, 7, max(20, min(127, round(127 * 10 ** ((track.level + 15) / 40)))))
        for note in track.notes:
            start = round(note.start * beat)
            events.append((start, 1, at_channel, note.pitch, note.velocity))
            events.append((start + max(1, round(note.length * beat)), 0, at_channel, note.pitch, 0.0))
    events.sort(key=lambda e: e[:4])
    parts: list[Wave] = []
    position = 0
    for number, (at, on, at_channel, pitch, velocity) in enumerate(events):
        if at >= total:
            break
        if at > position:
            parts.append(np.frombuffer(synth.generate(at - position), np.float32).copy())
            position = at
        if on:
            synth.noteon(at_channel, pitch, max(1, min(127, round(velocity * 127))))
        else:
            synth.noteoff(at_channel, pitch)
        if number % 64 == 0:
            report(0.9 * at / total)
    if position < total:
        parts.append(np.frombuffer(synth.generate(total - position), np.float32).copy())
    return np.ascontiguousarray(np.concatenate(parts).reshape(-1, 2).T)


def render(
    model: ResolvedModel, score: Score, sample_rate: int, report: Report = lambda fraction: None
) -> Wave:
    """Render a score by the model's engine: ``synth`` or ``soundfont``.

    Raises:
        ModelUnavailable: If the engine is another one.
    """
    if model.engine == "synth":
        return synthesize(score, sample_rate, report)
    if model.engine == "soundfont":
        return play_soundfont(model, score, sample_rate, report)
    raise ModelUnavailable(
        f"model {model.name}: engine {model.engine!r} does not render music; allowed: synth, soundfont"
    )


def midi(score: Score) -> bytes:
    """The score as a Standard MIDI File (type 1, 480 ticks a beat)."""
    import io

    import mido

    file = mido.MidiFile(type=1, ticks_per_beat=480)
    head = mido.MidiTrack()
    head.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(score.tempo_bpm), time=0))
    head.append(mido.MetaMessage("time_signature", numerator=4, denominator=4, time=0))
    tonic, _, mode = score.key.partition(" ")
    head.append(mido.MetaMessage("text", text=f"key {tonic} {mode}", time=0))
    file.tracks.append(head)
    for channel, track in zip(_channels(score), score.tracks, strict=True):
        part = mido.MidiTrack()
        part.append(mido.MetaMessage("track_name", name=f"{track.role} ({track.instrument})", time=0))
        if track.instrument != "drums":
            part.append(
                mido.Message("program_change", channel=channel, program=PROGRAMS[track.instrument], time=0)
            )
        part.append(
            mido.Message(
                "control_change", channel=channel, control=10, value=round(63.5 + 63.5 * track.pan), time=0
            )
        )
        events = []
        for note in track.notes:
            start = max(0, round(note.start * 480))
            events.append((start, 1, note.pitch, max(1, min(127, round(note.velocity * 127)))))
            events.append((start + max(1, round(note.length * 480)), 0, note.pitch, 0))
        now = 0
        for at, on, pitch, velocity in sorted(events):
            kind = "note_on" if on else "note_off"
            part.append(mido.Message(kind, channel=channel, note=pitch, velocity=velocity, time=at - now))
            now = at
        file.tracks.append(part)
    out = io.BytesIO()
    file.save(file=out)
    return out.getvalue()


def _channels(score: Score) -> Iterator[int]:
    free = (c for c in range(16) if c != 9)
    for track in score.tracks:
        yield 9 if track.instrument == "drums" else next(free)


__all__ = [
    "INSTRUMENTS",
    "PROGRAMS",
    "Note",
    "Score",
    "Track",
    "midi",
    "play_soundfont",
    "render",
    "synthesize",
]

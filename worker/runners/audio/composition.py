"""Composing: from a mood and a seed to a score.

A piece is built as a song writer would: a key and two chord progressions (one for the theme, one for its contrast), a
form of four-bar phrases with rising layers, a bass line, chords led from one to the next by the smallest movement, a
melody grown from two short motifs that return over changing chords, drums by style with fills, and a cadence onto a last
chord that rings out exactly at the end.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from worker.engines.synth import (
    CLAP,
    CLOSED_HAT,
    CRASH,
    KICK,
    LOW_TOM,
    MID_TOM,
    OPEN_HAT,
    RIM,
    SHAKER,
    SNARE,
    TIMPANI,
    Note,
    Score,
    Track,
)

Rng = np.random.Generator

_SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "lydian": (0, 2, 4, 6, 7, 9, 11),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
_TONICS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_NAMES = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")

_PROGRESSIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "major": (
        (0, 4, 5, 3),
        (0, 5, 3, 4),
        (0, 3, 5, 4),
        (5, 3, 0, 4),
        (0, 2, 3, 4),
        (3, 0, 4, 5),
        (3, 4, 2, 5),
        (0, 3, 1, 4),
    ),
    "minor": (
        (0, 5, 2, 6),
        (0, 3, 5, 4),
        (0, 6, 5, 6),
        (0, 5, 3, 4),
        (5, 6, 0, 2),
        (0, 2, 6, 3),
        (3, 5, 0, 4),
    ),
    "lydian": ((0, 1, 0, 1), (0, 4, 5, 1), (5, 1, 0, 4), (0, 2, 5, 1)),
    "dorian": ((0, 3, 0, 3), (0, 6, 3, 0), (0, 2, 3, 6), (5, 3, 0, 6)),
    "mixolydian": ((0, 6, 3, 0), (0, 3, 6, 3), (0, 4, 6, 3), (3, 6, 0, 0)),
}

_RHYTHMS: dict[str, tuple[tuple[float, ...], ...]] = {  # beats of a bar; negative ones are rests
    "sparse": ((2, 2), (3, 1), (2, 1, 1), (1.5, 0.5, 2), (-1, 1, 2), (1, 3)),
    "medium": ((1, 1, 2), (1.5, 0.5, 1, 1), (1, 0.5, 0.5, 2), (0.5, 0.5, 1, 2), (-0.5, 0.5, 1, 1, 1), (1.5, 1.5, 1), (1, 1, 1, 1)),
    "dense": (
        (0.5, 0.5, 0.5, 0.5, 1, 1), (1, 0.5, 0.5, 1, 0.5, 0.5), (0.5, 1, 0.5, 1, 1), (-0.5, 0.5, 0.5, 0.5, 1, 1),
        (0.75, 0.75, 0.5, 1, 1), (0.75, 0.75, 0.5, 0.5, 0.5, 1),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Mood:
    tempo: tuple[float, float]
    modes: tuple[str, ...]
    players: dict[str, str]
    density: str
    comp: str
    bass: str
    drums: str
    room_s: float
    colour: int
    tonics: tuple[int, ...] = (0, 2, 3, 5, 7, 8, 9, 10)
    velocity: float = 0.7


_MOODS: dict[str, _Mood] = {
    "calm": _Mood(
        (70, 80), ("major", "lydian"),
        {"chords": "electric_piano", "pad": "pad", "bass": "sub_bass", "arp": "harp", "melody": "flute"},
        "sparse", "half", "hold", "soft", 2.2, 7, velocity=0.58,
    ),
    "happy": _Mood(
        (108, 120), ("major",),
        {"chords": "guitar", "bass": "bass", "melody": "bell", "arp": "pluck", "pad": "strings", "drums": "drums"},
        "medium", "strum", "fifths", "pop", 1.3, 5, velocity=0.75,
    ),
    "sad": _Mood(
        (62, 72), ("minor",),
        {"chords": "piano", "pad": "strings", "bass": "sub_bass", "melody": "piano", "counter": "flute"},
        "sparse", "broken", "hold", "none", 2.6, 5, velocity=0.55,
    ),
    "epic": _Mood(
        (86, 100), ("minor", "dorian"),
        {"arp": "strings", "pad": "pad", "chords": "brass", "bass": "sub_bass", "melody": "brass", "counter": "strings", "drums": "drums"},
        "medium", "swell", "pulse", "epic", 2.8, 5, velocity=0.8,
    ),
    "ambient": _Mood(
        (58, 66), ("lydian", "dorian"),
        {"pad": "pad", "chords": "strings", "bass": "sub_bass", "melody": "bell", "arp": "harp"},
        "sparse", "hold", "hold", "none", 4.2, 9, velocity=0.5,
    ),
    "upbeat": _Mood(
        (118, 128), ("major", "mixolydian", "dorian"),
        {"chords": "electric_piano", "arp": "pluck", "bass": "bass", "melody": "lead", "pad": "pad", "drums": "drums"},
        "dense", "offbeat", "offbeat", "dance", 1.5, 7, velocity=0.8,
    ),
}  # fmt: skip

_SUITS: dict[str, tuple[str, ...]] = {
    "melody": (
        "flute",
        "lead",
        "brass",
        "bell",
        "piano",
        "electric_piano",
        "guitar",
        "pluck",
        "harp",
        "strings",
        "pad",
    ),
    "chords": (
        "piano",
        "electric_piano",
        "guitar",
        "harp",
        "strings",
        "pad",
        "brass",
        "pluck",
        "bell",
        "lead",
    ),
    "pad": ("pad", "strings", "brass"),
    "arp": ("pluck", "harp", "guitar", "piano", "bell", "electric_piano", "strings"),
    "counter": ("flute", "strings", "brass", "bell", "lead", "pluck", "harp"),
    "bass": ("bass", "sub_bass", "piano", "electric_piano", "guitar", "strings", "harp", "brass"),
    "drums": ("drums",),
}
"""Which instruments suit a role, best first."""

_MIX: dict[str, tuple[float, float, float]] = {  # loudness in the mix (LUFS), pan, room
    "melody": (-15.0, 0.06, 0.3), "chords": (-20.0, -0.22, 0.24), "pad": (-22.5, 0.0, 0.42), "arp": (-22.0, 0.34, 0.3),
    "counter": (-21.0, -0.36, 0.38), "bass": (-19.0, 0.0, 0.05), "drums": (-17.0, 0.0, 0.1),
}  # fmt: skip
_TRIM: dict[str, dict[str, float]] = {  # what a mood brings forward or takes back, dB
    "ambient": {"melody": -4, "pad": 3, "chords": 0, "arp": -2}, "epic": {"drums": 1, "arp": 3, "melody": -1, "pad": 1},
    "upbeat": {"drums": 2, "bass": 1, "melody": -2.5}, "calm": {"melody": -2, "arp": -1}, "happy": {"chords": 2},
    "sad": {"chords": 2},
}  # fmt: skip
_RANGE = {  # lowest and highest melody pitch
    "flute": (69, 89), "bell": (72, 91), "brass": (55, 74), "lead": (64, 84), "piano": (64, 86), "electric_piano": (62, 82),
    "guitar": (57, 79), "pluck": (64, 84), "harp": (62, 84), "strings": (60, 81), "pad": (60, 79),
}  # fmt: skip

_PATTERNS: dict[str, dict[int, str]] = {  # sixteenths of a bar; X is an accent
    "soft": {
        KICK: "x.........x.....",
        RIM: "....x.......x...",
        CLOSED_HAT: "x.x.x.x.x.x.x.xx",
        SHAKER: "..x...x...x...x.",
    },
    "pop": {
        KICK: "X.....x.X.......",
        SNARE: "....X.......X...",
        CLOSED_HAT: "X.x.X.x.X.x.X.x.",
        SHAKER: "..x...x...x...x.",
    },
    "dance": {
        KICK: "X...X...X...X...",
        CLAP: "....X.......X...",
        OPEN_HAT: "..x...x...x...x.",
        SHAKER: "x.xxx.xxx.xxx.xx",
    },
    "epic": {
        TIMPANI: "X.......x.....x.",
        LOW_TOM: "X..x..x.X..x..x.",
        MID_TOM: "....x.......x.x.",
        SNARE: "............x...",
    },
}


@dataclass(frozen=True)
class _Chord:
    degree: int
    raised: bool  # the dominant of a minor key takes its leading note


@dataclass(frozen=True)
class _Bar:
    chord: _Chord
    layers: frozenset[str]
    theme: str
    place: int  # bar within its phrase
    phrase: int
    last_of_phrase: bool
    energy: float


def compose(
    mood: str,
    duration_s: float,
    seed: int,
    *,
    tempo_bpm: float | None = None,
    key: str | None = None,
    instruments: Sequence[str] | None = None,
) -> Score:
    """Write a piece.

    Args:
        mood: One of ``calm``, ``happy``, ``sad``, ``epic``, ``ambient``, ``upbeat``.
        duration_s: Length, seconds; the last chord dies away exactly there.
        seed: Everything that is drawn comes from it.
        tempo_bpm: Beats a minute; without it the mood's own, moved a little so that whole bars fill the length.
        key: For example ``C``, ``F# minor``, ``Bb major``; a bare note keeps the mood's own scale.
        instruments: Which may play; each of them does.

    Raises:
        KeyError: If the mood is unknown.
    """
    style = _MOODS[mood]
    rng = np.random.default_rng(np.random.SeedSequence([seed % 2**63, 77]))
    tonic, mode = _key(key, style, rng)
    tempo, bars = _tempo(style, duration_s, tempo_bpm, rng)
    players = _cast(style, instruments)
    first, second = _progressions(mode, rng)
    plan = _form(bars, first, second, mode, rng)
    voicings = _lead_voices([bar.chord for bar in plan], tonic, mode, style.colour)
    total_beats = duration_s * tempo / 60
    last = max(0.0, total_beats - bars * 4)
    tracks = []
    for role, instrument in players.items():
        part = np.random.default_rng(np.random.SeedSequence([seed % 2**63, 78, sum(role.encode())]))
        notes = _part(role, instrument, style, plan, voicings, tonic, mode, last, part)
        notes = [n for n in notes if n.start < total_beats - 0.01]
        if not notes:
            continue
        level, pan, room = _MIX[role.rstrip("23456789")]
        level += _TRIM[mood].get(role, 0.0)
        tracks.append(
            Track(role, instrument, tuple(sorted(notes, key=lambda n: (n.start, n.pitch))), level, pan, room)
        )
    facts = {
        "mode": mode, "bars": bars, "theme": [_roman(d, mode) for d in first], "contrast": [_roman(d, mode) for d in second],
        "chords": [_roman(b.chord.degree, mode, b.chord.raised) for b in plan],
        "form": "".join(bar.theme for bar in plan if bar.place == 0),
    }  # fmt: skip
    return Score(tempo, duration_s, tuple(tracks), f"{_NAMES[tonic]} {mode}", style.room_s, facts)


def _key(key: str | None, style: _Mood, rng: Rng) -> tuple[int, str]:
    mode = str(rng.choice(style.modes))
    tonic = int(rng.choice(style.tonics))
    if key is None:
        return tonic, mode
    note, rest = key[:1], key[1:].strip()
    tonic = _TONICS[note]
    if rest[:1] in ("#", "b"):
        tonic += 1 if rest[0] == "#" else -1
        rest = rest[1:].strip()
    if rest:
        wanted = "major" if rest.startswith("maj") else "minor"
        bright = mode in ("major", "lydian", "mixolydian")
        # 'A minor' over a mood that leans dorian may stay dorian: it is a minor scale too; a major key never turns minor.
        mode = wanted if bright != (wanted == "major") or wanted == "minor" else "major"
    return tonic % 12, mode


def _tempo(style: _Mood, duration_s: float, wanted: float | None, rng: Rng) -> tuple[float, int]:
    """Tempo, and bars before the last chord."""
    own = wanted if wanted is not None else float(rng.uniform(*style.tempo))
    length = duration_s * own / 240  # in bars
    if wanted is not None:
        return own, max(1, math.floor(length) - 1) if length >= 2 else 1
    bars = max(1, round(length - 1))
    if length < 1.6:
        return own, 1
    # The last chord gets one bar: the tempo moves a little so that all comes out even.
    return float(np.clip((bars + 1) * 240 / duration_s, own * 0.8, own * 1.25)), bars


def _cast(style: _Mood, wanted: Sequence[str] | None) -> dict[str, str]:
    if not wanted:
        return dict(style.players)
    pool = list(dict.fromkeys(wanted))
    pitched = [i for i in pool if i != "drums"]
    cast: dict[str, str] = {}
    for role in ("melody", "chords", "bass", "pad", "arp", "counter", "drums"):
        fitting = [i for i in _SUITS[role] if i in pool]
        default = style.players.get(role)
        if default in pool:
            cast[role] = str(default)
        elif fitting and (default is not None or role == "drums"):
            unused = [i for i in fitting if i not in cast.values()]
            cast[role] = (unused or fitting)[0]
        elif role in ("melody", "chords") and pitched and not set(pitched) <= {"bass", "sub_bass"}:
            cast[role] = next(i for i in pitched if i not in ("bass", "sub_bass"))
    for one in pool:
        if one in cast.values():
            continue
        # Nobody whom the user named sits idle: take a role that another one fills twice, or double the tune.
        doubled = [r for r, i in cast.items() if list(cast.values()).count(i) > 1 and one in _SUITS[r]]
        spare = [
            r
            for r in ("arp", "pad", "counter", "chords", "melody", "bass")
            if r not in cast and one in _SUITS[r]
        ]
        extra = "bass" if one in ("bass", "sub_bass") else "counter"
        numbered = [f"{extra}{n}" for n in range(2, 10) if f"{extra}{n}" not in cast]
        cast[(doubled or spare or numbered)[0]] = one
    return cast


def _progressions(mode: str, rng: Rng) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pool = _PROGRESSIONS[mode]
    home = [p for p in pool if p[0] == 0]  # the theme begins at home
    first = home[int(rng.integers(len(home)))]
    others = [p for p in pool if p != first]
    return first, others[int(rng.integers(len(others)))]


def _form(bars: int, first: tuple[int, ...], second: tuple[int, ...], mode: str, rng: Rng) -> list[_Bar]:
    """The bars with their chords, layers and energy."""
    # What does not fill a phrase goes before the theme, or, of three bars, two prolong the last phrase.
    intro = (0, 1, 2, 1)[bars % 4] if bars > 4 else 0
    phrases = max(1, (bars - intro) // 4)
    if phrases <= 2:
        themes = ["A"] * phrases
    else:
        themes = [("A", "A", "B")[n % 3] if phrases > 4 else "AB"[n % 2] for n in range(phrases)]
        themes[-1] = "A"
        for breath in range(7, phrases - 1, 8):
            themes[breath - 3] = "C"  # a breath now and then: the theme's chords, few players
    plan: list[_Bar] = []
    for n in range(intro):
        degree = first[n % len(first)]
        plan.append(
            _Bar(_Chord(degree, False), frozenset(("pad", "chords")), "i", n, 0, n == intro - 1, 0.35)
        )
    for index, theme in enumerate(themes):
        share = index / max(1, phrases - 1)
        energy = {"A": 0.6 + 0.35 * share, "B": 0.85, "C": 0.4}[theme]
        layers = {"pad", "chords", "bass", "melody"}
        if theme == "C":
            layers = {"pad", "chords", "melody", "arp"}
        elif index > 0 or phrases <= 2:
            layers |= {"arp", "drums", "counter"}
        elif bars >= 12:
            layers |= {"drums"} if intro else {"arp"}
        chords = second if theme == "B" else first
        final = index == phrases - 1
        size = bars - len(plan) if final else 4
        for place in range(size):
            degree = chords[place % 4]
            # A phrase before a new theme, and the last one, lean on the dominant.
            if place == size - 1 and size > 1 and (final or themes[min(index + 1, phrases - 1)] != theme):
                degree = (
                    4 if mode in ("major", "minor") else {"lydian": 1, "dorian": 3, "mixolydian": 6}[mode]
                )
            raised = mode == "minor" and degree == 4
            plan.append(
                _Bar(
                    _Chord(degree, raised),
                    frozenset(layers),
                    theme,
                    place,
                    index + 1,
                    place == size - 1,
                    energy,
                )
            )
    return plan[:bars]


def _roman(degree: int, mode: str, raised: bool = False) -> str:
    scale = _SCALES[mode]
    third = (scale[(degree + 2) % 7] - scale[degree]) % 12
    fifth = (scale[(degree + 4) % 7] - scale[degree]) % 12
    name = ("I", "II", "III", "IV", "V", "VI", "VII")[degree]
    return name if third == 4 or raised else name.lower() + ("°" if fifth == 6 else "")


def _pitch(degree: int, tonic: int, mode: str, chord: _Chord | None = None) -> int:
    """MIDI pitch of a scale degree counted from the tonic near middle C (degree 0)."""
    octave, step = divmod(degree, 7)
    raised = 1 if chord is not None and chord.raised and step == 6 else 0
    return 60 + (tonic if tonic < 7 else tonic - 12) + 12 * octave + _SCALES[mode][step] + raised


def _lead_voices(chords: list[_Chord], tonic: int, mode: str, colour: int) -> list[list[int]]:
    """Voicings between about E3 and G5, each as near as possible to the one before."""
    out: list[list[int]] = []
    previous: list[int] | None = None
    for chord in chords:
        steps = [chord.degree, chord.degree + 2, chord.degree + 4]
        if colour >= 7 and not chord.raised:
            steps.append(chord.degree + 6)
        if colour >= 9:
            steps.append(chord.degree + 8)
        classes = [_pitch(s, tonic, mode, chord) % 12 for s in steps]
        if (
            _pitch(chord.degree + 6, tonic, mode, chord) % 12 == (classes[0] + 11) % 12
            and len(classes) == 4
            and chord.degree not in (0, 3)
        ):
            classes.pop()  # a major seventh sits well on I and IV only
        options = []
        for turn in range(len(classes)):
            order = classes[turn:] + classes[:turn]
            for base in range(50, 64):
                if base % 12 != order[0]:
                    continue
                notes = [base]
                for c in order[1:]:
                    notes.append(notes[-1] + ((c - notes[-1]) % 12 or 12))
                if notes[-1] <= 79:
                    options.append(notes)
        centre = previous or [55, 60, 64]
        best = min(options, key=lambda n: _movement(n, centre) + 0.2 * abs(sum(n) / len(n) - 62))
        out.append(best)
        previous = best
    return out


def _movement(a: list[int], b: list[int]) -> float:
    return sum(min(abs(x - y) for y in b) for x in a) + sum(min(abs(x - y) for x in a) for y in b)


def _part(
    role: str, instrument: str, style: _Mood, plan: list[_Bar], voicings: list[list[int]], tonic: int, mode: str, last: float, rng: Rng,
) -> list[Note]:  # fmt: skip
    if role == "drums":
        return _drums(style, plan, last, rng)
    writers: dict[str, Any] = {
        "chords": _chords, "pad": _pad, "arp": _arpeggio, "bass": _bass, "melody": _melody, "counter": _counter,
    }  # fmt: skip
    notes = writers[role.rstrip("23456789")](instrument, style, plan, voicings, tonic, mode, last, rng)
    return [_human(n, rng) for n in notes]


def _human(note: Note, rng: Rng) -> Note:
    """Nobody plays like a clock: a few milliseconds and a shade of touch."""
    shift = float(rng.normal(0, 0.006)) if note.start > 0 else abs(float(rng.normal(0, 0.004)))
    return replace(
        note,
        start=max(0.0, note.start + shift),
        velocity=float(np.clip(note.velocity + rng.normal(0, 0.035), 0.1, 1)),
    )


def _final(voicing: list[int], tonic: int, mode: str, colour: int) -> list[int]:
    """The last chord: the tonic triad, close to the chord before, with a ninth where the mood is dreamy."""
    steps = (0, 2, 4, 8) if colour >= 7 else (0, 2, 4)
    return _lead_from(voicing, [_pitch(step, tonic, mode) % 12 for step in steps])


def _lead_from(previous: list[int], classes: list[int]) -> list[int]:
    found = []
    for c in classes:
        found.append(
            min((p for p in range(50, 80) if p % 12 == c), key=lambda p: min(abs(p - q) for q in previous))
        )
    return sorted(set(found))


def _chords(
    instrument: str,
    style: _Mood,
    plan: list[_Bar],
    voicings: list[list[int]],
    tonic: int,
    mode: str,
    last: float,
    rng: Rng,
) -> list[Note]:
    out: list[Note] = []
    comp = style.comp
    if instrument in ("strings", "pad", "brass") and comp in ("strum", "broken", "offbeat"):
        comp = "half"
    for number, (bar, notes) in enumerate(zip(plan, voicings, strict=True)):
        if "chords" not in bar.layers:
            continue
        at, v = number * 4.0, style.velocity * (0.7 + 0.3 * bar.energy)
        if comp == "hold":
            out += [Note(at, 4.0, p, v * 0.9) for p in notes]
        elif comp == "half":
            out += [Note(at + s, 2.0 - 0.1, p, v * (1 - 0.12 * (s > 0))) for s in (0, 2) for p in notes]
        elif comp == "swell":
            # Horns hold the chord and push once more before the bar line when the music is up.
            hits = ((0, 2.9), (3, 0.9)) if bar.energy > 0.7 else ((0, 3.8),)
            out += [Note(at + s, n, p - 12 if p > 67 else p, v * 0.72) for s, n in hits for p in notes[:3]]
        elif comp == "strum":
            for s, down, strong in (
                (0, True, 1.0),
                (1, True, 0.7),
                (1.5, False, 0.6),
                (2.5, False, 0.75),
                (3, True, 0.75),
                (3.5, False, 0.6),
            ):
                order = notes if down else notes[::-1]
                out += [
                    Note(at + s + 0.022 * i, 0.62, p, v * strong * (1 - 0.05 * i))
                    for i, p in enumerate(order)
                ]
        elif comp == "broken":
            pattern = [notes[0], notes[1 % len(notes)], notes[-1], notes[1 % len(notes)]]
            for i in range(8):
                out.append(
                    Note(
                        at + i * 0.5,
                        1.4,
                        pattern[i % 4] + (12 if i == 6 else 0),
                        v * (0.85 if i % 4 else 1.0),
                    )
                )
        else:  # offbeat
            out += [Note(at + s, 0.4, p, v * 0.85) for s in (0.5, 1.5, 2.5, 3.5) for p in notes]
    if last > 0.05 and plan:
        end = len(plan) * 4.0
        roll = (
            0.06
            if comp in ("strum", "broken", "half") and instrument not in ("strings", "pad", "brass")
            else 0.0
        )
        out += [
            Note(end + roll * i, max(0.3, last), p, style.velocity * 0.85)
            for i, p in enumerate(_final(voicings[-1], tonic, mode, style.colour))
        ]
    return out


def _pad(
    instrument: str,
    style: _Mood,
    plan: list[_Bar],
    voicings: list[list[int]],
    tonic: int,
    mode: str,
    last: float,
    rng: Rng,
) -> list[Note]:
    out: list[Note] = []
    for number, (bar, notes) in enumerate(zip(plan, voicings, strict=True)):
        if "pad" in bar.layers:
            out += [
                Note(number * 4.0, 4.0, p, style.velocity * (0.55 + 0.3 * bar.energy))
                for p in (notes[0], *notes[1:4])
            ]
    if last > 0.05:
        out += [
            Note(len(plan) * 4.0, max(0.3, last), p, style.velocity * 0.7)
            for p in _final(voicings[-1], tonic, mode, style.colour)
        ]
    return out


def _arpeggio(
    instrument: str,
    style: _Mood,
    plan: list[_Bar],
    voicings: list[list[int]],
    tonic: int,
    mode: str,
    last: float,
    rng: Rng,
) -> list[Note]:
    shapes = (
        (0, 1, 2, 3, 2, 1, 2, 1),
        (0, 2, 1, 2, 3, 2, 1, 2),
        (0, 1, 2, 1, 3, 1, 2, 1),
        (3, 2, 1, 0, 1, 2, 1, 2),
    )
    shape = shapes[int(rng.integers(len(shapes)))]
    step = 0.5 if style.density != "dense" and instrument != "strings" else 0.25
    if instrument == "strings":
        step = 0.5  # an ostinato of short bows
    held = 0.9 * step if instrument in ("strings", "pluck") else 1.6
    lift = 12 if instrument in ("pluck", "harp", "bell") else 0
    out: list[Note] = []
    for number, (bar, notes) in enumerate(zip(plan, voicings, strict=True)):
        if "arp" not in bar.layers:
            continue
        ladder = [*notes[:3], notes[0] + 12]
        v = style.velocity * (0.5 + 0.35 * bar.energy)
        for i in range(round(4 / step)):
            accent = 1.0 if i % 4 == 0 else 0.78
            out.append(Note(number * 4.0 + i * step, held, ladder[shape[i % 8]] + lift, v * accent))
    if last > 1.0:
        end, notes = len(plan) * 4.0, _final(voicings[-1], tonic, mode, 5)
        out += [
            Note(end + 0.25 * i, max(0.5, last - 0.25 * i), p + lift, style.velocity * 0.6)
            for i, p in enumerate(notes)
        ]
    return out


def _bass(
    instrument: str,
    style: _Mood,
    plan: list[_Bar],
    voicings: list[list[int]],
    tonic: int,
    mode: str,
    last: float,
    rng: Rng,
) -> list[Note]:
    out: list[Note] = []

    def low(chord: _Chord, step: int = 0) -> int:
        pitch = _pitch(chord.degree + step, tonic, mode, chord)
        while pitch > 45:
            pitch -= 12
        return pitch if pitch >= 31 else pitch + 12

    for number, bar in enumerate(plan):
        if "bass" not in bar.layers:
            continue
        at, v = number * 4.0, style.velocity * (0.8 + 0.2 * bar.energy)
        root, fifth = low(bar.chord), low(bar.chord, 4)
        following = low(plan[number + 1].chord) if number + 1 < len(plan) else low(_Chord(0, False))
        if style.bass == "hold":
            if bar.energy > 0.75:
                out += [Note(at, 2.9, root, v), Note(at + 3, 0.95, fifth, v * 0.8)]
            else:
                out.append(Note(at, 3.95, root, v))
        elif style.bass == "fifths":
            out += [
                Note(at, 1.4, root, v),
                Note(at + 1.5, 0.45, root, v * 0.75),
                Note(at + 2, 1.0, fifth, v * 0.9),
            ]
            approach = following + (2 if following < root else -1 if following == root else -2)
            out.append(Note(at + 3, 0.45, root, v * 0.75))
            # A step towards the next root keeps the line walking.
            out.append(Note(at + 3.5, 0.45, _in_scale(approach, tonic, mode), v * 0.75))
        elif style.bass == "pulse":
            out += [Note(at + 0.5 * i, 0.42, root, v * (1.0 if i % 2 == 0 else 0.75)) for i in range(8)]
        else:  # offbeat
            out += [
                Note(at + s, 0.42, p, v) for s, p in ((0.5, root), (1.5, root), (2.5, root + 12), (3.5, root))
            ]
            if bar.last_of_phrase:
                out.append(Note(at + 3.75, 0.22, _in_scale(following - 2, tonic, mode), v * 0.8))
    if last > 0.05:
        out.append(Note(len(plan) * 4.0, max(0.3, last), low(_Chord(0, False)), style.velocity * 0.9))
    return out


def _in_scale(pitch: int, tonic: int, mode: str) -> int:
    allowed = {(tonic + s) % 12 for s in _SCALES[mode]}
    return next(p for d in (0, 1, -1, 2) if (p := pitch + d) % 12 in allowed)


@dataclass(frozen=True)
class _Motif:
    rhythm: tuple[tuple[float, ...], tuple[float, ...]]
    steps: tuple[tuple[int, ...], tuple[int, ...]]


def _motif(density: str, rng: Rng) -> _Motif:
    """Two bars of rhythm and of steps up and down the scale: mostly neighbours, a leap now and then, answered by a turn."""
    pool = _RHYTHMS[density]
    one, two = (pool[int(i)] for i in rng.permutation(len(pool))[:2])
    steps = []
    for rhythm in (one, two):
        moves: list[int] = []
        way = 1 if rng.random() < 0.6 else -1
        for _ in rhythm:
            size = int(rng.choice((0, 1, 2, 3), p=(0.12, 0.55, 0.23, 0.1)))
            if moves and abs(moves[-1]) >= 2:
                way = -way if moves[-1] * way > 0 else way
            elif rng.random() < 0.3:
                way = -way
            moves.append(way * size)
        steps.append(tuple(moves))
    return _Motif((one, two), (steps[0], steps[1]))


def _melody(
    instrument: str,
    style: _Mood,
    plan: list[_Bar],
    voicings: list[list[int]],
    tonic: int,
    mode: str,
    last: float,
    rng: Rng,
) -> list[Note]:
    low, high = _RANGE.get(instrument, (62, 82))
    motifs = {"A": _motif(style.density, rng), "B": _motif(style.density, rng)}
    motifs["C"] = motifs["A"]
    closing = ((1, 1, -2), (2, -2), (1.5, 0.5, -2), (3, -1))[int(rng.integers(4))]
    centre = (low + high) / 2
    out: list[Note] = []
    degree = _nearest(lambda d: _pitch(d, tonic, mode), centre)
    for number, bar in enumerate(plan):
        if "melody" not in bar.layers:
            continue
        motif = motifs[bar.theme if bar.theme in motifs else "A"]
        home = centre + (4 if bar.theme == "B" else 0)
        if bar.place == 0 and bar.phrase > 0:
            degree = _nearest(lambda d, h=home: _pitch(d, tonic, mode), home)
        half = bar.place % 2
        rhythm = closing if bar.last_of_phrase else motif.rhythm[half]
        steps = motif.steps[half]
        tones = {(bar.chord.degree + s) % 7 for s in (0, 2, 4)}
        beat = 0.0
        for index, length in enumerate(rhythm):
            size = abs(length)
            if length > 0:
                step = steps[index % len(steps)]
                degree += step
                if not low <= _pitch(degree, tonic, mode, bar.chord) <= high:
                    degree -= 2 * step  # at the edge of the instrument the line turns round
                pitch = _pitch(degree, tonic, mode, bar.chord)
                # Still out of reach: come back by an octave.
                while pitch > high:
                    degree -= 7
                    pitch = _pitch(degree, tonic, mode, bar.chord)
                while pitch < low:
                    degree += 7
                    pitch = _pitch(degree, tonic, mode, bar.chord)
                strong = beat in (0.0, 2.0) or size >= 1.5
                if strong and degree % 7 not in tones:
                    degree = min(
                        (degree + d for d in (-1, 1, -2, 2)),
                        key=lambda d: (d % 7 not in tones, abs(d - degree)),
                    )
                    pitch = _pitch(degree, tonic, mode, bar.chord)
                accent = 1.0 if beat in (0.0, 2.0) else 0.86
                out.append(
                    Note(
                        number * 4.0 + beat,
                        size * 0.94,
                        pitch,
                        style.velocity * (0.8 + 0.25 * bar.energy) * accent,
                    )
                )
            beat += size
    if last > 0.05 and out:
        goal = min(
            (d for d in range(-14, 22) if d % 7 in (0, 2)),
            key=lambda d: abs(d - degree) + (0.5 if d % 7 else 0),
        )
        out.append(Note(len(plan) * 4.0, max(0.3, last), _pitch(goal, tonic, mode), style.velocity * 0.85))
    return out


def _nearest(pitch: Any, wanted: float) -> int:
    return min(range(-14, 22), key=lambda d: abs(pitch(d) - wanted))


def _counter(
    instrument: str,
    style: _Mood,
    plan: list[_Bar],
    voicings: list[list[int]],
    tonic: int,
    mode: str,
    last: float,
    rng: Rng,
) -> list[Note]:
    """Long answering notes above the chords: the third or fifth, moving by the smallest step."""
    low, high = _RANGE.get(instrument, (62, 82))
    out: list[Note] = []
    at = (low + high) / 2
    for number, bar in enumerate(plan):
        if "counter" not in bar.layers:
            continue
        classes = {_pitch(bar.chord.degree + s, tonic, mode, bar.chord) % 12 for s in (2, 4)}
        pitch = min(
            (p for p in range(low, high + 1) if p % 12 in classes), key=lambda p, a=at: (abs(p - a), p)
        )
        at = pitch
        start = 2.0 if bar.place % 2 else 0.0
        out.append(
            Note(number * 4.0 + start, 4.0 - start - 0.1, pitch, style.velocity * (0.55 + 0.25 * bar.energy))
        )
    return out


def _drums(style: _Mood, plan: list[_Bar], last: float, rng: Rng) -> list[Note]:
    pattern = _PATTERNS["soft" if style.drums == "none" else style.drums]
    out: list[Note] = []
    played = False
    for number, bar in enumerate(plan):
        if "drums" not in bar.layers:
            continue
        at = number * 4.0
        fill = bar.last_of_phrase and number > 0
        if bar.place == 0 and bar.phrase > 1 and style.drums in ("pop", "dance", "epic"):
            out.append(Note(at, 1.0, CRASH, 0.6))
        for key, line in pattern.items():
            quiet = key in (SHAKER,) and bar.energy < 0.7
            for i, mark in enumerate(line):
                if mark == "." or quiet or (fill and i >= 12 and key != KICK):
                    continue
                strength = (0.92 if mark == "X" else 0.62) * (
                    0.62 if key in (CLOSED_HAT, OPEN_HAT, SHAKER) else 1.0
                )
                strength *= 0.75 + 0.25 * bar.energy
                out.append(
                    Note(at + i * 0.25, 0.2, key, float(np.clip(strength + rng.normal(0, 0.04), 0.08, 1)))
                )
        if fill:
            voices = {
                "epic": (LOW_TOM, MID_TOM, LOW_TOM, TIMPANI),
                "soft": (RIM, CLOSED_HAT, RIM, CLOSED_HAT),
                "none": (RIM,),
            }
            keys = voices.get(style.drums, (SNARE, SNARE, MID_TOM, LOW_TOM))
            for i, key in zip(range(4), itertools.cycle(keys), strict=False):
                out.append(Note(at + 3 + i * 0.25, 0.2, key, 0.5 + 0.12 * i))
        played = True
    if last > 0.05 and played:
        end = len(plan) * 4.0
        if style.drums in ("pop", "dance", "epic"):
            out += [Note(end, 1.0, CRASH, 0.7), Note(end, 0.2, KICK, 0.85)]
            if style.drums == "epic":
                out.append(Note(end, 1.0, TIMPANI, 0.9))
    return out


__all__ = ["compose"]

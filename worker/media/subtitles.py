"""Subtitles: sentences in time, cut into cues that can be read, written as SRT and WebVTT.

Lengths are counted in columns: a letter is one, a wide East Asian character two, a combining mark none.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from contentfactory.errors import InputError

MAX_COLUMNS = 42
"""Columns of a line."""

MAX_LINES = 2
READING_SPEED = 20.0
"""Most columns a second that a cue should ask of a reader; met where the speech leaves room."""

MIN_CUE_S = 1.0
"""A cue stands at least so long where the next one leaves room, seconds."""

LINGER_S = 1.5
"""Longest that a cue stays after its words, to be read, seconds."""

_MAX_SENTENCES = 20_000


@dataclass(frozen=True)
class Span:
    """Words and when they are said.

    Args:
        start_s: Beginning, seconds.
        end_s: End, seconds.
        text: The words.
    """

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Cue:
    """What stands on the screen for a while.

    Args:
        start_s: Appears, seconds.
        end_s: Disappears, seconds.
        lines: One or two lines.
    """

    start_s: float
    end_s: float
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The lines as one."""
        return _join(self.lines)


# --- words ---------------------------------------------------------------------------------------------------------

_NO_LINE_START = set(
    "、。，．・：；？！ー）］｝〕〉》」』】〙〗〟’”»ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ々…‥%,.!?:;)]}"
)
_NO_LINE_END = set("（［｛〔〈《「『【〘〖〝‘“«([{$£¥")
_END = re.compile(r"""[.!?…。！？؟।]+["'”’»)\]」』）]*""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|No|vs|etc|e\.g|i\.e|approx|Fig|Inc|Ltd|Co|U\.S|U\.K|a\.m|p\.m)\.$"
)


def columns(text: str) -> int:
    """Width of a text in columns."""
    return sum(
        0
        if unicodedata.combining(c) or unicodedata.category(c) in ("Cf", "Mn")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def clean(text: str) -> str:
    """Text on one line, without control characters."""
    kept = "".join(c for c in text if c in "\n\t " or unicodedata.category(c) not in ("Cc", "Cs", "Co"))
    return re.sub(r"\s+", " ", kept).strip()


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; line breaks end a sentence too."""
    found: list[str] = []
    for line in text.splitlines():
        start = 0
        for match in _END.finditer(line):
            end = match.end()
            wide = match.group()[0] in "。！？"
            rest = line[end:]
            if not wide and (
                rest[:1].strip() or rest.lstrip()[:1].islower() or _ABBREVIATION.search(line[start:end])
            ):
                continue  # inside a number, an address or an abbreviation
            found.append(clean(line[start:end]))
            start = end
        found.append(clean(line[start:]))
    return [one for one in found if one]


def _clusters(text: str) -> list[str]:
    """Characters with the marks that hang on them."""
    out: list[str] = []
    for c in text:
        joins = unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf")
        if out and (joins or out[-1].endswith("\u200d")):
            out[-1] += c
        else:
            out.append(c)
    return out


def _atoms(text: str, limit: int) -> list[str]:
    """Pieces between which a line may break; a trailing space belongs to the piece before it."""
    atoms: list[str] = []
    for word in re.findall(r"\S+\s?", text):
        piece = ""
        for cluster in _clusters(word):
            wide = unicodedata.east_asian_width(cluster[0]) in "WF"
            last = piece[-1:]
            breaks = piece and (wide or unicodedata.east_asian_width(last) in "WF")
            if (
                breaks
                and cluster[0] not in _NO_LINE_START
                and last not in _NO_LINE_END
                and not cluster.isspace()
            ):
                atoms.append(piece)
                piece = ""
            elif columns(piece.rstrip()) + columns(cluster) > limit and not cluster.isspace():
                atoms.append(piece)  # a word longer than a line
                piece = ""
            piece += cluster
        if piece:
            atoms.append(piece)
    return atoms


def _join(lines: Sequence[str]) -> str:
    out = ""
    for line in lines:
        wide = (
            out
            and line
            and unicodedata.east_asian_width(out[-1]) in "WF"
            and unicodedata.east_asian_width(line[0]) in "WF"
        )
        out += line if wide or not out else " " + line
    return out


def wrap(text: str, limit: int = MAX_COLUMNS) -> list[str]:
    """Break a text into as few lines as it takes, of about equal length.

    Args:
        text: One line.
        limit: Columns of a line.

    Returns:
        The lines, without spaces at their ends; at least one.
    """
    return _wrap(_atoms(text, limit), limit)


def _wrap(atoms: Sequence[str], limit: int) -> list[str]:
    if not atoms:
        return [""]
    width = [columns(a) for a in atoms]
    bare = [columns(a.rstrip()) for a in atoms]
    n = len(atoms)
    # Fewest lines first, then the smallest sum of squared lengths, which is the most even break.
    best: list[tuple[int, float, int]] = [(0, 0.0, 0)] + [(n + 1, math.inf, 0)] * n
    for end in range(1, n + 1):
        length = bare[end - 1]
        start = end - 1
        while start >= 0:
            if length > limit and start < end - 1:
                break
            before = best[start]
            # The lower line may be a little longer than the upper one, not the other way round.
            here = (
                before[0] + 1,
                before[1] + length**2 + (0.3 * length if start == 0 and end < n else 0),
                start,
            )
            if here < best[end]:
                best[end] = here
            start -= 1
            if start >= 0:
                length += width[start]
    lines: list[str] = []
    end = n
    while end:
        start = best[end][2]
        lines.append("".join(atoms[start:end]).strip())
        end = start
    return lines[::-1]


_JOINERS = {
    "and",
    "but",
    "or",
    "because",
    "which",
    "that",
    "when",
    "while",
    "who",
    "so",
    "for",
    "to",
    "with",
    "in",
    "on",
    "of",
    "from",
}


def _pieces(text: str, limit: int, lines: int) -> list[str]:
    """A sentence cut into parts that each fit on the screen, preferably at commas."""
    atoms = _atoms(text, limit)
    width = [columns(a) for a in atoms]
    left = sum(width)
    pieces: list[str] = []
    at = 0
    while at < len(atoms):
        if left <= limit * lines and len(_wrap(atoms[at:], limit)) <= lines:
            pieces.append("".join(atoms[at:]).strip())
            break
        target = left / math.ceil(left / (limit * lines * 0.92))
        best, best_score, head = at + 1, math.inf, 0
        for i in range(at + 1, len(atoms)):
            head += width[i - 1]
            if head - 1 > limit * lines or len(_wrap(atoms[at:i], limit)) > lines:
                break
            score = abs(head - target) / target
            if atoms[i - 1].rstrip()[-1:] in ",;:—–、，；：،":
                score -= 0.45
            elif atoms[i].strip().lower() in _JOINERS:
                score -= 0.12
            if score < best_score:
                best, best_score = i, score
        pieces.append("".join(atoms[at:best]).strip())
        left -= sum(width[at:best])
        at = best
    return pieces


# --- time ----------------------------------------------------------------------------------------------------------


def parse_timings(data: bytes, *, field: str = "narration_timings") -> list[Span]:
    """Sentences and their times out of JSON.

    Takes a list of objects with ``start_s``, ``end_s`` (or ``start``, ``end``) and ``text``, or an object that holds such a
    list under ``sentences``, ``segments`` or ``cues``.

    Args:
        data: The JSON, UTF-8.
        field: Field named in messages.

    Returns:
        The spans in order; those without words are left out.

    Raises:
        InputError: If it is something else, or its times run backwards.
    """
    try:
        found: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{field} is not JSON: {str(error)[:120]}", param=field) from None
    if isinstance(found, dict):
        found = next(
            (found[key] for key in ("sentences", "segments", "cues") if isinstance(found.get(key), list)),
            None,
        )
    if not isinstance(found, list):
        raise InputError(
            f"{field} holds no list of sentences; wanted [{{start_s, end_s, text}}, …]", param=field
        )
    if len(found) > _MAX_SENTENCES:
        raise InputError(f"{field} has {len(found)} sentences; allowed: up to {_MAX_SENTENCES}", param=field)
    spans: list[Span] = []
    for index, item in enumerate(found):
        try:
            start, end = item.get("start_s", item.get("start")), item.get("end_s", item.get("end"))
            span = Span(float(start), float(end), clean(str(item["text"])))
        except (AttributeError, KeyError, TypeError, ValueError):
            shown = json.dumps(item, ensure_ascii=False)[:100]
            raise InputError(
                f"{field}[{index}] is {shown}; wanted start_s, end_s (seconds) and text", param=field
            ) from None
        if not (
            math.isfinite(span.start_s) and math.isfinite(span.end_s) and 0 <= span.start_s <= span.end_s
        ):
            raise InputError(
                f"{field}[{index}] runs from {start} to {end}; wanted 0 ≤ start_s ≤ end_s in seconds",
                param=field,
            )
        if spans and span.start_s < spans[-1].start_s:
            raise InputError(
                f"{field}[{index}] starts at {span.start_s} s, before the one above it ({spans[-1].start_s} s)",
                param=field,
            )
        if span.text:
            spans.append(span)
    return spans


_STEP_S = 0.01


@dataclass(frozen=True)
class Speech:
    """Where somebody speaks in a recording.

    Args:
        start_s: First sound, seconds.
        end_s: Last sound, seconds.
        pauses: Silences in between: start and end, seconds.
        voiced: Seconds of sound up to each hundredth of a second: shape ``(steps + 1,)``.
    """

    start_s: float
    end_s: float
    pauses: tuple[tuple[float, float], ...]
    voiced: npt.NDArray[np.float64]

    def shifted(self, by_s: float) -> "Speech":
        """The same recording, begun that many seconds later."""
        steps = round(by_s / _STEP_S)
        moved = tuple((start + by_s, end + by_s) for start, end in self.pauses)
        return Speech(self.start_s + by_s, self.end_s + by_s, moved, np.pad(self.voiced, (steps, 0)))

    def voiced_at(self, at_s: float) -> float:
        """Seconds of sound up to a time."""
        return float(np.interp(at_s / _STEP_S, np.arange(self.voiced.size), self.voiced))

    def time_at(self, voiced_s: float) -> float:
        """When that many seconds of sound have passed."""
        return min(float(np.searchsorted(self.voiced, voiced_s)), self.voiced.size - 1) * _STEP_S


def find_speech(
    samples: npt.NDArray[np.float32], sample_rate: int, *, shortest_pause_s: float = 0.12
) -> Speech:
    """Find speech and its pauses by energy.

    Args:
        samples: Mono, shape ``(n,)``, in ``[-1, 1]``.
        sample_rate: Hz.
        shortest_pause_s: Silences shorter than this are stops within words.

    Returns:
        Where the speech is; all of a silent recording counts as speech.
    """
    hop = max(1, round(_STEP_S * sample_rate))
    steps = max(1, math.ceil(samples.size / hop))
    power = np.empty(steps)
    for start in range(0, steps, 10_000):  # in stretches: a long recording is not copied whole
        stop = min(start + 10_000, steps)
        block = samples[start * hop : stop * hop].astype(np.float64)
        block = np.pad(block, (0, (stop - start) * hop - block.size)).reshape(-1, hop)
        power[start:stop] = (block**2).mean(axis=1)
    level = 10 * np.log10(power + 1e-12)
    loud, floor = float(np.percentile(level, 95)), float(np.percentile(level, 5))
    # Between the noise of the room and the voice, and never more than 40 dB under the voice.
    threshold = max(loud - 40.0, min(floor + 12.0, loud - 15.0))
    active = level > threshold
    if loud < -65.0 or not active.any():
        active[:] = True
    where = np.flatnonzero(active)
    first, last = int(where[0]), int(where[-1]) + 1
    pauses: list[tuple[float, float]] = []
    gaps = np.flatnonzero(np.diff(where) > 1)
    for gap in gaps:
        begin, end = int(where[gap]) + 1, int(where[gap + 1])
        if (end - begin) * _STEP_S >= shortest_pause_s:
            pauses.append((begin * _STEP_S, end * _STEP_S))
        else:
            active[begin:end] = True
    voiced = np.concatenate([[0.0], np.cumsum(active) * _STEP_S])
    return Speech(first * _STEP_S, last * _STEP_S, tuple(pauses), voiced)


def align(texts: Sequence[str], start_s: float, end_s: float, speech: Speech | None = None) -> list[Span]:
    """Spread texts that are said one after the other over a stretch of time.

    Each gets time by its length; where the recording is known, its boundaries go to the pauses nearest to where they are
    expected, long pauses before short ones.

    Args:
        texts: What is said, in order.
        start_s: Beginning, seconds.
        end_s: End, seconds.
        speech: The recording.

    Returns:
        A span for each text.
    """
    weights = np.array([max(1.0, columns(t)) for t in texts])
    share = np.cumsum(weights) / weights.sum()
    if speech is None:
        edges = [start_s, *(start_s + (end_s - start_s) * share).tolist()]
        return [Span(edges[i], edges[i + 1], t) for i, t in enumerate(texts)]
    v0, v1 = speech.voiced_at(start_s), speech.voiced_at(end_s)
    expected = v0 + (v1 - v0) * share[:-1]
    inside = [p for p in speech.pauses if p[0] > start_s + 0.05 and p[1] < end_s - 0.05]
    at = np.array([speech.voiced_at(p[0]) for p in inside])
    length = np.array([min(p[1] - p[0], 1.0) for p in inside])
    n, m = len(expected), len(inside)
    # A boundary may go without a pause, at a price; its own expected place then stands. cost[j]: cheapest way to have
    # placed the boundaries so far with the last pause used being one of the first j.
    cost = np.zeros(m + 1)
    choice = np.full((n, m + 1), -1)
    for i in range(n):
        new = cost + 0.6
        pick = np.full(m + 1, -1)
        if m:
            use = cost[:-1] + np.abs(at - expected[i]) - 1.2 * length + 0.4
            better = use < new[1:]
            new[1:] = np.where(better, use, new[1:])
            pick[1:] = np.where(better, np.arange(m), -1)
            for j in range(1, m + 1):  # not using pause j is as good as stopping before it
                if new[j - 1] <= new[j]:
                    new[j] = new[j - 1]
                    pick[j] = -2
        cost = new
        choice[i] = pick
    edges_out: list[tuple[float, float]] = []
    j = m
    for i in range(n - 1, -1, -1):
        while choice[i][j] == -2:
            j -= 1
        if choice[i][j] == -1:
            moment = speech.time_at(expected[i])
            edges_out.append((moment, moment))
        else:
            edges_out.append(inside[int(choice[i][j])])
            j = int(choice[i][j])
    edges_out.reverse()
    spans: list[Span] = []
    begin = start_s
    for i, text in enumerate(texts):
        stop = edges_out[i][0] if i < n else end_s
        after = edges_out[i][1] if i < n else end_s
        stop = min(max(stop, begin), end_s)
        spans.append(Span(begin, stop, text))
        begin = max(min(after, end_s), stop)
    return spans


def make_cues(
    spans: Sequence[Span],
    total_s: float,
    *,
    limit: int = MAX_COLUMNS,
    lines: int = MAX_LINES,
    speech: Speech | None = None,
) -> list[Cue]:
    """Cut sentences into cues.

    Args:
        spans: Sentences with their times, in order.
        total_s: Length of the clip: no cue outlasts it.
        limit: Columns of a line.
        lines: Lines of a cue.
        speech: The recording, to cut long sentences at its pauses.

    Returns:
        Cues in order that do not overlap. Each follows its words; it stays longer where that helps to read it and the
        next one leaves room.
    """
    said: list[Span] = []
    for span in spans:
        if span.start_s >= total_s or not span.text:
            continue
        end = min(max(span.end_s, span.start_s), total_s)
        parts = _pieces(span.text, limit, lines)
        said.extend(
            align(parts, span.start_s, end, speech)
            if len(parts) > 1
            else [Span(span.start_s, end, span.text)]
        )
    # Words too short to be read on their own share the screen with what follows at once, or else with what came before.
    said = _merge(said, limit, lines, lambda first, second: first)
    merged = _merge(said, limit, lines, lambda first, second: second)
    cues: list[Cue] = []
    for i, one in enumerate(merged):
        room = merged[i + 1].start_s if i + 1 < len(merged) else total_s
        want = max(one.end_s, one.start_s + max(MIN_CUE_S, columns(one.text) / READING_SPEED))
        end = min(want, one.end_s + LINGER_S, max(room, one.start_s))
        if 0 < room - end < 0.25 and i + 1 < len(merged):
            end = room  # a blink between two cues disturbs more than it helps
        if end - one.start_s >= 0.001:
            cues.append(Cue(one.start_s, end, tuple(wrap(one.text, limit))))
    return cues


def _merge(spans: Sequence[Span], limit: int, lines: int, which: Callable[[Span, Span], Span]) -> list[Span]:
    merged: list[Span] = []
    for one in spans:
        last = merged[-1] if merged else None
        if last and one.start_s - last.end_s < 0.4:
            judged = which(last, one)
            both = _join((last.text, one.text))
            if (
                judged.end_s - judged.start_s < 0.8
                and one.end_s - last.start_s < 5
                and len(wrap(both, limit)) <= lines
            ):
                merged[-1] = Span(last.start_s, one.end_s, both)
                continue
        merged.append(one)
    return merged


# --- files ---------------------------------------------------------------------------------------------------------


def _clock(seconds: float, comma: str) -> str:
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}{comma}{ms % 1000:03d}"


def to_srt(cues: Sequence[Cue]) -> str:
    """The cues as a SubRip file."""
    return "".join(
        f"{number}\n{_clock(c.start_s, ',')} --> {_clock(c.end_s, ',')}\n"
        + "\n".join(line.replace("-->", "→") for line in c.lines)
        + "\n\n"
        for number, c in enumerate(cues, 1)
    )


def to_vtt(cues: Sequence[Cue]) -> str:
    """The cues as a WebVTT file."""
    blocks = [
        f"{_clock(c.start_s, '.')} --> {_clock(c.end_s, '.')}\n"
        + "\n".join(line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in c.lines)
        + "\n\n"
        for c in cues
    ]
    return "WEBVTT\n\n" + "".join(blocks)


__all__ = [
    "MAX_COLUMNS", "Cue", "Span", "Speech", "align", "clean", "columns", "find_speech", "make_cues", "parse_timings",
    "split_sentences", "to_srt", "to_vtt", "wrap",
]  # fmt: skip

"""The plan of a clip: how long each scene stands, where one gives way to the next. Pure arithmetic, in frames and seconds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from contentfactory.errors import InputError

Kind = str


@dataclass(frozen=True)
class Change:
    """How one scene gives way to the next.

    Args:
        kind: ``cut``, ``crossfade``, ``slide`` or ``fade``.
        start: First frame in which both are seen (a fraction of a frame where the change is so short).
        end: First frame after that.
    """

    kind: Kind
    start: float
    end: float


def share_out(
    durations: Sequence[float | None], total_s: float, frames: int, fps: int, breaks: Sequence[float] = ()
) -> list[int]:
    """Where scenes begin and end.

    Scenes with a duration keep it. The others share what is left: evenly, or, where all of them are free and there are
    enough sentences, so that they change between sentences.

    Args:
        durations: Seconds of each scene, None for a free one.
        total_s: Length of the clip.
        frames: Frames of the clip.
        fps: Frames a second.
        breaks: Moments between sentences, seconds, in order.

    Returns:
        First frame of each scene and, last, the number of frames: one more than there are scenes, strictly rising.

    Raises:
        InputError: If the durations leave nothing for the free scenes, or there are more scenes than frames.
    """
    n = len(durations)
    if frames < n:
        raise InputError(
            f"{n} scenes need at least {n} frames; the clip has {frames} ({total_s:.2f} s at {fps} a second)",
            param="scenes",
        )
    free = [i for i, d in enumerate(durations) if d is None]
    fixed = sum(d for d in durations if d is not None)
    left = total_s - fixed
    if free and left < len(free) * 0.2 and fixed > 0:
        raise InputError(
            f"scenes with a duration take {fixed:.2f} s of the clip's {total_s:.2f} s; {len(free)} more need at least 0.2 s each",
            param="scenes",
        )
    inner = [b for b in breaks if 0.3 < b < total_s - 0.3]
    if len(free) == n and n > 1 and len(inner) >= n - 1:
        cuts = _even_cuts(inner, n, total_s)
        edges = [0.0, *cuts, total_s]
    else:
        edges = [0.0]
        for duration in durations:
            edges.append(edges[-1] + (left / len(free) if duration is None else duration))
    out = [round(e * frames / total_s) if total_s > 0 else 0 for e in edges]
    out[0], out[-1] = 0, frames
    for i in range(1, n):  # each scene gets a frame, however short it is
        out[i] = min(max(out[i], out[i - 1] + 1), frames - (n - i))
    return out


def _even_cuts(breaks: Sequence[float], scenes: int, total_s: float) -> list[float]:
    """The ``scenes - 1`` breaks that make the scenes most alike in length (least squares, by dynamic programming)."""
    ideal = total_s / scenes
    points = [0.0, *breaks]
    m = len(points)
    cost = [math.inf] * m
    cost[0] = 0.0
    back: list[list[int]] = []
    for _ in range(scenes - 1):
        new, come = [math.inf] * m, [0] * m
        for j in range(1, m):
            for i in range(j):
                value = cost[i] + (points[j] - points[i] - ideal) ** 2
                if value < new[j]:
                    new[j], come[j] = value, i
        back.append(come)
        cost = new
    j = min(range(1, m), key=lambda k: cost[k] + (total_s - points[k] - ideal) ** 2)
    cuts: list[float] = []
    for come in reversed(back):
        cuts.append(points[j])
        j = come[j]
    return cuts[::-1]


def plan_changes(edges: Sequence[int], kinds: Sequence[Kind], seconds: float, fps: int) -> list[Change]:
    """The change at each inner edge, centred on it, at most half of the shorter scene beside it long.

    Args:
        edges: As `share_out` gives them.
        kinds: Change into each scene; the first is not used.
        seconds: Wanted length.
        fps: Frames a second.

    Returns:
        One fewer than there are scenes.
    """
    out: list[Change] = []
    for i in range(1, len(edges) - 1):
        shorter = min(edges[i] - edges[i - 1], edges[i + 1] - edges[i])
        length = 0.0 if kinds[i] == "cut" else min(seconds * fps, shorter / 2)
        out.append(Change(kinds[i] if length > 0 else "cut", edges[i] - length / 2, edges[i] + length / 2))
    return out


def ease(x: float) -> float:
    """Gentle start and end of a camera movement, never at a standstill: slope 0.4 at the ends, 1.3 in the middle."""
    x = min(max(x, 0.0), 1.0)
    return 0.4 * x + 0.6 * smooth(x)


def smooth(x: float) -> float:
    """Smoothstep: from 0 to 1 with no slope at either end."""
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)

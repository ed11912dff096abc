"""Choosing among several tries at a text: how well does one keep to its facts?

Plain word matching, made for languages that put spaces between words; the list of words without content is English, and in
other languages such words count like any other, for all tries alike.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*")
_EMPTY = frozenset(
    ["a", "an", "the", "and", "or", "but", "of", "in", "on", "at", "by", "to", "from", "with", "for", "as", "is", "are", "was", "were", "be", "been", "being", "am", "it", "its", "it's", "they", "their", "them", "this", "that", "these", "those", "which", "who", "whom", "whose", "has", "have", "had", "do", "does", "did", "can", "could", "will", "would", "may", "might", "must", "shall", "should", "there", "here", "also", "than", "then", "so", "such", "up", "out", "about", "into", "over", "under", "after", "before", "between", "during", "through", "one", "very", "more", "most", "many", "much", "some", "any", "all", "each", "both", "other", "another", "while", "when", "where", "what", "how", "why", "he", "she", "his", "her", "him", "you", "your", "yours", "we", "our", "us", "i", "me", "my", "if", "though", "although", "because", "like", "just", "even", "too"]
)
_JOINT = re.compile(r"[.!?;:,–—]\s|\b(?:and|or|but|that|which|who|with|while|where|when|because|so|also)\b", re.IGNORECASE)
_DENIALS = frozenset(["not", "no", "never", "cannot", "without", "none", "nor", "neither", "only", "can't", "don't", "doesn't", "isn't", "aren't", "won't"])


@dataclass(frozen=True)
class Grounding:
    """How a text stands to the facts that it was written from.

    Args:
        told: Share of the facts' words that the text uses, ``[0, 1]``.
        kept: Share of the text's words that the facts hold, ``[0, 1]``.
        slips: Denials lost or added, numbers that the facts lack or that stand beside words of another fact, and words of two
            facts run together without a word or mark that joins them.
        repeats: Pairs of words that come twice.
    """

    told: float
    kept: float
    slips: int
    repeats: int

    @property
    def score(self) -> float:
        """Higher is better. Saying something else weighs more than leaving something out."""
        return 0.8 * self.told + 2 * self.kept - 0.6 * self.slips - 0.2 * self.repeats


def ground(text: str, facts: str, subject: str = "") -> Grounding:
    """Compare a text with facts.

    Args:
        text: The text.
        facts: The facts, one a line.
        subject: Words that the text may use besides (how it was made to begin).
    """
    known = [_content(line) for line in facts.splitlines()]
    words = [word for line in known for word in line]
    allowed = set(_content(subject))
    said = _content(text)
    if not said or not words:
        return Grounding(0.0, 0.0, 0, 0)
    kept = sum(any(_alike(word, other) for other in (*words, *allowed)) for word in said) / len(said)
    told = sum(any(_alike(word, other) for other in said) for word in words) / len(words)
    slips = abs(_denials(text) - _denials(facts)) + sum(_misplaced(n, said, known, allowed) for n in range(len(said)))
    slips += _jumps(text, known, allowed)
    pairs = list(itertools.pairwise(said))
    return Grounding(round(told, 3), round(kept, 3), slips, len(pairs) - len(set(pairs)))


def best(texts: Sequence[str], likelihoods: Sequence[float], facts: str | None, subject: str = "") -> int:
    """Index of the best try: by its likelihood, and by its facts where there are some; an empty one only if all are."""

    def rank(index: int) -> tuple[bool, float]:
        score = ground(texts[index], facts, subject).score if facts is not None else 0.0
        return bool(texts[index].strip()), score + likelihoods[index]

    return max(range(len(texts)), key=rank)


def _words(text: str) -> list[str]:
    return [word.lower().replace("’", "'") for word in _WORD.findall(text)]


def _content(text: str) -> list[str]:
    return [word for word in _words(text) if word not in _EMPTY]


def _denials(text: str) -> int:
    return sum(word in _DENIALS for word in _words(text))


def _alike(one: str, other: str) -> bool:
    """Whether two words are the same but for their ending; numbers must be equal."""
    if one == other:
        return True
    if one[0].isdigit() or other[0].isdigit():
        return False
    shorter = min(len(one), len(other))
    return shorter >= 4 and abs(len(one) - len(other)) <= 3 and one[: max(4, shorter - 2)] == other[: max(4, shorter - 2)]


def _jumps(text: str, known: list[list[str]], allowed: set[str]) -> int:
    """How often two neighbouring words belong to different facts while nothing stands between them that joins facts."""
    count = 0
    for part in _JOINT.split(text):
        pairs = itertools.pairwise(word for word in _content(part) if word not in allowed)
        for one, other in pairs:
            of_one = {n for n, line in enumerate(known) if any(_alike(one, word) for word in line)}
            of_other = {n for n, line in enumerate(known) if any(_alike(other, word) for word in line)}
            count += bool(of_one and of_other and not of_one & of_other)
    return count


def _misplaced(place: int, said: list[str], known: list[list[str]], allowed: set[str]) -> bool:
    """Whether a number is none of the facts', or stands among words of another fact only."""
    number = said[place]
    if not number[0].isdigit() or number in allowed:
        return False
    lines = [line for line in known if number in line]
    if not lines:
        return True
    beside = [word for word in (*said[max(0, place - 1) : place], *said[place + 1 : place + 2]) if word not in allowed]
    return bool(beside) and not any(_alike(word, other) for word in beside for line in lines for other in line)

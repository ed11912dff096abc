"""How far a transcript is from what should have been said: the word error rate."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from worker.runners.audio import reading


@dataclass(frozen=True)
class Accuracy:
    """Result of a comparison.

    Args:
        wer: Wrong, missing and added words by words of the reference; 0 is perfect, above 1 is possible.
        errors: Number of such words.
        reference_words: Words of the reference after normalising.
        transcript_words: Words of the transcript after normalising.
    """

    wer: float
    errors: int
    reference_words: int
    transcript_words: int


def words(text: str, language: str = "en") -> list[str]:
    """A text as bare words in one form: lower case, no punctuation, English numbers, units and contractions alike.

    '4,500 kg' and 'four thousand five hundred kilograms' give the same words.
    """
    english = language.split("-")[0].lower() == "en"
    text = " ".join(sentence.text for sentence in reading.sentences(text))
    if english:
        text = reading.spoken(text)
    # Whisper's normaliser drops what stands in brackets; a voice says it.
    text = re.sub(r"[()\[\]{}<>]", " , ", text)
    out = str(_normalizer(english)(text))
    if english:
        out = re.sub(r"(?<=\w)'s?\b|\$|£|€", "", re.sub(r"(\w)metre(s?)\b", r"\1meter\2", out))
        # British and American spellings sound the same.
        out = re.sub(
            r"\b(?:metric )?tonne(s?)\b",
            r"ton\1",
            re.sub(r"\bmetre(s?)\b", r"meter\1", re.sub(r"\blitre(s?)\b", r"liter\1", out)),
        )
    return out.replace("%", " percent").split()


@cache
def _normalizer(english: bool) -> Any:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    return EnglishTextNormalizer({}) if english else BasicTextNormalizer()


def compare(reference: str, transcript: str, language: str = "en") -> Accuracy:
    """Word error rate of a transcript.

    Args:
        reference: What should have been said.
        transcript: What was heard.
        language: BCP 47 tag; English numbers and units are brought to one form.
    """
    wanted, heard = words(reference, language), words(transcript, language)
    errors = _distance(wanted, heard)
    return Accuracy(round(errors / max(1, len(wanted)), 4), errors, len(wanted), len(heard))


def _distance(a: list[str], b: list[str]) -> int:
    """Levenshtein distance of two word lists, a row at a time in numpy."""
    ids: dict[str, int] = {}
    first = [ids.setdefault(w, len(ids)) for w in a]
    second = np.array([ids.setdefault(w, len(ids)) for w in b], np.int64)
    steps = np.arange(len(second) + 1)
    row = steps.copy()
    for number, word in enumerate(first, 1):
        best = np.empty_like(row)
        best[0] = number
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (second != word))
        # Insertions run along the row: the cheapest start plus one for each step from it.
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


__all__ = ["Accuracy", "compare", "words"]

"""Where sentences end, and cutting a text so that it never ends inside one."""

import re

_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s|$)|[。！？]+[」』”）]*|\n+")
_ABBREVIATIONS = frozenset(
    ["al", "approx", "ca", "cf", "dept", "dr", "e.g", "est", "etc", "i.e", "jr", "mr", "mrs", "ms", "prof", "sr", "st", "vs"]
)
_BEFORE_NUMBERS = frozenset(["ch", "fig", "no", "nr", "p", "pp", "vol"])


def sentence_ends(text: str, *, whole: bool) -> list[int]:
    """Offsets at which sentences end.

    A line break ends one as well. Abbreviations, initials, numbers of a list and dots before a small letter do not.

    Args:
        text: The text.
        whole: Whether nothing follows. If more may follow, a mark at the very end does not count yet (``3.`` may become
            ``3.5``).

    Returns:
        Offset after each finished sentence, without the white space that follows.
    """
    ends: list[int] = []
    start = 0
    for match in _END.finditer(text):
        body = text[start : match.start()].strip()
        if not body or (match.end() == len(text) and not whole and not match.group().startswith("\n")):
            continue
        if match.group() == "." and _inside(body, text[match.end() :]):
            continue
        ends.append(match.start() if match.group()[0] == "\n" else match.end())
        start = match.end()
    return ends


def _inside(body: str, rest: str) -> bool:
    """Whether a dot after ``body`` and before ``rest`` belongs to a word."""
    word = body.split()[-1].lstrip("(\"'“‘[").lower()
    following = rest.lstrip()[:1]
    if body.isdigit() or (following.islower() and not rest.startswith("\n")):
        return True
    if not following:
        return False
    if word in _BEFORE_NUMBERS and following.isdigit():
        return True
    return word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha() and following.isupper() and len(body) < 3)


def cut_sentences(text: str, limit: int, *, finished: bool) -> str:
    """The first whole sentences of a text.

    Args:
        text: The text.
        limit: Most sentences, 1 or more.
        finished: Whether its writer ended on purpose. Otherwise what stands after the last finished sentence is dropped,
            unless there is no finished sentence at all.
    """
    ends = sentence_ends(text, whole=True)
    if len(ends) >= limit:
        return text[: ends[limit - 1]]
    return text if finished or not ends else text[: ends[-1]]

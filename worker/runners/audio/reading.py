"""Written text to what a voice should say: sentences, and English numbers, units and abbreviations in words.

Only what a voice's own dictionary cannot know is rewritten here; plain numbers, years, money and dates stay digits,
because voices read those themselves, by context.
"""

import re
import unicodedata
from dataclasses import dataclass

_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st mt ft gen gov sen rep capt lt col sgt rev hon pres vs no nos fig figs vol vols approx ca c cf al "
    "e.g i.e eg ie etc jr sr inc ltd co corp dept univ est jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu "
    "fri sat sun p pp ch ed eds sec art ave blvd rd u.s u.k a.m p.m ph.d b.c a.d".split()
)
_OFTEN_LAST = frozenset("etc jr sr inc ltd co corp a.m p.m ph.d b.c a.d al ave blvd rd est dept".split())
_BEFORE_NUMBER = frozenset("no nos fig figs vol vols ca c p pp ch sec art approx".split())
_STARTERS = frozenset(
    "the a an he she it they we i you this that these those there his her its their our in on at but and so".split()
)
_MONTHS = frozenset("jan feb mar apr jun jul aug sep sept oct nov dec".split())

_END = re.compile(r"[.!?…]+[\"”’')\]»]*(?=\s|$)|[。！？]+[」』”]*")
_LAST_WORD = re.compile(r"([^\s(\[\"“‘]+)$")


@dataclass(frozen=True)
class Sentence:
    """One sentence of a text.

    Args:
        text: As written, white space and mark-up tidied: what a subtitle shows.
        paragraph: Number of the paragraph it stands in, from 0.
    """

    text: str
    paragraph: int


def sentences(text: str) -> list[Sentence]:
    """Split a text into sentences.

    Abbreviations, initials, decimals and dots before a lower-case word do not end a sentence; line breaks between
    paragraphs, list items and headings do.
    """
    found: list[Sentence] = []
    for number, block in enumerate(re.split(r"\n\s*\n", _tidy(text))):
        # A line break inside a paragraph is mere wrapping, unless the line before it is finished or a list item follows.
        for line in re.split(r"(?<=[.!?:…])\n|\n(?=\x01)", block):
            line = " ".join(line.replace("\x01", " ").split())
            found += [Sentence(part, number) for part in _split(line)]
    return found


def _tidy(text: str) -> str:
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(
        r"(?m)^[ \t]*(?:[-*•]|#{1,6})[ \t]+", "\x01", text
    )  # list items and headings, each a line of its own
    text = re.sub(
        r"\[([^\]\n]+)\]\((?:https?:[^)\s]*|#[^)\s]*)\)", r"\1", text
    )  # a link is read by its words
    text = re.sub(r"(\*\*|__|``?`?)(?=\S)(.+?)(?<=\S)\1", r"\2", text)
    text = re.sub(r"(?<!\w)[*_](?=\S)([^*_\n]+?)(?<=\S)[*_](?!\w)", r"\1", text)
    # Pictographs and control characters have no sound.
    keep = (
        c
        if c in "\n\x01"
        or (unicodedata.category(c) not in ("So", "Cc", "Cf", "Cs", "Co", "Cn") or c in "°©®™")
        else " "
        for c in text
    )
    return "".join(keep).replace("\u00a0", " ").replace("\u202f", " ").replace("\u2009", " ")


def _split(line: str) -> list[str]:
    parts: list[str] = []
    start = 0
    for match in _END.finditer(line):
        if match.end() < start:
            continue
        after = line[match.end() :].lstrip()
        if after and not _ends(line[start : match.start()], match.group(), after):
            continue
        parts.append(line[start : match.end()].strip())
        start = match.end()
    parts.append(line[start:].strip())
    return [part for part in parts if part]


def _ends(before: str, mark: str, after: str) -> bool:
    head = after.lstrip("\"“‘'([")
    if (mark[0] in ".…" or len(mark) > 1) and (not head or head[0].islower()):
        return False
    if mark != ".":
        return True
    found = _LAST_WORD.search(before)
    word = found.group(1).lower() if found else ""
    if len(word) == 1 and word.isalpha() and found is not None and found.group(1).isupper():
        return False  # an initial
    if word in _BEFORE_NUMBER or word in _MONTHS:
        return not head[0].isdigit() and word not in ("ca", "c", "approx", "fig", "vol")
    if word in _ABBREVIATIONS and word not in _OFTEN_LAST:
        return re.match(r"\w*", head.lower())[0] in _STARTERS  # type: ignore[index]
    return True


def pieces(text: str, limit: int = 260) -> list[str]:
    """Cut a long sentence into parts that a voice can say in one breath, at commas where there are any.

    Args:
        text: One sentence.
        limit: Longest part, characters.
    """
    parts: list[str] = []
    rest = text.strip()
    while len(rest) > limit:
        window = rest[:limit]
        marks = [m.end() for m in re.finditer(r"[,;:—–)](?=\s)|\s-(?=\s)", window)]
        at = marks[-1] if marks and marks[-1] > limit // 4 else window.rfind(" ")
        at = at if at > 0 else limit  # one endless word
        parts.append(rest[:at].strip())
        rest = rest[at:].strip()
    return [*parts, rest] if rest else parts


_UNITS: dict[str, tuple[str, str]] = {
    symbol: (one, many or one + "s")
    for symbol, one, many in (
        ("nm", "nanometer", ""), ("µm", "micrometer", ""), ("μm", "micrometer", ""), ("mm", "millimeter", ""),
        ("cm", "centimeter", ""), ("dm", "decimeter", ""), ("m", "meter", ""), ("km", "kilometer", ""),
        ("mi", "mile", ""), ("yd", "yard", ""), ("ft", "foot", "feet"), ("au", "astronomical unit", ""),
        ("AU", "astronomical unit", ""), ("ly", "light year", ""), ("ha", "hectare", ""), ("mg", "milligram", ""),
        ("µg", "microgram", ""), ("g", "gram", ""), ("kg", "kilogram", ""), ("t", "tonne", ""), ("lb", "pound", ""),
        ("lbs", "pound", ""), ("oz", "ounce", ""), ("ml", "milliliter", ""), ("mL", "milliliter", ""), ("cl", "centiliter", ""),
        ("l", "liter", ""), ("L", "liter", ""), ("ns", "nanosecond", ""), ("ms", "millisecond", ""), ("s", "second", ""),
        ("sec", "second", ""), ("min", "minute", ""), ("h", "hour", ""), ("hr", "hour", ""), ("hrs", "hour", ""),
        ("yr", "year", ""), ("yrs", "year", ""), ("Hz", "hertz", "hertz"), ("kHz", "kilohertz", "kilohertz"),
        ("MHz", "megahertz", "megahertz"), ("GHz", "gigahertz", "gigahertz"), ("W", "watt", ""), ("mW", "milliwatt", ""),
        ("kW", "kilowatt", ""), ("MW", "megawatt", ""), ("GW", "gigawatt", ""), ("Wh", "watt hour", ""),
        ("kWh", "kilowatt hour", ""), ("MWh", "megawatt hour", ""), ("GWh", "gigawatt hour", ""), ("V", "volt", ""),
        ("kV", "kilovolt", ""), ("mV", "millivolt", ""), ("mA", "milliamp", ""), ("mAh", "milliamp hour", ""),
        ("N", "newton", ""), ("kN", "kilonewton", ""), ("J", "joule", ""), ("kJ", "kilojoule", ""), ("MJ", "megajoule", ""),
        ("kcal", "kilocalorie", ""), ("cal", "calorie", ""), ("Pa", "pascal", ""), ("hPa", "hectopascal", ""),
        ("kPa", "kilopascal", ""), ("MPa", "megapascal", ""), ("bar", "bar", ""), ("eV", "electron volt", ""),
        ("kB", "kilobyte", ""), ("KB", "kilobyte", ""), ("MB", "megabyte", ""), ("GB", "gigabyte", ""), ("TB", "terabyte", ""),
        ("Mbit", "megabit", ""), ("Gbit", "gigabit", ""), ("dB", "decibel", ""), ("K", "kelvin", "kelvin"),
        ("mph", "mile per hour", "miles per hour"), ("rpm", "revolution per minute", "revolutions per minute"),
        ("fps", "frame per second", "frames per second"), ("kn", "knot", ""), ("px", "pixel", ""),
    )
}  # fmt: skip
_NEEDS_SPACE = frozenset(("s", "K", "h", "t", "l", "L", "N", "J", "W", "V", "bar", "au", "AU", "mi", "min"))
"""Symbols that read otherwise right after a digit: '1990s', '5K', '3L' … unless a slash or power follows."""

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_SCALE = r"(?:\s(?:hundred|thousand|million|billion|trillion))?"
_SYMBOL = "|".join(re.escape(s) for s in sorted(_UNITS, key=len, reverse=True))
_POWER = r"(?:[²³]|\^[23]|(?<=m)[23](?![\d.,]))"
_MEASURE = re.compile(
    rf"(?P<money>[$£€¥]\s?)?(?<![\w.])(?P<number>{_NUMBER})(?P<scale>{_SCALE})(?P<gap>[\s-]?)"
    rf"(?:(?P<square>sq|cu)\.?\s)?(?P<unit>{_SYMBOL})(?P<power>{_POWER})?"
    rf"(?:/(?P<per>{_SYMBOL})(?P<perpower>[²³]|\^[23]|[23](?!\d))?)?(?![\w²³/'’]|-\w)"
)
_POWERS = {"2": "square", "3": "cubic", "²": "square", "³": "cubic"}
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
_FRACTIONS = {
    "½": "one half", "⅓": "one third", "⅔": "two thirds", "¼": "one quarter", "¾": "three quarters", "⅕": "one fifth",
    "⅛": "one eighth", "⅜": "three eighths", "⅝": "five eighths", "⅞": "seven eighths",
}  # fmt: skip

_REPLACEMENTS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\be\.\s?g\.,?", "for example,"),
        (r"\bi\.\s?e\.,?", "that is,"),
        (r"\betc\.(?=\s+[a-z(]|[,;:)])", "et cetera"),
        (r"\betc\.", "et cetera."),
        (r"\bet al\.(?=\s+[a-z(]|[,;:)])", "and others"),
        (r"\bapprox\.", "approximately"),
        (r"(?<!\w)(?:ca|c)\.\s?(?=\d)", "around "),
        (r"\bpp\.\s?(?=\d)", "pages "),
        (r"\bp\.\s?(?=\d)", "page "),
        (r"\b([Ff])igs?\.\s?(?=\d)", r"\1igure "),
        (r"\b([Vv])ols?\.\s?(?=\d)", r"\1olume "),
        (r"\bNo\.\s?(?=\d)", "number "),
        (r"\b(?:B\.C\.E?\.?|BCE?)(?!\w)", "B C"),
        (r"\bw/o\b", "without"),
        (r"\bWWII\b|\bWW2\b", "World War Two"),
        (r"\bWWI\b|\bWW1\b", "World War One"),
        (r"\bWar II\b", "War Two"),
        (r"\bWar I\b", "War One"),
        (r"\bSaturn V\b", "Saturn five"),
        (r"(?<=\d)\s?[–‒]\s?(?=\d)", " to "),
        (r"(?<![\w.)])[-−](?=\d)", "minus "),
        (r"±\s?", "plus or minus "),
        (r"[≈~∼]\s?(?=\d)", "about "),
        (r"\s?≤\s?", " at most "),
        (r"\s?≥\s?", " at least "),
        (r"\s?→\s?", " to "),
        (r"\s?×\s?(?=10[⁰¹²³⁴⁵⁶⁷⁸⁹⁻])", " times "),
        (r"\b(oz|ft|lbs?|hrs?|min|sec|mi|yd|yrs?)\.(?=\s+[a-z(]|[,;:)])", r"\1"),
        (r"(?<=\d)\s?[x×]\s?(?=\d)", " by "),
        (r"\s?×\s?", " times "),
        (r"\s?÷\s?", " divided by "),
        (r"\bUS\$", "$"),
        (r"([$£€]\s?\d[\d,.]*)\s?(?:bn|B)\b", r"\1 billion"),
        (r"([$£€]\s?\d[\d,.]*)\s?(?:m|mn|M)\b", r"\1 million"),
        (r"([$£€]\s?\d[\d,.]*)\s?(?:k|K)\b", r"\1 thousand"),
        (r"(?<=\d)\s?‰", " per mille"),
        (r"[©®™]", ""),
        (r"\s&\s", " and "),
        (r"π", "pi"),
        (r"Ω", "ohms"),
    )
)  # fmt: skip


def spoken(text: str) -> str:
    """English text with units, symbols and abbreviations in words; numbers stay digits.

    Args:
        text: One sentence as written.

    Returns:
        What to hand to a voice: 'It weighs 4,500 kg, about 3.5 m.' gives 'It weighs 4,500 kilograms, about 3.5 meters.'
    """
    text = re.sub(r"\bhttps?://(?:www\.)?|\bwww\.", "", text)
    text = re.sub(r"(?<=[a-z0-9])\.(?=(?:com|org|net|io|edu|gov|dev|ai)\b)", " dot ", text)
    text = re.sub(
        r"(\d)([½⅓⅔¼¾⅕⅛⅜⅝⅞])", lambda m: f"{m[1]} and {_FRACTIONS[m[2]].replace('one ', 'a ', 1)}", text
    )
    text = re.sub(r"[½⅓⅔¼¾⅕⅛⅜⅝⅞]", lambda m: _FRACTIONS[m[0]], text)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    # Before a slash, a dash or 'to' the unit belongs to both numbers: '10 to 20 kg' needs no more than the second.
    text = re.sub(rf"({_NUMBER})(\s?)°\s?([CF])?(?![\w])", _degrees, text)
    text = _MEASURE.sub(_measure, text)
    text = re.sub(r"(?<=[\d)])([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", _power, text)
    text = text.translate(_SUPERSCRIPT)
    return " ".join(text.split())


def _degrees(match: re.Match[str]) -> str:
    scale = {"C": " Celsius", "F": " Fahrenheit"}.get(match[3] or "", "")
    return f"{match[1]} degree{'' if match[1] == '1' else 's'}{scale}"


def _power(match: re.Match[str]) -> str:
    digits = match[1].translate(_SUPERSCRIPT)
    if digits in ("2", "3"):
        return " squared" if digits == "2" else " cubed"
    return " to the power of " + digits.replace("-", "minus ")


def _measure(match: re.Match[str]) -> str:
    number, unit = match["number"], match["unit"]
    if match["money"]:
        return match[0]
    bare = not (match["power"] or match["per"] or match["scale"] or match["gap"])
    if bare and unit in _NEEDS_SPACE:
        return match[0]
    one, many = _UNITS[unit]
    # An adjective has no plural: 'a 5-km run'.
    single = match["gap"] == "-" or (number in ("1", "1.0") and not match["scale"])
    word = one if single else many
    square = {"sq": "square", "cu": "cubic"}.get(match["square"] or "") or _POWERS.get(
        (match["power"] or "").lstrip("^")
    )
    if square:
        word = f"{square} {word}"
    if match["per"]:
        below, power = _UNITS[match["per"]][0], _POWERS.get((match["perpower"] or "").lstrip("^"))
        if power and match["per"] in ("s", "sec"):
            word += f" per {below} {'squared' if power == 'square' else 'cubed'}"
        else:
            word += f" per {power + ' ' if power else ''}{below}"
    return f"{number}{match['scale']} {word}"


def speakable(text: str) -> bool:
    """Whether there is anything to say: a letter or a digit of any script."""
    return any(c.isalnum() for c in text)


__all__ = ["Sentence", "pieces", "sentences", "speakable", "spoken"]

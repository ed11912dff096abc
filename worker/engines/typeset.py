"""Typography by Typst: line breaking (Unicode and dictionaries), both directions, shaping, fonts for every script.

Typst runs in-process with one template of our own; words go in as JSON strings and are never read as markup. Its fonts
come out of pip packages under the OFL (Inter, Fraunces, Noto) and one file of this project (colour emoji); system fonts
are never used, so that a card looks the same on every machine.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from contentfactory.errors import FactoryError, ModelUnavailable
from worker.engines.files import ROOT, file_sha256

TEMPLATE = ROOT / "worker/assets/cards/text.typ"


@dataclass(frozen=True)
class Font:
    """A font file: family, distribution and path inside it (or below the repository root), SHA-256, collection index."""

    family: str
    distribution: str
    path: str
    sha256: str
    index: int = 0


_NOTO, _CJK = "manimgx_fonts/NotoSans", "manimgx_fonts_cjk/NotoSansCJK-VF.otf.ttc"
_CJK_SHA = "d3d8256cdec8dbcb3552284bc6b20c734dd60c2ee9df83b5758e34807c4bac32"
FONTS: tuple[Font, ...] = (
    Font("Inter", "fontpkg-inter", "fontpkg_inter/files/Inter[opsz,wght].ttf", "29160a80ff49ddcab2c97711247e08b1fab27a484a329ce8b813d820dc559031"),
    Font("Fraunces", "fontpkg-fraunces", "fontpkg_fraunces/files/Fraunces[SOFT,WONK,opsz,wght].ttf", "177ff6c0f14e5550a3c624247cd1189611d4eb65d000b14944c63d967958abbb"),
    Font("Noto Sans", "manimgx-fonts", f"{_NOTO}[wght].ttf", "fb53504de62e767a54695416123d68d67f71c9b69722175184ad56e7dd13547b"),
    Font("Noto Sans Arabic", "manimgx-fonts", f"{_NOTO}Arabic[wght].ttf", "3fae4d7239d1faa55b234bda8091019a5251ff79df40d5e29367d84bed2a8138"),
    Font("Noto Sans Hebrew", "manimgx-fonts", f"{_NOTO}Hebrew[wght].ttf", "9d81d81ad592644487b03843da73a87b99cd28a2c4da4a096e1db8fbd14fda61"),
    Font("Noto Sans Devanagari", "manimgx-fonts", f"{_NOTO}Devanagari[wght].ttf", "bf99bf762743ff3259e73196852520ab0ffe8d384238bff3e4806a84b981e972"),
    Font("Noto Sans Thai", "manimgx-fonts", f"{_NOTO}Thai[wght].ttf", "13f52f79b04f01f2751a81052a5dee2df639fd4e13f4ac30821ab45c8dd5f7e7"),
    Font("Noto Sans Bengali", "manimgx-fonts", f"{_NOTO}Bengali[wght].ttf", "dc9defe97bb041876b6609e9029d9e1e228a686259acde2fe2a9f99d793ee17d"),
    Font("Noto Sans Tamil", "manimgx-fonts", f"{_NOTO}Tamil[wght].ttf", "37e151cdec4a8cfb15c432f7bb164a83b98df69419d47e50b35aa7073963716b"),
    Font("Noto Sans Telugu", "manimgx-fonts", f"{_NOTO}Telugu[wght].ttf", "6c06de88b2d420d899543724a13765994191cd29860c6226efca098b51fec64b"),
    Font("Noto Sans Gujarati", "manimgx-fonts", f"{_NOTO}Gujarati[wght].ttf", "83d1bde74d64fb389f97a5e27b2699d8ee8bad4c15a02be347228e6c10011248"),
    Font("Noto Sans Gurmukhi", "manimgx-fonts", f"{_NOTO}Gurmukhi[wght].ttf", "8a3096ee2166f6383501e2df7b368fce88cfa4068c8d75bcb6af07da353a00ea"),
    Font("Noto Sans Kannada", "manimgx-fonts", f"{_NOTO}Kannada[wght].ttf", "b6b11505d76eddf916667d73adfec19095ec777742444dc662dae81471461f4e"),
    Font("Noto Sans Malayalam", "manimgx-fonts", f"{_NOTO}Malayalam[wght].ttf", "94cddc94a03fa9a5e8d1784090ba97b267def6933d60762081eaa003751142c5"),
    Font("Noto Sans Oriya", "manimgx-fonts", f"{_NOTO}Oriya[wght].ttf", "37f482d0179d0a50e3128d004f007ff1c1741ad5f6b0b2bcc7238b257ef1caa0"),
    Font("Noto Sans Sinhala", "manimgx-fonts", f"{_NOTO}Sinhala[wght].ttf", "3fd7c6a61cb6dfb8a2ca7af5b4078bd24e9c8ad9b55839a0177277db6e4d1326"),
    Font("Noto Sans Khmer", "manimgx-fonts", f"{_NOTO}Khmer[wght].ttf", "56f89948a84cc0b01962ed6af573ac4ac885bd7bb6e7e40f9afc72a435728b70"),
    Font("Noto Sans Lao", "manimgx-fonts", f"{_NOTO}Lao[wght].ttf", "fc138d605aa998d8407789ee6a7f5554aae8b54f5cd98d66dd2c33e79d15b67e"),
    Font("Noto Sans Myanmar", "manimgx-fonts", f"{_NOTO}Myanmar[wght].ttf", "e0b280aa3080aab922800c88fa9a2015a4bec3103bb8b70491a92e4a04f3a3a3"),
    Font("Noto Sans Ethiopic", "manimgx-fonts", f"{_NOTO}Ethiopic[wght].ttf", "93f223089e300b983dbfd693c7be619e0e76565a70d639e71a4fe0bfd72cf66f"),
    Font("Noto Sans Armenian", "manimgx-fonts", f"{_NOTO}Armenian[wght].ttf", "e979dfaed56ddb4bfd05121958b25425eb7593253d64b6b3654c77c11c5cda94"),
    Font("Noto Sans Georgian", "manimgx-fonts", f"{_NOTO}Georgian[wght].ttf", "42f4a8bf4fe0af8afd91ee3c19e81e14f1bc74ddbd9b6a59a4182f67a596adb4"),
    Font("Noto Sans Symbols", "manimgx-fonts", f"{_NOTO}Symbols[wght].ttf", "63724daeff6755a45933b9a5e3a3b41df5df8fe925c0f4c991f2f68c08a4182d"),
    Font("Noto Sans CJK JP", "manimgx-fonts-cjk", _CJK, _CJK_SHA, 0),
    Font("Noto Sans CJK KR", "manimgx-fonts-cjk", _CJK, _CJK_SHA, 1),
    Font("Noto Sans CJK SC", "manimgx-fonts-cjk", _CJK, _CJK_SHA, 2),
    Font("Noto Sans CJK TC", "manimgx-fonts-cjk", _CJK, _CJK_SHA, 3),
    Font("Noto Sans CJK HK", "manimgx-fonts-cjk", _CJK, _CJK_SHA, 4),
    Font("Noto Color Emoji", "", "worker/assets/fonts/NotoColorEmoji-COLR.ttf", "6b053109687a069eff9e73708bd6c13cc697d8ddfcb182dd959c13167273dfb7"),
)
"""In order of preference; a character takes the first family that has it (CJK families by language)."""

_BY_FAMILY = {font.family: font for font in FONTS}

EMOJI = (
    r"(?:\p{Regional_Indicator}{2})|(?:[0-9#*]\u{FE0F}?\u{20E3})|"
    r"(?:(?:\p{Emoji_Presentation}|\p{Emoji}\u{FE0F})[\p{Emoji_Modifier}\u{E0020}-\u{E007F}]*"
    r"(?:\u{200D}\p{Emoji}\u{FE0F}?\p{Emoji_Modifier}?)*)"
)
"""Emoji sequences, in the regex dialect of Typst: these are drawn in colour even where a text font has a plain form."""

_INVISIBLE = {0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x00AD, 0x2060, 0xFE0E, 0xFE0F, 0x061C, *range(0x2066, 0x206A)}
_ONLY_EMOJI = re.compile("[\u200d\ufe0f\u20e3\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")


@dataclass(frozen=True)
class Piece:
    """One piece of a column: words in one style.

    Args:
        role: Name for reports (``headline`` …).
        text: The words; blank lines separate paragraphs, single line breaks are kept.
        size: Largest font size, pixels.
        min_size: Smallest font size, pixels.
        colour: ``#rrggbb``.
        weight: 100 to 900.
        display: Whether this is display type: tight lines, close letters, lines evened out.
        spaced: Letter spacing in ems for scripts that allow it.
        gap: Space above, in ems of this piece.
        max_lines: Most lines; 0 for as many as fit.
        family: First family to try.
        language: BCP 47 tag; guessed from the script where empty.
    """

    role: str
    text: str
    size: float
    min_size: float
    colour: str
    weight: int = 400
    display: bool = False
    spaced: float = 0.0
    gap: float = 0.5
    max_lines: int = 0
    family: str = "Inter"
    language: str = ""


@dataclass(frozen=True)
class Bar:
    """An ornamental rule between pieces; sizes in pixels."""

    width: float
    height: float
    colour: str
    gap: float


@dataclass
class Column:
    """A set column of text.

    Attributes:
        picture: ``RGBA``, with ``pad`` pixels of margin on each side for overhanging glyphs.
        pad: That margin, pixels.
        height: Height that the text takes, pixels.
        pieces: Role, font size, lines, height and width of each piece.
        cut: Roles that had to be cut with an ellipsis.
        shrink: 0 where all pieces have their largest size, 1 at their smallest.
        missing: Characters that no font has; they are left out.
        broken: Whether a word had to be broken anywhere.
    """

    picture: Image.Image
    pad: int
    height: float
    pieces: list[dict[str, Any]] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    shrink: float = 0.0
    missing: list[str] = field(default_factory=list)
    broken: bool = False


@functools.cache
def font_path(family: str) -> Path:
    """The verified file of a font family.

    Raises:
        ModelUnavailable: If its package is missing or the file is not the pinned one.
    """
    font = _BY_FAMILY[family]
    if font.distribution:
        try:
            path = Path(str(distribution(font.distribution).locate_file(font.path)))
        except PackageNotFoundError:
            raise ModelUnavailable(f"font {family}: the package {font.distribution} is not installed; run `make setup`") from None
    else:
        path = ROOT / font.path
    if not path.is_file():
        raise ModelUnavailable(f"font {family}: file {font.path} is missing; run `make setup`")
    found = file_sha256(path)
    if found != font.sha256:
        raise ModelUnavailable(f"font {family}: {path.name} has SHA-256 {found}, but {font.sha256} is pinned; reinstall it")
    return path


@functools.cache
def coverage(family: str) -> frozenset[int]:
    """Code points that a family has glyphs for."""
    from fontTools.ttLib import TTFont

    with TTFont(font_path(family), fontNumber=_BY_FAMILY[family].index, lazy=True) as font:
        return frozenset(font.getBestCmap())


def is_rtl(text: str) -> bool:
    """Whether text runs from right to left: its first strong character decides (Unicode bidi rule P2)."""
    for char in text:
        direction = unicodedata.bidirectional(char)
        if direction in ("R", "AL"):
            return True
        if direction == "L":
            return False
    return False


def script_of(text: str) -> str:
    """The script of most letters: ``latin``, ``cjk``, ``arabic``, ``thai``, ``devanagari`` or another in lower case."""
    counts: dict[str, int] = {}
    for char in text[:4000]:
        if char.isalpha() or unicodedata.category(char) in ("Mn", "Mc"):
            word = unicodedata.name(char, "?").partition(" ")[0]
            script = "cjk" if word in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO") else word.lower()
            if script not in ("combining",):
                counts[script] = counts.get(script, 0) + 1
    return max(counts, key=lambda name: (counts[name], name)) if counts else "latin"


_LINES = {  # (display, text) line height in ems, by what the script's marks need
    "latin": (1.06, 1.46), "greek": (1.1, 1.46), "cyrillic": (1.1, 1.46), "cjk": (1.22, 1.62), "arabic": (1.42, 1.72),
    "hebrew": (1.14, 1.5), "thai": (1.42, 1.7), "lao": (1.42, 1.7), "devanagari": (1.34, 1.66), "khmer": (1.5, 1.8),
    "myanmar": (1.55, 1.8),
}  # fmt: skip
_SPACED = ("latin", "greek", "cyrillic", "hebrew", "armenian", "georgian", "cjk")
_NO_SPACES = ("cjk", "thai", "lao", "khmer", "myanmar")
_LANGUAGES = {
    "arabic": "ar", "hebrew": "he", "thai": "th", "devanagari": "hi", "greek": "el", "cyrillic": "ru", "bengali": "bn",
    "tamil": "ta", "telugu": "te", "khmer": "km", "lao": "lo", "myanmar": "my", "georgian": "ka", "armenian": "hy",
}  # fmt: skip


def _language(text: str, tag: str, script: str) -> tuple[str, str | None]:
    """Language and region for shaping and breaking: from the tag, else guessed from the script."""
    parts = tag.split("-")
    language = parts[0].lower() if tag else ""
    region = next((part.lower() for part in parts[1:] if len(part) == 2), None)
    if language == "zh" and region is None:
        region = "tw" if any(part.lower() == "hant" for part in parts) else "cn"
    if not language and script == "cjk":
        names = {unicodedata.name(char, "?").partition(" ")[0] for char in text}
        language = "ja" if names & {"HIRAGANA", "KATAKANA"} else "ko" if "HANGUL" in names else "zh"
        region = "cn" if language == "zh" else None
    return language or _LANGUAGES.get(script, "en"), region


def _cjk_family(language: str, region: str | None) -> str:
    if language in ("ja", "ko"):
        return f"Noto Sans CJK {'JP' if language == 'ja' else 'KR'}"
    return f"Noto Sans CJK {'HK' if region in ('hk', 'mo') else 'TC' if region == 'tw' else 'SC'}"


def tidy(text: str, *, curly: bool = True, language: str = "") -> str:
    """Text as it should be set: composed, without control characters and stray spaces, with typographic marks.

    Args:
        text: Any text.
        curly: Whether straight apostrophes, English quotes and three dots become typographic ones.
        language: BCP 47 tag; quotes are only touched in English or where it is empty and the text is plain Latin.
    """
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n"))
    # Overrides and embeddings of direction can disguise text; isolates and marks stay.
    text = "".join(c for c in text if c == "\n" or c == "\t" or not (unicodedata.category(c) == "Cc" or "\u202a" <= c <= "\u202e"))
    text = re.sub(r"[ \t\u00a0]*\n[ \t\u00a0]*", "\n", re.sub(r"[ \t]+", " ", text)).strip()
    text = re.sub(r"\n{3,}", "\n\n", text)
    if curly:
        text = re.sub(r"(?<=\w)'(?=\w)", "’", text)
        text = re.sub(r"\.\.\.(?!\.)", "…", text)
        if language[:2].lower() in ("", "en") and script_of(text) == "latin":
            text = re.sub(r'"([^"\n]{1,400})"', r"“\1”", text)
            text = re.sub(r"(?<=\w) - (?=\w)", " – ", text)
    return text


class Typesetter:
    """Sets columns of text. One for each process is enough; it keeps fonts and Typst's own caches warm."""

    def __init__(self) -> None:
        try:
            import typst
        except ImportError as error:
            raise ModelUnavailable(f"cards need the package typst: {error}; run `make setup`") from None
        self._typst = typst
        self._compilers: dict[frozenset[Path], Any] = {}

    def prepare(self, text: str, family: str, language: str) -> tuple[str, list[str], list[str]]:
        """Find fonts for every character.

        Args:
            text: Tidied text.
            family: First family to try.
            language: BCP 47 tag or empty.

        Returns:
            The text (characters without glyphs replaced by their plain form or left out), the families it needs in
            order, and the characters that are left out.
        """
        order = [family, *(f.family for f in FONTS if f.family not in (family, "Fraunces") and "CJK" not in f.family)]
        lang, region = _language(text, language, script_of(text))
        order.insert(len(order) - 1, _cjk_family(lang, region))
        families: list[str] = [family]
        missing: list[str] = []

        def place(char: str) -> bool:
            code = ord(char)
            if code in _INVISIBLE or char.isspace():
                return True
            wanted = ["Noto Color Emoji"] if _ONLY_EMOJI.match(char) else order
            for name in wanted:
                if code in coverage(name):
                    if name not in families:
                        families.append(name)
                    return True
            return False

        out: list[str] = []
        for char in text:
            if place(char):
                out.append(char)
                continue
            plain = unicodedata.normalize("NFKC", char)
            if plain != char and all(place(c) for c in plain):
                out.append(plain)
            elif char not in missing:
                missing.append(char)
        done = "".join(out)
        if any(ord(c) in coverage("Noto Color Emoji") and ord(c) > 0x203B for c in done) and "Noto Color Emoji" not in families:
            families.append("Noto Color Emoji")
        families.sort(key=lambda name: order.index(name))
        return re.sub(r" {2,}", " ", done).strip(), families, missing

    def column(
        self, pieces: Sequence[Piece | Bar], *, width: int, height: int, align: str = "start", cut: Sequence[str] = ("body", "headline"),
        rungs: int = 24,
    ) -> Column:  # fmt: skip
        """Set pieces one below the other into a box, as large as they fit.

        All pieces shrink together from their largest to their smallest size. Where even that is too much, the pieces
        named in ``cut`` are shortened in that order, with an ellipsis.

        Args:
            pieces: What to set, from top to bottom.
            width: Of the column, pixels.
            height: Most that it may take, pixels.
            align: ``start`` (left, or right where text runs so) or ``center``.
            cut: Roles that may be cut, first to last.
            rungs: Steps between the largest and the smallest sizes.

        Returns:
            The column, on transparent ground.
        """
        missing: list[str] = []
        families: list[str] = []
        specs: list[dict[str, Any]] = []
        leading = next((p for p in pieces if isinstance(p, Piece)), None)
        for piece in pieces:
            if isinstance(piece, Bar):
                specs.append({
                    "kind": "bar", "width": piece.width, "height": piece.height, "fill": piece.colour, "gap": piece.gap,
                    "rtl": leading is not None and is_rtl(leading.text),
                })  # fmt: skip
                continue
            text, fonts, lost = self.prepare(piece.text, piece.family, piece.language)
            missing += [c for c in lost if c not in missing]
            families += [f for f in fonts if f not in families]
            if text:
                specs.append(_spec(piece, text, fonts))
                # Ragged on both sides, uneven lines of body text look accidental.
                specs[-1]["balance"] |= align == "center" and len(text) < 320
        largest = max((p.size for p in pieces if isinstance(p, Piece)), default=10)
        pad = int(largest * 0.5) + 4
        if not any(spec["kind"] == "text" for spec in specs):
            return Column(Image.new("RGBA", (width + 2 * pad, height + 2 * pad)), pad, 0.0, missing=missing)
        data = {
            "width": width, "height": height, "pad": pad, "align": align, "emoji": EMOJI, "pieces": specs, "rungs": rungs,
            "cut_order": list(cut),
        }  # fmt: skip
        picture, report = self._compile(data, families)
        return Column(
            picture, pad, report["height"], report["pieces"], report["cut"], report["shrink"], missing, report["broken"]
        )

    def _compile(self, data: dict[str, Any], families: Sequence[str]) -> tuple[Image.Image, dict[str, Any]]:
        # Typst searches folders; a folder without the CJK collection opens faster.
        paths = frozenset(font_path(family).parent for family in families)
        try:
            compiler = self._compilers.get(paths)
            if compiler is None:
                # A few sets of fonts stay warm; opening one costs some milliseconds.
                if len(self._compilers) >= 16:
                    self._compilers.pop(next(iter(self._compilers)))
                fonts = self._typst.Fonts(
                    include_system_fonts=False, include_embedded_fonts=False, font_paths=[str(p) for p in sorted(paths)]
                )
                compiler = self._typst.Compiler(str(TEMPLATE), root=str(TEMPLATE.parent), font_paths=fonts, ignore_system_fonts=True)
                self._compilers[paths] = compiler
            image = compiler.compile(format="png", ppi=72, sys_inputs={"spec": json.dumps(data, ensure_ascii=False)})
            report = json.loads(compiler.query("<report>", field="value", one=True))
        except self._typst.TypstError as error:
            raise FactoryError(f"typesetting failed: {error.message}", code="typesetting") from None
        if not isinstance(image, bytes):
            image = image[0]
        with Image.open(BytesIO(image), formats=["PNG"]) as opened:
            return opened.convert("RGBA"), report


def _spec(piece: Piece, text: str, fonts: list[str]) -> dict[str, Any]:
    script = script_of(text)
    language, region = _language(text, piece.language, script)
    lines = _LINES.get(script, (1.2, 1.6))
    spaceless = script in _NO_SPACES
    words = [] if spaceless else sorted(set(re.split(r"[\s/\-–—\u00ad\u200b]+", text)), key=lambda w: (-len(w), w))[:6]
    broken = re.sub(r"\S{9,}", lambda m: "\u200b".join(_clusters(m.group())), text)
    return {
        "kind": "text", "role": piece.role, "lines": _paragraphs(text), "breakable": _paragraphs(broken),
        # Quotes and dots that both fonts have come from the CJK font, full width, where the text is Chinese or Japanese.
        "fonts": [{"name": fonts[0], "covers": "latin-in-cjk"}, *fonts[1:]] if script == "cjk" and language != "ko" else fonts,
        "max": piece.size, "min": min(piece.min_size, piece.size), "fill": piece.colour, "weight": piece.weight,
        "lang": language, "region": region, "rtl": is_rtl(text), "line": lines[0] if piece.display else lines[1],
        "tracking": piece.spaced if script in _SPACED and (script != "cjk" or piece.spaced > 0) else 0,
        "paragraph": (lines[1] - 1) + 0.55, "hyphenate": False, "balance": piece.display or piece.role in ("kicker", "footer"),
        "gap": piece.gap, "max_lines": piece.max_lines, "tokens": [w for w in words if w],
    }  # fmt: skip


def _paragraphs(text: str) -> list[str]:
    return [line for line in re.split(r"\n\n+", text) if line.strip()] or [text]


def _clusters(word: str) -> list[str]:
    """User-perceived characters of a word: marks stay with their base."""
    out: list[str] = []
    for char in word:
        joined = bool(out) and (unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf") or out[-1].endswith("\u200d"))
        if joined:
            out[-1] += char
        else:
            out.append(char)
    return out

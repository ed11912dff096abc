"""Picture-caption datasets: a folder, zip or tar of pictures with a `captions.jsonl`.

Each line of `captions.jsonl` is an object:

    {"file": "owl.png", "captions": ["an owl", "a bird of the night"], "weight": 1.0, "flip": true}

`file` is a path inside the dataset; `captions` are one or more ways to ask for the picture; `weight` (default 1) is how
often it is drawn in comparison with the others; `flip` (default false) says that its mirror image is right too.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

CAPTIONS_FILE = "captions.jsonl"
MINIMUM_PICTURES = 8
MAXIMUM_CAPTION = 1000
MAXIMUM_FILE = 64 * 2**20
MAXIMUM_PIXELS = 64_000_000
_KEYS = {"file", "captions", "weight", "flip"}


class DatasetError(ValueError):
    """A dataset cannot be used; the message names the file and line, what was found and what is allowed."""


class _Source(Protocol):
    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        return sorted(p.relative_to(self._root).as_posix() for p in self._root.rglob("*") if p.is_file())

    def read(self, name: str) -> bytes:
        path = self._root / name
        # A link may lead out of the dataset, to files that whoever submitted it has no right to.
        if not path.resolve().is_relative_to(self._root.resolve()):
            raise DatasetError(f"{name}: leads outside the dataset; allowed are files inside it")
        if path.stat().st_size > MAXIMUM_FILE:
            raise DatasetError(f"{name}: {path.stat().st_size} bytes; allowed are {MAXIMUM_FILE}")
        return path.read_bytes()


class _Zip:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._sizes = {i.filename: i.file_size for i in archive.infolist() if not i.is_dir()}

    def names(self) -> list[str]:
        return sorted(self._sizes)

    def read(self, name: str) -> bytes:
        if self._sizes[name] > MAXIMUM_FILE:
            raise DatasetError(f"{name}: {self._sizes[name]} bytes; allowed are {MAXIMUM_FILE}")
        return self._archive.read(name)


class _Tar:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members = {m.name.removeprefix("./"): m for m in archive.getmembers() if m.isfile()}

    def names(self) -> list[str]:
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        member = self._members[name]
        if member.size > MAXIMUM_FILE:
            raise DatasetError(f"{name}: {member.size} bytes; allowed are {MAXIMUM_FILE}")
        handle = self._archive.extractfile(member)
        if handle is None:
            raise DatasetError(f"{name}: is no regular file")
        return handle.read()


@contextmanager
def _open(path: Path) -> Iterator[tuple[_Source, str]]:
    """Open a dataset; yield its source and the prefix under which `captions.jsonl` lies (archives often have one)."""
    if path.is_dir():
        yield _with_prefix(_Folder(path), path)
    elif not path.is_file():
        raise DatasetError(f"{path.name}: no such folder or file; allowed is a folder, a zip or a tar")
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield _with_prefix(_Zip(archive), path)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            yield _with_prefix(_Tar(tar), path)
    else:
        raise DatasetError(f"{path.name}: neither a folder nor a zip nor a tar")


def _with_prefix(source: _Source, path: Path) -> tuple[_Source, str]:
    found = [n for n in source.names() if PurePosixPath(n).name == CAPTIONS_FILE and n.count("/") <= 1]
    if not found:
        raise DatasetError(f"{path.name}: holds no {CAPTIONS_FILE}; it must lie at the top, or in the only folder there")
    if len(found) > 1 and CAPTIONS_FILE not in found:
        raise DatasetError(f"{path.name}: holds {len(found)} files {CAPTIONS_FILE}; allowed is one")
    name = CAPTIONS_FILE if CAPTIONS_FILE in found else found[0]
    return source, name.removesuffix(CAPTIONS_FILE)


def _check_line(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DatasetError(f"{where}: is a {type(record).__name__}; allowed is an object")
    if unknown := sorted(set(record) - _KEYS):
        raise DatasetError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(_KEYS))}")
    file = record.get("file")
    if not isinstance(file, str) or not file:
        raise DatasetError(f"{where}: file is {file!r}; allowed is the path of a picture inside the dataset")
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise DatasetError(f"{where}: file is {file!r}; allowed is a path inside the dataset")
    captions = record.get("captions")
    if not isinstance(captions, list) or not captions:
        raise DatasetError(f"{where}: captions is {captions!r}; allowed is a list of at least one text")
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise DatasetError(f"{where}: a caption is {caption!r}; allowed is text that is not empty")
        if len(caption) > MAXIMUM_CAPTION:
            raise DatasetError(f"{where}: a caption has {len(caption)} characters; allowed are {MAXIMUM_CAPTION}")
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise DatasetError(f"{where}: weight is {weight!r}; allowed is a number above 0")
    if not isinstance(record.get("flip", False), bool):
        raise DatasetError(f"{where}: flip is {record['flip']!r}; allowed is true or false")
    return record


def _decode(data: bytes, resolution: int, where: str) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > MAXIMUM_PIXELS:
                raise DatasetError(f"{where}: {opened.width}x{opened.height} pixels; allowed are {MAXIMUM_PIXELS}")
            picture = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{where}: not a picture that can be read as RGBA: {error}") from error
    edge = max(picture.size)
    if picture.width != picture.height:
        square = Image.new("RGBA", (edge, edge))
        square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
        picture = square
    # Shrinking straight alpha would let the colour of invisible pixels bleed in.
    premultiplied = picture.convert("RGBa")
    if edge != resolution:
        premultiplied = premultiplied.resize((resolution, resolution), Image.Resampling.LANCZOS)
    # Pillow has no way from RGBa to an array but through its bytes.
    return np.frombuffer(premultiplied.tobytes(), dtype=np.uint8).reshape(resolution, resolution, 4)


def digest(path: Path) -> str:
    """Return the SHA-256 of a dataset's content: names and bytes of all its files in the order of their names.

    A folder and an archive of the same files have the same digest.
    """
    total = hashlib.sha256()
    with _open(path) as (source, prefix):
        for name in source.names():
            if not name.startswith(prefix):
                continue
            inner = hashlib.sha256(source.read(name)).hexdigest()
            total.update(f"{name.removeprefix(prefix)}\0{inner}\n".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class PictureDataset:
    """Pictures and their captions in memory.

    Attributes:
        pictures: Premultiplied RGBA, (count, resolution, resolution, 4), uint8.
        captions: One list of texts for each picture.
        weights: How often a picture is drawn, (count,), float64, positive.
        flips: Whether its mirror image is right too, (count,), bool.
        files: Names inside the dataset.
        digest: SHA-256 of the content.
    """

    pictures: NDArray[np.uint8]
    captions: list[list[str]]
    weights: NDArray[np.float64]
    flips: NDArray[np.bool_]
    files: list[str]
    digest: str

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def resolution(self) -> int:
        """Edge of the pictures, pixels."""
        return int(self.pictures.shape[1])

    @classmethod
    def load(cls, path: Path, resolution: int) -> PictureDataset:
        """Read and check a dataset.

        Args:
            path: A folder, zip or tar.
            resolution: Edge to which pictures are scaled, pixels, 8 to 1024; those that are not square get transparent
                margins.

        Raises:
            DatasetError: Something is wrong; the first problem is named with its file and line.
        """
        if not 8 <= resolution <= 1024:
            raise DatasetError(f"resolution is {resolution}; allowed is 8 to 1024")
        pictures: list[NDArray[np.uint8]] = []
        records: list[dict[str, Any]] = []
        seen: dict[str, int] = {}
        with _open(path) as (source, prefix):
            names = set(source.names())
            try:
                lines = source.read(prefix + CAPTIONS_FILE).decode("utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise DatasetError(f"{CAPTIONS_FILE}: not UTF-8: {error}") from error
            for number, text in enumerate(lines, 1):
                if not text.strip():
                    continue
                where = f"{CAPTIONS_FILE}, line {number}"
                record = _check_line(text, where)
                file = record["file"]
                if file in seen:
                    raise DatasetError(f"{where}: {file!r} stands in line {seen[file]} already; allowed is one line each")
                seen[file] = number
                if prefix + file not in names:
                    raise DatasetError(f"{where}: picture {file!r} is missing")
                pictures.append(_decode(source.read(prefix + file), resolution, f"{where}: {file}"))
                records.append(record)
        if len(pictures) < MINIMUM_PICTURES:
            raise DatasetError(f"{CAPTIONS_FILE}: {len(pictures)} pictures; allowed are at least {MINIMUM_PICTURES}")
        return cls(
            pictures=np.stack(pictures),
            captions=[[c.strip() for c in record["captions"]] for record in records],
            weights=np.array([float(record.get("weight", 1.0)) for record in records]),
            flips=np.array([bool(record.get("flip", False)) for record in records]),
            files=[record["file"] for record in records],
            digest=digest(path),
        )

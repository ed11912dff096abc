"""Picture-caption datasets: a folder, zip or tar of pictures with a `captions.jsonl`.

Each line of `captions.jsonl` is an object:

    {"file": "owl.png", "captions": ["an owl", "a bird of the night"], "weight": 1.0, "flip": true,
     "subject": "owl"}

`file` is a path inside the dataset; `captions` are one or more ways to ask for the picture; `weight` (default 1) is how
often it is drawn in comparison with the others; `flip` (default false) says that its mirror image is right too;
`subject` (default the file) is what it shows: pictures of one subject, in several colours say, share it.

An archive is never unpacked: its members are read one by one under caps on their number, sizes and ratio to the archive,
and archives inside it are just files. One that a user sent is read in the confined child (`worker.confined`).
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import stat
import struct
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worker.input_file import InputFile
from worker.media.image import DECODE_FAULTS, open_checked

CAPTIONS_FILE = "captions.jsonl"
MINIMUM_PICTURES = 8
MAXIMUM_PICTURES = 500_000
MAXIMUM_CAPTION = 1000
MAXIMUM_FILE = 64 * 2**20
MAXIMUM_PIXELS = 64_000_000
MAXIMUM_MEMBERS = 600_000
MAXIMUM_NAME = 512
MAXIMUM_TOTAL = 8 * 2**30
MAXIMUM_RATIO = 20
"""Most bytes that a byte of archive may become; pictures hardly shrink, and texts shrink by about ten."""
FREE_TOTAL = 64 * 2**20
"""Bytes that even the smallest archive may unpack to."""
_BLOCK = 1 << 18
_KEYS = {"file", "captions", "weight", "flip", "subject"}
_ARCHIVE_FAULTS = (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, KeyError, struct.error, zlib.error,
                   zipfile.BadZipFile, tarfile.TarError, OverflowError)  # fmt: skip


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


class _Caps:
    """Counts what an archive claims to hold, before any of it is unpacked.

    Args:
        size: Bytes of the archive.
    """

    def __init__(self, size: int) -> None:
        self.total = min(MAXIMUM_TOTAL, max(FREE_TOTAL, MAXIMUM_RATIO * size))
        self._members = self._unpacked = 0
        self._seen: set[str] = set()

    def take(self, name: str, size: int) -> None:
        """One more member.

        Raises:
            DatasetError: If it is one too many, too large, or has a name that leads elsewhere.
        """
        shown = name if len(name) <= 100 else name[:100] + "…"
        self._members += 1
        self._unpacked += size
        if self._members > MAXIMUM_MEMBERS:
            raise DatasetError(f"the archive has more than {MAXIMUM_MEMBERS} members; that is the most that is allowed")
        if len(name) > MAXIMUM_NAME:
            raise DatasetError(f"{shown}: a name of {len(name)} characters; allowed are {MAXIMUM_NAME}")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or name[1:2] == ":":
            raise DatasetError(f"{shown}: leads outside the archive; allowed are paths inside it")
        if name in self._seen:
            raise DatasetError(f"{shown}: stands in the archive twice")
        self._seen.add(name)
        if size > MAXIMUM_FILE:
            raise DatasetError(f"{shown}: {size} bytes; allowed are {MAXIMUM_FILE}")
        if self._unpacked > self.total:
            raise DatasetError(
                f"the archive unpacks to more than {self.total} bytes; allowed are {MAXIMUM_RATIO} times its size, "
                f"{FREE_TOTAL} for a small one, and {MAXIMUM_TOTAL} for any"
            )


def _read_all(handle: IO[bytes], name: str, size: int) -> bytes:
    """A member's bytes, block by block: one read of everything would believe the compressed data instead of the header."""
    parts, total = [], 0
    while block := handle.read(_BLOCK):
        parts.append(block)
        total += len(block)
        if total > size:
            raise DatasetError(f"{name}: holds more than the {size} bytes that the archive says")
    return b"".join(parts)


class _Zip:
    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._members: dict[str, zipfile.ZipInfo] = {}
        caps, packed = _Caps(size), 0
        for info in archive.infolist():
            caps.take(info.filename, info.file_size)
            packed += info.compress_size
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DatasetError(f"{info.filename}: is a link; allowed are files and folders")
            if info.flag_bits & 0x1:
                raise DatasetError(f"{info.filename}: is encrypted; allowed are plain files")
            # Others may ask for gigabytes of dictionary, and nobody needs them for pictures.
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DatasetError(f"{info.filename}: is packed by method {info.compress_type}; allowed are stored and deflated")
            if not info.is_dir():
                self._members[info.filename] = info
        if packed > size:
            raise DatasetError(f"the archive's members overlap: {packed} packed bytes in a file of {size}")

    def names(self) -> list[str]:
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        info = self._members[name]
        with self._archive.open(info) as handle:
            return _read_all(handle, name, info.file_size)


def _check_directory(file: BinaryIO, size: int) -> None:
    """Look at a zip's end record: the library reads the whole directory at once, before anybody can count."""
    tail = min(size, 65_557)
    file.seek(size - tail)
    data = file.read(tail)
    at = data.rfind(b"PK\5\6")
    if at < 0 or len(data) < at + 22:
        raise DatasetError("the zip has no directory; it is cut short or no zip")
    length = struct.unpack_from("<I", data, at + 12)[0]
    locator = data.rfind(b"PK\6\7", 0, at)
    if locator >= 0 and len(data) >= locator + 20:
        where = struct.unpack_from("<Q", data, locator + 8)[0]
        if where + 56 <= size:
            file.seek(where)
            record = file.read(56)
            if record[:4] == b"PK\6\6":
                length = max(length if length != 0xFFFFFFFF else 0, struct.unpack_from("<Q", record, 40)[0])
    # 46 bytes an entry, and its name. Half of the names' most is far more than any real mean.
    if length > size or length > MAXIMUM_MEMBERS * (46 + 100):
        raise DatasetError(f"the zip's directory has {length} bytes; allowed are {min(size, MAXIMUM_MEMBERS * 146)}")
    file.seek(0)


class _Bounded(io.RawIOBase):
    """A tar file that nobody reads in gulps: its headers may claim any length for names and attributes."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 2**20:
            raise DatasetError(f"the tar asks for {size} bytes at once, in a header; allowed are {2**20}")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


class _Tar:
    def __init__(self, archive: tarfile.TarFile, size: int) -> None:
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        caps = _Caps(size)
        # One after the other: what is too large is refused before what follows is looked for.
        while (member := archive.next()) is not None:
            name = member.name.removeprefix("./")
            caps.take(name, member.size if member.isfile() else 0)
            try:
                tarfile.data_filter(member, "/dataset")
            except tarfile.FilterError as error:
                raise DatasetError(f"{name[:100]}: is not allowed in an archive: {error}") from None
            if member.isfile():
                self._members[name] = member
            archive.members = []  # the library's own list would only double ours

    def names(self) -> list[str]:
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        member = self._members[name]
        handle = self._archive.extractfile(member)
        if handle is None:
            raise DatasetError(f"{name}: is no regular file")
        return _read_all(handle, name, member.size)


def _expand(packed: IO[bytes], spare: BinaryIO, most: int) -> BinaryIO:
    """Decompress a tar into a temporary file: members are wanted in another order than they lie in."""
    total = 0
    while block := packed.read(_BLOCK):
        total += len(block)
        if total > most:
            raise DatasetError(
                f"the archive unpacks to more than {most} bytes; allowed are {MAXIMUM_RATIO} times its size, {FREE_TOTAL} for a small one"
            )
        spare.write(block)
    spare.seek(0)
    return spare


@contextmanager
def _open(path: Path) -> Iterator[tuple[_Source, str]]:
    """Open a dataset; yield its source and the prefix under which `captions.jsonl` lies (archives often have one)."""
    if path.is_dir():
        yield _with_prefix(_Folder(path), path.name)
    elif not path.is_file():
        raise DatasetError(f"{path.name}: no such folder or file; allowed is a folder, a zip or a tar")
    else:
        with path.open("rb") as file, tempfile.TemporaryFile() as spare, open_archive(file, spare, path.name) as found:  # type: ignore[arg-type]
            yield found


@contextmanager
def open_archive(file: BinaryIO, spare: BinaryIO, name: str) -> Iterator[tuple[_Source, str]]:
    """Open a dataset's archive.

    Args:
        file: Zip or tar, the latter plain or packed by gzip or bzip2 (xz may ask for gigabytes of dictionary); told apart by its first bytes, whatever follows.
        spare: Empty temporary file, for an unpacked tar.
        name: What messages call it.

    Yields:
        Its members, and the prefix under which `captions.jsonl` lies.

    Raises:
        DatasetError: If it is neither, damaged, or a bomb.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(8)
    file.seek(0)
    try:
        if start[:4] in (b"PK\3\4", b"PK\5\6"):
            _check_directory(file, size)
            with zipfile.ZipFile(file) as archive:
                yield _with_prefix(_Zip(archive, size), name)
            return
        most = min(MAXIMUM_TOTAL, max(FREE_TOTAL, MAXIMUM_RATIO * size))
        if start[:2] == b"\x1f\x8b":
            file = _expand(gzip.GzipFile(fileobj=file), spare, most)
        elif start[:3] == b"BZh":
            file = _expand(bz2.BZ2File(file), spare, most)
        try:
            tar = tarfile.open(fileobj=_Bounded(file), mode="r:")  # noqa: SIM115 (closed below)
        except tarfile.ReadError:
            raise DatasetError(f"{name}: neither a folder nor a zip nor a tar (plain, gzip or bzip2)") from None
        with tar:
            yield _with_prefix(_Tar(tar, size), name)
    except DatasetError:
        raise
    except _ARCHIVE_FAULTS as error:
        raise DatasetError(f"{name}: the archive is damaged: {str(error)[:200] or type(error).__name__}") from None


def _with_prefix(source: _Source, path: str) -> tuple[_Source, str]:
    found = [n for n in source.names() if PurePosixPath(n).name == CAPTIONS_FILE and n.count("/") <= 1]
    if not found:
        raise DatasetError(f"{path}: holds no {CAPTIONS_FILE}; it must lie at the top, or in the only folder there")
    if len(found) > 1 and CAPTIONS_FILE not in found:
        raise DatasetError(f"{path}: holds {len(found)} files {CAPTIONS_FILE}; allowed is one")
    name = CAPTIONS_FILE if CAPTIONS_FILE in found else found[0]
    return source, name.removesuffix(CAPTIONS_FILE)


def check_line(text: str, where: str) -> dict[str, Any]:
    """A line of `captions.jsonl` as an object.

    Args:
        text: The line.
        where: What messages call it.

    Raises:
        DatasetError: If it is not one.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError, too
        raise DatasetError(f"{where}: not JSON: {str(error)[:200]}") from error
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
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1e9:
        raise DatasetError(f"{where}: weight is {str(weight)[:40]}; allowed is a number above 0, up to 1e9")
    if not isinstance(record.get("flip", False), bool):
        raise DatasetError(f"{where}: flip is {record['flip']!r}; allowed is true or false")
    subject = record.get("subject", file)
    if not isinstance(subject, str) or not subject.strip() or len(subject) > MAXIMUM_NAME:
        raise DatasetError(
            f"{where}: subject is {str(subject)[:40]!r}; allowed is a text of 1 to {MAXIMUM_NAME} characters"
        )
    return record


def _decode(data: bytes, resolution: int, where: str) -> NDArray[np.uint8]:
    try:
        with open_checked(data) as opened:
            if opened.width * opened.height > MAXIMUM_PIXELS:
                raise DatasetError(f"{where}: {opened.width}x{opened.height} pixels; allowed are {MAXIMUM_PIXELS}")
            picture = opened.convert("RGBA")
    except DECODE_FAULTS as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{where}: not a picture that can be read as RGBA: {str(error)[:200]}") from error
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
    with _open(path) as (source, prefix):
        return digest_of(source, prefix)


def digest_of(source: _Source, prefix: str, beat: Callable[[], None] | None = None) -> str:
    """`digest` of an opened dataset.

    Args:
        source: Its members.
        prefix: Where its `captions.jsonl` lies.
        beat: Called for each file.
    """
    total = hashlib.sha256()
    for name in source.names():
        if not name.startswith(prefix):
            continue
        if beat:
            beat()
        inner = hashlib.sha256(source.read(name)).hexdigest()
        total.update(f"{name.removeprefix(prefix)}\0{inner}\n".encode())
    return total.hexdigest()


def read_pictures(source: _Source, prefix: str, resolution: int) -> Iterator[tuple[dict[str, Any], NDArray[np.uint8]]]:
    """Go through an opened dataset, in the order of its lines.

    Args:
        source: Its members.
        prefix: Where its `captions.jsonl` lies.
        resolution: Edge to which pictures are scaled, pixels.

    Yields:
        What the line says, and the picture: premultiplied RGBA, (resolution, resolution, 4), uint8.

    Raises:
        DatasetError: If a line or picture cannot be used, or there are too few or too many of them.
    """
    seen: dict[str, int] = {}
    names = set(source.names())
    try:
        lines = source.read(prefix + CAPTIONS_FILE).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{CAPTIONS_FILE}: not UTF-8: {error}") from error
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where = f"{CAPTIONS_FILE}, line {number}"
        record = check_line(text, where)
        file = record["file"]
        if file in seen:
            raise DatasetError(f"{where}: {file!r} stands in line {seen[file]} already; allowed is one line each")
        seen[file] = number
        if len(seen) > MAXIMUM_PICTURES:
            raise DatasetError(f"{where}: more than {MAXIMUM_PICTURES} pictures; that is the most that is allowed")
        if prefix + file not in names:
            raise DatasetError(f"{where}: picture {file!r} is missing")
        yield record, _decode(source.read(prefix + file), resolution, f"{where}: {file}")
    if len(seen) < MINIMUM_PICTURES:
        raise DatasetError(f"{CAPTIONS_FILE}: {len(seen)} pictures; allowed are at least {MINIMUM_PICTURES}")


@dataclass(frozen=True)
class PictureDataset:
    """Pictures and their captions in memory.

    Attributes:
        pictures: Premultiplied RGBA, (count, resolution, resolution, 4), uint8.
        captions: One list of texts for each picture.
        weights: How often a picture is drawn, (count,), float64, positive.
        flips: Whether its mirror image is right too, (count,), bool.
        files: Names inside the dataset.
        subjects: What each picture shows; the file's name where the dataset does not say.
        digest: SHA-256 of the content.
    """

    pictures: NDArray[np.uint8]
    captions: list[list[str]]
    weights: NDArray[np.float64]
    flips: NDArray[np.bool_]
    files: list[str]
    subjects: list[str]
    digest: str

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def resolution(self) -> int:
        """Edge of the pictures, pixels."""
        return int(self.pictures.shape[1])

    @classmethod
    def load(cls, path: Path | InputFile, resolution: int, beat: Callable[[], None] | None = None) -> PictureDataset:
        """Read and check a dataset.

        Args:
            path: A folder, zip or tar of the factory's own, or an input; one that is not trusted is read in the confined
                child.
            resolution: Edge to which pictures are scaled, pixels, 8 to 1024; those that are not square get transparent
                margins.
            beat: Called about once a second while it reads; what it raises stops the reading.

        Raises:
            DatasetError: Something is wrong; the first problem is named with its file and line.
            InputError: It kills whoever reads it, or takes too long.
        """
        if not 8 <= resolution <= 1024:
            raise DatasetError(f"resolution is {resolution}; allowed is 8 to 1024")
        if isinstance(path, InputFile):
            if not path.trusted and not path.path.is_dir():
                from worker import confined

                return cls._build(*confined.read_dataset(path, resolution, beat))
            path = path.path
        pictures: list[NDArray[np.uint8]] = []
        records: list[dict[str, Any]] = []
        every_second = _every_second(beat) if beat else None
        with _open(path) as (source, prefix):
            for record, picture in read_pictures(source, prefix, resolution):
                pictures.append(picture)
                records.append(record)
                if every_second:
                    every_second()
            found = digest_of(source, prefix, every_second)
        return cls._build(np.stack(pictures), records, found)

    @classmethod
    def _build(cls, pictures: NDArray[np.uint8], records: list[dict[str, Any]], found: str) -> PictureDataset:
        return cls(
            pictures=pictures,
            captions=[[c.strip() for c in record["captions"]] for record in records],
            weights=np.array([float(record.get("weight", 1.0)) for record in records]),
            flips=np.array([bool(record.get("flip", False)) for record in records]),
            files=[record["file"] for record in records],
            subjects=[record.get("subject", record["file"]) for record in records],
            digest=found,
        )


def _every_second(beat: Callable[[], None]) -> Callable[[], None]:
    last = time.monotonic()

    def call() -> None:
        nonlocal last
        if time.monotonic() - last >= 1.0:
            last = time.monotonic()
            beat()

    return call

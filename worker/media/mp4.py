"""A look at the index of an MP4 or QuickTime file before libav reads it.

libav makes an entry in memory for each sample that the index claims, and a few bytes may claim billions: fifty million took
5 to 18 s and 1.8 GB here. Only counts are looked at, so this is no parser, and what slips through still meets the decoder's limits.
"""

import bisect
import struct
from typing import BinaryIO

from contentfactory.errors import InputError

MAX_SAMPLES = 2_500_000
"""Frames and blocks of sound in all tracks: nine hours of video at 60 frames a second and its sound."""
MAX_EDITS = 10_000
MAX_BOXES = 100_000
MAX_INDEX = 128 * 2**20
_BLOCK = 1 << 22
_OVERLAP = 24
_SMALLEST = 24
_MEDIA = (b"mdat", b"wide")
_STARTS = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"moof", b"styp", b"sidx", b"pnot", b"uuid")


def check_index(stream: BinaryIO, name: str) -> None:
    """Refuse a file whose index claims more than any real one; others, and other formats, pass.

    Args:
        stream: The file; left at its beginning.
        name: What messages call it.

    Raises:
        InputError: If it claims too many samples, edits or boxes.
    """
    stream.seek(0)
    if stream.read(8)[4:] not in _STARTS:
        stream.seek(0)
        return
    size = stream.seek(0, 2)
    at = boxes = index = samples = 0
    while at + 8 <= size:
        stream.seek(at)
        head = stream.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if length < 8:  # 0: to the end of the file; 1 to 7: nonsense, and whatever follows is taken as this box's
            length = size - at
        boxes += 1
        if boxes > MAX_BOXES:
            raise _too_many(name, f"more than {MAX_BOXES} boxes")
        length = min(length, size - at)
        if kind not in _MEDIA and length >= _SMALLEST:
            index += length
            if index > MAX_INDEX:
                raise _too_many(name, f"an index of more than {MAX_INDEX} bytes")
            samples += _count(stream, at, length, name)
            if samples > MAX_SAMPLES:
                raise _too_many(name, f"{samples} samples; allowed are {MAX_SAMPLES}")
        at += length
    stream.seek(0)


def _count(stream: BinaryIO, start: int, length: int, name: str) -> int:
    """Samples that a box and those in it claim. Names are searched for, wherever they stand: boxes nest in many ways."""
    samples = 0
    for offset in range(0, length, _BLOCK):
        stream.seek(start + offset)
        # A count may lie across the border of two blocks; one whose name lies in the next block is found there.
        data = stream.read(min(_BLOCK + _OVERLAP, length - offset))
        edge = min(_BLOCK, len(data))
        if data.find(b"cmov", 0, edge) >= 0:
            raise _too_many(name, "a compressed index")
        for at in _find(data, b"elst", edge):
            if _number(data, at + 8) > MAX_EDITS:
                raise _too_many(name, f"{_number(data, at + 8)} edits; allowed are {MAX_EDITS}")
        tracks = _find(data, b"trak", edge)
        for kind, where in ((b"stsz", 12), (b"stz2", 12), (b"trun", 8)):
            for at in _find(data, kind, edge):
                # Bare samples of sound (one size for all, each one tick long) are read by the chunk, not one by one.
                if not (kind == b"stsz" and _number(data, at + 8) and _is_bare_sound(_around(data, tracks, at))):
                    samples += _number(data, at + where)
    return samples


def _find(data: bytes, kind: bytes, edge: int) -> list[int]:
    found, at = [], data.find(kind, 0, edge + 3)
    while at >= 0 and len(found) <= MAX_BOXES:
        found.append(at)
        at = data.find(kind, at + 4, edge + 3)
    return found


def _around(data: bytes, tracks: list[int], at: int) -> bytes:
    """The track that something at ``at`` belongs to."""
    n = bisect.bisect(tracks, at)
    return data[tracks[n - 1] if n else 0 : tracks[n] if n < len(tracks) else len(data)]


def _is_bare_sound(track: bytes) -> bool:
    """Whether a track is sound whose table of durations has one row, of one tick a sample."""
    at = track.find(b"stts")
    return b"soun" in track and at >= 0 and _number(track, at + 8) == 1 and _number(track, at + 16) == 1


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _too_many(name: str, what: str) -> InputError:
    return InputError(f"{name} has {what}; it is no real recording", code="too_large")

"""The threat table's bombs, playlists, polyglots and archives: each is refused, or decoded within its caps, in under a second
and in bounded memory, by the functions that the runners call; and a job that brings one leaves its neighbours alone.
"""

import base64
import functools
import gc
import hashlib
import io
import json
import random
import re
import struct
import sys
import tarfile
import time
import wave
import weakref
import zipfile
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from silent import Silent
from sqlalchemy import select

from contentfactory.errors import FactoryError, InputError
from contentfactory.ids import new_id
from contentfactory.jobs import spec as specs
from contentfactory.jobs.spec import AudioInput, ImageInput, Params, get_kind, kind
from contentfactory.settings import load_settings
from db import jobs, lifecycle, projects, registry
from db.models import Job
from storage.keys import artifact_key
from storage.memory import MemoryStore
from worker import confined, runners
from worker.context import Failure, InputFile, Output
from worker.execution import Executor
from worker.inputs import Resolved
from worker.media import audio, sniff, video
from worker.media.image import open_image
from worker.training.data import DatasetError, PictureDataset

LIMIT_S = 1.0
WORKER_MB, CHILD_MB = 96, 400

# The files


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int = 8, height: int = 8, extra: bytes = b"", rows: bytes | None = None) -> bytes:
    """A grey PNG, with further chunks after its header."""
    pixels = zlib.compress(bytes((width + 1) * height) if rows is None else rows, 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def picture(kind_: str, size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(out, kind_, **options)
    return out.getvalue()


def flat_png_bomb() -> bytes:
    """81 million pixels in 10 kB, the way a row filter and deflate allow: 243 MB as RGB."""
    packer = zlib.compressobj(9)
    row = bytes(9000 // 8 + 1)
    body = b"".join(packer.compress(row) for _ in range(9000)) + packer.flush()
    head = struct.pack(">IIBBBBB", 9000, 9000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(picture("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_scans() -> bytes:
    """A progressive JPEG of 4 million pixels whose last scan stands there 1,500 times."""
    data = picture("JPEG", (2000, 2000), progressive=True, quality=5)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 1500 + data[-2:]


def exif_bomb() -> bytes:
    """An EXIF block whose directory points at itself and claims billions of values."""
    entries = b"".join(struct.pack("<HHII", 0x8769 + n % 2, 4, 0xFFFFFFFF, 8) for n in range(2000))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 2000) + entries + b"\x08\0\0\0"


def animation(kind_: str, frames: int) -> bytes:
    # Each of another colour: writers merge frames that are equal.
    first, *rest = [Image.new("RGB", (16, 16), (n % 251, n % 241, n % 239)) for n in range(frames)]
    out = io.BytesIO()
    first.save(out, kind_, save_all=True, append_images=rest)
    return out.getvalue()


def bmp_header() -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)


def webp_canvas() -> bytes:
    size = struct.pack("<I", 16383 - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size * 2
    return b"RIFF" + struct.pack("<I", len(body)) + body


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def sound(seconds: float = 1.0, rate: int = 8000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.sin(np.arange(int(seconds * rate)) / 5).astype("<f4").__mul__(9000).astype("<i2").tobytes())
    return out.getvalue()


@functools.cache
def ten_hours() -> bytes:
    import soundfile

    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", 4000, 1, format="FLAC", subtype="PCM_16", compression_level=0.0) as file:
        block = np.zeros(4000 * 600, np.int16)
        for _ in range(60):
            file.write(block)
    return out.getvalue()


def flac_bomb(honest: bool) -> bytes:
    """Ten hours of silence in two megabytes. Dishonest: the header does not tell the length."""
    data = bytearray(ten_hours())
    if not honest:
        data[21] &= 0xF0
        data[22:26] = bytes(4)
    return bytes(data)


def wav_claims(**claims: int) -> bytes:
    data = bytearray(sound())
    for name, (at, form) in {"channels": (22, "<H"), "rate": (24, "<I"), "align": (32, "<H"), "size": (40, "<I")}.items():
        if name in claims:
            struct.pack_into(form, data, at, claims[name])
    return bytes(data)


def chained_ogg() -> bytes:
    one = audio.encode(audio.AudioBuffer(np.zeros((1, 4800), np.float32), 48_000), "opus")
    return one * 400


def box(name: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack(">I", 8 + len(data)) + name + data


def mp4(*, edits: int = 0, samples: int = 1, width: int = 64) -> bytes:
    """The skeleton of an MP4 with one video track."""
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    entry = bytes(6) + struct.pack(">H", 1) + bytes(16) + struct.pack(">HH", width, width) + bytes(50)
    table = box(
        b"stbl",
        box(b"stsd", struct.pack(">II", 0, 1), box(b"mp4v", entry)),
        box(b"stts", struct.pack(">IIII", 0, 1, samples, 1)),
        box(b"stsc", struct.pack(">IIIII", 0, 1, 1, samples, 1)),
        box(b"stsz", struct.pack(">III", 0, 16, samples)),
        box(b"stco", struct.pack(">III", 0, 1, 40)),
    )
    media = box(
        b"mdia",
        box(b"mdhd", struct.pack(">IIIIIHH", 0, 0, 0, 25, samples, 0, 0)),
        box(b"hdlr", struct.pack(">II", 0, 0), b"vide", bytes(13)),
        box(b"minf", box(b"vmhd", bytes(12)), table),
    )
    track = [box(b"tkhd", struct.pack(">IIIIII", 3, 0, 0, 1, 0, samples), bytes(16), matrix, struct.pack(">II", width << 16, width << 16))]
    if edits:
        track.append(box(b"edts", box(b"elst", struct.pack(">II", 0, edits), struct.pack(">IiI", 1, 0, 0x10000) * edits)))
    head = box(b"mvhd", struct.pack(">IIIII", 0, 0, 0, 1000, 1000), bytes(76), struct.pack(">I", 2))
    return box(b"ftyp", b"isom", bytes(4), b"isom") + box(b"moov", head, box(b"trak", *track, media)) + box(b"mdat", bytes(64))


def fragment(samples: int) -> bytes:
    """A fragment that claims samples without saying anything of each: 30 bytes for any number of them."""
    run = box(b"trun", struct.pack(">II", 0, samples))
    return box(b"moof", box(b"mfhd", bytes(8)), box(b"traf", box(b"tfhd", struct.pack(">II", 0x20000, 1)), run)) + box(b"mdat", bytes(64))


def ebml(number: str, data: bytes) -> bytes:
    return bytes.fromhex(number) + struct.pack(">Q", len(data) | 1 << 56) + data


def mkv(width: int, height: int, frames: int = 4) -> bytes:
    size = ebml("b0", struct.pack(">I", width)) + ebml("ba", struct.pack(">I", height))
    track = ebml("ae", ebml("d7", b"\1") + ebml("73c5", b"\1") + ebml("83", b"\1") + ebml("86", b"V_UNCOMPRESSED") + ebml("e0", size + ebml("2eb524", b"I420")))
    blocks = b"".join(ebml("a3", b"\x81" + struct.pack(">h", n % 30_000) + b"\x80" + b"\0") for n in range(frames))
    body = ebml("1654ae6b", track) + ebml("1f43b675", ebml("e7", b"\0") + blocks)
    return ebml("1a45dfa3", ebml("4282", b"matroska") + ebml("4287", b"\4")) + ebml("18538067", body)


def dataset(extra: tuple[tuple[str, bytes], ...] = (), data: bytes | None = None, count: int = 8) -> list[tuple[str, bytes]]:
    lines = "".join(json.dumps({"file": f"{n}.png", "captions": [f"grey {n}"]}) + "\n" for n in range(count))
    return [("captions.jsonl", lines.encode()), *((f"{n}.png", data or png()) for n in range(count)), *extra]


def with_member(change) -> bytes:
    """A zip whose one more member is changed before it is written."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in dataset():
            archive.writestr(name, data)
        info = zipfile.ZipInfo("more")
        content = change(info)
        archive.writestr(info, content)
    return out.getvalue()


def slip(name: str) -> bytes:
    def change(info):
        info.filename = name
        return b"x"

    return with_member(change)


def link(info) -> bytes:
    info.external_attr = 0o120777 << 16
    return b"/etc/passwd"


def lying_zip() -> bytes:
    """A member of 100 MB of zeros whose directory and header claim 10 bytes."""
    big, small = struct.pack("<I", 100 * 2**20), struct.pack("<I", 10)
    return zipped(*dataset(data=png(8, 8)), ("more.bin", bytes(100 * 2**20))).replace(big, small)


def overlapping_zip() -> bytes:
    """Two hundred members that are all the same 50 MB of zeros, packed once."""
    core = zipped(("a", bytes(50 * 2**20)))
    directory = core.index(b"PK\1\2")
    entry = core[directory : core.index(b"PK\5\6")]
    entries = b"".join(entry[:-1] + bytes([33 + n % 90]) for n in range(80))
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 80, 80, len(entries), directory, 0)
    return core[:directory] + entries + end


def crowded_zip() -> bytes:
    """A directory of two million entries: reading it takes a gigabyte and many seconds."""
    entry = b"PK\1\2" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    entries = entry * 2_000_000
    return b"PK\3\4" + entries + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, len(entries), 4, 0)


def forty_two() -> bytes:
    layer = bytes(10 * 2**20)
    for depth in range(3):
        layer = zipped(*((f"{depth}{n}.zip", layer) for n in range(10)))
    return layer


def tarred(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in dataset():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special(name: str, type_: bytes, target: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type_, target
    return tarred((info, b""))


def pax_bomb() -> bytes:
    """A gigabyte of attributes in a header, packed a thousandfold."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = tarfile.TarInfo("x")
    head.type, head.size = tarfile.XHDTYPE, 2**30
    out = [packer.compress(head.tobuf(tarfile.USTAR_FORMAT))]
    out += [packer.compress(bytes(2**20)) for _ in range(80)]
    return b"".join(out) + packer.flush()


def gzip_bomb() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = tarfile.TarInfo("zeros")
    head.size = 80 * 2**20
    return packer.compress(head.tobuf()) + b"".join(packer.compress(bytes(2**20)) for _ in range(80)) + packer.flush()


RANDOM = random.Random(7).randbytes(20_000)
ZIP = zipped(("evil.js", b"alert(1)"))
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile '/etc/passwd'\n"
SVG = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "&b;&b;">]><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
SVG_ENTITY = (
    b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd"><!ENTITY y SYSTEM "http://169.254.169.254/">]>'
    b'<svg xmlns="http://www.w3.org/2000/svg"><text>&x;&y;</text></svg>'
)
DASH = b'<?xml version="1.0"?><MPD><Period><BaseURL>file:///etc/passwd</BaseURL></Period></MPD>'
TIFF = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 270, 2, 0xFFFFFFF0, 8)

OK = ""
"""Expected: decoded within its caps. Any other text: words of the error."""

IMAGES = {
    "81 megapixels in 10 kB": (flat_png_bomb, "81,000,000|9000×9000"),
    "900 megapixels claimed": (lambda: png(30_000, 30_000, rows=b""), "30000×30000|too many pixels"),
    "65500 by 65500 JPEG": (lambda: jpeg_header(65_500, 65_500), "65500|too many pixels"),
    "60000 by 60000 BMP": (bmp_header, "60000|too many pixels"),
    "WebP canvas of 268 megapixels": (webp_canvas, "cannot be decoded|too many pixels"),
    "zTXt bomb": (lambda: png(extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 * 2**20), 9))), "|cannot be decoded"),
    "iTXt bombs": (lambda: png(extra=chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**20 - 1), 9)) * 400), "cannot be decoded"),
    "iCCP bomb": (lambda: png(extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200 * 2**20), 9))), "|cannot be decoded"),
    "EXIF bomb in a PNG": (lambda: png(extra=chunk(b"eXIf", exif_bomb())), OK),
    "EXIF bomb in a JPEG": (lambda: picture("JPEG", exif=b"Exif\0\0" + exif_bomb()[:60_000]), OK),
    "JPEG of 1,500 scans": (jpeg_of_scans, "more than 100 scans"),
    "APNG of 3,000 frames": (lambda: animation("PNG", 3000), OK),
    "GIF of 3,000 frames": (lambda: animation("GIF", 3000), OK),
    "WebP of 500 frames": (lambda: animation("WEBP", 500), OK),
    "TIFF with a huge tag": (lambda: TIFF, "image/tiff.*takes a picture"),
    "SVG": (lambda: SVG, r"image/svg\+xml.*takes a picture"),
    "SVG with external entities": (lambda: SVG_ENTITY, r"image/svg\+xml.*takes a picture"),
    "SVG packed by gzip": (lambda: zlib.compress(SVG_ENTITY, 9, 31), "application/gzip.*takes a picture"),
    "HTML": (lambda: b"<!-- PNG --><html><script>alert(1)</script>", "text/html.*takes a picture"),
    "PNG with a zip behind it": (lambda: png() + ZIP, OK),
    "PNG with a script behind it": (lambda: png() + b"<script>alert(1)</script>", OK),
    "GIF that is a JAR": (lambda: picture("GIF") + ZIP, OK),
    "GIF that is a script": (lambda: b"GIF89a/*" + picture("GIF")[8:] + b"*/=1;alert(1)", "|too many pixels|cannot be decoded|pixels; allowed"),
    "JPEG with a zip behind it": (lambda: picture("JPEG") + ZIP, OK),
    "JPEG with HTML behind it": (lambda: picture("JPEG") + b"<html><script>alert(1)</script>", OK),
    "HTML before a PNG": (lambda: b"<html><script>alert(1)</script>" + png(), "takes a picture"),
    "JPEG with HTML in a comment": (lambda: picture("JPEG", comment=b"<html><script>"), OK),
    "zip": (lambda: ZIP, "application/zip.*takes a picture"),
    "playlist": (lambda: PLAYLIST, "mpegurl.*takes a picture"),
    "WAV": (sound, "audio/wav.*takes a picture"),
    "cut PNG": (lambda: picture("PNG", (400, 400))[:500], "cannot be decoded"),
    "cut JPEG": (lambda: picture("JPEG", (400, 400))[:700], "cannot be decoded"),
    "PNG signature alone": (lambda: b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
    "random after a PNG signature": (lambda: b"\x89PNG\r\n\x1a\n" + RANDOM, "cannot be decoded"),
    "random after a WebP signature": (lambda: b"RIFF\xff\xff\0\0WEBPVP8 " + RANDOM, "cannot be decoded"),
    "random": (lambda: RANDOM, "no known kind.*takes a picture"),
    "empty": (lambda: b"", "no known kind.*takes a picture"),
}  # fmt: skip

SOUNDS = {
    "ten hours of FLAC": (lambda: flac_bomb(True), "36000.0 s long"),
    "ten hours of FLAC, unannounced": (lambda: flac_bomb(False), "longer than 600 s"),
    "WAV of 4 GB claimed": (lambda: wav_claims(size=0xFFFFFFFF), "|long|longer"),
    "WAV of 65,535 channels": (lambda: wav_claims(channels=65_535), "channels|not audio|cannot be decoded"),
    "WAV of 4 GHz": (lambda: wav_claims(rate=0xFFFFFFFF), "sample rate|not audio|cannot be decoded"),
    "WAV header on a picture": (lambda: sound()[:36] + picture("PNG"), "not audio|no sound|cannot be decoded"),
    "chained Ogg": (chained_ogg, "|corrupt|longer"),
    "MP4 that is a playlist": (lambda: PLAYLIST, "mpegurl.*takes a sound"),
    "MP4 box before a playlist": (lambda: box(b"ftyp", b"isom", bytes(4)) + PLAYLIST, "not audio"),
    "playlist behind blanks": (lambda: b"\xef\xbb\xbf\r\n \t" + PLAYLIST, "mpegurl.*takes a sound"),
    "playlist behind 5 kB of blanks": (lambda: b" " * 5000 + PLAYLIST, "takes a sound"),
    "playlist in UTF-16": (lambda: PLAYLIST.decode().encode("utf-16"), "not audio"),
    "playlist behind an ID3 mark": (lambda: b"ID3\4\0\0\0\0\0\0" + PLAYLIST, "not audio|no sound|cannot be decoded|corrupt"),
    "playlist of the other kind": (lambda: b"[playlist]\nFile1=file:///etc/passwd\n", "takes a sound"),
    "DASH manifest": (lambda: DASH, "application/xml.*takes a sound"),
    "concat script": (lambda: CONCAT, "ffconcat.*takes a sound"),
    "concat script behind a comment": (lambda: b"# a\n" + CONCAT, "text/plain.*takes a sound"),
    "zip": (lambda: ZIP, "application/zip.*takes a sound"),
    "picture": (lambda: png(), "image/png.*takes a sound"),
    "cut FLAC": (lambda: b"fLaC" + RANDOM[:50], "not audio"),
    "random after an Ogg mark": (lambda: b"OggS" + RANDOM, "not audio|no audio"),
    "random": (lambda: RANDOM, "not audio|no sound|cannot be decoded|corrupt"),
    "empty": (lambda: b"", "not audio"),
}  # fmt: skip

VIDEOS = {
    "300,000 edits": (lambda: mp4(edits=300_000), "300000 edits; allowed are 10000"),
    "4 billion samples claimed": (lambda: mp4(samples=0xFFFFFFFF), "4294967295 samples"),
    "50 million samples claimed": (lambda: mp4(samples=50_000_000), "50000000 samples; allowed are 2500000"),
    "50 million samples in a fragment": (lambda: mp4() + fragment(50_000_000), "50000001 samples"),
    "two million samples": (lambda: mp4(samples=2_000_000), "frames of|cannot be decoded|no frame|corrupt"),
    "a compressed index": (lambda: box(b"ftyp", b"isom", bytes(4)) + box(b"moov", box(b"cmov", RANDOM)), "compressed index"),
    "a million boxes": (lambda: box(b"ftyp", b"isom", bytes(4)) + box(b"free") * 1_000_000, "more than 100000 boxes"),
    "MP4 of 65,535 pixels a side": (lambda: mp4(width=65_535), "frames of|65535×65535|cannot be decoded|not a video"),
    "MKV of 4 billion pixels a side": (lambda: mkv(0x7FFFFFFF, 0x7FFFFFFF), "frames of|not a video|cannot be decoded"),
    "MKV of 16,000 pixels a side": (lambda: mkv(16_000, 16_000), "16000×16000"),
    "MKV of 300,000 empty frames": (lambda: mkv(64, 64, 300_000), "cannot be decoded|no frame|corrupt"),
    "playlist": (lambda: PLAYLIST, "mpegurl.*takes a video"),
    "DASH manifest": (lambda: DASH, "application/xml.*takes a video"),
    "SVG with external entities": (lambda: SVG_ENTITY, "svg.*takes a video"),
    "concat script": (lambda: CONCAT, "ffconcat.*takes a video"),
    "MP4 with a zip behind it": (lambda: mp4()[:300] + ZIP, "not a video|no video track"),
    "playlist in a box": (lambda: box(b"ftyp", b"isom", bytes(4)) + PLAYLIST, "not a video"),
    "SVG": (lambda: SVG, "svg.*takes a video"),
    "WAV": (sound, "audio/wav.*takes a video"),
    "cut MP4": (lambda: mp4()[:300], "not a video|no video track"),
    "random": (lambda: RANDOM, "not a video|no frame|corrupt"),
}  # fmt: skip

DATASETS = {
    "nested zip": (lambda: zipped(*dataset(extra=(("inner.zip", forty_two()),))), OK),
    "42": (forty_two, "holds no captions"),
    "a gigabyte of zeros": (lambda: zipped(*dataset(extra=tuple((f"z{n}", bytes(20 * 2**20)) for n in range(8)))), "unpacks to more"),
    "one large member": (lambda: zipped(*dataset(extra=(("z", bytes(70 * 2**20)),))), "allowed are 67108864"),
    "a member that lies": (lying_zip, "holds more than the 10 bytes|damaged"),
    "members that overlap": (overlapping_zip, "unpacks to more|overlap"),
    "two million members": (crowded_zip, "directory has|allowed"),
    "zip slip": (lambda: slip("../../etc/cron.d/x"), "leads outside the archive"),
    "absolute path": (lambda: slip("/etc/cron.d/x"), "leads outside the archive"),
    "backslashes": (lambda: slip("..\\x"), "leads outside the archive"),
    "long name": (lambda: slip("x" * 60_000), "a name of 60000 characters"),
    "link in a zip": (lambda: with_member(link), "is a link"),
    "LZMA in a zip": (lambda: zipped(*dataset(), method=zipfile.ZIP_LZMA), "packed by method 14"),
    "device in a tar": (lambda: special("disk", tarfile.BLKTYPE), "is not allowed"),
    "pipe in a tar": (lambda: special("pipe", tarfile.FIFOTYPE), "is not allowed"),
    "link out of a tar": (lambda: special("link", tarfile.SYMTYPE, "../../etc/passwd"), "is not allowed"),
    "hard link out of a tar": (lambda: special("link", tarfile.LNKTYPE, "../../etc/passwd"), "is not allowed|link"),
    "absolute link in a tar": (lambda: special("link", tarfile.SYMTYPE, "/etc/passwd"), "is not allowed"),
    "absolute path in a tar": (lambda: special("/etc/cron.d/x", tarfile.REGTYPE), "leads outside"),
    "dots in a tar": (lambda: special("../x", tarfile.REGTYPE), "leads outside"),
    "gzip bomb": (gzip_bomb, "unpacks to more|allowed are"),
    "attributes of a gigabyte": (pax_bomb, "at once|unpacks to more"),
    "picture bomb inside": (lambda: zipped(*dataset(data=flat_png_bomb())), "9000x9000"),
    "JSON nested deep": (lambda: zipped(("captions.jsonl", b"[" * 500_000)), "not JSON"),
    "JSON number of a million digits": (lambda: zipped(("captions.jsonl", b'{"weight": ' + b"9" * 1_000_000 + b"}")), "not JSON"),
    "picture with a zip behind it": (lambda: png() + zipped(*dataset()), "image/png.*takes an archive"),
    "HTML": (lambda: b"<html>", "text/html.*takes an archive"),
    "cut zip": (lambda: zipped(*dataset())[:400], "no directory|damaged"),
    "cut tar": (lambda: tarred()[:700], "damaged|no captions|neither"),
    "cut gzip": (lambda: tarred(mode="w:gz")[:200], "damaged"),
    "random after a zip mark": (lambda: b"PK\3\4" + RANDOM, "no directory|damaged"),
    "empty": (lambda: b"", "no known kind.*takes an archive"),
}  # fmt: skip


# How they are tried


def bring(path: Path, modality: str) -> InputFile:
    """As the worker brings an input: nobody's word is taken for what it is."""
    file = InputFile(path, sniff.sniff(path), path.name)
    sniff.check(file.media_type, modality, field=modality, name=path.name)
    return file


def peak_mb(pid: int | str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget_peak(pid: int | str) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def resident_mb() -> float:
    return psutil.Process().memory_info().rss / 2**20


def tried(path: Path, modality: str, work) -> tuple[str, float]:
    """A file's refusal or "", and the seconds that it took."""
    started, answer = time.monotonic(), ""
    try:
        work(bring(path, modality))
    except (InputError, DatasetError) as error:
        answer = str(error)
    return answer, time.monotonic() - started


def attack(path: Path, modality: str, family: str, work) -> str:
    """Try a file; gives its refusal or "". Time and memory are bounded; a second try may excuse a busy machine."""
    child = confined._pool().idle()[family]
    before = resident_mb()
    linux = sys.platform == "linux"
    for last in (False, True):
        if linux:
            forget_peak("self")
            forget_peak(child.pid)
        answer, took = tried(path, modality, work)
        if took < LIMIT_S or last:
            break
    if linux and child.alive:
        print(f"{took * 1000:.1f} ms, worker +{peak_mb('self') - before:.1f} MB, decoder {peak_mb(child.pid):.0f} MB: {answer or 'decoded'}")
    assert took < LIMIT_S, f"took {took:.2f} s: {answer}"
    if linux:
        assert peak_mb("self") - before < WORKER_MB, f"the worker grew to {peak_mb('self'):.0f} MB from {before:.0f}"
        if child.alive:
            assert peak_mb(child.pid) < CHILD_MB, f"the decoder grew to {peak_mb(child.pid):.0f} MB"
    assert child.alive, f"the decoder died: {answer}"
    return answer


def expect(answer: str, words: str) -> None:
    if words == OK:
        assert answer == ""
    elif words.startswith("|"):  # either is fine
        assert answer == "" or re.search(words[1:], answer)
    else:
        assert answer and re.search(words, answer), answer


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Both decoders, started: what is measured is the decoding."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "a.png").write_bytes(png())
    (folder / "a.wav").write_bytes(sound())
    open_image(bring(folder / "a.png", "image"))
    audio.decode(bring(folder / "a.wav", "audio"), max_seconds=5)


@pytest.fixture
def hostile(tmp_path):
    def write(case) -> Path:
        path = tmp_path / "input"
        path.write_bytes(case())
        return path

    return write


WORK = {
    "image": (IMAGES, "image", lambda file: open_image(file)),
    "audio": (SOUNDS, "av", lambda file: audio.decode(file, max_seconds=600, sample_rate=16_000, mono=True, name="audio")),
    "video": (VIDEOS, "av", lambda file: list(video.frames(file))),
    "dataset": (DATASETS, "image", lambda file: PictureDataset.load(file, 32)),
}
"""By modality: its files, the family of its decoder, and what a runner does with such an input. benchmarks/hostile.py reads it."""


@pytest.mark.parametrize(("modality", "case"), [(modality, case) for modality, (cases, *_) in WORK.items() for case in cases])
def test_a_hostile_file(hostile, modality, case):
    cases, family, work = WORK[modality]
    make, words = cases[case]
    expect(attack(hostile(make), modality, family, work), words)


@pytest.mark.parametrize("name", ["film.m3u8", "film.mp4", "concat:a.ts|b.ts", "file:///etc/passwd", "film.ffconcat", "film.mpd"])
@pytest.mark.parametrize("content", [PLAYLIST, CONCAT, DASH, box(b"ftyp", b"isom", bytes(4)) + PLAYLIST])
def test_a_name_opens_nothing(tmp_path, name, content):
    """A demuxer is chosen by the content out of a short list; the name that a user gave is text for messages."""
    path = tmp_path / "film.m3u8"
    path.write_bytes(content)
    for modality, work in (("audio", WORK["audio"][2]), ("video", WORK["video"][2])):
        with pytest.raises(InputError) as told:
            work(InputFile(path, "video/mp4", name))  # even past the sniffing
        assert "root:" not in told.value.message, modality


# Through the worker


def data_uri(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def trial_kind():
    """A kind that decodes what it is given and says what it saw."""

    @kind("trial.look", queue="text", outputs=("text/plain",), max_group=16)
    class Look(Params):
        """Look at an input."""

        picture: ImageInput | None = None
        sound: AudioInput | None = None

    @runners.runs(Look)
    def look(params, context):
        for job, one in enumerate(params):
            try:
                if one.picture is not None:
                    file = context.fetch(job, one.picture)
                    seen = f"{open_image(file, field='picture').size} {file.media_type} {file.trusted}"
                else:
                    seen = f"{audio.decode(context.fetch(job, one.sound), max_seconds=10, name='sound').duration_s:.1f}"
            except FactoryError as error:
                yield Failure(job, error)
                continue
            yield Output(job, "seen.txt", "text/plain", seen.encode())

    yield Look
    specs._REGISTRY.pop("trial.look")
    runners._RUNNERS.pop("trial.look")


@pytest.fixture
def worker(sqlite_database, tmp_path, trial_kind):
    """Run params as one micro-batch; gives state and error (or what was seen) of each."""
    executor = Executor(load_settings(state_dir=tmp_path / "state", device="cpu"), sqlite_database, MemoryStore(), Silent(), keeper=False)
    project = sqlite_database.run(lambda conn: projects.ensure(conn, "default"))

    def run(*many, kind_name="trial.look"):
        spec = get_kind(kind_name)
        rows = [
            lifecycle.NewJob(
                id=new_id("job"), project_id=project, kind=spec.name, queue=spec.queue, seconds=1.0, seed=n, share_key="",
                params=spec.validate(params).model_dump(mode="json"),
            )
            for n, params in enumerate(many)
        ]  # fmt: skip
        sqlite_database.run(lambda conn: lifecycle.insert_jobs(conn, rows))
        executor.run(spec.name, [row.id for row in rows])
        executor.finishers.submit(lambda: None).result()
        with sqlite_database.read() as conn:
            found = {r.id: r for r in conn.execute(select(Job.id, Job.state, Job.error))}
            artifacts = jobs.artifacts(conn, [row.id for row in rows])
        return [
            (found[row.id].state, found[row.id].error or executor.store.get(artifacts[row.id][0]["object_key"]).decode())
            for row in rows
        ]

    run.executor, run.project, run.database = executor, project, sqlite_database
    yield run
    executor.finishers.shutdown()
    executor.uploads.shutdown()


def test_a_group_with_bombs_in_it(worker):
    hostile = [
        (flat_png_bomb(), "image/png", "9000×9000 pixels; allowed are 50,000,000"),
        (SVG, "image/png", "data: URI is image/svg+xml, by its content; this field takes a picture"),
        (ZIP, "image/jpeg", "data: URI is application/zip"),
        (RANDOM, "image/webp", "of no known kind"),
        (picture("PNG", (400, 400))[:500], "image/png", "cannot be decoded as a picture"),
    ]
    params = [{"picture": data_uri(png())}]
    params += [{"picture": data_uri(data, claimed)} for data, claimed, _ in hostile]
    params += [{"sound": data_uri(ten_hours(), "audio/flac")}, {"sound": data_uri(PLAYLIST, "audio/mpeg")}, {"sound": data_uri(sound())}]
    found = worker(*params)
    assert [state for state, _ in found] == ["succeeded", *["failed"] * 7, "succeeded"]
    for (_, error), words in zip(found[1:8], [words for *_, words in hostile] + ["36000.0 s long", "mpegurl"], strict=True):
        assert error["type"] == "input"
        assert words in error["message"]
    assert [error.get("param") for _, error in found[1:6]] == ["picture"] * 5
    assert (found[0][1], found[8][1]) == ("(8, 8) image/png False", "1.0")
    assert worker({"picture": data_uri(picture("JPEG"), "text/html")}) == [("succeeded", "(16, 16) image/jpeg False")]


def test_a_failed_job_keeps_nothing_of_what_its_runner_held(worker):
    """An error that a job keeps must not hold the frames it passed through: the collector comes by rarely where little but pictures is made."""
    held = []

    class Large:
        """Stands for a picture."""

    @kind("trial.fail", queue="text", outputs=("text/plain",), max_group=16)
    class Fail(Params):
        """Fail in a way."""

        how: str

    @runners.runs(Fail)
    def fail(params, context):
        for job, one in enumerate(params):
            picture = Large()
            held.append(weakref.ref(picture))
            try:
                if one.how == "own":
                    try:
                        raise ValueError(picture)
                    except ValueError as error:
                        raise InputError("no") from error
                if one.how == "upload":
                    yield Output(job, "x.txt", "text/plain", lambda picture=picture: 1 / 0)
                    continue
            except InputError as error:
                yield Failure(job, error)
                continue
            raise RuntimeError("unforeseen")

    gc.collect()
    gc.disable()
    try:
        assert {state for state, _ in worker({"how": "own"}, {"how": "own"}, kind_name="trial.fail")} == {"failed"}
        worker({"how": "upload"}, {"how": "own"}, kind_name="trial.fail")
        worker({"how": "raise"}, kind_name="trial.fail")
        assert len(held) == 5 and [one() for one in held] == [None] * 5
    finally:
        gc.enable()
        specs._REGISTRY.pop("trial.fail")
        runners._RUNNERS.pop("trial.fail")


CRASHING = """
import ctypes
from worker import decoder

def serve(family, parent):
    load = decoder.FAMILIES[family]

    def fragile():
        operations = load()
        whole = operations["image"]

        def image(args, files, session):
            if b"CRASH" in files[0].read():
                ctypes.string_at(0)
            files[0].seek(0)
            return whole(args, files, session)

        return {**operations, "image": image}

    decoder.FAMILIES[family] = fragile
    decoder.serve(family, parent)
"""


def test_a_decoder_that_crashes_takes_one_job_with_it(worker, tmp_path, monkeypatch):
    (tmp_path / "crashing_decoder.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(confined, "Decoder", functools.partial(confined.Decoder, code="from crashing_decoder import serve"))
    confined.close()
    try:
        found = worker(*({"picture": data_uri(png() + extra)} for extra in (b"", b"CRASH", b"x")))
    finally:
        confined.close()
    assert [state for state, _ in found] == ["succeeded", "failed", "succeeded"]
    assert found[1][1]["message"] == "picture: data: URI could not be decoded: the decoder was killed by SIGSEGV"


@pytest.fixture
def upload(worker):
    """Store bytes as somebody's upload; gives the artifact's id."""

    def put(data: bytes, name: str, media_type: str) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        key = artifact_key(worker.project, sha256, ".bin")
        worker.executor.store.put(key, data, media_type=media_type, sha256=sha256, size=len(data))
        about = {"name": name, "object_key": key, "sha256": sha256, "size": len(data), "media_type": media_type}
        return worker.database.run(lambda conn: registry.add_input(conn, worker.project, **about))

    return put


def test_an_upload_is_not_believed(worker, upload):
    """What somebody uploaded goes through the child, whatever its row says of it."""
    good, bad = upload(png(), "good", "text/plain"), upload(SVG, "bad", "image/png")
    found = worker({"picture": good}, {"picture": bad})
    assert found[0] == ("succeeded", "(8, 8) image/png False")
    assert found[1][0] == "failed" and "bad is image/svg+xml" in found[1][1]["message"]


def test_only_what_a_job_made_is_trusted(worker):
    row = {"job_id": new_id("job"), "role": "output", "sha256": "", "size": 0, "media_type": "image/png", "name": "a.png", "meta": {}}
    key = artifact_key(worker.project, hashlib.sha256(png()).hexdigest(), ".png")
    worker.executor.store.put(key, png(), media_type="image/png")
    row |= {"object_key": key, "sha256": hashlib.sha256(png()).hexdigest()}
    for changes, trusted in (({}, True), ({"role": "input"}, False), ({"job_id": None}, False)):
        resolved = Resolved(get_kind("trial.look").validate({}), {"art_1": {**row, **changes}}, (), {})
        assert worker.executor.inputs.fetch("art_1", resolved, worker.executor.settings.scratch).trusted is trusted


def test_a_training_refuses_a_bomb_before_it_loads_a_model(worker, upload):
    packed = zipped(*dataset(extra=tuple((f"z{n}", bytes(20 * 2**20)) for n in range(8))))
    cases = {"bomb": packed, "picture": png() + zipped(*dataset())}
    params = [{"dataset": upload(data, name, "application/zip"), "name": name, "steps": 1} for name, data in cases.items()]
    found = [worker(one, kind_name="train.flow")[0] for one in params]
    assert [(state, error["param"]) for state, error in found] == [("failed", "dataset")] * 2
    assert "unpacks to more" in found[0][1]["message"]
    assert "picture is image/png, by its content" in found[1][1]["message"]

"""What a file is, by its first bytes: never by its name or by what somebody says of it."""

import codecs
import re
from pathlib import Path

from contentfactory.errors import InputError

UNKNOWN = "application/octet-stream"
_LOOK = 4096

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"II+\0", "image/tiff"),
    (b"8BPS", "image/vnd.adobe.photoshop"),
    (b"\0\0\1\0", "image/x-icon"),
    (b"\0\0\0\x0cjP  ", "image/jp2"),
    (b"qoif", "image/qoi"),
    (b"fLaC", "audio/flac"),
    (b"ID3", "audio/mpeg"),
    (b".snd", "audio/basic"),
    (b"caff", "audio/x-caf"),
    (b"#!AMR", "audio/amr"),
    (b"MThd", "audio/midi"),
    (b"riff\x2e\x91\xcf\x11", "audio/x-w64"),
    (b"FLV\1", "video/x-flv"),
    (b"\0\0\1\xba", "video/mpeg"),
    (b"\0\0\1\xb3", "video/mpeg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "video/x-ms-asf"),
    (b"PK\3\4", "application/zip"),
    (b"PK\5\6", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"BZh", "application/x-bzip2"),
    (b"\xfd7zXZ\0", "application/x-xz"),
    (b"7z\xbc\xaf\x27\x1c", "application/x-7z-compressed"),
    (b"Rar!", "application/vnd.rar"),
    (b"%PDF-", "application/pdf"),
    (b"%!PS", "application/postscript"),
    (b"\x7fELF", "application/x-executable"),
    (b"MZ", "application/x-executable"),
    (b"GGUF", "application/gguf"),
)
_RIFF = {b"WAVE": "audio/wav", b"WEBP": "image/webp", b"AVI ": "video/x-msvideo"}
_ISO_IMAGES = {b"avif": "image/avif", b"avis": "image/avif", b"heic": "image/heic", b"heix": "image/heic", b"mif1": "image/heif"}
_ISO_SOUND = (b"M4A ", b"M4B ", b"M4P ")
_TEXTS = (
    (re.compile(rb"#EXTM3U", re.I), "application/vnd.apple.mpegurl"),
    (re.compile(rb"ffconcat\b", re.I), "text/x-ffconcat"),
    (re.compile(rb"WEBVTT\b"), "text/vtt"),
    (re.compile(rb"<(!DOCTYPE html|html|head|body|script)\b", re.I), "text/html"),
    (re.compile(rb"<(\?xml|MPD\b)", re.I), "application/xml"),
    (re.compile(rb"[\[{]"), "application/json"),
)
_DECODED_IMAGES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp")
WANTED: dict[str, tuple[tuple[str, ...], str]] = {
    "image": (_DECODED_IMAGES, "a picture (PNG, JPEG, WebP, GIF or BMP)"),
    "audio": (("audio/", "video/", UNKNOWN), "a sound (WAV, FLAC, MP3, Ogg, M4A …) or a video with sound"),
    "video": (("video/", "image/gif", UNKNOWN), "a video (MP4, WebM, MOV, AVI …)"),
    "dataset": (
        ("application/zip", "application/x-tar", "application/gzip", "application/x-bzip2"),
        "an archive (zip, or tar, plain or packed by gzip or bzip2)",
    ),
}
"""What a field of a modality takes: beginnings of media types, and their name in messages. What has no mark that this module
knows may still be a sound (an MP3 with rubbish before its first frame): the confined decoder looks closer."""


def sniff(path: Path) -> str:
    """The media type of a file; ``application/octet-stream`` where its first bytes say nothing."""
    with path.open("rb") as file:
        return sniff_bytes(file.read(_LOOK))


def sniff_bytes(data: bytes) -> str:
    """The media type of a file by its beginning.

    Args:
        data: The first 4,096 bytes, or all of it.
    """
    for start, media_type in _STARTS:
        if data.startswith(start):
            return media_type
    if data[:4] in (b"RIFF", b"RF64", b"BW64") and data[8:12] in _RIFF:
        return _RIFF[data[8:12]]
    if data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        return "audio/aiff"
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":
        return "image/bmp"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return _ISO_IMAGES.get(brand) or ("audio/mp4" if brand in _ISO_SOUND else "video/mp4")
    if data[4:8] in (b"moov", b"mdat", b"free", b"wide", b"skip"):
        return "video/quicktime"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "video/webm" if b"webm" in data[:64] else "video/x-matroska"
    if data[:4] == b"OggS":
        return "video/ogg" if b"\x80theora" in data[:512] else "audio/ogg"
    if data[257:262] == b"ustar":
        return "application/x-tar"
    if len(data) > 376 and data[0] == data[188] == data[376] == 0x47:
        return "video/mp2t"
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:
        return "audio/aac"
    if len(data) > 2 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 0x06 and data[2] & 0xF0 != 0xF0:
        return "audio/mpeg"
    return _text(data)


def _text(data: bytes) -> str:
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data or any(byte < 9 or (13 < byte < 32 and byte != 27) for byte in data):
        return UNKNOWN
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)  # the end may cut a character in two
    except UnicodeDecodeError:
        return UNKNOWN
    start = data.lstrip()
    if start[:1] == b"<" and b"<svg" in start.lower():
        return "image/svg+xml"
    while start.startswith(b"<!--") and b"-->" in start:
        start = start.partition(b"-->")[2].lstrip()
    return next((media_type for pattern, media_type in _TEXTS if pattern.match(start)), "text/plain")


def check(found: str, modality: str, *, field: str, name: str) -> None:
    """Whether a file of this type may stand in a field of this modality; others than `WANTED` take any.

    Args:
        found: Its media type, sniffed.
        modality: Of the field.
        field: Name of the field.
        name: Name of the file, for the message.

    Raises:
        InputError: If not; the message names both.
    """
    if modality not in WANTED:
        return
    types, words = WANTED[modality]
    if not found.startswith(types):
        what = "of no known kind" if found == UNKNOWN else found
        raise InputError(f"{field}: {name} is {what}, by its content; this field takes {words}", code="wrong_type", param=field)

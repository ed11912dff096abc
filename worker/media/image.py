"""Pictures in and out: untrusted files are opened under limits, results are encoded the same way every time.

Every picture that enters the factory passes `open_image`: the format must be on a short list, the size in the header is
checked before a pixel is decoded, the orientation flag of cameras is applied, colours are brought to sRGB and every
other metadata is dropped.
"""

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Literal

from PIL import Image, ImageCms, ImageColor, ImageFile, ImageOps

from contentfactory.errors import InputError
from worker.input_file import InputFile

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats that are decoded; of an animation the first frame. TIFF and vector formats stay out: large parsers, rare use."""

MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 100 * 1024 * 1024
MAX_SIDE = 20_000
MAX_SCANS = 100
"""Most scans of a progressive JPEG: encoders write about ten; each more is a pass over all pixels for a few bytes of file."""
Mode = Literal["keep", "RGB", "RGBA", "L"]
ImageFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES: dict[str, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

DECODE_FAULTS = (OSError, SyntaxError, ValueError, EOFError, OverflowError, IndexError, KeyError, TypeError,
                  struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning)  # fmt: skip


def open_image(
    source: InputFile | bytes | Path,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 1,
    mode: Mode = "keep",
    field: str = "image",
) -> Image.Image:
    """Open an untrusted picture.

    Args:
        source: The file. An input that is not trusted is decoded in the confined child; bytes and paths are for files of
            the factory's own.
        max_pixels: Most pixels (width times height), read from the header before anything is decoded.
        min_side: Shortest width and height allowed, pixels.
        mode: Mode of the result. ``keep`` gives ``RGBA`` where the picture has transparency and ``RGB`` elsewhere;
            ``RGB`` and ``L`` lay transparent pictures on white.
        field: Parameter to name in errors.

    Returns:
        The first frame, upright, in sRGB, without metadata.

    Raises:
        InputError: If it is empty, no picture of an allowed format, corrupt, truncated, too small or too large.
    """
    name = _check_file(source, field)
    if isinstance(source, InputFile) and not source.trusted:
        from worker import confined

        return confined.open_image(
            source, name=name, max_pixels=max_pixels, min_side=min_side, mode=mode, field=field
        )
    data = source if isinstance(source, bytes) else _path(source).read_bytes()
    return decode_image(data, name, max_pixels=max_pixels, min_side=min_side, mode=mode, field=field)


def decode_image(
    data: bytes, name: str, *, max_pixels: int, min_side: int, mode: Mode, field: str
) -> Image.Image:
    """What `open_image` does, always in this process.

    Args:
        data: The file.
        name: What messages call it.
        max_pixels: See `open_image`; so for the others.
        min_side: Pixels.
        mode: Mode of the result.
        field: Parameter to name in errors.

    Raises:
        InputError: See `open_image`.
    """
    try:
        with open_checked(data) as opened:
            width, height = opened.size
            if width * height > max_pixels or max(width, height) > MAX_SIDE:
                raise InputError(
                    f"{field}: {name} has {width}×{height} pixels; allowed are {max_pixels:,} in all and {MAX_SIDE:,} a side",
                    code="image_too_large", param=field,
                )  # fmt: skip
            if min(width, height) < min_side:
                raise InputError(
                    f"{field}: {name} has {width}×{height} pixels; allowed is at least {min_side} a side",
                    code="image_too_small", param=field,
                )  # fmt: skip
            opened.seek(0)
            opened.load()
            picture = _normal(opened)
    except DECODE_FAULTS as error:
        formats = ", ".join(FORMATS)
        raise InputError(
            f"{field}: {name} ({len(data):,} bytes) cannot be decoded as a picture ({_reason(error)}); allowed formats: {formats}",
            code="bad_image", param=field,
        ) from None  # fmt: skip
    if mode == "keep":
        return picture
    if mode == "RGBA":
        return picture.convert("RGBA")
    flat = flatten(picture, "#ffffff")
    return flat.convert("L") if mode == "L" else flat


def open_checked(data: bytes) -> ImageFile.ImageFile:
    """Read the header of an untrusted picture; nothing is decoded yet.

    Raises:
        OSError: If its format is not on the list, or it is a JPEG of more than `MAX_SCANS` scans. Pillow raises further
            ones of `DECODE_FAULTS`.
    """
    # Inside a scan FF is always followed by 00: these two bytes are markers there, and a few in embedded thumbnails.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise OSError(f"a JPEG of more than {MAX_SCANS} scans")
    return Image.open(io.BytesIO(data), formats=list(FORMATS))


def _path(source: InputFile | Path) -> Path:
    return source.path if isinstance(source, InputFile) else source


def _check_file(source: InputFile | bytes | Path, field: str) -> str:
    """Look at the size; gives the name for messages."""
    if isinstance(source, bytes):
        name, size = "the picture", len(source)
    else:
        path = _path(source)
        name = (source.name if isinstance(source, InputFile) else "") or path.name
        size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise InputError(
            f"{field}: {name} has {size:,} bytes; allowed are {MAX_FILE_BYTES:,}",
            code="image_too_large",
            param=field,
        )
    if not size:
        raise InputError(f"{field}: {name} is empty (0 bytes)", code="bad_image", param=field)
    return name


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "unknown format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "far too many pixels"
    return str(error)[:120] or type(error).__name__


def _normal(picture: Image.Image) -> Image.Image:
    """Upright, 8 bits a channel, sRGB, ``RGB`` or ``RGBA``, no metadata."""
    profile = picture.info.get("icc_profile")
    transparent = "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La")
    # A broken orientation tag is no reason to refuse a picture that decodes.
    with contextlib.suppress(*DECODE_FAULTS):
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16") or picture.mode == "I":
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    elif picture.mode == "F":
        picture = picture.convert("L")
    result = picture.convert("RGBA" if transparent else "RGB") if picture.mode != "CMYK" else picture
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, *DECODE_FAULTS):
            result = _to_srgb(result, profile)
    if result.mode == "CMYK":
        result = result.convert("RGB")
    if result.mode == "RGBA" and result.getextrema()[3][0] == 255:
        result = result.convert("RGB")
    clean = Image.new(result.mode, result.size)
    clean.paste(result)
    return clean


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    srgb = ImageCms.createProfile("sRGB")
    if picture.mode == "RGBA":
        alpha = picture.getchannel("A")
        rgb = ImageCms.profileToProfile(picture.convert("RGB"), given, srgb, outputMode="RGB")
        if rgb is None:
            return picture
        rgb.putalpha(alpha)
        return rgb
    return ImageCms.profileToProfile(picture, given, srgb, outputMode="RGB") or picture


def flatten(picture: Image.Image, colour: str | tuple[int, int, int]) -> Image.Image:
    """Lay a picture on a plain ground.

    Args:
        picture: Any mode; straight alpha.
        colour: ``#rrggbb`` or an RGB triple.

    Returns:
        An ``RGB`` picture.
    """
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, parse_colour(colour) if isinstance(colour, str) else colour)
    ground.alpha_composite(picture)
    return ground.convert("RGB")


def parse_colour(value: str) -> tuple[int, int, int]:
    """``#rgb`` or ``#rrggbb`` as an RGB triple in 0 to 255.

    Raises:
        InputError: If it is neither.
    """
    try:
        red, green, blue, *_ = ImageColor.getrgb(value)
    except ValueError:
        raise InputError(f"colour {value!r} is not of the form #rrggbb") from None
    return red, green, blue


def encode(
    picture: Image.Image,
    format: ImageFormat = "png",  # noqa: A002 - the word that params use
    *,
    quality: int = 90,
    ground: str | tuple[int, int, int] = "#ffffff",
) -> bytes:
    """Encode a picture; equal pixels give equal bytes, and nothing but pixels is written.

    Args:
        picture: Mode ``L``, ``RGB`` or ``RGBA``.
        format: ``png`` (lossless), ``jpeg`` (no transparency: it is laid on ``ground``) or ``webp``.
        quality: 1 to 100 for jpeg and webp; 100 makes webp lossless.
        ground: Colour under transparency where the format has none.

    Returns:
        The file.
    """
    buffer = io.BytesIO()
    plain = Image.new(picture.mode, picture.size)
    plain.paste(picture)
    if format == "png":
        plain.save(buffer, "PNG", compress_level=6)
    elif format == "jpeg":
        base = plain if plain.mode in ("L", "RGB") else flatten(plain, ground)
        base.save(
            buffer,
            "JPEG",
            quality=quality,
            optimize=True,
            progressive=True,
            subsampling=0 if quality >= 85 else 2,
        )
    elif format == "webp":
        plain.save(buffer, "WEBP", quality=quality, method=4, lossless=quality == 100, exact=False)
    else:
        raise InputError(f"format {format!r} is unknown; allowed: {', '.join(MEDIA_TYPES)}", param="format")
    return buffer.getvalue()


# Pillow must refuse truncated files instead of filling them up with grey; another library may have switched that off.
ImageFile.LOAD_TRUNCATED_IMAGES = False

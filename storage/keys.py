"""Object keys: made by the server, never by a user, and checked again at the store's door."""

import mimetypes
import re

from contentfactory.errors import InputError, IntegrityError

MAX_KEY = 512
"""Characters in a key. S3 takes 1,024; a local folder needs room for its own path."""
MAX_SEGMENT = 200
"""Characters between two slashes; file systems stop at 255 bytes."""

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=-]*")
_SUFFIX = re.compile(r"\.[a-z0-9]{1,16}(\.[a-z0-9]{1,16})?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA256_IN_KEY = re.compile(r"(?:^|/)([0-9a-f]{64})(?:\.[^/]*)?$")

# What the factory itself makes and takes; the first suffix of a type is the one that its files get. The
# standard library's table comes second, in an instance of its own because the module's depends on files in
# /etc of the machine.
_SUFFIXES = {
    "application/gguf": (".gguf",),
    "application/gzip": (".gz",),
    "application/json": (".json",),
    "application/jsonl": (".jsonl",),
    "application/octet-stream": (".bin",),
    "application/onnx": (".onnx",),
    "application/safetensors": (".safetensors",),
    "application/vnd.apache.parquet": (".parquet",),
    "application/x-subrip": (".srt",),
    "application/yaml": (".yaml", ".yml"),
    "audio/aac": (".aac",),
    "audio/flac": (".flac",),
    "audio/midi": (".mid", ".midi"),
    "audio/mp4": (".m4a",),
    "audio/mpeg": (".mp3",),
    "audio/ogg": (".ogg",),
    "audio/opus": (".opus",),
    "audio/pcm": (".pcm",),
    "audio/wav": (".wav",),
    "font/ttf": (".ttf",),
    "image/avif": (".avif",),
    "image/gif": (".gif",),
    "image/jpeg": (".jpg", ".jpeg"),
    "image/png": (".png",),
    "image/webp": (".webp",),
    "text/csv": (".csv",),
    "text/markdown": (".md",),
    "text/plain": (".txt", ".log"),
    "text/vtt": (".vtt",),
    "video/mp4": (".mp4",),
    "video/webm": (".webm",),
}
_ALIASES = {
    "audio/x-wav": "audio/wav",
    "audio/wave": "audio/wav",
    "audio/x-flac": "audio/flac",
    "audio/mp3": "audio/mpeg",
}
_TYPE_OF = {suffix: media_type for media_type, suffixes in _SUFFIXES.items() for suffix in suffixes}
_STANDARD = mimetypes.MimeTypes()


def suffix_for(media_type: str) -> str:
    """The file suffix of a media type without its parameters, with its dot; ``.bin`` for an unknown one."""
    plain = media_type.partition(";")[0].strip().lower()
    known = _SUFFIXES.get(_ALIASES.get(plain, plain))
    return known[0] if known else _STANDARD.guess_extension(plain) or ".bin"


def media_type_for(key: str) -> str:
    """The media type that a key's suffix speaks of; ``application/octet-stream`` for an unknown one."""
    name = key.rpartition("/")[2].lower()
    dot = name.rfind(".")
    known = _TYPE_OF.get(name[dot:]) if dot >= 0 else None
    return (
        known
        or _STANDARD.guess_type("name" + name[dot:] if dot >= 0 else "name")[0]
        or "application/octet-stream"
    )


def validate_key(key: str) -> str:
    """Check a key and give it back.

    A key is segments of ASCII letters, digits and ``. _ - =`` with a slash between them; no segment starts
    with a dot or a dash, so neither ``..`` nor a hidden file nor an option of a command line can come of it.

    Raises:
        InputError: If it is malformed.
    """
    if not 0 < len(key) <= MAX_KEY:
        raise InputError(f"an object key has 1 to {MAX_KEY} characters, this one {len(key)}", param="key")
    for segment in key.split("/"):
        if len(segment) > MAX_SEGMENT:
            raise InputError(
                f"object key {key!r}: a part has {len(segment)} characters, at most {MAX_SEGMENT}",
                param="key",
            )
        if not _SEGMENT.fullmatch(segment):
            raise InputError(
                f"object key {key!r}: the part {segment!r} is not allowed; ASCII letters, digits and . _ - = between slashes, "
                "not starting with a dot or a dash",
                param="key",
            )
    return key


def validate_prefix(prefix: str) -> str:
    """Check the prefix of a listing: empty, or the beginning of a key.

    Raises:
        InputError: If no key can start so.
    """
    if prefix:
        validate_key(prefix[:-1] if prefix.endswith("/") else prefix)
    return prefix


def validate_sha256(sha256: str) -> str:
    """Check a hexadecimal SHA-256 and give it back in lower case.

    Raises:
        InputError: If it is not 64 hexadecimal digits.
    """
    lower = sha256.lower()
    if not _SHA256.fullmatch(lower):
        raise InputError(f"a SHA-256 is 64 hexadecimal digits, not {sha256!r}", param="sha256")
    return lower


def project_prefix(project_id: str) -> str:
    """What the keys of all of a project's objects start with."""
    return validate_key(f"projects/{project_id}") + "/"


def artifact_key(project_id: str, sha256: str, suffix: str = "") -> str:
    """Key of something that a job made: ``projects/<project>/objects/<aa>/<sha256><.suffix>``.

    It bears the digest of its bytes, so the same result of two attempts lands on the same key. Two
    hexadecimal digits fan the objects out over folders.

    Args:
        project_id: Owner.
        sha256: Digest of the bytes (hexadecimal).
        suffix: File suffix with or without its dot, such as ``.png`` or ``tar.gz``; empty for none.

    Raises:
        InputError: If a part is malformed.
    """
    return _content_key(project_id, "objects", sha256, suffix)


def input_key(project_id: str, sha256: str, suffix: str = "") -> str:
    """Key of something that a user handed in, as in ``artifact_key``:
    ``projects/<project>/inputs/<aa>/<sha256><.suffix>``.
    """
    return _content_key(project_id, "inputs", sha256, suffix)


def upload_key(project_id: str, upload_id: str) -> str:
    """Key of bytes whose digest is not known yet, such as the target of a presigned PUT:
    ``projects/<project>/uploads/<id>``.
    """
    return validate_key(f"projects/{project_id}/uploads/{upload_id}")


def sha256_of_key(key: str) -> str | None:
    """The digest that a key of ``artifact_key`` or ``input_key`` bears; None for other keys."""
    found = _SHA256_IN_KEY.search(key)
    return found.group(1) if found else None


def promised_sha256(key: str, sha256: str | None) -> str | None:
    """The digest that bytes under ``key`` must have: the one given, the key's own, or None for any.

    Raises:
        IntegrityError: If the two differ.
    """
    in_key = sha256_of_key(validate_key(key))
    if sha256 is None:
        return in_key
    given = validate_sha256(sha256)
    if in_key is not None and in_key != given:
        raise IntegrityError(f"object key {key} is for other bytes than those with SHA-256 {given}")
    return given


def _content_key(project_id: str, folder: str, sha256: str, suffix: str) -> str:
    digest = validate_sha256(sha256)
    if suffix:
        suffix = "." + suffix.lower().lstrip(".")
        if not _SUFFIX.fullmatch(suffix):
            raise InputError(
                f"file suffix {suffix!r} is not one or two parts of 1 to 16 ASCII letters and digits",
                param="suffix",
            )
    return validate_key(f"{project_prefix(project_id)}{folder}/{digest[:2]}/{digest}{suffix}")

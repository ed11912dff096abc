"""Where bytes lie: one protocol (``base``) over S3, a local folder and memory, chosen by a URL."""

from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from contentfactory.errors import ConfigError, InputError
from storage.base import ObjectStore, StoredObject
from storage.local import LocalStore
from storage.memory import MemoryStore

__all__ = ["LocalStore", "MemoryStore", "ObjectStore", "StoredObject", "open_store"]

_S3_OPTIONS = {"endpoint", "public_endpoint", "region", "path_style"}
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def open_store(
    url: str,
    *,
    access_key: str | None = None,
    secret_key: str | None = None,
    session_token: str | None = None,
    base_url: str | None = None,
    signing_secret: str | bytes | None = None,
    durable: bool = True,
) -> ObjectStore:
    """Open the object store that a URL names. Nothing is sent yet: ``check`` tells whether it works.

    Args:
        url: ``file:///absolute/folder``, ``memory:``, or
            ``s3://bucket/prefix?endpoint=http://host:port&region=eu-1`` with the optional ``public_endpoint``
            (how others reach the server, for links) and ``path_style=false``.
        access_key: For S3; without it the usual chain of AWS decides who we are.
        secret_key: For S3.
        session_token: For S3 with temporary credentials.
        base_url: Where the API is reached from outside; for links of stores other than S3.
        signing_secret: At least 16 bytes, the same in all processes; for links of stores other than S3.
        durable: Whether a local folder flushes every object to the disk.

    Raises:
        ConfigError: If the URL is none of these.
        ServiceUnavailable: If a local folder cannot be made.
    """
    parts = urlsplit(url)
    try:
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError as error:
        raise _refused(url, f"its options cannot be read: {error}") from None
    if "@" in parts.netloc:
        raise _refused("s3://…@…", "credentials do not belong in it; set access key and secret key")
    known = _S3_OPTIONS if parts.scheme == "s3" else set()
    if unknown := sorted(set(options) - known):
        raise _refused(
            url, f"unknown options {', '.join(unknown)}; known: {', '.join(sorted(known)) or 'none'}"
        )
    if parts.scheme == "memory":
        return MemoryStore(base_url=base_url or "http://localhost", signing_secret=signing_secret)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise _refused(url, "a folder is written as file:///absolute/path")
        return LocalStore(
            Path(unquote(parts.path)), durable=durable, base_url=base_url, signing_secret=signing_secret
        )
    if parts.scheme == "s3":
        return _open_s3(url, parts.netloc, parts.path, options, access_key, secret_key, session_token)
    raise _refused(url, "it starts with file:, s3: or memory:")


def _open_s3(
    url: str,
    bucket: str,
    prefix: str,
    options: dict[str, str],
    access_key: str | None,
    secret_key: str | None,
    session_token: str | None,
) -> ObjectStore:
    if not bucket:
        raise _refused(url, "the bucket is missing")
    if bool(access_key) != bool(secret_key):
        raise ConfigError(
            "storage access key and secret key go together; one of them is missing",
            param="storage_access_key",
        )
    for name in ("endpoint", "public_endpoint"):
        if name in options and urlsplit(options[name]).scheme not in ("http", "https"):
            raise _refused(url, f"{name} starts with http: or https:")
    path_style = None
    if "path_style" in options:
        path_style = _TRUTH.get(options["path_style"].lower())
        if path_style is None:
            raise _refused(url, "path_style is true or false")
    # boto3 takes a third of a second to import: only for those who use it.
    from storage.s3 import S3Store

    try:
        return S3Store(
            bucket,
            prefix=unquote(prefix),
            endpoint=options.get("endpoint"),
            public_endpoint=options.get("public_endpoint"),
            region=options.get("region"),
            access_key=access_key,
            secret_key=secret_key,
            session_token=session_token,
            path_style=path_style,
        )
    except InputError as error:
        raise _refused(url, error.message) from None


def _refused(url: str, why: str) -> ConfigError:
    return ConfigError(f"storage_url {url!r}: {why}", param="storage_url")

"""The protocol that every object store keeps, and what all stores share.

An object is bytes under a key that the server made (``storage.keys``). It is written once: a key that bears a
SHA-256 can only ever hold those bytes, so putting twice is harmless and a crash between the put and the
ledger's commit leaves at worst an orphan, never a wrong result.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias, runtime_checkable

Source: TypeAlias = bytes | bytearray | memoryview | Path | BinaryIO
"""What can be put: bytes, a file by its path, or a readable binary stream (read from where it stands)."""

CHUNK = 1 << 20
"""Bytes that are held at once while something is streamed or hashed."""

REFRESH_AFTER_S = 3600
"""A sweep's window must be longer than this: so old may the mark of an object be that was just put again."""


@dataclass(frozen=True)
class StoredObject:
    """What a store knows of an object.

    Attributes:
        key: The object's key, as in ``storage.keys``.
        size: Bytes.
        sha256: Lower-case hexadecimal digest as verified by ``put``; None in entries of ``list``
            (``keys.sha256_of_key`` tells it from the key) and for objects that somebody else put there.
        media_type: As given to ``put``; in entries of ``list`` it is guessed from the key's suffix.
        modified_at: When it was written, in seconds since 1970 (UTC).
        etag: The store's own mark of these bytes, where it has one.
    """

    key: str
    size: int
    sha256: str | None
    media_type: str
    modified_at: float
    etag: str | None = None


@runtime_checkable
class ObjectStore(Protocol):
    """Bytes under keys, written once. Every method may be called from several threads at once.

    All methods raise ``StorageError`` when the store fails in a way that may pass (time-out, 5xx, lost
    connection), ``ServiceUnavailable`` when it cannot work as set up (no bucket, wrong credentials, disk
    full), and ``InputError`` for a key that ``storage.keys.validate_key`` refuses.
    """

    def put(
        self,
        key: str,
        data: Source,
        *,
        media_type: str,
        sha256: str | None = None,
        size: int | None = None,
    ) -> StoredObject:
        """Write an object unless the key is taken.

        When equal bytes lie there already, their ``modified_at`` is brought up to now (on S3: if it is more
        than ``REFRESH_AFTER_S`` old), so that a sweep of old unreferenced objects spares what is about to be
        referenced again.

        Args:
            key: Where to.
            data: Bytes, a file's path, or a binary stream, which is read once in pieces and not closed.
            media_type: IANA media type, such as ``image/png``.
            sha256: What the bytes must hash to (hexadecimal); computed where not given. A key of
                ``keys.artifact_key`` or ``keys.input_key`` promises a digest by itself.
            size: How many bytes there must be, where it is known beforehand.

        Returns:
            The object that now lies there: the new one, or the equal one that lay there already.

        Raises:
            ObjectExists: If other bytes lie under the key. They are left as they were.
            IntegrityError: If ``sha256``, ``size`` or the key's own digest do not fit the bytes. Nothing is
                stored then.
        """
        ...

    def get(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        """Read an object, or a part of it, into memory.

        Args:
            key: Which.
            start: First byte, from 0. At or beyond the object's end the answer is empty.
            end: One past the last byte, as in a slice; None or beyond the end means up to the end.

        Raises:
            ObjectNotFound: If there is none.
            ValueError: If ``start`` is negative or ``end`` lies before ``start``.
        """
        ...

    def open(self, key: str, *, start: int = 0, end: int | None = None) -> BinaryIO:
        """Open an object, or a part of it (as in ``get``), for reading in pieces. Close it, or use ``with``.

        The stream reads forward only; it need not be seekable.

        Raises:
            ObjectNotFound: If there is none.
        """
        ...

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Copy an object into a file: into a temporary one beside it, verified, then renamed over ``path``.

        Args:
            key: Which.
            path: The file to make or replace; missing parent folders are made.
            sha256: What the bytes must hash to; where not given, the digest that the store keeps is used, if
                it has one.

        Raises:
            ObjectNotFound: If there is none.
            IntegrityError: If the bytes do not match. ``path`` is left as it was.
        """
        ...

    def head(self, key: str) -> StoredObject | None:
        """What the store knows of an object, or None if there is none."""
        ...

    def delete(self, keys: Iterable[str]) -> int:
        """Delete objects. A key without an object is no error.

        Returns:
            How many keys were asked for and hold nothing now.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """All objects whose key starts with ``prefix``, in key order, fetched page by page as you go.

        Some S3 servers keep folders and compare keys part by part: there ``a/b`` comes before ``a.png``.
        """
        ...

    def presign_get(
        self,
        key: str,
        *,
        expires_s: int,
        filename: str | None = None,
        media_type: str | None = None,
        inline: bool = False,
    ) -> str:
        """A URL by which anyone may read this object for a while. Whether the object exists is not checked.

        Args:
            key: Which.
            expires_s: Seconds until the URL stops working, 1 to 604800 (7 days).
            filename: Name under which a browser saves it; any Unicode.
            media_type: Media type to answer with instead of the stored one.
            inline: Whether a browser may show it rather than save it. Ignored for types that can run
                scripts (HTML, SVG, XML …), which are always saved.
        """
        ...

    def presign_put(self, key: str, *, expires_s: int, media_type: str, size: int) -> str:
        """A URL to which exactly ``size`` bytes of ``media_type`` may be sent by HTTP PUT for a while.

        The sender must send the same ``Content-Type`` and ``Content-Length``; what arrived is to be checked
        with ``head``.
        """
        ...

    def sweep_temporary(self, older_than_s: float) -> int:
        """Remove what writes that died half-way have left (temporary files, unfinished multipart uploads).

        Args:
            older_than_s: Only what was begun more than so many seconds ago; longer than the longest upload.

        Returns:
            How many were removed.
        """
        ...

    def check(self) -> None:
        """See whether the store can be reached, read and written.

        Raises:
            ServiceUnavailable: If not; the message says how to mend it.
        """
        ...

    def close(self) -> None:
        """Give connections back. The store must not be used afterwards."""
        ...

"""A store in this process's memory: for tests and for trying things out. It keeps the whole contract."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from contentfactory.errors import ObjectExists, ObjectNotFound
from storage.base import Source, StoredObject
from storage.keys import media_type_for, promised_sha256, validate_key, validate_prefix
from storage.signing import SignedRequest, UrlSigner, check_media_type
from storage.streams import HashingReader, buffered, check_range, download_to, opened


@dataclass(frozen=True)
class _Entry:
    data: bytes
    stored: StoredObject


class MemoryStore:
    """Objects in a dictionary. They are gone when it is.

    Args:
        base_url: Where the API is reached; for links only.
        signing_secret: Secret for links; a random one where not given.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        *,
        base_url: str | None = "http://localhost",
        signing_secret: str | bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._objects: dict[str, _Entry] = {}
        self._lock = threading.Lock()
        self._clock = clock
        self._signer = UrlSigner(signing_secret or os.urandom(32), base_url, clock=clock)

    def put(
        self, key: str, data: Source, *, media_type: str, sha256: str | None = None, size: int | None = None
    ) -> StoredObject:
        """See ``ObjectStore.put``."""
        expected = promised_sha256(key, sha256)
        check_media_type(media_type)
        with opened(data) as stream:
            reader = HashingReader(stream, key, sha256=expected, size=size)
            content = reader.readall()
        now = self._clock()
        with self._lock:
            held = self._objects.get(key)
            if held is not None and held.data != content:
                raise ObjectExists(f"object {key} holds other bytes already")
            if held is None:
                etag = hashlib.md5(content, usedforsecurity=False).hexdigest()
                stored = StoredObject(key, len(content), reader.sha256, media_type, now, etag)
            else:
                stored = replace(held.stored, modified_at=now)
            self._objects[key] = _Entry(content, stored)
        return stored

    def get(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        """See ``ObjectStore.get``."""
        check_range(start, end)
        return self._entry(key).data[start:end]

    def open(self, key: str, *, start: int = 0, end: int | None = None) -> BinaryIO:
        """See ``ObjectStore.open``."""
        with opened(self.get(key, start=start, end=end)) as stream:
            return buffered(HashingReader(stream, key, close_source=True))

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """See ``ObjectStore.download``."""
        expected = promised_sha256(key, sha256)
        with opened(self._entry(key).data) as stream:
            download_to(path, HashingReader(stream, key, sha256=expected))

    def head(self, key: str) -> StoredObject | None:
        """See ``ObjectStore.head``."""
        entry = self._objects.get(validate_key(key))
        return entry.stored if entry else None

    def delete(self, keys: Iterable[str]) -> int:
        """See ``ObjectStore.delete``."""
        wanted = {validate_key(key) for key in keys}
        with self._lock:
            for key in wanted:
                self._objects.pop(key, None)
        return len(wanted)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See ``ObjectStore.list``."""
        validate_prefix(prefix)
        for key in sorted(self._objects):
            entry = self._objects.get(key)
            if key.startswith(prefix) and entry is not None:
                yield replace(entry.stored, sha256=None, media_type=media_type_for(key))

    def presign_get(
        self,
        key: str,
        *,
        expires_s: int,
        filename: str | None = None,
        media_type: str | None = None,
        inline: bool = False,
    ) -> str:
        """See ``ObjectStore.presign_get``."""
        return self._signer.get_url(
            key, expires_s=expires_s, filename=filename, media_type=media_type, inline=inline
        )

    def presign_put(self, key: str, *, expires_s: int, media_type: str, size: int) -> str:
        """See ``ObjectStore.presign_put``."""
        return self._signer.put_url(key, expires_s=expires_s, media_type=media_type, size=size)

    def verify_url(self, url: str, method: str = "GET") -> SignedRequest:
        """See ``UrlSigner.verify``."""
        return self._signer.verify(url, method)

    def sweep_temporary(self, older_than_s: float) -> int:
        """Nothing is ever left here."""
        return 0

    def check(self) -> None:
        """Memory is always there."""

    def close(self) -> None:
        """Nothing to give back."""

    def _entry(self, key: str) -> _Entry:
        entry = self._objects.get(validate_key(key))
        if entry is None:
            raise ObjectNotFound(f"no object {key}")
        return entry

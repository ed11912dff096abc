"""Objects as plain files of a folder, with the same promises as on S3.

Layout of the folder::

    objects/<key>         the bytes, under their key, so that a person can look at them
    meta/<key>.json       digest and media type, where the key itself does not tell both
    tmp/                  what is being written

A write goes to ``tmp``, is flushed to the disk and then hard-linked to its key: the link either appears whole
or not at all, and it never replaces another. The description follows; if a crash comes between, it is made
again from the bytes, so it never has to be flushed.
"""

import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import structlog

from contentfactory.errors import (
    ConfigError,
    InputError,
    ObjectExists,
    ObjectNotFound,
    ServiceUnavailable,
    StorageError,
)
from storage.base import CHUNK, Source, StoredObject
from storage.keys import media_type_for, promised_sha256, sha256_of_key, validate_key, validate_prefix
from storage.signing import SignedRequest, UrlSigner, check_media_type
from storage.streams import (
    DISK_FULL,
    NO_PERMISSION,
    HashingReader,
    Slice,
    buffered,
    check_range,
    download_to,
    opened,
    sha256_of,
)

_log = structlog.get_logger(__name__)
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalStore:
    """A folder as an object store, for one machine or a shared file system that knows hard links.

    Several processes may use the folder at once.

    Args:
        root: The folder; made if missing.
        durable: Whether a put returns only when the bytes are on the disk, so that they outlive a power
            cut. Without it they still outlive the death of the process.
        base_url: Where the API is reached; for links only.
        signing_secret: Secret for links, at least 16 bytes; for links only.
        clock: Seconds since 1970, for links.

    Raises:
        ServiceUnavailable: If the folder cannot be made or written.
    """

    def __init__(
        self,
        root: Path,
        *,
        durable: bool = True,
        base_url: str | None = None,
        signing_secret: str | bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not root.is_absolute():
            raise ConfigError(
                f"the folder of a local store must be absolute, not {str(root)!r}", param="storage_url"
            )
        self.root = root
        self._objects = root / "objects"
        self._meta = root / "meta"
        self._tmp = root / "tmp"
        self._durable = durable
        self._signer = UrlSigner(signing_secret, base_url, clock=clock)
        self._rename_lock = threading.Lock()
        with self._mapped("open"):
            for folder in (self._objects, self._meta, self._tmp):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except (FileExistsError, NotADirectoryError):
                    raise ServiceUnavailable(
                        f"the storage folder {root} cannot be made: a file is in its way"
                    ) from None

    def put(
        self, key: str, data: Source, *, media_type: str, sha256: str | None = None, size: int | None = None
    ) -> StoredObject:
        """See ``ObjectStore.put``."""
        expected = promised_sha256(key, sha256)
        check_media_type(media_type)
        # Names as text: a worker puts a result for each job, and paths as objects would cost it as much as the disk does.
        target = f"{self._objects}/{key}"
        folder = target.rpartition("/")[0]
        with opened(data) as stream, self._mapped("write"), self._temporary() as temporary:
            sha256, count = self._write(temporary, HashingReader(stream, key, sha256=expected, size=size))
            self._make_folder(folder)
            if self._link(temporary, target):
                self._write_meta(key, sha256, media_type)
            else:
                media_type = self._settle(key, temporary, sha256, count, media_type)
            if self._durable:
                _sync_folder(folder)
            try:
                status = os.stat(target)
            except FileNotFoundError:
                raise StorageError(f"object {key} was deleted while it was put") from None
        return StoredObject(key, count, sha256, media_type, status.st_mtime, _etag(status))

    def get(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        """See ``ObjectStore.get``."""
        with self._mapped("read"), self._reader(key, start, end) as reader:
            return reader.readall()

    def open(self, key: str, *, start: int = 0, end: int | None = None) -> BinaryIO:
        """See ``ObjectStore.open``. Whoever reads all of an object learns from an ``IntegrityError`` that its
        bytes have changed.
        """
        with self._mapped("read"):
            return buffered(self._reader(key, start, end))

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """See ``ObjectStore.download``."""
        expected = promised_sha256(key, sha256)
        with self._mapped("read"), self._reader(key, 0, None, expected) as reader:
            download_to(path, reader)

    def head(self, key: str) -> StoredObject | None:
        """See ``ObjectStore.head``."""
        validate_key(key)
        with self._mapped("read"):
            return self._describe(key)

    def delete(self, keys: Iterable[str]) -> int:
        """See ``ObjectStore.delete``."""
        wanted = {key: self._path(key) for key in keys}
        with self._mapped("delete"):
            for key, path in wanted.items():
                # The object first: a description without an object is invisible.
                for victim in (path, self._meta_path(key)):
                    _unlink(str(victim))
        return len(wanted)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See ``ObjectStore.list``."""
        validate_prefix(prefix)
        folder = prefix.rpartition("/")[0]
        with self._mapped("list"):
            yield from self._walk(self._objects / folder if folder else self._objects, folder, prefix)

    def presign_get(
        self,
        key: str,
        *,
        expires_s: int,
        filename: str | None = None,
        media_type: str | None = None,
        inline: bool = False,
    ) -> str:
        """See ``ObjectStore.presign_get``. The link leads to the API, which asks ``verify_url``."""
        return self._signer.get_url(
            key, expires_s=expires_s, filename=filename, media_type=media_type, inline=inline
        )

    def presign_put(self, key: str, *, expires_s: int, media_type: str, size: int) -> str:
        """See ``ObjectStore.presign_put``. The link leads to the API, which asks ``verify_url``."""
        return self._signer.put_url(key, expires_s=expires_s, media_type=media_type, size=size)

    def verify_url(self, url: str, method: str = "GET") -> SignedRequest:
        """See ``UrlSigner.verify``."""
        return self._signer.verify(url, method)

    def path_of(self, key: str) -> Path | None:
        """Where the object's bytes lie, to serve them without a copy; never write there. None if not there."""
        path = self._path(key)
        return path if path.is_file() else None

    def sweep_temporary(self, older_than_s: float) -> int:
        """See ``ObjectStore.sweep_temporary``."""
        oldest = time.time() - older_than_s
        removed = 0
        with self._mapped("sweep"), os.scandir(self._tmp) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_mtime < oldest:
                        os.unlink(entry.path)
                        removed += 1
        return removed

    def check(self) -> None:
        """See ``ObjectStore.check``."""
        try:
            with self._mapped("check"), self._temporary() as name:
                temporary = Path(name)
                temporary.write_bytes(b"check")
                if temporary.read_bytes() != b"check":
                    raise ServiceUnavailable(
                        f"the storage folder {self.root} does not give back what was written"
                    )
        except StorageError as error:
            raise ServiceUnavailable(error.message) from error

    def close(self) -> None:
        """Nothing to give back."""

    def _path(self, key: str) -> Path:
        return self._objects / validate_key(key)

    def _meta_path(self, key: str) -> Path:
        return self._meta / f"{key}.json"

    def _reader(self, key: str, start: int, end: int | None, sha256: str | None = None) -> HashingReader:
        check_range(start, end)
        held = self._describe(key)
        try:
            file = self._path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            held = None
        if held is None:
            raise ObjectNotFound(f"no object {key}")
        if start == 0 and (end is None or end >= held.size):
            return HashingReader(file, key, sha256=sha256 or held.sha256, close_source=True)
        file.seek(start)
        return HashingReader(Slice(file, None if end is None else end - start), key, close_source=True)

    def _write(self, temporary: str, reader: HashingReader) -> tuple[str, int]:
        """Write a file of what the reader gives; digest and number of its bytes."""
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            while chunk := reader.read(CHUNK):
                left = memoryview(chunk)
                while left:
                    left = left[os.write(number, left) :]
            if self._durable:
                os.fsync(number)
        finally:
            os.close(number)
        return reader.sha256, reader.count

    def _settle(self, key: str, temporary: str, sha256: str, count: int, media_type: str) -> str:
        """The key is taken: by the same bytes, by others, or by what a power cut or a bad disk made of them.

        Returns:
            The media type that the object has.
        """
        target = self._path(key)
        meta = self._read_meta(key)
        try:
            if meta is not None and meta[0] == sha256 and target.stat().st_size == count:
                os.utime(target)
                return meta[1]
            # The description may be a leftover: only the bytes themselves say for sure.
            with target.open("rb") as file:
                same = sha256_of(file) == (sha256, count)
            if not same:
                if sha256_of_key(key) != sha256:
                    raise ObjectExists(f"object {key} holds other bytes already")
                _log.warning("object_repaired", key=key)
                os.replace(temporary, target)
            os.utime(target)
        except FileNotFoundError:
            raise StorageError(f"object {key} was deleted while it was put again") from None
        if meta is None and (told := _told_by(key)):
            return told[1]  # the first put's type, which it had no need to write down
        self._write_meta(key, sha256, media_type)
        return media_type

    def _describe(self, key: str) -> StoredObject | None:
        """The object with its description, made from the bytes where a crash or a person's hand left none."""
        path = self._path(key)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not path.is_file():
            return None
        meta = self._read_meta(key) or _told_by(key)
        if meta is None:
            with path.open("rb") as file:
                sha256, _ = sha256_of(file)
            meta = sha256, media_type_for(key)
        return StoredObject(key, status.st_size, meta[0], meta[1], status.st_mtime, _etag(status))

    def _read_meta(self, key: str) -> tuple[str, str] | None:
        try:
            meta = json.loads(self._meta_path(key).read_bytes())
            return str(meta["sha256"]), str(meta["media_type"])
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None

    def _write_meta(self, key: str, sha256: str, media_type: str) -> None:
        if (sha256, media_type) == _told_by(key):
            # Most results: a description of their own would be half of the work of a put.
            _unlink(f"{self._meta}/{key}.json")  # what a deletion that was cut short left
            return
        path = self._meta_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._temporary() as temporary:
            Path(temporary).write_text(json.dumps({"sha256": sha256, "media_type": media_type}))
            os.replace(temporary, path)

    @contextmanager
    def _temporary(self) -> Iterator[str]:
        path = f"{self._tmp}/{os.getpid()}-{secrets.token_hex(8)}"
        try:
            yield path
        finally:
            with suppress(OSError):
                os.unlink(path)

    def _link(self, temporary: str, target: str) -> bool:
        """Let the finished file appear under its key. False if the key is taken."""
        try:
            os.link(temporary, target)
        except FileExistsError:
            if os.path.isdir(target):
                raise InputError(
                    f"object key {os.path.basename(target)!r} is the beginning of other objects' keys", param="key"
                ) from None
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._rename(temporary, target)
        return True

    def _rename(self, temporary: str, target: str) -> bool:
        """The same on file systems without hard links: under a lock that all writers of this folder take."""
        import fcntl

        with self._rename_lock, (self.root / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(target):
                return False
            os.rename(temporary, target)
            return True

    def _make_folder(self, folder: str) -> None:
        """Make a folder and its parents; a new name is on the disk only when its parent was flushed.

        At once, since whoever finds the folder there does not flush its parent.
        """
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for new in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(new)
            if self._durable:
                _sync_folder(os.path.dirname(new))

    def _walk(self, folder: Path, key: str, prefix: str) -> Iterator[StoredObject]:
        """Files below a folder in the order of their keys, one folder in memory at a time."""
        try:
            with os.scandir(folder) as entries:
                # A folder sorts with its slash: 'a.png' comes before 'a/b', as in S3.
                found = sorted((entry.name + "/" * entry.is_dir(), entry) for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, entry in found:
            child = f"{key}/{name}" if key else name
            if name.endswith("/"):
                if child.startswith(prefix) or prefix.startswith(child):
                    yield from self._walk(Path(entry.path), child[:-1], prefix)
            elif child.startswith(prefix):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    yield StoredObject(
                        child, status.st_size, None, media_type_for(child), status.st_mtime, _etag(status)
                    )

    @contextmanager
    def _mapped(self, action: str) -> Iterator[None]:
        """Turn what the operating system says into the factory's own errors."""
        try:
            yield
        except OSError as error:
            reason = f"cannot {action} in the storage folder {self.root}: {error.strerror or error}"
            if error.errno in DISK_FULL:
                raise ServiceUnavailable(
                    f"{reason}; free space there, or move storage_url to a larger disk"
                ) from error
            if error.errno in NO_PERMISSION:
                raise ServiceUnavailable(
                    f"{reason}; let uid {os.geteuid()} write there, or set storage_url"
                ) from error
            if error.errno in (errno.ENOTDIR, errno.EISDIR):
                raise InputError(
                    f"{reason}: an object's key cannot be the folder of another's", param="key"
                ) from error
            raise StorageError(reason) from error


def _told_by(key: str) -> tuple[str, str] | None:
    """Digest and media type of an object whose key bears its digest, unless a description says otherwise."""
    sha256 = sha256_of_key(key)
    return (sha256, media_type_for(key)) if sha256 else None


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _sync_folder(folder: str) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

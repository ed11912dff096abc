"""Bytes on their way in and out: counted, hashed and verified as they pass."""

import errno
import hashlib
import io
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from contentfactory.errors import IntegrityError, ServiceUnavailable, StorageError
from storage.base import CHUNK, Source

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NO_PERMISSION = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class Readable(Protocol):
    """Anything with ``read`` and ``close``."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; empty only at the end."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class HashingReader(io.RawIOBase):
    """A forward-only stream that hashes what is read through it and complains at the end if it is not what
    was promised.

    Args:
        source: Where the bytes come from.
        name: What to call it in messages, usually the key.
        sha256: Digest that all of it must have; None for any.
        size: Bytes that there must be; None for any.
        close_source: Whether ``close`` closes the source too.
    """

    def __init__(
        self,
        source: Readable | BinaryIO,
        name: str,
        *,
        sha256: str | None = None,
        size: int | None = None,
        close_source: bool = False,
    ) -> None:
        self._source = source
        self._name = name
        self._expected = sha256
        self._size = size
        self._close_source = close_source
        self._hash = hashlib.sha256()
        self.count = 0

    @property
    def sha256(self) -> str:
        """Digest of what has been read so far (hexadecimal)."""
        return self._hash.hexdigest()

    def readable(self) -> bool:
        """True."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes, or all that is left.

        Raises:
            IntegrityError: If the end is reached, or passed, and the bytes are not the promised ones.
        """
        if size is None or size < 0:
            return self.readall()
        data = self._source.read(size)
        if data:
            self._hash.update(data)
            self.count += len(data)
            if self._size is not None and self.count > self._size:
                raise IntegrityError(f"{self._name}: more than the promised {self._size} bytes")
        elif size:
            self._verify()
        return data

    def readall(self) -> bytes:
        """All that is left.

        Raises:
            IntegrityError: If the bytes are not the promised ones.
        """
        pieces = []
        while data := self.read(CHUNK):
            pieces.append(data)
        return b"".join(pieces)

    def drain(self) -> None:
        """Read to the end for the digest's sake.

        Raises:
            IntegrityError: If the bytes are not the promised ones.
        """
        while self.read(CHUNK):
            pass

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer``, as ``io.BufferedReader`` asks."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the source, if it was handed over."""
        if not self.closed and self._close_source:
            self._source.close()
        super().close()

    def _verify(self) -> None:
        if self._size is not None and self.count != self._size:
            raise IntegrityError(f"{self._name}: {self.count} bytes where {self._size} were promised")
        if self._expected is not None and self.sha256 != self._expected:
            raise IntegrityError(
                f"{self._name}: the bytes hash to {self.sha256}, not to the promised {self._expected}"
            )


def buffered(reader: HashingReader) -> BinaryIO:
    """The reader as an ordinary binary file that reads in larger pieces and knows lines."""
    return io.BufferedReader(reader, CHUNK)


class Slice:
    """At most ``length`` bytes of a stream.

    Args:
        source: Stream that stands at the first byte; closed with this.
        length: Bytes; None for all.
    """

    def __init__(self, source: BinaryIO, length: int | None) -> None:
        self._source = source
        self._left = length

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes of what is left."""
        if self._left is None:
            return self._source.read(size)
        data = self._source.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data

    def close(self) -> None:
        """Close the source."""
        self._source.close()


class Rejoined:
    """Pieces that were read already, and then the stream that they came from.

    Args:
        pieces: What was read; emptied as it is read again, so that no byte is held longer than needed.
        source: The rest.
    """

    def __init__(self, pieces: list[bytes], source: Readable | HashingReader) -> None:
        self._pieces = pieces
        self._source = source

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes."""
        while self._pieces:
            piece = self._pieces.pop(0)
            if 0 <= size < len(piece):
                self._pieces.insert(0, piece[size:])
                return piece[:size]
            if piece:
                return piece
        return self._source.read(size)

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def sha256_of(source: BinaryIO) -> tuple[str, int]:
    """Digest and number of the bytes that are left in a stream."""
    reader = HashingReader(source, "")
    reader.drain()
    return reader.sha256, reader.count


def read_exactly(source: Readable | HashingReader, size: int) -> bytes:
    """``size`` bytes, fewer only at the end of the source."""
    pieces = []
    while size > 0 and (data := source.read(size)):
        pieces.append(data)
        size -= len(data)
    return b"".join(pieces)


@contextmanager
def opened(data: Source) -> Iterator[BinaryIO]:
    """What was given to ``put`` as a stream; a file that was opened here is closed here."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            yield file
    elif isinstance(data, bytes | bytearray | memoryview):
        yield io.BytesIO(data)
    else:
        yield data


@contextmanager
def rewindable(source: BinaryIO, in_memory: int) -> Iterator[BinaryIO]:
    """The stream itself if it can seek, else a copy of it: in memory up to ``in_memory`` bytes, beyond that
    in a temporary file.
    """
    if source.seekable():
        yield source
        return
    with tempfile.SpooledTemporaryFile(max_size=in_memory) as spool:
        while data := source.read(CHUNK):
            try:
                spool.write(data)
            except OSError as error:
                raise ServiceUnavailable(
                    f"cannot write in {tempfile.gettempdir()}: {error.strerror}"
                ) from error
        spool.seek(0)
        yield cast(BinaryIO, spool)


def download_to(path: Path, reader: HashingReader) -> None:
    """Write a stream into a file by way of a temporary one beside it; ``path`` changes only when all of it
    was verified.

    Raises:
        StorageError: If the file cannot be written.
        ServiceUnavailable: If its disk is full.
        IntegrityError: As the reader finds.
    """
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            while chunk := reader.read(CHUNK):
                file.write(chunk)
        os.replace(temporary, path)
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror or error}"
        if error.errno in DISK_FULL | NO_PERMISSION:
            raise ServiceUnavailable(reason) from error
        raise StorageError(reason) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_range(start: int, end: int | None) -> None:
    """Refuse a range that is none.

    Raises:
        ValueError: If ``start`` is negative or ``end`` lies before it.
    """
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"range {start} to {end}: start must be 0 or more and end not before it")

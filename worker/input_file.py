"""An input on the local disk, as runners and decoders see it. Light: the decoder's child imports it too."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from contentfactory.errors import InputError


@dataclass(frozen=True)
class InputFile:
    """An input on the local disk.

    Args:
        path: Where it lies; read-only for the runner.
        media_type: Media type as stored or as sniffed from the bytes, never as claimed by a file name.
        name: Name for messages.
        meta: What the artifact's row says of it (``width``, ``duration_s``, ``text`` …).
        trusted: Whether a job of this factory made the bytes. Everything else is decoded in the confined child
            (`worker.confined`).
    """

    path: Path
    media_type: str
    name: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    trusted: bool = False

    def read_bytes(self) -> bytes:
        """The whole file."""
        return self.path.read_bytes()

    def read_text(self) -> str:
        """The file as UTF-8 text.

        Raises:
            InputError: If it is not UTF-8.
        """
        try:
            return self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"input {self.name or self.path.name} is not UTF-8 text: {error}") from None

    def open(self) -> BinaryIO:
        """The file as a binary stream."""
        return open(self.path, "rb")

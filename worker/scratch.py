"""The folder of a micro-batch, made when somebody wants it: most quick jobs write nothing, and to make and remove it took a millisecond each time."""

import shutil
from pathlib import Path

from contentfactory.errors import TransientError


class Scratch:
    """A folder that is not there until it is asked for.

    Args:
        path: Where.
        parent: The one in which this lies, if it is a part of another.
    """

    def __init__(self, path: Path, parent: "Scratch | None" = None) -> None:
        self._path, self._parent = path, parent
        self._made = False

    def __call__(self) -> Path:
        """The folder, for its owner alone.

        Raises:
            TransientError: If this worker cannot make it now: never the job's fault.
        """
        if not self._made:
            try:
                if self._parent:
                    self._parent()
                self._path.mkdir(parents=True, exist_ok=True, mode=0o700)  # upload threads may ask at once
            except OSError as error:
                raise TransientError(f"this worker cannot make a scratch folder: {error}", code="worker_resources") from error
            self._made = True
        return self._path

    def part(self, number: int) -> "Scratch":
        """One of its own for a piece of the micro-batch: these number their jobs anew."""
        return Scratch(self._path / f"piece-{number}", self)

    def remove(self) -> bool:
        """Remove it with what is in it. Returns whether nothing is left."""
        if self._made:
            shutil.rmtree(self._path, ignore_errors=True)
            self._made = self._path.exists()
        return not self._made


__all__ = ["Scratch"]

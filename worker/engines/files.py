"""Where model files lie: inside an installed package, in this project, or converted once in the model folder.

The code of such a package is never imported: its files are found through its metadata, checked against a pinned SHA-256
and, where a conversion pays, converted once to safetensors in the model folder.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from contentfactory.catalogue import CatalogueModel
from contentfactory.errors import ModelUnavailable

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ResolvedModel:
    """A model as a runner gets it: files on the local disk.

    Args:
        name: Name in the registry or catalogue.
        version: Pinned version.
        engine: Loader in ``worker/engines``.
        files: Local path by role (``weights``, ``config``, ``folder`` …).
        folder: Folder for converted forms of this model; survives restarts, may be deleted at any time.
        options: Engine options.
        memory_mb: Estimate of what the loaded model takes.
    """

    name: str
    version: str
    engine: str
    files: dict[str, Path]
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    memory_mb: int = 0

    @property
    def key(self) -> str:
        """Name and version, the identity of the weights."""
        return f"{self.name}@{self.version}"

    def converted(self, name: str, build: Callable[[Path], None]) -> Path:
        """A folder with a converted form of the model, built once, safely under concurrent workers and crashes.

        Args:
            name: Name of the form (``safetensors``, ``ct2`` …).
            build: Fills the empty folder that it is given.

        Returns:
            The finished folder.
        """
        target = self.folder / name
        if target.is_dir():
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_dir():
                return target
            temp = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self.folder))
            try:
                build(temp)
                os.replace(temp, target)
            except BaseException:
                shutil.rmtree(temp, ignore_errors=True)
                raise
        return target


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks, as lower-case hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def locate(model: CatalogueModel, model_dir: Path) -> ResolvedModel:
    """Find and verify a catalogue model's files.

    Args:
        model: Entry of the catalogue.
        model_dir: Folder for converted forms and verification stamps.

    Raises:
        ModelUnavailable: If the package or a file is missing, or a file does not match its SHA-256; the message says how
            to mend it.
    """
    files: dict[str, Path] = {}
    for role, inside in model.files.items():
        if model.distribution:
            try:
                path = Path(str(distribution(model.distribution).locate_file(inside)))
            except PackageNotFoundError:
                raise ModelUnavailable(
                    f"model {model.name}: the package {model.distribution} that carries its weights is not installed; run `make setup`"
                ) from None
        else:
            path = ROOT / inside
        if not path.exists():
            raise ModelUnavailable(f"model {model.name}: file {inside} is missing; run `make setup`")
        files[role] = path
    folder = model_dir / f"{model.name}@{model.version}"
    for role, wanted in model.sha256.items():
        _verify(model.name, role, files[role], wanted, folder)
    return ResolvedModel(
        model.name, model.version, model.engine, files, folder, dict(model.options), model.memory_mb
    )


def _verify(name: str, role: str, path: Path, wanted: str, folder: Path) -> None:
    """Check a file's SHA-256 once; a stamp of size and time spares the next start the reading."""
    stat = path.stat()
    stamp_file = folder / f".verified-{role}.json"
    stamp = {"path": str(path), "size": stat.st_size, "mtime": stat.st_mtime_ns, "sha256": wanted}
    try:
        if json.loads(stamp_file.read_text()) == stamp:
            return
    except (OSError, ValueError):
        pass
    found = file_sha256(path)
    if found != wanted:
        raise ModelUnavailable(
            f"model {name}: {role} file {path.name} has SHA-256 {found}, but {wanted} is pinned; reinstall the package"
        )
    folder.mkdir(parents=True, exist_ok=True)
    temp = stamp_file.with_suffix(f".{os.getpid()}.tmp")
    temp.write_text(json.dumps(stamp))
    os.replace(temp, stamp_file)

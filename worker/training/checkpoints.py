"""Checkpoints that survive a kill at any moment: atomic, verified on load, never pickled.

A checkpoint is a folder `step-00001000` of safetensors files and a `state.json`, with a `manifest.json` that holds the
SHA-256 of each. It is written under another name, flushed to the disk and renamed, so a folder of that name is
complete or, if the disk lied, fails its manifest; then the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT_VERSION = 1
"""Raised whenever a checkpoint of before could no longer be read."""

_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another kind than asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        step: Steps done when it was written.
        state: Everything that is no tensor: configs, metrics, digests. JSON.
        tensors: Tensors by group (a file each) and name.
        folder: Where it was read from.
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    folder: Path


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(root: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write a checkpoint and return its folder.

    Args:
        root: Folder that holds the checkpoints; made if it is missing.
        step: Steps done, 0 to 99,999,999.
        state: JSON-serialisable state.
        tensors: Tensors by group and name; a group becomes `<group>.safetensors`.

    Returns:
        The folder, complete on the disk. One of the same step that was there before is replaced.
    """
    if not 0 <= step <= 99_999_999:
        raise CheckpointError(f"step is {step}; allowed is 0 to 99999999")
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    temporary = root / f".step-{step:08d}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for group, members in tensors.items():
            # safetensors refuses tensors that share memory, as tied weights would.
            save_file(
                {name: tensor.detach().cpu().contiguous().clone() for name, tensor in members.items()},
                temporary / f"{group}.safetensors",
            )
        document = {"format_version": FORMAT_VERSION, "step": step, **state}
        (temporary / "state.json").write_text(json.dumps(document, indent=1, sort_keys=True), encoding="utf-8")
        files = sorted(path for path in temporary.iterdir())
        manifest = {path.name: _sha256(path) for path in files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        for path in [*files, temporary / "manifest.json", temporary]:
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def read(folder: Path) -> Checkpoint:
    """Read one checkpoint and verify it.

    Raises:
        CheckpointError: A file is missing, was changed, or has another format version; the message names it.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder}: manifest names {name!r}; allowed are plain file names")
            if (found := _sha256(folder / name)) != digest:
                raise CheckpointError(f"{folder / name}: SHA-256 is {found}; the manifest says {digest}")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{folder}: format version is {state['format_version']}; allowed is {FORMAT_VERSION}")
        tensors = {
            name.removesuffix(".safetensors"): load_file(folder / name)
            for name in manifest
            if name.endswith(".safetensors")
        }
        return Checkpoint(step=int(state["step"]), state=state, tensors=tensors, folder=folder)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint: {type(error).__name__}: {error}") from error


def folders(root: Path) -> list[Path]:
    """Return the checkpoint folders under `root`, newest first, unverified."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), reverse=True)


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint under `root` that is whole.

    Args:
        root: A folder of checkpoints, or one checkpoint's folder; then its older siblings stand in if it is damaged.

    Returns:
        The checkpoint, or None when there is none, and what was wrong with those passed over.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged.
    """
    if _NAME.fullmatch(root.name):
        candidates = [p for p in folders(root.parent) if p.name <= root.name]
    else:
        candidates = folders(root)
    problems: list[str] = []
    for folder in candidates:
        try:
            return read(folder), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("no checkpoint is whole: " + "; ".join(problems))
    return None, problems


def prune(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and what a killed writer left behind."""
    for folder in folders(root)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)

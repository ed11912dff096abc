"""Models by name, as producers see them: the project's registry first, then the catalogue."""

from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from contentfactory.catalogue import CatalogueModel, load_catalogue
from contentfactory.errors import InputError
from contentfactory.jobs.spec import KindSpec
from db import registry, tunings


@dataclass(frozen=True)
class PinnedModel:
    """A model version that a job will use.

    Args:
        key: ``name@version``, as stored with the job; ``name@version+tag`` where it runs with chosen inference options.
        tasks: Kinds that it can serve.
        row: Registry row, where it is a registered one.
        entry: Catalogue entry, where it is a known one.
        tuning: Chosen inference options.
        tag: Their tag.
    """

    key: str
    tasks: tuple[str, ...]
    row: dict[str, Any] | None = None
    entry: CatalogueModel | None = None
    tuning: dict[str, Any] | None = None
    tag: str = ""


def find(conn: Connection, project_id: str, name: str) -> PinnedModel:
    """Find a model by ``name``, ``name@version`` or ``name@version+tag``.

    A plain name means the newest version as it was tuned last (``factory tune``); a version means it as it is, without
    chosen options; a tag means those.

    Raises:
        InputError: If there is none; the message names close ones.
    """
    plain, at, version = name.partition("@")
    base, plus, tag = version.rpartition("+")
    if plus:
        found = _find(conn, project_id, f"{plain}@{base}")
        row = tunings.get(conn, project_id, found.key, tag)
        if row is None:
            raise InputError(f"model {found.key} has no inference options {tag!r}", code="unknown_model", param="model")
    else:
        found = _find(conn, project_id, name)
        row = None if at else tunings.active(conn, project_id, found.key)
    if row is None:
        return found
    return replace(found, key=f"{found.key}+{row['tag']}", tuning=dict(row["options"]), tag=row["tag"])


def _find(conn: Connection, project_id: str, name: str) -> PinnedModel:
    plain, _, version = name.partition("@")
    row = registry.model(conn, project_id, plain, version or None)
    if row is not None:
        return PinnedModel(f"{row['name']}@{row['version']}", tuple(row["tasks"]), dict(row))
    entry = load_catalogue().get(plain)
    if entry is not None and version in ("", entry.version):
        return PinnedModel(f"{entry.name}@{entry.version}", entry.tasks, None, entry)
    if entry is not None:
        raise InputError(f"model {plain} has version {entry.version}, not {version!r}", code="unknown_model", param="model")
    import difflib

    known = sorted({*load_catalogue(), *(r["name"] for r in registry.models(conn, project_id))})
    close = difflib.get_close_matches(plain, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"
    raise InputError(f"model {name!r} is not registered; {hint}", code="unknown_model", param="model")


class ModelPins:
    """Pins models for many jobs of one project, asking the ledger once per name.

    Args:
        conn: Connection in a transaction.
        project_id: Project.
    """

    def __init__(self, conn: Connection, project_id: str) -> None:
        self._conn = conn
        self._project_id = project_id
        self._known: dict[str, PinnedModel | InputError] = {}

    def pin(self, spec: KindSpec, name: str | None) -> str | None:
        """The version that a job of this kind will use: ``name@version``, or None where the kind takes no model.

        Raises:
            InputError: If there is no such model, or it cannot do what the kind asks.
        """
        wanted = name or spec.default_model
        if wanted is None:
            return None
        if wanted not in self._known:
            try:
                self._known[wanted] = find(self._conn, self._project_id, wanted)
            except InputError as error:
                self._known[wanted] = error
        found = self._known[wanted]
        if isinstance(found, InputError):
            raise found
        if spec.task not in found.tasks and spec.name not in found.tasks:
            raise InputError(
                f"model {found.key} does {', '.join(found.tasks)}, not {spec.task or spec.name}", code="wrong_model", param="model"
            )
        return found.key

"""``factory models`` and ``factory datasets``."""

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from contentfactory.catalogue import ENGINES
from contentfactory.errors import InputError, NotFound
from producer.cli.common import Json, emit, factory, moment, print_line, table

app = typer.Typer(no_args_is_help=True)
datasets = typer.Typer(no_args_is_help=True)



@app.command("list")
def list_(
    task: Annotated[str | None, typer.Option(help="Only models for this kind of job.")] = None,
    as_json: Json = False,
) -> None:
    """Models that jobs may name: the project's own and the built-in ones."""
    from contentfactory.catalogue import load_catalogue
    from contentfactory.jobs.spec import load_kinds
    from db import registry

    with factory() as f:
        with f.database.read() as conn:
            own = registry.models(conn, f.project_id)
        rows: list[dict[str, Any]] = [
            {"name": r["name"], "version": r["version"], "tasks": r["tasks"], "engine": r["engine"], "from": "job" if r["job_id"] else "added",
             "summary": ", ".join(f"{k} {v:.4g}" for k, v in r["metrics"].items()) if r["metrics"] else "", "licence": ""}
            for r in own
        ]  # fmt: skip
        rows += [
            {"name": m.name, "version": m.version, "tasks": list(m.tasks), "engine": m.engine, "from": "built in", "summary": m.summary, "licence": m.licence}
            for m in sorted(load_catalogue().values(), key=lambda m: m.name)
        ]  # fmt: skip
        rows = [r for r in rows if task is None or task in r["tasks"]]
        defaults = {s.default_model for s in load_kinds().values()}
        if as_json:
            emit([{**r, "default": r["name"] in defaults} for r in rows])
            return
        shown = [(r["name"], r["version"], ", ".join(r["tasks"]), r["engine"], r["from"], r["licence"], r["summary"]) for r in rows]
        table(shown, ("name", "version", "for", "engine", "from", "licence", "summary"), "no models")


@app.command()
def show(name: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")], as_json: Json = False) -> None:
    """Show a model: files, lineage, metrics, inference options that were measured."""
    from dataclasses import asdict

    from db import tunings
    from producer.models import find

    with factory() as f:
        with f.database.read() as conn:
            pinned = find(conn, f.project_id, name)
            base = pinned.key.removesuffix(f"+{pinned.tag}") if pinned.tag else pinned.key
            kept = tunings.of_model(conn, f.project_id, base)
        view = dict(pinned.row) if pinned.row else asdict(pinned.entry)  # type: ignore[arg-type]
        view["inference"] = [
            {"key": f"{base}+{t['tag']}", "in_use": t["active"], "device": t["device"], "options": t["options"], "gain": t["report"].get("gain"),
             "measured_at": t["created_at"]}
            for t in kept
        ]  # fmt: skip
        if as_json:
            emit(view)
            return
        print_line(pinned.key)
        for key, value in view.items():
            if key in ("id", "project_id", "name", "version") or value in (None, "", {}, []):
                continue
            shown = moment(value) if key == "created_at" else json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | tuple) else value
            print_line(f"  {key:<12} {shown}")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name by which jobs will call it.")],
    source: Annotated[str, typer.Argument(help="A folder or file of this machine, or hf:ORG/NAME[@REVISION].")],
    task: Annotated[list[str], typer.Option(help="Kind of job that it serves; may be given several times.")],
    engine: Annotated[str | None, typer.Option(help="Loader in worker/engines; the usual one of the kind where left out.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Engine option NAME=VALUE (value as JSON).")] = None,
    memory_mb: Annotated[int, typer.Option(min=0, help="Memory once loaded, megabytes; estimated from the files where 0.")] = 0,
    as_json: Json = False,
) -> None:
    """Register a model of your own: a local folder or file, or one of the Hugging Face Hub. Pickled weights are refused."""
    from contentfactory.jobs.spec import get_kind
    from db import registry

    with factory() as f:
        if not _NAME.fullmatch(name):
            raise InputError(f"name is {name!r}; allowed: letters, digits and . _ - , at most 100", param="name")
        kinds = [get_kind(t) for t in task]
        for kind in kinds:
            if not kind.takes_model:
                raise InputError(f"{kind.name} takes no model", param="task")
        options = _options(option or [])
        lineage: dict[str, Any] = {"source": source}
        files: dict[str, Any] = {}
        size = 0
        if source.startswith("hf:"):
            repo, _, revision = source.removeprefix("hf:").partition("@")
            if repo.count("/") > 1 or not repo:
                raise InputError(f"{source!r} must have the form hf:ORG/NAME or hf:ORG/NAME@REVISION", param="source")
            options["source"], options["revision"] = repo, revision or None
        else:
            path = Path(source).expanduser().resolve()
            members = _weights_of(path)
            lineage["sha256"], size = _digest(path, members)
            files["folder" if path.is_dir() else "weights"] = {"path": str(path)}
        chosen = engine or _engine_for([k.name for k in kinds], source, files)
        for kind in kinds:
            allowed = ENGINES.get(kind.name)
            if allowed and chosen not in allowed:
                raise InputError(f"engine {chosen!r} does not serve {kind.name}; allowed: {', '.join(allowed)}", param="engine")
        project_id = f.project_id
        memory = memory_mb or max(64, int(size * 1.3 / 2**20))
        version = f.database.run(
            lambda conn: registry.add_model(
                conn, project_id, name, engine=chosen, tasks=[k.name for k in kinds], files=files, options=options, lineage=lineage,
                memory_mb=memory,
            )
        )  # fmt: skip
        emit({"name": name, "version": version, "engine": chosen}) if as_json else print_line(f"{name}@{version}  ({chosen})")


_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_SAFE = (".safetensors", ".gguf", ".onnx", ".tflite", ".sf2", ".param")
_MAYBE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def _weights_of(path: Path) -> list[Path]:
    """The files of a model, without pickled ones.

    Raises:
        InputError: If there are none, or only weights that can run code when they are loaded.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist", param="source")
    members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    pickled = [p for p in members if p.suffix.lower() in _MAYBE and _is_pickle(p)]
    good = [p for p in members if p not in pickled]
    if not any(p.suffix.lower() in (*_SAFE, *_MAYBE) for p in good):
        if pickled:
            names = ", ".join(p.name for p in pickled[:3])
            raise InputError(f"{path} holds only pickled weights ({names}), which can run code when loaded; convert them to safetensors", param="source")
        raise InputError(f"{path} holds no weights; looked for {', '.join(_SAFE)}", param="source")
    return good


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle or torch's zip of one; other tools use the same endings for plain tensors."""
    with open(path, "rb") as stream:
        head = stream.read(2)
    return head[:1] == b"\x80" or head == b"PK"


def _digest(path: Path, members: list[Path]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    root = path if path.is_dir() else path.parent
    for member in members:
        with open(member, "rb") as stream:
            digest.update(f"{member.relative_to(root)}\0".encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        size += member.stat().st_size
    return digest.hexdigest(), size


def _engine_for(tasks: list[str], source: str, files: dict[str, Any]) -> str:
    usual = ENGINES.get(tasks[0])
    if not usual:
        raise InputError(f"no usual engine is known for {tasks[0]}; name one with --engine", param="engine")
    if tasks[0] == "audio.transcribe" and "folder" in files and not (Path(files["folder"]["path"]) / "model.bin").exists():
        return "transformers-whisper"
    if tasks[0] == "image.generate" and "weights" in files:
        return "flow"
    return usual[0]


def _options(pairs: list[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--option {pair!r} must have the form NAME=VALUE", param="option")
        try:
            out[key] = json.loads(value)
        except ValueError:
            out[key] = value
    return out


@datasets.command("list")
def list_datasets(as_json: Json = False) -> None:
    """Registered data sets."""
    from db import registry

    with factory() as f:
        with f.database.read() as conn:
            rows = registry.datasets(conn, f.project_id)
        if as_json:
            emit([dict(r) for r in rows])
            return
        table([(r["name"], r["version"], r["items"], r["digest"][:12], moment(r["created_at"])) for r in rows], ("name", "version", "items", "digest", "created"), "no data sets")


@datasets.command("add")
def add_dataset(
    name: Annotated[str, typer.Argument(help="Name by which training jobs will call it.")],
    path: Annotated[Path, typer.Argument(help="Folder with captions.jsonl and pictures, or a zip of it.")],
    as_json: Json = False,
) -> None:
    """Register a data set: it is packed, hashed and stored; the same content again is the same version."""
    from db import registry

    with factory() as f:
        if not path.exists():
            raise NotFound(f"{path} does not exist")
        with tempfile.TemporaryDirectory(prefix="factory-dataset-") as folder:
            if path.is_dir():
                packed, items = _pack(path, Path(folder) / "dataset.zip")
            else:
                packed, items = Path(shutil.copy(path, folder)), 0
            artifact = f.producer.upload(packed, media_type="application/zip")
            with open(packed, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        project_id = f.project_id
        _, version = f.database.run(
            lambda conn: registry.add_dataset(conn, project_id, name, digest=digest, items=items, artifact_id=artifact, meta={"source": path.name})
        )
        emit({"name": name, "version": version, "digest": digest, "artifact": artifact}) if as_json else print_line(f"{name}@{version}  {digest}")


def _pack(folder: Path, target: Path) -> tuple[Path, int]:
    """A zip whose bytes depend on the content alone: sorted names, fixed times, no compression of pictures."""
    import zipfile

    captions = folder / "captions.jsonl"
    if not captions.is_file():
        raise InputError(f"{folder} has no captions.jsonl", param="path")
    members = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    with zipfile.ZipFile(target, "w") as archive:
        for member in members:
            info = zipfile.ZipInfo(str(member.relative_to(folder)), (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED if member.suffix == ".jsonl" else zipfile.ZIP_STORED
            with open(member, "rb") as source, archive.open(info, "w") as out:
                shutil.copyfileobj(source, out)
    with open(captions, "rb") as stream:
        return target, sum(1 for line in stream if line.strip())

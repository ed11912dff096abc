"""Runner of ``train.flow``."""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image

from contentfactory.errors import InputError, Released
from contentfactory.jobs.training import TrainFlow
from worker.context import InputFile, JobContext, NewModel, Output, Yield
from worker.engines.encoder import load_encoder
from worker.engines.files import ResolvedModel, file_sha256
from worker.networks.flow import ModelFormatError
from worker.runners import runs
from worker.training.data import DatasetError, PictureDataset
from worker.training.flow import FlowTrainingConfig, SizesError, train_flow
from worker.training.solver import TrainingDiverged, TrainingInterrupted

_PACKED = "checkpoint-{step:08d}.zip"


class _Monitor:
    """Passes a training's news on to the factory."""

    def __init__(self, context: JobContext) -> None:
        self.context = context
        self.last_grid: Path | None = None

    def on_step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        words = f"step {step} of {total}, " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k.endswith("loss"))
        self.context.progress(0, step / total, words, {"step": float(step), **metrics})

    def on_checkpoint(self, step: int, folder: Path) -> None:
        packed = self.context.scratch / _PACKED.format(step=step)
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for member in sorted(folder.rglob("*")):
                if member.is_file():
                    # Fixed times: the same state gives the same bytes, and so the same object.
                    info = zipfile.ZipInfo(str(member.relative_to(folder.parent)), (1980, 1, 1, 0, 0, 0))
                    with open(member, "rb") as source, archive.open(info, "w", force_zip64=True) as out:
                        while block := source.read(1 << 20):
                            out.write(block)
        try:
            self.context.publish(Output(0, packed.name, "application/zip", packed, {"step": step}))
        finally:
            packed.unlink(missing_ok=True)

    def on_samples(self, step: int, picture: Image.Image) -> None:
        path = self.context.scratch / f"samples-{step:08d}.png"
        picture.save(path)
        meta = {"step": step, "width": picture.width, "height": picture.height}
        self.context.publish(Output(0, path.name, "image/png", path, meta))
        self.last_grid = path

    def should_stop(self) -> bool:
        # Progress is told with every step: a slow step is no hung one.
        return self.context.cancelled(0) or self.context.should_release


def _unpack(checkpoint: InputFile, root: Path) -> None:
    """Unpack a checkpoint that this factory packed; names that lead out of the folder are refused."""
    with zipfile.ZipFile(checkpoint.path) as archive:
        for info in archive.infolist():
            target = (root / info.filename).resolve()
            if not target.is_relative_to(root.resolve()):
                raise InputError(f"checkpoint {checkpoint.name} holds the path {info.filename!r}, which leads out of its folder")
        archive.extractall(root)


@runs(TrainFlow)
def train(params: list[TrainFlow], context: JobContext) -> Iterator[Yield]:
    """Train, publish checkpoints and sample grids on the way, register the result.

    Raises:
        InputError: If the data set, the sizes or the starting model do not fit.
        Released: If the worker drains: the newest checkpoint is stored, another worker goes on from it.
    """
    p = params[0]
    data = context.fetch(0, p.dataset)
    context.progress(0, None, "reading the data set")

    def reading() -> None:
        context.check(0)
        context.progress(0, None, "reading the data set")

    names = {f.name for f in fields(FlowTrainingConfig)}
    given = {k: v for k, v in p.model_dump(exclude_none=True).items() if k in names}
    try:
        config = FlowTrainingConfig(**given, seed=context.seeds[0])
        dataset = PictureDataset.load(data, config.resolution, reading)
    except (DatasetError, ValueError) as error:
        raise InputError(str(error), param="dataset" if isinstance(error, DatasetError) else None) from None
    encoder_model = context.resolve_model(p.encoder)
    encoder = context.load(lambda m: load_encoder(m, context.device), encoder_model, variant="encoder")

    def embed(texts: list[str]) -> torch.Tensor:
        context.progress(0, None, "embedding captions")
        context.check(0)
        table = torch.empty(len(texts), encoder.dimensions)
        for index, vector in encoder.embed([encoder.encode(text, truncate=True) for text in texts]):
            table[index] = torch.from_numpy(vector)
        return table

    workdir = context.scratch / "training"
    root = workdir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    found = context.checkpoints(0)
    for checkpoint in found:
        try:
            _unpack(checkpoint, root)
        except zipfile.BadZipFile:
            continue  # the one before it is there too
    start_from = _weights(context.resolve_model(p.start_from)) if p.start_from else None
    monitor = _Monitor(context)
    try:
        result = train_flow(config, dataset, embed, monitor, workdir, root if found else None, start_from)
    except TrainingInterrupted as stopped:
        context.check(0)
        raise Released(f"training stopped at step {stopped.step}; it goes on from its checkpoint") from None
    except (TrainingDiverged, ModelFormatError, DatasetError, SizesError) as error:
        raise InputError(str(error)) from None
    lineage = {
        "recipe": "train.flow",
        "dataset_sha256": file_sha256(data.path),
        "pictures": len(dataset),
        "encoder": encoder_model.key,
        "parent": p.start_from,
        "config": json.loads(p.model_dump_json(exclude={"name"})),
    }
    report = {"model": p.name, "step": result.step, "metrics": result.metrics, "lineage": lineage}
    yield Output(0, "report.json", "application/json", json.dumps(report, indent=2, sort_keys=True).encode(), {"step": result.step})
    if monitor.last_grid is not None:
        with Image.open(monitor.last_grid) as grid:
            meta = {"width": grid.width, "height": grid.height}
        yield Output(0, "samples.png", "image/png", monitor.last_grid, meta)
    yield NewModel(
        0, p.name, "flow", ("image.generate",), {"weights": result.model_path},
        options={"steps": p.sample_steps, "guidance": p.guidance}, config={"encoder": encoder_model.key},
        metrics={k: float(v) for k, v in result.metrics.items()}, lineage=lineage, memory_mb=120,
    )  # fmt: skip


def _weights(model: ResolvedModel) -> Path:
    if "weights" not in model.files or model.engine != "flow":
        raise InputError(f"model {model.key} (engine {model.engine}) is no flow model to start from", param="start_from")
    return model.files["weights"]

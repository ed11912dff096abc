"""The training loop that every recipe shares: steps, schedules, averages, checkpoints, resuming.

A recipe hands over `Part`s (a module and its loss). What a step does is a pure function of the seed and the step's
number: each part draws everything (which items, noise, dropout) from a generator made for that step alone. So nothing
about randomness needs to be kept, and a run that was killed and resumed ends in the same bytes as an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from worker.training import checkpoints
from worker.training.checkpoints import Checkpoint, CheckpointError

MAY_CHANGE_ON_RESUME = frozenset(
    {"steps", "checkpoint_every", "samples_every", "report_every", "keep_checkpoints", "concurrent"}
)
"""Solver settings that a resumed run may have otherwise; `steps` so that a run can be prolonged."""


class TrainingMonitor(Protocol):
    """Who watches a training: the job's context, a progress bar, a test."""

    def on_step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Take the metrics, averaged since the last call; `step` of `total` are done."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint lies complete in `folder`."""

    def on_samples(self, step: int, picture: Image.Image) -> None:
        """Take a grid of what the averaged weights make."""

    def should_stop(self) -> bool:
        """Say whether to write a checkpoint and raise `TrainingInterrupted`; asked after every step."""


class SilentMonitor:
    """A monitor that wants to know nothing and never stops."""

    def on_step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Ignore it."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Ignore it."""

    def on_samples(self, step: int, picture: Image.Image) -> None:
        """Ignore it."""

    def should_stop(self) -> bool:
        """Never stop."""
        return False


class TrainingInterrupted(RuntimeError):
    """The monitor asked to stop; a checkpoint was written.

    Attributes:
        step: Steps done.
        folder: The checkpoint to resume from.
    """

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"training was asked to stop after step {step}; resume from {folder.name}")
        self.step = step
        self.folder = folder


class TrainingDiverged(RuntimeError):
    """A loss is no longer a finite number."""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training yields.

    Attributes:
        step: Steps done.
        metrics: The last averaged metrics.
        model_path: The model's weights, written by the recipe.
    """

    step: int
    metrics: dict[str, float]
    model_path: Path


@dataclass(frozen=True)
class SolverConfig:
    """How to train, whatever is trained.

    Attributes:
        steps: Steps in all, at least 1.
        seed: Seed of everything random, 0 to 2**63 - 1.
        optimiser: Name of the rule.
        learning_rate: Its peak, above 0 and at most 10; a part may scale it.
        weight_decay: 0 to 1.
        betas: First and second moment decays of Adam, each in [0, 1); `sgd` takes the first as its momentum.
        schedule: `constant`; `cosine` to `final_share`; `linear` to it; `trapezoid`: constant, then linear to it over
            the last `decay_share` of the steps (a run can be prolonged until the decay begins).
        warmup: Steps of linear rise from 0.
        decay_share: Share of the steps in (0, 1] in which `trapezoid` decays.
        final_share: Share of the peak in [0, 1] left at the end.
        gradient_clip: Largest norm of a part's gradient, above 0, or 0 for no limit.
        average: Decay of the weights' moving average in [0, 1); it starts lower, so early steps fade.
        checkpoint_every: Steps between checkpoints, at least 1.
        samples_every: Steps between sample grids, 0 for none.
        report_every: Steps between reports of metrics, at least 1.
        keep_checkpoints: Newest checkpoints kept on the disk, at least 2, so that one can be damaged.
        concurrent: Run the parts' updates in a thread each; they share nothing, so the result is the same.
    """

    steps: int
    seed: int = 0
    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Literal["constant", "cosine", "linear", "trapezoid"] = "trapezoid"
    warmup: int = 100
    decay_share: float = 0.25
    final_share: float = 0.02
    gradient_clip: float = 1.0
    average: float = 0.999
    checkpoint_every: int = 1000
    samples_every: int = 0
    report_every: int = 20
    keep_checkpoints: int = 2
    concurrent: bool = False

    def __post_init__(self) -> None:
        def check(name: str, allowed: str, right: bool) -> None:
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}")

        check("steps", "1 to 99999999", 1 <= self.steps <= 99_999_999)
        check("seed", "0 to 2**63 - 1", 0 <= self.seed < 2**63)
        check("optimiser", "adamw, adam or sgd", self.optimiser in ("adamw", "adam", "sgd"))
        check("learning_rate", "above 0, at most 10", 0 < self.learning_rate <= 10)
        check("weight_decay", "0 to 1", 0 <= self.weight_decay <= 1)
        check("betas", "two numbers in [0, 1)", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas))
        schedules = ("constant", "cosine", "linear", "trapezoid")
        check("schedule", ", ".join(schedules), self.schedule in schedules)
        check("warmup", "at least 0", self.warmup >= 0)
        check("decay_share", "above 0, at most 1", 0 < self.decay_share <= 1)
        check("final_share", "0 to 1", 0 <= self.final_share <= 1)
        check("gradient_clip", "a number of at least 0", 0 <= self.gradient_clip < math.inf)
        check("average", "[0, 1)", 0 <= self.average < 1)
        check("checkpoint_every", "at least 1", self.checkpoint_every >= 1)
        check("samples_every", "at least 0", self.samples_every >= 0)
        check("report_every", "at least 1", self.report_every >= 1)
        check("keep_checkpoints", "at least 2", self.keep_checkpoints >= 2)

    def rate(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` finished ones."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        done = step / self.steps
        if self.schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * done))
        elif self.schedule == "linear":
            left = 1 - done
        elif self.schedule == "trapezoid":
            left = min(1.0, (1 - done) / self.decay_share)
        else:
            left = 1.0
        if self.schedule != "constant":
            left = self.final_share + (1 - self.final_share) * left
        return self.learning_rate * rise * left


@dataclass(frozen=True)
class Part:
    """A module that is trained by a loss of its own.

    Attributes:
        name: Short name; metrics are called `<name>_loss`.
        module: What is trained.
        loss: Called with the module and the step's generator; returns a scalar. It may draw from nothing but that
            generator, and it may not touch other parts.
        rate_scale: Factor of this part's learning rate, above 0.
        items: Items that one step of it sees, for the throughput.
    """

    name: str
    module: nn.Module
    loss: Callable[[nn.Module, torch.Generator], Tensor]
    rate_scale: float = 1.0
    items: int = 0


def step_seed(seed: int, step: int, name: str) -> int:
    """Return the seed of one part's step: a pure function of its arguments, alike on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()[:8], "big") >> 1


class _Trained:
    """A part with its optimiser and its averaged weights."""

    def __init__(self, part: Part, config: SolverConfig) -> None:
        self.part = part
        self.config = config
        self.parameters = {n: p for n, p in part.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(f"part {part.name!r} has no parameter to train; allowed is at least one")
        values = list(self.parameters.values())
        rate = config.learning_rate * part.rate_scale
        self.optimiser: torch.optim.Optimizer
        if config.optimiser == "sgd":
            self.optimiser = torch.optim.SGD(
                values, lr=rate, momentum=config.betas[0], weight_decay=config.weight_decay
            )
        else:
            rule = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
            self.optimiser = rule(
                values, lr=rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
            )
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}

    def update(self, step: int) -> float:
        """Do the update that follows `step` finished ones; return the loss."""
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, step, self.part.name))
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.rate(step) * self.part.rate_scale
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.part.loss(self.part.module, generator)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDiverged(f"{self.part.name}_loss is {value} at step {step}; lower the learning rate")
        loss.backward()
        if self.config.gradient_clip:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.gradient_clip)
        self.optimiser.step()
        decay = min(self.config.average, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter.detach(), 1 - decay)
        return value

    def optimiser_tensors(self) -> dict[str, Tensor]:
        """The optimiser's tensors by `<parameter's index>/<name>`."""
        state = self.optimiser.state_dict()["state"]
        return {
            f"{index}/{key}": value
            for index, entry in state.items()
            for key, value in entry.items()
            if isinstance(value, Tensor)
        }

    def restore(self, weights: dict[str, Tensor], average: dict[str, Tensor], optimiser: dict[str, Tensor]) -> None:
        """Take everything from a checkpoint."""
        self.part.module.load_state_dict(weights)
        for name, value in self.average.items():
            value.copy_(average[name])
        document = self.optimiser.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.parameters.values())
        for key, tensor in optimiser.items():
            index, name = key.split("/", 1)
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:
                # Files hold tensors row by row; the fused rules walk memory and want the parameter's own strides,
                # which are others for convolutions with the channels last.
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[name] = tensor
        self.optimiser.load_state_dict({"state": state, "param_groups": document["param_groups"]})


class Solver:
    """Trains parts side by side and keeps checkpoints."""

    def __init__(
        self,
        parts: list[Part],
        config: SolverConfig,
        *,
        monitor: TrainingMonitor,
        workdir: Path,
        identity: Mapping[str, Any],
        save_model: Callable[[Path], None],
        draw_samples: Callable[[], Image.Image] | None = None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Prepare a training.

        Args:
            parts: What is trained; names are unique.
            config: How.
            monitor: Who watches.
            workdir: Folder for checkpoints (`checkpoints/`) and the model (`model.safetensors`).
            identity: JSON that a checkpoint must share to be resumed: the recipe's config, the dataset's digest.
            save_model: Writes the model to a path; called with the averaged weights in the modules.
            draw_samples: Makes a grid; called with the averaged weights in the modules.
            constants: Tensors that are not trained and belong into every checkpoint.
        """
        names = [part.name for part in parts]
        if not parts or len(set(names)) != len(names):
            raise ValueError(f"parts are named {names}; allowed is at least one, each of its own name")
        self.config = config
        self.monitor = monitor
        self.workdir = workdir
        self.identity = json.loads(json.dumps(dict(identity)))
        self._save_model = save_model
        self._draw_samples = draw_samples
        self._constants = dict(constants or {})
        self._trained = [_Trained(part, config) for part in parts]
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.problems: list[str] = []

    @property
    def checkpoint_root(self) -> Path:
        """Folder of the checkpoints."""
        return self.workdir / "checkpoints"

    def _write_checkpoint(self) -> Path:
        weights = {f"{t.part.name}.{n}": v for t in self._trained for n, v in t.part.module.state_dict().items()}
        average = {f"{t.part.name}.{n}": v for t in self._trained for n, v in t.average.items()}
        optimiser = {f"{t.part.name}.{n}": v for t in self._trained for n, v in t.optimiser_tensors().items()}
        folder = checkpoints.write(
            self.checkpoint_root,
            self.step,
            {"identity": self.identity, "solver": asdict(self.config), "metrics": self.metrics},
            {"weights": weights, "average": average, "optimiser": optimiser, "constants": self._constants},
        )
        checkpoints.prune(self.checkpoint_root, self.config.keep_checkpoints)
        self.monitor.on_checkpoint(self.step, folder)
        return folder

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.state["identity"] != self.identity:
            theirs, ours = checkpoint.state["identity"], self.identity
            differing = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
            raise CheckpointError(f"{checkpoint.folder.name} is of another training: {', '.join(differing)} differ")
        theirs = checkpoint.state["solver"]
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            value = list(value) if isinstance(value, tuple) else value
            if field.name not in MAY_CHANGE_ON_RESUME and theirs.get(field.name) != value:
                raise CheckpointError(
                    f"{checkpoint.folder.name} was trained with {field.name} {theirs.get(field.name)!r}, not {value!r}"
                )

        def cut(group: str, name: str) -> dict[str, Tensor]:
            prefix = f"{name}."
            return {k.removeprefix(prefix): v for k, v in checkpoint.tensors[group].items() if k.startswith(prefix)}

        try:
            for trained in self._trained:
                name = trained.part.name
                trained.restore(cut("weights", name), cut("average", name), cut("optimiser", name))
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoint.folder.name} does not fit this network: {error}") from error
        self.step = checkpoint.step
        self.metrics = checkpoint.state["metrics"]

    def _with_average(self, action: Callable[[], Any]) -> Any:
        """Run `action` with the averaged weights in the modules, in evaluation; put the trained ones back."""
        kept = [{n: p.detach().clone() for n, p in t.parameters.items()} for t in self._trained]
        try:
            with torch.no_grad():
                for trained in self._trained:
                    trained.part.module.eval()
                    for name, parameter in trained.parameters.items():
                        parameter.copy_(trained.average[name])
                return action()
        finally:
            with torch.no_grad():
                for trained, values in zip(self._trained, kept, strict=True):
                    trained.part.module.train()
                    for name, parameter in trained.parameters.items():
                        parameter.copy_(values[name])

    def run(self, resume_from: Path | None = None) -> TrainingResult:
        """Train to the end.

        Args:
            resume_from: A checkpoint's folder, or a folder of checkpoints; None starts anew. A damaged one is passed
                over for the one before (`problems` says so); an empty folder starts anew.

        Returns:
            The result, once `model.safetensors` lies in the working folder.

        Raises:
            TrainingInterrupted: The monitor asked to stop.
            TrainingDiverged: A loss is not finite.
            CheckpointError: The checkpoint is of another training, or none is whole.
        """
        if resume_from is not None:
            checkpoint, self.problems = checkpoints.newest(resume_from)
            if checkpoint is not None:
                self._restore(checkpoint)
        config = self.config
        for trained in self._trained:
            trained.part.module.train()
        threads = torch.get_num_threads()
        pool: ThreadPoolExecutor | None = None
        if config.concurrent and len(self._trained) > 1:
            # OpenMP counts threads for each calling thread, so each of the pool's is told.
            pool = ThreadPoolExecutor(len(self._trained), "part", torch.set_num_threads, (threads,))
        sums: dict[str, float] = {}
        counted, began = 0, time.monotonic()
        last_checkpoint = self.step if resume_from is not None else -1
        try:
            while self.step < config.steps:
                if pool is None:
                    losses = [trained.update(self.step) for trained in self._trained]
                else:
                    futures = [pool.submit(trained.update, self.step) for trained in self._trained]
                    losses = [future.result() for future in futures]
                self.step += 1
                for trained, loss in zip(self._trained, losses, strict=True):
                    sums[trained.part.name] = sums.get(trained.part.name, 0.0) + loss
                counted += 1
                finished = self.step == config.steps
                if finished or self.step % config.report_every == 0:
                    now = time.monotonic()
                    self.metrics = {f"{name}_loss": total / counted for name, total in sums.items()}
                    self.metrics["learning_rate"] = config.rate(self.step - 1)
                    items = sum(trained.part.items for trained in self._trained)
                    self.metrics["pictures_per_second"] = items * counted / max(1e-9, now - began)
                    sums, counted, began = {}, 0, now
                    self.monitor.on_step(self.step, config.steps, dict(self.metrics))
                if finished or self.step % config.checkpoint_every == 0:
                    self._write_checkpoint()
                    last_checkpoint = self.step
                if (
                    self._draw_samples is not None
                    and config.samples_every
                    and (finished or self.step % config.samples_every == 0)
                ):
                    self.monitor.on_samples(self.step, self._with_average(self._draw_samples))
                if not finished and self.monitor.should_stop():
                    if last_checkpoint != self.step:
                        self._write_checkpoint()
                    raise TrainingInterrupted(self.step, self.checkpoint_root / f"step-{self.step:08d}")
        finally:
            if pool is not None:
                pool.shutdown()
        path = self.workdir / "model.safetensors"
        self._with_average(lambda: self._save_model(path))
        return TrainingResult(self.step, dict(self.metrics), path)

"""The training loop and its checkpoints: exact resuming, damage, interruption, schedules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from worker.training import checkpoints
from worker.training.checkpoints import CheckpointError
from worker.training.solver import (
    Part,
    SilentMonitor,
    Solver,
    SolverConfig,
    TrainingDiverged,
    TrainingInterrupted,
    step_seed,
)

CONFIG = SolverConfig(steps=12, warmup=2, checkpoint_every=4, report_every=3, learning_rate=0.02, seed=5)


class Watcher(SilentMonitor):
    """Records everything and stops after a given step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.steps: list[int] = []
        self.metrics: list[dict[str, float]] = []
        self.saved: list[int] = []
        self.sampled: list[int] = []
        self.asked = 0

    def on_step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        assert total == 12 or total == 20
        self.steps.append(step)
        self.metrics.append(metrics)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        self.saved.append(step)

    def on_samples(self, step: int, picture: Image.Image) -> None:
        self.sampled.append(step)

    def should_stop(self) -> bool:
        self.asked += 1
        return self.stop_after is not None and self.asked >= self.stop_after


def build(
    workdir: Path, config: SolverConfig = CONFIG, monitor: Watcher | None = None, **changes: object
) -> tuple[Solver, dict[str, nn.Module]]:
    """Two small regressions side by side."""
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {"a": nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 1)),
                                     "b": nn.Linear(3, 2)}  # fmt: skip

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        width = next(module.parameters()).shape[1]
        x = torch.randn(16, width, generator=generator)
        y: Tensor = module(x)
        return (y - x.sum(1, keepdim=True)).square().mean()

    def save_model(path: Path) -> None:
        save_file({f"{n}.{k}": v.clone() for n, m in modules.items() for k, v in m.state_dict().items()}, path)

    arguments: dict[str, object] = {
        "monitor": monitor or Watcher(), "workdir": workdir, "identity": {"recipe": "test"},
        "save_model": save_model, "draw_samples": lambda: Image.new("RGB", (4, 4)),
        "constants": {"k": torch.ones(2)}, **changes,
    }  # fmt: skip
    parts = [Part(name, module, loss, items=16) for name, module in modules.items()]
    return Solver(parts, config, **arguments), modules  # type: ignore[arg-type]


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("optimiser", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("concurrent", [False, True])
def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path, optimiser: str, concurrent: bool) -> None:
    config = replace(CONFIG, optimiser=optimiser, concurrent=concurrent)  # type: ignore[arg-type]
    whole = build(tmp_path / "whole", config)[0].run()
    broken = build(tmp_path / "broken", config, Watcher(stop_after=7))[0]
    with pytest.raises(TrainingInterrupted) as stopped:
        broken.run()
    assert stopped.value.step == 7 and stopped.value.folder.is_dir()
    resumed_solver = build(tmp_path / "broken", config)[0]
    resumed = resumed_solver.run(stopped.value.folder)
    assert (whole.step, resumed.step) == (12, 12)
    assert_equal(weights(whole.model_path), weights(resumed.model_path))
    # The last report covers steps 10 to 12, which the resumed run did in full.
    assert whole.metrics["a_loss"] == resumed.metrics["a_loss"]


def test_a_killed_run_repeats_at_most_one_interval(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Killer(Watcher):
        def should_stop(self) -> bool:
            if self.asked == 10:
                raise Killed
            self.asked += 1
            return False

    whole = build(tmp_path / "whole")[0].run()
    with pytest.raises(Killed):
        build(tmp_path / "killed", monitor=Killer())[0].run()
    solver = build(tmp_path / "killed")[0]
    resumed = solver.run(tmp_path / "killed" / "checkpoints")
    assert_equal(weights(whole.model_path), weights(resumed.model_path))
    assert checkpoints.newest(tmp_path / "killed" / "checkpoints")[0] is not None


def test_side_by_side_is_the_same_as_in_turn(tmp_path: Path) -> None:
    one = build(tmp_path / "one")[0].run()
    two = build(tmp_path / "two", replace(CONFIG, concurrent=True))[0].run()
    assert_equal(weights(one.model_path), weights(two.model_path))


def test_it_learns_and_reports(tmp_path: Path) -> None:
    watcher = Watcher()
    config = replace(CONFIG, samples_every=6)
    solver, _ = build(tmp_path, config, watcher)
    result = solver.run()
    assert watcher.steps == [3, 6, 9, 12] and watcher.saved == [4, 8, 12] and watcher.sampled == [6, 12]
    assert set(result.metrics) == {"a_loss", "b_loss", "learning_rate", "pictures_per_second"}
    assert watcher.metrics[-1]["a_loss"] < watcher.metrics[0]["a_loss"]
    assert [f.name for f in checkpoints.folders(tmp_path / "checkpoints")] == ["step-00000012", "step-00000008"]


def test_the_model_is_the_average_and_training_goes_on_unharmed(tmp_path: Path) -> None:
    solver, modules = build(tmp_path, replace(CONFIG, average=0.9))
    path = solver.run().model_path
    trained = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
    checkpoint = checkpoints.newest(tmp_path / "checkpoints")[0]
    assert checkpoint is not None
    assert_equal(checkpoint.tensors["weights"], trained)
    assert_equal(checkpoint.tensors["average"], weights(path))
    assert not torch.equal(trained["b.weight"], weights(path)["b.weight"])
    assert all(m.training for m in modules.values())


def test_a_damaged_checkpoint_falls_back(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole")[0].run()
    root = tmp_path / "broken" / "checkpoints"
    with pytest.raises(TrainingInterrupted):
        build(tmp_path / "broken", monitor=Watcher(stop_after=9))[0].run()
    newest, before = checkpoints.folders(root)
    data = bytearray((newest / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "weights.safetensors").write_bytes(data)
    solver = build(tmp_path / "broken")[0]
    resumed = solver.run(newest)
    assert len(solver.problems) == 1 and "weights.safetensors" in solver.problems[0]
    assert_equal(weights(whole.model_path), weights(resumed.model_path))
    assert before.name == "step-00000008"


def test_every_checkpoint_damaged(tmp_path: Path) -> None:
    build(tmp_path)[0].run()
    for folder in checkpoints.folders(tmp_path / "checkpoints"):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        build(tmp_path)[0].run(tmp_path / "checkpoints")


def test_an_empty_folder_starts_anew(tmp_path: Path) -> None:
    assert build(tmp_path)[0].run(tmp_path / "checkpoints").step == 12


def test_a_half_written_checkpoint_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "_flush", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write(tmp_path, 1, {}, {"weights": {"x": torch.ones(1)}})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_writer_are_cleared(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-00000003.99"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    folder = checkpoints.write(tmp_path, 4, {"a": 1}, {"weights": {"x": torch.ones(1)}})
    checkpoints.prune(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert not [p for p in folder.iterdir() if p.suffix in {".pt", ".pkl", ".bin"}]


def test_a_manifest_cannot_lead_outside(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path, 1, {}, {"weights": {"x": torch.ones(1)}})
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "../secret": "0"}))
    with pytest.raises(CheckpointError, match="plain file names"):
        checkpoints.read(folder)


def test_another_training_is_refused(tmp_path: Path) -> None:
    build(tmp_path)[0].run()
    with pytest.raises(CheckpointError, match="recipe differ"):
        build(tmp_path, identity={"recipe": "other"})[0].run(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="learning_rate"):
        build(tmp_path, replace(CONFIG, learning_rate=0.5))[0].run(tmp_path / "checkpoints")


def test_a_run_can_be_prolonged(tmp_path: Path) -> None:
    constant = replace(CONFIG, schedule="constant")
    whole = build(tmp_path / "whole", replace(constant, steps=20))[0].run()
    build(tmp_path / "parts", constant)[0].run()
    prolonged = build(tmp_path / "parts", replace(constant, steps=20))[0].run(tmp_path / "parts" / "checkpoints")
    assert_equal(weights(whole.model_path), weights(prolonged.model_path))


def test_a_loss_that_is_no_number_stops_it(tmp_path: Path) -> None:
    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        return next(module.parameters()).sum() * float("nan")

    solver, _ = build(tmp_path)
    solver._trained[0].part = replace(solver._trained[0].part, loss=loss)
    with pytest.raises(TrainingDiverged, match="a_loss is nan at step 0"):
        solver.run()


def test_schedules() -> None:
    base = replace(CONFIG, steps=100, warmup=10, learning_rate=1.0, final_share=0.1)
    for schedule in ("constant", "cosine", "linear", "trapezoid"):
        config = replace(base, schedule=schedule)  # type: ignore[arg-type]
        rates = [config.rate(step) for step in range(100)]
        assert rates[0] <= 0.1 and max(rates) <= 1.0
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[-1] == (1.0 if schedule == "constant" else pytest.approx(0.1, abs=0.05))
    assert replace(base, schedule="trapezoid", decay_share=0.2).rate(79) == 1.0


def test_seeds_depend_on_all_three() -> None:
    assert step_seed(0, 1, "a") == step_seed(0, 1, "a")
    assert len({step_seed(0, 1, "a"), step_seed(1, 1, "a"), step_seed(0, 2, "a"), step_seed(0, 1, "b")}) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("optimiser", "lion"), ("learning_rate", 0.0), ("schedule", "step"), ("average", 1.0),
     ("betas", (0.9, 1.0)), ("keep_checkpoints", 1), ("decay_share", 0.0), ("checkpoint_every", 0)],
)  # fmt: skip
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is "):
        replace(CONFIG, **{field: value})  # type: ignore[arg-type]


def test_parts_need_names_and_parameters(tmp_path: Path) -> None:
    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        return torch.zeros(())

    common = {"monitor": SilentMonitor(), "workdir": tmp_path, "identity": {}, "save_model": lambda path: None}
    twice = [Part("a", nn.Linear(1, 1), loss), Part("a", nn.Linear(1, 1), loss)]
    with pytest.raises(ValueError, match="each of its own name"):
        Solver(twice, CONFIG, **common)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter to train"):
        Solver([Part("a", nn.ReLU(), loss)], CONFIG, **common)  # type: ignore[arg-type]

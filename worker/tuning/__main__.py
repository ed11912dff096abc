"""``python -m worker.tuning``: measures a model's inference options, each in a process of its own, and prints JSON.

A process for each: one option that crashes, hangs or fills the memory costs its own line of the table and nothing else, and
peak memory and libraries' switches are each its own.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from contentfactory.errors import FactoryError
from contentfactory.settings import load_settings
from db.session import Database
from producer.services import open_store
from worker import memory
from worker.engines.files import ResolvedModel
from worker.engines.options import InferenceOptions, missing
from worker.execution import pick_device
from worker.resolve import resolve_model, tuned
from worker.tuning import plan, probes
from worker.tuning.plan import Candidate, Result

LONGEST_S = 600.0
"""Time for one set of options; what compiles for longer does not pay either. A shorter measurement has a shorter one."""


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m worker.tuning")
    parser.add_argument("model")
    parser.add_argument("--project", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--allow-lossy", action="store_true")
    parser.add_argument("--options", help="measure these options only (used by itself)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    settings = load_settings()
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.torch_threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    database, store = Database(settings.database(), pool_size=1), open_store(settings)
    try:
        if args.options is not None:
            _one(args, lambda name: resolve_model(settings, database, store, args.project, name))
        else:
            model = resolve_model(settings, database, store, args.project, args.model)
            sys.stdout.write(json.dumps(tune(args, model)) + "\n")
    except FactoryError as error:
        sys.stdout.write(json.dumps({"error": error.to_dict()}) + "\n")
        return 1
    finally:
        database.close()
        store.close()
    return 0


def tune(args: argparse.Namespace, model: ResolvedModel) -> dict[str, Any]:
    """Measure every candidate and choose; a report of JSON values."""
    device = pick_device(args.device)
    kind = plan.QUALITY.get(model.engine)
    if kind is None:
        raise FactoryError(f"model {model.key}: nothing can be tuned on the engine {model.engine}", code="not_tunable")
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="factory-tune-") as folder:
        reference = Path(folder) / "defaults.npz"

        def run(candidate: Candidate) -> None:
            why = candidate.why_not or missing(candidate.options, device)
            if why:
                result = Result(candidate.name, candidate.options.stored(), skipped=why, lossy=candidate.lossy)
            else:
                out = reference if not results else Path(folder) / "found.npz"
                result = _in_child(args, candidate, device, out)
                if results and not result.skipped:
                    with np.load(reference) as a, np.load(out) as b:
                        quality = probes.distances(kind, a, b)
                    result = replace(result, quality=quality, same=plan.within(kind, quality))
            sys.stderr.write(json.dumps(asdict(result)) + "\n")
            sys.stderr.flush()
            results.append(result)

        for candidate in plan.candidates(model.engine, device, model.options):
            run(candidate)
            if results[0].skipped:
                raise FactoryError(f"model {model.key} does not run as it is: {results[0].skipped}", code="not_tunable")
        both = plan.combined(results, args.allow_lossy)
        if both:
            run(both)
        if plan.choose(results, args.allow_lossy) is not results[0]:
            # The machine may have been busy at first: nothing is changed because of that.
            again = _in_child(args, plan.candidates(model.engine, device, model.options)[0], device, Path(folder) / "again.npz")
            results[0] = plan.better(results[0], again)
    chosen = plan.choose(results, args.allow_lossy)
    options = {**chosen.options, "device": device.partition(":")[0]} if chosen is not results[0] else {}
    return {
        "model": model.key, "engine": model.engine, "device": memory.device_name(device), "threads": int(os.environ["OMP_NUM_THREADS"]),
        "tolerance": dict(plan.TOLERANCE[kind]), "results": [asdict(r) for r in results], "chosen": chosen.name, "options": options,
        "gain": round(chosen.best / max(results[0].best, 1e-9), 3), "batch": plan.smallest_batch(chosen.speed),
    }  # fmt: skip


def _in_child(args: argparse.Namespace, candidate: Candidate, device: str, out: Path) -> Result:
    stored = candidate.options.stored()
    command = [
        sys.executable, "-m", "worker.tuning", args.model, "--project", args.project, "--device", device, "--seconds", str(args.seconds),
        "--most", str(args.most), "--options", json.dumps(stored), "--out", str(out),
    ]  # fmt: skip
    failed = Result(candidate.name, stored, lossy=candidate.lossy)
    longest = min(LONGEST_S, 60.0 + 180.0 * args.seconds)
    # No compiler's helpers that outlive it, and a group of its own: a compile that takes too long goes with all it started.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out_text, err_text = process.communicate(timeout=longest)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return replace(failed, skipped=f"took longer than {longest:.0f} s")
    try:
        answer = json.loads(out_text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (err_text.strip().splitlines() or ["no word"])[-1]
        return replace(failed, skipped=f"ended with code {process.returncode}: {last[:200]}")
    if "error" in answer:
        return replace(failed, skipped=str(answer["error"]["message"])[:300])
    return replace(failed, **answer)


def _one(args: argparse.Namespace, resolve: Any) -> None:
    """Measure one set of options in this process; prints what `Result` takes."""
    options = InferenceOptions(**json.loads(args.options)).stored()
    model = resolve(args.model)
    model = replace(model, options=tuned(model.options, options))
    began = time.monotonic()
    try:
        probe = probes.open_probe(model, args.device, args.most, resolve)
        load_s = time.monotonic() - began
        np.savez(args.out, **probe.result())
        speed = probes.measure(probe, args.seconds)
    except FactoryError:
        raise
    except Exception as error:
        what = "out of memory" if memory.is_out_of_memory(error) else f"{type(error).__name__}: {str(error).strip()[:200]}"
        raise FactoryError(what, code="did_not_run") from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
    answer = {"speed": speed, "unit": probe.unit, "load_s": round(load_s, 3), "memory_mb": round(peak)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    sys.exit(main())
